"""Room 15: what access logs say of the cache."""

import contextlib
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import unittest
from typing import Any, Dict, List, Optional, Sequence, Tuple
from unittest import mock

import plexus_lite
from tests.support import PROGRAM, clean_environment, run_cli

FIRST = "first_request"


def record(
    used: Optional[int] = None, cached: Optional[int] = None, reason: Optional[str] = None, **members: Any
) -> Dict[str, Any]:
    """Return an access log record of a request that reached an upstream."""
    found = plexus_lite.new_record(1_700_000_000.0, "req_1", "192.0.2.1")
    found.update(model="m", provider="p", target="https://a/v1", key="k", session="s1", status=200, attempts=1)
    found.update(input_tokens=used, cached_tokens=cached, miss_reason=reason, output_tokens=None, ttfb_ms=100.0)
    return {**found, **members}


def report_of(*records: Any) -> plexus_lite.Report:
    report = plexus_lite.Report()
    for one in records:
        report.add(one)
    return report


def rows(report: plexus_lite.Report, table: str, figure: str) -> Dict[Optional[str], Any]:
    return {row["name"]: row[figure] for row in report.as_json()[table]}


def cells(text: str, name: str) -> List[str]:
    """Return the cells behind *name* in the rendered report."""
    return next(line for line in text.splitlines() if line.startswith(name + " "))[len(name) :].split()


class Figures(unittest.TestCase):
    def test_the_hit_rate_is_of_the_records_whose_usage_is_known(self):
        report = report_of(
            record(1000, 900),
            record(1000, 0, FIRST),
            record(),  # an answer that broke off
            record(5000),  # an upstream that does not say what was cached
            record(cached=700),
        )
        total = report.as_json()["total"]
        self.assertEqual((total["requests"], total["requests_with_usage"], total["hit_rate"]), (5, 2, 0.45))
        self.assertEqual((total["input_tokens"], total["cached_tokens"]), (7000, 1600))
        self.assertIsNone(total["cache_write_tokens"])

    def test_nothing_known_is_null_and_no_division(self):
        for one in (record(), record(0, 0)):
            total = report_of(one).as_json()["total"]
            self.assertIsNone(total["hit_rate"])
        self.assertIsNone(report_of(record()).as_json()["total"]["missed_tokens"])
        self.assertEqual(cells(report_of(record()).render(100, False), "all")[:5], ["1", "-", "-", "-", "-"])

    def test_a_row_for_each_name_with_the_most_missed_tokens_first(self):
        records = [
            record(1000, 1000, key="warm"),
            record(1000, 1000, key="warm"),
            record(9000, 0, "moved", key="cold", model="other", target="https://b/v1"),
            record(key=None, model=None, provider=None, target=None, session=None, status=404, error="not_found"),
        ]
        report = report_of(*records)
        self.assertEqual(list(rows(report, "key", "requests").items()), [("cold", 1), ("warm", 2), (None, 1)])
        self.assertEqual(rows(report, "key", "hit_rate"), {"cold": 0.0, "warm": 1.0, None: None})
        self.assertEqual(rows(report, "model", "missed_tokens"), {"other": 9000, "m": 0, None: None})
        self.assertEqual(rows(report, "target", "requests"), {"https://b/v1": 1, "https://a/v1": 2, None: 1})
        self.assertEqual(rows(report, "provider", "requests"), {"p": 3, None: 1})

    def test_the_worst_sessions_are_those_with_the_most_tokens_that_could_have_been_cached(self):
        report = report_of(
            record(50_000, 0, FIRST, session="new"),
            record(50_000, 0, "below_minimum", session="small"),
            record(8000, 6000, "prefix_changed", session="b", prefix_changed_at="tools"),
            record(9000, 1000, "prefix_changed", session="b", prefix_changed_at=17),
            record(20_000, 0, "moved", session="a", target="https://b/v1"),
            record(3000, 0, "idle", session="c"),
            record(90_000, 0, "no_session_value", session=None),
            *(record(2000, 1000, "unknown", session=f"z{number}") for number in range(20)),
        )
        found = list(rows(report, "worst_sessions", "missed_tokens").items())
        self.assertEqual(found[:4], [("a", 20_000), ("b", 10_000), ("c", 3000), ("z0", 1000)])
        self.assertEqual(len(found), 10)
        worst = report.as_json()["worst_sessions"]
        self.assertEqual(worst[0]["used"], {"m p https://b/v1 k": 1})
        self.assertEqual(worst[1]["misses"], {"prefix_changed": 2})
        self.assertEqual(worst[1]["prefix_changed_at"], {"tools": 1, "input": 1})

    def test_errors_are_counted_by_code_and_their_ttfb_is_no_ttfb(self):
        report = report_of(
            record(status=401, error="invalid_api_key", attempts=0, ttfb_ms=0.2),
            record(status=200, error="client_gone", ttfb_ms=0.2),
            record(status=429, ttfb_ms=0.2),
            record(status=429, ttfb_ms=0.2),
            record(ttfb_ms=None),
            record(ttfb_ms=0),
        )
        total = report.as_json()["total"]
        self.assertEqual(total["errors"], {"429": 2, "invalid_api_key": 1, "client_gone": 1})
        self.assertLess(total["ttfb_ms"]["p99"], 0.011)
        self.assertEqual(cells(report.render(100, False), "all")[-1], "4")

    def test_what_needed_no_upstream_is_not_counted(self):
        """Unless it was refused: a probe of /health each second would hide the rest."""
        report = report_of(record(), *(record(attempts=0, session=None, route="/health") for _ in range(3)))
        report.add(record(attempts=0, error="invalid_api_key"))
        self.assertEqual(report.as_json()["total"]["requests"], 2)

    def test_percentiles_are_within_the_stated_2_percent(self):
        chance = random.Random(1)
        for mean, spread in ((-0.02, 0.01), (6, 0.1), (6, 1.0), (6, 3.0)):
            times = [chance.lognormvariate(mean, spread) for _ in range(1999)]
            found = report_of(*(record(ttfb_ms=one) for one in times)).as_json()["total"]["ttfb_ms"]
            times.sort()
            for percent in (50, 90, 99):
                with self.subTest(mean=mean, spread=spread, percent=percent):
                    exact = times[-(-len(times) * percent // 100) - 1]
                    self.assertAlmostEqual(found[f"p{percent}"] / exact, 1, delta=0.021)


class Rendering(unittest.TestCase):
    def setUp(self) -> None:
        self.report = report_of(
            record(1_234_567, 1_200_000),
            record(2000, 0, "prefix_changed", prefix_changed_at="tools", target="https://" + "x" * 90),
            record(10_000, 5000, "moved", model="evil\x1b[2J\u202e\n\ud800" + "m" * 200, ttfb_ms=2500.0),
            record(status=500, error="server_error", session="s2", ts="\x1b\n\u202e"),
            record(status=500, error="\x1b[2J" * 30, key="k2"),
        )

    def test_the_text_shows_the_figures_of_the_json(self):
        found, text = self.report.as_json(), self.report.render(100, False)
        row = found["key"][0]
        self.assertEqual(row["hit_rate"], 0.9667)
        self.assertEqual(cells(text, "k"), ["4", "96.7%", "1.2M", "1.2M", "7k", "100ms", "2.5s", "2.5s", "1"])
        self.assertEqual(row["missed_tokens"], 7000)
        for line in ("  misses: prefix_changed 1, moved 1", "  prefix_changed_at: tools 1", "  errors: server_error 1"):
            self.assertIn(line, text.splitlines())
        json.dumps(found, allow_nan=False)
        self.assertLessEqual(max(len(one["name"]) for one in found["model"]), 100)

    def test_no_line_is_longer_than_the_terminal_is_wide(self):
        for width in (40, 57, 80, 100, 300):
            for bars in (False, True):
                with self.subTest(width, bars=bars):
                    lines = self.report.render(width, bars).splitlines()
                    self.assertLessEqual(max(map(len, lines)), width)
                    self.assertTrue(all(line.isprintable() for line in lines))

    def test_bars_only_where_the_terminal_can(self):
        self.assertTrue(self.report.render(100, False).isascii())
        for cached, bar in ((0, "0"), (500, "1  " + "\u2588" * 4), (967, "1  " + "\u2588" * 8)):
            lines = report_of(record(1000, cached, status=500 if cached else 200)).render(100, True).splitlines()
            self.assertRegex(next(line for line in lines if line.startswith("all ")), f" {bar}$")

    def test_without_keys_there_is_no_table_of_keys(self):
        text = report_of(record(key=None, session=None)).render(100, False)
        self.assertNotRegex(text, "(?m)^(key|worst sessions) ")
        self.assertRegex(text, "(?m)^model ")

    def test_no_records(self):
        self.assertEqual(report_of().render(100, True), "no records")
        self.assertEqual(report_of().as_json()["total"]["requests"], 0)


class Bounds(unittest.TestCase):
    @mock.patch.object(plexus_lite, "MAX_NAMES", 30)
    def test_sessions_are_bounded_and_the_worst_are_kept_apart(self):
        report = report_of(record(9, 0, "moved", session="old"), record(9, 0, "moved", session="kept"))
        self.assertIn(" in 2 sessions", report.render(300, False))
        for number in range(10 * plexus_lite.MAX_NAMES):
            report.add(record(5, 4, "moved", session=str(number)))
        report.add(record(9, 0, "moved", session="kept"))
        found = report.as_json()
        self.assertLess(found["sessions"], plexus_lite.MAX_NAMES)
        worst = {row["name"]: row["missed_tokens"] for row in found["worst_sessions"]}
        self.assertEqual((worst["old"], worst["kept"]), (9, 18))
        self.assertGreater(worst["(other)"], 9 * plexus_lite.MAX_NAMES)
        self.assertEqual(found["total"]["missed_tokens"], 10 * plexus_lite.MAX_NAMES + 27)
        self.assertIn(f" in over {found['sessions']} sessions", report.render(300, False))

    @mock.patch.object(plexus_lite, "MAX_NAMES", 60)
    def test_names_that_clients_make_up_are_bounded_and_the_totals_stay_right(self):
        report, one = plexus_lite.Report(), record(10, 0, "moved")
        many = plexus_lite.MAX_NAMES + 5  # as many codes, too
        for number in range(many):
            report.add({**one, "model": f"model-{number}", "error": f"code-{number}"})
        found = report.as_json()
        self.assertEqual((found["total"]["requests"], found["total"]["missed_tokens"]), (many, 10 * many))
        self.assertEqual(len(found["model"]), plexus_lite.MAX_NAMES + 1)
        self.assertEqual(rows(report, "model", "requests")["(other)"], 5)
        self.assertLessEqual(len(found["total"]["errors"]), plexus_lite.MAX_NAMES + 1)
        self.assertEqual(sum(found["total"]["errors"].values()), many)
        self.assertLessEqual(len(found["worst_sessions"][0]["used"]), plexus_lite.MAX_NAMES + 1)
        text = report.render(100, False)
        self.assertIn(f"and {len(found['model']) - 20:,} more", text)
        self.assertRegex(text, r"(?m)^  errors: \(other\) 5, (code-\d+\s+1,\s+){20,50}\[\.\.\.\]$")


class Files(unittest.TestCase):
    def setUp(self) -> None:
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = folder.name

    def write(self, name: str, *lines: bytes, zipped: bool = False) -> str:
        path, data = os.path.join(self.folder, name), b"".join(lines)
        with open(path, "wb") as file:
            file.write(gzip.compress(data) if zipped else data)
        return path

    def read(self, *paths: str) -> Tuple[plexus_lite.Report, str]:
        report = plexus_lite.Report()
        return report, plexus_lite.read_logs(paths, report, False)

    def refusal(self, path: str) -> str:
        with self.assertRaises(plexus_lite.ConfigError) as caught:
            self.read(path)
        return str(caught.exception)

    def test_several_files_are_one_log_also_compressed_ones(self):
        line = plexus_lite.render_json(record(10, 5))
        paths = [self.write("a.log", line, line), self.write("b.log.gz", line, zipped=True), self.write("c.log", line)]
        report, remark = self.read(*paths)
        self.assertEqual((report.as_json()["total"]["requests"], remark), (4, ""))

    def test_the_span_is_that_of_all_files_in_whatever_order_they_come(self):
        times = ("2026-11-23T16:47:41.247Z", "2026-11-22T00:00:00.000Z", "2026-11-24T00:00:00.000Z")
        found = report_of(*(record(ts=one) for one in times)).as_json()
        self.assertEqual((found["from"], found["to"]), (times[1], times[2]))

    def test_what_is_no_record_is_counted_and_the_first_is_named(self):
        line = plexus_lite.render_json(record(10, 5))
        huge = b'{"ts":"' + b"x" * (3 * plexus_lite.LOG_LINE_BYTES) + b'"}\n'  # read as four
        strays: Sequence[bytes] = (
            b'{"ts":"2026-11-23T16:47:41.247Z","level":"info","message":"reloaded"}\n',
            b'{"ts":"2026-11-23T16:47:41.247Z","level":"warning","status":500}\n',
            b'{"ts":1,"status":200}\n',
            b'{"ts":"x","status":null}\n',
            b'{"status":200}\n',
            b"null\n",
            b"7\n",
            b'["ts", "status"]\n',
            b"[" * 30_000 + b"\n",
            b"\x00\xff\xfe\x80\n",
            b"\n",
            huge,
            b'{"ts":"2026-11-23T16:47:41.247Z","id":"req_6',  # half written
        )
        path = self.write("a.log", line, *strays[:-1], line, strays[-1])
        report, remark = self.read(path)
        self.assertEqual(report.as_json()["total"]["requests"], 2)
        self.assertEqual(remark, f"lines that are no records: {len(strays) + 3} (first: {path}:2)")
        huge_at_last = self.write("b.log", line, huge, line)
        self.assertEqual(self.read(huge_at_last)[1], f"lines that are no records: 4 (first: {huge_at_last}:2)")

    def test_members_of_any_type_are_no_traceback(self):
        report, chance = plexus_lite.Report(), random.Random(2)
        values: Sequence[Any] = (
            None,
            True,
            "",
            "text",
            -1,
            1e300,
            float("nan"),
            float("inf"),
            10**400,
            [],
            {"a": 1},
            7,
            0.5,
        )
        for _ in range(2000):
            report.add({**{name: chance.choice(values) for name in record()}, "ts": "t", "status": 200})
        self.assertEqual(report.as_json()["total"]["requests"], 2000)
        json.dumps(report.as_json(), allow_nan=False)
        report.render(100, True)

    def test_a_record_of_an_older_version_has_no_usage_and_counts(self):
        old = {name: value for name, value in record().items() if "tokens" not in name and name != "miss_reason"}
        report, remark = self.read(self.write("a.log", plexus_lite.render_json(old)))
        self.assertEqual((report.as_json()["total"]["requests_with_usage"], remark), (0, ""))
        self.assertEqual(rows(report, "model", "requests"), {"m": 1})

    def test_a_file_that_cannot_be_read_is_named_with_the_reason(self):
        missing = os.path.join(self.folder, "none.log")
        whole = gzip.compress(plexus_lite.render_json(record()) * 50)
        self.assertEqual(self.refusal(missing), f"{missing}: cannot be read: No such file or directory")
        for name, data in (("cut.gz", whole[:-12]), ("bad.gz", whole[:12] + b"\xff" * 20), ("no.gz", b"\x1f\x8b\x00")):
            with self.subTest(name):
                self.assertRegex(self.refusal(self.write(name, data)), f"{name}: cannot be read: .")

    @mock.patch.object(plexus_lite, "PROGRESS_LINES", 10)
    def test_progress_of_a_large_file_is_shown_and_wiped(self):
        path = self.write("a.log", b"{}\n" * (2 * plexus_lite.PROGRESS_LINES))
        with contextlib.redirect_stderr(io.StringIO()) as shown:
            plexus_lite.read_logs([path], plexus_lite.Report(), True)
        self.assertRegex(shown.getvalue(), r"a\.log: \d+% ")
        self.assertRegex(shown.getvalue(), r"\r +\r\Z")


class CommandLine(unittest.TestCase):
    LINES = plexus_lite.render_json(record(10, 5)).decode() * 3

    def test_standard_input_as_json(self):
        done = run_cli("report", "--json", "-", "-", input=self.LINES + "?\n", env={"PLEXUS_CONFIG": "nonesuch.json"})
        self.assertEqual((done.returncode, done.stderr), (0, "lines that are no records: 1 (first: -:4)\n"))
        self.assertEqual(json.loads(done.stdout)["total"]["hit_rate"], 0.5)

    def test_a_missing_file_is_one_line_and_exit_2(self):
        with mock.patch.object(plexus_lite, "say") as said:
            self.assertEqual(plexus_lite.main(["report", "nonesuch.log"]), plexus_lite.EXIT_USAGE)
        said.assert_called_once_with("nonesuch.log: cannot be read: No such file or directory", 2)

    def start(self, *arguments: str, **pipes: Any) -> "subprocess.Popen[str]":
        command = [sys.executable, PROGRAM, "report", *arguments]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **pipes}
        return subprocess.Popen(command, env=clean_environment(), text=True, **pipes)

    def test_a_reader_that_leaves_ends_it_quietly(self):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            process = self.start("-", stdout=writing)
        finally:
            os.close(writing)
        _, errors = process.communicate(self.LINES, timeout=20)
        self.assertEqual((process.returncode, errors), (0, ""))

    @unittest.skipIf(sys.platform == "win32", "no SIGINT for one process")
    def test_an_interrupt_ends_it_quietly_with_130(self):
        # Through a pipe with a name: once it opens for writing, the program is reading.
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "a.log")
            os.mkfifo(path)
            process = self.start(path)
            with open(path, "wb"):
                process.send_signal(signal.SIGINT)
            out, errors = process.communicate(timeout=20)  # the end of the pipe ends a read that began at that moment
        self.assertEqual((process.returncode, out, errors), (130, "", ""))

    def test_operands_and_options_in_any_order_and_only_where_they_belong(self):
        for line in (["report", "--json", "a", "-"], ["--json", "report", "a", "-"], ["report", "a", "--json", "-"]):
            options = plexus_lite.parse_options(line)
            self.assertEqual((options.command, options.files, options.json), ("report", ["a", "-"], True))
        for line in (["report"], ["serve", "a.log"], ["init", "a.log"], ["repot", "a"]):
            with self.subTest(line):
                with self.assertRaises(SystemExit) as caught, contextlib.redirect_stderr(io.StringIO()) as printed:
                    plexus_lite.parse_options(line)
                self.assertEqual(caught.exception.code, plexus_lite.EXIT_USAGE)
                self.assertIn(" error: ", printed.getvalue())


if __name__ == "__main__":
    unittest.main()
