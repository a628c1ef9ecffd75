"""The ``/symphony/*`` routes of a worker, added to SGLang's own HTTP application."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException
from sglang.srt.utils.auth import AuthLevel, auth_level

from symphony_sglang.engine.messages import COMMUNICATOR_NAME, ControlReply, ResidencyRequest

router = APIRouter(prefix="/symphony", tags=["symphony"])


def tokenizer_manager() -> Any:
    """SGLang's tokenizer manager of this process."""
    from sglang.srt.entrypoints.http_server import get_global_state

    return get_global_state().tokenizer_manager


async def ask_schedulers(request: Any) -> list[dict[str, Any]]:
    """Send `request` to every data-parallel rank and collect the answers."""
    manager = tokenizer_manager()
    manager.auto_create_handle_loop()
    communicator = getattr(manager, f"{COMMUNICATOR_NAME}_communicator")
    replies: list[ControlReply] = await communicator(request)
    return [reply.body for reply in replies]


def require_our_cache() -> None:
    """404 with the reason where the server runs another radix cache, which would never answer."""
    from sglang.srt.runtime_context import get_memory

    if get_memory().radix_cache_backend != "symphony":
        raise HTTPException(404, "this server runs without --radix-cache-backend symphony")


@router.get("/residency")
@auth_level(AuthLevel.NORMAL)
async def get_residency() -> dict[str, Any]:
    """Used and total tokens and bytes of every level, with counters, per data-parallel rank."""
    require_our_cache()
    ranks = await ask_schedulers(ResidencyRequest())
    return {**ranks[0], "ranks": ranks} if len(ranks) > 1 else ranks[0]
