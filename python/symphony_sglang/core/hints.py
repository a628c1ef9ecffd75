"""Reading hints: the body of ``POST /symphony/advise`` and the ``kv_hints`` envelope.

Input is what a JSON decoder gives; output is typed and checked. Errors name the field, the value
and what was expected. An action that we do not know is not an error: it becomes `Unsupported`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NoReturn

from symphony_sglang.core import agents
from symphony_sglang.core.levels import Target
from symphony_sglang.core.prefix import NO_NAMESPACE, TOKEN_MAX, Namespace
from symphony_sglang.errors import HintError

PROTOCOL_VERSION = "0.1"
ACTION_VERSIONS = ("1", "1.0")
OWN_PREFIX = "symphony."
# Action ids of hints that nobody wrote: a tool call or a sub-agent implies them.
IMPLICIT_PREFIX = "implicit:"
SELECTORS = ("session_id", "input_ids", "text", "messages")
SELECTOR_FIELDS = (*SELECTORS, "extra_key", "cache_salt")
SESSION_HEADERS = (
    "x-session-id",
    "x-smg-routing-key",
    "x-dynamo-session-id",
    "x-claude-code-session-id",
    "session-id",
)
SHOWN_CHARACTERS = 80


class ActionType(StrEnum):
    """What a hint can ask for; also accepted with the prefix ``symphony.``"""

    PREFETCH = "prefetch"
    RETAIN = "retain"
    DEMOTE = "demote"
    SHARE = "share"
    RELEASE = "release"
    CANCEL = "cancel"


@dataclass(frozen=True, slots=True)
class HintLimits:
    """Sizes beyond which a body is refused."""

    actions_max: int = 64
    id_characters_max: int = 256
    input_ids_max: int = 1_048_576
    text_bytes_max: int = 4 * 2**20
    messages_max: int = 4096
    seconds_max: float = 3600.0
    expires_default_seconds: float = 60.0
    priority_max: int = 1000  # and its negative


@dataclass(frozen=True, slots=True)
class Selector:
    """Which prefix is meant: exactly one of the first four is set."""

    session_id: str | None = None
    input_ids: tuple[int, ...] | None = field(default=None, repr=False)
    text: str | None = field(default=None, repr=False)
    messages: tuple[dict[str, Any], ...] | None = field(default=None, repr=False)
    namespace: Namespace = NO_NAMESPACE


@dataclass(frozen=True, slots=True)
class Prefetch:
    selector: Selector
    target: Target
    expected_in_seconds: float | None
    expires_in_seconds: float
    priority: int


@dataclass(frozen=True, slots=True)
class Retain:
    selector: Selector
    target: Target
    expires_in_seconds: float
    priority: int


@dataclass(frozen=True, slots=True)
class Demote:
    selector: Selector


@dataclass(frozen=True, slots=True)
class Share:
    selector: Selector
    to: str


@dataclass(frozen=True, slots=True)
class Release:
    selector: Selector


@dataclass(frozen=True, slots=True)
class Cancel:
    """By advisory id, or all advisories of the selected session; exactly one is set."""

    advisory_id: str | None
    selector: Selector | None


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Nothing is done. `foreign` names belong to another system (``vllm.set_priority``): riding on
    a request they are skipped without a receipt, as the protocol asks."""

    action_type: str
    reason: str
    foreign: bool = False


Action = Prefetch | Retain | Demote | Share | Release | Cancel | Unsupported


@dataclass(frozen=True, slots=True)
class Hint:
    action_id: str | None
    action: Action


@dataclass(frozen=True, slots=True)
class HintMessage:
    """`message_id` is None where the sender gave none."""

    message_id: str | None
    hints: tuple[Hint, ...]


def parse_advise(body: object, limits: HintLimits | None = None) -> HintMessage:
    """The body of ``POST /symphony/advise``: the short form, or the envelope.

    Raises:
        HintError: the body is malformed; `.field` says where.
    """
    limits = HintLimits() if limits is None else limits
    reader = _Reader(body, "", limits)
    if "actions" in reader.values or "protocol_version" in reader.values:
        return parse_envelope(body, "", limits)
    return HintMessage(None, (Hint(None, _prefetch(reader)),))


def parse_envelope(
    body: object, where: str = "kv_hints", limits: HintLimits | None = None
) -> HintMessage:
    """The ``kv_hints`` envelope (SGLang managers/kv_hints.py:16), here or on a request.

    `where` is the envelope's place in the body, for messages.

    Raises:
        HintError: the envelope, or the payload of one of our own actions, is malformed.
    """
    limits = HintLimits() if limits is None else limits
    reader = _Reader(body, where, limits)
    version = reader.required("protocol_version")
    if version != PROTOCOL_VERSION:
        reader.refuse("protocol_version", version, f"{PROTOCOL_VERSION!r}")
    message_id = reader.name("message_id")
    actions = reader.take("actions", [])
    if not isinstance(actions, list):
        reader.refuse("actions", actions, "a list")
    if len(actions) > limits.actions_max:
        raise HintError(
            reader.path("actions"), f"{len(actions)} actions; expected at most {limits.actions_max}"
        )
    reader.close()
    hints = [
        _hint(_Reader(action, f"{reader.path('actions')}[{index}]", limits))
        for index, action in enumerate(actions)
    ]
    return HintMessage(message_id, tuple(hints))


def find_session_id(
    body_value: object, headers: Mapping[str, str], limits: HintLimits | None = None
) -> str | None:
    """The session of an ordinary request: its body's `session_id`, else the first known header.

    `headers` must have lower-case names or ignore case. A value that cannot be an id is passed
    over: a request is never refused for it.
    """
    longest = (HintLimits() if limits is None else limits).id_characters_max
    found = agents.usable(body_value, longest)
    if found is not None:
        return found
    for name in SESSION_HEADERS:
        value = agents.usable(headers.get(name), longest)
        if value is not None:
            return agents.agent_session(name, value, headers, longest)
    return None


def _hint(reader: _Reader) -> Hint:
    action_id = reader.name("action_id")
    given = reader.required("action_type")
    if not isinstance(given, str) or not 0 < len(given) <= reader.limits.id_characters_max:
        reader.refuse("action_type", given, "a non-empty name")
    version = reader.take("action_version", ACTION_VERSIONS[0])
    if not isinstance(version, str):
        reader.refuse("action_version", version, "text")
    payload = reader.take("payload", {})
    reader.close()
    foreign = "." in given and not given.startswith(OWN_PREFIX)
    if foreign:
        return Hint(action_id, Unsupported(given, "foreign_action_type", foreign=True))
    try:
        action_type = ActionType(given.removeprefix(OWN_PREFIX))
    except ValueError:
        return Hint(action_id, Unsupported(given, "unknown_action_type"))
    if version not in ACTION_VERSIONS:
        return Hint(action_id, Unsupported(given, "unknown_action_version"))
    inner = _Reader(payload, reader.path("payload"), reader.limits)
    return Hint(action_id, PARSERS[action_type](inner))


def _prefetch(reader: _Reader) -> Prefetch:
    action = Prefetch(
        selector=reader.selector(),
        target=reader.target(),
        expected_in_seconds=reader.seconds("expected_in_s", None),
        expires_in_seconds=reader.expiry(),
        priority=reader.priority(),
    )
    reader.close()
    return action


def _retain(reader: _Reader) -> Retain:
    action = Retain(
        selector=reader.selector(),
        target=reader.target(),
        expires_in_seconds=reader.expiry(),
        priority=reader.priority(),
    )
    reader.close()
    return action


def _demote(reader: _Reader) -> Demote:
    action = Demote(reader.selector())
    reader.close()
    return action


def _share(reader: _Reader) -> Share:
    action = Share(reader.selector(), reader.name("to", required=True) or "")
    reader.close()
    return action


def _release(reader: _Reader) -> Release:
    action = Release(reader.selector())
    reader.close()
    return action


def _cancel(reader: _Reader) -> Cancel:
    if "advisory_id" not in reader.values:
        action = Cancel(None, reader.selector())
    else:
        action = Cancel(reader.name("advisory_id", required=True), None)
    reader.close()
    return action


PARSERS: dict[ActionType, Callable[[_Reader], Action]] = {
    ActionType.PREFETCH: _prefetch,
    ActionType.RETAIN: _retain,
    ActionType.DEMOTE: _demote,
    ActionType.SHARE: _share,
    ActionType.RELEASE: _release,
    ActionType.CANCEL: _cancel,
}


class _Reader:
    """One JSON object, read field by field; `close` refuses what was not asked for."""

    def __init__(self, body: object, where: str, limits: HintLimits) -> None:
        self.where = where
        self.limits = limits
        if not isinstance(body, dict):
            raise HintError(where or "body", f"{shown(body)}; expected a JSON object")
        self.values: dict[str, Any] = body
        self._read: dict[str, None] = {}

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def refuse(self, name: str, value: object, expected: str) -> NoReturn:
        raise HintError(self.path(name), f"{shown(value)}; expected {expected}")

    def take(self, name: str, default: Any) -> Any:
        """The value, or `default` where it is absent or null."""
        self._read[name] = None
        value = self.values.get(name)
        return default if value is None else value

    def required(self, name: str) -> Any:
        value = self.take(name, None)
        if value is None:
            raise HintError(self.path(name), "missing")
        return value

    def close(self) -> None:
        for name in self.values:
            if name not in self._read:
                known = ", ".join(self._read)
                raise HintError(self.path(shown_name(name)), f"unknown field; expected {known}")

    def name(self, field_name: str, *, required: bool = False) -> str | None:
        """Text of 1 to `id_characters_max` characters."""
        value = self.required(field_name) if required else self.take(field_name, None)
        if value is None:
            return None
        longest = self.limits.id_characters_max
        if not isinstance(value, str) or not 0 < len(value) <= longest:
            self.refuse(field_name, value, f"text of 1 to {longest} characters")
        return value

    def number(self, field_name: str, value: object, low: float, high: float) -> float:
        # NaN fails the comparison; a bool is an int to Python, and nobody means it. A whole number
        # beyond float's range is compared as it is.
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not low <= value <= high
        ):
            self.refuse(field_name, value, f"a number from {low:g} to {high:g}")
        return float(value)

    def seconds(self, field_name: str, default: float | None) -> float | None:
        value = self.take(field_name, default)
        if value is None:
            return None
        return self.number(field_name, value, 0.0, self.limits.seconds_max)

    def expiry(self) -> float:
        value = self.take("expires_in_s", self.limits.expires_default_seconds)
        return self.number("expires_in_s", value, 0.0, self.limits.seconds_max)

    def priority(self) -> int:
        value = self.take("priority", 0)
        bound = self.limits.priority_max
        if isinstance(value, bool) or not isinstance(value, int) or not -bound <= value <= bound:
            self.refuse("priority", value, f"a whole number from {-bound} to {bound}")
        return value

    def target(self) -> Target:
        value = self.take("target", Target.DEVICE.value)
        for target in Target:
            if value == target.value:
                return target
        self.refuse("target", value, " or ".join(repr(target.value) for target in Target))

    def selector(self) -> Selector:
        given = [name for name in SELECTORS if self.take(name, None) is not None]
        if len(given) != 1:
            raise HintError(
                self.path("session_id") if not given else self.path(given[1]),
                f"{len(given)} of {', '.join(SELECTORS)} are given; expected exactly one",
            )
        namespace = Namespace(self.name("extra_key"), self.name("cache_salt"))
        session_id = self.name("session_id")
        value = self.values[given[0]]
        match given[0]:
            case "input_ids":
                return Selector(input_ids=self.token_ids(value), namespace=namespace)
            case "text":
                return Selector(text=self.prompt(value), namespace=namespace)
            case "messages":
                return Selector(messages=self.messages(value), namespace=namespace)
            case _:
                return Selector(session_id=session_id, namespace=namespace)

    def token_ids(self, value: object) -> tuple[int, ...]:
        longest = self.limits.input_ids_max
        if not isinstance(value, list) or not value:
            self.refuse("input_ids", value, "a non-empty list of token ids")
        if len(value) > longest:
            raise HintError(self.path("input_ids"), f"{len(value)} ids; expected at most {longest}")
        # By type over the whole list first: a million ids cost milliseconds, not a second.
        if set(map(type, value)) != {int} or min(value) < 0 or max(value) > TOKEN_MAX:
            for index, token in enumerate(value):
                if type(token) is not int or not 0 <= token <= TOKEN_MAX:
                    expected = f"a whole number from 0 to {TOKEN_MAX}"
                    self.refuse(f"input_ids[{index}]", token, expected)
        return tuple(value)

    def prompt(self, value: object) -> str:
        longest = self.limits.text_bytes_max
        if not isinstance(value, str) or not value:
            self.refuse("text", value, "non-empty text")
        size = text_bytes(value)
        if size > longest:
            raise HintError(self.path("text"), f"{size} bytes; expected at most {longest}")
        return value

    def messages(self, value: object) -> tuple[dict[str, Any], ...]:
        """Checked in number and size; their shape is for the chat template to judge."""
        if not isinstance(value, list) or not value:
            self.refuse("messages", value, "a non-empty list")
        if len(value) > self.limits.messages_max:
            raise HintError(
                self.path("messages"),
                f"{len(value)} messages; expected at most {self.limits.messages_max}",
            )
        left = self.limits.text_bytes_max
        for index, message in enumerate(value):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                self.refuse(f"messages[{index}]", message, "an object with a role")
            left -= nested_text_bytes(message)
            if left < 0:
                raise HintError(
                    self.path("messages"),
                    f"more than {self.limits.text_bytes_max} bytes of text",
                )
        return tuple(value)


def text_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def nested_text_bytes(value: object) -> int:
    """Bytes of all text inside a decoded JSON value, keys included; no recursion to exhaust."""
    total, stack = 0, [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            total += text_bytes(item)
        elif isinstance(item, dict):
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, list):
            total += len(item)
            stack.extend(item)
        else:
            total += 8
    return total


def shown(value: object) -> str:
    """A value as an error may show it: short, whatever was sent."""
    if isinstance(value, str):
        value = value[:SHOWN_CHARACTERS]
    elif isinstance(value, list | dict):
        return f"a {type(value).__name__} of {len(value)}"
    elif isinstance(value, float) and not math.isfinite(value):
        return repr(value)
    elif isinstance(value, int) and abs(value) > 10**SHOWN_CHARACTERS:
        return "a whole number beyond all bounds"
    return repr(value)[: SHOWN_CHARACTERS + 2]


def shown_name(name: object) -> str:
    return str(name)[:SHOWN_CHARACTERS]
