"""Whatever the workers and the request: the choice is legal, cheap and explained."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core import routing
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.routing import SymphonyPolicy
from symphony_sglang.core.routing_policies import POLICIES, make_policy
from symphony_sglang.core.routing_types import (
    LoadView,
    PolicySettings,
    RouteRequest,
    WorkerRates,
    WorkerState,
    WorkerView,
)
from symphony_sglang.errors import NoWorkerError

PAGE = 16
HASHES = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 200, dtype=np.int64)
rates = st.one_of(st.none(), st.builds(Rate, st.floats(100, 1e6), st.floats(0, 0.1)))
views = st.builds(
    dict,
    state=st.sampled_from([WorkerState.READY] * 4 + [WorkerState.DRAINING, WorkerState.UNHEALTHY]),
    page_size=st.sampled_from([PAGE, PAGE, PAGE, 0]),
    rates=st.builds(WorkerRates, rates, rates, rates, rates),
    load=st.builds(
        LoadView,
        requests_running=st.integers(0, 50),
        requests_waiting=st.integers(0, 20),
        tokens_waiting_uncached=st.integers(0, 50_000),
        tokens_running=st.integers(0, 10**6),
        device_used_tokens=st.integers(0, 20_000),
        device_total_tokens=st.sampled_from([0, 4000, 10**6]),
        requests_max=st.sampled_from([0, 8, 64]),
        decode_step_seconds=st.sampled_from([0.0, 0.01, 0.05]),
        requests_in_flight=st.integers(0, 50),
    ),
    serves_pages=st.booleans(),
    pulls_pages=st.booleans(),
    held=st.lists(
        st.tuples(st.sampled_from([Level.DEVICE, Level.HOST, Level.NVME]), st.integers(1, 200)),
        max_size=3,
    ),
)


def build(drawn: list[dict]) -> tuple[list[WorkerView], LocationIndex]:
    index, workers = LocationIndex(), []
    for number, fields in enumerate(drawn):
        name = f"w{number}"
        for level, pages in fields["held"]:
            index.stored(name, level, HASHES[:pages].tolist())
        made = {key: value for key, value in fields.items() if key != "held"}
        workers.append(WorkerView(name, **made))
    return workers, index


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    drawn=st.lists(views, max_size=12),
    pages=st.integers(0, 200),
    owner=st.integers(0, 12),
    seed=st.integers(0, 1000),
)
@pytest.mark.parametrize("name", POLICIES)
def test_any_choice_is_legal_and_repeatable(
    name: str, drawn: list[dict], pages: int, owner: int, seed: int
) -> None:
    workers, index = build(drawn)
    index.session_turn(f"w{owner}", "s", 100, None, 1, 0)
    asked = RouteRequest("r", pages * PAGE + 3, {PAGE: HASHES[:pages]}, "s")
    ready = [view.worker_id for view in workers if view.state is WorkerState.READY]
    policy = make_policy(name)
    if not ready:
        with pytest.raises(NoWorkerError):
            policy.choose(asked, workers, index, 0.0, random.Random(seed))
        return
    first = policy.choose(asked, workers, index, 0.0, random.Random(seed))
    again = policy.choose(asked, workers, index, 0.0, random.Random(seed))
    assert first == again
    assert first.worker_id in ready
    assert first.considered == len(ready)
    assert 1 <= first.uncached_tokens <= asked.input_tokens
    assert all(seconds >= 0 for seconds in first.cost)
    if name == "symphony":
        assert sum(first.tokens) == asked.input_tokens
        assert first.tokens.recompute == first.uncached_tokens
        if first.pull is not None:
            assert first.pull.saved_seconds > 0
            assert first.pull.source_worker_id != first.worker_id
    choice = policy.choose_for_advisory(asked, workers, index, 0.0, random.Random(seed))
    assert choice.worker_id in ready
    assert choice.source_worker_id != choice.worker_id
    policy.routed(asked, first, index, 0.0)
    index.check()


@settings(max_examples=80, deadline=None, derandomize=True)
@given(drawn=st.lists(views, min_size=1, max_size=20), pages=st.integers(0, 200))
def test_the_bound_never_hides_a_cheaper_worker(drawn: list[dict], pages: int) -> None:
    """Against weighing every candidate in full: the choice is within a tie of the cheapest."""
    workers, index = build(drawn)
    if not any(view.state is WorkerState.READY for view in workers):
        return
    asked = RouteRequest("r", pages * PAGE + 3, {PAGE: HASHES[:pages]})
    limits = PolicySettings(tie_seconds=1e-9, tie_share=1e-9)
    quick = SymphonyPolicy(limits).choose(asked, workers, index, 0.0, random.Random(1))
    everything = PolicySettings(tie_seconds=1e-9, tie_share=1e-9, alternatives_max=100)
    with pytest.MonkeyPatch.context() as patch:
        # Weigh them all, ties included: what the quick way leaves out is what is in question.
        patch.setattr(routing, "WEIGHED_MIN", 1000)
        full = SymphonyPolicy(everything).choose(asked, workers, index, 0.0, random.Random(1))
    assert len(full.alternatives) == full.considered - 1
    cheapest = min([full.cost.total, *(other.cost.total for other in full.alternatives)])
    assert quick.cost.total <= cheapest + 1e-6 * (1 + cheapest)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(pages=st.integers(1, 200), more=st.integers(0, 100), queued=st.integers(0, 5000))
def test_more_of_the_prompt_is_never_dearer_and_more_queue_never_cheaper(
    pages: int, more: int, queued: int
) -> None:
    def cost(held: int, waiting: int) -> float:
        index = LocationIndex()
        index.stored("w0", Level.DEVICE, HASHES[:held].tolist())
        load = LoadView(tokens_waiting_uncached=waiting)
        view = WorkerView("w0", page_size=PAGE, load=load)
        asked = RouteRequest("r", 3203, {PAGE: HASHES})
        policy = SymphonyPolicy()
        return policy.choose(asked, [view], index, 0.0, random.Random(0)).cost.total

    assert cost(min(200, pages + more), queued) <= cost(pages, queued)
    assert cost(pages, queued + more) >= cost(pages, queued)
