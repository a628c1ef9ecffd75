"""The routes SGLang's users know, on our server: OpenAI client, ``/generate``, bad bodies."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from conftest import PAGE_SIZE, VOCAB, Server, cached

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def client(worker: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=worker.url + "/v1", api_key="unused", max_retries=0)


def test_chat_completion_and_its_stream_agree(worker: Server, client: openai.OpenAI) -> None:
    arguments: dict[str, Any] = {
        "model": str(worker.model),
        "messages": [
            {"role": "system", "content": "You answer in one word."},
            {"role": "user", "content": "What does def start?"},
        ],
        "temperature": 0,
        "max_tokens": 12,
    }
    whole = client.chat.completions.create(**arguments)
    pieces = [
        event.choices[0].delta.content or ""
        for event in client.chat.completions.create(stream=True, **arguments)
        if event.choices
    ]
    assert whole.choices[0].message.content == "".join(pieces)
    assert whole.usage is not None
    assert whole.usage.completion_tokens <= 12
    assert len(pieces) > 1


def test_second_turn_reports_cached_tokens(worker: Server, client: openai.OpenAI) -> None:
    question = "Describe each of these words. " + " ".join(f"word{i}" for i in range(80))
    messages: list[Any] = [{"role": "user", "content": question}]
    first = client.chat.completions.create(
        model=str(worker.model), messages=messages, temperature=0, max_tokens=8
    )
    messages += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "And the last?"},
    ]
    second = client.chat.completions.create(
        model=str(worker.model), messages=messages, temperature=0, max_tokens=8
    )
    assert first.usage is not None
    assert second.usage is not None
    details = second.usage.prompt_tokens_details
    assert details is not None
    # What was asked is in place again; the answer's text may tokenize otherwise than its tokens.
    assert details.cached_tokens is not None
    assert details.cached_tokens >= first.usage.prompt_tokens // PAGE_SIZE * PAGE_SIZE - PAGE_SIZE


def test_text_completion(worker: Server, client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=str(worker.model), prompt="import os\n", temperature=0, max_tokens=6
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens <= 6


def test_log_says_in_one_line_that_this_is_a_cpu(worker: Server) -> None:
    log = worker.worker.log_path.read_text()
    assert log.count("CPU: portable torch platform") == 1
    assert "host level: 0.40 GB per rank" in log


def test_generate_takes_text_and_ids_alike(worker: Server) -> None:
    parameters = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}
    text = worker.generate({"text": "class Cache:", "sampling_params": parameters})
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(worker.model)("class Cache:")["input_ids"]
    same = worker.generate({"input_ids": ids, "sampling_params": parameters})
    assert text["output_ids"] == same["output_ids"]
    assert len(text["output_ids"]) == 10


def test_constrained_output_follows_its_pattern(worker: Server) -> None:
    answer = worker.generate(
        {
            "text": "The year is ",
            "sampling_params": {"temperature": 0, "max_new_tokens": 8, "regex": "(19|20)[0-9]{2}"},
        }
    )
    assert len(answer["text"]) == 4
    assert answer["text"].isdigit()


@pytest.mark.parametrize(
    ("body", "raw"),
    [
        pytest.param({}, None, id="neither text nor ids"),
        pytest.param({"text": "a", "sampling_params": {"top_p": 5}}, None, id="top_p of 5"),
        pytest.param(None, b"{not json", id="not JSON"),
        pytest.param({"input_ids": "abc"}, None, id="ids that are text"),
        pytest.param({"input_ids": [VOCAB]}, None, id="id beyond the vocabulary"),
        pytest.param({"input_ids": [[300], [-1]]}, None, id="negative id in a batch"),
        pytest.param(
            {"text": "a", "sampling_params": {"max_new_tokens": -1}}, None, id="negative length"
        ),
    ],
)
def test_bad_generate_body_is_a_4xx_and_the_server_lives(
    worker: Server, body: Any, raw: bytes | None
) -> None:
    answer = worker.call("POST", "/generate", body, raw=raw)
    assert 400 <= answer.status < 500, answer
    assert worker.greedy_one([300, 301, 302], 2)["meta_info"]["completion_tokens"] == 2


def test_prompt_beyond_the_context_is_refused(worker: Server) -> None:
    answer = worker.call("POST", "/generate", {"input_ids": [300] * 200_000})
    assert answer.status == 400
    assert cached(worker.greedy_one(list(range(400, 440)), 2))["host"] == 0


def test_model_info_names_the_model(worker: Server) -> None:
    for route in ("/model_info", "/get_model_info"):
        answer = worker.call("GET", route)
        assert answer.status == 200
        assert answer.body["model_path"] == str(worker.model)


def test_residency_has_both_levels_and_no_leak(worker: Server) -> None:
    body = worker.residency()
    assert body["page_size"] == PAGE_SIZE
    for level in ("device", "host"):
        use = body["levels"][level]
        assert 0 <= use["used_tokens"] <= use["total_tokens"]
        assert use["total_bytes"] == use["total_tokens"] * use["token_bytes"]
    device = body["levels"]["device"]
    assert device["used_tokens"] == device["evictable_tokens"] + device["protected_tokens"]
