"""The moves of a promotion, how they end, and the words for what held one back."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from symphony_sglang.core.levels import Hop


class Reason(StrEnum):
    """Why a status is what it is, word for word in the receipt."""

    UNKNOWN_SESSION = "unknown_session"
    SHORTER_THAN_PAGE = "shorter_than_a_page"
    ID_IN_USE = "advisory_id_in_use"
    BOOK_FULL = "book_full"
    DISPLACED = "displaced_by_higher_priority"
    NOT_STORED = "not_stored"
    NOT_RESIDENT = "not_resident"
    MOVE_ERROR = "move_failed"
    BUDGET_CLIP = "larger_than_protect_budget"
    BUDGET_IN_USE = "protect_budget_in_use"
    LEVEL_FULL = "level_full"
    DEMAND_FIRST = "requests_first"
    SLOTS_IN_USE = "transfer_slots_in_use"
    BACKOFF = "waiting_to_retry"
    NVME_SLOWER = "nvme_slower_than_recompute"
    HOST_SLOWER = "host_slower_than_recompute"
    YIELDED = "gave_way_to_running_work"
    DIVERGED = "request_has_another_prefix"
    CACHE_FLUSHED = "cache_flushed"
    EVICTED = "evicted_before_use"
    IN_USE = "in_use"


class MoveResult(StrEnum):
    """How a move ended."""

    DONE = "done"
    SHORT = "short"  # the level below holds no more than what came
    DECLINED = "declined"  # no room or no slot; worth another try
    ERROR = "error"  # the transfer failed; one more try, then clipped


@dataclass(frozen=True, slots=True)
class Move:
    """Bring tokens `start_tokens:stop_tokens` of an advisory's prefix one level up."""

    advisory_id: str
    hop: Hop
    start_tokens: int
    stop_tokens: int

    @property
    def tokens(self) -> int:
        return self.stop_tokens - self.start_tokens
