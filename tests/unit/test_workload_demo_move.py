"""The demo's moves against a stand-in of the router, and what is made of them."""

from __future__ import annotations

import asyncio
import io
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console
from workload_stand_in import VOCAB, StandIn

from symphony_sglang.clock import SystemClock
from symphony_sglang.errors import ServerUnavailableError
from symphony_sglang.workload.conversation import ConversationRules
from symphony_sglang.workload.demo_move import (
    MoveSample,
    Way,
    converse_and_move,
    judge_moves,
    move_table,
)

RULES = ConversationRules(
    sessions=3, lag=1, opening_tokens=320, message_tokens=20, answer_tokens=6, vocab=VOCAB
)


@dataclass
class RouterStandIn(StandIn):
    """Two workers; a move copies what the session's worker has. `lazy` says done and moves none."""

    owners: dict[str, str] = field(default_factory=dict)
    outcome: str = "done"
    lazy: bool = False
    asked: int = 0

    def more_routes(self) -> list[web.RouteDef]:
        return [
            web.post("/symphony/migrate", self.migrate),
            web.get("/symphony/moves/{id}", self.move),
            web.get("/symphony/advisories/{id}", self.advisory),
        ]

    def worker_of(self, request: web.Request, body: dict[str, Any]) -> str:
        session = body["session_id"]
        pinned = request.headers.get("X-SMG-Target-Worker")
        return (
            self.owners.setdefault(session, pinned or "w0")
            if not pinned
            else self.at(session, pinned)
        )

    def at(self, session: str, worker: str) -> str:
        self.owners[session] = worker
        return worker

    async def migrate(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked += 1
        if self.asked % 2:  # the router has not heard of the session yet
            return web.json_response({"error": {}}, status=404)
        session, salt = body["session_id"], body["cache_salt"]
        if not self.lazy:
            self.owners[session] = body["to"]
            last = next(b for b in reversed(self.requests) if b["session_id"] == session)
            self.look_up(last["input_ids"], body["to"] + salt)
        return web.json_response({"move_id": "move-1", "state": "queued"}, status=202)

    async def move(self, _request: web.Request) -> web.Response:
        timeline = [["queued", 0.0], [self.outcome, 0.25]]
        return web.json_response(
            {"move_id": "move-1", "state": self.outcome, "bytes": 3_000_000, "timeline": timeline}
        )

    async def advisory(self, _request: web.Request) -> web.Response:
        return web.json_response({"state": "ready"})


def run(server: StandIn) -> list[MoveSample]:
    return asyncio.run(
        converse_and_move(server.url, ["w0", "w1"], RULES, run_id="run", clock=SystemClock())
    )


def test_moved_sessions_are_served_elsewhere_from_the_device_with_the_same_output() -> None:
    with RouterStandIn() as server:
        samples = run(server)
    assert judge_moves(samples) == []
    assert [(s.session, s.way) for s in samples[:3]] == [
        (0, Way.MOVED), (0, Way.STAYED), (0, Way.RECOMPUTE),
    ]  # fmt: skip
    served = [s.result.worker for s in samples]
    assert served == ["w1", "w0", "w1", "w0", "w1", "w0", "w1", "w0", "w1"]
    prompts = {s.session: s.result.prompt_tokens for s in samples}
    assert set(prompts.values()) == {320 + 2 * 20 + 2 * 6}


def test_session_that_was_not_moved_is_found_out() -> None:
    with RouterStandIn(lazy=True) as server:
        problems = judge_moves(run(server))
    assert problems == [
        f"moving session {n} was served by the worker it had left" for n in range(3)
    ]


def test_move_that_fails_ends_the_demo() -> None:
    with (
        RouterStandIn(outcome="aborted") as server,
        pytest.raises(ServerUnavailableError, match="did not end well"),
    ):
        run(server)


def test_every_fault_is_named() -> None:
    with RouterStandIn() as server:
        samples = run(server)
    assert judge_moves([]) == ["no session was moved"]
    assert judge_moves(samples[:2]) == ["moving session 0 has no answer of recompute"]
    moved = samples[0]
    other = type(moved.result)(
        latency_seconds=1.0, output_ids=(1, 2), prompt_tokens=372, worker="w1"
    )
    assert judge_moves([moved._replace(result=other), *samples[1:3]]) == [
        "moving session 0: its prefix, moved, came from recompute",
        "moving session 0: the outputs differ between the ways",
    ]


def test_table_shows_each_way_in_80_columns() -> None:
    with RouterStandIn() as server:
        samples = run(server)
    text = io.StringIO()
    Console(file=text, width=80).print(move_table(samples))
    rows = {line.split()[0]: line.split() for line in text.getvalue().splitlines() if line.split()}
    assert rows["moved"][1:5] == ["3", "372", "336", "36"]
    assert rows["recompute"][1:5] == ["3", "372", "0", "372"]
    assert rows["recompute"][-1] == "1.000"
    assert "3 MB in 250 ms" in text.getvalue()
    assert "…" not in text.getvalue()
