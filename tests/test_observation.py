"""Room 7: what the access log says of a request, and the response id found on the way."""

import calendar
import json
import time
import unittest
from typing import List, Optional, Sequence, Tuple

import plexus_lite
from tests.support import response_events, response_object

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


if __name__ == "__main__":
    unittest.main()
