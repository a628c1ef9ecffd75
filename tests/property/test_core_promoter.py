"""Laws of the promoter, under arbitrary interleavings and in small scenarios."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import subprocess
import sys

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from promotion_world import (
    BOOK,
    HOST_CAP,
    LIMITS,
    PAGE,
    World,
    fingerprint,
    pages_of,
    prompt,
)
from symphony_sglang.core.gate import GateSnapshot, Rate
from symphony_sglang.core.levels import Hop, Level, Target
from symphony_sglang.core.lifecycle import Kind
from symphony_sglang.core.moves import MoveResult
from symphony_sglang.core.prefix import NO_NAMESPACE
from symphony_sglang.core.promotion import Demand, Plan

HERE = os.path.dirname(os.path.abspath(__file__))

sessions = st.integers(0, 5)
lengths = st.integers(1, 16)


class PromoterMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(session=sessions, length=lengths)
    def store(self, session: int, length: int) -> None:
        self.world.store(session, length)

    @rule(
        session=sessions,
        length=lengths,
        goal=st.sampled_from(Target),
        kind=st.sampled_from([Kind.PREFETCH, Kind.PREFETCH, Kind.PREFETCH, Kind.RETAIN]),
        expected=st.none() | st.sampled_from([0.0, 0.3, 2.0, 9.0]),
        expires=st.sampled_from([0.0, 0.5, 60.0, 60.0, 60.0]),
        priority=st.integers(-1, 2),
        stored=st.sampled_from([True, True, True, False]),
    )
    def advise(self, session, length, goal, kind, expected, expires, priority, stored) -> None:
        if stored:
            self.world.store(session, length)
        self.world.advise(
            session,
            length,
            target=goal,
            kind=kind,
            expected_in_seconds=expected,
            expires_in_seconds=expires,
            priority=priority,
        )

    @rule(turns=st.integers(1, 8))
    def run(self, turns: int) -> None:
        """Some steps without trouble, so that there is something to lose."""
        for _ in range(turns):
            self.world.now += 0.02
            self.world.step()
            self.world.check()
            self.world.end_all_moves()
            self.world.check()

    @precondition(lambda self: self.world.prefixes)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        advisory_id = data.draw(st.sampled_from(sorted(self.world.prefixes)[-8:]))
        self.world.ranks.cancel(advisory_id, self.world.now)
        self.world.drain_locks()

    @rule(session=sessions, sure=st.sampled_from([False, False, False, True]))
    def cancel_session(self, session: int, sure: bool) -> None:
        if sure:
            self.world.ranks.cancel_session(f"s{session}", self.world.now)
        self.world.drain_locks()

    @rule(
        waiting=st.sampled_from([0, 0, 0, 1]),
        loads=st.sampled_from([0, 0, 0, 1]),
        stages=st.sampled_from([0, 0, 0, 1]),
        slow_nvme=st.sampled_from([False, False, False, True]),
    )
    def step(self, waiting: int, loads: int, stages: int, slow_nvme: bool) -> None:
        world = self.world
        flying = world.ranks.book.flying(Hop.HOST_TO_DEVICE)
        gate = GateSnapshot(Rate(0.001 if slow_nvme else 1e9), Rate(1e9), Rate(1e3))
        plan = world.step(Demand(waiting, loads, stages), gate)
        if waiting or loads or flying:
            assert not plan.loads, "a real request's transfer goes first, and one load at a time"
        if stages:
            assert not plan.stages
        assert sum(move.tokens for move in plan.loads) <= LIMITS.chunk_tokens
        assert all(0 < move.tokens <= LIMITS.chunk_tokens for move in plan.stages)
        assert world.ranks.book.flying(Hop.NVME_TO_HOST) <= LIMITS.stages_max

    @precondition(lambda self: self.world.flight)
    @rule(data=st.data(), result=st.sampled_from(MoveResult))
    def end_move(self, data, result: MoveResult) -> None:
        moves = sorted(self.world.flight.values(), key=lambda m: (m.advisory_id, m.hop))
        self.world.end_move(data.draw(st.sampled_from(moves)), result)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0, 4.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.world.now += seconds

    @rule(data=st.data(), level=st.sampled_from([Level.DEVICE, Level.HOST]))
    def evict(self, data, level: Level) -> None:
        """Any page may go, leaves first, except what is locked."""
        world = self.world
        free = [page for page in world.levels[level] if page not in world.locked(level)]
        leaves = [p for p in free if not any(q != p and q.startswith(p) for q in free)]
        if leaves:
            del world.levels[level][data.draw(st.sampled_from(sorted(leaves)))]

    @rule(session=sessions, length=lengths, hold=st.booleans())
    def arrive(self, session: int, length: int, hold: bool) -> None:
        world = self.world
        request = prompt(session, length)
        device, host = world.matched(request)
        if hold:
            # The request's own look-up and lock come first, as in the engine.
            name = f"r{world.new_id()}"
            world.prefixes[f"request:{name}"] = request
            world.ranks.hold_request(name, request, device, host, world.now + 2.0, world.now)
            world.drain_locks()
        before = world.ranks.book.of_session(f"s{session}")
        receipts = world.ranks.arrived(
            f"s{session}", NO_NAMESPACE, request.token_bytes, device, host, world.now
        )
        world.drain_locks()
        assert {receipt.advisory_id for receipt in receipts} == set(before)

    @precondition(lambda self: any(k.startswith("request:") for k in self.world.prefixes))
    @rule(data=st.data())
    def release_request(self, data) -> None:
        names = sorted(k for k in self.world.prefixes if k.startswith("request:"))
        name = data.draw(st.sampled_from(names)).removeprefix("request:")
        self.world.ranks.release_request(name, self.world.now)
        self.world.drain_locks()

    @rule(level=st.sampled_from([Level.DEVICE, Level.HOST]), tokens=st.integers(1, 20))
    def give_way(self, level: Level, tokens: int) -> None:
        world = self.world
        before = len(world.locked(level)) * PAGE
        freed = world.ranks.give_way(level, tokens, world.now)
        world.drain_locks()
        after = len(world.locked(level)) * PAGE
        assert freed == before - after
        assert freed >= min(tokens, before), "running work gets what it asks for, or all there is"

    @rule(sure=st.integers(0, 9).map(lambda number: number == 9))
    def flush(self, sure: bool) -> None:
        if not sure:
            return
        world = self.world
        world.ranks.flushed(world.now)
        world.levels[Level.DEVICE].clear()
        world.levels[Level.HOST].clear()
        world.locks.clear()
        world.flight.clear()
        world.drain_locks()
        assert not world.ranks.book.views()

    @invariant()
    def sound(self) -> None:
        self.world.check()

    @invariant()
    def ranks_hold_equal_books(self) -> None:
        first, second = (fingerprint(promoter) for promoter in self.world.ranks.all)
        assert first == second


TestPromoter = PromoterMachine.TestCase
TestPromoter.settings = settings(
    max_examples=120, stateful_step_count=40, deadline=None, derandomize=True
)


def scenario_digest() -> str:
    """A long mixed run, boiled down to a digest of all that was decided."""
    world = World()
    digest = hashlib.sha256()
    for turn in range(300):
        world.now += 0.05
        world.store(turn % 6, 6 + turn % 11)
        if turn % 3 == 0:
            world.advise(
                turn % 6,
                6 + turn % 11,
                priority=turn % 4,
                expected_in_seconds=None if turn % 2 else (turn % 7) / 2,
                expires_in_seconds=2.0,
            )
        digest.update(repr(world.step(Demand(requests_waiting=turn % 5 == 4))).encode())
        if turn % 2:
            world.end_all_moves()
        if turn % 13 == 0:
            request = prompt(turn % 6, 9)
            device, host = world.matched(request)
            world.ranks.arrived(
                f"s{turn % 6}", NO_NAMESPACE, request.token_bytes, device, host, world.now
            )
            world.drain_locks()
        if turn % 17 == 0:
            world.ranks.give_way(Level.DEVICE, 4, world.now)
            world.drain_locks()
        world.check()
    digest.update(repr(fingerprint(world.ranks.all[0])).encode())
    return digest.hexdigest()


def test_decisions_do_not_depend_on_the_hash_seed():
    """Ranks are processes, each with its own seed for `hash()`: set order must not matter."""
    code = "import test_core_promoter as t; print(t.scenario_digest())"
    path = os.pathsep.join([HERE, os.path.dirname(HERE), os.environ.get("PYTHONPATH", "")])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("0", "1", "4711")
    }
    assert len(digests) == 1
    assert digests == {scenario_digest() + "\n"}


def test_a_session_on_nvme_gets_to_the_device_in_few_steps():
    world = World()
    world.store(0, 12)
    world.advise(0, 12)
    steps = 0
    while world.ranks.book.views()[0].state != "ready":
        world.now += 0.01
        world.step()
        world.end_all_moves()
        steps += 1
        assert steps < 20
    # One look-up, then three chunks of four tokens, staged and loaded in overlap.
    assert steps <= 5
    assert world.locks == {(Level.DEVICE, "a1"): 12}
    assert world.matched(prompt(0, 12)) == (12, 0)


def test_a_prefix_larger_than_the_pool_is_clipped_and_its_head_is_ready():
    world = World()
    world.store(0, 40)
    world.advise(0, 40)
    assert world.ranks.book.receipt("a1").status == "clipped"
    for _ in range(20):
        world.now += 0.01
        world.step()
        world.end_all_moves()
        world.check()
    receipt = world.ranks.book.receipt("a1")
    assert (receipt.status, receipt.state) == ("clipped", "ready")
    assert receipt.tokens["goal"] == 12, "thirteen tokens of budget are six whole pages"


def test_everything_advised_is_ready_in_the_end_when_it_fits():
    """Progress: nothing blocks, and all of it fits, so finitely many steps make all ready."""
    world = World()
    for session in range(3):
        world.store(session, 8)
        world.advise(session, 8, target=Target.HOST)
    for _ in range(30):
        world.now += 0.01
        world.step()
        world.end_all_moves()
        world.check()
    assert [view.state.value for view in world.ranks.book.views()] == ["ready"] * 3


def test_an_old_hint_without_deadline_is_not_starved_by_urgent_newcomers():
    """Newcomers are due at once and go first, until the old one is due itself."""
    world = World()
    world.store(0, 12)
    old = world.advise(0, 12)
    turns = 0
    while world.ranks.book.is_live(old) and world.ranks.book.receipt(old).state != "ready":
        world.now += 0.25
        session = 1 + turns % 5
        world.store(session, 12)
        world.advise(session, 12, expected_in_seconds=0.0, expires_in_seconds=0.3)
        world.step()
        world.end_all_moves()
        world.check()
        turns += 1
        assert world.now < LIMITS.implied_lead_seconds + 10
    assert world.ranks.book.receipt(old).state == "ready"


def test_a_queued_request_is_protected_before_advisories():
    world = World()
    for session in (0, 3):
        world.levels[Level.DEVICE].update(dict.fromkeys(pages_of(prompt(session, 12))))
    world.advise(0, 12)
    world.step()
    world.check()
    assert world.locks == {(Level.DEVICE, "a1"): 12}
    world.prefixes["request:r"] = prompt(3, 12)
    world.ranks.hold_request("r", prompt(3, 12), 12, 0, 10.0, world.now)
    world.drain_locks()
    world.check()
    assert world.locks == {(Level.DEVICE, "request:r"): 12}
    assert world.ranks.book.receipt("a1").state == "queued"
    world.now = 10.0
    world.step()
    assert (Level.DEVICE, "request:r") not in world.locks, "its expiry ends it whatever happens"


def test_equal_advisories_do_not_take_memory_from_each_other_in_turns():
    """Two that fit only one at a time: one becomes ready, the other waits, and nothing churns."""
    world = World()
    for session in (0, 3):
        world.store(session, 12)
        world.advise(session, 12, expires_in_seconds=1000.0)
    drops = 0
    for _ in range(200):
        world.now += 0.05
        drops += len(world.step().drops)
        world.end_all_moves()
        world.check()
    states = [view.state.value for view in world.ranks.book.views()]
    assert states[0] == "ready"
    assert states[1] != "ready"
    assert drops <= BOOK.yields_max + 1


def test_higher_priority_takes_the_place_of_lower():
    world = World()
    for session, priority in ((0, 0), (3, 5)):
        world.store(session, 12)
        world.advise(session, 12, priority=priority, expires_in_seconds=1000.0)
        for _ in range(20):
            world.now += 0.05
            world.step()
            world.end_all_moves()
            world.check()
    views = {view.advisory_id: view for view in world.ranks.book.views()}
    assert views["a2"].state == "ready"
    assert views["a1"].state != "ready"


def test_stepping_again_before_anything_ended_starts_nothing_twice():
    world = World()
    for session in range(4):
        world.store(session, 12)
        world.advise(session, 12)
    world.step()
    first = world.step()
    assert first.stages
    again = world.step()
    assert not again.stages
    assert not again.loads
    assert dataclasses.replace(again, deferrals=()) == Plan()


def test_an_idle_step_is_planned_again_when_a_retry_is_due():
    world = World()
    world.store(0, 8)
    world.advise(0, 8)
    world.step()
    (move,) = world.step().stages
    world.end_move(move, MoveResult.DECLINED)
    world.now += BOOK.backoff_seconds / 4
    assert world.step() == world.step() == Plan()
    world.now += BOOK.backoff_seconds
    assert world.step().stages


def test_an_idle_step_is_planned_again_when_budget_comes_free():
    world = World()
    blocker = prompt(3, HOST_CAP)
    world.levels[Level.HOST].update(dict.fromkeys(pages_of(blocker)))
    world.prefixes["request:r"] = blocker
    world.ranks.hold_request("r", blocker, 0, HOST_CAP, 1000.0, world.now)
    world.drain_locks()
    world.store(0, 8)
    world.advise(0, 8, target=Target.HOST)
    world.step()
    for _ in range(3):
        world.now += 0.01
        assert not world.step().stages
    assert world.ranks.book.receipt("a1").reason == "protect_budget_in_use"
    world.ranks.release_request("r", world.now)
    world.drain_locks()
    assert world.step().stages
    world.check()
