"""A worker's side of moves: reservations under a lease, and which sessions it owns.

Pure: the worker's engine feeds orders in and does the copying; the simulator does the same.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from symphony_sglang.core.migration import Order, OrderKind


class Progress(StrEnum):
    """How far the copy of a reservation is."""

    RESERVED = "reserved"
    COPYING = "copying"
    COPIED = "copied"
    FAILED = "failed"


class Reply(NamedTuple):
    """The answer to an order; `pending` means ask again, the work is under way."""

    move_id: str
    step: int
    worker_id: str
    ok: bool
    pending: bool = False
    reason: str = ""
    bytes_copied: int = 0


@dataclass(slots=True)
class Reservation:
    move_id: str
    session_id: str
    bytes: int
    expires_at_seconds: float
    progress: Progress = Progress.RESERVED
    step: int = -1  # of the copy under way
    bytes_copied: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class WorkerMoveLimits:
    """Bounds of one worker; beyond them a reservation is refused with the reason."""

    reservations_max: int = 64
    bytes_max: int = 8 << 30
    lease_seconds: float = 10.0  # renewed by every order of the move
    ended_max: int = 4096  # moves remembered so that a late order cannot revive one


class WorkerMoves:
    """The moves towards one worker."""

    def __init__(self, worker_id: str, limits: WorkerMoveLimits | None = None) -> None:
        self.worker_id = worker_id
        self.limits = limits or WorkerMoveLimits()
        self._reservations: dict[str, Reservation] = {}
        self._ended: OrderedDict[str, int] = OrderedDict()  # move -> epoch it took, 0: none

    def __len__(self) -> int:
        return len(self._reservations)

    @property
    def reserved_bytes(self) -> int:
        return sum(one.bytes for one in self._reservations.values())

    def get(self, move_id: str) -> Reservation | None:
        return self._reservations.get(move_id)

    def _end(self, move_id: str, epoch: int = 0) -> None:
        self._reservations.pop(move_id, None)
        self._ended[move_id] = max(epoch, self._ended.get(move_id, 0))
        self._ended.move_to_end(move_id)
        while len(self._ended) > self.limits.ended_max:
            self._ended.popitem(last=False)

    def lease_ended(self, now_seconds: float) -> bool:
        """Whether `expire` would end a reservation."""
        return any(now_seconds >= one.expires_at_seconds for one in self._reservations.values())

    def expire(self, now_seconds: float, but: str = "") -> list[str]:
        """End the reservations whose router has been silent; the moves that ended.

        Args:
            but: a move of which an order has just come, however late it is taken up.
        """
        late = [
            one.move_id
            for one in self._reservations.values()
            if now_seconds >= one.expires_at_seconds and one.move_id != but
        ]
        for move_id in late:
            self._end(move_id)
        return late

    def reserve(self, order: Order, now_seconds: float) -> Reply:
        """Room for a move, or the reason why not."""
        assert order.kind is OrderKind.RESERVE, order
        self.expire(now_seconds, order.move_id)
        if order.move_id in self._ended:
            return self._reply(order, False, "move_ended")
        known = self._reservations.get(order.move_id)
        if known is not None:
            self._renew(known, now_seconds)
            return self._reply(order, True)
        if len(self._reservations) >= self.limits.reservations_max:
            return self._reply(order, False, "too_many_moves")
        if self.reserved_bytes + order.bytes > self.limits.bytes_max:
            return self._reply(order, False, "no_room")
        one = Reservation(order.move_id, order.session_id, order.bytes, 0.0)
        self._renew(one, now_seconds)
        self._reservations[order.move_id] = one
        return self._reply(order, True)

    def copy(self, order: Order, now_seconds: float) -> tuple[Reply, bool]:
        """The state of the copy, and whether a new one is to be started now."""
        one = self._reservations.get(order.move_id)
        if one is None:
            return self._reply(order, False, "no_reservation"), False
        self._renew(one, now_seconds)
        if order.step < one.step:
            return self._reply(order, False, "late_order"), False
        if order.step > one.step:
            one.step, one.progress = order.step, Progress.COPYING
            return self._reply(order, True, pending=True), True
        if one.progress is Progress.COPYING:
            return self._reply(order, True, pending=True), False
        ok = one.progress is Progress.COPIED
        return self._reply(order, ok, one.reason, bytes_copied=one.bytes_copied), False

    def copied(self, move_id: str, step: int, ok: bool, reason: str, bytes_copied: int) -> None:
        """The engine ended the copy that `step` began; of an older one it means nothing."""
        one = self._reservations.get(move_id)
        if one is None or one.step != step or one.progress is not Progress.COPYING:
            return
        one.progress = Progress.COPIED if ok else Progress.FAILED
        one.reason, one.bytes_copied = reason, bytes_copied

    def verify(self, order: Order, complete: bool, now_seconds: float) -> Reply:
        """`complete`: every page of the session's record is here now."""
        one = self._reservations.get(order.move_id)
        if one is None:
            return self._reply(order, False, "no_reservation")
        self._renew(one, now_seconds)
        return self._reply(order, complete, "" if complete else "pages_missing")

    def may_switch(self, order: Order, epoch_here: int, has_record: bool) -> Reply:
        """Whether the worker takes the session now; the caller then owns it, and calls `switched`.

        Args:
            epoch_here: the epoch under which the session is known here, -1 for none.
        """
        if self._ended.get(order.move_id, 0) == order.epoch:
            return self._reply(order, True)  # said before
        if order.move_id not in self._reservations:
            return self._reply(order, False, "no_reservation")
        if not has_record:
            return self._reply(order, False, "no_record")
        if epoch_here >= order.epoch:
            return self._reply(order, False, "newer_epoch")
        return self._reply(order, True)

    def switched(self, order: Order) -> None:
        self._end(order.move_id, order.epoch)

    def abort(self, order: Order) -> Reply:
        """Idempotent, and final: the move cannot come back."""
        self._end(order.move_id)
        return self._reply(order, True)

    def _renew(self, one: Reservation, now_seconds: float) -> None:
        one.expires_at_seconds = now_seconds + self.limits.lease_seconds

    def _reply(
        self,
        order: Order,
        ok: bool,
        reason: str = "",
        *,
        pending: bool = False,
        bytes_copied: int = 0,
    ) -> Reply:
        return Reply(order.move_id, order.step, self.worker_id, ok, pending, reason, bytes_copied)

    def check(self) -> None:
        assert len(self._reservations) <= self.limits.reservations_max
        assert self.reserved_bytes <= self.limits.bytes_max
        assert len(self._ended) <= self.limits.ended_max
        assert not self._reservations.keys() & self._ended.keys()
