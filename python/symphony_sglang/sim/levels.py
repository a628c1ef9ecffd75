"""What one simulated worker holds of each session, level by level.

A session is one growing prefix, so what a level holds of it is a length from the start, in whole
pages. Levels are inclusive below the device: NVMe has the longest copy, and dropping a faster one
costs nothing. Eviction takes the least recently used session's tail, as SGLang's leaf-first
eviction does; what running requests or protections hold stays.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from symphony_sglang.core.levels import Level

Changed = Callable[[Level, int, int, int], None]  # level, session, old and new length


@dataclass(slots=True)
class Holding:
    """One session on one level; `locked` by running requests, `kept` by protections."""

    tokens: int = 0
    locked: int = 0
    kept: int = 0

    @property
    def floor(self) -> int:
        return max(self.locked, self.kept)


class LevelStore:
    """One level of one worker. `used` counts what sessions hold; a device also runs requests."""

    def __init__(self, level: Level, capacity_tokens: int, changed: Changed) -> None:
        self.level = level
        self.capacity_tokens = capacity_tokens
        self.used_tokens = 0
        self.floor_tokens = 0
        self.evicted_tokens = 0
        self._held: OrderedDict[int, Holding] = OrderedDict()
        self._changed = changed

    def tokens(self, session: int) -> int:
        holding = self._held.get(session)
        return 0 if holding is None else holding.tokens

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
        holding = self._held.setdefault(session, Holding())
        self._held.move_to_end(session)
        wanted = tokens - holding.tokens
        if wanted <= 0:
            return holding.tokens
        free = self.free_tokens if room is None else room - self.used_tokens
        if free < wanted:
            free += self.evict(wanted - free, sparing=session)
        self._resize(session, holding, holding.tokens + max(0, min(wanted, free)))
        return holding.tokens

    def shrink(self, session: int, tokens: int) -> None:
        """Drop what the session holds beyond `tokens`, but nothing that is locked or kept."""
        holding = self._held.get(session)
        if holding is not None and holding.tokens > tokens:
            self._resize(session, holding, max(tokens, holding.floor))

    def evict(self, tokens: int, *, sparing: int | None = None) -> int:
        """Free up to `tokens` from least recently used sessions; gives how many."""
        freed = 0
        victims: list[tuple[int, Holding, int]] = []
        for session, holding in self._held.items():
            if freed >= tokens:
                break
            spare = holding.tokens - holding.floor
            if session != sparing and spare > 0:
                take = min(spare, tokens - freed)
                victims.append((session, holding, take))
                freed += take
        for session, holding, take in victims:
            self._resize(session, holding, holding.tokens - take)
        self.evicted_tokens += freed
        return freed

    def lock(self, session: int, tokens: int) -> None:
        """A running request holds this much of the session; 0 lets go."""
        self._set_floor(session, locked=tokens)

    def keep(self, session: int, tokens: int) -> None:
        """A protection holds this much; 0 lets go."""
        self._set_floor(session, kept=tokens)

    def _set_floor(self, session: int, locked: int | None = None, kept: int | None = None) -> None:
        holding = self._held.setdefault(session, Holding())
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
        self._changed(self.level, session, before, tokens)
        self._tidy(session, holding)

    def _tidy(self, session: int, holding: Holding) -> None:
        if not holding.tokens and not holding.floor:
            self._held.pop(session, None)

    def check(self) -> None:
        """The counts equal the sums, and the capacity holds."""
        assert self.used_tokens == sum(item.tokens for item in self._held.values())
        assert self.floor_tokens == sum(item.floor for item in self._held.values())
        assert 0 <= self.used_tokens <= self.capacity_tokens, (self.level, self.used_tokens)
        assert all(item.floor <= item.tokens for item in self._held.values())
