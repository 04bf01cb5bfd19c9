"""A headless Chromium for the tests, driven by its DevTools protocol over a pair of pipes.

    with Browser() as browser, browser.tab() as tab:
        tab.open("http://127.0.0.1:4000/")
        tab.wait_for("document.title")

Each tab has a browser context of its own: cookies and storage of one test are not those of the next.
"""

import base64
import contextlib
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HAS_BROWSER = bool(CHROMIUM) and hasattr(os, "killpg")
NO_BROWSER = "no Chromium here (Debian: apt install chromium)"
OPTIONS = (
    ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--no-proxy-server")
    + ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions")
    + ("--disable-dev-shm-usage", "--host-resolver-rules=MAP *.test 127.0.0.1")
)
WAIT_S = 10.0
# Chromium reads commands on descriptor 3 and writes answers and events on 4; each ends with a NUL.
PIPES = 'exec "$@" 3<&0 4>&1 0</dev/null 1>/dev/null'


def start_chromium(folder: str, arguments: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start Chromium with its profile in *folder*, as the head of a session of its own."""
    command = [str(CHROMIUM), *OPTIONS, "--user-data-dir=" + folder, *arguments]
    if "stdin" in options:
        command = ["/bin/sh", "-c", PIPES, "sh", *command]
    streams = dict({"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}, **options)
    environment = dict(os.environ, HOME=folder)
    return subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL, start_new_session=True, **streams)


def stop_chromium(process: "subprocess.Popen[bytes]", folder: str) -> None:
    os.killpg(process.pid, signal.SIGKILL)  # its own session: the browser and the processes it started
    process.wait(10)
    shutil.rmtree(folder, ignore_errors=True)


class Browser:
    """One Chromium, from `__enter__` to `__exit__`."""

    def __init__(self) -> None:
        self.changed = threading.Condition()  # protects all that follows
        self.events: List[Dict[str, Any]] = []
        self.answers: Dict[int, Dict[str, Any]] = {}
        self.sent = 0
        self.ended = False

    def __enter__(self) -> "Browser":
        self.folder = tempfile.mkdtemp(prefix="plexus-browser-")
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = start_chromium(self.folder, ["--remote-debugging-pipe"], **pipes)
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()
        return self

    def __exit__(self, *exc: object) -> None:
        stop_chromium(self.process, self.folder)
        self.reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe:
                pipe.close()

    def _read(self) -> None:
        assert self.process.stdout
        rest = b""
        while True:
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            *messages, rest = (rest + data).split(b"\0")
            with self.changed:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self.answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self.ended = not data
                self.changed.notify_all()
                if self.ended:
                    return

    def call(self, method: str, session: Optional[str] = None, **parameters: Any) -> Dict[str, Any]:
        """Send one command and return its result."""
        with self.changed:
            self.sent += 1
            number = self.sent
            message = {"id": number, "method": method, "params": parameters}
            if session:
                message["sessionId"] = session
            assert self.process.stdin
            self.process.stdin.write(json.dumps(message).encode() + b"\0")
            self.process.stdin.flush()
            self.changed.wait_for(lambda: number in self.answers or self.ended, WAIT_S)
            answer = self.answers.pop(number, None)
        assert answer is not None, f"{method}: no answer"
        assert "error" not in answer, f"{method}: {answer}"
        result: Dict[str, Any] = answer["result"]
        return result

    def tab(self) -> "Tab":
        return Tab(self)


class Tab:
    """A context of its own with one page; what `events` and its kin return began with the last `open`."""

    def __init__(self, browser: Browser) -> None:
        self.browser = browser

    def __enter__(self) -> "Tab":
        self.context = self.browser.call("Target.createBrowserContext")["browserContextId"]
        created = self.browser.call("Target.createTarget", url="about:blank", browserContextId=self.context)
        attached = self.browser.call("Target.attachToTarget", targetId=created["targetId"], flatten=True)
        self.session: str = attached["sessionId"]
        self.opened = 0
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        self.call("Page.setLifecycleEventsEnabled", enabled=True)
        self.call("Emulation.setScrollbarsHidden", hidden=True)  # as on a phone, and for pictures
        return self

    def __exit__(self, *exc: object) -> None:
        self.browser.call("Target.disposeBrowserContext", browserContextId=self.context)

    def call(self, method: str, **parameters: Any) -> Dict[str, Any]:
        return self.browser.call(method, self.session, **parameters)

    def events(self, *methods: str) -> List[Dict[str, Any]]:
        """Return the parameters of the page's events so far that are called one of *methods*."""
        with self.browser.changed:
            found = [one for one in self.browser.events[self.opened :] if one.get("sessionId") == self.session]
        return [one["params"] for one in found if one["method"] in methods]

    def trouble(self) -> List[str]:
        """Return every error and warning: exceptions, console.error, refused resources, policy violations."""
        found = [json.dumps(one["entry"]) for one in self.events("Log.entryAdded")]
        found += [json.dumps(one["exceptionDetails"]) for one in self.events("Runtime.exceptionThrown")]
        return found + [json.dumps(one["args"]) for one in self.events("Runtime.consoleAPICalled")]

    def requested(self) -> List[str]:
        """Return the URLs of all requests so far."""
        return [one["request"]["url"] for one in self.events("Network.requestWillBeSent")]

    def open(self, url: str) -> None:
        loader = self.call("Page.navigate", url=url)["loaderId"]
        loaded = {"loaderId": loader, "name": "load"}.items()
        self.wait(lambda: any(loaded <= one.items() for one in self.events("Page.lifecycleEvent")), url)
        with self.browser.changed:  # what came before is of the page before
            while self.browser.events[self.opened]["params"].get("frame", {}).get("loaderId") != loader:
                self.opened += 1

    def wait(self, condition: Callable[[], Any], what: str) -> None:
        with self.browser.changed:
            assert self.browser.changed.wait_for(condition, WAIT_S), what

    def run(self, script: str) -> Any:
        """Return the value of *script*; a promise is waited for."""
        options = {"returnByValue": True, "awaitPromise": True, "userGesture": True}
        result = self.call("Runtime.evaluate", expression=script, **options)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until *script* is true, looking at every change of the page."""
        came = self.run(
            f"""new Promise(done => {{
                const look = () => {{ if ({script}) finish(true); }};
                const watch = new MutationObserver(look), limit = setTimeout(() => finish(false), {WAIT_S * 900});
                const finish = came => {{ watch.disconnect(); clearTimeout(limit); done(came); }};
                watch.observe(document, {{subtree: true, childList: true, attributes: true, characterData: true}});
                look();
            }})"""
        )
        assert came, f"never true: {script}; the page says: {self.run('document.body.innerText')}"

    @contextlib.contextmanager
    def hidden(self) -> Iterator[None]:
        """Let another tab of the same window be seen meanwhile."""
        turned = """new Promise(done => {
            const look = () => document.hidden === %s && done();
            document.addEventListener("visibilitychange", look);
            look();
        })"""
        other = self.browser.call("Target.createTarget", url="about:blank", browserContextId=self.context)
        self.run(turned % "true")
        yield
        self.browser.call("Target.closeTarget", targetId=other["targetId"])
        self.run(turned % "false")

    def press(self, key: str) -> None:
        codes = {"Tab": 9, "Enter": 13, " ": 32}
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            named = {"key": key, "code": {" ": "Space"}.get(key, key), "windowsVirtualKeyCode": codes[key]}
            self.call("Input.dispatchKeyEvent", type=kind, text=text if kind == "keyDown" else "", **named)

    def type(self, text: str) -> None:
        self.call("Input.insertText", text=text)

    def resize(self, width: int, height: int, scheme: str = "light") -> None:
        metrics = {"deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, **metrics)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])

    def picture(self, path: str, whole: bool = False) -> Tuple[int, int]:
        """Write what is to be seen, or the *whole* page, to *path* as PNG; return its width and height."""
        data = base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"])
        with open(path, "wb") as file:
            file.write(data)
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
