"""Answers that refuse: one exception, and the JSON that callers of SGLang and OpenAI expect."""

from __future__ import annotations

from typing import Any

import msgspec

from symphony_sglang.errors import SymphonyError

# OpenAI's words for kinds of errors, by status.
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    501: "not_implemented_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ApiError(SymphonyError):
    """A request is answered with `status` and an error body; `error_code` is for programs."""

    code = "router_refused"

    def __init__(
        self,
        status: int,
        error_code: str,
        message: str,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error_code = error_code
        self.headers = headers


def error_document(status: int, error_code: str, message: str) -> dict[str, Any]:
    """The body of an error: OpenAI's object, and the ``message`` that SGLang puts beside it."""
    kind = ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {"message": message, "type": kind, "code": error_code, "param": None},
        "object": "error",
        "message": message,
    }


def stream_error(status: int, error_code: str, message: str) -> bytes:
    """An event that ends a stream which cannot go on; clients of OpenAI's API raise on it."""
    return b"data: " + msgspec.json.encode(error_document(status, error_code, message)) + b"\n\n"
