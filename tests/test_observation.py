"""Room 7: what the log says of a request, the usage read on the way, why a turn missed, and what is counted."""

import calendar
import json
import random
import time
import tracemalloc
import unittest
import unittest.mock
from typing import Any, Dict, List, Optional, Sequence, Tuple

import plexus_lite
from tests.support import message_item, response_events, response_object, sse
from tests.test_fuzz import STREAM_HEAD, relay

# The members of a record, in the contract's order.
MEMBERS = ["ts", "id", "key", "label", "client", "method", "route", "model", "upstream_model", "provider", "target"]
MEMBERS += ["status", "error", "attempts", "stream", "ttfb_ms", "duration_ms", "bytes_in", "bytes_out", "session"]
MEMBERS += ["session_source", "placement", "input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens"]
MEMBERS += ["miss_reason", "prefix_changed_at"]
SEARCHED_BYTES = 16 * 1024


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


def search(pieces: Sequence[bytes]) -> Tuple[Optional[str], List[bool]]:
    """Feed *pieces*; return what was found and what each feed said."""
    ids = plexus_lite.ResponseIds()
    said = [ids.feed(piece) for piece in pieces]
    return ids.found, said


class ResponseIdsTest(unittest.TestCase):
    def test_it_is_found_however_the_answer_is_split(self):
        response = response_object([], response_id="resp_Ab-9_z")
        quoted = json.dumps({"id": "resp_forged"})
        rows: Sequence[Tuple[str, bytes, Optional[str]]] = (
            ("an event stream", b"".join(response_events(response))[:400], "resp_Ab-9_z"),
            ("JSON", json.dumps(response).encode()[:300], "resp_Ab-9_z"),
            ("without spaces", b'{"object":"response","id":"resp_1"}', "resp_1"),
            ("with many", b'{\n  "id" :\r\n\t"resp_1"\n}', "resp_1"),
            ("behind a previous one", b'{"previous_response_id":"resp_0","id":"resp_1"}', "resp_1"),
            ("behind another id", b'{"output":[{"id":"msg_1"}],"id":"resp_1"}', "resp_1"),
            ("behind text that looks like one", b'{"a":%s,"id":"resp_1"}' % json.dumps(quoted).encode(), "resp_1"),
            ("no response", b'{"id":"chatcmpl-1"}', None),
            ("not closed", b'{"id":"resp_1', None),
            ("other characters", b'{"id":"resp_1\\u0000"}', None),
            ("much too long", b'{"id":"resp_%s"}' % (b"x" * 300), None),
            ("nothing", b"", None),
        )
        for name, answer, wanted in rows:
            one_by_one = [answer[place : place + 1] for place in range(len(answer))]
            splits = [[answer], one_by_one, *([answer[:place], answer[place:]] for place in range(len(answer)))]
            for pieces in splits:
                with self.subTest(name, pieces=len(pieces)):
                    found, said = search([*pieces, b'{"id":"resp_later"}'] if wanted else pieces)
                    self.assertEqual(found, wanted)
                    self.assertEqual(said.count(True), 1 if wanted else 0)

    def test_it_is_looked_for_in_the_first_16_kib_whatever_the_reads(self):
        member = b'"id":"resp_1"'
        rows = (
            ("just within", SEARCHED_BYTES - len(member), "resp_1"),
            ("across the border", SEARCHED_BYTES - len(member) + 1, None),
            ("behind it", SEARCHED_BYTES + 1, None),
        )
        for name, place, wanted in rows:
            answer = b" " * place + member + b" " * 5000
            for size in (len(answer), SEARCHED_BYTES - 1, SEARCHED_BYTES, SEARCHED_BYTES // 2 + 1, 1000, 7):
                with self.subTest(name, reads=size):
                    pieces = [answer[begin : begin + size] for begin in range(0, len(answer), size)]
                    self.assertEqual(search(pieces)[0], wanted)

    def test_nothing_is_kept_once_the_search_is_over(self):
        for answer in (b'{"id":"resp_1"}', b" " * SEARCHED_BYTES):
            ids = plexus_lite.ResponseIds()
            ids.feed(answer)
            for _ in range(50):
                self.assertFalse(ids.feed(b"x" * 10_000))
            kept = [value for value in vars(ids).values() if isinstance(value, (bytes, bytearray))]
            self.assertLessEqual(sum(map(len, kept)), 0)


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
            ("counted tokens", {"object": "response.input_tokens", "input_tokens": 7}, ({}, None, False)),
            ("an array", [whole], ({}, None, False)),
            ("a string", '"usage":{"input_tokens":1}', ({}, None, False)),
        )
        for name, value, wanted in rows:
            for indent in (None, 2):
                with self.subTest(name, indent=indent):
                    self.assertReads(json.dumps(value, indent=indent).encode() + b"\n", wanted, is_events=False)

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
                usage = '{"input_tokens":%s,"output_tokens":0,"input_tokens_details":{"cached_tokens":%s}}' % (
                    text,
                    text,
                )
                self.assertReads(b'{"usage":%s}' % usage.encode(), ({"output_tokens": 0}, None, True), is_events=False)

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
                reader = plexus_lite.UsageReader(True)
                reader.feed(event[:cut])
                self.assertEqual((reader.tokens, reader.is_complete), ({}, False))
                reader.feed(event[cut:])
                self.assertEqual((reader.tokens, reader.is_complete), (TOKENS, True))

    def test_a_long_event_is_split_anywhere(self):
        usage = {"usage": {"input_tokens": 5, "input_tokens_details": {"cached_tokens": 4}}}
        for begin, end in (
            ({**ECHO, "a": "x" * 70_000, "b\\": ['"', "\\", {"c": "}"}]}, usage),
            (usage, {"a": ["x" * 70_000], **ECHO}),
        ):
            for kind in ("response.completed", "response.failed"):
                data = chunk(type=kind, response={**begin, "d": '\\"usage":{', "error": {"code": "e\u00e9\\"}, **end})
                places = {
                    data.index(word) for word in (b'"a"', b'"usage": {"input_tokens": 5', b'"code": "e', b'"d"')
                } | {len(data)}
                cuts = {place + step for place in places for step in range(-80, 80) if 0 < place + step < len(data)}
                for cut in cuts:
                    pieces = [data[:cut], data[cut : cut + 3], data[cut + 3 :]]
                    self.assertEqual(
                        read_usage(pieces), ({"input_tokens": 5, "cached_tokens": 4}, "e\u00e9\\", True), cut
                    )

    def test_megabytes_are_read_in_bounded_memory(self):
        bulk = {"bulk": [dict(ECHO, description='a "quoted" \\ text' * 50) for _ in range(900)]}
        for order in ({**bulk, **response_object([])}, {**response_object([]), **bulk}):
            data = sse("response.completed", response=order)
            self.assertGreater(len(data), 1_000_000)
            pieces = [data[place : place + 16_384] for place in range(0, len(data), 16_384)]
            reader = plexus_lite.UsageReader(True)
            tracemalloc.start()
            try:
                for piece in pieces:
                    reader.feed(piece)
                current, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            self.assertEqual((reader.tokens, reader.is_complete), (TOKENS, True))
            self.assertLess(current, 80_000)
            self.assertLess(peak, 4_000_000)  # re keeps its marks for one piece

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

    def test_the_first_events_are_not_parsed(self):
        """They repeat what can be 50 KB of tools, and know no usage."""
        members = {"response": {"error": None, "usage": None, "tools": ["\\"] * 1000}}
        with unittest.mock.patch.object(plexus_lite.json, "loads") as loads:
            read_usage([sse("response.created", **members), sse("response.in_progress", **members)])
        loads.assert_not_called()

    def test_a_payload_leaves_before_it_is_read(self):
        order = []
        send, feed = plexus_lite.ClientConnection.send_payload, plexus_lite.UsageReader.feed
        with unittest.mock.patch.object(
            plexus_lite.ClientConnection, "send_payload", lambda *args: (order.append("send"), send(*args))
        ), unittest.mock.patch.object(
            plexus_lite.UsageReader, "feed", lambda *args: (order.append("read"), feed(*args))
        ):
            relay([STREAM_HEAD + b"2\r\n\n\n\r\n", b"2\r\n\n\n\r\n", b"0\r\n\r\n"])
        self.assertEqual(order, ["send", "read"] * 3)


if __name__ == "__main__":
    unittest.main()
