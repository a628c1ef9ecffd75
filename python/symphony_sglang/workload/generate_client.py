"""One ``/generate`` request, sent and measured; and what a server says of itself.

Fields read: ``output_ids`` and ``meta_info`` of the answers (SGLang 0.5.23,
srt/managers/tokenizer_manager.py), its ``cached_tokens_details``
(srt/managers/scheduler_components/ output_streamer.py), and ``max_req_input_len`` of
``/server_info``.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import msgspec
import xxhash

from symphony_sglang.clock import Clock
from symphony_sglang.errors import ConfigError, ServerUnavailableError

EVENT_BYTES_MAX = 64 << 20
CONNECT_SECONDS_MAX = 10.0
QUESTION_SECONDS_MAX = 30.0
HEALTH_ATTEMPTS = 3
HEALTH_PAUSE_SECONDS = 1.0
WORKER_HEADER = "X-Symphony-Worker"
REASON_CHARACTERS_MAX = 500


class CachedTokens(msgspec.Struct, frozen=True):
    """Prompt tokens found at each level; the rest of the prompt was computed."""

    device: int = 0
    host: int = 0
    storage: int = 0

    def total(self) -> int:
        return self.device + self.host + self.storage


class Generation(msgspec.Struct, frozen=True):
    """What one request gave. `error` is None for an answer that came whole.

    Attributes:
        ttft_seconds: from sending to the first event that carries a token; None without streaming.
        finish_reason: why the server ended the answer, by its own word.
        worker: which worker answered, where a router says so.
    """

    latency_seconds: float
    ttft_seconds: float | None = None
    prompt_tokens: int = 0
    cached: CachedTokens = CachedTokens()
    output_ids: tuple[int, ...] = ()
    finish_reason: str = ""
    status: int = 0
    error: str | None = None
    worker: str = ""

    @property
    def tpot_seconds(self) -> float | None:
        """Mean time of an output token after the first."""
        if self.ttft_seconds is None or len(self.output_ids) < 2:
            return None
        return (self.latency_seconds - self.ttft_seconds) / (len(self.output_ids) - 1)

    def output_hash(self) -> str:
        """16 hex digits that stand for the output's token ids."""
        return xxhash.xxh3_64_hexdigest(",".join(map(str, self.output_ids)).encode())


class ServerFacts(NamedTuple):
    """What a server can take; `vocab` is None where its model is not on this machine."""

    model_path: str
    vocab: int | None
    context_tokens: int
    prompt_tokens_max: int


class FinishReason(msgspec.Struct):
    type: str = ""
    message: str = ""
    status_code: int | None = None


class MetaInfo(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cached_tokens_details: dict[str, Any] | None = None
    finish_reason: FinishReason | None = None


class GenerateEvent(msgspec.Struct):
    """An answer, or one event of a streamed one."""

    output_ids: list[int] = []
    meta_info: MetaInfo = msgspec.field(default_factory=MetaInfo)
    error: Any = None


EVENT_DECODER = msgspec.json.Decoder(GenerateEvent)


class GenerateClient:
    """Sends to one server. Use as an async context manager; it retries nothing."""

    def __init__(
        self,
        url: str,
        *,
        clock: Clock,
        request_seconds_max: float = 600.0,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`headers` go with every request."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url is {url!r}; expected http://host:port")
        if not 0.001 <= request_seconds_max <= 1e6:  # false for NaN too
            raise ConfigError(
                f"--request-timeout is {request_seconds_max:g}; expected 0.001 to 1e+06 seconds"
            )
        self.url = url.rstrip("/")
        self._clock = clock
        self._timeout = aiohttp.ClientTimeout(
            total=request_seconds_max, sock_connect=CONNECT_SECONDS_MAX
        )
        self._headers = dict(headers or {})
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._http: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> GenerateClient:
        # No limit on connections: what bounds the requests in flight is the caller.
        self._http = aiohttp.ClientSession(
            headers=self._headers, connector=aiohttp.TCPConnector(limit=0), timeout=self._timeout
        )
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._http is not None:
            await self._http.close()

    @property
    def http(self) -> aiohttp.ClientSession:
        assert self._http is not None, "use the client as a context manager"
        return self._http

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """Status and decoded JSON (None if it is not JSON) of a small request.

        Raises:
            ServerUnavailableError: no answer.
        """
        timeout = aiohttp.ClientTimeout(total=QUESTION_SECONDS_MAX)
        try:
            async with self.http.request(
                method, self.url + path, json=body, timeout=timeout
            ) as answer:
                content = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ServerUnavailableError(f"{self.url}{path}: {describe(error)}") from error
        try:
            return answer.status, msgspec.json.decode(content)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return answer.status, None

    async def facts(self) -> ServerFacts:
        """What the server can take.

        Raises:
            ServerUnavailableError: it does not answer, or not as SGLang does.
        """
        answers = {}
        for path in ("/model_info", "/server_info", "/v1/models"):
            status, answer = await self.ask("GET", path)
            if status != 200 or not isinstance(answer, dict):
                raise ServerUnavailableError(f"{self.url}{path} answered {status}; is it SGLang?")
            answers[path] = answer
        cards = answers["/v1/models"].get("data") or [{}]
        context = cards[0].get("max_model_len") or answers["/server_info"].get("context_length")
        most = answers["/server_info"].get("max_req_input_len")
        if not isinstance(context, int) or not isinstance(most, int):
            raise ServerUnavailableError(
                f"{self.url} tells neither its context nor its longest prompt"
            )
        model_path = str(answers["/model_info"].get("model_path", ""))
        return ServerFacts(model_path, local_vocab(model_path), context, min(most, context - 1))

    async def healthy(self) -> bool:
        """Whether ``/health`` answers 200, asked a few times before the answer is no."""
        for attempt in range(HEALTH_ATTEMPTS):
            if attempt:
                await asyncio.sleep(HEALTH_PAUSE_SECONDS)
            try:
                if (await self.ask("GET", "/health"))[0] == 200:
                    return True
            except ServerUnavailableError:
                continue
        return False

    async def count_tokens(self, text: str) -> int | None:
        """Tokens of `text` by the server's tokenizer; None where it has no such route."""
        status, answer = await self.ask("POST", "/tokenize", {"model": "", "prompt": text})
        count = answer.get("count") if isinstance(answer, dict) else None
        return count if status == 200 and isinstance(count, int) else None

    async def generate(self, body: bytes, *, stream: bool) -> Generation:
        """Send a JSON `body` whose ``stream`` field is as `stream` says, and measure.

        Failures of this one request come back as `error`.
        """
        started = self._clock.monotonic()
        first: float | None = None
        status, worker = 0, ""
        events: list[GenerateEvent] = []
        try:
            async with self.http.post(
                self.url + "/generate", data=body, headers={"Content-Type": "application/json"}
            ) as answer:
                status = answer.status
                worker = answer.headers.get(WORKER_HEADER, "")
                if status != 200:
                    reason = (await answer.text(errors="replace"))[:REASON_CHARACTERS_MAX]
                    return self._failed(started, status, f"HTTP {status}: {reason}")
                if stream:
                    async for data in server_events(answer.content):
                        events.append(EVENT_DECODER.decode(data))
                        if first is None and events[-1].output_ids:
                            first = self._clock.monotonic()
                else:
                    events.append(EVENT_DECODER.decode(await answer.read()))
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return self._failed(started, status, describe(error))
        latency = self._clock.monotonic() - started
        result = collect(
            events, status, latency_seconds=latency, ttft=None if first is None else first - started
        )
        return msgspec.structs.replace(result, worker=worker) if worker else result

    def _failed(self, started: float, status: int, reason: str) -> Generation:
        return Generation(
            latency_seconds=self._clock.monotonic() - started, status=status, error=reason
        )


async def server_events(content: aiohttp.StreamReader) -> AsyncIterator[bytes]:
    """The ``data:`` payloads of an event stream, up to ``[DONE]``.

    Raises:
        ValueError: an event is larger than 64 MiB, or the stream ends before ``[DONE]``.
    """
    pending = bytearray()
    async for piece in content.iter_any():
        pending += piece
        while (end := pending.find(b"\n\n")) >= 0:
            event = bytes(pending[:end])
            del pending[: end + 2]
            for line in event.splitlines():
                if not line.startswith(b"data:"):
                    continue
                data = line[len(b"data:") :].strip()
                if data == b"[DONE]":
                    return
                yield data
        if len(pending) > EVENT_BYTES_MAX:
            raise ValueError(f"an event of over {EVENT_BYTES_MAX} bytes")
    raise ValueError("the stream ended before its end mark")


def collect(
    events: list[GenerateEvent], status: int, *, latency_seconds: float, ttft: float | None
) -> Generation:
    """One result from all events; each holds the whole output so far, or only what is new."""
    if not events:
        return Generation(latency_seconds=latency_seconds, status=status, error="an empty answer")
    last = events[-1]
    info = last.meta_info
    reason = info.finish_reason or FinishReason()
    error = None
    if last.error is not None:
        error = str(last.error)[:REASON_CHARACTERS_MAX]
    elif reason.type == "abort":
        error = f"aborted: {reason.message[:REASON_CHARACTERS_MAX]}"
    output = last.output_ids
    if len(output) < info.completion_tokens:
        output = [token for event in events for token in event.output_ids]
    return Generation(
        latency_seconds=latency_seconds,
        ttft_seconds=ttft,
        prompt_tokens=info.prompt_tokens,
        cached=cached_tokens(info),
        output_ids=tuple(output),
        finish_reason=reason.type,
        status=status,
        error=error,
    )


def cached_tokens(info: MetaInfo) -> CachedTokens:
    """By level where the server reports levels; all of them on the device where it does not."""
    details = info.cached_tokens_details
    if details is None:
        return CachedTokens(device=info.cached_tokens)
    return CachedTokens(
        **{level: int(details.get(level) or 0) for level in CachedTokens.__struct_fields__}
    )


def describe(error: BaseException) -> str:
    """`error` in one line, also where its own text is empty."""
    text = " ".join(str(error).split())[:REASON_CHARACTERS_MAX]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def local_vocab(model_path: str) -> int | None:
    """``vocab_size`` of a model directory on this machine, else None."""
    try:
        config = msgspec.json.decode((Path(model_path) / "config.json").read_bytes())
        vocab = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    except (OSError, msgspec.DecodeError, AttributeError):
        return None
    return vocab if isinstance(vocab, int) else None
