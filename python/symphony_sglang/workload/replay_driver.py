"""Drives a trace against a server: when each request goes out, and what came of it.

A session's turns follow each other: the next one goes out when its think time has passed since the
answer, or at its arrival if that is later. Sessions start at their arrivals (open loop) or, where
the trace has none or times are scaled to 0, as soon as one of `concurrency` places is free (closed
loop). At most `concurrency` requests are in flight; one that is due waits, and the wait is
recorded. A session ends at its first failed request. Nothing is retried.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from symphony_sglang.clock import Clock
from symphony_sglang.errors import ConfigError, ServerUnavailableError
from symphony_sglang.workload.advice import FALSE_SHARE_MAX, AdviceRules, Adviser, advice_time
from symphony_sglang.workload.generate_client import CachedTokens, GenerateClient
from symphony_sglang.workload.prompts import (
    Limits,
    PlannedTurn,
    PromptFiller,
    SessionPlan,
    plan_session,
)
from symphony_sglang.workload.traces import Session, TextPrompt

SESSIONS_AHEAD_MAX = 4
# An open loop whose sessions outlive their successors' arrivals stops starting new ones here.
SESSIONS_ACTIVE_MAX = 4096


@dataclass(frozen=True, slots=True)
class ReplayRules:
    """How a trace is replayed; see the flags of ``symphony replay``."""

    limits: Limits
    vocab: int
    seed: int = 0
    time_scale: float = 1.0
    think_seconds: float = 0.0
    # Longest pause between two turns, after scaling; None keeps the trace's hours.
    think_seconds_max: float | None = None
    session_rate: float | None = None
    concurrency: int = 8
    sessions_max: int | None = None
    requests_max: int | None = None
    session_requests_max: int | None = None
    share_system_prefix: bool = False
    stream: bool = True
    keep_output_ids: bool = False
    # Hints before each turn but the first; None sends none.
    advice: AdviceRules | None = None
    # First turns are sent one after another before the time begins, and not recorded: a service
    # whose sessions are long sees few of them.
    seated: bool = False
    # Of drawn arrivals; None takes `seed`. Replays that are compared share it.
    arrival_seed: int | None = None


class RequestRecord(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One line of the output file. Times in seconds; `due` and `sent` from the replay's start."""

    session_id: str
    turn: int
    due_seconds: float
    sent_seconds: float
    latency_seconds: float
    ttft_seconds: float | None = None
    tpot_seconds: float | None = None
    prompt_tokens: int
    cached: CachedTokens
    output_tokens: int
    output_hash: str = ""
    output_ids: tuple[int, ...] | None = None
    finish_reason: str = ""
    status: int = 0
    error: str | None = None
    # How long before it was due its session was advised; None where it was not.
    lead_seconds: float | None = None


@dataclass(slots=True)
class ReplayCounts:
    """What was read and left out, beside the records."""

    sessions: int = 0
    sessions_cut: int = 0
    requests_cut: int = 0
    requests_unsent: int = 0
    open_loop: bool = False


@dataclass(slots=True)
class ReplayDriver:
    """One replay. `on_record` is called for every finished request, in order of completion.

    `sessions` is read in a thread, a few ahead.

    Raises (from ``run``):
        ServerUnavailableError: the server stopped answering.
        ConfigError, TraceError: what the trace needs cannot be done, or it cannot be read.
    """

    client: GenerateClient
    rules: ReplayRules
    sessions: Iterator[Session]
    on_record: Callable[[RequestRecord], None]
    clock: Clock
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    counts: ReplayCounts = field(default_factory=ReplayCounts)
    adviser: Adviser | None = field(init=False, default=None)
    _group: asyncio.TaskGroup = field(init=False)
    _in_flight: asyncio.Semaphore = field(init=False)
    _places: asyncio.Semaphore = field(init=False)
    _start: float = field(init=False)

    async def run(self) -> None:
        """Replay to the end of the trace or of the bounds."""
        queue: asyncio.Queue[SessionPlan | None] = asyncio.Queue(SESSIONS_AHEAD_MAX)
        self._in_flight = asyncio.Semaphore(self.rules.concurrency)
        if self.rules.advice is not None:
            self.adviser = Adviser(self.client, self.rules.advice, self.rules.seed)
        try:
            async with asyncio.TaskGroup() as self._group:
                self._group.create_task(self._read(queue))
                await self._dispatch(await self._seat(queue) if self.rules.seated else queue)
        except BaseExceptionGroup as group:
            # The first failure cancelled the others; it is the one to tell of.
            raise first_leaf(group) from group

    async def _read(self, queue: asyncio.Queue[SessionPlan | None]) -> None:
        rules = self.rules
        left = rules.requests_max
        while rules.sessions_max is None or self.counts.sessions < rules.sessions_max:
            if left is not None and left <= 0:
                break
            session = await asyncio.to_thread(next, self.sessions, None)
            if session is None:
                break
            bounds = [most for most in (left, rules.session_requests_max) if most is not None]
            plan = plan_session(session, rules.limits, requests_max=min(bounds, default=None))
            self.counts.sessions += 1
            self.counts.sessions_cut += plan.cut_count > 0
            self.counts.requests_cut += plan.cut_count
            if plan.turns:
                left = None if left is None else left - plan.request_count()
                await queue.put(plan)
        await queue.put(None)

    async def _seat(
        self, queue: asyncio.Queue[SessionPlan | None]
    ) -> asyncio.Queue[SessionPlan | None]:
        """Send the first turn of every session; gives the sessions that were answered.

        Only a turn that failed is recorded.
        """
        seated: asyncio.Queue[SessionPlan | None] = asyncio.Queue()
        self._start = self.clock.monotonic()
        while (plan := await queue.get()) is not None:
            filler = self._filler(plan)
            body = await self._body(filler, plan.turns[0])
            if body is None:
                self.counts.sessions_cut += 1
                self.counts.requests_cut += unsent(plan, 0)
                continue
            record = await self._ask(plan.session, plan.turns[0], body, self._now(), None)
            if record.error is None:
                seated.put_nowait(plan)
            else:
                self.counts.requests_unsent += unsent(plan, 0) - 1
                await self._keep(record)
        seated.put_nowait(None)
        return seated

    def _filler(self, plan: SessionPlan) -> PromptFiller:
        return PromptFiller.of(
            plan.session,
            seed=self.rules.seed,
            vocab=self.rules.vocab,
            scale=self.rules.limits.scale_tokens,
            share_prefix=self.rules.share_system_prefix,
        )

    async def _dispatch(self, queue: asyncio.Queue[SessionPlan | None]) -> None:
        plan = await queue.get()
        if plan is None:
            return
        rate = self.rules.session_rate
        timed = plan.session.arrival_seconds is not None and self.rules.time_scale > 0
        open_loop = rate is not None or timed
        self.counts.open_loop = open_loop
        self._places = asyncio.Semaphore(
            SESSIONS_ACTIVE_MAX if open_loop else self.rules.concurrency
        )
        self._start = self.clock.monotonic()
        first_arrival = plan.session.arrival_seconds or 0.0
        drawn = self.rules.seed if self.rules.arrival_seed is None else self.rules.arrival_seed
        arrivals = random.Random(drawn)
        due = 0.0
        while plan is not None:
            if rate is not None:
                due += arrivals.expovariate(rate)
            elif open_loop:
                due = (
                    (plan.session.arrival_seconds or 0.0) - first_arrival
                ) * self.rules.time_scale
            await self._places.acquire()
            await self._until(due)
            started = due if open_loop else self._now()
            self._group.create_task(self._top_session(plan, self._filler(plan), started))
            plan = await queue.get()

    async def _top_session(self, plan: SessionPlan, filler: PromptFiller, due: float) -> None:
        """A session holds its place until its own turns are over; its sub-agents hold none."""
        try:
            await self._session(plan, filler, due)
        finally:
            self._places.release()

    async def _session(self, plan: SessionPlan, filler: PromptFiller, due: float) -> None:
        started = due
        # Of the session's own, so that what it draws does not depend on the others' progress.
        thinking = random.Random(f"{self.rules.seed}/{plan.session.session_id}")
        for position, planned in enumerate(plan.turns):
            if self.rules.seated and not position and plan.session.parent_turn is None:
                await self._until(due)
                self._answered(plan, filler, planned)
                continue
            body = await self._body(filler, planned)
            if body is None:
                self.counts.sessions_cut += 1
                self.counts.requests_cut += unsent(plan, position)
                return
            lead: float | None = None
            if position:
                due = self._due(planned, started, thinking)
                lead = await self._advise(session_name(self.rules, filler), planned, due)
            await self._until(due)
            record = await self._ask(plan.session, planned, body, due, lead)
            await self._keep(record)
            if record.error is not None:
                self.counts.requests_unsent += unsent(plan, position) - 1
                return
            self._answered(plan, filler, planned)
        if self.adviser is not None:
            self.adviser.ended(session_name(self.rules, filler))

    def _answered(self, plan: SessionPlan, filler: PromptFiller, planned: PlannedTurn) -> None:
        if self.adviser is not None:
            self.adviser.learn(session_name(self.rules, filler))
        self._start_subagents(plan, filler, planned)

    async def _advise(self, session_id: str, planned: PlannedTurn, due: float) -> float | None:
        """Send this turn's hints when it is time to; gives the lead of the true one, if any.

        The hints go out beside the session: one that is answered late delays no request.
        """
        if self.adviser is None:
            return None
        targets = self.adviser.targets(session_id, planned.index)
        await self._until(advice_time(due, self._now(), self.adviser.rules.lead_seconds))
        left = due - self._now()
        for target, true in targets:
            self._group.create_task(self.adviser.send(target, true=true, expected_in_seconds=left))
        return left if any(true for _, true in targets) else None

    def _start_subagents(
        self, plan: SessionPlan, filler: PromptFiller, planned: PlannedTurn
    ) -> None:
        """Those that this turn's answer called for, as long after the turn as in the trace."""
        for child in plan.subagents:
            if child.session.parent_turn != planned.index or not child.turns:
                continue
            delay = (child.session.arrival_seconds or 0.0) - (planned.turn.arrival_seconds or 0.0)
            due = self._now() + max(0.0, delay) * self.rules.time_scale
            own = filler.of_subagent(child.session, share_prefix=self.rules.share_system_prefix)
            self._group.create_task(self._session(child, own, due))

    def _due(self, planned: PlannedTurn, started: float, thinking: random.Random) -> float:
        """When the next turn of a session goes out, now that the answer before it is there."""
        due, most = self._thought(planned, started, thinking), self.rules.think_seconds_max
        return due if most is None else min(due, self._now() + most)

    def _thought(self, planned: PlannedTurn, started: float, thinking: random.Random) -> float:
        now, scale = self._now(), self.rules.time_scale
        turn = planned.turn
        if turn.think_seconds is not None:
            return now + turn.think_seconds * scale
        if turn.arrival_seconds is not None:
            return max(now, started + turn.arrival_seconds * scale)
        if self.rules.think_seconds:
            return now + thinking.expovariate(1 / self.rules.think_seconds) * scale
        return now

    async def _body(self, filler: PromptFiller, planned: PlannedTurn) -> bytes | None:
        """The request, ready to send; None if a text is longer than the server takes."""
        rules, prompt = self.rules, planned.turn.prompt
        fields: dict[str, object] = {
            "session_id": session_name(rules, filler),
            "stream": rules.stream,
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": planned.output_tokens,
                "ignore_eos": True,
            },
        }
        if isinstance(prompt, TextPrompt):
            fields["text"] = prompt.text
            most = min(rules.limits.prompt_tokens_max, rules.limits.context_tokens - 1)
            # A token is at least a byte, so a short text needs no question.
            if len(prompt.text.encode()) > most:
                count = await self.client.count_tokens(prompt.text)
                if count is not None and count > most:
                    return None
        else:
            fields["input_ids"] = filler.token_ids(planned).tolist()
        return msgspec.json.encode(fields)

    async def _keep(self, record: RequestRecord) -> None:
        """Record a request that has ended.

        Raises:
            ServerUnavailableError: it broke off, and the server does not answer any more.
        """
        self.on_record(record)
        # Not refused but broken off: the connection failed, so the next requests may fail alike.
        broken = record.error is not None and record.status in (0, 200)
        if broken and not await self.client.healthy():
            raise ServerUnavailableError(f"{self.client.url} stopped answering: {record.error}")

    async def _ask(
        self,
        session: Session,
        planned: PlannedTurn,
        body: bytes,
        due: float,
        lead_seconds: float | None,
    ) -> RequestRecord:
        async with self._in_flight:
            sent = self._now()
            result = await self.client.generate(body, stream=self.rules.stream)
        return RequestRecord(
            session_id=session.session_id,
            turn=planned.index,
            due_seconds=due,
            sent_seconds=sent,
            latency_seconds=result.latency_seconds,
            ttft_seconds=result.ttft_seconds,
            tpot_seconds=result.tpot_seconds,
            prompt_tokens=result.prompt_tokens or planned.prompt_tokens or 0,
            cached=result.cached,
            output_tokens=len(result.output_ids),
            output_hash=result.output_hash() if result.output_ids else "",
            output_ids=result.output_ids if self.rules.keep_output_ids else None,
            finish_reason=result.finish_reason,
            status=result.status,
            error=result.error,
            lead_seconds=lead_seconds,
        )

    def _now(self) -> float:
        return self.clock.monotonic() - self._start

    async def _until(self, due: float) -> None:
        wait = due - self._now()
        if wait > 0:
            await self.sleep(wait)


def session_name(rules: ReplayRules, filler: PromptFiller) -> str:
    """The session id that the server sees; a replay with another seed has other sessions."""
    return f"{rules.seed}/{filler.session.session_id}"


def unsent(plan: SessionPlan, position: int) -> int:
    """Requests of `plan` from turn `position` on, with the sub-agents they would have started."""
    indexes = {planned.index for planned in plan.turns[position:]}
    children = [c for c in plan.subagents if c.session.parent_turn in indexes]
    return len(indexes) + sum(child.request_count() for child in children)


def first_leaf(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first exception in `group` that is no group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def check_rules(rules: ReplayRules) -> None:
    """Refuse values that cannot be replayed with, naming the flag.

    Raises:
        ConfigError: a value is out of range.
    """
    numbers: tuple[tuple[str, float | None, float, float], ...] = (
        ("--concurrency", rules.concurrency, 1, 65536),
        ("--time-scale", rules.time_scale, 0, 1e6),
        ("--think-seconds", rules.think_seconds, 0, 1e6),
        ("--think-max", rules.think_seconds_max, 0, 1e6),
        ("--session-rate", rules.session_rate, 1e-6, 1e6),
        ("--sessions", rules.sessions_max, 1, 1e12),
        ("--requests", rules.requests_max, 1, 1e12),
        ("--session-requests", rules.session_requests_max, 1, 1e12),
        ("--scale-tokens", rules.limits.scale_tokens, 1e-4, 1),
        ("--max-prompt-tokens", rules.limits.prompt_tokens_max, 1, 1e9),
        ("--max-output-tokens", rules.limits.output_tokens_max, 1, 1e9),
    )
    if rules.advice is not None:
        numbers += (
            ("--advise-lead", rules.advice.lead_seconds, 0, 3600),
            ("--advise-missing", rules.advice.missing_share, 0, 1),
            ("--advise-false", rules.advice.false_share, 0, FALSE_SHARE_MAX),
        )
    for flag, value, low, high in numbers:
        if value is not None and not low <= value <= high:  # false for NaN too
            raise ConfigError(f"{flag} is {value:g}; expected a number from {low:g} to {high:g}")
