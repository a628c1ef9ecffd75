"""Workers by HTTP, routes that many workers answer, and the /symphony routes, with fake workers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import msgspec
import pytest
import zmq
from aiohttp import web

from router_world import FakeWorker, World, world
from symphony_sglang.core.gate import Rate
from symphony_sglang.core.levels import Level
from symphony_sglang.core.location import LocationIndex
from symphony_sglang.core.page_hash import event_hashes
from symphony_sglang.core.prefix import NO_NAMESPACE, Namespace, pack_tokens
from symphony_sglang.core.routing_types import AdvisedPlace
from symphony_sglang.router.advisories import Advisory, AdvisoryMemory
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.fleet import merge_metrics, worker_options
from symphony_sglang.router.registry import worker_id_of
from symphony_sglang.router.text_pages import TextPages, text_hashes
from symphony_sglang.router.tokens import Prompt
from symphony_sglang.wire.feed import BlockStored, EventBatch


def run(scenario):  # type: ignore[no-untyped-def]
    asyncio.run(asyncio.wait_for(scenario(), 30))


def test_ids_are_of_the_place_and_stable() -> None:
    same = ["http://a:80", "http://a", "http://a/", "http://A:80/"]
    assert len({worker_id_of(url) for url in same}) == 1
    others = ["http://a:81", "https://a", "http://b", "http://[::1]:80", "http://a/x"]
    assert len({worker_id_of(url) for url in others} | {worker_id_of("http://a")}) == 6
    for bad in ("a:80", "ftp://a", "http://", "http://a?x=1", "http://u:p@a", "http://a:99999"):
        with pytest.raises(ValueError):
            worker_id_of(bad)


def test_workers_come_and_go_by_http() -> None:
    async def scenario() -> None:
        async with world(2) as made:
            _status, listed, _headers = await made.call("GET", "/workers")
            assert listed["total"] == 2
            assert listed["stats"] == {"prefill_count": 0, "decode_count": 0, "regular_count": 2}
            first, second = (entry["id"] for entry in listed["workers"])
            assert (await made.call("PUT", f"/workers/{first}", {"priority": 7}))[0] == 202
            assert (await made.call("GET", f"/workers/{first}"))[1]["priority"] == 7
            assert (await made.call("PUT", f"/workers/{first}", {"priority": "x"}))[0] == 400
            assert (await made.call("PUT", f"/workers/{first}", {"odd": 1}))[0] == 400
            assert (await made.call("DELETE", f"/workers/{second}"))[0] == 202
            assert (await made.call("DELETE", f"/workers/{second}"))[0] == 404
            assert {(await made.generate())[1]["worker"] for _ in range(4)} == {"w0"}
            url = made.workers[1].url
            status, text, _headers = await made.call("POST", f"/add_worker?url={url}")
            assert (status, text) == (200, f"Successfully added worker: {url}")
            assert (await made.call("GET", "/list_workers"))[1] == {
                "urls": [worker.url for worker in made.workers]
            }
            assert (await made.call("POST", f"/remove_worker?url={url}"))[0] == 200
            assert (await made.call("POST", "/add_worker"))[0] == 400
            assert (await made.call("POST", "/workers", {"url": "nonsense"}))[0] == 400
            assert (await made.call("POST", "/workers", {}))[0] == 400
            assert (await made.call("POST", f"/workers/{first}/drain"))[0] == 202

    run(scenario)


def test_removed_worker_finishes_what_it_has() -> None:
    async def scenario() -> None:
        async def slow(worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
            await asyncio.sleep(0.3)
            return web.json_response({"worker": worker.name})

        async with world(1, behaviour=slow) as made:
            [worker] = made.service.registry
            running = asyncio.get_running_loop().create_task(made.generate())
            await made.until(lambda: made.workers[0].running == 1)
            await made.call("DELETE", f"/workers/{worker.worker_id}")
            assert (await running)[0] == 200
            assert (await made.generate())[0] == 503

    run(scenario)


def test_only_workers_of_the_model_are_asked_for_it() -> None:
    async def scenario() -> None:
        async with world(2, wait=False) as made:
            made.workers[1].model = "other"
            await made.until(lambda: made.healthy() == 2)
            models = {worker.model_id for worker in made.service.registry}
            if models != {"tiny", "other"}:  # it was asked before the line above
                for worker in made.service.registry:
                    made.service.registry.learn(worker, await made.service.health.describe(worker))
            for model, name in (("tiny", "w0"), ("other", "w1")) * 3:
                assert (await made.generate({"text": "x", "model": model}))[1]["worker"] == name
            names = {
                (await made.generate({"text": "x", "model": "?"}))[1]["worker"] for _ in "1234"
            }
            assert names == {"w0", "w1"}

    run(scenario)


def test_fan_out_reaches_all_and_tells_of_failures() -> None:
    async def scenario() -> None:
        async with world(3) as made:
            status, answer, _headers = await made.call("POST", "/flush_cache")
            assert (status, answer["workers_flushed"], answer["total_workers"]) == (200, 3, 3)
            assert all(worker.served("/flush_cache") == 1 for worker in made.workers)

            async def refuse(_worker: FakeWorker, _request: web.Request) -> web.StreamResponse:
                return web.Response(status=500)

            made.workers[1].behaviour = refuse
            status, answer, _headers = await made.call("POST", "/flush_cache")
            assert (status, answer["status"]) == (206, "partial_success")
            assert answer["failed"] == [[made.workers[1].url, "HTTP status 500"]]
            status, answer, _headers = await made.call("POST", "/abort_request", {"rid": "r"})
            assert (status, answer["status"]) == (207, "partial")
            assert json.loads(made.workers[0].requests[-1][3]) == {"rid": "r"}

    run(scenario)


def test_metrics_of_workers_are_merged_with_their_addresses() -> None:
    text = '# HELP a words\n# TYPE a counter\na{x="1"} 2\na 3\n'
    merged = merge_metrics([("http://u", text), ("http://v", text)])
    assert merged.count("# TYPE a counter") == 1
    assert 'a{worker_addr="http://u",x="1"} 2\n' in merged
    assert 'a{worker_addr="http://v"} 3\n' in merged


def test_worker_options_are_checked() -> None:
    assert worker_options({"disable_health_check": True}, adding=True) == {"check_health": False}
    for bad in ({"priority": 101}, {"priority": True}, {"labels": {"a": 1}}, {"worker_type": "x"}):
        with pytest.raises(ApiError):
            worker_options(bad, adding=True)


# The /symphony routes --------------------------------------------------------------------------


def symphonic(known: dict[str, str]):  # type: ignore[no-untyped-def]
    """Behaviour of a worker that knows the sessions whose value in `known` is its name."""

    async def behaviour(worker: FakeWorker, request: web.Request) -> web.StreamResponse:
        if request.path == "/symphony/advise":
            body = await request.json()
            actions = body.get("actions") or [{"payload": body}]
            receipts = []
            for action in actions:
                session = action["payload"].get("session_id")
                found = known.get(session) == worker.name
                receipts.append(
                    {
                        "advisory_id": f"{worker.name}-{session}",
                        "action_id": action.get("action_id"),
                        "status": "accepted" if found else "missing",
                        "reason": None,
                        "session_id": session,
                        "state": "queued" if found else "failed",
                        "tokens": {"total": 160 if found else 0},
                    }
                )
            return web.json_response({"message_id": "x", "receipts": receipts}, status=202)
        if request.path.startswith("/symphony/"):
            name = request.path.rpartition("/")[2]
            mine = known.get(name) == worker.name or name.startswith(f"{worker.name}-")
            return web.json_response({"name": name} if mine else {}, status=200 if mine else 404)
        return web.json_response({"worker": worker.name})

    return behaviour


def domain_of(made: World, name: str) -> str:
    [url] = [worker.url for worker in made.workers if worker.name == name]
    return worker_id_of(url)


def settle(made: World, session: str, name: str) -> None:
    """As if the worker's feed had told of a turn of `session`."""
    made.service.placement.index.session_turn(domain_of(made, name), session, 160, None, 1, 1)


def test_advisories_follow_the_session() -> None:
    async def scenario() -> None:
        known = {"s0": "w0", "s1": "w1"}
        async with world(2, behaviour=symphonic(known), policy="symphony") as made:
            for session, name in known.items():
                settle(made, session, name)
                body = {"session_id": session, "expected_in_s": 1}
                status, answer, _headers = await made.call("POST", "/symphony/advise", body)
                assert status == 202
                [receipt] = answer["receipts"]
                assert receipt["worker"] == domain_of(made, name)
                assert (receipt["status"], receipt["tokens"]["peer"]) == ("accepted", 0)
                assert (await made.generate({"text": "x", "session_id": session}))[1] == {
                    "worker": name
                }
                path = f"/symphony/advisories/{name}-{session}"
                assert (await made.call("GET", path))[1]["worker"] == domain_of(made, name)
                assert (await made.call("DELETE", path))[0] == 200
                found = (await made.call("GET", f"/symphony/sessions/{session}"))[1]
                assert found["worker"] == domain_of(made, name)
                assert (await made.call("DELETE", f"/symphony/sessions/{session}"))[0] == 200
            assert (await made.call("GET", "/symphony/sessions/other"))[0] == 404
            assert (await made.call("GET", "/symphony/advisories/other"))[0] == 404

    run(scenario)


def test_advisory_of_another_router_is_found_by_asking_all() -> None:
    async def scenario() -> None:
        async with world(3, behaviour=symphonic({"s": "w2"})) as made:
            assert (await made.call("GET", "/symphony/advisories/w2-s"))[0] == 200
            assert (await made.call("GET", "/symphony/sessions/s"))[0] == 200

    run(scenario)


@pytest.mark.parametrize(
    ("body", "named"),
    [({}, "session_id"), ({"session_id": "s", "odd": 1}, "odd"), ([], "body"),
     ({"session_id": "s", "expected_in_s": -1}, "expected_in_s"),
     ({"protocol_version": "9"}, "protocol_version"), ({"actions": 5}, "protocol_version")],
)  # fmt: skip
def test_malformed_hints_name_the_field(body: Any, named: str) -> None:
    async def scenario() -> None:
        async with world(1, behaviour=symphonic({})) as made:
            status, answer, _headers = await made.call("POST", "/symphony/advise", body)
            assert status == 400
            assert named in answer["error"]["message"]
            assert made.workers[0].served("/symphony/advise") == 0

    run(scenario)


def test_residency_has_one_entry_for_each_worker() -> None:
    async def scenario() -> None:
        async with world(2) as made:
            _status, answer, _headers = await made.call("GET", "/symphony/residency")
            assert [entry["url"] for entry in answer["workers"]] == [w.url for w in made.workers]
            assert answer["moves"] == []
            async with made.client.get(made.url + "/symphony/events?interval_s=0.2") as events:
                assert events.headers["content-type"] == "text/event-stream"
                for _ in range(2):
                    event = await events.content.readuntil(b"\n\n")
                    assert event.startswith(b"event: residency\ndata: {")
            assert (await made.call("GET", "/symphony/events?interval_s=0.01"))[0] == 400
            assert (await made.call("POST", "/symphony/migrate", {}))[0] == 400

    run(scenario)


def test_pages_of_a_feed_decide_the_place() -> None:
    async def scenario() -> None:
        async with world(3, policy="symphony") as made:
            ids = list(range(100, 740))
            placement = made.service.placement
            hashes = placement.tokens.tokens(Prompt(input_ids=ids), [16]).page_hashes[16]
            placement.index.stored(domain_of(made, "w2"), Level.DEVICE, hashes.tolist())
            for _ in range(3):
                status, answer = await made.generate({"input_ids": [*ids, 5]})
                assert (status, answer["worker"]) == (200, "w2")

    run(scenario)


def test_a_view_is_made_anew_only_where_something_changed() -> None:
    async def scenario() -> None:
        async with world(3, policy="symphony") as made:
            placement, domain = made.service.placement, domain_of(made, "w1")
            before = {view.worker_id: view for view in placement.views()}
            placement.tick()
            assert all(view is before[view.worker_id] for view in placement.views())
            placement.learn_peer_rate(domain, Rate(5000.0))
            after = {view.worker_id: view for view in placement.views()}
            assert [name for name, view in after.items() if view is not before[name]] == [domain]
            assert after[domain].rates.peer_to_host == Rate(5000.0)
            made.service.registry.update(made.service.registry.get(domain), draining=True)
            states = {view.worker_id: view.state.value for view in placement.views()}
            assert states == {**dict.fromkeys(before, "ready"), domain: "draining"}

    run(scenario)


def test_memory_of_advisories_is_bounded_and_expires() -> None:
    memory = AdvisoryMemory(advisories_max=10, sessions_max=10)
    for number in range(50):
        name = f"a{number}"
        memory.remember(Advisory(name, "w", name, 100.0))
        memory.promise(name, AdvisedPlace("w", number, 1.0), 100.0 + number)
        memory.check()
    assert memory.find("a0") is None
    assert memory.find("a49") is not None
    for tokens, worker in ((5, "v"), (9, "u"), (1, "t"), (2, "r"), (3, "q")):
        memory.promise("a49", AdvisedPlace(worker, tokens, 1.0), 500.0)
    assert [place.worker_id for place in memory.places("a49", 120.0)] == ["u", "q", "r", "t"]
    memory.withdraw("a49", "u")
    assert "u" not in {place.worker_id for place in memory.places("a49", 120.0)}
    memory.expire(1000.0)
    assert memory.places("a49", 120.0) == ()
    memory.check()


@pytest.mark.parametrize("path", ["/generate", "/v1/messages", "/v1/responses"])
def test_without_token_ids_texts_follow_their_heads(path: str) -> None:
    async def scenario() -> None:
        def body(text: str) -> dict[str, Any]:
            if path == "/generate":
                return {"text": text}
            if path == "/v1/responses":
                return {"input": text}
            return {"system": text, "messages": [{"role": "user", "content": "short"}]}

        async with world(3, policy="symphony") as made:
            texts = [f"{name}: " + f"a long text of {name} " * 100 for name in "abcdef"]
            homes = [(await made.call("POST", path, body(text)))[1]["worker"] for text in texts]
            assert len(set(homes)) > 1
            for _ in range(2):
                for text, home in zip(texts, homes, strict=True):
                    more = body(text + " and what came after it")
                    assert (await made.call("POST", path, more))[1]["worker"] == home

    run(scenario)


def test_text_pages_are_counted_and_bounded() -> None:
    index = LocationIndex()
    pages = TextPages(index, pages_max=60)
    shared = "the same head " * 40
    hashes = {name: text_hashes(shared + name * 300, 16, NO_NAMESPACE) for name in "abcdefgh"}
    for name, chain in hashes.items():
        pages.sent("w", chain)
        pages.check()
        assert index.match(chain)["w"].device_pages == len(chain), name
    # The first prompts went, but not the head that the last ones share with them.
    assert 0 < index.match(hashes["a"])["w"].device_pages < len(hashes["a"])
    other = text_hashes(shared, 16, Namespace("other", None))
    assert "w" not in index.match(other)
    pages.cleared("w")
    pages.check()
    assert "w" not in index.match(hashes["h"])


def test_a_feed_is_followed_and_malformed_frames_harm_nobody() -> None:
    async def scenario() -> None:
        with zmq.Context() as context, context.socket(zmq.PUB) as publisher:
            port = publisher.bind_to_random_port("tcp://127.0.0.1")
            async with world(2, policy="symphony", events_port=port) as made:
                index = made.service.placement.index
                domain = domain_of(made, "w0")
                ids = list(range(500, 820))
                hashes = event_hashes(pack_tokens(ids), 16).tolist()

                def publish(sequence: int, payload: bytes) -> None:
                    publisher.send_multipart([b"", sequence.to_bytes(8, "big"), payload])

                def stored(part: list[int], parent: int | None) -> bytes:
                    event = BlockStored(part, parent, [], 16, None, medium="GPU")
                    return msgspec.msgpack.encode(EventBatch(0.0, [event]))

                # Messages sent before the subscription has arrived are lost, as ever with PUB.
                for sequence in range(100):
                    publish(sequence, stored(hashes, None))
                    await asyncio.sleep(0.02)
                    if index.match(hashes):
                        break
                assert index.match(hashes)[domain].device_pages == len(hashes)
                body = {"input_ids": [*ids, 1]}
                assert (await made.generate(body))[1]["worker"] == "w0"
                for junk in (
                    b"",
                    b"\xff" * 50,
                    b"\x93\x01\x02\x03",
                    msgspec.msgpack.encode([1, 2]),
                ):
                    sequence += 1
                    publish(sequence, junk)
                publisher.send_multipart([b"only one frame"])
                publisher.send_multipart([b"", b"short", b""])
                await asyncio.sleep(0.3)
                assert (await made.generate(body))[0] == 200
                # And it goes on following.
                other = event_hashes(pack_tokens(list(range(900, 1220))), 16).tolist()
                for _ in range(100):
                    sequence += 1
                    publish(sequence, stored(other, None))
                    await asyncio.sleep(0.02)
                    if index.match(other):
                        break
                assert index.match(other)[domain].device_pages == len(other)
                made.service.feeds.tick()
                # What a lost message may have said is forgotten with the rest.
                held = sum(index.has(domain, Level.DEVICE, page) for page in [*hashes, *other])
                for level, pages in (("device", held), ("nvme", 0)):
                    labels = {"worker": domain, "level": level}
                    name = "symphony:location_index_pages"
                    shown = made.service.metrics.registry.get_sample_value(name, labels)
                    assert shown == pages

    run(scenario)


def test_ranks_are_told_apart_and_named_in_the_body() -> None:
    async def scenario() -> None:
        async with world(2, policy="symphony", ranks=2) as made:
            first, second = (worker.worker_id for worker in made.service.registry)
            views = [view.worker_id for view in made.service.placement.views()]
            assert views == [f"{first}@0", f"{first}@1", f"{second}@0", f"{second}@1"]
            ids = list(range(640))
            hashes = event_hashes(pack_tokens(ids), 16).tolist()
            made.service.placement.index.stored(f"{second}@1", Level.DEVICE, hashes)
            assert (await made.generate({"input_ids": ids}))[1]["worker"] == "w1"
            sent = json.loads(made.workers[1].requests[-1][3])
            assert sent == {"routed_dp_rank": 1, "input_ids": ids}
            # What the caller names stands, in the body and in the header.
            await made.generate({"input_ids": ids, "routed_dp_rank": 0})
            assert made.workers[1].requests[-1][3].count(b"routed_dp_rank") == 1
            _status, answer = await made.generate(
                {"input_ids": ids}, headers={"X-Data-Parallel-Rank": "0"}
            )
            worker = next(w for w in made.workers if w.name == answer["worker"])
            _method, _path, headers, body = worker.requests[-1]
            assert headers["x-data-parallel-rank"] == "0"
            assert json.loads(body)["routed_dp_rank"] == 0
            chat = {"messages": [], "model": "tiny"}
            path, named = "/v1/chat/completions", {"X-Data-Parallel-Rank": "1"}
            await made.call("POST", path, chat, headers=named)
            bodies = [r[3] for w in made.workers for r in w.requests if r[1] == path]
            assert [json.loads(body) for body in bodies] == [chat]
            status, answer = await made.generate(headers={"X-Data-Parallel-Rank": "x"})
            assert (status, answer["error"]["code"]) == (400, "invalid_rank")

    run(scenario)


def test_a_stored_answer_is_found_at_the_worker_that_keeps_it() -> None:
    async def scenario() -> None:
        async def keep(worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            mine = request.path.endswith("w2")
            return web.json_response({"worker": worker.name}, status=200 if mine else 404)

        async def other(worker: FakeWorker, request: web.Request) -> web.StreamResponse:
            return web.json_response({"error": "not here"}, status=404)

        async with world(3, behaviour=other) as made:
            made.workers[2].behaviour = keep
            assert (await made.call("GET", "/v1/responses/w2"))[1] == {"worker": "w2"}
            assert (await made.call("GET", "/v1/responses/other"))[0] == 404

    run(scenario)
