"""The ``symphony`` command: one parser, and a module behind each of its words."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from symphony_sglang import __version__
from symphony_sglang.errors import SymphonyError
from symphony_sglang.workload import demo, replay, tiny_model

# Commands whose modules are loaded only when they are asked for: what adds the parser, and help.
TERMINAL = {
    "chat": (
        "symphony_sglang.terminal.chat:add_parser",
        "talk to a model; what you are about to need is fetched while you type",
    ),
    "top": (
        "symphony_sglang.terminal.top:add_parser",
        "watch workers, levels, sessions, advisories and moves",
    ),
    "advise": (
        "symphony_sglang.terminal.ask:add_advise_parser",
        "say that a session will be back soon",
    ),
    "session": (
        "symphony_sglang.terminal.ask:add_session_parser",
        "show where a session's tokens are, or end it",
    ),
    "simulate": (
        "symphony_sglang.sim.command:add_parser",
        "simulate workers, router and users in virtual time",
    ),
}

# Commands that parse their own flags: what runs them, and help.
OWN_PARSERS = {
    "router": ("symphony_sglang.launch_router:main", "a router in front of workers"),
    "cluster": ("symphony_sglang.cluster:main", "workers and a router on this machine"),
}


def add_terminal_parsers(commands: Any, word: str) -> None:
    """The parser of `word` whole; of the others only their line in the help."""
    for name, (place, words) in TERMINAL.items():
        if name == word:
            module, _, function = place.partition(":")
            getattr(importlib.import_module(module), function)(commands)
        else:
            commands.add_parser(name, help=words)


def make_parser(word: str = "", *, with_store: bool = False) -> argparse.ArgumentParser:
    """`with_store` loads the page store's own parser, `word` that of a terminal command; without
    them, their words stand in the help."""
    parser = argparse.ArgumentParser(
        prog="symphony",
        description="Tools of symphony_sglang. The server itself: "
        "python -m symphony_sglang.launch_server --help",
    )
    parser.add_argument("--version", action="version", version=f"symphony {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_parser(commands)
    replay.add_parser(commands)
    tiny_model.add_parser(commands)
    add_terminal_parsers(commands, word)
    for name, (_place, words) in OWN_PARSERS.items():
        commands.add_parser(name, help=words, add_help=False)
    if with_store:
        from symphony_sglang.store import tool

        tool.add_parser(commands)
    else:
        commands.add_parser("store", help="look at, verify or compact an NVMe page store")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; 2 with one line on standard error where its input is wrong."""
    words = sys.argv[1:] if argv is None else list(argv)
    word = words[0] if words else ""
    try:
        if word in OWN_PARSERS:
            module, _, function = OWN_PARSERS[word][0].partition(":")
            return int(getattr(importlib.import_module(module), function)(words[1:]))
        arguments = make_parser(word, with_store=word == "store").parse_args(words)
        return int(arguments.run(arguments))
    except SymphonyError as error:
        print(f"symphony: {error.code}: {error}", file=sys.stderr)
        return 1 if error.code == "server_unavailable" else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
