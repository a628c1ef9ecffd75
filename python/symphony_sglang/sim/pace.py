"""How fast a simulation runs: virtual seconds for each second of the processor.

Processor time, not wall time: a simulation is one thread, and on a core of its own the two are the
same; on a shared machine only the first says something about the simulator.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

# A run makes millions of small objects and hardly a cycle.
GC_THRESHOLDS = (50_000, 20, 50)


def cpu_seconds() -> float:
    """Processor time of this process until now, user and system."""
    spent = os.times()
    return spent.user + spent.system


@contextmanager
def few_collections() -> Iterator[None]:
    """Collect cycles rarely meanwhile."""
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def times_real_time(virtual_seconds: float, spent_cpu_seconds: float) -> float:
    return virtual_seconds / max(1e-9, spent_cpu_seconds)
