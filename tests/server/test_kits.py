"""SGLang's own shipped test kits, run against our server."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import pytest

from conftest import Server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ShareGPT-shaped file: the kit samples token ids from it instead of downloading one."""
    generator = random.Random(3)
    words = [f"word{i}" for i in range(500)]
    rows = [
        {
            "conversations": [
                {"from": side, "value": " ".join(generator.choices(words, k=150))}
                for side in ("human", "gpt")
            ]
        }
        for _ in range(40)
    ]
    path = tmp_path_factory.mktemp("dataset") / "sharegpt.json"
    path.write_text(json.dumps(rows))
    return path


def run_multiturn(server: Server, dataset: Path) -> None:
    from sglang.test.kits.cache_hit_kit import run_multiturn_cache_hit_test

    metrics = run_multiturn_cache_hit_test(
        base_url=server.url,
        model_path=str(server.model),
        num_clients=4,
        num_rounds=3,
        request_length=256,
        output_length=16,
        dataset_path=str(dataset),
    )
    assert metrics


def run_radix(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    from sglang.test.kits import radix_cache_server_kit as kit

    # The kit's 400 prompts are sized for a GPU.
    smaller = functools.partial(kit.gen_radix_tree, num_nodes=48, chunk_len=96)
    monkeypatch.setattr(kit, "gen_radix_tree", smaller)
    random.seed(11)  # noqa: TID251 - the kit draws from the global generator
    kit.run_radix_attention_test(server.url)


def test_multiturn_cache_hit_kit(worker: Server, conversations: Path) -> None:
    run_multiturn(worker, conversations)


def test_radix_attention_kit(worker: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    run_radix(worker, monkeypatch)


@pytest.mark.soak
def test_multiturn_cache_hit_kit_over_two_ranks(tp_worker: Server, conversations: Path) -> None:
    run_multiturn(tp_worker, conversations)


@pytest.mark.soak
def test_radix_attention_kit_over_two_ranks(
    tp_worker: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_radix(tp_worker, monkeypatch)
