"""What a router adds: latency, requests a second, streamed first bytes; ours beside sglang-router.

    python -m benchmark.router [--rounds 5] [--output DIR]

One machine, one run: two fake workers (benchmark/router_worker.py) answer directly, behind
sglang-router and behind this package's router, one arm after the other in every round, in an order
that turns. `policy round_robin` on both; then ours once more with its default policy and token ids
to hash. Ratios are within a round; the spread is over rounds. Processor time is the router
process's own, user and system, from /proc: requests per second of one core are its inverse. All
streams of a load begin in one instant, so the last of them waits for the routing of all others: at
256 streams that is 256 times what one costs, on one core.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter  # noqa: TID251 - a stopwatch: nothing decides by it
from typing import Any, cast

import httptools
import uvloop
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.environment import describe_environment, version_of
from benchmark.router_worker import CHUNKS, FIRST_SECONDS, GAP_SECONDS
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

PLAIN_CALLERS = (1, 16, 64)
STREAMS = (1, 16, 64, 256)
PLAIN_REQUESTS = {1: 400, 16: 1500, 64: 2500}
WORKERS = 2
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
INDEX_PAGES = 1_000_000
STREAM_SECONDS = FIRST_SECONDS + (CHUNKS - 1) * GAP_SECONDS
PLAIN_BODY = json.dumps({"text": "word " * 100, "sampling_params": {"max_new_tokens": 1}}).encode()
STREAM_BODY = json.dumps({"text": "word " * 100, "stream": True}).encode()
IDS_BODY = json.dumps({"input_ids": list(range(1000, 3000)), "stream": True}).encode()
FIRST_BYTE_GOALS_MS = {"P50": 1.0, "P99": 5.0}  # added to direct, at every number of streams
PLAIN_GOAL = "added P50, ours / sglang-router (1 caller)"
CORE_GOAL = "requests/s of one core, ours / sglang-router (64 callers)"


def first_byte_goal(streams: int, percentile_name: str) -> str:
    return f"streamed first byte added, {percentile_name} ms (ours, {streams} streams)"


GOALS = {
    **{
        first_byte_goal(streams, name): ("<=", goal)
        for streams in STREAMS
        for name, goal in FIRST_BYTE_GOALS_MS.items()
    },
    PLAIN_GOAL: ("<=", 1.0),
    CORE_GOAL: (">=", 0.5),
}
# Index memory in a process of its own: resident bytes before and after.
INDEX_SCRIPT = """
import json, resource
import numpy as np
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
def resident():
    return int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize()
pages, chain = {pages}, 2000
generator = np.random.default_rng(1)
index = LocationIndex()
index.stored('w', Level.DEVICE, [1])
before = resident()
for start in range(0, pages, chain):
    hashes = generator.integers(-2**62, 2**62, chain).tolist()
    index.stored('w%d' % (start % 8), Level.HOST, hashes)
print(json.dumps({{'bytes': resident() - before, 'pages': index.stats().pages}}))
"""

console = Console()


class Caller(asyncio.Protocol):
    """One keep-alive connection that measures its exchanges."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.parser = httptools.HttpResponseParser(self)
        self.done: asyncio.Future[None] | None = None
        self.status = 0
        self.pieces = 0
        self.first = 0.0

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, error: Exception | None) -> None:
        if self.done is not None and not self.done.done():
            self.done.set_exception(ConnectionError("closed in the middle of an answer"))

    def on_body(self, body: bytes) -> None:
        if not self.pieces:
            self.first = perf_counter()
        self.pieces += 1

    def on_message_complete(self) -> None:
        self.status = self.parser.get_status_code()
        assert self.done is not None
        self.done.set_result(None)

    async def call(self, request: bytes) -> tuple[float, float]:
        """Seconds to the first byte of the body, and to the end."""
        self.pieces = 0
        self.done = asyncio.get_running_loop().create_future()
        began = perf_counter()
        self.transport.write(request)
        await self.done
        if self.status != 200:
            raise RuntimeError(f"status {self.status}")
        return self.first - began, perf_counter() - began


@dataclass(frozen=True, slots=True)
class Arm:
    """Where callers connect, and whose processor time is counted; pid 0: nobody's."""

    name: str
    ports: tuple[int, ...]
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Load:
    """`callers` connections share `requests` of one body."""

    name: str
    callers: int
    requests: int
    body: bytes


def request_bytes(body: bytes) -> bytes:
    head = "POST /generate HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def processor_seconds(pid: int) -> float:
    """User and system time of a process, all its threads."""
    if not pid:
        return 0.0
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_SECOND


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


async def measure(arm: Arm, load: Load) -> dict[str, float]:
    """One load on one arm."""
    loop = asyncio.get_running_loop()
    callers: list[Caller] = []
    for number in range(load.callers):
        port = arm.ports[number % len(arm.ports)]
        _transport, caller = await loop.create_connection(Caller, "127.0.0.1", port)
        callers.append(caller)
    request = request_bytes(load.body)
    for start in range(0, len(callers), 16):
        await asyncio.gather(
            *(c.call(request_bytes(PLAIN_BODY)) for c in callers[start : start + 16])
        )
    left = load.requests
    first: list[float] = []
    total: list[float] = []
    pieces = 0

    async def work(number: int, caller: Caller) -> None:
        nonlocal left, pieces
        if load.body is not PLAIN_BODY:
            # Streams of one length would otherwise begin and end all at once, for ever.
            await asyncio.sleep(STREAM_SECONDS * number / load.callers)
        while left > 0:
            left -= 1
            to_first, to_end = await caller.call(request)
            first.append(to_first)
            total.append(to_end)
            pieces += caller.pieces

    began, spent = perf_counter(), processor_seconds(arm.pid)
    await asyncio.gather(*(work(number, caller) for number, caller in enumerate(callers)))
    seconds, spent = perf_counter() - began, processor_seconds(arm.pid) - spent
    for caller in callers:
        caller.transport.close()
    return {
        "first_p50_ms": 1e3 * percentile(first, 0.5),
        "first_p99_ms": 1e3 * percentile(first, 0.99),
        "total_p50_ms": 1e3 * percentile(total, 0.5),
        "total_p99_ms": 1e3 * percentile(total, 0.99),
        "requests_per_second": len(first) / seconds,
        "chunks_per_second": pieces / seconds,
        "processor_us_per_request": 1e6 * spent / len(first),
    }


def loads() -> list[Load]:
    plain = [Load(f"plain {n}", n, PLAIN_REQUESTS[n], PLAIN_BODY) for n in PLAIN_CALLERS]
    streams = [Load(f"stream {n}", n, max(20, 2 * n), STREAM_BODY) for n in STREAMS]
    return [*plain, *streams, Load("ids 16", 16, 64, IDS_BODY)]


def start_servers(directory: Path) -> tuple[list[WorkerProcess], list[Arm]]:
    """Fake workers and routers as processes, all answering."""
    python = sys.executable
    ports = [free_port() for _ in range(WORKERS)]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    commands: dict[str, tuple[list[str], int]] = {}
    for number, port in enumerate(ports):
        command = [python, "-m", "benchmark.router_worker", str(port)]
        commands[f"worker-{number}"] = (command, port)
    for name, words in {
        "sglang-router": ["sglang_router.launch_router", "--policy", "round_robin"],
        "ours": ["symphony_sglang.launch_router", "--policy", "round_robin"],
        "ours, symphony": ["symphony_sglang.launch_router"],
    }.items():
        port = free_port()
        command = [
            python, "-m", *words, "--host", "127.0.0.1", "--port", str(port), "--log-level", "warn",
            "--prometheus-port", str(free_port()), "--worker-urls", *urls,
        ]  # fmt: skip
        commands[name] = (command, port)
    processes: dict[str, WorkerProcess] = {}
    try:
        for name, (command, port) in commands.items():
            log = directory / f"{name.replace(', ', '-')}.log"
            process = WorkerProcess((), command=command, port=port, log_path=log)
            process.start()
            processes[name] = process
        for process in processes.values():
            process.wait_ready(60)
    except BaseException:
        for process in processes.values():
            process.stop()
        raise
    arms = [Arm("direct", tuple(ports))]
    for name, process in processes.items():
        if not name.startswith("worker-"):
            assert process.process is not None
            arms.append(Arm(name, (process.port,), process.process.pid))
    return list(processes.values()), arms


async def wait_for_workers(arms: list[Arm]) -> None:
    """Until a request passes each router; they look for their workers after they answer."""
    loop = asyncio.get_running_loop()
    for arm in arms:
        for _ in range(200):
            _transport, caller = await loop.create_connection(Caller, "127.0.0.1", arm.ports[0])
            try:
                await caller.call(request_bytes(PLAIN_BODY))
                break
            except (RuntimeError, ConnectionError):
                await asyncio.sleep(0.1)
            finally:
                caller.transport.close()


async def run_rounds(arms: list[Arm], rounds: int) -> dict[str, dict[str, list[dict[str, float]]]]:
    """load -> arm -> one measurement a round."""
    await wait_for_workers(arms)
    results: dict[str, dict[str, list[dict[str, float]]]] = {}
    with Progress(console=console) as progress:
        bar = progress.add_task("rounds", total=rounds * len(loads()) * len(arms))
        for number in range(rounds):
            turned = arms[number % len(arms) :] + arms[: number % len(arms)]
            for load in loads():
                for arm in turned:
                    figures = await measure(arm, load)
                    results.setdefault(load.name, {}).setdefault(arm.name, []).append(figures)
                    progress.advance(bar)
    return results


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def summarize(results: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """Medians with the lowest and the highest round, and what each arm adds to direct."""
    summary: dict[str, Any] = {}
    for load, arms in results.items():
        direct = arms["direct"]
        summary[load] = {}
        for arm, rounds in arms.items():
            figures = {key: spread([r[key] for r in rounds]) for key in rounds[0]}
            for key in ("first_p50_ms", "first_p99_ms", "total_p50_ms"):
                pairs = zip(rounds, direct, strict=True)
                figures[f"added_{key}"] = spread([mine[key] - base[key] for mine, base in pairs])
            summary[load][arm] = figures
    return summary


def ratios(results: dict[str, dict[str, list[dict[str, float]]]]) -> dict[str, Any]:
    """What the goals are about; ratios are within a round."""

    def rows(load: str, arm: str) -> list[dict[str, float]]:
        return results[load][arm]

    def added(load: str, arm: str, key: str) -> list[float]:
        pairs = zip(rows(load, arm), rows(load, "direct"), strict=True)
        return [mine[key] - base[key] for mine, base in pairs]

    ours, stock = (added("plain 1", arm, "total_p50_ms") for arm in ("ours", "sglang-router"))
    cost = {
        arm: [r["processor_us_per_request"] for r in rows("plain 64", arm)]
        for arm in ("ours", "sglang-router")
    }
    first_bytes = {
        first_byte_goal(streams, name): spread(
            added(f"stream {streams}", "ours", f"first_{name.lower()}_ms")
        )
        for streams in STREAMS
        for name in FIRST_BYTE_GOALS_MS
    }
    return {
        **first_bytes,
        PLAIN_GOAL: spread([a / b for a, b in zip(ours, stock, strict=True)]),
        CORE_GOAL: spread(
            [b / a for a, b in zip(cost["ours"], cost["sglang-router"], strict=True)]
        ),
    }


def index_memory() -> dict[str, float]:
    script = INDEX_SCRIPT.format(pages=INDEX_PAGES)
    answer = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    found = json.loads(answer)
    return {**found, "bytes_per_page": found["bytes"] / found["pages"]}


def plot(summary: dict[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colors = {"sglang-router": "#c2603c", "ours": "#2f9e6e", "ours, symphony": "#3b7dd8"}
    for arm, color in colors.items():
        for key, style in (("added_first_p50_ms", "-"), ("added_first_p99_ms", ":")):
            values = [summary[f"stream {n}"][arm][key] for n in STREAMS]
            middle = [max(v["median"], 0.01) for v in values]
            left.plot(STREAMS, middle, style, marker="o", color=color,
                      label=f"{arm}, {'P50' if style == '-' else 'P99'}")  # fmt: skip
    left.set_xscale("log", base=2)
    left.set_yscale("log")
    left.set_xlabel("streams")
    left.set_ylabel("first byte: added to direct, ms")
    left.legend(fontsize=7)
    left.set_title("Streamed")
    names = ["direct", *colors]
    for position, arm in enumerate(names):
        for offset, callers in zip((-0.27, 0.0, 0.27), PLAIN_CALLERS, strict=True):
            rate = summary[f"plain {callers}"][arm]["requests_per_second"]
            error = [[rate["median"] - rate["low"]], [rate["high"] - rate["median"]]]
            right.bar(position + offset, rate["median"], width=0.25, yerr=error,
                      color=colors.get(arm, "#9aa0a6"), alpha=0.5 + offset)  # fmt: skip
    right.set_xticks(range(len(names)), names)
    right.set_yscale("log")
    right.set_ylabel("requests/s (1, 16, 64 callers)")
    right.set_title("Not streamed")
    figure.savefig(path, dpi=130)


def print_summary(document: dict[str, Any]) -> None:
    table = Table(title="median (low to high over rounds)")
    for column in ("load", "arm", "first P50 ms", "first P99 ms", "added P50 ms", "requests/s",
                   "chunks/s", "CPU us/request"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("load", "arm") else "right")
    keys = ("first_p50_ms", "first_p99_ms", "added_first_p50_ms", "requests_per_second",
            "chunks_per_second", "processor_us_per_request")  # fmt: skip
    for load, arms in document["loads"].items():
        for arm, figures in arms.items():
            cells = [figures[key] for key in keys]
            words = [f"{c['median']:.4g} ({c['low']:.3g} to {c['high']:.3g})" for c in cells]
            table.add_row(load, arm, *words)
    console.print(table)
    for name, entry in document["goals"].items():
        value = entry["value"]
        console.print(
            f"{name}: {value['median']:.2f} ({value['low']:.2f} to {value['high']:.2f}), "
            f"goal {entry['goal']}: {'reached' if entry['reached'] else 'not reached'}"
        )
    memory = document["index_memory"]
    console.print(f"index: {memory['bytes_per_page']:.0f} bytes a page at {memory['pages']} pages")


def run(rounds: int, directory: Path) -> dict[str, Any]:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as logs:
        processes, arms = start_servers(Path(logs))
        try:
            results = uvloop.run(run_rounds(arms, rounds))
        finally:
            for process in processes:
                process.stop()
    found = ratios(results)
    document = {
        "environment": {**describe_environment(), "sglang-router": version_of("sglang-router")},
        "rounds": rounds,
        "loads": summarize(results),
        "goals": {
            name: {
                "goal": f"{sign} {goal:g}",
                "value": found[name],
                "reached": bool(
                    found[name]["median"] <= goal if sign == "<=" else found[name]["median"] >= goal
                ),
            }
            for name, (sign, goal) in GOALS.items()
        },
        "index_memory": index_memory(),
    }
    (directory / "router.json").write_text(json.dumps(document, indent=1) + "\n")
    plot(document["loads"], directory / "router.png")
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("benchmark/results/local"))
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds is {arguments.rounds}; expected at least 1")
    print_summary(run(arguments.rounds, arguments.output))


if __name__ == "__main__":
    main()
