"""Room 9: private CAs, client certificates, and errors of TLS that say what to configure."""

import os
import signal
import ssl
import tempfile
import unittest
from typing import Any, Dict, Mapping, Optional
from unittest import mock

import plexus_lite
from tests.support import FakeUpstream, Proxy, enter, post
from tests.test_transport import CA_FILE, HERE, SERVER_FILE, TransportTest, talking_port

CLIENT_FILE = os.path.join(HERE, "tls_client.pem")  # certificate and key of a client, signed by tls_ca.pem
EXPIRED_FILE = os.path.join(HERE, "tls_expired.pem")  # like tls_server.pem, but for the year 2020
CA_NAME = "plexus_lite test CA - trusted by nobody"
# The key of tls_client.pem once more, with a password.
ENCRYPTED_KEY = """-----BEGIN ENCRYPTED PRIVATE KEY-----
MIHsMFcGCSqGSIb3DQEFDTBKMCkGCSqGSIb3DQEFDDAcBAgWXmE9ANS0AAICA+gw
DAYIKoZIhvcNAgkFADAdBglghkgBZQMEAQIEEFLA24IcI4AHcYOzEyhY3o8EgZDY
8kzIpoagnKXdpyBq6Y8scDKZcc9MZZCy4Ml7p7XBpNuH6LYI/lymBs8dwJHK6j5p
y5N4M+EHbiolrgb5nx0KwvarO2CVItQMnv5Dhmf/vNWkTPHya4O0fJ8ijwGg48m/
8nLpLleXet3uAhP7dU4sYhoYaKvNBcfUORHdjm2hcRgZmJZ9kW4Pha23SEF3H4U=
-----END ENCRYPTED PRIVATE KEY-----
"""


def tls_upstream(file: str = SERVER_FILE, newest: Optional[ssl.TLSVersion] = None) -> FakeUpstream:
    """Return an upstream with the certificate in *file*; with *newest*, one that requires a certificate of clients."""
    upstream = FakeUpstream(tls=(file, file))
    if newest:
        context = upstream._tls
        assert context
        context.maximum_version = newest
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(CA_FILE)
    return upstream


def read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read()


def split_pem(path: str) -> Dict[str, str]:
    """Return certificate and key of a file that has both."""
    text = read(path)
    at = text.index("-----BEGIN PRIVATE KEY-----")
    return {"certificate": text[:at], "key": text[at:]}


class Folder(unittest.TestCase):
    def setUp(self):
        self.folder = enter(self.addCleanup, tempfile.TemporaryDirectory())

    def write(self, name: str, text: str) -> str:
        path = os.path.join(self.folder, name)
        with open(path, "w", encoding="ascii") as file:
            file.write(text)
        return path


class CertificatesTest(TransportTest):
    mutual: FakeUpstream
    mutual_12: FakeUpstream
    expired: FakeUpstream

    @classmethod
    def setUpClass(cls):
        cls.upstream = enter(cls.addClassCleanup, tls_upstream())
        cls.expired = enter(cls.addClassCleanup, tls_upstream(EXPIRED_FILE))
        cls.mutual = enter(cls.addClassCleanup, tls_upstream(newest=ssl.TLSVersion.TLSv1_3))
        cls.mutual_12 = enter(cls.addClassCleanup, tls_upstream(newest=ssl.TLSVersion.TLSv1_2))
        folder = enter(cls.addClassCleanup, tempfile.TemporaryDirectory())
        pair = {}
        for kind, text in split_pem(CLIENT_FILE).items():
            pair[kind] = os.path.join(folder, kind)
            with open(pair[kind], "w", encoding="ascii") as file:
                file.write(text)
        own = {"client_cert": CLIENT_FILE}
        two = {"client_cert": pair["certificate"], "client_key": pair["key"]}
        port = cls.upstream.port
        old = talking_port(cls.addClassCleanup, b"\x15\x03\x01\x00\x02\x02\x46")  # alert: protocol_version
        plain = talking_port(cls.addClassCleanup, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        silent = talking_port(cls.addClassCleanup, b"")
        providers = {
            name: dict({"api_base_url": url, "models": [name], "ca_file": CA_FILE}, **more)
            for name, url, more in (
                ("one-file", cls.mutual.base_url, own),
                ("two-files", cls.mutual.base_url, two),
                ("one-file-12", cls.mutual_12.base_url, own),
                ("without", cls.mutual.base_url, {}),
                ("without-12", cls.mutual_12.base_url, {}),
                ("not-for-clients", cls.mutual.base_url, {"client_cert": SERVER_FILE}),
                ("expired", cls.expired.base_url, {}),
                ("other-name", f"https://127.1:{port}/v1", {}),
                ("leaf", cls.upstream.base_url, {"ca_file": SERVER_FILE}),
                ("other-ca", cls.upstream.base_url, {"ca_file": CLIENT_FILE}),
                ("old", f"https://127.0.0.1:{old}/v1", {}),
                ("plain", f"https://127.0.0.1:{plain}/v1", {}),
                ("closed", f"https://127.0.0.1:{silent}/v1", {}),
            )
        }
        providers["stranger"] = {"api_base_url": cls.upstream.base_url, "models": ["stranger"]}
        cls.proxy = enter(cls.addClassCleanup, Proxy({"providers": providers}))

    def setUp(self):
        for upstream in (self.upstream, self.expired, self.mutual, self.mutual_12):
            upstream.reset()

    def ask(self, model: str) -> Any:
        return post(self.proxy.port, "/v1/responses", {"model": model})

    def refused(self, model: str) -> str:
        return self.check_error(self.ask(model), 502, "upstream_connection_error")

    def test_client_certificate_is_shown(self):
        for name in ("one-file", "two-files", "one-file-12"):
            with self.subTest(name):
                self.assertEqual(self.ask(name).status, 200)

    def test_upstream_that_misses_a_client_certificate_is_an_error_that_names_the_setting(self):
        message = self.refused("without")  # in TLS 1.3, by the first read after the request
        self.assertIn("it asks for a client certificate; set providers.without.client_cert", message)
        self.assertIn("client certificate (providers.without-12.client_cert)", self.refused("without-12"))
        self.assertEqual(self.mutual.requests + self.mutual_12.requests, [])

    def test_upstream_that_refuses_the_client_certificate_is_an_error_that_names_it(self):
        self.assertIn(
            "refuses the certificate in providers.not-for-clients.client_cert", self.refused("not-for-clients")
        )

    def test_unknown_issuer_is_named_together_with_ca_file(self):
        before = self.upstream.connections
        self.assertEqual(
            self.refused("stranger"),
            f'upstream connection error: certificate of 127.0.0.1 is signed by "{CA_NAME}", which is not trusted; '
            "set providers.stranger.ca_file",
        )
        self.assertEqual((self.upstream.connections - before, self.upstream.requests), (2, []))
        self.assertIn("check providers.other-ca.ca_file", self.refused("other-ca"))

    def test_expired_certificate_is_an_error_with_its_date(self):
        self.assertIn("certificate of 127.0.0.1 expired on 2021-01-01", self.refused("expired"))
        self.assertEqual(self.expired.requests, [])

    def test_certificate_of_another_name_is_an_error_with_its_names(self):
        message = self.refused("other-name")
        self.assertIn(
            'is for "127.0.0.1", "localhost", not for 127.1; check providers.other-name.api_base_url', message
        )

    def test_certificate_in_ca_file_needs_no_ca(self):
        self.assertEqual(self.ask("leaf").status, 200)

    def test_what_is_no_tls_or_too_old_is_an_error_that_says_so(self):
        for name, words in (
            ("old", "it speaks no TLS 1.2 or newer"),
            ("plain", "it does not speak TLS; check providers.plain.api_base_url"),
            ("closed", "(it closed the connection|Connection reset by peer)"),
        ):
            with self.subTest(name):
                self.assertRegex(self.refused(name), "no TLS handshake with 127.0.0.1: " + words)


class RefusalTest(unittest.TestCase):
    def explain(self, code: int, shown: Mapping[str, Any]) -> str:
        provider = plexus_lite.Provider({}, {}, name="gw")
        error = ssl.SSLCertVerificationError(1, "")
        error.verify_code, error.verify_message = code, "as OpenSSL says"
        attempt = plexus_lite.Attempt(provider, "https://gw.example/v1", 0)
        with mock.patch.object(attempt, "_refused_certificate", return_value=shown):
            return str(attempt._explain_refusal(error))

    def test_only_what_the_certificate_bears_out_is_claimed(self):
        good: Dict[str, Any] = {"issuer": ((("commonName", "CA\x1b[2J"),),), "notAfter": "Jan  1 00:00:00 2096 GMT"}
        names = (("DNS", "a"), ("DNS", "\x07"), ("IP Address", "::1"))
        for code, shown, words in (
            (20, good, 'is signed by "CA\\u001b[2J", which is not trusted'),
            (20, {}, "is refused: as OpenSSL says"),
            (20, {**good, "notAfter": "Foo 99"}, "is refused: as OpenSSL says"),
            (
                20,
                {**good, "issuer": ((("countryName", "DE"),), (("organizationName", "C"),))},
                'is signed by "DE, C", ',
            ),
            (
                10,
                good,
                'is signed by "CA\\u001b[2J": that certificate or one above it has expired; check providers.gw.ca',
            ),
            (10, {**good, "notAfter": "Jan  1 00:00:00 1970 GMT"}, "expired on 1970-01-01"),
            (9, good, "is refused: as OpenSSL says; check the clock of this machine"),
            (62, good, "is for no name at all, not for gw.example"),
            (62, {**good, "subjectAltName": names}, 'is for "a", "\\u0007", "::1", not for gw.example'),
            (64, good, "is for no name at all, not for gw.example"),
            (79, good, "is refused: as OpenSSL says"),
        ):
            with self.subTest(code=code, words=words):
                self.assertIn(f"certificate of gw.example {words}", self.explain(code, shown))


class FilesTest(Folder):
    def test_file_that_cannot_be_used_is_one_line_with_key_and_path(self):
        whole, client = read(CLIENT_FILE), split_pem(CLIENT_FILE)
        empty, key = self.write("empty", ""), self.write("key", client["key"])
        garbled = self.write("garbled", whole.replace("MII", "!!!"))
        encrypted = self.write("encrypted", ENCRYPTED_KEY)
        missing = os.path.join(self.folder, "missing")
        for name, settings, path, words in (
            ("missing CA", {"ca_file": missing}, "ca_file", f"cannot read {missing}: No such file"),
            ("empty CA", {"ca_file": empty}, "ca_file", f"{empty} holds no -----BEGIN CERTIFICATE"),
            ("a folder", {"ca_file": self.folder}, "ca_file", f"cannot read {self.folder}: "),
            ("a key as CA", {"ca_file": key}, "ca_file", f"{key} holds no -----BEGIN CERTIFICATE"),
            ("garbled CA", {"ca_file": garbled}, "ca_file", f"cannot use {garbled}: the PEM in it is damaged"),
            ("missing", {"client_cert": missing}, "client_cert", f"cannot read {missing}"),
            ("a key", {"client_cert": key}, "client_cert", f"{key} holds no -----BEGIN CERTIFICATE"),
            ("no key", {"client_cert": CA_FILE}, "client_key", f"{CA_FILE} holds no -----BEGIN PRIVATE KEY"),
            (
                "missing key",
                {"client_cert": CLIENT_FILE, "client_key": missing},
                "client_key",
                f"cannot read {missing}",
            ),
            ("garbled", {"client_cert": garbled}, "client_key", "the PEM in it is damaged"),
            ("key of another", {"client_cert": CLIENT_FILE, "client_key": SERVER_FILE}, "client_key", "does not match"),
            ("encrypted", {"client_cert": CLIENT_FILE, "client_key": encrypted}, "client_key", "is encrypted"),
            ("key alone", {"client_key": key}, "client_key", "there is no client_cert"),
        ):
            with self.subTest(name), self.assertRaises(plexus_lite.ConfigError) as caught:
                plexus_lite.make_tls_context(plexus_lite.Provider({}, {}, name="gw", **settings))
            self.assertTrue(str(caught.exception).startswith(f"providers.gw.{path}: "), caught.exception)
            self.assertIn(words, str(caught.exception))

    def test_what_is_accepted_is_the_same_on_every_python(self):
        context = plexus_lite.make_tls_context(plexus_lite.Provider({}, {}, name="gw", ca_file=CA_FILE))
        self.assertEqual(context.minimum_version, ssl.TLSVersion.TLSv1_2)
        self.assertEqual((context.verify_mode, context.check_hostname), (ssl.CERT_REQUIRED, True))
        self.assertEqual(context.verify_flags & getattr(ssl, "VERIFY_X509_STRICT", 0), 0)  # on since 3.13

    @unittest.skipUnless(hasattr(signal, "SIGHUP"), "needs SIGHUP")
    def test_renewed_certificate_is_read_on_sighup(self):
        upstream = enter(self.addCleanup, tls_upstream(newest=ssl.TLSVersion.TLSv1_3))
        path = self.write("client.pem", read(SERVER_FILE))
        provider = {"api_base_url": upstream.base_url, "models": ["m"], "ca_file": CA_FILE, "client_cert": path}
        proxy = enter(self.addCleanup, Proxy({"providers": {"gw": provider}}))
        self.assertEqual(post(proxy.port, "/v1/responses", {"model": "m"}).status, 502)
        self.write("client.pem", read(CLIENT_FILE))
        proxy.process.send_signal(signal.SIGHUP)
        proxy.wait_for_record(lambda record: "reloaded" in str(record.get("message")))
        self.assertEqual(post(proxy.port, "/v1/responses", {"model": "m"}).status, 200)


if __name__ == "__main__":
    unittest.main()
