"""``symphony store stat|verify|compact DIR``."""

from __future__ import annotations

import argparse
import datetime
import os
import sqlite3
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import Progress as ProgressBar
from rich.table import Table

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import StoreError, SymphonyError
from symphony_sglang.store.database import INDEX_FILE, Database
from symphony_sglang.store.maintenance import Progress
from symphony_sglang.store.namespace import (
    NamespaceHeader,
    namespace_folders,
    read_namespace_header,
)
from symphony_sglang.store.opening import LOCK_FILE
from symphony_sglang.store.settings import StoreSettings
from symphony_sglang.store.store import PageStore

# Upkeep never gives pages up for the sake of others on the disk.
UPKEEP = StoreSettings(free_floor_share=0.0)


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``store`` to the commands of ``symphony``; each sets `run`, which returns the status."""
    parser = subparsers.add_parser("store", help="look into a page store, verify or compact it")
    actions = parser.add_subparsers(dest="store_action", required=True)
    for name, run, text in (
        ("stat", run_stat, "counts, sizes and ages of every namespace; works beside a worker"),
        ("verify", run_verify, "read every page and check it; pages that fail are dropped"),
        ("compact", run_compact, "move pages together and give free segments back"),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("directory", type=Path, metavar="DIR")
        action.set_defaults(run=run)


def headers_in(directory: Path) -> list[tuple[Path, NamespaceHeader]]:
    """Raises StoreError where `directory` holds no page store."""
    found = []
    for folder in namespace_folders(directory):
        header = read_namespace_header(folder)
        if header is not None:
            found.append((folder, header))
    if not found:
        raise StoreError(f"{directory}: no page store here")
    return found


def run_stat(
    options: argparse.Namespace, console: Console | None = None, clock: Clock | None = None
) -> int:
    """Print what the index of each namespace says, without its lock."""
    console = console or Console()
    now = (clock or SystemClock()).unix()
    try:
        for folder, header in headers_in(options.directory):
            console.print(stat_table(folder, header, now))
    except SymphonyError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return 0


def stat_table(folder: Path, header: NamespaceHeader, now: float) -> Table:
    segments = sorted(folder.glob("segment-*.data"))
    try:
        database = Database(folder, None)
        try:
            loaded, days = database.load_leaves(), database.daily()
            capacity = database.meta("capacity_bytes", 0)
        finally:
            database.close()
    except sqlite3.Error as error:
        raise StoreError(f"{folder / INDEX_FILE}: cannot be read: {error}") from error
    used = loaded.entries[loaded.entries["used"] == 1]
    table = Table(title=header.namespace.describe(), title_justify="left", show_header=False)
    table.add_row("folder", str(folder))
    table.add_row("open in process", lock_holder(folder) or "none")
    table.add_row("pages", f"{len(used):,}")
    table.add_row("payload", size_text(int(used["length"].sum())))
    table.add_row("page slot", size_text(header.slot_bytes))
    table.add_row("segments", f"{len(segments)} of {size_text(header.segment_bytes)}")
    table.add_row("capacity", size_text(capacity))
    if len(used):
        ages = now - used["accessed"].astype(np.float64)
        quantiles = np.quantile(ages, [0.0, 0.5, 1.0])
        table.add_row("since last use", ", ".join(age_text(age) for age in quantiles))
    if loaded.damaged:
        table.add_row("damaged index rows", f"{loaded.damaged:,}")
    for day, payload, disk in days[:7]:
        ratio = f", {disk / payload:.3f} times the payload" if payload else ""
        table.add_row(f"written {day}", f"{size_text(disk)}{ratio}")
    return table


def lock_holder(folder: Path) -> str | None:
    """The process that has the namespace open, as its lock file says, if it still runs."""
    try:
        text = (folder / LOCK_FILE).read_text(encoding="ascii").strip()
        os.kill(int(text), 0)
    except (OSError, ValueError):
        return None
    return text


def size_text(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


def age_text(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(max(0.0, seconds))))


def shown_on(bar: ProgressBar, text: str) -> Progress:
    task = bar.add_task(text)

    def show(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total)

    return show


def run_verify(options: argparse.Namespace, console: Console | None = None) -> int:
    """Check every page; status 1 if any was wrong or a namespace could not be opened."""
    console = console or Console()
    status = 0
    try:
        for _, header in headers_in(options.directory):
            with (
                PageStore(options.directory, header.namespace, UPKEEP) as store,
                ProgressBar(console=console) as bar,
            ):
                report = store.verify(shown_on(bar, header.namespace.describe()))
            console.print(
                f"{report.pages:,} pages, {size_text(report.bytes)}: {report.corrupt:,} wrong and "
                f"dropped, {report.failed:,} unreadable, {store.opened.lost:,} index entries lost"
            )
            status |= int(report.corrupt + report.failed > 0)
    except SymphonyError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return status


def run_compact(options: argparse.Namespace, console: Console | None = None) -> int:
    console = console or Console()
    try:
        for _, header in headers_in(options.directory):
            with (
                PageStore(options.directory, header.namespace, UPKEEP) as store,
                ProgressBar(console=console) as bar,
            ):
                report = store.compact(shown_on(bar, header.namespace.describe()))
            console.print(
                f"{report.segments_removed} segments removed, {size_text(report.bytes_freed)} "
                f"given back, {report.pages_moved:,} pages moved"
            )
    except SymphonyError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    return 0
