"""Which pages go first: cost-aware recency. Pure: arrays in, slots out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

# A whole priority level outweighs any age (unix seconds stay below 2^32).
_PRIORITY_STEP = float(1 << 36)
# A page that lies deeper in its prefix counts as this much older, so that a prefix loses its tail
# before its head when all of it was used together.
_DEPTH_SECONDS = 1.0 / 1024


def keep_scores(
    accessed: npt.NDArray[np.float64],
    cost: npt.NDArray[np.float16],
    depth: npt.NDArray[np.uint16],
    priority: npt.NDArray[np.int8],
    lifetime_seconds: float,
) -> npt.NDArray[np.float64]:
    """The higher, the longer kept: GreedyDual in the time domain.

    A page of mean cost is worth its recency; one that costs k times the mean to recompute is kept
    as if used (k - 1) lifetimes later, a lifetime being how long pages have lived since their last
    use (Young, "The k-server dual and loose competitiveness for paging", 1994; Cao and Irani,
    "Cost-aware WWW proxy caching algorithms", USENIX 1997: GreedyDual-Size with equal sizes).

    Args:
        accessed: unix seconds of the last use.
        cost: seconds to recompute the page, in any unit; only ratios count.
        depth: pages before this one in its prefix.
    """
    weight = cost.astype(np.float64)
    mean = float(weight.mean()) if len(weight) else 0.0
    bonus = weight * (lifetime_seconds / mean) if mean > 0 else np.zeros(len(weight))
    scores = accessed + bonus - depth * _DEPTH_SECONDS
    result: npt.NDArray[np.float64] = scores + priority.astype(np.float64) * _PRIORITY_STEP
    return result


def choose_victims(
    slots: npt.NDArray[np.intp], scores: npt.NDArray[np.float64], count: int
) -> npt.NDArray[np.intp]:
    """The `count` slots of the lowest scores, lowest first; fewer if there are fewer."""
    if count >= len(slots):
        return slots[np.argsort(scores, kind="stable")]
    lowest = np.argpartition(scores, count)[:count]
    return slots[lowest[np.argsort(scores[lowest], kind="stable")]]
