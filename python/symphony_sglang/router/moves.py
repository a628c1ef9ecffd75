"""What the router's other parts ask of the one that moves sessions between workers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from symphony_sglang.core.migration_book import EarlyChoice
from symphony_sglang.core.routing_types import AdvisoryChoice, RouteRequest
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.registry import Worker

if TYPE_CHECKING:
    from symphony_sglang.router.placement import Placed

REASON = "this router moves no sessions: it runs with --disable-migration"


class Mover(Protocol):
    """What the control and advisory routes ask for."""

    async def migrate(self, body: Any) -> dict[str, Any]:
        """Begin a move of a session: ``{"session_id", "to"}``; its record."""
        ...

    async def drain(self, worker: Worker) -> dict[str, Any]:
        """Hand all sessions off, then stop sending; a record."""
        ...

    def move(self, move_id: str) -> dict[str, Any] | None:
        """The record of a move."""
        ...

    def recent(self) -> list[dict[str, Any]]:
        """The newest records, at most 64, newest last."""
        ...

    def of_session(self, session_id: str) -> list[dict[str, Any]]:
        """The records of a session's moves."""
        ...

    def ownership(self) -> list[dict[str, Any]]:
        """What was seen of who owns which session, oldest first."""
        ...

    def changed(self, after: int) -> tuple[list[dict[str, Any]], int]:
        """Records that changed state after change number `after`, and the newest number."""
        ...

    def advise(self, session_key: str, choice: AdvisoryChoice) -> dict[str, Any] | None:
        """Move the session to where its next turn should be served; its record, None: it stays."""
        ...

    def place(self, session_key: str) -> str | None:
        """Where a session is: its owner, or while it moves, where it will be."""
        ...

    def session_over(self, session_key: str) -> None:
        """The session is over: it moves no more."""
        ...


class MovingSessions(Protocol):
    """What placement asks of the mover."""

    def early(self, route: RouteRequest) -> EarlyChoice | None:
        """Where a request must go because its session moves; None: anywhere."""
        ...

    async def prepare(self, placed: Placed) -> None:
        """Before a request is sent: wait for pages that are worth it."""
        ...

    def ended(self, placed: Placed) -> None:
        """The request has ended, however."""
        ...


class NoMover:
    """Refuses all moves."""

    async def migrate(self, body: Any) -> dict[str, Any]:
        raise ApiError(501, "migration_unsupported", REASON)

    async def drain(self, worker: Worker) -> dict[str, Any]:
        raise ApiError(501, "migration_unsupported", REASON)

    def move(self, move_id: str) -> dict[str, Any] | None:
        raise ApiError(501, "migration_unsupported", REASON)

    def recent(self) -> list[dict[str, Any]]:
        return []

    def of_session(self, session_id: str) -> list[dict[str, Any]]:
        return []

    def ownership(self) -> list[dict[str, Any]]:
        return []

    def changed(self, after: int) -> tuple[list[dict[str, Any]], int]:
        return [], after

    def advise(self, session_key: str, choice: AdvisoryChoice) -> dict[str, Any] | None:
        return None

    def place(self, session_key: str) -> str | None:
        return None

    def session_over(self, session_key: str) -> None:
        pass
