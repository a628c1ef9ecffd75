"""The router's token ids and page hashes: as if done whole each time, however little is done."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from symphony_sglang.core.page_hash import event_hashes
from symphony_sglang.core.prefix import NO_NAMESPACE, Namespace, pack_tokens
from symphony_sglang.router import tokens as tokens_module
from symphony_sglang.router.chat import ChatTemplate, tools_of, wants_parts
from symphony_sglang.router.fields import FIELDS
from symphony_sglang.router.prompts import prompt_of
from symphony_sglang.router.sessions import session_key
from symphony_sglang.router.tokens import NO_TOKENS, Prompt, PromptTokens
from symphony_sglang.workload.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    # The class that AutoTokenizer finds for it, without the models that it imports on the way.
    from transformers import PreTrainedTokenizerFast

    directory: Path = tmp_path_factory.mktemp("tiny")
    make_tiny_model(directory, layers=1, hidden=32, vocab=2000, seed=0)
    return PreTrainedTokenizerFast.from_pretrained(directory)


def whole(tokenizer: Any, text: str, *, special: bool = True) -> np.ndarray:
    ids = tokenizer.encode(text, add_special_tokens=special)
    return event_hashes(pack_tokens(ids), 16)


def test_ids_are_hashed_without_a_tokenizer() -> None:
    prompts = PromptTokens()
    ids = list(range(100, 200))
    found = prompts.tokens(Prompt(input_ids=ids), [16, 32], "s")
    assert found.length == 100
    for size in (16, 32):
        assert np.array_equal(found.page_hashes[size], event_hashes(pack_tokens(ids), size))
    assert prompts.tokens(Prompt(text="hello"), [16]) == NO_TOKENS
    assert prompts.tokens(Prompt(chat={"messages": []}), [16]) == NO_TOKENS


def test_growing_chat_is_tokenized_from_the_last_special_token_on(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = ChatTemplate(tokenizer)
    prompts = PromptTokens(tokenizer, template)
    generator = random.Random(4)
    encoded: list[int] = []
    plain = prompts._ids

    def counted(text: str, *, special: bool) -> list[int]:
        encoded.append(len(text))
        return plain(text, special=special)

    monkeypatch.setattr(prompts, "_ids", counted)
    messages: list[dict[str, str]] = []
    for turn in range(12):
        words = " ".join(generator.choices(["alpha", "beta ", "1234", "déjà", "x\ny"], k=60))
        messages.append({"role": "user" if turn % 2 == 0 else "assistant", "content": words})
        text = template.render({"messages": messages})
        found = prompts.tokens(Prompt(chat={"messages": messages}), [16], "chat")
        assert np.array_equal(found.page_hashes[16], whole(tokenizer, text, special=False)), turn
    # The last turn re-tokenized itself and the one before, not the whole conversation.
    assert encoded[-1] < len(text) / 3


def test_edited_and_forked_texts_hash_as_whole_ones(tokenizer: Any) -> None:
    prompts = PromptTokens(tokenizer)
    generator = random.Random(9)
    specials = list(prompts._specials) or [" "]
    text = ""
    for step in range(60):
        action = generator.random()
        piece = " ".join(generator.choices(["one", "two", "three3", "  ", "\n\n", *specials], k=9))
        if action < 0.6:
            text += piece
        elif action < 0.8:
            place = generator.randrange(len(text) + 1)
            text = text[:place] + piece + text[place:]
        else:
            text = text[: generator.randrange(len(text) + 1)]
        found = prompts.tokens(Prompt(text=text or "x"), [16], "s")
        assert np.array_equal(found.page_hashes[16], whole(tokenizer, text or "x")), step
    prompts.check()


def test_namespaces_do_not_share_hashes() -> None:
    prompts = PromptTokens()
    ids = list(range(64))
    plain = prompts.tokens(Prompt(input_ids=ids), [16], "s")
    salted = prompts.tokens(Prompt(input_ids=ids), [16], "s", Namespace(None, "salt"))
    assert not set(plain.page_hashes[16]) & set(salted.page_hashes[16])
    assert session_key("s", NO_NAMESPACE) == "s"
    keys = [("s", None, "ab"), ("s", "a", "b"), ("s", "ab", None), ("s", "ab", "")]
    named = {session_key(name, Namespace(extra, salt)) for name, extra, salt in keys}
    assert len(named) == 4


def test_memory_is_bounded_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens_module, "CACHE_ENTRIES_MAX", 10)
    prompts = PromptTokens(cache_bytes_max=50_000)
    for number in range(40):
        prompts.tokens(Prompt(input_ids=list(range(number, number + 500))), [16], f"s{number}")
        prompts.check()
    assert prompts.known("s39", [16]).length == 500
    assert prompts.known("s0", [16]) == NO_TOKENS
    prompts.forget("s39")
    assert prompts.known("s39", [16]) == NO_TOKENS
    prompts.check()


@pytest.mark.parametrize(
    ("body", "expected"),
    [({"text": "a"}, Prompt(text="a")), ({"text": ["a", "b"]}, Prompt(text="a")),
     ({"input_ids": [1, 2]}, Prompt(input_ids=[1, 2])),
     ({"input_ids": [[1], [2]]}, Prompt(input_ids=[1])),
     ({"prompt": [3, 4]}, Prompt(input_ids=[3, 4])),
     ({"prompt": "p"}, Prompt(text="p")), ({"text": None, "input_ids": [5]}, Prompt(input_ids=[5])),
     ({"text": 5}, None), ({"text": []}, None), ({"input_ids": ["x"]}, None), ({}, None),
     ({"text": "a", "image_data": "x"}, None)],
)  # fmt: skip
def test_prompt_is_found_in_any_body(body: dict[str, Any], expected: Prompt | None) -> None:
    assert prompt_of(FIELDS.decode(msgspec.json.encode(body))) == expected


def test_chat_content_follows_the_template(tokenizer: Any) -> None:
    template = ChatTemplate(tokenizer)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    listed = template.render({"messages": [{"role": "user", "content": parts}]})
    assert listed == template.render({"messages": [{"role": "user", "content": "a b"}]})
    assert wants_parts("{% for part in message['content'] %}")
    assert not wants_parts("{{ message['content'] }}")
    tool = {"type": "function", "function": {"name": "f"}}
    [filled] = tools_of({"tools": [tool]}) or []
    assert filled["function"] == {
        "description": None, "name": "f", "parameters": None, "strict": False
    }  # fmt: skip
    assert tools_of({"tools": [tool], "tool_choice": "none"}) is None
