"""``symphony top``: all workers at a glance, refreshed; plain lines when not on a terminal."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from symphony_sglang.client import LevelUse, Move, Residency, SymphonyClient, WorkerResidency
from symphony_sglang.errors import ConfigError, ServerUnavailableError
from symphony_sglang.terminal.options import add_server_options, amount, client_of, say

if TYPE_CHECKING:
    from rich.console import RenderableType

LEVELS = ("device", "host", "nvme")
OUTCOMES = ("used", "late", "wasted", "expired", "cancelled", "reclaimed", "failed")
BAR_CHARACTERS = 12
MOVES_SHOWN = 8
INTERVAL_SECONDS_MIN = 0.2


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "top",
        help="watch workers, levels, sessions, advisories and moves",
        description="Refreshes until Ctrl-C on a terminal. Elsewhere prints one line a level, once "
        "or --count times.",
    )
    add_server_options(parser)
    parser.add_argument(
        "--interval", type=float, default=1.0, metavar="SECONDS", help="default 1, at least 0.2"
    )
    parser.add_argument("--count", type=int, metavar="N", help="stop after so many looks")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    if not arguments.interval >= INTERVAL_SECONDS_MIN:
        raise ConfigError(
            f"--interval is {arguments.interval:g}; expected {INTERVAL_SECONDS_MIN} or more seconds"
        )
    with client_of(arguments) as client:
        if sys.stdout.isatty():
            return watch(client, arguments.interval, arguments.count)
        for look in range(arguments.count or 1):
            if look:
                time.sleep(arguments.interval)
            say("\n".join(plain_lines(client.residency())))
    return 0


def watch(client: SymphonyClient, interval_seconds: float, count: int | None) -> int:
    """The live view; the first look must succeed, a later failure is shown and tried again."""
    from rich.live import Live

    view = screen(client.residency(), client.url)
    looks = 1
    with Live(view, auto_refresh=False, screen=count is None) as live:
        live.refresh()
        while count is None or looks < count:
            time.sleep(interval_seconds)
            looks += 1
            try:
                live.update(screen(client.residency(), client.url), refresh=True)
            except ServerUnavailableError as error:
                live.update(f"{error}\ntrying again", refresh=True)
    return 0


def screen(residency: Residency, url: str) -> RenderableType:
    """The whole view."""
    from rich import box
    from rich.console import Group
    from rich.table import Table

    levels = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=url, title_justify="left")
    levels.add_column("worker", overflow="fold")
    for level in LEVELS:
        levels.add_column("NVMe" if level == "nvme" else level, no_wrap=True)
    for name in ("protected", "sessions", "live"):
        levels.add_column(name, justify="right", no_wrap=True)
    names = names_of(residency.workers, url)
    for worker in residency.workers:
        levels.add_row(
            label_of(worker, names),
            *(level_cell(worker.levels.get(level)) for level in LEVELS),
            amount(protected_tokens(worker)),
            amount(worker.advisories.get("sessions", 0)),
            amount(worker.advisories.get("live", 0)),
        )
    outcomes = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title="advisories", title_justify="left")
    counts = outcome_counts(residency.workers)
    for name in OUTCOMES:
        outcomes.add_column(name, justify="right", no_wrap=True)
    outcomes.add_row(*(amount(counts.get(name, 0)) for name in OUTCOMES))
    parts: list[RenderableType] = [levels, outcomes]
    if residency.moves:
        parts.append(moves_table(residency.moves, names))
    return Group(*parts)


def moves_table(moves: list[Move], names: dict[str, str]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title="moves", title_justify="left")
    for name in ("session", "from", "to", "state"):
        table.add_column(name, overflow="fold")
    table.add_column("tokens", justify="right")
    for move in reversed(moves[-MOVES_SHOWN:]):
        way = [names.get(name, name) for name in (move.source, move.destination)]
        table.add_row(move.session_id or "", *way, move.state, amount(move.tokens))
    return table


def names_of(workers: list[WorkerResidency], url: str) -> dict[str, str]:
    """What each worker is called, by its id: its address, where that is its own."""
    urls = [worker.url or url for worker in workers]
    return {
        worker.worker: worker.worker
        if worker.worker and urls.count(its_url) > 1
        else its_url.removeprefix("http://").removeprefix("https://")
        for worker, its_url in zip(workers, urls, strict=True)
    }


def label_of(worker: WorkerResidency, names: dict[str, str]) -> str:
    name = names[worker.worker]
    return f"{name} ({worker.state})" if worker.state else name


def level_cell(level: LevelUse | None) -> str:
    if level is None:
        return "off"
    filled = round(BAR_CHARACTERS * min(1.0, level.used_share))
    return f"{'█' * filled}{'░' * (BAR_CHARACTERS - filled)} {100 * level.used_share:3.0f} %"


def protected_tokens(worker: WorkerResidency) -> int:
    return sum(level.protected_tokens for level in worker.levels.values() if level is not None)


def outcome_counts(workers: Iterable[WorkerResidency]) -> dict[str, int]:
    """Advisories by how they ended, over all workers."""
    counts: dict[str, int] = {}
    for worker in workers:
        for name, count in worker.advisories.get("outcomes", {}).items():
            counts[name] = counts.get(name, 0) + count
    return counts


def plain_lines(residency: Residency) -> list[str]:
    """One line a level and one for the advisories, for logs and scripts."""
    lines = []
    names = names_of(residency.workers, "")
    for worker in residency.workers:
        name = label_of(worker, names)
        for level in LEVELS:
            found = worker.levels.get(level)
            if found is None:
                lines.append(f"{name} {level} off")
            else:
                lines.append(
                    f"{name} {level} used {found.used_tokens} of {found.total_tokens} tokens, "
                    f"protected {found.protected_tokens}"
                )
        sessions = worker.advisories.get("sessions", 0)
        lines.append(
            f"{name} sessions {sessions} live advisories {worker.advisories.get('live', 0)}"
        )
    counts = outcome_counts(residency.workers)
    lines.append("advisories " + " ".join(f"{name} {counts.get(name, 0)}" for name in OUTCOMES))
    return lines + [
        f"move {move.session_id} {names.get(move.source, move.source)} -> "
        f"{names.get(move.destination, move.destination)} {move.state} {move.tokens} tokens"
        for move in residency.moves[-MOVES_SHOWN:]
    ]
