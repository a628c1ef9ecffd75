"""A disk that is full, broken, stuck, slow or torn: misses, one log line a change, and recovery."""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from store_pages import ManualClock, Pool, assert_served, content_of, key_of, open_store
from symphony_sglang.clock import SystemClock
from symphony_sglang.store import HealthState, ReadOutcome, SyncPolicy, WriteOutcome
from symphony_sglang.store.health import TRANSITIONS, Health, HealthEvent
from symphony_sglang.testing.disk import FaultyDisk, Operation

KEYS = [key_of(number) for number in range(8)]
NEW = [key_of(number, "new") for number in range(8)]


class Bench:
    """A store with KEYS on it, on a disk that fails when told to, in time that is told."""

    def __init__(self, directory: Path, **options) -> None:
        self.disk, self.clock, self.pool = FaultyDisk(), ManualClock(), Pool(8)
        options = {"deadline_seconds": 0.3, "failures_max": 3} | options
        self.store = open_store(directory, disk=self.disk, clock=self.clock, **options)
        self.store.write(self.pool.fill(KEYS))
        assert self.store.flush()

    def until(self, state: HealthState, *, moving: bool = True) -> None:
        for _ in range(200):
            if self.store.state is state:
                return
            if moving:
                self.clock.now += 1.0
            threading.Event().wait(0.02)
        raise AssertionError(f"still {self.store.state}")

    def heal(self) -> None:
        self.disk.heal()
        self.until(HealthState.OK)


@pytest.fixture
def bench(tmp_path: Path):
    made: list[Bench] = []

    def make(**options) -> Bench:
        made.append(Bench(tmp_path, **options))
        return made[-1]

    yield make
    for one in made:
        one.disk.heal()
        one.store.close()
        one.store.check()


Make = Callable[..., Bench]


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_or_read_only_disk_still_serves_what_it_has(bench: Make, caplog, number) -> None:
    one = bench()
    one.disk.fail(Operation.WRITE, number)
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.FAILED] * 8
    assert one.store.state is HealthState.READ_ONLY
    for _ in range(5):
        assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.REFUSED] * 8
    assert_served(one.store, one.pool, KEYS)
    assert len(warnings_of(caplog)) == 1
    one.heal()
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.WRITTEN] * 8
    assert_served(one.store, one.pool, NEW)
    assert len(warnings_of(caplog)) == 1


def test_no_slot_is_lost_to_a_full_disk(bench: Make) -> None:
    one = bench(segments=1)
    for _ in range(20):
        one.disk.fail(Operation.WRITE, errno.ENOSPC)
        one.store.write(one.pool.fill(NEW))
        one.heal()
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.WRITTEN] * 8
    one.store.check()


def test_a_disk_that_fails_every_read_turns_the_store_off_and_on_again(bench: Make, caplog) -> None:
    one = bench(io_bytes=64 * 1024)
    one.disk.fail(Operation.READ, errno.EIO)
    assert one.pool.read(one.store, KEYS) == [None] * 8
    assert one.store.state is HealthState.OFF
    calls = one.disk.calls[Operation.READ]
    assert one.store.prefix_length(KEYS) == 0
    assert one.pool.read(one.store, KEYS) == [None] * 8
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.REFUSED] * 8
    assert one.disk.calls[Operation.READ] == calls
    assert len(warnings_of(caplog)) == 1
    one.heal()
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.WRITTEN] * 8
    assert_served(one.store, one.pool, NEW)


def test_one_bad_spot_costs_its_page_only(bench: Make) -> None:
    one = bench()
    one.disk.fail(Operation.READ, errno.EIO, count=1)
    assert one.pool.read(one.store, KEYS[:1]) == [None]
    assert one.store.state is HealthState.OK
    assert one.store.contains(KEYS) == [False] + [True] * 7
    assert (
        one.store.write(one.pool.fill(KEYS)) == [WriteOutcome.WRITTEN] + [WriteOutcome.PRESENT] * 7
    )
    assert_served(one.store, one.pool, KEYS)


def test_a_failed_write_is_never_readable(bench: Make) -> None:
    one = bench()
    one.disk.fail(Operation.WRITE, errno.EIO, count=1)
    assert WriteOutcome.FAILED in one.store.write(one.pool.fill(NEW[:1]))
    assert not one.store.contains(NEW[:1])[0]
    assert one.store.write(one.pool.fill(NEW[:1])) == [WriteOutcome.WRITTEN]


@pytest.mark.parametrize("kept", [0, 4096, 40960])
def test_a_torn_write_is_a_miss_at_its_first_read(bench: Make, kept: int) -> None:
    one = bench(io_bytes=64 * 1024)
    one.disk.tear_writes(kept)
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.WRITTEN] * 8
    one.disk.heal()
    assert one.pool.read(one.store, NEW) == [None] * 8
    assert one.store.stat().counters["corrupt"] == 8
    assert_served(one.store, one.pool, KEYS)
    assert not any(one.store.contains(NEW))


def test_a_stuck_read_lets_its_caller_go_but_not_its_memory(bench: Make, caplog) -> None:
    one = bench()
    one.disk.hang(Operation.READ)
    started = SystemClock().monotonic()
    result = one.store.read(KEYS, [one.pool.pieces(at) for at in range(8)])
    assert SystemClock().monotonic() - started < 2.0
    assert ReadOutcome.BUSY in result.outcomes
    assert result.hold is not None
    assert not result.hold.wait(0.05)
    assert one.store.state is HealthState.OFF
    assert one.store.prefix_length(KEYS) == 0
    assert len(warnings_of(caplog)) == 1
    one.disk.heal()
    assert result.hold.wait(5.0)
    for at in result.hold.positions:
        np.testing.assert_array_equal(one.pool.page(at), content_of(KEYS[at]))
    one.until(HealthState.OK)
    assert_served(one.store, one.pool, KEYS)


def test_what_was_not_started_is_cancelled_and_frees_its_memory(bench: Make) -> None:
    one = bench(io_threads=1, io_bytes=64 * 1024)
    one.disk.hang(Operation.READ)
    result = one.store.read(KEYS, [one.pool.pieces(at) for at in range(8)])
    assert result.outcomes.count(ReadOutcome.BUSY) == len(result.hold.positions) == 1
    assert result.outcomes.count(ReadOutcome.FAILED) == 7
    one.heal()
    assert result.hold.wait(5.0)
    assert not one.store._s.table.readers.any()


def test_a_stuck_write_never_becomes_readable(bench: Make) -> None:
    one = bench()
    one.disk.hang(Operation.WRITE)
    started = SystemClock().monotonic()
    assert set(one.store.write(one.pool.fill(NEW))) == {WriteOutcome.FAILED}
    assert SystemClock().monotonic() - started < 2.0
    assert one.store.state is HealthState.OFF
    one.pool.array[:] = 1  # the caller reuses its memory while the device still reads it
    one.heal()
    assert not any(one.store.contains(NEW))
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.WRITTEN] * 8
    assert_served(one.store, one.pool, NEW)


def test_a_stuck_sync_lets_the_writer_go(bench: Make) -> None:
    one = bench(sync=SyncPolicy.BATCH)
    one.disk.hang(Operation.SYNC)
    started = SystemClock().monotonic()
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.FAILED] * 8
    assert SystemClock().monotonic() - started < 2.0
    assert one.store.state is HealthState.OFF
    one.heal()
    assert one.store.flush()
    assert_served(one.store, one.pool, KEYS)


def test_a_failed_sync_acknowledges_nothing(bench: Make) -> None:
    one = bench(sync=SyncPolicy.BATCH)
    one.store.drain_events()
    one.disk.fail(Operation.SYNC, errno.EIO)
    assert one.store.write(one.pool.fill(NEW)) == [WriteOutcome.FAILED] * 8
    assert one.store.drain_events().events == []
    assert not {key for chunk in one.store.snapshot() for key in chunk} & set(NEW)


def test_probes_wait_longer_each_time(bench: Make) -> None:
    one = bench(failures_max=1, retry_seconds=1.0, retry_seconds_max=8.0)
    one.disk.fail(Operation.WRITE, errno.EIO)
    one.store.write(one.pool.fill(NEW))
    assert one.store.state is HealthState.OFF
    health = one.store._s.health
    start = one.clock.now
    probed = []
    while len(probed) < 5:
        one.clock.now += 0.5
        before = health._probe_at
        threading.Event().wait(0.06)
        if health._probe_at != before:
            probed.append(one.clock.now - start)
        assert one.clock.now - start < 60
    gaps = np.diff([0.0, *probed])
    assert gaps.tolist() == [1.0, 2.0, 4.0, 8.0, 8.0]


def test_a_disk_without_room_for_a_segment_serves_misses_until_there_is(tmp_path, caplog) -> None:
    disk, clock, pool = FaultyDisk(), ManualClock(), Pool(8)
    disk.fail(Operation.ALLOCATE, errno.ENOSPC)
    with open_store(tmp_path, disk=disk, clock=clock) as store:
        assert store.write(pool.fill(KEYS)) == [WriteOutcome.REFUSED] * 8
        assert store.state is HealthState.READ_ONLY
        assert len(warnings_of(caplog)) == 1
        assert not list(tmp_path.rglob("segment-*"))
        disk.heal()
        for _ in range(200):
            clock.now += 1.0
            threading.Event().wait(0.02)
            if store.state is HealthState.OK:
                break
        assert store.write(pool.fill(KEYS)) == [WriteOutcome.WRITTEN] * 8
        assert_served(store, pool, KEYS)


def test_growth_stops_at_the_floor_and_segments_go_back_below_it(tmp_path: Path) -> None:
    disk, clock, pool = FaultyDisk(), ManualClock(), Pool(8)
    total = disk.free_space(tmp_path).total_bytes
    with open_store(tmp_path, disk=disk, clock=clock, free_floor_share=0.1) as store:
        for start in range(0, 48, 8):
            store.write(pool.fill([key_of(number) for number in range(start, start + 8)]))
            clock.now += 1
        assert store.stat().segments >= 3
        disk.report_free(int(total * 0.1) - 1)
        before = store.stat().segments
        for _ in range(3):
            clock.now += 6
            threading.Event().wait(0.1)
        assert store.flush()
        assert store.stat().segments < before
        store.check()
        last = [key_of(number) for number in range(40, 48)]
        kept = [key for key in last if store.contains([key])[0]]
        if kept:
            assert_served(store, pool, kept)
        count = store.stat().segments
        store.write(pool.fill([key_of(number, "z") for number in range(8)]))
        assert store.stat().segments <= count


def test_reads_go_before_writes(bench: Make) -> None:
    one = bench(io_threads=2, io_bytes=64 * 1024, segments=8, deadline_seconds=30.0)
    many = Pool(48)
    pages = many.fill([key_of(number, "bulk") for number in range(48)])
    one.disk.delay(Operation.WRITE, 0.02)
    writer = threading.Thread(target=one.store.write, args=(pages,))
    one.disk.history.clear()
    writer.start()
    while one.disk.history.count(Operation.WRITE) < 4:
        threading.Event().wait(0.002)
    mark = len(one.disk.history)
    assert_served(one.store, one.pool, KEYS)
    during = one.disk.history[mark:]
    last_read = len(during) - during[::-1].index(Operation.READ)
    # While the 8 reads ran (each a call) at most one thread wrote; without the rule it is 1 : 1.
    assert during[:last_read].count(Operation.WRITE) <= 4
    writer.join()
    assert one.disk.history.count(Operation.WRITE) >= 48


def test_every_state_leads_back_to_ok() -> None:
    reached = {HealthState.OK}
    for _ in HealthState:
        reached |= {state for (state, _), following in TRANSITIONS.items() if following in reached}
    assert reached == set(HealthState)


def test_unlisted_events_change_nothing() -> None:
    for state in HealthState:
        for event in HealthEvent:
            changes: list[HealthState] = []
            health = Health(
                "x",
                ManualClock(),
                failures_max=1,
                retry_seconds=1,
                retry_seconds_max=1,
                on_change=changes.append,
            )
            health._state = state
            health.record(event, "test")
            following = TRANSITIONS.get((state, event))
            assert health.state is (following or state)
            assert changes == ([following] if following else [])


def test_the_feed_asks_for_a_resync_when_the_disk_goes_and_comes(bench: Make) -> None:
    one = bench()
    assert {event.key for event in one.store.drain_events().events} == set(KEYS)
    one.disk.fail(Operation.WRITE, errno.ENOSPC)
    one.store.write(one.pool.fill(NEW))
    assert one.store.drain_events().resync
    assert not one.store.drain_events().resync
    one.heal()
    assert one.store.drain_events().resync
