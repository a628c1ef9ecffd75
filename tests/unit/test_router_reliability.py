"""Health checks, circuit breaker, queue and rate limits, keys: on real sockets."""

from __future__ import annotations

import asyncio
import random
import socket

import aiohttp
import pytest
from aiohttp import web

from router_world import FakeWorker, world
from symphony_sglang.router.breaker import BreakerSettings, CircuitBreaker
from symphony_sglang.router.retry import RetrySettings
from symphony_sglang.telemetry.router import BreakerState


def run(scenario):  # type: ignore[no-untyped-def]
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_breaker_follows_its_table() -> None:
    seen: list[tuple[BreakerState, BreakerState]] = []
    breaker = CircuitBreaker(
        BreakerSettings(
            failure_threshold=3, success_threshold=2, timeout_seconds=10, window_seconds=100
        ),
        lambda old, new: seen.append((old, new)),
    )
    closed, opened, half = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN
    breaker.failed(0)
    breaker.failed(1)
    breaker.succeeded(2)  # a success starts the count anew
    breaker.failed(3)
    breaker.failed(4)
    assert breaker.state(4) is closed
    breaker.failed(5)
    assert breaker.state(5) is opened
    assert not breaker.allows(14.9)
    assert breaker.state(15) is half
    breaker.failed(15)  # one failure is enough now
    assert breaker.state(24.9) is opened
    assert breaker.state(25) is half
    breaker.succeeded(25)
    assert breaker.state(25) is half
    breaker.succeeded(26)
    assert breaker.state(26) is closed
    assert seen == [
        (closed, opened),
        (opened, half),
        (half, opened),
        (opened, half),
        (half, closed),
    ]


def test_failures_outside_the_window_do_not_add_up() -> None:
    breaker = CircuitBreaker(BreakerSettings(failure_threshold=3, window_seconds=10))
    for now in (0, 6, 20, 26):
        breaker.failed(now)
    assert breaker.state(26) is BreakerState.CLOSED


def test_breaker_that_is_off_allows_everything() -> None:
    breaker = CircuitBreaker(BreakerSettings(failure_threshold=1, enabled=False))
    breaker.failed(0)
    assert breaker.allows(0)


def test_backoff_grows_to_its_maximum_and_jitters_within_its_share() -> None:
    exact = RetrySettings(initial_seconds=0.1, max_seconds=1.0, multiplier=2.0, jitter=0.0)
    chance = random.Random(1)
    waits = [exact.backoff_seconds(attempt, chance) for attempt in (1, 2, 3, 4, 5, 500)]
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    rough = RetrySettings(initial_seconds=0.1, jitter=0.2)
    drawn = [rough.backoff_seconds(1, chance) for _ in range(200)]
    assert 0.08 <= min(drawn) < 0.085
    assert 0.115 < max(drawn) <= 0.12


def test_breaker_opens_on_failures_and_takes_the_worker_out() -> None:
    async def scenario() -> None:
        async def fail(_worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
            return web.json_response({}, status=500)

        async with world(2, cb_failure_threshold=2, cb_timeout_duration_secs=1) as made:
            made.workers[0].behaviour = fail
            for _ in range(12):
                assert (await made.generate())[0] == 200
            assert made.workers[0].served() == 2
            _status, text, _headers = await made.call("GET", "/metrics")
            assert f'smg_worker_cb_state{{worker="{made.workers[0].url}"}} 1.0' in text
            _status, body, _headers = await made.call("GET", "/workers")
            assert [entry["circuit_breaker"] for entry in body["workers"]] == ["OPEN", "CLOSED"]
            made.workers[0].behaviour = None
            # Half-open a second later, seen at the tick after that; then both take their turns.
            async with asyncio.timeout(10):
                while made.workers[0].served() < 5:
                    assert (await made.generate())[0] == 200
                    await asyncio.sleep(0.05)

    run(scenario)


def test_unhealthy_worker_leaves_and_comes_back() -> None:
    async def scenario() -> None:
        options = {"health_check_interval_secs": 1, "health_failure_threshold": 2}
        async with world(2, **options) as made:
            made.workers[0].healthy = False
            await made.until(lambda: made.healthy() == 1, 8)
            before = made.workers[0].served()
            for _ in range(4):
                assert (await made.generate())[1]["worker"] == "w1"
            assert made.workers[0].served() == before
            made.workers[0].healthy = True
            await made.until(lambda: made.healthy() == 2, 8)
            served = {(await made.generate())[1]["worker"] for _ in range(4)}
            assert served == {"w0", "w1"}

    run(scenario)


def test_flapping_worker_loses_no_request() -> None:
    async def scenario() -> None:
        async with world(2, health_check_interval_secs=1) as made:
            statuses: list[int] = []

            async def load() -> None:
                for _ in range(60):
                    statuses.append((await made.generate())[0])
                    await asyncio.sleep(0.01)

            async def flap() -> None:
                for _ in range(3):
                    await made.workers[0].stop()
                    await asyncio.sleep(0.1)
                    await made.workers[0].start()
                    await asyncio.sleep(0.1)

            await asyncio.gather(load(), load(), flap())
            assert statuses.count(200) == 120
            await made.until(lambda: made.healthy() == 2, 10)

    run(scenario)


def test_worker_that_returns_is_used_within_two_seconds() -> None:
    async def scenario() -> None:
        async with world(1) as made:
            await made.workers[0].stop()
            assert (await made.generate())[0] == 502
            await made.until(lambda: made.healthy() == 0)
            await made.workers[0].start()
            await made.until(lambda: made.healthy() == 1, 2.0)
            assert (await made.generate())[0] == 200

    run(scenario)


def test_a_slow_worker_holds_up_what_it_has_and_nothing_else() -> None:
    async def scenario() -> None:
        release = asyncio.Event()

        async def behaviour(worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
            if worker.name == "w0":
                await release.wait()
            return web.json_response({"worker": worker.name})

        async with world(2, behaviour=behaviour, policy="symphony") as made:
            stuck = {"headers": {"X-SMG-Target-Worker": "0"}}
            held = [asyncio.ensure_future(made.generate(**stuck)) for _ in range(2)]  # noqa: TID251
            await made.until(lambda: made.workers[0].served() == 2)
            for number in range(20):
                body = {"input_ids": list(range(number, number + 200))}
                assert (await made.generate(body))[1] == {"worker": "w1"}
            assert not any(request.done() for request in held)
            release.set()
            assert [answer for answer, _body in await asyncio.gather(*held)] == [200, 200]

    run(scenario)


async def slow(_worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
    await asyncio.sleep(0.3)
    return web.json_response({})


def test_queue_is_first_come_and_bounded() -> None:
    async def scenario() -> None:
        options = {"max_concurrent_requests": 2, "queue_size": 3}
        async with world(1, behaviour=slow, **options) as made:
            answers = await asyncio.gather(*(made.generate() for _ in range(8)))
            statuses = [status for status, _ in answers]
            assert statuses.count(200) == 5
            assert statuses.count(429) == 3
            refused = next(answer for status, answer in answers if status == 429)
            assert refused["error"]["code"] == "queue_full"
            assert made.service.gate.waiting == 0

    run(scenario)


def test_wait_in_the_queue_is_bounded() -> None:
    async def scenario() -> None:
        async def stuck(_worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(1.5)
            return web.json_response({})

        options = {"max_concurrent_requests": 1, "queue_timeout_secs": 1}
        async with world(1, behaviour=stuck, **options) as made:
            first, second = await asyncio.gather(made.generate(), made.generate())
            assert {first[0], second[0]} == {200, 408}

    run(scenario)


def test_hanging_up_in_the_queue_gives_the_place_back() -> None:
    async def scenario() -> None:
        options = {"max_concurrent_requests": 1, "queue_size": 1}
        async with world(1, behaviour=slow, **options) as made, asyncio.TaskGroup() as group:
            group.create_task(made.generate())
            await asyncio.sleep(0.05)
            with pytest.raises(asyncio.TimeoutError):
                await made.generate(timeout=aiohttp.ClientTimeout(0.1))
            await made.until(lambda: made.service.gate.waiting == 0)
            assert (await made.generate())[0] == 200

    run(scenario)


def test_rate_limit_spaces_requests_out() -> None:
    async def scenario() -> None:
        async with world(1, rate_limit_tokens_per_second=20) as made:
            loop = asyncio.get_running_loop()
            began = loop.time()
            answers = await asyncio.gather(*(made.generate() for _ in range(40)))
            # 20 may come at once, the other 20 take their second.
            assert loop.time() - began > 0.9
            assert {status for status, _ in answers} == {200}

    run(scenario)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_keys_open_what_they_should() -> None:
    async def scenario() -> None:
        keys = {"api_key": "caller", "admin_api_key": "admin", "worker_api_key": "inner"}
        async with world(1, **keys) as made:
            for path in ("/health", "/readiness", "/metrics", "/symphony/ui"):
                assert (await made.call("GET", path))[0] == 200
            assert (await made.generate())[0] == 401
            assert (await made.generate(headers=bearer("wrong")))[0] == 401
            assert (await made.generate(headers=bearer("caller")))[0] == 200
            assert (await made.generate(headers=bearer("admin")))[0] == 200
            assert (await made.generate(headers={"x-api-key": "caller"}))[0] == 200
            sent = made.workers[0].requests[-1][2]
            assert sent["authorization"] == "Bearer inner"
            assert "x-api-key" not in sent
            body = {"url": "http://127.0.0.1:9"}
            assert (await made.call("POST", "/workers", body))[0] == 401
            assert (await made.call("POST", "/workers", body, headers=bearer("caller")))[0] == 403
            assert (await made.call("POST", "/flush_cache", headers=bearer("caller")))[0] == 403
            assert (await made.call("POST", "/workers", body, headers=bearer("admin")))[0] == 202

    run(scenario)


def test_a_callers_own_key_passes_where_workers_have_none() -> None:
    async def scenario() -> None:
        async with world(1) as made:
            await made.generate(headers=bearer("mine"))
            assert made.workers[0].requests[-1][2]["authorization"] == "Bearer mine"

    run(scenario)


@pytest.mark.parametrize(
    ("sent", "status"),
    [(b"NONSENSE\r\n\r\n", b" 400 "),
     (b"GET / HTTP/1.1\r\nx: " + b"a" * 70_000 + b"\r\n\r\n", b" 431 "),
     (b"POST /generate HTTP/1.1\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello", b" 400 "),
     (b"POST /generate HTTP/1.1\r\ncontent-length: -1\r\n\r\n", b" 400 "),
     (b"GET /health HTTP/1.1\r\n\r\n", b" 200 ")],
)  # fmt: skip
def test_raw_bytes_are_answered_or_refused(sent: bytes, status: bytes) -> None:
    async def scenario() -> None:
        async with world(1) as made:
            reader, writer = await asyncio.open_connection(*address_of(made.url))
            writer.write(sent)
            first = await asyncio.wait_for(reader.readline(), 5)
            assert status in first
            writer.close()
            assert (await made.generate())[0] == 200

    run(scenario)


def test_pipelined_requests_are_answered_in_order() -> None:
    async def scenario() -> None:
        async def echo(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            body = await request.json()
            await asyncio.sleep(0.1 if body["n"] % 2 else 0)
            return web.json_response(body)

        async with world(1, behaviour=echo) as made:
            reader, writer = await asyncio.open_connection(*address_of(made.url))
            for number in range(40):
                body = b'{"n": %d}' % number
                head = b"POST /generate HTTP/1.1\r\ncontent-type: application/json\r\n"
                writer.write(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
            seen: list[int] = []
            while len(seen) < 40:
                line = await asyncio.wait_for(reader.readuntil(b"}"), 10)
                seen.append(int(line.rpartition(b'"n": ')[2].rstrip(b"}")))
            assert seen == list(range(40))
            writer.close()

    run(scenario)


def address_of(url: str) -> tuple[str, int]:
    host, _colon, port = url.removeprefix("http://").partition(":")
    return host, int(port)


def test_a_connection_that_is_cut_early_leaves_nothing_behind() -> None:
    async def scenario() -> None:
        async with world(1) as made:
            for sent in (
                b"",
                b"POST /gen",
                b"POST /generate HTTP/1.1\r\ncontent-length: 50\r\n\r\nab",
            ):
                with socket.create_connection(address_of(made.url)) as client:
                    client.sendall(sent)
            await asyncio.sleep(0.1)
            connections = made.service.server.connections
            await made.until(lambda: all(c.current is None for c in connections))
            assert (await made.generate())[0] == 200

    run(scenario)
