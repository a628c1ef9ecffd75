"""Advisories when things go wrong: the request path never notices, and nothing is left behind."""

from __future__ import annotations

import concurrent.futures
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_advisories import SESSION_TOKENS, advise, prompt, receipt_in
from test_levels import overflow

from conftest import DEVICE_TOKENS, PAGE_SIZE, Server, cached, start_server
from symphony_sglang.clock import SystemClock
from symphony_sglang.testing.faulty_backend import FAULTS_VARIABLE, Faults

pytestmark = pytest.mark.server

MEMORY_SLACK_BYTES = 150 << 20
# A measurement travels with a clock after this time.
SEND_SECONDS = 0.6
clock = SystemClock()


def storage_flags(directory: Path) -> tuple[str, ...]:
    """Our NVMe level behind the fault switch."""
    extra = {
        "backend_name": "symphony",
        "module_path": "symphony_sglang.testing.faulty_backend",
        "class_name": "FaultyNvmeBackend",
        "interface_v1": 1,
        "hicache_storage_pass_prefix_keys": True,
        "prefetch_threshold": PAGE_SIZE,
        "nvme_dir": str(directory),
        "nvme_bytes": 500_000_000,
        "nvme_sync": "off",
        "nvme_model_path": "tiny",
    }
    return (
        *("--hicache-storage-backend", "dynamic"),
        *("--hicache-storage-backend-extra-config", json.dumps(extra)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def break_it(folder: Path) -> Callable[..., None]:
    """Switch faults on (by name) or, without names, off."""
    return lambda **faults: Faults(**faults).save(folder / "faults.json")


@pytest.fixture(scope="module")
def server(model: Path, folder: Path) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(FAULTS_VARIABLE, str(folder / "faults.json"))
        patch.setenv("XDG_CACHE_HOME", str(folder))
        running = start_server(
            model,
            folder / "server.log",
            *storage_flags(folder / "pages"),
            *("--symphony-break-even", "1"),
        )
    yield running
    running.worker.stop()


@pytest.fixture(autouse=True)
def sound(request: pytest.FixtureRequest, break_it: Callable[..., None]) -> Iterator[None]:
    """Faults end with their test, whatever became of it."""
    break_it()
    yield
    break_it()


def seat_on_disk(server: Server, session_id: str, seed: int, tokens: int = SESSION_TOKENS) -> Any:
    """A session of one turn whose pages are on disk only; its prompt."""
    ids = prompt(seed, tokens)
    server.greedy_one(ids, 2, session_id=session_id)
    for _ in range(400):
        server.flush()
        view = server.call("GET", f"/symphony/sessions/{session_id}").body
        if view["tokens"]["nvme"] >= tokens // PAGE_SIZE * PAGE_SIZE:
            return ids
        time.sleep(0.05)
    raise AssertionError(view)


def computed(server: Server, ids: list[int]) -> list[int]:
    """What the model says with no cache at hand."""
    answer = server.greedy_one(ids, cache_salt=f"apart {clock.monotonic()}")
    assert sum(cached(answer).values()) == 0
    return list(answer["output_ids"])


def check_clean(server: Server) -> None:
    """Idle and flushed, nothing is used, protected or live."""
    for _ in range(100):
        body = server.residency()
        if body["counters"]["advisories"]["live"] == 0:
            break
        server.flush()
    server.flush()
    levels = server.residency()["levels"]
    assert levels["device"]["used_tokens"] == levels["device"]["protected_tokens"] == 0
    assert levels["host"]["used_tokens"] == 0


def decisions(server: Server, level: str) -> dict[str, int]:
    """How often a level was used, and computed again instead."""
    return dict(server.residency()["counters"]["advisories"]["gate"][level])


def memory_bytes(server: Server) -> int:
    root = psutil.Process(server.worker.process.pid)
    return sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])


# The break-even gate ------------------------------------------------------------------------------


def test_speeds_are_measured_at_the_start_and_shown(server: Server, folder: Path) -> None:
    rates = server.residency()["rates"]
    assert all(rates[f"{name}_tokens_per_second"] > 100 for name in ("prefill", "nvme_to_host"))
    assert rates["host_to_device_tokens_per_second"] > 1000
    kept = json.loads((folder / "symphony_sglang" / "rates.json").read_text())
    (entry,) = kept.values()
    assert entry["speeds"]["prefill_tokens_per_second"] > 100
    assert server.residency()["levels"]["device"]["used_tokens"] == 0, "nothing stays of it"


# Bad input ----------------------------------------------------------------------------------------


def test_megabytes_of_ids_are_clipped_or_refused(server: Server) -> None:
    for count in (200_000, 1_500_000):
        answer = server.call("POST", "/symphony/advise", {"input_ids": [300] * count})
        assert answer.status in (202, 400, 413), answer.status
        if answer.status == 202:
            (receipt,) = answer.body["receipts"]
            assert receipt["status"] in ("clipped", "rejected")
    assert server.greedy_one(prompt(1, 64), 2)["meta_info"]["completion_tokens"] == 2


def test_a_prefix_longer_than_the_pool_is_clipped_to_the_budget(server: Server) -> None:
    receipt = advise(server, input_ids=prompt(2, 3 * DEVICE_TOKENS))
    assert (receipt["status"], receipt["reason"]) == ("clipped", "larger_than_protect_budget")
    ended = receipt_in(server, receipt["advisory_id"], "failed")
    assert ended["status"] == "missing"


def test_ids_may_be_used_again(server: Server) -> None:
    """Of messages and actions they are the caller's own; ours are never handed out twice."""
    seat_on_disk(server, "again", 3)
    action = {"action_id": "same", "action_type": "prefetch", "payload": {"session_id": "again"}}
    body = {"protocol_version": "0.1", "message_id": "same", "actions": [action, action]}
    answers = [server.call("POST", "/symphony/advise", body) for _ in range(2)]
    receipts = [receipt for answer in answers for receipt in answer.body["receipts"]]
    assert [receipt["status"] for receipt in receipts] == ["accepted", *["duplicate"] * 3]
    assert len({receipt["advisory_id"] for receipt in receipts}) == 1
    first = receipts[0]["advisory_id"]
    for _ in range(2):
        gone = server.call("DELETE", f"/symphony/advisories/{first}")
        assert (gone.status, gone.body["state"]) == (200, "cancelled")
    after = advise(server, session_id="again")
    assert after["status"] == "accepted"
    assert after["advisory_id"] != first


def test_storm_of_hints_and_cancels_leaves_requests_alone(server: Server) -> None:
    """10,000 actions a second are asked for; what is over the caller's budget gets 429."""
    seat_on_disk(server, "storm", 4)
    prefetch = {"action_type": "prefetch", "payload": {"session_id": "storm"}}
    cancel = {"action_type": "cancel", "payload": {"session_id": "storm"}}
    actions = [{"action_id": f"a{n}", **(cancel if n % 2 else prefetch)} for n in range(64)]
    body = {"protocol_version": "0.1", "message_id": "m", "actions": actions}
    done = threading.Event()
    counts: dict[int, int] = {}

    def storm() -> None:
        while not done.wait(0.025):
            status = server.call("POST", "/symphony/advise", body).status
            counts[status] = counts.get(status, 0) + 1

    before = memory_bytes(server)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        storming = [pool.submit(storm) for _ in range(4)]
        try:
            until = clock.monotonic() + 10
            answered = 0
            while clock.monotonic() < until:
                answer = server.greedy_one(prompt(500 + answered, 200), 4)
                assert answer["meta_info"]["completion_tokens"] == 4
                answered += 1
        finally:
            done.set()
        for future in storming:
            future.result(timeout=60)
    assert set(counts) == {202, 429}, counts
    assert counts[429] > counts[202]
    assert answered > 5
    assert memory_bytes(server) - before < MEMORY_SLACK_BYTES
    assert server.residency()["counters"]["advisories"]["live"] <= 1
    check_clean(server)


# The cache is emptied, the disk fails -------------------------------------------------------------


def test_flush_in_the_middle_of_a_read(server: Server, break_it: Callable[..., None]) -> None:
    ids = seat_on_disk(server, "flush", 5)
    break_it(read_seconds=0.5)
    receipt = advise(server, session_id="flush")
    receipt_in(server, receipt["advisory_id"], "staging")
    assert server.call("POST", "/flush_cache").status == 200
    ended = receipt_in(server, receipt["advisory_id"], "failed")
    assert ended["reason"] == "cache_flushed"
    break_it()
    turn = [*ids, 301]
    assert server.greedy_one(turn)["output_ids"] == computed(server, turn)
    check_clean(server)


def test_weights_change_in_the_middle_of_a_read(
    server: Server, break_it: Callable[..., None]
) -> None:
    """The flush after a weight update is not refused because of an advisory."""
    seat_on_disk(server, "weights", 6)
    break_it(read_seconds=0.5)
    receipt = advise(server, session_id="weights")
    receipt_in(server, receipt["advisory_id"], "staging")
    body = {"model_path": str(server.model), "flush_cache": True}
    answer = server.call("POST", "/update_weights_from_disk", body)
    assert (answer.status, answer.body["success"]) == (200, True), answer
    assert receipt_in(server, receipt["advisory_id"], "failed")["reason"] == "cache_flushed"
    break_it()
    check_clean(server)


def test_disk_errors_in_the_middle_of_a_read(server: Server, break_it: Callable[..., None]) -> None:
    ids = seat_on_disk(server, "errors", 7)
    break_it(fail_reads=True)
    receipt = advise(server, session_id="errors", expires_in_s=30)
    ended = receipt_in(server, receipt["advisory_id"], "failed", "expired")
    assert ended["tokens"]["device"] == 0
    turn = [*ids, 301]
    answer = server.greedy_one(turn, session_id="errors")
    assert cached(answer)["storage"] == 0
    break_it()
    assert answer["output_ids"] == computed(server, turn)
    check_clean(server)


def test_a_request_joins_the_read_that_its_advisory_began(
    server: Server, break_it: Callable[..., None]
) -> None:
    ids = seat_on_disk(server, "join", 8)
    wanted = computed(server, [*ids, 301, 302])
    server.flush()
    before = server.residency()["counters"]["advisories"]["joined"]
    break_it(read_seconds=0.4)
    receipt = advise(server, session_id="join")
    receipt_in(server, receipt["advisory_id"], "staging")
    answer = server.greedy_one([*ids, 301, 302], session_id="join")
    break_it()
    assert server.residency()["counters"]["advisories"]["joined"] == before + 1
    assert receipt_in(server, receipt["advisory_id"], "late")
    assert sum(cached(answer).values()) >= SESSION_TOKENS
    assert answer["output_ids"] == wanted
    check_clean(server)


# A level that became slow -------------------------------------------------------------------------


def test_a_disk_that_became_slow_is_left_alone_and_output_is_the_same(
    server: Server, break_it: Callable[..., None]
) -> None:
    """Two slow reads are felt, then the level is avoided: requests compute, no hint waits."""
    sessions = [seat_on_disk(server, f"slow{number}", 100 + number) for number in range(4)]
    turns = [[*ids, 301, 302] for ids in sessions]
    expected = [computed(server, turn) for turn in turns]
    before = decisions(server, "nvme")
    break_it(read_seconds=1.5)
    for turn, wanted in zip(turns, expected, strict=True):
        server.flush()
        assert server.greedy_one(turn)["output_ids"] == wanted
        time.sleep(SEND_SECONDS)
    after = decisions(server, "nvme")
    used, computed_again = (after[key] - before[key] for key in ("use", "recompute"))
    # None where tests before this one, whose reads were slow as well, have told already.
    assert used <= 2, "two slow reads tell"
    assert used + computed_again == len(turns), "then no read, no wait"
    server.flush()
    # With seconds to spare it would be read all the same: what is there in time costs nothing.
    soon = advise(server, session_id="slow3", expected_in_s=0.2)
    receipt = receipt_in(server, soon["advisory_id"], "failed")
    assert (receipt["status"], receipt["reason"]) == ("rejected", "nvme_slower_than_recompute")


@pytest.mark.soak
def test_a_host_level_that_became_slow_is_left_alone_and_output_is_the_same(
    server: Server, break_it: Callable[..., None]
) -> None:
    sessions = [prompt(150 + number) for number in range(4)]
    for ids in sessions:
        server.greedy_one(ids, 1)
    overflow(server, 150)
    turns = [[*ids, 301, 302] for ids in sessions]
    before = decisions(server, "host")
    break_it(load_seconds=2.0)
    answers = []
    for turn in turns:
        answers.append(server.greedy_one(turn))
        time.sleep(SEND_SECONDS)
    break_it()
    after = decisions(server, "host")
    assert cached(answers[0])["host"] > 0, "it was tried"
    assert cached(answers[-1])["host"] == 0, "and found too slow"
    assert after["recompute"] > before["recompute"]
    for turn, answer in zip(turns, answers, strict=True):
        assert answer["output_ids"] == computed(server, turn)
    check_clean(server)


# Two ranks that do not keep step ------------------------------------------------------------------


@pytest.mark.soak
def test_a_thousand_hints_over_two_ranks_of_which_one_stumbles(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random delays and failures of storage on both ranks, and of the steps of rank 1."""
    faults = tmp_path / "faults.json"
    monkeypatch.setenv(FAULTS_VARIABLE, str(faults))
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY", "0.01")
    monkeypatch.setenv("SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE", "0.1")
    server = start_server(
        model,
        tmp_path / "tp.log",
        *("--tp", "2"),
        *storage_flags(tmp_path / "pages"),
        *("--symphony-advise-rate", "10000"),
    )
    try:
        sessions = [f"tp{number}" for number in range(8)]
        prompts = [prompt(700 + number, 600) for number in range(8)]
        turns = [[*ids, 301, 302] for ids in prompts]
        expected = [computed(server, turn) for turn in turns]
        for session_id, ids in zip(sessions, prompts, strict=True):
            server.greedy_one(ids, 1, session_id=session_id)
        Faults(step_seconds=0.02, rank=1).save(faults)
        hints = 0
        done = threading.Event()

        def storm() -> None:
            nonlocal hints
            generator = random.Random(1)
            while not done.is_set() or hints < 1000:
                actions = [action_of(generator, sessions) for _ in range(20)]
                body = {"protocol_version": "0.1", "message_id": "m", "actions": actions}
                assert server.call("POST", "/symphony/advise", body).status == 202
                hints += len(actions)

        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            storming = pool.submit(storm)
            try:
                for turn_number in range(24):
                    at = turn_number % 8
                    answer = server.greedy_one(turns[at], session_id=sessions[at])
                    assert answer["output_ids"] == expected[at]
                    if at == 7:
                        # Requests go first: without a pause nothing would ever move for a hint.
                        time.sleep(1.5)
                    # Room is made again and again, so that there is something to promote.
                    server.greedy_one(prompt(900 + turn_number, 3000), 1)
            finally:
                done.set()
            storming.result(timeout=120)
        assert hints >= 1000
        Faults().save(faults)
        counters = server.residency()["counters"]["advisories"]
        assert sum(counters["statuses"].values()) >= 500
        for turn, wanted in zip(turns, expected, strict=True):
            assert server.greedy_one(turn)["output_ids"] == wanted
        for session_id in sessions:
            server.call("DELETE", f"/symphony/sessions/{session_id}")
        check_clean(server)
        stop_in_the_middle_of_a_read(server, faults)
    finally:
        server.worker.stop()


def stop_in_the_middle_of_a_read(server: Server, faults: Path) -> None:
    seat_on_disk(server, "stop", 9)
    Faults(read_seconds=2.0).save(faults)
    receipt = advise(server, session_id="stop")
    receipt_in(server, receipt["advisory_id"], "staging")
    started = clock.monotonic()
    server.worker.stop()
    assert clock.monotonic() - started < 30


def action_of(generator: random.Random, sessions: list[str]) -> dict[str, Any]:
    kind = generator.choice(["prefetch", "prefetch", "prefetch", "cancel", "retain"])
    payload: dict[str, Any] = {"session_id": generator.choice(sessions)}
    if kind != "cancel":
        payload["expires_in_s"] = generator.choice([0.05, 5, 60])
    return {"action_id": "x", "action_type": kind, "payload": payload}
