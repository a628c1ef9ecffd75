"""Whole simulated runs: they repeat, conserve, and show what they must."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmark.reproduce_recorded import RecordedTurn, RecordedUser
from benchmark.reproduce_summary import PATHS, value_of
from symphony_sglang import cli
from symphony_sglang.core import migration_policy
from symphony_sglang.core.levels import Level
from symphony_sglang.errors import ConfigError
from symphony_sglang.sim import moves as simulated_moves
from symphony_sglang.sim.cluster import AdviceMix, Cluster, RunRules
from symphony_sglang.sim.hardware import MACHINES, MODELS, speeds_of
from symphony_sglang.sim.placement import session_hashes
from symphony_sglang.sim.results import figures
from symphony_sglang.sim.scenario import SCENARIO_DIRECTORY, load_scenario
from symphony_sglang.sim.users import UserRules
from symphony_sglang.sim.worker import Features

SPEEDS = dataclasses.replace(
    speeds_of(MACHINES["a100-80g"], MODELS["llama-3.1-8b"]), device_tokens=24_576
)
OURS = Features(gate=True, protect_queued=True)
ARMS = {
    "recompute": {
        "features": Features(prefix_cache=False, host=False, nvme=False),
        "policy": "power_of_two",
    },
    "sticky": {"features": Features(), "policy": "session_sticky"},
    "cache_aware": {"features": Features(), "policy": "cache_aware"},
    "unadvised": {"features": OURS, "policy": "symphony"},
    "advised": {
        "features": OURS,
        "policy": "symphony",
        "advice": AdviceMix(missing_share=0.2, false_share=0.3),
        "migrate": True,
        "plan_moves": True,
    },
    "paper": {
        "features": Features(),
        "policy": "symphony-paper",
        "advice": AdviceMix(),
        "migrate": True,
    },
}


USERS = UserRules(users=40, reading_seconds=5.0, typing_seconds=3.0)


def run(arm: str, seed: int = 0, **changes: object) -> Cluster:
    rules = RunRules(
        name=arm,
        workers=2,
        speeds=SPEEDS,
        seed=seed,
        **{"users": USERS, "seconds": 90.0, **ARMS[arm], **changes},  # type: ignore[arg-type]
    )
    cluster = Cluster(rules)
    cluster.run()
    return cluster


@pytest.mark.parametrize("arm", ARMS)
def test_every_request_ends_once_and_all_books_balance(arm: str) -> None:
    cluster = run(arm)
    cluster.check()
    assert len(cluster.requests) > 150
    assert {request.worker for request in cluster.requests} == {"worker-0", "worker-1"}


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    def story(cluster: Cluster) -> list[tuple[object, ...]]:
        return [dataclasses.astuple(request) for request in cluster.requests]

    assert story(run("advised")) == story(run("advised"))
    assert story(run("advised")) != story(run("advised", seed=1))


def test_equal_seeds_give_equal_rows_in_any_process(tmp_path: Path) -> None:
    """String hashes differ from process to process, and with them the order of sets."""
    rows = []
    for number in ("1", "2"):
        output = tmp_path / f"{number}.jsonl"
        words = ["simulate", "small", "--arm", "symphony", "--users", "12", "--seconds", "45"]
        subprocess.run(
            [sys.executable, "-m", "symphony_sglang.cli", *words, "--output", str(output)],
            env={**os.environ, "PYTHONHASHSEED": number},
            check=True,
            capture_output=True,
        )
        row = json.loads(output.read_text())
        assert row.pop("speed") > 0
        rows.append(row)
    assert rows[0] == rows[1]
    assert rows[0]["requests"] > 0


def test_what_decides_is_the_products_own_code() -> None:
    cluster = run("advised", seconds=10.0)
    placement, moves = cluster.placement, cluster.moves
    assert moves is not None
    assert simulated_moves.plan_migrations is migration_policy.plan_migrations
    deciding = [placement.policy, placement.index, placement.loads]
    for worker in cluster.workers.values():
        assert worker.promotions is not None
        deciding += [worker.promotions.promoter, worker.gate]
    modules = {type(part).__module__ for part in deciding}
    assert all(name.startswith("symphony_sglang.core.") for name in modules), modules


@pytest.mark.parametrize("channel", ["link", "disk", "network"])
def test_a_byte_that_nobody_asked_for_is_found_out(channel: str) -> None:
    cluster = run("advised", seconds=30.0)
    cluster.check()
    getattr(cluster.workers["worker-1"], channel).bytes += 1
    with pytest.raises(AssertionError):
        cluster.check()


def test_a_page_that_the_router_only_believes_in_is_found_out() -> None:
    cluster = run("unadvised", seconds=30.0)
    cluster.check()
    first, second = cluster.workers.values()
    alone = next(name for name in first.nvme.sessions() if not second.nvme.tokens(name))
    pages = session_hashes(alone, 1).tolist()
    cluster.placement.index.stored(second.name, Level.NVME, pages)
    with pytest.raises(AssertionError):
        cluster.check()


def test_recompute_finds_nothing_and_caches_find_what_was_said() -> None:
    assert all(r.computed_tokens == r.prompt_tokens for r in run("recompute").requests)
    found = run("sticky").requests
    share = sum(r.computed_tokens for r in found) / sum(r.prompt_tokens for r in found)
    assert share < 0.5


def test_advised_sessions_are_on_the_device_more_often_than_unadvised_ones() -> None:
    def device_share(arm: str) -> float:
        returning = [request for request in run(arm).requests if request.turn]
        prompt = sum(request.prompt_tokens for request in returning)
        return sum(request.device_tokens for request in returning) / prompt

    assert device_share("advised") > 1.1 * device_share("unadvised")


def test_without_hints_an_advised_arm_is_the_unadvised_one() -> None:
    none = run("unadvised", advice=AdviceMix(missing_share=1.0), migrate=False)
    plain = run("unadvised")
    assert none.counts.advisories == 0
    assert [r.ttft_seconds for r in none.requests] == [r.ttft_seconds for r in plain.requests]


def test_open_loop_conversations_come_at_their_rate_and_end() -> None:
    users = UserRules(users=0, turns=2, session_rate=2.0, arrival_variation=2.0, typing_seconds=1.0)
    cluster = run("advised", users=dataclasses.replace(users, reading_seconds=1.0))
    cluster.check()
    begun = {request.session for request in cluster.requests}
    assert 100 < len(begun) < 300  # 2 a second for 90 s, in bursts
    assert {request.turn for request in cluster.requests} >= {0, 1}


def test_recorded_users_are_replayed_to_the_end() -> None:
    turns = [RecordedTurn(500 + 60 * n, 8, 1.0 + n, 0.5 if n else None) for n in range(5)]
    users = [RecordedUser(number, turns) for number in range(6)]
    cluster = Cluster(
        RunRules("recorded", 2, SPEEDS, OURS, UserRules(users=6), "symphony", 600.0,
                 AdviceMix(), page_size=16),
        users,
    )  # fmt: skip
    requests = cluster.run()
    cluster.check()
    assert len(requests) == 30
    assert cluster.counts.advisories == 24
    later = [request for request in requests if request.turn]
    assert all(request.device_tokens >= 480 for request in later)


def test_a_session_that_went_elsewhere_has_no_advisory_left_behind() -> None:
    cluster = run("advised", policy="power_of_two", advice=AdviceMix())
    served: dict[str, float] = {}
    for request in cluster.requests:
        served[str(request.session)] = max(served.get(str(request.session), 0), request.due_seconds)
    withdrawn = 0
    for worker in cluster.workers.values():
        assert worker.promotions is not None
        book = worker.promotions.promoter.book
        for view in book.views():
            advisory = book.get(view.advisory_id)
            assert advisory is not None
            session = advisory.request.session_id
            assert session is not None
            assert view.received_seconds > served[session], "for a turn still to come"
        withdrawn += worker.promotions.promoter.outcomes.as_json(0.0)["outcomes"]["cancelled"]
    assert withdrawn > 20


def test_virtual_time_takes_few_events() -> None:
    """What a run costs is its events: some dozen for each request, none for decode steps."""
    for arm in ("recompute", "sticky", "advised"):
        cluster = run(arm)
        tokens = sum(request.answer_tokens for request in cluster.requests)
        assert cluster.loop.events < 40 * len(cluster.requests)
        assert cluster.loop.events < tokens / 5


def test_a_thousand_sessions_on_eight_workers_cost_events_only_when_they_speak() -> None:
    """An idle session costs nothing; beside the requests only the workers' reports do."""
    scenario = load_scenario("coding")
    rules = next(rules for rules in scenario.runs() if rules.name == "symphony")
    assert (rules.workers, rules.users.users) == (8, 1000)
    cluster = Cluster(dataclasses.replace(rules, seconds=20.0))
    cluster.run()
    seconds, requests = cluster.loop.now_seconds, len(cluster.requests)
    assert requests > 5
    owners = [cluster.placement.owner(user.session) for user in cluster.users]
    assert sum(owner is not None for owner in owners) > 900
    beside = 6 * rules.workers * seconds  # reports, rounds, expiry
    assert cluster.loop.events < beside + 40 * requests


def test_rows_have_what_the_reproduction_reads() -> None:
    row = figures(run("advised"), 30.0)
    for path in PATHS:
        assert value_of(row, path) >= 0
    json.dumps(row)


def test_packaged_scenarios_load_and_the_command_writes_what_it_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in SCENARIO_DIRECTORY.glob("*.toml"):
        assert load_scenario(path.stem).runs()
    output = tmp_path / "rows.jsonl"
    words = ["simulate", "small", "--arm", "symphony", "--users", "10", "--output", str(output)]
    assert cli.main(words) == 0
    row = json.loads(output.read_text())
    assert row["arm"] == "symphony"
    assert row["users"] == 10
    assert sum(row["token_share"].values()) == pytest.approx(1.0)
    ended = sum(row["advisories"]["outcomes"].values())
    assert 0 < ended <= row["advisories"]["sent"]
    assert "(simulated)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('policy = "session_sticky"', 'policy = "sticky"'), "expected one of .*session_sticky"),
        (("workers = 2", "wrokers = 2"), "unknown field `wrokers`"),
        (("workers = 2", "workers = 0"), "workers is 0; expected 1 to 1024"),
        (("warm_seconds = 30.0", "warm_seconds = 300.0"), "warm_seconds is 300; expected less"),
        (('machine = "a100-80g"', 'machine = "a100"'), "profile 'a100'; expected one of"),
        (('machine = "a100-80g"', 'machine = "h200"\ndisk = "ssd"'), "'ssd'; expected one of nvme"),
        (("device_tokens = 24576", "device_tokens = 900"), "expected at most the device level's"),
        (('name = "sticky"', 'name = "recompute"'), "each name once"),
    ],
)
def test_a_wrong_scenario_is_refused_by_name_and_value(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    text = (SCENARIO_DIRECTORY / "small.toml").read_text()
    path = tmp_path / "wrong.toml"
    path.write_text(text.replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_scenario(str(path))


def test_a_scenario_can_put_other_parts_into_a_machine(tmp_path: Path) -> None:
    text = (SCENARIO_DIRECTORY / "small.toml").read_text()
    path = tmp_path / "parts.toml"
    parts = 'machine = "h200"\nlink = "pcie-4.0-x16"\ndisk = "nvme"\nnetwork = "100gbe-quarter"'
    path.write_text(text.replace('machine = "a100-80g"', parts))
    speeds = load_scenario(str(path)).worker_speeds()
    assert speeds.link_bytes_per_second == 25e9
    assert speeds.nvme_read_bytes_per_second == 3.2e9
    assert speeds.network_bytes_per_second == 3.1e9
    assert speeds.prefill_token_seconds < SPEEDS.prefill_token_seconds


def test_an_unknown_scenario_names_the_packaged_ones() -> None:
    with pytest.raises(ConfigError, match="packaged: coding, paper-13b, paper-8b, small"):
        load_scenario("nowhere")
