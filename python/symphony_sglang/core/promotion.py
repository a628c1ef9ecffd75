"""The planner: which small moves to start this step, for all advisories together.

A pure function of what every tensor-parallel rank has alike. It changes nothing; `Promoter` records
what it decides, and the engine carries it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from symphony_sglang.core.gate import GateSnapshot
from symphony_sglang.core.levels import Hop, Level, Target, page_floor
from symphony_sglang.core.lifecycle import AdvisoryView, Kind, State
from symphony_sglang.core.moves import Move, Reason


@dataclass(frozen=True, slots=True)
class LevelBudget:
    """One level, in tokens. `lengths` is the held prefix length of each holder."""

    cap_tokens: int
    held_tokens: int
    # What an allocation could get now: free and evictable, less what running work needs soon.
    room_tokens: int
    lengths: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Demand:
    """What real requests want right now. Anything but zero keeps advisories off that hop."""

    requests_waiting: int = 0
    loads_pending: int = 0  # host-to-device, a request's own, queued or not yet acknowledged
    stages_pending: int = 0  # NVMe-to-host, a request's own

    @property
    def kinds(self) -> tuple[bool, bool, bool]:
        """What there is demand for at all: how much makes no difference to a plan."""
        return (bool(self.requests_waiting), bool(self.loads_pending), bool(self.stages_pending))


IDLE = Demand()


@dataclass(frozen=True, slots=True)
class Flight:
    """Advisory moves not yet finished."""

    stages: int = 0
    loads: int = 0


@dataclass(frozen=True, slots=True)
class PlannerLimits:
    """How much one step may start."""

    page_size: int
    # One host-to-device group, or one staging move: a request that comes waits for one at most.
    chunk_pages: int = 128
    stages_max: int = 2
    probes_max: int = 4
    drops_max: int = 16
    # Deadlines closer together than this are equal, and priority decides.
    deadline_quantum_seconds: float = 0.5
    # Advisories without a deadline are ordered as if due this long after receipt. Typing leads
    # average 11.3 s, agent hand-overs 5.8 s (SYMPHONY §3.1); sooner is the safe side.
    implied_lead_seconds: float = 5.0
    # How many times longer than computing a load ahead of its request may take. Beyond that the
    # level is broken or busy, and whoever comes early would wait for it.
    early_factor: float = 4.0

    def __post_init__(self) -> None:
        assert self.page_size > 0, self.page_size
        assert 0 < self.chunk_pages <= 128, self.chunk_pages
        assert min(self.stages_max, self.probes_max, self.drops_max) > 0, self
        assert self.deadline_quantum_seconds > 0, self.deadline_quantum_seconds
        assert self.implied_lead_seconds >= 0 <= self.early_factor, self

    @property
    def chunk_tokens(self) -> int:
        return self.chunk_pages * self.page_size

    def order_key(self, view: AdvisoryView) -> tuple[int, int, int]:
        """Deadline, then priority, then arrival. Implied deadlines keep newcomers from starving
        an old advisory: once due, it precedes whatever arrives from then on."""
        slot = math.floor(self.due_seconds(view) / self.deadline_quantum_seconds)
        return (slot, -view.priority, view.arrival)

    def due_seconds(self, view: AdvisoryView) -> float:
        """When its request is expected."""
        if view.deadline_seconds is not None:
            return view.deadline_seconds
        return view.received_seconds + self.implied_lead_seconds


@dataclass(frozen=True, slots=True)
class Clip:
    """Lower an advisory's goal: `tokens` is all that can be, or is worth being, brought."""

    advisory_id: str
    tokens: int
    reason: Reason


@dataclass(frozen=True, slots=True)
class Deferral:
    advisory_id: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class Drop:
    """Take an advisory's protection on one level, for one that goes before it."""

    level: Level
    advisory_id: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's decisions, each list in planning order.

    `loads` is ONE group: the engine queues all and starts a single, layer-major transfer.
    """

    probes: tuple[str, ...] = ()
    clips: tuple[Clip, ...] = ()
    drops: tuple[Drop, ...] = ()
    stages: tuple[Move, ...] = ()
    loads: tuple[Move, ...] = ()
    deferrals: tuple[Deferral, ...] = ()

    @property
    def idle(self) -> bool:
        """Nothing to do, and nothing but a change of what was asked about will alter that.

        More free memory alone can only matter to who waits for it.
        """
        return not (self.probes or self.clips or self.drops or self.stages or self.loads) and all(
            deferral.reason is not Reason.LEVEL_FULL for deferral in self.deferrals
        )


EMPTY_PLAN = Plan()


def plan_step(
    views: Sequence[AdvisoryView],
    *,
    device: LevelBudget,
    host: LevelBudget,
    demand: Demand,
    flight: Flight,
    gate: GateSnapshot,
    limits: PlannerLimits,
    now_seconds: float,
) -> Plan:
    """Decide one step. The result does not depend on the order of `views`."""
    if not views:
        return EMPTY_PLAN
    step = _Step(
        device=_Level(Level.DEVICE, device, limits.page_size),
        host=_Level(Level.HOST, host, limits.page_size),
        gate=gate,
        limits=limits,
        now_seconds=now_seconds,
        stages_left=0 if demand.stages_pending else max(0, limits.stages_max - flight.stages),
        load_tokens_left=0
        if flight.loads or demand.requests_waiting or demand.loads_pending
        else limits.chunk_tokens,
        stage_block=Reason.DEMAND_FIRST if demand.stages_pending else Reason.SLOTS_IN_USE,
        load_block=Reason.SLOTS_IN_USE if flight.loads else Reason.DEMAND_FIRST,
        views=views,
    )
    step.order = sorted(unsettled(views, step.device, step.host), key=limits.order_key)
    for view in step.order:
        step.consider(view)
    return Plan(
        probes=tuple(step.probes),
        clips=tuple(step.clips),
        drops=tuple(step.drops),
        stages=tuple(step.stages),
        loads=tuple(step.loads),
        deferrals=tuple(step.deferrals),
    )


@dataclass(slots=True)
class _Level:
    """A level's budget while a step is being planned."""

    level: Level
    budget: LevelBudget
    page_size: int
    free_tokens: int = 0
    room_tokens: int = 0
    cap_tokens: int = 0  # whole pages of the budget
    # Somebody earlier in the order waits for budget: nobody later may take it.
    blocked: bool = False

    def __post_init__(self) -> None:
        self.free_tokens = max(0, self.budget.cap_tokens - self.budget.held_tokens)
        self.room_tokens = max(0, self.budget.room_tokens)
        self.cap_tokens = page_floor(self.budget.cap_tokens, self.page_size)

    def held(self, advisory_id: str) -> int:
        return self.budget.lengths.get(advisory_id, 0)

    def extend(self, advisory_id: str, tokens: int) -> int:
        """Length up to `tokens` that the hold can have; shared heads only make it cheaper."""
        held = self.held(advisory_id)
        free = 0 if self.blocked else page_floor(self.free_tokens, self.page_size)
        return max(held, min(tokens, held + free))

    def take(self, advisory_id: str, tokens: int) -> None:
        self.free_tokens -= max(0, tokens - self.held(advisory_id))


def unsettled(views: Sequence[AdvisoryView], device: _Level, host: _Level) -> list[AdvisoryView]:
    """Without those that are ready and wholly held: most, most of the time."""
    ready, to_device = State.READY, Target.DEVICE
    levels = {
        target: (level.budget.lengths, level.cap_tokens)
        for target, level in ((to_device, device), (Target.HOST, host))
    }
    pending = []
    for view in views:
        if view.state is ready and view.device_tokens is not None:
            lengths, cap_tokens = levels[view.target]
            held = lengths.get(view.advisory_id, 0)
            if held >= view.goal_tokens or held >= cap_tokens:
                continue
        pending.append(view)
    return pending


@dataclass(slots=True)
class _Step:
    """The scratch of one `plan_step`."""

    device: _Level
    host: _Level
    gate: GateSnapshot
    limits: PlannerLimits
    now_seconds: float
    stages_left: int
    load_tokens_left: int
    stage_block: Reason
    load_block: Reason
    views: Sequence[AdvisoryView]
    order: list[AdvisoryView] = field(default_factory=list)
    probes: list[str] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    drops: list[Drop] = field(default_factory=list)
    dropped: set[str] = field(default_factory=set)
    stages: list[Move] = field(default_factory=list)
    loads: list[Move] = field(default_factory=list)
    deferrals: list[Deferral] = field(default_factory=list)

    def consider(self, view: AdvisoryView) -> None:
        advisory_id = view.advisory_id
        if advisory_id in self.dropped:
            return
        if view.staging and view.loading:
            return
        if self.now_seconds < view.not_before_seconds:
            self.defer(view, Reason.BACKOFF)
            return
        if view.device_tokens is None:
            # In flight it is looked up when the move ends.
            if not (view.staging or view.loading):
                self.probe(view)
            return
        if view.state is State.READY or view.kind is Kind.RETAIN:
            self.protect(view)
            return
        if not view.started and self.nothing_to_start(view):
            return
        goal = self.clip(view)
        if goal == 0:
            return
        upper = view.upper_tokens
        to_device = view.target is Target.DEVICE
        if not view.started and (
            (self.stages_left > 0 and upper < goal)
            or (to_device and self.load_tokens_left > 0 and upper > view.device_tokens)
        ):
            # Asked once, just before the first move: speeds that waver leave nothing half done.
            worth, reason = self.gated(view, goal)
            if worth < goal:
                self.clips.append(Clip(view.advisory_id, worth, reason))
                return
        self.stage(view, goal)
        if to_device:
            self.load(view, goal)

    def nothing_to_start(self, view: AdvisoryView) -> bool:
        """Whether this step has no slot for what it needs next; defers it where so."""
        upper = view.upper_tokens
        if upper < view.goal_tokens and self.stages_left > 0:
            return False
        loadable = view.target is Target.DEVICE and upper > (view.device_tokens or 0)
        if loadable and self.load_tokens_left > 0:
            return False
        if upper < view.goal_tokens:
            self.defer(view, self.stage_block)
        elif not self.loads:
            # The group being full is progress, not a reason to defer.
            self.defer(view, self.load_block)
        return True

    def probe(self, view: AdvisoryView) -> None:
        if len(self.probes) < self.limits.probes_max:
            self.probes.append(view.advisory_id)

    def protect(self, view: AdvisoryView) -> None:
        """A ready advisory that is not wholly held is looked up again when budget is there."""
        level = self.device if view.target is Target.DEVICE else self.host
        wanted = min(view.goal_tokens, level.cap_tokens)
        held = level.held(view.advisory_id)
        if held >= wanted or level.blocked:
            return
        granted = level.extend(view.advisory_id, wanted)
        if granted > held:
            level.take(view.advisory_id, granted)
            self.probe(view)
        if granted < wanted:
            self.make_room(view, level, wanted - granted)

    def clip(self, view: AdvisoryView) -> int:
        """The goal that is possible; 0 where the book has to hear of a lower one first."""
        goal, reason = view.goal_tokens, Reason.NOT_STORED
        cap = (self.device if view.target is Target.DEVICE else self.host).cap_tokens
        if view.storage_end_tokens is None and goal <= cap:
            return goal
        if view.storage_end_tokens is not None:
            goal = min(goal, max(view.storage_end_tokens, view.upper_tokens))
        if goal > cap:
            goal, reason = cap, Reason.BUDGET_CLIP
        goal = page_floor(goal, self.limits.page_size)
        if goal < view.goal_tokens:
            self.clips.append(Clip(view.advisory_id, goal, reason))
            return 0
        return goal

    def gated(self, view: AdvisoryView, goal: int) -> tuple[int, Reason]:
        """The part of `goal` that is faster to bring than to compute again, or brought in time."""
        device, upper = view.device_tokens or 0, view.upper_tokens
        reason = Reason.NVME_SLOWER
        if goal > upper and not self.worth(view, Level.NVME, goal - upper):
            goal = page_floor(upper, self.limits.page_size)
        on_host = view.target is Target.DEVICE and device < goal <= upper
        if on_host and not self.worth(view, Level.HOST, goal - device):
            goal, reason = page_floor(device, self.limits.page_size), Reason.HOST_SLOWER
        return goal, reason

    def worth(self, view: AdvisoryView, level: Level, tokens: int) -> bool:
        """What is there when its request comes costs that nothing, and recomputing would cost the
        device's time: so a level may be slower than computing, within reason, if it is in time.
        """
        decision = self.gate.worth_loading(level, tokens)
        slack = self.limits.due_seconds(view) - self.now_seconds
        early = min(slack, self.limits.early_factor * decision.recompute_seconds)
        return decision.use or decision.load_seconds <= early

    def stage(self, view: AdvisoryView, goal: int) -> None:
        """One chunk from NVMe to host, held on host if the budget allows."""
        start = view.upper_tokens
        if start >= goal or view.staging:
            return
        if self.stages_left <= 0:
            self.defer(view, self.stage_block)
            return
        room = page_floor(self.host.room_tokens, self.limits.page_size)
        stop = min(goal, start + min(self.limits.chunk_tokens, room))
        if stop <= start:
            self.defer(view, Reason.LEVEL_FULL)
            return
        granted = self.host.extend(view.advisory_id, stop)
        if granted > start:
            stop = granted
            self.host.take(view.advisory_id, stop)
        elif view.target is Target.HOST or view.host_tokens > 0:
            self.defer(view, Reason.BUDGET_IN_USE)
            self.make_room(view, self.host, stop - granted)
            return
        # Without budget, one chunk may ride unprotected: the device load that frees it is next.
        self.host.room_tokens -= stop - start
        self.stages_left -= 1
        self.stages.append(Move(view.advisory_id, Hop.NVME_TO_HOST, start, stop))

    def load(self, view: AdvisoryView, goal: int) -> None:
        """A share of this step's one device load, held on device."""
        start = view.device_tokens or 0
        stop = min(goal, view.upper_tokens)
        if stop <= start or view.loading:
            return
        if self.load_tokens_left <= 0:
            # The group being full is progress, not a reason to defer.
            if not self.loads:
                self.defer(view, self.load_block)
            return
        size = self.limits.page_size
        room = page_floor(min(self.load_tokens_left, self.device.room_tokens), size)
        if room <= 0:
            self.defer(view, Reason.LEVEL_FULL)
            return
        stop = min(stop, start + room)
        granted = self.device.extend(view.advisory_id, stop)
        if granted <= start:
            self.defer(view, Reason.BUDGET_IN_USE)
            self.make_room(view, self.device, stop - granted)
            return
        self.device.take(view.advisory_id, granted)
        self.device.room_tokens -= granted - start
        self.load_tokens_left -= granted - start
        self.loads.append(Move(view.advisory_id, Hop.HOST_TO_DEVICE, start, granted))

    def make_room(self, view: AdvisoryView, level: _Level, tokens: int) -> None:
        """Drop protections that rank below `view`, and keep later advisories from taking its turn.

        What rank below: strictly lower priorities; and, at most of equal priority and later in the
        order, those that are not ready yet. A ready one of equal priority is never dropped, so two
        advisories cannot take memory from each other in turns. Only the first advisory that is
        blocked on a level gets to drop; what is freed is planned for in the next step.
        """
        if level.blocked:
            return
        level.blocked = True
        moving = {move.advisory_id for move in (*self.stages, *self.loads)}
        key = self.limits.order_key(view)
        victims = [
            other
            for other in self.views
            if (
                other.priority < view.priority
                or (
                    other.priority == view.priority
                    and other.state is not State.READY
                    and self.limits.order_key(other) > key
                )
            )
            and not (other.staging or other.loading)
            and other.advisory_id not in moving
            and level.held(other.advisory_id)
        ]
        victims.sort(key=lambda other: (other.priority, -other.arrival))
        for victim in victims:
            if tokens <= 0 or len(self.drops) >= self.limits.drops_max:
                break
            tokens -= level.held(victim.advisory_id)
            self.drops.append(Drop(level.level, victim.advisory_id))
            self.dropped.add(victim.advisory_id)

    def defer(self, view: AdvisoryView, reason: Reason) -> None:
        if view.state is State.QUEUED:
            self.deferrals.append(Deferral(view.advisory_id, reason))
