"""The demo's conversations: their plan, their checks, and a run against a stand-in server."""

from __future__ import annotations

import asyncio
import io
from dataclasses import replace

import pytest
from rich.console import Console
from workload_stand_in import VOCAB, StandIn

from symphony_sglang.clock import SystemClock
from symphony_sglang.errors import ConfigError, ServerUnavailableError
from symphony_sglang.workload.conversation import (
    ConversationRules,
    Conversations,
    Difference,
    Sample,
    Visit,
    compared_sources,
    converse,
    find_differences,
    plan_visits,
)
from symphony_sglang.workload.demo import judge, level_table, parse_levels
from symphony_sglang.workload.generate_client import GenerateClient
from symphony_sglang.workload.replay_report import Source

RULES = ConversationRules(
    sessions=6, lag=3, opening_tokens=320, message_tokens=20, answer_tokens=6, vocab=VOCAB
)
# Three sessions of 352 tokens push the fourth one back out.
DEVICE_PAGES = 60


def run(server: StandIn, rules: ConversationRules = RULES) -> list[Sample]:
    async def measured() -> list[Sample]:
        async with GenerateClient(server.url, clock=SystemClock()) as client:
            return await converse(client, rules, run_id="run")

    return asyncio.run(measured())


def test_the_plan_returns_after_the_lag_in_every_way() -> None:
    rules = replace(RULES, sessions=3, lag=1)
    assert list(plan_visits(rules)) == [
        Visit(0, 1),
        Visit(0, 2),
        Visit(1, 1),
        Visit(1, 2),
        Visit(0, 3),
        Visit(0, 3),
        Visit(0, 3, anew=True),
        Visit(2, 1),
        Visit(2, 2),
        Visit(1, 3),
        Visit(1, 3),
        Visit(1, 3, anew=True),
    ]
    for sessions in (2, 3, 9):
        rules = replace(RULES, sessions=sessions, lag=1)
        assert len(list(plan_visits(rules))) == rules.request_count


def test_a_prompt_goes_on_from_the_one_before_and_its_answer() -> None:
    conversations = Conversations(RULES)
    first = conversations.prompt(2, 1)
    assert len(first) == 320
    conversations.answers[2, 1] = (7, 8, 9)
    second = conversations.prompt(2, 2)
    assert second[:323] == [*first, 7, 8, 9]
    assert len(second) == 343
    assert Conversations(RULES).prompt(2, 1) == first
    assert Conversations(RULES).prompt(3, 1) != first
    assert all(256 <= token < VOCAB for token in first)


def test_every_level_is_hit_and_the_outputs_agree() -> None:
    with StandIn(device_pages=DEVICE_PAGES) as server:
        samples = run(server)
    assert len(samples) == RULES.request_count == 21
    by_visit: dict[Visit, list[Source]] = {}
    for sample in samples:
        by_visit.setdefault(sample.visit, []).append(sample.source)
    for session in range(6):
        assert by_visit[Visit(session, 1)] == [Source.RECOMPUTE]
        assert by_visit[Visit(session, 2)] == [Source.DEVICE]
    for session in range(3):
        assert by_visit[Visit(session, 3)] == [Source.HOST, Source.DEVICE]
        assert by_visit[Visit(session, 3, anew=True)] == [Source.RECOMPUTE]
        assert compared_sources(samples)[session, 3] == {
            Source.RECOMPUTE,
            Source.HOST,
            Source.DEVICE,
        }
    verdict = judge(samples, ["device", "host"])
    assert verdict.problems == ()
    assert verdict.findings == (
        "identical outputs: 3 prompts each answered from two or more places, "
        "3 of them from device, host, recompute",
    )


def test_a_level_that_gives_other_output_is_found() -> None:
    with StandIn(device_pages=DEVICE_PAGES, corrupt_host=True) as server:
        samples = run(server)
    found = find_differences(samples)
    assert {(item.session, item.turn) for item in found} == {(0, 3), (1, 3), (2, 3)}
    assert all(item.sources[0] is Source.HOST and item.position == 0 for item in found)
    problems = judge(samples, ["device", "host"]).problems
    assert len(problems) == 6  # five told, the sixth counted
    assert "session 0, turn 3: the outputs from host and from device part at token 0" in problems
    assert problems[-1] == "1 more outputs differ"


def test_a_level_that_is_never_hit_is_a_problem() -> None:
    with StandIn() as server:  # nothing ever leaves the device
        samples = run(server)
    problems = judge(samples, ["device", "host"]).problems
    assert problems == (
        "the host level was never hit",
        "no prompt was answered from each of device, host, recompute",
    )
    assert judge(samples, ["device"]).problems == ()


def test_differences_name_where_outputs_part() -> None:
    with StandIn() as server:
        samples = run(server, replace(RULES, sessions=2, lag=1))
    first, second = (s for s in samples if s.visit == Visit(0, 3))
    output = second.result.output_ids
    changed = (*output[:4], output[4] + 1, *output[5:])
    result = type(second.result)(latency_seconds=1.0, output_ids=changed)
    shorter = type(second.result)(latency_seconds=1.0, output_ids=output[:3])
    both = [first, second._replace(result=result), second._replace(result=shorter)]
    assert find_differences(both) == [
        Difference(0, 3, (Source.DEVICE, Source.DEVICE), 4),
        Difference(0, 3, (Source.DEVICE, Source.DEVICE), 3),
    ]


def test_a_failed_request_stops_the_demo() -> None:
    with StandIn(fail_from=8) as server, pytest.raises(ServerUnavailableError, match="HTTP 400"):
        run(server)


def test_the_table_has_a_row_for_each_source_in_80_columns() -> None:
    with StandIn(device_pages=DEVICE_PAGES) as server:
        samples = run(server)
    text = io.StringIO()
    Console(file=text, width=80).print(level_table(samples))
    rows = {line.split()[0]: line.split() for line in text.getvalue().splitlines() if line.split()}
    assert rows["recompute"][1:6] == ["9", "320", "0", "0", "0"]
    assert rows["host"][1:6] == ["3", "372", "0", "336", "0"]
    assert rows["device"][1] == "9"
    assert rows["recompute"][-1] == "1.000"
    assert "…" not in text.getvalue()


def test_bad_values_are_named() -> None:
    with pytest.raises(ConfigError, match="--sessions is 3; expected 4 to 10000"):
        ConversationRules(sessions=3, lag=3)
    assert parse_levels("device, host") == ["device", "host"]
    with pytest.raises(ConfigError, match="--expect has 'nvme'; expected levels of device, host"):
        parse_levels("device,nvme")
