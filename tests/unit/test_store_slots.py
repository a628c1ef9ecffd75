"""The index in memory: states, free runs, leaves, and which pages go first."""

from __future__ import annotations

import numpy as np
import pytest

from store_pages import key_of
from symphony_sglang.store.database import leaf_body, leaf_is_sound
from symphony_sglang.store.eviction import choose_victims, keep_scores
from symphony_sglang.store.slots import LEAF_SLOTS, TRANSITIONS, PageFacts, SlotState, SlotTable


def table_with(pages: int, slots: int = 100, segments: int = 2) -> SlotTable:
    table = SlotTable(slots, segments)
    for segment in range(segments):
        table.add_segment(segment)
    slots = table.allocate([key_of(n) for n in range(pages)])
    for number, slot in enumerate(slots):
        table.publish([slot], [PageFacts(10)], now=1000 + number)
    table.pending.clear()
    table.move(slots, SlotState.SYNCING)
    table.move(slots, SlotState.COMMITTED)
    table.check()
    return table


@pytest.mark.parametrize("state", list(SlotState))
@pytest.mark.parametrize("following", list(SlotState))
def test_only_listed_transitions_happen(state: SlotState, following: SlotState) -> None:
    table = SlotTable(4, 1)
    table._state[0] = state
    if following in TRANSITIONS[state]:
        table.move([0], following)
        assert table.state_of(0) is following
    else:
        with pytest.raises(AssertionError, match=f"{state.name} -> {following.name}"):
            table.move([0], following)


def test_a_batch_gets_neighbouring_slots_even_in_a_worn_table() -> None:
    table = table_with(190)
    for number in [*range(3, 40, 3), *range(60, 80)]:
        table.remove(key_of(number))
    table.release(list(table.evicted))
    assert table.allocate([key_of(n, "new") for n in range(20)]) == list(range(60, 80))


def test_allocation_stops_where_slots_end() -> None:
    table = table_with(190)
    assert len(table.allocate([key_of(n, "new") for n in range(20)])) == 10
    table.check()


def test_oldest_use_goes_first() -> None:
    table = table_with(10)
    table.touch([table.keys.get(key_of(0))], 5000)
    victims = [table.keys.key_at(slot) for slot, _ in table.plan_victims(3)]
    assert victims == [key_of(1), key_of(2), key_of(3)]


def test_pinned_read_and_recently_used_pages_stay() -> None:
    table = table_with(5)
    slots = [table.keys.get(key_of(n)) for n in range(5)]
    table.pins[slots[0]] = 1
    table.pinned = 1
    table.readers[slots[1]] = 1
    plan = table.plan_victims(5)
    assert [table.keys.key_at(slot) for slot, _ in plan] == [key_of(2), key_of(3), key_of(4)]
    table.touch([slots[2]], 9000)
    assert table.evict(plan[:1], 9001) == 0
    assert table.evict(plan[:2], 9001) == 1
    assert key_of(3) not in table.keys


def scores(accessed, cost=None, depth=None, priority=None, lifetime=100.0):
    count = len(accessed)
    return keep_scores(
        np.array(accessed, np.float64),
        np.array(cost or [1.0] * count, np.float16),
        np.array(depth or [0] * count, np.uint16),
        np.array(priority or [0] * count, np.int8),
        lifetime,
    )


def test_priority_outweighs_any_age() -> None:
    low, high = scores([4_000_000_000, 1], priority=[-1, 0])
    assert low < high


def test_a_costly_page_is_kept_as_if_used_later() -> None:
    # Mean cost 2: the page of cost 3 gains one lifetime (100 s) over the one of cost 1.
    cheap, costly = scores([1000, 910], cost=[1.0, 3.0])
    assert costly > cheap
    cheap, costly = scores([1000, 890], cost=[1.0, 3.0])
    assert costly < cheap


def test_the_tail_of_a_prefix_goes_before_its_head() -> None:
    head, tail = scores([1000, 1000], depth=[0, 7])
    assert tail < head


def test_victims_are_the_lowest_scores_in_order() -> None:
    random = np.random.default_rng(1)
    values = random.permutation(1000).astype(np.float64)
    chosen = choose_victims(np.arange(1000), values, 10)
    assert values[chosen].tolist() == list(range(10))
    assert len(choose_victims(np.arange(3), values[:3], 10)) == 3


def test_leaves_bring_the_same_table_back() -> None:
    table = table_with(130)
    table.priority[table.keys.get(key_of(3))] = -5
    table.remove(key_of(7))
    leaves = np.array([0, 1, 2], np.int64)
    entries = np.stack([table.build_leaf(int(leaf)) for leaf in leaves])
    again = SlotTable(100, 2)
    again.add_segment(0)
    again.add_segment(1)
    assert again.load(leaves, entries) == 0
    again.check()
    assert set(again.keys) == set(table.keys)
    assert again.priority[again.keys.get(key_of(3))] == -5


def test_entries_of_missing_segments_or_twice_the_same_key_are_counted_not_served() -> None:
    table = table_with(130)
    leaves = np.array([0, 1, 2], np.int64)
    entries = np.stack([table.build_leaf(int(leaf)) for leaf in leaves])
    entries["key"][1][0] = entries["key"][0][0]
    again = SlotTable(100, 2)
    again.add_segment(0)
    assert again.load(leaves, entries) == 30 + 1
    again.check()


def test_a_row_of_the_index_with_any_damage_is_known() -> None:
    body = bytearray(leaf_body(5, table_with(130).build_leaf(0)))
    assert leaf_is_sound(5, bytes(body))
    assert not leaf_is_sound(6, bytes(body))  # in the place of another row
    assert not leaf_is_sound(5, bytes(body[:-1]))
    assert not leaf_is_sound("5", bytes(body))
    assert not leaf_is_sound(5, None)
    for at in range(len(body)):
        body[at] ^= 1 << at % 8
        assert not leaf_is_sound(5, bytes(body)), at
        body[at] ^= 1 << at % 8


def test_an_unused_leaf_is_no_row() -> None:
    assert leaf_body(0, SlotTable(100, 1).build_leaf(0)) == b""


def test_leaf_numbers_cover_each_slot_once() -> None:
    table = SlotTable(100, 3)
    slots = [
        slot for leaf in range(3 * table.leaves_per_segment) for slot in table.leaf_slots(leaf)
    ]
    assert slots == list(range(300))
    assert all(slot in table.leaf_slots(table.leaf_of(slot)) for slot in range(300))
    assert max(len(table.leaf_slots(leaf)) for leaf in range(6)) == LEAF_SLOTS
