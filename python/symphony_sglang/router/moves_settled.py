"""What a move means for placement: the session's next turn goes where it is now."""

from __future__ import annotations

from symphony_sglang.core.migration import Move
from symphony_sglang.core.routing_types import (
    AdvisedPlace,
    Decision,
    Reason,
    RouteRequest,
    WorkerView,
)
from symphony_sglang.router.placement import Placement

# Until then the feed has told of the pages.
PROMISE_SECONDS = 10.0


def tell_placement(
    placement: Placement, move: Move, target: WorkerView | None, now_seconds: float
) -> None:
    """The target owns the session: whatever was routed where before does not count any more."""
    route = RouteRequest(request_id=move.move_id, input_tokens=1, session_id=move.session_id)
    decision = Decision(move.target_id, Reason.SESSION, uncached_tokens=0, considered=1)
    placement.policy.routed(route, decision, placement.index, now_seconds)
    if placement.promise is None or target is None:
        return
    # Its pages are there, though the feed has yet to say so, and on their way up.
    hops = (target.rates.nvme_to_host, target.rates.host_to_device)
    wait = sum(hop.seconds(move.tokens) for hop in hops if hop is not None)
    place = AdvisedPlace(move.target_id, move.tokens, now_seconds + wait)
    placement.promise(move.session_id, place, now_seconds + PROMISE_SECONDS)
