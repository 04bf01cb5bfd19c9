"""Room 6: which upstream gets a conversation, and that it gets it again after a restart or a failure."""

import json
import os
import subprocess
import sys
import threading
import unittest
from email.utils import formatdate
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import plexus_lite
from tests.support import body_of, clean_environment, make_config

NOTHING = plexus_lite.Snapshot({}, frozenset())
SESSIONS = [f"session-{number}" for number in range(2000)]


def provider(name: str, account: Optional[str] = None) -> plexus_lite.Provider:
    return plexus_lite.Provider(
        api_base_url={"responses": (f"http://{name}/v1",)},
        models={"m": frozenset({"responses"})},
        account=account,
        name=name,
    )


def target(name: str, weight: float = 1, group: int = 1, account: Optional[str] = None) -> plexus_lite.Target:
    return plexus_lite.Target(provider(name, account), f"http://{name}/v1", "m", weight, group)


def fleet_of(*names: str) -> List[plexus_lite.Target]:
    return [target(name) for name in names]


def at(key: str, owner: Optional[str] = None, is_bound: bool = False) -> plexus_lite.Affinity:
    return plexus_lite.Affinity(key, key, owner, is_bound)


def names(plan: plexus_lite.Plan) -> List[str]:
    return [one.provider.name for one in plan.targets]


def ids(*targets: plexus_lite.Target) -> "frozenset[str]":
    return frozenset(one.id for one in targets)


def first(targets: Sequence[plexus_lite.Target], key: str) -> str:
    return plexus_lite.plan_targets(targets, at(key), NOTHING).targets[0].id


class Rendezvous(unittest.TestCase):
    # Pinned: every one of these changing means that each running conversation loses its cache at the upgrade.
    SCORES = {
        "alpha": (0.8461098948847086, 0.9790253656458071, 0.6244105690213254, 0.6131641934010272),
        "beta": (1.6611749316344377, 6.860460079615275, 0.552797286821475, 0.2875406129209172),
        "gamma": (0.8483471184242342, 0.30906794812806365, 0.44211200617784374, 28.933541239846342),
        "\u4f1a\u8bdd": (0.6394197961792162, 4.662540883223423, 1.2165127544340872, 3.8889617505908647),
        "\ud83d": (4.821690136072774, 0.737109025604658, 0.4296746730592049, 0.5099383515082999),
    }
    ORDERS = ("2314", "1243", "2413", "4321", "3412", "1432", "1423", "4231", "4213", "1423", "3124", "3142")

    @staticmethod
    def farm() -> List[plexus_lite.Target]:
        return [plexus_lite.Target(provider("farm"), f"http://farm{number}/v1", "m") for number in range(1, 5)]

    def test_scores_are_the_same_in_every_version(self):
        for key, scores in self.SCORES.items():
            for one, wanted in zip(self.farm(), scores):
                with self.subTest(ascii(key), target=one.id):
                    self.assertAlmostEqual(plexus_lite.rendezvous_score(key, one), wanted, places=9)

    def test_orders_are_the_same_in_every_version(self):
        found = []
        for number in range(len(self.ORDERS)):
            plan = plexus_lite.plan_targets(self.farm(), at(f"s{number}"), NOTHING)
            found.append("".join(one.base_url[len("http://farm")] for one in plan.targets))
        self.assertEqual(tuple(found), self.ORDERS)

    def test_another_process_with_another_hash_seed_chooses_the_same(self):
        program = (
            "import sys; sys.path.insert(0, '.')\n"
            "from tests import test_placement as t\n"
            "print(t.choices(t.Rendezvous.farm()))\n"
        )
        here = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
        environment = dict(clean_environment(), PYTHONHASHSEED=seed)
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=here, env=environment, stdout=subprocess.PIPE, timeout=20, check=True
        )
        self.assertEqual(done.stdout.decode().strip(), choices(self.farm()))

    def test_the_order_of_the_configuration_does_not_count(self):
        farm = self.farm()
        for key in SESSIONS[:200]:
            self.assertEqual(first(farm, key), first(farm[::-1], key))

    def test_the_key_and_each_part_of_a_target_count(self):
        base = target("a")
        others = [
            target("b"),
            plexus_lite.Target(base.provider, "http://other/v1", "m"),
            plexus_lite.Target(base.provider, base.base_url, "n"),
        ]
        scores = {plexus_lite.rendezvous_score("k", one) for one in (base, *others)}
        scores |= {plexus_lite.rendezvous_score(key, base) for key in ("", "K", "k ", "k\0")}
        self.assertEqual(len(scores), 8)

    def test_scores_are_positive_and_finite_for_every_key(self):
        for key in [*SESSIONS, "", "\0", "x" * 100_000]:
            score = plexus_lite.rendezvous_score(key, target("a", weight=0.001))
            self.assertTrue(0 < score < float("inf"))

    def test_removing_one_moves_only_its_sessions_each_to_its_second(self):
        fleet = fleet_of("a", "b", "c", "d", "e")
        for gone in fleet:
            rest = [one for one in fleet if one is not gone]
            moved_to: Dict[str, int] = {}
            for key in SESSIONS:
                order = plexus_lite.plan_targets(fleet, at(key), NOTHING).targets
                after = plexus_lite.plan_targets(rest, at(key), NOTHING).targets
                self.assertEqual(list(after), [one for one in order if one is not gone])
                if order[0] is gone:
                    moved_to[after[0].id] = moved_to.get(after[0].id, 0) + 1
            self.assertEqual(len(moved_to), 4, "all of them went to few")
            self.assertLess(max(moved_to.values()), 2 * min(moved_to.values()))

    def test_adding_one_moves_about_its_share_and_only_to_it(self):
        fleet, new = fleet_of("a", "b", "c", "d"), target("e")
        moved = 0
        for key in SESSIONS:
            before, after = first(fleet, key), first([*fleet, new], key)
            if before != after:
                self.assertEqual(after, new.id)
                moved += 1
        self.assertAlmostEqual(moved / len(SESSIONS), 1 / 5, delta=0.03)

    def test_shares_are_even_without_weights_and_as_the_weights_with_them(self):
        for weights in ((1, 1, 1, 1), (1, 2, 5), (0.5, 1.5), (1000, 1), (1, 1, 10)):
            with self.subTest(weights):
                fleet = [target(f"t{number}", weight) for number, weight in enumerate(weights)]
                chosen = [first(fleet, key) for key in SESSIONS]
                for one in fleet:
                    wanted = one.weight / sum(weights)
                    self.assertAlmostEqual(chosen.count(one.id) / len(SESSIONS), wanted, delta=0.03)

    def test_raising_a_weight_moves_sessions_only_there(self):
        before, after = fleet_of("a", "b", "c"), [target("a"), target("b", 3), target("c")]
        moved = {first(after, key) for key in SESSIONS if first(before, key) != first(after, key)}
        self.assertEqual(moved, {target("b").id})


def choices(targets: Sequence[plexus_lite.Target]) -> str:
    """Return what a process chooses for 50 sessions; compared with what another process prints."""
    return " ".join(first(targets, key) for key in SESSIONS[:50])


class Plans(unittest.TestCase):
    """plan_targets: fleet a, b, c, and a session whose order is known."""

    def setUp(self) -> None:
        self.fleet = fleet_of("a", "b", "c")
        self.order = plexus_lite.plan_targets(self.fleet, at("s"), NOTHING).targets

    def plan(self, *, owner: Optional[str] = None, is_bound: bool = False, **known: Any) -> plexus_lite.Plan:
        known = dict({"open_requests": {}, "cooling": frozenset()}, **known)
        return plexus_lite.plan_targets(self.fleet, at("s", owner, is_bound), plexus_lite.Snapshot(**known))

    def test_one_target_needs_no_reason(self):
        only = target("a")
        snapshot = plexus_lite.Snapshot({only.id: 999}, ids(only), "else")
        plan = plexus_lite.plan_targets([only], at("s", "else", True), snapshot)
        self.assertEqual((plan.targets, plan.reason, plan.home), ((only,), "only", None))

    def test_owner_before_pin_before_hash(self):
        one, two, three = self.order
        rows: Sequence[Tuple[str, Optional[str], Optional[str], Sequence[plexus_lite.Target], str]] = (
            ("hash", None, None, (one, two, three), "rendezvous"),
            ("pin", None, two.id, (two, one, three), "pin"),
            ("owner", three.place, None, (three, one, two), "owner"),
            ("owner and pin", three.place, two.id, (three, one, two), "owner"),
            ("owner is the hash's choice", one.place, two.id, (one, two, three), "owner"),
            ("an owner that is gone", "gone", two.id, (two, one, three), "pin"),
            ("a pin that is gone", None, "gone", (one, two, three), "rendezvous"),
        )
        for name, owner, pin, wanted, reason in rows:
            with self.subTest(name):
                plan = self.plan(owner=owner, pin=pin)
                self.assertEqual((plan.targets, plan.reason, plan.home), (tuple(wanted), reason, one))

    def test_a_cooling_target_is_tried_last_and_not_never(self):
        one, two, three = self.order
        rows: Sequence[Tuple[str, Sequence[plexus_lite.Target], Sequence[plexus_lite.Target]]] = (
            ("the first", (one,), (two, three, one)),
            ("the second", (two,), (one, three, two)),
            ("two", (one, two), (three, one, two)),
            ("all", (one, two, three), (one, two, three)),
        )
        for name, cooling, wanted in rows:
            with self.subTest(name):
                plan = self.plan(cooling=ids(*cooling))
                self.assertEqual((plan.targets, plan.reason, plan.home), (tuple(wanted), "rendezvous", one))

    def test_an_owner_is_known_by_another_of_its_models(self):
        """What a replica issued under one name it can read under every other."""
        three = self.order[2]
        other = three._replace(model="another")
        self.assertNotEqual(other.id, three.id)
        self.assertEqual(self.plan(owner=other.place).targets[0], three)

    def test_owner_and_pin_cool_like_others(self):
        one, two, three = self.order
        self.assertEqual(self.plan(pin=three.id, cooling=ids(three)).targets, (one, two, three))
        self.assertEqual(self.plan(owner=three.place, cooling=ids(three)).targets, (one, two, three))

    def test_the_reason_is_that_of_the_first(self):
        """The log says why a request went where it went."""
        one, _, three = self.order
        for memory in ("pin", "owner"):
            known: Dict[str, Any] = {memory: three.id if memory == "pin" else three.place}
            plan = self.plan(cooling=ids(three), **known)
            self.assertEqual((plan.targets[0], plan.reason), (one, "rendezvous"))

    def test_groups_in_order_the_next_only_when_all_before_are_out(self):
        fleet = [target("a2", group=2), target("b1"), target("c1"), target("d3", group=3)]
        b, c = fleet[1], fleet[2]
        for key in SESSIONS[:100]:
            rows: Sequence[Tuple[str, Sequence[plexus_lite.Target], int, int]] = (
                ("none", (), 1, 4),
                ("one of the first group", (b,), 1, 3),
                ("the first group", (b, c), 2, 2),
            )
            for name, cooling, group, count in rows:
                snapshot = plexus_lite.Snapshot({}, ids(*cooling))
                plan = plexus_lite.plan_targets(fleet, at(key), snapshot)
                groups = [one.group for one in plan.targets[:count]]
                self.assertEqual(groups[0], group, name)
                self.assertEqual(groups, sorted(groups), name)
                self.assertEqual(len(plan.targets), 4)

    def test_load_never_sends_a_session_to_a_later_group(self):
        fleet = [target("a"), target("b"), target("c", group=2)]
        snapshot = plexus_lite.Snapshot({fleet[0].id: 500, fleet[1].id: 500}, frozenset())
        for key in SESSIONS[:50]:
            self.assertNotEqual(plexus_lite.plan_targets(fleet, at(key), snapshot).targets[0].group, 2)

    def test_a_bound_request_never_crosses_accounts(self):
        fleet = [target("a"), target("b", account="shared"), target("c", account="shared"), target("d")]
        for key in SESSIONS[:60]:
            home = plexus_lite.plan_targets(fleet, at(key), NOTHING).targets[0]
            b, d = fleet[1].place, fleet[3].id
            rows: Sequence[Tuple[str, Optional[str], plexus_lite.Snapshot, plexus_lite.Target]] = (
                ("unknown maker", None, NOTHING, home),
                ("owner b", b, NOTHING, fleet[1]),
                ("pin d", None, plexus_lite.Snapshot({}, frozenset(), d), fleet[3]),
                ("owner cools", b, plexus_lite.Snapshot({}, ids(fleet[1])), fleet[1]),
                ("home cools", None, plexus_lite.Snapshot({}, ids(home)), home),
                ("home is full", None, plexus_lite.Snapshot({home.id: 900}, frozenset()), home),
            )
            for name, owner, snapshot, maker in rows:
                plan = plexus_lite.plan_targets(fleet, at(key, owner, True), snapshot)
                account = maker.provider.account_name()
                wanted = {one.id for one in fleet if one.provider.account_name() == account}
                self.assertEqual({one.id for one in plan.targets}, wanted, name)

    def test_an_unbound_request_may_go_anywhere(self):
        self.assertEqual(len(self.plan(owner=self.order[1].place).targets), 3)
        self.assertEqual(len(self.plan(owner=self.order[1].place, is_bound=True).targets), 1)


class BoundedLoad(unittest.TestCase):
    def test_the_limit_is_a_quarter_above_the_fair_share_and_at_least_four(self):
        rows: Sequence[Tuple[str, Sequence[float], Sequence[int], Sequence[int]]] = (
            ("idle", (1, 1), (0, 0), (4, 4)),
            ("few", (1, 1), (3, 2), (4, 4)),
            ("eight of two", (1, 1), (7, 0), (5, 5)),
            ("forty of four", (1, 1, 1, 1), (10, 10, 10, 9), (13, 13, 13, 13)),
            ("weights", (3, 1), (30, 9), (38, 13)),
            ("a light one keeps four", (100, 1), (50, 0), (64, 4)),
        )
        for name, weights, loads, wanted in rows:
            with self.subTest(name):
                group = [target(f"t{number}", weight) for number, weight in enumerate(weights)]
                load = {one.id: count for one, count in zip(group, loads)}
                self.assertEqual([plexus_lite.load_limit(one, group, load) for one in group], list(wanted))

    def test_a_full_target_gives_way_to_the_next_in_rank_and_stays_second(self):
        fleet = fleet_of("a", "b", "c")
        one, two, three = plexus_lite.plan_targets(fleet, at("s"), NOTHING).targets
        rows: Sequence[Tuple[str, Sequence[int], Sequence[plexus_lite.Target], str]] = (
            ("room left", (3, 0, 0), (one, two, three), "rendezvous"),
            ("four are enough", (4, 0, 0), (two, one, three), "overflow"),
            ("the second is full as well", (5, 5, 0), (three, one, two), "overflow"),
            ("high but even", (100, 100, 100), (one, two, three), "rendezvous"),
            ("high and above the share", (130, 100, 70), (two, one, three), "overflow"),
        )
        for name, loads, wanted, reason in rows:
            with self.subTest(name):
                load = {each.id: count for each, count in zip((one, two, three), loads)}
                plan = plexus_lite.plan_targets(fleet, at("s"), plexus_lite.Snapshot(load, frozenset()))
                self.assertEqual((plan.targets, plan.reason, plan.home), (tuple(wanted), reason, one))

    def test_cooling_targets_neither_take_overflow_nor_count(self):
        fleet = fleet_of("a", "b", "c")
        one, two, three = plexus_lite.plan_targets(fleet, at("s"), NOTHING).targets
        snapshot = plexus_lite.Snapshot({one.id: 4}, ids(two))
        self.assertEqual(plexus_lite.plan_targets(fleet, at("s"), snapshot).targets, (three, one, two))
        snapshot = plexus_lite.Snapshot({one.id: 10, two.id: 10, three.id: 90}, ids(three))
        self.assertEqual(plexus_lite.plan_targets(fleet, at("s"), snapshot).targets, (one, two, three))

    def test_owner_and_pin_are_stronger_than_load(self):
        fleet = fleet_of("a", "b", "c")
        for owner, pin in ((fleet[2].place, None), (None, fleet[2].id)):
            snapshot = plexus_lite.Snapshot({fleet[2].id: 999}, frozenset(), pin)
            self.assertIs(plexus_lite.plan_targets(fleet, at("s", owner), snapshot).targets[0], fleet[2])

    def test_one_session_asked_for_by_all_at_once_spreads_within_the_bound(self):
        for weights in ((1, 1, 1, 1), (4, 2, 1)):
            group = [target(f"t{number}", weight) for number, weight in enumerate(weights)]
            fleet = plexus_lite.Fleet()
            for count in range(1, 301):
                plan = plexus_lite.plan_targets(group, at("s"), fleet.snapshot(group, 0.0))
                fleet.opened(plan.targets[0])
                load = fleet.snapshot(group, 0.0).open_requests
                for one in group:
                    share = count * one.weight / sum(weights)
                    self.assertLessEqual(load[one.id], max(4, 1.25 * share + 1))
            self.assertEqual(sum(load.values()), 300)
            self.assertGreater(len([count for count in load.values() if count]), 1)

    def test_evenly_spread_sessions_of_a_small_fleet_stay_at_home(self):
        """With a minimum of 2 a small fleet kept 0.92 of its cache."""
        fleet, group, at_home = plexus_lite.Fleet(), fleet_of("a", "b", "c"), 0
        running: List[plexus_lite.Target] = []
        for key in SESSIONS:
            plan = plexus_lite.plan_targets(group, at(key), fleet.snapshot(group, 0.0))
            at_home += plan.targets[0] is plan.home
            fleet.opened(plan.targets[0])
            running.append(plan.targets[0])
            if len(running) > 4:
                fleet.closed(running.pop(0))
        self.assertGreater(at_home / len(SESSIONS), 0.98)


class Pinning(unittest.TestCase):
    def test_who_stays_where_it_was_served(self):
        home, other, same = target("home"), target("other"), target("same", account="home")
        rows: Sequence[Tuple[str, str, plexus_lite.Target, int, bool]] = (
            ("at home", "rendezvous", home, 1, False),
            ("at home after all", "rendezvous", home, 3, False),
            ("after a failover", "rendezvous", other, 2, True),
            ("after a failover to the same account", "rendezvous", same, 2, True),
            ("home cooled down", "rendezvous", other, 1, True),
            ("where it was pinned", "pin", other, 1, True),
            ("moved by load: back when the load has gone", "overflow", same, 1, False),
            ("moved by load across accounts: only it can read the next turn", "overflow", other, 1, True),
            ("moved by load, then failed over", "overflow", same, 2, True),
        )
        for name, reason, served, attempts, wanted in rows:
            with self.subTest(name):
                plan = plexus_lite.Plan((served, home), reason, home)
                self.assertIs(plexus_lite.is_pinned(plan, served, attempts), wanted)


class Cooldown(unittest.TestCase):
    def test_requests_that_fail_together_are_one_failure(self):
        """Ten streams that one outage cuts must not rest the target for minutes."""
        fleet, one = plexus_lite.Fleet(), target("a")
        for _ in range(10):
            fleet.failed(one, 100.0)
        self.assertEqual(fleet.snapshot([one], 101.9).cooling, ids(one))
        self.assertEqual(fleet.snapshot([one], 102.1).cooling, frozenset())
        fleet.failed(one, 103.0)
        self.assertEqual(fleet.snapshot([one], 106.9).cooling, ids(one))
        self.assertEqual(fleet.snapshot([one], 107.1).cooling, frozenset())

    def test_names_that_clients_invent_do_not_fill_the_memory(self):
        fleet = plexus_lite.Fleet()
        for number in range(plexus_lite.MAX_REMEMBERED + 50):
            fleet.failed(target("a")._replace(model=f"invented-{number}"), 1.0)
        self.assertEqual(len(fleet._failures), plexus_lite.MAX_REMEMBERED)

    def test_it_doubles_from_2_to_300_seconds(self):
        found = [plexus_lite.cooldown_s(failures, None) for failures in range(1, 11)]
        self.assertEqual(found, [2, 4, 8, 16, 32, 64, 128, 256, 300, 300])
        self.assertEqual(plexus_lite.cooldown_s(10**6, None), 300)

    def test_what_the_upstream_asked_for_wins(self):
        for failures in (1, 9):
            for asked in (0.0, 1.0, 7.5, 3600.0):
                self.assertEqual(plexus_lite.cooldown_s(failures, asked), asked)

    def test_retry_after(self):
        now = 1_700_000_000.0
        rows: Sequence[Tuple[str, Mapping[str, str], Optional[float]]] = (
            ("nothing", {}, None),
            ("seconds", {"Retry-After": "7"}, 7),
            ("a Unix time", {"Retry-After": "1767225600"}, None),
            ("seconds with a fraction", {"Retry-After": "1.5"}, 1.5),
            ("zero", {"retry-after": "0"}, 0),
            ("a date", {"Retry-After": formatdate(now + 90, usegmt=True)}, 90),
            ("a date in the past", {"Retry-After": formatdate(now - 90, usegmt=True)}, 0),
            ("a date of RFC 850", {"Retry-After": "Tuesday, 14-Nov-23 22:14:50 GMT"}, 90),
            ("milliseconds", {"retry-after-ms": "1500"}, 1.5),
            ("milliseconds win", {"Retry-After": "7", "Retry-After-Ms": "250"}, 0.25),
            ("milliseconds with a fraction", {"retry-after-ms": "0.5"}, 0.0005),
            ("broken milliseconds give way", {"retry-after-ms": "soon", "Retry-After": "7"}, 7),
            ("below zero", {"Retry-After": "-5"}, None),
            ("junk on which 3.8 stumbles", {"Retry-After": "Jan 2020 Mon,  12.34.56.78 1"}, None),
            ("a fraction", {"Retry-After": "1e3"}, None),
            ("digits of another script", {"Retry-After": "\u00b2"}, None),
            ("too many digits", {"Retry-After": "9" * 400}, None),
            ("too many milliseconds", {"retry-after-ms": "9" * 400}, None),
            ("infinite", {"Retry-After": "inf", "retry-after-ms": "nan"}, None),
            ("a word", {"Retry-After": "later"}, None),
            ("empty", {"Retry-After": "", "retry-after-ms": ""}, None),
            ("half a date", {"Retry-After": "Tue, 14 Nov"}, None),
            ("no such day", {"Retry-After": "Tue, 99 Nov 2023 22:14:50 GMT"}, None),
            ("no such year", {"Retry-After": "Tue, 14 Nov 99999999999999999999 22:14:50 GMT"}, None),
            ("no such second", {"Retry-After": "Tue, 14 Nov 2023 22:14:99999999999999999999 GMT"}, None),
            ("no such zone", {"Retry-After": "Tue, 14 Nov 2023 22:14:50 +99999999999999999999"}, None),
            ("the first of years", {"Retry-After": "Mon, 01 Jan 0001 00:00:00 +2359"}, 0),
        )
        for name, fields, wanted in rows:
            with self.subTest(name):
                self.assertEqual(plexus_lite.retry_after_of(plexus_lite.Headers(fields.items()), now), wanted)


class Bound(unittest.TestCase):
    """is_bound: what only the account that made it can read."""

    def is_bound(self, body: Any) -> bool:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        return plexus_lite.is_bound(plexus_lite.parse_json_body(raw))

    def test_what_binds(self):
        reasoning = {"type": "reasoning", "summary": [], "encrypted_content": "gAAAA"}
        deep: Any = reasoning
        for _ in range(40):
            deep = {"content": [deep]}
        rows: Sequence[Tuple[str, Any]] = (
            ("previous_response_id", {"previous_response_id": "resp_1", "input": "x"}),
            ("an item", {"input": [{"role": "user", "content": "x"}, reasoning]}),
            ("a compaction", {"input": [{"type": "compaction", "encrypted_content": "gAAAA"}]}),
            ("at any depth", {"input": [deep]}),
            ("in an object", {"input": {"a": reasoning}}),
            ("with white space", b'{"input": [{"encrypted_content" \n:\t "x"}]}'),
            ("behind a backslash at the end of a string", b'{"input":[{"a":"\\\\","encrypted_content":"x"}]}'),
            ("behind text that speaks of it", b'{"input":["\\"encrypted_content\\":null",{"encrypted_content":"x"}]}'),
        )
        for name, body in rows:
            with self.subTest(name):
                self.assertTrue(self.is_bound(body))

    def test_what_does_not(self):
        quoted = json.dumps({"encrypted_content": "gAAAA"})
        rows: Sequence[Tuple[str, Any]] = (
            ("nothing", {}),
            ("text", {"input": "encrypted_content"}),
            ("text that holds JSON", {"input": [{"role": "user", "content": quoted}]}),
            ("text that holds JSON in JSON", {"input": [{"content": json.dumps([quoted])}]}),
            ("a string of its own", {"input": ["encrypted_content", ":", "x"]}),
            ("null", {"input": [{"encrypted_content": None}]}),
            ("asked for", {"include": ["reasoning.encrypted_content"], "input": "x"}),
            ("in the instructions", {"instructions": quoted, "input": "x"}),
            ("in a tool", {"tools": [{"name": "x", "parameters": {"encrypted_content": "string"}}], "input": "x"}),
            ("previous_response_id null", {"previous_response_id": None, "input": "x"}),
            ("previous_response_id empty", {"previous_response_id": "", "input": "x"}),
            ("previous_response_id inside", {"input": [{"previous_response_id": "resp_1"}]}),
        )
        for name, body in rows:
            with self.subTest(name):
                self.assertFalse(self.is_bound(body))


class Fingerprint(unittest.TestCase):
    TURN: Dict[str, Any] = {"model": "m", "instructions": "i", "input": [{"role": "user", "content": "one"}]}

    def test_it_stays_from_turn_to_turn(self):
        later = dict(self.TURN, input=[*self.TURN["input"], {"role": "assistant"}, {"role": "user"}], stream=True)
        other_order = dict(reversed(list(later.items())))
        wanted = plexus_lite.fingerprint_of(body_of(self.TURN))
        for members in (later, other_order, dict(later, temperature=1, tools=[], metadata={"a": "b"})):
            self.assertEqual(plexus_lite.fingerprint_of(body_of(members)), wanted)
        chat = {"model": "m", "messages": [{"role": "system"}, {"role": "user", "content": "one"}]}
        next_chat = dict(chat, messages=[*chat["messages"], {"role": "assistant"}])
        self.assertEqual(plexus_lite.fingerprint_of(body_of(chat)), plexus_lite.fingerprint_of(body_of(next_chat)))

    def test_another_conversation_has_another(self):
        rows: Sequence[Dict[str, Any]] = (
            self.TURN,
            dict(self.TURN, model="n"),
            dict(self.TURN, instructions="j"),
            dict(self.TURN, instructions=None),
            dict(self.TURN, input=[{"role": "user", "content": "two"}]),
            dict(self.TURN, input="one"),
            dict(self.TURN, input="two"),
            {"model": "m", "messages": [{"role": "system"}, {"role": "user", "content": "one"}]},
            {"model": "m", "messages": [{"role": "system"}, {"role": "user", "content": "two"}]},
        )
        self.assertEqual(len({plexus_lite.fingerprint_of(body_of(members)) for members in rows}), len(rows))

    def test_it_is_pinned_like_the_scores(self):
        wanted = "675751f83a7a98586126d4e105ca6dff28dd9e22e08db68058fb1a423fd77e88"
        members = {"model": "m", "instructions": "i", "input": [{"a": 1}]}
        self.assertEqual(plexus_lite.fingerprint_of(body_of(members)), wanted)

    def test_anything_that_was_parsed_has_one(self):
        texts = ["{}", '{"input":null}', '{"input":5}', '{"input":[]}', '{"input":{"a":1}}', '{"messages":"x"}']
        texts += ['{"model":["m"],"instructions":{"a":[1]},"input":"\\ud83d"}', '{"input":[[[[[1e400]]]]]}']
        for text in texts:
            body = plexus_lite.parse_json_body(text.encode())
            self.assertRegex(plexus_lite.fingerprint_of(body), r"\A[0-9a-f]{64}\Z")


class RememberedTest(unittest.TestCase):
    def test_it_forgets_what_was_longest_unused(self):
        memory: plexus_lite.Remembered[str] = plexus_lite.Remembered(3)
        for key in "abc":
            memory.put(key, key.upper(), 0)
        self.assertEqual(memory.get("a", 1), "A")  # a use: b is now the oldest
        memory.put("b", "B2", 2)  # a use as well: now c
        memory.put("d", "D", 3)
        self.assertEqual([memory.get(key, 4) for key in "abcd"], ["A", "B2", None, "D"])
        self.assertEqual(len(memory._entries), 3)

    def test_it_is_bounded(self):
        memory: plexus_lite.Remembered[str] = plexus_lite.Remembered(100)
        for number in range(10_000):
            memory.put(f"k{number}", "v", number)
            self.assertLessEqual(len(memory._entries), 100)
        self.assertEqual([memory.get(key, 1e6) for key in ("k9899", "k9900", "k9999")], [None, "v", "v"])
        fleet = plexus_lite.Fleet()
        for number in range(plexus_lite.MAX_REMEMBERED + 500):
            fleet.pins.put(str(number), "t", 0)
        self.assertEqual(len(fleet.pins._entries), plexus_lite.MAX_REMEMBERED)

    def test_idle_time_counts_from_the_last_use(self):
        memory: plexus_lite.Remembered[str] = plexus_lite.Remembered()
        memory.put("k", "v", 1000)
        self.assertEqual(memory.get("k", 2800, 1800), "v")
        self.assertEqual(memory.get("k", 4600, 1800), "v")
        self.assertIsNone(memory.get("k", 6400.5, 1800))
        self.assertEqual(len(memory._entries), 0, "what is too old is kept")
        memory.put("k", "v", 0)
        self.assertEqual(memory.get("k", 1e9), "v")

    def test_forget(self):
        memory: plexus_lite.Remembered[str] = plexus_lite.Remembered()
        memory.put("k", "v", 0)
        memory.forget("k")
        memory.forget("never there")
        self.assertIsNone(memory.get("k", 0))

    def test_threads_do_not_mix_entries_up(self):
        memory: plexus_lite.Remembered[str] = plexus_lite.Remembered(50)
        wrong = []

        def work(number: int) -> None:
            for step in range(1500):
                key = f"{(number * 7 + step) % 90}"
                memory.put(key, "v" + key, step)
                found = memory.get(key, step)
                with memory._lock:
                    size = len(memory._entries)
                if found not in (None, "v" + key) or size > 50:
                    wrong.append((key, found, size))
                if step % 5 == 0:
                    memory.forget(key)

        run_threads(work)
        self.assertEqual(wrong, [])
        self.assertLessEqual(len(memory._entries), 50)


def run_threads(work: Callable[[int], None], count: int = 8) -> None:
    """Run work(0), work(1), ... at the same time, and raise what one of them raised."""
    errors: List[BaseException] = []
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


class FleetTest(unittest.TestCase):
    def setUp(self) -> None:
        self.fleet = plexus_lite.Fleet()
        self.targets = fleet_of("a", "b", "c")
        self.a, self.b, self.c = self.targets

    def load(self) -> List[int]:
        return list(self.fleet.snapshot(self.targets, 0.0).open_requests.values())

    def cooling(self, now: float) -> "frozenset[str]":
        return self.fleet.snapshot(self.targets, now).cooling

    def test_open_requests_are_counted(self):
        self.assertEqual(self.load(), [0, 0, 0])
        for one in (self.a, self.b, self.a, self.a):
            self.fleet.opened(one)
        self.fleet.closed(self.a)
        self.assertEqual(self.load(), [2, 1, 0])
        for one, wanted in ((self.a, [1, 1, 0]), (self.b, [1, 0, 0]), (self.a, [0, 0, 0])):
            self.fleet.closed(one)
            self.assertEqual(self.load(), wanted)
        self.assertEqual(self.fleet._open, {}, 'behind "*" clients name the models, and a zero for each would stay')

    def test_two_objects_of_one_target_are_one(self):
        self.fleet.opened(target("a"))
        self.fleet.opened(target("a", weight=5, group=2))
        self.assertEqual(self.load(), [2, 0, 0])

    def test_threads_lose_no_count(self):
        def work(_: int) -> None:
            for _ in range(1000):
                self.fleet.opened(self.a)
                self.fleet.opened(self.b)
                self.fleet.closed(self.a)

        run_threads(work)
        self.assertEqual(self.load(), [0, 8000, 0])

    def test_a_failure_cools_twice_as_long_each_time_and_a_success_resets(self):
        now = 1000.0
        for pause in (2, 4, 8, 16):
            self.fleet.failed(self.a, now)
            self.assertEqual(self.cooling(now + pause - 0.1), ids(self.a))
            self.assertEqual(self.cooling(now + pause), frozenset())
            now += 100
        self.fleet.succeeded(self.a)
        self.fleet.failed(self.a, now)
        self.assertEqual(self.cooling(now + 1.9), ids(self.a))
        self.assertEqual(self.cooling(now + 2), frozenset())
        self.fleet.failed(self.b, now, retry_after=50.0)
        self.assertEqual(self.cooling(now + 49), ids(self.b))
        self.assertEqual(self.cooling(now + 50), frozenset())
        self.fleet.failed(self.b, now)
        self.fleet.succeeded(self.b)
        self.assertEqual(self.cooling(now), frozenset(ids(self.a)))

    def test_what_is_asked_for_is_what_the_snapshot_has(self):
        self.fleet.opened(self.a)
        self.fleet.failed(self.a, 0.0)
        snapshot = self.fleet.snapshot([self.b], 1.0, "p")
        self.assertEqual(snapshot, plexus_lite.Snapshot({self.b.id: 0}, frozenset(), "p"))


class LongNames(unittest.TestCase):
    def test_a_name_that_a_client_made_up_is_not_remembered_whole(self):
        """Behind "*" it may have the size of a body, and a target that failed and a pin are remembered by it."""
        (place,) = plexus_lite.places_of(plexus_lite.parse_config(make_config("http://u/v1")), None)
        ids = [plexus_lite.Target(*place[:2], name * 100_000).id for name in ("a", "b", "\ud800")]
        self.assertEqual(len(set(ids)), 3)
        self.assertLess(max(map(len, ids)), 200)
        self.assertTrue(all(one.startswith(place.place) for one in ids))
        sessions = [plexus_lite.affinity_of("s", None, name * 100_000, None).session for name in ("a", "b")]
        self.assertNotEqual(*sessions)
        self.assertLess(max(map(len, sessions)), 200)


class Sessions(unittest.TestCase):
    """A conversation from turn to turn: plan, serve, fail over, come back."""

    def setUp(self) -> None:
        self.fleet, self.targets = plexus_lite.Fleet(), fleet_of("a", "b", "c")
        self.place = plexus_lite.affinity_of("s", None, "m", None)
        self.home, self.second, self.third = self.plan(0).targets

    def plan(self, now: float, **options: Any) -> plexus_lite.Plan:
        return self.fleet.plan(self.targets, self.place._replace(**options), now, 1800.0)

    def serve(self, now: float, *failing: plexus_lite.Target, **options: Any) -> Tuple[plexus_lite.Target, str]:
        """Serve a turn; return who did and why."""
        plan = self.plan(now, **options)
        for attempt, one in enumerate(plan.targets, 1):
            if one in failing:
                self.fleet.failed(one, now)
                continue
            self.fleet.succeeded(one)
            self.fleet.served(self.place, plan, one, attempt, now)
            return one, plan.reason
        raise AssertionError("all failed")

    def test_it_stays_at_home(self):
        for now in (0, 10, 10_000):
            self.assertEqual(self.serve(now), (self.home, "rendezvous"))
        self.assertEqual(len(self.fleet.pins._entries), 0)

    def test_after_a_failover_it_stays_on_the_replacement_until_it_was_idle(self):
        self.assertEqual(self.serve(0, self.home)[0], self.second)
        self.assertEqual(self.serve(1000), (self.second, "pin"))  # home is well again; its prefix lies here now
        self.assertEqual(self.serve(2800), (self.second, "pin"))
        self.assertEqual(self.serve(4601), (self.home, "rendezvous"))

    def test_a_replacement_that_fails_is_replaced(self):
        self.serve(0, self.home)
        self.assertEqual(self.serve(1000, self.second)[0], self.home)
        self.assertEqual(self.serve(2000), (self.home, "rendezvous"))

    def test_while_home_cools_down_it_moves_and_stays(self):
        self.fleet.failed(self.home, 0)
        self.assertEqual(self.serve(1)[0], self.second)
        self.assertEqual(self.serve(1000), (self.second, "pin"))

    def test_what_only_the_load_moved_returns_when_the_load_has_gone(self):
        self.targets = [target(name, account="one") for name in "abc"]
        self.home = self.plan(0).targets[0]
        for _ in range(4):
            self.fleet.opened(self.home)
        self.assertEqual(self.serve(0)[1], "overflow")
        for _ in range(4):
            self.fleet.closed(self.home)
        self.assertEqual(self.serve(1), (self.home, "rendezvous"))

    def test_the_load_moves_it_from_its_home_while_its_replacement_rests_and_it_returns_to_that(self):
        self.targets = [target(name, account="one") for name in "abc"]
        self.home, self.second, self.third = self.plan(0).targets
        self.serve(0, self.home)
        self.fleet.failed(self.second, 1000)
        for _ in range(4):
            self.fleet.opened(self.home)
        self.assertEqual(self.serve(1000), (self.third, "overflow"))
        self.assertEqual(self.serve(1500), (self.second, "pin"))

    def test_what_another_account_made_leads_back_to_it_however_long_it_was_idle(self):
        """Its home cannot read it, and each further turn was a 400."""
        self.assertEqual(self.serve(0, self.home), (self.second, "rendezvous"))
        self.assertEqual(self.serve(10_000, is_bound=True), (self.second, "pin"))
        self.assertEqual(self.serve(20_000), (self.home, "rendezvous"), "a turn that anyone can read")
        self.assertEqual(self.serve(30_000, is_bound=True), (self.home, "rendezvous"))

    def test_what_another_account_made_is_forgotten_once_its_own_has_served_again(self):
        """On another replica: its home was still out."""
        self.targets = [target("a1", account="a"), target("a2", account="a"), target("b", account="b")]
        for session in map(str, range(99)):
            self.place = plexus_lite.affinity_of(session, None, "m", None)
            self.home, self.second, self.third = self.plan(0).targets
            if (self.home.provider.account, self.second.provider.account) == ("a", "b"):
                break
        self.assertEqual(self.serve(0, self.home), (self.second, "rendezvous"))
        self.assertEqual(self.serve(1, self.second)[0], self.third)
        self.assertNotIn(self.second, self.plan(1000, is_bound=True).targets)

    def test_what_the_same_account_made_returns_to_its_home(self):
        self.targets = [target(name, account="one") for name in "abc"]
        self.home, self.second, self.third = self.plan(0).targets
        self.serve(0, self.home)
        self.assertEqual(self.serve(10_000, is_bound=True), (self.home, "rendezvous"))

    def test_an_owner_is_asked_first(self):
        self.assertEqual(self.serve(0, owner=self.third.place), (self.third, "owner"))
        self.assertEqual(
            [one.id for one in self.plan(0, owner=self.third.place, is_bound=True).targets], [self.third.id]
        )

    def test_sessions_and_models_are_pinned_each_on_its_own(self):
        self.serve(0, self.home)
        for place in (plexus_lite.affinity_of("t", None, "m", None), plexus_lite.affinity_of("s", None, "n", None)):
            self.assertEqual(self.fleet.plan(self.targets, place, 1000.0, 1800.0).reason, "rendezvous")
        again = plexus_lite.affinity_of("s", body_of({"input": "something else"}), "m", None)
        self.assertEqual(self.fleet.plan(self.targets, again, 1000.0, 1800.0).reason, "pin")

    def test_without_a_session_value_the_fingerprint_places(self):
        turn = {"model": "m", "input": [{"a": 1}]}
        later = {"model": "m", "input": [{"a": 1}, {"b": 2}]}
        place = plexus_lite.affinity_of(None, body_of(turn), "m", None)
        self.assertEqual(place, plexus_lite.affinity_of(None, body_of(later), "m", None))
        self.assertEqual(place.key, plexus_lite.fingerprint_of(body_of(turn)))
        self.assertNotEqual(
            place, plexus_lite.affinity_of(None, body_of({"model": "m", "input": [{"a": 2}]}), "m", None)
        )

    def test_the_session_value_itself_is_remembered_nowhere(self):
        place = plexus_lite.affinity_of("a-session-of-a-client", None, "m", None)
        self.assertNotIn("a-session", repr(place))


if __name__ == "__main__":
    unittest.main()
