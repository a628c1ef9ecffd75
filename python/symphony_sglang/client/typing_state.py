"""When a typing client sends an advisory, and when it keeps quiet: no I/O, no clock of its own."""

from __future__ import annotations

from symphony_sglang.client.answers import Receipt

EXPIRES_SECONDS = 60.0


class TypingState:
    """One session's keyboard. A hint lives for `expires_seconds` and is renewed after half of it.

    The states are: no hint out (`receipt` is None), a hint out, and a turn sent, which forgets the
    hint because the request itself ends it.
    """

    def __init__(self, expires_seconds: float = EXPIRES_SECONDS) -> None:
        self.expires_seconds = expires_seconds
        self.receipt: Receipt | None = None
        self._sent_seconds = 0.0

    def due(self, now_seconds: float) -> bool:
        """Whether a key pressed now calls for a hint."""
        if self.receipt is None:
            return True
        return now_seconds - self._sent_seconds >= self.expires_seconds / 2

    def advised(self, receipt: Receipt, now_seconds: float) -> None:
        self.receipt, self._sent_seconds = receipt, now_seconds

    def take(self) -> Receipt | None:
        """The hint that is out, which from now on is not."""
        receipt, self.receipt = self.receipt, None
        return receipt
