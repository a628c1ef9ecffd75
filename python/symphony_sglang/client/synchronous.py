"""The client for code that waits: safe to share between threads."""

from __future__ import annotations

from types import TracebackType
from typing import TypeVar

import httpx

from symphony_sglang.client import calls, protocol
from symphony_sglang.client.answers import Receipt, SessionView
from symphony_sglang.client.calls import Call, Reply, method_of
from symphony_sglang.client.conversation import Conversation, Steps
from symphony_sglang.client.typing_state import EXPIRES_SECONDS, TypingState
from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import ServerUnavailableError, SymphonyError

T = TypeVar("T")


class SymphonyClient:
    """Asks one worker or router. It retries nothing; every call has the same time limit.

    All methods raise ServerUnavailableError where there is no answer or a failure (5xx), and a
    ClientError where the server refuses. What each asks is in `symphony_sglang.client.calls`.
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

    def run(self, call: Call[T]) -> T:
        """Send one call; its answer."""
        try:
            answer = self._http.request(
                call.method, self.url + call.path, json=call.body, headers=self._headers
            )
        except httpx.HTTPError as error:
            where = f"{call.method} {self.url}{call.path}"
            raise ServerUnavailableError(f"{where}: {error!r}") from error
        return call.read(Reply(self.url, answer.status_code, answer.content, answer.headers))

    def run_steps(self, steps: Steps[T]) -> T:
        """Send the calls of several steps, one after the other; what they return."""
        try:
            call = next(steps)
            while True:
                try:
                    answer = self.run(call)
                except SymphonyError as error:
                    call = steps.throw(error)
                else:
                    call = steps.send(answer)
        except StopIteration as done:
            result: T = done.value
            return result

    advise = method_of(calls.advise, run)
    send = method_of(calls.send, run)
    retain = method_of(calls.retain, run)
    receipt = method_of(calls.receipt, run)
    cancel = method_of(calls.cancel, run)
    session_view = method_of(calls.session_view, run)
    release = method_of(calls.release, run)
    residency = method_of(calls.residency, run)
    migrate = method_of(calls.migrate, run)
    move = method_of(calls.move, run)

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
        self._conversation = Conversation(session_id, expires_in_s, release=release)

    @property
    def session_id(self) -> str:
        return self._conversation.session_id

    @property
    def state(self) -> TypingState:
        return self._conversation.state

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.client.run_steps(self._conversation.leave(stumbled=kind is not None))

    def typing(self, *, expected_in_s: float | None = None) -> Receipt:
        """A key was pressed. Call it at every key: it sends at the first, and to renew."""
        now_seconds = self.client.clock.monotonic()
        return self.client.run_steps(self._conversation.type(now_seconds, expected_in_s))

    def cleared(self) -> Receipt | None:
        """The line was emptied: withdraw the hint that is out, if there is one."""
        return self.client.run_steps(self._conversation.clear())

    def sent(self) -> Receipt | None:
        """The turn was sent: the request ends the hint. Gives the hint, for its receipt."""
        return self.state.take()

    def view(self) -> SessionView:
        return self.client.session_view(self.session_id)

    def release(self) -> Receipt | None:
        """The conversation is over. None where the server knew nothing of it."""
        return self.client.run_steps(self._conversation.end())
