"""Ordinary requests in the HTTP process: bad ids, session headers, hints that ride along."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from symphony_sglang.config import SymphonyConfig
from symphony_sglang.core.prefix import Namespace
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


def test_hint_of_a_confined_request_means_its_part_of_the_cache() -> None:
    obj = SimpleNamespace(session_id="s1", cache_salt="tenant", extra_key=None)
    message = request_hooks.riding_hints(obj, riding({}))
    assert message is not None
    assert message.hints[0].action.selector.namespace == Namespace(None, "tenant")
    named = request_hooks.riding_hints(obj, riding({"session_id": "s2"}))
    assert named is not None
    assert named.hints[0].action.selector.namespace == Namespace()


def test_request_without_hints_has_none() -> None:
    assert request_hooks.riding_hints(SimpleNamespace(), SimpleNamespace()) is None
    assert request_hooks.riding_hints(SimpleNamespace(), SimpleNamespace(_json=[1])) is None


@pytest.mark.parametrize("answers", [[{"meta_info": {"finish_reason": {"type": "stop"}}}]])
def test_hints_fire_before_an_answer_that_nobody_comes_back_after(answers: list[Any]) -> None:
    fired = []

    async def stream() -> Any:
        for answer in answers:
            yield answer

    async def take_one() -> Any:
        generator = request_hooks.fire_at_end(stream(), lambda: fired.append(1))
        return await generator.__anext__()  # type: ignore[attr-defined]

    assert asyncio.run(take_one()) == answers[0]
    assert fired == [1]


def chunk(**choice: Any) -> str:
    body = {"id": "1", "choices": [{"index": 0, **choice}]}
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"


def chunks_until_fired(chunks: list[Any]) -> tuple[list[Any], list[int]]:
    """What a reader of the stream gets, and how much of it had come at each firing."""
    seen: list[Any] = []
    fired: list[int] = []

    async def stream() -> Any:
        for item in chunks:
            yield item

    async def read() -> None:
        noted = request_hooks.note_tool_calls(stream(), lambda: fired.append(len(seen)))
        async for item in noted:
            seen.append(item)  # noqa: PERF401 (what had come when it fired is the point)

    asyncio.run(read())
    return seen, fired


def test_stream_that_ends_with_a_tool_call_fires_once_before_that_chunk() -> None:
    chunks = [
        chunk(delta={"content": "a"}, finish_reason=None),
        chunk(delta={}, finish_reason="tool_calls"),
        chunk(delta={}, finish_reason="tool_calls"),
        "data: [DONE]\n\n",
    ]
    seen, fired = chunks_until_fired(chunks)
    assert seen == chunks
    assert fired == [1]


def test_text_that_speaks_of_tool_calls_fires_nothing() -> None:
    quoted = '"finish_reason":"tool_calls"'
    chunks = [
        chunk(delta={"content": quoted}, finish_reason=None),
        chunk(delta={"tool_calls": [{"function": {"arguments": quoted}}]}, finish_reason=None),
        chunk(delta={}, finish_reason="stop"),
    ]
    assert chunks_until_fired(chunks) == (chunks, [])


@pytest.mark.parametrize(
    ("reasons", "ends"),
    [(["tool_calls"], True), (["stop", "tool_calls"], True), (["length"], False), ([], False)],
)
def test_whole_answers_are_read_as_objects_and_as_bytes(reasons: list[str], ends: bool) -> None:
    choices = [SimpleNamespace(finish_reason=reason) for reason in reasons]
    assert request_hooks.ends_with_tool_calls(SimpleNamespace(choices=choices)) is ends
    rendered = json.dumps(
        {"choices": [{"finish_reason": reason} for reason in reasons]}, separators=(",", ":")
    )
    answer = SimpleNamespace(body=rendered.encode())
    assert request_hooks.ends_with_tool_calls(answer) is ends


def test_an_error_answer_implies_nothing() -> None:
    assert not request_hooks.ends_with_tool_calls(SimpleNamespace(message="no", code=400))


@pytest.mark.parametrize(
    "obj",
    [
        SimpleNamespace(session_id=None),
        SimpleNamespace(session_id=["a", "b"]),
        SimpleNamespace(session_id="s", kv_hints={"actions": []}),
    ],
)
def test_no_session_or_hints_of_its_own_imply_nothing(obj: SimpleNamespace) -> None:
    # Without a serving part or an application there is nothing that it could call.
    request_hooks.imply(None, obj, SimpleNamespace())
    request_hooks.imply(None, SimpleNamespace(session_id="s"), None)


@pytest.mark.parametrize("on", [True, False])
def test_the_flag_decides_whether_a_tool_call_announces_a_turn(on: bool) -> None:
    sent: list[Any] = []

    async def advise_quietly(message: Any, caller: str) -> None:
        sent.append((message.hints[0], caller))

    async def run() -> None:
        advise = SimpleNamespace(
            config=SymphonyConfig(implicit_hints=on), metrics=None, advise_quietly=advise_quietly
        )
        raw = SimpleNamespace(
            app=SimpleNamespace(state=SimpleNamespace(symphony_advise=advise)),
            headers={},
            client=SimpleNamespace(host="10.0.0.9"),
        )
        manager = SimpleNamespace(event_loop=asyncio.get_running_loop(), asyncio_tasks=set())
        obj = SimpleNamespace(session_id="s", cache_salt="tenant", extra_key=None)
        request_hooks.imply(SimpleNamespace(tokenizer_manager=manager), obj, raw)
        await asyncio.gather(*manager.asyncio_tasks)

    asyncio.run(run())
    assert len(sent) == on
    for hint, caller in sent:
        assert caller == "10.0.0.9"
        assert hint.action_id == "implicit:tool_calls"
        assert hint.action.selector.session_id == "s"
        assert hint.action.selector.namespace == Namespace(None, "tenant")
        assert hint.action.priority < 0, "what a caller asks for by name goes first"
