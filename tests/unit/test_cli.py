"""The ``symphony`` command as a user meets it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from symphony_sglang import __version__, cli

HEAVY = ("torch", "transformers", "sglang", "aiohttp", "numpy", "rich", "tokenizers")


def test_help_names_every_command_and_loads_nothing_heavy() -> None:
    program = (
        "import sys\nfrom symphony_sglang import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit as error:\n    code = error.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print('loaded', loaded, 'code', code)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    for command in ("demo", "replay", "tiny-model"):
        assert f"    {command}" in done.stdout
    assert done.stdout.splitlines()[-1] == "loaded [] code 0"


@pytest.mark.parametrize("command", ["demo", "replay", "tiny-model"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    assert command in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"symphony {__version__}\n"


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["replay"]])
def test_wrong_words_exit_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(words)
    assert "usage: symphony" in capsys.readouterr().err
