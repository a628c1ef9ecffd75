"""The NVMe page store beside fio and SGLang's file backend, on one disk in one run.

    python -m benchmark.store [--dir DIR] [--rounds N] [--output DIR]

All arms take turns within every round, so that a slow moment of a shared disk hits all of them.
Ratios are medians over rounds of the ratio within a round; the spread is lowest and highest.
Reads are cold: the store and fio bypass the page cache, the file backend's is dropped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.environment import describe_environment
from benchmark.store_arms import (
    BATCH,
    Arm,
    FileBackendArm,
    FioArm,
    PageMemory,
    PlainLoopArm,
    Sample,
    StoreArm,
)
from symphony_sglang.store import SyncPolicy

PAGE_BYTES = {"100 KB": 102_400, "300 KB": 307_200, "1 MB": 1 << 20, "4 MB": 4 << 20}
ROUND_BYTES = 512 << 20
# Share of the device's own rate, and multiple of the file backend, that the store must reach.
GOALS = {"read": (0.9, 3.0), "write": (0.85, 3.0)}
CPU_GOAL = 0.2
INDEX_GOALS = {
    "exists_128_microseconds_p50": 50.0,
    "resident_bytes_per_page": 200.0,
    "open_seconds": 1.0,
}
MAIN_ARM = "store, interval"

console = Console()
# arm -> direction -> one sample a round
Samples = dict[str, dict[str, list[Sample]]]


def measure_size(folder: Path, page_bytes: int, rounds: int, tick: Any) -> Samples:
    memory = PageMemory(page_bytes)
    batches = max(2, ROUND_BYTES // (BATCH * page_bytes))
    arms: list[Arm] = [
        FioArm(folder, page_bytes, batches)
        if shutil.which("fio")
        else PlainLoopArm(folder, memory, batches),
        StoreArm(folder / "interval", memory, batches, SyncPolicy.INTERVAL, scattered=False),
        StoreArm(folder / "batch", memory, batches, SyncPolicy.BATCH, scattered=False),
        StoreArm(folder / "scattered", memory, batches, SyncPolicy.INTERVAL, scattered=True),
        FileBackendArm(folder / "files", memory, batches),
    ]
    samples: Samples = {arm.name: {"write": [], "read": []} for arm in arms}
    try:
        for number in range(rounds + 1):
            for arm in arms[number % len(arms) :] + arms[: number % len(arms)]:
                for direction, sample in arm.run(number).items():
                    if number > 0:  # round 0 warms up: files are laid out, memory is touched
                        samples[arm.name][direction].append(sample)
                tick()
    finally:
        for arm in arms:
            arm.close()
        for path in folder.iterdir():
            shutil.rmtree(path, ignore_errors=True)
    return samples


def spread(values: list[float], digits: int = 2) -> str:
    middle = statistics.median(values)
    return f"{middle:.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def ratios(samples: Samples, arm: str, base: str, direction: str) -> list[float]:
    pairs = zip(samples[arm][direction], samples[base][direction], strict=True)
    return [a.gigabytes_per_second / b.gigabytes_per_second for a, b in pairs]


def size_table(title: str, samples: Samples) -> Table:
    device, files = next(iter(samples)), FileBackendArm.name
    table = Table(title=f"Pages of {title}, batches of {BATCH}: median (lowest-highest)")
    for column in ("arm", "direction", "GB/s", f"x {device}", "x file backend", "CPU s/GB"):
        table.add_column(column, justify="left" if column in ("arm", "direction") else "right")
    for direction in ("read", "write"):
        for arm, by_direction in samples.items():
            rates = [sample.gigabytes_per_second for sample in by_direction[direction]]
            cpus = [sample.cpu_seconds_per_gigabyte for sample in by_direction[direction]]
            table.add_row(
                arm,
                direction,
                spread(rates),
                spread(ratios(samples, arm, device, direction)),
                spread(ratios(samples, arm, files, direction), 1),
                spread(cpus),
            )
        table.add_section()
    return table


def judge(title: str, samples: Samples) -> list[tuple[str, float, str, bool]]:
    """(what, value, goal, reached) for each promise of this page size."""
    device = next(iter(samples))
    rows = []
    for direction, (device_goal, file_goal) in GOALS.items():
        for base, goal in ((device, device_goal), (FileBackendArm.name, file_goal)):
            value = statistics.median(ratios(samples, MAIN_ARM, base, direction))
            name = f"{title} {direction} / {base}"
            rows.append((name, value, f">= {goal}", value >= goal))
        cpus = [s.cpu_seconds_per_gigabyte for s in samples[MAIN_ARM][direction]]
        cpu = statistics.median(cpus)
        rows.append((f"{title} {direction} CPU s/GB", cpu, f"<= {CPU_GOAL}", cpu <= CPU_GOAL))
    return rows


def measure_index(folder: Path, pages: int, rounds: int) -> list[dict[str, float]]:
    command = [sys.executable, "-m", "benchmark.store_index", str(folder), "--pages", str(pages)]
    subprocess.run([*command, "--prepare"], check=True)
    results = []
    for _ in range(rounds):
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        results.append(json.loads(done.stdout))
    shutil.rmtree(folder)
    return results


def plot(results: dict[str, Samples], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True)
    for axis, direction in zip(axes, ("read", "write"), strict=True):
        for arm in next(iter(results.values())):
            rates = [
                [sample.gigabytes_per_second for sample in samples[arm][direction]]
                for samples in results.values()
            ]
            middle = [statistics.median(values) for values in rates]
            low = [m - min(v) for m, v in zip(middle, rates, strict=True)]
            high = [max(v) - m for m, v in zip(middle, rates, strict=True)]
            axis.errorbar(list(results), middle, yerr=[low, high], marker="o", capsize=3, label=arm)
        axis.set_title(f"{direction}, batches of {BATCH}")
        axis.set_xlabel("page size")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("GB/s, median and range of rounds")
    axes[0].set_ylim(bottom=0)
    axes[1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pages", type=int, default=1_000_000, help="of the index measurement")
    parser.add_argument("--sizes", nargs="*", default=list(PAGE_BYTES), choices=list(PAGE_BYTES))
    parser.add_argument("--output", type=Path, default=Path("benchmark/results/local"))
    options = parser.parse_args()
    if not shutil.which("fio"):
        console.print("fio is not installed: a plain loop of O_DIRECT calls stands in for it")
    results: dict[str, Samples] = {}
    index: list[dict[str, float]] = []
    with (
        tempfile.TemporaryDirectory(prefix="store-bench-", dir=options.dir) as folder,
        Progress(console=console, transient=True) as progress,
    ):
        task = progress.add_task("arms", total=len(options.sizes) * (options.rounds + 1) * 5)
        if options.pages:
            index = measure_index(Path(folder) / "index", options.pages, 3)
        for title in options.sizes:
            results[title] = measure_size(
                Path(folder), PAGE_BYTES[title], options.rounds, lambda: progress.advance(task)
            )
    verdicts = []
    for title, samples in results.items():
        console.print(size_table(title, samples))
        verdicts += judge(title, samples)
    for name, goal in INDEX_GOALS.items() if index else ():
        value = statistics.median(result[name] for result in index)
        limit = goal * (options.pages / 1e6 if name == "open_seconds" else 1.0)
        verdicts.append(
            (f"index of {options.pages:,} pages: {name}", value, f"<= {limit:g}", value <= limit)
        )
    summary = Table("promise", "measured", "goal", "reached")
    for name, value, text, reached in verdicts:
        summary.add_row(name, f"{value:.2f}", text, "yes" if reached else "NO")
    console.print(summary)
    options.output.mkdir(parents=True, exist_ok=True)
    plain = {
        title: {
            arm: {side: [dataclasses.asdict(s) for s in rows] for side, rows in by_side.items()}
            for arm, by_side in samples.items()
        }
        for title, samples in results.items()
    }
    report = {
        "environment": describe_environment(),
        "rounds": options.rounds,
        "samples": plain,
        "index": index,
        "verdicts": verdicts,
    }
    (options.output / "store.json").write_text(json.dumps(report, indent=1))
    if results:
        plot(results, options.output / "store.png")
    console.print(f"written to {options.output / 'store.json'} and store.png")
    return 0 if all(reached for *_, reached in verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
