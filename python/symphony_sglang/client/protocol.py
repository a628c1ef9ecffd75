"""Requests and answers without I/O: what both clients send, and what they make of what comes."""

from __future__ import annotations

import ssl
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import msgspec

from symphony_sglang.client.answers import Residency, WorkerResidency
from symphony_sglang.errors import (
    ClientError,
    ConfigError,
    NotAuthorizedError,
    NotKnownError,
    RequestRefusedError,
    ServerUnavailableError,
    TooManyHintsError,
)

PROTOCOL_VERSION = "0.1"
ACTION_VERSION = "1"
SHOWN_CHARACTERS = 500
TIMEOUT_SECONDS = 10.0
SESSION_HEADER = "X-Session-ID"

T = TypeVar("T")


def base_url(url: str) -> str:
    """`url` without a slash at its end.

    Raises:
        ConfigError: it is not an HTTP address.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"url is {url!r}; expected http://host:port")
    return url.rstrip("/")


def tls_context(ca_file: str | None) -> ssl.SSLContext | bool:
    """What httpx verifies with: the certificates of a file, or the usual ones."""
    return True if ca_file is None else ssl.create_default_context(cafile=ca_file)


def auth_headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def segment(name: str) -> str:
    """`name` as one segment of a path, whatever it holds."""
    # HTTP libraries resolve the segments "." and "..", but not their escaped forms.
    return quote(name, safe="").replace(".", "%2E")


def session_path(session_id: str) -> str:
    return f"/symphony/sessions/{segment(session_id)}"


def advisory_path(advisory_id: str) -> str:
    return f"/symphony/advisories/{segment(advisory_id)}"


def move_path(move_id: str) -> str:
    return f"/symphony/moves/{segment(move_id)}"


def selector(
    session_id: str | None = None,
    *,
    input_ids: Sequence[int] | None = None,
    text: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    extra_key: str | None = None,
    cache_salt: str | None = None,
) -> dict[str, Any]:
    """The fields that say which prefix is meant; the server checks that exactly one is given."""
    fields = {
        "session_id": session_id,
        "input_ids": None if input_ids is None else list(input_ids),
        "text": text,
        "messages": None if messages is None else list(messages),
        "extra_key": extra_key,
        "cache_salt": cache_salt,
    }
    return {name: value for name, value in fields.items() if value is not None}


def timing(
    *,
    expected_in_s: float | None = None,
    expires_in_s: float | None = None,
    priority: int | None = None,
    target: str | None = None,
) -> dict[str, Any]:
    """The fields that say when and how much it matters; absent ones have the server's default."""
    fields = {
        "expected_in_s": expected_in_s,
        "expires_in_s": expires_in_s,
        "priority": priority,
        "target": target,
    }
    return {name: value for name, value in fields.items() if value is not None}


def action(action_type: str, payload: Mapping[str, Any], action_id: str | None = None) -> Any:
    """One action of an envelope. SGLang asks for an id on requests, so there is always one."""
    return {
        "action_id": action_id or f"act-{uuid.uuid4().hex}",
        "action_type": action_type,
        "action_version": ACTION_VERSION,
        "payload": dict(payload),
    }


def envelope(actions: Sequence[Any], message_id: str | None = None) -> dict[str, Any]:
    """The ``kv_hints`` envelope, for ``POST /symphony/advise`` or to ride on a request."""
    return {
        "protocol_version": PROTOCOL_VERSION,
        "message_id": message_id or f"msg-{uuid.uuid4().hex}",
        "actions": list(actions),
    }


def decode(
    method: str, url: str, status: int, content: bytes, headers: Mapping[str, str], kind: type[T]
) -> T:
    """The answer as `kind`.

    Raises:
        ClientError: the server refused; the subclass says how.
        ServerUnavailableError: it failed (5xx), or answered with something else than `kind`.
    """
    if not 200 <= status < 300:
        raise refusal(method, url, status, content, headers)
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ServerUnavailableError(f"{method} {url} answered with no {kind}: {error}") from error


def refusal(
    method: str, url: str, status: int, content: bytes, headers: Mapping[str, str]
) -> ClientError | ServerUnavailableError:
    """The error that an HTTP status of 300 or more stands for, with the server's own words."""
    message = f"{method} {url} answered {status}: {words_of(content)}"
    if status in (401, 403):
        return NotAuthorizedError(message, status)
    if status == 404:
        return NotKnownError(message, status)
    if status == 429:
        return TooManyHintsError(message, status, retry_after(headers))
    if status >= 500:
        return ServerUnavailableError(message)
    return RequestRefusedError(message, status)


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds to wait by the ``Retry-After`` header; 1 where it says nothing readable."""
    given = next((value for name, value in headers.items() if name.lower() == "retry-after"), "")
    return float(given) if given.isdecimal() else 1.0


def words_of(content: bytes) -> str:
    """The message inside an error body: FastAPI's ``detail``, or SGLang's ``error``."""
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return content[:SHOWN_CHARACTERS].decode(errors="replace")
    for name in ("detail", "error", "message"):
        if isinstance(body, dict) and name in body:
            found = body[name]
            if isinstance(found, dict):
                found = found.get("message", found)
            return str(found)[:SHOWN_CHARACTERS]
    return str(body)[:SHOWN_CHARACTERS]


def parse_residency(body: Any, url: str) -> Residency:
    """A worker's own residency as one entry, a router's as one entry a worker.

    Raises:
        ServerUnavailableError: the body is neither.
    """
    try:
        if not isinstance(body, dict):
            raise msgspec.ValidationError(f"a {type(body).__name__}; expected an object")
        workers = body.get("workers")
        if workers is None:
            # `worker` is the name that a receipt uses; here a worker speaks for itself.
            one = msgspec.convert({"url": url, **body}, WorkerResidency)
            return Residency([one])
        if isinstance(workers, dict):
            workers = [{"worker": name, **entry} for name, entry in workers.items()]
        return msgspec.convert({"workers": workers, "moves": body.get("moves", [])}, Residency)
    except (msgspec.ValidationError, TypeError) as error:
        raise ServerUnavailableError(f"GET {url}/symphony/residency: {error}") from error
