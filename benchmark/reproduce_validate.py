"""``python -m benchmark.reproduce_validate DIRECTORY...``: the simulator against real runs.

Drives the simulator with what the runs' raw samples say was asked (when, how long, after which
pause, advised how long before), on as many workers, with the speeds that those workers measured of
themselves, behind the same policy, and compares what came out: mean TTFT, achieved rate, and the
share of the prompts that each level had. Writes ``validation.json`` beside each one's samples, or
all of them under ``--output DIR`` by scenario.

Workers of other kinds than ours measure nothing: they run on the same machine, so they get the
speeds of ours. What a request costs beyond the worker's own time (HTTP, tokenizing, the router) is
taken from the samples, once for all arms with a router and once for those without: the fastest
tenth of what is left of TTFT.

Workers, client and router share a machine, so none of them runs at the speed that it measured
alone. How much slower, or faster, is one number, taken from the scenario's baseline: the pace at
which its simulation comes nearest to it. The baseline's own agreement therefore says little, that
of the other arms is the test.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from benchmark.reproduce_recorded import RecordedTurn, RecordedUser
from benchmark.runner import End, read_run
from benchmark.scenario import Arm, Scenario
from benchmark.statistics import run_figures
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.routing_policies import POLICIES
from symphony_sglang.sim.cluster import AdviceMix, Cluster, RunRules
from symphony_sglang.sim.hardware import Speeds
from symphony_sglang.sim.users import UserRules
from symphony_sglang.sim.worker import Features
from symphony_sglang.workload.replay_driver import RequestRecord

VERSION = 2
RESULT_NAME = "validation.json"
GOAL = 0.15  # of TTFT and rate; shares of the prompts may differ by this much in all
PAGE_SIZE = 16
# What one request more in the batch adds to a decode step on these small models, of the step.
BATCH_GROWTH = 0.05
# Windows and requests that `prefill_rate` looks at.
WINDOW_TOKENS_MIN = 1024
SHORT_TOKENS_MAX = 64
FEATURES = {
    "recompute": Features(prefix_cache=False, host=False, nvme=False),
    "device": Features(host=False, nvme=False),
    "hicache": Features(),
    "symphony": Features(gate=True, protect_queued=True),
}
# What a rate is where nobody measured it: a copy in memory, and a disk.
ASSUMED_BYTES_PER_SECOND = {"host_to_device": 4e9, "nvme_to_host": 0.5e9}
OVERHEAD_QUANTILE = 0.1
PACES = tuple(1.12**step for step in range(-7, 8))  # 0.45 to 2.2


class Calibration(NamedTuple):
    """The workers' profile, where each of its figures is from, and what comes on top."""

    speeds: Speeds
    origin: dict[str, str]
    waits: Sequence[tuple[float, int]]  # TTFT, and how many tokens were computed for it
    pace: float = 1.0

    def at_pace(self, pace: float) -> Calibration:
        """The same machine, whose prefill is `pace` times as fast as it said. Decode steps are
        from the samples, and are what they are."""
        speeds = dataclasses.replace(
            self.speeds,
            step_seconds=self.speeds.step_seconds / pace,
            prefill_token_seconds=self.speeds.prefill_token_seconds / pace,
        )
        return self._replace(speeds=speeds, pace=pace)

    @property
    def overhead_seconds(self) -> float:
        """What of TTFT the prefill does not explain, where nothing else was in the way."""
        speeds = self.speeds
        left = [
            wait - speeds.step_seconds - speeds.prefill_token_seconds * tokens
            for wait, tokens in self.waits
        ]
        return max(0.0, float(np.quantile(left, OVERHEAD_QUANTILE))) if left else 0.0


def users_of(records: Sequence[RequestRecord], overhead_seconds: float = 0.0) -> list[RecordedUser]:
    """Each session's turns in order, with the pause that preceded each.

    `overhead_seconds`, which simulated requests do not take, is waited before each but the first.
    """
    sessions: dict[str, list[RequestRecord]] = defaultdict(list)
    for record in records:
        if record.error is None:
            sessions[record.session_id].append(record)
    users = []
    for number, name in enumerate(sorted(sessions)):
        turns, ended = [], 0.0
        for record in sorted(sessions[name], key=lambda item: item.turn):
            pause = max(0.0, record.due_seconds - ended) + (overhead_seconds if turns else 0.0)
            turns.append(
                RecordedTurn(record.prompt_tokens, record.output_tokens, pause, record.lead_seconds)
            )
            ended = record.sent_seconds + record.latency_seconds
        users.append(RecordedUser(number, turns))
    return users


def rate_of(counters: Sequence[dict[str, Any]], name: str) -> Rate | None:
    """A speed as the workers measured it, the median of all that did; None where none did."""
    found = []
    for body in counters:
        rates = body.get("rates") or {}
        speed = rates.get(f"{name}_tokens_per_second")
        if speed:
            found.append((float(speed), float(rates.get(f"{name}_latency_seconds") or 0.0)))
    if not found:
        return None
    speed, latency = np.median(np.array(found), axis=0)
    return Rate(float(speed), float(latency))


def prefill_rate(records: Sequence[RequestRecord]) -> Rate:
    """From the samples, where workers have measured nothing.

    Per token: what all requests computed while one waited for its first token, over that wait, in
    the busier quarter of such windows. Per request: the fastest tenth of those with little to
    compute.
    """
    done = [
        (r.sent_seconds, r.sent_seconds + r.ttft_seconds, r.prompt_tokens - r.cached.total())
        for r in records
        if r.error is None and r.ttft_seconds
    ]
    _, ends, computed = np.array(done).T
    speeds, short = [], []
    for start, end, tokens in done:
        work = float(computed[(ends > start) & (ends <= end)].sum())
        if work >= WINDOW_TOKENS_MIN:
            speeds.append(work / (end - start))
        if tokens <= SHORT_TOKENS_MAX:
            short.append(end - start)
    if not speeds:
        raise ValueError("too little was computed to tell the speed of prefill")
    latency = float(np.quantile(short, 0.1)) if short else 0.0
    return Rate(float(np.quantile(speeds, 0.75)), latency)


def calibrate(
    scenario: Scenario,
    records: Sequence[RequestRecord],
    counters: Sequence[dict[str, Any]],
    token_bytes: int,
) -> Calibration:
    """From the samples of one kind of arm and the counters of all workers that measured."""
    shape = scenario.model
    origin, rates = {}, {}
    for name in ("prefill", "host_to_device", "nvme_to_host"):
        measured = rate_of(counters, name)
        if measured is not None:
            origin[name], rates[name] = "workers", measured
        elif name == "prefill":
            origin[name], rates[name] = "samples", prefill_rate(records)
        else:
            origin[name] = "assumed"
            rates[name] = Rate(ASSUMED_BYTES_PER_SECOND[name] / token_bytes, 0.001)
    steps = [record.tpot_seconds for record in records if record.tpot_seconds]
    step = float(np.quantile(steps, 0.1)) if steps else 0.01
    origin["decode"] = "samples, their fastest tenth"
    prefill, load, read = rates["prefill"], rates["host_to_device"], rates["nvme_to_host"]
    speeds = Speeds(
        layers=shape.layers,
        token_bytes=token_bytes,
        step_seconds=prefill.latency_seconds,
        prefill_token_seconds=1 / prefill.tokens_per_second,
        prefill_pair_seconds=0.0,
        decode_base_seconds=step,
        decode_request_seconds=BATCH_GROWTH * step,
        decode_context_seconds=0.0,
        device_tokens=scenario.worker.device_tokens,
        host_tokens=int(scenario.worker.host_gb * 1e9 / token_bytes),
        nvme_tokens=int(scenario.worker.nvme_gb * 1e9 / token_bytes),
        link_bytes_per_second=load.tokens_per_second * token_bytes,
        nvme_read_bytes_per_second=read.tokens_per_second * token_bytes,
        nvme_write_bytes_per_second=read.tokens_per_second * token_bytes,
        network_bytes_per_second=1e9,
        link_latency_seconds=load.latency_seconds,
        disk_latency_seconds=read.latency_seconds,
    )
    waits = [
        (record.ttft_seconds, record.prompt_tokens - record.cached.total())
        for record in records
        if record.error is None and record.ttft_seconds
    ]
    return Calibration(speeds, origin, waits)


def token_bytes_of(scenario: Scenario, ends: Sequence[End]) -> int:
    """As any worker of ours says; else of a model without grouped heads."""
    for end in ends:
        for body in end.counters:
            found = body.get("levels", {}).get("device", {}).get("token_bytes")
            if found:
                return int(found)
    return 4 * scenario.model.layers * scenario.model.hidden


def simulate(
    scenario: Scenario, arm: Arm, records: Sequence[RequestRecord], calibration: Calibration
) -> dict[str, float]:
    """The figures of one run, simulated."""
    overhead = calibration.overhead_seconds
    users = users_of(records, overhead)
    name = arm.router.partition(":")[2] or "session_sticky"
    if name not in POLICIES:
        raise ValueError(f"arm {arm.name!r}: the simulator has no policy {name!r}")
    advice = None
    if arm.advice is not None:
        advice = AdviceMix(expires_seconds=arm.advice.expires_seconds)
    last = max(record.sent_seconds + record.latency_seconds for record in records)
    ours = arm.router.startswith("symphony:") and arm.server == "symphony"
    cluster = Cluster(
        RunRules(
            name=arm.name,
            workers=arm.workers,
            speeds=calibration.speeds,
            features=FEATURES[arm.server],
            users=UserRules(users=len(users)),
            policy=name,
            seconds=20 * last,
            advice=advice,
            migrate=ours,
            plan_moves=ours and name == "symphony",
            page_size=PAGE_SIZE,
        ),
        users,
    )
    requests = cluster.run()
    cluster.check()
    counted = [item for item in requests if item.turn or not scenario.returning_only]
    prompt = sum(item.prompt_tokens for item in requests)
    span = max(item.ended_seconds for item in requests) - min(r.sent_seconds for r in requests)
    return {
        "ttft_seconds": overhead + float(np.mean([item.ttft_seconds for item in counted])),
        "requests_per_second": len(requests) / span,
        "device": sum(item.device_tokens for item in requests) / prompt,
        "host": sum(item.host_tokens for item in requests) / prompt,
        "nvme": sum(item.nvme_tokens for item in requests) / prompt,
    }


def measured(scenario: Scenario, records: Sequence[RequestRecord], end: End) -> dict[str, float]:
    """The same figures of the run itself."""
    figures = run_figures(
        records,
        end,
        returning_only=scenario.returning_only,
        slo_ttft_seconds=scenario.slo_ttft_seconds,
    )
    return {
        "ttft_seconds": figures["ttft_seconds"]["mean"],
        "requests_per_second": len(records) / end.seconds,
        "device": figures["hit_share"]["device"],
        "host": figures["hit_share"]["host"],
        "nvme": figures["hit_share"]["storage"],
    }


def is_within(name: str, real: float, simulated: float) -> bool:
    """Times and rates by ratio, shares by difference."""
    if name in ("device", "host", "nvme"):
        return abs(simulated - real) <= GOAL
    return abs(simulated / real - 1) <= GOAL


def validate(directory: Path, paces: Sequence[float] = PACES) -> dict[str, Any]:
    """Every complete run of a scenario's directory beside its simulation.

    Raises:
        ValueError: there is no complete run.
    """
    scenario = msgspec.json.decode((directory / "scenario.json").read_bytes(), type=Scenario)
    arms = {arm.name: arm for arm in scenario.arm}
    runs = [read_run(path) for path in sorted(directory.glob("*.jsonl"))]
    if not runs:
        raise ValueError(f"{directory}: no complete run")
    token_bytes = token_bytes_of(scenario, [end for _, _, end in runs])
    counters = [body for _, _, end in runs for body in end.counters]
    pace = None
    results: dict[str, Any] = {}
    # The baseline first: it sets the pace.
    for name, arm in sorted(arms.items(), key=lambda item: item[0] != scenario.baseline):
        mine = [(records, end) for header, records, end in runs if header.arm == name]
        if not mine:
            continue
        alike = [
            record
            for header, records, _ in runs
            if bool(arms[header.arm].router) == bool(arm.router)
            for record in records
        ]
        calibration = calibrate(scenario, alike, counters, token_bytes)
        real = [measured(scenario, records, end) for records, end in mine]
        if pace is None:
            samples = [records for records, _ in mine]
            pace = nearest_pace(scenario, arm, samples, real, calibration, paces)
        calibration = calibration.at_pace(pace)
        simulated = [simulate(scenario, arm, records, calibration) for records, _ in mine]
        results[name] = {
            "workers": arm.workers,
            "sets_pace": not results,
            "speeds": describe(calibration),
            "figures": {
                key: compared(key, [r[key] for r in real], [s[key] for s in simulated])
                for key in real[0]
            },
        }
    return {
        "version": VERSION,
        "scenario": scenario.name,
        "title": scenario.title,
        "goal": GOAL,
        "within": counted_within(results),
        "arms": results,
    }


def nearest_pace(
    scenario: Scenario,
    arm: Arm,
    runs: Sequence[Sequence[RequestRecord]],
    real: Sequence[dict[str, float]],
    calibration: Calibration,
    paces: Sequence[float],
) -> float:
    """Of the paces the one whose simulated TTFT and rate are nearest to the real ones, by ratio."""

    def distance(pace: float) -> float:
        paced = calibration.at_pace(pace)
        made = [simulate(scenario, arm, records, paced) for records in runs]
        return sum(
            abs(math.log(ours[name] / theirs[name]))
            for ours, theirs in zip(made, real, strict=True)
            for name in ("ttft_seconds", "requests_per_second")
        )

    return min(paces, key=distance)


def describe(calibration: Calibration) -> dict[str, Any]:
    """The profile in the units in which it was measured."""
    speeds = calibration.speeds
    return {
        "from": calibration.origin,
        "prefill_tokens_per_second": 1 / speeds.prefill_token_seconds,
        "prefill_latency_seconds": speeds.step_seconds,
        "decode_step_seconds": speeds.decode_base_seconds,
        "host_to_device_bytes_per_second": speeds.link_bytes_per_second,
        "nvme_to_host_bytes_per_second": speeds.nvme_read_bytes_per_second,
        "overhead_seconds": calibration.overhead_seconds,
        "pace": calibration.pace,
        "profile": dataclasses.asdict(speeds),
    }


def speeds_toml(result: dict[str, Any]) -> str:
    """The profile of a scenario's workers as `symphony simulate` reads it."""
    profile = list(result["arms"].values())[-1]["speeds"]["profile"]
    lines = [f"{name} = {value!r}" for name, value in profile.items()]
    return "\n".join([f"# Measured in the scenario {result['scenario']}.", "[speeds]", *lines, ""])


def counted_within(results: dict[str, Any]) -> dict[str, list[int]]:
    """For each figure: in how many arms it agrees, of how many."""
    counts: dict[str, list[int]] = {}
    for item in results.values():
        for name, row in item["figures"].items():
            count = counts.setdefault(name, [0, 0])
            count[0] += row["within"]
            count[1] += 1
    return counts


def compared(name: str, real: Sequence[float], simulated: Sequence[float]) -> dict[str, Any]:
    """Medians over the repetitions; the real ones' spread says what agreement can mean."""
    middle, ours = float(np.median(real)), float(np.median(simulated))
    return {
        "real": middle,
        "real_low": min(real),
        "real_high": max(real),
        "simulated": ours,
        "within": is_within(name, middle, ours),
    }


def table(result: dict[str, Any]) -> str:
    """Markdown; the baseline, which set the pace, is marked."""
    lines = [
        "| arm | figure | real (low to high) | simulated | within 15 % |",
        "|---|---|---|---|---|",
    ]
    for arm, item in result["arms"].items():
        pace = f", pace {item['speeds']['pace']:.2f} taken from it"
        if item["workers"] > 1:
            arm = f"{arm} ({item['workers']} workers)"
        if item["sets_pace"]:
            arm += pace
        for name, row in item["figures"].items():
            spread = f"{row['real']:.3f} ({row['real_low']:.3f} to {row['real_high']:.3f})"
            word = "yes" if row["within"] else "no"
            lines.append(f"| {arm} | {name} | {spread} | {row['simulated']:.3f} | {word} |")
    within = ", ".join(f"{name} {n} of {of}" for name, (n, of) in result["within"].items())
    return "\n".join([*lines, "", f"Within {result['goal']:.0%}: {within}."])


def main() -> int:
    """Exit code 2 where a directory holds no runs."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.reproduce_validate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("directory", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, metavar="DIR")
    words = "write the last one's measured profile, as a scenario's [speeds]"
    parser.add_argument("--speeds", type=Path, metavar="FILE", help=words)
    arguments = parser.parse_args()
    try:
        for directory in arguments.directory:
            result = validate(directory)
            path = directory / RESULT_NAME
            if arguments.output is not None:
                arguments.output.mkdir(parents=True, exist_ok=True)
                path = arguments.output / f"validation-{result['scenario']}.json"
            path.write_text(json.dumps(result, indent=1) + "\n")
            if arguments.speeds is not None:
                arguments.speeds.write_text(speeds_toml(result))
            print(f"{result['scenario']}: {result['title']}\n\n{table(result)}\n")
    except (ValueError, OSError, msgspec.MsgspecError) as error:
        print(f"reproduce_validate: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
