"""Page transfer between two processes beside a raw TCP stream, on loopback, in one run.

    python -m benchmark.migrate [--rounds N] [--megabytes 16 64 256] [--output DIR]

Every sample connects anew, as a pull does. All arms take turns within every round, on memory that
was touched before, and a ratio is taken within its round, to the faster of the two raw streams
(socket buffers of 256 KB, and the kernel's own). CPU is of both processes together.
"""

from __future__ import annotations

import argparse
import json
import mmap
import multiprocessing
import resource
import socket
import statistics
import threading
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmark.environment import describe_environment
from symphony_sglang.clock import SystemClock
from symphony_sglang.wire.page_client import ClientSettings, PageClient
from symphony_sglang.wire.page_server import PageServer
from symphony_sglang.wire.pages import PeerIdentity
from symphony_sglang.wire.pull import Pull, PullEnd
from symphony_sglang.wire.secure_channel import TransferKey

PAGE_BYTES = {"100 KB": 102_400, "1 MB": 1 << 20, "4 MB": 4 << 20}
SECRET = "a key for the benchmark only"
GOAL = 0.8
RAW_BUFFERS = {"raw TCP, 256 KB buffers": 256 * 1024, "raw TCP, kernel's buffers": 0}
RAW_STEP = 1 << 20
WINDOWS = 4

console = Console()
clock = SystemClock()


class Sample(NamedTuple):
    gigabytes_per_second: float
    cpu_seconds_per_gigabyte: float


def touched(size: int) -> memoryview:
    """Memory whose pages the kernel has backed already."""
    view = memoryview(mmap.mmap(-1, size))
    np.frombuffer(view, np.uint8)[:] = 7
    return view


def hashes_of(count: int) -> list[bytes]:
    return [at.to_bytes(32, "little") for at in range(count)]


def identity(page_bytes: int) -> PeerIdentity:
    return PeerIdentity(
        model="benchmark", revision="", dtype="bfloat16", layout="page_first_direct",
        page_tokens=16, page_bytes=page_bytes,
    )  # fmt: skip


class PoolPages:
    """A pool in memory, as a host level is: page `n` under hash `n`, K and V apart."""

    def __init__(self, memory: memoryview, page_bytes: int) -> None:
        half = page_bytes // 2
        self._views = [
            (memory[at : at + half], memory[at + half : at + page_bytes])
            for at in range(0, len(memory) // page_bytes * page_bytes, page_bytes)
        ]

    def lookup(self, hashes: Sequence[bytes]) -> list[bool]:
        return [int.from_bytes(key, "little") < len(self._views) for key in hashes]

    def at_hand(self, hashes: Sequence[bytes]) -> bool:
        return True

    def open(self, hashes: Sequence[bytes]) -> OpenPool:
        return OpenPool([self._views[int.from_bytes(key, "little")] for key in hashes])


class OpenPool:
    def __init__(self, views: list[Sequence[memoryview] | None]) -> None:
        self.views = views

    def unchanged(self) -> list[bool]:
        return [True] * len(self.views)

    def release(self) -> None:
        pass


class PoolSink:
    """A pool that pages land in; it counts, and keeps nothing."""

    def __init__(self, memory: memoryview, page_bytes: int) -> None:
        self._free = [
            memory[at : at + page_bytes]
            for at in range(0, len(memory) // page_bytes * page_bytes, page_bytes)
        ]
        self._lock = threading.Lock()
        self.stored = 0

    def present(self, hashes: Sequence[bytes]) -> list[bool]:
        return [False] * len(hashes)

    def reserve(self, hashes: Sequence[bytes]) -> PoolReservation | None:
        with self._lock:
            if len(self._free) < len(hashes):
                return None
            return PoolReservation(self, [self._free.pop() for _ in hashes])

    def give_back(self, buffers: list[memoryview]) -> None:
        with self._lock:
            self._free.extend(buffers)


class PoolReservation:
    def __init__(self, sink: PoolSink, buffers: list[memoryview]) -> None:
        self._sink = sink
        self.buffers = buffers

    def commit(self, lengths: Sequence[int | None]) -> list[bool]:
        self._sink.give_back(self.buffers)
        self._sink.stored += sum(length is not None for length in lengths)
        return [length is not None for length in lengths]

    def abort(self) -> None:
        self._sink.give_back(self.buffers)


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def raw_server(memory: memoryview, buffer_bytes: int) -> socket.socket:
    """Answers an 8-byte size with so many bytes, on each connection once."""
    listener = socket.create_server(("127.0.0.1", 0))
    if buffer_bytes:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)

    def run() -> None:
        while True:
            sock, _ = listener.accept()
            with sock:
                left = int.from_bytes(sock.recv(8), "little")
                while left:
                    # The same memory as the pages', of which no cache holds much.
                    step = memory[:left]
                    sock.sendall(step)
                    left -= len(step)

    threading.Thread(target=run, daemon=True).start()
    return listener


def serve(control: Connection, size: int) -> None:
    """The other process: every server there is, until told to stop."""
    memory = touched(size)
    ports: dict[str, Any] = {
        name: raw_server(memory, size).getsockname()[1] for name, size in RAW_BUFFERS.items()
    }
    servers = []
    for page_bytes in PAGE_BYTES.values():
        for key in (None, TransferKey(SECRET)):
            server = PageServer(PoolPages(memory, page_bytes), identity(page_bytes), key=key)
            servers.append(server)
            ports[f"{page_bytes}{'+' if key else ''}"] = server.address
    control.send(ports)
    while control.recv() == "cpu":
        control.send(cpu_seconds())
    for server in servers:
        server.close()


def receive_raw(port: int, size: int, memory: memoryview, buffer_bytes: int) -> None:
    with socket.socket() as sock:
        if buffer_bytes:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        sock.connect(("127.0.0.1", port))
        sock.sendall(size.to_bytes(8, "little"))
        at = 0
        while at < size:
            start = at % len(memory)
            count = min(size - at, RAW_STEP, len(memory) - start)
            at += sock.recv_into(memory[start:], count, socket.MSG_WAITALL)


def pull_pages(
    address: str, page_bytes: int, size: int, sink: PoolSink, *, key: bool, local: bool
) -> None:
    def connect() -> PageClient:
        return PageClient(
            address,
            identity(page_bytes),
            key=TransferKey(SECRET) if key else None,
            settings=ClientSettings(local=local),
        )

    hashes = hashes_of(size // page_bytes)
    report = Pull(connect, sink, hashes, page_bytes, clock=clock).run()
    if report.end is not PullEnd.COMPLETE or (report.way == "local") != local:
        raise SystemExit(f"the pull did not do what it is measured for: {report}")


def measure(control: Connection, size: int, work: Callable[[], None]) -> Sample:
    def both() -> float:
        control.send("cpu")
        return cpu_seconds() + float(control.recv())

    cpu, start = both(), clock.monotonic()
    work()
    seconds = clock.monotonic() - start
    return Sample(size / 1e9 / seconds, (both() - cpu) / (size / 1e9))


def arms_of(
    ports: dict[str, Any], page_bytes: int, size: int, memory: memoryview
) -> dict[str, Callable[[], None]]:
    size = size // page_bytes * page_bytes
    sink = PoolSink(memory, page_bytes)
    plain, secure = ports[f"{page_bytes}"], ports[f"{page_bytes}+"]
    return {
        **{
            name: lambda name=name, buffer=buffer: receive_raw(ports[name], size, memory, buffer)
            for name, buffer in RAW_BUFFERS.items()
        },
        "pages": lambda: pull_pages(plain, page_bytes, size, sink, key=False, local=False),
        "pages, encrypted": lambda: pull_pages(
            secure, page_bytes, size, sink, key=True, local=False
        ),
        "pages, one host": lambda: pull_pages(plain, page_bytes, size, sink, key=False, local=True),
    }


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def run(rounds: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    biggest = max(sizes)
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs, biggest))
    process.start()
    rows = []
    try:
        ports = ours.recv()
        memory = touched(max(WINDOWS * (16 << 20), *PAGE_BYTES.values()))
        for title, page_bytes in PAGE_BYTES.items():
            for size in sizes:
                arms = arms_of(ports, page_bytes, size, memory)
                samples: dict[str, list[Sample]] = {name: [] for name in arms}
                names = list(arms)
                for number in range(rounds + 1):
                    for name in names[number % len(names) :] + names[: number % len(names)]:
                        sample = measure(ours, size, arms[name])
                        if number:  # round 0 warms up
                            samples[name].append(sample)
                rows.append({"page": title, "megabytes": size >> 20, "samples": samples})
        ours.send("stop")
    finally:
        process.join(10)
        if process.is_alive():
            process.terminate()
    return rows


def ratios(samples: dict[str, list[Sample]], arm: str) -> list[float]:
    raw = [samples[name] for name in RAW_BUFFERS]
    return [
        sample.gigabytes_per_second / max(one[at].gigabytes_per_second for one in raw)
        for at, sample in enumerate(samples[arm])
    ]


def show(rows: list[dict[str, Any]]) -> bool:
    table = Table(title="Page transfer on loopback: median (lowest-highest)")
    for column in ("page", "MB", "arm", "GB/s", "x raw TCP", "CPU s/GB"):
        table.add_column(column, justify="left" if column == "arm" else "right")
    reached = True
    for row in rows:
        for arm, samples in row["samples"].items():
            ratio = ratios(row["samples"], arm)
            if arm == "pages":
                reached = reached and statistics.median(ratio) >= GOAL
            table.add_row(
                row["page"],
                str(row["megabytes"]),
                arm,
                spread([sample.gigabytes_per_second for sample in samples]),
                spread(ratio),
                spread([sample.cpu_seconds_per_gigabyte for sample in samples]),
            )
        table.add_section()
    console.print(table)
    console.print(f"goal: pages at {GOAL} of raw TCP or more: {'yes' if reached else 'NO'}")
    return reached


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--output", type=Path, help="folder for migrate.json")
    arguments = parser.parse_args()
    rows = run(arguments.rounds, [size << 20 for size in arguments.megabytes])
    show(rows)
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        body = {"environment": describe_environment(), "rounds": arguments.rounds, "rows": rows}
        (arguments.output / "migrate.json").write_text(json.dumps(body, indent=1))


if __name__ == "__main__":
    main()
