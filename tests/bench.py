"""A small benchmark on loopback: what standing in the middle costs, beside nginx:  python -m tests.bench

    direct       the load generator asks the upstream itself: the bench's own share of each figure, and its ceiling
    nginx        as a bare relay, where it is installed
    plexus_lite  with everything on: keys, strict parsing, JSON, header policy, session headers, access log

Load generator and upstream are Python too, each a process of its own.  The competitors take turns in each round; a
figure is the median of the rounds, "x nginx" the median of the rounds' ratios.  Compare figures of one run only.
--save keeps them, --against shows plexus_lite's ratio to kept ones, --growth draws a plot.  Exit code 1: problems.
"""

import argparse
import bisect
import contextlib
import dataclasses
import datetime
import gc
import heapq
import itertools
import json
import math
import os
import platform
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import plexus_lite
from tests.bench_upstream import END, LIMIT_S, STAMP, clock, tuned
from tests.bench_view import Panel, Row, draw, heading, render_table
from tests.soak import raise_file_limit
from tests.support import PROGRAM, Proxy, make_config
from tests.test_scale_out import PATH, Nginx

TOP = os.path.dirname(PROGRAM)
SHORT = 3  # events of a short answer
SMALL_BYTES, USUAL_BYTES = 700, 60_000  # a question; a coding agent's turn
PARTS = {"p50": 0.5, "p99": 0.99}


@dataclasses.dataclass(frozen=True)
class Scale:
    requests: int = 200  # one after the other
    connections: int = 32
    seconds: float = 0.7  # of short streams
    streams: int = 100
    events: int = 75  # of a paced stream
    interval_s: float = 0.02  # between two of them
    ramp_s: float = 0.5  # in which the streams begin
    flat_events: int = 100_000
    post_bytes: int = 20_000_000
    growth_streams: Sequence[int] = (1, 16, 128, 512, 1000)
    growth_interval_s: float = 0.1
    growth_bytes: Sequence[int] = (1_000, 10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)


# ---- The load generator -----------------------------------------------------------------------------------------


class Answer(NamedTuple):
    is_whole: bool
    first_s: float  # from the begin of the request to the first event
    done_s: float
    late_s: List[float]  # of each paced event, since the upstream sent it


@dataclasses.dataclass
class Client:
    """A connection: *times* requests one after another, the first at *begin_s*; and what came of them."""

    request: bytes
    events: int  # in each answer
    begin_s: float = 0.0
    times: int = 1
    pause_s: float = 0.0  # after an answer
    exchanges: List[Tuple[int, List[Tuple[int, bytes]]]] = dataclasses.field(default_factory=list)  # sent; reads
    failure: str = ""

    def begin(self, sock: socket.socket) -> None:
        self.exchanges.append((clock(), []))
        with contextlib.suppress(OSError):  # the reader will see it
            sock.sendall(self.request)

    def read(self, sock: socket.socket) -> bool:
        """Whether an answer has ended, well or not.  What it says is looked at later, when no time is taken."""
        reads = self.exchanges[-1][1] if self.exchanges else []
        try:
            data = sock.recv(65536)
        except ConnectionError as error:
            data, self.failure = b"", repr(error)
        if not data or not (reads or data.startswith(b"HTTP/1.1 200 ")):
            self.failure = self.failure or repr(data.split(b"\r\n")[0] or "the connection was closed")
            return True
        reads.append((clock(), data))
        return (data if len(data) >= len(END) else b"".join(data for _, data in reads[-len(END) :])).endswith(END)

    def answers(self) -> Iterator[Answer]:
        for sent, reads in self.exchanges:
            raw = b"".join(data for _, data in reads)
            parts, place = [], raw.find(b"\r\n\r\n") + 4
            with contextlib.suppress(ValueError):  # broken off
                while place < len(raw):
                    begin = raw.index(b"\r\n", place) + 2
                    place = begin + int(raw[place:begin], 16) + 2
                    parts.append(raw[begin : place - 2])
            numbers = [int(number) for _, number in STAMP.findall(b"".join(parts))]
            is_whole = raw.endswith(END) and numbers == list(range(self.events))
            # A relay may cut chunks anew anywhere, in a stamp too: that one event is not timed.
            ends = list(itertools.accumulate(len(data) for _, data in reads))
            found = [(reads[bisect.bisect_left(ends, one.end())][0], int(one.group(1))) for one in STAMP.finditer(raw)]
            late_s = [(came - stamp) / 1e9 for came, stamp in found if stamp]
            if is_whole and found:
                yield Answer(True, (found[0][0] - sent) / 1e9, (reads[-1][0] - sent) / 1e9, late_s)
            else:
                yield Answer(False, math.nan, math.nan, late_s)


def drive(port: int, clients: Sequence[Client], until_s: float = LIMIT_S) -> float:
    """Let all *clients* do what they are for, without a new request after *until_s*; return the seconds it took."""
    with contextlib.ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        socks = [stack.enter_context(socket.create_connection(("127.0.0.1", port), 10)) for _ in clients]
        for number, sock in enumerate(socks):
            selector.register(tuned(sock), selectors.EVENT_READ, number)
        gc.disable()  # a collection would stand between an event and its time
        stack.callback(gc.enable)
        start, busy = clock(), len(clients)
        due = sorted((start + int(client.begin_s * 1e9), number) for number, client in enumerate(clients))
        end = start + int(LIMIT_S * 1e9)
        while busy and clock() < end:
            while due and due[0][0] <= clock():
                number = heapq.heappop(due)[1]
                clients[number].begin(socks[number])
            for key, _ in selector.select(((due[0][0] if due else end) - clock()) / 1e9):
                client, sock = clients[key.data], socks[key.data]
                if not client.read(sock):
                    continue
                if client.failure or len(client.exchanges) == client.times or clock() > start + until_s * 1e9:
                    selector.unregister(sock)
                    busy -= 1
                elif client.pause_s:
                    heapq.heappush(due, (clock() + int(client.pause_s * 1e9), key.data))
                else:
                    client.begin(sock)
        return (clock() - start) / 1e9


def make_body(size: int) -> bytes:
    """A request of *size* bytes: a coding agent's conversation, and an image in what goes beyond 200 KB."""
    item = {"type": "function_call_output", "call_id": "call_1", "output": 'def "next"(self):\n    caf\u00e9 = 1\n' * 9}
    image = {"type": "input_image", "image_url": "data:image/png;base64,"}
    items = [item] * (min(size, 200_000) // 600) + [image]
    body = {"model": "gpt-test", "stream": True, "store": False, "prompt_cache_key": "bench", "input": items}
    image["image_url"] += "A" * (size - len(json.dumps(body)))
    return json.dumps(body).encode()


def render(body: bytes, events: int, interval_s: float = 0.0, session: int = 0) -> bytes:
    head = b"POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer sk-client\r\n"
    head += b"Content-Type: application/json\r\nsession-id: 019a0000-0000-7000-8000-%012d\r\n" % session
    return head + b"x-bench: %d %d\r\nContent-Length: %d\r\n\r\n" % (events, int(interval_s * 1e9), len(body)) + body


def streams(count: int, size: int, events: int, interval_s: float, ramp_s: float) -> List[Client]:
    """Paced streams that begin within *ramp_s*; by the golden ratio, so that their phases are spread evenly too."""
    begins, body = [number * 0.6180339887 % 1.0 * ramp_s for number in range(count)], make_body(size)
    return [Client(render(body, events, interval_s, n), events, begin_s) for n, begin_s in enumerate(begins)]


# ---- What is measured -------------------------------------------------------------------------------------------

FULL = Scale()
PACED = f"{FULL.streams} streams x {1 / FULL.interval_s:.0f} events/s: "
ROWS = [
    Row("ttfb_small_p50", "TTFB, small body, p50, us"),
    Row("ttfb_small_p99", "TTFB, small body, p99, us"),
    Row("ttfb_60kb_p50", "TTFB, 60 KB body, p50, us"),
    Row("ttfb_60kb_p99", "TTFB, 60 KB body, p99, us"),
    Row("short", f"short streams, {FULL.connections} connections, requests/s", 1, True),
    Row("late_p50", PACED + "added per event, p50, us"),
    Row("late_p99", PACED + "added per event, p99, us"),
    Row("whole", PACED + "streams whole, %", 100, True),
    Row("stretch", PACED + "wall / ideal", 1),
    Row("flat", "one stream flat out, events/s", 1, True),
    Row("post", f"POST of {FULL.post_bytes // 1_000_000} MB, ms", 1e3),
]
STREAMS = f"streams, {1 / FULL.growth_interval_s:.0f} events/s each"
PANELS = [
    Panel("ttfb", "TTFB beside N streams", STREAMS, FULL.growth_streams),
    Panel("late", "Added to each event of N streams", STREAMS, FULL.growth_streams),
    Panel("body", "TTFB by size of the request", "request body, bytes", FULL.growth_bytes),
]
GROWTH_ROWS = [
    Row(f"{panel.key}_{part}@{value}", f"{panel.title}: {value:,}, {part}, us")
    for panel in PANELS
    for value in panel.values
    for part in PARTS
]


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest rank: the smallest of *values* that at least *share* of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)] if values else math.nan


class Bench:
    def __init__(self, scale: Scale, ports: Mapping[str, int]) -> None:
        self.scale, self.ports = scale, ports
        self.values: Dict[str, Dict[str, List[float]]] = {}  # by a row's key, then by competitor: one a round
        self.problems: List[str] = []

    def load(self, name: str, clients: Sequence[Client], until_s: float = LIMIT_S) -> Tuple[List[Answer], float]:
        wall_s = drive(self.ports[name], clients, until_s)
        answers = [answer for client in clients for answer in client.answers()]
        broken = sum(not answer.is_whole for answer in answers)
        failure = next((client.failure for client in clients if client.failure), "")
        if broken or failure:
            self.problems.append(f"{self.what}: {broken} of {len(answers)} answers are not whole {failure}")
        return answers, wall_s

    def put(self, key: str, name: str, value: float) -> None:
        if math.isfinite(value):
            self.values.setdefault(key, {}).setdefault(name, []).append(value)

    def put_parts(self, key: str, name: str, values: Sequence[float]) -> None:
        """*key* has a place for the part."""
        for part, share in PARTS.items():
            self.put(key.format(part), name, percentile([one for one in values if math.isfinite(one)], share))

    def ttfb(self, name: str, key: str, size: int, times: int) -> None:
        answers, _ = self.load(name, [Client(render(make_body(size), SHORT), SHORT, times=times)])
        self.put_parts(key, name, [answer.first_s for answer in answers])

    def short(self, name: str) -> None:
        requests = [render(make_body(SMALL_BYTES), SHORT, session=number) for number in range(self.scale.connections)]
        clients = [Client(request, SHORT, times=1 << 30) for request in requests]
        answers, wall_s = self.load(name, clients, self.scale.seconds)
        self.put("short", name, sum(answer.is_whole for answer in answers) / wall_s)

    def paced(self, name: str) -> None:
        scale = self.scale
        clients = streams(scale.streams, USUAL_BYTES, scale.events, scale.interval_s, scale.ramp_s)
        answers, wall_s = self.load(name, clients)
        self.put_parts("late_{}", name, [late_s for answer in answers for late_s in answer.late_s])
        self.put("whole", name, sum(answer.is_whole for answer in answers) / scale.streams)
        last_begin_s = max(client.begin_s for client in clients)
        self.put("stretch", name, wall_s / (last_begin_s + (scale.events - 1) * scale.interval_s))

    def flat(self, name: str) -> None:
        events = self.scale.flat_events
        answers, _ = self.load(name, [Client(render(make_body(SMALL_BYTES), events), events)])
        self.put("flat", name, events / answers[0].done_s)

    def post(self, name: str) -> None:
        answers, _ = self.load(name, [Client(render(make_body(self.scale.post_bytes), SHORT), SHORT, times=3)])
        self.put("post", name, statistics.median(answer.done_s for answer in answers))

    def beside(self, name: str, count: int) -> None:
        """Streams; once all have begun, short requests beside them, as far apart as to be no load."""
        interval_s, events = self.scale.growth_interval_s, 20
        ramp_s, until_s = 10 * interval_s, events * interval_s
        probe = Client(render(make_body(SMALL_BYTES), SHORT), SHORT, ramp_s, times=1 << 30, pause_s=interval_s / 20)
        clients = streams(count, SMALL_BYTES, events, interval_s, ramp_s)
        answers, _ = self.load(name, [*clients, probe], until_s)
        self.put_parts(f"ttfb_{{}}@{count}", name, [answer.first_s for answer in answers[count:]])
        self.put_parts(f"late_{{}}@{count}", name, [late_s for answer in answers for late_s in answer.late_s])

    def plan(self, is_growth: bool) -> Iterator[Tuple[Any, ...]]:
        """Yield each measurement: a method, and what it takes besides a competitor."""
        if is_growth:
            yield from ((self.beside, count) for count in self.scale.growth_streams)
            for size in self.scale.growth_bytes:
                yield self.ttfb, f"body_{{}}@{size}", size, max(3, min(100, 20_000_000 // size))
        else:
            yield self.ttfb, "ttfb_small_{}", SMALL_BYTES, self.scale.requests
            yield self.ttfb, "ttfb_60kb_{}", USUAL_BYTES, self.scale.requests
            yield from ((method,) for method in (self.short, self.paced, self.flat, self.post))

    def run(self, rounds: int, is_growth: bool) -> None:
        self.what = "warm-up"
        self.flat("direct")  # the upstream makes such an answer once
        self.values.clear()
        for method, *given in itertools.chain.from_iterable(self.plan(is_growth) for _ in range(rounds)):
            for name in self.ports:
                self.what = " ".join(map(str, [name, method.__name__, *given]))
                try:
                    method(name, *given)
                except OSError as error:
                    self.problems.append(f"{self.what}: {error!r}")


# ---- Who is measured --------------------------------------------------------------------------------------------


class Relay(Nginx):
    """nginx with connections enough, persistent ones to the upstream; it reads a body whole, as it does by default."""

    server_line = Nginx.server_line + "        keepalive 1024;\n        keepalive_requests 10000000;\n"
    template = (
        Nginx.template.replace("events {}", "worker_rlimit_nofile 8192;\nevents { worker_connections 4096; }")
        .replace("$connection_upgrade;", '"";')
        .replace("proxy_request_buffering off", "keepalive_requests 10000000; client_body_buffer_size 1m")
    )


@contextlib.contextmanager
def upstream() -> Iterator[int]:
    command = [sys.executable, "-m", "tests.bench_upstream"]
    with subprocess.Popen(command, cwd=TOP, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        timer = threading.Timer(20, process.kill)  # so that the wait for its port ends
        timer.start()
        try:
            assert process.stdout
            port = int(process.stdout.readline())
            timer.cancel()
            yield port
        finally:
            process.kill()


@contextlib.contextmanager
def competitors(with_nginx: bool) -> Iterator[Dict[str, int]]:
    """Yield the port of each."""
    with contextlib.ExitStack() as stack:
        ports = {"direct": stack.enter_context(upstream())}
        if with_nginx:
            ports["nginx"] = stack.enter_context(Relay([ports["direct"]])).port
        log = os.path.join(stack.enter_context(tempfile.TemporaryDirectory()), "access.log")
        config = make_config(f"http://127.0.0.1:{ports['direct']}/v1")
        ports["plexus_lite"] = stack.enter_context(Proxy(config, args=["--log-file", log])).port
        yield ports


def measure(scale: Scale, rounds: int, nginx: Optional[str], is_growth: bool = False) -> Dict[str, Any]:
    """Return the figures, with where and by what they came about; *nginx* is its program, None to leave it out."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        model = next((text.split(":", 1)[1].strip() for text in file if text.startswith("model name")), model)
    said = subprocess.run([nginx, "-v"], capture_output=True, text=True, timeout=10).stderr if nginx else ""
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{model}, {os.cpu_count()} cores",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "nginx": said.strip().rpartition("/")[2] or None,
        "plexus_lite": plexus_lite.__version__,
        "rounds": rounds,
    }
    with competitors(bool(nginx)) as ports:
        bench = Bench(scale, ports)
        bench.run(rounds, is_growth)
    return dict(result, values=bench.values, problems=bench.problems)


# ---- Command line -----------------------------------------------------------------------------------------------


def main(arguments: Optional[Sequence[str]] = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="What standing in the middle costs.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--save", metavar="FILE", help="keep the figures, as JSON")
    parser.add_argument("--against", metavar="FILE", help="show plexus_lite's ratio to figures that were kept")
    parser.add_argument("--json", action="store_true", help="print JSON, not the table")
    parser.add_argument("--growth", action="store_true", help="by number of streams and size of body; about 3 minutes")
    parser.add_argument("--svg", metavar="FILE", default=os.path.join(TOP, "tests", "growth.svg"), help="its plot")
    options = parser.parse_args(arguments)
    then = json.loads(Path(options.against).read_text(encoding="utf-8")) if options.against else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that nothing is left running
    if os.name == "posix":
        raise_file_limit()
    nginx = shutil.which("nginx", path=PATH) if os.name == "posix" else None  # it inherits a socket
    result = measure(FULL, options.rounds, nginx, options.growth)
    as_json = json.dumps(result, indent=1)
    if options.save:
        Path(options.save).write_text(as_json + "\n", encoding="utf-8")
    if options.growth:
        Path(options.svg).write_text(draw(PANELS, result), encoding="utf-8")
    table = render_table(GROWTH_ROWS if options.growth else ROWS, result, then)
    print(as_json if options.json else f"{heading(result)}\n{table}")
    return 1 if result["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
