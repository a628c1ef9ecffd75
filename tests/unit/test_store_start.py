"""Ranks of one worker open the same directory at the same moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
from symphony_sglang.store.namespace import prepare_directory
sys.stdin.readline()
for index in range(200):
    prepare_directory(Path(sys.argv[1]) / str(index))
"""


def test_directory_can_be_prepared_by_several_processes_at_once(tmp_path: Path) -> None:
    children = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(tmp_path)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    for child in children:
        _out, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors
    assert not list(tmp_path.rglob("*.new"))
