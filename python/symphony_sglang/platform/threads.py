"""Which cores each tensor-parallel rank of a CPU machine computes on.

Ranks that share cores fight for them at every barrier, so each gets its own share. SGLang reads the
shares from ``SGLANG_CPU_OMP_THREADS_BIND`` (srt/utils/numa_utils.py:454) and refuses to start more
ranks than NUMA nodes without it, but applies them only with its AMX kernels. We apply them.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

BIND_VARIABLE = "SGLANG_CPU_OMP_THREADS_BIND"

logger = logging.getLogger(__name__)


def share_cores(cores: Sequence[int], rank_count: int) -> list[list[int]]:
    """Split `cores` into `rank_count` runs of nearly equal length, in order.

    With more ranks than cores, ranks wrap around and share.
    """
    if rank_count < 1:
        raise ValueError(f"rank_count is {rank_count}, expected at least 1")
    ordered = sorted(cores)
    if rank_count >= len(ordered):
        return [[ordered[rank % len(ordered)]] for rank in range(rank_count)]
    base, extra = divmod(len(ordered), rank_count)
    shares, start = [], 0
    for rank in range(rank_count):
        stop = start + base + (1 if rank < extra else 0)
        shares.append(ordered[start:stop])
        start = stop
    return shares


def bind_text(shares: Sequence[Sequence[int]]) -> str:
    """The form SGLang reads: ranks separated by ``|``, cores by commas."""
    return "|".join(",".join(map(str, share)) for share in shares)


def parse_bind(text: str) -> list[list[int]]:
    """Inverse of ``bind_text``; also reads ranges (``0-3|4-7``), as users write them."""
    shares = []
    for part in text.split("|"):
        cores: list[int] = []
        for piece in part.split(","):
            first, _, last = piece.strip().partition("-")
            cores.extend(range(int(first), int(last or first) + 1))
        shares.append(cores)
    return shares


def export_core_shares(rank_count: int) -> None:
    """Publish the shares for the ranks to come, unless the user chose them."""
    if rank_count > 1 and not os.environ.get(BIND_VARIABLE):
        shares = share_cores(sorted(os.sched_getaffinity(0)), rank_count)
        os.environ[BIND_VARIABLE] = bind_text(shares)


def bind_this_rank(rank: int) -> list[int]:
    """Pin every thread of this process to the rank's cores; returns them.

    Nothing happens when no shares are published (one rank keeps the whole machine).
    """
    import torch

    text = os.environ.get(BIND_VARIABLE, "")
    if not text or text == "all":
        return sorted(os.sched_getaffinity(0))
    shares = parse_bind(text)
    cores = shares[rank % len(shares)]
    # Threads that exist already (torch's pool, ZMQ's) do not inherit a later change.
    for task in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(task.name), cores)
        except ProcessLookupError:  # the thread ended between listing and binding
            continue
    torch.set_num_threads(len(cores))
    logger.info("rank %d computes on cores %s", rank, cores)
    return list(cores)
