"""The gateway: everybody gets their own answer, in few messages, within a bound."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

from symphony_sglang.engine.gateway import Gateway, GatewayFullError


class Scheduler:
    """Answers each action with itself doubled; remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []

    async def ask(self, actions: list[Any]) -> list[Any]:
        self.batches.append(actions)
        await asyncio.sleep(0)
        return [2 * action for action in actions]


def test_a_storm_becomes_few_messages_and_keeps_its_order() -> None:
    async def storm() -> tuple[list[Any], Scheduler]:
        scheduler = Scheduler()
        gateway = Gateway(scheduler.ask, batch_max=100)
        answers = await asyncio.gather(*(gateway.submit(number) for number in range(1000)))
        return answers, scheduler

    answers, scheduler = asyncio.run(storm())
    assert answers == [2 * number for number in range(1000)]
    assert list(itertools.chain(*scheduler.batches)) == list(range(1000))
    assert len(scheduler.batches) <= 12
    assert max(map(len, scheduler.batches)) <= 100


def test_a_failed_message_fails_those_it_carried_and_no_others() -> None:
    async def run() -> list[Any]:
        calls = 0

        async def ask(actions: list[Any]) -> list[Any]:
            nonlocal calls
            calls += 1
            await asyncio.sleep(0)
            if calls == 2:
                raise ConnectionError("gone")
            return actions

        gateway = Gateway(ask, batch_max=2)
        return await asyncio.gather(
            *(gateway.submit(number) for number in range(6)), return_exceptions=True
        )

    answers = asyncio.run(run())
    assert [answer for answer in answers if not isinstance(answer, ConnectionError)] != []
    assert sum(isinstance(answer, ConnectionError) for answer in answers) == 2


def test_beyond_the_bound_callers_are_refused_and_the_rest_is_served() -> None:
    async def run() -> list[Any]:
        gateway = Gateway(Scheduler().ask, batch_max=4, pending_max=8)
        return await asyncio.gather(
            *(gateway.submit(number) for number in range(20)), return_exceptions=True
        )

    answers = asyncio.run(run())
    refused = [answer for answer in answers if isinstance(answer, GatewayFullError)]
    assert refused
    assert [a for a in answers if isinstance(a, int)] == [2 * n for n in range(20 - len(refused))]


def test_a_caller_that_goes_away_holds_up_nobody() -> None:
    async def run() -> Any:
        scheduler = Scheduler()
        gateway = Gateway(scheduler.ask, batch_max=1)
        async with asyncio.TaskGroup() as tasks:
            first = tasks.create_task(gateway.submit(1))
            leaver = tasks.create_task(gateway.submit(2))
            last = tasks.create_task(gateway.submit(3))
            await asyncio.sleep(0)
            leaver.cancel()
        return first.result(), last.result()

    assert asyncio.run(run()) == (2, 6)


def test_a_caller_that_goes_away_while_all_are_asked_takes_no_answer_with_it() -> None:
    async def run() -> list[Any]:
        scheduler, loop = Scheduler(), asyncio.get_running_loop()
        gateway = Gateway(scheduler.ask)
        tasks = [loop.create_task(gateway.submit(number)) for number in range(3)]
        while not scheduler.batches:  # noqa: ASYNC110
            await asyncio.sleep(0)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    gone, *others = asyncio.run(run())
    assert isinstance(gone, asyncio.CancelledError)
    assert others == [2, 4]
