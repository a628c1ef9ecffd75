"""Sessions that move between two real workers behind the router. Workers are killed at the end."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from conftest import VOCAB, Answer, Server, cached, start_server
from symphony_sglang.core.migration_log import OwnershipEntry, OwnershipEvent, OwnershipLog
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

pytestmark = pytest.mark.server

TOKENS = 800
GREEDY = {"temperature": 0, "ignore_eos": True}
ENDED = ("done", "aborted")


@dataclass
class Cluster:
    """Two workers and a router; the last worker answers what is compared."""

    model: Path
    folder: Path
    workers: dict[str, Server] = field(default_factory=dict)  # by name
    router: Server | None = None
    ids: dict[str, str] = field(default_factory=dict)  # worker id by name

    @property
    def front(self) -> Server:
        assert self.router is not None
        return self.router

    def start_worker(self, name: str, *flags: str, port: int | None = None) -> Server:
        pages = ("--symphony-nvme-dir", str(self.folder / name), "--symphony-nvme-gb", "0.5")
        port_flags = () if port is None else ("--port", str(port))
        log = self.folder / f"{name}-{len(list(self.folder.glob('*.log')))}.log"
        self.workers[name] = start_server(self.model, log, *pages, *flags, *port_flags)
        return self.workers[name]

    def start_router(self, *flags: str) -> Server:
        port = free_port()
        command = [
            sys.executable, "-m", "symphony_sglang.launch_router",
            "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", "0",
            "--worker-urls", *(worker.url for worker in self.workers.values()),
            "--health-check-interval-secs", "2", *flags,
        ]  # fmt: skip
        log = self.folder / f"router-{port}.log"
        process = WorkerProcess((), command=command, port=port, log_path=log)
        process.start()
        self.router = Server(process, self.model)
        process.wait_ready()
        self.wait_workers(len(self.workers))
        return self.router

    def wait_workers(self, count: int) -> None:
        until(lambda: self.front.call("GET", "/readiness").body.get("healthy_workers") == count, 30)
        listed = self.front.call("GET", "/workers").body["workers"]
        urls = {entry["url"]: entry["id"] for entry in listed}
        self.ids = {name: urls[w.url] for name, w in self.workers.items() if w.url in urls}

    def name_of(self, worker_id: str) -> str:
        return next((name for name, known in self.ids.items() if known == worker_id), worker_id)

    def turn(self, session_id: str | None, prompt: list[int], length: int = 8) -> Answer:
        body: dict[str, Any] = {
            "input_ids": prompt,
            "sampling_params": {**GREEDY, "max_new_tokens": length},
        }
        if session_id is not None:
            body["session_id"] = session_id
        answer = self.front.call("POST", "/generate", body)
        assert answer.status == 200, answer
        return answer

    def opened(self, session_id: str, seed: int, length: int = TOKENS) -> list[int]:
        """A session after its first turn, known to the router: its prompt so far."""
        prompt = random_ids(length, seed)
        answer = self.turn(session_id, prompt)
        until(lambda: self.view(session_id).status == 200)
        return prompt + answer.body["output_ids"]

    def view(self, session_id: str) -> Answer:
        return self.front.call("GET", f"/symphony/sessions/{session_id}")

    def owner(self, session_id: str) -> str:
        return self.name_of(self.view(session_id).body["worker"])

    def other(self, name: str) -> str:
        return next(known for known in self.workers if known != name)

    def migrate(self, session_id: str, to: str) -> Answer:
        body = {"session_id": session_id, "to": self.ids[to]}
        return self.front.call("POST", "/symphony/migrate", body)

    def moved(self, session_id: str, to: str) -> dict[str, Any]:
        """The record of a move after its end."""
        answer = self.migrate(session_id, to)
        assert answer.status == 202, answer
        return self.ended(answer.body["move_id"])

    def ended(self, move_id: str, seconds: float = 60) -> dict[str, Any]:
        def record() -> dict[str, Any]:
            return dict(self.front.call("GET", f"/symphony/moves/{move_id}").body)

        until(lambda: record()["state"] in ENDED, seconds)
        return record()

    def computed(self, prompt: list[int], length: int = 8) -> list[int]:
        """The answer from nothing, of the worker that still lives."""
        server = next(iter(self.workers.values()))
        answer = server.greedy_one(prompt, length, cache_salt=f"apart {len(prompt)}")
        return list(answer["output_ids"])

    def check_owners(self) -> None:
        """Replay the router's journal: it raises where two workers own a session."""
        log = OwnershipLog()
        entries = self.front.call("GET", "/symphony/moves").body["ownership"]
        for entry in entries:
            log.add(OwnershipEntry(**{**entry, "event": OwnershipEvent(entry["event"])}))
        assert log.entries == len(entries)

    def reserved(self) -> int:
        return sum(server.residency()["peer"]["moves"] for server in self.workers.values())

    def check_idle(self, reserved: int = 0) -> None:
        """No pull is left anywhere, and no more reservations than there were."""
        assert self.reserved() <= reserved
        assert all(w.residency()["peer"]["pulls"] == 0 for w in self.workers.values())


def until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds  # noqa: TID251 - a test of real time
    while not condition():
        assert time.monotonic() < deadline, "it did not become true"  # noqa: TID251
        time.sleep(0.02)


def random_ids(count: int, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, VOCAB) for _ in range(count)]


def served_by(answer: Answer) -> str:
    return {name.lower(): value for name, value in answer.headers.items()}["x-symphony-worker"]


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster(model, tmp_path_factory.mktemp("migration"))
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(made.start_worker, ("a", "b")))
        made.start_router("--model-path", str(model))
        yield made
    finally:
        if made.router is not None:
            made.router.worker.stop()
        for server in made.workers.values():
            server.worker.stop()


def test_session_is_served_from_its_new_workers_device_with_the_same_answer(cluster) -> None:
    prompt = cluster.opened("m1", 1)
    source = cluster.owner("m1")
    target = cluster.other(source)
    record = cluster.moved("m1", target)
    assert record["state"] == "done", record
    assert cluster.name_of(record["from"]) == source
    assert record["bytes"] > 0
    until(lambda: cluster.owner("m1") == target)
    until(lambda: cluster.view("m1").body["tokens"]["device"] >= TOKENS)
    assert [move["move_id"] for move in cluster.view("m1").body["moves"]] == [record["move_id"]]
    assert cluster.workers[source].call("GET", "/symphony/sessions/m1").status == 404
    turn = [*prompt, 301, 302]
    answer = cluster.turn("m1", turn)
    assert cluster.name_of(served_by(answer)) == target
    assert cached(answer.body)["device"] >= TOKENS
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.check_owners()
    cluster.check_idle()


def test_outputs_stay_the_same_over_many_moves(cluster) -> None:
    prompt = cluster.opened("m2", 2)
    for number in range(6):
        target = cluster.other(cluster.owner("m2"))
        record = cluster.moved("m2", target)
        assert record["state"] == "done", record
        until(lambda target=target: cluster.owner("m2") == target)
        prompt = [*prompt, 310 + number, 311]
        answer = cluster.turn("m2", prompt)
        assert cluster.name_of(served_by(answer)) == target
        assert sum(cached(answer.body).values()) >= TOKENS
        assert answer.body["output_ids"] == cluster.computed(prompt)
        prompt += answer.body["output_ids"]
    cluster.check_owners()
    cluster.check_idle()


def test_session_that_decodes_moves_when_its_turn_is_over(cluster) -> None:
    prompt = cluster.opened("m3", 3)
    source = cluster.owner("m3")
    target = cluster.other(source)
    turn = [*prompt, 303]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(cluster.turn, "m3", turn, 200)
        loads = cluster.workers[source]
        until(lambda: loads.call("GET", "/v1/loads").body["loads"][0]["num_running_reqs"] > 0)
        record = cluster.moved("m3", target)
        answer = running.result()
    assert record["state"] == "done", record
    assert cluster.name_of(served_by(answer)) == source
    assert answer.body["output_ids"] == cluster.computed(turn, 200)
    longer = [*turn, *answer.body["output_ids"], 304]
    until(lambda: cluster.owner("m3") == target)
    later = cluster.turn("m3", longer)
    # What the turn added came along.
    assert cluster.name_of(served_by(later)) == target
    assert sum(cached(later.body).values()) >= len(longer) - 48
    assert later.body["output_ids"] == cluster.computed(longer)
    cluster.check_owners()


def test_requests_beside_moves_are_all_served_alike(cluster) -> None:
    prompt = cluster.opened("m4", 4)
    turns = [[*prompt, 400 + number] for number in range(12)]
    expected = [cluster.computed(turn) for turn in turns]
    stop = threading.Event()

    def keep_moving() -> int:
        moves = 0
        while not stop.is_set():
            answer = cluster.migrate("m4", cluster.other(cluster.owner("m4")))
            if answer.status == 202:
                cluster.ended(answer.body["move_id"])
                moves += 1
        return moves

    with ThreadPoolExecutor(4) as pool:
        mover = pool.submit(keep_moving)
        answers = list(pool.map(lambda turn: cluster.turn("m4", turn), turns))
        stop.set()
        assert mover.result() > 0
    assert [answer.body["output_ids"] for answer in answers] == expected
    cluster.check_owners()
    until(lambda: cluster.reserved() == 0)


def test_request_finds_its_pages_pulled_where_it_was_sent(cluster) -> None:
    """No advisory: the caller names another worker, and copying is quicker than computing."""
    prompt = cluster.opened("m5", 5, 3000)
    source = cluster.owner("m5")
    target = cluster.other(source)
    turn = [*prompt, 305]
    body = {
        "input_ids": turn,
        "session_id": "m5",
        "sampling_params": {**GREEDY, "max_new_tokens": 8},
    }
    headers = {"X-SMG-Target-Worker": cluster.ids[target]}
    answer = cluster.front.call("POST", "/generate", body, headers=headers)
    assert cluster.name_of(served_by(answer)) == target
    moves = cluster.view("m5").body["moves"]
    assert [(move["cause"], move["state"]) for move in moves] == [("demand", "done")]
    assert sum(cached(answer.body).values()) >= 2900
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.check_owners()


def test_metrics_count_moves(cluster) -> None:
    text = cluster.front.call("GET", "/metrics").body
    done = [line for line in text.splitlines() if line.startswith("symphony:moves_total{")]
    assert any('outcome="done"' in line for line in done)
    assert "symphony:moves_active 0.0" in text


def test_restarted_router_knows_the_owners(cluster) -> None:
    prompt = cluster.opened("m6", 6)
    target = cluster.other(cluster.owner("m6"))
    assert cluster.moved("m6", target)["state"] == "done"
    cluster.front.worker.stop()
    cluster.start_router("--model-path", str(cluster.model))
    until(lambda: cluster.owner("m6") == target)
    turn = [*prompt, 306]
    answer = cluster.turn("m6", turn)
    assert cluster.name_of(served_by(answer)) == target
    back = cluster.moved("m6", cluster.other(target))
    assert back["state"] == "done", back
    # Its epochs are above those of the router before it.
    assert back["epoch"] >> 16 >= 2
    cluster.check_owners()


@pytest.mark.soak
def test_router_killed_in_the_middle_leaves_one_owner(cluster) -> None:
    prompt = cluster.opened("m7", 7, 3000)
    source = cluster.owner("m7")
    answer = cluster.migrate("m7", cluster.other(source))
    assert answer.status == 202
    os.killpg(cluster.front.worker.process.pid, signal.SIGKILL)
    cluster.front.worker.stop()
    cluster.start_router("--model-path", str(cluster.model))
    until(lambda: cluster.view("m7").status == 200)
    turn = [*prompt, 307]
    assert cluster.turn("m7", turn).body["output_ids"] == cluster.computed(turn)
    assert cluster.moved("m7", cluster.other(cluster.owner("m7")))["state"] == "done"
    cluster.check_owners()


@pytest.mark.soak
def test_target_killed_in_the_middle_leaves_the_session_at_its_source(cluster) -> None:
    prompt = cluster.opened("m8", 8, 3000)
    source = cluster.owner("m8")
    target = cluster.other(source)
    # That of the killed router's move lasts until its lease ends.
    reserved = cluster.reserved()
    record = cluster.migrate("m8", target).body
    kill(cluster, target)
    record = cluster.ended(record["move_id"])
    turn = [*prompt, 308]
    server = cluster.workers.pop(target)
    answer = cluster.turn("m8", turn)
    assert cluster.name_of(served_by(answer)) == source
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.check_idle(reserved)
    cluster.start_worker(target, port=server.worker.port)
    cluster.wait_workers(2)
    assert cluster.moved("m8", cluster.other(cluster.owner("m8")))["state"] == "done"
    cluster.check_owners()
    cluster.check_idle(reserved)


def test_drained_worker_hands_its_sessions_off_and_goes(cluster) -> None:
    prompts = {f"d{n}": cluster.opened(f"d{n}", 50 + n, 400) for n in range(4)}
    homes = {name: cluster.owner(name) for name in prompts}
    leaver = max(set(homes.values()), key=list(homes.values()).count)
    stayer = cluster.other(leaver)
    answer = cluster.front.call("POST", f"/workers/{cluster.ids[leaver]}/drain")
    assert (answer.status, answer.body["status"]) == (202, "draining")
    assert answer.body["sessions"] >= 1
    until(lambda: cluster.front.call("GET", f"/workers/{cluster.ids[leaver]}").status == 404, 60)
    for name, prompt in prompts.items():
        assert cluster.owner(name) == stayer
        turn = [*prompt, 309]
        served = cluster.turn(name, turn)
        assert sum(cached(served.body).values()) >= 384, name
        assert served.body["output_ids"] == cluster.computed(turn)
    cluster.check_owners()
    added = cluster.front.call("POST", f"/add_worker?url={cluster.workers[leaver].url}")
    assert added.status == 200, added
    cluster.wait_workers(2)


@pytest.mark.soak
def test_terminated_worker_hands_its_sessions_off_first(cluster) -> None:
    prompts = {f"t{n}": cluster.opened(f"t{n}", 80 + n, 400) for n in range(4)}
    homes = {name: cluster.owner(name) for name in prompts}
    leaver = max(set(homes.values()), key=list(homes.values()).count)
    stayer = cluster.other(leaver)
    server = cluster.workers.pop(leaver)
    process = server.worker.process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    for name, prompt in prompts.items():
        turn = [*prompt, 312]
        served = cluster.turn(name, turn)
        assert cluster.name_of(served_by(served)) == stayer
        assert sum(cached(served.body).values()) >= 384, name
        assert served.body["output_ids"] == cluster.computed(turn)
    server.worker.stop()
    cluster.start_worker(leaver, port=server.worker.port)
    cluster.wait_workers(2)
    entry = cluster.front.call("GET", f"/workers/{cluster.ids[leaver]}").body
    assert entry["draining"] is False
    cluster.check_owners()


@pytest.mark.soak
def test_worker_of_another_model_is_refused(cluster, tmp_path_factory) -> None:
    from symphony_sglang.workload.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("other") / "another"
    make_tiny_model(folder, layers=2, hidden=256, vocab=VOCAB, seed=9)
    cluster.opened("m9", 9)
    stranger = start_server(
        folder, cluster.folder / "stranger.log",
        *("--symphony-nvme-dir", str(cluster.folder / "stranger"), "--symphony-nvme-gb", "0.2"),
        *("--served-model-name", "tiny-again"),
    )  # fmt: skip
    try:
        added = cluster.front.call("POST", f"/add_worker?url={stranger.url}")
        assert added.status == 200
        listed = cluster.front.call("GET", "/workers").body["workers"]
        [stranger_id] = [entry["id"] for entry in listed if entry["url"] == stranger.url]
        body = {"session_id": "m9", "to": stranger_id}
        answer = cluster.front.call("POST", "/symphony/migrate", body)
        assert (answer.status, answer.body["error"]["code"]) == (409, "no_peer_level")
    finally:
        cluster.front.call("POST", f"/remove_worker?url={stranger.url}")
        stranger.worker.stop()
    cluster.check_owners()


@pytest.mark.soak
def test_killed_source_is_followed_by_its_target(cluster) -> None:
    """Last, for it ends a worker."""
    prompt = cluster.opened("m10", 10, 3000)
    source = cluster.owner("m10")
    record = cluster.migrate("m10", cluster.other(source)).body
    kill(cluster, source)
    cluster.workers.pop(source)
    turn = [*prompt, 310]
    answer = cluster.turn("m10", turn)
    assert cluster.name_of(served_by(answer)) != source
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.ended(record["move_id"])
    cluster.check_owners()
    until(lambda: cluster.reserved() == 0, 90)


def kill(cluster: Cluster, name: str) -> None:
    process = cluster.workers[name].worker
    assert process.process is not None
    os.killpg(process.process.pid, signal.SIGKILL)
    process.stop()
