"""What a request would cost on a worker, in seconds: the rule by which `symphony` places.

The cost is the wait for the work before it, plus the cheapest way to have its prompt's KV, plus
what decoding is slower there than at the worker that decodes fastest, plus what is displaced for
it. Each worker's own measurements give the rates; one that has measured nothing is taken for the
median of those that have.

The cheapest way: the head of the prompt up to some point is loaded from where it is, the rest is
computed. Every level's end is such a point, so is what a promotion has under way, what requests
just routed there leave behind, and what a peer could send. Loads are summed with the computing that
follows, though workers overlap the two layer by layer: a bound, equal for all. A second of loading,
or of waiting for it, counts as `1 / load_margin` of one: it leaves the device to others, which
computing does not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from symphony_sglang.core.location import Found
from symphony_sglang.core.routing_types import (
    Alternative,
    CostParts,
    PolicySettings,
    PrefixMatch,
    PullOffer,
    RouteRequest,
    TokenParts,
    WorkerView,
)
from symphony_sglang.core.worker_costs import Column, WorkerCost, WorkerCosts

# Where more workers than this stop at the same page, they count among most.
FEW = 4


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


# One way to have a prompt's KV on a worker's device: seconds of loading, of a pull and of
# computing, tokens by origin, and the pull if there is one.
Way = tuple[float, float, float, TokenParts, PullOffer | None]


class CostModel:
    """The cost rule, and the rates of the workers seen last."""

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.workers = WorkerCosts(settings)

    def forget_worker(self, worker_id: str) -> None:
        self.workers.forget_worker(worker_id)

    # One request -------------------------------------------------------------------------------

    def shortlist(
        self, request: RouteRequest, found: Mapping[int, Found]
    ) -> tuple[list[tuple[float, int]], float]:
        """(bound, position) of the few workers that have more of the prompt than most have, lowest
        first, and a bound for all others together.

        Where much of a prompt is somewhere, the others cannot compete, and go unlooked at.
        """
        workers, rest = self.workers, request.input_tokens
        views, positions, total = workers.views, workers.positions, rest
        left: dict[int, int] = {}
        for page_size, where in found.items():
            for end, names in where.groups:
                if len(names) > FEW:
                    rest = min(rest, total - end * page_size)
                    continue
                for name in names:
                    position = positions.get(name)
                    if position is not None and views[position].page_size == page_size:
                        left[position] = total - end * page_size
            for name, pages in where.expected.items():
                if name in positions:
                    position = positions[name]
                    left[position] = min(left.get(position, total), total - pages * page_size)
        for place in request.advised:
            position = positions.get(place.worker_id)
            if position is not None:
                left[position] = min(left.get(position, total), total - place.tokens)
        weight = self._step_weight(request)
        few = []
        for position, tokens in left.items():
            floor = workers.queue_seconds[position] + workers.slow_seconds[position] * weight
            floor += max(0, tokens) * workers.token_seconds[position]
            few.append((float(floor), position))
        few.sort()
        return few, max(0, rest) * workers.least_token_seconds

    def rank(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        found: Mapping[int, Found],
        start: int,
    ) -> Iterator[tuple[float, int]]:
        """Candidates, as positions among the views of the last `workers.update`, by a bound from
        below on `estimate(...).seconds`, lowest first.

        `usable` are among those views. Equal ones come in their order from position `start` on,
        and round.
        """
        floors = self.floors(request, found)
        count = len(floors)
        if len(usable) != count:
            positions = [self.workers.positions[view.worker_id] for view in usable]
            all_floors, floors = floors, np.full(count, math.inf)
            floors[positions] = all_floors[positions]
        rolled = np.concatenate((floors[start:], floors[:start]))
        for _ in usable:
            place = int(rolled.argmin())
            yield float(rolled[place]), (place + start) % count
            rolled[place] = math.inf

    def floors(self, request: RouteRequest, found: Mapping[int, Found]) -> Column:
        """A bound for each of `workers`: its queue, its slower steps, and what is not there, had in
        the cheapest way there is."""
        workers = self.workers
        floors = self._uncached(request, found)
        floors *= workers.token_seconds
        floors += workers.queue_seconds
        floors += workers.slow_seconds * self._step_weight(request)
        if workers.may_lack_room(request.input_tokens):
            short = np.maximum(request.input_tokens - workers.free_tokens, 0.0)
            floors += short * workers.drain_seconds
        return floors

    def _uncached(self, request: RouteRequest, found: Mapping[int, Found]) -> Column:
        """Tokens of the prompt that are not at each of `workers`, nor on their way there."""
        workers, total = self.workers, request.input_tokens
        uncached = np.full(len(workers.views), float(total))
        positions = workers.positions
        for page_size, where in found.items():
            for end, names in where.groups:
                left = max(0, total - end * page_size)
                if page_size != workers.page_size:
                    for name in names:
                        view = workers.view(name)
                        if view is not None and view.page_size == page_size:
                            uncached[positions[name]] = left
                elif len(names) > 1:
                    uncached[workers.places(names)] = left
                elif names and names[0] in positions:
                    uncached[positions[names[0]]] = left
            for name, pages in where.expected.items():
                self._lower(uncached, name, total - pages * page_size)
        for place in request.advised:
            self._lower(uncached, place.worker_id, total - place.tokens)
        return uncached

    def _lower(self, uncached: Column, worker_id: str, tokens: int) -> None:
        position = self.workers.positions.get(worker_id)
        if position is not None:
            uncached[position] = max(0, min(uncached[position], tokens))

    def _step_weight(self, request: RouteRequest) -> float:
        """Seconds that a second more of a decode step costs."""
        output = request.output_tokens
        return self.settings.contend_weight * (
            self.settings.output_tokens if output is None else output
        )

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
        queue = worker.queue_seconds
        if total > worker.free_tokens:
            # Until running work has freed the memory that the prompt needs.
            queue += (total - worker.free_tokens) * worker.drain_seconds
        on_device = min(match.device_pages * worker.view.page_size, total - 1)
        compute += worker.prefill.latency_seconds
        contend = worker.slow_seconds * self._step_weight(request)
        displace = (total - on_device) * worker.displace_seconds
        cost = CostParts(queue, bring, copy, compute, contend, displace)
        seconds = queue + bring + copy + compute + contend + displace
        return Estimate(worker, cost, tokens, match, pull, seconds)

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
        page, per_token = worker.view.page_size, 1 / worker.prefill.tokens_per_second
        on_device = min(match.device_pages * page, last)
        to_host = min((match.device_pages + match.host_pages) * page, last)
        to_nvme = min(match.pages * page, last)
        bring, compute = 0.0, (total - on_device) * per_token
        margin = self.settings.load_margin
        device, host, nvme = on_device, 0, 0
        for end, slow in ((to_host, 0), (to_nvme, to_nvme - to_host)):
            if end <= device + host + nvme:
                continue
            load = worker.host.seconds(end - on_device)
            if slow:
                load += worker.nvme.seconds(slow)
            load /= margin
            computed = (total - end) * per_token
            if load + computed < bring + compute:
                bring, compute = load, computed
                host, nvme = end - slow - on_device, slow
        for place in request.advised:
            if place.worker_id == worker.view.worker_id:
                end = min(place.tokens, last)
                wait = max(0.0, place.ready_seconds - now_seconds) / margin
                computed = (total - end) * per_token
                if end > on_device and wait + computed < bring + compute:
                    bring, compute = wait, computed
                    device, host, nvme = end, 0, 0
        if match.expected_pages:
            end = min((match.pages + match.expected_pages) * page, last)
            spared = int((end - device - host - nvme) * self.settings.expected_discount)
            if spared > 0:
                compute -= spared * per_token
                device += spared
        tokens = TokenParts(device, host, nvme, 0, total - device - host - nvme)
        return bring, 0.0, compute, tokens, None

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
        load /= self.settings.load_margin
        compute = (total - end) / worker.prefill.tokens_per_second
        saved = own[0] + own[2] - copy - load - compute
        if saved <= 0:
            return own
        tokens = TokenParts(on_device, to_host - on_device, to_nvme - to_host, pulled, total - end)
        offer = PullOffer(source.worker_id, end, to_nvme, copy, saved)
        return load, copy, compute, tokens, offer

    def _copy_seconds(self, worker: WorkerCost, source: Source, start: int, end: int) -> float:
        """Transfer of tokens `start:end`: after what is under way, and no faster than the peer
        reads what it has on NVMe only."""
        copy = worker.peer.seconds(end - start)
        wait = worker.view.transfer_seconds
        peer = self.workers.positions.get(source.worker_id)
        if peer is not None:
            wait = max(wait, self.workers.views[peer].transfer_seconds)
            slow = end - max(start, source.fast_tokens)
            if slow > 0:
                copy = max(copy, self.workers.cost(peer).nvme.seconds(slow))
        return wait + copy
