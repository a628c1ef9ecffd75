"""Writes the reproduction's tables into its page, between marks: what stands there is not retyped.

A block begins with ``<!-- reproduce: NAME -->`` and ends with ``<!-- reproduce: end -->``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmark.reproduce_summary import claims_table
from benchmark.reproduce_validate import table

BLOCK = re.compile(
    r"(<!-- reproduce: (?P<name>[a-z-]+) -->\n)(?P<text>.*?)(<!-- reproduce: end -->)", re.DOTALL
)


def document(page: Path, summary: dict[str, Any], validations: list[dict[str, Any]]) -> None:
    """Fill the page's blocks.

    Raises:
        ValueError: the page has a block that nobody fills, or lacks one.
    """
    blocks = {
        "claims": claims_table(summary),
        "speed": speed_table(summary),
        "validation": validation_tables(validations),
    }
    page.write_text(fill(page.read_text(), blocks))


def fill(text: str, blocks: Mapping[str, str]) -> str:
    """The text with each block's content in its place."""
    seen = [match["name"] for match in BLOCK.finditer(text)]
    if sorted(seen) != sorted(blocks):
        raise ValueError(
            f"the page has blocks {sorted(seen)}; expected {sorted(blocks)}, each once"
        )
    return BLOCK.sub(lambda match: f"{match[1]}{blocks[match['name']]}\n{match[4]}", text)


def speed_table(summary: dict[str, Any]) -> str:
    """How many times real time each kind of run was simulated."""
    rows = summary["times_real_time"]["runs"]
    lines = [
        "| 8 workers, and | turns and advisories a second | times real time |",
        "|---|---|---|",
    ]
    lines += [
        f"| {row['name']} | {row['turns_per_second']:.1f} and "
        f"{row['advisories_per_second']:.1f} | {row['times']:.0f} |"
        for row in rows
    ]
    whole = summary["times_real_time"]
    lines += [
        "",
        f"Median of all {summary['runs']} runs: {whole['median']:.0f}; "
        f"lowest {whole['lowest']:.0f}.",
    ]
    return "\n".join(lines)


def validation_tables(validations: list[dict[str, Any]]) -> str:
    """One table a scenario."""
    if not validations:
        return "No real run was held against the simulator yet."
    return "\n\n".join(f"{item['title']} (`{item['scenario']}`):\n\n{table(item)}"
                       for item in validations)  # fmt: skip


def read_validations(directory: Path) -> list[dict[str, Any]]:
    """Those that `benchmark.reproduce_validate --output` wrote there."""
    return [json.loads(path.read_text()) for path in sorted(directory.glob("validation-*.json"))]
