"""Questions to the schedulers over SGLang's own communicator."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.managers.communicator import FanOutCommunicator

from symphony_sglang.engine import schedulers, ui_routes
from symphony_sglang.engine.messages import ControlReply
from symphony_sglang.engine.schedulers import Departure, ask_schedulers
from symphony_sglang.errors import LeavingError


class Manager:
    """Sends through SGLang's communicator; replies come when a test says so."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.symphony_communicator = FanOutCommunicator(self.sent.append, 1)

    def auto_create_handle_loop(self) -> None:
        pass

    async def reply(self) -> None:
        """Answer the oldest question with itself."""
        while not self.sent:  # noqa: ASYNC110 - the communicator has no event for it
            await asyncio.sleep(0)
        self.symphony_communicator.handle_recv(ControlReply(body={"to": self.sent.pop(0)}))


@pytest.fixture
def departure(monkeypatch: pytest.MonkeyPatch) -> Departure:
    made = Departure()
    monkeypatch.setattr(schedulers, "departure", made)
    monkeypatch.setattr(ui_routes, "departure", made)
    return made


def test_reply_to_an_asker_that_went_away_is_nobody_elses(departure: Departure) -> None:
    async def scenario() -> list[ControlReply]:
        manager, loop = Manager(), asyncio.get_running_loop()
        gone = loop.create_task(ask_schedulers(manager, "first"))
        while not manager.sent:  # noqa: ASYNC110
            await asyncio.sleep(0)
        gone.cancel()
        next_one = loop.create_task(ask_schedulers(manager, "second"))
        await asyncio.sleep(0)
        await manager.reply()
        await manager.reply()
        assert gone.cancelled()
        return await asyncio.wait_for(next_one, 5)

    (reply,) = asyncio.run(scenario())
    assert reply.body == {"to": "second"}


def test_who_waits_is_told_when_the_schedulers_are_gone(departure: Departure) -> None:
    async def scenario() -> None:
        manager, loop = Manager(), asyncio.get_running_loop()
        waiting = [loop.create_task(ask_schedulers(manager, number)) for number in range(3)]
        await asyncio.sleep(0.01)
        departure.end()
        for task in waiting:
            with pytest.raises(LeavingError):
                await asyncio.wait_for(task, 5)
        # And who comes later, over a connection that is still open.
        with pytest.raises(LeavingError):
            await asyncio.wait_for(ask_schedulers(manager, "late"), 5)

    asyncio.run(scenario())


def test_caller_that_is_cancelled_is_cancelled_and_not_told(departure: Departure) -> None:
    async def scenario() -> None:
        task = asyncio.get_running_loop().create_task(ask_schedulers(Manager(), 1))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())


async def residency() -> dict[str, Any]:
    return {"levels": {}}


async def rest(stream: AsyncIterator[bytes]) -> list[bytes]:
    return [event async for event in stream]


def test_stream_ends_when_the_server_is_told_to(
    departure: Departure, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(ui_routes, "get_residency", residency)
        feed = ui_routes.ResidencyFeed()
        stream = feed.events(60.0)
        assert (await anext(stream)).startswith(b"event: residency\ndata: {")
        assert feed.listeners == 1
        departure.begun.set()
        assert await asyncio.wait_for(rest(stream), 5) == []
        assert feed.listeners == 0

    asyncio.run(scenario())


def test_stream_whose_sample_never_comes_ends_with_the_schedulers(
    departure: Departure, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        manager = Manager()

        async def ask() -> Any:
            return await ask_schedulers(manager, "residency")

        monkeypatch.setattr(ui_routes, "get_residency", ask)
        feed = ui_routes.ResidencyFeed()
        reading = asyncio.get_running_loop().create_task(rest(feed.events(1.0)))
        while not manager.sent:  # noqa: ASYNC110
            await asyncio.sleep(0)
        departure.begun.set()
        departure.end()
        assert await asyncio.wait_for(reading, 5) == []
        assert feed.listeners == 0

    asyncio.run(scenario())


def test_new_stream_is_refused_by_a_server_that_ends(
    departure: Departure, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(ui_routes, "require_our_cache", lambda: None)
        departure.begun.set()
        request: Any = SimpleNamespace()
        with pytest.raises(LeavingError):
            await ui_routes.get_events(request, 1.0)

    asyncio.run(scenario())
