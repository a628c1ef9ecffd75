"""``/symphony/pull``, ``/symphony/pulls/{id}`` and ``/symphony/moves`` of a worker."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

import msgspec
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import ORJSONResponse
from sglang.srt.utils.auth import AuthLevel, auth_level

from symphony_sglang.clock import SystemClock
from symphony_sglang.core.migration import Order, OrderKind
from symphony_sglang.core.prefix import TOKEN_MAX, pack_tokens
from symphony_sglang.engine.advise import merge_answers, new_advisory_id
from symphony_sglang.engine.messages import PeerRequest
from symphony_sglang.engine.routes import read_body, require_our_cache, tokenizer_manager
from symphony_sglang.engine.schedulers import ask_schedulers
from symphony_sglang.errors import ConfigError
from symphony_sglang.wire.page_client import split_address

router = APIRouter(prefix="/symphony", tags=["symphony"])
clock = SystemClock()

DEADLINE_SECONDS_MAX = 600.0
NAME_CHARACTERS_MAX = 1024
TARGETS = ("device", "host", "nvme")


class PullBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /symphony/pull``; exactly one of `session_id` and `input_ids`."""

    source: str
    session_id: str | None = None
    input_ids: list[int] | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    target: str = "device"
    deadline_s: float = 60.0


class OrderBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of ``POST /symphony/moves``: an order of the router's (``core.migration.Order``)."""

    kind: OrderKind
    move_id: str
    session_id: str
    epoch: int
    step: int = 0
    source: str = ""  # page server of the source's rank 0; needed by ``copy``
    extra_key: str | None = None
    cache_salt: str | None = None
    tokens: int = 0
    bytes: int = 0
    deadline_s: float = 60.0
    target: str = "device"  # where ``switch`` brings the session


Body = TypeVar("Body", PullBody, OrderBody)


def parse(content: Any, body_type: type[Body]) -> Body:
    """The body, or a 400 that names the field."""
    try:
        return msgspec.convert(content, body_type)
    except msgspec.ValidationError as error:
        raise HTTPException(400, f"body: {error}") from error


def refuse(field: str, problem: str) -> HTTPException:
    return HTTPException(400, f"{field}: {problem}")


def check_common(body: PullBody | OrderBody) -> None:
    if not 0 < body.deadline_s <= DEADLINE_SECONDS_MAX:
        raise refuse("deadline_s", f"{body.deadline_s}; expected 0 to {DEADLINE_SECONDS_MAX:g}")
    for name in ("session_id", "extra_key", "cache_salt"):
        value = getattr(body, name)
        if value is not None and len(value) > NAME_CHARACTERS_MAX:
            raise refuse(name, f"{len(value)} characters; expected at most {NAME_CHARACTERS_MAX}")


def check_source(address: str) -> None:
    try:
        split_address(address)
    except ConfigError as error:
        raise refuse("source", str(error)) from error


def check_pull(body: PullBody) -> None:
    check_common(body)
    check_source(body.source)
    if (body.session_id is None) == (body.input_ids is None):
        raise refuse("session_id", "expected exactly one of session_id and input_ids")
    if body.session_id == "":
        raise refuse("session_id", "empty")
    if body.target not in TARGETS:
        raise refuse("target", f"{body.target!r}; expected one of {', '.join(TARGETS)}")
    if body.input_ids is not None:
        ids = body.input_ids
        if not ids or min(ids) < 0 or max(ids) > TOKEN_MAX:
            raise refuse("input_ids", f"expected token ids from 0 to {TOKEN_MAX}")


def check_order(body: OrderBody) -> None:
    check_common(body)
    for name in ("move_id", "session_id"):
        # A worker that comes back with an old epoch is told to give way, outside of any move.
        fewest = 0 if (name, body.kind) == ("move_id", OrderKind.RELEASE) else 1
        if not fewest <= len(getattr(body, name)) <= NAME_CHARACTERS_MAX:
            raise refuse(name, f"expected {fewest} to {NAME_CHARACTERS_MAX} characters")
    for name in ("epoch", "step", "tokens", "bytes"):
        if not 0 <= getattr(body, name) < 1 << 63:
            raise refuse(name, f"{getattr(body, name)}; expected 0 or more")
    if body.target not in TARGETS:
        raise refuse("target", f"{body.target!r}; expected one of {', '.join(TARGETS)}")
    if body.kind is OrderKind.COPY:
        check_source(body.source)


async def ask(request: PeerRequest) -> dict[str, Any]:
    """The schedulers' answer; 409 where the worker has no peer level."""
    replies = await ask_schedulers(tokenizer_manager(), request)
    answer: dict[str, Any] = merge_answers(tuple(reply.body for reply in replies))
    if "error" in answer:
        raise HTTPException(409, answer["error"])
    return answer


@router.post("/pull")
@auth_level(AuthLevel.NORMAL)
async def post_pull(request: Request) -> ORJSONResponse:
    """Copy a session's, or a prompt's, pages from a peer; 202 with a receipt."""
    require_our_cache()
    body = parse(await read_body(request), PullBody)
    check_pull(body)
    answer = await ask(
        PeerRequest(
            verb="pull",
            sent_seconds=clock.monotonic(),
            pull_id=f"pull-{uuid.uuid4().hex}",
            advisory_id=new_advisory_id(),
            session_id=body.session_id,
            token_bytes=None if body.input_ids is None else pack_tokens(body.input_ids),
            extra_key=body.extra_key,
            cache_salt=body.cache_salt,
            source=body.source,
            target=body.target,
            deadline_seconds=body.deadline_s,
        )
    )
    return ORJSONResponse(answer, 202)


async def known_pull(verb: str, pull_id: str) -> dict[str, Any]:
    require_our_cache()
    answer = await ask(PeerRequest(verb=verb, sent_seconds=clock.monotonic(), pull_id=pull_id))
    if not answer:
        raise HTTPException(404, f"pull {pull_id[:256]!r} is not known")
    return answer


@router.get("/pulls/{pull_id}")
@auth_level(AuthLevel.NORMAL)
async def get_pull(pull_id: str) -> dict[str, Any]:
    """A pull's receipt as it is now."""
    return await known_pull("state", pull_id)


@router.delete("/pulls/{pull_id}")
@auth_level(AuthLevel.NORMAL)
async def delete_pull(pull_id: str) -> dict[str, Any]:
    """Stop a pull; of one that ended, the receipt as it is."""
    return await known_pull("cancel", pull_id)


@router.post("/moves")
@auth_level(AuthLevel.NORMAL)
async def post_order(request: Request) -> dict[str, Any]:
    """Carry out a router's order for a move; the answer is its reply."""
    require_our_cache()
    body = parse(await read_body(request), OrderBody)
    check_order(body)
    order = Order(
        kind=body.kind,
        worker_id="",
        move_id=body.move_id,
        session_id=body.session_id,
        epoch=body.epoch,
        step=body.step,
        tokens=body.tokens,
        bytes=body.bytes,
    )
    return await ask(
        PeerRequest(
            verb="order",
            sent_seconds=clock.monotonic(),
            session_id=body.session_id,
            extra_key=body.extra_key,
            cache_salt=body.cache_salt,
            source=body.source,
            deadline_seconds=body.deadline_s,
            target=body.target,
            order=order,
        )
    )
