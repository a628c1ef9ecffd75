"""Laws of the planner on arbitrary inputs, and its order in small cases."""

from __future__ import annotations

import dataclasses
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.gate import OPEN_GATE, GateSnapshot, Rate
from symphony_sglang.core.levels import Level, Target
from symphony_sglang.core.lifecycle import AdvisoryView, Kind, State
from symphony_sglang.core.moves import Reason
from symphony_sglang.core.promotion import (
    EMPTY_PLAN,
    IDLE,
    Clip,
    Demand,
    Flight,
    LevelBudget,
    PlannerLimits,
    plan_step,
)

PAGE = 4
LIMITS = PlannerLimits(page_size=PAGE, chunk_pages=4)
MUCH = 10_000


def view(advisory_id: str, arrival: int = 1, **changes: object) -> AdvisoryView:
    base = AdvisoryView(
        advisory_id=advisory_id,
        arrival=arrival,
        kind=Kind.PREFETCH,
        target=Target.DEVICE,
        state=State.QUEUED,
        priority=0,
        received_seconds=0.0,
        deadline_seconds=None,
        not_before_seconds=0.0,
        goal_tokens=16,
        device_tokens=0,
        host_tokens=16,
        storage_end_tokens=None,
        started=False,
        staging=False,
        loading=False,
    )
    return dataclasses.replace(base, **changes)


def budget(cap=MUCH, held=0, room=MUCH, lengths=None) -> LevelBudget:
    return LevelBudget(cap, held, room, {} if lengths is None else lengths)


def plan(views, *, device=None, host=None, demand=IDLE, flight=None, gate=OPEN_GATE, now=1.0):
    return plan_step(
        views,
        device=device or budget(),
        host=host or budget(),
        demand=demand,
        flight=flight or Flight(),
        gate=gate,
        limits=LIMITS,
        now_seconds=now,
    )


@st.composite
def many_views(draw):
    views = []
    for arrival in range(draw(st.integers(0, 12))):
        goal = PAGE * draw(st.integers(1, 10))
        device = draw(st.integers(0, goal))
        host = draw(st.integers(0, goal - device))
        known = draw(st.booleans())
        ready = known and device + host >= goal and draw(st.booleans())
        state = State.READY if ready else draw(st.sampled_from([State.QUEUED, State.STAGING]))
        views.append(
            view(
                f"a{arrival}",
                arrival,
                kind=draw(st.sampled_from([*Kind, Kind.PREFETCH])),
                target=draw(st.sampled_from(Target)),
                state=state,
                priority=draw(st.integers(-2, 2)),
                deadline_seconds=draw(st.none() | st.floats(0, 20)),
                not_before_seconds=draw(st.sampled_from([0.0, 0.0, 5.0])),
                goal_tokens=goal,
                device_tokens=device if known else None,
                host_tokens=host if known else 0,
                storage_end_tokens=draw(st.none() | st.integers(0, goal)),
                started=draw(st.booleans()),
                staging=draw(st.booleans()),
                loading=draw(st.booleans()),
            )
        )
    return views


@st.composite
def budgets(draw, views):
    lengths = {
        v.advisory_id: draw(st.integers(1, v.goal_tokens)) for v in views if draw(st.booleans())
    }
    # Shared heads: what is held in all is at most the sum of the lengths.
    held = draw(st.integers(max(lengths.values(), default=0), sum(lengths.values())))
    return budget(held + draw(st.integers(0, 60)), held, draw(st.integers(-5, 80)), lengths)


@st.composite
def inputs(draw):
    views = draw(many_views())
    numbers = st.sampled_from([0, 0, 0, 1, 3])
    return {
        "views": views,
        "device": draw(budgets(views)),
        "host": draw(budgets(views)),
        "demand": Demand(draw(numbers), draw(numbers), draw(numbers)),
        "flight": Flight(draw(numbers), draw(st.sampled_from([0, 0, 1]))),
        "gate": draw(st.sampled_from([OPEN_GATE, GateSnapshot(Rate(10), Rate(50), Rate(20, 0.1))])),
    }


def decide(given_inputs, views=None):
    rest = {key: value for key, value in given_inputs.items() if key != "views"}
    return plan(given_inputs["views"] if views is None else views, **rest)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(inputs(), st.randoms(use_true_random=False))
def test_planner_laws(case, rng: random.Random):
    result = decide(case)
    views = {v.advisory_id: v for v in case["views"]}
    shuffled = list(case["views"])
    rng.shuffle(shuffled)
    assert decide(case, shuffled) == result, "the order of the input does not matter"

    moves = (*result.stages, *result.loads)
    keys = [(move.advisory_id, move.hop) for move in moves]
    assert len(keys) == len(set(keys)), "one move per advisory and hop"
    for move in moves:
        it = views[move.advisory_id]
        assert 0 <= move.start_tokens < move.stop_tokens <= it.goal_tokens
        assert move.tokens <= LIMITS.chunk_tokens
        assert it.kind is Kind.PREFETCH
        assert it.not_before_seconds <= 1.0
        assert it.state is not State.READY
    for move in result.stages:
        assert move.start_tokens == views[move.advisory_id].upper_tokens
        assert not views[move.advisory_id].staging
    for move in result.loads:
        it = views[move.advisory_id]
        assert move.start_tokens == it.device_tokens
        assert move.stop_tokens <= it.upper_tokens
        assert not it.loading
        assert it.target is Target.DEVICE
    check_demand_first(case, result)
    check_budgets(case, result)
    dropped = {drop.advisory_id for drop in result.drops}
    assert not dropped & {move.advisory_id for move in moves}
    assert not any(views[name].staging or views[name].loading for name in dropped)
    assert len(result.probes) <= LIMITS.probes_max
    assert len(result.drops) <= LIMITS.drops_max


def check_demand_first(case, result) -> None:
    demand, flight = case["demand"], case["flight"]
    if demand.requests_waiting or demand.loads_pending or flight.loads:
        assert not result.loads
    if demand.stages_pending:
        assert not result.stages
    assert not result.stages or len(result.stages) + flight.stages <= LIMITS.stages_max
    assert sum(move.tokens for move in result.loads) <= LIMITS.chunk_tokens


def check_budgets(case, result) -> None:
    for level, moves in ((case["device"], result.loads), (case["host"], result.stages)):
        assert sum(move.tokens for move in moves) <= max(0, level.room_tokens)
    device = case["device"]
    grown = sum(
        max(0, move.stop_tokens - device.lengths.get(move.advisory_id, 0)) for move in result.loads
    )
    assert device.held_tokens + grown <= device.cap_tokens, "even if no head is shared"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(inputs())
def test_what_was_begun_is_not_planned_again(case):
    """With the moves of a plan in flight and nothing else changed, none of them comes again."""
    first = decide(case)
    staging = {move.advisory_id for move in first.stages}
    loading = {move.advisory_id for move in first.loads}
    views = [
        dataclasses.replace(
            v,
            staging=v.staging or v.advisory_id in staging,
            loading=v.loading or v.advisory_id in loading,
        )
        for v in case["views"]
    ]
    flight = Flight(case["flight"].stages + len(staging), case["flight"].loads + len(loading))
    second = decide({**case, "flight": flight}, views)
    assert not staging & {move.advisory_id for move in second.stages}
    assert not (loading and second.loads)


def order_of_loads(*views):
    """Who gets the whole of the step's one chunk."""
    (move,) = plan(views).loads
    return move.advisory_id


def test_the_earliest_deadline_goes_first():
    late = view("late", 1, deadline_seconds=9.0, priority=100)
    soon = view("soon", 2, deadline_seconds=2.0)
    assert order_of_loads(late, soon) == "soon"


def test_priority_decides_between_equal_deadlines_and_arrival_between_equals():
    low, high = view("low", 1, priority=0), view("high", 2, priority=1)
    assert order_of_loads(low, high) == "high"
    assert order_of_loads(view("second", 2), view("first", 1)) == "first"
    near = view("near", 1, deadline_seconds=2.1)
    nearer = view("nearer", 2, deadline_seconds=2.0, priority=1)
    assert order_of_loads(near, nearer) == "nearer"


def test_an_implied_deadline_lies_between_near_and_far_ones():
    implied = view("implied", 1)
    assert order_of_loads(implied, view("near", 2, deadline_seconds=1.0)) == "near"
    assert order_of_loads(implied, view("far", 2, deadline_seconds=60.0)) == "implied"


def test_several_advisories_share_one_merged_load():
    views = [view(f"a{i}", i, goal_tokens=8, host_tokens=8) for i in range(3)]
    loads = plan(views).loads
    assert [(move.advisory_id, move.tokens) for move in loads] == [("a0", 8), ("a1", 8)]


def test_loading_starts_while_the_rest_is_being_staged():
    result = plan([view("a", goal_tokens=40, host_tokens=8)])
    assert [(m.start_tokens, m.stop_tokens) for m in result.stages] == [(8, 24)]
    assert [(m.start_tokens, m.stop_tokens) for m in result.loads] == [(0, 8)]


def test_demand_defers_with_its_name():
    result = plan([view("a")], demand=Demand(requests_waiting=1))
    assert [deferral.reason for deferral in result.deferrals] == [Reason.DEMAND_FIRST]
    result = plan([view("a")], flight=Flight(loads=1))
    assert [deferral.reason for deferral in result.deferrals] == [Reason.SLOTS_IN_USE]


def test_the_gate_clips_what_is_slower_than_recompute_and_would_come_too_late():
    gate = GateSnapshot(nvme_to_host=Rate(10), host_to_device=Rate(1000), prefill=Rate(100))
    result = plan([view("a", goal_tokens=40, host_tokens=16)], gate=gate, now=3.0)
    # 24 tokens take 2.4 s, and the request is taken to be due at 5 s.
    assert result.clips == (Clip("a", 16, Reason.NVME_SLOWER),)
    slow = GateSnapshot(nvme_to_host=Rate(10), host_to_device=Rate(50), prefill=Rate(100))
    result = plan([view("a", goal_tokens=40, host_tokens=16)], gate=slow, now=4.9)
    assert result.clips == (Clip("a", 0, Reason.HOST_SLOWER),)
    result = plan([view("a", goal_tokens=40, host_tokens=16, started=True)], gate=slow, now=4.9)
    assert not result.clips, "a promotion under way is carried through"


def test_a_slow_level_is_used_where_it_will_be_done_in_time():
    slow = GateSnapshot(nvme_to_host=Rate(30), host_to_device=Rate(1000), prefill=Rate(100))
    result = plan([view("a", goal_tokens=40, host_tokens=16)], gate=slow, now=0.0)
    assert not result.clips
    assert result.stages
    soon = view("a", goal_tokens=40, host_tokens=16, deadline_seconds=0.5)
    assert plan([soon], gate=slow, now=0.0).clips == (Clip("a", 16, Reason.NVME_SLOWER),)
    # More than four times slower than computing: something is wrong with it.
    broken = GateSnapshot(nvme_to_host=Rate(10), host_to_device=Rate(50), prefill=Rate(100))
    result = plan([view("a", goal_tokens=40, host_tokens=16)], gate=broken, now=0.0)
    assert result.clips == (Clip("a", 16, Reason.NVME_SLOWER),)


def test_an_advisory_longer_than_the_budget_is_clipped_to_it():
    result = plan([view("a", goal_tokens=40, host_tokens=40)], device=budget(cap=30))
    assert result.clips == (Clip("a", 28, Reason.BUDGET_CLIP),)


def test_no_overtaking_while_an_earlier_advisory_waits_for_budget():
    """The first must hold 12 before its load counts; 8 are free, and nobody else gets them."""
    first = view("first", 1, device_tokens=12, host_tokens=4)
    second = view("second", 2, goal_tokens=8, host_tokens=8)
    tight = budget(cap=20, held=12, lengths={"other": 12})
    result = plan([first, second], device=tight)
    assert result.loads == ()
    assert {d.reason for d in result.deferrals} == {Reason.BUDGET_IN_USE}


def test_lower_priorities_are_dropped_lowest_and_youngest_first():
    ready = {"state": State.READY, "device_tokens": 16, "host_tokens": 0}
    held = [
        view("low1", 1, priority=-1, **ready),
        view("low2", 2, priority=-1, **ready),
        view("mid", 3, priority=0, **ready),
        view("peer", 4, priority=5, **ready),
    ]
    full = budget(cap=64, held=64, lengths={v.advisory_id: 16 for v in held})
    result = plan([*held, view("new", 5, priority=5)], device=full)
    assert [(drop.level, drop.advisory_id) for drop in result.drops] == [(Level.DEVICE, "low2")]
    assert not result.loads, "the freed tokens are planned for in the next step"


def test_no_live_advisories_cost_nothing():
    assert plan([]) is EMPTY_PLAN
