"""Every `bash` and `python` block of the documents runs as it stands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from conftest import Server

pytestmark = pytest.mark.server

DOCS = Path(__file__).resolve().parents[2] / "docs"
# What cannot run as it stands is marked `sh`, or not at all.
RUN = ("bash", "python")
SECONDS_MAX = 120


class Example(NamedTuple):
    place: str
    language: str
    code: str


def examples(text: str, name: str) -> list[Example]:
    """The fenced blocks of `text` that are to run, with the line where each begins."""
    found = []
    for match in re.finditer(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        if match.group(1) in RUN:
            line = text.count("\n", 0, match.start()) + 1
            found.append(Example(f"{name}:{line}", match.group(1), match.group(2)))
    return found


EXAMPLES = [
    found
    for path in sorted(DOCS.rglob("*.md"))
    for found in examples(path.read_text(), str(path.relative_to(DOCS)))
]


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.place for example in EXAMPLES])
def test_example_runs(example: Example, worker: Server, tmp_path: Path) -> None:
    binaries = Path(sys.executable).parent
    command = {
        "bash": ["bash", "-eu", "-o", "pipefail", "-c", example.code],
        "python": [sys.executable, "-W", "ignore", "-c", example.code],
    }[example.language]
    # `head` closes the pipe of an endless stream, which is no failure of the example.
    if "| head" in example.code:
        command = ["bash", "-eu", "-c", example.code]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "URL": worker.url, "PATH": f"{binaries}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=SECONDS_MAX,
    )
    assert done.returncode == 0, f"{example.place}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    if example.language == "bash" and "symphony/advise" in example.code:
        assert '"receipts"' in done.stdout


def test_documents_have_examples_of_both_kinds() -> None:
    assert {example.language for example in EXAMPLES} == set(RUN)
    assert len(EXAMPLES) >= 8
    pages = {example.place.partition(":")[0] for example in EXAMPLES}
    assert {"quickstart.md", "advisories.md", "operations.md"} <= pages
    assert examples("```sh\nno\n```\n\n```bash\nyes\n```\n", "x") == [
        Example("x:5", "bash", "yes\n")
    ]
