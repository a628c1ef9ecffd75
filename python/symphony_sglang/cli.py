"""The ``symphony`` command: one parser, and a module behind each of its words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from symphony_sglang import __version__
from symphony_sglang.errors import SymphonyError
from symphony_sglang.workload import demo, replay, tiny_model


def make_parser(*, with_store: bool = False) -> argparse.ArgumentParser:
    """`with_store` loads the page store's own parser; without it, its word stands in the help."""
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
    if with_store:
        from symphony_sglang.store import tool

        tool.add_parser(commands)
    else:
        commands.add_parser("store", help="look at, verify or compact an NVMe page store")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; 2 with one line on standard error where its input is wrong."""
    words = sys.argv[1:] if argv is None else list(argv)
    arguments = make_parser(with_store=words[:1] == ["store"]).parse_args(words)
    try:
        return int(arguments.run(arguments))
    except SymphonyError as error:
        print(f"symphony: {error.code}: {error}", file=sys.stderr)
        return 1 if error.code == "server_unavailable" else 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
