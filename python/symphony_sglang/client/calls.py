"""Every call of the ``/symphony`` routes, said once for both clients; no I/O.

A function here makes a `Call`; a client sends it and reads its answer. `method_of` makes a method
of a client out of such a function, with its parameters and its documentation.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

from symphony_sglang.client import protocol
from symphony_sglang.client.answers import (
    AdviseAnswer,
    Move,
    Receipt,
    Residency,
    SessionView,
)

T = TypeVar("T")
P = ParamSpec("P")
Client = TypeVar("Client")
Sent = TypeVar("Sent")


class Reply(NamedTuple):
    """What came back: `url` is the server's, without a path."""

    url: str
    status: int
    content: bytes
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and how its reply is read. `read` raises what `protocol.decode` does."""

    method: str
    path: str
    kind: type[Any]
    body: Any = None
    # From the decoded body, and the server's address, to what the caller gets; None: as it is.
    pick: Callable[[Any, str], T] | None = None

    def read(self, reply: Reply) -> T:
        url = reply.url + self.path
        found: Any = protocol.decode(
            self.method, url, reply.status, reply.content, reply.headers, self.kind
        )
        result: T = found if self.pick is None else self.pick(found, reply.url)
        return result


def method_of(
    make: Callable[P, Call[T]], send: Callable[[Client, Call[T]], Sent]
) -> Callable[Concatenate[Client, P], Sent]:
    """The method of a client that makes a call and sends it."""

    @functools.wraps(make)
    def method(self: Client, /, *args: P.args, **kwargs: P.kwargs) -> Sent:
        return send(self, make(*args, **kwargs))

    # Without this it would look like a function without `self` that gives a call.
    parameters = inspect.signature(make).parameters.values()
    me = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__signature__ = inspect.Signature([me, *parameters])  # type: ignore[attr-defined]
    return method


def advise(
    session_id: str | None = None,
    *,
    input_ids: Sequence[int] | None = None,
    text: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    extra_key: str | None = None,
    cache_salt: str | None = None,
    expected_in_s: float | None = None,
    expires_in_s: float | None = None,
    priority: int | None = None,
    target: str | None = None,
) -> Call[Receipt]:
    """Say that a session, or a prompt that starts like this, will be back soon.

    Exactly one of the first four says which. Times are in seconds, `target` is ``device`` or
    ``host``. An unknown session is a receipt with the status ``missing``, no error.
    """
    selector = protocol.selector(
        session_id,
        input_ids=input_ids,
        text=text,
        messages=messages,
        extra_key=extra_key,
        cache_salt=cache_salt,
    )
    timing = protocol.timing(
        expected_in_s=expected_in_s, expires_in_s=expires_in_s, priority=priority, target=target
    )
    return _advise({**selector, **timing}, lambda answer, _url: answer.receipts[0])


def send(actions: Sequence[Any]) -> Call[list[Receipt]]:
    """Several actions (`protocol.action`) in one message; a receipt for each, in order."""
    return _advise(protocol.envelope(actions), lambda answer, _url: answer.receipts)


def retain(session_id: str, seconds: float, *, target: str | None = None) -> Call[Receipt]:
    """Ask that a session's KV stays where it is for so long."""
    payload = {
        "session_id": session_id,
        **protocol.timing(expires_in_s=seconds, target=target),
    }
    body = protocol.envelope([protocol.action("retain", payload)])
    return _advise(body, lambda answer, _url: answer.receipts[0])


def _advise(body: Any, pick: Callable[[AdviseAnswer, str], T]) -> Call[T]:
    return Call("POST", "/symphony/advise", AdviseAnswer, body, pick)


def receipt(advisory_id: str) -> Call[Receipt]:
    """What has become of an advisory so far."""
    return Call("GET", protocol.advisory_path(advisory_id), Receipt)


def cancel(advisory_id: str) -> Call[Receipt]:
    """Withdraw an advisory; one that has ended already is answered as it is."""
    return Call("DELETE", protocol.advisory_path(advisory_id), Receipt)


def session_view(session_id: str) -> Call[SessionView]:
    """Where a session's tokens are.

    Raises:
        NotKnownError: no turn of it has ended there.
    """
    return Call("GET", protocol.session_path(session_id), SessionView)


def release(session_id: str) -> Call[Receipt]:
    """The session is over: its advisories end and its memory is ordinary again."""
    return Call("DELETE", protocol.session_path(session_id), Receipt)


def residency() -> Call[Residency]:
    """How full every level is: of the worker asked, or of all workers of a router."""
    return Call("GET", "/symphony/residency", dict, None, protocol.parse_residency)


def migrate(session_id: str, to: str) -> Call[Move]:
    """Router only: move a session to another worker."""
    return Call("POST", "/symphony/migrate", Move, {"session_id": session_id, "to": to})


def move(move_id: str) -> Call[Move]:
    """Router only: how far a move is."""
    return Call("GET", protocol.move_path(move_id), Move)
