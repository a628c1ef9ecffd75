"""Advisories on a real server: what a hint changes, and all that it must not."""

from __future__ import annotations

import concurrent.futures
import random
import time
from typing import Any

import pytest
from test_levels import overflow

from conftest import DEVICE_TOKENS, VOCAB, Server, cached

pytestmark = pytest.mark.server

SESSION_TOKENS = 800


def prompt(seed: int, length: int = SESSION_TOKENS) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, VOCAB) for _ in range(length)]


def advise(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.call("POST", "/symphony/advise", body)
    assert answer.status == 202, answer
    (receipt,) = answer.body["receipts"]
    return receipt


def receipt_in(server: Server, advisory_id: str, *states: str) -> dict[str, Any]:
    """The receipt once it is in one of `states`."""
    for _ in range(200):
        answer = server.call("GET", f"/symphony/advisories/{advisory_id}")
        assert answer.status == 200, answer
        if answer.body["state"] in states:
            return answer.body
        time.sleep(0.02)
    raise AssertionError(f"not {states} in 4 s: {answer.body}")


def seat_session(server: Server, session_id: str, seed: int) -> list[int]:
    """A session whose first turn is over and whose KV has left the device."""
    ids = prompt(seed)
    server.greedy_one(ids, 4, session_id=session_id)
    overflow(server, seed + 1000)
    return ids


@pytest.fixture(autouse=True)
def empty_cache(worker: Server) -> None:
    worker.flush()


def test_advised_session_is_on_the_device_when_its_turn_comes(worker: Server) -> None:
    ids = seat_session(worker, "a1", 1)
    turn = [*ids, 301, 302, 303]
    receipt = advise(worker, session_id="a1")
    assert (receipt["status"], receipt["state"]) == ("accepted", "queued")
    ready = receipt_in(worker, receipt["advisory_id"], "ready")
    assert ready["tokens"]["device"] == SESSION_TOKENS
    assert ready["bytes"]["host_to_device"] > 0
    advised = worker.greedy_one(turn, session_id="a1")
    assert cached(advised) == {"device": SESSION_TOKENS, "host": 0, "storage": 0}
    assert receipt_in(worker, receipt["advisory_id"], "used")["reason"] == ""

    worker.flush()
    assert worker.greedy_one(turn)["output_ids"] == advised["output_ids"]


def test_advice_by_content_needs_no_session(worker: Server) -> None:
    ids = prompt(2)
    worker.greedy_one(ids, 1)
    overflow(worker, 2002)
    receipt = advise(worker, input_ids=ids)
    ready = receipt_in(worker, receipt["advisory_id"], "ready")
    # The last page is computed again whatever happens, so it is not promised.
    assert ready["tokens"]["device"] == SESSION_TOKENS - 16
    assert cached(worker.greedy_one([*ids, 301], 1))["device"] >= SESSION_TOKENS - 16
    assert receipt_in(worker, receipt["advisory_id"], "used")


def test_advice_by_messages_matches_the_chat_route(worker: Server) -> None:
    messages = [{"role": "user", "content": "Explain " + " ".join(f"item{i}" for i in range(200))}]
    chat = {"messages": messages, "max_tokens": 4, "temperature": 0, "model": str(worker.model)}
    assert worker.call("POST", "/v1/chat/completions", chat).status == 200
    overflow(worker, 2003)
    receipt = advise(worker, messages=messages)
    ready = receipt_in(worker, receipt["advisory_id"], "ready")
    answer = worker.call("POST", "/v1/chat/completions", chat).body
    details = answer["usage"]["prompt_tokens_details"]
    assert details["cached_tokens"] >= ready["tokens"]["device"] > 0
    assert receipt_in(worker, receipt["advisory_id"], "used")


def test_unknown_session_is_missing_and_not_an_error(worker: Server) -> None:
    receipt = advise(worker, session_id="nobody")
    assert (receipt["status"], receipt["reason"]) == ("missing", "unknown_session")


def test_second_hint_for_the_same_session_is_the_same_advisory(worker: Server) -> None:
    seat_session(worker, "a4", 4)
    first = advise(worker, session_id="a4")
    second = advise(worker, session_id="a4", expires_in_s=30)
    assert second["status"] == "duplicate"
    assert second["advisory_id"] == first["advisory_id"]


def test_cancelled_and_expired_advisories_protect_nothing(worker: Server) -> None:
    seat_session(worker, "a5", 5)
    first = advise(worker, session_id="a5")
    receipt_in(worker, first["advisory_id"], "ready")
    assert worker.residency()["levels"]["device"]["protected_tokens"] == SESSION_TOKENS
    answer = worker.call("DELETE", f"/symphony/advisories/{first['advisory_id']}")
    assert (answer.status, answer.body["state"]) == (200, "cancelled")
    assert worker.residency()["levels"]["device"]["protected_tokens"] == 0
    second = advise(worker, session_id="a5", expires_in_s=0.2)
    assert receipt_in(worker, second["advisory_id"], "expired", "wasted")
    assert worker.residency()["levels"]["device"]["protected_tokens"] == 0


def test_session_view_says_where_its_tokens_are(worker: Server) -> None:
    seat_session(worker, "a6", 6)
    view = worker.call("GET", "/symphony/sessions/a6").body
    assert view["tokens"]["device"] == 0
    assert view["tokens"]["host"] == view["tokens"]["total"] >= SESSION_TOKENS
    assert view["turns"] == 1
    assert worker.call("DELETE", "/symphony/sessions/a6").status == 200
    assert worker.call("GET", "/symphony/sessions/a6").status == 404
    assert worker.call("DELETE", "/symphony/sessions/a6").status == 404
    assert advise(worker, session_id="a6")["status"] == "missing"


def test_flush_ends_advisories_and_leaves_no_lock(worker: Server) -> None:
    seat_session(worker, "a7", 7)
    receipt = advise(worker, session_id="a7")
    receipt_in(worker, receipt["advisory_id"], "ready")
    worker.flush()
    ended = receipt_in(worker, receipt["advisory_id"], "failed")
    assert ended["reason"] == "cache_flushed"
    device = worker.residency()["levels"]["device"]
    assert device["used_tokens"] == device["protected_tokens"] == 0


def test_prefix_beyond_the_budget_is_clipped(worker: Server) -> None:
    long = prompt(8, 5000)
    worker.greedy_one(long, 1, session_id="a8")
    overflow(worker, 2008)
    receipt = advise(worker, session_id="a8")
    assert receipt["status"] == "clipped"
    assert receipt["reason"] == "larger_than_protect_budget"
    ready = receipt_in(worker, receipt["advisory_id"], "ready")
    assert 0 < ready["tokens"]["goal"] <= 0.3 * DEVICE_TOKENS


def test_advising_everything_starves_nobody(worker: Server) -> None:
    """Every session is advised again and again while requests fill the whole device level."""
    sessions = [f"storm{i}" for i in range(6)]
    for index, session_id in enumerate(sessions):
        worker.greedy_one(prompt(100 + index), 1, session_id=session_id)
    overflow(worker, 2009)
    done = False

    def storm() -> int:
        count = 0
        while not done:
            advise(worker, session_id=sessions[count % len(sessions)], expires_in_s=60)
            count += 1
            time.sleep(0.01)
        return count

    with concurrent.futures.ThreadPoolExecutor(9) as pool:
        storming = pool.submit(storm)
        # Each of these needs most of the device level to itself.
        big = [pool.submit(worker.greedy_one, prompt(200 + i, 6000), 8) for i in range(4)]
        small = [pool.submit(worker.greedy_one, prompt(300 + i, 500), 8) for i in range(12)]
        try:
            for future in (*big, *small):
                answer = future.result(timeout=240)
                assert answer["meta_info"]["completion_tokens"] == 8
        finally:
            done = True
        assert storming.result(timeout=30) > 10
    worker.flush()
    device = worker.residency()["levels"]["device"]
    assert device["used_tokens"] == device["protected_tokens"] == 0


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "session_id"),
        ({"session_id": "a", "input_ids": [1]}, "input_ids"),
        ({"session_id": "a", "expected_in_s": -1}, "expected_in_s"),
        ({"session_id": "a", "expires_in_s": True}, "expires_in_s"),
        ({"session_id": "a", "target": "moon"}, "target"),
        ({"session_id": "a", "colour": 1}, "colour"),
        ({"session_id": ""}, "session_id"),
        ({"input_ids": [10**9]}, "input_ids"),
        ({"input_ids": [-1]}, "input_ids[0]"),
        ({"protocol_version": "9", "actions": []}, "protocol_version"),
        ([1, 2], "body"),
    ],
)
def test_malformed_hint_is_a_400_that_names_the_field(
    worker: Server, body: Any, field: str
) -> None:
    answer = worker.call("POST", "/symphony/advise", body)
    assert answer.status == 400, answer
    assert field in str(answer.body)


def test_body_that_is_no_json_and_body_that_is_too_large(worker: Server) -> None:
    assert worker.call("POST", "/symphony/advise", raw=b"{").status == 400
    huge = b'{"session_id": "a", "text": "' + b"x" * (17 << 20) + b'"}'
    assert worker.call("POST", "/symphony/advise", raw=huge).status == 413


def test_envelope_answers_each_action(worker: Server) -> None:
    answer = worker.call(
        "POST",
        "/symphony/advise",
        {
            "protocol_version": "0.1",
            "message_id": "m1",
            "actions": [
                {"action_id": "x", "action_type": "prefetch", "payload": {"session_id": "none"}},
                {"action_id": "y", "action_type": "vllm.set_priority", "payload": {}},
                {"action_id": "z", "action_type": "cancel", "payload": {"advisory_id": "no"}},
            ],
        },
    )
    assert answer.status == 202
    assert answer.body["message_id"] == "m1"
    got = [(receipt["action_id"], receipt["status"]) for receipt in answer.body["receipts"]]
    assert got == [("x", "missing"), ("y", "unsupported"), ("z", "missing")]


def test_demoted_session_leaves_the_device_and_keeps_its_host_copy(worker: Server) -> None:
    ids = prompt(9)
    first = worker.greedy_one(ids, 4, session_id="a9")
    action = {"action_id": "d", "action_type": "demote", "payload": {"session_id": "a9"}}
    body = {"protocol_version": "0.1", "message_id": "m", "actions": [action]}
    for _ in range(100):
        (receipt,) = worker.call("POST", "/symphony/advise", body).body["receipts"]
        if receipt["reason"] != "in_use":
            break
        time.sleep(0.02)  # the copy to host has not been taken note of yet
    assert (receipt["status"], receipt["state"]) == ("accepted", "ready")
    assert receipt["tokens"]["demoted"] >= SESSION_TOKENS
    tokens = worker.call("GET", "/symphony/sessions/a9").body["tokens"]
    assert (tokens["device"], tokens["missing"]) == (0, 0)
    again = worker.greedy_one(ids, 4)
    assert cached(again)["host"] >= SESSION_TOKENS - 16
    assert again["output_ids"] == first["output_ids"]


def test_unknown_advisory_is_404(worker: Server) -> None:
    assert worker.call("GET", "/symphony/advisories/adv-none").status == 404
    assert worker.call("DELETE", "/symphony/advisories/adv-none").status == 404


@pytest.mark.parametrize(
    "header", ["X-Session-ID", "x-smg-routing-key", "x-claude-code-session-id", "session-id"]
)
def test_session_header_stands_in_for_the_body(worker: Server, header: str) -> None:
    session_id = f"by-{header}"
    chat = {"messages": [{"role": "user", "content": "hello " * 40}], "max_tokens": 2}
    body = {**chat, "model": str(worker.model), "temperature": 0}
    answer = worker.call("POST", "/v1/chat/completions", body, headers={header: session_id})
    assert answer.status == 200, answer
    assert worker.call("GET", f"/symphony/sessions/{session_id}").body["turns"] == 1


def envelope(**payload: Any) -> dict[str, Any]:
    action = {"action_id": "next", "action_type": "prefetch", "action_version": "1"}
    return {
        "protocol_version": "0.1",
        "message_id": "ride",
        "actions": [{**action, "payload": payload}],
    }


def live_advisories(server: Server, session_id: str) -> list[dict[str, Any]]:
    for _ in range(100):
        view = server.call("GET", f"/symphony/sessions/{session_id}")
        if view.status == 200 and view.body["advisories"]:
            return list(view.body["advisories"])
        time.sleep(0.02)
    return []


@pytest.mark.parametrize("stream", [False, True])
def test_hint_riding_on_generate_is_about_the_turn_after(worker: Server, stream: bool) -> None:
    session_id = f"ride-{stream}"
    body = {
        "input_ids": prompt(40 + stream),
        "session_id": session_id,
        "stream": stream,
        "sampling_params": {"max_new_tokens": 4, "temperature": 0},
        "kv_hints": envelope(expires_in_s=30),
    }
    assert worker.call("POST", "/generate", body).status == 200
    (advisory,) = live_advisories(worker, session_id)
    assert advisory["action_id"] == "next"


def test_hint_riding_on_a_chat_request(worker: Server) -> None:
    body = {
        "model": str(worker.model),
        "messages": [{"role": "user", "content": "hello " * 60}],
        "max_tokens": 2,
        "session_id": "ride-chat",
        "kv_hints": envelope(expires_in_s=30),
    }
    assert worker.call("POST", "/v1/chat/completions", body).status == 200
    assert len(live_advisories(worker, "ride-chat")) == 1


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"input_ids": [300, 301]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ],
)
def test_malformed_riding_hint_is_a_400(worker: Server, path: str, body: dict[str, Any]) -> None:
    bad = {**body, "model": str(worker.model), "kv_hints": envelope(expires_in_s=-1)}
    answer = worker.call("POST", path, {**bad, "session_id": "bad-ride"})
    assert answer.status == 400, answer
    assert "expires_in_s" in str(answer.body)


def test_riding_hint_without_any_session_is_a_400(worker: Server) -> None:
    body = {"input_ids": [300, 301], "kv_hints": envelope()}
    answer = worker.call("POST", "/generate", body)
    assert answer.status == 400
    assert "session_id" in str(answer.body)
