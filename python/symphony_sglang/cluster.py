"""``symphony cluster``: workers and a router on one machine, started and stopped together."""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.config import FLAG_PREFIX
from symphony_sglang.errors import ConfigError, ServerUnavailableError
from symphony_sglang.router.arguments import parse_arguments
from symphony_sglang.workload.demo import sigterm_as_interrupt
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

PROGRAM = "symphony cluster"
ROUTER_PREFIX = "--router-"
WORKERS_MAX = 64
INTERRUPTED = 130
WATCH_SECONDS = 0.5
# Ours alone: each worker has a place of its own there.
NVME_FLAG = f"{FLAG_PREFIX}nvme-dir"
GRACE_FLAG = f"{FLAG_PREFIX}grace"


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What is started: one command line for each worker, one for the router."""

    workers: tuple[tuple[str, ...], ...]
    router: tuple[str, ...]
    host: str
    port: int
    log_dir: Path | None = None


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        allow_abbrev=False,
        description="Start workers and a router on this machine; Ctrl-C stops all. Flags that are "
        "not listed go to every worker as they are; --router-FLAG goes to the router as --FLAG.",
    )
    parser.add_argument("--model-path", required=True, metavar="PATH", help="model of all workers")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="how many (default: 2)")
    parser.add_argument("--host", default="127.0.0.1", help="address of the router")
    parser.add_argument("--port", type=int, default=30000, help="port of the router")
    parser.add_argument("--api-key", default="", metavar="KEY", help="of the router and workers")
    parser.add_argument("--log-dir", type=Path, metavar="DIR", help="where the logs go")
    return parser


def plan_cluster(argv: Sequence[str]) -> ClusterPlan:
    """Who is started with which flags; ports are free ones.

    Raises:
        ConfigError: a value out of range, or a flag that only one worker can have.
    """
    arguments, rest = make_parser().parse_known_args(list(argv))
    if not 1 <= arguments.workers <= WORKERS_MAX:
        raise ConfigError(f"--workers is {arguments.workers}; expected 1 to {WORKERS_MAX}")
    router_words, worker_words = split_words(rest)
    shared = ["--model-path", arguments.model_path, *worker_words]
    if arguments.api_key:
        shared += ["--api-key", arguments.api_key]
    if not any(word.partition("=")[0] == GRACE_FLAG for word in worker_words):
        # They end together: nobody would take their sessions.
        shared += [GRACE_FLAG, "0"]
    ports: set[int] = set()
    while len(ports) < arguments.workers:
        ports.add(free_port())
    workers = [
        (*place_pages(shared, number), "--host", "127.0.0.1", "--port", str(port))
        for number, port in enumerate(sorted(ports))
    ]
    urls = [f"http://127.0.0.1:{port}" for port in sorted(ports)]
    router = [
        *("--host", arguments.host, "--port", str(arguments.port)),
        *("--model-path", arguments.model_path, "--worker-urls", *urls),
        *router_words,
    ]
    if "--prometheus-port" not in router_words:
        # /metrics is on the router's own port; a second one may be taken by another cluster.
        router += ["--prometheus-port", "0"]
    if arguments.api_key:
        router += ["--api-key", arguments.api_key]
    parse_arguments(router)  # a wrong flag ends the start before anything runs
    return ClusterPlan(
        tuple(workers), tuple(router), arguments.host, arguments.port, arguments.log_dir
    )


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The router's words without their prefix, and the workers'."""
    router: list[str] = []
    workers: list[str] = []
    target = workers
    for word in words:
        if word.startswith("--"):
            target = router if word.startswith(ROUTER_PREFIX) else workers
            word = "--" + word.removeprefix(ROUTER_PREFIX) if target is router else word
        target.append(word)
    return router, workers


def place_pages(words: Sequence[str], number: int) -> list[str]:
    """`words` with a directory of pages that no other worker uses, where one is named."""
    placed = list(words)
    for index, word in enumerate(placed):
        name, equals, value = word.partition("=")
        if name == NVME_FLAG and equals:
            placed[index] = f"{name}={Path(value) / f'worker-{number}'}"
        elif name == NVME_FLAG and index + 1 < len(placed):
            placed[index + 1] = str(Path(placed[index + 1]) / f"worker-{number}")
    return placed


def make_processes(plan: ClusterPlan, clock: Clock) -> tuple[list[WorkerProcess], WorkerProcess]:
    def log(name: str) -> Path | None:
        return None if plan.log_dir is None else plan.log_dir / f"{name}.log"

    workers = [
        WorkerProcess(words, log_path=log(f"worker-{number}"), clock=clock)
        for number, words in enumerate(plan.workers)
    ]
    command = [sys.executable, "-m", "symphony_sglang.launch_router", *plan.router]
    router = WorkerProcess((), command=command, port=plan.port, log_path=log("router"), clock=clock)
    return workers, router


def wait_all(workers: Sequence[WorkerProcess], console: Any) -> None:
    """Until every worker answers, with a line of progress for each.

    Raises:
        ServerUnavailableError: one of them does not come up.
    """
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, TextColumn("[dim]{task.fields[line]}"), console=console) as progress:
        rows = [
            progress.add_task(f"worker {number} at {worker.url}", total=1, line="")
            for number, worker in enumerate(workers)
        ]

        def show(row: Any, worker: WorkerProcess) -> Any:
            def on_wait(line: str) -> None:
                width = max(20, console.width - 60)
                progress.update(row, line=line[:width])

            return on_wait

        for row, worker in zip(rows, workers, strict=True):
            seconds = worker.wait_ready(on_wait=show(row, worker))
            progress.update(row, completed=1, line=f"ready after {seconds:.1f} s")


def run(argv: Sequence[str]) -> int:
    """Serve until Ctrl-C or SIGTERM, or until one of the processes ends.

    Raises:
        ConfigError: the flags cannot run.
        ServerUnavailableError: a process does not come up, or ended.
    """
    from rich.console import Console

    plan = plan_cluster(argv)
    console = Console()
    clock = SystemClock()
    workers, router = make_processes(plan, clock)
    processes = [*workers, router]
    with sigterm_as_interrupt():
        try:
            for process in processes:
                process.start()
                console.print(f"log of {process.url}: {process.log_path}", highlight=False)
            wait_all(workers, console)
            router.wait_ready()
            wait_routable(router, len(workers), clock)
            console.print(
                f"ready: {len(workers)} workers behind {router.url}; Ctrl-C stops all",
                highlight=False,
            )
            watch(processes)
        except KeyboardInterrupt:
            console.print("stopping", highlight=False)
            return INTERRUPTED
        finally:
            # The router first, so that it drains while its workers still answer.
            for process in reversed(processes):
                process.stop()
    return 0


def wait_routable(
    router: WorkerProcess, workers: int, clock: Clock, seconds_max: float = 60.0
) -> None:
    """Until the router itself calls all workers healthy.

    Raises:
        ServerUnavailableError: it does not in `seconds_max`.
    """
    deadline = clock.monotonic() + seconds_max
    while True:
        try:
            with urllib.request.urlopen(f"{router.url}/readiness", timeout=5) as answer:
                ready = json.loads(answer.read()).get("healthy_workers", 0)
        except (OSError, ValueError):
            ready = 0
        if ready >= workers:
            return
        if clock.monotonic() >= deadline:
            raise ServerUnavailableError(
                f"the router sees {ready} of {workers} workers; the end of its log:\n"
                f"{router.log_tail()}"
            )
        time.sleep(0.1)


def watch(processes: Sequence[WorkerProcess]) -> None:
    """Block until one of them ends.

    Raises:
        ServerUnavailableError: that happened; with the end of its log.
    """
    while True:
        for process in processes:
            code = None if process.process is None else process.process.poll()
            if code is not None:
                raise ServerUnavailableError(
                    f"the process at {process.url} ended with exit code {code}; the end of its "
                    f"log:\n{process.log_tail()}"
                )
        time.sleep(WATCH_SECONDS)


def main(argv: Sequence[str]) -> int:
    """Exit code; errors are raised."""
    if {"-h", "--help"} & set(argv):
        make_parser().print_help()
        return 0
    return run(argv)
