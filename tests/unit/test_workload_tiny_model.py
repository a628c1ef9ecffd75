"""The tiny model: loadable, deterministic, and worth comparing greedy outputs of."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from symphony_sglang import cli
from symphony_sglang.errors import ConfigError
from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops
from symphony_sglang.workload.tiny_model import (
    MANIFEST_NAME,
    TinyModelShape,
    make_tiny_model,
)

SMALL = {"layers": 2, "hidden": 64, "vocab": 1024, "seed": 3}


def digests(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small") / "model"
    assert make_tiny_model(directory, **SMALL)
    return directory


@pytest.fixture(scope="module")
def standard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("standard") / "model"
    assert make_tiny_model(directory)
    return directory


def load(directory: Path) -> tuple[object, object]:
    define_missing_torchvision_ops()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    return model, AutoTokenizer.from_pretrained(directory)


def test_the_same_call_gives_the_same_bytes_in_another_process(small: Path, tmp_path: Path) -> None:
    program = (
        "import sys; from symphony_sglang.workload.tiny_model import make_tiny_model; "
        f"make_tiny_model(sys.argv[1], **{SMALL!r})"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    environment["RAYON_NUM_THREADS"] = "1"
    target = tmp_path / "again"
    subprocess.run([sys.executable, "-c", program, str(target)], check=True, env=environment)
    assert digests(target) == digests(small)
    assert len(digests(small)) == 6


def test_another_seed_changes_the_weights_alone(small: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "other", **{**SMALL, "seed": 4})
    ours, theirs = digests(small), digests(tmp_path / "other")
    changed = {name for name in ours if ours[name] != theirs[name]}
    assert changed == {"model.safetensors", MANIFEST_NAME}


def test_it_loads_and_its_size_is_what_it_says(small: Path) -> None:
    model, tokenizer = load(small)
    shape = TinyModelShape(**SMALL)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == shape.parameter_count
    assert len(tokenizer) == model.config.vocab_size == 1024
    assert model.config.num_key_value_heads % 2 == 0
    assert model.config.max_position_embeddings == 32768
    ids = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(set(ids)) == 3
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_tokenizer_gives_back_any_text(small: Path) -> None:
    _, tokenizer = load(small)
    for text in ("def f(x):\n\treturn 'héllo 世界 🎼' + x\r\n", "", " a  b ", "\x00\x7f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("import collections")) < len("import collections") / 2


def test_the_chat_template_writes_tools_calls_and_results(small: Path) -> None:
    _, tokenizer = load(small)
    messages = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "42"},
    ]
    render = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template(messages[:2], **render) == (
        "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert tokenizer.apply_chat_template(messages, tools=tools, **render) == (
        "<|im_start|>system\nrules\nTools:\n"
        '{"type": "function", "function": {"name": "f"}}<|im_end|>\n'
        "<|im_start|>user\nhi<|im_end|>\n"
        '<|im_start|>assistant\n\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
        "<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )
    # One turn is a prefix of the next, or no prefix could be reused across turns.
    shorter = tokenizer.apply_chat_template(messages[:2], tokenize=False)
    assert tokenizer.apply_chat_template(messages, tokenize=False).startswith(shorter)
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert set(marks) <= set(tokenizer.encode(shorter))


def test_greedy_output_varies_and_depends_on_the_whole_prompt(standard: Path) -> None:
    import torch

    model, _ = load(standard)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(300, 4096, (1, 600), generator=generator)
    with torch.no_grad():
        logits = model(prompt).logits[0].float()
        changed = prompt.clone()
        changed[0, 100:116] = (changed[0, 100:116] + 7) % 4096
        other = model(changed).logits[0, -1].float()
    best = logits.topk(2, dim=-1)
    assert len(set(best.indices[:, 0].tolist())) > 50
    assert best.indices[:, 0].min() >= 5, "a special token wins"
    # A difference in 16 of 600 tokens, 484 tokens before the end, moves the logits by a good part.
    assert ((logits[-1] - other).std() / other.std()).item() > 0.1
    # Near-ties within one step of bfloat16: 9 % with equal head rows, about 3 % with these.
    margin = (best.values[:, 0] - best.values[:, 1]) / best.values[:, 0]
    assert (margin < 2**-7).float().mean().item() < 0.06


def test_it_is_made_once_and_replaced_only_if_ours(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    assert make_tiny_model(target, **SMALL)
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert not make_tiny_model(target, **SMALL)
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert make_tiny_model(target, **{**SMALL, "layers": 1})
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 1
    assert [path.name for path in target.parent.iterdir()] == ["model"]


def test_what_is_not_ours_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "model"
    make_tiny_model(target, **SMALL)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds something else"):
        make_tiny_model(target, **{**SMALL, "seed": 9})
    assert (target / "notes.txt").read_text() == "mine"
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(ConfigError, match="holds something else"):
        make_tiny_model(file, **SMALL)
    assert file.read_text() == "x"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert make_tiny_model(empty, **SMALL)


def test_the_benchmark_shape_has_91_million_parameters() -> None:
    assert round(TinyModelShape(layers=12, hidden=768, vocab=10240).parameter_count / 1e6) == 91


@pytest.mark.parametrize("hidden", [32, 64, 96, 128, 256, 384, 512, 768, 1024, 4096])
def test_chosen_heads_split_over_two_ranks(hidden: int) -> None:
    shape = TinyModelShape(hidden=hidden)
    assert shape.heads % 2 == shape.kv_heads % 2 == 0
    assert shape.hidden == shape.heads * shape.head_dimension
    assert shape.heads % shape.kv_heads == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layers", "0"], "--layers is 0; expected a whole number from 1 to 256"),
        (["--vocab", "511"], "--vocab is 511; expected a whole number from 512 to 262144"),
        (["--hidden", "100"], "--hidden is 100; expected a multiple of 32"),
        (["--heads", "3"], "--hidden is 256; expected a multiple of twice --heads (3)"),
        (["--kv-heads", "3"], "--kv-heads is 3; expected a divisor of --heads (4)"),
        (["--seed", "-1"], "--seed is -1; expected a whole number from 0"),
        (["--dtype", "int8"], "--dtype is 'int8'; expected one of bfloat16, float16, float32"),
        (["--context-length", "5"], "--context-length is 5; expected a whole number from 128"),
    ],
)
def test_a_bad_value_names_flag_value_and_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert cli.main(["tiny-model", str(tmp_path / "model"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
