"""What a real worker's feed says is what the worker does."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import zmq

from conftest import DEVICE_TOKENS, PAGE_SIZE, Server, start_server
from feed_world import Seen, until
from symphony_sglang.core.levels import Level
from symphony_sglang.core.page_hash import event_hashes
from symphony_sglang.core.prefix import Namespace, pack_tokens
from symphony_sglang.wire.feed_address import FeedAddress, feed_addresses
from symphony_sglang.wire.subscriber import FeedState, FeedSubscriber

pytestmark = pytest.mark.server

API_KEY = "feed-test-key"
HEADERS = {"Authorization": f"Bearer {API_KEY}"}


class FeedServerUnderTest(Server):
    """A worker with an API key, so that its feed is encrypted."""

    def call(self, method: str, path: str, body: Any = None, **extra: Any) -> Any:
        headers = {**HEADERS, **(extra.pop("headers", None) or {})}
        return super().call(method, path, body, headers=headers, **extra)

    def address(self) -> FeedAddress:
        (address,) = feed_addresses("w0", self.url, residency=self.residency(), api_key=API_KEY)
        return address


@pytest.fixture(scope="module")
def nvme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nvme")


def boot(model: Path, nvme: Path, log: Path, *flags: str) -> FeedServerUnderTest:
    server = start_server(
        model,
        log,
        *("--api-key", API_KEY),
        *("--symphony-nvme-dir", str(nvme), "--symphony-nvme-gb", "2"),
        *flags,
    )
    return FeedServerUnderTest(server.worker, model)


@pytest.fixture(scope="module")
def fed(model: Path, nvme: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    server = boot(model, nvme, tmp_path_factory.mktemp("log") / "feed.log")
    yield server
    server.worker.stop()


@asynccontextmanager
async def following(address: FeedAddress) -> AsyncIterator[tuple[Seen, FeedSubscriber]]:
    seen = Seen()
    subscriber = FeedSubscriber(address, seen)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(subscriber.run())
        await until(lambda: subscriber.state is FeedState.LIVE)
        yield seen, subscriber
        task.cancel()


def prompt(seed: int, tokens: int) -> list[int]:
    return [(seed * 7919 + i * 31) % 30_000 + 100 for i in range(tokens)]


def hashes(tokens: list[int], namespace: Namespace = Namespace()) -> set[int]:  # noqa: B008
    return set(event_hashes(pack_tokens(tokens), PAGE_SIZE, namespace).tolist())


def key(session_id: str) -> tuple[str, None, None]:
    return session_id, None, None


def used_pages(server: Server, level: str) -> int:
    return int(server.residency()["levels"][level]["used_tokens"]) // PAGE_SIZE


def test_feed_and_residency_agree_through_traffic_eviction_disk_and_flush(
    fed: FeedServerUnderTest,
) -> None:
    async def run() -> None:
        async with following(fed.address()) as (seen, subscriber):
            first = prompt(1, 640)
            answer = await asyncio.to_thread(fed.greedy_one, first, 4, session_id="talk")
            pages = hashes(first)
            await until(lambda: pages <= seen.pages[Level.DEVICE])
            await until(lambda: pages <= seen.pages[Level.HOST])
            await until(lambda: pages <= seen.pages[Level.NVME])
            await until(lambda: key("talk") in seen.sessions)
            session = seen.sessions[key("talk")]
            assert session.turns == 1
            known = await asyncio.to_thread(fed.call, "GET", "/symphony/sessions/talk")
            assert session.total_tokens == known.body["tokens"]["total"]
            whole = (first + answer["output_ids"])[: session.total_tokens]
            last = int(event_hashes(pack_tokens(whole), PAGE_SIZE)[-1])
            digest = bytes.fromhex(session.last_page_hash)
            assert int.from_bytes(digest[:8], "big", signed=True) == last

            # Push it off the device.
            for seed in range(2, 2 + DEVICE_TOKENS // 1500 + 3):
                await asyncio.to_thread(fed.greedy_one, prompt(seed, 1600), 1)
            await until(lambda: not pages <= seen.pages[Level.DEVICE])
            assert pages <= seen.pages[Level.HOST]
            await until(
                lambda: (
                    len(seen.pages[Level.DEVICE]) == used_pages(fed, "device")
                    and len(seen.pages[Level.HOST]) == used_pages(fed, "host")
                    and len(seen.pages[Level.NVME]) == used_pages(fed, "nvme")
                )
            )
            assert seen.load.requests_running == 0
            assert seen.running_max >= 1
            assert seen.load.device_total_tokens == DEVICE_TOKENS

            await asyncio.to_thread(fed.flush)
            await until(lambda: not seen.pages[Level.DEVICE] and not seen.pages[Level.HOST])
            await until(lambda: len(seen.pages[Level.NVME]) == used_pages(fed, "nvme"))
            assert pages <= seen.pages[Level.NVME]

            # An advisory moves it up with no request running.
            await asyncio.to_thread(
                fed.call, "POST", "/symphony/advise", {"session_id": "talk", "expected_in_s": 1}
            )
            await until(lambda: pages <= seen.pages[Level.DEVICE])
            gone = await asyncio.to_thread(fed.call, "DELETE", "/symphony/sessions/talk")
            assert gone.status == 200
            await until(lambda: key("talk") not in seen.sessions)
            assert subscriber.counters.gaps == 0
            assert subscriber.counters.malformed == 0
            assert subscriber.counters.snapshots == 1

    asyncio.run(run())


def test_salted_pages_have_one_name_on_every_level(fed: FeedServerUnderTest) -> None:
    async def run() -> None:
        async with following(fed.address()) as (seen, _subscriber):
            tokens = prompt(77, 320)
            await asyncio.to_thread(fed.greedy_one, tokens, 1, cache_salt="pepper")
            pages = hashes(tokens, Namespace(None, "pepper"))
            assert pages.isdisjoint(hashes(tokens))
            for level in (Level.DEVICE, Level.HOST, Level.NVME):
                await until(lambda level=level: pages <= seen.pages[level])

    asyncio.run(run())


def test_snapshot_route_equals_what_a_follower_knows(fed: FeedServerUnderTest) -> None:
    async def run() -> None:
        async with following(fed.address()) as (seen, _subscriber):
            await asyncio.to_thread(fed.greedy_one, prompt(50, 480), 1, session_id="snap")
            await until(lambda: hashes(prompt(50, 480)) <= seen.pages[Level.NVME])
            answer = await asyncio.to_thread(fed.call, "GET", "/symphony/snapshot")
            assert answer.status == 200, answer
            (rank,) = answer.body["ranks"]
            for level in (Level.DEVICE, Level.HOST, Level.NVME):
                assert set(rank["pages"][level.value]) == seen.pages[level]
            assert {key(item["session_id"]) for item in rank["sessions"]} == set(seen.sessions)

    asyncio.run(run())


def test_snapshot_and_feed_need_the_key(fed: FeedServerUnderTest) -> None:
    assert Server(fed.worker, fed.model).call("GET", "/symphony/snapshot").status == 401
    address = fed.address()
    socket = zmq.Context.instance().socket(zmq.SUB)
    try:
        socket.linger = 0
        socket.subscribe(b"")
        assert address.state_port is not None
        socket.connect(address.endpoint(address.state_port))
        assert socket.poll(1500) == 0, "three heartbeats were due, none may be readable"
    finally:
        socket.close()


def test_restarted_worker_is_found_again_with_what_its_disk_kept(
    model: Path, tmp_path: Path
) -> None:
    nvme, port = tmp_path / "pages", None
    server = boot(model, nvme, tmp_path / "first.log")
    port = int(server.url.rpartition(":")[2])
    tokens = prompt(5, 640)

    async def run() -> None:
        nonlocal server
        async with following(server.address()) as (seen, _subscriber):
            await asyncio.to_thread(server.greedy_one, tokens, 2, session_id="kept")
            await until(lambda: hashes(tokens) <= seen.pages[Level.NVME])
            await until(lambda: key("kept") in seen.sessions)
            await asyncio.sleep(1.5)  # the session's record becomes durable within a second
            process = server.worker.process
            os.killpg(process.pid, signal.SIGKILL)
            await until(lambda: seen.states[-1] is FeedState.LOST, 30)
            server.worker.stop()
            server = await asyncio.to_thread(
                boot, model, nvme, tmp_path / "second.log", "--port", str(port)
            )
            await until(lambda: seen.states[-1] is FeedState.LIVE, 60)
            assert hashes(tokens) <= seen.pages[Level.NVME]
            assert hashes(tokens).isdisjoint(seen.pages[Level.DEVICE])
            await until(lambda: key("kept") in seen.sessions)

    try:
        asyncio.run(run())
    finally:
        server.worker.stop()


def test_stock_consumer_reads_our_events_with_sglangs_own_types(
    model: Path, tmp_path: Path
) -> None:
    """Without a key, as SGLang's own subscribers connect; decoded by SGLang's structs."""
    import msgspec
    from sglang.srt.disaggregation.kv_events import BlockRemoved, BlockStored, KVEventBatch

    server = start_server(
        model, tmp_path / "stock.log", "--symphony-nvme-dir", str(tmp_path / "pages")
    )
    try:
        info = server.call("GET", "/server_info").body["kv_events"]
        assert info["dp_size"] == 1
        assert info["block_size"] == PAGE_SIZE
        context = zmq.Context.instance()
        subscription = context.socket(zmq.SUB)
        subscription.subscribe(info["topic"].encode())
        subscription.connect(f"tcp://127.0.0.1:{info['endpoint_port_base']}")
        time.sleep(0.3)
        tokens = prompt(9, 480)
        server.greedy_one(tokens, 1, session_id="stock")
        decoder = msgspec.msgpack.Decoder(type=KVEventBatch)
        media: dict[str, set[int]] = {}
        sequences = []
        deadline = time.monotonic() + 20  # noqa: TID251
        while media.get("DISK", set()) < hashes(tokens) and time.monotonic() < deadline:  # noqa: TID251
            if not subscription.poll(200):
                continue
            _topic, sequence, payload = subscription.recv_multipart()
            sequences.append(int.from_bytes(sequence, "big"))
            for event in decoder.decode(payload).events:
                if isinstance(event, BlockStored):
                    media.setdefault(event.medium, set()).update(event.block_hashes)
                    assert event.block_size == PAGE_SIZE
                    if event.medium == "GPU":
                        assert event.session_id == "stock"
                        assert len(event.token_ids) == PAGE_SIZE * len(event.block_hashes)
                else:
                    assert isinstance(event, BlockRemoved)
        for medium in ("GPU", "CPU_PINNED", "DISK"):
            assert hashes(tokens) <= media[medium], medium
        assert sequences == list(range(sequences[0], sequences[0] + len(sequences)))
        # SGLang's replay protocol, from the very start.
        replay = context.socket(zmq.DEALER)
        replay.connect(f"tcp://127.0.0.1:{info['replay_endpoint_port_base']}")
        replay.send_multipart([b"", (0).to_bytes(8, "big")])
        got = []
        while replay.poll(5000):
            _empty, _topic, sequence, payload = replay.recv_multipart()
            if int.from_bytes(sequence, "big", signed=True) == -1:
                break
            got.append((int.from_bytes(sequence, "big"), decoder.decode(payload)))
        assert [number for number, _ in got][-len(sequences) :] == sequences
        assert type(got[0][1].events[0]).__name__ == "AllBlocksCleared"
        subscription.close(linger=0)
        replay.close(linger=0)
    finally:
        server.worker.stop()


def test_descriptor_is_json_and_names_three_ports(fed: FeedServerUnderTest) -> None:
    described = fed.residency()["feed"]
    ports = {described[name] for name in ("events_port", "replay_port", "state_port")}
    assert len(ports) == 3
    assert described["encrypted"] is True
    assert json.loads(json.dumps(described)) == described


def test_one_of_two_tensor_parallel_ranks_publishes(tp_worker: Server) -> None:
    async def run() -> None:
        (address,) = feed_addresses("tp", tp_worker.url, residency=tp_worker.residency())
        async with following(address) as (seen, subscriber):
            tokens = prompt(3, 320)
            await asyncio.to_thread(tp_worker.greedy_one, tokens, 1)
            await until(lambda: hashes(tokens) <= seen.pages[Level.HOST])
            assert hashes(tokens) <= seen.pages[Level.DEVICE]
            await asyncio.to_thread(tp_worker.flush)
            await until(lambda: not seen.pages[Level.DEVICE])
            assert subscriber.counters.gaps == 0

    asyncio.run(run())
