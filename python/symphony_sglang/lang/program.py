"""What the endpoint knows of one running program, and the events that it tells the adviser."""

from __future__ import annotations

import weakref
from enum import Enum, auto
from typing import Any, NamedTuple


class Program:
    """One ``sgl`` program: one session.

    Written by the program's own threads: `started` and `in_flight` by the one that executes, the
    rest before or after it. Read by the adviser's thread, which tolerates values a moment old.
    """

    __slots__ = (
        "__weakref__",
        "ended",
        "executor",
        "in_flight",
        "kept",
        "parent",
        "parent_text",
        "session_id",
        "started",
        "tool",
        "turns",
    )

    def __init__(
        self,
        executor: Any,
        session_id: str,
        parent: Program | None = None,
        parent_text: str | None = None,
    ) -> None:
        self.executor = weakref.ref(executor)
        self.session_id = session_id
        # Of a forked child: its parent where that has sent a request itself, and what they share.
        self.parent = parent
        self.parent_text = parent_text
        self.started = 0  # requests begun: a change tells that the program went on
        self.turns = 0  # requests that ended well: the server knows the session from the first on
        self.in_flight = 0
        self.ended = False  # its body is over; queued expressions may still run
        self.kept = False  # the author keeps the session beyond the program
        self.tool: ToolWait | None = None

    @property
    def over(self) -> bool:
        """Whether nothing of it can run any more."""
        executor = self.executor()
        if executor is None:
            return True
        return self.ended and not self.in_flight and (not executor.use_thread or is_done(executor))

    @property
    def text(self) -> str | None:
        """Its text so far, None with images: a hint by text could not name those."""
        executor = self.executor()
        if executor is None or executor.images_:
            return None
        return str(executor.text_)


def is_done(executor: Any) -> bool:
    return bool(executor.is_finished) or not executor.worker.is_alive()


class ToolWait(NamedTuple):
    """A tool is running; `due_seconds` is when its answer is expected, on the adviser's clock."""

    due_seconds: float | None


class Kind(Enum):
    """What can happen to a program."""

    TURN_ENDED = auto()
    FORKED = auto()
    TOOL = auto()  # a tool began, or told how far it is
    RETURNS = auto()  # the tool is done, or the author said that the next turn comes
    RETAIN = auto()
    ENDED = auto()


class Event(NamedTuple):
    kind: Kind
    program: Program
    # For RETURNS and RETAIN: fields of the hint's payload, beside what names the prefix.
    payload: dict[str, Any] | None = None
    # For TURN_ENDED: the program's `started` then; if it has grown since, the program went on.
    started: int = 0
