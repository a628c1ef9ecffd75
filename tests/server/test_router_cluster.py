"""``symphony cluster``: two real workers and a router, up together and gone together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from symphony_sglang.workload.worker_process import free_port, group_members

pytestmark = pytest.mark.server


def test_cluster_serves_and_ctrl_c_leaves_nothing(model: Path, tmp_path: Path) -> None:
    port = free_port()
    process = subprocess.Popen(
        [
            sys.executable, "-m", "symphony_sglang.cli", "cluster", "--model-path", str(model),
            "--workers", "2", "--port", str(port), "--log-dir", str(tmp_path / "logs"),
            "--api-key", "secret", "--max-total-tokens", "2048", "--symphony-host-gb", "0.1",
            "--symphony-nvme-gb", "0", "--router-policy", "round_robin",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line.startswith("ready:"):
                break
        assert lines[-1].startswith("ready: 2 workers"), "".join(lines)

        def call(path: str, body: object = None) -> dict[str, object]:
            data = None if body is None else json.dumps(body).encode()
            headers = {"Content-Type": "application/json", "Authorization": "Bearer secret"}
            request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers)
            with urllib.request.urlopen(request, timeout=60) as answer:
                return dict(json.loads(answer.read()))

        for _ in range(2):
            answer = call("/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 2}})
            assert answer["meta_info"]
        workers = call("/workers")["workers"]
        assert isinstance(workers, list)
        assert len(workers) == 2
        assert sorted(path.name for path in (tmp_path / "logs").iterdir()) == [
            "router.log", "worker-0.log", "worker-1.log",
        ]  # fmt: skip
        groups = [int(pid) for pid in children(process.pid)]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        deadline = time.monotonic() + 10  # noqa: TID251 - a test of real processes
        while any(group_members(group) for group in groups):
            assert time.monotonic() < deadline  # noqa: TID251
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            for group in children(process.pid):
                os.killpg(int(group), signal.SIGKILL)


def children(pid: int) -> list[str]:
    """Direct children; each leads a process group of its own."""
    path = Path(f"/proc/{pid}/task/{pid}/children")
    return path.read_text().split() if path.exists() else []
