"""What travels between the HTTP process and the schedulers, over SGLang's own sockets.

Each request is a plain SGLang control message: rank 0 receives it and broadcasts it, so every
tensor-parallel rank sees the same message in the same step (request_receiver.py:163).
"""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.managers.io_struct import BaseReq

from symphony_sglang.core.gate import GateSnapshot
from symphony_sglang.core.migration import Order


class ResidencyRequest(BaseReq):
    """Ask each scheduler how full its levels are."""


class AdvisoryAction(msgspec.Struct, frozen=True, kw_only=True):
    """One hint, parsed and tokenized. `verb` is an ``ActionType`` value, ``forget`` or a query.

    `token_bytes` is a prefix as little-endian int32, None where the session names it.
    """

    verb: str
    advisory_id: str = ""
    action_id: str | None = None
    session_id: str | None = None
    token_bytes: bytes | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    target: str = "device"
    expected_in_seconds: float | None = None
    expires_in_seconds: float = 60.0
    priority: int = 0
    caller: str = ""
    reason: str = ""


class AdvisoryBatch(BaseReq):
    """Hints and questions of many callers, in order of arrival.

    `sent_seconds` is the HTTP process's monotonic clock, which on one machine is rank 0's too.
    """

    actions: list[AdvisoryAction]
    sent_seconds: float


class AdvisoryTick(BaseReq):
    """Rank 0's clock, for every rank: nothing decides by a clock of its own.

    `speeds` are rank 0's measurements where they changed, for the break-even gate.
    """

    now_seconds: float
    speeds: GateSnapshot | None = None


class SessionRestore(BaseReq):
    """Session records that rank 0 found in its store at the start, for every rank."""

    blobs: list[bytes]
    now_seconds: float


class PeerRequest(BaseReq):
    """A pull, a question about one, or a router's order for a move (``engine.peer``)."""

    verb: str
    sent_seconds: float
    pull_id: str = ""
    advisory_id: str = ""
    session_id: str | None = None
    token_bytes: bytes | None = None
    extra_key: str | None = None
    cache_salt: str | None = None
    source: str = ""
    target: str = "device"
    deadline_seconds: float = 60.0
    order: Order | None = None


class PullEnded(BaseReq):
    """Rank 0 to all ranks: a pull has ended on every one of them; `tokens` are here on each."""

    pull_id: str
    stored: bool
    complete: bool
    reason: str
    tokens: int
    bytes_copied: int
    blob: bytes | None
    now_seconds: float


class CalibrationRequest(BaseReq):
    """Take these speeds over (``rates.rates_json``), or, where there are none, measure them."""

    speeds: dict[str, Any] | None = None


class ControlReply(BaseReq):
    """The answer of one data-parallel rank; `body` is JSON-ready."""

    body: dict[str, Any] = msgspec.field(default_factory=dict)


REPLY_TYPES: tuple[type[BaseReq], ...] = (ControlReply,)
COMMUNICATOR_NAME = "symphony"
