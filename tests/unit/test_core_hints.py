"""Reading hints: what is accepted, and that every refusal names its field."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.hints import (
    Cancel,
    Demote,
    HintLimits,
    HintMessage,
    Prefetch,
    Release,
    Retain,
    Selector,
    Share,
    Unsupported,
    find_session_id,
    parse_advise,
    parse_envelope,
)
from symphony_sglang.core.levels import Target
from symphony_sglang.core.prefix import Namespace
from symphony_sglang.errors import HintError, SymphonyError

SHORT = {"session_id": "s1"}


def action(action_type: str = "prefetch", payload: object = SHORT, **changes: object) -> dict:
    return {"action_id": "x", "action_type": action_type, "payload": payload, **changes}


def envelope(*actions: object, **changes: object) -> dict:
    return {"protocol_version": "0.1", "message_id": "m", "actions": list(actions), **changes}


def only(message: HintMessage):
    (hint,) = message.hints
    return hint.action


def test_the_short_form_has_the_defaults_of_the_contract():
    assert only(parse_advise(SHORT)) == Prefetch(
        Selector(session_id="s1"), Target.DEVICE, None, 60.0, 0
    )


def test_the_short_form_with_everything():
    body = {
        "session_id": "s1",
        "expected_in_s": 2,
        "expires_in_s": 5.5,
        "priority": -3,
        "target": "host",
        "extra_key": "lora",
        "cache_salt": "salt",
    }
    assert only(parse_advise(body)) == Prefetch(
        Selector(session_id="s1", namespace=Namespace("lora", "salt")),
        Target.HOST,
        2.0,
        5.5,
        -3,
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("input_ids", [1, 2, 3]),
        ("text", "once upon a time"),
        ("messages", [{"role": "user", "content": "hi"}]),
    ],
)
def test_other_selectors(field, value):
    selector = only(parse_advise({field: value})).selector
    assert selector.session_id is None
    chosen = getattr(selector, field)
    assert chosen == (tuple(value) if isinstance(value, list) else value)


def test_null_is_absent():
    body = {"session_id": "s1", "input_ids": None, "expected_in_s": None, "priority": None}
    assert only(parse_advise(body)) == only(parse_advise(SHORT))


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"session_id": None}, "session_id"),
        ({"text": "both"}, "text"),
        ({"session_id": ""}, "session_id"),
        ({"session_id": 7}, "session_id"),
        ({"session_id": "x" * 257}, "session_id"),
        ({"expected_in_s": -1}, "expected_in_s"),
        ({"expected_in_s": -1e-9}, "expected_in_s"),
        ({"expected_in_s": float("nan")}, "expected_in_s"),
        ({"expected_in_s": float("inf")}, "expected_in_s"),
        ({"expected_in_s": 10**400}, "expected_in_s"),
        ({"expected_in_s": True}, "expected_in_s"),
        ({"expected_in_s": "2"}, "expected_in_s"),
        ({"expires_in_s": 3601}, "expires_in_s"),
        ({"expires_in_s": [60]}, "expires_in_s"),
        ({"priority": 1.5}, "priority"),
        ({"priority": False}, "priority"),
        ({"priority": 1001}, "priority"),
        ({"priority": 10**5000}, "priority"),
        ({"target": "nvme"}, "target"),
        ({"target": ["device"]}, "target"),
        ({"extra_key": ""}, "extra_key"),
        ({"cache_salt": 1}, "cache_salt"),
        ({"expected_in": 2}, "expected_in"),
        ({"session_id": None, "input_ids": []}, "input_ids"),
        ({"session_id": None, "input_ids": "12"}, "input_ids"),
        ({"session_id": None, "input_ids": [1, True]}, "input_ids[1]"),
        ({"session_id": None, "input_ids": [1, 2.0]}, "input_ids[1]"),
        ({"session_id": None, "input_ids": [-1]}, "input_ids[0]"),
        ({"session_id": None, "input_ids": [2**31]}, "input_ids[0]"),
        ({"session_id": None, "input_ids": [[1]]}, "input_ids[0]"),
        ({"session_id": None, "text": ""}, "text"),
        ({"session_id": None, "messages": [{}]}, "messages[0]"),
        ({"session_id": None, "messages": {"role": "user"}}, "messages"),
    ],
)
def test_a_bad_field_is_named_alone_and_in_an_envelope(changes, field):
    body = {**SHORT, **changes}
    with pytest.raises(HintError) as caught:
        parse_advise(body)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert len(str(caught.value)) < 500
    with pytest.raises(HintError) as caught:
        parse_envelope(envelope(action(), action(payload=body)))
    assert caught.value.field == f"kv_hints.actions[1].payload.{field}"
    assert isinstance(caught.value, SymphonyError)


@pytest.mark.parametrize("body", [None, [], "text", 3, True, [SHORT]])
def test_what_is_no_object_is_refused(body):
    with pytest.raises(HintError, match="expected a JSON object"):
        parse_advise(body)


def test_sizes_are_bounded():
    limits = HintLimits(input_ids_max=3, text_bytes_max=10, messages_max=2, actions_max=2)
    for body, field in [
        ({"input_ids": [1, 2, 3, 4]}, "input_ids"),
        ({"text": "äöüäöü"}, "text"),
        ({"messages": [{"role": "u"}] * 3}, "messages"),
        ({"messages": [{"role": "u", "content": [{"text": "x" * 20}]}]}, "messages"),
        (envelope(action(), action(), action()), "actions"),
    ]:
        with pytest.raises(HintError, match=r"expected at most|more than") as caught:
            parse_advise(body, limits)
        assert caught.value.field == field
    assert parse_advise({"input_ids": [1, 2, 3]}, limits)
    assert parse_advise({"text": "x" * 10}, limits)


def test_deep_nesting_does_not_exhaust_the_stack():
    deep: list = []
    for _ in range(100_000):
        deep = [deep]
    message = {"role": "user", "content": deep}
    assert only(parse_advise({"messages": [message]})).selector.messages is not None


def test_every_verb_is_read():
    message = parse_advise(
        envelope(
            action("symphony.prefetch"),
            action("retain", {**SHORT, "expires_in_s": 9}),
            action("demote"),
            action("share", {**SHORT, "to": "http://b:1"}),
            action("release"),
            action("cancel", {"advisory_id": "a1"}),
            action("cancel"),
        )
    )
    assert message.message_id == "m"
    selector = Selector(session_id="s1")
    assert [hint.action for hint in message.hints] == [
        Prefetch(selector, Target.DEVICE, None, 60.0, 0),
        Retain(selector, Target.DEVICE, 9.0, 0),
        Demote(selector),
        Share(selector, "http://b:1"),
        Release(selector),
        Cancel("a1", None),
        Cancel(None, selector),
    ]
    assert {hint.action_id for hint in message.hints} == {"x"}


def test_what_we_do_not_know_is_unsupported_and_not_an_error():
    message = parse_advise(
        envelope(
            action("teleport", {"anything": 1}),
            action("symphony.teleport"),
            action("vllm.set_priority", {"x": float("nan")}),
            action("prefetch", action_version="2"),
            action("prefetch", action_version="1.0"),
        )
    )
    assert [hint.action for hint in message.hints[:4]] == [
        Unsupported("teleport", "unknown_action_type"),
        Unsupported("symphony.teleport", "unknown_action_type"),
        Unsupported("vllm.set_priority", "foreign_action_type", foreign=True),
        Unsupported("prefetch", "unknown_action_version"),
    ]
    assert isinstance(message.hints[4].action, Prefetch)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (envelope(protocol_version="0.2"), "protocol_version"),
        (envelope(protocol_version=0.1), "protocol_version"),
        ({"actions": []}, "protocol_version"),
        (envelope(message_id=5), "message_id"),
        (envelope(actions={}), "actions"),
        (envelope(extra=1), "extra"),
        (envelope("prefetch"), "actions[0]"),
        (envelope(action(colour="red")), "actions[0].colour"),
        (envelope({"action_id": "x"}), "actions[0].action_type"),
        (envelope(action(5)), "actions[0].action_type"),
        (envelope(action(action_id="")), "actions[0].action_id"),
        (envelope(action(action_version=1)), "actions[0].action_version"),
        (envelope(action(payload=[])), "actions[0].payload"),
        (envelope(action("share")), "actions[0].payload.to"),
        (envelope(action("demote", {**SHORT, "target": "host"})), "actions[0].payload.target"),
        (
            envelope(action("cancel", {**SHORT, "advisory_id": "a"})),
            "actions[0].payload.session_id",
        ),
    ],
)
def test_a_bad_envelope_names_the_place(body, field):
    with pytest.raises(HintError) as caught:
        parse_advise(body)
    assert caught.value.field == field


def test_an_envelope_without_actions_asks_for_nothing():
    assert parse_advise(envelope()).hints == ()
    assert parse_advise({"protocol_version": "0.1"}) == HintMessage(None, ())


def test_the_session_of_a_request_is_found_in_body_then_headers():
    headers = {"x-smg-routing-key": "smg", "session-id": "plain"}
    assert find_session_id("body", headers) == "body"
    assert find_session_id(None, headers) == "smg"
    assert find_session_id(None, {}) is None
    assert find_session_id(5, {"session-id": "x" * 1000}) is None, "never a reason to refuse"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
field_names = st.sampled_from(
    [
        "session_id",
        "input_ids",
        "text",
        "messages",
        "expected_in_s",
        "expires_in_s",
        "priority",
        "target",
        "protocol_version",
        "actions",
        "action_type",
        "payload",
    ]
)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(json_values | st.dictionaries(field_names, json_values))
def test_any_json_is_read_or_refused_with_a_field(body):
    for attempt in (body, envelope(body), envelope(action(payload=body))):
        problem = None
        try:
            message = parse_advise(attempt)
        except HintError as error:
            problem = error
        if problem is None:
            assert all(dataclasses.is_dataclass(hint.action) for hint in message.hints)
        else:
            assert problem.field
            assert len(str(problem)) < 2000
