"""The location index: limits, sessions, expectations and figures."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
import pytest

from symphony_sglang.core.expectations import anchor_places, common_pages
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import (
    IndexLimits,
    LocationIndex,
    PageRun,
)
from symphony_sglang.core.routing_types import NO_MATCH, PrefixMatch


def chain(count: int, seed: int = 0) -> list[int]:
    generator = np.random.default_rng(seed)
    return generator.integers(-(2**63), 2**63 - 1, count, dtype=np.int64).tolist()


def test_levels_follow_each_other_without_a_gap() -> None:
    index, pages = LocationIndex(), chain(10)
    index.stored("w", Level.DEVICE, pages[:3])
    index.stored("w", Level.HOST, pages[2:6], pages[1])
    index.stored("w", Level.NVME, pages[:9])
    index.stored("other", Level.NVME, pages[1:], pages[0])  # lacks the first page
    assert index.match(pages) == {"w": PrefixMatch(3, 3, 3)}
    assert index.match([]) == {}
    assert index.match(chain(3, seed=1)) == {}
    index.removed("w", Level.NVME, pages[7:8])
    assert index.match(pages)["w"] == (3, 3, 1, 0)
    index.check()


def test_pages_without_parents_count_once_a_prompt_was_seen() -> None:
    index, pages = LocationIndex(), chain(50)
    index.replace("w", {Level.HOST: [PageRun(pages[::-1], None, linked=False)]})
    assert index.match(pages) == {"w": PrefixMatch(0, 50, 0)}
    assert index.find(pages).match("nobody") is NO_MATCH


def test_a_false_parent_closes_no_circle() -> None:
    index, pages = LocationIndex(), chain(4)
    index.stored("w", Level.DEVICE, [pages[1]], pages[0])
    index.stored("w", Level.DEVICE, [pages[0]], pages[1])
    index.stored("w", Level.DEVICE, [pages[2]], pages[2])
    # What a prompt shows of the chain stands above what a worker said of it.
    assert index.match(pages) == {"w": PrefixMatch(3, 0, 0)}
    assert index.stats().false_parents > 0
    index.cleared("w")
    index.reclaim()
    index.check()
    assert index.stats().pages == 0


def test_peer_is_no_level_of_a_worker() -> None:
    with pytest.raises(ValueError, match="level is 'peer'"):
        LocationIndex().stored("w", Level.PEER, [1])


def test_more_workers_than_it_can_hold_are_ignored_and_counted() -> None:
    index = LocationIndex(IndexLimits(workers_max=2))
    for name in ("a", "b", "c"):
        index.stored(name, Level.DEVICE, [1, 2])
    assert set(index.match([1, 2])) == {"a", "b"}
    assert index.stats().ignored_workers == 1
    index.forget_worker("a")
    index.stored("c", Level.HOST, [1])
    assert index.match([1, 2]) == {"b": PrefixMatch(2, 0, 0), "c": PrefixMatch(0, 1, 0)}


def test_a_lost_workers_pages_are_freed_in_slices() -> None:
    index = LocationIndex(IndexLimits(reclaim_pages=7))
    for number in range(5):
        index.stored("lost", Level.NVME, chain(6, seed=number))
    index.stored("kept", Level.NVME, chain(6, seed=0)[:3])
    index.forget_worker("lost")
    assert index.match(chain(6, seed=1)) == {}
    calls = 1
    while index.reclaim():
        calls += 1
        index.check()
    assert index.stats().pages == 3
    assert index.match(chain(6, seed=0)) == {"kept": PrefixMatch(0, 0, 3)}


def test_session_belongs_to_the_newest_epoch_then_to_who_served_last() -> None:
    index = LocationIndex()
    assert index.session_turn("a", "s", 100, 7, 1, 0)
    assert index.session_turn("b", "s", 50, None, 1, 0)  # served there since
    assert index.session("s") == ("b", "s", 50, None, 1, 0)
    assert not index.session_turn("a", "s", 40, None, 1, 0, live=False)
    assert index.session_turn("a", "s", 60, None, 1, 0, live=False)
    assert index.session_turn("b", "s", 60, None, 2, 1)
    assert not index.session_turn("a", "s", 900, None, 9, 0)
    assert not index.session_gone("a", "s")
    assert [place.session_id for place in index.sessions_of("b")] == ["s"]
    assert index.session_gone("b", "s")
    assert index.session("s") is None
    index.session_turn("b", "t", 1, None, 1, 0)
    index.forget_worker("b")
    assert index.session("t") is None or index.stats().workers == 0


def test_sessions_and_expectations_are_bounded() -> None:
    limits = IndexLimits(sessions_max=3, expected_max=4, expected_pages_max=100)
    index = LocationIndex(limits)
    for number in range(9):
        index.session_turn("w", f"s{number}", 1, None, 1, 0)
        index.speculate("w", np.asarray(chain(30, number)), 0.0, 10.0)
        index.check()
    stats = index.stats()
    assert (stats.sessions, stats.expected) == (3, 3)
    assert index.session("s5") is None
    assert index.session("s6") is not None
    # One that is too long alone is still kept: the limit is against many.
    index.speculate("w", np.asarray(chain(500, 99)), 0.0, 10.0)
    assert index.stats().expected == 1


@pytest.mark.parametrize("known", [0, 5, 19])
def test_expectation_is_found_by_at_least_half_of_what_is_shared(known: int) -> None:
    index, pages = LocationIndex(), chain(60)
    index.stored("w", Level.DEVICE, pages[:known])
    index.speculate("w", np.asarray(pages), 0.0, 10.0, known)
    for shared in range(61):
        asked = pages[:shared] + chain(20, seed=3)
        match = index.match(asked, 1.0).get("w", NO_MATCH)
        assert match.pages == min(shared, known)
        assert match.expected_pages <= max(0, shared - known)
        if shared > known:
            assert 2 * (match.pages + match.expected_pages) >= shared
    index.forget_worker("w")
    index.check()
    assert index.stats().expected == 0


def test_anchor_places_and_common_pages() -> None:
    assert anchor_places(0, 0) == []
    assert anchor_places(1, 0) == [0]
    assert anchor_places(9, 0) == [0, 1, 3, 7, 8]
    assert anchor_places(9, 4) == [4, 7, 8]
    assert anchor_places(9, 9) == []
    pages = chain(20)
    for shared in range(1, 20):
        assert common_pages(pages[:shared] + chain(9, 1), pages, 1) == shared


def test_a_page_costs_less_than_60_bytes() -> None:
    """The stated figure; tracemalloc sees the columns and the index, not the list that feeds it."""
    pages = 30_000
    chains = [chain(1000, seed) for seed in range(pages // 1000)]
    gc.collect()
    tracemalloc.start()
    index = LocationIndex()
    for listed in chains:
        for name in ("a", "b"):
            index.stored(name, Level.HOST, listed)
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert index.stats().pages == pages
    assert used / pages < 60
    assert index.stats().table_bytes == pytest.approx(used, rel=0.25)
