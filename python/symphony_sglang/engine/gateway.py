"""The HTTP process's way to the schedulers: many callers, one message in flight.

SGLang's communicator carries one question at a time. Callers that come while one is under way are
answered together by the next, so a storm of hints costs the scheduler one message a step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

BATCH_MAX = 256
PENDING_MAX = 20_000

Ask = Callable[[list[Any]], Awaitable[list[Any]]]


class GatewayFullError(Exception):
    """More callers wait than the gateway holds; the caller should try again later."""


class _Entry(NamedTuple):
    action: Any
    reply: asyncio.Future[Any]


class Gateway:
    """Collects actions and sends them in batches, by one task of its own: a caller that goes away
    takes nobody's answer with it."""

    def __init__(
        self, ask: Ask, *, batch_max: int = BATCH_MAX, pending_max: int = PENDING_MAX
    ) -> None:
        self._ask = ask
        self._batch_max = batch_max
        self._pending_max = pending_max
        self._pending: list[_Entry] = []
        self._sender: asyncio.Task[None] | None = None

    async def submit(self, action: Any) -> Any:
        """The schedulers' answer to `action`.

        Raises:
            GatewayFullError: `pending_max` callers wait already; nothing was sent.
        """
        if len(self._pending) >= self._pending_max:
            raise GatewayFullError(f"{len(self._pending)} control messages wait already")
        loop = asyncio.get_running_loop()
        entry = _Entry(action, loop.create_future())
        self._pending.append(entry)
        if self._sender is None or self._sender.done():
            self._sender = loop.create_task(self._send_all(), name="symphony.gateway")
        return await entry.reply

    async def _send_all(self) -> None:
        while self._pending:
            batch = self._pending[: self._batch_max]
            self._pending = self._pending[self._batch_max :]
            try:
                replies = await self._ask([entry.action for entry in batch])
                assert len(replies) == len(batch), (len(replies), len(batch))
            except Exception as error:  # noqa: BLE001 - the callers get it
                for entry in batch:
                    if not entry.reply.done():
                        entry.reply.set_exception(error)
            else:
                for entry, reply in zip(batch, replies, strict=True):
                    if not entry.reply.done():  # its caller may have gone
                        entry.reply.set_result(reply)
