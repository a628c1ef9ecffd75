"""The CPU host pool: which runs a copy takes, and that every byte of a page arrives."""

from __future__ import annotations

import pytest
import torch

from symphony_sglang.engine.host_pool import RUNS_MAX, PageRun, TorchHostPool, plan_page_copy

PAGE = 4


def slots(pages: list[int]) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def test_neighbouring_pages_make_one_run() -> None:
    plan = plan_page_copy(slots([7, 8, 9]), slots([2, 3, 4]), PAGE)
    assert plan.runs == [PageRun(7, 2, 3)]


def test_a_run_breaks_where_either_side_jumps() -> None:
    plan = plan_page_copy(slots([7, 8, 10]), slots([2, 3, 4]), PAGE)
    assert plan.runs == [PageRun(7, 2, 2), PageRun(10, 4, 1)]
    plan = plan_page_copy(slots([7, 8, 9]), slots([2, 5, 6]), PAGE)
    assert plan.runs == [PageRun(7, 2, 1), PageRun(8, 5, 2)]


def test_nothing_to_copy_is_no_run() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    assert plan_page_copy(empty, empty, PAGE).runs == []


def test_scattered_pages_go_by_index() -> None:
    pages = list(range(0, 4 * RUNS_MAX, 2))
    plan = plan_page_copy(slots(pages), slots(pages), PAGE)
    assert plan.runs is None
    assert plan.host_pages.tolist() == pages


class DevicePool:
    """Device buffers as SGLang's MHA pool lays them out, and its description of them."""

    def __init__(self, page_count: int, layers: int, heads: int, dim: int) -> None:
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        self.pool = MHATokenToKVPool(
            size=(page_count - 1) * PAGE,
            page_size=PAGE,
            dtype=torch.bfloat16,
            head_num=heads,
            head_dim=dim,
            layer_num=layers,
            device="cpu",
            enable_memory_saver=False,
        )


@pytest.fixture
def device() -> DevicePool:
    return DevicePool(page_count=200, layers=3, heads=2, dim=8)


@pytest.mark.parametrize(
    ("host_pages", "device_pages"),
    [
        pytest.param([3, 4, 5, 9], [1, 2, 3, 50], id="runs"),
        pytest.param(list(range(0, 180, 2)), list(range(179, -1, -2)), id="scattered"),
    ],
)
def test_pages_survive_the_way_down_and_up(
    device: DevicePool, host_pages: list[int], device_pages: list[int]
) -> None:
    pool = device.pool
    info = pool.get_device_pool_infos()[0].buffer_info
    host = TorchHostPool(
        info,
        2.0,
        0,
        PAGE,
        "page_first_direct",
        device_capacity_tokens=pool.size,
        start_layer=0,
        end_layer=2,
    )
    generator = torch.Generator().manual_seed(1)
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer.copy_(torch.randn(buffer.shape, generator=generator).to(buffer.dtype))
    before = [buffer.clone() for buffer in (*pool.k_buffer, *pool.v_buffer)]
    host_slots, device_slots = slots(host_pages), slots(device_pages)
    host.prepare_transfer_indices(host_slots, device_slots, "direct")
    host.backup_from_device_all_layer(pool, host_slots, device_slots, "direct")
    for buffer in (*pool.k_buffer, *pool.v_buffer):
        buffer[device_slots] = 0
    # Up again into other slots than they came from, as a load after an eviction does.
    other = slots(device_pages[::-1])
    host.prepare_transfer_indices(host_slots, other, "direct")
    for layer in range(3):
        host.load_to_device_per_layer(pool, host_slots, other, layer, "direct")
    for buffer, old in zip((*pool.k_buffer, *pool.v_buffer), before, strict=True):
        assert torch.equal(buffer[other], old[device_slots])


def test_page_is_two_contiguous_blocks(device: DevicePool) -> None:
    info = device.pool.get_device_pool_infos()[0].buffer_info
    host = TorchHostPool(
        info,
        2.0,
        0,
        PAGE,
        "page_first_direct",
        device_capacity_tokens=64,
        start_layer=0,
        end_layer=2,
    )
    addresses, sizes = host.get_page_buffer_meta(slots([0, 5]))
    page_bytes = 3 * PAGE * 2 * 8 * 2
    assert sizes == [page_bytes] * 4
    assert addresses[2] - addresses[0] == 5 * page_bytes
    assert addresses[1] - addresses[0] == host.page_num * page_bytes
