"""What travels between the HTTP process and the schedulers, over SGLang's own sockets.

Each request is a plain SGLang control message: rank 0 receives it and broadcasts it, so every
tensor-parallel rank sees the same message in the same step (request_receiver.py:163).
"""

from __future__ import annotations

from typing import Any

import msgspec
from sglang.srt.managers.io_struct import BaseReq


class ResidencyRequest(BaseReq):
    """Ask each scheduler how full its levels are."""


class ControlReply(BaseReq):
    """The answer of one data-parallel rank; `body` is JSON-ready."""

    body: dict[str, Any] = msgspec.field(default_factory=dict)


REQUEST_TYPES: tuple[type[BaseReq], ...] = (ResidencyRequest,)
REPLY_TYPES: tuple[type[BaseReq], ...] = (ControlReply,)
COMMUNICATOR_NAME = "symphony"
