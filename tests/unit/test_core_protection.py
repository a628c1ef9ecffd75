"""Protected budgets: who holds what, what it counts, who gives way."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.levels import Level
from symphony_sglang.core.prefix import (
    NO_NAMESPACE,
    Namespace,
    Prefix,
    PrefixUnion,
    common_tokens,
    content_identity,
    pack_tokens,
    unpack_tokens,
)
from symphony_sglang.core.protection import Holder, HolderKind, LevelLedger

PAGE = 2


def prefix(*tokens: int, namespace: Namespace = NO_NAMESPACE) -> Prefix:
    return Prefix(namespace, pack_tokens(tokens))


def holder(name: str, arrival: int = 1, priority: int = 0, expires: float = 60.0, request=False):
    kind = HolderKind.REQUEST if request else HolderKind.ADVISORY
    return Holder(name, kind, priority, expires, arrival)


@pytest.fixture
def ledger():
    ledger = LevelLedger(Level.DEVICE, 10, PAGE)
    yield ledger
    ledger.check()


def hold(ledger, name, tokens, **changes):
    who = holder(name, **changes)
    granted = ledger.reserve(who, prefix(*tokens), len(tokens))
    ledger.settle(name, granted)
    return granted


def test_free_reserved_and_resident_add_up(ledger):
    assert ledger.reserve(holder("a"), prefix(1, 2, 3, 4), 4) == 4
    assert (ledger.free_tokens, ledger.reserved_tokens, ledger.resident_tokens) == (6, 4, 0)
    ledger.settle("a", 2)
    assert (ledger.free_tokens, ledger.reserved_tokens, ledger.resident_tokens) == (8, 0, 2)
    assert ledger.release("a") == 2
    assert ledger.release("a") == 0
    assert ledger.free_tokens == 10


def test_a_shared_head_is_counted_once(ledger):
    hold(ledger, "a", [1, 2, 3, 4])
    hold(ledger, "b", [1, 2, 3, 9])
    assert ledger.resident_tokens == 5
    assert ledger.release("a") == 1, "only its own tail becomes free"
    assert ledger.resident_tokens == 4


def test_more_than_the_budget_is_granted_in_whole_pages(ledger):
    hold(ledger, "a", [1, 2, 3, 4, 5, 6, 7])
    assert hold(ledger, "b", [9, 8, 7, 6]) == 2
    assert hold(ledger, "c", [4, 5]) == 0
    assert hold(ledger, "d", [1, 2, 3, 4]) == 4, "what others hold already costs nothing"


def test_a_grant_never_shrinks_by_asking_again(ledger):
    hold(ledger, "a", [1, 2, 3, 4])
    hold(ledger, "b", [5, 6, 7, 8, 9, 0])
    assert ledger.reserve(holder("a"), prefix(1, 2, 3, 4, 5, 6), 6) == 4
    assert ledger.reserve(holder("a"), prefix(1, 2, 3, 4, 5, 6), 2) == 4


def test_give_way_order_is_priority_then_expiry_then_age():
    ledger = LevelLedger(Level.HOST, 100, PAGE)
    hold(ledger, "request", [1, 1], request=True, priority=-9)
    hold(ledger, "high", [2, 2], priority=1, expires=1.0)
    hold(ledger, "late", [3, 3], expires=90.0)
    hold(ledger, "younger", [4, 4], expires=10.0, arrival=8)
    hold(ledger, "older", [5, 5], expires=10.0, arrival=7)
    assert ledger.give_way(100) == ("older", "younger", "late", "high", "request")
    assert ledger.give_way(3) == ("older", "younger")
    assert ledger.give_way(0) == ()
    assert ledger.give_way(100, (HolderKind.REQUEST, 0))[-1] == "request"
    assert ledger.give_way(100, (HolderKind.ADVISORY, 1)) == ("older", "younger", "late")
    ledger.check()


def test_give_way_counts_what_really_becomes_free():
    ledger = LevelLedger(Level.DEVICE, 100, PAGE)
    hold(ledger, "a", [1, 2, 3, 4], arrival=1)
    hold(ledger, "b", [1, 2, 3, 4], arrival=2)
    hold(ledger, "c", [7, 7], arrival=3)
    assert ledger.give_way(1) == ("a", "b"), "dropping one of two equal holders frees nothing"


def test_expired_holders_are_named_and_renewal_postpones(ledger):
    hold(ledger, "a", [1, 2], expires=5.0)
    assert ledger.expired(4.9) == ()
    assert ledger.expired(5.0) == ("a",)
    ledger.renew(holder("a", expires=9.0))
    ledger.renew(holder("nobody"))
    assert ledger.expired(5.0) == ()


tokens = st.lists(st.integers(0, 2), max_size=8)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.tuples(tokens, st.sampled_from([None, "x", ""])), max_size=12), st.randoms())
def test_prefix_union_equals_the_set_of_heads(items, rng: random.Random):
    union = PrefixUnion()
    inside: list[Prefix] = []

    def expected() -> int:
        return len(
            {(p.namespace, p.token_bytes[: 4 * n]) for p in inside for n in range(1, p.tokens + 1)}
        )

    for ids, salt in items:
        item = prefix(*ids, namespace=Namespace(None, salt))
        before = expected()
        inside.append(item)
        assert union.add(item, item.tokens) == expected() - before
        assert union.tokens == expected()
        union.check()
    rng.shuffle(inside)
    while inside:
        item = inside.pop()
        union.remove(item, item.tokens)
        assert union.tokens == expected()
    union.check()


def test_long_prefixes_are_compared_to_the_token():
    base = list(range(5000))
    for place in (0, 1, 255, 256, 257, 4999):
        other = [*base[:place], 9999, *base[place + 1 :]]
        assert common_tokens(pack_tokens(base), pack_tokens(other)) == place
    assert common_tokens(pack_tokens(base), pack_tokens(base[:300])) == 300
    assert common_tokens(b"", pack_tokens(base)) == 0


def test_tokens_pack_to_int32_and_back():
    ids = [0, 1, 2**31 - 1]
    assert list(unpack_tokens(pack_tokens(ids))) == ids
    assert unpack_tokens(b"").typecode == "q"
    for bad in ([-1], [2**31]):
        with pytest.raises(ValueError, match="expected 0"):
            pack_tokens(bad)


def test_content_identity_separates_namespaces_and_contents():
    variants = [
        prefix(1, 2),
        prefix(1, 3),
        prefix(1, 2, namespace=Namespace("", None)),
        prefix(1, 2, namespace=Namespace(None, "")),
        prefix(1, 2, namespace=Namespace("ab", "c")),
        prefix(1, 2, namespace=Namespace("a", "bc")),
    ]
    assert len({content_identity(variant) for variant in variants}) == len(variants)
    assert content_identity(prefix(1, 2)) == content_identity(prefix(1, 2))
