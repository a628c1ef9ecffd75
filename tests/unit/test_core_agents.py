"""Sessions and parents from the headers of agent programs."""

from __future__ import annotations

import pytest

from symphony_sglang.core import agents
from symphony_sglang.core.hints import find_session_id

CLAUDE = {"x-claude-code-session-id": "c"}
# Headers, the session that asks, and its parent.
CASES = [
    ({"x-session-id": "s"}, "s", None),
    ({"x-session-id": "s", "x-parent-session-id": "p"}, "s", "p"),
    ({"x-dynamo-session-id": "s", "x-dynamo-parent-session-id": "p"}, "s", "p"),
    ({"x-dynamo-session-id": "s", "x-dynamo-parent-session-id": "s"}, "s", None),
    (CLAUDE, "c", None),
    ({**CLAUDE, "x-claude-code-agent-id": "a"}, "c/a", "c"),
    (
        {**CLAUDE, "x-claude-code-agent-id": "a", "x-claude-code-parent-agent-id": "b"},
        "c/a",
        "c/b",
    ),
    ({**CLAUDE, "x-claude-code-parent-agent-id": "b"}, "c", None),
    ({**CLAUDE, "x-claude-code-agent-id": ""}, "c", None),
    ({**CLAUDE, "x-claude-code-agent-id": "a" * 255}, "c", None),
    ({"x-session-id": "s", "x-parent-session-id": "p" * 257}, "s", None),
    ({"x-session-id": "s", "x-parent-session-id": ""}, "s", None),
]


@pytest.mark.parametrize(("headers", "session", "parent"), CASES)
def test_session_and_parent_by_headers(
    headers: dict[str, str], session: str, parent: str | None
) -> None:
    found = find_session_id(None, headers)
    assert found == session
    assert agents.find_parent_id(session, headers, 256) == parent


def test_session_in_the_body_comes_first() -> None:
    headers = {**CLAUDE, "x-claude-code-agent-id": "a"}
    assert find_session_id("body", headers) == "body"
    assert agents.find_parent_id("body", headers, 256) == "c"


@pytest.mark.parametrize("value", ["1", "true", " True ", "yes"])
def test_last_request_says_so(value: str) -> None:
    assert agents.is_final({"x-dynamo-session-final": value})


@pytest.mark.parametrize("value", ["", "0", "false", "no", "2"])
def test_other_requests_do_not(value: str) -> None:
    assert not agents.is_final({"x-dynamo-session-final": value})
    assert not agents.is_final({})
