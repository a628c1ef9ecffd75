"""From raw samples to a summary, and from a summary to a table and a plot.

Each step reads the files of the one before, so that a figure can be drawn again without measuring.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from benchmark.runner import read_run
from benchmark.scenario import Scenario
from benchmark.statistics import compare, run_figures, spread_of

SUMMARY_NAME = "summary.json"
COLORS = {
    "recompute": "#9aa0a6",
    "device": "#c2b280",
    "hicache": "#c2603c",
    "symphony": "#2f9e6e",
}


def summarize(directory: Path) -> dict[str, Any]:
    """Write and return ``summary.json`` of a scenario's runs.

    Raises:
        ValueError: there are no complete runs, or one of another version.
    """
    scenario = msgspec.json.decode((directory / "scenario.json").read_bytes(), type=Scenario)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    environments: list[dict[str, Any]] = []
    for path in sorted(directory.glob("*.jsonl")):
        header, records, end = read_run(path)
        if header.version != scenario.version:
            raise ValueError(f"{path} is of version {header.version}, not {scenario.version}")
        runs.setdefault(header.arm, {})[header.repetition] = run_figures(
            records,
            end,
            returning_only=scenario.returning_only,
            slo_ttft_seconds=scenario.slo_ttft_seconds,
        )
        if header.environment not in environments:
            environments.append(header.environment)
    if scenario.baseline not in runs:
        raise ValueError(f"{directory}: no complete run of the baseline {scenario.baseline!r}")
    order = [arm.name for arm in scenario.arm if arm.name in runs]
    summary = {
        "version": scenario.version,
        "scenario": scenario.name,
        "title": scenario.title,
        "baseline": scenario.baseline,
        "environments": environments,
        "runs": {arm: [runs[arm][n] for n in sorted(runs[arm])] for arm in order},
        "ratios": compare({arm: runs[arm] for arm in order}, scenario.baseline),
        "servers": {arm.name: arm.server for arm in scenario.arm},
    }
    (directory / SUMMARY_NAME).write_text(json.dumps(summary, indent=1) + "\n")
    return summary


def median_of(runs: list[dict[str, Any]], *path: str) -> dict[str, Any]:
    values = []
    for run in runs:
        value: Any = run
        for key in path:  # a run of an older version may lack it
            value = value.get(key) if isinstance(value, dict) else None
        values.append(value)
    return spread_of(values)


def cell(spread: dict[str, Any], scale: float = 1.0, digits: int = 0) -> str:
    """``median (low to high)``, or a dash where nothing was measured."""
    if spread["median"] is None:
        return "-"
    low, middle, high = (f"{scale * spread[k]:.{digits}f}" for k in ("low", "median", "high"))
    return middle if low == high else f"{middle} ({low} to {high})"


def markdown(summary: dict[str, Any]) -> str:
    """The scenario's table, median of the repetitions with the lowest and the highest."""
    lines = [
        f"### {summary['title']}",
        "",
        "| arm | TTFT mean, ms | P50 | P90 | requests/s | device / host / disk / computed, % "
        "| load max / median "
        f"| P90 vs {summary['baseline']} | requests/s vs {summary['baseline']} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in summary["runs"].items():
        hits = [median_of(runs, "hit_share", level) for level in ("device", "host", "storage")]
        shares = [cell(hit, 100).split(" ")[0] for hit in hits]
        shares.append(cell(median_of(runs, "computed_share"), 100).split(" ")[0])
        ratios = summary["ratios"][arm]
        flag = " (saturated)" if any(run["saturated"] for run in runs) else ""
        failed = sum(run["failed"] + run["unsent"] for run in runs)
        flag += f" ({failed} failed)" if failed else ""
        lines.append(
            f"| {arm}{flag} | {cell(median_of(runs, 'ttft_seconds', 'mean'), 1e3)} "
            f"| {cell(median_of(runs, 'ttft_seconds', 'p50'), 1e3)} "
            f"| {cell(median_of(runs, 'ttft_seconds', 'p90'), 1e3)} "
            f"| {cell(median_of(runs, 'requests_per_second'), 1, 2)} "
            f"| {' / '.join(shares)} "
            f"| {cell(median_of(runs, 'load_balance', 'requests'), 1, 2)} "
            f"| {cell(ratios['ttft_seconds.p90'], 1, 2)} "
            f"| {cell(ratios['requests_per_second'], 1, 2)} |"
        )
    count = max(len(runs) for runs in summary["runs"].values())
    commits = ", ".join(sorted({item["commit"] for item in summary["environments"]}))
    lines += ["", f"{count} repetitions, commit {commits}. Ratios above 1 are better.", ""]
    return "\n".join(lines)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Bars of TTFT P50 and P90 per arm, with the repetitions as dots."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    arms = list(summary["runs"])
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.25 * len(arms), 4.4), layout="constrained")
    for position, arm in enumerate(arms):
        runs = summary["runs"][arm]
        color = COLORS.get(summary["servers"].get(arm, ""), "#3b7dd8")
        for offset, key, shade in ((-0.2, "p50", 1.0), (0.2, "p90", 0.55)):
            values = [run["ttft_seconds"][key] for run in runs]
            values = [1e3 * value for value in values if value is not None]
            if not values:
                continue
            middle = sorted(values)[len(values) // 2]
            axes.bar(position + offset, middle, width=0.38, color=color, alpha=shade)
            axes.plot([position + offset] * len(values), values, "k.", markersize=4)
            axes.annotate(
                f"{key.upper()}\n{middle:.0f}",
                (position + offset, max(values)),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                fontsize=7,
            )
    axes.set_xticks(range(len(arms)), [arm.replace("-", "-\n", 1) for arm in arms], fontsize=8)
    axes.set_yscale("log")
    axes.set_ylabel("TTFT, ms (median of repetitions; dots: each)")
    axes.set_title(summary["title"], fontsize=10)
    axes.margins(y=0.15)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def report(directory: Path) -> str:
    """Draw a summarized scenario; returns its Markdown, also written beside the plot."""
    summary = json.loads((directory / SUMMARY_NAME).read_text())
    plot(summary, directory / "ttft.png")
    text = markdown(summary)
    (directory / "report.md").write_text(text)
    return text
