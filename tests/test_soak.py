"""tests.soak at a fiftieth of its size: that it runs, and the grossest leaks.  `python -m tests.soak` is the real one."""

import os
import unittest

from tests import soak

SMALL = soak.Scale(
    streams=40,
    streams_s=0.6,
    stream_s=0.5,
    fault_rate=0.1,
    short=200,
    connects=200,
    idle=60,
    slow=20,
    beside_s=0.7,
    flood_bytes=30 * soak.MIB,
    wait_for_threads=False,
)


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "the proxy's files and threads are counted in /proc")
class SoakTest(unittest.TestCase):
    def test_nothing_is_left_behind(self):
        report = soak.soak(SMALL)
        self.assertEqual([], report.failures, report.render())


if __name__ == "__main__":
    unittest.main()
