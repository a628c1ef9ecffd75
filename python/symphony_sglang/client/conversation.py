"""One conversation at a keyboard: which calls it makes, and when; no I/O, no clock of its own.

The steps are generators: they yield a `Call`, get its answer or its error, and return a result. A
session of either client runs them.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any, TypeAlias, TypeVar

from symphony_sglang.client import calls
from symphony_sglang.client.answers import Receipt
from symphony_sglang.client.calls import Call
from symphony_sglang.client.typing_state import TypingState
from symphony_sglang.errors import ClientError, NotKnownError, ServerUnavailableError

T = TypeVar("T")
Steps: TypeAlias = Generator[Call[Any], Any, T]


class Conversation:
    """`release`: leaving ends the session too."""

    def __init__(self, session_id: str, expires_in_s: float, *, release: bool) -> None:
        self.session_id = session_id
        self.state = TypingState(expires_in_s)
        self._release = release

    def type(self, now_seconds: float, expected_in_s: float | None) -> Steps[Receipt]:
        """A key was pressed."""
        if self.state.due(now_seconds):
            receipt = yield calls.advise(
                self.session_id,
                expected_in_s=expected_in_s,
                expires_in_s=self.state.expires_seconds,
            )
            self.state.advised(receipt, now_seconds)
        assert self.state.receipt is not None
        return self.state.receipt

    def clear(self) -> Steps[Receipt | None]:
        """The line was emptied."""
        receipt = self.state.take()
        if receipt is None or receipt.advisory_id is None or not receipt.live:
            return None
        return (yield from unless_unknown(calls.cancel(receipt.advisory_id)))

    def end(self) -> Steps[Receipt | None]:
        """The conversation is over."""
        return (yield from unless_unknown(calls.release(self.session_id)))

    def leave(self, *, stumbled: bool) -> Steps[None]:
        """The block is left; `stumbled`: by an error, which is the one to see."""
        try:
            yield from self.clear()
            if self._release:
                yield from self.end()
        except (ClientError, ServerUnavailableError):
            if not stumbled:
                raise


def unless_unknown(call: Call[Receipt]) -> Steps[Receipt | None]:
    """The answer; None where the server knows nothing of what is meant."""
    try:
        receipt: Receipt = yield call
    except NotKnownError:
        return None
    return receipt
