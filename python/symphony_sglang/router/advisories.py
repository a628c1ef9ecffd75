"""What the router remembers of advisories: where each went, and what a session was promised."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from symphony_sglang.core.routing_types import AdvisedPlace

ADVISORIES_MAX = 65_536
SESSIONS_MAX = 65_536
PLACES_PER_SESSION = 4


@dataclass(frozen=True, slots=True)
class Advisory:
    """One forwarded hint; `prepares` the session's next turn, which may yet go elsewhere."""

    advisory_id: str
    domain_id: str
    session_key: str | None
    expires_seconds: float
    sent_seconds: float = 0.0
    prepares: bool = False


class AdvisoryMemory:
    """Bounded; beyond its bounds the oldest is forgotten, which costs a look at every worker."""

    def __init__(
        self, *, advisories_max: int = ADVISORIES_MAX, sessions_max: int = SESSIONS_MAX
    ) -> None:
        self._advisories_max = advisories_max
        self._sessions_max = sessions_max
        self._advisories: OrderedDict[str, Advisory] = OrderedDict()
        self._preparing: dict[str, dict[str, Advisory]] = {}  # session -> id -> advisory
        # Session -> its promised places, each with when the promise ends.
        self._places: OrderedDict[str, dict[str, tuple[AdvisedPlace, float]]] = OrderedDict()

    def remember(self, advisory: Advisory) -> None:
        self._forget(self._advisories.pop(advisory.advisory_id, None))
        self._advisories[advisory.advisory_id] = advisory
        if advisory.prepares and advisory.session_key is not None:
            known = self._preparing.setdefault(advisory.session_key, {})
            known[advisory.advisory_id] = advisory
        while len(self._advisories) > self._advisories_max:
            self._forget(self._advisories.popitem(last=False)[1])

    def _forget(self, advisory: Advisory | None) -> None:
        """It prepares nothing any more."""
        known = self._preparing.get((advisory and advisory.session_key) or "")
        if advisory is not None and known is not None:
            known.pop(advisory.advisory_id, None)
            if not known:
                del self._preparing[advisory.session_key or ""]

    def taken(self, session_key: str, domain_id: str, sent_seconds: float) -> list[Advisory]:
        """A turn that was sent at `sent_seconds` is served by `domain_id`: the advisories that
        prepared it elsewhere, and need not go on. Later ones are about a later turn."""
        known = self._preparing.get(session_key)
        if known is None:
            return []
        over = [one for one in known.values() if one.sent_seconds <= sent_seconds]
        for advisory in over:
            self._forget(advisory)
        return [one for one in over if one.domain_id != domain_id]

    def find(self, advisory_id: str) -> Advisory | None:
        return self._advisories.get(advisory_id)

    def promise(self, session_key: str, place: AdvisedPlace, expires_seconds: float) -> None:
        """`place` will be ready for the session's next turn, until `expires_seconds`."""
        places = self._places.setdefault(session_key, {})
        self._places.move_to_end(session_key)
        places.pop(place.worker_id, None)
        places[place.worker_id] = (place, expires_seconds)
        while len(places) > PLACES_PER_SESSION:
            del places[next(iter(places))]
        while len(self._places) > self._sessions_max:
            self._places.popitem(last=False)

    def places(self, session_key: str, now_seconds: float) -> tuple[AdvisedPlace, ...]:
        """What was promised to a session and still holds, most tokens first."""
        found = self._places.get(session_key)
        if not found:
            return ()
        living = [place for place, expires in found.values() if expires > now_seconds]
        return tuple(sorted(living, key=lambda place: (-place.tokens, place.ready_seconds)))

    def withdraw(self, session_key: str, domain_id: str | None = None) -> None:
        """The promise of one worker, or all, is void."""
        found = self._places.get(session_key)
        if found is None:
            return
        if domain_id is None:
            found.clear()
        else:
            found.pop(domain_id, None)
        if not found:
            del self._places[session_key]

    def forget_worker(self, domain_id: str) -> None:
        for session_key in list(self._places):
            self.withdraw(session_key, domain_id)

    def expire(self, now_seconds: float, count_max: int = 1000) -> None:
        """Drop what is over, the oldest `count_max` looked at."""
        for session_key in list(self._places)[:count_max]:
            places = self._places[session_key]
            for domain_id in [d for d, (_p, expires) in places.items() if expires <= now_seconds]:
                del places[domain_id]
            if not places:
                del self._places[session_key]

    def check(self) -> None:
        assert len(self._advisories) <= self._advisories_max
        assert len(self._places) <= self._sessions_max
        for session_key, known in self._preparing.items():
            assert known, session_key
            assert all(self._advisories[name] is one for name, one in known.items())
        assert all(0 < len(places) <= PLACES_PER_SESSION for places in self._places.values())
