"""The default policy, `symphony`: each request where it costs the fewest seconds.

Costs are `route_cost`'s. What it adds: candidates are weighed in order of a cheap lower bound, so
that most of them are never weighed in full; ties go to the session's worker, then to more of the
prompt, then by chance among the least loaded; and a session stays where it is unless that is dearer
by a margin, which keeps it from going back and forth and keeps its first concurrent requests
together, while a worker that is overloaded still sheds the rest of its load, and only that.
"""

from __future__ import annotations

import math
import random as random_module
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import attrgetter
from typing import NamedTuple

from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import Found, LocationIndex
from symphony_sglang.core.route_cost import CostModel, Estimate, Source
from symphony_sglang.core.routing_types import (
    NO_COST,
    NO_MATCH,
    AdvisedPlace,
    AdvisoryChoice,
    Alternative,
    CostParts,
    Decision,
    PolicySettings,
    PrefixMatch,
    Reason,
    RouteRequest,
    WorkerState,
    WorkerView,
)
from symphony_sglang.core.worker_costs import WorkerCost, WorkerCosts
from symphony_sglang.errors import NoWorkerError

# Candidates that may be as cheap as the cheapest are weighed in full up to this many, then only if
# the bound is lower by more than a tie: of 64 idle workers it does not matter which.
WEIGHED_MAX = 4
SECONDS = attrgetter("seconds")


def candidates(request: RouteRequest, workers: Sequence[WorkerView]) -> Sequence[WorkerView]:
    """The workers that may take a request; `workers` itself where it may go to all.

    Raises:
        NoWorkerError: there is none; `.reason` says what ruled the last of them out.
    """
    ready = WorkerState.READY
    if request.target_worker is not None:
        named = [w for w in workers if request.target_worker in (w.worker_id, w.server_id)]
        if not named:
            raise NoWorkerError("target", f"no worker is called {request.target_worker!r}")
        workers = named
    usable: Sequence[WorkerView] = [w for w in workers if w.state is ready]
    if not usable:
        states = sorted({w.state.value for w in workers})
        problem = f"{len(workers)} workers, all {' or '.join(states)}" if workers else "no workers"
        raise NoWorkerError("unhealthy" if workers else "none", problem)
    if request.model_id is not None:
        usable = [w for w in usable if w.model_id is None or w.model_id == request.model_id]
        if not usable:
            raise NoWorkerError("model", f"no worker serves model {request.model_id!r}")
    if request.excluded:
        usable = [w for w in usable if w.worker_id not in request.excluded]
        if not usable:
            raise NoWorkerError("tried", f"all {len(request.excluded)} workers have failed it")
    return usable


class SessionMap:
    """Session -> worker with the time of last use; the least recently used goes when full."""

    def __init__(self, sessions_max: int, idle_seconds: float) -> None:
        self.sessions_max = sessions_max
        self.idle_seconds = idle_seconds
        self._places: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self.counts: Counter[str] = Counter()  # sessions of each worker

    def __len__(self) -> int:
        return len(self._places)

    def get(
        self, session_id: str, now_seconds: float, within_seconds: float | None = None
    ) -> str | None:
        """Its worker, if used within the idle time, or within a shorter one."""
        place = self._places.get(session_id)
        idle = self.idle_seconds if within_seconds is None else within_seconds
        if place is None or now_seconds - place[1] > idle:
            return None
        return place[0]

    def put(self, session_id: str, worker_id: str, now_seconds: float) -> None:
        self.forget(session_id)
        self._places[session_id] = (worker_id, now_seconds)
        self.counts[worker_id] += 1
        if len(self._places) > self.sessions_max:
            self.forget(next(iter(self._places)))

    def forget(self, session_id: str) -> None:
        place = self._places.pop(session_id, None)
        if place is not None:
            self.counts[place[0]] -= 1

    def forget_worker(self, worker_id: str) -> None:
        for session_id in [s for s, place in self._places.items() if place[0] == worker_id]:
            del self._places[session_id]
        self.counts.pop(worker_id, None)

    def expire(self, now_seconds: float) -> None:
        while self._places:
            session_id, (_, used_seconds) = next(iter(self._places.items()))
            if now_seconds - used_seconds <= self.idle_seconds:
                return
            self.forget(session_id)


class Weighed(NamedTuple):
    """The outcome of weighing candidates: the estimates, cheapest first, and the one to take."""

    chosen: Estimate
    reason: Reason
    estimates: list[Estimate]
    found: Mapping[int, Found]
    considered: int
    owner_id: str | None


class Asked(NamedTuple):
    """A request while its candidates are weighed; `sources` fills as they are needed."""

    request: RouteRequest
    found: Mapping[int, Found]
    now_seconds: float
    sources: dict[int, list[Source]]


class SymphonyPolicy:
    """Least cost in seconds, from the true place of KV at every level."""

    name = "symphony"

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self.settings = PolicySettings() if settings is None else settings
        self._model = CostModel(self.settings)
        limits = self.settings
        self._routed = SessionMap(limits.sessions_max, limits.session_idle_seconds)
        self._advised = SessionMap(limits.sessions_max, limits.session_idle_seconds)

    # Policy ------------------------------------------------------------------------------------

    def choose(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: random_module.Random,
    ) -> Decision:
        """See `routing_types.Policy`."""
        weighed = self._weigh(request, workers, index, now_seconds, random)
        chosen = weighed.chosen
        others = [e for e in weighed.estimates if e is not chosen]
        return Decision(
            worker_id=chosen.worker.view.worker_id,
            reason=weighed.reason,
            uncached_tokens=chosen.uncached_tokens,
            considered=weighed.considered,
            cost=chosen.cost,
            tokens=chosen.tokens,
            match=chosen.match,
            pull=chosen.pull,
            alternatives=tuple(e.alternative() for e in others[: self.settings.alternatives_max]),
            page_size=chosen.worker.view.page_size,
        )

    def routed(
        self, request: RouteRequest, decision: Decision, index: LocationIndex, now_seconds: float
    ) -> None:
        """Its session is there from now on, and so will its pages be."""
        worker_id = decision.worker_id
        if request.session_id is not None:
            self._routed.put(request.session_id, worker_id, now_seconds)
            self._advised.forget(request.session_id)
        hashes = request.page_hashes.get(decision.page_size)
        match = decision.match
        if hashes is not None and len(hashes) > match.pages + match.expected_pages:
            seconds = self.settings.speculative_seconds
            index.speculate(worker_id, hashes, now_seconds, seconds, match.pages)

    def choose_for_advisory(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: random_module.Random,
    ) -> AdvisoryChoice:
        """By the same cost. What is chosen is not binding: the request is placed anew."""
        weighed = self._weigh(request, workers, index, now_seconds, random)
        chosen, owner_id = weighed.chosen, weighed.owner_id
        others = [e for e in weighed.estimates if e is not chosen]
        # The owner first: whether a move away from it pays is what is asked next.
        others.sort(key=lambda estimate: estimate.worker.view.worker_id != owner_id)
        view = chosen.worker.view
        return describe_choice(
            request,
            view,
            weighed.found.get(view.page_size),
            chosen.match,
            weighed,
            cost=chosen.cost,
            bring_seconds=chosen.cost.bring * self.settings.load_margin,
            owner_id=owner_id,
            alternatives=tuple(e.alternative() for e in others[: self.settings.alternatives_max]),
        )

    def advised(self, request: RouteRequest, choice: AdvisoryChoice, now_seconds: float) -> None:
        """The session is being prepared there: it counts as its place until a request comes."""
        if request.session_id is not None:
            self._advised.put(request.session_id, choice.worker_id, now_seconds)

    def forget_worker(self, worker_id: str) -> None:
        self._model.forget_worker(worker_id)
        self._routed.forget_worker(worker_id)
        self._advised.forget_worker(worker_id)

    def forget_session(self, session_id: str) -> None:
        self._routed.forget(session_id)
        self._advised.forget(session_id)

    def tick(self, now_seconds: float) -> None:
        self._routed.expire(now_seconds)
        self._advised.expire(now_seconds)

    # Weighing ----------------------------------------------------------------------------------

    def _owner(self, request: RouteRequest, index: LocationIndex, now_seconds: float) -> str | None:
        """Where a session lives: where it was just sent, is being prepared, or was last served."""
        session_id = request.session_id
        if session_id is None:
            return None
        recent = self.settings.speculative_seconds
        owner = self._routed.get(session_id, now_seconds, recent)
        if owner is None:
            owner = self._advised.get(session_id, now_seconds)
        if owner is None:
            place = index.session(session_id)
            owner = None if place is None else place.worker_id
        # Workers that report no sessions still have them.
        return owner or self._routed.get(session_id, now_seconds)

    def _assume(
        self, request: RouteRequest, owner_id: str, index: LocationIndex, now_seconds: float
    ) -> RouteRequest:
        """Without page hashes a session's worker is taken to hold what it served last."""
        assert request.session_id is not None
        place = index.session(request.session_id)
        tokens = int(self.settings.blind_share * request.input_tokens)
        if place is not None and place.worker_id == owner_id:
            tokens = min(request.input_tokens, place.total_tokens)
        assumed = AdvisedPlace(owner_id, tokens, now_seconds)
        return replace(request, advised=(*request.advised, assumed))

    def _weigh(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: random_module.Random,
    ) -> Weighed:
        model = self._model
        if workers:
            model.workers.update(workers)
        whole = len(workers) > 0 and model.workers.all_fit(request)
        usable = workers if whole else candidates(request, workers)
        found = {
            page_size: index.find(hashes, now_seconds, request.session_id)
            for page_size, hashes in request.page_hashes.items()
        }
        owner_id = self._owner(request, index, now_seconds)
        if owner_id is not None and not request.page_hashes:
            request = self._assume(request, owner_id, index, now_seconds)
        asked = Asked(request, found, now_seconds, {})
        start = random.randrange(len(usable))
        estimates = self._candidates(asked, usable, start, whole=whole)
        if owner_id is not None and all(e.worker.view.worker_id != owner_id for e in estimates):
            owner = model.workers.view(owner_id)
            if owner is not None and any(view is owner for view in usable):
                cost = model.workers.cost(model.workers.positions[owner_id])
                estimates.append(self._estimate(asked, cost))
        estimates.sort(key=SECONDS)
        chosen, reason = self._settle(request, estimates, owner_id, random)
        if len(usable) == 1:
            reason = Reason.ONLY_WORKER if request.target_worker is None else Reason.TARGETED
        return Weighed(chosen, reason, estimates, found, len(usable), owner_id)

    def _candidates(
        self, asked: Asked, usable: Sequence[WorkerView], start: int, *, whole: bool
    ) -> list[Estimate]:
        """Estimates of all that may be as cheap as the cheapest, of most no more than a few."""
        model, costs = self._model, self._model.workers
        weighed: dict[int, Estimate] = {}
        best, bar = math.inf, math.inf
        few: list[tuple[float, int]] = []
        rest = 0.0
        if whole:
            few, rest = model.shortlist(asked.request, asked.found)
        for floor, position in few:
            if floor > bar:
                break
            estimate = weighed[position] = self._estimate(asked, costs.cost(position))
            if estimate.seconds < best:
                best = estimate.seconds
                bar = best + self._tie(best)
        if rest > bar:
            return list(weighed.values())
        for floor, position in model.rank(asked.request, usable, asked.found, start):
            if floor > bar or (len(weighed) >= WEIGHED_MAX and floor > 2 * best - bar):
                break
            if position not in weighed:
                estimate = weighed[position] = self._estimate(asked, costs.cost(position))
                if estimate.seconds < best:
                    best = estimate.seconds
                    bar = best + self._tie(best)
        return list(weighed.values())

    def _tie(self, best_seconds: float) -> float:
        """Costs that are higher than the cheapest by no more than this are as good."""
        settings = self.settings
        return max(settings.tie_seconds, settings.tie_share * best_seconds)

    def _estimate(self, asked: Asked, worker: WorkerCost) -> Estimate:
        view = worker.view
        where = asked.found.get(view.page_size)
        match = NO_MATCH if where is None else where.match(view.worker_id)
        source = None
        if view.pulls_pages and where is not None:
            more = (where.most - match.pages) * view.page_size
            if more >= self.settings.pull_tokens_min:
                source = self._source(asked, view)
        return self._model.estimate(worker, asked.request, match, source, asked.now_seconds)

    def _source(self, asked: Asked, view: WorkerView) -> Source | None:
        """The best peer to pull from; looked for once for each page size."""
        sources = asked.sources.get(view.page_size)
        if sources is None:
            where = asked.found[view.page_size]
            sources = best_sources(self._model.workers, where, view.page_size)
            asked.sources[view.page_size] = sources
        return next((peer for peer in sources if peer.worker_id != view.worker_id), None)

    def _settle(
        self,
        request: RouteRequest,
        estimates: Sequence[Estimate],
        owner_id: str | None,
        random: random_module.Random,
    ) -> tuple[Estimate, Reason]:
        """Of estimates in ascending order: the cheapest, but for ties and for staying."""
        settings = self.settings
        best = estimates[0]
        tie = best.seconds + self._tie(best.seconds)
        stay = best.seconds * (1 + settings.stay_share) + settings.stay_seconds
        tied = [e for e in estimates if e.seconds <= tie]
        for estimate in estimates:
            if estimate.worker.view.worker_id != owner_id:
                continue
            if estimate is best:
                return best, Reason.LEAST_COST
            if estimate.seconds <= tie:
                return estimate, Reason.TIE_SESSION
            seconds = estimate.seconds
            if abs(estimate.tokens.recompute - best.tokens.recompute) <= settings.stay_tokens:
                # The same prefill on both: how they measured it says nothing about where to go.
                seconds -= max(0.0, estimate.cost.recompute - best.cost.recompute)
            # Where one of the cheapest has more of it, there is nothing to stay for.
            here = held(estimate)
            if seconds <= stay and here and here + settings.stay_tokens >= max(map(held, tied)):
                return estimate, Reason.SESSION
        if len(tied) == 1:
            return best, Reason.LEAST_COST
        top = max(map(held, tied))
        fuller = [e for e in tied if held(e) == top]
        if len(fuller) < len(tied) and len(fuller) == 1:
            return fuller[0], Reason.TIE_CACHE
        fewest = min(e.worker.view.load.requests for e in fuller)
        least = [e for e in fuller if e.worker.view.load.requests == fewest]
        return random.choice(least), Reason.TIE_SPREAD


def held(estimate: Estimate) -> int:
    """Tokens of the prompt that are of use at the worker itself."""
    tokens = estimate.tokens
    return tokens.device + tokens.host + tokens.nvme


def best_sources(workers: WorkerCosts, where: Found, page_size: int) -> list[Source]:
    """The two workers with most of the prompt that serve pages, most first.

    A draining worker is as good a source as any. Among equals the one with the fewest transfers,
    then the fewest requests.
    """
    sources: list[Source] = []
    for end, names in reversed(where.groups):
        views = [view for view in map(workers.view, names) if view is not None]
        ranked = sorted(
            (view.transfer_seconds, view.load.requests, view.worker_id)
            for view in views
            if view.serves_pages
            and view.page_size == page_size
            and view.state is not WorkerState.UNHEALTHY
        )
        for _, _, name in ranked[: 2 - len(sources)]:
            fast = fast_pages(where.match(name)) * page_size
            sources.append(Source(name, end * page_size, fast))
        if len(sources) == 2:
            break
    return sources


def fast_pages(match: PrefixMatch) -> int:
    """Pages on device or host."""
    return match.device_pages + match.host_pages


def describe_choice(
    request: RouteRequest,
    view: WorkerView,
    found: Found | None,
    match: PrefixMatch,
    decided: Decision | Weighed,
    *,
    cost: CostParts = NO_COST,
    bring_seconds: float = 0.0,
    owner_id: str | None = None,
    alternatives: tuple[Alternative, ...] = (),
) -> AdvisoryChoice:
    """An advisory's choice, with the worker that the KV would have to come from.

    `found` and `match` are of the chosen worker's page size. Of several sources with as much the
    session's owner is taken: its copy is the newest.
    """
    source_id, most = None, match.pages
    for worker_id, pages in {} if found is None else found.pages.items():
        if pages > most or (pages == most > match.pages and worker_id == owner_id):
            source_id, most = worker_id, pages
    best = match if found is None or source_id is None else found.match(source_id)
    return AdvisoryChoice(
        worker_id=view.worker_id,
        reason=decided.reason,
        cost=cost,
        bring_seconds=bring_seconds,
        match=match,
        best_level=fastest_level(best),
        source_worker_id=source_id,
        tokens=min(most * view.page_size, request.input_tokens),
        considered=decided.considered,
        alternatives=alternatives,
    )


def fastest_level(match: PrefixMatch) -> Level | None:
    """The fastest level that holds any of a prompt; None where none does."""
    for level, pages in zip((Level.DEVICE, Level.HOST, Level.NVME), match, strict=False):
        if pages:
            return level
    return None
