"""Pulls a list of pages from a peer into a sink: several requests under way, resumed when cut.

    reserve room -> ask -> receive and verify -> commit          (the last in a thread of its own)

What is here already is not asked for, so a pull that was cut short and starts again fetches what is
missing. Pages form a chain: behind a page that the peer lacks there is nothing of use, so the pull
ends there unless told otherwise.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum

from symphony_sglang.clock import Clock
from symphony_sglang.errors import PeerLostError, PeerProtocolError, PeerRefusedError
from symphony_sglang.wire.page_client import fetch_limit
from symphony_sglang.wire.pages import PageOutcome, PageSink, PageTransport, Reservation


@dataclass(frozen=True, slots=True)
class PullSettings:
    """Bytes, seconds and counts."""

    request_bytes: int = 8 << 20  # of one request; a larger page travels alone
    requests_under_way: int = 3
    connections_max: int = 3  # tries in all, for a connection that breaks
    retry_seconds: float = 0.1  # before the second try; doubled each time
    page_tries_max: int = 2  # of a page that arrived damaged or changed
    stop_at_gap: bool = True


class PullEnd(Enum):
    """Why a pull ended."""

    COMPLETE = "complete"  # every page is here
    SHORT = "short"  # the peer lacks pages, or they did not arrive whole
    NO_ROOM = "no_room"  # the sink took no more
    REFUSED = "refused"  # another model, layout, key, ...
    LOST = "lost"  # the peer went away and did not come back
    BROKEN = "broken"  # the peer broke the protocol
    CANCELLED = "cancelled"
    DEADLINE = "deadline"


class PageState(Enum):
    """Where one page of a pull stands."""

    WANTED = "wanted"
    PRESENT = "present"  # was here before
    STORED = "stored"  # pulled, verified and committed
    MISSING = "missing"  # the peer does not have it
    DAMAGED = "damaged"  # did not arrive whole in all tries
    REFUSED = "refused"  # the sink did not take it


HERE = (PageState.PRESENT, PageState.STORED)


@dataclass(slots=True)
class PullReport:
    """What a pull did."""

    states: list[PageState]
    end: PullEnd = PullEnd.COMPLETE
    problem: str = ""
    bytes_received: int = 0
    seconds: float = 0.0
    connections: int = 0
    pages_damaged: int = 0
    way: str = ""

    @property
    def pages_here(self) -> int:
        """Pages from the first on that are here without a gap."""
        for at, state in enumerate(self.states):
            if state not in HERE:
                return at
        return len(self.states)


@dataclass(slots=True)
class _Window:
    positions: list[int]
    reservation: Reservation
    request: int


@dataclass(slots=True)
class _Commit:
    positions: list[int]
    lengths: list[int | None]
    outcome: Future[Sequence[bool]]


class _NoRoomError(Exception):
    """The sink takes no page although nothing is under way."""


@dataclass(slots=True)
class Canceller:
    """Ends a pull from another thread."""

    event: threading.Event = field(default_factory=threading.Event)
    _transport: PageTransport | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def cancel(self) -> None:
        with self._lock:
            self.event.set()
            if self._transport is not None:
                self._transport.abort()

    def watch(self, transport: PageTransport | None) -> None:
        """The transport that `cancel` must wake."""
        with self._lock:
            self._transport = transport
            if transport is not None and self.event.is_set():
                transport.abort()


class Pull:
    """One pull; `run` once, in a thread that may block."""

    def __init__(
        self,
        connect: Callable[[], PageTransport],
        sink: PageSink,
        hashes: Sequence[bytes],
        page_bytes: int,
        *,
        clock: Clock,
        settings: PullSettings | None = None,
        canceller: Canceller | None = None,
        deadline: float | None = None,
    ) -> None:
        """`connect` makes a new connection, to be called again where one breaks."""
        self._connect = connect
        self._sink = sink
        self._hashes = list(hashes)
        self._settings = settings or PullSettings()
        wanted = max(1, self._settings.request_bytes // page_bytes)
        self._window_pages = min(wanted, fetch_limit(page_bytes))
        self._clock = clock
        self._canceller = canceller or Canceller()
        self._deadline = deadline
        self._tries = [0] * len(self._hashes)
        self._front = 0  # no page before it is wanted any more
        self._gap = len(self._hashes)  # the first page that will not come
        self._windows: deque[_Window] = deque()
        self._commits: deque[_Commit] = deque()
        self._committer = ThreadPoolExecutor(1, "symphony-pull-commit")
        self.report = PullReport([PageState.WANTED] * len(self._hashes))

    def run(self) -> PullReport:
        started = self._clock.monotonic()
        report = self.report
        try:
            here = self._sink.present(self._hashes)
            report.states = [PageState.PRESENT if present else PageState.WANTED for present in here]
            if self._next_positions():
                self._try_connections()
            else:
                self._settle()
        finally:
            self._committer.shutdown(wait=True)
            report.seconds = self._clock.monotonic() - started
        return report

    def _try_connections(self) -> None:
        wait = self._settings.retry_seconds
        for left in range(self._settings.connections_max - 1, -1, -1):
            try:
                self._one_connection()
                self._settle()
                return
            except _NoRoomError:
                self._end(PullEnd.NO_ROOM, "the sink takes no more pages")
                return
            except PeerRefusedError as error:
                self._end(PullEnd.REFUSED, str(error))
                return
            except PeerProtocolError as error:
                self._end(PullEnd.BROKEN, str(error))
                return
            except PeerLostError as error:
                if self._over(str(error)):
                    return
                if left == 0:
                    self._end(PullEnd.LOST, str(error))
                    return
            if self._canceller.event.wait(self._wait_within(wait)) or self._over(""):
                self._over("")
                return
            wait *= 2

    def _wait_within(self, seconds: float) -> float:
        if self._deadline is None:
            return seconds
        return max(0.0, min(seconds, self._deadline - self._clock.monotonic()))

    def _over(self, problem: str) -> bool:
        """Whether the pull was cancelled or is late; then it is noted as such."""
        if self._canceller.event.is_set():
            self._end(PullEnd.CANCELLED, "cancelled")
            return True
        if self._deadline is not None and self._clock.monotonic() >= self._deadline:
            self._end(PullEnd.DEADLINE, problem or "the deadline passed")
            return True
        return False

    def _end(self, end: PullEnd, problem: str) -> None:
        self.report.end, self.report.problem = end, problem

    def _settle(self) -> None:
        states = self.report.states
        short = [state for state in states if state not in HERE]
        if not short:
            self._end(PullEnd.COMPLETE, "")
        elif PageState.REFUSED in short:
            self._end(PullEnd.NO_ROOM, f"{short.count(PageState.REFUSED)} pages were not stored")
        else:
            counts = {state.value: short.count(state) for state in dict.fromkeys(short)}
            text = ", ".join(f"{count} {name}" for name, count in counts.items())
            self._end(PullEnd.SHORT, f"{text} of {len(states)} pages")

    def _next_positions(self) -> list[int]:
        """The next pages to ask for; none behind a gap."""
        positions: list[int] = []
        states = self.report.states
        while self._front < len(states) and states[self._front] in HERE:
            self._front += 1
        start, under_way = self._front, set[int]()
        asked = [commit.positions for commit in self._commits]
        asked += [window.positions for window in self._windows]
        for some in asked:
            if some[0] == start:
                start = some[-1] + 1
            else:
                under_way.update(some)
        end = self._gap if self._settings.stop_at_gap else len(states)
        for at in range(start, end):
            if states[at] is PageState.WANTED and at not in under_way:
                positions.append(at)
                if len(positions) == self._window_pages:
                    break
        return positions

    def _settle_page(self, at: int, state: PageState) -> None:
        """It will not come."""
        self.report.states[at] = state
        self._gap = min(self._gap, at)

    # One connection -----------------------------------------------------------------------------

    def _one_connection(self) -> None:
        self.report.connections += 1
        transport = self._connect()
        self._canceller.watch(transport)
        try:
            while self._advance(transport):
                if self._canceller.event.is_set():
                    raise PeerLostError("cancelled")
        finally:
            self._canceller.watch(None)
            self.report.way = str(getattr(transport, "way", ""))
            # The connection goes first: after it no engine writes to the buffers.
            transport.close()
            for window in self._windows:
                window.reservation.abort()
            self._windows.clear()
            while self._commits:
                self._take_commit()

    def _advance(self, transport: PageTransport) -> bool:
        """One step; False when nothing is left to do."""
        while self._commits and self._commits[0].outcome.done():
            self._take_commit()
        if len(self._windows) < self._settings.requests_under_way and self._begin(transport):
            return True
        if self._windows:
            self._finish(transport, self._windows.popleft())
            return True
        if self._commits:
            self._take_commit()
            return True
        if self._next_positions():
            raise _NoRoomError
        return False

    def _begin(self, transport: PageTransport) -> bool:
        """Ask for the next pages; False where none are left or the sink has no room now."""
        positions = self._next_positions()
        if not positions:
            return False
        hashes = [self._hashes[at] for at in positions]
        reservation = self._sink.reserve(hashes)
        if reservation is None:
            return False
        try:
            request = transport.begin(hashes, reservation.buffers)
        except BaseException:
            reservation.abort()
            raise
        self._windows.append(_Window(positions, reservation, request))
        return True

    def _finish(self, transport: PageTransport, window: _Window) -> None:
        try:
            results = transport.finish(window.request)
        except BaseException:
            # Abort only when nobody can write there any more: see `_one_connection`.
            self._windows.appendleft(window)
            raise
        lengths: list[int | None] = []
        for at, (outcome, length) in zip(window.positions, results, strict=True):
            if outcome is PageOutcome.ARRIVED:
                self.report.bytes_received += length
                lengths.append(length)
                continue
            lengths.append(None)
            self._note_failure(at, outcome)
        stored: Future[Sequence[bool]]
        more = self._windows or window.positions[-1] + 1 < len(self._hashes)
        if more or not all(commit.outcome.done() for commit in self._commits):
            stored = self._committer.submit(window.reservation.commit, lengths)
        else:
            # Nothing is left to receive meanwhile, and nothing to come after.
            stored = Future()
            stored.set_result(window.reservation.commit(lengths))
        self._commits.append(_Commit(window.positions, lengths, stored))

    def _note_failure(self, at: int, outcome: PageOutcome) -> None:
        if outcome is PageOutcome.MISSING:
            self._settle_page(at, PageState.MISSING)
            return
        self.report.pages_damaged += 1
        self._tries[at] += 1
        if self._tries[at] >= self._settings.page_tries_max:
            self._settle_page(at, PageState.DAMAGED)

    def _take_commit(self) -> None:
        commit = self._commits.popleft()
        stored = commit.outcome.result()
        for at, length, done in zip(commit.positions, commit.lengths, stored, strict=True):
            if done:
                self.report.states[at] = PageState.STORED
            elif length is not None:
                self._settle_page(at, PageState.REFUSED)
