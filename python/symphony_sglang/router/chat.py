"""Chat messages to the text that the worker's tokenizer sees.

Follows what SGLang does with a Jinja template (entrypoints/openai/serving_chat.py:2011): absent
content becomes empty, lists of parts become text or stay as the template wants them, tools are
given in OpenAI's shape with its defaults. Models with an encoder of their own instead of a template
are not imitated.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from symphony_sglang.errors import SymphonyError

# Templates of multimodal models take lists of parts (parser/jinja_template_utils.py:95).
MEDIA_WORDS = ("image", "audio", "video", "vision")
PARTS_LOOP = re.compile(
    r"for\s+\w+\s+in\s+(?:message|msg|m)(?:\[\s*['\"]content['\"]\s*\]|\.content)"
)


class ConversationError(SymphonyError):
    """Messages that the template cannot render; the worker will say what is wrong with them."""

    code = "conversation"


class ChatTemplate:
    """A tokenizer's chat template, or one given in its place."""

    def __init__(self, tokenizer: Any, template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        text = template or getattr(tokenizer, "chat_template", None) or ""
        if not isinstance(text, str):
            text = str(text)
        self.takes_parts = wants_parts(text)
        self.usable = bool(text)

    def render(self, body: Mapping[str, Any]) -> str:
        """The prompt's text.

        Raises:
            ConversationError: there is no template, or it refuses these messages.
        """
        if not self.usable:
            raise ConversationError("the tokenizer has no chat template")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise ConversationError("messages are missing")
        options = dict(body.get("chat_template_kwargs") or {})
        if body.get("reasoning_effort") is not None:
            options.setdefault("reasoning_effort", body["reasoning_effort"])
        try:
            text = self._tokenizer.apply_chat_template(
                [self._message(message) for message in messages],
                tools=tools_of(body),
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except Exception as error:
            raise ConversationError(f"{type(error).__name__}: {error}") from error
        return str(text)

    def _message(self, message: Any) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise ConversationError("a message is not an object")
        kept = {name: value for name, value in message.items() if value is not None}
        content = kept.get("content", "")
        if isinstance(content, list):
            content = self._parts(content)
        kept["content"] = content
        return kept

    def _parts(self, parts: list[Any]) -> Any:
        objects = [part for part in parts if isinstance(part, dict)]
        if any(part.get("type") not in ("text", None) for part in objects):
            # Their tokens come from the media itself.
            raise ConversationError("parts other than text")
        if self.takes_parts:
            return objects
        return " ".join(str(part["text"]) for part in objects if "text" in part)


def wants_parts(template: str) -> bool:
    """Whether a template goes through a message's parts itself."""
    return any(word in template for word in MEDIA_WORDS) or bool(PARTS_LOOP.search(template))


def tools_of(body: Mapping[str, Any]) -> list[Any] | None:
    """Tools as SGLang hands them to the template: with the fields that its schema fills in."""
    tools = body.get("tools")
    choice = body.get("tool_choice")
    if not isinstance(tools, list) or not tools or choice == "none":
        return None
    wanted = None
    if isinstance(choice, dict) and isinstance(choice.get("function"), dict):
        wanted = choice["function"].get("name")
    completed = []
    for tool in tools:
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict):
            raise ConversationError("a tool without a function")
        if wanted is not None and function.get("name") != wanted:
            continue
        filled = {
            "description": function.get("description"),
            "name": function.get("name"),
            "parameters": function.get("parameters"),
            "strict": function.get("strict", False),
        }
        completed.append({"type": tool.get("type", "function"), "function": filled})
    return completed or None
