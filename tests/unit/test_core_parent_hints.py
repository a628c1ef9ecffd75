"""What a sub-agent's request says of its parent."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.agents import CHILD_HEADERS
from symphony_sglang.core.hints import Prefetch
from symphony_sglang.core.levels import Target
from symphony_sglang.core.parent_hints import ParentHint, parent_hint
from symphony_sglang.core.prefix import NO_NAMESPACE, Namespace

CHILD = {"x-session-id": "child", "x-parent-session-id": "main"}


def prefetch(hint: ParentHint | None) -> Prefetch:
    assert hint is not None
    [parsed] = hint.message.hints
    assert parsed.action_id == "implicit:parent"
    assert isinstance(parsed.action, Prefetch)
    return parsed.action


def test_parent_stays_in_reach_while_its_sub_agent_works() -> None:
    hint = parent_hint("child", CHILD, Namespace("key", "salt"))
    action = prefetch(hint)
    assert action.selector.session_id == "main"
    assert action.selector.namespace == Namespace("key", "salt")
    assert (action.target, action.expected_in_seconds) == (Target.HOST, None)
    assert action.expires_in_seconds == 300
    assert action.priority < 0, "below what a caller asks for by name"


def test_parent_comes_to_the_device_at_the_sub_agents_last_request() -> None:
    hint = parent_hint("child", {**CHILD, "x-dynamo-session-final": "true"}, NO_NAMESPACE)
    assert hint is not None
    assert hint.final
    action = prefetch(hint)
    assert (action.target, action.expected_in_seconds) == (Target.DEVICE, 0.0)


def test_request_without_a_session_or_a_parent_says_nothing() -> None:
    assert parent_hint(None, CHILD, NO_NAMESPACE) is None
    assert parent_hint("s", {"x-session-id": "s"}, NO_NAMESPACE) is None
    assert parent_hint("main", CHILD, NO_NAMESPACE) is None, "a session is not its own parent"


TEXT = st.text(max_size=300)
HEADERS = st.dictionaries(
    st.sampled_from([*CHILD_HEADERS, "x-claude-code-session-id", "x-dynamo-session-final"]), TEXT
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXT, HEADERS, st.none() | TEXT, st.none() | TEXT)
def test_whatever_a_request_holds_the_hint_can_be_read(
    session_id: str, headers: dict[str, str], extra_key: str | None, cache_salt: str | None
) -> None:
    hint = parent_hint(session_id, headers, Namespace(extra_key, cache_salt))
    if hint is not None:
        assert prefetch(hint).selector.session_id == hint.parent_id != session_id
        assert not set(CHILD_HEADERS).isdisjoint(headers), "what the router looks at first"
