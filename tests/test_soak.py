"""tests.soak at a fiftieth of its size: that it runs, and the grossest leaks.  The real one: python -m tests.soak"""

import contextlib
import os
import unittest

from tests import soak
from tests.support import FakeUpstream, Proxy, RawClient, make_config

SMALL = soak.Scale(
    streams=30,
    streams_s=0.3,
    stream_s=0.2,
    event_s=0.04,
    fault_rate=0.1,
    short=120,
    connects=100,
    idle=60,
    slow=20,
    beside_s=0.3,
    flood_bytes=40 * soak.MIB,
    pool_idle_s=0.1,
    stopped_s=0.2,
)


@unittest.skipUnless(os.path.isdir("/proc/self/fd"), "the proxy's files and threads are counted in /proc")
class SoakTest(unittest.TestCase):
    def test_nothing_is_left_behind(self):
        report = soak.soak(SMALL)
        self.assertEqual([], report.failures, report.render())


class FullTest(unittest.TestCase):
    """Beyond max_connections."""

    def test_idle_longest_gives_way(self):
        """A client that has just come was cut off instead: its deadline, for its first request, is the nearest."""
        request = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
        with contextlib.ExitStack() as stack:
            upstream = stack.enter_context(FakeUpstream())
            proxy = stack.enter_context(Proxy(make_config(upstream, limits={"max_connections": 3})))
            idle = []
            for _ in range(3):
                idle.append(stack.enter_context(RawClient(proxy.port)))
                idle[-1].send(request)
                idle[-1].read_answer("GET")
            fresh = stack.enter_context(RawClient(proxy.port))
            self.assertTrue(idle[0].at_eof())
            stack.enter_context(RawClient(proxy.port))
            self.assertTrue(idle[1].at_eof(2), "not the connection that was idle longest")
            fresh.send(request)
            self.assertEqual(200, fresh.read_answer("GET").status)
            self.assertFalse(idle[2].at_eof(0))


if __name__ == "__main__":
    unittest.main()
