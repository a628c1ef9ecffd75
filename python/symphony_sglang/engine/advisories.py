"""Advisories inside one scheduler: messages in, moves and locks out, once a step.

The decisions are ``core.promoter``'s; this carries them out on SGLang's tree. Every input is alike
on all tensor-parallel ranks: broadcast messages and ticks, the waiting queue, and transfer ends
that SGLang drains in step. Scheduler thread only.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

from symphony_sglang.core.gate import GateCounts, GateSnapshot
from symphony_sglang.core.hot_prefixes import HotPrefixes
from symphony_sglang.core.levels import PROTECTED_LEVELS, Hop, Level, Target
from symphony_sglang.core.lifecycle import AdviseRequest, Kind, State, Status
from symphony_sglang.core.moves import MoveResult, Reason
from symphony_sglang.core.prefix import (
    TOKEN_BYTES,
    Namespace,
    Prefix,
    content_identity,
    pack_tokens,
)
from symphony_sglang.core.promoter import Promoter, StepInputs
from symphony_sglang.core.promotion import Demand, Plan
from symphony_sglang.core.sessions import SessionKey, SessionTable
from symphony_sglang.engine.cost import CostMeter, Work
from symphony_sglang.engine.demotion import demote
from symphony_sglang.engine.harm import HarmWatch
from symphony_sglang.engine.locks import LockTable
from symphony_sglang.engine.messages import AdvisoryAction, AdvisoryBatch
from symphony_sglang.engine.mover import Mover
from symphony_sglang.engine.pressure import admission_shortfall
from symphony_sglang.engine.queue_holds import QueueHolds, prompt_of, queued_behind_others
from symphony_sglang.engine.rates import RateBook
from symphony_sglang.engine.session_keeper import SessionKeeper
from symphony_sglang.engine.storage_view import stored_tokens

if TYPE_CHECKING:
    from symphony_sglang.engine.cache import SymphonyCache

# Requests remembered as seen; beyond it the oldest is forgotten, and would count as a new arrival.
SEEN_MAX = 65_536


class AdvisoryDriver:
    """One rank's advisories. `step` runs once a scheduler step, before admission."""

    def __init__(
        self,
        cache: SymphonyCache,
        promoter: Promoter,
        sessions: SessionTable,
        *,
        break_even: float = 1.0,
    ) -> None:
        """`break_even` as ``RateBook``'s margin."""
        self.cache = cache
        self.promoter = promoter
        self.sessions = sessions
        self.mover = Mover(cache)
        self.rates = RateBook(cache, break_even)
        self.harm = HarmWatch(cache, promoter.outcomes)
        self.cost = CostMeter()
        self.locks = LockTable(cache, self.mover, self._held_prefix)
        self.keeper = SessionKeeper(sessions)
        self.hot_prefixes = HotPrefixes(promoter.page_size)
        self.scheduler: Any = None
        self.now_seconds = 0.0
        # The last step neither started nor ended anything, and no hint came since.
        self.settled = False
        self._seen: dict[str, None] = {}
        self.queue_holds = QueueHolds(promoter)
        host = cache.cache_controller.mem_pool_host
        self._token_bytes = int(getattr(host, "anchor_entry", host).host_pool.size_per_token)

    @property
    def active(self) -> bool:
        """Whether time matters: something may expire, wait or be on its way."""
        held = (len(self.promoter.book), len(self.queue_holds), len(self.locks))
        return self.mover.busy or any(held)

    @property
    def requests_known(self) -> bool:
        """Whether a request has come that has not ended yet."""
        return bool(self._seen)

    # Messages -----------------------------------------------------------------------------------

    def tick(self, now_seconds: float, speeds: GateSnapshot | None = None) -> None:
        """Rank 0's clock, which never goes back, and its speeds where they changed."""
        self.now_seconds = max(self.now_seconds, now_seconds)
        self.rates.agree(speeds)

    def receive(self, batch: AdvisoryBatch) -> list[dict[str, Any]]:
        """Carry out a batch in order; one JSON-ready answer an action."""
        self.tick(batch.sent_seconds)
        self.settled = False
        with self.cost.measure(Work.MESSAGE, max(1, len(batch.actions))):
            answers = [self._handle(action) for action in batch.actions]
            self._apply_locks()
        return answers

    def _handle(self, action: AdvisoryAction) -> dict[str, Any]:
        match action.verb:
            case "prefetch" | "retain":
                return self._advise(action)
            case "cancel":
                return self._cancel(action)
            case "release":
                return self._release(action)
            case "demote":
                return self._demote(action)
            case "share" | "unsupported":
                return self._note(action, Status.UNSUPPORTED, action.reason or "not_yet_supported")
            case "receipt":
                receipt = self.promoter.book.receipt(action.advisory_id)
                return {} if receipt is None else receipt.as_json("")
            case "session":
                return self._session(action.session_id or "")
            case _:
                return self._note(action, Status.UNSUPPORTED, "unknown_verb")

    def _advise(self, action: AdvisoryAction) -> dict[str, Any]:
        namespace = Namespace(action.extra_key, action.cache_salt)
        prefix, identity = self._resolve(action, namespace)
        request = AdviseRequest(
            advisory_id=action.advisory_id,
            identity=identity,
            session_id=action.session_id,
            action_id=action.action_id,
            kind=Kind(action.verb),
            target=Target(action.target),
            expected_in_seconds=action.expected_in_seconds,
            expires_in_seconds=action.expires_in_seconds,
            priority=action.priority,
            caller=action.caller,
        )
        return self.promoter.advise(request, prefix, self.now_seconds).as_json("")

    def _resolve(self, action: AdvisoryAction, namespace: Namespace) -> tuple[Prefix | None, str]:
        """The prefix that a hint means, None for an unknown session, and its identity."""
        if action.token_bytes is not None:
            # A prompt that is all there is trimmed by a token at admission, so its last page is
            # never wholly used.
            prefix = Prefix(namespace, action.token_bytes[: -TOKEN_BYTES or None])
            return prefix, content_identity(prefix)
        key = SessionKey(action.session_id or "", namespace)
        record = self.sessions.touch(key, self.now_seconds)
        if record is None:
            return None, f"session:{action.session_id!r}"
        return record.prefix, record.identity

    def _cancel(self, action: AdvisoryAction) -> dict[str, Any]:
        if action.advisory_id:
            self.mover.cancel_stage(action.advisory_id)
            receipt = self.promoter.cancel(action.advisory_id, self.now_seconds)
            return {} if receipt is None else receipt.as_json("")
        receipts = self.promoter.cancel_session(action.session_id or "", self.now_seconds)
        for receipt in receipts:
            self.mover.cancel_stage(receipt.advisory_id)
        return receipts[-1].as_json("") if receipts else {}

    def _release(self, action: AdvisoryAction) -> dict[str, Any]:
        """The session is over: its advisories end, its record goes, its pages become ordinary."""
        session_id = action.session_id or ""
        self._cancel(AdvisoryAction(verb="cancel", session_id=session_id))
        records = self.sessions.find(session_id)
        for record in records:
            self.sessions.forget(record.key)
        self.keeper.save(self.now_seconds)
        if not records:
            return self._note(action, Status.MISSING, Reason.UNKNOWN_SESSION)
        return self._note(action, Status.ACCEPTED, "", State.READY)

    def _demote(self, action: AdvisoryAction) -> dict[str, Any]:
        """Take a prefix off the device now; hints about it that came before are withdrawn."""
        prefix, identity = self._resolve(action, Namespace(action.extra_key, action.cache_salt))
        if prefix is None:
            return self._note(action, Status.MISSING, Reason.UNKNOWN_SESSION)
        for advisory_id in self.promoter.book.of_identity(identity):
            self.mover.cancel_stage(advisory_id)
            self.promoter.cancel(advisory_id, self.now_seconds)
        self._apply_locks()
        whole = self._whole_pages(prefix.tokens)
        before = self.mover.find(prefix, whole).device_tokens
        dropped = demote(self.cache, self.mover, prefix, whole)
        if before and not dropped:
            answer = self._note(action, Status.REJECTED, Reason.IN_USE)
        else:
            status = Status.CLIPPED if dropped < before else Status.ACCEPTED
            reason = Reason.IN_USE if dropped < before else ""
            answer = self._note(action, status, reason, State.READY)
        after = self.mover.find(prefix, whole)
        answer["tokens"] = {
            "total": prefix.tokens,
            "device": after.device_tokens,
            "host": after.host_tokens,
            "demoted": dropped,
        }
        return answer

    def _note(
        self,
        action: AdvisoryAction,
        status: Status,
        reason: str,
        state: State = State.FAILED,
    ) -> dict[str, Any]:
        request = AdviseRequest(
            advisory_id=action.advisory_id,
            identity="",
            session_id=action.session_id,
            action_id=action.action_id,
            caller=action.caller,
        )
        return self.promoter.note(request, status, reason, self.now_seconds, state).as_json("")

    def _session(self, session_id: str) -> dict[str, Any]:
        """Where a session's tokens are now; empty for an unknown one."""
        records = self.sessions.find(session_id)
        if not records:
            return {}
        record = records[-1]
        prefix = record.prefix
        found = self.mover.find(prefix, self._whole_pages(prefix.tokens))
        upper = found.device_tokens + found.host_tokens
        stored = max(upper, stored_tokens(prefix, self.promoter.page_size))
        receipts = [
            self.promoter.book.receipt(key) for key in self.promoter.book.of_session(session_id)
        ]
        return {
            "session_id": session_id,
            "tokens": {
                "total": record.total_tokens,
                "device": found.device_tokens,
                "host": found.host_tokens,
                "nvme": stored - upper,
                "peer": 0,
                "missing": max(0, record.total_tokens - stored),
            },
            "turns": record.turns,
            "idle_s": round(max(0.0, self.now_seconds - record.last_used_seconds), 3),
            "advisories": [receipt.as_json("") for receipt in receipts if receipt is not None],
            "moves": [],
        }

    # Requests -----------------------------------------------------------------------------------

    def request_matched(self, request: Any, match: Any) -> None:
        """A request was matched in the tree; its first match is its arrival."""
        if request.rid in self._seen:
            return
        self._seen[request.rid] = None
        if len(self._seen) > SEEN_MAX:
            del self._seen[next(iter(self._seen))]
        device_tokens, host_tokens = int(match.device_prefix_len), int(match.host_hit_length)
        if not (device_tokens or host_tokens or len(self.promoter.book)):
            return
        with self.cost.measure(Work.REQUEST):
            self._request_arrived(request, match, device_tokens, host_tokens)

    def _request_arrived(
        self, request: Any, match: Any, device_tokens: int, host_tokens: int
    ) -> None:
        prefix = prompt_of(request)
        if device_tokens or host_tokens:
            self.hot_prefixes.found(prefix, device_tokens + host_tokens)
        self.queue_holds.hold(request.rid, prefix, device_tokens, host_tokens, self.now_seconds)
        if len(self.promoter.book):
            self.promoter.arrived(
                request.session_id,
                prefix.namespace,
                prefix.token_bytes,
                device_tokens,
                host_tokens,
                self.now_seconds,
            )
        self.harm.asked(prefix, match)
        self._apply_locks()

    def request_read(self, handle: Any) -> None:
        """A queued request's storage read has ended: what it brought is its prefix too."""
        request = queued_behind_others(self.scheduler.waiting_queue, handle)
        if request is None:
            return
        with self.cost.measure(Work.REQUEST):
            prefix = prompt_of(request)
            found = self.mover.find(prefix, self._whole_pages(prefix.tokens))
            device, host = found.device_tokens, found.host_tokens
            self.queue_holds.hold(request.rid, prefix, device, host, self.now_seconds)
            self._apply_locks()

    def request_gone(self, handle: Any) -> None:
        """A request was aborted before it ended."""
        self.mover.joins.leave(handle)
        self._seen.pop(handle.rid, None)

    def turn_ended(self, request: Any, token_ids: array[int]) -> None:
        """A turn of a session is in the tree: remember its tokens for hints by session id."""
        self._seen.pop(request.rid, None)
        if request.session_id is None:
            return
        key = SessionKey(request.session_id, Namespace(request.extra_key, request.cache_salt))
        whole = token_ids[: self._whole_pages(len(token_ids))]
        self.sessions.learn(key, pack_tokens(whole), self.now_seconds)
        self.keeper.save(self.now_seconds)

    def restore_sessions(self, blobs: list[bytes], now_seconds: float) -> None:
        """Take in what rank 0 found in its store at the start."""
        self.tick(now_seconds)
        self.keeper.restore(blobs, self.now_seconds)

    def _whole_pages(self, tokens: int) -> int:
        return tokens // self.promoter.page_size * self.promoter.page_size

    # The step -----------------------------------------------------------------------------------

    def step(self) -> None:
        """After SGLang's own drains: note what ended, look up, decide, move, lock."""
        active = self.active
        self.cost.looped(active)
        if active:
            with self.cost.measure(Work.STEP):
                self._step()

    def _step(self) -> None:
        self._note_ended_moves()
        self._release_admitted()
        self._yield_to_admission()
        demand = self._demand()
        moving = self.mover.stages_in_flight or self.mover.loads_in_flight
        if self.promoter.rests(self.now_seconds, demand.kinds, self.rates.agreed):
            self.settled = not moving
            self._apply_locks()
            return
        plan = self.promoter.plan(self._inputs(demand))
        moving = self.mover.stages_in_flight or self.mover.loads_in_flight
        begun = plan.probes or plan.clips or plan.drops or plan.stages or plan.loads
        self.settled = not (begun or moving)
        self._look_up(plan)
        self._start(plan)
        self._apply_locks()

    def _note_ended_moves(self) -> None:
        for end in self.mover.take_ended_stages():
            self._finished(end.advisory_id, Hop.NVME_TO_HOST, end.result, end.tokens)
        for end in self.mover.take_ended_loads():
            self._finished(end.advisory_id, Hop.HOST_TO_DEVICE, end.result, end.tokens)

    def _finished(self, advisory_id: str, hop: Hop, result: MoveResult, tokens: int) -> None:
        self.promoter.finished(
            advisory_id, hop, result, tokens, tokens * self._token_bytes, self.now_seconds
        )
        self._observe(advisory_id)

    def _observe(self, advisory_id: str) -> None:
        """Look a live advisory's prefix up, and protect what is there while it is at hand."""
        advisory = self.promoter.book.get(advisory_id)
        if advisory is None or advisory.prefix is None:
            return
        found = self.mover.find(advisory.prefix, self._whole_pages(advisory.prefix.tokens))
        self.promoter.observed(
            advisory_id, found.device_tokens, found.host_tokens, self.now_seconds
        )
        self._apply_locks()

    def _release_admitted(self) -> None:
        if len(self.queue_holds):
            self.queue_holds.release_admitted(self.scheduler.waiting_queue, self.now_seconds)
            self._apply_locks()

    def _yield_to_admission(self) -> None:
        """Protected pages count as used at admission: let go of what the queue's head lacks."""
        if not self.scheduler.waiting_queue or not len(self.locks):
            return
        short = admission_shortfall(self.scheduler, self.cache)
        if short > 0:
            self.give_way(short)

    def give_way(self, tokens: int) -> None:
        """Running work needs `tokens` more device tokens than are free or evictable."""
        self.promoter.give_way(Level.DEVICE, tokens, self.now_seconds)
        self._apply_locks()

    def give_way_on_host(self, tokens: int) -> None:
        """The same for a request's read and the host level; other queued requests keep theirs."""
        self.promoter.give_way(Level.HOST, tokens, self.now_seconds, keep_queued=True)
        self._apply_locks()

    def _demand(self) -> Demand:
        """What real requests have under way, or will have."""
        return Demand(
            requests_waiting=len(self.scheduler.waiting_queue),
            loads_pending=len(self.cache.cache_controller.load_queue) + self._foreign_loads(),
            stages_pending=self._foreign_stages(),
        )

    def _inputs(self, demand: Demand) -> StepInputs:
        cache, controller = self.cache, self.cache.cache_controller
        free = cache.token_to_kv_pool_allocator.available_size() + cache.full_evictable_size()
        return StepInputs(
            now_seconds=self.now_seconds,
            device_room_tokens=int(free) - self._headroom_tokens(),
            host_room_tokens=int(controller.mem_pool_host.logical_size)
            - self.promoter.host.resident_tokens,
            demand=demand,
            gate=self.rates.agreed,
        )

    def _headroom_tokens(self) -> int:
        """Pages that the running requests may need before the next step: one each."""
        running = self.scheduler.running_batch
        count = 0 if running is None else len(running.reqs)
        return count * self.promoter.page_size

    def _foreign_loads(self) -> int:
        """Host-to-device copies in flight that real requests asked for."""
        return len(self.cache.ongoing_load_back) - self.mover.loads_in_flight

    def _foreign_stages(self) -> int:
        """Storage reads in flight that real requests asked for."""
        return len(self.cache.ongoing_prefetch) - self.mover.stages_in_flight

    def _look_up(self, plan: Plan) -> None:
        for advisory_id in plan.probes:
            self._observe(advisory_id)

    def _start(self, plan: Plan) -> None:
        for move in plan.stages:
            advisory = self.promoter.book.get(move.advisory_id)
            prefix = None if advisory is None else advisory.prefix
            start = prefix and self.mover.start_stage(move.advisory_id, prefix, move.stop_tokens)
            if start is None:
                result = MoveResult.DECLINED if self.cache.enable_storage else MoveResult.SHORT
                self._finished(move.advisory_id, move.hop, result, 0)
        started = False
        for move in plan.loads:
            advisory = self.promoter.book.get(move.advisory_id)
            prefix = None if advisory is None else advisory.prefix
            self.harm.loading_for = move.advisory_id
            tokens = prefix and self.mover.queue_load(move.advisory_id, prefix, move.stop_tokens)
            self.harm.loading_for = None
            if tokens:
                started = True
            else:
                self._finished(move.advisory_id, move.hop, MoveResult.DECLINED, 0)
        if started:
            with self.cost.measure(Work.COPY):
                self.mover.start_queued()

    # Locks --------------------------------------------------------------------------------------

    def _held_prefix(self, level: Level, holder_id: str) -> Prefix | None:
        ledger = self.promoter.device if level is Level.DEVICE else self.promoter.host
        hold = ledger.get(holder_id)
        return None if hold is None else hold.prefix

    def _apply_locks(self) -> None:
        self.locks.apply(self.promoter.take_lock_changes())

    def reset(self) -> None:
        """The cache was emptied: nothing is held, moving or ready any more."""
        self.promoter.flushed(self.now_seconds)
        self.mover.reset()
        self.locks.reset()
        self.queue_holds.clear()

    def make_way_for_flush(self) -> None:
        """The cache is about to be emptied, if it is idle: nothing of ours may stand in the way."""
        running = self.scheduler.running_batch
        if self.mover.busy and not self.scheduler.waiting_queue and not (running and running.reqs):
            self.mover.end_all()

    def counters(self) -> dict[str, Any]:
        outcomes = self.promoter.outcomes
        gate = GateCounts.merge(self.rates.counts, self.promoter.gate_counts)
        return {
            **outcomes.as_json(self.now_seconds),
            "held_byte_seconds": {
                level.value: outcomes.held_token_seconds(level, self.now_seconds)
                * self._token_bytes
                for level in PROTECTED_LEVELS
            },
            "gate": gate.as_json(),
            "rates": self.rates.as_json(),
            "joined": self.mover.joins.joined,
            "cost": self.cost.as_json(),
            "live": len(self.promoter.book),
            "sessions": len(self.sessions),
            "locks": len(self.locks),
        }

    def check(self) -> None:
        self.promoter.check()
        self.sessions.check()
        self.locks.check()
        self.mover.joins.check()
        self.rates.measured.check()
