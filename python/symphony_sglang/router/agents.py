"""A sub-agent's request advises its parent, where another worker serves the parent.

A worker that serves both does so by itself (engine/agent_hints.py).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.core import agents, parent_hints
from symphony_sglang.core.parent_hints import ParentHint
from symphony_sglang.router.background import Background
from symphony_sglang.router.http import Request
from symphony_sglang.router.placement import Placed, Placement, Subject
from symphony_sglang.router.sessions import TextHeaders, session_key

CHILD_HEADERS = frozenset(name.encode("ascii") for name in agents.CHILD_HEADERS)
CHILDREN_MAX = 65_536
# A hint outlives some requests of the child: one in the half of its life is enough.
RENEW_SECONDS = parent_hints.EXPIRES_SECONDS / 2

# Sends a hint about a session, named by its key, on behalf of a request.
Send = Callable[[Request, ParentHint, str], Coroutine[Any, Any, None]]


class ParentHints:
    """Told of every request that goes to a worker. Beyond its bound the oldest child is forgotten,
    which costs one more hint."""

    def __init__(
        self, send: Send, placement: Placement, background: Background, clock: Clock
    ) -> None:
        self._send = send
        self._placement = placement
        self._background = background
        self._clock = clock
        self._told: OrderedDict[str, float] = OrderedDict()  # child's key -> seconds

    def sent(self, request: Request, placed: Placed) -> None:
        """`request` goes to a worker; a second try tells nothing new."""
        subject = placed.subject
        if CHILD_HEADERS.isdisjoint(request.headers) or subject.route.excluded:
            return
        hint = parent_hints.parent_hint(
            subject.session_id, TextHeaders(request.headers), subject.namespace
        )
        if hint is None:
            return
        key = session_key(hint.parent_id, subject.namespace)
        place = self._placement.index.session(key)
        found = None if place is None else self._placement.registry.domain(place.worker_id)
        if found is None or found[0] is placed.worker or not self._due(subject, hint):
            return
        self._background.start(self._send(request, hint, key), "parent hint")

    def _due(self, subject: Subject, hint: ParentHint) -> bool:
        child = subject.route.session_id or ""
        now_seconds = self._clock.monotonic()
        if hint.final:
            self._told.pop(child, None)
            return True
        told_seconds = self._told.get(child)
        if told_seconds is not None and now_seconds - told_seconds < RENEW_SECONDS:
            return False
        self._told[child] = now_seconds
        self._told.move_to_end(child)
        while len(self._told) > CHILDREN_MAX:
            self._told.popitem(last=False)
        return True

    def check(self) -> None:
        assert len(self._told) <= CHILDREN_MAX
