"""``python -m symphony_sglang.launch_router``: a router in front of workers.

Takes sglang-router's flags. One that has no effect here stops the start, with the reason.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from symphony_sglang.errors import SymphonyError
from symphony_sglang.router.arguments import RouterSettings, add_arguments, parse_arguments

PROGRAM = "python -m symphony_sglang.launch_router"
LOG_FORMAT = "[%(asctime)s] %(levelname)s %(name)s: %(message)s"
LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "error": logging.ERROR,
}


def help_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="A router that knows where every prefix is. Flags as sglang-router has them.",
    )
    add_arguments(parser)
    return parser


def set_up_logging(settings: RouterSettings) -> None:
    handlers: list[logging.Handler] = [logging.StreamHandler()]
    if settings.log_dir:
        directory = Path(settings.log_dir)
        directory.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(directory / "router.log", encoding="utf-8"))
    logging.basicConfig(format=LOG_FORMAT, level=LEVELS[settings.log_level], handlers=handlers)


def run(settings: RouterSettings) -> None:
    """Serve until stopped.

    Raises:
        SymphonyError: it cannot start, with a one-line reason.
    """
    import uvloop

    from symphony_sglang.router.service import RouterService, load_tokens

    set_up_logging(settings)
    service = RouterService(settings, tokens=load_tokens(settings))
    uvloop.run(service.serve())


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 with one line on standard error when the settings cannot run."""
    words = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(words):
        help_parser().print_help()
        return 0
    try:
        run(parse_arguments(words))
    except SymphonyError as error:
        sys.stderr.write(f"symphony_sglang: {error.code}: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
