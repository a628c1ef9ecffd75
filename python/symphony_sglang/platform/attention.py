"""The name under which SGLang finds our attention backend, and its registration.

SGLang itself is imported inside the functions: this module is read while SGLang parses its
arguments, when importing its model runner would be both slow and circular.
"""

from __future__ import annotations

from typing import Any

BACKEND_NAME = "symphony_torch"


def create_backend(model_runner: Any) -> Any:
    """The backend for one ``ModelRunner``; raises ``UnsupportedError`` by feature."""
    from symphony_sglang.platform.attention_backend import PortableAttnBackend

    return PortableAttnBackend(model_runner)


def register_attention_choice() -> None:
    """Let ``--attention-backend`` take our name; needed before SGLang parses its arguments."""
    from sglang.srt.arg_groups import choices

    if BACKEND_NAME not in choices.ATTENTION_BACKEND_CHOICES:
        choices.add_attention_backend_choices([BACKEND_NAME])


def register_attention_backend() -> None:
    """Put the backend where ``ModelRunner`` looks it up; needed in every scheduler process."""
    from sglang.srt.layers.attention import attention_registry

    attention_registry.register_attention_backend(BACKEND_NAME)(create_backend)
