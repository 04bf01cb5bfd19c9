"""What the tests share: a scriptable fake upstream, a strict raw client, and the proxy as a subprocess.

    FakeUpstream   records each request as it stood on the wire, answers with scripted steps
    RawClient      sends bytes, reads answers with a strict parser, says whether an answer was complete
    Proxy          runs plexus_lite.py in a folder of its own, collects its log

Nothing here sleeps: every wait is on an event, a condition or a socket, and every wait ends.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from typing import IO, Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import plexus_lite

PROGRAM = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "plexus_lite.py")
PAUSE_LIMIT_S = 30.0
HAS_GIL = getattr(sys, "_is_gil_enabled", lambda: True)()  # false in free-threaded builds
Headers = Union[Mapping[str, str], Sequence[Tuple[str, str]]]


# ---- Messages ---------------------------------------------------------------------------------------------------


class Fields:
    """Look-ups without case for a class that has *headers* and *body*."""

    headers: List[Tuple[str, str]]
    body: bytes

    def all(self, name: str) -> List[str]:
        return [value for key, value in self.headers if key.lower() == name.lower()]

    def header(self, name: str) -> Optional[str]:
        return next(iter(self.all(name)), None)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Recorded(Fields):
    """One request: names, values, order and duplicates as on the wire; the body without its framing."""

    method: str
    target: str
    headers: List[Tuple[str, str]]
    body: bytes
    connection: int  # 1 is the first connection that the upstream accepted


@dataclass
class Answer(Fields):
    """One answer; *complete* is False if the connection ended before the framing said so."""

    status: int
    reason: str
    headers: List[Tuple[str, str]]
    body: bytes = b""
    complete: bool = False
    chunks: List[bytes] = field(default_factory=list)  # of a chunked answer, the last one of length 0 left out
    interim: List[int] = field(default_factory=list)  # 1xx statuses that came before

    @property
    def error_code(self) -> Optional[str]:
        return str(self.json()["error"]["code"])


class Wire:
    """A socket with a read buffer and the little of RFC 9112 that both sides share.  Reading past the end: EOFError."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.buffer = bytearray()  # a bytes object would copy a large body once for each read

    def fill(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError(f"connection closed, {len(self.buffer)} bytes unread")
        self.buffer += data

    def take(self, size: int) -> bytes:
        while len(self.buffer) < size:
            self.fill()
        data = bytes(self.buffer[:size])
        del self.buffer[:size]
        return data

    def take_line(self) -> str:
        while b"\r\n" not in self.buffer:
            self.fill()
        return self.take(self.buffer.index(b"\r\n") + 2)[:-2].decode("latin-1")

    def take_fields(self) -> List[Tuple[str, str]]:
        fields = []
        for line in iter(self.take_line, ""):
            match = re.match(r"^([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*(.*?)[ \t]*$", line)
            assert match, f"not a field line: {line!r}"
            fields.append((match.group(1), match.group(2)))
        return fields

    def take_chunks(self) -> Iterator[bytes]:
        while True:
            line = self.take_line()
            assert re.match(r"^[0-9A-Fa-f]+[ \t]*(;.*)?$", line), f"not a chunk size: {line!r}"
            size = int(line.split(";")[0], 16)
            if not size:
                self.take_fields()
                return
            yield self.take(size)
            assert self.take(2) == b"\r\n", "a chunk longer than its size"

    def read_request(self, number: int) -> Recorded:
        """Read a request from connection *number*."""
        method, target, version = self.take_line().split(" ")
        assert version == "HTTP/1.1", version
        got = Recorded(method, target, self.take_fields(), b"", number)
        if (got.header("Transfer-Encoding") or "").lower() == "chunked":
            got.body = b"".join(self.take_chunks())
        else:
            got.body = self.take(int(got.header("Content-Length") or 0))
        return got

    def read_answer(self, method: str = "POST") -> Answer:
        """Read one final answer to a *method* request; EOFError if the connection ends before its head does."""
        interim: List[int] = []
        while True:
            match = re.match(r"^HTTP/1\.1 ([1-9][0-9]{2}) (.*)$", self.take_line())
            assert match, "not a status line"
            got = Answer(int(match.group(1)), match.group(2), self.take_fields(), interim=interim)
            if got.status >= 200 or got.status == 101:
                break
            interim.append(got.status)
        lengths, codings = got.all("Content-Length"), got.all("Transfer-Encoding")
        assert len(lengths) + len(codings) <= 1, f"two framings: {got.headers!r}"
        try:
            if method == "HEAD" or got.status in (101, 204, 304):
                pass  # no body, whatever the fields say
            elif codings:
                assert codings == ["chunked"], codings
                for chunk in self.take_chunks():
                    got.chunks.append(chunk)
            elif lengths:
                got.body = self.take(int(lengths[0]))
            else:
                got.body = self.take_rest()
            got.complete = True
        except (EOFError, ConnectionError):
            got.body = self.take(len(self.buffer))  # of a chunked answer: the chunk that began, without its end
        got.body = b"".join(got.chunks) + got.body
        return got

    def take_rest(self) -> bytes:
        try:
            while True:
                self.fill()
        except EOFError:
            return self.take(len(self.buffer))


def pairs(headers: Headers) -> List[Tuple[str, str]]:
    return list(headers.items() if isinstance(headers, Mapping) else headers)


def render_head(first_line: str, headers: Headers) -> bytes:
    lines = [first_line] + ["{}: {}".format(*pair) for pair in pairs(headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


# ---- Replies: a list of steps -----------------------------------------------------------------------------------


@dataclass
class Pause:
    """Wait until *event* is set (at most 30 s); the reply ends here if the peer goes away meanwhile."""

    event: threading.Event


class Cut:
    """Close the connection (FIN)."""


class Reset:
    """Close the connection with RST."""


Step = Union[bytes, Pause, Cut, Reset]
Reply = Sequence[Step]


def answer(status: int = 200, headers: Headers = (), body: Any = b"") -> List[Step]:
    """A whole answer with Content-Length in one send; a *body* that is not bytes is sent as JSON."""
    given = pairs(headers)
    if not isinstance(body, bytes):
        body = json.dumps(body).encode()
        given.insert(0, ("Content-Type", "application/json"))
    return [render_head(f"HTTP/1.1 {status} Scripted", given + [("Content-Length", str(len(body)))]) + body]


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def stream(*events: Step, headers: Headers = (), end: bool = True, status: int = 200) -> List[Step]:
    """A chunked event stream, one chunk and one send for each bytes step; without *end* the last chunk is missing."""
    given = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")] + pairs(headers)
    steps: List[Step] = [render_head(f"HTTP/1.1 {status} Scripted", given)]
    steps += [chunk(event) if isinstance(event, bytes) else event for event in events]
    return steps + [b"0\r\n\r\n"] if end else steps


def sse(type: str, **data: Any) -> bytes:
    payload = json.dumps(dict(data, type=type), ensure_ascii=False)
    return f"event: {type}\ndata: {payload}\n\n".encode()


def message_item(text: str, item_id: str = "msg_1") -> Dict[str, Any]:
    part = {"type": "output_text", "text": text, "annotations": []}
    return {"type": "message", "id": item_id, "role": "assistant", "status": "completed", "content": [part]}


def response_object(
    output: Sequence[Mapping[str, Any]],
    model: str = "gpt-test",
    response_id: str = "resp_1",
    input_tokens: int = 2048,
    cached_tokens: int = 1920,
) -> Dict[str, Any]:
    usage = {
        "input_tokens": input_tokens,
        "input_tokens_details": {"cached_tokens": cached_tokens},
        "output_tokens": 8,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": input_tokens + 8,
    }
    return {
        "id": response_id,
        "object": "response",
        "created_at": 1700000000,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": model,
        "output": list(output),
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "tools": [],
        "usage": usage,
    }


def response_events(response: Mapping[str, Any]) -> List[bytes]:
    """The event sequence with which the Responses API streams *response*."""
    numbers = iter(range(1 << 30))
    started = dict(response, status="in_progress", output=[], usage=None)
    events = [
        sse("response.created", sequence_number=next(numbers), response=started),
        sse("response.in_progress", sequence_number=next(numbers), response=started),
    ]

    def add(type: str, **data: Any) -> None:
        events.append(sse(type, sequence_number=next(numbers), **data))

    for index, item in enumerate(response["output"]):
        place = {"output_index": index, "item_id": item["id"]}
        begun = dict(item, status="in_progress", **({"content": []} if item["type"] == "message" else {}))
        add("response.output_item.added", output_index=index, item=begun)
        for number, part in enumerate(item["content"] if item["type"] == "message" else ()):
            add("response.content_part.added", content_index=number, part=dict(part, text=""), **place)
            for word in re.findall(r"\S+\s*", part["text"]):
                add("response.output_text.delta", content_index=number, delta=word, logprobs=[], **place)
            add("response.output_text.done", content_index=number, text=part["text"], logprobs=[], **place)
            add("response.content_part.done", content_index=number, part=part, **place)
        if item["type"] == "function_call":
            add("response.function_call_arguments.delta", delta=item["arguments"], **place)
            add("response.function_call_arguments.done", arguments=item["arguments"], name=item["name"], **place)
        add("response.output_item.done", output_index=index, item=item)
    add("response.completed", response=response)
    return events


def chat_answer(model: str, streamed: bool, text: str) -> List[Step]:
    usage = {
        "prompt_tokens": 2048,
        "completion_tokens": 8,
        "total_tokens": 2056,
        "prompt_tokens_details": {"cached_tokens": 1920},
    }
    base = {"id": "chatcmpl-1", "created": 1700000000, "model": model}

    def choice(name: str, value: Mapping[str, str], reason: Optional[str]) -> List[Dict[str, Any]]:
        return [{"index": 0, name: value, "finish_reason": reason}]

    if not streamed:
        whole = choice("message", {"role": "assistant", "content": text}, "stop")
        return answer(200, (), dict(base, object="chat.completion", choices=whole, usage=usage))
    base["object"] = "chat.completion.chunk"
    deltas = [
        dict(base, choices=choice("delta", {"role": "assistant", "content": text}, None)),
        dict(base, choices=choice("delta", {}, "stop")),
        dict(base, choices=[], usage=usage),
    ]
    return stream(*[b"data: %s\n\n" % json.dumps(delta).encode() for delta in deltas], b"data: [DONE]\n\n")


def default_reply(request: Recorded) -> Reply:
    """What the API would answer; a body that cannot be read (compressed, say) is taken for a streaming request."""
    try:
        body = request.json() if request.body else {}
    except ValueError:
        body = {"stream": True}
    model, streamed, text = body.get("model", "gpt-test"), bool(body.get("stream")), "Hello from the upstream."
    if request.target.split("?")[0].endswith("/chat/completions"):
        return chat_answer(model, streamed, text)
    response = response_object([message_item(text)], model)
    return stream(*response_events(response)) if streamed else answer(200, (), response)


# ---- The fake upstream ------------------------------------------------------------------------------------------


class FakeUpstream:
    """A raw HTTP/1.1 server on loopback: a thread per connection, persistent connections, scripted replies.

    Each request takes one reply from the queue that `script` fills, and `default` answers once that is empty.
    """

    def __init__(self, tls: Optional[Tuple[str, str]] = None) -> None:
        self.requests: List[Recorded] = []
        self.connections = 0
        self.default: Callable[[Recorded], Reply] = default_reply
        self._changed = threading.Condition()  # protects requests, connections and the four below
        self._replies: List[Reply] = []
        self._disconnected: Dict[int, threading.Event] = {}
        self._sockets: Dict[int, socket.socket] = {}
        self._threads: List[threading.Thread] = []
        self._closing = threading.Event()
        self._tls: Optional[ssl.SSLContext] = None
        if tls:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(*tls)
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(128)
        self.port = int(self._listener.getsockname()[1])
        self.base_url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}/v1"
        self._acceptor = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> "FakeUpstream":
        self._acceptor.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing.set()
        socket.create_connection(("127.0.0.1", self.port), 5).close()  # wakes accept() on every platform
        self._acceptor.join(10)
        self._listener.close()
        with self._changed:
            sockets = list(self._sockets.values())
        for sock in sockets:
            shut_down(sock)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive(), "a connection of the fake upstream does not end"

    def script(self, *replies: Reply) -> None:
        with self._changed:
            self._replies.extend(replies)

    def reset(self) -> None:
        """Forget the requests recorded and the replies scripted: what one test leaves is not for the next."""
        with self._changed:
            self.requests.clear()
            self._replies.clear()

    def wait_for_requests(self, count: int, timeout: float = 10) -> List[Recorded]:
        """Return the requests once there are *count* of them, read to the end of their bodies."""
        with self._changed:
            came = self._changed.wait_for(lambda: len(self.requests) >= count, timeout)
            assert came, f"{len(self.requests)} requests after {timeout} s, expected {count}"
            return list(self.requests)

    def wait_disconnected(self, connection: int, timeout: float = 10) -> bool:
        """Whether the peer of *connection* goes away within *timeout* (True also if that was long ago)."""
        with self._changed:
            event = self._disconnected.setdefault(connection, threading.Event())
        return event.wait(timeout)

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self._closing.is_set():
                sock.close()
                return
            with self._changed:
                self.connections += 1
                self._sockets[self.connections] = sock
                self._disconnected.setdefault(self.connections, threading.Event())
                self._changed.notify_all()
                thread = threading.Thread(target=self._serve, args=(sock, self.connections), daemon=True)
                self._threads.append(thread)
            thread.start()

    def _serve(self, sock: socket.socket, number: int) -> None:
        try:
            sock.settimeout(PAUSE_LIMIT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # one send, one segment
            if self._tls:
                sock = self._tls.wrap_socket(sock, server_side=True)
                with self._changed:
                    self._sockets[number] = sock
            wire = Wire(sock)
            while self._serve_one(wire, number):
                pass
        except (OSError, EOFError, ValueError, AssertionError):
            pass  # the peer went away, or spoke something else than HTTP: nothing was recorded, the test sees that
        finally:
            self._disconnected[number].set()
            sock.close()

    def _serve_one(self, wire: Wire, number: int) -> bool:
        """Read a request, record it, reply.  False: the connection is to be closed."""
        request = wire.read_request(number)
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            reply = self._replies.pop(0) if self._replies else None
        for step in self.default(request) if reply is None else reply:
            if isinstance(step, bytes):
                wire.sock.sendall(step)
            elif isinstance(step, Pause):
                self._pause(wire, step.event)
            else:
                if isinstance(step, Reset):
                    linger_none(wire.sock)
                else:
                    shut_down(wire.sock)
                return False
        return (request.header("Connection") or "").lower() != "close"

    def _pause(self, wire: Wire, event: threading.Event) -> None:
        """Wait for *event*, reading meanwhile, so that a peer that goes away ends the reply (EOFError) at once."""
        deadline = time.monotonic() + PAUSE_LIMIT_S
        while not event.is_set() and time.monotonic() < deadline:
            if self._closing.is_set():
                raise EOFError  # not what follows: whoever stops it wants the reply cut
            if select.select([wire.sock], [], [], 0.02)[0]:
                wire.fill()


def enter(add_cleanup: Callable[..., Any], context: Any) -> Any:
    """Enter *context*, to be left by *add_cleanup*: before 3.11 a test case has no enterContext."""
    value = context.__enter__()
    add_cleanup(context.__exit__, None, None, None)
    return value


def shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # already gone
        sock.shutdown(socket.SHUT_RDWR)


def linger_none(sock: socket.socket) -> None:
    """Let the next close() send RST."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0))


# ---- The client -------------------------------------------------------------------------------------------------


class RawClient(Wire):
    """One connection to 127.0.0.1:*port*; every wait for bytes ends after *timeout* seconds (socket.timeout)."""

    def __init__(self, port: int, timeout: float = 10) -> None:
        super().__init__(socket.create_connection(("127.0.0.1", port), timeout))
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def reset(self) -> None:
        linger_none(self.sock)
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def read_some(self) -> bytes:
        """Return what has come, waiting for at least one byte; b"" at the end of the connection."""
        if not self.buffer:
            return self.sock.recv(65536)
        return self.take(len(self.buffer))

    def wait_for(self, marker: bytes) -> bytes:
        """Wait until *marker* has come; return all unread bytes and leave them for `read_answer`."""
        while marker not in self.buffer:
            self.fill()
        return bytes(self.buffer)

    def at_eof(self, timeout: float = 10) -> bool:
        """Whether the peer closes (FIN or RST) within *timeout* without sending another byte."""
        if self.buffer or not select.select([self.sock], [], [], timeout)[0]:
            return False
        try:
            self.fill()
        except (EOFError, ConnectionError):
            return True
        return False


def build_request(
    method: str, target: str, body: Any = None, headers: Headers = (), key: Optional[str] = "sk-client"
) -> bytes:
    """A request as bytes; a *body* that is not bytes is sent as JSON; what *headers* has is not added again."""
    given = pairs(headers)
    names = {name.lower() for name, _ in given}
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    added = [("Host", "127.0.0.1")] + ([("Authorization", "Bearer " + key)] if key else [])
    if body is not None:
        added.append(("Content-Type", "application/json"))
        if "transfer-encoding" not in names:
            added.append(("Content-Length", str(len(data))))
    fields = [pair for pair in added if pair[0].lower() not in names] + given
    return render_head(f"{method} {target} HTTP/1.1", fields) + data


def store_zstd(data: bytes) -> bytes:
    """Return a zstd frame with *data*, of at most 128 KiB, as it is: before 3.14 nothing here can compress it."""
    return b"\x28\xb5\x2f\xfd\0\x58" + (len(data) << 3 | 1).to_bytes(3, "little") + data


def exchange(port: int, raw: bytes, timeout: float = 10) -> Answer:
    """Send *raw* on a connection of its own and read the answer, also one that comes before all was sent."""
    with RawClient(port, timeout) as client:
        with contextlib.suppress(ConnectionError):
            client.send(raw)
        return client.read_answer(raw.split(b" ", 1)[0].decode("latin-1"))


def post(
    port: int, path: str, body: Any, headers: Headers = (), key: Optional[str] = "sk-client", timeout: float = 10
) -> Answer:
    return exchange(port, build_request("POST", path, body, headers, key), timeout)


def get(port: int, path: str, headers: Headers = (), key: Optional[str] = "sk-client", timeout: float = 10) -> Answer:
    return exchange(port, build_request("GET", path, None, headers, key), timeout)


# ---- The proxy --------------------------------------------------------------------------------------------------


def make_config(upstream: Any, provider: Optional[Mapping[str, Any]] = None, **overrides: Any) -> Dict[str, Any]:
    """A configuration with one provider "up" and one key "team"; *upstream* is a FakeUpstream, a URL or a list of them.

    *provider* is merged into "up", *overrides* into the top level; None as a value takes the member out.
    """
    upstreams = upstream if isinstance(upstream, (list, tuple)) else [upstream]
    urls = [one if isinstance(one, str) else one.base_url for one in upstreams]
    up = {"api_key": "sk-upstream", "api_base_url": urls if len(urls) > 1 else urls[0], "models": ["gpt-test"]}
    up = present(dict(up, **(provider or {})))
    return present(dict({"keys": {"team": {"secret": "sk-client"}}, "providers": {"up": up}}, **overrides))


def body_of(members: Mapping[str, Any]) -> plexus_lite.JsonBody:
    """Return a request body as the proxy reads it."""
    return plexus_lite.parse_json_body(json.dumps(members).encode())


def present(members: Mapping[str, Any]) -> Dict[str, Any]:
    return {key: value for key, value in members.items() if value is not None}


def clean_environment(extra: Optional[Mapping[str, str]] = None) -> Dict[str, str]:
    """The environment without what would change the program's behaviour, plus *extra*."""
    harmful = re.compile(r"(?i)^(.*_PROXY|PLEXUS_.*)$")
    return dict({key: value for key, value in os.environ.items() if not harmful.match(key)}, **(extra or {}))


def run_cli(
    *args: str, env: Optional[Mapping[str, str]] = None, input: Optional[str] = None, cwd: Optional[str] = None
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, PROGRAM] + list(args),
        env=clean_environment(env),
        input=input,
        cwd=cwd,
        stdin=subprocess.DEVNULL if input is None else None,
        capture_output=True,
        text=True,
        timeout=20,
    )


class Proxy:
    """plexus_lite.py with *config*, running from `__enter__` to `__exit__`, which fails if a traceback was written."""

    def __init__(
        self, config: Mapping[str, Any], env: Optional[Mapping[str, str]] = None, args: Sequence[str] = ()
    ) -> None:
        self.folder = tempfile.mkdtemp(prefix="plexus-test-")
        self.config_path = os.path.join(self.folder, "config.json")
        self.stdout: List[str] = []  # lines; both lists grow under _changed
        self.stderr: List[str] = []
        self.port = 0
        self._changed = threading.Condition()
        self._readers: List[threading.Thread] = []
        self._ended = 0  # pipes that the process has closed
        self._env = clean_environment(env)
        self._command = [sys.executable, PROGRAM, "--config", self.config_path, "--port", "0"] + list(args)
        self.write_config(config)

    def change(self, code: str, *interpreter_options: str) -> None:
        """Let *code*, which finds the program as plexus_lite, run before it; before `__enter__`."""
        begin = f"import sys\nsys.path.insert(0, {os.path.dirname(PROGRAM)!r})\nimport plexus_lite\n"
        whole = f"{begin}{code}\nsys.exit(plexus_lite.main(sys.argv[1:]))"
        self._command[1:2] = [*interpreter_options, "-c", whole]

    def write_config(self, config: Mapping[str, Any]) -> None:
        with open(self.config_path, "w", encoding="utf-8") as file:
            json.dump(config, file)

    def __enter__(self) -> "Proxy":
        self._was_killed = False
        self.process = subprocess.Popen(
            self._command,
            cwd=self.folder,
            env=self._env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
        assert self.process.stdout and self.process.stderr
        for pipe, lines in ((self.process.stdout, self.stdout), (self.process.stderr, self.stderr)):
            thread = threading.Thread(target=self._collect, args=(pipe, lines), daemon=True)
            thread.start()
            self._readers.append(thread)
        with self._changed:
            self._changed.wait_for(lambda: self.stdout or self._ended, 10)
        match = re.match(r"^plexus_lite \S+ listening on https?://\S*:(\d+)$", self.stdout[0] if self.stdout else "")
        if not match:
            self._end()
            raise AssertionError(f"the proxy does not listen; stdout {self.stdout!r}, stderr:\n{self.error_text()}")
        self.port = int(match.group(1))
        return self

    def __exit__(self, exc_type: object, *exc: object) -> None:
        code = self.process.poll()
        stopped = self._end()
        if code is not None and code < 0 and not self._was_killed:
            raise AssertionError(f"the proxy died with signal {-code}:\n" + self.error_text())
        if "Traceback (most recent call last)" in self.error_text():
            raise AssertionError("the proxy wrote a traceback:\n" + self.error_text())
        assert stopped or exc_type, "the proxy outlived two SIGTERM:\n" + self.error_text()

    def _collect(self, pipe: IO[str], lines: List[str]) -> None:
        for line in pipe:
            with self._changed:
                lines.append(line.rstrip("\n"))
                self._changed.notify_all()
        with self._changed:
            self._ended += 1
            self._changed.notify_all()

    def _end(self) -> bool:
        """Stop the process, at the second signal in mid-answer; whether that was enough."""
        stopped = self._terminated(2) or self._terminated(5)
        if not stopped:
            self.process.kill()
            self.process.wait(10)
        for thread in self._readers:
            thread.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        return stopped

    def _terminated(self, timeout: float) -> bool:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            return False
        return True

    @property
    def returncode(self) -> Optional[int]:
        return self.process.poll()

    def stop(self, timeout: float = 10) -> int:
        """SIGTERM; the exit code once it has ended, which must be within *timeout*."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def kill(self) -> None:
        self._was_killed = True
        self.process.kill()
        self.process.wait(10)

    def error_lines(self) -> List[str]:
        """Return what stderr has by now; once the process has ended, all of it."""
        with self._changed:
            if self.process.poll() is not None:
                self._changed.wait_for(lambda: self._ended == len(self._readers), 1)
            return list(self.stderr)

    def error_text(self) -> str:
        return "\n".join(self.error_lines())

    def log_records(self) -> List[Dict[str, Any]]:
        return [json.loads(line) for line in self.error_lines() if line.startswith("{")]

    def wait_for_record(
        self, predicate: Callable[[Dict[str, Any]], bool] = bool, timeout: float = 10
    ) -> Dict[str, Any]:
        """Return the first log record for which *predicate* holds, as soon as it is written."""
        with self._changed:
            found = self._changed.wait_for(lambda: [one for one in self.log_records() if predicate(one)], timeout)
        assert found, f"no such log record after {timeout:g} s; stderr:\n{self.error_text()}"
        return found[0]
