"""Who asks, by the headers of agent programs: which session, which of its agents, whose child.

Read are the headers of Dynamo and OpenCode (both name session and parent session) and Claude Code
(one session id, with an agent id for each sub-agent in it).
"""

from __future__ import annotations

from collections.abc import Mapping

PARENT_HEADERS = ("x-dynamo-parent-session-id", "x-parent-session-id")
FINAL_HEADER = "x-dynamo-session-final"
CLAUDE_SESSION = "x-claude-code-session-id"
CLAUDE_AGENT = "x-claude-code-agent-id"
CLAUDE_PARENT_AGENT = "x-claude-code-parent-agent-id"
# Without one of these a request names no parent.
CHILD_HEADERS = (*PARENT_HEADERS, CLAUDE_AGENT)


def usable(value: object, characters_max: int) -> str | None:
    """`value` where it can be an id; anything else is passed over, never refused."""
    if isinstance(value, str) and 0 < len(value) <= characters_max:
        return value
    return None


def agent_session(
    header: str, session_id: str, headers: Mapping[str, str], characters_max: int
) -> str:
    """The session of the agent that asks. Agents of one Claude Code session have prompts of their
    own, so each is a session: ``<session>/<agent>``, and the main agent the session itself."""
    if header != CLAUDE_SESSION:
        return session_id
    agent = usable(headers.get(CLAUDE_AGENT), characters_max)
    if agent is None:
        return session_id
    return usable(f"{session_id}/{agent}", characters_max) or session_id


def find_parent_id(session_id: str, headers: Mapping[str, str], characters_max: int) -> str | None:
    """The session that waits for `session_id` to be done; None where no header names one.

    `headers` must have lower-case names or ignore case.
    """
    for name in PARENT_HEADERS:
        parent = usable(headers.get(name), characters_max)
        if parent is not None:
            return None if parent == session_id else parent
    whole = usable(headers.get(CLAUDE_SESSION), characters_max)
    if whole is None or usable(headers.get(CLAUDE_AGENT), characters_max) is None:
        return None
    agent = usable(headers.get(CLAUDE_PARENT_AGENT), characters_max)
    parent = whole if agent is None else usable(f"{whole}/{agent}", characters_max)
    return None if parent == session_id else parent


def is_final(headers: Mapping[str, str]) -> bool:
    """Whether the session says that this is its last request."""
    return str(headers.get(FINAL_HEADER, "")).strip().lower() in ("1", "true", "yes")
