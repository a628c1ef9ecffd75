"""Page hashes are SGLang's own, and a growing chain hashes only what is new."""

from __future__ import annotations

import random

import numpy as np
import pytest

from symphony_sglang.core.page_hash import (
    PageChain,
    event_hash,
    event_hashes,
    event_seed,
    hash_chain,
    pack_event_hashes,
    page_hashes,
    storage_seed,
)
from symphony_sglang.core.prefix import NO_NAMESPACE, TOKEN_MAX, Namespace, pack_tokens

NAMESPACES = [
    NO_NAMESPACE,
    Namespace("adapter", None),
    Namespace(None, "tenant"),
    Namespace("a", "b"),
    Namespace("", ""),
    Namespace(None, "Grüße"),
]


def prompt(count: int, seed: int = 0) -> list[int]:
    source = random.Random(seed)
    return [source.choice([0, 1, 255, 65_536, TOKEN_MAX, source.randrange(150_000)])
            for _ in range(count)]  # fmt: skip


@pytest.mark.parametrize("namespace", NAMESPACES)
@pytest.mark.parametrize("page_size", [1, 16, 64])
def test_storage_keys_are_sglangs(namespace: Namespace, page_size: int) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixKey
    from sglang.srt.mem_cache.utils import get_storage_hash_str

    ids = prompt(333)
    key = RadixKey(ids[: 333 - 333 % page_size], namespace.extra_key, cache_salt=namespace[1])
    expected = get_storage_hash_str(key, page_size=page_size)
    ours = page_hashes(pack_tokens(ids), page_size, namespace)
    assert [digest.hex() for digest in ours] == expected
    assert len(ours) == 333 // page_size


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_event_hashes_are_sglangs(namespace: Namespace) -> None:
    from sglang.srt.mem_cache.radix_cache import RadixKey, TreeNode
    from sglang.srt.mem_cache.utils import compute_node_event_hash_values, hash_str_to_int64

    ids = prompt(320, seed=1)
    root = TreeNode()
    root.key, root.hash_value = RadixKey([], None), []
    parent, expected = root, []
    for start, stop in ((0, 160), (160, 320)):
        node = TreeNode()
        node.key = RadixKey(ids[start:stop], namespace.extra_key, cache_salt=namespace.cache_salt)
        node.parent = parent
        node.hash_value = None
        names = compute_node_event_hash_values(node, 16)
        if namespace == NO_NAMESPACE:
            node.hash_value = names
        expected += [hash_str_to_int64(name) for name in names]
        parent = node
    assert event_hashes(pack_tokens(ids), 16, namespace).tolist() == expected


def test_seeds_keep_namespaces_apart() -> None:
    seeds = [storage_seed(namespace) for namespace in NAMESPACES]
    assert len(set(seeds)) == len(NAMESPACES)
    assert storage_seed(NO_NAMESPACE) is None
    # Events leave extra_key out: that is SGLang's rule, not ours.
    assert event_seed(Namespace("adapter", None)) is None
    assert event_seed(Namespace("a", "b")) == event_seed(Namespace(None, "b")) is not None


def test_a_parent_continues_the_chain() -> None:
    tokens = pack_tokens(prompt(160))
    whole = page_hashes(tokens, 16, NAMESPACES[3])
    tail = page_hashes(tokens[64 * 4 :], 16, parent=whole[3])
    assert whole[4:] == tail


def test_event_hash_is_signed_and_packs_alike() -> None:
    digests = [b"\xff" * 32, b"\x00" * 7 + b"\x05" + b"\x09" * 24, b"\x80" + b"\x00" * 31]
    assert [event_hash(digest) for digest in digests] == [-1, 5, -(2**63)]
    assert pack_event_hashes(digests).tolist() == [-1, 5, -(2**63)]
    assert pack_event_hashes([]).dtype == np.int64


@pytest.mark.parametrize("page_size", [0, -16])
def test_page_size_must_be_positive(page_size: int) -> None:
    with pytest.raises(ValueError, match="page_size is"):
        hash_chain(b"", page_size, None)
    with pytest.raises(ValueError, match="page_size is"):
        PageChain(page_size)


def test_parent_must_be_a_digest() -> None:
    with pytest.raises(ValueError, match="expected 32"):
        hash_chain(b"", 16, b"short")


@pytest.mark.parametrize("page_size", [16, 48, 2048])
def test_chain_agrees_with_hashing_anew_whatever_the_prompt_becomes(page_size: int) -> None:
    source = random.Random(page_size)
    chain = PageChain(page_size, NAMESPACES[2])
    ids: list[int] = []
    for _ in range(40):
        cut = len(ids) if source.random() < 0.6 else source.randint(0, len(ids))
        ids = ids[:cut] + prompt(source.randint(0, 3000), seed=source.randrange(10**6))
        if ids and source.random() < 0.3:
            ids[source.randrange(len(ids))] ^= 1
        tokens = pack_tokens(ids)
        assert (chain.update(tokens) == event_hashes(tokens, page_size, NAMESPACES[2])).all()
        chain.check()


def test_next_turn_hashes_only_its_new_pages() -> None:
    chain = PageChain(16)
    ids = prompt(100_000)
    chain.update(pack_tokens(ids))
    assert chain.hashed_pages == 6250
    chain.update(pack_tokens([*ids, *prompt(160, seed=2)]))
    # Up to a block of 64 pages before the end is not yet noted.
    assert 10 <= chain.hashed_pages <= 10 + 64
    assert chain.cost_bytes < 12 * 6260 + 512
