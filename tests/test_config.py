"""Room 3: what a configuration may hold, and the one line that says where and why it may not."""

import argparse
import copy
import json
import os
import tempfile
import unittest
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union
from unittest import mock

import plexus_lite
from tests.support import run_cli

Step = Union[str, int]

# The example of the contract, whole.
EXAMPLE = """\
{
  "host": "127.0.0.1", "port": 4000,
  "keys": {"team-a": {"secret": "${PLEXUS_KEY}", "models": ["gpt-5.4"]}},
  "providers": {
    "clawbay-direct": {
      "api_key": "${CLAWBAY_KEY}",
      "api_base_url": {"responses": "https://api.theclawbay.com/backend-api/codex"},
      "models": {"gpt-5.4": {"access_via": ["responses"]}}
    },
    "vllm": {
      "api_base_url": {"responses": ["http://gpu1:8000/v1", "http://gpu2:8000/v1"]},
      "models": ["qwen3-coder"], "ca_file": "/etc/pki/site-ca.pem"
    }
  },
  "models": {"coder": {"targets": [{"provider": "vllm", "model": "qwen3-coder"},
                                    {"provider": "clawbay-direct", "model": "gpt-5.4", "group": 2}]}}
}
"""
VARIABLES = {"PLEXUS_KEY": "sk-team-a", "CLAWBAY_KEY": "sk-clawbay"}

# A valid document with one object of each kind, and the way to each of them.
DOCUMENT: Dict[str, Any] = {
    "keys": {"team": {"secret": "sk-team"}},
    "providers": {"up": {"api_base_url": {"responses": "http://up/v1"}, "models": {"gpt": {}}}},
    "models": {"alias": {"targets": [{"provider": "up", "model": "gpt"}]}},
    "limits": {},
}
LEVELS: Sequence[Tuple[Any, Sequence[Step], str]] = (
    (plexus_lite.Config, (), ""),
    (plexus_lite.Key, ("keys", "team"), "keys.team"),
    (plexus_lite.Provider, ("providers", "up"), "providers.up"),
    (plexus_lite.Alias, ("models", "alias"), "models.alias"),
    (plexus_lite.AliasTarget, ("models", "alias", "targets", 0), "models.alias.targets[0]"),
    (plexus_lite.Limits, ("limits",), "limits"),
)
CONTAINERS = {"providers", "tls", "keys", "hosts", "models", "prices", "limits", "api_base_url", "targets"}
CONTAINERS |= {"headers", "session_headers", "affinity_headers"}
SECRETS = {"secret", "api_key", "headers", "proxy"}  # no error shows what was found there
WHOLE = {"port", "workers", "max_connections", "group"}
JSON_KINDS: Sequence[Tuple[str, Any]] = (
    ("null", None),
    ("a flag", True),
    ("a number", 7),
    ("a string", "?"),
    ("a list", [[]]),
    ("an object", {"?": None}),
)


def document(where: Sequence[Step] = (), **changes: Any) -> Dict[str, Any]:
    """Return DOCUMENT with *changes* in the object at *where*."""
    whole = copy.deepcopy(DOCUMENT)
    place: Any = whole
    for step in where:
        place = place[step]
    place.update(changes)
    return whole


class Row(NamedTuple):
    """A configuration key, what the program knows of it, and the type of its value."""

    name: str
    setting: plexus_lite.Setting
    hint: Any


def rows_of(cls: Any) -> List[Row]:
    return [Row(name, one, hint_of(name, one.default)) for name, one in cls.rows.items()]


def settings() -> Iterator[Tuple[Any, Sequence[Step], str, Any]]:
    """Yield (class, way to its object, path of the setting, Row) for every configuration key."""
    for cls, where, path in LEVELS:
        for row in rows_of(cls):
            yield cls, where, f"{path}.{row.name}" if path else row.name, row


def hint_of(name: str, default: Any) -> Any:
    """Return the type of a setting that is no container, told by its name: no check vouches for itself."""
    if name in CONTAINERS:
        return object
    if name in WHOLE or name.endswith("_bytes"):
        return int
    if name == "weight" or name.endswith("_s"):
        return float
    return bool if isinstance(default, bool) else str


def targets(config: plexus_lite.Config, model: str, api: str = "responses") -> List[Tuple[str, str, str]]:
    found = plexus_lite.targets_of(config, model, api)
    return [(target.provider.name, target.base_url, target.model) for target in found]


class ConfigTest(unittest.TestCase):
    def assertRefused(self, value: Any, start: str, *parts: str) -> str:
        """Assert that *value* is refused in one line that begins with *start* and has all *parts*; return it."""
        with self.assertRaises(plexus_lite.ConfigError) as caught:
            plexus_lite.parse_config(value)
        return self.assertLine(str(caught.exception), start, *parts)

    def assertLine(self, message: str, start: str, *parts: str) -> str:
        self.assertEqual(message.splitlines(), [message], "more than one line")
        self.assertEqual(message[: len(start)], start)
        for part in parts:
            self.assertIn(part, message)
        return message


class Example(ConfigTest):
    def test_the_contract_s_example_loads_as_it_is(self):
        config = plexus_lite.parse_config(plexus_lite.expand_variables(json.loads(EXAMPLE), VARIABLES))
        self.assertEqual((config.host, config.port), ("127.0.0.1", 4000))
        self.assertEqual((config.keys["team-a"].secret, config.keys["team-a"].models), ("sk-team-a", ("gpt-5.4",)))
        clawbay, vllm = config.providers["clawbay-direct"], config.providers["vllm"]
        self.assertEqual((clawbay.name, clawbay.api_key), ("clawbay-direct", "sk-clawbay"))
        self.assertEqual((vllm.api_key, vllm.ca_file), (None, "/etc/pki/site-ca.pem"))
        found = plexus_lite.targets_of(config, "coder", "responses")
        self.assertEqual(
            [(target.provider, target.base_url, target.model, target.weight, target.group) for target in found],
            [
                (vllm, "http://gpu1:8000/v1", "qwen3-coder", 1, 1),
                (vllm, "http://gpu2:8000/v1", "qwen3-coder", 1, 1),
                (clawbay, "https://api.theclawbay.com/backend-api/codex", "gpt-5.4", 1, 2),
            ],
        )
        self.assertEqual(targets(config, "gpt-5.4", "chat"), [])
        self.assertEqual(sorted(plexus_lite.model_list(config)), ["coder", "gpt-5.4", "qwen3-coder"])

    def test_defaults_are_those_of_the_contract(self):
        config = plexus_lite.parse_config(DOCUMENT)
        contract = {
            "max_body_bytes": 100 * 1024**2,
            "max_buffered_bytes": 1024**3,
            "max_connections": 1024,
            "header_timeout_s": 15,
            "body_timeout_s": 60,
            "connect_timeout_s": 10,
            "first_byte_timeout_s": 600,
            "idle_timeout_s": 300,
            "stall_timeout_s": 300,
            "client_idle_s": 75,
            "pool_idle_s": 60,
            "drain_s": 30,
            "keepalive_s": 15,
            "pin_idle_s": 1800,
        }
        self.assertEqual({name: getattr(config.limits, name) for name in contract}, contract)
        self.assertEqual((config.host, config.port, config.allow_anonymous), ("127.0.0.1", 4000, False))
        provider = config.providers["up"]
        self.assertEqual((provider.auth, provider.enabled, provider.wait_on_429_s), ("key", True, 0))
        self.assertEqual(provider.session_headers, ("session_id", "session-id"))
        self.assertEqual((provider.affinity_headers, provider.headers), ((), ()))
        self.assertEqual(provider.account_name(), "up")


class EveryKey(ConfigTest):
    """Loops over the settings: a new key is tested without a word here."""

    def test_an_unknown_key_is_refused_at_every_level_and_the_allowed_ones_are_listed(self):
        for cls, where, path in LEVELS:
            allowed = ", ".join(sorted(row.name for row in rows_of(cls)))
            with self.subTest(cls.__name__):
                full = f"{path}.surprise" if path else "surprise"
                message = self.assertRefused(document(where, surprise=1), full + ": ")
                self.assertEqual(message, f"{full}: unknown key; allowed: {allowed}")

    def test_a_key_in_another_case_or_with_a_space_is_unknown(self):
        for key in ("Models", "models ", "api-key", "apikey", "name", "__class__", ""):
            with self.subTest(key):
                self.assertRefused(document(("providers", "up"), **{key: "x"}), f"providers.up.{key}: unknown key")

    def test_unknown_keys_inside_api_base_url_and_models(self):
        self.assertRefused(
            document(("providers", "up"), api_base_url={"responses": "http://up", "respones": "http://up"}),
            "providers.up.api_base_url.respones: unknown key; allowed: chat, responses",
        )
        self.assertRefused(
            document(("providers", "up"), models={"gpt": {"acces_via": ["chat"]}}),
            "providers.up.models.gpt.acces_via: unknown key; allowed: access_via",
        )

    def test_a_required_key_that_is_missing_is_named(self):
        for _, where, path, row in settings():
            if row.setting.default is plexus_lite.REQUIRED:
                whole = document()
                place: Any = whole
                for step in where:
                    place = place[step]
                del place[row.name]
                with self.subTest(path):
                    self.assertRefused(whole, path + ": missing")

    def test_a_value_of_another_type_is_refused_with_what_was_expected_and_found(self):
        kinds_of = {bool: ("a flag",), int: ("a number",), float: ("a number",), str: ("a string",)}
        seen = 0
        for _, where, path, row in settings():
            # Of the containers every kind of container is tried elsewhere; here, what is none.
            good = kinds_of.get(row.hint, ("a string", "a list", "an object"))
            for kind, value in JSON_KINDS:
                if kind in good:
                    continue
                with self.subTest(path, kind=kind):
                    message = self.assertRefused(document(where, **{row.name: value}), path + ": expected ")
                    if row.name not in SECRETS:
                        self.assertIn(f", found {plexus_lite.describe(value)}", message)
                    seen += 1
        self.assertGreater(seen, 100)

    def test_no_value_of_any_kind_gets_past_the_checks_as_another_exception(self):
        values = [value for _, value in JSON_KINDS]
        values += ["", "\0", "\udc80", "x" * 5000, -1, 0, 1.5, 10**400, float("inf"), float("nan"), [], {}, {"": {}}]
        values += [[None], ["x", "x"], [{}], {"responses": []}, {"responses": [5]}, {"x": {"access_via": [None]}}]
        for _, where, path, row in settings():
            for value in values:
                with self.subTest(path, value=repr(value)[:40]):
                    try:
                        plexus_lite.parse_config(document(where, **{row.name: value}))
                    except plexus_lite.ConfigError as error:
                        self.assertLine(str(error), "")

    def test_numbers_have_bounds_and_no_other_spelling(self):
        for _, where, path, row in settings():
            hint = row.hint
            if hint not in (int, float):
                continue
            rows = [("negative", -1), ("huge", 2**60), ("a string", "5"), ("infinite", float("inf"))]
            rows += [("not a number", float("nan")), ("true", True)] + ([("a fraction", 5.5)] if hint is int else [])
            for name, value in rows:
                with self.subTest(path, value=name):
                    whole = hint is int
                    wanted = f"{path}: expected a{' whole' if whole else ''} number from "
                    self.assertRefused(document(where, **{row.name: value}), wanted, ", found ")

    def test_an_empty_string_is_refused_everywhere(self):
        for _, where, path, row in settings():
            if row.hint is str:
                with self.subTest(path):
                    self.assertRefused(document(where, **{row.name: ""}), path + ": expected ")

    def test_bounds_are_allowed_values(self):
        rows: Sequence[Tuple[str, Sequence[Step], str, Any]] = (
            ("lowest port", (), "port", 0),
            ("highest port", (), "port", 65535),
            ("lowest group", ("models", "alias", "targets", 0), "group", 1),
            ("a fraction as a weight", ("models", "alias", "targets", 0), "weight", 0.001),
            ("a fraction as a time", ("limits",), "connect_timeout_s", 0.25),
            ("one worker", (), "workers", 1),
            ("many workers", (), "workers", 64),
        )
        for name, where, key, value in rows:
            with self.subTest(name):
                place: Any = plexus_lite.parse_config(document(where, **{key: value}))
                for step in where:
                    place = getattr(place, step) if isinstance(step, str) and hasattr(place, step) else place[step]
                self.assertEqual(getattr(place, key), value)
        self.assertRefused(document((), port=65536), "port: ", "65536")

    def test_workers_are_a_number_or_auto(self):
        self.assertEqual(plexus_lite.parse_config(DOCUMENT).workers, 1)
        self.assertEqual(plexus_lite.parse_config(document((), workers="auto")).workers, "auto")
        for value in (0, -1, 1.5, "2", "Auto", True, [1]):
            with self.subTest(repr(value)):
                self.assertRefused(document((), workers=value), "workers: expected ", "auto")

    def test_zero_means_none_only_where_the_contract_says_so(self):
        may_be_zero = {"port", "limits.drain_s", "limits.keepalive_s", "providers.up.wait_on_429_s"}
        for _, where, path, row in settings():
            if row.hint in (int, float):
                with self.subTest(path):
                    if path in may_be_zero:
                        plexus_lite.parse_config(document(where, **{row.name: 0}))
                    else:
                        self.assertRefused(document(where, **{row.name: 0}), path + ": expected ")

    def test_the_reference_has_each_key_once_with_default_and_description(self):
        reference = plexus_lite.render_reference()
        prefixes = ("", "keys.NAME.", "providers.NAME.", "models.NAME.", "models.NAME.targets[].", "limits.")
        for (cls, _, _), prefix in zip(LEVELS, prefixes):
            for row in rows_of(cls):
                with self.subTest(prefix + row.name):
                    lines = [line for line in reference.splitlines() if line.split()[0] == prefix + row.name]
                    self.assertEqual(len(lines), 1)
                    self.assertIn(row.setting.text, lines[0])
        self.assertIn("(15)", reference)
        self.assertIn("(required)", reference)


class Lines(ConfigTest):
    def test_messages_stay_one_line_whatever_stands_in_a_name(self):
        bad = "two\nlines\r\x1b[2J"
        rows = (
            ("unknown key", document((), **{bad: 1})),
            ("unknown key of a limit", document(("limits",), **{bad: 1})),
            ("name of a provider", document(("providers",), **{bad: {"models": 5}})),
            ("name of a key", document(("keys",), **{bad: {}})),
            ("name of an alias", document(("models",), **{bad: {"targets": []}})),
            ("model of a provider", document(("providers", "up"), models={bad: 5})),
            ("header name", document(("providers", "up"), headers={bad: "x"})),
            ("target's provider", document(("models", "alias", "targets", 0), provider=bad)),
            ("target's model", document(("models", "alias", "targets", 0), model=bad)),
            ("model of a key", document(("keys", "team"), models=[bad])),
            ("host", document((), host=bad, keys={})),
            ("a value", document((), port=bad)),
        )
        for name, value in rows:
            with self.subTest(name):
                with self.assertRaises(plexus_lite.ConfigError) as caught:
                    plexus_lite.parse_config(value)
                self.assertNotRegex(str(caught.exception), r"[\x00-\x1f\x7f]")

    def test_what_was_found_is_shown_as_it_is_unless_it_could_move_a_terminal(self):
        for value, wanted in (
            ("m\u00f6del", '"m\u00f6del"'),
            ('a"b\\', '"a\\"b\\\\"'),
            ("two\nlines\x1b[2J", '"two\\nlines\\u001b[2J"'),
            ("\x7f\x85\x9b2J\u2028\u202e\udc80", '"\\x7f\\x85\\x9b2J\\u2028\\u202e\\udc80"'),
        ):
            with self.subTest(wanted):
                self.assertEqual(plexus_lite.describe(value), wanted)

    def test_long_values_are_cut(self):
        message = self.assertRefused(document((), port="x" * 5000), "port: expected ")
        self.assertLess(len(message), 200)


class Values(unittest.TestCase):
    """What the classes of the configuration have in common."""

    def test_they_never_change(self):
        limits = plexus_lite.Limits(drain_s=1)
        for name in ("drain_s", "nonesuch"):
            with self.assertRaises(AttributeError):
                setattr(limits, name, 2)
        self.assertEqual(limits.drain_s, 1)

    def test_a_copy_has_the_changes_and_the_rest(self):
        provider = plexus_lite.parse_config(DOCUMENT).providers["up"]
        other = provider._replace(account="shared")
        self.assertEqual(
            (provider.account, other.account, other.name, other.models),
            (None, "shared", "up", {"gpt": ("responses", "chat")}),
        )
        self.assertEqual(other._replace(account=None), provider)
        self.assertNotEqual(other, provider)
        with self.assertRaises(TypeError):
            hash(provider)

    def test_equal_members_are_not_enough_across_classes(self):
        self.assertNotEqual(plexus_lite.Tls("a"), plexus_lite.Key("a"))
        self.assertEqual(plexus_lite.Key("a"), plexus_lite.Key("a"))


class Secrets(ConfigTest):
    def test_secrets_stand_in_no_repr(self):
        config = plexus_lite.parse_config(
            {
                "keys": {"team": {"secret": "SECRET-1"}},
                "providers": {
                    "up": {
                        "api_base_url": "http://up/v1",
                        "models": ["m"],
                        "api_key": "SECRET-2",
                        "headers": {"X-Token": "SECRET-3"},
                    }
                },
            }
        )
        target = plexus_lite.targets_of(config, "m", "responses")[0]
        shown = repr(config) + str(config) + repr(config.keys) + repr(config.providers) + repr(target) + target.id
        self.assertNotIn("SECRET", shown)
        self.assertIn("http://up/v1", shown)
        self.assertEqual(config.keys["team"].secret, "SECRET-1")
        self.assertEqual(config.providers["up"].headers, (("X-Token", "SECRET-3"),))

    def test_a_refused_secret_is_not_shown(self):
        rows: Sequence[Tuple[str, Sequence[Step], str, Any]] = (
            ("keys.team.secret", ("keys", "team"), "secret", "SECRET with a space"),
            ("keys.team.secret", ("keys", "team"), "secret", "SECRET\n"),
            ("keys.team.secret", ("keys", "team"), "secret", ""),
            ("keys.team.secret", ("keys", "team"), "secret", ["SECRET"]),
            ("keys.team.secret", ("keys", "team"), "secret", "file:"),
            ("providers.up.api_key", ("providers", "up"), "api_key", "SECRET-\u00e9"),
            ("providers.up.headers.X-Token", ("providers", "up"), "headers", {"X-Token": "SECRET\r\nX: y"}),
            ("providers.up.headers.X-Token", ("providers", "up"), "headers", {"X-Token": ["SECRET"]}),
            ("providers.up.api_base_url", ("providers", "up"), "api_base_url", "https://user:SECRET@host/v1"),
            ("keys", (), "keys", "SECRET"),
            ("keys.team", ("keys",), "team", "SECRET"),
            ("providers.up.headers", ("providers", "up"), "headers", "X-Token: SECRET"),
        )
        for path, where, name, value in rows:
            with self.subTest(path, value=value):
                message = self.assertRefused(document(where, **{name: value}), path + ": ")
                self.assertNotIn("SECRET", message)

    def test_two_keys_with_one_secret_cannot_be_told_apart(self):
        keys = {"a": {"secret": "SECRET"}, "b": {"secret": "SECRET"}}
        message = self.assertRefused(document((), keys=keys), "keys.a.secret: ", "keys.b")
        self.assertNotIn("SECRET", message)

    def test_a_secret_that_is_another_with_a_label_is_refused(self):
        """SECRET:b would be key a with the label b, or key b, whichever stands first in the file."""
        for order in (("a", "b"), ("b", "a")):
            secrets = {"a": {"secret": "SECRET"}, "b": {"secret": "SECRET:b"}}
            keys = {name: secrets[name] for name in order}
            message = self.assertRefused(document((), keys=keys), "keys.b.secret: ", "keys.a")
            self.assertNotIn("SECRET", message)


class Keys(ConfigTest):
    def test_a_key_may_name_models_aliases_and_names_behind_a_wildcard(self):
        value = document(("keys", "team"), models=["gpt", "alias"])
        self.assertEqual(plexus_lite.parse_config(value).keys["team"].models, ("gpt", "alias"))
        value["providers"]["up"]["models"] = ["*", "gpt"]
        value["keys"]["team"]["models"] = ["anything", "direct/up/anything"]
        self.assertEqual(plexus_lite.parse_config(value).keys["team"].models, ("anything", "direct/up/anything"))

    def test_without_a_list_a_key_may_use_all_and_with_an_empty_one_none(self):
        self.assertIsNone(plexus_lite.parse_config(DOCUMENT).keys["team"].models)
        self.assertEqual(plexus_lite.parse_config(document(("keys", "team"), models=[])).keys["team"].models, ())

    def test_a_model_that_does_not_exist_is_refused_with_those_that_do(self):
        self.assertRefused(
            document(("keys", "team"), models=["gpt", "gtp"]), "keys.team.models[1]: ", "gtp", "alias", "gpt"
        )

    def test_names_must_not_be_empty(self):
        self.assertRefused(document((), keys={"": {"secret": "x"}}), "keys: ", "not empty")
        self.assertRefused(document((), models={"": {"targets": []}}), "models: ", "not empty")
        self.assertRefused(document((), providers={"": {}}), "providers: ", "not empty")

    def test_there_must_be_a_provider(self):
        self.assertRefused(document((), providers={}), "providers: ", "at least one")


class Listening(ConfigTest):
    def test_without_keys_only_loopback_is_listened_on(self):
        loopback: Sequence[str] = (
            "127.0.0.1",
            "127.9.8.7",
            "::1",
            "localhost",
            "LocalHost",
            "localhost.",
            "gate.localhost",
        )
        others = ["0.0.0.0", "::", "192.168.1.5", "gate.example", "localhost.example", "127.0.0.1.example"]
        others += ["1270.0.0.1", "128.0.0.1", "localhost:4000", "notlocalhost", "fe80::1"]
        for host in loopback:
            with self.subTest(host):
                self.assertEqual(plexus_lite.parse_config(document((), host=host, keys={})).host, host)
        for host in others:
            with self.subTest(host):
                value = document((), host=host, keys={})
                self.assertRefused(value, "host: ", host, "loopback", "keys", "allow_anonymous")
                del value["keys"]
                self.assertRefused(value, "host: ")
                value["allow_anonymous"] = True
                self.assertEqual(plexus_lite.parse_config(value).host, host)
                self.assertEqual(plexus_lite.parse_config(document((), host=host)).host, host)  # with a key


class BaseUrls(ConfigTest):
    def test_all_three_forms(self):
        rows: Sequence[Tuple[str, Any, Dict[str, Tuple[str, ...]]]] = (
            ("a string", "https://host/v1", {"responses": ("https://host/v1",)}),
            ("replicas", ["http://a:1/v1", "http://b:1/v1"], {"responses": ("http://a:1/v1", "http://b:1/v1")}),
            ("one API", {"chat": "http://a"}, {"chat": ("http://a",)}),
            (
                "two APIs",
                {"responses": ["http://a", "http://b"], "chat": "http://c"},
                {"responses": ("http://a", "http://b"), "chat": ("http://c",)},
            ),
            ("a slash at the end", "http://[::1]:8000/v1/", {"responses": ("http://[::1]:8000/v1",)}),
            ("a scheme in capitals", "HTTPS://host/v1", {"responses": ("https://host/v1",)}),
            ("demo", "demo://", {"responses": ("demo://",)}),
        )
        for name, given, wanted in rows:
            with self.subTest(name):
                value = document(("providers", "up"), api_base_url=given)
                self.assertEqual(dict(plexus_lite.parse_config(value).providers["up"].api_base_url), wanted)

    def test_what_is_no_base_url(self):
        rows: Sequence[Tuple[str, Any]] = (
            ("no scheme", "host:8000/v1"),
            ("no scheme, a path", "/v1"),
            ("another scheme", "ftp://host/v1"),
            ("a file", "file:///etc/passwd"),
            ("no host", "https:///v1"),
            ("nothing but a scheme", "https://"),
            ("port too large", "http://host:65536/v1"),
            ("port 0", "http://host:0/v1"),
            ("port of letters", "http://host:http/v1"),
            ("a space", "http://host/v 1"),
            ("CR LF", "http://host/v1\r\nX: y"),
            ("not ASCII", "http://h\u00f6st/v1"),
            ("a query", "http://host/v1?key=x"),
            ("a fragment", "http://host/v1#x"),
            ("a user", "http://user@host/v1"),
            ("bracket not closed", "http://[::1/v1"),
            ("bracket not opened", "http://::1]/v1"),
            ("a label of the host is empty", "http://a..b/v1"),
            ("a label of the host is too long", f"http://{'a' * 64}/v1"),
            ("empty", ""),
            ("demo with more", "demo://x"),
        )
        for name, url in rows:
            with self.subTest(name):
                self.assertRefused(document(("providers", "up"), api_base_url=url), "providers.up.api_base_url")
            with self.subTest(name, where="replicas"):
                value = document(("providers", "up"), api_base_url={"chat": ["http://a", url]})
                self.assertRefused(value, "providers.up.api_base_url.chat[1]")

    def test_no_url_and_one_url_twice(self):
        for name, urls in (("none", []), ("no API", {}), ("none for an API", {"chat": []})):
            with self.subTest(name):
                value = document(("providers", "up"), api_base_url=urls)
                self.assertRefused(value, "providers.up.api_base_url", "at least one")
        wanted = "providers.up.api_base_url: expected a base URL, or a list of at least one, found 5"
        self.assertRefused(document(("providers", "up"), api_base_url=5), wanted)
        twice = document(("providers", "up"), api_base_url=["http://a/v1", "http://a/v1/"])
        self.assertRefused(twice, "providers.up.api_base_url: ", "twice")

    def test_apis_do_not_nest(self):
        for urls in ({"responses": {"chat": "http://a"}}, {"chat": {"responses": "http://a"}}):
            with self.subTest(urls):
                value = document(("providers", "up"), api_base_url=urls)
                self.assertRefused(value, f"providers.up.api_base_url.{next(iter(urls))}: ", "found an object")

    def test_the_demo_upstream_speaks_one_api(self):
        value = document(("providers", "up"), api_base_url={"responses": "demo://", "chat": "demo://"})
        self.assertRefused(value, "providers.up.api_base_url.chat: ", "demo://")


class HeaderSettings(ConfigTest):
    def test_static_headers_are_kept_in_order(self):
        value = document(("providers", "up"), headers={"X-B": "1", "x-a": "two words", "Host": "other.example"})
        expected = (("X-B", "1"), ("x-a", "two words"), ("Host", "other.example"))
        self.assertEqual(plexus_lite.parse_config(value).providers["up"].headers, expected)

    def test_headers_that_would_break_a_message_are_refused(self):
        rows = (
            ("CR LF in a value", "X-A", "x\r\nX-B: y"),
            ("LF in a value", "X-A", "x\ny"),
            ("NUL in a value", "X-A", "x\0y"),
            ("space before a value", "X-A", " x"),
            ("space behind a value", "X-A", "x "),
            ("no value", "X-A", ""),
            ("not ASCII", "X-A", "\u00e4"),
            ("a number", "X-A", 5),
            ("space in a name", "X A", "x"),
            ("colon in a name", "X-A:", "x"),
            ("CR LF in a name", "X-A\r\nX-B", "x"),
            ("Connection", "Connection", "close"),
            ("transfer-encoding", "transfer-encoding", "chunked"),
            ("Content-Length", "Content-Length", "5"),
            ("TE", "TE", "trailers"),
            ("Upgrade", "Upgrade", "h2c"),
            ("Proxy-Authorization", "Proxy-Authorization", "x"),
        )
        for name, field, value in rows:
            with self.subTest(name):
                self.assertRefused(document(("providers", "up"), headers={field: value}), "providers.up.headers.")

    def test_the_same_header_in_two_cases_is_refused(self):
        value = document(("providers", "up"), headers={"X-A": "1", "x-a": "2"})
        self.assertRefused(value, "providers.up.headers: ", "twice")

    def test_session_headers_are_the_two_spellings(self):
        value = document(("providers", "up"), session_headers=["session-id"])
        self.assertEqual(plexus_lite.parse_config(value).providers["up"].session_headers, ("session-id",))
        value = document(("providers", "up"), session_headers=["session-id", "Session-Id"])
        self.assertRefused(value, "providers.up.session_headers[1]: ", '"session_id"', '"session-id"', '"Session-Id"')

    def test_affinity_headers_are_header_names(self):
        value = document(("providers", "up"), affinity_headers=["x-session-affinity", "x y"])
        self.assertRefused(value, "providers.up.affinity_headers[1]: ", '"x y"')
        for name in ("Authorization", "x-api-key", "Cookie", "OpenAI-Project", "Host", "accept-encoding"):
            with self.subTest(name):
                value = document(("providers", "up"), affinity_headers=[name])
                self.assertRefused(value, "providers.up.affinity_headers[0]: ", f"{name} has a value of its own")

    def test_auth_is_one_of_two(self):
        self.assertRefused(
            document(("providers", "up"), auth="none"), "providers.up.auth: ", '"key"', '"passthrough"', '"none"'
        )


class Models(ConfigTest):
    def fleet(self, **changes: Any) -> plexus_lite.Config:
        """Four providers: a replicated one, one with both APIs and a wildcard, one disabled, one for chat alone."""
        providers = {
            "farm": {"api_base_url": ["http://f1/v1", "http://f2/v1"], "models": ["qwen", "shared"]},
            "wide": {
                "api_base_url": {"responses": "http://w/v1", "chat": "http://w/chat"},
                "models": {"*": {}, "shared": {"access_via": ["chat"]}, "both": {"access_via": ["responses", "chat"]}},
            },
            "off": {"api_base_url": "http://off/v1", "models": ["gone", "shared"], "enabled": False},
            "talk": {"api_base_url": {"chat": "http://t/v1"}, "models": {"say": {}, "mute": {"access_via": []}}},
        }
        return plexus_lite.parse_config(dict({"providers": providers}, **changes))

    def test_which_targets_a_model_means(self):
        farm = [("farm", "http://f1/v1"), ("farm", "http://f2/v1")]
        wide, chat, talk = [("wide", "http://w/v1")], [("wide", "http://w/chat")], [("talk", "http://t/v1")]
        aliases = {
            "coder": {
                "targets": [
                    {"provider": "wide", "model": "gpt"},
                    {"provider": "farm", "model": "qwen", "enabled": False},
                    {"provider": "off", "model": "gone"},
                ]
            },
            "qwen": {"targets": [{"provider": "wide", "model": "elsewhere"}]},
            "nowhere": {"targets": [{"provider": "off", "model": "gone"}]},
        }
        rows: Sequence[Tuple[str, str, str, List[Tuple[str, str]], Optional[str]]] = (
            ("an alias, without what is off", "coder", "responses", wide, "gpt"),
            ("an alias over chat", "coder", "chat", chat, "gpt"),
            ("an alias wins over a provider's model", "qwen", "responses", wide, "elsewhere"),
            ("an alias whose targets are all off", "nowhere", "responses", [], None),
            ("replicas, each a target of its own", "direct/farm/qwen", "responses", farm, "qwen"),
            ("direct past the alias", "direct/wide/qwen", "responses", wide, "qwen"),
            ("direct to a model with a slash", "direct/wide/org/model", "responses", wide, "org/model"),
            ("direct to a model that is not there", "direct/farm/gpt", "responses", [], None),
            ("direct to a provider that is off", "direct/off/gone", "responses", [], None),
            ("several providers, access_via left out one", "shared", "responses", farm, "shared"),
            ("several providers, of which one has chat", "shared", "chat", chat, "shared"),
            ("access_via both, over chat", "both", "chat", chat, "both"),
            ("wildcard: a name that nobody names", "new", "responses", wide, "new"),
            ("wildcard: not for a name that an idle provider has", "gone", "responses", [], None),
            ("the star itself is no model", "*", "responses", [], None),
            ("no API at all", "mute", "chat", [], None),
            ("chat alone", "say", "chat", talk, "say"),
            ("chat alone, asked for responses", "say", "responses", [], None),
            ("another case is another name", "SAY", "chat", chat, "SAY"),
        )
        config = self.fleet(models=aliases)
        for name, model, api, places, upstream_model in rows:
            with self.subTest(name):
                wanted = [(provider, url, upstream_model) for provider, url in places]
                self.assertEqual(targets(config, model, api), wanted)

    def test_without_a_wildcard_an_unknown_name_means_nothing(self):
        self.assertEqual(targets(plexus_lite.parse_config(DOCUMENT), "unknown"), [])

    def test_the_list_has_what_can_be_reached_and_no_star(self):
        names = plexus_lite.model_list(self.fleet())
        self.assertEqual(sorted(names), ["both", "qwen", "say", "shared"])
        self.assertEqual(len(names), len(set(names)))

    def test_weight_and_group_reach_the_target(self):
        alias = {"targets": [{"provider": "up", "model": "gpt", "weight": 2.5, "group": 3}]}
        config = plexus_lite.parse_config(document((), models={"alias": alias}))
        target = plexus_lite.targets_of(config, "alias", "responses")[0]
        self.assertEqual((target.weight, target.group), (2.5, 3))

    def test_weight_and_group_are_1_unless_they_are_set(self):
        for model in ("alias", "gpt", "direct/up/gpt"):
            target = plexus_lite.targets_of(plexus_lite.parse_config(DOCUMENT), model, "responses")[0]
            self.assertEqual((target.weight, target.group), (1, 1), model)

    def test_where_earlier_responses_may_be(self):
        config = self.fleet()
        rows: Sequence[Tuple[str, Optional[Sequence[str]], List[str]]] = (
            ("a key for all models", None, ["http://f1/v1", "http://f2/v1", "http://w/v1"]),
            ("a key for one", ["qwen"], ["http://f1/v1", "http://f2/v1"]),
            ("a key for two", ["qwen", "both"], ["http://f1/v1", "http://f2/v1", "http://w/v1"]),
            ("each place once", ["qwen", "shared"], ["http://f1/v1", "http://f2/v1"]),
            ("a key for chat alone", ["say"], []),
            ("a key for nothing", [], []),
        )
        for name, models, wanted in rows:
            with self.subTest(name):
                self.assertEqual([place.base_url for place in plexus_lite.places_of(config, models)], wanted)

    def test_replicas_have_ids_of_their_own(self):
        found = plexus_lite.targets_of(self.fleet(), "qwen", "responses")
        self.assertEqual(len({target.id for target in found}), 2)

    def test_an_alias_that_leads_nowhere_is_refused_with_what_there_is(self):
        where = ("models", "alias", "targets", 0)
        path = "models.alias.targets[0]"
        self.assertRefused(document(where, provider="pu"), f"{path}.provider: ", "pu", "there are: up")
        self.assertRefused(document(where, model="gtp"), f"{path}.model: ", "gtp", "gpt")
        self.assertRefused(document(("models", "alias"), targets=[]), "models.alias.targets: ", "at least one")
        value = document(where, model="anything")
        value["providers"]["up"]["models"] = ["*"]
        self.assertEqual(targets(plexus_lite.parse_config(value), "alias"), [("up", "http://up/v1", "anything")])

    def test_an_alias_of_an_alias_is_refused(self):
        value = document(("models",), second={"targets": [{"provider": "up", "model": "alias"}]})
        self.assertRefused(value, "models.second.targets[0].model: ")

    def test_access_via_is_a_list_of_apis(self):
        value = document(("providers", "up"), models={"gpt": {"access_via": ["responses", "completions"]}})
        self.assertRefused(value, "providers.up.models.gpt.access_via[1]: ", '"responses"', '"chat"', '"completions"')
        value = document(("providers", "up"), models={"gpt": {"access_via": "responses"}})
        self.assertRefused(value, "providers.up.models.gpt.access_via: ", "list")

    def test_account_is_the_provider_unless_it_is_named(self):
        self.assertEqual(plexus_lite.parse_config(DOCUMENT).providers["up"].account_name(), "up")
        named = plexus_lite.parse_config(document(("providers", "up"), account="shared"))
        self.assertEqual(named.providers["up"].account_name(), "shared")


class Variables(ConfigTest):
    def test_what_a_string_becomes(self):
        rows = (
            ("a whole string", "${A}", "alpha"),
            ("inside a string", "x${A}y${B}z", "xalphaybetaz"),
            ("twice", "${A}${A}", "alphaalpha"),
            ("default not needed", "${A:-other}", "alpha"),
            ("default needed", "${C:-other}", "other"),
            ("default for an empty one", "${EMPTY:-other}", "other"),
            ("empty default", "${C:-}", ""),
            ("empty and no default", "${EMPTY}", ""),
            ("a default with everything but }", "${C:-http://h:1/v1?a=$b{c:-d}", "http://h:1/v1?a=$b{c:-d"),
            ("no braces", "$A", "$A"),
            ("a value is not expanded again", "${NESTED}", "${A}"),
        )
        variables = {"A": "alpha", "B": "beta", "EMPTY": "", "NESTED": "${A}"}
        for name, given, wanted in rows:
            with self.subTest(name):
                self.assertEqual(plexus_lite.expand_variables(given, variables), wanted)

    def test_what_only_looks_like_a_variable_is_refused(self):
        """It would leave as a credential, as it stands there."""
        for given in ("${A-d}", "${}", "${A", "${A:-${B}}", "x ${1A}", "${A }", "${A:?no}"):
            with self.subTest(given), self.assertRaises(plexus_lite.ConfigError) as caught:
                plexus_lite.expand_variables({"api_key": given}, {"A": "alpha", "B": "beta"})
            self.assertLine(str(caught.exception), "api_key: expected ${NAME} or ${NAME:-default}")

    def test_strings_at_any_depth_and_nothing_else(self):
        value: Dict[str, Any] = {"a": ["${A}", {"${A}": "${A}"}], "b": [True, None, 5, 1.5]}
        wanted = {"a": ["alpha", {"${A}": "alpha"}], "b": [True, None, 5, 1.5]}
        self.assertEqual(plexus_lite.expand_variables(value, {"A": "alpha"}), wanted)
        self.assertEqual(value["a"][0], "${A}", "the argument was changed")

    def test_a_variable_that_is_not_set_is_named_with_its_place(self):
        value = {"providers": {"up": {"api_base_url": ["http://a", "${UP_URL}"]}}}
        with self.assertRaises(plexus_lite.ConfigError) as caught:
            plexus_lite.expand_variables(value, {"up_url": "x"})
        self.assertLine(str(caught.exception), "providers.up.api_base_url[1]: ", "UP_URL", ":-")


class Files(ConfigTest):
    """read_config: from bytes to Config."""

    def read(self, content: Optional[bytes], **options: Any) -> plexus_lite.Config:
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "config.json")
            if content is not None:
                with open(path, "wb") as file:
                    file.write(content)
            return plexus_lite.read_config(path, argparse.Namespace(**dict({"host": None, "port": None}, **options)))

    def test_the_contract_s_example_with_the_environment_s_variables(self):
        with mock.patch.dict(os.environ, VARIABLES):
            self.assertEqual(self.read(EXAMPLE.encode()).keys["team-a"].secret, "sk-team-a")

    def test_a_byte_order_mark_is_no_reason_to_stop(self):
        self.assertEqual(self.read(b"\xef\xbb\xbf" + json.dumps(DOCUMENT).encode()).port, 4000)

    def test_host_and_port_give_way_to_the_options_before_anything_is_checked(self):
        content = json.dumps(document((), host="0.0.0.0", port=1, keys={})).encode()
        config = self.read(content, host="127.0.0.1", port=0)
        self.assertEqual((config.host, config.port), ("127.0.0.1", 0))
        content = json.dumps(document((), keys={})).encode()
        with self.assertRaises(plexus_lite.ConfigError) as caught:
            self.read(content, host="0.0.0.0")
        self.assertLine(str(caught.exception), "host: ", "allow_anonymous")

    def test_host_and_port_of_the_file_must_be_right_even_if_they_give_way(self):
        for name, wrong in (("host", 5), ("port", "4000"), ("port", True), ("port", None), ("port", 70000)):
            with self.subTest(name, wrong=wrong), self.assertRaises(plexus_lite.ConfigError) as caught:
                self.read(json.dumps(document((), **{name: wrong})).encode(), host="127.0.0.1", port=0)
            self.assertLine(str(caught.exception), f"{name}: expected ", f"found {json.dumps(wrong)}")

    def test_what_is_wrong_with_a_file_is_one_line(self):
        good = json.dumps(DOCUMENT)
        rows: Sequence[Tuple[str, Optional[bytes], Sequence[str]]] = (
            ("no file", None, ("no such file", "init")),
            ("empty", b"", ("line 1 column 1",)),
            ("white space", b" \n\t", ("line 2 column 2",)),
            ("not UTF-8", b'{\n"host": "\xff"}', ("0xff is not UTF-8: line 2 column 10",)),
            ("UTF-16", good.encode("utf-16"), ("is not UTF-8: line 1 column 1",)),
            ("a comma too much", b'{\n  "port": 1,\n}', ("line ", " column ")),  # 3.13 points at the comma
            ("a comment", b'{\n  // no\n  "port": 1\n}', ("line 2 column 3",)),
            ("cut off", good[:-1].encode(), ("line 1 column ",)),
            ("trailing text", good.encode() + b" x", ("line 1 column ",)),
            ("a key twice", b'{"port": 1, "port": 2}', ('"port"', "twice")),
            ("a key twice, deep", b'{"providers": {"up": {"models": [], "models": []}}}', ('"models"', "twice")),
            ("NaN", b'{"port": NaN}', ("NaN is no JSON: line 1 column 10",)),
            ("Infinity", b'{\n"port": -Infinity}', ("-Infinity is no JSON: line 2 column 9",)),
            (
                "a number without end",
                b'{"port": ' + b"9" * 5000 + b"}",
                ("a number has too many digits: line 1 column 10",),
            ),
            ("nested without end", b'{"port": ' + b"[" * 200000, ("is not valid JSON",)),
            ("nested, to its end", b'{"port": ' + b"[" * 990 + b"]" * 990 + b"}", ("is not valid JSON",)),
            ("a list", b"[]", ("expected an object, found a list",)),
            ("null", b"null", ("expected an object, found null",)),
            ("a missing variable", b'{"host": "${PLEXUS_LITE_UNSET}"}', ("host: ", "PLEXUS_LITE_UNSET")),
        )
        for name, content, parts in rows:
            with self.subTest(name):
                with self.assertRaises(plexus_lite.ConfigError) as caught:
                    self.read(content)
                self.assertLine(str(caught.exception), "", *parts)

    def test_the_command_line_names_file_path_and_what_is_allowed_and_exits_with_2(self):
        provider = {"api_base_urll": "http://up/v1", "models": ["m"]}
        allowed = ", ".join(sorted(row.name for row in rows_of(plexus_lite.Provider)))
        rows = (
            (
                "unknown key",
                json.dumps({"providers": {"clawbay": provider}}),
                f"config.json: providers.clawbay.api_base_urll: unknown key; allowed: {allowed}\n",
            ),
            (
                "syntax",
                '{"port": 1 1}',
                "config.json: is not valid JSON: Expecting ',' delimiter: line 1 column 12 (char 11)\n",
            ),
        )
        for name, text, wanted in rows:
            with self.subTest(name), tempfile.TemporaryDirectory() as folder:
                with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
                    file.write(text)
                done = run_cli("--config", "config.json", cwd=folder)
                self.assertEqual((done.returncode, done.stdout), (plexus_lite.EXIT_USAGE, ""))
                self.assertEqual(done.stderr[: len(wanted)], wanted)
                self.assertEqual(done.stderr.count("\n"), 1)


if __name__ == "__main__":
    unittest.main()
