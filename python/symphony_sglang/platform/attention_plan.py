"""What one forward batch attends to: index work done once, used by every layer.

A plan belongs to a kind of layer, not to a layer: all layers with the same heads and the same
window share it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from symphony_sglang.platform.attention_math import (
    NO_WINDOW,
    QUERY_BLOCK_TOKENS,
    CausalMask,
    round_up,
)

# Decoding sequences share a kernel call while their keys together stay within this many tokens.
# Fewer calls save the fixed cost of each, and a barrier between threads; beyond this the copy falls
# out of the processor's caches and costs more than the calls it saves.
DECODE_GROUP_TOKENS = 2048


class LayerKind(NamedTuple):
    """What of a layer decides its plan; heads are those of this tensor-parallel rank."""

    heads: int
    kv_heads: int
    window: int
    causal: bool
    cross: bool

    @property
    def group(self) -> int:
        return self.heads // self.kv_heads


@dataclass(frozen=True, slots=True)
class BatchShape:
    """Host-side lengths of a batch, in tokens, one entry per sequence."""

    request_rows: Sequence[int]
    seq_lens: Sequence[int]
    new_lens: Sequence[int]
    encoder_lens: Sequence[int] | None
    decode: bool

    def key_span(self, index: int, *, cross: bool) -> tuple[int, int]:
        """Columns of ``req_to_token`` that hold a sequence's keys: first and count.

        An encoder's tokens come before the decoder's in the request's row (SGLang
        srt/layers/attention/torch_native_backend.py).
        """
        encoder_len = self.encoder_lens[index] if self.encoder_lens else 0
        return (0, encoder_len) if cross else (encoder_len, self.seq_lens[index])


class BlockSpan(NamedTuple):
    """Queries ``[first, last)`` and keys ``[key_start, key_stop)``, by position in the sequence."""

    first: int
    last: int
    key_start: int
    key_stop: int


@dataclass(frozen=True, slots=True)
class QueryBlock:
    """Folded query rows of a sequence, the keys of its gather that they see, and the mask."""

    rows: slice
    keys: slice
    mask: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class ExtendSequence:
    """One sequence of an extend: its tokens of the batch, the pool rows to gather, head-major, and
    the blocks in order."""

    tokens: slice
    pool_rows: torch.Tensor
    blocks: tuple[QueryBlock, ...]


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Sequences of equal padded length; `members` selects their rows of the batch.

    `slots` is [batch, keys]; `mask` is [batch, 1, 1, keys], or None where every key is visible.
    """

    members: slice | torch.Tensor
    slots: torch.Tensor
    mask: torch.Tensor | None


def plan_extend(
    shape: BatchShape, kind: LayerKind, req_to_token: torch.Tensor, masks: CausalMask
) -> tuple[ExtendSequence, ...]:
    """Cut every sequence's new tokens into blocks and list the keys that they need."""
    sequences = []
    start = 0
    for index, new_len in enumerate(shape.new_lens):
        first_column, key_count = shape.key_span(index, cross=kind.cross)
        if kind.causal:
            spans = causal_spans(key_count - new_len, key_count, kind.window)
        else:
            spans = full_spans(new_len, key_count)
        if spans:
            slots = take_slots(
                req_to_token[shape.request_rows[index]], first_column, key_count, spans
            )
            sequences.append(
                ExtendSequence(
                    tokens=slice(start, start + new_len),
                    pool_rows=head_rows(slots, kind.kv_heads),
                    blocks=tuple(place_block(span, spans[0], kind, masks) for span in spans),
                )
            )
        start += new_len
    return tuple(sequences)


def causal_spans(prefix_len: int, seq_len: int, window: int) -> list[BlockSpan]:
    """Blocks of the queries at ``[prefix_len, seq_len)``, cut at absolute block boundaries.

    Their number and key ranges follow the new tokens: nothing is computed for the prefix.
    """
    spans = []
    first = prefix_len
    while first < seq_len:
        boundary = round_up(first + 1, QUERY_BLOCK_TOKENS)
        spans.append(
            BlockSpan(first, min(boundary, seq_len), window_start(first, window), boundary)
        )
        first = boundary
    return spans


def full_spans(query_count: int, key_count: int) -> list[BlockSpan]:
    """Blocks where every query sees every key; none where there is no key."""
    if not key_count:
        return []
    return [
        BlockSpan(first, min(first + QUERY_BLOCK_TOKENS, query_count), 0, key_count)
        for first in range(0, query_count, QUERY_BLOCK_TOKENS)
    ]


def window_start(position: int, window: int) -> int:
    """First key that the block around `position` may need, rounded down to a block boundary."""
    if window == NO_WINDOW:
        return 0
    block_start = position // QUERY_BLOCK_TOKENS * QUERY_BLOCK_TOKENS
    return max(0, block_start - window) // QUERY_BLOCK_TOKENS * QUERY_BLOCK_TOKENS


def take_slots(
    row: torch.Tensor, first_column: int, key_count: int, spans: Sequence[BlockSpan]
) -> torch.Tensor:
    """Slots of the keys that `spans` need; positions past the last key repeat its slot.

    The repeated slot is the sequence's own: what is masked stays finite where the sequence is,
    while a zero weight times another request's NaN would be a NaN.
    """
    position = torch.arange(spans[0].key_start, spans[-1].key_stop, device=row.device)
    return row[first_column + position.clamp_(max=key_count - 1)]


def head_rows(slots: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Rows of the pool seen as [slots * kv_heads, dim], ordered by head, then by key."""
    head = torch.arange(kv_heads, device=slots.device)[:, None]
    return (slots.long()[None, :] * kv_heads + head).view(-1)


def place_block(
    span: BlockSpan, origin: BlockSpan, kind: LayerKind, masks: CausalMask
) -> QueryBlock:
    """The block of `span` in a sequence whose first block is `origin`."""
    row_count = (span.last - span.first) * kind.group
    row_start = (span.first - origin.first) * kind.group
    mask = None
    if kind.causal:
        mask = masks.block(span.first, row_count, span.key_start, span.key_stop)
    return QueryBlock(
        rows=slice(row_start, row_start + row_count),
        keys=slice(span.key_start - origin.key_start, span.key_stop - origin.key_start),
        mask=mask,
    )


def plan_decode(
    shape: BatchShape, kind: LayerKind, req_to_token: torch.Tensor, dtype: torch.dtype
) -> tuple[DecodeGroup, ...]:
    """Group sequences of equal padded length, as many as ``DECODE_GROUP_TOKENS`` takes."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for index in range(len(shape.seq_lens)):
        _, key_count = shape.key_span(index, cross=kind.cross)
        if key_count:
            start = window_start(key_count - 1, kind.window)
            by_length[round_up(key_count, QUERY_BLOCK_TOKENS) - start].append(index)
    groups: list[DecodeGroup] = []
    for padded_len, members in by_length.items():
        size = max(1, DECODE_GROUP_TOKENS // padded_len)
        groups.extend(
            _decode_group(shape, kind, members[at : at + size], padded_len, req_to_token, dtype)
            for at in range(0, len(members), size)
        )
    return tuple(groups)


def _decode_group(
    shape: BatchShape,
    kind: LayerKind,
    members: Sequence[int],
    padded_len: int,
    req_to_token: torch.Tensor,
    dtype: torch.dtype,
) -> DecodeGroup:
    spans = [shape.key_span(index, cross=kind.cross) for index in members]
    device = req_to_token.device

    def column(values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, device=device)[:, None]

    first = column([first for first, _ in spans])
    last = column([count - 1 for _, count in spans])
    start = column([window_start(count - 1, kind.window) for _, count in spans])
    position = start + torch.arange(padded_len, device=device)[None, :]
    hidden = position > last
    if kind.window != NO_WINDOW:
        hidden |= position < last - kind.window
    rows = column([shape.request_rows[index] for index in members])
    slots = req_to_token[rows, first + torch.minimum(position, last)]
    mask = torch.zeros(hidden.shape, dtype=dtype, device=device)
    mask = mask.masked_fill_(hidden, float("-inf"))[:, None, None, :] if hidden.any() else None
    if list(members) == list(range(members[0], members[0] + len(members))):
        return DecodeGroup(slice(members[0], members[-1] + 1), slots, mask)
    return DecodeGroup(torch.tensor(members, device=device), slots, mask)
