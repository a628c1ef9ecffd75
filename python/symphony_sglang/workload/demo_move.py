"""The demo's second part: a session moves to the other worker between two turns.

Each session has two turns at one worker. Then it is moved, and its third turn is asked for three
times: of the router, which sends it where the session is now; of the worker it left, whose cache
still has the same prefix; and under a cache salt of its own, so that everything is computed. All
three must give the same greedy tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from symphony_sglang.clock import Clock
from symphony_sglang.errors import ServerUnavailableError
from symphony_sglang.workload.conversation import (
    POLL_SECONDS,
    POLLS_MAX,
    ConversationRules,
    Conversations,
    ask,
)
from symphony_sglang.workload.generate_client import GenerateClient, Generation
from symphony_sglang.workload.replay_report import Source, source_of

if TYPE_CHECKING:
    from rich.table import Table

TARGET_HEADER = "X-SMG-Target-Worker"
MOVED_TURN = 3
READY = ("ready", "used")
OVER = ("done", "aborted")


class Way(Enum):
    """How the third turn's prefix came to be where it was served."""

    RECOMPUTE = "recompute"
    STAYED = "stayed"
    MOVED = "moved"


class MoveSample(NamedTuple):
    """One answer to a session's third turn; `record` is of the session's move."""

    session: int
    way: Way
    result: Generation
    record: dict[str, Any]


async def converse_and_move(
    url: str,
    workers: Sequence[str],
    rules: ConversationRules,
    *,
    run_id: str,
    clock: Clock,
    on_sample: Callable[[MoveSample], None] = lambda sample: None,
) -> list[MoveSample]:
    """Move `rules.sessions` sessions, from each of two workers in turn. One request at a time.

    `workers` are their ids at the router; `run_id` salts the cache.

    Raises:
        ServerUnavailableError: a request or a move failed; nothing here may fail.
    """
    conversations = Conversations(rules)
    samples: list[MoveSample] = []
    async with AsyncExitStack() as stack:
        front = await stack.enter_async_context(GenerateClient(url, clock=clock))
        pinned = [
            await stack.enter_async_context(
                GenerateClient(url, clock=clock, headers={TARGET_HEADER: worker})
            )
            for worker in workers
        ]
        for session in range(rules.sessions):
            home = session % len(workers)
            away = (home + 1) % len(workers)
            name = f"{run_id}/moving-{session}"
            for turn in (1, 2):
                prompt = conversations.prompt(session, turn)
                result = await ask(
                    pinned[home], prompt, rules.answer_tokens, session_id=name, salt=run_id
                )
                conversations.answers[session, turn] = result.output_ids
            record = await move(front, name, run_id, workers[away])
            prompt = conversations.prompt(session, MOVED_TURN)
            for way, client, salt, session_id in (
                (Way.MOVED, front, run_id, name),
                (Way.STAYED, pinned[home], run_id, f"{name}/copy"),
                (Way.RECOMPUTE, pinned[away], f"{name}/anew", f"{name}/anew"),
            ):
                result = await ask(
                    client, prompt, rules.answer_tokens, session_id=session_id, salt=salt
                )
                samples.append(MoveSample(session, way, result, record))
                on_sample(samples[-1])
    return samples


async def move(client: GenerateClient, session_id: str, salt: str, to: str) -> dict[str, Any]:
    """Move a session, and wait until it is on the device of its new worker; the move's record.

    Raises:
        ServerUnavailableError: it is refused, or does not end well.
    """
    body = {"session_id": session_id, "cache_salt": salt, "to": to}
    status, record = await client.ask("POST", "/symphony/migrate", body)
    for _ in range(POLLS_MAX):
        if status != 404:
            break
        # The router hears of a session's turn a moment after its answer.
        await asyncio.sleep(POLL_SECONDS)
        status, record = await client.ask("POST", "/symphony/migrate", body)
    if status != 202:
        raise ServerUnavailableError(f"{client.url}: a move is answered with {status}: {record}")
    path = f"/symphony/moves/{record['move_id']}"
    for _ in range(POLLS_MAX):
        _status, record = await client.ask("GET", path)
        if record["state"] in OVER:
            break
        await asyncio.sleep(POLL_SECONDS)
    if record["state"] != "done":
        raise ServerUnavailableError(f"{client.url}: the move did not end well: {record}")
    for _ in range(POLLS_MAX):
        path = f"/symphony/advisories/adv-{record['move_id']}"
        _status, receipt = await client.ask("GET", path)
        if receipt.get("state") in READY:
            return dict(record)
        await asyncio.sleep(POLL_SECONDS)
    raise ServerUnavailableError(f"{client.url}: a moved session is not ready: {receipt}")


def judge_moves(samples: Sequence[MoveSample]) -> list[str]:
    """What went wrong; empty where every moved session was served elsewhere, all outputs alike."""
    problems = []
    by_session: dict[int, dict[Way, MoveSample]] = {}
    for sample in samples:
        by_session.setdefault(sample.session, {})[sample.way] = sample
    for session, ways in by_session.items():
        name = f"moving session {session}"
        missing = [way.value for way in Way if way not in ways]
        if missing:
            problems.append(f"{name} has no answer of {', '.join(missing)}")
            continue
        moved, stayed, anew = (ways[way].result for way in (Way.MOVED, Way.STAYED, Way.RECOMPUTE))
        if moved.worker == stayed.worker:
            problems.append(f"{name} was served by the worker it had left")
        for way, result in ((Way.MOVED, moved), (Way.STAYED, stayed)):
            source = source_of(result.prompt_tokens, result.cached)
            if source is not Source.DEVICE:
                problems.append(f"{name}: its prefix, {way.value}, came from {source.value}")
        if len({moved.output_ids, stayed.output_ids, anew.output_ids}) > 1:
            problems.append(f"{name}: the outputs differ between the ways")
    if not by_session:
        problems.append("no session was moved")
    return problems


def move_table(samples: Sequence[MoveSample]) -> Table:
    """TTFT of the turn after a move beside staying and computing; `ratio` is to recompute."""
    import numpy as np
    from rich import box
    from rich.table import Table

    seconds = [dict(s.record["timeline"]).get("done", 0.0) for s in samples if s.way is Way.MOVED]
    megabytes = [s.record["bytes"] / 1e6 for s in samples if s.way is Way.MOVED]
    caption = "medians"
    if seconds:
        caption = (
            f"medians; the move itself, before the turn: {np.median(megabytes):.0f} MB in "
            f"{1e3 * np.median(seconds):.0f} ms"
        )
    table = Table(
        title="TTFT of a turn after its session moved to the other worker",
        caption=caption,
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("session", no_wrap=True)
    for name in ("n", "prompt", "device", "computed", "TTFT ms", "p10-p90", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    baseline: float | None = None
    for way in Way:
        results = [sample.result for sample in samples if sample.way is way]
        if not results:
            continue
        times = [1e3 * (result.ttft_seconds or result.latency_seconds) for result in results]
        low, middle, high = (float(value) for value in np.percentile(times, (10, 50, 90)))
        baseline = middle if way is Way.RECOMPUTE else baseline
        counts = [(r.prompt_tokens, r.cached.device) for r in results]
        prompt, device = (int(value) for value in np.median(counts, axis=0))
        computed = int(np.median([r.prompt_tokens - r.cached.total() for r in results]))
        table.add_row(
            way.value,
            str(len(results)),
            *(str(count) for count in (prompt, device, computed)),
            f"{middle:.1f}",
            f"{low:.0f}-{high:.0f}",
            "" if baseline is None else f"{middle / baseline:.3f}",
        )
    return table
