"""The threads that do the system calls: reads before writes, batches with a deadline."""

from __future__ import annotations

import logging
import mmap
import threading
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum

from symphony_sglang.store.disk import ALIGNMENT
from symphony_sglang.store.page import HEADER_BYTES

logger = logging.getLogger(__name__)

# Pages that one system call may carry: bounds the headers a thread owns and the length of the
# vector (IOV_MAX is 1,024).
PAGES_PER_CALL_MAX = 64
BOUNCE_BYTES = 1 << 20


class Direction(Enum):
    READ = 0
    WRITE = 1


class Scratch:
    """One thread's own aligned memory: header blocks, and a buffer for what is not aligned."""

    def __init__(self) -> None:
        size = PAGES_PER_CALL_MAX * HEADER_BYTES + BOUNCE_BYTES + 2 * ALIGNMENT
        self._memory = mmap.mmap(-1, size)
        view = memoryview(self._memory)
        view[:] = bytes(size)  # the first touch of a page is slow on a virtual machine: pay it now
        split = PAGES_PER_CALL_MAX * HEADER_BYTES
        self.headers = [view[at : at + HEADER_BYTES] for at in range(0, split, HEADER_BYTES)]
        self.bounce = view[split:]


Task = Callable[[Scratch], None]


class Batch:
    """The tasks of one call. `wait` returns at the deadline even if a system call never does."""

    def __init__(self, pool: IoPool, direction: Direction, tasks: Sequence[Task]) -> None:
        self.direction = direction
        self._pool = pool
        self._left = len(tasks)
        self._done = threading.Event()
        if not tasks:
            self._done.set()

    def wait(self, seconds: float | None) -> bool:
        """True when every task has finished or was cancelled before it started."""
        return self._done.wait(seconds)

    def cancel(self) -> list[Task]:
        """Drop the tasks that no thread has taken, and return them. Running ones go on."""
        return self._pool._cancel(self)

    def _finish(self, count: int) -> None:
        # Called with the pool's lock held.
        self._left -= count
        if self._left == 0:
            self._done.set()


class IoPool:
    """A fixed number of daemon threads over two queues.

    Reads are taken first. While a read is queued or running, at most `writes_beside_reads` writes
    run, so that a background backup cannot slow a demand read down, nor starve.
    The queues are bounded by the callers: each call of the store waits for its own batch.

    A thread that takes a task wakes the next one if there is more to take. Waking all at once has
    them fight for the interpreter lock, which the waker holds and each needs before its system
    call: that took a third of all time in Python at pages of 100 KB.
    """

    def __init__(self, name: str, threads: int, writes_beside_reads: int) -> None:
        self._writes_beside_reads = writes_beside_reads
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._queues: dict[Direction, deque[tuple[Batch, Task]]] = {
            direction: deque() for direction in Direction
        }
        self._running = dict.fromkeys(Direction, 0)
        self._closed = False
        self._scratches = [Scratch() for _ in range(threads)]
        self._threads = [
            threading.Thread(target=self._run, args=(scratch,), name=f"{name}-{at}", daemon=True)
            for at, scratch in enumerate(self._scratches)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, direction: Direction, tasks: Sequence[Task]) -> Batch:
        batch = Batch(self, direction, tasks)
        with self._work:
            if self._closed:
                raise RuntimeError("the I/O pool is closed")
            self._queues[direction].extend([(batch, task) for task in tasks])
            self._work.notify()
        return batch

    def close(self, seconds: float) -> bool:
        """Stop after what is queued; False if a system call is stuck and its thread stays."""
        with self._work:
            self._closed = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join(seconds)
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def reads_waiting(self) -> bool:
        return bool(self._queues[Direction.READ]) or self._running[Direction.READ] > 0

    def _cancel(self, batch: Batch) -> list[Task]:
        with self._lock:
            queue = self._queues[batch.direction]
            dropped = [task for owner, task in queue if owner is batch]
            kept = [entry for entry in queue if entry[0] is not batch]
            queue.clear()
            queue.extend(kept)
            if dropped:
                batch._finish(len(dropped))
            return dropped

    def _next(self) -> deque[tuple[Batch, Task]] | None:
        """The queue to take from, if any; called with the lock held."""
        if self._queues[Direction.READ]:
            return self._queues[Direction.READ]
        if not self._queues[Direction.WRITE]:
            return None
        reading = self._running[Direction.READ] > 0
        if reading and self._running[Direction.WRITE] >= self._writes_beside_reads:
            return None
        return self._queues[Direction.WRITE]

    def _run(self, scratch: Scratch) -> None:
        while True:
            with self._work:
                queue = self._next()
                while queue is None:
                    if self._closed and not any(self._queues.values()):
                        return
                    self._work.wait()
                    queue = self._next()
                batch, task = queue.popleft()
                self._running[batch.direction] += 1
                if self._next() is not None:
                    self._work.notify()
            try:
                task(scratch)
            except Exception:
                logger.exception("page store: an I/O task failed unexpectedly")
            finally:
                with self._work:
                    self._running[batch.direction] -= 1
                    batch._finish(1)
                    if self._closed:
                        self._work.notify_all()
