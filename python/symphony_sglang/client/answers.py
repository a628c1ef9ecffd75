"""What the ``/symphony`` routes answer, as typed records.

Fields that a newer server adds are passed over, and those an older one lacks have a default.
"""

from __future__ import annotations

from typing import Any

import msgspec

LIVE_STATES = frozenset({"queued", "staging", "loading", "ready"})


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one hint.

    Attributes:
        status: accepted, clipped, deferred, rejected, missing, duplicate or unsupported.
        state: queued, staging, loading or ready; at the end used, late, wasted, expired,
            cancelled, reclaimed or failed.
        tokens: by level, with ``goal``, the tokens that the hint is about.
        bytes: moved, by hop.
        timeline: each state with the seconds since receipt at which it was entered.
    """

    advisory_id: str | None = None
    action_id: str | None = None
    status: str
    reason: str = ""
    session_id: str | None = None
    worker: str = ""
    state: str = ""
    tokens: dict[str, int] = {}
    bytes: dict[str, int] = {}
    timeline: list[tuple[str, float]] = []

    @property
    def live(self) -> bool:
        """Whether something may still come of it."""
        return self.advisory_id is not None and self.state in LIVE_STATES

    @property
    def lead_seconds(self) -> float | None:
        """From receipt to the request that it was for; None before that or without one."""
        if self.state not in ("used", "late", "reclaimed") or not self.timeline:
            return None
        return self.timeline[-1][1]


class AdviseAnswer(msgspec.Struct, frozen=True):
    message_id: str
    receipts: list[Receipt]


class SessionTokens(msgspec.Struct, frozen=True):
    """Where a session's tokens are; the levels and `missing` add up to `total`."""

    total: int = 0
    device: int = 0
    host: int = 0
    nvme: int = 0
    peer: int = 0
    missing: int = 0


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """A session on its way from one worker to another."""

    move_id: str = ""
    session_id: str | None = None
    source: str = msgspec.field(name="from", default="")
    destination: str = msgspec.field(name="to", default="")
    state: str = ""
    reason: str = ""
    tokens: int = 0
    bytes: int = 0
    timeline: list[tuple[str, float]] = []


class SessionView(msgspec.Struct, frozen=True, kw_only=True):
    """One session: where it is, and what is planned for it."""

    session_id: str
    worker: str = ""
    tokens: SessionTokens = SessionTokens()
    turns: int = 0
    idle_s: float = 0.0
    advisories: list[Receipt] = []
    moves: list[Move] = []


class LevelUse(msgspec.Struct, frozen=True, kw_only=True):
    """How full one level of one worker is. Bytes and tokens are 0 where the level has none."""

    total_tokens: int = 0
    used_tokens: int = 0
    evictable_tokens: int = 0
    protected_tokens: int = 0
    total_bytes: int = 0
    used_bytes: int = 0
    protected_bytes: int = 0

    @property
    def used_share(self) -> float:
        """0 to 1, by bytes where the level counts no tokens."""
        used, total = (
            (self.used_tokens, self.total_tokens)
            if self.total_tokens
            else (self.used_bytes, self.total_bytes)
        )
        return used / total if total else 0.0


class HotPrefix(msgspec.Struct, frozen=True):
    """A prefix that many requests share, by the digest of its tokens."""

    prefix: str
    tokens: int
    requests: int


class WorkerResidency(msgspec.Struct, frozen=True, kw_only=True):
    """The levels and counters of one worker; a level that is off is None."""

    worker: str = ""
    url: str = ""
    state: str = ""
    page_size: int = 0
    levels: dict[str, LevelUse | None] = {}
    counters: dict[str, Any] = {}
    rates: dict[str, float | None] = {}
    hot_prefixes: list[HotPrefix] = []

    @property
    def advisories(self) -> dict[str, Any]:
        """Counters of advisories; empty without a host level."""
        found = self.counters.get("advisories")
        return found if isinstance(found, dict) else {}


class Residency(msgspec.Struct, frozen=True):
    """All workers behind the address that was asked; a worker answers for itself alone."""

    workers: list[WorkerResidency]
    moves: list[Move] = []
