"""The client for code that waits: safe to share between threads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import httpx

from symphony_sglang.client import protocol
from symphony_sglang.client.answers import (
    AdviseAnswer,
    Move,
    Receipt,
    Residency,
    SessionView,
)
from symphony_sglang.client.typing_state import EXPIRES_SECONDS, TypingState
from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ClientError, NotKnownError, ServerUnavailableError

T = TypeVar("T")


class SymphonyClient:
    """Asks one worker or router. It retries nothing; every call has the same time limit.

    All methods raise ServerUnavailableError where there is no answer or a failure (5xx), and a
    ClientError where the server refuses.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_seconds: float = protocol.TIMEOUT_SECONDS,
        verify: str | None = None,
        http: httpx.Client | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.url = protocol.base_url(url)
        self.clock = clock or SystemClock()
        self._http = http or httpx.Client(
            timeout=timeout_seconds, verify=protocol.tls_context(verify)
        )
        self._headers = protocol.auth_headers(api_key)

    def __enter__(self) -> SymphonyClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, kind: type[T], body: Any = None) -> T:
        """One request; its answer decoded as `kind`."""
        try:
            answer = self._http.request(method, self.url + path, json=body, headers=self._headers)
        except httpx.HTTPError as error:
            raise ServerUnavailableError(f"{method} {self.url}{path}: {error!r}") from error
        return protocol.decode(
            method, self.url + path, answer.status_code, answer.content, answer.headers, kind
        )

    def advise(
        self,
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
    ) -> Receipt:
        """Say that a session, or a prompt that starts like this, will be back soon.

        Exactly one of the first four says which. Times are in seconds, `target` is ``device`` or
        ``host``. An unknown session is a receipt with the status ``missing``, no error.
        """
        body = {
            **protocol.selector(
                session_id,
                input_ids=input_ids,
                text=text,
                messages=messages,
                extra_key=extra_key,
                cache_salt=cache_salt,
            ),
            **protocol.timing(
                expected_in_s=expected_in_s,
                expires_in_s=expires_in_s,
                priority=priority,
                target=target,
            ),
        }
        return self.ask("POST", "/symphony/advise", AdviseAnswer, body).receipts[0]

    def send(self, actions: Sequence[Any]) -> list[Receipt]:
        """Several actions (`protocol.action`) in one message; a receipt for each, in order."""
        body = protocol.envelope(actions)
        return self.ask("POST", "/symphony/advise", AdviseAnswer, body).receipts

    def retain(self, session_id: str, seconds: float, *, target: str | None = None) -> Receipt:
        """Ask that a session's KV stays where it is for so long."""
        payload = {"session_id": session_id, **protocol.timing(expires_in_s=seconds, target=target)}
        return self.send([protocol.action("retain", payload)])[0]

    def receipt(self, advisory_id: str) -> Receipt:
        """What has become of an advisory so far."""
        return self.ask("GET", protocol.advisory_path(advisory_id), Receipt)

    def cancel(self, advisory_id: str) -> Receipt:
        """Withdraw an advisory; one that has ended already is answered as it is."""
        return self.ask("DELETE", protocol.advisory_path(advisory_id), Receipt)

    def session_view(self, session_id: str) -> SessionView:
        """Where a session's tokens are.

        Raises:
            NotKnownError: no turn of it has ended there.
        """
        return self.ask("GET", protocol.session_path(session_id), SessionView)

    def release(self, session_id: str) -> Receipt:
        """The session is over: its advisories end and its memory is ordinary again."""
        return self.ask("DELETE", protocol.session_path(session_id), Receipt)

    def residency(self) -> Residency:
        """How full every level is: of the worker asked, or of all workers of a router."""
        return protocol.parse_residency(self.ask("GET", "/symphony/residency", dict), self.url)

    def migrate(self, session_id: str, to: str) -> Move:
        """Router only: move a session to another worker."""
        body = {"session_id": session_id, "to": to}
        return self.ask("POST", "/symphony/migrate", Move, body)

    def move(self, move_id: str) -> Move:
        """Router only: how far a move is."""
        return self.ask("GET", protocol.move_path(move_id), Move)

    def session(
        self, session_id: str, *, expires_in_s: float = EXPIRES_SECONDS, release: bool = False
    ) -> Session:
        """A handle for one conversation; see `Session`."""
        return Session(self, session_id, expires_in_s=expires_in_s, release=release)


class Session:
    """One conversation at a keyboard. As a context manager it leaves no hint behind.

    Leaving the block withdraws a hint that no turn followed; with `release`, it ends the session.
    """

    def __init__(
        self, client: SymphonyClient, session_id: str, *, expires_in_s: float, release: bool
    ) -> None:
        self.client = client
        self.session_id = session_id
        self.state = TypingState(expires_in_s)
        self._release = release

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        try:
            self.cleared()
            if self._release:
                self.release()
        except (ClientError, ServerUnavailableError):
            # The error inside the block is the one to see; without one, this is.
            if kind is None:
                raise

    def typing(self, *, expected_in_s: float | None = None) -> Receipt:
        """A key was pressed. Call it at every key: it sends at the first, and to renew."""
        now_seconds = self.client.clock.monotonic()
        if self.state.due(now_seconds):
            receipt = self.client.advise(
                self.session_id,
                expected_in_s=expected_in_s,
                expires_in_s=self.state.expires_seconds,
            )
            self.state.advised(receipt, now_seconds)
        assert self.state.receipt is not None
        return self.state.receipt

    def cleared(self) -> Receipt | None:
        """The line was emptied: withdraw the hint that is out, if there is one."""
        receipt = self.state.take()
        if receipt is None or receipt.advisory_id is None or not receipt.live:
            return None
        try:
            return self.client.cancel(receipt.advisory_id)
        except NotKnownError:
            return None

    def sent(self) -> Receipt | None:
        """The turn was sent: the request ends the hint. Gives the hint, for its receipt."""
        return self.state.take()

    def view(self) -> SessionView:
        return self.client.session_view(self.session_id)

    def release(self) -> Receipt | None:
        """The conversation is over. None where the server knew nothing of it."""
        try:
            return self.client.release(self.session_id)
        except NotKnownError:
            return None
