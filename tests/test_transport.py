"""Room 8 and failover, end to end: pooled connections, TLS, what an upstream may answer, and who is asked next."""

import contextlib
import email.utils
import gc
import os
import socket
import ssl
import threading
import time
import unittest
import weakref
from typing import Any, Callable, Dict, Iterator, List, Tuple
from unittest import mock

import plexus_lite
from tests.support import (
    Answer,
    Cut,
    FakeUpstream,
    Pause,
    Proxy,
    RawClient,
    Reply,
    Reset,
    answer,
    build_request,
    enter,
    get,
    make_config,
    post,
    render_head,
    shut_down,
    stream,
)
from tests.test_observation import parse_metrics, total

HERE = os.path.dirname(os.path.abspath(__file__))
CA_FILE = os.path.join(HERE, "tls_ca.pem")  # made for these tests, trusted by nobody, valid until 2120
SERVER_FILE = os.path.join(HERE, "tls_server.pem")  # certificate and key for 127.0.0.1 and localhost, signed by it
BAD_REQUEST = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
BODY = {"model": "gpt-test", "input": "x"}
ASK = build_request("POST", "/v1/responses", BODY)


def wire(reply: Reply) -> bytes:
    """Return *reply* as one piece."""
    return b"".join(step for step in reply if isinstance(step, bytes))


class Script:
    """A reply whose steps a generator yields: the code after a yield runs once those bytes are sent."""

    def __init__(self, steps: Callable[[], Iterator[Any]]) -> None:
        self._steps = steps

    def __iter__(self) -> Iterator[Any]:
        return self._steps()


def idle_loop() -> Any:
    """Return a loop that watches nothing and calls at once, for a pool on its own."""
    return mock.Mock(hand=lambda function, *arguments: function(*arguments), close=lambda sock: sock.close())


def refusing_port(add_cleanup: Callable[..., Any]) -> int:
    """Return a port that refuses connections until *add_cleanup* gives it back."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    add_cleanup(sock.close)
    return int(sock.getsockname()[1])


def silent_port(add_cleanup: Callable[..., Any]) -> int:
    """Return a port that takes connections and never says a word."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    sock.listen(64)
    add_cleanup(sock.close)
    return int(sock.getsockname()[1])


def talking_port(add_cleanup: Callable[..., Any], words: bytes) -> int:
    """Return a port that says *words* to whoever connects, and closes."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(8)

    def serve() -> None:
        with contextlib.suppress(OSError):  # of accept(), once the listener is shut down
            while True:
                sock, _ = listener.accept()
                with sock:
                    sock.sendall(words)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    add_cleanup(listener.close)
    add_cleanup(thread.join, 10)
    add_cleanup(shut_down, listener)
    return int(listener.getsockname()[1])


class TransportTest(unittest.TestCase):
    proxy: Proxy
    upstream: FakeUpstream

    def check_error(self, got: Answer, status: int, code: str) -> str:
        self.assertEqual((got.status, got.error_code, got.all("x-plexus-error")), (status, code, [code]), got.body)
        message = str(got.json()["error"]["message"])
        self.assertTrue(message.startswith("upstream connection error:"), message)
        return message


class PoolTest(TransportTest):
    decoy: FakeUpstream

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream())
        cls.decoy = enter(cls.addClassCleanup, FakeUpstream())
        decoy = f"http://127.0.0.1:{cls.decoy.port}"
        names = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
        config = make_config(cls.upstream, limits={"pool_idle_s": 3600})
        cls.proxy = enter(cls.addClassCleanup, Proxy(config, env=dict.fromkeys(names, decoy)))

    def setUp(self):
        self.upstream.reset()

    def ask(self, *replies: Any) -> Answer:
        self.upstream.script(*replies)
        return post(self.proxy.port, "/v1/responses", BODY)

    def serving(self) -> int:
        """Return the number of the connection that the last request came on."""
        return self.upstream.wait_for_requests(1)[-1].connection

    def test_connection_is_reused_after_every_kind_of_whole_answer(self):
        self.assertEqual(self.ask(answer(200, (), {})).status, 200)
        first = self.serving()
        for reply in (
            answer(200, (), {}),
            stream(b"data: 1\n\n"),
            answer(404, (), {}),
            answer(500, (), {}),
            stream(b"x" * 100_000, status=400),
            [render_head("HTTP/1.1 204 None", ())],
            answer(200, {"Connection": "keep-alive"}, b""),
        ):
            self.ask(reply)
            self.assertEqual(self.serving(), first)

    def test_connection_is_not_reused_where_the_answer_forbids_it(self):
        for name, reply in (
            ("close", answer(200, {"Connection": "close"}, {})),
            ("close in a list", answer(200, {"Connection": "x-a, Close"}, {})),
            ("HTTP/1.0", [b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}"]),
            ("cut", stream(b"data: 1\n\n", end=False) + [Cut()]),
            ("surplus", [wire(answer(200, (), {})) + b"x"]),
        ):
            with self.subTest(name):
                self.ask(reply)
                used = self.serving()
                self.assertEqual(self.ask(answer(200, (), {"own": 1})).json(), {"own": 1})
                self.assertNotEqual(self.serving(), used)

    def test_half_read_answer_is_never_continued_for_the_next_client(self):
        rest = threading.Event()
        self.addCleanup(rest.set)
        self.upstream.script(stream(b"data: 1\n\n", Pause(rest), b"data: secret\n\n"))
        with RawClient(self.proxy.port) as client:
            client.send(ASK)
            client.wait_for(b"data: 1")
        used = self.serving()
        self.assertTrue(self.upstream.wait_disconnected(used, 5))
        self.assertEqual(self.ask(answer(200, (), {"own": 1})).json(), {"own": 1})
        self.assertNotEqual(self.serving(), used)

    def test_connection_that_the_upstream_closed_while_idle_is_not_used(self):
        for end in (Cut(), Reset()):
            with self.subTest(type(end).__name__):
                closed, idle = threading.Event(), threading.Event()
                self.addCleanup(idle.set)
                got = self.ask([*answer(200, (), {}), Pause(idle), end])
                self.assertEqual(got.status, 200)
                used = self.serving()
                idle.set()
                self.assertTrue(self.upstream.wait_disconnected(used, 10))
                closed.wait(0.05)  # the FIN is on its way through the kernel
                self.assertEqual(self.ask(answer(200, (), {"own": 1})).json(), {"own": 1})
                self.assertEqual(len(self.upstream.requests), 2)
                self.upstream.requests.clear()

    def test_reset_on_a_reused_connection_is_repeated_once_on_a_fresh_one(self):
        for end in (Cut(), Reset()):
            with self.subTest(type(end).__name__):
                self.ask(answer(200, (), {}))
                self.upstream.requests.clear()
                got = self.ask([end], answer(200, (), {"second": "try"}))
                self.assertEqual((got.status, got.json()), (200, {"second": "try"}))
                first, second = self.upstream.wait_for_requests(2)
                self.assertNotEqual(first.connection, second.connection)
                self.assertEqual((first.body, first.headers), (second.body, second.headers))

    def test_end_behind_an_interim_answer_is_not_repeated(self):
        """The request has reached it: a turn could be paid for twice."""
        self.ask(answer(200, (), {}))
        self.upstream.requests.clear()
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        got = self.ask([hints, Cut()])
        self.check_error(got, 502, "upstream_connection_error")
        self.assertEqual(len(self.upstream.requests), 1)

    def test_repeat_that_fails_too_is_a_502(self):
        self.ask(answer(200, (), {}))
        self.upstream.requests.clear()
        got = self.ask([Reset()], [Reset()], answer(200, (), {"third": "try"}))
        self.check_error(got, 502, "upstream_connection_error")
        self.assertEqual(len(self.upstream.requests), 2)

    def test_reset_on_a_fresh_connection_is_not_repeated(self):
        self.ask(answer(200, {"Connection": "close"}, {}))
        while self.upstream.connections and self.ask(answer(200, {"Connection": "close"}, {})).status != 200:
            pass  # empties the pool of what other tests left
        self.upstream.requests.clear()
        got = self.ask([Reset()], answer(200, (), {}))
        self.check_error(got, 502, "upstream_connection_error")
        self.assertEqual(len(self.upstream.requests), 1)

    def test_answer_that_had_begun_is_not_repeated(self):
        self.ask(answer(200, (), {}))
        self.upstream.requests.clear()
        got = self.ask([b"HTTP/1.1 200 OK\r\nContent-", Reset()], answer(200, (), {}))
        self.check_error(got, 502, "upstream_connection_error")
        self.assertEqual(len(self.upstream.requests), 1)

    def test_clients_at_the_same_time_have_connections_of_their_own(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        clients = []
        for number in range(5):
            self.upstream.script(stream(Pause(gate), b"data: 1\n\n"))
            clients.append(enter(self.addCleanup, RawClient(self.proxy.port)))
            clients[-1].send(ASK)
            self.upstream.wait_for_requests(number + 1)
        self.assertEqual(len({request.connection for request in self.upstream.requests}), 5)
        gate.set()
        for client in clients:
            self.assertTrue(client.read_answer().complete)

    def test_redirects_are_handed_on_and_never_followed(self):
        target = f"http://127.0.0.1:{self.decoy.port}/v1/responses"
        for status in (300, 301, 302, 303, 307, 308):
            with self.subTest(status):
                self.upstream.requests.clear()
                got = self.ask(answer(status, {"Location": target}, b"moved"))
                self.assertEqual((got.status, got.header("Location"), got.body), (status, target, b"moved"))
                self.assertEqual(len(self.upstream.requests), 1)
        self.assertEqual(self.decoy.requests, [])

    def test_proxy_variables_of_the_environment_divert_nothing(self):
        self.assertEqual(self.ask(answer(200, (), {})).status, 200)
        self.assertEqual(self.decoy.connections, 0)

    def test_nothing_of_urllibs_own_is_sent(self):
        self.ask(answer(200, (), {}))
        got = self.upstream.wait_for_requests(1)[-1]
        self.assertEqual(got.target, "/v1/responses")  # not the absolute form
        self.assertEqual(sorted(name.lower() for name, _ in got.headers),
                         ["accept-encoding", "authorization", "content-length", "content-type", "host"])  # fmt: skip


class PoolIdleTest(TransportTest):
    def test_idle_connection_is_closed_after_pool_idle_s(self):
        upstream = enter(self.addCleanup, FakeUpstream())
        proxy = enter(self.addCleanup, Proxy(make_config(upstream, limits={"pool_idle_s": 0.2})))
        self.assertEqual(post(proxy.port, "/v1/responses", BODY).status, 200)
        self.assertTrue(upstream.wait_disconnected(1, 5))

    def test_what_is_too_many_or_comes_back_too_late_is_closed(self):
        config = plexus_lite.parse_config(make_config("http://up.example/v1"))
        transport = plexus_lite.Transport(config, lambda: self.fail("no demo here"))
        transport.loop = idle_loop()
        pairs = [socket.socketpair() for _ in range(3)]
        for sock in (sock for pair in pairs for sock in pair):
            self.addCleanup(sock.close)
        with mock.patch.object(plexus_lite, "MAX_IDLE_PER_ORIGIN", 1):
            for ours, _ in pairs[:2]:
                transport.release(plexus_lite.UpstreamConnection(ours, ("http", "up.example", "up")))
        self.assertEqual([ours.fileno() < 0 for ours, _ in pairs], [False, True, False])
        transport.close()
        transport.release(plexus_lite.UpstreamConnection(pairs[2][0], ("http", "up.example", "up")))
        self.assertEqual([ours.fileno() < 0 for ours, _ in pairs], [True, True, True])

    def test_a_connection_on_which_something_has_come_is_not_used(self):
        """An answer that nobody asked for (408, say) would be taken for that to the next request."""
        config = plexus_lite.parse_config(make_config("http://up.example/v1"))
        transport = plexus_lite.Transport(config, lambda: self.fail("no demo here"))
        transport.loop = idle_loop()
        (target,) = plexus_lite.targets_of(config, "gpt-test", "responses")
        request = plexus_lite.OutboundRequest(target, "/models", "GET", [], may_wait=False)
        for said, is_used in ((b"", True), (b"HTTP/1.1 408 Request Timeout\r\n\r\n", False)):
            ours, theirs = socket.socketpair()
            self.addCleanup(theirs.close)
            self.addCleanup(ours.close)
            ours.setblocking(False)
            transport.release(plexus_lite.UpstreamConnection(ours, ("http", "up.example", "up")))
            theirs.send(said)
            self.assertEqual(transport.open(request) is not None, is_used, said)
            self.assertEqual(ours.fileno() >= 0, is_used)

    def test_the_session_of_a_tls_connection_is_copied_once(self):
        """To copy one takes a tenth of a millisecond, more than all else that a release does."""
        transport = plexus_lite.Transport(plexus_lite.parse_config(make_config("http://up.example/v1")), self.fail)
        transport.loop = idle_loop()
        sock = mock.Mock(spec=ssl.SSLSocket)
        session = type(sock).session = mock.PropertyMock(return_value=None)
        connection = plexus_lite.UpstreamConnection(sock, ("https", "up.example", "up"))
        for _ in range(3):
            transport.release(connection)
        self.assertEqual(session.call_count, 1)


class UnreachableTest(TransportTest):
    refused: int
    silent: int

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream())
        cls.refused = refusing_port(cls.addClassCleanup)
        cls.silent = silent_port(cls.addClassCleanup)
        full = socket.socket()  # its backlog of one is taken, so that a SYN gets no answer
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        cls.addClassCleanup(full.close)
        for _ in range(3):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            cls.addClassCleanup(filler.close)
        config = make_config(cls.upstream)
        config["providers"].update(
            {
                name: {"api_base_url": url, "models": [name], "api_key": "sk-unreachable", "connect_timeout_s": 0.5}
                for name, url in (
                    ("refused", f"http://127.0.0.1:{cls.refused}/v1"),
                    ("unknown", "http://nonexistent.invalid/v1"),
                    ("full", f"http://127.0.0.1:{full.getsockname()[1]}/v1"),
                    ("plain", f"https://127.0.0.1:{talking_port(cls.addClassCleanup, BAD_REQUEST)}/v1"),
                    ("mute", f"https://127.0.0.1:{cls.silent}/v1"),
                )
            }
        )
        cls.proxy = enter(cls.addClassCleanup, Proxy(config))

    def ask(self, model: str) -> Answer:
        return post(self.proxy.port, "/v1/responses", {"model": model})

    def test_refused_connection_is_a_502_that_pi_retries_on(self):
        message = self.check_error(self.ask("refused"), 502, "upstream_connection_error")
        self.assertIn(f"127.0.0.1:{self.refused}", message)
        self.assertNotIn("sk-unreachable", message)

    def test_name_that_does_not_resolve_is_a_502(self):
        self.assertIn("nonexistent.invalid", self.check_error(self.ask("unknown"), 502, "upstream_connection_error"))

    def test_connection_that_is_not_taken_is_a_504_after_connect_timeout_s(self):
        started = time.monotonic()
        message = self.check_error(self.ask("full"), 504, "upstream_timeout")
        self.assertIn("connect_timeout_s", message)
        self.assertTrue(0.4 < time.monotonic() - started < 4)

    def test_silent_tls_handshake_is_a_504_after_connect_timeout_s(self):
        started = time.monotonic()
        self.assertIn("connect_timeout_s", self.check_error(self.ask("mute"), 504, "upstream_timeout"))
        self.assertTrue(0.4 < time.monotonic() - started < 4)

    def test_plain_http_where_tls_is_expected_is_a_502(self):
        self.assertIn("TLS", self.check_error(self.ask("plain"), 502, "upstream_connection_error"))

    def test_the_next_request_is_served(self):
        with RawClient(self.proxy.port) as client:
            for model, status in (("refused", 502), ("gpt-test", 200), ("refused", 502), ("gpt-test", 200)):
                client.send(build_request("POST", "/v1/responses", {"model": model}))
                self.assertEqual(client.read_answer().status, status)


class RefusedTest(unittest.TestCase):
    def test_nothing_is_kept_of_a_request_that_found_nobody(self):
        """The error had a name in its own traceback, and the callers in that kept the body until a collection."""
        config = plexus_lite.parse_config(make_config(f"http://127.0.0.1:{refusing_port(self.addCleanup)}/v1"))
        transport = plexus_lite.Transport(config, lambda: self.fail("no demo here"))
        (target,) = plexus_lite.targets_of(config, "gpt-test", "responses")
        request = plexus_lite.OutboundRequest(target, "/responses", "POST", [], b"{}")
        kept = weakref.ref(request)
        gc.disable()
        self.addCleanup(gc.enable)
        try:  # assertRaises would clear the traceback
            self.assertIsNone(transport.open(request))
        except plexus_lite.UpstreamError as error:
            error.alone()
        del request
        self.assertIsNone(kept())


class KnownAddressTest(TransportTest):
    """An address that answered is connected to in the loop, where nothing may wait."""

    def setUp(self):
        self.listener = socket.socket()
        self.addCleanup(self.listener.close)
        self.listener.bind(("127.0.0.1", 0))
        self.listener.listen(0)
        self.port = self.listener.getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> Proxy:
        """Return a proxy that knows the address: it has had an answer from there."""
        config = make_config(self.base_url, {"connect_timeout_s": 0.5})
        proxy: Proxy = enter(self.addCleanup, Proxy(config))
        threading.Thread(target=self.serve_one).start()
        self.assertEqual(post(proxy.port, "/v1/responses", BODY).status, 200)
        return proxy

    def serve_one(self) -> None:
        sock, _ = self.listener.accept()
        with sock:
            sock.recv(65536)
            sock.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")

    def test_a_further_connection_waits_for_nothing(self):
        config = plexus_lite.parse_config(make_config(self.base_url))
        transport = plexus_lite.Transport(config, lambda: self.fail("no demo here"))
        (target,) = plexus_lite.targets_of(config, "gpt-test", "responses")
        request = plexus_lite.OutboundRequest(target, "/models", "GET", [], may_wait=False)
        self.assertIsNone(transport.open(request), "the name would have to be resolved")
        for one in (plexus_lite.OutboundRequest(target, "/models", "GET", []), request):
            connection = transport.open(one)
            assert connection is not None
            self.addCleanup(connection.sock.close)
            self.assertEqual(connection.sock.gettimeout(), 0)
        with mock.patch("time.monotonic", lambda: time.perf_counter() + 10**6):
            self.assertIsNone(transport.open(request), "after a minute the name is resolved again")

    def test_one_that_refuses_by_now_is_told_as_ever(self):
        proxy = self.start()
        self.listener.close()
        message = self.check_error(post(proxy.port, "/v1/responses", BODY), 502, "upstream_connection_error")
        self.assertIn(f"no connection to 127.0.0.1:{self.port}: Connection refused", message)

    def test_one_that_refuses_by_now_is_failed_over(self):
        other = enter(self.addCleanup, FakeUpstream())
        config = make_config(self.base_url)
        config["providers"]["other"] = {"api_base_url": other.base_url, "models": ["m"]}
        (name,) = (name for name in config["providers"] if name != "other")
        targets = [{"provider": name, "model": "gpt-test"}, {"provider": "other", "model": "m", "group": 2}]
        config["models"] = {"both": {"targets": targets}}
        proxy = enter(self.addCleanup, Proxy(config))
        threading.Thread(target=self.serve_one).start()
        self.assertEqual(post(proxy.port, "/v1/responses", {"model": "both"}).status, 200)
        self.listener.close()
        self.assertEqual(post(proxy.port, "/v1/responses", {"model": "both"}).status, 200)
        record = proxy.wait_for_record(lambda record: record["provider"] == "other")
        self.assertEqual((record["attempts"], record["status"]), (2, 200))
        self.assertEqual([request.json()["model"] for request in other.wait_for_requests(1)], ["m"])

    def test_one_that_takes_no_connection_by_now_is_a_504_after_connect_timeout_s(self):
        proxy = self.start()
        for _ in range(3):  # its backlog is taken, so that a SYN gets no answer
            filler = socket.socket()
            self.addCleanup(filler.close)
            filler.setblocking(False)
            filler.connect_ex(self.listener.getsockname())
        started = time.monotonic()
        message = self.check_error(post(proxy.port, "/v1/responses", BODY), 504, "upstream_timeout")
        self.assertIn("connect_timeout_s (0.5)", message)
        self.assertTrue(0.4 < time.monotonic() - started < 4)
        message = self.check_error(post(proxy.port, "/v1/responses", BODY), 504, "upstream_timeout")
        self.assertIn(f"no connection to 127.0.0.1:{self.port} within", message, "it is resolved and connected to anew")


class TlsTest(TransportTest):
    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream(tls=(SERVER_FILE, SERVER_FILE)))
        config = make_config(cls.upstream, {"ca_file": CA_FILE})
        config["providers"]["stranger"] = {"api_base_url": cls.upstream.base_url, "models": ["stranger"]}
        config["providers"]["named"] = {
            "api_base_url": cls.upstream.base_url.replace("127.0.0.1", "localhost"),
            "models": ["named"],
            "ca_file": CA_FILE,
        }
        config["providers"]["wrong-name"] = {
            "api_base_url": cls.upstream.base_url.replace("127.0.0.1", "127.1"),
            "models": ["wrong-name"],
            "ca_file": CA_FILE,
        }
        cls.proxy = enter(cls.addClassCleanup, Proxy(config))

    def setUp(self):
        self.upstream.reset()

    def ask(self, model: str = "gpt-test", *replies: Any) -> Answer:
        self.upstream.script(*replies)
        return post(self.proxy.port, "/v1/responses", {"model": model})

    def test_stream_is_relayed_as_it_comes(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.upstream.script(stream(b"data: 1\n\n", Pause(gate), b"data: 2\n\n"))
        with RawClient(self.proxy.port) as client:
            client.send(ASK)
            client.wait_for(b"data: 1\n\n")
            gate.set()
            self.assertEqual(client.read_answer().body, b"data: 1\n\ndata: 2\n\n")

    def test_large_bodies_pass_in_both_directions(self):
        self.upstream.script(answer(200, (), b"y" * 3_000_000))
        got = post(self.proxy.port, "/v1/responses", dict(BODY, input="x" * 3_000_000), timeout=20)
        self.assertEqual((got.body == b"y" * 3_000_000, got.complete), (True, True))
        self.assertEqual(len(self.upstream.requests[0].json()["input"]), 3_000_000)

    def test_connection_is_reused(self):
        self.ask()
        self.ask()
        first, second = self.upstream.wait_for_requests(2)
        self.assertEqual(first.connection, second.connection)

    def test_host_name_is_checked_and_accepted(self):
        self.assertEqual(self.ask("named").status, 200)

    def test_certificate_of_an_unknown_ca_is_a_502_that_names_ca_file(self):
        message = self.check_error(self.ask("stranger"), 502, "upstream_connection_error")
        self.assertIn("providers.stranger.ca_file", message)
        self.assertEqual(self.upstream.requests, [])

    def test_certificate_of_another_name_is_a_502(self):
        self.assertIn("certificate", self.check_error(self.ask("wrong-name"), 502, "upstream_connection_error"))
        self.assertEqual(self.upstream.requests, [])

    def test_close_in_mid_answer_is_visible(self):
        half = {"Content-Type": "text/event-stream"}
        for name, head, body in (
            ("chunked", dict(half, **{"Transfer-Encoding": "chunked"}), b"9\r\ndata: 1\n\n\r\n"),
            ("length", dict(half, **{"Content-Length": "20"}), b"data: 1\n\n"),
            ("until close, without close_notify", half, b"data: 1\n\n"),
        ):
            with self.subTest(name):
                got = self.ask("gpt-test", [render_head("HTTP/1.1 200 OK", head) + body, Cut()])
                self.assertEqual((got.status, got.body, got.complete), (200, b"data: 1\n\n", False))

    def test_client_that_leaves_closes_it(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        for steps in ([Pause(gate)], stream(b"data: 1\n\n", Pause(gate))):
            self.upstream.requests.clear()
            self.upstream.script(steps)
            client = RawClient(self.proxy.port)
            client.send(ASK)
            number = self.upstream.wait_for_requests(1)[0].connection
            if len(steps) > 1:
                client.wait_for(b"data: 1")
            left_at = time.monotonic()
            client.close()
            self.assertTrue(self.upstream.wait_disconnected(number, 5))
            self.assertLess(time.monotonic() - left_at, 1)

    def test_reset_on_a_reused_connection_is_repeated_and_the_handshake_is_a_short_one(self):
        assert self.upstream._tls
        self.ask()
        before = self.upstream._tls.session_stats()["hits"]
        got = self.ask("gpt-test", [Reset()], answer(200, (), {"second": "try"}))
        self.assertEqual(got.json(), {"second": "try"})
        self.assertEqual(self.upstream._tls.session_stats()["hits"] - before, 1)

    def test_client_that_leaves_while_it_is_connected_to_is_not_asked_for(self):
        """The request was sent once the connection was there: to nobody's use, but its tokens count."""
        listener = socket.socket()
        self.addCleanup(listener.close)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SERVER_FILE)
        context.num_tickets = 0  # unread, they would make a reset of the end
        config = make_config(f"https://127.0.0.1:{listener.getsockname()[1]}/v1", {"ca_file": CA_FILE})
        proxy = enter(self.addCleanup, Proxy(config))
        with RawClient(proxy.port) as client:
            client.send(ASK)
            sock, _ = listener.accept()
        proxy.wait_for_record(lambda record: record.get("error") == "client_gone")
        sock.settimeout(10)
        with context.wrap_socket(sock, server_side=True) as tls:
            self.assertEqual(tls.recv(100), b"")


class TlsCloseTest(TransportTest):
    def test_answer_that_ends_with_close_notify_is_whole(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(SERVER_FILE)
        listener = enter(self.addCleanup, socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(10)

        def serve() -> None:
            sock, _ = listener.accept()
            sock.settimeout(10)
            tls = context.wrap_socket(sock, server_side=True)
            tls.recv(65536)
            tls.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n")
            with tls, contextlib.suppress(OSError):  # the peer need not answer close_notify
                tls.unwrap().close()

        url = f"https://127.0.0.1:{listener.getsockname()[1]}/v1"
        proxy = enter(self.addCleanup, Proxy(make_config(url, {"ca_file": CA_FILE})))
        thread = threading.Thread(target=serve)
        thread.start()
        got = post(proxy.port, "/v1/responses", BODY)
        thread.join(10)
        self.assertEqual((got.status, got.body, got.complete), (200, b"data: 1\n\n", True))


OK = b"HTTP/1.1 200 OK\r\n"
MALFORMED: Tuple[Tuple[str, bytes], ...] = (
    ("no HTTP", b"SSH-2.0-OpenSSH_9.0\r\n"),
    ("HTML", b"<html>it works</html>\r\n\r\n"),
    ("HTTP/0.9", b'{"id":"resp_1"}'),
    ("ICY", b"ICY 200 OK\r\n\r\n"),
    ("HTTP/2 words", b"HTTP/2 200 OK\r\n\r\n"),
    ("HTTP/2.0", b"HTTP/2.0 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("HTTP/2 frames", b"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00d"),
    ("a TLS alert", b"\x15\x03\x01\x00\x02\x02\x46"),
    ("lower case", b"http/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("two digits", b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n"),
    ("four digits", b"HTTP/1.1 2000 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status 000", b"HTTP/1.1 000 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status 600", b"HTTP/1.1 600 OK\r\nContent-Length: 0\r\n\r\n"),
    ("status +20", b"HTTP/1.1 +20 OK\r\nContent-Length: 0\r\n\r\n"),
    ("no status", b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n"),
    ("two spaces", b"HTTP/1.1  200 OK\r\nContent-Length: 0\r\n\r\n"),
    ("NUL in the reason", b"HTTP/1.1 200 O\0K\r\nContent-Length: 0\r\n\r\n"),
    ("leading empty line", b"\r\n" + OK + b"Content-Length: 0\r\n\r\n"),
    ("bare LF after the status", b"HTTP/1.1 200 OK\nContent-Length: 0\n\n"),
    ("bare LF in the head", OK + b"X-A: 1\nContent-Length: 0\r\n\r\n"),
    ("bare CR in a value", OK + b"X-A: 1\rX-B: 2\r\nContent-Length: 0\r\n\r\n"),
    ("folded line", OK + b"X-A: 1\r\n  2\r\nContent-Length: 0\r\n\r\n"),
    ("space before the colon", OK + b"Content-Length : 0\r\n\r\n"),
    ("space before the name", OK + b" X-A: 1\r\nContent-Length: 0\r\n\r\n"),
    ("no colon", OK + b"X-A\r\nContent-Length: 0\r\n\r\n"),
    ("no name", OK + b": 1\r\nContent-Length: 0\r\n\r\n"),
    ("name that is no token", OK + b"X A: 1\r\nContent-Length: 0\r\n\r\n"),
    ("name with a high byte", OK + b"X-\xe9: 1\r\nContent-Length: 0\r\n\r\n"),
    ("NUL in a value", OK + b"X-A: a\0b\r\nContent-Length: 0\r\n\r\n"),
    ("control character in a value", OK + b"X-A: a\x1bb\r\nContent-Length: 0\r\n\r\n"),
    ("two different lengths", OK + b"Content-Length: 5\r\nContent-Length: 0\r\n\r\nhello"),
    ("the same length twice", OK + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}"),
    ("a list of lengths", OK + b"Content-Length: 2, 2\r\n\r\n{}"),
    ("signed length", OK + b"Content-Length: +2\r\n\r\n{}"),
    ("negative length", OK + b"Content-Length: -2\r\n\r\n{}"),
    ("hexadecimal length", OK + b"Content-Length: 0x2\r\n\r\n{}"),
    ("length with an underscore", OK + b"Content-Length: 1_0\r\n\r\n0123456789"),
    ("empty length", OK + b"Content-Length:\r\n\r\n{}"),
    ("overflowing length", OK + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n{}"),
    ("length and chunks", OK + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
    ("gzip transfer coding", OK + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n"),
    ("chunked twice", OK + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n"),
    ("chunked in two fields", OK + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("unknown transfer coding", OK + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n"),
    ("identity transfer coding", OK + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n"),
    ("chunks in HTTP/1.0", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("huge head", OK + b"X-A: " + b"a" * 70_000 + b"\r\n\r\n"),
    ("endless head", OK + b"X-A: 1\r\n" * 20_000),
)
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
MALFORMED_CHUNKS: Tuple[Tuple[str, bytes], ...] = (
    ("no number", b"zz\r\n{}\r\n0\r\n\r\n"),
    ("empty size", b"\r\n{}\r\n0\r\n\r\n"),
    ("signed size", b"+2\r\n{}\r\n0\r\n\r\n"),
    ("negative size", b"-2\r\n{}\r\n0\r\n\r\n"),
    ("0x", b"0x2\r\n{}\r\n0\r\n\r\n"),
    ("underscore", b"0_2\r\n{}\r\n0\r\n\r\n"),
    ("leading space", b" 2\r\n{}\r\n0\r\n\r\n"),
    ("overflow", b"f" * 17 + b"\r\n{}\r\n0\r\n\r\n"),
    ("wraps to 2", b"1" + b"0" * 15 + b"2\r\n{}\r\n0\r\n\r\n"),
    ("bare LF", b"2\n{}\r\n0\r\n\r\n"),
    ("bare CR", b"2\r{}\r\n0\r\n\r\n"),
    ("endless size", b"0" * 10_000),
)


class MalformedAnswerTest(TransportTest):
    spare: FakeUpstream

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream())
        cls.spare = enter(cls.addClassCleanup, FakeUpstream())
        config = make_config(cls.upstream)
        config["providers"]["spare"] = {"api_base_url": cls.spare.base_url, "models": ["gpt-test"], "account": "up"}
        config["models"] = {
            "main": {
                "targets": [
                    {"provider": "up", "model": "gpt-test"},
                    {"provider": "spare", "model": "gpt-test", "group": 2},
                ]
            }
        }
        cls.proxy = enter(cls.addClassCleanup, Proxy(config))

    def setUp(self):
        self.upstream.reset()

    def test_malformed_answer_is_a_502_at_once_and_the_next_request_is_served(self):
        with RawClient(self.proxy.port) as client:
            for name, raw in MALFORMED:
                with self.subTest(name):
                    self.setUp()
                    self.upstream.script([raw, Cut()], answer(200, (), {"next": 1}))
                    request = build_request("POST", "/v1/responses", {"model": "main"})
                    client.send(request)
                    self.check_error(client.read_answer(), 502, "upstream_invalid_response")
                    client.send(request)
                    got = client.read_answer()
                    self.assertEqual((got.status, got.json()), (200, {"next": 1}))
        self.assertEqual(self.spare.requests, [], "the request may have been served: nobody else is asked")

    def test_malformed_first_chunk_is_a_502_and_nothing_of_it_is_passed_on(self):
        for name, chunks in MALFORMED_CHUNKS:
            with self.subTest(name):
                self.setUp()
                self.upstream.script([CHUNKED + chunks, Cut()], answer(200, (), {"next": 1}))
                request = build_request("POST", "/v1/responses", {"model": "main"})
                with RawClient(self.proxy.port) as client:
                    client.send(request)
                    self.check_error(client.read_answer(), 502, "upstream_invalid_response")
                with RawClient(self.proxy.port) as client:
                    client.send(request)
                    self.assertEqual(client.read_answer().json(), {"next": 1})

    def test_chunk_longer_than_its_size_is_never_a_whole_answer(self):
        self.upstream.script([CHUNKED + b"2\r\n{}xx\r\n0\r\n\r\n", Cut()])
        with RawClient(self.proxy.port) as client:
            client.send(build_request("POST", "/v1/responses", {"model": "main"}))
            try:
                got = client.read_answer()
            except (EOFError, ConnectionError):
                return
            self.assertTrue(got.status == 502 or not got.complete)
            self.assertNotIn(b"xx", got.body)

    def test_header_that_would_split_the_answer_does_not_pass(self):
        for value in (b"a\r\n\r\nHTTP/1.1 200 OK", b"a\x00b", b"a\x7fb"):
            with self.subTest(value):
                self.upstream.script([OK + b"X-Evil: " + value + b"\r\nContent-Length: 0\r\n\r\n", Cut()])
                with RawClient(self.proxy.port) as client:
                    client.send(build_request("POST", "/v1/responses", {"model": "main"}))
                    got = client.read_answer()
                    self.assertNotIn(value, (got.header("X-Evil") or "").encode("latin-1"))

    def test_legal_oddities_pass(self):
        for name, raw in (
            ("no reason", b"HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}"),
            ("no reason, no space", b"HTTP/1.1 200\r\nContent-Length: 2\r\n\r\n{}"),
            ("tabs", OK + b"Content-Length:\t2\t\r\n\r\n{}"),
            ("high bytes", OK + b"X-A: caf\xe9\r\nContent-Length: 2\r\n\r\n{}"),
            ("leading zeros", OK + b"Content-Length: 0002\r\n\r\n{}"),
            ("TE in capitals", OK + b"transfer-encoding: Chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
            ("upper case size", OK + b'Transfer-Encoding: chunked\r\n\r\n0A\r\n{"a": 123}\r\n00\r\n\r\n'),
            ("many headers", OK + b"X-A: 1\r\n" * 300 + b"Content-Length: 2\r\n\r\n{}"),
        ):
            with self.subTest(name):
                self.upstream.script([raw])
                got = post(self.proxy.port, "/v1/responses", {"model": "main"})
                self.assertEqual((got.status, got.complete), (200, True))
                self.assertIsInstance(got.json(), dict)


class ReceiveTest(unittest.TestCase):
    def test_a_tls_peer_that_wants_answers_and_does_not_read_is_left(self):
        """It stays ready to be read, and the loop would do nothing else."""
        loop, sock = plexus_lite.Loop(), unittest.mock.Mock(spec=ssl.SSLSocket)
        sock.recv.side_effect = sock.recv_into.side_effect = ssl.SSLWantReadError()
        self.assertIsNone(loop.receive(sock))
        self.assertTrue(plexus_lite.is_silent(sock))
        sock.recv.side_effect = sock.recv_into.side_effect = ssl.SSLWantWriteError()
        self.assertRaises(OSError, loop.receive, sock)
        self.assertFalse(plexus_lite.is_silent(sock))


class FailoverTest(TransportTest):
    """Alias "try-NAME" leads to "a", then "b", then "c"; each NAME is a target of its own, with its own cooldown."""

    a: FakeUpstream
    b: FakeUpstream
    c: FakeUpstream

    NAMES = ("dead", "reset", "cut", "timeout", "last", "mixed", "http-then-dead", "account", "cross", "begun", "cool",
             "encrypted-first", "previous", "string", "error-body", "long")  # fmt: skip
    FAILOVER = (429, 500, 502, 503, 504, 529)
    FINAL = (400, 401, 402, 403, 404, 409, 413, 422, 501)

    @classmethod
    def setUpClass(cls):
        cls.a, cls.b, cls.c = (enter(cls.addClassCleanup, FakeUpstream()) for _ in range(3))
        dead = f"http://127.0.0.1:{refusing_port(cls.addClassCleanup)}/v1"
        every = {"models": ["*"], "api_key": "sk-upstream"}
        providers: Dict[str, Any] = {
            "a": dict(every, api_base_url=cls.a.base_url, account="one", first_byte_timeout_s=0.5),
            "b": dict(every, api_base_url=cls.b.base_url, account="two"),
            "c": dict(every, api_base_url=cls.c.base_url, account="one"),
            "dead": dict(every, api_base_url=dead, api_key="sk-dead"),
            "pair": dict(every, api_base_url=[cls.a.base_url, cls.b.base_url]),
            "patient": dict(every, api_base_url=cls.a.base_url, wait_on_429_s=3),
            "brief": dict(every, api_base_url=cls.a.base_url, wait_on_429_s=1.5, idle_timeout_s=0.3),
            "briefest": dict(every, api_base_url=cls.a.base_url, wait_on_429_s=0.4),
        }

        def alias(name: str, *places: str) -> Dict[str, Any]:
            targets = [{"provider": place, "model": name, "group": at + 1} for at, place in enumerate(places)]
            return {"targets": targets}

        names = [*cls.NAMES, *map(str, cls.FAILOVER + cls.FINAL)]
        models = {"try-" + name: alias(name, "a", "b", "c") for name in names}
        models["dead-first"] = alias("m1", "dead", "b")
        models["dead-last"] = alias("m2", "a", "dead")
        models["all-dead"] = alias("m3", "dead")
        models["pair"] = alias("m4", "pair")
        models["patient"] = alias("m5", "patient")
        models["patient-2"] = alias("m6", "patient")
        models["brief"] = alias("m8", "brief")
        models["brief-first"] = alias("m9", "brief", "b")
        models["briefest"] = alias("m10", "briefest")
        models["dead-and-patient"] = alias("m7", "dead", "patient")
        config = {"keys": {"team": {"secret": "sk-client"}}, "providers": providers, "models": models}
        cls.proxy = enter(cls.addClassCleanup, Proxy(config))

    def test_an_error_too_long_to_be_held_back_leads_to_the_next_and_the_last_one_arrives_whole(self):
        head = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 100000\r\n\r\n"
        more = threading.Event()
        self.addCleanup(more.set)
        self.a.script([head, b"x" * 70_000, Pause(more), b"y" * 30_000])
        self.assertEqual(post(self.proxy.port, "/v1/responses", {"model": "try-long"}).status, 200)
        self.assertEqual((len(self.a.requests), len(self.b.requests)), (1, 1))
        more.set()
        for upstream in (self.a, self.b, self.c):
            upstream.script([head, b"x" * 70_000, Pause(more), b"y" * 30_000])
        got = post(self.proxy.port, "/v1/responses", {"model": "try-long"})
        self.assertEqual((got.status, got.complete, got.body), (503, True, b"x" * 70_000 + b"y" * 30_000))

    def setUp(self):
        for upstream in (self.a, self.b, self.c):
            upstream.reset()

    def ask(self, model: str, **body: Any) -> Answer:
        return post(self.proxy.port, "/v1/responses", dict(body, model=model))

    def asked(self) -> List[int]:
        return [len(upstream.requests) for upstream in (self.a, self.b, self.c)]

    def record(self, got: Answer) -> Dict[str, Any]:
        request_id = got.header("x-plexus-request-id")
        return self.proxy.wait_for_record(lambda one: one["id"] == request_id)

    def test_refused_connection_leads_to_the_next(self):
        got = self.ask("dead-first")
        self.assertEqual(got.status, 200)
        record = self.record(got)
        self.assertEqual((record["attempts"], record["provider"], record["error"]), (2, "b", None))

    def test_connection_closed_before_a_response_leads_to_the_next(self):
        for name, end in (("reset", Reset()), ("cut", Cut())):
            with self.subTest(name):
                self.setUp()
                self.a.script([end], [end])  # the second for a connection that had been reused
                self.b.script(answer(200, (), {"from": "b"}))
                self.assertEqual(self.ask("try-" + name).json(), {"from": "b"})
                self.assertEqual(self.asked()[1:], [1, 0])

    def test_silence_until_first_byte_timeout_s_leads_to_the_next(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        self.a.script([Pause(gate)])
        self.b.script(answer(200, (), {"from": "b"}))
        self.assertEqual(self.ask("try-timeout").json(), {"from": "b"})

    def test_statuses_that_may_pass_lead_to_the_next(self):
        for status in self.FAILOVER:
            with self.subTest(status):
                self.setUp()
                self.a.script(answer(status, {"x-from": "a"}, {"error": {"message": "from a"}}))
                self.b.script(answer(200, {"x-from": "b"}, {"from": "b"}))
                got = self.ask(f"try-{status}")
                self.assertEqual((got.status, got.all("x-from"), got.json()), (200, ["b"], {"from": "b"}))
                self.assertEqual(self.asked(), [1, 1, 0])
                self.assertEqual(self.a.requests[0].body, self.b.requests[0].body)

    def test_statuses_that_will_not_pass_are_handed_on(self):
        for status in self.FINAL:
            with self.subTest(status):
                self.setUp()
                self.a.script(answer(status, {"x-from": "a"}, {"error": {"message": "from a"}}))
                got = self.ask(f"try-{status}")
                self.assertEqual((got.status, got.all("x-from"), got.all("x-plexus-error")), (status, ["a"], []))
                self.assertEqual(self.asked(), [1, 0, 0])

    def test_last_http_answer_is_handed_on_when_all_fail(self):
        body = b'{"error": {"message" : "c is full"}}'
        self.a.script(answer(429, {"Retry-After": "3"}, {"error": {}}))
        self.b.script(answer(500, (), {"error": {}}))
        self.c.script(answer(503, {"x-from": "c", "Content-Type": "application/json"}, body))
        got = self.ask("try-last")
        self.assertEqual((got.status, got.reason, got.body), (503, "Scripted", body))
        self.assertEqual((got.all("x-from"), got.all("Retry-After")), (["c"], []))
        self.assertEqual(self.record(got)["attempts"], 3)

    def test_http_answer_is_handed_on_though_a_later_target_gave_none(self):
        self.a.script(answer(500, {"x-from": "a"}, {"error": {"message": "bad key sk-upstream"}}))
        got = self.ask("dead-last")
        self.assertEqual((got.status, got.all("x-from")), (500, ["a"]))
        # What was sent to it is masked, not what was sent to the one asked last.
        self.assertEqual(got.json()["error"], {"message": "bad key ***********"})
        record = self.record(got)
        self.assertEqual((record["provider"], record["target"], record["attempts"]), ("a", self.a.base_url, 2))

    def test_no_answer_at_all_is_a_502(self):
        self.check_error(self.ask("all-dead"), 502, "upstream_connection_error")

    def test_error_answer_that_breaks_off_leads_to_the_next(self):
        self.a.script([render_head("HTTP/1.1 500 Broken", {"Content-Length": "100"}) + b"half", Cut()])
        self.b.script(answer(200, (), {"from": "b"}))
        self.assertEqual(self.ask("try-error-body").json(), {"from": "b"})

    def test_encrypted_content_stays_with_its_account(self):
        item = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
        self.a.script(answer(500, (), {"error": {}}))
        self.c.script(answer(200, (), {"from": "c"}))
        got = self.ask("try-account", input=[{"role": "user", "content": "x"}, item])
        self.assertEqual((got.json(), self.asked()), ({"from": "c"}, [1, 0, 1]))

    def test_encrypted_content_at_any_depth_stays_with_its_account(self):
        self.a.script(answer(500, {"x-from": "a"}, {"error": {}}))
        self.c.script(answer(503, {"x-from": "c"}, {"error": {}}))
        got = self.ask("try-cross", input=[{"type": "x", "content": [{"encrypted_content": "gAAAA"}]}])
        self.assertEqual((got.status, got.all("x-from"), self.asked()), (503, ["c"], [1, 0, 1]))

    def test_previous_response_id_stays_with_its_account(self):
        self.a.script(answer(500, (), {"error": {}}))
        self.c.script(answer(200, (), {"from": "c"}))
        got = self.ask("try-previous", previous_response_id="resp_of_somebody")
        self.assertEqual((got.json(), self.asked()), ({"from": "c"}, [1, 0, 1]))

    def test_words_in_a_prompt_do_not_bind_it(self):
        self.a.script(answer(500, (), {"error": {}}))
        got = self.ask("try-string", input='"encrypted_content": "x"', previous_response_id=None)
        self.assertEqual((got.status, self.asked()), (200, [1, 1, 0]))

    def test_nobody_else_is_asked_after_the_first_byte(self):
        self.a.script([*stream(b"data: 1\n\n", end=False), Cut()])
        got = self.ask("try-begun")
        self.assertEqual((got.status, got.body, got.complete), (200, b"data: 1\n\n", False))
        self.assertEqual(self.asked(), [1, 0, 0])

    def test_target_that_failed_rests_as_long_as_it_asked_for(self):
        self.a.script(answer(503, {"Retry-After": "60"}, {"error": {}}))
        self.assertEqual(self.ask("try-cool").status, 200)
        self.assertEqual(self.ask("try-cool").status, 200)
        self.assertEqual(self.asked(), [1, 2, 0])

    def test_429_is_waited_out_up_to_wait_on_429_s(self):
        started = time.monotonic()
        self.a.script(
            answer(429, {"retry-after-ms": "200"}, {"error": {}}),
            answer(429, {"retry-after-ms": "200"}, {"error": {}}),
            answer(200, (), {"third": "time"}),
        )
        self.assertEqual(self.ask("patient").json(), {"third": "time"})
        self.assertEqual(self.asked()[0], 3)
        self.assertGreaterEqual(time.monotonic() - started, 0.4)

    def test_429_that_would_take_too_long_is_handed_on_at_once(self):
        started = time.monotonic()
        self.a.script(answer(429, {"Retry-After": "4"}, {"error": {"message": "slow down"}}))
        got = self.ask("patient-2")
        self.assertEqual((got.status, got.header("Retry-After")), (429, "4"))
        self.assertEqual(got.json(), {"error": {"message": "slow down"}})
        self.assertLess(time.monotonic() - started, 2)
        self.assertEqual(self.asked()[0], 1)

    def test_an_error_answer_that_falls_silent_is_left_after_idle_timeout_s(self):
        started, never = time.monotonic(), threading.Event()
        self.addCleanup(never.set)
        for status, model, wanted in ((503, "brief-first", 200), (400, "brief", 400)):
            self.a.script([b"HTTP/1.1 %d X\r\nContent-Length: 9\r\n\r\n" % status, b"{", Pause(never)])
            got = self.ask(model)
            self.assertEqual((got.status, got.complete), (wanted, wanted == 200))
        self.assertLess(time.monotonic() - started, 5)  # an error answer that goes on and on has 10 s
        self.assertEqual(self.record(got)["error"], "upstream_timeout")

    def test_429_that_names_no_time_is_asked_again_after_a_second_and_only_as_long_as_wait_on_429_s_says(self):
        started = time.monotonic()
        past = email.utils.formatdate(0, usegmt=True)
        names = {"Retry-After": "0"}, {"Retry-After": past}, {"retry-after-ms": "0"}, {"Retry-After": "0"}
        self.a.script(*(answer(429, fields, {"error": {}}) for fields in names))
        self.assertEqual(self.ask("brief").status, 429)
        self.assertEqual(self.asked()[0], 2)
        self.assertTrue(1 <= time.monotonic() - started < 2.5)

    def test_429_that_names_no_time_is_asked_again_once_if_there_is_less_than_a_second(self):
        for fields in ((), {"Retry-After": "0"}):
            self.a.script(answer(429, fields, {"error": {}}), answer(200, (), {"second": "time"}))
            self.assertEqual(self.ask("briefest").json(), {"second": "time"})

    def test_429_is_not_waited_for_unless_wait_on_429_s_says_so(self):
        for fields in ((), {"Retry-After": "0"}):
            self.a.script(answer(429, fields, {"error": {}}), answer(200, (), {"second": "time"}))
            self.assertEqual(self.ask("direct/a/gpt").status, 429)
            self.a.reset()

    def test_429_is_waited_out_though_another_target_is_dead(self):
        def failovers() -> float:
            return total(parse_metrics(get(self.proxy.port, "/metrics").body), "plexus_failovers_total")

        before = failovers()
        self.a.script(answer(429, {"retry-after-ms": "100"}, {"error": {}}), answer(200, (), {"second": "time"}))
        got = self.ask("dead-and-patient")
        self.assertEqual(got.json(), {"second": "time"})
        # Those before the wait count, too.  Two attempts were none: the first, and the first after the wait.
        self.assertEqual(failovers() - before, self.record(got)["attempts"] - 2)

    def test_session_that_was_moved_stays_moved(self):
        body = {"prompt_cache_key": "moving session"}
        self.assertEqual(self.ask("pair", **body).status, 200)
        home, away = (self.a, self.b) if self.a.requests else (self.b, self.a)
        home.script(answer(503, {"retry-after-ms": "1"}, {"error": {}}))  # well again in a millisecond
        got = self.ask("pair", **body)
        self.assertEqual((got.status, len(home.requests), len(away.requests)), (200, 2, 1))
        for _ in range(5):
            got = self.ask("pair", **body)
            self.assertEqual((got.status, self.record(got)["placement"]), (200, "pin"))
        self.assertEqual((len(home.requests), len(away.requests)), (2, 6))

    def test_session_keeps_its_upstream_and_sessions_spread(self):
        homes = set()
        for number in range(12):
            self.setUp()
            for _ in range(3):
                self.assertEqual(self.ask("pair", prompt_cache_key=f"steady {number}").status, 200)
            self.assertIn(self.asked()[:2], ([3, 0], [0, 3]))
            homes.add(bool(self.a.requests))
        self.assertEqual(len(homes), 2)


if __name__ == "__main__":
    unittest.main()
