"""Ordinary requests in the HTTP process: bad ids, session headers, hints that ride along."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from symphony_sglang.engine import request_hooks
from symphony_sglang.errors import HintError

MANAGER = SimpleNamespace(model_config=SimpleNamespace(vocab_size=100))


@pytest.mark.parametrize("ids", [None, [], [0, 99]])
def test_ids_of_the_vocabulary_pass(ids: list[int] | None) -> None:
    request_hooks.check_token_ids(MANAGER, None, ids)


@pytest.mark.parametrize(("ids", "shown"), [([5, 100], "100"), ([-1, 5], "-1")])
def test_ids_outside_the_vocabulary_are_named(ids: list[int], shown: str) -> None:
    with pytest.raises(ValueError, match=f"input_ids: {shown}; expected ids from 0 to 99"):
        request_hooks.check_token_ids(MANAGER, None, ids)


def test_the_bodys_session_beats_the_header() -> None:
    headers = {"x-session-id": "header"}
    named = SimpleNamespace(session_id="body", session_params=None)
    request_hooks.take_session(named, headers)
    assert named.session_id == "body"
    unnamed = SimpleNamespace(session_id=None, session_params=None)
    request_hooks.take_session(unnamed, headers)
    assert unnamed.session_id == "header"


def test_sglangs_own_sessions_are_left_alone() -> None:
    own = SimpleNamespace(session_id=None, session_params={"id": "s"})
    request_hooks.take_session(own, {"x-session-id": "header"})
    assert own.session_id is None


def riding(payload: Any) -> SimpleNamespace:
    action = {"action_id": "a", "action_type": "prefetch", "payload": payload}
    body = {"kv_hints": {"protocol_version": "0.1", "message_id": "m", "actions": [action]}}
    return SimpleNamespace(_json=body)


def test_action_without_a_prefix_means_the_requests_session() -> None:
    obj = SimpleNamespace(session_id="s1")
    message = request_hooks.riding_hints(obj, riding({"expires_in_s": 5}))
    assert message is not None
    assert message.hints[0].action.selector.session_id == "s1"
    other = request_hooks.riding_hints(obj, riding({"session_id": "s2"}))
    assert other is not None
    assert other.hints[0].action.selector.session_id == "s2"


def test_action_without_a_prefix_on_a_request_without_a_session_is_refused() -> None:
    with pytest.raises(HintError, match="session_id"):
        request_hooks.riding_hints(SimpleNamespace(session_id=None), riding({}))


def test_request_without_hints_has_none() -> None:
    assert request_hooks.riding_hints(SimpleNamespace(), SimpleNamespace()) is None
    assert request_hooks.riding_hints(SimpleNamespace(), SimpleNamespace(_json=[1])) is None


@pytest.mark.parametrize("answers", [[{"meta_info": {"finish_reason": {"type": "stop"}}}]])
def test_hints_fire_before_an_answer_that_nobody_comes_back_after(answers: list[Any]) -> None:
    import asyncio

    fired = []

    async def stream() -> Any:
        for answer in answers:
            yield answer

    async def take_one() -> Any:
        generator = request_hooks.fire_at_end(stream(), lambda: fired.append(1))
        return await generator.__anext__()  # type: ignore[attr-defined]

    assert asyncio.run(take_one()) == answers[0]
    assert fired == [1]
