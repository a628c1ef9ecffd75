"""The CPU platform's decisions that need no server: cores, refusals, missing operators."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from symphony_sglang.platform import support, threads


@pytest.mark.parametrize(
    ("cores", "ranks", "shares"),
    [
        ([0, 1], 2, [[0], [1]]),
        ([0, 1, 2, 3, 4], 2, [[0, 1, 2], [3, 4]]),
        ([3, 1], 1, [[1, 3]]),
        ([0, 1], 3, [[0], [1], [0]]),
    ],
)
def test_cores_are_shared_out_evenly(cores: list[int], ranks: int, shares: list[list[int]]) -> None:
    assert threads.share_cores(cores, ranks) == shares


def test_no_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="rank_count is 0"):
        threads.share_cores([0], 0)


def test_bind_text_reads_back_and_takes_ranges() -> None:
    shares = [[0, 1, 2], [5]]
    assert threads.parse_bind(threads.bind_text(shares)) == shares
    assert threads.parse_bind("0-2|5,7-8") == [[0, 1, 2], [5, 7, 8]]


def test_users_own_binding_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(threads.BIND_VARIABLE, "7|8")
    threads.export_core_shares(2)
    assert threads.os.environ[threads.BIND_VARIABLE] == "7|8"
    monkeypatch.delenv(threads.BIND_VARIABLE)
    threads.export_core_shares(1)
    assert threads.BIND_VARIABLE not in threads.os.environ


@pytest.mark.parametrize(
    ("config", "feature"),
    [
        ({"kv_lora_rank": 512}, "MLA"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"text_config": {"n_routed_experts": 64}}, "mixture of experts"),
        ({"model_type": "mamba2"}, "Mamba"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized"),
    ],
)
def test_missing_model_feature_is_named(config: dict[str, object], feature: str) -> None:
    assert any(feature in name for name in support.model_features_missing(config))


def test_dense_model_lacks_nothing() -> None:
    dense = {"model_type": "llama", "num_local_experts": 0, "num_key_value_heads": 8}
    assert support.model_features_missing(dense) == []


def test_flags_of_missing_features_are_named() -> None:
    arguments = SimpleNamespace(
        speculative_algorithm="EAGLE",
        quantization=None,
        enable_lora=None,
        lora_paths=["a"],
        kv_cache_dtype="fp8_e5m2",
    )
    assert support.flag_features_missing(arguments) == [
        "--speculative-algorithm",
        "--enable-lora",
        "--kv-cache-dtype",
    ]


def test_torchvision_imports_beside_a_cpu_torch() -> None:
    program = (
        "from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops as d\n"
        "first, second = d(), d()\n"
        "assert second == [], second\n"
        "import torch, torchvision\n"
        "print(first, torch.version.cuda)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
