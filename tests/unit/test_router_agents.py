"""A sub-agent behind the router: its parent, which another worker serves, is advised there."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web

from router_world import FakeWorker, World, world
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.router import agents
from symphony_sglang.router.registry import worker_id_of
from symphony_sglang.router.sessions import session_key

PARENT, CHILD = "main", "main/1"
AGENT = {"x-claude-code-session-id": PARENT, "x-claude-code-agent-id": "1"}
FINAL = {"x-dynamo-session-final": "1"}


async def behaviour(worker: FakeWorker, request: web.Request) -> web.StreamResponse:
    if request.path != "/symphony/advise":
        return web.json_response({"worker": worker.name})
    receipts = [
        {
            "advisory_id": f"adv-{worker.name}",
            "action_id": action["action_id"],
            "status": "accepted",
            "state": "queued",
            "tokens": {"total": 160},
        }
        for action in (await request.json())["actions"]
    ]
    return web.json_response({"message_id": "x", "receipts": receipts}, status=202)


def lives(made: World, session_id: str, number: int) -> None:
    """As if the feed of that worker had told of a turn of the session."""
    domain_id = worker_id_of(made.workers[number].url)
    made.service.placement.index.session_turn(domain_id, session_id, 160, None, 1, 1)


async def ask(made: World, number: int, headers: dict[str, str], **body: Any) -> None:
    """A request that worker `number` serves."""
    target = {"x-smg-target-worker": made.workers[number].url}
    status, answer = await made.generate({"text": "hi", **body}, headers={**headers, **target})
    assert (status, answer) == (200, {"worker": made.workers[number].name})


def hints(worker: FakeWorker) -> list[dict[str, Any]]:
    """The payloads of the hints that a worker was sent."""
    bodies = [json.loads(body) for _m, path, _h, body in worker.requests if "advise" in path]
    actions = [action for body in bodies for action in body["actions"]]
    assert all(action["action_id"] == "implicit:parent" for action in actions)
    return [action["payload"] for action in actions]


def run(scenario, count: int = 2, **settings: Any) -> None:  # type: ignore[no-untyped-def]
    async def main() -> None:
        async with world(count, behaviour=behaviour, policy="symphony", **settings) as made:
            await scenario(made)

    asyncio.run(asyncio.wait_for(main(), 30))


def test_start_of_a_sub_agent_advises_its_parent_at_the_parents_worker() -> None:
    async def scenario(made: World) -> None:
        lives(made, PARENT, 0)
        await ask(made, 1, {**AGENT, "authorization": "Bearer key"})
        await made.until(lambda: len(hints(made.workers[0])) == 1)
        [payload] = hints(made.workers[0])
        assert (payload["session_id"], payload["target"]) == (PARENT, "host")
        # Charged to the caller, whose key it is.
        [sent] = [h for _m, path, h, _b in made.workers[0].requests if "advise" in path]
        assert sent["authorization"] == "Bearer key"
        # Its other requests say nothing new, until the hint is half over.
        for _ in range(3):
            await ask(made, 1, AGENT)
        await asyncio.sleep(0.05)
        assert len(hints(made.workers[0])) == 1
        assert hints(made.workers[1]) == []

    run(scenario)


def test_last_request_of_a_sub_agent_prepares_the_parents_turn() -> None:
    async def scenario(made: World) -> None:
        lives(made, PARENT, 0)
        await ask(made, 1, {**AGENT, **FINAL})
        await made.until(lambda: len(hints(made.workers[0])) == 1)
        [payload] = hints(made.workers[0])
        assert (payload["target"], payload["expected_in_s"]) == ("device", 0.0)
        # The router remembers where it had the parent prepared.
        await made.until(lambda: bool(made.service.desk.memory.places(PARENT, 0.0)))
        [place] = made.service.desk.memory.places(PARENT, 0.0)
        assert place.worker_id == worker_id_of(made.workers[0].url)

    run(scenario)


@pytest.mark.parametrize("headers", [AGENT, {"x-session-id": "alone"}])
def test_nothing_is_sent_where_it_is_not_needed(headers: dict[str, str]) -> None:
    async def scenario(made: World) -> None:
        # The child's own worker serves the parent too, or nobody knows of a parent.
        if headers is AGENT:
            lives(made, PARENT, 1)
        await ask(made, 1, headers)
        await asyncio.sleep(0.05)
        assert hints(made.workers[0]) == hints(made.workers[1]) == []

    run(scenario)


def test_parent_is_in_the_namespace_of_its_child() -> None:
    async def scenario(made: World) -> None:
        lives(made, PARENT, 1)  # a namesake without a salt
        await ask(made, 0, AGENT, cache_salt="tenant")
        await asyncio.sleep(0.05)
        assert hints(made.workers[1]) == []
        lives(made, session_key(PARENT, Namespace(None, "tenant")), 1)
        await ask(made, 0, AGENT, cache_salt="tenant")
        await made.until(lambda: len(hints(made.workers[1])) == 1)
        [payload] = hints(made.workers[1])
        assert (payload["session_id"], payload["cache_salt"]) == (PARENT, "tenant")

    run(scenario)


def test_parents_worker_that_does_not_answer_costs_the_child_nothing() -> None:
    async def scenario(made: World) -> None:
        lives(made, PARENT, 0)
        await made.workers[0].stop()
        await ask(made, 1, AGENT)
        await ask(made, 1, {**AGENT, **FINAL})

    run(scenario)


def test_children_are_remembered_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agents, "CHILDREN_MAX", 2)

    async def scenario(made: World) -> None:
        lives(made, PARENT, 0)
        for number in (1, 2, 3, 1):
            await ask(made, 1, {**AGENT, "x-claude-code-agent-id": str(number)})
        await made.until(lambda: len(hints(made.workers[0])) == 4)

    run(scenario)
