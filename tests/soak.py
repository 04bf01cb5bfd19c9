"""Load, faults and slow peers for about two minutes; afterwards nothing may be left behind:  python -m tests.soak

    streams     500 at a time for 30 s; one in a hundred loses its client, one in a hundred its upstream
    short       5,000 requests, half of them on connections of their own
    connect     2,000 connections that close without a word
    beside      1,000 idle connections and 200 that send a byte at a time, beside normal requests; first with room for
                all, then with the standard max_connections, where idle ones have to give way
    stopped     a client that stops reading in the middle of 300 MB

Prints a table of what was measured; exit code 1 if something was left or went wrong.  Linux: it reads /proc.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import socket
import struct
import sys
import time
from typing import Any, AsyncIterator, Awaitable, Callable, Dict, Iterable, Iterator, List, Optional, Tuple

from tests.support import HAS_GIL, Proxy, chunk, make_config

MIB = 1024 * 1024
BROKEN = (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError)
EVENT = b"event: response.output_text.delta\ndata: %d\n\n"
FLOOD = b"event: response.output_text.delta\ndata: " + b"x" * 65000 + b"\n\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Scale:
    streams: int = 500
    streams_s: float = 30.0
    stream_s: float = 3.0  # one stream; then the next takes its place
    event_s: float = 0.25  # between two events of a stream
    fault_rate: float = 0.01  # of the streams, each kind
    short: int = 5000
    connects: int = 2000
    idle: int = 1000
    slow: int = 200
    beside_s: float = 12.0
    flood_bytes: int = 300 * MIB
    growth_bytes: int = 8 * MIB if HAS_GIL else 96 * MIB  # else what is free is given back late
    pool_idle_s: float = 1.0
    stopped_s: float = 1.0  # an upstream that cannot write for so long has been stopped


@dataclasses.dataclass
class Report:
    rows: List[Tuple[str, str, str]] = dataclasses.field(default_factory=list)  # phase, figure, value
    failures: List[str] = dataclasses.field(default_factory=list)

    def add(self, phase: str, figure: str, value: str) -> None:
        self.rows.append((phase, figure, value))

    def check(self, condition: object, failure: str) -> None:
        if not condition and failure not in self.failures[-10:]:  # one of its kind is enough to read
            self.failures.append(failure)

    def render(self) -> str:
        lines = [f"{phase:<10} {figure:<44} {value}" for phase, figure, value in self.rows]
        return "\n".join(lines + ["FAILED: " + failure for failure in self.failures])


# ---- What the system says about the proxy -------------------------------------------------------


def count_files(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def count_threads(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def resident_bytes(pid: int) -> int:
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


async def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Look every 50 ms whether *condition* holds, for *limit_s* at most."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.05)
    return True


def percentiles(seconds: List[float]) -> str:
    ordered = sorted(seconds)
    if not ordered:
        return "none"
    p50, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    return f"p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms, most {ordered[-1] * 1000:.1f} ms"


# ---- The upstream: does what the request's "input" says -------------------------------------------


def break_off(writer: asyncio.StreamWriter) -> None:
    """Close with RST."""
    with contextlib.suppress(OSError):
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


class Upstream:
    """An asyncio server: short answers, timed streams, streams that are reset, floods."""

    def __init__(self) -> None:
        self.open = 0
        self.flooded = 0  # bytes of the last flood that have been taken

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
                plan = json.loads(await reader.readexactly(int(length.split(b":")[1])))["input"]
                await self.reply(plan, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the proxy closed it, or the test is over
        finally:
            self.open -= 1
            writer.close()

    async def reply(self, plan: Dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if "events" not in plan and "flood" not in plan:
            body = b'{"id":"resp_1","object":"response","usage":null}'
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body))
            writer.write(body)
            return
        writer.write(STREAM_HEAD)
        self.flooded = 0
        while self.flooded < plan.get("flood", 0):
            writer.write(chunk(FLOOD))
            await writer.drain()
            self.flooded += len(FLOOD)
        for number in range(plan.get("events", 0)):
            if number == plan["reset_at"]:
                break_off(writer)
                raise ConnectionResetError
            writer.write(chunk(EVENT % number))
            await writer.drain()
            await asyncio.sleep(plan["every_s"])
        writer.write(b"0\r\n\r\n")


# ---- The clients ----------------------------------------------------------------------------------


def render(plan: Dict[str, Any]) -> bytes:
    body = json.dumps({"model": "gpt-test", "stream": True, "input": plan}).encode()
    head = b"POST /v1/responses HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer sk-client\r\n"
    return head + b"session-id: s%d\r\nContent-Length: %d\r\n\r\n" % (random.randrange(1000), len(body)) + body


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


async def read_short(reader: asyncio.StreamReader) -> int:
    """Read an answer with Content-Length; return its status."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:"))
    await reader.readexactly(int(length.split(b":")[1]))
    return int(head.split(b" ", 2)[1])


class Soak:
    def __init__(self, scale: Scale, seed: int = 1) -> None:
        self.scale = scale
        self.random = random.Random(seed)
        self.report = Report()
        self.upstream = Upstream()
        self.proxy: Proxy

    # -- one request ----------------------------------------------------

    async def short(self, latencies: List[float]) -> None:
        started = time.monotonic()
        try:
            async with connected(self.proxy.port) as (reader, writer):
                writer.write(render({}))
                status = await asyncio.wait_for(read_short(reader), 20)
                self.report.check(status == 200, f"a short request got {status}")
        except BROKEN as error:
            self.report.check(False, f"a short request failed: {error!r}")
        latencies.append(time.monotonic() - started)

    async def stream(self, fate: str) -> None:
        """One stream; *fate* is "whole", "left" (by its client) or "reset" (by its upstream)."""
        count = max(4, int(self.scale.stream_s / self.scale.event_s))
        middle = self.random.randrange(1, count - 1)
        plan = {"events": count, "every_s": self.scale.event_s, "reset_at": middle if fate == "reset" else -1}
        got = b""
        async with connected(self.proxy.port) as (reader, writer):
            writer.write(render(plan))
            with contextlib.suppress(*BROKEN):
                while not got.endswith(b"\r\n0\r\n\r\n"):
                    data = await asyncio.wait_for(reader.read(65536), 20)
                    if not data:
                        break
                    got += data
                    if fate == "left" and got.count(b"data: ") >= middle:
                        if middle % 2:
                            break_off(writer)
                        return
        whole = got.endswith(b"\r\n0\r\n\r\n")
        events = [b"data: %d\n" % number in got for number in range(count)]
        if fate == "whole":
            self.report.check(whole and all(events), f"a stream came short: {got[-200:]!r}")
        else:
            self.report.check(not whole and all(events[:middle]), f"a broken stream ended cleanly: {got[-200:]!r}")

    # -- phases ---------------------------------------------------------

    async def streams(self, seconds: float) -> Dict[str, int]:
        end = time.monotonic() + seconds
        fates: Dict[str, int] = {"whole": 0, "left": 0, "reset": 0}

        async def one_after_the_other() -> None:
            await asyncio.sleep(self.random.random() * min(1.0, seconds / 2))
            while time.monotonic() < end:
                chance = self.random.random()
                rate = self.scale.fault_rate
                fate = "left" if chance < rate else "reset" if chance < 2 * rate else "whole"
                fates[fate] += 1
                await self.stream(fate)

        await together(one_after_the_other() for _ in range(self.scale.streams))
        return fates

    async def shorts(self, count: int) -> List[float]:
        """Half on connections of their own, half on 20 persistent ones."""
        latencies: List[float] = []

        async def own(number: int) -> None:
            for _ in range(number):
                await self.short(latencies)

        async def persistent(number: int) -> None:
            async with connected(self.proxy.port) as (reader, writer):
                for _ in range(number):
                    started = time.monotonic()
                    writer.write(render({}))
                    status = await asyncio.wait_for(read_short(reader), 20)
                    self.report.check(status == 200, f"a short request got {status}")
                    latencies.append(time.monotonic() - started)

        await together([*(own(count // 40) for _ in range(20)), *(persistent(count // 40) for _ in range(20))])
        self.report.check(len(latencies) == count // 40 * 40, f"only {len(latencies)} short requests")
        return latencies

    async def connects(self, count: int) -> None:
        async def some() -> None:
            for number in range(count // 20):
                _, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
                if number % 2:
                    break_off(writer)
                else:
                    writer.close()

        await together(some() for _ in range(20))

    async def beside(self, phase: str, idle: int, slow: int, seconds: float, wanted_open: int) -> None:
        """Normal requests while *idle* connections say nothing and *slow* ones send a byte at a time."""
        alone = [0.0] * 0
        for _ in range(min(50, slow)):
            await self.short(alone)
        end = time.monotonic() + seconds
        latencies: List[float] = []
        most_open, timed_out = 0, 0
        quiet: List[asyncio.StreamWriter] = []

        async def slowly() -> None:
            nonlocal timed_out
            is_cut = False  # once at least, also where that takes longer
            while time.monotonic() < end + 10 * (not is_cut):
                reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
                answer = asyncio.ensure_future(reader.read(65536))
                for byte in b"POST /v1/responses HTTP/1.1\r\nx-slow: " + b"a" * 10000:
                    with contextlib.suppress(ConnectionError):
                        writer.write(bytes([byte]))
                    await asyncio.wait([answer], timeout=0.2)
                    if answer.done() or time.monotonic() > end + 10 * (not is_cut):
                        break
                if answer.done():
                    with contextlib.suppress(ConnectionError):
                        is_cut = answer.result().startswith(b"HTTP/1.1 408 ")
                        timed_out += is_cut
                answer.cancel()
                writer.close()

        async def normally() -> None:
            nonlocal most_open
            while time.monotonic() < end:
                await self.short(latencies)
                most_open = max(most_open, count_files(self.proxy.process.pid))
                await asyncio.sleep(0.02)

        for number in range(idle):
            _, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port)
            if number % 2:  # idle after a request
                writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            quiet.append(writer)
            if number % 50 == 0:
                await asyncio.sleep(0)
        try:
            await together([normally(), *(slowly() for _ in range(slow))])
        finally:
            for writer in quiet:
                writer.close()
        self.report.add(phase, "requests alone", percentiles(alone))
        self.report.add(phase, f"requests beside {idle} idle, {slow} slow", percentiles(latencies))
        self.report.add(phase, "open files of the proxy, most", str(most_open))
        self.report.add(phase, "slow connections ended with 408", str(timed_out))
        self.report.check(most_open >= wanted_open, f"{phase}: only {most_open} open files, expected {wanted_open}")
        self.report.check(timed_out >= slow, f"{phase}: only {timed_out} slow connections were ended")
        self.report.check(max(latencies) < 2.0, f"{phase}: a normal request took {max(latencies):.1f} s")

    async def stopped_reader(self) -> None:
        pid = self.proxy.process.pid
        before = resident_bytes(pid)
        reader, writer = await asyncio.open_connection("127.0.0.1", self.proxy.port, limit=65536)
        writer.write(render({"flood": self.scale.flood_bytes}))
        await reader.readuntil(b"\r\n\r\n")
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        most = seen = 0
        quiet_since = time.monotonic()
        while time.monotonic() - quiet_since < self.scale.stopped_s:  # until the upstream can write no more
            most = max(most, resident_bytes(pid))
            if self.upstream.flooded != seen:
                seen, quiet_since = self.upstream.flooded, time.monotonic()
            await asyncio.sleep(0.02)
        self.report.add("stopped", "growth of the proxy, most", f"{(most - before) / MIB:.1f} MiB")
        self.report.add("stopped", "taken from the upstream before it stopped", f"{seen / MIB:.1f} MiB")
        self.report.check(most - before < self.scale.growth_bytes, f"stopped: grew by {(most - before) / MIB:.1f} MiB")
        # What stands in the sockets' buffers, which grow to a few MiB each, is not the proxy's.
        self.report.check(seen < min(self.scale.flood_bytes, 32 * MIB), "stopped: the upstream was not slowed down")
        started = time.monotonic()
        writer.transport.resume_reading()  # type: ignore[attr-defined]
        total, tail = 0, b""
        while not tail.endswith(b"\r\n0\r\n\r\n"):
            data = await asyncio.wait_for(reader.read(MIB), 20)
            if not data:
                break
            total += len(data)
            tail = (tail + data)[-8:]
            most = max(most, resident_bytes(pid))
        writer.close()
        self.report.check(total > self.scale.flood_bytes, f"stopped: only {total} bytes came in the end")
        self.report.add("stopped", "the rest, once read", f"{total / MIB / (time.monotonic() - started):.0f} MiB/s")
        self.report.add("stopped", "growth of the proxy, to the end", f"{(most - before) / MIB:.1f} MiB")

    # -- before and after -----------------------------------------------

    async def start(self) -> Tuple[int, int]:
        """Return how many files and threads the proxy has, now that it has begun to serve and rests."""
        pid = self.proxy.process.pid
        async with connected(self.proxy.port) as (reader, writer):
            writer.write(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
            await read_short(reader)
            files = count_files(pid) - 1  # this connection is one of them
        return files, count_threads(pid)

    async def settle(self, phase: str, files: int, threads: int) -> None:
        """Wait until the proxy has as few open files and threads as at the start."""
        pid = self.proxy.process.pid
        started = time.monotonic()
        settled = await wait_until(lambda: count_files(pid) <= files and count_threads(pid) <= threads, 15)
        now = f"{count_files(pid)} files, {count_threads(pid)} threads"
        self.report.add(phase, "left after it", f"{now} (at the start {files}, {threads})")
        self.report.add(phase, "after", f"{time.monotonic() - started:.1f} s")
        self.report.check(settled, f"{phase}: left behind: {now}; at the start {files}, {threads}")

    async def run(self, proxy: Proxy) -> None:
        scale, report, self.proxy = self.scale, self.report, proxy
        pid = proxy.process.pid
        files, threads = await self.start()
        await self.streams(min(3.0, scale.streams_s / 4))  # the warm-up
        await self.shorts(scale.short // 10)
        await self.settle("warm-up", files, threads)
        warm = resident_bytes(pid)
        fates = await self.streams(scale.streams_s)
        report.add("streams", "whole, client left, upstream reset", "{whole}, {left}, {reset}".format(**fates))
        report.check(fates["left"] and fates["reset"], "streams: none was disturbed")
        report.add("streams", "threads, most of all", str(count_threads(pid)))
        started = time.monotonic()
        latencies = await self.shorts(scale.short)
        report.add(
            "short", "requests", f"{len(latencies)}, {len(latencies) / (time.monotonic() - started):.0f} a second"
        )
        report.add("short", "latency, 40 at a time", percentiles(latencies))
        await self.connects(scale.connects)
        await self.settle("connect", files, threads)
        now = resident_bytes(pid)
        report.add("connect", "memory after warm-up, now", f"{warm / MIB:.1f} MiB, {now / MIB:.1f} MiB")
        report.check(now < warm * 1.1 + MIB, f"memory: {warm} grew to {now} bytes")
        await self.beside("beside", scale.idle, scale.slow, scale.beside_s, scale.idle + scale.slow)
        await self.stopped_reader()
        await self.settle("stopped", files, threads)
        report.add("end", "memory", f"{resident_bytes(pid) / MIB:.1f} MiB")

    async def run_full(self, proxy: Proxy, limit: int) -> None:
        """Again with more connections than the proxy may have."""
        self.proxy = proxy
        files, threads = await self.start()
        idle = max(self.scale.idle, limit)
        await self.beside("full", idle, self.scale.slow, self.scale.beside_s, limit)
        await self.settle("full", files, threads)


async def together(tasks: Iterable[Awaitable[None]]) -> None:
    """Run them all to their end, and then raise the first error that one of them had."""
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, BaseException):
            raise result


@contextlib.contextmanager
def running(soak: Soak) -> Iterator[Tuple[str, Callable[[Awaitable[None]], Any]]]:
    """Yield the upstream's URL and a function that runs a phase to its end beside it."""
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(soak.upstream.serve, "127.0.0.1", 0, backlog=1024))
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1", loop.run_until_complete
    finally:
        server.close()
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.wait(tasks, timeout=5))
        loop.run_until_complete(asyncio.sleep(0))  # lets the last transports close
        loop.close()


def soak(scale: Scale) -> Report:
    """Run it all; the report says what failed."""
    test = Soak(scale)
    full = 1024 if scale.idle >= 1000 else scale.slow * 5 // 2  # room for all but the idle ones
    limits: Dict[str, Any] = {"header_timeout_s": min(5, scale.beside_s / 3), "pool_idle_s": scale.pool_idle_s}
    with running(test) as (url, run):
        try:
            with Proxy(make_config(url, limits=dict(limits, max_connections=4000))) as proxy:
                run(test.run(proxy))
            if full != 1024:
                limits["max_connections"] = full
            with Proxy(make_config(url, limits=limits)) as proxy:
                run(test.run_full(proxy, full))
        except AssertionError as error:  # the proxy's whole log, a traceback at its end
            test.report.failures.append(str(error)[-3000:])
    return test.report


def raise_file_limit() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 8192 if hard == resource.RLIM_INFINITY else min(8192, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description="Load, faults, slow peers; then: what is left?"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="how long the streams go on (30)")
    options = parser.parse_args(arguments)
    if not os.path.isdir("/proc/self/fd"):
        print("this needs /proc")
        return 2
    raise_file_limit()
    started = time.monotonic()
    report = soak(Scale(streams_s=options.seconds))
    print(report.render())
    print(f"{'FAILED' if report.failures else 'passed'} in {time.monotonic() - started:.0f} s")
    return 1 if report.failures else 0


if __name__ == "__main__":
    sys.exit(main())
