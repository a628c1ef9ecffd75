"""A prefix of tokens in a namespace, and the size of a union of prefixes."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

TOKEN_BYTES = 4
TOKEN_MAX = 2**31 - 1
# Most pairs differ early: look at this much before comparing all of two long prefixes.
PEEK_TOKENS = 256


class Namespace(NamedTuple):
    """What separates equal tokens: SGLang's `extra_key` and `cache_salt` (radix_cache.py:59)."""

    extra_key: str | None = None
    cache_salt: str | None = None

    def sort_key(self) -> tuple[bool, str, bool, str]:
        """A total order; None sorts before the empty string."""
        return (
            self.extra_key is not None,
            self.extra_key or "",
            self.cache_salt is not None,
            self.cache_salt or "",
        )


NO_NAMESPACE = Namespace()


@dataclass(frozen=True, slots=True)
class Prefix:
    """Token ids as little-endian int32: half of what SGLang's array('q') takes."""

    namespace: Namespace
    token_bytes: bytes = field(repr=False)

    @property
    def tokens(self) -> int:
        return len(self.token_bytes) // TOKEN_BYTES


def pack_tokens(token_ids: Sequence[int] | npt.NDArray[np.int64]) -> bytes:
    """Token ids as little-endian int32 bytes.

    Raises:
        ValueError: an id outside 0..2^31-1.
    """
    # A copy of an array('q') goes through the buffer protocol: no Python integers are made.
    ids = np.asarray(token_ids, dtype=np.int64)
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) > TOKEN_MAX):
        raise ValueError(f"token ids span {ids.min()}..{ids.max()}; expected 0..{TOKEN_MAX}")
    return ids.astype("<i4").tobytes()


def unpack_tokens(token_bytes: bytes) -> array[int]:
    """The array('q') that SGLang's RadixKey takes."""
    ids = array("q")
    ids.frombytes(np.frombuffer(token_bytes, dtype="<i4").astype(np.int64).tobytes())
    return ids


def common_tokens(left: bytes, right: bytes) -> int:
    """Length in tokens of the longest common head of two packed prefixes."""
    size = min(len(left), len(right))
    peek = min(size, PEEK_TOKENS * TOKEN_BYTES)
    if left[:peek] != right[:peek]:
        size = peek
    elif left.startswith(right) or right.startswith(left):
        return size // TOKEN_BYTES
    count = size // TOKEN_BYTES
    differs = np.frombuffer(left, "<i4", count) != np.frombuffer(right, "<i4", count)
    first = int(differs.argmax()) if count else 0
    return first if count and differs[first] else count


def content_identity(prefix: Prefix) -> str:
    """A name for the content, equal on every rank and in every process (not `hash()`)."""
    digest = hashlib.blake2b(digest_size=16)
    for part in prefix.namespace:
        raw = b"" if part is None else part.encode("utf-8", "surrogatepass")
        # The length keeps ("a", "b") and ("ab", "") apart, the flag None and "".
        digest.update(b"%d:%d:" % (part is not None, len(raw)) + raw)
    digest.update(prefix.token_bytes)
    return f"content:{digest.hexdigest()}"


Key = tuple[tuple[bool, str, bool, str], bytes]


class PrefixUnion:
    """How many tokens a multiset of prefixes covers, with shared heads counted once.

    Held as a sorted list: the nearest neighbour in lexicographic order shares the longest head, so
    adding or removing a prefix changes the union by its length less the longer head that it has in
    common with its two neighbours. O(log n) comparisons and two head searches a change.
    """

    def __init__(self) -> None:
        self._keys: list[Key] = []
        self.tokens = 0

    def add(self, prefix: Prefix, tokens: int) -> int:
        """Add the first `tokens` of `prefix`; returns by how many tokens the union grew."""
        if not tokens:
            return 0
        key = self._key(prefix, tokens)
        index = bisect_left(self._keys, key)
        grown = tokens - self._shared(key, index, index)
        self._keys.insert(index, key)
        self.tokens += grown
        return grown

    def remove(self, prefix: Prefix, tokens: int) -> int:
        """Take out what `add` put in; returns by how many tokens the union shrank."""
        if not tokens:
            return 0
        key = self._key(prefix, tokens)
        index = bisect_left(self._keys, key)
        assert self._keys[index] == key, "a prefix that was never added"
        del self._keys[index]
        shrunk = tokens - self._shared(key, index, index)
        self.tokens -= shrunk
        return shrunk

    def copy(self) -> PrefixUnion:
        """An independent union of the same prefixes; the bytes are shared."""
        twin = PrefixUnion()
        twin._keys = list(self._keys)
        twin.tokens = self.tokens
        return twin

    def clear(self) -> None:
        self._keys.clear()
        self.tokens = 0

    def check(self) -> None:
        """The running count equals the count from scratch, and the list is sorted."""
        assert self._keys == sorted(self._keys)
        total = 0
        for index, key in enumerate(self._keys):
            total += len(key[1]) // TOKEN_BYTES
            if index:
                total -= head_tokens(self._keys[index - 1], key)
        assert total == self.tokens, (total, self.tokens)

    @staticmethod
    def _key(prefix: Prefix, tokens: int) -> Key:
        assert 0 <= tokens <= prefix.tokens, (tokens, prefix.tokens)
        return (prefix.namespace.sort_key(), prefix.token_bytes[: tokens * TOKEN_BYTES])

    def _shared(self, key: Key, before: int, after: int) -> int:
        left = head_tokens(self._keys[before - 1], key) if before else 0
        right = head_tokens(self._keys[after], key) if after < len(self._keys) else 0
        return max(left, right)


def head_tokens(left: Key, right: Key) -> int:
    """Common head of two sorted keys; nothing is shared across namespaces."""
    return common_tokens(left[1], right[1]) if left[0] == right[0] else 0
