"""Room 16: the doctor says of every upstream whether it can be used, and what is wrong if not."""

import email.utils
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
from unittest import mock

import plexus_lite
from tests.support import (
    PROGRAM,
    Cut,
    FakeUpstream,
    Pause,
    Recorded,
    Reply,
    answer,
    clean_environment,
    enter,
    make_config,
    run_cli,
)
from tests.test_credentials import access
from tests.test_forward_proxy import USER_INFO, FakeProxy
from tests.test_transport import CA_FILE, refusing_port, silent_port, talking_port
from tests.test_upstream_tls import CA_NAME, EXPIRED_FILE, Folder, tls_upstream

KEY = "sk-very-secret"
Providers = Mapping[str, Mapping[str, Any]]
# What one answers that is no API, or does not get to the end of its answer.
ODD = {
    "no-http": b"SSH-2.0-OpenSSH_9.2\r\n",
    "too-long": b"HTTP/1.1 200 OK\r\nA: " + b"a" * 70_000,
    "closed": b"",
    "cut": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "folded": b"HTTP/1.1 200 OK\r\nA: b\r\n c\r\n\r\n",
}


def models(*names: str) -> Reply:
    return answer(200, (), {"object": "list", "data": [{"id": name} for name in names]})


def examine(providers: Providers, variables: Mapping[str, str] = {}, **config: Any) -> Dict[str, Any]:
    whole = {name: {"models": ["m"], "api_key": KEY, **one} for name, one in providers.items()}
    parsed = plexus_lite.parse_config({"providers": whole, **config})
    state = plexus_lite.make_state(parsed, plexus_lite.DemoBackend(), b"", "")
    with mock.patch.dict(os.environ, variables, clear=True):
        found = plexus_lite.check_upstreams(state)
    json.dumps(found)
    return found


class Checks(Folder):
    def check(self, provider: Mapping[str, Any], phase: str, verdict: str, words: str, **facts: Any) -> None:
        """Assert that the last row about *phase* has all this, and that no other phase fails."""
        found = examine({"up": provider})
        self.assertRow(found, "up", phase, verdict, words, **facts)
        if verdict == "FAIL":
            self.assertEqual([row["phase"] for row in rows(found, "up") if row["verdict"] == "FAIL"], [phase])

    def assertRow(self, found: Any, name: str, phase: str, verdict: str, words: str, **facts: Any) -> None:
        row = [one for one in rows(found, name) if one["phase"] == phase][-1:]
        self.assertTrue(row, f"nothing of {phase}: {found}")
        self.assertEqual((row[0]["verdict"], {key: row[0].get(key) for key in facts}), (verdict, facts), row)
        self.assertIn(words, row[0]["text"])


def rows(found: Mapping[str, Any], name: str) -> List[Dict[str, Any]]:
    return next(one["findings"] for one in found["upstreams"] if one["provider"] == name)


class Judgements(unittest.TestCase):
    def judge(self, status: int, fields: Sequence[Tuple[str, str]] = (), has_key: bool = True, **more: Any) -> Any:
        provider = plexus_lite.Provider({}, {}, name="gw", auth=more.get("auth", "key"))
        head = plexus_lite.AnswerHead(status, "", 1, plexus_lite.Headers(fields))
        return plexus_lite.judge_answer(provider, head, more.get("body", {}), more.get("models", ["m"]), has_key)

    def test_each_status_is_explained(self):
        page = [("Content-Type", "Text/HTML; charset=utf-8")]
        for status, fields, verdict, words in (
            (200, page, "FAIL", "a web page, no API; check providers.gw.api_base_url"),
            (200, (), "warn", "no list of models"),
            (308, (), "FAIL", "a redirect, and none is followed"),
            (400, (), "warn", "session_headers"),
            (400, page, "FAIL", "a client certificate? check providers.gw"),
            (401, (), "FAIL", "the key is refused; check providers.gw.api_key"),
            (403, (), "FAIL", "the key is refused"),
            (403, page, "FAIL", "a login or firewall"),
            (404, page, "warn", "check providers.gw.api_base_url"),
            (405, (), "ok", "reached; it lists no models"),
            (418, page, "ok", "reached"),
            (429, (), "warn", "limits us"),
            (500, (), "FAIL", "it fails"),
            (501, (), "ok", "reached"),
            (529, (), "FAIL", "it fails"),
        ):
            with self.subTest(status, page=bool(fields)):
                got = self.judge(status, fields)
                self.assertEqual(got[0], verdict)
                self.assertIn(words, got[1])

    def test_who_sends_no_key_is_told_so(self):
        self.assertEqual(self.judge(401, (), False)[:2], ("FAIL", "it wants a key; set providers.gw.api_key"))
        self.assertIn("check providers.gw.auth_file", self.judge(401, auth="oauth")[1])
        for auth in ("passthrough", "oauth"):  # a client's, or one that serving renews first
            self.assertEqual(self.judge(401, (), False, auth=auth)[0], "ok")

    def test_what_is_asked_for_is_looked_for_in_either_list_of_models(self):
        openai: Dict[str, Any] = {"data": [{"id": "m"}, {"id": "n"}]}
        codex: Dict[str, Any] = {"models": [{"slug": "m"}, {"slug": "n"}]}
        for body in (openai, codex):
            self.assertEqual(self.judge(200, body=body), ("ok", "models listed: 2, ours among them"))
            self.assertEqual(self.judge(200, body=body, models=["o", "m"]), ("warn", "models listed: 2, not o"))
        self.assertEqual(self.judge(200, body={"data": [{"id": "*"}]})[0], "ok")
        for none in ({"data": 7}, {"data": None}):
            self.assertEqual(self.judge(200, body=none)[0], "warn", none)
        junk = {"data": [7, None, {}, {"id": ["m"]}]}
        self.assertEqual(self.judge(200, body=junk), ("warn", "models listed: 2, not m"))

    def test_routing_headers_that_do_not_arrive_are_named(self):
        provider = plexus_lite.Provider({}, {}, affinity_headers=("X-Shard",))
        sent = [("session_id", "s"), ("session-id", "s"), ("X-Shard", "s"), ("Authorization", "k"), ("Accept", "a")]
        whole = {"session_id": "s", "session-id": "s", "x-shard": "s"}
        self.assertEqual(plexus_lite.judge_headers(provider, sent, whole)[0], "ok")
        for echo, names in (({**whole, "x-shard": "t"}, "x-shard"), ({}, "session_id, session-id, x-shard")):
            found = plexus_lite.judge_headers(provider, sent, echo)
            self.assertEqual(found, ("FAIL", f"lost or changed on the way: {names}"))
        for no_echo in (None, "session_id", ["session_id"]):
            self.assertEqual(plexus_lite.judge_headers(provider, sent, no_echo)[0], "note")

    def notes(self, names: str, *providers: plexus_lite.Provider) -> List[str]:
        return plexus_lite.notes_on(dict.fromkeys(names.split(), "http://ann:pass@proxy"), providers)

    def test_variables_that_are_set_and_not_used_are_noted_without_their_values(self):
        direct = plexus_lite.Provider({"responses": ("http://a",)}, {})
        env = plexus_lite.Provider({"chat": ("https://a",)}, {}, proxy="env")
        names = "https_proxy NO_PROXY HTTP_PROXY PATH"
        self.assertEqual(
            self.notes(names, direct), ['HTTP_PROXY, NO_PROXY, https_proxy: not used: no provider has "proxy": "env"']
        )
        self.assertEqual(self.notes(names, direct, env), [])
        self.assertIn("ALL_PROXY: not used", self.notes("ALL_PROXY", env)[0])
        roots = "SSL_CERT_FILE REQUESTS_CA_BUNDLE"
        self.assertEqual([note.split(":")[0] for note in self.notes(roots, env)], roots.split())
        self.assertEqual(plexus_lite.notes_on({"HTTPS_PROXY": ""}, [direct]), [])

    def found(self, *verdicts: str) -> Dict[str, Any]:
        finding = {"phase": "HTTP", "text": "word\x1b[2J " * 30}
        upstreams = [
            {"provider": "p\n", "base_url": "http://a", "verdict": one, "findings": [{**finding, "verdict": one}]}
            for one in verdicts
        ]
        return {"upstreams": upstreams, "notes": ["a note " * 30]}

    def test_what_others_say_cannot_move_the_cursor(self):
        text = plexus_lite.render_checkups(self.found("ok", "FAIL", "warn", "ok"))
        self.assertTrue(text.replace("\n", "").isprintable())
        self.assertEqual(text.splitlines()[-1], "4 upstreams: 2 ok, 1 with a warning, 1 failed")
        self.assertEqual(text.count("FAIL  HTTP"), 1)

    def test_sum_tells_one_from_many(self):
        self.assertTrue(plexus_lite.render_checkups(self.found("FAIL")).endswith("\n1 upstream: 1 failed"))
        self.assertTrue(plexus_lite.render_checkups(self.found()).endswith("0 upstreams: none is enabled"))


class Answers(Checks):
    upstream: FakeUpstream
    secure: FakeUpstream

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, FakeUpstream())
        cls.secure = enter(cls.addClassCleanup, tls_upstream())

    def setUp(self):
        super().setUp()
        for upstream in (self.upstream, self.secure):
            upstream.reset()
            upstream.default = lambda request: models("m", "n")

    def test_all_is_well_with_the_demo_and_with_tls(self):
        tls = {"api_base_url": {"chat": self.secure.base_url}, "ca_file": CA_FILE}
        found = examine({"demo": {"api_base_url": "demo://", "affinity_headers": ["x-shard"]}, "tls": tls})
        self.assertEqual([one["verdict"] for one in found["upstreams"]], ["ok", "ok"])
        self.assertRow(found, "demo", "headers", "ok", "session_id, session-id, x-shard, x-client-request-id arrive")
        root = f', root "{CA_NAME}"' if sys.version_info >= (3, 13) else ""  # older ones do not say
        self.assertRow(found, "tls", "TLS", "ok", f' days left, "127.0.0.1" signed by "{CA_NAME}"{root}')
        address = f"127.0.0.1:{self.secure.port}"
        self.assertRow(found, "tls", "connect", "ok", f"{address}, direct")
        self.assertRow(found, "tls", "HTTP", "ok", "ms: models listed: 2, ours among them", status=200)
        self.assertRow(found, "tls", "headers", "note", "not known")

    def test_question_is_that_of_a_request_with_key_and_static_headers_and_costs_nothing(self):
        headers = {"X-Tenant": "t1", "session-id": "static"}
        examine({"up": {"api_base_url": self.upstream.base_url, "headers": headers}})
        (got,) = self.upstream.requests
        self.assertEqual((got.method, got.target, got.body), ("GET", "/v1/models", b""))
        self.assertEqual((got.all("Authorization"), got.all("X-Tenant")), ([f"Bearer {KEY}"], ["t1"]))
        self.assertEqual((got.all("session_id"), got.all("session-id")), (["plexus-check"], ["static"]))

    def test_each_base_url_of_an_enabled_provider_is_asked_once(self):
        base = self.upstream.base_url
        found = examine(
            {
                "both": {"api_base_url": {"responses": [base, base + "/b"], "chat": base}},
                "off": {"api_base_url": base + "/off", "enabled": False},
            }
        )
        self.assertEqual([one["base_url"] for one in found["upstreams"]], [base, base + "/b"])
        self.assertEqual(sorted(one.target for one in self.upstream.requests), ["/v1/b/models", "/v1/models"])

    def test_models_that_an_alias_asks_for_are_looked_for(self):
        alias = {"coder": {"targets": [{"provider": "up", "model": "big"}]}}
        found = examine({"up": {"api_base_url": self.upstream.base_url, "models": ["*"]}}, models=alias)
        self.assertRow(found, "up", "HTTP", "warn", "models listed: 2, not big")

    def test_no_credential_is_repeated(self):
        """A 401 that quotes the key, and a redirect that has it in its URL."""
        password = "s3cret pass:word"
        for reply in (
            answer(401, {"X-Key": KEY}, {"error": {"message": f"Incorrect API key: {KEY}"}}),
            answer(302, {"Location": f"https://login.example/?key={KEY}&static=hush-hush"}),
        ):
            self.upstream.script(reply)
            found = examine({"up": {"api_base_url": self.upstream.base_url, "headers": {"api-key": "hush-hush"}}})
            said = json.dumps(found) + plexus_lite.render_checkups(found)
            for secret in (KEY, "hush-hush", password):
                self.assertNotIn(secret, said)
        self.assertRow(found, "up", "HTTP", "FAIL", "a redirect, and none is followed", status=302)

    def test_base_url_that_is_not_found_is_tried_with_and_without_v1(self):
        self.upstream.default = lambda got: models("m") if got.target == "/v1/models" else answer(404)
        base = self.upstream.base_url
        for wrong in (base[: -len("/v1")], base + "/responses", base + "/chat/completions", base + "/v1"):
            with self.subTest(wrong):
                words = f"{base} answers; set providers.up.api_base_url to that"
                self.check({"api_base_url": wrong}, "HTTP", "FAIL", words)
        self.upstream.reset()
        self.check({"api_base_url": base + "/api"}, "HTTP", "warn", "no list of models", status=404)
        self.assertEqual([got.target for got in self.upstream.requests], ["/v1/api/models", "/v1/api/v1/models"])
        self.upstream.default = lambda got: answer(401 if got.target == "/v1/models" else 404)
        self.check({"api_base_url": base + "/responses"}, "HTTP", "FAIL", f"{base} answers")

    def test_clock_that_differs_by_more_than_a_minute_is_a_warning(self):
        for behind, verdict in ((30, "ok"), (-30, "ok"), (90, "warn"), (-3600, "warn")):
            date = email.utils.formatdate(time.time() + behind, usegmt=True)
            self.upstream.script(answer(200, {"Date": date}, {"data": [{"id": "m"}]}))
            found = examine({"up": {"api_base_url": self.upstream.base_url}})
            ahead = next(row["ahead_s"] for row in rows(found, "up") if row["phase"] == "clock")
            self.assertLessEqual(abs(ahead + behind), 2)
            self.assertEqual(found["upstreams"][0]["verdict"], verdict)
        for date in ("yesterday", "Mon, 99 Foo 2026 00:00:00 GMT", ""):
            self.upstream.script(answer(200, {"Date": date}, {"data": [{"id": "m"}]}))
            found = examine({"up": {"api_base_url": self.upstream.base_url}})
            self.assertEqual([row["phase"] for row in rows(found, "up")], ["connect", "HTTP", "headers"])

    def test_headers_that_get_lost_fail(self):
        self.upstream.default = lambda got: answer(
            200, (), {"data": [{"id": "m"}], "echo": {"session-id": got.header("session-id")}}
        )
        words = "lost or changed on the way: session_id, x-client-request-id"
        self.check({"api_base_url": self.upstream.base_url}, "headers", "FAIL", words)

    def test_forward_proxy_is_named_and_its_answers_are_told_from_the_upstream_s(self):
        forward = enter(self.addCleanup, FakeProxy())
        name = f"127.0.0.1:{forward.port}"
        url = f"http://{USER_INFO}@{name}"
        through = {"proxy": url, "ca_file": CA_FILE}
        words = f"through the proxy {name}"
        self.check({"api_base_url": self.secure.base_url, **through}, "connect", "ok", words)
        plain = {"api_base_url": "http://gw.invalid/v1", "proxy": url}
        self.check(plain, "HTTP", "warn", "200 in")
        wrong = {**plain, "proxy": url.replace("ann", "bob")}
        self.check(wrong, "HTTP", "FAIL", f"the proxy {name} does not take the user and password")
        forward.script(answer(503))
        self.check(plain, "HTTP", "FAIL", f"perhaps from the proxy {name}: it fails")

    def test_sign_in_that_has_to_be_renewed_is_said_and_no_refresh_token_is_spent(self):
        def sign_in(lifetime_s: float, **more: Any) -> Dict[str, Any]:
            tokens = {"tokens": {"access_token": access(lifetime_s), "refresh_token": "rt-1"}}
            path = self.write("auth.json", json.dumps(tokens))
            base = {"oauth_base_url": self.upstream.base_url, "oauth_token_url": self.upstream.base_url + "/token"}
            return {"api_base_url": "oauth://", "auth_file": path, "api_key": None, **base, **more}

        def look(provider: Dict[str, Any]) -> Any:
            config = make_config("demo://", {**provider, "models": ["m"]})
            state = plexus_lite.make_state(plexus_lite.parse_config(config), plexus_lite.DemoBackend(), b"", "")
            return plexus_lite.check_upstreams(state)

        self.assertRow(look(sign_in(7200)), "up", "HTTP", "ok", "models listed: 2")
        self.upstream.default = lambda got: answer(200 if got.header("Authorization") else 401)
        found = look(sign_in(60, oauth_refresh=True))
        self.assertRow(found, "up", "key", "warn", "has to be renewed, which serving does")
        self.assertRow(found, "up", "HTTP", "ok", "reached")
        self.assertEqual([got.target for got in self.upstream.requests], ["/v1/models"] * 2)
        os.unlink(os.path.join(self.folder, "auth.json"))
        found = look(dict(sign_in(60), auth_file=os.path.join(self.folder, "none.json")))
        self.assertRow(found, "up", "key", "FAIL", "up is not signed in; run `codex login`")
        self.assertIn("none.json: cannot be read", found["notes"][0])

    @unittest.skipUnless(os.name == "posix", "needs file permissions")
    def test_secret_that_others_can_read_is_noted(self):
        path = self.write("key", KEY)
        os.chmod(path, 0o644)
        found = examine({"up": {"api_base_url": "demo://", "api_key": "file:" + path}})
        self.assertIn(f"providers.up.api_key: others may use {path} (mode 0644)", found["notes"][0])


class Faults(Checks):
    def test_each_fault_is_one_row_that_names_it(self):
        upstream = enter(self.addCleanup, tls_upstream())
        expired = enter(self.addCleanup, tls_upstream(EXPIRED_FILE))
        refused = refusing_port(self.addCleanup)
        plain = talking_port(self.addCleanup, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        odd = enter(self.addCleanup, FakeUpstream())
        odd.default = lambda got: [ODD[got.target.split("/")[2]], Cut()]
        cases: Sequence[Tuple[str, str, str, str]] = (
            ("refused", f"http://127.0.0.1:{refused}", "connect", f"no connection to 127.0.0.1:{refused}: "),
            ("unknown", "http://gw.invalid/v1", "connect", "no address of gw.invalid"),
            ("untrusted", upstream.base_url, "TLS", "set providers.untrusted.ca_file"),
            ("expired", expired.base_url, "TLS", "expired on 2021-01-01"),
            ("no-tls", f"https://127.0.0.1:{plain}", "TLS", "it does not speak TLS"),
            ("no-http", f"{odd.base_url}/no-http", "HTTP", "no answer: it does not answer in HTTP/1.1"),
            ("too-long", f"{odd.base_url}/too-long", "HTTP", "no answer: it does not answer in HTTP/1.1"),
            ("closed", f"{odd.base_url}/closed", "HTTP", "no answer: it closed the connection"),
            ("cut", f"{odd.base_url}/cut", "HTTP", "no answer: it broke off"),
            ("chunk", f"{odd.base_url}/chunk", "HTTP", "a chunk size is not hexadecimal"),
            ("folded", f"{odd.base_url}/folded", "HTTP", "a header line is not"),
        )
        providers: Dict[str, Dict[str, Any]] = {name: {"api_base_url": url} for name, url, _, _ in cases}
        providers["expired"]["ca_file"] = CA_FILE
        found = examine(providers)
        for name, _, phase, words in cases:
            with self.subTest(name):
                self.assertRow(found, name, phase, "FAIL", words)
                self.assertEqual(len([row for row in rows(found, name) if row["verdict"] == "FAIL"]), 1)
        self.assertEqual(upstream.requests, [])

    def test_answer_without_end_is_left(self):
        def steps(_: Recorded) -> Any:
            yield b"HTTP/1.1 200 OK\r\n\r\n"
            while True:
                yield b"[" * 1_000_000

        endless = enter(self.addCleanup, FakeUpstream())
        endless.default = steps
        self.check({"api_base_url": endless.base_url}, "HTTP", "warn", "no list of models")

    def test_those_that_hang_share_one_time_limit_and_keep_nobody_waiting(self):
        """Of ten upstreams one answers; the name of another is never found, and that call knows no limit."""
        upstream = enter(self.addCleanup, FakeUpstream())
        upstream.default = lambda request: models("m")
        silent, found_at_last = silent_port(self.addCleanup), threading.Event()
        self.addCleanup(found_at_last.set)
        look_up = socket.getaddrinfo

        def slow(host: str, *rest: Any, **more: Any) -> Any:
            if host == "slow.invalid":
                found_at_last.wait(30)
            return look_up(host, *rest, **more)

        providers: Dict[str, Dict[str, Any]] = {"good": {"api_base_url": upstream.base_url}}
        providers["slow"] = {"api_base_url": "http://slow.invalid"}
        for number in range(4):
            providers[f"tls{number}"] = {"api_base_url": f"https://127.0.0.1:{silent}"}
            providers[f"http{number}"] = {"api_base_url": f"http://127.0.0.1:{silent}"}
        with mock.patch("socket.getaddrinfo", slow), mock.patch.object(plexus_lite, "CHECK_S", 0.5):
            found = examine(providers)
        self.assertEqual(len(found["upstreams"]), 10)
        self.assertRow(found, "good", "HTTP", "ok", "models listed: 1, ours")
        self.assertRow(found, "slow", "connect", "FAIL", "does the name server answer?")
        for number in range(4):
            self.assertRow(found, f"tls{number}", "TLS", "FAIL", "no TLS handshake with 127.0.0.1 within ")
            self.assertRow(found, f"http{number}", "HTTP", "FAIL", "no answer within ")
        self.assertNotRegex(json.dumps(found), "within (0 s|the)")  # the time that it took, no setting's name


class CommandLine(Folder):
    def run_check(self, config: Any, *args: str, env: Optional[Mapping[str, str]] = None) -> Any:
        path = self.write("config.json", json.dumps(config))
        return run_cli("check", "--config", path, *args, env=env)

    def test_exit_code_and_a_table_without_escapes_on_a_pipe(self):
        upstream = enter(self.addCleanup, FakeUpstream())
        upstream.default = lambda request: answer(401, (), {"error": {"message": "wrong: sk-upstream"}})
        config = make_config(upstream, providers={"demo": {"api_base_url": "demo://", "models": ["m"]}})
        done = self.run_check(config)
        self.assertEqual((done.returncode, done.stderr), (plexus_lite.EXIT_OK, ""))
        self.assertTrue(done.stdout.endswith("\n1 upstream: 1 ok\n"), done.stdout)
        config["providers"]["up"] = make_config(upstream)["providers"]["up"]
        done = self.run_check(config, "--json", env={"HTTPS_PROXY": "http://ann:pass@proxy"})
        self.assertEqual((done.returncode, done.stderr), (plexus_lite.EXIT_CHECK_FAILED, ""))
        self.assertNotRegex(done.stdout, "pass@|sk-upstream|\x1b")
        found = json.loads(done.stdout)
        self.assertEqual([one["verdict"] for one in found["upstreams"]], ["ok", "FAIL"])
        self.assertIn("HTTPS_PROXY: not used", found["notes"][0])

    def test_configuration_that_cannot_be_served_is_one_line(self):
        provider = {"api_base_url": "https://a/v1", "models": ["m"], "ca_file": "/nonexistent.pem"}
        done = self.run_check({"providers": {"up": provider}})
        self.assertEqual((done.returncode, done.stdout, done.stderr.count("\n")), (plexus_lite.EXIT_USAGE, "", 1))
        self.assertIn("providers.up.ca_file: cannot read /nonexistent.pem", done.stderr)

    @unittest.skipUnless(os.name == "posix", "needs SIGINT")
    def test_ctrl_c_is_quiet(self):
        upstream = enter(self.addCleanup, FakeUpstream())
        upstream.default = lambda request: [Pause(threading.Event())]
        path = self.write("config.json", json.dumps(make_config(upstream)))
        command = [sys.executable, PROGRAM, "check", "--config", path]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=clean_environment()) as process:
            upstream.wait_for_requests(1)
            process.send_signal(signal.SIGINT)
            printed = process.communicate(timeout=10)
        self.maxDiff = None
        self.assertEqual((process.returncode, printed), (plexus_lite.EXIT_INTERRUPTED, ("", "")))


if __name__ == "__main__":
    unittest.main()
