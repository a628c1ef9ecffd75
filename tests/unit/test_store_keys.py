"""The key table against a dict: inserts, deletions, lookups by one and by batch."""

from __future__ import annotations

import numpy as np
import pytest

from store_pages import key_of
from symphony_sglang.store.key_table import KeyTable


def filled(count: int, slots: int | None = None) -> tuple[KeyTable, dict[bytes, int]]:
    table = KeyTable(slots or count)
    keys = [key_of(number) for number in range(count)]
    table.set_keys(0, keys)
    table.insert(range(count))
    return table, {key: slot for slot, key in enumerate(keys)}


def assert_same(table: KeyTable, model: dict[bytes, int], strangers: list[bytes]) -> None:
    keys = [*model, *strangers]
    expected = [model.get(key, -1) for key in keys]
    assert table.find(b"".join(keys)).tolist() == expected
    assert [-1 if (slot := table.get(key)) is None else slot for key in keys] == expected
    assert len(table) == len(model)
    assert set(table) == set(model)


@pytest.mark.parametrize("seed", range(5))
def test_table_agrees_with_a_dict(seed: int) -> None:
    random = np.random.default_rng(seed)
    slots = 300
    table, model = KeyTable(slots), {}
    free = list(range(slots))
    strangers = [key_of(number, "stranger") for number in range(40)]
    for step in range(40):
        for _ in range(int(random.integers(0, 40))):
            if not free:
                break
            slot = free.pop(int(random.integers(len(free))))
            key = key_of(step * 1000 + slot)
            table.set_keys(slot, [key])
            table.insert([slot])
            model[key] = slot
        for key in list(model):
            if random.integers(4) == 0:
                table.discard(model[key])
                free.append(model.pop(key))
        assert_same(table, model, strangers)


@pytest.mark.parametrize("homes", [1, 3])
def test_keys_that_share_their_home_are_all_found_and_survive_each_others_deletion(homes) -> None:
    # The low bits decide the home: long runs, beyond the window of a batch lookup.
    keys = [(number % homes).to_bytes(4, "little") + key_of(number)[4:] for number in range(60)]
    for removed in range(0, 60, 7):
        table, model = KeyTable(60), {}
        for slot, key in enumerate(keys):
            table.set_keys(slot, [key])
            table.insert([slot])
            model[key] = slot
        for key in keys[removed::3]:
            table.discard(model.pop(key))
        assert_same(table, model, [key_of(99)])


def test_keys_with_the_same_first_word_are_told_apart() -> None:
    keys = [bytes(8) + key_of(number)[8:] for number in range(6)]
    for load in (False, True):
        table = KeyTable(6)
        table.set_keys(0, keys[:5])
        if load:
            assert table.load(np.arange(5)).tolist() == []
        else:
            table.insert(range(5))
        assert_same(table, {key: slot for slot, key in enumerate(keys[:5])}, keys[5:])


def test_loading_is_inserting_at_once() -> None:
    keys = [key_of(number) for number in range(5000)]
    table = KeyTable(6000)
    table.set_keys(1000, keys)
    slots = np.arange(1000, 6000)
    table.set_keys(0, [keys[7], keys[9]])  # the same keys in two other slots
    assert sorted(table.load(np.concatenate([slots, [0, 1]])).tolist()) in ([0, 1], [1007, 1009])
    kept = {key: table.get(key) for key in keys}
    assert all(table.key_at(slot) == key for key, slot in kept.items())
    assert_same(table, kept, [key_of(9999)])


def test_a_full_table_still_answers() -> None:
    table, model = filled(64)
    assert_same(table, model, [key_of(number, "x") for number in range(64)])


def test_version_is_odd_only_while_writing() -> None:
    table, _ = filled(8)
    version = table.version
    assert version % 2 == 0
    table.discard(3)
    assert table.version == version + 2


def test_an_empty_batch_finds_nothing() -> None:
    table, _ = filled(8)
    assert table.find(b"").tolist() == []


def test_inserting_together_is_inserting_one_by_one() -> None:
    rng = np.random.default_rng(3)
    words = rng.integers(0, 1 << 63, (64, 4), np.uint64)
    words[:, 0] = words[:, 0] << np.uint64(4) | np.uint64(14)  # all want the last two cells of 16
    words[40:44, 0] = words[7, 0]  # the same first word, other keys
    keys = [row.tobytes() for row in words]
    together, single = KeyTable(64), KeyTable(64)
    for table in (together, single):
        table.set_keys(0, keys)
    together.insert(list(range(64)))
    for slot in range(64):
        single.insert([slot])
    for table in (together, single):
        assert len(table) == 64
        assert table.version % 2 == 0
        assert table.find(b"".join(keys)).tolist() == list(range(64))
        for slot in range(0, 64, 3):
            table.discard(slot)
        gone = [-1 if slot % 3 == 0 else slot for slot in range(64)]
        assert table.find(b"".join(keys)).tolist() == gone
