"""What the launcher adds to SGLang's arguments, and what it leaves as the user said it."""

from __future__ import annotations

import pytest

from symphony_sglang.config import SymphonyConfig
from symphony_sglang.engine import launch
from symphony_sglang.engine.compat import refuse_unsupported_modes
from symphony_sglang.errors import UnsupportedError


class Memory:
    hicache_host_memory_mode = "cache"
    enable_unified_cache_external_linker = False
    enable_lmcache = False
    enable_flexkv = False


class Parallel:
    pp_size = 1


def test_levels_are_on_by_default() -> None:
    words = launch.level_arguments(set(), host_gb=1.0, on_cpu=True)
    assert words[words.index("--radix-cache-backend") + 1] == "symphony"
    assert "--enable-hierarchical-cache" in words
    assert words[words.index("--page-size") + 1] == str(launch.PAGE_SIZE_CPU)


def test_users_choices_are_left_alone() -> None:
    explicit = {"page_size", "radix_cache_backend", "hicache_mem_layout"}
    words = launch.level_arguments(explicit, host_gb=1.0, on_cpu=False)
    assert not {"--page-size", "--radix-cache-backend", "--hicache-mem-layout"} & set(words)


def test_cpu_level_is_not_sized_against_sglangs_reserve() -> None:
    words = launch.level_arguments(set(), host_gb=1.0, on_cpu=True)
    assert words[words.index("--hicache-ratio") + 1] == "2.0"
    assert "--hicache-size" not in words


def test_no_host_level_leaves_the_hierarchical_cache_off() -> None:
    words = launch.level_arguments(set(), host_gb=0, on_cpu=True)
    assert "--enable-hierarchical-cache" not in words


def test_gpu_size_yields_to_sglangs_own_flags() -> None:
    words = launch.level_arguments(set(), host_gb=7.6, on_cpu=False)
    assert words[words.index("--hicache-size") + 1] == "8"
    assert "--hicache-size" not in launch.level_arguments(
        {"hicache_ratio"}, host_gb=7.6, on_cpu=False
    )


@pytest.mark.parametrize(
    ("asked", "free_gb", "ranks", "on_cpu", "expected"),
    [
        (3.0, 1000, 1, True, 3.0),
        (0.0, 1000, 1, True, 0.0),
        (-1.0, 1000, 1, True, 4.0),
        (-1.0, 10, 1, True, 1.5),
        (-1.0, 0.1, 1, True, 0.25),
        (-1.0, 2000, 8, False, 124.33),
        (-1.0, 4, 1, False, 1.0),
    ],
)
def test_host_level_is_a_bounded_share_of_free_memory(
    asked: float, free_gb: float, ranks: int, on_cpu: bool, expected: float
) -> None:
    config = SymphonyConfig(host_gb=asked)
    size = launch.host_level_gb(config, free_bytes=int(free_gb * 1e9), ranks=ranks, on_cpu=on_cpu)
    assert size == pytest.approx(expected, abs=0.01)


def test_supported_modes_pass() -> None:
    refuse_unsupported_modes(Memory(), Parallel(), rust_server=False)


@pytest.mark.parametrize(
    ("owner", "name", "value", "word"),
    [
        (Memory, "hicache_host_memory_mode", "buffer_only", "buffer_only"),
        (Memory, "enable_unified_cache_external_linker", True, "external-linker"),
        (Memory, "enable_lmcache", True, "--enable-lmcache"),
        (Memory, "enable_flexkv", True, "--enable-flexkv"),
        (Parallel, "pp_size", 2, "--pp-size"),
    ],
)
def test_unsupported_mode_is_named(
    monkeypatch: pytest.MonkeyPatch, owner: type, name: str, value: object, word: str
) -> None:
    monkeypatch.setattr(owner, name, value)
    with pytest.raises(UnsupportedError, match=word):
        refuse_unsupported_modes(Memory(), Parallel(), rust_server=False)


def test_rust_server_is_named() -> None:
    with pytest.raises(UnsupportedError, match="SGLANG_RUST_SERVER"):
        refuse_unsupported_modes(Memory(), Parallel(), rust_server=True)
