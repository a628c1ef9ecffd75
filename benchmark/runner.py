"""Runs a scenario: starts what its arms need, sends each arm's workload, writes raw samples.

One file a run, `REPETITION-ARM.jsonl`: a header, a line for each request, and an end mark. A run
whose file has its end mark is not repeated, so an interrupted scenario goes on where it stopped.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.progress import Progress

from benchmark.advise import ask, empty_fast_levels
from benchmark.environment import describe_environment
from benchmark.fleet import Fleet
from benchmark.scenario import Arm, Scenario
from benchmark.workloads import sessions_of
from symphony_sglang.clock import SystemClock
from symphony_sglang.errors import ServerUnavailableError
from symphony_sglang.workload.advice import AdviceRules
from symphony_sglang.workload.generate_client import GenerateClient
from symphony_sglang.workload.prompts import Limits
from symphony_sglang.workload.replay_driver import ReplayDriver, ReplayRules, RequestRecord
from symphony_sglang.workload.tiny_model import make_tiny_model
from symphony_sglang.workload.traces import TraceFamily

REQUEST_SECONDS_MAX = 600.0


class Header(msgspec.Struct, tag="header", kw_only=True):
    """What a run was: enough to read its samples without the scenario's file."""

    scenario: str
    arm: str
    repetition: int
    version: int
    environment: dict[str, Any]


class End(msgspec.Struct, tag="end", kw_only=True):
    """A run that came to its end. `seconds` spans first send to last answer."""

    seconds: float
    requests: int
    sessions: int
    requests_unsent: int
    advice: dict[str, Any] | None
    counters: list[dict[str, Any]]
    # Of each worker, what it served in this run: see `TOTALS`.
    totals: list[dict[str, float]] = []
    failure: str = ""


def run_path(directory: Path, repetition: int, arm: Arm) -> Path:
    return directory / f"{repetition}-{arm.name}.jsonl"


def is_complete(path: Path) -> bool:
    """Whether the run's file ends with its end mark."""
    if not path.exists():
        return False
    lines = path.read_bytes().splitlines()
    return bool(lines) and b'"type":"end"' in lines[-1]


def pending_runs(scenario: Scenario, directory: Path) -> Iterator[tuple[int, Arm]]:
    for repetition in range(scenario.repetitions):
        for arm in scenario.order(repetition):
            if not is_complete(run_path(directory, repetition, arm)):
                yield repetition, arm


def run_scenario(
    scenario: Scenario, directory: Path, traces: dict[str, Path], console: Console
) -> None:
    """All runs that `directory` lacks.

    Raises:
        SymphonyError: a server does not start, or a trace cannot be read.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "scenario.json").write_bytes(
        msgspec.json.format(msgspec.json.encode(scenario)) + b"\n"
    )
    todo = list(pending_runs(scenario, directory))
    if not todo:
        console.print(f"{directory}: every run is there already")
        return
    shape = scenario.model
    heads = shape.kv_heads or "default"
    name = f"symphony-bench-{shape.layers}x{shape.hidden}-{heads}-{shape.vocab}-{shape.dtype}"
    model = Path(tempfile.gettempdir()) / name
    make_tiny_model(
        model,
        layers=shape.layers,
        hidden=shape.hidden,
        kv_heads=shape.kv_heads,
        vocab=shape.vocab,
        seed=0,
        dtype=shape.dtype,
    )
    scratch = Path(tempfile.mkdtemp(prefix="symphony-bench-"))
    try:
        with Fleet(scenario, model, scratch) as fleet, Progress(console=console) as progress:
            bar = progress.add_task(scenario.name, total=len(todo))
            for repetition, arm in todo:
                progress.update(bar, description=f"{arm.name}, repetition {repetition + 1}")
                run_one(scenario, arm, repetition, fleet, directory, traces)
                progress.advance(bar)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def run_one(
    scenario: Scenario,
    arm: Arm,
    repetition: int,
    fleet: Fleet,
    directory: Path,
    traces: dict[str, Path],
) -> None:
    group = fleet.start(arm)
    for url in group.worker_urls:
        empty_fast_levels(url)
    before = [totals_of(url) for url in group.worker_urls]
    path = run_path(directory, repetition, arm)
    part = path.with_suffix(".part")
    with part.open("wb") as output:

        def write(item: Any) -> None:
            output.write(msgspec.json.encode(item) + b"\n")

        write(
            Header(
                scenario=scenario.name,
                arm=arm.name,
                repetition=repetition,
                version=scenario.version,
                environment=describe_environment(),
            )
        )
        end = asyncio.run(drive(scenario, arm, repetition, group.url, traces, write))
        end.counters = [counters_of(url) for url in group.worker_urls]
        end.totals = [
            {name: value - old.get(name, 0.0) for name, value in totals_of(url).items()}
            for url, old in zip(group.worker_urls, before, strict=True)
        ]
        write(end)
    part.rename(path)


async def drive(
    scenario: Scenario,
    arm: Arm,
    repetition: int,
    url: str,
    traces: dict[str, Path],
    write: Any,
) -> End:
    records: list[RequestRecord] = []

    def keep(record: RequestRecord) -> None:
        records.append(record)
        write(record)

    failure = ""
    async with GenerateClient(
        url, clock=SystemClock(), request_seconds_max=REQUEST_SECONDS_MAX
    ) as client:
        driver = ReplayDriver(
            client,
            rules_of(scenario, arm, repetition),
            sessions_of(scenario.workload, traces),
            keep,
            SystemClock(),
        )
        try:
            await driver.run()
        except ServerUnavailableError as error:
            failure = str(error)
    started = min((record.sent_seconds for record in records), default=0.0)
    ended = max((r.sent_seconds + r.latency_seconds for r in records), default=0.0)
    return End(
        seconds=ended - started,
        requests=len(records),
        sessions=driver.counts.sessions,
        requests_unsent=driver.counts.requests_unsent,
        advice=None if driver.adviser is None else driver.adviser.as_json(),
        counters=[],
        failure=failure,
    )


def rules_of(scenario: Scenario, arm: Arm, repetition: int) -> ReplayRules:
    """Tokens differ from run to run, so that no arm profits from what another left on disk; the
    structure, the lengths, the think times and, within a repetition, the arrivals are the same."""
    work = scenario.workload
    number = [item.name for item in scenario.arm].index(arm.name)
    advice = arm.advice
    return ReplayRules(
        limits=Limits(
            prompt_tokens_max=work.prompt_tokens_max,
            context_tokens=work.prompt_tokens_max + work.output_tokens_max,
            output_tokens_max=work.output_tokens_max,
            scale_tokens=work.scale_tokens,
        ),
        vocab=scenario.model.vocab,
        seed=work.seed * 1_000_000 + repetition * 1000 + number,
        time_scale=work.time_scale,
        think_seconds=work.think_seconds,
        think_seconds_max=work.think_seconds_max,
        session_rate=work.session_rate,
        arrival_seed=work.seed * 1000 + repetition,
        concurrency=work.concurrency,
        session_requests_max=work.session_requests,
        seated=work.seated,
        advice=None
        if advice is None
        else AdviceRules(
            lead_seconds=advice.lead_seconds,
            missing_share=advice.missing_share,
            false_share=advice.false_share,
            shuffled=advice.shuffled,
            expires_seconds=advice.expires_seconds,
        ),
    )


def counters_of(url: str) -> dict[str, Any]:
    """What a worker of ours counts; {} of another."""
    status, body = ask(url, "/symphony/residency", method="GET")
    return body if status == 200 and isinstance(body, dict) else {}


# SGLang's counters, where a worker has `--enable-metrics`.
TOTALS = {
    "sglang:num_requests_total": "requests",
    "sglang:prompt_tokens_total": "prompt_tokens",
    "sglang:generation_tokens_total": "output_tokens",
}


def totals_of(url: str) -> dict[str, float]:
    """What a worker has served since its start; {} of one without metrics."""
    answer = httpx.get(url + "/metrics", follow_redirects=True)
    if answer.status_code != 200:
        return {}
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name in TOTALS:
                name = TOTALS[sample.name]
                totals[name] = totals.get(name, 0.0) + sample.value
    return totals


def parse_traces(words: list[str]) -> dict[str, Path]:
    """``FAMILY=FILE`` words by family."""
    families = {family.value for family in TraceFamily}
    traces = {}
    for word in words:
        family, _, path = word.partition("=")
        if family not in families or not path:
            raise SystemExit(
                f"--trace {word!r}: expected FAMILY=FILE, FAMILY one of {sorted(families)}"
            )
        traces[family] = Path(path)
    return traces


def read_run(path: Path) -> tuple[Header, list[RequestRecord], End]:
    """A run's file, as `run_one` wrote it.

    Raises:
        ValueError: it has no header or no end mark, with its path.
    """
    lines = path.read_bytes().splitlines()
    try:
        header = msgspec.json.decode(lines[0], type=Header)
        end = msgspec.json.decode(lines[-1], type=End)
        records = [msgspec.json.decode(line, type=RequestRecord) for line in lines[1:-1]]
    except (IndexError, msgspec.MsgspecError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a complete run: {error}") from error
    return header, records, end
