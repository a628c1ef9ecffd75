"""Who sends what: users in conversations, with reading, typing and advisories.

A user's next turn is due a think time after the answer; the advisory goes out when typing starts.
ShareGPT has no times, so SYMPHONY (§5.1) synthesises them from reading and typing speeds; its mean
lead is 11.3 s. Lengths are log-normal with ShareGPT's means.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Protocol

QUESTION_SIGMA, ANSWER_SIGMA, TYPING_SIGMA = 1.0, 0.8, 0.6


@dataclass(frozen=True, slots=True)
class UserRules:
    """Means of what users do; all are exact means of log-normal draws.

    Attributes:
        turns: of a conversation; then the user starts a new one.
        reading_seconds: before typing starts.
        typing_seconds: the lead of an advisory.
        gap_sigma: spread of the pauses; BurstGPT-like arrivals have a large one.
        tool_share: of the turns, that end with a tool call: an agent's next request comes when the
            tool is done, and its advisory when the call begins.
        tool_seconds: what a tool takes,
        tool_sigma: and its spread.
        history_tokens: of a conversation's first prompt beyond the question.
        skew: 0 for equal users; else the Pareto shape by which some have longer histories and
            read faster.
        session_rate: 0 for a closed loop, in which each of `users` starts over when a conversation
            ends; else conversations that begin per second, whoever is still waiting (`users` is
            then only a label).
        midway: the users of a closed loop are met somewhere in the middle of a conversation, and
            what they said before is on their workers' levels.
        chance_homes: those users' sessions are on workers drawn by chance; else in turn.
        arrival_variation: coefficient of variation of an open loop's gaps: 1 is Poisson, BurstGPT's
            gamma-distributed arrivals have more.
    """

    users: int
    turns: int = 6
    question_tokens: float = 150.0
    answer_tokens: float = 210.0
    history_tokens: float = 1500.0
    reading_seconds: float = 30.0
    typing_seconds: float = 11.3
    gap_sigma: float = 0.8
    tool_share: float = 0.0
    tool_seconds: float = 0.0
    tool_sigma: float = 1.6
    skew: float = 0.0
    session_rate: float = 0.0
    midway: bool = False
    chance_homes: bool = False
    arrival_variation: float = 1.0
    context_tokens_max: int = 16_000
    answer_tokens_max: int = 1024


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn to come: `lead_seconds` of its `think_seconds` come after the advisory.

    `history_tokens` of its prompt were said before, and are what an advisory can be about.
    """

    session: int
    turn: int
    new_tokens: int
    history_tokens: int
    answer_tokens: int
    think_seconds: float
    lead_seconds: float | None  # None: nothing can be advised


def log_normal(draw: random.Random, mean: float, sigma: float) -> float:
    """A draw whose expectation is `mean`."""
    return draw.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma) if mean > 0 else 0.0


class Asker(Protocol):
    """Whoever has conversations: what a cluster asks of a user."""

    number: int
    session: int
    context_tokens: int
    history_tokens: int
    start_seconds: float | None

    def next_turn(self) -> tuple[Turn, int | None] | None: ...

    def answered(self, answer_tokens: int) -> None: ...


class User:
    """One user's endless conversations, from a seed of their own."""

    def __init__(self, number: int, rules: UserRules, seed: int) -> None:
        self.number = number
        self.rules = rules
        self.start_seconds: float | None = None  # drawn by the cluster
        self.session = 0
        self._draw = random.Random(f"user/{seed}/{number}")
        self._conversation = -1
        self._left = 0
        self._turn = 0
        self.context_tokens = 0
        self.history_tokens = 0
        self._weight = 1.0
        if rules.skew:
            self._weight = self._draw.paretovariate(rules.skew)

    def next_turn(self) -> tuple[Turn, int | None] | None:
        """The next turn, and the session that ended with the one before, if it did.

        None where the user is gone: an open loop's after one conversation.
        """
        rules, draw = self.rules, self._draw
        ended = None
        question = max(4, int(log_normal(draw, rules.question_tokens, QUESTION_SIGMA)))
        answer = max(8, int(log_normal(draw, rules.answer_tokens, ANSWER_SIGMA)))
        answer = min(answer, rules.answer_tokens_max)
        if not self._left or self.context_tokens + question + answer > rules.context_tokens_max:
            ended = self.session if self._conversation >= 0 else None
            if ended is not None and rules.session_rate:
                return None
            self._conversation += 1
            self.session = self.number * 100_000 + self._conversation
            self._left = max(1, round(log_normal(draw, rules.turns, 0.5)))
            self._turn = 0
            history = log_normal(draw, rules.history_tokens * self._weight, 0.6)
            if rules.midway and not self._conversation and not rules.session_rate:
                said = int(draw.random() * self._left)
                self._left -= said
                self._turn = said
                history += said * (rules.question_tokens + rules.answer_tokens)
            self.context_tokens = min(int(history), rules.context_tokens_max // 2)
        if rules.tool_share and self._turn and draw.random() < rules.tool_share:
            reading, typing = 0.0, log_normal(draw, rules.tool_seconds, rules.tool_sigma)
        else:
            reading = log_normal(draw, rules.reading_seconds / self._weight, rules.gap_sigma)
            typing = log_normal(draw, rules.typing_seconds, TYPING_SIGMA)
        known = self.context_tokens if self._turn else 0
        new = self.context_tokens + question - known
        turn = Turn(self.session, self._turn, new, known, answer, reading + typing, typing)
        self.history_tokens = known
        self.context_tokens += question
        self._turn += 1
        self._left -= 1
        return turn, ended

    def answered(self, answer_tokens: int) -> None:
        self.context_tokens += answer_tokens
