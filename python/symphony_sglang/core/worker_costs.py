"""What of a request's cost does not depend on the request: kept for each worker, changed when the
worker's view changes.

A decision among many workers pays for the views that are new objects since the last one, and reads
the rest from columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from operator import is_not
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from symphony_sglang.core.gate import Rate
from symphony_sglang.core.routing_types import (
    PolicySettings,
    RouteRequest,
    WorkerRates,
    WorkerState,
    WorkerView,
)

# A decode step takes this much longer for each request that joins the batch.
STEP_GROWTH = 0.01
# The medians are taken anew after this many reports with other rates.
CHANGES_MAX = 64
MIXED = -1  # in place of a page size
PLACES_MAX = 4096
READY = WorkerState.READY

Column = npt.NDArray[np.float64]
Positions = npt.NDArray[np.intp]
NO_COLUMN: Column = np.zeros(0)


class WorkerCost(NamedTuple):
    """What of a worker's cost does not depend on the request.

    `displace_seconds` is for each token newly put on the device. `free_tokens` is what running work
    leaves of the device pool, and `drain_seconds` how long running work takes to free one token.
    `slow_seconds` is by how much a decode step is longer than at the worker that decodes fastest.
    """

    view: WorkerView
    prefill: Rate
    host: Rate
    nvme: Rate
    peer: Rate
    queue_seconds: float
    slow_seconds: float
    displace_seconds: float
    free_tokens: float
    drain_seconds: float


class Speeds(NamedTuple):
    """A worker's rates with the gaps filled in, and what follows from them alone."""

    rates: WorkerRates  # what they were made from
    prefill: Rate
    host: Rate
    nvme: Rate
    peer: Rate
    computed_seconds: float  # of a token that is computed
    pulled_seconds: float  # of a token that a peer sends, if that is less
    displace_seconds: float


class WorkerCosts:
    """The workers of the last decision, and what each costs before any request.

    Columns are float64 arrays in the order of `views`:

    - `queue_seconds`: how long what is there will keep a new request waiting;
    - `slow_seconds`: by how much a decode step is longer than at the worker that decodes fastest;
    - `token_seconds`: the least that an uncached token costs, however it is had;
    - `free_tokens` and `drain_seconds`: see `WorkerCost`.
    """

    def __init__(self, settings: PolicySettings) -> None:
        self.settings = settings
        self.views: list[WorkerView] = []
        self.positions: dict[str, int] = {}
        self.queue_seconds = self.slow_seconds = self.token_seconds = NO_COLUMN
        self.free_tokens = self.drain_seconds = NO_COLUMN
        self.page_size = MIXED  # of all workers, where they agree
        self._costs: list[WorkerCost | None] = []  # None: to be made
        self._decode: list[float] = []  # a step of infinity: not measured
        self._growth: list[float] = []
        self._least_step = math.inf
        self._free_bound = math.inf  # no worker has less
        self._token_bound = 0.0  # no worker has less; 0: to be found
        self._models: set[str | None] = set()
        self._unready = 0
        self._speeds: dict[str, Speeds] = {}
        self._rates: dict[str, WorkerRates] = {}
        self._typical: tuple[Rate, Rate, Rate, Rate] | None = None
        self._changes = 0  # of rates, since the medians were taken
        self._places: dict[int, tuple[tuple[str, ...], Positions]] = {}

    # Changes -----------------------------------------------------------------------------------

    def update(self, views: Sequence[WorkerView]) -> None:
        """Bring everything up to date with `views`; only view objects not seen before cost."""
        known = self.views
        if len(views) != len(known):
            self._rebuild(views)
            return
        least = self._least_step
        for position in list(compress(range(len(known)), map(is_not, views, known))):
            view, old = views[position], known[position]
            if (
                view.worker_id != old.worker_id
                or view.page_size != old.page_size
                or view.model_id != old.model_id
            ):
                self._rebuild(views)
                return
            if view.rates is not old.rates:
                self._observe(view)
                if self._typical is None:
                    self._rebuild(views)
                    return
            known[position] = view
            if view.state is not old.state:
                self._unready += (view.state is not READY) - (old.state is not READY)
            self._enter(position, view)
        if self._least_step != least:
            self._compare_steps()

    def forget_worker(self, worker_id: str) -> None:
        self.views.clear()
        self.positions.clear()
        self._speeds.clear()
        self._typical = None
        self._rates.pop(worker_id, None)

    def _rebuild(self, views: Sequence[WorkerView]) -> None:
        for view in views:
            self._observe(view)
        # What is made rests on medians of all workers, so it comes after all have been seen.
        count = len(views)
        self.views = list(views)
        self.positions = {view.worker_id: position for position, view in enumerate(views)}
        self.queue_seconds, self.slow_seconds, self.token_seconds = np.zeros((3, count))
        self.free_tokens, self.drain_seconds = np.zeros((2, count))
        self._growth, self._decode = [1.0] * count, [math.inf] * count
        sizes = {view.page_size for view in views}
        self.page_size = sizes.pop() if len(sizes) == 1 else MIXED
        self._models = {view.model_id for view in views}
        self._unready = sum(view.state is not READY for view in views)
        self._places.clear()
        self._costs = [None] * count
        self._least_step = self._free_bound = math.inf
        self._token_bound = 0.0
        for position, view in enumerate(views):
            self._enter(position, view)
        self._compare_steps()

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
                self._speeds.clear()

    def _enter(self, position: int, view: WorkerView) -> None:
        """Fill in a row of the columns."""
        self._costs[position] = None
        output, load, speeds = self.settings.output_tokens, view.load, self._speeds_of(view)
        decode, requests = load.decode_step_seconds, load.requests
        # A step was measured with the running batch; an assumed one is that of a batch of one.
        growth = 1 + STEP_GROWTH * (load.requests_waiting if decode else requests)
        step = growth * (decode or self.settings.decode_step_seconds)
        queue = load.tokens_waiting_uncached * speeds.computed_seconds
        if 0 < load.requests_max <= requests:
            # A place in the batch comes free every (answer length / batch size) steps.
            queue += (requests + 1 - load.requests_max) * output * step / load.requests_max
        self.queue_seconds[position] = queue
        running = load.tokens_running
        # Where nothing runs, nothing has to end before there is room.
        self.drain_seconds[position] = output * step / running if running else 0.0
        seconds = speeds.pulled_seconds if view.pulls_pages else speeds.computed_seconds
        if seconds != self.token_seconds[position]:
            self.token_seconds[position] = seconds
            self._token_bound = 0.0  # to be found anew
        free = math.inf
        if load.device_total_tokens:
            free = max(0, load.device_total_tokens - load.device_used_tokens)
            self._free_bound = min(self._free_bound, free)
        self.free_tokens[position] = free
        self._growth[position] = growth
        self.slow_seconds[position] = self._enter_step(position, decode or math.inf, growth)

    def _enter_step(self, position: int, decode_seconds: float, growth: float) -> float:
        was, least = self._decode[position], self._least_step
        self._decode[position] = decode_seconds
        if decode_seconds < least:
            self._least_step = decode_seconds
        elif was == least != decode_seconds:
            self._least_step = min(self._decode)
        least = self.least_step
        return max(0.0, (least if decode_seconds == math.inf else decode_seconds) * growth - least)

    def _compare_steps(self) -> None:
        """All steps with the least, after that has changed."""
        self._costs = [None] * len(self.views)
        least = self.least_step
        decode = np.array(self._decode)
        decode[decode == math.inf] = least
        self.slow_seconds = np.maximum(decode * np.array(self._growth) - least, 0.0)

    # Reading -----------------------------------------------------------------------------------

    @property
    def least_step(self) -> float:
        """Of the worker that decodes fastest."""
        least = self._least_step
        return self.settings.decode_step_seconds if least == math.inf else least

    @property
    def least_token_seconds(self) -> float:
        """What an uncached token costs at the least, anywhere."""
        if not self._token_bound:
            self._token_bound = float(self.token_seconds.min())
        return self._token_bound

    def may_lack_room(self, tokens: int) -> bool:
        """Whether any worker has less free than this."""
        if tokens <= self._free_bound:
            return False
        self._free_bound = float(self.free_tokens.min())
        return tokens > self._free_bound

    def all_fit(self, request: RouteRequest) -> bool:
        """Whether the request may go to every worker; False also where that is not known here."""
        return (
            self._unready == 0
            and request.target_worker is None
            and not request.excluded
            and (request.model_id is None or self._models <= {request.model_id, None})
        )

    def places(self, names: tuple[str, ...]) -> Positions:
        """Positions of those workers that are among the views. The same tuple costs once."""
        entry = self._places.get(id(names))
        if entry is None or entry[0] is not names:
            if len(self._places) >= PLACES_MAX:
                self._places.clear()
            known = [self.positions[name] for name in names if name in self.positions]
            # The tuple is kept, so that its id stays its own.
            entry = self._places[id(names)] = (names, np.array(known, dtype=np.intp))
        return entry[1]

    def view(self, worker_id: str) -> WorkerView | None:
        """One of the views last seen."""
        position = self.positions.get(worker_id)
        return None if position is None else self.views[position]

    def cost(self, position: int) -> WorkerCost:
        """All of one worker."""
        known = self._costs[position]
        if known is not None:
            return known
        view = self.views[position]
        speeds = self._speeds_of(view)
        cost = self._costs[position] = WorkerCost(
            view,
            speeds.prefill,
            speeds.host,
            speeds.nvme,
            speeds.peer,
            float(self.queue_seconds[position]),
            float(self.slow_seconds[position]),
            speeds.displace_seconds if view.load.device_total_tokens else 0.0,
            float(self.free_tokens[position]),
            float(self.drain_seconds[position]),
        )
        return cost

    # Rates -------------------------------------------------------------------------------------

    def _speeds_of(self, view: WorkerView) -> Speeds:
        speeds = self._speeds.get(view.worker_id)
        if speeds is None or speeds.rates is not view.rates:
            speeds = self._speeds[view.worker_id] = self._fill_in(view.rates)
        return speeds

    def _fill_in(self, rates: WorkerRates) -> Speeds:
        typical = self._typical or self._measure()
        prefill = rates.prefill or typical[0]
        if prefill.latency_seconds > typical[0].latency_seconds:
            # A step's fixed part is small and alike where the model is: a large one is noise of the
            # calibration, and would make a few tokens here dearer than a whole prompt elsewhere.
            prefill = Rate(prefill.tokens_per_second, typical[0].latency_seconds)
        host = rates.host_to_device or typical[1]
        peer = rates.peer_to_host or typical[3]
        computed = 1 / prefill.tokens_per_second
        loaded = 1 / host.tokens_per_second
        restored = computed if rates.host_to_device is None else min(computed, loaded)
        return Speeds(
            rates=rates,
            prefill=prefill,
            host=host,
            nvme=rates.nvme_to_host or typical[2],
            peer=peer,
            computed_seconds=computed,
            pulled_seconds=min(computed, 1 / peer.tokens_per_second + loaded),
            displace_seconds=self.settings.displace_weight * restored,
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

    # Soundness ---------------------------------------------------------------------------------

    def check(self) -> None:
        """The columns are what they would be, were they made anew from the views."""
        views = self.views
        assert {view.worker_id: place for place, view in enumerate(views)} == self.positions
        assert self._unready == sum(view.state is not READY for view in views)
        assert self._least_step == min(self._decode, default=math.inf)
        assert self._free_bound <= min(self.free_tokens.tolist(), default=math.inf)
        assert self._token_bound <= min(self.token_seconds.tolist(), default=0.0)
        assert len(self._places) <= PLACES_MAX
        anew = WorkerCosts(self.settings)
        anew._rates, anew._typical = self._rates, self._typical
        if views:
            anew._rebuild(views)
        for name in ("queue", "slow", "token", "drain"):
            column = f"{name}_seconds"
            assert np.array_equal(getattr(self, column), getattr(anew, column)), column
        assert np.array_equal(self.free_tokens, anew.free_tokens)
        for position, cost in enumerate(self._costs):
            assert cost is None or cost == anew.cost(position), cost


def median_rate(rates: Sequence[Rate | None], default: Rate | None) -> Rate:
    """The rate in the middle of those measured, or the default."""
    measured = sorted((r for r in rates if r is not None), key=lambda r: r.tokens_per_second)
    if measured:
        return measured[len(measured) // 2]
    assert default is not None
    return default
