"""Moves under faults: one owner at every instant, nothing leaked, every request served."""

from __future__ import annotations

import collections

import pytest

from migration_world import World
from symphony_sglang.core.migration import (
    ENDED,
    ORDERS,
    TRANSITIONS,
    Move,
    MoveCause,
    MoveEvent,
    MoveState,
    OrderKind,
    next_epoch,
)
from symphony_sglang.core.migration_book import BookLimits, Early, MoveBook, Refusal
from symphony_sglang.core.migration_log import (
    Claim,
    OneOwnerError,
    OwnershipEntry,
    OwnershipEvent,
    OwnershipLog,
)

SESSIONS = ("s0", "s1", "s2")
FAULT_SECONDS = 12.0
QUIET_SECONDS = 120.0


def start_sessions(world: World) -> None:
    for at, session_id in enumerate(SESSIONS):
        world.workers[f"w{at}"].serve(session_id, lambda ok: None)
    world.run(world.now + 1.5)


def misfortune(world: World) -> None:
    """One random thing that can happen."""
    chance, worker = world.random, world.random.choice(list(world.workers.values()))
    pick = chance.random()
    if pick < 0.35:
        world.router.move(chance.choice(SESSIONS), worker.name)
    elif pick < 0.65:
        world.router.request(chance.choice(SESSIONS))
    elif pick < 0.72:
        worker.crash()
    elif pick < 0.82:
        worker.restart()
    elif pick < 0.86:
        world.router.crash()
    elif pick < 0.92:
        world.router.restart()
    elif pick < 0.96:
        world.cut ^= {worker.name}
    elif pick < 0.98:
        worker.corrupts = chance.choice((0.0, 0.5, 1.0))
    elif world.router.book is not None and world.router.book.moves():
        move = chance.choice(world.router.book.moves())
        world.router._send(world.router.book.cancel(move.move_id, world.now))


def check_quiet(world: World) -> None:
    """After the last fault and some time: all is in order again."""
    world.check()
    book = world.router.book
    assert book is not None
    assert book.stats()["live"] == 0, [move.as_json() for move in book.moves()]
    assert len(world.served) == world.asked
    for worker in world.workers.values():
        assert worker.moves is not None
        worker.moves.expire(world.now)
        assert len(worker.moves) == 0, f"{worker.name} keeps a reservation"
    for session_id in SESSIONS:
        truth, known = world.log.owner(session_id), book.owner(session_id)
        assert truth is not None
        assert known is not None
        assert (known.worker_id, known.epoch) == (truth.worker_id, truth.epoch), session_id
        moved = [claim for claim in world.log.claims(session_id).values() if claim.epoch > 0]
        if truth.epoch > 0:
            assert truth.owns, f"{session_id}: everybody released it"
            assert sum(claim.owns for claim in moved) == 1
        record = world.workers[truth.worker_id].records[session_id]
        assert world.workers[truth.worker_id].pages[session_id] <= record.tokens


def run_world(seed: int) -> World:
    world = World(seed)
    start_sessions(world)
    while world.now < FAULT_SECONDS:
        world.run(world.now + world.random.expovariate(4.0))
        misfortune(world)
        world.check()
    world.heal()
    world.run(world.now + QUIET_SECONDS)
    check_quiet(world)
    world.router._count_ended()
    return world


def test_a_thousand_random_moves_with_faults() -> None:
    outcomes: collections.Counter[str] = collections.Counter()
    seed = 0
    while sum(outcomes.values()) < 1000:
        try:
            world = run_world(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        outcomes.update(world.outcomes)
        seed += 1
    # The faults are neither too few nor too many to show anything.
    assert outcomes["done:"] >= 200, outcomes
    assert sum(count for name, count in outcomes.items() if "aborted" in name) >= 200, outcomes
    # Every way out was taken: losses on both sides, refusals, silence, the end of patience.
    for word in ("target_lost", "unanswered", "cancel", "source_lost"):
        assert any(word in name for name in outcomes), (word, outcomes)


def test_same_seed_gives_the_same_run() -> None:
    first, second = run_world(7), run_world(7)
    assert first.served == second.served
    assert first.outcomes == second.outcomes
    assert first.log.entries == second.log.entries


def quiet_world() -> World:
    world = World(1, loss=0.0, duplicates=0.0, delay_max=0.01)
    start_sessions(world)
    return world


def owner_name(world: World, session_id: str) -> str:
    owner = world.log.owner(session_id)
    assert owner is not None
    return owner.worker_id


def test_move_switches_owner_once_and_releases_the_source() -> None:
    world = quiet_world()
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    world.run(world.now + 2)
    assert [state.value for state, _ in move.timeline] == [
        "queued", "reserving", "copying", "verifying", "switching", "releasing", "done",
    ]  # fmt: skip
    assert owner_name(world, "s0") == "w1"
    assert not world.workers["w0"].records["s0"].owns
    assert world.workers["w1"].pages["s0"] == world.workers["w0"].pages["s0"]
    check_quiet(world)


def test_ping_pong_raises_the_epoch_each_time() -> None:
    world = quiet_world()
    epochs = []
    for turn in range(6):
        move = world.router.move("s0", "w1" if turn % 2 == 0 else "w0")
        assert isinstance(move, Move)
        world.run(world.now + 2)
        assert move.state is MoveState.DONE
        epochs.append(move.epoch)
        world.router.request("s0")
        world.run(world.now + 1)
    assert epochs == sorted(set(epochs))
    assert owner_name(world, "s0") == "w0"
    check_quiet(world)


def test_session_rests_between_moves_that_nobody_asked_for() -> None:
    world = quiet_world()
    world.router.move("s0", "w1")
    world.run(world.now + 0.4)
    book = world.router.book
    assert book is not None
    assert world.router.move("s0", "w0", MoveCause.BALANCE) is Refusal.RESTING
    assert isinstance(world.router.move("s0", "w0", MoveCause.DRAIN), Move)


def test_second_move_of_a_moving_session_is_refused() -> None:
    world = quiet_world()
    assert isinstance(world.router.move("s0", "w1"), Move)
    assert world.router.move("s0", "w2") is Refusal.MOVING
    assert world.router.move("s0", "w0") is Refusal.SAME_WORKER
    assert world.router.move("nobody's", "w0") is Refusal.UNKNOWN_OWNER


def test_move_while_the_session_decodes_takes_the_new_turn_along() -> None:
    world = quiet_world()
    world.router.request("s0")
    world.run(world.now + 0.05)
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    world.run(world.now + 3)
    states = [state for state, _ in move.timeline]
    assert MoveState.HELD in states
    assert move.copy_rounds == 2
    assert move.state is MoveState.DONE
    assert world.workers["w1"].records["s0"].turns == 2
    assert world.workers["w1"].pages["s0"] == world.workers["w0"].pages["s0"]


def test_request_during_the_copy_is_served_at_the_source_and_follows() -> None:
    world = quiet_world()
    world.workers["w0"].records["s0"].tokens = world.workers["w0"].pages["s0"] = 8000
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    world.run(world.now + 0.3)
    assert move.state is MoveState.COPYING
    world.router.request("s0")
    world.run(world.now + 5)
    assert world.served[-1] == ("s0", "w0", "source")
    assert move.early_requests == 1
    assert move.state is MoveState.DONE
    assert world.workers["w1"].pages["s0"] == 8000 + 64
    check_quiet(world)


def test_session_that_never_rests_is_not_moved_for_ever() -> None:
    world = quiet_world()
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    for _ in range(400):
        world.router.request("s0")
        world.run(world.now + 0.05)
    world.run(world.now + 5)
    assert move.state is MoveState.ABORTED
    assert owner_name(world, "s0") == "w0"
    check_quiet(world)


def test_target_that_refuses_leaves_all_as_it_was() -> None:
    world = quiet_world()
    world.workers["w1"].refuses = True
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    world.run(world.now + 2)
    assert (move.state, move.reason) == (MoveState.ABORTED, "refused")
    assert owner_name(world, "s0") == "w0"
    check_quiet(world)


def state_reached(world: World, move: Move, state: MoveState) -> bool:
    for _ in range(4000):
        if move.state is state:
            return True
        if move.ended:
            return False
        world.run(world.now + 0.0005)
    return False


@pytest.mark.parametrize("victim", ["source", "target", "router", "network to target"])
@pytest.mark.parametrize(
    "state", ["reserving", "copying", "verifying", "switching", "releasing", "held"]
)
def test_crash_in_every_state_leaves_one_owner(victim, state) -> None:
    world = quiet_world()
    if state == "held":
        world.router.request("s0")
        world.run(world.now + 0.02)
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    assert state_reached(world, move, MoveState(state))
    world.run(world.now + 0.003)
    match victim:
        case "source":
            world.workers["w0"].crash()
        case "target":
            world.workers["w1"].crash()
        case "router":
            world.router.crash()
            world.after(1.0, world.router.restart)
        case _:
            world.cut.add("w1")
    world.router.request("s0")
    world.run(world.now + 60)
    assert len(world.served) == world.asked
    owner = world.log.owner("s0")
    assert owner is not None
    assert world.workers[owner.worker_id].up
    world.heal()
    world.run(world.now + QUIET_SECONDS)
    check_quiet(world)


def test_lost_target_is_fenced_by_a_higher_epoch() -> None:
    world = quiet_world()
    move = world.router.move("s0", "w1")
    assert isinstance(move, Move)
    assert state_reached(world, move, MoveState.RELEASING)
    taken = world.workers["w1"].records["s0"].epoch
    world.workers["w1"].crash()
    source = world.workers["w0"]
    carry_out = source.order
    # Every release is lost on its way.
    source.order = lambda order, life: (
        None if order.kind is OrderKind.RELEASE else carry_out(order, life)
    )
    world.run(world.now + 20)
    source.order = carry_out
    assert (move.state, move.reason) == (MoveState.ABORTED, "target_lost")
    assert owner_name(world, "s0") == "w0"
    assert world.workers["w0"].records["s0"].epoch > taken
    world.workers["w1"].restart()
    world.run(world.now + 10)
    assert not world.workers["w1"].records["s0"].owns
    check_quiet(world)


# The book ---------------------------------------------------------------------------------------


def book_with(owners: dict[str, str], **limits) -> MoveBook:
    book = MoveBook(3, BookLimits(**limits))
    for session_id, worker_id in owners.items():
        book.claimed(session_id, Claim(True, 0, 1, worker_id))
    return book


def test_budgets_hold_moves_back_and_drains_go_first() -> None:
    owners = {f"s{at}": "a" for at in range(6)}
    book = book_with(owners, link_bytes_max=250, worker_moves_max=4, under_way_max=3)
    for at in range(5):
        book.request(f"s{at}", "b", MoveCause.BALANCE, 0.0, size_bytes=100)
    drained = book.request("s5", "c", MoveCause.DRAIN, 0.1, size_bytes=100)
    assert isinstance(drained, Move)
    orders = book.tick(0.2)
    assert [order.session_id for order in orders] == ["s5", "s0", "s1"]
    assert book.tick(0.25) == []
    book.check()


def test_busy_worker_is_spared_by_all_but_drains() -> None:
    book = book_with({"s0": "a", "s1": "a"})
    book.request("s0", "b", MoveCause.ADVISORY, 0.0)
    book.request("s1", "b", MoveCause.DRAIN, 0.0)
    assert [order.session_id for order in book.tick(0.1, busy=["a"])] == ["s1"]
    assert [order.session_id for order in book.tick(0.2)] == ["s0"]


def test_book_is_bounded() -> None:
    book = book_with({f"s{at}": "a" for at in range(9)}, moves_max=4, history_max=3)
    for at in range(6):
        answer = book.request(f"s{at}", "b", MoveCause.BALANCE, 0.0)
        assert (answer is Refusal.BOOK_FULL) == (at >= 4)
    for move in list(book.moves()):
        book.cancel(move.move_id, 1.0)
    assert len(book.moves()) == 3
    book.check()


def test_early_request_waits_for_the_shorter_of_copy_and_recompute() -> None:
    book = book_with({"s0": "a"})
    assert book.early(
        "s0", source_usable=False, copy_seconds_left=1, recompute_seconds=2
    ) is None  # fmt: skip
    book.request("s0", "b", MoveCause.REQUEST, 0.0)
    book.tick(0.0)

    def ask(usable: bool, left: float) -> tuple[Early, str, float]:
        choice = book.early(
            "s0", source_usable=usable, copy_seconds_left=left, recompute_seconds=2.0
        )
        assert choice is not None
        return tuple(choice)

    assert ask(True, 1.0) == (Early.SOURCE, "a", 0.0)
    assert ask(False, 1.0) == (Early.TARGET_WAIT, "b", 1.0)
    assert ask(False, 3.0) == (Early.TARGET_RECOMPUTE, "b", 0.0)


def test_worker_that_comes_back_with_an_old_epoch_is_told() -> None:
    book = book_with({})
    book.claimed("s0", Claim(True, 5 << 16, 3, "b"))
    orders = book.claimed("s0", Claim(True, 4 << 16, 3, "a"))
    assert [(order.kind.value, order.worker_id, order.epoch) for order in orders] == [
        ("release", "a", 5 << 16)
    ]
    # Until it gives way, at whatever is heard: the order may have been lost.
    assert book.claimed("s0", Claim(True, 5 << 16, 3, "b")) == orders
    book.forgotten("s0", "a")
    assert book.claimed("s0", Claim(True, 5 << 16, 3, "b")) == []


def test_session_is_adopted_by_the_worker_that_served_it() -> None:
    book = book_with({})
    book.claimed("s0", Claim(True, 5 << 16, 3, "a"))
    assert book.adopt("s0", "a", 0.0) is None
    assert book.adopt("unknown", "b", 0.0) is None
    book.claimed("s0", Claim(True, 0, 1, "b"))
    order = book.adopt("s0", "b", 0.0)
    assert order is not None
    assert (order.kind, order.worker_id, order.epoch > 5 << 16) == (OrderKind.RECLAIM, "b", True)
    [release] = book.adopted(order)
    assert (release.kind, release.worker_id, release.epoch) == (
        OrderKind.RELEASE, "a", order.epoch,
    )  # fmt: skip
    owner = book.owner("s0")
    assert owner is not None
    assert (owner.worker_id, owner.epoch) == ("b", order.epoch)


def test_every_state_but_the_ends_has_a_way_out() -> None:
    for state, ways in TRANSITIONS.items():
        assert (not ways) == (state in ENDED), state
        if state in ENDED:
            continue
        assert MoveEvent.DEADLINE in ways, f"{state} could last for ever"
        if state in ORDERS:
            assert {MoveEvent.OK, MoveEvent.FAILED, MoveEvent.UNANSWERED} <= set(ways)


def test_epochs_of_two_routers_never_meet() -> None:
    ours, theirs = {0}, {0}
    for _ in range(20):
        ours.add(next_epoch(max(ours), 1))
        theirs.add(next_epoch(max(theirs), 2))
    assert ours & theirs == {0}
    assert next_epoch(max(ours), 2) > max(ours)


def test_epoch_of_an_aborted_move_is_never_used_again() -> None:
    """Its target may have taken the switch without the router ever learning of it."""
    book = book_with({"s0": "a"})
    epochs = set()
    for target in ("b", "c", "b"):
        move = book.request("s0", target, MoveCause.REQUEST, 0.0)
        assert isinstance(move, Move)
        epochs |= {move.epoch, next_epoch(move.epoch, 3)}
        book.cancel(move.move_id, 0.0)
    assert len(epochs) == 6


@pytest.mark.parametrize("seed", [1339, 1597])
def test_worlds_that_once_had_two_owners(seed) -> None:
    run_world(seed)


def test_log_finds_two_owners_of_one_epoch() -> None:
    log = OwnershipLog()
    log.add(OwnershipEntry(0.0, OwnershipEvent.OWNS, "s", "a", 1 << 16))
    with pytest.raises(OneOwnerError, match="both own it"):
        log.add(OwnershipEntry(1.0, OwnershipEvent.OWNS, "s", "b", 1 << 16))


def test_log_finds_a_release_to_nobody() -> None:
    log = OwnershipLog()
    log.add(OwnershipEntry(0.0, OwnershipEvent.OWNS, "s", "a", 0))
    with pytest.raises(OneOwnerError, match="which nobody took"):
        log.add(OwnershipEntry(1.0, OwnershipEvent.RELEASED, "s", "a", 1 << 16))
