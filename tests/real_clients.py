"""Real clients, once straight to a fake upstream and once through plexus_lite.py: nothing may be lost on the way.

    python -m tests.real_clients                  all clients
    python -m tests.real_clients pi codex-0.120   those whose name contains one of the words
    python -m tests.real_clients --direct         the second run is direct, too: are the comparisons themselves sound?

The clients come from npm and PyPI into $PLEXUS_CLIENTS_DIR (else a folder in the temporary directory) and stay there.
One that cannot be installed is named and skipped; exit code 1 means that one which runs lost a header, a byte or an
answer.  `python -m unittest` does not run this file.

The proxy has two providers, so that the model in the body decides, compressed or not; the clients that compress
with zstd come a second time, with aliases that rename their models.  Two comparisons are made for each client:

    client --> tap --> plexus_lite.py --> fake upstream
               what the client sent against what arrived, within one run: byte by byte, except what the contract changes
    client --> fake upstream
               what the client sent in this run against the other one: the same, once ids, times and ports are masked
"""

import base64
import contextlib
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Tuple

from tests import support
from tests.support import Answer, FakeUpstream, Proxy, Recorded, Reply, Wire

CACHE = os.environ.get("PLEXUS_CLIENTS_DIR") or os.path.join(tempfile.gettempdir(), "plexus-clients")
INSTALL_LIMIT_S = 240
TURN_LIMIT_S = 60
MODELS = ["gpt-5.5", "gpt-test"]
RENAMED = "renamed-"  # an alias' upstream has the model under its name with this before it
FINAL_TEXT = "Final text ✓ number "  # not ASCII: a chunk border or a recoding would show
ACCOUNT = {"chatgpt_account_id": "acct-1", "chatgpt_plan_type": "plus", "chatgpt_user_id": "user-1"}

# What the proxy may change, said again here and not imported from it: a test must not share its mistakes.
HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
REBUILT = HOP_BY_HOP | {"host", "content-length", "expect"}
CREDENTIALS = {"authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization"}
CREDENTIALS |= {"chatgpt-account-id", "openai-organization", "openai-project"}
SESSION = ["session-id", "session_id", "x-claude-code-session-id", "x-session-id", "x-session-affinity"]
SESSION += ["x-opencode-session", "x-grok-conv-id", "x-multi-turn-session-id"]
ANSWER_ADDITIONS = {"date", "cache-control", "x-accel-buffering", "x-plexus-request-id"}

Pairs = List[Tuple[str, str]]
Commands = Tuple[List[List[str]], Dict[str, str]]  # of one session, and the environment they need


class Skip(Exception):
    """The client cannot be run here; the message says why."""


@dataclass
class Client:
    """A real client: how to get it, and the commands of one session of two or more turns."""

    name: str
    install: Callable[[], Tuple[str, str]]  # -> folder, version
    prepare: Callable[[str, str, str, str], Commands]  # (folder, home, origin, origin of the account's backend)
    tool: str  # the name of the tool that runs a command,
    argument: str  # and of its argument
    is_renamed: bool = False  # aliases rename the models; its bodies must be zstd


@dataclass
class Run:
    """What one session left behind."""

    sent: List[Recorded]  # as the client put it on the wire
    printed: List[Tuple[int, str]]  # exit code and stdout of each command
    differences: List[str] = field(default_factory=list)


# ---- The clients ------------------------------------------------------------------------------------------------


def run_bounded(command: Sequence[str], limit: float, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit, **options)


def install(folder: str, marker: str, commands: Sequence[Sequence[str]]) -> str:
    """Return the path of *folder* in the cache, filled by *commands* unless *marker* in it says that it was."""
    path = os.path.join(CACHE, folder)
    if not os.path.exists(os.path.join(path, marker)):
        os.makedirs(path, exist_ok=True)
        for command in commands:
            try:
                done = run_bounded([part.replace("{}", path) for part in command], INSTALL_LIMIT_S)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise Skip(str(error)) from error
            if done.returncode:
                lines = done.stderr.decode("utf-8", "replace").split("\n")
                raise Skip(" / ".join([line for line in lines if re.search(r"(?i)error", line)][:3]))
        if not os.path.exists(os.path.join(path, marker)):
            raise Skip(f"{marker} is missing after the installation")
    return path


def npm(folder: str, package: str, version: str, *others: str) -> Callable[[], Tuple[str, str]]:
    def get() -> Tuple[str, str]:
        program = shutil.which("npm")
        if not program:
            raise Skip("npm is missing")
        marker = f"node_modules/{package}/package.json"
        command = [program, "install", "--prefix", "{}", "--no-audit", "--no-fund", "--fetch-retries=1"]
        path = install(folder, marker, [[*command, f"{package}@{version}", *others]])
        with open(os.path.join(path, marker), encoding="utf-8") as file:
            return path, str(json.load(file)["version"])

    return get


def openai_python() -> Tuple[str, str]:
    note_version = "import openai, sys; open(sys.argv[1], 'w').write(openai.__version__)"
    create, fill = [sys.executable, "-m", "venv", "{}"], ["{}/bin/pip", "install", "--quiet", "openai"]
    finish = ["{}/bin/python", "-c", note_version, "{}/installed"]
    path = install("openai-py", "installed", [create, fill, finish])
    with open(os.path.join(path, "installed")) as file:
        return path, file.read()


def account_token() -> str:
    """A token of the shape that clients signed in to an account have; its signature is checked by nobody."""
    claims = {"email": "user@example.invalid", "exp": 4102444800, "https://api.openai.com/auth": ACCOUNT}
    parts = [json.dumps(part).encode() for part in ({"alg": "none"}, claims)] + [b"none"]
    return ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)


def write(path: str, text: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


def codex(signed_in: bool) -> Callable[[str, str, str, str], Commands]:
    def prepare(folder: str, home: str, origin: str, backend: str) -> Commands:
        token = account_token()
        settings = {"model": "gpt-5.5", "approval_policy": "never", "sandbox_mode": "danger-full-access"}
        settings["chatgpt_base_url"] = backend + "/backend-api"
        if signed_in:  # the built-in provider, with the account's token: bodies are zstd
            settings["openai_base_url"] = origin + "/backend-api/codex"
            tokens = {"id_token": token, "access_token": token, "refresh_token": "none", "account_id": "acct-1"}
            auth = {"auth_mode": "chatgpt", "tokens": tokens, "last_refresh": "2099-01-01T00:00:00Z"}
            write(home + "/auth.json", json.dumps(auth))
        else:
            settings["model_provider"] = "fake"
            provider = {"name": "Fake", "base_url": origin + "/v1", "wire_api": "responses", "env_key": "FAKE_KEY"}
            settings.update({"model_providers.fake." + key: value for key, value in provider.items()})
        lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
        lines += ["check_for_update_on_startup = false", "analytics.enabled = false", 'otel.exporter = "none"']
        lines += [] if signed_in else ["model_providers.fake.supports_websockets = true"]
        write(home + "/config.toml", "\n".join(lines))
        run = [folder + "/node_modules/.bin/codex", "exec", "--skip-git-repo-check"]
        commands = [[*run, "Please run the tool"], [*run, "resume", "--last", "And a second turn"]]
        return commands, {"CODEX_HOME": home, "FAKE_KEY": token}

    return prepare


def pi(package: str, api: str) -> Callable[[str, str, str, str], Commands]:
    def prepare(folder: str, home: str, origin: str, backend: str) -> Commands:
        provider = {"baseUrl": origin + "/v1", "api": api, "apiKey": account_token()}
        models = {"providers": {"fake": dict(provider, models=[{"id": "gpt-test", "reasoning": True}])}}
        write(home + "/.pi/agent/models.json", json.dumps(models))
        run = [folder + "/node_modules/node/bin/node", folder + f"/node_modules/{package}/dist/cli.js"]
        run += ["--provider", "fake", "--model", "gpt-test", "--print"]
        commands = [[*run, "Please run the tool"], [*run, "--continue", "And a second turn"]]
        return commands, {"PI_OFFLINE": "1", "PI_TELEMETRY": "0"}

    return prepare


SDK_SESSION = """
import json, os, subprocess, sys
import openai

client = openai.OpenAI(base_url=sys.argv[1], api_key=os.environ["FAKE_KEY"], organization="org-1", project="proj-1")
parameters = {"type": "object", "properties": {"cmd": {"type": "string"}}}
tools = [{"type": "function", "name": "run", "parameters": parameters}]
key = {"model": "gpt-test", "prompt_cache_key": "conversation 1", "tools": tools}

with client.responses.stream(input="Please run the tool", **key) as stream:
    for event in stream:
        print(event.type)
    call = stream.get_final_response().output[0]
output = subprocess.check_output(json.loads(call.arguments)["cmd"], shell=True).decode()
history = [{"role": "user", "content": "Please run the tool"}, call.model_dump(exclude_none=True),
           {"type": "function_call_output", "call_id": call.call_id, "output": output}]
print(client.responses.create(input=history, **key).output_text)

own = {"session_id": "own-session", "X-Client-Request-Id": "own-request", "x-own": 'a,  "b"; c=%20'}
raw = client.responses.with_raw_response.create(model="gpt-test", input="raw", extra_headers=own)
print(raw.status_code, raw.headers.get("x-request-id"), raw.headers.get_list("x-twice"), raw.parse().output_text)

for event in client.responses.create(input="no header, no key", model="gpt-test", stream=True):
    print(event.type, getattr(event, "delta", ""))

stream = client.responses.create(input="CANCEL", stream=True, **key)
print(next(iter(stream)).type)
stream.close()
print(client.responses.create(input="CANCELLED?", **key).output_text)
"""


def sdk(folder: str, home: str, origin: str, backend: str) -> Commands:
    write(home + "/session.py", SDK_SESSION)
    return [[folder + "/bin/python", home + "/session.py", origin + "/v1"]], {"FAKE_KEY": account_token()}


CODEX, PI_OLD, PI_NEW = "@openai/codex", "@mariozechner/pi-coding-agent", "@earendil-works/pi-coding-agent"
CODEX_OLD = npm("codex-0.120.0", CODEX, "0.120.0")
# 0.87.1 compresses its bodies with zstd.  Each pi has a node of its own: that of the system is often too old for it.
PI_API, PI_CODEX_API = "openai-responses", "openai-codex-responses"
GET_PI_OLD = npm("pi", PI_OLD, "latest", "node@24")
GET_PI_NEW = npm("pi-0.87.1", PI_NEW, "0.87.1", "node@24")
CLIENTS = [
    Client("codex-0.120", CODEX_OLD, codex(False), "exec_command", "cmd"),
    Client("codex-0.120 signed in", CODEX_OLD, codex(True), "exec_command", "cmd"),
    Client("codex-0.120 signed in, renamed", CODEX_OLD, codex(True), "exec_command", "cmd", True),
    Client("codex-latest", npm("codex-latest", CODEX, "latest"), codex(False), "exec_command", "cmd"),
    Client("pi " + PI_API, GET_PI_OLD, pi(PI_OLD, PI_API), "bash", "command"),
    Client("pi " + PI_CODEX_API, GET_PI_OLD, pi(PI_OLD, PI_CODEX_API), "bash", "command"),
    Client("pi-0.87 " + PI_API, GET_PI_NEW, pi(PI_NEW, PI_API), "bash", "command"),
    Client("pi-0.87 " + PI_CODEX_API, GET_PI_NEW, pi(PI_NEW, PI_CODEX_API), "bash", "command"),
    Client(f"pi-0.87 {PI_CODEX_API}, renamed", GET_PI_NEW, pi(PI_NEW, PI_CODEX_API), "bash", "command", True),
    Client("openai-python", openai_python, sdk, "run", "cmd"),
]


# ---- The fake API and the tap -----------------------------------------------------------------------------------


class Api:
    """Answers as the Responses API would: first a call of the client's tool, then texts.  Remembers its replies."""

    def __init__(self, client: Client, upstream: FakeUpstream) -> None:
        self.client, self.upstream = client, upstream
        self.replies: List[Reply] = []
        self.cancelled = 0  # the connection of the stream that the client closes in the middle
        self.never = threading.Event()

    def __call__(self, request: Recorded) -> Reply:
        if request.method == "GET" and request.header("Upgrade"):
            return support.answer(426, {"Connection": "close"}, {"error": {"message": "no"}}) + [support.Cut()]
        if request.method == "GET":
            return support.answer(200, (), {"object": "list", "data": []})
        reply = self.answer(request, len(self.replies) + 1)
        self.replies.append(reply)
        return reply

    def answer(self, request: Recorded, number: int) -> Reply:
        item = support.message_item(FINAL_TEXT + str(number), f"msg_{number}")
        if b"CANCELLED?" in request.body:
            gone = self.upstream.wait_disconnected(self.cancelled, 1.0)
            item = support.message_item(f"upstream request gone within 1 s: {gone}", f"msg_{number}")
        elif number == 1:
            arguments = json.dumps({self.client.argument: "echo tool-ran-$((40+2))"})
            item = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "status": "completed"}
            item.update(name=self.client.tool, arguments=arguments)
        response = support.response_object([item], "gpt-test", f"resp_{number}")
        headers = [("x-codex-turn-state", f"turn-state-{number}"), ("x-request-id", f"req_{number}")]
        headers += [("X-RateLimit-Remaining-Requests", "41"), ("x-twice", "1"), ("x-twice", "2")]
        events = support.response_events(response)
        if b'CANCEL"' in request.body:
            self.cancelled = request.connection
            return support.stream(events[0], support.Pause(self.never), headers=headers)
        if request.body.startswith(b"{") and not request.json().get("stream"):
            return support.answer(200, headers, response)
        return support.stream(*events, headers=headers)


class Tape(Wire):
    """Recorded bytes, to be read like a socket."""

    def __init__(self, data: bytes) -> None:
        self.buffer = bytearray(data)

    def fill(self) -> None:
        raise EOFError("the tape ends")


class Tap:
    """Passes TCP connections on to *port* and records both directions."""

    def __init__(self, port: int) -> None:
        self.target = port
        self.tapes: List[Tuple[bytearray, bytearray]] = []  # of each connection: from the client, to the client
        self.ended: List[int] = []  # id() of the tapes whose writer has closed, in that order
        self._sockets: List[socket.socket] = []
        self._threads: List[threading.Thread] = []
        self._listener = socket.socket()
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.port = int(self._listener.getsockname()[1])
        self._closing = False

    def __enter__(self) -> "Tap":
        self._start(self._accept)
        return self

    def __exit__(self, *exc: object) -> None:
        self._closing = True
        socket.create_connection(("127.0.0.1", self.port), 5).close()
        self._threads[0].join(10)
        for sock in self._sockets:
            support.shut_down(sock)
        for thread in self._threads:
            thread.join(10)
        for sock in self._sockets + [self._listener]:
            sock.close()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        self._threads.append(threading.Thread(target=target, args=args, daemon=True))
        self._threads[-1].start()

    def _accept(self) -> None:
        while True:
            inbound, _ = self._listener.accept()
            self._sockets.append(inbound)
            if self._closing:
                return
            outbound = socket.create_connection(("127.0.0.1", self.target), 10)
            outbound.settimeout(None)
            self._sockets.append(outbound)
            self.tapes.append((bytearray(), bytearray()))
            self._start(self._pump, inbound, outbound, self.tapes[-1][0])
            self._start(self._pump, outbound, inbound, self.tapes[-1][1])

    def _pump(self, source: socket.socket, sink: socket.socket, tape: bytearray) -> None:
        with contextlib.suppress(OSError):
            for data in iter(lambda: source.recv(65536), b""):
                tape += data
                sink.sendall(data)
        self.ended.append(id(tape))
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def exchanges(self) -> Iterator[Tuple[Recorded, Optional[Answer]]]:
        """Each request with its answer, None if there was none; connection by connection.

        An answer counts as complete, too, if the client hung up before it was: Codex does when it has seen the event
        response.completed, and then the last chunk of length 0 is sometimes late.
        """
        for number, (inbound, outbound) in enumerate(self.tapes, 1):
            requests, answers = Tape(bytes(inbound)), Tape(bytes(outbound))
            client_left = self.ended.index(id(inbound)) < self.ended.index(id(outbound))
            while requests.buffer:
                request, got = requests.read_request(number), None
                with contextlib.suppress(EOFError):
                    got = answers.read_answer(request.method)
                    got.complete = got.complete or client_left
                yield request, got


# ---- What may differ --------------------------------------------------------------------------------------------


def plain_body(request: Recorded) -> bytes:
    """The body without its zstd, which another program than the proxy's library undoes."""
    if request.header("Content-Encoding") != "zstd":
        return request.body
    if not shutil.which("zstd"):
        raise Skip("the program zstd, which reads this client's bodies, is missing")
    return subprocess.run(["zstd", "-dcq"], input=request.body, stdout=subprocess.PIPE, check=True).stdout


def cache_key(request: Recorded) -> Optional[str]:
    key = json.loads(plain_body(request)).get("prompt_cache_key")
    return key if isinstance(key, str) else None


def renamed_body(request: Recorded) -> bytes:
    """What must arrive where an alias renames the model: the decoded body with nothing else changed."""
    plain = plain_body(request)
    name = json.dumps(json.loads(plain)["model"]).encode()
    assert plain.count(b'"model":' + name) == 1, "which one is the model?"
    return plain.replace(b'"model":' + name, b'"model":"' + RENAMED.encode() + name[1:])


def legal(value: str) -> str:
    """A value that the proxy adds: visible ASCII as it is, else hashed."""
    return value if re.match(r"^[!-~]{1,64}$", value) else hashlib.sha256(value.encode("utf-8")).hexdigest()


def expected_fields(request: Recorded, is_renamed: bool) -> Tuple[Pairs, Dict[str, str]]:
    """The fields that must arrive in this order, and those that the proxy sets or adds anywhere."""
    named = {name.strip().lower() for value in request.all("Connection") for name in value.split(",")}
    dropped = REBUILT | CREDENTIALS | named | {"accept-encoding"} | ({"content-encoding"} if is_renamed else set())
    kept = [(name, value) for name, value in request.headers if name.lower() not in dropped]
    have = {name.lower(): value for name, value in kept}
    added = {"authorization": "Bearer sk-upstream", "accept-encoding": "identity"}
    key = cache_key(request)
    session = next((have[name] for name in SESSION if have.get(name)), key)
    for name, value in (("session_id", session), ("session-id", session), ("x-client-request-id", key)):
        if value and name not in have:
            added[name] = legal(value)
    return kept, added


def compare_request(request: Recorded, arrived: Recorded, is_renamed: bool) -> Iterator[str]:
    """What happened to *request* on its way to the upstream beyond the contract."""
    path = "/v1" + re.sub(r"^(/v1|/backend-api)?(/codex)?", "", request.target)
    if (arrived.method, arrived.target) != (request.method, path):
        yield f"{request.method} {path} arrived as {arrived.method} {arrived.target}"
    if is_renamed and request.header("Content-Encoding") != "zstd":
        yield "body: not zstd, so that this run shows nothing"
    if arrived.body != (renamed_body(request) if is_renamed else request.body):
        yield f"body: {len(request.body)} bytes sent, other {len(arrived.body)} arrived"
    kept, added = expected_fields(request, is_renamed)
    came = [(name, value) for name, value in arrived.headers if name.lower() not in REBUILT]
    rest = [(name, value) for name, value in came if name.lower() not in added]
    if rest != kept:
        missing, extra = [one for one in kept if one not in rest], [one for one in rest if one not in kept]
        yield f"headers: missing {missing}, extra {extra}" if missing or extra else "headers: another order"
    for name, value in added.items():
        values = [came_value for came_name, came_value in came if came_name.lower() == name]
        if values != [value]:
            yield f"header {name}: {values!r}, expected one {value!r}"


def scripted_answer(reply: Reply) -> Answer:
    """*reply* as a client without a proxy would read it that hangs up where a pause begins."""
    steps = list(itertools.takewhile(lambda step: isinstance(step, bytes), reply))
    got = Tape(b"".join(step for step in steps if isinstance(step, bytes))).read_answer()
    got.complete = got.complete or len(steps) < len(reply)
    return got


def compare_answer(reply: Reply, got: Optional[Answer]) -> Iterator[str]:
    """What happened to the upstream's *reply* on its way to the client beyond the contract."""
    sent = scripted_answer(reply)
    if got is None:
        yield "no answer"
        return
    if (got.status, got.body, got.complete) != (sent.status, sent.body, sent.complete):
        seen = [f"status {one.status}, {len(one.body)} bytes, complete {one.complete}" for one in (sent, got)]
        yield "answer: {} / {}".format(*seen)
    wanted, came = ([pair for pair in one.headers if pair[0].lower() not in REBUILT] for one in (sent, got))
    if [one for one in came if one in wanted] != wanted:
        yield f"answer headers: {wanted!r} came as {came!r}"
    extra = [one for one in came if one not in wanted and one[0].lower() not in ANSWER_ADDITIONS]
    if extra:
        yield f"answer headers: {extra!r} were added"


MASKED = [
    (r"\b1[6-9]\d{11}\b", "MILLISECONDS"),
    (r"\d{4}-\d\d-\d\dT[\d:.]+Z?", "TIME"),
    (r"(127\.0\.0\.1|localhost):\d+", "PORT"),
    (r"Wall time: [\d.]+", "DURATION"),
    (r"Chunk ID: [0-9a-f]+", "CHUNK"),
    # when Codex resumes a session, it makes a new one of these or not, as its threads happen to run
    (r'context_window_id\\*": ?\\*"[0-9a-f-]{36}', "WINDOW"),
    # pi finds out its platform while it already sends: "pi (browser)" now and then
    (r"\bpi \([^)]*\)", "PI"),
]
UUID = r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"


class Mask:
    """Replaces what differs from run to run by the same words in each run, equal things by equal words."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.ids: Dict[str, str] = {}

    def __call__(self, text: str) -> str:
        text = text.replace(self.folder, "FOLDER")
        for pattern, word in MASKED:
            text = re.sub(pattern, word, text)
        return re.sub(UUID, lambda match: self.ids.setdefault(match.group(), f"ID{len(self.ids)}"), text)

    def request(self, request: Recorded) -> Tuple[str, Pairs, str]:
        fields = [
            (name, "ANY" if name.lower() in ("sec-websocket-key", "content-length") else self(value))
            for name, value in request.headers
        ]
        try:  # sorted: Codex keeps some objects in hash maps, whose order is random
            body = self(json.dumps(json.loads(request.body), sort_keys=True, indent=0)) if request.body else ""
        except ValueError:
            body = "compressed"
        return f"{request.method} {request.target}", fields, body


def compare_runs(first: Run, second: Run, masks: Tuple[Mask, Mask]) -> Iterator[str]:
    """Where the client behaved otherwise in the *second* run than in the *first*."""
    # how often Codex asks for its models is a matter of time
    sessions = [
        [mask.request(one) for one in run.sent if "/models" not in one.target]
        for run, mask in zip((first, second), masks)
    ]
    if len(sessions[0]) != len(sessions[1]):
        yield f"runs: {len(sessions[0])} / {len(sessions[1])} requests"
    for number, (one, other) in enumerate(zip(*sessions), 1):
        left, right = ([target, *fields, *body.splitlines()] for target, fields, body in (one, other))
        if left != right:
            pair = next(pair for pair in itertools.zip_longest(left, right) if pair[0] != pair[1])
            yield "runs: request {}: {!r} / {!r}".format(number, *pair)
    for was, now in zip(first.printed, second.printed):
        texts = [(code, mask(text)) for mask, (code, text) in zip(masks, (was, now))]
        if texts[0] != texts[1]:
            yield "runs: printed {!r} / {!r}".format(*texts)


# ---- Running ----------------------------------------------------------------------------------------------------


def run_commands(
    client: Client, installed: str, folder: str, port: int, backend: FakeUpstream
) -> List[Tuple[int, str]]:
    home, work = folder + "/home", folder + "/work"
    os.makedirs(work)
    origins = [f"http://127.0.0.1:{number}" for number in (port, backend.port)]
    commands, settings = client.prepare(installed, home, *origins)
    # what a client wants from other hosts ends at the backend, which refuses it
    refused = dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), origins[1])
    env = support.clean_environment(dict(refused, HOME=home, NO_PROXY="127.0.0.1,localhost", **settings))
    printed = []
    for command in commands:
        try:
            done = run_bounded(command, TURN_LIMIT_S, cwd=work, env=env)
            text = done.stdout.decode("utf-8", "replace")
            printed.append((done.returncode, text))
            if done.returncode:
                sys.stderr.write(done.stderr.decode("utf-8", "replace")[-2000:])
        except subprocess.TimeoutExpired:
            printed.append((-1, f"no end after {TURN_LIMIT_S} s"))
    return printed


def run_session(client: Client, installed: str, folder: str, through: bool) -> Run:
    """One session of *client*, straight to the fake upstream or *through* tap and proxy."""
    with FakeUpstream() as upstream, FakeUpstream() as backend:
        backend.default = lambda request: support.answer(404, (), {"error": {"message": "not here"}})
        upstream.default = api = Api(client, upstream)
        if not through:
            printed = run_commands(client, installed, folder, upstream.port, backend)
            return Run(upstream.requests, printed, list(judge_printed(printed)))
        config = support.make_config(upstream, {"models": MODELS}, keys={"team": {"secret": account_token()}})
        config["providers"]["other"] = {"api_base_url": backend.base_url, "models": ["other-model"]}
        if client.is_renamed:
            config["providers"]["up"]["models"] = [RENAMED + name for name in MODELS]
            config["models"] = {name: {"targets": [{"provider": "up", "model": RENAMED + name}]} for name in MODELS}
        with Proxy(config) as proxy:
            with Tap(proxy.port) as tap:
                printed = run_commands(client, installed, folder, tap.port, backend)
        exchanges = list(tap.exchanges())
        run = Run([request for request, _ in exchanges], printed, list(judge_printed(printed)))
        forwarded = [one for one in exchanges if one[0].method == "POST"]
        if not len(forwarded) == len(upstream.requests) == len(api.replies):
            run.differences.append(f"{len(forwarded)} requests sent, {len(upstream.requests)} arrived")
        for number, ((request, got), arrived, reply) in enumerate(zip(forwarded, upstream.requests, api.replies), 1):
            found = list(compare_request(request, arrived, client.is_renamed)) + list(compare_answer(reply, got))
            run.differences += [f"request {number}: {one}" for one in found]
        for got in (got for request, got in exchanges if request.header("Upgrade")):
            framed = got and got.status == 426 and got.header("Content-Length")
            if not (got and framed and (got.header("Connection") or "").lower() == "close"):
                run.differences.append(f"websocket: {got!r}")
        return run


def judge_printed(printed: Sequence[Tuple[int, str]]) -> Iterator[str]:
    for code, text in printed:
        if code or FINAL_TEXT not in text or "gone within 1 s: False" in text:
            yield f"printed, exit code {code}: {text[-300:]!r}"


def check(client: Client, through: bool) -> Tuple[str, int, List[str]]:
    """Return version, number of requests and differences."""
    installed, version = client.install()
    folders = [tempfile.mkdtemp(prefix="plexus-client-") for _ in range(2)]
    try:
        runs = [run_session(client, installed, folders[0], False), run_session(client, installed, folders[1], through)]
    finally:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    masks = Mask(folders[0]), Mask(folders[1])
    differences = [one for run in runs for one in run.differences] + list(compare_runs(runs[0], runs[1], masks))
    return version, len(runs[1].sent), differences


def main(argv: Sequence[str]) -> int:
    words = [word for word in argv if not word.startswith("-")]
    failed = False
    skips: Dict[Any, Skip] = {}  # an installation that fails takes its time, and two clients may share it
    print(f"{'client':<40} {'version':<9} {'requests':>8}  differences")
    for client in CLIENTS:
        if words and not any(word in client.name for word in words):
            continue
        try:
            if client.install in skips:
                raise skips[client.install]
            version, count, differences = check(client, "--direct" not in argv)
        except Skip as reason:
            skips[client.install] = reason
            print(f"{client.name:<40} SKIPPED: {reason}", flush=True)
            continue
        except AssertionError as error:  # the proxy does not start, wrote a traceback, or does not speak HTTP
            version, count, differences = "", 0, [str(error)]
        print(f"{client.name:<40} {version:<9} {count:>8}  {len(differences) or 'none'}", flush=True)
        for one in differences:
            print("    " + one[:2000], flush=True)
        failed = failed or bool(differences)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
