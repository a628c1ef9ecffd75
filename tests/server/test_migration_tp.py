"""A session moves between two workers of two tensor-parallel ranks each."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_migration import TOKENS, Cluster, served_by, until

from conftest import cached

pytestmark = [pytest.mark.server, pytest.mark.soak]


def test_session_of_two_ranks_moves_there_and_back(model: Path, tmp_path: Path) -> None:
    cluster = Cluster(model, tmp_path)
    try:
        for name in ("a", "b"):
            cluster.start_worker(name, "--tp", "2")
        cluster.start_router("--model-path", str(model))
        prompt = cluster.opened("tp", 1)
        for number in range(2):
            target = cluster.other(cluster.owner("tp"))
            record = cluster.moved("tp", target)
            assert record["state"] == "done", record
            until(lambda target=target: cluster.owner("tp") == target)
            prompt = [*prompt, 310 + number]
            answer = cluster.turn("tp", prompt)
            assert cluster.name_of(served_by(answer)) == target
            assert sum(cached(answer.body).values()) >= TOKENS
            assert answer.body["output_ids"] == cluster.computed(prompt)
            prompt += answer.body["output_ids"]
        cluster.check_owners()
        cluster.check_idle()
    finally:
        if cluster.router is not None:
            cluster.router.worker.stop()
        for server in cluster.workers.values():
            server.worker.stop()
