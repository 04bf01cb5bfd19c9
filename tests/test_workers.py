"""Several worker processes: one port, replaced when they die, stopped and reloaded as one."""

import functools
import json
import os
import signal
import socket
import tempfile
import threading
import time
import types
import unittest
import unittest.mock
from typing import Any, List, Set, Tuple

import plexus_lite
from tests import support


def children(pid: int) -> List[int]:
    """Return the pids of the workers of *pid*; Linux tells them in /proc."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return sorted(int(word) for word in file.read().split())


def wait_until(holds, what: str, timeout: float = 10) -> None:
    """Processes come and go without telling: look again until *holds*, for a bounded time."""
    deadline = time.monotonic() + timeout
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {timeout:g} s"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def sockets(pid: int) -> int:
    """Return how many sockets the process *pid* has open."""
    links = [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return sum(link.startswith("socket:") for link in links)


def is_open(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 10).close()
        return True
    except OSError:
        return False


@unittest.skipUnless(hasattr(os, "fork") and os.path.exists("/proc/self/stat"), "workers need fork, this test /proc")
class WorkersTest(unittest.TestCase):
    def start(self, upstream: support.FakeUpstream, **overrides) -> support.Proxy:
        proxy = support.Proxy(support.make_config(upstream, workers=2, **overrides))
        self.addCleanup(proxy.__exit__, None)
        proxy.__enter__()
        wait_until(lambda: len(children(proxy.process.pid)) == 2, "two workers")
        return proxy

    def serving(self, proxy: support.Proxy) -> List[int]:
        """Return the workers, once each has what its loop begins with."""
        workers = children(proxy.process.pid)
        wait_until(lambda: min(map(sockets, workers)) > 2, "both have the listener and a pair to wake them")
        return workers

    def setUp(self) -> None:
        self.upstream = support.FakeUpstream()
        self.addCleanup(self.upstream.__exit__)
        self.upstream.__enter__()

    def test_both_workers_serve_the_main_job(self) -> None:
        proxy = self.start(self.upstream)
        for number in range(8):
            answer = support.post(proxy.port, "/v1/responses", {"model": "gpt-test", "input": str(number)})
            self.assertEqual(answer.status, 200)
        self.assertEqual(len(self.upstream.requests), 8)
        self.assertEqual(proxy.stop(), 0)

    def test_a_worker_with_more_clients_leaves_a_connection_to_the_others_for_a_moment(self) -> None:
        """All wake for each, and the quickest would have most of them."""
        for clients, others_have, events, takes in (
            (4, 4, plexus_lite.READ, True),
            (4, 3, plexus_lite.READ, False),
            (4, 5, plexus_lite.READ, True),
            (4, 3, 0, True),  # the moment is over
        ):
            with self.subTest(clients=clients, others_have=others_have, events=events):
                shared = plexus_lite.Shared(2)
                shared.clients[0] = others_have
                server = unittest.mock.Mock(_shared=shared, _number=1, clients=set(range(clients)))
                server.socket.accept.side_effect = BlockingIOError
                plexus_lite.Server._accept(server, events)
                self.assertEqual(server.socket.accept.called, takes)
                self.assertEqual(server._pause_accepting.called, not takes)
                self.assertEqual(shared.clients[1], clients, "the others do not know")

    def test_who_has_left_is_not_counted(self) -> None:
        """Or a worker whose clients have all gone would be passed over, and the other one take all that come."""
        shared = plexus_lite.Shared(2)
        clients = {unittest.mock.Mock()}
        server = unittest.mock.Mock(_shared=shared, workers=2, _number=1, clients=clients)
        server.is_draining.return_value = False
        shared.clients[1], shared.supervisor = 9, os.getppid()
        plexus_lite.Server._tick(server, 1.0)
        self.assertEqual(list(shared.clients), [0, 1])

    def test_one_worker_alone_takes_all_while_the_other_is_stopped(self) -> None:
        proxy = self.start(self.upstream)
        first, _ = children(proxy.process.pid)
        os.kill(first, signal.SIGSTOP)
        self.addCleanup(os.kill, first, signal.SIGCONT)
        clients = [support.RawClient(proxy.port) for _ in range(20)]
        started = time.monotonic()
        for client in clients:
            self.addCleanup(client.close)
            client.send(support.build_request("GET", "/health", None))
            self.assertEqual(client.read_answer("GET").status, 200)
        self.assertLess(time.monotonic() - started, 5)
        os.kill(first, signal.SIGCONT)

    def test_max_connections_counts_the_clients_of_all_workers(self) -> None:
        proxy = self.start(self.upstream, limits={"max_connections": 4})
        first, _ = children(proxy.process.pid)
        os.kill(first, signal.SIGSTOP)
        self.addCleanup(os.kill, first, signal.SIGCONT)
        clients = [support.RawClient(proxy.port) for _ in range(5)]
        for client in clients:
            self.addCleanup(client.close)
            client.send(support.build_request("GET", "/health", None))
            self.assertEqual(client.read_answer("GET").status, 200)
        self.assertEqual([client.at_eof(0.2) for client in clients], [True] + [False] * 4)
        os.kill(first, signal.SIGCONT)

    def welcome(self, shared: plexus_lite.Shared, count: int, can_give_way: bool) -> List[unittest.mock.Mock]:
        """Let *count* clients come to worker 0, where max_connections is 4."""
        state = types.SimpleNamespace(config=types.SimpleNamespace(limits=types.SimpleNamespace(max_connections=4)))
        server = unittest.mock.Mock(_shared=shared, _number=0, clients=set(), state=state)
        made = [unittest.mock.Mock(phase=None, idle_since=number) for number in range(count)]
        for one in made:
            shared.clients[0] = len(server.clients)
            one.can_give_way.return_value = can_give_way
            one.close.side_effect = functools.partial(setattr, one, "phase", plexus_lite.Phase.CLOSED)
            with unittest.mock.patch.object(plexus_lite, "ClientConnection", return_value=one):
                plexus_lite.Server._welcome(server, unittest.mock.Mock(), "192.0.2.1")
        return made

    def test_a_worker_may_have_its_share_wherever_the_others_are(self) -> None:
        shared = plexus_lite.Shared(2)
        shared.clients[1] = 9
        made = self.welcome(shared, 3, can_give_way=True)
        self.assertEqual([one.close.call_count for one in made], [1, 0, 0])  # for the third, the first
        self.assertEqual([one.refuse.call_count for one in made], [0, 0, 0])

    def test_of_those_that_are_refused_few_linger(self) -> None:
        made = self.welcome(plexus_lite.Shared(1), 10, can_give_way=False)
        self.assertEqual([one.refuse.call_count for one in made], [0] * 4 + [1] * 6)
        self.assertEqual([one.close.call_count for one in made], [0] * 8 + [1] * 2)

    def test_who_dies_has_no_clients_and_its_pause_holds_up_no_other(self) -> None:
        """All that died meanwhile stayed dead for up to 30 s."""
        shared = plexus_lite.Shared(2)
        shared.clients[0] = shared.clients[1] = 9
        log, unused = unittest.mock.Mock(), unittest.mock.Mock()
        supervisor = plexus_lite.Supervisor(unused, unused, unused, log, unused, shared)
        supervisor._children = {7: (0, time.monotonic()), 8: (1, time.monotonic())}
        supervisor._pauses = {0: 30.0, 1: 0.1}
        started: List[int] = []

        def spawn(number: int) -> None:
            started.append(number)
            supervisor._stopping = True

        with unittest.mock.patch.object(supervisor, "_spawn", spawn), unittest.mock.patch.object(
            plexus_lite, "catch_signals"
        ), unittest.mock.patch.object(os, "waitpid", side_effect=[(7, 9), (8, 0x100)]):
            supervisor.run(0)
        self.assertEqual((started, list(shared.clients)), ([1], [0, 0]))
        said = [call[0][1] for call in log.call_args_list]
        wanted = ["worker 0 died with signal 9; another starts in 30 s"]
        self.assertEqual(said, [*wanted, "worker 1 died with exit code 1; another starts in 0.1 s"])

    def test_a_dead_worker_is_replaced_and_named_in_a_line_of_the_log(self) -> None:
        def kill_one(*options: str) -> str:
            """Return what was written to stderr."""
            config = support.make_config(self.upstream, workers=2)
            with support.Proxy(config, args=options) as proxy:
                wait_until(lambda: len(children(proxy.process.pid)) == 2, "two workers")
                before = children(proxy.process.pid)
                os.kill(before[0], signal.SIGKILL)
                wait_until(lambda: len(set(children(proxy.process.pid)) - set(before)) == 1, "a new worker")
                text = proxy.error_text()
                self.assertEqual(support.get(proxy.port, "/health").status, 200)
                return text

        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "log")
            self.assertEqual(kill_one("--log-file", path), "")
            with open(path, encoding="ascii") as file:
                texts = [file.readline(), kill_one()]
        for event in map(json.loads, texts):
            self.assertEqual((sorted(event), event["level"]), (["level", "message", "ts"], "error"))
            self.assertRegex(event["message"], r"^worker [01] died with signal 9; another starts in 1 s$")

    def test_each_has_its_share_of_max_buffered_bytes(self) -> None:
        proxy = self.start(self.upstream, limits={"max_buffered_bytes": 100_000})
        for size, status in ((40_000, 200), (60_000, 503)):
            body = {"model": "gpt-test", "input": "x" * size}
            got = support.post(proxy.port, "/v1/responses", body)
            self.assertEqual(got.status, status)
        self.assertEqual(got.error_code, "overloaded")
        self.assertIn("max_buffered_bytes (100000)", got.json()["error"]["message"])

    def test_a_worker_that_cannot_be_started_is_tried_again_and_one_that_fails_says_why(self) -> None:
        change = (
            "import os\n"
            "fork, bind, calls = os.fork, plexus_lite.bind_to_core, []\n"
            "def fork_second():\n    calls.append(1)\n    if len(calls) == 1:\n        raise OSError(11, 'none left')\n"
            "    return fork()\n"
            "def bind_later(number):\n    if len(calls) == 2:\n        raise ValueError('no core')\n    bind(number)\n"
            "os.fork, plexus_lite.bind_to_core, plexus_lite.RESPAWN_S = fork_second, bind_later, (0.05, 10.0)"
        )
        proxy = support.Proxy(support.make_config(self.upstream, workers=2))
        proxy.change(change)
        self.addCleanup(proxy.__exit__, None)
        proxy.__enter__()
        wait_until(lambda: len(children(proxy.process.pid)) == 2, "two workers")
        wait_until(lambda: "worker 1: ValueError: no core" in proxy.error_text(), "the reason")
        self.assertIn("worker 0 cannot be started: none left; again in 0.05 s", proxy.error_text())
        self.assertEqual(support.get(proxy.port, "/health").status, 200)

    def test_there_is_no_thread_before_the_fork(self) -> None:
        """Not even one that has been joined: it may still be ending.

        From 3.12 os.fork() warns of it, on stderr.  In 3.8 and 3.9 one that was loading libgcc left a worker behind
        that aborted with its own first thread: two of twelve starts.
        """
        change = (
            "import os, threading\nbegun, start, fork = [], threading.Thread.start, os.fork\n"
            "def note_start(thread):\n    begun.append(thread)\n    start(thread)\n"
            "def fork_alone():\n    assert not begun\n    return fork()\n"
            "threading.Thread.start, os.fork = note_start, fork_alone"
        )
        proxy = support.Proxy(support.make_config(self.upstream, workers=2))
        proxy.change(change, "-W", "always::DeprecationWarning")
        self.addCleanup(proxy.__exit__, None)
        proxy.__enter__()
        wait_until(lambda: len(children(proxy.process.pid)) == 2, "two workers")
        self.assertEqual(support.get(proxy.port, "/health").status, 200)
        self.assertNotIn("Warning", proxy.error_text())

    def test_sigterm_lets_a_running_answer_finish_and_ends_every_process(self) -> None:
        proxy = self.start(self.upstream)
        workers = children(proxy.process.pid)
        pause = support.Pause(threading.Event())
        self.upstream.script(support.stream(b"data: 1\n\n", pause, b"data: 2\n\n"))
        with support.RawClient(proxy.port) as client:
            client.send(support.build_request("POST", "/v1/responses", {"model": "gpt-test", "input": "x"}))
            client.wait_for(b"data: 1")
            proxy.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not is_open(proxy.port), "the port is free for the next program")
            pause.event.set()
            client.wait_for(b"0\r\n\r\n")
        self.assertEqual(proxy.process.wait(10), 0)
        wait_until(lambda: not any(map(is_running, workers)), "the workers end")

    def test_sigterm_while_the_workers_are_started_ends_every_process(self) -> None:
        with support.Proxy(support.make_config(self.upstream, workers=8)) as proxy:
            self.assertEqual(proxy.stop(), 0)

    def test_ctrl_c_reaches_a_worker_once(self) -> None:
        """A terminal signals the whole process group; with the one passed on there would be two, and two cut."""
        proxy = self.start(self.upstream)
        group = os.getpgid(proxy.process.pid)
        wait_until(
            lambda: all(os.getpgid(pid) != group for pid in children(proxy.process.pid)), "workers leave the group"
        )

    def test_sighup_reloads_every_worker_and_nothing_else_does(self) -> None:
        proxy = self.start(self.upstream)
        changed = support.make_config(self.upstream, workers=2)
        changed["providers"]["up"]["models"] = ["gpt-new"]
        proxy.write_config(changed)

        def replace_one() -> None:
            before = self.serving(proxy)
            os.kill(before[0], signal.SIGKILL)
            wait_until(lambda: len(set(children(proxy.process.pid)) - set(before)) == 1, "a new worker")
            self.serving(proxy)

        def counts() -> Tuple[int, int]:
            """Of 8 answers, whichever worker gave them, how many know the old and the new model."""
            answers = [support.get(proxy.port, "/v1/models").body.decode() for _ in range(8)]
            return sum("gpt-test" in one for one in answers), sum("gpt-new" in one for one in answers)

        replace_one()
        self.assertEqual(counts(), (8, 0), "a worker that is replaced read a file that nobody had it read")
        proxy.process.send_signal(signal.SIGHUP)
        wait_until(lambda: counts() == (0, 8), "both reload")
        with open(proxy.config_path, "w", encoding="utf-8") as file:
            file.write("half of a fi")
        replace_one()
        self.assertEqual(counts(), (0, 8), "it went back to what the program began with")
        self.assertEqual(proxy.error_text().count("configuration reloaded"), 1)
        proxy.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "configuration not reloaded: " in proxy.error_text(), "what is wrong")
        self.assertEqual(counts(), (0, 8))

    def test_workers_end_when_their_supervisor_was_killed(self) -> None:
        proxy = self.start(self.upstream)
        workers = children(proxy.process.pid)
        proxy.kill()
        wait_until(lambda: not any(map(is_running, workers)), "the orphans end")

    def test_each_worker_is_bound_to_a_core_unless_told_otherwise(self) -> None:
        if not hasattr(os, "sched_getaffinity"):
            self.skipTest("this system has no CPU affinity")

        def cores(**overrides: Any) -> List[Set[int]]:
            workers = self.serving(self.start(self.upstream, **overrides))
            return [os.sched_getaffinity(pid) for pid in workers]

        free = os.sched_getaffinity(0)
        self.assertEqual(cores(cpu_affinity=False), [free, free])
        bound = cores()
        if support.HAS_GIL:
            self.assertEqual([len(one) for one in bound], [1, 1])
            self.assertEqual(len(set.union(*bound)), min(2, len(free)))
        else:  # its threads run side by side, and one core would take that away
            self.assertEqual(bound, [free, free])


if __name__ == "__main__":
    unittest.main()
