"""Pages by NIXL between two processes, over TCP: the one optional transport.

python -m pip install --no-deps --target DIR nixl nixl-cu12; PYTHONPATH=DIR pytest ...
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import signal
import subprocess
import sys
import threading

import pytest

from symphony_sglang.errors import ConfigError
from symphony_sglang.store.peer_pages import StagingPool
from symphony_sglang.testing.pages import MemoryPages
from symphony_sglang.wire.nixl_engine import NAME, NixlEngine
from symphony_sglang.wire.page_client import ClientSettings, PageClient
from symphony_sglang.wire.page_server import PageServer, ServerSettings
from symphony_sglang.wire.pages import PageOutcome
from symphony_sglang.wire.pull import Canceller, Pull, PullEnd, PullSettings
from symphony_sglang.wire.secure_channel import TransferKey
from wire_world import CLOCK, PAGE_BYTES, SECRET, body_of, chain, eventually, filled, identity

HASHES = chain(57)
AREA_PAGES = 10

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None,
    reason="nixl is not installed (python -m pip install --no-deps nixl nixl-cu12)",
)


class StagedPages(MemoryPages):
    """Pages that are copied to staging memory when they are opened, as those of a disk are."""

    def __init__(self, staging: StagingPool, pages: dict[bytes, bytes]) -> None:
        super().__init__(PAGE_BYTES, pages)
        self._staging = staging

    def open(self, hashes):
        area = self._staging.acquire(len(hashes), 2.0)
        assert area is not None
        views = []
        for at, key in enumerate(hashes):
            body = self.pages.get(key)
            if body is not None:
                area.view(at)[:] = body
            views.append(None if body is None else [area.view(at)])
        return Opened(self._staging, area, views)


class Opened:
    def __init__(self, staging, area, views) -> None:
        self.views, self._staging, self._area = views, staging, area

    def unchanged(self):
        return [True] * len(self.views)

    def release(self) -> None:
        area, self._area = self._area, None
        if area is not None:
            self._staging.release(area)


class StagedSink(MemoryPages):
    """Takes pages into registered staging memory, then into a dictionary."""

    def __init__(self, staging: StagingPool) -> None:
        super().__init__(PAGE_BYTES)
        self._staging = staging

    def reserve(self, hashes):
        area = self._staging.acquire(len(hashes))
        return None if area is None else Reserved(self, list(hashes), area)


class Reserved:
    def __init__(self, sink: StagedSink, hashes, area) -> None:
        self._sink, self._hashes, self._area = sink, hashes, area
        self.buffers = [area.view(at) for at in range(len(hashes))]

    def commit(self, lengths):
        for key, buffer, length in zip(self._hashes, self.buffers, lengths, strict=True):
            if length is not None:
                self._sink.pages[key] = bytes(buffer[:length])
        self.abort()
        return [length is not None for length in lengths]

    def abort(self) -> None:
        self._sink._staging.release(self._area)


def staging_of(engine: NixlEngine) -> StagingPool:
    staging = StagingPool(PAGE_BYTES, area_bytes=AREA_PAGES * PAGE_BYTES)
    for memory in staging.prepare():
        engine.register(memory)
    return staging


def serve_pages(control, secret: str | None, registered: bool) -> None:
    """The other process: a page server until it is told to end."""
    engine = NixlEngine(CLOCK)
    staging = staging_of(engine) if registered else StagingPool(PAGE_BYTES)
    source = StagedPages(staging, filled(HASHES).pages)
    key = TransferKey(secret) if secret else None
    settings = ServerSettings(local=False)
    with PageServer(
        source, identity(), engines={NAME: engine}, key=key, settings=settings
    ) as server:
        control.send(server.address)
        control.recv()


class Peer:
    def __init__(self, secret: str | None = None, registered: bool = True) -> None:
        context = multiprocessing.get_context("spawn")
        self.control, theirs = context.Pipe()
        self.process = context.Process(
            target=serve_pages, args=(theirs, secret, registered), daemon=True
        )
        self.process.start()
        self.secret = secret
        assert self.control.poll(60), "no page server"
        self.address = self.control.recv()

    def kill(self) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join(10)

    def close(self) -> None:
        self.process.kill()
        self.process.join(10)


@pytest.fixture(scope="module")
def over_tcp():
    # UCX reads it when an agent starts; child processes inherit it.
    before = os.environ.get("UCX_TLS")
    os.environ["UCX_TLS"] = "tcp"
    yield
    os.environ.pop("UCX_TLS") if before is None else os.environ.update(UCX_TLS=before)


@pytest.fixture(scope="module")
def engine(over_tcp):
    return NixlEngine(CLOCK)


@pytest.fixture(scope="module")
def peer(over_tcp):
    made = Peer()
    yield made
    made.close()


def pull(peer: Peer, engine: NixlEngine, *, canceller=None, seconds: float = 20.0):
    sink = StagedSink(staging_of(engine))

    def connect() -> PageClient:
        return PageClient(
            peer.address,
            identity(),
            key=TransferKey(peer.secret) if peer.secret else None,
            settings=ClientSettings(local=False),
            engine=(NAME, engine),
        )

    report = Pull(
        connect, sink, HASHES, PAGE_BYTES, clock=CLOCK, canceller=canceller,
        settings=PullSettings(request_bytes=AREA_PAGES * PAGE_BYTES, connections_max=1),
        deadline=CLOCK.monotonic() + seconds,
    ).run()  # fmt: skip
    sink._staging.check()
    assert sink._staging._lent == 0
    return report, sink


def assert_all(report, sink, way: str) -> None:
    assert (report.end, report.way) == (PullEnd.COMPLETE, way), report
    assert sink.pages == {key: body_of(key) for key in HASHES}


@needs_nixl
def test_pages_arrive_by_nixl(engine, peer) -> None:
    report, sink = pull(peer, engine)
    assert_all(report, sink, "nixl")
    assert report.pages_damaged == 0
    assert report.bytes_received == PAGE_BYTES * len(HASHES)


@needs_nixl
def test_two_pulls_share_the_engine(engine, peer) -> None:
    results = []
    threads = [
        threading.Thread(target=lambda: results.append(pull(peer, engine))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == 2
    for report, sink in results:
        assert_all(report, sink, "nixl")


@needs_nixl
def test_key_is_proved_before_memory_is_told_of(engine) -> None:
    peer = Peer(SECRET)
    try:
        assert_all(*pull(peer, engine), "nixl")
        peer.secret = SECRET + " of another cluster"
        report, _ = pull(peer, engine)
        assert report.end is PullEnd.REFUSED
    finally:
        peer.close()


@needs_nixl
def test_memory_that_was_not_registered_takes_the_socket(engine) -> None:
    peer = Peer(registered=False)
    try:
        report, sink = pull(peer, engine)
        assert_all(report, sink, "stream")
        assert 0 < report.pages_damaged <= 3 * AREA_PAGES  # asked for again
    finally:
        peer.close()


@needs_nixl
def test_server_without_the_engine_takes_the_socket(engine) -> None:
    with PageServer(filled(HASHES), identity(), settings=ServerSettings(local=False)) as server:
        peer = Peer.__new__(Peer)
        peer.address, peer.secret = server.address, None
        assert_all(*pull(peer, engine), "stream")


@needs_nixl
def test_damaged_page_is_found_by_its_checksum(engine, peer, monkeypatch) -> None:
    from symphony_sglang.wire.nixl_engine import NixlReader

    real, calls = NixlReader.copy, []

    def copy_and_spoil(reader, remote, targets, until):
        done = real(reader, remote, targets, until)
        calls.append(done)
        if len(calls) == 1:
            targets[3][100] ^= 1
        return done

    monkeypatch.setattr(NixlReader, "copy", copy_and_spoil)
    report, sink = pull(peer, engine)
    assert_all(report, sink, "nixl")
    assert report.pages_damaged == 1


@needs_nixl
def test_peer_that_dies_ends_the_pull_and_gives_the_memory_back(engine) -> None:
    peer = Peer()
    staging = staging_of(engine)
    area = staging.acquire(AREA_PAGES)
    assert area is not None
    client = PageClient(
        peer.address, identity(), settings=ClientSettings(local=False), engine=(NAME, engine)
    )
    assert client.way == "nixl"
    buffers = [area.view(at) for at in range(AREA_PAGES)]
    first = client.finish(client.begin(HASHES[:AREA_PAGES], buffers))
    assert {outcome for outcome, _ in first} == {PageOutcome.ARRIVED}
    reader = client._reader
    assert reader is not None
    place = [(0x7F0000000000, PAGE_BYTES)]
    peer.kill()
    # The engine says so by itself, or finds out that the address is none of the peer's.
    assert not reader.copy(place, buffers[:1], CLOCK.monotonic() + 5.0)
    client.close()
    report, _ = pull(peer, engine, seconds=5.0)
    assert report.end is PullEnd.LOST
    peer.close()


@needs_nixl
def test_cancelled_pull_leaves_no_transfer(engine, peer) -> None:
    canceller = Canceller()
    canceller.cancel()
    report, _ = pull(peer, engine, canceller=canceller)
    assert report.end is PullEnd.CANCELLED
    eventually(lambda: not engine._readers)
    assert_all(*pull(peer, engine), "nixl")


def test_package_that_is_missing_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "nixl", None)
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(ConfigError, match="pip install --no-deps nixl nixl-cu12"):
        NixlEngine(CLOCK)


def test_package_is_imported_only_where_it_is_chosen() -> None:
    code = (
        "import sys; import symphony_sglang.wire.nixl_engine, symphony_sglang.wire.page_server; "
        "sys.exit('nixl' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
