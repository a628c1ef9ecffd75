"""``symphony simulate``: run a scenario in virtual time and print, or write, its figures."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_sglang.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "simulate",
        help="simulate workers, router and users in virtual time",
        description="Runs the product's own routing, promotion and location code over a model of "
        "workers, links and disks. Deterministic by seed. Its figures are simulated.",
    )
    parser.add_argument("scenario", help="the name of a packaged scenario, or a TOML file")
    parser.add_argument("--output", metavar="FILE", help="write one JSON line a run")
    parser.add_argument("--arm", action="append", metavar="NAME", help="only this arm; repeatable")
    parser.add_argument("--users", type=int, metavar="N", help="instead of the scenario's counts")
    parser.add_argument("--seconds", type=float, metavar="S", help="of virtual time")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0; every run checks its own conservation.

    Raises:
        ConfigError: the scenario, or a flag, is wrong.
    """
    import msgspec
    from rich.console import Console
    from rich.progress import Progress

    from symphony_sglang.sim.cluster import Cluster
    from symphony_sglang.sim.pace import cpu_seconds, few_collections, times_real_time
    from symphony_sglang.sim.results import figures
    from symphony_sglang.sim.scenario import check_scenario, load_scenario

    scenario = load_scenario(arguments.scenario)
    if arguments.users is not None:
        scenario = msgspec.structs.replace(scenario, user_counts=(arguments.users,))
    if arguments.seconds is not None:
        scenario = msgspec.structs.replace(scenario, seconds=arguments.seconds)
    check_scenario(scenario, Path(arguments.scenario))
    runs = [rules for rules in scenario.runs() if not arguments.arm or rules.name in arguments.arm]
    if not runs:
        names = ", ".join(arm.name for arm in scenario.arm)
        raise ConfigError(f"--arm {arguments.arm}: expected of {names}")
    console = Console()
    rows: list[dict[str, Any]] = []
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task(scenario.name, total=len(runs))
        for rules in runs:
            progress.update(bar, description=f"{rules.name}, {rules.users.users} users")
            cluster = Cluster(rules)
            with few_collections():
                started = cpu_seconds()
                cluster.run()
                spent = cpu_seconds() - started
            cluster.check()
            row = figures(cluster, scenario.warm_seconds)
            row["speed"] = times_real_time(cluster.loop.now_seconds, spent)
            rows.append(row)
            progress.advance(bar)
    if arguments.output:
        Path(arguments.output).write_text("".join(json.dumps(row) + "\n" for row in rows))
    console.print(table_of(scenario.title, rows))
    return 0


def table_of(title: str, rows: list[dict[str, Any]]) -> Table:
    """One line a run; times in ms."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"{title} (simulated)", box=box.SIMPLE)
    for name in ("arm", "users"):
        table.add_column(name)
    for name in (
        "TTFT mean", "P90", "TPOT mean", "req/s", "device", "host", "nvme", "computed",
        "max/median", "moves", "x real time",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for row in rows:
        shares = row["token_share"]
        table.add_row(
            row["arm"],
            str(row["users"]),
            f"{1e3 * row['ttft_seconds']['mean']:.0f}",
            f"{1e3 * row['ttft_seconds']['p90']:.0f}",
            f"{1e3 * row['tpot_seconds']['mean']:.1f}",
            f"{row['requests_per_second']:.2f}",
            *(f"{100 * shares[source]:.0f}%" for source in ("device", "host", "nvme", "computed")),
            f"{row['load_max_over_median']:.2f}",
            str(row["moves"] + row["pulls"]),
            f"{row['speed']:.0f}",
        )
    return table
