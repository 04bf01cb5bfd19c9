"""Rooms 7 and 10 to 12 together: what log, /metrics and /status say of real traffic, and what the upstream counted."""

import contextlib
import gzip
import json
import os
import shutil
import signal
import subprocess
import threading
import time
import unittest
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import plexus_lite
from tests import support
from tests.support import Answer, FakeUpstream, Pause, Proxy, RawClient, Recorded, Reply, build_request, enter
from tests.test_observation import Series, parse_metrics, total
from tests.test_workers import children, wait_until

KEYS = {
    "team": {"secret": "sk-client"},
    "a.b c": {"secret": "sk-other"},
    "boss": {"secret": "sk-admin", "admin": True},
}
TOOLS = [{"type": "function", "name": "t"}]
ITEMS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
NULLS: Dict[str, Any] = {"input_tokens": None, "cached_tokens": None, "miss_reason": None, "prefix_changed_at": None}
# Runs a command with a terminal as its stderr; the pipe that was there stays open.
ON_TERMINAL = """import os, sys
os.set_inheritable(os.dup(2), True)
os.dup2(os.open({!r}, os.O_RDWR | os.O_NOCTTY), 2)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"""

NEEDS_WORKERS = unittest.skipUnless(
    hasattr(os, "fork") and os.path.exists("/proc/self/stat"), "workers need fork, this test /proc"
)


class Counting:
    """What the upstreams do and count: the request's metadata says with how many tokens it is answered."""

    def __init__(self) -> None:
        self.input_tokens = self.cached_tokens = 0
        self.refused: List[str] = []

    def reply(self, request: Recorded) -> Reply:
        if request.method != "POST" or request.target.endswith("/cancel"):
            return support.answer(200, (), support.response_object([], input_tokens=10**6))
        body = request.json()
        wish = body.get("metadata", {})
        if wish.get("refuse") and wish["refuse"] not in self.refused:
            self.refused.append(wish["refuse"])
            return support.answer(503, (), {"error": {"code": "busy"}})
        if "raw" in wish:
            steps = support.stream(*(event.encode() for event in wish["raw"]), end=wish.get("end", True))
            return [*steps, support.Cut()] if wish.get("cut") else steps
        tokens, cached = wish.get("tokens", (2048, 1920))
        response = support.response_object([support.message_item("hi")], body["model"], "resp_1", tokens, cached)
        if wish.get("gzip"):
            return support.answer(
                200,
                {"Content-Encoding": "gzip", "Content-Type": "application/json"},
                gzip.compress(json.dumps(response).encode()),
            )
        self.input_tokens += tokens
        self.cached_tokens += cached
        return (
            support.stream(*support.response_events(response))
            if body.get("stream")
            else support.answer(200, (), response)
        )


Row = Tuple[str, Dict[str, Any], Tuple[int, int], Optional[str], Any]
# name, what changes in the conversation, tokens and cached tokens, the reason, and where the prefix changed
ROWS: Sequence[Row] = (
    ("first", {}, (5000, 0), "first_request", None),
    ("hit", {}, (5200, 4992), None, None),
    ("one more item", {"input": [*ITEMS, {"role": "user", "content": "d"}]}, (5300, 5120), None, None),
    ("half a hit", {}, (5300, 2650), None, None),
    ("unknown", {}, (5300, 2649), "unknown", None),
    ("too short", {"input": ITEMS[:1]}, (1023, 0), "below_minimum", None),
    ("back", {"input": ITEMS}, (5000, 1000), None, None),
    ("another model", {"model": "gpt-other"}, (5000, 0), "prefix_changed", "model"),
    ("hit there", {}, (5000, 4992), None, None),
    ("other instructions", {"instructions": "be brief"}, (5000, 0), "prefix_changed", "instructions"),
    ("other tools", {"tools": TOOLS * 2, "input": ITEMS[1:]}, (5000, 0), "prefix_changed", "tools"),
    ("back to all items", {"input": ITEMS}, (5000, 0), "prefix_changed", 0),
    ("the last item", {"input": [*ITEMS[:2], {"role": "user", "content": "C"}]}, (5000, 0), "prefix_changed", 2),
    ("hit again", {}, (5000, 5000), None, None),
)


class ViewCase(unittest.TestCase):
    def start(self, upstreams: int = 1, idle_s: float = 300.0, **overrides: Any) -> None:
        self.counting = Counting()
        self.upstreams = [enter(self.addCleanup, FakeUpstream()) for _ in range(upstreams)]
        for upstream in self.upstreams:
            upstream.default = self.counting.reply
        config = support.make_config(self.upstreams, {"models": ["gpt-test", "*"]}, **{"keys": KEYS, **overrides})
        self.proxy = Proxy(config)
        times = {  # what it does each second need not make a test last
            "TICK_S": 0.05,
            "FEED_S": 0.05,
            "LOG_PAUSE_S": 0.001,
            "RESPAWN_S": (0.05, 10.0),
            "COOLDOWN_FIRST_S": 60.0,
            "CACHE_IDLE_S": idle_s,
        }
        self.proxy.change(f"vars(plexus_lite).update({times!r})")
        enter(self.addCleanup, self.proxy)

    def ask(self, session: Optional[str], key: Optional[str] = "sk-client", **body: Any) -> Dict[str, Any]:
        """Send a request and return its record."""
        body = {"model": "gpt-test", "instructions": "be kind", "tools": TOOLS, "input": ITEMS, **body}
        headers = {"session-id": session} if session else {}
        return self.record(support.post(self.proxy.port, "/v1/responses", body, headers, key))

    def record(self, got: Answer) -> Dict[str, Any]:
        number = got.header("x-plexus-request-id")
        return self.proxy.wait_for_record(lambda one: one.get("id") == number)

    def converse(
        self, session: str, rows: Sequence[Row] = ROWS, before_turn: Callable[[int], object] = lambda number: None
    ) -> None:
        body: Dict[str, Any] = {}
        for number, (name, change, tokens, reason, changed) in enumerate(rows):
            body.update(change)
            before_turn(number)
            record = self.ask(session, stream=number % 2 == 0, metadata={"tokens": tokens}, **body)
            said = {member: record[member] for member in NULLS}
            wanted = {**NULLS, "input_tokens": tokens[0], "cached_tokens": tokens[1]}
            wanted.update(miss_reason=reason, prefix_changed_at=changed)
            self.assertEqual(said, wanted, name)

    def scrape(self) -> Series:
        got = support.get(self.proxy.port, "/metrics", key="sk-admin")
        self.assertEqual(got.header("Content-Type"), "text/plain; version=0.0.4; charset=utf-8")
        return parse_metrics(got.body)

    def ticket(self, key: Optional[str] = "sk-admin") -> str:
        got = support.post(self.proxy.port, "/status", b"", key=key)
        self.assertEqual((got.status, got.json()["expires_in"]), (200, 60))
        return str(got.json()["ticket"])

    def status(self, key: Optional[str] = "sk-admin") -> Dict[str, Any]:
        with Page(self.proxy.port, self.ticket(key)) as page:
            return page.next_event()

    def assertCountedAlike(self) -> None:
        """Log, /metrics and /status say what the upstreams counted."""
        wanted = (self.counting.input_tokens, self.counting.cached_tokens)
        known = [one for one in self.proxy.log_records() if one.get("input_tokens") is not None]
        log = tuple(sum(one[name] for one in known) for name in ("input_tokens", "cached_tokens"))
        self.assertEqual(log, wanted)

        def metrics() -> Tuple[float, ...]:
            series = self.scrape()
            return tuple(total(series, "plexus_tokens_total", kind=kind) for kind in ("input", "cached"))

        wait_until(lambda: metrics() == wanted, f"/metrics {metrics()}, the upstream {wanted}")
        totals = self.status()["totals"]
        self.assertEqual((totals["input_tokens"], totals["cached_tokens"]), wanted)


class Page(RawClient):
    """The status page's event stream."""

    def __init__(self, port: int, ticket: str) -> None:
        super().__init__(port)
        self.send(build_request("GET", "/status?ticket=" + ticket, key=None))
        self.first_line = self.take_line()
        self.fields = dict(self.take_fields())
        self.chunks = self.take_chunks()

    def __enter__(self) -> "Page":
        return self

    def next_event(self) -> Dict[str, Any]:
        """Return the next event's data."""
        event = next(chunk for chunk in self.chunks if not chunk.startswith(b":"))
        assert event.startswith(b"event: status\ndata: ") and event.endswith(b"\n\n") and event.count(b"\n") == 3, event
        found: Dict[str, Any] = json.loads(event[len(b"event: status\ndata: ") :])
        return found


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="ascii") as file:
        return file.read().rpartition(")")[2].split()[0]


class ReasonsTest(ViewCase):
    def test_a_first_answer_that_was_cut_was_the_first_request_all_the_same(self) -> None:
        self.start()
        self.ask("session", stream=True, metadata={"raw": ["data: {}\n\n"], "end": False, "cut": True})
        self.assertEqual(self.ask("session", metadata={"tokens": (5000, 0)})["miss_reason"], "unknown")

    def test_an_error_and_a_look_at_a_stored_response_are_no_turns(self) -> None:
        self.start()
        self.record(support.get(self.proxy.port, "/v1/responses/resp_x", {"session-id": "s"}))
        self.assertEqual(self.ask("s", metadata={"refuse": "once"})["status"], 503)
        self.assertEqual(self.ask("s", metadata={"tokens": (5000, 0)})["miss_reason"], "first_request")

    def test_a_change_is_seen_however_large_the_body_is(self) -> None:
        self.start()
        for number, filler in enumerate(("x" * 1024, "x" * (9 << 20))):
            usage = {"tokens": (5000, 0)}
            self.ask(f"session {number}", metadata=usage, input=[filler, "b"])
            record = self.ask(f"session {number}", metadata=usage, input=[filler, "c"])
            self.assertEqual((record["miss_reason"], record["prefix_changed_at"]), ("prefix_changed", 1))

    def test_every_reason_and_no_false_one(self) -> None:
        self.start(upstreams=2)
        self.converse("session", [row for row in ROWS if "model" not in row[1]])  # another model may lie elsewhere
        self.assertEqual(self.ask(None, metadata={"tokens": (5000, 0)})["miss_reason"], "no_session_value")
        self.assertEqual(self.ask(None, metadata={"tokens": (5000, 2500)})["miss_reason"], None)
        # Another key's session of that name is another session.
        self.assertEqual(
            self.ask("session", "sk-other", metadata={"tokens": (5000, 0)})["miss_reason"], "first_request"
        )
        moved = self.ask("session", metadata={"tokens": (5000, 0), "refuse": "once"})
        self.assertEqual((moved["miss_reason"], moved["prefix_changed_at"], moved["attempts"]), ("moved", None, 2))
        back = self.ask("session", metadata={"tokens": (5000, 4000)})
        self.assertEqual((back["miss_reason"], back["target"]), (None, moved["target"]))
        packed = self.ask("session", metadata={"gzip": True})
        self.assertEqual({name: packed[name] for name in NULLS}, NULLS)
        self.assertCountedAlike()
        series = self.scrape()
        misses = {
            dict(labels)["reason"]: int(value)
            for (name, labels), value in series.items()
            if name == "plexus_cache_misses_total" and dict(labels)["model"] == "gpt-test"
        }
        self.assertEqual(
            misses,
            {
                "first_request": 2,
                "unknown": 1,
                "below_minimum": 1,
                "prefix_changed": 4,
                "no_session_value": 1,
                "moved": 1,
            },
        )
        self.assertEqual(total(series, "plexus_failovers_total", provider="up"), 1)
        self.assertEqual(total(series, "plexus_cooldowns_total", provider="up"), 1)
        status = self.status()
        self.assertEqual([one["open"] for one in status["targets"]], [0, 0])
        self.assertEqual(sum(one["cooling_s"] > 0 for one in status["targets"]), 1)

    @NEEDS_WORKERS
    def test_two_workers_give_the_same_reasons_and_the_sum(self) -> None:
        self.start(workers=2)
        wait_until(lambda: len(children(self.proxy.process.pid)) == 2, "two workers")
        pids = children(self.proxy.process.pid)

        def let_one_serve(number: int) -> None:
            os.kill(pids[number % 2], signal.SIGSTOP)
            os.kill(pids[1 - number % 2], signal.SIGCONT)
            wait_until(lambda: state_of(pids[number % 2]) == "T", "it stands still")

        self.addCleanup(os.kill, pids[0], signal.SIGCONT)
        self.converse("session-1", before_turn=let_one_serve)
        self.converse("session-2", ROWS[:9], let_one_serve)
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        self.assertCountedAlike()
        self.assertEqual(len(self.status()["sessions"]), 2)
        for _ in range(6):  # the worker that gave the ticket, or the other
            self.assertEqual(self.status()["started"], self.status()["started"])

    def test_idle(self) -> None:
        self.start(idle_s=0.0, models={"alias": {"targets": [{"provider": "up", "model": "gpt-test"}]}})
        self.converse("s", ROWS[:2])
        self.assertEqual(self.ask("s", metadata={"tokens": (5000, 0)})["miss_reason"], "idle")
        self.assertEqual(self.ask("s", model="alias", metadata={"tokens": (5000, 0)})["miss_reason"], "idle")
        self.assertEqual(self.ask("s", model="n", metadata={"tokens": (5000, 0)})["miss_reason"], "prefix_changed")


class ErrorsTest(ViewCase):
    def test_errors_have_a_line_and_the_scrape_is_what_promtool_takes(self) -> None:
        self.start(upstreams=2)
        failed = support.sse(
            "response.failed", response={"error": {"code": "rate_limit_exceeded"}, "usage": None}
        ).decode()
        rows: Sequence[Tuple[str, Any, Optional[str]]] = (
            ("response.failed", {"raw": [failed]}, "rate_limit_exceeded"),
            ("an error event", {"raw": [support.sse("error", code="server_error").decode()]}, "server_error"),
        )
        for name, wish, error in rows:
            record = self.ask("errors", stream=True, metadata=wish)
            self.assertEqual((record["status"], record["error"], record["input_tokens"]), (200, error, None), name)
        for upstream in self.upstreams:
            upstream.script([*support.stream(b"data: 1\n\n", end=False), support.Cut()])
        self.assertEqual(self.ask("cut")["error"], "upstream_closed")
        for upstream in self.upstreams:
            upstream.reset()
            upstream.script(support.answer(400, (), {"error": {"code": "bad_thing", "type": "t"}}))
        record = self.ask("refused by the upstream")
        self.assertEqual((record["status"], record["error"]), (400, "bad_thing"))
        for upstream in self.upstreams:
            upstream.reset()
        port = self.proxy.port
        self.assertEqual(self.record(support.get(port, "/nowhere"))["error"], "not_found")
        self.assertEqual(self.record(support.post(port, "/responses", {}, key="sk-wrong"))["error"], "invalid_api_key")
        self.assertEqual(self.record(support.exchange(port, b"GET\r\n\r\n"))["status"], 400)
        self.assertEqual(self.ask("moved", metadata={"refuse": "it"})["attempts"], 2)
        self.ask("hostile", model='a"b\\c\nd\r\u2028é\ud800')
        self.ask("long", model="long" * 100_000)
        stored = self.record(support.get(port, "/v1/responses/resp_1"))  # its tokens were counted when it was made
        self.assertEqual((stored["status"], stored["input_tokens"]), (200, None))
        self.assertCountedAlike()
        head = support.exchange(port, build_request("HEAD", "/metrics"))
        self.assertEqual((head.status, head.body, int(head.header("Content-Length") or 0) > 1000), (200, b"", True))
        for path in ("/metrics", "/status"):
            self.assertEqual(self.record(support.get(port, path, key=None))["status"], 401)
        raw = support.get(port, "/metrics", key="sk-admin").body
        self.assertLess(len(raw), 100_000)
        self.assertEqual(total(parse_metrics(raw), "plexus_requests_total", status="4xx"), 6)
        if shutil.which("promtool") is None:
            self.skipTest("promtool is not installed")
        checked = subprocess.run(["promtool", "check", "metrics"], input=raw, capture_output=True, timeout=30)
        self.assertEqual((checked.returncode, checked.stdout + checked.stderr), (0, b""))

    def test_a_client_that_leaves(self) -> None:
        self.start()
        whole = b"".join(support.response_events(support.response_object([])))
        for name, events, error, tokens in (
            ("after the end", whole, None, 2048),
            ("before it", whole[:-9], "client_gone", None),
        ):
            pause = Pause(threading.Event())
            self.upstreams[0].script(support.stream(events, pause))
            with RawClient(self.proxy.port) as client:
                client.send(build_request("POST", "/v1/responses", {"model": "gpt-test", "input": name}))
                client.wait_for(events[-40:])
            record = self.proxy.wait_for_record(bytes_out_are(len(events)))
            self.assertEqual((record["error"], record["status"], record["input_tokens"]), (error, 200, tokens), name)


def bytes_out_are(count: int) -> Callable[[Dict[str, Any]], bool]:
    return lambda record: record["bytes_out"] == count


class MetricsTest(ViewCase):
    def test_what_rests_is_counted_where_it_rests(self) -> None:
        """One name, and one URL, is the beginning of another."""
        one = {"api_base_url": ["http://127.0.0.1:9/v1", "http://127.0.0.1:9/v12"], "models": ["gpt-one"]}
        two = {"api_base_url": "http://127.0.0.1:9/v1", "models": ["gpt-two"]}
        self.start(providers={"up": one, "up 2": two})
        for model, wanted in (("gpt-two", (0, 1)), ("gpt-one", (2, 1))):
            self.assertEqual(self.ask(None, model=model)["status"], 502)
            series = self.scrape()
            found = [total(series, "plexus_targets_cooling", provider=name) for name in ("up", "up 2")]
            self.assertEqual(tuple(found), wanted)
            cools = [row["cooling_s"] > 0 for row in self.status()["targets"]]
            self.assertEqual(cools, [wanted[0] > 0, wanted[0] > 0, True])

    @NEEDS_WORKERS
    def test_counters_never_go_backwards_when_a_worker_is_killed(self) -> None:
        self.start(workers=2)
        wait_until(lambda: len(children(self.proxy.process.pid)) == 2, "two workers")
        before: Series = {}

        def look() -> Series:
            series = self.scrape()
            for (name, labels), value in before.items():
                if name.endswith(("_total", "_bucket", "_count", "_sum")):
                    self.assertGreaterEqual(series.get((name, labels), 0), value, (name, labels))
            before.update(series)
            return series

        for number in range(10):
            self.ask(f"s{number}", metadata={"raw": []} if number % 5 == 0 else {})
            look()
        wait_until(lambda: total(look(), "plexus_tokens_total", kind="input") == 8 * 2048, "all is published")
        pids = children(self.proxy.process.pid)
        os.kill(pids[0], signal.SIGKILL)

        def replaced() -> bool:
            with contextlib.suppress(EOFError, ConnectionError):  # taken by the one that dies
                look()
            return len(set(children(self.proxy.process.pid)) - set(pids)) == 1

        wait_until(replaced, "another worker")
        for number in range(10):
            self.ask(f"t{number}")
            look()
        wait_until(lambda: total(look(), "plexus_tokens_total", kind="input") == 18 * 2048, "the sum of all")


class StatusTest(ViewCase):
    def test_who_sees_what_and_when(self) -> None:
        self.start(prices={"gpt-test": {"input": 1.0, "cached": 0.1}})
        with Page(self.proxy.port, self.ticket("sk-admin")) as page:
            self.assertEqual((page.first_line, page.fields["Content-Type"]), ("HTTP/1.1 200 OK", "text/event-stream"))
            self.assertEqual(page.fields["Cache-Control"], "no-store")
            first = page.next_event()
            self.assertEqual((first["key"], first["all_sessions"], first["sessions"]), ("boss", True, []))
            self.assertAlmostEqual(first["now"], time.time(), delta=60)
            for key in ("sk-client", "sk-other"):
                self.ask("mine", key, metadata={"tokens": (5000, 0)})
            event = first
            while len(event["sessions"]) < 2:
                event = page.next_event()
            self.assertEqual({one["key"] for one in event["sessions"]}, {"team", "a.b c"})
            self.assertEqual([one["miss_reason"] for one in event["misses"]], ["first_request"] * 2)
            self.assertEqual(event["sessions"][0]["turns"][0][1:], [5000, 0, "first_request"])
            own = self.status("sk-other")
            self.assertEqual((own["key"], own["all_sessions"], own["totals"]["requests"]), ("a.b c", False, 2))
            self.assertEqual([one["key"] for one in (*own["sessions"], *own["misses"])], ["a.b c"] * 2)
            self.assertEqual((own["spent"], own["saved"]), (0.01, 0.0))
            # The page closes its stream when it is hidden: that is no error.
            record = self.proxy.wait_for_record(lambda one: one["route"] == "/status" and one["method"] == "GET")
            self.assertEqual((record["status"], record["error"], record["key"]), (200, None, "a.b c"))
            self.proxy.process.send_signal(signal.SIGTERM)
            self.assertEqual(list(page.chunks)[1:], [])  # the stream ends whole, perhaps after one more event
        self.assertEqual(self.proxy.process.wait(5), 0)

    def test_tickets(self) -> None:
        self.start()
        good = self.ticket("sk-other")
        expires, mac = good.split(".")
        forged = (
            f"{int(expires) + 1}.{mac}",
            f"0{expires}.{mac}",
            f"{expires}.{'0' * 64}",
            good[:-1],
        )
        swapped = f"{mac}.{expires}"
        for ticket in (*forged, "", "a", "..", "%001.a", f"-1.{mac}", swapped, f"{good}.", "é", "1" * 999, mac):
            got = support.get(self.proxy.port, "/status?ticket=" + ticket.replace("é", "%C3%A9"), key=None)
            self.assertEqual((got.status, got.error_code), (401, "invalid_api_key"), ticket)
        self.assertEqual(support.post(self.proxy.port, "/status", b"", key="sk-wrong").status, 401)
        self.assertEqual(support.exchange(self.proxy.port, build_request("HEAD", "/status")).status, 405)
        with Page(self.proxy.port, good) as page:
            self.assertEqual(page.next_event()["key"], "a.b c")
        config = support.make_config(self.upstreams, keys={"team": KEYS["team"]})
        self.proxy.write_config(config)
        self.proxy.process.send_signal(signal.SIGHUP)
        self.proxy.wait_for_record(lambda one: one.get("message") == "configuration reloaded")
        self.assertEqual(support.get(self.proxy.port, "/status?ticket=" + good, key=None).status, 401)
        self.assertNotIn(mac, self.proxy.error_text())

    def test_an_open_stream_ends_when_the_keys_change(self) -> None:
        self.start()
        path = os.path.join(self.proxy.folder, "boss")
        with open(path, "w", encoding="ascii") as file:
            file.write("sk-before")
        keys = {"team": KEYS["team"], "boss": {"secret": "file:boss", "admin": True}}
        with Page(self.proxy.port, self.ticket("sk-other")) as page:
            page.next_event()
            self.proxy.write_config(support.make_config(self.upstreams, keys=keys))
            self.proxy.process.send_signal(signal.SIGHUP)
            list(page.chunks)  # to its end
        self.assertEqual(support.post(self.proxy.port, "/status", b"", key="sk-other").status, 401)
        ticket = self.ticket("sk-before")
        with Page(self.proxy.port, ticket) as page:
            page.next_event()
            self.proxy.process.send_signal(signal.SIGHUP)  # the same keys: it goes on
            said = "configuration reloaded"
            wait_until(
                lambda: [one.get("message") for one in self.proxy.log_records()].count(said) == 2, "both reloads"
            )
            self.ask("another", "sk-client")
            while not page.next_event()["sessions"]:
                pass
            plexus_lite.replace_file(path, b"sk-after", b"sk-before")
            list(page.chunks)
        self.assertEqual(support.post(self.proxy.port, "/status", b"", key="sk-before").status, 401)
        self.assertEqual(support.get(self.proxy.port, "/status?ticket=" + ticket, key=None).status, 401)
        self.assertEqual(self.status("sk-after")["key"], "boss")

    def test_a_stream_that_was_admitted_by_the_old_keys_ends_with_them(self) -> None:
        """The reload may come between the two."""
        self.start()
        ticket = self.ticket("sk-other")
        with RawClient(self.proxy.port) as client:
            client.send(build_request("GET", "/health"))
            client.read_answer("GET")
            self.proxy.process.send_signal(signal.SIGSTOP)
            client.send(build_request("GET", "/status?ticket=" + ticket, key=None))
            self.proxy.write_config(support.make_config(self.upstreams, keys={"team": KEYS["team"]}))
            self.proxy.process.send_signal(signal.SIGHUP)
            self.proxy.process.send_signal(signal.SIGCONT)
            self.assertTrue(client.read_answer().complete)  # refused, or admitted and ended

    def test_without_keys(self) -> None:
        self.start(keys=None)
        self.ask("s", key=None)
        status = self.status(None)
        self.assertEqual((status["key"], status["all_sessions"], len(status["sessions"])), (None, True, 1))
        for method, path in (("POST", "/status"), ("GET", "/metrics"), ("GET", "/status")):
            for headers in (
                {"Origin": "http://evil.example"},
                {"Sec-Fetch-Site": "cross-site"},
                {"Host": "evil.example"},
            ):
                got = support.exchange(
                    self.proxy.port, build_request(method, path, b"" if method == "POST" else None, headers, None)
                )
                self.assertEqual((got.status, got.error_code), (403, "forbidden_origin"), (path, headers))
        with RawClient(self.proxy.port) as client:  # HTTP/1.0 knows no chunks
            client.send(b"GET /status HTTP/1.0\r\n\r\n")
            came = client.wait_for(b"\n\n")
        self.assertNotIn(b"Transfer-Encoding", came)
        self.assertRegex(came, rb"\r\n\r\nevent: status\ndata: {.*}\n\n$")


@unittest.skipUnless(hasattr(os, "openpty"), "this system has no pseudo-terminals")
class TerminalTest(ViewCase):
    def test_a_terminal_gets_lines_for_people_in_which_names_are_escaped(self) -> None:
        upstream = enter(self.addCleanup, FakeUpstream())
        proxy = Proxy(support.make_config(upstream, {"models": ["*"]}))
        ours, theirs = os.openpty()
        self.addCleanup(os.close, ours)
        self.addCleanup(os.close, theirs)
        proxy._command[1:1] = ["-c", ON_TERMINAL.format(os.ttyname(theirs))]
        enter(self.addCleanup, proxy)
        support.post(proxy.port, "/v1/responses", {"model": "\x1b[2J\n\u202e", "input": "x"}, {"session-id": "s"})
        lines = b""
        while b"\n" not in lines:
            lines += os.read(ours, 65536)
        line = lines.decode().rstrip("\r\n")
        self.assertRegex(
            line,
            r"^[0-9:]{8}  200  POST /responses  \\x1b\[2J\\n\\u202e  up  [0-9a-f]{12}  \d+ ms  cached 1920 of 2048 ",
        )


if __name__ == "__main__":
    unittest.main()
