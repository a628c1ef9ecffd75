"""The other policies, and the table of all by name.

`symphony-paper` is the paper's scheduler (arXiv 2412.16434, section 3): at the advisory the least
occupied node, bound early; without one the session's node. `cache_aware`, `round_robin`, `random`
and `power_of_two` are sglang-router's, with its thresholds and its weaknesses: `cache_aware` goes
by an approximate tree of what it routed, drops affinity wholesale when load is uneven, and sends
misses to the worker with the smallest tree.
"""

from __future__ import annotations

import random as random_module
from collections.abc import Callable, Sequence

from symphony_sglang.core.location import Found, LocationIndex
from symphony_sglang.core.prefix_tree import PrefixTree
from symphony_sglang.core.routing import (
    SessionMap,
    SymphonyPolicy,
    candidates,
    describe_choice,
)
from symphony_sglang.core.routing_types import (
    NO_MATCH,
    AdvisoryChoice,
    Decision,
    Policy,
    PolicySettings,
    PrefixMatch,
    Reason,
    RouteRequest,
    WorkerView,
)
from symphony_sglang.errors import ConfigError

Random = random_module.Random


def least_loaded(workers: Sequence[WorkerView], random: Random) -> WorkerView:
    """The worker with the fewest requests; by chance among equals."""
    fewest = min(view.load.requests for view in workers)
    return random.choice([view for view in workers if view.load.requests == fewest])


def named(worker_id: str | None, workers: Sequence[WorkerView]) -> WorkerView | None:
    """The worker of that id, if it is among `workers`."""
    return next((view for view in workers if view.worker_id == worker_id), None)


class SimplePolicy:
    """What the policies that do not estimate have in common; `_pick` is each one's own."""

    name = "simple"

    def __init__(self, settings: PolicySettings | None = None) -> None:
        self.settings = PolicySettings() if settings is None else settings

    def _pick(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> tuple[WorkerView, Reason]:
        return random.choice(usable), Reason.CHANCE

    def choose(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> Decision:
        """See `routing_types.Policy`."""
        usable = candidates(request, workers)
        if len(usable) == 1:
            view = usable[0]
            reason = Reason.ONLY_WORKER if request.target_worker is None else Reason.TARGETED
        else:
            view, reason = self._pick(request, usable, index, now_seconds, random)
        match, _ = match_at(request, view, index, now_seconds)
        cached = min(match.pages * view.page_size, request.input_tokens - 1)
        return Decision(
            worker_id=view.worker_id,
            reason=reason,
            uncached_tokens=request.input_tokens - max(0, cached),
            considered=len(usable),
            match=match,
            page_size=view.page_size,
        )

    def routed(
        self, request: RouteRequest, decision: Decision, index: LocationIndex, now_seconds: float
    ) -> None:
        """Nothing to remember."""

    def choose_for_advisory(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> AdvisoryChoice:
        """As a request would be placed now."""
        decision = self.choose(request, workers, index, now_seconds, random)
        view = next(v for v in workers if v.worker_id == decision.worker_id)
        match, found = match_at(request, view, index, now_seconds)
        return describe_choice(request, view, found, match, decision)

    def advised(self, request: RouteRequest, choice: AdvisoryChoice, now_seconds: float) -> None:
        """Nothing to remember."""

    def forget_worker(self, worker_id: str) -> None:
        """Nothing to forget."""

    def forget_session(self, session_id: str) -> None:
        """Nothing to forget."""

    def tick(self, now_seconds: float) -> None:
        """Nothing to do."""


def match_at(
    request: RouteRequest, view: WorkerView, index: LocationIndex, now_seconds: float
) -> tuple[PrefixMatch, Found | None]:
    """What one worker has of the prompt, and where else it is among workers of its page size."""
    hashes = request.page_hashes.get(view.page_size)
    if hashes is None:
        return NO_MATCH, None
    found = index.find(hashes, now_seconds)
    return found.match(view.worker_id), found


class RandomPolicy(SimplePolicy):
    """Any worker."""

    name = "random"


class RoundRobinPolicy(SimplePolicy):
    """Each worker in turn, by what was really sent."""

    name = "round_robin"

    def __init__(self, settings: PolicySettings | None = None) -> None:
        super().__init__(settings)
        self._turns = 0

    def _pick(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> tuple[WorkerView, Reason]:
        return usable[self._turns % len(usable)], Reason.TURN

    def routed(
        self, request: RouteRequest, decision: Decision, index: LocationIndex, now_seconds: float
    ) -> None:
        """The next one's turn."""
        self._turns += 1


class PowerOfTwoPolicy(SimplePolicy):
    """The less loaded of two workers drawn by chance (Mitzenmacher 2001)."""

    name = "power_of_two"

    def _pick(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> tuple[WorkerView, Reason]:
        return least_loaded(random.sample(usable, 2), random), Reason.LEAST_LOADED


class SessionStickyPolicy(SimplePolicy):
    """A session stays with its worker while that is up; new ones go to the least loaded."""

    name = "session_sticky"

    def __init__(self, settings: PolicySettings | None = None) -> None:
        super().__init__(settings)
        self._sessions = SessionMap(self.settings.sessions_max, self.settings.session_idle_seconds)

    def _home(self, request: RouteRequest, index: LocationIndex, now_seconds: float) -> str | None:
        if request.session_id is None:
            return None
        home = self._sessions.get(request.session_id, now_seconds)
        if home is None:  # a router that has just started asks the workers' own tables
            place = index.session(request.session_id)
            home = None if place is None else place.worker_id
        return home

    def _pick(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> tuple[WorkerView, Reason]:
        view = named(self._home(request, index, now_seconds), usable)
        if view is not None:
            return view, Reason.SESSION
        return least_loaded(usable, random), Reason.LEAST_LOADED

    def routed(
        self, request: RouteRequest, decision: Decision, index: LocationIndex, now_seconds: float
    ) -> None:
        """The session lives there."""
        if request.session_id is not None:
            self._sessions.put(request.session_id, decision.worker_id, now_seconds)

    def forget_worker(self, worker_id: str) -> None:
        self._sessions.forget_worker(worker_id)

    def forget_session(self, session_id: str) -> None:
        self._sessions.forget(session_id)

    def tick(self, now_seconds: float) -> None:
        self._sessions.expire(now_seconds)


class SymphonyPaperPolicy(SessionStickyPolicy):
    """At the advisory an even spread, and that worker is bound; without one the session stays.

    Even means the fewest requests there are plus those that advisories have promised; promises end
    with their request, or after `session_idle_seconds`.
    """

    name = "symphony-paper"

    def __init__(self, settings: PolicySettings | None = None) -> None:
        super().__init__(settings)
        self._promised = SessionMap(self.settings.sessions_max, self.settings.session_idle_seconds)

    def _promise(self, request: RouteRequest, now_seconds: float) -> str | None:
        """The worker that an advisory has bound the session to."""
        if request.session_id is None:
            return None
        return self._promised.get(request.session_id, now_seconds)

    def _spread(self, usable: Sequence[WorkerView], random: Random) -> WorkerView:
        loads = [v.load.requests + self._promised.counts[v.worker_id] for v in usable]
        fewest = min(loads)
        return random.choice([v for v, load in zip(usable, loads, strict=True) if load == fewest])

    def _pick(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> tuple[WorkerView, Reason]:
        promised = self._promise(request, now_seconds)
        home = self._home(request, index, now_seconds)
        for target, reason in ((promised, Reason.ADVISED), (home, Reason.SESSION)):
            view = named(target, usable)
            if view is not None:
                return view, reason
        return self._spread(usable, random), Reason.LEAST_LOADED

    def choose_for_advisory(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> AdvisoryChoice:
        """The worker with the least to do, wherever the KV is; one that is promised stays."""
        usable = candidates(request, workers)
        view = named(self._promise(request, now_seconds), usable) or self._spread(usable, random)
        return super().choose_for_advisory(request, [view], index, now_seconds, random)

    def advised(self, request: RouteRequest, choice: AdvisoryChoice, now_seconds: float) -> None:
        """Bound: the session's next request goes there."""
        if request.session_id is not None:
            self._promised.put(request.session_id, choice.worker_id, now_seconds)

    def routed(
        self, request: RouteRequest, decision: Decision, index: LocationIndex, now_seconds: float
    ) -> None:
        """The promise is kept, or void."""
        super().routed(request, decision, index, now_seconds)
        if request.session_id is not None:
            self._promised.forget(request.session_id)

    def forget_worker(self, worker_id: str) -> None:
        super().forget_worker(worker_id)
        self._promised.forget_worker(worker_id)

    def forget_session(self, session_id: str) -> None:
        super().forget_session(session_id)
        self._promised.forget(session_id)

    def tick(self, now_seconds: float) -> None:
        super().tick(now_seconds)
        self._promised.expire(now_seconds)


class CacheAwarePolicy(SimplePolicy):
    """sglang-router's default: its tree where load is even, the least loaded where it is not."""

    name = "cache_aware"

    def __init__(self, settings: PolicySettings | None = None) -> None:
        super().__init__(settings)
        self.tree = PrefixTree(self.settings.max_tree_size, self.settings.tree_bytes_max)
        self._evicted_seconds: float | None = None

    def _pick(
        self,
        request: RouteRequest,
        usable: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: Random,
    ) -> tuple[WorkerView, Reason]:
        settings = self.settings
        # sglang-router sees only what it has sent itself.
        loads = [view.load.requests_in_flight for view in usable]
        low, high = min(loads), max(loads)
        uneven = (
            high - low > settings.balance_abs_threshold
            and high > settings.balance_rel_threshold * low
        )
        if uneven:
            idle = [v for v in usable if v.load.requests_in_flight == low]
            return random.choice(idle), Reason.BALANCE
        text = tree_text(request)
        matched, worker_id = self.tree.match(text)
        if text and matched / len(text) > settings.cache_threshold:
            view = named(worker_id, usable)
            if view is not None:
                return view, Reason.CACHE
        sizes = [self.tree.characters.get(view.worker_id, 0) for view in usable]
        smallest = min(sizes)
        room = [v for v, size in zip(usable, sizes, strict=True) if size == smallest]
        return random.choice(room), Reason.LEAST_LOADED

    def routed(
        self, request: RouteRequest, decision: Decision, index: LocationIndex, now_seconds: float
    ) -> None:
        """Into the tree."""
        self.tree.insert(tree_text(request), decision.worker_id)

    def forget_worker(self, worker_id: str) -> None:
        self.tree.forget_worker(worker_id)

    def tick(self, now_seconds: float) -> None:
        last = self._evicted_seconds
        if last is None or now_seconds - last >= self.settings.eviction_interval_seconds:
            self._evicted_seconds = now_seconds
            self.tree.evict()


def tree_text(request: RouteRequest) -> str:
    """What the tree goes by: the prompt's text, or its page hashes, eight characters each."""
    if request.text or not request.page_hashes:
        return request.text
    hashes = request.page_hashes[min(request.page_hashes)]
    return "\0" + hashes.tobytes().decode("latin-1")


POLICIES: dict[str, Callable[[PolicySettings | None], Policy]] = {
    SymphonyPolicy.name: SymphonyPolicy,
    SymphonyPaperPolicy.name: SymphonyPaperPolicy,
    SessionStickyPolicy.name: SessionStickyPolicy,
    CacheAwarePolicy.name: CacheAwarePolicy,
    RoundRobinPolicy.name: RoundRobinPolicy,
    RandomPolicy.name: RandomPolicy,
    PowerOfTwoPolicy.name: PowerOfTwoPolicy,
}


def make_policy(name: str, settings: PolicySettings | None = None) -> Policy:
    """The policy of that name.

    Raises:
        ConfigError: there is none; the message lists those there are.
    """
    if name not in POLICIES:
        raise ConfigError(f"policy is {name!r}; expected one of {', '.join(POLICIES)}")
    return POLICIES[name](settings)
