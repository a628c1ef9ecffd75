"""A real worker's ``/metrics``, hints that a tool call implies, caller budgets, and keys."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import VOCAB, Server, start_server
from symphony_sglang.telemetry.metrics import Kind, Worker, declared

pytestmark = pytest.mark.server

KEY = "key-of-the-callers"
AUTHORIZED = {"Authorization": f"Bearer {KEY}"}
ADVISE_TOKENS = 1000

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}


class KeyedServer(Server):
    """Sends the key with every call that names no other headers."""

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        options.setdefault("headers", AUTHORIZED)
        return super().call(method, path, body, **options)


@pytest.fixture(scope="module")
def metered(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("metered")
    server = start_server(
        model,
        directory / "worker.log",
        "--enable-metrics",
        # The tiny model would fill a grammar's optional blanks until its tokens end.
        "--constrained-json-disable-any-whitespace",
        # For this one SGLang holds a required call to a JSON schema: any model can keep to it.
        "--tool-call-parser",
        "pythonic",
        "--api-key",
        KEY,
        "--symphony-nvme-dir",
        str(directory / "pages"),
        "--symphony-nvme-gb",
        "0.5",
        "--symphony-advise-tokens",
        str(ADVISE_TOKENS),
    )
    yield KeyedServer(server.worker, model)
    server.worker.stop()


Series = dict[tuple[str, frozenset[tuple[str, str]]], float]
LINE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? (?P<value>\S+)$")


def scrape(server: Server) -> Series:
    """Every sample of ``/metrics`` by name and labels."""
    text = server.call("GET", "/metrics", headers={}).body
    found: Series = {}
    for line in text.splitlines():
        match = LINE.match(line)
        if match:
            labels = frozenset(re.findall(r'(\w+)="([^"]*)"', match["labels"] or ""))
            found[match["name"], labels] = float(match["value"])
    return found


def value(series: Series, name: str, **labels: str) -> float:
    """The sum of the samples of `name` that carry `labels`."""
    wanted = set(labels.items())
    return sum(v for (n, got), v in series.items() if n == name and wanted <= got)


def wait_for(server: Server, holds: Callable[[Series], bool]) -> Series:
    """The first scrape that `holds`: totals are copied twice a second."""
    series: Series = {}
    for _ in range(100):
        series = scrape(server)
        if holds(series):
            return series
        time.sleep(0.1)
    ours = {key: v for key, v in series.items() if key[0].startswith("symphony:") and v}
    raise AssertionError(f"not in 10 s: {ours}")


def prompt(seed: int, length: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, VOCAB) for _ in range(length)]


def advise(server: Server, **body: Any) -> Any:
    return server.call("POST", "/symphony/advise", body)


def settle(server: Server, advisory_id: str, *states: str) -> dict[str, Any]:
    for _ in range(200):
        body = server.call("GET", f"/symphony/advisories/{advisory_id}").body
        if body["state"] in states:
            return body
        time.sleep(0.02)
    raise AssertionError(f"not {states} in 4 s: {body}")


def test_calls_without_the_key_are_refused(metered: Server) -> None:
    calls = [
        ("POST", "/symphony/advise", {"session_id": "s"}),
        ("GET", "/symphony/advisories/adv-1", None),
        ("DELETE", "/symphony/advisories/adv-1", None),
        ("GET", "/symphony/sessions/s", None),
        ("DELETE", "/symphony/sessions/s", None),
        ("GET", "/symphony/residency", None),
    ]
    for method, path, body in calls:
        assert metered.call(method, path, body, headers={}).status in (401, 403), path
        wrong = {"Authorization": "Bearer another"}
        assert metered.call(method, path, body, headers=wrong).status in (401, 403), path
    assert metered.call("GET", "/symphony/residency").status == 200


def test_metrics_of_ours_stand_beside_sglangs(metered: Server) -> None:
    before = wait_for(metered, lambda s: value(s, "symphony:level_total_bytes") > 0)
    metered.greedy_one(prompt(1, 320), 4, session_id="m1")
    advisory = advise(metered, session_id="m1").body["receipts"][0]
    settle(metered, advisory["advisory_id"], "ready")
    metered.greedy_one([*prompt(1, 320), 301], 4, session_id="m1")
    settle(metered, advisory["advisory_id"], "used")
    advise(metered, session_id="nobody")
    series = wait_for(
        metered,
        lambda s: (
            value(s, "symphony:advisories_ended_total", state="used")
            == value(before, "symphony:advisories_ended_total", state="used") + 1
            # Sent last, and told half a second later at most.
            and value(s, "symphony:advisories_total", status="missing")
            == value(before, "symphony:advisories_total", status="missing") + 1
        ),
    )

    def grew(name: str, **labels: str) -> float:
        return value(series, name, **labels) - value(before, name, **labels)

    assert grew("symphony:advisories_total", status="accepted") == 1
    assert grew("symphony:advisories_total", status="missing") == 1
    assert grew("symphony:advised_requests_total", ready="true") == 1
    assert grew("symphony:advisory_lead_seconds_count", state="used") == 1
    assert 0 < grew("symphony:advisory_lead_seconds_sum", state="used") < 60
    assert grew("symphony:advisory_lead_seconds_bucket", state="used", le="+Inf") == 1
    assert grew("symphony:scheduler_work_seconds_total", work="step") > 0
    assert value(series, "symphony:level_used_bytes", level="device") > 0
    body = metered.residency()
    assert (
        value(series, "symphony:level_total_bytes", level="host")
        == (body["levels"]["host"]["total_bytes"])
    )
    # SGLang's own are there, and ours carry its labels.
    (labels,) = [dict(got) for name, got in series if name == "symphony:advisories_live"]
    theirs = [dict(got) for name, got in series if name == "sglang:num_running_reqs"]
    assert labels in theirs


def test_pages_and_protection_are_seen(metered: Server) -> None:
    metered.flush()  # ends the advisories of the tests before
    metered.greedy_one(prompt(2, 480), 4, session_id="m2")
    advisory = advise(metered, session_id="m2").body["receipts"][0]
    settle(metered, advisory["advisory_id"], "ready")
    series = wait_for(metered, lambda s: value(s, "symphony:protected_bytes", level="device") > 0)
    limit = value(series, "symphony:protect_limit_bytes", level="device")
    assert value(series, "symphony:protected_bytes", level="device") <= limit
    wait_for(metered, lambda s: value(s, "symphony:store_events_total", event="written") > 0)
    wait_for(metered, lambda s: value(s, "symphony:level_used_bytes", level="nvme") > 0)
    metered.call("DELETE", f"/symphony/advisories/{advisory['advisory_id']}")
    series = wait_for(metered, lambda s: value(s, "symphony:protected_bytes", level="device") == 0)
    assert value(series, "symphony:protected_byte_seconds_total", level="device") > 0


def test_every_counter_of_the_scheduler_is_there_from_the_start(metered: Server) -> None:
    """A counter that appears with its first event hides that event from ``rate``."""
    series = wait_for(metered, lambda s: value(s, "symphony:level_total_bytes") > 0)
    names = {name for name, _ in series}
    by_event = {  # made by the HTTP process, by routers or by peers, when the first one comes
        Worker.IMPLICIT.name,
        Worker.HINTS_REFUSED.name,
        Worker.STALL_SAVED.name,
        Worker.PULLS.name,
        Worker.PEER_BYTES.name,
        Worker.STORE_EVENTS.name,
    }
    counters = {m.name for m in declared(Worker) if m.kind is Kind.COUNTER}
    assert counters - by_event <= names


def tool_turn(server: Server, *, stream: bool = False, **extra: Any) -> Any:
    """A chat turn whose grammar leaves the tiny model no choice but one tool call."""
    body = {
        "model": str(server.model),
        "messages": [{"role": "user", "content": "Which weather? " + "really " * 40}],
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "temperature": 0,
        "stream": stream,
        **extra,
    }
    return server.call("POST", "/v1/chat/completions", body)


def finish_reasons(answer: Any, *, stream: bool) -> list[str]:
    if not stream:
        return [choice["finish_reason"] for choice in answer.body["choices"]]
    lines = [line[6:] for line in answer.body.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]


def advisories_of(server: Server, session_id: str, tries: int = 100) -> list[dict[str, Any]]:
    for _ in range(tries):
        view = server.call("GET", f"/symphony/sessions/{session_id}")
        if view.status == 200 and view.body["advisories"]:
            return list(view.body["advisories"])
        time.sleep(0.02)
    return []


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_announces_the_sessions_next_turn(metered: Server, stream: bool) -> None:
    session_id = f"tool-{stream}"
    before = value(scrape(metered), "symphony:implicit_advisories_total", cause="tool_calls")
    answer = tool_turn(metered, stream=stream, session_id=session_id)
    assert finish_reasons(answer, stream=stream) == ["tool_calls"]
    (advisory,) = advisories_of(metered, session_id)
    assert advisory["action_id"] == "implicit:tool_calls"
    assert advisory["status"] == "accepted"
    wait_for(
        metered,
        lambda s: value(s, "symphony:implicit_advisories_total", cause="tool_calls") == before + 1,
    )
    ready = settle(metered, advisory["advisory_id"], "ready")
    # The turn with the tool's answer finds it, whatever it says.
    metered.greedy_one(prompt(3, 32), 1, session_id=session_id)
    assert settle(metered, ready["advisory_id"], "used", "late", "wasted", "expired")


def test_session_of_a_header_counts_and_no_session_announces_nothing(metered: Server) -> None:
    headers = {**AUTHORIZED, "X-Session-ID": "tool-header"}
    body_free = tool_turn(metered)
    assert finish_reasons(body_free, stream=False) == ["tool_calls"]
    before = metered.residency()["counters"]["advisories"]["statuses"]
    chat = {
        "model": str(metered.model),
        "messages": [{"role": "user", "content": "Which weather? " + "again " * 40}],
        "tools": [WEATHER],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 120,
        "temperature": 0,
    }
    answer = metered.call("POST", "/v1/chat/completions", chat, headers=headers)
    assert finish_reasons(answer, stream=False) == ["tool_calls"]
    assert len(advisories_of(metered, "tool-header")) == 1
    after = metered.residency()["counters"]["advisories"]["statuses"]
    assert after["accepted"] == before["accepted"] + 1
    assert after["missing"] == before["missing"]


def test_turn_that_ends_otherwise_announces_nothing(metered: Server) -> None:
    chat = {
        "model": str(metered.model),
        "messages": [{"role": "user", "content": "hello " * 40}],
        "max_tokens": 2,
        "session_id": "no-tool",
    }
    answer = metered.call("POST", "/v1/chat/completions", chat)
    assert finish_reasons(answer, stream=False) == ["length"]
    assert advisories_of(metered, "no-tool", tries=15) == []


def test_hints_of_the_request_itself_stand_alone(metered: Server) -> None:
    action = {"action_id": "mine", "action_type": "prefetch", "payload": {"expires_in_s": 5}}
    envelope = {"protocol_version": "0.1", "message_id": "m", "actions": [action]}
    answer = tool_turn(metered, session_id="tool-own", kv_hints=envelope)
    assert finish_reasons(answer, stream=False) == ["tool_calls"]
    (advisory,) = advisories_of(metered, "tool-own")
    assert advisory["action_id"] == "mine"


def test_caller_over_its_tokens_in_flight_gets_429_until_some_end(metered: Server) -> None:
    metered.flush()  # ends the advisories of the tests before
    first, second = prompt(50, 800), prompt(51, 800)
    for ids, session_id in ((first, "big1"), (second, "big2")):
        metered.greedy_one(ids, 1, session_id=session_id)
    held = [advise(metered, session_id=name, expires_in_s=60) for name in ("big1", "big2")]
    assert [answer.status for answer in held] == [202, 202]
    before = value(scrape(metered), "symphony:hints_refused_total", limit="rate")
    refused = advise(metered, session_id="big1")
    assert refused.status == 429, refused
    assert "tokens_in_flight" in str(refused.body)
    headers = {name.lower(): text for name, text in refused.headers.items()}
    assert int(headers["retry-after"]) >= 1
    series = wait_for(
        metered, lambda s: value(s, "symphony:hints_refused_total", limit="tokens_in_flight") > 0
    )
    assert value(series, "symphony:hints_refused_total", limit="rate") == before
    # The schedulers end it; the next try finds out.
    advisory_id = held[0].body["receipts"][0]["advisory_id"]
    metered.greedy_one([*first, 301], 1, session_id="big1")
    settle(metered, advisory_id, "used", "late")
    time.sleep(0.2)
    assert advise(metered, session_id="big1").status == 202
