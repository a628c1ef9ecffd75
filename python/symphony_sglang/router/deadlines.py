"""How long a request may take in all: one table, looked at once a second.

A timer for each request costs more than the rest of what the router does for a small one, and most
never fire.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from symphony_sglang.clock import Clock


@dataclass(slots=True, eq=False)
class Deadline:
    """`passed`: the task was cancelled because its time was over."""

    task: asyncio.Task[None] | None
    at_seconds: float
    passed: bool = False


class Deadlines:
    """Cancels the tasks that are over their time, up to a second late."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: OrderedDict[int, Deadline] = OrderedDict()  # by entering

    def enter(self, seconds: float) -> Deadline:
        """The current task may take this long from now on, until `leave`."""
        deadline = Deadline(asyncio.current_task(), self._clock.monotonic() + seconds)
        self._waiting[id(deadline)] = deadline
        return deadline

    def leave(self, deadline: Deadline) -> None:
        """In time, or late: `passed` tells. A cancellation that `passed` explains is over."""
        self._waiting.pop(id(deadline), None)
        if deadline.passed and deadline.task is not None:
            deadline.task.uncancel()

    def tick(self) -> None:
        """Cancel what is over. All have the same limit, so the oldest end first."""
        now = self._clock.monotonic()
        for deadline in list(self._waiting.values()):
            if deadline.at_seconds > now:
                return
            del self._waiting[id(deadline)]
            deadline.passed = True
            if deadline.task is not None:
                deadline.task.cancel()

    def check(self) -> None:
        assert all(not deadline.passed for deadline in self._waiting.values())
