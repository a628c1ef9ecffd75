"""The advisory side of one worker: book, protected budgets, planner and outcomes behind one door.

The engine owns one `Promoter` per scheduler process and calls it on the scheduler thread only.
Every tensor-parallel rank makes the same calls with the same arguments, and so decides the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from symphony_sglang.core.advisory import AdvisoryBook
from symphony_sglang.core.gate import OPEN_GATE, GateCounts, GateSnapshot
from symphony_sglang.core.ledger import OutcomeLedger
from symphony_sglang.core.levels import PROTECTED_LEVELS, Hop, Level, Target, page_floor
from symphony_sglang.core.lifecycle import (
    AdviseRequest,
    Advisory,
    BookLimits,
    Ended,
    Receipt,
    State,
    Status,
)
from symphony_sglang.core.moves import MoveResult, Reason
from symphony_sglang.core.prefix import Namespace, Prefix
from symphony_sglang.core.promotion import (
    EMPTY_PLAN,
    IDLE,
    Demand,
    Flight,
    LevelBudget,
    Plan,
    PlannerLimits,
    plan_step,
)
from symphony_sglang.core.protection import Holder, HolderKind, LevelLedger

REQUEST_HOLDER = "request:"
# Which level the gate refused, by the reason it gave.
GATE_LEVELS = {Reason.NVME_SLOWER: Level.NVME, Reason.HOST_SLOWER: Level.HOST}


class LockChange(NamedTuple):
    """From now on `holder_id` protects the first `tokens` of its prefix on `level`; 0 unlocks.

    It replaces whatever lock that holder had there.
    """

    level: Level
    holder_id: str
    tokens: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the engine sees at the start of a step, alike on every rank.

    `device_room_tokens` and `host_room_tokens` are free plus evictable tokens, less the headroom
    that running requests need soon.
    """

    now_seconds: float
    device_room_tokens: int
    host_room_tokens: int
    demand: Demand = IDLE
    gate: GateSnapshot = OPEN_GATE


class Promoter:
    """Takes hints in, says what to move and what to lock, and keeps the score.

    Lock changes of all calls wait in one queue, in order: the engine drains it with
    `take_lock_changes` after `observed`, `hold_request`, `give_way` and `step`.
    """

    def __init__(
        self,
        *,
        device_cap_tokens: int,
        host_cap_tokens: int,
        planner: PlannerLimits,
        book: BookLimits | None = None,
        outcomes: OutcomeLedger | None = None,
    ) -> None:
        self.limits = planner
        self.page_size = planner.page_size
        self.book = AdvisoryBook(self.page_size, book)
        self.device = LevelLedger(Level.DEVICE, device_cap_tokens, self.page_size)
        self.host = LevelLedger(Level.HOST, host_cap_tokens, self.page_size)
        self.outcomes = OutcomeLedger() if outcomes is None else outcomes
        self.gate_counts = GateCounts()
        self._changes: list[LockChange] = []
        self._fresh_ends: list[Ended] = []
        self._holders = 0
        self._held_versions = [-1, -1]
        # What an idle plan was made from, and until when: the same again need not be planned.
        self._idle_inputs: tuple[object, ...] = ()
        self._idle_until_seconds = 0.0

    # Messages ----------------------------------------------------------------------------------

    def advise(self, request: AdviseRequest, prefix: Prefix | None, now_seconds: float) -> Receipt:
        """Enter a hint (`AdvisoryBook.advise`); adds clipped and deferred to the statuses."""
        receipt = self.book.advise(request, prefix, now_seconds)
        if receipt.status is Status.ACCEPTED:
            ledger = self.device if request.target is Target.DEVICE else self.host
            cap = page_floor(ledger.cap_tokens, self.page_size)
            if receipt.tokens["goal"] > cap:
                self.book.clip(receipt.advisory_id, cap, Reason.BUDGET_CLIP, now_seconds)
            elif ledger.free_tokens < self.page_size:
                self.book.defer(receipt.advisory_id, Reason.BUDGET_IN_USE)
            receipt = self.book.receipt(receipt.advisory_id) or receipt
        elif receipt.status is Status.DUPLICATE:
            twin = self.book.get(receipt.advisory_id)
            assert twin is not None
            for ledger in (self.device, self.host):
                ledger.renew(holder_of(twin))
        self.outcomes.received(receipt.status)
        self._settle_ends(now_seconds)
        return receipt

    def note(
        self,
        request: AdviseRequest,
        status: Status,
        reason: str,
        now_seconds: float,
        state: State = State.FAILED,
    ) -> Receipt:
        """File a receipt for a hint that is refused, or done at once (demote, release, share)."""
        self.outcomes.received(status)
        return self.book.note(request, status, reason, now_seconds, state)

    def cancel(self, advisory_id: str, now_seconds: float) -> Receipt | None:
        """Withdraw one advisory; moves in flight run out and help whoever comes. None: unknown."""
        receipt = self.book.cancel(advisory_id, now_seconds)
        self._settle_ends(now_seconds)
        return receipt

    def cancel_session(self, session_id: str, now_seconds: float) -> tuple[Receipt, ...]:
        receipts = self.book.cancel_session(session_id, now_seconds)
        self._settle_ends(now_seconds)
        return receipts

    # The step ----------------------------------------------------------------------------------

    def step(self, inputs: StepInputs) -> Plan:
        """Expire, plan, and record what is planned as begun.

        The engine must then carry out `probes` (look up, then `observed`), `stages` and `loads`
        (each ends with one `finished`, whatever became of it). The other lists are done already.
        """
        if self.rests(inputs.now_seconds, inputs.demand.kinds, inputs.gate):
            return EMPTY_PLAN
        return self.plan(inputs)

    def plan(self, inputs: StepInputs) -> Plan:
        """The second half of `step`, for who has asked `rests` at this very moment."""
        now_seconds = inputs.now_seconds
        flight = Flight(self.book.flying(Hop.NVME_TO_HOST), self.book.flying(Hop.HOST_TO_DEVICE))
        views, versions = self.book.views(), (self.device.version, self.host.version)
        plan = plan_step(
            views,
            device=budget_of(self.device, inputs.device_room_tokens),
            host=budget_of(self.host, inputs.host_room_tokens),
            demand=inputs.demand,
            flight=flight,
            gate=inputs.gate,
            limits=self.limits,
            now_seconds=now_seconds,
        )
        self._record(plan, now_seconds)
        self._settle_ends(now_seconds)
        # What was planned from, not what recording the plan made of it.
        asked = (views, *versions, inputs.demand.kinds, flight, inputs.gate)
        self._idle_inputs = asked if plan.idle else ()
        self._idle_until_seconds = min(
            (v.not_before_seconds for v in views if v.not_before_seconds > now_seconds),
            default=float("inf"),
        )
        return plan

    def rests(self, now_seconds: float, demand_kinds: object, gate: GateSnapshot) -> bool:
        """Let what is due expire; whether a step would then plan nothing, as the one before it.

        Most steps of a worker with live advisories are such: all of them are ready and wait. Ask it
        before gathering what else a step needs.
        """
        if not len(self.book) and not len(self.device) and not len(self.host):
            return True
        self.book.tick(now_seconds)
        self._expire_requests(now_seconds)
        self._settle_ends(now_seconds)
        if not len(self.book):
            return True
        if now_seconds >= self._idle_until_seconds or not self._idle_inputs:
            return False
        flight = Flight(self.book.flying(Hop.NVME_TO_HOST), self.book.flying(Hop.HOST_TO_DEVICE))
        # Views are the same objects until their advisory changes, so comparing them is cheap.
        asked = (
            self.book.views(),
            self.device.version,
            self.host.version,
            demand_kinds,
            flight,
            gate,
        )
        return asked == self._idle_inputs

    def _record(self, plan: Plan, now_seconds: float) -> None:
        for clip in plan.clips:
            if clip.reason in GATE_LEVELS:
                self.gate_counts.count(GATE_LEVELS[clip.reason], False)
            self.book.clip(clip.advisory_id, clip.tokens, clip.reason, now_seconds)
        for drop in plan.drops:
            self._drop(self._ledger(drop.level), [drop.advisory_id], now_seconds)
        for move in (*plan.stages, *plan.loads):
            advisory = self.book.get(move.advisory_id)
            assert advisory is not None
            assert advisory.prefix is not None
            if not advisory.started:
                level = Level.NVME if move.hop is Hop.NVME_TO_HOST else Level.HOST
                self.gate_counts.count(level, True)
            ledger = self.host if move.hop is Hop.NVME_TO_HOST else self.device
            granted = ledger.reserve(holder_of(advisory), advisory.prefix, move.stop_tokens)
            assert move.hop is Hop.NVME_TO_HOST or granted >= move.stop_tokens, (move, granted)
            self.book.begin(move, now_seconds)
        for deferral in plan.deferrals:
            self.book.defer(deferral.advisory_id, deferral.reason)

    def finished(
        self,
        advisory_id: str,
        hop: Hop,
        result: MoveResult,
        tokens: int,
        moved_bytes: int,
        now_seconds: float,
    ) -> None:
        """A started move ended and brought `tokens` tokens. Every started move must end here once,
        aborted ones with DECLINED: its slot is taken until then. After a flush nothing is owed."""
        self.outcomes.moved(hop, tokens, moved_bytes)
        self.book.finish(advisory_id, hop, result, tokens, moved_bytes, now_seconds)
        self._settle_ends(now_seconds)

    def observed(
        self,
        advisory_id: str,
        device_tokens: int,
        host_tokens: int,
        now_seconds: float,
        storage_end_tokens: int | None = None,
    ) -> None:
        """A look-up's answer: head length on device, then how much follows on host.

        What is found is held, as far as the budget goes; drain the lock changes while the looked-up
        nodes are at hand.
        """
        self.book.observe(advisory_id, device_tokens, host_tokens, now_seconds, storage_end_tokens)
        if self.book.is_live(advisory_id):
            self._protect(advisory_id, now_seconds)
        self._settle_ends(now_seconds)

    def _protect(self, advisory_id: str, now_seconds: float) -> None:
        advisory = self.book.get(advisory_id)
        assert advisory is not None
        if advisory.device_tokens is None:
            return
        goal = advisory.goal_tokens
        on_device = page_floor(min(advisory.device_tokens, goal), self.page_size)
        upper = min(advisory.device_tokens + advisory.host_tokens, goal)
        upper = page_floor(upper, self.page_size)
        to_device = advisory.request.target is Target.DEVICE
        # Who has just given way takes nothing back before its time.
        grow = now_seconds >= advisory.not_before_seconds
        if not advisory.loading:
            self._hold(self.device, advisory, on_device if to_device else 0, grow=grow)
        if not advisory.staging:
            # Once all is on device, the host copy need not be kept for this advisory.
            keep = not to_device or upper > on_device
            self._hold(self.host, advisory, upper if keep else 0, grow=grow)

    def _hold(self, ledger: LevelLedger, advisory: Advisory, tokens: int, *, grow: bool) -> None:
        assert advisory.prefix is not None
        if tokens and grow:
            ledger.reserve(holder_of(advisory), advisory.prefix, tokens)
        self._settle_hold(ledger, advisory.advisory_id, tokens)

    def _settle_hold(self, ledger: LevelLedger, holder_id: str, tokens: int) -> None:
        old = ledger.get(holder_id)
        before = 0 if old is None else old.resident_tokens
        ledger.settle(holder_id, tokens)
        new = ledger.get(holder_id)
        after = 0 if new is None else new.resident_tokens
        if after != before:
            self._changes.append(LockChange(ledger.level, holder_id, after))

    # Requests ----------------------------------------------------------------------------------

    def arrived(
        self,
        session_id: str | None,
        namespace: Namespace,
        token_bytes: bytes,
        device_tokens: int,
        host_tokens: int,
        now_seconds: float,
    ) -> tuple[Receipt, ...]:
        """A request is queued: what advisories it answers end here, and say how they did.

        Call it after the request's own first look-up, and `hold_request` before it, so that nothing
        is unlocked in between. Moves still in flight belong to the request from here on.
        """
        receipts = []
        for advisory_id, common in self.book.matching(session_id, namespace, token_bytes):
            advisory = self.book.get(advisory_id)
            assert advisory is not None
            on_host = host_tokens if advisory.request.target is Target.HOST else 0
            receipt = self.book.arrive(advisory_id, common, device_tokens + on_host, now_seconds)
            assert receipt is not None
            receipts.append(receipt)
        self._settle_ends(now_seconds)
        return tuple(receipts)

    def hold_request(
        self,
        request_id: str,
        prefix: Prefix,
        device_tokens: int,
        host_tokens: int,
        expires_seconds: float,
        now_seconds: float,
    ) -> None:
        """Protect the matched head of a queued request, before any advisory, within the budget.

        Args:
            request_id: Any id that no other queued request has.
            prefix: The request's prompt.
            device_tokens: Matched head on device.
            host_tokens: Matched tokens that follow on host.
            expires_seconds: When protection ends whatever happens, on the broadcast clock.
            now_seconds: The broadcast clock.
        """
        self._holders += 1
        holder = Holder(
            REQUEST_HOLDER + request_id, HolderKind.REQUEST, 0, expires_seconds, self._holders
        )
        wanted = (
            (self.device, device_tokens),
            (self.host, device_tokens + host_tokens if host_tokens else 0),
        )
        for ledger, length in wanted:
            tokens = page_floor(min(length, prefix.tokens, ledger.cap_tokens), self.page_size)
            if not tokens:
                continue
            short = tokens - ledger.reserve(holder, prefix, tokens)
            if short:
                below = (HolderKind.REQUEST, 0)
                self._drop(ledger, ledger.give_way(short, below), now_seconds)
                ledger.reserve(holder, prefix, tokens)
            self._settle_hold(ledger, holder.holder_id, tokens)
        self._settle_ends(now_seconds)

    def release_request(self, request_id: str, now_seconds: float) -> None:
        """The request runs under its own locks now, or is gone; unknown ids are fine."""
        self._let_go(REQUEST_HOLDER + request_id)
        self._settle_ends(now_seconds)

    def _expire_requests(self, now_seconds: float) -> None:
        for ledger in (self.device, self.host):
            for holder_id in ledger.expired(now_seconds):
                # Advisories' holds end with them, by the book's own clock-tick.
                if not self.book.is_live(holder_id):
                    self._release(ledger, holder_id)

    # Memory ------------------------------------------------------------------------------------

    def give_way(
        self, level: Level, tokens_needed: int, now_seconds: float, *, keep_queued: bool = False
    ) -> int:
        """Running work needs memory: drop protections in give-way order.

        With `keep_queued`, advisories' alone: a queued request's read takes nothing from another's.
        Returns how many tokens are not protected any more; at least `tokens_needed`, or all.
        """
        ledger = self._ledger(level)
        before = ledger.resident_tokens
        below = (HolderKind.REQUEST, 0) if keep_queued else None
        self._drop(ledger, ledger.give_way(tokens_needed, below), now_seconds)
        self._settle_ends(now_seconds)
        return before - ledger.resident_tokens

    def _ledger(self, level: Level) -> LevelLedger:
        assert level in PROTECTED_LEVELS, level
        return self.device if level is Level.DEVICE else self.host

    def _drop(self, ledger: LevelLedger, holder_ids: Sequence[str], now_seconds: float) -> None:
        """End holds on one level: what else the holder has, it keeps to come back from."""
        for holder_id in holder_ids:
            self._release(ledger, holder_id)
            self.book.give_way(holder_id, now_seconds)

    def _let_go(self, holder_id: str) -> None:
        for ledger in (self.device, self.host):
            self._release(ledger, holder_id)

    def _release(self, ledger: LevelLedger, holder_id: str) -> None:
        hold = ledger.get(holder_id)
        if hold is None:
            return
        ledger.release(holder_id)
        if hold.resident_tokens:
            self._changes.append(LockChange(ledger.level, holder_id, 0))

    def flushed(self, now_seconds: float) -> None:
        """The cache was emptied (flush, weight update): advisories fail, and locks are gone.

        No lock change is given, for the nodes died with the tree; pending ones are dropped too.
        """
        self.book.flush(now_seconds)
        self.device.clear()
        self.host.clear()
        self._settle_ends(now_seconds)
        self._changes.clear()
        self.outcomes.flushed()

    # Reading -----------------------------------------------------------------------------------

    def take_lock_changes(self) -> tuple[LockChange, ...]:
        """Lock changes since the last call, to be carried out in this order."""
        changes = tuple(self._changes)
        self._changes.clear()
        return changes

    def take_ended(self) -> tuple[Ended, ...]:
        """Advisories that ended since the last call, for metrics and caller budgets."""
        ended = tuple(self._fresh_ends)
        self._fresh_ends.clear()
        return ended

    def _settle_ends(self, now_seconds: float) -> None:
        """Whatever ended protects nothing; the score is kept here, in one place."""
        for end in self.book.take_ended():
            self._let_go(end.advisory_id)
            self.outcomes.ended(end)
            self._fresh_ends.append(end)
        excess = len(self._fresh_ends) - self.book.limits.finished_max
        if excess > 0:
            # Nobody drains them: the oldest go, as in the book's own history.
            del self._fresh_ends[:excess]
        for place, ledger in enumerate((self.device, self.host)):
            if ledger.version != self._held_versions[place]:
                self._held_versions[place] = ledger.version
                self.outcomes.held(ledger.level, ledger.resident_tokens, now_seconds)

    def check(self) -> None:
        """Every part is sound, and only live advisories and requests hold anything."""
        self.book.check()
        self.device.check()
        self.host.check()
        self.outcomes.check()
        for ledger in (self.device, self.host):
            for hold in ledger.holds():
                holder = hold.holder
                assert holder.kind is HolderKind.REQUEST or self.book.is_live(holder.holder_id)
        assert self.book.flying(Hop.HOST_TO_DEVICE) <= self.limits.chunk_pages
        assert self.book.flying(Hop.NVME_TO_HOST) <= self.limits.stages_max


def holder_of(advisory: Advisory) -> Holder:
    """The ledger's view of an advisory, with its present priority and expiry."""
    return Holder(
        advisory.advisory_id,
        HolderKind.ADVISORY,
        advisory.priority,
        advisory.expires_seconds,
        advisory.arrival,
    )


def budget_of(ledger: LevelLedger, room_tokens: int) -> LevelBudget:
    return LevelBudget(
        cap_tokens=ledger.cap_tokens,
        held_tokens=ledger.held_tokens,
        room_tokens=room_tokens,
        lengths=ledger.lengths,
    )
