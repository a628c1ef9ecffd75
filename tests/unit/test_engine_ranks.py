"""Two ranks, each a process with its own tree, disk and pace, decide alike all the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent.parent


def test_ranks_that_stumble_apart_decide_alike(tmp_path: Path) -> None:
    """1,000 hints, cancels, demotions and requests; storage delays and fails at random."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.005",
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.05",
        "SYMPHONY_BREAK_EVEN": "1",
    }
    command = [sys.executable, str(TESTS / "rank_child.py"), str(tmp_path)]
    children = [
        subprocess.Popen(
            [*command, str(rank), "1000"],
            env={**environment, "PYTHONHASHSEED": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        ends = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, errors) in zip(children, ends, strict=True):
        assert child.returncode == 0, errors[-4000:]
    first, second = (json.loads(out.strip().splitlines()[-1]) for out, _ in ends)
    assert first == second
    # Which request joins a read depends on real threads; that pages moved, and speeds closed a
    # level, does not.
    assert min(first["moved"].values()) > 0, first
    assert first["gate"]["nvme"]["recompute"] > 0, first
    assert first["statuses"]["accepted"] > 100, first
