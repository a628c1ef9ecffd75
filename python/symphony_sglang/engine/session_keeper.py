"""Keeps the session table beside the page store, so that hints by session id survive a restart."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable

from symphony_sglang.core.sessions import (
    SessionKey,
    SessionRecord,
    SessionTable,
    decode_session,
    encode_session,
)
from symphony_sglang.engine.nvme_backend import active_backends
from symphony_sglang.errors import SessionRecordError, StoreError
from symphony_sglang.store import PageStore

RECORD_KIND = "session"
# What one start takes back at most, newest first by the store's own order.
RESTORE_BYTES_MAX = 64 << 20

logger = logging.getLogger(__name__)


def record_id(key: SessionKey) -> str:
    """A name of bounded length that no two sessions share."""
    return hashlib.blake2b(repr(key).encode(), digest_size=24).hexdigest()


def session_store() -> PageStore | None:
    """The page store of this process, where there is one."""
    backends = active_backends()
    return backends[0].store if backends else None


class SessionKeeper:
    """Writes what changed since the last call; puts return at once and are durable soon after."""

    def __init__(self, sessions: SessionTable) -> None:
        self._sessions = sessions
        # Rank 0 reads its store once and hands the records to all ranks.
        self.restore_pending = True
        # Told of every change, None for a session that is gone.
        self.listeners: list[Callable[[SessionKey, SessionRecord | None], None]] = []

    def save(self, now_seconds: float) -> None:
        store = session_store()
        if store is None and not self.listeners:
            return
        for key, record in self._sessions.take_dirty():
            for listener in self.listeners:
                listener(key, record)
            if store is None:
                continue
            try:
                if record is None:
                    store.delete_record(RECORD_KIND, record_id(key))
                else:
                    blob = encode_session(record, now_seconds)
                    store.put_record(RECORD_KIND, record_id(key), blob)
            except (StoreError, SessionRecordError) as error:
                logger.warning("session %.64s is not kept on disk: %s", key.session_id, error)

    def load(self) -> list[bytes]:
        """The stored blobs, oldest first, within ``RESTORE_BYTES_MAX``."""
        self.restore_pending = False
        store = session_store()
        if store is None:
            return []
        blobs, size = [], 0
        for blob in reversed(list(store.records(RECORD_KIND).values())):
            size += len(blob)
            if size > RESTORE_BYTES_MAX:
                break
            blobs.append(blob)
        return blobs[::-1]

    def restore(self, blobs: list[bytes], now_seconds: float) -> None:
        """Take blobs into the table; a damaged one is left out."""
        restored = 0
        for blob in blobs:
            try:
                restored += self._sessions.restore(decode_session(blob, now_seconds))
            except SessionRecordError as error:
                logger.warning("a stored session record is left out: %s", error)
        for key, record in self._sessions.take_dirty(len(blobs)):
            for listener in self.listeners:
                listener(key, record)
        if blobs:
            logger.info("sessions: %d of %d stored records restored", restored, len(blobs))
