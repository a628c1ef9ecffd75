"""The location index says what a table of sets would, whatever order the feeds come in."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import IndexLimits, LocationIndex, PageRun
from symphony_sglang.core.routing_types import PrefixMatch

WORKERS = ["a", "b", "c"]
LEVELS = [Level.DEVICE, Level.HOST, Level.NVME]
levels = st.sampled_from(LEVELS)
workers = st.sampled_from(WORKERS)
numbers = st.integers(0, 10**6)


def forest(seed: int) -> list[list[int]]:
    """Chains that share heads, as prompts do; a page's hash is one of a kind."""
    source = random.Random(seed)
    chains = [[source.getrandbits(64) - 2**63 for _ in range(source.randint(1, 40))]]
    while len(chains) < 8:
        head = source.choice(chains)
        cut = source.randint(0, len(head))
        tail = [source.getrandbits(64) - 2**63 for _ in range(source.randint(1, 25))]
        chains.append(head[:cut] + tail)
    return chains


class Oracle:
    """Sets of pages, and every answer by going through them one by one."""

    def __init__(self) -> None:
        self.pages: dict[tuple[str, Level], set[int]] = {}

    def of(self, worker_id: str, level: Level) -> set[int]:
        return self.pages.setdefault((worker_id, level), set())

    def match(self, chain: list[int]) -> dict[str, PrefixMatch]:
        answer = {}
        for worker_id in WORKERS:
            ends, held = [], set()
            for level in LEVELS:
                held = held | self.of(worker_id, level)
                ends.append(next((i for i, page in enumerate(chain) if page not in held),
                                 len(chain)))  # fmt: skip
            if ends[2]:
                answer[worker_id] = PrefixMatch(ends[0], ends[1] - ends[0], ends[2] - ends[1])
        return answer


class LocationMachine(RuleBasedStateMachine):
    """Any sequence of reports, with loss, repetition and reordering, against the oracle."""

    @initialize(seed=numbers)
    def start(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.chains = forest(seed)
        self.oracle = Oracle()
        self.index = LocationIndex(IndexLimits(workers_max=5))

    def piece(self, seed: int) -> tuple[list[int], int | None]:
        """Consecutive pages of some chain, and the page before them."""
        source = random.Random(seed)
        chain = source.choice(self.chains)
        start = source.choice([0, source.randrange(len(chain))])
        stop = source.randint(start + 1, len(chain))
        return chain[start:stop], chain[start - 1] if start else None

    @rule(worker_id=workers, level=levels, seed=numbers, again=st.booleans())
    def store(self, worker_id: str, level: Level, seed: int, again: bool) -> None:
        hashes, parent = self.piece(seed)
        for _ in range(1 + again):
            self.index.stored(worker_id, level, hashes, parent)
        self.oracle.of(worker_id, level).update(hashes)

    @rule(worker_id=workers, level=levels, seed=numbers)
    def store_loose(self, worker_id: str, level: Level, seed: int) -> None:
        hashes, _ = self.piece(seed)
        random.Random(seed).shuffle(hashes)
        self.index.stored(worker_id, level, hashes, linked=False)
        self.oracle.of(worker_id, level).update(hashes)

    @rule(worker_id=workers, level=levels, seed=numbers)
    def store_page_by_page_backwards(self, worker_id: str, level: Level, seed: int) -> None:
        hashes, parent = self.piece(seed)
        parents = [parent, *hashes]
        for place in reversed(range(len(hashes))):
            self.index.stored(worker_id, level, [hashes[place]], parents[place])
        self.oracle.of(worker_id, level).update(hashes)

    @rule(worker_id=workers, level=levels, seed=numbers, tail=st.booleans())
    def remove(self, worker_id: str, level: Level, seed: int, tail: bool) -> None:
        hashes, _ = self.piece(seed)
        if tail:
            hashes = hashes[::-1]
        self.index.removed(worker_id, level, hashes)
        self.oracle.of(worker_id, level).difference_update(hashes)

    @rule(worker_id=workers, level=st.one_of(st.none(), levels))
    def clear(self, worker_id: str, level: Level | None) -> None:
        self.index.cleared(worker_id, level)
        for one in LEVELS if level is None else [level]:
            self.oracle.of(worker_id, one).clear()

    @rule(worker_id=workers, seed=numbers, linked=st.booleans())
    def restart(self, worker_id: str, seed: int, linked: bool) -> None:
        """A worker comes back with other contents, and sends all of it."""
        source = random.Random(seed)
        snapshot: dict[Level, list[PageRun]] = {}
        for level in LEVELS:
            pieces = [self.piece(source.randrange(10**6)) for _ in range(source.randint(0, 3))]
            snapshot[level] = [
                PageRun(h, parent if linked else None, linked) for h, parent in pieces
            ]
            self.oracle.pages[worker_id, level] = {page for h, _ in pieces for page in h}
        self.index.replace(worker_id, snapshot)

    @rule(worker_id=workers)
    def forget(self, worker_id: str) -> None:
        self.index.forget_worker(worker_id)
        for level in LEVELS:
            self.oracle.of(worker_id, level).clear()

    @rule()
    def reclaim(self) -> None:
        assert self.index.reclaim() == 0

    @rule(seed=numbers)
    def ask(self, seed: int) -> None:
        source = random.Random(seed)
        chain = source.choice(self.chains)
        chain = [*chain[: source.randint(0, len(chain))], source.getrandbits(60)]
        assert self.index.match(chain) == self.oracle.match(chain)

    @precondition(lambda self: hasattr(self, "index"))
    @invariant()
    def sound(self) -> None:
        self.index.check()

    def teardown(self) -> None:
        if not hasattr(self, "index"):
            return
        for chain in self.chains:
            asked = np.asarray(chain, dtype=np.int64)
            assert self.index.match(asked) == self.oracle.match(chain)
        for worker_id in WORKERS:
            held = {level: len(self.oracle.of(worker_id, level)) for level in LEVELS}
            assert self.index.pages(worker_id) == held
        pages = {page for held in self.oracle.pages.values() for page in held}
        for page in pages:
            for worker_id in WORKERS:
                for level in LEVELS:
                    held = page in self.oracle.of(worker_id, level)
                    assert self.index.has(worker_id, level, page) == held
        # Nothing is left behind once nobody holds anything.
        for worker_id in WORKERS:
            self.index.cleared(worker_id)
        self.index.reclaim()
        self.index.check()
        assert self.index.stats().pages == 0
        assert self.index.stats().holder_sets == 1


LocationMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, derandomize=True
)
TestLocation = LocationMachine.TestCase


def test_a_full_index_never_claims_more_than_the_truth() -> None:
    source = random.Random(5)
    chains = forest(3) + forest(4) + forest(5)
    pages = len({page for chain in chains for page in chain})
    limits = IndexLimits(pages_max=pages // 2, workers_max=3)
    index, oracle = LocationIndex(limits), Oracle()
    for _ in range(3000):
        worker_id, level = source.choice(WORKERS), source.choice(LEVELS)
        chain = source.choice(chains)
        cut = source.randint(0, len(chain) - 1)
        if source.random() < 0.6:
            index.stored(worker_id, level, chain[cut:], chain[cut - 1] if cut else None)
            oracle.of(worker_id, level).update(chain[cut:])
        else:
            index.removed(worker_id, level, chain[cut:])
            oracle.of(worker_id, level).difference_update(chain[cut:])
        index.check()
        asked = source.choice(chains)
        truth = oracle.match(asked)
        for name, match in index.match(asked).items():
            assert name in truth
            assert match.device_pages <= truth[name].device_pages
            assert match.device_pages + match.host_pages <= sum(truth[name][:2])
            assert match.pages <= truth[name].pages
    stats = index.stats()
    assert stats.pages <= pages // 2
    assert stats.forgotten_pages > 0 < stats.refused_pages
