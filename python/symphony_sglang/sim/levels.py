"""What one simulated worker holds of each session, level by level.

A session is one growing prefix, so what a level holds of it is a length from the start, in whole
pages. Levels are inclusive below the device: NVMe has the longest copy, and dropping a faster one
costs nothing. Eviction takes the least recently used session's last part, and all of that part, as
SGLang evicts whole leaves of its tree: what one turn added is one node. What running requests or
protections hold stays.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

from symphony_sglang.core.levels import Level

Changed = Callable[[Level, int, int, int], None]  # level, session, old and new length


@dataclass(slots=True)
class Holding:
    """One session on one level; `locked` by running requests, `kept` by protections.

    `ends` says where its nodes end, ascending; all levels of a worker share it, as they share
    SGLang's tree.
    """

    tokens: int = 0
    locked: int = 0
    kept: int = 0
    ends: list[int] = field(default_factory=list)

    @property
    def floor(self) -> int:
        return max(self.locked, self.kept)

    def without_leaf(self, tokens: int) -> int:
        """The length without the last node of the first `tokens`, or with what of it is held."""
        place = bisect_left(self.ends, tokens)
        return max(self.ends[place - 1] if place else 0, self.floor)


class LevelStore:
    """One level of one worker. `used` counts what sessions hold; a device also runs requests."""

    def __init__(
        self,
        level: Level,
        capacity_tokens: int,
        changed: Changed,
        nodes: dict[int, list[int]] | None = None,
    ) -> None:
        self.level = level
        self.capacity_tokens = capacity_tokens
        self.used_tokens = 0
        self.floor_tokens = 0
        self.evicted_tokens = 0
        self.added_tokens = 0  # since the start, as are those that left
        self.removed_tokens = 0
        self._held: OrderedDict[int, Holding] = OrderedDict()
        self._changed = changed
        self._nodes = {} if nodes is None else nodes

    def tokens(self, session: int) -> int:
        holding = self._held.get(session)
        return 0 if holding is None else holding.tokens

    def sessions(self) -> list[int]:
        """Those that are here, least recently used first."""
        return list(self._held)

    def floor(self, session: int) -> int:
        """What of the session cannot be evicted now."""
        holding = self._held.get(session)
        return 0 if holding is None else holding.floor

    @property
    def evictable_tokens(self) -> int:
        return self.used_tokens - self.floor_tokens

    @property
    def free_tokens(self) -> int:
        return self.capacity_tokens - self.used_tokens

    def touch(self, session: int) -> None:
        if session in self._held:
            self._held.move_to_end(session)

    def grow(self, session: int, tokens: int, *, room: int | None = None) -> int:
        """Hold the session up to `tokens`, evicting others; gives the length reached.

        `room` is what may be filled in all, where others use the level too.
        """
        holding = self._hold(session)
        self._held.move_to_end(session)
        wanted = tokens - holding.tokens
        if wanted <= 0:
            return holding.tokens
        free = self.free_tokens if room is None else room - self.used_tokens
        if free < wanted:
            free += self.evict(wanted - free, sparing=session)
        reached = holding.tokens + max(0, min(wanted, free))
        if reached > (holding.ends[-1] if holding.ends else 0):
            holding.ends.append(reached)
        self._resize(session, holding, reached)
        return holding.tokens

    def _hold(self, session: int) -> Holding:
        holding = self._held.get(session)
        if holding is None:
            holding = Holding(ends=self._nodes.setdefault(session, []))
            self._held[session] = holding
        return holding

    def shrink(self, session: int, tokens: int) -> None:
        """Drop what the session holds beyond `tokens`, but nothing that is locked or kept."""
        holding = self._held.get(session)
        if holding is not None and holding.tokens > tokens:
            self._resize(session, holding, max(tokens, holding.floor))

    def evict(self, tokens: int, *, sparing: int | None = None) -> int:
        """Free at least `tokens` from least recently used sessions, if they can; gives how many."""
        freed = 0
        victims: list[tuple[int, Holding, int]] = []
        for session, holding in self._held.items():
            if freed >= tokens:
                break
            left = holding.tokens
            if session == sparing or left <= holding.floor:
                continue
            while left > holding.floor and freed + holding.tokens - left < tokens:
                left = holding.without_leaf(left)
            victims.append((session, holding, left))
            freed += holding.tokens - left
        for session, holding, left in victims:
            self._resize(session, holding, left)
        self.evicted_tokens += freed
        return freed

    def lock(self, session: int, tokens: int) -> None:
        """A running request holds this much of the session; 0 lets go."""
        self._set_floor(session, locked=tokens)

    def keep(self, session: int, tokens: int) -> None:
        """A protection holds this much; 0 lets go."""
        self._set_floor(session, kept=tokens)

    def _set_floor(self, session: int, locked: int | None = None, kept: int | None = None) -> None:
        holding = self._hold(session)
        before = holding.floor
        if locked is not None:
            holding.locked = min(locked, holding.tokens)
        if kept is not None:
            holding.kept = min(kept, holding.tokens)
        self.floor_tokens += holding.floor - before
        self._tidy(session, holding)

    def _resize(self, session: int, holding: Holding, tokens: int) -> None:
        before = holding.tokens
        if tokens == before:
            return
        holding.tokens = tokens
        self.used_tokens += tokens - before
        if tokens > before:
            self.added_tokens += tokens - before
        else:
            self.removed_tokens += before - tokens
        self._changed(self.level, session, before, tokens)
        self._tidy(session, holding)

    def _tidy(self, session: int, holding: Holding) -> None:
        if not holding.tokens and not holding.floor:
            self._held.pop(session, None)

    def check(self) -> None:
        """The counts equal the sums, and the capacity holds."""
        assert self.used_tokens == sum(item.tokens for item in self._held.values())
        assert self.used_tokens == self.added_tokens - self.removed_tokens
        assert self.floor_tokens == sum(item.floor for item in self._held.values())
        assert 0 <= self.used_tokens <= self.capacity_tokens, (self.level, self.used_tokens)
        assert all(item.floor <= item.tokens for item in self._held.values())
