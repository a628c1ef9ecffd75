"""``symphony advise`` and ``symphony session``: one question each, answered in plain lines."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import msgspec

from symphony_sglang.client import Receipt, SessionView, SymphonyClient
from symphony_sglang.clock import SystemClock
from symphony_sglang.errors import ConfigError
from symphony_sglang.terminal.options import add_server_options, client_of, placed, say

POLL_SECONDS = 0.05
NOT_READY = 1


def add_advise_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "advise",
        help="say that a session will be back soon",
        description="Exit code 0 when the hint was taken (with --wait: when the prefix is ready).",
    )
    add_server_options(parser)
    add = parser.add_argument
    add("session", nargs="?", metavar="SESSION", help="or --text")
    add("--text", metavar="TEXT", help="a prompt that starts like this; - reads standard input")
    add("--in", dest="expected", type=float, metavar="SECONDS", help="when; default: soon")
    add("--expires", type=float, metavar="SECONDS", help="forget it after so long; default 60")
    add("--priority", type=int, metavar="N", help="larger comes first; default 0")
    add("--target", choices=("device", "host"), help="default device")
    add("--wait", type=float, metavar="SECONDS", help="wait at most so long until it is ready")
    add("--json", action="store_true", help="print the receipt as JSON")
    parser.set_defaults(run=run_advise)


def run_advise(arguments: argparse.Namespace) -> int:
    if (arguments.session is None) == (arguments.text is None):
        raise ConfigError("advise takes a SESSION or --text, and not both")
    text = sys.stdin.read() if arguments.text == "-" else arguments.text
    with client_of(arguments) as client:
        receipt = client.advise(
            arguments.session,
            text=text,
            expected_in_s=arguments.expected,
            expires_in_s=arguments.expires,
            priority=arguments.priority,
            target=arguments.target,
        )
        if arguments.wait is not None:
            receipt = wait_ready(client, receipt, arguments.wait)
    say(as_json(receipt) if arguments.json else receipt_line(receipt))
    taken = receipt.status in ("accepted", "clipped", "deferred", "duplicate")
    ready = arguments.wait is None or receipt.state in ("ready", "used")
    return 0 if taken and ready else NOT_READY


def wait_ready(client: SymphonyClient, receipt: Receipt, seconds_max: float) -> Receipt:
    """The receipt once nothing more is on its way for it, or the time is over."""
    clock = SystemClock()
    ends_seconds = clock.monotonic() + seconds_max
    status, reason = receipt.status, receipt.reason
    while receipt.live and receipt.state != "ready" and clock.monotonic() < ends_seconds:
        time.sleep(POLL_SECONDS)
        receipt = client.receipt(receipt.advisory_id or "")
    # Of a duplicate, the receipt asked for later is the first hint's own.
    return msgspec.structs.replace(receipt, status=status, reason=receipt.reason or reason)


def receipt_line(receipt: Receipt) -> str:
    words = [receipt.advisory_id or "-", receipt.status, receipt.state]
    if receipt.reason:
        words.append(f"({receipt.reason})")
    goal = receipt.tokens.get("goal", 0)
    if goal:
        words.append(f"{receipt.tokens.get('device', 0)} of {goal} tokens on the device")
    moved = {hop.replace("_", " "): count for hop, count in receipt.bytes.items() if count}
    if moved:
        words.append("moved " + ", ".join(f"{count:,} B {hop}" for hop, count in moved.items()))
    return " ".join(words)


def add_session_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "session", help="show where a session's tokens are, or end it"
    )
    add_server_options(parser)
    add = parser.add_argument
    add("session", metavar="SESSION")
    add("--release", action="store_true", help="the session is over: forget it")
    add("--json", action="store_true", help="print the answer as JSON")
    parser.set_defaults(run=run_session)


def run_session(arguments: argparse.Namespace) -> int:
    with client_of(arguments) as client:
        answer: Any = (
            client.release(arguments.session)
            if arguments.release
            else client.session_view(arguments.session)
        )
    if arguments.json:
        say(as_json(answer))
    elif isinstance(answer, SessionView):
        say("\n".join(session_lines(answer)))
    else:
        say(f"session {arguments.session} released")
    return 0


def session_lines(view: SessionView) -> list[str]:
    tokens = msgspec.structs.asdict(view.tokens)
    total = tokens.pop("total")
    where = f" on {view.worker}" if view.worker else ""
    lines = [
        f"session {view.session_id}{where}: {view.turns} turns, idle {view.idle_s:.0f} s",
        f"{total} tokens: {placed(tokens)}",
    ]
    lines += [f"advisory {receipt_line(receipt)}" for receipt in view.advisories]
    lines += [
        f"move {move.move_id} {move.source} -> {move.destination} {move.state}"
        for move in view.moves
    ]
    return lines


def as_json(answer: Any) -> str:
    return msgspec.json.format(msgspec.json.encode(answer)).decode()
