"""Room 9: upstreams behind a forward proxy, by CONNECT and in absolute-form; what a proxy may do to us."""

import base64
import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import unittest
from typing import Any, Dict, List
from unittest import mock

import plexus_lite
from tests.support import (
    Answer,
    Cut,
    FakeUpstream,
    Pause,
    Proxy,
    Recorded,
    Reply,
    Wire,
    answer,
    enter,
    get,
    make_config,
    post,
    render_head,
    run_cli,
)
from tests.test_transport import CA_FILE, SERVER_FILE, TransportTest, refusing_port

PASSWORD = "s3cret pass:word"  # as %XX in the URL
USER_INFO = "ann:s3cret%20pass%3Aword"
TOKEN = base64.b64encode(f"ann:{PASSWORD}".encode()).decode()
BODY = {"model": "m"}
TINYPROXY = shutil.which("tinyproxy", path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/bin")


class FakeProxy(FakeUpstream):
    """A strict forward proxy: opens tunnels, answers an absolute-form request itself as its upstream would.

    What is scripted comes instead, and no tunnel after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.default = self.judge

    def judge(self, request: Recorded) -> Reply:
        if request.all("Proxy-Authorization") != ["Basic " + TOKEN]:
            return answer(407, {"Proxy-Authenticate": 'Basic realm="proxy"'}, b"give a password")
        if request.method == "CONNECT":
            assert request.all("Host") == [request.target], request
            return [b"HTTP/1.1 200 Connection established\r\nVia: fake\r\n\r\n"]
        found = re.match(r"^http://([^/]+)/", request.target)
        assert found and request.all("Host") == [found.group(1)], request
        return answer(200, (), {"from": "proxy"})

    def _serve_one(self, wire: Wire, number: int) -> bool:
        with self._changed:
            scripted = bool(self._replies)
        if not super()._serve_one(wire, number) or scripted:
            return False
        found = [one for one in self.requests if one.connection == number]
        if not found:  # forgotten meanwhile: the test has ended
            return False
        request = found[-1]
        if request.method != "CONNECT":
            return True
        host, port = request.target.split(":")
        with socket.create_connection((host, int(port)), 5) as onward:
            both = [wire.sock, onward]
            while True:
                for sock in select.select(both, [], [], 10)[0]:
                    data = sock.recv(65536)
                    if not data:
                        return False
                    both[sock is wire.sock].sendall(data)


class ForwardProxyTest(TransportTest):
    forward: FakeProxy

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream(tls=(SERVER_FILE, SERVER_FILE)))
        cls.forward = enter(cls.addClassCleanup, FakeProxy())
        local = f"https://localhost:{cls.upstream.port}/v1"
        good = f"http://{USER_INFO}@127.0.0.1:{cls.forward.port}/"
        dead = refusing_port(cls.addClassCleanup)
        providers = {
            name: {
                "api_base_url": url,
                "models": [name],
                "ca_file": CA_FILE,
                "proxy": proxy,
                "connect_timeout_s": 0.2 if name == "silent" else 10,
            }
            for name, url, proxy in (
                ("tunnel", local, good),
                ("blocked", local, good),
                ("silent", local, good),
                ("absolute", "http://upstream.invalid/v1", good),
                ("other-name", local.replace("localhost", "127.1"), good),
                ("wrong", local, good.replace("ann", "bob")),
                ("wrong-absolute", "http://upstream.invalid/v1", good.replace("ann", "bob")),
                ("nobody", local, f"http://127.0.0.1:{cls.forward.port}"),
                ("dead", local, f"http://127.0.0.1:{dead}"),
            )
        }
        providers["demo"] = {"api_base_url": "demo://", "models": ["demo"], "proxy": f"http://127.0.0.1:{dead}"}
        config = {"providers": providers, "keys": {"team": {"secret": "sk-client"}}}
        cls.proxy = enter(cls.addClassCleanup, Proxy(config))

    def setUp(self):
        self.upstream.reset()
        self.forward.reset()

    def tearDown(self):
        told = self.proxy.error_text() + get(self.proxy.port, "/metrics").body.decode()
        for secret in (TOKEN, PASSWORD, USER_INFO):
            self.assertNotIn(secret, told)

    def ask(self, model: str, **headers: str) -> Answer:
        return post(self.proxy.port, "/v1/responses", {"model": model}, headers)

    def refused(self, model: str, status: int = 502) -> str:
        got = self.ask(model)
        code = "upstream_connection_error" if status == 502 else "upstream_timeout"
        self.assertEqual(got.all("Proxy-Authenticate"), [])
        return self.check_error(got, status, code)

    def test_https_goes_through_a_tunnel_that_is_used_again(self):
        for _ in range(2):
            self.assertEqual(self.ask("tunnel", **{"Proxy-Authorization": "Basic client"}).status, 200)
        first, second = self.upstream.requests
        self.assertEqual((first.target, first.connection), ("/v1/responses", second.connection))
        self.assertEqual(first.all("Proxy-Authorization"), [])
        (connect,) = self.forward.requests
        place = f"localhost:{self.upstream.port}"
        self.assertEqual((connect.method, connect.target), ("CONNECT", place))
        self.assertEqual(connect.headers, [("Host", place), ("Proxy-Authorization", "Basic " + TOKEN)])

    def test_http_goes_in_absolute_form_over_a_connection_that_is_used_again(self):
        for _ in range(2):
            got = self.ask("absolute", **{"Proxy-Authorization": "Basic client"})
            self.assertEqual((got.status, got.json()), (200, {"from": "proxy"}))
        first, second = self.forward.requests
        self.assertEqual((first.method, first.target), ("POST", "http://upstream.invalid/v1/responses"))
        self.assertEqual(first.all("Host"), ["upstream.invalid"])
        self.assertEqual(first.connection, second.connection)

    def test_certificate_is_checked_against_the_target_and_never_past_the_proxy(self):
        message = self.refused("other-name")
        self.assertIn('certificate of 127.1 is for "127.0.0.1", "localhost", not for 127.1', message)
        self.assertEqual([one.method for one in self.forward.requests], ["CONNECT", "CONNECT"])
        self.assertEqual(self.upstream.requests, [])

    def test_407_is_a_502_that_names_the_setting_and_not_the_password(self):
        for name in ("wrong", "wrong-absolute", "nobody"):
            with self.subTest(name):
                message = self.refused(name)
                self.assertIn("asks for" if name == "nobody" else "does not take", message)
                self.assertIn(f"password; check providers.{name}.proxy", message)
                for secret in (TOKEN, PASSWORD, "s3cret", "give a password"):
                    self.assertNotIn(secret, message)

    def test_refusal_to_connect_is_a_502_of_our_own(self):
        for status in (403, 502, 503, 504, 302, 101):
            with self.subTest(status):
                self.setUp()
                self.forward.script([*answer(status, {"x-proxy": TOKEN}, b"<h1>No</h1>"), Cut()])
                got = self.ask("blocked")
                message = self.check_error(got, 502, "upstream_connection_error")
                self.assertIn(f"localhost:{self.upstream.port}", message)
                self.assertIn(f"proxy 127.0.0.1:{self.forward.port}: it answered {status}", message)
                self.assertEqual((got.all("x-proxy"), b"<h1>" in got.body), ([], False))

    def test_answer_to_connect_that_is_no_strict_http_is_a_502(self):
        established = b"HTTP/1.1 200 Connection established\r\n"
        for name, words in (
            ("other protocol", b"220 mail ESMTP\r\n\r\n"),
            ("bare line ends", established.replace(b"\r", b"") + b"\n\r\n\r\n"),
            ("folded field", established + b"Via: x\r\n y\r\n\r\n"),
            ("bytes after the head", established + b"\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
            ("cut", established),
            ("nothing", b""),
        ):
            with self.subTest(name):
                self.setUp()
                self.forward.script([words, Cut()])
                self.assertIn("proxy", self.refused("blocked"))
                self.assertEqual(self.upstream.requests, [])

    def test_head_without_end_is_not_waited_for(self):
        more = threading.Event()
        self.addCleanup(more.set)
        self.forward.script([b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000, Pause(more)])
        self.assertIn("it does not answer in HTTP", self.refused("blocked"))

    def test_silence_after_connect_is_a_504_after_connect_timeout_s(self):
        more = threading.Event()
        self.addCleanup(more.set)
        self.forward.script([b"HTTP/1.1 200 OK\r\n", Pause(more)])
        message = self.refused("silent", 504)
        self.assertIn("through the proxy", message)
        self.assertIn("connect_timeout_s of silent", message)

    def test_proxy_that_is_down_or_breaks_off_is_named(self):
        self.assertIn("connection to the proxy 127.0.0.1:", self.refused("dead"))
        self.forward.script([Cut()], [Cut()])
        self.assertIn(
            f"upstream.invalid through the proxy 127.0.0.1:{self.forward.port} closed", self.refused("absolute")
        )

    def test_demo_needs_no_proxy(self):
        self.assertEqual(self.ask("demo").status, 200)

    def test_password_is_masked_where_the_proxy_repeats_it(self):
        page = f"<p>{PASSWORD} {TOKEN}</p>".encode()
        self.forward.script(
            [render_head("HTTP/1.1 403 No", {"X-Sent": TOKEN, "Content-Length": str(len(page))}) + page]
        )
        got = self.ask("absolute")
        self.assertEqual(got.status, 403)
        self.assertEqual(got.all("X-Sent"), ["*" * len(TOKEN)])
        self.assertEqual(got.body, b"<p>" + b"*" * len(PASSWORD) + b" " + b"*" * len(TOKEN) + b"</p>")


class EnvironmentTest(TransportTest):
    def test_variables_count_for_a_provider_that_wants_them(self):
        self.upstream = enter(self.addCleanup, FakeUpstream())
        forward = enter(self.addCleanup, FakeProxy())
        config = make_config(self.upstream, {"proxy": "env"})
        for name, url in (("by-http", "http://a.invalid/v1"), ("by-https", "https://b.invalid/v1")):
            config["providers"][name] = {"api_base_url": url, "models": [name], "proxy": "env"}
        env = {
            "HTTP_PROXY": f"{USER_INFO}@127.0.0.1:{forward.port}",  # without a scheme, as many have it
            "https_proxy": f"http://{USER_INFO}@127.0.0.1:{forward.port}",
            "NO_PROXY": "internal.example,127.0.0.1",
        }
        proxy = enter(self.addCleanup, Proxy(config, env=env))
        self.assertEqual(post(proxy.port, "/v1/responses", {"model": "by-http"}).json(), {"from": "proxy"})
        forward.script([*answer(502), Cut()])
        self.assertEqual(post(proxy.port, "/v1/responses", {"model": "by-https"}).status, 502)
        targets = [request.target for request in forward.requests]
        self.assertEqual(targets, ["http://a.invalid/v1/responses", "b.invalid:443"])
        self.assertEqual(post(proxy.port, "/v1/responses", {"model": "gpt-test"}).status, 200)
        self.assertEqual((len(forward.requests), self.upstream.requests[0].target), (2, "/v1/responses"))


class FileTest(TransportTest):
    """A provider's proxy is file:forward."""

    def setUp(self):
        self.forward = enter(self.addCleanup, FakeProxy())
        gw = {"api_base_url": "http://a.invalid/v1", "models": ["m"], "proxy": "file:forward"}
        off = {**gw, "proxy": "file:missing", "enabled": False}
        self.proxy = Proxy({"providers": {"gw": gw, "off": off}})
        self.addCleanup(shutil.rmtree, self.proxy.folder, ignore_errors=True)
        self.path = os.path.join(self.proxy.folder, "forward")

    def write(self, text: str, mode: int = 0o600) -> None:
        with open(self.path, "w", encoding="ascii") as file:
            file.write(text)
        os.chmod(self.path, mode)

    def reload(self, words: str) -> str:
        self.proxy.process.send_signal(signal.SIGHUP)
        return str(self.proxy.wait_for_record(lambda one: words in one.get("message", ""))["message"])

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
    def test_url_in_a_file_is_read_at_start_and_on_sighup(self):
        self.write(f"http://ann:wrong@127.0.0.1:{self.forward.port}\n", 0o644)
        with self.proxy:
            self.assertEqual(post(self.proxy.port, "/v1/responses", BODY).status, 502)
            warning = f"providers.gw.proxy: others may use {self.path} (mode 0644)"
            self.proxy.wait_for_record(lambda one: warning in one.get("message", ""))
            self.write(f"http://{USER_INFO}@127.0.0.1:{self.forward.port}\n")
            self.reload("configuration reloaded")
            self.assertEqual(post(self.proxy.port, "/v1/responses", BODY).json(), {"from": "proxy"})
            self.write("")
            self.assertIn(f"providers.gw.proxy: {self.path}: is empty", self.reload("not reloaded"))
            self.assertEqual(post(self.proxy.port, "/v1/responses", BODY).json(), {"from": "proxy"})
        for secret in (TOKEN, PASSWORD, USER_INFO):
            self.assertNotIn(secret, self.proxy.error_text())

    def test_what_cannot_be_used_is_one_line_with_key_and_file_and_without_the_password(self):
        for text, words in (
            ("http://ann:s3cret@proxy:port", "expected a URL like"),
            ("https://ann:s3cret@proxy", "TLS to the proxy itself"),
            ("s3cret s3cret", "must hold one line"),
            ("env", "expected a URL like"),
            ("file:s3cret", "expected a URL like"),
        ):
            with self.subTest(text):
                self.write(text)
                done = run_cli("check", "--config", self.proxy.config_path)
                self.assertEqual((done.returncode, done.stdout), (plexus_lite.EXIT_USAGE, ""))
                (line,) = done.stderr.splitlines()
                self.assertIn(f"config.json: providers.gw.proxy: {self.path}: {words}", line)
                self.assertNotIn("s3cret", line)


class ConfigTest(unittest.TestCase):
    def provider(self, proxy: Any) -> plexus_lite.Provider:
        config = make_config("https://host.example/v1", {"proxy": proxy})
        return plexus_lite.parse_config(config).providers["up"]

    def test_url_is_read(self):
        for url, host, port, credentials in (
            ("http://proxy:3128", "proxy", 3128, b""),
            ("http://Proxy/", "proxy", 80, b""),
            (f"http://{USER_INFO}@[::1]:8080", "::1", 8080, f"ann:{PASSWORD}".encode()),
            ("http://ann@proxy", "proxy", 80, b"ann:"),
            ("http://:token@proxy", "proxy", 80, b":token"),
        ):
            with self.subTest(url):
                self.assertEqual(self.provider(url).proxy, plexus_lite.ForwardProxy(host, port, credentials))
        self.assertEqual(plexus_lite.ForwardProxy("::1", 80, b"").name, "[::1]:80")

    def test_what_is_no_proxy_is_refused_without_the_password(self):
        for value, words in (
            ("", "expected"),
            ("proxy:3128", "expected"),
            ("ENV", "expected"),
            ("socks5://s3cret@proxy", "expected"),
            ("http://ann:s3cret#1@proxy", "expected"),
            ("http://ann:s3cret@proxy:port", "expected"),
            ("http://ann:s3cret@proxy/path", "expected"),
            ("http://ann:s3cret@proxy?x", "expected"),
            ("http://ann:s3cret@proxy#x", "expected"),
            ("http://ann:s3 cret@proxy", "expected"),
            ("http://ann:s3cret@", "expected"),
            ("https://ann:s3cret@proxy", "TLS to the proxy itself is not supported"),
        ):
            with self.subTest(value), self.assertRaises(plexus_lite.ConfigError) as caught:
                self.provider(value)
            self.assertTrue(str(caught.exception).startswith(f"providers.up.proxy: {words}"), caught.exception)
            self.assertNotIn("s3", str(caught.exception))

    def test_password_stands_in_no_repr(self):
        provider = self.provider(f"http://{USER_INFO}@proxy")
        self.assertNotIn("s3cret", repr(provider) + repr(provider.proxy))

    def test_bad_variable_is_refused_by_name_without_the_password(self):
        provider = self.provider("env")
        with mock.patch.dict(os.environ, {"https_proxy": "https://ann:s3cret@proxy", "no_proxy": "x.example"}):
            with self.assertRaises(plexus_lite.ConfigError) as caught:
                plexus_lite.find_proxy(provider, "https://host.example/v1")
            self.assertIsNone(plexus_lite.find_proxy(provider, "https://x.example:8443/v1"))
        self.assertIn("providers.up.proxy: HTTPS_PROXY: TLS to the proxy", str(caught.exception))
        self.assertNotIn("s3cret", str(caught.exception))


@unittest.skipUnless(TINYPROXY, "tinyproxy is not installed")
class TinyproxyTest(TransportTest):
    def test_real_proxy_with_a_password_takes_us_to_https_and_http(self):
        tls = enter(self.addCleanup, FakeUpstream(tls=(SERVER_FILE, SERVER_FILE)))
        plain = enter(self.addCleanup, FakeUpstream())
        folder = enter(self.addCleanup, tempfile.TemporaryDirectory())
        port = self.free_port()
        conf = os.path.join(folder, "tinyproxy.conf")
        with open(conf, "w", encoding="ascii") as file:
            file.write(f"Port {port}\nListen 127.0.0.1\nTimeout 10\nAllow 127.0.0.1\nBasicAuth ann s3cret\n")
            file.write(f'LogFile "{folder}/log"\nConnectPort {tls.port}\n')
        process = subprocess.Popen([str(TINYPROXY), "-d", "-c", conf], stdout=subprocess.DEVNULL)
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.terminate)
        self.wait_for_port(port, process)
        providers: Dict[str, Any] = {
            name: {"api_base_url": url, "models": [name], "ca_file": CA_FILE, "proxy": f"http://{user}127.0.0.1:{port}"}
            for name, url, user in (
                ("https", tls.base_url, "ann:s3cret@"),
                ("http", plain.base_url, "ann:s3cret@"),
                ("forbidden", plain.base_url.replace("http", "https"), "ann:s3cret@"),
                ("stranger", tls.base_url, "ann:wrong@"),
                ("stranger-http", plain.base_url, ""),
            )
        }
        proxy = enter(self.addCleanup, Proxy({"providers": providers}))
        got: List[Answer] = []
        for name in ("https", "https", "http", "http"):
            got.append(post(proxy.port, "/v1/responses", {"model": name, "stream": True}))
        self.assertEqual([(one.status, one.complete) for one in got], [(200, True)] * 4)
        self.assertIn(b"response.completed", got[0].body)
        self.assertEqual([request.connection for request in tls.requests], [1, 1])
        self.assertEqual(plain.requests[0].all("Proxy-Authorization"), [])
        for name, words in (
            ("forbidden", "it answered 403"),
            ("stranger", "does not take"),
            ("stranger-http", "asks for"),
        ):
            with self.subTest(name):
                message = self.check_error(
                    post(proxy.port, "/v1/responses", {"model": name}), 502, "upstream_connection_error"
                )
                self.assertIn(words, message)

    def free_port(self) -> int:
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            return int(sock.getsockname()[1])

    def wait_for_port(self, port: int, process: "subprocess.Popen[bytes]") -> None:
        """Wait until something listens: tinyproxy tells nobody when it does."""
        for _ in range(500):
            with contextlib.suppress(ConnectionError):
                socket.create_connection(("127.0.0.1", port), 5).close()
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.fail(f"tinyproxy ended with {process.wait(0.02)}")
        self.fail("tinyproxy does not listen")


if __name__ == "__main__":
    unittest.main()
