"""A world of content-addressed pages that promoters cannot see, for their tests.

It keeps which page is on which level, applies plans, evicts what is not locked, and runs two
promoters side by side, as two tensor-parallel ranks: they must agree on everything, always.
"""

from __future__ import annotations

from typing import Any

from symphony_sglang.core.gate import GateSnapshot
from symphony_sglang.core.levels import Hop, Level
from symphony_sglang.core.lifecycle import AdviseRequest, BookLimits
from symphony_sglang.core.moves import Move, MoveResult
from symphony_sglang.core.prefix import NO_NAMESPACE, Prefix, pack_tokens
from symphony_sglang.core.promoter import Promoter, StepInputs
from symphony_sglang.core.promotion import Demand, Plan, PlannerLimits

PAGE = 2
DEVICE_CAP, HOST_CAP = 13, 20
LIMITS = PlannerLimits(page_size=PAGE, chunk_pages=2, probes_max=3)
BOOK = BookLimits(live_max=6, finished_max=8)
# Sessions share heads: a system prompt, and for some a common first turn.
HEADS = [(), (1, 1, 1, 1), (1, 1, 1, 1, 2, 2)]


def prompt(session: int, length: int) -> Prefix:
    tokens = [*HEADS[session % 3], *[10 + session] * length][:length]
    return Prefix(NO_NAMESPACE, pack_tokens(tokens))


def pages_of(prefix: Prefix, tokens: int | None = None) -> list[bytes]:
    """A page's identity is all tokens up to its end, as a chained page hash is."""
    end = prefix.tokens if tokens is None else tokens
    return [prefix.token_bytes[: 4 * stop] for stop in range(PAGE, end + 1, PAGE)]


def fingerprint(promoter: Promoter) -> list[Any]:
    """All that a promoter knows, in its own order."""
    return [
        promoter.book.views(),
        promoter.book.moves(),
        [promoter.book.receipt(view.advisory_id) for view in promoter.book.views()],
        [hold.holder for hold in promoter.device.holds()],
        dict(promoter.device.lengths),
        dict(promoter.host.lengths),
        promoter.outcomes.as_json(0.0)["outcomes"],
    ]


class Ranks:
    """Two promoters that are told the same, and must answer the same."""

    def __init__(self, count: int = 2) -> None:
        self.all = [
            Promoter(
                device_cap_tokens=DEVICE_CAP,
                host_cap_tokens=HOST_CAP,
                planner=LIMITS,
                book=BOOK,
            )
            for _ in range(count)
        ]

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            answers = [getattr(promoter, name)(*args, **kwargs) for promoter in self.all]
            assert all(answer == answers[0] for answer in answers[1:]), (name, answers)
            return answers[0]

        return call

    @property
    def book(self):
        return self.all[0].book


class World:
    """Pages on levels, locks, and moves on their way."""

    def __init__(self) -> None:
        self.ranks = Ranks()
        self.now = 0.0
        self.levels: dict[Level, dict[bytes, None]] = {
            Level.DEVICE: {},
            Level.HOST: {},
            Level.NVME: {},
        }
        self.prefixes: dict[str, Prefix] = {}
        self.locks: dict[tuple[Level, str], int] = {}
        self.flight: dict[tuple[str, Hop], Move] = {}
        self.ids = 0

    def new_id(self) -> str:
        self.ids += 1
        return f"a{self.ids}"

    def matched(self, prefix: Prefix) -> tuple[int, int]:
        device = host = 0
        for page in pages_of(prefix):
            if page in self.levels[Level.DEVICE] and not host:
                device += PAGE
            elif page in self.levels[Level.HOST]:
                host += PAGE
            else:
                break
        return device, host

    def locked(self, level: Level) -> dict[bytes, None]:
        pages: dict[bytes, None] = {}
        for (at, holder_id), tokens in self.locks.items():
            if at is level:
                pages.update(dict.fromkeys(pages_of(self.prefixes[holder_id], tokens)))
        return pages

    def drain_locks(self) -> None:
        for change in self.ranks.take_lock_changes():
            key = (change.level, change.holder_id)
            if change.tokens:
                self.locks[key] = change.tokens
            else:
                assert key in self.locks, f"unlock of what was never locked: {change}"
                del self.locks[key]

    def look_up(self, advisory_id: str) -> None:
        device, host = self.matched(self.prefixes[advisory_id])
        self.ranks.observed(advisory_id, device, host, self.now)
        self.drain_locks()

    def advise(self, session: int, length: int, **changes: Any) -> str:
        advisory_id = self.new_id()
        self.prefixes[advisory_id] = prompt(session, length)
        request = AdviseRequest(advisory_id, f"session:{session}", f"s{session}", **changes)
        self.ranks.advise(request, self.prefixes[advisory_id], self.now)
        self.drain_locks()
        return advisory_id

    def step(self, demand: Demand | None = None, gate: GateSnapshot | None = None) -> Plan:
        inputs = StepInputs(
            now_seconds=self.now,
            device_room_tokens=100,
            host_room_tokens=100,
            demand=demand or Demand(),
            gate=gate or GateSnapshot(),
        )
        plan = self.ranks.step(inputs)
        self.drain_locks()
        for move in (*plan.stages, *plan.loads):
            assert (move.advisory_id, move.hop) not in self.flight
            self.flight[move.advisory_id, move.hop] = move
        for advisory_id in plan.probes:
            self.look_up(advisory_id)
        return plan

    def end_move(self, move: Move, result: MoveResult = MoveResult.DONE) -> None:
        below = Level.NVME if move.hop is Hop.NVME_TO_HOST else Level.HOST
        above = Level.HOST if move.hop is Hop.NVME_TO_HOST else Level.DEVICE
        del self.flight[move.advisory_id, move.hop]
        tokens = 0
        if result is MoveResult.DONE:
            prefix = self.prefixes[move.advisory_id]
            for page in pages_of(prefix, move.stop_tokens)[move.start_tokens // PAGE :]:
                if page not in self.levels[below]:
                    result = MoveResult.SHORT if below is Level.NVME else MoveResult.DECLINED
                    break
                self.levels[above][page] = None
                tokens += PAGE
        self.ranks.finished(move.advisory_id, move.hop, result, tokens, tokens * 100, self.now)
        self.drain_locks()
        if self.ranks.book.is_live(move.advisory_id):
            self.look_up(move.advisory_id)

    def end_all_moves(self) -> None:
        for move in tuple(self.flight.values()):
            self.end_move(move)

    def store(self, session: int, length: int) -> None:
        self.levels[Level.NVME].update(dict.fromkeys(pages_of(prompt(session, length))))

    def check(self) -> None:
        for promoter in self.ranks.all:
            promoter.check()
        for level, cap in ((Level.DEVICE, DEVICE_CAP), (Level.HOST, HOST_CAP)):
            assert len(self.locked(level)) * PAGE <= cap, "locks exceed the protected budget"
            ledger = self.ranks.all[0].device if level is Level.DEVICE else self.ranks.all[0].host
            assert len(self.locked(level)) * PAGE == ledger.resident_tokens
        assert set(self.ranks.book.moves()) == set(self.flight.values())
