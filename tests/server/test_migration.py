"""Sessions that move between two real workers behind the router. Workers are killed at the end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from browser import Page, find_browser
from cluster import GREEDY, TOKENS, Cluster, kill, random_ids, running_cluster, served_by, until
from test_ui import STATE, WIDER, shots, text_of

from conftest import VOCAB, cached, read_to_its_end, start_server

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def cluster(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    yield from running_cluster(model, tmp_path_factory.mktemp("migration"))


def test_session_is_served_from_its_new_workers_device_with_the_same_answer(cluster) -> None:
    prompt = cluster.opened("m1", 1)
    source = cluster.owner("m1")
    target = cluster.other(source)
    record = cluster.moved("m1", target)
    assert record["state"] == "done", record
    assert cluster.name_of(record["from"]) == source
    assert record["bytes"] > 0
    # From the source's memory, where the turn that has just ended left them.
    served = cluster.workers[source].residency()["peer"]["counters"]
    assert served["pages_from_host"] == served["pages"] > 0
    until(lambda: cluster.owner("m1") == target)
    until(lambda: cluster.view("m1").body["tokens"]["device"] >= TOKENS)
    assert [move["move_id"] for move in cluster.view("m1").body["moves"]] == [record["move_id"]]
    assert cluster.workers[source].call("GET", "/symphony/sessions/m1").status == 404
    turn = [*prompt, 301, 302]
    answer = cluster.turn("m1", turn)
    assert cluster.name_of(served_by(answer)) == target
    assert cached(answer.body)["device"] >= TOKENS
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.check_owners()
    cluster.check_idle()


def test_outputs_stay_the_same_over_many_moves(cluster) -> None:
    prompt = cluster.opened("m2", 2)
    for number in range(6):
        target = cluster.other(cluster.owner("m2"))
        record = cluster.moved("m2", target)
        assert record["state"] == "done", record
        until(lambda target=target: cluster.owner("m2") == target)
        prompt = [*prompt, 310 + number, 311]
        answer = cluster.turn("m2", prompt)
        assert cluster.name_of(served_by(answer)) == target
        assert sum(cached(answer.body).values()) >= TOKENS
        assert answer.body["output_ids"] == cluster.computed(prompt)
        prompt += answer.body["output_ids"]
    cluster.check_owners()
    cluster.check_idle()


def test_session_that_decodes_moves_when_its_turn_is_over(cluster) -> None:
    prompt = cluster.opened("m3", 3)
    source = cluster.owner("m3")
    target = cluster.other(source)
    turn = [*prompt, 303]
    with ThreadPoolExecutor() as pool:
        running = pool.submit(cluster.turn, "m3", turn, 200)
        loads = cluster.workers[source]
        until(lambda: loads.call("GET", "/v1/loads").body["loads"][0]["num_running_reqs"] > 0)
        record = cluster.moved("m3", target)
        answer = running.result()
    assert record["state"] == "done", record
    assert cluster.name_of(served_by(answer)) == source
    assert answer.body["output_ids"] == cluster.computed(turn, 200)
    longer = [*turn, *answer.body["output_ids"], 304]
    until(lambda: cluster.owner("m3") == target)
    later = cluster.turn("m3", longer)
    # What the turn added came along.
    assert cluster.name_of(served_by(later)) == target
    assert sum(cached(later.body).values()) >= len(longer) - 48
    assert later.body["output_ids"] == cluster.computed(longer)
    cluster.check_owners()


def test_requests_beside_moves_are_all_served_alike(cluster) -> None:
    prompt = cluster.opened("m4", 4)
    turns = [[*prompt, 400 + number] for number in range(12)]
    expected = [cluster.computed(turn) for turn in turns]
    stop = threading.Event()

    def keep_moving() -> int:
        moves = 0
        while not stop.is_set():
            answer = cluster.migrate("m4", cluster.other(cluster.owner("m4")))
            if answer.status == 202:
                cluster.ended(answer.body["move_id"])
                moves += 1
        return moves

    with ThreadPoolExecutor(4) as pool:
        mover = pool.submit(keep_moving)
        answers = list(pool.map(lambda turn: cluster.turn("m4", turn), turns))
        stop.set()
        assert mover.result() > 0
    assert [answer.body["output_ids"] for answer in answers] == expected
    cluster.check_owners()
    until(lambda: cluster.reserved() == 0)


def test_request_finds_its_pages_pulled_where_it_was_sent(cluster) -> None:
    """No advisory: the caller names another worker, and copying is quicker than computing."""
    prompt = cluster.opened("m5", 5, 3000)
    source = cluster.owner("m5")
    target = cluster.other(source)
    turn = [*prompt, 305]
    body = {
        "input_ids": turn,
        "session_id": "m5",
        "sampling_params": {**GREEDY, "max_new_tokens": 8},
    }
    headers = {"X-SMG-Target-Worker": cluster.ids[target]}
    answer = cluster.front.call("POST", "/generate", body, headers=headers)
    assert cluster.name_of(served_by(answer)) == target
    moves = cluster.view("m5").body["moves"]
    assert [(move["cause"], move["state"]) for move in moves] == [("demand", "done")]
    assert sum(cached(answer.body).values()) >= 2900
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.check_owners()


def demote(cluster: Cluster, session_id: str) -> None:
    """Off the device, to where it was written through."""
    action = {"action_id": "d", "action_type": "demote", "payload": {"session_id": session_id}}
    body = {"protocol_version": "0.1", "message_id": "m", "actions": [action]}

    def done() -> bool:
        answer = cluster.front.call("POST", "/symphony/advise", body)
        return answer.body["receipts"][0]["reason"] != "in_use"

    until(done)
    until(lambda: cluster.view(session_id).body["tokens"]["device"] == 0)


def test_sub_agent_at_another_worker_advises_its_parents_return(cluster) -> None:
    cluster.opened("parent", 11, 400)
    home = cluster.owner("parent")
    away = cluster.other(home)
    demote(cluster, "parent")

    def ask(seed: int, **more: str) -> None:
        headers = {"X-Claude-Code-Session-Id": "parent", "X-Claude-Code-Agent-Id": "1", **more}
        headers["X-SMG-Target-Worker"] = cluster.ids[away]
        body = {
            "input_ids": random_ids(64, seed),
            "sampling_params": {**GREEDY, "max_new_tokens": 2},
        }
        answer = cluster.front.call("POST", "/generate", body, headers=headers)
        assert cluster.name_of(served_by(answer)) == away

    def hints() -> list[str]:
        return [each["action_id"] for each in cluster.view("parent").body["advisories"]]

    ask(12)
    until(lambda: hints() == ["implicit:parent"])
    assert cluster.view("parent").body["tokens"]["device"] == 0, "not before it is its turn"
    ask(13, **{"X-Dynamo-Session-Final": "true"})
    until(lambda: cluster.view("parent").body["tokens"]["device"] >= 400)
    assert cluster.front.call("DELETE", "/symphony/sessions/parent").status == 200


ARROWS = "document.querySelectorAll('#arrows svg > path').length"
COUNTS = (
    "[...document.querySelectorAll('#arrows svg > path + text')].map((t) => +t.textContent)"
    ".reduce((a, b) => a + b, 0)"
)
NEWEST = "document.querySelector('#moves tbody tr:first-child')?.innerText.split(/\\s+/).join(' ')"
USED = (
    "[...document.querySelectorAll('.row[data-level=device] .num')]"
    ".map((node) => parseInt(node.innerText))"
)


def test_page_shows_both_workers_under_load_and_the_moves_between_them(cluster, tmp_path) -> None:
    find_browser()
    cluster.opened("shown", 12)
    target = cluster.other(cluster.owner("shown"))

    def load() -> list[Any]:
        with ThreadPoolExecutor(8) as pool:
            return list(
                pool.map(
                    lambda n: cluster.turn(f"load{n}", random_ids(600, 700 + n), 24), range(16)
                )
            )

    async def look() -> None:
        async with Page(tmp_path) as page:
            await page.open(f"{cluster.front.url}/symphony/ui")
            await page.until(f"{STATE} === 'live'")
            await page.until("document.querySelectorAll('.worker').length === 2")
            loading = asyncio.gather(asyncio.to_thread(load), asyncio.sleep(3))
            record = await asyncio.to_thread(cluster.moved, "shown", target)
            assert record["state"] == "done", record
            answers = (await loading)[0]
            assert {cluster.name_of(served_by(answer)) for answer in answers} == {"a", "b"}
            await until_shown(cluster, page)
            assert all(tokens > 600 for tokens in await page.value(USED))
            await page.submit("#session", "shown")
            await page.until(f"{text_of('found')}.includes(', on {address(cluster, target)}')")
            for scheme, width in (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)):
                await page.scheme(scheme)
                await page.resize(width, 900)
                await asyncio.sleep(0.5)
                assert not await page.value(WIDER), (scheme, width)
                await page.screenshot(shots(tmp_path) / f"moves-{scheme}-{width}.png")
            assert page.problems == []

    asyncio.run(look())


async def until_shown(cluster: Cluster, page: Page) -> None:
    """The arrows and the newest row are those of the router's moves, of which more may come."""
    for _ in range(100):
        answer = await asyncio.to_thread(cluster.front.call, "GET", "/symphony/moves")
        moves = answer.body["moves"]
        assert any(move["session_id"] == "shown" for move in moves), "among the newest 64"
        pairs = {(move["from"], move["to"]) for move in moves}
        newest = "{} {} → {} {} {}".format(*row_of(cluster, moves[-1]))
        expected = [len(pairs), len(moves), newest]
        found = await page.value(f"[{ARROWS}, {COUNTS}, {NEWEST}]")
        if found == expected:
            return
        await asyncio.sleep(0.2)
    raise AssertionError(f"{found}; expected {expected}")


def address(cluster: Cluster, name: str) -> str:
    return cluster.workers[name].url.removeprefix("http://")


def row_of(cluster: Cluster, move: dict[str, Any]) -> tuple[Any, ...]:
    """Session, whence, where to, state and tokens, as people are shown a move."""
    way = [address(cluster, cluster.name_of(move[end])) for end in ("from", "to")]
    return (move["session_id"], *way, move["state"], move["tokens"])


def test_top_lists_both_workers_and_the_moves(cluster) -> None:
    command = [sys.executable, "-m", "symphony_sglang.cli", "top", "--url", cluster.front.url]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = done.stdout.splitlines()
    for name in cluster.ids:
        for level in ("device", "host", "nvme"):
            begin = f"{address(cluster, name)} (ready) {level} used "
            assert any(line.startswith(begin) for line in lines), lines
    moves = cluster.front.call("GET", "/symphony/moves").body["moves"][-8:]
    shown = [line for line in lines if line.startswith("move ")]
    assert shown[-1] == "move {} {} -> {} {} {} tokens".format(*row_of(cluster, moves[-1]))
    assert len(shown) == len(moves)


def test_metrics_count_moves(cluster) -> None:
    text = cluster.front.call("GET", "/metrics").body
    done = [line for line in text.splitlines() if line.startswith("symphony:moves_total{")]
    assert any('outcome="done"' in line for line in done)
    assert "symphony:moves_active 0.0" in text


def test_restarted_router_knows_the_owners(cluster) -> None:
    prompt = cluster.opened("m6", 6)
    target = cluster.other(cluster.owner("m6"))
    assert cluster.moved("m6", target)["state"] == "done"
    # Whoever watches does not hold the router up, and is let go cleanly.
    events = f"{cluster.front.url}/symphony/events?interval_s=60"
    with ThreadPoolExecutor() as pool:
        watching = pool.submit(read_to_its_end, urllib.request.urlopen(events, timeout=60))
        cluster.front.worker.stop()
        assert watching.result() == "whole"
    assert cluster.front.worker.process.returncode == 0
    cluster.start_router("--model-path", str(cluster.model))
    until(lambda: cluster.owner("m6") == target)
    turn = [*prompt, 306]
    answer = cluster.turn("m6", turn)
    assert cluster.name_of(served_by(answer)) == target
    back = cluster.moved("m6", cluster.other(target))
    assert back["state"] == "done", back
    # Its epochs are above those of the router before it.
    assert back["epoch"] >> 16 >= 2
    cluster.check_owners()


@pytest.mark.soak
def test_router_killed_in_the_middle_leaves_one_owner(cluster) -> None:
    prompt = cluster.opened("m7", 7, 3000)
    source = cluster.owner("m7")
    answer = cluster.migrate("m7", cluster.other(source))
    assert answer.status == 202
    os.killpg(cluster.front.worker.process.pid, signal.SIGKILL)
    cluster.front.worker.stop()
    # Nobody renews its lease.
    until(lambda: cluster.reserved() == 0, 15)
    cluster.start_router("--model-path", str(cluster.model))
    until(lambda: cluster.view("m7").status == 200)
    turn = [*prompt, 307]
    assert cluster.turn("m7", turn).body["output_ids"] == cluster.computed(turn)
    assert cluster.moved("m7", cluster.other(cluster.owner("m7")))["state"] == "done"
    cluster.check_owners()


@pytest.mark.soak
def test_target_killed_in_the_middle_leaves_the_session_at_its_source(cluster) -> None:
    prompt = cluster.opened("m8", 8, 3000)
    source = cluster.owner("m8")
    target = cluster.other(source)
    record = cluster.migrate("m8", target).body
    kill(cluster, target)
    record = cluster.ended(record["move_id"])
    turn = [*prompt, 308]
    server = cluster.workers.pop(target)
    answer = cluster.turn("m8", turn)
    assert cluster.name_of(served_by(answer)) == source
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.check_idle()
    cluster.start_worker(target, port=server.worker.port)
    cluster.wait_workers(2)
    assert cluster.moved("m8", cluster.other(cluster.owner("m8")))["state"] == "done"
    cluster.check_owners()
    cluster.check_idle()


def test_drained_worker_hands_its_sessions_off_and_goes(cluster) -> None:
    prompts = {f"d{n}": cluster.opened(f"d{n}", 50 + n, 400) for n in range(4)}
    homes = {name: cluster.owner(name) for name in prompts}
    leaver = max(set(homes.values()), key=list(homes.values()).count)
    stayer = cluster.other(leaver)
    answer = cluster.front.call("POST", f"/workers/{cluster.ids[leaver]}/drain")
    assert (answer.status, answer.body["status"]) == (202, "draining")
    assert answer.body["sessions"] >= 1
    until(lambda: cluster.front.call("GET", f"/workers/{cluster.ids[leaver]}").status == 404, 60)
    for name, prompt in prompts.items():
        assert cluster.owner(name) == stayer
        turn = [*prompt, 309]
        served = cluster.turn(name, turn)
        assert sum(cached(served.body).values()) >= 384, name
        assert served.body["output_ids"] == cluster.computed(turn)
    cluster.check_owners()
    added = cluster.front.call("POST", f"/add_worker?url={cluster.workers[leaver].url}")
    assert added.status == 200, added
    cluster.wait_workers(2)


@pytest.mark.soak
def test_terminated_worker_hands_its_sessions_off_first(cluster) -> None:
    prompts = {f"t{n}": cluster.opened(f"t{n}", 80 + n, 400) for n in range(4)}
    homes = {name: cluster.owner(name) for name in prompts}
    leaver = max(set(homes.values()), key=list(homes.values()).count)
    stayer = cluster.other(leaver)
    server = cluster.workers.pop(leaver)
    process = server.worker.process
    assert process is not None
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    for name, prompt in prompts.items():
        turn = [*prompt, 312]
        served = cluster.turn(name, turn)
        assert cluster.name_of(served_by(served)) == stayer
        assert sum(cached(served.body).values()) >= 384, name
        assert served.body["output_ids"] == cluster.computed(turn)
    server.worker.stop()
    cluster.start_worker(leaver, port=server.worker.port)
    cluster.wait_workers(2)
    entry = cluster.front.call("GET", f"/workers/{cluster.ids[leaver]}").body
    assert entry["draining"] is False
    cluster.check_owners()


@pytest.mark.soak
def test_worker_of_another_model_is_refused(cluster, tmp_path_factory) -> None:
    from symphony_sglang.workload.tiny_model import make_tiny_model

    folder = tmp_path_factory.mktemp("other") / "another"
    make_tiny_model(folder, layers=2, hidden=256, vocab=VOCAB, seed=9)
    cluster.opened("m9", 9)
    stranger = start_server(
        folder, cluster.folder / "stranger.log",
        *("--symphony-nvme-dir", str(cluster.folder / "stranger"), "--symphony-nvme-gb", "0.2"),
        *("--served-model-name", "tiny-again"),
    )  # fmt: skip
    try:
        added = cluster.front.call("POST", f"/add_worker?url={stranger.url}")
        assert added.status == 200
        listed = cluster.front.call("GET", "/workers").body["workers"]
        [stranger_id] = [entry["id"] for entry in listed if entry["url"] == stranger.url]
        body = {"session_id": "m9", "to": stranger_id}
        answer = cluster.front.call("POST", "/symphony/migrate", body)
        assert (answer.status, answer.body["error"]["code"]) == (409, "no_peer_level")
    finally:
        cluster.front.call("POST", f"/remove_worker?url={stranger.url}")
        stranger.worker.stop()
    cluster.check_owners()


@pytest.mark.soak
def test_killed_source_is_followed_by_its_target(cluster) -> None:
    """Last, for it ends a worker."""
    prompt = cluster.opened("m10", 10, 3000)
    source = cluster.owner("m10")
    record = cluster.migrate("m10", cluster.other(source)).body
    kill(cluster, source)
    cluster.workers.pop(source)
    turn = [*prompt, 310]
    answer = cluster.turn("m10", turn)
    assert cluster.name_of(served_by(answer)) != source
    assert answer.body["output_ids"] == cluster.computed(turn)
    cluster.ended(record["move_id"])
    cluster.check_owners()
    until(lambda: cluster.reserved() == 0, 15)
