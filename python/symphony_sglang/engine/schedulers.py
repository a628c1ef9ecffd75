"""The HTTP process asks its schedulers a control question, as long as there are any."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from symphony_sglang.engine.messages import COMMUNICATOR_NAME, ControlReply
from symphony_sglang.errors import LeavingError


class Departure:
    """What this process knows of its server's end."""

    def __init__(self) -> None:
        # SIGTERM has come. Streams that would go on for ever end here.
        self.begun = asyncio.Event()
        self._over = False
        self._limits: set[asyncio.Timeout] = set()
        self._calls: set[asyncio.Task[list[ControlReply]]] = set()

    def end(self) -> None:
        """The schedulers are gone: whoever waits for them is told, or the server never ends.

        It closes once no request is left (uvicorn), and an answer would never come.
        """
        self._over = True
        now_seconds = asyncio.get_running_loop().time()
        for limit in self._limits:
            limit.reschedule(now_seconds)

    async def answer(self, call: Coroutine[Any, Any, list[ControlReply]]) -> list[ControlReply]:
        """What `call` gives; it goes on when the caller of this is cancelled.

        Raises:
            LeavingError: the schedulers are gone.
        """
        limit = asyncio.timeout(0 if self._over else None)
        self._limits.add(limit)
        task = asyncio.get_running_loop().create_task(call, name="symphony.ask")
        self._calls.add(task)
        task.add_done_callback(self._calls.discard)
        try:
            async with limit:
                return await asyncio.shield(task)
        except TimeoutError:
            raise LeavingError("the server is ending") from None
        finally:
            self._limits.discard(limit)


departure = Departure()


async def ask_schedulers(manager: Any, question: Any) -> list[ControlReply]:
    """The answers of the data-parallel ranks, in no order.

    SGLang's communicator takes the next reply for the answer to the question under way, so a
    question whose asker went away is waited for all the same: its reply would be the next asker's.

    Raises:
        LeavingError: the schedulers are gone.
    """
    manager.auto_create_handle_loop()
    communicator = getattr(manager, f"{COMMUNICATOR_NAME}_communicator")
    return await departure.answer(communicator(question))
