"""The HTTP process's way to the schedulers: many callers, one message in flight.

SGLang's communicator carries one question at a time. Callers that come while one is under way are
answered together by the next, so a storm of hints costs the scheduler one message a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

BATCH_MAX = 256
PENDING_MAX = 20_000

Ask = Callable[[list[Any]], Awaitable[list[Any]]]


class GatewayFullError(Exception):
    """More callers wait than the gateway holds; the caller should try again later."""


@dataclass(slots=True)
class _Entry:
    action: Any
    reply: Any = None
    error: BaseException | None = None
    done: bool = False


class Gateway:
    """Collects actions and sends them in batches; whoever holds the lock sends for all."""

    def __init__(
        self, ask: Ask, *, batch_max: int = BATCH_MAX, pending_max: int = PENDING_MAX
    ) -> None:
        self._ask = ask
        self._batch_max = batch_max
        self._pending_max = pending_max
        self._pending: list[_Entry] = []
        self._lock = asyncio.Lock()

    async def submit(self, action: Any) -> Any:
        """The schedulers' answer to `action`.

        Raises:
            GatewayFullError: `pending_max` callers wait already; nothing was sent.
        """
        if len(self._pending) >= self._pending_max:
            raise GatewayFullError(f"{len(self._pending)} control messages wait already")
        entry = _Entry(action)
        self._pending.append(entry)
        async with self._lock:
            # The lock is first come, first served: whoever got it before may have sent for us.
            while not entry.done:
                await self._send_batch()
        if entry.error is not None:
            raise entry.error
        return entry.reply

    async def _send_batch(self) -> None:
        batch, self._pending = (
            self._pending[: self._batch_max],
            self._pending[self._batch_max :],
        )
        try:
            replies = await self._ask([entry.action for entry in batch])
            assert len(replies) == len(batch), (len(replies), len(batch))
        except BaseException as error:
            for entry in batch:
                entry.error, entry.done = error, True
            raise
        for entry, reply in zip(batch, replies, strict=True):
            entry.reply, entry.done = reply, True
