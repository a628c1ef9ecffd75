"""What is done to ordinary requests in the HTTP process, through SGLang's hook registry."""

from __future__ import annotations

from typing import Any

VALIDATE_HOOK = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"


def check_token_ids(manager: Any, obj: Any, input_ids: list[int] | None, *_: Any) -> None:
    """BEFORE hook of ``TokenizerManager._validate_one_request``: refuse ids outside the vocabulary.

    SGLang 0.5.23 checks ids of other fields only (tokenizer_manager.py:1513); such an id reaches
    the embedding and ends the scheduler, for everybody. SGLang's routes answer a ValueError with
    400.
    """
    if not input_ids:
        return
    vocab_size = manager.model_config.vocab_size
    low, high = min(input_ids), max(input_ids)
    if low < 0 or high >= vocab_size:
        outside = low if low < 0 else high
        raise ValueError(f"input_ids: {outside}; expected ids from 0 to {vocab_size - 1}")
