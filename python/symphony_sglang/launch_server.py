"""``python -m symphony_sglang.launch_server``: SGLang's server with our levels turned on.

Every SGLang flag passes through unchanged; ours start with ``--symphony-``.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
from collections.abc import Sequence

from symphony_sglang import config as settings
from symphony_sglang.errors import ConfigError, SymphonyError
from symphony_sglang.platform import FORCE_CPU_VARIABLE
from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops

# At import, not in main(): processes that SGLang spawns import this module before anything else.
define_missing_torchvision_ops()


def split_arguments(
    argv: Sequence[str],
) -> tuple[settings.SymphonyConfig, list[str]]:
    """Our settings, and what is left for SGLang.

    Raises:
        ConfigError: an unknown ``--symphony-*`` flag, or a value out of range.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    settings.add_arguments(parser)
    try:
        ours, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    known = [option for action in parser._actions for option in action.option_strings]
    for word in rest:
        if word.startswith(settings.FLAG_PREFIX):
            name = word.split("=")[0]
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}"
            raise ConfigError(f"unknown flag {name}{hint}")
    resolved, _file = settings.from_arguments(ours, os.environ)
    return resolved, rest


def print_help() -> None:
    """SGLang's flags, then ours."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(
        prog="python -m symphony_sglang.launch_server",
        description="SGLang's server with device, host and NVMe levels of KV cache.",
    )
    ServerArgs.add_cli_args(parser)
    settings.add_arguments(parser)
    parser.print_help()


def wants_cpu(argv: Sequence[str]) -> bool:
    """Whether `argv` asks for ``--device cpu``; read before SGLang picks its platform on import."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device")
    return parser.parse_known_args(list(argv))[0].device == "cpu"


def serve(argv: Sequence[str]) -> None:
    """Resolve, start, and serve until stopped.

    Raises:
        SymphonyError: something in the settings or the model cannot run, with a one-line reason.
    """
    config, rest = split_arguments(argv)
    # SGLang sets logging up only once it has parsed its arguments; our choices come before that.
    logging.basicConfig(format="[%(asctime)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    logging.getLogger("symphony_sglang").setLevel(logging.INFO)
    if wants_cpu(rest):
        os.environ[FORCE_CPU_VARIABLE] = "1"
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args

    from symphony_sglang.engine.launch import complete_arguments

    if config.off:
        os.environ.update(config.to_environment())
    load_plugins()
    run_server(prepare_server_args(complete_arguments(rest, config)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 2 with one line on standard error when the settings cannot run."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if {"-h", "--help"} & set(arguments):
        print_help()
        return 0
    try:
        serve(arguments)
    except SymphonyError as error:
        sys.stderr.write(f"symphony_sglang: {error.code}: {error}\n")
        return 2
    finally:
        from sglang.srt.utils import kill_process_tree

        kill_process_tree(os.getpid(), include_parent=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
