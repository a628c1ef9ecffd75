"""The prompt in a request's body, as a worker would read it."""

from __future__ import annotations

from typing import Any

import msgspec

from symphony_sglang.router.fields import RequestFields
from symphony_sglang.router.tokens import Prompt, decode_ids

TEXT_BYTES_MAX = 1 << 20


def present(raw: msgspec.Raw) -> bool:
    """Whether a field is there, and not null."""
    view = memoryview(raw)
    return len(view) > 0 and view[:4].tobytes() != b"null"


def has_ids(fields: RequestFields) -> bool:
    """Whether the prompt may be given as token ids."""
    return any(memoryview(raw)[:1].tobytes() == b"[" for raw in (fields.input_ids, fields.prompt))


def prompt_of(fields: RequestFields) -> Prompt | None:
    """A request's prompt, the first of a batch; None where it is not plain text or ids."""
    if present(fields.image_data) or present(fields.input_embeds):
        return None
    try:
        if present(fields.messages):
            return Prompt(chat=chat_of(fields))
        for raw in (fields.input_ids, fields.prompt, fields.text):
            if not present(raw):
                continue
            ids = decode_ids(bytes(raw))
            if ids is not None:
                return Prompt(input_ids=ids)
            if raw is fields.input_ids:
                return None
            value = msgspec.json.decode(raw)
            first = value[0] if isinstance(value, list) and value else value
            return Prompt(text=first) if isinstance(first, str) and first else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return None


def chat_of(fields: RequestFields) -> dict[str, Any]:
    names = ("messages", "tools", "tool_choice", "chat_template_kwargs")
    body = {
        name: msgspec.json.decode(getattr(fields, name))
        for name in names
        if present(getattr(fields, name))
    }
    body["reasoning_effort"] = fields.reasoning_effort
    return body


def prompt_text(fields: RequestFields) -> str:
    """The prompt as text, for policies that compare heads of texts; JSON where it is structured."""
    for raw in (fields.text, fields.prompt, fields.messages, fields.input, fields.input_ids):
        if present(raw):
            # Anthropic's route and OpenAI's newest have what comes before all messages apart.
            before = b"".join(bytes(r) for r in (fields.system, fields.instructions) if present(r))
            return (before + bytes(raw))[:TEXT_BYTES_MAX].decode("utf-8", "replace")
    return ""
