"""Advisories of a replay: sent some time before a session's next turn, left out, or wrong.

What is drawn depends on the seed and the session alone, not on the progress of others, so that two
replays with the same rules send the same hints.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol

from symphony_sglang.errors import ServerUnavailableError

WRONG_TARGETS_MAX = 4096
FALSE_SHARE_MAX = 0.95


@dataclass(frozen=True, slots=True)
class AdviceRules:
    """Which hints are sent.

    Attributes:
        lead_seconds: before the next turn; at most its think time.
        missing_share: of turns whose hint is left out.
        false_share: of all hints sent, those that name a session which is not about to return.
        shuffled: every hint names another session than the one that returns (negative control).
        expires_seconds: how long promoted pages stay protected.
    """

    lead_seconds: float = 1.0
    missing_share: float = 0.0
    false_share: float = 0.0
    shuffled: bool = False
    expires_seconds: float = 60.0


class Asker(Protocol):
    """What an adviser needs of a client (`GenerateClient`)."""

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded JSON of a small request."""


@dataclass(slots=True)
class Adviser:
    """Sends the hints of one replay and counts how they were received."""

    client: Asker
    rules: AdviceRules
    seed: int
    statuses: Counter[str] = field(default_factory=Counter)
    sent_true: int = 0
    sent_false: int = 0
    left_out: int = 0
    # Sessions that have ended, and those known: whom a wrong hint may name.
    _ended: list[str] = field(default_factory=list)
    _known: dict[str, None] = field(default_factory=dict)

    def learn(self, session_id: str) -> None:
        """The session has had a turn."""
        self._known[session_id] = None
        if len(self._known) > WRONG_TARGETS_MAX:
            del self._known[next(iter(self._known))]

    def ended(self, session_id: str) -> None:
        """The session will not return."""
        self._known.pop(session_id, None)
        self._ended.append(session_id)
        if len(self._ended) > WRONG_TARGETS_MAX:
            del self._ended[0]

    def targets(self, session_id: str, turn: int) -> list[tuple[str, bool]]:
        """Whom to name before this turn: (session, whether it is the one that returns)."""
        rules = self.rules
        draw = random.Random(f"advice/{self.seed}/{session_id}/{turn}")
        targets: list[tuple[str, bool]] = []
        if draw.random() < rules.missing_share:
            self.left_out += 1
        elif rules.shuffled:
            targets += self._wrong(draw, session_id)
        else:
            targets.append((session_id, True))
        share = min(rules.false_share, FALSE_SHARE_MAX)
        extra = share / (1.0 - share)
        count = int(extra) + (draw.random() < extra - int(extra))
        for _ in range(count):
            targets += self._wrong(draw, session_id)
        return targets

    def _wrong(self, draw: random.Random, session_id: str) -> list[tuple[str, bool]]:
        """A session that is over, else one that is busy with something else; none at the start."""
        others = self._ended or [name for name in self._known if name != session_id]
        return [(draw.choice(others), False)] if others else []

    async def send(self, session_id: str, *, true: bool, expected_in_seconds: float) -> None:
        """One hint; what goes wrong is counted and hurts nobody."""
        if true:
            self.sent_true += 1
        else:
            self.sent_false += 1
        body = {
            "session_id": session_id,
            "expected_in_s": round(max(0.0, expected_in_seconds), 3),
            "expires_in_s": self.rules.expires_seconds,
        }
        try:
            code, answer = await self.client.ask("POST", "/symphony/advise", body)
        except ServerUnavailableError:
            self.statuses["unanswered"] += 1
            return
        receipts = answer.get("receipts") if code == 202 and isinstance(answer, dict) else None
        if not receipts:
            self.statuses[f"http_{code}"] += 1
            return
        self.statuses[str(receipts[0].get("status"))] += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "sent_true": self.sent_true,
            "sent_false": self.sent_false,
            "left_out": self.left_out,
            "statuses": dict(self.statuses),
        }


def advice_time(due: float, now: float, lead_seconds: float) -> float:
    """When to send a hint for a turn that is due: `lead_seconds` before, but not in the past."""
    return max(now, due - lead_seconds)
