"""Reservations end with their router, and last as long as it lives."""

from __future__ import annotations

import pytest
from test_core_migration import QUIET_SECONDS, check_quiet, quiet_world, state_reached

from migration_world import WORKER_LIMITS
from symphony_sglang.core.migration import Move, MoveState, Order, OrderKind
from symphony_sglang.core.migration_worker import WorkerMoves


@pytest.mark.parametrize("state", ["reserving", "copying", "verifying", "held"])
def test_reservation_ends_a_lease_after_its_router(state) -> None:
    world = quiet_world()
    if state == "held":
        world.router.request("s0")
        world.run(world.now + 0.02)
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    assert state_reached(world, move, MoveState(state))
    moves = world.workers["w1"].moves
    assert moves is not None
    while len(moves) == 0:
        world.run(world.now + 0.001)
    world.router.crash()
    world.run(world.now + WORKER_LIMITS.lease_seconds + 0.1)
    assert moves.lease_ended(world.now)
    assert moves.expire(world.now) == [move.move_id]
    assert len(moves) == 0
    world.router.restart()
    world.run(world.now + QUIET_SECONDS)
    check_quiet(world)


def test_held_move_keeps_its_reservation_however_long_the_turn() -> None:
    world = quiet_world()
    world.turn_seconds = 4 * WORKER_LIMITS.lease_seconds
    world.router.request("s0")
    world.run(world.now + 0.02)
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    assert state_reached(world, move, MoveState.HELD)
    moves = world.workers["w1"].moves
    assert moves is not None
    for _ in range(12):
        world.run(world.now + 0.25 * WORKER_LIMITS.lease_seconds)
        assert not moves.lease_ended(world.now)
    world.run(world.now + 2 * WORKER_LIMITS.lease_seconds)
    assert move.state is MoveState.DONE, move.as_json()
    assert [state for state, _ in move.timeline].count(MoveState.HELD) == 1
    check_quiet(world)


def test_order_that_comes_late_renews_its_own_reservation_only() -> None:
    moves = WorkerMoves("w", WORKER_LIMITS)
    orders = [
        Order(OrderKind.RESERVE, "w", f"m{at}", f"s{at}", 1 << 16, 1, bytes=10) for at in range(2)
    ]
    assert all(moves.reserve(order, 0.0).ok for order in orders)
    assert moves.reserve(orders[0], 60.0).ok
    assert moves.get("m0") is not None
    assert moves.get("m1") is None
    assert moves.reserve(orders[1], 60.0).reason == "move_ended"
    moves.check()
