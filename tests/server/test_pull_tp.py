"""A session moves between two workers of two tensor-parallel ranks each: twin from twin."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_advisories import SESSION_TOKENS, receipt_in
from test_pull import TAIL, computed, first_turn, peer_of, pulled

from conftest import cached, start_server

pytestmark = [pytest.mark.server, pytest.mark.soak]


def test_session_moves_there_and_back_over_two_ranks(model: Path, tmp_path: Path) -> None:
    servers = []
    try:
        for name in ("a", "b"):
            flags = ("--symphony-nvme-dir", str(tmp_path / name), "--symphony-nvme-gb", "0.5")
            log = tmp_path / f"{name}.log"
            servers.append(start_server(model, log, "--tp", "2", *flags))
        a, b = servers
        assert peer_of(a)["ranks"] == 2
        ids = first_turn(a, "t1", 1)
        there = pulled(b, session_id="t1", source=peer_of(a)["address"])
        assert there["tokens"] == {"total": SESSION_TOKENS, "nvme": SESSION_TOKENS, "missing": 0}
        receipt_in(b, there["advisory_id"], "ready")
        turn = [*ids, *TAIL]
        answer = b.greedy_one(turn, session_id="t1")
        assert cached(answer)["device"] >= SESSION_TOKENS
        assert answer["output_ids"] == computed(a, turn)
        longer = [*turn, *answer["output_ids"], *range(400, 432)]
        b.greedy_one(longer, 4, session_id="t1")
        back = pulled(a, session_id="t1", source=peer_of(b)["address"])
        assert (back["state"], back["tokens"]["missing"]) == ("stored", 0)
        receipt_in(a, back["advisory_id"], "ready")
        again = a.greedy_one([*longer, *TAIL], session_id="t1")
        assert cached(again)["device"] >= back["tokens"]["total"]
        assert again["output_ids"] == computed(b, [*longer, *TAIL])
    finally:
        for server in servers:
            server.worker.stop()
