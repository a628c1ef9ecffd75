"""The storage backend with real host pools on the CPU: every page back, layer by layer too."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nvme_pools import KEYS, PAGE, config_of, fill, host_pool, indices, opened_backends
from symphony_sglang.engine.nvme_backend import (
    NvmeBackend,
    active_backends,
)
from symphony_sglang.engine.nvme_config import (
    checksum_bytes_for,
    read_config,
    weights_fingerprint,
)
from symphony_sglang.errors import (
    ConfigError,
    StoreKeyError,
    StoreLockedError,
    UnsupportedError,
)
from symphony_sglang.store import SyncPolicy


@pytest.fixture
def opened():
    yield from opened_backends()


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param({}, id="aligned"),
        pytest.param({"heads": 1, "dim": 24}, id="blocks off the sector size"),
        pytest.param({"heads": 8, "dim": 128, "layers": 6}, id="several checksum parts"),
    ],
)
def test_pages_come_back_to_other_places(tmp_path: Path, opened, shape: dict[str, int]) -> None:
    pool = host_pool(**shape)
    backend = opened(tmp_path, pool)
    before = fill(pool)
    pages = list(range(3, 23))
    assert backend.batch_set_v1(KEYS[:20], indices(pages)) == [True] * 20
    assert backend.batch_exists(KEYS) == 20
    pool.kv_buffer.zero_()
    targets = pages[::-1]
    assert backend.batch_get_v1(KEYS[:20], indices(targets)) == [True] * 20
    after = pool.kv_buffer.view(torch.int16)
    assert torch.equal(after[:, targets], before[:, pages])
    untouched = [page for page in range(64) if page not in pages]
    assert not after[:, untouched].any()


def test_layers_of_pages_are_one_call(tmp_path: Path, opened) -> None:
    pool = host_pool(layers=6, heads=8, dim=128)
    backend = opened(tmp_path, pool)
    before = fill(pool)
    backend.batch_set_v1(KEYS[:8], indices(list(range(8))))
    for first, count in [(0, 1), (0, 3), (2, 3), (5, 1), (0, 6)]:
        pool.kv_buffer.zero_()
        assert backend.read_layers(KEYS[:8], indices(list(range(8))), first, count) == [True] * 8
        after = pool.kv_buffer.view(torch.int16)
        layers = slice(first, first + count)
        assert torch.equal(after[:, :8, layers], before[:, :8, layers])
        others = [layer for layer in range(6) if not first <= layer < first + count]
        assert not after[:, :8, others].any()


def test_first_missing_page_ends_the_prefix_and_fails_alone(tmp_path: Path, opened) -> None:
    backend = opened(tmp_path)
    fill(backend.mem_pool_host)
    backend.batch_set_v1([KEYS[0], KEYS[2]], indices([0, 1]))
    assert backend.batch_exists(KEYS[:3]) == 1
    assert backend.batch_get_v1(KEYS[:3], indices([5, 6, 7])) == [True, False, True]


def test_a_restart_finds_the_pages(tmp_path: Path, opened) -> None:
    pool = host_pool()
    backend = opened(tmp_path, pool)
    before = fill(pool)
    backend.batch_set_v1(KEYS[:10], indices(list(range(10))))
    backend.close()
    pool.kv_buffer.zero_()
    again = opened(tmp_path, pool)
    assert again.batch_exists(KEYS) == 10
    again.batch_get_v1(KEYS[:10], indices(list(range(10))))
    assert torch.equal(pool.kv_buffer.view(torch.int16)[:, :10], before[:, :10])


def test_what_changes_a_pages_bytes_changes_the_namespace(tmp_path: Path, opened) -> None:
    first = opened(tmp_path)
    fill(first.mem_pool_host)
    first.batch_set_v1(KEYS[:4], indices([0, 1, 2, 3]))
    others = [
        {"model_name": "other"},
        {"tp_size": 2, "tp_rank": 1},
        {"pp_size": 2, "pp_rank": 1},
        {"dp_rank": 1},
        {"extra": {"nvme_revision": "r2"}},
        {"pool": host_pool(dtype=torch.float16)},
        {"pool": host_pool(layers=4)},
    ]
    for changes in others:
        other = opened(tmp_path, **changes)
        assert other.batch_exists(KEYS[:4]) == 0, changes
    assert len({backend.store.folder for backend in active_backends()}) == len(others) + 1


def test_the_copying_interface_agrees_with_the_zero_copy_one(tmp_path: Path, opened) -> None:
    pool = host_pool()
    backend = opened(tmp_path, pool)
    fill(pool)
    value = pool.get_data_page(3 * PAGE)
    assert backend.set(KEYS[0], value)
    assert backend.exists(KEYS[0])
    assert not backend.exists(KEYS[1])
    assert backend.batch_get_v1(KEYS[:1], indices([9])) == [True]
    assert torch.equal(pool.get_data_page(9 * PAGE).view(torch.int16), value.view(torch.int16))
    page = backend.get(KEYS[0], pool.get_dummy_flat_data_page())
    assert torch.equal(page.view(torch.int16), value.view(torch.int16))
    assert backend.get(KEYS[1], pool.get_dummy_flat_data_page()) is None
    assert backend.batch_set(KEYS[5:7], [value, value])
    with pytest.raises(UnsupportedError, match="one each"):
        backend.batch_get(KEYS[:2], None)


def test_the_engine_finds_events_and_records_through_the_registry(tmp_path: Path, opened) -> None:
    backend = opened(tmp_path)
    assert active_backends() == [backend]
    fill(backend.mem_pool_host)
    backend.batch_set_v1(KEYS[:3], indices([0, 1, 2]))
    store = active_backends()[0].store
    assert store.flush()
    assert {event.key.hex() for event in store.drain_events().events} == set(KEYS[:3])
    store.put_record("session", "s1", b"record")
    backend.close()
    assert active_backends() == []
    assert opened(tmp_path).store.records("session") == {"s1": b"record"}


def test_keys_that_are_no_hashes_are_refused(tmp_path: Path, opened) -> None:
    backend = opened(tmp_path)
    for bad in ("x", "../../etc/passwd", "z" * 64):
        with pytest.raises(StoreKeyError):
            backend.batch_exists([bad])
        with pytest.raises(StoreKeyError):
            backend.batch_set_v1([bad], indices([0]))


def test_two_backends_cannot_share_a_namespace(tmp_path: Path, opened) -> None:
    opened(tmp_path)
    with pytest.raises(StoreLockedError):
        opened(tmp_path)


def test_other_pools_are_misses_not_wrong_pages(tmp_path: Path, opened) -> None:
    from sglang.srt.mem_cache.hicache_storage import PoolName, PoolTransfer

    backend = opened(tmp_path)
    fill(backend.mem_pool_host)
    kv = PoolTransfer(PoolName.KV, host_indices=indices([0, 1]), keys=KEYS[:2])
    state = PoolTransfer(PoolName.MAMBA, host_indices=indices([0]), keys=KEYS[:1])
    assert backend.batch_set_v2([kv, state]) == {
        PoolName.KV: [True, True],
        PoolName.MAMBA: [False],
    }
    assert backend.batch_exists_v2(KEYS[:2]).kv_hit_pages == 2
    assert backend.batch_exists_v2(KEYS[:2], [state]).kv_hit_pages == 0
    assert backend.batch_get_v2([kv])[PoolName.KV] == [True, True]


def test_statistics_are_what_sglangs_collector_takes(tmp_path: Path, opened) -> None:
    backend = opened(tmp_path)
    fill(backend.mem_pool_host)
    backend.batch_set_v1(KEYS[:4], indices([0, 1, 2, 3]))
    backend.batch_set_v1(KEYS[:4], indices([0, 1, 2, 3]))  # already there: nothing moved
    backend.batch_get_v1(KEYS[:4], indices([0, 1, 2, 3]))
    stats = backend.get_stats()
    assert stats.backup_pgs == [4]
    assert stats.prefetch_pgs == [4]
    assert all(rate > 0 for rate in stats.backup_bandwidth + stats.prefetch_bandwidth)
    assert backend.get_stats().prefetch_pgs == []


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"nvme_size": 1}, "unknown key 'nvme_size'"),
        ({"nvme_bytes": "1"}, "nvme_bytes is '1'; expected int"),
        ({"nvme_sync": "never"}, "batch, interval, off"),
        ({"nvme_threads": 0}, "io_threads is 0"),
    ],
)
def test_bad_configuration_names_the_key(extra: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_config(extra)


def test_configuration_reaches_the_settings() -> None:
    config = read_config({"nvme_dir": "/x", "nvme_sync": "batch", "nvme_bytes": 5, "other": 1})
    assert config.directory == Path("/x")
    assert config.settings.sync is SyncPolicy.BATCH
    assert config.settings.capacity_bytes == 5


def test_weights_that_change_in_place_change_the_fingerprint(tmp_path: Path) -> None:
    assert weights_fingerprint(None) == weights_fingerprint(str(tmp_path / "no")) == ""
    (tmp_path / "model.safetensors").write_bytes(b"1")
    first = weights_fingerprint(str(tmp_path))
    assert first == weights_fingerprint(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"12")
    assert weights_fingerprint(str(tmp_path)) != first


def test_latent_attention_over_several_ranks_is_refused(tmp_path: Path, opened) -> None:
    with pytest.raises(UnsupportedError, match="--tp-size 1"):
        opened(tmp_path, is_mla_model=True, tp_size=2)


@pytest.mark.parametrize(
    ("layers", "layer_bytes", "expected"),
    [(32, 32768, 65536), (80, 4096, 65536), (3, 16384, 49152), (7, 2_000_000, 1 << 20)],
)
def test_checksum_parts_are_whole_layers(layers: int, layer_bytes: int, expected: int) -> None:
    pool = SimpleNamespace(
        layout="page_first_direct",
        page_size=16,
        token_stride_size=layer_bytes // 16,
        layer_num=layers,
    )
    assert checksum_bytes_for(pool) == expected


def test_sglang_loads_it_as_a_dynamic_backend(tmp_path: Path) -> None:
    from sglang.srt.mem_cache.storage import StorageBackendFactory

    extra = {
        "module_path": "symphony_sglang.engine.nvme_backend",
        "class_name": "NvmeBackend",
    }
    config = config_of(tmp_path, extra=extra)
    backend = StorageBackendFactory.create_backend("dynamic", config, host_pool())
    assert type(backend) is NvmeBackend
    backend.close()
