"""What became of the advisories: counts, lead times, bytes, held memory over time, and harm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from symphony_sglang.core.levels import PROTECTED_LEVELS, Hop, Level
from symphony_sglang.core.lifecycle import FINAL_STATES, Ended, State, Status

# Upper bounds of the lead-time histogram, in seconds; the last bucket is open.
LEAD_BOUNDS_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Counts below fixed bounds, with the sum: what a metrics endpoint wants."""

    def __init__(self, bounds: tuple[float, ...] = LEAD_BOUNDS_SECONDS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        index = sum(1 for bound in self.bounds if value > bound)
        self.counts[index] += 1
        self.sum += value

    @property
    def total(self) -> int:
        return sum(self.counts)

    def as_json(self) -> dict[str, Any]:
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.sum}


class OutcomeLedger:
    """Totals since the start. All arguments are events that every rank sees alike.

    An advisory is harmful when a page that was evicted to make room for it is asked for before the
    advisory itself was used. Evicted pages are remembered as ghosts, up to `ghosts_max`; beyond
    that the oldest ghost is forgotten and its harm goes uncounted.
    """

    def __init__(self, ghosts_max: int = 65_536) -> None:
        assert ghosts_max > 0, ghosts_max
        self.ghosts_max = ghosts_max
        self.statuses = dict.fromkeys(Status, 0)
        self.outcomes = dict.fromkeys(FINAL_STATES, 0)
        self.harmful = 0
        self.harmful_pages = 0
        self.moved_tokens = dict.fromkeys(Hop, 0)
        self.moved_bytes = dict.fromkeys(Hop, 0)
        self.wasted_tokens = 0
        self.lead_seconds = Histogram()  # receipt to the request's arrival, where it arrived
        self.ready_seconds = Histogram()  # receipt to ready, of those that ended ready
        # Receipt to end, by how it ended.
        self.lead_by_state = {
            state: Histogram() for state in (State.USED, State.LATE, State.WASTED)
        }
        self._held_tokens = dict.fromkeys(PROTECTED_LEVELS, 0)
        self._held_since = dict.fromkeys(PROTECTED_LEVELS, 0.0)
        self._held_token_seconds = dict.fromkeys(PROTECTED_LEVELS, 0.0)
        self._ghosts: OrderedDict[str, str] = OrderedDict()  # page hash -> advisory id
        # The ghosts left of each advisory that has any, and those whose harm was counted.
        self._ghosts_of: dict[str, dict[str, None]] = {}
        self._blamed: dict[str, None] = {}

    def received(self, status: Status) -> None:
        """A receipt was given with this status."""
        self.statuses[status] += 1

    def ended(self, end: Ended) -> None:
        self.outcomes[end.state] += 1
        if end.state in self.lead_by_state:
            self.lead_by_state[end.state].add(end.lead_seconds)
        if end.state in (State.USED, State.LATE, State.RECLAIMED):
            self.lead_seconds.add(end.lead_seconds)
        else:
            self.wasted_tokens += end.moved_tokens
        if end.ready_seconds is not None:
            self.ready_seconds.add(end.ready_seconds)
        if end.state is State.USED:
            # Its use came first, so what it evicted was worth evicting.
            self._forgive(end.advisory_id)

    def moved(self, hop: Hop, tokens: int, moved_bytes: int) -> None:
        self.moved_tokens[hop] += tokens
        self.moved_bytes[hop] += moved_bytes

    def held(self, level: Level, tokens: int, now_seconds: float) -> None:
        """From now on `tokens` tokens are protected on `level`."""
        span = max(0.0, now_seconds - self._held_since[level])
        self._held_token_seconds[level] += self._held_tokens[level] * span
        self._held_tokens[level] = tokens
        self._held_since[level] = now_seconds

    def held_token_seconds(self, level: Level, now_seconds: float) -> float:
        """Token-seconds of protection up to now: times bytes per token, the price of the hints."""
        span = max(0.0, now_seconds - self._held_since[level])
        return self._held_token_seconds[level] + self._held_tokens[level] * span

    def evicted(self, advisory_id: str, page_hashes: Iterable[str]) -> None:
        """These pages left a level so that the advisory's pages could come."""
        for page_hash in page_hashes:
            self._drop_ghost(page_hash)
            self._ghosts[page_hash] = advisory_id
            self._ghosts_of.setdefault(advisory_id, {})[page_hash] = None
            if len(self._ghosts) > self.ghosts_max:
                self._drop_ghost(next(iter(self._ghosts)))

    def asked(self, page_hashes: Iterable[str]) -> int:
        """A request needs these pages and does not find them; how many an advisory cost it."""
        if not self._ghosts:
            return 0
        pages = 0
        for page_hash in page_hashes:
            advisory_id = self._ghosts.get(page_hash)
            if advisory_id is None:
                continue
            pages += 1
            if advisory_id not in self._blamed:
                self._blamed[advisory_id] = None
                self.harmful += 1
            self._drop_ghost(page_hash)
        self.harmful_pages += pages
        return pages

    @property
    def remembers_evictions(self) -> bool:
        """Whether `asked` could find anything."""
        return bool(self._ghosts)

    def _drop_ghost(self, page_hash: str) -> None:
        advisory_id = self._ghosts.pop(page_hash, None)
        if advisory_id is None:
            return
        left = self._ghosts_of[advisory_id]
        del left[page_hash]
        if not left:
            del self._ghosts_of[advisory_id]
            self._blamed.pop(advisory_id, None)

    def _forgive(self, advisory_id: str) -> None:
        for page_hash in self._ghosts_of.pop(advisory_id, ()):
            del self._ghosts[page_hash]
        self._blamed.pop(advisory_id, None)

    def flushed(self) -> None:
        """The cache was emptied: what is missing from now on, no advisory evicted."""
        self._ghosts.clear()
        self._ghosts_of.clear()
        self._blamed.clear()

    def as_json(self, now_seconds: float) -> dict[str, Any]:
        return {
            "statuses": {status.value: count for status, count in self.statuses.items()},
            "outcomes": {state.value: count for state, count in self.outcomes.items()},
            "harmful": self.harmful,
            "harmful_pages": self.harmful_pages,
            "moved_tokens": {hop.value: count for hop, count in self.moved_tokens.items()},
            "moved_bytes": {hop.value: count for hop, count in self.moved_bytes.items()},
            "wasted_tokens": self.wasted_tokens,
            "lead_seconds": self.lead_seconds.as_json(),
            "ready_seconds": self.ready_seconds.as_json(),
            **{
                f"{state.value}_lead_seconds": histogram.as_json()
                for state, histogram in self.lead_by_state.items()
            },
            "held_token_seconds": {
                level.value: self.held_token_seconds(level, now_seconds)
                for level in PROTECTED_LEVELS
            },
        }

    def check(self) -> None:
        """The ghost list is within its bound and its per-advisory counts add up."""
        assert len(self._ghosts) <= self.ghosts_max
        assert sum(map(len, self._ghosts_of.values())) == len(self._ghosts)
        assert all(self._ghosts_of.values())
        assert self._blamed.keys() <= self._ghosts_of.keys()
        assert self.lead_seconds.total <= sum(self.outcomes.values())
