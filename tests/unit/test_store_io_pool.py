"""The I/O threads: reads first, one write beside them, cancellation, tasks that raise."""

from __future__ import annotations

import threading

import pytest

from symphony_sglang.store.io_pool import Direction, IoPool


@pytest.fixture
def pool():
    made = IoPool("test", threads=4, writes_beside_reads=1)
    yield made
    assert made.close(5.0)


class Gate:
    """A task that says when it runs and ends when it is let go."""

    def __init__(self) -> None:
        self.started, self.release = threading.Event(), threading.Event()

    def __call__(self, scratch) -> None:
        self.started.set()
        assert self.release.wait(10.0)


def running(gates: list[Gate]) -> int:
    return sum(gate.started.is_set() for gate in gates)


def test_one_write_at_most_runs_beside_a_read(pool: IoPool) -> None:
    read, writes = Gate(), [Gate() for _ in range(8)]
    reading = pool.submit(Direction.READ, [read])
    assert read.started.wait(5.0)
    assert pool.reads_waiting
    writing = pool.submit(Direction.WRITE, writes)
    assert writes[0].started.wait(5.0)
    threading.Event().wait(0.1)
    assert running(writes) == 1
    writes[0].release.set()
    assert writes[1].started.wait(5.0)  # not starved
    threading.Event().wait(0.05)
    assert running(writes) == 2
    read.release.set()
    assert reading.wait(5.0)
    for gate in writes[2:5]:  # all four threads write again
        assert gate.started.wait(5.0)
    for gate in writes:
        gate.release.set()
    assert writing.wait(5.0)


def test_a_read_overtakes_queued_writes(pool: IoPool) -> None:
    writes, read = [Gate() for _ in range(8)], Gate()
    writing = pool.submit(Direction.WRITE, writes)
    for gate in writes[:4]:
        assert gate.started.wait(5.0)
    pool.submit(Direction.READ, [read])
    writes[0].release.set()
    assert read.started.wait(5.0)
    assert running(writes) == 4
    read.release.set()
    for gate in writes:
        gate.release.set()
    assert writing.wait(5.0)


def test_cancelling_drops_what_has_not_started_only(pool: IoPool) -> None:
    gates = [Gate() for _ in range(6)]
    batch = pool.submit(Direction.READ, gates)
    for gate in gates[:4]:
        assert gate.started.wait(5.0)
    assert not batch.wait(0.05)
    assert batch.cancel() == gates[4:]
    assert not batch.wait(0.05)
    for gate in gates[:4]:
        gate.release.set()
    assert batch.wait(5.0)
    assert running(gates) == 4


def test_a_task_that_raises_ends_its_batch_not_its_thread(pool: IoPool, caplog) -> None:
    def broken(scratch) -> None:
        raise ZeroDivisionError

    for _ in range(8):
        assert pool.submit(Direction.WRITE, [broken]).wait(5.0)
    done = threading.Event()
    assert pool.submit(Direction.READ, [lambda _: done.set()]).wait(5.0)
    assert done.is_set()
    assert "unexpectedly" in caplog.text


def test_no_tasks_are_done_at_once(pool: IoPool) -> None:
    assert pool.submit(Direction.READ, []).wait(0)


def test_scratch_is_aligned_and_a_thread_owns_it(pool: IoPool) -> None:
    from symphony_sglang.store.transfer import is_aligned, piece_of

    seen = set()
    barrier = threading.Barrier(4, timeout=5.0)

    def look(scratch) -> None:
        barrier.wait()
        assert all(is_aligned([piece_of(block)], 4096) for block in scratch.headers)
        seen.add(piece_of(scratch.bounce)[0])

    assert pool.submit(Direction.READ, [look] * 4).wait(5.0)
    assert len(seen) == 4
    assert all(address % 4096 == 0 for address in seen)
