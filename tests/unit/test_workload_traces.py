"""Readers of traces, on excerpts written and counted by hand."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from symphony_sglang.errors import TraceError
from symphony_sglang.workload import trace_formats
from symphony_sglang.workload.traces import (
    BlockPrompt,
    LengthPrompt,
    Session,
    TextPrompt,
    TraceFamily,
    TraceReader,
)

CLAUDE_CODE = {
    "id": "trace_1",
    "models": ["big"],
    "block_size": 64,
    "hash_id_scope": "local",
    "tool_tokens": 100,
    "system_tokens": 50,
    "requests": [
        {
            "t": 0.0,
            "type": "n",
            "model": "big",
            "in": 130,
            "out": 7,
            "hash_ids": [1, 2],
            "stop": "tool_use",
            "api_time": 1.5,
            "think_time": 0.0,
        },
        {
            "t": 3.0,
            "type": "subagent",
            "agent_id": "agent_001",
            "status": "completed",
            "tool_tokens": 64,
            "system_tokens": 0,
            "requests": [
                {"t": 0.0, "type": "n", "model": "small", "in": 70, "out": 3, "hash_ids": [9]},
                {
                    "t": 2.0,
                    "type": "s",
                    "model": "small",
                    "in": 128,
                    "out": 4,
                    "hash_ids": [9, 10],
                    "stop": "end_turn",
                    "think_time": 0.5,
                },
            ],
        },
        {
            "t": 11.5,
            "type": "s",
            "model": "big",
            "in": 192,
            "out": 9,
            "hash_ids": [1, 2, 3],
            "stop": "end_turn",
            "think_time": 10.0,
        },
    ],
}
MOONCAKE = [
    {"timestamp": 1000, "input_length": 1100, "output_length": 5, "hash_ids": [0, 1, 2]},
    {"timestamp": 2000, "input_length": 600, "output_length": 6, "hash_ids": [0, 3]},
    {"timestamp": 4500, "input_length": 1600, "output_length": 7, "hash_ids": [0, 1, 4, 5]},
    {"timestamp": 9000, "input_length": 1700, "output_length": 8, "hash_ids": [0, 1, 4, 6]},
]


def write_lines(path: Path, lines: list[object], *, pack: bool = False) -> Path:
    data = b"".join(
        (line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines
    )
    path.write_bytes(lzma.compress(data) if pack else data)
    return path


def read(path: Path, **options: object) -> list[Session]:
    return list(TraceReader(path, **options))


@pytest.mark.parametrize("pack", [False, True])
def test_claude_code_session_with_a_subagent(tmp_path: Path, pack: bool) -> None:
    # The name says nothing of the content or of the packing.
    path = write_lines(tmp_path / "trace.bin", [CLAUDE_CODE], pack=pack)
    reader = TraceReader(path)
    assert reader.family is TraceFamily.CLAUDE_CODE
    (session,) = reader
    assert (session.session_id, session.block_scope) == ("trace_1", "trace_1")
    assert session.shared_prefix_tokens == 150
    assert session.arrival_seconds is None
    first, second = session.turns
    assert first.prompt == BlockPrompt((1, 2), 64, 130)
    assert (first.output_tokens, first.stop_reason, first.model) == (7, "tool_use", "big")
    assert (second.arrival_seconds, second.think_seconds) == (11.5, 10.0)
    (child,) = session.subagents
    assert child.session_id == "trace_1/agent_001"
    assert (child.parent_turn, child.arrival_seconds) == (0, 3.0)
    assert child.block_scope == "trace_1"
    assert child.shared_prefix_tokens == 64
    assert [turn.prompt.tokens for turn in child.turns] == [70, 128]
    assert child.turns[0].think_seconds is None
    assert session.request_count() == 4


def test_mooncake_sessions_are_inferred_from_shared_chains(tmp_path: Path) -> None:
    sessions = read(write_lines(tmp_path / "t", MOONCAKE))
    # Block 0 alone joins nobody; 0,1 joins the third to the first, 0,1,4 the fourth to the third.
    assert [(s.session_id, len(s.turns), s.arrival_seconds) for s in sessions] == [
        ("request-1", 3, 0.0),
        ("request-2", 1, 1.0),
    ]
    assert [turn.arrival_seconds for turn in sessions[0].turns] == [0.0, 3.5, 8.0]
    assert [turn.output_tokens for turn in sessions[0].turns] == [5, 7, 8]
    assert sessions[0].turns[1].prompt == BlockPrompt((0, 1, 4, 5), 512, 1600)


def test_a_chain_that_many_requests_share_continues_nobody(tmp_path: Path) -> None:
    lines = [
        {"timestamp": i, "input_length": 1600, "output_length": 1, "hash_ids": [0, 1, 2, 100 + i]}
        for i in range(trace_formats.CHAIN_REQUESTS_MAX + 3)
    ]
    sessions = read(write_lines(tmp_path / "t", lines))
    # The first 65 requests see the chain used 0 to 64 times; the last two see 65 and more.
    assert [len(session.turns) for session in sessions] == [65, 1, 1]


def test_open_sessions_over_the_bound_are_given_out_early() -> None:
    held = trace_formats.OpenSessions(TraceFamily.MOONCAKE, weight_max=10)
    turn = trace_formats.Turn(LengthPrompt(1))
    given = [s for i, key in enumerate("aabca") for s in held.add(key, float(i), turn, 4)]
    # a holds 8; b makes 12, so a goes; c makes 8; a makes 12, so b goes.
    assert [(s.session_id, len(s.turns)) for s in given] == [("a", 2), ("b", 1)]
    assert [(s.session_id, s.arrival_seconds) for s in held.finish()] == [("c", 3.0), ("a#2", 4.0)]
    assert held.weight == 0


def test_agent_text_lines_are_grouped_and_ordered(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 5_000_000, "input": "ab", "output": "xyz", "session_id": "s"},
        {"timestamp": 9_500_000, "input": "abcd", "output": "", "session_id": "s"},
        {"timestamp": 6_000_000, "input": "q", "output": "r", "session_id": "other"},
        {"timestamp": 7_000_000, "input": "abc", "output": "y", "session_id": "s"},
    ]
    first, other = read(write_lines(tmp_path / "t", lines))
    assert (first.session_id, other.session_id) == ("s", "other")
    assert [turn.prompt.text for turn in first.turns] == ["ab", "abc", "abcd"]
    assert [turn.arrival_seconds for turn in first.turns] == [0.0, 2.0, 4.5]
    assert [turn.output_characters for turn in first.turns] == [3, 1, 0]
    assert other.arrival_seconds == 1.0


def test_tau_bench_has_a_turn_for_each_answer(tmp_path: Path) -> None:
    messages = [
        {"role": "system", "content": "rules"},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "done"},
    ]
    (session,) = read(write_lines(tmp_path / "t", [{"task_id": 3, "trial": 1, "traj": messages}]))
    assert session.session_id == "task-3-trial-1"
    first, second = session.turns
    opening = "<|im_start|>system\nrules<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
    assert first.prompt.text == opening + "<|im_start|>assistant\n"
    call = '[{"id":"1"}]'
    assert second.prompt.text == (
        f"{first.prompt.text}{call}<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (first.output_characters, second.output_characters) == (len(call), 4)
    assert (first.stop_reason, second.stop_reason) == ("tool_use", "end_turn")
    assert (first.arrival_seconds, first.think_seconds) == (None, None)


def test_azure_rows_are_sessions_of_one_request(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46.6805900,374,44\n"
        "2023-11-16 18:15:50.9951690,396,109\n"
    )
    first, second = read(path)
    assert (first.arrival_seconds, second.arrival_seconds) == (
        0.0,
        pytest.approx(4.314579, abs=2e-6),
    )
    assert second.turns[0].prompt == LengthPrompt(396)
    assert second.turns[0].output_tokens == 109


BROKEN = [
    (b"not json", "JSON is malformed"),
    (b'{"id": "x", "block_size": 64, "requests": [{"t": "soon"}]}', "Expected `float`"),
    (b'{"id": "x", "block_size": 64, "requests": []}', "has no requests"),
    (b'{"id": "x", "block_size": 64, "requests": [{"t": 1}]}', "expected in, out and hash_ids"),
    (
        b'{"id": "x", "block_size": 64, "requests": [{"t": 1, "requests": []}]}',
        "a sub-agent before any request",
    ),
    (
        b'{"id":"x","block_size":64,"requests":[{"t":0,"in":64,"out":1,"hash_ids":[1,2]}]}',
        "2 blocks of 64 tokens, but 64 tokens",
    ),
    (b'{"id":"x","block_size":64,"requests":[{"t":0,"in":-1,"out":1,"hash_ids":[]}]}', ">= 0"),
    (b'{"id": "x", "block_size": 0, "requests": []}', ">= 1"),
    (b'{"id": "\xff"}', ""),
    (b"[" * 100_000, ""),
]


@pytest.mark.parametrize(("line", "reason"), BROKEN)
def test_a_broken_line_is_named_and_refused_or_skipped(
    tmp_path: Path, line: bytes, reason: str
) -> None:
    path = write_lines(tmp_path / "t", [CLAUDE_CODE, line, {**CLAUDE_CODE, "id": "trace_2"}])
    with pytest.raises(TraceError) as raised:
        read(path)
    assert str(raised.value).startswith(f"{path}:2: ")
    assert reason in str(raised.value)
    reader = TraceReader(path, "skip")
    assert [session.session_id for session in reader] == ["trace_1", "trace_2"]
    assert reader.problem_count == 1
    assert reader.problems[0].line == 2


def test_subagents_nested_too_deep_are_a_broken_line(tmp_path: Path) -> None:
    request = {"t": 0, "in": 64, "out": 1, "hash_ids": [1]}
    entry: dict[str, object] = {"t": 0, "requests": [request]}
    for _ in range(trace_formats.SUBAGENT_DEPTH_MAX):
        entry = {"t": 0, "requests": [request, entry]}
    line = {"id": "x", "block_size": 64, "requests": [request, entry]}
    with pytest.raises(TraceError, match=r":1: sub-agents nest deeper than 8"):
        read(write_lines(tmp_path / "t", [line]))


def test_too_long_a_line_is_skipped_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t", [MOONCAKE[0], b" " * 3000 + b"{}", MOONCAKE[1]])
    reader = TraceReader(path, "skip", line_bytes_max=1000)
    assert sum(session.request_count() for session in reader) == 2
    assert [(p.line, p.reason) for p in reader.problems] == [(2, "longer than 1000 bytes")]


def test_a_truncated_xz_file_gives_what_is_whole(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t", [MOONCAKE[0]] * 20_000, pack=True)
    packed = path.read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(TraceError, match="xz data ends or breaks"):
        read(path)
    reader = TraceReader(path, "skip")
    assert 0 < sum(session.request_count() for session in reader) < 20_000
    assert reader.problem_count >= 1


def test_problems_kept_are_bounded_but_all_counted(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t", [MOONCAKE[0], *[b"{"] * 150])
    reader = TraceReader(path, "skip")
    list(reader)
    assert (reader.problem_count, len(reader.problems)) == (150, 100)


def test_a_broken_azure_row_is_named(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:15:46,374,44\nyesterday,1,2\n2023-11-16 18:15:47,374\n"
        "2023-11-16 18:15:40,1,1\n2023-11-16 18:15:48,5,-1\n2023-11-16 18:15:49,6,1\n"
    )
    reader = TraceReader(path, "skip")
    assert [s.turns[0].prompt.tokens for s in reader] == [374, 6]
    assert [problem.line for problem in reader.problems] == [3, 4, 5, 6]


@pytest.mark.parametrize("content", [b"", b"\n\n", b'{"a": 1}\n', b"\x00\x01\n", b"hello\n"])
def test_an_unknown_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    for on_error in ("raise", "skip"):
        with pytest.raises(TraceError, match=str(path)):
            TraceReader(path, on_error)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="missing: No such file"):
        TraceReader(tmp_path / "missing")


def test_shared_transcripts_are_not_copied(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x" * 1000}, {"role": "assistant", "content": "y"}] * 50
    (session,) = read(write_lines(tmp_path / "t", [{"task_id": 1, "traj": messages}]))
    assert len(session.turns) == 50
    prompts = [turn.prompt for turn in session.turns]
    assert all(isinstance(p, TextPrompt) and p.transcript is prompts[0].transcript for p in prompts)
