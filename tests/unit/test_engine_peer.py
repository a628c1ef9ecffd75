"""The peer level of workers in one process: real stores, page servers and threads, no SGLang."""

from __future__ import annotations

import dataclasses
import errno
import os

import pytest

from store_pages import NAMESPACE, PAGE_BYTES, Pool, assert_served, open_store
from symphony_sglang.core.migration import Order, OrderKind
from symphony_sglang.core.page_hash import page_hashes
from symphony_sglang.core.prefix import NO_NAMESPACE, Namespace, Prefix, pack_tokens
from symphony_sglang.core.sessions import SessionKey, SessionTable
from symphony_sglang.engine.messages import PeerRequest
from symphony_sglang.engine.peer import PULLS_WAITING_MAX, PeerLevel
from symphony_sglang.engine.session_keeper import SessionKeeper
from symphony_sglang.testing.disk import FaultyDisk, Operation
from symphony_sglang.wire.page_server import ServerSettings
from symphony_sglang.wire.secure_channel import TransferKey
from wire_world import CLOCK, SECRET, eventually

TOKENS = 30 * 16
SALT = Namespace(None, "salted")


class Driver:
    """What the peer level asks of ``AdvisoryDriver``."""

    def __init__(self) -> None:
        self.sessions = SessionTable()
        self.keeper = SessionKeeper(self.sessions)
        self.now_seconds = CLOCK.monotonic()
        self.actions = []

    def tick(self, now_seconds: float) -> None:
        self.now_seconds = max(self.now_seconds, now_seconds)

    def receive(self, batch) -> list:
        self.actions.extend(batch.actions)
        return [{} for _ in batch.actions]


class Worker:
    """Ranks 0 to n-1 of one worker, told the same in the same order, as the scheduler does."""

    def __init__(
        self, folder, ranks: int = 1, secret: str | None = None, port: int = 0, **options
    ) -> None:
        self.stores, self.drivers, self.peers = [], [], []
        for rank in range(ranks):
            namespace = dataclasses.replace(NAMESPACE, tp_rank=rank, tp_size=ranks)
            store, driver = open_store(folder / str(rank), namespace=namespace, **options), Driver()
            peer = PeerLevel(
                driver,
                store,
                settings=ServerSettings(port=port + rank if port else 0),
                key=TransferKey(secret) if secret else None,
                clock=CLOCK,
                rank=rank,
                ranks=ranks,
            )
            self.stores.append(store)
            self.drivers.append(driver)
            self.peers.append(peer)

    @property
    def address(self) -> str:
        return self.peers[0].describe()["address"]

    def ask(self, verb: str, **fields) -> dict:
        request = PeerRequest(verb=verb, sent_seconds=CLOCK.monotonic(), **fields)
        answers = [peer.handle(request) for peer in self.peers]
        return answers[0]

    def order(self, kind: OrderKind, step: int, **fields) -> dict:
        values = {"move_id": "m1", "session_id": "s1", "epoch": 1 << 16, **fields}
        source = values.pop("source", "")
        order = Order(kind=kind, worker_id="", step=step, **values)
        return self.ask("order", session_id=order.session_id, order=order, source=source)

    def settle(self) -> list:
        """Wait for the pulls under way and tell every rank how they ended."""
        every = []
        while self.peers[0].active:
            for message in self.peers[0].take_ended(CLOCK.monotonic()):
                every.append(message)
                for peer in self.peers:
                    peer.pull_ended(message)
            eventually(lambda: not self.peers[0].active or self.ended_one())
        return every

    def ended_one(self) -> bool:
        return any(task.ended.is_set() for task in self.peers[0]._tasks.values())

    def close(self) -> None:
        for peer, store in zip(self.peers, self.stores, strict=True):
            peer.close()
            store.close()


@pytest.fixture
def worker(tmp_path):
    """Makes workers by name, and ends them."""
    made = []

    def make(name: str, **options) -> Worker:
        made.append(Worker(tmp_path / name, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def tokens_of(count: int = TOKENS, first: int = 5) -> bytes:
    return pack_tokens(range(first, first + count))


def seat(worker: Worker, session_id: str = "s1", namespace=NO_NAMESPACE) -> list[bytes]:
    """A session after its turn, its pages on every rank's disk."""
    hashes = page_hashes(tokens_of(), 16, namespace)
    pool = Pool(len(hashes))
    for store, driver in zip(worker.stores, worker.drivers, strict=True):
        store.write(pool.fill(hashes))
        driver.sessions.learn(SessionKey(session_id, namespace), tokens_of(), driver.now_seconds)
    return hashes


def assert_has(worker: Worker, hashes: list[bytes]) -> None:
    for store in worker.stores:
        assert_served(store, Pool(len(hashes)), hashes)


@pytest.mark.parametrize("secret", [None, SECRET])
def test_session_is_pulled_with_its_record_and_advised(worker, secret) -> None:
    a, b = worker("a", secret=secret), worker("b", secret=secret)
    hashes = seat(a)
    noted = []
    b.peers[0].on_pulled = lambda *facts: noted.append(facts)
    receipt = b.ask("pull", pull_id="p", advisory_id="adv-1", session_id="s1", source=a.address)
    assert (receipt["status"], receipt["state"]) == ("accepted", "queued")
    (end,) = b.settle()
    assert (end.stored, end.complete, end.tokens) == (True, True, TOKENS)
    ((outcome, size, seconds),) = noted
    assert (outcome, size) == ("complete", len(hashes) * PAGE_BYTES)
    assert seconds > 0
    assert_has(b, hashes)
    receipt = b.ask("state", pull_id="p")
    assert receipt["state"] == "stored"
    assert receipt["bytes"] == {"peer_to_nvme": len(hashes) * PAGE_BYTES}
    assert [state for state, _ in receipt["timeline"]] == ["queued", "copying", "stored"]
    assert b.drivers[0].sessions.get(SessionKey("s1")).token_bytes == tokens_of()
    (action,) = b.drivers[0].actions
    assert (action.verb, action.session_id, action.advisory_id) == ("prefetch", "s1", "adv-1")


def test_session_of_a_salt_is_another_session(worker) -> None:
    a, b = worker("a"), worker("b")
    hashes = seat(a, namespace=SALT)
    b.ask("pull", pull_id="p", session_id="s1", source=a.address, target="nvme")
    b.ask(
        "pull", pull_id="q", session_id="s1", cache_salt="salted", source=a.address, target="nvme"
    )
    b.settle()
    assert b.ask("state", pull_id="p")["reason"] == "unknown_session"
    assert b.ask("state", pull_id="q")["state"] == "stored"
    assert_has(b, hashes)


def test_prompt_is_pulled_without_a_session(worker) -> None:
    a, b = worker("a"), worker("b")
    hashes = seat(a)
    b.ask("pull", pull_id="p", token_bytes=tokens_of(), source=a.address, advisory_id="adv")
    b.settle()
    assert_has(b, hashes)
    assert b.drivers[0].actions[0].token_bytes == tokens_of()
    assert len(b.drivers[0].sessions) == 0


def free_base(ranks: int) -> int:
    from symphony_sglang.engine.peer_ports import reserve_peer_ports

    return reserve_peer_ports("127.0.0.1", ranks, base=0, http_port=os.getpid())


def test_each_rank_pulls_from_its_twin_and_all_learn_the_end_together(worker) -> None:
    a = worker("a", ranks=2, port=free_base(2))
    b = worker("b", ranks=2, port=free_base(2))
    hashes = seat(a)
    b.ask("pull", pull_id="p", session_id="s1", source=a.address, advisory_id="adv")
    (end,) = b.settle()
    assert end.complete
    assert end.bytes_copied == 2 * len(hashes) * PAGE_BYTES
    assert_has(b, hashes)
    assert [len(driver.actions) for driver in b.drivers] == [1, 1]
    assert b.drivers[0].sessions.find("s1") == b.drivers[1].sessions.find("s1")
    assert not b.peers[1].active


def test_pull_is_as_long_as_the_shortest_rank(worker) -> None:
    a = worker("a", ranks=2, port=free_base(2))
    b = worker("b", ranks=2, port=free_base(2))
    hashes = seat(a)
    a.stores[1].remove(hashes[20:])
    b.ask("pull", pull_id="p", session_id="s1", source=a.address, deadline_seconds=2.0)
    (end,) = b.settle()
    assert (end.stored, end.complete, end.tokens) == (True, False, 320)
    assert "rank 1: short" in end.reason


def test_worker_of_another_size_is_refused(worker) -> None:
    a = worker("a", ranks=2, port=free_base(2))
    b = worker("b")
    seat(a)
    b.ask("pull", pull_id="p", session_id="s1", source=a.address)
    b.settle()
    receipt = b.ask("state", pull_id="p")
    assert receipt["status"] == "rejected"
    assert "tp_size: 1 here, 2 there" in receipt["reason"]


def test_pull_may_be_cancelled_and_is_bounded(worker) -> None:
    a, b = worker("a"), worker("b")
    seat(a)
    # Pages that do not come: the source is asked to wait for them.
    a.stores[0].remove(page_hashes(tokens_of(), 16))
    for at in range(PULLS_WAITING_MAX):
        b.ask("pull", pull_id=f"p{at}", session_id="s1", source=a.address)
    refused = b.ask("pull", pull_id="one more", session_id="s1", source=a.address)
    assert (refused["status"], refused["reason"]) == ("rejected", "too_many_pulls")
    for at in range(PULLS_WAITING_MAX):
        b.ask("cancel", pull_id=f"p{at}")
    eventually(
        lambda: all(
            b.ask("state", pull_id=f"p{at}")["state"] == "cancelled"
            for at in range(PULLS_WAITING_MAX)
        ),
        20,
    )
    assert b.ask("state", pull_id="unknown") == {}


def copy_until_done(b: Worker, source: str, step: int) -> dict:
    reply = b.order(OrderKind.COPY, step, source=source)
    assert reply["pending"]
    b.settle()
    return b.order(OrderKind.COPY, step, source=source)


def test_move_hands_over_record_pages_and_epoch(worker) -> None:
    a, b = worker("a"), worker("b")
    hashes = seat(a)
    assert b.order(OrderKind.RESERVE, 1, bytes=1000)["ok"]
    reply = copy_until_done(b, a.address, 2)
    assert (reply["ok"], reply["bytes_copied"]) == (True, len(hashes) * PAGE_BYTES)
    assert b.order(OrderKind.VERIFY, 3)["ok"]
    assert b.drivers[0].sessions.find("s1") == ()
    assert b.order(OrderKind.SWITCH, 4)["ok"]
    assert b.drivers[0].sessions.get(SessionKey("s1")).owner_epoch == 1 << 16
    assert b.order(OrderKind.SWITCH, 4)["ok"]
    assert a.order(OrderKind.RELEASE, 5)["ok"]
    assert a.drivers[0].sessions.find("s1") == ()
    assert b.drivers[0].actions[-1].verb == "prefetch"
    b.peers[0].moves.check()
    assert len(b.peers[0].moves) == 0


def test_release_of_an_older_epoch_changes_nothing(worker) -> None:
    a = worker("a")
    seat(a)
    a.drivers[0].sessions.own(SessionKey("s1"), 5 << 16)
    assert a.order(OrderKind.RELEASE, 5, epoch=4 << 16)["ok"]
    assert a.drivers[0].sessions.find("s1")
    assert a.order(OrderKind.RECLAIM, 6, epoch=6 << 16)["ok"]
    assert not a.order(OrderKind.RECLAIM, 6, epoch=4 << 16)["ok"]


def test_page_that_went_missing_fails_the_verification(worker) -> None:
    a, b = worker("a"), worker("b")
    hashes = seat(a)
    b.order(OrderKind.RESERVE, 1)
    assert copy_until_done(b, a.address, 2)["ok"]
    b.stores[0].remove(hashes[7:8])
    assert b.order(OrderKind.VERIFY, 3)["reason"] == "pages_missing"
    assert copy_until_done(b, a.address, 4)["bytes_copied"] == PAGE_BYTES
    assert b.order(OrderKind.VERIFY, 5)["ok"]


def test_aborted_move_leaves_nothing_and_cannot_switch(worker) -> None:
    a, b = worker("a"), worker("b")
    seat(a)
    b.order(OrderKind.RESERVE, 1)
    assert copy_until_done(b, a.address, 2)["ok"]
    assert b.order(OrderKind.ABORT, 3)["ok"]
    assert b.order(OrderKind.SWITCH, 4)["reason"] == "no_reservation"
    assert b.order(OrderKind.RESERVE, 1)["reason"] == "move_ended"
    assert b.drivers[0].sessions.find("s1") == ()
    assert a.drivers[0].sessions.find("s1")


def test_full_disk_at_the_target_fails_the_copy_and_the_session_stays(worker) -> None:
    disk = FaultyDisk()
    a, b = worker("a"), worker("b", disk=disk)
    hashes = seat(a)
    disk.fail(Operation.WRITE, errno.ENOSPC)
    assert b.order(OrderKind.RESERVE, 1)["ok"]
    reply = copy_until_done(b, a.address, 2)
    assert not reply["ok"]
    assert reply["reason"].startswith("no_room")
    assert b.order(OrderKind.ABORT, 3)["ok"]
    assert (len(b.peers[0].moves), b.drivers[0].sessions.find("s1")) == (0, ())
    assert a.drivers[0].sessions.find("s1")
    assert_has(a, hashes)


def test_move_whose_router_is_silent_ends_with_its_lease(worker) -> None:
    a, b = worker("a"), worker("b")
    seat(a)
    b.order(OrderKind.RESERVE, 1)
    assert copy_until_done(b, a.address, 2)["ok"]
    (peer,), (driver,) = b.peers, b.drivers
    lease = peer.moves.limits.lease_seconds
    assert lease <= 15
    driver.tick(CLOCK.monotonic() + 0.5 * lease)
    peer.expire()
    assert not peer.lease_ended(driver.now_seconds)
    assert len(peer.moves) == 1
    later = CLOCK.monotonic() + 1.1 * lease
    assert peer.lease_ended(later)
    driver.tick(later)
    peer.expire()
    assert len(peer.moves) == len(peer._copies) == 0
    assert b.order(OrderKind.SWITCH, 4)["reason"] == "no_reservation"


def test_copy_of_a_move_whose_router_is_silent_is_cancelled(worker) -> None:
    a, b = worker("a"), worker("b")
    hashes = seat(a)
    a.stores[0].remove(hashes)  # the copy waits for them
    b.order(OrderKind.RESERVE, 1)
    assert b.order(OrderKind.COPY, 2, source=a.address)["pending"]
    (peer,), (driver,) = b.peers, b.drivers
    driver.tick(CLOCK.monotonic() + 1.1 * peer.moves.limits.lease_seconds)
    peer.expire()
    b.settle()
    assert b.ask("state", pull_id="m1-2")["state"] == "cancelled"
    assert len(peer.moves) == 0


def test_copy_from_a_source_that_is_gone_fails(worker) -> None:
    b = worker("b")
    b.order(OrderKind.RESERVE, 1)
    reply = copy_until_done(b, "127.0.0.1:1", 2)
    assert not reply["ok"]
    assert "no connection" in reply["reason"]


def test_record_names_that_are_none_are_unknown(worker) -> None:
    a = worker("a")
    seat(a)
    for name in ("", "[]", "{", '["s1"]', "[1, 2, 3]", '[["x"], null, null]', "null"):
        assert a.peers[0]._record("session", name) is None
    assert a.peers[0]._record("other", "s1") is None
    assert a.peers[0]._record("session", '["s1", null, null]') is not None


def test_prefix_of_nothing_is_refused(worker) -> None:
    a, b = worker("a"), worker("b")
    b.ask("pull", pull_id="p", token_bytes=tokens_of(3), source=a.address)
    b.settle()
    assert b.ask("state", pull_id="p")["reason"] == "shorter_than_a_page"
    assert Prefix(SALT, tokens_of(3)).tokens == 3


def test_end_of_a_pull_wakes_a_sleeping_scheduler_once(worker) -> None:
    import select

    a, b = worker("a"), worker("b")
    seat(a)
    peer = b.peers[0]
    peer.wakeup = os.eventfd(0, os.EFD_NONBLOCK)
    b.ask("pull", pull_id="p", session_id="s1", source=a.address)
    assert select.select([peer.wakeup], [], [], 10)[0]
    eventually(lambda: peer._woken)
    assert len(peer.take_ended(CLOCK.monotonic())) == 1
    assert not peer.active
    assert not select.select([peer.wakeup], [], [], 0)[0]
    os.close(peer.wakeup)
    peer.wakeup = None
