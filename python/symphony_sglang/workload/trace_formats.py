"""What the lines of each trace family mean (see ``traces`` for the families).

Mooncake's lines carry no session. An id stands for the whole prefix up to its block, so a request
is taken to continue the latest earlier one that shares its longest chain of two or more blocks;
chains that more than 64 requests share (system prompts) continue nobody.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Annotated, Any

import msgspec

from symphony_sglang.workload.traces import (
    BlockPrompt,
    LengthPrompt,
    Session,
    TextPrompt,
    TraceFamily,
    TraceReader,
    Turn,
)

SUBAGENT_DEPTH_MAX = 8
CHAIN_REQUESTS_MAX = 64
CHAIN_BLOCKS_MIN = 2
CHAINS_KEPT_MAX = 2_000_000
MOONCAKE_BLOCK_TOKENS = 512
# Sessions still open are held in memory: prompt blocks and characters, in all.
OPEN_WEIGHT_MAX = 64_000_000
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")

Count = Annotated[int, msgspec.Meta(ge=0, le=10**9)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
BlockId = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]


class LineError(ValueError):
    """A line is JSON of the right form, but what it says cannot be."""


class ClaudeCodeEntry(msgspec.Struct):
    """A request, or a sub-agent if it has `requests` of its own."""

    t: Seconds
    tokens_in: Count | None = msgspec.field(name="in", default=None)
    tokens_out: Count | None = msgspec.field(name="out", default=None)
    hash_ids: list[BlockId] | None = None
    model: str | None = None
    stop: str | None = None
    api_time: Seconds | None = None
    think_time: Seconds | None = None
    agent_id: str | None = None
    tool_tokens: Count = 0
    system_tokens: Count = 0
    requests: list[ClaudeCodeEntry] | None = None


class ClaudeCodeLine(msgspec.Struct):
    id: str
    block_size: Positive
    requests: list[ClaudeCodeEntry]
    tool_tokens: Count = 0
    system_tokens: Count = 0


class MooncakeLine(msgspec.Struct):
    timestamp: Seconds
    input_length: Count
    output_length: Count
    hash_ids: list[BlockId]


class AgentTextLine(msgspec.Struct):
    timestamp: Annotated[int, msgspec.Meta(ge=0)]
    input: str
    output: str
    session_id: str


class TauBenchLine(msgspec.Struct):
    task_id: int | str
    traj: list[dict[str, Any]]
    trial: int = 0


def detect(line: bytes) -> TraceFamily | None:
    """The family of a line, by the fields that only that family has."""
    if is_azure_header(line):
        return TraceFamily.AZURE
    try:
        keys = set(msgspec.json.decode(line, type=dict[str, msgspec.Raw]))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    for family, needed in (
        (TraceFamily.CLAUDE_CODE, {"id", "requests", "block_size"}),
        (TraceFamily.MOONCAKE, {"timestamp", "input_length", "hash_ids"}),
        (TraceFamily.AGENT_TEXT, {"timestamp", "input", "output", "session_id"}),
        (TraceFamily.TAU_BENCH, {"task_id", "traj"}),
    ):
        if needed <= keys:
            return family
    return None


def is_azure_header(line: bytes) -> bool:
    names = line.decode("utf-8", errors="replace").lstrip("\ufeff").strip().split(",")
    return set(AZURE_COLUMNS) <= {name.strip() for name in names}


def read(reader: TraceReader) -> Iterator[Session]:
    """The sessions of the reader's file."""
    readers: dict[TraceFamily, Callable[[TraceReader], Iterator[Session]]] = {
        TraceFamily.CLAUDE_CODE: read_claude_code,
        TraceFamily.MOONCAKE: read_mooncake,
        TraceFamily.AGENT_TEXT: read_agent_text,
        TraceFamily.TAU_BENCH: read_tau_bench,
        TraceFamily.AZURE: read_azure,
    }
    return readers[reader.family](reader)


def decoded(reader: TraceReader, line_type: type[Any]) -> Iterator[tuple[int, Any]]:
    """Lines decoded as `line_type`; a line that is not one is reported."""
    decoder = msgspec.json.Decoder(line_type)
    for number, line in reader.lines():
        try:
            yield number, decoder.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reader.report(number, str(error))


def read_claude_code(reader: TraceReader) -> Iterator[Session]:
    for number, line in decoded(reader, ClaudeCodeLine):
        try:
            yield claude_code_session(line)
        except LineError as error:
            reader.report(number, str(error))


def claude_code_session(line: ClaudeCodeLine) -> Session:
    """One line: a session with its sub-agents, which share its id space.

    Raises:
        LineError: a request lacks its lengths, or sub-agents nest too deep.
    """
    # A sub-agent may well run another model, with another system prompt than its parent's.
    return nested_session(
        line.id,
        line.requests,
        scope=line.id,
        block_tokens=line.block_size,
        shared_prefix_tokens=line.tool_tokens + line.system_tokens,
        depth=0,
    )


def nested_session(
    session_id: str,
    entries: Sequence[ClaudeCodeEntry],
    *,
    scope: str,
    block_tokens: int,
    shared_prefix_tokens: int,
    depth: int,
    arrival_seconds: float | None = None,
    parent_turn: int | None = None,
) -> Session:
    if depth > SUBAGENT_DEPTH_MAX:
        raise LineError(f"sub-agents nest deeper than {SUBAGENT_DEPTH_MAX}")
    turns: list[Turn] = []
    children: list[Session] = []
    for entry in entries:
        if entry.requests is not None:
            if not turns:
                raise LineError(f"session {session_id!r}: a sub-agent before any request")
            children.append(
                nested_session(
                    f"{session_id}/{entry.agent_id or f'agent_{len(children) + 1}'}",
                    entry.requests,
                    scope=scope,
                    block_tokens=block_tokens,
                    shared_prefix_tokens=entry.tool_tokens + entry.system_tokens,
                    depth=depth + 1,
                    arrival_seconds=entry.t,
                    parent_turn=len(turns) - 1,
                )
            )
            continue
        turns.append(
            claude_code_turn(entry, block_tokens, f"session {session_id!r}, turn {len(turns)}")
        )
    if not turns:
        raise LineError(f"session {session_id!r} has no requests")
    return Session(
        session_id=session_id,
        family=TraceFamily.CLAUDE_CODE,
        turns=tuple(turns),
        arrival_seconds=arrival_seconds,
        block_scope=scope,
        parent_turn=parent_turn,
        shared_prefix_tokens=shared_prefix_tokens,
        subagents=tuple(children),
    )


def claude_code_turn(entry: ClaudeCodeEntry, block_tokens: int, where: str) -> Turn:
    if entry.tokens_in is None or entry.tokens_out is None or entry.hash_ids is None:
        raise LineError(f"{where}: expected in, out and hash_ids")
    check_blocks(entry.hash_ids, block_tokens, entry.tokens_in, where)
    return Turn(
        prompt=BlockPrompt(tuple(entry.hash_ids), block_tokens, entry.tokens_in),
        arrival_seconds=entry.t,
        think_seconds=entry.think_time,
        output_tokens=entry.tokens_out,
        stop_reason=entry.stop,
        model=entry.model,
    )


def check_blocks(ids: Sequence[int], block_tokens: int, tokens: int, where: str) -> None:
    """Only the last block may be partial, so there is room for each but that one."""
    if ids and (len(ids) - 1) * block_tokens >= tokens:
        raise LineError(f"{where}: {len(ids)} blocks of {block_tokens} tokens, but {tokens} tokens")


@dataclass(slots=True)
class OpenSessions:
    """Sessions whose turns are spread over the file, held until its end.

    When the turns held outweigh `weight_max`, the session that was extended longest ago is given
    out early; a later turn of it starts a new session of the same id with ``#2``, ``#3`` … added.
    """

    family: TraceFamily
    weight_max: int = OPEN_WEIGHT_MAX
    weight: int = 0
    turns: dict[str, list[tuple[float, Turn]]] = field(default_factory=dict)
    weights: dict[str, int] = field(default_factory=dict)
    generations: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, at_seconds: float, turn: Turn, weight: int) -> Iterator[Session]:
        held = self.turns.pop(key, [])
        held.append((at_seconds, turn))
        self.turns[key] = held  # moved to the end: extended last
        self.weights[key] = self.weights.get(key, 0) + weight
        self.weight += weight
        while self.weight > self.weight_max and len(self.turns) > 1:
            key = next(iter(self.turns))
            yield self._close(key)
            self.generations[key] = self.generations.get(key, 1) + 1

    def finish(self) -> Iterator[Session]:
        """All that are left, by first arrival."""
        for key in sorted(self.turns, key=lambda key: (min(at for at, _ in self.turns[key]), key)):
            yield self._close(key)

    def _close(self, key: str) -> Session:
        held = sorted(self.turns.pop(key), key=lambda pair: pair[0])
        self.weight -= self.weights.pop(key)
        generation = self.generations.get(key, 1)
        start = held[0][0]
        return Session(
            session_id=key if generation == 1 else f"{key}#{generation}",
            family=self.family,
            turns=tuple(replace(turn, arrival_seconds=at - start) for at, turn in held),
            arrival_seconds=start,
        )


@dataclass(slots=True)
class ChainIndex:
    """Which session last used each prefix; beyond `chains_max`, the oldest are forgotten."""

    chains_max: int = CHAINS_KEPT_MAX
    last_use: dict[int, tuple[str, int]] = field(default_factory=dict)

    def place(self, ids: Sequence[int], own_key: str) -> str:
        """The session that a request with these blocks continues, or `own_key`; and remember it."""
        key = own_key
        for block_id in reversed(ids[CHAIN_BLOCKS_MIN - 1 :]):
            found = self.last_use.get(block_id)
            if found is not None:
                key = found[0] if found[1] <= CHAIN_REQUESTS_MAX else own_key
                break
        for block_id in ids:
            uses = self.last_use.pop(block_id, ("", 0))[1]
            self.last_use[block_id] = (key, uses + 1)
        while len(self.last_use) > self.chains_max:
            del self.last_use[next(iter(self.last_use))]
        return key


def read_mooncake(reader: TraceReader) -> Iterator[Session]:
    sessions, chains = OpenSessions(TraceFamily.MOONCAKE), ChainIndex()
    first: float | None = None
    for number, line in decoded(reader, MooncakeLine):
        try:
            check_blocks(line.hash_ids, MOONCAKE_BLOCK_TOKENS, line.input_length, "request")
        except LineError as error:
            reader.report(number, str(error))
            continue
        turn = Turn(
            prompt=BlockPrompt(tuple(line.hash_ids), MOONCAKE_BLOCK_TOKENS, line.input_length),
            output_tokens=line.output_length,
        )
        first = line.timestamp if first is None else first
        key = chains.place(line.hash_ids, f"request-{number}")
        at_seconds = (line.timestamp - first) / 1e3
        yield from sessions.add(key, at_seconds, turn, len(line.hash_ids) + 1)
    yield from sessions.finish()


def read_agent_text(reader: TraceReader) -> Iterator[Session]:
    sessions = OpenSessions(TraceFamily.AGENT_TEXT)
    first: float | None = None
    for _number, line in decoded(reader, AgentTextLine):
        at_seconds = line.timestamp / 1e6
        first = at_seconds if first is None else first
        turn = Turn(
            prompt=TextPrompt(line.input, len(line.input)), output_characters=len(line.output)
        )
        yield from sessions.add(line.session_id, at_seconds - first, turn, len(line.input) + 1)
    yield from sessions.finish()


def read_tau_bench(reader: TraceReader) -> Iterator[Session]:
    for number, line in decoded(reader, TauBenchLine):
        try:
            turns = tau_bench_turns(line.traj)
        except LineError as error:
            reader.report(number, str(error))
            continue
        session_id = f"task-{line.task_id}-trial-{line.trial}"
        yield Session(session_id=session_id, family=TraceFamily.TAU_BENCH, turns=turns)


def tau_bench_turns(messages: Sequence[dict[str, Any]]) -> tuple[Turn, ...]:
    """A turn for each assistant message; its prompt is all that stands before it, as ChatML."""
    transcript, ends = "", []
    for index, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not isinstance(content, str | None):
            raise LineError(f"message {index}: expected a role and text")
        body = content or ""
        if message.get("tool_calls"):
            body += msgspec.json.encode(message["tool_calls"]).decode()
        transcript += f"<|im_start|>{role}\n"
        if role == "assistant":
            ends.append((len(transcript), len(body), bool(message.get("tool_calls"))))
        transcript += f"{body}<|im_end|>\n"
    if not ends:
        raise LineError("no message of the assistant")
    return tuple(
        Turn(
            prompt=TextPrompt(transcript, end),
            output_characters=characters,
            stop_reason="tool_use" if calls else "end_turn",
        )
        for end, characters, calls in ends
    )


def read_azure(reader: TraceReader) -> Iterator[Session]:
    columns: dict[str, int] | None = None
    start: datetime | None = None
    for number, line in reader.lines():
        if columns is None:
            if is_azure_header(line):
                names = line.decode("utf-8").lstrip("\ufeff").strip().split(",")
                columns = {name.strip(): index for index, name in enumerate(names)}
            else:
                reader.report(number, f"expected a header with {', '.join(AZURE_COLUMNS)}")
            continue
        try:
            at, prompt_tokens, output_tokens = azure_row(line, columns)
            start = start or at
            arrival_seconds = (at - start).total_seconds()
            if arrival_seconds < 0 or prompt_tokens < 0 or output_tokens < 0:
                raise LineError("a length is negative, or the time is before the first row's")
        except (ValueError, IndexError, TypeError) as error:
            reader.report(number, str(error))
            continue
        turn = Turn(LengthPrompt(prompt_tokens), arrival_seconds=0.0, output_tokens=output_tokens)
        yield Session(f"request-{number}", TraceFamily.AZURE, (turn,), arrival_seconds)


def azure_row(line: bytes, columns: dict[str, int]) -> tuple[datetime, int, int]:
    cells = next(csv.reader([line.decode("utf-8").strip()]))
    at, prompt_tokens, output_tokens = (cells[columns[name]] for name in AZURE_COLUMNS)
    return datetime.fromisoformat(at), int(prompt_tokens), int(output_tokens)
