"""One line of input, key by key: from the bytes of a raw terminal to what the person did.

It knows the keys that matter to a chat: text, backspace, Ctrl-U (empty the line), Ctrl-W (a word),
Enter, Ctrl-C and Ctrl-D. Other control keys and escape sequences are passed over.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from enum import Enum, auto

from rich.cells import cell_len

ESCAPE = "\x1b"
TEXT_CHARACTERS_MAX = 100_000
SEQUENCE_CHARACTERS_MAX = 64


class Did(Enum):
    """What a key did to the line."""

    BEGAN = auto()  # the first character of an empty line
    CHANGED = auto()
    EMPTIED = auto()
    SENT = auto()
    INTERRUPTED = auto()
    ENDED = auto()  # Ctrl-D on an empty line, or the end of input


class LineEditor:
    """`text` is the line so far; after `Did.SENT`, `take` gives it and starts the next."""

    def __init__(self) -> None:
        self.text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._sequence: str | None = None  # the escape sequence under way

    def feed(self, data: bytes) -> Iterator[Did]:
        """What the bytes did, key by key: the line is as it was after that key.

        No bytes at all are the end of input. A character that is cut waits for its rest.
        """
        if not data:
            yield Did.ENDED
        for character in self._decoder.decode(data):
            did = self._key(character)
            if did is not None:
                yield did

    def take(self) -> str:
        text, self.text = self.text, ""
        return text

    def _key(self, key: str) -> Did | None:
        if self._sequence is not None:
            self._escaped(key)
            return None
        match key:
            case "\r" | "\n":
                return Did.SENT
            case "\x03":
                return Did.INTERRUPTED
            case "\x04":
                return None if self.text else Did.ENDED
            case "\x7f" | "\b":
                return self._shorten(self.text[:-1])
            case "\x15":
                return self._shorten("")
            case "\x17":
                kept = self.text.rstrip()
                return self._shorten(kept[: len(kept) - len(kept.split(" ")[-1])])
            case "\t":
                return self._add(" ")
            case _ if key == ESCAPE:
                self._sequence = ""
                return None
            case _ if key < " ":
                return None
            case _:
                return self._add(key)

    def _escaped(self, key: str) -> None:
        """Swallow a sequence: ESC x, ESC O x, or ESC [ ... up to its final letter."""
        assert self._sequence is not None
        self._sequence += key
        whole = self._sequence
        if whole[0] == "[":
            over = len(whole) > 1 and "@" <= key <= "~"
        elif whole[0] == "O":
            over = len(whole) > 1
        else:
            over = True
        if over or len(whole) >= SEQUENCE_CHARACTERS_MAX:
            self._sequence = None

    def _add(self, key: str) -> Did | None:
        if len(self.text) >= TEXT_CHARACTERS_MAX:
            return None
        began = not self.text
        self.text += key
        return Did.BEGAN if began else Did.CHANGED

    def _shorten(self, text: str) -> Did | None:
        if text == self.text:
            return None
        self.text = text
        return Did.CHANGED if text else Did.EMPTIED


def redraw(prompt: str, before: str, after: str, columns: int) -> str:
    """The characters that turn the line `before` on the screen into `after`.

    The cursor stands at the line's end; a line wider than the screen covers several rows.
    """
    if after.startswith(before) and after != before:
        return after[len(before) :]
    rows_up = max(0, cell_len(prompt + before) - 1) // max(1, columns)
    return (f"\x1b[{rows_up}A" if rows_up else "") + "\r\x1b[J" + prompt + after
