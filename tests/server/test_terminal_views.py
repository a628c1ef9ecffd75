"""``symphony chat`` and ``symphony top`` in a real terminal, which tmux plays."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import DEVICE_TOKENS, Server
from symphony_sglang.client import SymphonyClient

pytestmark = pytest.mark.server

COLUMNS, ROWS = 100, 30


class Terminal:
    """One tmux server with one window."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "tmux"

    def tmux(self, *words: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self.socket), "-f", "/dev/null", *words],
            capture_output=True,
            text=True,
            timeout=30,
        )
        assert done.returncode == 0, (words, done.stderr)
        return done.stdout

    def start(self, *command: str) -> None:
        # The shell stays behind the command, so that its exit code and its terminal can be seen;
        # Ctrl-C reaches both, and the shell passes over it.
        after = "echo exit $?; stty -a | tr ' ' '\\n' | grep -e echo$; cat"
        line = f"trap : INT; env LC_ALL=C.UTF-8 {shlex.join(command)}; {after}"
        size = ("-x", str(COLUMNS), "-y", str(ROWS))
        self.tmux("-u", "new-session", "-d", *size, "sh", "-c", line)

    def keys(self, *keys: str) -> None:
        self.tmux("send-keys", *keys)

    def text(self, text: str) -> None:
        self.tmux("send-keys", "-l", text)

    def screen(self) -> str:
        return self.tmux("capture-pane", "-p")

    def until(self, pattern: str, seconds_max: float = 30.0) -> str:
        screen = ""
        for _ in range(int(seconds_max / 0.1)):
            screen = self.screen()
            if re.search(pattern, screen):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"{pattern!r} did not appear in {seconds_max:g} s:\n{screen}")


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    if shutil.which("tmux") is None:
        pytest.skip("no tmux on this machine")
    found = Terminal(tmp_path)
    yield found
    subprocess.run(["tmux", "-S", str(found.socket), "kill-server"], capture_output=True)


def symphony(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "symphony_sglang.cli", *words)


def advisories(client: SymphonyClient, session_id: str) -> list[str]:
    return [receipt.state for receipt in client.session_view(session_id).advisories]


def wait_advisories(client: SymphonyClient, session_id: str, states: list[str]) -> None:
    for _ in range(100):
        found = advisories(client, session_id)
        if found == states:
            return
        time.sleep(0.05)
    raise AssertionError(f"{found} and not {states} after 5 s")


def test_chat_advises_with_the_first_key(terminal: Terminal, worker: Server) -> None:
    worker.flush()
    terminal.start(
        *symphony("chat", "--url", worker.url, "--session", "tmux-1", "--max-tokens", "24")
    )
    terminal.until(r"you>\s*$")
    terminal.text("Tell me of the sea, naïve 東京 and all that, as long as you like. " * 3)
    terminal.keys("Enter")
    first = terminal.until(r"\[TTFT \d+ ms")
    assert re.search(r"prompt \d+: ", first)
    assert "advisory" not in first

    with SymphonyClient(worker.url) as client:
        assert advisories(client, "tmux-1") == []
        terminal.text("x")
        wait_advisories(client, "tmux-1", ["ready"])
        terminal.keys("BSpace")
        wait_advisories(client, "tmux-1", [])
        terminal.text("And more, p")
        wait_advisories(client, "tmux-1", ["ready"])
        terminal.text("lease 東")
        terminal.keys("BSpace")
        # The view of a terminal has no trailing spaces.
        screen = terminal.until(r"And more, please\s*$")
        assert "東\n" not in screen.splitlines()[-1]
        terminal.keys("Enter")
        second = terminal.until(r"advisory used, \d+\.\d\d s ahead")
        assert re.search(r"\d+ device", second)
        assert client.session_view("tmux-1").turns == 2
        terminal.keys("C-d")
        # The terminal is as it was: echo is on again.
        assert (
            re.search(r"\n-?echo\n", terminal.until(r"exit 0\n-?echo\n")).group().strip() == "echo"
        )
        client.release("tmux-1")


def test_chat_with_a_dead_server_says_so_at_once(terminal: Terminal) -> None:
    terminal.start(*symphony("chat", "--url", "http://127.0.0.1:9"))
    screen = terminal.until("exit 1")
    assert "server_unavailable" in screen


def test_chat_leaves_on_interrupt(terminal: Terminal, worker: Server) -> None:
    terminal.start(*symphony("chat", "--url", worker.url))
    terminal.until(r"you>\s*$")
    terminal.text("unsent")
    terminal.keys("C-c")
    terminal.until("exit 130")


def test_top_is_a_live_view_on_a_terminal(terminal: Terminal, worker: Server) -> None:
    worker.flush()
    terminal.start(*symphony("top", "--url", worker.url, "--interval", "0.2"))
    terminal.until(r"device .*host .*NVMe")
    before = terminal.until(r"(\d+) %")
    assert "cancelled" in before
    worker.greedy_one(list(range(300, 300 + DEVICE_TOKENS // 2)), 1)
    terminal.until(r"50 %")
    terminal.keys("C-c")
    terminal.until("exit 130")


def test_top_is_plain_lines_elsewhere(worker: Server) -> None:
    done = subprocess.run(
        symphony("top", "--url", worker.url, "--count", "2", "--interval", "0.2"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert (
        len([line for line in lines if re.search(rf" device used \d+ of {DEVICE_TOKENS} ", line)])
        == 2
    )
    assert "\x1b" not in done.stdout
    assert lines[-1].startswith("advisories used ")
