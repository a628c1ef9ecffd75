"""What is protected from eviction on each level, within a budget, and who gives way first.

Cooperative memory (SYMPHONY, NSDI'26): promoted pages are ordinary cache entries, held only inside
the budget, only until an expiry, and only until running work needs the room.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from types import MappingProxyType
from typing import NamedTuple

from symphony_sglang.core.levels import Level, page_floor
from symphony_sglang.core.prefix import Prefix, PrefixUnion


class HolderKind(IntEnum):
    """Who holds, in the order of giving way."""

    ADVISORY = 0
    REQUEST = 1  # the matched prefix of a queued request


@dataclass(frozen=True, slots=True)
class Holder:
    """Who a protection is for. `arrival` is any number that grows with each new holder."""

    holder_id: str
    kind: HolderKind
    priority: int
    expires_seconds: float
    arrival: int

    def give_way_key(self) -> tuple[int, int, float, int, str]:
        """Lowest priority first, then nearest expiry, then oldest; queued requests last."""
        return (self.kind, self.priority, self.expires_seconds, self.arrival, self.holder_id)


@dataclass(frozen=True, slots=True)
class Hold:
    """A prefix of which `resident_tokens` are here; up to `reserved_tokens` are on their way."""

    holder: Holder
    prefix: Prefix
    resident_tokens: int
    reserved_tokens: int


class Dropped(NamedTuple):
    """A protection that ended: the engine unlocks it, where it had locked it."""

    level: Level
    holder_id: str


class LevelLedger:
    """One level's budget. A head that several holders share is counted once.

    ``free + reserved + resident == cap`` at all times, in tokens: `resident` is the union of what
    is held here now, `reserved` what moves in flight will add to it.
    """

    def __init__(self, level: Level, cap_tokens: int, page_size: int) -> None:
        assert cap_tokens >= 0, cap_tokens
        self.level = level
        self.cap_tokens = cap_tokens
        self.page_size = page_size
        self._holds: dict[str, Hold] = {}
        self._held = PrefixUnion()
        self._resident = PrefixUnion()
        self._lengths: dict[str, int] = {}
        # Live and read-only: held prefix length of each holder, reservations included.
        self.lengths: Mapping[str, int] = MappingProxyType(self._lengths)
        # Grows with every change of a length.
        self.version = 0
        # No hold expires before this: a step without expiry costs one comparison.
        self._expiry_floor_seconds = float("inf")

    def __len__(self) -> int:
        return len(self._holds)

    @property
    def held_tokens(self) -> int:
        return self._held.tokens

    @property
    def resident_tokens(self) -> int:
        return self._resident.tokens

    @property
    def reserved_tokens(self) -> int:
        return self._held.tokens - self._resident.tokens

    @property
    def free_tokens(self) -> int:
        return self.cap_tokens - self._held.tokens

    def get(self, holder_id: str) -> Hold | None:
        return self._holds.get(holder_id)

    def holds(self) -> Iterator[Hold]:
        return iter(self._holds.values())

    def reserve(self, holder: Holder, prefix: Prefix, tokens: int) -> int:
        """Hold the first `tokens` of `prefix`, or as many whole pages as the budget allows.

        Returns the length now held, which never falls below what was held before.
        """
        old = self._holds.get(holder.holder_id)
        before = 0 if old is None else old.reserved_tokens
        if old is not None and tokens <= before and old.holder == holder:
            return before
        granted = tokens
        if tokens > before:
            self._held.remove(prefix, before)
            self._held.add(prefix, tokens)
            excess = self._held.tokens - self.cap_tokens
            if excess > 0:
                # It fitted before, so the excess lies in the new prefix's tail, which nobody
                # shares: a tail shorter by n tokens frees exactly n.
                granted = max(before, page_floor(tokens - excess, self.page_size))
                self._held.remove(prefix, tokens)
                self._held.add(prefix, granted)
        granted = max(granted, before)
        if granted:
            resident = 0 if old is None else old.resident_tokens
            self._holds[holder.holder_id] = Hold(holder, prefix, resident, granted)
            self._lengths[holder.holder_id] = granted
            self._lower_floor(holder)
            self.version += 1
        return granted

    def settle(self, holder_id: str, resident_tokens: int) -> None:
        """Nothing is on its way any more: the hold is what is resident, within what was granted."""
        old = self._holds.get(holder_id)
        if old is None:
            return
        tokens = min(resident_tokens, old.reserved_tokens)
        if tokens == 0:
            self.release(holder_id)
        elif tokens != old.resident_tokens or tokens != old.reserved_tokens:
            self._held.remove(old.prefix, old.reserved_tokens)
            self._held.add(old.prefix, tokens)
            self._resident.remove(old.prefix, old.resident_tokens)
            self._resident.add(old.prefix, tokens)
            self._holds[holder_id] = replace(old, resident_tokens=tokens, reserved_tokens=tokens)
            self._lengths[holder_id] = tokens
            self.version += 1

    def release(self, holder_id: str) -> int:
        """End a hold; returns the tokens that nobody holds any more, 0 for an unknown holder."""
        old = self._holds.pop(holder_id, None)
        if old is None:
            return 0
        del self._lengths[holder_id]
        self.version += 1
        self._resident.remove(old.prefix, old.resident_tokens)
        return self._held.remove(old.prefix, old.reserved_tokens)

    def renew(self, holder: Holder) -> None:
        """Take over a holder's new priority and expiry."""
        old = self._holds.get(holder.holder_id)
        if old is not None:
            self._holds[holder.holder_id] = replace(old, holder=holder)
            self._lower_floor(holder)

    def _lower_floor(self, holder: Holder) -> None:
        self._expiry_floor_seconds = min(self._expiry_floor_seconds, holder.expires_seconds)

    def give_way(self, tokens_needed: int, below: tuple[int, int] | None = None) -> tuple[str, ...]:
        """Who has to let go so that `tokens_needed` tokens are held by nobody, in that order.

        Args:
            tokens_needed: Resident tokens to be unprotected. A drop that frees nothing by itself
                (a shared head) still counts once its other holders are dropped too.
            below: Only holders under this (kind, priority); None for all.

        Nothing is changed. Where all drops together fall short, all are named.
        """
        if tokens_needed <= 0:
            return ()
        order = sorted(self._holds.values(), key=lambda hold: hold.holder.give_way_key())
        left = self._resident.copy()
        goal_tokens = left.tokens - tokens_needed
        chosen: list[str] = []
        for hold in order:
            if below is not None and (hold.holder.kind, hold.holder.priority) >= below:
                break
            if left.tokens <= goal_tokens:
                break
            left.remove(hold.prefix, hold.resident_tokens)
            chosen.append(hold.holder.holder_id)
        return tuple(chosen)

    def expired(self, now_seconds: float) -> tuple[str, ...]:
        """Holders whose time is over, in the order they came."""
        if now_seconds < self._expiry_floor_seconds:
            return ()
        expiries = {key: hold.holder.expires_seconds for key, hold in self._holds.items()}
        due = tuple([key for key, expires in expiries.items() if expires <= now_seconds])
        # Who is due may be kept by the caller, and is due again then.
        self._expiry_floor_seconds = min(expiries.values(), default=float("inf"))
        return due

    def clear(self) -> tuple[str, ...]:
        ids = tuple(self._holds)
        self._holds.clear()
        self._lengths.clear()
        self.version += 1
        self._held.clear()
        self._resident.clear()
        return ids

    def check(self) -> None:
        """Tokens are counted once, no count is negative, and no hold exceeds its prefix."""
        assert self.free_tokens + self.reserved_tokens + self.resident_tokens == self.cap_tokens
        assert self.free_tokens >= 0, (self.held_tokens, self.cap_tokens)
        assert self.reserved_tokens >= 0
        for hold in self._holds.values():
            assert hold.holder.expires_seconds >= self._expiry_floor_seconds
        self._held.check()
        self._resident.check()
        held, resident = PrefixUnion(), PrefixUnion()
        for hold in self._holds.values():
            assert 0 <= hold.resident_tokens <= hold.reserved_tokens <= hold.prefix.tokens
            assert hold.reserved_tokens > 0
            held.add(hold.prefix, hold.reserved_tokens)
            resident.add(hold.prefix, hold.resident_tokens)
        assert (held.tokens, resident.tokens) == (self.held_tokens, self.resident_tokens)
        assert self._lengths == {k: h.reserved_tokens for k, h in self._holds.items()}
