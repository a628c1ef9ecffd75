"""One peer's connection at the server: its requests in order, the next one opened ahead."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec
import xxhash

from symphony_sglang.clock import Clock
from symphony_sglang.errors import PeerLostError, PeerProtocolError
from symphony_sglang.wire.channel import STEP_BYTES, Channel
from symphony_sglang.wire.frames import receive_content, receive_header, send_frame
from symphony_sglang.wire.local_copy import address_of
from symphony_sglang.wire.pages import OpenPages, PageSource
from symphony_sglang.wire.transfer_protocol import (
    FETCH_BYTES_MAX,
    FETCHES_MAX,
    HASHES_MAX,
    HEADER,
    NAME_BYTES_MAX,
    PAGES_PER_FETCH_MAX,
    RECORD_BYTES_MAX,
    Checked,
    Copied,
    Fetch,
    Found,
    FrameHeader,
    GetRecord,
    Kind,
    Lookup,
    Placed,
    Record,
    bounded_wait,
    pack_lengths,
    pack_sums,
    pages_body_bytes,
    split_hashes,
    unpack_body,
)

POLL_SECONDS = 0.01


class RecordSource(Protocol):
    """Small opaque records by kind and name; called from connection threads."""

    def __call__(self, kind: str, name: str) -> bytes | None: ...


Count = Callable[[str, int], None]


class _Lent(NamedTuple):
    """Pages whose addresses a local reader has; the checksum of each, 0 for one that is missing."""

    pages: OpenPages
    sums: list[int]


@dataclass(slots=True)
class _Job:
    request: int
    body: msgspec.Struct
    hashes: Sequence[bytes] = ()
    opened: Future[OpenPages] | None = None  # ahead of its turn


_BODIES: dict[Kind, type[msgspec.Struct]] = {
    Kind.LOOKUP: Lookup,
    Kind.FETCH: Fetch,
    Kind.COPIED: Copied,
    Kind.GET_RECORD: GetRecord,
}


class PageSession:
    """Answers requests until the peer closes, breaks the protocol, or the server closes."""

    def __init__(
        self,
        channel: Channel,
        sources: Mapping[str, PageSource],
        records: RecordSource | None,
        page_bytes: int,
        *,
        count: Count,
        closing: threading.Event,
        clock: Clock,
        idle_seconds: float,
        transfer_seconds: float,
    ) -> None:
        self._channel = channel
        self._sources = sources
        self._records = records
        self._page_bytes = page_bytes
        self._count = count
        self._closing = closing
        self._clock = clock
        self._idle_seconds = idle_seconds
        self._transfer_seconds = transfer_seconds
        self._pending: deque[_Job] = deque()
        self._lent: dict[int, _Lent] = {}
        self._opener: ThreadPoolExecutor | None = None

    def run(self) -> None:
        while not self._closing.is_set():
            if not self._pending and not self._wait_for_request():
                return
            job = self._pending.popleft()
            opened = self._opened(job)
            try:
                if not self._pending and self._channel.readable():
                    self._take(receive_header(self._channel))
                    self._open_ahead(self._pending[0])
                self._answer(job, opened)
            finally:
                if opened is not None and job.request not in self._lent:
                    opened.release()

    def _wait_for_request(self) -> bool:
        """False where the peer left between two requests, as it may."""
        self._channel.limit(self._idle_seconds)
        try:
            header = receive_header(self._channel)
        except PeerLostError:
            return False
        self._channel.limit(self._transfer_seconds)
        self._take(header)
        return True

    def _take(self, header: FrameHeader) -> None:
        body_type = _BODIES.get(header.kind)
        if body_type is None:
            raise PeerProtocolError(f"{header.kind.name} frame from a client")
        body = unpack_body(receive_content(self._channel, header), body_type)
        job = _Job(header.request, body)
        if isinstance(body, Fetch):
            job.hashes = self._checked_hashes(header.request, body)
        self._pending.append(job)

    def _source(self, pool: str) -> PageSource:
        source = self._sources.get(pool)
        if source is None:
            raise PeerProtocolError(
                f"pool {pool[:64]!r}; expected one of {', '.join(sorted(self._sources))}"
            )
        return source

    def _opened(self, job: _Job) -> OpenPages | None:
        """The pages that a request is about; opened now unless that was done ahead."""
        if job.opened is not None:
            return job.opened.result()
        if not isinstance(job.body, Fetch):
            return None
        return self._source(job.body.pool).open(job.hashes)

    def _open_ahead(self, job: _Job) -> None:
        """Read the next request's pages from the disk while another's are sent."""
        if isinstance(job.body, Fetch) and not self._source(job.body.pool).at_hand(job.hashes):
            if self._opener is None:
                self._opener = ThreadPoolExecutor(1, "symphony-page-open")
            job.opened = self._opener.submit(self._source(job.body.pool).open, job.hashes)

    def _checked_hashes(self, request: int, fetch: Fetch) -> list[bytes]:
        hashes = split_hashes(fetch.hashes, PAGES_PER_FETCH_MAX)
        if len(hashes) > 1 and len(hashes) * self._page_bytes > FETCH_BYTES_MAX:
            raise PeerProtocolError(
                f"{len(hashes)} pages of {self._page_bytes} bytes in one request; "
                f"expected at most {FETCH_BYTES_MAX} bytes"
            )
        if request in self._lent or (fetch.local and len(self._lent) >= FETCHES_MAX):
            raise PeerProtocolError(
                f"request {request}: {len(self._lent)} under way; expected at most {FETCHES_MAX}"
            )
        self._source(fetch.pool)
        return hashes

    def _answer(self, job: _Job, opened: OpenPages | None) -> None:
        match job.body:
            case Fetch(local=local, summed=summed):
                assert opened is not None
                lengths = [None if page is None else sum(map(len, page)) for page in opened.views]
                self._count("pages", sum(length is not None for length in lengths))
                self._count("pages_missing", lengths.count(None))
                self._count("bytes", sum(length or 0 for length in lengths))
                if local:
                    self._lend(job.request, opened, summed=summed)
                else:
                    self._send_pages(job.request, opened, lengths)
            case Copied():
                self._check_copied(job.request)
            case Lookup() as lookup:
                self._answer_lookup(job.request, lookup)
            case GetRecord() as wanted:
                self._answer_record(job.request, wanted)

    # Pages --------------------------------------------------------------------------------------

    def _send_pages(self, request: int, pages: OpenPages, lengths: Sequence[int | None]) -> None:
        head = HEADER.pack(Kind.PAGES, 0, 0, request, pages_body_bytes(lengths))
        sums = send_hashed(self._channel, head + pack_lengths(lengths), pages.views)
        self._channel.send([memoryview(pack_sums(sums) + self._unchanged(pages))])

    def _unchanged(self, pages: OpenPages) -> bytes:
        flags = bytes(bool(same) for same in pages.unchanged())
        self._count("pages_changed", flags.count(0))
        return flags

    def _lend(self, request: int, pages: OpenPages, *, summed: bool) -> None:
        places = [
            None if page is None else [(address_of(piece), len(piece)) for piece in page]
            for page in pages.views
        ]
        sums = [0] * len(places)
        self._lent[request] = _Lent(pages, sums)
        send_frame(self._channel, Kind.PLACED, request, Placed(places))
        if summed:  # the reader copies meanwhile
            sums[:] = [0 if page is None else sum_of(page) for page in pages.views]

    def _check_copied(self, request: int) -> None:
        lent = self._lent.pop(request, None)
        if lent is None:
            raise PeerProtocolError(f"COPIED for request {request}, which is not under way")
        try:
            flags = self._unchanged(lent.pages)
        finally:
            lent.pages.release()
        send_frame(self._channel, Kind.CHECKED, request, Checked(pack_sums(lent.sums), flags))

    # Small answers ------------------------------------------------------------------------------

    def _answer_lookup(self, request: int, lookup: Lookup) -> None:
        hashes = split_hashes(lookup.hashes, HASHES_MAX)
        source = self._source(lookup.pool)
        deadline = self._clock.monotonic() + bounded_wait(lookup.wait_seconds)
        found = list(source.lookup(hashes))
        while not all(found) and self._wait_on(deadline):
            found = list(source.lookup(hashes))
        send_frame(self._channel, Kind.FOUND, request, Found(bytes(map(bool, found))))

    def _answer_record(self, request: int, wanted: GetRecord) -> None:
        if max(len(wanted.kind), len(wanted.name)) > NAME_BYTES_MAX:
            raise PeerProtocolError(f"record name of {len(wanted.name)} characters")
        body = None
        if self._records is not None:
            deadline = self._clock.monotonic() + bounded_wait(wanted.wait_seconds)
            body = self._records(wanted.kind, wanted.name)
            while body is None and self._wait_on(deadline):
                body = self._records(wanted.kind, wanted.name)
        if body is not None and len(body) > RECORD_BYTES_MAX:
            body = None
        self._count("records", 1)
        send_frame(self._channel, Kind.RECORD, request, Record(body))

    def _wait_on(self, deadline: float) -> bool:
        """Sleep a moment; False once the deadline passed or the server closes."""
        if self._clock.monotonic() >= deadline:
            return False
        return not self._closing.wait(POLL_SECONDS)

    def close(self) -> None:
        """Release whatever is still open. The channel is the server's to close."""
        for lent in self._lent.values():
            lent.pages.release()
        self._lent.clear()
        if self._opener is not None:
            self._opener.shutdown(wait=True)
        for job in self._pending:
            if job.opened is not None and job.opened.exception() is None:
                job.opened.result().release()
        self._pending.clear()


def sum_of(pieces: Sequence[memoryview]) -> int:
    """xxh3_64 of the concatenation of `pieces`."""
    if len(pieces) == 1:
        return xxhash.xxh3_64_intdigest(pieces[0])
    digest = xxhash.xxh3_64()
    for piece in pieces:
        digest.update(piece)
    return digest.intdigest()


def send_hashed(
    channel: Channel, head: bytes, pages: Sequence[Sequence[memoryview] | None]
) -> list[int]:
    """Send `head` and the pages; the checksum of each.

    A step's bytes are hashed just before they go, so the kernel finds them in the cache.
    """
    sums = [0] * len(pages)
    step = [memoryview(head)]
    size = 0
    for at, page in enumerate(pages):
        if page is None:
            continue
        length = sum(map(len, page))
        if length > STEP_BYTES:
            channel.send(step)
            step, size = [], 0
            sums[at] = _send_large(channel, page)
            continue
        sums[at] = sum_of(page)
        step.extend(page)
        size += length
        if size >= STEP_BYTES:
            channel.send(step)
            step, size = [], 0
    channel.send(step)
    return sums


def _send_large(channel: Channel, page: Sequence[memoryview]) -> int:
    digest = xxhash.xxh3_64()
    for piece in page:
        for start in range(0, len(piece), STEP_BYTES):
            part = piece[start : start + STEP_BYTES]
            digest.update(part)
            channel.send([part])
    return digest.intdigest()
