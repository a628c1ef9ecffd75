"""Programs, clients and the live page on two live workers behind the router."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sglang as sgl
from browser import Page, find_browser
from test_frontend import STORY, TURN, check_hints, outcome
from test_router import random_ids, start_router, wait_workers
from test_ui import STATE, WIDER, shots

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


@pytest.mark.parametrize("name", ["test_select", "test_parallel_encoding", "test_stream"])
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


def test_page_shows_two_workers_under_load(router: Server, tmp_path: Path) -> None:
    find_browser()

    def load() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda seed: router.greedy_one(
                        random_ids(900, seed=seed), 24, session_id=f"load-{seed}"
                    ),
                    range(100, 124),
                )
            )

    async def look() -> None:
        async with Page(tmp_path) as page:
            await page.open(f"{router.url}/symphony/ui")
            await page.until(f"{STATE} === 'live'")
            await page.until("document.querySelectorAll('.worker').length === 2")
            await asyncio.to_thread(load)
            await asyncio.sleep(1.5)
            used = await page.value(
                "[...document.querySelectorAll('.row[data-level=device] .num')]"
                ".map((node) => parseInt(node.innerText))"
            )
            assert all(tokens > 900 for tokens in used), used
            await page.submit("#session", "load-100")
            await page.until("document.getElementById('found').innerText.includes(', on ')")
            for scheme, width in (("light", 1280), ("dark", 400)):
                await page.scheme(scheme)
                await page.resize(width, 900)
                await asyncio.sleep(1.0)
                assert not await page.value(WIDER), (scheme, width)
                await page.screenshot(shots(tmp_path) / f"two-{scheme}-{width}.png")
            assert page.problems == []

    asyncio.run(look())
