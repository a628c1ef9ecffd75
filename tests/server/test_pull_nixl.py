"""A session pulled between two real workers by NIXL over TCP."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from test_advisories import SESSION_TOKENS, receipt_in
from test_pull import TAIL, computed, first_turn, peer_of, pulled

from conftest import cached, start_server

pytestmark = [
    pytest.mark.server,
    pytest.mark.soak,
    pytest.mark.skipif(
        importlib.util.find_spec("nixl") is None,
        reason="nixl is not installed (python -m pip install --no-deps nixl nixl-cu12)",
    ),
]


def test_session_pulled_by_nixl_answers_alike(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    servers = []
    try:
        for name in ("a", "b"):
            flags = ("--symphony-nvme-dir", str(tmp_path / name), "--symphony-nvme-gb", "0.5")
            log = tmp_path / f"{name}.log"
            servers.append(start_server(model, log, "--symphony-transfer", "nixl", *flags))
        a, b = servers
        assert [peer_of(server)["transfer"] for server in servers] == ["nixl", "nixl"]
        ids = first_turn(a, "n1", 1)
        there = pulled(b, session_id="n1", source=peer_of(a)["address"])
        assert there["tokens"] == {"total": SESSION_TOKENS, "nvme": SESSION_TOKENS, "missing": 0}
        assert there["way"] == "nixl"
        counters = peer_of(a)["counters"]
        assert counters["pages_from_host"] == counters["pages"] > 0
        receipt_in(b, there["advisory_id"], "ready")
        turn = [*ids, *TAIL]
        answer = b.greedy_one(turn, session_id="n1")
        assert cached(answer)["device"] >= SESSION_TOKENS
        assert answer["output_ids"] == computed(a, turn)
    finally:
        for server in servers:
            server.worker.stop()
