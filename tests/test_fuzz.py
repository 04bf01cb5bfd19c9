"""Random and mutated input against properties of the readers, the span editor and the relay.  No socket, no thread.

    check_request   split anywhere gives the same requests; nothing is accepted that a stricter reader refuses
    check_answer    the client sees what a stricter reader takes from the upstream's bytes, and never a false end
    check_events    comments and splits change no event; the response id is found or not, wherever the splits are
    check_json      accepts what json.loads (strict) accepts; a new model changes the span of the old one, no other byte
    check_content   round trip, bounded output, damaged input is refused
    check_usage     the same tokens and error for every split, in bounded memory; those that json.loads finds

Each takes bytes, fails by AssertionError and returns a word for what it saw, so that a test can tell that it tried
both what is right and what is wrong.  Seeded: the same on every run.  PLEXUS_FUZZ_S=60 runs each for 60 seconds,
PLEXUS_FUZZ_SEED=2 takes another path, and `python -m tests.fuzz_atheris` looks for new paths by code coverage.
"""

import base64
import collections
import contextlib
import gzip
import itertools
import json
import os
import random
import re
import selectors
import socket
import time
import tracemalloc
import unittest
import unittest.mock
import zlib
from typing import Any, Callable, Counter, Dict, Iterable, List, NamedTuple, Optional, Sequence, Set, Tuple, Union

import plexus_lite
from tests.support import chunk, store_zstd

SECONDS = float(os.environ.get("PLEXUS_FUZZ_S", "0.6"))  # for each of the six
SEED = os.environ.get("PLEXUS_FUZZ_SEED", "1")
MAX_RUNS = int(2000 * max(1.0, SECONDS))  # a fast machine need not use up the time

Field = Tuple[str, str]

# ---- Seeds: what the real clients and upstreams send, shortened ----------------------------------

CODEX = (
    b"POST /v1/responses HTTP/1.1\r\nx-codex-beta-features: terminal_resize_reflow\r\n"
    b'x-codex-turn-metadata: {"session_id":"01a2","sandbox":"none"}\r\nx-client-request-id: 01a20856-17d1\r\n'
    b"session-id: 01a20856-17d1\r\nthread-id: 01a20856-17d1\r\naccept: text/event-stream\r\n"
    b"authorization: Bearer sk-client\r\ncontent-type: application/json\r\nuser-agent: codex_exec/0.137.0 (Debian)\r\n"
    b'host: 127.0.0.1:41063\r\ncontent-length: 40\r\n\r\n{"model":"gpt-5.5","input":"\xc3\xa9","n":1}\n '
)
PI = (
    b"POST /v1/codex/responses?x=1 HTTP/1.1\r\nhost: 127.0.0.1:4000\r\nconnection: keep-alive\r\noriginator: pi\r\n"
    b"OpenAI-Beta: responses=experimental\r\nsession_id: ID1\r\nsec-fetch-mode: cors\r\ncontent-length: 5\r\n\r\nhello"
)
SDK_CHUNKED = (
    b"POST /v1/responses HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\nAccept: */*\r\n\r\n"
    b'5\r\n{"mod\r\nB;name=value\r\nel":"gpt"} \r\n0\r\nX-Trailer: 1\r\n\r\n'
)
MODELS = b"GET /v1/models HTTP/1.1\r\nHost: [::1]:4000\r\n\r\n"
OLD = b"POST /v1/responses HTTP/1.0\r\nContent-Length: 2\r\n\r\n{}"
ABSOLUTE = b"GET http://127.0.0.1:4000/v1/models?a=b HTTP/1.1\r\nHost: other\r\nConnection: close\r\n\r\n"
EXPECTING = b"POST /responses HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\nabc"
REQUESTS = (CODEX, PI, SDK_CHUNKED, MODELS, OLD, ABSOLUTE, EXPECTING, b"\r\n" + MODELS, SDK_CHUNKED + PI + MODELS)

# Nearly right: what other readers have taken, each in its own way.
PI_HEAD = PI[: -len(b"\r\n\r\nhello")]
CHUNKED_HEAD = SDK_CHUNKED[: SDK_CHUNKED.index(b"\r\n\r\n") + 4]
NEAR_REQUESTS = (
    *(PI_HEAD + b"\r\n" + line + b"\r\n\r\nhello" for line in (b"Content-Length: 5", b"Content-Length: 6", b"host: b")),
    *(
        PI_HEAD + b"\r\n" + line + b"\r\n\r\n0\r\n\r\n"
        for line in (b"Transfer-Encoding: chunked", b"TRANSFER-ENCODING:")
    ),
    *(
        PI.replace(b": 5", b": " + value)
        for value in (b"5, 5", b"+5", b"0x5", b"5_", b"5 5", b"-5", b"\xb2", b"", b"5.0")
    ),
    *(SDK_CHUNKED.replace(b": chunked", value) for value in (b": gzip, chunked", b": chunked, chunked", b": xchunked")),
    *(
        SDK_CHUNKED.replace(b": chunked", value)
        for value in (b":\x0bchunked", b" : chunked", b": chunked\r\n ,x", b":")
    ),
    *(SDK_CHUNKED.replace(b"1.1", version) for version in (b"1.0", b"2.0", b"0.9", b"1.1 ", b"1.10", b"1,1")),
    *(
        CHUNKED_HEAD + size + b"\r\nhello\r\n0\r\n\r\n"
        for size in (b"5;a\nb", b"5;\0", b"5 ", b" 5", b"0x5", b"+5", b"5\r", b"")
    ),
    *(CHUNKED_HEAD + rest for rest in (b"5\nhello\r\n0\r\n\r\n", b"5\r\nhello!\r\n0\r\n\r\n", b"0\r\nX Y: 1\r\n\r\n")),
    *(
        CHUNKED_HEAD + rest
        for rest in (b"5\r\nhello\n0\r\n\r\n", b"0\r\n\0: 1\r\n\r\n", b"5\r\nhelloXY0\r\n\r\n", b"g\r\n")
    ),
    *(
        MODELS.replace(b"/v1/models", target)
        for target in (b"v1/models", b"/a b", b"/a#b", b"*", b"http://", b"/\x7f", b"/\xe9")
    ),
    *(MODELS.replace(b"[::1]:4000", host) for host in (b"", b"a b", b"a, b", b"a/b", b"a@b", b"[::1", b"a:b", b"a\0")),
    *(
        MODELS.replace(b"\r\nHost", line + b"Host")
        for line in (b"\n", b"\r", b"\r\n ", b"\r\nno colon\r\n", b"\r\n: x\r\n")
    ),
    MODELS.replace(b"Host: [::1]:4000\r\n", b""),
)

EVENTS = (
    b'event: response.created\ndata: {"type":"response.created","response":{"id":"resp_1","model":"gpt"}}\n\n'
    b'event: response.output_text.delta\ndata: {"delta":"hi"}\n\n'
)
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNKED = STREAM_HEAD + chunk(EVENTS) + chunk(b": ping\n\n") + b"0\r\n\r\n"
ANSWERS = (
    CHUNKED,
    STREAM_HEAD + b"5\r\n\r\r\n\r\n\r\n3;a=b\r\nabc\r\n0\r\nX-Trailer: 1\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n" + EVENTS,
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 15\r\nSet-Cookie: a\r\n\r\n{"id":"resp_1"}',
    b"HTTP/1.1 103 Hints\r\nLink: <a>\r\n\r\nHTTP/1.1 100 Go\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 304 Not Modified\r\nContent-Length: 10\r\n\r\n",
    b"HTTP/1.1 400 Bad Request\r\nContent-Length: 20\r\nx-request-id: r\r\n\r\n" + b'{"error":{"code":1}}',
    b"HTTP/1.1 429 Too Many\r\nRetry-After: 1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    b"HTTP/1.0 200 OK\r\nContent-Type: text/event-stream\r\n\r\ndata: 1\n\n",
    b"HTTP/1.1 200 \r\nX-Empty:\r\nX-Latin: \xe9\r\nContent-Length: 0\r\n\r\n",
)
JSON_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
NEAR_ANSWERS = (
    b"HTTP/1.1 101 Switching Protocols\r\n\r\n" + JSON_ANSWER,
    *(
        JSON_ANSWER.replace(b"HTTP/1.1 200 OK", line)
        for line in (b"HTTP/1.1 2000 OK", b"HTTP/1.1 20 OK", b"HTTP/2.0 200 OK")
    ),
    *(
        JSON_ANSWER.replace(b"HTTP/1.1 200 OK", line)
        for line in (b"HTTP/1.1 099 A", b"HTTP/1.1 600 A", b"200 OK", b"ICY 200 OK")
    ),
    *(JSON_ANSWER.replace(b"200 OK", line) for line in (b"200OK", b"200 O\0K", b"200 O\rK", b"+20 OK", b" 200 OK")),
    *(
        JSON_ANSWER.replace(b": 2", b": " + value)
        for value in (b"2, 2", b"+2", b"3", b"0x2", b"", b"2\r\nContent-Length: 2")
    ),
    *(
        JSON_ANSWER.replace(b"Content-L", line + b"Content-L")
        for line in (b"Transfer-Encoding: chunked\r\n", b"a\r\n", b"a : b\r\n")
    ),
    *(
        JSON_ANSWER.replace(b"Content-L", line + b"Content-L")
        for line in (b"a: b\n", b"a: b\r\n c\r\n", b"a: \0\r\n", b"\n")
    ),
    *(
        CHUNKED.replace(b": chunked", value)
        for value in (b": gzip, chunked", b": identity", b":\x0bchunked", b": chunked, chunked")
    ),
    *(
        CHUNKED.replace(b"\r\n0\r\n\r\n", end)
        for end in (b"\r\n0\r\n", b"\r\n0\n\n", b"XY0\r\n\r\n", b"\n0\r\n\r\n", b"\r\n00")
    ),
    CHUNKED.replace(b"HTTP/1.1", b"HTTP/1.0"),
)
DOCUMENTS = (
    b'{"model": "gpt-5.5", "instructions": "You", "input": [{"role": "user", "content": "hi \\u00e9"}], "n": 1.5e3}',
    b' {\r\n\t"input" : [ ] , "model" : "a\\"b" , "tools":[{"model":"x","model":"y"}]}\n',
    b'{"\\u006dodel":"gpt","a":{"model":1},"b":null,"c":true,"d":-0.0}',
    b'{"a":1,"a":2,"model":{"model":"model"}}',
    '{"caf\u00e9":"\u4e2d\U0001f600","model":"m","s":"\\ud83d\\ude00 \\ud800"}'.encode(),
    b"{}",
    b"[1,2]",
    b'{"model":NaN}',
)
# What a random byte would hardly ever hit.
TOKENS = (
    (b"\r\n", b"\n", b"\r", b"\r\n\r\n", b"\n\n", b"\0", b" ", b"\t", b":", b",", b";", b"\x0b", b"\x85", b"\xff", b"#")
    + (b"Content-Length: 5\r\n", b"content-length: +5\r\n", b"Content-Length: 5, 5\r\n", b"Content-Length: 0x5\r\n")
    + (b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip, chunked\r\n", b"transfer-encoding:\x0bchunked\r\n")
    + (b"Transfer-Encoding : chunked\r\n", b" folded: 1\r\n", b"Host: b\r\n", b"Host:\r\n", b"Connection: close\r\n")
    + (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"1_0", b"-1", b"0\r\n\r\n", b"00000000000000005", b"f" * 16)
    + (b'"model"', b'"model":1,', b'"id":"resp_2"', b"{", b"}", b"[", b"]", b'"', b"\\u0000", b"NaN", b"1e999", b"-")
    + (b"\xef\xbb\xbf", b"\xed\xa0\x80", b"data: x\n\n", b"\r\r", b": c\n", b"\n\r\n", b"9" * 4400, b"[" * 300)
)


def mutate(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
    """Return one of *seeds*, or parts of two, with up to six changes; one in eight stays as it is."""
    data = bytearray(rng.choice(seeds))
    if rng.random() < 0.1:
        other = rng.choice(seeds)
        data[rng.randrange(len(data) + 1) :] = other[rng.randrange(len(other) + 1) :]
    for _ in range(rng.choice((0, 1, 1, 1, 2, 2, 3, 6))):
        start = rng.randrange(len(data) + 1)
        end = min(len(data), start + rng.choice((1, 1, 2, 4, 16)))
        kind = rng.randrange(7)
        if kind == 0:
            del data[start:end]
        elif kind == 1:
            data[start:start] = data[start:end] * rng.choice((1, 1, 2, 9))
        elif kind == 2 and start < len(data):
            data[start] = rng.randrange(256)
        elif kind == 3 and start < len(data):
            data[start] ^= 1 << rng.randrange(8)
        elif kind == 4:  # a token where one may stand: at the beginning of a line
            lines = [found.end() for found in re.finditer(rb"\n", data)] or [start]
            place = rng.choice(lines)
            data[place:place] = rng.choice(TOKENS)
        elif kind == 5 and rng.random() < 0.3:
            del data[start:]
        else:
            data[start:start] = rng.choice(TOKENS)
    return bytes(data)


def splits(data: bytes) -> List[List[bytes]]:
    """Return *data* in one piece, byte by byte, and cut at two sets of random places that depend on nothing else."""
    rng = random.Random(zlib.crc32(data))
    ways = [[data]]
    if len(data) <= 400:
        ways.append([data[index : index + 1] for index in range(len(data))])
    for count in (1, 5):
        cuts = sorted(rng.randrange(len(data) + 1) for _ in range(count))
        ways.append([data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)])])
    return [[piece for piece in way if piece] for way in ways]


# ---- The stricter reader: RFC 9112 word by word, whole input, no state ---------------------------

TCHAR = frozenset(b"!#$%&'*+-.^_`|~0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
DIGITS = frozenset(b"0123456789")
HEXDIG = frozenset(b"0123456789abcdefABCDEF")


class Refused(Exception):
    """No recipient may take this for a message."""


class Incomplete(Exception):
    """It may become one."""


def must(condition: object) -> None:
    if not condition:
        raise Refused


def is_text(data: bytes) -> bool:
    """field-vchar, SP and HTAB; obs-text among them (RFC 9110 5.5)."""
    return all(byte == 9 or 32 <= byte <= 126 or byte >= 128 for byte in data)


def split_line(data: bytes) -> Tuple[bytes, bytes]:
    line, end, rest = data.partition(b"\r\n")
    if not end:
        raise Incomplete
    must(b"\r" not in line and b"\n" not in line)
    return line, rest


def ref_fields(data: bytes) -> Tuple[List[Field], bytes]:
    """Return the fields up to the empty line, and what follows it (RFC 9112 5)."""
    fields: List[Field] = []
    while True:
        line, data = split_line(data)
        if not line:
            return fields, data
        name, colon, value = line.partition(b":")
        must(colon and name and set(name) <= TCHAR and is_text(value))
        fields.append((name.decode("ascii"), value.strip(b"\t ").decode("latin-1")))


def values(fields: Sequence[Field], name: str) -> List[str]:
    return [value for key, value in fields if key.lower() == name]


def options(fields: Sequence[Field]) -> List[str]:
    return [part.strip(" \t").lower() for value in values(fields, "connection") for part in value.split(",")]


def ref_framing(fields: Sequence[Field], minor: int) -> Optional[int]:
    """Return the length that the fields declare, -1 for chunked, None for none (RFC 9112 6.3, the strict reading)."""
    codings, lengths = values(fields, "transfer-encoding"), values(fields, "content-length")
    must(len(codings) + len(lengths) <= 1)
    if codings:
        must(minor >= 1 and codings[0].lower() == "chunked")
        return -1
    if lengths:
        must(lengths[0] and set(lengths[0].encode("latin-1")) <= DIGITS)
        return int(lengths[0]) if len(lengths[0]) < 4000 else 1 << 70
    return None


class RefBody(NamedTuple):
    payload: bytes  # as much as came
    end: str  # "complete", "incomplete", "refused"
    rest: bytes = b""


def ref_chunked(data: bytes) -> RefBody:
    """RFC 9112 7.1."""
    payload = b""
    try:
        while True:
            line, data = split_line(data)
            size, semicolon, extension = line.partition(b";")
            if semicolon:
                size = size.rstrip(b" \t")
            must(size and set(size) <= HEXDIG and is_text(extension))
            count = int(size, 16)
            if count == 0:
                return RefBody(payload, "complete", ref_fields(data)[1])
            payload += data[:count]
            tail = data[count : count + 2]
            must(b"\r\n".startswith(tail))
            if len(tail) < 2:
                raise Incomplete
            data = data[count + 2 :]
    except Refused:
        return RefBody(payload, "refused")
    except Incomplete:
        return RefBody(payload, "incomplete")


def ref_body(data: bytes, length: int) -> RefBody:
    if length < 0:
        return ref_chunked(data)
    if len(data) < length:
        return RefBody(data, "incomplete")
    return RefBody(data[:length], "complete", data[length:])


class Request(NamedTuple):
    method: str
    target: str
    authority: Optional[str]
    fields: Tuple[Field, ...]
    body: bytes


def ref_authority(value: str) -> None:
    must(re.match(r"^(\[[0-9a-fA-F:.]+\]|([A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2}|%)+)(:[0-9]*)?\Z", value))


def ref_request(data: bytes) -> Tuple[Request, bool, bytes]:
    """Return the first request in *data*, whether it is the connection's last, and what follows it."""
    if b"\r\n\r\n" not in data:
        raise Incomplete
    line, data = split_line(data)
    parts = line.split(b" ")
    must(len(parts) == 3)
    method, target, version = parts
    must(method and set(method) <= TCHAR)
    must(target and all(33 <= byte <= 126 for byte in target) and b"#" not in target)
    must(len(version) == 8 and version.startswith(b"HTTP/1.") and version[7] in DIGITS)
    minor = min(int(version[7:]), 1)
    fields, data = ref_fields(data)
    hosts = values(fields, "host")
    must(len(hosts) == 1 or (minor == 0 and not hosts))
    for host in hosts:
        ref_authority(host)
    authority = hosts[0] if hosts else None
    if not target.startswith(b"/"):
        scheme, mark, rest = target.decode().partition("://")
        must(mark and scheme.lower() in ("http", "https"))
        authority = rest.split("/")[0]
        ref_authority(authority)
        must("/" in rest)
    length = ref_framing(fields, minor)
    body = ref_body(data, length or 0)
    if body.end == "incomplete":
        raise Incomplete
    must(body.end == "complete")
    last = minor == 0 or "close" in options(fields)
    return Request(method.decode(), target.decode(), authority, tuple(fields), body.payload), last, body.rest


def ref_requests(data: bytes) -> Tuple[List[Request], str]:
    """Return the requests on a connection that carries *data*, and how it stands then."""
    requests: List[Request] = []
    try:
        while True:
            while data.startswith(b"\r\n"):  # RFC 9112 2.2
                data = data[2:]
            if not data:
                return requests, "idle"
            request, last, data = ref_request(data)
            requests.append(request)
            if last:
                return requests, "closed"
    except Refused:
        return requests, "refused"
    except Incomplete:
        return requests, "incomplete"


class Seen(NamedTuple):
    """A final answer and its end."""

    status: int
    payload: bytes
    end: str  # "complete", "incomplete", "refused"
    fields: Tuple[Field, ...] = ()
    rest: bytes = b""
    is_until_close: bool = False


def ref_answer(data: bytes) -> Seen:
    """Return the answer that a connection carried which brought *data* and then ended; status 0: none."""
    try:
        while True:
            if b"\r\n\r\n" not in data:
                raise Incomplete
            line, data = split_line(data)
            version, status, reason = line[:9], line[9:12], line[12:]
            must(version in (b"HTTP/1.0 ", b"HTTP/1.1 ") and len(status) == 3 and set(status) <= DIGITS)
            must(100 <= int(status) <= 599)
            must(not reason or (reason.startswith(b" ") and is_text(reason)))
            fields, data = ref_fields(data)
            code = int(status)
            must(code != 101)
            if code < 200:
                continue
            if code in (204, 304):
                return Seen(code, b"", "complete", tuple(fields), data)
            length = ref_framing(fields, int(version[7:8]))
            if length is None:
                return Seen(code, data, "complete", tuple(fields), is_until_close=True)
            body = ref_body(data, length)
            return Seen(code, body.payload, body.end, tuple(fields), body.rest)
    except Refused:
        return Seen(0, b"", "refused")
    except Incomplete:
        return Seen(0, b"", "incomplete")


# ---- The bench: the relay's classes on sockets that are lists ------------------------------------


class BenchSocket:
    """Reads the given pieces, then nothing; collects what is sent."""

    def __init__(self, pieces: Iterable[Union[bytes, OSError]] = ()) -> None:
        self.pieces = collections.deque(pieces)
        self.sent = b""
        self.room = 2**63  # for how many bytes
        self.closed = self.reset = False

    def recv(self) -> bytes:
        if not self.pieces:
            raise BlockingIOError
        piece = self.pieces.popleft()
        if isinstance(piece, OSError):
            raise piece
        return piece

    def send(self, data: bytes) -> int:
        if not self.room:
            raise BlockingIOError
        taken = data[: self.room]
        self.room -= len(taken)
        self.sent += taken
        return len(taken)

    def setsockopt(self, level: int, option: int, value: Any) -> None:
        self.reset = self.reset or option == socket.SO_LINGER

    def shutdown(self, how: int) -> None:
        self.closed = True

    def close(self) -> None:
        self.closed = True


class BenchLoop(plexus_lite.Loop):
    """Calls wait in a list; nothing is selected."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waiting: List[Callable[[], None]] = []
        self.watched: Dict[int, Tuple[int, Callable[[int], None]]] = {}

    def watch(self, sock: Any, events: int, callback: Any = None) -> None:
        self.watched[id(sock)] = events, callback

    def wake(self, sock: Any, events: int) -> None:
        """Say that *sock* is ready."""
        self.watched[id(sock)][1](events)
        self.run()

    def receive(self, sock: Any) -> Optional[bytes]:
        try:
            return sock.recv()  # type: ignore[no-any-return]
        except BlockingIOError:
            return None

    def close(self, sock: Any) -> None:
        sock.close()

    def hand(self, function: Callable[..., None], *arguments: Any) -> None:
        self.call(function, *arguments)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        self.waiting.append(lambda: function(*arguments))

    def run(self) -> None:
        while self.waiting:
            self.waiting.pop(0)()


CONFIG = plexus_lite.parse_config(
    {
        "keys": {},
        "providers": {"up": {"api_base_url": "http://127.0.0.1:1/v1", "models": ["gpt"]}},
        "limits": {"keepalive_s": 5},
    }
)
TARGET = plexus_lite.targets_of(CONFIG, "gpt", "responses")[0]


class BenchTransport:
    def __init__(self) -> None:
        self.released: List[Any] = []

    def release(self, connection: Any) -> None:
        self.released.append(connection)


class Bench:
    """A client's connection; each request is answered by *respond*, later."""

    def __init__(self, respond: Callable[["Bench", Any, Any], None], has_places: bool = False) -> None:
        self.transport = BenchTransport()
        transport: Any = self.transport
        credentials = plexus_lite.Credentials(CONFIG, "", transport)
        self.state = plexus_lite.State(CONFIG, transport, {}, has_places, b"ticket secret", credentials)
        self.fleet = plexus_lite.Fleet()
        self.bench_loop = BenchLoop()
        self.loop: plexus_lite.Loop = self.bench_loop
        self.respond = respond
        self.requests: List[Request] = []
        self.records: List[Dict[str, Any]] = []
        self.clients: Set[plexus_lite.ClientConnection] = set()
        self.bodies = plexus_lite.Bodies(1)
        self.sock = BenchSocket()
        server: Any = self
        sock: Any = self.sock
        self.client = plexus_lite.ClientConnection(server, sock, "127.0.0.1")

    def admit(self, exchange: Any) -> None:
        exchange.route = plexus_lite.Route("/responses", "/responses", "forward")

    def start(self, exchange: Any, connection: Any) -> None:
        head = exchange.head
        if not exchange.tried:
            body = bytes(exchange.body)
            self.requests.append(Request(head.method, head.target, head.authority, head.headers.fields, body))
            assert head.path + head.query == head.target or "://" in head.target
        exchange.tried += 1
        self.loop.call(connection.take_back, exchange, self.respond, self, exchange, connection)

    def digest_later(self, exchange: Any) -> None:
        pass

    def done(self, exchange: Any) -> None:
        self.records.append(exchange.record)

    def is_draining(self) -> bool:
        return False

    def receive(self, data: bytes) -> None:
        if not self.sock.closed:
            self.client._received(data)
        self.loop.run()


# ---- (a) The request reader ----------------------------------------------------------------------


def read_requests(pieces: Sequence[bytes]) -> Tuple[List[Request], bool]:
    """Return the requests that the proxy takes, and whether it refused what came then."""
    bench = Bench(lambda bench, exchange, connection: connection.respond(200, [], b"ok"))
    for piece in pieces:
        bench.receive(piece)
    statuses = [record["status"] for record in bench.records]
    assert all(status == 200 for status in statuses[:-1]), statuses
    return bench.requests, bool(statuses) and statuses[-1] != 200


def check_request(data: bytes) -> str:
    wanted, end = ref_requests(data)
    outcomes = []
    for pieces in splits(data):
        taken, refused = read_requests(pieces)
        assert taken == wanted[: len(taken)], ("not what a stricter reader takes", taken, wanted)
        if not refused:
            assert end != "refused", ("a stricter reader refuses this", taken)
            assert len(taken) == len(wanted), ("neither taken nor refused", taken, wanted)
        outcomes.append((len(taken), refused))
    # Which error it is may depend on the splits: a bad line is refused when it is there, not when the head is.
    assert len(set(outcomes)) <= 1, ("the splits decide", outcomes)
    if not wanted or outcomes[0][1]:
        return "refused" if outcomes and outcomes[0][1] else "incomplete"
    return "taken"


# ---- (b) The answer reader -----------------------------------------------------------------------


class Relayed(NamedTuple):
    seen: Seen  # by the client
    is_own: bool  # an error of the proxy's own
    nothing: bool  # the client got not a byte
    released: bool  # the upstream's connection went back to the pool
    unread: bytes  # on it
    owned: List[str]  # digests of the ids that the upstream issued


def begin_relay(upstream_sock: BenchSocket, old_client: bool = False, has_places: bool = False) -> Tuple[Bench, Any]:
    """Return a bench whose client has asked, and the answer that is awaited from *upstream_sock*."""
    answers: List[Any] = []

    def respond(bench: Bench, exchange: Any, connection: Any) -> None:
        if not answers:
            sock: Any = upstream_sock
            exchange.target = TARGET
            bench.fleet.opened(TARGET)
            upstream = plexus_lite.UpstreamConnection(sock, ("http", "up"))
            answers.append(plexus_lite.Answer(connection, exchange, TARGET, upstream))
        elif exchange.last_answer:
            exchange.last_answer.hand_on()
        else:
            connection.refuse(exchange.last_error)

    bench = Bench(respond, has_places)
    bench.receive(OLD if old_client else PI)
    return bench, answers[0]


def relay(
    pieces: Sequence[bytes], old_client: bool = False, silence_s: float = 0.0, has_places: bool = False
) -> Relayed:
    """Let the upstream send *pieces* and close; *silence_s* passes after each of them."""
    upstream_sock = BenchSocket([*pieces, b""])
    bench, answer = begin_relay(upstream_sock, old_client, has_places)
    while answer.upstream is not None and upstream_sock.pieces:
        bench.bench_loop.wake(upstream_sock, selectors.EVENT_READ)
        if silence_s and answer.upstream is not None:
            bench.loop.now += silence_s
            answer.tick(bench.loop.now)
    assert answer.upstream is None, "the upstream's end did not end the answer"
    assert len(bench.records) == 1, bench.records
    sent = bench.sock.sent
    seen = ref_answer(sent)
    if seen.is_until_close and (bench.sock.reset or not bench.sock.closed):
        seen = seen._replace(end="incomplete")
    if seen.end == "incomplete":
        assert bench.sock.closed, "an answer without an end on an open connection"
    assert seen.end != "refused" and not seen.rest, (seen, sent)
    is_own = bool(values(seen.fields, "x-plexus-error"))
    return Relayed(
        seen,
        is_own,
        not sent,
        bool(bench.transport.released),
        b"".join(piece for piece in upstream_sock.pieces if isinstance(piece, bytes)),
        list(bench.fleet.owners._entries),
    )


HOP_BY_HOP = ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te") + (
    ("trailer", "transfer-encoding", "upgrade", "http2-settings", "content-length", "set-cookie")
)


def check_answer(data: bytes) -> str:
    wanted = ref_answer(data)
    old_client, has_places = bool(zlib.crc32(data) & 1), bool(zlib.crc32(data) & 2)
    outcomes = []
    for pieces in splits(data):
        got = relay(pieces, old_client, has_places=has_places)
        seen = got.seen
        assert not got.nothing, "not a byte for the client, though nothing had been sent yet"
        if got.is_own:
            assert seen.end == "complete" and seen.status in (502, 504), seen
        else:
            assert wanted.status, ("a stricter reader refuses this head", seen)
            assert seen.status == wanted.status, (seen, wanted)
            assert wanted.payload.startswith(seen.payload), (seen.payload, wanted.payload)
            if seen.end == "complete":
                assert wanted.end == "complete" and seen.payload == wanted.payload, ("a false end", seen, wanted)
            dropped = {*HOP_BY_HOP, *options(wanted.fields)}
            kept = [field for field in wanted.fields if field[0].lower() not in dropped]
            assert list(seen.fields[: len(kept)]) == kept, (seen.fields, kept)
        if got.released:
            assert wanted.end == "complete" and not wanted.is_until_close, "half-read and back into the pool"
            assert "close" not in options(wanted.fields) and wanted.rest == got.unread, "surplus in the pool"
        clean = seen.end == "complete" and not got.is_own
        outcomes.append((seen.status, seen.payload) if clean else None)
    assert len(set(outcomes)) <= 1, ("the splits decide", outcomes)
    return "relayed" if outcomes and outcomes[0] else "refused"


# ---- (c) Event streams ---------------------------------------------------------------------------

KEEPALIVE = b": keepalive\n\n"


def parse_events(data: bytes) -> List[Tuple[bytes, bytes]]:
    """Return the (event, data) that a client dispatches (WHATWG HTML 9.2.6)."""
    events: List[Tuple[bytes, bytes]] = []
    name = b""
    lines: List[bytes] = []
    # The end of the input ends no line: what stands there is never dispatched.
    for line in re.split(rb"\r\n|\n|\r", data)[:-1]:
        field, _, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if not line:
            if lines:
                events.append((name, b"\n".join(lines)))
            name, lines = b"", []
        elif field == b"event":
            name = value
        elif field == b"data":
            lines.append(value)
    return events


def check_events(data: bytes) -> str:
    payload = data.replace(b"\xef\xbb\xbf", b"").replace(b"keepalive", b"")
    wanted = parse_events(payload)
    old_client = bool(zlib.crc32(data) & 1)
    until_close = STREAM_HEAD.replace(b"Transfer-Encoding: chunked", b"Connection: close")
    comments = 0
    for pieces, is_chunked in itertools.product(splits(payload), (False, True)):
        answer = [STREAM_HEAD, *map(chunk, pieces), b"0\r\n\r\n"] if is_chunked else [until_close, *pieces]
        got = relay(answer, old_client, silence_s=6).seen
        assert got.end == "complete", got
        assert got.payload.replace(KEEPALIVE, b"") == payload, (got.payload, payload)
        assert parse_events(got.payload) == wanted, ("a comment inside an event", got.payload)
        ends = ["".join(map(chr, b"".join(pieces[: index + 1])[-2:])) for index in range(len(pieces))]
        assert got.payload.count(KEEPALIVE) >= ends.count("\n\n"), "a silence between two events without a comment"
        comments += got.payload.count(KEEPALIVE) - 1
    # The id, at the beginning and across the limit of how far it is looked for.
    limit = 16 * 1024
    for text in (payload, b"." * (limit - zlib.crc32(payload) % (len(payload) + 9)) + payload):
        whole = plexus_lite.RESPONSE_ID.search(text[:limit])
        owned = [plexus_lite.text_digest(whole.group(1).decode())] if whole else []
        for pieces in [[text], [text[:100], text[100:]], [text[: limit - 3], text[limit - 3 :]], *splits(text)]:
            issued = relay([until_close, *pieces], has_places=True)
            assert issued.owned == owned, ("response id", issued.owned, whole)
    return "comments" if comments else "none"


# ---- (d) JSON: the strict reader and the span editor ---------------------------------------------


class Members(List[Tuple[str, Any]]):
    """An object as the pairs that stand in it."""


def refuse_constant(name: str) -> Any:
    raise ValueError(name)


def strict_json(data: bytes) -> Optional[Members]:
    """Return the top-level object in *data* if json.loads takes it, with the strict options; else None."""
    try:
        top = json.loads(data.decode("utf-8"), object_pairs_hook=Members, parse_constant=refuse_constant)
    except ValueError:
        return None
    if not isinstance(top, Members) or [name for name, _ in top].count("model") > 1:
        return None
    return top


def check_members(body: Any) -> None:
    """The spans of members, and of the elements of the prompt, are those of what json.loads returns."""
    wanted = json.loads(body.raw.decode("latin-1"))
    assert {name: json.loads(body.part(name).decode("latin-1")) for name in body.spans} == {
        name: value for name, value in wanted.items() if name in plexus_lite.MEMBERS
    }, body.spans
    for name, items in body.lists.items():
        assert [json.loads(body.raw[start:end].decode("latin-1")) for start, end in items.spans] == wanted[name], items
    lists = [name for name in ("input", "messages") if isinstance(wanted.get(name), list)]
    assert lists == sorted(body.lists), body.lists


def parsed(data: bytes, seen: Any = plexus_lite.NOTHING_SEEN) -> Any:
    try:
        return plexus_lite.parse_json_body(data, seen)
    except plexus_lite.ProxyError as error:
        return error.message


def outcome(data: bytes, seen: Any = plexus_lite.NOTHING_SEEN) -> Any:
    body = parsed(data, seen)
    if isinstance(body, str):
        return body
    return body.spans, body.lists, plexus_lite.digest_body(body)


def check_runs(data: bytes) -> None:
    """With short runs, many a string has some; a name in MEMBERS is shorter."""
    whole = parsed(data)
    for size in (21, 22, 26):
        with unittest.mock.patch.multiple(plexus_lite, RUN_BYTES=size, LARGE_BODY_BYTES=0):
            assert parsed(data) == whole, (size, "runs make a difference")


def check_json(data: bytes) -> str:
    check_runs(data)
    try:
        wanted = strict_json(data)
    except RecursionError:  # how deep is too deep is the interpreter's business
        wanted = None
    try:
        body = plexus_lite.parse_json_body(data)
    except plexus_lite.ProxyError as error:
        assert error.status == 400, error
        assert wanted is None or "deep" in error.message, ("refused", error.message)
        return "refused"
    assert wanted is not None, "json.loads refuses this"
    check_members(body)
    seen = plexus_lite.digest_body(body)[1]
    changed = (data.replace(b'"', b"", 1), data.replace(b"]", b",1]", 1), data.replace(b"]", b"2]", 1), data[:-1])
    for turn in (data, *changed):
        again, new = outcome(turn, seen), outcome(turn)
        is_parsed = not isinstance(new, str)
        assert again == new or (is_parsed and (again[0], again[2]) == (new[0], new[2])), (
            turn,
            "seen makes a difference",
        )
    if "model" not in body.spans:
        return "no model"
    for name in ("gpt-other", 'q"\\\u00e9\u4e2d'):
        edited = plexus_lite.replace_model(body, name)
        after = strict_json(edited)
        assert after == Members((key, name if key == "model" else value) for key, value in wanted), (edited, data)
        # Every byte around the value is as it was, and what was taken out is the value and nothing else.
        begin, end = body.spans["model"]
        encoded = json.dumps(name).encode()
        assert edited == data[:begin] + encoded + data[end:], (begin, end, edited)
        old = data[begin:end].decode()
        assert old == old.strip(), old
        text = json.loads(old)
        assert body.text("model") == (text if isinstance(text, str) else None), old
    return "edited"


def random_document(rng: random.Random) -> bytes:
    """Return a random object as JSON text, with every freedom of spelling that JSON has."""

    def space() -> str:
        return "".join(rng.choices(" \t\r\n", k=rng.choice((0, 0, 0, 1, 3))))

    def string(text: str) -> str:
        parts = []
        for char in text:
            escape = rng.random() < 0.2 or char in '"\\\ud800' or char < " "
            units = char.encode("utf-16-be", "surrogatepass")
            codes = [units[index : index + 2].hex() for index in range(0, len(units), 2)]
            parts.append("".join("\\u" + (code.upper() if rng.random() < 0.5 else code) for code in codes))
            parts[-1] = parts[-1] if escape else char
        return '"' + "".join(parts) + '"'

    def name() -> str:
        return rng.choice(("model", "model ", "Model", "input", "a", "", "\u00e9", "\U0001f600", 'm"', "\n"))

    def value(depth: int) -> str:
        kind = rng.randrange(8 if depth < 4 else 5)
        if kind == 0:
            return rng.choice(("null", "true", "false", "0", "-0", "1.5E+3", "-12e-2", "1e400", "9" * 30))
        if kind < 5:
            return string(rng.choice(("", "gpt-5.5", '{"model":"x"}', "\u4e2d\U0001f600", "tab\t", "\\", "\ud800")))
        if kind == 5:
            return "[" + space() + ",".join(space() + value(depth + 1) + space() for _ in range(rng.randrange(4))) + "]"
        return object_text(depth + 1)

    def object_text(depth: int) -> str:
        names = [name() for _ in range(rng.randrange(6))]
        members = [space() + string(one) + space() + ":" + space() + value(depth) + space() for one in names]
        return "{" + (",".join(members) or space()) + "}"

    return (space() + object_text(0) + space()).encode("utf-8", "surrogatepass")


# ---- (e) Content-Encoding ------------------------------------------------------------------------

ENCODINGS = ("gzip", "deflate", "x-gzip", "identity", "br", "", "zstd")
HAS_ZSTD = plexus_lite.load_zstd() is not None
# A frame of one compressed block, with a checksum.
ZSTD_FRAME = base64.b64decode("KLUv/QRYVQEAFAJ7Im1vZGVsIjogIm0iLCAiaW5wdXQiOiAiaGVsbG8gIn0BAP+bvzgB6Ibg5A==")


def raw_deflate(data: bytes) -> bytes:
    compressor = zlib.compressobj(6, zlib.DEFLATED, -15)
    return compressor.compress(data) + compressor.flush()


def decode(raw: Union[bytes, bytearray], encoding: str, limit: int) -> Any:
    return plexus_lite.decode_content(raw, encoding, limit, plexus_lite.load_zstd)


def check_content(data: bytes) -> str:
    """The first byte chooses the encoding, the second the limit; the rest is first packed, then taken as packed."""
    encoding = ENCODINGS[data[0] % len(ENCODINGS)] if data else ""
    limit = 1 << (data[1] % 18 if len(data) > 1 else 0)
    rest = data[2:]
    if encoding in ("br", "identity", "") or (encoding == "zstd" and not HAS_ZSTD):
        got = decode(rest, encoding, limit)
        assert got == (None if encoding in ("br", "zstd") else rest)
        return "plain"
    if encoding == "deflate":
        packed = [zlib.compress(rest), raw_deflate(rest)]
    else:
        pack = store_zstd if encoding == "zstd" else gzip.compress
        packed = [pack(rest), pack(rest[:9]) + pack(rest[9:])]
    for one in packed:
        for raw in (one, bytearray(one)):
            try:
                assert decode(raw, encoding, limit) == rest and len(rest) <= limit
            except plexus_lite.ProxyError as error:
                assert error.code == "content_too_large" and len(rest) > limit, error.message
    try:
        got = decode(rest, encoding, limit)
    except plexus_lite.ProxyError as error:
        assert error.status in (400, 413), error
        return "refused"
    assert got is not None and len(got) <= limit
    known: List[bytes] = []
    for unpack in (gzip.decompress, zlib.decompress, lambda raw: zlib.decompress(raw, -15)):
        with contextlib.suppress(OSError, EOFError, zlib.error):
            known.append(unpack(rest))
    assert encoding == "zstd" or got in known, (got, known)
    return "decoded"


# ---- (f) Usage -----------------------------------------------------------------------------------

TERMINAL = ("response.completed", "response.incomplete", "response.failed", "error")
Usage = Tuple[Dict[str, int], Optional[str]]


class Doubtful(Exception):
    """Readers differ about it, or a stricter one is not what we want to be."""


def ref_usage(data: bytes, is_events: bool) -> Usage:
    """Return tokens and error as json.loads finds them in each complete line; Doubtful if the input is not plain."""
    if b"\\u00" in data or b"\\/" in data:  # member names are ASCII: nobody escapes those
        raise Doubtful
    tokens: Dict[str, int] = {}
    error = None
    for line in data.split(b"\n")[:-1] if is_events else [data]:
        if b"{" not in line:
            continue
        try:
            text = (line.partition(b":")[2] if is_events else line).decode()
            event = json.loads(text, object_pairs_hook=members_once)
        except (ValueError, RecursionError):
            if is_events and (b'"response.completed"' in line or b'"response.incomplete"' in line):
                raise Doubtful from None  # of such an event the end may be enough
            continue
        if not isinstance(event, dict):
            continue
        kind = event.get("type")
        beside = [value for name, value in event.items() if name != "response" and isinstance(value, dict)]
        if kind in ("response.completed", "response.incomplete") and any("usage" in value for value in beside):
            raise Doubtful  # looked for one level down, in whatever member
        inside = event["response"] if isinstance(event.get("response"), dict) else event
        if kind in ("response.completed", "response.incomplete") and isinstance(inside.get("error"), dict):
            raise Doubtful  # nothing but the usage is looked for
        flat = kind == "error" and isinstance(event.get("code"), str)
        usage = inside_of({} if flat else inside, "usage")
        for counts in (usage, inside_of(usage, "input_tokens_details"), inside_of(usage, "prompt_tokens_details")):
            for name in ("input_tokens", "output_tokens", "cached_tokens", "cache_write_tokens"):
                take(tokens, name, counts.get(name))
            take(tokens, "input_tokens", counts.get("prompt_tokens"))
            take(tokens, "output_tokens", counts.get("completion_tokens"))
        failure = event if flat else inside.get("error")
        if isinstance(failure, dict):
            error = str(failure.get("code") or failure.get("type") or kind or "error")[:100]
        elif kind in ("error", "response.failed"):
            error = error or str(kind)  # a code that was read says more
    if tokens.get("cached_tokens", 0) > tokens.get("input_tokens", 0):
        del tokens["cached_tokens"]
    return tokens, error


def members_once(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise Doubtful
    return dict(pairs)


def inside_of(members: Dict[str, Any], name: str) -> Dict[str, Any]:
    value = members.get(name)
    return value if isinstance(value, dict) else {}


def take(tokens: Dict[str, int], name: str, value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53:
        tokens[name] = value


def read_usage(pieces: Sequence[bytes], is_events: bool) -> Tuple[Usage, bool]:
    reader = plexus_lite.UsageReader(is_events)
    for piece in pieces:
        reader.feed(piece)
        assert len(reader._begun) <= 2 * plexus_lite.END_BYTES, ("kept", len(reader._begun))
    reader.finish()
    return (reader.tokens, reader.error), reader.is_complete


def check_usage(data: bytes) -> str:
    seen = "nothing"
    for is_events in (True, False):
        for size in (50 + zlib.crc32(data) % 300, plexus_lite.END_BYTES):
            with unittest.mock.patch.object(plexus_lite, "END_BYTES", size):
                whole = read_usage([data], is_events)
                for pieces in splits(data):
                    assert read_usage(pieces, is_events) == whole, ("the splits decide", whole, pieces)
        with contextlib.suppress(Doubtful):
            wanted = ref_usage(data, is_events)
            assert whole[0] == wanted, (is_events, whole, wanted)
            seen = "read" if any(wanted) else seen
    return seen


USAGE = b'{"input_tokens":2048,"input_tokens_details":{"cached_tokens":1920,"cache_write_tokens":0},"output_tokens":8}'
CHAT_USAGE = (
    b'{"prompt_tokens":20,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":19},"total_tokens":28}'
)
ECHO = b'"tools":[{"usage":{"input_tokens":1}},"\\"usage\\":{"],"text":"\\\\","error":null,"a":{"b":[{"c":"}"}]}'
COMPLETED = b'{"type":"response.completed","response":{"id":"resp_1",%s,"usage":%s}}' % (ECHO, USAGE)
USAGES = (
    b"event: response.completed\ndata: " + COMPLETED + b"\n\n",
    b'data: {"response":{"usage":%s,%s},"type":"response.incomplete"}\r\n\r\n' % (USAGE, ECHO),
    b'data: {"type": "response.created", "response": {"usage": null, "error": null}}\n\ndata: ' + COMPLETED + b"\n\n",
    b'data: {"delta":"\\"usage\\":{\\"input_tokens\\":7}","type":"x"}\n\ndata: ' + COMPLETED,
    b'data: {"type":"response.failed","response":{"error":{"code":"rate_limit","message":"m"},"usage":null}}\n\n',
    b'data: {"type":"error","code":"server_error","message":"\xc3\xa9","param":null}\n\n',
    b'data: {"type":"error","error":{"type":"invalid_request","code":null}}\n\n',
    b'data: {"choices":[{"delta":{"content":""}}],"usage":null}\n\ndata: {"choices":[],"usage":%s}\n\ndata: [DONE]\n\n'
    % CHAT_USAGE,
    b'{\n  "id" : "resp_1",\n  %s,\n  "usage" : %s\n}\n' % (ECHO, USAGE),
    b'{"error":{"message":"no","type":"invalid_request_error","param":null,"code":429}}',
    b'{"usage":{"input_tokens":-1,"output_tokens":1e3,"input_tokens_details":{"cached_tokens":true}}}',
    b'{"%susage":{"input_tokens":1},"usage":{"input_tokens":%s1},"/usage":{"output_tokens":2}}'
    % (b"x" * 300, b"0" * 300),
)

USAGE_WORDS: Tuple[str, ...] = ("response", "usage", "error", "code", "input_tokens", "prompt_tokens", "output_tokens")
USAGE_WORDS += ("a", "/usage", "input_tokens_details", "prompt_tokens_details", "cached_tokens", "cache_write_tokens")


def random_usage(rng: random.Random) -> bytes:
    """Return members of the right names in every place, right and wrong, as an event or a whole body."""

    def members(depth: int) -> Dict[str, Any]:
        return {name: value(depth) for name in rng.sample(USAGE_WORDS, rng.randrange(1, 9))}

    def value(depth: int) -> Any:
        scalars: Tuple[Any, ...] = (
            0,
            7,
            2048,
            -1,
            1.5,
            10**15,
            10**14,
            True,
            None,
            "",
            "a",
            "usage",
            [{"usage": {}}],
            [[]],
        )
        return members(depth - 1) if depth and rng.random() < 0.7 else rng.choice(scalars)

    found = dict(members(3), type=rng.choice((*TERMINAL, "response.created", "x", 1, None)))
    order = sorted(found, key=lambda name: rng.random())
    text = json.dumps({name: found[name] for name in order}, indent=rng.choice((None, None, 1))).encode()
    return b"data: " + text + b"\n" if rng.random() < 0.5 else text


def content_seeds() -> List[bytes]:
    text = DOCUMENTS[0] * 3
    packed = [gzip.compress(text), gzip.compress(b"a") + gzip.compress(b""), zlib.compress(text), raw_deflate(text)]
    packed += [ZSTD_FRAME, store_zstd(text) + b"\x50\x2a\x4d\x18\x01\0\0\0." + store_zstd(b"")]
    heads = (b"\x00\x11", b"\x00\x11", b"\x01\x11", b"\x01\x11", b"\x06\x11", b"\x06\x11")
    return [head + one for head, one in zip(heads, packed)] + [b"\x00\x04" + gzip.compress(bytes(100)), b"\x03\x03abc"]


# ---- Running them --------------------------------------------------------------------------------

EVENT_SEEDS = (
    EVENTS,
    EVENTS.replace(b"\n", b"\r\n"),
    EVENTS.replace(b"\n", b"\r"),
    b": c\n\ndata\ndata:1\n\n\n",
    b"\r\n\n",
)
# name: (property, seeds to change, seeds that are taken as they are)
TARGETS: Dict[str, Tuple[Callable[[bytes], str], Sequence[bytes], Sequence[bytes]]] = {
    "request": (check_request, REQUESTS, NEAR_REQUESTS),
    "answer": (check_answer, ANSWERS, NEAR_ANSWERS),
    "events": (check_events, EVENT_SEEDS, ()),
    "json": (check_json, DOCUMENTS, ()),
    "content": (check_content, content_seeds(), ()),
    "usage": (check_usage, USAGES, ()),
}


class FuzzCase(unittest.TestCase):
    def try_one(self, target: str, data: bytes) -> str:
        try:
            return TARGETS[target][0](data)
        except Exception as error:
            raise AssertionError(f"{target}: {type(error).__name__}: {error}\nthe input was {data!r}") from error

    def fuzz(self, target: str, make: Callable[[random.Random, Sequence[bytes]], bytes] = mutate) -> Counter[str]:
        """Try the seeds and what *make* makes of them, until the time is up; return what was seen how often."""
        _, seeds, near = TARGETS[target]
        for seed in (*seeds, *near):
            self.try_one(target, seed)
        seen: Counter[str] = collections.Counter()
        deadline = time.monotonic() + SECONDS
        for number in range(MAX_RUNS):
            rng = random.Random(f"{SEED} {target} {number}")
            seen[self.try_one(target, make(rng, seeds))] += 1
            if time.monotonic() > deadline:
                break
        if SECONDS > 5:
            print(f"\n{target}: {dict(seen)}")
        return seen

    def assertBalanced(self, seen: Counter[str], *kinds: str) -> None:
        """Each kind makes up a twentieth at least: neither does everything pass, nor is everything refused."""
        for kind in kinds:
            self.assertGreater(seen[kind] * 20, sum(seen.values()), dict(seen))


class RequestTest(FuzzCase):
    def test_fuzz(self):
        self.assertBalanced(self.fuzz("request"), "taken", "refused")

    def test_seeds_are_taken(self):
        for seed in REQUESTS:
            self.assertEqual("taken", self.try_one("request", seed), seed)

    def test_near_misses_are_refused(self):
        for seed in NEAR_REQUESTS:
            with self.subTest(seed[-200:]):
                self.assertEqual("refused", self.try_one("request", seed))
                self.assertEqual([], read_requests([seed])[0])

    def test_empty_line_before_a_request_in_two_reads(self):
        self.assertEqual((1, False), (len(read_requests([b"\r", b"\n" + MODELS])[0]), False))


class AnswerTest(FuzzCase):
    def test_fuzz(self):
        self.assertBalanced(self.fuzz("answer"), "relayed", "refused")

    def test_seeds_are_relayed(self):
        for seed in ANSWERS:
            self.assertEqual("relayed", self.try_one("answer", seed), seed)

    def test_near_misses_are_refused(self):
        for seed in NEAR_ANSWERS:
            with self.subTest(seed[-200:]):
                self.assertEqual("refused", self.try_one("answer", seed))

    def test_every_early_end_is_a_cut(self):
        for seed in ANSWERS[:2]:
            for end in range(len(seed)):
                self.assertEqual("refused", self.try_one("answer", seed[:end]), seed[:end])

    def test_malformed_chunk_in_the_same_read_as_the_head(self):
        """Nothing has gone to the client, so it gets a 502, not a connection that closes without a word."""
        got = relay([STREAM_HEAD + b"5\r\nabc\r\nxyz"])
        self.assertEqual((False, True, 502), (got.nothing, got.is_own, got.seen.status))


class EventsTest(FuzzCase):
    def test_fuzz(self):
        self.assertBalanced(self.fuzz("events"), "comments")

    def test_response_id_beyond_the_limit(self):
        self.try_one("events", b'"id":"resp_1"' * 9)


class JsonTest(FuzzCase):
    def test_fuzz(self):
        self.assertBalanced(self.fuzz("json"), "edited", "refused")

    def test_random_documents(self):
        def make(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
            document = random_document(rng)
            return mutate(rng, [document]) if rng.random() < 0.2 else document

        self.assertBalanced(self.fuzz("json", make), "edited", "no model", "refused")

    def test_deep_and_long(self):
        for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
            for depth in (10, 100000):
                document = b'{"model":"m","a":' + opening * depth + b"1" + closing * depth + b"}"
                self.assertEqual("edited" if depth == 10 else "refused", self.try_one("json", document))
        self.assertEqual("refused", self.try_one("json", b'{"model":"m","a":' + b"9" * 100000 + b"}"))


class ContentTest(FuzzCase):
    def test_fuzz(self):
        self.assertBalanced(self.fuzz("content"), "decoded", "refused")

    def test_many_gzip_members(self):
        """Linear in the size: copying the rest for each member would make a body of 10 MB cost minutes."""
        raw = gzip.compress(b"") * 60000
        started = time.process_time()
        with contextlib.suppress(plexus_lite.ProxyError):  # that there are too many
            decode(raw, "gzip", 1000)
        self.assertLess(time.process_time() - started, 1.0)

    def test_bomb_takes_no_more_memory_than_its_limit(self):
        bomb = gzip.compress(bytes(50_000_000))
        tracemalloc.start()
        try:
            with self.assertRaises(plexus_lite.ProxyError):
                decode(bomb, "gzip", 100_000)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.assertLess(peak, 1_000_000)


class UsageTest(FuzzCase):
    def test_fuzz(self):
        def make(rng: random.Random, seeds: Sequence[bytes]) -> bytes:
            return mutate(rng, seeds) if rng.random() < 0.5 else random_usage(rng)

        self.assertBalanced(self.fuzz("usage", make), "read", "nothing")


if __name__ == "__main__":
    unittest.main()
