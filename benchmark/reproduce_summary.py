"""From simulated rows to the figures' series, and to the paper's claims beside ours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

SUMMARY_NAME = "summary.json"
VERSION = 2
# What the paper reports (NSDI'26, by figure or section), in the unit of the claim.
TPOT_SAME = 1.013
TPOT_RELAXED = 1.14
Row = dict[str, Any]


def value_of(row: Row, path: str) -> float:
    """A number of a row by its dotted path."""
    value: Any = row
    for key in path.split("."):
        value = value[key]
    return float(value)


def mean_over_seeds(rows: Sequence[Row], path: str) -> dict[str, float | int]:
    """Mean with the lowest and the highest seed."""
    values = [value_of(row, path) for row in rows]
    return {
        "mean": float(np.mean(values)),
        "low": min(values),
        "high": max(values),
        "n": len(values),
    }


PATHS = (
    "tpot_seconds.mean",
    "ttft_seconds.mean",
    "ttft_seconds.p90",
    "latency_seconds.mean",
    "requests_per_second",
    "output_tokens_per_second",
    "load_max_over_median",
    "load_max_over_median_p90",
    "load_peak_over_median",
    "token_share.device",
    "token_share.host",
    "token_share.nvme",
    "token_share.computed",
)


def points_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One point for each figure, model, variant and number of users."""
    groups: dict[tuple[str, str, str, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["figure"], row["model"], row["variant"], row["users"]].append(row)
    return [
        {
            "figure": figure,
            "model": model,
            "variant": variant,
            "users": users,
            **{path: mean_over_seeds(group, path) for path in PATHS},
        }
        for (figure, model, variant, users), group in groups.items()
    ]


class Points:
    """Look-up by figure, model, variant and users."""

    def __init__(self, points: Sequence[dict[str, Any]]) -> None:
        self.points = points

    def curve(self, figure: str, model: str, variant: str, path: str) -> tuple[list[int], Any]:
        """Users, in ascending order, and the figure's means at each."""
        chosen = [
            p
            for p in self.points
            if (p["figure"], p["model"], p["variant"]) == (figure, model, variant)
        ]
        chosen.sort(key=lambda p: p["users"])
        return [p["users"] for p in chosen], np.array([p[path]["mean"] for p in chosen])

    def at(self, figure: str, model: str, variant: str, path: str, users: int = 0) -> float | None:
        """One mean; of the only number of users where none is given. None: not simulated."""
        counts, values = self.curve(figure, model, variant, path)
        if users:
            return float(values[counts.index(users)]) if users in counts else None
        return float(values[0]) if len(counts) == 1 else None

    def has(self, figure: str) -> bool:
        return any(p["figure"] == figure for p in self.points)


def users_at(users: Sequence[int], values: Sequence[float], limit: float) -> float:
    """How many users are served before `values` passes `limit`, between points on a line."""
    for place, value in enumerate(values):
        if value > limit:
            if place == 0:
                return 0.0
            low, high = values[place - 1], value
            share = (limit - low) / (high - low)
            return float(users[place - 1] + share * (users[place] - users[place - 1]))
    return float(users[-1])


def claim(
    name: str, paper: float, ours: float | None, unit: str, *, larger: bool
) -> dict[str, Any]:
    """One result of the paper beside ours. `reached`: at least as good, as far as was simulated."""
    reached = None
    if ours is not None:
        reached = ours >= paper if larger else ours <= paper
    return {"claim": name, "paper": paper, "simulated": ours, "unit": unit, "reached": reached}


def claims_of(points: Points) -> list[dict[str, Any]]:
    """All that can be told from the rows that are there."""
    claims: list[dict[str, Any]] = []
    if points.has("users"):
        claims += users_claims(points)
    if points.has("imbalance"):
        claims += imbalance_claims(points)
    if points.has("hints"):
        claims += hints_claims(points)
    if points.has("ablations"):
        claims += ablation_claims(points)
    return claims


def users_claims(points: Points) -> list[dict[str, Any]]:
    claims = []
    for model in ("8b", "13b"):
        counts, recompute = points.curve("users", model, "recompute", "tpot_seconds.mean")
        if not counts:
            continue
        start = counts[0]
        for arm in ("symphony", "paper"):
            users, tpot = points.curve("users", model, arm, "tpot_seconds.mean")
            for limit, paper in ((TPOT_SAME, 4.0), (TPOT_RELAXED, 8.0)):
                most = users_at(users, tpot, recompute[0] * limit) / start
                name = f"users at {limit - 1:+.1%} TPOT of recompute at {start}, {model}, {arm}"
                claims.append(claim(name, paper, most, "x", larger=True))
        counts, ours = points.curve("users", model, "symphony", "ttft_seconds.mean")
        for arm in ("recompute", "sticky"):
            _, theirs = points.curve("users", model, arm, "ttft_seconds.mean")
            ratio = float(np.max(theirs / ours))
            name = f"TTFT of {arm} over symphony, at most, {model}"
            claims.append(claim(name, 2.4, ratio, "x", larger=True))
        gain = oracle_share(points, model)
        claims.append(claim(f"share of the oracle's TPOT and TTFT gain, {model}", 0.97, gain, "",
                            larger=True))  # fmt: skip
    return claims


def oracle_share(points: Points, model: str) -> float | None:
    """Of the latency that the oracle saves over recompute, averaged over the user counts."""
    path = "latency_seconds.mean"
    _, base = points.curve("users", model, "recompute", path)
    _, ours = points.curve("users", model, "symphony", path)
    _, best = points.curve("users", model, "oracle", path)
    if not len(best):
        return None
    return float(np.mean((base - ours) / (base - best)))


def imbalance_claims(points: Points) -> list[dict[str, Any]]:
    """The paper's 3.1 is the most loaded worker over the median one, of sticky placement; its own
    is called even."""
    claims = []
    path = "load_max_over_median"
    for word in ("chance", "skewed"):
        for arm, paper, larger in (("sticky", 3.1, True), ("symphony", 1.0, False)):
            for end, moment in (("", "mean over time"), ("_p90", "a tenth of the time")):
                value = points.at("imbalance", "8b", f"{word}: {arm}", path + end)
                name = f"busiest over median worker, {word}, {arm}, {moment}"
                claims.append(claim(name, paper, value, "x", larger=larger))
    return claims


def hints_claims(points: Points) -> list[dict[str, Any]]:
    tpot, rate = "tpot_seconds.mean", "requests_per_second"
    none = points.at("hints", "8b", "missing 0%", tpot)
    some = points.at("hints", "8b", "missing 10%", tpot)
    clean = points.at("hints", "8b", "false 0%", rate)
    noisy = points.at("hints", "8b", "false 60%", rate)
    claims = []
    if none and some:
        change = 100 * (some / none - 1)
        claims.append(claim("TPOT with 10 % of advisories missing", 14.6, change, "%",
                            larger=False))  # fmt: skip
    if clean and noisy:
        loss = 100 * (1 - noisy / clean)
        claims.append(claim("throughput lost to 60 % false advisories", 2.1, loss, "%",
                            larger=False))  # fmt: skip
    return claims


def ablation_claims(points: Points) -> list[dict[str, Any]]:
    claims = []
    path = "output_tokens_per_second"
    for model in ("8b", "13b"):
        for arm in ("symphony", "greedy", "blocks"):
            full = points.at("ablations", model, f"{arm}: all", path)
            slow = points.at("ablations", model, f"{arm}: all", "latency_seconds.mean")
            if not full or not slow:
                continue
            for word, paper in (("no layer order", 21.7), ("no layer-wise loading", 18.4)):
                left = points.at("ablations", model, f"{arm}: {word}", path)
                loss = None if left is None else 100 * (1 - left / full)
                name = f"throughput lost, {word}, {arm}, {model}"
                claims.append(claim(name, paper, loss, "%", larger=True))
            latency = points.at("ablations", model, f"{arm}: no cooperation",
                                "latency_seconds.mean")  # fmt: skip
            ratio = None if latency is None else latency / slow
            name = f"times slower without cooperative memory, {arm}, {model}"
            claims.append(claim(name, 7.0, ratio, "x", larger=True))
    return claims


def summarize(rows: Sequence[Row]) -> dict[str, Any]:
    """All series and claims; JSON-ready.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("no rows: simulate first")
    points = points_of(rows)
    speeds = [row["virtual_seconds"] / row["cpu_seconds"] for row in rows]
    return {
        "version": VERSION,
        "simulated": True,
        "seeds": sorted({row["seed"] for row in rows}),
        "runs": len(rows),
        "times_real_time": {
            "median": float(np.median(speeds)),
            "lowest": min(speeds),
            "runs": speeds_of(rows),
        },
        "claims": claims_of(Points(points)),
        "points": points,
    }


# Of which runs the page gives the speed: figure, model, variant, users, in words.
SPEED_RUNS = (
    ("coding", "8b", "sticky", 1000, "1,000 coding agents, sticky"),
    ("coding", "8b", "unadvised", 1000, "1,000 coding agents, symphony without advisories"),
    ("coding", "8b", "symphony", 1000, "1,000 coding agents, symphony"),
    ("users", "8b", "sticky", 512, "512 chat users, sticky"),
    ("users", "8b", "symphony", 256, "256 chat users, symphony"),
    ("users", "8b", "symphony", 512, "512 chat users, symphony"),
    ("users", "8b", "symphony", 768, "768 chat users, symphony, past overload"),
)


def speeds_of(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """How many times real time some runs took, with what happened in a second of theirs."""
    found = []
    for *key, words in SPEED_RUNS:
        chosen = [
            row
            for row in rows
            if [row[name] for name in ("figure", "model", "variant", "users")] == key
        ]
        if not chosen:
            continue
        seconds = float(np.mean([row["virtual_seconds"] for row in chosen]))
        found.append(
            {
                "name": words,
                "times": seconds / float(np.mean([row["cpu_seconds"] for row in chosen])),
                "turns_per_second": float(np.mean([row["requests_per_second"] for row in chosen])),
                "advisories_per_second": float(
                    np.mean([row["advisories"]["sent"] for row in chosen]) / seconds
                ),
            }
        )
    return found


def claims_table(summary: dict[str, Any]) -> str:
    """The claims as a Markdown table."""
    lines = ["| claim | paper | simulated | reached |", "|---|---|---|---|"]
    for item in summary["claims"]:
        ours = item["simulated"]
        shown = "-" if ours is None else f"{ours:.2f} {item['unit']}"
        reached = {None: "-", True: "yes", False: "no"}[item["reached"]]
        lines.append(
            f"| {item['claim']} | {item['paper']:g} {item['unit']} | {shown} | {reached} |"
        )
    return "\n".join(lines)
