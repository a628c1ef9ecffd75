"""One turn of a chat over the OpenAI route: streamed, timed, and where its prefix was found."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import msgspec

from symphony_sglang.client import protocol
from symphony_sglang.clock import Clock
from symphony_sglang.errors import ServerUnavailableError

TURN_SECONDS_MAX = 600.0
LINE_CHARACTERS_MAX = 1 << 20


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta = msgspec.field(default_factory=Delta)


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None


class CachedDetails(msgspec.Struct):
    device: int | None = None
    host: int | None = None
    storage: int | None = None


class Extension(msgspec.Struct):
    """What SGLang adds to OpenAI's answer."""

    cached_tokens_details: CachedDetails | None = None


class Chunk(msgspec.Struct):
    choices: list[Choice] = []
    usage: Usage | None = None
    sglext: Extension | None = None
    error: Any = None


class Turn(msgspec.Struct, frozen=True, kw_only=True):
    """What one turn gave. `found` is tokens by level, with what was ``computed``."""

    text: str
    ttft_seconds: float | None
    seconds: float
    prompt_tokens: int
    completion_tokens: int
    found: dict[str, int]


class Chat:
    """A conversation: its messages so far, and the connection to the server."""

    def __init__(
        self,
        url: str,
        session_id: str,
        *,
        clock: Clock,
        api_key: str | None = None,
        model: str = "default",
        tokens_max: int = 512,
    ) -> None:
        self.url = protocol.base_url(url)
        self.session_id = session_id
        self.messages: list[dict[str, str]] = []
        self._clock = clock
        self._options = {"model": model, "max_tokens": tokens_max}
        self._http = httpx.Client(
            headers=protocol.auth_headers(api_key),
            timeout=httpx.Timeout(TURN_SECONDS_MAX, connect=protocol.TIMEOUT_SECONDS),
        )

    def close(self) -> None:
        self._http.close()

    def say(self, text: str, on_text: Callable[[str], None]) -> Turn:
        """Send the person's message, hand out the answer as it comes, and remember both.

        Raises:
            ClientError, ServerUnavailableError: no answer; the message is not remembered then.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        started = self._clock.monotonic()
        first: float | None = None
        pieces: list[str] = []
        usage, found = Usage(), CachedDetails()
        for chunk in self._chunks(messages):
            usage = chunk.usage or usage
            if chunk.sglext is not None and chunk.sglext.cached_tokens_details is not None:
                found = chunk.sglext.cached_tokens_details
            for piece in (choice.delta.content for choice in chunk.choices[:1]):
                if piece:
                    first = self._clock.monotonic() if first is None else first
                    pieces.append(piece)
                    on_text(piece)
        answer = "".join(pieces)
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        return Turn(
            text=answer,
            ttft_seconds=None if first is None else first - started,
            seconds=self._clock.monotonic() - started,
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.completion_tokens,
            found=places(usage, found),
        )

    def _chunks(self, messages: Sequence[dict[str, str]]) -> Iterator[Chunk]:
        url = f"{self.url}/v1/chat/completions"
        body = {
            **self._options,
            "messages": list(messages),
            "session_id": self.session_id,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_cached_tokens_details": True,
        }
        try:
            with self._http.stream("POST", url, json=body) as answer:
                if answer.status_code != 200:
                    content = answer.read()
                    raise protocol.refusal("POST", url, answer.status_code, content, answer.headers)
                for line in answer.iter_lines():
                    data = line.removeprefix("data:").strip()
                    if data == "[DONE]":
                        return
                    if data and data != line:
                        yield decode(data, url)
        except httpx.HTTPError as error:
            raise ServerUnavailableError(f"POST {url}: {error!r}") from error
        raise ServerUnavailableError(f"POST {url}: the answer broke off")


def decode(data: str, url: str) -> Chunk:
    try:
        chunk = msgspec.json.decode(data[:LINE_CHARACTERS_MAX], type=Chunk)
    except msgspec.DecodeError as error:
        raise ServerUnavailableError(f"POST {url}: an unreadable piece: {error}") from error
    if chunk.error is not None:
        raise ServerUnavailableError(f"POST {url}: {chunk.error}")
    return chunk


def places(usage: Usage, found: CachedDetails) -> dict[str, int]:
    """Prompt tokens by where they came from; on the device where the server splits no further."""
    by_level = {
        "device": found.device or 0,
        "host": found.host or 0,
        "storage": found.storage or 0,
    }
    if not any(by_level.values()) and usage.prompt_tokens_details is not None:
        by_level["device"] = usage.prompt_tokens_details.cached_tokens or 0
    by_level["computed"] = max(0, usage.prompt_tokens - sum(by_level.values()))
    return by_level
