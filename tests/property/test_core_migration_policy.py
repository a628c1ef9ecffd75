"""Plans keep to their budgets, and carrying them out comes to rest."""

from __future__ import annotations

import random
import statistics

from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.migration import MoveCause
from symphony_sglang.core.migration_policy import (
    AdvisedMove,
    Cluster,
    CopyCause,
    HotPrefix,
    MigrationLimits,
    MovableSession,
    Node,
    Wait,
    plan_migrations,
)
from symphony_sglang.core.routing_types import WorkerState

LIMITS = MigrationLimits(link_bytes_max=1000, transfers_max=12, replica_bytes_max=900)
STATES = [WorkerState.READY] * 4 + [WorkerState.DRAINING, WorkerState.UNHEALTHY]


def some_cluster(seed: int) -> Cluster:
    source = random.Random(seed)
    names = [f"w{number}" for number in range(source.randint(1, 6))]
    nodes = [
        Node(name, source.uniform(0, 20), source.randint(0, 5000), source.choice(STATES),
             source.random() < 0.2)
        for name in names
    ]  # fmt: skip
    sessions = [
        MovableSession(
            f"s{number}", source.choice(names), 100, source.randint(1, 1500),
            source.uniform(0, 3), source.random() < 0.4, source.random() < 0.3,
            source.uniform(0, 100), source.choice([1.0, 50.0, float("inf")]),
        )
        for number in range(source.randint(0, 30))
    ]  # fmt: skip
    advised = [
        AdvisedMove(f"s{source.randrange(35)}", source.choice(names), source.uniform(-1, 2))
        for _ in range(source.randint(0, 8))
    ]
    prefixes = []
    for number in range(source.randint(0, 6)):
        holders = frozenset(source.sample(names, source.randint(1, len(names))))
        replicas = frozenset(source.sample(sorted(holders), len(holders) - 1))
        prefixes.append(HotPrefix(number, 50, source.randint(1, 500),
                                  source.uniform(0, 30), holders, replicas))  # fmt: skip
    return Cluster(
        nodes,
        sessions,
        advised,
        prefixes,
        in_flight={(source.choice(names), source.choice(names)): source.randint(0, 1200)},
        demand=frozenset(source.sample(names, source.randint(0, min(2, len(names))))),
        moving=frozenset({f"s{source.randrange(35)}"}),
        copying=frozenset({(source.randrange(6), source.choice(names))}),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9))
def test_a_plan_keeps_every_bound(seed: int) -> None:
    cluster = some_cluster(seed)
    plan = plan_migrations(cluster, LIMITS)
    assert plan == plan_migrations(cluster, LIMITS)
    states = {node.worker_id: node.state for node in cluster.nodes}
    sessions = {session.session_id: session for session in cluster.sessions}
    moved = [move.session_id for move in plan.moves]
    assert len(set(moved)) == len(moved)
    assert len(plan.moves) + len(plan.copies) <= LIMITS.transfers_max
    link, arriving = dict(cluster.in_flight), dict.fromkeys(states, 0)
    for transfer in (*plan.moves, *plan.copies):
        pair = (transfer.source_id, transfer.target_id)
        assert transfer.source_id != transfer.target_id
        assert states[transfer.target_id] is WorkerState.READY
        before = link.get(pair, 0)
        link[pair] = before + transfer.bytes
        assert link[pair] <= LIMITS.link_bytes_max or not before
        arriving[transfer.target_id] += transfer.bytes
        urgent = getattr(transfer, "cause", None) in (MoveCause.DRAIN, MoveCause.ADVISORY)
        assert urgent or cluster.demand.isdisjoint(pair)
    for node in cluster.nodes:
        assert arriving[node.worker_id] <= node.room_bytes
    for move in plan.moves:
        session = sessions[move.session_id]
        assert not session.busy
        assert move.session_id not in cluster.moving
        assert move.source_id == session.worker_id
        if move.cause is not MoveCause.DRAIN:
            assert session.moved_ago_seconds >= LIMITS.cooldown_seconds
        if move.cause is MoveCause.DRAIN:
            assert states[move.source_id] is WorkerState.DRAINING
    for prefix in cluster.prefixes:
        dropped = {d.worker_id for d in plan.drops if d.page_hash == prefix.page_hash}
        copied = {c.target_id for c in plan.copies if c.page_hash == prefix.page_hash}
        assert dropped <= prefix.replicas
        assert not copied & prefix.holders
        assert not (dropped and copied and any(
            c.cause is CopyCause.HOT for c in plan.copies if c.page_hash == prefix.page_hash
        ))  # fmt: skip
        ready = {name for name in prefix.holders if states[name] is WorkerState.READY}
        assert not dropped or ready - dropped


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**9), skew=st.floats(1.0, 6.0))
def test_balancing_lowers_the_worst_and_comes_to_rest(seed: int, skew: float) -> None:
    source = random.Random(seed)
    names = [f"w{number}" for number in range(4)]
    where = {f"s{number}": names[min(3, int(4 * source.random() ** skew))] for number in range(60)}
    work = {name: source.uniform(0.05, 0.6) for name in where}
    limits = MigrationLimits(transfers_max=5)
    worst = []
    for _ in range(40):
        load = dict.fromkeys(names, 0.0)
        for session_id, worker_id in where.items():
            load[worker_id] += work[session_id]
        worst.append(max(load.values()))
        cluster = Cluster(
            [Node(name, load[name], 10**9) for name in names],
            [MovableSession(s, w, 10, 10, work[s]) for s, w in where.items()],
        )
        plan = plan_migrations(cluster, limits)
        if not plan.moves:
            break
        for move in plan.moves:
            assert move.cause is MoveCause.BALANCE
            where[move.session_id] = move.target_id
    assert not plan.moves, "it goes on for ever"
    assert worst == sorted(worst, reverse=True)
    middle = statistics.median(load.values())
    bound = max(limits.imbalance_ratio * middle, middle + limits.imbalance_seconds)
    assert max(load.values()) <= bound + max(work.values())


def test_a_drain_empties_the_worker_and_waits_for_running_turns() -> None:
    nodes = [
        Node("old", 5.0, 0, WorkerState.DRAINING),
        Node("a", 1.0, 10**6),
        Node("b", 2.0, 10**6),
    ]
    sessions = [
        MovableSession(f"s{n}", "old", 10, 10, 0.5, busy=n == 0, moved_ago_seconds=1.0)
        for n in range(6)
    ]
    plan = plan_migrations(Cluster(nodes, sessions), MigrationLimits())
    assert {move.session_id for move in plan.moves} == {f"s{n}" for n in range(1, 6)}
    assert {move.target_id for move in plan.moves} == {"a", "b"}
    assert plan.waiting == {Wait.BUSY: 1}
    alone = plan_migrations(Cluster(nodes[:1], sessions), MigrationLimits())
    assert not alone.moves
    assert alone.waiting == {Wait.BUSY: 1, Wait.NO_TARGET: 5}


def test_advised_sessions_go_first_and_plans_make_way_for_demand() -> None:
    nodes = [Node("hot", 9.0, 0), Node("a", 0.0, 10**6), Node("b", 0.5, 10**6)]
    sessions = [
        MovableSession(f"s{n}", "hot", 10, 10, 1.0, advised=n == 3, idle_seconds=n)
        for n in range(5)
    ]
    plan = plan_migrations(Cluster(nodes, sessions), MigrationLimits(transfers_max=1))
    assert plan.moves[0].session_id == "s3"
    held = plan_migrations(Cluster(nodes, sessions, demand=frozenset({"hot"})), MigrationLimits())
    assert not held.moves
    assert held.waiting[Wait.DEMAND] > 0
    advised = [AdvisedMove("s1", "b", 0.5), AdvisedMove("s2", "b", 0.001)]
    followed = plan_migrations(
        Cluster(nodes, sessions, advised, demand=frozenset({"hot"})), MigrationLimits()
    )
    assert [(m.session_id, m.target_id, m.cause) for m in followed.moves] == [
        ("s1", "b", MoveCause.ADVISORY)
    ]


def test_hot_prefixes_spread_by_rate_and_are_dropped_when_cold() -> None:
    nodes = [Node(name, load, 10**6) for name, load in (("a", 3.0), ("b", 1.0), ("c", 2.0))]
    hot = HotPrefix(7, 100, 100, 9.0, frozenset({"a"}))
    plan = plan_migrations(Cluster(nodes, prefixes=[hot]), MigrationLimits())
    assert [(c.source_id, c.target_id, c.cause) for c in plan.copies] == [
        ("a", "b", CopyCause.HOT),
        ("a", "c", CopyCause.HOT),
    ]
    everywhere = frozenset("abc")
    for rate, dropped in ((9.0, []), (3.0, ["c"]), (0.0, ["c", "b"])):
        cooled = HotPrefix(7, 100, 100, rate, everywhere, frozenset("bc"))
        plan = plan_migrations(Cluster(nodes, prefixes=[cooled]), MigrationLimits())
        assert [drop.worker_id for drop in plan.drops] == dropped
        assert not plan.copies


def test_a_new_worker_is_warmed_with_the_hottest_that_fit() -> None:
    nodes = [Node("a", 3.0, 10**6), Node("new", 0.0, 10**6, joined=True)]
    prefixes = [
        HotPrefix(n, 100, 300, rate, frozenset({"a"})) for n, rate in enumerate((0.5, 3.0, 2.0))
    ]
    plan = plan_migrations(Cluster(nodes, prefixes=prefixes), MigrationLimits(warm_bytes_max=700))
    assert [(c.page_hash, c.target_id, c.cause) for c in plan.copies] == [
        (1, "new", CopyCause.WARM),
        (2, "new", CopyCause.WARM),
    ]
