"""The figures of the reproduction, drawn from its summary; the paper's points are hollow stars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmark.reproduce_summary import Points

COLORS = {
    "recompute": "#8a8f98",
    "sticky": "#c2603c",
    "cache-aware": "#b59b3a",
    "paper": "#6a5acd",
    "unadvised": "#7fbf9f",
    "symphony": "#1f8f5f",
    "oracle": "#111111",
    "greedy": "#6a5acd",
}
NAMES = {
    "recompute": "recompute (vLLM)",
    "sticky": "sticky, host offload (InferCept)",
    "cache-aware": "cache-aware, three levels",
    "paper": "paper's policy",
    "symphony": "symphony (ours)",
    "oracle": "oracle leads",
    "greedy": "greedy, 60 % false",
}
# (users, TPOT ms) that the paper gives for Llama-3.1-8B: figure 11 and section 4.2.
PAPER_TPOT = {"recompute": [(64, 18.0)], "paper": [(256, 18.23), (512, 20.5)]}
PAPER_MISSING = {0.0: 21.3, 0.1: 24.4}
DPI = 110


def plot_all(summary: dict[str, Any], directory: Path) -> list[Path]:
    """Every figure whose rows are there."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "legend.frameon": False,
    }
    points = Points(summary["points"])
    drawn = [
        plot_users(points, model, directory / f"users-{model}.png")
        for model in ("8b", "13b")
        if points.curve("users", model, "recompute", "tpot_seconds.mean")[0]
    ]
    for name, draw in (
        ("burst", plot_burst),
        ("imbalance", plot_imbalance),
        ("hints", plot_hints),
        ("ablations", plot_ablations),
    ):
        if points.has(name):
            drawn.append(draw(points, directory / f"{name}.png"))
    return drawn


def save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)
    return path


def curves(axes: Any, points: Points, figure: str, model: str, path: str) -> None:
    """One line an arm, in milliseconds."""
    for arm, color in COLORS.items():
        users, values = points.curve(figure, model, arm, path)
        if users:
            style = "--" if arm == "oracle" else "-"
            width = 2.2 if arm == "symphony" else 1.4
            axes.plot(users, 1e3 * values, style, color=color, lw=width, marker="o", ms=3.5,
                      label=NAMES.get(arm, arm))  # fmt: skip
    axes.set_xlabel("users")
    axes.set_xscale("log", base=2)
    axes.set_xticks(users_of(points, figure, model), users_of(points, figure, model))
    axes.minorticks_off()
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def users_of(points: Points, figure: str, model: str) -> list[int]:
    return sorted(
        {p["users"] for p in points.points if (p["figure"], p["model"]) == (figure, model)}
    )


def plot_users(points: Points, model: str, path: Path) -> Path:
    """TPOT and TTFT against users."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 4.2), layout="constrained")
    curves(left, points, "users", model, "tpot_seconds.mean")
    curves(right, points, "users", model, "ttft_seconds.mean")
    if model == "8b":
        for arm, pairs in PAPER_TPOT.items():
            name = "vLLM" if arm == "recompute" else "SYMPHONY"
            left.plot(*zip(*pairs, strict=True), "*", mfc="none", mec=COLORS[arm], ms=13, mew=1.5,
                      label=f"reported: {name}")  # fmt: skip
    _, recompute = points.curve("users", model, "recompute", "tpot_seconds.mean")
    for factor, word in ((1.013, "+1.3 %"), (1.14, "+14 %")):
        level = 1e3 * recompute[0] * factor
        left.axhline(level, color="#8a8f98", lw=0.8, ls=":")
        left.annotate(word, (1.0, level), xycoords=("axes fraction", "data"), fontsize=7,
                      ha="right", va="bottom", color="#666666")  # fmt: skip
    left.set_title("TPOT, ms (mean)")
    right.set_title("TTFT, ms (mean)")
    left.yaxis.set_ticks([15, 20, 25, 30, 40, 50, 70, 100, 200])
    top = 1e3 * recompute.max() * 1.15
    left.set_ylim(13 if model == "8b" else 20, top)
    left.legend(fontsize=7.5, loc="upper left")
    shape = {"8b": "Llama-3.1-8B", "13b": "Llama-2-13B"}[model]
    figure.suptitle(f"8 x A100-80GB, {shape}, ShareGPT-like users (simulated)", fontsize=10)
    return save(figure, path)


def plot_burst(points: Points, path: Path) -> Path:
    """The same with BurstGPT-like pauses."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained")
    curves(left, points, "burst", "8b", "tpot_seconds.mean")
    curves(right, points, "burst", "8b", "ttft_seconds.p90")
    left.set_title("TPOT, ms (mean)")
    right.set_title("TTFT, ms (P90)")
    left.yaxis.set_ticks([15, 20, 30, 50, 100, 200])
    left.legend(fontsize=8)
    figure.suptitle("8 x A100-80GB, Llama-3.1-8B, BurstGPT-like pauses (simulated)", fontsize=10)
    return save(figure, path)


def plot_imbalance(points: Points, path: Path) -> Path:
    """Work of the busiest worker over the median worker's, under skewed users."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
    arms = ("sticky", "paper", "symphony")
    paper = {"sticky": 3.1, "paper": 1.0}
    for place, arm in enumerate(arms):
        value = points.at("imbalance", "8b", arm, "load_max_over_median") or 0.0
        axes.bar(place, value, 0.55, color=COLORS[arm])
        axes.annotate(f"{value:.2f}", (place, value), ha="center", va="bottom")
        if arm in paper:
            axes.plot(place, paper[arm], "*", mfc="none", mec="black", ms=14, mew=1.4,
                      label="reported" if arm == "sticky" else None)  # fmt: skip
    axes.axhline(1.0, color="#666666", lw=0.8, ls=":")
    axes.set_xticks(range(3), [NAMES[arm] for arm in arms], fontsize=8)
    axes.set_ylabel("requests, busiest / median worker")
    axes.set_ylim(0, 3.5)
    axes.legend()
    axes.set_title("Load imbalance, skewed users, 8 workers (simulated)", fontsize=10)
    return save(figure, path)


def plot_hints(points: Points, path: Path) -> Path:
    """TPOT with advisories missing; throughput with false ones added."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained")
    for axes, word, paths in (
        (left, "missing", ("tpot_seconds.mean", "ttft_seconds.mean")),
        (right, "false", ("requests_per_second", "ttft_seconds.mean")),
    ):
        shares, series = hint_series(points, word, paths)
        for values, name, style in zip(series, paths, ("-", "--"), strict=True):
            label = {"tpot_seconds.mean": "TPOT", "ttft_seconds.mean": "TTFT",
                     "requests_per_second": "requests/s"}[name]  # fmt: skip
            ratio = [value / values[0] for value in values]
            axes.plot(shares, ratio, style, marker="o", ms=4, color=COLORS["symphony"],
                      label=f"{label}, simulated")  # fmt: skip
        axes.set_xlabel(f"advisories {word}")
        axes.xaxis.set_major_formatter("{x:.0%}")
        axes.set_ylabel("relative to none")
    reported = [PAPER_MISSING[share] / PAPER_MISSING[0.0] for share in (0.0, 0.1)]
    left.plot([0.0, 0.1], reported, "*", mfc="none", mec="black", ms=14, label="TPOT, reported")
    right.plot([0.0, 0.6], [1.0, 0.979], "*", mfc="none", mec="black", ms=14,
               label="requests/s, reported")  # fmt: skip
    left.legend()
    right.legend()
    figure.suptitle("Unreliable advisories, 8B, 512 users (simulated)", fontsize=10)
    return save(figure, path)


def hint_series(
    points: Points, word: str, paths: tuple[str, ...]
) -> tuple[list[float], list[list[float]]]:
    """Shares in ascending order, and for each path its values there."""
    found = sorted(
        (float(p["variant"].split()[1].rstrip("%")) / 100, p)
        for p in points.points
        if p["figure"] == "hints" and p["variant"].startswith(word)
    )
    return [share for share, _ in found], [[p[path]["mean"] for _, p in found] for path in paths]


def plot_ablations(points: Points, path: Path) -> Path:
    """Throughput and latency of each ablation relative to the whole."""
    from matplotlib import pyplot

    words = ("no layer order", "no layer-wise loading", "no cooperation")
    panels = [(model, arm) for model in ("8b", "13b") for arm in ("symphony", "greedy")]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10.0, 3.9), layout="constrained")
    width = 0.8 / len(panels)
    for number, (model, arm) in enumerate(panels):
        offset = (number - (len(panels) - 1) / 2) * width
        for axes, name, better in (
            (left, "output_tokens_per_second", -1),
            (right, "latency_seconds.mean", 1),
        ):
            full = points.at("ablations", model, f"{arm}: all", name)
            for place, word in enumerate(words):
                value = points.at("ablations", model, f"{arm}: {word}", name)
                if not full or value is None:
                    continue
                shown = 100 * (1 - value / full) if better < 0 else value / full
                axes.bar(place + offset, shown, width * 0.92, color=COLORS[arm],
                         alpha=1.0 if model == "8b" else 0.5,
                         label=f"{NAMES[arm]}, {model}" if place == 0 else None)  # fmt: skip
                axes.annotate(f"{shown:.1f}", (place + offset, shown), ha="center",
                              va="bottom", fontsize=7)  # fmt: skip
    left.plot([0, 1], [21.7, 18.4], "*", mfc="none", mec="black", ms=14, label="reported")
    right.plot([2], [7.0], "*", mfc="none", mec="black", ms=14, label="reported (> 7x)")
    left.set_title("throughput lost, %")
    right.set_title("mean latency, times the whole")
    right.axhline(1.0, color="#666666", lw=0.8, ls=":")
    for axes in (left, right):
        axes.set_xticks(range(3), [word.replace(" ", "\n", 1) for word in words], fontsize=8)
        axes.legend(fontsize=7.5)
    figure.suptitle("Ablations under heavy load (simulated)", fontsize=10)
    return save(figure, path)
