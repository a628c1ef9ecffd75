"""The benchmark harness: scenarios, generated workloads, raw files, figures and the report."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from benchmark import report
from benchmark.runner import End, Header, is_complete, pending_runs, read_run, run_path
from benchmark.scenario import SCENARIO_DIRECTORY, Workload, load_scenario, narrowed
from benchmark.statistics import compare, lookup, percentiles, run_figures, spread_of
from benchmark.workloads import sessions_of
from symphony_sglang.errors import ConfigError
from symphony_sglang.workload.generate_client import CachedTokens
from symphony_sglang.workload.replay_driver import RequestRecord
from symphony_sglang.workload.traces import BlockPrompt

SCENARIO = """
name = "t"
title = "two arms"
baseline = "stock"
repetitions = 2
[worker]
device_tokens = 1000
host_gb = 0.1
[workload]
source = "conversations"
sessions = 2
session_requests = 2
concurrency = 2
[[arm]]
name = "stock"
server = "hicache"
[[arm]]
name = "ours"
server = "symphony"
advice = { lead_seconds = 0.5 }
"""


def record(turn: int, ttft: float, **changes: Any) -> RequestRecord:
    fields: dict[str, Any] = {
        "session_id": "s",
        "turn": turn,
        "due_seconds": 10.0 * turn,
        "sent_seconds": 10.0 * turn,
        "latency_seconds": ttft + 1.0,
        "ttft_seconds": ttft,
        "tpot_seconds": 0.1,
        "prompt_tokens": 100,
        "cached": CachedTokens(device=40, host=20, storage=10),
        "output_tokens": 8,
    }
    return RequestRecord(**{**fields, **changes})


def end(seconds: float = 20.0, **changes: Any) -> End:
    fields: dict[str, Any] = {
        "seconds": seconds,
        "requests": 3,
        "sessions": 1,
        "requests_unsent": 0,
        "advice": None,
        "counters": [],
        "totals": [{"requests": 3.0}, {"requests": 1.0}],
    }
    return End(**{**fields, **changes})


def figures(records: list[RequestRecord], **changes: Any) -> dict[str, Any]:
    return run_figures(records, end(**changes), returning_only=True, slo_ttft_seconds=0.5)


def test_percentiles_by_hand_and_no_p99_of_few() -> None:
    found = percentiles([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found["n"], found["mean"], found["p50"], found["p90"]) == (5, 3.0, 3.0, 4.6)
    assert found["p99"] is None
    assert percentiles([float(i) for i in range(101)])["p99"] == 99.0
    assert percentiles([]) == {"n": 0, "mean": None, "p50": None, "p90": None, "p99": None}


def test_a_run_counts_returning_turns_and_waits_for_a_place() -> None:
    records = [
        record(0, 9.0),
        record(1, 0.2),
        # Sent two seconds after it was due: its caller waited that long too.
        record(2, 0.4, sent_seconds=22.0),
        record(3, 0.1, error="boom"),
    ]
    found = figures(records)
    assert found["ttft_seconds"]["n"] == 2
    assert found["ttft_seconds"]["mean"] == pytest.approx((0.2 + 2.4) / 2)
    assert found["failed"] == 1
    assert found["requests_per_second"] == pytest.approx(3 / 20)
    assert found["goodput_per_second"] == pytest.approx(1 / 20)
    assert found["within_slo_share"] == pytest.approx(0.5)
    assert found["hit_share"] == {"device": 0.4, "host": 0.2, "storage": 0.1}
    assert found["computed_share"] == pytest.approx(0.3)
    assert found["saturated"] is False


def test_a_run_that_queues_at_the_client_is_flagged() -> None:
    late = [record(turn, 0.1, sent_seconds=10.0 * turn + 5.0) for turn in (1, 2)]
    assert figures(late)["saturated"] is True


def test_ratios_pair_repetitions_and_keep_the_extremes() -> None:
    def run(ttft: float) -> dict[str, Any]:
        return figures([record(1, ttft), record(2, ttft)])

    runs = {
        "stock": {0: run(0.4), 1: run(0.6), 2: run(0.5)},
        "ours": {0: run(0.1), 1: run(0.3), 2: run(0.1)},
    }
    ratios = compare(runs, "stock")
    assert ratios["ours"]["ttft_seconds.p90"] == pytest.approx(
        {"median": 4.0, "low": 2.0, "high": 5.0, "n": 3}
    )
    assert ratios["stock"]["ttft_seconds.p90"]["median"] == pytest.approx(1.0)
    assert ratios["ours"]["requests_per_second"]["median"] == pytest.approx(1.0)
    assert lookup({"a": {"b": 2}}, "a.b") == 2.0
    assert lookup({"a": {"b": 2}}, "a.c") is None
    assert spread_of([None, float("nan")]) == {"median": None, "low": None, "high": None, "n": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("sessions = 2", "sesions = 2"), "unknown field `sesions`"),
        (('server = "hicache"', 'server = "vllm"'), "Invalid enum value 'vllm'"),
        (('baseline = "stock"', 'baseline = "x"'), "baseline is 'x'; expected one of"),
        (("repetitions = 2", "repetitions = 0"), "repetitions is 0; expected at least 1"),
        (('name = "ours"', 'name = "stock"'), "each once"),
        (('server = "symphony"', 'server = "device"'), "only symphony servers can be"),
        (('name = "ours"', 'name = "ours"\nworkers = 2'), "expected one worker, or a router"),
        (("[worker]", "[worker"), "Expected"),
    ],
)
def test_a_wrong_scenario_is_refused(tmp_path: Path, change: tuple[str, str], message: str) -> None:
    path = tmp_path / "s.toml"
    path.write_text(SCENARIO.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_scenario(str(path))


def test_the_scenarios_here_load_and_an_unknown_one_names_them() -> None:
    names = [path.stem for path in SCENARIO_DIRECTORY.glob("*.toml")]
    assert all(load_scenario(name).name == name for name in names)
    with pytest.raises(ConfigError, match=r"known: .*pressure"):
        load_scenario("nowhere")


def test_arms_run_the_other_way_round_every_other_time(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    scenario = load_scenario(str(tmp_path / "s.toml"))
    order = [(repetition, arm.name) for repetition, arm in pending_runs(scenario, tmp_path)]
    assert order == [(0, "stock"), (0, "ours"), (1, "ours"), (1, "stock")]


def write_run(directory: Path, arm: str, repetition: int, ttft: float, *, whole: bool) -> None:
    header = Header(scenario="t", arm=arm, repetition=repetition, version=1, environment={
        "commit": "abc"
    })  # fmt: skip
    items: list[Any] = [header, record(0, 1.0), record(1, ttft), record(2, ttft)]
    if whole:
        items.append(end())
    path = directory / f"{repetition}-{arm}.jsonl"
    path.write_bytes(b"".join(msgspec.json.encode(item) + b"\n" for item in items))


def test_runs_are_resumed_summarized_and_reported_from_files_alone(tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(SCENARIO)
    scenario = load_scenario(str(tmp_path / "s.toml"))
    (tmp_path / "scenario.json").write_bytes(msgspec.json.encode(scenario))
    for repetition in (0, 1):
        write_run(tmp_path, "stock", repetition, 0.4, whole=True)
        write_run(tmp_path, "ours", repetition, 0.1, whole=repetition == 0)
    # The run that broke off is to be done again; the others are not.
    assert [(n, arm.name) for n, arm in pending_runs(scenario, tmp_path)] == [(1, "ours")]
    broken = run_path(tmp_path, 1, scenario.arm[1])
    assert not is_complete(broken)
    with pytest.raises(ValueError, match=r"1-ours\.jsonl: not a complete run"):
        read_run(broken)
    with pytest.raises(ValueError, match="not a complete run"):
        report.summarize(tmp_path)
    write_run(tmp_path, "ours", 1, 0.1, whole=True)
    summary = report.summarize(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert summary["ratios"]["ours"]["ttft_seconds.p90"]["median"] == pytest.approx(4.0)
    text = report.report(tmp_path)
    assert "| ours | 100 | 100 | 100 | 0.15 | 40 / 20 / 10 / 30 | 1.50 | 4.00 | 1.00 |" in text
    assert (tmp_path / "ttft.png").stat().st_size > 10_000


def test_generated_sessions_repeat_grow_and_share_only_what_they_should() -> None:
    work = Workload(
        source="conversations",
        sessions=5,
        session_requests=4,
        concurrency=1,
        shared_prefix_tokens=64,
    )
    one, again = list(sessions_of(work, {})), list(sessions_of(work, {}))
    assert one == again
    prompts = [[turn.prompt for turn in session.turns] for session in one]
    for own in prompts:
        assert all(isinstance(prompt, BlockPrompt) for prompt in own)
        for before, after in itertools.pairwise(own):
            assert after.block_ids[: len(before.block_ids)] == before.block_ids
            assert len(after.block_ids) > len(before.block_ids)
    common = set(prompts[0][0].block_ids) & set(prompts[1][0].block_ids)
    assert len(common) == 4
    fresh = list(sessions_of(msgspec.structs.replace(work, source="no-reuse"), {}))
    ids = [block for session in fresh for turn in session.turns for block in turn.prompt.block_ids]
    assert len(ids) == len(set(ids))


def test_sessions_are_joined_in_the_middle(tmp_path: Path) -> None:
    def request(tokens: int) -> dict[str, Any]:
        blocks = list(range(1, tokens // 64 + 1))
        return {"t": 0.0, "type": "s", "model": "m", "in": tokens, "out": 1, "hash_ids": blocks}

    lines: list[dict[str, Any]] = [
        {"id": name, "block_size": 64, "requests": [request(64 * n) for n in range(1, turns + 1)]}
        for name, turns in (("short", 2), ("long", 5))
    ]
    for after in (2, 4):  # sub-agents, of the second and the fourth turn
        child = {"t": 0.0, "agent_id": f"x{after}", "requests": [request(64)]}
        lines[1]["requests"].insert(after + (after > 2), child)
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = Workload(
        source="claude-code", sessions=9, session_requests=9, concurrency=1, skip_turns=2
    )
    (session,) = sessions_of(work, {"claude-code": trace})
    assert [turn.prompt.tokens for turn in session.turns] == [192, 256, 320]
    assert [(child.session_id, child.parent_turn) for child in session.subagents] == [
        ("long/x4", 1)
    ]


def test_every_other_session_of_an_uneven_trace_pauses_longer(tmp_path: Path) -> None:
    def request(think: float) -> dict[str, Any]:
        head = {"t": 0.0, "type": "s", "model": "m", "in": 64, "out": 1, "hash_ids": [1]}
        return {**head, "think_time": think}

    lines = [{"id": n, "block_size": 64, "requests": [request(0), request(2)]} for n in "abc"]
    trace = tmp_path / "trace.jsonl"
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    work = Workload(source="claude-code", sessions=3, session_requests=2, concurrency=1, uneven=3.0)
    pauses = [
        session.turns[1].think_seconds for session in sessions_of(work, {"claude-code": trace})
    ]
    assert pauses == [2.0, 6.0, 2.0]


def test_a_trace_that_was_not_given_is_asked_for_by_name() -> None:
    work = Workload(source="mooncake", sessions=1, session_requests=1, concurrency=1)
    with pytest.raises(ConfigError, match="--trace FAMILY=FILE"):
        list(sessions_of(work, {}))


def test_a_scenario_is_narrowed_to_arms_and_users_and_says_so() -> None:
    fleet = load_scenario("fleet")
    narrow = narrowed(fleet, 1, "recompute,advised", 4)
    assert (narrow.name, narrow.repetitions, narrow.baseline) == ("fleet-4-users", 1, "recompute")
    assert [arm.name for arm in narrow.arm] == ["recompute", "advised"]
    assert (narrow.workload.sessions, narrow.workload.concurrency) == (4, 4)
    assert narrowed(fleet, None, None, None) == fleet
    with pytest.raises(ConfigError, match="nobody"):
        narrowed(fleet, None, "recompute,nobody", None)
    with pytest.raises(ConfigError, match="--users is 0"):
        narrowed(fleet, None, None, 0)
