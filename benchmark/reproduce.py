"""``python -m benchmark.reproduce [--output DIR]``: SYMPHONY's results (NSDI'26), simulated.

Three steps, each on the file of the one before: `run` simulates and writes ``rows.jsonl``,
`summarize` computes ``summary.json``, `plot` draws. Without a step all three are done. `--page
docs/simulator.md` also fills the tables of that page, as the step `document` does alone. Equal
seeds give equal rows but for ``cpu_seconds``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmark.reproduce_document import document, read_validations
from benchmark.reproduce_plots import plot_all
from benchmark.reproduce_runs import FIGURES, read_rows, row_of, runs_of
from benchmark.reproduce_summary import SUMMARY_NAME, claims_table, summarize
from symphony_sglang.errors import SymphonyError

ROWS_NAME = "rows.jsonl"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark.reproduce", description=__doc__)
    parser.add_argument("step", nargs="?", choices=("run", "summarize", "plot", "document"))
    parser.add_argument("--output", type=Path, default=Path("benchmark/results/local/reproduce"))
    parser.add_argument("--figure", action="append", choices=tuple(FIGURES), default=[])
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="0 to N-1; default 1")
    parser.add_argument("--page", type=Path, metavar="FILE", help="fill its tables, too")
    return parser


def run(directory: Path, seeds: int, figures: list[str], console: Console) -> None:
    """Simulate what ``rows.jsonl`` lacks; an interrupted run goes on where it stopped."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / ROWS_NAME
    done = set()
    if path.exists():
        keys = ("figure", "model", "variant", "users", "seed")
        done = {tuple(row[key] for key in keys) for row in read_rows(path)}
    todo = [
        item
        for item in runs_of(tuple(range(seeds)), figures)
        if (item.figure, item.model, item.variant, item.rules.users.users, item.rules.seed)
        not in done
    ]
    with path.open("a") as output, Progress(console=console, transient=True) as progress:
        bar = progress.add_task("simulating", total=len(todo))
        for item in todo:
            words = f"{item.figure} {item.model}: {item.variant}, {item.rules.users.users} users"
            progress.update(bar, description=words)
            output.write(json.dumps(row_of(item)) + "\n")
            output.flush()
            progress.advance(bar)


def main() -> int:
    """Exit code 2 with one line where the input is wrong."""
    parser = make_parser()
    arguments = parser.parse_args()
    if arguments.step == "document" and arguments.page is None:
        parser.error("document needs --page FILE")
    console = Console()
    directory = arguments.output
    try:
        if arguments.step in (None, "run"):
            run(directory, arguments.seeds, arguments.figure, console)
        if arguments.step in (None, "summarize"):
            summary = summarize(read_rows(directory / ROWS_NAME))
            (directory / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n")
        summary = {}
        if arguments.step != "run":
            summary = json.loads((directory / SUMMARY_NAME).read_text())
            console.print(claims_table(summary), markup=False, highlight=False)
        if arguments.step in (None, "plot"):
            plot_all(summary, directory)
        if arguments.page is not None and summary:
            document(arguments.page, summary, read_validations(directory))
    except (SymphonyError, ValueError, OSError) as error:
        print(f"reproduce: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
