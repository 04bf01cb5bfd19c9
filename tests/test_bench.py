"""tests.bench with canned figures, and once for real with very few requests.  The real one: python -m tests.bench"""

import contextlib
import io
import json
import math
import os
import socket
import tempfile
import unittest
import xml.etree.ElementTree as ElementTree
from unittest import mock

from tests import bench, bench_view
from tests.bench_upstream import BEGIN, EVENT, FINISH, read_requests
from tests.bench_view import Row

TINY = bench.Scale(
    requests=2,
    connections=2,
    seconds=0.02,
    streams=5,
    events=3,
    interval_s=0.01,
    ramp_s=0.01,
    flat_events=500,
    post_bytes=300_000,
    growth_streams=(1, 3),
    growth_interval_s=0.005,
    growth_bytes=(1_000, 300_000),
)
RENDER = bench.render
ROWS = [Row("ttfb", "TTFB, us"), Row("rate", "events/s", 1, True)]


def result(nginx="1.2.3", **values):
    about = {"date": "2026-01-02 03:04 UTC", "machine": "<CPU>, 2 cores", "python": "CPython 3.8.0", "plexus_lite": "1"}
    return dict(about, nginx=nginx, rounds=3, problems=[], values=values)


class PercentileTest(unittest.TestCase):
    def test_is_the_nearest_rank(self):
        for values, share, wanted in (
            ([7.0], 0.5, 7.0),
            ([3.0, 1.0, 2.0], 0.5, 2.0),
            ([4.0, 3.0, 2.0, 1.0], 0.5, 2.0),
            (list(range(100)), 0.99, 98),
            (list(range(101)), 0.99, 99),
            ([1.0, 2.0], 0.99, 2.0),
        ):
            with self.subTest(values=values, share=share):
                self.assertEqual(wanted, bench.percentile(values, share))
        self.assertTrue(math.isnan(bench.percentile([], 0.5)))


class TableTest(unittest.TestCase):
    RESULT = result(
        ttfb={"direct": [1e-5] * 3, "nginx": [1e-4, 2e-4, 4e-4], "plexus_lite": [6e-4, 4e-4, 8e-4]},
        rate={"nginx": [3e6] * 3, "plexus_lite": [1.5e6] * 3},
    )

    def table(self, *args):
        lines = bench_view.render_table(ROWS, *args).splitlines()
        self.assertEqual({len(lines[0])}, {len(line) for line in lines}, "the columns are not aligned")
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if not line.startswith("| -")]

    def test_shows_medians_and_the_median_of_the_rounds_ratios_to_nginx(self):
        self.assertEqual(
            [
                ["median of 3 rounds", "direct", "nginx", "plexus_lite", "x nginx"],
                ["TTFB, us", "10", "200", "600", "2"],
                ["events/s", "-", "3,000,000", "1,500,000", "0.5"],
            ],
            self.table(self.RESULT),
        )

    def test_shows_the_ratio_to_an_earlier_result_and_names_what_has_changed(self):
        for ttfb, rate, wanted in (
            ([3e-4], [1e6], ["2.00 worse", "1.50 better"]),
            ([12e-4], [3e6], ["0.50 better", "0.50 worse"]),
            ([6.1e-4, 0.0, 1.0], [1.45e6], ["0.98", "1.03"]),
        ):
            with self.subTest(ttfb=ttfb):
                table = self.table(self.RESULT, result(ttfb={"plexus_lite": ttfb}, rate={"plexus_lite": rate}))
                self.assertEqual(["x 2026-01-02 03:04 UTC", *wanted], [line[-1] for line in table])
        self.assertEqual(["-", "-"], [line[-1] for line in self.table(self.RESULT, result())[1:]])

    def test_without_nginx_says_so_and_has_no_column_for_it(self):
        table = self.table(result(None, ttfb={"direct": [1e-5], "plexus_lite": [4e-4]}))
        self.assertEqual(["median of 3 rounds", "direct", "plexus_lite"], table[0])
        self.assertIn("nginx is not installed", bench_view.heading(result(None)))


class PlotTest(unittest.TestCase):
    def test_is_well_formed_and_has_a_curve_of_each_in_every_panel(self):
        keys = [row.key for row in bench.GROWTH_ROWS]
        growth = {key: {"direct": [1e-5], "nginx": [1e-4], "plexus_lite": [3e-4]} for key in keys}
        svg = bench_view.draw(bench.PANELS, result(**growth))
        self.assertLess(len(svg), 30_000)
        root = ElementTree.fromstring(svg)
        space = "{http://www.w3.org/2000/svg}"
        panels = root.findall(f"{space}g")
        self.assertEqual(3, len(panels))
        for panel, wanted in zip(panels, bench.PANELS):
            texts = [one.text for one in panel.iter(f"{space}text")]
            self.assertIn(wanted.title, texts)
            self.assertIn("100 \u00b5s", texts)
            curves = [(one.get("stroke"), one.get("points", "")) for one in panel.iter(f"{space}polyline")]
            for name, count in (("nginx", 2), ("plexus_lite", 2), ("direct", 1)):
                points = [points for stroke, points in curves if stroke == bench_view.COLOURS[name]]
                self.assertEqual([len(wanted.values)] * count, [len(one.split()) for one in points], name)
            # What is cheaper stands lower.
            heights = {stroke: float(points.split()[0].split(",")[1]) for stroke, points in curves}
            self.assertGreater(heights[bench_view.COLOURS["nginx"]], heights[bench_view.COLOURS["plexus_lite"]])
        words = " ".join(one.text or "" for one in root.iter(f"{space}text"))
        self.assertIn("2026-01-02 03:04 UTC; <CPU>, 2 cores; CPython 3.8.0; nginx 1.2.3", words)


class AnswerTest(unittest.TestCase):
    """What the load generator makes of what it read."""

    def read(self, raw, *cuts):
        borders = [0, *cuts, len(raw)]
        reads = [(1000 * number, raw[a:b]) for number, (a, b) in enumerate(zip(borders, borders[1:]), 1)]
        return next(bench.Client(b"", 2, exchanges=[(0, reads)]).answers())

    def test_each_event_has_the_time_of_the_read_that_completed_it(self):
        first, second = EVENT % (400, 0), EVENT % (500, 1)
        cut = len(BEGIN + first)
        self.assertEqual((True, 1e-6, 2e-6, [6e-7, 1.5e-6]), self.read(BEGIN + first + second + FINISH, cut))
        inside = len(BEGIN) + first.index(b"@0000") + 9
        self.assertEqual((True, 2e-6, 2e-6, [1.6e-6, 1.5e-6]), self.read(BEGIN + first + second + FINISH, inside))

        behind = len(BEGIN) + first.index(b"@xxx") + 1
        self.assertEqual((True, 1e-6, 2e-6, [6e-7, 1.5e-6]), self.read(BEGIN + first + second + FINISH, behind))

    def test_only_what_is_complete_and_in_order_is_whole(self):
        first, second = EVENT % (0, 0), EVENT % (0, 1)
        for name, raw, wanted in (
            ("as sent", BEGIN + first + second + FINISH, True),
            ("an event is lost", BEGIN + first + FINISH, False),
            ("out of order", BEGIN + second + first + FINISH, False),
            ("twice", BEGIN + first + second + second + FINISH, False),
            ("no end", BEGIN + first + second, False),
            ("cut", (BEGIN + first + second)[:-30], False),
            ("nothing", b"", False),
        ):
            with self.subTest(name):
                self.assertEqual(wanted, self.read(raw).is_whole)

    def test_chunks_may_be_cut_anew(self):
        size, _, rest = (EVENT % (400, 0)).partition(b"\r\n")
        middle = rest.index(b"@0000") + 9
        recut = b"%x\r\n%s\r\n" % (middle, rest[:middle])
        recut += b"%x\r\n%s" % (int(size, 16) - middle, rest[middle:])
        self.assertTrue(self.read(BEGIN + recut + EVENT % (400, 1) + FINISH).is_whole)


class BodyTest(unittest.TestCase):
    def test_has_the_size_that_was_asked_for(self):
        for size in (bench.SMALL_BYTES, bench.USUAL_BYTES, *bench.FULL.growth_bytes[:4]):
            self.assertEqual(size, len(bench.make_body(size)))


class UpstreamTest(unittest.TestCase):
    def test_a_request_is_complete_when_its_body_is(self):
        reader = read_requests()
        next(reader)
        for size in (1, 700, 1):  # one after another, byte by byte
            request = bench.render(b"\n" * size, 3, 0.25)
            plans = [reader.send(request[place : place + 1]) for place in range(len(request))]
            self.assertEqual([None] * (len(request) - 1) + [(3, 250_000_000)], plans)


class CommandTest(unittest.TestCase):
    def run_main(self, *arguments, problems=()):
        found = dict(result(None, ttfb_small_p50={"plexus_lite": [4e-4]}), problems=list(problems))
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(bench, "measure", return_value=found))
            stack.enter_context(mock.patch.object(bench, "raise_file_limit"))  # this process is not the bench's own
            stack.enter_context(mock.patch("signal.signal"))
            printed = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
            code = bench.main(arguments)
        return code, printed.getvalue()

    def test_a_result_is_kept_and_is_what_a_later_one_is_shown_against(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kept.json")
            _, printed = self.run_main("--json", "--save", path)
            with open(path, encoding="utf-8") as file:
                self.assertEqual(json.loads(printed), json.load(file))
            self.assertRegex(self.run_main("--against", path)[1], r"TTFB, small body, p50, us .* 400 \| +1\.00 \|")

    def test_the_plot_is_written_where_it_is_wanted(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "plot.svg")
            self.assertEqual(0, self.run_main("--growth", "--svg", path)[0])
            self.assertEqual("{http://www.w3.org/2000/svg}svg", ElementTree.parse(path).getroot().tag)

    def test_a_problem_is_shown_and_is_the_exit_code(self):
        self.assertEqual(0, self.run_main()[0])
        code, printed = self.run_main(problems=["direct flat: broken"])
        self.assertEqual((1, "PROBLEM: direct flat: broken"), (code, printed.splitlines()[-1]))


class RealTest(unittest.TestCase):
    def test_every_measurement_works_through_the_real_proxy(self):
        with bench.competitors(with_nginx=False) as ports:
            usual, growth = bench.Bench(TINY, ports), bench.Bench(TINY, ports)
            usual.run(1, is_growth=False)
            growth.run(1, is_growth=True)
        points = [
            (panel.key, TINY.growth_bytes if panel.key == "body" else TINY.growth_streams) for panel in bench.PANELS
        ]
        keys = {f"{key}_{part}@{value}" for key, values in points for value in values for part in bench.PARTS}
        for found, wanted in ((usual, {row.key for row in bench.ROWS}), (growth, keys)):
            self.assertEqual([], found.problems)
            self.assertEqual(wanted, set(found.values))
            for key, values in found.values.items():
                with self.subTest(key):
                    self.assertEqual(["direct", "plexus_lite"], list(values))
                    self.assertTrue(all(one > 0 for rounds in values.values() for one in rounds), values)
        self.assertEqual({"direct": [1.0], "plexus_lite": [1.0]}, usual.values["whole"])
        self.assertGreaterEqual(min(min(rounds) for rounds in usual.values["stretch"].values()), 1.0, "not paced")

    def test_what_fails_is_a_problem_and_no_figure(self):
        with socket.socket() as closed, bench.upstream() as port:
            closed.bind(("127.0.0.1", 0))
            gone = bench.Bench(TINY, {"direct": port, "nginx": closed.getsockname()[1]})
            gone.run(1, is_growth=False)
            broken = bench.Bench(TINY, {"direct": port})
            with mock.patch.object(bench, "render", lambda body, events, *_, **__: RENDER(body, events - 1)):
                broken.run(1, is_growth=False)
        self.assertEqual({"direct"}, {name for values in gone.values.values() for name in values})
        self.assertEqual(len(list(gone.plan(False))), len(gone.problems))
        self.assertTrue(all(one.startswith("nginx ") and "refused" in one for one in gone.problems), gone.problems)
        self.assertEqual({"short", "whole", "stretch"}, set(broken.values), "how many were whole, and how long it took")
        self.assertEqual({"direct": [0.0]}, broken.values["whole"])
        self.assertIn("direct flat: 1 of 1 answers are not whole ", broken.problems)


if __name__ == "__main__":
    unittest.main()
