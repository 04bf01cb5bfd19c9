"""TLS of our own: what clients see of it, and that a handshake costs nobody else anything."""

import contextlib
import os
import shutil
import signal
import ssl
import tempfile
import threading
import unittest
import warnings

import plexus_lite
from tests.support import (
    Cut,
    FakeUpstream,
    Pause,
    Proxy,
    RawClient,
    answer,
    build_request,
    enter,
    make_config,
    run_cli,
    stream,
)

HERE = os.path.dirname(os.path.abspath(__file__))
CA_FILE, SERVER_FILE = (os.path.join(HERE, name) for name in ("tls_ca.pem", "tls_server.pem"))
# Made for these tests: a key with its certificate, and the same key encrypted.
OTHER_KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgrzcwxgXjpWSbzsWj
7uVNgBccoPm002nnv/X1EuTlYHWhRANCAAR2VNgEqn2zEPxQVPAs6alfp+PylApR
PgPkmYP9gazcrErCpFsSuoYd+TJfnp4l63opgXtcZHH6h27ck1tA0tCa
-----END PRIVATE KEY-----
"""
OTHER_CERT = """\
-----BEGIN CERTIFICATE-----
MIIBkDCCATagAwIBAgIUMO4uqA/joZZsqEHoQX43zeqM63EwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJMTI3LjAuMC4xMCAXDTI2MTEyMzE3NTEzMFoYDzIxMjYxMDMw
MTc1MTMwWjAUMRIwEAYDVQQDDAkxMjcuMC4wLjEwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAR2VNgEqn2zEPxQVPAs6alfp+PylApRPgPkmYP9gazcrErCpFsSuoYd
+TJfnp4l63opgXtcZHH6h27ck1tA0tCao2QwYjAdBgNVHQ4EFgQU31Hi9MZrNsFM
5jWF9a8IKkS77DMwHwYDVR0jBBgwFoAU31Hi9MZrNsFM5jWF9a8IKkS77DMwDwYD
VR0TAQH/BAUwAwEB/zAPBgNVHREECDAGhwR/AAABMAoGCCqGSM49BAMCA0gAMEUC
IQCGULWAvvSz9K7udobUbrUYhRIHAP8ZhGKrcv9sDYDt7AIgHl706fWWny2E8nEn
K+MBw+R+8vn3wkVCHKceXV4Krv0=
-----END CERTIFICATE-----
"""
ENCRYPTED_KEY = """\
-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgT4a/7AkUyvgICCAAw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEL6tYbLwnNBj8tEvV4UeLkwEgZBv
sC2dq0mf7WBbWKA6YSKrdbJlLEKgtzjrhyGGbMcDNrbMTiv0qe7tKmp2q3XsflQZ
B71Z1kI83G5+JtbgDnnOfcLVTMKibYfdfpORAq0998csA8W9thVzU0QoIDS5wqBB
2WecT4A4MhjEhMerc5G08sO9pqL/KfyGdcC0cXU75OhQWYDy+TGE7Fx6ShTwR7o=
-----END ENCRYPTED PRIVATE KEY-----
"""
ASK = build_request("POST", "/v1/responses", {"model": "gpt-test", "stream": True})
MAX_CONNECTIONS = 6


def client_context() -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=CA_FILE)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    return context


class TlsClient(RawClient):
    """Tells an end that was meant (EOFError) from a connection that just ended (ssl.SSLError)."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.sock: ssl.SSLSocket = client_context().wrap_socket(
            self.sock, server_hostname="127.0.0.1", suppress_ragged_eofs=False
        )


def certificate(port: int) -> str:
    """Return the certificate that is shown on *port*, as PEM; it need not be a trusted one."""
    return ssl.get_server_certificate(("127.0.0.1", port))


class OwnTlsTest(unittest.TestCase):
    proxy: Proxy
    upstream: FakeUpstream
    shared: contextlib.ExitStack

    @classmethod
    def setUpClass(cls):
        with contextlib.ExitStack() as stack:
            cls.upstream = stack.enter_context(FakeUpstream())
            limits = {"header_timeout_s": 0.5, "max_connections": MAX_CONNECTIONS}
            config = make_config(cls.upstream, tls={"cert": SERVER_FILE}, limits=limits)
            cls.proxy = stack.enter_context(Proxy(config))
            cls.shared = stack.pop_all()

    @classmethod
    def tearDownClass(cls):
        cls.shared.close()

    def setUp(self):
        self.upstream.reset()

    def client(self) -> TlsClient:
        client = TlsClient(self.proxy.port)
        self.addCleanup(client.close)
        return client

    def test_the_main_job_on_a_connection_that_stays(self):
        client = self.client()
        self.assertIn(client.sock.version(), ("TLSv1.2", "TLSv1.3"))
        self.assertEqual(client.sock.selected_alpn_protocol(), "http/1.1")
        self.assertRegex(self.proxy.stdout[0], r"^plexus_lite \S+ listening on https://127\.0\.0\.1:\d+$")
        for size in (1, 100_000, 3_000_000):  # more than a record, and more than the socket takes at once
            text = "x" * size
            self.upstream.script(answer(200, (), {"text": text}))
            client.send(build_request("POST", "/v1/responses", {"model": "gpt-test", "input": text}))
            self.assertEqual(client.read_answer().json(), {"text": text})
        self.assertEqual([one.json()["input"] for one in self.upstream.requests], ["x", "x" * 100_000, "x" * 3_000_000])

    def test_a_part_of_a_chunks_head_is_nothing_to_send_yet(self):
        """In Python 3.8 and 3.9 it is an error to send nothing over TLS, and the answer was cut."""
        part, rest = Pause(threading.Event()), Pause(threading.Event())
        self.upstream.script([*stream(b"data: 1\n\n", part, end=False), b"9\r", rest, b"\ndata: 2\n\n\r\n0\r\n\r\n"])
        client = self.client()
        client.send(ASK)
        client.wait_for(b"data: 1")
        part.event.set()
        threading.Timer(0.2, rest.event.set).start()
        self.assertIn(b"data: 2", client.wait_for(b"\r\n0\r\n\r\n"))

    def test_two_requests_in_one_record(self):
        client = self.client()
        client.send(ASK + ASK)
        self.assertEqual([client.read_answer().complete for _ in range(2)], [True, True])

    def test_an_older_tls_is_refused(self):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_ciphers("ALL:@SECLEVEL=0")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is what they warn of that must not work
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        with RawClient(self.proxy.port) as client, self.assertRaisesRegex(OSError, "(?i)version|protocol"):
            context.wrap_socket(client.sock)

    def test_a_handshake_that_stops_delays_nobody_and_ends(self):
        hello, answers = ssl.MemoryBIO(), ssl.MemoryBIO()
        with contextlib.suppress(ssl.SSLWantReadError):
            client_context().wrap_bio(answers, hello, server_hostname="127.0.0.1").do_handshake()
        data = hello.read()
        silent = [enter(self.addCleanup, RawClient(self.proxy.port)) for _ in range(3)]
        silent[1].send(data[:40])
        silent[2].send(data)
        client = self.client()
        client.send(ASK)
        self.assertTrue(client.read_answer().complete)
        self.assertTrue(silent[0].at_eof())  # within header_timeout_s, or the wait here would end first
        self.assertTrue(silent[1].at_eof())
        self.assertTrue(silent[2].read_some())  # the proxy's half
        with self.assertRaises(EOFError):
            while True:
                silent[2].fill()

    def test_plain_http_is_told_so_and_noise_is_closed(self):
        with RawClient(self.proxy.port) as client:
            client.send(build_request("GET", "/v1/models"))
            got = client.read_answer()
            self.assertEqual((got.status, got.error_code), (400, "invalid_request"))
            self.assertIn("https://", got.json()["error"]["message"])
            self.assertTrue(client.at_eof())
        for noise in (b"\x16\x03\x01\xff\xffnoise", b"\0" * 600, b"SSH-2.0-OpenSSH_9.2\r\n"):
            with RawClient(self.proxy.port) as client, contextlib.suppress(EOFError, ConnectionError):
                client.send(noise)
                while True:  # perhaps an alert; nothing else
                    client.fill()
                    self.assertEqual(client.take(len(client.buffer))[:1], b"\x15")
        self.assertNotIn("noise", self.proxy.error_text())

    def test_a_client_that_leaves_ends_the_upstream_request(self):
        for leave in (lambda sock: sock.close(), lambda sock: sock.unwrap()):
            self.upstream.script(stream(b"data: 1\n\n", Pause(threading.Event())))
            client = self.client()
            client.send(ASK)
            client.wait_for(b"data: 1")
            number = self.upstream.requests[-1].connection
            with contextlib.suppress(OSError):
                leave(client.sock)
            self.assertTrue(self.upstream.wait_disconnected(number, 5))

    def test_a_cut_answer_ends_without_a_goodbye_and_a_whole_one_with_it(self):
        old = ASK.replace(b"HTTP/1.1", b"HTTP/1.0").replace(b"sk-client", b"sk-client\r\nConnection: close")
        for name, request in (("chunked", ASK), ("to the end of the connection", old)):
            with self.subTest(name):
                self.upstream.script(stream(b"data: 1\n\n", Cut(), end=False), stream(b"data: 1\n\n"))
                client = self.client()
                client.send(request)
                client.wait_for(b"data: 1")
                with self.assertRaises((ssl.SSLError, ConnectionResetError)):
                    while True:
                        client.fill()
                self.assertNotIn(b"\r\n0\r\n", bytes(client.buffer))
                client = self.client()
                client.send(request.replace(b"HTTP/1.1\r\n", b"HTTP/1.1\r\nConnection: close\r\n"))
                self.assertIn(b"data: 1", client.take_rest())

    def test_a_reader_that_stalls_gets_every_byte_in_the_end(self):
        pieces = [os.urandom(200_000) for _ in range(100)]
        sent = threading.Event()

        def reply():
            yield from stream(*pieces, end=False)
            sent.set()
            yield b"0\r\n\r\n"

        self.upstream.default, before = (lambda request: reply()), self.upstream.default
        self.addCleanup(setattr, self.upstream, "default", before)
        client = self.client()
        client.send(ASK)
        client.wait_for(b"\r\n\r\n")
        self.assertFalse(sent.wait(0.3))  # backpressure: the upstream cannot send it all
        self.assertEqual(client.read_answer().body, b"".join(pieces))

    def test_beyond_max_connections_it_is_closed_and_those_in_a_handshake_give_way(self):
        for _ in range(MAX_CONNECTIONS):
            enter(self.addCleanup, RawClient(self.proxy.port))
        event = threading.Event()
        clients = []
        for _ in range(MAX_CONNECTIONS):
            self.upstream.script(stream(b"data: 1\n\n", Pause(event)))
            clients.append(self.client())
            clients[-1].send(ASK)
            clients[-1].wait_for(b"data: 1")
        for _ in range(2):  # one that was turned away makes no room
            with self.assertRaises(OSError):
                self.client()
        event.set()
        for client in clients:
            self.assertTrue(client.read_answer().complete)


class StopTest(unittest.TestCase):
    def test_a_handshake_under_way_ends_with_the_signal_and_not_with_the_last_answer(self):
        gate = threading.Event()
        self.addCleanup(gate.set)
        with FakeUpstream() as upstream:
            upstream.script(stream(b"data: 1\n\n", Pause(gate), b"data: 2\n\n"))
            config = make_config(upstream, tls={"cert": SERVER_FILE})
            with Proxy(config) as proxy, TlsClient(proxy.port) as client, RawClient(proxy.port) as silent:
                silent.send(b"\x16\x03\x01\x02\0\x01")  # the beginning of a ClientHello
                client.send(ASK)
                client.wait_for(b"data: 1\n\n")
                proxy.process.send_signal(signal.SIGTERM)
                self.assertTrue(silent.at_eof(2))
                gate.set()
                self.assertTrue(client.read_answer().complete)


class CertificateTest(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp(prefix="plexus-test-")
        self.addCleanup(shutil.rmtree, self.folder)

    def write(self, name: str, text: str) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        return path

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
    def test_sighup_reads_the_certificate_again_and_a_bad_one_changes_nothing(self):
        with open(SERVER_FILE, encoding="ascii") as file:
            path = self.write("cert.pem", file.read())
        config = make_config("demo://", tls={"cert": path})
        with Proxy(config) as proxy, TlsClient(proxy.port) as client:
            first = certificate(proxy.port)
            self.write("cert.pem", OTHER_KEY + OTHER_CERT)
            proxy.process.send_signal(signal.SIGHUP)
            proxy.wait_for_record(lambda record: record.get("message") == "configuration reloaded")
            self.assertEqual(certificate(proxy.port), OTHER_CERT)
            self.assertNotEqual(first, OTHER_CERT)
            self.write("cert.pem", OTHER_KEY)
            proxy.process.send_signal(signal.SIGHUP)
            record = proxy.wait_for_record(lambda record: "not reloaded" in record.get("message", ""))
            self.assertIn(f"tls.cert: {path} holds no -----BEGIN CERTIFICATE-----", record["message"])
            self.assertEqual(certificate(proxy.port), OTHER_CERT)
            client.send(build_request("GET", "/v1/models"))  # a connection from before
            self.assertEqual(client.read_answer().status, 200)
            proxy.process.send_signal(signal.SIGTERM)
            with self.assertRaises(EOFError):  # closed as meant
                client.fill()

    def test_files_that_cannot_be_used(self):
        cert, key = self.write("cert.pem", OTHER_CERT), self.write("key.pem", OTHER_KEY)
        encrypted, noise = self.write("encrypted.pem", ENCRYPTED_KEY), self.write("noise.pem", "noise")
        plexus_lite.make_server_context(plexus_lite.Tls(cert, key))
        plexus_lite.make_server_context(plexus_lite.Tls(self.write("both.pem", OTHER_CERT + OTHER_KEY)))
        for one, other, message in (
            (self.folder, None, "tls.cert: cannot read "),
            (cert + "x", None, "tls.cert: cannot read "),
            (cert, key + "x", "tls.key: cannot read "),
            (cert, None, "tls.key: {} holds no -----BEGIN PRIVATE KEY-----"),
            (key, key, "tls.cert: {} holds no -----BEGIN CERTIFICATE-----"),
            (noise, key, "tls.cert: {} holds no -----BEGIN CERTIFICATE-----"),
            (cert, noise, "tls.key: {} holds no -----BEGIN PRIVATE KEY-----"),
            (SERVER_FILE, key, "the key does not match the certificate"),
            (cert, encrypted, "tls.key: the key in {} is encrypted"),
        ):
            with self.subTest(message, cert=one, key=other):
                with self.assertRaises(plexus_lite.ConfigError) as caught:
                    plexus_lite.make_server_context(plexus_lite.Tls(one, other))
                named = one if message.startswith("tls.cert") else other or one
                self.assertIn(message.format(named), str(caught.exception))
                self.assertIn(named, str(caught.exception))

    def test_at_the_start_it_is_one_line_and_exit_code_2(self):
        config = self.write("config.json", '{"tls": {"cert": "nowhere.pem"}, "providers": {"p": {"models": ["m"], ')
        with open(config, "a", encoding="ascii") as file:
            file.write('"api_base_url": "demo://"}}}')
        done = run_cli("--config", config)
        self.assertEqual((done.returncode, done.stdout), (plexus_lite.EXIT_USAGE, ""))
        self.assertEqual(done.stderr, f"{config}: tls.cert: cannot read nowhere.pem: No such file or directory\n")


if __name__ == "__main__":
    unittest.main()
