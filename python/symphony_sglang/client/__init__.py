"""A typed client of the ``/symphony`` routes of a worker or router, sync and async.

with SymphonyClient("http://127.0.0.1:30000") as client:
    receipt = client.advise("session-1", expected_in_s=2.0)
"""

from symphony_sglang.client.answers import (
    LevelUse,
    Move,
    Receipt,
    Residency,
    SessionTokens,
    SessionView,
    WorkerResidency,
)
from symphony_sglang.client.asynchronous import AsyncSession, AsyncSymphonyClient
from symphony_sglang.client.openai import bind, session_options
from symphony_sglang.client.synchronous import Session, SymphonyClient

__all__ = [
    "AsyncSession",
    "AsyncSymphonyClient",
    "LevelUse",
    "Move",
    "Receipt",
    "Residency",
    "Session",
    "SessionTokens",
    "SessionView",
    "SymphonyClient",
    "WorkerResidency",
    "bind",
    "session_options",
]
