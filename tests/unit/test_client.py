"""The typed client against a real HTTP server, sync and async."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from symphony_stand_in import Asked, Reply, StandIn, receipt, running

from symphony_sglang.client import (
    AsyncSymphonyClient,
    SymphonyClient,
    bind,
    protocol,
    session_options,
)
from symphony_sglang.errors import (
    ConfigError,
    NotAuthorizedError,
    NotKnownError,
    RequestRefusedError,
    ServerUnavailableError,
    TooManyHintsError,
)

MOVE = {"move_id": "m1", "session_id": "s", "from": "w1", "to": "w2", "state": "copying"}
LEVEL = {"total_tokens": 100, "used_tokens": 25, "protected_tokens": 5, "state": "ok"}


@pytest.fixture
def server() -> Iterator[StandIn]:
    with running() as found:
        yield found


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


def call_both(server: StandIn, name: str, *args: Any, **kwargs: Any) -> list[Any]:
    """The same call on both clients: both answers, or both errors, in order."""
    results: list[Any] = []

    async def asynchronous() -> Any:
        async with AsyncSymphonyClient(server.url, api_key="k") as client:
            return await getattr(client, name)(*args, **kwargs)

    with SymphonyClient(server.url, api_key="k") as client:
        for run in (
            lambda: getattr(client, name)(*args, **kwargs),
            lambda: asyncio.run(asynchronous()),
        ):
            try:
                results.append(run())
            except Exception as error:  # noqa: BLE001 - the test looks at it
                results.append(error)
    return results


def last_two(server: StandIn) -> list[Asked]:
    first, second = server.asked[-2:]
    assert (first.method, first.path, first.body) == (second.method, second.path, second.body)
    assert first.headers["authorization"] == second.headers["authorization"] == "Bearer k"
    return [first, second]


def test_both_clients_have_the_same_methods() -> None:
    def shape(kind: type) -> dict[str, Any]:
        return {
            name: list(inspect.signature(found).parameters)
            for name, found in inspect.getmembers(kind, inspect.isfunction)
            if not name.startswith("_")
        }

    assert shape(SymphonyClient) == shape(AsyncSymphonyClient)


def test_advise_sends_what_is_given_and_no_more(server: StandIn) -> None:
    for answer in call_both(server, "advise", "s1", expected_in_s=2.0, priority=3):
        assert (answer.advisory_id, answer.status, answer.live) == ("adv-1", "accepted", True)
        assert answer.timeline == [("queued", 0.0)]
        assert answer.lead_seconds is None
    body = {"session_id": "s1", "expected_in_s": 2.0, "priority": 3}
    assert last_two(server)[0].body == body
    call_both(server, "advise", input_ids=(1, 2), extra_key="x", target="host")
    assert last_two(server)[0].body == {"input_ids": [1, 2], "extra_key": "x", "target": "host"}


def test_retain_is_an_envelope_of_one_action(server: StandIn) -> None:
    call_both(server, "retain", "s1", 30.0)
    for asked in server.asked:
        (action,) = asked.body["actions"]
        assert action["action_type"] == "retain"
        assert action["payload"] == {"session_id": "s1", "expires_in_s": 30.0}
        assert action["action_id"]
        assert asked.body["protocol_version"] == "0.1"


@pytest.mark.parametrize("name", ["a/b", "..", "x y?z#", "naïve 東京", "%2F"])
def test_any_session_id_arrives_whole(server: StandIn, name: str) -> None:
    view = {"session_id": name, "tokens": {"total": 5, "host": 5}, "turns": 2, "moves": [MOVE]}
    server.answer = lambda asked: Reply(200, view) if asked.method == "GET" else None
    for found in call_both(server, "session_view", name):
        assert (found.session_id, found.tokens.host, found.turns) == (name, 5, 2)
        assert (found.moves[0].source, found.moves[0].destination) == ("w1", "w2")
    assert server.asked[-1].path == f"/symphony/sessions/{name}"
    call_both(server, "release", name)
    assert server.asked[-1].path == f"/symphony/sessions/{name}"


def test_worker_answers_for_itself_and_a_router_for_all(server: StandIn) -> None:
    worker = {"page_size": 16, "levels": {"device": LEVEL, "host": None}, "counters": {}}
    bodies = [
        (worker, [""]),
        ({"workers": [{**worker, "worker": "w1"}, {**worker, "worker": "w2"}]}, ["w1", "w2"]),
        ({"workers": {"w1": worker}, "moves": [MOVE]}, ["w1"]),
    ]
    for body, names in bodies:
        server.answer = lambda asked, body=body: Reply(200, body)
        for found in call_both(server, "residency"):
            assert [entry.worker for entry in found.workers] == names
            device = found.workers[0].levels["device"]
            assert device.used_share == 0.25
            assert found.workers[0].levels["host"] is None
            assert found.workers[0].advisories == {}
            assert [move.state for move in found.moves] == ["copying"] * len(body.get("moves", []))


def test_level_without_tokens_is_counted_in_bytes(server: StandIn) -> None:
    levels = {"nvme": {"total_bytes": 10, "used_bytes": 5}, "host": {}}
    server.answer = lambda asked: Reply(200, {"levels": levels})
    for found in call_both(server, "residency"):
        assert found.workers[0].levels["nvme"].used_share == 0.5
        assert found.workers[0].levels["host"].used_share == 0.0


def test_moves_go_to_the_router(server: StandIn) -> None:
    server.answer = lambda asked: Reply(202, MOVE)
    for found in call_both(server, "migrate", "s", "w2"):
        assert found.move_id == "m1"
    assert last_two(server)[0].body == {"session_id": "s", "to": "w2"}
    for found in call_both(server, "move", "m1"):
        assert found.state == "copying"


REFUSALS = [
    (400, {"detail": "text: 5; expected non-empty text"}, RequestRefusedError, "non-empty text"),
    (401, {"error": "Unauthorized"}, NotAuthorizedError, "Unauthorized"),
    (403, {"error": {"message": "Forbidden"}}, NotAuthorizedError, "Forbidden"),
    (404, {"detail": "advisory 'a' is not known"}, NotKnownError, "not known"),
    (409, {"detail": "the host level is off"}, RequestRefusedError, "host level"),
    (413, {"detail": "too long"}, RequestRefusedError, "too long"),
    (500, b"<html>oops</html>", ServerUnavailableError, "oops"),
    (503, {"message": "busy"}, ServerUnavailableError, "busy"),
    (307, b"", RequestRefusedError, "307"),
]


@pytest.mark.parametrize(("status", "body", "kind", "words"), REFUSALS)
def test_refusal_is_an_error_of_its_kind_in_the_servers_words(
    server: StandIn, status: int, body: Any, kind: type[Exception], words: str
) -> None:
    server.answer = lambda asked: Reply(status, body)
    for error in call_both(server, "receipt", "a"):
        assert type(error) is kind
        assert words in str(error)
        assert getattr(error, "status", status) == status


@pytest.mark.parametrize(("header", "seconds"), [({"Retry-After": "7"}, 7.0), ({}, 1.0)])
def test_budget_says_when_to_come_again(
    server: StandIn, header: dict[str, str], seconds: float
) -> None:
    server.answer = lambda asked: Reply(429, {"detail": "over the budget"}, header)
    for error in call_both(server, "advise", "s"):
        assert isinstance(error, TooManyHintsError)
        assert error.retry_after_seconds == seconds


@pytest.mark.parametrize("body", [b"", b"[1]", b"{", b'{"status": 5}', b"\xff"])
def test_answer_that_is_none_is_the_servers_fault(server: StandIn, body: bytes) -> None:
    server.answer = lambda asked: Reply(200, body)
    for name, args in (("receipt", ("a",)), ("residency", ())):
        if name == "residency" and body == b'{"status": 5}':
            continue
        for error in call_both(server, name, *args):
            assert isinstance(error, ServerUnavailableError)


def test_no_server_is_named_with_its_address() -> None:
    with running() as server:
        url = server.url
    with (
        SymphonyClient(url, timeout_seconds=2) as client,
        pytest.raises(ServerUnavailableError, match=url),
    ):
        client.advise("s")
    with pytest.raises(ConfigError, match="localhost:30000"):
        SymphonyClient("localhost:30000")


def test_typing_sends_at_the_first_key_and_renews_at_half_its_life(server: StandIn) -> None:
    clock = Clock()
    with SymphonyClient(server.url, clock=clock) as client:
        session = client.session("s1", expires_in_s=10)
        for clock.now in (0.0, 1.0, 4.9, 5.0, 6.0, 9.9, 10.0):
            session.typing()
    assert [asked.body["expires_in_s"] for asked in server.asked] == [10, 10, 10]


def test_block_withdraws_a_hint_that_no_turn_followed(server: StandIn) -> None:
    with SymphonyClient(server.url) as client:
        with client.session("s1") as session:
            session.typing()
        assert [asked.method for asked in server.asked] == ["POST", "DELETE"]
        with client.session("s1", release=True) as session:
            session.typing()
            assert session.sent() is not None
            assert session.cleared() is None
    assert [asked.method for asked in server.asked[2:]] == ["POST", "DELETE"]
    assert server.asked[-1].path == "/symphony/sessions/s1"


def test_block_shows_its_own_error_and_not_that_of_leaving(server: StandIn) -> None:
    def refuse(asked: Asked) -> Reply | None:
        return Reply(500, {"error": "down"}) if asked.method == "DELETE" else None

    server.answer = refuse

    def stumble(client: SymphonyClient) -> None:
        with client.session("s1") as session:
            session.typing()
            raise KeyError("mine")

    with SymphonyClient(server.url) as client, pytest.raises(KeyError, match="mine"):
        stumble(client)
    with (
        SymphonyClient(server.url) as client,
        pytest.raises(ServerUnavailableError, match="down"),
        client.session("s1") as session,
    ):
        session.typing()


def test_missing_session_is_not_withdrawn(server: StandIn) -> None:
    missing = receipt(status="missing", state="failed")
    server.answer = lambda asked: Reply(202, {"message_id": "m", "receipts": [missing]})
    with SymphonyClient(server.url) as client, client.session("s1") as session:
        assert session.typing().status == "missing"
    assert len(server.asked) == 1


def test_openai_calls_carry_the_session(server: StandIn) -> None:
    chat = {
        "id": "1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [],
    }
    server.answer = lambda asked: Reply(200, chat, {"Content-Type": "application/json"})
    plain = openai.OpenAI(base_url=f"{server.url}/v1", api_key="k")
    messages: Any = [{"role": "user", "content": "hi"}]
    with plain:
        options = session_options("s1", returns_in_s=2.0, retain_s=30)
        plain.chat.completions.create(model="m", messages=messages, **options)
        bind(plain, "s2").chat.completions.create(model="m", messages=messages)
    first, second = server.asked
    assert first.body["session_id"] == "s1"
    assert first.headers["x-session-id"] == "s1"
    kinds = [action["action_type"] for action in first.body["kv_hints"]["actions"]]
    assert kinds == ["prefetch", "retain"]
    assert second.headers["x-session-id"] == "s2"
    assert "kv_hints" not in session_options("s1")["extra_body"]


def test_hints_on_requests_are_read_by_the_server() -> None:
    """What the wrapper writes is what the server's own parser takes."""
    from symphony_sglang.core import hints

    options = session_options("s1", returns_in_s=2.0, expires_in_s=9.0, retain_s=30)
    envelope = options["extra_body"]["kv_hints"]
    for action in envelope["actions"]:
        action["payload"]["session_id"] = "s1"
    prefetch, retain = (hint.action for hint in hints.parse_envelope(envelope).hints)
    assert (prefetch.expected_in_seconds, prefetch.expires_in_seconds) == (2.0, 9.0)
    assert retain.expires_in_seconds == 30
    assert protocol.PROTOCOL_VERSION == hints.PROTOCOL_VERSION
