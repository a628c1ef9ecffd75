"""The NVMe level on a real server: hits after the faster copies are gone, and after a restart."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from test_advisories import SESSION_TOKENS, advise, prompt, receipt_in

from conftest import Server, cached, start_server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def nvme_flags(directory: Path) -> tuple[str, ...]:
    return ("--symphony-nvme-dir", str(directory), "--symphony-nvme-gb", "0.5")


def on_disk(server: Server, session_id: str, tokens: int) -> dict[str, Any]:
    """The session's view once all its pages have reached the disk."""
    for _ in range(200):
        server.flush()
        view = server.call("GET", f"/symphony/sessions/{session_id}").body
        if view["tokens"]["nvme"] >= tokens:
            return view
        time.sleep(0.05)
    raise AssertionError(view)


def check_level(server: Server, session_id: str, seed: int) -> None:
    """A turn found on disk, one advised from disk, one computed: the same tokens."""
    ids = prompt(seed)
    turn = [*ids, 301, 302, 303]
    server.greedy_one(ids, 2, session_id=session_id)
    view = on_disk(server, session_id, SESSION_TOKENS)
    assert view["tokens"]["missing"] == view["tokens"]["device"] == 0
    fetched = server.greedy_one(turn, session_id=session_id)
    assert cached(fetched)["storage"] == SESSION_TOKENS
    on_disk(server, session_id, SESSION_TOKENS)
    receipt = advise(server, session_id=session_id)
    ready = receipt_in(server, receipt["advisory_id"], "ready")
    assert ready["tokens"]["device"] >= SESSION_TOKENS
    assert ready["bytes"]["nvme_to_host"] > 0
    states = [state for state, _seconds in ready["timeline"]]
    assert states[:2] == ["queued", "staging"]
    advised = server.greedy_one(turn, session_id=session_id)
    assert cached(advised)["device"] >= SESSION_TOKENS
    assert receipt_in(server, receipt["advisory_id"], "used")
    computed = server.greedy_one(turn, cache_salt="computed apart")
    assert sum(cached(computed).values()) == 0
    assert fetched["output_ids"] == advised["output_ids"] == computed["output_ids"]


def test_pages_and_sessions_outlive_flush_and_restart(
    model: Path, nvme_flags: tuple[str, ...], tmp_path: Path
) -> None:
    server = start_server(model, tmp_path / "first.log", *nvme_flags)
    try:
        check_level(server, "n1", 1)
        residency = server.residency()["levels"]["nvme"]
        assert residency["used_tokens"] >= SESSION_TOKENS
        assert residency["state"] == "ok"
    finally:
        server.worker.stop()

    again = start_server(model, tmp_path / "second.log", *nvme_flags)
    try:
        log = (tmp_path / "second.log").read_text()
        assert "pages found in" in log
        receipt = advise(again, session_id="n1")
        assert receipt["status"] == "accepted"
        ready = receipt_in(again, receipt["advisory_id"], "ready")
        assert ready["tokens"]["device"] >= SESSION_TOKENS
        answer = again.greedy_one([*prompt(1), 301, 302, 303], session_id="n1")
        assert cached(answer)["device"] >= SESSION_TOKENS
    finally:
        again.worker.stop()


def test_second_worker_on_the_same_pages_is_refused(
    model: Path, nvme_flags: tuple[str, ...], tmp_path: Path
) -> None:
    from symphony_sglang.errors import ServerUnavailableError

    first = start_server(model, tmp_path / "first.log", *nvme_flags)
    try:
        with pytest.raises(ServerUnavailableError, match=r"StoreLockedError"):
            start_server(model, tmp_path / "second.log", *nvme_flags)
    finally:
        first.worker.stop()


def test_nvme_level_over_two_ranks(model: Path, tmp_path: Path) -> None:
    server = start_server(
        model,
        tmp_path / "tp.log",
        *("--tp", "2"),
        *("--symphony-nvme-dir", str(tmp_path / "pages"), "--symphony-nvme-gb", "0.5"),
    )
    try:
        check_level(server, "t1", 11)
    finally:
        server.worker.stop()


@pytest.mark.soak  # four starts of two ranks; test_nvme_level_over_two_ranks is in the short set
def test_a_prefix_counts_only_where_every_rank_has_it(model: Path, tmp_path: Path) -> None:
    pages = tmp_path / "pages"
    flags = ("--tp", "2", "--symphony-nvme-dir", str(pages), "--symphony-nvme-gb", "0.5")
    ids = prompt(12)
    server = start_server(model, tmp_path / "first.log", *flags)
    try:
        computed = server.greedy_one(ids, session_id="t2")
        on_disk(server, "t2", SESSION_TOKENS)
    finally:
        server.worker.stop()
    ranks = sorted(pages.glob("ns-*"))
    assert len(ranks) == 2
    shutil.rmtree(ranks[1])
    again = start_server(model, tmp_path / "second.log", *flags)
    try:
        answer = again.greedy_one(ids)
        assert cached(answer)["storage"] == 0
        assert answer["output_ids"] == computed["output_ids"]
    finally:
        again.worker.stop()
