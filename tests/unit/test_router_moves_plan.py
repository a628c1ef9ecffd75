"""Who decides that a session moves: drains, load, advisories, requests themselves."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from moves_world import MovesWorld, moves_world
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.migration import OrderKind
from symphony_sglang.core.page_hash import event_hashes
from symphony_sglang.core.prefix import NO_NAMESPACE, pack_tokens
from symphony_sglang.core.routing_types import LoadView, WorkerRates
from symphony_sglang.router.moves_heads import HotHeads
from symphony_sglang.router.moves_speed import CopySpeeds, WorkMeter, joined

IDS = list(range(1000, 4008))
PAGES = len(IDS) // 16


def run(scenario):  # type: ignore[no-untyped-def]
    asyncio.run(asyncio.wait_for(scenario(), 30))


def hold_pages(made: MovesWorld, name: str) -> None:
    """The worker has the whole of `IDS` on its disk."""
    hashes = event_hashes(pack_tokens(IDS), 16, NO_NAMESPACE)
    index = made.service.placement.index
    index.stored(made.by_name(name).worker_id, Level.NVME, [int(h) for h in hashes])


def slow_prefill(made: MovesWorld, tokens_per_second: float = 1000.0) -> None:
    """Computing takes seconds, copying milliseconds."""
    for worker in made.service.registry:
        made.service.placement.rates[worker.worker_id] = WorkerRates(
            prefill=Rate(tokens_per_second, 0.01),
            host_to_device=Rate(200_000.0, 0.001),
            nvme_to_host=Rate(100_000.0, 0.001),
            peer_to_host=Rate(50_000.0, 0.01),
        )
    made.service.placement.refresh()


# Drains -----------------------------------------------------------------------------------------


def test_drained_worker_hands_all_sessions_off_and_is_removed() -> None:
    async def scenario() -> None:
        async with moves_world(3) as made:
            for number in range(8):
                await made.owned("w0", f"s{number}")
            worker_id = made.by_name("w0").worker_id
            status, answer, _headers = await made.call("POST", f"/workers/{worker_id}/drain")
            assert (status, answer["status"], answer["sessions"]) == (202, "draining", 8)
            _status, entry, _headers = await made.call("GET", f"/workers/{worker_id}")
            assert entry["draining"] is True
            registry = made.service.registry
            await made.until(lambda: registry.get(worker_id) is None, 10)
            left = [made.owners(f"s{number}") for number in range(8)]
            assert all(owners in (["w1"], ["w2"]) for owners in left)
            assert left.count(["w1"]) > 0
            causes = {move["cause"] for move in made.mover.recent()}
            assert causes == {"drain"}
            assert (await made.call("POST", f"/workers/{worker_id}/drain"))[0] == 404

    run(scenario)


def test_draining_worker_gets_no_new_requests_but_serves_what_it_has() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            await made.owned("w0", "s")
            target = made.by_name("w1")
            target.copy_seconds = 0.5
            worker_id = made.by_name("w0").worker_id
            await made.call("POST", f"/workers/{worker_id}/drain")
            for _ in range(4):
                assert (await made.generate())[1]["worker"] == "w1"
            await made.until(lambda: OrderKind.COPY in target.orders, 5)
            assert (await made.generate({"text": "x", "session_id": "s"}))[1]["worker"] == "w0"
            await made.until(lambda: made.service.registry.get(worker_id) is None, 10)
            assert (await made.generate({"text": "x", "session_id": "s"}))[1]["worker"] == "w1"

    run(scenario)


def test_session_that_cannot_move_does_not_hold_a_drain_up() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            await made.owned("w0", "s")
            made.by_name("w1").faults[OrderKind.COPY] = "refuse"
            worker_id = made.by_name("w0").worker_id
            await made.call("POST", f"/workers/{worker_id}/drain")
            await made.until(lambda: made.service.registry.get(worker_id) is None, 10)
            assert len(made.mover.recent()) == 2

    run(scenario)


def test_drain_with_nowhere_to_go_ends_in_time() -> None:
    async def scenario() -> None:
        async with moves_world(1, drain_timeout_secs=1) as made:
            await made.owned("w0", "s")
            worker_id = made.by_name("w0").worker_id
            await made.call("POST", f"/workers/{worker_id}/drain")
            await made.until(lambda: made.service.registry.get(worker_id) is None, 5)

    run(scenario)


def test_worker_that_says_it_leaves_is_emptied_but_not_removed() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            source = await made.owned("w0", "s")
            made.mover.worker_told(source.worker_id, draining=True)
            await made.until(lambda: made.owners("s") == ["w1"], 5)
            await asyncio.sleep(1.2)
            found = made.service.registry.get(source.worker_id)
            assert found is not None
            assert (found.draining, found.leaving) == (True, True)
            made.mover.worker_told(source.worker_id, draining=False)
            assert (found.draining, found.leaving) == (False, False)
            assert len(made.mover.drains) == 0

    run(scenario)


# Load -------------------------------------------------------------------------------------------


def test_sessions_leave_a_worker_that_has_far_more_work() -> None:
    async def scenario() -> None:
        async with moves_world(3) as made:
            now = made.service.clock.monotonic()
            meter = made.service.planner._meter
            for number in range(6):
                await made.owned("w0", f"s{number}")
                meter.add(f"s{number}", made.by_name("w0").worker_id, 3.0, now)
            await made.until(lambda: len(made.mover.recent()) >= 2, 5)
            await made.settle()
            await asyncio.sleep(1.1)
            counts = {
                name: sum(made.owners(f"s{n}") == [name] for n in range(6))
                for name in ("w0", "w1", "w2")
            }
            assert counts == {"w0": 2, "w1": 2, "w2": 2}
            assert {move["cause"] for move in made.mover.recent()} == {"balance"}

    run(scenario)


def test_even_load_moves_nothing() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            now = made.service.clock.monotonic()
            for number, name in enumerate(["w0", "w1"] * 3):
                await made.owned(name, f"s{number}")
                worker_id = made.by_name(name).worker_id
                made.service.planner._meter.add(f"s{number}", worker_id, 3.0, now)
            await asyncio.sleep(1.2)
            assert made.mover.recent() == []

    run(scenario)


def test_work_fades_and_is_bounded() -> None:
    meter = WorkMeter(sessions_max=2)
    meter.add("a", "w", 4.0, 0.0)
    meter.add("a", "w", 4.0, 30.0)
    [work] = meter.sessions(60.0)
    assert work.seconds == pytest.approx(3.0)
    assert work.idle_seconds == 30.0
    meter.add(None, "w", 2.0, 0.0)
    assert meter.of_worker("w", 30.0) == pytest.approx(1.0)
    for name in "bcd":
        meter.add(name, "w", 1.0, 61.0)
    meter.check()
    assert [one.session_key for one in meter.sessions(61.0)] == ["c", "d"]


def test_speed_of_copies_is_learnt_and_joined_with_the_disk() -> None:
    speeds = CopySpeeds()
    assert speeds.rate("w") is None
    speeds.copied("w", 10, 0.001)  # all overhead
    assert speeds.rate("w") is None
    speeds.copied("w", 1000, 0.1)
    speeds.overhead("w", 0.05)
    rate = speeds.rate("w")
    assert rate is not None
    assert (rate.tokens_per_second, rate.latency_seconds) == (10_000, 0.05)
    both = joined(rate, Rate(10_000, 0.01))
    assert both.tokens_per_second == pytest.approx(5000)
    assert both.latency_seconds == pytest.approx(0.06)
    speeds.forget("w")
    assert speeds.rate("w") is None


# Advisories -------------------------------------------------------------------------------------


def test_advised_session_moves_where_its_turn_is_cheaper() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            slow_prefill(made)
            hold_pages(made, "w0")
            body = {"input_ids": IDS, "session_id": "s"}
            await made.owned("w0", "s", tokens=len(IDS))
            assert (await made.generate(body))[1]["worker"] == "w0"
            # The first worker has seconds of work before it.
            w0, w1 = (made.by_name(name).worker_id for name in ("w0", "w1"))
            now = made.service.clock.monotonic()
            busy = LoadView(requests_running=1, tokens_waiting_uncached=20_000)
            made.service.placement.ledger.reported(w0, busy, now)
            made.service.placement.reported(w0)
            status, answer, _headers = await made.call(
                "POST", "/symphony/advise", {"session_id": "s"}
            )
            [receipt] = answer["receipts"]
            assert (status, receipt["status"], receipt["reason"]) == (202, "accepted", "moving")
            assert (receipt["worker"], receipt["tokens"]["peer"]) == (w1, len(IDS))
            record = await made.ended(receipt["move_id"])
            assert (record["state"], record["cause"]) == ("done", "advisory")
            path = f"/symphony/advisories/{receipt['advisory_id']}"
            status, known, _headers = await made.call("GET", path)
            assert status == 200
            assert known["worker"] == w1
            assert (await made.generate(body))[1]["worker"] == "w1"

    run(scenario)


def test_advised_session_stays_where_it_is_well_off() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            slow_prefill(made)
            hold_pages(made, "w0")
            await made.owned("w0", "s", tokens=len(IDS))
            assert (await made.generate({"input_ids": IDS, "session_id": "s"}))[1]["worker"] == "w0"
            await made.call("POST", "/symphony/advise", {"session_id": "s"})
            source = made.by_name("w0")
            assert source.served("/symphony/advise") == 1
            assert made.mover.recent() == []

    run(scenario)


def test_shared_prefix_is_copied_and_keeps_its_owner() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            await made.owned("w0", "s")
            hold_pages(made, "w0")
            target = made.by_name("w1")

            async def asked(payload: dict[str, Any]) -> dict[str, Any]:
                action = {"action_id": "a", "action_type": "share", "payload": payload}
                body = {"protocol_version": "0.1", "message_id": "m", "actions": [action]}
                status, answer, _headers = await made.call("POST", "/symphony/advise", body)
                assert status == 202, answer
                return dict(answer["receipts"][0])

            there = {"to": target.worker_id}
            receipt = await asked({"session_id": "s", **there})
            assert (receipt["worker"], receipt["state"]) == (target.worker_id, "staging")
            assert target.pulls["POST"] == 1
            await asked({"input_ids": IDS, **there})
            assert target.pulls["POST"] == 2
            for payload, reason in [
                ({"session_id": "s", "to": "nowhere"}, "unknown_worker"),
                ({"session_id": "nobody's", **there}, "unknown_prefix"),
                ({"session_id": "s", "to": made.by_name("w0").worker_id}, "already_there"),
            ]:
                assert (await asked(payload))["reason"] == reason
            made.check_quiet()
            assert made.owners("s") == ["w0"]

    run(scenario)


# Requests ---------------------------------------------------------------------------------------


def test_moved_session_is_served_at_its_new_worker_before_the_feed_says_what_is_there() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            slow_prefill(made)
            hold_pages(made, "w0")
            await made.owned("w0", "s", tokens=len(IDS))
            body = {"input_ids": IDS, "session_id": "s"}
            assert (await made.generate(body))[1]["worker"] == "w0"
            assert (await made.migrate("s", "w1"))["state"] == "done"
            assert (await made.generate(body))[1]["worker"] == "w1"
            assert len(made.mover.recent()) == 1

    run(scenario)


def test_request_sent_elsewhere_takes_its_session_along() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            slow_prefill(made)
            hold_pages(made, "w0")
            await made.owned("w0", "s", tokens=len(IDS))
            target = made.by_name("w1")
            headers = {"X-SMG-Target-Worker": target.worker_id}
            body = {"input_ids": IDS, "session_id": "s"}
            status, answer = await made.generate(body, headers=headers)
            assert (status, answer["worker"]) == (200, "w1")
            [move] = made.mover.recent()
            assert (move["cause"], move["state"]) == ("demand", "done")
            await made.settle()
            made.check_quiet()

    run(scenario)


def test_request_waits_no_longer_than_computing_takes() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            slow_prefill(made, 4000.0)
            hold_pages(made, "w0")
            await made.owned("w0", "s", tokens=len(IDS))
            target = made.by_name("w1")
            # Computing takes most of a second; the copy does not come within its deadline.
            target.copy_seconds = 60.0
            headers = {"X-SMG-Target-Worker": target.worker_id}
            began = made.service.clock.monotonic()
            _status, answer = await made.generate(
                {"input_ids": IDS, "session_id": "s"}, headers=headers
            )
            assert answer["worker"] == "w1"
            assert made.service.clock.monotonic() - began < 1.5
            await made.settle()
            target.moves.expire(1e12)
            assert made.owners("s") == ["w0"]
            assert made.mover.recent()[0]["state"] == "aborted"

    run(scenario)


def test_prompt_without_a_session_is_pulled_by_its_tokens() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            slow_prefill(made)
            hold_pages(made, "w0")
            target = made.by_name("w1")
            headers = {"X-SMG-Target-Worker": target.worker_id}
            status, answer = await made.generate({"input_ids": IDS}, headers=headers)
            assert (status, answer["worker"]) == (200, "w1")
            assert target.pulls["POST"] == 1
            assert made.mover.recent() == []
            rate = made.mover.speeds.rate(target.worker_id)
            assert rate is not None
            assert made.service.placement.peer_rates[target.worker_id] is not None

    run(scenario)


def test_quick_prefill_needs_no_pull() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            hold_pages(made, "w0")
            for worker in made.service.registry:
                made.service.placement.rates[worker.worker_id] = WorkerRates(
                    prefill=Rate(1e6, 0.0), peer_to_host=Rate(1000.0, 0.01)
                )
            made.service.placement.refresh()
            target = made.by_name("w1")
            headers = {"X-SMG-Target-Worker": target.worker_id}
            await made.generate({"input_ids": IDS}, headers=headers)
            assert target.pulls["POST"] == 0

    run(scenario)


# Shared prefixes --------------------------------------------------------------------------------


def test_hot_head_is_copied_to_a_worker_that_joins_and_to_one_more_holder() -> None:
    async def scenario() -> None:
        async with moves_world() as made:
            hold_pages(made, "w0")
            target = made.by_name("w1")
            for number in range(20):
                body = {"input_ids": [*IDS[:2048], number], "session_id": f"h{number}"}
                assert (await made.generate(body))[0] == 200
            await made.until(lambda: target.pulls["POST"] >= 1, 5)
            await asyncio.sleep(1.2)
            # Once: what is there, or on its way, is not copied again.
            assert target.pulls["POST"] == 1
            _status, text, _headers = await made.call("GET", "/metrics")
            assert 'symphony:moves_total{cause="warm",outcome="stored"} 1.0' in text

    run(scenario)


def asked(heads: HotHeads, ids: list[int], session: str | None, now: float = 0.0) -> None:
    token_bytes = pack_tokens(ids)
    hashes = event_hashes(token_bytes, 16, NO_NAMESPACE)
    heads.asked(session, 16, hashes, token_bytes, NO_NAMESPACE, now)


def test_head_that_sessions_share_is_found_at_its_length() -> None:
    heads = HotHeads()
    for number in range(16):
        asked(heads, [*IDS[:1024], *range(number * 5000, number * 5000 + 800)], f"s{number}")
    [head] = heads.hottest(0.0)
    assert head.tokens == 1024
    assert head.token_bytes == pack_tokens(IDS[:1024])
    assert head.requests_per_second == pytest.approx(14 * 0.6931 / 30, rel=1e-3)
    assert heads.hottest(300.0) == []
    heads.expire(600.0)
    heads.check()
    assert len(heads) == 0


def test_turns_of_one_session_make_no_hot_head() -> None:
    heads = HotHeads()
    for _ in range(20):
        asked(heads, IDS, "s")
    assert heads.hottest(0.0) == []
    asked(heads, IDS[:100], "short")
    assert all(entry for entry in [len(heads)])


def test_heads_are_bounded() -> None:
    heads = HotHeads(entries_max=16, kept_bytes_max=2048)
    for number in range(100):
        for session in range(6):
            asked(heads, list(range(number, number + 600)), f"s{session}", float(number))
        heads.check()
    assert len(heads) <= 16


def test_data_parallel_server_takes_no_part_and_the_answer_says_why() -> None:
    async def scenario() -> None:
        async with moves_world(3) as made:
            await made.owned("w0", "s")
            apart = made.by_name("w1")
            apart.ranks = 2
            found = made.service.registry.find(apart.worker_id)
            assert found is not None
            made.service.registry.learn(found, await made.service.health.describe(found))
            body = {"session_id": "s", "to": apart.worker_id}
            status, answer, _headers = await made.call("POST", "/symphony/migrate", body)
            assert (status, answer["error"]["code"]) == (409, "no_peer_level")
            assert f"{apart.url} runs with --dp-size 2" in answer["error"]["message"]
            assert apart.orders == []
            # The others go on without it.
            assert (await made.migrate("s", "w2"))["state"] == "done"
            assert apart.orders == []
            made.check_quiet()

    run(scenario)
