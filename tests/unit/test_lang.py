"""SymphonyEndpoint and the primitives against a real HTTP server that keeps what it was sent."""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from symphony_stand_in import Asked, Reply, StandIn, running

from symphony_sglang import lang
from symphony_sglang.lang.adviser import AdviserSettings

QUICK = AdviserSettings(idle_seconds=0.05, request_seconds_max=1.0, retry_seconds=0.2)
# For tests in which no program waits: a busy machine must not look like a waiting program.
PATIENT = AdviserSettings(idle_seconds=1.0, request_seconds_max=5.0, retry_seconds=0.2)


@pytest.fixture
def server() -> Iterator[StandIn]:
    with running() as found:
        yield found


@pytest.fixture
def endpoint(server: StandIn) -> Iterator[lang.SymphonyEndpoint]:
    found = lang.SymphonyEndpoint(server.url, chat_template_name="chatml", settings=QUICK)
    yield found
    found.shutdown()
    found.adviser.check()


@pytest.fixture
def patient(server: StandIn) -> Iterator[lang.SymphonyEndpoint]:
    found = lang.SymphonyEndpoint(server.url, chat_template_name="chatml", settings=PATIENT)
    yield found
    found.shutdown()
    found.adviser.check()


def until(condition: Any, seconds_max: float = 5.0) -> None:
    for _ in range(int(seconds_max / 0.01)):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds_max:g} s")


def kinds(server: StandIn, session_id: str) -> list[str]:
    return [kind for kind, body in server.hints() if body.get("session_id") == session_id]


@sgl.function
def one_turn(s: Any) -> None:
    s += "Say " + sgl.gen("said", max_tokens=4)


def test_program_is_a_session_that_is_released_at_its_end(
    server: StandIn, patient: lang.SymphonyEndpoint
) -> None:
    state = one_turn.run(backend=patient)
    assert state["said"] == " done"
    sid = state.stream_executor.sid
    assert [body["session_id"] for body in server.generations()] == [sid]
    until(lambda: kinds(server, sid) == ["release"])
    del state
    gc.collect()
    assert patient.adviser.flush()
    assert kinds(server, sid) == ["release"]
    assert patient.adviser.stats().programs == 0


def test_requests_are_those_of_runtime_endpoint_but_for_the_session(
    server: StandIn, endpoint: lang.SymphonyEndpoint
) -> None:
    @sgl.function
    def mixed(s: Any) -> None:
        s += sgl.user("hi" + sgl.gen("a", max_tokens=3, stop="."))
        s += sgl.select("b", ["x", "y"])
        s.sync()
        forks = s.fork(2)
        forks += sgl.gen("c", regex="[a-z]+", return_logprob=True)
        forks.join()

    def bodies(backend: Any) -> list[dict[str, Any]]:
        server.asked.clear()
        state = mixed.run(backend=backend)
        state.sync()
        assert state.error() is None
        return sorted(server.generations(), key=repr)

    plain = bodies(RuntimeEndpoint(server.url, chat_template_name="chatml"))
    ours = bodies(endpoint)
    marks = [(body.pop("session_id", None), body.pop("routing_key", None)) for body in ours]
    assert sorted(ours, key=repr) == sorted(plain, key=repr)
    # All have a session, but for the choices under comparison, which only say where they belong.
    assert all((turn is None) != (place is None) for turn, place in marks)
    assert [isinstance(body["text"], list) for body in ours] == [
        place is not None for _, place in marks
    ]


def test_image_goes_out_as_with_runtime_endpoint(
    server: StandIn, endpoint: lang.SymphonyEndpoint, tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"not decoded by a client")

    @sgl.function
    def look(s: Any) -> None:
        s += sgl.user(sgl.image(str(picture)) + "What is it?")
        s += sgl.assistant(sgl.gen("answer"))
        assert s["answer"] is not None
        lang.advise(s, 1.0)
        assert endpoint.adviser.flush()

    state = look.run(backend=endpoint)
    state.sync()
    (body,) = server.generations()
    assert body["image_data"] == state.stream_executor.images_[0][1]
    until(lambda: "prefetch" in kinds(server, state.stream_executor.sid))
    assert not any("text" in payload for _, payload in server.hints())


def test_waiting_program_is_advised_and_a_busy_one_is_not(
    server: StandIn, patient: lang.SymphonyEndpoint
) -> None:
    @sgl.function
    def busy_then_waiting(s: Any) -> None:
        for index in range(5):
            s += "x" + sgl.gen(f"a{index}", max_tokens=2)
        s.sync()
        until(lambda: kinds(server, s.stream_executor.sid) == ["prefetch"])
        s += sgl.gen("b", max_tokens=2)

    state = busy_then_waiting.run(backend=patient)
    until(lambda: kinds(server, state.stream_executor.sid) == ["prefetch", "release"])


def test_program_that_fails_is_released_too(
    server: StandIn, endpoint: lang.SymphonyEndpoint
) -> None:
    @sgl.function
    def fails(s: Any) -> None:
        s += "x" + sgl.gen("a")
        seen.append(s.stream_executor.sid)
        assert s["a"] is not None
        raise KeyError("mine")

    seen: list[str] = []
    with pytest.raises(KeyError, match="mine"):
        fails.run(backend=endpoint)
    until(lambda: kinds(server, seen[0])[-1:] == ["release"])


def test_tool_is_advised_at_its_start_refined_and_announced_at_its_end(
    server: StandIn, patient: lang.SymphonyEndpoint
) -> None:
    @sgl.function
    def uses_a_tool(s: Any) -> None:
        s += "x" + sgl.gen("a")
        assert s["a"] is not None
        began = time.monotonic()  # noqa: TID251 - a test of real time
        with lang.tool_call(s, expected_s=20) as call:
            assert patient.adviser.flush()
            call.expect(10)
            assert patient.adviser.flush()
            time.sleep(0.3)
            spent.append(time.monotonic() - began)  # noqa: TID251
            call.progress(0.5)  # half of it in so long: as long again
            call.progress(0.501)  # nothing new
            assert patient.adviser.flush()
        assert patient.adviser.flush()

    spent: list[float] = []
    state = uses_a_tool.run(backend=patient)
    hints = [body for kind, body in server.hints() if kind == "prefetch"]
    assert {body["session_id"] for body in hints} == {state.stream_executor.sid}
    expected = [body["expected_in_s"] for body in hints]
    assert len(expected) == 4
    assert expected == pytest.approx([20, 10, spent[0], 0], abs=0.5)
    assert [body.get("priority") for body in hints] == [None, None, None, 1]
    assert hints[0]["expires_in_s"] == 60.0


def test_long_tool_stays_on_the_host_level_until_shortly_before(
    server: StandIn,
) -> None:
    settings = AdviserSettings(hold_seconds=0.4, lead_seconds=0.3, idle_seconds=1.0)
    endpoint = lang.SymphonyEndpoint(server.url, settings=settings)

    @sgl.function
    def waits_long(s: Any) -> None:
        s += "x" + sgl.gen("a")
        assert s["a"] is not None
        with lang.tool_call(s, expected_s=0.6):
            time.sleep(0.6)
        # A program that is over needs none of its hints.
        assert endpoint.adviser.flush()

    waits_long.run(backend=endpoint)
    endpoint.shutdown()
    targets = [body.get("target") for kind, body in server.hints() if kind == "prefetch"]
    assert targets == ["host", None, None]


def test_hint_before_the_first_turn_goes_by_text(
    server: StandIn, endpoint: lang.SymphonyEndpoint
) -> None:
    @sgl.function
    def prepares(s: Any) -> None:
        s += "A long, shared beginning."
        s.sync()
        lang.advise(s, 3.0, target="host", priority=2)
        assert endpoint.adviser.flush()

    prepares.run(backend=endpoint)
    (payload,) = [body for kind, body in server.hints() if kind == "prefetch"]
    assert payload == {
        "text": "A long, shared beginning.",
        "expected_in_s": 3.0,
        "expires_in_s": 60.0,
        "target": "host",
        "priority": 2,
    }


def test_children_that_end_announce_their_parent(
    server: StandIn, endpoint: lang.SymphonyEndpoint
) -> None:
    @sgl.function
    def forks(s: Any) -> None:
        s += "shared" + sgl.gen("a")
        s.sync()
        group = s.fork(2)
        assert endpoint.adviser.flush()
        group += sgl.gen("b")
        group.join()
        until(lambda: kinds(server, s.stream_executor.sid).count("prefetch") >= 2)
        s += sgl.gen("c")

    state = forks.run(backend=endpoint)
    until(lambda: kinds(server, state.stream_executor.sid)[-1:] == ["release"])
    assert state.error() is None
    until(lambda: [kind for kind, _ in server.hints()].count("release") == 3)


def test_kept_programs_are_not_released(server: StandIn, patient: lang.SymphonyEndpoint) -> None:
    @sgl.function
    def keeps(s: Any) -> None:
        s += "x" + sgl.gen("a")
        lang.retain(s, 30)

    @sgl.function
    def names(s: Any) -> None:
        lang.name_session(s, "mine")
        s += "x" + sgl.gen("a")
        assert s["a"] is not None
        with pytest.raises(ValueError, match="first request"):
            lang.name_session(s, "other")

    first, second = keeps.run(backend=patient), names.run(backend=patient)
    for state in (first, second):
        state.sync()
        assert state.error() is None
    until(lambda: patient.adviser.stats().programs == 0)
    assert [kind for kind, _ in server.hints()] == ["retain"]
    assert {body["session_id"] for body in server.generations()} == {
        first.stream_executor.sid,
        "mine",
    }


@pytest.mark.parametrize("value", [-1, float("nan"), "soon"])
def test_author_is_told_what_is_wrong(value: Any, endpoint: lang.SymphonyEndpoint) -> None:
    @sgl.function
    def wrong(s: Any) -> None:
        with pytest.raises((ValueError, TypeError)):
            lang.advise(s, value)
        with pytest.raises((ValueError, TypeError)):
            lang.retain(s, value)
        with pytest.raises(ValueError, match="expected text"):
            lang.name_session(s, "")
        with lang.tool_call(s) as call, pytest.raises((ValueError, TypeError)):
            call.progress(value)

    wrong.run(backend=endpoint)


def test_primitives_do_nothing_on_another_backend(server: StandIn) -> None:
    @sgl.function
    def says_all(s: Any) -> None:
        lang.name_session(s, "x")
        s += "x" + sgl.gen("a")
        lang.advise(s, 1.0)
        lang.retain(s, 5)
        with lang.tool_call(s, expected_s=1) as call:
            call.progress(0.5)

    assert says_all.run(backend=RuntimeEndpoint(server.url)).error() is None
    assert server.hints() == []
    assert "session_id" not in server.generations()[0]
    says_all.trace(backend=RuntimeEndpoint(server.url))


def test_server_that_hangs_on_hints_holds_no_program(
    server: StandIn, endpoint: lang.SymphonyEndpoint, caplog: pytest.LogCaptureFixture
) -> None:
    server.advise_gate.clear()
    with caplog.at_level(logging.INFO, "symphony_sglang"):
        for _ in range(20):
            assert one_turn.run(backend=endpoint)["said"] == " done"
        until(lambda: endpoint.adviser.stats().failures >= 1)
        assert len(server.generations()) == 20
        server.advise_gate.set()
        until(lambda: one_turn.run(backend=endpoint).error() or endpoint.adviser.stats().messages)
    lines = [record.message for record in caplog.records]
    assert len(lines) == 2
    assert "hints are dropped" in lines[0]
    assert "takes advisories again" in lines[1]


REFUSALS = [
    (Reply(404, {"detail": "no such route"}), "advisories are off"),
    (Reply(401, {"error": "Unauthorized"}), "refused"),
    (Reply(429, {"detail": "over budget"}, {"Retry-After": "1"}), "refused"),
    (Reply(503, {"detail": "down"}), "not reachable"),
]


@pytest.mark.parametrize(("reply", "words"), REFUSALS, ids=lambda value: str(value)[:9])
def test_refused_hints_cost_one_line(
    reply: Reply,
    words: str,
    server: StandIn,
    endpoint: lang.SymphonyEndpoint,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def answer(asked: Asked) -> Reply | None:
        return reply if asked.path == "/symphony/advise" else None

    server.answer = answer
    with caplog.at_level(logging.INFO, "symphony_sglang"):
        until(lambda: one_turn.run(backend=endpoint).error() or endpoint.adviser.stats().failures)
        for _ in range(5):
            assert one_turn.run(backend=endpoint)["said"] == " done"
        endpoint.adviser.flush()
    (line,) = [record.message for record in caplog.records]
    assert words in line
    assert sum(asked.path == "/symphony/advise" for asked in server.asked) <= 2


def test_full_queue_drops_events_and_blocks_nobody(server: StandIn) -> None:
    settings = AdviserSettings(queue_max=10, request_seconds_max=5.0)
    endpoint = lang.SymphonyEndpoint(server.url, settings=settings)
    server.advise_gate.clear()
    states = one_turn.run_batch([{} for _ in range(60)], backend=endpoint, num_threads=8)
    assert all(state["said"] == " done" for state in states)
    assert endpoint.adviser.stats().dropped > 0
    server.advise_gate.set()
    endpoint.shutdown()


def test_text_that_no_json_carries_costs_a_hint_and_no_more(
    server: StandIn, endpoint: lang.SymphonyEndpoint
) -> None:
    @sgl.function
    def half_a_pair(s: Any) -> None:
        s += "\ud800"
        s.sync()
        lang.advise(s)
        endpoint.adviser.flush()

    half_a_pair.run(backend=endpoint)
    assert endpoint.adviser.stats().failures == 1
    until(lambda: one_turn.run(backend=endpoint).error() or server.hints())


def test_last_program_is_released_at_shutdown(server: StandIn) -> None:
    settings = AdviserSettings(idle_seconds=60.0)
    endpoint = lang.SymphonyEndpoint(server.url, settings=settings)
    state = one_turn.run(backend=endpoint)
    state.sync()
    until(lambda: state.stream_executor.is_finished)
    endpoint.shutdown()
    assert [kind for kind, _ in server.hints()] == ["release"]


def test_shutdown_leaves_no_thread(server: StandIn) -> None:
    endpoint = lang.SymphonyEndpoint(server.url)
    one_turn.run(backend=endpoint).sync()
    until(lambda: any(t.name == "symphony-adviser" for t in threading.enumerate()))
    endpoint.shutdown()
    assert not any(t.name == "symphony-adviser" for t in threading.enumerate())
    assert one_turn.run(backend=endpoint)["said"] == " done"
