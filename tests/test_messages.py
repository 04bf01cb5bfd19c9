"""Room 4: strict readers.  What two parsers could read differently is refused, and no split of the bytes matters."""

import base64
import ctypes
import functools
import gzip
import json
import random
import sys
import tracemalloc
import unittest
import unittest.mock
import zlib
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple, Union

import plexus_lite

LIMIT = 64 * 1024
Outcome = Tuple[bytes, bool, bytes, Optional[int]]  # payload, done, rest, status of the refusal


def read_head(raw: bytes, limit: int = LIMIT) -> Optional[Tuple[plexus_lite.RequestHead, Optional[int]]]:
    """Return head and framing of the request that *raw* begins with, None if the head is not complete."""
    end = plexus_lite.find_head_end(raw, limit)
    if end < 0:
        return None
    head = plexus_lite.read_request_head(raw[:end])
    return head, plexus_lite.body_length(head)


def post(*lines: bytes) -> bytes:
    """Return a request head with *lines* behind its Host."""
    return b"\r\n".join((b"POST /v1/responses HTTP/1.1", b"Host: gate", *lines, b"", b""))


def two_way_splits(data: bytes) -> Iterable[Sequence[bytes]]:
    return ((data[:place], data[place:]) for place in range(len(data) + 1))


def one_by_one(data: bytes) -> Sequence[bytes]:
    return [data[place : place + 1] for place in range(len(data))]


def read_body(make: Callable[[], plexus_lite.BodyReader], pieces: Sequence[bytes]) -> Outcome:
    """Feed *pieces* to a new reader until its body ends, as a connection does."""
    reader = make()
    payload, left = b"", list(pieces)
    try:
        while left and not reader.done:
            payload += reader.feed(left.pop(0))
    except plexus_lite.ProxyError as error:
        return b"", False, b"", error.status
    return payload, reader.done, reader.rest + b"".join(left), None


class Refusals(unittest.TestCase):
    def assertRefused(self, code: str, function: Callable[..., Any], *args: Any) -> plexus_lite.ProxyError:
        """Assert that *function* refuses its arguments with *code*; return the error."""
        with self.assertRaises(plexus_lite.ProxyError) as caught:
            function(*args)
        self.assertEqual(caught.exception.code, code)
        self.assertTrue(caught.exception.message)
        return caught.exception


class RequestHeads(Refusals):
    def test_heads_that_are_read(self):
        rows: Sequence[Tuple[str, bytes, Tuple[str, str, str, Optional[str], int], Optional[int]]] = (
            ("plain", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n", ("GET", "/health", "", "a", 1), 0),
            (
                "a query",
                b"GET /v1/x?a=b?c/d HTTP/1.1\r\nHost: a:80\r\n\r\n",
                ("GET", "/v1/x", "?a=b?c/d", "a:80", 1),
                0,
            ),
            ("an empty query", b"GET /x? HTTP/1.1\r\nHost: a\r\n\r\n", ("GET", "/x", "?", "a", 1), 0),
            ("HTTP/1.0 without Host", b"GET /x HTTP/1.0\r\n\r\n", ("GET", "/x", "", None, 0), 0),
            ("HTTP/1.0 with Host", b"GET /x HTTP/1.0\r\nHost: a\r\n\r\n", ("GET", "/x", "", "a", 0), 0),
            ("HTTP/1.2 is read as 1.1", b"GET /x HTTP/1.2\r\nHost: a\r\n\r\n", ("GET", "/x", "", "a", 1), 0),
            ("an IPv6 Host", b"GET /x HTTP/1.1\r\nHost: [::1]:4000\r\n\r\n", ("GET", "/x", "", "[::1]:4000", 1), 0),
            (
                "absolute-form: its host wins",
                b"GET http://b:1/x?y HTTP/1.1\r\nHost: a\r\n\r\n",
                ("GET", "/x", "?y", "b:1", 1),
                0,
            ),
            (
                "absolute-form in capitals",
                b"GET HTTPS://b/x HTTP/1.1\r\nHost: a\r\n\r\n",
                ("GET", "/x", "", "b", 1),
                0,
            ),
            (
                "absolute-form with a URL in the query",
                b"GET http://b/x?u=http://c/ HTTP/1.1\r\nHost: a\r\n\r\n",
                ("GET", "/x", "?u=http://c/", "b", 1),
                0,
            ),
            ("a method of its own", b"M-SEARCH /x HTTP/1.1\r\nHost: a\r\n\r\n", ("M-SEARCH", "/x", "", "a", 1), 0),
            ("Content-Length", post(b"Content-Length: 12"), ("POST", "/v1/responses", "", "gate", 1), 12),
            ("Content-Length: 0", post(b"content-length:0"), ("POST", "/v1/responses", "", "gate", 1), 0),
            ("leading zeros", post(b"Content-Length: 0012"), ("POST", "/v1/responses", "", "gate", 1), 12),
            ("white space around", post(b"Content-Length: \t 12 \t"), ("POST", "/v1/responses", "", "gate", 1), 12),
            ("chunked", post(b"Transfer-Encoding: chunked"), ("POST", "/v1/responses", "", "gate", 1), None),
            ("Chunked", post(b"transfer-encoding:Chunked"), ("POST", "/v1/responses", "", "gate", 1), None),
        )
        for name, raw, wanted, framing in rows:
            with self.subTest(name):
                found = read_head(raw + b"body")
                assert found is not None
                head = found[0]
                self.assertEqual((head.method, head.path, head.query, head.authority, head.version), wanted)
                self.assertEqual(found[1], framing)
            with self.subTest(name, split="every prefix"):
                self.assertEqual([read_head(raw[:place]) for place in range(len(raw))], [None] * len(raw))

    def test_fields_keep_order_case_duplicates_and_bytes(self):
        raw = post(
            b"X-b: 1", b"x-A:  two words \t", b"X-B: 3", b"Empty:", b"Blank:  \t", b"U: caf\xc3\xa9", b"!#$%&: x"
        )
        found = read_head(raw)
        assert found is not None
        wanted = [("Host", "gate"), ("X-b", "1"), ("x-A", "two words"), ("X-B", "3"), ("Empty", ""), ("Blank", "")]
        wanted += [("U", "caf\u00c3\u00a9"), ("!#$%&", "x")]
        self.assertEqual(list(found[0].headers.fields), wanted)
        self.assertEqual(found[0].headers.all("x-b"), ["1", "3"])
        self.assertEqual(len(found[0].headers.all("x-c")), 0)
        self.assertEqual(found[0].headers.get("x-b"), "1")
        self.assertIsNone(found[0].headers.get("x-c"))
        self.assertEqual(plexus_lite.render_fields(found[0].headers.fields[6:7]), b"U: caf\xc3\xa9\r\n")

    def test_heads_that_are_refused(self):
        bad, header, todo = "invalid_request", "invalid_header", "not_implemented"
        line = b"Content-Length: 5"
        rows: Sequence[Tuple[str, bytes, str]] = (
            # Request smuggling: two lengths, or one that two parsers read differently.
            ("both framings", post(line, b"Transfer-Encoding: chunked"), bad),
            ("both framings, the other way round", post(b"Transfer-Encoding: chunked", line), bad),
            ("both framings, length 0", post(b"Transfer-Encoding: chunked", b"Content-Length: 0"), bad),
            ("length twice, equal", post(line, line), bad),
            ("length twice, different", post(line, b"Content-Length: 6"), bad),
            ("length in a list", post(b"Content-Length: 5, 5"), bad),
            ("length with a sign", post(b"Content-Length: +5"), bad),
            ("length below zero", post(b"Content-Length: -5"), bad),
            ("length in hex", post(b"Content-Length: 0x5"), bad),
            ("length with underscore", post(b"Content-Length: 1_0"), bad),
            ("length with a space", post(b"Content-Length: 1 0"), bad),
            ("length with a point", post(b"Content-Length: 5.0"), bad),
            ("length with superscript", post(b"Content-Length: 1\xb2"), bad),
            ("length empty", post(b"Content-Length:"), bad),
            ("length beyond 64 bits", post(b"Content-Length: 99999999999999999999"), bad),
            ("length, its name with underscore hides nothing", post(b"Content_Length: 5", line, line), bad),
            ("TE: gzip, chunked", post(b"Transfer-Encoding: gzip, chunked"), todo),
            ("TE: chunked, chunked", post(b"Transfer-Encoding: chunked, chunked"), todo),
            ("TE: chunked, identity", post(b"Transfer-Encoding: chunked, identity"), todo),
            ("TE: identity", post(b"Transfer-Encoding: identity"), todo),
            ("TE: xchunked", post(b"Transfer-Encoding: xchunked"), todo),
            ("TE: chunked;q=1", post(b"Transfer-Encoding: chunked;q=1"), todo),
            ("TE: 'chunked'", post(b"Transfer-Encoding: 'chunked'"), todo),
            ("TE: chunked,", post(b"Transfer-Encoding: chunked,"), todo),
            ("TE: with NBSP", post(b"Transfer-Encoding: \xa0chunked"), todo),
            ("TE empty", post(b"Transfer-Encoding:"), todo),
            ("TE twice", post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), todo),
            ("TE: vertical tab", post(b"Transfer-Encoding: \x0bchunked"), header),
            ("TE in HTTP/1.0", b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", bad),
            # Lines
            ("bare LF after the request line", b"GET / HTTP/1.1\nHost: a\r\n\r\n", bad),
            ("bare LF everywhere", b"GET / HTTP/1.1\nHost: a\n\n", bad),
            ("bare LF after a field", post(b"X-A: 1\nX-B: 2"), bad),
            ("bare LF before the empty line", b"GET / HTTP/1.1\r\nHost: a\n\r\n", bad),
            ("bare CR in a value", post(b"X-A: 1\rX-B: 2"), bad),
            ("bare CR in a name", post(b"X\r-A: 1"), bad),
            ("bare CR in the request line", b"GET /\r HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("CR CR LF", post(b"X-A: 1\r"), bad),
            ("folded", post(b"X-A: 1", b" 2"), header),
            ("folded with a tab", post(b"X-A: 1", b"\t2"), header),
            ("folded before the first field", b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", header),
            # Fields
            ("space before the colon", post(b"X-A : 1"), header),
            ("space before the colon of a length", post(b"Content-Length : 5"), header),
            ("tab before the colon", post(b"X-A\t: 1"), header),
            ("no colon", post(b"X-A"), header),
            ("no name", post(b": 1"), header),
            ("space in the name", post(b"X A: 1"), header),
            ("quotes in the name", post(b'"X": 1'), header),
            ("non-ASCII name", post(b"X-\xc3\xa4: 1"), header),
            ("NUL in a value", post(b"X-A: 1\x002"), header),
            ("NUL in a name", post(b"X\x00A: 1"), header),
            ("ESC in a value", post(b"X-A: \x1b[2J"), header),
            ("DEL in a value", post(b"X-A: \x7f"), header),
            ("form feed around a value", post(b"X-A: 1\x0c"), header),
            # Host
            ("no Host", b"GET / HTTP/1.1\r\n\r\n", bad),
            ("no Host, absolute-form", b"GET http://a/ HTTP/1.1\r\n\r\n", bad),
            ("two Hosts, equal", b"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", bad),
            ("two Hosts in HTTP/1.0", b"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", bad),
            ("Host in a list", b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n", bad),
            ("Host with a path", b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", bad),
            ("Host with a user", b"GET / HTTP/1.1\r\nHost: x@a\r\n\r\n", bad),
            ("Host with a space", b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", bad),
            ("Host with a port of letters", b"GET / HTTP/1.1\r\nHost: a:http\r\n\r\n", bad),
            ("Host with two ports", b"GET / HTTP/1.1\r\nHost: a:1:2\r\n\r\n", bad),
            ("Host with an open bracket", b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n", bad),
            ("Host not ASCII", b"GET / HTTP/1.1\r\nHost: \xe4\r\n\r\n", bad),
            # Request line
            ("no target", b"GET HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("two targets", b"GET / / HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("two spaces", b"GET  / HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("a tab", b"GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("space at the end", b"GET / HTTP/1.1 \r\nHost: a\r\n\r\n", bad),
            ("space at the beginning", b" GET / HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("a colon in the method", b"GET: / HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("no path", b"GET x HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("authority-form", b"CONNECT a:443 HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("a fragment", b"GET /#x HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("a fragment in absolute-form", b"GET http://a/#x HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("absolute-form without a host", b"GET http:///x HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("absolute-form with a user", b"GET http://u:p@a/x HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("another scheme", b"GET ftp://a/x HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("non-ASCII target", b"GET /\xc3\xa4 HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("NUL in the target", b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n", bad),
            ("HTTP/0.9", b"GET /\r\n", bad),
            ("HTTP/1", b"GET / HTTP/1\r\nHost: a\r\n\r\n", bad),
            ("HTTP/1.10", b"GET / HTTP/1.10\r\nHost: a\r\n\r\n", bad),
            ("http/1.1", b"GET / http/1.1\r\nHost: a\r\n\r\n", bad),
            ("HTTPS/1.1", b"GET / HTTPS/1.1\r\nHost: a\r\n\r\n", bad),
            ("HTTP/2.0", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", "http_version_not_supported"),
            ("HTTP/0.9, written", b"GET / HTTP/0.9\r\n\r\n", "http_version_not_supported"),
            ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "http_version_not_supported"),
            ("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300), bad),
            ("SSH", b"SSH-2.0-OpenSSH_9.9\r\n", bad),
            ("SOCKS", b"\x05\x01\x00\r\n\r\n", bad),
        )
        for name, raw, code in rows:
            with self.subTest(name):
                self.assertRefused(code, read_head, raw)
            with self.subTest(name, split="every prefix"):
                # Byte by byte it is refused as well, with the same code, and nothing is ever taken for a request.
                for place in range(len(raw) + 1):
                    try:
                        found = read_head(raw[:place])
                    except plexus_lite.ProxyError as error:
                        self.assertEqual(error.code, code)
                        break
                    self.assertIsNone(found)
                else:
                    self.fail("never refused")

    def test_refused_bytes_end_the_connection(self):
        for raw in (post(b"Content-Length: x"), post(b"X-A : 1"), b"GET /\r\n", post(b"Transfer-Encoding: gzip")):
            with self.assertRaises(plexus_lite.ProxyError) as caught:
                read_head(raw)
            self.assertTrue(caught.exception.closes, raw)

    def test_nobody_is_waited_for_who_will_never_end_the_head(self):
        rows: Sequence[Tuple[str, bytes]] = (
            ("the first byte of TLS", b"\x16"),
            ("a bare LF", b"GET / HTTP/1.1\nH"),
            ("HTTP/0.9", b"GET /\r\n"),
            ("another protocol's line", b"EHLO there\r\n"),
        )
        for name, raw in rows:
            with self.subTest(name):
                self.assertRefused("invalid_request", plexus_lite.find_head_end, raw, LIMIT)

    def test_a_tls_client_is_told_what_to_do(self):
        error = self.assertRefused("invalid_request", read_head, b"\x16\x03\x01")
        self.assertIn("http://", error.message)

    def test_sizes_are_bounded(self):
        long = b"GET /" + b"x" * plexus_lite.REQUEST_LINE_BYTES + b" HTTP/1.1\r\nHost: a\r\n\r\n"
        fields = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: " + b"x" * 2000 + b"\r\n\r\n"
        many = b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X-A: 1\r\n" * 200 + b"\r\n"
        rows: Sequence[Tuple[str, bytes, int, str]] = (
            ("request line", long, LIMIT, "uri_too_long"),
            ("request line without an end", long[: plexus_lite.REQUEST_LINE_BYTES + 1], LIMIT, "uri_too_long"),
            ("request line beyond all limits", b"x" * (LIMIT + 1), LIMIT, "uri_too_long"),
            ("one long field", fields, 1024, "headers_too_large"),
            ("one long field without an end", fields[:-4], 1024, "headers_too_large"),
            ("many fields", many, 1024, "headers_too_large"),
            ("many fields without an end", many[:-2], 1024, "headers_too_large"),
        )
        for name, raw, limit, code in rows:
            with self.subTest(name):
                self.assertRefused(code, read_head, raw, limit)
            with self.subTest(name, rule="one byte less is no excuse to wait for ever"):
                self.assertIsNone(read_head(raw[: min(limit, plexus_lite.REQUEST_LINE_BYTES) // 2], limit))
        self.assertIsNotNone(read_head(fields, len(fields)))
        self.assertRefused("headers_too_large", read_head, fields, len(fields) - 1)


class HeaderTable(unittest.TestCase):
    def test_hop_by_hop_fields_and_those_that_connection_names_do_not_travel(self):
        hop = ["Connection", "Keep-Alive", "Proxy-Authenticate", "Proxy-Authorization", "Proxy-Connection", "TE"]
        hop += ["Trailer", "Transfer-Encoding", "Upgrade"]
        fields = [(name, "x") for name in hop] + [("X-One", "1"), ("x-TWO", "2"), ("X-Three", "3"), ("X-Three", "4")]
        fields += [("connection", "close, X-one"), ("CONNECTION", ",x-two ,")]
        headers = plexus_lite.Headers(fields)
        self.assertEqual(headers.end_to_end().fields, (("X-Three", "3"), ("X-Three", "4")))
        self.assertEqual(headers.fields, tuple(fields), "the argument was changed")

    def test_tokens(self):
        headers = plexus_lite.Headers([("A", "x, Y ,,z"), ("a", " "), ("A", "x")])
        self.assertEqual(headers.tokens("a"), ["x", "y", "z", "x"])
        self.assertEqual(headers.tokens("b"), [])


class AnswerHeads(Refusals):
    def test_heads_that_are_read(self):
        rows: Sequence[Tuple[str, bytes, Tuple[int, str, int]]] = (
            ("plain", b"HTTP/1.1 200 OK\r\nA: b\r\n\r\n", (200, "OK", 1)),
            ("HTTP/1.0", b"HTTP/1.0 404 Not Found\r\n\r\n", (404, "Not Found", 0)),
            ("no reason", b"HTTP/1.1 200 \r\n\r\n", (200, "", 1)),
            ("not even its space", b"HTTP/1.1 200\r\n\r\n", (200, "", 1)),
            ("a status of its own", b"HTTP/1.1 529 Site is overloaded\r\n\r\n", (529, "Site is overloaded", 1)),
            ("a reason in Latin-1", b"HTTP/1.1 200 \xe4\r\n\r\n", (200, "\u00e4", 1)),
        )
        for name, raw, wanted in rows:
            with self.subTest(name):
                head = plexus_lite.read_answer_head(raw)
                self.assertEqual((head.status, head.reason, head.version), wanted)

    def test_heads_that_are_refused_are_the_upstream_s_fault(self):
        rows: Sequence[Tuple[str, bytes]] = (
            ("HTTP/2", b"HTTP/2 200 OK\r\n\r\n"),
            ("HTTP/1.2", b"HTTP/1.2 200 OK\r\n\r\n"),
            ("another protocol", b"ICY 200 OK\r\n\r\n"),
            ("lower case", b"http/1.1 200 OK\r\n\r\n"),
            ("status of four digits", b"HTTP/1.1 2000 OK\r\n\r\n"),
            ("status of two digits", b"HTTP/1.1 20 OK\r\n\r\n"),
            ("status below 100", b"HTTP/1.1 099 OK\r\n\r\n"),
            ("status above 599", b"HTTP/1.1 600 OK\r\n\r\n"),
            ("status with a sign", b"HTTP/1.1 +20 OK\r\n\r\n"),
            ("two spaces", b"HTTP/1.1  200 OK\r\n\r\n"),
            ("no status", b"HTTP/1.1 OK\r\n\r\n"),
            ("control character in the reason", b"HTTP/1.1 200 O\x1bK\r\n\r\n"),
            ("nothing", b"\r\n\r\n"),
            ("bare LF", b"HTTP/1.1 200 OK\nA: b\r\n\r\n"),
            ("bare CR", b"HTTP/1.1 200 OK\r\nA: b\rC: d\r\n\r\n"),
            ("folded", b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n"),
            ("space before the colon", b"HTTP/1.1 200 OK\r\nA : b\r\n\r\n"),
            ("no colon", b"HTTP/1.1 200 OK\r\nA\r\n\r\n"),
            ("NUL in a value", b"HTTP/1.1 200 OK\r\nA: \x00\r\n\r\n"),
            ("the body where fields should be", b"HTTP/1.1 200 OK\r\n<html>\r\n\r\n"),
        )
        for name, raw in rows:
            with self.subTest(name):
                with self.assertRaises(plexus_lite.MalformedHTTP):
                    plexus_lite.read_answer_head(raw)

    def test_how_the_end_of_the_body_is_known(self):
        """RFC 9112 6.3, in its order."""
        length, chunked, close = plexus_lite.LengthBody, plexus_lite.ChunkedBody, plexus_lite.CloseBody
        rows: Sequence[Tuple[str, bytes, Any]] = (
            ("204 has none", b"HTTP/1.1 204 x\r\n\r\n", 0),
            ("204 has none, whatever it says", b"HTTP/1.1 204 x\r\nContent-Length: 5\r\n\r\n", 0),
            ("304 has none", b"HTTP/1.1 304 x\r\nContent-Length: 5\r\n\r\n", 0),
            ("a length", b"HTTP/1.1 200 x\r\nContent-Length: 5\r\n\r\n", 5),
            ("a length of 0", b"HTTP/1.1 500 x\r\nContent-Length: 0\r\n\r\n", 0),
            ("a length, HTTP/1.0", b"HTTP/1.0 200 x\r\nContent-Length: 5\r\n\r\n", 5),
            ("chunked", b"HTTP/1.1 200 x\r\nTransfer-Encoding: Chunked\r\n\r\n", chunked),
            ("neither", b"HTTP/1.1 200 x\r\n\r\n", close),
            ("neither, HTTP/1.0", b"HTTP/1.0 200 x\r\n\r\n", close),
        )
        for name, raw, wanted in rows:
            with self.subTest(name):
                reader = plexus_lite.answer_body(plexus_lite.read_answer_head(raw))
                if isinstance(wanted, int):
                    self.assertIsInstance(reader, length)
                    self.assertEqual(reader.feed(b"x" * 9 if wanted else b""), b"x" * wanted)
                    self.assertTrue(reader.done)
                else:
                    self.assertIsInstance(reader, wanted)

    def test_framings_that_are_refused(self):
        rows: Sequence[Tuple[str, bytes]] = (
            ("both", b"HTTP/1.1 200 x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"),
            ("two lengths", b"HTTP/1.1 200 x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n"),
            ("a list of lengths", b"HTTP/1.1 200 x\r\nContent-Length: 5, 6\r\n\r\n"),
            ("no digits", b"HTTP/1.1 200 x\r\nContent-Length: five\r\n\r\n"),
            ("below zero", b"HTTP/1.1 200 x\r\nContent-Length: -1\r\n\r\n"),
            ("gzip, chunked", b"HTTP/1.1 200 x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n"),
            ("gzip", b"HTTP/1.1 200 x\r\nTransfer-Encoding: gzip\r\n\r\n"),
            ("identity", b"HTTP/1.1 200 x\r\nTransfer-Encoding: identity\r\n\r\n"),
            ("chunked twice", b"HTTP/1.1 200 x\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n"),
            ("chunked in HTTP/1.0", b"HTTP/1.0 200 x\r\nTransfer-Encoding: chunked\r\n\r\n"),
        )
        for name, raw in rows:
            with self.subTest(name):
                head = plexus_lite.read_answer_head(raw)
                with self.assertRaises(plexus_lite.MalformedHTTP):
                    plexus_lite.answer_body(head)


class Bodies(unittest.TestCase):
    """Every body is fed whole, in every two pieces, byte by byte and in random pieces."""

    def assertReads(self, make: Callable[[], plexus_lite.BodyReader], data: bytes, wanted: Outcome) -> None:
        self.assertEqual(read_body(make, [data]), wanted)
        for pieces in two_way_splits(data):
            self.assertEqual(read_body(make, pieces), wanted, pieces)
        self.assertEqual(read_body(make, one_by_one(data)), wanted)
        dice = random.Random(4)
        for _ in range(20):
            places = sorted(dice.sample(range(len(data) + 1), min(4, len(data) + 1)))
            pieces = [data[begin:end] for begin, end in zip([0, *places], [*places, len(data)])]
            self.assertEqual(read_body(make, pieces), wanted, pieces)

    def test_a_body_with_a_length(self):
        for length, data, wanted in (
            (0, b"GET /", (b"", True, b"GET /", None)),
            (1, b"x", (b"x", True, b"", None)),
            (5, b"hello", (b"hello", True, b"", None)),
            (5, b"helloGET / HTTP/1.1", (b"hello", True, b"GET / HTTP/1.1", None)),
            (5, b"hell", (b"hell", False, b"", None)),
        ):
            with self.subTest(length=length, data=data):
                self.assertReads(functools.partial(plexus_lite.LengthBody, length), data, wanted)

    def test_a_body_until_the_connection_ends(self):
        self.assertReads(plexus_lite.CloseBody, b"0\r\n\r\n", (b"0\r\n\r\n", False, b"", None))

    def test_chunked_bodies(self):
        rows: Sequence[Tuple[str, bytes, bytes, bytes]] = (
            ("empty", b"0\r\n\r\n", b"", b""),
            ("one chunk", b"5\r\nhello\r\n0\r\n\r\n", b"hello", b""),
            ("two chunks", b"5\r\nhello\r\n1\r\n \r\n5\r\nworld\r\n0\r\n\r\n", b"hello world", b""),
            ("hex in both cases", b"a\r\n0123456789\r\nB\r\n0123456789a\r\n0\r\n\r\n", b"01234567890123456789a", b""),
            ("leading zeros", b"0005\r\nhello\r\n000\r\n\r\n", b"hello", b""),
            ("line ends inside", b"8\r\n\r\n0\r\n\r\n\n\r\n0\r\n\r\n", b"\r\n0\r\n\r\n\n", b""),
            ("extensions", b'5;a\r\nhello\r\n1 ; b="c;d"\r\n!\r\n0;e=f\r\n\r\n', b"hello!", b""),
            ("trailers", b"1\r\nx\r\n0\r\nX-Sum: 5\r\nX-Two:\r\n\r\n", b"x", b""),
            ("another request behind", b"1\r\nx\r\n0\r\n\r\nGET / HTTP/1.1\r\n", b"x", b"GET / HTTP/1.1\r\n"),
            ("a chunk behind the last", b"0\r\n\r\n5\r\nhello\r\n", b"", b"5\r\nhello\r\n"),
        )
        for name, data, payload, rest in rows:
            with self.subTest(name):
                self.assertReads(plexus_lite.ChunkedBody, data, (payload, True, rest, None))

    def test_chunked_bodies_that_are_refused(self):
        rows: Sequence[Tuple[str, bytes]] = (
            ("LF ends the size", b"5\nhello\r\n0\r\n\r\n"),
            ("LF ends the chunk", b"5\r\nhello\n0\r\n\r\n"),
            ("LF ends the last chunk", b"0\n\r\n"),
            ("LF ends the trailers", b"0\r\n\n\r\n"),
            ("LF ends a trailer", b"0\r\nA: b\nC: d\r\n\r\n"),
            ("LF in an extension", b"5;a\nb\r\nhello\r\n0\r\n\r\n"),
            ("CR in an extension", b"5;a\rb\r\nhello\r\n0\r\n\r\n"),
            ("CR alone ends the size", b"5\rhello\r\n0\r\n\r\n"),
            ("CR CR LF", b"5\r\r\nhello\r\n0\r\n\r\n"),
            ("no size", b"\r\nhello\r\n0\r\n\r\n"),
            ("an extension without a size", b";a\r\nhello\r\n0\r\n\r\n"),
            ("not hex", b"g\r\nhello\r\n0\r\n\r\n"),
            ("0x", b"0x5\r\nhello\r\n0\r\n\r\n"),
            ("a sign", b"+5\r\nhello\r\n0\r\n\r\n"),
            ("below zero", b"-5\r\nhello\r\n0\r\n\r\n"),
            ("underscore", b"1_0\r\n0123456789abcdef\r\n0\r\n\r\n"),
            ("space before", b" 5\r\nhello\r\n0\r\n\r\n"),
            ("NUL", b"5\x00\r\nhello\r\n0\r\n\r\n"),
            ("beyond 64 bits", b"10000000000000005\r\nhello\r\n0\r\n\r\n"),
            ("beyond 64 bits with zeros", b"ffffffffffffffff0\r\nhello\r\n0\r\n\r\n"),
            ("longer than its size", b"4\r\nhello\r\n0\r\n\r\n"),
            ("shorter than its size", b"6\r\nhello\r\n0\r\n\r\n"),
            ("junk after a chunk", b"5\r\nhelloXX0\r\n\r\n"),
            ("CR and junk after a chunk", b"5\r\nhello\rX0\r\n\r\n"),
            ("junk between chunks", b"5\r\nhello\r\n\r\n0\r\n\r\n"),
            ("a trailer without colon", b"0\r\njunk\r\n\r\n"),
            ("a folded trailer", b"0\r\nA: b\r\n c\r\n\r\n"),
            ("a trailer with space before its colon", b"0\r\nA : b\r\n\r\n"),
        )
        for name, data in rows:
            with self.subTest(name):
                self.assertReads(plexus_lite.ChunkedBody, data, (b"", False, b"", 400))

    def test_lines_without_end_are_refused_before_memory_is_gone(self):
        size = plexus_lite.CHUNK_LINE_BYTES
        rows: Sequence[Tuple[str, bytes]] = (
            ("zeros", b"0" * (size + 2)),
            ("an extension", b"5;" + b"x" * size),
            ("a trailer", b"0\r\nA: " + b"x" * size),
            ("many trailers", b"0\r\n" + b"A: b\r\n" * size),
        )
        for name, data in rows:
            for split, pieces in (("whole", [data]), ("byte by byte", one_by_one(data))):
                with self.subTest(name, split=split):
                    self.assertEqual(read_body(plexus_lite.ChunkedBody, pieces)[3], 400)

    def test_random_chunks_come_out_as_they_went_in(self):
        dice = random.Random(7)
        for _ in range(100):
            chunks = [dice.getrandbits(8 * size).to_bytes(size, "big") for size in dice.choices(range(1, 40), k=8)]
            wire = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\n\r\nrest"
            pieces = []
            while wire:
                size = dice.randrange(1, 30)
                pieces.append(wire[:size])
                wire = wire[size:]
            self.assertEqual(read_body(plexus_lite.ChunkedBody, pieces), (b"".join(chunks), True, b"rest", None))

    def test_payload_leaves_with_the_read_that_brought_it(self):
        reader = plexus_lite.ChunkedBody()
        steps = (
            (b"5\r\nhe", b"he"),
            (b"l", b"l"),
            (b"lo", b"lo"),
            (b"\r", b""),
            (b"\n3\r\nab", b"ab"),
            (b"c\r\n", b"c"),
        )
        self.assertEqual([reader.feed(data) for data, _ in steps], [payload for _, payload in steps])

    def test_the_end_of_the_connection_is_the_end_of_the_body_only_where_the_framing_says_so(self):
        wire = b"5;x\r\nhello\r\n0\r\nA: b\r\n\r\n"
        for place in range(len(wire) + 1):
            reader = plexus_lite.ChunkedBody()
            reader.feed(wire[:place])
            self.assertEqual(reader.at_end(), place == len(wire), place)
        for place in range(6):
            length = plexus_lite.LengthBody(5)
            length.feed(b"hello"[:place])
            self.assertEqual(length.at_end(), place == 5, place)
        self.assertTrue(plexus_lite.CloseBody().at_end())
        self.assertTrue(plexus_lite.LengthBody(0).at_end())


class JsonBodies(Refusals):
    def test_members_and_spans(self):
        rows: Sequence[Tuple[str, str, Dict[str, str]]] = (
            ("empty", "{}", {}),
            ("empty with white space", " \t\r\n{ \n } \n", {}),
            ("plain", '{"model":"m","tools":1.0}', {"model": '"m"', "tools": "1.0"}),
            ("white space", ' { "model" :\n\t"m" , "tools" : [1, 2] } ', {"model": '"m"', "tools": "[1, 2]"}),
            ("all kinds", '{"a":null,"b":true,"c":-1.5e3,"tools":{"model":1}}', {"tools": '{"model":1}'}),
            ("escaped name", '{"mod\\u0065l":"m"}', {"model": '"m"'}),
            ("escaped value", '{"model":"\\u00e4\\"}{"}', {"model": '"\\u00e4\\"}{"'}),
            ("beyond ASCII", '{"\u00e4\U0001f600":1,"model":"\u00e4\U0001f600"}', {"model": '"\u00e4\U0001f600"'}),
            ("the last of two", '{"tools":1,"tools":2}', {"tools": "2"}),
            ("model inside", '{"x":{"model":"a"},"model":"m","y":{"model":"b"}}', {"model": '"m"'}),
            ("lone surrogate, escaped", '{"input":"\\ud800"}', {"input": '"\\ud800"'}),
            ("no string", '{"model":["m"],"prompt_cache_key":null}', {"model": '["m"]', "prompt_cache_key": "null"}),
        )
        for name, text, spans in rows:
            with self.subTest(name):
                body = plexus_lite.parse_json_body(text.encode("utf-8"))
                raw = text.encode("utf-8")
                self.assertEqual(body.raw, raw)
                self.assertEqual({name: raw[start:end].decode() for name, (start, end) in body.spans.items()}, spans)
                for name, value in json.loads(text).items():
                    is_told = name in plexus_lite.MEMBERS and isinstance(value, str)
                    self.assertEqual(body.text(name), value if is_told else None)
                self.assertEqual(plexus_lite.parse_json_body(bytearray(text.encode("utf-8"))), body)

    def test_elements_of_the_prompt_are_spans(self):
        rows: Sequence[Tuple[str, str, List[str]]] = (
            ("none", "[ ]", []),
            ("white space", '[ 1 ,\n"a"\t, {"b": [2]} ]', ["1", '"a"', '{"b": [2]}']),
            ("packed", '[{"a":1},{"a":2},[3],-4.5e6]', ['{"a":1}', '{"a":2}', "[3]", "-4.5e6"]),
            ("one", "[null]", ["null"]),
        )
        for name, text, wanted in rows:
            for member in ("input", "messages"):
                with self.subTest(name, member=member):
                    raw = f'{{"x":1, "{member}" :{text},"y":2}}'.encode()
                    body = plexus_lite.parse_json_body(raw)
                    self.assertEqual(list(body.spans), [member])
                    self.assertEqual(body.prompt(), member)
                    self.assertEqual([raw[start:end].decode() for start, end in body.items.spans], wanted)
                    self.assertEqual(body.part(member).decode(), text)
        for text in ('{"input":[1,2],"messages":[3]}', '{"messages":[3],"input":[9],"input":[1,2]}'):
            body = plexus_lite.parse_json_body(text.encode())
            self.assertEqual([body.raw[start:end] for start, end in body.items.spans], [b"1", b"2"], text)
        self.assertEqual(plexus_lite.parse_json_body(b'{"input":[1],"input":"x"}').items.spans, ())
        for text in ('{"input":[1 2]}', '{"input":[1,]}', '{"input":[,1]}', '{"input":[1', '{"input":[1,{"a":}]}'):
            self.assertRefused("invalid_json", plexus_lite.parse_json_body, text.encode())

    def test_what_the_turn_before_had_is_not_parsed_again(self):
        tools, items = '[{"name":"t\u00e4"}]', ['{"role":"user","content":"\u00e9"}', '"b"', '{"c":[1.50]}', "[4]"]
        template = '{"model":"m","instructions":"do \\"it\\"","input":[%s],"tools":%s}'

        def turn(elements: Sequence[str], seen: Any = plexus_lite.NOTHING_SEEN, tools: str = tools) -> Any:
            return plexus_lite.parse_json_body((template % (",".join(elements), tools)).encode(), seen)

        seen = plexus_lite.digest_body(turn(items))[1]
        parsed: List[str] = []
        decoder = plexus_lite.JSON_DECODER

        class Noting:
            @staticmethod
            def scan_once(text: str, start: int) -> Any:
                value, end = decoder.scan_once(text, start)  # type: ignore[attr-defined]
                parsed.append(text[start:end])
                return value, end

        # name, elements, tools, what is parsed of it beside the model
        rows: Sequence[Tuple[str, List[str], str, List[str]]] = (
            ("the same", items, tools, []),
            ("one more", [*items, '{"d":1}'], tools, ['{"d":1}']),
            ("an earlier one changed", ["0", *items[1:]], tools, ["0", *items[1:]]),
            ("one less", items[:-1], tools, items[:-1]),
            ("other tools", items, "[]", ["[]"]),
        )
        for name, elements, other_tools, wanted in rows:
            with self.subTest(name):
                parsed.clear()
                with unittest.mock.patch.object(plexus_lite, "JSON_DECODER", Noting):
                    body = turn(elements, seen, other_tools)
                latin = [one.encode().decode("latin-1") for one in ['"m"', *wanted]]
                self.assertEqual(parsed, latin)
                whole = turn(elements, tools=other_tools)
                self.assertEqual(plexus_lite.digest_body(body), plexus_lite.digest_body(whole))
                self.assertEqual(body.spans, whole.spans)
                self.assertEqual(body.text("model"), "m")

    def test_runs_inside_strings_make_no_difference(self):
        long = "abcdefghijklmnopqrstuvwxyz0123456789" * 2
        good = (
            f'{{"model":"m","input":[{{"image_url":"{long}"}},{{"b":1}},"{long}"],"tools":2}}',
            f'{{"instructions":"{long}","text":{{"{long}":["{long}"]}},"model":"{long}"}}',
            f'{{"{long}":1,"{long}":"{long}","x":"{long}"}}',
            f'{{"x":"{long}","x":"{long}","y":"{long}"}}',
            f'{{"input":"{long}","messages":[["{long}"]]}}',
            f'{{"model":"\u00e4\u00f6\u00fc{long}\U0001f600\U0001f601\U0001f602"}}',
            f'{{"x":{" " * 80}1,"y":"{long}"}}',
            f'{{"x":{"1" * 80},"y":"{long}"}}',
            f'{{"x":{"1" * 5000}.{"1" * 40},"y":"{long * 400}"}}',  # its first digits alone are too many
        )
        text = good[0].encode()
        bad = [
            text.replace(b"hij", b"h%bj" % one)
            for one in (b"\x00", b"\x1f", b"\n", b"\\", b"\\u12", b"\xff", b'"', b'",')
        ]
        bad += [text.replace(b":2", b":%b" % (b"x" * count)) for count in range(1, 20)]
        bad += [text.replace(b'"tools":2', b'"model":2'), text[:-1], text + text, b"x" * 40, b'"%b"' % (b"x" * 40)]

        def outcome(raw: bytes) -> Any:
            try:
                return plexus_lite.parse_json_body(raw)
            except plexus_lite.ProxyError as error:
                return error.message

        for raw in (*(one.encode() for one in good), *bad):
            whole = outcome(raw)
            self.assertEqual(isinstance(whole, str), raw in bad)
            for size in range(21, 40):  # longer than any name in MEMBERS
                small = unittest.mock.patch.multiple(plexus_lite, RUN_BYTES=size, LARGE_BODY_BYTES=0)
                with self.subTest(raw=raw, size=size), small:
                    self.assertEqual(outcome(raw), whole)

    def test_an_image_is_not_copied_to_be_parsed(self):
        image = b'{"image_url":"data:image/png;base64,%b"}' % (b"A" * 9_000_000)
        raw = b'{"model":"m","input":[{"type":"message"},%b]}' % image
        tracemalloc.start()
        try:
            body = plexus_lite.parse_json_body(raw)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        self.assertLess(peak, 1_000_000)
        self.assertEqual([raw[start:end] for start, end in body.items.spans], [b'{"type":"message"}', image])

    def test_of_megabytes_each_item_has_a_digest_and_all_together_none(self):
        for size, wanted in ((8_000_000, {"input"}), (9_000_000, set())):
            raw = b'{"model":"m","input":["%b",[]]}' % (b"A" * size)
            _, seen = plexus_lite.digest_body(plexus_lite.parse_json_body(raw))
            self.assertEqual((set(seen.values), len(seen.digests)), (wanted, 8))

    def test_utf_8_is_checked_in_pieces(self):
        raw = '{"x":"ä中😀y"}'.encode()
        for size in range(4, len(raw) + 1):
            with unittest.mock.patch.object(plexus_lite, "RUN_BYTES", size):
                plexus_lite.require_utf8(raw, 0, len(raw))
                for end in range(len(raw)):
                    try:
                        raw[:end].decode()
                    except UnicodeDecodeError:
                        self.assertRaises(UnicodeDecodeError, plexus_lite.require_utf8, raw, 0, end)
                    else:
                        plexus_lite.require_utf8(raw, 0, end)

    def test_the_beginning_of_a_number_is_no_number(self):
        for before, after in (("[1,2", "[1,23]"), ("[1,2", "[1,2.5,3]"), ('["a",1', '["a",1e5]')):
            body = plexus_lite.parse_json_body(b'{"input":%b]}' % before.encode())
            raw = b'{"input":%b}' % after.encode()
            again = plexus_lite.parse_json_body(raw, plexus_lite.digest_body(body)[1])
            self.assertEqual(again, plexus_lite.parse_json_body(raw))

    def test_what_is_kept_of_an_array_is_bounded(self):
        """A body of 100 MiB may have 50 million elements; all are parsed, the places of the first are kept."""
        raw = b'{"input":[%b]}' % b",".join([b"1"] * 50_000)
        self.assertEqual(len(plexus_lite.parse_json_body(raw).items.spans), plexus_lite.MAX_SPANS)
        self.assertRefused("invalid_json", plexus_lite.parse_json_body, raw.replace(b"1]", b"01]"))

    def test_a_name_that_stands_often_is_looked_up_once(self):
        """Else each of a million members costs a hash of all that was seen: hours for one body."""
        raw = b'{"model":"m","instructions":"long"}'
        seen = plexus_lite.digest_body(plexus_lite.parse_json_body(raw))[1]
        for value in (b"1", b'"long"'):
            often = b'{"model":"m",%b}' % b",".join([b'"instructions":%b' % value] * 5)
            with unittest.mock.patch.object(plexus_lite, "hash", create=True, side_effect=hash) as looks:
                body = plexus_lite.parse_json_body(often, seen)
            self.assertEqual(looks.call_count, 1)
            self.assertEqual(body.part("instructions"), value)

    def test_what_was_seen_excuses_nothing(self):
        raw = '{"model":"m","input":[{"a":"\u00e4"}],"x":1}'.encode()
        seen = plexus_lite.digest_body(plexus_lite.parse_json_body(raw))[1]
        for old, new in (
            (b'"x":1', b'"x":01'),
            (b'"x":1', b'"x":"\xff"'),
            (b"}]", b"},]"),
            (b"}]", b"}"),
            (b"}]", b"}]]"),
        ):
            bad = raw.replace(old, new)
            error = self.assertRefused("invalid_json", plexus_lite.parse_json_body, bad, seen)
            self.assertEqual(
                error.message, self.assertRefused("invalid_json", plexus_lite.parse_json_body, bad).message
            )
        twice = raw.replace(b'"x"', b'"model"')
        self.assertRefused("invalid_request", plexus_lite.parse_json_body, twice, seen)

    def test_what_is_refused_says_where(self):
        rows: Sequence[Tuple[str, bytes, Sequence[str]]] = (
            ("nothing", b"", ("line 1 column 1",)),
            ("white space", b" \n ", ("line 2 column 2",)),
            ("in the middle", b'{\n  "model": "m",\n  "input": tru\n}', ("line 3 column 12",)),
            ("behind multi-byte characters", '{"\u00e4\u00f6":"\u00fc",\n "\u00df":x}'.encode(), ("line 2 column 6",)),
            ("a name without quotes", b'{model: "m"}', ("line 1 column 2",)),
            ("single quotes", b"{'model': 'm'}", ("line 1 column 2",)),
            ("a number as a name", b'{1: "m"}', ("line 1 column ",)),
            ("no colon", b'{"model" "m"}', ("line 1 column ",)),
            ("no value", b'{"model":}', ("line 1 column 10",)),
            ("no comma", b'{"a":1 "b":2}', ("line 1 column ",)),
            ("a comma too much", b'{"a":1,}', ("line 1 column ",)),
            ("only a comma", b"{,}", ("line 1 column 2",)),
            ("a comma in place of the brace", b',"a":1}', ("line 1 column 1",)),
            ("a brace in place of a comma", b'{"a":1{"b":2}', ("line 1 column 7",)),
            ("a brace behind a member", b'{"a":1{}', ("line 1 column 7",)),
            ("no colon behind an escaped name", b'{"a":1,"\\u0062" 2}', ("line 1 column ",)),
            ("an escaped name, cut off", b'{"\\u0062', ("line 1 column ",)),
            ("not closed", b'{"a":1', ("line 1 column ",)),
            ("just opened", b"{", ("line 1 column 2",)),
            ("not closed inside", b'{"a":[1}', ("line 1 column ",)),
            ("a string not closed", b'{"a":"b}', ("line 1 column ",)),
            ("junk behind", b'{"a":1}x', ("line 1 column 8",)),
            ("a second object behind", b'{"a":1}\n{"a":1}', ("line 2 column 1",)),
            ("junk behind an empty object", b"{}]", ("line 1 column 3",)),
            ("NUL behind", b'{"a":1}\x00', ("line 1 column 8",)),
            ("no-break space", b'{\xc2\xa0"a":1}', ("line 1 column 2",)),
            ("vertical tab", b'{\x0b"a":1}', ("line 1 column 2",)),
            ("a control character in a string", b'{"a":"\n"}', ("line 1 column ",)),
            ("a bad escape", b'{"a":"\\x"}', ("line 1 column ",)),
            ("a byte order mark", b'\xef\xbb\xbf{"a":1}', ("line 1 column 1",)),
            ("a comment", b'{"a":1} // no', ("line 1 column 9",)),
            ("a leading zero", b'{"a":01}', ("line 1 column ",)),
            ("a plus", b'{"a":+1}', ("line 1 column 6",)),
            ("Python", b'{"a":True}', ("line 1 column 6",)),
            ("NaN", b'{"a":NaN}', (": NaN is no JSON: line 1 column 6 (char 5)",)),
            ("NaN inside", b'{"a":[{"b":NaN}]}', (": NaN is no JSON: line 1 column 12 (char 11)",)),
            ("NaN in a list", b'{"a":[0,\n NaN]}', (": NaN is no JSON: line 2 column 2 (char 10)",)),
            ("NaN behind the word", b'{"NaN":"\\"NaN","a":NaN}', (": NaN is no JSON: line 1 column 20 (char 19)",)),
            ("NaN alone", b"NaN", (": NaN is no JSON: line 1 column 1 (char 0)",)),
            ("Infinity", b'{"a":Infinity}', (": Infinity is no JSON: line 1 column 6 (char 5)",)),
            ("-Infinity", b'{"a":-Infinity}', (": -Infinity is no JSON: line 1 column 6 (char 5)",)),
            ("not UTF-8", b'{"a":"\xff"}', ("0xff is not UTF-8: line 1 column 7 (char 6)",)),
            ("UTF-8 too long", b'{"a":"\xc0\xaf"}', ("0xc0 is not UTF-8: line 1 column 7",)),
            (
                "not UTF-8 in a further line",
                b'{"a":\n"\xc3\xa4\xff"}',
                ("0xff is not UTF-8: line 2 column 3 (char 8)",),
            ),
            ("UTF-8 cut off", b'{"a":"\xc3"}', ("UTF-8",)),
            ("a surrogate in UTF-8", b'{"a":"\xed\xa0\x80"}', ("UTF-8",)),
            ("Latin-1", '{"a":"\u00e4"}'.encode("latin-1"), ("UTF-8",)),
            ("UTF-16", '{"a":1}'.encode("utf-16"), ("UTF-8",)),
            ("UTF-16 without a mark", '{"a":1}'.encode("utf-16-le"), ("line 1 column 2",)),
            ("form data", b"model=m&input=x", ("line 1 column 1",)),
        )
        for name, raw, parts in rows:
            with self.subTest(name):
                error = self.assertRefused("invalid_json", plexus_lite.parse_json_body, raw)
                self.assertEqual(error.status, 400)
                for part in parts:
                    self.assertIn(part, error.message)

    def test_every_truncation_is_refused(self):
        raw = '{"model": "m\u00e4", "input": [{"a": "\\u00e4"}, 1.5e3, null], "stream": true}'.encode()
        for place in range(len(raw)):
            self.assertRefused("invalid_json", plexus_lite.parse_json_body, raw[:place])
        self.assertEqual(plexus_lite.parse_json_body(raw).part("input"), b'[{"a": "\\u00e4"}, 1.5e3, null]')

    def test_what_is_no_object(self):
        for raw in (b"[]", b'"x"', b"5", b"null", b"true", b' [{"model": "m"}] '):
            with self.subTest(raw):
                error = self.assertRefused("invalid_request", plexus_lite.parse_json_body, raw)
                self.assertIn("object", error.message)

    def test_model_twice_is_refused_however_it_is_spelt(self):
        for raw in (b'{"model":"a","model":"a"}', b'{"model":"a","x":1,"mod\\u0065l":"b"}', b'{"model":1,"model":"b"}'):
            with self.subTest(raw):
                error = self.assertRefused("invalid_request", plexus_lite.parse_json_body, raw)
                self.assertEqual(error.param, "model")

    def test_depth_is_bounded_and_real_depth_is_not(self):
        for depth in (100_000, 1_000_000):  # 3.14 goes down to some 65,000, older ones to 1,000 or 10,000
            for opening, closing in ((b"[", b"]"), (b'{"a":', b"}")):
                with self.subTest(depth, opening=opening):
                    raw = b'{"input":' + opening * depth + b"1" + closing * depth + b"}"
                    error = self.assertRefused("invalid_json", plexus_lite.parse_json_body, raw)
                    self.assertIn("nested too deeply", error.message)
                    self.assertRefused("invalid_json", plexus_lite.parse_json_body, raw[: depth // 2])
        body = plexus_lite.parse_json_body(b'{"input":' + b"[" * 200 + b"]" * 200 + b"}")
        self.assertEqual(body.spans["input"], (9, 409))

    def test_digits_are_bounded(self):
        digits = plexus_lite.MAX_INT_DIGITS
        long, many = b"9" * (digits + 1), b'{"a":"%s\\u1%s","b":1.%s,"c":%s.5,"d":1e-%s,"e":"\xc3\xa4",'
        for name, raw, place in (
            ("at once", b'{"a":%s}' % long, 5),
            ("with a sign, inside, longer", b'{"a":[{"b":-%s}]}' % (b"9" * 50_000), 11),
            ("behind what may have them", many % ((long,) * 5) + b'"f":%s}' % long, 5 * digits + 50),
            ("before a dot", b'{"a":%s.}' % long, 5),
            ("before NaN", b'{"a":[%s,NaN]}' % long, 6),
        ):
            with self.subTest(name):
                message = self.assertRefused("invalid_json", plexus_lite.parse_json_body, raw).message
                wanted = f": a number has too many digits: line 1 column {place + 1} (char {place})"
                self.assertEqual(message[-len(wanted) :], wanted)
        plexus_lite.parse_json_body(b'{"a":%s,"b":1e400,"c":1.%s}' % (b"1" * digits, b"0" * 50_000))

    def test_interpreters_without_a_bound_of_their_own_get_ours(self):
        digits = plexus_lite.MAX_INT_DIGITS
        self.assertEqual(plexus_lite.bounded_int("9" * digits) % 10, 9)
        self.assertEqual(plexus_lite.bounded_int("-" + "9" * digits) % 10, 1)
        with self.assertRaisesRegex(ValueError, "too many digits"):
            plexus_lite.bounded_int("9" * (digits + 1))

    def test_the_error_never_repeats_the_prompt(self):
        raw = b'{"model": "m", "input": "my secret prompt" "and more"}'
        self.assertNotIn("secret", self.assertRefused("invalid_json", plexus_lite.parse_json_body, raw).message)


def decode(raw: Union[bytes, bytearray], coding: str, limit: int, load_zstd: Any = lambda: None) -> Any:
    return plexus_lite.decode_content(raw, coding, limit, load_zstd)


class ContentCodings(Refusals):
    TEXT = b'{"model": "m", "input": "' + b"hello " * 300 + b'"}'

    @staticmethod
    def raw_deflate(data: bytes, level: int = 6) -> bytes:
        deflater = zlib.compressobj(level, zlib.DEFLATED, -15)
        return deflater.compress(data) + deflater.flush()

    def coded(self) -> List[Tuple[str, str, bytes]]:
        """Name, coding and coded TEXT."""
        rows = [
            ("gzip", "gzip", gzip.compress(self.TEXT)),
            ("x-gzip", "x-gzip", gzip.compress(self.TEXT)),
            ("gzip, two members", "gzip", gzip.compress(self.TEXT[:700]) + gzip.compress(self.TEXT[700:])),
            ("gzip, empty members", "gzip", gzip.compress(b"") + gzip.compress(self.TEXT) + gzip.compress(b"")),
            ("deflate", "deflate", zlib.compress(self.TEXT)),
        ]
        rows += [(f"raw deflate {level}", "deflate", self.raw_deflate(self.TEXT, level)) for level in range(10)]
        return rows

    def test_what_is_decoded(self):
        for name, coding, raw in self.coded():
            with self.subTest(name):
                self.assertEqual(decode(raw, coding, LIMIT), self.TEXT)
                self.assertEqual(decode(bytearray(raw), coding, LIMIT), self.TEXT)
        for coding in ("", "identity"):
            self.assertIs(decode(self.TEXT, coding, 5), self.TEXT)

    def test_what_cannot_be_decoded_is_left_to_the_caller(self):
        for coding in ("br", "compress", "gzip, gzip", "gzip, br", "aes128gcm"):
            self.assertIsNone(decode(gzip.compress(self.TEXT), coding, LIMIT))

    def test_the_decoded_size_is_bounded_to_the_byte(self):
        for name, coding, raw in self.coded():
            with self.subTest(name):
                size = len(self.TEXT)
                self.assertEqual(decode(raw, coding, size), self.TEXT)
                for limit in (size - 1, 701, 700, 699, 1):
                    self.assertRefused("content_too_large", decode, raw, coding, limit)

    def test_a_bomb_is_refused(self):
        bomb = bytes(20 * 1024 * 1024)
        for coding, raw in (("gzip", gzip.compress(bomb, 9)), ("deflate", zlib.compress(bomb, 9))):
            self.assertRefused("content_too_large", decode, raw, coding, 1024)

    def test_members_without_end_are_refused(self):
        """Each costs a copy of all that follows: 50 000 empty ones in 1 MB were most of a second of work."""
        self.assertRefused("invalid_request", decode, gzip.compress(b"") * 50_000, "gzip", LIMIT)
        self.assertEqual(decode(gzip.compress(b"x") * 10, "gzip", LIMIT), b"x" * 10)

    def test_every_truncation_is_refused(self):
        small = b'{"model": "m"}'
        rows = (("gzip", gzip.compress(small)), ("deflate", zlib.compress(small)), ("deflate", self.raw_deflate(small)))
        for coding, raw in rows:
            for place in range(len(raw)):
                with self.subTest(coding, place=place):
                    self.assertRefused("invalid_request", decode, raw[:place], coding, LIMIT)

    def test_damage_is_refused(self):
        good = gzip.compress(self.TEXT)
        rows: Sequence[Tuple[str, str, bytes]] = (
            ("not gzip at all", "gzip", self.TEXT),
            ("checksum", "gzip", good[:-8] + bytes([good[-8] ^ 1]) + good[-7:]),
            ("length", "gzip", good[:-1] + bytes([good[-1] ^ 1])),
            ("junk behind gzip", "gzip", good + b"junk"),
            ("half a member behind gzip", "gzip", good + good[:12]),
            ("checksum of zlib", "deflate", zlib.compress(self.TEXT)[:-1] + b"\x00\x01"),
            ("junk behind deflate", "deflate", zlib.compress(self.TEXT) + b"x"),
            ("junk behind raw deflate", "deflate", self.raw_deflate(self.TEXT) + b"x"),
            ("gzip named deflate", "deflate", good),
            ("deflate named gzip", "gzip", zlib.compress(self.TEXT)),
            ("JSON named deflate", "deflate", self.TEXT),
        )
        for name, coding, raw in rows:
            with self.subTest(name):
                self.assertRefused("invalid_request", decode, raw, coding, LIMIT)


def zstd_decoders() -> Dict[str, plexus_lite.Coding]:
    """Return what is here of: the standard library's (3.14), libzstd by ctypes."""
    found = {"this interpreter's": plexus_lite.load_zstd()}
    assert ctypes  # imported before the modules are hidden, or there would be two of it
    with unittest.mock.patch.dict(sys.modules, {"compression": None}):
        found["libzstd"] = plexus_lite.load_zstd.__wrapped__()
    return {name: coding for name, coding in found.items() if coding}


ZSTD = zstd_decoders()


@unittest.skipUnless(ZSTD, "neither compression.zstd nor libzstd is here")
class ZstdBodies(Refusals):
    """Frames made by zstd 1.5.4; with a checksum, so that no damage can pass for something else."""

    SMALL = base64.b64decode("KLUv/QRYVQEAFAJ7Im1vZGVsIjogIm0iLCAiaW5wdXQiOiAiaGVsbG8gIn0BAP+bvzgB6Ibg5A==")
    LARGE = base64.b64decode(
        "KLUv/QRYhA0ANjlpFpCpmgPLhcDX8vz/WNZLS5uIJn1jZ3JqAGAAXwB22If6aqurpnpqqVuzjvpAH2100UQPLXRp0kEf5pttrpnmmWXuzDnmg3"
        "yyySWTPLLIlSmHfOjXrVenPl16O3v0Az9uvDjx4cLLyYMfvu2anuXOA2ABgAUGBYQCgAMADgAWADAgGEg4AGgIJHyEi/AKp/AQfii/ciuvciqf"
        "cilvOcuj/EB+5EZe5EQ+5EJecpIH+SH4BbfgFZyCT3AJ3uAMHsEPh++wHa7DdHgOy+Ee5uE4fLjvtrtuuueWuzfvuA/22WaXTfbYYtdm98B54H"
        "Hgh+N33I7XcTo+x+V4j/N4HD8YP+NmvIyT8TEuxmucxsP4ofgVt+JVnIpPcSne4iwexQ/Ej7gRL+JEfIgL8RIn8SB+GH7DbXgNp+EzXIZ3OIfH"
        "8IPwE27CS3gfpt90m17TafpMl+mdzukx/SD9pJv0kk7SR7pIr3RKD+mH9mu39mqn9mmX9razPdoP7Mdu7MVO7MMu7GUne7Afol90i17RKfpEl+"
        "iNzugR/XDgd+B24HXgdOBz4HJgAQCT1fj75iINTAAACCABAPz/ORACTAAACDQBAPz/ORACXQAAGCAifQEA1AQdCAEwFHlQ"
    )
    LARGE_TEXT = b'{"model": "m", "input": "' + b" ".join(b"%d" % (n % 250) for n in range(120000)) + b'"}'
    SMALL_TEXT = ContentCodings.TEXT
    SKIPPED = b"\x5a\x2a\x4d\x18\x03\0\0\0abc"
    HEAD = b"\x28\xb5\x2f\xfd"  # of a frame; then its descriptor, window, content size, blocks

    def each(self, action: Callable[[Callable[..., Any]], None]) -> None:
        for name, coding in ZSTD.items():
            with self.subTest(name):
                action(lambda raw, limit=1 << 20, coding=coding: decode(raw, "zstd", limit, lambda: coding))

    def test_what_is_decoded(self):
        rows = (
            ("a frame", self.SMALL, self.SMALL_TEXT),
            ("many blocks", self.LARGE, self.LARGE_TEXT),
            ("two frames", self.SMALL + self.LARGE, self.SMALL_TEXT + self.LARGE_TEXT),
            ("frames to skip", self.SKIPPED + self.SMALL + self.SKIPPED, self.SMALL_TEXT),
            ("window of 8 MiB", self.HEAD + b"\0\x68\x09\0\0a", b"a"),
        )

        def check(read):
            for name, raw, text in rows:
                with self.subTest(name):
                    self.assertEqual(read(raw), text)
                    self.assertEqual(read(bytearray(raw)), text)
                    self.assertEqual(read(raw, len(text)), text)
                    for limit in (len(text) - 1, len(text) // 2):
                        self.assertRefused("content_too_large", read, raw, limit)

        self.each(check)

    def test_every_truncation_and_every_damaged_bit_is_refused_with_the_name_of_the_encoding(self):
        def check(read):
            for raw, text in ((self.SMALL, self.SMALL_TEXT), (self.LARGE, self.LARGE_TEXT)):
                for place in range(len(raw)):
                    self.assertIn("zstd", self.assertRefused("invalid_request", read, raw[:place]).message)
                    for bit in range(8) if raw is self.SMALL else (place % 8,):
                        damaged = raw[:place] + bytes([raw[place] ^ 1 << bit]) + raw[place + 1 :]
                        try:
                            self.assertEqual(read(damaged), text)  # an unused bit, or a larger window
                        except plexus_lite.ProxyError as error:
                            self.assertEqual(error.status, 400)

        self.each(check)

    def test_what_is_refused(self):
        rows = (
            ("nothing", b""),
            ("plain JSON", self.SMALL_TEXT),
            ("gzip", gzip.compress(self.SMALL_TEXT)),
            ("junk behind it", self.SMALL + b"junk"),
            ("half a frame behind it", self.SMALL + self.SMALL[:20]),
            ("nothing but a frame to skip, cut", self.SKIPPED[:-1]),
            ("frames without end", (self.HEAD + b"\0\0\x01\0\0") * 50_000),
            ("window of 16 MiB", self.HEAD + b"\0\x70\x09\0\0a"),
            ("window of 2 GiB", self.HEAD + b"\0\xa8\x09\0\0a"),
            ("content of 1 TiB at once", self.HEAD + b"\xe0" + (1 << 40).to_bytes(8, "little") + b"\x09\0\0a"),
            ("content of 4 EiB", self.HEAD + b"\xc0\x58" + (1 << 62).to_bytes(8, "little") + b"\x09\0\0a"),
        )

        def check(read):
            for name, raw in rows:
                with self.subTest(name):
                    self.assertRefused("invalid_request", read, raw)

        self.each(check)

    def test_formats_before_zstd_1_are_not_even_shown_to_the_library(self):
        for coding in ZSTD.values():
            shown = coding._replace(start=lambda: self.fail("shown"))
            for magic in (b"\x1e", b"\x22", b"\x25", b"\x27"):
                raw = magic + self.HEAD[1:] + bytes(40)
                self.assertRefused("invalid_request", decode, raw, "zstd", LIMIT, lambda coding=shown: coding)

    def test_a_bomb_is_refused_at_the_limit(self):
        run = b"\x02\0\x10" + b"a"  # a block of 128 KiB that repeats one byte
        bomb = self.HEAD + b"\0\x58" + run * 50_000  # 6 GiB in 200 KB

        def check(read):
            self.assertRefused("content_too_large", read, bomb)
            tracemalloc.start()
            try:
                self.assertRefused("content_too_large", read, bomb, 100_000)
                self.assertLess(tracemalloc.get_traced_memory()[1], 1_000_000)
            finally:
                tracemalloc.stop()

        self.each(check)

    def test_without_a_decoder_the_body_is_left_to_the_caller(self):
        with unittest.mock.patch.dict(sys.modules, {"compression": None, "ctypes": None}):
            self.assertIsNone(plexus_lite.load_zstd.__wrapped__())
        self.assertIsNone(decode(self.SMALL, "zstd", LIMIT))


if __name__ == "__main__":
    unittest.main()
