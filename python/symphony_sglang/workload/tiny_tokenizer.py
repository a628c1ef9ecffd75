"""A byte-level BPE tokenizer trained on the standard library's own sources.

Those are the one body of text that every machine with Python has. Training is deterministic: the
same Python version gives the same files.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

from symphony_sglang.errors import UnsupportedError

PAD, BEGIN, END, TURN_START, TURN_END = SPECIAL_TOKENS = (
    "<|pad|>",
    "<|begin|>",
    "<|end|>",
    "<|im_start|>",
    "<|im_end|>",
)
# 256 bytes and the special tokens: the smallest vocabulary that encodes everything.
BYTE_VOCAB = 256 + len(SPECIAL_TOKENS)
CORPUS_BYTES_MAX = 4_000_000
FILE_BYTES_MAX = 200_000

# ChatML, with tools listed in the system turn, calls as JSON lines, and results as `tool` turns.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is string -%}{{ content }}
  {%- elif content is iterable -%}
    {%- for part in content if part.type == "text" -%}{{ part.text }}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- if tools -%}
{{ "<|im_start|>system\\n" }}
{%- if messages and messages[0].role == "system" -%}
{{ text(messages[0].content) + "\\n" }}
{%- endif -%}
{{ "Tools:" }}
{%- for tool in tools -%}{{ "\\n" + (tool | tojson) }}{%- endfor -%}
{{ "<|im_end|>\\n" }}
{%- endif -%}
{%- for message in messages -%}
{%- if not (tools and loop.first and message.role == "system") -%}
{{ "<|im_start|>" + message.role + "\\n" + text(message.content) }}
{%- if message.tool_calls -%}
{%- for call in message.tool_calls -%}
{{ "\\n<tool_call>" + (call.function | tojson) + "</tool_call>" }}
{%- endfor -%}
{%- endif -%}
{{ "<|im_end|>\\n" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ "<|im_start|>assistant\\n" }}{%- endif -%}
"""


def source_files(root: Path) -> list[Path]:
    """The library's top-level modules and plain packages, sorted; no tests, nothing installed."""
    skipped = {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "__pycache__",
    }
    found = []
    for path in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")):
        # Generated on the build machine, so not the same on every one.
        generated = path.name.startswith("_sysconfigdata") or path.parent.name.startswith("config-")
        if not generated and not skipped & set(path.relative_to(root).parts):
            found.append(path)
    return found


def read_corpus(files: Sequence[Path], *, bytes_max: int = CORPUS_BYTES_MAX) -> Iterator[str]:
    """Text of `files` until `bytes_max` bytes were given; long files are cut."""
    left = bytes_max
    for path in files:
        if left <= 0:
            return
        piece = path.read_bytes()[: min(FILE_BYTES_MAX, left)]
        left -= len(piece)
        yield piece.decode("utf-8", errors="ignore")


def write_tokenizer(directory: Path, *, vocab: int, context_length: int) -> None:
    """Train, and write ``tokenizer.json`` and ``tokenizer_config.json`` of exactly `vocab` entries.

    Raises:
        UnsupportedError: this Python carries no sources to train on.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    root = Path(sysconfig.get_path("stdlib"))
    files = source_files(root)
    if not files:
        raise UnsupportedError(
            f"{root} holds no .py sources; the tiny model's tokenizer is trained on them"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(read_corpus(files), trainer=trainer)
    # A vocabulary larger than the corpus has merges for: every id the model can emit still decodes.
    missing = vocab - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens([f"<|reserved_{index}|>" for index in range(missing)])
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": TURN_END,
        "pad_token": PAD,
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
