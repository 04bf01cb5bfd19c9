"""The status page in a real headless Chromium, in front of a server that says what the test wants shown.

python -m tests.test_page picture     writes tests/status_page.png, the picture of the README
python -m tests.test_page FOLDER      writes every state of the page, light and dark, wide and narrow, to FOLDER
"""

import hashlib
import http.server
import json
import os
import random
import re
import select
import socket
import socketserver
import sys
import threading
import time
import unittest
from typing import Any, Callable, Dict, List, Optional

import plexus_lite
from tests.browser import HAS_BROWSER, NO_BROWSER, Browser, Tab
from tests.support import Proxy, enter, post

HOSTILE = '<img src=x onerror="document.title=1"><script>document.title=2</script>&lt;b&gt;</td>'
KEY = "sk-browser-4711"


# ---- What the server says -----------------------------------------------------------------------------------------


def empty() -> Dict[str, Any]:
    now = time.time()
    totals = dict.fromkeys(("requests", "errors", "input_tokens", "cached_tokens"), 0)
    return {
        "version": "1.0.0", "now": now, "started": now - 90, "workers": 1, "key": None, "all_sessions": True,
        "in_flight": 0, "totals": dict(totals, output_tokens=0), "saved": None, "spent": None,
        "minutes": [], "models": [], "targets": [], "sessions": [], "misses": [], "errors": [],
    }  # fmt: skip


def busy() -> Dict[str, Any]:
    """Two hours of a team at work, the same at each call but for the time of day."""
    dice, data = random.Random(6), empty()
    now = data["now"]
    for ago in range(58, -1, -1):
        requests = 0 if 31 <= ago <= 34 else dice.randint(2, 14)
        tokens = requests * dice.randint(20000, 60000)
        rate = dice.uniform(0.93, 0.99) - (0.5 if ago in (44, 12) else 0)
        if requests:
            data["minutes"].append([now // 60 * 60 - 60 * ago, requests, tokens, int(tokens * rate)])
    hour = [2 * sum(one[column] for one in data["minutes"]) for column in (1, 2)]
    used = (
        ("gpt-5.4", "openai", "https://api.openai.com/v1", 0.55, 0),
        ("gpt-5.4-mini", "openai", "https://api.openai.com/v1", 0.2, 1),
        ("qwen3-coder", "vllm", "http://gpu1:8000/v1", 0.18, 0),
        ("qwen3-coder", "vllm", "http://gpu2:8000/v1", 0.07, 2),
    )
    for model, provider, url, part, errors in used:
        row: Dict[str, Any] = {"requests": int(hour[0] * part), "errors": errors, "input_tokens": int(hour[1] * part)}
        row.update(cached_tokens=int(row["input_tokens"] * dice.uniform(0.9, 0.97)))
        row.update(output_tokens=row["input_tokens"] // 90)
        add_to(data["models"], {"model": model}, row)
        load = {"open": 2 - errors, "cooling_s": 48 if errors == 2 else 0}
        add_to(data["targets"], {"provider": provider, "target": url}, dict(row, **load))
        add_to([data["totals"]], {}, row)
    for number in range(14):
        model, provider = dice.choice(used)[:2]
        session = hashlib.sha256(str(number).encode()).hexdigest()[:12]
        last, tokens, turns = now - number * number * 9 - 2, dice.randint(9000, 14000), []
        count = dice.randint(2, 24)
        for turn in range(count):
            reason = "first_request" if not turn else "prefix_changed" if dice.random() < 0.06 else None
            rate = 0 if reason else dice.uniform(0.9, 0.99) if dice.random() < 0.95 else 0.6
            turns.append([last - 31 * (count - turn - 1), tokens, int(tokens * rate), reason])
            tokens += dice.randint(200, 4000)
        one = {"session": session, "key": "alice", "model": model, "provider": provider, "last": last}
        data["sessions"].append(dict(one, requests=count, turns=turns[-20:]))
    reasons = (
        ("prefix_changed", "tools"), ("moved", None), ("first_request", None), ("prefix_changed", 7), ("idle", None),
        ("no_session_value", None), ("unknown", None), ("prefix_changed", "instructions"), ("below_minimum", None),
    )  # fmt: skip
    for number, (reason, place) in enumerate(reasons):
        one = data["sessions"][number]
        row = {"ts": now - 200 * number - 9, "session": one["session"], "key": "alice", "model": one["model"]}
        row.update(target=used[0][2], miss_reason=reason, prefix_changed_at=place)
        tokens = 800 if reason == "below_minimum" else dice.randint(9000, 60000)
        data["misses"].append(dict(row, input_tokens=tokens, cached_tokens=tokens // 12))
    data["misses"][5]["session"] = None
    failed = ((502, "upstream_connection_error", 3), (504, "upstream_timeout", 3), (400, None, 1))
    for number, (status, error, which) in enumerate(failed):
        model, provider, url = used[which][:3]
        row = {"ts": now - 500 * number - 70, "id": f"req_{dice.getrandbits(96):024x}", "status": status}
        row.update(
            error=error, route="/responses", model=model, provider=provider, target=url, session=None, key="alice"
        )
        data["errors"].append(row)
    return dict(data, started=now - 2 * 3600, in_flight=6, saved=38.217, spent=12.341, key="alice")


def add_to(rows: List[Dict[str, Any]], names: Dict[str, Any], numbers: Dict[str, int]) -> None:
    """Add *numbers* to the row that bears *names*, which is made if it is not there."""
    row = next((one for one in rows if names.items() <= one.items()), None)
    if row is None:
        row = dict(names)
        rows.append(row)
    for name, number in numbers.items():
        row[name] = row.get(name, 0) + number


def hostile() -> Dict[str, Any]:
    """Every string that comes from outside is markup, and every unknown is null."""
    data: Dict[str, Any] = json.loads(json.dumps(busy()), object_hook=spoil)
    data["sessions"][1]["turns"] = []
    return data


def spoil(members: Dict[str, Any]) -> Dict[str, Any]:
    names = {
        "model",
        "provider",
        "target",
        "session",
        "key",
        "error",
        "id",
        "route",
        "miss_reason",
        "prefix_changed_at",
    }
    spoiled: Dict[str, Any] = {name: HOSTILE if name in names else value for name, value in members.items()}
    for turn in spoiled.get("turns", ()):
        turn[1:] = [None, None, HOSTILE]
    return spoiled


class StatusServer(http.server.ThreadingHTTPServer):
    """Serves the page, tickets and the stream; `show` sends new data to every stream that is open."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), StatusHandler)
        self.changed = threading.Condition()  # protects all that follows
        self.key: Optional[str] = None
        self.data, self.version = empty(), 0
        self.streams = 0  # open now
        self.opened = 0  # ever
        self.broken = False  # tickets are refused, streams end

    def __enter__(self) -> "StatusServer":
        self.thread = threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.thread.join(10)
        self.server_close()

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the resolver for the host's name
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    def show(self, data: Dict[str, Any]) -> None:
        with self.changed:
            self.data, self.version = data, self.version + 1
            self.changed.notify_all()

    def set(self, **members: Any) -> None:
        with self.changed:
            vars(self).update(members)
            self.changed.notify_all()

    def wait_for(self, condition: Callable[["StatusServer"], bool], what: str) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: condition(self), 10), what

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser closes connections as it likes."""


class StatusHandler(http.server.BaseHTTPRequestHandler):
    server: StatusServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two sends

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.path == "/":
            self.reply(200, plexus_lite.PAGE.encode(), plexus_lite.page_headers(plexus_lite.PAGE))
        elif self.path == "/status?ticket=t%201" and not self.server.broken:
            self.stream()
        else:
            self.reply(401, b'{"error": {"message": "no such ticket"}}')

    def do_POST(self) -> None:
        wanted = self.server.key and "Bearer " + self.server.key
        if self.server.broken:
            self.reply(503, b'{"error": {"message": "shutting down"}}')
        elif wanted and self.headers["Authorization"] != wanted:
            self.reply(401, b'{"error": {"message": "no such key"}}')
        else:
            self.reply(200, b'{"ticket": "t 1", "expires_in": 60}')

    def reply(self, status: int, body: bytes, fields: Any = ()) -> None:
        self.send_response(status)
        for name, value in [*fields, ("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def stream(self) -> None:
        self.close_connection = True
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        server, sent = self.server, -1
        server.set(streams=server.streams + 1, opened=server.opened + 1)
        try:
            while not self.is_gone() and not server.broken:
                if sent != server.version:
                    sent = server.version
                    self.wfile.write(b"event: status\ndata: " + json.dumps(server.data).encode() + b"\n\n")
        finally:
            server.set(streams=server.streams - 1)

    def is_gone(self) -> bool:
        readable = select.select([self.connection], [], [], 0.02)[0]
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)


# ---- What a page is measured by -----------------------------------------------------------------------------------

# The contrast of each text that is seen with what is behind it (WCAG 2.1, 1.4.3): [ratio, text, colours], worst first.
CONTRAST = r"""(() => {
  const light = colour => colour.match(/[\d.]+/g).slice(0, 3).map(part => part / 255)
    .map(part => part <= .04045 ? part / 12.92 : ((part + .055) / 1.055) ** 2.4)
    .reduce((total, part, place) => total + part * [.2126, .7152, .0722][place], 0);
  const opaque = colour => !/, 0\)$/.test(colour), found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walker.nextNode();) {
    const range = document.createRange();
    range.selectNodeContents(node);
    const parent = node.parentElement, box = range.getBoundingClientRect();
    if (!node.data.trim() || !box.width || !box.height || parent instanceof SVGElement) continue;
    let behind = parent;
    while (behind.parentElement && !opaque(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
    const colours = [getComputedStyle(parent).color, getComputedStyle(behind).backgroundColor];
    const [low, high] = colours.map(light).sort((one, other) => one - other);
    found.push([(high + .05) / (low + .05), node.data, colours.join(" on ")]);
  }
  return found.sort((one, other) => one[0] - other[0]);
})()"""
# The elements that reach beyond the window's right edge.
TOO_WIDE = """(() => {
  const edge = document.documentElement.clientWidth, wide = document.documentElement.scrollWidth > edge;
  const found = [...document.body.querySelectorAll("*")].filter(one => one.getBoundingClientRect().right > edge + .5);
  return (wide ? ["the page"] : []).concat(found.map(one => one.outerHTML.slice(0, 200)));
})()"""
STORED = "JSON.stringify([location.href, document.cookie, {...localStorage}, {...sessionStorage}, history.length])"
TEXT = "document.body.innerText"
STATE = "document.querySelector('#state').textContent"


class PageTest(unittest.TestCase):
    """One browser and one tab for all classes of this module; who serves the page is the subclass's business."""

    browser: Optional[Browser] = None
    tab: Tab
    url: str

    @classmethod
    def setUpClass(cls) -> None:
        if not HAS_BROWSER:
            raise unittest.SkipTest(NO_BROWSER)
        if PageTest.browser is None:
            unittest.addModuleCleanup(setattr, PageTest, "browser", None)
            PageTest.browser = enter(unittest.addModuleCleanup, Browser())
            PageTest.tab = enter(unittest.addModuleCleanup, PageTest.browser.tab())

    def open(self, url: str) -> None:
        self.url = url
        self.tab.resize(1200, 900)
        self.tab.open(url)

    def wait_for_state(self, state: str) -> None:
        self.tab.wait_for(f"{STATE}.startsWith({json.dumps(state)})")

    def wait_for_text(self, text: str) -> None:
        self.tab.wait_for(f"{TEXT}.includes({json.dumps(text)})")

    def assertQuiet(self, *but: str) -> None:
        """Nothing in the console, no violation of the policy, no request to another place."""
        self.assertEqual([], [one for one in self.tab.trouble() if not any(known in one for known in but)])
        elsewhere = [url for url in self.tab.requested() if not url.startswith((self.url, "data:,"))]
        self.assertEqual([], elsewhere)

    def assertReadable(self) -> None:
        """Contrast AA in both schemes, nothing beyond the edge from a phone to a desktop."""
        for scheme in ("light", "dark"):
            for width in (360, 1200):
                with self.subTest(scheme=scheme, width=width):
                    self.tab.resize(width, 800, scheme)
                    self.assertEqual([], self.tab.run(TOO_WIDE))
                    found = self.tab.run(CONTRAST)
                    self.assertGreater(len(found), 20)
                    self.assertGreaterEqual(found[0][0], 4.5, found[0])


class ScriptedTest(PageTest):
    """The page before a server whose data the test writes."""

    def setUp(self) -> None:
        self.server = enter(self.addCleanup, StatusServer())

    def show(self, data: Dict[str, Any]) -> None:
        self.server.show(data)
        self.open(self.server.url)
        self.wait_for_state("live")

    def wait_for_streams(self, count: int) -> None:
        self.server.wait_for(lambda server: server.streams == count, f"{count} streams")

    def click(self, selector: str) -> None:
        self.tab.run(f"document.querySelector({json.dumps(selector)}).click()")

    def test_empty_page_says_what_to_do(self):
        self.show(empty())
        for text in (f"point a client at {self.server.url}v1", "No model", "No session yet", "No miss", "No error"):
            self.wait_for_text(text)
        self.assertNotIn("NaN", self.tab.run(TEXT))
        self.assertReadable()
        self.assertQuiet()

    def test_busy_page_shows_it_all(self):
        data = busy()
        self.show(data)
        recent = [one for one in data["minutes"] if one[0] > data["now"] - 300]
        rate = 100 * sum(one[3] for one in recent) / sum(one[2] for one in recent)
        for text in (f"{rate:.1f}\u00a0%", "38.22", "12.34 spent",
                     "gpt-5.4-mini", "http://gpu2:8000/v1", "cooling, ", "healthy",
                     "5feceb66ffc8", "input item 7, the first", "tools, the first", "it went to another target",
                     "502 upstream_connection_error", data["errors"][0]["id"], "seen by key alice"):  # fmt: skip
            self.assertIn(text, self.tab.run(TEXT))
        self.assertNotRegex(self.tab.run(TEXT), "NaN|undefined|null|No request yet")
        drawn = self.tab.run("[...document.querySelectorAll('svg')].map(one => one.querySelectorAll('rect').length)")
        rows = [data["minutes"], *(one["turns"] for one in data["sessions"])]
        self.assertEqual([2 * len(one) for one in rows], drawn)
        self.assertReadable()
        self.assertQuiet()

    def test_plot_has_a_text_and_every_turn_too(self):
        data = busy()
        data["sessions"] = [dict(data["sessions"][0], turns=[[data["now"], 2000, 1500, "prefix_changed"]])]
        self.show(data)
        label = self.tab.run("document.querySelector('figure svg').getAttribute('aria-label')")
        self.assertRegex(label, r"% of [\d.]+M input tokens came from the cache; the worst minute was \d\d:\d\d with 4")
        turns = self.tab.run("document.querySelector('.turns summary').getAttribute('aria-label')")
        self.assertRegex(turns, "^turns: 1, the last at .*75.0\u00a0%, 1.5K of 2K, prefix_changed$")

    def test_page_follows_the_stream(self):
        data = busy()
        self.show(data)
        self.server.show(dict(data, in_flight=4711))
        self.wait_for_text("4.71K")
        self.assertEqual(1, self.server.opened)

    def test_update_keeps_focus_and_what_is_unfolded(self):
        data = busy()
        self.show(data)
        self.tab.run("document.querySelectorAll('.turns summary')[2].focus()")
        self.tab.press("Enter")
        session = data["sessions"][2]["session"]
        opened = "document.querySelector('.turns[open]').closest('tr').dataset.row"
        self.tab.wait_for("document.querySelector('.turns[open]')")
        first = dict(data["sessions"][2], requests=4711)  # its next turn brings it to the top
        self.server.show(dict(data, sessions=[first] + data["sessions"][:2] + data["sessions"][3:]))
        self.wait_for_text("4.71K")
        self.assertIn(session, self.tab.run("document.querySelector('tbody .turns').closest('tr').dataset.row"))
        self.assertIn(session, self.tab.run(opened))
        self.assertIn(session, self.tab.run("document.activeElement.closest('tr').dataset.row"))

    def test_long_table_unfolds_by_keyboard(self):
        self.show(busy())
        shown = "[...document.querySelectorAll('.more + table')][0].querySelectorAll('tbody tr').values()"
        count = f"[...{shown}].filter(row => row.checkVisibility()).length"
        self.assertEqual(8, self.tab.run(count))
        self.tab.run("document.querySelector('.more summary').focus()")
        self.tab.press("Enter")
        self.assertEqual(14, self.tab.run(count))

    def test_hostile_strings_stay_text(self):
        self.show(hostile())
        self.assertEqual(0, self.tab.run("document.querySelectorAll('img, td script, th script, b').length"))
        self.assertIn("warm?", self.tab.run("document.title"))
        self.assertEqual(HOSTILE, self.tab.run("document.querySelector('tbody th').textContent"))
        self.assertGreater(self.tab.run(TEXT).count(HOSTILE), 40)
        self.assertReadable()
        self.assertQuiet()

    def test_name_cannot_turn_its_neighbours_round(self):
        data = busy()
        data["sessions"][0]["model"] = "gpt\u202e\u2066x"
        self.show(data)
        self.assertIn("gpt\ufffd\ufffdx, ", self.tab.run(TEXT))

    def test_what_would_be_injected_does_not_run(self):
        """The policy itself: without it a mistake in the page would be an open door."""
        self.show(empty())
        for attempt in (
            "document.body.innerHTML += '<i></i>'",
            "document.body.append(Object.assign(document.createElement('script'), {text: 'document.title = 3'}))",
            "fetch('http://attacker.test/').catch(() => {})",
            "document.body.setAttribute('style', 'color: red')",
            "document.body.append(Object.assign(document.createElement('img'), {src: '/pixel'}))",
        ):
            with self.subTest(attempt):
                before = len(self.tab.trouble())
                self.tab.run(f"try {{ {attempt} }} catch (error) {{ }} document.title")
                self.tab.wait(lambda: len(self.tab.trouble()) > before, "no violation")  # noqa: B023
        self.assertIn("warm?", self.tab.run("document.title"))

    def test_pause_closes_the_stream_and_resume_opens_it(self):
        self.show(busy())
        self.wait_for_streams(1)
        self.click("#pause")
        self.wait_for_streams(0)
        self.assertEqual(["paused", "Resume"], self.tab.run(f"[{STATE}, document.querySelector('#pause').textContent]"))
        self.server.show(dict(busy(), in_flight=4711))
        self.click("#pause")
        self.wait_for_text("4.71K")
        self.wait_for_streams(1)

    def test_hidden_tab_closes_the_stream(self):
        self.show(busy())
        self.wait_for_streams(1)
        with self.tab.hidden():
            self.wait_for_streams(0)
        self.wait_for_streams(1)
        self.click("#pause")
        with self.tab.hidden():
            pass
        self.assertEqual("paused", self.tab.run(STATE))  # by hand, not by being hidden

    def test_lost_connection_is_said_and_found_again(self):
        self.show(busy())
        self.tab.run("retry_s = .05")
        self.server.set(broken=True)
        self.wait_for_state("connection lost")
        self.wait_for_state("connection lost (shutting down)")
        self.server.set(broken=False)
        self.wait_for_state("live")
        self.assertEqual(2, self.server.opened)
        self.assertQuiet("503", "ERR_INCOMPLETE_CHUNKED_ENCODING")

    def test_key_is_asked_for_and_kept_nowhere(self):
        self.server.set(key=KEY)
        self.open(self.server.url)
        before = self.tab.run(STORED)
        self.wait_for_state("a key is needed")
        for key, wanted in (("sk-wrong", "This key is not known here."), (KEY, "point a client at")):
            self.tab.wait_for("document.activeElement.id === 'key'")
            self.tab.type(key)
            self.tab.press("Enter")
            self.wait_for_text(wanted)
        self.assertFalse(self.tab.run("document.querySelector('#ask').checkVisibility()"))
        self.assertEqual(before, self.tab.run(STORED))
        self.assertNotIn(KEY, self.tab.run("document.documentElement.outerHTML"))
        self.assertEqual([], [url for url in self.tab.requested() if KEY in url])
        self.assertEqual("", self.tab.run("document.querySelector('#key').value"))
        self.assertQuiet("401")

    def test_key_that_was_withdrawn_is_asked_for_again(self):
        self.show(busy())
        self.tab.run("retry_s = .05")
        self.server.set(key=KEY, broken=True)
        self.wait_for_state("connection lost")
        self.server.set(broken=False)
        self.wait_for_state("a key is needed")
        self.assertFalse(self.tab.run("document.querySelector('#view').checkVisibility()"))


class ProxyTest(PageTest):
    """The page and its data from the real proxy, in front of the demo upstream."""

    def test_page_follows_a_session_turn_by_turn(self):
        config = {
            "keys": {"team": {"secret": KEY, "admin": True}},
            "providers": {"demo": {"api_base_url": "demo://", "models": ["*"]}},
        }
        proxy = enter(self.addCleanup, Proxy(config))

        def turn(text: str) -> None:
            body = {"model": HOSTILE, "input": text, "prompt_cache_key": "s"}
            self.assertEqual(200, post(proxy.port, "/v1/responses", body, key=KEY).status)

        self.open(f"http://127.0.0.1:{proxy.port}/")
        self.wait_for_state("a key is needed")
        self.tab.type(KEY)
        self.tab.press("Enter")
        self.wait_for_text("point a client at")
        turn("word " * 2000)
        self.wait_for_text("first_request")
        self.tab.wait_for("document.querySelector('.turns summary').ariaLabel.startsWith('turns: 1,')")
        turn("word " * 2000)
        self.tab.wait_for("document.querySelector('.turns summary').ariaLabel.startsWith('turns: 2,')")
        self.assertIn("100.0\u00a0%", self.tab.run("document.querySelector('.turns summary').ariaLabel"))
        self.assertIn("50.0\u00a0%", self.tab.run("document.querySelector('.tiles').innerText"))
        self.assertEqual(HOSTILE, self.tab.run("document.querySelector('tbody th').textContent"))
        self.assertQuiet("401")
        self.assertEqual(404, post(proxy.port, "/v1/nowhere", {}, key=KEY).status)
        self.wait_for_text("404 not_found")
        self.assertScriptIsTrue(self.tab.run("latest"))

    def assertScriptIsTrue(self, data: Dict[str, Any]) -> None:
        """What the other tests show has the shape of what the proxy sends."""
        script = busy()
        self.assertEqual(set(), set(script) - set(data))
        self.assertEqual(set(), set(script["totals"]) - set(data["totals"]))
        # A test that runs over the end of a minute has two of them.
        self.assertEqual({len(script["minutes"][0])}, {len(one) for one in data["minutes"]})
        for name in ("models", "targets", "sessions", "misses", "errors"):
            with self.subTest(name):
                self.assertEqual(set(script[name][0]), set(data[name][0]))


class HeadersTest(unittest.TestCase):
    """What can be said of the page without a browser."""

    def test_policy_names_the_page_s_own_style_and_script(self):
        page = "<style>a</style><script>b</script>"
        policy = dict(plexus_lite.page_headers(page))["Content-Security-Policy"].split("; ")
        for part in (
            "default-src 'none'",
            "style-src 'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='",
            "script-src 'sha256-PiPoFgA5WUoziU9lZOGxNIu9egCI1CxKy3PurtWcAJ0='",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ):
            self.assertIn(part, policy)
        self.assertNotIn("unsafe", str(policy))

    def test_page_is_one_file(self):
        page = plexus_lite.PAGE
        self.assertEqual([1, 1], [page.count("<style"), page.count("<script")])
        self.assertEqual([], re.findall(r"<[^>]+ (?:on\w+|style|src)=|innerHTML|@import|url\(|eval\(", page))
        self.assertEqual({"data:,"}, set(re.findall(r'href="([^"]*)"', page)))


def picture(path: str) -> None:
    """Write what a desktop shows of a busy proxy, down to the first rows of the long tables."""
    data = busy()
    short = {name: data[name][:rows] for name, rows in (("sessions", 3), ("misses", 2))}
    with Browser() as browser, StatusServer() as server, browser.tab() as tab:
        server.show(dict(data, **short))
        tab.resize(1200, 900)
        tab.open(server.url)
        tab.wait_for(STATE + " === 'live'")
        tab.resize(
            1200, tab.run("Math.floor(document.querySelector('section:last-child').getBoundingClientRect().top)")
        )
        tab.picture(path)


def pictures(folder: str) -> None:
    """Write each state of the page, light and dark, wide and narrow, as a whole."""
    with Browser() as browser, StatusServer() as server, browser.tab() as tab:
        for name, data in (("empty", empty()), ("busy", busy()), ("hostile", hostile()), ("key", None)):
            server.set(key=None if data else KEY)
            server.show(data or empty())
            tab.open(server.url)
            tab.wait_for(f"/live|needed/.test({STATE})")
            for scheme in ("light", "dark"):
                for width, height in ((1200, 900), (360, 740)):
                    tab.resize(width, height, scheme)
                    tab.picture(os.path.join(folder, f"{name}_{scheme}_{width}.png"), whole=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["picture"]:
        picture(os.path.join(os.path.dirname(os.path.abspath(__file__)), "status_page.png"))
    elif len(sys.argv) == 2:
        pictures(sys.argv[1])
    else:
        unittest.main()
