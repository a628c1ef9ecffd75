"""Generated workloads, as the same sessions of turns that traces are read into.

Equal block ids mean equal tokens, so what can be reused is exact. All draws come from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from pathlib import Path

from benchmark.scenario import Workload
from symphony_sglang.errors import ConfigError
from symphony_sglang.workload.traces import BlockPrompt, Session, TraceFamily, TraceReader, Turn

BLOCK_TOKENS = 16
# ShareGPT (SYMPHONY §5.1 uses it): questions and answers of some 200 and 210 tokens on average,
# with long tails; log-normal, in tokens.
QUESTION_MU, QUESTION_SIGMA = 4.6, 1.1
ANSWER_MU, ANSWER_SIGMA = 5.0, 0.9
# Reading and typing before the next turn, seconds at real time.
THINK_MU, THINK_SIGMA = 3.4, 0.8
# Tools answer within seconds, now and then within minutes.
TOOL_MU, TOOL_SIGMA = 1.0, 1.2


def sessions_of(workload: Workload, traces: dict[str, Path]) -> Iterator[Session]:
    """The scenario's sessions; a trace's own order is kept.

    Raises:
        ConfigError: the source is unknown, or its trace was not given.
    """
    makers = {"conversations": conversation, "agents": agent, "no-reuse": unrelated}
    if workload.source in makers:
        make = makers[workload.source]
        blocks = count(1)
        shared = tuple(next(blocks) for _ in range(workload.shared_prefix_tokens // BLOCK_TOKENS))
        for number in range(workload.sessions):
            draw = random.Random(f"{workload.source}/{workload.seed}/{number}")
            yield make(f"s{number}", draw, workload, shared, blocks)
        return
    if workload.source not in traces:
        families = ", ".join(family.value for family in TraceFamily)
        raise ConfigError(
            f"source {workload.source!r}: expected conversations, agents or no-reuse, or a trace "
            f"family ({families}) whose file is given as --trace FAMILY=FILE"
        )
    reader = iter(TraceReader(traces[workload.source]))
    joined = (joined_at(session, workload.skip_turns) for session in reader)
    start = workload.skip_sessions
    chosen = islice(
        (session for session in joined if session.turns), start, start + workload.sessions
    )
    for number, session in enumerate(chosen):
        yield slowed(session, workload.uneven) if number % 2 else session


def slowed(session: Session, factor: float) -> Session:
    """`session` with pauses `factor` times as long."""
    turns = [
        turn
        if turn.think_seconds is None
        else replace(turn, think_seconds=factor * turn.think_seconds)
        for turn in session.turns
    ]
    return replace(session, turns=tuple(turns))


def joined_at(session: Session, turn: int) -> Session:
    """`session` from `turn` on, with the sub-agents that it starts from there."""
    children = [child for child in session.subagents if (child.parent_turn or 0) >= turn]
    return replace(
        session,
        turns=session.turns[turn:],
        subagents=tuple(
            replace(child, parent_turn=(child.parent_turn or 0) - turn) for child in children
        ),
    )


def conversation(
    name: str, draw: random.Random, workload: Workload, shared: tuple[int, ...], blocks: count[int]
) -> Session:
    """A chat: each prompt is all that was said before, and a question more."""
    return grow(name, draw, workload, shared, blocks, (THINK_MU, THINK_SIGMA))


def agent(
    name: str, draw: random.Random, workload: Workload, shared: tuple[int, ...], blocks: count[int]
) -> Session:
    """A tool loop: the same growth, with short gaps; each turn but the last ends in a call."""
    session = grow(name, draw, workload, shared, blocks, (TOOL_MU, TOOL_SIGMA))
    turns = [replace(turn, stop_reason="tool_use") for turn in session.turns[:-1]]
    return replace(session, turns=(*turns, session.turns[-1]))


def unrelated(
    name: str, draw: random.Random, workload: Workload, shared: tuple[int, ...], blocks: count[int]
) -> Session:
    """Negative control: no prompt shares anything with another."""
    session = grow(name, draw, workload, (), blocks, (THINK_MU, THINK_SIGMA))
    turns = []
    for turn in session.turns:
        assert isinstance(turn.prompt, BlockPrompt)
        fresh = tuple(next(blocks) for _ in turn.prompt.block_ids)
        turns.append(replace(turn, prompt=replace(turn.prompt, block_ids=fresh)))
    return replace(session, turns=tuple(turns))


def grow(
    name: str,
    draw: random.Random,
    workload: Workload,
    shared: tuple[int, ...],
    blocks: count[int],
    think: tuple[float, float],
) -> Session:
    ids = list(shared)
    # A skewed workload has a few sessions with most of the history (Zipf over the rank).
    weight = 1.0 if not workload.skew else (1 + draw.paretovariate(workload.skew)) / 2
    ids += [
        next(blocks) for _ in range(int(weight * draw.lognormvariate(7.0, 0.5)) // BLOCK_TOKENS)
    ]
    turns = []
    for index in range(workload.session_requests):
        question = max(BLOCK_TOKENS, int(draw.lognormvariate(QUESTION_MU, QUESTION_SIGMA)))
        answer = max(8, int(draw.lognormvariate(ANSWER_MU, ANSWER_SIGMA)))
        ids += [next(blocks) for _ in range(max(1, question // BLOCK_TOKENS))]
        turns.append(
            Turn(
                BlockPrompt(tuple(ids), BLOCK_TOKENS, len(ids) * BLOCK_TOKENS),
                think_seconds=draw.lognormvariate(*think) if index else None,
                output_tokens=answer,
            )
        )
        ids += [next(blocks) for _ in range(max(1, answer // BLOCK_TOKENS))]
    return Session(name, TraceFamily.GENERATED, tuple(turns), block_scope="generated")
