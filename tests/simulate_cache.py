"""How much of the prompt cache each way of placing conversations keeps:  python -m tests.simulate_cache [MINUTES]

Ours is the program's own placement code.  No sockets; time is simulated; the same seed gives the same table.

    Conversation   20 turns; a prompt is the one before it, plus what was answered and what has come in since
    PrefixCache    one replica's: what was longest unused goes when it is full, and everything after 10 idle minutes
    Policy         which replica is asked, and which next if that one refuses; ours and four that other gateways have
    Simulation     conversations, proxies and replicas on one clock
    SCENARIOS      what goes wrong meanwhile

No two conversations share a prefix, so that a misplaced turn costs as much as it can.  MINUTES (480, a working day) is
the time over which the 600 conversations begin: fewer make a higher load, and the last lines show what it costs.
"""

import collections
import dataclasses
import heapq
import itertools
import random
import sys
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Type

import plexus_lite
from plexus_lite import Target
from tests.support import body_of

SEED = 3
REPLICAS = 8
SESSIONS = 600
TURNS = 20
MODEL = "m"

WINDOW_S = 8 * 3600.0  # conversations begin at random in a working day
PIN_IDLE_S = plexus_lite.Limits().pin_idle_s
LIFE_S = 600.0  # an unused prefix is forgotten
HEAD_ROOM = 1.5  # a replica's cache over its fair share of what an infinite one holds at its fullest
PREFILL_TOKENS_PER_S = 8000.0
OUTPUT_TOKENS_PER_S = 50.0
OVERHEAD_S = 0.5  # of each request, before its first token
REFUSAL_S = 0.05  # until a 429 has come; a refused connection takes no time
CUT_RETRY_S = 1.0  # a client whose answer broke off asks again
BASELINE_COOLDOWN_S = 10.0  # the four others leave a replica alone this long after a failure, as nginx does by default

TROUBLE_AT_S = 3 * 3600.0  # when a scenario's trouble begins
TROUBLE_S = 600.0  # and how long it lasts


# ---------------------------------------------------------------------------
# Workload
# ---------------------------------------------------------------------------


class Turn(NamedTuple):
    pause_s: float  # since the end of the answer before
    new_tokens: int  # of the prompt: tool results, the user's words
    output_tokens: int


@dataclasses.dataclass
class Conversation:
    number: int
    place: plexus_lite.Affinity
    start_s: float
    turns: List[Turn]
    has_session: bool = True


def make_turn(rng: random.Random, first: bool) -> Turn:
    """Agent turns: seconds while a tool runs, a minute while a person reads, and some long pauses."""
    kind = rng.random()
    if kind < 0.70:
        pause = rng.lognormvariate(2.0, 0.9)  # median 7 s
    elif kind < 0.92:
        pause = rng.lognormvariate(3.9, 0.7)  # median 50 s
    else:
        pause = rng.uniform(180, 1200)
    new = rng.lognormvariate(9.4, 0.4) if first else rng.lognormvariate(7.2, 1.0)  # medians 12,000 and 1,340 tokens
    return Turn(pause, int(new), int(rng.lognormvariate(5.7, 0.8)))  # median 300 tokens


def make_conversations(
    seed: int = SEED, window_s: float = WINDOW_S, anonymous: float = 0, hot: int = 0, fan_out: int = 0
) -> List[Conversation]:
    """Return the conversations: a share of *anonymous* ones, and *hot* session values with *fan_out* agents each."""
    rng = random.Random(seed)
    found = []
    for number in range(SESSIONS):
        start = rng.uniform(0, window_s)
        turns = [make_turn(rng, index == 0) for index in range(TURNS)]
        value: Optional[str] = f"{rng.getrandbits(128):032x}"
        if number < hot * fan_out:
            value = f"hot-{number % hot}"
        elif rng.random() < anonymous:
            value = None
        members = {"model": MODEL, "instructions": "You are a coding agent.", "input": [f"task {number}"]}
        place = plexus_lite.affinity_of(value, body_of(members), MODEL, None)
        found.append(Conversation(number, place, start, turns, value is not None))
    return found


# ---------------------------------------------------------------------------
# Caches
# ---------------------------------------------------------------------------


class PrefixCache:
    """Prompt tokens per conversation; the least recently used conversation goes first."""

    def __init__(self, capacity: float = float("inf")) -> None:
        self.capacity = capacity
        self.held = 0
        self.most_held = 0
        self._entries: collections.OrderedDict[int, Tuple[int, float]] = collections.OrderedDict()

    def use(self, number: int, prompt: int, now: float) -> int:
        """Return how many tokens of *prompt* are here; from now on all of them are."""
        cached, used_at = self._entries.pop(number, (0, now))
        self.held -= cached
        if now - used_at > LIFE_S:
            cached = 0
        self._entries[number] = (prompt, now)
        self.held += prompt
        while self._entries:
            oldest, (tokens, used_at) = next(iter(self._entries.items()))
            if self.held <= self.capacity and now - used_at <= LIFE_S:
                break
            del self._entries[oldest]
            self.held -= tokens
        self.most_held = max(self.most_held, self.held)
        return min(cached, prompt)

    def clear(self) -> None:
        self._entries.clear()
        self.held = 0


# ---------------------------------------------------------------------------
# Policies.  One object per proxy: it knows what passed through this proxy and nothing else.
# ---------------------------------------------------------------------------


class Policy:
    """Yields targets until one of them serves the request."""

    name = ""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.open: Dict[str, int] = collections.Counter()
        self.cools_until: Dict[str, float] = {}
        self.placements: Dict[str, int] = collections.Counter()

    def candidates(self, conversation: Conversation, targets: Sequence[Target], now: float) -> Iterator[Target]:
        left = list(targets)
        while left:
            well = [target for target in left if self.cools_until.get(target.id, now) <= now]
            chosen = self.choose(conversation, well or left)
            left.remove(chosen)
            yield chosen

    def choose(self, conversation: Conversation, targets: Sequence[Target]) -> Target:
        raise NotImplementedError

    def opened(self, conversation: Conversation, target: Target) -> None:
        self.open[target.id] += 1

    def closed(self, conversation: Conversation, target: Target) -> None:
        self.open[target.id] -= 1

    def failed(self, target: Target, now: float, retry_after: Optional[float]) -> None:
        self.cools_until[target.id] = now + BASELINE_COOLDOWN_S

    def served(self, conversation: Conversation, target: Target, now: float) -> None:
        """The first byte has come."""


class Random(Policy):
    name = "random"

    def choose(self, conversation: Conversation, targets: Sequence[Target]) -> Target:
        return self.rng.choice(targets)


class RoundRobin(Policy):
    name = "round robin"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.turn = itertools.count()

    def choose(self, conversation: Conversation, targets: Sequence[Target]) -> Target:
        return targets[next(self.turn) % len(targets)]


class LeastConnections(Policy):
    name = "least connections"

    def choose(self, conversation: Conversation, targets: Sequence[Target]) -> Target:
        fewest = min(self.open[target.id] for target in targets)
        return self.rng.choice([target for target in targets if self.open[target.id] == fewest])


class StickyMap(LeastConnections):
    """Session value to replica in memory; what has no value goes where the fewest requests are open."""

    name = "sticky map"
    maximum = 10000

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.places: collections.OrderedDict[str, str] = collections.OrderedDict()

    def choose(self, conversation: Conversation, targets: Sequence[Target]) -> Target:
        place = self.places.get(conversation.place.key)
        for target in targets:
            if target.id == place:
                return target
        return super().choose(conversation, targets)

    def served(self, conversation: Conversation, target: Target, now: float) -> None:
        if conversation.has_session:
            self.places[conversation.place.key] = target.id
            self.places.move_to_end(conversation.place.key)
            if len(self.places) > self.maximum:
                self.places.popitem(last=False)


class Ours(Policy):
    """plexus_lite: the calls that its handler makes, with a simulated clock."""

    name = "plexus_lite"

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng)
        self.fleet = plexus_lite.Fleet()

    def candidates(self, conversation: Conversation, targets: Sequence[Target], now: float) -> Iterator[Target]:
        self.plan = self.fleet.plan(targets, conversation.place, now, PIN_IDLE_S)
        self.placements[self.plan.reason] += 1
        self.tried = 0
        for target in self.plan.targets:
            self.tried += 1
            yield target

    def opened(self, conversation: Conversation, target: Target) -> None:
        self.fleet.opened(target)

    def closed(self, conversation: Conversation, target: Target) -> None:
        self.fleet.closed(target)

    def failed(self, target: Target, now: float, retry_after: Optional[float]) -> None:
        self.fleet.failed(target, now, retry_after)

    def served(self, conversation: Conversation, target: Target, now: float) -> None:
        self.fleet.succeeded(target)
        self.fleet.served(conversation.place, self.plan, target, self.tried, now)


POLICIES: List[Type[Policy]] = [Random, RoundRobin, LeastConnections, StickyMap, Ours]


# ---------------------------------------------------------------------------
# Simulation
# ---------------------------------------------------------------------------


@dataclasses.dataclass
class Scenario:
    name: str
    workload: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    proxies: int = 1
    down: bool = False  # replica 0 dies, and comes back empty
    added: bool = False
    restart: bool = False  # every proxy forgets
    storm: bool = False  # replica 0 answers 429 to four requests of five, and asks for 2 s


# A hot session has 30 agents at work in parallel under one session value: 5 % of all requests.
SCENARIOS = [
    Scenario("steady"),
    Scenario("one replica down for 10 min", down=True),
    Scenario("one replica added", added=True),
    Scenario("proxy restarted", restart=True),
    Scenario("4 proxies, round robin", proxies=4),
    Scenario("20 % without a session value", {"anonymous": 0.2}),
    Scenario("two hot sessions", {"hot": 2, "fan_out": 10}),
    Scenario("429 storm on one replica", storm=True),
]


class Result(NamedTuple):
    kept: float  # cached tokens over those of an ideal cache: one, infinite, with the same 10 minutes of life
    busiest: (
        float  # requests served by the busiest replica over the mean; if one was added, the worse of before and after
    )
    in_flight: float  # mean over time
    peak_tokens: int  # that the ideal cache held
    placements: Mapping[str, int]  # ours: how often for which reason


def make_targets(count: int) -> Tuple[Target, ...]:
    urls = [f"http://replica-{number}:8000/v1" for number in range(count)]
    config = plexus_lite.parse_config({"providers": {"up": {"api_base_url": urls, "models": [MODEL]}}})
    return plexus_lite.targets_of(config, MODEL, "responses")


class Simulation:
    """One scenario under one policy."""

    def __init__(
        self,
        scenario: Scenario,
        policy: Type[Policy],
        conversations: Sequence[Conversation],
        replicas: int,
        capacity: float,
        seed: int = SEED,
    ) -> None:
        self.scenario, self.policy = scenario, policy
        self.rng = random.Random(seed)
        self.every_target = make_targets(replicas + 1)
        self.targets = self.every_target[:replicas]
        self.victim = self.every_target[0].id
        self.caches = {target.id: PrefixCache(capacity) for target in self.every_target}
        self.ideal = PrefixCache()
        self.proxies = [policy(self.rng) for _ in range(scenario.proxies)]
        self.next_proxy = itertools.cycle(range(scenario.proxies))
        self.prompts = [0] * len(conversations)
        self.is_down = self.is_storming = False
        self.running: Dict[int, Tuple[Conversation, int, Policy, Target]] = {}  # request number -> what runs
        self.numbers = itertools.count()
        self.cached = self.ideal_cached = 0
        self.counts: Dict[str, int] = collections.Counter()  # requests served in this period
        self.worst = 0.0
        self.busy_s = self.now = 0.0
        self.queue: List[Tuple[float, int, Callable[..., None], Tuple[Any, ...]]] = []
        for conversation in conversations:
            self.at(conversation.start_s, self.ask, conversation, 0)
        begin, end = TROUBLE_AT_S, TROUBLE_AT_S + TROUBLE_S
        if scenario.down:
            self.at(begin, self.die)
            self.at(end, self.come_back)
        if scenario.storm:
            self.at(begin, self.set_storm, True)
            self.at(end, self.set_storm, False)
        if scenario.added:
            self.at(begin, self.add)
        if scenario.restart:
            self.at(begin, self.restart)

    def at(self, when: float, action: Callable[..., None], *arguments: Any) -> None:
        heapq.heappush(self.queue, (when, next(self.numbers), action, arguments))

    def run(self) -> Result:
        while self.queue:
            when, _, action, arguments = heapq.heappop(self.queue)
            self.busy_s += (when - self.now) * len(self.running)
            self.now = when
            action(*arguments)
        self.end_period()
        placements: Dict[str, int] = collections.Counter()
        for proxy in self.proxies:
            placements.update(proxy.placements)
        kept = self.cached / self.ideal_cached
        return Result(kept, self.worst, self.busy_s / self.now, self.ideal.most_held, placements)

    # -- one turn -----------------------------------------------------------

    def ask(self, conversation: Conversation, index: int, again: bool = False) -> None:
        turn = conversation.turns[index]
        if not again:
            self.prompts[conversation.number] += turn.new_tokens
        prompt = self.prompts[conversation.number]
        proxy = self.proxies[next(self.next_proxy)]
        took = 0.0
        for target in proxy.candidates(conversation, self.targets, self.now):
            if target.id == self.victim and self.is_down:
                proxy.failed(target, self.now, None)
            elif target.id == self.victim and self.is_storming and self.rng.random() < 0.8:
                proxy.failed(target, self.now, 2.0)
                took += REFUSAL_S
            else:
                break
        else:
            self.at(self.now + CUT_RETRY_S, self.ask, conversation, index, True)
            return
        cached = self.caches[target.id].use(conversation.number, prompt, self.now)
        self.cached += cached
        self.ideal_cached += self.ideal.use(conversation.number, prompt, self.now)
        self.counts[target.id] += 1
        proxy.opened(conversation, target)
        proxy.served(conversation, target, self.now)
        number = next(self.numbers)
        self.running[number] = (conversation, index, proxy, target)
        took += OVERHEAD_S + (prompt - cached) / PREFILL_TOKENS_PER_S + turn.output_tokens / OUTPUT_TOKENS_PER_S
        self.at(self.now + took, self.end, number)

    def end(self, number: int) -> None:
        if number not in self.running:
            return  # it was cut
        conversation, index, proxy, target = self.running.pop(number)
        proxy.closed(conversation, target)
        self.prompts[conversation.number] += conversation.turns[index].output_tokens
        if index + 1 < len(conversation.turns):
            self.at(self.now + conversation.turns[index + 1].pause_s, self.ask, conversation, index + 1)

    # -- what goes wrong ----------------------------------------------------

    def end_period(self) -> None:
        """The fleet changes: how even was the load until now?"""
        served = [self.counts[target.id] for target in self.targets]
        self.worst = max(self.worst, max(served) * len(served) / (sum(served) or 1))
        self.counts.clear()

    def die(self) -> None:
        self.is_down = True
        self.caches[self.victim].clear()
        for number, (conversation, index, proxy, target) in list(self.running.items()):
            if target.id == self.victim:
                del self.running[number]
                proxy.closed(conversation, target)
                self.at(self.now + CUT_RETRY_S, self.ask, conversation, index, True)

    def come_back(self) -> None:
        self.is_down = False

    def set_storm(self, storming: bool) -> None:
        self.is_storming = storming

    def add(self) -> None:
        self.end_period()
        self.targets = self.every_target

    def restart(self) -> None:
        self.proxies = [self.policy(self.rng) for _ in self.proxies]


# ---------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------


def fair_capacity(window_s: float = WINDOW_S) -> float:
    """Return the tokens that each replica's cache holds."""
    conversations = make_conversations(window_s=window_s)
    alone = Simulation(Scenario("one replica, infinite"), Random, conversations, 1, float("inf")).run()
    return HEAD_ROOM * alone.peak_tokens / REPLICAS


def simulate(scenario: Scenario, policy: Type[Policy], capacity: float, window_s: float = WINDOW_S) -> Result:
    conversations = make_conversations(window_s=window_s, **scenario.workload)
    return Simulation(scenario, policy, conversations, REPLICAS, capacity).run()


def main(arguments: Sequence[str]) -> int:
    window_s = float(arguments[0]) * 60 if arguments else WINDOW_S
    capacity = fair_capacity(window_s)
    print("Share of an ideal cache's tokens that stays cached / requests of the busiest replica over the mean\n")
    print(f"| {'scenario':<30} | {' | '.join(f'{policy.name:<17}' for policy in POLICIES)} |")
    print(f"|{'-' * 32}|{('-' * 18 + ':|') * len(POLICIES)}")
    in_flight = 0.0
    for scenario in SCENARIOS:
        results = [simulate(scenario, policy, capacity, window_s) for policy in POLICIES]
        in_flight = max(in_flight, results[-1].in_flight)
        cells = (f"{f'{result.kept:.3f} / {result.busiest:.2f}':>17}" for result in results)
        print(f"| {scenario.name:<30} | {' | '.join(cells)} |", flush=True)
    print(
        f"\n{REPLICAS} replicas, each with a cache for {capacity / 1e6:.1f} million tokens; {SESSIONS} conversations of"
    )
    print(f"{TURNS} turns begin within {window_s / 60:.0f} minutes; {in_flight:.1f} requests are open on average.\n")
    print("The bound on open requests spreads a higher load, and that costs cache (ours, steady):\n")
    print("| conversations begin within | requests open on average | kept / busiest |\n|---:|---:|---:|")
    for part in (1, 2, 4, 8):
        window = window_s / part
        result = simulate(SCENARIOS[0], Ours, fair_capacity(window), window)
        print(
            f"| {window / 60:.0f} minutes | {result.in_flight:.1f} | {result.kept:.3f} / {result.busiest:.2f} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
