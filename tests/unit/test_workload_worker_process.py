"""Child processes: readiness, the story of a failure, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from symphony_sglang.errors import ConfigError, ServerUnavailableError
from symphony_sglang.workload import worker_process
from symphony_sglang.workload.worker_process import (
    WorkerProcess,
    free_port,
    group_members,
    port_of,
)

# A server that answers /health after a moment, with a child of its own that ignores SIGTERM.
PROGRAM = """
import http.server, signal, subprocess, sys, time
port, stubborn = int(sys.argv[1]), sys.argv[2] == "stubborn"
child = subprocess.Popen([sys.executable, "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"])
print("loading the model", flush=True)
if stubborn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
else:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
time.sleep(0.5)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def worker_of(tmp_path: Path, program: str, *arguments: str) -> WorkerProcess:
    port = free_port()
    command = [sys.executable, "-c", program, str(port), *arguments]
    return WorkerProcess([], command=command, port=port, log_path=tmp_path / "deep" / "worker.log")


def wait_for_group(group: int, count: int) -> list[int]:
    deadline = time.monotonic() + 20  # noqa: TID251 - waits for real processes
    while len(members := group_members(group)) < count:
        assert time.monotonic() < deadline, members  # noqa: TID251
        time.sleep(0.02)
    return members


@pytest.mark.parametrize("temper", ["kind", "stubborn"])
def test_stop_leaves_no_process(
    tmp_path: Path, temper: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "TERMINATE_SECONDS_MAX", 1.0)
    lines: list[str] = []
    with worker_of(tmp_path, PROGRAM, temper) as worker:
        assert worker.process is not None
        group = worker.process.pid
        assert worker.wait_ready(30, on_wait=lines.append) > 0
        assert len(wait_for_group(group, 2)) == 2
        assert worker.healthy()
    assert group_members(group) == []
    assert not worker.healthy()
    assert worker.process.returncode == (0 if temper == "kind" else -signal.SIGKILL)
    assert "loading the model" in lines
    worker.stop()  # again, and nothing happens


def test_stop_takes_the_children_of_a_server_that_died(tmp_path: Path) -> None:
    worker = worker_of(tmp_path, PROGRAM, "kind")
    worker.start()
    assert worker.process is not None
    wait_for_group(worker.process.pid, 2)
    worker.process.kill()
    worker.process.wait()
    assert group_members(worker.process.pid)
    worker.stop()
    assert group_members(worker.process.pid) == []


def test_an_interrupted_stop_still_leaves_nothing(tmp_path: Path) -> None:
    worker = worker_of(tmp_path, PROGRAM, "stubborn")
    worker.start()
    assert worker.process is not None
    group = worker.process.pid
    worker.wait_ready(30)

    def interrupt(*_: object) -> int:
        raise KeyboardInterrupt

    worker.process.wait = interrupt  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        worker.stop()
    deadline = time.monotonic() + 10  # noqa: TID251 - waits for real processes
    while group_members(group):
        assert time.monotonic() < deadline  # noqa: TID251
        time.sleep(0.02)
    del worker.process.wait
    worker.process.wait()


def test_a_server_that_ends_tells_its_last_words(tmp_path: Path) -> None:
    program = "import sys; print('no such model: /x'); sys.exit(3)"
    with worker_of(tmp_path, program) as worker, pytest.raises(ServerUnavailableError) as raised:
        worker.wait_ready(30)
    assert "ended with exit code 3" in str(raised.value)
    assert "no such model: /x" in str(raised.value)
    assert str(worker.log_path) in str(raised.value)


def test_a_server_that_never_answers_is_given_up(tmp_path: Path) -> None:
    class Jumping:
        now = 0.0

        def monotonic(self) -> float:
            self.now += 1.0
            return self.now

        def unix(self) -> float:
            return self.now

    program = "import time; print('still loading', flush=True); time.sleep(600)"
    worker = WorkerProcess(
        [],
        command=[sys.executable, "-c", program],
        port=free_port(),
        log_path=tmp_path / "log",
        clock=Jumping(),
        sleep=lambda _seconds: None,
    )
    worker.start()
    try:
        with pytest.raises(ServerUnavailableError, match="did not answer in 50 s"):
            worker.wait_ready(50)
    finally:
        worker.stop()


def test_a_command_that_cannot_run_is_named(tmp_path: Path) -> None:
    worker = WorkerProcess([], command=["/no/such/program"], port=1, log_path=tmp_path / "log")
    with pytest.raises(ServerUnavailableError, match="cannot run /no/such/program"):
        worker.start()
    worker.stop()


def test_the_port_is_read_from_the_arguments_or_chosen() -> None:
    assert port_of(["--port", "8000"]) == 8000
    assert port_of(["--port=8001", "--x", "--port", "8002"]) == 8002
    assert port_of(["--model-path", "m"]) is None
    with pytest.raises(ConfigError, match="--port is 'http'"):
        port_of(["--port", "http"])
    with pytest.raises(ConfigError, match="--port is ''"):
        port_of(["--port"])
    named = WorkerProcess(["--port", "8000"])
    assert named.url == "http://127.0.0.1:8000"
    assert named.command[1:] == ["-m", "symphony_sglang.launch_server", "--port", "8000"]
    chosen = WorkerProcess(["--model-path", "m"])
    assert chosen.command[-2:] == ["--port", str(chosen.port)]
    for worker in (named, chosen):
        worker.log_path.unlink()


def test_the_log_tail_is_bounded(tmp_path: Path) -> None:
    worker = WorkerProcess([], port=1, log_path=tmp_path / "log")
    assert worker.log_tail() == "(no log)"
    worker.log_path.write_bytes(b"first\n" + b"\xff" * 200_000 + b"\nlast\n")
    assert worker.last_line() == "last"
    assert len(worker.log_tail()) <= 64 << 10


def test_a_zombie_does_not_count_as_living() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], start_new_session=True)
    deadline = time.monotonic() + 20  # noqa: TID251 - waits for a real process
    while group_members(child.pid):
        assert time.monotonic() < deadline  # noqa: TID251
        time.sleep(0.02)
    os.kill(child.pid, 0)  # still in the table
    child.wait()
