"""``symphony tiny-model``: a loadable Llama with random weights, for plumbing and measurements.

What it generates means nothing, but it is not degenerate either: greedy output varies, depends on
the whole prompt, and rarely turns on a near-tie. That last point is what makes "the same greedy
tokens from recompute, device and host" a fair test under bfloat16 (see ``weights``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_sglang.errors import ConfigError
from symphony_sglang.workload.tiny_tokenizer import (
    BEGIN,
    BYTE_VOCAB,
    PAD,
    SPECIAL_TOKENS,
    TURN_END,
    write_tokenizer,
)

if TYPE_CHECKING:
    import torch

MANIFEST_NAME = "symphony_tiny_model.json"
FORMAT_VERSION = 1
DTYPES = ("bfloat16", "float16", "float32")
INTERMEDIATE_MULTIPLE = 128

# Standard deviation of an attention score. At 1 a long prompt averages out and the output hardly
# depends on it; at 3 a few positions dominate, as in trained models.
SCORE_DEVIATION = 3.0
ATTENTION_GAIN = 2.0
MLP_GAIN = 1.4
# Deeper models get weaker layers, or attention averages every position into the same direction and
# greedy output repeats one token.
FULL_GAIN_LAYERS = 4
# Rows of the output head fall off as (rank + offset)**(-1/2), like the frequencies of words. With
# equal rows the two best of 4,096 logits lie within one bfloat16 step in 9 % of positions, so in
# about 4 %.
HEAD_TAIL_INDEX = 2.0
HEAD_RANK_OFFSET = 30.0


@dataclass(frozen=True, slots=True)
class TinyModelShape:
    """Everything that determines the files, byte for byte, on one Python version.

    `heads` and `kv_heads` of 0 are chosen: an even number of heads of dimension 64 (or less), and
    an even number of KV heads, so that ``--tp 2`` works, about a quarter of the heads.
    """

    layers: int = 4
    hidden: int = 256
    vocab: int = 4096
    seed: int = 0
    heads: int = 0
    kv_heads: int = 0
    dtype: str = "bfloat16"
    context_length: int = 32768

    def __post_init__(self) -> None:
        ranges = {
            "layers": (1, 256),
            "hidden": (32, 16384),
            "vocab": (512, 262144),
            "seed": (0, 2**63 - 1),
            "heads": (0, 256),
            "kv_heads": (0, 256),
            "context_length": (128, 4194304),
        }
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(
                    f"{flag(name)} is {value!r}; expected a whole number from {low} to {high}"
                )
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        assert self.vocab >= BYTE_VOCAB
        if not self.heads:
            object.__setattr__(self, "heads", default_heads(self.hidden))
        if not self.kv_heads:
            object.__setattr__(self, "kv_heads", default_kv_heads(self.heads))
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ConfigError(
                f"--hidden is {self.hidden}; expected a multiple of twice --heads ({self.heads})"
            )
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"--kv-heads is {self.kv_heads}; expected a divisor of --heads ({self.heads})"
            )

    @property
    def head_dimension(self) -> int:
        return self.hidden // self.heads

    @property
    def intermediate(self) -> int:
        """Width of the MLP: 8/3 of hidden, as Llama has it, rounded up."""
        return -(-self.hidden * 8 // 3 // INTERMEDIATE_MULTIPLE) * INTERMEDIATE_MULTIPLE

    @property
    def parameter_count(self) -> int:
        return sum(math.prod(shape) for _name, shape, _kind in self.tensors())

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """Name, shape and kind of every weight, in file order."""
        key_value = self.kv_heads * self.head_dimension
        yield "model.embed_tokens.weight", (self.vocab, self.hidden), "embedding"
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (self.hidden,), "norm"
            yield f"{prefix}.self_attn.q_proj.weight", (self.hidden, self.hidden), "score"
            yield f"{prefix}.self_attn.k_proj.weight", (key_value, self.hidden), "score"
            yield f"{prefix}.self_attn.v_proj.weight", (key_value, self.hidden), "plain"
            yield f"{prefix}.self_attn.o_proj.weight", (self.hidden, self.hidden), "attention"
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,), "norm"
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, self.hidden), "plain"
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, self.hidden), "plain"
            yield f"{prefix}.mlp.down_proj.weight", (self.hidden, self.intermediate), "mlp"
        yield "model.norm.weight", (self.hidden,), "norm"
        yield "lm_head.weight", (self.vocab, self.hidden), "head"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def default_heads(hidden: int) -> int:
    """An even number of heads, of dimension 64 if `hidden` allows it."""
    for dimension in (64, 32, 16):
        if hidden % (2 * dimension) == 0:
            return hidden // dimension
    raise ConfigError(f"--hidden is {hidden}; expected a multiple of 32, or give --heads")


def default_kv_heads(heads: int) -> int:
    """The smallest even divisor of `heads` that is at least a quarter of it."""
    even = [count for count in range(2, heads + 1, 2) if heads % count == 0 and 4 * count >= heads]
    return even[0] if even else heads


def weights(shape: TinyModelShape) -> dict[str, torch.Tensor]:
    """Random weights whose greedy output is varied, prompt-dependent and rarely near a tie.

    Each tensor has its own generator, keyed by seed and name.
    """
    import torch

    depth = math.sqrt(FULL_GAIN_LAYERS / max(shape.layers, FULL_GAIN_LAYERS))
    gains = {
        "score": math.sqrt(SCORE_DEVIATION),
        "plain": 1.0,
        "attention": ATTENTION_GAIN * depth,
        "mlp": MLP_GAIN * depth,
        "head": 1.0,
    }
    made: dict[str, torch.Tensor] = {}
    for name, size, kind in shape.tensors():
        dtype = getattr(torch, shape.dtype)
        if kind == "norm":
            made[name] = torch.ones(size, dtype=dtype)
            continue
        digest = hashlib.sha256(f"{shape.seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        values = torch.randn(size, generator=generator)
        if kind == "head":
            ranks = torch.randperm(size[0], generator=generator).float() + HEAD_RANK_OFFSET
            values *= ((ranks / size[0]) ** (-1 / HEAD_TAIL_INDEX)).unsqueeze(1)
            # A special token never wins, so that outputs run to the length that was asked for.
            values[: len(SPECIAL_TOKENS)] = 0.0
        if kind != "embedding":
            values *= gains[kind] / math.sqrt(size[1])
        made[name] = values.to(dtype)
    return made


def write_model(directory: Path, shape: TinyModelShape) -> None:
    """Weights, model configuration and generation defaults, in the layout of ``transformers``."""
    from safetensors.torch import save_file

    ids = {
        "bos_token_id": SPECIAL_TOKENS.index(BEGIN),
        "eos_token_id": SPECIAL_TOKENS.index(TURN_END),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": shape.dtype,
        "head_dim": shape.head_dimension,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate,
        "max_position_embeddings": shape.context_length,
        "mlp_bias": False,
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "rms_norm_eps": 1e-05,
        "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "use_cache": True,
        "vocab_size": shape.vocab,
        **ids,
    }
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {**ids, "_from_model_config": True})
    save_file(weights(shape), directory / "model.safetensors", metadata={"format": "pt"})


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def manifest(shape: TinyModelShape, directory: Path) -> dict[str, Any]:
    """What a directory of ours says of itself: enough to see that nothing is missing or foreign."""
    from importlib.metadata import version

    files = {
        p.name: p.stat().st_size for p in sorted(directory.iterdir()) if p.name != MANIFEST_NAME
    }
    return {
        "format": FORMAT_VERSION,
        "shape": asdict(shape),
        "parameters": shape.parameter_count,
        "python": platform.python_version(),
        "tokenizers": version("tokenizers"),
        "torch": version("torch"),
        "files": files,
    }


def read_manifest(directory: Path) -> dict[str, Any] | None:
    """The manifest of a directory that is complete and wholly ours, else None."""
    try:
        found = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        files = {p.name: p.stat().st_size for p in directory.iterdir() if p.name != MANIFEST_NAME}
    except (OSError, ValueError):
        return None
    ours = isinstance(found, dict) and found.get("format") == FORMAT_VERSION
    return found if ours and found.get("files") == files else None


def make_tiny_model(
    directory: str | os.PathLike[str],
    *,
    layers: int = 4,
    hidden: int = 256,
    vocab: int = 4096,
    seed: int = 0,
    heads: int | None = None,
    kv_heads: int | None = None,
    dtype: str = "bfloat16",
    context_length: int = 32768,
) -> bool:
    """Make the model in `directory`; True if it was made, False if it stood there already.

    A directory with a model of ours of other parameters is replaced; one with anything else is left
    alone. The files appear all at once, so a reader never sees half a model.

    Raises:
        ConfigError: a parameter is out of range, or the directory holds something else.
    """
    shape = TinyModelShape(
        layers, hidden, vocab, seed, heads or 0, kv_heads or 0, dtype, context_length
    )
    target = Path(directory).absolute()
    present = read_manifest(target)
    if present is not None and present["shape"] == asdict(shape):
        return False
    if target.exists() and present is None and not (target.is_dir() and not any(target.iterdir())):
        raise ConfigError(
            f"{target} holds something else than a complete tiny model of ours; give an empty or "
            "new directory"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the renames stay on one file system.
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        write_tokenizer(made, vocab=shape.vocab, context_length=shape.context_length)
        write_model(made, shape)
        write_json(made / MANIFEST_NAME, manifest(shape, made))
        if target.exists():
            target.rename(Path(scratch) / "replaced")
        made.rename(target)
    return True


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tiny-model",
        help="make a small Llama with random weights and a tokenizer, deterministic by seed",
        description="Makes a loadable Llama with random weights and a locally trained tokenizer "
        "with a chat template. The shape of the benchmarks, 91 M parameters: --layers 12 "
        "--hidden 768 --vocab 10240.",
    )
    parser.add_argument("directory", metavar="DIR")
    for name, text in (
        ("layers", "transformer layers"),
        ("hidden", "width of the residual stream"),
        ("vocab", "entries of the tokenizer"),
        ("seed", "of the weights"),
        ("heads", "attention heads (0: chosen, of dimension 64)"),
        ("kv_heads", "KV heads (0: chosen, even, about a quarter of the heads)"),
        ("context_length", "longest prompt and answer together, in tokens"),
    ):
        default = getattr(TinyModelShape(), name) if "heads" not in name else 0
        parser.add_argument(
            flag(name), type=int, default=default, metavar="N", help=f"{text}; default {default}"
        )
    parser.add_argument("--dtype", default="bfloat16", help=f"one of {', '.join(DTYPES)}")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    shape = TinyModelShape(
        arguments.layers,
        arguments.hidden,
        arguments.vocab,
        arguments.seed,
        arguments.heads,
        arguments.kv_heads,
        arguments.dtype,
        arguments.context_length,
    )
    made = make_tiny_model(arguments.directory, **asdict(shape))
    size = f"{shape.parameter_count / 1e6:.1f} M parameters, {shape.dtype}"
    print(f"{arguments.directory}: {'made' if made else 'already there'}, {size}", file=sys.stdout)
    return 0
