"""``python -m benchmark run SCENARIO [--trace FAMILY=FILE …] [--output DIR]``.

Three steps, each on the files of the one before: `run` measures, `summarize` computes, `report`
draws. `run` does all three. An interrupted `run` goes on where it stopped.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from rich.console import Console

from benchmark import report as reports
from benchmark.document import write_pages
from benchmark.runner import parse_traces, run_scenario
from benchmark.scenario import SCENARIO_DIRECTORY, load_scenario, narrowed
from symphony_sglang.errors import SymphonyError

DEFAULT_OUTPUT = Path("benchmark/results/local")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmark", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure a scenario, then summarize and report it")
    run.add_argument("scenario", help="name in benchmark/scenarios, or a path to a TOML file")
    run.add_argument("--trace", action="append", default=[], metavar="FAMILY=FILE")
    run.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    run.add_argument("--repetitions", type=int, help="instead of the scenario's own")
    run.add_argument("--arms", help="only these, separated by commas; the first is the baseline")
    run.add_argument("--users", type=int, help="as many sessions, all at once")
    for name, text in (
        ("summarize", "compute the figures of measured runs"),
        ("report", "draw a summarized scenario"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("directory", type=Path)
    commands.add_parser("list", help="the scenarios that are here")
    document = commands.add_parser("document", help="write docs' tables from the kept results")
    document.add_argument("--check", action="store_true", help="only say which are out of date")
    return parser


def main() -> int:
    """Exit code 2 with one line where the input is wrong."""
    arguments = make_parser().parse_args()
    console = Console()
    # So that being ended stops the servers too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if arguments.command == "list":
            for path in sorted(SCENARIO_DIRECTORY.glob("*.toml")):
                scenario = load_scenario(path.stem)
                console.print(f"{path.stem}: {scenario.title}", highlight=False)
            return 0
        if arguments.command == "document":
            stale = write_pages(check=arguments.check)
            console.print(f"out of date: {', '.join(stale) or 'none'}", highlight=False)
            return 1 if stale and arguments.check else 0
        if arguments.command == "run":
            scenario = narrowed(
                load_scenario(arguments.scenario),
                arguments.repetitions,
                arguments.arms,
                arguments.users,
            )
            directory = arguments.output / scenario.name
            run_scenario(scenario, directory, parse_traces(arguments.trace), console)
        else:
            directory = arguments.directory
        if arguments.command in ("run", "summarize"):
            reports.summarize(directory)
        if arguments.command in ("run", "report"):
            console.print(reports.report(directory), markup=False, highlight=False)
    except (SymphonyError, ValueError, OSError) as error:
        print(f"benchmark: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("benchmark: interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
