"""The NVMe level for the feed: what is on this rank's disk, by the hashes that events use.

Rank 0's disk speaks for all tensor-parallel ranks: each rank keeps its own, written and evicted in
step, and a read takes the least of what all have. It may be ahead by the pages of one commit.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.page_hash import (
    event_hash,
    event_seed,
    hash_chain,
    pack_event_hashes,
    storage_seed,
)
from symphony_sglang.core.prefix import Namespace, pack_tokens
from symphony_sglang.engine.nvme_backend import NvmeBackend, active_backends
from symphony_sglang.store import ResidencyEvent
from symphony_sglang.wire.feed import BlockRemoved, BlockStored, Medium
from symphony_sglang.wire.feed_settings import DiskDrain

# Events taken at a time: what one turn of the feed's thread may cost.
DRAIN_MAX = 4096
# Pages of namespaced prefixes whose two names are remembered; the oldest go first, and are then
# announced by a name that no prompt matches.
NAMES_MAX = 262_144
POLL_SECONDS = 0.05


class EventNames:
    """Event hashes of pages on disk: another chain than the store's keys where a salt is set.

    Learned on the way, from salted events and from sessions, for the store knows no tokens. Without
    a namespace both chains agree, and nothing is kept.
    """

    def __init__(self, page_size: int, names_max: int = NAMES_MAX) -> None:
        self._page_size = page_size
        self._names_max = names_max
        # The store's key as an event hash would have it -> the event hash.
        self._names: OrderedDict[int, int] = OrderedDict()
        # Event hash of a salted page -> its storage digest, to go on from.
        self._digests: OrderedDict[int, bytes] = OrderedDict()
        # A snapshot reads while the feed's thread learns.
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._names)

    def of_keys(self, keys: Sequence[bytes]) -> array[int]:
        """Event hashes of store keys (32 bytes each), in order."""
        hashes = array("q", pack_event_hashes(keys).tobytes())
        if self._names:
            with self._lock:
                names = self._names
                return array("q", [names.get(page, page) for page in hashes])
        return hashes

    def learn_session(self, namespace: Namespace, token_bytes: bytes) -> None:
        """Both names of every page of a session's prefix."""
        if storage_seed(namespace) is None:
            return
        stored = hash_chain(token_bytes, self._page_size, storage_seed(namespace))
        told = hash_chain(token_bytes, self._page_size, event_seed(namespace))
        self._keep(zip(stored, map(event_hash, told), strict=True))

    def learn_events(self, events: Iterable[Any]) -> None:
        """Names of salted pages, from their tokens; only sessions tell an `extra_key`."""
        for event in events:
            salt = getattr(event, "cache_salt", None)
            if not salt or not event.token_ids or event.block_size != self._page_size:
                continue
            if event.parent_block_hash is None:
                parent = storage_seed(Namespace(None, salt))
            else:
                parent = self._digests.get(event.parent_block_hash)
                if parent is None:
                    continue
            digests = hash_chain(pack_tokens(event.token_ids), self._page_size, parent)
            self._keep(zip(digests, event.block_hashes, strict=False))

    def _keep(self, pages: Iterable[tuple[bytes, int]]) -> None:
        with self._lock:
            for digest, told in pages:
                self._names[event_hash(digest)] = told
                self._digests[told] = digest
            for table in (self._names, self._digests):
                while len(table) > self._names_max:
                    table.popitem(last=False)


class StorePages:
    """`wire.feed_server.DiskPages` over the page store of this process, which may come and go."""

    def __init__(self, names: EventNames) -> None:
        self._names = names
        self._backend: NvmeBackend | None = None
        self._announced = False

    def drain(self) -> DiskDrain:
        """Page changes since the last call; whatever made them unreliable asks for a resync."""
        backends = active_backends()
        backend = backends[0] if backends else None
        if backend is not self._backend:
            self._backend = backend
            if backend is None:
                lost, self._announced = self._announced, False
                return DiskDrain((), resync=lost)
        if backend is None:
            return DiskDrain(())
        drained = backend.drain_residency_events(DRAIN_MAX)
        if drained.resync:
            known, self._announced = self._announced, True
            return DiskDrain((), resync=known, opened=True)
        return DiskDrain([self._run(stored, run) for stored, run in by_kind(drained.events)])

    def pages(self) -> Iterator[array[int]]:
        if self._backend is not None:
            for keys in self._backend.residency_snapshot():
                yield self._names.of_keys(keys)

    def _run(self, stored: bool, run: list[ResidencyEvent]) -> tuple[bool, list[int]]:
        return stored, self._names.of_keys([event.key for event in run]).tolist()


class DiskEvents:
    """Adds the NVMe level to SGLang's own events, where another publisher than ours was chosen.

    Scheduler thread. Such consumers know no snapshot: what a resync of the store may have removed
    is not told, and stays announced until the next flush.
    """

    def __init__(self, page_size: int, clock: Clock | None = None) -> None:
        self._names = EventNames(page_size)
        self._pages = StorePages(self._names)
        self._page_size = page_size
        self._clock = clock or SystemClock()
        self._next_seconds = 0.0

    def added_to(self, events: list[Any]) -> list[Any]:
        """`events` of the tree with those of the disk after them, drained now and then."""
        self._names.learn_events(events)
        found = list(events)
        if any(type(event).__name__ == "AllBlocksCleared" for event in events):
            found += self._all()
        if self._clock.monotonic() >= self._next_seconds:
            self._next_seconds = self._clock.monotonic() + POLL_SECONDS
            drained = self._pages.drain()
            found += self._all() if drained.opened else []
            found += [
                self._stored(run) if stored else BlockRemoved(run, medium=Medium.DISK)
                for stored, run in drained.runs
            ]
        return found

    def _all(self) -> list[BlockStored]:
        return [self._stored(chunk.tolist()) for chunk in self._pages.pages()]

    def _stored(self, hashes: list[int]) -> BlockStored:
        return BlockStored(hashes, None, [], self._page_size, None, medium=Medium.DISK)


def by_kind(events: Sequence[ResidencyEvent]) -> Iterator[tuple[bool, list[ResidencyEvent]]]:
    """Runs of stored and of removed pages, in order."""
    for stored, run in groupby(events, key=lambda event: event.stored):
        yield stored, list(run)
