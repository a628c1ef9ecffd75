"""Published traces of LLM serving as one typed form: sessions of turns.

Read families (found by looking at the content, not at the name; ``.xz`` is unpacked on the way):

- Claude Code sessions of kv-cache-tester: 64-token block ids, think times, sub-agents;
- Mooncake: 512-token block ids and arrivals, no sessions (inferred, see ``trace_formats``);
- mini-swe-agent sessions of lmcache-agent-trace: whole prompts as text, call times;
- tau-bench trajectories: messages with tool calls, no times;
- Azure LLM inference: arrivals and lengths only.

Reading streams: one line and a bounded number of open sessions are in memory at a time.
"""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

from symphony_sglang.errors import TraceError

LINE_BYTES_MAX = 64 << 20
DETECTION_LINES_MAX = 16
PROBLEMS_KEPT_MAX = 100
XZ_MAGIC = b"\xfd7zXZ\x00"


class TraceFamily(Enum):
    """Where a trace comes from, which is what its lines look like."""

    CLAUDE_CODE = "claude-code"
    MOONCAKE = "mooncake"
    AGENT_TEXT = "agent-text"
    TAU_BENCH = "tau-bench"
    AZURE = "azure"
    # Made by a benchmark; no file has it.
    GENERATED = "generated"


@dataclass(frozen=True, slots=True)
class BlockPrompt:
    """A prompt given by the ids of its blocks; equal ids mean equal tokens within the id scope.

    Ids may cover less than `tokens` (the rest has no id, so is new) or end in a partial block.
    """

    block_ids: tuple[int, ...]
    block_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """The first `end` characters of a transcript that several turns may share."""

    transcript: str
    end: int

    @property
    def text(self) -> str:
        return self.transcript[: self.end]


@dataclass(frozen=True, slots=True)
class LengthPrompt:
    """A prompt of which only the length is known: nothing in it can be reused."""

    tokens: int


Prompt = BlockPrompt | TextPrompt | LengthPrompt


@dataclass(frozen=True, slots=True)
class Turn:
    """One request. Times in seconds; None where the trace does not say.

    Attributes:
        arrival_seconds: from the session's first turn.
        think_seconds: from the end of the previous answer to this request.
        output_characters: length of the answer, where the trace has its text instead of a count.
    """

    prompt: Prompt
    arrival_seconds: float | None = None
    think_seconds: float | None = None
    output_tokens: int | None = None
    output_characters: int | None = None
    stop_reason: str | None = None
    model: str | None = None


@dataclass(frozen=True, slots=True)
class Session:
    """Turns that follow each other, and the sub-agents that some of them started.

    Attributes:
        arrival_seconds: from the start of the trace; for a sub-agent, from its parent's first turn.
        block_scope: block ids are comparable among all sessions with the same scope.
        parent_turn: index of the parent's turn that started this sub-agent; None for a session.
        shared_prefix_tokens: leading tokens of the prompts that sessions of one model have in
            common (system prompt and tool list), 0 where unknown.
    """

    session_id: str
    family: TraceFamily
    turns: tuple[Turn, ...]
    arrival_seconds: float | None = None
    block_scope: str = ""
    parent_turn: int | None = None
    shared_prefix_tokens: int = 0
    subagents: tuple[Session, ...] = ()

    def request_count(self) -> int:
        """Turns of this session and all its sub-agents."""
        return len(self.turns) + sum(child.request_count() for child in self.subagents)


class TraceProblem(NamedTuple):
    """One line that could not be read."""

    path: Path
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.reason}"


@dataclass(slots=True)
class TraceReader:
    """Iterates over the sessions of one file.

    With ``on_error="skip"`` a broken line is counted and passed over: `problem_count` of them, the
    first 100 in `problems`. With ``"raise"`` it ends the reading with a ``TraceError``.

    Raises:
        TraceError: the file cannot be read, or is of no known family.
    """

    path: Path
    on_error: Literal["raise", "skip"] = "raise"
    line_bytes_max: int = LINE_BYTES_MAX
    problems: list[TraceProblem] = field(default_factory=list)
    problem_count: int = 0
    family: TraceFamily = field(init=False)
    _line: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.path = Path(self.path)
        self.family = self._detect()

    def __iter__(self) -> Iterator[Session]:
        from symphony_sglang.workload import trace_formats

        return trace_formats.read(self)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Non-blank lines with their numbers, from 1. Too long a line is a problem, not an end."""
        try:
            with open_trace(self.path) as stream:
                yield from self._split(stream)
        except (lzma.LZMAError, EOFError) as error:
            self.report(self._line, f"the .xz data ends or breaks here: {error}")
        except OSError as error:
            raise TraceError(f"{self.path}: {error.strerror or error}") from error

    def _split(self, stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
        self._line = 0
        while line := stream.readline(self.line_bytes_max + 1):
            self._line += 1
            if len(line) > self.line_bytes_max:
                while line and not line.endswith(b"\n"):
                    line = stream.readline(self.line_bytes_max)
                self.report(self._line, f"longer than {self.line_bytes_max} bytes")
            elif line.strip():
                yield self._line, line

    def report(self, line: int, reason: str) -> None:
        """Count a broken line, or raise, as `on_error` says."""
        problem = TraceProblem(self.path, line, reason)
        if self.on_error == "raise":
            raise TraceError(str(problem))
        self.problem_count += 1
        if len(self.problems) < PROBLEMS_KEPT_MAX:
            self.problems.append(problem)

    def _detect(self) -> TraceFamily:
        from symphony_sglang.workload import trace_formats

        if self.on_error not in ("raise", "skip"):
            raise TraceError(f"on_error is {self.on_error!r}; expected 'raise' or 'skip'")
        probe = cast("list[tuple[int, bytes]]", [])
        lines = self.lines()
        for number, line in lines:
            family = trace_formats.detect(line)
            if family is not None:
                self.problems.clear()
                self.problem_count = 0
                return family
            probe.append((number, line))
            if self.on_error == "raise" or len(probe) >= DETECTION_LINES_MAX:
                break
        if not probe:
            raise TraceError(f"{self.path}: no lines to read")
        raise TraceError(
            f"{self.path}:{probe[0][0]}: not a line of any known trace; expected one of "
            f"{', '.join(f.value for f in TraceFamily if f is not TraceFamily.GENERATED)}"
        )


def open_trace(path: Path) -> IO[bytes]:
    """The unpacked bytes of `path`; ``.xz`` is recognized by its first bytes."""
    with path.open("rb") as probe:
        packed = probe.read(len(XZ_MAGIC)) == XZ_MAGIC
    return cast("IO[bytes]", lzma.open(path, "rb")) if packed else path.open("rb")
