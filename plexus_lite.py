#!/usr/bin/env python3
"""plexus_lite: a one-file proxy that keeps the prompt cache of agent clients warm.

It stands between agent clients (Codex CLI, pi, hermes-agent, opencode, the OpenAI SDKs) and upstreams that speak the
OpenAI Responses API.  Every request of a conversation reaches the machine that already holds its prefix, with the
headers that a backend routes its cache by; everything else passes through untouched, byte for byte.

    python plexus_lite.py                 serve what config.json beside this file says
    python plexus_lite.py init            print a starter configuration
    python plexus_lite.py check           say whether every upstream can be used, and what is wrong if not
    python plexus_lite.py report LOG...   say from its logs (also .gz; - is stdin) if the cache is warm, and if not, why
    python plexus_lite.py --help          every option and every configuration key

How a request travels (client and upstream as in RFC 9110 3.7; one thread, the loop, owns all client sockets, and a
Handler gets a thread of its own where it has to wait or to compute for long):

    client --HTTP/1.1--> Loop: head, body --> Handler: JSON, policy, placement, credential, send
       ^                                                                          |
       |                                                                     HTTP/1.1
       +--- bytes as they arrive --- Loop: answer head, relay <------------ upstream
                                           |
                                           +--copy--> usage, reasons for a miss --> log, /metrics, page

Table of contents (each room uses only rooms above it; everything above the waterline is free of I/O):

     1  Constants       header sets, sizes, times, exit codes
     2  Errors          what a caller can tell apart, with HTTP status and code
     3  Config          strict parsing of config.json
     4  Messages        HTTP/1.1 and JSON readers: bytes in, values or an error out
     5  Policy          routes, keys, session value, headers both ways, the model's span
     6  Placement       which upstream gets a conversation
     7  Observation     usage, why a request missed the cache, log record, metrics, the page's figures
     --- waterline ---
     8  Credentials     keys in files, Codex sign-ins
     9  Transport       the loop; urllib opener over pooled connections, TLS both ways, forward proxies, libzstd
    10  Relay           client connections, answers, backpressure, timeouts
    11  Handler         read, route, place, forward
    12  Server          log, listen, accept, observe, reload, drain, stop, workers
    13  Demo            the built-in upstream behind demo://
    14  Page            the status page
    15  Report          what access logs say
    16  Check           the doctor: is every upstream reachable
    17  CLI             options, the configuration file, commands, main

What it does not do: translate between APIs, retry after the first byte, keep state on disk, store or log a prompt,
cache an answer, contact anything that the configuration does not name.

MIT License

Copyright (c) 2026 the plexus_lite developers

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

import argparse
import base64
import bisect
import codecs
import collections
import contextlib
import email.utils
import errno
import functools
import gc
import hashlib
import hmac
import http
import http.server
import io
import ipaddress
import json
import marshal
import math
import mmap
import os
import queue
import random
import re
import secrets
import selectors
import shutil
import signal
import socket
import ssl
import stat
import struct
import sys
import threading
import time
import urllib.parse
import urllib.request
import zlib
from typing import (
    Any,
    Callable,
    ClassVar,
    Deque,
    Dict,
    Final,
    FrozenSet,
    Generic,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    NoReturn,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    TypeVar,
    Union,
)

__version__: Final = "1.0.0"

# ---------------------------------------------------------------------------
# 1  Constants -- header sets, sizes, times, exit codes.  No code.
# ---------------------------------------------------------------------------

# RFC 9110 7.6.1, with the two Proxy- fields that clients still send and RFC 9113's upgrade field.
HOP_BY_HOP: Final = frozenset(
    ("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer")
    + ("transfer-encoding", "upgrade", "http2-settings")
)
# Rebuilt by whoever sends the message: they describe one connection or one transfer.
REBUILT: Final = frozenset({"host", "content-length", "transfer-encoding", "expect", "accept-encoding"})
# A client's credentials and account, never for an upstream that has its own.
CREDENTIALS: Final = frozenset(
    ("authorization", "x-api-key", "api-key", "x-goog-api-key", "cookie", "proxy-authorization")
    + ("chatgpt-account-id", "openai-organization", "openai-project")
)
# Where a client says which conversation this is; first present and non-empty.  Not thread-id: it differs per sub-agent.
SESSION_SOURCES: Final = (
    "session-id",  # Codex from 0.131, pi 0.87
    "session_id",  # Codex to 0.130, pi 0.73, hermes
    "x-claude-code-session-id",
    "x-session-id",  # opencode
    "x-session-affinity",  # opencode, pi chat
    "x-opencode-session",
    "x-grok-conv-id",
    "x-multi-turn-session-id",
)
# Old backends read the underscore, the current Codex backend only the hyphen.
SESSION_SPELLINGS: Final = ("session_id", "session-id")
LISTS: Final = ("input", "messages")  # where the items of a prompt stand: Responses, chat
# What is looked at of a body.
MEMBERS: Final = frozenset(("model", "instructions", "tools", "previous_response_id", "prompt_cache_key") + LISTS)
TURN_STATE: Final = "x-codex-turn-state"  # minted by one upstream, readable only there
TOKEN: Final = r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # RFC 9110 5.6.2: a method, a field's name

KIB: Final = 1024
MIB: Final = 1024 * KIB
RECEIVE_BYTES: Final = 256 * KIB  # one read; larger ones measured no faster, smaller ones cost a call per 64 KiB
HIGH_WATER_BYTES: Final = 256 * KIB  # unsent answer bytes of one client at which its upstream is no longer read
PIPELINE_BYTES: Final = 64 * KIB  # bytes of further requests kept while one is being answered
REQUEST_LINE_BYTES: Final = 16 * KIB  # RFC 9112 3 asks for at least 8000
CHUNK_LINE_BYTES: Final = 4 * KIB  # chunk size with extensions; real ones have under 20
LARGE_BODY_BYTES: Final = 8 * MIB  # what it took to collect it is given back to the system at once
SMALL_BODY_BYTES: Final = 256 * KIB  # a refused request's body up to this is read, so that the connection stays in step
HELD_ANSWER_BYTES: Final = 64 * KIB  # an error answer up to this is held back: to fail over, to mask our key
MAX_MEMBERS: Final = 16  # of a gzip or zstd body; each costs a copy of what follows: 50,000 empty ones take minutes
ZSTD_WINDOW_LOG: Final = 23  # 8 MiB, what RFC 9659 allows a zstd body; its header alone could claim gigabytes
MAX_INT_DIGITS: Final = 4300  # CPython's own bound since 3.11; older ones convert in quadratic time
QUIET_S: Final = 0.002  # requests that ended are looked at after this long without work: their clients come first
MAX_WAITING: Final = 8  # or when so many calls wait, two a request: all at once must not keep other clients waiting
TICK_S: Final = 0.25  # how often deadlines are looked at
LINGER_S: Final = 2.0  # RFC 9112 9.6: read on after the last answer, or a reset would destroy it
HELD_ANSWER_S: Final = 2.0  # an error answer has so long to be whole; then another target is asked, or it is handed on
BACKLOG: Final = 1024  # with the standard library's 5, a third of 512 streams opened at once were reset
ACCEPTS: Final = 16  # connections accepted in one go; then the running streams, and other workers, have their turn
RESPAWN_S: Final = (1.0, 30.0)  # a worker that died is replaced after this; doubling while it dies young
# A collection of many young objects holds up all streams: 10 ms among 500.  Hardly any request leaves a cycle behind,
# so few are looked at together, once, and the older ones seldom.
GC_THRESHOLDS: Final = (2000, 100, 10)
STACK_BYTES: Final = 8 * MIB  # json recurses on it: deep JSON must be a RecursionError, not the end of its stack (musl)
# All workers wake for each new connection, and the quickest had most of them: those with fewer may take it first.
YIELD_S: Final = 0.005
PARSERS: Final = 4  # large bodies read at a time: JSON of many small values takes 31 times its size meanwhile
SPARE_THREADS: Final = 16  # beside one for each of the clients that may be
ACCEPT_PAUSE_S: Final = 0.5  # without file descriptors accept() fails at once and for ever: pause instead of spinning
MAX_NAME_CHARS: Final = 200  # of a model in records and labels: behind "*" clients choose it
MAX_REMEMBERED: Final = 10_000  # pins, and owners of response ids, each; the least recently used go
COOLDOWN_FIRST_S: Final = 2.0
COOLDOWN_MAX_S: Final = 300.0
FEED_S: Final = 1.0  # between two events of the status page
FEED_REPEAT_S: Final = 15.0  # and a repetition, so that whatever stands between does not take it for dead
TICKET_S: Final = 60  # a ticket opens the status page's stream for so long; the stream itself may last
LOAD_FACTOR: Final = 1.25  # bounded load: open requests over the fair share
LOAD_MINIMUM: Final = 4  # below it small fleets lose cache for no gain (0.92 kept with 2, 0.997 with 4)
CACHE_MINIMUM_TOKENS: Final = 1024  # OpenAI caches no shorter prompt
CACHE_IDLE_S: Final = 300.0  # and keeps a prefix for 5 to 10 minutes of idle time
MAX_SEEN: Final = 2000  # bodies of which it is remembered what they consist of, in some KiB each
SEEN_DIGESTS_BYTES: Final = 64 * KIB  # of one body: more than 16,000 items are no conversation, and 2000 such add up
MAX_SPANS: Final = 20_000  # of an array, more than are remembered: each takes 128 bytes, for items of two bytes, too
SEEN_BYTES: Final = 4 * KIB  # shorter bodies are parsed in less time than is saved
UNKNOWN_TOKENS: Final = 2**53  # of a turn whose answer was cut before it told
RETRY_STATUSES: Final = frozenset({429, 500, 502, 503, 504, 529})

EXIT_OK: Final = 0
EXIT_CHECK_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_CANNOT_LISTEN: Final = 3
EXIT_INTERRUPTED: Final = 130  # 128 and SIGINT, as shells say it

# ---------------------------------------------------------------------------
# 2  Errors -- ProxyError and its kinds, ClientGone, ConfigError.  Nothing but names, statuses and codes.
# ---------------------------------------------------------------------------

# code: (status, OpenAI's type, whether the connection closes because it can no longer be in step)
ERRORS: Final[Mapping[str, Tuple[int, str, bool]]] = {
    "invalid_request": (400, "invalid_request_error", False),
    "invalid_json": (400, "invalid_request_error", False),
    "invalid_header": (400, "invalid_request_error", True),
    "invalid_api_key": (401, "authentication_error", False),
    "model_not_allowed": (403, "permission_error", False),
    "forbidden_origin": (403, "permission_error", False),
    "not_found": (404, "invalid_request_error", False),
    "model_not_found": (404, "invalid_request_error", False),
    "method_not_allowed": (405, "invalid_request_error", False),
    "request_timeout": (408, "invalid_request_error", True),
    "length_required": (411, "invalid_request_error", False),
    "content_too_large": (413, "invalid_request_error", True),
    "uri_too_long": (414, "invalid_request_error", True),
    "unsupported_content_encoding": (415, "invalid_request_error", False),
    "expectation_failed": (417, "invalid_request_error", True),
    "websocket_not_supported": (426, "invalid_request_error", True),
    "headers_too_large": (431, "invalid_request_error", True),
    "internal_error": (500, "server_error", False),
    "not_implemented": (501, "invalid_request_error", True),
    "upstream_connection_error": (502, "server_error", False),
    "upstream_invalid_response": (502, "server_error", False),
    "overloaded": (503, "server_error", True),
    "shutting_down": (503, "server_error", True),
    "upstream_timeout": (504, "server_error", False),
    "http_version_not_supported": (505, "invalid_request_error", True),
}


class ProxyError(Exception):
    """An answer that the proxy makes itself: a code of the table above, and a message the client can act on."""

    def __init__(
        self, code: str, message: str, *, param: Optional[str] = None, fields: Sequence[Tuple[str, str]] = ()
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.closes = ERRORS[code]
        self.code = code
        self.message = message
        self.param = param
        self.fields = tuple(fields)
        if self.status == 503:
            self.fields += (("Retry-After", "1"),)

    def alone(self) -> "ProxyError":
        """Return it without what leads back to where it came from: a request that keeps it would keep itself."""
        if self.__context__:  # which may have a name in its own traceback, and keep itself with all of that
            self.__context__.__traceback__ = None
        self.__traceback__ = self.__context__ = None
        return self


class MalformedHTTP(ProxyError):
    """Bytes that two parsers could read differently, from either side."""

    def __init__(self, message: str, code: str = "invalid_request") -> None:
        super().__init__(code, message)
        self.closes = True


class UpstreamError(ProxyError):
    """No usable answer from an upstream.  pi retries on the message's first words."""

    def __init__(self, detail: str, code: str = "upstream_connection_error") -> None:
        super().__init__(code, "upstream connection error: " + detail)


def too_large(what: str, limit: int) -> ProxyError:
    return ProxyError("content_too_large", f"the {what} is larger than limits.max_body_bytes ({limit})")


def shutting_down() -> ProxyError:
    return ProxyError("shutting_down", "the proxy is shutting down")


class ClientGone(Exception):
    """The client closed its connection: nobody is left to answer."""


def one_line(text: str) -> str:
    """Return *text* as one line for the operator's terminal, whatever stands in a name."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class ConfigError(Exception):
    """What is wrong in the configuration, and where: *path* is the place inside the file, "" for all of it."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(one_line(f"{path}: {message}" if path else message))


# ---------------------------------------------------------------------------
# 3  Config -- Config, Limits, Provider, Key, Alias, Target; parse_config, expand_variables, targets_of,
#    render_reference.  Decoded JSON in, values out; knows no file.  The name, default, check and description of a key
#    stand together.
# ---------------------------------------------------------------------------

APIS: Final = ("responses", "chat")
T = TypeVar("T")
D = TypeVar("D")
S = TypeVar("S", bound="Settings")
Read = Callable[[Any, str], T]  # (value, its path in the file) -> what stands for it in the Config; or ConfigError
REQUIRED: Final[NoReturn] = ...  # type: ignore[assignment]  # NoReturn: it is no value that a member could have


class Setting(NamedTuple):
    """A key of the file; its name is that of the member that it stands for."""

    read: Read[Any]
    default: Any
    text: str  # for the reference


def setting(read: Read[T], default: D, text: str) -> Union[T, D]:
    """Declare a key of the file: *read* checks what stands there."""
    return Setting(read, default, text)  # type: ignore[return-value]  # Settings puts one of these in its place


def join_path(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def describe(value: object) -> str:
    """Return what was found, short enough for one line."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    value = value[:57] + "..." if isinstance(value, str) and len(value) > 60 else value
    return one_line(json.dumps(value, ensure_ascii=False))  # an answer that it stands in escapes it once more


def expect(wanted: str, holds: Callable[[Any], object], hidden: Any = ()) -> Read[Any]:
    """Return a check that lets pass, as it is, what *holds* is true of; no error shows a value of the type *hidden*."""

    def read(value: Any, path: str) -> Any:
        if not holds(value):
            found = "" if isinstance(value, hidden) else f", found {describe(value)}"
            raise ConfigError(path, f"expected {wanted}{found}")
        return value

    return read


def a_number(kind: Type[T], minimum: float, maximum: float) -> Read[T]:
    """Return a check for a number from *minimum* to *maximum*, whole if *kind* is int; true and false are none."""
    wanted = f"a{' whole' if kind is int else ''} number from {minimum:g} to {maximum:g}"
    return expect(wanted, lambda value: type(value) in (int, kind) and minimum <= value <= maximum)


def a_text(pattern: str, wanted: str, hidden: Any = ()) -> Read[str]:
    return expect(wanted, lambda value: isinstance(value, str) and re.fullmatch(pattern, value), hidden)


def one_of(*allowed: str) -> Read[str]:
    return expect(" or ".join(map(json.dumps, allowed)), lambda value: value in allowed)


def a_list(item: Read[T], wanted: str = "a list", least: int = 0) -> Read[Tuple[T, ...]]:
    whole = expect(wanted, lambda value: isinstance(value, list) and len(value) >= least)
    return lambda value, path: tuple(item(one, f"{path}[{at}]") for at, one in enumerate(whole(value, path)))


# A string is not shown: in the place of {"secret": ...} or of headers it is probably a credential.
an_object: Final[Read[Dict[str, Any]]] = expect("an object", lambda value: isinstance(value, dict), hidden=str)


def a_map(item: Read[T], wanted: str = "an object") -> Read[Mapping[str, T]]:
    """Return a check for an object that has what *item* checks under names of the user's choice."""
    wanted += " whose names are not empty"
    whole = expect(wanted, lambda value: isinstance(value, dict) and "" not in value, hidden=(str, dict))
    return lambda value, path: {name: item(one, f"{path}.{name}") for name, one in whole(value, path).items()}


def read_object(value: Any, path: str, reads: Mapping[str, Read[T]]) -> Dict[str, T]:
    """Return what stands in the object *value* under keys of *reads*, each as that reads it; there may be no other."""
    for name in an_object(value, path):
        if name not in reads:
            raise ConfigError(join_path(path, name), f"unknown key; allowed: {', '.join(sorted(reads))}")
    return {name: reads[name](item, join_path(path, name)) for name, item in value.items()}


a_string: Final[Read[str]] = expect("a non-empty string", lambda value: isinstance(value, str) and value)
a_flag: Final[Read[bool]] = expect("true or false", lambda value: isinstance(value, bool))
a_time: Final = a_number(float, 0.001, 86400)
a_time_or_0: Final = a_number(float, 0, 86400)
a_size: Final = a_number(int, 1024, 2**40)
a_price: Final = a_number(float, 0, 10**6)
a_string_list: Final = a_list(a_string)
a_worker_count: Final[Read[Union[int, str]]] = expect(
    'a whole number from 1 to 256, or "auto"',
    lambda value: value == "auto" or (type(value) is int and 0 < value <= 256),
)
# Credentials travel in header fields: visible ASCII; room 8 reads file:PATH.
a_secret: Final = a_text(r"(?!file:)[!-~]+|file:[^\0]+", "a string of visible ASCII, or file:PATH", object)
a_field_value: Final = a_text(r"[!-~]([ -~]*[!-~])?", "a string of printable ASCII without spaces around it", object)
a_token: Final = a_text(TOKEN, "a header field name")


def a_field_name(value: Any, path: str) -> str:
    if a_token(value, path).lower() in HOP_BY_HOP | {"content-length", "expect"}:
        raise ConfigError(path, f"{value} belongs to the connection and cannot be set")
    return str(value)


def an_affinity_header(value: Any, path: str) -> str:
    if a_field_name(value, path).lower() in CREDENTIALS | REBUILT:
        raise ConfigError(path, f"{value} has a value of its own, so the session value cannot stand in it")
    return str(value)


def header_fields(value: Any, path: str) -> Tuple[Tuple[str, str], ...]:
    fields = a_map(a_field_value, "an object of header names and values")(value, path)
    names = {a_field_name(name, f"{path}.{name}").lower() for name in fields}
    if len(names) < len(fields):
        raise ConfigError(path, "a header stands twice, once in another case")
    return tuple(fields.items())


def split_url(value: Any, problem: ConfigError) -> urllib.parse.SplitResult:
    """Return the parts of the http or https URL *value*; raise *problem* if it is none."""
    if not isinstance(value, str) or not re.fullmatch(r"[\x21-\x7e]+", value):
        raise problem
    with contextlib.suppress(ValueError):  # of a port, too, when it is asked for
        parts = urllib.parse.urlsplit(value)
        # getaddrinfo raises for a label that is empty or has more than 63 characters; a dot may end the name.
        is_host = re.fullmatch(r"([^.]{1,63}\.)*[^.]{1,63}\.?", parts.hostname or "")
        if parts.scheme in ("http", "https") and is_host and parts.port != 0:
            return parts
    raise problem


def a_base_url(value: Any, path: str) -> str:
    """Return *value*, which is http(s)://host[:port][/path], without a trailing slash."""
    wanted = 'expected a base URL like "https://host/v1" (or "demo://")'
    parts = split_url(value, ConfigError(path, f"{wanted}, found {describe(value)}"))
    if parts.query or parts.fragment or "@" in parts.netloc:
        raise ConfigError(path, "a base URL has no query, fragment or user name")
    return urllib.parse.urlunsplit(parts).rstrip("/")  # the scheme in lower case


def a_replica(value: Any, path: str) -> str:
    return str(value) if value in ("demo://", "oauth://") else a_base_url(value, path)


def read_replicas(value: Any, path: str) -> Tuple[str, ...]:
    if isinstance(value, str):
        return (a_replica(value, path),)
    urls = a_list(a_replica, "a base URL, or a list of at least one", least=1)(value, path)
    if len(set(urls)) < len(urls):
        raise ConfigError(path, "the same base URL stands twice")
    return urls


def base_urls(value: Any, path: str) -> Mapping[str, Tuple[str, ...]]:
    """Return the replicas for each API; a bare string or list is for Responses."""
    if not isinstance(value, dict):
        return {"responses": read_replicas(value, path)}
    found = read_object(value, path, dict.fromkeys(APIS, read_replicas))
    if not found:
        raise ConfigError(path, "expected at least one of: chat, responses")
    if "demo://" in found.get("chat", ()):
        raise ConfigError(f"{path}.chat", "demo:// speaks the Responses API only")
    return found


def model_access(value: Any, path: str) -> Tuple[str, ...]:
    return read_object(value, path, {"access_via": a_list(one_of(*APIS))}).get("access_via", APIS)


def provider_models(value: Any, path: str) -> Mapping[str, Tuple[str, ...]]:
    """Return for each model the APIs that reach it; from a list of names or Plexus' {name: {"access_via": [...]}}."""
    if isinstance(value, list):
        return dict.fromkeys(a_string_list(value, path), APIS)
    return a_map(model_access, "a list of model names, or an object")(value, path)


class ForwardProxy(NamedTuple):
    host: str
    port: int
    credentials: bytes  # user:password, b"" for none

    def __repr__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return join_authority(self.host, self.port)

    def fields(self) -> List[Tuple[str, str]]:
        """Return what a request that this proxy reads has to carry (RFC 7617)."""
        token = base64.b64encode(self.credentials).decode("ascii")
        return [("Proxy-Authorization", "Basic " + token)] if self.credentials else []


def join_authority(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def a_proxy(value: Any, path: str) -> Union[str, ForwardProxy]:
    """Return "env" and file:PATH as they are (room 8 reads the file), else the forward proxy that a URL names."""
    if isinstance(value, str) and re.fullmatch(r"env|file:[^\0]+", value):
        return value
    return a_proxy_url(value, path, '"env", file:PATH or ')


def a_proxy_url(value: Any, path: str, others: str = "") -> ForwardProxy:
    """Return the forward proxy that a URL names.  Errors never show the value: a password may stand in it."""
    wanted = f'expected {others}a URL like "http://user:password@host:3128" (special characters as %XX)'
    parts = split_url(value, ConfigError(path, wanted))
    if parts.path.strip("/") or parts.query or parts.fragment:
        raise ConfigError(path, wanted)
    if parts.scheme == "https":
        raise ConfigError(path, "TLS to the proxy itself is not supported; use http://")
    user = parts.netloc.rpartition("@")[0]
    user += ":" if user and ":" not in user else ""  # RFC 7617: it is there even if no password is
    return ForwardProxy(parts.hostname or "", parts.port or 80, urllib.parse.unquote_to_bytes(user))


class Settings:  # noqa: PLW1641  # no hash: some members are dictionaries
    """What an object of the file says: its keys are the members that a subclass declares with setting().

    It never changes, and has no repr of its own: no traceback shows a credential.  Not a dataclass: the import of
    those takes longer than all else that is done here.
    """

    rows: ClassVar[Mapping[str, Setting]]

    def __init_subclass__(cls) -> None:
        cls.rows = {name: row for name, row in vars(cls).items() if isinstance(row, Setting)}

    def __init__(self, *values: Any, **named: Any) -> None:
        vars(self).update({name: row.default for name, row in self.rows.items()})
        vars(self).update(zip(self.rows, values), **named)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{name} cannot be set; see _replace")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and vars(self) == vars(other)

    def _replace(self: S, **changes: Any) -> S:
        """Return a copy with *changes*, as that of a NamedTuple does."""
        return type(self)(**{**vars(self), **changes})

    @classmethod
    def parse(cls: Type[S], value: Any, path: str) -> S:
        """Return what the object *value*, which stands at *path* of the file, says."""
        found = read_object(value, path, {name: row.read for name, row in cls.rows.items()})
        for name, row in cls.rows.items():
            if row.default is REQUIRED and name not in found:
                raise ConfigError(join_path(path, name), "missing; it must be set")
        return cls(**found)


class Limits(Settings):
    max_body_bytes = setting(a_size, 100 * MIB, "largest request body, also after decoding")
    max_buffered_bytes = setting(a_size, 1024 * MIB, "request bodies held at one time, all clients together")
    max_header_bytes = setting(a_size, 64 * KIB, "largest head of a request, and of an upstream's answer")
    max_connections = setting(a_number(int, 1, 10**6), 1024, "client connections at one time")
    header_timeout_s = setting(a_time, 15, "for the whole head of a request")
    body_timeout_s = setting(a_time, 60, "for the whole body of a request")
    connect_timeout_s = setting(a_time, 10, "to reach an upstream, TLS included")
    first_byte_timeout_s = setting(a_time, 600, "until an upstream's answer begins")
    idle_timeout_s = setting(a_time, 300, "an upstream silent in the middle of an answer")
    stall_timeout_s = setting(a_time, 300, "a client that does not read its answer")
    client_idle_s = setting(a_time, 75, "a client's connection without a request")
    pool_idle_s = setting(a_time, 60, "an upstream connection without a request; at most 128 idle per target")
    drain_s = setting(a_time_or_0, 30, "running answers may take this long after SIGTERM")
    keepalive_s = setting(a_time_or_0, 15, "comment after this silence in an event stream; 0 = none")
    pin_idle_s = setting(a_time, 1800, "a session moved by a failover returns after this much idle time")


class Key(Settings):
    secret = setting(a_secret, REQUIRED, "what the client sends, or file:PATH")
    models = setting(a_string_list, None, "the only models it may use; absent = all")
    admin = setting(a_flag, False, "the status page shows it the sessions of all keys")


class Price(Settings):
    input = setting(a_price, REQUIRED, "per million input tokens that were not cached")
    cached = setting(a_price, REQUIRED, "per million cached input tokens")
    output = setting(a_price, 0, "per million output tokens")


class Provider(Settings):
    api_base_url = setting(
        base_urls, REQUIRED, 'URL, list of replicas, {"responses": ..., "chat": ...}; demo://, oauth://'
    )
    models = setting(provider_models, REQUIRED, 'names, or {name: {"access_via": [...]}}; "*" = every other name')
    api_key = setting(a_secret, None, "sent as Authorization: Bearer; or file:PATH")
    auth = setting(one_of("key", "passthrough"), "key", '"passthrough" sends the client\'s own credentials')
    auth_file = setting(a_string, None, "of oauth://; default: the Codex CLI's auth.json")
    oauth_refresh = setting(a_flag, False, "of oauth://: renew the tokens in auth_file here")
    oauth_base_url = setting(a_base_url, "https://chatgpt.com/backend-api/codex", "what oauth:// stands for")
    oauth_token_url = setting(a_base_url, "https://auth.openai.com/oauth/token", "who renews the tokens")
    oauth_client_id = setting(a_string, "app_EMoamEEZ73f0CkXaXp7hrann", "for whom: the Codex CLI's public id")
    account = setting(a_string, None, "who can read its encrypted_content; default: the provider")
    headers = setting(header_fields, (), "static headers; they win over all")
    session_headers = setting(a_list(one_of(*SESSION_SPELLINGS)), SESSION_SPELLINGS, "the spellings that leave")
    affinity_headers = setting(a_list(an_affinity_header), (), "further headers that receive the session value")
    wait_on_429_s = setting(a_time_or_0, 0, "wait this long in all before a 429 is handed on")
    ca_file = setting(a_string, None, "PEM file of CAs, added to the system's roots")
    client_cert = setting(a_string, None, "PEM file of our certificate, for upstreams that ask for one")
    client_key = setting(a_string, None, "PEM file of its key, unencrypted; default: in client_cert")
    proxy = setting(a_proxy, None, 'http://[user:password@]host:port, or file:PATH, or "env" for HTTPS_PROXY, NO_PROXY')
    connect_timeout_s = setting(a_time, None, "overrides limits.connect_timeout_s")
    first_byte_timeout_s = setting(a_time, None, "overrides limits.first_byte_timeout_s")
    idle_timeout_s = setting(a_time, None, "overrides limits.idle_timeout_s")
    enabled = setting(a_flag, True, "false takes it out")
    name: str = ""

    @classmethod
    def parse(cls, value: Any, path: str) -> "Provider":
        """Return also what its place, providers.NAME, and its oauth:// mean."""
        provider = super().parse(value, path)._replace(name=path.partition(".")[2])
        if "oauth://" not in provider.urls():
            if provider.auth_file or provider.oauth_refresh:
                raise ConfigError(path, "auth_file and oauth_refresh go only with oauth://")
            return provider
        if provider.api_key or provider.auth != "key" or provider.api_base_url != {"responses": ("oauth://",)}:
            raise ConfigError(f"{path}.api_base_url", "oauth:// stands alone: no api_key, auth, other URL or chat")
        return provider._replace(auth="oauth", api_base_url={"responses": (provider.oauth_base_url,)})

    def urls(self) -> Tuple[str, ...]:
        """Return every base URL once, whatever API it is for."""
        return tuple(dict.fromkeys(url for urls in self.api_base_url.values() for url in urls))

    def replicas(self, model: str, api: str) -> Tuple[str, ...]:
        """Return the base URLs at which *model* can be had over *api*."""
        access = self.models.get(model, self.models.get("*", ()))
        return self.api_base_url.get(api, ()) if self.enabled and api in access else ()

    def account_name(self) -> str:
        return self.account or self.name

    def timeout_s(self, name: str, limits: Limits) -> float:
        """Return the timeout *name*: its own, else that of *limits*."""
        return float(getattr(self, name) or getattr(limits, name))


class AliasTarget(Settings):
    provider = setting(a_string, REQUIRED, "name of a provider")
    model = setting(a_string, REQUIRED, "the provider's name of the model")
    weight = setting(a_number(float, 0.001, 1000), 1, "share of the sessions")
    group = setting(a_number(int, 1, 1000), 1, "used when every target of lower groups is out")
    enabled = setting(a_flag, True, "false takes it out")


class Alias(Settings):
    targets = setting(a_list(AliasTarget.parse, "a list of at least one target", 1), REQUIRED, "where the alias leads")


class Replica(NamedTuple):
    provider: Provider
    base_url: str
    model: str
    weight: float = 1
    group: int = 1


class Target(Replica):
    """One place a request can go: a replica of a provider, and the model's name there."""

    @functools.cached_property
    def id(self) -> str:
        """What rendezvous hashing, load and cooldown know it by: the same in every process and after a restart."""
        is_short = len(self.model) <= MAX_NAME_CHARS  # behind "*" clients choose it, and it is remembered
        name = self.model if is_short else hashlib.sha256(self.model.encode("utf-8", "surrogatepass")).hexdigest()
        return self.place + name

    @functools.cached_property
    def place(self) -> str:
        """The same without the model: who issued a response id or turn state."""
        return f"{self.provider.name} {self.base_url} "


class Tls(Settings):
    cert = setting(a_string, REQUIRED, "PEM file of our certificate and the intermediate ones, read at SIGHUP")
    key = setting(a_string, None, "PEM file of its private key; absent = it is in cert")


class Config(Settings):
    providers = setting(a_map(Provider.parse), REQUIRED, "upstreams by name")
    host = setting(a_string, "127.0.0.1", "address to listen on")
    port = setting(a_number(int, 0, 65535), 4000, "port to listen on; 0 = any free one")
    tls = setting(Tls.parse, None, "serve https; absent = http")
    keys = setting(a_map(Key.parse), {}, "clients' keys by name")
    workers = setting(a_worker_count, 1, 'processes that share the port; "auto" = one per core')
    cpu_affinity = setting(a_flag, True, "bind each process to a core: threads that share a GIL lose by moving")
    allow_anonymous = setting(a_flag, False, "listen beyond loopback without keys")
    hosts = setting(a_string_list, (), "names a Host header may have")
    models = setting(a_map(Alias.parse), {}, "aliases by name")
    prices = setting(a_map(Price.parse), {}, "by model name")
    limits = setting(Limits.parse, Limits(), "sizes, times")


def is_loopback(host: str) -> bool:
    """Say whether *host*, a name or address with or without brackets, is this machine only."""
    host = host.strip("[]").lower().rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761 6.3
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def expand_variables(value: Any, variables: Mapping[str, str], path: str = "") -> Any:
    """Return *value* with ${NAME} and ${NAME:-default} replaced in every string; a default also stands for ""."""
    if isinstance(value, dict):
        return {name: expand_variables(item, variables, join_path(path, name)) for name, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, variables, f"{path}[{index}]") for index, item in enumerate(value)]

    def replace(found: "re.Match[str]") -> str:
        name, default = found.groups()
        if name is None or "${" in (default or ""):
            raise ConfigError(path, "expected ${NAME} or ${NAME:-default}")  # else a key would leave as it stands there
        if default is None and name not in variables:
            raise ConfigError(path, f"the environment variable {name} is not set; ${{{name}:-default}} gives a default")
        return variables.get(name) or default or ""

    pattern = r"\$\{(?:([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\})?"
    return re.sub(pattern, replace, value) if isinstance(value, str) else value


def model_list(config: Config) -> List[str]:
    """Return the names a client may use, in the order of the file; not "*", which stands for names unknown here."""
    named = (name for provider in config.providers.values() for name in provider.models)
    return [name for name in dict.fromkeys([*config.models, *named]) if is_served(config, name)]


def is_served(config: Config, model: str) -> bool:
    """Say whether *model* means any target, for whichever API."""
    return any(targets_of(config, model, api) for api in APIS)


def targets_of(config: Config, model: str, api: str) -> Tuple[Target, ...]:
    """Return every target that *model* can mean for *api*; empty if the name is unknown or all of it is disabled.

    Looked for in this order: an alias; direct/<provider>/<model>; the providers that name the model; those that
    have "*", unless the name is configured anywhere.
    """
    direct, *names = model.split("/", 2)
    entries: Sequence[AliasTarget] = ()
    if model in config.models:
        entries = config.models[model].targets
    elif direct == "direct" and len(names) == 2 and names[0] in config.providers and names[1]:
        entries = [AliasTarget(*names)]
    elif model != "*":
        named = [name for name, provider in config.providers.items() if model in provider.models]
        entries = [AliasTarget(name, model) for name in named or config.providers]
    return tuple(
        Target(config.providers[one.provider], url, one.model, one.weight, one.group)
        for one in entries
        if one.enabled
        for url in config.providers[one.provider].replicas(one.model, api)
    )


def places_of(config: Config, models: Optional[Sequence[str]]) -> Tuple[Target, ...]:
    """Return every base URL of the Responses API once, without a model; only those of *models*, unless that is None."""
    enabled = [provider for provider in config.providers.values() if provider.enabled]
    places = [Target(one, url, "") for one in enabled for url in one.api_base_url.get("responses", ())]
    if models is not None:
        allowed = {target.place for name in models for target in targets_of(config, name, "responses")}
        places = [target for target in places if target.place in allowed]
    return tuple(places)


def check_secrets(keys: Mapping[str, Key]) -> None:
    """Refuse two keys that cannot be told apart; those in files have been read."""
    for name, key in keys.items():
        for other, one in keys.items():
            if name != other and f"{key.secret}:".startswith(f"{one.secret}:"):  # SECRET:label is the key SECRET
                raise ConfigError(f"keys.{name}.secret", f"is that of keys.{other}, or that with a label")


def refuse_unknown(path: str, what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        raise ConfigError(path, f"no such {what}: {name}; there are: {', '.join(sorted(known)) or 'none'}")


def check_names(config: Config) -> None:
    """Refuse aliases that lead nowhere, and keys for models that do not exist."""
    for name, alias in config.models.items():
        for index, target in enumerate(alias.targets):
            where = f"models.{name}.targets[{index}]"
            refuse_unknown(f"{where}.provider", "provider", target.provider, config.providers)
            models = config.providers[target.provider].models
            if "*" not in models:
                refuse_unknown(f"{where}.model", f"model of {target.provider}", target.model, models)
    for name, key in config.keys.items():
        for index, model in enumerate(key.models or ()):
            if not is_served(config, model):
                refuse_unknown(f"keys.{name}.models[{index}]", "model", model, model_list(config))


def parse_config(value: Any) -> Config:
    """Return the Config that decoded and expanded JSON describes; ConfigError names the path of what is wrong."""
    config = Config.parse(value, "")
    if not config.providers:
        raise ConfigError("providers", "expected at least one provider")
    check_names(config)
    check_secrets({name: key for name, key in config.keys.items() if not key.secret.startswith("file:")})
    if not (config.keys or config.allow_anonymous or is_loopback(config.host)):
        raise ConfigError("host", f"{config.host} is beyond loopback: set keys, or allow_anonymous to true")
    return config


def render_reference() -> str:
    """Return every configuration key with its default and description, one a line; --help and the README have it."""
    sections: Mapping[str, Type[Settings]] = {
        "": Config,
        "tls.": Tls,
        "keys.NAME.": Key,
        "providers.NAME.": Provider,
        "models.NAME.": Alias,
        "models.NAME.targets[].": AliasTarget,
        "prices.NAME.": Price,
        "limits.": Limits,
    }
    lines = []
    for path, cls in sections.items():
        for name, row in cls.rows.items():
            note = "required" if row.default is REQUIRED else json.dumps(row.default, default=lambda limits: None)
            note = "" if note in ("null", "[]", "{}") else f" ({note})"
            lines.append(f"  {path + name:<40} {row.text}{note}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------
# 4  Messages -- Headers, read_request_head, read_answer_head, body readers, JsonBody, parse_json_body, decode_content.
#    Bytes in, values or an error out.  What two parsers could read differently is refused (RFC 9112 2 to 7, 11.2).
#    Of JSON, what the turn before had (Seen) is not parsed again.
# ---------------------------------------------------------------------------

Field = Tuple[str, str]
Raw = Union[bytes, bytearray]

HOST: Final = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._~!$&'()*+,;=%-]+)(?::[0-9]{0,5})?"
REQUEST_LINE: Final = re.compile(rf"({TOKEN}) ([\x21-\x7e]+) HTTP/([0-9])\.([0-9])")
TARGET: Final = re.compile(rf"(?:(?i:https?)://({HOST}))?(/[^?#]*)(\?[^#]*)?")
STATUS_LINE: Final = re.compile(r"HTTP/1\.([01]) ([1-5][0-9][0-9])(?: ([\t\x20-\x7e\x80-\xff]*))?")
FIELD_LINES: Final = re.compile(rf"(?:{TOKEN}:[\t\x20-\x7e\x80-\xff]*\r\n)*")
CHUNK_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:[ \t]*;[\t\x20-\x7e\x80-\xff]*)?")  # 15 digits: below 2**63
AUTHORITY: Final = re.compile(HOST)
LENGTH: Final = re.compile(r"[0-9]{1,18}")


class Headers:
    """Header fields in the order they came, duplicates kept, names compared without case.  Never changed.

    *values* has those of each name in lower case.
    """

    def __init__(self, fields: Iterable[Field]) -> None:
        self.fields = tuple(fields)
        self.values: Dict[str, List[str]] = {}
        for name, value in self.fields:
            self.values.setdefault(name.lower(), []).append(value)

    def get(self, name: str) -> Optional[str]:
        """Return the first value of *name* (lower case), or None."""
        return self.values[name][0] if name in self.values else None

    def all(self, name: str) -> Sequence[str]:
        return self.values.get(name, ())

    def tokens(self, name: str) -> List[str]:
        """Return the members of a comma-separated field, lower case (RFC 9110 5.6.1)."""
        return [token for value in self.all(name) for token in map(str.strip, value.lower().split(",")) if token]

    def without(self, names: FrozenSet[str]) -> List[Field]:
        """Return the fields but *names* and those that Connection names (RFC 9110 7.6.1), order and duplicates kept."""
        if "connection" in self.values:
            names = names.union(self.tokens("connection"))
        return [field for field in self.fields if field[0].lower() not in names]

    def end_to_end(self) -> "Headers":
        """Return the fields that travel on."""
        return self if HOP_BY_HOP.isdisjoint(self.values) else Headers(self.without(HOP_BY_HOP))


class RequestHead(NamedTuple):
    method: str
    target: str  # as it stands in the request line
    path: str
    query: str  # with its "?", or ""
    authority: Optional[str]  # of the absolute-form, else of Host
    version: int  # the minor version: 0 or 1
    headers: Headers


class AnswerHead(NamedTuple):
    status: int
    reason: str
    version: int
    headers: Headers


def has_bare_line_end(data: bytes) -> bool:
    """Say whether a CR or LF stands alone in *data*; a CR at its very end may still get its LF."""
    pairs = data.count(b"\r\n")
    return data.count(b"\n") != pairs or data.count(b"\r") - data.endswith(b"\r") != pairs


def find_head_end(data: bytes, limit: int) -> int:
    """Return the length of the head in *data* with its empty line, or -1 if it is not complete yet.

    Raises what can be known early, so that a peer that will never send the empty line is not waited for: a TLS
    hello, a bare LF, a first line that is no HTTP.  *limit* is limits.max_header_bytes.
    """
    if data[:1] == b"\x16":
        raise MalformedHTTP("this is a TLS handshake on a plain HTTP port; use http:// in the base URL")
    end = data.find(b"\r\n\r\n") + 4
    size = end if end > 3 else len(data)
    if size > REQUEST_LINE_BYTES and data.find(b"\r\n", 0, REQUEST_LINE_BYTES + 2) < 0:
        raise ProxyError("uri_too_long", f"the request line is longer than {REQUEST_LINE_BYTES} bytes")
    if size > limit:
        raise ProxyError("headers_too_large", f"the header section is larger than limits.max_header_bytes ({limit})")
    if end > 3:
        return end
    if has_bare_line_end(data):
        raise MalformedHTTP("a line ends in something else than CRLF")
    line, complete, _ = data.partition(b"\r\n")
    if complete:
        read_request_line(line)
    return -1


def read_request_line(line: bytes) -> Tuple[str, str, int]:
    """Return method, target and minor version (RFC 9112 3)."""
    found = REQUEST_LINE.fullmatch(str(line, "latin-1"))
    if not found:
        raise MalformedHTTP("the request line is not: method SP target SP HTTP/1.1")
    method, target, major, minor = found.groups()
    if major != "1":
        raise ProxyError("http_version_not_supported", "only HTTP/1.1 and HTTP/1.0 are spoken here")
    return method, target, min(int(minor), 1)


def read_fields(section: bytes) -> Headers:
    """Return the fields of a header *section*, lines with their CRLF; decoded as Latin-1, so that no byte is lost."""
    text = section.decode("latin-1")
    if not FIELD_LINES.fullmatch(text):
        if has_bare_line_end(section):
            raise MalformedHTTP("a line ends in something else than CRLF")
        message = 'a header line is not: name ":" value (no folding, no control characters)'
        raise MalformedHTTP(message, "invalid_header")
    fields = []
    for line in text.split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        fields.append((name, value.strip(" \t")))
    return Headers(fields)


def read_request_head(head: bytes) -> RequestHead:
    """Return the request head in *head*, which ends with its empty line."""
    line, _, section = head[:-2].partition(b"\r\n")
    method, target, version = read_request_line(line)
    headers = read_fields(section)
    hosts = headers.all("host")
    if len(hosts) > 1 or (not hosts and version):
        raise MalformedHTTP("expected exactly one Host field")
    if hosts and not AUTHORITY.fullmatch(hosts[0]):
        raise MalformedHTTP("the Host field is not a host name with an optional port")
    found = TARGET.fullmatch(target)
    if not found:
        raise MalformedHTTP("the request target is not a path, nor http:// or https:// with a host and a path")
    host, _, path, query = found.groups("")
    # A host in the target is the absolute-form: Host gives way to it (RFC 9112 3.2.2).
    return RequestHead(method, target, path, query, host or headers.get("host"), version, headers)


def body_length(head: Union[RequestHead, AnswerHead], unsaid: int = 0) -> Optional[int]:
    """Return the length of a message's body, None if it is chunked, *unsaid* if *head* says nothing (RFC 9112 6.3)."""
    codings, lengths = head.headers.all("transfer-encoding"), head.headers.all("content-length")
    if codings:
        # Both framings at once is how requests are smuggled; HTTP/1.0 knows no codings (RFC 9112 6.1).
        if lengths or head.version == 0:
            raise MalformedHTTP("Transfer-Encoding cannot stand beside Content-Length, nor in HTTP/1.0")
        if len(codings) > 1 or codings[0].lower() != "chunked":
            raise MalformedHTTP("the only transfer coding spoken here is chunked", "not_implemented")
        return None
    if len(lengths) > 1 or (lengths and not LENGTH.fullmatch(lengths[0])):
        raise MalformedHTTP("expected one Content-Length of decimal digits")
    return int(lengths[0]) if lengths else unsaid


def read_answer_head(head: bytes) -> AnswerHead:
    """Return the answer head in *head*, which ends with its empty line."""
    line, _, section = head[:-2].partition(b"\r\n")
    found = STATUS_LINE.fullmatch(str(line, "latin-1"))
    if not found:
        raise MalformedHTTP("it does not begin with an HTTP/1.1 status line")
    version, status, reason = found.groups("")
    return AnswerHead(int(status), reason, int(version), read_fields(section))


def answer_body(head: AnswerHead) -> "BodyReader":
    """Return the reader for this answer's body.  No HEAD is ever sent upstream."""
    length = 0 if head.status in (204, 304) else body_length(head, -1)
    if length is None:
        return ChunkedBody()
    return CloseBody() if length < 0 else LengthBody(length)


class BodyReader:
    """Takes a body out of a byte stream that is split anywhere.

    feed() returns the payload in *data*; once done is true, rest holds what follows the body.  at_end() says whether
    the end of the stream is the end of the body.  Malformed framing raises MalformedHTTP.
    """

    done = False
    rest = b""

    def feed(self, data: bytes) -> bytes:
        return data

    def at_end(self) -> bool:
        return self.done

    def is_between_chunks(self) -> bool:
        return False


class LengthBody(BodyReader):
    def __init__(self, length: int) -> None:
        self.length = self.left = length
        self.done = length == 0

    def feed(self, data: bytes) -> bytes:
        payload, self.rest = data[: self.left], data[self.left :]
        self.left -= len(payload)
        self.done = not self.left
        return payload


class CloseBody(BodyReader):
    def at_end(self) -> bool:
        return True


# What an incomplete line of a chunked body may look like, by what is expected there.
INCOMPLETE: Final = {
    "size": re.compile(rb"[0-9A-Fa-f][^\r\n]*\r?"),
    "end": re.compile(rb"\r"),  # of a chunk's data
    "trailer": re.compile(rb"[^\r\n]*\r?"),
}


@functools.lru_cache(maxsize=1024)  # event streams repeat a few sizes thousands of times
def read_chunk_size(line: bytes) -> int:
    found = CHUNK_LINE.fullmatch(line)
    if not found:
        raise MalformedHTTP("a chunk size is not hexadecimal, or too large")
    return int(found[1], 16)


@functools.lru_cache(maxsize=1024)
def whole_chunk(length: int) -> Tuple[int, Tuple[bytes, ...]]:
    """Return what a chunk that takes *length* bytes, framing and all, has of payload, and how its first line reads."""
    for digits in range(1, 8):
        size = length - digits - 4
        if size > 0 and len(f"{size:x}") == digits:
            return size, (b"%x\r\n" % size, b"%X\r\n" % size)
    return 0, ()


EVENT_CHUNK: Final = re.compile(rb"([0-9A-Fa-f]{1,4})\r\n")
EVENTS_BYTES: Final = 16 * KIB  # more at one go is a flood, and its last event seldom whole


def size_of_events(data: bytes) -> int:
    """Return the size of the payload if *data* is a few whole chunks, each of whole events without extensions; or 0."""
    size = position = 0
    while position < len(data) <= EVENTS_BYTES:
        found = EVENT_CHUNK.match(data, position)
        end = found.end() + int(found[1], 16) if found else 0
        if not found or data[end - 2 : end + 2] != b"\n\n\r\n":
            return 0
        size += end - found.end()
        position = end + 2
    return size


class ChunkedBody(BodyReader):
    """RFC 9112 7.1.  Extensions and trailers are read and dropped; a line ends in CRLF and in nothing else."""

    def __init__(self) -> None:
        self.done = False  # here for speed: it is read for each chunk
        self._held = b""  # an incomplete line
        self._left = 0  # of the current chunk
        self._expected = "size"  # what the next line is, a key of the table above
        self._trailer_bytes = 0

    def is_between_chunks(self) -> bool:
        return self._expected == "size" and not self._held and not self.done

    def feed(self, data: bytes) -> bytes:
        if self._held:
            data, self._held = self._held + data, b""
        payload = []
        position, end = 0, len(data)
        while position < end and not self.done:
            if self._left:
                part = data[position : position + self._left]
                payload.append(part)
                position += len(part)
                self._left -= len(part)
                continue
            newline = data.find(b"\r\n", position, position + CHUNK_LINE_BYTES)
            if newline < 0:
                self._held = data[position:]
                if len(self._held) >= CHUNK_LINE_BYTES or not INCOMPLETE[self._expected].fullmatch(self._held):
                    raise MalformedHTTP(f"the {self._expected} of a chunk is malformed, or its line too long")
                break
            line, position = data[position:newline], newline + 2
            if self._expected == "size":
                stop = position + read_chunk_size(line)
                if stop > position and data[stop : stop + 2] == b"\r\n":  # the usual case: a whole chunk
                    payload.append(data[position:stop])
                    position = stop + 2
                else:
                    self._left = stop - position
                    self._expected = "end" if self._left else "trailer"
            else:
                self._read_line(line)
        if self.done:
            self.rest = data[position:]
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def _read_line(self, line: bytes) -> None:
        """Read a line that is no chunk's size: the end of its data, or a trailer."""
        if self._expected == "trailer":
            self.done = not line
            self._trailer_bytes += len(line)
            if self._trailer_bytes > CHUNK_LINE_BYTES:
                raise MalformedHTTP("the trailer section is too large")
            read_fields(line and line + b"\r\n")
        elif line:
            raise MalformedHTTP("a chunk is not followed by CRLF")
        else:
            self._expected = "size"


def refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def bounded_int(digits: str) -> int:
    if len(digits.lstrip("-")) > MAX_INT_DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)


# Interpreters with CPython's own bound keep the fast C conversion; 3.8 to 3.10 without it get ours.
JSON_DECODER: Final = json.JSONDecoder(
    parse_constant=refuse_constant, parse_int=None if hasattr(sys, "get_int_max_str_digits") else bounded_int
)
# Too many digits, and what makes a float of them.
LONG_INT: Final = re.compile(rf"(?<![0-9])[0-9]{{{MAX_INT_DIGITS + 1},}}(\.[0-9]|[eE][-+]?[0-9])?")
# What stands before a top-level value; a name with escapes is left to the decoder.
JSON_NAME: Final = re.compile(r'[ \t\n\r]*([{,])[ \t\n\r]*"(?:([^"\\\x00-\x1f]*)"[ \t\n\r]*:[ \t\n\r]*)?')
JSON_COLON: Final = re.compile(r"[ \t\n\r]*:[ \t\n\r]*")
JSON_END: Final = re.compile(r"[ \t\n\r]*\}[ \t\n\r]*")
JSON_EMPTY: Final = re.compile(r"[ \t\n\r]*\{[ \t\n\r]*\}[ \t\n\r]*")
# Before an element of an array, the first one or a further one; without group 1, the array ends.
JSON_FIRST: Final = re.compile(r"\[[ \t\n\r]*(?:\]|())")
JSON_NEXT: Final = re.compile(r"[ \t\n\r]*(?:(,)[ \t\n\r]*|\])")
Span = Tuple[int, int]
Scan = Callable[[str, int], Tuple[Any, int]]  # (text, start of a value) -> the value and its end; StopIteration


def parse_json(text: str) -> Any:
    """Return what *text* stands for; JSONDecodeError has the place of what is wrong.  Nesting is a RecursionError.

    Of NaN, Infinity and long numbers, the decoder tells no place.  With a 0 for their first character, they are a
    mistake whose place it tells; in a string, a fraction or an exponent, that 0 is none.
    """
    try:
        return JSON_DECODER.decode(text)
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if str(error).endswith("is no JSON"):  # refuse_constant() says so
            problem, marked = str(error), text.replace("NaN", "0aN").replace("Infinity", "0nfinity")
        else:  # CPython has advice for programmers
            problem = "a number has too many digits"
            marked = LONG_INT.sub(lambda found: found[0] if found[1] else "0" + found[0][1:], text)
    try:
        return JSON_DECODER.decode(marked)
    except json.JSONDecodeError as error:
        start = error.pos - 1
        raise json.JSONDecodeError(problem, text, start - text.endswith("-", 0, start)) from None


def decode_text(raw: bytes) -> str:
    """Return *raw* as the UTF-8 that it is; JSONDecodeError has the place of what is none."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        text = raw[: error.start].decode()
        raise json.JSONDecodeError(f"{raw[error.start]:#04x} is not UTF-8", text, len(text)) from None


class Seen(NamedTuple):
    """What a body that was parsed consists of.  The next turn of its session repeats most of it: all items, and more.

    A text that has the length and the hash (keyed, of 64 bits) of one that was parsed is that text.
    """

    # By member: bytes and hash of its value; of an array in LISTS, of what stands before its closing bracket.
    values: Mapping[str, Tuple[int, int]]
    digests: bytes  # of the elements of that array


NOTHING_SEEN: Final = Seen({}, b"")
NO_SPAN: Final = (0, 0)


class Items(NamedTuple):
    """The elements of an array: digests of those that were seen, where the last of them ends, where the others are."""

    seen: bytes = b""
    seen_end: int = 0
    spans: Sequence[Span] = ()


class JsonBody(NamedTuple):
    """A request body: its bytes, and where the values of MEMBERS stand in them; no value is kept but as its text.

    *lists* has where the elements of an array in LISTS are.
    """

    raw: bytes
    spans: Dict[str, Span]
    lists: Dict[str, Items]

    def text(self, name: str) -> Optional[str]:
        """Return the member *name* as the string that it is, None if it is none."""
        part = self.part(name)
        return str(json.loads(part)) if part.startswith(b'"') else None

    def part(self, name: str) -> bytes:
        """Return the value of the member *name* as it stands there; one that is not there is null."""
        start, end = self.spans.get(name, NO_SPAN)
        return self.raw[start:end] or b"null"

    def has(self, name: str) -> bool:
        """Say whether the member *name* is there and neither null nor empty, without reading it."""
        return self.part(name) not in (b"null", b'""')

    def prompt(self) -> str:
        """Return the name of the member that the items of the prompt are in."""
        return next((name for name in LISTS if name in self.spans), LISTS[0])

    @property
    def items(self) -> Items:
        return self.lists.get(self.prompt(), Items())


def scan_array(scan: Scan, text: str, position: int, is_inside: bool) -> Tuple[List[Span], int]:
    """Return where the elements of the array at *position* stand, and where it ends.

    With *is_inside*, *position* is the end of one of its elements, and only those behind it are returned, MAX_SPANS at
    most.  Each is parsed and dropped at once: the thousand objects of a prompt need not exist together.
    """
    spans: List[Span] = []
    found = (JSON_NEXT if is_inside else JSON_FIRST).match(text, position)
    while found and found[1] is not None:
        start = found.end()
        _, position = scan(text, start)
        if len(spans) < MAX_SPANS:
            spans.append((start, position))
        found = JSON_NEXT.match(text, position)
    if not found:
        raise StopIteration(position)
    return spans, found.end()


RUN_BYTES: Final = 64 * KIB  # looked at in one piece: the processor's second cache holds it several times


def require_utf8(raw: bytes, position: int, end: int) -> None:
    """Raise UnicodeDecodeError unless that part of *raw* is UTF-8.  In pieces: text may take four times the memory."""
    while position < end:
        piece = raw[position : min(position + RUN_BYTES, end)]
        position += codecs.utf_8_decode(piece, "strict", position + len(piece) == end)[1]


def scan_body(raw: bytes, seen: Seen) -> Optional[JsonBody]:
    """Return the object that *raw* is, None if it is none.  May raise what a Scan raises, and UnicodeDecodeError."""
    text = raw.decode("latin-1")  # has a character for each byte, so places in it are places in *raw*
    spans: Dict[str, Span] = {}
    lists: Dict[str, Items] = {}
    view, checked = memoryview(raw), 0  # where UTF-8 that was not seen begins
    scan: Scan = JSON_DECODER.scan_once  # type: ignore[attr-defined]  # raw_decode would only catch its StopIteration, twice for each member
    position, mark = 0, "{"
    found = JSON_NAME.match(text)
    while found and found[1] == mark:
        name, start = found[2], found.end()
        if name is None:
            name, start = scan(text, start - 1)
            colon = JSON_COLON.match(text, start)
            if not colon:
                return None
            start = colon.end()
        if name == "model" and name in spans:
            raise ProxyError("invalid_request", '"model" stands twice in the body', param="model")
        # Only the first of a name: each look costs the length of what was seen, and a body may have a million of them.
        size, number = NO_SPAN if name in spans else seen.values.get(name, NO_SPAN)
        is_seen = size > 0 and hash(view[start : start + size]) == number
        position = start
        if is_seen:
            position += size
            require_utf8(raw, checked, start)
            checked = position
        if name in LISTS:
            lists.pop(name, None)  # of two members of a name, the last one counts
        if name in LISTS and text.startswith("[", start):
            known = Items(seen.digests, position) if is_seen else Items()
            others, position = scan_array(scan, text, position, is_seen)
            lists[name] = known._replace(spans=others)
        elif not is_seen:
            _, position = scan(text, start)
        if name in MEMBERS:
            spans[name] = (start, position)
        found, mark = JSON_NAME.match(text, position), ","
    require_utf8(raw, checked, len(raw))
    is_whole = (JSON_END if mark == "," else JSON_EMPTY).fullmatch(text, position)
    return JsonBody(raw, spans, lists) if is_whole else None


NOT_IN_RUNS: Final = bytes(range(0x20)) + b'"\\' + bytes(range(0x80, 0x100))  # ends a string, or is no whole character


def cut_runs(raw: bytes) -> Tuple[bytes, List[int]]:
    """Return *raw* with an "x" in place of each run of RUN_BYTES that only a string can have, and where these x are.

    JSON has an x only in a string, and not behind a backslash: if the result is valid, so is *raw*.  An image in a
    prompt is a string of megabytes, and to look at it piece by piece takes a third of the time of copying it twice.
    """
    parts: List[bytes] = []
    places: List[int] = []
    kept = 0
    for start in range(0, len(raw) - RUN_BYTES, RUN_BYTES):
        end = start + RUN_BYTES
        if raw.find(b'"', start, end) < 0 and len(raw[start:end].translate(None, NOT_IN_RUNS)) == RUN_BYTES:
            parts += (raw[kept:start], b"x")
            places.append(start - len(places) * (RUN_BYTES - 1))
            kept = end
    return b"".join((*parts, raw[kept:])), places


def scan_around_runs(raw: bytes, _: Seen) -> Optional[JsonBody]:
    """Do what scan_body() does, without the runs in *raw*.  No name in MEMBERS is long enough for one, or has an x."""
    cut, places = cut_runs(raw)
    body = scan_body(cut, NOTHING_SEEN)
    if body is None or not places:
        return body

    def uncut(span: Span) -> Span:
        start, end = (place + bisect.bisect_left(places, place) * (RUN_BYTES - 1) for place in span)
        return start, end

    lists = {name: Items(spans=[uncut(span) for span in items.spans]) for name, items in body.lists.items()}
    return JsonBody(raw, {name: uncut(span) for name, span in body.spans.items()}, lists)


def parse_json_body(raw: Raw, seen: Seen = NOTHING_SEEN) -> JsonBody:
    """Return the JSON object in *raw*, with the spans of its members, so that no second pass is needed to find them.

    Strict UTF-8, no NaN, no second top-level "model" (an upstream might take the other one), bounded depth and
    digits.  The error says line and column.  What was *seen* in the session's turn before is not parsed again.
    """
    raw = bytes(raw)
    # A large one as a whole only if it must be: a run may have been the end of a number.
    for scan in (scan_around_runs, scan_body) if len(raw) > LARGE_BODY_BYTES else (scan_body,):
        try:
            body = scan(raw, seen)
        except (StopIteration, ValueError, RecursionError):
            continue
        if body:
            return body
    try:
        parse_json(decode_text(raw))  # says what is wrong, and where
        raise ProxyError("invalid_request", "the body must be a JSON object")
    except RecursionError:
        problem = "nested too deeply"
    except ValueError as error:
        problem = str(error)
    raise ProxyError("invalid_json", f"the body is not valid JSON: {problem}")


class Coding(NamedTuple):
    """How a content coding is undone: *start* returns an object like that of zlib.decompressobj(), for one member."""

    name: str
    start: Callable[[], Any]
    error: Type[Exception] = zlib.error
    magic: "re.Pattern[bytes]" = re.compile(b"")  # what a member begins with


# RFC 1952 2.2 and RFC 8878 3.1 allow several members; RFC 9110 8.4.1.2 means zlib, some senders leave its wrapper out.
GZIP: Final = Coding("gzip", lambda: zlib.decompressobj(31))
DEFLATE: Final = Coding("deflate", lambda: zlib.decompressobj(15))
RAW_DEFLATE: Final = Coding("deflate", lambda: zlib.decompressobj(-15))
CODINGS: Final = {"gzip": GZIP, "x-gzip": GZIP, "deflate": DEFLATE}
# A frame, or one to be skipped.  Not those of zstd before 1.0, which libraries read with code that few look after.
ZSTD_MAGIC: Final = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")


def decode_content(raw: Raw, encoding: str, limit: int, load_zstd: Callable[[], Optional[Coding]]) -> Optional[Raw]:
    """Return *raw* without its Content-Encoding, or None if this program cannot decode it.

    Never returns more than *limit* bytes; ProxyError if there are more, or the encoding is damaged.
    """
    if encoding in ("", "identity"):
        return raw
    coding = load_zstd() if encoding == "zstd" else CODINGS.get(encoding)
    if coding is None:
        return None
    if coding is DEFLATE and raw[:1] and raw[0] & 15 != 8:
        coding = RAW_DEFLATE
    parts: List[bytes] = []
    left = limit
    try:
        for _ in range(1 if coding.name == "deflate" else MAX_MEMBERS):
            if not coding.magic.match(raw):
                raise coding.error("it begins like something else")
            inflater = coding.start()
            parts.append(inflater.decompress(raw, left + 1))
            left -= len(parts[-1])
            if left < 0:
                raise too_large("decoded body", limit)
            if not inflater.eof:
                raise coding.error("it ends too early")
            raw = inflater.unused_data
            if not raw:
                return b"".join(parts)  # of one, as is usual, no copy
        raise coding.error("bytes follow it")
    except coding.error as error:
        raise ProxyError("invalid_request", f"the {coding.name} body is damaged: {error}") from None


# ---------------------------------------------------------------------------
# 5  Policy -- route_of, check_origin, find_key, session_of, outbound_fields, answer_fields, replace_model, mask.
#    No I/O, no clock.
# ---------------------------------------------------------------------------


class Route(NamedTuple):
    """A row of the table of routes: what it is called in logs, which methods it knows, what it does with them."""

    name: str  # the path as the table of routes has it
    path: str  # the part behind the prefix, as it travels upstream
    action: str  # "forward", "stored" (an earlier response), "websocket", or what the rows below say
    api: str = "responses"
    id: str = ""


# what the path behind the prefix is called, and what each method does there
ROUTES: Final = {
    "/responses": {"POST": "forward"},
    "/responses/compact": {"POST": "forward"},
    "/responses/input_tokens": {"POST": "forward"},
    "/responses/{id}": {"GET": "stored", "DELETE": "stored"},
    "/responses/{id}/cancel": {"POST": "stored"},
    "/responses/{id}/input_items": {"GET": "stored"},
    "/chat/completions": {"POST": "forward"},
    "/models": {"GET": "models", "HEAD": "models"},
    "/models/{id}": {"GET": "models", "HEAD": "models"},
    "/health": {"GET": "health", "HEAD": "health"},
    "/metrics": {"GET": "metrics", "HEAD": "metrics"},
    "/status": {"GET": "status", "POST": "ticket"},
    "/": {"GET": "page", "HEAD": "page"},
}
PREFIX: Final = re.compile(r"^(?:/v1|/backend-api)?(?:/codex)?(?=/)")
# Of a response's id, which some gateways make of base64; it travels on, so no dots and slashes that lead elsewhere.
WITH_ID: Final = re.compile(
    r"/(responses|models)/((?<=/models/).+|(?!(?:compact|input_tokens)$|\.\.?(?:/|$))"
    r"(?:[A-Za-z0-9._~:=+-]|%(?:2[Bb]|3[AaDd])){1,1000})(/[a-z_]+|)"
)
# What any backend takes.  Of other values the SHA-256 leaves: the Codex backend refuses more than 64 characters,
# stripping some would make distinct sessions collide, and CR or LF must never pass.
ROUTING_VALUE: Final = re.compile(r"[\x21-\x7e]{1,64}")
NOT_RETURNED: Final = HOP_BY_HOP | {"set-cookie", "content-length", "x-plexus-request-id", "x-plexus-error"}
FOR_STREAMS: Final = (("Cache-Control", "no-cache, no-transform"), ("X-Accel-Buffering", "no"))  # where absent


def route_of(head: RequestHead) -> Route:
    """Return the route that *head* asks for; ProxyError 404, or 405 with Allow, if there is none."""
    path = PREFIX.sub("", head.path, 1)
    found = WITH_ID.fullmatch(path)
    name = f"/{found[1]}/{{id}}{found[3]}" if found else path
    actions = ROUTES.get(name)
    if not actions or ("{" in path and not found):  # the table's own {id} is no id
        known = f"there are, with or without /v1: {', '.join(ROUTES)}"
        raise ProxyError("not_found", f"nothing is served at {head.path[:200]}; {known}")
    if head.method == "GET" and name.startswith("/responses") and "websocket" in head.headers.tokens("upgrade"):
        return Route(name, path, "websocket")
    if head.method not in actions:
        known = ", ".join(actions)
        raise ProxyError("method_not_allowed", f"{name} knows {known}, not {head.method}", fields=[("Allow", known)])
    api = "chat" if name == "/chat/completions" else "responses"
    return Route(name, path, actions[head.method], api, found[2] if found else "")


def check_origin(head: RequestHead, config: Config) -> None:
    """Refuse what a web page of another site could send through a browser, where no key protects us.

    A page may post text/plain to any loopback port without asking first, and a name under its control can be made
    to point here (DNS rebinding): Origin, Sec-Fetch-Site and Host tell.  Programs send none of the first two.
    """

    def is_ours(authority: str) -> bool:
        found = AUTHORITY.fullmatch(authority)
        return found is not None and (is_loopback(found[1]) or found[1].lower() in map(str.lower, config.hosts))

    if config.keys:
        return
    origins = [origin.partition("://")[2] for origin in head.headers.all("origin")]
    if not all(map(is_ours, origins)) or "cross-site" in head.headers.tokens("sec-fetch-site"):
        message = "web pages of other sites may not use this proxy; configure keys to allow it"
        raise ProxyError("forbidden_origin", message)
    if head.authority is not None and not is_ours(head.authority) and (config.hosts or is_loopback(config.host)):
        message = f"the Host {head.authority[:100]} is not loopback; add it to hosts, or configure keys"
        raise ProxyError("forbidden_origin", message)


class Identity(NamedTuple):
    """Who asks: the name of the key (None without keys), the label after its colon, the fields that held our keys."""

    name: Optional[str] = None
    label: Optional[str] = None
    fields: FrozenSet[str] = frozenset()
    models: Optional[Tuple[str, ...]] = None
    is_admin: bool = False


def find_key(headers: Headers, keys: Mapping[str, Key]) -> Identity:
    """Return whose key *headers* carry; ProxyError 401 if none of *keys* is there.

    Authorization: Bearer KEY, Authorization: KEY or x-api-key: KEY; KEY may be followed by ":label".  Every key is
    compared in full, in constant time, so that no answer time tells how much of a guess was right.
    """
    if not keys:
        return Identity()
    found, fields = None, []
    problem = "no API key; send Authorization: Bearer KEY"
    for field in ("authorization", "x-api-key"):
        values = headers.all(field)
        if len(values) > 1:
            raise unknown_key(f"expected one {field} field, found {len(values)}")
        for token in values:
            problem = "the API key is not known here"
            scheme, _, rest = token.partition(" ")
            if field == "authorization" and scheme.lower() == "bearer":
                token = rest.strip()
            offered = token.encode("latin-1") + b":"  # what a label would follow
            for name, key in keys.items():
                wanted = key.secret.encode("ascii") + b":"
                if hmac.compare_digest(offered[: len(wanted)], wanted):
                    fields.append(field)
                    found = found or (name, token[len(wanted) :], key)
    if not found:
        raise unknown_key(problem)
    name, rest, key = found
    others = CREDENTIALS.intersection(headers.values).difference(fields)
    if others:  # seldom.  The key may stand in one that is no place for it here, and still must not leave
        same = re.compile(rf"(.*[ =;])?{re.escape(key.secret)}([:; ].*)?").fullmatch
        fields += [one for one in others if any(map(same, headers.all(one)))]
    label = rest.encode("latin-1").decode("utf-8", "replace")[:64] or None
    return Identity(name, label, frozenset(fields), key.models, key.admin)


def make_ticket(secret: bytes, key: Optional[Key], expires: int) -> str:
    """Return what stands for *key* in the address of an event stream, since EventSource sends no header.

    It ends with the secret of *key*, too: who had that one may not stay.
    """
    text = f"{expires} {key.secret if key else ''}".encode("ascii")
    return f"{expires}.{hmac.new(secret, text, 'sha256').hexdigest()}"


def find_ticket(query: str, secret: bytes, keys: Mapping[str, Key], now: float) -> Identity:
    """Return whose ticket *query* carries; ProxyError 401 if it is none of ours or older than it may be."""
    found = re.search(r"[?&]ticket=(([0-9]{1,12})\.[0-9a-f]{64})(?:&|$)", query)
    if found and int(found[2]) >= now:
        for name, key in keys.items() or [(None, None)]:
            if hmac.compare_digest(found[1], make_ticket(secret, key, int(found[2]))):
                return Identity(name, models=key.models, is_admin=key.admin) if key else Identity()
    raise unknown_key("the ticket is not known here, or has expired; POST /status with a key gives another")


def unknown_key(message: str) -> ProxyError:
    return ProxyError("invalid_api_key", message, fields=[("WWW-Authenticate", 'Bearer realm="plexus_lite"')])


class Session(NamedTuple):
    """Which conversation a request belongs to: the value that leaves (None for none) and where it was found."""

    value: Optional[str] = None
    source: Optional[str] = None

    @property
    def digest(self) -> Optional[str]:
        """What a log may show of it."""
        return None if self.value is None else text_digest(self.value)[:12]


def text_digest(text: str) -> str:
    """Return SHA-256 in hex.  Header values were read as Latin-1: their bytes are hashed, not the mojibake."""
    try:
        raw = text.encode("latin-1")
    except UnicodeEncodeError:
        raw = text.encode("utf-8", "surrogatepass")
    return hashlib.sha256(raw).hexdigest()


def header_text(text: str) -> str:
    """Return *text* in the form of a header value: UTF-8 bytes read as Latin-1."""
    return text.encode("utf-8", "surrogatepass").decode("latin-1")


def cache_key(body: Optional[JsonBody]) -> Optional[str]:
    """Return the body's prompt_cache_key, in the form of a header value."""
    value = body and body.text("prompt_cache_key")
    return header_text(value) if value else None


def session_of(headers: Headers, key: Optional[str]) -> Session:
    """Return the session value: the first of SESSION_SOURCES that is not empty, else *key*, the prompt_cache_key."""
    for name in SESSION_SOURCES:
        for value in headers.all(name):
            if value:
                return Session(value, name)
    return Session(key, "prompt_cache_key") if key else Session()


def outbound_fields(
    headers: Headers,
    provider: Provider,
    session: Session,
    request_id: Optional[str],
    *,
    credential: Sequence[Field] = (),
    keep_turn_state: bool = True,
    keep_encoding: bool = True,
    key_fields: FrozenSet[str] = frozenset(),
) -> List[Field]:
    """Return the fields that go upstream, but for Host and Content-Length, which the transport sets.

    *headers* are the client's end-to-end fields.  *request_id* is the fallback for x-client-request-id, *credential*
    what stands for us at the provider, *key_fields* are those in which keys of our own were found.
    """
    wanted = [(name, session.value) for name in provider.session_headers + provider.affinity_headers]
    wanted.append(("x-client-request-id", request_id))
    static = {name.lower() for name, _ in provider.headers}
    dropped = REBUILT.union(
        static,
        [name.lower() for name, value in wanted if value and not any(headers.all(name.lower()))],  # empty ones
        key_fields if provider.auth == "passthrough" else CREDENTIALS,
        [name for name in SESSION_SPELLINGS if name not in provider.session_headers],
        () if keep_turn_state else (TURN_STATE,),
        () if keep_encoding else ("content-encoding",),
    )
    fields = headers.without(dropped)
    present = static.union(headers.values) - (dropped - static)
    for name, value in wanted:
        if value and name.lower() not in present:
            fields.append((name, value if ROUTING_VALUE.fullmatch(value) else text_digest(value)))
            present.add(name.lower())
    ours = (*credential, ("Accept-Encoding", "identity"))
    return [*fields, *(field for field in ours if field[0].lower() not in static), *provider.headers]


def is_event_stream(headers: Headers) -> bool:
    return (headers.get("content-type") or "").partition(";")[0].strip().lower() == "text/event-stream"


def answer_fields(head: AnswerHead, renamed: Optional[Tuple[str, str]]) -> List[Field]:
    """Return the answer's fields for the client, but for its framing.

    *renamed* is (client's model, upstream's model) where an alias renamed it: Codex warns of a rerouted model when
    openai-model is not what it asked for.
    """
    fields = head.headers.without(NOT_RETURNED)
    if renamed:  # behind a wildcard any name will do: what cannot stand in a header must not
        name = re.sub(r"[^\x20-\x7e\x80-\xff]", "?", header_text(renamed[0]))
        fields = [(field, name if field.lower() == "openai-model" else value) for field, value in fields]
    if is_event_stream(head.headers):
        present = {name.lower() for name, _ in fields}
        fields += [field for field in FOR_STREAMS if field[0].lower() not in present]
    return fields


def replace_model(body: JsonBody, model: str) -> bytes:
    """Return the body with the value of its top-level "model" replaced and every other byte as it was."""
    start, end = body.spans["model"]
    return body.raw[:start] + json.dumps(model).encode("ascii") + body.raw[end:]


def mask(text: bytes, secrets_sent: Sequence[bytes]) -> bytes:
    """Return *text* with every occurrence of a credential we sent replaced by as many asterisks."""
    for secret in sorted(secrets_sent, key=len, reverse=True):  # one may be the beginning of another
        text = spellings_of(secret).sub(lambda found: b"*" * len(found[0]), text)
    return text


SPELLING_BYTES: Final = 6  # of one character, at most: \u002b


@functools.lru_cache(maxsize=64)  # a token of 2 KB takes 2 ms
def spellings_of(secret: bytes) -> "re.Pattern[bytes]":
    """Return what finds *secret*, also where JSON or a URL has other spellings of its characters."""

    def spellings(found: "re.Match[bytes]") -> bytes:
        one = found[0][:1]
        plain = re.escape(one)
        if one in b"._~-":  # RFC 3986 2.3: nobody escapes these
            return plain
        many, prefix = (b"+", b"") if one == b"\\" else (b"", rb"\\?")  # a run, or the time would double with each one
        return rb"(?:%b%b|(?i:\\u00|%%)(?i:%02x))%b" % (prefix, plain, ord(one), many)

    return re.compile(re.sub(rb"\\+|[^0-9A-Za-z]", spellings, secret))


def mask_head(head: AnswerHead, secrets_sent: Sequence[bytes]) -> AnswerHead:
    """Return *head* with its values masked, and not what the credential "error", say, has in common with a name."""

    def masked(value: str) -> str:
        return mask(value.encode("latin-1"), secrets_sent).decode("latin-1")

    fields = [(name, masked(value)) for name, value in head.headers.fields]
    return head._replace(reason=masked(head.reason), headers=Headers(fields))


def render_fields(fields: Iterable[Field]) -> bytes:
    return "".join([f"{name}: {value}\r\n" for name, value in fields]).encode("latin-1")


def render_error(error: ProxyError) -> Tuple[List[Field], bytes]:
    """Return fields and JSON body of an error that the proxy itself makes."""
    detail = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    return [*error.fields, ("x-plexus-error", error.code)], render_json({"error": detail})


JSON_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


def render_json(value: Any) -> bytes:
    return JSON_ENCODER.encode(value).encode("ascii") + b"\n"


# ---------------------------------------------------------------------------
# 6  Placement -- rendezvous_score, plan_targets, is_pinned, cooldown_s, fingerprint_of; Remembered, Fleet.
#    Decisions are functions of targets, load and clock; Fleet holds what they look at, and what bodies consisted of,
#    each map behind its own lock.
# ---------------------------------------------------------------------------


Targets = Sequence[Target]


class Affinity(NamedTuple):
    """What a request is placed by."""

    key: str  # digest of the session value, or the fingerprint where there is none: what is hashed
    session: str  # the same with the model: what a pin is remembered by
    owner: Optional[str] = None  # the place of the target that issued the response id or turn state that it carries
    is_bound: bool = False  # to the account of that owner


class Snapshot(NamedTuple):
    """What else a decision is made of: load and health of the targets, and what is remembered of the session."""

    open_requests: Mapping[str, int]
    cooling: FrozenSet[str]  # ids of targets in their cooldown
    pin: Optional[str] = None  # id of the target that a failover moved the session to


class Plan(NamedTuple):
    """The targets in the order in which they are tried, why the first is first, and where the session belongs."""

    targets: Tuple[Target, ...]
    reason: str
    home: Optional[Target] = None  # that the hash alone would choose, if there is a choice


def rendezvous_score(key: str, target: Target) -> float:
    """Return the weight of *target* for *key*; the highest wins (highest random weight hashing, weighted).

    A stable digest, never hash(): every process, Python version and restart computes the same order, so removing a
    target moves only the sessions that were on it.
    """
    digest = hashlib.blake2b(f"{key}\0{target.id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    unit = ((int.from_bytes(digest, "big") >> 12) + 0.5) / 2**52  # in (0, 1), never rounded to 1
    return -target.weight / math.log(unit)


def load_limit(target: Target, group: Targets, open_requests: Mapping[str, int]) -> float:
    """Return how many requests *target* may have open: 1.25 times its fair share of the group's, at least 4."""
    total = 1 + sum(open_requests.get(other.id, 0) for other in group)
    share = total * target.weight / sum(other.weight for other in group)
    return max(LOAD_MINIMUM, math.ceil(LOAD_FACTOR * share))


def plan_targets(targets: Targets, by: Affinity, snapshot: Snapshot) -> Plan:
    """Return the order in which *targets* (at least one) are tried for what is placed *by* this.

    1. The owner of the response id or turn state, else the pin, else the first by rendezvous hashing; groups in order.
    2. If it is bound (only its maker can read previous_response_id and encrypted_content): that account's alone.
    3. A target that cools down is tried last rather than never.
    4. Bounded load: the first of the order gives way to the next of its group that has room.
    """
    if len(targets) == 1:
        return Plan(tuple(targets), "only")
    order = sorted(targets, key=lambda target: (target.group, -rendezvous_score(by.key, target)))
    home, cooling, load = order[0], snapshot.cooling, snapshot.open_requests
    first = min(order, key=lambda target: (target.place != by.owner, target.id != snapshot.pin))
    if by.is_bound:
        account = first.provider.account_name()
        order = [target for target in order if target.provider.account_name() == account]
    # Stable, as min is: otherwise the order stays.
    order.sort(key=lambda target: (target.id in cooling, target is not first))
    first = order[0]
    reason = "owner" if first.place == by.owner else "pin" if first.id == snapshot.pin else "rendezvous"
    if reason == "rendezvous" and load.get(first.id, 0) >= LOAD_MINIMUM:  # below it there is always room
        peers = [target for target in order if target.group == first.group and target.id not in cooling]
        roomy = (target for target in peers if load.get(target.id, 0) < load_limit(target, peers, load))
        first = next(roomy, first)
        if first is not order[0]:
            reason = "overflow"
            order.sort(key=lambda target: target is not first)
    return Plan(tuple(order), reason, home)


def has_other_account(one: Target, other: Target) -> bool:
    return one.provider.account_name() != other.provider.account_name()


def is_pinned(plan: Plan, served: Target, attempts: int) -> bool:
    """Say whether a session that *served* answered stays there, away from its home.

    After a failover, or when its home cooled down, its prefix now lies here.  One that only the load moved returns
    when the load has gone; not across accounts, since the next turn carries what only this account can read.
    """
    home = plan.home
    if home is None or served.id == home.id:
        return False
    return plan.reason != "overflow" or attempts > 1 or has_other_account(served, home)


def cooldown_s(failures: int, retry_after: Optional[float]) -> float:
    """Return how long a target rests after its *failures*-th failure in a row; what it asked for itself wins."""
    doubled_s = min(COOLDOWN_FIRST_S * 2 ** min(failures - 1, 30), COOLDOWN_MAX_S)
    return doubled_s if retry_after is None else retry_after


def retry_after_of(headers: Headers, now: float) -> Optional[float]:
    """Return the seconds that retry-after-ms or Retry-After (seconds or an HTTP date) ask for; *now* is Unix time."""
    value = ""
    for name, per_second in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name) or ""
        if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            return float(value) / per_second
    date = unix_time(value)
    return None if date is None else max(0.0, date - now)


def unix_time(date: str) -> Optional[float]:
    """Return the time that an HTTP date says, None of junk."""
    try:
        return email.utils.parsedate_to_datetime(date).timestamp()
    except Exception:  # what it raises on junk differs between versions: IndexError, UnboundLocalError in 3.8
        return None


def fingerprint_of(body: JsonBody) -> str:
    """Return what stands for the session value in placement when there is none; it never leaves the proxy.

    Model, instructions and first input item stay the same from turn to turn; of a chat, the first two messages.
    """
    first = [body.raw[start:end] for start, end in body.items.spans[: 1 + LISTS.index(body.prompt())]]
    first = first or [body.part(body.prompt())]
    return hashlib.sha256(b"\n".join([body.part("model"), body.part("instructions"), *first])).hexdigest()


ENCRYPTED: Final = re.compile(rb'"encrypted_content"\s*:\s*"')


def is_bound(body: JsonBody) -> bool:
    """Say whether only the account that made it can read something in the request.

    encrypted_content may lie at any depth of the input.  An unescaped quote cannot stand inside a JSON string, so in
    text that has been parsed this search finds members only, and needs no second parse.
    """
    start, end = body.spans.get("input", NO_SPAN)
    return body.has("previous_response_id") or bool(ENCRYPTED.search(body.raw, start, end))


def affinity_of(
    session: Optional[str], body: Optional[JsonBody], model: Optional[str], owner: Optional[str]
) -> Affinity:
    """Return what places a request with the session value *session*, None if it has none; then *body* does."""
    key = fingerprint_of(body) if session is None and body else text_digest(session or "")
    return Affinity(key, f"{key} {text_digest(model or '')}", owner, body is not None and is_bound(body))


class Remembered(Generic[T]):
    """A bounded map from text that forgets what was longest unused.  One lock, held for a few lines only."""

    def __init__(self, maximum: int = MAX_REMEMBERED) -> None:
        self._lock = threading.Lock()  # protects _entries
        self._entries: collections.OrderedDict[str, Tuple[T, float]] = collections.OrderedDict()
        self._maximum = maximum

    def get(self, key: str, now: float, idle_s: float = math.inf) -> Optional[T]:
        """Return what *key* stands for, and count that as use; None if unknown, or idle for more than *idle_s*."""
        with self._lock:
            value, used_at = self._entries.pop(key, (None, now))
            if value is None or now - used_at > idle_s:
                return None
            self._entries[key] = value, now
            return value

    def put(self, key: str, value: T, now: float) -> None:
        with self._lock:
            self._entries[key] = value, now
            self._entries.move_to_end(key)
            if len(self._entries) > self._maximum:
                self._entries.popitem(last=False)

    def forget(self, key: str) -> None:
        with self._lock:
            self._entries.pop(key, None)


class Fleet:
    """What is known of the targets and sessions while the program runs.  Lost at a restart, and nothing breaks."""

    def __init__(self, cooldowns: Iterable[Tuple[str, int]] = ()) -> None:
        """*cooldowns* has those that a worker counted which this process replaces."""
        self.pins: Remembered[str] = Remembered()  # session -> target id
        # The same, of another account than the session's home: what that made is readable there alone, for good.
        self.moved: Remembered[str] = Remembered()
        self.owners: Remembered[str] = Remembered()  # response id or turn state, as digest -> place of a target
        self.seen: Remembered[Seen] = Remembered(MAX_SEEN)  # session, as digest -> what its last body consists of
        self._lock = threading.Lock()  # protects the three below
        self._open: Dict[str, int] = {}  # target id -> requests; without zeros: behind "*", clients name the models
        self._failures: Dict[str, Tuple[int, float]] = {}  # target id -> failures in a row, cools until
        self._cooldowns = collections.Counter(dict(cooldowns))  # provider -> how often one of its targets began to cool

    def snapshot(self, targets: Targets, now: float, pin: Optional[str] = None) -> Snapshot:
        with self._lock:
            open_requests = {one.id: self._open.get(one.id, 0) for one in targets}
            cooling = frozenset(one.id for one in targets if self._failures.get(one.id, (0, now))[1] > now)
        return Snapshot(open_requests, cooling, pin)

    def plan(self, targets: Targets, by: Affinity, now: float, idle_s: float) -> Plan:
        """Return the order in which *targets* are tried, from all that is known at *now* (monotonic)."""
        pin = self.pins.get(by.session, now, idle_s)
        if by.is_bound:
            pin = self.moved.get(by.session, now) or pin
        return plan_targets(targets, by, self.snapshot(targets, now, pin))

    def served(self, by: Affinity, plan: Plan, target: Target, attempts: int, now: float) -> None:
        """Remember that *target*, the *attempts*-th of *plan*, answered: the prefix of the session lies there now."""
        if is_pinned(plan, target, attempts):
            self.pins.put(by.session, target.id, now)
            if plan.home and has_other_account(target, plan.home):
                self.moved.put(by.session, target.id, now)
            else:
                self.moved.forget(by.session)
        elif plan.home in (None, target):  # not what only the load moved: its replacement is still there
            self.pins.forget(by.session)
            self.moved.forget(by.session)

    def opened(self, target: Target) -> None:
        with self._lock:
            self._open[target.id] = self._open.get(target.id, 0) + 1

    def closed(self, target: Target) -> None:
        with self._lock:
            left = self._open.pop(target.id, 0) - 1
            if left > 0:
                self._open[target.id] = left

    def failed(self, target: Target, now: float, retry_after: Optional[float] = None) -> None:
        """*target* failed at *now* (monotonic): let it cool down.  What fails while it cools is the same failure."""
        with self._lock:
            failures, until = self._failures.pop(target.id, (0, now))
            if until <= now:
                failures += 1
                self._cooldowns[target.provider.name] += 1
            self._failures[target.id] = failures, max(until, now + cooldown_s(failures, retry_after))
            if len(self._failures) > MAX_REMEMBERED:  # of invented names
                del self._failures[next(iter(self._failures))]

    def succeeded(self, target: Target) -> None:
        if self._failures:  # hardly ever: most requests need no lock here
            with self._lock:
                self._failures.pop(target.id, None)

    def resting(self, now: float) -> Dict[str, float]:
        """Return how many seconds each target that cools down still rests, by its id."""
        with self._lock:
            return {name: until - now for name, (_, until) in self._failures.items() if until > now}

    def cooldowns(self) -> Dict[str, int]:
        with self._lock:
            return dict(self._cooldowns)


# ---------------------------------------------------------------------------
# 7  Observation -- new_record, UsageReader, digest_body, miss_reason, SessionTable, Tally, render_metrics,
#    render_status, render_line.  Copies of what passes in, values out; the relay never waits for it.
# ---------------------------------------------------------------------------

RECORD_MEMBERS: Final = (
    ("ts", "id", "key", "label", "client", "method", "route", "model", "upstream_model", "provider", "target", "status")
    + ("error", "attempts", "stream", "ttfb_ms", "duration_ms", "bytes_in", "bytes_out", "session", "session_source")
    + ("placement", "input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens", "miss_reason")
    + ("prefix_changed_at",)
)
Record = Dict[str, Any]
EMPTY_RECORD: Final[Record] = {**dict.fromkeys(RECORD_MEMBERS), "attempts": 0, "bytes_in": 0, "bytes_out": 0}
RESPONSE_ID: Final = re.compile(rb'"id"\s*:\s*"(resp_[A-Za-z0-9._~:=+/-]{1,1000})"')
RESPONSE_ID_BYTES: Final = 16 * KIB  # looked for in so much of an answer: it stands in the first event


@functools.lru_cache(maxsize=1)  # of a busy second hundreds of records ask
def render_second(second: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def new_record(started: float, request_id: str, client: str) -> Record:
    """Return the access log record of a request that began at *started* (Unix time); null is what is not known."""
    second, millisecond = divmod(int(started * 1000), 1000)
    return {**EMPTY_RECORD, "ts": f"{render_second(second)}.{millisecond:03d}Z", "id": request_id, "client": client}


def render_line(record: Record) -> str:
    """Return *record*, an access record or an event of the log, as a line for a person at a terminal."""
    clock = record["ts"][11:19]
    if "level" in record:
        return one_line(f"{clock} {record['level']}: {record['message']}")
    words = [clock, str(record["status"]), f"{record['method'] or '-'} {record['route'] or '-'}"]
    words += [str(record[name]) for name in ("model", "provider", "session") if record[name]]
    words.append(f"{record['duration_ms'] or 0:.0f} ms")
    cached, told = record["cached_tokens"], record["input_tokens"]
    if cached is not None:
        words.append(f"cached {cached} of {told} ({cached / (told or 1):.0%})")
    names = ("miss_reason", "prefix_changed_at", "error")
    return one_line("  ".join(words + [f"{name} {record[name]}" for name in names if record[name] is not None]))


USAGE_NAMES: Final = ("input_tokens", "cached_tokens", "cache_write_tokens", "output_tokens")
USAGE_ALIASES: Final = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens"}  # of a chat
USAGE_DETAILS: Final = ("input_tokens_details", "prompt_tokens_details")
TERMINAL_EVENTS: Final = ("response.completed", "response.incomplete", "response.failed", "error")
TELLING: Final = (b'"usage"', b'"error"', b'"response.failed"')  # nothing else of an event stream is looked at
TOLD: Final = re.compile(rb"\s*(?::\s*\{|[,}])")  # behind one of them: more than null
TOLD_MEMBER: Final = re.compile(r'"(?:usage|error)"\s{0,99}:\s{0,99}(?=\{)')
# These tell nothing but their usage.
COUNTED_EVENT: Final = re.compile(rb'\s*\{\s*"type"\s*:\s*"response\.(?:completed|incomplete)"')
FAILED_EVENT: Final = re.compile(r'\s*\{\s*"type"\s*:\s*"(?:response\.failed|error)"')
# Upstreams write NaN, too; of a number with too many digits nothing is made, see JSON_DECODER.
ANSWER_DECODER: Final = json.JSONDecoder(parse_int=JSON_DECODER.parse_int)
END_BYTES: Final = 128 * KIB  # of an event or answer longer than two of them, its beginning and its end are read


def is_telling(data: bytes) -> bool:
    """Say whether a UsageReader that is between two lines has to be fed *data*, whole lines of an event stream."""
    # Written out, as is the call of rfind, which takes a third of the time of "in": this is done for each event.
    return data.rfind(b'"usage"') >= 0 or data.rfind(b'"error"') >= 0 or data.rfind(b'"response.failed"') >= 0


def read_beginning(data: bytes) -> Any:
    """Return the JSON that begins with *data*, as far as its first object "usage" or "error"; None if it is none.

    If that lies deeper than one level below the top, as in a response's last event, only that the event is a failure.
    """
    text = data.decode("utf-8", "replace")
    found, failed = TOLD_MEMBER.search(text), FAILED_EVENT.match(text)
    end = ANSWER_DECODER.raw_decode(text, found.end())[1] if found else 0
    for beginning in (text[:end], text[:end] + "}", failed[0] if failed else ""):
        with contextlib.suppress(ValueError):
            return ANSWER_DECODER.decode(beginning + "}")
    return None


def read_end(data: bytes, max_depth: int) -> Record:
    """Return the last object "usage" of the JSON that ends with *data*, and the members behind it; {} if there is none.

    The objects that they belong to, *max_depth* at most, all end in *data*; what stands before is not read.
    """
    place = max(data.rfind(b'"usage":{'), data.rfind(b'"usage": {'))  # not what a client's metadata may have
    found: Record = {}
    rest = data[place:].decode("utf-8", "replace") if place >= 0 else ""
    while rest and max_depth:
        members, end = ANSWER_DECODER.raw_decode("{" + rest)
        found = {**members, **found}
        rest = rest[end - 1 :].lstrip(", \t\r\n")
        max_depth -= 1
    return {} if rest else found


class UsageReader:
    """Reads tokens and error code from copies of an answer, an event stream or one JSON object, split anywhere.

    feed() takes what came.  After finish(), which may be called at any time, tokens is what the answer says of
    USAGE_NAMES, error the code of a response.failed, an error event or an error object, and is_complete whether a
    response's last event has passed.  A last event repeats the instructions, the tools and all output, and may have
    megabytes; its usage stands behind the output, its error before it.
    """

    def __init__(self, is_events: bool) -> None:
        self.tokens: Dict[str, int] = {}
        self.error: Optional[str] = None
        self.is_complete = False
        self._is_events = is_events
        self._begun = bytearray()  # a line without its end, or the one object; if it is long, its beginning and its end

    def feed(self, data: bytes) -> None:
        """Take *data*.  Whole lines are looked at now: what is kept leaves the processor's caches meanwhile."""
        end = data.rfind(b"\n") + 1 if self._is_events else 0
        if end:
            lines = bytes(self._begun) + data[:end]
            self._begun.clear()
            if len(lines) >= 2 * END_BYTES or is_telling(lines):
                self._read_lines(lines)
        self._begun += data[end:]
        if len(self._begun) > 2 * END_BYTES:
            del self._begun[END_BYTES:-END_BYTES]

    def finish(self) -> None:
        if not self._is_events:  # of an event stream, a line without its end has not been sent
            self._read(bytes(self._begun))
        self._begun.clear()
        if self.tokens.get("cached_tokens", 0) > self.tokens.get("input_tokens", 0):
            del self.tokens["cached_tokens"]  # counted apart, not among the input: no share can be told

    def _read_lines(self, lines: bytes) -> None:
        """Read those of the *lines* that tell something, and all long ones, whose middle may be gone already."""
        begins = set()
        begin = 0
        while len(lines) - begin >= 2 * END_BYTES:
            end = lines.find(b"\n", begin)
            if end - begin >= 2 * END_BYTES:
                begins.add(begin)
            begin = end + 1
        for word in TELLING:
            place = lines.rfind(word)  # takes a third of the time of find or "in"
            while place >= 0:
                if TOLD.match(lines, place + len(word)):
                    place = lines.rfind(b"\n", 0, place) + 1
                    begins.add(place)
                place = lines.rfind(word, 0, place)
        for begin in sorted(begins):
            self._read(lines[begin : lines.find(b"\n", begin)])

    def _read(self, text: bytes) -> None:
        """Read a line of an event stream, or the whole answer."""
        begin = text.find(b":") + 1 if self._is_events else 0
        is_long = len(text) >= 2 * END_BYTES
        found: Record = {}
        if is_long:
            with contextlib.suppress(ValueError, RecursionError):
                self._note(read_beginning(text[begin:END_BYTES]))
        if is_long or COUNTED_EVENT.match(text, begin):
            with contextlib.suppress(ValueError, RecursionError):
                found = read_end(text[-END_BYTES:], 1 + self._is_events)
                self._note(found)
        if not is_long and not found:
            with contextlib.suppress(ValueError, RecursionError):
                self._note(ANSWER_DECODER.decode(text[begin:].decode("utf-8-sig")))  # some begin with its mark

    def _note(self, event: Any) -> None:
        """Note what *event*, or an answer's one object, tells."""
        if not isinstance(event, dict):
            return
        kind, inner = event.get("type"), event.get("response")
        if kind == "error" and isinstance(event.get("code"), str):
            inner = {"error": event}
        members = inner if isinstance(inner, dict) else event
        usage, error = members.get("usage"), members.get("error")
        if isinstance(usage, dict):
            # Of a last event the type may not have been read.  Some servers count in each chunk of a chat, too.
            self.is_complete |= not kind and not members.get("choices")
            for counts in (usage, *map(usage.get, USAGE_DETAILS)):
                for member in (*USAGE_NAMES, *USAGE_ALIASES):
                    value = counts.get(member) if isinstance(counts, dict) else None
                    if type(value) is int and 0 <= value < 2**53:  # not true, which is an int as well
                        self.tokens[USAGE_ALIASES.get(member, member)] = value
        self.is_complete |= kind in TERMINAL_EVENTS
        if isinstance(error, dict):
            self.error = str(error.get("code") or error.get("type") or kind or "error")[:100]
        elif kind in ("error", "response.failed"):
            self.error = self.error or str(kind)


PREFIX_MEMBERS: Final = ("model", "instructions", "tools")  # what stands before the input items
DIGEST_BYTES: Final = 4


def digests_of(numbers: Iterable[int]) -> bytes:
    """Return a digest for each hash() of a text: the same in this process and its forks, and keyed, as the hash is."""
    return b"".join([(number & 0xFFFFFFFF).to_bytes(DIGEST_BYTES, "little") for number in numbers])


def digest_body(body: JsonBody) -> Tuple[bytes, Seen]:
    """Return digests of what a prompt begins with, to see what changed, and what the next turn need not parse again.

    The former are of PREFIX_MEMBERS and of each input item; what is no array is one item.  With a previous_response_id
    the items before its input are not known, and none is compared.
    """
    view, name = memoryview(body.raw), body.prompt()
    numbers = {member: hash(body.part(member)) for member in PREFIX_MEMBERS}
    # Values whose end is not told by what follows, and not the model: that is looked at each time.
    whole = [member for member in PREFIX_MEMBERS[1:] if body.part(member)[:1] in (b'"', b"[", b"{")]
    values = {member: (len(body.part(member)), numbers[member]) for member in whole}
    items, start = body.items, body.spans.get(name, NO_SPAN)[0]
    digests = items.seen + digests_of([hash(view[begin:end]) for begin, end in items.spans])
    if name not in body.lists:
        digests = digests_of([hash(body.part(name))])
    elif digests:
        end = items.spans[-1][1] if items.spans else items.seen_end
        # More is mostly images, see cut_runs(), and the loop waits for this.  What follows a number may be more of it.
        if end - start <= LARGE_BODY_BYTES and body.raw[end - 1] in b'"]}':
            values[name] = (end - start, hash(view[start:end]))
    compared = b"" if body.has("previous_response_id") else digests
    return digests_of(numbers.values()) + compared, Seen(values, digests)


class Turn(NamedTuple):
    """A request of a session as the next one is compared with it."""

    at: float  # monotonic
    target: bytes  # digest of its place: another model there is a change of the prefix
    input_tokens: int
    prefix: bytes  # b"" if the body could not be read


def changed_at(old: bytes, new: bytes) -> Union[str, int, None]:
    """Return what comes first in the prefix *new* that is not as in *old*: a member's name or an input item's index."""
    for place, (one, other) in enumerate(zip(memoryview(old).cast("I"), memoryview(new).cast("I"))):
        if one != other:
            index = place - len(PREFIX_MEMBERS)
            return PREFIX_MEMBERS[index] if index < 0 else index
    return None


def miss_reason(
    cached_tokens: Optional[int], turn: Turn, previous: Optional[Turn], has_session: bool
) -> Tuple[Optional[str], Union[str, int, None]]:
    """Return why *turn* found so little in the cache, and where its prefix changed; (None, None) if it is no miss.

    A miss is less than half of what could have been cached: all of the shorter of this prompt and the previous one.
    """
    could = min(turn.input_tokens, previous.input_tokens) if previous else turn.input_tokens
    if cached_tokens is None or 2 * cached_tokens >= could:
        return None, None
    if not has_session:
        return "no_session_value", None
    if previous is None:
        return "first_request", None
    if turn.input_tokens < CACHE_MINIMUM_TOKENS:
        return "below_minimum", None
    if turn.target != previous.target:
        return "moved", None
    change = changed_at(previous.prefix, turn.prefix)
    if change is not None:
        return "prefix_changed", change
    return ("idle" if turn.at - previous.at > CACHE_IDLE_S else "unknown"), None


class SessionTable:
    """The last turn of up to SESSIONS sessions, in memory that all workers share; the least recently used go.

    A session has one of the slots of the bucket that its key leads to.  There is no lock: a slot that two processes
    wrote at one time has a wrong checksum, and counts as empty.  The prefixes lie apart from the heads, since a look
    at a page of such memory allocates it: one page for each session that came.
    """

    SESSIONS: Final = 10_000
    WAYS: Final = 8  # slots of a bucket
    HEAD: Final = struct.Struct("<16sId4sQI")  # key, checksum, Turn's members, the last one by its length
    PREFIX_BYTES: Final = 4096  # a change behind the first thousand items is not seen
    HEADS_AT: Final = SESSIONS * PREFIX_BYTES
    BYTES: Final = HEADS_AT + SESSIONS * HEAD.size

    def __init__(self, memory: Any) -> None:
        """*memory* is a writable buffer of BYTES zeros, with the methods of bytearray and mmap."""
        self._memory = memory

    def replace(self, key: bytes, turn: Turn) -> Optional[Turn]:
        """Store *turn* for the session *key* (16 bytes); return the one it had."""
        memory, head, width = self._memory, self.HEAD, self.WAYS * self.HEAD.size
        bucket = self.HEADS_AT + int.from_bytes(key[:4], "little") % (self.SESSIONS // self.WAYS) * width
        place = memory.find(key, bucket, bucket + width)
        if place < 0:
            slots = range(bucket, bucket + width, head.size)
            place = min(slots, key=lambda slot: head.unpack_from(memory, slot)[2])
        begin = (place - self.HEADS_AT) // head.size * self.PREFIX_BYTES
        owner, checksum, at, target, input_tokens, length = head.unpack_from(memory, place)
        prefix = bytes(memory[begin : begin + min(length, self.PREFIX_BYTES)])
        previous = Turn(at, target, input_tokens, prefix)
        is_own = owner == key and hash(previous) & 0xFFFFFFFF == checksum
        turn = turn._replace(prefix=turn.prefix[: self.PREFIX_BYTES])
        memory[begin : begin + len(turn.prefix)] = turn.prefix
        head.pack_into(memory, place, key, hash(turn) & 0xFFFFFFFF, *turn[:3], len(turn.prefix))
        return previous if is_own else None


# name: type, labels, help
METRICS: Final[Mapping[str, Tuple[str, Tuple[str, ...], str]]] = {
    "plexus_requests_total": ("counter", ("route", "model", "provider", "status"), "Requests by status class."),
    "plexus_tokens_total": ("counter", ("model", "provider", "kind"), "Tokens as the upstreams count them."),
    "plexus_cache_misses_total": ("counter", ("model", "reason"), "Requests that found too little in the cache."),
    "plexus_ttfb_seconds": ("histogram", ("model", "provider", "le"), "Time to the answer's first byte."),
    "plexus_request_duration_seconds": ("histogram", ("model", "provider", "le"), "Time to the answer's last byte."),
    "plexus_received_bytes_total": ("counter", (), "Bytes of request bodies."),
    "plexus_sent_bytes_total": ("counter", (), "Bytes of answer bodies."),
    "plexus_upstream_connections_total": ("counter", ("provider", "reused"), "Requests by kind of connection."),
    "plexus_failovers_total": ("counter", ("provider",), "Requests that left a provider for the next target."),
    "plexus_cooldowns_total": ("counter", ("provider",), "Times that a target began to rest after a failure."),
    "plexus_in_flight": ("gauge", (), "Requests under way."),
    "plexus_targets_cooling": ("gauge", ("provider",), "Targets that rest after a failure."),
    "plexus_build_info": ("gauge", ("version", "python"), "Always 1."),
    "process_cpu_seconds_total": ("counter", (), "User and system CPU time."),
    "process_resident_memory_bytes": ("gauge", (), "Resident memory."),
    "process_open_fds": ("gauge", (), "Open file descriptors."),
    "process_start_time_seconds": ("gauge", (), "Start of the process, Unix time."),
}
# Bucket bounds of both histograms, for models: a cached answer begins in 0.1 s, a long one ends after minutes.
BUCKETS_S: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
BOUNDS: Final = (*map(str, BUCKETS_S), "+Inf")
TIMES: Final = (("plexus_ttfb_seconds", "ttfb_ms"), ("plexus_request_duration_seconds", "duration_ms"))
LABEL_ESCAPES: Final = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})
LISTED: Final = 20  # turns, misses and errors that the status page lists
NOTED: Final = ("key", "session", "model", "target")  # of a miss as of an error
MISS_MEMBERS: Final = (*NOTED, "miss_reason", "prefix_changed_at", "input_tokens", "cached_tokens")
ERROR_MEMBERS: Final = (*NOTED, "id", "status", "error", "route", "provider")
MAX_LISTED_SESSIONS: Final = 200  # kept; the page lists the last 50 that the key may see
MAX_ROWS: Final = 250  # behind "*" clients choose the models: what comes later is counted as OTHER
OTHER: Final = "(other)"
Labels = Tuple[str, ...]
Counts = Dict[Any, Any]  # under each name a number, or again Counts


def add_up(sums: Counts, counts: Counts, max_names: float = math.inf) -> None:
    """Add *counts* to *sums*; where those have *max_names*, what comes under a further name is added to OTHER."""
    for name, count in counts.items():
        if name not in sums and len(sums) >= max_names:
            name = OTHER
        if isinstance(count, dict):
            add_up(sums.setdefault(name, {}), count, max_names)
        else:
            sums[name] = sums.get(name, 0) + count


class Tally:
    """What has been counted since the start.  Plain containers, so that workers can show it to each other.

    Used in the loop's thread only.
    """

    def __init__(self) -> None:
        # By metric and labels; of a histogram by bucket, not yet cumulative, and under "sum" the milliseconds.
        self.counts: Counts = {name: {} for name in METRICS}
        # By (model, provider, target), of requests that had one: how many, errors, tokens of each kind, and comparable
        # ones: the input of answers that tell its cached part.
        self.rows: Counts = {}
        self.minutes: Counts = {}  # Unix minute -> what it had of requests, comparable and cached tokens
        self.sessions: Dict[Any, Record] = {}  # (key, session), the latest last
        self.misses: List[Record] = []
        self.errors: List[Record] = []
        self.open: Dict[Labels, Tuple[int, float]] = {}  # (provider, base URL) -> requests under way, seconds of rest

    def count(self, name: str, labels: Labels = (), value: float = 1) -> None:
        counts = self.counts[name]
        counts[labels] = counts.get(labels, 0) + value

    def add(self, record: Record, now: float) -> None:
        """Count a request that has ended at *now* (Unix time)."""
        route, provider, status = record["route"] or "", record["provider"] or "", record["status"] or 0
        model, target = (record["model"] or "") if provider else "", record["target"] or ""
        if provider and (model, provider, target) not in self.rows and len(self.rows) >= MAX_ROWS:
            model = OTHER
        cached, is_error = record["cached_tokens"], status >= 400 or record["error"] is not None
        self.count("plexus_requests_total", (route, model, provider, f"{status // 100}xx"))
        self.count("plexus_received_bytes_total", (), record["bytes_in"])
        self.count("plexus_sent_bytes_total", (), record["bytes_out"])
        if provider:
            tokens = {name: record[name] for name in USAGE_NAMES if record[name] is not None}
            for name, value in tokens.items():
                self.count("plexus_tokens_total", (model, provider, name[: -len("_tokens")]), value)
            for metric, name in TIMES:
                if record[name] is not None:
                    bound = BOUNDS[bisect.bisect_left(BUCKETS_S, record[name] / 1000)]
                    self.count(metric, (model, provider, bound))
                    self.count(metric, (model, provider, "sum"), record[name])
            told = tokens.get("input_tokens", 0) if cached is not None else 0
            row = {"requests": 1, "errors": int(is_error), "comparable_tokens": told, **tokens}
            add_up(self.rows, {(model, provider, target): row})
            add_up(self.minutes, {int(now) // 60 * 60: {"requests": 1, "told": told, "cached": cached or 0}})
            if len(self.minutes) > 60:
                del self.minutes[min(self.minutes)]
            if record["session"] is not None:
                self._add_turn(record, now)
        if record["miss_reason"] is not None:
            self.count("plexus_cache_misses_total", (model, record["miss_reason"]))
            note(self.misses, now, record, MISS_MEMBERS)
        if is_error and route != "/status":  # each page that opens is refused once, before it asks for a key
            note(self.errors, now, record, ERROR_MEMBERS)

    def _add_turn(self, record: Record, now: float) -> None:
        key, session, cached = record["key"], record["session"], record["cached_tokens"]
        entry = self.sessions.pop((key, session), None) or {"requests": 0, "turns": []}
        entry.update(key=key, session=session, model=record["model"], provider=record["provider"], last=now)
        entry["requests"] += 1
        if cached is not None:
            entry["turns"].append((now, record["input_tokens"], cached, record["miss_reason"]))
            del entry["turns"][:-LISTED]
        self.sessions[key, session] = entry
        if len(self.sessions) > MAX_LISTED_SESSIONS:
            del self.sessions[next(iter(self.sessions))]


def note(rows: List[Record], now: float, record: Record, names: Sequence[str]) -> None:
    """Add these members of *record* to *rows*, of which the last LISTED stay."""
    rows.append({"ts": now, **{name: record[name] for name in names}})
    del rows[:-LISTED]


def merge_tallies(tallies: Iterable[Tally]) -> Tally:
    """Return the sum of what several workers counted."""
    total = Tally()
    for one in tallies:
        for ours, theirs in ((total.counts, one.counts), (total.rows, one.rows), (total.minutes, one.minutes)):
            add_up(ours, theirs)
        for place, (count, rest_s) in one.open.items():
            known = total.open.get(place, (0, 0.0))
            total.open[place] = (known[0] + count, max(known[1], rest_s))
        for session, entry in one.sessions.items():
            other = total.sessions.get(session, {"requests": 0, "turns": [], "last": 0})
            newest = max(entry, other, key=lambda either: either["last"])
            turns = sorted(other["turns"] + entry["turns"], key=lambda turn: turn[0])[-LISTED:]
            total.sessions[session] = {**newest, "requests": entry["requests"] + other["requests"], "turns": turns}
        total.misses += one.misses
        total.errors += one.errors
    return total


def render_metrics(tally: Tally) -> bytes:
    """Return *tally* as Prometheus text, version 0.0.4."""
    lines = []
    for metric, (kind, names, text) in METRICS.items():
        samples = tally.counts[metric]
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} {kind}"]
        if kind != "histogram":
            lines += [f"{metric}{render_labels(names, labels)} {value:.15g}" for labels, value in samples.items()]
            continue
        for model, provider in dict.fromkeys(labels[:2] for labels in samples):
            own_labels, count = render_labels(names[:2], (model, provider)), 0.0
            for bound in BOUNDS:
                count += samples.get((model, provider, bound), 0)
                lines.append(f"{metric}_bucket{render_labels(names, (model, provider, bound))} {count:.15g}")
            lines.append(f"{metric}_sum{own_labels} {samples[model, provider, 'sum'] / 1000:.15g}")
            lines.append(f"{metric}_count{own_labels} {count:.15g}")
    return "\n".join([*lines, ""]).encode("utf-8", "xmlcharrefreplace")  # half a surrogate pair is no UTF-8


def render_labels(names: Sequence[str], values: Sequence[str]) -> str:
    """Return the labels of a sample, or "" if it has none."""
    pairs = ",".join(f'{name}="{value.translate(LABEL_ESCAPES)}"' for name, value in zip(names, values))
    return f"{{{pairs}}}" if pairs else ""


def render_status(tally: Tally, identity: Identity, config: Config, now: float) -> Record:
    """Return what the status page shows to *identity*: everybody's sums, and the sessions it may see.  JSON's types."""

    def latest(rows: Iterable[Record], moment: str, count: int) -> List[Record]:
        own = [row for row in rows if sees_all or row["key"] == identity.name]
        return sorted(own, key=lambda row: -row[moment])[:count]

    def row(sums: Mapping[Any, float], *more: str) -> Record:
        names = ("requests", "errors", "cached_tokens", "output_tokens", *more)
        return {"input_tokens": sums.get("comparable_tokens", 0), **{name: sums.get(name, 0) for name in names}}

    sees_all = identity.name is None or identity.is_admin
    models: Counts = {}
    # That nothing has gone to yet, too.
    targets: Counts = {place: {"open": count, "cooling_s": rest_s} for place, (count, rest_s) in tally.open.items()}
    total: Dict[Any, float] = {}
    for (model, provider, url), sums in tally.rows.items():
        for each in (total, models.setdefault(model, {}), targets.setdefault((provider, url), {})):
            add_up(each, sums)
    told = [(model, sums) for model, sums in models.items() if model in config.prices and "input_tokens" in sums]
    costs = [cost_of(config.prices[model], sums) for model, sums in told]
    return {
        "version": __version__,
        "key": identity.name,
        "all_sessions": sees_all,
        "in_flight": sum(count for count, _ in tally.open.values()),
        "totals": row(total),
        "spent": sum(spent for spent, _ in costs) if costs else None,
        "saved": sum(saved for _, saved in costs) if costs else None,
        "minutes": [[at, *sums.values()] for at, sums in sorted(tally.minutes.items()) if at > now - 3600],
        "models": [{"model": model, **row(sums)} for model, sums in models.items()],
        "targets": [
            {"provider": provider, "target": url, **row(sums, "open", "cooling_s")}
            for (provider, url), sums in targets.items()
        ],
        "sessions": latest(tally.sessions.values(), "last", 50),
        "misses": latest(tally.misses, "ts", LISTED),
        "errors": latest(tally.errors, "ts", LISTED),
    }


def cost_of(price: Price, sums: Mapping[Any, float]) -> Tuple[float, float]:
    """Return what the tokens in *sums* cost, and what they would have cost more without a cache."""
    told, cached, output = (sums.get(name, 0) for name in ("input_tokens", "cached_tokens", "output_tokens"))
    spent = (told - cached) * price.input + cached * price.cached + output * price.output
    return spent / 1e6, cached * (price.input - price.cached) / 1e6


# ---------------------------------------------------------------------------
#    Below this line: sockets, threads, clock, files.
# ---------------------------------------------------------------------------

# ---------------------------------------------------------------------------
# 8  Credentials -- Credentials, SignIn, Tokens, WatchedFile: keys in files, Codex sign-ins.  Asks the issuer of tokens
#    through a function of room 9.
# ---------------------------------------------------------------------------

FILE_CHECK_S: Final = 1.0  # how often a file in use is looked at
SECRET_FILE_BYTES: Final = 64 * KIB  # a larger one is something else; a Codex sign-in takes 5 KiB
RENEW_EARLY_S: Final = 300.0  # before the access token expires; the Codex CLI has the same
RENEW_PAUSE_S: Final = 30.0  # after an attempt: who keeps refusing is not asked again for every request
CLOSE_S: Final = 5.0  # that the end of the program waits for a renewal under way
LOCK_WAIT_S: Final = 60.0  # for another process or thread, which may have to connect and wait for its answer
Warn = Callable[[str], None]
Fields = Sequence[Field]
AskIssuer = Callable[[Provider, bytes], Tuple[int, bytes]]  # sends a form; returns status and body of the answer


class WatchedFile:
    """A small file that is read again when it has changed; while it cannot be used, its last good content is."""

    def __init__(self, path: str, where: str, parse: Callable[[bytes], Any], warn: Warn) -> None:
        """*where* is its place in the configuration; *parse* makes a value of the content, or raises ValueError."""
        self.path = path
        self.value: Any = None  # of the last good content
        self.problem = ""  # why the present content is not used
        self._where, self._parse, self._warn = where, parse, warn
        self._lock = threading.Lock()  # one reader at a time
        self._look_at = -math.inf
        self._content: Optional[bytes] = None  # the last good one
        self._said = ""  # what the last look found to warn of
        self.look()

    def get(self) -> Any:
        """Return the value; the file is looked at once a second at most."""
        now = time.monotonic()
        if now >= self._look_at:
            self._look_at = now + FILE_CHECK_S
            self.look()
        return self.value

    def look(self) -> None:
        with self._lock:
            problem = warning = ""
            try:
                mode = os.stat(self.path).st_mode
                if not stat.S_ISREG(mode):  # to open a FIFO could take for ever
                    raise ValueError("is not a regular file")
                with open(self.path, "rb") as file:
                    content = file.read(SECRET_FILE_BYTES + 1)
                if len(content) > SECRET_FILE_BYTES:  # its beginning would be a secret as well
                    raise ValueError(f"is larger than {SECRET_FILE_BYTES} bytes")
                if content != self._content:
                    self.value, self._content = self._parse(content), content
                if os.name == "posix" and mode & 0o077:
                    warning = f"others may use {self.path} (mode {mode & 0o777:04o}); chmod 600"
            except (OSError, ValueError) as error:
                why = f"cannot be read: {error.strerror}" if isinstance(error, OSError) else error
                problem = warning = f"{self.path}: {why}"
                warning += "" if self.value is None else "; what it held before stays in use"
            if warning not in ("", self._said):
                self._warn(f"{self._where}: {warning}")
            self.problem, self._said = problem, warning


def visible(value: Any) -> str:
    """Return *value* if it is a text that a header field can carry, else ""."""
    return value if isinstance(value, str) and re.fullmatch(r"[\x21-\x7e]+", value) else ""


def read_secret(content: bytes) -> str:
    text = content.decode("latin-1").rstrip("\r\n")
    if not visible(text):
        raise ValueError("must hold one line of visible ASCII characters" if text else "is empty")
    return text


def member(value: Any, *names: str) -> Any:
    """Return what decoded JSON holds under *names*, one inside the other; None if it does not."""
    for name in names:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def jwt_claims(token: str) -> Any:
    """Return the claims of a JSON Web Token (RFC 7519) as they stand: its issuer and the upstream verify it, not we."""
    try:
        return json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))  # too much padding does no harm
    except (IndexError, ValueError, RecursionError):
        return None


class Tokens:
    """What the auth.json of a Codex CLI holds.  No tuple: its repr would show it."""

    def __init__(self, content: bytes) -> None:
        """Read *content*; ValueError if there is no access token in it."""
        try:
            tokens = member(json.loads(content), "tokens")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not valid JSON: {error}") from None
        names = ("access_token", "id_token", "account_id", "refresh_token")
        access, identity, account, refresh = (visible(member(tokens, name)) for name in names)
        if not access:
            raise ValueError("holds no access token; `codex login` writes one")
        claims = jwt_claims(access)
        for one in (claims, jwt_claims(identity)):
            account = account or visible(member(one, "https://api.openai.com/auth", "chatgpt_account_id"))
        expires = member(claims, "exp")
        is_time = isinstance(expires, (int, float)) and 0 < expires < 2**40
        self.content = content
        # What a request carries.
        self.fields = (("Authorization", "Bearer " + access), ("chatgpt-account-id", account))[: 2 if account else 1]
        self.refresh = refresh  # "" for none, and once the issuer will not take it
        self.expires = expires if is_time else math.inf  # Unix time
        self.was_told = False  # that they have expired


def open_private(name: str, flags: int) -> int:
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0), 0o600)  # a FIFO would keep us for ever


@contextlib.contextmanager
def lock_file(path: str) -> Iterator[None]:
    """Hold the file *path* as a lock among processes; the death of its holder frees it.  OSError after LOCK_WAIT_S."""
    with open(path, "ab", opener=open_private) as file:
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                if sys.platform == "win32":
                    import msvcrt

                    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
                else:
                    import fcntl

                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        yield


def replace_file(path: str, content: bytes, before: Optional[bytes]) -> None:
    """Put *content* in the place of the file *path* in one step, for its owner alone.

    OSError, or ValueError where its content is no longer what it was *before*: it is as it was.
    """
    new = path + ".new"
    try:
        with open(new, "wb", opener=open_private) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if sys.platform != "win32":
            owner = os.stat(path)
            with contextlib.suppress(OSError):  # only root can, and only root has to
                os.chown(new, owner.st_uid, owner.st_gid)
        with open(path, "rb") as file:
            if file.read() != before:
                raise ValueError(f"{path} has changed meanwhile")
        os.replace(new, path)
    finally:
        with contextlib.suppress(OSError):  # it is only there if something went wrong
            os.unlink(new)


class SignIn(WatchedFile):
    """The ChatGPT sign-in of a provider: the tokens in its auth_file, renewed here if oauth_refresh says so.

    New tokens that could not be written are its value, too: then its content is another than the file's.
    """

    def __init__(self, provider: Provider, path: str, ask_issuer: AskIssuer, warn: Warn) -> None:
        super().__init__(path, f"providers.{provider.name}.auth_file", Tokens, warn)
        self._provider, self._ask_issuer = provider, ask_issuer
        self._turn = threading.Lock()  # held by the thread that renews
        self._pause_until = -math.inf

    def fields(self, refused: Fields, may_wait: bool) -> Optional[Fields]:
        """As those of Credentials.  UpstreamError if there never was a token."""
        tokens: Optional[Tokens] = self.get()
        if tokens is None:
            raise UpstreamError(f"{self._provider.name} is not signed in; run `codex login` where this proxy runs")
        left = tokens.expires - time.time()
        must = tokens.fields == refused or left <= 0
        is_due = (must or left < RENEW_EARLY_S) and tokens.refresh != ""
        if self._provider.oauth_refresh and (is_due or tokens.content != self._content):
            if not may_wait:
                return None
            # As long as the old token works, nobody waits for the thread that renews it.
            if self._turn.acquire(timeout=LOCK_WAIT_S if must else 0):
                try:
                    self._renew(tokens, is_due)
                finally:
                    self._turn.release()
        elif left <= 0 and not tokens.was_told:
            tokens.was_told = True
            remedy = "`codex login`" if self._provider.oauth_refresh else "codex, which renews it, or set oauth_refresh"
            self._warn(f"{self._where}: the access token has expired; run {remedy}")
        return self.value.fields  # type: ignore[no-any-return]

    def close(self, seconds: float) -> None:
        self._turn.acquire(timeout=max(seconds, 0))  # for good

    def _renew(self, stale: Tokens, is_due: bool) -> None:
        """Replace *stale* by what the file has meanwhile, else by what the issuer gives; on failure it stays."""
        if time.monotonic() < self._pause_until:  # another thread has just tried
            return
        try:
            path = os.path.realpath(self.path)  # a link stays one
            with lock_file(path + ".lock"):
                self.look()
                if self.problem:  # gone, say, after `codex logout`
                    raise ValueError(self.problem)
                spent = self.value
                if is_due and spent.fields == stale.fields:
                    # First: where nothing can be written, another process would spend the same token once more.
                    replace_file(path, spent.content, self._content)
                    self._pause_until = time.monotonic() + RENEW_PAUSE_S
                    new = self._spend(spent)
                    self.look()  # `codex login` knows no lock
                    with self._lock:
                        if self.value.content == spent.content:
                            self.value = new
                if self.value.content != self._content:
                    replace_file(path, self.value.content, self._content)
                    self.look()
        except (OSError, ValueError, RecursionError, ProxyError) as error:
            is_new = self.value.content != self._content
            what = "the new tokens are not in the file yet" if is_new else "the tokens were not renewed"
            self._warn(f"{self._where}: {what}: {error}")
            self._pause_until = time.monotonic() + RENEW_PAUSE_S

    def _spend(self, tokens: Tokens) -> Tokens:
        """Return what the issuer gives for the refresh token of *tokens*, which it takes once."""
        url, client_id = self._provider.oauth_token_url, self._provider.oauth_client_id
        form = {"grant_type": "refresh_token", "refresh_token": tokens.refresh, "client_id": client_id}
        status, content = self._ask_issuer(self._provider, urllib.parse.urlencode(form).encode("ascii"))
        answer = None
        with contextlib.suppress(ValueError, RecursionError):
            answer = json.loads(content)
        if status in (400, 401, 403) and member(answer, "error"):  # RFC 6749 5.2; not the page of what stands before it
            tokens.refresh = ""
        new = {name: visible(member(answer, name)) for name in ("access_token", "id_token", "refresh_token")}
        if status != 200 or not new["access_token"]:
            raise ValueError(f"{url} answered {status} without a token; `codex login` begins anew")
        auth = json.loads(tokens.content)
        auth["tokens"].update((name, token) for name, token in new.items() if token)
        auth["last_refresh"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        return Tokens(json.dumps(auth, indent=2).encode("ascii"))


class Credentials:
    """Every credential of a configuration as it is now: what stands in it, secrets in files, sign-ins."""

    def __init__(self, config: Config, folder: str, ask_issuer: AskIssuer) -> None:
        """Read the files, relative paths from *folder*; ConfigError names a secret that cannot be used."""
        self._warnings: Deque[str] = collections.deque()
        self._folder = folder
        self._key_files = {name: self._open(f"keys.{name}.secret", key.secret) for name, key in config.keys.items()}
        self.keys = config.keys  # the clients'
        self.keys = self._found = self._read_keys()
        check_secrets(self.keys)
        self.providers = dict(config.providers)
        self._sources: Dict[str, Optional[WatchedFile]] = {}  # by provider
        for name, provider in config.providers.items():
            if provider.enabled:
                where = f"providers.{name}."
                proxy = self._open(where + "proxy", provider.proxy)
                if proxy:  # read only here: connections are made with it
                    url = a_proxy_url(proxy.value, f"{where}proxy: {proxy.path}")
                    self.providers[name] = provider._replace(proxy=url)
                self._sources[name] = self._open(where + "api_key", provider.api_key)
                if provider.auth == "oauth":
                    default = os.path.join(os.environ.get("CODEX_HOME") or "~/.codex", "auth.json")
                    path = self._path(provider.auth_file or default)
                    self._sources[name] = SignIn(provider, path, ask_issuer, self._warnings.append)

    def _path(self, path: str) -> str:
        return os.path.join(self._folder, os.path.expanduser(path))

    def _open(self, where: str, secret: Any) -> Optional[WatchedFile]:
        """Return the file that *secret*, at *where* in the configuration, names; None if it names none."""
        if not isinstance(secret, str) or not secret.startswith("file:"):
            return None
        file = WatchedFile(self._path(secret[len("file:") :]), where, read_secret, self._warnings.append)
        if file.problem:
            raise ConfigError(where, file.problem)
        return file

    def _read_keys(self) -> Mapping[str, Key]:
        files = self._key_files.items()
        read = {name: self.keys[name]._replace(secret=file.get()) for name, file in files if file}
        return {**self.keys, **read}

    def look_again(self) -> List[str]:
        """Bring the clients' keys up to date; return what there is to warn of since the last call."""
        found = self._read_keys()
        if found != self._found:
            self._found = found
            try:
                check_secrets(found)
                self.keys = found
            except ConfigError as error:
                self._warnings.append(f"{error}; all keys stay as they were")
        return [self._warnings.popleft() for _ in range(len(self._warnings))]

    def close(self, seconds: float) -> None:
        """Let who renews tokens write them down: those before them are spent.  No other renewal begins."""
        deadline = time.monotonic() + seconds
        for source in self._sources.values():
            if isinstance(source, SignIn):
                source.close(deadline - time.monotonic())

    def fields(self, provider: Provider, refused: Fields = (), may_wait: bool = True) -> Optional[Fields]:
        """Return what stands for us at *provider*; *refused* came back with a 401.

        None if that takes longer than the caller may wait.  UpstreamError if nothing stands for us there.
        """
        source = self._sources.get(provider.name)
        if isinstance(source, SignIn):
            return source.fields(refused, may_wait)
        key = source.get() if source else provider.api_key
        return (("Authorization", f"Bearer {key}"),) if key and provider.auth != "passthrough" else ()


# ---------------------------------------------------------------------------
# 9  Transport -- Loop; Transport, UpstreamConnection: urllib's opener over pooled connections; the way to an upstream:
#    Attempt, make_tls_context; make_server_context; load_zstd.  Knows no client and no policy.  What an error of the
#    system or of TLS on that way means is said here (reason_of), and nowhere else.
# ---------------------------------------------------------------------------

BLOCKED: Final = (BlockingIOError, InterruptedError, ssl.SSLWantReadError, ssl.SSLWantWriteError)
READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE
MAX_IDLE_PER_ORIGIN: Final = 128
ADDRESS_S: Final = 60.0  # the address that answered is taken again for so long, as curl does; then its name is resolved
SEND_BYTES: Final = MIB  # in one call: the loop has other streams to serve
ISSUER_S: Final = 30.0  # for the answer of an issuer of tokens
Origin = Tuple[str, ...]  # scheme, host with port, provider
WHOLE_BODY_BYTES: Final = 8 * MIB  # of an answer that is read at one go: a list of models, say
ANSWER_HEAD_BYTES: Final = 64 * KIB  # the same; and of a forward proxy's answer to CONNECT
# What OpenSSL's words (the same from 1.1.1 to 3.5) mean to the operator; {} is the provider's place in the file.
# TLS 1.3 brings the refusal of a client certificate only with the first read after the request.
TLS_FAILURES: Final = (
    ("alert certificate required", "it asks for a client certificate; set {}.client_cert"),
    ("alert .*(certificate|unknown ca|access denied)", "it refuses the certificate in {}.client_cert"),
    ("alert handshake failure", "it found no common cipher, or misses a client certificate ({}.client_cert)"),
    ("protocol version|unsupported protocol|legacy sigalg", "it speaks no TLS 1.2 or newer"),
    ("wrong version number|http request|record layer failure", "it does not speak TLS; check {}.api_base_url"),
    ("EOF occurred|unexpected eof", "it closed the connection"),
    ("key values mismatch|key type mismatch", "the key does not match the certificate"),
    ("PEM lib|not enough data|base64|X509 lib|bad end line", "the PEM in it is damaged"),
)


def do_nothing(*_: object) -> None:
    """The default of a callback."""


class Loop:
    """A selector, calls from other threads, and a tick.  run() returns after stop()."""

    patience_s = TICK_S  # when nothing has happened for so long, it is quiet
    _stopped = False
    _thread = 0
    _alarm: Tuple[float, Callable[[], None]] = (math.inf, do_nothing)  # when (monotonic), what

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self._turns: Deque[Tuple[Callable[..., None], Tuple[Any, ...]]] = collections.deque()
        self._watched: Dict[socket.socket, List[Any]] = {}  # events and callback; the selector has the same lists
        self._buffer = memoryview(bytearray(RECEIVE_BYTES))
        self.now = time.monotonic()
        # What its owner wants to be told: a round without work, time passed, a signal, a defect and where it was.
        self.on_quiet: Callable[[], None] = do_nothing
        self.on_tick: Callable[[float], None] = do_nothing
        self.on_wake: Callable[[], None] = do_nothing
        self.on_error: Callable[[Callable[..., None], Exception], None] = do_nothing
        self._wake_read, self._wake_write = socket.socketpair()
        for end in (self._wake_read, self._wake_write):
            end.setblocking(False)
        self.wakeup_fd = self._wake_write.fileno()  # for signal.set_wakeup_fd: a signal ends the wait at once
        self.watch(self._wake_read, READ, self._drain_wakeups)

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run *function* in the loop's thread, soon.  Other threads may use this and hand(), and no more."""
        self._calls.append((function, arguments))
        if not self.is_this_thread():
            with contextlib.suppress(OSError):  # full: it is awake anyway; closed: the program ends
                self._wake_write.send(b"\0")

    def hand(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run *function* in the loop's thread: now if this is it, else soon."""
        if self.is_this_thread():
            function(*arguments)
        else:
            self.call(function, *arguments)

    def take_turn(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run *function* behind what is ready: it takes longer than to pass a few bytes on."""
        self._turns.append((function, arguments))

    def call_after(self, seconds: float, function: Callable[[], None]) -> None:
        """Run *function* in *seconds*, in place of what waits for its time already."""
        self._alarm = (self.now + seconds, function)

    def is_this_thread(self) -> bool:
        return self._thread == threading.get_ident()

    def watch(self, sock: socket.socket, events: int, callback: Optional[Callable[[int], None]] = None) -> None:
        """Call *callback* with the ready events of *sock*; 0 ends it.  Another callback alone costs no system call."""
        entry = self._watched.get(sock)
        if entry is None:
            if events:
                entry = self._watched[sock] = [events, callback]
                self._selector.register(sock, events, entry)
        elif not events:
            entry[1] = None  # what is ready in this very round is no longer told
            del self._watched[sock]
            self._selector.unregister(sock)
        else:
            entry[1] = callback
            if entry[0] != events:
                entry[0] = events
                self._selector.modify(sock, events, entry)

    def close(self, sock: socket.socket) -> None:
        """Close *sock*, whether it is watched or not."""
        self.watch(sock, 0)
        with contextlib.suppress(OSError):
            sock.close()

    def receive(self, sock: socket.socket) -> Optional[bytes]:
        """Return what has come on *sock*, b"" at its end, None if nothing is there; or raise OSError.

        By way of a buffer that stays: recv() would get memory of that size for each event and give most of it back,
        which takes 20 us where the C library maps it.
        """
        try:
            return bytes(self._buffer[: sock.recv_into(self._buffer)])
        except ssl.SSLWantWriteError:  # of key updates: it would be ready to be read, and asked again, for ever
            raise ConnectionResetError("it wants answers of TLS, and does not read them") from None
        except BLOCKED:
            return None

    def stop(self) -> None:
        self._stopped = True

    def run(self) -> None:
        next_tick = 0.0
        self._thread = threading.get_ident()
        while not self._stopped:
            is_patient = not self._calls and not self._turns
            ready = self._selector.select(min(self.patience_s, self._alarm[0] - self.now) if is_patient else 0)
            self.now = time.monotonic()
            if is_patient and not ready:
                self.on_quiet()
            for key, events in ready:
                callback = key.data[1]
                if callback is not None:  # the ones before it may have ended it
                    try:
                        callback(events)
                    except Exception as error:
                        self.on_error(callback, error)
            if self._calls:
                self._make_calls()
            if self._turns:
                self._take_turns(time.monotonic() - self.now)
            if self.now >= self._alarm[0]:
                function, self._alarm = self._alarm[1], Loop._alarm
                self.guard(function)
            if self.now >= next_tick:
                next_tick = self.now + TICK_S
                self.guard(self.on_tick, self.now)

    def _make_calls(self) -> None:
        """A function of its own, or the last call would keep its arguments, a request with its body, say."""
        for _ in range(len(self._calls)):  # those that come meanwhile have the next round
            function, arguments = self._calls.popleft()
            self.guard(function, *arguments)

    def _take_turns(self, busy_s: float) -> None:
        """Take one turn, and more for half of the time that the round has taken: where rounds are long, many would come
        and one a round would leave."""
        end = time.monotonic() + busy_s / 2
        is_time = True
        while is_time and self._turns:
            function, arguments = self._turns.popleft()
            self.guard(function, *arguments)
            is_time = time.monotonic() < end

    def _drain_wakeups(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        self.on_wake()

    def guard(self, function: Callable[..., None], *arguments: Any) -> None:
        """Call *function*; a defect met there must end one exchange, not the service of all others."""
        try:
            function(*arguments)
        except Exception as error:
            self.on_error(function, error)


def is_silent(sock: socket.socket) -> bool:
    """Say whether nothing has come on a non-blocking socket, not even its end."""
    try:
        sock.recv(1)
    except BLOCKED as error:
        return not isinstance(error, ssl.SSLWantWriteError)  # see Loop.receive
    except OSError:
        pass
    return False


class UpstreamConnection:
    """A connection to an upstream with at most one request under way.  Owned by whoever holds it."""

    connecting = False  # SO_ERROR says how it ended, once the socket can be written to
    reused = False
    whole = True  # no part of the request was given up
    idle_since = 0.0

    def __init__(self, sock: socket.socket, origin: Origin, proxy: Optional[ForwardProxy] = None) -> None:
        """*proxy* is the one that reads our requests; behind a tunnel there is none."""
        self.sock, self.origin, self.proxy = sock, origin, proxy
        self.unsent: List[memoryview] = []  # of the request, the last part first

    def send_some(self) -> None:
        """Send what the upstream takes now; what is left stays in unsent.

        A break is no error here: the upstream may have answered before it closed, and its answer is still to be read.
        """
        while self.unsent:
            view = self.unsent.pop()
            try:
                sent = self.sock.send(view[:SEND_BYTES])
            except BLOCKED:
                self.unsent.append(view)
                return
            except OSError:
                self.unsent, self.whole = [], False
                return
            if sent < len(view):
                self.unsent.append(view[sent:])


class OutboundRequest(urllib.request.Request):
    """A request with its header fields exactly as given: urllib's own table would change their case and merge them.

    Nor is its URL taken apart again for each request: the members of Request that an opener reads are set here.
    """

    data = None
    headers: Dict[str, str] = {}

    def __init__(
        self,
        target: Target,
        path: str,
        method: str,
        fields: Sequence[Field],
        body: Optional[bytes] = None,
        *,
        fresh: bool = False,
        may_wait: bool = True,
    ) -> None:
        """*fresh*: not over a pooled connection; *may_wait*: for a connection to be made."""
        url = urllib.parse.urlsplit(target.base_url)  # which remembers
        self.type, self.host, self.selector = url.scheme, url.netloc, url.path + path
        self._full_url, self.fragment = target.base_url + path, None
        self.target, self.method, self.fields, self.body = target, method, fields, body
        self.fresh, self.may_wait = fresh, may_wait

    def render_head(self, proxy: Optional[ForwardProxy]) -> bytes:
        """Return the head, in absolute-form (RFC 9112 3.2.2) if *proxy* reads it."""
        fields = [*(proxy.fields() if proxy else ()), *self.fields]
        if not any(name.lower() == "host" for name, _ in self.fields):
            fields.insert(0, ("Host", self.host))
        if self.body is not None:
            fields.append(("Content-Length", str(len(self.body))))
        where = self.full_url if proxy else self.selector
        return f"{self.method} {where} HTTP/1.1\r\n".encode("latin-1") + render_fields(fields) + b"\r\n"


class Transport(urllib.request.BaseHandler):
    """The only handler of our opener: http, https and demo URLs over pooled connections.

    urllib's default opener follows redirects with the key, obeys http_proxy, raises on 4xx and 5xx, names itself as
    User-Agent and closes every connection; an OpenerDirector that holds this handler alone does none of that.
    """

    def __init__(self, config: Config, connect_demo: Callable[[], socket.socket]) -> None:
        """Load certificates and keys, look up forward proxies; ConfigError names what cannot be used."""
        self.loop: Loop  # set by whoever runs one, before a connection is released: it watches what is idle
        self._limits = config.limits
        self._connect_demo = connect_demo
        self._lock = threading.Lock()  # protects _idle and _is_closed
        self._idle: Dict[Origin, List[UpstreamConnection]] = collections.defaultdict(list)  # the last used last
        self._is_closed = False
        # Plain http only: family, address, proxy, good until.
        self._addresses: Dict[Origin, Tuple[int, Any, Optional[ForwardProxy], float]] = {}
        self._sessions: Dict[Origin, Optional[ssl.SSLSession]] = {}
        self._contexts: Dict[str, ssl.SSLContext] = {}
        for name, provider in config.providers.items():
            for url in (*provider.urls(), *[provider.oauth_token_url] * provider.oauth_refresh):
                find_proxy(provider, url)  # a wrong one in the environment is told now
                if url.startswith("https:") and name not in self._contexts:
                    self._contexts[name] = make_tls_context(provider)
        self._opener = urllib.request.OpenerDirector()
        self._opener.add_handler(self)

    def open(self, request: OutboundRequest) -> Optional[UpstreamConnection]:
        """Return the connection on which the answer to *request* will come; all of that is still to be sent.

        None if that needs a new connection, and *request* may not wait for one.  UpstreamError.
        """
        return self._opener.open(request, timeout=None)  # type: ignore[no-any-return]

    def post_form(self, provider: Provider, form: bytes) -> Tuple[int, bytes]:
        """Send *form* to the token URL of *provider*; return status and body of the answer.  UpstreamError."""
        fields = [("User-Agent", f"plexus_lite/{__version__}"), ("Accept", "application/json")]
        fields += [("Content-Type", "application/x-www-form-urlencoded"), ("Connection", "close")]
        target = Target(provider, provider.oauth_token_url, "")
        connection = self.open(OutboundRequest(target, "", "POST", fields, form, fresh=True))
        assert connection is not None
        try:
            with connection.sock:
                connection.send_some()
                answer, content = Attempt(provider, target.base_url, ISSUER_S).read_answer(connection.sock)
                return answer.status, content
        except (OSError, MalformedHTTP) as error:
            raise UpstreamError(f"no answer from {provider.oauth_token_url}: {error}") from None

    # -- the pool: what is in it is watched by the loop, so that what the upstream closes leaves it at once ---------

    def release(self, connection: UpstreamConnection) -> None:
        """Take back a connection whose answer has been read to its end.  In the loop's thread, as the next three."""
        # TLS 1.3 sends tickets after the handshake: now they are here.  Once: to copy a session takes 100 us.
        if isinstance(connection.sock, ssl.SSLSocket) and not connection.reused:
            self._sessions[connection.origin] = connection.sock.session
        connection.idle_since, connection.reused = time.monotonic(), True
        with self._lock:
            idle = self._idle[connection.origin]
            if self._is_closed or len(idle) >= MAX_IDLE_PER_ORIGIN:
                self.loop.close(connection.sock)
            else:
                idle.append(connection)
                self.loop.watch(connection.sock, READ, functools.partial(self._on_idle_ready, connection))

    def _on_idle_ready(self, connection: UpstreamConnection, events: int) -> None:
        """An idle connection has something to say: its end, what nobody asked for, or a TLS session ticket."""
        with self._lock:
            idle = self._idle[connection.origin]
            if connection not in idle:  # a thread has taken it, and what comes is the answer: attach() will watch it
                self.loop.watch(connection.sock, 0)
                return
            if not is_silent(connection.sock):
                idle.remove(connection)
                self.loop.close(connection.sock)

    def expire(self, now: float) -> None:
        """Close what has been idle for pool_idle_s; the oldest stand first."""
        with self._lock:
            for idle in self._idle.values():
                while idle and idle[0].idle_since < now - self._limits.pool_idle_s:
                    self.loop.close(idle.pop(0).sock)

    def close(self) -> None:
        self._is_closed = True
        self.expire(math.inf)

    # -- what the opener calls ---------------------------------------------

    def http_open(self, request: OutboundRequest) -> Optional[UpstreamConnection]:
        # The provider stands for its forward proxy and certificates: they change only with the configuration.
        origin = (request.type, request.host, request.target.provider.name)
        connection = None if request.fresh else self._take_idle(origin)
        if connection is None:
            connection = self._connect(request, origin) if request.may_wait else self._begin_connection(request, origin)
            if connection is None:
                return None
        head, body = request.render_head(connection.proxy), request.body or b""
        parts = [head + body] if len(body) <= 128 * KIB else [body, head]
        connection.unsent = [memoryview(part) for part in parts]
        return connection

    https_open = http_open
    demo_open = http_open

    def _take_idle(self, origin: Origin) -> Optional[UpstreamConnection]:
        """Return an idle connection on which nothing has come since the loop looked: it would be read as the answer."""
        with self._lock:
            idle = self._idle[origin]
            while idle:
                connection = idle.pop()
                if is_silent(connection.sock):
                    return connection
                self.loop.hand(self.loop.close, connection.sock)
        return None

    def _begin_connection(self, request: OutboundRequest, origin: Origin) -> Optional[UpstreamConnection]:
        """Begin to connect to the address that answered last; None if there is none, or it takes more than that."""
        family, address, proxy, until = self._addresses.get(origin, (0, None, None, -math.inf))
        if until < time.monotonic():
            return None
        with contextlib.suppress(OSError):  # no descriptor left: the thread that tries it next says so
            sock = new_socket(family)
            sock.setblocking(False)
            sock.connect_ex(address)
            error = sock.connect_ex(address)  # says how far it is: at once there, if the upstream is on this machine
            if error in (0, errno.EISCONN, errno.EALREADY, errno.EINPROGRESS, errno.EWOULDBLOCK):
                connection = UpstreamConnection(sock, origin, proxy)
                connection.connecting = error not in (0, errno.EISCONN)
                return connection
            sock.close()
        return None

    def forget_address(self, connection: UpstreamConnection) -> None:
        """It does not answer any more: the next connection begins with its name."""
        self._addresses.pop(connection.origin, None)

    def _connect(self, request: OutboundRequest, origin: Origin) -> UpstreamConnection:
        provider = request.target.provider
        attempt = Attempt(provider, request.target.base_url, provider.timeout_s("connect_timeout_s", self._limits))
        if request.type == "demo":
            sock = self._connect_demo()
        elif request.type == "https":
            sock = attempt.connect_tls(self._contexts[provider.name], self._sessions.get(origin))
        else:
            sock = attempt.connect()
        sock.setblocking(False)
        connection = UpstreamConnection(sock, origin, attempt.proxy if request.type == "http" else None)
        if request.type == "http":
            with contextlib.suppress(OSError):  # it has closed already
                address = sock.getpeername()
                self._addresses[origin] = (sock.family, address, connection.proxy, time.monotonic() + ADDRESS_S)
        return connection


# -- the way to an upstream: name, TCP, forward proxy, TLS --------------


@contextlib.contextmanager
def closing_on_error(sock: socket.socket) -> Iterator[None]:
    try:
        yield
    except BaseException:
        sock.close()
        raise


def reason_of(error: Exception, path: str = "") -> str:
    """Return what went wrong in words; of what TLS says, what it means for the provider at *path*."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if not isinstance(error, ssl.SSLError):
        return text
    plain = re.sub(r"^\[.*?\] | \(_ssl\.c:[0-9]+\)$", "", text)  # C's file and line help nobody
    return next((meaning.format(path) for words, meaning in TLS_FAILURES if re.search(words, text)), plain)


def find_proxy(provider: Provider, base_url: str) -> Optional[ForwardProxy]:
    """Return the forward proxy on the way to *base_url*; the environment has a say only if the provider wants it."""
    if isinstance(provider.proxy, ForwardProxy):
        return provider.proxy
    scheme, authority = urllib.parse.urlsplit(base_url)[:2]
    found = urllib.request.getproxies().get(scheme) if provider.proxy == "env" else None
    if not found or urllib.request.proxy_bypass(authority):
        return None
    path = f"providers.{provider.name}.proxy: {scheme.upper()}_PROXY"
    return a_proxy_url(found if "://" in found else "http://" + found, path)  # others take host:port there, too


def wrong_password(proxy: ForwardProxy, provider: Provider) -> UpstreamError:
    what = "does not take the user and password" if proxy.credentials else "asks for a user and password"
    return UpstreamError(f"the proxy {proxy.name} {what}; check providers.{provider.name}.proxy")


def new_socket(family: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or the last bytes wait for an ACK: 40 ms
    return sock


class Attempt:
    """One attempt to reach what stands at a URL, within some seconds.  Its calls block: they are not for the loop."""

    def __init__(self, provider: Provider, base_url: str, seconds: float) -> None:
        self.url, self.proxy = urllib.parse.urlsplit(base_url), find_proxy(provider, base_url)
        self.host = self.url.hostname or ""
        self._provider, self._deadline = provider, time.monotonic() + seconds
        self._path = f"providers.{provider.name}"  # in the configuration

    @contextlib.contextmanager
    def at(self, phase: str) -> Iterator[None]:
        """Name *phase* in what goes wrong meanwhile."""
        try:
            yield
        except (TimeoutError, socket.timeout):  # one and the same from 3.10 on
            message = f"no {phase} within the connect_timeout_s of {self._provider.name}"
            raise UpstreamError(message, "upstream_timeout") from None
        except ssl.SSLCertVerificationError as error:
            raise self._explain_refusal(error) from None
        except (OSError, MalformedHTTP) as error:
            raise UpstreamError(f"no {phase}: {reason_of(error, self._path)}") from None

    def _limit(self, sock: socket.socket) -> socket.socket:
        """Return *sock*, whose next call may take until the deadline; TimeoutError if that has passed."""
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("it took too long")
        sock.settimeout(left)
        return sock

    def connect(self) -> socket.socket:
        """Return a connection to the host; with a proxy, one to that, and for https its tunnel to the host."""
        is_https, proxy = self.url.scheme == "https", self.proxy
        host, port = self.host, self.url.port or (443 if is_https else 80)
        name = authority = join_authority(host, port)
        if proxy:
            host, port, name = proxy.host, proxy.port, f"the proxy {proxy.name}"
        with self.at(f"address of {host}"):
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        with self.at(f"connection to {name}"):
            sock = self._connect_tcp(addresses)
        if proxy and is_https:
            with self.at(f"tunnel to {authority} through {name}"), closing_on_error(sock):
                self._open_tunnel(sock, proxy, authority)
        return sock

    def _connect_tcp(self, addresses: List[Any]) -> socket.socket:
        """Return a socket to the first of getaddrinfo's *addresses* (at least one) that answers.  OSError."""
        for family, _, _, _, address in addresses:
            sock = new_socket(family)
            try:
                self._limit(sock).connect(address)
                return sock
            except OSError as error:
                sock.close()
                problem = error
        raise problem

    def _open_tunnel(self, sock: socket.socket, proxy: ForwardProxy, authority: str) -> None:
        """Let *proxy* connect *sock* to *authority* (RFC 9110 9.3.6).  No byte of the proxy's goes further."""
        fields = render_fields([("Host", authority), *proxy.fields()])
        sock.send(f"CONNECT {authority} HTTP/1.1\r\n".encode("ascii") + fields + b"\r\n")  # a new one takes it all
        answer, more = self._read_head(sock)
        if answer.status in (401, 407):  # tinyproxy answers 401 to a wrong password
            raise wrong_password(proxy, self._provider)
        if not 200 <= answer.status < 300:
            raise ConnectionError(f"it answered {answer.status}")
        if more:  # a TLS server does not speak first: these bytes are nobody's
            raise ConnectionError("it answered more than a head")

    def connect_tls(self, context: ssl.SSLContext, session: Optional[ssl.SSLSession] = None) -> ssl.SSLSocket:
        """Return what connect() does, after the handshake with the host."""
        sock = self.connect()
        with self.at(f"TLS handshake with {self.host}"):
            # A ragged end must be an error: for a body that ends with the connection it is a cut.
            tls = context.wrap_socket(
                sock,
                server_hostname=self.host,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
                session=session,
            )
            with closing_on_error(tls):
                self._limit(tls)
                tls.do_handshake()
                return tls

    def _explain_refusal(self, error: ssl.SSLCertVerificationError) -> UpstreamError:
        """Return what is wrong with the certificate of the host, and what to configure."""
        code, meaning = error.verify_code, f"is refused: {error.verify_message}"
        with contextlib.suppress(UpstreamError, KeyError, ValueError, OSError):  # then OpenSSL's words have to do
            shown = self._refused_certificate()
            signed = f"is signed by {describe(common_name(shown['issuer']))}"
            end = ssl.cert_time_to_seconds(shown["notAfter"])
            if code in (18, 19, 20, 21):  # X509_V_ERR_...: self-signed, or no way to a root
                verb = "check" if self._provider.ca_file else "set"
                meaning = f"{signed}, which is not trusted; {verb} {self._path}.ca_file"
            elif code in (62, 64):  # another name, or address
                names = ", ".join(describe(name) for _, name in shown.get("subjectAltName", ())[:5])
                meaning = f"is for {names or 'no name at all'}, not for {self.host}; check {self._path}.api_base_url"
            elif code == 10 and end < time.time():
                meaning = time.strftime("expired on %Y-%m-%d", time.gmtime(end))
            elif code == 10:
                meaning = f"{signed}: that certificate or one above it has expired; check {self._path}.ca_file"
            elif code == 9:  # it is not valid yet
                meaning += "; check the clock of this machine"
        return UpstreamError(f"certificate of {self.host} {meaning}")

    def _refused_certificate(self) -> Mapping[str, Any]:
        """Return the certificate that was refused, as getpeercert() has it.  UpstreamError, ValueError.

        After a failed handshake Python shows nothing of it.  So there is a second one that checks nothing; its
        connection never carries a request and ends at once.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        with self.connect_tls(context) as tls:
            context.verify_mode = ssl.CERT_REQUIRED  # too late to refuse; without it getpeercert() shows nothing
            return tls.getpeercert() or {}

    def _read_head(self, sock: socket.socket, data: bytes = b"") -> Tuple[AnswerHead, bytes]:
        """Return the head of the answer that begins with *data*, and what came after it.  OSError, MalformedHTTP."""
        while b"\r\n\r\n" not in data:
            if len(data) > ANSWER_HEAD_BYTES or not b"HTTP/1.".startswith(data[:7]):
                raise ConnectionError("it does not answer in HTTP/1.1")
            more = self._limit(sock).recv(RECEIVE_BYTES)
            if not more:
                raise ConnectionError("it closed the connection")
            data += more
        end = data.index(b"\r\n\r\n") + 4
        return read_answer_head(data[:end]), data[end:]

    def read_answer(self, sock: socket.socket) -> Tuple[AnswerHead, bytes]:
        """Return the answer on *sock*; of a body that is too long the beginning.  OSError, MalformedHTTP."""
        head, data = self._read_head(sock)
        while head.status < 200:  # it announces another one
            head, data = self._read_head(sock, data)
        reader = answer_body(head)
        body = reader.feed(data)
        while not reader.done and len(body) < WHOLE_BODY_BYTES:
            data = self._limit(sock).recv(RECEIVE_BYTES)
            body += reader.feed(data)
            if not data and reader.at_end():
                break
            if not data:
                raise ConnectionError("it broke off")
        return head, body


def make_tls_context(provider: Provider) -> ssl.SSLContext:
    """Return the system's roots plus the provider's ca_file and client certificate; name and expiry are checked.

    Not by create_default_context: where SSLKEYLOGFILE is set it writes the keys of each connection into that file.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    # 3.8 and 3.9 switch this on where OpenSSL 3 has it: a cut answer would look whole.
    context.options &= ~getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 0)
    path = f"providers.{provider.name}"
    if provider.ca_file is not None:
        # Any certificate in it is an anchor, an intermediate one as well; as curl has it.
        context.verify_flags |= getattr(ssl, "VERIFY_X509_PARTIAL_CHAIN", 0x80000)
        with using_pem(provider.ca_file, "CERTIFICATE", f"{path}.ca_file"):
            context.load_verify_locations(provider.ca_file)
    if provider.client_cert is not None:
        load_key_pair(context, provider.client_cert, provider.client_key, f"{path}.client_")
    elif provider.client_key is not None:
        raise ConfigError(f"{path}.client_key", "there is no client_cert to go with it")
    return context


def make_server_context(tls: Tls) -> ssl.SSLContext:
    """Return what our own certificate is shown with, TLS 1.2 at least; ConfigError if its files cannot be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # costs us more than the client, and reads would have to write
    context.set_alpn_protocols(["http/1.1"])
    load_key_pair(context, tls.cert, tls.key, "tls.")
    return context


def load_key_pair(context: ssl.SSLContext, cert: str, key: Optional[str], path: str) -> None:
    """Load the PEM files *cert* and *key* (None: it is in *cert*), which *path*cert and *path*key name."""
    key, where = key or cert, path + "key"

    def refuse_password() -> str:  # without it OpenSSL would ask on the terminal
        raise ConfigError(where, f"the key in {key} is encrypted; `openssl pkey` decrypts it")

    with using_pem(cert, "CERTIFICATE", path + "cert"), using_pem(key, "PRIVATE KEY", where):
        context.load_cert_chain(cert, key, refuse_password)


@contextlib.contextmanager
def using_pem(file_name: str, label: str, path: str) -> Iterator[None]:
    """Say which file cannot be used, and where the configuration names it: OpenSSL would not."""
    try:
        with open(file_name, "rb") as file:
            if not re.search(rb"-----BEGIN [A-Z ]*%b-----" % label.encode("ascii"), file.read()):
                raise ConfigError(path, f"{file_name} holds no -----BEGIN {label}----- (PEM)")
        yield
    except ssl.SSLError as error:
        raise ConfigError(path, f"cannot use {file_name}: {reason_of(error)}") from None
    except OSError as error:
        raise ConfigError(path, f"cannot read {file_name}: {error.strerror}") from None


def say_goodbye(sock: socket.socket) -> None:
    """Tell a TLS peer that the end is meant (close_notify, RFC 8446 6.1), as far as it can be told without waiting."""
    if isinstance(sock, ssl.SSLSocket):
        with contextlib.suppress(OSError, ValueError):  # ValueError: that has been done
            sock.unwrap()


def common_name(name: Any) -> str:
    """Return the common name in a name as getpeercert() has it (pairs in pairs), all of its parts if there is none."""
    parts: Dict[str, str] = dict(sum(name, ()))
    return parts.get("commonName") or ", ".join(parts.values())


class ZstdFrame:
    """zlib.decompressobj's interface to a frame, by the system's libzstd.  Frees what it takes before it returns."""

    eof = False
    unused_data = b""

    def __init__(self, library: Any) -> None:
        self._library = library

    def decompress(self, raw: bytes, max_length: int) -> bytearray:
        import ctypes

        library, buffer, out = self._library, ctypes.c_size_t * 3, bytearray()  # buffer: address, size, position
        source = ctypes.create_string_buffer(bytes(raw), len(raw))
        piece = ctypes.create_string_buffer(128 * KIB)  # a block: the output grows by what is there, not by claims
        given = buffer(ctypes.addressof(source), len(raw), 0)
        context = ctypes.c_void_p(library.ZSTD_createDStream())
        if not context:
            raise MemoryError
        try:
            library.ZSTD_DCtx_setParameter(context, 100, ZSTD_WINDOW_LOG)  # ZSTD_d_windowLogMax
            while not self.eof and len(out) < max_length:
                taken = buffer(ctypes.addressof(piece), min(len(piece), max_length - len(out)), 0)
                left = library.ZSTD_decompressStream(context, taken, given)
                if left < 0:
                    raise zlib.error(library.ZSTD_getErrorName(ctypes.c_size_t(left)).decode())
                out += memoryview(piece)[: taken[2]]
                self.eof = not left
                if taken[2] < taken[1]:
                    break  # all that came has been used
        finally:
            library.ZSTD_freeDStream(context)
        self.unused_data = raw[given[2] :]
        return out


@functools.lru_cache(maxsize=None)
def load_zstd() -> Optional[Coding]:
    """Return how zstd is undone here: by the standard library, by the system's libzstd, or None.

    Called for the first zstd body and not at the start: few need it.  The library is asked for by its names;
    ctypes.util.find_library would start compilers to find it.
    """
    if sys.version_info >= (3, 14):
        with contextlib.suppress(ImportError):
            from compression import zstd

            options: Dict[int, int] = {zstd.DecompressionParameter.window_log_max: ZSTD_WINDOW_LOG}
            return Coding("zstd", lambda: zstd.ZstdDecompressor(options=options), zstd.ZstdError, ZSTD_MAGIC)
    for name in ("libzstd.so.1", "libzstd.1.dylib", "libzstd.dll"):
        with contextlib.suppress(ImportError, OSError, AttributeError, MemoryError):  # no ctypes, no such library
            import ctypes

            library = ctypes.CDLL(name)
            library.ZSTD_createDStream.restype = ctypes.c_void_p
            library.ZSTD_DCtx_setParameter.restype = ctypes.c_size_t  # since 1.4.0
            library.ZSTD_decompressStream.restype = ctypes.c_ssize_t  # an error is less than 0
            library.ZSTD_getErrorName.restype = ctypes.c_char_p
            return Coding("zstd", functools.partial(ZstdFrame, library), magic=ZSTD_MAGIC)
    return None


# ---------------------------------------------------------------------------
# 10  Relay -- State, Bodies, Exchange, ClientConnection, Answer, Feed: client sockets and running answers, all in the
#    loop's thread; an exchange goes to a handler and back.  Nothing here blocks: not a send to a slow reader, not the
#    wait for a first byte.
# ---------------------------------------------------------------------------


def trim_heap() -> None:
    """Let glibc give back to the system what is free in its heap, also between what is in use; it would keep it."""
    if sys.platform == "linux":
        with contextlib.suppress(ImportError, OSError, AttributeError):  # no ctypes, another C library
            import ctypes

            libc = ctypes.CDLL(None)
            # Fixed, or each large block that is freed lets glibc keep more: what has 1 MiB and more goes back at once.
            libc.mallopt(-3, MIB)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 4 * MIB)  # M_TRIM_THRESHOLD
            libc.malloc_trim(0)


def own_fields() -> List[Field]:
    """Return the fields of an answer that is our own (RFC 9110 6.6.1: an origin server sends Date)."""
    return [("Content-Type", "application/json"), ("Date", email.utils.formatdate(usegmt=True))]


class State(NamedTuple):
    """What a configuration makes.  Replaced whole on reload; an exchange keeps the one it began with."""

    config: Config
    transport: Transport
    catalogue: Mapping[Tuple[str, str], Tuple[Target, ...]]  # what each configured name means, by name and API
    has_places: bool  # a response id has more than one place where it may have been issued
    ticket_secret: bytes  # the same in all workers
    credentials: Credentials
    tls: Optional[ssl.SSLContext] = None  # of our own certificate

    def targets(self, model: str, api: str) -> Tuple[Target, ...]:
        known = self.catalogue.get((model, api))
        return targets_of(self.config, model, api) if known is None else known


NO_HEAD: Final = RequestHead("", "", "", "", None, 1, Headers(()))  # of a request that could not be read
NO_ANSWER: Final = AnswerHead(0, "", 1, Headers(()))  # not here yet
NO_PLAN: Final = Plan((), "")  # not placed yet
NO_BODY: Final = BodyReader()  # never fed


class Bodies:
    """How many bytes of request bodies this process holds, for all clients together."""

    def __init__(self, workers: int) -> None:
        """*workers* share limits.max_buffered_bytes."""
        self._lock = threading.Lock()  # protects _total: handlers in threads count what they decode
        self._total = 0
        self._workers = workers

    def count(self, size: int) -> int:
        """Count *size* more bytes (or less, below 0); return what that makes if the other workers hold as many."""
        with self._lock:
            self._total += size
            return self._total * self._workers


class Exchange:
    """One request and what becomes of it.

    The loop and one handler take turns with it: the loop fills it, start() hands it to a handler, take_back() or
    attach() takes it back.  Only where the client leaves meanwhile does the loop not wait for its turn: it sets
    is_gone, which a handler in a thread looks at, and writes the record as it is.
    """

    reader: BodyReader = NO_BODY
    size = 0  # of what has come of the body
    held = 0  # bytes of it that are counted
    body = b""  # once all of it is here
    refusal: Optional[ProxyError] = None  # to be answered once the body has been read
    is_gone = False  # the client has left while a handler had it
    bytes_out = 0
    # What admit() finds.
    route = Route("", "", "")
    identity = Identity()
    keys: Mapping[str, Key] = {}  # among which that was found
    # What placing finds: which targets are asked, in which order, and what of the request that was made of.
    session = Session()
    cache_key: Optional[str] = None
    model: Optional[str] = None
    json: Optional[JsonBody] = None  # until digests have been taken, and for targets with another model name
    prefix = b""  # these digests
    targets: Tuple[Target, ...] = ()  # all that could serve it
    is_renamed = False  # some of them under another model's name: it is copied for them
    plan = NO_PLAN
    affinity: Optional[Affinity] = None  # what it was placed by, if there was a choice
    turn_owners: Sequence[Optional[str]] = ()  # the places that minted its turn states, None where not known
    # What each turn changes.
    tried = 0  # how many targets of the plan
    left: Tuple[Target, ...] = ()  # those that a further one stood in for
    target: Optional[Target] = None  # the one being asked
    asks_again = False  # the same target, in the next turn
    was_stale = False  # its pooled connection
    credential: Sequence[Field] = ()  # what was sent
    refused: Sequence[Field] = ()  # what it answered with a 401 before
    waits_since: Optional[float] = None  # for 429s to pass (monotonic)
    last_answer: Optional["Answer"] = None  # an error, read to its end and not sent: another is asked first
    last_error: ProxyError = UpstreamError("no target is enabled")
    usage: Optional[UsageReader] = None  # of the answer that is relayed

    def __init__(self, head: RequestHead, state: State, peer: str, now: float, bodies: Bodies) -> None:
        self.head, self.bodies = head, bodies
        self.headers = head.headers  # the end-to-end ones once it is admitted: a copy can take 2 MB
        self.state = state
        # Not from the system's source of secrets: the id only tells requests apart, and each costs a system call.
        self.record = new_record(time.time(), f"req_{random.getrandbits(96):024x}", peer)
        self.started = now  # monotonic
        self.begun = io.BytesIO()  # the body, until all of it is here

    def hold(self, size: int) -> None:
        """Count *size* more bytes as held for it; ProxyError if there are too many of all clients."""
        self.held += size
        limit = self.state.config.limits.max_buffered_bytes
        if size and self.bodies.count(size) > limit:  # who has no body is not refused for those of others
            raise ProxyError("overloaded", f"the request bodies under way fill limits.max_buffered_bytes ({limit})")

    def let_go(self) -> None:
        """Its body will not be sent any more.  In the loop's thread, while no handler has it."""
        if self.held:
            self.bodies.count(-self.held)
            self.held = 0

    def digest(self, fleet: Fleet) -> None:
        """Take digests of the JSON body, and forget it unless another target needs it under another model's name."""
        body, self.json = self.json, None
        if body is None or self.plan is NO_PLAN:  # nothing to learn from, or refused
            return
        if self.session.value is not None and not self.prefix:
            self.prefix, seen = digest_body(body)
            if len(body.raw) >= SEEN_BYTES and len(seen.digests) <= SEEN_DIGESTS_BYTES:
                fleet.seen.put(self.session.digest or "", seen, self.started)
        if self.is_renamed and self.record["ttfb_ms"] is None:
            self.json = body._replace(lists={})

    def fail(self, code: str) -> None:
        """Record *code* as the request's error, unless one is recorded already."""
        if self.record["error"] is None:
            self.record["error"] = code

    def complete_record(self) -> None:
        """Record what is known of it at its end; what happened on the way has been recorded then."""
        record, target, session = self.record, self.target, self.session  # a handler may still be at it
        record["key"], record["label"] = self.identity.name, self.identity.label
        record["method"], record["route"] = self.head.method[:32] or None, self.route.name or None
        record["model"], record["placement"] = self.model and self.model[:MAX_NAME_CHARS], self.plan.reason or None
        record["session"], record["session_source"] = session.digest, session.source
        record["bytes_in"], record["bytes_out"] = self.size, self.bytes_out
        record["duration_ms"] = round((time.monotonic() - self.started) * 1000, 3)
        if target:
            record["provider"], record["target"] = target.provider.name, target.base_url
            record["upstream_model"] = target.model[:MAX_NAME_CHARS] or None


class Phase:
    """What a client connection is doing."""

    HANDSHAKE = "handshake"  # of TLS: nothing can be said before its end
    IDLE = "idle"  # no byte of a request yet
    HEAD = "head"
    BODY = "body"
    BUSY = "busy"  # a handler has the exchange
    ANSWERING = "answering"  # an answer is awaited or relayed, or a 429 waited for
    LINGERING = "lingering"  # the last answer is out: read until the client closes
    CUT = "cut"  # an answer broke off: without a clean end it closes once the rest is out
    CLOSED = "closed"


EMPTY_LINES: Final = re.compile(rb"\A(?:\r\n)+")
# How long it may read; all other phases have no limit of their own.
READING: Final = {Phase.IDLE: "client_idle_s", Phase.HEAD: "header_timeout_s", Phase.BODY: "body_timeout_s"}


class ClientConnection:
    """A client's connection: strict requests in, answers out, one after the other.

    Where each byte goes: _received collects, _advance reads requests, send() writes answers (a running Answer does it
    itself), keep() holds what the client does not take yet.  finish() ends an exchange in step with the connection,
    abort() in the middle of an answer, close() because the client has left.
    """

    exchange: Optional[Exchange] = None
    answer: Union["Answer", "Feed", None] = None
    closing = False  # no further request on this connection
    _pending = b""  # bytes of the request being read, or of the ones after it
    _head_bytes = b""  # of the answer, until its first bytes leave with it
    framing = "length"  # of the answer, or "chunked", or "close": it ends with the connection (HTTP/1.0)
    _advances_soon = False  # a call of _advance() waits for its round
    _took_at = 0.0  # when the client last took something of unsent

    def __init__(self, server: "Server", sock: socket.socket, peer: str) -> None:
        self.server, self.loop, self.sock, self.peer = server, server.loop, sock, peer
        self.unsent = bytearray()  # what the client has not taken yet
        self.deadline = self.loop.now + self.limits.header_timeout_s  # a new connection has something to say
        self.idle_since = time.monotonic()  # not loop.now: of those that came in one go, the last must not give way
        is_tls = isinstance(sock, ssl.SSLSocket)
        self.phase = Phase.HANDSHAKE if is_tls else Phase.IDLE
        self.loop.watch(sock, READ, self._shake_hands if is_tls else self._on_ready)

    @property
    def limits(self) -> Limits:
        return self.server.state.config.limits  # those of today: a reload is for open connections, too

    def enter(self, phase: str, seconds: float = math.inf) -> None:
        self.phase, self.deadline = phase, self.loop.now + seconds

    # -- requests in -----------------------------------------------------

    def _watch(self) -> None:
        if self.phase == Phase.CLOSED:
            return
        busy = self.phase in (Phase.BUSY, Phase.ANSWERING)
        is_full = len(self._pending) > PIPELINE_BYTES and (busy or self.phase == Phase.IDLE)
        unread = is_full or (not busy and len(self.unsent) > HIGH_WATER_BYTES)
        events = 0 if unread or self.phase == Phase.CUT else READ
        self.loop.watch(self.sock, events | WRITE if self.unsent else events, self._on_ready)

    def _shake_hands(self, events: int) -> None:
        """Take a step of the TLS handshake.  All of it has the time for a head, as the wait for the first byte has."""
        try:
            self.sock.do_handshake()  # type: ignore[attr-defined]
        except BLOCKED as error:
            is_full = isinstance(error, ssl.SSLWantWriteError)
            self.loop.watch(self.sock, WRITE if is_full else READ, self._shake_hands)
        except OSError as error:
            if getattr(error, "reason", None) != "HTTP_REQUEST":
                self.close()
                return
            self.phase = Phase.IDLE
            self.loop.watch(self.sock, 0)
            self.sock = socket.socket(fileno=self.sock.detach())
            self.sock.setblocking(False)
            self.refuse(MalformedHTTP("this is plain HTTP on a TLS port; use https:// in the base URL"))
        else:
            self.phase = Phase.IDLE
            self._watch()

    def _on_ready(self, events: int) -> None:
        if events & WRITE:
            self._flush()
        if events & READ and self.phase != Phase.CLOSED:
            try:
                data = self.loop.receive(self.sock)
            except OSError:
                data = b""
            if data:
                self._received(data)
            elif data is not None:  # FIN counts as gone: no agent half-closes, and who has left must cost no tokens
                self.close()

    def _received(self, data: bytes) -> None:
        if self.phase == Phase.LINGERING:
            return
        self._pending = self._pending + data if self._pending else data
        if self.phase in READING and not self._advances_soon:
            self._advance()
        elif len(self._pending) > PIPELINE_BYTES:
            self._watch()

    def _advance(self) -> None:
        """Read as much of a request as is there; stop once one is complete, and while the client does not read."""
        self._advances_soon = False
        try:
            while self._pending and self.phase in READING:
                if len(self.unsent) > HIGH_WATER_BYTES or not self._read_some(self.limits):
                    break
        except ProxyError as error:
            self.refuse(error)
        self._watch()

    def _advance_soon(self) -> None:
        """Read the next pipelined request, in a later round: thousands of them would nest, and others would wait."""
        if self._pending and not self._advances_soon:
            self._advances_soon = True
            self.loop.call(self._advance)

    def _read_some(self, limits: Limits) -> bool:
        """Take one step through the pending bytes; False if more of them are needed, or a request is complete."""
        if self.phase == Phase.IDLE:
            if self._pending[:1] == b"\r":
                self._pending = EMPTY_LINES.sub(b"", self._pending, 1)  # RFC 9112 2.2: ignored before a request
                if self._pending in (b"", b"\r"):
                    return False
            self.enter(Phase.HEAD, limits.header_timeout_s)
        if self.phase == Phase.HEAD:
            end = find_head_end(self._pending, limits.max_header_bytes)
            if end < 0:
                return False
            head, self._pending = self._pending[:end], self._pending[end:]
            self._begin(read_request_head(head), limits)
        return self.exchange is None or self._read_body(self.exchange, limits)

    def _begin(self, head: RequestHead, limits: Limits) -> None:
        """Decide on a request by its head, before its body is read."""
        length = body_length(head)
        exchange = self.exchange = Exchange(head, self.server.state, self.peer, self.loop.now, self.server.bodies)
        exchange.reader = ChunkedBody() if length is None else LengthBody(length)
        self.enter(Phase.BODY, limits.body_timeout_s)
        self.closing = head.version == 0 or "close" in head.headers.tokens("connection")
        expectation = head.headers.tokens("expect")
        try:
            if expectation not in ([], ["100-continue"]):
                raise ProxyError("expectation_failed", "the only expectation met here is 100-continue")
            self.server.admit(exchange)
            if length and length > limits.max_body_bytes:
                raise too_large("body", limits.max_body_bytes)
        except ProxyError as error:
            if error.closes or expectation or (length or 0) > SMALL_BODY_BYTES:
                raise
            exchange.refusal = error  # its body is on the way: read it, or it would be taken for the next request
        if expectation and head.version and not self._pending and not exchange.reader.done:
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _read_body(self, exchange: Exchange, limits: Limits) -> bool:
        """Take what is there of the body; False once it is complete."""
        payload = exchange.reader.feed(self._pending)
        self._pending = exchange.reader.rest
        exchange.size += len(payload)
        if exchange.refusal:
            if exchange.reader.done or exchange.size > SMALL_BODY_BYTES:
                raise exchange.refusal
            return True
        if exchange.size > len(payload) or not exchange.reader.done:  # it has not come in one piece
            exchange.begun.write(payload)
        if exchange.size > limits.max_body_bytes:
            raise too_large("body", limits.max_body_bytes)
        exchange.hold(len(payload))
        if exchange.reader.done:
            exchange.body = exchange.begun.getvalue() or payload  # which copies nothing
            exchange.begun = io.BytesIO()
            if exchange.size > LARGE_BODY_BYTES:
                trim_heap()
            self.go_on(exchange)
        return not exchange.reader.done

    def go_on(self, exchange: Exchange) -> None:
        self.enter(Phase.BUSY)
        self.server.start(exchange, self)

    def take_back(self, exchange: Exchange, function: Callable[..., None], *arguments: Any) -> None:
        """A handler's turn has ended: go on with *function*, unless the client has left meanwhile."""
        if self.exchange is exchange:
            self.phase = Phase.ANSWERING  # no handler has it any more
            function(*arguments)
        else:
            exchange.let_go()

    # -- answers out -----------------------------------------------------

    def refuse(self, error: ProxyError) -> None:
        """Answer a request that cannot be read, may not be served, or found no upstream."""
        if self.phase == Phase.HANDSHAKE:
            self.close()
            return
        if self.exchange is None:
            self.exchange = Exchange(NO_HEAD, self.server.state, self.peer, self.loop.now, self.server.bodies)
        if error.closes or not self.exchange.reader.done:
            self.closing = True  # the bytes that follow cannot be told from a request
            self._pending = b""
        self.exchange.fail(error.code)
        fields, body = render_error(error)
        self.respond(error.status, [*own_fields(), *fields], body)

    def respond(self, status: int, fields: Sequence[Field], body: bytes) -> None:
        """Send a whole answer of our own and end the exchange with it."""
        assert self.exchange is not None
        self.begin_answer(status, http.HTTPStatus(status).phrase, fields, len(body))
        self.send_payload(b"" if self.exchange.head.method == "HEAD" else body)
        self.finish()

    def begin_answer(self, status: int, reason: str, fields: Sequence[Field], length: Optional[int] = None) -> None:
        """Render the head, with the framing for *length* bytes (None: not known); it leaves with the first payload."""
        exchange = self.exchange
        assert exchange is not None
        own: List[Field] = []
        self.framing = "length"
        if length is None and exchange.head.version == 1:
            self.framing = "chunked"
            own.append(("Transfer-Encoding", "chunked"))
        elif length is None:
            self.framing = "close"
        elif status not in (204, 304):
            own.append(("Content-Length", str(length)))
        own.append(("x-plexus-request-id", exchange.record["id"]))
        self.closing = self.closing or self.framing == "close" or self.server.is_draining()
        if self.closing:
            own.append(("Connection", "close"))
        line = f"HTTP/1.1 {status} {reason}\r\n".encode("latin-1")
        self._head_bytes = line + render_fields([*fields, *own]) + b"\r\n"
        exchange.record["status"] = status

    def send_payload(self, payload: bytes, is_last: bool = False) -> None:
        """Send a part of the answer's body; before the first one the head, in the same packet."""
        exchange = self.exchange
        assert exchange is not None
        exchange.bytes_out += len(payload)
        wire = payload
        if self.framing == "chunked":
            wire = b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""
            if is_last:
                wire += b"0\r\n\r\n"
        if self._head_bytes:
            wire, self._head_bytes = self._head_bytes + wire, b""
            exchange.record["ttfb_ms"] = round((time.monotonic() - exchange.started) * 1000, 3)
        self.send(wire)

    def send(self, wire: bytes) -> None:
        """Send what the client takes now and keep the rest; never blocks."""
        if not wire:  # only a part of a chunk's head came: 3.8 and 3.9 take it for an error to send nothing over TLS
            return
        sent = 0 if self.unsent else self._offer(wire)
        if sent < len(wire) and self.phase != Phase.CLOSED:
            self.keep(wire, sent)

    def keep(self, wire: bytes, sent: int) -> None:
        """Keep what the client has not taken of *wire*."""
        if not self.unsent:
            self._took_at = self.loop.now
        self.unsent += memoryview(wire)[sent:]
        self._watch()

    def _offer(self, data: Union[bytes, bytearray]) -> int:
        """Return how much of *data* the client takes now.  What TLS takes is counted only when it has taken all."""
        try:
            return self.sock.send(data)
        except BLOCKED:
            pass
        except OSError:
            self.close()
        return 0

    def _flush(self) -> None:
        """The client reads: there is room."""
        self._took_at = self.loop.now
        del self.unsent[: self._offer(self.unsent)]
        if self.unsent or self.phase == Phase.CLOSED:
            return
        if self.phase == Phase.CUT:
            self.close()
        elif self.answer:
            self.answer.resume()
        elif self.phase == Phase.LINGERING:
            self._shut()
        else:
            self._advance_soon()
        self._watch()

    def finish(self) -> None:
        """The answer is complete: write the record, and be ready for the next request or close."""
        if self.exchange is None:  # the client has left meanwhile
            return
        self._end_exchange()
        self.idle_since = time.monotonic()
        if self.closing or self.server.is_draining():
            self.enter(Phase.LINGERING)
            if not self.unsent:
                self._shut()
        else:
            self.enter(Phase.IDLE, self.limits.client_idle_s)
            self._advance_soon()
        self._watch()

    def _end_exchange(self, error: Optional[str] = None) -> None:
        """The exchange has ended: its answer lets go of the upstream, its record is written."""
        exchange, self.exchange = self.exchange, None
        answer, self.answer = self.answer, None
        if answer:
            answer.detach()
        if exchange:
            if error:
                exchange.fail(error)
            exchange.refusal = None  # its traceback leads back here
            exchange.last_answer = None  # leads back, too: a cycle keeps the body until a collection, and those are few
            if not exchange.is_gone:  # else a thread may have it, and its body
                exchange.let_go()
            exchange.complete_record()
            self.server.done(exchange)

    def _shut(self) -> None:
        """Say that nothing follows, and read on for a while: closing with unread bytes would reset the connection,
        and a reset can destroy the answer on its way (RFC 9112 9.6)."""
        self.deadline = self.loop.now + LINGER_S
        say_goodbye(self.sock)
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self.close()

    def abort(self, code: Optional[str]) -> None:
        """End an answer that cannot be completed: what came is delivered, then the connection breaks, without the
        last chunk.  A clean end would be taken for a complete answer."""
        self._end_exchange(code)
        if self.framing == "close":
            # Only a reset tells such a client that the body is cut.
            with contextlib.suppress(OSError):
                linger = struct.pack("ii", 1, 0) if os.name != "nt" else struct.pack("hh", 1, 0)
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.enter(Phase.CUT)
        if self.unsent:
            self._watch()
        else:
            self.close()

    def close(self) -> None:
        """Close at once: the client has left, or has to."""
        if self.phase == Phase.CLOSED:
            return
        exchange, phase, self.phase = self.exchange, self.phase, Phase.CLOSED  # first: a defect below closes it again
        if not (exchange or phase == Phase.CUT or self.unsent):
            say_goodbye(self.sock)
        self.loop.close(self.sock)
        self.unsent.clear()
        self.server.clients.discard(self)
        if exchange:
            exchange.is_gone = phase == Phase.BUSY
            if exchange.record["status"] is None:
                exchange.record["status"] = 499  # as nginx logs it
            self._end_exchange(None if self._is_whole(exchange) else "client_gone")

    # -- time ------------------------------------------------------------

    def tick(self, now: float) -> None:
        if self.unsent and now > self._took_at + self.limits.stall_timeout_s:
            if self.exchange:
                self.exchange.fail("client_stalled")
            self.close()
        elif now > self.deadline and not self.unsent:  # while it reads an answer, only the stall counts
            self._on_deadline()
        elif self.answer:
            self.answer.tick(now)

    def _on_deadline(self) -> None:
        if self.phase in (Phase.HEAD, Phase.BODY):
            name = READING[self.phase]
            limit = f"limits.{name} ({getattr(self.limits, name):g})"
            self.refuse(ProxyError("request_timeout", f"no complete {self.phase} within {limit}"))
        elif self.phase == Phase.ANSWERING and self.exchange:  # the wait for a 429 to pass is over
            self.go_on(self.exchange)
        else:
            self.close()

    @property
    def is_busy(self) -> bool:
        """Say whether a request is under way or an answer not yet out."""
        return self.exchange is not None or bool(self.unsent)

    def can_give_way(self) -> bool:
        """Say whether nobody would miss it: the last answer is out, or it is idle; and no byte waits to be read, which
        on a new connection is its request, and with which a close becomes a reset."""
        if self.is_busy or self._pending or self.phase not in (Phase.HANDSHAKE, Phase.IDLE, Phase.LINGERING):
            return False
        try:
            return not socket.socket.recv(self.sock, 1, socket.MSG_PEEK)
        except OSError:  # nothing there, or broken
            return True

    def end_idle(self) -> None:
        """Draining: a connection without a request ends at once; what has just come on one is read and refused."""
        if self.phase == Phase.IDLE:
            self._on_ready(READ)
        if self.phase == Phase.HEAD:
            self.refuse(shutting_down())
        elif self.phase in (Phase.HANDSHAKE, Phase.IDLE) and not self.unsent and not self._pending:
            self.close()

    def cut(self) -> None:
        """The program ends: answer what has no answer yet, break off what has, close."""
        exchange = self.exchange
        if exchange and exchange.record["status"] is None:
            exchange.is_gone = self.phase == Phase.BUSY  # a handler that has it must not send it any more
            self.refuse(shutting_down())
        elif exchange:
            self.abort(None if self._is_whole(exchange) else "shutting_down")
        self.close()

    def _is_whole(self, exchange: Exchange) -> bool:
        """The page closes its stream as it likes; Codex leaves after the last event, before the end."""
        if exchange.usage:
            exchange.usage.finish()
        return isinstance(self.answer, Feed) or (exchange.usage is not None and exchange.usage.is_complete)


class Answer:
    """An upstream's answer on its way to the client; one per target that is asked.  Owns the upstream connection.

    Until its head is here, head is NO_ANSWER.  An error is then held back, in _held, until it is complete: another
    target may do better.  All else is relayed as it comes.
    """

    head = NO_ANSWER
    _start = b""  # of the answer, until its head is complete
    _interim_bytes = 0  # of the heads before it
    _body: BodyReader = NO_BODY
    _held: Optional[bytearray] = None  # the body of an error answer, see HELD_ANSWER_BYTES
    _kept = b""  # its end, once it is relayed: perhaps the beginning of a credential
    _tail = b""  # the last bytes of an event stream into which comments may go
    _opening: Optional[bytes] = None  # the body's beginning, as long as the response id is looked for in it
    _is_direct = False  # an event stream that may leave by _relay_direct()

    def __init__(
        self, connection: ClientConnection, exchange: Exchange, target: Target, upstream: UpstreamConnection
    ) -> None:
        self.connection, self.exchange, self.target, self.loop = connection, exchange, target, connection.loop
        self.upstream: Optional[UpstreamConnection] = upstream
        self._proxy, self._credential = upstream.proxy, exchange.credential
        self._fleet = connection.server.fleet
        self._limits = exchange.state.config.limits
        self._wait_for("connect_timeout_s" if upstream.connecting else "first_byte_timeout_s")
        self._quiet_since = self._commented_at = self.loop.now
        self._unsent = connection.unsent
        connection.answer, connection.phase = self, Phase.ANSWERING
        self._watch()

    def _wait_for(self, timeout: str) -> None:
        self._timeout = timeout
        self._deadline = self.loop.now + self.target.provider.timeout_s(timeout, self._limits)

    # -- the upstream's side ---------------------------------------------

    def _watch(self) -> None:
        """Wait for more of the answer, unless the client has enough to read, and go on with what is left to send."""
        if self.upstream:
            events = 0 if len(self.connection.unsent) > HIGH_WATER_BYTES else READ
            is_between_events = self._is_direct and self._tail[-2:] == b"\n\n" and self._opening is None
            is_between = is_between_events and self._body.is_between_chunks()
            callback = self._relay_direct if is_between else self._on_ready
            self.loop.watch(self.upstream.sock, events | WRITE if self.upstream.unsent else events, callback)

    def _on_ready(self, events: int) -> None:
        upstream = self.upstream
        assert upstream is not None  # else nothing is watched
        if events & WRITE:
            if upstream.connecting and not self._is_connected(upstream):
                return
            upstream.send_some()
            self._watch()
        if not events & READ:
            return
        try:
            data = self.loop.receive(upstream.sock)
        except OSError as error:
            self._reset(error)
        else:
            if data is not None:
                self._arrived(data)

    def _relay_direct(self, events: int) -> None:
        """Pass on chunks of whole events that tell nothing, as they came; leave all else to _on_ready().

        This is what a stream mostly consists of, and under load most of what the proxy costs.  So it takes the shortest
        way: no calls but the system's and a few of bytes, and little memory.
        """
        if events != READ or self._unsent:
            self._on_ready(events)
            return
        upstream = self.upstream
        assert upstream is not None  # else nothing is watched
        try:
            data = self.loop.receive(upstream.sock)
        except OSError as error:
            self._reset(error)
            return
        if data is None:
            return
        size, lines = whole_chunk(len(data))  # one chunk, told by its length: at a quarter of the cost
        if not data.startswith(lines):
            size = size_of_events(data)
        if not size or not data.endswith(b"\n\n\r\n") or is_telling(data):
            self._arrived(data)
            return
        try:
            sent = self._send(data)
        except BLOCKED:
            sent = 0
        except OSError:
            self.connection.close()
            return
        self._quiet_since = self.loop.now
        self.exchange.bytes_out += size
        if sent < len(data):
            self.connection.keep(data, sent)

    def _arrived(self, data: bytes) -> None:
        self._quiet_since = self.loop.now
        try:
            if not data:
                self._ended()
            elif self.head is NO_ANSWER:
                self._read_head(data)
            else:
                self._take(self._body.feed(data))
        except MalformedHTTP as error:
            self._invalid(error)

    def _is_connected(self, upstream: UpstreamConnection) -> bool:
        """Say whether the connection that was begun is there.  If not, a thread tries again: it has all the time, and
        all addresses."""
        upstream.connecting = False
        if upstream.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.exchange.state.transport.forget_address(upstream)
            self.exchange.asks_again = True
            self._next_turn()
            return False
        self._wait_for("first_byte_timeout_s")
        return True

    def _read_head(self, data: bytes) -> None:
        """Read the head once it is complete, and decide what to do with the answer."""
        self._start += data
        head, limit = NO_ANSWER, self._limits.max_header_bytes  # of all heads together: they might go on for ever
        while head.status < 200:  # 100, 102 and 103 announce another head
            end = self._start.find(b"\r\n\r\n") + 4
            if self._interim_bytes + (end if end > 3 else len(self._start)) > limit:
                raise MalformedHTTP(f"the head is larger than limits.max_header_bytes ({limit})")
            if end < 4:
                if not b"HTTP/1.".startswith(self._start[:7]) or has_bare_line_end(self._start):
                    raise MalformedHTTP("this is not HTTP/1.1")
                return
            raw, self._start = self._start[:end], self._start[end:]
            head = read_answer_head(raw)
            self._interim_bytes += end
            if head.status == 101:
                raise MalformedHTTP("101 Switching Protocols was not asked for")
        if head.status == 407 and self._proxy:  # it asks us, not the client
            self._failed(wrong_password(self._proxy, self.target.provider))
            return
        self._body = answer_body(head)
        secrets_sent = self._secrets()
        if mask(raw, secrets_sent) != raw:  # an upstream that repeats our credential must not reveal it
            head = mask_head(head, secrets_sent)
        self.head = head
        self._learn(head)
        if head.status >= 400:
            self._held = bytearray()
            self._deadline = self.loop.now + HELD_ANSWER_S
        else:
            self._commit()
        rest, self._start = self._start, b""
        self._take(self._body.feed(rest))
        if head.status < 400:
            self.connection.server.digest_later(self.exchange)

    def _learn(self, head: AnswerHead) -> None:
        """Remember what this head teaches: the target is well or has to rest, where the session lies now, who minted
        the turn state."""
        exchange, fleet, target, now = self.exchange, self._fleet, self.target, self.loop.now
        if head.status in RETRY_STATUSES:
            fleet.failed(target, now, retry_after_of(head.headers, time.time()))
            return
        fleet.succeeded(target)
        if head.status < 400 and exchange.affinity:
            fleet.served(exchange.affinity, exchange.plan, target, exchange.tried, now)
        if head.status < 400 and exchange.state.has_places:
            for state in head.headers.all(TURN_STATE):
                fleet.owners.put(text_digest(state), target.place, now)

    def _take(self, payload: bytes) -> None:
        """Pass on one read's payload, and the end of the body with it; what is read of it is read afterwards."""
        connection, exchange, done = self.connection, self.exchange, self._body.done
        if self._held is not None:
            self._held += payload
            if done or len(self._held) > HELD_ANSWER_BYTES:
                self._judge_error()
            return
        if self.head.status >= 400:
            payload = self._masked(payload, done)
        connection.send_payload(payload, done)
        if self._tail:
            self._tail = payload[-4:] if len(payload) > 3 else (self._tail + payload)[-4:]
        if self._opening is not None:
            self._opening += payload
            issued = RESPONSE_ID.search(self._opening, 0, RESPONSE_ID_BYTES)
            if issued:
                self._fleet.owners.put(text_digest(issued[1].decode()), self.target.place, self.loop.now)
            if issued or len(self._opening) >= RESPONSE_ID_BYTES:
                self._opening = None
        if exchange.usage:
            exchange.usage.feed(payload)
        if done:
            connection.finish()
        elif self._is_direct or len(connection.unsent) > HIGH_WATER_BYTES:
            self._watch()

    def _judge_error(self) -> None:
        """An error answer is complete, or cannot be held back any longer: hand it on, unless another target may do
        better.  One that is not complete is handed on as far as it is here, and then relayed."""
        exchange, status, is_whole = self.exchange, self.head.status, self._body.done
        passes_on = {404} if exchange.route.action == "stored" else RETRY_STATUSES  # with which another is asked
        if is_whole:
            exchange.last_answer = self  # give_up() hands it on if nobody does better
        if is_whole and status == 401 and self.target.provider.oauth_refresh and not exchange.refused:
            exchange.refused, exchange.asks_again = exchange.credential, True  # once more, after a renewal
            self._next_turn()
        elif status in passes_on and (is_whole or exchange.tried < len(exchange.plan.targets)):
            self._next_turn()  # of a whole one from the last target, too: give_up() may wait for a 429 to pass
        else:
            self.hand_on()

    def _ended(self) -> None:
        """The upstream closed the connection."""
        if self._body.at_end():
            self._body.done = True
            self._take(b"")
        else:
            when = "before it answered" if self.head is NO_ANSWER else "in the middle of its answer"
            self._broken(f"closed the connection {when}")

    def _reset(self, error: OSError) -> None:
        self._broken(f"broke the connection: {reason_of(error, f'providers.{self.target.provider.name}')}")

    def _broken(self, what: str) -> None:
        upstream, is_awaited = self.upstream, self.head is NO_ANSWER
        has_begun = self._start or self._interim_bytes
        if not is_awaited and self._held is None:
            self.connection.abort("upstream_closed")
        elif is_awaited and upstream and upstream.reused and not has_begun:
            # It was closed while idle, before this request reached it (RFC 9112 9.3.1): once more, on a fresh one.
            self.exchange.asks_again = self.exchange.was_stale = True
            self._next_turn()
        else:
            self._failed(self._error(what))

    def _invalid(self, error: MalformedHTTP) -> None:
        """What came is no HTTP: a 502 at once, since the request may have been served; or a cut, if it has begun."""
        if self.exchange.record["ttfb_ms"] is None:
            found = UpstreamError("in the answer: " + error.message, "upstream_invalid_response")
            self.connection.refuse(found)
        else:
            self.connection.abort("upstream_invalid_response")

    def _error(self, what: str, code: str = "upstream_connection_error") -> UpstreamError:
        host = urllib.parse.urlsplit(self.target.base_url).netloc or self.target.base_url
        return UpstreamError(f"{host}{f' through the proxy {self._proxy.name}' if self._proxy else ''} {what}", code)

    def _failed(self, error: ProxyError) -> None:
        self.exchange.last_error = error
        self._fleet.failed(self.target, self.loop.now)
        self._next_turn()

    def _next_turn(self) -> None:
        """Back to a handler: it asks the next target, or answers."""
        self.detach()
        self.connection.answer = None
        self.connection.go_on(self.exchange)

    def detach(self) -> None:
        """Let go of the upstream connection: back into the pool if it is at the end of a whole answer, else it ends,
        so that no more tokens are made for a client that has left."""
        upstream, self.upstream = self.upstream, None
        if upstream is None:
            return
        self._fleet.closed(self.target)
        if upstream.whole and not upstream.unsent and self._is_persistent():
            self.exchange.state.transport.release(upstream)
        else:
            self.loop.close(upstream.sock)

    def _is_persistent(self) -> bool:
        """RFC 9112 9.3, and stricter: surplus bytes are somebody's mistake, so nothing more is read from there."""
        if self._body.rest or not self._body.done or isinstance(self._body, CloseBody):
            return False
        options = self.head.headers.tokens("connection")
        return "close" not in options and (self.head.version == 1 or "keep-alive" in options)

    # -- the client's side -----------------------------------------------

    def hand_on(self) -> None:
        """Relay the error answer that was held back, as it is but for our credentials in it."""
        assert self._held is not None
        self.exchange.target = self.target  # one that was asked later gave no answer
        payload, self._held = bytes(self._held), None
        self._commit()
        self._take(payload)

    def _masked(self, payload: bytes, is_last: bool) -> bytes:
        """Return what can leave now of an error answer, masked; its end may be the beginning of a credential."""
        secrets_sent = self._secrets()
        text = mask(self._kept + payload, secrets_sent)
        kept = 0 if is_last else min(len(text), SPELLING_BYTES * max(map(len, secrets_sent), default=0))
        self._kept = text[len(text) - kept :]
        return text[: len(text) - kept]

    def _secrets(self) -> Tuple[bytes, ...]:
        """Return the credentials in the fields that we add, and those for a proxy that reads them, for masking."""
        proxy = self._proxy
        fields = [*self.target.provider.headers, *self._credential, *(proxy.fields() if proxy else ())]
        values = [value.rpartition(" ")[2].encode("ascii") for name, value in fields if name.lower() in CREDENTIALS]
        password = proxy.credentials.partition(b":")[2] if proxy else b""
        return tuple(value for value in (*values, password) if len(value) >= 4)

    def _commit(self) -> None:
        """The answer goes to the client: from here on there is no other target."""
        connection, exchange, head = self.connection, self.exchange, self.head
        length = self._body.length if isinstance(self._body, LengthBody) else None
        self._deadline = math.inf
        exchange.let_go()
        exchange.body = b""
        is_stream, is_encoded = is_event_stream(head.headers), head.headers.get("content-encoding") is not None
        exchange.record["stream"] = is_stream
        if is_stream and not is_encoded and length is None:
            self._tail = b"\n\n"
        if exchange.state.has_places and head.status < 300:
            self._opening = b""
        # What a stored response took was counted when it was made; of an error there is the code.
        if (exchange.route.action == "forward" or head.status >= 400) and not is_encoded:
            exchange.usage = UsageReader(is_stream)
        asked, used = exchange.model, self.target.model
        fields = answer_fields(head, None if asked in (None, used) else (asked or "", used))
        connection.begin_answer(head.status, head.reason, fields, length)
        if self._tail and connection.framing == "chunked" and self.upstream:
            self._is_direct, self._send = True, connection.sock.send

    def resume(self) -> None:
        """The client has read what was kept for it: go on reading from the upstream."""
        self._quiet_since = self.loop.now
        self._watch()

    def tick(self, now: float) -> None:
        connection, provider, limits = self.connection, self.target.provider, self._limits
        silent_s = now - max(self._quiet_since, self._commented_at)
        is_idle = now - self._quiet_since > provider.timeout_s("idle_timeout_s", limits)
        if self.exchange.json:  # the upstream thinks, so there is time for this
            self.exchange.digest(self._fleet)
        if self._held is not None and (is_idle or now > self._deadline):
            self._judge_error()
        elif now > self._deadline:
            if self.upstream and self.upstream.connecting:  # what its name means by now may answer
                self.exchange.state.transport.forget_address(self.upstream)
            what = f"gave no answer within {self._timeout} ({provider.timeout_s(self._timeout, limits):g})"
            self._failed(self._error(what, "upstream_timeout"))
        elif self._deadline < math.inf or connection.unsent:
            return
        elif is_idle:
            connection.abort("upstream_timeout")
        elif self._tail.endswith((b"\n\n", b"\r\n\r\n")) and 0 < limits.keepalive_s <= silent_s:
            # A comment in a silent event stream, between two events, so that idle timeouts on the way rest.
            self._commented_at = now
            connection.send_payload(b": keepalive\n\n")


class Feed:
    """The status page's event stream: what render() returns, at once, then each second if it has changed, and now and
    then even if not."""

    _last: Mapping[str, Any] = {}
    _next = _said_at = 0.0

    def __init__(self, connection: ClientConnection, exchange: Exchange, render: Callable[[], Dict[str, Any]]) -> None:
        self._connection, self._render = connection, render
        self._keys = exchange.keys
        connection.answer, connection.phase = self, Phase.ANSWERING
        exchange.record["stream"] = True
        fields = [("Content-Type", "text/event-stream"), ("Cache-Control", "no-store"), ("X-Accel-Buffering", "no")]
        connection.begin_answer(200, "OK", fields)
        self.tick(connection.loop.now)

    def tick(self, now: float) -> None:
        connection, server = self._connection, self._connection.server
        # Other keys: whose page this is may be none any more, or see less.  It asks for another ticket by itself.
        if server.is_draining() or server.state.credentials.keys != self._keys:
            connection.send_payload(b"", is_last=True)
            connection.finish()
        elif now >= self._next and not connection.unsent:  # read too slowly: nothing more, and the stall limit counts
            self._next = now + FEED_S
            status = self._render()
            if status != self._last or now - self._said_at > FEED_REPEAT_S:
                self._last, self._said_at = status, now
                data = render_json({**status, "now": time.time()})
                connection.send_payload(b"event: status\ndata: " + data + b"\n")

    resume = detach = do_nothing  # a page that has read what was kept waits for the next tick; nothing else is held


# ---------------------------------------------------------------------------
# 11  Handler -- admit, place, Handler: a turn of a request: route, key, JSON, policy, placement, send.  In the loop if
#    it is small and has to wait for nothing, else in a thread.  Every ProxyError ends here (or in room 10, for what
#    cannot be read) as an answer.
# ---------------------------------------------------------------------------


def admit(exchange: Exchange) -> None:
    """Set the route and identity of *exchange* from its head; ProxyError refuses it before its body is read."""
    head, config = exchange.head, exchange.state.config
    route = exchange.route = route_of(head)
    if route.action == "websocket":
        # Before the key: Codex and pi turn to SSE at once on 426, and wait for seconds on anything else.
        message = "WebSockets are not spoken here; use POST"
        raise ProxyError("websocket_not_supported", message, fields=[("Upgrade", "HTTP/1.1")])
    check_origin(head, config)
    if route.action not in ("health", "page"):
        keys = exchange.keys = exchange.state.credentials.keys
        if route.action == "status" and head.query:
            exchange.identity = find_ticket(head.query, exchange.state.ticket_secret, keys, time.time())
        else:
            exchange.identity = find_key(head.headers, keys)
    if route.action == "forward" and head.headers.values.keys().isdisjoint(("content-length", "transfer-encoding")):
        raise ProxyError("length_required", "a body is needed: send JSON with Content-Length")
    exchange.headers = head.headers.end_to_end()


def place(exchange: Exchange, fleet: Fleet, now: float) -> None:
    """Read the body as far as routing needs it, and plan which targets are asked."""
    state, route, headers = exchange.state, exchange.route, exchange.headers
    encoding, limits = ", ".join(headers.tokens("content-encoding")), state.config.limits
    exchange.session = session_of(headers, None)
    raw = decode_content(exchange.body, encoding, limits.max_body_bytes, load_zstd)
    if raw is not None and raw is not exchange.body:
        exchange.hold(len(raw))
    body = exchange.json = None if raw is None else read_json(raw, exchange.session, fleet, now)
    exchange.cache_key = cache_key(body)
    exchange.session = session_of(headers, exchange.cache_key)
    model = exchange.model = body.text("model") if body else None
    if body:
        check_model(exchange, body)
    targets = exchange.targets = only_choice(exchange) if model is None else state.targets(model, route.api)
    if not targets:
        if model in model_list(state.config):
            raise no_such_model(exchange, model or "", f"is not served at {route.name}")
        raise no_such_model(exchange, model or "")
    if body and any(target.model != model for target in targets):
        exchange.is_renamed = True
        exchange.hold(len(body.raw))
    plan = choose(exchange, fleet, now) if len(targets) > 1 else Plan(targets, "only")
    if plan.reason in ("only", "rendezvous") and model and model[:7] == "direct/" and model not in state.config.models:
        plan = plan._replace(reason="direct")
    exchange.plan = plan


AT_ONCE: Final = contextlib.nullcontext()  # what is read in the loop waits for no place
CACHE_KEY: Final = re.compile(rb'"prompt_cache_key"\s*:\s*"([^"\\]+)"')


def read_json(raw: Raw, told: Session, fleet: Fleet, now: float) -> JsonBody:
    """Return the JSON body *raw*; what it repeats of the turn before is not parsed again.

    Which session it belongs to, its headers have *told* before, or a look at the bytes, which need not be right.
    """
    session, seen = told, None
    if len(raw) >= SEEN_BYTES:
        found = None if told.value else CACHE_KEY.match(raw, raw.rfind(b'"prompt_cache_key"'))
        session = Session(found[1].decode("latin-1")) if found else session
        seen = fleet.seen.get(session.digest or "", now)
    body = parse_json_body(raw, seen or NOTHING_SEEN)
    if body.items.seen and told.value is None and not cache_key(body):  # then its first items are needed
        body = parse_json_body(raw)
    return body


def choose(exchange: Exchange, fleet: Fleet, now: float) -> Plan:
    """Plan for several targets: by what issued an id, by a pin, by the session's hash, by a fingerprint."""
    body, owner = exchange.json, None
    issued = body and body.text("previous_response_id")
    if issued:
        owner = fleet.owners.get(text_digest(issued), now)
    owner = owner or next(filter(None, exchange.turn_owners), None)
    by = exchange.affinity = affinity_of(exchange.session.value, body, exchange.model, owner)
    plan = fleet.plan(exchange.targets, by, now, exchange.state.config.limits.pin_idle_s)
    if exchange.session.value is None and plan.reason == "rendezvous":
        plan = plan._replace(reason="fingerprint")
    return plan


def place_stored(exchange: Exchange, fleet: Fleet, now: float) -> None:
    """Plan for a request about an earlier response: its owner, else every upstream in order until one knows it."""
    places = places_of(exchange.state.config, exchange.identity.models)
    if not places:
        raise ProxyError("not_found", "no upstream that this key may use keeps responses")
    owner = fleet.owners.get(text_digest(urllib.parse.unquote(exchange.route.id)), now)
    owners = tuple(target for target in places if target.place == owner)
    exchange.targets = owners or places
    exchange.session = session_of(exchange.headers, None)
    exchange.plan = Plan(exchange.targets, "owner" if owners else "only" if len(places) == 1 else "")


def only_choice(exchange: Exchange) -> Tuple[Target, ...]:
    """Return the targets for a body that cannot be read, if its model changes nothing about them."""
    config, api = exchange.state.config, exchange.route.api
    providers = [p for p in config.providers.values() if p.enabled and api in p.api_base_url]
    if len(providers) == 1 and not config.models and exchange.identity.models is None:
        return tuple(Target(providers[0], url, "") for url in providers[0].api_base_url[api])
    raise ProxyError(
        "unsupported_content_encoding",
        f"the Content-Encoding {describe(', '.join(exchange.headers.tokens('content-encoding')))} cannot be read here, "
        "and the model in the body decides where it goes; send it uncompressed "
        "(Codex: --disable enable_request_compression)",
        fields=[("Accept-Encoding", f"gzip, deflate{', zstd' if load_zstd() else ''}, identity")],
    )


def check_model(exchange: Exchange, body: JsonBody) -> None:
    """Refuse a *body* that asks for no model, or for one that this key may not use."""
    model, allowed = exchange.model, exchange.identity.models
    if model is None:
        found = str(body.part("model")[:60], "utf-8", "replace") if "model" in body.spans else "missing"
        raise ProxyError("invalid_request", f'"model" must be a string; it is {found}', param="model")
    if allowed is not None and model not in allowed:
        if not is_served(exchange.state.config, model):
            raise no_such_model(exchange, model)
        message = f"this key may not use {describe(model)}; it may use: {', '.join(allowed) or 'none'}"
        raise ProxyError("model_not_allowed", message, param="model")


def usable_models(exchange: Exchange) -> List[str]:
    """Return the names that the client's key may use."""
    allowed = exchange.identity.models
    return model_list(exchange.state.config) if allowed is None else list(allowed)


def no_such_model(exchange: Exchange, name: str, why: str = "does not exist here") -> ProxyError:
    state, api = exchange.state, exchange.route.api
    there = [one for one in usable_models(exchange) if exchange.route.action == "models" or state.targets(one, api)]
    message = f"the model {describe(name)} {why}; there are: {', '.join(there) or 'none'}"
    return ProxyError("model_not_found", message, param="model")


class Handler(http.server.BaseHTTPRequestHandler):
    """A turn of an exchange.  The loop has read the request, so the base class' reader and writer stay unused."""

    server: "Server"
    request: Tuple[Exchange, ClientConnection]

    def setup(self) -> None:
        self.exchange, self.connection = self.request
        self.fleet = self.server.fleet

    finish = do_nothing  # of a writer that is not used

    def handle(self) -> None:
        try:
            getattr(self, "do_" + self.exchange.route.action)()
        except ProxyError as error:
            self.hand(self.connection.refuse, error.alone())
        except ClientGone:  # the loop saw it first, and has written the record
            self.hand(do_nothing)

    def hand(self, function: Callable[..., None], *arguments: Any) -> None:
        """Give the exchange back to the loop, which goes on with *function*.  So ends each turn that asks no target."""
        self.server.loop.hand(self.connection.take_back, self.exchange, function, *arguments)

    def answer(self, value: Any) -> None:
        self.hand(self.connection.respond, 200, own_fields(), render_json(value))

    def do_health(self) -> None:
        self.answer({"status": "ok"})

    def do_page(self) -> None:
        self.hand(self.connection.respond, 200, *self.server.page)

    def do_ticket(self) -> None:
        expires = int(time.time()) + TICKET_S
        key = self.exchange.keys.get(self.exchange.identity.name or "")
        ticket = make_ticket(self.exchange.state.ticket_secret, key, expires)
        self.answer({"ticket": ticket, "expires_in": TICKET_S})

    def do_metrics(self) -> None:
        self.hand(self.server.answer_metrics, self.connection)

    def do_status(self) -> None:
        self.hand(self.server.attach_feed, self.connection, self.exchange)

    def do_models(self) -> None:
        """Answer with OpenAI's list of models, or one of it."""
        config, entries = self.exchange.state.config, {}
        for name in usable_models(self.exchange):
            targets = targets_of(config, name, "responses") or targets_of(config, name, "chat")
            owner = targets[0].provider.name
            entries[name] = {"id": name, "object": "model", "created": self.server.started, "owned_by": owner}
        wanted = urllib.parse.unquote(self.exchange.route.id)
        if not wanted:
            self.answer({"object": "list", "data": list(entries.values())})
        elif wanted in entries:
            self.answer(entries[wanted])
        else:
            raise no_such_model(self.exchange, wanted)

    # -- the main job ----------------------------------------------------

    def do_forward(self) -> None:
        """Ask the next target; hand the connection on which it will answer to the loop."""
        exchange = self.exchange
        may_wait = not self.server.loop.is_this_thread()
        if exchange.plan is NO_PLAN:
            with self.server.parsers if may_wait else AT_ONCE:  # few at a time read a large or encoded body
                if exchange.is_gone:
                    raise ClientGone
                now, states = time.monotonic(), exchange.headers.all(TURN_STATE)
                exchange.turn_owners = [self.fleet.owners.get(text_digest(state), now) for state in states]
                plan = place_stored if exchange.route.action == "stored" else place
                plan(exchange, self.fleet, now)
        while not exchange.is_gone:
            target = self.next_target()
            if target is None:
                if may_wait:
                    exchange.digest(self.fleet)
                self.give_up()
                return
            upstream = None
            try:
                request = self.outbound_request(target, may_wait)
                upstream = request and exchange.state.transport.open(request)
            except UpstreamError as error:
                self.fleet.failed(target, time.monotonic())
                exchange.last_error = error.alone()
                continue
            finally:
                if not upstream:
                    self.fleet.closed(target)
            if upstream:
                if not upstream.connecting and not exchange.is_gone:  # who left meanwhile must cost no tokens
                    upstream.send_some()
                if may_wait:
                    exchange.digest(self.fleet)
                self.server.loop.hand(self.server.attach, self.connection, exchange, target, upstream)
            else:  # in the loop, where nothing may wait: the same again in a thread
                exchange.asks_again = True
                self.server.give_to_thread(self.request)
            return
        raise ClientGone

    do_stored = do_forward

    def next_target(self) -> Optional[Target]:
        """Return the target to ask now, None if all of the plan have been; its load is counted from here on."""
        exchange, targets = self.exchange, self.exchange.plan.targets
        if not exchange.asks_again:
            if exchange.tried == len(targets):
                return None
            if exchange.tried:
                exchange.left += (targets[exchange.tried - 1],)
            exchange.tried += 1
            exchange.was_stale, exchange.refused = False, ()
            exchange.record["attempts"] += 1
        exchange.asks_again = False
        target = targets[exchange.tried - 1]
        exchange.target = target
        self.fleet.opened(target)
        return target

    def outbound_request(self, target: Target, may_wait: bool) -> Optional[OutboundRequest]:
        """Return what *target* is asked; None if its credential takes time, and nothing may wait for it."""
        exchange, head = self.exchange, self.exchange.head
        credential = exchange.state.credentials.fields(target.provider, exchange.refused, may_wait)
        if credential is None:
            return None
        exchange.credential = credential
        minters = set(exchange.turn_owners)
        keep_turn_state = minters == {target.place}
        if minters == {None}:  # of unknown origin: it can only be from here if there is nowhere else
            keep_turn_state = len({one.provider.account_name() for one in exchange.targets}) == 1
        parsed = exchange.json  # once: the loop forgets it if the client leaves meanwhile
        is_edited = parsed is not None and exchange.model != target.model
        fields = outbound_fields(
            exchange.headers,
            target.provider,
            exchange.session,
            exchange.cache_key,
            credential=credential,
            keep_turn_state=keep_turn_state,
            keep_encoding=not is_edited,
            key_fields=exchange.identity.fields,
        )
        body = exchange.body or (b"" if head.method == "POST" else None)
        if parsed and is_edited:
            body = replace_model(parsed, target.model)
        return OutboundRequest(
            target,
            exchange.route.path + head.query,
            head.method,
            fields,
            body,
            fresh=exchange.was_stale,
            may_wait=may_wait,
        )

    def give_up(self) -> None:
        """No target is left: wait if a 429 may pass, else answer as the last one did that answered at all."""
        exchange, held = self.exchange, self.exchange.last_answer
        if held is None:
            raise exchange.last_error
        if held.head.status == 429:
            now = time.monotonic()
            exchange.waits_since = exchange.waits_since or now
            limit = held.target.provider.wait_on_429_s
            pause = retry_after_of(held.head.headers, time.time()) or min(1.0, limit)  # 0 and a past date say no time
            if limit and now + pause <= exchange.waits_since + limit:
                exchange.tried = 0
                self.hand(self.connection.enter, Phase.ANSWERING, pause)  # then the next turn begins
                return
        self.hand(held.hand_on)


# ---------------------------------------------------------------------------
# 12  Server -- Shared, Log, listen, Server, Supervisor: accept, handle in the loop or hand to threads, observe what has
#    ended, reload, drain, stop; several workers.
# ---------------------------------------------------------------------------

LEVELS: Final = ("error", "warning", "info", "debug")
MAX_QUEUED_LINES: Final = 10_000
LOG_PAUSE_S: Final = 0.02
SMALL_TURN_BYTES: Final = 64 * KIB  # JSON of this size keeps the loop for 0.2 ms; a compressed body can be any size
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
SIGNALS: Final = {*STOP_SIGNALS, getattr(signal, "SIGHUP", signal.SIGTERM)}  # Windows has no SIGHUP


class Shared:
    """What all workers see, made before the first of them: the sessions' last turns, and what each has counted, so
    that any of them can tell the sum, and one that is replaced counts on.

    A worker writes its counts to the older of two places, so that the other one can be read meanwhile.  What is not
    whole, being written or left by a worker that died, has a wrong checksum.
    """

    PLACE_BYTES: Final = 16 * MIB  # memory is used as far as it is written
    HEAD: Final = struct.Struct("<QII")  # when (monotonic ns, the same in all processes), length, checksum

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.started = int(time.time())
        self.supervisor = os.getpid()
        self.sessions = SessionTable(mmap.mmap(-1, SessionTable.BYTES))
        self.clients = memoryview(mmap.mmap(-1, 4 * workers)).cast("I")  # of each worker, each written by itself
        self._places = [[mmap.mmap(-1, self.PLACE_BYTES) for _ in range(2)] for _ in range(workers)]

    def publish(self, worker: int, tally: Tally) -> None:
        data, begin = marshal.dumps(vars(tally)), self.HEAD.size
        place = min(self._places[worker], key=self.HEAD.unpack_from)
        if begin + len(data) <= len(place):  # else far more providers than anyone has: the last one stays
            place[begin : begin + len(data)] = data
            self.HEAD.pack_into(place, 0, time.monotonic_ns(), len(data), zlib.crc32(data))

    def read(self, worker: int) -> Tally:
        """Return what *worker* published last; an empty Tally if nothing yet."""
        tally, found = Tally(), [(0, marshal.dumps({}))]
        for place in self._places[worker]:
            when, length, checksum = self.HEAD.unpack_from(place)
            data = place[self.HEAD.size : self.HEAD.size + length]
            if length and zlib.crc32(data) == checksum:
                found.append((when, data))
        vars(tally).update(marshal.loads(max(found)[1]))
        return tally


class Log:
    """Lines of JSON to stderr or a file, written by a thread of its own: a full disk or a terminal that was stopped
    must not stop the service.  What does not fit into the queue is dropped, and a line says so."""

    def __init__(self, path: Optional[str], level: str) -> None:
        self._level = LEVELS.index(level)
        self._path = path
        self._fd = 2 if path is None else self.open(path)
        self._is_terminal = path is None and os.isatty(2)
        self._lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._has_dropped = self._reopens = False
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)
        self._thread.start()

    @staticmethod
    def open(path: str) -> int:
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NONBLOCK", 0)  # or a FIFO would keep us
            return os.open(path, flags, 0o640)
        except OSError as error:
            raise ConfigError(f"--log-file {path}", f"cannot be opened: {error.strerror}") from None

    def record(self, record: Record, level: str = "info") -> None:
        if LEVELS.index(level) > self._level:
            return
        if self._lines.qsize() >= MAX_QUEUED_LINES:
            self._has_dropped = True
        elif self._is_terminal:
            self._lines.put((render_line(record) + "\n").encode("utf-8", "replace"))
        else:
            self._lines.put(render_json(record))

    def event(self, level: str, message: str) -> None:
        self.record(new_event(level, message), level)

    def reopen(self) -> None:
        """Open the file again by its name, before the next line: it may have been rotated away."""
        self._reopens = self._path is not None

    def close(self) -> None:
        self._lines.put(b"")  # the last one
        self._thread.join(2)

    def _run(self) -> None:
        lines = [b"\n"]
        while all(lines):
            lines = [self._lines.get()]
            time.sleep(LOG_PAUSE_S)  # then write all that came meanwhile: a wake-up per line costs the requests
            lines += [self._lines.get() for _ in range(self._lines.qsize())]
            if self._reopens:
                self._reopens = False
                try:
                    fd, self._fd = self._fd, self.open(str(self._path))
                    os.close(fd)
                except ConfigError as error:
                    self.event("error", f"{error}; the old file goes on")
            data = b"".join(lines)
            with contextlib.suppress(OSError):  # closed, or the disk is full
                while data:
                    try:
                        data = data[os.write(self._fd, data) :]
                    except BlockingIOError:
                        time.sleep(0.05)  # someone made stderr non-blocking; this thread may wait: the queue is bounded
            if self._has_dropped:
                self._has_dropped = False
                self.event("warning", "log lines were dropped: they came faster than they could be written")


def new_event(level: str, message: str) -> Record:
    return {"ts": new_record(time.time(), "", "")["ts"], "level": level, "message": message}


def log_event(path: Optional[str], limit: str, level: str, message: str) -> None:
    """Write an event into the log at *path* at once, from a process that has no Log: one with threads must not fork."""
    if LEVELS.index(level) > LEVELS.index(limit):
        return
    event, fd = new_event(level, message), 2
    with contextlib.suppress(ConfigError):
        fd = fd if path is None else Log.open(path)
    say(render_line(event) if os.isatty(fd) else JSON_ENCODER.encode(event), fd)
    if fd != 2:
        os.close(fd)


def say(text: str, fd: int = 1) -> None:
    """Write a line for the operator; stdout or stderr may be closed, and that is no reason to stop."""
    with contextlib.suppress(OSError):
        os.write(fd, (text + "\n").encode("utf-8", "backslashreplace"))


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; OSError if that is not possible.

    Not by HTTPServer.server_bind: it asks the resolver for the host's name, which can take seconds without network.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    with closing_on_error(sock):
        if os.name != "nt":  # there it would let two programs have the port
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), port))
        sock.listen(BACKLOG)
        sock.setblocking(False)
    return sock


def catch_signals(handler: Callable[[int], None]) -> None:
    """Give the signals that stop or reload us to *handler*.  Main thread only."""
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: handler(number))


def hold_signals(hold: bool) -> None:
    """Keep these signals pending, or let them come."""
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_BLOCK if hold else signal.SIG_UNBLOCK, SIGNALS)


def render_defect(error: Optional[BaseException]) -> str:
    """Return what the log says of an *error* that nobody expected: what it is, and the line of this file that it came
    from.  Not its text, in which anything may stand that passes here."""
    import traceback

    steps = traceback.walk_tb(error.__traceback__ if error else None)
    lines = [line for frame, line in steps if frame.f_code.co_filename == render_defect.__code__.co_filename]
    return f"internal error: {type(error).__name__} in line {lines[-1] if lines else 0} of version {__version__}"


def process_figures() -> Dict[str, float]:
    """Return Prometheus' figures of this process, as far as the system tells them (Linux tells all in /proc)."""
    figures = {"process_cpu_seconds_total": time.process_time()}
    with contextlib.suppress(OSError):
        figures["process_open_fds"] = len(os.listdir("/proc/self/fd"))
        with open("/proc/self/statm", encoding="ascii") as file:
            figures["process_resident_memory_bytes"] = int(file.read().split()[1]) * mmap.PAGESIZE
    return figures


class Server(http.server.ThreadingHTTPServer):
    """The listening socket, the loop, the clients, and a thread for each turn of a request that takes time."""

    def __init__(
        self,
        state: State,
        log: Log,
        reload_state: Callable[[], State],
        listener: socket.socket,
        shared: Shared,
        number: int,
        page: Tuple[List[Field], bytes],
    ) -> None:
        """*number* is the worker's; *page* the fields and the HTML of the status page."""
        self.state = state
        self.tally = shared.read(number)
        before = self.tally.counts
        self.fleet = Fleet((name, int(count)) for (name,), count in before["plexus_cooldowns_total"].items())
        self._cpu_s = before["process_cpu_seconds_total"].get((), 0.0)  # of the worker that this one replaces
        self.page = page
        self._shared = shared
        self._number = number
        self.loop = Loop()
        self.log = log
        self.started, self.workers = shared.started, shared.workers
        self._reload_state = reload_state
        self.bodies = Bodies(self.workers)
        self.parsers = threading.BoundedSemaphore(PARSERS)
        self.clients: Set[ClientConnection] = set()
        self._signals: Deque[int] = collections.deque()
        self._waiting: List[Tuple[Callable[[Any], None], Any]] = []  # for a quiet moment, in this order
        self._max_waiting = 1 if self.workers > 1 else MAX_WAITING  # a session's next turn may end in another process
        self._shown: Dict[Identity, Dict[str, Any]] = {}  # what pages show since
        self._shown_at = -math.inf  # this time of the loop
        self._drain_deadline = math.inf  # time of the loop, once it drains
        super().__init__(listener.getsockname()[:2], Handler, bind_and_activate=False)
        self.socket.close()  # the base class made one for itself
        self.socket = listener
        state.transport.loop = self.loop
        self.loop.on_quiet = self._make_waiting_calls
        self.loop.on_tick = self._tick
        self.loop.on_wake = self._handle_signals
        self.loop.on_error = self._end_broken

    def serve_forever(self, poll_interval: float = TICK_S) -> None:
        """Run until a signal has drained the server."""
        self.loop.watch(self.socket, READ, self._accept)
        try:
            self.loop.run()
        finally:
            for client in list(self.clients):
                client.cut()
            self._make_waiting_calls()
            self.state.credentials.close(CLOSE_S)
            self._pass_on_warnings()  # the last may be of tokens that end with this process
            self.server_close()
            self.state.transport.close()

    # -- what room 10 asks -----------------------------------------------

    def admit(self, exchange: Exchange) -> None:
        """Set its route and identity, or refuse it by its head."""
        if self.is_draining():
            raise shutting_down()
        admit(exchange)

    def start(self, exchange: Exchange, connection: ClientConnection) -> None:
        """Handle a small request at once, here in the loop, as long as nothing has to be waited for: the way to a
        thread and back costs more than the rest of it.  Any other gets a thread."""
        turn: Any = (exchange, connection)
        is_encoded = exchange.head.headers.get("content-encoding") is not None  # a further field may say more than ""
        if len(exchange.body) <= SMALL_TURN_BYTES and not is_encoded:
            self.loop.take_turn(self.process_request_thread, turn, connection.peer)
        else:
            self.give_to_thread(turn)

    def give_to_thread(self, turn: Any) -> None:
        try:
            # Of clients that have left, some may still run: a name that is not resolved, or an upstream that does not
            # answer the connection, holds them for long.
            if threading.active_count() > self.state.config.limits.max_connections + SPARE_THREADS:
                raise RuntimeError
            self.process_request(turn, turn[1].peer)
        except RuntimeError:  # can't start new thread
            exchange, connection = turn
            error = ProxyError("overloaded", "the system has no thread left for this request")
            self.loop.call(connection.take_back, exchange, connection.refuse, error)

    def digest_later(self, exchange: Exchange) -> None:
        """Its answer has begun: its body is no longer needed."""
        self._call_when_quiet(exchange.digest, self.fleet)

    def done(self, exchange: Exchange) -> None:
        """It has ended: its record is to be written."""
        self._call_when_quiet(self._observe, exchange)
        if self.is_draining():
            self.loop.call(self._stop_if_drained)

    def is_draining(self) -> bool:
        return self._drain_deadline < math.inf

    def _call_when_quiet(self, function: Callable[[Any], None], argument: Any) -> None:
        """Call *function* when no client waits for anything, or before too many such calls wait."""
        self._waiting.append((function, argument))
        self.loop.patience_s = QUIET_S
        if len(self._waiting) == self._max_waiting:
            self.loop.call(self._make_waiting_calls)

    def _make_waiting_calls(self) -> None:
        waiting, self._waiting = self._waiting, []
        self.loop.patience_s = TICK_S
        for function, argument in waiting:
            self.loop.guard(function, argument)

    def _observe(self, exchange: Exchange) -> None:
        if not exchange.is_gone:  # else a thread may be at it, or has done it
            exchange.digest(self.fleet)
        if exchange.usage:
            self._explain(exchange, exchange.usage)
        self.log.record(exchange.record)
        self.tally.add(exchange.record, time.time())
        for target in exchange.left:
            self.tally.count("plexus_failovers_total", (target.provider.name,))

    def _explain(self, exchange: Exchange, usage: UsageReader) -> None:
        """Record the tokens of *exchange*, and why it found too little in the cache, if it did."""
        record, session, target = exchange.record, exchange.session.value, exchange.target
        usage.finish()
        record.update(usage.tokens)
        if usage.error:
            exchange.fail(usage.error)
        if target is None or exchange.route.action == "stored" or record["status"] >= 400:  # it cached nothing
            return
        prefix = exchange.prefix and digests_of([hash(target.model)]) + exchange.prefix[DIGEST_BYTES:]  # as it was sent
        tokens = UNKNOWN_TOKENS if record["input_tokens"] is None else record["input_tokens"]
        turn = Turn(exchange.started, digests_of([hash(target.place)]), tokens, prefix)
        previous = None
        if session is not None:
            key = bytes.fromhex(text_digest(f"{record['key']} {session}"))[:16]
            previous = self._shared.sessions.replace(key, turn)
            if previous and tokens == UNKNOWN_TOKENS:  # it was cut: what the upstream knows is the turn before it
                self._shared.sessions.replace(key, previous)
        if tokens == UNKNOWN_TOKENS:
            return
        reason = miss_reason(record["cached_tokens"], turn, previous, session is not None)
        record["miss_reason"], record["prefix_changed_at"] = reason

    # -- what is counted -------------------------------------------------

    def _publish(self) -> None:
        """Put into the tally what is true now, too, and show it to the other workers."""
        tally = self.tally
        exchanges = (client.exchange for client in self.clients)
        busy = collections.Counter(one.target.place for one in exchanges if one and one.target)
        resting = self.fleet.resting(self.loop.now)
        tally.open = {}
        for provider in self.state.config.providers.values():
            for url in provider.urls():
                place = Target(provider, url, "").place
                rests = [rest_s for name, rest_s in resting.items() if name.startswith(place)]
                tally.open[provider.name, url] = (busy[place], math.ceil(max(rests, default=0)))
        tally.counts["plexus_cooldowns_total"] = {(name,): count for name, count in self.fleet.cooldowns().items()}
        tally.counts["plexus_in_flight"] = {(): sum(busy.values())}
        for name, value in process_figures().items():
            tally.counts[name] = {(): value}
        tally.count("process_cpu_seconds_total", (), self._cpu_s)
        self._shared.publish(self._number, tally)

    def _total(self) -> Tally:
        """Return the sum over all workers: of the others what they published last.

        What is shown is published first, so that what another worker shows next is never less.
        """
        self._make_waiting_calls()
        self._publish()
        others = (self._shared.read(number) for number in range(self.workers) if number != self._number)
        total = merge_tallies([self.tally, *others])
        for (provider, _), (_, rest_s) in total.open.items():
            total.count("plexus_targets_cooling", (provider,), rest_s > 0)
        total.counts["plexus_build_info"] = {(__version__, sys.version.split()[0]): 1}
        total.counts["process_start_time_seconds"] = {(): self.started}
        return total

    def answer_metrics(self, connection: ClientConnection) -> None:
        fields = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8"), *own_fields()[1:]]
        connection.respond(200, fields, render_metrics(self._total()))

    def attach_feed(self, connection: ClientConnection, exchange: Exchange) -> None:
        identity = exchange.identity

        def render() -> Dict[str, Any]:
            """Once a tick for all pages of a key: a hundred of them took half of the loop's time."""
            if self._shown_at != self.loop.now:
                self._shown_at, self._shown = self.loop.now, {}
            if identity not in self._shown:
                status = render_status(self._total(), identity, self.state.config, time.time())
                self._shown[identity] = {**status, "started": self.started, "workers": self.workers}
            return self._shown[identity]

        Feed(connection, exchange, render)

    # -- what ThreadingHTTPServer asks -----------------------------------

    def shutdown_request(self, request: Any) -> None:
        """The loop owns the socket: the end of a handler's turn is not the end of the connection."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        exchange, connection = request
        self.log.event("error", render_defect(sys.exc_info()[1]))
        answer = ProxyError("internal_error", "internal error; the proxy's log has more")
        self.loop.call(connection.take_back, exchange, connection.refuse, answer)

    def _end_broken(self, function: Callable[..., None], error: Exception) -> None:
        """A defect in the loop's thread: say so, and close the connection that it happened on."""
        owner = getattr(function, "__self__", None)
        self.log.event("error", render_defect(error))
        connection = getattr(owner, "connection", owner)  # an answer's, or it is one
        if isinstance(connection, ClientConnection):
            connection.close()

    def attach(
        self, connection: ClientConnection, exchange: Exchange, target: Target, upstream: UpstreamConnection
    ) -> None:
        """In the loop: relay the answer that will come on *upstream*, unless the client has left meanwhile."""
        reused = "true" if upstream.reused else "false"
        self.tally.count("plexus_upstream_connections_total", (target.provider.name, reused))
        if connection.exchange is exchange:
            Answer(connection, exchange, target, upstream)
        else:
            exchange.let_go()
            self.loop.close(upstream.sock)
            self.fleet.closed(target)

    # -- clients ---------------------------------------------------------

    def _accept(self, events: int) -> None:
        """Accept what is there, some at a time; or leave it to the workers that have fewer clients, for a moment.

        *events* is 0 after that moment: they did not take it, and it is not left to them again.
        """
        for _ in range(ACCEPTS):
            self._shared.clients[self._number] = len(self.clients)
            if events and min(self._shared.clients) < len(self.clients):
                self._pause_accepting(YIELD_S)
                return
            try:
                sock, address = self.socket.accept()
            except BLOCKED:
                return
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    self._pause_accepting(ACCEPT_PAUSE_S)
                    self.log.event("error", f"cannot accept: {error.strerror}; paused for {ACCEPT_PAUSE_S} s")
                return  # ECONNABORTED and the like: that client has left
            sock.setblocking(False)
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self.state.tls:
                try:
                    sock = self.state.tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
                except OSError:  # it has left already
                    sock.close()
                    continue
            self._welcome(sock, str(address[0]))

    def _pause_accepting(self, seconds: float) -> None:
        self.loop.watch(self.socket, 0)
        self.loop.call_after(seconds, self._accept_again)

    def _accept_again(self) -> None:
        if not self.is_draining():
            self.loop.watch(self.socket, READ, self._accept)
            self._accept(0)

    def _welcome(self, sock: socket.socket, peer: str) -> None:
        limit, shared = self.state.config.limits.max_connections, self._shared
        client = ClientConnection(self, sock, peer)
        # All workers together; but where they are many elsewhere, that costs no worker its own share.
        if sum(shared.clients) >= limit and shared.workers * len(self.clients) >= limit:
            # One whose last answer is out gives way, or the one idle longest, as in nginx: its client opens another.
            by_use = sorted(self.clients, key=lambda other: (other.phase != Phase.LINGERING, other.idle_since))
            idle = next((other for other in by_use if other.can_give_way()), None)
            if idle:
                idle.close()
            else:
                client.refuse(ProxyError("overloaded", f"all limits.max_connections ({limit}) are in use"))
                if len(self.clients) >= 2 * limit:  # of a flood, no more of them may linger
                    client.close()
        if client.phase != Phase.CLOSED:
            self.clients.add(client)

    def _tick(self, now: float) -> None:
        for client in list(self.clients):
            self.loop.guard(client.tick, now)
        self._shared.clients[self._number] = len(self.clients)  # some have left
        self._make_waiting_calls()  # on a busy day it is never quiet
        self.state.transport.expire(now)
        self._pass_on_warnings()
        if self.workers > 1:
            self._publish()
            if os.getppid() != self._shared.supervisor and not self.is_draining():
                self.drain()  # it has died, and nobody else would stop us
        self._stop_if_drained()

    def _pass_on_warnings(self) -> None:
        for warning in self.state.credentials.look_again():
            self.log.event("warning", warning)

    def _stop_if_drained(self) -> None:
        if self.is_draining() and (self.loop.now > self._drain_deadline or not any(c.is_busy for c in self.clients)):
            self.loop.stop()

    # -- signals ---------------------------------------------------------

    def catch_signals(self) -> None:
        """Let signals wake the loop, which handles them between two events.  Main thread only."""
        signal.set_wakeup_fd(self.loop.wakeup_fd, warn_on_full_buffer=False)
        catch_signals(self._signals.append)
        hold_signals(False)

    def _handle_signals(self) -> None:
        while self._signals:
            if self._signals.popleft() not in STOP_SIGNALS:
                self.reload()
            elif self.is_draining():
                self.loop.stop()
            else:
                self.drain()

    def reload(self) -> None:
        """Read the configuration again: valid, it is for new requests; invalid, the old one stays."""
        self.log.reopen()
        try:
            state = self._reload_state()
        except ConfigError as error:
            self._say_alone("error", f"configuration not reloaded: {error}")
            return
        self._pass_on_warnings()
        state.transport.loop = self.loop
        old, self.state = self.state, state
        old.transport.close()
        self._say_alone("warning", "configuration reloaded")

    def _say_alone(self, level: str, message: str) -> None:
        """Log what the supervisor says for all workers, where there is one."""
        if self.workers == 1:
            self.log.event(level, message)

    def drain(self) -> None:
        """Stop in phases: accept no more, end what is idle, let answers finish, stop the loop."""
        self._drain_deadline = self.loop.now + self.state.config.limits.drain_s
        known = -1
        while known < len(self.clients):  # to close the socket would reset who waits: an answer can be acted on
            known = len(self.clients)
            self._accept(0)
        self.loop.watch(self.socket, 0)
        self.socket.close()
        for client in list(self.clients):
            client.end_idle()
        self._stop_if_drained()


class Supervisor:
    """Several server processes on one listening socket: forked, replaced when they die, signalled as one.  POSIX."""

    def __init__(
        self,
        serve_one: Callable[[int, State], int],
        state: State,
        load: Callable[[], State],
        log: Callable[[str, str], None],
        listener: socket.socket,
        shared: Shared,
    ) -> None:
        """*serve_one* runs in a child, with its number and *state*, or what *load* returned since; it returns the exit
        code."""
        self._serve_one, self._state, self._load, self._log = serve_one, state, load, log
        self._listener, self._shared = listener, shared
        self._children: Dict[int, Tuple[int, float]] = {}  # pid -> worker number, started (monotonic)
        self._pauses: Dict[int, float] = {}  # worker number -> seconds before it is next replaced
        self._stopping = False

    def run(self, count: int) -> int:
        """Keep *count* workers running until a signal ends them."""
        if sys.platform == "win32":
            raise NotImplementedError
        catch_signals(self._pass_on)
        due = dict.fromkeys(range(count), 0.0)  # when those that do not run are started (monotonic)
        while self._children or (due and not self._stopping):
            for number in [number for number, at in due.items() if at <= time.monotonic()]:
                problem = self._spawn(number)
                del due[number]
                if problem:  # no process or memory left: the other workers go on
                    due[number] = self._back_off(number, f"worker {number} cannot be started: {problem}; again")
            pid, status = os.waitpid(-1, os.WNOHANG if due else 0) if self._children else (0, 0)
            if not pid:
                time.sleep(0.05)
                continue
            number, started = self._children.pop(pid)
            self._shared.clients[number] = 0
            if time.monotonic() - started >= RESPAWN_S[1]:
                self._pauses.pop(number, None)
            how = f"signal {status & 127}" if status & 127 else f"exit code {status >> 8}"  # as wait(2) packs them
            due[number] = self._back_off(number, f"worker {number} died with {how}; another starts")
        return EXIT_OK

    def _back_off(self, number: int, why: str) -> float:
        """Return when worker *number* is started (monotonic), later each time; the log says *why*, and in how long."""
        pause = self._pauses.get(number, RESPAWN_S[0])
        self._pauses[number] = min(2 * pause, RESPAWN_S[1])
        if not self._stopping:
            self._log("error", f"{why} in {pause:g} s")
        return time.monotonic() + pause

    def _spawn(self, number: int) -> Optional[str]:
        """Start worker *number*, unless all are to stop; return what is in the way, None for nothing."""
        if sys.platform == "win32":
            raise NotImplementedError
        hold_signals(True)  # one for the child waits until the child can take it; any before has been handled here
        try:
            pid = -1 if self._stopping else os.fork()
        except OSError as error:
            hold_signals(False)
            return error.strerror
        if not pid:
            code = EXIT_CHECK_FAILED
            try:
                # Ctrl-C is for the supervisor: passed on, it would come twice, and the second one cuts.
                os.setpgid(0, 0)
                code = self._serve_one(number, self._state)
            except Exception as error:
                self._log("error", f"worker {number}: {type(error).__name__}: {error}")
            finally:
                os._exit(code)  # the parent's clean-up is not ours
        if pid > 0:
            self._children[pid] = (number, time.monotonic())
        hold_signals(False)
        return None

    def _pass_on(self, number: int) -> None:
        if number in STOP_SIGNALS:
            self._stopping = True
            self._listener.close()  # as each worker closes its own: the last one open would keep the port
        else:  # what a worker that is replaced begins with; the others read the file themselves
            try:
                self._state = self._load()
                self._log("warning", "configuration reloaded")
            except ConfigError as error:
                self._log("error", f"configuration not reloaded: {error}")
        for pid in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


# ---------------------------------------------------------------------------
# 13  Demo -- DemoBackend: an upstream with several cache shards behind demo://, over a socket pair.  May be skipped.
# ---------------------------------------------------------------------------


class DemoBackend:
    """Behaves like a Responses backend of 16 machines that each keep the prefixes they have seen.

    A session header leads to the same machine each time, none leads to a random one.  Tokens are a quarter of the
    JSON's characters; unlike real backends it caches prefixes of any length, so that a short prompt shows it.
    """

    SHARDS: Final = 16

    def __init__(self) -> None:
        self._prefixes: Remembered[str] = Remembered(1000 * self.SHARDS)  # digests, of the shard too

    def connect(self) -> socket.socket:
        """Return a socket on which the demo upstream answers; a thread serves it until that socket is closed."""
        ours, theirs = socket.socketpair()
        threading.Thread(target=self._serve, args=(theirs,), name="demo", daemon=True).start()
        return ours

    def _serve(self, sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            DemoHandler(sock, ("demo", 0), self)  # type: ignore[arg-type]

    def read_prompt(self, session: Optional[str], request: Mapping[str, Any]) -> Tuple[int, int, int]:
        """Return the shard that *session* leads to, the input tokens, and how many the shard has cached of them; it
        caches the rest."""
        shard = int(text_digest(session or str(random.random())), 16) % self.SHARDS
        digest, total, cached, items = str(shard), 0, 0, request.get("input")
        begin = [request.get(name) for name in PREFIX_MEMBERS]
        for item in items if isinstance(items, list) and items else [items]:
            text, begin = json.dumps([*begin, item]), []
            total += len(text) // 4
            digest = text_digest(digest + text)
            if self._prefixes.get(digest, 0.0):
                cached = total
            self._prefixes.put(digest, "seen", 0.0)
        return shard, total, cached


class DemoHandler(http.server.BaseHTTPRequestHandler):
    server: DemoBackend  # type: ignore[assignment]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.path == "/models":  # "*": any; the echo is for `check`
            echo = {name.lower(): value for name, value in self.headers.items() if name.lower() not in CREDENTIALS}
            self._send({"object": "list", "data": [{"id": "*", "object": "model"}], "echo": echo})
        else:
            self._send({"error": {"message": "the demo keeps no responses", "type": "invalid_request_error"}}, 404)

    do_DELETE = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if not body:  # .../cancel
            return self.do_GET()
        raw = decode_content(body, self.headers.get("Content-Encoding", ""), 1024 * MIB, load_zstd)
        if raw is None:
            return self._send({"error": {"message": "unknown encoding", "type": "invalid_request_error"}}, 415)
        request, path = json.loads(raw), self.path.partition("?")[0]
        session = self.headers.get("session_id") or self.headers.get("session-id")
        shard, total, cached = self.server.read_prompt(session, request)
        if path.endswith("/input_tokens"):
            return self._send({"object": "response.input_tokens", "input_tokens": total})
        names = ("session_id", "session-id", "x-client-request-id")
        seen = ", ".join(f"{name}: {self.headers.get(name) or '(none)'}" for name in names)
        text = f"Hello from shard {shard}. I saw {seen}. {cached} of {total} input tokens were cached."
        words, token = len(text.split()), secrets.token_hex(16)
        part = {"type": "output_text", "text": text, "annotations": []}
        item = {"id": "msg_" + token, "type": "message", "role": "assistant", "content": [part], "status": "completed"}
        usage = {"input_tokens": total, "input_tokens_details": {"cached_tokens": cached}, "output_tokens": words}
        usage.update(output_tokens_details={"reasoning_tokens": 0}, total_tokens=total + words)
        response = {"id": "resp_" + token, "object": "response", "created_at": int(time.time()), "status": "completed"}
        response.update(model=request.get("model"), output=[item], usage=usage)
        return self._send(self._events_of(response, item, part) if request.get("stream") else response)

    def _events_of(self, response: Dict[str, Any], item: Dict[str, Any], part: Dict[str, Any]) -> Iterator[bytes]:
        """Yield the event sequence of the real API, a word at a time."""
        begun = {"response": {**response, "status": "in_progress", "output": [], "usage": None}}
        at = {"output_index": 0}
        where = {**at, "item_id": item["id"], "content_index": 0}
        events: List[Tuple[str, Dict[str, Any]]] = [
            ("created", begun),
            ("in_progress", begun),
            ("output_item.added", {**at, "item": {**item, "status": "in_progress", "content": []}}),
            ("content_part.added", {**where, "part": {**part, "text": ""}}),
            *(("output_text.delta", {**where, "delta": word}) for word in re.findall(r"\S+\s*", part["text"])),
            ("output_text.done", {**where, "text": part["text"]}),
            ("content_part.done", {**where, "part": part}),
            ("output_item.done", {**at, "item": item}),
            ("completed", {"response": response}),
        ]
        for number, (name, data) in enumerate(events):
            payload = json.dumps({"type": f"response.{name}", "sequence_number": number, **data})
            yield f"event: response.{name}\ndata: {payload}\n\n".encode()
            if "delta" in data:
                time.sleep(0.01)  # so that a person sees it stream

    def _send(self, answer: Any, status: int = 200) -> None:
        """Send *answer*, a JSON object or an iterator of events."""
        is_object = isinstance(answer, dict)
        self.send_response(status)
        self.send_header("Content-Type", "application/json" if is_object else "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in [render_json(answer)] if is_object else answer:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(part), part))
        self.wfile.write(b"0\r\n\r\n")


# ---------------------------------------------------------------------------
# 14  Page -- PAGE, page_headers: the status page, one string, and its policy.  It shows what GET /status streams; all
#     of that enters as text nodes and attributes, never as markup.  May be skipped.
# ---------------------------------------------------------------------------

PAGE: Final = r"""<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>plexus_lite: is the cache warm?</title>
<link rel="icon" href="data:,">
<style>
:root { color-scheme: light dark; --ground: #f5f5f2; --paper: #fff; --ink: #1c2024; --mute: #59616a; --line: #dfe1dc;
  --good: #0b7269; --half: #b35c00; --miss: #b3261e; --none: #6c737b; }
@media (prefers-color-scheme: dark) { :root { --ground: #121517; --paper: #1a1e21; --ink: #e8eaec; --mute: #a3abb3;
  --line: #30363b; --good: #4bbfae; --half: #e3a04a; --miss: #ff8d83; --none: #8c949c; } }
* { box-sizing: border-box; margin: 0; }
[hidden] { display: none !important; }
body { max-width: 76rem; margin: auto; padding: 1rem clamp(.75rem, 2.5vw, 2rem) 2rem; overflow-wrap: anywhere;
  font: .9375rem/1.4 system-ui, sans-serif; color: var(--ink); background: var(--ground); }
header, form { display: flex; flex-wrap: wrap; align-items: center; gap: .5rem 1rem; min-height: 2.5rem; }
h1 { font-size: 1.25rem; } h2 { font-size: 1rem; margin-bottom: .5rem; } small { display: block; }
small, thead th, .note, #state { font-size: .8125rem; font-weight: normal; color: var(--mute); }
code { font: .8125rem/1.4 ui-monospace, "DejaVu Sans Mono", monospace; }
#state { flex: 1; } form { margin-top: .5rem; } form p { flex: 1 12rem; }
button, input { font: inherit; color: inherit; background: var(--paper); padding: .25rem 1rem; min-height: 2.25rem;
  border: 1px solid var(--none); border-radius: .375rem; }
button { min-width: 6.5rem; } summary { width: fit-content; cursor: pointer; }
:focus-visible { outline: 2px solid var(--good); outline-offset: 2px; }
main { display: grid; gap: 1rem; margin: 1rem 0; }
main > *, form { position: relative; min-width: 0; padding: 1rem; background: var(--paper);
  border: 1px solid var(--line); border-radius: .5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; }
.value { font-size: 1.75rem; line-height: 1.25; font-weight: 600; }
.plot { display: grid; grid-template-columns: 2.75rem minmax(0, 1fr); gap: .5rem; margin-top: .75rem; }
.plot p { display: flex; justify-content: space-between; font-size: .75rem; line-height: 1; color: var(--mute); }
.scale { flex-direction: column; text-align: right; margin: -.375rem 0; }
.hours { grid-column: 2; } .hours span { flex: 1; }
.plot svg { width: 100%; height: 7rem; border-bottom: 1px solid var(--line); }
.good { color: var(--good); } .half { color: var(--half); } .miss { color: var(--miss); } .none { color: var(--none); }
rect { fill: currentColor; } rect.pale { opacity: .22; }
table { width: 100%; border-collapse: collapse; }
th, td { padding: .375rem .875rem .375rem 0; text-align: left; vertical-align: top; font-weight: normal;
  border-top: 1px solid var(--line); }
thead th { border: 0; padding-top: 0; white-space: nowrap; }
tbody th { min-width: 11.25rem; } th:last-child, td:last-child { padding-right: 0; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.more { position: absolute; top: 1rem; right: 1rem; }
.more:not([open]) + table tbody tr:nth-child(n + 9) { display: none; }
.turns summary { list-style: none; } .turns svg { display: block; width: 7rem; height: 1.375rem; }
ol { padding: .5rem 0 0; list-style: none; font-size: .8125rem; }
@media (min-width: 64rem) { main { grid-template-columns: 1fr 1fr; align-items: start; }
  .wide, section:last-child { grid-column: 1 / -1; } }
@media (max-width: 36rem) { /* each row of a table becomes a card */
  .tiles { grid-template-columns: 1fr 1fr; }
  thead { position: absolute; clip-path: inset(50%); }
  table, tbody { display: block; }
  tr { display: grid; grid-template-columns: repeat(3, 1fr); gap: .375rem; padding: .625rem 0;
    border-top: 1px solid var(--line); }
  th, td, .num { border: 0; padding: 0; text-align: left; white-space: normal; }
  tbody th, .long { grid-column: 1 / -1; }
  td::before { content: attr(data-label); display: block; font-size: .75rem; color: var(--mute); }
}
</style>
<header><h1>plexus_lite</h1><p id="state" role="status"></p><button id="pause" type="button">Pause</button></header>
<form id="ask" hidden>
  <label for="key">Key</label>
  <input id="key" type="password" autocomplete="off" required pattern="[ -~]+" title="ASCII characters">
  <button>Show</button>
  <p id="why" class="note"></p>
</form>
<main id="view"></main>
<footer id="about" class="note"></footer>
<noscript>This page needs JavaScript. GET /metrics has the same figures.</noscript>
<script>
"use strict";
const REASONS = {__proto__: null,
  first_request: "the first request of its session: nothing of it could be cached",
  no_session_value: "no session header and no prompt_cache_key: nothing says which machine holds the prefix",
  below_minimum: "under 1,024 tokens: too short to be cached",
  moved: "it went to another target than the turn before it",
  idle: "over 5 minutes after the turn before it: the cache may have been dropped",
  prefix_changed: "the first thing that changed: all from there on must be read again",
  unknown: "same prefix, same target, no long pause: the reason lies with the upstream",
};
const byId = id => document.getElementById(id), view = byId("view"), form = byId("ask"), pause = byId("pause");
let key = "", paused = false, stream = null, timer = 0, attempt = 0, retry_s = 5, latest = null;

const days = new Intl.DateTimeFormat("en-GB", {day: "numeric", month: "short"});
const times = new Intl.DateTimeFormat("en-GB", {timeStyle: "medium"});
const compact = new Intl.NumberFormat("en", {notation: "compact", maximumSignificantDigits: 3});
const count = number => number == null ? "\u2013" : compact.format(number);
const of = (cached, input) => `${count(cached)} of ${count(input)}`;
const share = (cached, input) => input && cached != null ? cached / input : null;
const percent = part => part == null ? "\u2013" : (100 * part).toFixed(1) + "\u00a0%";
const grade = part => part == null ? "none" : part >= .8 ? "good" : part >= .5 ? "half" : "miss";
const sum = (rows, column) => rows.reduce((total, row) => total + row[column], 0);
const rate = rows => share(sum(rows, 2), sum(rows, 1)); // rows: [time, input tokens, cached tokens, ...]

function clock(at, length = 8) {
  const time = times.format(1000 * at).slice(0, length);
  return latest.now - at < 20 * 3600 ? time : `${days.format(1000 * at)}, ${time}`;
}

function el(tag, attributes, ...children) {
  const drawn = ["svg", "g", "rect", "title"].includes(tag);
  const node = document.createElementNS(`http://www.w3.org/${drawn ? "2000/svg" : "1999/xhtml"}`, tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  const plain = child => child.replace?.(/\p{Bidi_C}/gu, "\ufffd") ?? child; // no name turns its neighbours round
  node.append(...children.flat(3).filter(child => child != null && child !== false).map(plain)); // strings become text
  return node;
}

// Make *old* like *fresh* and keep every node that can stay: focus, selection and what is unfolded live in the nodes.
function patch(old, fresh) {
  for (const {name} of [...old.attributes]) if (!fresh.hasAttribute(name) && name !== "open") old.removeAttribute(name);
  for (const {name, value} of fresh.attributes) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  const rows = new Map([...old.children].map(child => [child.dataset.row, child])), wanted = [...fresh.childNodes];
  wanted.forEach((child, place) => {
    const here = old.childNodes[place] || null, row = child.dataset?.row, mine = row ? rows.get(row) : here;
    rows.delete(row);
    if (mine?.nodeName !== child.nodeName) return old.insertBefore(child, here);
    if (mine !== here) old.insertBefore(mine, here);
    if (child.nodeType === Node.ELEMENT_NODE) patch(mine, child);
    else if (mine.data !== child.data) mine.data = child.data;
  });
  while (old.childNodes.length > wanted.length) old.lastChild.remove();
}

// columns: [heading, row => what its cell shows, class]; the first cell heads its row.  CSS folds away a long rest.
function table(title, empty, rows, name, columns) {
  const cell = row => ([label, show, kind], place) => place
    ? el("td", {role: "cell", class: kind, "data-label": label}, show(row))
    : el("th", {role: "rowheader", scope: "row"}, show(row));
  const head = ([label, , kind]) => el("th", {role: "columnheader", scope: "col", class: kind}, label);
  return el("section", {"aria-label": title}, el("h2", {}, title), !rows.length && el("p", {class: "note"}, empty),
    rows.length > 8 && el("details", {class: "more note"}, el("summary", {}, `all ${rows.length}`)),
    rows.length > 0 && el("table", {role: "table"},
      el("thead", {role: "rowgroup"}, el("tr", {role: "row"}, columns.map(head))),
      el("tbody", {role: "rowgroup"}, rows.map(row =>
        el("tr", {role: "row", "data-row": name(row)}, columns.map(cell(row)))))));
}

// A chart with room for *count* columns, [place, text, kind, share from the cache] each, stretched to any size.
function chart(count, attributes, columns) {
  const rect = (kind, place, height) => el("rect", {class: kind, x: 8 * place, width: 6, y: 100 - height, height});
  return el("svg", {viewBox: `0 0 ${8 * count} 100`, preserveAspectRatio: "none", ...attributes},
    columns.map(([place, text, kind, part]) => el("g", {}, el("title", {}, text),
      rect(kind + " pale", place, 100), rect(kind, place, Math.max(8, 100 * part)))));
}

function turns(session) {
  if (!session.turns.length) return "no usage known";
  const columns = session.turns.map(([at, input, cached, reason], place) => {
    const part = share(cached, input), kind = reason === "first_request" ? "none" : grade(part);
    return [place, `${clock(at)}: ${percent(part)}, ${of(cached, input)}` + (reason ? ", " + reason : ""), kind, part];
  });
  const told = columns.map(([, text]) => text);
  return el("details", {class: "turns"},
    el("summary", {"aria-label": `turns: ${told.length}, the last at ${told.slice(-1)}`},
      chart(20, {"aria-hidden": true}, columns)),
    el("ol", {}, told.map(text => el("li", {}, text))));
}

function plot(minutes, first) {
  const columns = minutes.map(([at, input, cached, requests]) => {
    const part = share(cached, input);
    const text = `${clock(at, 5)}: ${percent(part)}, ${of(cached, input)} tokens, requests: ${requests}`;
    return [(at - first) / 60, text, grade(part), part];
  });
  const [worst] = [...minutes].sort((one, other) => rate([one]) - rate([other]));
  const text = worst ? `${percent(rate(minutes))} of ${count(sum(minutes, 1))} input tokens came from the cache; the `
    + `worst minute was ${clock(worst[0], 5)} with ${percent(rate([worst]))}.` : "No tokens in this hour.";
  const axis = (kind, ...marks) => el("p", {class: kind}, marks.map(mark => el("span", {}, mark)));
  return el("figure", {class: "wide"}, el("h2", {}, "The last hour"), el("figcaption", {class: "note"}, text),
    el("div", {class: "plot"}, axis("scale", "100 %", "50 %", "0 %"),
      chart(60, {role: "img", "aria-label": "Hit rate by the minute: " + text}, columns),
      axis("hours", ...[0, 15, 30, 45].map(minute => clock(first + 60 * minute, 5)))));
}

function tiles(d, recent) {
  const total = d.totals, part = rate(recent);
  const tile = (name, value, note, kind = "") => el("div", {}, el("dt", {}, name),
    el("dd", {class: "value " + kind}, value), el("dd", {class: "note"}, note));
  return el("dl", {class: "wide tiles"},
    tile("Hit rate now", percent(part), part == null ? "no tokens in 5 minutes" : "of the last 5 minutes", grade(part)),
    tile("Tokens saved", count(total.cached_tokens), `of ${count(total.input_tokens)} since ${clock(d.started, 5)}`),
    d.saved != null && tile("Money saved", d.saved.toFixed(2), d.spent.toFixed(2) + " spent, at the configured prices"),
    tile("In flight", count(d.in_flight), "at this moment"),
    tile("Requests", count(total.requests), count(total.output_tokens) + " tokens of output"),
    tile("Errors", count(total.errors), "since the start"));
}

function tables(d) {
  const number = (label, name) => [label, row => count(row[name]), "num"];
  const hit = ["Hit rate", row => percent(share(row.cached_tokens, row.input_tokens)), "num"];
  const named = (text, ...small) => [el("code", {}, text), el("small", {}, small.filter(Boolean).join(", "))];
  const changed = at => typeof at === "number" ? "input item " + at : at;
  const whose = row => [row.model, row.provider, d.all_sessions && row.key];
  const state = row => row.cooling_s ? el("span", {class: "miss"}, `cooling, ${row.cooling_s} s`) : "healthy";
  return [
    table("Models", "No model has been asked yet.", d.models, row => row.model, [["Model", row => row.model || "none"],
      hit, number("Saved", "cached_tokens"), number("Output", "output_tokens"), number("Requests", "requests"),
      number("Errors", "errors")]),
    table("Targets", "No upstream has been asked yet.", d.targets, row => row.provider + " " + row.target, [
      ["Target", row => [row.provider, el("small", {}, row.target)]], ["State", state], hit,
      number("Open", "open"), number("Requests", "requests"), number("Errors", "errors")]),
    table("Latest sessions", "No session yet: one begins with a request that has a session header or prompt_cache_key.",
      d.sessions, row => row.session + " " + row.key, [["Session", row => named(row.session, ...whose(row))],
        ["Turns", turns, "long"], ["Hit rate", row => percent(rate(row.turns)), "num"], number("Requests", "requests"),
        ["When", row => clock(row.last), "num"]]),
    table("Latest misses", "No miss so far.", d.misses, row => row.ts + " " + row.session, [
      ["Turn", row => named(row.session || "no session", clock(row.ts), ...whose(row))],
      ["Why", row => named(row.miss_reason, changed(row.prefix_changed_at), REASONS[row.miss_reason]), "long"],
      ["Cached", row => of(row.cached_tokens, row.input_tokens), "num long"]]),
    table("Latest errors", "No error so far.", d.errors, row => row.id, [
      ["Error", row => named(`${row.status} ${row.error || ""}`, ...whose(row))],
      ["Request", row => named(row.id, row.route, row.target), "long"], ["When", row => clock(row.ts), "num"]]),
  ];
}

function draw() {
  const d = latest, first = 60 * Math.floor(d.now / 60) - 59 * 60;
  const hour = d.minutes.filter(minute => minute[0] >= first && minute[2])
    .map(([at, requests, input, cached]) => [at, input, cached, requests]);
  const focused = document.activeElement;
  patch(view, el("main", {id: "view"},
    !d.totals.requests && el("p", {class: "wide"}, "No request yet: point a client at ",
      el("code", {}, new URL("v1", location).href),
      " and ask it something twice. What it repeats should come from the cache, and this page will show it."),
    tiles(d, hour.filter(([at]) => at > d.now - 300)), plot(hour, first), tables(d)));
  byId("about").textContent = `plexus_lite ${d.version}, workers: ${d.workers}`
    + (d.key ? `, seen by key ${d.key}` : "") + (d.all_sessions ? "" : ": only its own sessions, misses and errors");
  if (focused !== document.activeElement && focused.isConnected) focused.focus({preventScroll: true}); // it was moved
}

function stop(text) {
  attempt += 1;
  clearTimeout(timer);
  stream?.close();
  byId("state").textContent = text;
}

function lost(reason) {
  stop(`connection lost (${reason}), next try in ${retry_s} s`);
  timer = setTimeout(start, 1000 * retry_s);
}

function ask() {
  stop("a key is needed");
  byId("why").textContent = key ? "This key is not known here." : "It stays in this page's memory and ends with it.";
  key = "";
  form.hidden = !(view.hidden = pause.hidden = true);
  byId("key").focus();
}

async function start() { // a ticket for the key, then a stream for the ticket
  stop("connecting");
  const mine = attempt;
  try {
    const answer = await fetch("status", {method: "POST", headers: key ? {Authorization: "Bearer " + key} : {}});
    const said = await answer.json();
    if (mine !== attempt) return; // stopped meanwhile
    if (answer.status === 401) return ask();
    if (!answer.ok) throw new Error(said.error.message);
    stream = new EventSource("status?ticket=" + encodeURIComponent(said.ticket));
    stream.onerror = () => lost("the stream ended");
    stream.addEventListener("status", show);
  } catch (error) {
    if (mine === attempt) lost(error.message);
  }
}

function show(event) {
  latest = JSON.parse(event.data);
  view.hidden = pause.hidden = false;
  if (byId("state").textContent !== "live") byId("state").textContent = "live"; // a screen reader says it once
  draw();
}

form.addEventListener("submit", event => {
  event.preventDefault();
  key = byId("key").value;
  form.reset();
  form.hidden = true;
  start();
});
pause.addEventListener("click", () => {
  paused = !paused;
  pause.textContent = paused ? "Resume" : "Pause";
  watch();
});
function watch() { // a hidden tab costs nothing
  if (form.hidden) paused || document.hidden ? stop("paused") : start();
}
document.addEventListener("visibilitychange", watch);
watch();
</script>
"""


def page_headers(page: str) -> List[Field]:
    """Return the fields that go out with *page*: its own style and script may run, and nothing else.

    The two are named by their hashes, so that markup which found its way into the page would not run all the same;
    require-trusted-types-for lets the browser refuse innerHTML and its kin to the script.
    """
    sources = []
    for tag in ("script", "style"):
        inline = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        sources.append(f"{tag}-src 'sha256-{digest}'")
    policy = ["default-src 'none'", *sources, "connect-src 'self'", "img-src data:", "base-uri 'none'"]
    policy += ["form-action 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'"]
    return [
        ("Content-Type", "text/html; charset=utf-8"),
        ("Content-Security-Policy", "; ".join(policy)),
        ("X-Content-Type-Options", "nosniff"),
        ("Referrer-Policy", "no-referrer"),
        ("Cache-Control", "no-store"),
    ]


# ---------------------------------------------------------------------------
# 15  Report -- Report, read_logs: what access logs say of the cache, for `report`.  May be skipped.
# ---------------------------------------------------------------------------

GROUPS: Final = ("model", "provider", "target", "key")
NAMED: Final = ("misses", "prefix_changed_at", "errors", "used")  # by name, in each row
SHOWN_ROWS: Final = 20  # of a table
WORST_SESSIONS: Final = 10
MAX_NAMES: Final = 10_000  # at one place: clients can make names up, and further ones are counted together
LOG_LINE_BYTES: Final = 64 * KIB  # records have 700; what is longer is read as several lines
CLASS_WIDTH: Final = math.log(1.04)  # TTFBs are counted in classes 4 % wide: a percentile is right within 2 %
PROGRESS_LINES: Final = 50_000
INEVITABLE: Final = (None, "first_request", "below_minimum")  # no miss, or none that a cache could have prevented
LINE: Final = "%-*s%10s%7s%7s%7s%7s%10s%7s%7s%7s  %s"  # of a table; the last is a bar
TITLES: Final = ("requests", "hit", "input", "cached", "missed", "TTFB p50", "p90", "p99", "errors", "")


def percentile(classes: Counts, percent: int) -> Optional[float]:
    """Return the nearest-rank percentile of the TTFB in milliseconds, None of nothing."""
    rank = sum(classes.values()) * percent / 100
    for place in sorted(classes):
        rank -= classes[place]
        if rank <= 0:
            return round(math.exp((place + 0.5) * CLASS_WIDTH), 3)
    return None


def figures_of(name: Optional[str], row: Counts) -> Counts:
    """Return the figures of a row, null where nothing is known; what is counted by name, the most frequent first."""
    figures = {"name": name, "requests": row["requests"], "requests_with_usage": row.get("requests_with_usage", 0)}
    figures["hit_rate"] = round(row["hit"] / row["known"], 4) if row.get("known") else None
    figures.update((figure, row.get(figure)) for figure in (*USAGE_NAMES, "missed_tokens"))
    figures["ttfb_ms"] = {f"p{percent}": percentile(row.get("ttfb", {}), percent) for percent in (50, 90, 99)}
    for kind in NAMED:
        figures[kind] = dict(sorted(row.get(kind, {}).items(), key=lambda item: -item[1]))
    return figures


def short(value: Optional[float], units: Sequence[str] = ("", "k", "M", "G")) -> str:
    """Return *value* in the largest of *units* that it fills, each 1000 of the one before; "-" if it is not known."""
    if value is None:
        return "-"
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.{int(value < 99.5 and value % 1 > 0)}f}{units[0]}"


class Report:
    """Counts of access log records, in bounded memory however many there are.  No I/O."""

    def __init__(self) -> None:
        self._first = self._last = ""
        self._places: Counts = {}  # rows by all of GROUPS: one to count in, not four
        self._sessions: Counts = {}

    def add(self, record: Any) -> bool:
        """Return False if *record* is no access log record: the log has events as well, and files have anything."""
        items = record.items() if isinstance(record, dict) and "level" not in record else ()
        names = {name: value[:100] for name, value in items if isinstance(value, str) and value}
        numbers = {name: value for name, value in items if isinstance(value, (int, float)) and 0 <= value < 1e12}
        if "ts" not in names or "status" not in numbers:
            return False
        reason, error = names.get("miss_reason"), names.get("error")
        if numbers.get("attempts") == 0 and not error:  # a probe of /health each second would hide the rest
            return True
        if numbers["status"] >= 400:
            error = error or str(numbers["status"])
        self._first, self._last = min(self._first or names["ts"], names["ts"]), max(self._last, names["ts"])
        row: Counts = {"requests": 1, **{name: numbers[name] for name in USAGE_NAMES if name in numbers}}
        if "input_tokens" in numbers and "cached_tokens" in numbers:
            used, cached = numbers["input_tokens"], numbers["cached_tokens"]
            missed = 0 if reason in INEVITABLE else max(used - cached, 0)
            row.update(requests_with_usage=1, known=used, hit=cached, missed_tokens=missed)
        changed = reason == "prefix_changed" and names.get("prefix_changed_at", "input")
        row.update((kind, {name: 1}) for kind, name in zip(NAMED, (reason, changed, error)) if name)
        if "ttfb_ms" in numbers and not error:
            row["ttfb"] = {math.log(max(numbers["ttfb_ms"], 0.01)) // CLASS_WIDTH: 1}
        place = tuple(map(names.get, GROUPS))
        add_up(self._places, {place: row}, MAX_NAMES)
        if "session" in names:
            row["used"] = {" ".join(filter(None, place)): 1}
            add_up(self._sessions, {names["session"]: row}, MAX_NAMES)
        if len(self._sessions) == MAX_NAMES:  # none of those that missed least will be among the worst
            least = sorted(self._sessions, key=lambda name: self._sessions[name].get("missed_tokens", 0))
            for name in least[: MAX_NAMES // 2]:
                add_up(self._sessions, {OTHER: self._sessions.pop(name)}, MAX_NAMES)
        return True

    def as_json(self) -> Dict[str, Any]:
        """Return all that render shows, and the rows that it leaves out."""
        tables: Counts = {"total": {"all": {"requests": 0}}, "session": self._sessions}
        tables.update((kind, {}) for kind in GROUPS)
        for place, row in self._places.items():
            names = [OTHER] * len(GROUPS) if place == OTHER else place
            counts = {"total": {"all": row}, **{kind: {name: row} for kind, name in zip(GROUPS, names)}}
            add_up(tables, counts, MAX_NAMES)
        found: Counts = {"from": self._first or None, "to": self._last or None}
        for kind, table in tables.items():  # the most missed tokens first, then the most requests
            rows = map(figures_of, table, table.values())
            found[kind] = sorted(rows, key=lambda row: (-(row["missed_tokens"] or 0), -row["requests"]))
        sessions = found.pop("session")
        worst = [row for row in sessions[:WORST_SESSIONS] if row["missed_tokens"]]
        found.update(total=found["total"][0], sessions=len(sessions))
        return {**found, "worst_sessions": worst}

    def render(self, width: int, bars: bool) -> str:
        """Return the tables for a terminal of *width* columns; with *bars* it can show block characters."""
        import textwrap

        found, width = self.as_json(), min(max(width, 40), 120)
        total, bars = found["total"], bars and width >= 90
        space = max(width - 70 - 10 * bars, 11)  # for names
        if not total["requests"]:
            return "no records"
        over = "over " if OTHER in self._sessions else ""
        counted = f"{total['requests']:,} requests in {over}{found['sessions']:,} sessions, "
        counted += f"{self._first[:19]} to {self._last[:19]} UTC"
        legend = f"hit: cached of input tokens, in the {total['requests_with_usage']:,} requests whose usage is known; "
        legend += "missed: tokens sent uncached though a hit was possible; TTFB: of answers without error, within 2 %"
        lines = [counted, legend]
        for table in ("total", *GROUPS, "worst_sessions"):
            rows = [total] if table == "total" else found[table]
            if not any(row["name"] for row in rows):  # without keys, say, a table would repeat the total
                continue
            lines += ["", LINE % (space, table.replace("_", " "), *TITLES)]
            for row in rows[:SHOWN_ROWS]:
                hit = row["hit_rate"]
                cells = [f"{row['requests']:,}", "-" if hit is None else f"{hit:.1%}"]
                cells += [short(row[name]) for name in ("input_tokens", "cached_tokens", "missed_tokens")]
                cells += [short(time, ("ms", "s")) for time in row["ttfb_ms"].values()]
                cells += [short(sum(row["errors"].values())), "\u2588" * round(8 * (hit or 0) * bars)]
                lines.append(LINE % (space, one_line(row["name"] or "(none)")[-space:], *cells))
                for kind in filter(row.get, NAMED):
                    lines.append(f"  {kind}: " + ", ".join(f"{name} {count:,}" for name, count in row[kind].items()))
            if len(rows) > SHOWN_ROWS:
                lines.append(f"and {len(rows) - SHOWN_ROWS:,} more")
        wrap = textwrap.TextWrapper(width, subsequent_indent="    ", max_lines=4).wrap
        return "\n".join(part for line in lines for part in wrap(one_line(line)) or [""])


def read_logs(paths: Sequence[str], report: Report, is_shown: bool) -> str:
    """Add the records in *paths* ("-" is stdin) to *report*; return a remark on the lines that are none, or "".

    ConfigError names a file that cannot be read.  With *is_shown* stderr says how much of a large file is read.
    """
    import gzip

    strays, first = 0, ""
    for path in paths:
        try:
            with open(0 if path == "-" else path, "rb", closefd=path != "-") as raw:
                file: Any = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
                size = is_shown and os.fstat(raw.fileno()).st_size  # 0 is a pipe
                for number, line in enumerate(iter(functools.partial(file.readline, LOG_LINE_BYTES), b""), 1):
                    try:
                        is_record = report.add(json.loads(line))
                    except (ValueError, RecursionError):
                        is_record = False
                    if not is_record:
                        strays, first = strays + 1, first or f"{path}:{number}"
                    if size and number % PROGRESS_LINES == 0:
                        print(end=f"\r{path}: {raw.tell() / size:.0%} ", file=sys.stderr, flush=True)
                if size:
                    print(end="\r" + " " * (len(path) + 9) + "\r", file=sys.stderr)
        except (OSError, EOFError, zlib.error) as error:
            raise ConfigError(path, f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return f"lines that are no records: {strays:,} (first: {first})" if strays else ""


# ---------------------------------------------------------------------------
# 16  Check -- judge_answer, judge_headers, judge_way, notes_on, examine, check_upstreams, render_checkups: the doctor,
#     for `check`.  May be skipped.
# ---------------------------------------------------------------------------

CHECK_S: Final = 10.0  # for all upstreams together, however many hang
EXPIRES_SOON_DAYS: Final = 21
CLOCK_SKEW_S: Final = 60
VERDICTS: Final = {"note": "", "ok": "ok", "warn": "with a warning", "FAIL": "failed"}  # of an upstream; the worst last
# Status, with a web page or not, and how we would show ourselves if no credential was sent; verdict and what it means.
# {}: the provider's place in the file, and its credential.
STATUSES: Final = (
    ("2.. page", "FAIL", "a web page, no API; check {}.api_base_url"),
    ("2..", "warn", "no list of models; is this the API? check {}.api_base_url"),
    ("3..", "FAIL", "a redirect, and none is followed; check {}.api_base_url"),
    ("400 page", "FAIL", "a web page refuses; does it want https, or a client certificate? check {}"),  # nginx says so
    ("400", "warn", "malformed to it; does it want https, or one spelling only (session_headers)? check {}"),
    ("40[13] .*key", "FAIL", "it wants a key; set {}.api_key"),
    ("40[13] .*(oauth|passthrough)", "ok", "reached; it wants a credential, and none is here"),
    ("40[13] page", "FAIL", "a web page refuses: a login or firewall before the API? check {}.api_base_url"),
    ("40[13]", "FAIL", "the key is refused; check {}.{}"),
    ("404", "warn", "no list of models; if requests fail as well, check {}.api_base_url"),
    ("429", "warn", "reached, but it limits us now"),
    ("5(?!01)..", "FAIL", "it fails, or what stands before it does"),
    ("", "ok", "reached; it lists no models"),
)
# Variables of the environment, and what they are to us.  The first row is for those without "proxy": "env".
VARIABLES: Final = (
    ("(https?|no)_proxy", 'not used: no provider has "proxy": "env"'),
    ("all_proxy", 'not used; with "proxy": "env" HTTPS_PROXY and HTTP_PROXY are'),
    ("ssl_cert_(file|dir)", "taken in place of the system's roots"),
    ("(requests|curl)_ca_bundle|node_extra_ca_certs", "not used; a provider's ca_file adds roots"),
)
Finding = Dict[str, Any]  # a row of the table: phase, verdict, text; for --json its figures, too
Judgement = Tuple[str, str]  # verdict, text


def finding(phase: str, verdict: str, text: str, **figures: float) -> Finding:
    """Return what was found out in one *phase* of the way."""
    return {"phase": phase, "verdict": verdict, "text": text, **figures}


def judge_answer(
    provider: Provider, answer: AnswerHead, body: Mapping[str, Any], models: Iterable[str], has_key: bool
) -> Judgement:
    """Judge the answer to GET /models, with the JSON in its *body*; *models* are those that we would ask for."""
    # OpenAI has them in "data", each with an "id", the Codex backend in "models", each with a "slug".
    listed = body.get("data", body.get("models"))
    if answer.status < 300 and isinstance(listed, list):
        names = {str(one.get("id") or one.get("slug")) for one in listed if isinstance(one, dict)}
        missing = [] if "*" in names else sorted(set(models) - names)
        text = f"models listed: {len(names)}, {'not ' + ', '.join(missing) if missing else 'ours among them'}"
        return "warn" if missing else "ok", text
    page = "page" if "html" in (answer.headers.get("content-type") or "").lower() else ""
    case = f"{answer.status} {page} {'' if has_key else provider.auth}"
    verdict, text = next(row[1:] for row in STATUSES if re.match(row[0], case))
    credential = "auth_file" if provider.auth == "oauth" else "api_key"
    return verdict, text.format(f"providers.{provider.name}", credential)


def judge_headers(provider: Provider, sent: Sequence[Field], echo: Any) -> Judgement:
    """Judge whether the routing headers arrive; *echo* is what the upstream says that it received."""
    if not isinstance(echo, dict):
        return "note", "not known whether the routing headers arrive: it does not echo"
    names = {name.lower() for name in (*provider.session_headers, *provider.affinity_headers, "x-client-request-id")}
    routing = {name.lower(): value for name, value in sent if name.lower() in names}
    lost = [name for name, value in routing.items() if echo.get(name) != value]
    if lost:
        return "FAIL", f"lost or changed on the way: {', '.join(lost)}"
    return "ok", f"{', '.join(routing)} arrive"


def judge_certificate(sock: ssl.SSLSocket) -> Finding:
    """Judge the certificate that was shown, and accepted, on *sock*."""
    shown: Any = sock.getpeercert()
    days = int((ssl.cert_time_to_seconds(shown["notAfter"]) - time.time()) // 86400)
    name = common_name(shown["subject"]) or shown["subjectAltName"][0][1]
    text = f"{sock.version()}, {days} days left, {describe(name)} signed by {describe(common_name(shown['issuer']))}"
    if sys.version_info >= (3, 13):
        reader = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # shows what is in a certificate, if it is a CA's
        reader.load_verify_locations(cadata=sock.get_verified_chain()[-1])
        for root in reader.get_ca_certs():
            text += f", root {describe(common_name(root['subject']))}"
    return finding("TLS", "warn" if days < EXPIRES_SOON_DAYS else "ok", text, days_left=days)


def notes_on(variables: Mapping[str, str], providers: Sequence[Provider]) -> List[str]:
    """Return what the *variables* of the environment are to us; never a value: passwords stand there."""
    has_env = any(provider.proxy == "env" for provider in providers)
    notes = []
    for pattern, text in VARIABLES[has_env:]:
        names = [name for name in sorted(variables) if variables[name] and re.fullmatch(pattern, name.lower())]
        notes += [f"{', '.join(names)}: {text}"] if names else []
    return notes


def examine(state: State, target: Target, until: float, may_guess: bool = True) -> Iterator[Finding]:
    """Ask *target* for its models, which costs no tokens, the way that requests take; yield what is found.

    *until* is monotonic.  With *may_guess*, a base URL at which nothing is found is tried with /v1, or without.
    """
    provider, session, phase, began = target.provider, Session("plexus-check"), "key", time.monotonic()
    try:
        credential = state.credentials.fields(provider, may_wait=False)
        if credential is None:  # a refresh token is too precious for a question
            yield finding(phase, "warn", "the access token has to be renewed, which serving does")
        phase = "connect"
        ours = Headers([("User-Agent", f"plexus_lite/{__version__}"), ("Accept", "application/json")])
        sent = outbound_fields(ours, provider, session, session.value, credential=credential or ())
        seconds = min(provider.timeout_s("connect_timeout_s", state.config.limits), until - began)
        bounded = Target(provider._replace(connect_timeout_s=seconds), target.base_url, "")
        upstream = state.transport.open(OutboundRequest(bounded, "/models", "GET", sent, fresh=True))
        assert upstream is not None
        upstream.send_some()
        sent_at = time.monotonic()
        attempt = Attempt(provider, target.base_url, until - sent_at)
        with upstream.sock, attempt.at("answer"):
            yield from judge_way(attempt, upstream.sock, sent_at - began)
            phase = "HTTP"
            answer, raw = attempt.read_answer(upstream.sock)
        if answer.status == 407 and upstream.proxy:
            raise wrong_password(upstream.proxy, provider)
        ms, body = round((time.monotonic() - sent_at) * 1000, 1), None
        with contextlib.suppress(ValueError, RecursionError):
            body = json.loads(raw, parse_int=str)  # no number is looked at: a long one costs nothing
        body = body if isinstance(body, dict) else {}
        models = [one.model for some in state.catalogue.values() for one in some if one.place == target.place]
        has_key = any(name.lower() in CREDENTIALS for name, _ in sent)
        verdict, text = judge_answer(provider, answer, body, models, has_key)
        by = f", perhaps from the proxy {upstream.proxy.name}" if upstream.proxy and verdict == "FAIL" else ""
        yield finding(phase, verdict, f"{answer.status} in {ms} ms{by}: {text}", status=answer.status, ms=ms)
        if answer.status < 300 and verdict != "FAIL":
            yield finding("headers", *judge_headers(provider, sent, body.get("echo")))
        if answer.status == 404 and may_guess:
            yield from guess(state, target, until)
        theirs = unix_time(answer.headers.get("date") or "")
        if theirs is not None:
            ahead = round(time.time() - theirs)
            verdict = "warn" if abs(ahead) > CLOCK_SKEW_S else "ok"
            yield finding("clock", verdict, f"{ahead:+d} s against the upstream's", ahead_s=ahead)
    except ProxyError as error:
        took = f"{time.monotonic() - began:.2g} s"  # all share CHECK_S: it may have been less
        text = error.message.replace("upstream connection error: ", "")
        phase = "TLS" if re.match("certificate of |no TLS ", text) else phase
        yield finding(phase, "FAIL", text.replace(f"the connect_timeout_s of {provider.name}", took))


def judge_way(attempt: Attempt, sock: socket.socket, seconds: float) -> Iterator[Finding]:
    """Say where *sock* leads, after *seconds*, and what was shown there."""
    if attempt.url.scheme == "demo":
        return
    proxy, address, ms = attempt.proxy, "closed since", round(seconds * 1000, 1)
    with contextlib.suppress(OSError):
        address = join_authority(*sock.getpeername()[:2])
    way = f"through the proxy {proxy.name}" if proxy else "direct"
    yield finding("connect", "ok", f"{address}, {way}, {ms} ms", ms=ms)
    with contextlib.suppress(OSError, ValueError, LookupError):  # OpenSSL can read it, and has accepted it
        if isinstance(sock, ssl.SSLSocket):
            yield judge_certificate(sock)


def guess(state: State, target: Target, until: float) -> Iterator[Finding]:
    """Say which base URL was probably meant, if something answers there."""
    shorter = re.sub("/(v1|responses|chat/completions)$", "", target.base_url)
    url = f"{shorter}/v1" if shorter == target.base_url else shorter
    rows = examine(state, Target(target.provider, url, ""), until, may_guess=False)
    if any(row["phase"] == "HTTP" and (row["verdict"] == "ok" or row.get("status") in (401, 403)) for row in rows):
        text = f"{url} answers; set providers.{target.provider.name}.api_base_url to that"
        yield finding("HTTP", "FAIL", text)


def check_upstreams(state: State) -> Finding:
    """Return what is found of every upstream of *state*, and of what is around."""
    until = time.monotonic() + CHECK_S
    providers = [provider for provider in state.config.providers.values() if provider.enabled]
    targets = [Target(one, url, "") for one in providers for url in one.urls()]  # without a model
    # The last row of each until it is done: getaddrinfo alone has no time limit.
    hangs = finding("connect", "FAIL", f"not done within {CHECK_S:g} s; does the name server answer?")
    found = [[hangs] for _ in targets]

    def run(target: Target, findings: List[Finding]) -> None:
        for one in examine(state, target, until):
            findings.insert(-1, one)
        findings.pop()

    threads = [threading.Thread(target=run, args=both, daemon=True) for both in zip(targets, found)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0, until + TICK_S - time.monotonic()))
    upstreams = []
    for target, findings in zip(targets, map(list, found)):  # copies: a thread may still run
        verdict = max((row["verdict"] for row in findings), key=list(VERDICTS).index)
        row = {"provider": target.provider.name, "base_url": target.base_url, "verdict": verdict, "findings": findings}
        upstreams.append(row)
    return {"upstreams": upstreams, "notes": [*state.credentials.look_again(), *notes_on(os.environ, providers)]}


def render_checkups(found: Mapping[str, Any]) -> str:
    """Return what check_upstreams has found, a line for each finding."""
    lines = []
    for one in found["upstreams"]:
        lines.append(f"{one['provider']}  {one['base_url']}")
        lines += [f"  {row['verdict']:<4}  {row['phase']:<7}  {row['text']}" for row in one["findings"]]
    lines += [f"note: {note}" for note in found["notes"]]
    verdicts = [one["verdict"] for one in found["upstreams"]]
    summary = ", ".join(f"{verdicts.count(name)} {text}" for name, text in VERDICTS.items() if name in verdicts)
    lines.append(f"{len(verdicts)} upstream{'s' * (len(verdicts) != 1)}: {summary or 'none is enabled'}")
    return "\n".join(map(one_line, lines))


# ---------------------------------------------------------------------------
# 17  CLI -- STARTER, parse_options, read_config, make_state, load_state, the commands, main: options, the
#    configuration file, exit codes.
# ---------------------------------------------------------------------------

STARTER: Final = """\
{
  "host": "127.0.0.1",
  "port": 4000,
  "providers": {"demo": {"api_base_url": "demo://", "models": ["demo-model"]}}
}"""


def write_out(text: str) -> None:
    """Write what was asked for to stdout, all of it; a reader that has left, as `head` does, had what it wanted."""
    try:
        with open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False) as stdout:
            stdout.write(text + "\n")
    except BrokenPipeError:
        pass
    except OSError as error:
        raise ConfigError("stdout", f"cannot be written: {error.strerror}") from None


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    """Return what the command line says; None is what it leaves to the configuration.

    SystemExit after --help and --version, and for what is wrong; ConfigError for a host or port that no file can have.
    """
    parser = argparse.ArgumentParser(
        usage="plexus_lite.py [COMMAND] [OPTION...]",
        description=str(__doc__).partition("\n\nHow a request travels")[0],
        epilog="configuration keys (default):\n" + render_reference(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    add = parser.add_argument
    add("words", nargs="*", help=argparse.SUPPRESS)
    add("--config", metavar="PATH", help="configuration (PLEXUS_CONFIG, or config.json beside this file)")
    add("--host", help="listen on this address instead of the configuration's")
    add("--port", type=int, help="listen on this port instead; 0 = any free one")
    add("--log-file", metavar="PATH", help="write the log there instead of stderr; SIGHUP reopens it")
    add("--log-level", choices=LEVELS, default="info", help="info, the default, has a line for each request")
    add("--json", action="store_true", help="report, check: JSON instead of tables")
    add("--version", action="store_true")
    add("-h", "--help", action="store_true")
    options = parser.parse_intermixed_args(arguments)  # options and operands in any order
    if options.help or options.version:
        write_out(f"plexus_lite {__version__}" if options.version else parser.format_help().rstrip())
        raise SystemExit(EXIT_OK)
    options.command, *options.files = options.words or ["serve"]
    if options.command not in COMMANDS:
        parser.error(f"there is no command {options.command}")
    if bool(options.files) != (options.command == "report"):
        parser.error("report needs a LOG, and no other command reads one")
    for name in ("host", "port"):
        given = getattr(options, name)
        if given is not None:
            Config.rows[name].read(given, f"--{name}")
    return options


def read_config(path: str, options: argparse.Namespace) -> Config:
    """Return the configuration in the file *path*; ConfigError for whatever is wrong with it."""
    try:
        with open(path, "rb") as file:
            text = decode_text(file.read())
        text = text[text.startswith("\ufeff") :]  # Windows editors write a byte order mark
        parse_json(text)  # for its errors: it knows the place of NaN and of a long number, too
        value = expand_variables(json.loads(text, object_pairs_hook=unique_members), os.environ)
    except FileNotFoundError:
        raise ConfigError("", "no such file; `python plexus_lite.py init > config.json` writes one") from None
    except OSError as error:
        raise ConfigError("", f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, or nested too deeply
        raise ConfigError("", f"is not valid JSON: {error}") from None
    for name, given in (("host", options.host), ("port", options.port)):
        if given is not None and isinstance(value, dict):
            Config.rows[name].read(value.get(name, given), name)  # what it stands in for has to be right, too
            value[name] = given
    return parse_config(value)


def unique_members(pairs: List[Tuple[str, Any]]) -> Dict[str, Any]:
    for name, count in collections.Counter(name for name, _ in pairs).items():
        if count > 1:
            raise ConfigError("", f"the key {json.dumps(name)} stands twice in one object")
    return dict(pairs)


def raise_descriptor_limit(config: Config) -> None:
    """Two descriptors a connection: raise the soft limit as far as needed and allowed.  Windows has none."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * config.limits.max_connections + 256
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, hard)), hard))


def cores() -> List[int]:
    """Return the cores this process may use."""
    if sys.platform == "linux":
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def bind_to_core(number: int) -> None:
    """Bind this process to one core; *number* is its own, and not always 0, to which everybody else's first is bound.

    Without the GIL (3.13t, 3.14t) threads run side by side, and one core for them all would take that away.
    """
    allowed, has_gil = cores(), getattr(sys, "_is_gil_enabled", lambda: True)()
    if has_gil and sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {allowed[number % len(allowed)]})


def make_state(config: Config, demo: DemoBackend, ticket_secret: bytes, folder: str) -> State:
    """Return the state for *config*; *folder* is where relative paths of secrets start."""
    # The transport needs the proxies that stand in files, and is there when an issuer is asked.
    credentials = Credentials(config, folder, lambda provider, form: transport.post_form(provider, form))  # noqa: PLW0108
    config = config._replace(providers=credentials.providers)
    transport = Transport(config, demo.connect)
    catalogue = {(name, api): targets_of(config, name, api) for name in model_list(config) for api in APIS}
    has_places = len(places_of(config, None)) > 1
    tls = make_server_context(config.tls) if config.tls else None
    return State(config, transport, catalogue, has_places, ticket_secret, credentials, tls)


def load_state(options: argparse.Namespace, demo: DemoBackend, ticket_secret: bytes) -> State:
    beside = os.path.join(os.path.dirname(sys.argv[0]), "config.json")
    path = options.config or os.environ.get("PLEXUS_CONFIG") or beside
    try:
        config = read_config(path, options)
        raise_descriptor_limit(config)
        return make_state(config, demo, ticket_secret, os.path.dirname(os.path.abspath(path)))
    except ConfigError as error:
        raise ConfigError("", f"{path}: {error}") from None


def serve(options: argparse.Namespace) -> int:
    load = functools.partial(load_state, options, DemoBackend(), secrets.token_bytes(32))
    state = load()
    config = state.config
    # Bound until a restart: what a later file may leave open is judged by where we listen, not by what it says.
    options.host = config.host
    if options.log_file is not None:
        os.close(Log.open(options.log_file))
    # What is here now stays: no collection has to look at it again, nor does it move apart in forked workers.
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    hold_signals(True)  # until whoever handles them is ready: the line on stdout invites them
    if sys.version_info < (3, 10):
        with contextlib.suppress(ImportError, OSError):
            import ctypes

            # When a thread ends, these load it; without a descriptor left they would abort.  Not by ending a thread
            # here: a fork in the middle of that took the workers' lives.
            ctypes.CDLL("libgcc_s.so.1")
    try:
        listener = listen(config.host, config.port)
    except (OSError, TypeError, ValueError) as error:  # the latter two: it can be no name
        say(f"cannot listen on {config.host} port {config.port}: {reason_of(error)}", 2)
        return EXIT_CANNOT_LISTEN
    announce(config, listener)
    workers = len(cores()) if config.workers == "auto" else int(config.workers)
    if workers > 1 and sys.platform == "win32":
        say("workers: this system cannot fork, so one process serves", 2)
        workers = 1
    shared = Shared(workers)
    page = (page_headers(PAGE), PAGE.encode("ascii"))

    def serve_one(number: int, current: State) -> int:
        if config.cpu_affinity:
            bind_to_core(shared.supervisor + number)
        log = Log(options.log_file, options.log_level)
        server = Server(current, log, load, listener, shared, number, page)
        server.catch_signals()
        server.serve_forever()
        log.close()
        return EXIT_OK

    if workers == 1:
        return serve_one(0, state)
    log = functools.partial(log_event, options.log_file, options.log_level)
    return Supervisor(serve_one, state, load, log, listener, shared).run(workers)


def announce(config: Config, listener: socket.socket) -> None:
    """Say on stdout where we listen, the real port first, and what is served."""
    where = join_authority(*listener.getsockname()[:2])
    say(f"plexus_lite {__version__} listening on {'https' if config.tls else 'http'}://{where}")
    for name, provider in config.providers.items():
        off = "" if provider.enabled else " (disabled)"
        say(one_line(f"  {name}: {', '.join(provider.models)} at {', '.join(provider.urls())}{off}"))
    for name, alias in config.models.items():
        targets = ", ".join(f"{target.provider}/{target.model}" for target in alias.targets)
        say(one_line(f"  {name} -> {targets}"))


def init(_: argparse.Namespace) -> int:
    write_out(STARTER)
    return EXIT_OK


def report(options: argparse.Namespace) -> int:
    """Say on stdout what the logs tell, and on stderr what in them is no record."""
    found = Report()
    remark = read_logs(options.files, found, os.isatty(2))
    if remark:
        say(remark, 2)
    # The console of Windows takes the bytes for another encoding.
    bars = os.isatty(1) and sys.platform != "win32" and sys.stdout.encoding.lower() == "utf-8"
    width = shutil.get_terminal_size((100, 24)).columns
    write_out(json.dumps(found.as_json()) if options.json else found.render(width, bars))
    return EXIT_OK


def check(options: argparse.Namespace) -> int:
    """Say on stdout what keeps each upstream from being used, if anything does."""
    found = check_upstreams(load_state(options, DemoBackend(), b""))
    write_out(json.dumps(found) if options.json else render_checkups(found))
    has_failed = any(upstream["verdict"] == "FAIL" for upstream in found["upstreams"])
    return EXIT_CHECK_FAILED if has_failed else EXIT_OK


COMMANDS: Final = {"serve": serve, "init": init, "check": check, "report": report}


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Return the exit code; what is wrong with the configuration, a file or stdout is one line on stderr."""
    # Started with stdout closed, say: no socket must get its number.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    threading.stack_size(STACK_BYTES)
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
        return COMMANDS[options.command](options)
    except ConfigError as error:
        say(str(error), 2)
        return EXIT_USAGE
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def run_main(*_: object) -> None:
    """Be the hook for the exception below, which ends the script before the program begins.

    CPython keeps the syntax tree of a script until the script has ended: 13 MB of this one, a third of all that the
    program takes.  A hook runs after that, in the main thread of an interpreter that is as it was.
    """
    trim_heap()
    raise SystemExit(main())


if __name__ == "__main__":
    sys.excepthook = run_main
    raise SystemError("run_main goes on from here")
