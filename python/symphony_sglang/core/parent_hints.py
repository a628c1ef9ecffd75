"""A sub-agent's request says, by its headers, that its parent will be back.

While the sub-agent works, its parent's KV is asked to stay within reach, on the host level. At the
sub-agent's last request, the parent's turn is next: to the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from symphony_sglang.core import agents, hints
from symphony_sglang.core.levels import Target
from symphony_sglang.core.prefix import Namespace

CAUSE = "parent"
ACTION_ID = f"{hints.IMPLICIT_PREFIX}{CAUSE}"
# A sub-agent asks again within this, which renews the hint; one that is silent longer is lost.
EXPIRES_SECONDS = 300.0
RETURN_SECONDS = 60.0
# Below what a caller asks for by name.
PRIORITY = -1


class ParentHint(NamedTuple):
    """`action` is the hint as an envelope holds it, `final` whether the parent is next."""

    parent_id: str
    final: bool
    action: dict[str, Any]

    @property
    def message(self) -> hints.HintMessage:
        envelope = {"protocol_version": hints.PROTOCOL_VERSION, "actions": [self.action]}
        return hints.parse_envelope(envelope)


def parent_hint(
    session_id: str | None, headers: Mapping[str, str], namespace: Namespace
) -> ParentHint | None:
    """What a request of `session_id` says of its parent; None where it has none.

    `headers` must have lower-case names or ignore case. The parent is in the child's namespace.
    """
    if session_id is None:
        return None
    longest = hints.HintLimits().id_characters_max
    parent_id = agents.find_parent_id(session_id, headers, longest)
    if parent_id is None:
        return None
    names = {name: value for name, value in namespace._asdict().items() if value is not None}
    if any(agents.usable(value, longest) is None for value in names.values()):
        return None  # no hint can name it
    final = agents.is_final(headers)
    payload = {
        "session_id": parent_id,
        **names,
        "target": (Target.DEVICE if final else Target.HOST).value,
        "expires_in_s": RETURN_SECONDS if final else EXPIRES_SECONDS,
        "priority": PRIORITY,
    }
    if final:
        payload["expected_in_s"] = 0.0
    action = {"action_id": ACTION_ID, "action_type": "prefetch", "action_version": "1"}
    return ParentHint(parent_id, final, {**action, "payload": payload})
