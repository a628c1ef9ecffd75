"""Fifty random moves on real workers while things break: one owner, and answers unchanged."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import Cluster, kill, running_cluster, until

from conftest import Answer

pytestmark = [pytest.mark.server, pytest.mark.soak]

MOVES = 50
SESSIONS = 6
SEED = 20261121


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running_cluster(model, tmp_path_factory.mktemp("soak"))


def ask(cluster: Cluster, session_id: str, prompt: list[int]) -> Answer:
    answer = cluster.turn(session_id, prompt, 4)
    assert answer.body["output_ids"] == cluster.computed(prompt, 4), session_id
    return answer


def break_something(cluster: Cluster, chance: random.Random) -> str:
    """Kill a worker or the router in the middle of whatever goes on, and bring it back."""
    if chance.random() < 0.5:
        os.killpg(cluster.front.worker.process.pid, signal.SIGKILL)
        cluster.front.worker.stop()
        cluster.start_router("--model-path", str(cluster.model))
        return "router"
    name = chance.choice(sorted(cluster.workers))
    port = cluster.workers[name].worker.port
    kill(cluster, name)
    cluster.start_worker(name, port=port)
    cluster.wait_workers(2)
    return name


def test_fifty_moves_with_faults(cluster: Cluster) -> None:
    chance = random.Random(SEED)
    prompts = {f"k{n}": cluster.opened(f"k{n}", 700 + n, 600) for n in range(SESSIONS)}
    faults: list[str] = []
    done = asked = 0
    while asked < MOVES:
        session_id = chance.choice(sorted(prompts))
        until(lambda session_id=session_id: cluster.view(session_id).status == 200, 30)
        target = cluster.other(cluster.owner(session_id))
        answer = cluster.migrate(session_id, target)
        if answer.status not in (202, 409):
            # The router has just been restarted, and hears of the sessions a moment later.
            assert answer.status == 404, answer
            continue
        asked += 1
        if chance.random() < 0.12:
            faults.append(break_something(cluster, chance))
        if chance.random() < 0.6:
            prompt = prompts[session_id] = [*prompts[session_id], 300 + asked]
            prompts[session_id] = prompt + ask(cluster, session_id, prompt).body["output_ids"]
        if answer.status == 202:
            record = cluster.front.call("GET", f"/symphony/moves/{answer.body['move_id']}")
            if record.status == 200:
                done += cluster.ended(answer.body["move_id"], 90)["state"] == "done"
        cluster.check_owners()
    assert faults
    assert done >= MOVES // 2
    for session_id, prompt in prompts.items():
        ask(cluster, session_id, [*prompt, 299])
    cluster.check_owners()
    until(lambda: cluster.reserved() == 0, 15)
