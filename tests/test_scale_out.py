"""Real balancers before three proxies before four replicas: a conversation stays where its prefix lies.

    client --> HAProxy or nginx --> plexus_lite x 3 --> Replica x 4

A balancer is skipped where its program is not installed.  Its listening socket is made here and inherited, so that
no port is guessed and no wait for its start is needed.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import threading
import unittest
from typing import Any, ClassVar, Dict, List, Mapping, Optional, Sequence, Tuple, Type

from tests.support import (
    Answer,
    FakeUpstream,
    Pause,
    Proxy,
    RawClient,
    Recorded,
    Reply,
    build_request,
    default_reply,
    exchange,
    make_config,
    message_item,
    post,
    response_events,
    response_object,
    stream,
)

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin"])
EVENTS = response_events(response_object([message_item("Hello from the upstream.")]))
SESSIONS = range(12)  # the even ones name themselves in a header, the odd ones in the body only


class Replica(FakeUpstream):
    """Notes which turn it answered; keeps an answer open after its first event while `Site.holds` has its turn.

    With *port* it takes the place of one that has stopped.
    """

    def __init__(self, site: "Site", number: int, port: int = 0) -> None:
        super().__init__()
        self.site, self.number = site, number
        self.default = self.reply
        self._listener.close()
        self._listener = hold_port(port)  # one that can be bound again while old connections linger
        self._listener.listen(128)
        self.port = int(self._listener.getsockname()[1])
        self.base_url = f"http://127.0.0.1:{self.port}/v1"

    def __exit__(self, *exc: object) -> None:
        if not self._closing.is_set():
            super().__exit__(*exc)

    def reply(self, request: Recorded) -> Reply:
        turn = request.json()["input"][0]["content"]
        self.site.served_by[turn] = self.number
        held = self.site.holds.get(turn)
        return stream(EVENTS[0], Pause(held), *EVENTS[1:]) if held else default_reply(request)


def hold_port(port: int) -> socket.socket:
    """Return a socket that has *port* and does not listen: connections are refused, and nobody else gets it."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    return sock


class Balancer:
    """A balancer in the foreground, in a folder of its own, from `__enter__` to `__exit__`."""

    program = ""
    server_line = ""
    template = ""

    def __init__(self, ports: Sequence[int]) -> None:
        self.ports = ports

    def command(self, program: str, config_path: str) -> List[str]:
        raise NotImplementedError

    def environment(self, fd: int) -> Dict[str, str]:
        return {}

    def __enter__(self) -> "Balancer":
        self.folder = tempfile.mkdtemp(prefix="plexus-balancer-")
        os.chmod(self.folder, 0o755)  # nginx's worker is another user when the tests run as root
        config_path = os.path.join(self.folder, "balancer.conf")
        servers = "".join(self.server_line.format(number=n, port=port) for n, port in enumerate(self.ports))
        with socket.socket() as listener, open(os.path.join(self.folder, "log"), "wb") as log:
            listener.bind(("127.0.0.1", 0))
            listener.listen(128)
            self.port = int(listener.getsockname()[1])
            values = {"SERVERS": servers, "FD": str(listener.fileno()), "PORT": str(self.port), "DIR": self.folder}
            text = self.template
            for name, value in values.items():
                text = text.replace(f"@{name}@", value)
            with open(config_path, "w", encoding="ascii") as file:
                file.write(text)
            program = shutil.which(self.program, path=PATH)
            assert program
            self.process = subprocess.Popen(
                self.command(program, config_path),
                env=dict(os.environ, **self.environment(listener.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[listener.fileno()],
            )
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(5)
        shutil.rmtree(self.folder, ignore_errors=True)

    def log_text(self) -> str:
        with open(os.path.join(self.folder, "log"), encoding="utf-8", errors="replace") as file:
            return file.read()


class HAProxy(Balancer):
    program = "haproxy"
    server_line = "    server proxy{number} 127.0.0.1:{port} check inter 1s\n"
    template = """\
defaults
    mode http
    balance leastconn
    option http-no-delay
    option redispatch
    retries 3
    timeout connect 5s
    timeout check 10s
    timeout client 15m
    timeout server 15m
    option httpchk GET /health
listen plexus
    bind fd@@FD@
    http-response set-header x-served-by %s
@SERVERS@"""

    def command(self, program: str, config_path: str) -> List[str]:
        return [program, "-db", "-f", config_path]


class Nginx(Balancer):
    program = "nginx"
    server_line = "        server 127.0.0.1:{port};\n"
    underscores = "on"
    template = """\
daemon off;
pid @DIR@/pid;
error_log stderr;
events {}
http {
    access_log off;
    client_body_temp_path @DIR@/body;
    proxy_temp_path @DIR@/proxy;
    fastcgi_temp_path @DIR@/fastcgi;
    uwsgi_temp_path @DIR@/uwsgi;
    scgi_temp_path @DIR@/scgi;
    map $http_upgrade $connection_upgrade { default upgrade; "" ""; }
    upstream plexus {
        least_conn;
@SERVERS@    }
    server {
        listen 127.0.0.1:@PORT@;
        underscores_in_headers @UNDERSCORES@;
        client_max_body_size 0;
        location / {
            proxy_pass http://plexus;
            proxy_http_version 1.1;
            proxy_set_header Host $http_host;
            proxy_set_header Upgrade $http_upgrade;
            proxy_set_header Connection $connection_upgrade;
            proxy_buffering off;
            proxy_request_buffering off;
            proxy_read_timeout 15m;
            proxy_send_timeout 15m;
            add_header x-served-by $upstream_addr always;
        }
    }
}
"""

    def __init__(self, ports: Sequence[int]) -> None:
        super().__init__(ports)
        self.template = self.template.replace("@UNDERSCORES@", self.underscores)

    def command(self, program: str, config_path: str) -> List[str]:
        return [program, "-e", "stderr", "-p", self.folder, "-c", config_path]

    def environment(self, fd: int) -> Dict[str, str]:
        return {"NGINX": f"{fd};"}  # how nginx hands its sockets to its successor


class NginxAsItComes(Nginx):
    underscores = "off"


def needs(balancer: Type[Balancer]) -> Any:
    reason = f"{balancer.program} is not installed (Debian package {balancer.program})"
    return unittest.skipUnless(shutil.which(balancer.program, path=PATH), reason)


class Site(contextlib.ExitStack):
    """Four replicas, proxies before them, a balancer before those."""

    def __init__(self, balancer: Type[Balancer], proxies: int = 3) -> None:
        super().__init__()
        self.served_by: Dict[str, int] = {}  # turn -> number of the replica
        self.holds: Dict[str, threading.Event] = {}  # turn -> its answer goes on when this is set
        try:
            self.replicas = [self.enter_context(Replica(self, number)) for number in range(4)]
            self.config = make_config(self.replicas)
            self.proxies = [self.enter_context(Proxy(self.config)) for _ in range(proxies)]
            self.balancer = self.enter_context(balancer([proxy.port for proxy in self.proxies]))
        except BaseException:
            self.close()
            raise

    def hold(self, turn: str) -> None:
        self.holds[turn] = threading.Event()
        self.callback(self.holds[turn].set)

    def request(self, session: int, turn: str, padding: int = 0) -> bytes:
        body = {"model": "gpt-test", "stream": True, "input": [{"role": "user", "content": turn}], "pad": "x" * padding}
        headers = {}
        if session % 2:
            body["prompt_cache_key"] = f"session-{session}"
        else:
            headers["session_id"] = f"session-{session}"
        return build_request("POST", "/v1/responses", body, headers)

    def ask(self, session: int, turn: str, padding: int = 0) -> Answer:
        return exchange(self.balancer.port, self.request(session, turn, padding))

    def begin(self, session: int, turn: str) -> RawClient:
        """Ask for an answer that stops after its first event; return once that has come."""
        self.hold(turn)
        client = self.enter_context(RawClient(self.balancer.port))
        client.send(self.request(session, turn))
        client.wait_for(EVENTS[0])
        return client

    def end(self, client: RawClient, turn: str) -> Optional[Answer]:
        """Let the answer go on, and read it; None if the connection broke before its head."""
        self.holds[turn].set()
        try:
            return client.read_answer()
        except (EOFError, ConnectionError):
            return None

    def stop_replica(self, number: int) -> socket.socket:
        """Stop it as SIGKILL would, its running answers with it; its port stays taken."""
        self.replicas[number].__exit__()
        return hold_port(self.replicas[number].port)

    def start_replica(self, number: int, held: socket.socket) -> None:
        port = self.replicas[number].port
        held.close()
        self.replicas[number] = self.enter_context(Replica(self, number, port))


class ScaleOutTests:
    """For each balancer.  Not a TestCase itself, so that it runs below only."""

    balancer: ClassVar[Type[Balancer]]
    site: ClassVar[Site]  # for the tests that leave it as it was

    @classmethod
    def setUpClass(cls) -> None:
        cls.site = Site(cls.balancer, proxies=1)

    @classmethod
    def tearDownClass(cls) -> None:
        cls.site.close()

    def ask_all(
        self: Any, site: Site, name: str, sessions: Sequence[int] = SESSIONS
    ) -> Tuple[Dict[int, int], List[str]]:
        """Ask one turn of each session; return which replica and which proxies served.  Every answer must be whole."""
        proxies = []
        for session in sessions:
            answer = site.ask(session, f"{session} {name}")
            self.assertEqual((answer.status, answer.complete), (200, True), site.balancer.log_text())
            proxies.append(str(answer.header("x-served-by")).rpartition(", ")[2])
        return {session: site.served_by[f"{session} {name}"] for session in sessions}, proxies

    def test_sessions_stay_while_a_proxy_is_killed_and_a_replica_restarts(self: Any) -> None:
        site = Site(self.balancer)
        self.addCleanup(site.close)
        homes, first = self.ask_all(site, "turn 1")
        self.assertGreater(len(set(homes.values())), 1)
        rotated = list(SESSIONS)[1:] + [0]  # so that others meet other proxies
        again, second = self.ask_all(site, "turn 2", rotated)
        self.assertEqual(again, homes)
        self.assertEqual(len(set(first)), 3, "every proxy has served")
        moved = [s for s in SESSIONS if first[s] != second[rotated.index(s)]]
        self.assertTrue(moved, "some session came by way of two proxies")

        # A proxy dies with an answer on its way; two others run through the other two.
        clients = [site.begin(session, f"{session} held") for session in range(3)]
        site.proxies[0].kill()
        self.addCleanup(hold_port(site.proxies[0].port).close)
        answers = [site.end(client, f"{session} held") for session, client in enumerate(clients)]
        whole = [answer for answer in answers if answer and answer.complete]
        self.assertEqual([answer.body for answer in whole], [b"".join(EVENTS)] * 2, "only what it was relaying breaks")
        for turn in range(3):
            homes_now, proxies = self.ask_all(site, f"after the proxy {turn}")
            self.assertEqual(homes_now, homes)
            self.assertEqual(len(set(proxies)), 2)

        # A replica restarts on its port with an answer on its way, while the proxies hold idle connections to it.
        client = site.begin(0, "0 cut")
        held = site.stop_replica(homes[0])
        site.start_replica(homes[0], held)
        broken = site.end(client, "0 cut")
        self.assertFalse(broken and broken.complete)
        homes_now, _ = self.ask_all(site, "after the replica")
        self.assertEqual(homes_now, homes)

        # It is away for a while: its sessions are answered elsewhere, all others stay.
        held = site.stop_replica(homes[0])
        homes_now, _ = self.ask_all(site, "while it is away")
        strangers = {session for session in SESSIONS if homes[session] != homes[0]}
        self.assertEqual({s: homes_now[s] for s in strangers}, {s: homes[s] for s in strangers})
        self.assertNotIn(homes[0], homes_now.values())
        site.start_replica(homes[0], held)
        homes_now, _ = self.ask_all(site, "when it is back")
        self.assertEqual({s: homes_now[s] for s in strangers}, {s: homes[s] for s in strangers})

    def test_events_pass_as_they_come(self: Any) -> None:
        client = self.site.begin(0, "0 held")  # returns although the upstream has stopped after the first event
        answer = self.site.end(client, "0 held")
        self.assertEqual((answer.complete, answer.body), (True, b"".join(EVENTS)))

    def test_a_long_prompt_passes(self: Any) -> None:
        answer = self.site.ask(0, "0 long", padding=3 << 20)
        self.assertEqual(answer.status, 200)

    def test_a_websocket_is_refused_with_426(self: Any) -> None:
        fields = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]
        fields.append(("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ=="))  # HAProxy itself answers 400 without one
        request = build_request("GET", "/v1/responses", None, fields)
        self.assertEqual(exchange(self.site.balancer.port, request).status, 426)


@needs(HAProxy)
class HAProxyTest(ScaleOutTests, unittest.TestCase):
    balancer = HAProxy


@needs(Nginx)
class NginxTest(ScaleOutTests, unittest.TestCase):
    balancer = Nginx


@needs(Nginx)
class UnderscoreTest(unittest.TestCase):
    """nginx takes a header with an underscore for a mistake and drops it, unless it is told not to."""

    def assert_arrives(self, balancer: Type[Balancer], table: Sequence[Tuple[str, Mapping[str, str], Any]]) -> None:
        with Site(balancer, proxies=1) as site:
            for turn, headers, expected in table:
                with self.subTest(turn):
                    body = {"model": "gpt-test", "input": [{"role": "user", "content": turn}]}
                    self.assertEqual(post(site.balancer.port, "/v1/responses", body, headers).status, 200)
                    request = site.replicas[site.served_by[turn]].requests[-1]
                    self.assertEqual((request.header("session_id"), request.header("session-id")), expected)

    def test_as_it_comes_the_header_is_lost(self) -> None:
        self.assert_arrives(
            NginxAsItComes,
            [
                ("underscore", {"session_id": "one"}, (None, None)),
                ("hyphen", {"session-id": "one"}, ("one", "one")),
                ("both", {"session_id": "one", "session-id": "two"}, ("two", "two")),
            ],
        )

    def test_told_to_it_keeps_the_header(self) -> None:
        self.assert_arrives(Nginx, [("underscore", {"session_id": "one"}, ("one", "one"))])


if __name__ == "__main__":
    unittest.main()
