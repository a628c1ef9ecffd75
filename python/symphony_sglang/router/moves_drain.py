"""Workers that are to go: their sessions are handed off, then they are removed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.core.migration import Move, MoveCause, MoveState
from symphony_sglang.core.migration_book import MoveBook
from symphony_sglang.router.registry import Worker, WorkerRegistry

logger = logging.getLogger(__name__)

# A session that cannot be moved (shorter than a page, its pages lost) must not hold a worker up.
TRIES_MAX = 2


@dataclass(slots=True)
class Drain:
    """One worker's. `leaving`: it ends by itself, so it is not for us to remove."""

    worker: Worker
    ends_at_seconds: float
    leaving: bool = False
    failures: Counter[str] = field(default_factory=Counter)
    handed_off: int = 0


class Drains:
    """All workers that drain."""

    def __init__(
        self,
        registry: WorkerRegistry,
        book: MoveBook,
        open_moves: Callable[[], list[Move]],
        clock: Clock,
        seconds_max: float,
    ) -> None:
        """`seconds_max`: then a worker is removed whatever it still has."""
        self._registry = registry
        self._book = book
        self._open_moves = open_moves
        self._clock = clock
        self._seconds_max = seconds_max
        self._drains: dict[str, Drain] = {}
        registry.events.removed.append(self._on_removed)

    def __len__(self) -> int:
        return len(self._drains)

    def _on_removed(self, worker: Worker) -> None:
        self._drains.pop(worker.worker_id, None)

    def begin(self, worker: Worker, *, leaving: bool = False) -> dict[str, Any]:
        """No new sessions from now on; the record. Asked again, the record as it is."""
        drain = self._drains.get(worker.worker_id)
        if drain is None:
            ends = self._clock.monotonic() + self._seconds_max
            drain = self._drains[worker.worker_id] = Drain(worker, ends)
            self._registry.update(worker, draining=True)
            logger.info("draining %s: %d sessions", worker.url, len(self.sessions(worker)))
        if leaving and not drain.leaving:
            drain.leaving = True
            self._registry.update(worker, leaving=True)
        return {
            "status": "draining",
            "worker_id": worker.worker_id,
            "url": worker.url,
            "sessions": len(self.sessions(worker)),
            "sessions_handed_off": drain.handed_off,
            "requests": worker.active,
        }

    def came_back(self, worker: Worker) -> None:
        """A worker that had left is there again."""
        drain = self._drains.get(worker.worker_id)
        if drain is not None and drain.leaving:
            del self._drains[worker.worker_id]
            self._registry.update(worker, draining=False, leaving=False)

    def sessions(self, worker: Worker) -> list[str]:
        """What is still to be handed off."""
        drain = self._drains.get(worker.worker_id)
        failures = drain.failures if drain is not None else Counter[str]()
        return [
            key
            for domain_id in worker.domain_ids
            for key in self._book.owned_by(domain_id)
            if failures[key] < TRIES_MAX
        ]

    def move_ended(self, move: Move) -> None:
        found = self._registry.domain(move.source_id)
        drain = self._drains.get(found[0].worker_id) if found is not None else None
        if drain is None:
            return
        if move.state is MoveState.DONE:
            drain.handed_off += 1
        elif move.cause is MoveCause.DRAIN:
            drain.failures[move.session_id] += 1

    def tick(self) -> None:
        """Remove those that have nothing left."""
        now = self._clock.monotonic()
        for drain in list(self._drains.values()):
            worker = drain.worker
            late = now >= drain.ends_at_seconds
            moving = any(m.source_id in worker.domain_ids for m in self._open_moves())
            left = len(self.sessions(worker))
            if not late and (moving or left or worker.active):
                continue
            if drain.leaving:
                continue
            level = logging.WARNING if left or worker.active else logging.INFO
            logger.log(
                level, "drained %s: %d sessions handed off, %d left, %d given up",
                worker.url, drain.handed_off, left, len(drain.failures),
            )  # fmt: skip
            self._registry.remove(worker, "drained")
