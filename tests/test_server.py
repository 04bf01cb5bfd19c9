"""Rooms 11 and 13 as an operator meets them: command line, exit codes, signals, logs, and a host that runs short."""

import contextlib
import hashlib
import json
import os
import platform
import re
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from tests.support import (
    HAS_GIL,
    PROGRAM,
    Answer,
    Cut,
    FakeUpstream,
    Pause,
    Proxy,
    RawClient,
    answer,
    build_request,
    clean_environment,
    enter,
    exchange,
    get,
    make_config,
    post,
    response_events,
    response_object,
    run_cli,
    stream,
)

BODY = {"model": "gpt-test", "stream": True, "prompt_cache_key": "session-1"}
ASK = build_request("POST", "/v1/responses", BODY)
GOOD = {"providers": {"p": {"api_base_url": "http://127.0.0.1:9/v1", "models": ["m"]}}}
needs_shell = unittest.skipIf(os.name == "nt", "needs a POSIX shell")
needs_hup = unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")


# Starting an interpreter takes longer than all that is tested here: one runs main() for many command lines.
DRIVER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import plexus_lite
for arguments in json.loads(sys.argv[2]):
    try:
        code = plexus_lite.main(arguments)
    except SystemExit as error:
        code = error.code
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(1, b"@@%d\\n" % code)
    os.write(2, b"@@\\n")
"""


class Run(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run_many(lines: Sequence[Sequence[str]], env: Optional[Mapping[str, str]] = None) -> List[Run]:
    """Return what each of the command *lines* (arguments only) says and its exit code."""
    command = [sys.executable, "-c", DRIVER, os.path.dirname(PROGRAM), json.dumps(lines)]
    with subprocess.Popen(
        command,
        env=clean_environment(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
    ) as process:
        try:
            stdout, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    outputs = re.findall(r"((?:(?!@@).)*)@@(\d+)\n", stdout, re.DOTALL)
    errors = stderr.split("@@\n")
    assert len(outputs) == len(lines) == len(errors) - 1, stdout + stderr
    return [Run(int(code), output, error) for (output, code), error in zip(outputs, errors)]


class ShellProxy(Proxy):
    """The proxy started by a line of shell, in which "$@" stands for its command."""

    def __init__(self, config: Mapping[str, Any], shell: str, args: Sequence[str] = ()) -> None:
        super().__init__(config, args=args)
        self._command = ["sh", "-c", shell, "sh", *self._command]


class ServerTest(unittest.TestCase):
    def start(self, upstream: Any = None, args: Sequence[str] = (), **overrides: Any) -> Proxy:
        config = make_config(upstream or "http://127.0.0.1:9/v1", **overrides)
        proxy: Proxy = enter(self.addCleanup, Proxy(config, args=args))
        return proxy

    def fake(self) -> FakeUpstream:
        upstream: FakeUpstream = enter(self.addCleanup, FakeUpstream())
        return upstream

    def event(self) -> threading.Event:
        event = threading.Event()
        self.addCleanup(event.set)
        return event

    def connect(self, proxy: Proxy) -> RawClient:
        client = RawClient(proxy.port)
        self.addCleanup(client.close)
        return client

    def streaming(self, proxy: Proxy, upstream: FakeUpstream) -> Tuple[RawClient, threading.Event]:
        """Return a client in the middle of a stream, which goes on once the event is set."""
        gate = self.event()
        upstream.script(stream(b"data: 1\n\n", Pause(gate), b"data: 2\n\n"))
        client = self.connect(proxy)
        client.send(ASK)
        client.wait_for(b"data: 1\n\n")
        return client, gate


class CommandLineTest(ServerTest):
    def test_first_line_says_version_and_real_port_and_the_next_what_is_served(self):
        version = run_cli("--version")
        self.assertEqual((version.returncode, version.stderr), (0, ""))
        self.assertRegex(version.stdout, r"^plexus_lite \d+\.\d+\.\d+\n$")
        proxy = self.start()
        self.assertEqual(proxy.stdout[0], f"{version.stdout.strip()} listening on http://127.0.0.1:{proxy.port}")
        self.assertGreater(proxy.port, 0)
        self.assertEqual(get(proxy.port, "/health").status, 200)
        self.assertEqual(proxy.stop(), 0)
        rest = "\n".join(proxy.stdout[1:])
        self.assertIn("gpt-test", rest)
        self.assertIn("http://127.0.0.1:9/v1", rest)
        self.assertNotIn("sk-", rest)

    def test_what_is_served_has_a_line_each_whatever_stands_in_a_name(self):
        up = {"api_base_url": "http://127.0.0.1:9/v1", "models": ["two\nlines"]}
        alias = {"targets": [{"provider": "up\r", "model": "two\nlines"}]}
        proxy = self.start(providers={"up\r": up}, models={"other\nname": alias})
        self.assertEqual(proxy.stop(), 0)
        served = ["  up\\r: two\\nlines at http://127.0.0.1:9/v1", "  other\\nname -> up\\r/two\\nlines"]
        self.assertEqual(proxy.stdout[1:], served)

    def test_options_win_over_the_files_host_and_port(self):
        proxy = self.start(args=["--host", "localhost"], host="192.0.2.1", port=1)
        self.assertEqual(get(proxy.port, "/health").status, 200)

    def test_ipv6_address_stands_in_brackets(self):
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(("::1", 0))
        except OSError:
            self.skipTest("no IPv6 here")
        proxy = self.start(args=["--host", "::1"])
        self.assertRegex(proxy.stdout[0], r"http://\[::1\]:\d+$")
        with socket.create_connection(("::1", proxy.port), 10) as sock:
            sock.sendall(b"GET /health HTTP/1.1\r\nHost: [::1]\r\nConnection: close\r\n\r\n")
            self.assertTrue(sock.recv(1000).startswith(b"HTTP/1.1 200 "))

    def test_log_file_takes_the_records_and_stderr_stays_empty(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "access.log")
            proxy = self.start(args=["--log-file", path])
            got = get(proxy.port, "/health")
            self.assertEqual(proxy.stop(), 0)
            with open(path, encoding="utf-8") as file:
                records = [json.loads(line) for line in file]
            self.assertEqual([one["id"] for one in records], [got.header("x-plexus-request-id")])
            self.assertEqual(proxy.error_text(), "")

    def test_log_level_above_info_has_no_line_for_each_request(self):
        proxy = self.start(args=["--log-level", "warning"])
        self.assertEqual(get(proxy.port, "/health").status, 200)
        self.assertEqual(proxy.stop(), 0)
        self.assertEqual(proxy.error_text(), "")

    def test_wrong_usage_is_exit_2_without_a_traceback(self):
        port = "--port: expected a whole number from 0 to 65535, found "
        lines = (
            (["--port", "x"], "error: argument --port: invalid int value: 'x'\n"),
            (["--port", "70000"], port + "70000\n"),
            (["check", "--port", "-1"], port + "-1\n"),
            (["--nonesuch"], ""),
            (["nonesuch"], ""),
            (["--log-level", "loud"], ""),
            (["--host", ""], '--host: expected a non-empty string, found ""\n'),
            (["--log-file", os.path.join(tempfile.gettempdir(), "no", "such", "folder", "x.log")], ""),
        )
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "c.json")
            with open(path, "w", encoding="utf-8") as file:
                json.dump(GOOD, file)
            for (line, told), got in zip(lines, run_many([["--config", path, *line] for line, _ in lines])):
                with self.subTest(line):
                    self.assertEqual((got.returncode, got.stdout), (2, ""), got)
                    self.assertTrue(got.stderr.strip())
                    self.assertEqual(got.stderr[-len(told) :], told or got.stderr)
                    self.assertNotIn("Traceback", got.stderr)

    def test_help_and_init_are_exit_0(self):
        shown, got = run_many([["--help"], ["init"]])
        self.assertEqual((shown.returncode, shown.stderr), (0, ""))
        for option in ("--config", "--host", "--port", "--log-file", "--log-level", "--version", "init"):
            self.assertIn(option, shown.stdout)
        self.assertEqual((got.returncode, got.stderr), (0, ""))
        proxy = enter(self.addCleanup, Proxy(json.loads(got.stdout)))
        self.assertEqual(get(proxy.port, "/v1/models", key=None).status, 200)

    def test_config_option_wins_over_the_variable(self):
        env = {"PLEXUS_CONFIG": "from-variable.json"}
        with_option, without = run_many([["--config", "from-option.json"], []], env)
        self.assertIn("from-option.json", with_option.stderr)
        self.assertNotIn("from-variable.json", with_option.stderr)
        self.assertEqual(without.returncode, 2)
        self.assertIn("from-variable.json", without.stderr)


class MemoryTest(ServerTest):
    @unittest.skipUnless(platform.libc_ver()[0] == "glibc", "another C library keeps what has become free")
    @unittest.skipUnless(HAS_GIL, "without the GIL, memory that has become free is given back at some other time")
    def test_the_script_s_syntax_tree_does_not_stay(self):
        """A third of the memory; the interpreter keeps it until the script ends."""
        proxy = self.start()
        self.assertEqual(get(proxy.port, "/health").status, 200)
        with open(f"/proc/{proxy.process.pid}/status", encoding="ascii") as file:
            (resident,) = (int(line.split()[1]) for line in file if line.startswith("VmRSS:"))
        # From 3.14 argparse, which shows colours, takes dataclasses and inspect with it: 6 MB.
        self.assertLess(resident, (35 if sys.version_info < (3, 14) else 41) * 1024)


class BadConfigTest(ServerTest):
    CASES: Tuple[Tuple[str, Any, Sequence[str]], ...] = (
        # name, content of the file (None: there is none), what the line says
        ("missing", None, ["no such file"]),
        ("empty", b"", ["line 1 column 1"]),
        ("blank", b" \n\n", ["line 3 column 1"]),
        ("binary", bytes(range(256)), ["0x80 is not UTF-8"]),
        ("NULs", b"\0" * 100, ["line 1 column 1"]),
        ("bad JSON", b'{\n  "providers": {\n    "p": }\n', ["line 3 column 10"]),
        ("comment", b'{\n  // here\n  "port": 1\n}', ["line 2 column 3"]),
        ("trailing comma", b'{"port": 1,}', ["line 1 column"]),
        ("deep", b"[" * 100_000, ["is not valid JSON"]),
        ("a list", b"[]", ["an object"]),
        ("no providers", b"{}", ["providers"]),
        (
            "unknown key",
            {"providers": {"clawbay": {"api_base_urll": "http://a/v1", "models": ["m"]}}},
            ["providers.clawbay.api_base_urll: unknown key; allowed: account,", "api_base_url"],
        ),
        ("wrong type", dict(GOOD, limits={"drain_s": "30"}), ["limits.drain_s", '"30"']),
        ("unset variable", dict(GOOD, host="${PLEXUS_TEST_UNSET}"), ["host", "PLEXUS_TEST_UNSET"]),
        ("key twice", b'{"port": 1, "port": 2}', ["port"]),
        ("beyond loopback without keys", dict(GOOD, host="0.0.0.0"), ["0.0.0.0", "keys", "allow_anonymous"]),
        ("beyond loopback without keys, IPv6", dict(GOOD, host="::"), ["keys"]),
        ("missing CA file", {"providers": {"p": {"api_base_url": "https://a/v1", "models": ["m"],
                                                 "ca_file": "nonesuch.pem"}}}, ["providers.p.ca_file"]),
        ("bad secret", {"providers": {"p": {"api_base_url": "http://a/v1", "models": ["m"],
                                            "api_key": "sk-do not show"}}}, ["providers.p.api_key"]),
    )  # fmt: skip

    def check(self, got: Any, name: str, words: Sequence[str]) -> None:
        self.assertEqual((got.returncode, got.stdout), (2, ""), got.stderr)
        self.assertEqual(len(got.stderr.splitlines()), 1, got.stderr)
        self.assertIn(name, got.stderr)
        for word in words:
            self.assertIn(word, got.stderr)

    def test_every_bad_file_is_one_line_and_exit_2(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = [os.path.join(folder, f"config-{number}.json") for number in range(len(self.CASES))]
            for path, (_, content, _) in zip(paths, self.CASES):
                if content is not None:
                    with open(path, "wb") as file:
                        file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
            good = os.path.join(folder, "good.json")
            with open(good, "w", encoding="utf-8") as file:
                json.dump(GOOD, file)
            *runs, directory, beyond = run_many(
                [["--config", path, "--port", "0"] for path in [*paths, folder]]
                + [["--config", good, "--port", "0", "--host", "0.0.0.0"]]
            )
            self.check(directory, folder, [])
            self.check(beyond, good, ["allow_anonymous"])
            for path, (name, _, words), got in zip(paths, self.CASES, runs):
                with self.subTest(name):
                    self.check(got, os.path.basename(path), words)
                    self.assertNotIn("do not show", got.stderr)

    def test_exit_code_reaches_the_shell(self):
        self.check(run_cli("--config", "nonesuch.json"), "nonesuch.json", [])

    @unittest.skipIf(not hasattr(os, "geteuid") or os.geteuid() == 0, "needs a user who is not root")
    def test_unreadable_file_is_one_line_and_exit_2(self):
        with tempfile.NamedTemporaryFile() as file:
            os.chmod(file.name, 0)
            self.check(run_cli("--config", file.name), file.name, [])

    def test_beyond_loopback_is_served_with_keys_or_allow_anonymous(self):
        proxy = self.start(args=["--host", "0.0.0.0"])
        self.assertEqual(get(proxy.port, "/v1/models").status, 200)
        proxy = self.start(args=["--host", "0.0.0.0"], keys=None, allow_anonymous=True)
        self.assertEqual(get(proxy.port, "/v1/models", {"Host": "lan.example"}, key=None).status, 200)

    def test_port_in_use_and_address_of_another_host_are_exit_3_and_one_line_that_names_them(self):
        proxy = self.start()
        lines = [["--port", str(proxy.port)], ["--port", "0", "--host", "192.0.2.1"], ["--host", "\u00fc" * 80]]
        words = [["127.0.0.1", str(proxy.port), "in use"], ["192.0.2.1"], ["cannot listen"]]
        for got, expected in zip(run_many([["--config", proxy.config_path, *line] for line in lines]), words):
            self.assertEqual((got.returncode, got.stdout), (3, ""))
            self.assertEqual(len(got.stderr.splitlines()), 1, got.stderr)
            for word in expected:
                self.assertIn(word, got.stderr)

    def test_port_can_be_taken_again_at_once_after_a_stop(self):
        proxy = self.start()
        client = self.connect(proxy)
        client.send(build_request("GET", "/health"))
        self.assertEqual(client.read_answer("GET").status, 200)
        self.assertEqual(proxy.stop(), 0)
        again = self.start(args=["--port", str(proxy.port)])
        self.assertEqual(again.port, proxy.port)


class StopTest(ServerTest):
    def test_idle_proxy_ends_with_0_at_once(self):
        for name in ("SIGTERM", "SIGINT"):
            if name == "SIGINT" and os.name == "nt":
                continue
            with self.subTest(name):
                proxy = self.start()
                started = time.monotonic()
                proxy.process.send_signal(getattr(signal, name))
                self.assertEqual(proxy.process.wait(10), 0)
                self.assertLess(time.monotonic() - started, 2)

    def test_running_stream_finishes_and_idle_connections_end_at_once(self):
        upstream = self.fake()
        proxy = self.start(upstream)
        client, gate = self.streaming(proxy, upstream)
        never_used, used = self.connect(proxy), self.connect(proxy)
        used.send(build_request("GET", "/health"))
        self.assertEqual(used.read_answer("GET").status, 200)
        proxy.process.send_signal(signal.SIGTERM)
        self.assertTrue(never_used.at_eof(2))
        self.assertTrue(used.at_eof(2))
        with self.assertRaises(ConnectionError):
            RawClient(proxy.port)
        self.assertEqual(select.select([client.sock], [], [], 0.4)[0], [])  # nor is it cut a while later
        self.assertIsNone(proxy.returncode)
        gate.set()
        got = client.read_answer()
        self.assertEqual((got.body, got.complete), (b"data: 1\n\ndata: 2\n\n", True))
        self.assertEqual(proxy.process.wait(5), 0)
        self.assertEqual(proxy.log_records()[-1]["error"], None)

    def test_answer_that_begins_while_draining_says_close_and_closes(self):
        upstream = self.fake()
        proxy = self.start(upstream)
        gate = self.event()
        upstream.script([Pause(gate), *answer(200, (), {"late": 1})])
        client, idle = self.connect(proxy), self.connect(proxy)
        client.send(ASK)
        upstream.wait_for_requests(1)
        proxy.process.send_signal(signal.SIGTERM)
        self.assertTrue(idle.at_eof(2))
        gate.set()
        got = client.read_answer()
        self.assertEqual((got.json(), got.all("Connection")), ({"late": 1}, ["close"]))
        self.assertTrue(client.at_eof(2))
        self.assertEqual(proxy.process.wait(5), 0)

    def test_stream_that_does_not_end_is_cut_after_drain_s(self):
        upstream = self.fake()
        proxy = self.start(upstream, limits={"drain_s": 0.4})
        client, _ = self.streaming(proxy, upstream)
        started = time.monotonic()
        proxy.process.send_signal(signal.SIGTERM)
        got = client.read_answer()
        self.assertEqual((got.body, got.complete), (b"data: 1\n\n", False))
        self.assertEqual(proxy.process.wait(5), 0)
        self.assertTrue(0.3 < time.monotonic() - started < 3)
        record = proxy.log_records()[-1]
        self.assertEqual((record["status"], record["error"]), (200, "shutting_down"))

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "Windows cannot stop a process")
    def test_what_is_whole_when_the_connection_is_cut_is_no_error(self):
        """A response whose last event has passed, and a page."""
        upstream = self.fake()
        proxy = self.start(upstream)
        last = response_events(response_object([], "gpt-test"))[-1]
        upstream.script(stream(last, Pause(self.event())))
        client, page = self.connect(proxy), self.connect(proxy)
        client.send(ASK)
        client.wait_for(last[-20:])
        ticket = post(proxy.port, "/status", b"").json()["ticket"]
        page.send(build_request("GET", "/status?ticket=" + ticket, key=None))
        page.wait_for(b"event: status")
        proxy.process.send_signal(signal.SIGSTOP)  # so that both signals are there at once
        proxy.process.send_signal(signal.SIGTERM)
        proxy.process.send_signal(signal.SIGINT)
        proxy.process.send_signal(signal.SIGCONT)
        self.assertEqual(proxy.process.wait(5), 0)
        ended = [one for one in proxy.log_records() if one.get("route") == "/responses" or one.get("method") == "GET"]
        self.assertEqual([(one["status"], one["error"]) for one in ended], [(200, None)] * 2)

    def test_what_has_no_answer_after_drain_s_is_refused(self):
        upstream = self.fake()
        proxy = self.start(upstream, limits={"drain_s": 0.4})
        upstream.script([Pause(self.event())])
        waiting, half = self.connect(proxy), self.connect(proxy)
        waiting.send(ASK)
        upstream.wait_for_requests(1)
        half.send(build_request("POST", "/v1/responses", b"{}", {"Expect": "100-continue"})[:-2])
        half.wait_for(b"100 Continue")
        proxy.process.send_signal(signal.SIGTERM)
        for client in (waiting, half):
            got = client.read_answer()
            self.assertEqual((got.status, got.error_code, got.complete), (503, "shutting_down", True))
        self.assertEqual(proxy.process.wait(5), 0)
        self.assertTrue(upstream.wait_disconnected(1, 2))
        self.assertEqual([one["error"] for one in proxy.log_records()], ["shutting_down"] * 2)

    def test_second_signal_cuts_at_once(self):
        upstream = self.fake()
        proxy = self.start(upstream)
        client, _ = self.streaming(proxy, upstream)
        idle = self.connect(proxy)
        proxy.process.send_signal(signal.SIGTERM)
        self.assertTrue(idle.at_eof(2))  # the first has been seen
        started = time.monotonic()
        proxy.process.send_signal(signal.SIGTERM)
        proxy.process.wait(5)
        self.assertLess(time.monotonic() - started, 2)
        self.assertFalse(client.read_answer().complete)
        self.assertTrue(upstream.wait_disconnected(1, 2))

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "Windows cannot stop a process")
    def test_requests_that_came_but_were_not_read_are_refused_and_not_reset(self):
        proxy = self.start()
        used = self.connect(proxy)
        used.send(build_request("GET", "/health"))
        self.assertEqual(used.read_answer("GET").status, 200)
        proxy.process.send_signal(signal.SIGSTOP)
        clients = [self.connect(proxy) for _ in range(50)]  # many more than are accepted in one go
        for client in clients:
            client.send(ASK)
        half = self.connect(proxy)
        half.send(ASK[:40])
        proxy.process.send_signal(signal.SIGTERM)
        proxy.process.send_signal(signal.SIGCONT)
        for client in [*clients, half]:
            got = client.read_answer()
            self.assertEqual((got.status, got.error_code, got.all("Connection")), (503, "shutting_down", ["close"]))
        self.assertTrue(used.at_eof(2))
        self.assertEqual(proxy.process.wait(5), 0)

    def test_request_that_is_still_coming_does_not_hold_it(self):
        proxy = self.start()
        client = self.connect(proxy)
        client.send(ASK[:40])
        probe = self.connect(proxy)
        probe.send(build_request("GET", "/health"))
        self.assertEqual(probe.read_answer("GET").status, 200)  # by now the half request has been seen
        started = time.monotonic()
        proxy.process.send_signal(signal.SIGTERM)
        self.assertEqual(proxy.process.wait(10), 0)
        self.assertLess(time.monotonic() - started, 4)


class DefectTest(ServerTest):
    """What nobody expected ends one exchange, not the service, and is told without its text: a key may stand there."""

    def start_with(self, broken: str) -> Proxy:
        proxy = Proxy(make_config("http://127.0.0.1:9/v1"))
        proxy.change(f"def fail(*_):\n    raise ValueError('sk-upstream')\nplexus_lite.{broken} = fail")
        enter(self.addCleanup, proxy)
        return proxy

    def assertTold(self, proxy: Proxy) -> None:
        message = proxy.wait_for_record(lambda one: "level" in one)["message"]
        self.assertRegex(message, r"^internal error: ValueError in line [1-9][0-9]* of version [0-9.]+$")
        with open(PROGRAM, encoding="utf-8") as file:
            source = file.read().split("\n")[int(message.split()[5]) - 1]
        self.assertRegex(source, r"getattr\(self, \"do_\"|_read_some\(|_is_whole\(")
        self.assertNotIn("sk-upstream", proxy.error_text())

    def test_in_a_handler_is_a_500_and_the_connection_goes_on(self):
        proxy = self.start_with("Handler.do_health")
        client = self.connect(proxy)
        client.send(build_request("GET", "/health"))
        got = client.read_answer("GET")
        self.assertEqual((got.status, got.error_code), (500, "internal_error"))
        client.send(build_request("GET", "/v1/models"))
        self.assertEqual(client.read_answer("GET").status, 200)
        self.assertTold(proxy)

    def test_in_the_loop_ends_the_connection_that_it_happened_on(self):
        proxy = self.start_with("ClientConnection._read_some")
        idle, client = self.connect(proxy), self.connect(proxy)
        client.send(build_request("GET", "/health"))
        self.assertTrue(client.at_eof(2))
        self.assertTold(proxy)
        self.assertFalse(select.select([idle.sock], [], [], 0)[0])
        self.assertEqual(proxy.stop(), 0)

    def test_in_the_end_of_a_connection_ends_no_other(self):
        """It was closed again for that, met the same defect, and with it the program ended."""
        proxy = self.start_with("ClientConnection._is_whole")
        client, other = self.connect(proxy), self.connect(proxy)
        client.send(ASK[:-1])
        client.close()
        self.assertTold(proxy)
        other.send(build_request("GET", "/health"))
        self.assertEqual(other.read_answer("GET").status, 200)
        self.assertEqual(proxy.stop(), 0)


@needs_hup
class ReloadTest(ServerTest):
    def hup(self, proxy: Proxy) -> None:
        proxy.process.send_signal(signal.SIGHUP)

    def reload(self, proxy: Proxy) -> Dict[str, Any]:
        """Send SIGHUP; return the line of the log that tells what became of it."""
        known = len(proxy.log_records())
        self.hup(proxy)
        return proxy.wait_for_record(lambda one: "route" not in one and one in proxy.log_records()[known:])

    def models(self, proxy: Proxy, key: str = "sk-client") -> List[str]:
        return [entry["id"] for entry in get(proxy.port, "/v1/models", key=key).json()["data"]]

    def test_valid_file_is_used_for_new_requests_and_running_ones_go_on(self):
        upstream, other = self.fake(), self.fake()
        proxy = self.start(upstream)
        client, gate = self.streaming(proxy, upstream)
        waiting = self.connect(proxy)  # a connection opened before the reload uses the new file too
        proxy.write_config(make_config(other, {"models": ["gpt-new"]}, keys={"team": {"secret": "sk-second"}}))
        self.reload(proxy)
        self.assertEqual(self.models(proxy, "sk-second"), ["gpt-new"])
        self.assertEqual(get(proxy.port, "/v1/models", key="sk-client").status, 401)
        waiting.send(build_request("POST", "/v1/responses", {"model": "gpt-new"}, key="sk-second"))
        self.assertEqual(waiting.read_answer().status, 200)
        self.assertEqual((len(upstream.requests), len(other.requests)), (1, 1))
        gate.set()
        got = client.read_answer()
        self.assertEqual((got.body, got.complete), (b"data: 1\n\ndata: 2\n\n", True))
        client.send(ASK)
        self.assertEqual(client.read_answer().status, 401)

    def test_invalid_file_is_one_line_in_the_log_and_the_old_one_stays(self):
        proxy = self.start()
        for content in ("", '{"providers": }', '{"providers": {}, "nonesuch": 1}', "[1]", "\0"):
            with self.subTest(content):
                with open(proxy.config_path, "w", encoding="utf-8") as file:
                    file.write(content)
                line = json.dumps(self.reload(proxy))
                self.assertIn("config.json", line)
                self.assertIn("error", line)
                self.assertEqual(self.models(proxy), ["gpt-test"])
        os.unlink(proxy.config_path)
        self.assertIn("config.json", json.dumps(self.reload(proxy)))
        self.assertEqual(self.models(proxy), ["gpt-test"])
        self.assertEqual(len([one for one in proxy.log_records() if "route" not in one]), 6)

    def test_invalid_then_valid_is_used(self):
        proxy = self.start()
        with open(proxy.config_path, "w", encoding="utf-8") as file:
            file.write("{")
        self.reload(proxy)
        proxy.write_config(make_config("http://127.0.0.1:9/v1", {"models": ["second"]}))
        self.reload(proxy)
        self.assertEqual(self.models(proxy), ["second"])

    @unittest.skipUnless(sys.platform == "linux", "only Linux has prlimit")
    def test_more_connections_get_their_descriptors(self):
        import resource

        proxy = self.start()
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE, (300, hard))
        proxy.write_config(make_config("http://127.0.0.1:9/v1", limits={"max_connections": 100}))
        self.reload(proxy)
        wanted = 2 * 100 + 256
        self.assertEqual(resource.prlimit(proxy.process.pid, resource.RLIMIT_NOFILE), (wanted, hard))

    def test_reload_beyond_loopback_without_keys_is_refused(self):
        """Also where the new file says another host: that one waits for a restart."""
        for args, host in ((["--host", "0.0.0.0"], None), ([], "0.0.0.0")):
            with self.subTest(args):
                proxy = self.start(args=args, host=host)
                proxy.write_config(make_config("http://127.0.0.1:9/v1", keys=None, host="127.0.0.1"))
                self.assertIn("allow_anonymous", json.dumps(self.reload(proxy)))
                self.assertEqual(get(proxy.port, "/v1/models", key=None).status, 401)

    def test_log_file_is_opened_again_after_it_was_moved(self):
        with tempfile.TemporaryDirectory() as folder:
            path, moved = os.path.join(folder, "access.log"), os.path.join(folder, "access.log.1")
            proxy = self.start(args=["--log-file", path])
            first = get(proxy.port, "/health").header("x-plexus-request-id")
            self.wait_until(lambda: os.path.getsize(path) > 0)
            os.rename(path, moved)
            second = get(proxy.port, "/health").header("x-plexus-request-id")
            self.hup(proxy)
            self.wait_until(lambda: get(proxy.port, "/health").status == 200 and os.path.exists(path))
            third = get(proxy.port, "/health").header("x-plexus-request-id")
            self.assertEqual(proxy.stop(), 0)
            with open(path, encoding="utf-8") as new, open(moved, encoding="utf-8") as old:
                new_text, old_text = new.read(), old.read()
            self.assertIn(str(first), old_text)
            self.assertIn(str(second), new_text + old_text)
            self.assertIn(str(third), new_text)
            for line in (new_text + old_text).splitlines():
                json.loads(line)

    def test_log_file_that_cannot_be_opened_again_is_told_in_the_old_one(self):
        with tempfile.TemporaryDirectory() as parent:
            folder, moved = os.path.join(parent, "logs"), os.path.join(parent, "moved")
            os.mkdir(folder)
            path = os.path.join(folder, "access.log")
            proxy = self.start(args=["--log-file", path])
            self.assertEqual(get(proxy.port, "/health").status, 200)
            os.rename(folder, moved)
            self.hup(proxy)

            def text() -> str:
                with open(os.path.join(moved, "access.log"), encoding="utf-8") as file:
                    return file.read()

            self.wait_until(lambda: "goes on" in text())
            records = [json.loads(line) for line in text().splitlines()]
            message = next(one["message"] for one in records if one.get("level") == "error")
            problem = "cannot be opened: No such file or directory"
            self.assertEqual(message, f"--log-file {path}: {problem}; the old file goes on")

    @unittest.skipUnless(hasattr(os, "mkfifo"), "this system has no FIFO")
    def test_a_fifo_that_nobody_reads_is_one_line(self):
        """To open it would wait, and the program would not listen."""
        with tempfile.TemporaryDirectory() as folder:
            path, config = os.path.join(folder, "fifo"), os.path.join(folder, "config.json")
            os.mkfifo(path)
            with open(config, "w", encoding="utf-8") as file:
                json.dump(make_config("http://127.0.0.1:9/v1"), file)
            (got,) = run_many([["--config", config, "--port", "0", "--log-file", path]])
        problem = f"--log-file {path}: cannot be opened: No such device or address\n"
        self.assertEqual((got.returncode, got.stderr), (2, problem))

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 5
        pause = threading.Event()
        while not condition():
            self.assertLess(time.monotonic(), deadline)
            pause.wait(0.02)


class BrokenOutputTest(ServerTest):
    """Nobody may be reading what the program says; it serves all the same."""

    def assert_serves(self, port: int, upstream: FakeUpstream) -> None:
        """Whole answers and clean requests, several at once and one after the other."""
        upstream.requests.clear()
        for number in range(8):
            body = {"model": "gpt-test", "input": f"number {number}"}
            got = post(port, "/v1/responses", body)
            self.assertEqual((got.status, got.complete), (200, True))
            self.assertEqual(got.json()["object"], "response")
            self.assertEqual(exchange(port, b"junk\r\n\r\n").status, 400)
        self.assertEqual([request.json()["input"] for request in upstream.requests], [f"number {n}" for n in range(8)])

    def test_both_pipes_closed_by_the_reader(self):
        upstream = self.fake()
        with tempfile.TemporaryDirectory() as folder:
            process, port = self.spawn(folder, upstream, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            assert process.stdout and process.stderr
            process.stdout.close()
            process.stderr.close()
            self.assert_serves(port, upstream)
            process.terminate()
            self.assertEqual(process.wait(10), 0)

    def test_stderr_that_nobody_reads_fills_and_stops_nothing(self):
        upstream = self.fake()
        with tempfile.TemporaryDirectory() as folder:
            process, port = self.spawn(folder, upstream, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            with RawClient(port) as client:
                for _ in range(400):  # of some 500 bytes each, into a pipe of 64 KiB
                    client.send(build_request("GET", "/health"))
                    self.assertEqual(client.read_answer("GET").status, 200)
            self.assert_serves(port, upstream)
            process.terminate()
            process.communicate(timeout=10)
            self.assertEqual(process.returncode, 0)

    @needs_shell
    def test_standard_descriptors_closed_from_the_start_are_never_taken_for_a_socket(self):
        upstream = self.fake()
        started = []
        with contextlib.ExitStack() as stack:
            for closed in ("2>&-", "0<&- 2>&-", "0<&- 1>&- 2>&-", "1>&-"):
                folder = stack.enter_context(tempfile.TemporaryDirectory())
                started.append((closed, *self.spawn(folder, upstream, shell=f'exec "$@" {closed}', wait=False)))
            for closed, process, port in started:
                with self.subTest(closed):
                    self.wait_listening(process, port)
                    self.assert_serves(port, upstream)
                    process.terminate()
            for closed, process, _ in started:
                with self.subTest(closed):
                    self.assertEqual(process.wait(10), 0)

    def check_told(self, stdout: Any, code: int, said: str) -> None:
        """Have the program tell everything that it can be asked for, on *stdout*."""
        folder = enter(self.addCleanup, tempfile.TemporaryDirectory())
        path = os.path.join(folder, "config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"providers": {"demo": {"api_base_url": "demo://", "models": ["m"]}}}, file)
        for arguments in (["--help"], ["--version"], ["init"], ["report", os.devnull], ["check", "--config", path]):
            command, pipes = [sys.executable, PROGRAM, *arguments], {"stdout": stdout, "stderr": subprocess.PIPE}
            with self.subTest(arguments[0]):
                done = subprocess.run(command, env=clean_environment(), text=True, timeout=30, **pipes)
                self.assertEqual((done.returncode, done.stderr), (code, said))

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_what_was_asked_for_and_finds_the_disk_full_is_exit_2_and_one_line(self):
        with open("/dev/full", "wb") as full:
            self.check_told(full, 2, "stdout: cannot be written: No space left on device\n")

    @unittest.skipIf(sys.platform == "win32", "there, nobody is told that the reader has left")
    def test_what_was_asked_for_may_be_read_by_nobody(self):
        reading, writing = os.pipe()
        os.close(reading)
        self.addCleanup(os.close, writing)
        self.check_told(writing, 0, "")

    @unittest.skipUnless(os.path.exists("/dev/full"), "needs /dev/full")
    def test_full_disk_stops_nothing(self):
        upstream = self.fake()
        proxy = self.start(upstream, args=["--log-file", "/dev/full"])
        self.assert_serves(proxy.port, upstream)
        self.assertEqual(proxy.stop(), 0)

    def spawn(
        self, folder: str, upstream: FakeUpstream, shell: str = "", wait: bool = True, **pipes: Any
    ) -> Tuple["subprocess.Popen[bytes]", int]:
        """Start the program on a free port without reading what it says."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        path = os.path.join(folder, "config.json")
        with open(path, "w", encoding="utf-8") as file:
            json.dump(make_config(upstream), file)
        command = [sys.executable, PROGRAM, "--config", path, "--port", str(port)]
        if shell:
            command = ["sh", "-c", shell, "sh", *command]
            pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=clean_environment(), **pipes)
        self.addCleanup(process.wait, 10)
        self.addCleanup(process.kill)
        if wait:
            self.wait_listening(process, port)
        return process, port

    def wait_listening(self, process: "subprocess.Popen[bytes]", port: int) -> None:
        deadline, pause = time.monotonic() + 10, threading.Event()
        while True:
            try:
                RawClient(port).close()
                return
            except ConnectionError:
                self.assertIsNone(process.poll(), "it ended")
                self.assertLess(time.monotonic(), deadline)
                pause.wait(0.02)


@unittest.skipUnless(sys.platform.startswith("linux"), "needs ulimit -n and /proc")
class NoDescriptorsTest(ServerTest):
    def cpu_seconds(self, pid: int) -> float:
        with open(f"/proc/{pid}/stat") as stat:
            fields = stat.read().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def test_accepting_pauses_and_recovers(self):
        upstream = self.fake()
        proxy: Proxy = enter(self.addCleanup, ShellProxy(make_config(upstream), 'ulimit -n 40; exec "$@"'))
        first = self.connect(proxy)
        first.send(build_request("GET", "/health"))
        self.assertEqual(first.read_answer("GET").status, 200)
        clients = [RawClient(proxy.port, 1) for _ in range(60)]
        proxy.wait_for_record(lambda one: "cannot accept" in str(one.get("message")))
        before, quiet = self.cpu_seconds(proxy.process.pid), threading.Event()
        quiet.wait(0.4)
        self.assertLess(self.cpu_seconds(proxy.process.pid) - before, 0.2, "it spins")
        first.send(build_request("GET", "/health"))  # who is connected is served
        self.assertEqual(first.read_answer("GET").status, 200)
        first.send(ASK)  # and told what is wrong where that needs a descriptor
        self.assertIn(first.read_answer().status, (200, 502, 503))
        for client in clients:
            client.close()
        self.assertEqual(post(proxy.port, "/v1/responses", BODY).status, 200)
        self.assertEqual(get(proxy.port, "/health").status, 200)
        self.assertLess(len(proxy.stderr), 60, "the log is flooded")


class RecordTest(ServerTest):
    MEMBERS = frozenset(
        ("ts", "id", "key", "label", "client", "method", "route", "model", "upstream_model", "provider", "target")
        + ("status", "error", "attempts", "stream", "ttfb_ms", "duration_ms", "bytes_in", "bytes_out", "session")
        + ("session_source", "placement")
    )
    # Another part fills these; until then they are absent.
    LATER = frozenset(
        ("input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "miss_reason", "prefix_changed_at")
    )
    proxy: Proxy
    upstream: FakeUpstream

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream())
        config = make_config(cls.upstream, models={"coder": {"targets": [{"provider": "up", "model": "gpt-test"}]}})
        config["providers"]["gone"] = {"api_base_url": "http://127.0.0.1:1/v1", "models": ["gone"]}
        cls.proxy = enter(cls.addClassCleanup, Proxy(config))

    def setUp(self):
        self.upstream.reset()

    def record(self, got: Answer) -> Dict[str, Any]:
        """Return the record of *got*, its members and types checked."""
        request_id = got.header("x-plexus-request-id")
        record = self.proxy.wait_for_record(lambda one: one["id"] == request_id)
        self.assertEqual(set(record) - self.LATER, self.MEMBERS)
        self.assertRegex(record["ts"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")
        self.assertEqual((record["client"], record["status"]), ("127.0.0.1", got.status))
        for name in ("status", "attempts", "bytes_in", "bytes_out"):
            self.assertIs(type(record[name]), int, name)
        for name in ("ttfb_ms", "duration_ms"):
            self.assertIn(type(record[name]), (int, float), name)
        self.assertTrue(0 <= record["ttfb_ms"] <= record["duration_ms"] < 10_000, record)
        self.assertEqual(record["bytes_out"], len(got.body))
        return record

    def test_stream_that_was_served(self):
        events = response_events(response_object([]))
        self.upstream.script(stream(*events))
        body = json.dumps(dict(BODY, model="coder")).encode()
        record = self.record(post(self.proxy.port, "/v1/codex/responses?x=secret", body, key="sk-client:night"))
        expected = {
            "key": "team",
            "label": "night",
            "method": "POST",
            "route": "/responses",
            "model": "coder",
            "upstream_model": "gpt-test",
            "provider": "up",
            "target": self.upstream.base_url,
            "status": 200,
            "error": None,
            "attempts": 1,
            "stream": True,
            "bytes_in": len(body),
            "session": hashlib.sha256(b"session-1").hexdigest()[:12],
            "session_source": "prompt_cache_key",
            "placement": "only",
        }
        self.assertEqual({name: record[name] for name in expected}, expected)

    def test_header_is_the_source_of_the_session(self):
        self.upstream.script(answer(200, (), {}))
        record = self.record(post(self.proxy.port, "/v1/responses", BODY, {"Session_ID": "abc"}))
        self.assertEqual(record["session_source"], "session_id")
        self.assertEqual(record["session"], hashlib.sha256(b"abc").hexdigest()[:12])
        self.assertEqual(record["stream"], False)

    def test_no_session_is_null(self):
        self.upstream.script(answer(200, (), {}))
        record = self.record(post(self.proxy.port, "/v1/responses", {"model": "gpt-test"}))
        self.assertEqual((record["session"], record["session_source"]), (None, None))

    def test_refused_requests_have_their_code_and_null_for_what_is_unknown(self):
        unknown = ("model", "upstream_model", "provider", "target", "session", "session_source", "placement", "stream")
        for raw, status, code, method, route in (
            (build_request("GET", "/nope"), 404, "not_found", "GET", None),
            (build_request("PUT", "/v1/responses"), 405, "method_not_allowed", "PUT", None),
            (build_request("GET", "/v1/models", key=None), 401, "invalid_api_key", "GET", "/models"),
            (build_request("POST", "/v1/responses", b"{"), 400, "invalid_json", "POST", "/responses"),
            (b"GET / HTTP/1.1\r\n\r\n", 400, "invalid_request", None, None),
            (b"\x16\x03\x01", 400, "invalid_request", None, None),
        ):
            with self.subTest(raw[:30]):
                record = self.record(exchange(self.proxy.port, raw))
                self.assertEqual((record["status"], record["error"], record["attempts"]), (status, code, 0))
                self.assertEqual([record[name] for name in unknown], [None] * len(unknown))
                self.assertEqual(record["method"], method)
                if route:
                    self.assertEqual(record["route"], route)

    def test_own_answers_are_recorded_too(self):
        for path in ("/health", "/models", "/models/{id}"):
            record = self.record(get(self.proxy.port, path.replace("{id}", "coder")))
            self.assertEqual((record["route"], record["error"], record["provider"]), (path, None, None))

    def test_broken_upstreams_have_their_codes(self):
        for model, reply, status, code in (
            ("gone", None, 502, "upstream_connection_error"),
            ("gpt-test", [b"nonsense\r\n\r\n"], 502, "upstream_invalid_response"),
            ("gpt-test", [*stream(b"data: 1\n\n", end=False), Cut()], 200, "upstream_closed"),
        ):
            with self.subTest(code):
                self.setUp()
                if reply:
                    self.upstream.script(reply)
                record = self.record(post(self.proxy.port, "/v1/responses", {"model": model}))
                self.assertEqual((record["status"], record["error"], record["attempts"]), (status, code, 1))
                self.assertEqual(record["provider"], "gone" if model == "gone" else "up")

    def test_error_answer_of_an_upstream_keeps_its_status(self):
        self.upstream.script(answer(400, (), {"error": {"message": "m", "code": "context_length_exceeded"}}))
        record = self.record(post(self.proxy.port, "/v1/responses", {"model": "gpt-test"}))
        self.assertEqual((record["status"], record["provider"]), (400, "up"))

    def test_client_that_left_has_no_answer_and_499(self):
        gate = self.event()
        self.upstream.script([Pause(gate)])
        client = self.connect(self.proxy)
        client.send(build_request("POST", "/v1/responses", BODY, key="sk-client:left"))
        self.upstream.wait_for_requests(1)
        client.close()
        record = self.proxy.wait_for_record(lambda one: one.get("label") == "left")
        self.assertEqual((record["status"], record["error"], record["bytes_out"]), (499, "client_gone", 0))
        self.assertEqual((record["ttfb_ms"], record["stream"]), (None, None))

    def test_every_request_has_one_record(self):
        client, key = self.connect(self.proxy), "sk-client:counted"
        ids = []
        for _ in range(10):
            client.send(build_request("GET", "/models", key=key) + build_request("POST", "/responses", b"{}", key=key))
            ids += [client.read_answer(method).header("x-plexus-request-id") for method in ("GET", "POST")]
        self.record(get(self.proxy.port, "/health"))  # its record is written after all of theirs
        recorded = [one["id"] for one in self.proxy.log_records() if one["label"] == "counted"]
        self.assertEqual(recorded, ids)
        self.assertEqual(len(set(ids)), 20)


if __name__ == "__main__":
    unittest.main()
