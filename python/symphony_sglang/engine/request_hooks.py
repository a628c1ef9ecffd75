"""What is done to ordinary requests in the HTTP process, through SGLang's hook registry."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from symphony_sglang.core import hints
from symphony_sglang.errors import HintError, SymphonyError

VALIDATE_HOOK = "sglang.srt.managers.tokenizer_manager.TokenizerManager._validate_one_request"
GENERATE_HOOK = "sglang.srt.managers.tokenizer_manager.TokenizerManager.generate_request"

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


def riding_hints(obj: Any, request: Any) -> hints.HintMessage | None:
    """The hints that ride on a request, None where there are none.

    ``/generate`` carries the envelope as a field; the OpenAI routes drop it while they parse, so
    there it is taken from the decoded body that the request keeps.

    Raises:
        HintError: the envelope is malformed, or names no prefix where the request has no session.
    """
    envelope = getattr(obj, "kv_hints", None)
    if envelope is None:
        body = getattr(request, "_json", None)
        envelope = body.get("kv_hints") if isinstance(body, dict) else None
    if envelope is None:
        return None
    plain = msgspec.to_builtins(envelope)
    fill_selectors(plain, getattr(obj, "session_id", None))
    return hints.parse_envelope(plain)


def fill_selectors(envelope: Any, session_id: str | None) -> None:
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
            await service(request).advise(message, caller_of(request))
        except SymphonyError as error:
            logger.warning("kv_hints of a request were not carried out: %s", error)

    task = manager.event_loop.create_task(send(), name="symphony.kv_hints")
    manager.asyncio_tasks.add(task)
    task.add_done_callback(manager.asyncio_tasks.discard)
