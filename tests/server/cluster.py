"""Two workers and a router in front of them, for the tests of sessions that move."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conftest import VOCAB, Answer, Server, start_server
from symphony_sglang.core.migration_log import OwnershipEntry, OwnershipEvent, OwnershipLog
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

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

    def check_idle(self) -> None:
        """No pull and no reservation is left anywhere."""
        assert self.reserved() == 0
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


def kill(cluster: Cluster, name: str) -> None:
    process = cluster.workers[name].worker
    assert process.process is not None
    os.killpg(process.process.pid, signal.SIGKILL)
    process.stop()


def running_cluster(model: Path, folder: Path, *flags: str) -> Iterator[Cluster]:
    """The body of a fixture: workers `a` and `b` with `flags`, and their router."""
    made = Cluster(model, folder)
    try:
        # Two ranks each do not fit beside each other while they start.
        with ThreadPoolExecutor(1 if "--tp" in flags else 2) as pool:
            list(pool.map(lambda name: made.start_worker(name, *flags), ("a", "b")))
        made.start_router("--model-path", str(model))
        yield made
    finally:
        if made.router is not None:
            made.router.worker.stop()
        for server in made.workers.values():
            server.worker.stop()
