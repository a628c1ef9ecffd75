"""``symphony chat``: a chat whose next turn is on its way while you type it."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from symphony_sglang.client import Receipt, Session, SymphonyClient
from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ClientError, ServerUnavailableError
from symphony_sglang.terminal.chat_turn import Chat, Turn
from symphony_sglang.terminal.line_editor import Did, LineEditor, redraw
from symphony_sglang.terminal.options import add_server_options, client_of, placed

PROMPT = "you> "
READ_BYTES_MAX = 65_536
HINT_SECONDS_MAX = 5.0
INTERRUPTED = 130

Write = Callable[[str], None]


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "chat",
        help="talk to a model; what you are about to need is fetched while you type",
        description="Sends an advisory with the first key of a new turn, withdraws it when the "
        "line is emptied, and shows after each answer the time to its first token, where the "
        "prompt's prefix was found, and how far ahead the advisory was. Ctrl-D ends the chat.",
    )
    add_server_options(parser)
    parser.add_argument("--session", metavar="ID", help="default: a new one")
    parser.add_argument("--model", default="default", metavar="NAME", help="as the server names it")
    parser.add_argument("--max-tokens", type=int, default=512, metavar="N", help="of an answer")
    parser.add_argument("--no-advise", action="store_true", help="chat without advisories")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    clock = SystemClock()
    session_id = arguments.session or f"chat-{uuid.uuid4().hex[:12]}"
    chat = Chat(
        arguments.url,
        session_id,
        clock=clock,
        api_key=arguments.api_key,
        model=arguments.model,
        tokens_max=arguments.max_tokens,
    )
    with client_of(arguments) as client, contextlib.closing(chat):
        client.residency()  # a wrong address or key is told now, and not after the first line
        hints = Hints(client, session_id, clock, enabled=not arguments.no_advise)
        write(f"session {session_id}, Ctrl-D ends\n")
        try:
            with raw_terminal() as read:
                return converse(chat, hints, read, write)
        finally:
            hints.close()


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def raw_terminal() -> Iterator[Callable[[], bytes]]:
    """A function that reads keys as they are pressed; from a pipe, what is there."""
    descriptor = sys.stdin.fileno()

    def read() -> bytes:
        return os.read(descriptor, READ_BYTES_MAX)

    if not sys.stdin.isatty():
        yield read
        return
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    try:
        # Output stays as it is; input comes key by key, and Ctrl-C as a character.
        tty.setcbreak(descriptor)
        raw = termios.tcgetattr(descriptor)
        raw[3] &= ~termios.ISIG
        termios.tcsetattr(descriptor, termios.TCSADRAIN, raw)
        yield read
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class Hints:
    """The chat's advisories, sent from a thread of their own: typing never waits for one."""

    def __init__(
        self, client: SymphonyClient, session_id: str, clock: Clock, *, enabled: bool
    ) -> None:
        self._session: Session = client.session(session_id)
        self._client = client
        self._clock = clock
        self._enabled = enabled
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="symphony-chat")
        self._waiting: Future[Any] | None = None
        self.turns = 0
        self.problem = ""

    def _do(self, call: Callable[[], Any]) -> None:
        if self._enabled and self.turns:
            self._waiting = self._thread.submit(self._guarded, call)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (ClientError, ServerUnavailableError) as error:
            # Without the advisory the turn is only slower; the figures line tells.
            self.problem = str(error)
            return None

    def typing(self) -> None:
        if self._session.state.due(self._clock.monotonic()):
            self._do(self._session.typing)

    def emptied(self) -> None:
        self._do(self._session.cleared)

    def sent(self) -> Receipt | None:
        """The hint that is out for the turn being sent, once its receipt is there."""
        self.problem = ""
        if self._waiting is not None:
            with contextlib.suppress(TimeoutError):
                self._waiting.result(HINT_SECONDS_MAX)
        self._waiting = None
        return self._session.sent()

    def outcome(self, receipt: Receipt | None) -> Receipt | None:
        """What became of a hint, after the turn that it was for."""
        if receipt is None or receipt.advisory_id is None or not receipt.live:
            return receipt
        found = self._guarded(lambda: self._client.receipt(receipt.advisory_id or ""))
        return found if isinstance(found, Receipt) else receipt

    def close(self) -> None:
        self.emptied()
        self._thread.shutdown(wait=True)


def converse(chat: Chat, hints: Hints, read: Callable[[], bytes], show: Write) -> int:
    """Lines in, answers out, until Ctrl-C, Ctrl-D or the end of input; an exit code."""
    editor = LineEditor()
    shown = ""
    show(PROMPT)
    while True:
        for did in editor.feed(read()):
            if did is Did.ENDED:
                # A last line without its newline, from a pipe, is still a line.
                if editor.text.strip():
                    take_turn(chat, hints, editor.take(), show)
                show("\n")
                return 0
            if did is Did.INTERRUPTED:
                show("\n")
                return INTERRUPTED
            if did is Did.SENT:
                show(redraw_now(shown, editor.text) + "\n")
                shown = ""
                take_turn(chat, hints, editor.take(), show)
                show(PROMPT)
            elif did is Did.EMPTIED:
                hints.emptied()
            else:
                hints.typing()
        show(redraw_now(shown, editor.text))
        shown = editor.text


def redraw_now(before: str, after: str) -> str:
    return (
        "" if before == after else redraw(PROMPT, before, after, shutil.get_terminal_size().columns)
    )


def take_turn(chat: Chat, hints: Hints, text: str, show: Write) -> None:
    """One message and its answer, with a line of figures; an empty one is passed over."""
    if not text.strip():
        hints.emptied()
        return
    receipt = hints.sent()
    try:
        turn = chat.say(text, show)
    except (ClientError, ServerUnavailableError) as error:
        show(f"\n[{error}]\n")
        return
    hints.turns += 1
    show("\n" + figures(turn, hints.outcome(receipt), hints.problem) + "\n")


def figures(turn: Turn, receipt: Receipt | None, problem: str) -> str:
    """The line below an answer."""
    ttft = "no token" if turn.ttft_seconds is None else f"TTFT {1e3 * turn.ttft_seconds:.0f} ms"
    parts = [ttft, f"prompt {turn.prompt_tokens}: {placed(turn.found)}"]
    if receipt is not None:
        parts.append(hint_words(receipt))
    elif problem:
        parts.append(f"no advisory: {problem}")
    return "[" + " | ".join(parts) + "]"


def hint_words(receipt: Receipt) -> str:
    if not receipt.state or receipt.status in ("missing", "rejected", "unsupported"):
        return f"advisory {receipt.status} ({receipt.reason})"
    lead = receipt.lead_seconds
    words = f"advisory {receipt.state}"
    return words if lead is None else f"{words}, {lead:.2f} s ahead"
