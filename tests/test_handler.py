"""Room 10, end to end: what a client sends is what the upstream gets, and every refusal says why."""

import contextlib
import gc
import gzip
import hashlib
import json
import sys
import threading
import types
import unittest
import unittest.mock
import weakref
import zlib
from typing import Any, Dict, List, Tuple

import plexus_lite
from tests.support import (
    Answer,
    FakeUpstream,
    Proxy,
    RawClient,
    Recorded,
    answer,
    build_request,
    exchange,
    get,
    make_config,
    post,
    response_events,
    response_object,
    store_zstd,
    stream,
)

PREFIXES = ("", "/v1", "/backend-api", "/codex", "/v1/codex", "/backend-api/codex")


SHARED = contextlib.ExitStack()  # two upstreams and a proxy for each configuration, left when the module ends
PLACES: Dict[str, Tuple[FakeUpstream, FakeUpstream, Proxy]] = {}


def tearDownModule():
    PLACES.clear()
    SHARED.close()


def empty(*upstreams: FakeUpstream) -> None:
    for upstream in upstreams:
        upstream.reset()


def without(headers: List[Tuple[str, str]], *names: str) -> List[Tuple[str, str]]:
    return [field for field in headers if field[0].lower() not in names]


class HandlerTest(unittest.TestCase):
    """Two upstreams, "up" and "other", behind one proxy with keys."""

    proxy: Proxy
    up: FakeUpstream
    other: FakeUpstream

    @classmethod
    def setUpClass(cls):
        name = cls.configuration.__qualname__
        if name not in PLACES:
            cls.up, cls.other = SHARED.enter_context(FakeUpstream()), SHARED.enter_context(FakeUpstream())
            PLACES[name] = cls.up, cls.other, SHARED.enter_context(Proxy(cls.configuration()))
        cls.up, cls.other, cls.proxy = PLACES[name]

    @classmethod
    def configuration(cls) -> Dict[str, Any]:
        return {
            "keys": {
                "team": {"secret": "sk-client"},
                "few": {"secret": "sk-few", "models": ["gpt-test", "coder"]},
                "none": {"secret": "sk-none", "models": []},
            },
            "providers": {
                "up": {
                    "api_key": "sk-upstream",
                    "api_base_url": {"responses": cls.up.base_url, "chat": cls.up.base_url},
                    "models": {
                        "gpt-test": {"access_via": ["responses", "chat"]},
                        "gpt-new": {"access_via": ["responses"]},
                        "gpt-chat": {"access_via": ["chat"]},
                    },
                },
                "other": {
                    "api_key": "sk-other",
                    "api_base_url": cls.other.base_url.replace("/v1", "/backend-api/codex"),
                    "models": ["other-model"],
                },
            },
            "models": {"coder": {"targets": [{"provider": "up", "model": "gpt-new"}]}},
        }

    def setUp(self):
        empty(self.up, self.other)

    def post(self, body: Any, headers: Any = (), path: str = "/v1/responses", key: Any = "sk-client") -> Answer:
        return post(self.proxy.port, path, body, headers, key)

    def record(self, got: Answer) -> Dict[str, Any]:
        return self.proxy.wait_for_record(lambda one: one["id"] == got.header("x-plexus-request-id"))

    def sent(self, body: Any, headers: Any = (), path: str = "/v1/responses") -> Recorded:
        """Post, expect 200, return what arrived at "up"."""
        got = self.post(body, headers, path)
        self.assertEqual(got.status, 200, got.body)
        return self.up.wait_for_requests(1)[-1]

    def assert_error(self, got: Answer, status: int, code: str) -> str:
        """Check the shape that every error of the proxy has; return its message."""
        self.assertEqual(got.status, status, got.body)
        self.assertTrue(got.complete)
        error = got.json()["error"]
        self.assertEqual(list(got.json()), ["error"])
        self.assertEqual(sorted(error), ["code", "message", "param", "type"])
        self.assertEqual(error["code"], code)
        self.assertIsInstance(error["type"], str)
        self.assertTrue(error["param"] is None or isinstance(error["param"], str))
        self.assertEqual(got.all("x-plexus-error"), [code])
        self.assertTrue(got.header("x-plexus-request-id"))
        self.assertEqual((got.header("Content-Type") or "").split(";")[0], "application/json")
        return str(error["message"])


class MainJobTest(HandlerTest):
    def test_every_prefix_leads_to_the_same_request_upstream(self):
        for row in ("/responses", "/responses/compact", "/responses/input_tokens", "/chat/completions"):
            seen = []
            for prefix in PREFIXES:
                with self.subTest(row=row, prefix=prefix):
                    empty(self.up)
                    got = self.sent({"model": "gpt-test", "prompt_cache_key": "k"}, {"session_id": "s1"}, prefix + row)
                    self.assertEqual(got.target, "/v1" + row)
                    seen.append((got.method, got.target, got.headers, got.body))
            self.assertEqual([one for one in seen if one != seen[0]], [])

    def test_base_url_with_another_path_gets_the_row_appended(self):
        self.assertEqual(self.post({"model": "other-model"}, path="/v1/codex/responses").status, 200)
        self.assertEqual(self.other.wait_for_requests(1)[0].target, "/backend-api/codex/responses")
        self.assertEqual(self.up.requests, [])

    def test_prefixes_that_only_look_alike_are_unknown(self):
        for path in ("/v1/v1/responses", "/codex/v1/responses", "/v2/responses", "/v1responses", "/v1//responses"):
            with self.subTest(path=path):
                self.assert_error(self.post({"model": "gpt-test"}, path=path), 404, "not_found")
        self.assertEqual(self.up.requests, [])

    def test_body_arrives_byte_for_byte(self):
        for name, body in (
            ("white space", b' {\r\n\t"model" :  "gpt-test" ,"input":[ ] }\n'),
            ("member order", b'{"z":1,"input":"x","model":"gpt-test","a":2}'),
            ("1.0 against 1", b'{"model":"gpt-test","temperature":1.0,"top_p":1,"n":1e0,"m":-0.0}'),
            ("escapes", b'{"model":"gpt-test","input":"\\u00e9\\/\\ud83d\\ude00 \\"q\\" \\\\"}'),
            ("escaped model", b'{"model":"gpt\\u002dtest","input":"x"}'),
            ("raw unicode", '{"model":"gpt-test","input":"é 😀 中"}'.encode()),
            ("nested models", b'{"input":[{"model":"x"}],"model":"gpt-test","metadata":{"model":"y","model":"z"}}'),
            ("big integers", b'{"model":"gpt-test","seed":123456789012345678901234567890}'),
            ("megabytes", json.dumps({"model": "gpt-test", "input": "x" * 3_000_000}).encode()),
        ):
            with self.subTest(name):
                empty(self.up)
                got = self.sent(body)
                self.assertEqual(got.body, body)
                self.assertEqual(got.all("Content-Length"), [str(len(body))])

    def test_chunked_body_arrives_with_its_length(self):
        body = b'{"model":"gpt-test","input":"chunks"}'
        chunked = b"".join(b"%x\r\n%b\r\n" % (len(body[at : at + 7]), body[at : at + 7]) for at in range(0, 37, 7))
        got = self.sent(chunked + b"0\r\n\r\n", {"Transfer-Encoding": "chunked"})
        self.assertEqual(got.body, body)
        self.assertEqual(got.all("Transfer-Encoding"), [])
        self.assertEqual(got.all("Content-Length"), [str(len(body))])

    def test_alias_changes_the_models_span_and_nothing_else(self):
        for name, body in (
            ("compact", b'{"model":"coder","input":"coder"}'),
            ("white space", b'{ "input" : [ {"model":"coder"} ] , "model" :\n "coder" , "temperature":1.0 }'),
            ("escaped value", b'{"a":"\\u00e9","model":"c\\u006fder","b":"\\/"}'),
            ("escaped name", b'{"mod\\u0065l":"coder","b":1}'),
            ("unicode in front", '{"input":"é😀","model":"coder","x":"中"}'.encode()),
        ):
            with self.subTest(name):
                empty(self.up)
                got = self.sent(body)
                spelling = b'"c\\u006fder"' if name == "escaped value" else b'"coder"'
                at = body.rindex(spelling)
                if name == "compact":
                    at = body.index(spelling)
                self.assertEqual(got.body, body[:at] + b'"gpt-new"' + body[at + len(spelling) :])
                self.assertEqual(got.all("Content-Length"), [str(len(got.body))])

    def test_alias_gives_openai_model_its_own_name_back(self):
        self.up.script(answer(200, {"OpenAI-Model": "gpt-new", "x-other": "gpt-new"}, {"id": "resp_a"}))
        got = self.post({"model": "coder"})
        self.assertEqual(got.all("openai-model"), ["coder"])
        self.assertEqual(got.all("x-other"), ["gpt-new"])

    def test_openai_model_stays_where_nothing_was_renamed(self):
        self.up.script(answer(200, {"openai-model": "gpt-test-2026"}, {}))
        self.assertEqual(self.post({"model": "gpt-test"}).all("openai-model"), ["gpt-test-2026"])

    def test_compressed_body_is_routed_and_leaves_as_it_came(self):
        plain = b'{"model":"other-model","input":"' + b"z" * 5000 + b'"}'
        raw = zlib.compressobj(wbits=-15)
        for encoding, body in (
            ("gzip", gzip.compress(plain)),
            ("x-gzip", gzip.compress(plain)),
            ("GZIP", gzip.compress(plain[:9]) + gzip.compress(plain[9:])),
            ("deflate", zlib.compress(plain)),
            ("deflate", raw.compress(plain) + raw.flush()),
            ("identity", plain),
        ):
            with self.subTest(encoding):
                empty(self.other)
                self.assertEqual(self.post(body, {"Content-Encoding": encoding}).status, 200)
                got = self.other.wait_for_requests(1)[0]
                self.assertEqual(got.body, body)
                self.assertEqual(got.all("Content-Encoding"), [encoding])

    def test_compressed_body_with_an_alias_leaves_decoded(self):
        plain = b'{"model": "coder", "input": "x"}'
        for encoding, body in (("gzip", gzip.compress(plain)), ("deflate", zlib.compress(plain))):
            with self.subTest(encoding):
                empty(self.up)
                got = self.sent(body, {"Content-Encoding": encoding})
                self.assertEqual(got.body, b'{"model": "gpt-new", "input": "x"}')
                self.assertEqual(got.all("Content-Encoding"), [])

    @unittest.skipUnless(plexus_lite.load_zstd(), "neither compression.zstd nor libzstd is here")
    def test_zstd_is_read_forwarded_as_it_came_and_leaves_decoded_with_an_alias(self):
        zstd = {"Content-Encoding": "zstd"}
        body = store_zstd(b'{"model":"other-model","input":"' + b"z" * 60_000 + b'"}')
        self.assertEqual(self.post(body, zstd).status, 200)
        got = self.other.wait_for_requests(1)[0]
        self.assertEqual((got.body, got.all("Content-Encoding")), (body, ["zstd"]))
        got = self.sent(store_zstd(b'{"model": "coder", "input": "x"}'), zstd)
        self.assertEqual((got.body, got.all("Content-Encoding")), (b'{"model": "gpt-new", "input": "x"}', []))
        self.assertIn("zstd", self.assert_error(self.post(body[:-1], zstd), 400, "invalid_request"))

    def test_damaged_compression_is_a_400(self):
        body = gzip.compress(b'{"model":"gpt-test"}')
        for name, encoding, sent in (
            ("cut", "gzip", body[:-3]),
            ("junk", "gzip", b"\x1f\x8bjunk"),
            ("plain", "gzip", b'{"model":"gpt-test"}'),
            ("trailing", "deflate", zlib.compress(b'{"model":"gpt-test"}') + b"x"),
        ):
            with self.subTest(name):
                self.assert_error(self.post(sent, {"Content-Encoding": encoding}), 400, "invalid_request")
        self.assertEqual(self.up.requests, [])

    def test_encoding_that_nobody_here_reads_is_a_415_that_names_the_clients_switch(self):
        message = self.assert_error(
            self.post(b"\x0b\x02\x80", {"Content-Encoding": "br"}), 415, "unsupported_content_encoding"
        )
        self.assertIn('"br"', message)
        self.assertIn("enable_request_compression", message)
        two = [("Content-Encoding", "gzip"), ("Content-Encoding", "br")]
        message = self.assert_error(self.post(b"\x0b\x02\x80", two), 415, "unsupported_content_encoding")
        self.assertIn('"gzip, br"', message)

    def test_headers_arrive_in_order_with_case_and_duplicates(self):
        sent = [
            ("user-AGENT", "codex_cli_rs/0.120.0 (Linux; x86_64)"),
            ("Accept", "text/event-stream"),
            ("X-Thing", "one"),
            ("x-thing", "two"),
            ("session_id", "0199-abc"),
            ("originator", "codex_cli_rs"),
            ("version", "0.120.0"),
            ("OpenAI-Beta", "responses=experimental"),
            ("x-codex-future", "kept"),
            ("x-openai-subagent", "review"),
            ("thread-id", "t-1"),
            ("Content-Type", "application/json"),
            ("X-Empty", ""),
            ("X-Latin", "caf\xe9"),
        ]
        got = self.sent({"model": "gpt-test", "prompt_cache_key": "k1"}, sent)
        added = {"host", "session-id", "x-client-request-id", "authorization", "accept-encoding", "content-length"}
        self.assertEqual(without(got.headers, *added), sent)
        self.assertEqual(
            sorted((name.lower(), value) for name, value in got.headers if name.lower() in added),
            [
                ("accept-encoding", "identity"),
                ("authorization", "Bearer sk-upstream"),
                ("content-length", str(len(got.body))),
                ("host", f"127.0.0.1:{self.up.port}"),
                ("session-id", "0199-abc"),
                ("x-client-request-id", "k1"),
            ],
        )

    def test_no_session_value_adds_no_header(self):
        got = self.sent({"model": "gpt-test"})
        for name in ("session_id", "session-id", "x-client-request-id", "user-agent"):
            self.assertEqual(got.all(name), [])

    def test_hop_by_hop_fields_stay_here_and_so_do_those_that_connection_names(self):
        fields = {
            "Connection": "keep-alive, X-Private, session_id",
            "X-Private": "p",
            "session_id": "never-read",
            "Keep-Alive": "timeout=5",
            "TE": "trailers",
            "Trailer": "x-t",
            "Proxy-Connection": "keep-alive",
            "Proxy-Authenticate": "Basic",
            "Accept-Encoding": "gzip, br",
        }
        got = self.sent({"model": "gpt-test"}, fields)
        names = {name.lower() for name, _ in got.headers}
        self.assertEqual(names & {name.lower() for name in fields}, {"accept-encoding"})
        self.assertEqual(got.all("accept-encoding"), ["identity"])
        self.assertEqual(got.all("session-id"), [])

    def test_answer_headers_come_back_as_they_are(self):
        fields = [
            ("x-codex-turn-state", "opaque=="),
            ("Retry-After", "7"),
            ("retry-after-ms", "7000"),
            ("x-should-retry", "false"),
            ("X-RateLimit-Remaining", "1"),
            ("x-request-id", "up-1"),
            ("openai-processing-ms", "12"),
            ("x-codex-primary-used-percent", "3"),
            ("Via", "1.1 one"),
            ("Via", "1.1 two"),
        ]
        hidden = [("Set-Cookie", "a=b"), ("Connection", "X-Hop"), ("X-Hop", "h"), ("Keep-Alive", "timeout=3")]
        hidden += [
            ("x-plexus-error", "overloaded"),
            ("x-plexus-request-id", "req_1"),
        ]  # of another plexus_lite behind us
        self.up.script(answer(200, fields + hidden, b"{}"))
        got = self.post({"model": "gpt-test"})
        self.assertEqual(without(got.headers, "content-length", "x-plexus-request-id", "connection"), fields)

    def test_event_stream_gets_the_two_fields_that_keep_it_flowing(self):
        self.up.script(stream(b"data: 1\n\n"))
        got = self.post({"model": "gpt-test"})
        self.assertEqual(got.all("Cache-Control"), ["no-cache, no-transform"])
        self.assertEqual(got.all("X-Accel-Buffering"), ["no"])
        self.up.script(stream(b"data: 1\n\n", headers={"cache-control": "private", "x-accel-buffering": "yes"}))
        got = self.post({"model": "gpt-test"})
        self.assertEqual(got.all("Cache-Control"), ["private"])
        self.assertEqual(got.all("X-Accel-Buffering"), ["yes"])
        self.up.script(answer(200, (), {}))
        self.assertIsNone(self.post({"model": "gpt-test"}).header("X-Accel-Buffering"))

    def test_stream_or_not_is_what_the_upstream_answers(self):
        events = response_events(response_object([], "gpt-test"))
        self.up.script(stream(*events))
        got = self.post({"model": "gpt-test", "stream": False}, {"Accept": "application/json"})
        self.assertEqual(got.body, b"".join(events))
        self.assertEqual(got.header("Transfer-Encoding"), "chunked")
        self.assertEqual(self.record(got)["stream"], True)
        for content_type, wanted in (("text/event-stream", True), ("application/json", False)):
            self.up.script(answer(400, {"Content-Type": content_type}, b"{}"))
            self.assertEqual(self.record(self.post({"model": "gpt-test"}))["stream"], wanted)

    def test_status_and_reason_and_body_of_an_error_come_back_as_they_are(self):
        body = b'{"error": {"message":"no", "type":"x", "code":"context_length_exceeded"} }\n'
        self.up.script(answer(418, {"Content-Type": "application/problem+json", "x-why": "tea"}, body))
        got = self.post({"model": "gpt-test"})
        self.assertEqual((got.status, got.reason, got.body), (418, "Scripted", body))
        self.assertEqual(got.header("Content-Type"), "application/problem+json")
        self.assertEqual(got.header("x-why"), "tea")
        self.assertEqual(got.all("x-plexus-error"), [])

    def test_query_string_travels_as_it_came(self):
        query = "?api-version=2026-01&x=%2F%20&&y=a+b?c;d=\"'"
        self.assertEqual(self.sent({"model": "gpt-test"}, path="/v1/responses" + query).target, "/v1/responses" + query)
        empty(self.up)
        self.assertEqual(self.sent({"model": "gpt-test"}, path="/responses/compact?").target, "/v1/responses/compact?")

    def test_direct_name_bypasses_aliases(self):
        got = self.sent({"model": "direct/up/gpt-new"})
        self.assertEqual(got.body, b'{"model": "gpt-new"}')

    def test_access_via_keeps_a_model_off_a_route(self):
        message = self.assert_error(self.post({"model": "gpt-chat"}), 404, "model_not_found")
        self.assertIn("is not served at /responses; there are: coder, gpt-test, gpt-new, other-model", message)
        got = self.post({"model": "gpt-new"}, path="/v1/chat/completions")
        message = self.assert_error(got, 404, "model_not_found")
        self.assertIn("is not served at /chat/completions; there are: gpt-test, gpt-chat", message)
        self.assertEqual(self.sent({"model": "gpt-chat"}, path="/v1/chat/completions").target, "/v1/chat/completions")


class LeavingTest(unittest.TestCase):
    def test_a_client_that_leaves_while_its_request_is_made(self):
        """Then the loop forgets the JSON body under the thread's hands: no error, and no half of a change."""
        config = plexus_lite.parse_config(make_config("http://127.0.0.1:1/v1"))
        (target,) = plexus_lite.targets_of(config, "gpt-test", "responses")
        raw = b'{"model": "alias"}'

        class Leaving(plexus_lite.Exchange):
            looks = 0
            json = property(lambda self: self.looked())

            def looked(self) -> Any:
                self.looks += 1
                return plexus_lite.parse_json_body(raw) if self.looks == 1 else None

        credentials = types.SimpleNamespace(fields=lambda *_: ())
        state: Any = types.SimpleNamespace(credentials=credentials, config=config)
        handler: Any = object.__new__(plexus_lite.Handler)
        handler.exchange = Leaving(plexus_lite.NO_HEAD._replace(method="POST"), state, "", 0.0, plexus_lite.Bodies(1))
        handler.exchange.model, handler.exchange.body, handler.exchange.targets = "alias", raw, (target,)
        self.assertEqual(handler.outbound_request(target, True).body, b'{"model": "gpt-test"}')

    def test_a_client_that_left_leaves_nothing_behind_when_the_upstream_cannot_be_reached(self):
        """The error's traceback led back to the request, and its body stayed until a full collection."""
        config = plexus_lite.parse_config(make_config("http://127.0.0.1:1/v1"))
        targets = plexus_lite.targets_of(config, "gpt-test", "responses")
        handler: Any = object.__new__(plexus_lite.Handler)
        exchange = plexus_lite.Exchange(plexus_lite.NO_HEAD, unittest.mock.Mock(), "", 0.0, plexus_lite.Bodies(1))
        exchange.route = plexus_lite.Route("/responses", "/responses", "forward")
        exchange.plan = plexus_lite.Plan(targets, "only")

        def leave(request: Any) -> Any:
            handler.exchange.is_gone = True
            try:
                raise OSError("as getaddrinfo does")
            except OSError:
                raise plexus_lite.UpstreamError("its name is not known") from None

        handler.exchange, handler.connection, handler.server = exchange, unittest.mock.Mock(), unittest.mock.Mock()
        handler.fleet, handler.hand = unittest.mock.Mock(), unittest.mock.Mock()
        handler.outbound_request = lambda target, may_wait: target
        exchange.state.transport.open.side_effect = leave  # type: ignore[attr-defined]
        left = weakref.ref(exchange)
        gc.disable()
        self.addCleanup(gc.enable)
        handler.handle()
        exchange.state.transport.open.side_effect = None  # type: ignore[attr-defined]
        del exchange, handler.exchange, leave
        self.assertIsNone(left())


class ThreadsTest(unittest.TestCase):
    def test_no_more_threads_than_clients_may_be(self):
        """Those of clients that have left may hang in the resolver."""
        server = unittest.mock.Mock()
        server.state.config.limits.max_connections = 100
        turn = (unittest.mock.Mock(), unittest.mock.Mock())
        for count, is_refused in ((110, False), (200, True)):
            with unittest.mock.patch.object(threading, "active_count", return_value=count):
                plexus_lite.Server.give_to_thread(server, turn)
            self.assertEqual(server.process_request.call_count, 1)
            self.assertEqual(server.loop.call.called, is_refused)
        exchange, connection = turn
        *call, error = server.loop.call.call_args[0]
        self.assertEqual((call, error.code), ([connection.take_back, exchange, connection.refuse], "overloaded"))

    def test_a_body_is_encoded_whichever_field_says_so(self):
        """In the loop, 31 KB of gzip kept all other clients waiting for 4.7 s."""
        for fields, is_handed_on in (([], False), ([""], True), (["", "gzip"], True)):
            server, exchange = unittest.mock.Mock(), unittest.mock.Mock(body=b"x")
            exchange.head.headers = plexus_lite.Headers([("Content-Encoding", value) for value in fields])
            plexus_lite.Server.start(server, exchange, unittest.mock.Mock())
            self.assertEqual(
                (server.give_to_thread.called, server.loop.take_turn.called), (is_handed_on, not is_handed_on)
            )

    def test_few_large_bodies_are_read_at_a_time_and_none_of_who_left_while_it_waited(self):
        for is_gone, places in ((False, 1), (True, 0)):
            handler: Any = object.__new__(plexus_lite.Handler)
            bodies, state = plexus_lite.Bodies(1), unittest.mock.Mock()
            state.config.limits.max_buffered_bytes = 100
            exchange = handler.exchange = plexus_lite.Exchange(plexus_lite.NO_HEAD, state, "", 0.0, bodies)
            exchange.route = plexus_lite.Route("/responses", "/responses", "forward")
            exchange.hold(10)
            parsers = unittest.mock.MagicMock()
            parsers.__enter__.side_effect = lambda one=exchange, left=is_gone: setattr(one, "is_gone", left)
            handler.server, handler.fleet = unittest.mock.Mock(parsers=parsers), plexus_lite.Fleet()
            handler.server.loop.is_this_thread.return_value = False
            handler.server.loop.hand = lambda function, *arguments: function(*arguments)
            handler.connection = object.__new__(plexus_lite.ClientConnection)  # of another exchange, or none
            error = plexus_lite.ProxyError("invalid_json", "no")
            with unittest.mock.patch.object(plexus_lite, "place", side_effect=error) as place:
                handler.handle()
            self.assertEqual((place.call_count, parsers.__exit__.call_count), (places, 1))
            self.assertEqual(bodies.count(0), 0)


class SeenTest(unittest.TestCase):
    def test_a_body_of_very_many_items_is_not_remembered(self):
        """Each item costs 4 bytes for as long as its session is remembered: as much as the body itself."""
        for count, is_remembered in ((16_000, True), (100_000, False)):
            raw = b'{"model":"m","input":[%b]}' % b",".join([b"[]"] * count)
            fleet, state = plexus_lite.Fleet(), types.SimpleNamespace()
            bodies = plexus_lite.Bodies(1)
            one: Any = plexus_lite.Exchange(plexus_lite.NO_HEAD, state, "", 0.0, bodies)  # type: ignore[arg-type]
            one.session, one.json = plexus_lite.Session("s", "session-id"), plexus_lite.parse_json_body(raw)
            one.plan = plexus_lite.Plan((), "only")
            one.digest(fleet)
            self.assertEqual(fleet.seen.get(one.session.digest or "", 0.0) is not None, is_remembered)
            self.assertTrue(one.prefix)


class OwnAnswersTest(HandlerTest):
    """Models, health, WebSockets, and all that is refused."""

    def test_models_are_those_that_the_key_may_use(self):
        for key, names in (
            ("sk-client", ["coder", "gpt-chat", "gpt-new", "gpt-test", "other-model"]),
            ("sk-few", ["coder", "gpt-test"]),
            ("sk-none", []),
        ):
            for prefix in PREFIXES:
                with self.subTest(key=key, prefix=prefix):
                    got = get(self.proxy.port, prefix + "/models", key=key)
                    self.assertEqual(got.status, 200)
                    self.assertEqual((got.header("Content-Type") or "").split(";")[0], "application/json")
                    listed = got.json()
                    self.assertEqual(sorted(listed), ["data", "object"])
                    self.assertEqual(listed["object"], "list")
                    self.assertEqual(sorted(entry["id"] for entry in listed["data"]), names)
                    for entry in listed["data"]:
                        self.assertEqual(sorted(entry), ["created", "id", "object", "owned_by"])
                        self.assertEqual(entry["object"], "model")
                        self.assertIsInstance(entry["created"], int)
                        self.assertIsInstance(entry["owned_by"], str)

    def test_one_model_by_name(self):
        self.assertEqual(get(self.proxy.port, "/v1/models/coder", key="sk-few").json()["id"], "coder")
        self.assertEqual(get(self.proxy.port, "/v1/models/gpt%2Dtest", key="sk-few").json()["id"], "gpt-test")
        for key, name in (("sk-few", "other-model"), ("sk-client", "nonesuch"), ("sk-client", "%ff"), ("sk-none", "x")):
            with self.subTest(name):
                self.assert_error(get(self.proxy.port, "/v1/models/" + name, key=key), 404, "model_not_found")
        self.assertEqual(self.up.requests + self.other.requests, [])

    def test_head_of_models_and_health_has_the_length_and_no_body(self):
        with RawClient(self.proxy.port) as client:
            for path in ("/v1/models", "/health"):
                client.send(build_request("HEAD", path))
                got = client.read_answer("HEAD")
                self.assertEqual(got.status, 200)
                client.send(build_request("GET", path))
                self.assertEqual(got.header("Content-Length"), str(len(client.read_answer().body)))

    def test_health_needs_no_key_and_asks_no_upstream(self):
        for path in ("/health", "/v1/health"):
            for key in (None, "sk-wrong"):
                got = get(self.proxy.port, path, key=key)
                self.assertEqual(got.status, 200)
                self.assertIsInstance(got.json(), dict)
        self.assertEqual(self.up.requests + self.other.requests, [])

    def test_websocket_attempt_is_a_426_at_once(self):
        upgrade = {
            "Connection": "Upgrade",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
        }
        for path in ("/v1/responses", "/v1/codex/responses", "/backend-api/codex/responses", "/responses?x=1"):
            for word in ("websocket", "WebSocket"):
                with self.subTest(path=path), RawClient(self.proxy.port) as client:
                    client.send(build_request("GET", path, None, dict(upgrade, Upgrade=word)))
                    got = client.read_answer("GET")
                    self.assert_error(got, 426, "websocket_not_supported")
                    self.assertEqual(got.all("Connection"), ["close"])
                    self.assertEqual(got.all("Content-Length"), [str(len(got.body))])
                    self.assertTrue(client.at_eof(2))

    def test_unknown_path_and_method_name_what_there_is(self):
        for method, path, status, allow in (
            ("POST", "/", 405, {"GET", "HEAD"}),
            ("PUT", "/status", 405, {"GET", "POST"}),
            ("GET", "/nope", 404, None),
            ("POST", "/v1/embeddings", 404, None),
            ("OPTIONS", "/v1/nope", 404, None),
            ("GET", "/v1/responses", 405, {"POST"}),
            ("PUT", "/v1/responses", 405, {"POST"}),
            ("OPTIONS", "/v1/responses", 405, {"POST"}),
            ("POST", "/v1/models", 405, {"GET", "HEAD"}),
            ("DELETE", "/v1/models/coder", 405, {"GET", "HEAD"}),
            ("PATCH", "/responses/resp_1", 405, {"GET", "DELETE"}),
            ("GET", "/responses/resp_1/cancel", 405, {"POST"}),
            ("POST", "/health", 405, {"GET", "HEAD"}),
            ("CONNECT", "/v1/responses", 405, {"POST"}),
            ("get", "/health", 405, {"GET", "HEAD"}),
        ):
            with self.subTest(method=method, path=path):
                got = exchange(self.proxy.port, build_request(method, path))
                self.assert_error(got, status, "not_found" if status == 404 else "method_not_allowed")
                if allow:
                    self.assertEqual(set((got.header("Allow") or "").split(", ")) | {"HEAD"}, allow | {"HEAD"})

    def test_head_of_a_post_route_is_a_405_without_body(self):
        with RawClient(self.proxy.port) as client:
            client.send(build_request("HEAD", "/v1/responses") + build_request("GET", "/health"))
            self.assertEqual(client.read_answer("HEAD").status, 405)
            self.assertEqual(client.read_answer("GET").status, 200)

    def test_body_of_a_refused_request_is_never_the_next_request(self):
        smuggled = build_request("POST", "/v1/responses", {"model": "gpt-test", "input": "smuggled"})
        for method, path, key, status in (
            ("POST", "/nope", "sk-client", 404),
            ("PUT", "/v1/responses", "sk-client", 405),
            ("POST", "/v1/responses", "sk-wrong", 401),
            ("POST", "/v1/responses", None, 401),
            ("GET", "/health", "sk-client", 200),
            ("GET", "/v1/models", "sk-client", 200),
            ("POST", "/v1/responses", "sk-client", 400),
        ):
            for framing in ("length", "chunked"):
                with self.subTest(method=method, path=path, framing=framing), RawClient(self.proxy.port) as client:
                    chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(smuggled), smuggled)
                    body, fields = (
                        (smuggled, {}) if framing == "length" else (chunked, {"Transfer-Encoding": "chunked"})
                    )
                    client.send(build_request(method, path, body, fields, key))
                    first = client.read_answer()
                    self.assertEqual(first.status, status)
                    if (first.header("Connection") or "").lower() == "close":
                        self.assertTrue(client.at_eof())
                        continue
                    client.send(build_request("GET", "/v1/models/coder"))
                    self.assertEqual(client.read_answer().json()["id"], "coder")
        self.assertEqual(self.up.requests, [])

    def test_small_body_of_a_404_keeps_the_connection(self):
        with RawClient(self.proxy.port) as client:
            for _ in range(3):
                client.send(build_request("POST", "/nope", {"a": "b" * 1000}))
                self.assert_error(client.read_answer(), 404, "not_found")

    def test_large_body_of_a_404_is_answered_at_once_and_closes(self):
        with RawClient(self.proxy.port) as client:
            client.send(build_request("POST", "/nope", None, {"Content-Length": "50000000"}) + b"x" * 1000)
            self.assert_error(client.read_answer(), 404, "not_found")
            self.assertTrue(client.at_eof())

    def test_post_without_a_length_is_refused(self):
        with RawClient(self.proxy.port) as client:
            client.send(build_request("POST", "/v1/responses"))
            got = client.read_answer()
            self.assertIn(got.status, (400, 411))
            self.assert_error(got, got.status, "length_required" if got.status == 411 else "invalid_request")
        self.assertEqual(self.up.requests, [])


class KeysTest(HandlerTest):
    def ask(self, *fields: Tuple[str, str], model: str = "gpt-test") -> Answer:
        return self.post({"model": model}, list(fields), key=None)

    def test_key_is_found_in_each_of_its_places(self):
        for field in (
            ("Authorization", "Bearer sk-client"),
            ("authorization", "bearer sk-client"),
            ("AUTHORIZATION", "BEARER   sk-client"),
            ("Authorization", "sk-client"),
            ("x-api-key", "sk-client"),
            ("X-Api-Key", "sk-client:label"),
            ("Authorization", "Bearer sk-client:some label"),
        ):
            with self.subTest(field):
                self.assertEqual(self.ask(field).status, 200)

    def test_near_misses_are_a_401(self):
        for fields in (
            (),
            (("Authorization", "Bearer sk-wrong"),),
            (("Authorization", "Bearer sk-clien"),),
            (("Authorization", "Bearer sk-clientx"),),
            (("Authorization", "Bearer SK-CLIENT"),),
            (("Authorization", "Bearer :sk-client"),),
            (("Authorization", "Bearer sk-client sk-client"),),
            (("Authorization", "Bearersk-client"),),
            (("Authorization", "Basic sk-client"),),
            (("Authorization", "Bearer"),),
            (("Authorization", ""),),
            (("Authorization", "Bearer sk-cli\xe9nt"),),
            (("x-api-key", ""),),
            (("x-api-key", "Bearer sk-client"),),
            (("api-key", "sk-client"),),
            (("Cookie", "sk-client"),),
            (("Authorization", "Bearer sk-client"), ("Authorization", "Bearer sk-client")),
            (("Authorization", "Bearer sk-client"), ("authorization", "Bearer sk-wrong")),
            (("Authorization", "Bearer " + "s" * 20000),),
        ):
            with self.subTest(fields=str(fields)[:80]):
                message = self.assert_error(self.ask(*fields), 401, "invalid_api_key")
                self.assertNotIn("sk-client", message)
        self.assertEqual(self.up.requests, [])

    def test_refused_key_stays_out_of_the_query_too(self):
        got = self.post({"model": "gpt-test"}, path="/v1/responses?api_key=sk-client", key=None)
        self.assert_error(got, 401, "invalid_api_key")

    def test_label_and_name_are_logged_and_the_secret_is_not(self):
        record = self.record(self.ask(("Authorization", "Bearer sk-client:nightly-42")))
        self.assertEqual((record["key"], record["label"]), ("team", "nightly-42"))
        record = self.record(self.ask(("x-api-key", "sk-few")))
        self.assertEqual((record["key"], record["label"]), ("few", None))
        self.assertNotIn("sk-client", self.proxy.error_text())

    def test_model_outside_the_keys_list_is_a_403(self):
        message = self.assert_error(self.ask(("x-api-key", "sk-few"), model="other-model"), 403, "model_not_allowed")
        self.assertIn("gpt-test", message)
        self.assert_error(self.ask(("x-api-key", "sk-none")), 403, "model_not_allowed")
        self.assert_error(self.ask(("x-api-key", "sk-few"), model="direct/other/other-model"), 403, "model_not_allowed")
        self.assertEqual(self.ask(("x-api-key", "sk-few"), model="coder").status, 200)
        self.assertEqual(self.other.requests, [])

    def test_what_is_known_of_a_refused_request_is_recorded(self):
        for key, body, wanted in (
            ("sk-few", {"model": "other-model"}, "other-model"),
            ("sk-client", {"model": "nonesuch"}, "nonesuch"),
            ("sk-client", {"model": 7}, None),
            ("sk-client", b"{", None),
        ):
            record = self.record(self.post(body, {"session-id": "one"}, key=key))
            found = [record[name] for name in ("route", "model", "session", "session_source", "provider")]
            digest = hashlib.sha256(b"one").hexdigest()[:12]
            self.assertEqual(found, ["/responses", wanted, digest, "session-id", None])
        by_key = self.record(self.post({"model": "nonesuch", "prompt_cache_key": "one"}))
        self.assertEqual((by_key["session"], by_key["session_source"]), (digest, "prompt_cache_key"))

    def test_unknown_model_lists_the_models_that_exist(self):
        message = self.assert_error(self.ask(("x-api-key", "sk-client"), model="nonesuch"), 404, "model_not_found")
        for name in ("nonesuch", "gpt-test", "gpt-new", "coder", "other-model"):
            self.assertIn(name, message)
        message = self.assert_error(self.ask(("x-api-key", "sk-client"), model="m\u00f6del"), 404, "model_not_found")
        self.assertIn('"m\u00f6del"', message)
        limited = self.assert_error(self.ask(("x-api-key", "sk-few"), model="nonesuch"), 404, "model_not_found")
        self.assertIn("coder", limited)
        self.assertNotIn("other-model", limited)

    def test_names_that_are_no_model(self):
        for model in ("", "*", "direct/", "direct/up", "direct/up/", "direct/nope/gpt-test", "gpt-test ", "GPT-TEST"):
            with self.subTest(model):
                got = self.ask(("x-api-key", "sk-client"), model=model)
                self.assertIn(got.status, (400, 404))
                self.assertIn(got.error_code, ("invalid_request", "model_not_found"))
        self.assertEqual(self.up.requests, [])


class BadBodyTest(HandlerTest):
    def test_bad_json_says_line_and_column(self):
        comma = 20 if sys.version_info >= (3, 13) else 21  # newer decoders point at the comma, older ones behind it
        for name, body, where in (
            ("missing value", b'{\n  "model": ,\n}', "line 2 column 12"),
            ("trailing comma", b'{"model":"gpt-test",}', f"line 1 column {comma}"),
            ("single quotes", b"{'model':'x'}", "line 1 column 2"),
            ("two objects", b'{"model":"gpt-test"} {}', "line 1 column 22"),
            ("control character", b'{"model":"gpt-test",\n"input":"a\nb"}', "line 2 column 11"),
            ("unfinished string", b'{"model":"gpt', "line 1 column 10"),
        ):
            with self.subTest(name):
                message = self.assert_error(self.post(body), 400, "invalid_json")
                self.assertIn(where, message)

    def test_what_is_no_json_for_the_upstream_is_none_here(self):
        for name, body in (
            ("empty", b""),
            ("spaces", b"   "),
            ("truncated", b'{"model":"gpt-test"'),
            ("latin-1", '{"model":"gpt-test","input":"é"}'.encode("latin-1")),
            ("utf-16", '{"model":"gpt-test"}'.encode("utf-16")),
            ("utf-32", '{"model":"gpt-test"}'.encode("utf-32-le")),
            ("byte order mark", b'\xef\xbb\xbf{"model":"gpt-test"}'),
            ("encoded surrogate", b'{"model":"gpt-test","input":"\xed\xa0\x80"}'),
            ("NaN", b'{"model":"gpt-test","temperature":NaN}'),
            ("Infinity", b'{"model":"gpt-test","temperature":-Infinity}'),
            ("deep lists", b'{"model":"gpt-test","input":' + b"[" * 200_000 + b"]" * 200_000 + b"}"),
            ("deep objects", b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
            ("many digits", b'{"model":"gpt-test","seed":' + b"1" * 10_000 + b"}"),
            ("NUL", b'{"model":"gpt-test"}\x00'),
        ):
            with self.subTest(name):
                self.assert_error(self.post(body), 400, "invalid_json")
        self.assertEqual(self.up.requests, [])
        self.assertEqual(self.post({"model": "gpt-test"}).status, 200)

    def test_body_must_be_an_object_with_one_model_that_is_a_string(self):
        for body, found in (
            (b"[]", "object"),
            (b'"gpt-test"', "object"),
            (b"null", "object"),
            (b"1", "object"),
            (b"{}", "it is missing"),
            (b'{"input":"x"}', "it is missing"),
            (b'{"model":null}', "it is null"),
            (b'{"model":1}', "it is 1"),
            (b'{"model":["gpt-test"]}', 'it is ["gpt-test"]'),
            (b'{"model":{"model":"gpt-test"}}', 'it is {"model":"gpt-test"}'),
            (b'{"model":"gpt-test","model":"other-model"}', "twice"),
        ):
            with self.subTest(body):
                self.assertIn(found, self.assert_error(self.post(body), 400, "invalid_request"))
        self.assertEqual(self.up.requests + self.other.requests, [])

    def test_model_with_a_lone_surrogate_is_answered(self):
        got = self.post(b'{"model":"\\ud800"}')
        self.assertIn(got.status, (400, 404))
        self.assertIn(got.error_code, ("invalid_json", "invalid_request", "model_not_found"))

    def test_header_value_that_is_no_legal_field_is_a_400(self):
        for name, line in (("NUL", b"session_id: a\0b"), ("control", b"session_id: a\x01b"), ("DEL", b"x: \x7f")):
            with self.subTest(name):
                raw = build_request("POST", "/v1/responses", {"model": "gpt-test"})
                got = exchange(self.proxy.port, raw.replace(b"Host:", line + b"\r\nHost:", 1))
                self.assertEqual(got.status, 400)
                self.assertIn(got.error_code, ("invalid_request", "invalid_header"))
        self.assertEqual(self.up.requests, [])

    def test_added_value_that_cannot_stand_in_a_header_goes_as_its_digest(self):
        for key in ("with space", "x" * 65, "é", "a\r\nX-Evil: 1", "\u0000", "tab\t"):
            with self.subTest(repr(key)):
                empty(self.up)
                got = self.sent({"model": "gpt-test", "prompt_cache_key": key})
                for name in ("session_id", "session-id", "x-client-request-id"):
                    self.assertRegex(got.header(name) or "", r"^[0-9a-f]{64}$")
                self.assertEqual(got.all("X-Evil"), [])

    def test_each_request_has_an_id_of_its_own(self):
        ids = [self.post({"model": "gpt-test"}).all("x-plexus-request-id") for _ in range(3)]
        ids.append(self.post(b"junk").all("x-plexus-request-id"))
        self.assertEqual([len(one) for one in ids], [1, 1, 1, 1])
        self.assertEqual(len({one[0] for one in ids}), 4)


class ForbiddenOriginTest(HandlerTest):
    """Without keys, a web page must not be able to use the proxy through somebody's browser."""

    @classmethod
    def configuration(cls) -> Dict[str, Any]:
        config = super().configuration()
        del config["keys"]
        return dict(config, hosts=["proxy.example"])

    def ask(self, fields: Dict[str, str]) -> Answer:
        return self.post(b'{"model":"gpt-test"}', dict(fields, **{"Content-Type": "text/plain"}), key=None)

    def test_pages_of_other_sites_are_refused(self):
        for fields in (
            {"Origin": "https://evil.example"},
            {"Origin": "http://evil.example:4000"},
            {"Origin": "null"},
            {"Origin": "https://127.0.0.1.evil.example"},
            {"Origin": "https://localhost.evil.example"},
            {"Origin": "file://"},
            {"Origin": "chrome-extension://abcdef"},
            {"Sec-Fetch-Site": "cross-site"},
            {"sec-fetch-site": "Cross-Site"},
            {"Origin": "http://localhost:4000", "Sec-Fetch-Site": "cross-site"},
            {"Host": "evil.example"},
            {"Host": "evil.example:80"},
            {"Host": "127.0.0.1.evil.example"},
            {"Host": "10.0.0.1"},
            {"Host": "[::2]"},
        ):
            with self.subTest(fields):
                self.assert_error(self.ask(fields), 403, "forbidden_origin")
        self.assertEqual(self.up.requests, [])

    def test_pages_of_this_machine_and_programs_are_served(self):
        for fields in (
            {},
            {"Origin": "http://localhost:8080"},
            {"Origin": "http://127.0.0.1"},
            {"Origin": "http://[::1]:3000"},
            {"Sec-Fetch-Site": "same-origin"},
            {"Sec-Fetch-Site": "none"},
            {"Host": "localhost"},
            {"Host": "LOCALHOST:1"},
            {"Host": "127.0.0.1:65535"},
            {"Host": "[::1]:4000"},
            {"Host": "proxy.example:4000"},
            {"Host": "Proxy.Example"},
        ):
            with self.subTest(fields):
                self.assertEqual(self.ask(fields).status, 200)

    def test_host_of_an_absolute_target_counts(self):
        raw = build_request("POST", "http://evil.example/v1/responses", {"model": "gpt-test"}, key=None)
        self.assert_error(exchange(self.proxy.port, raw), 403, "forbidden_origin")
        raw = build_request("POST", "http://localhost/v1/responses", {"model": "gpt-test"}, {"Host": "x"}, key=None)
        self.assertEqual(exchange(self.proxy.port, raw).status, 200)

    def test_models_cannot_be_read_by_rebinding_a_name(self):
        got = get(self.proxy.port, "/v1/models", {"Host": "rebound.example"}, key=None)
        self.assert_error(got, 403, "forbidden_origin")

    def test_no_answer_lets_another_site_read_it(self):
        for fields in ({}, {"Origin": "http://localhost"}, {"Origin": "https://evil.example"}):
            got = self.ask(fields)
            self.assertEqual([name for name, _ in got.headers if name.lower().startswith("access-control-")], [])

    def test_keys_lift_the_restriction(self):
        with Proxy(super().configuration()) as proxy:
            fields = {"Origin": "https://page.example", "Host": "proxy.corp", "Sec-Fetch-Site": "cross-site"}
            self.assertEqual(post(proxy.port, "/v1/responses", {"model": "gpt-test"}, fields).status, 200)


class SeveralIssuersTest(HandlerTest):
    """The model "shared" is at both upstreams."""

    @classmethod
    def configuration(cls) -> Dict[str, Any]:
        config = super().configuration()
        config["providers"]["other"]["models"] = ["other-model", "shared"]
        config["providers"]["up"]["models"]["shared"] = {}
        config["keys"]["up-only"] = {"secret": "sk-up-only", "models": ["gpt-test"]}
        return config


class TurnStateTest(SeveralIssuersTest):
    """x-codex-turn-state goes to the upstream that minted it and to no other."""

    NAME = "x-codex-turn-state"

    def mint(self, model: str, state: str) -> None:
        for upstream in (self.up, self.other):
            upstream.script(answer(200, {self.NAME: state}, {}))
        self.assertEqual(self.post({"model": model}).status, 200)
        empty(self.up, self.other)

    def arrived(self, *states: str, model: str = "", path: str = "/v1/responses") -> Tuple[FakeUpstream, List[str]]:
        """Return the upstream that a request with *states* leads to, and those that it got."""
        empty(self.up, self.other)
        fields = [(self.NAME, state) for state in states]
        if model:
            got = self.post({"model": model, "input": "x"}, fields, path)
        else:
            got = exchange(self.proxy.port, build_request("GET", path, None, fields, "sk-client"))
        self.assertEqual(got.status, 200)
        asked = self.up if self.up.requests else self.other
        self.assertEqual(len(self.up.requests + self.other.requests), 1)
        return asked, asked.requests[0].all(self.NAME)

    def test_it_leads_to_its_minter_also_if_that_was_the_only_target(self):
        self.mint("other-model", "ts-other")
        self.mint("gpt-test", "ts-up")
        for state, minter in (("ts-other", self.other), ("ts-up", self.up)):
            self.assertEqual(self.arrived(state, model="shared"), (minter, [state]))

    def test_it_does_not_go_where_the_request_must_go_otherwise(self):
        self.mint("other-model", "ts-far")
        for model in ("gpt-test", "direct/up/shared"):
            self.assertEqual(self.arrived("ts-far", model=model), (self.up, []))
        self.up.script(answer(200, (), {"id": "resp_here"}))
        self.assertEqual(self.post({"model": "gpt-test"}).status, 200)
        self.assertEqual(self.arrived("ts-far", path="/v1/responses/resp_here"), (self.up, []))
        self.assertEqual(self.arrived("ts-far", path="/v1/responses/resp_here?x=1"), (self.up, []))

    def test_of_two_minters_none_gets_the_other_s(self):
        self.mint("other-model", "ts-1")
        self.mint("gpt-test", "ts-2")
        self.assertEqual(self.arrived("ts-1", "ts-2", model="shared")[1], [])

    def test_of_unknown_origin_it_passes_if_only_one_account_can_have_minted_it(self):
        self.assertEqual(self.arrived("ts-old", model="gpt-test"), (self.up, ["ts-old"]))
        self.assertEqual(self.arrived("ts-old", model="shared")[1], [])


class StoredResponsesTest(SeveralIssuersTest):
    """GET and DELETE of a response, cancel, input_items: to the upstream that issued the id."""

    ROWS = (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/input_items"))

    def ask(self, method: str, path: str, key: str = "sk-client") -> Answer:
        return exchange(self.proxy.port, build_request(method, path, None, (), key))

    def create(self, body: Dict[str, Any], response_id: str, streamed: bool) -> FakeUpstream:
        """Have a response with this id made; return the upstream that made it."""
        empty(self.up, self.other)
        made = response_object([], body["model"], response_id)
        for upstream in (self.up, self.other):
            upstream.script(stream(*response_events(made)) if streamed else answer(200, (), made))
        self.assertEqual(self.post(body).status, 200)
        issuer = self.up if self.up.requests else self.other
        empty(self.up, self.other)
        return issuer

    def test_owner_gets_what_concerns_its_responses(self):
        issuers = set()
        for number in range(12):
            response_id = (
                f"resp_own{number}" if number % 3 else f"resp_{'bGl0' * 100}{number}=="
            )  # as LiteLLM makes them
            session = {"model": "shared", "prompt_cache_key": f"session {number}"}
            issuer = self.create(session, response_id, streamed=number % 2 == 1)
            issuers.add(issuer)
            other = self.other if issuer is self.up else self.up
            for method, rest in self.ROWS:
                empty(self.up, self.other)
                got = self.ask(method, f"/v1/responses/{response_id}{rest}?include[]=x")
                self.assertEqual(got.status, 200)
                request = issuer.wait_for_requests(1)[0]
                self.assertEqual(request.method, method)
                self.assertTrue(request.target.endswith(f"/responses/{response_id}{rest}?include[]=x"), request.target)
                self.assertEqual(other.requests, [])
            if len(issuers) == 2:
                break
        self.assertEqual(len(issuers), 2, "every session went to one upstream")

    def test_owner_is_known_for_models_of_one_upstream_too(self):
        self.assertIs(self.create({"model": "other-model"}, "resp_single", streamed=False), self.other)
        self.assertEqual(self.ask("DELETE", "/v1/responses/resp_single").status, 200)
        self.assertEqual([len(self.up.requests), len(self.other.requests)], [0, 1])

    def test_unknown_owner_is_looked_for_until_one_does_not_answer_404(self):
        missing = answer(404, (), {"error": {"message": "no such response"}})
        for number, (method, rest) in enumerate(self.ROWS):  # an id each: the answer teaches whose it is
            with self.subTest(method=method, rest=rest):
                empty(self.up, self.other)
                self.up.script(missing)
                self.other.script(answer(200, {"x-from": "other"}, {"id": f"resp_far{number}"}))
                got = self.ask(method, f"/v1/responses/resp_far{number}{rest}")
                self.assertEqual((got.status, got.header("x-from")), (200, "other"))
                self.assertEqual(len(self.up.requests), 1)

    def test_first_answer_that_is_no_404_is_the_answer(self):
        self.up.script(answer(400, (), {"error": {"message": "cannot be cancelled"}}))
        got = self.ask("POST", "/v1/responses/resp_odd/cancel")
        self.assertEqual((got.status, self.other.requests), (400, []))

    def test_the_code_of_an_error_is_recorded_and_no_tokens_are(self):
        """They were counted when the response was made."""
        for status, answered, wanted in (
            (404, {"error": {"code": "gone"}}, "gone"),
            (200, {"usage": {"input_tokens": 7}}, None),
        ):
            self.up.script(answer(status, (), answered))
            record = self.record(self.ask("GET", "/v1/responses/resp_x", "sk-up-only"))
            self.assertEqual((record["error"], record["input_tokens"]), (wanted, None))

    def test_404_of_all_is_handed_on_as_it_is(self):
        body = b'{"error":{"message":"not here either"}}'
        self.up.script(answer(404, (), b"{}"))
        self.other.script(answer(404, {"x-from": "other"}, body))
        got = self.ask("GET", "/v1/responses/resp_nowhere")
        self.assertEqual((got.status, got.body, got.header("x-from")), (404, body, "other"))
        self.assertEqual(got.all("x-plexus-error"), [])

    def test_key_with_a_model_list_asks_only_the_upstreams_of_those_models(self):
        self.up.script(answer(404, (), {}))
        self.assertEqual(self.ask("GET", "/v1/responses/resp_x", "sk-up-only").status, 404)
        self.assertEqual(self.other.requests, [])
        self.assert_error(self.ask("GET", "/v1/responses/resp_x", "sk-none"), 404, "not_found")
        self.assert_error(self.ask("GET", "/v1/responses/resp_x", "sk-wrong"), 401, "invalid_api_key")

    def test_id_that_is_none_is_a_404(self):
        for rest in ("", "a/b", "..%2fmodels", "a%0d%0ab", "..", ".", "../cancel", "%2e%2e", "a%5c", "%2E%2E/cancel"):
            path = "/v1/responses/" + rest
            with self.subTest(path):
                self.assert_error(self.ask("GET", path), 404, "not_found")
        self.assertEqual(self.up.requests + self.other.requests, [])

    def test_provider_credential_goes_with_it_and_the_clients_does_not(self):
        self.assertEqual(self.ask("GET", "/v1/responses/resp_y").status, 200)
        got = self.up.wait_for_requests(1)[0]
        self.assertEqual(got.all("Authorization"), ["Bearer sk-upstream"])
        self.assertEqual((got.body, got.all("Content-Length")), (b"", []))

    def test_what_a_request_has_of_a_body_goes_with_it(self):
        for method, rest in self.ROWS:
            with self.subTest(method=method, rest=rest):
                empty(self.up, self.other)
                request = build_request(method, "/v1/responses/resp_z" + rest, b'{"a": 1}', (), "sk-client")
                self.assertEqual(exchange(self.proxy.port, request).status, 200)
                self.assertEqual(self.up.wait_for_requests(1)[0].body, b'{"a": 1}')


if __name__ == "__main__":
    unittest.main()
