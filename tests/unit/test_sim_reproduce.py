"""The reproduction's steps: rows in, claims and figures out."""

from __future__ import annotations

import dataclasses
import json
import random
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmark.reproduce_document import document
from benchmark.reproduce_plots import plot_all
from benchmark.reproduce_recorded import RecordedTurn, RecordedUser
from benchmark.reproduce_runs import FIGURES, read_rows, runs_of
from benchmark.reproduce_summary import PATHS, SPEED_RUNS, claims_table, summarize, users_at
from benchmark.reproduce_validate import (
    Calibration,
    is_within,
    prefill_rate,
    speeds_toml,
    table,
    users_of,
    validate,
)
from benchmark.runner import End, Header
from benchmark.scenario import Advice, Arm, Model, Scenario, WorkerSizes, Workload
from symphony_sglang.core.gate import GateSnapshot
from symphony_sglang.sim.cluster import AdviceMix, Cluster, RunRules
from symphony_sglang.sim.hardware import Speeds
from symphony_sglang.sim.users import UserRules
from symphony_sglang.sim.worker import Features
from symphony_sglang.workload.generate_client import CachedTokens
from symphony_sglang.workload.replay_driver import RequestRecord


def made_row(figure: str, model: str, variant: str, users: int, slow: float) -> dict[str, Any]:
    """A row in which every figure is `slow` or its inverse."""
    row: dict[str, Any] = {"figure": figure, "model": model, "variant": variant, "users": users}
    for path in PATHS:
        place = row
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = 1 / slow if "per_second" in path else slow
    return row | {
        "seed": 0,
        "virtual_seconds": 100.0,
        "cpu_seconds": 1.0,
        "advisories": {"sent": 700},
    }


def all_rows() -> list[dict[str, Any]]:
    return [
        made_row(run.figure, run.model, run.variant, run.rules.users.users,
                 1.0 + run.rules.users.users / 1000 * (1 + len(run.variant) / 10))
        for run in runs_of((0,))
    ]  # fmt: skip


def test_users_at_a_limit_are_found_between_the_points() -> None:
    assert users_at([10, 20, 40], [1.0, 2.0, 4.0], 3.0) == pytest.approx(30.0)
    assert users_at([10, 20], [1.0, 2.0], 5.0) == 20
    assert users_at([10, 20], [3.0, 4.0], 2.0) == 0


def test_every_run_has_a_key_of_its_own_and_every_figure_has_runs() -> None:
    runs = runs_of((0, 1))
    keys = {(r.figure, r.model, r.variant, r.rules.users.users, r.rules.seed) for r in runs}
    assert len(keys) == len(runs)
    assert {run.figure for run in runs} == set(FIGURES)


def test_claims_are_computed_from_rows_and_say_whether_they_hold() -> None:
    summary = summarize(all_rows())
    assert summary["simulated"]
    speed = summary["times_real_time"]
    assert (speed["median"], speed["lowest"]) == (100.0, 100.0)
    assert len(speed["runs"]) == len(SPEED_RUNS)
    assert {row["advisories_per_second"] for row in speed["runs"]} == {7.0}
    claims = {item["claim"]: item for item in summary["claims"]}
    assert len(claims) == len(summary["claims"]) > 20
    missing = claims["TPOT with 10 % of advisories missing"]
    # "missing 0%" is a letter shorter than "missing 10%", hence 0.0512 faster at 512 users.
    base = 1.0 + 0.512 * 2.0
    assert missing["simulated"] == pytest.approx(100 * 0.0512 / base)
    assert missing["reached"]
    assert claims_table(summary).count("\n") == len(claims) + 1


def test_a_summary_can_be_drawn_without_simulating(tmp_path: Path) -> None:
    summary = json.loads(json.dumps(summarize(all_rows())))
    drawn = plot_all(summary, tmp_path)
    names = {path.stem for path in drawn}
    assert names == {"users-8b", "users-13b", "ttft-ratio", "burst", "imbalance", "hints",
                     "ablations", "break-even", "coding"}  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


PAGE = """# Page

<!-- reproduce: claims -->
old
<!-- reproduce: end -->

Words between.

<!-- reproduce: speed -->
<!-- reproduce: end -->
<!-- reproduce: validation -->
<!-- reproduce: end -->
"""


def test_a_page_gets_its_tables_and_keeps_its_words(tmp_path: Path) -> None:
    summary = summarize(all_rows())
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    document(page, summary, [])
    text = page.read_text()
    assert "old" not in text
    assert "Words between." in text
    assert claims_table(summary) in text
    assert "| 512 chat users, symphony |" in text
    document(page, summary, [])
    assert page.read_text() == text, "filling it again changes nothing"
    page.write_text(PAGE.replace("speed", "sped"))
    with pytest.raises(ValueError, match=r"the page has blocks.*sped.*expected.*speed"):
        document(page, summary, [])


def test_a_broken_row_is_named_by_its_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    good = json.dumps(made_row("users", "8b", "sticky", 64, 1.0))
    path.write_text(good + "\n" + good[:40] + "\n")
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: no row"):
        read_rows(path)
    with pytest.raises(ValueError, match="no rows"):
        summarize([])


def record(
    session: str, turn: int, due: float, ttft: float, prompt: int, cached: int = 0
) -> RequestRecord:
    return RequestRecord(
        session_id=session, turn=turn, due_seconds=due, sent_seconds=due,
        latency_seconds=ttft + 0.5, ttft_seconds=ttft, prompt_tokens=prompt,
        cached=CachedTokens(device=cached),
        output_tokens=4, lead_seconds=0.3 if turn else None,
    )  # fmt: skip


def test_recorded_sessions_keep_their_pauses() -> None:
    records = [
        record("b", 1, 5.0, 0.2, 900, 800),
        record("a", 0, 0.5, 1.0, 1000),
        record("b", 0, 1.0, 2.0, 800),
    ]
    users = users_of(records)
    assert [user.start_seconds for user in users] == [0.5, 1.0]
    users[1].next_turn()
    step = users[1].next_turn()
    assert step is not None
    assert step[0].think_seconds == pytest.approx(5.0 - 3.5)
    assert (step[0].history_tokens, step[0].new_tokens) == (800, 100)


def test_prefill_speed_is_told_from_what_was_computed_meanwhile() -> None:
    # Two prompts of 1,000 tokens, sent together, at 1,000 tokens a second; then a short one.
    records = [
        record("a", 0, 0.0, 1.0, 1000),
        record("b", 0, 0.0, 2.0, 1000),
        record("a", 1, 9.0, 0.05, 1010, 990),
    ]
    rate = prefill_rate(records)
    assert rate.tokens_per_second == pytest.approx(1000.0)
    assert rate.latency_seconds == pytest.approx(0.05)
    with pytest.raises(ValueError, match="too little was computed"):
        prefill_rate(records[2:])


def test_shares_are_compared_by_difference_and_times_by_ratio() -> None:
    assert is_within("nvme", 0.0, 0.1)
    assert not is_within("device", 0.5, 0.7)
    assert is_within("ttft_seconds", 1.0, 1.14)
    assert not is_within("ttft_seconds", 1.0, 0.8)


def rates_json(gate: GateSnapshot) -> dict[str, float]:
    """As workers say it in ``GET /symphony/residency``."""
    found = {}
    for name in ("prefill", "host_to_device", "nvme_to_host"):
        rate = getattr(gate, name)
        found[f"{name}_tokens_per_second"] = rate.tokens_per_second
        found[f"{name}_latency_seconds"] = rate.latency_seconds
    return found


WORKER = Speeds(
    layers=12, token_bytes=2048, step_seconds=0.02, prefill_token_seconds=1 / 4000,
    prefill_pair_seconds=0.0, decode_base_seconds=0.015, decode_request_seconds=0.0,
    decode_context_seconds=0.0, device_tokens=8192, host_tokens=24_414, nvme_tokens=3_906_250,
    link_bytes_per_second=2e9, nvme_read_bytes_per_second=0.5e9, nvme_write_bytes_per_second=1e9,
    network_bytes_per_second=1e9, link_latency_seconds=0.001, disk_latency_seconds=0.002,
)  # fmt: skip
ROUTER_SECONDS = 0.012


def recorded_users() -> list[RecordedUser]:
    draw = random.Random(5)
    users = []
    for number in range(10):
        tokens, turns = 400 + draw.randrange(600), []
        for turn in range(8):
            pause = 0.3 * number if not turn else draw.expovariate(1 / 1.5)
            turns.append(RecordedTurn(tokens, 8, pause, min(pause, 1.0) if turn else None))
            tokens += 50 + draw.randrange(250)
        users.append(RecordedUser(number, turns))
    return users


def write_run(directory: Path, arm: str, rules: RunRules, counters: dict[str, Any]) -> None:
    """A real run's file, with a simulation in the place of the servers."""
    cluster = Cluster(rules, recorded_users())
    requests = cluster.run()
    header = Header(scenario="made", arm=arm, repetition=0, version=1, environment={})
    records = [
        RequestRecord(
                session_id=str(item.session), turn=item.turn, due_seconds=item.due_seconds,
                sent_seconds=item.due_seconds,
                latency_seconds=item.ended_seconds - item.due_seconds + ROUTER_SECONDS,
                ttft_seconds=item.ttft_seconds + ROUTER_SECONDS,
                tpot_seconds=item.tpot_seconds, prompt_tokens=item.prompt_tokens,
                cached=CachedTokens(device=item.device_tokens, host=item.host_tokens,
                                    storage=item.nvme_tokens),
                output_tokens=item.answer_tokens,
                lead_seconds=1.0 if rules.advice is not None and item.turn else None,
            )
        for item in requests
    ]  # fmt: skip
    lines: list[Any] = [header, *records]
    seconds = max(item.ended_seconds for item in requests)
    lines.append(
        End(seconds=seconds, requests=len(requests), sessions=10, requests_unsent=0, advice=None,
            counters=[counters, counters])
    )  # fmt: skip
    path = directory / f"0-{arm}.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def write_scenario(directory: Path) -> None:
    arms = (
        Arm(name="stock", server="hicache", workers=2, router="stock:round_robin"),
        Arm(name="advised", server="symphony", workers=2, router="symphony:symphony",
            advice=Advice(lead_seconds=1.0)),
    )  # fmt: skip
    scenario = Scenario(
        name="made", title="two simulated workers", baseline="stock", arm=arms,
        worker=WorkerSizes(device_tokens=8192, host_gb=0.05),
        workload=Workload(source="claude-code", sessions=10, session_requests=8, concurrency=10),
        model=Model(layers=12),
    )  # fmt: skip
    (directory / "scenario.json").write_bytes(msgspec.json.encode(scenario))


def test_two_workers_are_validated_with_the_speeds_that_they_measured(tmp_path: Path) -> None:
    """Runs whose workers are simulated themselves agree; a machine that is twice as slow as its
    workers say does too, at half the pace; an arm that is twice as slow as the baseline does not.
    """
    write_scenario(tmp_path)
    rates = rates_json(WORKER.gate())
    counters = {"levels": {"device": {"token_bytes": 2048}}, "rates": rates}
    common: dict[str, Any] = {"workers": 2, "users": UserRules(users=10), "seconds": 200.0,
                              "page_size": 16}  # fmt: skip
    slow = dataclasses.replace(
        WORKER, prefill_token_seconds=2 / 4000, step_seconds=0.04, decode_base_seconds=0.03
    )
    for stock_speeds, our_speeds, pace, agreeing in (
        (WORKER, WORKER, 1.0, 2), (slow, slow, 0.5, 2), (WORKER, slow, 1.0, 1),
    ):  # fmt: skip
        stock = RunRules(name="stock", speeds=stock_speeds, features=Features(),
                         policy="round_robin", **common)  # fmt: skip
        ours = RunRules(name="advised", speeds=our_speeds, policy="symphony", migrate=True,
                        features=Features(gate=True, protect_queued=True), advice=AdviceMix(),
                        plan_moves=True, **common)  # fmt: skip
        write_run(tmp_path, "stock", stock, {})
        write_run(tmp_path, "advised", ours, counters)
        result = validate(tmp_path, (0.5, 1.0, 2.0))
        within = result["within"]
        assert result["arms"]["stock"]["speeds"]["pace"] == pace
        assert within["ttft_seconds"] == [agreeing, 2], result["arms"]
        if stock_speeds is our_speeds:
            assert all(count == [2, 2] for count in within.values()), result["arms"]
    speeds = result["arms"]["stock"]["speeds"]
    assert speeds["from"]["prefill"] == "workers", "stock workers get the speeds of ours"
    assert speeds["prefill_tokens_per_second"] == pytest.approx(4000)
    assert "advised (2 workers)" in table(result)
    profile = tomllib.loads(speeds_toml(result))["speeds"]
    assert msgspec.convert(profile, Speeds).prefill_token_seconds == pytest.approx(1 / 4000)


def test_what_the_prefill_does_not_explain_is_overhead() -> None:
    speeds = dataclasses.replace(WORKER, step_seconds=0.05, prefill_token_seconds=0.001)
    waits = [(0.05 + 0.1 + extra, 100) for extra in (0.02, 0.02, 0.3, 1.0)]
    calibration = Calibration(speeds, {}, waits)
    assert calibration.overhead_seconds == pytest.approx(0.02)
    # A machine twice as slow as it said explains more of it.
    assert calibration.at_pace(0.5).overhead_seconds == 0.0
    assert Calibration(speeds, {}, []).overhead_seconds == 0.0
