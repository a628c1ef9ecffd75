"""What an advisory is worth to one user: TTFT of a returning session by how its KV was prepared.

    python -m benchmark.advise [--rounds N] [--output DIR]

Two servers run side by side, SGLang's own hierarchical cache with its file backend, and ours. In
each round every server gets the same fresh prompts (recompute) and the same again (device hit).
Then device and host levels are emptied, so that the prefix is only on disk, and the session returns
once without a hint (reactive) and, on ours, once for every lead time with one. Each request comes
after the same quiet second, hint or not. Ratios are of medians; the spread is the quartiles.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.environment import describe_environment
from benchmark.serve import Sample, prompt, reached, send, spread
from benchmark.servers import Levels, server
from symphony_sglang.workload.tiny_model import make_tiny_model
from symphony_sglang.workload.worker_process import WorkerProcess

PROMPT_TOKENS = 3000
VOCAB = 10_240
LEVELS = Levels(device_tokens=16_384, host_gb=1.0)
LEAD_SECONDS = (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0)
QUIET_SECONDS = 1.0
FLUSH_SECONDS_MAX = 30.0
GOALS = {
    "advised at 1 s / device hit": ("<=", 1.03),
    "stock HiCache / advised at 1 s": (">=", 2.5),
    "stock HiCache / ours without advisories": (">=", 0.98),
}

console = Console()


def ask(url: str, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
    request = urllib.request.Request(
        url + path,
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
        method=method,
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
            status = int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code, None
    try:
        return status, json.loads(content)
    except ValueError:
        return status, None


def empty_fast_levels(url: str) -> None:
    """Flush device and host; SGLang refuses while writes are under way, so ask until it agrees."""
    deadline = time.monotonic() + FLUSH_SECONDS_MAX  # noqa: TID251
    while ask(url, "/flush_cache")[0] != 200:
        if time.monotonic() > deadline:  # noqa: TID251
            raise SystemExit(f"{url} did not empty its cache in {FLUSH_SECONDS_MAX:g} s")
        time.sleep(0.1)


def advise(url: str, ids: list[int], lead_seconds: float) -> None:
    """A hint by tokens, `lead_seconds` before the request; then the wait."""
    status, answer = ask(url, "/symphony/advise", {"input_ids": ids, "expected_in_s": lead_seconds})
    if status != 202 or answer["receipts"][0]["status"] not in ("accepted", "clipped"):
        raise SystemExit(f"the advisory was answered {status}: {answer}")
    time.sleep(lead_seconds)


def one_round(
    workers: dict[str, WorkerProcess], ids: list[int], order: list[float], step: Any
) -> list[Sample]:
    """Every arm once, on fresh tokens."""
    samples = []
    for name, worker in workers.items():
        url = worker.url
        for arm in ("recompute", "device"):
            time.sleep(QUIET_SECONDS)
            samples.append(send(url, ids, f"{name} {arm}"))
        # Write-through runs behind the answers: let it reach the disk.
        time.sleep(QUIET_SECONDS)
        empty_fast_levels(url)
        time.sleep(QUIET_SECONDS)
        samples.append(send(url, ids, f"{name} storage"))
        step()
    url = workers["symphony"].url
    for lead_seconds in order:
        empty_fast_levels(url)
        time.sleep(QUIET_SECONDS)
        advise(url, ids, lead_seconds)
        samples.append(send(url, ids, f"symphony advised {lead_seconds:g}"))
        step()
    return samples


def found_where_expected(sample: Sample) -> bool:
    """Whether most of the prefix came from where the arm says."""
    _, level, *lead = sample.arm.split()
    whole = sample.prompt_tokens - 64
    if level == "recompute":
        return sum(sample.cached.values()) == 0
    if level == "advised":
        # A lead of zero cannot bring it up; it must not be slower than no hint.
        return float(lead[0]) < 0.5 or sample.cached["device"] >= whole
    return sample.cached[level] >= whole


def summarize(samples: list[Sample]) -> dict[str, Any]:
    arms: dict[str, Any] = {}
    for arm in dict.fromkeys(sample.arm for sample in samples):
        own = [sample for sample in samples if sample.arm == arm]
        good = [sample.ttft_seconds for sample in own if found_where_expected(sample)]
        arms[arm] = {
            **(spread(good) if good else {"median": float("nan"), "samples": 0}),
            "discarded": len(own) - len(good),
            "device_tokens": sum(s.cached["device"] for s in own) // len(own),
            "host_tokens": sum(s.cached["host"] for s in own) // len(own),
            "storage_tokens": sum(s.cached["storage"] for s in own) // len(own),
        }
    return arms


def ratios_of(arms: dict[str, Any]) -> dict[str, float]:
    def ratio(above: str, below: str) -> float:
        return round(float(arms[above]["median"] / arms[below]["median"]), 3)

    return {
        "recompute / advised at 1 s": ratio("symphony recompute", "symphony advised 1"),
        "stock HiCache / advised at 1 s": ratio("hicache storage", "symphony advised 1"),
        "stock HiCache / ours without advisories": ratio("hicache storage", "symphony storage"),
        "advised at 1 s / device hit": ratio("symphony advised 1", "symphony device"),
        "advised at 0 s / no advisory": ratio("symphony advised 0", "symphony storage"),
    }


def run(rounds: int, directory: Path) -> dict[str, Any]:
    model = Path(tempfile.gettempdir()) / "symphony-bench-91m"
    make_tiny_model(model, layers=12, hidden=768, vocab=VOCAB, seed=0)
    scratch = Path(tempfile.mkdtemp(prefix="symphony-bench-advise-"))
    generator = random.Random(20260102)
    workers = {
        name: server(name, model, LEVELS, scratch / name) for name in ("hicache", "symphony")
    }
    samples: list[Sample] = []
    try:
        for worker in workers.values():
            worker.start()
            worker.wait_ready()
        with Progress(console=console) as progress:
            bar = progress.add_task("rounds", total=(rounds + 1) * (2 + len(LEAD_SECONDS)))
            for number in range(rounds + 1):
                order = list(LEAD_SECONDS)
                generator.shuffle(order)
                ids = prompt(generator, PROMPT_TOKENS)
                # Whoever goes first meets a colder disk and warmer caches: take turns.
                sides = list(workers.items())[:: -1 if number % 2 else 1]
                got = one_round(dict(sides), ids, order, lambda: progress.advance(bar))
                # The first round warms the servers up.
                samples += got if number else []
    finally:
        for worker in workers.values():
            worker.stop()
        shutil.rmtree(scratch, ignore_errors=True)
    arms = summarize(samples)
    ratios = ratios_of(arms)
    summary = {
        "environment": describe_environment(),
        "prompt_tokens": PROMPT_TOKENS,
        "rounds": rounds,
        "arms": arms,
        "ratios": ratios,
        "goals": {
            name: {"goal": f"{sign} {goal:g}", "reached": reached(ratios[name], sign, goal)}
            for name, (sign, goal) in GOALS.items()
        },
    }
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "advise.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, directory / "advise.png")
    return summary


def plot(summary: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    arms = summary["arms"]
    figure, axes = pyplot.subplots(figsize=(8, 4.4), layout="constrained")
    leads = [arms[f"symphony advised {lead:g}"] for lead in LEAD_SECONDS]
    axes.errorbar(
        LEAD_SECONDS,
        [1e3 * arm["median"] for arm in leads],
        yerr=[
            [1e3 * max(0.0, arm["median"] - arm.get("p25", arm["median"])) for arm in leads],
            [1e3 * max(0.0, arm.get("p75", arm["median"]) - arm["median"]) for arm in leads],
        ],
        marker="o",
        color="#2f9e6e",
        label="advised",
    )
    lines = (
        ("hicache storage", "stock HiCache, file backend", "#9aa0a6"),
        ("symphony storage", "ours, no advisory", "#3b7dd8"),
        ("symphony device", "device hit", "#222222"),
    )
    for arm, label, color in lines:
        axes.axhline(1e3 * arms[arm]["median"], color=color, linestyle="--", label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("lead time of the advisory, seconds")
    axes.set_ylabel("TTFT, ms (median, quartiles)")
    axes.set_title(
        f"A returning session of {summary['prompt_tokens']} tokens, its KV only on disk "
        f"(recompute: {1e3 * arms['symphony recompute']['median']:.0f} ms)"
    )
    axes.legend()
    figure.savefig(path, dpi=130)


def print_summary(summary: dict[str, Any]) -> None:
    table = Table(title=f"TTFT of {summary['prompt_tokens']} tokens, ms")
    for column in ("arm", "median", "p25", "p75", "samples", "discarded", "found dev/host/disk"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    for arm, figures in summary["arms"].items():
        cells = [f"{1e3 * figures.get(key, 0):.1f}" for key in ("median", "p25", "p75")]
        found = "/".join(str(figures[f"{level}_tokens"]) for level in ("device", "host", "storage"))
        table.add_row(arm, *cells, str(figures["samples"]), str(figures["discarded"]), found)
    console.print(table)
    for name, value in summary["ratios"].items():
        goal = summary["goals"].get(name)
        verdict = "" if goal is None else f" (goal {goal['goal']}: {goal['reached']})"
        console.print(f"{name}: {value:.2f}{verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path("benchmark/results/local"))
    arguments = parser.parse_args()
    if arguments.rounds < 3:
        parser.error(f"--rounds is {arguments.rounds}; expected at least 3")
    print_summary(run(arguments.rounds, arguments.output))


if __name__ == "__main__":
    main()
