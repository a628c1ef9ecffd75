"""``SymphonyEndpoint``: SGLang's ``RuntimeEndpoint``, with every program a session that advises.

The seam is `_add_images`, which RuntimeEndpoint calls on the body of each request right before it
is sent (sglang/lang/backend/runtime_endpoint.py), and the public methods of a backend.
"""

from __future__ import annotations

import atexit
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

from symphony_sglang.client import SymphonyClient
from symphony_sglang.lang.adviser import Adviser, AdviserSettings
from symphony_sglang.lang.program import Event, Kind, Program

FORKS_MAX = 4096
EXIT_SECONDS_MAX = 1.0


class SymphonyEndpoint(RuntimeEndpoint):  # type: ignore[misc]
    """A backend for ``sgl.set_default_backend``, on a worker or a router.

    On its own it advises when a program forks (its children need the shared prefix), when a
    program waits for something outside after a turn, and when a child ends (its parent goes on);
    at a program's end it releases the session. Advising never blocks a program: see `Adviser`.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
        *,
        settings: AdviserSettings | None = None,
    ) -> None:
        """The first four are RuntimeEndpoint's own; `verify` is a path to a CA file."""
        super().__init__(base_url, api_key, verify, chat_template_name)
        # RuntimeEndpoint claims it, but no route of SGLang's server serves it: with False the
        # interpreter joins texts, which the radix cache makes as cheap.
        self.support_concate_and_append = False
        settings = settings or AdviserSettings()
        client = SymphonyClient(
            base_url,
            api_key=api_key,
            timeout_seconds=settings.request_seconds_max,
            verify=verify,
        )
        self.adviser = Adviser(client, settings)
        self._programs: weakref.WeakKeyDictionary[Any, Program] = weakref.WeakKeyDictionary()
        # Who forked at which text, so that a child finds its parent; the oldest is forgotten.
        self._forks: OrderedDict[tuple[int, int], Program] = OrderedDict()
        atexit.register(_close, weakref.ref(self))

    # Requests ----------------------------------------------------------------------------------

    def program(self, s: Any) -> Program:
        """The record of an executor's program, made at its first use."""
        found = self._programs.get(s)
        # Its body's thread and the one that executes it may both come first: one record wins.
        return self._programs.setdefault(s, self._new_program(s)) if found is None else found

    def _new_program(self, s: Any) -> Program:
        start = s.fork_start_text_pos
        if start is None:
            return Program(s, s.sid)
        shared = str(s.text_[:start])
        parent = self._forks.get((start, hash(shared)))
        # With images a hint by text would name another prefix.
        return Program(s, s.sid, parent, None if s.images_ else shared)

    def _add_images(self, s: Any, data: dict[str, Any]) -> None:
        super()._add_images(s, data)
        session_id = self.program(s).session_id
        if isinstance(data.get("text"), str):
            data["session_id"] = session_id
        else:
            # Choices under comparison: they belong where the prefix is, but are no turns.
            data["routing_key"] = session_id

    @contextmanager
    def _turn(self, s: Any, kind: Kind = Kind.TURN_ENDED) -> Iterator[None]:
        program = self.program(s)
        program.started += 1
        program.in_flight += 1
        try:
            yield
            program.turns += 1
        finally:
            program.in_flight -= 1
            self.adviser.tell(Event(kind, program, started=program.started))

    def generate(self, s: Any, sampling_params: Any) -> Any:
        with self._turn(s):
            return super().generate(s, sampling_params)

    def generate_stream(self, s: Any, sampling_params: Any) -> Iterator[Any]:
        with self._turn(s):
            yield from super().generate_stream(s, sampling_params)

    def select(self, s: Any, choices: Any, temperature: float, choices_method: Any) -> Any:
        with self._turn(s):
            return super().select(s, choices, temperature, choices_method)

    def fill_image(self, s: Any) -> None:
        with self._turn(s):
            super().fill_image(s)

    def commit_lazy_operations(self, s: Any) -> None:
        """Called at a fork: the children's requests will all start with this text."""
        with self._turn(s, Kind.FORKED):
            super().commit_lazy_operations(s)
        text = str(s.text_)
        self._forks[len(text), hash(text)] = self.program(s)
        while len(self._forks) > FORKS_MAX:
            self._forks.popitem(last=False)

    # The end -----------------------------------------------------------------------------------

    def end_program(self, s: Any) -> None:
        """The program's body is over. SGLang calls this before its queued expressions have run,
        and again when its state is collected."""
        for executor in s if isinstance(s, list) else [s]:
            program = self.program(executor)
            if not program.ended:
                program.ended = True
                self.adviser.tell(Event(Kind.ENDED, program))

    def shutdown(self) -> None:
        """Send what waits, and stop advising; the endpoint still generates."""
        self.adviser.close()


def _close(endpoint: weakref.ref[SymphonyEndpoint]) -> None:
    found = endpoint()
    if found is not None:
        found.adviser.close(EXIT_SECONDS_MAX)
