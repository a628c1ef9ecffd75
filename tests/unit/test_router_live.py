"""The router's stream of events: it ends by itself, cleanly, and holds nothing up."""

from __future__ import annotations

import asyncio

import pytest

from router_world import world
from symphony_sglang.router import live


def test_streams_end_cleanly_and_at_once_when_the_router_leaves() -> None:
    async def scenario() -> None:
        async with world(1) as made:
            # The next event would come in a minute, and requests may run for two.
            url = made.url + "/symphony/events?interval_s=60"
            streams = [await made.client.get(url) for _ in range(3)]
            for stream in streams:
                first = await stream.content.readuntil(b"\n\n")
                assert first.startswith(b"event: residency\ndata: {")
            made.service.live.leave()
            async with asyncio.timeout(5):
                await made.service.server.stop(120.0)
                # A torn answer would raise ClientPayloadError here.
                assert [await stream.content.read() for stream in streams] == [b"", b"", b""]

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_stream_in_the_middle_of_asking_a_worker_ends_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        asked = asyncio.Event()

        async def never() -> dict[str, object]:
            asked.set()
            return await asyncio.get_running_loop().create_future()

        async with world(1) as made:
            monkeypatch.setattr(made.service.live, "_residency", never)
            reading = asyncio.get_running_loop().create_task(made.call("GET", "/symphony/events"))
            await asked.wait()
            made.service.live.leave()
            async with asyncio.timeout(5):
                status, content, _headers = await reading
            assert (status, content) == (200, "")

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_streams_are_bounded_and_end_after_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        monkeypatch.setattr(live, "LISTENERS_MAX", 1)
        monkeypatch.setattr(live, "LISTEN_SECONDS_MAX", 0.5)
        async with world(1) as made:
            url = made.url + "/symphony/events?interval_s=0.2"
            stream = await made.client.get(url)
            await stream.content.readuntil(b"\n\n")
            status, answer, _headers = await made.call("GET", "/symphony/events")
            assert (status, answer["error"]["code"]) == (503, "too_many_listeners")
            async with asyncio.timeout(5):
                assert (await stream.content.read()).startswith(b"event: residency")
            async with made.client.get(url) as another:
                assert another.status == 200

    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_page_is_open_and_its_data_asks_for_the_key() -> None:
    async def scenario() -> None:
        async with world(1, api_key="caller") as made:
            assert (await made.call("GET", "/symphony/ui"))[0] == 200
            for path in ("/symphony/events", "/symphony/residency", "/symphony/sessions/s"):
                assert (await made.call("GET", path))[0] == 401, path
                wrong = {"authorization": "Bearer wrong"}
                assert (await made.call("GET", path, headers=wrong))[0] == 401, path
            headers = {"authorization": "Bearer caller"}
            async with made.client.get(made.url + "/symphony/events", headers=headers) as events:
                assert (await events.content.readuntil(b"\n\n")).startswith(b"event: residency")

    asyncio.run(asyncio.wait_for(scenario(), 30))
