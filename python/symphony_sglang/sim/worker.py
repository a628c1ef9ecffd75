"""One simulated worker: SGLang's loop of prefill and decode over a device level with KV below it.

Prefill goes before decode, as in SGLang without mixed chunks. A decode run is one jump, and exact.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from symphony_sglang.core.levels import Level, page_floor
from symphony_sglang.sim.hardware import Speeds
from symphony_sglang.sim.levels import Changed, LevelStore
from symphony_sglang.sim.loop import Channel, EventLoop, Timer

if TYPE_CHECKING:
    from symphony_sglang.sim.promotion import Promotions

PREFILL_TOKENS_MAX = 8192
REQUESTS_RUNNING_MAX = 256
# How long a request waits for its read: `timeout` is SGLang's default prefetch policy.
FETCH_SECONDS_BASE = 1.0
FETCH_SECONDS_PER_TOKEN = 0.25 / 1024
# Share of the answer that admission sets room aside for (SGLang's new-token ratio, initially).
ANSWER_ROOM_SHARE = 0.7


@dataclass(frozen=True, slots=True)
class Features:
    """What a server of the simulated kind can do.

    `levels` are those it has below the device's running work; a server without any recomputes.
    """

    prefix_cache: bool = True
    host: bool = True
    nvme: bool = True
    layer_wise: bool = True  # loads overlap the prefill that needs them, layer by layer
    gate: bool = False  # a level slower than recomputing is not used,
    break_even: float = 2.0  # or one that is this many times slower; the workers' own default
    protect_queued: bool = False
    cooperative: bool = True  # promoted pages give way to running work
    layer_order: bool = True  # merged, layer-major promotion loads
    swap: bool = False  # out of memory, the newest request's KV goes to host and back, as in vLLM


@dataclass(slots=True)
class SimRequest:
    """One turn. Times are filled in as it goes."""

    number: int
    session: int
    turn: int
    prompt_tokens: int
    answer_tokens: int
    due_seconds: float
    reusable_tokens: int = 1 << 40  # of the prompt, that were there before it
    worker: str = ""
    sent_seconds: float = 0.0
    admitted_seconds: float = 0.0
    first_token_seconds: float = 0.0
    ended_seconds: float = 0.0
    device_tokens: int = 0
    host_tokens: int = 0
    nvme_tokens: int = 0
    peer_tokens: int = 0
    computed_tokens: int = 0
    retractions: int = 0
    produced: int = 0
    swapped_tokens: int = 0  # in host memory, to come back when it is admitted again
    fetched_tokens: int = 0  # read from NVMe for it
    loaded_tokens: int = 0  # brought from host to device for it, and what was swapped both ways
    advised: bool = False

    @property
    def ttft_seconds(self) -> float:
        return self.first_token_seconds - self.due_seconds

    @property
    def tpot_seconds(self) -> float:
        """Mean time of a token after the first."""
        return (self.ended_seconds - self.first_token_seconds) / max(1, self.answer_tokens - 1)

    def usable_tokens(self, page_size: int) -> int:
        """What caches could have of its prompt: whole pages, and one token at least is computed."""
        return page_floor(min(self.prompt_tokens - 1, self.reusable_tokens), page_size)

    @property
    def context_tokens(self) -> int:
        return self.prompt_tokens + self.produced


@dataclass(slots=True)
class WorkerStats:
    """Counters of one worker."""

    requests: int = 0
    retractions: int = 0
    swapped_tokens: int = 0
    busy_seconds: float = 0.0
    exposed_seconds: float = 0.0  # prefill waited for loads this long
    nvme_fetches: int = 0
    fetches_cut: int = 0  # of those, by the time-out
    gate_refusals: int = 0


@dataclass(slots=True)
class _DecodeRun:
    started_seconds: float
    batch: int
    context_tokens: int
    steps: int
    least_left: int  # steps to the first end of a request
    timer: Timer | None = field(default=None)


class SimWorker:
    """A worker by name; `finished` is called with each request that ends."""

    def __init__(
        self,
        name: str,
        loop: EventLoop,
        speeds: Speeds,
        features: Features,
        page_size: int,
        changed: Changed,
        finished: Callable[[SimRequest], None],
        *,
        first_token: Callable[[SimRequest], None] | None = None,
    ) -> None:
        self.name = name
        self.loop = loop
        self.speeds = speeds
        self.features = features
        self.page_size = page_size
        self.stats = WorkerStats()
        self.gate = replace(speeds.gate(), margin=features.break_even)
        self._nodes: dict[int, list[int]] = {}
        host, nvme = speeds.host_tokens * features.host, speeds.nvme_tokens * features.nvme
        self.device = LevelStore(Level.DEVICE, speeds.device_tokens, changed, self._nodes)
        self.host = LevelStore(Level.HOST, host, changed, self._nodes)
        self.nvme = LevelStore(Level.NVME, nvme, changed, self._nodes)
        self.link = Channel(loop, speeds.link_bytes_per_second, speeds.link_latency_seconds)
        self.disk = Channel(loop, speeds.nvme_read_bytes_per_second, speeds.disk_latency_seconds)
        self.disk_write = Channel(loop, speeds.nvme_write_bytes_per_second, 0.0)
        self.network = Channel(loop, speeds.network_bytes_per_second, 0.0005)
        self.transfers_until_seconds = 0.0  # until its transfers from and to peers are through
        self.waiting: deque[SimRequest] = deque()
        self.fetching: dict[int, SimRequest] = {}
        self.running: list[SimRequest] = []
        self.running_tokens = 0  # what running requests hold beyond the cached prefix of sessions
        self.context_tokens = 0  # of the running batch, as of its last whole run of steps
        self.promotions: Promotions | None = None
        self._writing: Counter[int] = Counter()
        self._finished = finished
        self._first_token = first_token
        self._busy = False
        self._run: _DecodeRun | None = None

    # Arrival ------------------------------------------------------------------------------------

    def submit(self, request: SimRequest) -> None:
        """A request reaches the worker."""
        request.worker = self.name
        request.sent_seconds = self.loop.now_seconds
        self.stats.requests += 1
        usable = request.usable_tokens(self.page_size)
        self._touch(request.session)
        device = min(self.device.tokens(request.session), usable)
        host = min(self.host.tokens(request.session), usable)
        if self.promotions is not None:
            self.promotions.request_arrived(request, device, max(0, host - device))
        stored = min(self.nvme.tokens(request.session), usable)
        missing = stored - max(device, host)
        if missing > 0 and self._worth(Level.NVME, missing):
            self._fetch(request, max(device, host), missing)
        else:
            self.waiting.append(request)
        self._interrupt()

    def _fetch(self, request: SimRequest, above: int, missing: int) -> None:
        """Read what is on NVMe only, or as much of it as comes before SGLang's time-out."""
        self.stats.nvme_fetches += 1
        self.fetching[request.number] = request
        now, size = self.loop.now_seconds, self.speeds.token_bytes
        deadline = now + FETCH_SECONDS_BASE + FETCH_SECONDS_PER_TOKEN * missing
        start = max(now, self.disk.busy_until_seconds) + self.disk.latency_seconds
        in_time = int(max(0.0, deadline - start) * self.disk.bytes_per_second / size)
        tokens = min(missing, page_floor(in_time, self.page_size))
        done = self.disk.reserve(tokens * size) if tokens else deadline
        if tokens < missing:
            self.stats.fetches_cut += 1
            done = deadline
        request.fetched_tokens = tokens
        self.loop.at(max(done, now), self._fetched, request, above + tokens)

    def remember(self, session: int, tokens: int, turns: int) -> None:
        """It served so many turns of this session before the simulation began."""
        if self.features.prefix_cache:
            ends = {page_floor(tokens * turn // turns, self.page_size) for turn in range(1, turns)}
            self._nodes[session] = sorted(ends)
            for level in (self.device, self.host, self.nvme):
                level.grow(session, page_floor(tokens, self.page_size))

    def _touch(self, session: int) -> None:
        for level in (self.device, self.host, self.nvme):
            level.touch(session)

    def _worth(self, level: Level, tokens: int) -> bool:
        if not self.features.gate or self.gate.worth_loading(level, tokens).use:
            return True
        self.stats.gate_refusals += 1
        return False

    def _fetched(self, request: SimRequest, stored: int) -> None:
        """Its NVMe part is in host memory, as far as that has room."""
        before = self.host.tokens(request.session)
        after = self.host.grow(request.session, stored)
        request.nvme_tokens = max(0, after - before)
        del self.fetching[request.number]
        self.waiting.append(request)
        self._interrupt()

    # The loop -----------------------------------------------------------------------------------

    @property
    def is_busy(self) -> bool:
        """A prefill, a decode run or a swap is under way."""
        return self._busy

    def wake(self) -> None:
        """Memory or work may have appeared."""
        if not self._busy:
            self._next()

    def _next(self) -> None:
        if self.waiting:
            batch = self._admit()
            if batch:
                self._prefill(batch)
                return
        if self.running:
            self._decode()

    def _room(self) -> int:
        """Device tokens that a request could have: free, and cached ones that may go."""
        return self.device.capacity_tokens - self.running_tokens - self.device.floor_tokens

    def _admit(self) -> list[SimRequest]:
        batch: list[SimRequest] = []
        tokens = 0
        while self.waiting and len(self.running) + len(batch) < REQUESTS_RUNNING_MAX:
            request = self.waiting[0]
            device = self._cached(request)
            fresh = request.prompt_tokens + request.produced - device
            answer = int(ANSWER_ROOM_SHARE * (request.answer_tokens - request.produced))
            need = fresh + (answer if self.running or batch else 0)
            free = self._room() - max(0, device - self._floor(request.session))
            if need > free and not self._give_way(need - free):
                break
            if batch and tokens + fresh > PREFILL_TOKENS_MAX:
                break
            self.waiting.popleft()
            self._start(request, device)
            tokens += fresh
            batch.append(request)
        return batch

    def _floor(self, session: int) -> int:
        return self.device.floor(session)

    def _give_way(self, tokens: int) -> bool:
        """Ask the promotions for memory; False where that would not help."""
        if self.promotions is None or not self.features.cooperative:
            return False
        return self.promotions.give_way(tokens) >= tokens

    def _cached(self, request: SimRequest) -> int:
        usable = request.usable_tokens(self.page_size)
        return min(self.device.tokens(request.session), usable)

    def _start(self, request: SimRequest, device: int) -> None:
        """Lock its cached head, take memory for the rest."""
        usable = request.usable_tokens(self.page_size)
        host = min(self.host.tokens(request.session), usable)
        on_host = max(0, host - device)
        if on_host and not self._worth(Level.HOST, on_host):
            on_host = 0
        from_nvme = min(request.nvme_tokens, on_host)
        request.device_tokens = device
        request.nvme_tokens = from_nvme
        request.host_tokens = on_host - from_nvme
        request.computed_tokens = request.prompt_tokens - device - on_host
        request.admitted_seconds = self.loop.now_seconds
        self.device.lock(request.session, device)
        self._take(request.prompt_tokens + request.produced - device)
        if self.promotions is not None:
            self.promotions.request_admitted(request)

    def _take(self, tokens: int) -> None:
        """Memory for running work, from what is free and then from the cache."""
        self.running_tokens += tokens
        over = self.device.used_tokens + self.running_tokens - self.device.capacity_tokens
        if over > 0:
            freed = self.device.evict(over)
            if freed < over:
                self._give_way(over - freed)
                self.device.evict(over - freed)

    def _prefill(self, batch: list[SimRequest]) -> None:
        self._busy = True
        compute = self.speeds.step_seconds
        load_tokens = 0
        for request in batch:
            loaded = request.host_tokens + request.nvme_tokens
            fresh = request.computed_tokens + request.produced
            if request.swapped_tokens:
                # All of it was computed once; one token is what this step adds.
                loaded, fresh = request.context_tokens - request.device_tokens, 1
                self.stats.swapped_tokens += loaded
                request.swapped_tokens = 0
            load_tokens += loaded
            request.loaded_tokens += loaded
            compute += self.speeds.prefill_seconds(fresh, request.device_tokens + loaded)
        now = self.loop.now_seconds
        load = 0.0
        if load_tokens:
            load = self.link.reserve(load_tokens * self.speeds.token_bytes) - now
        layers = self.speeds.layers
        if self.features.layer_wise:
            # The first layer's load is exposed, and the last layer's compute.
            seconds = max(load, compute) + min(load, compute) / layers if load else compute
        else:
            seconds = load + compute
        for request in batch:
            flight = None if self.promotions is None else self.promotions.flight(request.session)
            if flight is None or request.device_tokens <= flight.start_tokens:
                continue
            first, last = max(0.0, flight.first_seconds - now), flight.last_seconds - now
            if self.features.layer_wise:
                seconds = max(seconds, first + compute, last + compute / layers)
            else:
                seconds = max(seconds, last + compute)
        self.stats.exposed_seconds += seconds - compute
        self.stats.busy_seconds += seconds
        self.loop.after(seconds, self._prefilled, batch)

    def _prefilled(self, batch: list[SimRequest]) -> None:
        self._busy = False
        for request in batch:
            if not request.produced:
                request.first_token_seconds = self.loop.now_seconds
                if self._first_token is not None:
                    self._first_token(request)
            request.produced += 1
            self.running_tokens += 1
            self.context_tokens += request.context_tokens
            self.running.append(request)
        self._end_finished()
        if self.promotions is not None and not self.waiting:
            self.promotions.requests_admitted()
        self._next()

    # Decoding -----------------------------------------------------------------------------------

    def _decode(self) -> None:
        """Decode until a request ends, memory ends, or something interrupts."""
        batch = len(self.running)
        steps = min(request.answer_tokens - request.produced for request in self.running)
        room = self.device.capacity_tokens - self.running_tokens - self.device.floor_tokens
        if room < batch:
            self._give_way(batch)
            room = self.device.capacity_tokens - self.running_tokens - self.device.floor_tokens
        if room < batch:
            if not self._retract():
                self._next()
            return
        least, steps = steps, max(1, min(steps, room // batch))
        self._busy = True
        run = _DecodeRun(self.loop.now_seconds, batch, self.context_tokens, steps, least)
        run.timer = self.loop.after(self._steps_seconds(run, steps), self._decoded, run, steps)
        self._run = run

    def _steps_seconds(self, run: _DecodeRun, steps: int) -> float:
        """`steps` steps of a batch whose context grows by its size at each."""
        first = self.speeds.decode_seconds(run.batch, run.context_tokens)
        growth = self.speeds.decode_context_seconds * run.batch
        return steps * first + growth * steps * (steps - 1) / 2

    def _interrupt(self) -> None:
        """Something came: end the decode run with the step that is under way."""
        run = self._run
        if run is None or run.timer is None or not self.waiting:
            self.wake()
            return
        passed = self.loop.now_seconds - run.started_seconds
        first = self.speeds.decode_seconds(run.batch, run.context_tokens)
        growth = self.speeds.decode_context_seconds * run.batch
        # The smallest n with n * first + growth * n (n - 1) / 2 >= passed.
        half = first - growth / 2
        root = (
            (-half + math.sqrt(half * half + 2 * growth * passed)) / growth
            if growth
            else (passed / first)
        )
        steps = min(run.steps, max(1, math.ceil(root - 1e-9)))
        if steps >= run.steps:
            return
        run.timer.cancel()
        ends = run.started_seconds + self._steps_seconds(run, steps)
        run.steps = steps
        run.timer = self.loop.at(max(ends, self.loop.now_seconds), self._decoded, run, steps)

    def _decoded(self, run: _DecodeRun, steps: int) -> None:
        self._busy = False
        self._run = None
        self.stats.busy_seconds += self.loop.now_seconds - run.started_seconds
        for request in self.running:
            request.produced += steps
        self.context_tokens += steps * len(self.running)
        self._take(steps * len(self.running))
        if steps >= run.least_left:
            self._end_finished()
        self._next()

    def _retract(self) -> bool:
        """Out of memory while decoding: the newest waits again; True while it is swapped out."""
        request = self.running.pop()
        self.context_tokens -= request.context_tokens
        request.retractions += 1
        self.stats.retractions += 1
        held = request.context_tokens - request.device_tokens
        self._release(request, keep=False)
        self.waiting.appendleft(request)
        if not self.features.swap:
            return False
        request.swapped_tokens = held
        request.loaded_tokens += held
        self.stats.swapped_tokens += held
        self._busy = True
        done = self.link.reserve(held * self.speeds.token_bytes)
        self.loop.at(done, self._swapped)
        return True

    def _swapped(self) -> None:
        self._busy = False
        self._next()

    def _end_finished(self) -> None:
        ended = [item for item in self.running if item.produced >= item.answer_tokens]
        if not ended:
            return
        self.running = [item for item in self.running if item.produced < item.answer_tokens]
        for request in ended:
            self.context_tokens -= request.context_tokens
            request.ended_seconds = self.loop.now_seconds
            self._release(request, keep=True)
            self._finished(request)

    def _release(self, request: SimRequest, *, keep: bool) -> None:
        """Give its memory back; with `keep`, what it computed stays as cache."""
        self.device.lock(request.session, 0)
        self.running_tokens -= request.context_tokens - request.device_tokens
        if not keep or not self.features.prefix_cache:
            if not self.features.prefix_cache:
                self.device.shrink(request.session, 0)
            return
        tokens = page_floor(request.context_tokens, self.page_size)
        room = self.device.capacity_tokens - self.running_tokens
        self.device.grow(request.session, tokens, room=room)
        if self.features.host:
            self.host.grow(request.session, tokens)
        if self.features.nvme:
            fresh = max(0, tokens - self.nvme.tokens(request.session))
            done = self.disk_write.reserve(fresh * self.speeds.token_bytes)
            self._writing[request.session] += 1
            self.host.lock(request.session, tokens)
            self.loop.at(done, self._persisted, request.session, tokens)

    def _persisted(self, session: int, tokens: int) -> None:
        """Until now the host copy could not go."""
        self.nvme.grow(session, tokens)
        self._writing[session] -= 1
        if not self._writing[session]:
            del self._writing[session]
            self.host.lock(session, 0)

    def check(self) -> None:
        """Conservation: levels add up, and running memory is what running requests hold."""
        for level in (self.device, self.host, self.nvme):
            level.check()
        assert self.context_tokens == sum(item.context_tokens for item in self.running)
        held = sum(item.context_tokens - item.device_tokens for item in self.running)
        if not self._busy:
            assert self.running_tokens == held, (self.running_tokens, held)
        assert self.device.used_tokens + self.running_tokens <= self.device.capacity_tokens
