"""A sub-agent's request advises its parent, where both are served by this worker."""

from __future__ import annotations

from typing import Any

from symphony_sglang.core import parent_hints
from symphony_sglang.core.prefix import Namespace


def advise_parent(obj: Any, request: Any, namespace: Namespace, carry_out: Any) -> None:
    """Advise the parent of a request's session, if its headers name one.

    `carry_out` takes a message and sends it without making the request wait. The caller's budget
    applies. A parent that another worker serves is the router's to advise.
    """
    session_id = getattr(obj, "session_id", None)
    hint = parent_hints.parent_hint(session_id, request.headers, namespace)
    if hint is None:
        return
    from symphony_sglang.engine.routes import service

    advise = service(request)
    if not advise.config.implicit_hints:
        return
    carry_out(hint.message)
    if advise.metrics is not None:
        advise.metrics.implied(parent_hints.CAUSE)
