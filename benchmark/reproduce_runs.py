"""The runs behind each figure of the reproduction: the paper's set-up, one change at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from symphony_sglang.sim.cluster import AdviceMix, Cluster, RunRules
from symphony_sglang.sim.hardware import LINKS
from symphony_sglang.sim.pace import cpu_seconds, few_collections
from symphony_sglang.sim.results import figures
from symphony_sglang.sim.scenario import SimScenario, load_scenario

MODELS = {"8b": "paper-8b", "13b": "paper-13b"}
# The points at which the figures look closer: the pressure band, where the working set is about as
# large as all device levels, and past it, where requests queue.
BAND_USERS = {"8b": 512, "13b": 160}
HEAVY_USERS = {"8b": 1024, "13b": 224}
MISSING = (0.0, 0.1, 0.3, 1.0)
FALSE = (0.0, 0.3, 0.6, 0.9)
SKEW = 1.2
SKEWED_USERS = 448
CHANCE_USERS = 576
GREEDY_SHARE = 0.95
GREEDY_EXPIRES_SECONDS = 600.0
BREAK_EVENS = (1.0, 1.5, 2.0, 4.0)
BURST_SIGMA = 1.6


class Run(NamedTuple):
    """One simulated run; `variant` is what its figure compares by."""

    figure: str
    model: str
    variant: str
    rules: RunRules
    warm_seconds: float


def runs_of(seeds: tuple[int, ...], figures_wanted: Iterable[str] = ()) -> list[Run]:
    """All runs, or those of some figures, in order."""
    wanted = tuple(figures_wanted) or tuple(FIGURES)
    return [run for name in wanted for seed in seeds for run in FIGURES[name](seed)]


def base(model: str) -> SimScenario:
    return load_scenario(MODELS[model])


def rules_of(scenario: SimScenario, arm: str, users: int, seed: int, **changes: Any) -> RunRules:
    """One arm of a scenario at one number of users."""
    for rules in scenario.runs():
        if rules.name == arm and rules.users.users == scenario.user_counts[0]:
            people = dataclasses.replace(rules.users, users=users)
            people = dataclasses.replace(people, **changes.pop("people", {}))
            return dataclasses.replace(rules, users=people, seed=seed, **changes)
    raise ValueError(f"{scenario.name}: no arm {arm!r}")


def users_runs(seed: int) -> Iterator[Run]:
    """TPOT and TTFT against the number of users, for both models."""
    arms = ("recompute", "sticky", "cache-aware", "paper", "symphony", "oracle")
    for model in MODELS:
        scenario = base(model)
        for users in scenario.user_counts:
            for arm in arms:
                rules = rules_of(scenario, arm, users, seed)
                yield Run("users", model, arm, rules, scenario.warm_seconds)


def burst_runs(seed: int) -> Iterator[Run]:
    """The same users with BurstGPT-like pauses: most short, some very long."""
    scenario = base("8b")
    for users in (64, 256, 512):
        for arm in ("recompute", "sticky", "symphony", "oracle"):
            rules = rules_of(scenario, arm, users, seed, people={"gap_sigma": BURST_SIGMA})
            yield Run("burst", "8b", arm, rules, scenario.warm_seconds)


def imbalance_runs(seed: int) -> Iterator[Run]:
    """Sessions that are where chance put them, and a few users with most of the work."""
    scenario = base("8b")
    for word, users, people in (
        ("chance", CHANCE_USERS, {"chance_homes": True}),
        ("skewed", SKEWED_USERS, {"chance_homes": True, "skew": SKEW}),
    ):
        for arm in ("sticky", "paper", "symphony"):
            rules = rules_of(scenario, arm, users, seed, people=people)
            yield Run("imbalance", "8b", f"{word}: {arm}", rules, scenario.warm_seconds)


def hints_runs(seed: int) -> Iterator[Run]:
    """Advisories left out, and false ones added."""
    scenario = base("8b")
    users = BAND_USERS["8b"]
    for share in MISSING:
        advice = AdviceMix(missing_share=share)
        rules = rules_of(scenario, "symphony", users, seed, advice=advice)
        yield Run("hints", "8b", f"missing {share:.0%}", rules, scenario.warm_seconds)
    for share in FALSE:
        advice = AdviceMix(false_share=share)
        rules = rules_of(scenario, "symphony", users, seed, advice=advice)
        yield Run("hints", "8b", f"false {share:.0%}", rules, scenario.warm_seconds)


def ablation_runs(seed: int) -> Iterator[Run]:
    """One thing taken away at a time, from ours and from a greedier way.

    The paper promotes into all free device memory, and its advisories do not expire, so its
    ablation of cooperation is one of promotions that may hold all of it; ours may hold 30 % for a
    minute. `greedy` may hold 95 % for ten, 60 % of its advisories are false, and it swaps where
    memory ends. `blocks` also copies block by block, and leaves a disk alone that is slower than
    computing.
    """
    for model in MODELS:
        scenario = base(model)
        whole = rules_of(scenario, "symphony", HEAVY_USERS[model], seed)
        greedy = dataclasses.replace(
            whole,
            protect_device=GREEDY_SHARE,
            advice=AdviceMix(false_share=0.6, expires_seconds=GREEDY_EXPIRES_SECONDS),
            features=dataclasses.replace(whole.features, swap=True),
        )
        arms = {"symphony": whole, "greedy": greedy}
        if model == "8b":
            link = {"link_bytes_per_second": LINKS["pcie-4.0-x16-by-blocks"]}
            arms["blocks"] = dataclasses.replace(
                greedy,
                speeds=dataclasses.replace(greedy.speeds, **link),
                features=dataclasses.replace(greedy.features, break_even=1.0),
            )
        for arm, plain in arms.items():
            yield Run("ablations", model, f"{arm}: all", plain, scenario.warm_seconds)
            for word, change in (
                ("no layer order", {"layer_order": False}),
                ("no layer-wise loading", {"layer_wise": False}),
                ("no cooperation", {"cooperative": False}),
            ):
                features = dataclasses.replace(plain.features, **change)
                rules = dataclasses.replace(plain, features=features)
                yield Run("ablations", model, f"{arm}: {word}", rules, scenario.warm_seconds)


def break_even_runs(seed: int) -> Iterator[Run]:
    """How much slower than computing again a level may be and still be used, under heavy load."""
    scenario = base("8b")
    whole = rules_of(scenario, "symphony", HEAVY_USERS["8b"], seed)
    for factor in BREAK_EVENS:
        features = dataclasses.replace(whole.features, break_even=factor)
        rules = dataclasses.replace(whole, features=features)
        yield Run("break-even", "8b", f"{factor:g}", rules, scenario.warm_seconds)


def coding_runs(seed: int) -> Iterator[Run]:
    """A thousand coding agents with the pauses of real ones."""
    scenario = load_scenario("coding")
    for rules in scenario.runs():
        rules = dataclasses.replace(rules, seed=seed)
        yield Run("coding", "8b", rules.name, rules, scenario.warm_seconds)


FIGURES: dict[str, Callable[[int], Iterator[Run]]] = {
    "users": users_runs,
    "burst": burst_runs,
    "imbalance": imbalance_runs,
    "hints": hints_runs,
    "ablations": ablation_runs,
    "break-even": break_even_runs,
    "coding": coding_runs,
}


def row_of(run: Run) -> dict[str, Any]:
    """Simulate it; one JSON-ready row. Every run's books are checked."""
    cluster = Cluster(run.rules)
    with few_collections():
        started = cpu_seconds()
        cluster.run()
        spent = cpu_seconds() - started
    cluster.check()
    row = figures(cluster, run.warm_seconds)
    row |= {"figure": run.figure, "model": run.model, "variant": run.variant}
    row["virtual_seconds"] = cluster.loop.now_seconds
    row["cpu_seconds"] = spent
    return row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The raw rows.

    Raises:
        ValueError: a line is no row, with its number.
    """
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            row["figure"], row["variant"], row["tpot_seconds"]["mean"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number}: no row of a run: {error}") from error
        rows.append(row)
    return rows
