"""The worker's feed on the wire: which pages are on which level, sessions, and load.

Three ZMQ sockets for each data-parallel rank, on consecutive port ranges (base + rank):

``events`` (PUB)
    SGLang's KV events, frame for frame: ``[topic, sequence (8 bytes, big endian), payload]``, the
    payload ``[ts, events, attn_dp_rank]`` with events as tagged maps (kv_events.py:254). Any
    consumer of SGLang's events can listen. Pages on NVMe are announced as medium ``DISK``, with
    empty ``token_ids`` and no parent: the store knows hashes only. ``AllBlocksCleared`` means all
    levels; what is still on disk is announced again right after it.
``replay`` (ROUTER)
    SGLang's replay protocol (kv_events.py:630): ``[b"", first sequence]`` is answered by the
    batches from there on that are still buffered, then a frame of sequence -1. Beyond SGLang's,
    ``[b"", SNAPSHOT_REQUEST]`` is answered by a snapshot: a header, chunks, and the same end frame
    with the number of frames before it.
``state`` (PUB)
    What SGLang's tagged union has no name for, so that its decoders never meet it: session changes
    (topic ``session``, with a sequence of their own) and load (topic ``load``, a gauge, which is
    the heartbeat too and names the newest sequences, so that a lost tail is noticed).

Sequences start at the worker's start in Unix milliseconds x 4096, its *epoch*: two starts of a
worker never share a number, so a restart needs no field that SGLang's frames lack.
"""

from __future__ import annotations

import sys
from array import array
from enum import StrEnum
from typing import Annotated, Any, NamedTuple

import msgspec

from symphony_sglang.core.levels import Level
from symphony_sglang.errors import FeedError

INT64_MAX = 2**63 - 1
EventHash = Annotated[int, msgspec.Meta(ge=-(2**63), le=INT64_MAX)]
Count = Annotated[int, msgspec.Meta(ge=0, le=INT64_MAX)]
NonNegative = Annotated[float, msgspec.Meta(ge=0)]

SEQUENCE_BYTES = 8
END_SEQUENCE = (-1).to_bytes(SEQUENCE_BYTES, "big", signed=True)
# Not 8 bytes long: those are a replay's first sequence.
SNAPSHOT_REQUEST = b"symphony.snapshot.1"
BUSY = b"busy"
TOPIC_SESSION = b"session"
TOPIC_LOAD = b"load"
TOPIC_HEADER = b"snapshot.header"
TOPIC_PAGES = b"snapshot.pages"
TOPIC_SESSIONS = b"snapshot.sessions"
# An epoch leaves room for 4,096 batches a millisecond before the next one could be reached.
SEQUENCES_PER_MILLISECOND = 4096
HASHES_PER_CHUNK = 32_768
SESSIONS_PER_CHUNK = 1024


class Medium(StrEnum):
    """SGLang's names of the levels (kv_events.py:261)."""

    GPU = "GPU"
    CPU_PINNED = "CPU_PINNED"
    DISK = "DISK"


LEVEL_OF_MEDIUM = {
    "GPU": Level.DEVICE,
    "CPU_PINNED": Level.HOST,
    "DISK": Level.NVME,
}
MEDIUM_OF_LEVEL = {level: Medium(name) for name, level in LEVEL_OF_MEDIUM.items()}


class BlockStored(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """SGLang's event of the same name; `extra_key` is ours, and absent where there is none.

    SGLang promises its consumers that optional fields may be added (kv_events.py:264).
    """

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[Any]
    block_size: int
    lora_id: int | None
    medium: str | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    lora_name: str | None = None
    extra_key: str | None = None


class BlockRemoved(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """SGLang's event of the same name, with the namespace where there is one."""

    block_hashes: list[int]
    medium: str | None = None
    extra_key: str | None = None


class AllBlocksCleared(msgspec.Struct, tag=True, omit_defaults=True, gc=False):
    """SGLang's event of the same name: every level of this rank is empty."""


class EventBatch(msgspec.Struct, array_like=True, gc=False):
    """``[ts, events, attn_dp_rank]``; `ts` in Unix seconds."""

    ts: float
    events: list[Any]
    attn_dp_rank: int | None = None


class StoredPages(msgspec.Struct, tag="BlockStored", gc=False):
    """What a subscriber needs of a stored event: token ids are skipped, not decoded."""

    block_hashes: list[EventHash]
    parent_block_hash: EventHash | None = None
    medium: str | None = None


class RemovedPages(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[EventHash]
    medium: str | None = None


class ClearedPages(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    pass


PageEvent = StoredPages | RemovedPages | ClearedPages
KNOWN_EVENTS = ("BlockStored", "BlockRemoved", "AllBlocksCleared")


class PageBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[PageEvent]
    attn_dp_rank: int | None = None


class _RawBatch(msgspec.Struct, array_like=True, gc=False):
    ts: float
    events: list[msgspec.Raw]
    attn_dp_rank: int | None = None


class _AnyEvent(msgspec.Struct):
    type: str


class Speed(msgspec.Struct, frozen=True, array_like=True):
    """A straight line: a latency plus a time per token, as ``core.gate.Rate``."""

    tokens_per_second: Annotated[float, msgspec.Meta(gt=0)]
    latency_seconds: NonNegative = 0.0


class WorkerSpeeds(msgspec.Struct, frozen=True, omit_defaults=True):
    """A worker's own measurements; None where it has not measured yet."""

    prefill: Speed | None = None
    host_to_device: Speed | None = None
    nvme_to_host: Speed | None = None


class WorkerLoad(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Work at one rank, a gauge.

    `tokens_waiting_uncached` are prompt tokens still to be computed; `device_used_tokens` is what
    running work holds, evictable cache not counted. `requests_max`, `decode_step_seconds`: 0 where
    not known. `draining`: the worker is about to end, and its sessions should go elsewhere.
    """

    requests_running: Count = 0
    requests_waiting: Count = 0
    tokens_waiting_uncached: Count = 0
    tokens_running: Count = 0
    device_used_tokens: Count = 0
    device_total_tokens: Count = 0
    requests_max: Count = 0
    decode_step_seconds: NonNegative = 0.0
    speeds: WorkerSpeeds = WorkerSpeeds()
    draining: bool = False


class SessionChange(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """A session after its last turn on this worker, or that it is `gone` from it.

    `last_page_hash` is the hex storage hash of its last whole page, "" where unknown. A session id
    under another `extra_key` or `cache_salt` is another session.
    """

    session_id: str
    total_tokens: Count = 0
    turns: Count = 0
    last_page_hash: str = ""
    extra_key: str | None = None
    cache_salt: str | None = None
    owner_epoch: Count = 0
    gone: bool = False

    @property
    def key(self) -> tuple[str, str | None, str | None]:
        return self.session_id, self.extra_key, self.cache_salt


class LoadReport(msgspec.Struct, array_like=True):
    """Payload of topic ``load``: the gauge, and the newest sequence of either stream."""

    epoch: Count
    ts: float
    events_sequence: Count
    sessions_sequence: Count
    load: WorkerLoad


class SessionBatch(msgspec.Struct, array_like=True):
    """Payload of topic ``session``."""

    ts: float
    changes: list[SessionChange]


class SnapshotHeader(msgspec.Struct, array_like=True):
    """The snapshot holds everything up to these sequences, and perhaps later pages on disk.

    Applying the events after `events_sequence` on top gives the state they lead to: a page's last
    event decides.
    """

    epoch: Count
    events_sequence: Count
    sessions_sequence: Count
    page_size: Count
    rank: Count
    # Whose feed it is: a port may be another worker's by now. "" where it was not told.
    name: str = ""


class PagesChunk(msgspec.Struct, array_like=True):
    """Event hashes on one level, packed as little-endian int64."""

    medium: str
    hashes: bytes


class SessionsChunk(msgspec.Struct, array_like=True):
    sessions: list[SessionChange]


class Snapshot(NamedTuple):
    """A whole snapshot, as the subscriber put it together."""

    header: SnapshotHeader
    pages: dict[Level, array[int]]
    sessions: list[SessionChange]


# Bad UTF-8 is a plain ValueError, and deep nesting a RecursionError.
DECODE_ERRORS = (msgspec.MsgspecError, ValueError, RecursionError)

_encoder = msgspec.msgpack.Encoder()
_page_batches = msgspec.msgpack.Decoder(PageBatch)
_raw_batches = msgspec.msgpack.Decoder(_RawBatch)
_any_events = msgspec.msgpack.Decoder(_AnyEvent)
_page_events = msgspec.msgpack.Decoder(PageEvent)
_loads = msgspec.msgpack.Decoder(LoadReport)
_session_batches = msgspec.msgpack.Decoder(SessionBatch)
_headers = msgspec.msgpack.Decoder(SnapshotHeader)
_pages_chunks = msgspec.msgpack.Decoder(PagesChunk)
_sessions_chunks = msgspec.msgpack.Decoder(SessionsChunk)


def encode(message: msgspec.Struct) -> bytes:
    return _encoder.encode(message)


def epoch_of(unix_seconds: float) -> int:
    """The first sequence of a worker that starts now."""
    return int(unix_seconds * 1000) * SEQUENCES_PER_MILLISECOND


def sequence_frame(sequence: int) -> bytes:
    return sequence.to_bytes(SEQUENCE_BYTES, "big", signed=True)


def read_sequence(frame: bytes) -> int:
    """Raises FeedError unless the frame has 8 bytes."""
    if len(frame) != SEQUENCE_BYTES:
        raise FeedError(f"a sequence of {len(frame)} bytes; expected {SEQUENCE_BYTES}")
    return int.from_bytes(frame, "big", signed=True)


def decode_pages(payload: bytes) -> tuple[PageBatch, int]:
    """A batch of page events, and how many of unknown kinds were left out.

    Raises:
        FeedError: the payload is not SGLang's batch.
    """
    try:
        return _page_batches.decode(payload), 0
    except DECODE_ERRORS:
        pass
    # A newer worker may send kinds of events that are not known here; those alone are skipped.
    try:
        raw = _raw_batches.decode(payload)
        events = [
            _page_events.decode(item)
            for item in raw.events
            if _any_events.decode(item).type in KNOWN_EVENTS
        ]
        batch = PageBatch(raw.ts, events, raw.attn_dp_rank)
        return batch, len(raw.events) - len(events)
    except DECODE_ERRORS as error:
        raise FeedError(f"not a batch of KV events: {error}") from error


def decode_load(payload: bytes) -> LoadReport:
    """Raises FeedError."""
    try:
        return _loads.decode(payload)
    except DECODE_ERRORS as error:
        raise FeedError(f"not a load report: {error}") from error


def decode_sessions(payload: bytes) -> SessionBatch:
    """Raises FeedError."""
    try:
        return _session_batches.decode(payload)
    except DECODE_ERRORS as error:
        raise FeedError(f"not a batch of session changes: {error}") from error


def pack_hashes(hashes: array[int]) -> bytes:
    """Little-endian int64, whatever the machine."""
    if sys.byteorder == "big":
        hashes = array("q", hashes)
        hashes.byteswap()
    return hashes.tobytes()


def unpack_hashes(data: bytes) -> array[int]:
    """Raises FeedError unless the length is a multiple of 8."""
    hashes = array("q")
    if len(data) % hashes.itemsize:
        raise FeedError(f"{len(data)} bytes of page hashes; expected a multiple of 8")
    hashes.frombytes(data)
    if sys.byteorder == "big":
        hashes.byteswap()
    return hashes


class SnapshotReader:
    """Puts the frames of a snapshot together; the first wrong one raises FeedError."""

    def __init__(self, hashes_max: int, sessions_max: int) -> None:
        self._hashes_max = hashes_max
        self._sessions_max = sessions_max
        self._header: SnapshotHeader | None = None
        self._pages: dict[Level, array[int]] = {
            level: array("q") for level in LEVEL_OF_MEDIUM.values()
        }
        self._sessions: list[SessionChange] = []
        self._frames = 0

    def add(self, topic: bytes, sequence: bytes, payload: bytes) -> Snapshot | None:
        """Take in one frame; the snapshot once it is whole.

        Raises:
            FeedError: the worker is busy with other replies, or a frame is missing, out of order,
                malformed, or over the bounds.
        """
        if sequence == END_SEQUENCE:
            return self._finish(payload)
        if read_sequence(sequence) != self._frames:
            raise FeedError(f"snapshot frame {read_sequence(sequence)}; expected {self._frames}")
        self._frames += 1
        try:
            if topic == TOPIC_HEADER and self._header is None:
                self._header = _headers.decode(payload)
            elif topic == TOPIC_PAGES:
                self._add_pages(_pages_chunks.decode(payload))
            elif topic == TOPIC_SESSIONS:
                self._sessions += _sessions_chunks.decode(payload).sessions
            else:
                raise FeedError(f"snapshot frame of kind {topic[:32]!r}")
        except DECODE_ERRORS as error:
            raise FeedError(f"snapshot frame {topic[:32]!r}: {error}") from error
        if len(self._sessions) > self._sessions_max:
            raise FeedError(f"over {self._sessions_max} sessions in a snapshot")
        return None

    def _add_pages(self, chunk: PagesChunk) -> None:
        level = LEVEL_OF_MEDIUM.get(chunk.medium)
        if level is None:
            return
        self._pages[level].extend(unpack_hashes(chunk.hashes))
        if sum(map(len, self._pages.values())) > self._hashes_max:
            raise FeedError(f"over {self._hashes_max} pages in a snapshot")

    def _finish(self, payload: bytes) -> Snapshot:
        if payload == BUSY:
            raise FeedError("the worker is busy with other replies")
        if self._header is None or payload != sequence_frame(self._frames):
            raise FeedError(f"a snapshot ended after {self._frames} frames, some are missing")
        return Snapshot(self._header, self._pages, self._sessions)
