"""The hot-prefix sketch against exact counting."""

from __future__ import annotations

import random

from symphony_sglang.core.hot_prefixes import HotPrefixes
from symphony_sglang.core.prefix import Namespace, Prefix, pack_tokens

PAGE = 4


def prefix(tokens: list[int], salt: str | None = None) -> Prefix:
    return Prefix(Namespace(None, salt), pack_tokens(tokens))


def test_shared_prefix_is_found_and_its_own_starts_are_left_out() -> None:
    hot = HotPrefixes(PAGE)
    shared = list(range(8 * PAGE))
    for index in range(5):
        hot.found(
            prefix([*shared, *range(1000 * index + 1000, 1000 * index + 1000 + PAGE)]), 9 * PAGE
        )
    (top,) = hot.top(10)
    assert (top.tokens, top.requests) == (8 * PAGE, 5)
    hot.found(prefix(shared), PAGE)  # found less of it
    assert [(found.tokens, found.requests) for found in hot.top(10)] == [(8 * PAGE, 5), (PAGE, 6)]
    hot.check()


def test_only_what_was_found_counts_and_salts_keep_apart() -> None:
    hot = HotPrefixes(PAGE)
    tokens = list(range(16 * PAGE))
    for salt in (None, None, "a", "a", "a"):
        hot.found(prefix(tokens, salt), 2 * PAGE)
    assert [(found.tokens, found.requests) for found in hot.top(10)] == [
        (2 * PAGE, 3),
        (2 * PAGE, 2),
    ]
    hot.found(prefix(tokens), PAGE - 1)
    assert len(hot) == 4


def test_heavy_hitters_survive_a_flood_and_are_never_overcounted() -> None:
    generator = random.Random(0)
    hot = HotPrefixes(PAGE, entries_max=64)
    heavy = [[index] * PAGE for index in range(4)]
    exact = dict.fromkeys(range(4), 0)
    for _ in range(4000):
        if generator.random() < 0.4:
            which = generator.randrange(4)
            exact[which] += 1
            hot.found(prefix(heavy[which]), PAGE)
        else:
            hot.found(prefix([generator.randrange(10, 1_000_000)] * PAGE), PAGE)
        assert len(hot) <= 64
    hot.check()
    top = hot.top(4)
    # Space-saving keeps every item more frequent than the stream divided by the counters.
    assert sorted(found.requests for found in top) == sorted(exact.values())


def test_work_is_bounded_by_pages_max() -> None:
    hot = HotPrefixes(PAGE, pages_max=4)
    hot.found(prefix(list(range(100 * PAGE))), 100 * PAGE)
    assert len(hot) == 3
