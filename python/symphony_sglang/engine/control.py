"""Answers our control messages inside a scheduler process."""

from __future__ import annotations

from typing import Any

from sglang.utils import TypeBasedDispatcher

from symphony_sglang.engine.cache import SymphonyCache
from symphony_sglang.engine.messages import ControlReply, ResidencyRequest
from symphony_sglang.engine.residency import residency


def attach_control(_result: Any, scheduler: Any) -> None:
    """AFTER hook of ``Scheduler.init_request_dispatcher``: add our message types to it.

    With another cache (``--symphony-off``, or stock flags) there is nothing to answer.
    """
    cache = scheduler.tree_cache
    if not isinstance(cache, SymphonyCache):
        return
    scheduler._request_dispatcher += TypeBasedDispatcher(
        [(ResidencyRequest, lambda _request: ControlReply(body=residency(cache)))]
    )
    cache.control_attached = True
