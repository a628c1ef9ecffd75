"""The reproduction's steps: rows in, claims and figures out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmark.reproduce_plots import plot_all
from benchmark.reproduce_runs import FIGURES, read_rows, runs_of
from benchmark.reproduce_summary import PATHS, claims_table, summarize, users_at
from benchmark.reproduce_validate import is_within, prefill_rate, users_of
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
    return row | {"seed": 0, "virtual_seconds": 100.0, "wall_seconds": 1.0}


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
    assert summary["times_real_time"] == {"median": 100.0, "lowest": 100.0}
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
    names = {path.name for path in drawn}
    assert names == {"users-8b.png", "users-13b.png", "burst.png", "imbalance.png", "hints.png",
                     "ablations.png"}  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


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
