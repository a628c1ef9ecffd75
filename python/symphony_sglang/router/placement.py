"""Which worker takes a request: what is known of both, put before a policy of ``core.routing``."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.migration_book import EarlyChoice
from symphony_sglang.core.prefix import NO_NAMESPACE, Namespace
from symphony_sglang.core.routing_types import (
    AdvisedPlace,
    AdvisoryChoice,
    Decision,
    Policy,
    RouteRequest,
    WorkerRates,
    WorkerState,
    WorkerView,
)
from symphony_sglang.core.worker_load import LoadLedger
from symphony_sglang.errors import NoWorkerError
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.fields import RequestFields, expected_output
from symphony_sglang.router.http import Request
from symphony_sglang.router.moves import MovingSessions
from symphony_sglang.router.prompts import has_ids, prompt_of, prompt_text
from symphony_sglang.router.registry import Worker, WorkerRegistry, with_state
from symphony_sglang.router.sessions import namespace_of, session_key, session_of
from symphony_sglang.router.text_pages import TextPages, text_hashes
from symphony_sglang.router.tokens import (
    BYTES_PER_TOKEN,
    NO_TOKENS,
    PromptTokens,
    Tokens,
)
from symphony_sglang.telemetry.router import Call, RouterMetrics

# Policies that look at a prompt's pages, and those that look at its text.
PAGE_POLICIES = ("symphony", "symphony-paper")
TEXT_POLICIES = ("cache_aware",)
# Policies that do not look at load, so that views need not be kept up to date for them.
LOADLESS_POLICIES = ("round_robin", "random")
# Routes whose prompt the router can turn into the worker's token ids.
PROMPT_ROUTES = ("/generate", "/v1/completions", "/v1/chat/completions")
TOKENIZE_SECONDS_MAX = 2.0
RANK_HEADER = b"x-data-parallel-rank"
TARGET_HEADER = b"x-smg-target-worker"


@dataclass(slots=True)
class Subject:
    """A request that is being placed; `route` changes as workers fail it."""

    route: RouteRequest
    fields: RequestFields
    session_id: str | None = None
    namespace: Namespace = NO_NAMESPACE
    rank: int | None = None
    exact: bool = True  # page hashes are those of the workers, not of text
    token_bytes: bytes = b""
    counted: bool = False  # among the requests that were routed

    def exclude(self, domain_ids: Iterable[str]) -> None:
        """They have failed it."""
        self.route = replace(self.route, excluded=self.route.excluded.union(domain_ids))


@dataclass(slots=True)
class Placed:
    """A request's place at a worker, taken until `Placement.ended`."""

    key: str
    worker: Worker
    domain_id: str
    rank: int
    decision: Decision
    subject: Subject
    advisory_ids: tuple[str, ...] = ()
    first_seen: bool = False
    early: EarlyChoice | None = None  # its session moves just now
    turn: bool = False  # counted as a turn of its session
    decision_seconds: float = 0.0
    sent_seconds: float = 0.0

    def body(self, request: Request, subject: Subject) -> bytes:
        """The request's body, with the rank named in it where the worker has several.

        SGLang reads the header that callers may send on its OpenAI routes only.
        """
        if subject.rank is not None and request.path != "/generate":
            return request.body
        if self.domain_id == self.worker.worker_id and subject.rank is None:
            return request.body
        rank = self.rank if subject.rank is None else subject.rank
        fields = subject.fields
        body = request.body
        if fields.routed_dp_rank is not None or fields.data_parallel_rank is not None:
            return body
        brace = body.find(b"{")
        if brace < 0 or body[brace + 1 :].lstrip()[:1] == b"}":
            return body
        return b'%s{"routed_dp_rank":%d,%s' % (body[:brace], rank, body[brace + 1 :])


class Placement:
    """Owns the index of locations, the load ledger and the policy. One event loop."""

    def __init__(
        self,
        *,
        registry: WorkerRegistry,
        policy: Policy,
        tokens: PromptTokens,
        executor: ThreadPoolExecutor,
        clock: Clock,
        metrics: RouterMetrics,
        chance: random.Random,
        index: LocationIndex | None = None,
        ledger: LoadLedger | None = None,
    ) -> None:
        self.registry = registry
        self.policy = policy
        self.tokens = tokens
        self.index = LocationIndex() if index is None else index
        self.text_pages = TextPages(self.index)
        self.ledger = LoadLedger() if ledger is None else ledger
        self.rates: dict[str, Any] = {}  # domain id -> WorkerRates
        self.advised_places: Any = None  # session key -> places; set by the advisory desk
        self.promise: Any = None  # (session key, place, until): remembers one; set by the same
        # Told when a worker has begun to answer a turn of a session; set by the advisory desk.
        self.taken: Callable[[Placed], None] | None = None
        self.peer_rates: dict[str, Rate] = {}  # domain id -> as its moves measured
        self.moving: MovingSessions | None = None
        self._executor = executor
        self._clock = clock
        self._metrics = metrics
        self._chance = chance
        self._numbers = itertools.count(1)
        self._views: dict[str, WorkerView] = {}
        self._views_generation = -1
        self._stale: set[str] = set()
        registry.events.removed.append(self._on_removed)

    # Describing -------------------------------------------------------------------------------

    async def describe(self, request: Request, fields: RequestFields) -> Subject:
        """What a policy needs to know of a request."""
        session_id = session_of(request, fields)
        namespace = namespace_of(fields)
        key = None if session_id is None else session_key(session_id, namespace)
        tokens = NO_TOKENS
        if self.policy.name in PAGE_POLICIES:
            if request.path in PROMPT_ROUTES:
                tokens = await self._tokenize(fields, session_id, namespace)
            if not tokens.page_hashes:
                tokens = self._text_pages(fields, namespace)
        text = ""
        if self.policy.name in TEXT_POLICIES:
            text = prompt_text(fields)
        advised: tuple[AdvisedPlace, ...] = ()
        if key is not None and self.advised_places is not None:
            advised = self.advised_places(key)
        route = RouteRequest(
            request_id=request.request_id.decode("latin-1"),
            input_tokens=tokens.length or max(1, len(request.body) // BYTES_PER_TOKEN),
            page_hashes=tokens.page_hashes,
            session_id=key,
            text=text,
            output_tokens=expected_output(fields),
            model_id=self._model(fields),
            target_worker=self._target(request),
            advised=advised,
        )
        rank = rank_of(request)
        return Subject(route, fields, session_id, namespace, rank, tokens.exact, tokens.token_bytes)

    def _model(self, fields: RequestFields) -> str | None:
        """The model asked for, where any worker goes by that name; else all are candidates."""
        model = fields.model
        if not isinstance(model, str):
            return None
        return model if any(worker.model_id == model for worker in self.registry) else None

    def _target(self, request: Request) -> str | None:
        name = request.header(TARGET_HEADER)
        if name is None:
            return None
        if self.registry.domain(name) is not None:
            return name
        worker = self.registry.find(name)
        if worker is None:
            raise ApiError(400, "unknown_worker", f"X-SMG-Target-Worker {name[:256]!r}: not known")
        return worker.domain_ids[0]

    async def _tokenize(
        self,
        fields: RequestFields,
        session_id: str | None,
        namespace: Namespace,
    ) -> Tokens:
        sizes = self.page_sizes()
        if not sizes or not (self.tokens.knows_text or has_ids(fields)):
            return NO_TOKENS
        try:
            return await self.in_thread(self._tokens_of, fields, sizes, session_id, namespace)
        except TimeoutError:
            return NO_TOKENS

    def _text_pages(self, fields: RequestFields, namespace: Namespace) -> Tokens:
        """Where the tokens cannot be known. Bounded, and quick enough for the event loop."""
        text = prompt_text(fields)
        hashes = {size: text_hashes(text, size, namespace) for size in self.page_sizes()}
        hashes = {size: found for size, found in hashes.items() if len(found)}
        return Tokens(max(1, len(text) // BYTES_PER_TOKEN), hashes, exact=False)

    async def in_thread(self, work: Callable[..., Tokens], *arguments: Any) -> Tokens:
        """Run `work` beside the event loop, and wait for it for a bounded time.

        Raises:
            TimeoutError: it takes too long; what it learns is kept for the next time.
        """
        started = self._executor.submit(work, *arguments)
        async with asyncio.timeout(TOKENIZE_SECONDS_MAX):
            return await asyncio.wrap_future(started)

    def _tokens_of(
        self,
        fields: RequestFields,
        sizes: frozenset[int],
        session_id: str | None,
        namespace: Namespace,
    ) -> Tokens:
        """In a thread: anything may be wrong with a prompt, and then it just is not known."""
        prompt = prompt_of(fields)
        if prompt is None:
            return NO_TOKENS
        try:
            return self.tokens.tokens(prompt, sizes, session_id, namespace)
        except (ValueError, OverflowError, TypeError):
            return NO_TOKENS

    def page_sizes(self) -> frozenset[int]:
        return frozenset(w.info.page_size for w in self.registry if w.info.page_size)

    # Choosing ---------------------------------------------------------------------------------

    def place(self, subject: Subject) -> Placed:
        """Choose. Once every candidate has failed the request, all are candidates again.

        Raises:
            NoWorkerError: nobody can take it.
        """
        began = self._clock.monotonic()
        workers = self.views(subject.rank)
        route = subject.route
        early = None if self.moving is None else self.moving.early(route)
        try:
            decision = self._choose_early(route, workers, early, began)
        except NoWorkerError:
            if not route.excluded:
                raise
            route = subject.route = replace(route, excluded=frozenset())
            decision = self._choose(route, workers, began)
        if early is not None and decision.worker_id != early.worker_id:
            early = None
        found = self.registry.domain(decision.worker_id)
        if found is None:
            raise NoWorkerError("none", "the chosen worker has just been removed")
        key = f"{next(self._numbers)}"
        placed = Placed(key, found[0], decision.worker_id, found[1], decision, subject)
        placed.decision_seconds = self._clock.monotonic() - began
        placed.early = early
        return placed

    def _choose_early(
        self,
        route: RouteRequest,
        workers: list[WorkerView],
        early: EarlyChoice | None,
        now_seconds: float,
    ) -> Decision:
        """At the source or target of its session's move if that can be, else anywhere."""
        if early is not None:
            pinned = replace(route, target_worker=early.worker_id)
            # A draining worker serves what it still has.
            named = [
                with_state(view, WorkerState.READY)
                if view.worker_id == early.worker_id and view.state is WorkerState.DRAINING
                else view
                for view in workers
            ]
            with contextlib.suppress(NoWorkerError):
                return self._choose(pinned, named, now_seconds)
        return self._choose(route, workers, now_seconds)

    def _choose(
        self, route: RouteRequest, workers: list[WorkerView], now_seconds: float
    ) -> Decision:
        return self.policy.choose(route, workers, self.index, now_seconds, self._chance)

    def choose_for_advisory(self, route: RouteRequest) -> AdvisoryChoice:
        """The worker for a session's next turn.

        Raises:
            NoWorkerError: nobody can take it.
        """
        now = self._clock.monotonic()
        return self.policy.choose_for_advisory(route, self.views(), self.index, now, self._chance)

    def has_untried(self, subject: Subject) -> bool:
        """Whether somebody who may take requests has not failed this one yet."""
        return any(
            view.worker_id not in subject.route.excluded
            for view in self.views(subject.rank)
            if view.state.value == "ready"
        )

    def views(self, rank: int | None = None) -> list[WorkerView]:
        """All cache domains as a policy sees them; with `rank`, only those of that rank."""
        if self._views_generation != self.registry.generation:
            self._rebuild()
        if self._stale and self.policy.name not in LOADLESS_POLICIES:
            now = self._clock.monotonic()
            for domain_id in self._stale:
                view = self._views.get(domain_id)
                if view is not None:
                    load, rates = self.ledger.view(domain_id, now), self.rates.get(domain_id)
                    self._views[domain_id] = replace(view, load=load, rates=rates or view.rates)
            self._stale.clear()
        views = list(self._views.values())
        if rank is None:
            return views
        return [view for view in views if view.dp_rank in (None, rank)]

    def _rebuild(self) -> None:
        """All anew. A view that says nothing new stays the object it was, which costs less."""
        now, known = self._clock.monotonic(), self._views
        self._views = {}
        for worker in self.registry:
            for view in worker.views(now):
                name = view.worker_id
                rates = self.rates.get(name, view.rates)
                fresh = replace(view, rates=rates, load=self.ledger.view(name, now))
                old = known.get(name)
                self._views[name] = old if old is not None and old == fresh else fresh
        self._views_generation = self.registry.generation
        self._stale.clear()

    def reported(self, domain_id: str) -> None:
        """The load of a domain changed, or its rates."""
        self._stale.add(domain_id)

    def refresh(self) -> None:
        """Build all views anew at the next choice: breakers may have changed."""
        self._views_generation = -1

    # A request's life -------------------------------------------------------------------------

    def sent(self, placed: Placed, call: Call) -> None:
        """It is on its way to the worker."""
        now = placed.sent_seconds = self._clock.monotonic()
        route, decision = placed.subject.route, placed.decision
        self.ledger.sent(
            placed.domain_id, placed.key, decision.uncached_tokens, route.input_tokens, now
        )
        self._stale.add(placed.domain_id)
        self.policy.routed(route, decision, self.index, now)
        reason, seconds = decision.reason.value, placed.decision_seconds
        self._metrics.selected(self.policy.name, call.model, reason, seconds)
        if route.page_hashes and placed.subject.exact:
            parts = decision.tokens
            levels = {"device": parts.device, "host": parts.host, "nvme": parts.nvme}
            self._metrics.matched(levels, route.input_tokens)

    def first_bytes(self, placed: Placed, status: int) -> None:
        placed.first_seen = True
        self.ledger.first_token(placed.key)
        self._stale.add(placed.domain_id)
        if self.taken is not None and status == 200 and placed.subject.route.session_id is not None:
            self.taken(placed)

    def answered(self, placed: Placed) -> None:
        """The worker answered well."""
        if placed.subject.exact:
            return
        size = placed.worker.info.page_size
        hashes = placed.subject.route.page_hashes.get(size)
        if hashes is not None:
            self.text_pages.sent(placed.domain_id, hashes)

    async def prepare(self, placed: Placed) -> None:
        """Wait for pages on their way to the worker, where that is quicker than doing without."""
        if self.moving is not None:
            await self.moving.prepare(placed)

    def learn_peer_rate(self, domain_id: str, rate: Rate) -> None:
        """How fast pages come to a worker from its peers; small changes are let be."""
        known = self.peer_rates.get(domain_id)
        if known is not None and 0.8 < rate.tokens_per_second / known.tokens_per_second < 1.25:
            return
        self.peer_rates[domain_id] = rate
        self.rates[domain_id] = replace(
            self.rates.get(domain_id) or WorkerRates(), peer_to_host=rate
        )
        self.reported(domain_id)

    def ended(self, placed: Placed) -> None:
        if self.moving is not None:
            self.moving.ended(placed)
        self.ledger.ended(placed.key)
        self._stale.add(placed.domain_id)

    def _on_removed(self, worker: Worker) -> None:
        for domain_id in worker.domain_ids:
            self.text_pages.cleared(domain_id)
            self.policy.forget_worker(domain_id)
            self.index.forget_worker(domain_id)
            self.ledger.forget_worker(domain_id)
            self.rates.pop(domain_id, None)
            self.peer_rates.pop(domain_id, None)

    def tick(self) -> None:
        """About once a second."""
        self.policy.tick(self._clock.monotonic())
        self.refresh()
        self.views()  # now, not when a request waits for it


def rank_of(request: Request) -> int | None:
    """The data-parallel rank that the caller wants.

    Raises:
        ApiError: 400, it is not a number.
    """
    value = request.header(RANK_HEADER)
    if value is None:
        return None
    if not value.isdecimal() or len(value) > 6:
        raise ApiError(
            400,
            "invalid_rank",
            f"X-Data-Parallel-Rank is {value[:80]!r}; expected a whole number of at least 0",
        )
    return int(value)
