"""KV between simulated workers: by the product's planner, and never lost on the way."""

from __future__ import annotations

import dataclasses
import statistics

import pytest

from symphony_sglang.core.routing_types import AdvisoryChoice, CostParts, Reason
from symphony_sglang.sim.cluster import AdviceMix, Cluster, RunRules
from symphony_sglang.sim.hardware import MACHINES, MODELS, speeds_of
from symphony_sglang.sim.moves import WORK_HALF_LIFE_SECONDS, SessionMoves, WorkShares
from symphony_sglang.sim.users import User, UserRules
from symphony_sglang.sim.worker import Features, SimRequest

SPEEDS = dataclasses.replace(
    speeds_of(MACHINES["a100-80g"], MODELS["llama-3.1-8b"]), device_tokens=32_768
)
OURS = Features(gate=True, protect_queued=True)
QUIET = UserRules(users=1, turns=9, reading_seconds=1e6)


def make(users: UserRules = QUIET, seconds: float = 60.0, workers: int = 2) -> Cluster:
    return Cluster(
        RunRules(
            "moves", workers, SPEEDS, OURS, users, "symphony", seconds, AdviceMix(),
            migrate=True, plan_moves=True, ramp_seconds=5.0,
        )
    )  # fmt: skip


def resident(session: int = 7, tokens: int = 4096) -> tuple[Cluster, SessionMoves]:
    """Two workers of which the first served `session`."""
    cluster = make()
    cluster.workers["worker-0"].remember(session, tokens, 3)
    cluster.placement.remembered(session, tokens, "worker-0")
    cluster.loop.run(0.5)
    assert cluster.moves is not None
    return cluster, cluster.moves


def choice(worker: str, source: str | None = "worker-0") -> AdvisoryChoice:
    cost = CostParts(queue=0.1)
    return AdvisoryChoice(worker, Reason.LEAST_COST, cost, match=None, source_worker_id=source)  # type: ignore[arg-type]


def test_an_advisory_for_another_worker_moves_the_session_there() -> None:
    cluster, moves = resident()
    planned = moves.advise(7, 4096, choice("worker-1"))
    assert planned is not None
    assert (planned.cause, planned.source_id, planned.target_id) == (
        "advisory", "worker-0", "worker-1",
    )  # fmt: skip
    # 512 MiB at 3.1 GB/s: until then the source serves it.
    assert moves.early(7) == "worker-0"
    cluster.loop.run(0.6)
    assert cluster.placement.owner(7) == "worker-0"
    cluster.loop.run(0.75)
    assert moves.early(7) is None
    assert cluster.placement.owner(7) == "worker-1"
    target = cluster.workers["worker-1"]
    assert (target.host.tokens(7), target.nvme.tokens(7)) == (4096, 4096)
    assert cluster.transfers.landed_bytes == cluster.transfers.bytes == 4096 * SPEEDS.token_bytes
    # It has just moved: it stays for a while, whatever the next advisory says.
    assert moves.advise(7, 4096, choice("worker-0", "worker-1")) is None
    cluster.check()


def test_a_session_stays_where_it_is_or_where_nobody_knows_it() -> None:
    cluster, moves = resident()
    assert moves.advise(7, 4096, choice("worker-0", None)) is None
    assert moves.advise(8, 4096, choice("worker-1")) is None
    assert moves.advise(7, 4096, choice("worker-1", "worker-2")) is None, "a third has more of it"
    assert not moves.by_cause
    cluster.check()


def test_a_turn_that_comes_meanwhile_is_served_by_the_source_and_follows() -> None:
    cluster, moves = resident()
    assert moves.advise(7, 4096, choice("worker-1")) is not None
    request = SimRequest(1, 7, 3, 4196, 40, 0.55, reusable_tokens=4096)
    decision = cluster.placement.route(request, moves.early(7))
    assert decision.worker_id == "worker-0"
    moves.turn_started(7, decision)
    cluster.loop.run(2.0)  # the copy is through, the turn is not
    assert cluster.placement.owner(7) == "worker-0"
    source = cluster.workers["worker-0"]
    for level in (source.device, source.host, source.nvme):
        level.grow(7, 4352)
    moves.turn_ended(7, "worker-0")
    cluster.loop.run(3.0)
    assert cluster.placement.owner(7) == "worker-1"
    assert cluster.workers["worker-1"].nvme.tokens(7) == 4352
    moves.check()


def test_a_session_that_ends_while_it_moves_is_forgotten() -> None:
    cluster, moves = resident()
    assert moves.advise(7, 4096, choice("worker-1")) is not None
    moves.forget(7)
    cluster.loop.run(2.0)
    assert moves.early(7) is None
    moves.check()


def test_uneven_load_moves_sessions_and_evens_it() -> None:
    users = UserRules(
        users=48, turns=40, midway=True, reading_seconds=2.0, typing_seconds=1.0,
        history_tokens=3000.0, context_tokens_max=8000,
    )  # fmt: skip
    cluster = make(users, seconds=60.0, workers=4)
    # All that was said before the simulation was said to one worker.
    for user in cluster.users:
        user.number *= 4
    cluster.run()
    cluster.check()
    assert cluster.moves is not None
    assert cluster.moves.by_cause["balance"] + cluster.moves.by_cause["advisory"] > 5
    late = [request.worker for request in cluster.requests if request.due_seconds > 30]
    share = max(late.count(worker) for worker in cluster.workers) / len(late)
    assert share < 0.5, "one worker had all of them"


def test_work_halves_with_time_and_goes_with_its_session() -> None:
    shares = WorkShares()
    shares.add(1, "a", 2.0, 0.0)
    shares.add(2, "a", 1.0, WORK_HALF_LIFE_SECONDS)
    assert shares.of_worker("a", WORK_HALF_LIFE_SECONDS) == pytest.approx(2.0)
    shares.now_at(1, "b")
    assert shares.of_worker("b", WORK_HALF_LIFE_SECONDS) == pytest.approx(1.0)
    much_later = 1000 * WORK_HALF_LIFE_SECONDS
    shares.add(2, "a", 3.0, much_later)
    assert shares.of_worker("a", much_later) == pytest.approx(3.0)
    assert shares.of_worker("b", much_later) == pytest.approx(0.0)
    assert shares.sessions({"a"}, much_later) == [(2, pytest.approx(3.0))]
    shares.check()
    shares.forget(2)
    assert shares.of_worker("a", much_later) == pytest.approx(0.0)


def test_agents_wait_for_their_tools_and_are_advised_when_the_call_begins() -> None:
    rules = UserRules(
        users=1, turns=1000, tool_share=0.86, tool_seconds=33.0, tool_sigma=1.61,
        reading_seconds=1780.0, gap_sigma=2.07, context_tokens_max=10**9,
    )  # fmt: skip
    turns = []
    for number in range(20):
        user = User(number, rules, 1)
        for _ in range(200):
            step = user.next_turn()
            assert step is not None
            turns.append(step[0])
            user.answered(step[0].answer_tokens)
    tools = [turn.think_seconds for turn in turns if turn.lead_seconds == turn.think_seconds]
    people = [turn.think_seconds for turn in turns if turn.lead_seconds != turn.think_seconds]
    assert 0.8 < len(tools) / len(turns) < 0.9
    # Medians of the recorded sessions: 9 s after a tool call, 210 s after an answer.
    assert 7 < statistics.median(tools) < 11
    assert 160 < statistics.median(people) < 280
