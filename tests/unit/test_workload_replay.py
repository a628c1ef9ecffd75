"""The replay against a real HTTP server in this process, which stands in for SGLang."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from workload_stand_in import VOCAB, StandIn

from symphony_sglang import cli
from symphony_sglang.clock import SystemClock
from symphony_sglang.errors import ServerUnavailableError
from symphony_sglang.workload import replay
from symphony_sglang.workload.advice import AdviceRules, Adviser
from symphony_sglang.workload.generate_client import CachedTokens
from symphony_sglang.workload.replay_driver import ReplayCounts, RequestRecord
from symphony_sglang.workload.replay_report import (
    Distribution,
    ReplaySummary,
    Source,
    print_summary,
    source_of,
)


def claude_code(
    name: str, prompts: list[int], *, out: int = 4, think: float = 0.0
) -> dict[str, Any]:
    """A session whose prompts hold the blocks 1, 2, 3 … of 64 tokens."""
    return {
        "id": name,
        "block_size": 64,
        "requests": [
            {
                "t": 10.0 * index,
                "type": "s",
                "model": "m",
                "in": tokens,
                "out": out,
                "hash_ids": list(range(1, tokens // 64 + 1)),
                "think_time": think,
            }
            for index, tokens in enumerate(prompts)
        ],
    }


def write_trace(path: Path, lines: list[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run_replay(
    server: StandIn, trace: Path, tmp_path: Path, *flags: str
) -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, what was printed, and the records written."""
    output = tmp_path / "records.jsonl"
    arguments = cli.make_parser().parse_args(
        [
            *("replay", "--trace", str(trace), "--url", server.url, "--vocab-size", str(VOCAB)),
            *("--output", str(output), "--time-scale", "0", *flags),
        ]
    )
    text = io.StringIO()
    code = replay.replay(arguments, Console(file=text, width=100), SystemClock())
    return code, text.getvalue(), [json.loads(line) for line in output.read_text().splitlines()]


def test_reuse_is_the_traces_own(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "t", [claude_code("a", [200, 330, 330]), claude_code("b", [256])]
    )
    with StandIn() as server:
        code, text, records = run_replay(server, trace, tmp_path, "--concurrency", "1")
    assert code == 0
    by_key = {(r["session_id"], r["turn"]): r for r in records}
    # Whole blocks that came before are found; what follows the blocks is new every time.
    assert [by_key["a", turn]["cached"]["device"] for turn in (0, 1, 2)] == [0, 192, 320]
    assert by_key["b", 0]["cached"] == {"device": 0, "host": 0, "storage": 0}
    assert [by_key["a", turn]["prompt_tokens"] for turn in (0, 1, 2)] == [200, 330, 330]
    assert [body["session_id"] for body in server.requests] == ["0/a", "0/a", "0/a", "0/b"]
    sampling = {"temperature": 0.0, "max_new_tokens": 4, "ignore_eos": True}
    assert all(body["sampling_params"] == sampling for body in server.requests)
    assert all(256 <= token < VOCAB for body in server.requests for token in body["input_ids"])
    assert "prompt tokens from device 512 (45.9 %)" in " ".join(text.split())
    assert "4 sent, 0 failed" in text
    for record in records:
        assert 0 < record["ttft_seconds"] <= record["latency_seconds"]
        assert record["output_tokens"] == 4
        assert record["finish_reason"] == "length"
        assert len(record["output_hash"]) == 16


def test_levels_are_told_apart(tmp_path: Path) -> None:
    trace = write_trace(
        tmp_path / "t",
        [claude_code("a", [640, 640]), claude_code("b", [640]), claude_code("a", [640, 640])],
    )
    with StandIn(device_pages=41) as server:
        _, text, records = run_replay(server, trace, tmp_path, "--concurrency", "1")
    found = [(r["cached"]["device"], r["cached"]["host"]) for r in records]
    assert found == [(0, 0), (624, 0), (0, 0), (0, 624), (624, 0)]
    rows = {line.split()[1]: line.split()[3] for line in text.splitlines() if line.startswith("│")}
    assert rows == {"recompute": "2", "host": "1", "device": "2"}


@pytest.mark.parametrize("incremental", [False, True])
def test_output_ids_are_the_same_streamed_or_not(tmp_path: Path, incremental: bool) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [128], out=9)])
    outputs = []
    for flags in ((), ("--no-stream",)):
        with StandIn(incremental=incremental) as server:
            _, text, (record,) = run_replay(server, trace, tmp_path, "--keep-output-ids", *flags)
        outputs.append(record["output_ids"])
        assert len(record["output_ids"]) == 9
        assert ("ttft_seconds" in record) is not bool(flags)
        assert ("tpot_seconds" in record) is not bool(flags)
    assert outputs[0] == outputs[1]
    assert "latency (not streamed)" in text


def test_runs_repeat_by_seed(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [200, 330])])
    hashes = []
    for seed in ("1", "1", "2"):
        with StandIn() as server:
            _, _, records = run_replay(server, trace, tmp_path, "--seed", seed)
        hashes.append([record["output_hash"] for record in records])
    assert hashes[0] == hashes[1] != hashes[2]


def test_text_is_sent_as_text_and_cut_at_the_servers_limit(tmp_path: Path) -> None:
    lines = [
        {"timestamp": at * 10**6, "input": "x" * size, "output": "y" * 30, "session_id": "s"}
        for at, size in enumerate((1000, 3000, 20_000, 1000))
    ]
    trace = write_trace(tmp_path / "t", lines)
    with StandIn(context_tokens=1024) as server:
        code, text, records = run_replay(server, trace, tmp_path)
    assert code == 0
    assert [body["text"] for body in server.requests] == ["x" * 1000, "x" * 3000]
    assert "input_ids" not in server.requests[0]
    assert [record["prompt_tokens"] for record in records] == [250, 750]
    assert [record["output_tokens"] for record in records] == [8, 8]
    assert "2 sent, 0 failed, 2 cut" in text


def test_sessions_are_cut_and_scaled_to_the_context(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [640, 1280, 6400], out=100)])
    with StandIn(context_tokens=1000) as server:
        _, text, records = run_replay(server, trace, tmp_path)
        assert [record["prompt_tokens"] for record in records] == [640]
        assert "2 cut" in text
        _, text, records = run_replay(server, trace, tmp_path, "--scale-tokens", "0.125")
        assert [record["prompt_tokens"] for record in records] == [80, 160, 800]
        assert [record["output_tokens"] for record in records] == [12, 12, 12]
        assert " cut" not in text


def test_bounds_on_requests_and_sessions(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code(name, [64, 128, 192]) for name in "abcd"])
    for flags, expected in (
        (("--requests", "4"), {"a": 3, "b": 1}),
        (("--sessions", "2"), {"a": 3, "b": 3}),
        (("--session-requests", "2", "--requests", "5"), {"a": 2, "b": 2, "c": 1}),
    ):
        with StandIn() as server:
            _, _, records = run_replay(server, trace, tmp_path, *flags)
        counts: dict[str, int] = {}
        for record in records:
            counts[record["session_id"]] = counts.get(record["session_id"], 0) + 1
        assert counts == expected


def test_requests_in_flight_never_exceed_the_bound(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code(str(i), [64, 128]) for i in range(12)])
    with StandIn(delay_seconds=0.02) as server:
        _, _, records = run_replay(server, trace, tmp_path, "--concurrency", "3")
        assert server.in_flight_max == 3
    assert len(records) == 24
    # A session's turns never overlap: the second is sent after the first is answered.
    ends = {
        r["session_id"]: r["sent_seconds"] + r["latency_seconds"] for r in records if not r["turn"]
    }
    assert all(r["sent_seconds"] >= ends[r["session_id"]] for r in records if r["turn"])


def test_think_times_are_kept_to_scale(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [64, 128], think=30.0)])
    with StandIn() as server:
        _, _, (first, second) = run_replay(server, trace, tmp_path, "--time-scale", "0.01")
    gap = second["sent_seconds"] - first["sent_seconds"] - first["latency_seconds"]
    assert 0.29 <= gap < 2.5


def test_a_pause_is_cut_to_the_longest_allowed(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [64, 128], think=3600.0)])
    with StandIn() as server:
        _, _, (first, second) = run_replay(
            server, trace, tmp_path, "--time-scale", "1", "--think-max", "0.2"
        )
    gap = second["sent_seconds"] - first["sent_seconds"] - first["latency_seconds"]
    assert 0.19 <= gap < 2.5


def test_each_turn_but_the_first_is_advised_in_time(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [64, 128, 192], think=50.0)])
    with StandIn() as server:
        _, _, records = run_replay(
            server, trace, tmp_path, "--time-scale", "0.01", "--advise-lead", "0.2"
        )
        assert [hint["session_id"] for hint in server.hints] == ["0/a", "0/a"]
        # Each came after its turn's answer and before the next request.
        assert [hint["after"] for hint in server.hints] == [1, 2]
    assert "lead_seconds" not in records[0]
    assert all(0.1 < record["lead_seconds"] <= 0.2 for record in records[1:])


def test_seated_sessions_have_had_their_first_turn(tmp_path: Path) -> None:
    lines = [claude_code("a", [64, 128]), claude_code("b", [64, 128, 192])]
    trace = write_trace(tmp_path / "t", lines)
    with StandIn() as server:
        code, _, records = run_replay(server, trace, tmp_path, "--seated", "--advise-lead", "0.2")
        sent = [(body["session_id"], len(body["input_ids"])) for body in server.requests]
        # A hint for every turn that is left, none for the first ones.
        assert len(server.hints) == 3
    assert code == 0
    assert sent[:2] == [("0/a", 64), ("0/b", 64)]
    turns = [(record["session_id"], record["turn"]) for record in records]
    assert sorted(turns) == [("a", 1), ("b", 1), ("b", 2)]
    assert all(record["cached"]["device"] for record in records)


def test_a_session_that_is_not_seated_is_told(tmp_path: Path) -> None:
    lines = [claude_code("a", [64, 128]), claude_code("b", [64, 128, 192])]
    trace = write_trace(tmp_path / "t", lines)
    with StandIn(fail_from=2) as server:
        code, text, records = run_replay(server, trace, tmp_path, "--seated")
    assert code == 1
    # The second session's first turn failed, so nothing of it was sent; then the first one's did.
    failed = [(record["session_id"], record["turn"]) for record in records if "error" in record]
    assert failed == [("b", 0), ("a", 1)]
    assert len(records) == 2
    assert "2 not sent after a failure" in text


def test_hints_are_left_out_and_false_as_asked(tmp_path: Path) -> None:
    lines = [claude_code(str(i), [64] * 11, out=1) for i in range(10)]
    trace = write_trace(tmp_path / "t", lines)
    counts = []
    for flags in ((), ("--advise-missing", "0.5"), ("--advise-false", "0.6")):
        with StandIn() as server:
            _, _, records = run_replay(
                server, trace, tmp_path, "--time-scale", "0", "--advise-lead", "1", *flags
            )
            counts.append((len(server.hints), sum("lead_seconds" in r for r in records)))
    assert counts[0] == (100, 100)
    assert counts[1][0] == counts[1][1]
    assert 30 <= counts[1][0] <= 70
    # 60 % false: one and a half wrong hints for each true one, but none while nobody else is known.
    assert counts[2][1] == 100
    assert 230 <= counts[2][0] <= 260


def test_a_server_without_the_route_costs_the_replay_nothing(tmp_path: Path) -> None:
    adviser = Adviser(Deaf(), AdviceRules(), seed=0)
    asyncio.run(adviser.send("a", true=True, expected_in_seconds=1.0))
    asyncio.run(adviser.send("gone", true=False, expected_in_seconds=1.0))
    assert adviser.statuses == {"http_404": 1, "unanswered": 1}
    assert (adviser.sent_true, adviser.sent_false) == (1, 1)


class Deaf:
    """A server without our routes, which is gone at the second question."""

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        if body["session_id"] == "gone":
            raise ServerUnavailableError("refused")
        return 404, {"detail": "Not Found"}


def test_arrivals_are_an_open_loop(tmp_path: Path) -> None:
    lines = [
        {"timestamp": at, "input_length": 100, "output_length": 2, "hash_ids": [at]}
        for at in (5000, 15_000, 15_000, 45_000)
    ]
    trace = write_trace(tmp_path / "t", lines)
    with StandIn(delay_seconds=0.3) as server:
        _, text, records = run_replay(
            server, trace, tmp_path, "--time-scale", "0.01", "--concurrency", "8"
        )
        assert server.in_flight_max >= 3  # nobody waits for an earlier answer
    due = sorted(round(record["due_seconds"], 6) for record in records)
    assert due == [0.0, 0.1, 0.1, 0.4]
    assert all(record["sent_seconds"] >= record["due_seconds"] for record in records)
    assert "10.00/s offered" in text


def test_a_subagent_starts_after_the_turn_that_called_it(tmp_path: Path) -> None:
    session = claude_code("a", [64, 128])
    child = {"t": 4.0, "agent_id": "x", "requests": claude_code("", [64])["requests"]}
    session["requests"].insert(1, child)
    trace = write_trace(tmp_path / "t", [session])
    with StandIn() as server:
        _, _, records = run_replay(server, trace, tmp_path, "--time-scale", "0.05")
    times = {(r["session_id"], r["turn"]): r for r in records}
    assert set(times) == {("a", 0), ("a", 1), ("a/x", 0)}
    parent = times["a", 0]
    assert times["a/x", 0]["sent_seconds"] >= parent["latency_seconds"] + 0.2


def test_a_failed_request_ends_its_session_and_the_exit_code_tells(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [64, 128, 192, 256])])
    with StandIn(fail_from=2) as server:
        code, text, records = run_replay(server, trace, tmp_path)
        assert len(server.requests) == 2  # not sent again
    assert code == 1
    assert [record.get("status") for record in records] == [200, 400]
    assert "HTTP 400" in records[1]["error"]
    assert "2 sent, 1 failed, 2 not sent after a failure" in text
    assert "no room" in text


def test_a_server_that_goes_away_leaves_what_was_measured(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code(str(i), [64, 128, 192]) for i in range(5)])
    with StandIn(drop_from=5) as server:
        started = time.monotonic()  # noqa: TID251 - a real server
        code, text, records = run_replay(server, trace, tmp_path, "--concurrency", "1")
        assert time.monotonic() - started < 30  # noqa: TID251
    assert code == 1
    assert len([record for record in records if "error" not in record]) == 4
    assert "5 sent, 1 failed" in text
    assert f"stopped early: {server.url} stopped answering" in text


def test_no_server_is_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [64])])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert cli.main(["replay", "--trace", str(trace), "--url", url]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"symphony: server_unavailable: {url}/model_info: ")
    assert len(error.splitlines()) == 1


def test_ctrl_c_leaves_what_was_measured(tmp_path: Path) -> None:
    trace = write_trace(tmp_path / "t", [claude_code(str(i), [64]) for i in range(500)])
    output = tmp_path / "records.jsonl"
    with StandIn(delay_seconds=0.05) as server:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "symphony_sglang.cli", "replay", "--trace", str(trace)),
                *("--url", server.url, "--vocab-size", "900", "--output", str(output)),
                *("--concurrency", "1"),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        while not (output.exists() and output.read_text().count("\n") >= 3):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped early: interrupted" in text
    assert "0 failed" in text


def test_broken_lines_are_told_and_skipped_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vocab = ("--vocab-size", str(VOCAB))
    trace = tmp_path / "t"
    good = json.dumps(claude_code("a", [64]))
    trace.write_text(f'{good}\n{{"id": 5}}\n{good}\n')
    with StandIn() as server:
        code, text, records = run_replay(server, trace, tmp_path, "--on-error", "skip")
        assert (code, len(records)) == (0, 2)
        assert f"skipped {trace}:2:" in text.replace("\n", "")
        # Met while reading ahead: whether the first request is over by then decides between an
        # error with nothing measured (2) and a report that stopped early (1).
        assert cli.main(["replay", "--trace", str(trace), "--url", server.url, *vocab]) in (1, 2)
    captured = capsys.readouterr()
    assert f"{trace}:2: " in (captured.out + captured.err).replace("\n", "")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--concurrency", "0"], "--concurrency is 0; expected a number from 1 to 65536"),
        (["--time-scale", "-1"], "--time-scale is -1; expected a number from 0"),
        (["--time-scale", "nan"], "--time-scale is nan"),
        (["--scale-tokens", "2"], "--scale-tokens is 2; expected a number from 0.0001 to 1"),
        (["--requests", "0"], "--requests is 0"),
        (["--sessions", "-3"], "--sessions is -3"),
        (["--session-requests", "0"], "--session-requests is 0"),
        (["--max-output-tokens", "0"], "--max-output-tokens is 0"),
        (["--max-prompt-tokens", "9999"], "--max-prompt-tokens is 9999; expected at most 4090"),
        (["--vocab-size", "1"], "--vocab-size is 1; expected a number of at least 2"),
        (["--request-timeout", "0"], "--request-timeout is 0"),
        (["--max-prompt-tokens", "10"], "prompts over the limit"),
        (["--url", "localhost:1"], "--url is 'localhost:1'; expected http://host:port"),
        (["--output", "/nowhere/at/all"], "--output is '/nowhere/at/all': No such file"),
        (["--trace", "/nowhere"], "/nowhere: No such file"),
    ],
)
def test_a_bad_value_names_flag_value_and_range(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [64])])
    with StandIn() as server:
        base = ["replay", "--trace", str(trace), "--url", server.url, "--vocab-size", "900"]
        assert cli.main([*base, *flags]) == 2
        assert server.requests == []
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_the_vocabulary_is_read_from_the_model_on_this_machine(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = write_trace(tmp_path / "t", [claude_code("a", [640])])
    (tmp_path / "config.json").write_text('{"vocab_size": 300}')
    with StandIn(model_path=str(tmp_path)) as server:
        command = ["replay", "--trace", str(trace), "--url", server.url]
        assert cli.main(command) == 0
        assert max(server.requests[0]["input_ids"]) < 300
        server.model_path = "somewhere/else"
        assert cli.main(command) == 2
    assert "--vocab-size is not given, and somewhere/else" in capsys.readouterr().err


def record(due: float, sent: float, latency: float, **fields: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "session_id": "s",
        "turn": 0,
        "prompt_tokens": 100,
        "cached": CachedTokens(),
        "output_tokens": 2,
        "ttft_seconds": latency / 2,
    }
    return RequestRecord(
        due_seconds=due, sent_seconds=sent, latency_seconds=latency, **{**values, **fields}
    )


def test_the_summary_counts_by_hand() -> None:
    records = [
        record(0, 0, 1.0),
        record(1, 1.5, 2.0, cached=CachedTokens(device=60, host=10)),
        record(2, 2, 3.0, cached=CachedTokens(device=10, host=40, storage=45)),
        record(3, 3, 1.0, cached=CachedTokens(host=100), ttft_seconds=0.2),
        record(4, 4, 9.0, error="HTTP 500: no", ttft_seconds=None),
    ]
    summary = ReplaySummary.of(records)
    assert (summary.requests, summary.failures) == (5, 1)
    assert summary.cached == CachedTokens(device=70, host=150, storage=45)
    assert summary.first_token == {
        Source.RECOMPUTE: Distribution(1, 0.5, 0.5, 0.5),
        Source.DEVICE: Distribution(1, 1.0, 1.0, 1.0),
        Source.STORAGE: Distribution(1, 1.5, 1.5, 1.5),
        Source.HOST: Distribution(1, 0.2, 0.2, 0.2),
    }
    assert summary.offered_rate == 5 / 4
    assert summary.achieved_rate == 4 / 5
    assert summary.errors == {"HTTP 500: no": 1}
    assert summary.held is not None
    assert summary.held.p50 == 0.0


def test_a_tie_goes_to_the_slower_source() -> None:
    assert source_of(100, CachedTokens(device=50)) is Source.RECOMPUTE
    assert source_of(100, CachedTokens(device=48, host=48)) is Source.HOST
    assert source_of(100, CachedTokens(host=48, storage=48)) is Source.STORAGE


def test_a_summary_of_nothing_good_prints() -> None:
    text = io.StringIO()
    summary = ReplaySummary.of([record(0, 0, 1.0, error="gone", ttft_seconds=None)])
    print_summary(Console(file=text), summary, ReplayCounts(sessions=1))
    assert "1 sent, 1 failed" in text.getvalue()
