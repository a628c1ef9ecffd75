"""Prompts whose token ids are not known, as pages of text: which worker was sent which head.

Without a tokenizer nobody can tell which of a worker's pages a text means. So the text is cut into
blocks of about a page, hashed as a chain under names that no token page has, and put into the same
index as if its worker had reported it. Unlike a report this is a guess: it is never told of
evictions, forgets the oldest prompts when it is full, and is void when the worker's cache is
cleared.
"""

from __future__ import annotations

import hashlib
from collections import Counter, OrderedDict

import numpy as np

from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.core.routing_types import EventHashes

BYTES_PER_TOKEN = 4
PAGES_MAX = 200_000
# What one prompt may take; its head is what others share.
PROMPT_PAGES_MAX = 4096


def text_hashes(text: str, page_size: int, namespace: Namespace) -> EventHashes:
    """The chain of `text`, one hash for each whole block of `page_size` tokens' worth of bytes."""
    data = text.encode("utf-8", "surrogatepass")
    block = page_size * BYTES_PER_TOKEN
    digest = hashlib.blake2b(repr(("text", *namespace)).encode("utf-8", "surrogatepass"))
    hashes = bytearray()
    for start in range(0, min(len(data) // block, PROMPT_PAGES_MAX) * block, block):
        digest.update(data[start : start + block])
        hashes += digest.digest()[:8]
    return np.frombuffer(bytes(hashes), dtype="<i8").astype(np.int64)


class TextPages:
    """What was sent where. Its pages are counted, because prompts share their heads."""

    def __init__(self, index: LocationIndex, *, pages_max: int = PAGES_MAX) -> None:
        self._index = index
        self._pages_max = pages_max
        self._prompts: OrderedDict[tuple[str, int], list[int]] = OrderedDict()
        self._uses: Counter[tuple[str, int]] = Counter()
        self._pages = 0

    def sent(self, domain_id: str, hashes: EventHashes) -> None:
        """A prompt with this chain was answered by `domain_id`."""
        chain: list[int] = hashes.tolist()
        if not chain:
            return
        key = (domain_id, chain[-1])
        if key in self._prompts:
            self._prompts.move_to_end(key)
        else:
            self._prompts[key] = chain
            self._pages += len(chain)
            self._uses.update((domain_id, page) for page in chain)
        self._index.stored(domain_id, Level.DEVICE, chain)
        while self._pages > self._pages_max:
            self._drop(next(iter(self._prompts)))

    def _drop(self, key: tuple[str, int]) -> None:
        chain = self._prompts.pop(key)
        self._pages -= len(chain)
        gone = []
        for page in chain:
            use = (key[0], page)
            self._uses[use] -= 1
            if not self._uses[use]:
                del self._uses[use]
                gone.append(page)
        self._index.removed(key[0], Level.DEVICE, gone)

    def cleared(self, domain_id: str) -> None:
        """The worker's cache is empty, or the worker is gone."""
        for key in [key for key in self._prompts if key[0] == domain_id]:
            self._drop(key)

    def check(self) -> None:
        assert self._pages == sum(len(chain) for chain in self._prompts.values())
        assert self._pages <= self._pages_max
        expected = Counter((key[0], page) for key, chain in self._prompts.items() for page in chain)
        assert expected == self._uses
