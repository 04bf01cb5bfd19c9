"""Seen from the system: nothing is contacted and nothing is written that is not configured."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import unittest
from typing import Any, Dict, List, Set

from tests.support import PROGRAM, FakeUpstream, Proxy, RawClient, build_request, clean_environment, enter, make_config
from tests.test_upstream_tls import Folder

CALLS = "connect,bind,sendto,sendmsg,sendmmsg,open,openat,creat"
WRITES = re.compile(r"O_(WRONLY|RDWR|CREAT|TRUNC|APPEND|TMPFILE)")
REQUESTS = 100


def can_trace() -> bool:
    """Say whether strace is here and may trace: some containers forbid it."""
    strace = shutil.which("strace")
    return bool(strace) and subprocess.run([str(strace), "-o", os.devnull, "true"], capture_output=True).returncode == 0


@unittest.skipUnless(can_trace(), "needs strace, and to be allowed to trace")
class Traced(Folder):
    """Every system call that reaches out or opens a file, from the start of the interpreter to its end."""

    def setUp(self):
        super().setUp()
        self.upstream = enter(self.addCleanup, FakeUpstream())
        self.trace = os.path.join(self.folder, "trace")
        self.strace = ["strace", "-f", "-s", "0", "-e", "trace=" + CALLS, "-e", "signal=none", "-o", self.trace]
        # Whoever obeyed these would be seen.  The interpreter's own cache of its library is not what is promised.
        self.variables = dict.fromkeys(("http_proxy", "HTTPS_PROXY", "ALL_PROXY"), "http://127.0.0.1:9")
        self.variables["PYTHONDONTWRITEBYTECODE"] = "1"

    def calls(self, *names: str) -> List[str]:
        """Return the arguments of each call of *names*; interrupted ones too."""
        with open(self.trace, encoding="utf-8", errors="replace") as file:
            found = [re.match(r"[0-9]+ +([a-z]+)\((.*)", line) for line in file]
        return [one.group(2) for one in found if one and one.group(1) in names]

    def assertContacts(self, port: int) -> None:
        """Assert that the upstream is all that was connected or sent to."""
        connects = self.calls("connect")
        self.assertTrue(connects)
        for call in connects:
            self.assertIn(f'sin_port=htons({port}), sin_addr=inet_addr("127.0.0.1")', call)
        for call in self.calls("sendto", "sendmsg", "sendmmsg"):
            self.assertNotIn("sa_family", call)  # an address: a datagram, to a name server, say

    def assertWrites(self, *allowed: str) -> None:
        """Assert that no file was opened for writing but *allowed*, and /dev/null."""
        opens = self.calls("open", "openat")
        self.assertTrue(any(PROGRAM in call for call in opens))
        written: Set[str] = set()
        for call in opens:
            path, _, flags = call.partition('"')[2].partition('"')
            if WRITES.search(flags):
                written.add(path)
        # What keeps sockets from getting the numbers 0 to 2, where one of them was closed by whoever started us.
        self.assertEqual(written - {os.devnull}, set(allowed))
        self.assertEqual(self.calls("creat"), [])

    def serve(self, config: Dict[str, Any], *options: str) -> None:
        """Serve 100 requests and end, all under strace."""
        proxy = Proxy(make_config(self.upstream, **config), self.variables, options)
        proxy._command[:0] = self.strace
        with proxy:
            for _ in range(REQUESTS // 20):  # so that both of two workers have a chance
                with RawClient(proxy.port) as client:
                    for _ in range(20):
                        client.send(build_request("POST", "/v1/responses", {"model": "gpt-test", "input": "hi"}))
                        self.assertEqual(client.read_answer().status, 200)
            # strace ends with what it traces, and takes no notice of a signal of its own.
            with open(f"/proc/{proxy.process.pid}/task/{proxy.process.pid}/children", encoding="ascii") as file:
                os.kill(int(file.read().split()[0]), signal.SIGTERM)
            self.assertEqual(proxy.process.wait(10), 0)
        self.assertEqual(len(self.upstream.requests), REQUESTS)
        self.assertContacts(self.upstream.port)
        self.assertEqual(len(self.calls("bind")), 1, self.calls("bind"))

    def test_serving_connects_to_the_upstream_only_and_writes_nothing(self):
        self.serve({})
        self.assertWrites()

    def test_two_workers_write_the_log_that_is_configured_and_nothing_else(self):
        log = os.path.join(self.folder, "plexus.log")
        self.serve({"workers": 2}, "--log-file", log)
        self.assertWrites(log)

    def test_check_asks_the_upstream_only_and_writes_nothing(self):
        providers = {"demo": {"api_base_url": "demo://", "models": ["m"]}}
        providers["up"] = {"api_base_url": self.upstream.base_url, "models": ["m"]}
        path = self.write("config.json", json.dumps({"providers": providers}))
        command = [*self.strace, sys.executable, PROGRAM, "check", "--config", path]
        done = subprocess.run(
            command, env=clean_environment(self.variables), capture_output=True, text=True, timeout=20
        )
        self.assertEqual((done.returncode, done.stderr), (0, ""), done.stdout)
        self.assertContacts(self.upstream.port)
        self.assertEqual(self.calls("bind"), [])
        self.assertWrites()


if __name__ == "__main__":
    unittest.main()
