"""The NVMe level as SGLang sees it: a ``dynamic`` HiCache storage backend over our page store.

    --hicache-storage-backend dynamic --hicache-storage-backend-extra-config '{
        "backend_name": "symphony", "module_path": "symphony_sglang.engine.nvme_backend",
        "class_name": "NvmeBackend", "interface_v1": 1, "hicache_storage_pass_prefix_keys": true,
        "nvme_dir": "/fast/pages", "nvme_bytes": 200000000000}'

SGLang calls the v1 interface from its storage threads (cache_controller.py:1112, 1411), never from
the scheduler thread. Pages go straight between the host pool and the disk.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from sglang.srt.mem_cache.hicache_storage import (
    HiCacheStorage,
    HiCacheStorageConfig,
    HiCacheStorageExtraInfo,
    PoolHitPolicy,
    PoolName,
    PoolTransfer,
    PoolTransferResult,
)
from sglang.srt.observability.metrics_collector import StorageMetrics

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.engine.nvme_config import (
    checksum_bytes_for,
    layer_bytes_of,
    namespace_of,
    pool_memory,
    read_config,
    tensor_piece,
)
from symphony_sglang.errors import UnsupportedError
from symphony_sglang.store import (
    HealthState,
    PageStore,
    Piece,
    PlacedPage,
    ReadOutcome,
    ReadResult,
    ResidencyDrain,
    WriteOutcome,
    joined_from_hex,
    keys_from_hex,
    piece_of,
)

logger = logging.getLogger(__name__)

# Position at which attention costs as much to recompute as everything else: 2 x parameters over
# 4 x layers x width, which lies between 18 and 35 thousand tokens for dense models of 1 to 8 B.
ATTENTION_EQUAL_TOKENS = 32768
BANDWIDTHS_MAX = 1024
BACKUP_HOOK = (
    "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController._page_backup"
)

_active: list[NvmeBackend] = []


def active_backends() -> list[NvmeBackend]:
    """The backends of this process that have a store open; one per SGLang cache controller."""
    return list(_active)


class NvmeBackend(HiCacheStorage):
    """One namespace of the page store, for one cache controller of this rank."""

    def __init__(
        self, storage_config: HiCacheStorageConfig, kwargs: Any = None, clock: Clock | None = None
    ) -> None:
        """SGLang passes `kwargs` by position; it carries nothing for a dynamic backend."""
        self.storage_config = storage_config
        self.config = read_config(storage_config.extra_config or {})
        self.mem_pool_host: Any = None
        self._clock = clock or SystemClock()
        self._store: PageStore | None = None
        # Told (pages, seconds) of every read into the host pool, on SGLang's storage thread.
        self.on_read: Callable[[int, float], None] | None = None
        # Told (keys, host_indices) of pages that the host pool holds whole, on the same threads.
        self.on_pages: Callable[[Sequence[bytes], torch.Tensor], None] | None = None
        self._metrics_lock = threading.Lock()
        self._metrics = StorageMetrics()
        self.backups_skipped = 0  # while the disk took no writes
        # A consumer of the feed knows nothing of a store that was just opened or closed.
        self._resync = threading.Event()
        self._resync.set()

    @property
    def store(self) -> PageStore:
        if self._store is None:
            raise UnsupportedError("NVMe level: no host pool is registered yet")
        return self._store

    @property
    def writable(self) -> bool:
        """Whether a backup can succeed now; False while the disk is full or failing."""
        return self._store is not None and self._store.state is HealthState.OK

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """Open the store for this pool's pages. Registering the same shape again keeps it open."""
        namespace = namespace_of(self.storage_config, mem_pool_host, self.config.revision)
        self.mem_pool_host = mem_pool_host
        if self._store is not None:
            if self._store.namespace == namespace:
                return
            self.close()
        settings = self.config.settings.with_checksum(checksum_bytes_for(mem_pool_host))
        self._store = PageStore(self.config.directory, namespace, settings, clock=self._clock)
        for buffer in pool_memory(mem_pool_host):
            self._store.register_memory(*buffer)
        self._resync.set()
        if not _active:
            atexit.register(close_all)
        _active.append(self)
        logger.info(
            "NVMe level: %d pages found in %s, %.1f GB capacity",
            len(self._store),
            self._store.folder,
            self._store.stat().capacity_bytes / 1e9,
        )

    # --- zero-copy interface --------------------------------------------------------------------

    def batch_exists(
        self, keys: list[str], extra_info: HiCacheStorageExtraInfo | None = None
    ) -> int:
        """How many of `keys`, from the first on, are on disk without a gap."""
        return self.store.prefix_length_joined(joined_from_hex(keys))

    def batch_get_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Fill host pages from disk. `host_indices` (len(keys) x page_size,) int64."""
        started = self._clock.monotonic()
        names = keys_from_hex(keys)
        self._touch_prefix(extra_info)
        hits = self._read(names, self._pieces(host_indices, len(keys)), None, host_indices)
        if self.on_read is not None:
            self.on_read(sum(hits), self._clock.monotonic() - started)
        if self.on_pages is not None and all(hits):
            self.on_pages(names, host_indices)
        return hits

    def read_layers(
        self, keys: list[str], host_indices: torch.Tensor, first_layer: int, layer_count: int
    ) -> list[bool]:
        """Fill some layers of host pages, K and V, in one call.

        Raises UnsupportedError where a page's layers are not contiguous in the pool's layout.
        """
        layer_bytes = layer_bytes_of(self.mem_pool_host)
        if layer_bytes is None:
            raise UnsupportedError(
                f"NVMe level: layout {self.mem_pool_host.layout} has no runs of layers; "
                "expected page_first_direct"
            )
        start, size = first_layer * layer_bytes, layer_count * layer_bytes
        whole = self._pieces(host_indices, len(keys))
        pieces = [[(address + start, size) for address, _ in page] for page in whole]
        ends = [0, whole[0][0][1]] if whole else [0, 0]
        ranges = [(end + start, size) for end in ends]
        return self._read(keys_from_hex(keys), pieces, ranges, host_indices)

    def batch_set_v1(
        self,
        keys: list[str],
        host_indices: torch.Tensor,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> list[bool]:
        """Write host pages to disk; True for what is there now, False for what is not."""
        names = keys_from_hex(keys)
        if self.on_pages is not None:
            self.on_pages(names, host_indices)
        depth = self._touch_prefix(extra_info)
        return self._write(self._placed(names, self._pieces(host_indices, len(keys)), depth))

    def _touch_prefix(self, extra_info: HiCacheStorageExtraInfo | None) -> int:
        """A page is only of use with all before it: those count as used too. Returns how many."""
        prefix = extra_info.prefix_keys if extra_info is not None else None
        if not prefix:
            return 0
        self.store.touch(keys_from_hex(prefix))
        return len(prefix)

    def _pieces(self, host_indices: torch.Tensor, page_count: int) -> list[list[Piece]]:
        """Addresses of each page's blocks, as the pool gives them (pool_host/mha.py:817)."""
        addresses, sizes = self.mem_pool_host.get_page_buffer_meta(host_indices)
        per_page = len(addresses) // page_count if page_count else 1
        pieces = list(zip(addresses, sizes, strict=True))
        return [pieces[at : at + per_page] for at in range(0, len(pieces), per_page)]

    def _read(
        self,
        names: Sequence[bytes],
        pieces: Sequence[Sequence[Piece]],
        ranges: Sequence[tuple[int, int]] | None,
        host_indices: torch.Tensor,
    ) -> list[bool]:
        started = self._clock.monotonic()
        result = self.store.read(names, pieces, ranges)
        hits = [outcome is ReadOutcome.HIT for outcome in result.outcomes]
        self._wait_for_memory(result, host_indices)
        size = sum(n for hit, page in zip(hits, pieces, strict=True) if hit for _, n in page)
        self._note("prefetch", hits, size, started)
        return hits

    def _wait_for_memory(self, result: ReadResult, host_indices: torch.Tensor) -> None:
        """Keep the pages of a stuck read from being used again while the device may fill them.

        SGLang frees the pages of a failed read as soon as this thread returns. A pool with
        ``hold_pages(host_indices, released)`` takes them over; for any other this thread waits:
        the store is off by then, so lookups miss at once and no request queues up behind it.
        It waits too where several ranks must have equally many free pages at every step
        (cache_controller.py:1276), because only this rank's would be fewer.
        """
        hold = result.hold
        if hold is None:
            return
        page_tokens = self.store.namespace.page_tokens
        take_over: Callable[..., None] | None = getattr(self.mem_pool_host, "hold_pages", None)
        if take_over is None or self._ranks() > 1:
            logger.warning("NVMe level: waiting for %d pages of a stuck read", len(hold.positions))
            hold.wait(None)
            return
        held = torch.cat(
            [host_indices[at * page_tokens : (at + 1) * page_tokens] for at in hold.positions]
        )
        take_over(held, lambda: hold.wait(0))

    def _ranks(self) -> int:
        config = self.storage_config
        return int(config.tp_size * config.pp_size * config.attn_cp_size)

    def _write(self, pages: Sequence[PlacedPage]) -> list[bool]:
        started = self._clock.monotonic()
        outcomes = self.store.write(pages)
        written = [outcome is WriteOutcome.WRITTEN for outcome in outcomes]
        size = sum(written) * self.store.namespace.page_bytes
        self._note("backup", written, size, started)
        return [outcome in (WriteOutcome.WRITTEN, WriteOutcome.PRESENT) for outcome in outcomes]

    def _note(self, direction: str, done: Sequence[bool], size: int, started: float) -> None:
        seconds = self._clock.monotonic() - started
        with self._metrics_lock:
            pages: list[int] = getattr(self._metrics, f"{direction}_pgs")
            bandwidths: list[float] = getattr(self._metrics, f"{direction}_bandwidth")
            if len(pages) < BANDWIDTHS_MAX and seconds > 0 and any(done):
                pages.append(sum(done))
                bandwidths.append(size / 1e9 / seconds)

    # --- pools beside K and V -------------------------------------------------------------------

    def batch_exists_v2(
        self,
        keys: list[str],
        pool_transfers: list[PoolTransfer] | None = None,
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> PoolTransferResult:
        """This level keeps K and V only: a page that needs another pool's data is a miss."""
        pages = self.batch_exists(keys, extra_info)
        others = [transfer for transfer in pool_transfers or [] if transfer.name != PoolName.KV]
        if any(transfer.hit_policy != PoolHitPolicy.BLOCK_GROUPS for transfer in others):
            return PoolTransferResult.empty()
        return PoolTransferResult(pages, {}, list(range(1, pages + 1)))

    def batch_get_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return self._by_pool(transfers, extra_info, self.batch_get_v1)

    def batch_set_v2(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None = None,
    ) -> dict[str, list[bool]]:
        return self._by_pool(transfers, extra_info, self.batch_set_v1)

    def _by_pool(
        self,
        transfers: list[PoolTransfer],
        extra_info: HiCacheStorageExtraInfo | None,
        move: Callable[..., list[bool]],
    ) -> dict[str, list[bool]]:
        results: dict[str, list[bool]] = {}
        for transfer in transfers:
            keys = transfer.keys or []
            indices = transfer.host_indices
            fits = indices is not None and len(indices) == len(keys) * self.mem_pool_host.page_size
            if transfer.name == PoolName.KV and fits:
                results[transfer.name] = move(keys, indices, extra_info)
            else:
                results[transfer.name] = [False] * len(keys)
        return results

    # --- copying interface (used only without ``interface_v1``) ---------------------------------

    def get(
        self, key: str, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> torch.Tensor | None:
        """Read a page into `target_location`, a contiguous CPU tensor of the page's size."""
        return self.batch_get([key], [target_location])[0]

    def batch_get(
        self, keys: list[str], target_locations: Any | None = None, target_sizes: Any | None = None
    ) -> list[torch.Tensor | None]:
        names = keys_from_hex(keys)
        targets = list(target_locations or [])
        if len(targets) != len(keys):
            raise UnsupportedError(
                f"NVMe level: {len(targets)} target tensors for {len(keys)} keys; expected one each"
            )
        result = self.store.read(names, [[tensor_piece(target)] for target in targets])
        if result.hold is not None:
            result.hold.wait(None)  # the tensors may be freed when this returns
        return [
            target if outcome is ReadOutcome.HIT else None
            for target, outcome in zip(targets, result.outcomes, strict=True)
        ]

    def set(
        self,
        key: str,
        value: Any | None = None,
        target_location: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        """Write a page from `value`, a CPU tensor of the page's size."""
        return self.batch_set([key], [value])

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,
        target_sizes: Any | None = None,
    ) -> bool:
        names = keys_from_hex(keys)
        tensors = [value.contiguous() for value in values or []]
        if len(tensors) != len(names):
            return False
        pages = [
            PlacedPage(name, [tensor_piece(tensor)])
            for name, tensor in zip(names, tensors, strict=True)
        ]
        return all(self._write(pages))

    def exists(self, key: str) -> bool:
        return self.batch_exists([key]) == 1

    # --- residency feed -------------------------------------------------------------------------

    def drain_residency_events(self, limit: int = 4096) -> ResidencyDrain:
        """Pages stored on and removed from this rank's disk since the last call, in order.

        For one consumer; callable from any thread at any time, an open store or not, and short
        enough for the scheduler thread (a lock and a copy of at most `limit` events).

        Returns:
            `events`: (stored, key) with the 32-byte page digest, each announced after the commit
            that made it durable, so a restarted worker still has what was announced.
            `resync`: what the consumer knew is void (first call, overflow of the queue, the store
            opened, closed or cleared as a whole, the disk gone or back): forget this level, drop
            `events` of this very answer, take ``residency_snapshot`` and go on draining.
        """
        resync = self._resync.is_set()
        if resync:
            self._resync.clear()
        store = self._store
        if store is None:
            return ResidencyDrain([], resync)
        drained = store.drain_events(limit)
        return drained._replace(resync=drained.resync or resync)

    def residency_snapshot(self) -> Iterator[list[bytes]]:
        """The 32-byte digests of every durable page of this rank, in chunks of at most 4,096.

        Take it after a drain that asked for it and before the next one: what changes meanwhile is
        in the drains that follow, and applying an event twice changes nothing. Empty without an
        open store and while the disk is off. Any thread; each chunk holds the store's lock for
        well under a millisecond.
        """
        store = self._store
        return iter(()) if store is None else store.snapshot()

    # --- pages for others than the host pool (migration) ----------------------------------------

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of this rank: K of all layers, then V of all layers."""
        return self.store.namespace.page_bytes

    def read_pages(self, keys: Sequence[bytes], buffers: Sequence[Any]) -> ReadResult:
        """Read pages by digest into memory that is not the host pool's; any thread.

        Args:
            keys: 32-byte page digests.
            buffers: for each key a writable, contiguous buffer of ``page_bytes`` bytes. At
                addresses that are multiples of 4,096 (an mmap) they are read without a copy.

        Returns:
            HIT for what was filled and verified. Where `hold` is not None the kernel may still
            write to the buffers of `hold.positions`: keep them until `hold.wait(None)`.

        Raises:
            StoreError: a key is no digest, or a buffer has another size than its page.
        """
        return self.store.read(keys, [[piece_of(buffer)] for buffer in buffers])

    def write_pages(
        self, keys: Sequence[bytes], buffers: Sequence[Any], first_depth: int = 0
    ) -> list[WriteOutcome]:
        """Write pages by digest from memory that is not the host pool's; any thread.

        Args:
            keys: 32-byte page digests, neighbours in their prefix.
            buffers: as for ``read_pages``; free again when this returns.
            first_depth: pages before the first one in its prefix, which eviction goes by.

        Returns:
            WRITTEN or PRESENT for what is on disk now; REFUSED or FAILED for what is not.
        """
        pieces = [[piece_of(buffer)] for buffer in buffers]
        return self.store.write(self._placed(keys, pieces, first_depth))

    def _placed(
        self, keys: Sequence[bytes], pieces: Sequence[Sequence[Piece]], first_depth: int
    ) -> list[PlacedPage]:
        tokens = self.store.namespace.page_tokens
        return [
            PlacedPage(key, page, cost=1.0 + depth * tokens / ATTENTION_EQUAL_TOKENS, depth=depth)
            for depth, (key, page) in enumerate(zip(keys, pieces, strict=True), first_depth)
        ]

    # --- upkeep ---------------------------------------------------------------------------------

    def clear(self) -> None:
        self.store.clear()

    def get_stats(self) -> StorageMetrics:
        """Pages and GB/s of the transfers since the last call, for SGLang's own metrics."""
        with self._metrics_lock:
            metrics, self._metrics = self._metrics, StorageMetrics()
        return metrics

    def close(self) -> None:
        """Commit what is pending and release the namespace. Idempotent."""
        store, self._store = self._store, None
        if store is not None:
            if self in _active:
                _active.remove(self)
            self._resync.set()
            store.close()


def skip_backup_while_unwritable(
    page_backup: Callable[..., Any], controller: Any, operation: Any
) -> Any:
    """AROUND hook of ``HybridCacheController._page_backup``, on the backup thread.

    SGLang logs a warning for every backup that fails (cache_controller.py:1429). While our disk is
    full, read-only or off the store has said so once, so the backup is acknowledged with no token
    written, as one that another rank is to write is; it goes on when the disk is back.
    """
    backend = controller.storage_backend
    if isinstance(backend, NvmeBackend) and not backend.writable:
        backend.backups_skipped += 1
        if backend.on_pages is not None:
            backend.on_pages(keys_from_hex(operation.hash_value), operation.host_indices)
        return None
    return page_backup(controller, operation)


def close_all() -> None:
    """At interpreter exit: what was written in the last moments becomes durable."""
    for backend in active_backends():
        backend.close()
