"""The live page in a real browser, on real workers; SYMPHONY_SHOTS names a folder for shots."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import Page, find_browser
from prompts import mixed_prompts
from test_advisories import advise, receipt_in, seat_session

from conftest import API_KEY, DEVICE_TOKENS, Server
from symphony_sglang import ui

pytestmark = pytest.mark.server

STATE = "document.getElementById('state')?.dataset.state"
WIDER = "document.documentElement.scrollWidth > document.documentElement.clientWidth"


def shots(tmp_path: Path) -> Path:
    folder = Path(os.environ.get("SYMPHONY_SHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def test_page_needs_no_key_and_its_data_does(keyed_worker: Server) -> None:
    with urllib.request.urlopen(f"{keyed_worker.url}/symphony/ui", timeout=30) as answer:
        assert answer.status == 200
        assert answer.read() == ui.page()
        assert "script-src 'sha256-" in answer.headers["Content-Security-Policy"]
    for path in ("/symphony/events", "/symphony/residency", "/symphony/ui/"):
        assert keyed_worker.call("GET", path).status in (401, 307), path
    assert keyed_worker.call("GET", "/symphony/ui/../residency").status == 401
    assert keyed_worker.call("POST", "/symphony/ui").status == 401


def events(server: Server, count: int, query: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    name = ""
    url = f"{server.url}/symphony/events{query}"
    with urllib.request.urlopen(url, timeout=30) as answer:
        assert answer.headers["Content-Type"].startswith("text/event-stream")
        for line in answer:
            if line.startswith(b"event:"):
                name = line[6:].strip().decode()
            elif line.startswith(b"data:"):
                found.append((name, json.loads(line[5:])))
                if len(found) == count:
                    return found
    return found


def test_events_tell_the_residency_again_and_again(worker: Server) -> None:
    worker.flush()
    found = events(worker, 3, "?interval_s=0.2")
    assert [name for name, _ in found] == ["residency"] * 3
    assert found[-1][1].keys() == worker.residency().keys()
    for query in ("?interval_s=0", "?interval_s=nan", "?interval_s=x", "?interval_s=61"):
        assert worker.call("GET", f"/symphony/events{query}").status in (400, 422), query


def ledger(worker: Server) -> dict[str, Any]:
    return dict(worker.residency()["counters"]["advisories"])


def text_of(element_id: str) -> str:
    return f"document.getElementById({element_id!r}).innerText"


PREFIXES = (
    "[...document.querySelectorAll('#hot tbody td:first-child')].map((c) => c.innerText).join()"
)


def test_page_shows_a_worker_under_load(worker: Server, tmp_path: Path) -> None:
    """What stands on the page is what the worker, which others used before, says of itself."""
    find_browser()
    worker.flush()
    before = ledger(worker)
    ids = seat_session(worker, "page-0", 59)
    used = advise(worker, session_id="page-0")
    receipt_in(worker, used["advisory_id"], "ready")
    for _ in range(3):
        worker.greedy_one([*ids, 301], 1, session_id="page-0")
    receipt_in(worker, used["advisory_id"], "used")
    seat_session(worker, "page-1", 60)
    turns = worker.call("GET", "/symphony/sessions/page-1").body["turns"]

    def announce() -> str:
        receipt = advise(worker, session_id="page-1")
        receipt_in(worker, receipt["advisory_id"], "ready")
        return str(receipt["advisory_id"])

    async def look() -> str:
        async with Page(tmp_path) as page:
            await page.scheme("light")
            await page.open(f"{worker.url}/symphony/ui")
            await page.until(f"{STATE} === 'live'")
            await page.until("document.querySelectorAll('.worker').length === 1")
            load = asyncio.to_thread(
                worker.greedy, mixed_prompts(12, seed=61, vocab=32_000, longest=1500), 64
            )
            await asyncio.gather(load, asyncio.sleep(4))
            advisory_id = await asyncio.to_thread(announce)
            label = await page.value(
                "document.querySelector('.row[data-level=device] .num').innerText"
            )
            assert f"of {DEVICE_TOKENS} tokens" in label
            now = await asyncio.to_thread(ledger, worker)
            assert now["live"] == before["live"] + 1
            leads = sum(now["lead_seconds"]["counts"])
            assert leads == sum(before["lead_seconds"]["counts"]) + 1
            await page.until(f"{text_of('live')} === '{now['live']} live'")
            await page.until(f"{text_of('leadnote')}.endsWith(' s of {leads}')")
            hot = (await asyncio.to_thread(worker.residency))["hot_prefixes"][:10]
            assert hot
            await page.until(f"{PREFIXES} === '{','.join(each['prefix'] for each in hot)}'")
            await page.submit("#session", "page-1")
            await page.until(f"{text_of('found')}.includes('idle')")
            found = await page.value(text_of("found"))
            assert f"{turns} turn" in found
            assert advisory_id in found
            assert "ready" in found
            await page.submit("#session", "nobody")
            await page.until(f"{text_of('problem')}.includes('No session')")
            folder = shots(tmp_path)
            for scheme, width in (("light", 1280), ("dark", 1280), ("light", 400), ("dark", 400)):
                await page.scheme(scheme)
                await page.resize(width, 900)
                await asyncio.sleep(1.2)
                assert not await page.value(WIDER), (scheme, width)
                await page.screenshot(folder / f"worker-{scheme}-{width}.png")
            # The search for nobody is a 404, which the browser logs.
            assert [p for p in page.problems if "/sessions/" not in p] == []
            return advisory_id

    advisory_id = asyncio.run(look())
    assert worker.call("DELETE", f"/symphony/advisories/{advisory_id}").status == 200


def test_page_asks_for_the_key_and_keeps_it_for_the_tab(
    keyed_worker: Server, tmp_path: Path
) -> None:
    async def look() -> None:
        async with Page(tmp_path) as page:
            await page.open(f"{keyed_worker.url}/symphony/ui")
            await page.until(f"{STATE} === 'key'")
            await page.submit("#key", "wrong")
            await page.until("document.getElementById('state')?.innerText.includes('wrong')")
            await page.submit("#key", API_KEY)
            await page.until(f"{STATE} === 'live'")
            assert await page.value("document.getElementById('keyform').hidden")
            assert await page.value("document.getElementById('key').value") == ""
            await page.open(f"{keyed_worker.url}/symphony/ui")
            await page.until(f"{STATE} === 'live'")
            assert await page.value("localStorage.length") == 0

    find_browser()
    asyncio.run(look())


LEVEL = {"total_tokens": 8192, "used_tokens": 5000, "protected_tokens": 900}
HOSTILE = "<img src=x onerror='document.title=1'>"


def router_body(step: int) -> dict[str, Any]:
    """What a router of three workers tells, in the shape that our contract gives it."""
    ledger = {
        "live": 2,
        "sessions": 7,
        "statuses": {"accepted": 40, "duplicate": 5},
        "outcomes": {"used": 30 + step, "late": 2, "wasted": 1},
        "lead_seconds": {"bounds": [0.1, 1.0, 10.0], "counts": [3, 12, 9, 1], "sum": 61.0},
    }
    return {
        "workers": [
            {
                "worker": name,
                "url": "http://127.0.0.1:1",
                "state": "healthy",
                "levels": {
                    "device": {**LEVEL, "used_tokens": 1000 * (index + step % 5)},
                    "host": {**LEVEL, "total_tokens": 40_000, "used_tokens": 20_000},
                    "nvme": {"total_bytes": 10**9, "used_bytes": 10**8 * index},
                },
                "counters": {"advisories": ledger},
                "hot_prefixes": [{"prefix": "00ff00ff00ff00ff", "tokens": 512, "requests": 9}],
            }
            for index, name in enumerate(("w1", "w2", HOSTILE))
        ],
        "moves": [
            {
                "move_id": f"m{index}",
                "session_id": HOSTILE if index == 2 else f"session-{index}",
                "from": "w1",
                "to": ("w2", HOSTILE)[index % 2],
                "state": "done" if index else "failed",
                "tokens": 1600,
            }
            for index in range(5)
        ],
    }


@pytest.fixture
def router_stand_in() -> Iterator[str]:
    """Only the shape of a router's stream: what the page makes of it is the subject."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            if self.path == "/symphony/ui":
                self.send_header("Content-Type", ui.MEDIA_TYPE)
                for name, value in ui.page_headers().items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(ui.page())
                return
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            for step in range(100):
                data = json.dumps(router_body(step))
                try:
                    self.wfile.write(f"event: residency\ndata: {data}\n\n".encode())
                except OSError:
                    return
                if stopping.wait(0.1):
                    return

        def log_message(self, *_: object) -> None:
            pass

    stopping = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    stopping.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_page_draws_moves_between_workers_and_runs_no_foreign_markup(
    router_stand_in: str, tmp_path: Path
) -> None:
    async def look() -> None:
        async with Page(tmp_path) as page:
            await page.open(f"{router_stand_in}/symphony/ui")
            await page.until("document.querySelectorAll('.worker').length === 3")
            assert await page.value("document.querySelectorAll('#arrows svg > path').length") == 2
            assert await page.value("document.querySelectorAll('#arrows svg circle').length") == 3
            assert await page.value("document.querySelectorAll('#lead b').length") == 4
            text = await page.value("document.body.innerText")
            assert HOSTILE in text
            assert "00ff00ff00ff00ff" in text
            assert await page.value("document.querySelectorAll('img').length") == 0
            assert await page.value("document.title") == "symphony"
            folder = shots(tmp_path)
            for scheme, width in (("light", 1280), ("dark", 400)):
                await page.scheme(scheme)
                await page.resize(width, 900)
                await asyncio.sleep(0.5)
                assert not await page.value(WIDER), (scheme, width)
                await page.screenshot(folder / f"router-{scheme}-{width}.png")
            assert page.problems == []

    find_browser()
    asyncio.run(look())
