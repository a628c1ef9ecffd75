"""A session moved to another worker beside the same session promoted from local NVMe; and what the
move costs requests that decode on its source. Two real workers and a router.

    python -m benchmark.migrate_serve [--tokens 3000] [--rounds 8] [--output DIR]

Each round seats a fresh session on one worker, empties the caches, and promotes it from that
worker's NVMe level to its device (an advisory, until its receipt says ready); empties the caches
again, and moves it to the other worker (a move, until the advisory that the move leaves there says
ready). Both are timed from the call to the answer that says so, asked every few milliseconds; a
ratio is taken within its round. Then requests decode on one worker in windows with and without
moves of other sessions away from it, in turn; the ratio is of the mean time of a token.

The source has half of the cores for itself; the other worker, the router and this process share the
rest, as the work of another machine must not count as the source's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmark.environment import describe_environment
from benchmark.servers import Levels, cores_of, server
from symphony_sglang.clock import SystemClock
from symphony_sglang.workload.conversation import ask, flush
from symphony_sglang.workload.demo_move import TARGET_HEADER
from symphony_sglang.workload.generate_client import GenerateClient
from symphony_sglang.workload.tiny_model import make_tiny_model
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

VOCAB = 8000
LAYERS, HIDDEN = 4, 256
POLL_SECONDS = 0.003
# Beside requests that decode the questions themselves should cost nothing to speak of.
GENTLE_POLL_SECONDS = 0.1
WAIT_SECONDS_MAX = 60.0
RATIO_GOAL, SLOWDOWN_GOAL = 3.0, 1.03
WARM_UP_ROUNDS = 1

console = Console()
clock = SystemClock()


class Pair:
    """Clients of two workers, by their places at the router, and of the router itself."""

    def __init__(
        self,
        front: GenerateClient,
        pinned: list[GenerateClient],
        direct: list[GenerateClient],
        ids: list[str],
    ) -> None:
        self.front, self.pinned, self.direct, self.ids = front, pinned, direct, ids

    async def seat(self, name: str, tokens: int, home: int) -> list[int]:
        """A session after a turn of one token; its prompt."""
        generator = random.Random(name)
        prompt = [generator.randrange(300, VOCAB) for _ in range(tokens)]
        await ask(self.pinned[home], prompt, 1, session_id=name, salt=None)
        return prompt

    async def until_ready(
        self, client: GenerateClient, advisory_id: str, poll: float = POLL_SECONDS
    ) -> dict[str, Any]:
        """The receipt of an advisory that got its pages to the device.

        Raises:
            RuntimeError: it ended otherwise, or not in a minute.
        """
        receipt: dict[str, Any] = {}
        began = clock.monotonic()
        while clock.monotonic() - began < WAIT_SECONDS_MAX:
            _status, receipt = await client.ask("GET", f"/symphony/advisories/{advisory_id}")
            if receipt.get("state") in ("ready", "used"):
                return dict(receipt)
            if receipt.get("state") in ("failed", "expired", "cancelled"):
                break
            await asyncio.sleep(poll)
        raise RuntimeError(f"advisory {advisory_id} is not ready: {receipt}")

    async def promote(self, name: str, home: int) -> float:
        """Seconds from the hint, given to its worker itself, to the session on the device."""
        worker = self.direct[home]
        began = clock.monotonic()
        _status, answer = await worker.ask("POST", "/symphony/advise", {"session_id": name})
        [receipt] = answer["receipts"]
        await self.until_ready(worker, receipt["advisory_id"])
        return clock.monotonic() - began

    async def move(
        self, name: str, to: int, poll: float = POLL_SECONDS
    ) -> tuple[float, dict[str, Any]]:
        """Seconds from the call to the session on its new worker's device, and the record."""
        began = clock.monotonic()
        body = {"session_id": name, "to": self.ids[to]}
        while True:
            status, record = await self.front.ask("POST", "/symphony/migrate", body)
            if status == 202:
                break
            if status != 404 or clock.monotonic() - began > WAIT_SECONDS_MAX:
                raise RuntimeError(f"the move is refused: {status} {record}")
            await asyncio.sleep(POLL_SECONDS)
            began = clock.monotonic()
        await self.until_ready(self.direct[to], f"adv-{record['move_id']}", poll)
        seconds = clock.monotonic() - began
        _status, record = await self.front.ask("GET", f"/symphony/moves/{record['move_id']}")
        return seconds, dict(record)

    async def end(self, name: str) -> None:
        """Its protected pages would keep the next sessions from the device."""
        await self.front.ask("DELETE", f"/symphony/sessions/{name}")


async def transfer_round(pair: Pair, tokens: int, home: int) -> dict[str, Any]:
    """One session: promoted from NVMe where it is, then moved."""
    name = f"round-{uuid.uuid4().hex}"
    await pair.seat(name, tokens, home)
    await flush(pair.front)
    promote_seconds = await pair.promote(name, home)
    await flush(pair.front)
    move_seconds, record = await pair.move(name, 1 - home)
    await pair.end(name)
    return {
        "promote_seconds": promote_seconds,
        "move_seconds": move_seconds,
        "ratio": move_seconds / promote_seconds,
        "bytes": record["bytes"],
        "timeline": record["timeline"],
    }


async def decode_window(
    pair: Pair, prompt: list[int], answer_tokens: int, moving: list[str]
) -> dict[str, Any]:
    """Mean seconds of an output token of a request on worker 0, with moves away from it or none."""
    moves = 0
    async with asyncio.TaskGroup() as group:
        name = uuid.uuid4().hex
        turn = ask(pair.pinned[0], prompt, answer_tokens, session_id=name, salt=None)
        running = group.create_task(turn)
        for session in moving:
            if running.done():
                break
            await pair.move(session, 1, GENTLE_POLL_SECONDS)
            moves += not running.done()
            await pair.end(session)
    result = running.result()
    assert result.tpot_seconds is not None
    return {"tpot_seconds": result.tpot_seconds, "moves": moves}


async def measure(url: str, options: argparse.Namespace) -> dict[str, Any]:
    async with contextlib.AsyncExitStack() as stack:
        front = await stack.enter_async_context(GenerateClient(url, clock=clock))
        _status, listed = await front.ask("GET", "/workers")
        ids = [entry["id"] for entry in listed["workers"]]
        pinned = [
            await stack.enter_async_context(
                GenerateClient(url, clock=clock, headers={TARGET_HEADER: worker})
            )
            for worker in ids
        ]
        direct = [
            await stack.enter_async_context(GenerateClient(entry["url"], clock=clock))
            for entry in listed["workers"]
        ]
        pair = Pair(front, pinned, direct, ids)
        for number in range(WARM_UP_ROUNDS):
            await transfer_round(pair, options.tokens, number % 2)
        transfers = [
            await transfer_round(pair, options.tokens, number % 2)
            for number in range(options.rounds)
        ]
        windows = []
        for _number in range(options.windows):
            names = [f"away-{uuid.uuid4().hex}" for _ in range(options.moves)]
            for name in names:
                await pair.seat(name, options.tokens, 0)
            generator = random.Random(7)
            prompt = [generator.randrange(300, VOCAB) for _ in range(512)]
            quiet = await decode_window(pair, prompt, options.answer_tokens, [])
            loud = await decode_window(pair, prompt, options.answer_tokens, names)
            ratio = loud["tpot_seconds"] / quiet["tpot_seconds"]
            windows.append({"quiet": quiet, "moving": loud, "ratio": ratio})
    return {"transfers": transfers, "windows": windows}


@contextlib.asynccontextmanager
async def running_pair(options: argparse.Namespace, folder: Path) -> AsyncIterator[str]:
    """Two workers and a router; the router's URL."""
    model = folder / "model"
    make_tiny_model(model, layers=LAYERS, hidden=HIDDEN, vocab=VOCAB, seed=0)
    levels = Levels(device_tokens=8 * options.tokens // 16 * 16, host_gb=1.0, nvme_gb=4.0)
    with contextlib.ExitStack() as stack:
        workers = []
        for number in range(2):
            directory = folder / f"worker-{number}"
            directory.mkdir()
            flags = ("--symphony-grace", "0", "--symphony-break-even", "0")
            worker = server("symphony", model, levels, directory, flags=flags)
            with cores_of(number, 2):
                workers.append(stack.enter_context(worker))
        for worker in workers:
            worker.wait_ready()
        stack.enter_context(cores_of(1, 2))
        port = free_port()
        command = [
            *(sys.executable, "-m", "symphony_sglang.launch_router", "--prometheus-port", "0"),
            *("--host", "127.0.0.1", "--port", str(port), "--model-path", str(model)),
            *("--worker-urls", *(worker.url for worker in workers)),
        ]
        router = WorkerProcess(
            (), command=command, port=port, log_path=folder / "router.log", clock=clock
        )
        stack.enter_context(router)
        router.wait_ready()
        async with GenerateClient(router.url, clock=clock) as client:
            ready: Any = {}
            while not isinstance(ready, dict) or ready.get("healthy_workers") != 2:
                _status, ready = await client.ask("GET", "/readiness")
                await asyncio.sleep(0.1)
        yield router.url


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """Median, lowest and highest, beside the goals."""

    def spread(values: list[float], goal: float | None = None) -> dict[str, float]:
        figures = {
            "median": round(statistics.median(values), 5),
            "min": round(min(values), 5),
            "max": round(max(values), 5),
        }
        return figures if goal is None else {**figures, "goal": goal}

    transfers, windows = found["transfers"], found["windows"]
    return {
        "promote_seconds": spread([one["promote_seconds"] for one in transfers]),
        "move_seconds": spread([one["move_seconds"] for one in transfers]),
        "move_to_promotion": spread([one["ratio"] for one in transfers], RATIO_GOAL),
        "quiet_tpot_seconds": spread([one["quiet"]["tpot_seconds"] for one in windows]),
        "decode_slowdown": spread([one["ratio"] for one in windows], SLOWDOWN_GOAL),
        "moves_in_a_window": spread([one["moving"]["moves"] for one in windows]),
    }


def show(figures: dict[str, Any]) -> None:
    table = Table(title="a session moved, beside its promotion from local NVMe")
    for name in ("figure", "median", "min", "max", "goal"):
        table.add_column(name, justify="left" if name == "figure" else "right")
    for name, values in figures.items():
        table.add_row(
            name, *(str(values.get(part, "")) for part in ("median", "min", "max", "goal"))
        )
    console.print(table)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        async with running_pair(options, Path(folder)) as url:
            return await measure(url, options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of each session")
    parser.add_argument("--rounds", type=int, default=8, help="sessions promoted and moved")
    parser.add_argument(
        "--windows", type=int, default=4, help="of decoding, with moves and without"
    )
    parser.add_argument("--moves", type=int, default=6, help="moves in a window at most")
    parser.add_argument("--answer-tokens", type=int, default=256, help="of a request that decodes")
    parser.add_argument("--output", type=Path, help="directory for the raw samples")
    options = parser.parse_args()
    found = asyncio.run(run(options))
    report = {
        "benchmark": "migrate_serve",
        "settings": {name: str(value) for name, value in vars(options).items()},
        "environment": describe_environment(),
        "summary": summary(found),
        **found,
    }
    show(report["summary"])
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "migrate_serve.json").write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
