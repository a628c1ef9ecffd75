"""The servers that a benchmark compares, each by the command that starts it.

All run on the same platform, model, attention and device level. What differs is what keeps and
brings KV:

- `recompute`: no prefix cache at all;
- `device`: SGLang's radix cache, device level only;
- `hicache`: SGLang's own hierarchical cache, host level and file backend, as released;
- `symphony`: ours.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from symphony_sglang.workload.worker_process import HOST, WorkerProcess, free_port

PAGE_SIZE = 16
STOCK_FILE_DIRECTORY = "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"
KINDS = ("recompute", "device", "hicache", "symphony")


@dataclass(frozen=True, slots=True)
class Levels:
    """Sizes that all compared servers share; `nvme_gb` bounds ours, the file backend has none."""

    device_tokens: int
    host_gb: float
    nvme_gb: float = 8.0


@contextlib.contextmanager
def cores_of(part: int, parts: int) -> Iterator[None]:
    """Processes started within have this part of the cores, as a machine of their own would.

    Where there are fewer cores than parts, they share all.
    """
    before = sorted(os.sched_getaffinity(0))
    size = len(before) // parts
    end = len(before) if part == parts - 1 else (part + 1) * size
    os.sched_setaffinity(0, before[part * size : end] if size else before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def server(
    kind: str,
    model: Path,
    levels: Levels,
    directory: Path,
    *,
    flags: tuple[str, ...] = (),
    port: int | None = None,
) -> WorkerProcess:
    """A server that is not started yet; what it writes stays under `directory`."""
    port = port or free_port()
    common = [
        *("--model-path", str(model)),
        *("--port", str(port)),
        *("--max-total-tokens", str(levels.device_tokens)),
        *("--page-size", str(PAGE_SIZE)),
        *("--chunked-prefill-size", "8192"),
        "--enable-cache-report",
        *flags,
    ]
    if kind == "symphony":
        ours = [
            *("--symphony-host-gb", str(levels.host_gb)),
            *("--symphony-nvme-dir", str(directory / "pages")),
            *("--symphony-nvme-gb", str(levels.nvme_gb)),
        ]
        return WorkerProcess([*common, *ours], log_path=directory / "server.log")
    stock = {
        # The portable platform, whose attention is the same in every arm.
        "SYMPHONY_FORCE_CPU_PLATFORM": "1",
        # Sizes the host pool below SGLang's own cache, which is far smaller than it would take.
        "SYMPHONY_HOST_GB": str(levels.host_gb),
        STOCK_FILE_DIRECTORY: str(directory / "pages"),
    }
    extra = {
        "recompute": ["--disable-radix-cache"],
        "device": [],
        "hicache": [
            "--enable-hierarchical-cache",
            *("--hicache-ratio", "2"),
            *("--hicache-write-policy", "write_through"),
            *("--hicache-mem-layout", "page_first_direct"),
            *("--hicache-io-backend", "direct"),
            *("--hicache-storage-backend", "file"),
        ],
    }[kind]
    (directory / "pages").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "sglang.launch_server", "--device", "cpu", *common, *extra]
    return WorkerProcess(
        [],
        command=[*command, "--host", HOST, "--sleep-on-idle"],
        port=port,
        log_path=directory / "server.log",
        environment=stock,
    )
