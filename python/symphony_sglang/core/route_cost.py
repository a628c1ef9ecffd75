"""What a request would cost on a worker, in seconds: the rule by which `symphony` places.

The cost is the wait for the work before it, plus the cheapest way to have its prompt's KV, plus
what decoding is slower there than at the worker that decodes fastest, plus what is displaced for
it. Each worker's own measurements give the rates; one that has measured nothing is taken for the
median of those that have.

The cheapest way: the head of the prompt up to some point is loaded from where it is, the rest is
computed. Every level's end is such a point, so is what a promotion has under way, what requests
just routed there leave behind, and what a peer could send. Loads are summed with the computing that
follows, though workers overlap the two layer by layer: a bound, equal for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from symphony_sglang.core.gate import Rate
from symphony_sglang.core.location import Found
from symphony_sglang.core.routing_types import (
    Alternative,
    CostParts,
    PolicySettings,
    PrefixMatch,
    PullOffer,
    RouteRequest,
    TokenParts,
    WorkerRates,
    WorkerView,
)

# A decode step takes this much longer for each request that joins the batch.
STEP_GROWTH = 0.01
# The medians are taken anew after this many reports with other rates.
CHANGES_MAX = 64


class WorkerCost(NamedTuple):
    """What of a worker's cost does not depend on the request, worked out once for each view.

    `displace_seconds` is for each token newly put on the device. `free_tokens` is what running work
    leaves of the device pool, and `drain_seconds` how long running work takes to free one token.
    """

    view: WorkerView
    prefill: Rate
    host: Rate
    nvme: Rate
    peer: Rate
    queue_seconds: float
    step_seconds: float  # 0: not measured, taken for the least of all workers
    step_growth: float
    displace_seconds: float
    free_tokens: float
    drain_seconds: float
    # What `rank` reads, in one piece: id, page size, queue, step, growth, the least that an
    # uncached token costs however it is had, free tokens, drain.
    bound: tuple[str, int, float, float, float, float, float, float]


class Estimate(NamedTuple):
    """The cost of a request on one worker, and how its prompt would be had there."""

    worker: WorkerCost
    cost: CostParts
    tokens: TokenParts
    match: PrefixMatch
    pull: PullOffer | None
    seconds: float  # cost.total

    @property
    def uncached_tokens(self) -> int:
        return self.tokens.recompute

    def alternative(self) -> Alternative:
        return Alternative(self.worker.view.worker_id, self.cost, self.match)


class Source(NamedTuple):
    """A peer that has more of the prompt than the worker; `fast_tokens` of it not on NVMe only."""

    worker_id: str
    tokens: int
    fast_tokens: int


class Way(NamedTuple):
    """One way to have a prompt's KV on a worker's device: seconds by part, tokens by origin."""

    bring: float
    copy: float
    compute: float
    tokens: TokenParts
    pull: PullOffer | None


class CostModel:
    """The rates of the workers seen last, and the cost rule."""

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self._workers: dict[str, WorkerCost] = {}
        self._typical: tuple[Rate, Rate, Rate, Rate] | None = None
        self._rates: dict[str, WorkerRates] = {}
        self._steps: dict[str, float] = {}  # of those that have measured one
        self._least_step: float | None = None  # None: to be found
        self._changes = 0  # of rates, since the medians were taken

    def workers(self, views: Sequence[WorkerView]) -> list[WorkerCost]:
        """The views' parts of the cost; made anew only for view objects not seen before."""
        known = self._workers
        costs = [known.get(view.worker_id) for view in views]
        fresh = [v for v, c in zip(views, costs, strict=True) if c is None or c.view is not v]
        if fresh:
            for view in fresh:
                self._observe(view)
            # What is made rests on medians of all workers, so it comes after all have been seen.
            for view in fresh if known else views:
                known[view.worker_id] = self._make(view)
        return [known[view.worker_id] for view in views]

    def _observe(self, view: WorkerView) -> None:
        name = view.worker_id
        old = self._rates.get(name)
        if old is not view.rates and old != view.rates:
            self._rates[name] = view.rates
            self._changes += 1
            if old is None or self._changes >= CHANGES_MAX:
                # Medians move slowly; whoever has measured nothing is taken for the typical one.
                self._changes = 0
                self._typical = None
                self._workers.clear()
        step = view.load.decode_step_seconds
        if self._steps.get(name, 0.0) != step:
            self._steps.pop(name, None)
            if step > 0:
                self._steps[name] = step
            self._least_step = None

    def forget_worker(self, worker_id: str) -> None:
        self._workers.clear()
        self._typical = None
        self._rates.pop(worker_id, None)
        self._steps.pop(worker_id, None)
        self._least_step = None

    def _make(self, view: WorkerView) -> WorkerCost:
        settings, load, rates = self.settings, view.load, view.rates
        typical = self._typical or self._measure()
        prefill = rates.prefill or typical[0]
        if prefill.latency_seconds > typical[0].latency_seconds:
            # A step's fixed part is small and alike where the model is: a large one is noise of the
            # calibration, and would make a few tokens here dearer than a whole prompt elsewhere.
            prefill = Rate(prefill.tokens_per_second, typical[0].latency_seconds)
        host = rates.host_to_device or typical[1]
        queue = load.tokens_waiting_uncached / prefill.tokens_per_second
        # A step was measured with the running batch; an assumed one is that of a batch of one.
        joining = load.requests_waiting if load.decode_step_seconds else load.requests
        growth = 1 + STEP_GROWTH * joining
        step = growth * (load.decode_step_seconds or settings.decode_step_seconds)
        excess = load.requests + 1 - load.requests_max if load.requests_max else 0
        if excess > 0:
            # A place in the batch comes free every (answer length / batch size) steps.
            queue += excess * settings.output_tokens * step / load.requests_max
        restore = min(1 / prefill.tokens_per_second, 1 / host.tokens_per_second)
        if rates.host_to_device is None:
            restore = 1 / prefill.tokens_per_second
        displace = settings.displace_weight * restore if load.device_total_tokens else 0.0
        free = math.inf
        if load.device_total_tokens:
            free = max(0, load.device_total_tokens - load.device_used_tokens)
        peer = rates.peer_to_host or typical[3]
        floor = 1 / prefill.tokens_per_second
        if view.pulls_pages:
            floor = min(floor, 1 / peer.tokens_per_second + 1 / host.tokens_per_second)
        drain = settings.output_tokens * step / max(load.tokens_running, 1)
        step = growth * load.decode_step_seconds
        bound = (view.worker_id, view.page_size, queue, step, growth, floor, free, drain)
        return WorkerCost(
            view=view,
            prefill=prefill,
            host=host,
            nvme=rates.nvme_to_host or typical[2],
            peer=peer,
            queue_seconds=queue,
            step_seconds=step,
            step_growth=growth,
            displace_seconds=displace,
            free_tokens=free,
            drain_seconds=drain,
            bound=bound,
        )

    def _measure(self) -> tuple[Rate, Rate, Rate, Rate]:
        """Medians over the workers that have measured, and the defaults where none has."""
        default = self.settings.default_rates
        rates = list(self._rates.values())
        prefill = median_rate([r.prefill for r in rates], default.prefill)
        least = min((r.prefill.latency_seconds for r in rates if r.prefill), default=None)
        typical = (
            prefill if least is None else Rate(prefill.tokens_per_second, least),
            median_rate([r.host_to_device for r in rates], default.host_to_device),
            median_rate([r.nvme_to_host for r in rates], default.nvme_to_host),
            median_rate([r.peer_to_host for r in rates], default.peer_to_host),
        )
        self._typical = typical
        return typical

    # One request -------------------------------------------------------------------------------

    def rank(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        found: Mapping[int, Found],
        start: int,
    ) -> list[tuple[float, int, WorkerCost]]:
        """Candidates by a bound from below on `estimate(...).seconds`, at a tenth of its price.

        Equal ones stand in the order of `usable` from number `start` on, and round.
        """
        total, count = request.input_tokens, len(usable)
        advised = {place.worker_id: place.tokens for place in request.advised}
        workers = self.workers(usable)  # before the least step is asked for
        per_step, least = self._contention(request)
        page_size = -1
        ranked = []
        held: Mapping[str, int] = {}
        expected: Mapping[str, int] = {}
        for number, worker in enumerate(workers):
            name, size, queue, step, growth, per_token, free, drain = worker.bound
            if size != page_size:
                page_size, where = size, found.get(size)
                held = {} if where is None else where.pages
                expected = {} if where is None else where.expected
            uncached = total - (expected.get(name) or held.get(name, 0)) * size
            if advised:
                uncached = min(uncached, total - advised.get(name, 0))
            floor = queue + ((step or least * growth) - least) * per_step
            if uncached > 1:
                floor += uncached * per_token
            if total > free:
                floor += (total - free) * drain
            ranked.append((floor, (number - start) % count, worker))
        ranked.sort()
        return ranked

    def _contention(self, request: RouteRequest) -> tuple[float, float]:
        """(seconds that a second more of a decode step costs, the least step of all workers)."""
        settings = self.settings
        output = settings.output_tokens if request.output_tokens is None else request.output_tokens
        least = self._least_step
        if least is None:
            least = min(self._steps.values(), default=settings.decode_step_seconds)
            self._least_step = least
        return settings.contend_weight * output, least

    def _contend(self, worker: WorkerCost, request: RouteRequest) -> float:
        per_step, least = self._contention(request)
        step = worker.step_seconds or least * worker.step_growth
        return per_step * max(0.0, step - least)

    def _room(self, worker: WorkerCost, request: RouteRequest) -> float:
        """How long until running work has freed the memory that the prompt needs."""
        short = request.input_tokens - worker.free_tokens
        return short * worker.drain_seconds if short > 0 else 0.0

    def estimate(
        self,
        worker: WorkerCost,
        request: RouteRequest,
        match: PrefixMatch,
        source: Source | None,
        now_seconds: float,
    ) -> Estimate:
        """The cost on one worker, with the cheapest way to have the prompt's KV there."""
        way = self._own_way(worker, request, match, now_seconds)
        if source is not None and worker.view.pulls_pages:
            way = self._pulled_way(worker, request, match, source, way)
        bring, copy, compute, tokens, pull = way
        total = max(1, request.input_tokens)
        on_device = min(match.device_pages * worker.view.page_size, total - 1)
        cost = CostParts(
            queue=worker.queue_seconds + self._room(worker, request),
            bring=bring,
            pull=copy,
            recompute=compute + worker.prefill.latency_seconds,
            contend=self._contend(worker, request),
            displace=(total - on_device) * worker.displace_seconds,
        )
        return Estimate(worker, cost, tokens, match, pull, sum(cost))

    def _own_way(
        self,
        worker: WorkerCost,
        request: RouteRequest,
        match: PrefixMatch,
        now_seconds: float,
    ) -> Way:
        """From the worker's own levels, promotions under way there, and what it is computing."""
        total = max(1, request.input_tokens)
        last = total - 1  # one token at least is computed
        page = worker.view.page_size
        on_device = min(match.device_pages * page, last)
        to_host = min((match.device_pages + match.host_pages) * page, last)
        to_nvme = min(match.pages * page, last)
        per_token = 1 / worker.prefill.tokens_per_second
        bring, compute = 0.0, (total - on_device) * per_token
        tokens = TokenParts(on_device, 0, 0, 0, total - on_device)
        margin = self.settings.load_margin
        for end, on_nvme in ((to_host, 0), (to_nvme, to_nvme - to_host)):
            if end <= total - tokens.recompute:
                continue
            load = worker.host.seconds(end - on_device)
            if on_nvme:
                load += worker.nvme.seconds(on_nvme)
            computed = (total - end) * per_token
            if load / margin + computed < bring + compute:
                bring, compute = load, computed
                tokens = TokenParts(on_device, end - on_nvme - on_device, on_nvme, 0, total - end)
        for place in request.advised:
            if place.worker_id == worker.view.worker_id:
                end = min(place.tokens, last)
                wait = max(0.0, place.ready_seconds - now_seconds)
                computed = (total - end) * per_token
                if end > on_device and wait + computed < bring + compute:
                    bring, compute = wait, computed
                    tokens = TokenParts(end, 0, 0, 0, total - end)
        if match.expected_pages:
            end = min((match.pages + match.expected_pages) * page, last)
            spared = int((end - total + tokens.recompute) * self.settings.expected_discount)
            if spared > 0:
                compute -= spared * per_token
                tokens = tokens._replace(
                    device=tokens.device + spared, recompute=tokens.recompute - spared
                )
        return Way(bring, 0.0, compute, tokens, None)

    def _pulled_way(
        self,
        worker: WorkerCost,
        request: RouteRequest,
        match: PrefixMatch,
        source: Source,
        own: Way,
    ) -> Way:
        """With what a peer has beyond the worker's own levels, if that is cheaper than `own`."""
        total = max(1, request.input_tokens)
        page = worker.view.page_size
        end = min(source.tokens, total - 1)
        on_device = min(match.device_pages * page, end)
        to_host = min((match.device_pages + match.host_pages) * page, end)
        to_nvme = min(match.pages * page, end)
        pulled = end - to_nvme
        if pulled < self.settings.pull_tokens_min:
            return own
        copy = self._copy_seconds(worker, source, to_nvme, end)
        load = worker.host.seconds(end - on_device)
        if to_nvme > to_host:
            load += worker.nvme.seconds(to_nvme - to_host)
        compute = (total - end) / worker.prefill.tokens_per_second
        saved = own.bring + own.compute - copy - load - compute
        if saved <= 0:
            return own
        tokens = TokenParts(on_device, to_host - on_device, to_nvme - to_host, pulled, total - end)
        offer = PullOffer(source.worker_id, end, to_nvme, copy, saved)
        return Way(load, copy, compute, tokens, offer)

    def _copy_seconds(self, worker: WorkerCost, source: Source, start: int, end: int) -> float:
        """Transfer of tokens `start:end`: after what is under way, and no faster than the peer
        reads what it has on NVMe only."""
        copy = worker.peer.seconds(end - start)
        wait = worker.view.transfer_seconds
        peer = self._workers.get(source.worker_id)
        if peer is not None:
            wait = max(wait, peer.view.transfer_seconds)
            slow = end - max(start, source.fast_tokens)
            if slow > 0:
                copy = max(copy, peer.nvme.seconds(slow))
        return wait + copy


def median_rate(rates: Sequence[Rate | None], default: Rate | None) -> Rate:
    """The rate in the middle of those measured, or the default."""
    measured = sorted((r for r in rates if r is not None), key=lambda r: r.tokens_per_second)
    if measured:
        return measured[len(measured) // 2]
    assert default is not None
    return default
