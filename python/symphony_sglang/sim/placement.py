"""The product's router core inside the simulator: index, load ledger and policy, fed with a lag."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import IndexLimits, LocationIndex
from symphony_sglang.core.routing_policies import make_policy
from symphony_sglang.core.routing_types import (
    AdvisedPlace,
    AdvisoryChoice,
    Decision,
    EventHashes,
    LoadView,
    PolicySettings,
    Reason,
    RouteRequest,
    WorkerRates,
    WorkerView,
)
from symphony_sglang.core.worker_load import LoadLedger
from symphony_sglang.sim.loop import EventLoop
from symphony_sglang.sim.worker import SimRequest, SimWorker

FEED_SECONDS = 0.02
REPORT_SECONDS = 0.25
HEARTBEAT_SECONDS = 1.0
HASH_PAGES_STEP = 64
TRANSFER_STEP_SECONDS = 0.02  # the router's idea of a backlog is about as fine as this


@lru_cache(maxsize=16_384)
def _hashes(session: int, pages: int) -> EventHashes:
    numbers = np.arange(pages, dtype=np.uint64) + np.uint64((session + 1) << 20)
    # The splitmix64 finalizer: distinct numbers, distinct hashes.
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (numbers ^ (numbers >> np.uint64(31))).astype(np.int64)


def session_hashes(session: int, pages: int) -> EventHashes:
    """Event hashes of a session's first pages; a longer call has a shorter one as its head."""
    rounded = -(-max(pages, 1) // HASH_PAGES_STEP) * HASH_PAGES_STEP
    return _hashes(session, rounded)[:pages]


@dataclass(slots=True)
class Change:
    worker: str
    level: Level
    session: int
    before: int
    after: int


class Placement:
    """What a router knows and decides. Workers are added before the first event."""

    def __init__(
        self,
        loop: EventLoop,
        policy: str,
        page_size: int,
        *,
        workers: int,
        break_even: float,
        seed: int,
        migrate: bool,
    ) -> None:
        self._loop = loop
        self._page = page_size
        self._migrate = migrate
        self._random = random.Random(f"placement/{seed}")
        self.policy = make_policy(policy, PolicySettings(load_margin=break_even))
        self._by_text = policy == "cache_aware"
        # Rows are as wide as there are workers: the index is hashed and compared most of all.
        self.index = LocationIndex(IndexLimits(workers_max=workers))
        self.loads = LoadLedger()
        self._workers: dict[str, SimWorker] = {}
        self._rates: dict[str, WorkerRates] = {}
        self._changes: list[Change] = []
        self._views: dict[str, WorkerView] = {}
        self._listed: list[WorkerView] | None = None
        self._stale: set[str] = set()
        self._reports: dict[str, tuple[LoadView, float]] = {}
        self._advised: dict[int, AdvisedPlace] = {}
        loop.after(1.0, self._tick)

    def add(self, worker: SimWorker) -> None:
        self._workers[worker.name] = worker
        self._views[worker.name] = WorkerView(worker.name)
        self._stale.add(worker.name)
        gate = worker.gate
        per_token = worker.speeds.network_bytes_per_second / worker.speeds.token_bytes
        self._rates[worker.name] = WorkerRates(
            prefill=gate.prefill,
            host_to_device=gate.host_to_device,
            nvme_to_host=gate.nvme_to_host,
            peer_to_host=Rate(per_token, 0.0005),
        )
        self._loop.after(REPORT_SECONDS, self._report, worker)

    # What it hears ------------------------------------------------------------------------------

    def changed(self, worker: str, level: Level, session: int, before: int, after: int) -> None:
        """A worker's level changed; the index hears of it a little later."""
        if not self._changes:
            self._loop.after(FEED_SECONDS, self._deliver)
        self._changes.append(Change(worker, level, session, before, after))

    def _deliver(self) -> None:
        changes, self._changes = self._changes, []
        for change in changes:
            old, new = change.before // self._page, change.after // self._page
            pages = session_hashes(change.session, max(old, new))
            if new > old:
                parent = int(pages[old - 1]) if old else None
                self.index.stored(change.worker, change.level, pages[old:new].tolist(), parent)
            elif old > new:
                self.index.removed(change.worker, change.level, pages[new:old].tolist())

    def _report(self, worker: SimWorker) -> None:
        now, load = self._loop.now_seconds, self._load(worker)
        last, seconds = self._reports.get(worker.name, (None, 0.0))
        # What has not changed is said again only as a sign of life.
        if load != last or now - seconds >= HEARTBEAT_SECONDS:
            self._reports[worker.name] = (load, now)
            self.loads.reported(worker.name, load, now)
            self._stale.add(worker.name)
        self._loop.after(REPORT_SECONDS, self._report, worker)

    def _tick(self) -> None:
        self.policy.tick(self._loop.now_seconds)
        self._loop.after(1.0, self._tick)

    @staticmethod
    def _load(worker: SimWorker) -> LoadView:
        running, context = worker.running, worker.context_tokens
        return LoadView(
            requests_running=len(running),
            requests_waiting=len(worker.waiting) + len(worker.fetching),
            tokens_waiting_uncached=sum(
                request.prompt_tokens - worker.device.tokens(request.session)
                for request in worker.waiting
            ),
            tokens_running=context,
            device_used_tokens=worker.running_tokens + worker.device.floor_tokens,
            device_total_tokens=worker.device.capacity_tokens,
            decode_step_seconds=worker.speeds.decode_seconds(max(1, len(running)), context),
        )

    # What it decides ----------------------------------------------------------------------------

    def views(self) -> Sequence[WorkerView]:
        now, views = self._loop.now_seconds, self._views
        # Only whose load was heard of, or whose transfers go on, can look different now.
        for name in self._stale:
            load, known = self.loads.view(name, now), views.get(name)
            busy = self._workers[name].transfers_until_seconds - now
            busy = TRANSFER_STEP_SECONDS * max(0, round(busy / TRANSFER_STEP_SECONDS))
            if known is None or known.load is not load or known.transfer_seconds != busy:
                views[name] = WorkerView(
                    worker_id=name,
                    page_size=self._page,
                    load=load,
                    rates=self._rates[name],
                    serves_pages=self._migrate,
                    pulls_pages=self._migrate,
                    transfer_seconds=busy,
                )
                self._listed = None
        self._stale = {name for name in self._stale if views[name].transfer_seconds}
        if self._listed is None:
            self._listed = list(views.values())
        return self._listed

    def transferring(self, *workers: str) -> None:
        """A transfer was queued at these workers."""
        self._stale.update(workers)

    def _route_request(self, session: int, tokens: int, number: str) -> RouteRequest:
        pages = tokens // self._page
        advised = self._advised.get(session)
        return RouteRequest(
            request_id=number,
            input_tokens=tokens,
            page_hashes={self._page: session_hashes(session, pages)},
            session_id=str(session),
            # A text whose head is the session's own and which grows with it.
            text=f"<{session}>" + "x" * pages if self._by_text else "",
            advised=() if advised is None else (advised,),
        )

    def route(self, request: SimRequest, target: str | None = None) -> Decision:
        """Where a request goes, `target` if that is given; it counts as sent from now on."""
        now = self._loop.now_seconds
        asked = self._route_request(request.session, request.prompt_tokens, str(request.number))
        if target is not None:
            asked = replace(asked, target_worker=target)
        decision = self.policy.choose(asked, self.views(), self.index, now, self._random)
        self.policy.routed(asked, decision, self.index, now)
        self._advised.pop(request.session, None)
        self.loads.sent(
            decision.worker_id,
            str(request.number),
            decision.uncached_tokens,
            request.prompt_tokens,
            now,
        )
        self._stale.add(decision.worker_id)
        return decision

    def advise(self, session: int, tokens: int) -> AdvisoryChoice:
        """Which worker should serve the session's next turn."""
        now = self._loop.now_seconds
        asked = self._route_request(session, tokens, f"advisory-{session}")
        choice = self.policy.choose_for_advisory(asked, self.views(), self.index, now, self._random)
        self.policy.advised(asked, choice, now)
        return choice

    def promised(self, session: int, worker: str, tokens: int, ready_seconds: float) -> None:
        """A promotion is under way there."""
        self._advised[session] = AdvisedPlace(worker, tokens, ready_seconds)

    def is_promised(self, session: int, worker: str) -> bool:
        """Whether the session's next turn is still to come, and expected there."""
        place = self._advised.get(session)
        return place is not None and place.worker_id == worker

    def is_advised(self, session: int) -> bool:
        """Whether the session's next turn was announced and has not come."""
        return session in self._advised

    def owner(self, session: int) -> str | None:
        """Who served the session last, or was given it since."""
        place = self.index.session(str(session))
        return None if place is None else place.worker_id

    def moved(self, session: int, worker: str, tokens: int) -> None:
        """A worker owns the session now: what was routed where before does not count any more."""
        key, now = str(session), self._loop.now_seconds
        place = self.index.session(key)
        turns = 1 if place is None else place.turns
        epoch = 1 if place is None else place.epoch + 1
        self.index.session_turn(worker, key, tokens, None, turns, epoch)
        route = RouteRequest(request_id=f"move-{session}", input_tokens=1, session_id=key)
        decision = Decision(worker, Reason.SESSION, uncached_tokens=0, considered=1)
        self.policy.routed(route, decision, self.index, now)

    def first_token(self, request: SimRequest) -> None:
        self.loads.first_token(str(request.number))
        self._stale.add(request.worker)

    def ended(self, request: SimRequest) -> None:
        self.loads.ended(str(request.number))
        self._stale.add(request.worker)

    def turn_ended(self, request: SimRequest) -> None:
        """The worker's session table says who served the turn."""
        self.index.session_turn(
            request.worker,
            str(request.session),
            request.context_tokens,
            None,
            request.turn + 1,
            self._epoch(request.session),
        )

    def _epoch(self, session: int) -> int:
        place = self.index.session(str(session))
        return 0 if place is None else place.epoch

    def remembered(self, session: int, tokens: int, worker: str) -> None:
        """Where a session was served before the simulation began."""
        self.index.session_turn(worker, str(session), tokens, None, 1, 0)

    def forget(self, session: int) -> None:
        self._advised.pop(session, None)
        self.policy.forget_session(str(session))

    def check(self) -> None:
        """Its parts are sound, and once it has heard of everything it knows what each level has."""
        self._deliver()
        self.index.check()
        self.loads.check()
        held: dict[int, int] = {}
        for worker in self._workers.values():
            for level in (worker.device, worker.host, worker.nvme):
                for session in level.sessions():
                    held[session] = max(held.get(session, 0), level.tokens(session))
        for session, tokens in held.items():
            found = self.index.find(session_hashes(session, max(1, tokens // self._page)))
            for name, worker in self._workers.items():
                match, most, ends = found.match(name), 0, []
                for level in (worker.device, worker.host, worker.nvme):
                    most = max(most, level.tokens(session) // self._page)
                    ends.append(most)
                known = (match.device_pages, match.device_pages + match.host_pages, match.pages)
                assert known == tuple(ends), (session, name, known, ends)
