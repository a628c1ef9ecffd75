"""A session moves between two workers of two tensor-parallel ranks each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import TOKENS, Cluster, running_cluster, served_by, until

from conftest import cached

pytestmark = [pytest.mark.server, pytest.mark.soak]


@pytest.fixture
def cluster(model: Path, tmp_path: Path) -> Iterator[Cluster]:
    yield from running_cluster(model, tmp_path, "--tp", "2")


def test_session_of_two_ranks_moves_there_and_back(cluster) -> None:
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
