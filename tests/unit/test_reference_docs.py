"""The reference pages say what the code says.

``SYMPHONY_UPDATE_DOCS=1 pytest tests/unit/test_reference_docs.py`` writes them anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from symphony_sglang import config
from symphony_sglang.launch_server import split_arguments
from symphony_sglang.telemetry import metrics

REFERENCE = Path(__file__).resolve().parents[2] / "docs" / "reference"
PAGES = {"metrics.md": metrics.reference, "flags.md": config.reference}


@pytest.mark.parametrize("name", PAGES)
def test_page_is_up_to_date(name: str) -> None:
    render: Callable[[], str] = PAGES[name]
    path = REFERENCE / name
    if os.environ.get("SYMPHONY_UPDATE_DOCS"):
        path.write_text(render())
    assert path.read_text() == render(), f"{name}: run this test with SYMPHONY_UPDATE_DOCS=1"


def test_every_declared_metric_stands_in_the_page_once() -> None:
    page = metrics.reference()
    for metric in (*metrics.declared(metrics.Worker), *metrics.declared(metrics.Router)):
        assert page.count(f"| `{metric.name}` |") == 1


def test_flags_of_the_page_are_flags_that_the_launcher_takes() -> None:
    rows = [line for line in config.reference().splitlines() if line.startswith("| `--")]
    assert len(rows) == len(config.SymphonyConfig.__dataclass_fields__)
    for row in rows:
        for spelling in row.split(" | ")[0].strip("| ").split(", "):
            words = spelling.strip("`").split()
            if len(words) > 1:
                # The default is always in range; an empty one stands for text.
                default = row.split(" | ")[2].strip("` ")
                words[1] = default or "a-path-or-a-secret-long-enough"
            _, rest = split_arguments([*words, "--model-path", "m"])
            assert rest == ["--model-path", "m"], spelling
