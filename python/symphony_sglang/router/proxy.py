"""A request on its way: chosen worker, tries, the answer handed through as it comes.

Nothing is sent to the caller before the first bytes of a worker's answer have come, so that until
then another worker can take over; after them a request is never run again.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from symphony_sglang.clock import Clock
from symphony_sglang.errors import NoWorkerError
from symphony_sglang.router.background import Background
from symphony_sglang.router.deadlines import Deadlines
from symphony_sglang.router.errors import ApiError, stream_error
from symphony_sglang.router.fields import RequestFields, read_fields, usage_of
from symphony_sglang.router.headers import caller_headers, worker_headers
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.http import Request
from symphony_sglang.router.limits import RequestGate
from symphony_sglang.router.placement import Placed, Placement, Subject
from symphony_sglang.router.registry import WorkerRegistry
from symphony_sglang.router.retry import RETRYABLE_STATUSES, RetrySettings
from symphony_sglang.router.upstream import UpstreamError, UpstreamResponse
from symphony_sglang.telemetry.router import DEFAULT_MODEL, Call, RouterMetrics, Stream, endpoint_of

logger = logging.getLogger(__name__)

# An answer that is thrown away is read to its end up to here, so that its connection can stay.
DISCARD_BYTES_MAX = 64 << 10
DISCARD_SECONDS_MAX = 1.0
# The end of a stream that is kept to read its counts from.
TAIL_BYTES_MAX = 32 << 10
# A piece of this size holds a whole event, so that what came before it can go.
TAIL_BYTES_MIN = 512


@dataclass(frozen=True, slots=True)
class ProxySettings:
    request_seconds_max: float = 1800.0


@dataclass(slots=True)
class Attempt:
    """One try at one worker: what came of it."""

    placed: Placed
    response: UpstreamResponse | None = None
    error: UpstreamError | None = None
    counted: bool = False

    @property
    def status(self) -> int:
        return 0 if self.response is None else self.response.status

    @property
    def retryable(self) -> bool:
        return self.response is None or self.response.status in RETRYABLE_STATUSES

    @property
    def failed(self) -> bool:
        """Whether it speaks against the worker: overload and a caller's mistake do not."""
        return self.response is None or self.response.status >= 500


class Proxy:
    """Forwards requests that one worker answers."""

    def __init__(
        self,
        *,
        registry: WorkerRegistry,
        placement: Placement,
        gate: RequestGate,
        health: HealthMonitor,
        retry: RetrySettings,
        settings: ProxySettings,
        worker_key: str,
        clock: Clock,
        metrics: RouterMetrics,
        chance: random.Random,
        background: Background,
    ) -> None:
        self._registry = registry
        self._placement = placement
        self._gate = gate
        self._health = health
        self._retry = retry
        self._settings = settings
        self._worker_key = worker_key
        self._clock = clock
        self._metrics = metrics
        self._chance = chance
        self._background = background
        self._deadlines = Deadlines(clock)
        # Told of each request that goes to a worker; set by who wants to know.
        self.on_sent: Callable[[Request, Placed], None] | None = None

    def tick(self) -> None:
        """About once a second: end what takes too long."""
        self._deadlines.tick()

    def check(self) -> None:
        self._deadlines.check()

    async def forward(self, request: Request) -> None:
        """Answer `request` with what a worker says."""
        fields = read_fields(request)
        model = fields.model if isinstance(fields.model, str) else DEFAULT_MODEL
        call = Call(endpoint_of(request.path), model, fields.streaming)
        if not self._gate.limited:
            await self._forward_in_time(request, fields, call)
            return
        async with self._gate.admit():
            await self._forward_in_time(request, fields, call)

    async def _forward_in_time(self, request: Request, fields: RequestFields, call: Call) -> None:
        seconds_max = self._settings.request_seconds_max
        deadline = self._deadlines.enter(seconds_max)
        try:
            await self._forward(request, fields, call)
        except asyncio.CancelledError:
            if not deadline.passed:
                raise
            self._metrics.request_failed(call, "timeout")
            error = ApiError(504, "request_timeout", f"no whole answer within {seconds_max:g} s")
            self._refuse(request, error, fields)
        finally:
            self._deadlines.leave(deadline)
            self._metrics.request_ended(call, self._clock.monotonic() - request.began_seconds)

    async def _forward(self, request: Request, fields: RequestFields, call: Call) -> None:
        subject = await self._placement.describe(request, fields)
        try:
            attempt = await self._try_workers(request, subject, call)
        except NoWorkerError as error:
            self._routed(subject, call)
            self._metrics.request_failed(call, "no_workers")
            raise ApiError(503, "no_available_workers", str(error)) from error
        if attempt.response is None:
            assert attempt.error is not None
            self._metrics.request_failed(call, "backend_error")
            timed_out = attempt.error.kind == "timeout"
            raise ApiError(
                504 if timed_out else 502,
                "worker_timeout" if timed_out else "worker_unreachable",
                f"{attempt.placed.worker.url}: {attempt.error}",
            )
        try:
            await self._hand_through(request, fields, call, attempt, attempt.response)
        finally:
            self._count(attempt)
            attempt.response.close()
            self._ended(attempt.placed)

    # Tries ------------------------------------------------------------------------------------

    async def _try_workers(self, request: Request, subject: Subject, call: Call) -> Attempt:
        """Tries until an answer that should be handed on, or the last failure.

        On return the attempt's place is still taken where it has a response.

        Raises:
            NoWorkerError: nobody can take the request.
        """
        number = 0
        while True:
            attempt = await self._try(request, subject, call)
            last = number >= self._retry.retries_max
            if not attempt.retryable or (last and attempt.response is not None):
                return attempt
            await self._give_up(attempt)
            if last:
                self._metrics.retries_exhausted(call.endpoint)
                return attempt
            number += 1
            # A server that does not answer has no rank that does.
            placed = attempt.placed
            unreachable = attempt.response is None
            subject.exclude(placed.worker.domain_ids if unreachable else (placed.domain_id,))
            pause = self._pause_seconds(attempt, subject, number)
            self._metrics.retried(call.endpoint, number, pause)
            if pause > 0:
                await asyncio.sleep(pause)

    def _pause_seconds(self, attempt: Attempt, subject: Subject, number: int) -> float:
        """A dead worker costs no wait while another has not been asked yet."""
        if attempt.response is None and self._placement.has_untried(subject):
            return 0.0
        return self._retry.backoff_seconds(number, self._chance)

    async def _try(self, request: Request, subject: Subject, call: Call) -> Attempt:
        placed = self._placement.place(subject)
        worker = placed.worker
        attempt = Attempt(placed)
        self._registry.began(worker)
        sent: Callable[[], None] | None = partial(self._sent, request, placed, call)
        if placed.early is not None or placed.decision.pull is not None:
            # It may wait for pages, and the worker has work to come meanwhile.
            self._sent(request, placed, call)
            sent = None
        try:
            await self._placement.prepare(placed)
            attempt.response = await worker.pool.request(
                request.method.encode("ascii"),
                request.target,
                worker_headers(request, worker.api_key or self._worker_key),
                placed.body(request, subject),
                # Counted once it is on its way: that costs the caller nothing then.
                sent=sent,
            )
        except UpstreamError as error:
            attempt.error = error
            self._ended(placed)
            self._metrics.worker_error("connection" if error.kind == "connect" else "backend_error")
            self._health.suspect(worker, str(error))
        except BaseException:
            self._ended(placed)
            self._abort(placed, subject)
            raise
        if attempt.retryable:
            self._count(attempt)
        return attempt

    def _routed(self, subject: Subject, call: Call) -> None:
        """Count a request, once for all its tries."""
        if not subject.counted:
            subject.counted = True
            self._metrics.routed(call)

    def _sent(self, request: Request, placed: Placed, call: Call) -> None:
        self._routed(placed.subject, call)
        self._placement.sent(placed, call)
        if self.on_sent is not None:
            self.on_sent(request, placed)

    def _count(self, attempt: Attempt) -> None:
        """What is learned from an attempt's first bytes, once; after they have gone out, where the
        caller gets them."""
        if attempt.counted:
            return
        attempt.counted = True
        if attempt.response is not None:
            self._metrics.upstream(attempt.status)
            self._placement.first_bytes(attempt.placed, attempt.status)
        self._registry.outcome(attempt.placed.worker, success=not attempt.failed)

    async def _give_up(self, attempt: Attempt) -> None:
        """Let go of an answer that nobody will see."""
        if attempt.response is None:
            return
        self._metrics.worker_error("backend_error")
        try:
            async with asyncio.timeout(DISCARD_SECONDS_MAX):
                await attempt.response.read(DISCARD_BYTES_MAX)
        except (UpstreamError, TimeoutError):
            pass
        finally:
            attempt.response.close()
            self._ended(attempt.placed)

    def _ended(self, placed: Placed) -> None:
        self._registry.ended(placed.worker)
        self._placement.ended(placed)

    def _abort(self, placed: Placed, subject: Subject) -> None:
        """The caller went away. Closing the connection tells the worker in the end; an id that
        the caller chose tells it at once."""
        for rid in subject.fields.request_ids[:1]:
            self._background.start(self._abort_by_id(placed, rid), "abort")

    async def _abort_by_id(self, placed: Placed, rid: str) -> None:
        import msgspec

        body = msgspec.json.encode({"rid": rid})
        headers = [(b"content-type", b"application/json")]
        key = placed.worker.api_key or self._worker_key
        if key:
            headers.append((b"authorization", b"Bearer " + key.encode()))
        try:
            async with asyncio.timeout(DISCARD_SECONDS_MAX):
                answer = await placed.worker.pool.request(b"POST", b"/abort_request", headers, body)
                answer.close()
        except (UpstreamError, TimeoutError) as error:
            logger.debug("abort at %s: %s", placed.worker.url, error)

    # The answer -------------------------------------------------------------------------------

    async def _hand_through(
        self,
        request: Request,
        fields: RequestFields,
        call: Call,
        attempt: Attempt,
        response: UpstreamResponse,
    ) -> None:
        """Pieces go out as they come in; none waits for another."""
        placed = attempt.placed
        first_seconds = self._clock.monotonic() - request.began_seconds
        headers = caller_headers(response, placed.worker.worker_id.encode("ascii"))
        tail = b""

        def push(piece: bytes) -> bool:
            nonlocal tail
            tail = piece if len(piece) > TAIL_BYTES_MIN else (tail + piece)[-TAIL_BYTES_MAX:]
            request.send(piece, more=True)
            return not request.blocked

        try:
            piece = await response.chunk()
            if response.complete and response.header(b"content-length") is None:
                headers.append((b"content-length", b"%d" % len(piece)))
            request.start(response.status, headers)
            if not response.complete:
                push(piece)
                self._count(attempt)
            while not response.complete:
                await request.drained()
                piece = await response.pipe(push)
            request.send(piece, more=False)
            tail = piece if len(piece) > TAIL_BYTES_MIN else tail + piece
        except UpstreamError as error:
            self._count(attempt)
            self._broke_off(request, fields, call, placed, error)
            return
        total_seconds = self._clock.monotonic() - request.began_seconds
        self._finish(call, placed, tail, response.status, first_seconds, total_seconds)

    def _finish(
        self,
        call: Call,
        placed: Placed,
        tail: bytes,
        status: int,
        first_seconds: float,
        total_seconds: float,
    ) -> None:
        if status != 200:
            return
        usage = usage_of(tail)
        self._placement.answered(placed)
        self._metrics.tokens(call, prompt=usage.prompt_tokens, completion=usage.completion_tokens)
        if call.streaming:
            self._metrics.streamed(
                call, Stream(first_seconds, total_seconds, usage.completion_tokens)
            )

    def _broke_off(
        self,
        request: Request,
        fields: RequestFields,
        call: Call,
        placed: Placed,
        error: UpstreamError,
    ) -> None:
        """The worker died in the middle of its answer: say so, and leave the answer torn."""
        self._metrics.request_failed(call, "backend_error")
        self._metrics.worker_error("backend_error")
        self._registry.outcome(placed.worker, success=False)
        self._health.suspect(placed.worker, str(error))
        message = f"{placed.worker.url} broke off its answer: {error}"
        logger.warning("request %s: %s", request.request_id.decode("latin-1"), message)
        self._refuse(request, ApiError(502, "worker_lost", message), fields)

    def _refuse(self, request: Request, error: ApiError, fields: RequestFields) -> None:
        """An error answer, or where one has begun already, an event in it."""
        if not request.status:
            request.reply_error(error)
            return
        request.error_code = error.error_code
        if fields.streaming:
            event = stream_error(error.status, error.error_code, str(error))
            request.send(event, more=True)
        # Without its end the caller's HTTP library takes the answer for what it is: incomplete.
