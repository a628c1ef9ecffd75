"""The thread that turns what programs do into advisories, so that no program waits for one.

Events go into a bounded queue; what does not fit is dropped and counted. Hints that wait together
travel in one message. A server that does not answer costs one line in the log, and the hints of
the time until it is tried again.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import queue
import threading
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from symphony_sglang.client import Receipt, SymphonyClient
from symphony_sglang.client.protocol import action
from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ClientError, NotKnownError, SymphonyError, TooManyHintsError
from symphony_sglang.lang.program import Event, Kind, Program

logger = logging.getLogger(__name__)

ACTIONS_MAX = 64  # in one message, the server's own bound
TEXT_BYTES_MAX = 4 << 20  # of a hint by text, the server's own bound
TIMERS_MAX = 200_000  # that wait at once; further ones are dropped
SECONDS_MAX = 3600.0  # of any time in a hint, the server's own bound


@dataclass(frozen=True, slots=True)
class AdviserSettings:
    """When programs are advised, and what bounds the adviser.

    Attributes:
        idle_seconds: a program without a request for so long waits for something outside.
        wait_expires_seconds: how long a hint lives that says nothing of when.
        soon_expires_seconds: how long one lives for what should come at once, after a fork or join.
        hold_seconds: a tool expected to take longer leaves the session on the host level, until
            `lead_seconds` before its end.
        queue_max: events that wait; further ones are dropped.
        programs_max: programs followed at once; beyond it the oldest is no longer followed.
        request_seconds_max: limit of one message to the server.
        retry_seconds: pause after a failure, doubled with each further one.
        retry_seconds_max: the longest pause.
    """

    idle_seconds: float = 0.05
    wait_expires_seconds: float = 60.0
    soon_expires_seconds: float = 5.0
    hold_seconds: float = 30.0
    lead_seconds: float = 3.0
    queue_max: int = 10_000
    programs_max: int = 65_536
    request_seconds_max: float = 2.0
    retry_seconds: float = 1.0
    retry_seconds_max: float = 30.0


class AdviserStats(NamedTuple):
    """Totals since the start; `dropped` counts events and hints."""

    events: int
    hints: int
    messages: int
    dropped: int
    failures: int
    programs: int


@dataclass(order=True, slots=True)
class Timer:
    due_seconds: float
    order: int
    kind: Kind = field(compare=False)
    program: Program = field(compare=False)
    # The program's `started` when the timer was set: a program that went on needs no hint.
    started: int = field(compare=False)


class Adviser:
    """One thread, started by the first event; `close` ends it."""

    def __init__(
        self,
        client: SymphonyClient,
        settings: AdviserSettings | None = None,
        *,
        clock: Clock | None = None,
    ) -> None:
        self.settings = settings or AdviserSettings()
        self.clock = clock or SystemClock()
        self._client = client
        # Its put is reentrant: a program may end inside a garbage collection, anywhere.
        self._queue: queue.SimpleQueue[Event | threading.Event | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._starting = threading.Lock()
        self._closed = False
        self._off = False
        # What follows belongs to the thread.
        self._order = itertools.count()
        self._timers: list[Timer] = []
        self._open: dict[str, Program] = {}
        self._outgoing: dict[tuple[str, str], dict[str, Any]] = {}
        self._pause_until_seconds = 0.0
        self._pause_seconds = 0.0
        self._events = self._hints = self._messages = self._dropped = self._failures = 0

    # Called by programs ------------------------------------------------------------------------

    def tell(self, event: Event) -> None:
        """Take note of `event`; never blocks, never raises."""
        if self._closed or self._off:
            return
        if self._queue.qsize() >= self.settings.queue_max:
            self._dropped += 1
            return
        if self._thread is None:
            self._start()
        self._queue.put(event)

    def flush(self, seconds_max: float = 2.0) -> bool:
        """Wait until all that was told before is sent or dropped; False if time ran out first."""
        thread = self._thread
        if thread is None or not thread.is_alive():
            return True
        done = threading.Event()
        self._queue.put(done)
        return done.wait(seconds_max)

    def close(self, seconds_max: float = 2.0) -> None:
        """Send what waits, then stop. Further events are passed over."""
        self._closed = True
        thread = self._thread
        if thread is not None and thread.is_alive():
            self._queue.put(None)
            thread.join(seconds_max)

    def stats(self) -> AdviserStats:
        return AdviserStats(
            self._events,
            self._hints,
            self._messages,
            self._dropped,
            self._failures,
            len(self._open),
        )

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="symphony-adviser", daemon=True
                )
                self._thread.start()

    # The thread --------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            waiting: list[threading.Event] = []
            stop = self._collect(waiting)
            self._fire_timers()
            if stop:
                self._release_over()
            self._send_all()
            for done in waiting:
                done.set()
            if stop:
                return

    def _collect(self, waiting: list[threading.Event]) -> bool:
        """Wait for an event or a timer, then take what is there; True when asked to stop."""
        timeout: float | None = None
        if self._timers:
            timeout = max(0.0, self._timers[0].due_seconds - self.clock.monotonic())
        for _ in range(self.settings.queue_max):
            try:
                event = self._queue.get(timeout=timeout)
            except queue.Empty:
                return False
            if event is None:
                return True
            if isinstance(event, threading.Event):
                waiting.append(event)
            else:
                self._handle(event)
            timeout = 0.0
        return False

    def _handle(self, event: Event) -> None:
        self._events += 1
        program, now_seconds = event.program, self.clock.monotonic()
        self._follow(program)
        match event.kind:
            case Kind.TURN_ENDED:
                if program.ended:
                    self._set_timer(Kind.ENDED, program, now_seconds)
                elif program.tool is not None:
                    self._tool_hint(program, now_seconds)
                elif event.started == program.started:
                    due_seconds = now_seconds + self.settings.idle_seconds
                    self._set_timer(Kind.TURN_ENDED, program, due_seconds)
            case Kind.FORKED:
                soon = self.settings.soon_expires_seconds
                self._hint(program, expected_in_s=0.0, expires_in_s=soon)
            case Kind.TOOL:
                # A turn still to be computed gives the hint at its end, with all of its text.
                if program.tool is not None and not program.in_flight:
                    self._tool_hint(program, now_seconds)
            case Kind.RETURNS:
                self._hint(program, **(event.payload or {}))
            case Kind.RETAIN:
                self._put("retain", program, event.payload or {})
            case Kind.ENDED:
                self._set_timer(Kind.ENDED, program, now_seconds)

    def _follow(self, program: Program) -> None:
        if program.session_id not in self._open:
            self._open[program.session_id] = program
            if len(self._open) > self.settings.programs_max:
                del self._open[next(iter(self._open))]

    def _set_timer(self, kind: Kind, program: Program, due_seconds: float) -> None:
        if len(self._timers) >= TIMERS_MAX:
            self._dropped += 1
            return
        timer = Timer(due_seconds, next(self._order), kind, program, program.started)
        heapq.heappush(self._timers, timer)

    def _fire_timers(self) -> None:
        now_seconds = self.clock.monotonic()
        while self._timers and self._timers[0].due_seconds <= now_seconds:
            timer = heapq.heappop(self._timers)
            program = timer.program
            match timer.kind:
                case Kind.ENDED:
                    self._end(program, now_seconds)
                case Kind.TURN_ENDED:
                    waits = not program.ended and program.tool is None
                    if waits and program.started == timer.started:
                        self._hint(program)
                case Kind.TOOL:
                    if program.tool is not None and program.started == timer.started:
                        self._tool_hint(program, now_seconds)
                case _:
                    raise AssertionError(timer.kind)

    def _end(self, program: Program, now_seconds: float) -> None:
        """Release a program's session once nothing of it can run; look again until then."""
        if program.session_id not in self._open:
            return
        if not program.over:
            self._set_timer(Kind.ENDED, program, now_seconds + self.settings.idle_seconds)
            return
        del self._open[program.session_id]
        self._outgoing.pop(("prefetch", program.session_id), None)
        if program.turns and not program.kept:
            self._put("release", program, {})
        self._parent_goes_on(program)

    def _release_over(self) -> None:
        """At the end: programs that are over and only wait for the next look at them."""
        for program in [program for program in self._open.values() if program.over]:
            self._end(program, self.clock.monotonic())

    def _parent_goes_on(self, child: Program) -> None:
        """Children end when they are joined; their parent's next turn follows at once."""
        soon = {"expected_in_s": 0.0, "expires_in_s": self.settings.soon_expires_seconds}
        if child.parent is not None:
            if not child.parent.ended and not child.parent.in_flight:
                self._hint(child.parent, **soon)
        elif child.parent_text:
            self._put_text(child.parent_text, soon)

    def _tool_hint(self, program: Program, now_seconds: float) -> None:
        """A tool runs. One that takes long leaves the device to others until shortly before."""
        assert program.tool is not None
        due_seconds = program.tool.due_seconds
        if due_seconds is None:
            self._hint(program)
            return
        settings, left = self.settings, max(0.0, due_seconds - now_seconds)
        expires = min(SECONDS_MAX, max(settings.wait_expires_seconds, 2 * left))
        times = {"expected_in_s": min(SECONDS_MAX, left), "expires_in_s": expires}
        if left > settings.hold_seconds:
            self._hint(program, **times, target="host")
            self._set_timer(Kind.TOOL, program, due_seconds - settings.lead_seconds)
        else:
            self._hint(program, **times)

    def _hint(self, program: Program, **payload: Any) -> None:
        payload.setdefault("expires_in_s", self.settings.wait_expires_seconds)
        self._put("prefetch", program, payload)

    def _put(self, kind: str, program: Program, payload: dict[str, Any]) -> None:
        """A hint to send with the next message; the latest of one kind and session counts."""
        if program.turns or program.kept or kind == "release":
            key = (kind, program.session_id)
            self._outgoing[key] = {"session_id": program.session_id, **payload}
        elif kind == "prefetch" and (text := program.text):
            # No turn has ended yet, so the server knows no session; its text may be known.
            self._put_text(text, payload)

    def _put_text(self, text: str, payload: dict[str, Any]) -> None:
        if len(text.encode(errors="replace")) <= TEXT_BYTES_MAX:
            self._outgoing["prefetch", f"text {hash(text)}"] = {"text": text, **payload}

    # Sending -----------------------------------------------------------------------------------

    def _send_all(self) -> None:
        while self._outgoing:
            keys = list(itertools.islice(self._outgoing, ACTIONS_MAX))
            actions = [action(key[0], self._outgoing.pop(key)) for key in keys]
            if self._off or self.clock.monotonic() < self._pause_until_seconds:
                self._dropped += len(actions)
            else:
                self._send(actions)

    def _send(self, actions: list[Any]) -> None:
        try:
            receipts = self._client.send(actions)
        except (SymphonyError, ValueError) as error:
            # ValueError: text that no JSON can carry, as half of a surrogate pair.
            self._dropped += len(actions)
            self._failed(error)
            return
        self._messages += 1
        self._hints += len(actions)
        if self._pause_seconds:
            self._pause_seconds = 0.0
            logger.info("%s takes advisories again", self._client.url)
        self._note(receipts)

    def _note(self, receipts: list[Receipt]) -> None:
        for receipt in receipts:
            if receipt.status in ("rejected", "unsupported"):
                logger.debug("hint for %s: %s", receipt.session_id, receipt.reason)

    def _failed(self, error: Exception) -> None:
        """Be silent for a while; one line in the log when that begins."""
        self._failures += 1
        if isinstance(error, NotKnownError):
            self._off = True
            logger.warning("advisories are off: %s", error)
            return
        first = not self._pause_seconds
        longer = min(self.settings.retry_seconds_max, 2 * self._pause_seconds)
        self._pause_seconds = max(self.settings.retry_seconds, longer)
        if isinstance(error, TooManyHintsError):
            self._pause_seconds = max(error.retry_after_seconds, self._pause_seconds)
        self._pause_until_seconds = self.clock.monotonic() + self._pause_seconds
        if first:
            kind = "refused" if isinstance(error, ClientError) else "not reachable"
            logger.warning("hints are dropped, the server is %s for them: %s", kind, error)

    def check(self) -> None:
        """Bounds hold; call it only when no event is under way."""
        assert len(self._open) <= self.settings.programs_max
        assert len(self._timers) <= TIMERS_MAX
        assert not self._outgoing
        assert self._queue.qsize() <= self.settings.queue_max
