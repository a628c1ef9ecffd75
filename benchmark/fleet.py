"""The processes behind a scenario's arms: workers and, for more than one, a router before them.

Workers are started when an arm first needs them and stay up for the next that does. Arms that
differ in their router only share them. Each has its part of the cores, as on a machine of its own:
else one that gets all the work would be as fast as two. One router runs at a time: two of ours
would both move sessions.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmark.advise import ask
from benchmark.scenario import Arm, Scenario
from benchmark.servers import Levels, cores_of, server
from symphony_sglang.clock import SystemClock
from symphony_sglang.workload.worker_process import HOST, WorkerProcess, free_port

# sglang-router's `cache_aware` needs no session; its `manual` policy pins by routing key.
STOCK_ROUTER = "sglang_router.launch_router"
OUR_ROUTER = "symphony_sglang.launch_router"
# Idle workers keep some gigabytes each; beyond this many, those used longest ago are stopped.
WORKERS_MAX = 5
FIND_SECONDS_MAX = 60.0


@dataclass(frozen=True, slots=True)
class Group:
    """Where an arm sends its requests, and the workers behind it."""

    url: str
    worker_urls: tuple[str, ...]


def wait_for_workers(url: str, count: int) -> None:
    """Wait until a router, either one, has found all of its workers healthy."""
    clock = SystemClock()
    deadline = clock.monotonic() + FIND_SECONDS_MAX
    while True:
        _status, found = ask(url, "/readiness", method="GET")
        if isinstance(found, dict) and found.get("healthy_workers") == count:
            return
        if clock.monotonic() > deadline:
            raise SystemExit(f"{url} says {found} after {FIND_SECONDS_MAX:g} s")
        threading.Event().wait(0.1)


class Fleet:
    """A context manager that stops whatever it started."""

    def __init__(self, scenario: Scenario, model: Path, scratch: Path) -> None:
        self._scenario = scenario
        self._model = model
        self._scratch = scratch
        # By kind and number; the one used last stands last.
        self._workers: dict[tuple[str, int], list[WorkerProcess]] = {}
        self._router: tuple[tuple[str, int, str], WorkerProcess] | None = None
        self._started = 0

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # The router first, so that it does not report its workers' end.
        self._stop_router()
        for workers in self._workers.values():
            for worker in workers:
                worker.stop()

    def start(self, arm: Arm) -> Group:
        """The arm's processes, ready to serve.

        Raises:
            ServerUnavailableError: one of them does not start.
        """
        if self._router is not None and self._router[0] != arm.processes:
            self._stop_router()
        urls = tuple(worker.url for worker in self._start_workers(arm))
        if not arm.router:
            return Group(urls[0], urls)
        if self._router is None:
            self._started += 1
            log = self._scratch / f"router-{self._started}.log"
            router = self._make_router(arm.router, urls, log)
            self._router = (arm.processes, router)
            router.start()
            router.wait_ready()
            wait_for_workers(router.url, arm.workers)
        return Group(self._router[1].url, urls)

    def _start_workers(self, arm: Arm) -> list[WorkerProcess]:
        key = (arm.server, arm.workers)
        workers = self._workers.pop(key, None)
        if workers is None:
            self._make_room(arm.workers)
            sizes = self._scenario.worker
            levels = Levels(sizes.device_tokens, sizes.host_gb, sizes.nvme_gb)
            workers = []
            self._workers[key] = workers
            for number in range(arm.workers):
                self._started += 1
                folder = self._scratch / f"{arm.server}-{self._started}"
                own = sizes.symphony_flags if arm.server == "symphony" else ()
                flags = (*sizes.flags, *own)
                worker = server(arm.server, self._model, levels, folder, flags=flags)
                workers.append(worker)
                with cores_of(number, arm.workers):
                    worker.start()
                worker.wait_ready()
        self._workers[key] = workers
        return workers

    def _make_room(self, wanted: int) -> None:
        while self._workers and wanted + sum(map(len, self._workers.values())) > WORKERS_MAX:
            oldest = next(iter(self._workers))
            for worker in self._workers.pop(oldest):
                worker.stop()

    def _stop_router(self) -> None:
        if self._router is not None:
            self._router[1].stop()
            self._router = None

    def _make_router(self, kind: str, urls: tuple[str, ...], log: Path) -> WorkerProcess:
        family, _, policy = kind.partition(":")
        port = free_port()
        command = [
            *(sys.executable, "-m", STOCK_ROUTER if family == "stock" else OUR_ROUTER),
            *("--host", HOST, "--port", str(port)),
            *("--worker-urls", *urls),
            *("--policy", policy),
            *("--prometheus-port", str(free_port())),
        ]
        if family != "stock":
            command += ["--model-path", str(self._model)]
            if not policy.startswith("symphony"):
                command.append("--disable-migration")  # what such a policy stands for
        return WorkerProcess([], command=command, port=port, log_path=log)
