"""The benchmark's upstream, a process of its own:  python -m tests.bench_upstream

Prints its port, then answers until the standard input ends, so that it does not outlive a parent that is killed.  The
x-bench field of a request says how many events it gets, and how many ns apart.  Bodies are read and not kept.
"""

import contextlib
import gc
import heapq
import os
import re
import selectors
import socket
import sys
import threading
import time
from typing import Any, Dict, Generator, List, Optional, Tuple

from tests.support import message_item, response_object, sse

LIMIT_S = 30.0  # of one wait
clock = time.perf_counter_ns  # the same for all processes of a machine


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


RESPONSE = response_object([message_item("Hello from the upstream.")])
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
BEGIN = HEAD + chunk(sse("response.created", response=dict(RESPONSE, status="in_progress", output=[], usage=None)))
EVENT = sse("response.output_text.delta", item_id="msg_1", output_index=0, delta="@%020d,%08d@" + "x" * 60)
EVENT = b"%x\r\n%s\r\n" % (len(EVENT % (0, 0)), EVENT)
STAMP = re.compile(rb"@([0-9]{20}),([0-9]{8})@")  # when the event was sent (0: nobody asks), and its number
END = b"\r\n0\r\n\r\n"
FINISH = chunk(sse("response.completed", response=RESPONSE)) + END[2:]


def read_requests() -> Generator[Optional[Tuple[int, int]], bytes, None]:
    """Take what comes; for each complete request yield its x-bench field: events, ns between two of them (0: none)."""
    plan = None
    while True:
        head = b""
        while b"\r\n\r\n" not in head:
            head += yield plan
            plan = None
        head, _, rest = head.partition(b"\r\n\r\n")
        fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:])
        missing = int(fields[b"content-length"]) - len(rest)
        while missing:
            missing -= len((yield None))
        events, interval = fields[b"x-bench"].split()
        plan = int(events), int(interval)


def serve() -> None:
    gc.disable()  # a collection would stand between an event and its time
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    due: List[Tuple[int, int, int, socket.socket, Tuple[int, int]]] = []  # when, a tie's end, number, to whom, plan
    whole: Dict[int, bytes] = {}  # answers without pauses, by number of events
    print(listener.getsockname()[1], flush=True)
    while True:
        for key, _ in selector.select((due[0][0] - clock()) / 1e9 if due else None):
            sock: Any = key.fileobj
            if sock is listener:
                reader = read_requests()
                next(reader)
                selector.register(tuned(listener.accept()[0]), selectors.EVENT_READ, reader)
                continue
            with contextlib.suppress(ConnectionError):
                data = sock.recv(65536)
                if not data:
                    selector.unregister(sock)
                    sock.close()
                    continue
                plan = key.data.send(data)
                if plan and plan[1]:
                    sock.sendall(BEGIN)
                    heapq.heappush(due, (clock(), id(sock), 0, sock, plan))
                elif plan:
                    if plan[0] not in whole:
                        whole[plan[0]] = BEGIN + b"".join(EVENT % (0, number) for number in range(plan[0])) + FINISH
                    sock.sendall(whole[plan[0]])
        now = clock()
        while due and due[0][0] <= now:  # late ones do not keep new requests waiting
            when, tie, number, sock, (events, interval) = heapq.heappop(due)
            with contextlib.suppress(OSError):  # the client has left
                is_last = number + 1 == events
                sock.sendall(EVENT % (clock(), number) + (FINISH if is_last else b""))
                if not is_last:
                    heapq.heappush(due, (when + interval, tie, number + 1, sock, (events, interval)))


def tuned(sock: socket.socket) -> socket.socket:
    sock.settimeout(LIMIT_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sock


if __name__ == "__main__":
    serve()
