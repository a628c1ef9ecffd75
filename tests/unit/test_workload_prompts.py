"""What of a session is sent, and with which token ids."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symphony_sglang.errors import ConfigError
from symphony_sglang.workload.prompts import (
    Limits,
    PromptFiller,
    plan_session,
    scaled_prompt_tokens,
)
from symphony_sglang.workload.traces import (
    BlockPrompt,
    LengthPrompt,
    Session,
    TextPrompt,
    TraceFamily,
    Turn,
)

WIDE = Limits(prompt_tokens_max=10**6, context_tokens=10**6, output_tokens_max=10**6)


def block_turn(ids: tuple[int, ...], tokens: int, output: int = 10, block: int = 64) -> Turn:
    return Turn(BlockPrompt(ids, block, tokens), output_tokens=output, model="big")


def session_of(*turns: Turn, name: str = "s", **fields: object) -> Session:
    fields.setdefault("block_scope", name)
    return Session(name, TraceFamily.CLAUDE_CODE, turns, **fields)


def filled(
    session: Session, *, seed: int = 1, vocab: int = 5000, scale: float = 1.0, share: bool = False
) -> list[list[int]]:
    filler = PromptFiller.of(session, seed=seed, vocab=vocab, scale=scale, share_prefix=share)
    plan = plan_session(session, replace(WIDE, scale_tokens=scale))
    return [filler.token_ids(planned).tolist() for planned in plan.turns]


def common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def test_equal_block_ids_become_equal_tokens_and_others_do_not() -> None:
    first, second, third = filled(
        session_of(block_turn((1, 2), 130), block_turn((1, 2, 3), 200), block_turn((1, 9, 3), 192))
    )
    assert (len(first), len(second), len(third)) == (130, 200, 192)
    assert common(first, second) == 128  # the two tokens after the blocks are new each time
    assert common(second, third) == 64
    assert second[128:192] == third[128:192]


def test_tokens_depend_on_seed_and_scope_only() -> None:
    turn = block_turn((1, 2), 128)
    here = filled(session_of(turn))
    assert here == filled(session_of(turn))
    assert common(here[0], filled(session_of(turn), seed=2)[0]) < 3
    assert common(here[0], filled(session_of(turn, name="other"))[0]) < 3
    assert here == filled(session_of(turn, name="other", block_scope="s"))


def test_a_last_partial_block_is_the_start_of_its_whole() -> None:
    short, whole = filled(session_of(block_turn((1, 2), 70), block_turn((1, 2), 128)))
    assert len(short) == 70
    assert whole[:70] == short


@given(
    tokens=st.integers(0, 3000),
    block=st.sampled_from([1, 16, 64, 512]),
    scale=st.sampled_from([1.0, 0.5, 0.3, 0.0625, 0.01]),
    partial=st.booleans(),
)
def test_scaled_prompts_keep_length_structure_and_range(
    tokens: int, block: int, scale: float, partial: bool
) -> None:
    count = -(-tokens // block) if partial else tokens // block
    turn = block_turn(tuple(range(count)), tokens, block=block)
    (ids,) = filled(session_of(turn), scale=scale, vocab=777)
    assert len(ids) == scaled_prompt_tokens(turn.prompt, scale) >= 1
    full = (tokens // block) * max(1, round(block * scale))
    assert full <= len(ids) <= full + max(1, round(block * scale))
    assert min(ids) >= 256
    assert max(ids) < 777
    if scale == 1.0 and tokens:
        assert len(ids) == tokens


def test_scaling_keeps_what_is_shared() -> None:
    ids = tuple(range(100))
    first, second = filled(
        session_of(block_turn(ids, 6400), block_turn((*ids[:60], 777), 61 * 64)), scale=1 / 16
    )
    assert (len(first), len(second)) == (400, 244)
    assert common(first, second) == 240


def test_token_ids_use_the_whole_range_evenly() -> None:
    (ids,) = filled(session_of(block_turn(tuple(range(1000)), 64_000)), vocab=1280)
    counts = np.bincount(ids, minlength=1280)[256:]
    # 62.5 expected; 6 standard deviations either way.
    assert counts.min() > 62.5 - 6 * 62.5**0.5
    assert counts.max() < 62.5 + 6 * 62.5**0.5


def test_a_shared_system_prompt_spans_sessions_of_one_model() -> None:
    one = session_of(block_turn((1, 2, 3), 192), name="a", shared_prefix_tokens=130)
    two = session_of(block_turn((7, 8, 9), 192), name="b", shared_prefix_tokens=130)
    other = session_of(replace(block_turn((1, 2, 3), 192), model="small"), shared_prefix_tokens=130)
    (a,), (b,), (c,) = (filled(s, share=True) for s in (one, two, other))
    assert common(a, b) == 128
    assert common(a, c) < 3
    (apart,), (again,) = (filled(s) for s in (one, two))
    assert common(apart, again) < 3


def test_a_subagent_reads_ids_as_its_parent_does() -> None:
    child = session_of(block_turn((2, 5), 128), name="s/1", block_scope="s", parent_turn=0)
    parent = session_of(block_turn((1, 2), 128), shared_prefix_tokens=128, subagents=(child,))
    filler = PromptFiller.of(parent, seed=1, vocab=5000, scale=1.0, share_prefix=True)
    plan = plan_session(parent, WIDE)
    inside = filler.of_subagent(child, share_prefix=True)
    theirs = filler.token_ids(plan.turns[0])
    ours = inside.token_ids(plan.subagents[0].turns[0])
    assert ours[:64].tolist() == theirs[64:].tolist()


def test_a_session_ends_before_the_first_prompt_over_the_limit() -> None:
    turns = [block_turn((1,), 64), block_turn((1, 2), 128), block_turn((1,), 64)]
    plan = plan_session(session_of(*turns), replace(WIDE, prompt_tokens_max=100))
    assert [planned.index for planned in plan.turns] == [0]
    assert plan.cut_count == 2


def test_an_answer_shrinks_to_the_room_that_is_left() -> None:
    limits = Limits(prompt_tokens_max=500, context_tokens=100, output_tokens_max=50)
    plan = plan_session(
        session_of(
            block_turn((1,), 64, output=30), block_turn((1,), 64, output=45), block_turn((1,), 99)
        ),
        limits,
    )
    assert [planned.output_tokens for planned in plan.turns] == [30, 36, 1]
    assert plan_session(session_of(block_turn((1,), 100)), limits).cut_count == 1


def test_outputs_scale_are_bounded_and_never_nothing() -> None:
    limits = replace(WIDE, scale_tokens=0.1, output_tokens_max=20)
    turns = [block_turn((1,), 64, output=count) for count in (0, 100, 1000)]
    plan = plan_session(session_of(*turns), limits)
    assert [planned.output_tokens for planned in plan.turns] == [1, 10, 20]


def test_subagents_go_with_their_turn_and_count() -> None:
    child = session_of(block_turn((3,), 64), block_turn((3, 4), 128), name="s/1", parent_turn=1)
    parent = session_of(*(block_turn((1,), 64) for _ in range(3)), subagents=(child,))
    assert plan_session(parent, WIDE).request_count() == 5
    first_two = plan_session(parent, WIDE, requests_max=3)
    assert (len(first_two.turns), first_two.request_count()) == (2, 3)
    assert first_two.cut_count == 0
    narrow = plan_session(
        replace(parent, turns=(parent.turns[0], block_turn((1, 2), 128))),
        replace(WIDE, prompt_tokens_max=64),
    )
    assert (narrow.request_count(), narrow.cut_count) == (1, 3)


def test_text_is_not_scaled_and_its_answer_is_estimated() -> None:
    session = session_of(Turn(TextPrompt("hello", 5), output_characters=41))
    assert plan_session(session, WIDE).turns[0].output_tokens == 11
    with pytest.raises(
        ConfigError, match=r"--scale-tokens is 0\.5; expected 1 for a trace of text"
    ):
        plan_session(session, replace(WIDE, scale_tokens=0.5))


def test_a_prompt_of_known_length_only_is_all_new() -> None:
    turns = (Turn(LengthPrompt(100), output_tokens=1), Turn(LengthPrompt(0), output_tokens=1))
    first, second = filled(session_of(*turns))
    assert (len(first), len(second)) == (100, 1)
    assert common(first, filled(session_of(*turns, name="other"))[0]) < 3
