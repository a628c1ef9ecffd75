"""Which session a request belongs to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from symphony_sglang.core.hints import SESSION_HEADERS, HintLimits, find_session_id
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.router.fields import RequestFields
from symphony_sglang.router.http import Request

# Beside those of core.hints: names that other routers and agents use for the same.
MORE_HEADERS = (b"x-sgl-routing-key", b"x-session-affinity")
NAMES = frozenset(name.encode("ascii") for name in SESSION_HEADERS)
ID_CHARACTERS_MAX = HintLimits().id_characters_max


class TextHeaders(Mapping[str, str]):
    """A request's headers by name as text, decoded when looked up."""

    def __init__(self, headers: dict[bytes, bytes]) -> None:
        self._headers = headers

    def __getitem__(self, name: str) -> str:
        return self._headers[name.encode("ascii")].decode("latin-1")

    def __iter__(self) -> Iterator[str]:
        return (name.decode("latin-1") for name in self._headers)

    def __len__(self) -> int:
        return len(self._headers)


def session_of(request: Request, fields: RequestFields) -> str | None:
    """The session that the caller names, in the order in which the workers look for it."""
    if fields.session_id is not None or not NAMES.isdisjoint(request.headers):
        found = find_session_id(fields.session_id, TextHeaders(request.headers))
        if found is not None:
            return found
    others = [request.header(name) for name in MORE_HEADERS]
    for value in (fields.routing_key, fields.conversation_id, *others):
        if isinstance(value, str) and 0 < len(value) <= ID_CHARACTERS_MAX:
            return value
    return None


def namespace_of(fields: RequestFields) -> Namespace:
    """What separates equal tokens of this request from others'."""

    def text(value: object) -> str | None:
        return value if isinstance(value, str) else None

    return Namespace(text(fields.extra_key), text(fields.cache_salt))


def session_key(session_id: str, namespace: Namespace) -> str:
    """One name for a session in its namespace; without a namespace, the id itself."""
    if namespace == (None, None):
        return session_id
    parts = (session_id, namespace.extra_key, namespace.cache_salt)
    # Lengths first: no two triples give one text.
    return "\x00".join("-" if part is None else f"{len(part)}:{part}" for part in parts)
