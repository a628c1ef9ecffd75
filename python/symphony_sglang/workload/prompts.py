"""What of a trace's session is sent: token ids for its blocks, lengths scaled, sessions cut to fit.

Equal block ids become equal tokens, so what can be reused is exactly what the trace says, at its
own granularity. An answer is not reused: the next prompt carries the trace's answer, not the
model's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from symphony_sglang.errors import ConfigError
from symphony_sglang.workload.traces import (
    BlockPrompt,
    LengthPrompt,
    Session,
    TextPrompt,
    Turn,
)

# Ids below are bytes and special tokens in most vocabularies.
FIRST_TOKEN_ID = 256
# For answers of which the trace has only the text.
CHARACTERS_PER_TOKEN = 4

TokenIds = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Limits:
    """What one request may hold, in tokens, after scaling."""

    prompt_tokens_max: int
    context_tokens: int
    output_tokens_max: int
    scale_tokens: float = 1.0


@dataclass(frozen=True, slots=True)
class PlannedTurn:
    """A turn as it will be sent. `prompt_tokens` is None for text, which the server counts."""

    index: int
    turn: Turn
    prompt_tokens: int | None
    output_tokens: int


@dataclass(frozen=True, slots=True)
class SessionPlan:
    """The turns of a session that fit, each sub-agent with the turn that starts it.

    `cut_count` turns, sub-agents' included, were left out because a prompt was over the limit.
    """

    session: Session
    turns: tuple[PlannedTurn, ...]
    subagents: tuple[SessionPlan, ...]
    cut_count: int

    def request_count(self) -> int:
        return len(self.turns) + sum(child.request_count() for child in self.subagents)


def plan_session(
    session: Session, limits: Limits, *, requests_max: int | None = None
) -> SessionPlan:
    """The part of `session` to send: it ends before the first turn that does not fit.

    A sub-agent whose turn is left out is left out too. `requests_max` bounds the requests, in the
    order in which turns and sub-agents start; what it leaves out does not count as cut.

    Raises:
        ConfigError: the session is text, whose length cannot be scaled.
    """
    left = math.inf if requests_max is None else requests_max
    turns: list[PlannedTurn] = []
    children: list[SessionPlan] = []
    cut_count = 0
    for index, turn in enumerate(session.turns):
        if left <= 0:
            break
        planned = plan_turn(index, turn, limits)
        if planned is None:
            cut_count += len(session.turns) - index
            lost = [child for child in session.subagents if (child.parent_turn or 0) >= index]
            cut_count += sum(child.request_count() for child in lost)
            break
        turns.append(planned)
        left -= 1
        for child in session.subagents:
            if child.parent_turn == index and left > 0:
                most = None if math.isinf(left) else int(left)
                plan = plan_session(child, limits, requests_max=most)
                children.append(plan)
                cut_count += plan.cut_count
                left -= plan.request_count()
    return SessionPlan(session, tuple(turns), tuple(children), cut_count)


def plan_turn(index: int, turn: Turn, limits: Limits) -> PlannedTurn | None:
    """`turn` scaled and bounded, or None if its prompt is over the limit."""
    scale = limits.scale_tokens
    if isinstance(turn.prompt, TextPrompt):
        if scale != 1.0:
            raise ConfigError(
                f"--scale-tokens is {scale:g}; expected 1 for a trace of text, which has no blocks"
            )
        prompt_tokens, room = None, limits.output_tokens_max
    else:
        prompt_tokens = scaled_prompt_tokens(turn.prompt, scale)
        if prompt_tokens > limits.prompt_tokens_max or prompt_tokens >= limits.context_tokens:
            return None
        room = limits.context_tokens - prompt_tokens
    wanted = turn.output_tokens
    if wanted is None:
        wanted = -(-(turn.output_characters or 0) // CHARACTERS_PER_TOKEN)
    output_tokens = max(1, min(round(wanted * scale), limits.output_tokens_max, room))
    return PlannedTurn(index, turn, prompt_tokens, output_tokens)


def scaled_block_tokens(block_tokens: int, scale: float) -> int:
    """Tokens of a full block after scaling; never none, or the structure would be lost."""
    return max(1, round(block_tokens * scale))


def scaled_prompt_tokens(prompt: BlockPrompt | LengthPrompt, scale: float) -> int:
    """Tokens of a whole prompt after scaling: full blocks each scaled alike, then the rest."""
    if isinstance(prompt, LengthPrompt):
        return max(1, round(prompt.tokens * scale))
    block = scaled_block_tokens(prompt.block_tokens, scale)
    full, rest = divmod(prompt.tokens, prompt.block_tokens)
    return max(1, full * block + min(round(rest * scale), block))


@dataclass(frozen=True, slots=True)
class PromptFiller:
    """Token ids for the prompts of one session and its sub-agents.

    Ids are a hash of (seed, scope, block id, position in the block), so that they need no table and
    are the same in every process.
    """

    seed: int
    vocab: int
    scale: float
    session: Session
    # Block id -> (scope, number) of the blocks that sessions of one model share.
    shared: Mapping[int, tuple[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.vocab < 2:
            raise ConfigError(f"the vocabulary has {self.vocab} entries; expected at least 2")

    @classmethod
    def of(
        cls, session: Session, *, seed: int, vocab: int, scale: float, share_prefix: bool
    ) -> PromptFiller:
        """A filler for `session`; with `share_prefix`, its system prompt is that of its model."""
        return cls(seed, vocab, scale, session, shared_blocks(session) if share_prefix else {})

    def of_subagent(self, session: Session, *, share_prefix: bool) -> PromptFiller:
        """A filler for a sub-agent, which reads its ids in its parent's space."""
        own = shared_blocks(session) if share_prefix else {}
        return PromptFiller(self.seed, self.vocab, self.scale, session, {**own, **self.shared})

    def token_ids(self, planned: PlannedTurn) -> TokenIds:
        """int64 ids of shape (prompt_tokens,) of a turn that has no text."""
        prompt = planned.turn.prompt
        assert not isinstance(prompt, TextPrompt)
        assert planned.prompt_tokens is not None
        pieces = []
        given = 0
        if isinstance(prompt, BlockPrompt):
            block = scaled_block_tokens(prompt.block_tokens, self.scale)
            blocks = self._blocks(prompt.block_ids, block)[: planned.prompt_tokens]
            given = len(blocks)
            pieces.append(blocks)
        fresh = planned.prompt_tokens - given
        if fresh:
            key = self._key(f"fresh/{self.session.session_id}/{planned.index}")
            pieces.append(self._ids(key, np.zeros(1, np.uint64), fresh))
        return np.concatenate(pieces)

    def _blocks(self, block_ids: tuple[int, ...], block_tokens: int) -> TokenIds:
        numbers = np.array(block_ids, dtype=np.uint64)
        keys = np.full(len(block_ids), self._key(f"blocks/{self.session.block_scope}"))
        for position, block_id in enumerate(block_ids):
            if block_id in self.shared:
                scope, number = self.shared[block_id]
                keys[position], numbers[position] = self._key(scope), number
        return self._ids(keys, numbers, block_tokens)

    def _key(self, scope: str) -> np.uint64:
        digest = hashlib.blake2b(f"{self.seed}/{scope}".encode(), digest_size=8).digest()
        return np.uint64(int.from_bytes(digest, "little"))

    def _ids(self, keys: Any, numbers: NDArray[np.uint64], length: int) -> TokenIds:
        first = min(FIRST_TOKEN_ID, self.vocab // 2)
        positions = np.arange(length, dtype=np.uint64)
        rows = mixed(mixed(numbers) ^ keys)
        values = mixed(rows[:, None] + positions[None, :]).ravel()
        return (values % np.uint64(self.vocab - first)).astype(np.int64) + first


def shared_blocks(session: Session) -> dict[int, tuple[str, int]]:
    """The leading blocks of the session's first prompt that are its model's system prompt."""
    first = session.turns[0]
    if not isinstance(first.prompt, BlockPrompt):
        return {}
    kind = "session" if session.parent_turn is None else "subagent"
    count = session.shared_prefix_tokens // first.prompt.block_tokens
    scope = f"prefix/{kind}/{first.model}"
    return {
        block_id: (scope, number) for number, block_id in enumerate(first.prompt.block_ids[:count])
    }


def mixed(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The splitmix64 finalizer (Steele, Lea and Flood, OOPSLA 2014), on each value."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(values ^ (values >> np.uint64(31)))
