"""The HTTP process's budgets: what it charges, when it asks, and whom it refuses.

The schedulers are a stand-in that answers as they do; tests/server runs the real ones.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from symphony_sglang.config import SymphonyConfig
from symphony_sglang.core.budget import Refusal
from symphony_sglang.core.hints import HintMessage, parse_advise
from symphony_sglang.engine.advise import REFRESH_MAX, REFRESH_SECONDS, AdviseService
from symphony_sglang.engine.messages import AdvisoryAction, AdvisoryBatch, ControlReply


class StepClock:
    """Time that a test sets."""

    def __init__(self) -> None:
        self.now_seconds = 100.0

    def monotonic(self) -> float:
        return self.now_seconds

    def unix(self) -> float:
        return self.now_seconds


class Schedulers:
    """Each advisory holds 100 tokens and is queued until a test ends it."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.asked: list[AdvisoryAction] = []

    async def symphony_communicator(self, batch: AdvisoryBatch) -> list[ControlReply]:
        self.asked += batch.actions
        return [ControlReply(body={"answers": [self.answer(action) for action in batch.actions]})]

    def answer(self, action: AdvisoryAction) -> dict[str, Any]:
        advisory_id = action.advisory_id
        if action.verb in ("prefetch", "retain"):
            self.states[advisory_id] = "queued"
        if action.verb == "cancel" and advisory_id in self.states:
            self.states[advisory_id] = "cancelled"
        if advisory_id not in self.states:
            return {}
        state = self.states[advisory_id]
        return {"advisory_id": advisory_id, "state": state, "tokens": {"goal": 100}}

    def auto_create_handle_loop(self) -> None:
        pass

    @property
    def receipts_asked(self) -> int:
        return sum(action.verb == "receipt" for action in self.asked)


class World:
    def __init__(self, **settings: Any) -> None:
        self.schedulers = Schedulers()
        self.clock = StepClock()
        self.service = AdviseService(
            self.schedulers,
            SimpleNamespace(),
            clock=self.clock,
            config=SymphonyConfig(**settings),
        )

    async def advise(self, **body: Any) -> dict[str, Any]:
        message = parse_advise({"session_id": "s", **body})
        admission = await self.service.admit("c", len(message.hints))
        assert admission.allowed, admission
        (receipt,) = (await self.service.advise(message, "c"))["receipts"]
        return dict(receipt)


def test_tokens_in_flight_refuse_until_the_schedulers_say_that_some_ended() -> None:
    async def run() -> None:
        world = World(advise_tokens=250)
        receipts = [await world.advise() for _ in range(3)]
        assert (await world.service.admit("c", 1)).refusal is Refusal.TOKENS
        assert world.schedulers.receipts_asked == 3
        assert (await world.service.admit("other", 1)).allowed
        world.schedulers.states[receipts[0]["advisory_id"]] = "used"
        world.clock.now_seconds += 2 * REFRESH_SECONDS
        assert (await world.service.admit("c", 1)).allowed

    asyncio.run(run())


def test_a_storm_of_refused_callers_asks_the_schedulers_now_and_then_only() -> None:
    async def run() -> None:
        world = World(advise_tokens=100)
        await world.advise()
        for _ in range(50):
            assert not (await world.service.admit("c", 1)).allowed
        assert world.schedulers.receipts_asked == 1
        world.clock.now_seconds += 2 * REFRESH_SECONDS
        assert not (await world.service.admit("c", 1)).allowed
        assert world.schedulers.receipts_asked == 2

    asyncio.run(run())


def test_one_refresh_asks_for_a_bounded_number() -> None:
    async def run() -> None:
        world = World(advise_tokens=100 * (REFRESH_MAX + 5), advise_rate=1000)
        for _ in range(REFRESH_MAX + 5):
            await world.advise()
        assert not (await world.service.admit("c", 1)).allowed
        assert world.schedulers.receipts_asked == REFRESH_MAX

    asyncio.run(run())


def test_what_the_schedulers_forgot_has_ended() -> None:
    async def run() -> None:
        world = World(advise_tokens=100)
        await world.advise()
        world.schedulers.states.clear()
        assert (await world.service.admit("c", 1)).allowed

    asyncio.run(run())


def test_expiry_and_cancelling_free_the_tokens_without_asking() -> None:
    async def run() -> None:
        world = World(advise_tokens=100)
        first = await world.advise(expires_in_s=5)
        world.clock.now_seconds += 5
        second = await world.advise()
        assert first["advisory_id"] != second["advisory_id"]
        action = AdvisoryAction(verb="cancel", advisory_id=second["advisory_id"], caller="c")
        world.service.charge(action, await world.service.submit(action))
        assert (await world.service.admit("c", 1)).allowed
        assert world.schedulers.receipts_asked == 0

    asyncio.run(run())


@pytest.mark.parametrize("over", [False, True])
def test_hints_that_ride_along_pass_the_same_budget_and_are_dropped_beyond_it(over: bool) -> None:
    async def run() -> int:
        world = World(advise_rate=1.0)  # a burst of 2
        message = parse_advise({"session_id": "s"})
        for _ in range(4 if over else 2):
            await world.service.advise_quietly(message, "c")
        await world.service.advise_quietly(HintMessage(None, ()), "c")
        return len(world.schedulers.states)

    assert asyncio.run(run()) == 2


@pytest.mark.parametrize("implicit_hints", [True, False])
def test_implied_hints_of_a_router_are_taken_only_where_they_are_on(
    *, implicit_hints: bool
) -> None:
    async def run() -> list[str]:
        world = World(implicit_hints=implicit_hints)
        payload = {"session_id": "parent"}
        actions = [
            {"action_id": name, "action_type": "prefetch", "payload": payload}
            for name in ("implicit:parent", "mine")
        ]
        message = parse_advise({"protocol_version": "0.1", "actions": actions})
        await world.service.advise(message, "router")
        return [action.verb for action in world.schedulers.asked]

    assert asyncio.run(run()) == ["prefetch" if implicit_hints else "unsupported", "prefetch"]
