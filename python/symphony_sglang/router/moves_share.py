"""The ``share`` hint: one more worker gets a copy of a prefix. Nobody's owner changes."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from symphony_sglang.core.hints import Selector, Share
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.routing_types import RouteRequest
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.moves_orders import peer_of
from symphony_sglang.router.registry import Worker, WorkerRegistry
from symphony_sglang.router.upstream import UpstreamError

ANSWER_SECONDS_MAX = 10.0
STATES = {"failed": "failed", "cancelled": "cancelled"}


def holder(index: LocationIndex, route: RouteRequest) -> str | None:
    """Who has a session, or most of a prompt; None: nobody is known to."""
    place = index.session(route.session_id or "")
    if place is not None:
        return place.worker_id
    pages: dict[str, int] = {}
    for hashes in route.page_hashes.values():
        pages |= index.find(hashes).pages
    return max(pages, key=lambda name: pages[name], default=None)


async def share(
    registry: WorkerRegistry,
    health: HealthMonitor,
    action: Share,
    source_id: str | None,
    action_id: str | None,
) -> dict[str, Any]:
    """The receipt of the copy, which goes on at the worker that pulls.

    Args:
        source_id: who has the prefix, None where nobody is known to.
    """
    target = registry.find(action.to)
    selector = action.selector
    source = "" if source_id is None else peer_of(registry, source_id)
    if target is None:
        return receipt(selector, action_id, None, "rejected", "unknown_worker")
    if source_id is None:
        return receipt(selector, action_id, target, "missing", "unknown_prefix")
    if source_id in target.domain_ids:
        return receipt(selector, action_id, target, "rejected", "already_there")
    if not source or not peer_of(registry, target.domain_ids[0]):
        return receipt(selector, action_id, target, "unsupported", "no_peer_level")
    if selector.session_id is None and not selector.input_ids:
        return receipt(selector, action_id, target, "unsupported", "name_a_session_or_input_ids")
    try:
        pulled = await pull(health, target, selector, source)
    except (UpstreamError, TimeoutError, msgspec.DecodeError):
        return receipt(selector, action_id, target, "rejected", "worker_unavailable")
    made = receipt(
        selector, action_id, target, str(pulled.get("status")), str(pulled.get("reason", ""))
    )
    made["advisory_id"] = pulled.get("advisory_id")
    made["state"] = STATES.get(str(pulled.get("state")), "staging")
    made["tokens"] = {"total": pulled.get("tokens", {}).get("total", 0)}
    made["pull_id"] = pulled.get("pull_id")
    return made


async def pull(
    health: HealthMonitor, target: Worker, selector: Selector, source: str
) -> dict[str, Any]:
    """The receipt of the worker's own pull.

    Raises:
        UpstreamError, TimeoutError: it gave none.
    """
    body: dict[str, Any] = {"source": source, "target": "host"}
    if selector.session_id is not None:
        body["session_id"] = selector.session_id
    else:
        body["input_ids"] = list(selector.input_ids or ())
    body |= {n: value for n, value in selector.namespace._asdict().items() if value is not None}
    async with asyncio.timeout(ANSWER_SECONDS_MAX):
        status, content = await health.call(
            target, "POST", "/symphony/pull", msgspec.json.encode(body)
        )
    document = msgspec.json.decode(content) if status == 202 else None
    if not isinstance(document, dict):
        raise UpstreamError("protocol", f"/symphony/pull answered {status}")
    return document


def receipt(
    selector: Selector, action_id: str | None, target: Worker | None, status: str, reason: str
) -> dict[str, Any]:
    return {
        "advisory_id": None,
        "action_id": action_id,
        "status": status,
        "reason": reason,
        "session_id": selector.session_id,
        "worker": None if target is None else target.domain_ids[0],
        "state": "failed",
        "tokens": {},
        "bytes": {},
        "timeline": [],
    }
