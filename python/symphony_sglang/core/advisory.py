"""The book of advisories: who asked for what, how far it is, and what became of it.

Every tensor-parallel rank keeps its own book and feeds it the same calls in the same order, so all
books are equal: time is rank 0's broadcast clock, ids come with the requests, and nothing depends
on hashing, chance or set order.
"""

from __future__ import annotations

from collections import OrderedDict, deque

from symphony_sglang.core.advisory_index import AdvisoryIndex
from symphony_sglang.core.levels import Hop, Target, page_floor
from symphony_sglang.core.lifecycle import (
    AdviseRequest,
    Advisory,
    AdvisoryView,
    BookLimits,
    Ended,
    Event,
    Kind,
    Receipt,
    State,
    Status,
    check_timeline,
)
from symphony_sglang.core.moves import Move, MoveResult, Reason
from symphony_sglang.core.prefix import Namespace, Prefix


class AdvisoryBook:
    """All live advisories, and the receipts of those that ended.

    ::

                    ┌──────────────── yield ────────────────┐
                    ▼                   ▲                   │
        advise ─► queued ── stage ─► staging ── finish ───► ready
                    │ │                ▲ │ load              ▲
                    │ └─── load ───► stage ▼                 │
                    │              loading ──── finish ──────┘
                    └── finish (all was there already) ──────┘

        any live state ── use | lapse | waste | cancel | reclaim | fail ─► final
        queued, staging, loading ── miss ─► late

    The table is `lifecycle.NEXT`; an unlisted pair raises.
    """

    def __init__(self, page_size: int, limits: BookLimits | None = None) -> None:
        assert page_size > 0, page_size
        self.page_size = page_size
        self.limits = BookLimits() if limits is None else limits
        self._live = AdvisoryIndex()
        self._finished: OrderedDict[str, Advisory] = OrderedDict()
        self._flight: dict[tuple[str, Hop], tuple[Move, Advisory]] = {}
        # Drained once a step; where nobody drains, the oldest are forgotten.
        self._ended: deque[Ended] = deque(maxlen=self.limits.finished_max)
        self._arrivals = 0
        # No live advisory expires before this: a tick without expiry costs one comparison.
        self._expiry_floor_seconds = float("inf")

    def __len__(self) -> int:
        return len(self._live)

    # Receiving ---------------------------------------------------------------------------------

    def advise(self, request: AdviseRequest, prefix: Prefix | None, now_seconds: float) -> Receipt:
        """Enter a hint. `prefix` is what it resolved to, None where the session is unknown.

        The receipt's status is one of accepted, duplicate, missing, rejected. A duplicate (same
        identity, target and kind as a live one) gives the live one its deadline, expiry and
        priority, and answers with the live one's id: storms cost one lookup each.
        """
        if self.get(request.advisory_id) is not None:
            return self.note(request, Status.REJECTED, Reason.ID_IN_USE, now_seconds, keep=False)
        if prefix is None:
            return self.note(request, Status.MISSING, Reason.UNKNOWN_SESSION, now_seconds)
        twin = self._live.twin(request)
        if twin is not None:
            return self._refresh(twin, request, now_seconds)
        goal_tokens = page_floor(prefix.tokens, self.page_size)
        if not goal_tokens:
            return self.note(request, Status.REJECTED, Reason.SHORTER_THAN_PAGE, now_seconds)
        if not self._make_room(request, len(prefix.token_bytes), now_seconds):
            return self.note(request, Status.REJECTED, Reason.BOOK_FULL, now_seconds)
        advisory = self._record(request, prefix, goal_tokens, now_seconds)
        advisory.enter(State.QUEUED, now_seconds)
        self._live.add(advisory)
        self._expiry_floor_seconds = min(self._expiry_floor_seconds, advisory.expires_seconds)
        return advisory.receipt()

    def note(
        self,
        request: AdviseRequest,
        status: Status,
        reason: str,
        now_seconds: float,
        state: State = State.FAILED,
        *,
        keep: bool = True,
    ) -> Receipt:
        """The receipt of a hint that has no life of its own: refused, or done at once."""
        advisory = self._record(request, None, 0, now_seconds)
        advisory.status, advisory.reason = status, reason
        advisory.enter(state, now_seconds)
        advisory.ended_seconds = now_seconds
        if keep:
            self._file(advisory)
        return advisory.receipt()

    def _record(
        self, request: AdviseRequest, prefix: Prefix | None, goal_tokens: int, now_seconds: float
    ) -> Advisory:
        self._arrivals += 1
        return Advisory.receive(request, self._arrivals, prefix, goal_tokens, now_seconds)

    def _refresh(self, twin: Advisory, request: AdviseRequest, now_seconds: float) -> Receipt:
        """The latest word wins; the place in the arrival order stays."""
        twin.expires_seconds = now_seconds + request.expires_in_seconds
        if request.expected_in_seconds is not None:
            twin.deadline_seconds = now_seconds + request.expected_in_seconds
        twin.priority = request.priority
        twin.coalesced += 1
        twin.view = None
        self._expiry_floor_seconds = min(self._expiry_floor_seconds, twin.expires_seconds)
        return twin.receipt(Status.DUPLICATE)

    def _make_room(self, request: AdviseRequest, token_bytes: int, now_seconds: float) -> bool:
        """True when the newcomer fits, at most by ending one queued advisory of lower priority."""
        limits = self.limits
        bytes_short = self._live.held_bytes + token_bytes - limits.held_bytes_max
        if len(self._live) < limits.live_max and bytes_short <= 0:
            return True
        idle = [
            advisory
            for advisory in self._live.values()
            if advisory.state is State.QUEUED and advisory.priority < request.priority
        ]
        if not idle:
            return False
        victim = min(idle, key=lambda advisory: (advisory.priority, -advisory.arrival))
        assert victim.prefix is not None
        if len(victim.prefix.token_bytes) < bytes_short:
            return False
        victim.reason = Reason.DISPLACED
        self._end(victim, Event.RECLAIM, now_seconds)
        return True

    # Ending ------------------------------------------------------------------------------------

    def tick(self, now_seconds: float) -> tuple[str, ...]:
        """End what has expired; returns the ids, in arrival order."""
        if now_seconds < self._expiry_floor_seconds:
            return ()
        due = [a for a in self._live.values() if a.expires_seconds <= now_seconds]
        for advisory in due:
            self._end(advisory, advisory.unused_event, now_seconds)
        self._expiry_floor_seconds = min(
            (a.expires_seconds for a in self._live.values()), default=float("inf")
        )
        return tuple(advisory.advisory_id for advisory in due)

    def cancel(self, advisory_id: str, now_seconds: float) -> Receipt | None:
        """Withdraw an advisory; of one that already ended, the receipt. None where unknown."""
        advisory = self.get(advisory_id)
        if advisory is None:
            return None
        if advisory_id in self._live:
            self._end(advisory, Event.CANCEL, now_seconds)
        return advisory.receipt()

    def cancel_session(self, session_id: str, now_seconds: float) -> tuple[Receipt, ...]:
        """Withdraw all live advisories of a session."""
        receipts = (self.cancel(key, now_seconds) for key in self.of_session(session_id))
        return tuple(receipt for receipt in receipts if receipt is not None)

    def fail(self, advisory_id: str, reason: str, now_seconds: float) -> None:
        """End a live advisory that cannot be carried out; unknown and ended ones are left alone."""
        advisory = self._live.get(advisory_id)
        if advisory is not None:
            advisory.reason = reason
            self._end(advisory, Event.FAIL, now_seconds)

    def flush(self, now_seconds: float) -> tuple[str, ...]:
        """The cache was emptied: every live advisory fails, and no move is in flight any more."""
        ids = tuple([advisory.advisory_id for advisory in self._live.values()])
        for advisory_id in ids:
            self.fail(advisory_id, Reason.CACHE_FLUSHED, now_seconds)
        for (_, hop), (_, advisory) in self._flight.items():
            advisory.mark_flight(hop, False)
        self._flight.clear()
        return ids

    def arrive(
        self, advisory_id: str, common: int, ready_tokens: int, now_seconds: float
    ) -> Receipt | None:
        """The request that the advisory was about is here; None where the advisory is not live.

        Args:
            advisory_id: A live advisory.
            common: Tokens of the advisory's prefix that the request's prompt starts with.
            ready_tokens: Tokens of the prompt's head that are at the advisory's target level now.
            now_seconds: The broadcast clock.
        """
        advisory = self._live.get(advisory_id)
        if advisory is None:
            return None
        promised = min(advisory.goal_tokens, page_floor(common, self.page_size))
        if advisory.request.target is Target.DEVICE:
            ready_tokens = self._landed(advisory, ready_tokens)
        if advisory.request.kind is Kind.RETAIN:
            # It protects until it expires, whoever comes meanwhile.
            advisory.uses += 1 if promised and ready_tokens >= promised else 0
            return advisory.receipt()
        if not promised:
            advisory.reason = Reason.DIVERGED
            self._end(advisory, advisory.unused_event, now_seconds)
        elif ready_tokens >= promised:
            self._end(advisory, Event.USE, now_seconds)
        elif advisory.yields or advisory.state is State.READY:
            advisory.reason = Reason.YIELDED if advisory.yields else Reason.EVICTED
            self._end(advisory, Event.RECLAIM, now_seconds)
        else:
            self._end(advisory, Event.MISS, now_seconds)
        return advisory.receipt()

    def _end(self, advisory: Advisory, event: Event, now_seconds: float) -> None:
        ready = advisory.ready_seconds if advisory.state is State.READY else None
        advisory.apply(event, now_seconds)
        advisory.ended_seconds = now_seconds
        request = advisory.request
        self._live.remove(advisory)
        self._file(advisory)
        received = advisory.received_seconds
        self._ended.append(
            Ended(
                advisory_id=request.advisory_id,
                state=advisory.state,
                kind=request.kind,
                caller=request.caller,
                total_tokens=advisory.total_tokens,
                moved_tokens=sum(advisory.moved_tokens.values()),
                lead_seconds=max(0.0, now_seconds - received),
                ready_seconds=None if ready is None else max(0.0, ready - received),
            )
        )

    def _file(self, advisory: Advisory) -> None:
        self._finished[advisory.advisory_id] = advisory
        while len(self._finished) > self.limits.finished_max:
            self._finished.popitem(last=False)

    def take_ended(self) -> tuple[Ended, ...]:
        """What ended since the last call, in order; once a step keeps the list short."""
        ended = tuple(self._ended)
        self._ended.clear()
        return ended

    # Moving ------------------------------------------------------------------------------------

    def begin(self, move: Move, now_seconds: float) -> None:
        """A move of a live advisory has been started; at most one per hop and advisory."""
        key = (move.advisory_id, move.hop)
        assert key not in self._flight, f"{key} is in flight already"
        advisory = self._live.get(move.advisory_id)
        assert advisory is not None, f"{move.advisory_id} is not live"
        self._flight[key] = (move, advisory)
        advisory.started = True
        advisory.mark_flight(move.hop, True)
        if advisory.status is Status.DEFERRED:
            advisory.status, advisory.reason = Status.ACCEPTED, ""
        if move.hop is Hop.NVME_TO_HOST:
            if advisory.state is not State.STAGING:
                advisory.apply(Event.STAGE, now_seconds)
        elif advisory.state is State.QUEUED or (
            advisory.state is State.STAGING and advisory.staged
        ):
            advisory.apply(Event.LOAD, now_seconds)

    def finish(
        self,
        advisory_id: str,
        hop: Hop,
        result: MoveResult,
        tokens: int,
        moved_bytes: int,
        now_seconds: float,
    ) -> None:
        """A move ended and brought its first `tokens` tokens; its level must be looked up again.

        The bytes count for the advisory even if it ended meanwhile. A move that `flush` dropped is
        ignored.
        """
        move, advisory = self._flight.pop((advisory_id, hop), (None, None))
        if move is None or advisory is None:
            return
        advisory.mark_flight(hop, False)
        advisory.moved_tokens[hop] = advisory.moved_tokens.get(hop, 0) + tokens
        advisory.moved_bytes[hop] = advisory.moved_bytes.get(hop, 0) + moved_bytes
        if not advisory.live:
            return
        advisory.device_tokens = None
        advisory.host_tokens = 0
        if result is MoveResult.DONE:
            advisory.retries = 0
        elif result is MoveResult.SHORT:
            advisory.storage_end_tokens = move.start_tokens + tokens
        else:
            self._retry(advisory, move, result, tokens, now_seconds)

    def _retry(
        self, advisory: Advisory, move: Move, result: MoveResult, tokens: int, now_seconds: float
    ) -> None:
        limits = self.limits
        allowed = limits.retries_max if result is MoveResult.DECLINED else limits.errors_max
        if advisory.retries >= allowed:
            self.clip(
                advisory.advisory_id, move.start_tokens + tokens, Reason.MOVE_ERROR, now_seconds
            )
            return
        delay = min(limits.backoff_max_seconds, limits.backoff_seconds * 2.0**advisory.retries)
        advisory.retries += 1
        advisory.not_before_seconds = now_seconds + delay
        advisory.view = None

    def observe(
        self,
        advisory_id: str,
        device_tokens: int,
        host_tokens: int,
        now_seconds: float,
        storage_end_tokens: int | None = None,
    ) -> None:
        """Where the prefix is now: head length on device, then on host, then stored (if known)."""
        advisory = self._live.get(advisory_id)
        if advisory is None:
            return
        assert device_tokens >= 0, device_tokens
        assert host_tokens >= 0, host_tokens
        advisory.device_tokens = self._landed(advisory, min(device_tokens, advisory.total_tokens))
        # What a load in flight has published already is still a host copy to us.
        host_tokens += min(device_tokens, advisory.total_tokens) - advisory.device_tokens
        advisory.host_tokens = min(host_tokens, advisory.total_tokens - advisory.device_tokens)
        upper = advisory.device_tokens + advisory.host_tokens
        if storage_end_tokens is not None:
            advisory.storage_end_tokens = storage_end_tokens
        if advisory.storage_end_tokens is not None:
            advisory.storage_end_tokens = max(advisory.storage_end_tokens, upper)
        advisory.view = None
        if advisory.request.kind is Kind.RETAIN:
            self._observe_retained(advisory, now_seconds)
        if advisory.live:
            self._settle(advisory, now_seconds)

    def _landed(self, advisory: Advisory, device_tokens: int) -> int:
        """Device tokens less those that a load in flight has made matchable before they are there.

        SGLang publishes the slots when the copy is queued (UnifiedRadixCache.load_back).
        """
        move, _ = self._flight.get((advisory.advisory_id, Hop.HOST_TO_DEVICE), (None, None))
        return device_tokens if move is None else min(device_tokens, move.start_tokens)

    def _observe_retained(self, advisory: Advisory, now_seconds: float) -> None:
        """A retention keeps what it finds at first; what it loses later nobody brings back."""
        at_target = advisory.at_target_tokens
        if at_target >= advisory.goal_tokens:
            advisory.started = True
        elif advisory.started:
            advisory.reason = Reason.EVICTED
            self._end(advisory, Event.RECLAIM, now_seconds)
        else:
            advisory.started = True
            self.clip(advisory.advisory_id, at_target, Reason.NOT_RESIDENT, now_seconds)

    def _settle(self, advisory: Advisory, now_seconds: float) -> None:
        """Ready when all of the goal is at the target; not ready any more when it is not."""
        if advisory.device_tokens is None:
            return
        if advisory.at_target_tokens >= advisory.goal_tokens:
            if advisory.state is not State.READY:
                advisory.apply(Event.FINISH, now_seconds)
                advisory.ready_seconds = now_seconds
                if advisory.status is Status.DEFERRED:
                    advisory.status, advisory.reason = Status.ACCEPTED, ""
        elif advisory.state is State.READY:
            self._step_back(advisory, Reason.EVICTED, now_seconds)

    def give_way(self, advisory_id: str, now_seconds: float) -> None:
        """Running work took its protection: the advisory queues again, or is reclaimed for good."""
        advisory = self._live.get(advisory_id)
        if advisory is not None:
            self._step_back(advisory, Reason.YIELDED, now_seconds)

    def _step_back(self, advisory: Advisory, reason: Reason, now_seconds: float) -> None:
        if advisory.yields >= self.limits.yields_max:
            advisory.reason = reason
            self._end(advisory, Event.RECLAIM, now_seconds)
            return
        delay = self.limits.backoff_max_seconds * 2.0**advisory.yields
        advisory.yields += 1
        advisory.not_before_seconds = now_seconds + delay
        advisory.device_tokens = None
        advisory.host_tokens = 0
        advisory.ready_seconds = None
        advisory.view = None
        if advisory.state is not State.QUEUED:
            advisory.apply(Event.YIELD, now_seconds)

    def clip(self, advisory_id: str, tokens: int, reason: str, now_seconds: float) -> None:
        """Lower the goal to `tokens`; nothing left ends the advisory."""
        advisory = self._live.get(advisory_id)
        if advisory is None:
            return
        goal_tokens = page_floor(tokens, self.page_size)
        if goal_tokens >= advisory.goal_tokens:
            return
        advisory.goal_tokens = goal_tokens
        advisory.reason = reason
        advisory.view = None
        if goal_tokens:
            advisory.status = Status.CLIPPED
            self._settle(advisory, now_seconds)
            return
        gone = reason in (Reason.NOT_STORED, Reason.NOT_RESIDENT)
        failed = reason == Reason.MOVE_ERROR
        if not failed:
            advisory.status = Status.MISSING if gone else Status.REJECTED
        self._end(advisory, Event.FAIL, now_seconds)

    def defer(self, advisory_id: str, reason: str) -> None:
        """Say why a queued advisory is not being moved; an advisory on its way keeps its status."""
        advisory = self._live.get(advisory_id)
        if (
            advisory is not None
            and advisory.state is State.QUEUED
            and advisory.status in (Status.ACCEPTED, Status.DEFERRED)
        ):
            advisory.status, advisory.reason = Status.DEFERRED, reason

    # Looking -----------------------------------------------------------------------------------

    def get(self, advisory_id: str) -> Advisory | None:
        """The record, live or finished; for reading only."""
        live = self._live.get(advisory_id)
        return self._finished.get(advisory_id) if live is None else live

    def receipt(self, advisory_id: str) -> Receipt | None:
        advisory = self.get(advisory_id)
        return None if advisory is None else advisory.receipt()

    def is_live(self, advisory_id: str) -> bool:
        return advisory_id in self._live

    def views(self) -> tuple[AdvisoryView, ...]:
        """All live advisories; a view is rebuilt only after its advisory changed."""
        return tuple([advisory.view or advisory.as_view() for advisory in self._live.values()])

    def moves(self) -> tuple[Move, ...]:
        """What is in flight, also for advisories that ended meanwhile, in starting order."""
        return tuple(move for move, _ in self._flight.values())

    def flying(self, hop: Hop) -> int:
        return sum(1 for _, moving in self._flight if moving is hop)

    def of_session(self, session_id: str) -> tuple[str, ...]:
        """Live advisories of a session, in arrival order."""
        return self._live.of_session(session_id)

    def of_identity(self, identity: str) -> tuple[str, ...]:
        """Live advisories of one prefix, whatever their target and kind."""
        return self._live.of_identity(identity)

    def matching(
        self, session_id: str | None, namespace: Namespace, token_bytes: bytes
    ) -> tuple[tuple[str, int], ...]:
        """Live advisories that a request with this prompt answers, with their common lengths."""
        return self._live.matching(session_id, namespace, token_bytes) if self._live else ()

    def check(self) -> None:
        """Live and finished are disjoint and in legal states; indexes and counts agree."""
        self._live.check()
        assert len(self._live) <= self.limits.live_max
        assert self._live.held_bytes <= self.limits.held_bytes_max
        assert len(self._finished) <= self.limits.finished_max
        for advisory in self._live.values():
            advisory_id = advisory.advisory_id
            assert advisory_id not in self._finished
            assert 0 < advisory.goal_tokens <= advisory.total_tokens
            assert advisory.goal_tokens % self.page_size == 0
            assert advisory.expires_seconds >= self._expiry_floor_seconds
            assert advisory.staging == ((advisory_id, Hop.NVME_TO_HOST) in self._flight)
            assert advisory.loading == ((advisory_id, Hop.HOST_TO_DEVICE) in self._flight)
            check_timeline(advisory.timeline)
        for advisory in self._finished.values():
            assert advisory.prefix is None
            check_timeline(advisory.timeline)
