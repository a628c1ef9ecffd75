"""Users who do what was recorded of a real run: the same lengths, pauses and leads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from symphony_sglang.sim.users import Turn


@dataclass(frozen=True, slots=True)
class RecordedTurn:
    """One request of a session. `think_seconds` is counted from the end of the one before (of the
    first: from the start of the run); `lead_seconds` None means that nothing was advised."""

    prompt_tokens: int
    answer_tokens: int
    think_seconds: float
    lead_seconds: float | None = None


class RecordedUser:
    """One recorded session. What of a prompt could have been there is the prompt before it: traces
    continue with the answers of their own time, not with those just generated."""

    def __init__(self, number: int, turns: Sequence[RecordedTurn]) -> None:
        assert turns
        self.number = number
        self.session = number
        self.context_tokens = 0
        self.history_tokens = 0
        self.start_seconds: float | None = turns[0].think_seconds
        self._turns = turns
        self._next = 0

    def next_turn(self) -> tuple[Turn, int | None] | None:
        """The next turn; None after the last."""
        if self._next == len(self._turns):
            return None
        turn = self._turns[self._next]
        before = self._turns[self._next - 1].prompt_tokens if self._next else 0
        self.history_tokens = min(before, turn.prompt_tokens)
        self.context_tokens = turn.prompt_tokens
        self._next += 1
        made = Turn(
            session=self.session,
            turn=self._next - 1,
            new_tokens=turn.prompt_tokens - self.history_tokens,
            history_tokens=self.history_tokens,
            answer_tokens=max(1, turn.answer_tokens),
            think_seconds=turn.think_seconds,
            lead_seconds=turn.lead_seconds,
        )
        return made, None

    def answered(self, answer_tokens: int) -> None:
        """The next prompt is as recorded, whatever was answered."""
