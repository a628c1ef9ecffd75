"""Programs and clients on two live workers behind the router."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from test_frontend import STORY, TURN, check_hints, outcome
from test_router import random_ids, start_router, wait_workers

from conftest import PAGE_SIZE, Server, start_server
from symphony_sglang import lang
from symphony_sglang.client import SymphonyClient
from symphony_sglang.errors import NotKnownError

pytestmark = [pytest.mark.server, pytest.mark.soak]


@pytest.fixture(scope="module")
def router(
    worker: Server, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The shared worker and a second one, behind our router."""
    logs = tmp_path_factory.mktemp("log")
    with contextlib.ExitStack() as stack:
        second = start_server(model, logs / "second.log", "--symphony-host-gb", "0.2")
        stack.callback(second.worker.stop)
        found = start_router(model, logs, [worker.url, second.url], "--model-path", str(model))
        stack.callback(found.worker.stop)
        found.worker.wait_ready()
        wait_workers(found, 2)
        yield found


@pytest.fixture
def endpoint(router: Server) -> Iterator[lang.SymphonyEndpoint]:
    found = lang.SymphonyEndpoint(router.url)
    yield found
    found.shutdown()


@pytest.mark.parametrize(
    "name", ["test_select", "test_parallel_encoding", "test_parallel_decoding", "test_stream"]
)
def test_shipped_program_passes_through_the_router(
    name: str, endpoint: lang.SymphonyEndpoint
) -> None:
    assert outcome(name, endpoint) == "passed"
    check_hints(endpoint)


def test_program_is_one_session_on_one_worker(
    endpoint: lang.SymphonyEndpoint, router: Server
) -> None:
    views: list[Any] = []

    @sgl.function
    def turns(s: Any) -> None:
        s += STORY * 10
        for index in range(4):
            s += STORY + sgl.gen(f"t{index}", **TURN)
            assert s[f"t{index}"] is not None
            views.append(client.session_view(s.stream_executor.sid))

    with SymphonyClient(router.url) as client:
        state = turns.run(backend=endpoint)
        assert state.error() is None
        assert [view.turns for view in views] == [1, 2, 3, 4]
        assert len({view.worker for view in views}) == 1
        for index in range(1, 4):
            info = state.get_meta_info(f"t{index}")
            assert info["cached_tokens_details"]["device"] >= 10 * PAGE_SIZE
        check_hints(endpoint)
        for _ in range(100):
            try:
                client.session_view(state.stream_executor.sid)
            except NotKnownError:
                return
            time.sleep(0.05)
    raise AssertionError("the session was not released")


def test_client_finds_the_session_wherever_it_is(router: Server) -> None:
    with SymphonyClient(router.url) as client:
        for number in range(4):
            session_id = f"routed-{number}"
            router.greedy_one(random_ids(400, seed=number), 2, session_id=session_id)
            with client.session(session_id, release=True) as session:
                receipt = session.typing()
                assert receipt.status in ("accepted", "duplicate"), receipt
                assert session.view().tokens.device >= 384
                assert receipt.worker
        assert client.advise("nobody").status == "missing"
        residency = client.residency()
        assert len(residency.workers) == 2
        assert all(worker.levels["device"] is not None for worker in residency.workers)
