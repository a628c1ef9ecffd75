"""The live advisories, found by id, by what they ask for, by session, or by a request's prompt."""

from __future__ import annotations

from collections.abc import ValuesView

from symphony_sglang.core.levels import Target
from symphony_sglang.core.lifecycle import LIVE_STATES, AdviseRequest, Advisory, Kind
from symphony_sglang.core.prefix import Namespace, common_tokens


class AdvisoryIndex:
    """A dict in arrival order with its secondary keys, and the bytes of token ids it holds."""

    def __init__(self) -> None:
        self._live: dict[str, Advisory] = {}
        self._by_identity: dict[tuple[str, Target, Kind], Advisory] = {}
        self._by_session: dict[str, dict[str, None]] = {}
        self._by_content: dict[str, None] = {}  # those of no session
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, advisory_id: str) -> bool:
        return advisory_id in self._live

    def get(self, advisory_id: str) -> Advisory | None:
        return self._live.get(advisory_id)

    def values(self) -> ValuesView[Advisory]:
        return self._live.values()

    def twin(self, request: AdviseRequest) -> Advisory | None:
        """The live advisory that asks for the same."""
        return self._by_identity.get((request.identity, request.target, request.kind))

    def add(self, advisory: Advisory) -> None:
        request = advisory.request
        assert request.advisory_id not in self._live, request.advisory_id
        assert advisory.prefix is not None
        self._live[request.advisory_id] = advisory
        self._by_identity[request.identity, request.target, request.kind] = advisory
        if request.session_id is not None:
            self._by_session.setdefault(request.session_id, {})[request.advisory_id] = None
        else:
            self._by_content[request.advisory_id] = None
        self.held_bytes += len(advisory.prefix.token_bytes)

    def remove(self, advisory: Advisory) -> None:
        """Forget it, and let go of its token ids: the receipt needs none, and history is long."""
        request = advisory.request
        del self._live[request.advisory_id]
        del self._by_identity[request.identity, request.target, request.kind]
        if request.session_id is not None:
            ids = self._by_session[request.session_id]
            del ids[request.advisory_id]
            if not ids:
                del self._by_session[request.session_id]
        else:
            del self._by_content[request.advisory_id]
        assert advisory.prefix is not None
        self.held_bytes -= len(advisory.prefix.token_bytes)
        advisory.prefix = None

    def of_session(self, session_id: str) -> tuple[str, ...]:
        """Ids of a session's advisories, in arrival order."""
        return tuple(self._by_session.get(session_id, ()))

    def of_identity(self, identity: str) -> tuple[str, ...]:
        """Ids of the advisories of one prefix: at most one a target and kind."""
        keys = [(identity, target, kind) for target in Target for kind in Kind]
        found = [self._by_identity[key].advisory_id for key in keys if key in self._by_identity]
        return tuple(found)

    def matching(
        self, session_id: str | None, namespace: Namespace, token_bytes: bytes
    ) -> tuple[tuple[str, int], ...]:
        """Ids of the advisories that a request with this prompt answers, with common lengths.

        Those of its session, and those given by content whose whole prefix the prompt starts with.
        """
        own = self._by_session.get(session_id, {}) if session_id is not None else {}
        found: list[tuple[str, int]] = []
        asked = [*own, *self._by_content]
        if own and self._by_content:
            asked.sort(key=lambda advisory_id: self._live[advisory_id].arrival)
        for advisory_id in asked:
            advisory = self._live[advisory_id]
            prefix = advisory.prefix
            assert prefix is not None
            if prefix.namespace != namespace:
                continue
            if advisory_id in own:
                found.append((advisory_id, common_tokens(prefix.token_bytes, token_bytes)))
            elif token_bytes.startswith(prefix.token_bytes):
                found.append((advisory_id, prefix.tokens))
        return tuple(found)

    def check(self) -> None:
        """Every secondary key leads to a live advisory, and the byte count is right."""
        assert len(self._by_identity) == len(self._live)
        held_bytes = 0
        sessions = 0
        for advisory_id, advisory in self._live.items():
            assert advisory.state in LIVE_STATES, (advisory_id, advisory.state)
            assert self.twin(advisory.request) is advisory
            assert advisory.prefix is not None
            held_bytes += len(advisory.prefix.token_bytes)
            if advisory.request.session_id is not None:
                sessions += 1
                assert advisory_id in self._by_session[advisory.request.session_id]
        assert held_bytes == self.held_bytes
        assert sessions == sum(len(ids) for ids in self._by_session.values())
        assert sessions + len(self._by_content) == len(self._live)
        assert all(self._by_session.values())
