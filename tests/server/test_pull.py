"""Two real workers: a session's pages go from one to the other, and what can go wrong."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_advisories import SESSION_TOKENS, prompt, receipt_in

from conftest import Server, cached, start_server
from wire_world import Relay, filled, identity, serve

pytestmark = pytest.mark.server

TAIL = [301, 302, 303]


@pytest.fixture(scope="module")
def pair(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Server]]:
    """The first serves its pages over the socket only, the second lets others read its memory."""
    folder = tmp_path_factory.mktemp("pair")
    servers = []
    try:
        for name, flags in (("a", ["--no-symphony-peer-local"]), ("b", [])):
            servers.append(
                start_server(
                    model,
                    folder / f"{name}.log",
                    *("--symphony-nvme-dir", str(folder / name), "--symphony-nvme-gb", "0.5"),
                    *flags,
                )
            )
        yield servers[0], servers[1]
    finally:
        for server in servers:
            server.worker.stop()


def peer_of(server: Server) -> dict[str, Any]:
    peer = server.residency()["peer"]
    assert peer is not None
    return peer


def start_pull(server: Server, **body: Any) -> dict[str, Any]:
    answer = server.call("POST", "/symphony/pull", body)
    assert answer.status == 202, answer
    return answer.body


def pulled(server: Server, **body: Any) -> dict[str, Any]:
    """The receipt of a pull when it has ended."""
    receipt = start_pull(server, **body)
    for _ in range(500):
        answer = server.call("GET", f"/symphony/pulls/{receipt['pull_id']}")
        assert answer.status == 200, answer
        if answer.body["state"] in ("stored", "failed", "cancelled"):
            return answer.body
        time.sleep(0.02)
    raise AssertionError(f"the pull did not end: {answer.body}")


def first_turn(server: Server, session_id: str, seed: int) -> list[int]:
    ids = prompt(seed)
    server.greedy_one(ids, 4, session_id=session_id)
    return ids


def computed(server: Server, ids: list[int]) -> list[int]:
    answer = server.greedy_one(ids, cache_salt="computed apart")
    assert sum(cached(answer).values()) == 0
    return list(answer["output_ids"])


def test_session_pulled_to_another_worker_is_on_its_device_for_the_next_turn(pair) -> None:
    a, b = pair
    ids = first_turn(a, "p1", 1)
    assert b.call("GET", "/symphony/sessions/p1").status == 404
    receipt = pulled(b, session_id="p1", source=peer_of(a)["address"])
    assert (receipt["status"], receipt["state"], receipt["reason"]) == ("accepted", "stored", "")
    assert receipt["way"] == "stream"
    assert receipt["tokens"] == {"total": SESSION_TOKENS, "nvme": SESSION_TOKENS, "missing": 0}
    ready = receipt_in(b, receipt["advisory_id"], "ready")
    assert ready["tokens"]["device"] >= SESSION_TOKENS
    view = b.call("GET", "/symphony/sessions/p1").body
    assert (view["turns"], view["tokens"]["missing"]) == (1, 0)
    turn = [*ids, *TAIL]
    answer = b.greedy_one(turn, session_id="p1")
    assert cached(answer)["device"] >= SESSION_TOKENS
    assert answer["output_ids"] == computed(a, turn) == computed(b, turn)


def test_session_goes_back_with_what_was_added(pair) -> None:
    a, b = pair
    ids = first_turn(a, "p2", 2)
    pulled(b, session_id="p2", source=peer_of(a)["address"])
    second = [*ids, *prompt(22, 64)]
    b.greedy_one(second, 4, session_id="p2")
    receipt = pulled(a, session_id="p2", source=peer_of(b)["address"])
    # Only what A does not have yet travels, by the short way.
    assert receipt["way"] == "local"
    page_bytes = receipt["bytes"]["peer_to_nvme"] // 4
    assert receipt["bytes"]["peer_to_nvme"] == 4 * page_bytes
    assert receipt["tokens"]["total"] == SESSION_TOKENS + 64
    receipt_in(a, receipt["advisory_id"], "ready")
    turn = [*second, *TAIL]
    answer = a.greedy_one(turn, session_id="p2")
    assert cached(answer)["device"] >= SESSION_TOKENS + 64
    assert answer["output_ids"] == computed(b, turn)


def test_prompt_is_pulled_by_its_tokens(pair) -> None:
    a, b = pair
    ids = prompt(3)
    a.greedy_one(ids, 4)
    receipt = pulled(b, input_ids=ids, source=peer_of(a)["address"], target="nvme")
    assert receipt["state"] == "stored"
    assert receipt["advisory_id"] is None
    answer = b.greedy_one([*ids, *TAIL])
    assert cached(answer)["storage"] >= SESSION_TOKENS - 16
    assert answer["output_ids"] == computed(a, [*ids, *TAIL])


def test_unknown_session_and_other_pages_are_named(pair) -> None:
    a, b = pair
    receipt = pulled(b, session_id="nobody's", source=peer_of(a)["address"])
    assert (receipt["status"], receipt["reason"]) == ("rejected", "unknown_session")
    with serve(filled([]), who=identity(model="another")) as other:
        receipt = pulled(b, session_id="p1", source=other.address)
    assert receipt["status"] == "rejected"
    assert "model:" in receipt["reason"]
    assert "'another' there" in receipt["reason"]


def test_source_that_is_no_worker_is_a_failed_pull(pair) -> None:
    _, b = pair
    receipt = pulled(b, session_id="p1", source="127.0.0.1:1")
    assert (receipt["state"], receipt["status"]) == ("failed", "rejected")
    assert "no connection" in receipt["reason"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"session_id": "x"}, "source"),
        ({"session_id": "x", "source": "nowhere"}, "source"),
        ({"source": "h:1"}, "session_id"),
        ({"source": "h:1", "session_id": "x", "input_ids": [1]}, "session_id"),
        ({"source": "h:1", "input_ids": []}, "input_ids"),
        ({"source": "h:1", "input_ids": [-1]}, "input_ids"),
        ({"source": "h:1", "session_id": "x", "target": "moon"}, "target"),
        ({"source": "h:1", "session_id": "x", "deadline_s": 0}, "deadline_s"),
        ({"source": "h:1", "session_id": "x", "surprise": 1}, "surprise"),
        ({"source": 5, "session_id": "x"}, "source"),
    ],
)
def test_malformed_pull_is_refused_by_field(pair, body, field) -> None:
    answer = pair[1].call("POST", "/symphony/pull", body)
    assert answer.status == 400
    assert field in str(answer.body)


def test_page_corrupted_on_the_wire_does_no_harm(pair) -> None:
    a, b = pair
    ids = first_turn(a, "p4", 4)
    relay = Relay(("127.0.0.1", peer_of(a)["port"]))
    # The first connection asks for the record, the second carries pages.
    relay.corrupt_at = [1 << 40, 200_000]
    try:
        receipt = pulled(b, session_id="p4", source=relay.address)
    finally:
        relay.close()
    assert receipt["state"] == "stored"
    assert receipt["tokens"]["missing"] == 0
    turn = [*ids, *TAIL]
    answer = b.greedy_one(turn, session_id="p4")
    assert sum(cached(answer).values()) >= SESSION_TOKENS
    assert answer["output_ids"] == computed(a, turn)


def order(server: Server, kind: str, **body: Any) -> dict[str, Any]:
    fields = {"kind": kind, "move_id": "m1", "session_id": "p5", "epoch": 1 << 16, **body}
    answer = server.call("POST", "/symphony/moves", fields)
    assert answer.status == 200, answer
    return answer.body


def test_orders_of_a_move_hand_the_session_over(pair) -> None:
    a, b = pair
    ids = first_turn(a, "p5", 5)
    source = peer_of(a)["address"]
    assert order(b, "copy", source=source, step=1)["reason"] == "no_reservation"
    assert order(b, "reserve", step=1, bytes=1000)["ok"]
    for _ in range(200):
        reply = order(b, "copy", source=source, step=2)
        if not reply["pending"]:
            break
        time.sleep(0.02)
    assert reply["ok"], reply
    assert order(b, "verify", step=3)["ok"]
    # Until the switch the session is not the target's.
    assert b.call("GET", "/symphony/sessions/p5").status == 404
    assert order(b, "switch", step=4)["ok"]
    assert order(b, "switch", step=4)["ok"]
    assert order(a, "release", step=5)["ok"]
    assert a.call("GET", "/symphony/sessions/p5").status == 404
    receipt_in(b, "adv-m1", "ready")
    answer = b.greedy_one([*ids, *TAIL], session_id="p5")
    assert cached(answer)["device"] >= SESSION_TOKENS
    assert answer["output_ids"] == computed(a, [*ids, *TAIL])
    assert peer_of(b)["moves"] == 0
    late = order(b, "reserve", step=1)
    assert (late["ok"], late["reason"]) == (False, "move_ended")


def test_killed_source_leaves_a_worker_that_serves(pair) -> None:
    """Last, for it ends the first worker."""
    a, b = pair
    ids = first_turn(a, "p6", 6)
    relay = Relay(("127.0.0.1", peer_of(a)["port"]))
    relay.stall_after = 300_000
    try:
        receipt = start_pull(b, session_id="p6", source=relay.address, deadline_s=8)
        time.sleep(0.5)
        os.killpg(a.worker.process.pid, signal.SIGKILL)
        relay.close()
        for _ in range(600):
            state = b.call("GET", f"/symphony/pulls/{receipt['pull_id']}").body
            if state["state"] in ("stored", "failed"):
                break
            time.sleep(0.02)
    finally:
        relay.close()
    assert state["state"] in ("stored", "failed")
    assert state["tokens"]["missing"] > 0 or state["state"] == "failed"
    assert state["reason"]
    turn = [*ids, *TAIL]
    answer = b.greedy_one(turn, session_id="p6")
    assert answer["output_ids"] == computed(b, turn)
    assert peer_of(b)["pulls"] == 0
