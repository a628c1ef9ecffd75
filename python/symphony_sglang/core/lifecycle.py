"""The life of one advisory: its states as one table, its record, and the receipt callers see."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

from symphony_sglang.core.levels import Hop, Target
from symphony_sglang.core.prefix import Prefix
from symphony_sglang.errors import IllegalTransitionError

TIMELINE_MAX = 32


class Status(StrEnum):
    """What the worker made of the hint."""

    ACCEPTED = "accepted"
    CLIPPED = "clipped"
    DEFERRED = "deferred"
    REJECTED = "rejected"
    MISSING = "missing"
    DUPLICATE = "duplicate"
    UNSUPPORTED = "unsupported"


class State(StrEnum):
    """Where an advisory is in its life; the last seven are final."""

    QUEUED = "queued"
    STAGING = "staging"
    LOADING = "loading"
    READY = "ready"
    USED = "used"
    LATE = "late"
    WASTED = "wasted"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    RECLAIMED = "reclaimed"
    FAILED = "failed"


LIVE_STATES = (State.QUEUED, State.STAGING, State.LOADING, State.READY)
FINAL_STATES = tuple(state for state in State if state not in LIVE_STATES)


class Event(StrEnum):
    """What can happen to an advisory."""

    STAGE = "stage"  # its first NVMe-to-host move of a run began
    LOAD = "load"  # a host-to-device move began and nothing is left to stage
    FINISH = "finish"  # all it aims for is at its target
    YIELD = "yield"  # running work took its protection; it may try again
    USE = "use"  # its request came and found what was promised
    MISS = "miss"  # its request came first
    LAPSE = "lapse"  # it expired, or was of no use, and nothing had been moved for it
    WASTE = "waste"  # the same, after bytes were moved
    CANCEL = "cancel"
    RECLAIM = "reclaim"  # its memory went to something more important, for good
    FAIL = "fail"


ENDINGS = {
    Event.USE: State.USED,
    Event.MISS: State.LATE,
    Event.LAPSE: State.EXPIRED,
    Event.WASTE: State.WASTED,
    Event.CANCEL: State.CANCELLED,
    Event.RECLAIM: State.RECLAIMED,
    Event.FAIL: State.FAILED,
}
NEXT: dict[tuple[State, Event], State] = {
    (State.QUEUED, Event.STAGE): State.STAGING,
    (State.QUEUED, Event.LOAD): State.LOADING,
    (State.QUEUED, Event.FINISH): State.READY,
    (State.STAGING, Event.LOAD): State.LOADING,
    (State.STAGING, Event.FINISH): State.READY,
    (State.STAGING, Event.YIELD): State.QUEUED,
    (State.LOADING, Event.STAGE): State.STAGING,
    (State.LOADING, Event.FINISH): State.READY,
    (State.LOADING, Event.YIELD): State.QUEUED,
    (State.READY, Event.YIELD): State.QUEUED,
    # A live advisory can end in any way; ready is never late, its loss is called by name.
    **{
        (state, event): end
        for state in LIVE_STATES
        for event, end in ENDINGS.items()
        if (state, event) != (State.READY, Event.MISS)
    },
}


def advance(state: State, event: Event) -> State:
    """The state after `event`.

    Raises:
        IllegalTransitionError: the pair is not in the table.
    """
    try:
        return NEXT[state, event]
    except KeyError:
        raise IllegalTransitionError(
            f"{event.value!r} is not legal in state {state.value!r}"
        ) from None


class Kind(StrEnum):
    """`prefetch` moves and protects; `retain` only protects what is already there."""

    PREFETCH = "prefetch"
    RETAIN = "retain"


@dataclass(frozen=True, slots=True)
class AdviseRequest:
    """One hint as the scheduler sees it, whatever wire it came over.

    `identity` names the prefix: equal identity, target and kind is the same advisory.
    `advisory_id` is chosen by the HTTP process, so that all ranks have the same.
    """

    advisory_id: str
    identity: str
    session_id: str | None = None
    action_id: str | None = None
    kind: Kind = Kind.PREFETCH
    target: Target = Target.DEVICE
    expected_in_seconds: float | None = None
    expires_in_seconds: float = 60.0
    priority: int = 0
    caller: str = ""


class TimelineEntry(NamedTuple):
    state: State
    seconds: float  # since receipt


@dataclass(frozen=True, slots=True)
class Receipt:
    """What the caller is told; `as_json` is the record of design.md §4, less `worker`."""

    advisory_id: str
    action_id: str | None
    status: Status
    reason: str
    session_id: str | None
    state: State
    tokens: dict[str, int]
    bytes: dict[str, int]
    timeline: tuple[TimelineEntry, ...]

    def as_json(self, worker: str) -> dict[str, Any]:
        return {
            "advisory_id": self.advisory_id,
            "action_id": self.action_id,
            "status": self.status.value,
            "reason": self.reason,
            "session_id": self.session_id,
            "worker": worker,
            "state": self.state.value,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "timeline": [[entry.state.value, round(entry.seconds, 6)] for entry in self.timeline],
        }


@dataclass(frozen=True, slots=True)
class AdvisoryView:
    """One live advisory as the planner sees it; token counts are lengths from the start."""

    advisory_id: str
    arrival: int
    kind: Kind
    target: Target
    state: State
    priority: int
    received_seconds: float
    deadline_seconds: float | None
    not_before_seconds: float
    goal_tokens: int
    device_tokens: int | None  # None: not looked up yet
    host_tokens: int  # present on host and not on device
    storage_end_tokens: int | None  # where the stored prefix ends, once known
    started: bool  # a move was begun for it
    staging: bool
    loading: bool

    @property
    def upper_tokens(self) -> int:
        """Length of the prefix that is on device or host."""
        return (self.device_tokens or 0) + self.host_tokens


@dataclass(slots=True)
class Advisory:
    """The book's record. Only the book writes it."""

    request: AdviseRequest
    arrival: int
    received_seconds: float
    expires_seconds: float
    deadline_seconds: float | None
    priority: int
    prefix: Prefix | None
    total_tokens: int
    goal_tokens: int
    status: Status = Status.ACCEPTED
    reason: str = ""
    state: State = State.QUEUED
    device_tokens: int | None = None
    host_tokens: int = 0
    storage_end_tokens: int | None = None
    not_before_seconds: float = 0.0
    yields: int = 0
    retries: int = 0
    uses: int = 0
    coalesced: int = 0
    started: bool = False
    staging: bool = False
    loading: bool = False
    moved_tokens: dict[Hop, int] = field(default_factory=dict)
    moved_bytes: dict[Hop, int] = field(default_factory=dict)
    timeline: list[TimelineEntry] = field(default_factory=list)
    ready_seconds: float | None = None
    ended_seconds: float | None = None
    view: AdvisoryView | None = None  # cached; None after every change

    @property
    def advisory_id(self) -> str:
        return self.request.advisory_id

    @property
    def live(self) -> bool:
        return self.state in LIVE_STATES

    @classmethod
    def receive(
        cls,
        request: AdviseRequest,
        arrival: int,
        prefix: Prefix | None,
        goal_tokens: int,
        now_seconds: float,
    ) -> Advisory:
        expected = request.expected_in_seconds
        return cls(
            request=request,
            arrival=arrival,
            received_seconds=now_seconds,
            expires_seconds=now_seconds + request.expires_in_seconds,
            deadline_seconds=None if expected is None else now_seconds + expected,
            priority=request.priority,
            prefix=prefix,
            total_tokens=0 if prefix is None else prefix.tokens,
            goal_tokens=goal_tokens,
        )

    @property
    def at_target_tokens(self) -> int:
        """Head of the prefix that is where the advisory wants it."""
        on_host = self.host_tokens if self.request.target is Target.HOST else 0
        return (self.device_tokens or 0) + on_host

    @property
    def staged(self) -> bool:
        """Nothing of the goal is left on NVMe, or on its way from there."""
        upper = (self.device_tokens or 0) + self.host_tokens
        return upper >= self.goal_tokens and not self.staging

    @property
    def unused_event(self) -> Event:
        """How it ends when nobody came for it."""
        if self.request.kind is Kind.RETAIN and self.uses:
            return Event.USE
        return Event.WASTE if any(self.moved_tokens.values()) else Event.LAPSE

    def mark_flight(self, hop: Hop, flying: bool) -> None:
        if hop is Hop.NVME_TO_HOST:
            self.staging = flying
        else:
            self.loading = flying
        self.view = None

    def apply(self, event: Event, now_seconds: float) -> None:
        """Go on to the state that the table gives for `event`."""
        self.enter(advance(self.state, event), now_seconds)

    def enter(self, state: State, now_seconds: float) -> None:
        """Write the state and its time down; a full timeline loses its newest middle entry."""
        self.state = state
        self.view = None
        if len(self.timeline) >= TIMELINE_MAX:
            del self.timeline[-1]
        self.timeline.append(TimelineEntry(state, max(0.0, now_seconds - self.received_seconds)))

    def as_view(self) -> AdvisoryView:
        if self.view is None:
            self.view = AdvisoryView(
                advisory_id=self.request.advisory_id,
                arrival=self.arrival,
                kind=self.request.kind,
                target=self.request.target,
                state=self.state,
                priority=self.priority,
                received_seconds=self.received_seconds,
                deadline_seconds=self.deadline_seconds,
                not_before_seconds=self.not_before_seconds,
                goal_tokens=self.goal_tokens,
                device_tokens=self.device_tokens,
                host_tokens=self.host_tokens,
                storage_end_tokens=self.storage_end_tokens,
                started=self.started,
                staging=self.staging,
                loading=self.loading,
            )
        return self.view

    def token_counts(self) -> dict[str, int]:
        """Tokens by where they are; `unknown` until NVMe has answered for them."""
        device = self.device_tokens or 0
        upper = min(self.total_tokens, device + self.host_tokens)
        end = self.storage_end_tokens
        below = self.total_tokens - upper
        nvme = 0 if end is None else max(0, min(end, self.total_tokens) - upper)
        return {
            "total": self.total_tokens,
            "goal": self.goal_tokens,
            "device": device,
            "host": upper - device,
            "nvme": nvme,
            "peer": 0,
            "missing": 0 if end is None else below - nvme,
            "unknown": below if end is None else 0,
        }

    def receipt(self, status: Status | None = None) -> Receipt:
        """The record as its caller may see it; `status` stands in for the recorded one."""
        return Receipt(
            advisory_id=self.request.advisory_id,
            action_id=self.request.action_id,
            status=self.status if status is None else status,
            reason=self.reason,
            session_id=self.request.session_id,
            state=self.state,
            tokens=self.token_counts(),
            bytes={hop.value: self.moved_bytes.get(hop, 0) for hop in Hop},
            timeline=tuple(self.timeline),
        )


class Ended(NamedTuple):
    """An advisory that reached its final state, for the outcome ledger."""

    advisory_id: str
    state: State
    kind: Kind
    caller: str
    total_tokens: int
    moved_tokens: int
    lead_seconds: float  # receipt to end
    ready_seconds: float | None  # receipt to ready, where it was ready at its end


@dataclass(frozen=True, slots=True)
class BookLimits:
    """Bounds of the book; each names what happens beyond it."""

    live_max: int = 1024  # then `rejected`, reason book_full, unless a lower priority can go
    held_bytes_max: int = 256 * 2**20  # token ids of live prefixes; then book_full
    finished_max: int = 10_000  # then the oldest receipt is forgotten
    yields_max: int = 2  # times an advisory is tried again after giving way; then `reclaimed`
    retries_max: int = 6  # declined moves in a row; then clipped to what is there
    errors_max: int = 1  # failed moves that are tried again
    backoff_seconds: float = 0.05  # doubles per retry in a row
    backoff_max_seconds: float = 1.0


def check_timeline(timeline: Iterable[TimelineEntry]) -> None:
    """Times never go back, and only the last state is final."""
    entries = list(timeline)
    assert entries
    assert all(a.seconds <= b.seconds for a, b in itertools.pairwise(entries))
    assert all(entry.state not in FINAL_STATES for entry in entries[:-1])
