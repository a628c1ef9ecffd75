"""``symphony replay``: a published trace against a live server.

Arrivals, think times, lengths and what can be reused come from the trace; the content of block
traces is made from (seed, session, block id).
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ConfigError, SymphonyError

if TYPE_CHECKING:
    from rich.console import Console

    from symphony_sglang.workload.generate_client import ServerFacts
    from symphony_sglang.workload.replay_driver import ReplayCounts, ReplayRules, RequestRecord
    from symphony_sglang.workload.traces import TraceReader

INTERRUPTED = 130


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "replay",
        help="replay a published trace against a live server",
        description="Replays a trace against a server's /generate and reports TTFT by where the "
        "prefix was found. A session ends before its first turn whose prompt is over the limit.",
    )
    add = parser.add_argument
    add("--trace", required=True, metavar="FILE", help="the trace; .xz is unpacked on the way")
    add("--url", required=True, help="the server, as http://host:port")
    add("--sessions", type=int, metavar="N", help="read at most N sessions")
    add("--requests", type=int, metavar="N", help="send at most N requests")
    add("--session-requests", type=int, metavar="N", help="send at most N requests of a session")
    add("--max-prompt-tokens", type=int, metavar="N", help="longest prompt; default: the server's")
    add("--max-output-tokens", type=int, metavar="N", help="longest answer; default: the trace's")
    add(
        "--scale-tokens",
        type=float,
        default=1.0,
        metavar="F",
        help="shrink each block of tokens, and answers, to this part, keeping the structure",
    )
    add_time_flags(parser)
    add_send_flags(parser)
    parser.set_defaults(run=run)


def add_time_flags(parser: argparse.ArgumentParser) -> None:
    """When requests go out."""
    add = parser.add_argument
    add(
        "--time-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="times of the trace are multiplied by X; 0 sends back to back; default 1",
    )
    add(
        "--think-seconds",
        type=float,
        default=0.0,
        metavar="S",
        help="mean think time drawn for traces that have none; default 0",
    )
    add(
        "--think-max",
        type=float,
        metavar="S",
        help="longest pause between two turns of a session, after --time-scale",
    )
    add(
        "--session-rate",
        type=float,
        metavar="R",
        help="start R sessions a second (Poisson) instead of at the trace's arrivals",
    )
    add(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="requests in flight at most; sessions at once where the trace has no arrivals",
    )
    add(
        "--seated",
        action="store_true",
        help="send each session's first turn before the time begins, one after another, unrecorded",
    )


def add_send_flags(parser: argparse.ArgumentParser) -> None:
    """What is sent beside the prompts, and what is kept."""
    add = parser.add_argument
    add("--seed", type=int, default=0, metavar="N", help="of tokens and of drawn times")
    add(
        "--vocab-size",
        type=int,
        metavar="N",
        help="of the model, where the server's is not at hand",
    )
    add("--share-system-prefix", action="store_true", help="one system prompt for each model")
    add("--no-stream", action="store_true", help="do not stream: latencies instead of TTFT")
    add("--output", metavar="FILE", help="write one JSON line a request")
    add(
        "--keep-output-ids", action="store_true", help="write output token ids, not only their hash"
    )
    add(
        "--advise-lead",
        type=float,
        metavar="S",
        help="advise each session S seconds before its next turn (less, where it thinks shorter)",
    )
    add(
        "--advise-missing",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of those hints that are left out",
    )
    add(
        "--advise-false",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="share of all hints sent that name a session which is not about to return",
    )
    add("--on-error", choices=("raise", "skip"), default="raise", help="what a broken line does")
    add("--request-timeout", type=float, default=600.0, metavar="S", help="seconds for one request")
    add("--api-key", metavar="KEY", help="sent as a bearer token")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 if every request was answered, 1 if not, 130 after Ctrl-C."""
    from rich.console import Console

    return replay(arguments, Console(), SystemClock())


def replay(arguments: argparse.Namespace, console: Console, clock: Clock) -> int:
    """Run the whole command; what was measured before a failure is reported all the same.

    Raises:
        SymphonyError: nothing was sent, and why.
    """
    import asyncio

    from symphony_sglang.workload.replay_driver import ReplayCounts
    from symphony_sglang.workload.replay_report import ReplaySummary, print_summary
    from symphony_sglang.workload.traces import TraceReader

    reader = TraceReader(Path(arguments.trace), arguments.on_error)
    console.print(f"{arguments.trace}: {reader.family.value}")
    records: list[RequestRecord] = []
    counts = ReplayCounts()
    code, failure = 0, ""
    try:
        asyncio.run(measure(arguments, reader, records, counts, console, clock))
    except KeyboardInterrupt:
        code, failure = INTERRUPTED, "interrupted"
    except SymphonyError as error:
        if not records:
            raise
        code, failure = 1, str(error)
    for problem in reader.problems:
        console.print(f"skipped {problem}", style="yellow", markup=False)
    if reader.problem_count > len(reader.problems):
        console.print(f"skipped {reader.problem_count - len(reader.problems)} more lines")
    if not records and not code:
        raise ConfigError(nothing_sent(counts))
    if records:
        summary = ReplaySummary.of(records)
        print_summary(console, summary, counts)
        code = code or int(summary.failures > 0)
    if failure:
        console.print(f"stopped early: {failure}", style="red", markup=False)
    return code


def nothing_sent(counts: ReplayCounts) -> str:
    if counts.requests_cut:
        return (
            f"all {counts.requests_cut} requests of {counts.sessions} sessions have prompts over "
            "the limit; expected a server with a longer context or a smaller --scale-tokens"
        )
    return "the trace has no requests"


async def measure(
    arguments: argparse.Namespace,
    reader: TraceReader,
    records: list[RequestRecord],
    counts: ReplayCounts,
    console: Console,
    clock: Clock,
) -> None:
    """Fill `records` and `counts`; each record is in the output file as soon as it is there."""
    import msgspec

    from symphony_sglang.workload.generate_client import GenerateClient
    from symphony_sglang.workload.replay_driver import ReplayDriver, check_rules
    from symphony_sglang.workload.replay_report import ReplayProgress

    async with GenerateClient(
        arguments.url,
        clock=clock,
        request_seconds_max=arguments.request_timeout,
        api_key=arguments.api_key,
    ) as client:
        rules = rules_of(arguments, await client.facts())
        check_rules(rules)
        progress = ReplayProgress(console, clock, total=rules.requests_max)
        with open_output(arguments.output) as output, progress:

            def keep(record: RequestRecord) -> None:
                records.append(record)
                if output is not None:
                    output.write(msgspec.json.encode(record) + b"\n")
                    output.flush()
                progress.advance(failed=record.error is not None)

            driver = ReplayDriver(client, rules, iter(reader), keep, clock, counts=counts)
            await driver.run()


def rules_of(arguments: argparse.Namespace, facts: ServerFacts) -> ReplayRules:
    """The flags, bounded by what the server takes.

    Raises:
        ConfigError: the vocabulary is not known, or a limit is over the server's.
    """
    from symphony_sglang.workload.advice import AdviceRules
    from symphony_sglang.workload.prompts import Limits
    from symphony_sglang.workload.replay_driver import ReplayRules

    vocab = arguments.vocab_size if arguments.vocab_size is not None else facts.vocab
    if vocab is None:
        raise ConfigError(
            f"--vocab-size is not given, and {facts.model_path or 'the model'} is not on this "
            "machine to read it from"
        )
    if vocab < 2:
        raise ConfigError(f"--vocab-size is {vocab}; expected a number of at least 2")
    prompt_tokens_max = arguments.max_prompt_tokens
    if prompt_tokens_max is None:
        prompt_tokens_max = facts.prompt_tokens_max
    elif prompt_tokens_max > facts.prompt_tokens_max:
        raise ConfigError(
            f"--max-prompt-tokens is {prompt_tokens_max}; expected at most "
            f"{facts.prompt_tokens_max}, the server's own limit"
        )
    output_tokens_max = arguments.max_output_tokens
    return ReplayRules(
        limits=Limits(
            prompt_tokens_max=prompt_tokens_max,
            context_tokens=facts.context_tokens,
            output_tokens_max=facts.context_tokens
            if output_tokens_max is None
            else output_tokens_max,
            scale_tokens=arguments.scale_tokens,
        ),
        vocab=vocab,
        seed=arguments.seed,
        time_scale=arguments.time_scale,
        think_seconds=arguments.think_seconds,
        think_seconds_max=arguments.think_max,
        session_rate=arguments.session_rate,
        concurrency=arguments.concurrency,
        sessions_max=arguments.sessions,
        requests_max=arguments.requests,
        session_requests_max=arguments.session_requests,
        share_system_prefix=arguments.share_system_prefix,
        seated=arguments.seated,
        stream=not arguments.no_stream,
        keep_output_ids=arguments.keep_output_ids,
        advice=None
        if arguments.advise_lead is None
        else AdviceRules(
            lead_seconds=arguments.advise_lead,
            missing_share=arguments.advise_missing,
            false_share=arguments.advise_false,
        ),
    )


@contextlib.contextmanager
def open_output(path: str | None) -> Iterator[IO[bytes] | None]:
    """The output file, or None where none is wanted.

    Raises:
        ConfigError: it cannot be written.
    """
    if path is None:
        yield None
        return
    try:
        file = open(path, "wb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise ConfigError(f"--output is {path!r}: {error.strerror}") from error
    with file:
        yield file
