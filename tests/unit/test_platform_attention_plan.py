"""What makes a token's output independent of how its prompt was split, kernel or no kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symphony_sglang.platform.attention_math import (
    NO_WINDOW,
    QUERY_BLOCK_TOKENS,
    ROW_MULTIPLE,
    CausalMask,
    fold_queries,
    pad_rows,
    unfold_output,
)
from symphony_sglang.platform.attention_plan import (
    DECODE_GROUP_TOKENS,
    BatchShape,
    LayerKind,
    causal_spans,
    full_spans,
    plan_decode,
)

WINDOWS = st.sampled_from([NO_WINDOW, 0, 1, 63, 64, 100, 1000])


@given(st.integers(0, 3000), st.integers(1, 600), WINDOWS)
def test_the_keys_of_a_query_depend_on_its_position_alone(
    prefix_len: int, new_len: int, window: int
) -> None:
    whole = {
        at: (span.key_start, span.key_stop)
        for span in causal_spans(0, prefix_len + new_len, window)
        for at in range(span.first, span.last)
    }
    spans = causal_spans(prefix_len, prefix_len + new_len, window)
    covered = []
    for span in spans:
        covered.extend(range(span.first, span.last))
        for at in range(span.first, span.last):
            assert (span.key_start, span.key_stop) == whole[at]
            assert span.key_stop > at
            assert span.key_start <= (0 if window == NO_WINDOW else max(0, at - window))
    assert covered == list(range(prefix_len, prefix_len + new_len))


@given(st.integers(0, 300), st.integers(0, 300))
def test_full_blocks_cover_every_query_once(query_count: int, key_count: int) -> None:
    spans = full_spans(query_count, key_count)
    covered = [at for span in spans for at in range(span.first, span.last)]
    assert covered == (list(range(query_count)) if key_count else [])
    assert all((span.key_start, span.key_stop) == (0, key_count) for span in spans)


@given(st.integers(1, 70), st.integers(1, 5), st.integers(1, 4))
def test_folding_loses_nothing_and_fills_up_the_rows(
    tokens: int, kv_heads: int, group: int
) -> None:
    query = torch.arange(float(tokens * kv_heads * group * 3)).view(tokens, -1, 3)
    rows = fold_queries(query, kv_heads)
    padded = pad_rows(rows)
    assert padded.shape[:2] == (1, kv_heads)
    assert padded.shape[2] % ROW_MULTIPLE == 0
    assert torch.equal(padded[:, :, : tokens * group], rows)
    assert torch.equal(unfold_output(rows, group), query)


@given(st.integers(0, 400), st.integers(1, QUERY_BLOCK_TOKENS), st.integers(1, 3), WINDOWS)
def test_a_mask_hides_what_lies_ahead_and_what_the_window_left_behind(
    first: int, tokens: int, group: int, window: int
) -> None:
    masks = CausalMask(group, window, torch.float32, torch.device("cpu"))
    span = causal_spans(first, first + tokens, window)[0]
    tokens = span.last - span.first
    mask = masks.block(first, tokens * group, span.key_start, span.key_stop)
    query = torch.arange(first, first + tokens).repeat_interleave(group)[:, None]
    key = torch.arange(span.key_start, span.key_stop)[None]
    visible = key <= query
    if window != NO_WINDOW:
        visible &= key >= query - window
    assert torch.equal(mask[: tokens * group] == 0, visible)
    assert torch.equal(mask[: tokens * group] == float("-inf"), ~visible)


def test_a_mask_template_grows_and_keeps_its_meaning() -> None:
    masks = CausalMask(2, NO_WINDOW, torch.float32, torch.device("cpu"))
    early = masks.block(64, 128, 0, 128).clone()
    masks.block(5000, 128, 0, 5056)
    assert torch.equal(masks.block(64, 128, 0, 128), early)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=20), WINDOWS)
def test_decode_groups_hold_every_sequence_once_with_its_own_keys(
    lengths: list[int], window: int
) -> None:
    rows = torch.arange(20)[:, None] * 1000 + torch.arange(800)[None]
    shape = BatchShape(range(len(lengths)), lengths, [1] * len(lengths), None, decode=True)
    kind = LayerKind(heads=4, kv_heads=2, window=window, causal=True, cross=False)
    seen = {}
    for group in plan_decode(shape, kind, rows, torch.float32):
        for at, member in enumerate(torch.arange(len(lengths))[group.members].tolist()):
            mask = torch.zeros(group.slots.shape[1]) if group.mask is None else group.mask[at, 0, 0]
            assert (group.slots[at] // 1000 == member).all()
            assert member not in seen
            seen[member] = (group.slots[at][mask == 0] % 1000).tolist()
    for member, length in enumerate(lengths):
        start = 0 if window == NO_WINDOW else max(0, length - 1 - window)
        assert seen[member] == list(range(start, length))


@pytest.mark.parametrize("count", [1, 2, DECODE_GROUP_TOKENS // QUERY_BLOCK_TOKENS])
def test_short_sequences_of_one_padded_length_share_a_call(count: int) -> None:
    rows = torch.zeros(40, 128, dtype=torch.int32)
    shape = BatchShape(range(count), [50] * count, [1] * count, None, decode=True)
    kind = LayerKind(heads=4, kv_heads=2, window=NO_WINDOW, causal=True, cross=False)
    assert len(plan_decode(shape, kind, rows, torch.float32)) == 1
