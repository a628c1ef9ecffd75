"""The storage backend on a failing disk, and what the feed and a peer get from it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import importlib
import mmap
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvme_pools import KEYS, PAGE, fill, host_pool, indices, opened_backends
from symphony_sglang.clock import SystemClock
from symphony_sglang.engine.nvme_backend import (
    BACKUP_HOOK,
    NvmeBackend,
    skip_backup_while_unwritable,
)
from symphony_sglang.errors import StoreError, StoreKeyError
from symphony_sglang.store import PageStore
from symphony_sglang.testing.disk import FaultyDisk, Operation


@pytest.fixture
def opened():
    yield from opened_backends()


def on_faulty_disk(directory: Path, backend: NvmeBackend) -> FaultyDisk:
    """The backend's store again, impatient, on a disk that fails on demand."""
    disk = FaultyDisk()
    namespace, settings = backend.store.namespace, backend.store.settings
    backend.store.close()
    quick = dataclasses.replace(settings, deadline_seconds=0.2, retry_seconds=0.05)
    backend._store = PageStore(directory, namespace, quick, disk=disk)
    return disk


def wait_until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        threading.Event().wait(0.02)
    raise AssertionError("did not come true within 10 s")


def test_a_stuck_read_returns_and_its_pages_stay_out_of_use(tmp_path: Path, opened) -> None:
    backend = opened(tmp_path)
    pool = backend.mem_pool_host
    before = fill(pool)
    backend.batch_set_v1(KEYS[:4], indices([0, 1, 2, 3]))
    disk = on_faulty_disk(tmp_path, backend)
    total = pool.available_size()
    taken = pool.alloc(8 * PAGE)
    pages = (taken[::PAGE] // PAGE).tolist()
    disk.hang(Operation.READ)
    started = SystemClock().monotonic()
    assert backend.batch_get_v1(KEYS[:4], taken[4 * PAGE :]) == [False] * 4
    assert SystemClock().monotonic() - started < 2.0
    assert backend.batch_exists(KEYS[:4]) == 0
    assert not backend.writable

    pool.free(taken)  # as SGLang does when the read has failed
    held = pool.held_tokens
    assert 0 < held <= 4 * PAGE
    assert pool.available_size() == total - held
    everything = pool.alloc(total - held)
    assert not set(everything.tolist()) & set(pool._holds[0].slots.tolist())
    assert pool.alloc(PAGE) is None
    pool.kv_buffer.zero_()

    disk.heal()
    wait_until(lambda: pool.available_size() == held)
    assert pool.held_tokens == 0
    late = pool.kv_buffer.view(torch.int16)
    assert torch.equal(late[:, pages[4:]], before[:, :4])  # the device did write there, late
    pool.free(everything)
    assert pool.available_size() == total
    wait_until(lambda: backend.writable)
    assert backend.batch_get_v1(KEYS[:4], pool.alloc(4 * PAGE)) == [True] * 4


def test_a_flush_does_not_free_what_a_stuck_read_may_write_to(tmp_path: Path, opened) -> None:
    backend = opened(tmp_path)
    pool = backend.mem_pool_host
    backend.batch_set_v1(KEYS[:2], indices([0, 1]))
    disk = on_faulty_disk(tmp_path, backend)
    total = pool.available_size()
    taken = pool.alloc(2 * PAGE)
    disk.hang(Operation.READ)
    backend.batch_get_v1(KEYS[:2], taken)
    pool.clear()
    assert pool.available_size() == total - pool.held_tokens < total
    assert not set(pool.alloc(pool.available_size()).tolist()) & set(taken.tolist())
    disk.heal()
    wait_until(lambda: pool.available_size() == 2 * PAGE)


def test_over_several_ranks_a_stuck_read_waits(tmp_path: Path, opened) -> None:
    """One rank's pool must not have fewer free pages than the others'."""
    backend = opened(tmp_path, tp_size=2)
    backend.batch_set_v1(KEYS[:4], indices([0, 1, 2, 3]))
    disk = on_faulty_disk(tmp_path, backend)
    disk.hang(Operation.READ)
    answers: list[list[bool]] = []
    reader = threading.Thread(
        target=lambda: answers.append(backend.batch_get_v1(KEYS[:4], indices([5, 6, 7, 8])))
    )
    reader.start()
    reader.join(1.0)
    assert reader.is_alive()
    assert backend.batch_exists(KEYS[:4]) == 0
    assert backend.mem_pool_host.held_tokens == 0
    disk.heal()
    reader.join(10.0)
    assert answers == [[False] * 4]


def test_backups_are_skipped_in_silence_while_the_disk_takes_none(
    tmp_path: Path, opened, caplog: pytest.LogCaptureFixture
) -> None:
    from sglang.srt.managers.cache_controller import StorageOperation
    from sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller import HybridCacheController

    backend = opened(tmp_path)
    fill(backend.mem_pool_host)
    disk = on_faulty_disk(tmp_path, backend)
    controller = object.__new__(HybridCacheController)
    controller.storage_backend = backend
    controller.storage_config = backend.storage_config
    controller.page_size = PAGE
    controller.mem_pool_host = SimpleNamespace(layout_lease=contextlib.nullcontext)
    controller.page_set_func = controller._page_set_zero_copy

    def back_up(page: int) -> int:
        tokens = list(range(PAGE))
        operation = StorageOperation(indices([page]), tokens, hash_value=[KEYS[page]])
        operation.pool_transfers = None
        skip_backup_while_unwritable(HybridCacheController._page_backup, controller, operation)
        return operation.completed_tokens

    module, _, owner = BACKUP_HOOK.rpartition(".")[0].rpartition(".")
    assert getattr(importlib.import_module(module), owner) is HybridCacheController
    assert back_up(0) == PAGE
    disk.fail(Operation.WRITE, errno.ENOSPC)
    disk.fail(Operation.ALLOCATE, errno.ENOSPC)
    caplog.set_level("WARNING")
    assert [back_up(page) for page in range(1, 20)] == [0] * 19
    assert backend.backups_skipped == 18
    lines = [record.getMessage() for record in caplog.records]
    assert sum("none are written" in line for line in lines) == 1
    assert sum("pages failed" in line for line in lines) == 1  # the one that met the full disk
    assert backend.batch_get_v1(KEYS[:1], indices([5])) == [True]
    disk.heal()
    wait_until(lambda: backend.writable)
    assert back_up(20) == PAGE


def test_a_consumer_of_the_residency_feed_knows_the_disk(tmp_path: Path, opened) -> None:
    known: set[bytes] = set()

    def follow(backend: NvmeBackend) -> bool:
        drained = backend.drain_residency_events()
        if drained.resync:
            known.clear()
            known.update(key for chunk in backend.residency_snapshot() for key in chunk)
            return True
        for event in drained.events:
            (known.add if event.stored else known.discard)(event.key)
        return False

    keys = [bytes.fromhex(key) for key in KEYS]
    backend = opened(tmp_path)
    assert follow(backend)
    assert known == set()
    assert not follow(backend)
    backend.batch_set_v1(KEYS[:8], indices(list(range(8))))
    backend.store.flush()
    assert not follow(backend)
    assert known == set(keys[:8])
    backend.store.remove(keys[:3])
    backend.store.flush()
    assert not follow(backend)
    assert known == set(keys[3:8])
    backend.close()  # detached
    assert follow(backend)
    assert known == set()
    backend.register_mem_pool_host(host_pool())  # attached again: what is on disk is known at once
    assert follow(backend)
    assert known == set(keys[3:8])


def test_pages_go_to_and_from_memory_beside_the_host_pool(tmp_path: Path, opened) -> None:
    pool = host_pool()
    backend = opened(tmp_path, pool)
    before = fill(pool)
    keys = [bytes.fromhex(key) for key in KEYS]
    backend.batch_set_v1(KEYS[:4], indices([0, 1, 2, 3]))
    received: list[list[bytes]] = []

    def serve() -> None:
        buffers = [mmap.mmap(-1, backend.page_bytes)]  # aligned: no copy
        buffers += [bytearray(backend.page_bytes) for _ in range(3)]
        result = backend.read_pages(keys[:4], buffers)
        assert result.hold is None
        assert {outcome.value for outcome in result.outcomes} == {"hit"}
        received.append([bytes(buffer[:]) for buffer in buffers])

    peer = threading.Thread(target=serve)
    peer.start()
    peer.join(10.0)
    for page, body in enumerate(received[0]):
        assert body == before[:, page].contiguous().numpy().tobytes()  # K of all layers, then V
    arrived = [bytearray(body) for body in received[0]]
    outcomes = backend.write_pages(keys[10:14], arrived, first_depth=10)
    assert [outcome.value for outcome in outcomes] == ["written"] * 4
    assert backend.batch_get_v1(KEYS[10:14], indices([20, 21, 22, 23])) == [True] * 4
    assert torch.equal(pool.kv_buffer.view(torch.int16)[:, 20:24], before[:, :4])
    with pytest.raises(StoreError):
        backend.read_pages(keys[:1], [bytearray(backend.page_bytes - 1)])
    with pytest.raises(StoreKeyError):
        backend.read_pages([b"short"], [bytearray(backend.page_bytes)])
