"""The session table: what a session's prefix is, so that a hint can name just the session.

SGLang's look-up and prefetch take token ids, so a record holds them, as int32 bytes: 4 bytes a
token against roughly 100 kB of KV. The table is bounded in records and in bytes; the least recently
used session is forgotten whole. A session beyond its own bound keeps its head, still a prefix.
"""

from __future__ import annotations

import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from symphony_sglang.core.prefix import NO_NAMESPACE, TOKEN_BYTES, TOKEN_MAX, Namespace, Prefix
from symphony_sglang.errors import SessionRecordError

MAGIC = b"SYSR"
VERSION = 1
# magic, version, flags, lengths of id, extra_key, cache_salt and page hash, token bytes,
# tokens in all, turns, owner epoch, idle seconds; then the parts, then the crc32 of all before it.
HEADER = struct.Struct("<4sHHHHHHIQIQd")
CHECKSUM = struct.Struct("<I")
HAS_EXTRA_KEY, HAS_CACHE_SALT = 1, 2
NAME_BYTES_MAX = 4096
# Objects, dict slots and names of a record, roughly: empty sessions are not free.
RECORD_OVERHEAD_BYTES = 1024


class SessionKey(NamedTuple):
    """One session id under another salt is another session: salts isolate."""

    session_id: str
    namespace: Namespace = NO_NAMESPACE


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session after its last turn.

    `token_bytes` is its prefix as little-endian int32 (`Prefix`), at most the table's bound;
    `total_tokens` is its true length. `last_page_hash` is the storage hash of the last full page
    of `token_bytes`, "" where unknown. `owner_epoch` grows each time the session moves to another
    worker.
    """

    key: SessionKey
    token_bytes: bytes = field(repr=False)
    total_tokens: int
    turns: int
    last_used_seconds: float
    last_page_hash: str = ""
    owner_epoch: int = 0

    @property
    def prefix(self) -> Prefix:
        return Prefix(self.key.namespace, self.token_bytes)

    @property
    def identity(self) -> str:
        """What `AdviseRequest.identity` is for this session; its parts cannot run together."""
        extra_key, cache_salt = self.key.namespace
        return f"session:{self.key.session_id!r}:{extra_key!r}:{cache_salt!r}"

    @property
    def cost_bytes(self) -> int:
        return RECORD_OVERHEAD_BYTES + len(self.token_bytes)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Bounds of the table; beyond the first two the least recently used session is forgotten."""

    records_max: int = 65_536
    bytes_max: int = 256 * 2**20
    tokens_per_session_max: int = 262_144  # beyond it the head is kept

    def __post_init__(self) -> None:
        assert self.records_max > 0, self
        assert self.tokens_per_session_max > 0, self
        largest = RECORD_OVERHEAD_BYTES + TOKEN_BYTES * self.tokens_per_session_max
        assert self.bytes_max >= largest, f"bytes_max below one record's {largest}"


class SessionTable:
    """Sessions in order of use, newest last."""

    def __init__(self, limits: SessionLimits | None = None) -> None:
        self.limits = SessionLimits() if limits is None else limits
        self._records: OrderedDict[SessionKey, SessionRecord] = OrderedDict()
        self._by_id: dict[str, dict[SessionKey, None]] = {}
        # What persistence has not seen yet: True learned, False forgotten. At most one entry for
        # each key, so it is bounded by the records plus what was forgotten since the last drain.
        self._dirty: OrderedDict[SessionKey, bool] = OrderedDict()
        self.bytes = 0
        self.forgotten = 0

    def __len__(self) -> int:
        return len(self._records)

    def learn(
        self,
        key: SessionKey,
        token_bytes: bytes,
        now_seconds: float,
        last_page_hash: str = "",
    ) -> SessionRecord:
        """A turn of the session ended with this prefix, prompt and answer. Amortised O(1)."""
        assert len(token_bytes) % TOKEN_BYTES == 0, len(token_bytes)
        old = self._records.get(key)
        total_tokens = len(token_bytes) // TOKEN_BYTES
        if total_tokens > self.limits.tokens_per_session_max:
            token_bytes = token_bytes[: self.limits.tokens_per_session_max * TOKEN_BYTES]
            last_page_hash = ""  # it names a page that the record no longer reaches
        record = SessionRecord(
            key=key,
            token_bytes=token_bytes,
            total_tokens=total_tokens,
            turns=1 if old is None else old.turns + 1,
            last_used_seconds=now_seconds,
            last_page_hash=last_page_hash,
            owner_epoch=0 if old is None else old.owner_epoch,
        )
        self._put(record)
        return record

    def restore(self, record: SessionRecord) -> bool:
        """Take in a stored or migrated record; a newer epoch, then more turns, wins."""
        old = self._records.get(record.key)
        if old is not None and (old.owner_epoch, old.turns) >= (record.owner_epoch, record.turns):
            return False
        limit = self.limits.tokens_per_session_max * TOKEN_BYTES
        if len(record.token_bytes) > limit:
            record = replace(record, token_bytes=record.token_bytes[:limit], last_page_hash="")
        self._put(record)
        return True

    def own(self, key: SessionKey, owner_epoch: int) -> bool:
        """The session belongs here from this epoch on; False for an unknown or newer one."""
        old = self._records.get(key)
        if old is None or owner_epoch < old.owner_epoch:
            return False
        self._put(replace(old, owner_epoch=owner_epoch))
        return True

    def get(self, key: SessionKey) -> SessionRecord | None:
        """The record, without touching its place in the order of use."""
        return self._records.get(key)

    def touch(self, key: SessionKey, now_seconds: float) -> SessionRecord | None:
        """The record of a session that is being advised or asked for, now the newest."""
        old = self._records.get(key)
        if old is None:
            return None
        record = replace(old, last_used_seconds=max(now_seconds, old.last_used_seconds))
        self._records[key] = record
        self._records.move_to_end(key)
        return record

    def find(self, session_id: str) -> tuple[SessionRecord, ...]:
        """All namespaces of a session id, oldest first: for reading, not for resolving hints."""
        return tuple(self._records[key] for key in self._by_id.get(session_id, ()))

    def forget(self, key: SessionKey) -> SessionRecord | None:
        """Remove a session; None where it was not known."""
        record = self._records.pop(key, None)
        if record is None:
            return None
        self.bytes -= record.cost_bytes
        keys = self._by_id[key.session_id]
        del keys[key]
        if not keys:
            del self._by_id[key.session_id]
        self._mark(key, False)
        return record

    def clear(self) -> None:
        for key in tuple(self._records):
            self.forget(key)

    def take_dirty(self, limit: int = 256) -> tuple[tuple[SessionKey, SessionRecord | None], ...]:
        """Up to `limit` changes since the last drain, oldest first; None: forgotten."""
        changes: list[tuple[SessionKey, SessionRecord | None]] = []
        while self._dirty and len(changes) < limit:
            key, learned = self._dirty.popitem(last=False)
            changes.append((key, self._records.get(key) if learned else None))
        return tuple(changes)

    def records(self) -> Iterable[SessionRecord]:
        """Least recently used first."""
        return self._records.values()

    def _put(self, record: SessionRecord) -> None:
        old = self._records.get(record.key)
        self.bytes += record.cost_bytes - (0 if old is None else old.cost_bytes)
        self._records[record.key] = record
        self._records.move_to_end(record.key)
        self._by_id.setdefault(record.key.session_id, {})[record.key] = None
        self._mark(record.key, True)
        while len(self._records) > self.limits.records_max or self.bytes > self.limits.bytes_max:
            self.forget(next(iter(self._records)))
            self.forgotten += 1

    def _mark(self, key: SessionKey, learned: bool) -> None:
        self._dirty[key] = learned
        self._dirty.move_to_end(key)
        if len(self._dirty) > 2 * self.limits.records_max:
            # Nobody drains: a forgotten session that stays on disk costs room, not truth.
            self._dirty.popitem(last=False)

    def check(self) -> None:
        """Bounds hold, bytes add up, and the id index lists exactly the records."""
        assert len(self._records) <= self.limits.records_max
        assert self.bytes <= self.limits.bytes_max
        assert self.bytes == sum(record.cost_bytes for record in self._records.values())
        assert sum(len(keys) for keys in self._by_id.values()) == len(self._records)
        for key, record in self._records.items():
            assert record.key == key
            assert key in self._by_id[key.session_id]
            assert len(record.token_bytes) <= self.limits.tokens_per_session_max * TOKEN_BYTES
            assert self._dirty.get(key, True)


def encode_session(record: SessionRecord, now_seconds: float) -> bytes:
    """A self-checking blob. It holds the idle time, for clocks differ after a restart.

    Raises:
        SessionRecordError: a name longer than 4,096 bytes.
    """
    extra_key, cache_salt = record.key.namespace
    names = [
        name.encode("utf-8", "surrogatepass")
        for name in (
            record.key.session_id,
            extra_key or "",
            cache_salt or "",
            record.last_page_hash,
        )
    ]
    if max(map(len, names)) > NAME_BYTES_MAX:
        raise SessionRecordError(
            f"a name of session {record.key.session_id[:64]!r} has {max(map(len, names))} bytes; "
            f"expected at most {NAME_BYTES_MAX}"
        )
    flags = HAS_EXTRA_KEY * (extra_key is not None) + HAS_CACHE_SALT * (cache_salt is not None)
    header = HEADER.pack(
        MAGIC,
        VERSION,
        flags,
        *map(len, names),
        len(record.token_bytes),
        record.total_tokens,
        record.turns,
        record.owner_epoch,
        max(0.0, now_seconds - record.last_used_seconds),
    )
    body = b"".join([header, *names, record.token_bytes])
    return body + CHECKSUM.pack(zlib.crc32(body))


def decode_session(blob: bytes, now_seconds: float) -> SessionRecord:
    """What `encode_session` wrote; the time that passed in between is not counted as idle.

    Raises:
        SessionRecordError: too short, another version, damaged, or inconsistent.
    """
    if len(blob) < HEADER.size + CHECKSUM.size:
        raise SessionRecordError(f"{len(blob)} bytes; expected at least {HEADER.size + 4}")
    magic, version, flags, *sizes, turns, owner_epoch, idle_seconds = HEADER.unpack_from(blob)
    if magic != MAGIC or version != VERSION:
        raise SessionRecordError(
            f"starts with {magic!r} version {version}; expected {MAGIC!r} version {VERSION}"
        )
    body, checksum = blob[: -CHECKSUM.size], CHECKSUM.unpack(blob[-CHECKSUM.size :])[0]
    if zlib.crc32(body) != checksum:
        raise SessionRecordError(f"checksum is {zlib.crc32(body):08x}; expected {checksum:08x}")
    *lengths, total_tokens = sizes
    if HEADER.size + sum(lengths) != len(body) or lengths[-1] % TOKEN_BYTES:
        raise SessionRecordError(f"parts of {lengths} bytes do not make up {len(body)} bytes")
    parts, start = [], HEADER.size
    for length in lengths:
        parts.append(body[start : start + length])
        start += length
    try:
        names = [part.decode("utf-8", "surrogatepass") for part in parts[:-1]]
    except UnicodeDecodeError as error:
        raise SessionRecordError(f"a name is not UTF-8: {error.reason}") from error
    if not 0 <= idle_seconds < float("inf") or total_tokens * TOKEN_BYTES < lengths[-1]:
        raise SessionRecordError(f"idle for {idle_seconds} s, {total_tokens} tokens in all")
    if parts[-1][TOKEN_BYTES - 1 :: TOKEN_BYTES].translate(None, bytes(range(128))):
        raise SessionRecordError(f"a token id is outside 0..{TOKEN_MAX}")
    session_id, extra_key, cache_salt, last_page_hash = names
    namespace = Namespace(
        extra_key if flags & HAS_EXTRA_KEY else None,
        cache_salt if flags & HAS_CACHE_SALT else None,
    )
    return SessionRecord(
        key=SessionKey(session_id, namespace),
        token_bytes=parts[-1],
        total_tokens=total_tokens,
        turns=turns,
        last_used_seconds=now_seconds - idle_seconds,
        last_page_hash=last_page_hash,
        owner_epoch=owner_epoch,
    )
