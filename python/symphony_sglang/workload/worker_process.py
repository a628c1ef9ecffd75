"""A server as a child process: started, waited for, and stopped with nothing left behind."""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ConfigError, ServerUnavailableError

HOST = "127.0.0.1"
# Below Linux's ephemeral range (32768 and up), above the well-known services.
PORT_RANGE = (20_000, 32_000)
PORT_TRIES_MAX = 200
READY_SECONDS_MAX = 300.0
TERMINATE_SECONDS_MAX = 20.0
KILL_SECONDS_MAX = 10.0
POLL_SECONDS = 0.2
HEALTH_SECONDS_MAX = 5.0
TAIL_LINES = 40
TAIL_BYTES_MAX = 64 << 10


def free_port() -> int:
    """A TCP port that nothing listens on now.

    Outside the range from which the system serves outgoing connections: there, a client of another
    server would take it before the worker, which binds only after it has loaded its model.
    """
    chooser = random.SystemRandom()
    for _ in range(PORT_TRIES_MAX):
        port = chooser.randrange(*PORT_RANGE)
        with socket.socket() as probe:
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise ServerUnavailableError(f"no free port found in {PORT_RANGE} in {PORT_TRIES_MAX} tries")


def port_of(arguments: Sequence[str]) -> int | None:
    """The value of ``--port`` in `arguments`, the last one as argparse has it."""
    port = None
    for index, word in enumerate(arguments):
        name, equals, value = word.partition("=")
        if name == "--port":
            value = value if equals else "".join(arguments[index + 1 : index + 2])
            if not value.isdecimal():
                raise ConfigError(f"--port is {value!r}; expected a number from 1 to 65535")
            port = int(value)
    return port


def group_members(group: int) -> list[int]:
    """Living processes of a process group; a zombie that nobody reaped yet does not live."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        # A process may end between the listing and the reading.
        with contextlib.suppress(OSError, ValueError, IndexError):
            # The name in parentheses may hold anything, spaces and parentheses included.
            state, _parent, its_group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                members.append(int(entry.name))
    return members


class WorkerProcess:
    """One server in a session and process group of its own, its output in a log file.

    Use as a context manager, or call ``start``, ``wait_ready`` and ``stop``. `arguments` go to
    ``python -m symphony_sglang.launch_server``; a free port is chosen where they name none. With
    `command`, that is run instead, as it stands, and `port` says where it will listen.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        command: Sequence[str] | None = None,
        port: int | None = None,
        log_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
        clock: Clock | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        given = port_of(arguments)
        self.port = port or given or free_port()
        if command is None:
            module = [sys.executable, "-m", "symphony_sglang.launch_server", *arguments]
            command = module if given else [*module, "--port", str(self.port)]
        self.command = list(command)
        self.url = f"http://{HOST}:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = log_path or new_log_path()
        self._environment = dict(environment or {})
        self._clock = clock or SystemClock()
        self._sleep = sleep

    def __enter__(self) -> WorkerProcess:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Start the process; returns at once.

        Raises:
            ServerUnavailableError: it cannot be started, or is running already.
        """
        if self.process is not None:
            raise ServerUnavailableError(f"the server at {self.url} was started before")
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        with self.log_path.open("wb") as log:
            self.process = self._spawn(log)

    def _spawn(self, log: IO[bytes]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self._environment},
                # So that Ctrl-C reaches us alone, and one signal reaches all that it starts.
                start_new_session=True,
            )
        except OSError as error:
            raise ServerUnavailableError(f"cannot run {self.command[0]}: {error}") from error

    def wait_ready(
        self,
        seconds_max: float = READY_SECONDS_MAX,
        on_wait: Callable[[str], None] | None = None,
    ) -> float:
        """Block until ``/health`` answers 200; gives the seconds it took.

        `on_wait` is called about five times a second with the last line of the log.

        Raises:
            ServerUnavailableError: the process ended, or the time is over; with the log's last
            lines.
        """
        started = self._clock.monotonic()
        while True:
            if self.healthy():
                return self._clock.monotonic() - started
            code = None if self.process is None else self.process.poll()
            if self.process is None or code is not None:
                raise ServerUnavailableError(self._story(f"ended with exit code {code}"))
            if self._clock.monotonic() - started >= seconds_max:
                raise ServerUnavailableError(self._story(f"did not answer in {seconds_max:g} s"))
            if on_wait is not None:
                on_wait(self.last_line())
            self._sleep(POLL_SECONDS)

    def _story(self, what: str) -> str:
        return f"the server at {self.url} {what}; the end of {self.log_path}:\n{self.log_tail()}"

    def healthy(self) -> bool:
        """Whether ``/health`` answers 200 now."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=HEALTH_SECONDS_MAX)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def log_tail(self, lines: int = TAIL_LINES) -> str:
        """The last `lines` lines that it wrote, at most 64 KiB of them."""
        try:
            with self.log_path.open("rb") as log:
                log.seek(max(0, self.log_path.stat().st_size - TAIL_BYTES_MAX))
                content = log.read().decode("utf-8", errors="replace")
        except OSError:
            return "(no log)"
        return "\n".join(deque(content.splitlines(), lines))

    def last_line(self) -> str:
        return self.log_tail(1).strip()

    def stop(self) -> None:
        """End it and everything it started: SIGTERM to it, then SIGKILL to what is left.

        Only the leader is asked, because it takes its children down in order; a child that is
        signalled first looks like a crash to it. Stopping twice, or before the start, does nothing.

        Raises:
            ServerUnavailableError: processes outlive SIGKILL (in uninterruptible I/O).
        """
        if self.process is None:
            return
        group = self.process.pid
        try:
            if self.process.poll() is None:
                self.process.send_signal(signal.SIGTERM)
                self.process.wait(TERMINATE_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also when the wait is interrupted: an impatient second Ctrl-C leaves nothing either.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        deadline = self._clock.monotonic() + KILL_SECONDS_MAX
        while self.process.poll() is None or group_members(group):
            if self._clock.monotonic() >= deadline:
                raise ServerUnavailableError(
                    f"processes {group_members(group)} of the server at {self.url} outlive SIGKILL"
                )
            self._sleep(0.02)


def new_log_path() -> Path:
    """A new empty file in the system's directory for temporary files."""
    handle, name = tempfile.mkstemp(prefix="symphony-worker-", suffix=".log")
    os.close(handle)
    return Path(name)
