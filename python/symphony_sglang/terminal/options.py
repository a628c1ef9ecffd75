"""What the terminal commands have in common: the server's address and key, and small words."""

from __future__ import annotations

import argparse
import os
import sys

from symphony_sglang.client import SymphonyClient

DEFAULT_URL = "http://127.0.0.1:30000"
URL_VARIABLE = "SYMPHONY_URL"
KEY_VARIABLE = "SYMPHONY_API_KEY"


def add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        default=os.environ.get(URL_VARIABLE, DEFAULT_URL),
        metavar="URL",
        help=f"worker or router; default ${URL_VARIABLE}, else {DEFAULT_URL}",
    )
    parser.add_argument(
        "--api-key",
        default=os.environ.get(KEY_VARIABLE),
        metavar="KEY",
        help=f"its key; better given as ${KEY_VARIABLE}, which no process list shows",
    )


def client_of(arguments: argparse.Namespace) -> SymphonyClient:
    return SymphonyClient(arguments.url, api_key=arguments.api_key)


def amount(count: float) -> str:
    """A number in at most five characters: 8192, 12.3k, 4.5M."""
    for bound, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= bound:
            return f"{count / (1e3 if unit == 'k' else bound):.1f}{unit}"
    return f"{count:.0f}"


def placed(tokens: dict[str, int]) -> str:
    """Token counts by place, those that are not 0."""
    return ", ".join(f"{count} {name}" for name, count in tokens.items() if count) or "nowhere"


def say(text: str) -> None:
    """One line, or several, on standard output; shown at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
