"""Host memory pages for a device that torch can index directly, such as a CPU.

Layout ``page_first_direct``: one contiguous block of every layer's K for a page, and one of its V,
each ``[layer_count, page_size, head_count, head_dim]``. A page is then two addresses for disk and
network, and one layer of a page is one run of memory for the copy to the device.

On CUDA SGLang's own pool and copy kernels stay in use; this class is for ``device cpu``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sglang.srt.mem_cache.host_memory import available_host_memory_bytes
from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

from symphony_sglang.errors import ConfigError, UnsupportedError

LAYOUT = "page_first_direct"
# Above this many runs of neighbouring pages, one gather and scatter beats a copy a run.
RUNS_MAX = 64
# Left for the operating system and everything else when the pool is allocated.
RESERVE_BYTES = 1 << 30

logger = logging.getLogger(__name__)


class PageRun(NamedTuple):
    """`page_count` neighbouring pages on both sides."""

    host_page: int
    device_page: int
    page_count: int


class PageCopy(NamedTuple):
    """How one transfer moves: by runs, or by page indices where runs are too many."""

    runs: list[PageRun] | None
    host_pages: torch.Tensor
    device_pages: torch.Tensor


class PageHold:
    """Pages whose memory a device may still write to, though their read has been given up.

    `freed` collects their slots as SGLang frees them; they join the free list when `released`
    answers True.
    """

    def __init__(self, slots: torch.Tensor, released: Callable[[], bool]) -> None:
        self.slots = slots
        self.released = released
        self.freed: list[torch.Tensor] = []


def plan_page_copy(
    host_indices: torch.Tensor, device_indices: torch.Tensor, page_size: int
) -> PageCopy:
    """Turn token slots into page runs.

    Args:
        host_indices: int64 ``[token_count]``, whole pages, on the CPU.
        device_indices: int64 ``[token_count]``, the matching device slots.
        page_size: tokens a page.
    """
    assert len(host_indices) == len(device_indices), (len(host_indices), len(device_indices))
    assert len(host_indices) % page_size == 0, f"{len(host_indices)} tokens, page of {page_size}"
    host_pages = host_indices[::page_size] // page_size
    device_pages = device_indices[::page_size] // page_size
    if len(host_pages) == 0:
        return PageCopy([], host_pages, device_pages)
    breaks = (torch.diff(host_pages) != 1) | (torch.diff(device_pages) != 1)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), torch.nonzero(breaks).flatten() + 1])
    if len(starts) > RUNS_MAX:
        return PageCopy(None, host_pages, device_pages)
    edges = [*starts.tolist(), len(host_pages)]
    host_list, device_list = host_pages[starts].tolist(), device_pages[starts].tolist()
    runs = [
        PageRun(host_list[i], device_list[i], edges[i + 1] - edges[i]) for i in range(len(starts))
    ]
    return PageCopy(runs, host_pages, device_pages)


class TorchHostPool(MHATokenToKVPoolHost):
    """A host pool that copies with torch alone: no pinning, no compiled kernels."""

    def __init__(self, buffer_info: Any, *args: Any, **kwargs: Any) -> None:
        if buffer_info.v_head_dim != buffer_info.head_dim:
            raise UnsupportedError(
                f"host level: K heads of {buffer_info.head_dim} and V heads of "
                f"{buffer_info.v_head_dim} values; this pool stores equal ones only"
            )
        self._plan: tuple[torch.Tensor, torch.Tensor, PageCopy] | None = None
        self._holds: list[PageHold] = []
        super().__init__(buffer_info, *args, pin_memory=False, **kwargs)

    def _allocate_host_buffer(self) -> None:
        # SGLang keeps 10 GiB free (pool_host/base.py:31), more than many CPU machines have.
        wanted = self.size * self.size_per_token
        free = available_host_memory_bytes(allow_cgroup_fallback=True) - RESERVE_BYTES
        if wanted > free:
            raise ConfigError(
                f"--symphony-host-gb: the host level needs {wanted / 1e9:.2f} GB per rank, "
                f"{max(free, 0) / 1e9:.2f} GB are free after a reserve of "
                f"{RESERVE_BYTES / 1e9:.1f} GB"
            )
        logger.info("host level: %d tokens, %.2f GB", self.size, wanted / 1e9)
        self.kv_buffer = self.init_kv_buffer()
        self.fd = getattr(self.allocator, "fd", None)

    def init_kv_buffer(self) -> torch.Tensor:
        """``[2, page_count, layer_count, page_size, head_count, head_dim]``, K then V."""
        if self.layout != LAYOUT:
            raise UnsupportedError(f"--hicache-mem-layout {self.layout}: expected {LAYOUT} on CPU")
        self.token_stride_size = self.head_num * self.head_dim * self.dtype.itemsize
        self.layout_dim = self.token_stride_size * self.layer_num
        dims = (2, self.page_num, self.layer_num, self.page_size, self.head_num, self.head_dim)
        buffer: torch.Tensor = self.allocator.allocate(dims, self.dtype, self.device)
        return buffer

    # Pages of a stuck read ----------------------------------------------------------------------

    def hold_pages(self, host_indices: torch.Tensor, released: Callable[[], bool]) -> None:
        """Withhold pages from the free list until `released()` answers True; any thread.

        Args:
            host_indices: int64 ``[token_count]``, whole pages that are allocated now. Their owner
                frees them as always, and they stay out of use for as long as needed.
            released: asked, with the pool's lock held, whenever slots are freed, allocated or
                counted; must not block.
        """
        with self.lock:
            held = PageHold(host_indices.cpu(), released)
            assert self.slot_used[held.slots].all(), "pages to hold are not allocated"
            self._holds.append(held)
        logger.warning(
            "host level: %d pages withheld until a stuck read ends",
            len(host_indices) // self.page_size,
        )

    @property
    def held_tokens(self) -> int:
        """Slots that are out of use because of a stuck read."""
        with self.lock:
            return sum(len(hold.slots) for hold in self._holds)

    def free(self, indices: torch.Tensor) -> int:
        """SGLang's free; what is held becomes free later (pool_host/base.py:565)."""
        with self.lock:
            self._release_holds()
            left = indices.cpu()
            for hold in self._holds:
                mine = torch.isin(left, hold.slots)
                if mine.any():
                    hold.freed.append(left[mine])
                    left = left[~mine]
            super().free(left)
            return len(indices)

    def alloc(self, need_size: int) -> torch.Tensor | None:
        with self.lock:
            self._release_holds()
            taken: torch.Tensor | None = super().alloc(need_size)
            return taken

    def available_size(self) -> int:
        with self.lock:
            self._release_holds()
            return int(super().available_size())

    def clear(self) -> None:
        """Everything is free, except what a stuck read still holds."""
        super().clear()
        for hold in self._holds:
            self.slot_used[hold.slots] = True
            hold.freed = [hold.slots]
        if self._holds:
            free: torch.Tensor = self.free_slots  # type: ignore[has-type]
            self.free_slots = free[~self.slot_used[free]]

    def _release_holds(self) -> None:
        if not self._holds:
            return
        ended = [hold for hold in self._holds if hold.released()]
        self._holds = [hold for hold in self._holds if hold not in ended]
        for hold in ended:
            # What its owner has not freed yet is freed by its owner, as always.
            for slots in hold.freed:
                super().free(slots)
            logger.info("host level: %d pages of a stuck read are back", len(hold.slots))

    def prepare_transfer_indices(
        self, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called once a transfer (l2_transfer.py:91): find the runs here, not once a layer."""
        self._plan_of(host_indices, device_indices)
        return host_indices, device_indices

    def _plan_of(self, host_indices: torch.Tensor, device_indices: torch.Tensor) -> PageCopy:
        known = self._plan
        if known is not None and known[0] is host_indices and known[1] is device_indices:
            return known[2]
        plan = plan_page_copy(host_indices, device_indices, self.page_size)
        self._plan = (host_indices, device_indices, plan)
        return plan

    def _device_pages(self, buffer: torch.Tensor) -> torch.Tensor:
        """A device layer ``[slot_count, heads, dim]`` as ``[page, page_size, heads, dim]``."""
        whole = buffer.shape[0] // self.page_size * self.page_size
        return buffer[:whole].view(-1, self.page_size, *buffer.shape[1:])

    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        layer_id: int,
        io_backend: str,
        *,
        is_draft: bool = False,
    ) -> None:
        """Copy one layer of whole pages from host to device."""
        if not 0 <= layer_id < self.target_layer_num:
            return
        plan = self._plan_of(host_indices, device_indices)
        for host, device in (
            (self.k_buffer, self.device_k_buffers[layer_id]),
            (self.v_buffer, self.device_v_buffers[layer_id]),
        ):
            target, source = self._device_pages(device), host[:, layer_id]
            if plan.runs is None:
                target.index_copy_(0, plan.device_pages, source.index_select(0, plan.host_pages))
                continue
            for host_page, device_page, count in plan.runs:
                target[device_page : device_page + count].copy_(
                    source[host_page : host_page + count]
                )

    def backup_from_device_all_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        io_backend: str,
    ) -> None:
        """Copy every layer of whole pages from device to host."""
        plan = self._plan_of(host_indices, device_indices)
        for layer_id in range(self.layer_num):
            for host, device in (
                (self.k_buffer, self.device_k_buffers[layer_id]),
                (self.v_buffer, self.device_v_buffers[layer_id]),
            ):
                source, target = self._device_pages(device), host[:, layer_id]
                if plan.runs is None:
                    target.index_copy_(
                        0, plan.host_pages, source.index_select(0, plan.device_pages)
                    )
                    continue
                for host_page, device_page, count in plan.runs:
                    target[host_page : host_page + count].copy_(
                        source[device_page : device_page + count]
                    )

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """One page of zeros, for backends that read into a page of their own."""
        shape = (2, self.layer_num, self.page_size, self.head_num, self.head_dim)
        return torch.zeros(shape, dtype=self.dtype, device=self.device).flatten()
