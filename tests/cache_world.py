"""A real cache with its levels, page store and advisories in this process, without a model.

Device pool, host pool, tree, storage threads and page store are the ones a server runs. What stands
in is the scheduler: a queue, and a loop that steps the cache.
"""

from __future__ import annotations

import functools
import json
import random
import time
from array import array
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import (
    CacheRequestHandle,
    EvictParams,
    InsertParams,
    MatchPrefixParams,
)
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.hybrid_cache import hybrid_pool_assembler
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.runtime_context import get_context, get_parallel

from symphony_sglang.core.prefix import pack_tokens
from symphony_sglang.core.sessions import SessionKey
from symphony_sglang.engine.cache import SymphonyCache, attach_advisories
from symphony_sglang.engine.messages import AdvisoryAction, AdvisoryBatch
from symphony_sglang.engine.stack import CpuStackStrategy

PAGE = 16
CLOSE_ATTEMPTS = 20
LAYERS, HEADS, DIM = 2, 2, 16
BACKEND = ("symphony_sglang.engine.nvme_backend", "NvmeBackend")


def process_group(rank: int, ranks: int, meeting: Path | None) -> Any:
    """The ranks' group; of one alone too, for SGLang runs its collectives whatever the size."""
    if not torch.distributed.is_initialized():
        store: Any = torch.distributed.HashStore()
        if meeting is not None:
            store = torch.distributed.FileStore(str(meeting), ranks)
        torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    return torch.distributed.group.WORLD


def server_fields(folder: Path, host_ratio: float, backend: tuple[str, str]) -> dict[str, Any]:
    """The server's arguments that the cache and its levels read."""
    extra = {
        "backend_name": "symphony",
        "module_path": backend[0],
        "class_name": backend[1],
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "prefetch_threshold": PAGE,
        "nvme_dir": str(folder),
        "nvme_bytes": 1 << 30,
        "nvme_sync": "off",
        "nvme_model_path": "none",
    }
    return {
        "page_size": PAGE,
        "device": "cpu",
        "tp_size": 1,
        "enable_hierarchical_cache": True,
        "hicache_ratio": host_ratio,
        "hicache_size": 0,
        "hicache_write_policy": "write_through",
        "hicache_io_backend": "direct",
        "hicache_mem_layout": "page_first_direct",
        "hicache_storage_backend": "dynamic",
        "hicache_storage_backend_extra_config": json.dumps(extra),
        "hicache_storage_prefetch_policy": "timeout",
        "radix_cache_backend": "symphony",
    }


def device_level(tokens: int) -> tuple[Any, Any]:
    """A pool of device slots and its allocator."""
    pool = MHATokenToKVPool(
        size=tokens,
        page_size=PAGE,
        dtype=torch.float32,
        head_num=HEADS,
        head_dim=DIM,
        layer_num=LAYERS,
        device="cpu",
        enable_memory_saver=False,
    )
    allocator = PagedTokenToKVPoolAllocator(
        tokens, page_size=PAGE, dtype=torch.float32, device="cpu", kvcache=pool, need_sort=False
    )
    return pool, allocator


@functools.cache
def register_strategy() -> None:
    hybrid_pool_assembler.register_stack_strategy(CpuStackStrategy())


class CacheWorld:
    """One rank. `now` is the broadcast clock; `step` is a scheduler step."""

    def __init__(
        self,
        folder: Path,
        *,
        device_tokens: int = 1024,
        host_tokens: int = 4096,
        backend: tuple[str, str] = BACKEND,
        rank: int = 0,
        ranks: int = 1,
        meeting: Path | None = None,
        **settings: Any,
    ) -> None:
        group = process_group(rank, ranks, meeting)
        fields = server_fields(folder, host_tokens / device_tokens, backend)
        fields.update({"tp_size": ranks, **settings})
        self._override = get_context().override_server_args(**fields)
        server_args = self._override.install()
        places = dict.fromkeys(("pp_rank", "attn_cp_rank", "attn_dcp_rank"), 0)
        self._ranks = get_parallel().override(tp_rank=rank, attn_tp_rank=rank, **places)
        self._ranks.__enter__()
        self.kv, self.allocator = device_level(device_tokens)
        params = CacheInitParams(
            disable=False,
            req_to_token_pool=ReqToTokenPool(
                size=8, max_context_len=device_tokens, device="cpu", enable_memory_saver=False
            ),
            token_to_kv_pool_allocator=self.allocator,
            page_size=PAGE,
            tp_cache_group=group,
            attn_cp_cache_group=None,
            attn_tp_cache_group=group,
            pp_cache_group=None,
        )
        context = TreeCacheBuildContext(
            server_args=server_args,
            params=params,
            is_hybrid_swa=False,
            is_hybrid_ssm=False,
            enable_hierarchical_cache=True,
            disable_radix_cache=False,
            tp_worker=SimpleNamespace(
                register_hicache_layer_transfer_counter=self.kv.register_layer_transfer_counter
            ),
            model_config=None,
            tp_size=ranks,
            tp_rank=rank,
            tp_group=group,
        )
        register_strategy()
        self.cache: Any = create_unified_radix_cache(context, cache_class=SymphonyCache)
        attach_advisories(self.cache)
        self.cache.control_attached = True
        self.driver = self.cache.advisories
        self.scheduler = SimpleNamespace(waiting_queue=[], running_batch=None)
        self.driver.scheduler = self.scheduler
        self.now = 0.0
        self.count = 0

    def close(self) -> None:
        backend = self.cache.cache_controller.storage_backend
        for _ in range(CLOSE_ATTEMPTS):
            try:
                self.cache.cache_controller.detach_storage_backend()
                break
            except RuntimeError:
                # SGLang gives its threads a moment each; a loaded machine can take longer.
                continue
        if backend is not None and hasattr(backend, "close"):
            backend.close()
        self._ranks.__exit__(None, None, None)
        self._override.restore()

    # Requests -----------------------------------------------------------------------------------

    def key(self, ids: list[int]) -> RadixKey:
        return RadixKey(array("q", ids))

    def store(self, ids: list[int], session_id: str | None = None) -> None:
        """A finished turn: device pages in the tree, written through to host and disk."""
        whole = ids[: len(ids) // PAGE * PAGE]
        match = self.cache.match_prefix(MatchPrefixParams(key=self.key(whole)))
        head = int(match.device_prefix_len)
        need = len(whole) - head
        if self.allocator.available_size() < need:
            self.cache.evict_for_alloc(
                EvictParams(num_tokens=need - self.allocator.available_size())
            )
        tail = self.allocator.alloc(need) if need else torch.empty(0, dtype=torch.int64)
        assert tail is not None
        for layer in range(LAYERS):
            for values, sign in ((self.kv.k_buffer[layer], 1), (self.kv.v_buffer[layer], -1)):
                values[tail] = sign * torch.tensor(whole[head:], dtype=torch.float32)[
                    :, None, None
                ].expand(-1, HEADS, DIM)
        value = torch.cat([self.cache.path_device_indices(match.last_device_node), tail])
        self.cache.insert(InsertParams(key=self.key(whole), value=value))
        if session_id is not None:
            self.driver.sessions.learn(SessionKey(session_id), pack_tokens(whole), self.now)
        self.settle()

    def settle(self, steps: int = 400) -> None:
        """Step until nothing is under way."""
        cache = self.cache
        for _ in range(steps):
            self.step()
            if not (
                cache.ongoing_write_through
                or cache.ongoing_backup
                or cache.ongoing_prefetch
                or cache.ongoing_load_back
                or cache.cache_controller.load_queue
            ):
                cache.sanity_check()
                return
            time.sleep(0.002)
        raise AssertionError("still under way")

    def request(self, ids: list[int], session_id: str | None = None) -> Any:
        self.count += 1
        rid = f"r{self.count}"
        return SimpleNamespace(
            rid=rid,
            cache_request_handle=CacheRequestHandle(rid, 0),
            session=None,
            kv=SimpleNamespace(holds_mamba=False, mamba_pool_idx=None),
            extra_key=None,
            cache_salt=None,
            session_id=session_id,
            origin_input_ids=array("q", ids),
            output_ids=[],
            sampling_params=SimpleNamespace(max_new_tokens=1),
            storage_prefetch_retry_attempts=0,
        )

    def arrive(self, ids: list[int], session_id: str | None = None) -> Any:
        """What SGLang does when a request is queued (scheduler.py, _prefetch_kvcache)."""
        request = self.request(ids, session_id)
        self.look_in_storage(request)
        self.scheduler.waiting_queue.append(request)
        return request

    def look_in_storage(self, request: Any) -> None:
        ids = request.origin_input_ids
        cache = self.cache
        limit = (len(ids) - 1) // PAGE * PAGE
        match = cache.match_prefix(MatchPrefixParams(key=self.key(ids[:limit]), req=request))
        matched = int(match.device_prefix_len) + int(match.host_hit_length)
        node = match.last_host_node
        if cache.is_backuped(node) or cache.is_root(node):
            cache.prefetch_from_storage(
                request.cache_request_handle,
                node,
                ids[matched:limit],
                cache.get_last_hash_value(node),
                cache.get_prefix_hash_values(node),
                matched_prefix_tokens=ids[:matched],
            )

    def found(self, ids: list[int]) -> tuple[int, int]:
        """Tokens of the head on device, and behind it on host."""
        match = self.cache.match_prefix(MatchPrefixParams(key=self.key(ids)))
        return int(match.device_prefix_len), int(match.host_hit_length)

    # Levels -------------------------------------------------------------------------------------

    def leave_device(self) -> None:
        """Everything unlocked goes to the host level."""
        self.cache.evict(EvictParams(num_tokens=self.allocator.size))

    def leave_host(self) -> None:
        """Everything unlocked is on disk only."""
        self.leave_device()
        self.cache.evict_host(1 << 30)

    # The loop -----------------------------------------------------------------------------------

    def step(self, seconds: float = 0.005) -> None:
        self.now += seconds
        self.driver.tick(self.now)
        self.cache.check_hicache_events()
        retries = self.cache.storage_prefetch_retries
        for request, _ in retries.pop_ready(self.scheduler.waiting_queue, 8, 3):
            request.storage_prefetch_retry_attempts += 1
            self.look_in_storage(request)
        self.driver.check()

    def advise(self, **fields: Any) -> dict[str, Any]:
        self.count += 1
        verb = fields.pop("verb", "prefetch")
        action = AdvisoryAction(verb=verb, advisory_id=f"adv-{self.count}", **fields)
        return self.ask(action)

    def ask(self, action: AdvisoryAction) -> dict[str, Any]:
        (answer,) = self.driver.receive(AdvisoryBatch(actions=[action], sent_seconds=self.now))
        return answer

    def ask_cancel(self, advisory_id: str) -> dict[str, Any]:
        return self.ask(AdvisoryAction(verb="cancel", advisory_id=advisory_id))

    def receipt(self, advisory_id: str) -> dict[str, Any]:
        return self.ask(AdvisoryAction(verb="receipt", advisory_id=advisory_id))

    def until(self, advisory_id: str, *states: str, steps: int = 600) -> dict[str, Any]:
        for _ in range(steps):
            receipt = self.receipt(advisory_id)
            if receipt["state"] in states:
                return receipt
            self.step()
            time.sleep(0.001)
        raise AssertionError(f"not {states}: {receipt}")

    def values(self, ids: list[int]) -> bool:
        """Whether the device pages of a prefix hold what was stored there."""
        match = self.cache.match_prefix(MatchPrefixParams(key=self.key(ids)))
        slots = self.cache.path_device_indices(match.last_device_node)
        wanted = torch.tensor(ids[: len(slots)], dtype=torch.float32)[:, None, None]
        return all(
            bool((self.kv.k_buffer[layer][slots] == wanted).all())
            and bool((self.kv.v_buffer[layer][slots] == -wanted).all())
            for layer in range(LAYERS)
        )


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(1, 30_000) for _ in range(length)]
