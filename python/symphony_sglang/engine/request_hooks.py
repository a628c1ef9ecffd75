"""What is done to ordinary requests in the HTTP process, through SGLang's hook registry."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec

from symphony_sglang.core import hints
from symphony_sglang.core.levels import Target
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.engine.agent_hints import advise_parent
from symphony_sglang.engine.gateway import GatewayFullError
from symphony_sglang.errors import HintError, SymphonyError

VALIDATE_HOOK = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
GENERATE_HOOK = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"
CHAT = "sglang.srt.entrypoints.openai.serving_chat.OpenAIServingChat"
# Both serve /v1/chat/completions and /v1/messages; only they know of a turn's tool calls.
CHAT_STREAM_HOOK = f"{CHAT}._generate_chat_stream"
CHAT_ANSWER_HOOK = f"{CHAT}._handle_non_streaming_request"

TOOL_CALLS = "tool_calls"
# As a chunk's JSON has it. Generated text cannot hold it: its quotes are escaped there.
TOOL_CALLS_MARK = f'"finish_reason":"{TOOL_CALLS}"'
IMPLICIT_ACTION_ID = f"{hints.IMPLICIT_PREFIX}{TOOL_CALLS}"
# A tool that takes longer than this is rare, and its session is then an ordinary one.
IMPLICIT_EXPIRES_SECONDS = 60.0
# Below what a caller asks for by name.
IMPLICIT_PRIORITY = -1

logger = logging.getLogger(__name__)


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


def generate_with_hints(original: Any, manager: Any, obj: Any, request: Any = None) -> Any:
    """AROUND hook of ``TokenizerManager.generate_request``: the request's session, and its hints.

    A session header stands in for the body's ``session_id``; ``kv_hints`` are about the turn after
    this one, and are carried out when this one ends. Malformed hints raise ValueError, which the
    routes answer with 400, before anything is generated.
    """
    if request is None:
        return original(manager, obj, request)
    take_session(obj, request.headers)
    advise_parent(obj, request, namespace_of(obj), lambda found: carry_out(manager, request, found))
    try:
        message = riding_hints(obj, request)
    except HintError as error:
        raise ValueError(str(error)) from error
    stream = original(manager, obj, request)
    if message is None:
        return stream
    return fire_at_end(stream, lambda: carry_out(manager, request, message))


def take_session(obj: Any, headers: Any) -> None:
    """Give a request without a session id the one of its headers."""
    if getattr(obj, "session_id", None) is None and getattr(obj, "session_params", None) is None:
        session_id = hints.find_session_id(None, headers)
        if session_id is not None and hasattr(obj, "session_id"):
            obj.session_id = session_id


def read_envelope(obj: Any, request: Any) -> Any:
    """The ``kv_hints`` of a request, None where it has none.

    ``/generate`` carries the envelope as a field; the OpenAI routes drop it while they parse, so
    there it is taken from the decoded body that the request keeps.
    """
    envelope = getattr(obj, "kv_hints", None)
    if envelope is None:
        body = getattr(request, "_json", None)
        envelope = body.get("kv_hints") if isinstance(body, dict) else None
    return envelope


def riding_hints(obj: Any, request: Any) -> hints.HintMessage | None:
    """The hints that ride on a request, None where there are none.

    Raises:
        HintError: the envelope is malformed, or names no prefix where the request has no session.
    """
    envelope = read_envelope(obj, request)
    if envelope is None:
        return None
    plain = msgspec.to_builtins(envelope)
    fill_selectors(plain, getattr(obj, "session_id", None), namespace_of(obj))
    return hints.parse_envelope(plain)


def namespace_of(obj: Any) -> Namespace:
    """The part of the cache that a request is confined to."""
    names = (getattr(obj, "extra_key", None), getattr(obj, "cache_salt", None))
    return Namespace(*(name if isinstance(name, str) else None for name in names))


def fill_selectors(envelope: Any, session_id: str | None, namespace: Namespace) -> None:
    """An action that names no prefix means the session of the request it rides on."""
    actions = envelope.get("actions") if isinstance(envelope, dict) else None
    for action in actions if isinstance(actions, list) else []:
        payload = action.get("payload") if isinstance(action, dict) else None
        if (
            session_id is not None
            and isinstance(payload, dict)
            and not {*hints.SELECTORS, "advisory_id"} & payload.keys()
        ):
            payload["session_id"] = session_id
            for name, value in namespace._asdict().items():
                if value is not None:
                    payload.setdefault(name, value)


async def fire_at_end(stream: AsyncIterator[Any], fire: Callable[[], None]) -> AsyncIterator[Any]:
    """`stream`, and `fire` once when its last answer is there.

    Not after the loop: routes that do not stream take one answer and never come back.
    """
    async for answer in stream:
        if ended(answer):
            fire()
        yield answer


def ended(answer: Any) -> bool:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    return isinstance(meta, dict) and meta.get("finish_reason") is not None


def carry_out(manager: Any, request: Any, message: hints.HintMessage) -> None:
    """Send the hints without making the answer wait; the manager keeps the task alive."""
    from symphony_sglang.engine.routes import caller_of, service

    async def send() -> None:
        try:
            await service(request).advise_quietly(message, caller_of(request))
        except (SymphonyError, GatewayFullError) as error:
            logger.warning("kv_hints of a request were not carried out: %s", error)

    task = manager.event_loop.create_task(send(), name="symphony.kv_hints")
    manager.asyncio_tasks.add(task)
    task.add_done_callback(manager.asyncio_tasks.discard)


# Turns that end with a tool call -----------------------------------------------------------------


def watch_chat_stream(
    original: Callable[..., AsyncIterator[Any]], serving: Any, obj: Any, request: Any, raw: Any
) -> AsyncIterator[Any]:
    """AROUND hook of the chat route's stream: a turn that ends with a tool call will go on."""
    return note_tool_calls(original(serving, obj, request, raw), lambda: imply(serving, obj, raw))


async def watch_chat_answer(
    original: Callable[..., Awaitable[Any]], serving: Any, obj: Any, request: Any, raw: Any
) -> Any:
    """AROUND hook of the chat route's whole answers."""
    answer = await original(serving, obj, request, raw)
    if ends_with_tool_calls(answer):
        imply(serving, obj, raw)
    return answer


async def note_tool_calls(
    stream: AsyncIterator[Any], fire: Callable[[], None]
) -> AsyncIterator[Any]:
    """`stream`, and `fire` once before the first chunk that says ``tool_calls``."""
    fired = False
    async for chunk in stream:
        if not fired and isinstance(chunk, str) and TOOL_CALLS_MARK in chunk:
            fired = True
            fire()
        yield chunk


def ends_with_tool_calls(answer: Any) -> bool:
    """Whether a chat answer, as an object or rendered already, ends with a tool call."""
    choices = getattr(answer, "choices", None)
    if choices is not None:
        return any(choice.finish_reason == TOOL_CALLS for choice in choices)
    return TOOL_CALLS_MARK.encode() in (getattr(answer, "body", None) or b"")


def imply(serving: Any, obj: Any, raw: Any) -> None:
    """The session's next turn comes when its tool is done: advise as if its caller had.

    Nothing without a session id, and nothing where the request carries hints of its own.
    """
    session_id = getattr(obj, "session_id", None)
    if raw is None or not isinstance(session_id, str) or read_envelope(obj, raw) is not None:
        return
    from symphony_sglang.engine.routes import service

    advise = service(raw)
    if not advise.config.implicit_hints:
        return
    selector = hints.Selector(session_id=session_id, namespace=namespace_of(obj))
    prefetch = hints.Prefetch(
        selector=selector,
        target=Target.DEVICE,
        expected_in_seconds=None,
        expires_in_seconds=IMPLICIT_EXPIRES_SECONDS,
        priority=IMPLICIT_PRIORITY,
    )
    hint = hints.Hint(IMPLICIT_ACTION_ID, prefetch)
    carry_out(serving.tokenizer_manager, raw, hints.HintMessage(None, (hint,)))
    if advise.metrics is not None:
        advise.metrics.implied(TOOL_CALLS)
