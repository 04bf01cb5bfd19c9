"""Web pages against a proxy without keys, with a real headless Chromium: what a browser really sends.

One browser visits three pages, one after the other; each tries everything and reports what it could do:

    http://attacker.test    another site: may neither spend tokens nor read anything
    http://rebind.test      a name that first led to the attacker's server and now leads to the proxy (DNS rebinding)
    http://127.0.0.1        a page on this machine: may use the proxy
"""

import http.server
import json
import socketserver
import tempfile
import threading
import unittest
import urllib.request
from typing import Any, Dict, List, Optional

from tests.browser import HAS_BROWSER, NO_BROWSER, start_chromium, stop_chromium
from tests.support import FakeUpstream, Proxy, make_config

PAGES_LIMIT_S = 25.0  # for all three; they take about three seconds

# run(name, promise) notes "ok", what was read, or the error; next() reports and goes to the next page.
SCRIPT = """<!DOCTYPE html><html><body><script>
const proxy = "http://127.0.0.1:%(proxy)d", found = {}, running = [];
const body = JSON.stringify({model: "gpt-test", input: "spend tokens"});
function run(name, start) {
  const wait = new Promise((good, bad) => setTimeout(() => bad(new Error("timeout")), 4000));
  running.push(Promise.race([start(), wait]).then(value => { found[name] = String(value); },
                                                  error => { found[name] = "refused: " + error; }));
}
const text = {"Content-Type": "text/plain"}, json = {"Content-Type": "application/json"};
const status = answer => answer.text().then(got => answer.status + " " + got);
const loaded = tag => new Promise((good, bad) => { tag.onload = good; tag.onerror = bad; document.body.append(tag); });
function make(name, members) { return Object.assign(document.createElement(name), members); }
%(attempts)s
Promise.all(running)
  .then(() => fetch("/report", {method: "POST", body: JSON.stringify(found)}))
  .then(() => { const next = "%(next)s"; if (next) location = next; });
</script></body></html>"""

ATTACKER = """
for (const [kind, url] of [["", proxy], [" localhost", proxy.replace("127.0.0.1", "localhost")]]) {
  run("simple post" + kind, () => fetch(url + "/v1/responses", {method: "POST", mode: "no-cors", headers: text, body})
    .then(() => "sent"));
}
run("no-referrer post", () => fetch(proxy + "/v1/chat/completions",
  {method: "POST", mode: "no-cors", referrerPolicy: "no-referrer", headers: text, body}).then(() => "sent"));
run("beacon", async () =>
  navigator.sendBeacon(proxy + "/v1/responses/compact", new Blob([body], {type: "text/plain"})));
run("redirected post", () => fetch("/hop", {method: "POST", mode: "no-cors", headers: text, body}).then(() => "sent"));
run("readable post", () => fetch(proxy + "/v1/responses", {method: "POST", headers: json, body}).then(status));
run("form", () => {
  const form = make("form", {action: proxy + "/v1/responses", method: "post", enctype: "text/plain", target: "form"});
  form.append(make("input", {name: body.slice(0, -1) + ',"a":"', value: '"}'}));
  const done = loaded(make("iframe", {name: "form"}));
  document.body.append(form);
  form.submit();
  return done.then(() => "sent");
});
run("opaque origin", () => new Promise(good => {
  addEventListener("message", event => good(event.data));
  document.body.append(make("iframe", {sandbox: "allow-scripts", srcdoc: "<script>fetch('" + proxy +
    "/v1/responses', {method: 'POST', mode: 'no-cors', headers: {'Content-Type': 'text/plain'}, body: '" + body +
    "'}).then(() => 'sent', String).then(got => parent.postMessage(got, '*'))<" + "/script>"}));
}));
run("read models", () => fetch(proxy + "/v1/models").then(status));
run("script", () => loaded(make("script", {src: proxy + "/v1/models"})));
run("image", () => loaded(make("img", {src: proxy + "/v1/models"})));
run("frame", () => {
  const frame = make("iframe", {src: proxy + "/v1/models"});
  return loaded(frame).then(() => frame.contentDocument.body.innerText);
});
run("websocket", () => new Promise((good, bad) => {
  const socket = new WebSocket(proxy.replace("http", "ws") + "/v1/responses");
  socket.onopen = () => good("open"); socket.onerror = () => bad(new Error("closed"));
}));
"""
SAME_ORIGIN = """
run("models", () => fetch("/v1/models").then(status));
run("post", () => fetch("/v1/responses", {method: "POST", headers: json, body}).then(status));
run("text post", () => fetch("/v1/responses", {method: "POST", headers: text, body}).then(status));
"""
NEIGHBOUR = """
run("simple post", () => fetch(proxy + "/v1/responses", {method: "POST", mode: "no-cors", headers: text, body})
  .then(() => "sent"));
"""


class Site(http.server.ThreadingHTTPServer):
    """The pages' own server; what it does not know it hands to the proxy as it came: the rebound name."""

    daemon_threads = True

    def __init__(self, proxy_port: int) -> None:
        super().__init__(("127.0.0.1", 0), SiteHandler)
        self.proxy_port = proxy_port
        self.pages: Dict[str, str] = {}
        self.reports: Dict[str, Dict[str, str]] = {}
        self.changed = threading.Condition()  # protects reports

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask the resolver for the host's name
        self.server_name, self.server_port = "127.0.0.1", int(self.server_address[1])

    def url(self, host: str) -> str:
        return f"http://{host}:{self.server_port}/page"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser closes connections as it likes."""


class SiteHandler(http.server.BaseHTTPRequestHandler):
    server: Site

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        host = (self.headers["Host"] or "").split(":")[0]
        if self.path == "/page":
            self.reply(200, [("Content-Type", "text/html")], self.server.pages[host].encode())
        else:
            self.hand_on(None)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        if self.path == "/hop":
            self.reply(307, [("Location", f"http://127.0.0.1:{self.server.proxy_port}/v1/responses")], b"")
        elif self.path == "/report":
            with self.server.changed:
                self.server.reports[(self.headers["Host"] or "").split(":")[0]] = json.loads(body)
                self.server.changed.notify_all()
            self.reply(200, [], b"")
        else:
            self.hand_on(body)

    def hand_on(self, body: Optional[bytes]) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.server.proxy_port}{self.path}", body)
        for name, value in self.headers.items():  # Host among them: the proxy sees the name that was rebound
            request.add_unredirected_header(name, value)
        opener = urllib.request.OpenerDirector()
        opener.add_handler(urllib.request.HTTPHandler())
        with opener.open(request, timeout=10) as answer:
            self.reply(answer.status, [("Content-Type", "application/json")], answer.read())

    def reply(self, status: int, headers: List[Any], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers + [("Content-Length", str(len(body)))]:
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def browse(site: Site, pages: int) -> None:
    """Open the first page and wait until *pages* of them have reported."""
    folder = tempfile.mkdtemp(prefix="plexus-browser-")
    browser = start_chromium(folder, [site.url("attacker.test")])
    try:
        with site.changed:
            site.changed.wait_for(lambda: len(site.reports) >= pages or browser.poll() is not None, PAGES_LIMIT_S)
    finally:
        stop_chromium(browser, folder)


@unittest.skipUnless(HAS_BROWSER, NO_BROWSER)
class BrowserTest(unittest.TestCase):
    """The pages are visited once; each test looks at one of them."""

    reports: Dict[str, Dict[str, str]]  # by the page's host
    records: List[Dict[str, Any]]
    reached_upstream: List[str]

    @classmethod
    def setUpClass(cls) -> None:
        attempts = {"attacker.test": ATTACKER, "rebind.test": SAME_ORIGIN, "127.0.0.1": SAME_ORIGIN + NEIGHBOUR}
        with FakeUpstream() as upstream, Proxy(make_config(upstream, keys=None)) as proxy, Site(proxy.port) as site:
            following = [site.url(host) for host in list(attempts)[1:]] + [""]
            for host, next_page in zip(attempts, following):
                site.pages[host] = SCRIPT % {"proxy": proxy.port, "attempts": attempts[host], "next": next_page}
            serving = threading.Thread(target=site.serve_forever, args=(0.05,), daemon=True)
            serving.start()
            try:
                browse(site, len(attempts))
            finally:
                site.shutdown()
                serving.join(10)
            cls.reports = site.reports
            cls.reached_upstream = [request.body.decode() for request in upstream.requests]
        cls.records = proxy.log_records()  # complete, now that the proxy has ended

    def test_pages_ran(self):
        """Without this, the tests below could pass because nothing was tried."""
        self.assertEqual(["attacker.test", "rebind.test", "127.0.0.1"], list(self.reports))
        sent = self.reports["attacker.test"]
        for name in (
            "simple post",
            "simple post localhost",
            "no-referrer post",
            "redirected post",
            "opaque origin",
            "form",
        ):
            self.assertEqual("sent", sent[name], name)
        self.assertEqual("true", sent["beacon"])

    def test_page_of_another_site_spends_no_tokens(self):
        """Only the posts of the page on this machine got through, though all of the attacker's arrived."""
        refused = [one for one in self.records if one["method"] == "POST" and one["error"] == "forbidden_origin"]
        self.assertEqual({403}, {one["status"] for one in refused})
        attacks = 7 + 2  # the seven of test_pages_ran, two of the rebound name
        self.assertEqual(attacks, len(refused))
        self.assertEqual({"/responses", "/responses/compact", "/chat/completions"}, {one["route"] for one in refused})
        self.assertEqual(3, len(self.reached_upstream), self.reached_upstream)
        served = [one for one in self.records if one["method"] == "POST" and one["status"] == 200]
        self.assertEqual(3, len(served))

    def test_page_of_another_site_reads_nothing(self):
        for name in ("read models", "readable post", "script", "image", "frame", "websocket"):
            self.assertTrue(self.reports["attacker.test"][name].startswith("refused: "), name)
        self.assertNotIn("gpt-test", json.dumps(self.reports["attacker.test"]))

    def test_rebound_name_is_refused(self):
        """To the browser this page and the proxy are one site, so that only Host and Origin tell."""
        for name in ("models", "post", "text post"):
            answer = self.reports["rebind.test"][name]
            self.assertTrue(answer.startswith("403 "), answer)
            self.assertEqual("forbidden_origin", json.loads(answer[4:])["error"]["code"], name)

    def test_page_on_this_machine_may(self):
        report = self.reports["127.0.0.1"]
        self.assertEqual("sent", report["simple post"])
        for name in ("models", "post", "text post"):
            self.assertTrue(report[name].startswith("200 "), report[name])
            self.assertIn("gpt-test", report[name])


if __name__ == "__main__":
    unittest.main()
