"""Small records with the crash safety of the index: what a worker must know after a restart."""

from __future__ import annotations

import logging
import sqlite3

from symphony_sglang.errors import StoreError
from symphony_sglang.store.committer import Shared

logger = logging.getLogger(__name__)

NAME_CHARS_MAX = 256


class SideRecords:
    """(kind, id) -> bytes. Puts return at once and become durable with the next commit.

    At most `records_max` of a kind are kept; the one put longest ago goes first.
    """

    def __init__(self, shared: Shared) -> None:
        self._s = shared

    def put(self, kind: str, identity: str, body: bytes) -> None:
        """Raises StoreError for a name or body over its limit."""
        limit = self._s.settings.record_bytes_max
        if len(body) > limit:
            raise StoreError(
                f"record {kind}/{identity} has {len(body)} bytes; expected at most {limit}"
            )
        self._note(kind, identity, bytes(body))

    def delete(self, kind: str, identity: str) -> None:
        self._note(kind, identity, None)

    def _note(self, kind: str, identity: str, body: bytes | None) -> None:
        for name, text in (("kind", kind), ("id", identity)):
            if not 0 < len(text) <= NAME_CHARS_MAX:
                raise StoreError(
                    f"record {name} has {len(text)} characters; expected 1 to {NAME_CHARS_MAX}"
                )
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise StoreError(f"record {name} {text!r:.80} is not text that UTF-8 can hold")
        shared = self._s
        with shared.lock:
            waiting = shared.records
            waiting[kind, identity] = body
            waiting.move_to_end((kind, identity))
            if len(waiting) > shared.settings.records_max:  # the disk takes no commits
                waiting.popitem(last=False)
                shared.counters.records_dropped += 1

    def all(self, kind: str) -> dict[str, bytes]:
        """Every record of a kind by id, oldest first, those not yet durable included."""
        shared = self._s
        with shared.lock:
            newer = [
                (identity, body)
                for source in (shared.records_committing, shared.records)
                for (name, identity), body in source.items()
                if name == kind
            ]
        try:
            found = dict(shared.database.records(kind))
        except sqlite3.Error as error:
            logger.warning("page store %s: records unreadable: %s", shared.folder, error)
            found = {}
        for identity, body in newer:
            found.pop(identity, None)
            if body is not None:
                found[identity] = body
        surplus = len(found) - shared.settings.records_max
        for identity in list(found)[: max(0, surplus)]:
            del found[identity]
        return found
