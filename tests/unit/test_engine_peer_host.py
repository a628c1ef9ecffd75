"""Pages served from a real host pool: what arrives is right, whatever becomes of the memory."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_engine_peer import Driver

from nvme_pools import KEYS, PAGE, fill, host_pool, indices, opened_backends
from symphony_sglang.engine import nvme_backend
from symphony_sglang.engine.peer import PeerLevel
from symphony_sglang.engine.peer_host import HostPages, HostPageSource, watch_host_pool
from symphony_sglang.store import keys_from_hex
from symphony_sglang.store.peer_pages import StagingPool, StorePageSource
from symphony_sglang.testing.pages import MemoryPages
from symphony_sglang.wire.page_client import ClientSettings
from symphony_sglang.wire.page_server import ServerSettings
from symphony_sglang.wire.page_session import PageSession
from symphony_sglang.wire.pull import PageState, PullEnd
from wire_world import CLOCK, STREAM, identity, pull, serve

NAMES = keys_from_hex(KEYS)
WAYS = pytest.mark.parametrize(
    "settings", [STREAM, ClientSettings(local=True)], ids=["stream", "local"]
)


class Level:
    """A host pool and its NVMe level, with the source that a page server would have."""

    def __init__(self, backend, pool) -> None:
        self.backend, self.pool = backend, pool
        host = watch_host_pool(pool)
        assert host is not None
        self.host: HostPages = host
        backend.on_pages = host.noted
        self.page_bytes = backend.page_bytes
        stored = StorePageSource(backend.store, StagingPool(self.page_bytes), wait_seconds=1.0)
        self.source = HostPageSource(host, stored)

    def allocate(self, pages: int) -> list[int]:
        taken = self.pool.alloc(pages * PAGE)
        return (taken[::PAGE] // PAGE).tolist()

    def body(self, page: int) -> bytes:
        """A page's K and V as they are in the pool now."""
        raw = self.pool.kv_buffer.view(torch.int16)[:, page].contiguous()
        return raw.numpy().tobytes()

    def pull(self, names, settings=STREAM, sink=None):
        sink = sink or MemoryPages(self.page_bytes)
        who = identity(page_bytes=self.page_bytes)
        with serve(self.source, who=who) as server:
            report = pull(
                server.address, sink, names, who=who, settings=settings, page_bytes=self.page_bytes,
                request_bytes=8 * self.page_bytes,
            )  # fmt: skip
        sink.check()
        return report, sink


@pytest.fixture
def level(tmp_path: Path):
    made = opened_backends()
    make = next(made)
    pool = host_pool()
    fill(pool)
    yield Level(make(tmp_path, pool), pool)
    next(made, None)


@WAYS
def test_pages_are_read_from_the_pool_and_not_from_disk(level, settings, monkeypatch) -> None:
    pages = level.allocate(20)
    level.backend.batch_set_v1(KEYS[:20], indices(pages))
    monkeypatch.setattr(level.backend.store, "read", lambda *_: pytest.fail("read from disk"))
    report, sink = level.pull(NAMES[:20], settings)
    assert report.end is PullEnd.COMPLETE, report
    assert [sink.pages[name] for name in NAMES[:20]] == [level.body(page) for page in pages]
    assert level.source.pages_from_host == 20
    level.host.check()


@WAYS
def test_pages_that_left_the_pool_come_from_disk(level, settings) -> None:
    pages = level.allocate(20)
    level.backend.batch_set_v1(KEYS[:20], indices(pages))
    bodies = [level.body(page) for page in pages]
    level.pool.free(indices(pages[5:12]))
    # Their memory still holds them until it is handed out again.
    assert all(level.host.find(NAMES[:20]))
    taken = level.allocate(64 - 13)
    assert set(pages[5:12]) <= set(taken)
    level.pool.kv_buffer[:, taken] = 0
    report, sink = level.pull(NAMES[:20], settings)
    assert report.end is PullEnd.COMPLETE, report
    assert [sink.pages[name] for name in NAMES[:20]] == bodies
    assert level.source.pages_from_host == 13


@WAYS
def test_page_whose_memory_is_reused_while_it_is_sent_is_asked_for_again(
    level, settings, monkeypatch
) -> None:
    pages = level.allocate(20)
    level.backend.batch_set_v1(KEYS[:20], indices(pages))
    bodies = [level.body(page) for page in pages]
    real, done = PageSession._unchanged, []

    def evict_then_check(session, opened):
        if not done:
            done.append(True)
            level.pool.free(indices(pages[2:4]))
            taken = level.allocate(64 - 18)
            level.pool.kv_buffer[:, taken] = 0
        return real(session, opened)

    monkeypatch.setattr(PageSession, "_unchanged", evict_then_check)
    report, sink = level.pull(NAMES[:20], settings)
    assert report.end is PullEnd.COMPLETE, report
    assert report.pages_damaged == 2
    assert [sink.pages[name] for name in NAMES[:20]] == bodies


def test_pages_that_the_disk_does_not_take_are_served_all_the_same(level) -> None:
    pages = level.allocate(6)
    operation = SimpleNamespace(hash_value=KEYS[:6], host_indices=indices(pages))
    backend = level.backend
    controller = SimpleNamespace(storage_backend=backend)
    closed = type(backend).writable
    try:
        type(backend).writable = False
        nvme_backend.skip_backup_while_unwritable(lambda *_: None, controller, operation)
    finally:
        type(backend).writable = closed
    assert not any(backend.store.contains(NAMES[:6]))
    assert level.source.lookup(NAMES[:7]) == [True] * 6 + [False]
    report, sink = level.pull(NAMES[:6])
    assert report.end is PullEnd.COMPLETE
    assert [sink.pages[name] for name in NAMES[:6]] == [level.body(page) for page in pages]


def test_pages_read_from_disk_are_served_from_where_they_were_put(level) -> None:
    level.backend.batch_set_v1(KEYS[:4], indices(level.allocate(4)))
    level.pool.clear()
    assert level.host.find(NAMES[:4]) == [None] * 4
    pages = level.allocate(4)
    assert level.backend.batch_get_v1(KEYS[:4], indices(pages)) == [True] * 4
    assert [place.page for place in level.host.find(NAMES[:4])] == pages


def test_flush_takes_everything_away(level) -> None:
    level.backend.batch_set_v1(KEYS[:4], indices(level.allocate(4)))
    opened = level.source.open(NAMES[:4])
    level.pool.clear()
    assert opened.unchanged() == [False] * 4
    assert len(level.host) == 0
    level.host.check()


def test_a_key_that_moves_is_known_by_its_newest_place(level) -> None:
    level.host.put(NAMES[:3], [7, 8, 9])
    level.host.put(NAMES[:1], [8])
    assert [place and place.page for place in level.host.find(NAMES[:3])] == [8, None, 9]
    level.host.put([NAMES[5], NAMES[1]], [9, 7])
    assert [place and place.page for place in level.host.find(NAMES[:3])] == [8, 7, None]
    level.host.check()


class Engine:
    """Notes what a one-sided engine is told of."""

    def __init__(self) -> None:
        self.registered: list[memoryview] = []

    def register(self, memory: memoryview) -> None:
        self.registered.append(memory)

    def metadata(self) -> bytes:
        return b""


def test_engine_knows_the_pool_and_all_staging_memory_from_the_start(level) -> None:
    engine = Engine()
    assert len(level.host) == 0
    peer = PeerLevel(
        Driver(), level.backend.store, settings=ServerSettings(), key=None, clock=CLOCK,
        rank=0, ranks=1, host=level.host, engine=engine,
    )  # fmt: skip
    try:
        assert engine.registered[0] is level.host.memory
        assert len(engine.registered) == 1 + 2 * 6
        assert peer.describe()["transfer"] == "nixl"
    finally:
        peer.close()


def test_pools_whose_pages_can_move_are_left_alone() -> None:
    assert watch_host_pool(SimpleNamespace(shared_allocation_domain=object())) is None


@WAYS
def test_nothing_wrong_arrives_while_the_pool_is_written_all_the_time(level, settings) -> None:
    """A scheduler that evicts and refills beside the readers: each page is whole and its own."""
    stop = threading.Event()
    chance = random.Random(6)
    bodies: dict[bytes, bytes] = {}
    live: dict[int, list[int]] = {}
    generator = torch.Generator().manual_seed(3)
    for at, name in enumerate(NAMES):
        values = torch.randint(0, 999, level.pool.kv_buffer[:, 0].shape, generator=generator)
        bodies[name] = values.to(level.pool.dtype).view(torch.int16).numpy().tobytes()
        live[at] = []
    shape, dtype = level.pool.kv_buffer[:, 0].shape, level.pool.dtype

    def refill() -> None:
        while not stop.is_set():
            at = chance.randrange(len(NAMES))
            for page in live[at]:
                level.pool.free(indices([page]))
            live[at] = []
            other = chance.randrange(len(NAMES))
            if live[other]:
                continue
            [page] = live[other] = level.allocate(1)
            raw = torch.frombuffer(bytearray(bodies[NAMES[other]]), dtype=dtype).view(shape)
            level.pool.kv_buffer[:, page] = raw
            level.host.put([NAMES[other]], [page])

    writer = threading.Thread(target=refill)
    writer.start()
    arrived = 0
    try:
        for _ in range(30):
            report, sink = level.pull(NAMES, settings)
            assert report.end in (PullEnd.COMPLETE, PullEnd.SHORT), report
            arrived += report.states.count(PageState.STORED)
            for name, body in sink.pages.items():
                assert body == bodies[name], name.hex()
    finally:
        stop.set()
        writer.join()
    level.host.check()
    assert arrived > 0
