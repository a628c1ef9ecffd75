"""Moves as callers ask for them, and as they see them."""

from __future__ import annotations

from typing import Any

from symphony_sglang.core.migration import Move, MoveState
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.moves_orders import session_parts
from symphony_sglang.router.sessions import session_key

FIELDS = ("session_id", "to", "extra_key", "cache_salt")
NAME_CHARACTERS_MAX = 1024


def migrate_fields(body: Any) -> tuple[str, str]:
    """The session's key and the name of the worker in a body of ``POST /symphony/migrate``.

    Raises:
        ApiError: 400, a field is missing, unknown or wrong.
    """
    if not isinstance(body, dict):
        raise ApiError(400, "invalid_request", "body: expected a JSON object")
    for name, value in body.items():
        if name not in FIELDS:
            expected = ", ".join(FIELDS)
            raise ApiError(400, "invalid_request", f"{name[:80]}: expected one of {expected}")
        if not isinstance(value, str) or not 0 < len(value) <= NAME_CHARACTERS_MAX:
            message = f"{name}: expected a text of 1 to {NAME_CHARACTERS_MAX} characters"
            raise ApiError(400, "invalid_request", message)
    for name in ("session_id", "to"):
        if name not in body:
            raise ApiError(400, "invalid_request", f"{name}: missing")
    namespace = Namespace(body.get("extra_key"), body.get("cache_salt"))
    return session_key(body["session_id"], namespace), body["to"]


def record(move: Move) -> dict[str, Any]:
    """A move as callers see it, with the session's own id."""
    document = move.as_json()
    session = session_parts(move.session_id)
    document["session_id"] = session.session_id
    for name, value in session.namespace._asdict().items():
        if value is not None:
            document[name] = value
    return document


def durations(move: Move) -> dict[MoveState, float]:
    """Seconds in each state that the move has left."""
    spent: dict[MoveState, float] = {}
    for (state, began), (_, ended) in zip(move.timeline, move.timeline[1:], strict=False):
        spent[state] = spent.get(state, 0.0) + ended - began
    return spent
