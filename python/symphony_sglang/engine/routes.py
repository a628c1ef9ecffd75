"""The ``/symphony/*`` routes of a worker, added to SGLang's own HTTP application.

With ``--api-key`` set, SGLang's middleware guards these routes like all others.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from typing import Any

import orjson
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import ORJSONResponse
from sglang.srt.utils.auth import AuthLevel, auth_level

from symphony_sglang.core import hints
from symphony_sglang.engine.advise import AdviseService
from symphony_sglang.engine.gateway import GatewayFullError
from symphony_sglang.engine.messages import AdvisoryAction, ResidencyRequest
from symphony_sglang.engine.schedulers import ask_schedulers
from symphony_sglang.errors import HintError, UnsupportedError

router = APIRouter(prefix="/symphony", tags=["symphony"])

# The largest body that is read at all: input_ids of the longest allowed prefix, in decimal.
BODY_BYTES_MAX = 16 << 20
DRAIN_BYTES_MAX = 4 * BODY_BYTES_MAX


class BusyError(HTTPException):
    """429. SGLang's handler of HTTP errors drops their headers, so this one has its own."""

    def __init__(self, problem: str, retry_after_seconds: float = 1.0) -> None:
        # More than a whole burst at once: no wait is long enough, so none is named.
        wait = 1.0 if math.isinf(retry_after_seconds) else retry_after_seconds
        super().__init__(429, problem, {"Retry-After": str(max(1, math.ceil(wait)))})


async def answer_busy(_request: Request, error: Exception) -> ORJSONResponse:
    """A `BusyError` in the shape of SGLang's errors."""
    assert isinstance(error, BusyError)
    return error_answer(429, error.detail, error.headers)


async def answer_leaving(_request: Request, error: Exception) -> ORJSONResponse:
    """503: the server is ending; another one, or the next, may know."""
    return error_answer(503, str(error))


def error_answer(
    status: int, message: str, headers: Mapping[str, str] | None = None
) -> ORJSONResponse:
    """As SGLang has it (http_server.py:627)."""
    body = {
        "object": "error",
        "message": message,
        "type": str(status),
        "param": None,
        "code": status,
    }
    return ORJSONResponse(body, status, headers)


def tokenizer_manager() -> Any:
    """SGLang's tokenizer manager of this process."""
    from sglang.srt.entrypoints.http_server import get_global_state

    return get_global_state().tokenizer_manager


def service(request: Request) -> AdviseService:
    """This process's service, made at its first use, when SGLang's own parts are up."""
    found = getattr(request.app.state, "symphony_advise", None)
    if found is None:
        found = AdviseService(tokenizer_manager(), request.app)
        request.app.state.symphony_advise = found
    return found


def caller_of(request: Request) -> str:
    """Whom to charge: the key where there is one, else the address. No key is stored."""
    key = request.headers.get("authorization")
    if key:
        return hashlib.blake2b(key.encode(), digest_size=8).hexdigest()
    return request.client.host if request.client else ""


def require_our_cache() -> None:
    """404 with the reason where the server runs another radix cache, which would never answer."""
    from sglang.srt.runtime_context import get_memory

    if get_memory().radix_cache_backend != "symphony":
        raise HTTPException(404, "this server runs without --radix-cache-backend symphony")


async def read_body(request: Request) -> Any:
    """The decoded JSON body, or a 4xx that says what is wrong with it."""
    content, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        # A client that is still sending reads no answer: swallow some more before giving one.
        if size > DRAIN_BYTES_MAX:
            break
        if size <= BODY_BYTES_MAX:
            content += chunk
    if size > BODY_BYTES_MAX:
        raise HTTPException(413, f"body of over {BODY_BYTES_MAX} bytes; expected at most that")
    try:
        return orjson.loads(bytes(content))
    except orjson.JSONDecodeError as error:
        raise HTTPException(400, f"body: not JSON: {error}") from error


async def submit(request: Request, action: AdvisoryAction) -> dict[str, Any]:
    try:
        return await service(request).submit(action)
    except GatewayFullError as error:
        raise BusyError(str(error)) from error
    except UnsupportedError as error:
        raise HTTPException(409, str(error)) from error


@router.get("/residency")
@auth_level(AuthLevel.NORMAL)
async def get_residency() -> dict[str, Any]:
    """Used and total tokens and bytes of every level, with counters, per data-parallel rank."""
    require_our_cache()
    replies = await ask_schedulers(tokenizer_manager(), ResidencyRequest())
    ranks = [reply.body for reply in replies]
    return {**ranks[0], "ranks": ranks} if len(ranks) > 1 else ranks[0]


@router.post("/advise")
@auth_level(AuthLevel.NORMAL)
async def post_advise(request: Request) -> ORJSONResponse:
    """Take one hint or an envelope of hints; 202 with a receipt for each."""
    require_our_cache()
    body = await read_body(request)
    try:
        message = hints.parse_advise(body)
        count = max(1, len(message.hints))
        caller = caller_of(request)
        admission = await service(request).admit(caller, count)
        if not admission.allowed:
            problem = f"over the caller's budget of advisories ({admission.refusal})"
            raise BusyError(problem, admission.retry_after_seconds)
        answer = await service(request).advise(message, caller)
    except HintError as error:
        raise HTTPException(400, str(error)) from error
    except GatewayFullError as error:
        raise BusyError(str(error)) from error
    except UnsupportedError as error:
        raise HTTPException(409, str(error)) from error
    return ORJSONResponse(answer, 202)


async def known(request: Request, action: AdvisoryAction) -> dict[str, Any]:
    """The schedulers' answer about one advisory or session; 404 for what they do not know."""
    require_our_cache()
    answer = await submit(request, action)
    if not answer or (action.verb == "release" and answer.get("status") == "missing"):
        name = action.advisory_id or action.session_id or ""
        kind = "session" if action.verb in ("session", "release") else "advisory"
        raise HTTPException(404, f"{kind} {name[:256]!r} is not known")
    return answer


@router.get("/advisories/{advisory_id}")
@auth_level(AuthLevel.NORMAL)
async def get_advisory(advisory_id: str, request: Request) -> dict[str, Any]:
    """A receipt with its life so far."""
    return await known(request, AdvisoryAction(verb="receipt", advisory_id=advisory_id))


@router.delete("/advisories/{advisory_id}")
@auth_level(AuthLevel.NORMAL)
async def delete_advisory(advisory_id: str, request: Request) -> dict[str, Any]:
    """Cancel; of one that already ended, the receipt as it is."""
    action = AdvisoryAction(verb="cancel", advisory_id=advisory_id, caller=caller_of(request))
    receipt = await known(request, action)
    service(request).charge(action, receipt)
    return receipt


@router.get("/sessions/{session_id:path}")
@auth_level(AuthLevel.NORMAL)
async def get_session(session_id: str, request: Request) -> dict[str, Any]:
    """Where a session's tokens are, and its live advisories."""
    return await known(request, AdvisoryAction(verb="session", session_id=session_id))


@router.delete("/sessions/{session_id:path}")
@auth_level(AuthLevel.NORMAL)
async def delete_session(session_id: str, request: Request) -> dict[str, Any]:
    """The session is over: forget it, and let its memory go."""
    return await known(request, AdvisoryAction(verb="release", session_id=session_id))
