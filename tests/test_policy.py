"""Room 5: the rules for routes, keys, session values, headers in both directions, and the model's span."""

import contextlib
import hashlib
import json
import random
import unittest
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple
from unittest import mock

import plexus_lite

Fields = Sequence[Tuple[str, str]]

PREFIXES = ("", "/v1", "/backend-api", "/codex", "/v1/codex", "/backend-api/codex")
# The contract's table: path, the methods with what they do, name in logs, API, id.
ROWS: Sequence[Tuple[str, Mapping[str, str], str, str, str]] = (
    ("/responses", {"POST": "forward"}, "/responses", "responses", ""),
    ("/responses/compact", {"POST": "forward"}, "/responses/compact", "responses", ""),
    ("/responses/input_tokens", {"POST": "forward"}, "/responses/input_tokens", "responses", ""),
    ("/responses/resp_0-Z", {"GET": "stored", "DELETE": "stored"}, "/responses/{id}", "responses", "resp_0-Z"),
    ("/responses/resp_bGl0=", {"GET": "stored", "DELETE": "stored"}, "/responses/{id}", "responses", "resp_bGl0="),
    ("/responses/a.b%3D", {"GET": "stored", "DELETE": "stored"}, "/responses/{id}", "responses", "a.b%3D"),
    ("/responses/resp_1/cancel", {"POST": "stored"}, "/responses/{id}/cancel", "responses", "resp_1"),
    ("/responses/resp_1/input_items", {"GET": "stored"}, "/responses/{id}/input_items", "responses", "resp_1"),
    ("/chat/completions", {"POST": "forward"}, "/chat/completions", "chat", ""),
    ("/models", {"GET": "models"}, "/models", "responses", ""),
    ("/models/gpt-5.4", {"GET": "models"}, "/models/{id}", "responses", "gpt-5.4"),
    ("/models/org/model", {"GET": "models"}, "/models/{id}", "responses", "org/model"),
    ("/health", {"GET": "health"}, "/health", "responses", ""),
    ("/metrics", {"GET": "metrics"}, "/metrics", "responses", ""),
    ("/status", {"GET": "status", "POST": "ticket"}, "/status", "responses", ""),
    ("/", {"GET": "page"}, "/", "responses", ""),
)

# What the clients send (real header names, order and case; values shortened) and what leaves, line by line:
# "-" does not travel, "+" is added.  A title names the source of the session value and the body's prompt_cache_key.
CLIENTS = """
Codex 0.98, second turn = session_id, ROOT
  x-oai-web-search-eligible: true | x-codex-turn-state: ts-2 | session_id: ROOT
- authorization: Bearer c
  accept: text/event-stream | content-type: application/json | user-agent: codex_exec/0.98.0
  originator: codex_exec
- host: 127.0.0.1:4000 | content-length: 99
+ session-id: ROOT | x-client-request-id: ROOT | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

Codex 0.98, review = session_id, ROOT
  x-oai-web-search-eligible: false | x-codex-turn-metadata: {"turn_id":"t"} | session_id: ROOT
  x-openai-subagent: review
- authorization: Bearer c
  accept: text/event-stream | content-type: application/json | user-agent: codex_exec/0.98.0
  originator: codex_exec
- host: 127.0.0.1:4000 | content-length: 99
+ session-id: ROOT | x-client-request-id: ROOT | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

Codex 0.120, second turn = session_id, ROOT
  version: 0.120.0 | x-codex-turn-state: ts-2 | x-codex-turn-metadata: {"turn_id":"t"}
  x-codex-window-id: ROOT:0 | x-client-request-id: ROOT | session_id: ROOT
- authorization: Bearer c
  accept: text/event-stream | content-type: application/json | user-agent: codex_exec/0.120.0
  originator: codex_exec
- host: 127.0.0.1:4000 | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.120 signed in to ChatGPT, second turn = session_id, ROOT
  version: 0.120.0 | x-codex-turn-state: ts-2 | x-codex-turn-metadata: {"turn_id":"t"}
  x-codex-window-id: ROOT:0 | x-client-request-id: ROOT | session_id: ROOT
- authorization: Bearer c | chatgpt-account-id: acct-fake-0001
  accept: text/event-stream | content-encoding: zstd | content-type: application/json
  user-agent: codex_exec/0.120.0 | originator: codex_exec
- host: 127.0.0.1:4000 | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.120, compaction = session_id, none
  version: 0.120.0 | x-codex-installation-id: i-1 | x-codex-window-id: ROOT:0 | session_id: ROOT
- authorization: Bearer c
  content-type: application/json | accept: */* | user-agent: codex_exec/0.120.0
  originator: codex_exec
- host: 127.0.0.1:4000 | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.120, review = session_id, ROOT
  x-codex-turn-metadata: {"turn_id":"t"} | x-openai-subagent: review | x-codex-window-id: ROOT:0
  x-client-request-id: ROOT | session_id: ROOT
- authorization: Bearer c
  accept: text/event-stream | content-type: application/json | user-agent: codex_exec/0.120.0
  originator: codex_exec
- host: 127.0.0.1:4000 | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.137, first turn = session-id, ROOT
  x-codex-beta-features: terminal_resize_reflow | x-codex-turn-metadata: {"turn_id":"t"}
  x-codex-window-id: ROOT:0 | x-client-request-id: ROOT | session-id: ROOT | thread-id: ROOT
  accept: text/event-stream
- authorization: Bearer c
  content-type: application/json | originator: codex_exec | user-agent: codex_exec/0.137.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.137 signed in to ChatGPT, second turn = session-id, ROOT
  version: 0.137.0 | x-codex-beta-features: terminal_resize_reflow | x-codex-turn-state: ts-2
  x-codex-turn-metadata: {"turn_id":"t"} | x-codex-window-id: ROOT:0 | x-client-request-id: ROOT
  session-id: ROOT | thread-id: ROOT | accept: text/event-stream
- authorization: Bearer c | chatgpt-account-id: acct-fake-0001
  content-encoding: zstd | content-type: application/json | originator: codex_exec
  user-agent: codex_exec/0.137.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.137, compaction = session-id, ROOT
  version: 0.137.0 | x-codex-installation-id: i-1 | x-codex-beta-features: terminal_resize_reflow
  x-codex-turn-metadata: {"turn_id":"t"} | x-codex-window-id: ROOT:0 | session-id: ROOT
  thread-id: ROOT
- authorization: Bearer c
  content-type: application/json | accept: */* | originator: codex_exec
  user-agent: codex_exec/0.137.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | x-client-request-id: ROOT | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

Codex 0.137, review = session-id, SUB
  x-codex-beta-features: terminal_resize_reflow | x-codex-turn-metadata: {"turn_id":"t"}
  x-openai-subagent: review | x-codex-parent-thread-id: ROOT | x-codex-window-id: SUB:0
  x-client-request-id: SUB | session-id: ROOT | thread-id: SUB | accept: text/event-stream
- authorization: Bearer c
  content-type: application/json | originator: codex_exec | user-agent: codex_exec/0.137.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.150, first turn = session-id, ROOT
  x-codex-beta-features: remote_compaction_v2 | x-codex-window-id: ROOT:0
  x-codex-turn-metadata: {"turn_id":"t"} | x-client-request-id: ROOT | session-id: ROOT
  thread-id: ROOT | accept: text/event-stream | content-type: application/json
- authorization: Bearer c
  originator: codex_exec | user-agent: codex_exec/0.150.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.150 signed in to ChatGPT, second turn = session-id, ROOT
  version: 0.150.0 | x-codex-beta-features: remote_compaction_v2 | x-codex-turn-state: ts-2
  x-codex-window-id: ROOT:0 | x-codex-turn-metadata: {"turn_id":"t"}
  x-codex-routing-hint: model=gpt-5.5 | x-client-request-id: ROOT | session-id: ROOT | thread-id: ROOT
  accept: text/event-stream | content-encoding: zstd | content-type: application/json
- authorization: Bearer c | chatgpt-account-id: acct-fake-0001
  originator: codex_exec | user-agent: codex_exec/0.150.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.150, review = session-id, ROOT
  x-codex-beta-features: remote_compaction_v2 | x-codex-window-id: SUB:0
  x-codex-turn-metadata: {"turn_id":"t"} | x-codex-parent-thread-id: ROOT | x-openai-subagent: review
  x-client-request-id: SUB | session-id: ROOT | thread-id: SUB | accept: text/event-stream
  content-type: application/json
- authorization: Bearer c
  originator: codex_exec | user-agent: codex_exec/0.150.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.169, second turn = session-id, ROOT
  version: 0.169.0 | x-codex-beta-features: remote_compaction_v2 | x-codex-turn-state: ts-2
  x-codex-window-id: ROOT:0 | x-codex-turn-metadata: {"turn_id":"t"} | x-client-request-id: ROOT
  session-id: ROOT | thread-id: ROOT | accept: text/event-stream | content-type: application/json
- authorization: Bearer c
  originator: codex_exec | user-agent: codex_exec/0.169.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

Codex 0.169, review = session-id, ROOT
  x-codex-beta-features: remote_compaction_v2 | x-codex-window-id: SUB:0
  x-codex-turn-metadata: {"turn_id":"t"} | x-codex-parent-thread-id: ROOT | x-openai-subagent: review
  x-client-request-id: SUB | session-id: ROOT | thread-id: SUB | accept: text/event-stream
  content-type: application/json
- authorization: Bearer c
  originator: codex_exec | user-agent: codex_exec/0.169.0
- host: 127.0.0.1:4000 | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

hermes 0.19, chat = none, none
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate | Connection: keep-alive
  Accept: application/json | Content-Type: application/json | User-Agent: OpenAI/Python 2.24.0
  X-Stainless-Lang: python | X-Stainless-Package-Version: 2.24.0 | X-Stainless-OS: Linux
  X-Stainless-Arch: x64 | X-Stainless-Runtime: CPython | X-Stainless-Runtime-Version: 3.11.7
- Authorization: Bearer c
  X-Stainless-Async: false | x-stainless-retry-count: 0 | x-stainless-read-timeout: 1800.0
- Content-Length: 99
+ Authorization: Bearer sk-upstream | Accept-Encoding: identity

hermes 0.19, codex = session_id, KEY
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate | Connection: keep-alive
  Accept: application/json | Content-Type: application/json | User-Agent: OpenAI/Python 2.24.0
  X-Stainless-Lang: python | X-Stainless-Package-Version: 2.24.0 | X-Stainless-OS: Linux
  X-Stainless-Arch: x64 | X-Stainless-Runtime: CPython | X-Stainless-Runtime-Version: 3.11.7
- Authorization: Bearer c
  X-Stainless-Async: false | session_id: ROOT | x-client-request-id: ROOT | x-stainless-retry-count: 0
  x-stainless-read-timeout: 1800.0
- Content-Length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

hermes 0.19, responses = prompt_cache_key, KEY
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate | Connection: keep-alive
  Accept: application/json | Content-Type: application/json | User-Agent: OpenAI/Python 2.24.0
  X-Stainless-Lang: python | X-Stainless-Package-Version: 2.24.0 | X-Stainless-OS: Linux
  X-Stainless-Arch: x64 | X-Stainless-Runtime: CPython | X-Stainless-Runtime-Version: 3.11.7
- Authorization: Bearer c
  X-Stainless-Async: false | x-stainless-retry-count: 0 | x-stainless-read-timeout: 1800.0
- Content-Length: 99
+ session_id: KEY | session-id: KEY | x-client-request-id: KEY | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

OpenAI SDK for node 6.49 = prompt_cache_key, KEY
- host: 127.0.0.1:4000 | connection: keep-alive
  accept: application/json | user-agent: OpenAI/JS 6.49.0 | x-stainless-retry-count: 0
  x-stainless-lang: js | x-stainless-package-version: 6.49.0 | x-stainless-os: Linux
  x-stainless-arch: x64 | x-stainless-runtime: node | x-stainless-runtime-version: v24.21.0
- authorization: Bearer c
  content-type: application/json | accept-language: * | sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session_id: KEY | session-id: KEY | x-client-request-id: KEY | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

OpenAI SDK for node 7.57 with a session_id of the caller's = session_id, KEY
- host: 127.0.0.1:4000 | connection: keep-alive
  accept: application/json | user-agent: OpenAI/JS 7.57.0 | x-stainless-retry-count: 0
  x-stainless-lang: js | x-stainless-package-version: 7.57.0 | x-stainless-os: Linux
  x-stainless-arch: x64 | x-stainless-runtime: node | x-stainless-runtime-version: v24.21.0
- authorization: Bearer c
  content-type: application/json | session_id: ROOT | x-rig-extra: 1 | accept-language: *
  sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session-id: ROOT | x-client-request-id: KEY | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

OpenAI SDK for Python 3.54, raw response = prompt_cache_key, KEY
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate | Connection: keep-alive
- authorization: Bearer c
  accept: application/json | content-type: application/json | user-agent: OpenAI/Python 3.54.0
  x-stainless-lang: python | x-stainless-package-version: 3.54.0 | x-stainless-os: Linux
  x-stainless-arch: x64 | x-stainless-runtime: CPython | x-stainless-runtime-version: 3.11.7
  x-stainless-async: false | x-stainless-raw-response: true | x-stainless-retry-count: 0
  x-stainless-read-timeout: 20
- Content-Length: 99
+ session_id: KEY | session-id: KEY | x-client-request-id: KEY | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

OpenAI SDK for Python 3.54 with a session_id of the caller's = session_id, KEY
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate | Connection: keep-alive
- authorization: Bearer c
  accept: application/json | content-type: application/json | user-agent: OpenAI/Python 3.54.0
  x-stainless-lang: python | x-stainless-package-version: 3.54.0 | x-stainless-os: Linux
  x-stainless-arch: x64 | x-stainless-runtime: CPython | x-stainless-runtime-version: 3.11.7
  x-stainless-async: false | session_id: ROOT | x-rig-extra: 1 | x-stainless-retry-count: 0
  x-stainless-read-timeout: 20
- Content-Length: 99
+ session-id: ROOT | x-client-request-id: KEY | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

OpenAI SDK for Python 3.54, /v1/codex = prompt_cache_key, KEY
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate | Connection: keep-alive
- authorization: Bearer c
  accept: application/json | content-type: application/json | user-agent: OpenAI/Python 3.54.0
  x-stainless-lang: python | x-stainless-package-version: 3.54.0 | x-stainless-os: Linux
  x-stainless-arch: x64 | x-stainless-runtime: CPython | x-stainless-runtime-version: 3.11.7
  x-stainless-async: false | x-stainless-retry-count: 0 | x-stainless-read-timeout: 20
- Content-Length: 99
+ session_id: KEY | session-id: KEY | x-client-request-id: KEY | Authorization: Bearer sk-upstream
+ Accept-Encoding: identity

opencode 1.18 = x-session-id, none
- Authorization: Bearer c
  Content-Type: application/json | User-Agent: opencode/1.18.33 | x-session-affinity: ROOT
  x-session-id: ROOT
- Connection: keep-alive
  Accept: */*
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate, br, zstd | Content-Length: 99
+ session_id: ROOT | session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

opencode 1.18, chat = x-session-id, none
- Authorization: Bearer c
  Content-Type: application/json | User-Agent: opencode/1.18.33 | x-session-affinity: ROOT
  x-session-id: ROOT
- Connection: keep-alive
  Accept: */*
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate, br, zstd | Content-Length: 99
+ session_id: ROOT | session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

opencode 1.18, provider openai = session-id, none
- Authorization: Bearer c
  Content-Type: application/json | User-Agent: opencode/1.18.33 (linux X; x64) | originator: opencode
  session-id: ROOT | x-session-affinity: ROOT | x-session-id: ROOT
- Connection: keep-alive
  Accept: */*
- Host: 127.0.0.1:4000 | Accept-Encoding: gzip, deflate, br, zstd | Content-Length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

pi 0.73, codex = session_id, ROOT
- host: 127.0.0.1:4000 | connection: keep-alive | Authorization: Bearer c
- chatgpt-account-id: acct-fake-0001
  originator: pi | User-Agent: pi (browser) | OpenAI-Beta: responses=experimental
  accept: text/event-stream | content-type: application/json | session_id: ROOT
  x-client-request-id: ROOT | accept-language: * | sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

pi 0.73, codex after a refused WebSocket = session_id, ROOT
- host: 127.0.0.1:4000 | connection: keep-alive | Authorization: Bearer c
- chatgpt-account-id: acct-fake-0001
  originator: pi | User-Agent: pi (linux X; x64) | OpenAI-Beta: responses=experimental
  accept: text/event-stream | content-type: application/json | session_id: ROOT
  x-client-request-id: ROOT | accept-language: * | sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

pi 0.73, responses = session_id, ROOT
- host: 127.0.0.1:4000 | connection: keep-alive
  Accept: application/json | User-Agent: OpenAI/JS 6.26.0 | X-Stainless-Retry-Count: 0
  X-Stainless-Lang: js | X-Stainless-Package-Version: 6.26.0 | X-Stainless-OS: Linux
  X-Stainless-Arch: x64 | X-Stainless-Runtime: node | X-Stainless-Runtime-Version: v20.20.2
- authorization: Bearer c
  session_id: ROOT | x-client-request-id: ROOT | content-type: application/json | accept-language: *
  sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

pi 0.87, chat = session_id, none
- host: 127.0.0.1:4000 | connection: keep-alive
  Accept: application/json | X-Stainless-Retry-Count: 0 | X-Stainless-Timeout: 300
  X-Stainless-Lang: js | X-Stainless-Package-Version: 6.40.0 | X-Stainless-OS: Linux
  X-Stainless-Arch: x64 | X-Stainless-Runtime: node | X-Stainless-Runtime-Version: v24.21.0
- authorization: Bearer c
  User-Agent: pi (linux X; x64) | session_id: ROOT | x-client-request-id: ROOT
  x-session-affinity: ROOT | content-type: application/json | accept-language: *
  sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

pi 0.87, codex = session-id, ROOT
- host: 127.0.0.1:4000 | connection: keep-alive | Authorization: Bearer c
- chatgpt-account-id: acct-fake-0001
  originator: pi | User-Agent: pi (linux X; x64) | OpenAI-Beta: responses=experimental
  accept: text/event-stream | content-type: application/json | session-id: ROOT
  x-client-request-id: ROOT | content-encoding: zstd | accept-language: * | sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session_id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity

pi 0.87, responses = session_id, ROOT
- host: 127.0.0.1:4000 | connection: keep-alive
  Accept: application/json | X-Stainless-Retry-Count: 0 | X-Stainless-Timeout: 300
  X-Stainless-Lang: js | X-Stainless-Package-Version: 6.40.0 | X-Stainless-OS: Linux
  X-Stainless-Arch: x64 | X-Stainless-Runtime: node | X-Stainless-Runtime-Version: v24.21.0
- authorization: Bearer c
  User-Agent: pi (linux X; x64) | session_id: ROOT | x-client-request-id: ROOT
  content-type: application/json | accept-language: * | sec-fetch-mode: cors
- accept-encoding: gzip, deflate | content-length: 99
+ session-id: ROOT | Authorization: Bearer sk-upstream | Accept-Encoding: identity
"""


def request(method: str, target: str, *fields: Tuple[str, str]) -> plexus_lite.RequestHead:
    given = fields if any(name == "Host" for name, _ in fields) else (("Host", "127.0.0.1:4000"), *fields)
    lines = [f"{method} {target} HTTP/1.1", *(f"{name}: {value}" for name, value in given), "", ""]
    return plexus_lite.read_request_head("\r\n".join(lines).encode("latin-1"))


def provider(**settings: Any) -> plexus_lite.Provider:
    entry = dict({"api_base_url": "http://up/v1", "models": ["m"], "api_key": "sk-upstream"}, **settings)
    entry = {name: value for name, value in entry.items() if value is not None}
    return plexus_lite.parse_config({"providers": {"up": entry}}).providers["up"]


def cache_key(members: Mapping[str, Any]) -> Optional[str]:
    """Return the prompt_cache_key of a body with *members*: the same however its characters are spelt."""
    spellings = [json.dumps(members).encode()]
    with contextlib.suppress(UnicodeEncodeError):  # half a surrogate pair can only be escaped
        spellings.append(json.dumps(members, ensure_ascii=False).encode())
    (key,) = {plexus_lite.cache_key(plexus_lite.parse_json_body(raw)) for raw in spellings}
    return key


def outbound(inbound: Fields, members: Mapping[str, Any], settings: Mapping[str, Any], **options: Any) -> List[Any]:
    """Return what leaves for a request with the *inbound* fields and the body's *members*."""
    headers = plexus_lite.Headers(inbound).end_to_end()
    key = cache_key(members)
    session = plexus_lite.session_of(headers, key)
    up = provider(**settings)
    ours = plexus_lite.Credentials(plexus_lite.Config({"up": up}), "", ask_nobody).fields(up) or ()
    return plexus_lite.outbound_fields(headers, up, session, key, credential=ours, **options)


def ask_nobody(provider: plexus_lite.Provider, form: bytes) -> Tuple[int, bytes]:
    raise AssertionError("no sign-in here")


def only(fields: Fields, *names: str) -> Dict[str, List[str]]:
    """Return the values of *names* (lower case), of those that are there."""
    found: Dict[str, List[str]] = {}
    for name, value in fields:
        if name.lower() in names:
            found.setdefault(name.lower(), []).append(value)
    return found


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def as_header(text: str) -> str:
    """Return UTF-8 *text* as a header reader sees it."""
    return text.encode("utf-8").decode("latin-1")


class Refusals(unittest.TestCase):
    def assertRefused(self, code: str, function: Any, *args: Any) -> plexus_lite.ProxyError:
        with self.assertRaises(plexus_lite.ProxyError) as caught:
            function(*args)
        self.assertEqual(caught.exception.code, code)
        return caught.exception


class Routes(Refusals):
    def test_every_row_with_every_prefix(self):
        for prefix in PREFIXES:
            for path, methods, name, api, response_id in ROWS:
                for method, action in methods.items():
                    for query in ("", "?stream=true&x=/responses"):
                        with self.subTest(method + " " + prefix + path + query):
                            route = plexus_lite.route_of(request(method, prefix + path + query))
                            found = (route.name, route.path, route.action, route.api, route.id)
                            self.assertEqual(found, (name, path, action, api, response_id))

    def test_another_method_is_a_405_that_lists_the_known_ones(self):
        for prefix in PREFIXES:
            for path, methods, _, _, _ in ROWS:
                for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "post"} - set(methods):
                    with self.subTest(method + " " + prefix + path):
                        head = request(method, prefix + path)
                        error = self.assertRefused("method_not_allowed", plexus_lite.route_of, head)
                        allowed = dict(error.fields)["Allow"].split(", ")
                        self.assertEqual(error.status, 405)
                        self.assertEqual(set(methods) - set(allowed), set())
                        self.assertEqual(set(allowed) - set(methods) - {"HEAD"}, set())

    def test_anything_else_is_a_404(self):
        paths = ["/v1", "/v1//", "/v1/v1/responses", "/codex/v1/responses", "/codex/codex/responses", "/v2/responses"]
        paths += ["/backend-api/v1/responses", "/v1/backend-api/responses", "/V1/responses", "/v1/Responses"]
        paths += ["/v1responses", "/v1/responsesx", "/v1/responses/", "//responses", "/v1//responses"]
        paths += ["/responses/a/b", "/responses//cancel", "/responses/..", "/responses/../models", "/responses/."]
        paths += ["/responses/%72", "/responses/a/cancel/", "/responses/compact/x", "/chat", "/chat/completions/x"]
        paths += ["/embeddings", "/completions", "/modelsx", "/models/", "/healthz", "/health/", "/api/show"]
        paths += ["/responses/%2e%2e", "/responses/a%2Fb", "/responses/../cancel", "/responses/a%5c", "/responses/a;b"]
        paths += ["/responses/" + "x" * 1001, "/" + "x" * 5000, "/responses/{id}", "/v1/responses/{id}/cancel", "/{"]
        for path in paths:
            for method in ("GET", "POST"):
                with self.subTest(method + " " + path[:80]):
                    error = self.assertRefused("not_found", plexus_lite.route_of, request(method, path))
                    self.assertEqual(error.status, 404)
                    self.assertIn("/chat/completions", error.message)
                    self.assertLess(len(error.message), 1000)

    def test_a_websocket_gets_a_426_on_every_responses_path(self):
        """Codex and pi turn to SSE at once then; 404 or 405 cost Codex seconds each run."""
        fields = [("Connection", "Upgrade"), ("Upgrade", "websocket"), ("Sec-WebSocket-Version", "13")]
        fields += [("Sec-WebSocket-Key", "AAAAAAAAAAAAAAAAAAAAAA=="), ("openai-beta", "responses_websockets=2026")]
        for prefix in PREFIXES:
            for path in ("/responses", "/responses/compact", "/responses/resp_1"):
                with self.subTest(prefix + path):
                    self.assertEqual(plexus_lite.route_of(request("GET", prefix + path, *fields)).action, "websocket")
        for upgrade in ("WebSocket", "h2c, websocket"):
            head = request("GET", "/v1/responses", ("connection", "upgrade"), ("upgrade", upgrade))
            self.assertEqual(plexus_lite.route_of(head).action, "websocket")
        self.assertEqual(plexus_lite.ProxyError("websocket_not_supported", "x").status, 426)

    def test_what_is_no_websocket_is_routed_as_ever(self):
        get = request("GET", "/v1/responses", ("Connection", "Upgrade"), ("Upgrade", "h2c"))
        self.assertRefused("method_not_allowed", plexus_lite.route_of, get)
        upgrade = (("Connection", "Upgrade"), ("Upgrade", "websocket"))
        self.assertEqual(plexus_lite.route_of(request("POST", "/v1/responses", *upgrade)).action, "forward")
        self.assertRefused("not_found", plexus_lite.route_of, request("GET", "/v1/realtime", *upgrade))
        self.assertEqual(plexus_lite.route_of(request("GET", "/v1/models", *upgrade)).action, "models")


class FindKey(Refusals):
    KEYS = {
        "a": plexus_lite.Key("sk-alpha", ("gpt",)),
        "b": plexus_lite.Key("sk-beta"),
        "c": plexus_lite.Key("sk-alphabet"),
    }

    def find(self, *fields: Tuple[str, str]) -> plexus_lite.Identity:
        return plexus_lite.find_key(plexus_lite.Headers(fields), self.KEYS)

    def test_where_a_key_is_found(self):
        rows: Sequence[Tuple[str, Fields, str, Optional[str], str]] = (
            ("Bearer", [("Authorization", "Bearer sk-alpha")], "a", None, "authorization"),
            ("bearer", [("authorization", "bearer sk-beta")], "b", None, "authorization"),
            ("BEARER", [("AUTHORIZATION", "BEARER sk-alphabet")], "c", None, "authorization"),
            ("bare", [("Authorization", "sk-beta")], "b", None, "authorization"),
            ("x-api-key", [("X-Api-Key", "sk-alpha")], "a", None, "x-api-key"),
            ("a label", [("Authorization", "Bearer sk-alpha:laptop")], "a", "laptop", "authorization"),
            ("a label, bare", [("Authorization", "sk-alpha:laptop")], "a", "laptop", "authorization"),
            ("a label in x-api-key", [("x-api-key", "sk-alpha:laptop")], "a", "laptop", "x-api-key"),
            ("a label with colons", [("x-api-key", "sk-beta:a:b")], "b", "a:b", "x-api-key"),
            ("an empty label is none", [("x-api-key", "sk-beta:")], "b", None, "x-api-key"),
            (
                "an upstream's key beside it",
                [("Authorization", "Bearer sk-theirs"), ("x-api-key", "sk-beta")],
                "b",
                None,
                "x-api-key",
            ),
        )
        for name, fields, key, label, field in rows:
            with self.subTest(name):
                found = self.find(*fields)
                self.assertEqual((found.name, found.label, found.fields), (key, label, frozenset([field])))
                self.assertEqual(found.models, self.KEYS[key].models)

    def test_what_is_no_key(self):
        rows: Sequence[Tuple[str, Fields]] = (
            ("nothing", []),
            ("another key", [("Authorization", "Bearer sk-gamma")]),
            ("empty", [("Authorization", "")]),
            ("empty Bearer", [("Authorization", "Bearer ")]),
            ("Bearer alone", [("Authorization", "Bearer")]),
            ("the beginning of a key", [("Authorization", "Bearer sk-alph")]),
            ("a key and more", [("Authorization", "Bearer sk-alphabets")]),
            ("another case", [("Authorization", "Bearer SK-ALPHA")]),
            ("a space inside", [("Authorization", "Bearer sk-alpha x")]),
            ("two in a list", [("Authorization", "Bearer sk-alpha, Bearer sk-beta")]),
            ("in quotes", [("Authorization", 'Bearer "sk-alpha"')]),
            ("Basic", [("Authorization", "Basic sk-alpha")]),
            ("Token", [("Authorization", "Token sk-alpha")]),
            ("Bearer in x-api-key", [("x-api-key", "Bearer sk-alpha")]),
            ("a label alone", [("Authorization", "Bearer :laptop")]),
            ("a semicolon", [("Authorization", "Bearer sk-alpha;laptop")]),
            ("not ASCII", [("Authorization", "Bearer sk-alph\u00e4")]),
            ("not ASCII, in the label of no key", [("Authorization", "Bearer sk-\u00e4:\u00e4")]),
            ("in api-key", [("api-key", "sk-alpha")]),
            ("in a cookie", [("Cookie", "key=sk-alpha")]),
            ("in Proxy-Authorization", [("Proxy-Authorization", "Bearer sk-alpha")]),
            ("two Authorization", [("Authorization", "Bearer sk-alpha"), ("Authorization", "Bearer sk-alpha")]),
            ("two Authorization, one wrong", [("Authorization", "Bearer x"), ("authorization", "Bearer sk-alpha")]),
            ("two Authorization beside a good one", [("x-api-key", "sk-beta"), *[("Authorization", "x")] * 2]),
        )
        for name, fields in rows:
            with self.subTest(name):
                error = self.assertRefused("invalid_api_key", self.find, *fields)
                self.assertEqual(error.status, 401)
                self.assertNotIn("sk-", error.message)

    def test_no_key_and_a_wrong_key_are_told_apart(self):
        missing = self.assertRefused("invalid_api_key", self.find).message
        wrong = self.assertRefused("invalid_api_key", self.find, ("x-api-key", "sk-gamma")).message
        self.assertIn("Authorization: Bearer", missing)
        self.assertNotEqual(missing, wrong)

    def test_without_keys_nobody_is_asked(self):
        found = plexus_lite.find_key(plexus_lite.Headers([("Authorization", "Bearer x")]), {})
        self.assertEqual((found.name, found.label, found.fields, found.models), (None, None, frozenset(), None))

    def test_a_label_cannot_forge_a_log_line(self):
        found = self.find(("Authorization", "Bearer sk-alpha:x\u00e4\u0080\t\u00c2\u0085end" + "y" * 9000))
        self.assertEqual(found.label, "x\ufffd\t\u0085end" + "y" * 57)
        record = plexus_lite.new_record(0, "req_1", "192.0.2.1")
        record.update(label=found.label, duration_ms=1.0, status=200)
        self.assertRegex(plexus_lite.render_json(record), rb"\A[\x20-\x7e]+\n\Z")
        self.assertRegex(plexus_lite.render_line(record), r"\A[\x20-\x7e]+\Z")

    def test_labels_that_are_not_ascii_stay_apart(self):
        for label in ("J\u00fcrgen", "J\u00f6rgen", "\u65e5\u672c"):
            with self.subTest(label):
                fields = ("x-api-key", f"sk-alpha:{label}".encode().decode("latin-1"))
                self.assertEqual(self.find(fields).label, label)

    def test_every_key_is_compared_in_full_whichever_fits(self):
        """What a comparison sees is as many bytes as the secret has, for each key and every guess."""
        seen = []
        for guess in ("sk-alpha", "sk-alphabet", "nothing like a key", "s"):
            with mock.patch("hmac.compare_digest", return_value=False) as compare:
                self.assertRefused("invalid_api_key", self.find, ("x-api-key", guess))
            seen.append(len(compare.call_args_list))
            wanted = {call[0][1].rstrip(b":") for call in compare.call_args_list}
            self.assertEqual(wanted, {key.secret.encode() for key in self.KEYS.values()})
        self.assertEqual(len(set(seen)), 1)
        with mock.patch("hmac.compare_digest", return_value=True) as compare:
            self.find(("x-api-key", "sk-alpha"))
        self.assertEqual(compare.call_count, seen[0])


class CheckOrigin(Refusals):
    def config(self, **settings: Any) -> plexus_lite.Config:
        value = {"providers": {"up": {"api_base_url": "http://up/v1", "models": ["m"]}}}
        return plexus_lite.parse_config(dict(value, **settings))

    def test_without_keys_what_only_a_browser_sends_is_looked_at(self):
        here: Dict[str, Any] = {"host": "127.0.0.1"}
        names = dict(here, hosts=["Gate.example"])
        open_: Dict[str, Any] = {"host": "0.0.0.0", "allow_anonymous": True}
        open_names = dict(open_, hosts=["gate.example"])
        from_here, cross_site = ("Origin", "http://localhost:3000"), ("Sec-Fetch-Site", "Cross-Site")
        keys = {"keys": {"team": {"secret": "sk-team"}}}
        rows: Sequence[Tuple[str, Mapping[str, Any], Fields, bool]] = (
            ("a program", here, [], True),
            ("Host localhost", here, [("Host", "localhost:4000")], True),
            ("Host LOCALHOST.", here, [("Host", "LOCALHOST.")], True),
            ("Host below localhost", here, [("Host", "gate.localhost:1")], True),
            ("Host 127.9.9.9", here, [("Host", "127.9.9.9")], True),
            ("Host [::1]", here, [("Host", "[::1]")], True),
            ("Host [::1]:4000", here, [("Host", "[::1]:4000")], True),
            ("Host on any port", here, [("Host", "127.0.0.1:1")], True),
            ("Host with an empty port", here, [("Host", "127.0.0.1:")], True),
            ("rebound name", here, [("Host", "evil.example:4000")], False),
            ("rebound name that begins well", here, [("Host", "127.0.0.1.evil.example")], False),
            ("rebound name that begins with localhost", here, [("Host", "localhost.evil.example")], False),
            ("rebound name that ends well", here, [("Host", "evillocalhost")], False),
            ("an address of the network", here, [("Host", "192.168.1.5:4000")], False),
            ("0.0.0.0", here, [("Host", "0.0.0.0:4000")], False),
            ("another name of ours", names, [("Host", "gate.EXAMPLE:4000")], True),
            ("below another name of ours", names, [("Host", "x.gate.example")], False),
            ("any Host on another address", open_, [("Host", "evil.example")], True),
            ("names for another address, one of them", open_names, [("Host", "gate.example:80")], True),
            ("names for another address, loopback", open_names, [("Host", "127.0.0.1:80")], True),
            ("names for another address, none of them", open_names, [("Host", "evil.example")], False),
            ("a page from here", here, [("Origin", "http://localhost:3000")], True),
            ("a page from [::1]", here, [("Origin", "http://[::1]:3000")], True),
            ("a page from a name of ours", names, [("Origin", "https://gate.example")], True),
            ("a page from elsewhere", here, [("Origin", "https://evil.example")], False),
            ("a page from elsewhere, port 4000", here, [("Origin", "http://evil.example:4000")], False),
            ("a page from a name that begins well", here, [("Origin", "http://localhost.evil.example")], False),
            ("a page from a name that ends well", here, [("Origin", "http://evil-localhost")], False),
            ("an Origin that is none", here, [("Origin", "http://evil.example#.localhost:80")], False),
            ("an Origin with a user", here, [("Origin", "http://localhost@evil.example")], False),
            ("a page without an origin", here, [("Origin", "null")], False),
            ("an empty Origin", here, [("Origin", "")], False),
            ("a file", here, [("Origin", "file://")], False),
            ("a good and a bad Origin", here, [from_here, ("Origin", "http://evil.example")], False),
            ("elsewhere, on another address", open_, [("Origin", "https://evil.example")], False),
            ("cross-site", here, [("Sec-Fetch-Site", "cross-site")], False),
            ("cross-site with an Origin from here", here, [from_here, cross_site], False),
            ("cross-site, on another address", open_, [("Sec-Fetch-Site", "cross-site")], False),
            ("same-origin", here, [("Sec-Fetch-Site", "same-origin")], True),
            ("typed into the address bar", here, [("Sec-Fetch-Site", "none")], True),
            ("an SDK on node", here, [("sec-fetch-mode", "cors")], True),
            ("with keys any Host: the key protects", keys, [("Host", "evil.example")], True),
            ("with keys any page: the key protects", keys, [("Origin", "http://evil.example"), cross_site], True),
        )
        for name, settings, fields, passes in rows:
            with self.subTest(name):
                head, config = request("POST", "/v1/responses", *fields), self.config(**settings)
                if passes:
                    plexus_lite.check_origin(head, config)
                else:
                    error = self.assertRefused("forbidden_origin", plexus_lite.check_origin, head, config)
                    self.assertEqual(error.status, 403)

    def test_the_host_of_an_absolute_target_counts(self):
        head = request("GET", "http://evil.example/v1/models", ("Host", "127.0.0.1"))
        self.assertRefused("forbidden_origin", plexus_lite.check_origin, head, self.config())

    def test_http_1_0_without_host_is_a_program(self):
        plexus_lite.check_origin(plexus_lite.read_request_head(b"GET /health HTTP/1.0\r\n\r\n"), self.config())


class SessionValue(unittest.TestCase):
    SOURCES = ["session-id", "session_id", "x-claude-code-session-id", "x-session-id", "x-session-affinity"]
    SOURCES += ["x-opencode-session", "x-grok-conv-id", "x-multi-turn-session-id"]

    def find(self, fields: Fields, members: Mapping[str, Any]) -> Tuple[Optional[str], Optional[str]]:
        session = plexus_lite.session_of(plexus_lite.Headers(fields).end_to_end(), cache_key(members))
        return session.value, session.source

    def test_the_first_that_is_present_and_not_empty_wins(self):
        members = {"prompt_cache_key": "from the body"}
        for place, name in enumerate(self.SOURCES):
            rest = [(other.upper(), "of " + other) for other in self.SOURCES[place:]]
            empty = [(other, "") for other in self.SOURCES[:place]]
            with self.subTest(name):
                self.assertEqual(self.find(rest, members), ("of " + name, name))
                self.assertEqual(self.find(rest[::-1], members), ("of " + name, name), "the order of the fields counts")
                self.assertEqual(self.find(empty + rest, members), ("of " + name, name), "an empty one counts")
        everything_empty = [(name, "") for name in self.SOURCES]
        self.assertEqual(self.find(everything_empty, members), ("from the body", "prompt_cache_key"))

    def test_what_says_nothing_about_the_conversation(self):
        fields = [("thread-id", "x"), ("thread_id", "x"), ("x-client-request-id", "x"), ("Authorization", "Bearer x")]
        fields += [("x-codex-window-id", "x"), ("x-api-key", "x"), ("Cookie", "session_id=x"), ("x-request-id", "x")]
        self.assertEqual(self.find(fields, {}), (None, None))

    def test_prompt_cache_key_is_a_string_that_is_not_empty(self):
        for value in (None, "", 5, 1.5, True, ["x"], {"x": "y"}):
            self.assertEqual(self.find([], {"prompt_cache_key": value}), (None, None), value)
        self.assertEqual(self.find([], {"prompt_cache_key": "k"}), ("k", "prompt_cache_key"))
        self.assertEqual(self.find([], {"metadata": {"prompt_cache_key": "k"}, "user": "u"}), (None, None))

    def test_a_field_that_connection_names_is_gone_before_anything_is_read(self):
        fields = [("Connection", "close, Session-Id"), ("session-id", "one"), ("session_id", "two")]
        self.assertEqual(self.find(fields, {}), ("two", "session_id"))

    def test_logs_show_twelve_hex_digits_of_it(self):
        self.assertEqual(plexus_lite.Session("abc", "session-id").digest, sha256("abc")[:12])
        self.assertIsNone(plexus_lite.Session().digest)


class Outbound(unittest.TestCase):
    """outbound_fields: what leaves for the upstream."""

    def test_what_each_client_sends_and_what_leaves(self):
        rows = [row.splitlines() for row in CLIENTS.strip("\n").split("\n\n")]
        self.assertEqual(len(rows), 32)
        for title, *lines in rows:
            name, source, key = title.replace(" = ", ", ").rsplit(", ", 2)
            inbound: List[Tuple[str, str]] = []
            leaves: List[Tuple[str, str]] = []
            for line in lines:
                fields = [(one[0], one[1]) for one in (field.split(": ", 1) for field in line[2:].split(" | "))]
                inbound += fields if line[0] in " -" else []
                leaves += fields if line[0] in " +" else []
            members = {} if key == "none" else {"prompt_cache_key": key}
            with self.subTest(name):
                self.assertEqual(outbound(inbound, members, {}), leaves)
                headers = plexus_lite.Headers(inbound).end_to_end()
                self.assertEqual(plexus_lite.session_of(headers, cache_key(members)).source or "none", source)

    def test_session_pair_and_request_id_fall_back_each_on_its_own(self):
        one, key = {"session_id": ["S"], "session-id": ["S"]}, {"prompt_cache_key": "K"}
        rows: Sequence[Tuple[str, Fields, Mapping[str, Any], Mapping[str, List[str]]]] = (
            ("nothing", [], {}, {}),
            ("a session alone", [("session-id", "S")], {}, one),
            ("a request id alone", [("x-client-request-id", "R")], {}, {"x-client-request-id": ["R"]}),
            (
                "both",
                [("session_id", "S"), ("x-client-request-id", "R")],
                {},
                dict(one, **{"x-client-request-id": ["R"]}),
            ),
            ("a key alone", [], key, {"session_id": ["K"], "session-id": ["K"], "x-client-request-id": ["K"]}),
            ("a session and a key", [("session-id", "S")], key, dict(one, **{"x-client-request-id": ["K"]})),
            (
                "a request id and a key",
                [("X-Client-Request-Id", "R")],
                key,
                {"session_id": ["K"], "session-id": ["K"], "x-client-request-id": ["R"]},
            ),
            (
                "two sessions that differ stay as they are",
                [("session_id", "A"), ("session-id", "B")],
                key,
                {"session_id": ["A"], "session-id": ["B"], "x-client-request-id": ["K"]},
            ),
            ("another name for it", [("x-session-id", "S")], {}, one),
            ("a key that is no string", [], {"prompt_cache_key": 5}, {}),
        )
        for name, inbound, members, wanted in rows:
            with self.subTest(name):
                found = only(outbound(inbound, members, {}), "session_id", "session-id", "x-client-request-id")
                self.assertEqual(found, wanted)

    def test_exactly_the_configured_spellings_leave(self):
        for spellings in (["session-id"], ["session_id"], ["session-id", "session_id"], []):
            for inbound in ([("session_id", "S")], [("Session-Id", "S")], [("session_id", "S"), ("session-id", "S")]):
                with self.subTest(spellings=spellings, inbound=inbound):
                    leaves = outbound(inbound, {"prompt_cache_key": "K"}, {"session_headers": spellings})
                    self.assertEqual(only(leaves, "session_id", "session-id"), {name: ["S"] for name in spellings})

    def test_affinity_headers_receive_the_session_value(self):
        settings = {"affinity_headers": ["x-session-affinity", "X-Sticky", "session-id"]}
        leaves = outbound([("X-Session-Affinity", "theirs"), ("session-id", "S")], {}, settings)
        found = only(leaves, "x-session-affinity", "x-sticky", "session-id", "session_id")
        wanted = {"x-session-affinity": ["theirs"], "x-sticky": ["S"], "session-id": ["S"], "session_id": ["S"]}
        self.assertEqual(found, wanted)
        self.assertEqual(only(outbound([], {}, settings), "x-session-affinity", "x-sticky"), {})
        twice = {"affinity_headers": ["x-sticky", "X-Sticky"], "session_headers": ["session-id", "session-id"]}
        leaves = outbound([], {"prompt_cache_key": "K"}, twice)
        self.assertEqual(only(leaves, "x-sticky", "session-id"), {"x-sticky": ["K"], "session-id": ["K"]})
        leaves = outbound([], {"prompt_cache_key": "x" * 65}, settings)
        self.assertEqual(only(leaves, "x-sticky"), {"x-sticky": [sha256("x" * 65)]})

    def test_an_empty_field_gives_way_to_the_value(self):
        """It says no more than none, and each request without the value is a miss."""
        inbound = [("session-id", ""), ("Session_Id", ""), ("x-session-id", "S"), ("X-Client-Request-Id", "")]
        leaves = outbound([*inbound, ("x-sticky", "")], {"prompt_cache_key": "K"}, {"affinity_headers": ["x-sticky"]})
        found = only(leaves, "session_id", "session-id", "x-client-request-id", "x-sticky")
        self.assertEqual(
            found, {"session_id": ["S"], "session-id": ["S"], "x-client-request-id": ["K"], "x-sticky": ["S"]}
        )
        self.assertEqual(only(outbound([("session-id", "")], {}, {}), "session-id"), {"session-id": [""]})

    def test_static_headers_win_over_all_and_are_never_duplicated(self):
        static = {"SESSION-ID": "fixed", "User-Agent": "gate", "authorization": "Basic eDp5", "accept-Encoding": "gzip"}
        static["X-Client-Request-ID"] = "r"
        inbound = [("session-id", "S"), ("user-agent", "a"), ("User-Agent", "b"), ("Authorization", "c"), ("X-A", "1")]
        for settings in ({}, {"auth": "passthrough"}, {"affinity_headers": ["Session-ID"]}):
            with self.subTest(settings):
                leaves = outbound(inbound, {"prompt_cache_key": "K"}, dict(settings, headers=static))
                names = [name.lower() for name, _ in leaves]
                self.assertEqual(sorted(names), sorted({"x-a", "session_id", *(name.lower() for name in static)}))
                self.assertEqual(only(leaves, "session_id"), {"session_id": ["S"]})
                for field in static.items():
                    self.assertIn(field, leaves)

    def test_a_client_s_credentials_and_account_never_leave(self):
        names = ["Authorization", "x-api-key", "api-key", "x-goog-api-key", "Cookie", "Proxy-Authorization"]
        names += ["chatgpt-account-id", "ChatGPT-Account-ID", "OpenAI-Organization", "OpenAI-Project"]
        leaves = outbound([(name, "SECRET") for name in names], {}, {})
        self.assertEqual(leaves, [("Authorization", "Bearer sk-upstream"), ("Accept-Encoding", "identity")])
        self.assertEqual(outbound([(name, "SECRET") for name in names], {}, {"api_key": None}), leaves[1:])

    def test_passthrough_sends_the_client_s_own_and_never_a_key_of_ours(self):
        keys = {"team": plexus_lite.Key("sk-team")}
        theirs = [("chatgpt-account-id", "acct"), ("Cookie", "c"), ("OpenAI-Project", "p")]
        rows: Sequence[Tuple[str, Fields, Fields]] = (
            ("no key of ours", [("Authorization", "Bearer theirs")], [("Authorization", "Bearer theirs")]),
            (
                "ours in Authorization",
                [("Authorization", "Bearer sk-team"), ("api-key", "theirs")],
                [("api-key", "theirs")],
            ),
            (
                "ours in x-api-key",
                [("X-Api-Key", "sk-team:label"), ("Authorization", "Bearer theirs")],
                [("Authorization", "Bearer theirs")],
            ),
            ("ours in both", [("Authorization", "Bearer sk-team"), ("x-api-key", "sk-team")], []),
            (
                "theirs has ours in it",
                [("x-api-key", "sk-team"), ("Authorization", "Bearer sk-teamwork"), ("api-key", "my-sk-team")],
                [("Authorization", "Bearer sk-teamwork"), ("api-key", "my-sk-team")],
            ),
            ("ours in a field of another API, too", [("x-api-key", "sk-team"), ("API-Key", "sk-team")], []),
            ("ours in both, one with a label", [("x-api-key", "sk-team:x"), ("Authorization", "sk-team")], []),
        )
        for name, inbound, kept in rows:
            with self.subTest(name):
                headers = plexus_lite.Headers(inbound)
                known = {} if name == "no key of ours" else keys
                field = plexus_lite.find_key(headers, known).fields
                leaves = outbound([*inbound, *theirs], {}, {"auth": "passthrough"}, key_fields=field)
                self.assertEqual(leaves, [*kept, *theirs, ("Accept-Encoding", "identity")])

    def test_everything_else_passes_with_order_case_and_duplicates(self):
        inbound = [("originator", "codex_exec"), ("VERSION", "1"), ("x-codex-new", "a"), ("X-Codex-New", "b")]
        inbound += [("traceparent", "00-1"), ("OpenAI-Beta", "x"), ("Content-Encoding", "gzip"), ("Forwarded", "for=a")]
        inbound += [("X-Empty", ""), ("X-Forwarded-For", "::1")]
        self.assertEqual(outbound(inbound, {}, {})[: len(inbound)], inbound)

    def test_what_belongs_to_the_connection_does_not(self):
        inbound = [("Host", "a"), ("Content-Length", "5"), ("Transfer-Encoding", "chunked"), ("Expect", "100-continue")]
        inbound += [("Connection", "x-one, close"), ("X-One", "1"), ("Keep-Alive", "5"), ("TE", "trailers")]
        inbound += [("Trailer", "X"), ("Upgrade", "h2c"), ("Proxy-Connection", "close"), ("Accept-Encoding", "br")]
        leaves = outbound(inbound, {}, {"api_key": None})
        self.assertEqual(leaves, [("Accept-Encoding", "identity")])

    def test_turn_state_leaves_only_where_it_may(self):
        inbound = [("x-codex-turn-state", "ts-1"), ("X-Codex-Turn-Metadata", "{}")]
        for keep, wanted in ((True, ["ts-1"]), (False, None)):
            found = only(outbound(inbound, {}, {}, keep_turn_state=keep), "x-codex-turn-state", "x-codex-turn-metadata")
            self.assertEqual(found.get("x-codex-turn-state"), wanted)
            self.assertEqual(found["x-codex-turn-metadata"], ["{}"])

    def test_a_decoded_body_leaves_without_its_coding(self):
        for keep, wanted in ((True, {"content-encoding": ["gzip"]}), (False, {})):
            leaves = outbound([("Content-Encoding", "gzip")], {}, {}, keep_encoding=keep)
            self.assertEqual(only(leaves, "content-encoding"), wanted)


class AddedValues(unittest.TestCase):
    """1 to 64 visible ASCII characters leave as they are, anything else as its SHA-256."""

    def added(self, value: str) -> str:
        leaves = only(outbound([], {"prompt_cache_key": value}, {}), "session_id", "session-id", "x-client-request-id")
        values = {one for values in leaves.values() for one in values}
        self.assertEqual((len(leaves), len(values)), (3, 1))
        return values.pop()

    def test_what_is_safe_stays(self):
        for value in ("x", "x" * 64, "!~", "01a20855-e041-7043-a2f4-fb54d6a14a96", 'a"b\\c', "a:b,c;d=e"):
            self.assertEqual(self.added(value), value)

    def test_what_is_not_is_hashed(self):
        rows = ["x" * 65, "two words", " x", "x ", "a\tb", "a\r\nX-Evil: 1", "a\nb", "a\0b", "\x7f", "caf\u00e9"]
        rows += ["\u4f1a\u8bdd", "\U0001f600", "\u00a0"]
        for value in rows:
            with self.subTest(value):
                self.assertEqual(self.added(value), sha256(value))
        self.assertEqual(len({self.added(value) for value in rows}), len(rows))

    def test_keys_that_differ_where_a_strip_would_make_them_one_stay_apart(self):
        values = ["a b", "ab", "a\tb", "a\nb", "a  b", "x" * 65, "x" * 66, "caf\u00e9", "caf\u00e8", "cafe"]
        self.assertEqual(len({self.added(value) for value in values}), len(values))

    def test_half_a_character_is_hashed_too(self):
        lone = json.loads('"\\ud83d"')
        self.assertRegex(self.added(lone), r"\A[0-9a-f]{64}\Z")
        self.assertNotEqual(self.added(lone), self.added(json.loads('"\\ud83e"')))

    def test_the_same_text_in_a_header_and_in_the_body_is_the_same_session(self):
        for text in ("caf\u00e9", "\u4f1a\u8bdd \U0001f600", "x" * 65, "two words", "plain"):
            with self.subTest(text):
                by_header = outbound([("x-session-id", as_header(text))], {}, {})
                by_body = outbound([], {"prompt_cache_key": text}, {})
                pair = ("session_id", "session-id")
                self.assertEqual(only(by_header, *pair), only(by_body, *pair))
                header = plexus_lite.session_of(plexus_lite.Headers([("x-session-id", as_header(text))]), None)
                body = plexus_lite.session_of(plexus_lite.Headers([]), cache_key({"prompt_cache_key": text}))
                self.assertEqual((header.value, header.digest), (body.value, body.digest))
                self.assertEqual(header.digest, sha256(text)[:12])

    def test_a_client_s_own_header_stays_as_it_came_and_only_the_added_one_is_hashed(self):
        for value in ("x" * 300, "two words", as_header("caf\u00e9")):
            for sent, added in (("session_id", "session-id"), ("session-id", "session_id")):
                with self.subTest(value[:20], sent=sent):
                    leaves = only(outbound([(sent, value)], {}, {}), sent, added)
                    self.assertEqual(leaves[sent], [value])
                    self.assertEqual(leaves[added], [hashlib.sha256(value.encode("latin-1")).hexdigest()])

    def test_what_leaves_is_a_valid_message(self):
        for value in ("a\r\nX-Evil: 1", "\u4f1a", json.loads('"\\ud83d"')):
            wire = plexus_lite.render_fields(outbound([], {"prompt_cache_key": value}, {}))
            self.assertNotIn(b"Evil", wire)
            self.assertEqual(len(plexus_lite.read_fields(wire).fields), 5)


class AnswerFields(unittest.TestCase):
    def answer(self, *fields: Tuple[str, str], renamed: Optional[Tuple[str, str]] = None) -> List[Tuple[str, str]]:
        head = plexus_lite.AnswerHead(200, "OK", 1, plexus_lite.Headers(fields))
        return plexus_lite.answer_fields(head, renamed)

    def test_what_clients_read_comes_back_as_it_came(self):
        fields = [("x-codex-turn-state", "ts-1"), ("Retry-After", "5"), ("retry-after-ms", "5000")]
        fields += [("x-ratelimit-remaining-tokens", "9"), ("X-Request-Id", "req"), ("openai-processing-ms", "3")]
        fields += [("x-should-retry", "true"), ("openai-model", "gpt"), ("x-codex-primary-used-percent", "1")]
        fields += [("x", "1"), ("X", "2"), ("Server", "s")]
        fields += [("Content-Type", "application/json"), ("Content-Encoding", "gzip"), ("Date", "x"), ("Via", "1.1 a")]
        self.assertEqual(self.answer(*fields), fields)

    def test_what_does_not(self):
        fields = [("Set-Cookie", "a=b"), ("set-cookie", "c"), ("Content-Length", "5"), ("Transfer-Encoding", "chunked")]
        fields += [("Connection", "keep-alive, X-Hop"), ("X-Hop", "1"), ("Keep-Alive", "timeout=5"), ("Trailer", "X")]
        fields += [("Upgrade", "h2"), ("Proxy-Authenticate", "Basic"), ("Proxy-Connection", "close"), ("X-End", "1")]
        self.assertEqual(self.answer(*fields), [("X-End", "1")])

    def test_a_renamed_model_is_shown_by_the_client_s_name(self):
        """Codex warns of a rerouted model when openai-model is not what it asked for."""
        fields = [("OpenAI-Model", "gpt-5.4-2026-03-01"), ("openai-model", "x"), ("openai-version", "1")]
        wanted = [("OpenAI-Model", "coder"), ("openai-model", "coder"), ("openai-version", "1")]
        self.assertEqual(self.answer(*fields, renamed=("coder", "gpt-5.4")), wanted)
        self.assertEqual(self.answer(*fields), fields)
        self.assertEqual(self.answer(("X-A", "1"), renamed=("coder", "gpt-5.4")), [("X-A", "1")])

    def test_a_model_s_name_breaks_no_answer(self):
        """A client's name travels into a header here: behind a wildcard any name will do, in any script."""
        for name in ("direct/up/x\r\nX-Evil: 1", "a\nb", "\u6a21\u578b", "caf\u00e9", " x", "", "\ud83d", "\0"):
            with self.subTest(ascii(name)):
                fields = self.answer(("openai-model", "gpt"), ("X-End", "1"), renamed=(name, "gpt"))
                wire = plexus_lite.render_fields(fields)
                read = plexus_lite.read_fields(wire).fields
                self.assertNotIn("gpt", [value for _, value in read])
                self.assertIn(("X-End", "1"), read)
                self.assertLessEqual({name.lower() for name, _ in read}, {"openai-model", "x-end"})

    def test_the_request_id_of_a_proxy_behind_us_gives_way_to_ours(self):
        self.assertEqual(self.answer(("X-Plexus-Request-Id", "req_1"), ("X-A", "1")), [("X-A", "1")])

    def test_event_streams_are_marked_for_proxies_on_the_way(self):
        added = [("Cache-Control", "no-cache, no-transform"), ("X-Accel-Buffering", "no")]
        stream = ("Content-Type", "text/event-stream")
        rows: Sequence[Tuple[str, Fields, Fields]] = (
            ("a stream", [stream], added),
            ("in capitals", [("content-type", "Text/Event-Stream")], added),
            ("with parameters", [("Content-Type", "text/event-stream ; charset=utf-8")], added),
            ("JSON", [("Content-Type", "application/json")], []),
            ("nothing", [("X-A", "1")], []),
            ("something like it", [("Content-Type", "text/event-streams")], []),
            ("Cache-Control is there", [stream, ("cache-control", "no-store")], added[1:]),
            ("X-Accel-Buffering is there", [stream, ("x-accel-buffering", "yes")], added[:1]),
        )
        for name, fields, wanted in rows:
            with self.subTest(name):
                self.assertEqual(self.answer(*fields), [*fields, *wanted])

    def test_what_connection_names_counts_as_absent(self):
        fields = [("Content-Type", "text/event-stream"), ("Connection", "cache-control"), ("Cache-Control", "no-store")]
        self.assertIn(("Cache-Control", "no-cache, no-transform"), self.answer(*fields))


class JsonMaker:
    """Random JSON documents, written as no serialiser would write them."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def space(self) -> str:
        return "".join(self.dice.choices(" \t\r\n", k=self.dice.choice((0, 0, 0, 1, 3))))

    def string(self) -> str:
        parts = ["a", "model", "\u00e4", "\U0001f600", "\u2028", "{", "}", "[", ",", ":", '\\"', "\\\\", "\\/", "\\n"]
        parts += ["\\u0000", "\\u00e4", "\\ud83d\\ude00", "\\ud83d", "\\u006dodel", '\\"model\\":', "\x7f", " "]
        return '"' + "".join(self.dice.choices(parts, k=self.dice.randrange(6))) + '"'

    def value(self, depth: int = 0) -> str:
        kind = self.dice.randrange(8 if depth < 4 else 6)
        if kind < 3:
            return self.string()
        if kind < 6:
            return self.dice.choice(("1.0", "1", "-0", "1e5", "1E+05", "0.10", "true", "false", "null", "[]", "{ }"))
        if kind == 6:
            return "[" + ",".join(self.spaced(depth) for _ in range(self.dice.randrange(1, 4))) + "]"
        return self.members([self.member(depth) for _ in range(self.dice.randrange(1, 4))])

    def spaced(self, depth: int) -> str:
        return self.space() + self.value(depth + 1) + self.space()

    def member(self, depth: int) -> str:
        name = self.dice.choice(('"model"', '"input"', self.string()))
        return self.space() + name + self.space() + ":" + self.spaced(depth)

    def members(self, members: Sequence[str]) -> str:
        return "{" + ",".join(members) + "}"

    def document(self, model: str) -> Tuple[str, str]:
        """Return what stands before and behind the value *model* of the one top-level "model"."""
        others: List[str] = []
        while len(others) < 4:
            member = self.member(0)
            if "model" not in json.loads("{" + member + "}"):
                others.append(member)
        place = self.dice.randrange(5)
        name = self.dice.choice(('"model"', '"mod\\u0065l"', '"\\u006D\\u006f\\u0064\\u0065\\u006C"'))
        before = self.space() + "{" + "".join(one + "," for one in others[:place])
        before += self.space() + name + self.space() + ":" + self.space()
        behind = self.space() + "".join("," + one for one in others[place:]) + "}" + self.space()
        return before, behind


class ReplaceModel(unittest.TestCase):
    def replace(self, raw: str, model: str) -> str:
        return plexus_lite.replace_model(plexus_lite.parse_json_body(raw.encode("utf-8")), model).decode("utf-8")

    def test_only_the_span_changes(self):
        rows = (
            ("plain", '{"model":"@","input":"x"}'),
            ("white space", ' {\r\n\t"model" \n:\t "@"  ,\n "input" : [ ] } \n'),
            ("key order", '{"z":1,"a":2,"model":"@","m":3}'),
            ("numbers", '{"a":1.0,"b":1,"c":1e5,"d":100000.0,"e":-0,"model":"@","f":1E+5,"g":0.10}'),
            ("escapes", '{"a":"\\u00e4\\/\\"","model":"@","b":"\\ud83d\\ude00"}'),
            ("beyond ASCII before and behind", '{"\u00e4\U0001f600":"\u6f22","model":"@","b":"\u00e4\u2028"}'),
            ("model inside", '{"a":{"model":"x"},"model":"@","b":[{"model":"y"}],"c":"\\"model\\":\\"z\\""}'),
            ("other members twice", '{"a":1,"a":2,"model":"@","a":3}'),
            ("an escaped name", '{"mod\\u0065l":"@"}'),
        )
        for name, text in rows:
            for old in ("gpt", "", "caf\u00e9", "x" * 300):
                for new in ("a", "org/model:tag", 'quote"\\', "\u6a21\u578b"):
                    with self.subTest(name, old=old[:9], new=new):
                        before, behind = text.split("@")
                        found = self.replace(before + old + behind, new)
                        self.assertTrue(found.startswith(before[:-1]))
                        self.assertTrue(found.endswith(behind[1:]))
                        value = found[len(before) - 1 : len(found) - len(behind) + 1]
                        self.assertEqual(json.loads(value), new)

    def test_random_documents(self):
        maker = JsonMaker(11)
        for number in range(400):
            before, behind = maker.document("gpt")
            value = maker.dice.choice(('"gpt"', '"\\u0067pt"', '"\u00e4"', '""'))
            with self.subTest(number):
                self.assertEqual(self.replace(before + value + behind, "other"), before + '"other"' + behind)

    def test_the_same_name_written_otherwise_is_still_one_span(self):
        self.assertEqual(self.replace('{"model":"\\u0067\\u0070\\u0074","b":1.0}', "gpt"), '{"model":"gpt","b":1.0}')


class Mask(unittest.TestCase):
    def test_every_occurrence_becomes_asterisks_of_the_same_length(self):
        rows: Sequence[Tuple[str, bytes, Sequence[bytes], bytes]] = (
            (
                "in a message",
                b'{"error":"no key sk-12345."}',
                [b"sk-12345"],
                b'{"error":"no key ********."}',
            ),
            ("twice", b"sk-1 and sk-1", [b"sk-1"], b"**** and ****"),
            ("two of them", b"sk-1 sk-22", [b"sk-1", b"sk-22"], b"**** *****"),
            ("nothing sent", b"sk-1", [], b"sk-1"),
            ("not there", b"sk-2", [b"sk-1"], b"sk-2"),
            ("characters of patterns", b"a.b axb", [b"a.b"], b"*** axb"),
            ("one within the other", b"sk-12345", [b"sk-1", b"sk-12345"], b"********"),
            ("bytes that are no text", b"\xff\x00sk-1\xfe", [b"sk-1"], b"\xff\x00****\xfe"),
            ("as PHP escapes", rb'{"e":"a+b\/c"}', [b"a+b/c"], b'{"e":"******"}'),
            ("as .NET escapes", rb'{"e":"a\u002Bb\u002bc"}', [b"a+b+c"], b'{"e":"%b"}' % (b"*" * 15)),
            ("a quote and a backslash", rb'{"e":"a\"b\\c"}', [rb'a"b\c'], b'{"e":"*******"}'),
            ("in a URL", b"?key=sk-1%2f%3D", [b"sk-1/="], b"?key=" + b"*" * 10),
            ("a line's end before it", rb'{"e":"\none"}', [b"none"], rb'{"e":"\none"}'.replace(b"none", b"****")),
        )
        for name, text, secrets_sent, wanted in rows:
            with self.subTest(name):
                self.assertEqual(plexus_lite.mask(text, secrets_sent), wanted)

    def test_of_a_head_values_are_masked_and_names_are_not(self):
        """Local servers take any key, and people write a word there."""
        head = plexus_lite.AnswerHead(401, "no codex", 1, plexus_lite.Headers([("x-codex-turn-state", "codex 1")]))
        masked = plexus_lite.mask_head(head, [b"codex"])
        self.assertEqual((masked.status, masked.reason), (401, "no *****"))
        self.assertEqual(masked.headers.fields, (("x-codex-turn-state", "***** 1"),))


class OwnErrors(unittest.TestCase):
    def test_statuses_are_those_of_the_contract(self):
        contract = {
            "invalid_request": 400,
            "invalid_json": 400,
            "invalid_header": 400,
            "invalid_api_key": 401,
            "model_not_allowed": 403,
            "forbidden_origin": 403,
            "not_found": 404,
            "model_not_found": 404,
            "method_not_allowed": 405,
            "request_timeout": 408,
            "websocket_not_supported": 426,
            "upstream_connection_error": 502,
            "upstream_invalid_response": 502,
            "overloaded": 503,
            "shutting_down": 503,
            "upstream_timeout": 504,
        }
        for code, status in contract.items():
            with self.subTest(code):
                error = plexus_lite.ProxyError(code, "what happened", param="model", fields=[("Allow", "GET")])
                self.assertEqual((error.status, error.code), (status, code))
                fields, body = plexus_lite.render_error(error)
                wanted = {"message": "what happened", "type": error.kind, "param": "model", "code": code}
                self.assertEqual(json.loads(body), {"error": wanted})
                self.assertIn(("x-plexus-error", code), fields)
                self.assertIn(("Allow", "GET"), fields)
                self.assertEqual("Retry-After" in dict(fields), status == 503)
        used = {status for status, _, _ in plexus_lite.ERRORS.values()}
        self.assertLessEqual({405, 408, 411, 413, 414, 415, 417, 426, 431, 501, 505}, used)

    def test_pi_retries_on_the_first_words(self):
        self.assertTrue(plexus_lite.UpstreamError("x").message.startswith("upstream connection error: "))
        self.assertEqual(plexus_lite.UpstreamError("x").status, 502)

    def test_malformed_http_is_shown_as_an_invalid_request(self):
        _, body = plexus_lite.render_error(plexus_lite.MalformedHTTP("x"))
        self.assertEqual(json.loads(body)["error"]["code"], "invalid_request")


if __name__ == "__main__":
    unittest.main()
