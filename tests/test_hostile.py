"""Rooms 4, 9 and 11 against those who mean harm: framing, slow peers, limits, credentials."""

import contextlib
import gzip
import re
import select
import signal
import socket
import threading
import time
import unittest
from typing import Any, Dict, Iterator, Optional, Tuple

from tests.support import (
    Answer,
    FakeUpstream,
    Pause,
    Proxy,
    RawClient,
    Reset,
    answer,
    build_request,
    enter,
    exchange,
    get,
    make_config,
    post,
    stream,
)

BODY = {"model": "gpt-test", "input": "x"}
ASK = build_request("POST", "/v1/responses", BODY)
JSON = b'{"model":"gpt-test"}'
KEY = b"Authorization: Bearer sk-client\r\n"
HEAD = b"POST /v1/responses HTTP/1.1\r\nHost: a\r\n" + KEY
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
SMUGGLED = build_request("POST", "/v1/responses", {"model": "gpt-test", "input": "smuggled"})
SIZE = b"Content-Length: %d\r\n" % len(JSON)
LINE = b"POST /v1/responses HTTP/1.1\r\n"

# name, what is sent, the statuses it may get; SMUGGLED follows each of them on the same connection
SMUGGLING: Tuple[Tuple[str, bytes, Tuple[int, ...]], ...] = (
    # both framings
    ("length and chunked", HEAD + SIZE + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
    ("chunked and length", HEAD + b"Transfer-Encoding: chunked\r\n" + SIZE + b"\r\n0\r\n\r\n", (400,)),
    ("chunked in HTTP/1.0", CHUNKED.replace(b"1.1", b"1.0") + b"0\r\n\r\n", (400,)),
    # transfer codings
    ("TE identity", HEAD + b"Transfer-Encoding: identity\r\n\r\n", (400, 501)),
    ("TE xchunked", HEAD + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n", (400, 501)),
    ("TE chunked, identity", HEAD + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n", (400, 501)),
    ("TE gzip, chunked", HEAD + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", (400, 501)),
    ("TE chunked twice", HEAD + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", (400, 501)),
    ("TE with parameter", HEAD + b"Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n", (400, 501)),
    ("TE quoted", HEAD + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n', (400, 501)),
    ("TE with a vertical tab", HEAD + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n", (400, 501)),
    ("TE with NBSP", HEAD + b"Transfer-Encoding: \xa0chunked\r\n\r\n0\r\n\r\n", (400, 501)),
    ("TE empty", HEAD + b"Transfer-Encoding:\r\n" + SIZE + b"\r\n" + JSON, (400, 501)),
    ("TE folded", HEAD + b"Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n", (400,)),
    ("TE with a space before the colon", HEAD + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n", (400,)),
    ("TE with a NUL", HEAD + b"Transfer-Encoding: chunked\0\r\n\r\n0\r\n\r\n", (400, 501)),
    ("TE in a bare LF line", HEAD + b"X: y\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", (400,)),
    # lengths
    ("two lengths", HEAD + SIZE + b"Content-Length: 5\r\n\r\n" + JSON, (400,)),
    ("the same length twice", HEAD + SIZE * 2 + b"\r\n" + JSON, (400,)),
    ("a list of lengths", HEAD + b"Content-Length: 20, 20\r\n\r\n" + JSON, (400,)),
    ("length +20", HEAD + b"Content-Length: +20\r\n\r\n" + JSON, (400,)),
    ("length -1", HEAD + b"Content-Length: -1\r\n\r\n" + JSON, (400,)),
    ("length 0x14", HEAD + b"Content-Length: 0x14\r\n\r\n" + JSON, (400,)),
    ("length 2_0", HEAD + b"Content-Length: 2_0\r\n\r\n" + JSON, (400,)),
    ("length 2 0", HEAD + b"Content-Length: 2 0\r\n\r\n" + JSON, (400,)),
    ("length 20.0", HEAD + b"Content-Length: 20.0\r\n\r\n" + JSON, (400,)),
    ("length 2e1", HEAD + b"Content-Length: 2e1\r\n\r\n" + JSON, (400,)),
    ("empty length", HEAD + b"Content-Length: \r\n\r\n" + JSON, (400,)),
    ("length in other digits", HEAD + b"Content-Length: \xb2\r\n\r\n" + JSON, (400,)),
    ("length that overflows", HEAD + b"Content-Length: 18446744073709551636\r\n\r\n" + JSON, (400, 413)),
    ("length with a tab inside", HEAD + b"Content-Length: 2\t0\r\n\r\n" + JSON, (400,)),
    # lines and fields
    ("bare LF after the request line", LINE[:-2] + b"\nHost: a\r\n" + KEY + SIZE + b"\r\n" + JSON, (400,)),
    ("bare LF between fields", HEAD[:-2] + b"\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("bare LF as the empty line", HEAD + SIZE + b"\n" + JSON, (400,)),
    ("only LF", (HEAD + SIZE + b"\r\n").replace(b"\r\n", b"\n") + JSON, (400,)),
    ("bare CR in a value", HEAD + b"X: a\rb\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("bare CR between fields", HEAD + b"X: a\rContent-Length: 0\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("CR CR LF", HEAD + b"X: a\r\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("folded line", HEAD + b"X: a\r\n b\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("folded line with a tab", HEAD + b"X: a\r\n\tContent-Length: 0\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("folded first field", LINE + b" Host: a\r\nHost: a\r\n" + KEY + SIZE + b"\r\n" + JSON, (400,)),
    ("space before the colon", HEAD + b"Content-Length : 20\r\n\r\n" + JSON, (400,)),
    ("tab before the colon", HEAD + b"X\t: 1\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("no colon", HEAD + b"X\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("no name", HEAD + b": x\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("name with a space", HEAD + b"X Y: 1\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("name with a NUL", HEAD + b"X\0: 1\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("name with a high byte", HEAD + b"X\xe9: 1\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("name in parentheses", HEAD + b"(X): 1\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("NUL in a value", HEAD + b"X: a\0b\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("escape in a value", HEAD + b"X: a\x1bb\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("DEL in a value", HEAD + b"X: a\x7fb\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    # hosts
    ("no Host", LINE + KEY + SIZE + b"\r\n" + JSON, (400,)),
    ("two Hosts", HEAD + b"Host: b\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("the same Host twice", HEAD + b"Host: a\r\n" + SIZE + b"\r\n" + JSON, (400,)),
    ("Host with a space", LINE + b"Host: a b\r\n" + KEY + SIZE + b"\r\n" + JSON, (400,)),
    ("Host with a user", LINE + b"Host: u@a\r\n" + KEY + SIZE + b"\r\n" + JSON, (400,)),
    ("Host with a path", LINE + b"Host: a/b\r\n" + KEY + SIZE + b"\r\n" + JSON, (400,)),
    ("Host with a list", LINE + b"Host: a, b\r\n" + KEY + SIZE + b"\r\n" + JSON, (400,)),
    ("Host with a bad port", LINE + b"Host: a:x\r\n" + KEY + SIZE + b"\r\n" + JSON, (400,)),
    # request lines
    ("HTTP/0.9", b"GET /health\r\n\r\n", (400, 505)),
    ("HTTP/2.0", HEAD.replace(b"HTTP/1.1", b"HTTP/2.0") + SIZE + b"\r\n" + JSON, (400, 505)),
    ("HTTP/3", HEAD.replace(b"HTTP/1.1", b"HTTP/3") + SIZE + b"\r\n" + JSON, (400, 505)),
    ("HTTP/1.10", HEAD.replace(b"HTTP/1.1", b"HTTP/1.10") + SIZE + b"\r\n" + JSON, (400, 505)),
    ("HTTP/01.1", HEAD.replace(b"HTTP/1.1", b"HTTP/01.1") + SIZE + b"\r\n" + JSON, (400, 505)),
    ("HTTP/+1.1", HEAD.replace(b"HTTP/1.1", b"HTTP/+1.1") + SIZE + b"\r\n" + JSON, (400, 505)),
    ("http/1.1", HEAD.replace(b"HTTP/1.1", b"http/1.1") + SIZE + b"\r\n" + JSON, (400, 505)),
    ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (400, 505)),
    ("two spaces", HEAD.replace(b" /v1", b"  /v1") + SIZE + b"\r\n" + JSON, (400,)),
    ("tab as separator", HEAD.replace(b" /v1", b"\t/v1") + SIZE + b"\r\n" + JSON, (400,)),
    ("space behind the version", HEAD.replace(b"HTTP/1.1\r", b"HTTP/1.1 \r") + SIZE + b"\r\n" + JSON, (400, 505)),
    ("space in the target", HEAD.replace(b"/responses", b"/res ponses") + SIZE + b"\r\n" + JSON, (400,)),
    ("NUL in the target", HEAD.replace(b"/responses", b"/res\0ponses") + SIZE + b"\r\n" + JSON, (400,)),
    ("high byte in the target", HEAD.replace(b"/responses", b"/r\xc3\xa9ponses") + SIZE + b"\r\n" + JSON, (400,)),
    ("fragment in the target", HEAD.replace(b"/responses", b"/responses#x") + SIZE + b"\r\n" + JSON, (400,)),
    ("target without a slash", HEAD.replace(b"/v1/responses", b"v1/responses") + SIZE + b"\r\n" + JSON, (400,)),
    ("empty absolute host", HEAD.replace(b"/v1", b"http:///v1") + SIZE + b"\r\n" + JSON, (400,)),
    ("user in an absolute target", HEAD.replace(b"/v1", b"http://u@a/v1") + SIZE + b"\r\n" + JSON, (400,)),
    ("another scheme", HEAD.replace(b"/v1", b"ftp://a/v1") + SIZE + b"\r\n" + JSON, (400,)),
    ("authority form", b"CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n", (400, 404, 405, 501)),
    ("method with a colon", HEAD.replace(b"POST", b"PO:ST") + SIZE + b"\r\n" + JSON, (400,)),
    ("no method", HEAD.replace(b"POST ", b" ") + SIZE + b"\r\n" + JSON, (400,)),
    ("leading space", b" " + HEAD + SIZE + b"\r\n" + JSON, (400,)),
    ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", (400,)),
    ("SOCKS", b"\x05\x01\x00", (400,)),
    # chunks
    ("chunk size +5", CHUNKED + b"+5\r\nabcde\r\n0\r\n\r\n", (400,)),
    ("chunk size -1", CHUNKED + b"-1\r\nabcde\r\n0\r\n\r\n", (400,)),
    ("chunk size 0x5", CHUNKED + b"0x5\r\nabcde\r\n0\r\n\r\n", (400,)),
    ("chunk size 0_5", CHUNKED + b"0_5\r\nabcde\r\n0\r\n\r\n", (400,)),
    ("chunk size with a space", CHUNKED + b" 5\r\nabcde\r\n0\r\n\r\n", (400,)),
    ("empty chunk size", CHUNKED + b"\r\nabcde\r\n0\r\n\r\n", (400,)),
    ("chunk size g", CHUNKED + b"g\r\nabcde\r\n0\r\n\r\n", (400,)),
    ("chunk size in other digits", CHUNKED + b"\xb2\r\nab\r\n0\r\n\r\n", (400,)),
    ("chunk size that overflows", CHUNKED + b"f" * 17 + b"\r\nabcde\r\n0\r\n\r\n", (400, 413)),
    ("chunk size that wraps", CHUNKED + b"10000000000000005\r\nabcde\r\n0\r\n\r\n", (400, 413)),
    ("chunk line that never ends", CHUNKED + b"5;" + b"x" * 70_000, (400, 413, 431)),
    ("bare LF after the size", CHUNKED + b"5\nabcde\r\n0\r\n\r\n", (400,)),
    ("bare CR after the size", CHUNKED + b"5\rabcde\r\n0\r\n\r\n", (400,)),
    ("bare LF in an extension", CHUNKED + b"5;a\nabcde\r\n0\r\n\r\n", (400,)),
    ("bare LF after the data", CHUNKED + b"5\r\nabcde\n0\r\n\r\n", (400,)),
    ("chunk longer than its size", CHUNKED + b"5\r\nabcdefg\r\n0\r\n\r\n", (400,)),
    ("junk after a chunk", CHUNKED + b"5\r\nabcdeX\r\n0\r\n\r\n", (400,)),
    ("bare LF after the last chunk", CHUNKED + b"0\n\n", (400,)),
    ("trailer without a colon", CHUNKED + b"0\r\nX\r\n\r\n", (400,)),
    ("trailer with a NUL", CHUNKED + b"0\r\nX: a\0\r\n\r\n", (400,)),
    ("folded trailer", CHUNKED + b"0\r\nX: a\r\n b\r\n\r\n", (400,)),
    ("endless trailers", CHUNKED + b"0\r\n" + b"X: a\r\n" * 20_000, (400, 413, 431)),
)


def send_what_goes(client: RawClient, data: bytes) -> None:
    """Send *data*; the peer may answer and close before it has all of it."""
    with contextlib.suppress(ConnectionError):
        client.send(data)


class HostileTest(unittest.TestCase):
    limits: Dict[str, Any] = {}
    proxy: Proxy
    upstream: FakeUpstream

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream())
        cls.proxy = enter(cls.addClassCleanup, Proxy(make_config(cls.upstream, limits=cls.limits)))

    def setUp(self):
        self.upstream.reset()

    def connect(self, timeout: float = 10) -> RawClient:
        client = RawClient(self.proxy.port, timeout)
        self.addCleanup(client.close)
        return client

    def event(self) -> threading.Event:
        event = threading.Event()
        self.addCleanup(event.set)
        return event

    def busy(self) -> Tuple[RawClient, threading.Event]:
        """Return a client whose answer is awaited until the event is set."""
        gate = self.event()
        self.upstream.script([Pause(gate), *answer(200, (), {"late": 1})])
        client = self.connect()
        known = len(self.upstream.requests)
        client.send(ASK)
        self.upstream.wait_for_requests(known + 1)
        return client, gate

    def assert_error(self, got: Answer, status: int, code: Optional[str] = None) -> str:
        self.assertEqual(got.status, status, got.body)
        error = got.json()["error"]
        self.assertEqual(sorted(error), ["code", "message", "param", "type"])
        self.assertEqual(got.all("x-plexus-error"), [error["code"]])
        if code:
            self.assertEqual(error["code"], code)
        return str(error["message"])

    def assert_served(self) -> None:
        self.assertEqual(post(self.proxy.port, "/v1/responses", BODY).status, 200)


class SmugglingTest(HostileTest):
    def test_what_two_parsers_could_read_differently_is_refused_and_closed(self):
        for name, raw, statuses in SMUGGLING:
            with self.subTest(name), RawClient(self.proxy.port) as client:
                send_what_goes(client, raw + SMUGGLED)
                got = client.read_answer()
                self.assertIn(got.status, statuses)
                self.assert_error(got, got.status)
                self.assertTrue(got.header("x-plexus-request-id"))
                self.assertEqual(client.take_rest() if not client.buffer else bytes(client.buffer), b"")
        self.assert_served()
        self.assertEqual(len(self.upstream.requests), 1, "a smuggled request reached the upstream")

    def test_result_is_the_same_byte_by_byte(self):
        for name, raw, statuses in SMUGGLING:
            if len(raw) > 1000:
                continue
            with self.subTest(name), RawClient(self.proxy.port) as client:
                for at in range(len(raw)):
                    send_what_goes(client, raw[at : at + 1])
                send_what_goes(client, SMUGGLED)
                got = client.read_answer()
                self.assertIn(got.status, statuses)
        self.assert_served()
        self.assertEqual(len(self.upstream.requests), 1)

    def test_refusal_comes_at_once_where_more_would_never_come(self):
        for name, raw in (
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
            ("bare LF", b"GET /health HTTP/1.1\nHost: a\n\n"),
            ("HTTP/0.9", b"GET /health\r\n"),
            ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\n"),
            ("chunk size", CHUNKED + b"xyz"),
        ):
            with self.subTest(name), RawClient(self.proxy.port, 3) as client:
                client.send(raw)
                self.assertIn(client.read_answer().status, (400, 505))

    def test_tls_on_the_plain_port_is_told_so(self):
        got = exchange(self.proxy.port, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
        self.assertIn("http://", self.assert_error(got, 400, "invalid_request"))

    def test_legal_oddities_are_served(self):
        chunked = b'14;ext="a"\r\n' + JSON + b"\r\n000\r\nX-Trailer: 1\r\n\r\n"
        for name, raw in (
            ("absolute form", HEAD.replace(b"/v1", b"http://other/v1") + SIZE + b"\r\n" + JSON),
            ("absolute form with a port", HEAD.replace(b"/v1", b"HTTP://a:80/v1") + SIZE + b"\r\n" + JSON),
            ("empty line in front", b"\r\n\r\n" + HEAD + SIZE + b"\r\n" + JSON),
            ("leading zeros", HEAD + b"Content-Length: 0000000020\r\n\r\n" + JSON),
            ("white space around a value", HEAD + b"Content-Length:\t 20 \t\r\n\r\n" + JSON),
            ("no white space", HEAD + b"Content-Length:20\r\n\r\n" + JSON),
            ("chunked in capitals", HEAD + b"TRANSFER-ENCODING: CHUNKED\r\n\r\n" + chunked),
            ("empty value", HEAD + b"X-Empty:\r\n" + SIZE + b"\r\n" + JSON),
            ("high bytes in a value", HEAD + b"X: caf\xc3\xa9\r\n" + SIZE + b"\r\n" + JSON),
            (
                "empty Host with HTTP/1.0",
                HEAD.replace(b"1.1", b"1.0").replace(b"Host: a\r\n", b"") + SIZE + b"\r\n" + JSON,
            ),
            ("HTTP/1.0", HEAD.replace(b"1.1", b"1.0") + SIZE + b"\r\n" + JSON),
            ("many fields", HEAD + b"X-Y: 1\r\n" * 500 + SIZE + b"\r\n" + JSON),
        ):
            with self.subTest(name):
                self.upstream.requests.clear()
                self.assertEqual(exchange(self.proxy.port, raw).status, 200)
                got = self.upstream.wait_for_requests(1)[0]
                self.assertEqual((got.target, got.body, got.all("X-Trailer")), ("/v1/responses", JSON, []))
                self.assertEqual(len(got.all("Host")), 1)

    def test_connection_named_fields_of_the_client_never_pass_as_the_proxys_own(self):
        fields = {"Connection": "close, content-length, authorization, host", "session_id": "kept"}
        self.assertEqual(post(self.proxy.port, "/v1/responses", JSON, fields).status, 200)
        got = self.upstream.wait_for_requests(1)[0]
        self.assertEqual((got.all("Authorization"), got.body), (["Bearer sk-upstream"], JSON))


class InOrderTest(HostileTest):
    def test_pipelined_requests_are_answered_in_order(self):
        count = 20
        self.addCleanup(setattr, self.upstream, "default", self.upstream.default)
        self.upstream.default = lambda request: answer(200, (), {"n": request.json()["n"]})
        client = self.connect()
        client.send(b"".join(
            build_request("POST", "/v1/responses", {"model": "gpt-test", "n": number}) for number in range(count)
        ))  # fmt: skip
        self.assertEqual([client.read_answer().json()["n"] for _ in range(count)], list(range(count)))

    def test_pipelined_requests_of_every_kind_stay_in_step(self):
        client = self.connect()
        client.send(ASK + build_request("GET", "/health") + build_request("POST", "/nope", b"xx") +
                    build_request("HEAD", "/health") + build_request("POST", "/v1/responses", b"{") + ASK)  # fmt: skip
        statuses = [client.read_answer(method).status for method in ("POST", "GET", "POST", "HEAD", "POST", "POST")]
        self.assertEqual(statuses, [200, 200, 404, 200, 400, 200])

    def test_next_request_waits_until_the_answer_before_it_is_out(self):
        gate = self.event()
        self.upstream.script(stream(b"data: 1\n\n", Pause(gate)), answer(200, (), {"second": 1}))
        client = self.connect()
        client.send(ASK + ASK)
        client.wait_for(b"data: 1\n\n")
        self.assertEqual(len(self.upstream.requests), 1)
        gate.set()
        self.assertTrue(client.read_answer().complete)
        self.assertEqual(client.read_answer().json(), {"second": 1})

    def test_thousands_of_pipelined_requests_do_not_pile_up(self):
        client = self.connect(20)
        flood = build_request("GET", "/health") * 1500
        sender = threading.Thread(target=send_what_goes, args=(client, flood))
        sender.start()
        for _ in range(1500):
            self.assertEqual(client.read_answer().status, 200)
        sender.join(10)

    def test_what_follows_a_request_that_closes_is_not_served(self):
        raw = build_request("POST", "/v1/responses", BODY, {"Connection": "close"})
        client = self.connect()
        client.send(raw + SMUGGLED)
        self.assertEqual(client.read_answer().status, 200)
        self.assertEqual(client.take_rest(), b"")
        self.assertEqual(len(self.upstream.requests), 1)

    def test_body_comes_whole_however_it_is_split(self):
        for name, raw in (
            ("length", HEAD + SIZE + b"\r\n" + JSON),
            ("chunked", CHUNKED + b'a;x="y"\r\n' + JSON[:10] + b"\r\nA\r\n" + JSON[10:] + b"\r\n0\r\nX: 1\r\n\r\n"),
        ):
            for size in (1, 2, 3, 50):
                with self.subTest(name, size=size):
                    self.upstream.requests.clear()
                    client = self.connect()
                    for at in range(0, len(raw), size):
                        client.send(raw[at : at + size])
                    self.assertEqual(client.read_answer().status, 200)
                    self.assertEqual(self.upstream.wait_for_requests(1)[0].body, JSON)

    def test_expect_100_continue_is_met_before_the_body(self):
        for fields in ({"Expect": "100-continue"}, {"expect": "100-Continue"}):
            head = build_request("POST", "/v1/responses", None, dict(fields, **{"Content-Length": str(len(JSON))}))
            client = self.connect()
            client.send(head)
            client.wait_for(b"HTTP/1.1 100 Continue\r\n\r\n")
            client.send(JSON)
            got = client.read_answer()
            self.assertEqual((got.status, got.interim), (200, [100]))
            self.assertEqual(self.upstream.requests[-1].all("Expect"), [])

    def test_expect_100_continue_of_a_chunked_body_is_met(self):
        client = self.connect()
        client.send(CHUNKED[:-2] + b"Expect: 100-continue\r\n\r\n")
        client.wait_for(b"HTTP/1.1 100 Continue\r\n\r\n")
        client.send(b"%x\r\n%b\r\n0\r\n\r\n" % (len(JSON), JSON))
        self.assertEqual(client.read_answer().status, 200)

    def test_expect_100_continue_of_a_refused_request_asks_for_no_body(self):
        for path, key, status in (("/nope", "sk-client", 404), ("/v1/responses", "sk-wrong", 401)):
            fields = {"Expect": "100-continue", "Content-Length": "1000"}
            client = self.connect()
            client.send(build_request("POST", path, None, fields, key))
            got = client.read_answer()
            self.assertEqual((got.status, got.interim), (status, []))

    def test_http_1_0_gets_no_100(self):
        raw = build_request("POST", "/v1/responses", JSON, {"Expect": "100-continue"}).replace(b"HTTP/1.1", b"HTTP/1.0")
        got = exchange(self.proxy.port, raw)
        self.assertEqual((got.status, got.interim), (200, []))

    def test_other_expectations_are_a_417(self):
        got = post(self.proxy.port, "/v1/responses", BODY, {"Expect": "something-else"})
        self.assert_error(got, 417, "expectation_failed")

    def test_answer_that_comes_before_the_end_of_the_request_is_passed_on(self):
        """An upstream may refuse a large body early and read no further: its reason must not be lost."""
        listener = enter(self.addCleanup, socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        listener.settimeout(10)
        done = self.event()

        def refuse() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.settimeout(10)
                while b"\r\n\r\n" not in sock.recv(1000):
                    pass
                sock.sendall(b'HTTP/1.1 413 Too Large\r\nContent-Length: 30\r\n\r\n{"error":{"code":"too_large"}}\n')
                done.wait(10)

        thread = threading.Thread(target=refuse)
        thread.start()
        self.addCleanup(thread.join, 10)
        self.addCleanup(done.set)
        proxy = enter(self.addCleanup, Proxy(make_config(f"http://127.0.0.1:{listener.getsockname()[1]}/v1")))
        got = post(proxy.port, "/v1/responses", dict(BODY, input="x" * 20_000_000), timeout=20)
        self.assertEqual((got.status, got.error_code), (413, "too_large"))


class SlowPeersTest(HostileTest):
    limits = {"header_timeout_s": 0.5, "body_timeout_s": 0.6, "client_idle_s": 0.5}

    SLOW: Tuple[Tuple[str, bytes, bytes, int, str], ...] = (
        # name, what comes at once, what drips (nothing: it stops), status, key that the message names
        ("dripped head", HEAD, b"X-Y: 1\r\n", 408, "header_timeout_s"),
        ("dripped request line", b"GET /", b"x", 408, "header_timeout_s"),
        ("head that stops", b"GET /hea", b"", 408, "header_timeout_s"),
        ("dripped body", HEAD + b"Content-Length: 5000\r\n\r\n", b"x", 408, "body_timeout_s"),
        ("dripped chunk", CHUNKED + b"1388\r\n", b"x", 408, "body_timeout_s"),
        ("chunks of a byte each", CHUNKED, b"1\r\nx\r\n", 408, "body_timeout_s"),
        ("dripped chunk extension", CHUNKED + b"5;", b"x", 408, "body_timeout_s"),
        ("dripped trailers", CHUNKED + b"0\r\n", b"X: 1\r\n", 408, "body_timeout_s"),
        ("body that stops", HEAD + SIZE + b"\r\n" + JSON[:5], b"", 408, "body_timeout_s"),
        ("no body after 100", HEAD + SIZE + b"Expect: 100-continue\r\n\r\n", b"", 408, "body_timeout_s"),
        (
            "dripped body of a refused request",
            HEAD.replace(b"sk-client", b"sk-wrong") + b"Content-Length: 5000\r\n\r\n",
            b"x",
            408,
            "body_timeout_s",
        ),
    )

    def test_slow_requests_are_a_408_in_time_however_they_drip(self):
        """All at the same time, a byte each every 50 ms: no single read takes long."""
        started = time.monotonic()
        waiting = [(*row, self.connect()) for row in self.SLOW]
        for _, at_once, _, _, _, client in waiting:
            client.send(at_once)
            if b"100-continue" in at_once:
                client.wait_for(b"100 Continue\r\n\r\n")
        for turn in range(60):
            for row in list(waiting):
                name, _, drip, status, key, client = row
                if select.select([client.sock], [], [], 0.05 / len(waiting))[0]:
                    waiting.remove(row)
                    with self.subTest(name):
                        got = client.read_answer()
                        if "refused" in name:
                            self.assertIn(got.status, (401, 408))
                        else:
                            self.assertIn(key, self.assert_error(got, status, "request_timeout"))
                        self.assertLess(time.monotonic() - started, 2.5)
                        self.assertEqual(got.all("Connection"), ["close"])
                elif drip:
                    send_what_goes(client, drip[turn % len(drip) :][:1])
            if not waiting:
                break
        self.assertEqual([row[0] for row in waiting], [])
        self.assertEqual(self.upstream.requests, [])

    def test_idle_connection_is_closed_without_a_word(self):
        new, used = self.connect(), self.connect()
        used.send(ASK)
        self.assertEqual(used.read_answer().status, 200)
        self.assertTrue(new.at_eof(3))
        self.assertTrue(used.at_eof(3))

    def test_slow_upstream_is_no_slow_client(self):
        client, gate = self.busy()
        self.assertEqual(select.select([client.sock], [], [], 0.9)[0], [])
        gate.set()
        self.assertEqual(client.read_answer().json(), {"late": 1})

    def test_hundreds_of_slow_heads_and_idle_connections_do_not_hinder_others(self):
        clients = [self.connect() for _ in range(200)]
        for client in clients[::2]:
            client.send(b"POST /v1/responses HTTP/1.1\r\nHost")
        started = time.monotonic()
        self.assert_served()
        self.assertLess(time.monotonic() - started, 1)


class LimitsTest(HostileTest):
    limits = {
        "max_connections": 4,
        "max_body_bytes": 100_000,
        "max_header_bytes": 8192,
        "max_buffered_bytes": 150_000,
        "client_idle_s": 30,
    }

    def setUp(self):
        super().setUp()
        self.wait_until_empty()

    def wait_until_empty(self) -> None:
        """Wait until the connections of the test before are gone: four at once are served then."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            with contextlib.ExitStack() as stack:
                clients = [stack.enter_context(RawClient(self.proxy.port)) for _ in range(4)]
                for client in clients:
                    client.send(build_request("GET", "/health"))
                with contextlib.suppress(EOFError, ConnectionError):
                    if [client.read_answer("GET").status for client in clients] == [200] * 4:
                        return
        self.fail("connections are still held")

    def test_large_body_is_a_413_that_names_the_key(self):
        big = b'{"model":"gpt-test","input":"' + b"x" * 100_000 + b'"}'
        for name, raw in (
            ("by its length", build_request("POST", "/v1/responses", big)),
            ("as it comes", CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(big), big)),
            ("announced only", HEAD + b"Content-Length: 99999999999\r\n\r\n"),
        ):
            with self.subTest(name):
                message = self.assert_error(exchange(self.proxy.port, raw), 413, "content_too_large")
                self.assertIn("max_body_bytes", message)
        self.assertEqual(self.upstream.requests, [])

    def test_compressed_body_is_bounded_after_decoding(self):
        bomb = gzip.compress(b'{"model":"gpt-test","input":"' + b"x" * 50_000_000 + b'"}')
        self.assertLess(len(bomb), 100_000)
        got = post(self.proxy.port, "/v1/responses", bomb, {"Content-Encoding": "gzip"})
        self.assertIn("max_body_bytes", self.assert_error(got, 413, "content_too_large"))

    def test_body_at_the_limit_passes(self):
        body = b'{"model":"gpt-test"' + b" " * (100_000 - 20) + b"}"
        self.assertEqual(post(self.proxy.port, "/v1/responses", body).status, 200)

    def test_large_head_is_a_431_that_names_the_key(self):
        for name, fields in (("one field", b"X: " + b"a" * 9000 + b"\r\n"), ("many fields", b"X: 1\r\n" * 2000)):
            with self.subTest(name):
                client = self.connect()
                send_what_goes(client, HEAD + fields + SIZE + b"\r\n" + JSON)
                self.assertIn("max_header_bytes", self.assert_error(client.read_answer(), 431, "headers_too_large"))

    def test_endless_head_is_a_431_before_its_end(self):
        client = self.connect()
        send_what_goes(client, HEAD + b"X: " + b"a" * 20_000)
        self.assert_error(client.read_answer(), 431)

    def test_large_answer_head_is_a_502_that_names_the_key(self):
        self.upstream.script(answer(200, {"X": "a" * 9000}, {}))
        got = post(self.proxy.port, "/v1/responses", BODY)
        self.assertIn("max_header_bytes", self.assert_error(got, 502, "upstream_invalid_response"))

    def test_endless_interim_answers_are_a_502_that_names_the_key(self):
        self.upstream.script([b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 10 for _ in range(1000)])
        got = post(self.proxy.port, "/v1/responses", BODY)
        self.assertIn("max_header_bytes", self.assert_error(got, 502, "upstream_invalid_response"))

    def test_bodies_of_all_clients_together_are_bounded(self):
        body = b'{"model":"gpt-test","input":"' + b"x" * 80_000 + b'"}'
        gate = self.event()
        self.upstream.script([Pause(gate), *answer(200, (), {})])
        first = self.connect()
        first.send(build_request("POST", "/v1/responses", body))
        self.upstream.wait_for_requests(1)
        got = post(self.proxy.port, "/v1/responses", body)
        self.assertIn("max_buffered_bytes", self.assert_error(got, 503, "overloaded"))
        self.assertRegex(got.header("Retry-After") or "", r"^[0-9]+$")
        self.assertEqual(post(self.proxy.port, "/v1/responses", BODY).status, 200)  # a small one still fits
        gate.set()
        self.assertEqual(first.read_answer().status, 200)
        self.assertEqual(post(self.proxy.port, "/v1/responses", body).status, 200)

    def test_a_copy_with_another_models_name_counts_too(self):
        for size, status in ((60_000, 200), (80_000, 503)):
            got = post(self.proxy.port, "/v1/responses", {"model": "direct/up/gpt-test", "input": "x" * size})
            self.assertEqual(got.status, status)

    def test_what_a_body_is_decoded_to_counts_too(self):
        text = b'{"model":"gpt-test","input":"' + b"x" * 80_000 + b'"}'
        gate = self.event()
        self.upstream.script([Pause(gate), *answer(200, (), {})])
        first = self.connect()
        packed = build_request("POST", "/v1/responses", gzip.compress(text), {"Content-Encoding": "gzip"})
        first.send(packed)
        self.upstream.wait_for_requests(1)
        second = self.connect()
        second.send(packed)
        self.assertIn("max_buffered_bytes", self.assert_error(second.read_answer(), 503, "overloaded"))
        gate.set()
        self.assertEqual(first.read_answer().status, 200)
        third = self.connect()
        third.send(packed)
        self.assertEqual(third.read_answer().status, 200)

    def test_buffer_is_given_back_by_every_way_to_end(self):
        body = b'{"model":"gpt-test","input":"' + b"x" * 80_000 + b'"}'
        for number in range(6):
            whole = build_request("POST", "/v1/responses", body, key=f"sk-client:given back {number}")
            client = self.connect()
            if number % 3 == 0:  # leaves in mid-body
                client.send(whole[:-100])
            elif number % 3 == 1:  # leaves in mid-answer
                gate = self.event()
                self.upstream.script([Pause(gate)])
                self.upstream.requests.clear()
                client.send(whole)
                self.upstream.wait_for_requests(1)
            else:  # bad JSON
                client.send(build_request("POST", "/v1/responses", body[:-1]))
                self.assertEqual(client.read_answer().status, 400)
            client.reset()
            if number % 3 != 2:
                self.proxy.wait_for_record(lambda one: one.get("label") == f"given back {number}")  # noqa: B023
        self.assertEqual(post(self.proxy.port, "/v1/responses", body).status, 200)

    def test_connection_beyond_the_limit_is_a_503_with_retry_after(self):
        held = [self.busy() for _ in range(4)]
        started = time.monotonic()
        got = get(self.proxy.port, "/health")
        self.assertIn("max_connections", self.assert_error(got, 503, "overloaded"))
        self.assertRegex(got.header("Retry-After") or "", r"^[0-9]+$")
        self.assertLess(time.monotonic() - started, 2)
        for client, gate in held:
            gate.set()
            self.assertEqual(client.read_answer().json(), {"late": 1})
            client.close()
        self.wait_until_empty()

    def test_idle_connection_gives_way_to_a_new_one(self):
        idle = [self.connect() for _ in range(4)]
        for client in idle:
            client.send(build_request("GET", "/health"))
            self.assertEqual(client.read_answer("GET").status, 200)
        self.assert_served()
        closed = [client for client in idle if client.at_eof(0.1)]
        self.assertTrue(1 <= len(closed) <= 2, len(closed))

    @unittest.skipUnless(hasattr(signal, "SIGSTOP"), "many come in one go only while the program is stopped")
    def test_connection_whose_request_has_not_been_read_yet_does_not_give_way(self):
        """All that came meanwhile are accepted before the first of them is read."""
        self.proxy.process.send_signal(signal.SIGSTOP)
        try:
            clients = [self.connect() for _ in range(6)]
            for client in clients:
                client.send(build_request("GET", "/health"))
        finally:
            self.proxy.process.send_signal(signal.SIGCONT)
        self.assertEqual([client.read_answer("GET").status for client in clients], [200] * 4 + [503] * 2)

    def test_busy_connection_never_gives_way(self):
        held = [self.busy() for _ in range(3)]
        for _ in range(5):
            self.assertEqual(get(self.proxy.port, "/health").status, 200)
        for client, gate in held:
            gate.set()
            self.assertEqual(client.read_answer().json(), {"late": 1})

    def test_connect_and_close_in_masses_leaves_room(self):
        for number in range(300):
            client = RawClient(self.proxy.port)
            if number % 2:
                client.close()
            else:
                client.reset()
        self.wait_until_empty()
        self.assert_served()


class CredentialsTest(HostileTest):
    """sk-upstream is the provider's, sk-client the client's: neither shows on the wrong side, nor in the log."""

    SECRET = b"sk-upstream-0123456789"

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream())
        config = make_config(cls.upstream, {"api_key": cls.SECRET.decode()})
        config["providers"]["headed"] = {
            "api_base_url": cls.upstream.base_url,
            "models": ["headed"],
            "headers": {"Authorization": "Token tk-static-0123456789", "api-key": "ak-static-0123456789"},
        }
        cls.proxy = enter(cls.addClassCleanup, Proxy(config, args=["--log-level", "debug"]))

    def echo(self, *chunks: bytes, status: int = 401, model: str = "gpt-test", headers: Any = ()) -> Answer:
        self.upstream.script(stream(*chunks, status=status, headers=headers))
        return post(self.proxy.port, "/v1/responses", {"model": model})

    def test_error_body_that_repeats_our_key_is_masked(self):
        secret = self.SECRET
        for name, chunks in (
            ("whole", [b'{"error":"Incorrect API key: ' + secret + b'."}']),
            ("split", [b'{"error":"key ' + secret[:9], secret[9:] + b'"}']),
            ("byte by byte", [bytes([byte]) for byte in b"<" + secret + b"|" + secret + b">"]),
            ("at both ends", [secret, b" middle ", secret]),
        ):
            for status in (400, 401, 403, 500):
                with self.subTest(name, status=status):
                    got = self.echo(*chunks, status=status)
                    self.assertEqual((got.status, got.complete), (status, True))
                    self.assertNotIn(secret, got.body)
                    self.assertEqual(len(re.findall(rb"\*+", got.body)), b"".join(chunks).count(secret))
                    if "Content-Length" in dict(got.headers):
                        self.assertEqual(got.header("Content-Length"), str(len(got.body)))

    def test_an_error_too_long_to_be_held_back_arrives_whole_with_its_length(self):
        """What was held back counts as part of the body that Content-Length announces."""
        body = b'{"error":"' + self.SECRET + b"x" * 200_000 + b'"}'
        for size in (1000, 100_000):
            with self.subTest(size):
                head, rest = answer(400, (), body)[0], [body[at : at + size] for at in range(0, len(body), size)]
                assert isinstance(head, bytes)
                head = head[: head.index(b"\r\n\r\n") + 4]
                self.upstream.script([head, *rest])
                got = post(self.proxy.port, "/v1/responses", {"model": "gpt-test"})
                self.assertTrue(got.complete)
                self.assertEqual(got.header("Content-Length"), str(len(body)))
                self.assertEqual(got.body, body.replace(self.SECRET, b"*" * len(self.SECRET)))

    def test_credentials_of_static_headers_are_masked_too(self):
        got = self.echo(b"bad tk-static-0123456789 or ak-static-0123456789", model="headed")
        self.assertNotIn(b"static", got.body)

    def test_header_that_repeats_our_key_is_masked(self):
        for status in (200, 401):
            with self.subTest(status):
                got = self.echo(b"{}", status=status, headers={"x-echo": "Bearer " + self.SECRET.decode()})
                self.assertNotIn(self.SECRET.decode(), str(got.headers))

    def test_trailer_and_interim_answers_cannot_carry_it_out(self):
        secret = self.SECRET
        self.upstream.script([
            b"HTTP/1.1 103 Early Hints\r\nX-Key: " + secret + b"\r\n\r\n"
            b"HTTP/1.1 401 No\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX-Key: " + secret + b"\r\n\r\n",
        ])  # fmt: skip
        with RawClient(self.proxy.port) as client:
            client.send(ASK.replace(b"Content-Type", b"Connection: close\r\nContent-Type"))
            self.assertNotIn(secret, client.take_rest())

    def test_malformed_answer_does_not_show_it(self):
        self.upstream.script([b"HTTP/1.1 200 OK\r\nX-Key " + self.SECRET + b"\r\n\r\n"])
        got = post(self.proxy.port, "/v1/responses", BODY)
        self.assertEqual(got.status, 502)
        self.assertNotIn(self.SECRET, got.body)

    def test_reason_phrase_that_repeats_our_key_is_masked(self):
        self.upstream.script([b"HTTP/1.1 401 bad " + self.SECRET + b"\r\nContent-Length: 0\r\n\r\n"])
        self.assertNotIn(self.SECRET.decode(), post(self.proxy.port, "/v1/responses", BODY).reason)

    def test_credentials_of_the_client_never_reach_the_upstream(self):
        mine = "sk-clients-own-secret"
        fields = [
            ("Authorization", "Bearer sk-client:label"),
            ("x-api-key", mine),
            ("Api-Key", mine),
            ("X-Goog-Api-Key", mine),
            ("Cookie", "session=" + mine),
            ("Proxy-Authorization", "Basic " + mine),
            ("ChatGPT-Account-Id", mine),
            ("OpenAI-Organization", mine),
            ("OPENAI-PROJECT", mine),
        ]
        for method, path in (
            ("POST", "/v1/responses"),
            ("GET", "/v1/responses/resp_1"),
            ("DELETE", "/responses/resp_1"),
        ):
            with self.subTest(method):
                self.upstream.requests.clear()
                raw = build_request(method, path, BODY if method == "POST" else None, fields)
                self.assertEqual(exchange(self.proxy.port, raw).status, 200)
                got = self.upstream.wait_for_requests(1)[0]
                self.assertNotIn(mine, str(got))
                self.assertNotIn("sk-client", str(got))
                self.assertEqual(got.all("Authorization"), ["Bearer " + self.SECRET.decode()])

    def test_key_in_its_other_place_never_reaches_the_upstream(self):
        fields = [("x-api-key", "sk-client"), ("Authorization", "Bearer something-else")]
        self.assertEqual(post(self.proxy.port, "/v1/responses", BODY, fields, key=None).status, 200)
        self.assertNotIn("something-else", str(self.upstream.wait_for_requests(1)[0]))

    def test_log_shows_no_credential_no_session_value_and_no_prompt(self):
        prompt, session = "a very private prompt", "private-session-value"
        fields = {"session_id": session}
        for body, replies in (
            (dict(BODY, input=prompt), [answer(200, (), {})]),
            (dict(BODY, input=prompt), [stream(self.SECRET, status=401)]),
            (dict(BODY, input=prompt), [[b"nonsense " + self.SECRET + b"\r\n"]]),
            (dict(BODY, input=prompt), [[Reset()], [Reset()]]),
            ({"model": prompt}, []),
            (prompt.encode(), []),
        ):
            self.setUp()
            self.upstream.script(*replies)
            got = post(self.proxy.port, "/v1/responses", body, fields)
            self.proxy.wait_for_record(lambda one: one["id"] == got.header("x-plexus-request-id"))  # noqa: B023
        post(self.proxy.port, "/v1/responses?secret=query", BODY, {"x-api-key": "sk-other-secret"}, key="sk-wrong")
        exchange(self.proxy.port, b"GET / HTTP/1.1\r\nAuthorization: Bearer sk-client\r\nbad line\r\n\r\n")
        text = "\n".join(self.proxy.stdout) + self.proxy.error_text()
        for secret in (self.SECRET.decode(), "sk-client", "sk-other-secret", "sk-wrong", session, "static"):
            self.assertNotIn(secret, text)
        self.assertEqual([line for line in self.proxy.stderr if prompt in line and '"model"' not in line], [])


class AlwaysAnsweredTest(HostileTest):
    def test_junk_of_every_kind_leaves_the_process_serving(self):
        def junk() -> Iterator[bytes]:
            for byte in range(256):
                yield bytes([byte]) * 50
            for size in (1, 2, 3, 5, 8, 13, 21, 34, 55):
                yield ASK[: len(ASK) * size // 55]
            yield b"\r\n" * 5000
            yield b"GET " + b"/" * 20_000 + b" HTTP/1.1\r\n"

        for data in junk():
            client = RawClient(self.proxy.port)
            send_what_goes(client, data)
            client.reset() if data[:1] < b"\x80" else client.close()
        self.assert_served()
        self.assertIsNone(self.proxy.returncode)

    def test_long_request_line_is_a_414(self):
        client = self.connect()
        send_what_goes(client, b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n")
        self.assert_error(client.read_answer(), 414, "uri_too_long")

    def test_request_line_of_8000_bytes_is_read(self):
        target = "/v1/models?" + "q" * 8000
        self.assertEqual(get(self.proxy.port, target).status, 200)


if __name__ == "__main__":
    unittest.main()
