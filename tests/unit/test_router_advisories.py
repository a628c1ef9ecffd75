"""Hints through the router: what a caller may send, and what becomes of one whose turn went
elsewhere."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiohttp import web

from router_world import FakeWorker, World, world
from symphony_sglang.router.advisories import Advisory, AdvisoryMemory
from symphony_sglang.router.registry import worker_id_of

TOKENS = 160


class Desk:
    """What workers answer to hints: each is accepted, and goes on until somebody ends it."""

    def __init__(self) -> None:
        self.states: dict[str, str] = {}
        self.cancelled: list[tuple[str, str]] = []  # worker, advisory

    async def __call__(self, worker: FakeWorker, request: web.Request) -> web.StreamResponse:
        if request.path == "/symphony/advise":
            session = (await request.json())["session_id"]
            name = f"a{len(self.states)}"
            self.states[name] = "queued"
            receipt = {
                "advisory_id": name, "action_id": None, "status": "accepted", "reason": None,
                "session_id": session, "state": "queued", "tokens": {"total": TOKENS},
            }  # fmt: skip
            return web.json_response({"message_id": "x", "receipts": [receipt]}, status=202)
        if request.path.startswith("/symphony/advisories/"):
            name = request.path.rpartition("/")[2]
            if request.method == "DELETE":
                self.states[name] = "cancelled"
                self.cancelled.append((worker.name, name))
            return web.json_response({"advisory_id": name, "state": self.states[name]})
        return web.json_response({"worker": worker.name})


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 30))


def settle(made: World, session: str, name: str) -> str:
    """As if the worker's feed had told of a turn of `session`; the worker's id."""
    [url] = [worker.url for worker in made.workers if worker.name == name]
    worker_id = worker_id_of(url)
    made.service.placement.index.session_turn(worker_id, session, TOKENS, None, 1, 1)
    return worker_id


async def advise(made: World, session: str = "s", **options: Any) -> tuple[int, Any, dict]:
    return await made.call("POST", "/symphony/advise", {"session_id": session}, **options)


@pytest.mark.parametrize("key", ["", "worker-key"])
def test_a_hint_whose_turn_went_to_another_worker_is_cancelled_where_it_was(key: str) -> None:
    async def scenario() -> None:
        desk = Desk()
        async with world(2, behaviour=desk, policy="symphony", worker_api_key=key) as made:
            home = settle(made, "s", "w0")
            assert (await advise(made))[1]["receipts"][0]["worker"] == home
            assert [p.worker_id for p in made.service.desk.memory.places("s", 0.0)] == [home]
            headers = {"X-SMG-Target-Worker": "1"}
            status, answer = await made.generate({"text": "x", "session_id": "s"}, headers=headers)
            assert (status, answer["worker"]) == (200, "w1")
            await made.until(lambda: desk.cancelled == [("w0", "a0")])
            assert made.service.desk.memory.places("s", 0.0) == ()
            if key:
                [asked] = [r for r in made.workers[0].requests if r[0] == "DELETE"]
                assert asked[2]["authorization"] == f"Bearer {key}"

    run(scenario)


def test_a_hint_whose_turn_came_where_it_was_sent_is_left_alone() -> None:
    async def scenario() -> None:
        desk = Desk()
        async with world(2, behaviour=desk, policy="symphony") as made:
            settle(made, "s", "w0")
            await advise(made)
            for _ in range(2):
                assert (await made.generate({"text": "x", "session_id": "s"}))[1]["worker"] == "w0"
            # A later turn that is served elsewhere: the first one has used the hint.
            headers = {"X-SMG-Target-Worker": "1"}
            await made.generate({"text": "x", "session_id": "s"}, headers=headers)
            # A failed turn is no turn, and another session's none of ours.
            await advise(made)
            await made.generate({"text": "x", "session_id": "t"}, headers=headers)
            await asyncio.sleep(0.1)
            assert desk.cancelled == []

    run(scenario)


def test_only_what_was_sent_before_the_turn_prepared_it() -> None:
    memory = AdvisoryMemory(advisories_max=3)
    for name, domain, sent in (("old", "a", 1.0), ("kept", "b", 2.0), ("late", "a", 9.0)):
        memory.remember(Advisory(name, domain, "s", 100.0, sent, prepares=True))
    memory.check()
    assert [one.advisory_id for one in memory.taken("s", "b", 5.0)] == ["old"]
    assert memory.taken("s", "b", 5.0) == []
    memory.remember(Advisory("late", "c", "s", 100.0, 9.5, prepares=True))  # renewed elsewhere
    memory.check()
    assert [one.domain_id for one in memory.taken("s", "b", 20.0)] == ["c"]
    for number in range(5):
        memory.remember(Advisory(f"n{number}", "a", "s", 100.0, 0.0, prepares=number % 2 == 0))
        memory.check()
    assert {one.advisory_id for one in memory.taken("s", "b", 20.0)} == {"n2", "n4"}
    assert memory.taken("unknown", "b", 20.0) == []


def test_each_caller_has_a_rate_of_its_own() -> None:
    async def scenario() -> None:
        async with world(1, behaviour=Desk(), policy="symphony", advise_rate=0.5) as made:
            mine = {"headers": {"Authorization": "Bearer mine"}}
            assert (await advise(made, **mine))[0] == 202
            status, answer, headers = await advise(made, **mine)
            assert (status, answer["error"]["code"]) == (429, "advisory_budget")
            assert "rate" in answer["error"]["message"]
            assert 1 <= int(headers["retry-after"]) <= 2
            assert (await advise(made, headers={"Authorization": "Bearer other"}))[0] == 202
            assert made.workers[0].served("/symphony/advise") == 2
            # More at once than can ever be: waiting would not help.
            action = {"action_type": "kv.prefetch", "payload": {"session_id": "s"}}
            actions = [{**action, "action_id": str(number)} for number in range(2)]
            two = {"protocol_version": "0.1", "message_id": "m", "actions": actions}
            status, answer, headers = await made.call("POST", "/symphony/advise", two)
            assert (status, answer["error"]["code"]) == (429, "advisory_budget")
            assert "expected at most 1" in answer["error"]["message"]
            assert "retry-after" not in headers

    run(scenario)


def test_tokens_in_flight_are_limited_until_their_advisories_end() -> None:
    async def scenario() -> None:
        desk = Desk()
        async with world(1, behaviour=desk, policy="symphony", advise_tokens=TOKENS + 1) as made:
            for session in ("a", "b"):
                assert (await advise(made, session))[0] == 202
            status, answer, _headers = await advise(made, "c")
            assert (status, answer["error"]["code"]) == (429, "advisory_budget")
            assert "tokens_in_flight" in answer["error"]["message"]
            # One ends by itself, and the next who is about to be refused makes the router ask.
            desk.states["a0"] = "used"
            await asyncio.sleep(0.15)
            assert (await advise(made, "c"))[0] == 202
            assert (await advise(made, "d"))[0] == 429
            # And cancelling one gives its tokens back at once.
            assert (await made.call("DELETE", "/symphony/advisories/a1"))[0] == 200
            assert (await advise(made, "d"))[0] == 202

    run(scenario)
