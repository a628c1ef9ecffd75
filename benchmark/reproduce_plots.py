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
    "blocks": "#c2603c",
}
NAMES = {
    "recompute": "recompute (vLLM)",
    "sticky": "sticky, host offload (InferCept)",
    "cache-aware": "cache-aware, three levels",
    "paper": "paper's policy",
    "symphony": "symphony (ours)",
    "oracle": "oracle leads",
    "greedy": "greedy, 60 % false",
    "blocks": "greedy, copies by block",
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
    if points.has("users"):
        drawn.append(plot_ttft_ratio(points, directory / "ttft-ratio.png"))
    for name, draw in (
        ("burst", plot_burst),
        ("imbalance", plot_imbalance),
        ("hints", plot_hints),
        ("ablations", plot_ablations),
        ("break-even", plot_break_even),
        ("coding", plot_coding),
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


def plot_ttft_ratio(points: Points, path: Path) -> Path:
    """Mean TTFT of the baselines over ours, against users, with the paper's 2.4."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained", sharey=True)
    for axes, model, shape in zip(panels, ("8b", "13b"), ("Llama-3.1-8B", "Llama-2-13B"),
                                  strict=True):  # fmt: skip
        users, ours = points.curve("users", model, "symphony", "ttft_seconds.mean")
        for arm in ("recompute", "sticky", "cache-aware"):
            _, theirs = points.curve("users", model, arm, "ttft_seconds.mean")
            if len(theirs) == len(ours) and len(ours):
                axes.plot(users, theirs / ours, color=COLORS[arm], marker="o", ms=3.5,
                          label=NAMES.get(arm, arm))  # fmt: skip
        axes.axhline(2.4, color="black", lw=1.0, ls="--", label="reported: up to 2.4")
        axes.axhline(1.0, color="#666666", lw=0.8, ls=":")
        axes.set_xscale("log", base=2)
        axes.set_xticks(users, users)
        axes.minorticks_off()
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("users")
        axes.set_title(shape)
    panels[0].set_ylabel("TTFT (mean), times ours")
    panels[0].legend(fontsize=7.5)
    figure.suptitle("TTFT of baselines over symphony's (simulated)", fontsize=10)
    return save(figure, path)


def plot_break_even(points: Points, path: Path) -> Path:
    """Throughput and TPOT against how slow a level may be and still be used."""
    from matplotlib import pyplot

    found = sorted((float(p["variant"]), p) for p in points.points if p["figure"] == "break-even")
    factors = [factor for factor, _ in found]
    figure, axes = pyplot.subplots(figsize=(5.6, 3.4), layout="constrained")
    rate = [p["requests_per_second"]["mean"] for _, p in found]
    step = [1e3 * p["tpot_seconds.mean"]["mean"] for _, p in found]
    axes.plot(factors, rate, color=COLORS["symphony"], marker="o", ms=4, label="requests/s")
    axes.set_ylim(0, 1.15 * max(rate))
    axes.set_xlabel("a level may be this many times slower than computing again")
    axes.set_ylabel("requests/s", color=COLORS["symphony"])
    other = axes.twinx()
    other.plot(factors, step, color=COLORS["sticky"], marker="s", ms=4, ls="--")
    other.set_ylabel("TPOT, ms", color=COLORS["sticky"])
    other.set_ylim(0, 1.15 * max(step))
    other.grid(visible=False)
    axes.set_title("Break-even, 8B, 1,024 users (simulated)", fontsize=10)
    return save(figure, path)


def plot_coding(points: Points, path: Path) -> Path:
    """A thousand coding agents: TTFT, and where the prompts' tokens came from."""
    from matplotlib import pyplot

    arms = ("sticky", "unadvised", "symphony")
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.0, 3.4), layout="constrained")
    shades = {"device": "#1f8f5f", "host": "#7fbf9f", "nvme": "#b59b3a", "computed": "#c2603c"}
    for place, arm in enumerate(arms):
        for offset, name, alpha in ((-0.2, "mean", 1.0), (0.2, "p90", 0.5)):
            value = points.at("coding", "8b", arm, f"ttft_seconds.{name}")
            if value is None:
                continue
            left.bar(place + offset, 1e3 * value, 0.38, color=COLORS[arm], alpha=alpha)
            left.annotate(f"{1e3 * value:.0f}", (place + offset, 1e3 * value), ha="center",
                          va="bottom", fontsize=8)  # fmt: skip
        base = 0.0
        for source, shade in shades.items():
            share = points.at("coding", "8b", arm, f"token_share.{source}") or 0.0
            right.bar(place, share, 0.55, bottom=base, color=shade,
                      label=source if place == 0 else None)  # fmt: skip
            base += share
    left.set_title("TTFT, ms: mean, and P90 (pale)")
    right.set_title("prompt tokens by source")
    right.yaxis.set_major_formatter("{x:.0%}")
    for axes in (left, right):
        axes.set_xticks(range(len(arms)), [NAMES.get(arm, arm) for arm in arms], fontsize=7.5)
    right.legend(fontsize=8, loc="lower left")
    figure.suptitle("1,000 coding agents with recorded pauses, 8B (simulated)", fontsize=10)
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
    """Requests at the busiest worker over the median worker's: mean over time, and its P90."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.0, 3.6), layout="constrained", sharey=True)
    arms = ("sticky", "paper", "symphony")
    paper = {"sticky": 3.1, "paper": 1.0}
    titles = {"chance": "sessions where chance put them", "skewed": "and skewed users"}
    for axes, (word, title) in zip(panels, titles.items(), strict=True):
        for place, arm in enumerate(arms):
            for offset, end, alpha in ((-0.2, "", 1.0), (0.2, "_p90", 0.5)):
                value = points.at("imbalance", "8b", f"{word}: {arm}", f"load_max_over_median{end}")
                value = value or 0.0
                axes.bar(place + offset, value, 0.38, color=COLORS[arm], alpha=alpha)
                axes.annotate(f"{value:.2f}", (place + offset, value), ha="center", va="bottom",
                              fontsize=8)  # fmt: skip
            if arm in paper:
                axes.plot(place, paper[arm], "*", mfc="none", mec="black", ms=14, mew=1.4,
                          label="reported" if arm == "sticky" else None)  # fmt: skip
        axes.axhline(1.0, color="#666666", lw=0.8, ls=":")
        axes.set_xticks(range(3), [NAMES[arm] for arm in arms], fontsize=7)
        axes.set_title(title, fontsize=9)
    panels[0].set_ylabel("requests, busiest / median worker")
    panels[0].legend()
    figure.suptitle("Load imbalance over time: mean, and P90 (pale) (simulated)", fontsize=10)
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
    panels = [
        (model, arm)
        for model in ("8b", "13b")
        for arm in ("symphony", "greedy", "blocks")
        if (model, arm) != ("13b", "blocks")
    ]
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
