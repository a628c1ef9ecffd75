"""``symphony demo``: two workers and a router; conversations that outgrow a worker's device level,
what each level saves, and sessions that move to the other worker between turns.

Exit code 0 only if every level that was expected was hit, every session moved, and every way to the
same prompt gave the same greedy tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ConfigError, ServerUnavailableError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from symphony_sglang.workload.conversation import ConversationRules, Sample
    from symphony_sglang.workload.demo_move import MoveSample
    from symphony_sglang.workload.worker_process import WorkerProcess

INTERRUPTED = 130
DIFFERENCES_SHOWN_MAX = 5
# Large enough that computing 2,000 tokens takes far longer than fetching them, on two cores.
LAYERS, HIDDEN, VOCAB = 4, 256, 4096
# The levels move bytes whatever they mean; in float32 the order in which a sum is taken does not
# tip a greedy choice, so any difference in the output is a fault.
DTYPE = "float32"
# Four conversations of 2,000 tokens fit, so one is pushed out before it returns after five others.
DEVICE_TOKENS = 9_000
HOST_GB = 1.0
NVME_GB = 1.0
# `storage` is SGLang's word for what lies below the host level.
LEVELS = ("device", "host", "storage", "advised")
MOVED = "moved"
EXPECTED = (*LEVELS, MOVED)
WORKERS = 2
MOVING_SESSIONS = 4
READY_SECONDS_MAX = 60.0
READY_POLL_SECONDS = 0.1


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="start two workers and a router, and show TTFT by where a prefix is found",
        description="Makes a tiny model, starts two workers and a router on this machine, runs "
        "conversations that outgrow one worker's device level and return to it, moves sessions to "
        "the other worker between turns, and reports TTFT by where each prefix was found, and "
        "whether the outputs are identical. Words after -- are flags for the workers.",
    )
    add = parser.add_argument
    add("--dir", default=".demo", metavar="DIR", help="keeps the model and the logs; default .demo")
    add("--sessions", type=int, default=12, metavar="N", help="conversations; default 12")
    add(
        "--expect",
        default=",".join(EXPECTED),
        metavar="LEVELS",
        help=f"what must be hit, of {', '.join(EXPECTED)}; default all",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the conversations")
    add("worker_arguments", nargs="*", metavar="-- FLAG", help="flags for the workers")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 if all went as it should, 1 if not, 130 after Ctrl-C or SIGTERM."""
    from rich.console import Console

    with sigterm_as_interrupt():
        try:
            return demonstrate(arguments, Console(), SystemClock())
        except KeyboardInterrupt:
            return INTERRUPTED


@contextlib.contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """A SIGTERM unwinds like Ctrl-C, so that what was started is stopped on the way out."""
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def demonstrate(arguments: argparse.Namespace, console: Console, clock: Clock) -> int:
    """The whole demo.

    Raises:
        ConfigError, ServerUnavailableError: it cannot start, or the worker fails on the way.
    """
    from symphony_sglang.workload.conversation import ConversationRules
    from symphony_sglang.workload.demo_move import judge_moves, move_table
    from symphony_sglang.workload.tiny_model import make_tiny_model

    expected = parse_levels(arguments.expect)
    levels = [name for name in expected if name != MOVED]
    rules = ConversationRules(
        sessions=arguments.sessions,
        vocab=VOCAB,
        seed=arguments.seed,
        lower_levels=bool({"storage", "advised"} & set(expected)),
    )
    assert rules.lag * rules.tokens_per_session > DEVICE_TOKENS
    directory = Path(arguments.dir)
    model = directory / "model"
    with console.status("making the model") as status:
        make_tiny_model(model, layers=LAYERS, hidden=HIDDEN, vocab=VOCAB, seed=0, dtype=DTYPE)
        status.stop()
    moves: list[MoveSample] = []
    with contextlib.ExitStack() as stack:
        cluster = start_cluster(stack, directory, model, arguments.worker_arguments, clock)
        boot_seconds, workers = wait_cluster(cluster, console, clock)
        console.print(
            f"ready after {boot_seconds:.1f} s: {len(workers)} workers behind {cluster.router.url}",
            highlight=False,
        )
        started = clock.monotonic()
        samples = run_conversations(cluster, workers[0], rules, console, clock)
        if MOVED in expected:
            moves = run_moves(cluster.router.url, workers, rules, console, clock)
        seconds = clock.monotonic() - started
    verdict = judge(samples, levels)
    problems = (*verdict.problems, *(judge_moves(moves) if MOVED in expected else ()))
    console.print(level_table(samples))
    if moves:
        console.print(move_table(moves))
    requests = len(samples) + len(moves) // 3 * 5
    console.print(f"{requests} requests in {seconds:.1f} s", highlight=False)
    findings = list(verdict.findings)
    if moves and not problems:
        findings.append(
            f"identical outputs: {len(moves) // 3} sessions that moved, against staying and "
            "recompute"
        )
    for line in problems or findings:
        console.print(line, style="red" if problems else "green", highlight=False)
    return 1 if problems else 0


@dataclass(frozen=True, slots=True)
class DemoCluster:
    """Two workers behind a router, all of them running."""

    workers: tuple[WorkerProcess, ...]
    router: WorkerProcess


def start_cluster(
    stack: contextlib.ExitStack,
    directory: Path,
    model: Path,
    worker_arguments: Sequence[str],
    clock: Clock,
) -> DemoCluster:
    """Start everything; `stack` stops it, the router first."""
    from symphony_sglang.workload.worker_process import WorkerProcess, free_port

    workers = tuple(
        stack.enter_context(
            WorkerProcess(
                [
                    *("--model-path", str(model)),
                    *("--max-total-tokens", str(DEVICE_TOKENS)),
                    *("--symphony-host-gb", str(HOST_GB)),
                    *("--symphony-nvme-dir", str(directory / "pages" / f"worker-{number}")),
                    *("--symphony-nvme-gb", str(NVME_GB)),
                    # Both end together: nobody would take their sessions.
                    *("--symphony-grace", "0"),
                    *worker_arguments,
                ],
                log_path=directory / f"worker-{number}.log",
                clock=clock,
            )
        )
        for number in range(WORKERS)
    )
    port = free_port()
    command = [
        *(sys.executable, "-m", "symphony_sglang.launch_router"),
        *("--host", "127.0.0.1", "--port", str(port), "--prometheus-port", "0"),
        *("--model-path", str(model), "--worker-urls", *(worker.url for worker in workers)),
    ]
    router = stack.enter_context(
        WorkerProcess(
            (), command=command, port=port, log_path=directory / "router.log", clock=clock
        )
    )
    return DemoCluster(workers, router)


def wait_cluster(cluster: DemoCluster, console: Console, clock: Clock) -> tuple[float, list[str]]:
    """Seconds until all were up, and the workers' ids at the router, in order.

    Raises:
        ServerUnavailableError: one of them does not come up.
    """
    began = clock.monotonic()
    for number, worker in enumerate(cluster.workers):
        console.print(f"starting worker {number}, its log is {worker.log_path}", highlight=False)
    for worker in cluster.workers:
        wait_ready(worker, console)
    wait_ready(cluster.router, console)
    deadline = clock.monotonic() + READY_SECONDS_MAX
    while True:
        with contextlib.suppress(OSError, ValueError):
            with urllib.request.urlopen(f"{cluster.router.url}/workers", timeout=5) as answer:
                listed = json.loads(answer.read())["workers"]
            ids = {entry["url"]: entry["id"] for entry in listed if entry["is_healthy"]}
            if len(ids) == len(cluster.workers):
                return clock.monotonic() - began, [ids[w.url] for w in cluster.workers]
        if clock.monotonic() >= deadline:
            raise ServerUnavailableError(
                f"the router does not see the workers; the end of its log:\n"
                f"{cluster.router.log_tail()}"
            )
        time.sleep(READY_POLL_SECONDS)


def parse_levels(text: str) -> list[str]:
    """Comma-separated names of levels.

    Raises:
        ConfigError: a name is unknown.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in EXPECTED:
            raise ConfigError(f"--expect has {name!r}; expected levels of {', '.join(EXPECTED)}")
    return names


def wait_ready(worker: WorkerProcess, console: Console) -> float:
    if not console.is_terminal:
        return worker.wait_ready()
    with console.status("starting") as status:
        width = max(20, console.width - 10)
        return worker.wait_ready(on_wait=lambda line: status.update(line[:width] or "starting"))


def run_conversations(
    cluster: DemoCluster, worker: str, rules: ConversationRules, console: Console, clock: Clock
) -> list[Sample]:
    """The levels of the first worker, which the router is told to send to."""
    import asyncio
    import uuid

    from symphony_sglang.workload.conversation import converse
    from symphony_sglang.workload.demo_move import TARGET_HEADER
    from symphony_sglang.workload.generate_client import GenerateClient
    from symphony_sglang.workload.replay_report import ReplayProgress

    async def measured() -> list[Sample]:
        pinned = GenerateClient(cluster.router.url, clock=clock, headers={TARGET_HEADER: worker})
        async with pinned, GenerateClient(cluster.workers[0].url, clock=clock) as direct:
            return await converse(
                pinned,
                rules,
                run_id=uuid.uuid4().hex,
                adviser=direct,
                on_sample=lambda sample: progress.advance(failed=False),
            )

    with ReplayProgress(console, clock, total=rules.request_count, title="conversing") as progress:
        return asyncio.run(measured())


def run_moves(
    url: str, workers: Sequence[str], rules: ConversationRules, console: Console, clock: Clock
) -> list[MoveSample]:
    """Sessions that go to the other worker between turns."""
    import asyncio
    import uuid

    from symphony_sglang.workload.demo_move import Way, converse_and_move
    from symphony_sglang.workload.replay_report import ReplayProgress

    rules = replace(rules, sessions=MOVING_SESSIONS, lag=1, seed=rules.seed + 1)
    total = MOVING_SESSIONS * len(Way)
    with ReplayProgress(console, clock, total=total, title="moving") as progress:
        return asyncio.run(
            converse_and_move(
                url,
                workers,
                rules,
                run_id=uuid.uuid4().hex,
                clock=clock,
                on_sample=lambda sample: progress.advance(failed=False),
            )
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the demo shows, and what went wrong; it failed if anything did."""

    findings: tuple[str, ...]
    problems: tuple[str, ...]


def judge(samples: Sequence[Sample], expected: Sequence[str]) -> Verdict:
    """Whether every level expected was hit, and every prompt had one output."""
    from symphony_sglang.workload.conversation import compared_sources, find_differences

    hit = {sample.source.value for sample in samples}
    problems = [f"the {level} level was never hit" for level in expected if level not in hit]
    compared = compared_sources(samples)
    ways = {"recompute", *expected}
    whole = [k for k, sources in compared.items() if ways <= {source.value for source in sources}]
    if not whole:
        problems.append(f"no prompt was answered from each of {', '.join(sorted(ways))}")
    differences = find_differences(samples)
    for item in differences[:DIFFERENCES_SHOWN_MAX]:
        ours, theirs = (source.value for source in item.sources)
        problems.append(
            f"session {item.session}, turn {item.turn}: the outputs from {ours} and from {theirs} "
            f"part at token {item.position}"
        )
    if len(differences) > DIFFERENCES_SHOWN_MAX:
        problems.append(f"{len(differences) - DIFFERENCES_SHOWN_MAX} more outputs differ")
    compared_count = sum(len(sources) > 1 for sources in compared.values())
    finding = (
        f"identical outputs: {compared_count} prompts each answered from two or more places, "
        f"{len(whole)} of them from {', '.join(sorted(ways))}"
    )
    return Verdict((finding,), tuple(problems))


def level_table(samples: Sequence[Sample]) -> Table:
    """TTFT and token counts by where most of the prompt was found; `ratio` is to recompute."""
    import numpy as np
    from rich import box
    from rich.table import Table

    from symphony_sglang.workload.replay_report import Source

    table = Table(
        title="TTFT by where the prefix was found",
        caption="medians; tokens are those of one request, by level",
        box=box.SIMPLE,
        padding=(0, 1, 0, 0),
    )
    table.add_column("found", no_wrap=True)
    for name in ("n", "prompt", "device", "host", "storage", "TTFT ms", "p10-p90", "ratio"):
        table.add_column(name, justify="right", no_wrap=True)
    baseline: float | None = None
    for source in Source:
        results = [sample.result for sample in samples if sample.source is source]
        if not results:
            continue
        times = [1e3 * (result.ttft_seconds or result.latency_seconds) for result in results]
        low, middle, high = (float(value) for value in np.percentile(times, (10, 50, 90)))
        baseline = middle if source is Source.RECOMPUTE else baseline
        counts = [
            (r.prompt_tokens, r.cached.device, r.cached.host, r.cached.storage) for r in results
        ]
        prompt, device, host, storage = (int(value) for value in np.median(counts, axis=0))
        share = "" if baseline is None else f"{middle / baseline:.3f}"
        table.add_row(
            source.value,
            str(len(results)),
            *(str(count) for count in (prompt, device, host, storage)),
            f"{middle:.1f}",
            f"{low:.0f}-{high:.0f}",
            share,
        )
    return table
