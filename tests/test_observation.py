"""Room 7: what the log says of a request, the usage read on the way, why a turn missed, and what is counted."""

import calendar
import json
import os
import random
import re
import struct
import subprocess
import sys
import time
import tracemalloc
import unittest
import unittest.mock
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import plexus_lite
from tests.support import body_of, make_config, message_item, response_events, response_object, sse
from tests.test_fuzz import STREAM_HEAD, relay

# The members of a record, in the contract's order.
MEMBERS = ["ts", "id", "key", "label", "client", "method", "route", "model", "upstream_model", "provider", "target"]
MEMBERS += ["status", "error", "attempts", "stream", "ttfb_ms", "duration_ms", "bytes_in", "bytes_out", "session"]
MEMBERS += ["session_source", "placement", "input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens"]
MEMBERS += ["miss_reason", "prefix_changed_at"]


class NewRecord(unittest.TestCase):
    def test_members_are_the_contract_s_in_its_order(self):
        found = list(plexus_lite.new_record(0.0, "req_1", "127.0.0.1"))
        self.assertEqual(found, [name for name in MEMBERS if name in found])
        self.assertEqual(found[:22], MEMBERS[:22])

    def test_what_is_not_known_is_null_and_never_0(self):
        record = plexus_lite.new_record(0.0, "req_1", "192.0.2.1")
        known = {name: value for name, value in record.items() if value is not None}
        ts = known.pop("ts")
        self.assertEqual(known, {"id": "req_1", "client": "192.0.2.1", "attempts": 0, "bytes_in": 0, "bytes_out": 0})
        self.assertEqual(ts, "1970-01-01T00:00:00.000Z")
        self.assertEqual(json.loads(json.dumps(record)), record)

    def test_ts_is_rfc_3339_in_utc_with_milliseconds(self):
        rows = (
            (1_700_000_000.0, "2023-11-14T22:13:20.000Z"),
            (1_700_000_000.1239, "2023-11-14T22:13:20.123Z"),
            (1_709_164_800.5, "2024-02-29T00:00:00.500Z"),
            (4_102_444_799.9989, "2099-12-31T23:59:59.998Z"),
        )
        for started, wanted in rows:
            with self.subTest(wanted):
                self.assertEqual(plexus_lite.new_record(started, "", "")["ts"], wanted)

    def test_ts_never_jumps_at_the_turn_of_a_second(self):
        for started in (1_699_999_999.9999998, 1_700_000_000.0000002, 1_699_999_999.9995, 1_699_999_999.9994):
            with self.subTest(repr(started)):
                ts = plexus_lite.new_record(started, "", "")["ts"]
                seconds = calendar.timegm(time.strptime(ts[:19], "%Y-%m-%dT%H:%M:%S")) + int(ts[20:23]) / 1000
                self.assertAlmostEqual(seconds, started, delta=0.0011)

    def test_two_records_share_nothing(self):
        one, two = plexus_lite.new_record(0.0, "a", ""), plexus_lite.new_record(0.0, "b", "")
        one["status"] = 200
        self.assertIsNone(two["status"])


Usage = Tuple[Dict[str, int], Optional[str], bool]
TOKENS = {"input_tokens": 2048, "cached_tokens": 1920, "output_tokens": 8}


def read_usage(pieces: Sequence[bytes], is_events: bool = True) -> Usage:
    reader = plexus_lite.UsageReader(is_events)
    for piece in pieces:
        reader.feed(piece)
    reader.finish()
    return reader.tokens, reader.error, reader.is_complete


def chunk(**members: Any) -> bytes:
    return b"data: " + json.dumps(members).encode() + b"\n\n"


def failed(code: Any, **error: Any) -> bytes:
    return sse("response.failed", response={"id": "resp_1", "error": dict(error, code=code), "usage": None})


# What stands in an answer and is not its usage.
ECHO: Dict[str, Any] = {
    "tools": [{"usage": {"input_tokens": 1}, "error": {"code": "no"}}, [[{"usage": {"output_tokens": 2}}]]],
    "text": {"usage": {"input_tokens": 3}},
    "instructions": '"usage":{"input_tokens":4} "error":{"code":"5"} \\" \\\\" } ] \u00e9\U0001f600',
    "output": [{"content": [{"text": json.dumps({"usage": {"input_tokens": 6}})}]}, "\\", '\\"', '{["'],
}
CHAT_USAGE = {"prompt_tokens": 2048, "completion_tokens": 8, "prompt_tokens_details": {"cached_tokens": 1920}}


class UsageReaderTest(unittest.TestCase):
    def assertReads(self, data: bytes, wanted: Usage, is_events: bool = True) -> None:
        """In one piece, byte by byte, cut in two at every place, and in random pieces."""
        rng = random.Random(len(data))
        ways = [[data], [data[place : place + 1] for place in range(len(data))]]
        ways += [[data[:place], data[place:]] for place in range(0, len(data), 1 + len(data) // 60)]
        for _ in range(5):
            cuts = sorted(rng.randrange(len(data) + 1) for _ in range(rng.randrange(1, 20)))
            ways.append([data[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(data)])])
        for pieces in ways:
            if read_usage(pieces, is_events) != wanted:
                self.assertEqual(read_usage(pieces, is_events), wanted, pieces if len(data) < 2000 else len(pieces))

    def test_event_streams(self):
        whole = response_object([message_item('say "usage": {"input_tokens": 1} \\')])
        late = dict(whole, error=None)
        rows: Sequence[Tuple[str, bytes, Usage]] = (
            ("completed", b"".join(response_events(whole)), (TOKENS, None, True)),
            ("with CRLF", b"".join(response_events(whole)).replace(b"\n", b"\r\n"), (TOKENS, None, True)),
            ("without the last line's end", response_events(whole)[-1].strip(), ({}, None, False)),
            ("echo before", sse("response.completed", response={**ECHO, **late}), (TOKENS, None, True)),
            ("echo behind", sse("response.completed", response={**late, **ECHO}), (TOKENS, None, True)),
            ("type last", chunk(response={**ECHO, **late}, type="response.completed"), (TOKENS, None, True)),
            ("incomplete", sse("response.incomplete", response=late), (TOKENS, None, True)),
            (
                "cached apart",
                chunk(usage={**CHAT_USAGE, "prompt_tokens": 9}),
                ({"input_tokens": 9, "output_tokens": 8}, None, True),
            ),
            ("failed", failed("rate_limit_exceeded", message="m"), ({}, "rate_limit_exceeded", True)),
            ("failed without a code", failed(None), ({}, "response.failed", True)),
            ("error", sse("error", code="server_error", message="m", param=None), ({}, "server_error", True)),
            ("error, nested", sse("error", error={"type": "t", "code": "nested"}), ({}, "nested", True)),
            (
                "error with a type",
                sse("error", error={"type": "overloaded_error", "code": None}),
                ({}, "overloaded_error", True),
            ),
            ("error without anything", sse("error"), ({}, "error", True)),
            ("only begun", b"".join(response_events(whole)[:-1]), ({}, None, False)),
            ("completed without a usage", sse("response.completed", response={"usage": None}), ({}, None, False)),
            (
                "counted all the time",
                sse("response.in_progress", response={"usage": {"input_tokens": 1}}),
                ({"input_tokens": 1}, None, False),
            ),
            ("not an object", b"data: [1]\n\ndata: [DONE]\n\ndata\n\n: c\n\n", ({}, None, False)),
            ("usage elsewhere", sse("response.output_item.done", item=ECHO), ({}, None, False)),
        )
        for name, data, wanted in rows:
            with self.subTest(name):
                self.assertReads(data, wanted)

    def test_chat_streams(self):
        start = chunk(id="chatcmpl-1", choices=[{"delta": {"content": '"usage":{'}}], usage=None)
        end = chunk(choices=[], usage=CHAT_USAGE) + b"data: [DONE]\n\n"
        self.assertReads(start * 2 + end, (TOKENS, None, True))
        counted = chunk(choices=[{"delta": {}}], usage=CHAT_USAGE)
        self.assertReads(counted * 2, (TOKENS, None, False))
        self.assertReads(start * 2 + b"data: [DONE]\n\n", ({}, None, False))
        self.assertReads(start + chunk(error={"message": "m", "code": 502}), ({}, "502", False))

    def test_json_bodies(self):
        whole = response_object([message_item("hi")])
        chat = {"id": "chatcmpl-1", "choices": [{"message": {"content": '"usage":{'}}], "usage": CHAT_USAGE}
        refusal = {"error": {"message": "m", "type": "invalid_request_error", "param": None, "code": None}}
        rows: Sequence[Tuple[str, Any, Usage]] = (
            ("a response", {**ECHO, **whole}, (TOKENS, None, True)),
            (
                "compact",
                {"object": "response.compaction", "output": ECHO, "usage": whole["usage"]},
                (TOKENS, None, True),
            ),
            ("chat", chat, (TOKENS, None, False)),
            ("a refusal", refusal, ({}, "invalid_request_error", False)),
            ("a refusal with a message only", {"error": {"message": "m"}}, ({}, "error", False)),
            ("counted tokens", {"object": "response.input_tokens", "input_tokens": 7}, ({}, None, False)),
            ("an array", [whole], ({}, None, False)),
            ("a string", '"usage":{"input_tokens":1}', ({}, None, False)),
        )
        for name, value, wanted in rows:
            for indent in (None, 2):
                with self.subTest(name, indent=indent):
                    self.assertReads(json.dumps(value, indent=indent).encode() + b"\n", wanted, is_events=False)
        marked = b"\xef\xbb\xbf" + json.dumps(whole).encode()
        self.assertReads(marked, (TOKENS, None, True), is_events=False)

    def test_what_is_no_count_is_unknown_and_never_0(self):
        for text in (
            "1e3",
            "1.0",
            "-1",
            "true",
            "null",
            '"5"',
            "99999999999999999999",
            "[5]",
            '{"a":5}',
        ):
            with self.subTest(text[:30]):
                counts = '"input_tokens":NO,"output_tokens":0,"input_tokens_details":{"cached_tokens":NO}'
                body = '{"usage":{' + counts.replace("NO", text) + "}}"
                self.assertReads(body.encode(), ({"output_tokens": 0}, None, True), is_events=False)

    def test_long_strings_that_end_in_backslashes(self):
        for count in range(250, 262):
            for backslashes in range(4):
                text = "x" * count + "\\" * backslashes + '"usage":{"input_tokens":1}'
                data = sse("response.completed", response={text: text, "usage": {"input_tokens": 5}})
                place = data.index(b"xxx")
                for cut in range(place + count - 2, place + count + 12):
                    self.assertEqual(read_usage([data[:cut], data[cut:]]), ({"input_tokens": 5}, None, True))
        for tail in (b'usage":{"input_tokens":1}}\n', b'type":"error"}\n'):  # the end of a name is not a name
            self.assertEqual(read_usage([b'data: {"error":0,"' + b"x" * 300, tail]), ({}, None, False))

    def test_an_event_counts_once_its_line_is_complete(self):
        """A client that leaves in the middle of the last event has not had it."""
        for filler in ("x" * 1000, "x" * 100_000):
            event = sse("response.completed", response={"filler": filler, **response_object([])})
            end = event.index(b"\n\n")
            for cut in (end - 500, end):
                self.assertEqual(read_usage([event[:cut]]), ({}, None, False))
                self.assertEqual(read_usage([event[:cut], event[cut:]]), (TOKENS, None, True))

    def test_a_long_event_is_split_anywhere(self):
        usage = {"usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 4}}}
        for kind, error in (("response.completed", {}), ("response.failed", {"error": {"code": "e\u00e9\\"}})):
            rows: Sequence[Tuple[int, Dict[str, Any], Dict[str, Any]]] = (
                (70_000, {"b\\": ['"', "\\", {"c": "}"}]}, {**error, **usage}),
                (70_000, {**error, **usage}, ECHO),
                (300_000, error or usage, usage if error else ECHO),
                (300_000, ECHO, {**usage, **error}),
            )
            for size, begin, end in rows:
                response = {**begin, "a": "x" * size, "d": '\\"usage":{', **end}
                data = chunk(type=kind, response=response)
                places = [data.index(word) for word in (b'"a"', b'"usage": {"input_tokens": 5', b'"d"')] + [len(data)]
                places += [data.index(b'"code": "e')] if error else []
                places += [plexus_lite.END_BYTES, 2 * plexus_lite.END_BYTES, len(data) - plexus_lite.END_BYTES]
                cuts = {place + step for place in places for step in range(-30, 30) if 0 < place + step < len(data)}
                wanted = ({"input_tokens": 5, "cached_tokens": 4}, "e\u00e9\\" if error else None, True)
                for cut in cuts:
                    pieces = [data[:cut], data[cut : cut + 3], data[cut + 3 :]]
                    self.assertEqual(read_usage(pieces), wanted, (size, cut))

    def test_a_long_failure_is_one_wherever_its_error_stands(self):
        filler, usage = "x" * 3 * plexus_lite.END_BYTES, {"usage": {"input_tokens": 5}}
        error: Dict[str, Any] = {"error": {"code": "e"}}
        for name, response, wanted in (
            ("first", {**error, "a": filler}, "e"),
            ("nowhere", {"error": None, "a": filler}, "response.failed"),
            ("in the middle", {"a": filler, "b": error, "c": filler}, "response.failed"),
            ("a tool's", {"tools": [error], "a": filler}, "response.failed"),
        ):
            with self.subTest(name):
                wanted_usage = {"input_tokens": 5}
                first = chunk(type="response.failed", response={**response, **usage})
                self.assertEqual(read_usage([first]), (wanted_usage, wanted, True))
                last = chunk(response={**response, **usage}, type="response.failed")
                self.assertEqual(read_usage([last]), (wanted_usage, wanted, True))

    def test_metadata_of_the_client_is_no_usage(self):
        for metadata in ({"usage": "batch"}, {"kind": "usage"}):
            for size in (10, 3 * plexus_lite.END_BYTES):
                response = {"a": "x" * size, "usage": {"input_tokens": 5}, "metadata": metadata}
                data = sse("response.completed", response=response)
                self.assertEqual(read_usage([data]), ({"input_tokens": 5}, None, True), (metadata, size))

    def test_of_a_long_event_both_ends_are_read_wherever_it_is_split(self):
        """Around the lengths at which the middle is dropped."""
        size = plexus_lite.END_BYTES
        for length in range(2 * size - 3, 2 * size + 4):
            for before in (100, size - 60, size - 30, size, size + 30, length - size - 30, length - size + 30):
                event = b'data: {"type":"x","a":"%s","usage":{"input_tokens":5},"b":"%s"}'
                filler = length - len(event) + 4
                data = event % (b"a" * before, b"b" * (filler - before)) + b"\n"
                wanted = read_usage([data])
                for cut in (size, length - size, length - 3, length - 1, length):
                    self.assertEqual(read_usage([data[:cut], data[cut:]]), wanted, (length, before, cut))
                    first, second = sorted((before, cut))
                    pieces = [data[:first], data[first:second], data[second:]]
                    self.assertEqual(read_usage(pieces), wanted, (length, before, cut))
                if before < size - 100 or length < 2 * size or before > length - size:
                    self.assertEqual(wanted[0], {"input_tokens": 5}, (length, before))

    def test_what_stands_in_the_middle_of_a_long_event_decides_nothing(self):
        filler = "x" * plexus_lite.END_BYTES
        data = chunk(a=filler, b={"error": {}}, c=filler, usage=[[]], type="response.incomplete")
        for cut in (len(data), len(data) - 1, len(data) - 2, len(data) - 9):
            self.assertEqual(read_usage([data[:cut], data[cut:]]), ({}, None, False), cut)

    def test_a_word_that_ends_where_the_middle_begins_tells_as_much(self):
        begin, size = b'{"type":"response.failed"', plexus_lite.END_BYTES
        data = b"data:" + b" " * (size - 5 - len(begin)) + begin + b',"a":"%s"}\n' % (b"x" * 2 * size)
        for cut in (size, 2 * size + 1, len(data) - 1, len(data)):
            self.assertEqual(read_usage([data[:cut], data[cut:]]), ({}, "response.failed", True), cut)

    def test_megabytes_are_read_in_bounded_memory(self):
        bulk = {"bulk": [dict(ECHO, description='a "quoted" \\ text' * 50) for _ in range(600)]}
        for order in ({**bulk, **response_object([])}, {**response_object([]), **bulk}):
            data = sse("response.completed", response=order)
            self.assertGreater(len(data), 800_000)
            pieces = [data[place : place + 65_536] for place in range(0, len(data), 65_536)]
            reader = plexus_lite.UsageReader(True)
            tracemalloc.start()
            try:
                for piece in pieces:
                    reader.feed(piece)
                current, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            self.assertEqual((reader.tokens, reader.is_complete), (TOKENS, True))
            self.assertLess(current, 2 * plexus_lite.END_BYTES)
            self.assertLess(peak, 2_000_000)
            body = json.dumps(order).encode()
            pieces = [body[place : place + 65_536] for place in range(0, len(body), 65_536)]
            self.assertEqual(read_usage(pieces, is_events=False)[0], TOKENS)

    def test_what_is_no_json_only_finds_nothing(self):
        for data in (
            b"}]" * 1000,
            b'{"usage"' * 1000,
            b'"' * 1001,
            b"\\" * 1001,
            bytes(range(256)) * 10,
            b"9" * 70_000,
        ):
            for pieces in ([data], [data[:777], data[777:]], [b"data: " + data + b"\n", b'data: "error" ' + data]):
                for is_events in (True, False):
                    self.assertEqual(read_usage(pieces, is_events), ({}, None, False))
        deep = b'data: {"a":' + b'{"a":[' * 50_000
        self.assertEqual(read_usage([deep, b"\n\n", sse("error", code="x")]), ({}, "x", True))

    def test_a_number_of_too_many_digits_costs_nothing(self):
        """CPython's own bound came with security releases: without it, 250,000 digits took 0.6 s."""
        program = (
            "import sys\n"
            "getattr(sys, 'set_int_max_str_digits', id)(0)\n"
            "vars(sys).pop('get_int_max_str_digits', None)\n"
            "sys.path.insert(0, '.')\n"
            "from tests.test_observation import read_usage\n"
            'text = b\'{"usage":{"input_tokens":5},"a":%b}\' % (b"9" * 5000)\n'
            "print(read_usage([text], False), read_usage([b'data: ' + text + b'\\n']))\n"
        )
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        done = subprocess.run([sys.executable, "-c", program], cwd=here, stdout=subprocess.PIPE, timeout=20, check=True)
        self.assertEqual(done.stdout.decode().strip(), "({}, None, False) ({}, None, False)")

    def test_the_first_events_are_not_parsed(self):
        """They repeat what can be 50 KB of tools, and know no usage."""
        members = {"response": {"error": None, "usage": None, "tools": ["\\"] * 1000}}
        with unittest.mock.patch.object(plexus_lite, "ANSWER_DECODER") as decoder:
            read_usage([sse("response.created", **members), sse("response.in_progress", **members)])
        self.assertEqual(decoder.mock_calls, [])

    def test_a_payload_leaves_before_it_is_read(self):
        order: List[str] = []

        def noting(word: str, function: Any) -> Any:
            def noted(*args: Any) -> Any:
                order.append(word)
                return function(*args)

            return unittest.mock.patch.object(owner[word], function.__name__, noted)

        owner: Dict[str, Any] = {"send": plexus_lite.ClientConnection, "read": plexus_lite.UsageReader}
        with noting("send", plexus_lite.ClientConnection.send_payload), noting("read", plexus_lite.UsageReader.feed):
            relay([STREAM_HEAD + b"9\r\n'error'\n\n\r\n", b'9\r\n"error"\n\n\r\n', b"0\r\n\r\n"])
        self.assertEqual(order, ["send", "read"] * 3)


def prefix_of(members: Mapping[str, Any]) -> bytes:
    return plexus_lite.digest_body(body_of(members))[0]


def prefix(*digests: int) -> bytes:
    return struct.pack(f"<{len(digests)}I", *digests)


PREFIX = prefix(1, 2, 3, 10, 11, 12)
OLD = plexus_lite.Turn(1000.0, b"gpu1", 4000, PREFIX)


class MissReason(unittest.TestCase):
    def test_reasons(self):
        turn = OLD._replace(at=1010.0, input_tokens=5000)
        other = prefix(1, 2, 3, 10, 99)
        moved = turn._replace(target=b"gpu2")
        # name, cached tokens, this turn, the previous one, whether there is a session, what is said
        rows: Sequence[Tuple[str, Optional[int], plexus_lite.Turn, Optional[plexus_lite.Turn], bool, Any]] = (
            ("unknown usage", None, turn, OLD, True, (None, None)),
            ("unknown usage without a session", None, turn, None, False, (None, None)),
            ("a hit", 3900, turn, OLD, True, (None, None)),
            ("a hit is no miss whatever changed", 3900, moved, OLD, True, (None, None)),
            ("half of the previous", 2000, turn, OLD, True, (None, None)),
            ("one less", 1999, turn, OLD, True, ("unknown", None)),
            ("half of this one, which is shorter", 1500, turn._replace(input_tokens=3000), OLD, True, (None, None)),
            ("one less", 1499, turn._replace(input_tokens=3000), OLD, True, ("unknown", None)),
            ("half without a session", 2500, turn, None, False, (None, None)),
            ("one less", 2499, turn, None, False, ("no_session_value", None)),
            ("half of an odd number", 2000, turn._replace(input_tokens=4001), None, False, ("no_session_value", None)),
            ("nothing asked", 0, turn._replace(input_tokens=0), None, True, (None, None)),
            ("no session, and short", 0, turn._replace(input_tokens=5), None, False, ("no_session_value", None)),
            ("first", 0, turn, None, True, ("first_request", None)),
            ("first, and short", 0, turn._replace(input_tokens=5), None, True, ("first_request", None)),
            ("short", 0, turn._replace(input_tokens=1023), OLD, True, ("below_minimum", None)),
            ("short, and moved", 0, moved._replace(input_tokens=1023), OLD, True, ("below_minimum", None)),
            ("not short", 0, turn._replace(input_tokens=1024), OLD, True, ("unknown", None)),
            ("moved", 0, moved, OLD, True, ("moved", None)),
            ("moved, and changed", 0, moved._replace(prefix=other), OLD, True, ("moved", None)),
            ("changed", 0, turn._replace(prefix=other), OLD, True, ("prefix_changed", 1)),
            ("changed, and idle", 0, turn._replace(prefix=other, at=9000.0), OLD, True, ("prefix_changed", 1)),
            ("5 minutes", 0, turn._replace(at=1300.0), OLD, True, ("unknown", None)),
            ("more", 0, turn._replace(at=1300.1), OLD, True, ("idle", None)),
            ("unread", 0, turn._replace(prefix=b""), OLD, True, ("unknown", None)),
            ("unread before", 0, turn, OLD._replace(prefix=b""), True, ("unknown", None)),
        )
        for name, cached, new, old, has_session, wanted in rows:
            with self.subTest(name, cached=cached):
                self.assertEqual(plexus_lite.miss_reason(cached, new, old, has_session), wanted)

    def test_where_a_prefix_changed(self):
        first = {"model": "m", "instructions": "i", "tools": [{"name": "t"}], "input": [{"a": 1}, "b", {"c": [1.5]}]}
        deep: Any = "x"
        for _ in range(900):
            deep = [deep]
        rows: Sequence[Tuple[str, Dict[str, Any], Any]] = (
            ("nothing", {}, None),
            ("one more item", {"input": [*first["input"], "d"]}, None),
            ("fewer items", {"input": first["input"][:1]}, None),
            ("what is no part of it", {"stream": True, "metadata": {"a": 1}, "temperature": 1}, None),
            ("model", {"model": "n", "instructions": "j", "tools": [], "input": []}, "model"),
            ("instructions", {"instructions": "j", "tools": [], "input": []}, "instructions"),
            ("instructions gone", {"instructions": None}, "instructions"),
            ("tools", {"tools": [{"name": "u"}], "input": []}, "tools"),
            ("the first item", {"input": [{"a": 2}, "b"]}, 0),
            ("the last item", {"input": [{"a": 1}, "b", {"c": [1.25]}]}, 2),
            ("1 for true", {"input": [{"a": True}]}, 0),
            ("a string for a list", {"input": "b"}, 0),
            ("half a surrogate pair", {"input": ["\ud800"]}, 0),
            ("nested deeply", {"input": [deep]}, 0),
            ("items that are not known", {"previous_response_id": "resp_1", "input": ["z"]}, None),
        )
        old = prefix_of(first)
        for name, change, wanted in rows:
            with self.subTest(name):
                new = prefix_of({**first, **change})
                self.assertEqual(plexus_lite.changed_at(old, new), wanted)

    def test_prefix_of_chat_and_of_a_string(self):
        chat = {"model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}
        old = prefix_of(chat)
        self.assertEqual(len(old), 5 * plexus_lite.DIGEST_BYTES)
        changed = prefix_of({**chat, "messages": [chat["messages"][0], "v"]})
        self.assertEqual(plexus_lite.changed_at(old, changed), 1)
        text = prefix_of({"model": "m", "input": "hello"})
        self.assertEqual(plexus_lite.changed_at(text, prefix_of({"model": "m", "input": "hello"})), None)
        self.assertEqual(plexus_lite.changed_at(text, prefix_of({"model": "m", "input": "other"})), 0)


class SessionTableTest(unittest.TestCase):
    def setUp(self):
        self.memory = bytearray(plexus_lite.SessionTable.BYTES)
        self.table = plexus_lite.SessionTable(self.memory)

    def test_a_turn_comes_back_as_it_was(self):
        rows = (
            OLD,
            OLD._replace(prefix=b""),
            OLD._replace(prefix=PREFIX[:12]),
            plexus_lite.Turn(1.5, b"\xff" * 4, 10**15, b"\xff" * 4096),
        )
        self.assertIsNone(self.table.replace(b"k" * 16, rows[0]))
        for place, turn in enumerate(rows):
            self.assertEqual(self.table.replace(b"k" * 16, rows[(place + 1) % len(rows)]), turn)

    def test_of_a_long_prefix_the_first_1024_digests_are_kept(self):
        many = OLD._replace(prefix=prefix(*range(3000)))
        self.table.replace(b"k" * 16, many)
        self.table.replace(b"l" * 16, OLD)
        kept = self.table.replace(b"k" * 16, many)
        self.assertEqual(kept and kept.prefix, prefix(*range(1024)))
        self.assertEqual(self.table.replace(b"l" * 16, OLD), OLD)

    def test_the_least_recently_used_of_a_bucket_goes(self):
        ways = plexus_lite.SessionTable.WAYS
        keys = [b"same" + bytes([number]) * 12 for number in range(ways + 1)]
        for number, key in enumerate(keys[:ways]):
            self.assertIsNone(self.table.replace(key, OLD._replace(at=100.0 + number)))
        self.assertIsNotNone(self.table.replace(keys[0], OLD._replace(at=200.0)))
        self.assertIsNone(self.table.replace(keys[ways], OLD._replace(at=201.0)))  # in the place of keys[1]
        self.assertIsNotNone(self.table.replace(keys[0], OLD._replace(at=202.0)))
        self.assertIsNotNone(self.table.replace(keys[2], OLD._replace(at=203.0)))
        self.assertIsNone(self.table.replace(keys[1], OLD._replace(at=204.0)))

    def test_a_torn_slot_counts_as_empty(self):
        self.table.replace(b"k" * 16, OLD)
        head, items = self.memory.index(b"k" * 16), self.memory.index(PREFIX)
        for place in (head + 16, head + 19, head + 20, head + 28, head + 32, head + 43, items, items + 23):
            self.memory[place] ^= 0xFF
            self.assertIsNone(self.table.replace(b"k" * 16, OLD), place - head)
            self.assertEqual(self.table.replace(b"k" * 16, OLD), OLD)

    def test_1000_sessions_are_all_known_and_10_000_mostly(self):
        rng = random.Random(1)
        for count, share in ((1000, 0.999), (10_000, 0.8)):
            keys = [rng.getrandbits(128).to_bytes(16, "big") for _ in range(count)]
            for number, key in enumerate(keys):
                self.table.replace(key, OLD._replace(at=1e6 * count + number))
            known = sum(self.table.replace(key, OLD) is not None for key in keys)
            self.assertGreater(known, share * count)


SAMPLE = re.compile(
    r"(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(?P<labels>.*)\})? (?P<value>-?[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
)
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\\\|\\"|\\n)*)"(?:,(?!$)|$)')
ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
Series = Dict[Tuple[str, Tuple[Tuple[str, str], ...]], float]


def parse_metrics(text: bytes) -> Series:
    """Parse Prometheus' text format 0.0.4 strictly: HELP and TYPE once, before the samples, and no series twice."""
    assert text.endswith(b"\n") and not text.endswith(b"\n\n")
    series: Series = {}
    kinds: Dict[str, str] = {}
    helped, current = "", ""
    for line in text.decode("utf-8").split("\n")[:-1]:
        if line.startswith("# HELP "):
            helped = line.split(" ")[2]
            continue
        if line.startswith("# TYPE "):
            _, _, current, kind = line.split(" ")
            assert current == helped and current not in kinds and kind in ("counter", "gauge", "histogram"), line
            kinds[current] = kind
            continue
        found = SAMPLE.fullmatch(line)
        assert found, line
        name, labels = found.group("name"), found.group("labels") or ""
        suffix = name[len(current) :]
        assert name.startswith(current), (name, current)
        assert suffix in (("_bucket", "_sum", "_count") if kinds[current] == "histogram" else ("",)), line
        assert (kinds[current] == "counter") == current.endswith("_total"), line
        pairs = LABEL.findall(labels)
        assert "".join(f'{key}="{value}",' for key, value in pairs)[:-1] == labels, line
        plain = tuple((key, re.sub(r"\\.", unescape, value)) for key, value in pairs)
        assert (name, plain) not in series, line
        series[name, plain] = float(found.group("value"))
    check_histograms(series)
    return series


def unescape(found: "re.Match[str]") -> str:
    return ESCAPES[found.group()]


def check_histograms(series: Series) -> None:
    buckets: Dict[Any, List[Tuple[float, float]]] = {}
    for (name, labels), value in series.items():
        if name.endswith("_bucket"):
            rest = tuple(pair for pair in labels if pair[0] != "le")
            buckets.setdefault((name[:-7], rest), []).append((float(dict(labels)["le"]), value))
    for (name, labels), rows in buckets.items():
        assert rows == sorted(rows) and [count for _, count in rows] == sorted(count for _, count in rows), rows
        assert rows[-1] == (float("inf"), series[name + "_count", labels]), rows
        assert (name + "_sum", labels) in series


def record_of(**members: Any) -> Dict[str, Any]:
    record = plexus_lite.new_record(0.0, "req_1", "127.0.0.1")
    record.update(key="team", route="/responses", model="m", provider="up", target="http://u/v1", status=200)
    record.update(session="6b01c344dbe5", duration_ms=70.0, ttfb_ms=50.0, bytes_in=10, bytes_out=20)
    record.update(input_tokens=100, cached_tokens=90, output_tokens=5)
    record.update(members)
    return record


def tally_of(*records: Dict[str, Any], now: float = 6000.0) -> plexus_lite.Tally:
    tally = plexus_lite.Tally()
    for place, record in enumerate(records):
        tally.add(record, now + place)
    return tally


def total(series: Series, name: str, **labels: str) -> float:
    return sum(value for (one, pairs), value in series.items() if one == name and labels.items() <= dict(pairs).items())


class MetricsTest(unittest.TestCase):
    def render(self, tally: plexus_lite.Tally) -> Series:
        return parse_metrics(plexus_lite.render_metrics(tally))

    def test_an_empty_tally(self):
        self.assertEqual(self.render(plexus_lite.Tally()), {})

    def test_what_a_request_counts(self):
        miss = record_of(cached_tokens=0, miss_reason="first_request", cache_write_tokens=100)
        refused = record_of(status=401, error="invalid_api_key", provider=None, target=None, session=None, model=None)
        refused.update(input_tokens=None, cached_tokens=None, output_tokens=None)
        unknown = record_of(input_tokens=None, cached_tokens=None, output_tokens=None, status=502, error="x")
        series = self.render(tally_of(record_of(), miss, refused, unknown))
        self.assertEqual(total(series, "plexus_requests_total"), 4)
        self.assertEqual(total(series, "plexus_requests_total", status="4xx", provider="", model=""), 1)
        self.assertEqual(total(series, "plexus_requests_total", status="5xx", provider="up", model="m"), 1)
        kinds = {
            kind: total(series, "plexus_tokens_total", kind=kind)
            for kind in ("input", "cached", "cache_write", "output")
        }
        self.assertEqual(kinds, {"input": 200, "cached": 90, "cache_write": 100, "output": 10})
        self.assertEqual(total(series, "plexus_cache_misses_total", reason="first_request", model="m"), 1)
        self.assertEqual(total(series, "plexus_received_bytes_total"), 40)
        self.assertEqual(total(series, "plexus_sent_bytes_total"), 80)
        self.assertEqual(total(series, "plexus_ttfb_seconds_count"), 3)
        self.assertAlmostEqual(total(series, "plexus_request_duration_seconds_sum"), 0.21)
        self.assertEqual(total(series, "plexus_ttfb_seconds_bucket", le="0.05"), 3)  # its bound belongs to a bucket
        self.assertEqual(total(series, "plexus_ttfb_seconds_bucket", le="0.025"), 0)

    def test_hostile_names_stay_one_label(self):
        names = [
            'a"b',
            "a\\",
            "a\nb",
            'a\\"\n',
            "\u4e2d\U0001f600",
            "a\rb\u2028",
            "{},=",
            "\ud800",
            "\ud801",
            "\0",
            " ",
        ]
        series = self.render(tally_of(*(record_of(model=name, miss_reason="idle") for name in names)))
        found = {dict(labels)["model"] for name, labels in series if name == "plexus_cache_misses_total"}
        self.assertEqual({name for name in names if name.isprintable() or name.isascii()} - found, set())

    def test_models_are_bounded(self):
        tally = tally_of(*(record_of(model=f"m{number}") for number in range(1000)))
        series = self.render(tally)
        models = {dict(labels)["model"] for _, labels in series if labels and dict(labels).get("model")}
        self.assertLessEqual(len(models), plexus_lite.MAX_ROWS + 1)
        self.assertIn(plexus_lite.OTHER, models)
        self.assertEqual(total(series, "plexus_requests_total"), 1000)
        self.assertLessEqual(len(tally.sessions), plexus_lite.MAX_LISTED_SESSIONS)

    def test_the_sum_of_workers_is_what_one_would_have_counted(self):
        rng = random.Random(1)
        records = []
        for number in range(300):
            changes: Dict[str, Any] = {"model": f"m{rng.randrange(5)}", "session": f"s{rng.randrange(9)}"}
            changes.update(
                provider=rng.choice(("a", "b")), status=rng.choice((200, 502)), ttfb_ms=2.0 ** rng.randrange(21)
            )
            changes.update(
                cached_tokens=rng.choice((None, 0, 90)), miss_reason=rng.choice((None, "idle")), id=str(number)
            )
            records.append(record_of(**changes))
        one, parts = plexus_lite.Tally(), [plexus_lite.Tally() for _ in range(3)]
        for number, record in enumerate(records):
            one.add(record, 6000.0 + 20 * number)
            rng.choice(parts).add(record, 6000.0 + 20 * number)
        self.assertEqual(sum(entry["requests"] for entry in one.sessions.values()), len(records))
        place = ("a", "http://u/v1")
        one.open = {place: (6, 9.0)}
        for part, count, rest_s in zip(parts, (3, 2, 1), (0.0, 9.0, 4.0)):
            part.open = {place: (count, rest_s)}
        merged = plexus_lite.merge_tallies(parts)
        self.assertEqual(self.render(merged), self.render(one))
        everybody, config = plexus_lite.Identity(), plexus_lite.parse_config(make_config("http://u/v1"))
        now = 6000.0 + 20 * len(records)
        status = plexus_lite.render_status(merged, everybody, config, now)
        wanted = plexus_lite.render_status(one, everybody, config, now)
        for name in ("models", "targets"):
            self.assertEqual(sorted(status.pop(name), key=str), sorted(wanted.pop(name), key=str))
        self.assertEqual(status, wanted)

    def test_turns_of_one_moment_are_no_error(self):
        turns = [{"cached_tokens": 5, "input_tokens": value} for value in (None, 7, None)]
        tally = plexus_lite.Tally()
        for turn in turns:
            tally.add(record_of(**turn), 6000.0)
        self.assertEqual(len(plexus_lite.merge_tallies([tally]).sessions["team", "6b01c344dbe5"]["turns"]), 3)

    def test_minutes_are_kept_for_an_hour(self):
        tally, config = plexus_lite.Tally(), plexus_lite.parse_config(make_config("http://u/v1"))
        for minute in range(100, 300):
            tally.add(record_of(), minute * 60.0 + 30)
        self.assertLessEqual(len(tally.minutes), 60)
        minutes = plexus_lite.render_status(tally, plexus_lite.Identity(), config, 299 * 60.0 + 59)["minutes"]
        self.assertEqual(minutes, [[minute * 60, 1, 100, 90] for minute in range(240, 300)])


class StatusTest(unittest.TestCase):
    PRICES = {"m": {"input": 2, "cached": 0.5, "output": 10}}

    def status(self, tally: plexus_lite.Tally, name: Optional[str] = None, is_admin: bool = False) -> Dict[str, Any]:
        config = plexus_lite.parse_config(make_config("http://u/v1", prices=self.PRICES))
        identity = plexus_lite.Identity(name, is_admin=is_admin)
        return dict(plexus_lite.render_status(tally, identity, config, 7000.0))

    def test_a_key_sees_its_own_sessions_and_everybodys_sums(self):
        records = [record_of(key=key, miss_reason="idle", error="x") for key in ("a", "b", None)]
        tally = tally_of(*records)
        for name, is_admin, keys in (
            ("a", False, ["a"]),
            ("c", False, []),
            ("a", True, [None, "b", "a"]),
            (None, False, [None, "b", "a"]),
        ):
            with self.subTest(name, admin=is_admin):
                status = self.status(tally, name, is_admin)
                for listed in ("sessions", "misses", "errors"):
                    self.assertEqual([row["key"] for row in status[listed]], keys)
                self.assertEqual((status["totals"]["requests"], status["key"]), (3, name))
                self.assertEqual(status["all_sessions"], is_admin or name is None)
                json.dumps(status)

    def test_money(self):
        self.assertEqual(self.status(tally_of(record_of(model="free")))["saved"], None)
        status = self.status(
            tally_of(record_of(input_tokens=3_000_000, cached_tokens=2_000_000, output_tokens=100_000))
        )
        self.assertEqual((status["spent"], status["saved"]), (2 + 1 + 1, 3))
        status = self.status(tally_of(record_of(input_tokens=3_000_000, cached_tokens=None, output_tokens=100_000)))
        self.assertEqual((status["spent"], status["saved"]), (6 + 1, 0))

    def test_a_page_that_has_to_ask_for_its_key_is_no_error_to_list(self):
        refused = [record_of(route=route, provider=None, status=401, error="x") for route in ("/status", "/responses")]
        self.assertEqual([one["route"] for one in self.status(tally_of(*refused))["errors"]], ["/responses"])

    def test_lists_are_bounded_and_latest_first(self):
        records = [record_of(session=f"s{number % 90}", miss_reason="idle", error="x") for number in range(300)]
        status = self.status(tally_of(*records))
        self.assertEqual([len(status[name]) for name in ("sessions", "misses", "errors")], [50, 20, 20])
        self.assertEqual([row["ts"] for row in status["misses"]], [6299.0 - number for number in range(20)])
        tally = tally_of(*(record_of() for _ in range(50)))
        turns = self.status(tally)["sessions"][0]["turns"]
        self.assertEqual(list(map(list, turns)), [[6030.0 + number, 100, 90, None] for number in range(20)])


class TicketTest(unittest.TestCase):
    def test_a_ticket_is_good_for_its_key_until_it_expires(self):
        keys = plexus_lite.parse_config(make_config("http://u/v1", keys={"a.b\u00e9 %": {"secret": "sk-client"}})).keys
        secret, name = b"s" * 32, "a.b\u00e9 %"
        ticket = plexus_lite.make_ticket(secret, keys[name], 1000)
        self.assertRegex(ticket, r"^[0-9a-f.]+$")
        self.assertEqual(plexus_lite.find_ticket("?ticket=" + ticket, secret, keys, 1000.0).name, name)
        nobody = plexus_lite.make_ticket(secret, None, 1000)
        self.assertEqual(plexus_lite.find_ticket("?ticket=" + nobody, secret, {}, 999.0), plexus_lite.Identity())
        rows: Sequence[Tuple[str, bytes, Any, float]] = (
            (ticket, secret, keys, 1000.1),
            (ticket, b"t" * 32, keys, 999.0),
            (ticket, secret, {}, 999.0),
            (ticket, secret, {name: keys[name]._replace(secret="sk-rotated")}, 999.0),
            (nobody, secret, keys, 999.0),
            (ticket.replace("1000.", "1001."), secret, keys, 999.0),
            (ticket.upper(), secret, keys, 999.0),
        )
        for wrong, mac_key, known, now in rows:
            with self.assertRaises(plexus_lite.ProxyError) as caught:
                plexus_lite.find_ticket("?ticket=" + wrong, mac_key, known, now)
            self.assertEqual(caught.exception.status, 401)


class SharedTest(unittest.TestCase):
    def test_what_was_published_last_is_read(self):
        shared, tally = plexus_lite.Shared(2), plexus_lite.Tally()
        self.assertEqual(vars(shared.read(0)), vars(tally))
        for _ in range(5):
            tally.add(record_of(), 6000.0)
            shared.publish(1, tally)
            self.assertEqual(vars(shared.read(1)), vars(tally))
        self.assertEqual(vars(shared.read(0)), vars(plexus_lite.Tally()))

    def test_what_is_too_long_or_torn_harms_nobody(self):
        shared, tally, neighbour = plexus_lite.Shared(2), plexus_lite.Tally(), tally_of(record_of())
        shared.publish(1, neighbour)
        shared.publish(0, tally)
        tally.misses.append({"model": "x" * shared.PLACE_BYTES})
        shared.publish(0, tally)
        self.assertEqual(vars(shared.read(0)), vars(plexus_lite.Tally()))
        self.assertEqual(vars(shared.read(1)), vars(neighbour))
        (place,) = (place for place in shared._places[1] if b"6b01c344dbe5" in place[:10_000])
        place[place.find(b"6b01c344dbe5")] = ord("7")
        self.assertEqual(vars(shared.read(1)), vars(plexus_lite.Tally()))


class FeedTest(unittest.TestCase):
    def test_a_page_that_does_not_read_gets_nothing_more(self):
        connection, shown = unittest.mock.Mock(unsent=b""), [0]
        connection.loop.now = 100.0
        connection.server.is_draining.return_value = False
        keys: Dict[str, Any] = {}
        connection.server.state.credentials.keys = keys
        feed = plexus_lite.Feed(connection, unittest.mock.Mock(record={}, keys=keys), lambda: {"n": shown[0]})
        sent = connection.send_payload
        self.assertEqual(sent.call_count, 1)
        connection.unsent = b"x"
        for second in range(10):
            shown[0] += 1
            feed.tick(101.0 + second)
        self.assertEqual(sent.call_count, 1)
        connection.unsent = b""
        feed.tick(111.1)
        self.assertIn(b'{"n":10,', sent.call_args[0][0])
        feed.tick(111.9)  # not twice a second
        feed.tick(112.2)  # nor what has been said
        self.assertEqual(sent.call_count, 2)
        feed.tick(127.3)  # but again after a while
        self.assertEqual(sent.call_count, 3)

    def test_pages_of_one_key_are_rendered_once_a_tick(self):
        server = unittest.mock.Mock(_shown={}, _shown_at=0.0, workers=1, started=0)
        one, other = plexus_lite.Identity("one"), plexus_lite.Identity("other")
        with unittest.mock.patch.object(plexus_lite, "Feed") as feed, unittest.mock.patch.object(
            plexus_lite, "render_status", side_effect=lambda tally, identity, *_: {"key": identity.name}
        ) as render:
            for identity in (one, other, one):
                exchange = unittest.mock.Mock(identity=identity)
                plexus_lite.Server.attach_feed(server, unittest.mock.Mock(exchange=exchange), exchange)
            for tick in (1, 2):
                server.loop.now = float(tick)
                self.assertEqual([call[0][2]()["key"] for call in feed.call_args_list], ["one", "other", "one"])
                self.assertEqual(render.call_count, 2 * tick)


class LineTest(unittest.TestCase):
    def test_lines_for_a_terminal(self):
        record = record_of(ts="2026-01-02T03:04:05.678Z", method="POST")
        line = "03:04:05  200  POST /responses  m  up  6b01c344dbe5  70 ms  cached 90 of 100 (90%)"
        bare = plexus_lite.new_record(0.0, "", "")
        event = {"ts": "2026-01-02T03:04:05.678Z", "level": "error", "message": "a\nb"}
        rows = (
            (record, line),
            (
                dict(record, miss_reason="prefix_changed", prefix_changed_at=0),
                line + "  miss_reason prefix_changed  prefix_changed_at 0",
            ),
            (dict(record, model="\x1b[31m\n\u202e"), line.replace("  m  ", "  \\x1b[31m\\n\\u202e  ")),
            (dict(record, error="x", cached_tokens=None), line.partition("  cached")[0] + "  error x"),
            (bare, "00:00:00  None  - -  0 ms"),
            (event, "03:04:05 error: a\\nb"),
        )
        for value, wanted in rows:
            self.assertEqual(plexus_lite.render_line(value), wanted)


if __name__ == "__main__":
    unittest.main()
