"""Conversations that outgrow the device level and return to it, with their outputs compared.

One step opens a session (first turn: nothing is cached) and goes on with it (second turn: its
prefix is on the device). From then on a step also returns to the session opened `lag` steps before,
which the sessions between have pushed off the device: its third turn finds its prefix lower down;
sent once more, it finds it on the device; and sent under a cache salt of its own, it finds nothing.
So the samples of all levels interleave in time, a slow moment of the machine meets them all, and
the same prompt is answered from everywhere: its greedy tokens must be the same each time.

Where the worker has an NVMe level and takes advisories (`lower_levels`), each returning session
then comes back twice more after the cache was flushed: once as it is, found on disk, and once
advised beforehand, found on the device.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import msgspec
import numpy as np

from symphony_sglang.errors import ConfigError, ServerUnavailableError
from symphony_sglang.workload.generate_client import GenerateClient, Generation
from symphony_sglang.workload.prompts import FIRST_TOKEN_ID
from symphony_sglang.workload.replay_report import Source, source_of

RETURNING_TURN = 3
POLLS_MAX = 200
POLL_SECONDS = 0.05
WARM_UP_REQUESTS = 3


@dataclass(frozen=True, slots=True)
class ConversationRules:
    """How many conversations, and how long, in tokens.

    `lag` sessions lie between a session's second and third turn; to push it off the device they
    must hold more than the device level does.
    """

    sessions: int = 12
    lag: int = 5
    opening_tokens: int = 2000
    message_tokens: int = 48
    answer_tokens: int = 16
    vocab: int = 4096
    seed: int = 0
    lower_levels: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.lag < self.sessions <= 10_000:
            raise ConfigError(
                f"--sessions is {self.sessions}; expected {self.lag + 1} to 10000 conversations"
            )

    @property
    def tokens_per_session(self) -> int:
        """Tokens that a session leaves behind after its second turn."""
        return self.opening_tokens + self.message_tokens + 2 * self.answer_tokens

    @property
    def request_count(self) -> int:
        returning = self.sessions - self.lag
        return 2 * self.sessions + (5 if self.lower_levels else 3) * returning


class Visit(NamedTuple):
    """One request to make: which turn of which session, and whether under a salt of its own.

    With `flushed` the cache is emptied first, so that only the disk has the prefix; with `advised`
    the worker is told of the turn, and given the time to bring it up.
    """

    session: int
    turn: int
    anew: bool = False
    flushed: bool = False
    advised: bool = False


class Sample(NamedTuple):
    """One request made, and what it gave."""

    visit: Visit
    source: Source
    result: Generation


class Difference(NamedTuple):
    """Two ways to the same prompt whose outputs part at `position`."""

    session: int
    turn: int
    sources: tuple[Source, Source]
    position: int


def plan_visits(rules: ConversationRules) -> Iterator[Visit]:
    """The requests of the whole workload, in order."""
    for step in range(rules.sessions):
        yield Visit(step, 1)
        yield Visit(step, 2)
        if step >= rules.lag:
            yield Visit(step - rules.lag, RETURNING_TURN)
            yield Visit(step - rules.lag, RETURNING_TURN)
            yield Visit(step - rules.lag, RETURNING_TURN, anew=True)
    if rules.lower_levels:
        for session in range(rules.sessions - rules.lag):
            yield Visit(session, RETURNING_TURN, flushed=True)
            yield Visit(session, RETURNING_TURN, flushed=True, advised=True)


@dataclass(slots=True)
class Conversations:
    """The state of all conversations: each one's prompts, made from messages and answers so far."""

    rules: ConversationRules
    prompts: dict[tuple[int, int], list[int]] = field(default_factory=dict)
    answers: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)

    def prompt(self, session: int, turn: int) -> list[int]:
        """Token ids of the whole prompt of a turn; the turn before must have been answered."""
        key = (session, turn)
        if key not in self.prompts:
            message = self._message(session, turn)
            before = (session, turn - 1)
            history = [] if turn == 1 else self.prompts[before] + list(self.answers[before])
            self.prompts[key] = history + message
        return self.prompts[key]

    def _message(self, session: int, turn: int) -> list[int]:
        length = self.rules.opening_tokens if turn == 1 else self.rules.message_tokens
        generator = np.random.default_rng((self.rules.seed, session, turn))
        first = min(FIRST_TOKEN_ID, self.rules.vocab // 2)
        return [int(token) for token in generator.integers(first, self.rules.vocab, length)]


async def converse(
    client: GenerateClient,
    rules: ConversationRules,
    *,
    run_id: str,
    adviser: GenerateClient | None = None,
    on_sample: Callable[[Sample], None] = lambda sample: None,
) -> list[Sample]:
    """Run the whole workload, one request at a time.

    `run_id` salts the cache, so that nothing is found that an earlier run left behind. Hints go by
    `adviser`: behind a router, to the worker itself, for the router might move the session.

    Raises:
        ServerUnavailableError: a request failed; nothing here may fail.
    """
    conversations = Conversations(rules)
    await warm_up(client, rules, run_id)
    samples = []
    for visit in plan_visits(rules):
        prompt = conversations.prompt(visit.session, visit.turn)
        name = f"{run_id}/conversation-{visit.session}"
        salt = f"{name}/anew" if visit.anew else run_id
        if visit.flushed:
            await flush(client)
        if visit.advised:
            await advise(adviser or client, name, salt)
        result = await ask(client, prompt, rules.answer_tokens, session_id=name, salt=salt)
        # Later prompts go on from the first answer; whether the others agree is checked at the end.
        conversations.answers.setdefault((visit.session, visit.turn), result.output_ids)
        source = source_of(result.prompt_tokens, result.cached)
        if visit.advised and source is Source.DEVICE:
            source = Source.ADVISED
        sample = Sample(visit, source, result)
        samples.append(sample)
        on_sample(sample)
    return samples


async def flush(client: GenerateClient) -> None:
    """Empty the cache; pages still on their way to disk make the worker ask for patience.

    Raises:
        ServerUnavailableError: the worker does not become idle.
    """
    for _ in range(POLLS_MAX):
        status, _body = await client.ask("POST", "/flush_cache")
        if status == 200:
            return
        await asyncio.sleep(POLL_SECONDS)
    raise ServerUnavailableError(f"{client.url}: /flush_cache answers {status}: it is never idle")


async def advise(client: GenerateClient, session_id: str, salt: str) -> None:
    """Tell the worker that the session's turn is coming, and wait until it says ready.

    Raises:
        ServerUnavailableError: the hint is refused, or never ends in ready.
    """
    hint = {"session_id": session_id, "cache_salt": salt}
    status, body = await client.ask("POST", "/symphony/advise", hint)
    if status != 202:
        raise ServerUnavailableError(f"{client.url}: an advisory is answered with {status}: {body}")
    receipt = body["receipts"][0]
    for _ in range(POLLS_MAX):
        path = f"/symphony/advisories/{receipt['advisory_id']}"
        status, receipt = await client.ask("GET", path)
        if receipt["state"] == "ready":
            return
        await asyncio.sleep(POLL_SECONDS)
    raise ServerUnavailableError(f"{client.url}: advisory of {session_id} is not ready: {receipt}")


async def warm_up(client: GenerateClient, rules: ConversationRules, run_id: str) -> None:
    """A few requests of the sizes to come, so that no sample pays for first-time set-up."""
    prompt = Conversations(replace(rules, seed=rules.seed + 1)).prompt(0, 1)
    for _ in range(WARM_UP_REQUESTS):
        name = f"{run_id}/warm-up"
        await ask(client, prompt, rules.answer_tokens, session_id=name, salt=name)


async def ask(
    client: GenerateClient,
    prompt: list[int],
    answer_tokens: int,
    *,
    session_id: str,
    salt: str | None,
) -> Generation:
    """One greedy turn, streamed.

    Raises:
        ServerUnavailableError: it failed.
    """
    body = msgspec.json.encode(
        {
            "input_ids": prompt,
            "session_id": session_id,
            "cache_salt": salt,
            "stream": True,
            "sampling_params": {
                "temperature": 0.0,
                "max_new_tokens": answer_tokens,
                "ignore_eos": True,
            },
        }
    )
    result = await client.generate(body, stream=True)
    if result.error is not None:
        raise ServerUnavailableError(f"{client.url}: a request of {session_id}: {result.error}")
    return result


def find_differences(samples: Sequence[Sample]) -> list[Difference]:
    """Prompts whose outputs differ by where the prefix was found; empty when all are identical."""
    first: dict[tuple[int, int], Sample] = {}
    found = []
    for sample in samples:
        key = (sample.visit.session, sample.visit.turn)
        reference = first.setdefault(key, sample)
        ours, theirs = reference.result.output_ids, sample.result.output_ids
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            position = next(
                (index for index, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs))
            )
            found.append(Difference(*key, (reference.source, sample.source), position))
    return found


def compared_sources(samples: Sequence[Sample]) -> dict[tuple[int, int], set[Source]]:
    """By session and turn, the levels from which its output was had."""
    found: dict[tuple[int, int], set[Source]] = {}
    for sample in samples:
        found.setdefault((sample.visit.session, sample.visit.turn), set()).add(sample.source)
    return found
