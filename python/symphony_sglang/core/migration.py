"""A session's move from one worker to another, as a transaction: one table, no I/O, no clock.

    reserve at the target -> copy -> verify -> switch owner (new epoch) -> release at the source

The router drives it: ``step`` takes what happened and gives back what to tell which worker. Every
order can be lost, doubled or late, so orders are idempotent and repeated until answered, answers of
an earlier step are ignored, and what cannot be known is settled by epochs: the owner of a session
is the live worker that owns it under the highest epoch (``migration_log.owner_of``).

The one moment at which ownership changes is the target's own taking of SWITCH. Before it the source
is the owner and an abort costs nothing; after it the target is, and a target that is lost then is
fenced by giving the source a higher epoch still (RECLAIMING).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

INSTANCE_BITS = 16


class MoveState(StrEnum):
    """Where a move stands."""

    QUEUED = "queued"
    RESERVING = "reserving"
    COPYING = "copying"
    VERIFYING = "verifying"
    HELD = "held"  # verified, but a turn runs at the source: its pages follow first
    SWITCHING = "switching"
    RELEASING = "releasing"
    ABORTING = "aborting"
    RECLAIMING = "reclaiming"
    DONE = "done"
    ABORTED = "aborted"


ENDED = frozenset({MoveState.DONE, MoveState.ABORTED})


class MoveEvent(StrEnum):
    """What can happen to a move."""

    START = "start"
    OK = "ok"  # the order of this state was carried out
    FAILED = "failed"  # it was not, and that is final
    STALE = "stale"  # carried out, but the session grew meanwhile
    STALE_RUNNING = "stale_running"  # the same, and the turn that makes it grow still runs
    TURN_ENDED = "turn_ended"
    CANCEL = "cancel"
    DEADLINE = "deadline"
    UNANSWERED = "unanswered"  # all tries of the order
    SOURCE_LOST = "source_lost"
    TARGET_LOST = "target_lost"


class OrderKind(StrEnum):
    """What a worker is told. Each may come twice, and means the same the second time."""

    RESERVE = "reserve"  # target: make room, under a lease
    COPY = "copy"  # target: pull what is missing from the source, with the session's record
    VERIFY = "verify"  # target: is every page of the record there?
    SWITCH = "switch"  # target: you own the session, from this epoch on
    RELEASE = "release"  # source: you do not own it any more; its pages are ordinary ones
    ABORT = "abort"  # target: drop the reservation; never heard of this move again
    RECLAIM = "reclaim"  # source: you own the session again, from this higher epoch on


class Order(NamedTuple):
    """To be sent to `worker_id`; answered with the same `move_id` and `step`."""

    kind: OrderKind
    worker_id: str
    move_id: str
    session_id: str
    epoch: int
    step: int
    source_id: str = ""
    tokens: int = 0
    bytes: int = 0


_S, _E = MoveState, MoveEvent
# What each state has under way at whom; states that are not listed wait for an event. A held move
# asks for its reservation again and again: that is what renews the target's lease.
ORDERS: dict[MoveState, tuple[OrderKind, bool]] = {  # kind, whether to the target
    _S.RESERVING: (OrderKind.RESERVE, True),
    _S.COPYING: (OrderKind.COPY, True),
    _S.VERIFYING: (OrderKind.VERIFY, True),
    _S.HELD: (OrderKind.RESERVE, True),
    _S.SWITCHING: (OrderKind.SWITCH, True),
    _S.RELEASING: (OrderKind.RELEASE, False),
    _S.ABORTING: (OrderKind.ABORT, True),
    _S.RECLAIMING: (OrderKind.RECLAIM, False),
}

_GIVE_UP = {
    _E.FAILED: _S.ABORTING,
    _E.CANCEL: _S.ABORTING,
    _E.DEADLINE: _S.ABORTING,
    _E.UNANSWERED: _S.ABORTING,
    _E.TARGET_LOST: _S.ABORTED,
}
TRANSITIONS: dict[MoveState, dict[MoveEvent, MoveState]] = {
    _S.QUEUED: {
        _E.START: _S.RESERVING,
        _E.CANCEL: _S.ABORTED,
        _E.DEADLINE: _S.ABORTED,
        _E.SOURCE_LOST: _S.ABORTED,
        _E.TARGET_LOST: _S.ABORTED,
    },
    _S.RESERVING: {**_GIVE_UP, _E.OK: _S.COPYING, _E.SOURCE_LOST: _S.ABORTING},
    # With its source gone the target takes the session over with what has arrived.
    _S.COPYING: {**_GIVE_UP, _E.OK: _S.VERIFYING, _E.SOURCE_LOST: _S.SWITCHING},
    _S.VERIFYING: {
        **_GIVE_UP,
        _E.OK: _S.SWITCHING,
        _E.FAILED: _S.COPYING,  # pages were evicted meanwhile: fetch those again
        _E.STALE: _S.COPYING,
        _E.STALE_RUNNING: _S.HELD,
        _E.SOURCE_LOST: _S.SWITCHING,
    },
    _S.HELD: {
        **_GIVE_UP,
        _E.OK: _S.HELD,
        _E.TURN_ENDED: _S.COPYING,
        _E.SOURCE_LOST: _S.SWITCHING,
    },
    # Whether an unanswered target took the switch cannot be known, only overruled.
    _S.SWITCHING: {
        _E.OK: _S.RELEASING,
        _E.FAILED: _S.ABORTING,
        _E.DEADLINE: _S.RECLAIMING,
        _E.UNANSWERED: _S.RECLAIMING,
        _E.TARGET_LOST: _S.RECLAIMING,
    },
    _S.RELEASING: {
        _E.OK: _S.DONE,
        _E.FAILED: _S.DONE,
        _E.DEADLINE: _S.DONE,
        _E.UNANSWERED: _S.DONE,
        _E.SOURCE_LOST: _S.DONE,
        _E.TARGET_LOST: _S.RECLAIMING,
    },
    _S.ABORTING: {
        _E.OK: _S.ABORTED,
        _E.FAILED: _S.ABORTED,
        _E.DEADLINE: _S.ABORTED,
        _E.UNANSWERED: _S.ABORTED,  # the lease ends the reservation
        _E.TARGET_LOST: _S.ABORTED,
    },
    _S.RECLAIMING: {
        _E.OK: _S.ABORTED,
        _E.FAILED: _S.ABORTED,
        _E.DEADLINE: _S.ABORTED,
        _E.UNANSWERED: _S.ABORTED,
        _E.SOURCE_LOST: _S.ABORTED,
    },
    _S.DONE: {},
    _S.ABORTED: {},
}


class MoveCause(StrEnum):
    """Why a session moves, most urgent first."""

    DRAIN = "drain"
    DEMAND = "demand"  # a request waits for it
    REQUEST = "request"  # asked for by name
    ADVISORY = "advisory"
    BALANCE = "balance"
    WARM = "warm"


@dataclass(frozen=True, slots=True)
class MoveLimits:
    """Seconds and counts of one move."""

    deadline_seconds: float = 60.0
    answer_seconds: float = 2.0  # before an order is sent again; doubled each time
    tries_max: int = 4
    poll_seconds: float = 0.05  # between two questions how far a copy is, at first
    poll_seconds_max: float = 0.5
    renew_seconds: float = 3.0  # of the target's lease, while a turn holds the move
    copy_rounds_max: int = 4  # of a session that keeps growing, or whose pages keep going

    def __post_init__(self) -> None:
        assert self.deadline_seconds > 0, self
        assert self.answer_seconds > 0, self
        assert 0 < self.poll_seconds <= self.poll_seconds_max, self
        assert self.renew_seconds > 0, self
        assert self.tries_max > 0, self
        assert self.copy_rounds_max > 0, self


@dataclass(slots=True)
class Move:
    """One move. Only `step` and `repeat` change it."""

    move_id: str
    session_id: str
    source_id: str
    target_id: str
    cause: MoveCause
    epoch: int  # under which the target will own the session
    tokens: int
    bytes: int
    created_seconds: float
    limits: MoveLimits
    state: MoveState = MoveState.QUEUED
    reason: str = ""
    copy_rounds: int = 0
    turn_running: bool = False
    grew: bool = False  # a turn ended, or runs, since the copy under way began
    bytes_copied: int = 0
    early_requests: int = 0
    steps: int = 0  # orders so far: an answer names the one it belongs to
    tries: int = 0
    repeat_at_seconds: float = float("inf")
    ends_at_seconds: float = float("inf")
    timeline: list[tuple[MoveState, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ends_at_seconds = self.created_seconds + self.limits.deadline_seconds
        self.timeline.append((self.state, 0.0))

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def switched(self) -> bool:
        """Whether the target may own the session already."""
        return any(state is MoveState.SWITCHING for state, _ in self.timeline)

    def poll_after(self, now_seconds: float) -> float:
        """Seconds until the next question: the longer it takes already, the longer."""
        here = now_seconds - self.created_seconds - self.timeline[-1][1]
        return min(self.limits.poll_seconds_max, max(self.limits.poll_seconds, here / 8))

    @property
    def link(self) -> tuple[str, str]:
        return self.source_id, self.target_id

    def step(self, event: MoveEvent, now_seconds: float, reason: str = "") -> Order | None:
        """Take an event; the order to send for the new state, None where nothing changes.

        An event that the state does not list is of no consequence to it (a late answer, a turn that
        ends after the switch), so it is ignored.
        """
        following = TRANSITIONS[self.state].get(event)
        if following is None:
            return None
        if following is self.state:  # the lease was renewed
            self.tries = 0
            self.repeat_at_seconds = now_seconds + self.limits.renew_seconds
            return None
        if following is MoveState.COPYING:
            if self.copy_rounds >= self.limits.copy_rounds_max:
                following, reason = MoveState.ABORTING, reason or "the session keeps growing"
            else:
                self.copy_rounds += 1
                self.grew = self.turn_running
        if following in (MoveState.ABORTING, MoveState.ABORTED, MoveState.RECLAIMING):
            self.reason = self.reason or reason or event.value
        if following is MoveState.RECLAIMING:
            self.epoch = next_epoch(self.epoch, self.epoch & ((1 << INSTANCE_BITS) - 1))
        self.state = following
        self.timeline.append((following, now_seconds - self.created_seconds))
        self.steps += 1
        self.tries = 0
        if following in (MoveState.ABORTING, MoveState.RECLAIMING):
            # Tidying up has its own time: an abort because of the deadline must still be told.
            self.ends_at_seconds = now_seconds + self.limits.deadline_seconds
        return self.repeat(now_seconds)

    def repeat(self, now_seconds: float) -> Order | None:
        """The order of this state, (again); None where it has none."""
        wanted = ORDERS.get(self.state)
        if wanted is None:
            self.repeat_at_seconds = float("inf")
            return None
        self.repeat_at_seconds = now_seconds + self.limits.answer_seconds * 2**self.tries
        self.tries += 1
        kind, to_target = wanted
        return Order(
            kind=kind,
            worker_id=self.target_id if to_target else self.source_id,
            move_id=self.move_id,
            session_id=self.session_id,
            epoch=self.epoch,
            step=self.steps,
            source_id=self.source_id,
            tokens=self.tokens,
            bytes=self.bytes,
        )

    def due(self, now_seconds: float) -> MoveEvent | None:
        """DEADLINE or UNANSWERED where one of them is due."""
        if self.ended:
            return None
        if now_seconds >= self.ends_at_seconds:
            return MoveEvent.DEADLINE
        if now_seconds >= self.repeat_at_seconds and self.tries >= self.limits.tries_max:
            return MoveEvent.UNANSWERED
        return None

    def as_json(self) -> dict[str, object]:
        """The move as ``GET /symphony/moves/{id}`` answers it."""
        return {
            "move_id": self.move_id,
            "session_id": self.session_id,
            "from": self.source_id,
            "to": self.target_id,
            "state": self.state.value,
            "reason": self.reason,
            "cause": self.cause.value,
            "epoch": self.epoch,
            "tokens": self.tokens,
            "bytes": self.bytes_copied or self.bytes,
            "copy_rounds": self.copy_rounds,
            "early_requests": self.early_requests,
            "timeline": [[state.value, round(seconds, 6)] for state, seconds in self.timeline],
        }

    def check(self) -> None:
        """The timeline is a walk through the table, and epochs never fall."""
        assert self.timeline[0][0] is MoveState.QUEUED
        for (before, _), (after, _) in zip(self.timeline, self.timeline[1:], strict=False):
            reachable = {*TRANSITIONS[before].values(), MoveState.ABORTING}
            assert after in reachable, (before, after)
        assert self.timeline[-1][0] is self.state
        assert self.copy_rounds <= self.limits.copy_rounds_max
        assert (self.state in ORDERS) == (self.repeat_at_seconds < float("inf")), self


def next_epoch(epoch: int, instance: int) -> int:
    """A higher epoch that no other router makes: the counter above, the router's number below.

    A router that restarts takes another number, so an order of its former life that is still on its
    way can never name the same epoch as a new one.
    """
    assert 0 <= instance < 1 << INSTANCE_BITS, instance
    return ((epoch >> INSTANCE_BITS) + 1 << INSTANCE_BITS) | instance
