"""What a routing policy sees and says: a request, the workers, a decision with its reasons.

A worker here is a cache domain: a server with `--dp-size N` counts as N workers, one per rank, each
with its own id, pages and load. All times are seconds on the caller's clock.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level

if TYPE_CHECKING:
    from symphony_sglang.core.location import LocationIndex

EventHashes = npt.NDArray[np.int64]


class PrefixMatch(NamedTuple):
    """The head of a prompt that one worker holds, in pages from the start, without a gap.

    The first `device_pages` are on the device, the next `host_pages` are no further away than host
    memory, and the next `nvme_pages` no further than NVMe. After them comes nothing usable, but the
    next `expected_pages`, which requests routed there a moment ago are computing.
    """

    device_pages: int = 0
    host_pages: int = 0
    nvme_pages: int = 0
    expected_pages: int = 0

    @property
    def pages(self) -> int:
        """Pages that are there now, on any level."""
        return self.device_pages + self.host_pages + self.nvme_pages


NO_MATCH = PrefixMatch()


@dataclass(frozen=True, slots=True)
class AdvisedPlace:
    """A promotion under way or done for the request's session: late binding honours it.

    `ready_seconds` is when the first `tokens` of the prompt will be on the device of `worker_id`,
    on the same clock as `now_seconds`; in the past means that they are there already.
    """

    worker_id: str
    tokens: int
    ready_seconds: float


@dataclass(frozen=True, slots=True)
class RouteRequest:
    """One request to be placed, or one session whose next turn is to be placed.

    Attributes:
        request_id: Any id; only for the log.
        input_tokens: Prompt length; an estimate where no tokenizer is at hand.
        page_hashes: Event hashes (`page_hash.event_hashes`, int64) of the prompt's whole pages from
            its start, for each page size among the workers. Empty where token ids are unknown.
        session_id: The session with its namespace folded in, or None.
        text: The prompt as text, or its first part: what `cache_aware` goes by.
        output_tokens: How many tokens are expected to be generated; None: not known.
        model_id: Only workers that serve this model, or name none, are candidates.
        target_worker: A worker that the caller asked for by name (`X-SMG-Target-Worker`).
        excluded: Workers that have failed this request already.
        advised: What was promoted for this session, most useful first.
    """

    request_id: str
    input_tokens: int
    page_hashes: Mapping[int, EventHashes] = field(default_factory=dict, repr=False)
    session_id: str | None = None
    text: str = field(default="", repr=False)
    output_tokens: int | None = None
    model_id: str | None = None
    target_worker: str | None = None
    excluded: frozenset[str] = frozenset()
    advised: tuple[AdvisedPlace, ...] = ()


class WorkerState(StrEnum):
    """Whether a worker takes requests."""

    READY = "ready"
    DRAINING = "draining"  # finishes what it has; its sessions move away
    UNHEALTHY = "unhealthy"  # failed its health checks, or its circuit breaker is open


@dataclass(frozen=True, slots=True)
class WorkerRates:
    """A worker's own measurements; None where it has not measured yet.

    `peer_to_host` is the page transfer from another worker into this one's host memory.
    """

    prefill: Rate | None = None
    host_to_device: Rate | None = None
    nvme_to_host: Rate | None = None
    peer_to_host: Rate | None = None


NO_RATES = WorkerRates()


def measured_rate(tokens_per_second: float | None, latency_seconds: float | None) -> Rate | None:
    """A rate as a worker reports it; None for what cannot be one (absent, zero, not finite)."""
    if tokens_per_second is None or not 0 < tokens_per_second < math.inf:
        return None
    latency = latency_seconds or 0.0
    return Rate(tokens_per_second, latency if 0 <= latency < math.inf else 0.0)


@dataclass(frozen=True, slots=True)
class LoadView:
    """Work at a worker as best known: its last report, brought up to date by what was sent since.

    Attributes:
        requests_running: Requests in the running batch.
        requests_waiting: Requests queued at the worker or on their way to it.
        tokens_waiting_uncached: Prompt tokens still to be computed before a new request gets its
            turn: queued ones, those on their way, and what is left of a chunked prefill.
        tokens_running: Context tokens of the running batch.
        device_used_tokens: Tokens of the device pool that running work holds. Evictable cache, and
            what hints protect, do not count.
        device_total_tokens: Size of the device pool; 0: not known.
        requests_max: How many requests may run at a time; 0: not known.
        decode_step_seconds: Time of one decode step now; 0: not known.
        requests_in_flight: What this router itself has sent and not seen end.
    """

    requests_running: int = 0
    requests_waiting: int = 0
    tokens_waiting_uncached: int = 0
    tokens_running: int = 0
    device_used_tokens: int = 0
    device_total_tokens: int = 0
    requests_max: int = 0
    decode_step_seconds: float = 0.0
    requests_in_flight: int = 0

    @property
    def requests(self) -> int:
        """Requests there in all, by the larger of the two accounts."""
        return max(self.requests_running + self.requests_waiting, self.requests_in_flight)


NO_LOAD = LoadView()


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One cache domain as a policy sees it, at one instant.

    `page_size` 0 means unknown: the worker gets no credit for cached pages. `serves_pages` says
    that others can pull pages from it, `pulls_pages` that it can pull. `transfer_seconds` is how
    long the page transfers to and from it that the router has begun will still take.
    """

    worker_id: str
    state: WorkerState = WorkerState.READY
    page_size: int = 0
    load: LoadView = NO_LOAD
    rates: WorkerRates = NO_RATES
    model_id: str | None = None
    server_id: str = ""  # ranks of one server share it; "": the worker stands alone
    dp_rank: int | None = None
    serves_pages: bool = False
    pulls_pages: bool = False
    transfer_seconds: float = 0.0


class Reason(StrEnum):
    """Why a worker was chosen."""

    TARGETED = "targeted"  # the caller named it
    ONLY_WORKER = "only_worker"
    LEAST_COST = "least_cost"
    TIE_SESSION = "tie_session"  # as cheap as the cheapest, and the session lives there
    TIE_CACHE = "tie_cache"  # as cheap as the cheapest, and it holds more of the prompt
    TIE_SPREAD = "tie_spread"  # as cheap as the cheapest; taken by chance among the least loaded
    SESSION = "session"  # the session lives there, and it is not much dearer (or: sticky)
    CACHE = "cache"  # the prefix tree's best match
    LEAST_LOADED = "least_loaded"
    BALANCE = "balance"  # load is uneven: affinity does not count
    ADVISED = "advised"  # the one target chosen when the advisory came
    TURN = "turn"  # round robin
    CHANCE = "chance"


class CostParts(NamedTuple):
    """What a request would cost on one worker, in seconds of that worker, part by part.

    `queue`: the work before it; `bring`: loading from host and NVMe, in seconds that count less
    (`PolicySettings.load_margin`); `pull`: from a peer;
    `recompute`: prefill of what is nowhere; `contend`: what decoding beside the running batch adds;
    `displace`: what others lose that must be evicted for it.
    """

    queue: float = 0.0
    bring: float = 0.0
    pull: float = 0.0
    recompute: float = 0.0
    contend: float = 0.0
    displace: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


class TokenParts(NamedTuple):
    """Where the prompt's tokens would come from on the chosen worker; they add up to the prompt."""

    device: int = 0
    host: int = 0
    nvme: int = 0
    peer: int = 0
    recompute: int = 0


NO_COST = CostParts()
NO_TOKENS = TokenParts()


class PullOffer(NamedTuple):
    """A peer has more of the prompt, and copying it would be cheaper than computing it.

    `tokens` is how long the prefix will be once pulled, `already_tokens` what the puller has of it.
    `saved_seconds` is against the cheapest way without the pull.
    """

    source_worker_id: str
    tokens: int
    already_tokens: int
    pull_seconds: float
    saved_seconds: float


class Alternative(NamedTuple):
    """Another candidate that was weighed."""

    worker_id: str
    cost: CostParts
    match: PrefixMatch


@dataclass(frozen=True, slots=True)
class Decision:
    """Where a request goes, and why.

    `uncached_tokens` is what its prefill will compute there, which the caller adds to the worker's
    load until the first token comes. `cost` and `tokens` are all 0 for policies that do not
    estimate. `alternatives` are the cheapest few others, best first, out of `considered`
    candidates. `pull` is set where pulling from a peer first is cheaper; `cost` then includes it.
    `page_size` is the chosen worker's.
    """

    worker_id: str
    reason: Reason
    uncached_tokens: int
    considered: int
    cost: CostParts = NO_COST
    tokens: TokenParts = NO_TOKENS
    match: PrefixMatch = NO_MATCH
    pull: PullOffer | None = None
    alternatives: tuple[Alternative, ...] = ()
    page_size: int = 0


@dataclass(frozen=True, slots=True)
class AdvisoryChoice:
    """Which worker should serve a session's next turn.

    `bring_seconds` is how long loading what the worker has itself takes. `source_worker_id` is
    where its KV is now, if that is another worker: the KV would have to be moved (`tokens` of it)
    or the turn would recompute it. `best_level` is the fastest level of the source or of the chosen
    worker that holds any of it, None where nobody does.
    """

    worker_id: str
    reason: Reason
    cost: CostParts
    match: PrefixMatch
    bring_seconds: float = 0.0
    best_level: Level | None = None
    source_worker_id: str | None = None
    tokens: int = 0
    considered: int = 0
    alternatives: tuple[Alternative, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """Settings of all policies; the first five are sglang-router's, with its defaults.

    Attributes:
        cache_threshold: `cache_aware`: least matched share of the prompt that counts as a hit.
        balance_abs_threshold: `cache_aware`: requests by which the busiest worker must lead the
            idlest before load counts as uneven.
        balance_rel_threshold: `cache_aware`: and by what factor.
        eviction_interval_seconds: `cache_aware`: how often the tree is cut back. It is also cut the
            moment it is full.
        max_tree_size: `cache_aware`: characters kept for each worker.
        tree_bytes_max: `cache_aware`: bytes of the whole tree, text and nodes.
        session_idle_seconds: How long an idle session keeps its worker in `session_sticky`.
        sessions_max: Sessions remembered by a policy; beyond it the least recently used goes.
        speculative_seconds: How long pages that were just routed count as expected.
        tie_seconds: Costs that differ by less are a tie,
        tie_share: as are those that differ by less than this share of the cheapest.
        expected_discount: What an expected page is worth of one that is there.
        load_margin: How many times slower than recomputing a load may look and still be used, and
            what its seconds are divided by beside those of computing; as in the workers' gate.
        stay_share: A session stays where it is, if that is no dearer than the cheapest by more
            than this share of it
        stay_seconds: plus this: moving for less would not pay, and back and forth never does,
        stay_tokens: and if nobody holds more of it than by these: a worker that a session has left
            keeps the last, unfilled page, which does not move.
        displace_weight: What a second of somebody else's recompute counts, times the chance that
            evicted KV is asked for again.
        contend_weight: What a second of slower decoding counts of one before the first token. Low,
            for the batch of this instant says little about the batch during the answer.
        blind_share: How much of a session's prompt its worker is taken to hold where no page hash
            tells.
        decode_step_seconds: Assumed time of a decode step where no worker has measured one.
        output_tokens: Assumed answer length where a request does not say.
        pull_tokens_min: Shorter gains are not worth a pull.
        alternatives_max: How many other candidates a decision lists.
        default_rates: For a worker without measurements where no other worker has any.
    """

    cache_threshold: float = 0.3
    balance_abs_threshold: int = 64
    balance_rel_threshold: float = 1.5
    eviction_interval_seconds: float = 60.0
    max_tree_size: int = 67_108_864
    tree_bytes_max: int = 512 * 2**20
    session_idle_seconds: float = 14_400.0
    sessions_max: int = 262_144
    speculative_seconds: float = 30.0
    tie_seconds: float = 0.002
    tie_share: float = 0.02
    expected_discount: float = 0.98
    load_margin: float = 2.0
    stay_share: float = 0.25
    stay_seconds: float = 0.05
    stay_tokens: int = 64
    displace_weight: float = 0.3
    contend_weight: float = 0.1
    blind_share: float = 0.75
    decode_step_seconds: float = 0.02
    output_tokens: int = 256
    pull_tokens_min: int = 256
    alternatives_max: int = 2
    default_rates: WorkerRates = WorkerRates(
        prefill=Rate(8_000.0, 0.01),
        host_to_device=Rate(200_000.0, 0.001),
        nvme_to_host=Rate(40_000.0, 0.002),
        peer_to_host=Rate(40_000.0, 0.005),
    )

    def __post_init__(self) -> None:
        assert 0 <= self.cache_threshold <= 1, self
        assert self.balance_abs_threshold >= 0, self
        assert self.balance_rel_threshold >= 1, self
        assert self.max_tree_size > 0 < self.tree_bytes_max, self
        assert self.sessions_max > 0 <= self.alternatives_max, self
        assert 0 <= self.expected_discount <= 1, self
        assert self.default_rates.prefill is not None, self


class Policy(Protocol):
    """Chooses workers. `choose` only reads; what it should remember is told by `routed`.

    So a caller may ask again after a failure, with the failed worker in `excluded`, and only what
    was really sent counts.
    """

    name: str

    def choose(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: random.Random,
    ) -> Decision:
        """The worker for `request`.

        Raises:
            NoWorkerError: none of `workers` may take it.
        """
        ...

    def routed(
        self, request: RouteRequest, decision: Decision, index: LocationIndex, now_seconds: float
    ) -> None:
        """The request was sent as decided: remember it, also in `index` (expected pages)."""
        ...

    def choose_for_advisory(
        self,
        request: RouteRequest,
        workers: Sequence[WorkerView],
        index: LocationIndex,
        now_seconds: float,
        random: random.Random,
    ) -> AdvisoryChoice:
        """The worker that should serve the next turn of the session in `request`.

        `request` describes what is known of the session: its tokens and page hashes so far.

        Raises:
            NoWorkerError: none of `workers` may take it.
        """
        ...

    def advised(self, request: RouteRequest, choice: AdvisoryChoice, now_seconds: float) -> None:
        """The advisory was forwarded as chosen: remember it."""
        ...

    def forget_worker(self, worker_id: str) -> None:
        """The worker is gone for good."""
        ...

    def forget_session(self, session_id: str) -> None:
        """The session is over."""
        ...

    def tick(self, now_seconds: float) -> None:
        """Housekeeping; call it about once a second."""
        ...
