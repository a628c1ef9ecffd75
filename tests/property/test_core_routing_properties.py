"""Whatever the workers and the request: the choice is legal, cheap and explained."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.route_cost import Estimate, Source
from symphony_sglang.core.routing import WEIGHED_MAX, SymphonyPolicy
from symphony_sglang.core.routing_policies import POLICIES, make_policy
from symphony_sglang.core.routing_types import (
    NO_MATCH,
    LoadView,
    PolicySettings,
    Reason,
    RouteRequest,
    WorkerRates,
    WorkerState,
    WorkerView,
)
from symphony_sglang.core.worker_costs import WorkerCosts
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


def weigh_all(
    policy: SymphonyPolicy,
    asked: RouteRequest,
    workers: list[WorkerView],
    index: LocationIndex,
    seed: int,
) -> tuple[list[Estimate], Estimate, Reason]:
    """The rule without its short cuts: every candidate in full, in the order of its cost."""
    model, held = policy._model, index.match(asked.page_hashes[PAGE])
    serving = [
        view
        for view in workers
        if view.serves_pages
        and view.page_size == PAGE
        and view.state is not WorkerState.UNHEALTHY
        and held.get(view.worker_id, NO_MATCH).pages
    ]
    serving.sort(
        key=lambda view: (
            -held[view.worker_id].pages,
            view.transfer_seconds,
            view.load.requests,
            view.worker_id,
        )
    )
    estimates = []
    for view in workers:
        if view.state is not WorkerState.READY:
            continue
        match = held.get(view.worker_id, NO_MATCH) if view.page_size == PAGE else NO_MATCH
        peer = next((one for one in serving if one.worker_id != view.worker_id), None)
        source = None
        if peer is not None and view.pulls_pages and view.page_size == PAGE:
            there = held[peer.worker_id]
            fast = there.device_pages + there.host_pages
            source = Source(peer.worker_id, there.pages * PAGE, fast * PAGE)
        cost = model.workers.cost(model.workers.positions[view.worker_id])
        estimates.append(model.estimate(cost, asked, match, source, 0.0))
    estimates.sort(key=lambda estimate: estimate.seconds)
    owner = policy._owner(asked, index, 0.0)
    chosen, reason = policy._settle(asked, estimates, owner, random.Random(seed))
    return estimates, chosen, reason


def ask(pages: int, session_id: str | None = None) -> RouteRequest:
    return RouteRequest("r", pages * PAGE + 3, {PAGE: HASHES[:pages]}, session_id)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    drawn=st.lists(views, min_size=1, max_size=20),
    pages=st.integers(0, 200),
    owner=st.one_of(st.none(), st.integers(0, 20)),
    seed=st.integers(0, 1000),
)
def test_the_short_cuts_choose_what_weighing_everybody_chooses(
    drawn: list[dict], pages: int, owner: int | None, seed: int
) -> None:
    workers, index = build(drawn)
    if not any(view.state is WorkerState.READY for view in workers):
        return
    if owner is not None:
        index.session_turn(f"w{owner}", "s", 100, None, 1, 0)
    asked = ask(pages, "s")
    policy = SymphonyPolicy()
    # The first asks scratch, the second from where holders stopped the last time.
    for _ in range(2):
        quick = policy.choose(asked, workers, index, 0.0, random.Random(seed))
        estimates, chosen, reason = weigh_all(policy, asked, workers, index, seed)
        best = estimates[0].seconds
        tied = [one for one in estimates if one.seconds <= best + policy._tie(best)]
        if len(tied) > WEIGHED_MAX:
            # Which eight of them were weighed is chance; that it is among the cheapest is not.
            cheap = {one.worker.view.worker_id for one in tied}
            assert quick.worker_id in cheap or quick.reason is Reason.SESSION
            continue
        if quick.reason is Reason.ONLY_WORKER:
            reason = quick.reason
        if reason is not Reason.TIE_SPREAD:  # taken by chance, among the tied
            assert quick.worker_id == chosen.worker.view.worker_id
            assert (quick.cost, quick.tokens, quick.match) == (
                chosen.cost,
                chosen.tokens,
                chosen.match,
            )
            assert quick.pull == chosen.pull
        assert quick.reason is reason


@settings(max_examples=80, deadline=None, derandomize=True)
@given(drawn=st.lists(views, min_size=1, max_size=20), pages=st.integers(0, 200))
def test_the_bound_is_below_every_cost(drawn: list[dict], pages: int) -> None:
    workers, index = build(drawn)
    ready = [view for view in workers if view.state is WorkerState.READY]
    if not ready:
        return
    policy, asked = SymphonyPolicy(), ask(pages)
    policy.choose(asked, workers, index, 0.0, random.Random(0))
    floors = policy._model.floors(asked, {PAGE: index.find(HASHES[:pages])})
    for estimate in weigh_all(policy, asked, workers, index, 0)[0]:
        position = policy._model.workers.positions[estimate.worker.view.worker_id]
        assert floors[position] <= estimate.seconds * (1 + 1e-9) + 1e-12


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    drawn=st.lists(views, min_size=1, max_size=8),
    changes=st.lists(st.tuples(st.integers(0, 7), views), max_size=30),
    gone=st.lists(st.integers(0, 7), max_size=3),
)
def test_what_is_kept_of_the_workers_is_what_their_views_say(
    drawn: list[dict], changes: list[tuple[int, dict]], gone: list[int]
) -> None:
    """Load, rates and state change one view at a time; workers come and go."""
    workers, _ = build(drawn)
    kept = WorkerCosts(PolicySettings())
    kept.update(workers)
    kept.check()
    for number, fields in changes:
        number %= len(workers)
        made = {key: value for key, value in fields.items() if key != "held"}
        workers[number] = WorkerView(workers[number].worker_id, **made)
        kept.update(workers)
        kept.check()
        kept.cost(number)  # kept until the next change
        asked = ask(50)
        assert kept.all_fit(asked) == all(v.state is WorkerState.READY for v in workers)
    for number in gone:
        if len(workers) > 1:
            kept.forget_worker(workers.pop(number % len(workers)).worker_id)
            kept.update(workers)
            kept.check()


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
