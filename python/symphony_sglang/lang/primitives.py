"""What a program's author can say. `s` is a program's state, as SGLang hands it to the function.

None of these blocks, and on a backend other than `SymphonyEndpoint` none does anything, so that a
program keeps running everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from symphony_sglang.client.protocol import timing
from symphony_sglang.lang.adviser import SECONDS_MAX, Adviser
from symphony_sglang.lang.endpoint import SymphonyEndpoint
from symphony_sglang.lang.program import Event, Kind, Program, ToolWait

ID_CHARACTERS_MAX = 256
# A forecast that moves by less is not told again.
PROGRESS_SECONDS_MIN = 0.2
PROGRESS_SHARE_MIN = 0.1


def located(s: Any) -> tuple[Adviser, Program] | None:
    """The adviser and the program of a state; None on another backend, or while tracing."""
    executor = getattr(s, "stream_executor", None)
    backend = getattr(executor, "backend", None)
    if not isinstance(backend, SymphonyEndpoint):
        return None
    return backend.adviser, backend.program(executor)


def seconds(name: str, value: float) -> float:
    """`value` within what a hint can say.

    Raises:
        ValueError: it is negative or no number.
    """
    if not value >= 0:
        raise ValueError(f"{name} is {value!r}; expected 0 or more seconds")
    return min(float(value), SECONDS_MAX)


def advise(
    s: Any,
    expected_in_s: float | None = None,
    *,
    expires_in_s: float | None = None,
    priority: int | None = None,
    target: str | None = None,
) -> None:
    """The program's next turn comes in about so many seconds (None: soon).

    `target` is ``device`` (default) or ``host``.
    """
    found = located(s)
    if found is None:
        return
    payload = timing(
        expected_in_s=None if expected_in_s is None else seconds("expected_in_s", expected_in_s),
        expires_in_s=None if expires_in_s is None else seconds("expires_in_s", expires_in_s),
        priority=priority,
        target=target,
    )
    adviser, program = found
    adviser.tell(Event(Kind.RETURNS, program, payload))


def retain(s: Any, seconds_to_keep: float) -> None:
    """Ask that the program's KV stays for so long, also after the program has ended."""
    found = located(s)
    if found is None:
        return
    adviser, program = found
    keep = seconds("seconds_to_keep", seconds_to_keep)
    program.kept = True
    adviser.tell(Event(Kind.RETAIN, program, {"expires_in_s": keep}))


def name_session(s: Any, session_id: str) -> None:
    """Make the program a turn of a session of the caller's; it is not released at the end.

    Call it before the program's first generation.

    Raises:
        ValueError: the id is empty, too long, or the program has already sent a request.
    """
    if not isinstance(session_id, str) or not 0 < len(session_id) <= ID_CHARACTERS_MAX:
        raise ValueError(
            f"session_id is {session_id!r}; expected text of 1 to {ID_CHARACTERS_MAX} characters"
        )
    found = located(s)
    if found is None:
        return
    _, program = found
    if program.started:
        raise ValueError(f"session_id {session_id!r} comes after the program's first request")
    program.session_id, program.kept = session_id, True


class ToolCall:
    """A tool that is running; tell it what becomes known of when it will be done."""

    def __init__(self, s: Any, expected_s: float | None) -> None:
        self._found = located(s)
        self._started_seconds = 0.0 if self._found is None else self._now()
        self._due_seconds: float | None = None
        self._tell(None if expected_s is None else seconds("expected_s", expected_s))

    def _now(self) -> float:
        assert self._found is not None
        return self._found[0].clock.monotonic()

    def _tell(self, left: float | None) -> None:
        if self._found is not None:
            adviser, program = self._found
            self._due_seconds = None if left is None else self._now() + left
            program.tool = ToolWait(self._due_seconds)
            adviser.tell(Event(Kind.TOOL, program))

    def expect(self, left_s: float) -> None:
        """The tool now looks as if it needed so many seconds more."""
        self._tell(seconds("left_s", left_s))

    def progress(self, share: float) -> None:
        """So much of the work is done, 0 to 1: what is left is reckoned from the time so far.

        Raises:
            ValueError: `share` is outside 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share is {share!r}; expected 0 to 1")
        if self._found is not None and share > 0:
            now_seconds = self._now()
            left = min(SECONDS_MAX, (now_seconds - self._started_seconds) * (1 - share) / share)
            # A tool may report often; only a changed forecast is worth a message.
            shift = abs(now_seconds + left - (self._due_seconds or 0.0))
            if shift > max(PROGRESS_SECONDS_MIN, PROGRESS_SHARE_MIN * left):
                self._tell(left)

    def finish(self) -> None:
        """The answer is there: the next turn follows at once."""
        if self._found is not None:
            adviser, program = self._found
            program.tool = None
            adviser.tell(Event(Kind.RETURNS, program, {"expected_in_s": 0.0, "priority": 1}))


@contextmanager
def tool_call(s: Any, expected_s: float | None = None) -> Iterator[ToolCall]:
    """The program waits for a tool inside the block: advised at its start and at its end.

    with tool_call(s, expected_s=2.0) as call:
        answer = search(query, on_progress=call.progress)
    """
    call = ToolCall(s, expected_s)
    try:
        yield call
    finally:
        # Also after an error: an agent shows it to the model, and goes on.
        call.finish()
