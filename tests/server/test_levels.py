"""The same greedy tokens wherever the prefix was found, and no page lost on the way."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from prompts import mixed_prompts

from conftest import DEVICE_TOKENS, PAGE_SIZE, VOCAB, Server, cached

pytestmark = pytest.mark.server

PROMPT_COUNT = 54


def overflow(server: Server, seed: int) -> None:
    """Push everything off the device level, leaving it on the host level."""
    for prompt in mixed_prompts(DEVICE_TOKENS // 900 + 4, seed=seed, vocab=VOCAB, longest=1800):
        server.greedy_one((prompt * 400)[:1800], 1)


def outputs(answers: list[Any]) -> list[list[int]]:
    return [answer["output_ids"] for answer in answers]


def check_pages(server: Server) -> None:
    """Idle: what is used is in the tree, and a flush gives every page back."""
    device = server.residency()["levels"]["device"]
    assert device["protected_tokens"] == 0
    assert device["used_tokens"] == device["evictable_tokens"]
    server.flush()
    levels = server.residency()["levels"]
    assert levels["device"]["used_tokens"] == 0
    assert levels["host"]["used_tokens"] == 0


def check_equality(server: Server, count: int) -> None:
    """Recompute, device hit and host hit, one by one and batched: the same tokens."""
    prompts = mixed_prompts(count, seed=7, vocab=VOCAB)
    recomputed = []
    for prompt in prompts:
        server.flush()
        answer = server.greedy_one(prompt)
        assert sum(cached(answer).values()) == 0
        recomputed.append(answer["output_ids"])

    server.flush()
    on_device = host = 0
    for prompt, expected in zip(prompts, recomputed, strict=True):
        server.greedy_one(prompt, 1)
        answer = server.greedy_one(prompt)
        assert answer["output_ids"] == expected
        on_device += cached(answer)["device"]
    overflow(server, seed=8)
    for prompt, expected in zip(prompts, recomputed, strict=True):
        answer = server.greedy_one(prompt)
        assert answer["output_ids"] == expected
        host += cached(answer)["host"]
    # The comparison is worth something only if the hits happened.
    longest_part = sum(len(prompt) // PAGE_SIZE * PAGE_SIZE for prompt in prompts) // 2
    assert on_device > longest_part
    assert host > longest_part // 2

    overflow(server, seed=9)
    for start in range(0, count, 9):
        batch = prompts[start : start + 9]
        assert outputs(server.greedy(batch)) == recomputed[start : start + 9]
    check_pages(server)


def test_greedy_tokens_are_equal_on_every_level(worker: Server) -> None:
    check_equality(worker, PROMPT_COUNT)


def test_greedy_tokens_are_equal_over_two_ranks(tp_worker: Server) -> None:
    check_equality(tp_worker, PROMPT_COUNT)


def test_routes_answer_alike_over_two_ranks(tp_worker: Server) -> None:
    client = openai.OpenAI(base_url=tp_worker.url + "/v1", api_key="unused", max_retries=0)
    arguments: dict[str, Any] = {
        "model": str(tp_worker.model),
        "messages": [{"role": "user", "content": "What does def start?"}],
        "temperature": 0,
        "max_tokens": 8,
    }
    whole = client.chat.completions.create(**arguments).choices[0].message.content
    pieces = [
        event.choices[0].delta.content or ""
        for event in client.chat.completions.create(stream=True, **arguments)
        if event.choices
    ]
    assert whole == "".join(pieces)
    text = client.completions.create(
        model=str(tp_worker.model), prompt="import os", temperature=0, max_tokens=4
    )
    assert text.usage is not None
    assert text.usage.completion_tokens <= 4
    bad = tp_worker.call("POST", "/generate", {"input_ids": [VOCAB]})
    assert bad.status == 400
    assert tp_worker.generate({"text": "import os", "sampling_params": {"max_new_tokens": 2}})


def test_host_hit_moves_what_residency_counts(worker: Server) -> None:
    worker.flush()
    prompt = mixed_prompts(1, seed=21, vocab=VOCAB)[0]
    prompt = (prompt * 200)[:800]
    worker.greedy_one(prompt, 1)
    overflow(worker, seed=22)
    before = worker.residency()["counters"]
    answer = worker.greedy_one(prompt, 1)
    after = worker.residency()["counters"]
    assert cached(answer) == {"device": 0, "host": 784, "storage": 0}
    assert after["loaded_tokens"] - before["loaded_tokens"] == 784
    assert after["loads"] - before["loads"] == 1
