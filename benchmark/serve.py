"""TTFT by where the prefix was found: recompute, host level, device level; and its growth.

    python -m benchmark.serve [--rounds N] [--output DIR]

One run measures everything side by side on one real server: each round sends a fresh prompt
(recompute), sends it again (device hit), and later returns to it after the device level has
overflowed (host hit). A second server, stock SGLang with its own ``torch_native`` attention, takes
the same prompts in turn. Ratios are of medians; the spread is the quartiles of the single samples.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.environment import describe_environment
from symphony_sglang.workload.tiny_model import make_tiny_model
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

PROMPT_TOKENS = 3000
GROWTH_TOKENS = (1000, 2000, 3000, 4000, 5000, 6000, 7000)
# Three prompts fit, so a prompt is on the host level after three others.
DEVICE_TOKENS = 11_000
VOCAB = 10_240
# What issue and README promise; the report says of each whether this run reached it.
GOALS = {
    "recompute / device hit": (">=", 12.0),
    "host hit / device hit": ("<=", 1.4),
    "device hit 7k / 1k": ("<=", 7.0),
}

console = Console()


@dataclass(frozen=True, slots=True)
class Sample:
    """One request: where its prefix came from, and seconds to the first streamed token."""

    arm: str
    prompt_tokens: int
    cached: dict[str, int]
    ttft_seconds: float
    first_token: int


def send(url: str, input_ids: list[int], arm: str) -> Sample:
    """One streamed greedy request; the clock stops at the first event that carries a token."""
    body = json.dumps(
        {
            "input_ids": input_ids,
            "stream": True,
            "sampling_params": {"max_new_tokens": 2, "temperature": 0, "ignore_eos": True},
        }
    ).encode()
    request = urllib.request.Request(f"{url}/generate", body, {"Content-Type": "application/json"})
    start = time.perf_counter()  # noqa: TID251 - a benchmark measures real time
    with urllib.request.urlopen(request, timeout=300) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                ttft_seconds = time.perf_counter() - start  # noqa: TID251
                event = json.loads(line[6:])
                break
        answer.read()
    meta = event["meta_info"]
    details = meta.get("cached_tokens_details") or {}
    cached = {level: int(details.get(level) or 0) for level in ("device", "host", "storage")}
    return Sample(arm, meta["prompt_tokens"], cached, ttft_seconds, event["output_ids"][0])


def prompt(generator: random.Random, length: int) -> list[int]:
    return [generator.randrange(100, VOCAB) for _ in range(length)]


def measure_levels(url: str, rounds: int, generator: random.Random, progress: Any) -> list[Sample]:
    """Recompute, device and host hits of the same prompts, interleaved."""
    samples: list[Sample] = []
    prompts = [prompt(generator, PROMPT_TOKENS) for _ in range(rounds)]
    bar = progress.add_task("levels", total=rounds * 3)
    for ids in prompts:
        samples.append(send(url, ids, "recompute"))
        samples.append(send(url, ids, "device"))
        progress.advance(bar, 2)
    # The oldest prompt left the device level first; returning in order never meets one still there.
    for ids in prompts[: max(1, rounds - 3)]:
        samples.append(send(url, ids, "host"))
        progress.advance(bar)
    progress.update(bar, completed=rounds * 3)
    return samples


def measure_growth(url: str, rounds: int, generator: random.Random, progress: Any) -> list[Sample]:
    """Device hits of growing prefixes, one of each length a round."""
    samples: list[Sample] = []
    bar = progress.add_task("growth", total=rounds * len(GROWTH_TOKENS))
    for _ in range(rounds):
        for length in GROWTH_TOKENS:
            ids = prompt(generator, length)
            send(url, ids, "warm")
            samples.append(send(url, ids, f"device {length}"))
            progress.advance(bar)
    return samples


def spread(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return {
        "median": statistics.median(values),
        "p25": quartiles[0],
        "p75": quartiles[2],
        "samples": len(values),
    }


def expected_level(sample: Sample) -> bool:
    """Whether the prefix came from where the arm says; other samples would flatter the arm."""
    level = sample.arm.split()[0]
    if level == "recompute":
        return sum(sample.cached.values()) == 0
    return sample.cached[level] >= sample.prompt_tokens - 64


def summarize(samples: list[Sample]) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(sample.arm for sample in samples):
        own = [sample for sample in samples if sample.arm == arm]
        good = [sample.ttft_seconds for sample in own if expected_level(sample)]
        arms[arm] = {
            **(spread(good) if good else {"median": float("nan"), "samples": 0}),
            "discarded": len(own) - len(good),
        }
    return arms


def compare(ours: dict[str, Any], stock: dict[str, Any]) -> dict[str, float]:
    """Ratios of medians."""

    def ratio(above: Any, below: Any) -> float:
        return round(above["median"] / below["median"], 3)

    shortest, longest = GROWTH_TOKENS[0], GROWTH_TOKENS[-1]
    return {
        "recompute / device hit": ratio(ours["recompute"], ours["device"]),
        "host hit / device hit": ratio(ours["host"], ours["device"]),
        "device hit 7k / 1k": ratio(ours[f"device {longest}"], ours[f"device {shortest}"]),
        "stock device hit / ours": ratio(stock["device"], ours["device"]),
        "stock recompute / ours": ratio(stock["recompute"], ours["recompute"]),
    }


def start_worker(model: Path, *flags: str) -> WorkerProcess:
    worker = WorkerProcess(
        [
            "--model-path",
            str(model),
            "--port",
            str(free_port()),
            "--max-total-tokens",
            str(DEVICE_TOKENS),
            "--chunked-prefill-size",
            "8192",
            *flags,
        ]
    )
    worker.start()
    worker.wait_ready()
    return worker


def run(rounds: int, directory: Path) -> dict[str, Any]:
    model = Path(tempfile.gettempdir()) / "symphony-bench-91m"
    make_tiny_model(model, layers=12, hidden=768, vocab=VOCAB, seed=0)
    generator = random.Random(20260101)
    with Progress(console=console) as progress:
        ours = start_worker(model, "--symphony-host-gb", "3", "--symphony-nvme-gb", "0")
        try:
            send(ours.url, prompt(generator, PROMPT_TOKENS), "warm")
            samples = measure_levels(ours.url, rounds, generator, progress)
            samples += measure_growth(ours.url, max(3, rounds // 3), generator, progress)
        finally:
            ours.stop()
        stock = start_worker(
            model, "--symphony-off", "--attention-backend", "torch_native", "--page-size", "16",
            "--enable-cache-report",
        )  # fmt: skip
        try:
            send(stock.url, prompt(generator, PROMPT_TOKENS), "warm")
            stock_samples = measure_levels(stock.url, max(4, rounds // 3), generator, progress)
        finally:
            stock.stop()
    summary = {
        "environment": describe_environment(),
        "prompt_tokens": PROMPT_TOKENS,
        "ours": summarize(samples),
        "stock": summarize([s for s in stock_samples if s.arm != "host"]),
    }
    summary["ratios"] = compare(summary["ours"], summary["stock"])
    summary["goals"] = {
        name: {
            "goal": f"{sign} {value:g}",
            "reached": reached(summary["ratios"][name], sign, value),
        }
        for name, (sign, value) in GOALS.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "serve.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, directory / "serve.png")
    return summary


def reached(value: float, sign: str, goal: float) -> bool:
    return value >= goal if sign == ">=" else value <= goal


def plot(summary: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    bars = [
        ("stock\nrecompute", summary["stock"]["recompute"], "#9aa0a6"),
        ("recompute", summary["ours"]["recompute"], "#c2603c"),
        ("stock\ndevice hit", summary["stock"]["device"], "#9aa0a6"),
        ("host hit", summary["ours"]["host"], "#3b7dd8"),
        ("device hit", summary["ours"]["device"], "#2f9e6e"),
    ]
    for position, (_name, arm, color) in enumerate(bars):
        low, high = arm["median"] - arm["p25"], arm["p75"] - arm["median"]
        left.bar(position, arm["median"], color=color, yerr=[[max(low, 0)], [max(high, 0)]])
        left.annotate(
            f"{arm['median']:.3f}",
            (position, arm["p75"]),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
        )
    left.set_xticks(range(len(bars)), [name for name, _, _ in bars])
    left.set_ylabel("TTFT, seconds (median, quartiles)")
    left.set_title(f"Prompt of {summary['prompt_tokens']} tokens")
    growth = [summary["ours"][f"device {length}"] for length in GROWTH_TOKENS]
    right.errorbar(
        GROWTH_TOKENS,
        [arm["median"] for arm in growth],
        yerr=[
            [max(arm["median"] - arm["p25"], 0) for arm in growth],
            [max(arm["p75"] - arm["median"], 0) for arm in growth],
        ],
        marker="o",
        color="#2f9e6e",
    )
    right.set_ylim(bottom=0)
    right.set_xlabel("cached tokens")
    right.set_ylabel("TTFT of a device hit, seconds")
    right.set_title("Growth with the cached length")
    figure.savefig(path, dpi=130)


def print_summary(summary: dict[str, Any]) -> None:
    table = Table(title=f"TTFT of {summary['prompt_tokens']} tokens, seconds")
    for column in ("arm", "median", "p25", "p75", "samples", "discarded"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for side in ("ours", "stock"):
        for arm, figures in summary[side].items():
            cells = [f"{figures.get(key, 0):.4f}" for key in ("median", "p25", "p75")]
            counts = [str(figures["samples"]), str(figures["discarded"])]
            table.add_row(f"{side} {arm}", *cells, *counts)
    console.print(table)
    for name, value in summary["ratios"].items():
        goal = summary["goals"].get(name)
        verdict = "" if goal is None else f" (goal {goal['goal']}: {goal['reached']})"
        console.print(f"{name}: {value:.2f}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--output", type=Path, default=Path("benchmark/results/local"))
    arguments = parser.parse_args()
    if arguments.rounds < 5:
        parser.error(f"--rounds is {arguments.rounds}; expected at least 5")
    print_summary(run(arguments.rounds, arguments.output))


if __name__ == "__main__":
    main()
