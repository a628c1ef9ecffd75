"""What the router reads of a request's body and of an answer's end; the rest passes unread.

Long fields stay raw JSON until somebody needs them. Nothing is judged here except that the body is
a JSON object: whether a value makes sense is for the worker to say.
"""

from __future__ import annotations

from typing import Any

import msgspec

from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.http import Request

ABSENT = msgspec.Raw()
# Only the end of a stream is looked at for its counts, and only of answers this small.
USAGE_BYTES_MAX = 256 << 10


class RequestFields(msgspec.Struct):
    """The fields of ``/generate`` and of the OpenAI routes that placement looks at."""

    model: Any = None
    stream: Any = None
    rid: Any = None
    session_id: Any = None
    routing_key: Any = None
    conversation_id: Any = None
    user: Any = None
    cache_salt: Any = None
    extra_key: Any = None
    lora_path: Any = None
    routed_dp_rank: Any = None
    data_parallel_rank: Any = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    sampling_params: msgspec.Raw = ABSENT
    text: msgspec.Raw = ABSENT
    input_ids: msgspec.Raw = ABSENT
    input_embeds: msgspec.Raw = ABSENT
    image_data: msgspec.Raw = ABSENT
    prompt: msgspec.Raw = ABSENT
    messages: msgspec.Raw = ABSENT
    input: msgspec.Raw = ABSENT
    tools: msgspec.Raw = ABSENT
    tool_choice: msgspec.Raw = ABSENT
    system: msgspec.Raw = ABSENT
    instructions: msgspec.Raw = ABSENT
    chat_template_kwargs: msgspec.Raw = ABSENT
    reasoning_effort: Any = None

    @property
    def streaming(self) -> bool:
        return self.stream is True

    @property
    def request_ids(self) -> list[str]:
        """The ids under which the worker knows the request, where the caller chose them."""
        if isinstance(self.rid, str):
            return [self.rid]
        if isinstance(self.rid, list):
            return [rid for rid in self.rid if isinstance(rid, str)]
        return []


class _SamplingFields(msgspec.Struct):
    max_new_tokens: Any = None


FIELDS = msgspec.json.Decoder(RequestFields)
SAMPLING = msgspec.json.Decoder(_SamplingFields | list[_SamplingFields] | None)
NO_FIELDS = RequestFields()


def read_fields(request: Request) -> RequestFields:
    """The fields of a JSON body; defaults where the body is of another type (audio, a form).

    Raises:
        ApiError: 400, the body is not a JSON object; 415, it does not say what it is.
    """
    if not request.body and request.method != "POST":
        return NO_FIELDS
    kind = request.headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    if kind and kind != b"application/json" and not kind.endswith(b"+json"):
        if kind == b"multipart/form-data":
            return NO_FIELDS
        raise ApiError(
            415, "unsupported_media_type", "expected a request with content-type application/json"
        )
    try:
        return FIELDS.decode(request.body)
    except msgspec.ValidationError as error:
        raise ApiError(400, "invalid_request", f"body: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ApiError(
            400, "json_parse_error", f"Failed to parse the request body as JSON: {error}"
        ) from None


def expected_output(fields: RequestFields) -> int | None:
    """How many tokens the caller lets the worker generate, if it says."""
    for value in (fields.max_completion_tokens, fields.max_tokens, fields.max_output_tokens):
        if isinstance(value, int) and value >= 0:
            return value
    if len(bytes(fields.sampling_params)) > 0:
        try:
            sampling = SAMPLING.decode(fields.sampling_params)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        first = sampling[0] if isinstance(sampling, list) and sampling else sampling
        if isinstance(first, _SamplingFields) and isinstance(first.max_new_tokens, int):
            return first.max_new_tokens
    return None


class Usage(msgspec.Struct, frozen=True):
    """What a worker counted for one request; None where it did not say."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cached_tokens: int | None = None


class _Answer(msgspec.Struct):
    meta_info: Usage | None = None
    usage: Usage | None = None


ANSWER = msgspec.json.Decoder(_Answer)
NO_USAGE = Usage()


def usage_of(tail: bytes) -> Usage:
    """The counts in a JSON answer, or in the last events of a stream that hold any."""
    if len(tail) > USAGE_BYTES_MAX:
        return NO_USAGE
    if tail[:1] == b"{":
        return _usage(tail)
    for line in reversed(tail.split(b"\n")):
        if line.startswith(b"data: {") and (b'"meta_info"' in line or b'"usage"' in line):
            found = _usage(line[6:])
            if found is not NO_USAGE:
                return found
    return NO_USAGE


def _usage(text: bytes) -> Usage:
    try:
        answer = ANSWER.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return NO_USAGE
    return answer.meta_info or answer.usage or NO_USAGE
