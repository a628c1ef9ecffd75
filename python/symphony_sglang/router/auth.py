"""Who may call what: keys of callers, a key for control routes, keys towards workers."""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from enum import Enum

from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.http import Request


class Access(Enum):
    """Who may use a route."""

    OPEN = "open"  # anybody: liveness and metrics
    CALLER = "caller"
    CONTROL = "control"  # changes the fleet, or stops work


@dataclass(frozen=True, slots=True)
class Keys:
    """`caller`, `admin` empty: not asked for. An admin's key opens callers' routes too."""

    caller: str = field(default="", repr=False)
    admin: tuple[str, ...] = field(default=(), repr=False)
    worker: str = field(default="", repr=False)

    def check(self, request: Request, access: Access) -> None:
        """Raises:
        ApiError: 401, no key; 403, not the right one.
        """
        if access is Access.OPEN:
            return
        wanted = self.admin if access is Access.CONTROL and self.admin else ()
        if not wanted and self.caller:
            wanted = (self.caller, *self.admin)
        if not wanted:
            return
        given = bearer(request)
        if not given:
            header = (b"www-authenticate", b"Bearer")
            raise ApiError(401, "missing_api_key", "no API key was given", (header,))
        # All are compared, each in constant time, so that time tells nothing.
        if not sum(hmac.compare_digest(given, key.encode()) for key in wanted):
            status = 403 if access is Access.CONTROL and self._is_caller(given) else 401
            what = "this key may not use control routes" if status == 403 else "unknown API key"
            raise ApiError(status, "invalid_api_key", what)

    def _is_caller(self, given: bytes) -> bool:
        return bool(self.caller) and hmac.compare_digest(given, self.caller.encode())


def bearer(request: Request) -> bytes:
    """The key of an Authorization header; Anthropic's clients send it as ``x-api-key``."""
    value = request.headers.get(b"authorization", b"")
    kind, _space, key = value.partition(b" ")
    if kind.lower() == b"bearer":
        return key.strip()
    return request.headers.get(b"x-api-key", b"")
