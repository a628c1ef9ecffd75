"""Who owns a session, from what the workers did: the judge of "one owner at every instant"."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple


class OwnershipEvent(StrEnum):
    """What changes who owns a session."""

    OWNS = "owns"  # a worker took it under an epoch, or came back with it
    KNOWS = "knows"  # it has a copy of the session's record, and never owned it
    RELEASED = "released"  # a worker keeps its pages, but is no owner any more
    GONE = "gone"  # a worker died, forgot the session, or cannot be reached


class OwnershipEntry(NamedTuple):
    """`epoch`: under which a worker OWNS, or which it was told to give way to (RELEASED)."""

    seconds: float
    event: OwnershipEvent
    session_id: str
    worker_id: str
    epoch: int
    turns: int = 0


class Claim(NamedTuple):
    """What a live worker says of a session. Ordered: the greatest claim is the owner's.

    Epoch 0 is that of a session that never moved. Several workers can have served one (its owner
    could not be reached for a while): then the one that knows the most turns owns it.
    """

    owns: bool
    epoch: int
    turns: int
    worker_id: str


def owner_of(claims: Iterable[Claim]) -> Claim | None:
    """The owner among the live workers that know a session: the highest epoch.

    A worker that released the session can take it again only where no other owns it.
    """
    return max(claims, default=None)


class OneOwnerError(AssertionError):
    """Two workers own a session under one epoch, or one gave way to an epoch that nobody took."""


class OwnershipLog:
    """Replays entries in order and raises at the first instant at which the owner is in doubt.

    A session has no owner before its first entry, and while every worker that knew it is gone.
    """

    def __init__(self) -> None:
        self._claims: dict[str, dict[str, Claim]] = {}
        self._taken: dict[tuple[str, int], str] = {}
        self.entries = 0

    def add(self, entry: OwnershipEntry) -> None:
        self.entries += 1
        session_id, worker_id, epoch = entry.session_id, entry.worker_id, entry.epoch
        claims = self._claims.setdefault(session_id, {})
        if entry.event is OwnershipEvent.GONE:
            claims.pop(worker_id, None)
            return
        owns = entry.event is OwnershipEvent.OWNS
        if owns and epoch > 0:
            first = self._taken.setdefault((session_id, epoch), worker_id)
            if first != worker_id:
                raise OneOwnerError(
                    f"session {session_id}: {first} and {worker_id} both own it under "
                    f"epoch {epoch:#x}"
                )
        released = entry.event is OwnershipEvent.RELEASED
        if released and (session_id, epoch) not in self._taken:
            raise OneOwnerError(
                f"session {session_id}: {worker_id} gave way at {entry.seconds:.6f} s to epoch "
                f"{epoch:#x}, which nobody took"
            )
        claims[worker_id] = Claim(owns, epoch, entry.turns, worker_id)

    def owner(self, session_id: str) -> Claim | None:
        """The owner now; None where no live worker knows the session."""
        return owner_of(self._claims.get(session_id, {}).values())

    def claims(self, session_id: str) -> Mapping[str, Claim]:
        return self._claims.get(session_id, {})
