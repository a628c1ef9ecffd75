"""The session, in one line, for calls of the OpenAI client; neither imports it.

client.chat.completions.create(model=..., messages=..., **session_options("s1"))
client = bind(OpenAI(base_url=...), "s1")
"""

from __future__ import annotations

from typing import Any, TypeVar

from symphony_sglang.client.protocol import SESSION_HEADER, action, envelope, timing

T = TypeVar("T")


def session_options(
    session_id: str,
    *,
    returns_in_s: float | None = None,
    expires_in_s: float | None = None,
    retain_s: float | None = None,
) -> dict[str, Any]:
    """Keyword arguments that make a ``create`` call a turn of the session.

    With `returns_in_s` a hint rides along: when this turn ends, the next one is expected in so
    many seconds. With `retain_s` the turn's KV is asked to stay for so long.
    """
    body: dict[str, Any] = {"session_id": session_id}
    actions = []
    if returns_in_s is not None:
        times = timing(expected_in_s=returns_in_s, expires_in_s=expires_in_s)
        actions.append(action("prefetch", times))
    if retain_s is not None:
        actions.append(action("retain", timing(expires_in_s=retain_s)))
    if actions:
        body["kv_hints"] = envelope(actions)
    return {"extra_body": body, "extra_headers": {SESSION_HEADER: session_id}}


def bind(client: T, session_id: str) -> T:
    """A copy of an ``OpenAI`` or ``AsyncOpenAI`` client whose every call is of the session."""
    bound: T = client.with_options(  # type: ignore[attr-defined]
        default_headers={SESSION_HEADER: session_id}
    )
    return bound
