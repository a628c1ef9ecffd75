"""The processes behind a scenario's arms: workers and, for more than one, a router before them.

Groups are started when an arm first needs them and stay up until the end; idle ones sleep.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmark.scenario import Arm, Scenario
from benchmark.servers import Levels, server
from symphony_sglang.workload.worker_process import HOST, WorkerProcess, free_port

# sglang-router's `cache_aware` needs no session; its `manual` policy pins by routing key.
STOCK_ROUTER = "sglang_router.launch_router"
OUR_ROUTER = "symphony_sglang.launch_router"


@dataclass(frozen=True, slots=True)
class Group:
    """Running processes; `url` is where an arm sends its requests."""

    url: str
    worker_urls: tuple[str, ...]
    processes: tuple[WorkerProcess, ...]


class Fleet:
    """A context manager that stops whatever it started."""

    def __init__(self, scenario: Scenario, model: Path, scratch: Path) -> None:
        self._scenario = scenario
        self._model = model
        self._scratch = scratch
        self._groups: dict[tuple[str, int, str], Group] = {}
        self._started: list[WorkerProcess] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Routers first, so that none of them reports its workers' end.
        for process in reversed(self._started):
            process.stop()

    def start(self, arm: Arm) -> Group:
        """The arm's processes, ready to serve.

        Raises:
            ServerUnavailableError: one of them does not start.
        """
        found = self._groups.get(arm.processes)
        if found is not None:
            return found
        sizes = self._scenario.worker
        levels = Levels(sizes.device_tokens, sizes.host_gb, sizes.nvme_gb)
        stem = f"{arm.server}-{arm.workers}-{arm.router.replace(':', '-') or 'direct'}"
        workers = [
            server(
                arm.server,
                self._model,
                levels,
                self._scratch / stem / f"worker-{number}",
                flags=tuple(sizes.flags),
            )
            for number in range(arm.workers)
        ]
        for worker in workers:
            self._start(worker)
        urls = tuple(worker.url for worker in workers)
        processes = tuple(workers)
        url = urls[0]
        if arm.router:
            router = self._router(arm.router, urls, self._scratch / stem / "router.log")
            self._start(router)
            url, processes = router.url, (*workers, router)
        group = Group(url, urls, processes)
        self._groups[arm.processes] = group
        return group

    def _start(self, process: WorkerProcess) -> None:
        self._started.append(process)
        process.start()
        process.wait_ready()

    def _router(self, kind: str, urls: tuple[str, ...], log: Path) -> WorkerProcess:
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
        return WorkerProcess([], command=command, port=port, log_path=log)
