"""The router's moves against fake workers that fail at every order."""

from __future__ import annotations

import asyncio
import json
import random

import pytest
from aiohttp import web

from moves_world import MovesWorld, MovingWorker, moves_world
from router_world import FakeWorker
from symphony_sglang.core.migration import OrderKind
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.router.moves_orders import session_parts
from symphony_sglang.router.peers import peer_address
from symphony_sglang.router.sessions import session_key
from symphony_sglang.wire.feed import SessionChange


def run(scenario):  # type: ignore[no-untyped-def]
    asyncio.run(asyncio.wait_for(scenario(), 30))


@pytest.mark.parametrize(
    ("session_id", "extra_key", "cache_salt"),
    [("s", None, None), ("s", "e", None), ("s", None, "c"), ("a:b", "", "-"), ("-", "\x00", "x")],
)
def test_session_name_can_be_taken_apart(session_id, extra_key, cache_salt) -> None:
    namespace = Namespace(extra_key, cache_salt)
    parts = session_parts(session_key(session_id, namespace))
    assert (parts.session_id, parts.namespace) == (session_id, namespace)


def test_odd_session_id_is_taken_as_it_is() -> None:
    for name in ("a\x00b", "3:abc\x00-", "\x00", "9:x\x00-\x00-"):
        assert session_parts(name).session_id == name


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        ({"address": "10.0.0.1:5", "port": 5}, "10.0.0.1:5"),
        ({"address": None, "host": None, "port": 5}, "worker:5"),
        ({"port": "5"}, ""),
        (None, ""),
        ([], ""),
    ],
)
def test_peer_address_falls_back_to_the_workers_host(described, expected) -> None:
    assert peer_address(described, "http://worker:30000") == expected


def test_session_moves_and_its_record_tells_how() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            source = await made.owned("w0", "s", turns=3)
            record = await made.migrate("s", "w1")
            states = [state for state, _ in record["timeline"]]
            assert states == [
                "queued", "reserving", "copying", "verifying", "switching", "releasing", "done",
            ]  # fmt: skip
            assert (record["from"], record["to"]) == (
                source.worker_id,
                made.by_name("w1").worker_id,
            )
            assert (record["cause"], record["session_id"]) == ("request", "s")
            assert (record["tokens"], record["bytes"]) == (160, 160 * 1024)
            await made.settle()
            assert made.owners("s") == ["w1"]
            assert "s" not in source.sessions
            assert made.by_name("w1").sessions["s"].turns == 3
            made.check_quiet()
            _status, session, _headers = await made.call("GET", "/symphony/residency")
            assert [move["move_id"] for move in session["moves"]] == [record["move_id"]]
            _status, text, _headers = await made.call("GET", "/metrics")
            assert 'symphony:moves_total{cause="request",outcome="done"} 1.0' in text
            assert "symphony:moves_active 0.0" in text
            assert 'symphony:move_bytes_total{cause="request"} 163840.0' in text
            _status, listed, _headers = await made.call("GET", "/symphony/moves")
            events = [entry["event"] for entry in listed["ownership"]]
            assert events[:2] == ["owns", "owns"]
            assert "released" in events

    run(scenario)


def test_session_of_a_namespace_moves_under_its_own_name() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            key = session_key("s", Namespace(None, "salt"))
            source = made.by_name("w0")
            source.sessions["s"] = made.by_name("w1").sessions.pop("s", None) or _session()
            made.mover.session_changed(source.worker_id, _change("s", cache_salt="salt"))
            body = {"session_id": "s", "to": made.by_name("w1").worker_id}
            assert (await made.call("POST", "/symphony/migrate", body))[0] == 404
            status, record, _headers = await made.call(
                "POST", "/symphony/migrate", {**body, "cache_salt": "salt"}
            )
            assert status == 202
            assert (record["session_id"], record["cache_salt"]) == ("s", "salt")
            assert (await made.ended(record["move_id"]))["state"] == "done"
            assert made.mover.place(key) == made.by_name("w1").worker_id

    run(scenario)


def _session():  # type: ignore[no-untyped-def]
    from moves_world import Session

    return Session()


def _change(session_id: str, **fields):  # type: ignore[no-untyped-def]
    return SessionChange(session_id, total_tokens=160, turns=1, **fields)


def test_there_and_back_many_times_with_one_owner_each_time() -> None:
    async def scenario() -> None:
        async with moves_world(3) as made:
            await made.owned("w0", "s")
            for name in ("w1", "w0", "w2", "w1", "w0", "w1", "w2", "w0"):
                assert (await made.migrate("s", name))["state"] == "done"
                await made.settle()
                assert made.owners("s") == [name]
                made.check_quiet()
            assert made.log.entries >= 16

    run(scenario)


def test_refused_moves_say_why() -> None:
    async def scenario() -> None:
        async with moves_world(3) as made:
            await made.owned("w0", "s")
            ids = {name: made.by_name(name).worker_id for name in ("w0", "w1", "w2")}
            for body, status, code in [
                ({"session_id": "s", "to": ids["w0"]}, 409, "source_is_target"),
                ({"session_id": "nobody's", "to": ids["w1"]}, 404, "unknown_session"),
                ({"session_id": "s", "to": "nowhere"}, 404, "worker_not_found"),
                ({"session_id": "s"}, 400, "invalid_request"),
                ({"session_id": 5, "to": ids["w1"]}, 400, "invalid_request"),
                ({"session_id": "s", "to": ids["w1"], "odd": "x"}, 400, "invalid_request"),
                ([], 400, "invalid_request"),
            ]:
                got, answer, _headers = await made.call("POST", "/symphony/migrate", body)
                assert (got, answer["error"]["code"]) == (status, code)
            made.by_name("w1").copy_seconds = 0.5
            body = {"session_id": "s", "to": ids["w1"]}
            assert (await made.call("POST", "/symphony/migrate", body))[0] == 202
            status, answer, _headers = await made.call("POST", "/symphony/migrate", body)
            assert (status, answer["error"]["code"]) == (409, "session_is_moving")
            assert (await made.call("GET", "/symphony/moves/nothing"))[0] == 404
            await made.settle()
            found = made.service.registry.find(ids["w2"])
            assert found is not None
            made.by_name("w2").peerless = True
            info = await made.service.health.describe(found)
            made.service.registry.learn(found, info)
            status, answer, _headers = await made.call(
                "POST", "/symphony/migrate", {"session_id": "s", "to": ids["w2"]}
            )
            assert (status, answer["error"]["code"]) == (409, "no_peer_level")
            assert "serves no pages" in answer["error"]["message"]

    run(scenario)


def test_router_without_migration_says_so() -> None:
    async def scenario() -> None:
        async with moves_world(disable_migration=True) as made:
            body = {"session_id": "s", "to": made.by_name("w1").worker_id}
            assert (await made.call("POST", "/symphony/migrate", body))[0] == 501
            assert (await made.call("POST", f"/workers/{body['to']}/drain"))[0] == 501
            assert (await made.generate({"text": "x", "session_id": "s"}))[0] == 200

    run(scenario)


TARGET_ORDERS = (OrderKind.RESERVE, OrderKind.COPY, OrderKind.VERIFY, OrderKind.SWITCH)


@pytest.mark.parametrize("fault", ["refuse", "silent", "lost", "die", "slow"])
@pytest.mark.parametrize("kind", TARGET_ORDERS)
def test_target_failing_at_any_order_leaves_one_owner(kind: OrderKind, fault: str) -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            await made.owned("w0", "s")
            target = made.by_name("w1")
            target.faults[kind] = fault
            record = await made.migrate("s", "w1")
            assert record["state"] == ("done" if fault == "slow" else "aborted"), record
            target.faults.clear()
            if fault == "die":
                await made.until(lambda: not target.alive)
                assert made.owners("s") == ["w0"]
                await target.come_back()
            # Whoever owned it by an overruled epoch has been told.
            await made.until(lambda: len(made.owners("s")) == 1)
            await made.settle()
            target.moves.expire(1e12)
            made.check_quiet()
            assert made.owners("s") == (["w1"] if fault == "slow" else ["w0"])
            assert (await made.migrate("s", "w1" if fault != "slow" else "w0"))["state"] == "done"
            await made.settle()
            made.check_quiet()

    run(scenario)


@pytest.mark.parametrize("kind", TARGET_ORDERS)
def test_source_dying_at_any_order_leaves_one_owner(kind: OrderKind) -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            source = await made.owned("w0", "s")
            target = made.by_name("w1")
            target.copy_seconds = 0.1
            target.faults[kind] = "slow"
            body = {"session_id": "s", "to": target.worker_id}
            _status, record, _headers = await made.call("POST", "/symphony/migrate", body)
            await made.until(lambda: kind in target.orders)
            await source.die()
            record = await made.ended(record["move_id"])
            target.moves.expire(1e12)
            if record["state"] == "done":
                assert made.owners("s") == ["w1"]
                # Its session is served, and the source gives way when it comes back.
            await source.come_back()
            await made.until(lambda: len([w for w in made.workers if "s" in w.sessions]) == 1)
            await made.settle()
            made.check_quiet()

    run(scenario)


@pytest.mark.parametrize("fault", ["refuse", "silent", "die"])
def test_source_that_cannot_release_does_not_own_it_any_more(fault: str) -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            source = await made.owned("w0", "s")
            source.faults[OrderKind.RELEASE] = fault
            assert (await made.migrate("s", "w1"))["state"] == "done"
            assert made.owners("s") == ["w1"]
            if fault == "die":
                await made.until(lambda: not source.alive)
                await source.come_back()
            source.faults.clear()
            made.snapshot(source)
            await made.until(lambda: "s" not in source.sessions)
            made.check_quiet()

    run(scenario)


def test_restarted_router_learns_the_owners_and_overrules_half_a_move() -> None:
    async def scenario() -> None:
        async with moves_world(seed=1) as made:
            source = await made.owned("w0", "s")
            target = made.by_name("w1")
            target.faults[OrderKind.SWITCH] = "lost"
            body = {"session_id": "s", "to": target.worker_id}
            await made.call("POST", "/symphony/migrate", body)
            await made.until(lambda: "s" in target.sessions)
            ids = {source.worker_id: source, target.worker_id: target}
            # A new life: nothing is known but what workers say.
            async with moves_world(0, seed=2) as second:
                for worker_id, worker in ids.items():
                    second.service.registry.add(worker.url, source="test")
                    assert worker.worker_id == worker_id
                await second.until(lambda: second.healthy() == 2)
                second.workers = made.workers
                for worker in ids.values():
                    worker.world = second
                target.faults.clear()
                made.mover.book._live.clear()
                made.mover.book._by_session.clear()
                made.mover._open.clear()
                for worker in ids.values():
                    second.snapshot(worker)
                await second.until(lambda: "s" not in source.sessions)
                assert second.mover.place("s") == target.worker_id
                assert (await second.migrate("s", "w0"))["state"] == "done"
                await second.settle()
                second.check_quiet()

    run(scenario)


def test_early_request_is_served_at_the_source_and_copied_again() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            source = await made.owned("w0", "s")
            target = made.by_name("w1")
            target.copy_seconds = 0.2
            body = {"session_id": "s", "to": target.worker_id}
            _status, record, _headers = await made.call("POST", "/symphony/migrate", body)
            await made.until(lambda: OrderKind.COPY in target.orders)
            for _ in range(3):
                assert (await made.generate({"text": "x", "session_id": "s"}))[1]["worker"] == "w0"
            source.sessions["s"].turns = 2
            record = await made.ended(record["move_id"])
            assert (record["state"], record["early_requests"]) == ("done", 3)
            assert record["copy_rounds"] == 2
            await made.settle()
            assert target.sessions["s"].turns == 2
            assert (await made.generate({"text": "x", "session_id": "s"}))[1]["worker"] == "w1"
            made.check_quiet()

    run(scenario)


def test_move_waits_for_the_turn_that_runs() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def hold(worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
            await gate.wait()
            return web.json_response({"worker": worker.name})

        async with moves_world() as made:
            source = await made.owned("w0", "s")
            source.behaviour = hold
            turn = asyncio.get_running_loop().create_task(
                made.generate({"text": "x", "session_id": "s"})
            )
            await made.until(lambda: source.running == 1)
            body = {"session_id": "s", "to": made.by_name("w1").worker_id}
            _status, record, _headers = await made.call("POST", "/symphony/migrate", body)
            move_id = record["move_id"]
            await made.until(lambda: made.mover.move(move_id)["state"] == "held")
            await asyncio.sleep(0.1)
            assert made.mover.move(move_id)["state"] == "held"
            gate.set()
            assert (await turn)[1]["worker"] == "w0"
            record = await made.ended(move_id)
            assert (record["state"], record["copy_rounds"]) == ("done", 2)
            await made.settle()
            made.check_quiet()

    run(scenario)


def test_request_waits_for_the_copy_where_the_source_is_gone_from_service() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            source = await made.owned("w0", "s", tokens=100_000)
            target = made.by_name("w1")
            target.copy_seconds = 0.3
            body = {"session_id": "s", "to": target.worker_id}
            await made.call("POST", "/symphony/migrate", body)
            await made.until(lambda: OrderKind.COPY in target.orders)
            found = made.service.registry.find(source.worker_id)
            assert found is not None
            made.mover.drains.begin(found, leaving=True)
            assert (await made.generate({"text": "x", "session_id": "s"}))[1]["worker"] == "w1"
            # It was sent after the switch, not beside the copy.
            assert "s" in target.sessions
            await made.settle()
            made.check_quiet()

    run(scenario)


def test_listeners_hear_of_each_state_of_a_move() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            await made.owned("w0", "s")
            url = f"{made.url}/symphony/events?interval_s=0.2"
            async with made.client.get(url) as stream:
                assert (await stream.content.readline()).startswith(b"event: residency")
                record = await made.migrate("s", "w1")
                lines: list[bytes] = []
                while b"event: move\n" not in lines:
                    lines.append(await stream.content.readline())
                told = json.loads((await stream.content.readline()).removeprefix(b"data: "))
            assert (told["move_id"], told["from"]) == (record["move_id"], record["from"])

    run(scenario)


def test_large_snapshot_is_taken_in_slices_and_changes_come_after_it() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            worker_id = made.by_name("w0").worker_id
            sessions = [_change(f"n{number}") for number in range(2000)]
            made.mover.session_changed(worker_id, _change("forgotten"))
            made.mover.snapshot(worker_id, sessions)
            assert made.mover.place("n1999") is None
            # Heard while the snapshot is being taken: newer than what it says.
            made.mover.session_changed(worker_id, SessionChange("n5", gone=True))
            made.mover.session_changed(worker_id, _change("later"))
            await made.until(lambda: made.mover.place("later") is not None)
            assert made.mover.place("n1999") == worker_id
            assert made.mover.place("n5") is None
            assert made.mover.place("forgotten") is None
            # A second one makes the first void.
            made.mover.snapshot(worker_id, sessions)
            made.mover.snapshot(worker_id, sessions[:3])
            await asyncio.sleep(0.05)
            assert len(made.mover.book.known_by(worker_id)) == 3
            made.mover.snapshot(worker_id, sessions)
            made.mover.worker_lost(worker_id)
            await asyncio.sleep(0.05)
            assert made.mover.book.known_by(worker_id) == []

    run(scenario)


def test_ended_session_moves_no_more() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            source = await made.owned("w0", "s")
            target = made.by_name("w1")
            target.copy_seconds = 0.5
            body = {"session_id": "s", "to": target.worker_id}
            _status, record, _headers = await made.call("POST", "/symphony/migrate", body)
            await made.until(lambda: OrderKind.COPY in target.orders)
            await made.call("DELETE", "/symphony/sessions/s")
            assert (await made.ended(record["move_id"]))["state"] == "aborted"
            assert "s" not in target.sessions
            assert "s" in source.sessions
            assert len(target.moves) == 0

    run(scenario)


def test_owner_follows_turns_that_were_served_elsewhere() -> None:
    async def scenario() -> None:
        async with moves_world(policy="round_robin") as made:
            await made.owned("w0", "s", turns=5)
            other = made.by_name("w1")
            for _ in range(2):
                _status, answer = await made.generate({"text": "x", "session_id": "s"})
                if answer["worker"] == "w1":
                    other.own("s", turns=1)
                    break
            await made.until(lambda: made.owners("s") == ["w1"])
            await made.until(lambda: "s" not in made.by_name("w0").sessions)
            made.check_quiet()

    run(scenario)


def test_random_moves_and_deaths_keep_one_owner() -> None:
    async def scenario() -> None:
        async with moves_world(3, seed=5) as made:
            chance = random.Random(11)
            names = ["w0", "w1", "w2"]
            sessions = [f"s{number}" for number in range(6)]
            for number, session_id in enumerate(sessions):
                await made.owned(names[number % 3], session_id)
            kinds = list(OrderKind)
            for _ in range(40):
                worker = made.by_name(chance.choice(names))
                pick = chance.random()
                if pick < 0.2:
                    worker.faults[chance.choice(kinds)] = chance.choice(
                        ["refuse", "silent", "lost", "slow"]
                    )
                elif pick < 0.4:
                    worker.faults.clear()
                elif pick < 0.5 and worker.alive and all_alive(made):
                    await worker.die()
                elif pick < 0.6 and not worker.alive:
                    await worker.come_back()
                body = {"session_id": chance.choice(sessions), "to": worker.worker_id}
                status, _answer, _headers = await made.call("POST", "/symphony/migrate", body)
                assert status in (202, 404, 409)
                await asyncio.sleep(chance.random() * 0.06)
            for worker in made.workers:
                assert isinstance(worker, MovingWorker)
                worker.faults.clear()
                if not worker.alive:
                    await worker.come_back()
            await made.settle()
            for worker in made.workers:
                made.snapshot(worker)
                worker.moves.expire(1e12)
            await asyncio.sleep(0.2)
            for session_id in sessions:
                made.check_quiet(session_id)

    run(scenario)


def all_alive(made: MovesWorld) -> bool:
    return all(worker.alive for worker in made.workers if isinstance(worker, MovingWorker))
