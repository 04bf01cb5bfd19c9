"""Room 8: secrets in files, ChatGPT sign-ins, and both in a running proxy.

The issuer is strict, as the real one: a refresh token is good for one time, and the form has to be exact.
"""

import base64
import contextlib
import errno
import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import unittest
import unittest.mock
import urllib.parse
from typing import Any, Callable, Dict, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

import plexus_lite
from tests.support import (
    PROGRAM,
    Answer,
    Cut,
    FakeUpstream,
    Pause,
    Proxy,
    RawClient,
    Recorded,
    Reply,
    answer,
    build_request,
    default_reply,
    enter,
    post,
    run_cli,
)
from tests.test_forward_proxy import USER_INFO, FakeProxy

HERE = os.path.dirname(os.path.abspath(__file__))
CA_FILE, SERVER_FILE = os.path.join(HERE, "tls_ca.pem"), os.path.join(HERE, "tls_server.pem")
POSIX = os.name == "posix"


def jwt(**claims: Any) -> str:
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)]
    return ".".join([base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts] + ["c2ln"])


def account(name: str) -> Dict[str, Any]:
    return {"https://api.openai.com/auth": {"chatgpt_account_id": name}}


def access(lifetime_s: float = 3600, **claims: Any) -> str:
    return jwt(exp=int(time.time() + lifetime_s), **claims)


class Issuer(FakeUpstream):
    """The token issuer at /oauth/token, and an upstream that takes whatever comes everywhere else."""

    def __init__(self, tls: Optional[Tuple[str, str]] = None) -> None:
        super().__init__(tls)
        self.default = self.reply
        self.good: Set[str] = set()  # refresh tokens
        self.spent: List[str] = []  # in the order of the attempts, the refused ones too
        self.lifetime_s = 3600.0
        self.faults: List[str] = []
        self.base_url = self.base_url[: -len("/v1")]
        self._issuing = threading.Lock()  # protects the three above

    def issue(self) -> str:
        with self._issuing:
            token = f"rt-{len(self.good) + len(self.spent)}-{os.urandom(4).hex()}"
            self.good.add(token)
            return token

    def reply(self, request: Recorded) -> Reply:
        if request.target != "/oauth/token":
            return default_reply(request)
        pairs = urllib.parse.parse_qsl(request.body.decode("ascii"), strict_parsing=True)
        form = dict(pairs)
        exact = len(pairs) == len(form) == 3 and form.get("grant_type") == "refresh_token"
        exact = exact and form.get("client_id") == "app_EMoamEEZ73f0CkXaXp7hrann" and request.method == "POST"
        if not exact or request.header("Content-Type") != "application/x-www-form-urlencoded":
            self.faults.append(f"{request.header('Content-Type')} {sorted(form)}")
            return answer(400, (), {"error": "invalid_request"})
        token = form["refresh_token"]
        with self._issuing:
            self.spent.append(token)
            if token not in self.good:
                return answer(400, (), {"error": "invalid_grant"})
            self.good.remove(token)
            number = len(self.spent)
        new = access(self.lifetime_s, number=number)
        return answer(200, (), {"access_token": new, "refresh_token": self.issue(), "id_token": jwt(n=number)})


def token_of(fields: Optional[Sequence[Tuple[str, str]]]) -> str:
    assert fields is not None
    return dict(fields)["Authorization"][len("Bearer ") :]


def read_json(path: str) -> Any:
    with open(path, encoding="utf-8") as file:
        return json.load(file)


class FolderTest(unittest.TestCase):
    def setUp(self):
        self.folder = enter(self.addCleanup, tempfile.TemporaryDirectory())

    def path(self, name: str) -> str:
        return os.path.join(self.folder, name)

    def write(self, name: str, content: Any, mode: int = 0o600) -> str:
        """Put a file in the place of *name* in one step, as a careful rotation does."""
        new, path = self.path(name + ".tmp"), self.path(name)
        with open(new, "wb") as file:
            file.write(content if isinstance(content, bytes) else json.dumps(content).encode())
        os.chmod(new, mode)
        os.replace(new, path)
        return path

    def patch(self, name: str, value: Any) -> None:
        enter(self.addCleanup, unittest.mock.patch.object(plexus_lite, name, value))


class Secrets(FolderTest):
    """keys.NAME.secret and providers.NAME.api_key from files."""

    def setUp(self):
        super().setUp()
        self.patch("FILE_CHECK_S", 0)

    def make(self, secrets: Mapping[str, str], api_key: Optional[str] = None) -> plexus_lite.Credentials:
        up = {"api_base_url": "http://up/v1", "models": ["m"], **({"api_key": api_key} if api_key else {})}
        keys = {name: {"secret": secret} for name, secret in secrets.items()}
        self.config = plexus_lite.parse_config({"providers": {"up": up}, "keys": keys})
        return plexus_lite.Credentials(self.config, self.folder, lambda provider, form: (500, b""))

    def sent(self, credentials: plexus_lite.Credentials) -> str:
        return token_of(credentials.fields(self.config.providers["up"]))

    def secrets(self, credentials: plexus_lite.Credentials) -> Dict[str, str]:
        return {name: key.secret for name, key in credentials.keys.items()}

    def test_what_a_file_may_hold(self):
        for name, content in (("bare", b"sk-1"), ("newline", b"sk-1\n"), ("CR LF", b"sk-1\r\n"), ("two", b"sk-1\n\n")):
            with self.subTest(name):
                path = self.write("key", content)
                credentials = self.make({"team": "file:" + path}, "file:" + path)
                self.assertEqual((self.sent(credentials), self.secrets(credentials)), ("sk-1", {"team": "sk-1"}))
                self.assertEqual(credentials.look_again(), [])

    def test_what_cannot_be_used_is_an_error_at_start_that_names_key_and_file_only(self):
        self.write("empty", b"")
        self.write("blank", b"\n")
        self.write("lines", b"SECRET\nSECRET\n")
        self.write("space", b"SECRET x\n")
        self.write("umlaut", "SECRET\u00e9".encode())
        self.write("large", b"SECRET" * 20_000)
        os.mkdir(self.path("folder"))
        rows = [("missing", "No such file"), ("empty", "is empty"), ("blank", "is empty"), ("lines", "one line")]
        rows += [("large", "is larger than 65536 bytes")]
        rows += [("space", "visible ASCII"), ("umlaut", "visible ASCII"), ("folder", "regular")]
        if POSIX:
            os.mkfifo(self.path("fifo"))
            rows.append(("fifo", "regular"))
        for name, reason in rows:
            for where, arguments in (("keys.team.secret", ({"team": "file:" + name},)),
                                     ("providers.up.api_key", ({}, "file:" + name))):  # fmt: skip
                with self.subTest(where, name=name):
                    with self.assertRaises(plexus_lite.ConfigError) as caught:
                        self.make(*arguments)
                    message = str(caught.exception)
                    self.assertTrue(message.startswith(f"{where}: {self.path(name)}: "), message)
                    self.assertIn(reason, message)
                    self.assertNotIn("SECRET", message)

    def test_a_disabled_provider_s_file_is_not_read(self):
        up = {"api_base_url": "http://up/v1", "models": ["m"], "api_key": "file:missing", "enabled": False}
        plexus_lite.Credentials(plexus_lite.parse_config({"providers": {"up": up}}), self.folder, lambda *_: (500, b""))

    def test_a_file_that_changes_is_read_again(self):
        self.write("client", b"sk-1")
        self.write("ours", b"up-1")
        credentials = self.make({"team": "file:client", "other": "sk-other"}, "file:ours")
        self.write("client", b"sk-2")
        self.write("ours", b"up-2")
        credentials.look_again()
        self.assertEqual(self.secrets(credentials), {"team": "sk-2", "other": "sk-other"})
        self.assertEqual(self.sent(credentials), "up-2")

    def test_what_goes_wrong_while_running_leaves_the_last_good_value_and_is_said_once(self):
        self.write("client", b"sk-1")
        self.write("ours", b"up-1")
        credentials = self.make({"team": "file:client"}, "file:ours")
        for step in ("garbled", "missing"):
            for name in ("client", "ours"):
                self.write(name, b"no key\x80")
                if step == "missing":
                    os.unlink(self.path(name))
            warnings: List[str] = []
            for _ in range(3):
                self.assertEqual(self.sent(credentials), "up-1")
                warnings += credentials.look_again()
                self.assertEqual(self.secrets(credentials), {"team": "sk-1"})
            places = sorted(one.split(": ")[0] for one in warnings)
            self.assertEqual(places, ["keys.team.secret", "providers.up.api_key"], step)
        self.write("ours", b"up-3")
        self.assertEqual(self.sent(credentials), "up-3")

    def test_two_keys_that_become_one_stay_what_they_were(self):
        self.write("a", b"sk-a")
        self.write("b", b"sk-b")
        with self.assertRaises(plexus_lite.ConfigError) as caught:
            self.make({"a": "file:a", "b": "file:a"})
        self.assertIn("keys.a.secret: is that of keys.b", str(caught.exception))
        credentials = self.make({"a": "file:a", "b": "file:b", "c": "sk-c"})
        for same in (b"sk-a", b"sk-c:x"):
            self.write("b", same)
            self.assertEqual(len(credentials.look_again()), 1)
            self.assertEqual(credentials.look_again(), [])
            self.assertEqual(self.secrets(credentials), {"a": "sk-a", "b": "sk-b", "c": "sk-c"})

    def test_the_old_key_may_become_the_previous_one_in_whatever_order_the_files_are_written(self):
        self.write("current", b"sk-2")
        self.write("previous", b"sk-1")
        credentials = self.make({"current": "file:current", "previous": "file:previous"})
        self.write("previous", b"sk-2")
        credentials.look_again()
        self.assertEqual(self.secrets(credentials), {"current": "sk-2", "previous": "sk-1"})
        self.write("current", b"sk-3")
        credentials.look_again()
        self.assertEqual(self.secrets(credentials), {"current": "sk-3", "previous": "sk-2"})

    @unittest.skipUnless(POSIX, "modes are POSIX'")
    def test_others_access_is_warned_of_at_start_and_on_change(self):
        self.write("key", b"sk-1", 0o640)
        credentials = self.make({"team": "file:key"})
        (warning,) = credentials.look_again()
        self.assertIn(f"keys.team.secret: others may use {self.path('key')} (mode 0640)", warning)
        self.assertEqual(credentials.look_again(), [])
        os.chmod(self.path("key"), 0o604)
        self.assertEqual(len(credentials.look_again()), 1)

    def test_no_more_than_one_look_a_second(self):
        self.patch("FILE_CHECK_S", 60)
        self.write("ours", b"up-1")
        credentials = self.make({}, "file:ours")
        self.sent(credentials)
        with unittest.mock.patch("os.stat", side_effect=AssertionError("looked at")):
            self.assertEqual(self.sent(credentials), "up-1")


class SignInTest(FolderTest):
    """A provider with oauth://; every test has its own folder, and all share the issuer."""

    issuer: Issuer

    @classmethod
    def setUpClass(cls):
        cls.issuer = enter(cls.addClassCleanup, Issuer())

    def setUp(self):
        super().setUp()
        self.patch("FILE_CHECK_S", 0)
        self.issuer.reset()
        self.issuer.spent.clear()
        self.issuer.lifetime_s = 3600

    def tearDown(self):
        self.assertEqual(self.issuer.faults, [])

    def sign_in(self, token: str, refresh: Optional[str] = None, **members: Any) -> str:
        """Write an auth.json as the Codex CLI does; return its path."""
        self.refresh = refresh or self.issuer.issue()
        tokens = {"id_token": jwt(**account("acct-id")), "access_token": token, "refresh_token": self.refresh}
        tokens["later"] = "x"  # a member that is unknown here
        return self.write("auth.json", {"OPENAI_API_KEY": None, "tokens": tokens, "agent": {"new": [1]}, **members})

    def settings(self, **settings: Any) -> Dict[str, Any]:
        url = self.issuer.base_url
        up = {"api_base_url": {"responses": "oauth://"}, "models": ["m"], "auth_file": "auth.json"}
        return {**up, "oauth_base_url": url + "/codex", "oauth_token_url": url + "/oauth/token", **settings}

    def make(self, **settings: Any) -> plexus_lite.Credentials:
        self.config = plexus_lite.parse_config({"providers": {"up": self.settings(**settings)}})
        transport = plexus_lite.Transport(self.config, lambda: self.fail("no demo here"))
        self.addCleanup(transport.close)
        return plexus_lite.Credentials(self.config, self.folder, transport.post_form)

    def sent(self, credentials: plexus_lite.Credentials, refused: Sequence[Tuple[str, str]] = ()) -> str:
        return token_of(credentials.fields(self.config.providers["up"], refused))


class ReadingSignIns(SignInTest):
    def test_the_account_comes_from_the_file_or_a_token_s_claim(self):
        rows: Sequence[Tuple[str, Dict[str, Any], Optional[str]]] = (
            ("account_id", {"account_id": "acct-1", "id_token": jwt(**account("acct-2"))}, "acct-1"),
            ("id_token", {"id_token": jwt(**account("acct-2"))}, "acct-2"),
            (
                "access_token",
                {"access_token": access(**account("acct-3")), "id_token": jwt(**account("acct-2"))},
                "acct-3",
            ),
            ("none", {}, None),
            ("a line break in it", {"account_id": "a\r\nX: y"}, None),
            ("a line break in a claim", {"id_token": jwt(**account("a\r\nX: y"))}, None),
            ("garbled claims", {"id_token": "a.b.c", "access_token": "opaque"}, None),
            ("claims of another kind", {"id_token": jwt(**{"https://api.openai.com/auth": "x"})}, None),
        )
        for name, tokens, wanted in rows:
            with self.subTest(name):
                self.write("auth.json", {"tokens": {"access_token": access(), **tokens}})
                fields = dict(self.make().fields(self.config.providers["up"]) or ())
                self.assertEqual(fields.get("chatgpt-account-id"), wanted)

    def test_no_expiry_is_too_strange(self):
        strange: Sequence[Any] = ("soon", None, True, [], -1, 10**400, float("inf"), float("nan"), {})
        for exp in strange:
            with self.subTest(exp=exp):
                token = jwt(exp=exp)
                self.write("auth.json", {"tokens": {"access_token": token}})
                self.assertEqual(self.sent(self.make()), token)

    def test_no_repr_shows_a_token(self):
        self.sign_in("at-SECRET", "rt-SECRET")
        credentials = self.make()
        found = credentials._sources["up"]
        assert found is not None
        self.assertNotIn("SECRET", f"{credentials!r} {found!r} {found.value!r}")

    def test_without_a_usable_file_requests_fail_until_there_is_one(self):
        rows: Sequence[Tuple[str, Any]] = (
            ("missing", None),
            ("empty", b""),
            ("no JSON", b"{"),
            ("deep", b"[" * 60_000),
            ("a list", []),
            ("an API key only", {"OPENAI_API_KEY": "sk-SECRET"}),
            ("tokens of another kind", {"tokens": "SECRET"}),
            ("no access token", {"tokens": {"refresh_token": "SECRET"}}),
            ("an empty one", {"tokens": {"access_token": ""}}),
            ("one with a line break", {"tokens": {"access_token": "SECRET\r\nX: y"}}),
        )
        for name, content in rows:
            with self.subTest(name):
                if content is None:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(self.path("auth.json"))
                else:
                    self.write("auth.json", content)
                credentials = self.make()
                for _ in range(2):
                    with self.assertRaises(plexus_lite.UpstreamError) as caught:
                        self.sent(credentials)
                self.assertIn("codex login", caught.exception.message)
                (warning,) = credentials.look_again()
                self.assertIn(f"providers.up.auth_file: {self.path('auth.json')}: ", warning)
                self.assertEqual(name in ("empty", "no JSON", "deep"), "auth.json: is not valid JSON: " in warning)
                self.assertNotIn("SECRET", warning + caught.exception.message)
                self.sign_in("at-new")
                self.assertEqual(self.sent(credentials), "at-new")

    def test_the_default_is_the_codex_cli_s_file(self):
        self.sign_in("at-home")
        for name, variables in (
            ("CODEX_HOME", {"CODEX_HOME": self.folder}),
            ("home", {"CODEX_HOME": "", "HOME": self.folder, "USERPROFILE": self.folder}),
        ):
            with self.subTest(name), unittest.mock.patch.dict(os.environ, variables):
                if name == "home":
                    os.mkdir(self.path(".codex"))
                    os.rename(self.path("auth.json"), os.path.join(self.folder, ".codex", "auth.json"))
                up = {"api_base_url": "oauth://", "models": ["m"]}
                self.config = plexus_lite.parse_config({"providers": {"up": up}})
                found = self.config.providers["up"].api_base_url
                self.assertEqual(found, {"responses": ("https://chatgpt.com/backend-api/codex",)})
                credentials = plexus_lite.Credentials(self.config, "/nowhere", lambda provider, form: (500, b""))
                self.assertEqual(self.sent(credentials), "at-home")

    def test_an_expired_token_is_sent_and_warned_of_once_where_nobody_may_renew_it(self):
        old = access(-1)
        self.sign_in(old)
        credentials = self.make()
        warnings: List[str] = []
        for _ in range(3):
            self.assertEqual(self.sent(credentials, [("Authorization", "Bearer " + old)]), old)
            warnings += credentials.look_again()
        self.assertEqual(len(warnings), 1)
        self.assertIn("providers.up.auth_file: the access token has expired", warnings[0])
        self.assertEqual(self.issuer.requests, [])

    def test_what_does_not_go_together(self):
        web = "https://up/v1"
        rows: Sequence[Tuple[str, str, Mapping[str, Any]]] = (
            ("api_key", "providers.up.api_base_url", self.settings(api_key="sk-1")),
            ("passthrough", "providers.up.api_base_url", self.settings(auth="passthrough")),
            ("a replica", "providers.up.api_base_url", self.settings(api_base_url=["oauth://", web])),
            (
                "chat beside it",
                "providers.up.api_base_url",
                self.settings(api_base_url={"responses": "oauth://", "chat": web}),
            ),
            ("chat", "providers.up.api_base_url", self.settings(api_base_url={"chat": "oauth://"})),
            ("auth_file elsewhere", "providers.up", self.settings(api_base_url=web)),
            ("renewal elsewhere", "providers.up", {"api_base_url": web, "models": ["m"], "oauth_refresh": True}),
            ("no URL", "providers.up.oauth_base_url", self.settings(oauth_base_url="oauth://")),
            ("demo issues nothing", "providers.up.oauth_token_url", self.settings(oauth_token_url="demo://")),
        )
        for name, where, up in rows:
            with self.subTest(name):
                with self.assertRaises(plexus_lite.ConfigError) as caught:
                    plexus_lite.parse_config({"providers": {"up": up}})
                self.assertTrue(str(caught.exception).startswith(where + ": "), caught.exception)


class Renewal(SignInTest):
    """oauth_refresh: true."""

    def make(self, **settings: Any) -> plexus_lite.Credentials:
        return super().make(**{"oauth_refresh": True, **settings})

    def test_five_minutes_before_the_end_the_file_gets_new_tokens_and_keeps_the_rest(self):
        path = self.sign_in(access(299), last_refresh="2020-01-01T00:00:00Z")
        before = read_json(path)
        credentials = self.make()
        token = self.sent(credentials)
        after = read_json(path)
        self.assertEqual(self.issuer.spent, [before["tokens"]["refresh_token"]])
        self.assertEqual(after["tokens"]["access_token"], token)
        self.assertIn(after["tokens"]["refresh_token"], self.issuer.good)
        self.assertNotEqual(after["tokens"]["id_token"], before["tokens"]["id_token"])
        self.assertRegex(after["last_refresh"], r"\A20[0-9]{2}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z\Z")
        self.assertGreater(after["last_refresh"], "2020-01-02")
        self.assertEqual((after["OPENAI_API_KEY"], after["agent"]), (None, {"new": [1]}))
        self.assertEqual(after["tokens"]["later"], "x")
        if POSIX:
            self.assertEqual(stat.S_IMODE(os.stat(path).st_mode), 0o600)
        self.assertEqual(sorted(os.listdir(self.folder)), ["auth.json", "auth.json.lock"])
        self.assertEqual((self.sent(credentials), credentials.look_again()), (token, []))
        self.assertEqual(len(self.issuer.spent), 1)

    def test_earlier_nobody_is_asked_and_nothing_is_written(self):
        token = access(310)
        self.sign_in(token)
        self.assertEqual(self.sent(self.make()), token)
        self.assertEqual((self.issuer.requests, os.listdir(self.folder)), ([], ["auth.json"]))

    def test_a_refused_token_is_renewed_once_whenever_it_ends(self):
        self.sign_in("at-opaque")
        credentials = self.make()
        up = self.config.providers["up"]
        old = credentials.fields(up) or ()
        new = credentials.fields(up, old) or ()
        self.assertNotEqual(token_of(new), "at-opaque")
        self.assertEqual(credentials.fields(up, old), new)  # another request that was refused with the old one
        self.assertEqual(credentials.fields(up, new), new)
        self.assertEqual(len(self.issuer.spent), 1)

    def test_the_loop_never_waits_for_a_renewal(self):
        self.sign_in(access(310))
        credentials = self.make()
        up = self.config.providers["up"]
        usable = credentials.fields(up, (), may_wait=False) or ()
        self.assertTrue(usable)
        self.assertIsNone(credentials.fields(up, usable, may_wait=False))
        self.sign_in(access(290))
        self.assertIsNone(credentials.fields(up, (), may_wait=False))
        self.assertEqual(self.issuer.requests, [])

    def test_a_failed_renewal_changes_nothing_and_is_not_tried_for_every_request(self):
        rows: Sequence[Tuple[str, Reply]] = (
            ("500", answer(500, (), {"access_token": "at-bad"})),
            ("a redirect", answer(302, {"Location": self.issuer.base_url + "/oauth/token"}, b"")),
            ("no JSON", answer(200, (), b"<html>")),
            ("a list", answer(200, (), [])),
            ("no access token", answer(200, (), {"refresh_token": "rt-x"})),
            ("a token with a line break", answer(200, (), {"access_token": "a\r\nX: y"})),
            ("no HTTP", [b"hello\r\n\r\n", Cut()]),
            ("closed", [Cut()]),
            ("cut", [b'HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"access_token":"at-bad"}', Cut()]),
        )
        for name, reply in rows:
            with self.subTest(name):
                old = access(-1)
                path = self.sign_in(old)
                with open(path, "rb") as file:
                    before = file.read()
                credentials = self.make()
                self.issuer.reset()
                self.issuer.script(reply)
                for _ in range(3):
                    self.assertEqual(self.sent(credentials), old)
                with open(path, "rb") as file:
                    self.assertEqual(file.read(), before)
                self.assertEqual(len(self.issuer.requests), 1)
                (warning, *more) = credentials.look_again()
                self.assertTrue(warning.startswith("providers.up.auth_file: the tokens were not renewed: "), warning)
                self.assertEqual(more, [])
                self.assertNotIn(self.refresh, warning)

    def test_a_refresh_token_that_was_refused_is_never_sent_again(self):
        self.patch("RENEW_PAUSE_S", 0)
        old = access(-1)
        self.sign_in(old, "rt-spent")
        credentials = self.make()
        for _ in range(3):
            self.assertEqual(self.sent(credentials), old)
        self.assertEqual(self.issuer.spent, ["rt-spent"])
        self.assertIn("codex login", credentials.look_again()[0])
        self.sign_in(access(-1))  # somebody signed in again
        self.assertNotEqual(self.sent(credentials), old)
        self.assertEqual(self.issuer.spent, ["rt-spent", self.refresh])

    def test_a_page_that_stands_before_the_issuer_refuses_no_token(self):
        self.patch("RENEW_PAUSE_S", 0)
        old = access(-1)
        self.sign_in(old)
        credentials = self.make()
        page = answer(403, {"Content-Type": "text/html"}, b"<!DOCTYPE html><title>Are you human?</title>")
        self.issuer.script(page, answer(401, (), {"message": "unknown route"}), answer(502, (), b"{broken"))
        for status in (403, 401, 502):
            self.assertEqual(self.sent(credentials), old)
            self.assertIn(f"/oauth/token answered {status} without a token", credentials.look_again()[-1])
        self.assertNotEqual(self.sent(credentials), old)
        self.assertEqual(self.issuer.spent, [self.refresh])

    def test_an_issuer_that_cannot_be_reached_leaves_the_token_in_use(self):
        old = access(100)
        self.sign_in(old)
        credentials = self.make(oauth_token_url="http://127.0.0.1:1/oauth/token")
        self.assertEqual(self.sent(credentials), old)
        self.assertIn("no connection to 127.0.0.1:1", credentials.look_again()[0])

    def test_an_issuer_that_drips_is_left_in_time(self):
        self.patch("ISSUER_S", 0.3)
        stop = threading.Event()
        self.addCleanup(stop.set)
        old = access(100)
        self.sign_in(old)

        def drip() -> Iterator[bytes]:
            end = b'{"access_token":"at-late"}'
            yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (100 + len(end))
            for _ in range(100):
                stop.wait(0.05)
                yield b" "
            yield end

        reply: Any = drip()
        self.issuer.script(reply)
        credentials = self.make()
        self.assertEqual(self.sent(credentials), old)
        self.assertIn("not renewed", credentials.look_again()[0])

    def test_tokens_that_the_cli_wrote_meanwhile_are_taken_and_none_is_spent(self):
        self.patch("FILE_CHECK_S", 60)
        self.sign_in(access(-1))
        credentials = self.make()
        new = access(3600)
        self.sign_in(new)  # seen only once the lock is held
        with unittest.mock.patch.object(plexus_lite, "replace_file", side_effect=AssertionError("written")):
            self.assertEqual(self.sent(credentials), new)
        self.assertEqual((self.issuer.spent, credentials.look_again()), ([], []))

    def test_tokens_that_could_not_be_written_are_renewed_as_any_other(self):
        self.patch("RENEW_PAUSE_S", 0)
        path = self.sign_in(access(-1))
        credentials = self.make()
        self.issuer.lifetime_s = 100  # due again at once
        self.addCleanup(setattr, self.issuer, "lifetime_s", 3600.0)
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with unittest.mock.patch("os.fsync", side_effect=[None, full]):
            self.sent(credentials)
        for _ in range(2):
            token = self.sent(credentials)
            self.assertEqual(read_json(path)["tokens"]["access_token"], token)
            self.assertNotIn(read_json(path)["tokens"]["refresh_token"], self.issuer.spent)
        self.assertEqual(len(self.issuer.spent), 3)

    def test_who_signs_in_while_the_issuer_is_asked_stays_signed_in(self):
        """`codex login` knows no lock: the account that it wrote was replaced by the renewed old one."""
        path = self.sign_in(access(-1))
        credentials, new = self.make(), access(3600)

        def reply(request: Recorded) -> Reply:
            steps = self.issuer.reply(request)
            self.sign_in(new)
            return steps

        with unittest.mock.patch.object(self.issuer, "default", reply):
            self.assertEqual(self.sent(credentials), new)
        self.assertEqual(read_json(path)["tokens"]["access_token"], new)
        self.assertEqual((len(self.issuer.spent), credentials.look_again()), (1, []))

    def test_what_the_cli_writes_in_the_moment_of_our_trial_stays(self):
        """It was overwritten with what the CLI had just spent."""
        self.patch("RENEW_PAUSE_S", 0)
        path, real = self.sign_in(access(-1)), os.fsync
        credentials, new = self.make(), access(3600)

        def fsync(fd: int) -> None:
            real(fd)
            self.sign_in(new)

        with unittest.mock.patch("os.fsync", fsync):
            self.sent(credentials)
        self.assertEqual(read_json(path)["tokens"]["access_token"], new)
        self.assertEqual(self.issuer.spent, [])
        self.assertIn("auth.json has changed meanwhile", credentials.look_again()[0])
        credentials._sources["up"].look()  # type: ignore[union-attr]  # it is looked at once a second
        self.assertEqual(self.sent(credentials), new)

    def test_tokens_that_the_file_had_already_begin_no_pause(self):
        self.patch("FILE_CHECK_S", 60)
        self.sign_in(access(-1))
        credentials = self.make()
        self.sign_in(access(3600))
        fields = credentials.fields(self.config.providers["up"])
        self.assertEqual(self.issuer.spent, [])
        self.assertNotEqual(token_of(fields), self.sent(credentials, refused=fields or ()))
        self.assertEqual(len(self.issuer.spent), 1)

    def test_the_end_of_the_program_waits_for_the_answer_of_the_issuer(self):
        """Its refresh token is spent, and the next one would be nowhere."""
        path = self.sign_in(access(-1))
        credentials, go = self.make(), threading.Event()
        self.addCleanup(go.set)

        def reply(request: Recorded) -> Reply:
            return [Pause(go), *self.issuer.reply(request)]

        with unittest.mock.patch.object(self.issuer, "default", reply):
            thread = threading.Thread(target=self.sent, args=(credentials,))
            thread.start()
            self.issuer.wait_for_requests(1)
            credentials.close(0.01)  # no longer than it may
            self.assertEqual(read_json(path)["tokens"]["refresh_token"], self.refresh)
            threading.Timer(0.1, go.set).start()
            credentials.close(10)
            self.assertNotIn(read_json(path)["tokens"]["refresh_token"], self.issuer.spent)
            thread.join(10)

    def test_a_full_disk_leaves_the_file_and_spends_no_token(self):
        """Two processes would spend it twice, and an issuer may revoke all for that."""
        old = access(-1)
        path = self.sign_in(old)
        before = read_json(path)
        credentials = self.make()
        with unittest.mock.patch("os.fsync", side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))):
            self.assertEqual(self.sent(credentials), old)
        self.assertEqual((read_json(path), self.issuer.spent), (before, []))
        self.assertEqual(sorted(os.listdir(self.folder)), ["auth.json", "auth.json.lock"])
        self.assertIn("the tokens were not renewed: [Errno 28]", credentials.look_again()[0])

    def test_a_disk_that_fills_meanwhile_leaves_the_file_and_the_new_token_serves_until_it_can_be_written(self):
        self.patch("RENEW_PAUSE_S", 0)
        path = self.sign_in(access(-1))
        before = read_json(path)
        credentials = self.make()
        full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        with unittest.mock.patch("os.fsync", side_effect=[None, full, full]):
            token = self.sent(credentials)
            os.chmod(path, 0o400)  # a look at a file that was only touched must not bring the old token back
            self.assertEqual(self.sent(credentials), token)
        self.assertEqual(read_json(path), before)
        self.assertEqual(sorted(os.listdir(self.folder)), ["auth.json", "auth.json.lock"])
        self.assertIn("the new tokens are not in the file yet: [Errno 28]", credentials.look_again()[0])
        self.assertEqual(self.sent(credentials), token)
        self.assertEqual(read_json(path)["tokens"]["access_token"], token)
        self.assertEqual(len(self.issuer.spent), 1)

    def test_an_expired_token_that_nothing_can_renew_asks_for_a_sign_in_and_not_for_what_is_set(self):
        self.write("auth.json", {"tokens": {"access_token": access(-1)}})
        credentials = self.make()
        self.sent(credentials)
        self.assertIn("has expired; run `codex login`", credentials.look_again()[0])

    @unittest.skipUnless(POSIX, "FIFOs are POSIX'")
    def test_a_fifo_in_the_place_of_the_lock_keeps_nobody_waiting(self):
        path = self.sign_in(access(-1))
        os.mkfifo(path + ".lock")
        credentials = self.make()
        alarm = threading.Timer(5, lambda: os.close(os.open(path + ".lock", os.O_RDONLY | os.O_NONBLOCK)))
        alarm.start()  # lets go who waits
        self.addCleanup(alarm.cancel)
        self.sent(credentials)
        self.assertIn("the tokens were not renewed: ", credentials.look_again()[0])
        self.assertEqual(self.issuer.spent, [])

    @unittest.skipUnless(POSIX, "owners are POSIX'")
    def test_the_file_stays_its_owner_s(self):
        """A proxy that runs as root must not lock the user's own Codex out."""
        path = self.sign_in(access(-1))
        owner = (12345, 12345) if os.geteuid() == 0 else (os.getuid(), os.getgid())
        os.chown(path, *owner)
        self.sent(self.make())
        found = os.stat(path)
        self.assertEqual((len(self.issuer.spent), found.st_uid, found.st_gid), (1, *owner))

    def test_the_issuer_s_certificate_is_checked_against_the_provider_s_ca_file(self):
        issuer = enter(self.addCleanup, Issuer((SERVER_FILE, SERVER_FILE)))
        url = issuer.base_url + "/oauth/token"
        for ca_file, trusted in ((None, False), (CA_FILE, True)):
            with self.subTest(ca_file):
                old = access(-1)
                self.sign_in(old, issuer.issue())
                credentials = self.make(oauth_token_url=url, **({"ca_file": ca_file} if ca_file else {}))
                self.assertEqual(self.sent(credentials) != old, trusted)
                warnings = credentials.look_again()
                self.assertEqual(["is not trusted" in one for one in warnings], [] if trusted else [True])
        self.assertEqual(len(issuer.spent), 1)

    def test_the_issuer_is_asked_through_the_provider_s_forward_proxy(self):
        issuer = enter(self.addCleanup, Issuer((SERVER_FILE, SERVER_FILE)))
        forward = enter(self.addCleanup, FakeProxy())
        self.sign_in(access(-1), issuer.issue())
        proxy = f"http://{USER_INFO}@127.0.0.1:{forward.port}"
        self.sent(self.make(oauth_token_url=issuer.base_url + "/oauth/token", ca_file=CA_FILE, proxy=proxy))
        self.assertEqual([request.target for request in forward.requests], [f"127.0.0.1:{issuer.port}"])
        self.assertEqual(issuer.spent, [self.refresh])

    @unittest.skipUnless(POSIX, "links need a privilege elsewhere")
    def test_a_link_stays_a_link(self):
        path = self.sign_in(access(-1))
        os.rename(path, self.path("real.json"))
        os.symlink("real.json", path)
        token = self.sent(self.make())
        self.assertTrue(os.path.islink(path))
        self.assertEqual(read_json(self.path("real.json"))["tokens"]["access_token"], token)

    def test_where_nothing_can_be_written_no_token_is_spent(self):
        self.sign_in(access(-1))
        os.mkdir(self.path("auth.json.lock"))  # as in a folder that is read-only; root could write there
        credentials = self.make()
        self.sent(credentials)
        self.assertEqual(self.issuer.spent, [])
        self.assertIn("auth.json.lock", credentials.look_again()[0])

    def test_a_file_that_has_gone_or_is_garbled_is_not_renewed_and_not_written(self):
        self.patch("RENEW_PAUSE_S", 0)
        for name, content in (("gone", None), ("garbled", b'{"tokens":')):
            with self.subTest(name):
                old = access(-1)
                path = self.sign_in(old)
                credentials = self.make()
                credentials.look_again()
                if content is None:
                    os.unlink(path)
                else:
                    self.write("auth.json", content)
                for _ in range(2):
                    self.assertEqual(self.sent(credentials), old)
                self.assertIn("the tokens were not renewed: " + path, credentials.look_again()[-1])
                if content is None:
                    self.assertFalse(os.path.exists(path))
                else:
                    with open(path, "rb") as file:
                        self.assertEqual(file.read(), content)
        self.assertEqual(self.issuer.spent, [])

    def renew_in_two_threads(self, old: str, waits: bool) -> List[str]:
        """Return the tokens that two threads get while the issuer takes its time for the first; in their order."""
        self.sign_in(old)
        credentials = self.make()
        found: List[str] = []
        go_on = threading.Event()
        hint = b"HTTP/1.1 103 Early Hints\r\n\r\n"
        self.issuer.script([Pause(go_on), hint, *answer(200, (), {"access_token": "at-new"})])
        threads = [threading.Thread(target=lambda: found.append(self.sent(credentials))) for _ in range(2)]
        threads[0].start()
        self.issuer.wait_for_requests(1)
        threads[1].start()
        threads[1].join(0.1 if waits else 10)
        go_on.set()
        for thread in threads:
            thread.join(10)
        self.assertEqual(len(self.issuer.requests), 1)
        return found

    def test_nobody_waits_for_another_thread_s_renewal_while_the_old_token_works(self):
        old = access(100)
        self.assertEqual(self.renew_in_two_threads(old, waits=False), [old, "at-new"])

    def test_all_wait_for_one_renewal_once_the_token_has_expired(self):
        self.assertEqual(self.renew_in_two_threads(access(-1), waits=True), ["at-new", "at-new"])


@unittest.skipUnless(hasattr(os, "fork"), "forks")
class Processes(SignInTest):
    """Renewals in several processes; each has a Credentials of its own."""

    def run_child(self, script: str) -> "subprocess.CompletedProcess[str]":
        config = json.dumps({"providers": {"up": self.settings(oauth_refresh=True)}})
        head = f"""\
            import json, os, signal, sys
            sys.path.insert(0, {os.path.dirname(PROGRAM)!r})
            import plexus_lite
            config = plexus_lite.parse_config(json.loads({config!r}))

            def ask():
                transport = plexus_lite.Transport(config, None)
                credentials = plexus_lite.Credentials(config, {self.folder!r}, transport.post_form)
                fields = credentials.fields(config.providers["up"])
                os.write(1, (dict(fields)["Authorization"] + "\\n").encode())
                for warning in credentials.look_again():
                    os.write(1, (warning + "\\n").encode())

            """
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(head) + textwrap.dedent(script)],
            capture_output=True,
            text=True,
            timeout=30,
        )

    def test_ten_processes_that_race_spend_one_token(self):
        self.sign_in(access(-1))
        done = self.run_child("""
            read, write = os.pipe()
            children = []
            for _ in range(10):
                pid = os.fork()
                if not pid:
                    os.close(write)
                    os.read(read, 1)  # returns for all at once, when the parent closes its end
                    ask()
                    os._exit(0)
                children.append(pid)
            os.close(write)
            for pid in children:
                os.waitpid(pid, 0)
            """)
        lines = done.stdout.splitlines()
        self.assertEqual((len(lines), len(set(lines)), done.stderr), (10, 1, ""))
        self.assertEqual(self.issuer.spent, [self.refresh])
        self.assertEqual(lines[0], "Bearer " + read_json(self.path("auth.json"))["tokens"]["access_token"])

    def test_a_proxy_that_is_stopped_writes_down_what_the_issuer_answers(self):
        """Also where the client has left, and nothing else keeps it from ending."""
        path = self.sign_in(access(-1))
        go = threading.Event()
        self.addCleanup(go.set)

        def reply(request: Recorded) -> Reply:
            return [Pause(go), *self.issuer.reply(request)] if request.target == "/oauth/token" else answer(200, (), {})

        with unittest.mock.patch.object(self.issuer, "default", reply):
            with Proxy({"providers": {"up": self.settings(oauth_refresh=True, auth_file=path)}}) as proxy:
                client = RawClient(proxy.port)
                client.send(build_request("POST", "/v1/responses", {"model": "m", "input": "x"}))
                self.issuer.wait_for_requests(1)
                client.close()
                proxy.wait_for_record(lambda record: record.get("status") == 499)
                proxy.process.send_signal(signal.SIGTERM)
                threading.Timer(0.2, go.set).start()
                self.assertEqual(proxy.process.wait(10), 0)
        self.assertNotIn(read_json(path)["tokens"]["refresh_token"], [self.refresh, *self.issuer.spent])

    def test_a_crash_between_answer_and_write_leaves_the_file_whole_and_the_lock_free(self):
        for name, crash in (
            ("before the write", "real, plexus_lite.replace_file = plexus_lite.replace_file, die"),
            ("before the replacement", "real, os.replace = os.replace, die"),
        ):
            with self.subTest(name):
                old = access(-1)
                path = self.sign_in(old)
                before = read_json(path)
                done = self.run_child(f"""
                    def die(*arguments, calls=[]):
                        calls.append(arguments)
                        if len(calls) == 2:  # the first one finds out whether anything can be written
                            os.kill(os.getpid(), signal.SIGKILL)
                        real(*arguments)

                    {crash}
                    ask()
                    """)
                self.assertEqual((done.returncode, done.stdout), (-signal.SIGKILL, ""))
                self.assertEqual(read_json(path), before)
                credentials = self.make(oauth_refresh=True)
                self.assertEqual(self.sent(credentials), old)
                self.assertEqual(self.issuer.spent[-2:], [self.refresh] * 2)  # the issuer refused the second
                self.assertIn("codex login", credentials.look_again()[0])
                self.assertEqual(read_json(path), before)
                self.sign_in(access(-1))
                self.assertNotEqual(self.sent(self.make(oauth_refresh=True)), old)


class Running(unittest.TestCase):
    """One proxy with every kind of provider.  Files lie beside its configuration."""

    issuer: Issuer
    proxy: Proxy
    config: Dict[str, Any]
    refresh: str

    SECRETS = ("sk-client-1", "sk-client-2", "up-key-1", "up-key-2", "at-fresh", "at-refused", "rt-first")

    @classmethod
    def setUpClass(cls):
        cls.issuer = enter(cls.addClassCleanup, Issuer())
        url = cls.issuer.base_url
        oauth = {"api_base_url": {"responses": "oauth://"}, "oauth_base_url": url + "/codex"}
        oauth["oauth_token_url"] = url + "/oauth/token"
        providers: Dict[str, Any] = {
            name: {**oauth, "models": [name], "auth_file": name + ".json"} for name in ("fresh", "expired", "missing")
        }
        for name in ("refused", "one", "two", "slow"):
            providers[name] = {**oauth, "models": [name], "auth_file": name + ".json", "oauth_refresh": True}
        providers["keyed"] = {"api_base_url": url, "models": ["keyed"], "api_key": "file:up.key"}

        def alias(*names: str) -> Dict[str, Any]:
            return {"targets": [{"provider": name, "model": name, "group": at + 1} for at, name in enumerate(names)]}

        cls.config = {"keys": {"team": {"secret": "file:client.key"}}, "providers": providers}
        cls.config["models"] = {"either": alias("missing", "keyed"), "both": alias("one", "two")}
        cls.proxy = Proxy(cls.config)
        cls.refresh = cls.issuer.issue()
        cls.write("client.key", "sk-client-1\n")
        cls.write("up.key", "up-key-1\n")
        cls.write("fresh.json", {"tokens": {"access_token": "at-fresh", "account_id": "acct-7"}})
        cls.write("expired.json", {"tokens": {"access_token": access(-5)}})
        cls.write("refused.json", {"tokens": {"access_token": "at-refused", "refresh_token": cls.refresh}})
        cls.write("slow.json", {"tokens": {"access_token": access(-5), "refresh_token": cls.issuer.issue()}})
        for name in ("one", "two"):
            cls.write(name + ".json", {"tokens": {"access_token": "at-" + name, "refresh_token": cls.issuer.issue()}})
        enter(cls.addClassCleanup, cls.proxy)

    @classmethod
    def write(cls, name: str, content: Any) -> None:
        path = os.path.join(cls.proxy.folder, name)
        with open(path + ".tmp", "w", encoding="utf-8") as file:
            file.write(content if isinstance(content, str) else json.dumps(content))
        os.chmod(path + ".tmp", 0o600)
        os.replace(path + ".tmp", path)

    def setUp(self):
        self.issuer.reset()
        self.key = "sk-client-1"

    def tearDown(self):
        log = self.proxy.error_text() + "\n".join(self.proxy.stdout)
        for secret in (*self.SECRETS, self.refresh):
            self.assertNotIn(secret, log)

    def ask(self, model: str, *fields: Tuple[str, str], key: str = "sk-client-1") -> Answer:
        return post(self.proxy.port, "/v1/responses", {"model": model}, fields, key=key)

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not is_so():
            self.assertLess(time.monotonic(), deadline)

    def test_a_sign_in_goes_upstream_and_the_client_stays_who_it_is(self):
        own = [("originator", "codex_cli_rs"), ("User-Agent", "codex/1"), ("chatgpt-account-id", "theirs")]
        self.assertEqual(self.ask("fresh", *own).status, 200)
        (request,) = self.issuer.requests
        self.assertEqual(request.target, "/codex/responses")
        self.assertEqual(request.all("Authorization"), ["Bearer at-fresh"])
        self.assertEqual(request.all("chatgpt-account-id"), ["acct-7"])
        self.assertEqual((request.all("originator"), request.all("User-Agent")), (["codex_cli_rs"], ["codex/1"]))
        self.issuer.reset()
        self.ask("fresh")
        self.assertEqual(
            (self.issuer.requests[0].all("originator"), self.issuer.requests[0].all("User-Agent")), ([], [])
        )

    def test_a_401_has_the_token_renewed_and_is_asked_again_once(self):
        refusal = answer(401, (), {"error": {"message": "at-refused is not known"}})
        self.issuer.script(refusal)
        self.assertEqual(self.ask("refused").status, 200)
        first, renewal, second = self.issuer.requests
        self.assertEqual(renewal.target, "/oauth/token")
        self.assertEqual((first.header("Authorization"), first.body), ("Bearer at-refused", second.body))
        with open(os.path.join(self.proxy.folder, "refused.json"), encoding="utf-8") as file:
            token = json.load(file)["tokens"]["access_token"]
        self.assertEqual(second.header("Authorization"), "Bearer " + token)
        self.issuer.reset()
        self.issuer.script(*[answer(401, (), {"error": {"message": token}})] * 2)
        got = self.ask("refused")
        self.assertEqual((got.status, got.json()), (401, {"error": {"message": "*" * len(token)}}))
        self.assertNotIn("/oauth/token", [request.target for request in self.issuer.requests])

    def test_others_are_served_while_a_token_is_renewed(self):
        go_on = threading.Event()
        self.addCleanup(go_on.set)
        self.issuer.script([Pause(go_on), *answer(200, (), {"access_token": "at-slow"})])
        with RawClient(self.proxy.port) as client:
            client.send(build_request("POST", "/v1/responses", {"model": "slow"}, key="sk-client-1"))
            self.issuer.wait_for_requests(1)
            self.assertEqual(self.ask("keyed").status, 200)
            go_on.set()
            self.assertEqual(client.read_answer().status, 200)
        self.assertEqual(self.issuer.requests[-1].header("Authorization"), "Bearer at-slow")

    def test_each_sign_in_of_a_failover_is_renewed_for_itself(self):
        issued = [answer(200, (), {"access_token": token}) for token in ("at-one-2", "at-two-2")]
        refusal = answer(401, (), {"error": "token"})
        self.issuer.script(refusal, issued[0], answer(503, (), {"error": "busy"}), refusal, issued[1])
        self.assertEqual(self.ask("both").status, 200)
        sent = [request.header("Authorization") or "" for request in self.issuer.requests]
        wanted = ["Bearer at-one", "", "Bearer at-one-2", "Bearer at-two", "", "Bearer at-two-2"]
        self.assertEqual(sent, wanted)

    def test_where_nothing_is_renewed_the_401_goes_to_the_client(self):
        for model in ("fresh", "expired", "keyed"):
            with self.subTest(model):
                self.issuer.reset()
                self.issuer.script(answer(401, {"x-from": "upstream"}, {"error": "no"}))
                got = self.ask(model)
                self.assertEqual((got.status, got.header("x-from"), len(self.issuer.requests)), (401, "upstream", 1))
        warned = self.proxy.wait_for_record(lambda one: "expired" in one.get("message", ""))
        self.assertIn("providers.expired.auth_file: ", warned["message"])

    def test_a_provider_without_a_sign_in_answers_502_and_all_others_serve(self):
        got = self.ask("missing")
        self.assertEqual((got.status, got.error_code), (502, "upstream_connection_error"))
        self.assertIn("missing is not signed in; run `codex login`", got.json()["error"]["message"])
        self.assertNotIn(self.proxy.folder, got.body.decode())
        self.assertEqual(self.ask("either").status, 200)
        self.assertEqual(len(self.issuer.requests), 1)
        warned = self.proxy.wait_for_record(lambda one: "providers.missing." in one.get("message", ""))
        self.assertIn("missing.json: cannot be read: No such file", warned["message"])

    def test_secrets_rotate_while_it_runs_and_the_old_ones_end(self):
        self.assertEqual(self.ask("keyed").status, 200)
        self.write("client.key", "sk-client-2\n")
        self.write("up.key", "up-key-2\n")
        self.addCleanup(self.wait_until, lambda: self.ask("keyed").status == 200)
        self.addCleanup(self.write, "client.key", "sk-client-1\n")
        self.wait_until(lambda: self.ask("keyed", key="sk-client-2").status == 200)
        self.assertEqual(self.ask("keyed").status, 401)
        self.wait_until(lambda: self.ask("keyed", key="sk-client-2").status == 200
                        and self.issuer.requests[-1].header("Authorization") == "Bearer up-key-2")  # fmt: skip
        self.issuer.script(answer(401, (), {"error": {"message": "up-key-2 up-key-1"}}))
        got = self.ask("keyed", key="sk-client-2")
        self.assertEqual(got.json(), {"error": {"message": "******** up-key-1"}})  # what was sent is masked

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "no SIGHUP")
    def test_a_reload_reads_every_file_and_keeps_the_old_state_where_one_is_missing(self):
        os.rename(*(os.path.join(self.proxy.folder, name) for name in ("up.key", "gone.key")))
        self.addCleanup(os.rename, *(os.path.join(self.proxy.folder, name) for name in ("gone.key", "up.key")))
        self.proxy.process.send_signal(signal.SIGHUP)
        refused = self.proxy.wait_for_record(lambda one: "not reloaded" in one.get("message", ""))
        self.assertRegex(refused["message"], r"providers\.keyed\.api_key: .*up\.key: cannot be read: No such file")
        self.assertEqual(self.ask("keyed").status, 200)

    def test_what_there_is_to_warn_of_is_said_before_the_end(self):
        up = {
            "api_base_url": {"responses": "oauth://"},
            "models": ["m"],
            "auth_file": "auth.json",
            "oauth_refresh": True,
        }
        up.update(oauth_base_url=self.issuer.base_url, oauth_token_url=self.issuer.base_url + "/oauth/token")
        proxy = Proxy({"providers": {"up": up}})
        with open(os.path.join(proxy.folder, "auth.json"), "w", encoding="ascii") as file:
            json.dump({"tokens": {"access_token": access(-5), "refresh_token": self.issuer.issue()}}, file)
        os.mkdir(os.path.join(proxy.folder, "auth.json.new"))
        with proxy:
            self.assertEqual(post(proxy.port, "/v1/responses", {"model": "m"}).status, 200)
        self.assertIn("the tokens were not renewed: [Errno", proxy.error_text())

    def test_a_missing_secret_is_one_line_at_start(self):
        config = {**self.config, "keys": {"team": {"secret": "file:nowhere.key"}}}
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.json")
            with open(path, "w", encoding="utf-8") as file:
                json.dump(config, file)
            done = run_cli("--config", path, "--port", "0")
        self.assertEqual((done.returncode, done.stdout), (plexus_lite.EXIT_USAGE, ""))
        (line,) = done.stderr.splitlines()
        self.assertTrue(line.startswith(f"{path}: keys.team.secret: {os.path.join(folder, 'nowhere.key')}: "), line)


if __name__ == "__main__":
    unittest.main()
