"""Hints that nobody writes: a sub-agent's request says that its parent will be back.

While the sub-agent works, its parent's KV is asked to stay within reach, on the host level. At the
sub-agent's last request, the parent's turn is next: to the device. The caller's budget applies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from symphony_sglang.core import agents, hints
from symphony_sglang.core.levels import Target
from symphony_sglang.core.prefix import Namespace

ACTION_ID = "implicit:parent"
# A sub-agent asks again within this, which renews the hint; one that is silent longer is lost.
EXPIRES_SECONDS = 300.0
RETURN_SECONDS = 60.0
# Below what a caller asks for by name.
PRIORITY = -1


def parent_message(
    session_id: str | None, headers: Mapping[str, str], namespace: Namespace
) -> hints.HintMessage | None:
    """What a request of `session_id` says of its parent; None where it has none."""
    if session_id is None:
        return None
    longest = hints.HintLimits().id_characters_max
    parent_id = agents.find_parent_id(session_id, headers, longest)
    if parent_id is None:
        return None
    final = agents.is_final(headers)
    prefetch = hints.Prefetch(
        selector=hints.Selector(session_id=parent_id, namespace=namespace),
        target=Target.DEVICE if final else Target.HOST,
        expected_in_seconds=0.0 if final else None,
        expires_in_seconds=RETURN_SECONDS if final else EXPIRES_SECONDS,
        priority=PRIORITY,
    )
    return hints.HintMessage(None, (hints.Hint(ACTION_ID, prefetch),))


def advise_parent(obj: Any, request: Any, namespace: Namespace, carry_out: Any) -> None:
    """Advise the parent of a request's session, if its headers name one.

    `carry_out` takes a message and sends it without making the request wait.
    """
    message = parent_message(getattr(obj, "session_id", None), request.headers, namespace)
    if message is None:
        return
    from symphony_sglang.engine.routes import service

    if service(request).config.implicit_hints:
        carry_out(message)
