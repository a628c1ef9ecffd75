"""Requests through the router: passed as they are, tried again, torn, aborted, refused."""

from __future__ import annotations

import asyncio
import json
from threading import Event
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from router_world import FakeWorker, stream, world
from symphony_sglang.router import placement


def run(scenario):  # type: ignore[no-untyped-def]
    asyncio.run(asyncio.wait_for(scenario(), 30))


def answer_with(status: int, **fields: object):  # type: ignore[no-untyped-def]
    async def behaviour(worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
        return web.json_response({"worker": worker.name, **fields}, status=status)

    return behaviour


async def slow_stream(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
    return await stream(request, 200, pause=0.02)


def test_body_headers_and_answer_pass_unchanged() -> None:
    async def scenario() -> None:
        async def echo(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            headers = {"x-mine": "1", "content-type": "application/json"}
            return web.Response(status=201, body=await request.read(), headers=headers)

        async with world(1, behaviour=echo) as made:
            body = b'{"text": "h\\u00e9llo",   "odd": [1, 2.50]}'
            sent = {"content-type": "application/json", "x-custom": "kept", "x-request-id": "abc"}
            async with made.client.post(made.url + "/generate?a=b", data=body, headers=sent) as got:
                assert (got.status, await got.read()) == (201, body)
                assert got.headers["x-mine"] == "1"
                assert got.headers["x-request-id"] == "abc"
                assert got.headers["x-symphony-worker"] in {
                    worker.worker_id for worker in made.service.registry
                }
            [(method, path, headers, received)] = made.workers[0].requests
            assert (method, path, received) == ("POST", "/generate", body)
            assert headers["x-custom"] == "kept"
            assert headers["x-request-id"] == "abc"
            assert headers["host"] == made.workers[0].url.removeprefix("http://")

    run(scenario)


def test_stream_arrives_piece_by_piece() -> None:
    async def scenario() -> None:
        gate = asyncio.Event()

        async def stepwise(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            await response.write(b"data: 1\n\n")
            await gate.wait()
            await response.write(b"data: [DONE]\n\n")
            return response

        async with (
            world(1, behaviour=stepwise) as made,
            made.client.post(made.url + "/generate", json={"stream": True}) as got,
        ):
            assert got.headers["content-type"] == "text/event-stream"
            # The second event is not sent before the first was read.
            assert await got.content.readuntil(b"\n\n") == b"data: 1\n\n"
            gate.set()
            assert await got.content.read() == b"data: [DONE]\n\n"

    run(scenario)


def test_failed_tries_go_to_another_worker_and_only_one_answer_returns() -> None:
    async def scenario() -> None:
        async with world(2) as made:
            made.workers[0].behaviour = answer_with(503)
            for _ in range(6):
                status, answer = await made.generate()
                assert (status, answer["worker"]) == (200, "w1")
            assert made.workers[0].served() >= 1
            assert made.workers[1].served() == 6

    run(scenario)


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_callers_mistake_is_not_tried_again(status: int) -> None:
    async def scenario() -> None:
        async with world(2, behaviour=answer_with(status)) as made:
            assert (await made.generate())[0] == status
            assert sum(worker.served() for worker in made.workers) == 1
            breakers = [worker.breaker for worker in made.service.registry]
            assert all(breaker.failures == 0 for breaker in breakers)

    run(scenario)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_retries_are_bounded_and_the_last_answer_is_the_workers_own(status: int) -> None:
    async def scenario() -> None:
        async with world(2, behaviour=answer_with(status, mine=1), retry_max_retries=3) as made:
            got, answer = await made.generate()
            assert (got, answer["mine"]) == (status, 1)
            assert sum(worker.served() for worker in made.workers) == 4

    run(scenario)


def test_no_retries_when_they_are_off() -> None:
    async def scenario() -> None:
        async with world(2, behaviour=answer_with(503), disable_retries=True) as made:
            assert (await made.generate())[0] == 503
            assert sum(worker.served() for worker in made.workers) == 1

    run(scenario)


def test_dead_worker_costs_nobody_an_answer() -> None:
    async def scenario() -> None:
        async with world(3) as made:
            await made.workers[1].stop()
            answers = await asyncio.gather(*(made.generate() for _ in range(30)))
            assert {status for status, _ in answers} == {200}
            assert {answer["worker"] for _, answer in answers} == {"w0", "w2"}
            await made.until(lambda: made.healthy() == 2)
            await made.workers[1].start()

    run(scenario)


def test_death_before_the_first_byte_is_tried_again() -> None:
    async def scenario() -> None:
        async def vanish(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()

        async with world(2) as made:
            made.workers[0].behaviour = vanish
            for _ in range(4):
                assert (await made.generate())[1]["worker"] == "w1"

    run(scenario)


def test_death_in_mid_stream_is_told_and_never_run_twice() -> None:
    async def scenario() -> None:
        async def die(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            return await stream(request, 10, pause=0.01, die_after=3)

        async with world(2, behaviour=die) as made:
            content, torn = b"", False
            async with made.client.post(made.url + "/generate", json={"stream": True}) as answer:
                assert answer.status == 200
                try:
                    async for piece in answer.content.iter_any():
                        content += piece
                except aiohttp.ClientPayloadError:
                    torn = True
            assert torn
            events = [line for line in content.split(b"\n\n") if line]
            assert len(events) == 4
            error = json.loads(events[-1].removeprefix(b"data: "))["error"]
            assert error["code"] == "worker_lost"
            assert b"[DONE]" not in content
            assert sum(worker.served() for worker in made.workers) == 1

    run(scenario)


def test_hanging_up_stops_the_workers_work() -> None:
    async def scenario() -> None:
        async with world(1, behaviour=slow_stream) as made:
            answer = await made.client.post(made.url + "/generate", json={"stream": True})
            await answer.content.readuntil(b"\n\n")
            assert made.workers[0].running == 1
            answer.close()
            await made.until(lambda: made.workers[0].running == 0)
            assert made.workers[0].aborted == 1
            assert all(worker.breaker.failures == 0 for worker in made.service.registry)

    run(scenario)


def test_hanging_up_before_the_answer_aborts_by_id_too() -> None:
    async def scenario() -> None:
        async def hang(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            if request.path == "/abort_request":
                return web.json_response({})
            await asyncio.sleep(30)
            return web.Response()

        async with world(1, behaviour=hang) as made:
            with pytest.raises(asyncio.TimeoutError):
                await made.generate(
                    {"text": "x", "rid": "mine"}, timeout=aiohttp.ClientTimeout(0.2)
                )
            worker = made.workers[0]
            await made.until(lambda: worker.served("/abort_request") == 1)
            assert json.loads(worker.requests[-1][3]) == {"rid": "mine"}
            await made.until(lambda: worker.running == 0)

    run(scenario)


def test_slow_caller_holds_its_worker_back_and_gets_everything() -> None:
    async def scenario() -> None:
        size, count = 1 << 16, 400

        async def flood(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            response = web.StreamResponse()
            await response.prepare(request)
            for number in range(count):
                await response.write(bytes([number % 256]) * size)
                _worker.model = str(number)
            return response

        async with world(1, behaviour=flood) as made:
            async with made.client.post(
                made.url + "/generate", json={}, read_bufsize=4096
            ) as answer:
                await asyncio.sleep(0.5)
                # 26 MB were asked for; socket buffers and the router hold a few of them.
                assert int(made.workers[0].model) < count - 1
                content = await answer.read()
            assert len(content) == size * count
            assert all(content[n * size] == n % 256 for n in range(count))

    run(scenario)


def test_oversize_body_is_refused_with_json() -> None:
    async def scenario() -> None:
        async with world(1, max_payload_size=2000) as made:
            status, answer = await made.generate({"text": "x" * 3000})
            assert (status, answer["error"]["code"]) == (413, "payload_too_large")

            async def chunks():  # type: ignore[no-untyped-def]
                for _ in range(300):
                    yield b"x" * 1000

            async with made.client.post(made.url + "/generate", data=chunks()) as got:
                assert got.status == 413
            assert (await made.generate({"text": "x" * 1000}))[0] == 200
            assert made.workers[0].served() == 1

    run(scenario)


@pytest.mark.parametrize(
    ("body", "code"),
    [(b"{bad", "json_parse_error"), (b"[1]", "invalid_request"), (b"", "json_parse_error"),
     (b'{"model": "\xff"}', "json_parse_error"), (b'{"x":' + b"[" * 100_000, "json_parse_error")],
)  # fmt: skip
def test_malformed_body_is_refused_before_any_worker(body: bytes, code: str) -> None:
    async def scenario() -> None:
        async with world(1) as made:
            headers = {"content-type": "application/json"}
            async with made.client.post(made.url + "/generate", data=body, headers=headers) as got:
                assert got.status == 400
                answer = await got.json()
            assert answer["error"]["type"] == "invalid_request_error"
            assert answer["error"]["code"] == code
            assert made.workers[0].served() == 0

    run(scenario)


def test_no_worker_is_503_and_a_late_worker_is_found() -> None:
    async def scenario() -> None:
        async with world(0) as made:
            status, answer = await made.generate()
            assert (status, answer["error"]["code"]) == (503, "no_available_workers")
            late = FakeWorker("late")
            await late.start()
            try:
                body = {"url": late.url}
                status, accepted, headers = await made.call("POST", "/workers", body)
                assert status == 202
                assert headers["location"] == f"/workers/{accepted['worker_id']}"
                await made.until(lambda: made.healthy() == 1)
                assert (await made.generate())[1]["worker"] == "late"
            finally:
                await late.stop()

    run(scenario)


def test_time_limit_ends_an_answer_that_does_not_come() -> None:
    async def scenario() -> None:
        async def hang(_worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(30)
            return web.Response()

        async with world(1, behaviour=hang, request_timeout_secs=1) as made:
            status, answer = await made.generate()
            assert (status, answer["error"]["code"]) == (504, "request_timeout")
            await made.until(lambda: made.workers[0].running == 0)

    run(scenario)


def test_a_prompt_that_takes_long_to_tokenize_holds_up_nobody_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(placement, "TOKENIZE_SECONDS_MAX", 25.0)

    async def scenario() -> None:
        async with world(1, policy="symphony") as made:
            tokens, entered, release = made.service.placement.tokens, Event(), Event()
            hashes = tokens.tokens

            def tokenize(prompt: Any, *arguments: Any) -> Any:
                if prompt.input_ids == [7] * 40:
                    entered.set()
                    assert release.wait(20)
                return hashes(prompt, *arguments)

            tokens.tokens = tokenize
            slow = asyncio.ensure_future(made.generate({"input_ids": [7] * 40}))  # noqa: TID251
            await made.until(entered.is_set)
            for _ in range(5):
                assert (await made.generate({"input_ids": [8] * 40}))[0] == 200
                assert (await made.call("GET", "/health"))[0] == 200
            assert not slow.done()
            release.set()
            assert (await slow)[0] == 200

    run(scenario)


def test_target_worker_header_is_obeyed() -> None:
    async def scenario() -> None:
        async with world(3) as made:
            for index in (2, 0, 1):
                headers = {"X-SMG-Target-Worker": str(index)}
                assert (await made.generate(headers=headers))[1]["worker"] == f"w{index}"
            by_url = {"X-SMG-Target-Worker": made.workers[1].url}
            assert (await made.generate(headers=by_url))[1]["worker"] == "w1"
            status, answer = await made.generate(headers={"X-SMG-Target-Worker": "nobody"})
            assert (status, answer["error"]["code"]) == (400, "unknown_worker")

    run(scenario)


def test_running_requests_finish_when_the_router_drains() -> None:
    async def scenario() -> None:
        async def short(_worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            return await stream(request, 10, pause=0.05)

        async with world(1, behaviour=short) as made:
            answer = await made.client.post(made.url + "/generate", json={"stream": True})
            stop = asyncio.get_running_loop().create_task(made.service.server.stop(5.0))
            content = await answer.content.read()
            assert content.endswith(b"data: [DONE]\n\n")
            await stop
            with pytest.raises(aiohttp.ClientConnectionError):
                await made.generate()

    run(scenario)
