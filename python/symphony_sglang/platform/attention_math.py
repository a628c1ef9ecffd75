"""Attention over gathered keys in plain torch: folding, masks, the two kernels.

Numerics are arranged so that a token's output does not depend on how its prompt was split into
extends, which is what makes greedy output equal after a recompute, a chunked prefill and a cache
hit. Three rules do it; each is a matter of which partial sums the kernels form:

- queries are cut at multiples of ``QUERY_BLOCK_TOKENS`` of their absolute position,
- a block sees keys up to the next such multiple, with what lies beyond a query masked, so the
  partition of the keys depends on the query's position alone,
- a block has a multiple of ``ROW_MULTIPLE`` rows, because matrix libraries take other kernels, with
  another order of summation, for the one to three rows left over.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

# A block is a parallel section, and on a busy machine every section waits for its slowest thread:
# that asks for large blocks; the work spent on keys that the mask then hides asks for small ones.
QUERY_BLOCK_TOKENS = 128
ROW_MULTIPLE = 4
# SGLang's -1: every earlier token is visible (srt/layers/radix_attention.py).
NO_WINDOW = -1


def round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def fold_queries(query: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Put the query heads that share a key head into one matrix, so keys are read once for all.

    `query` is [tokens, heads, dim]; the answer is [1, kv_heads, tokens * group, dim], with row
    ``token * group + member``.
    """
    tokens, heads, dim = query.shape
    rows = query.reshape(tokens, kv_heads, heads // kv_heads, dim).transpose(0, 1)
    return rows.reshape(1, kv_heads, -1, dim)


def unfold_output(rows: torch.Tensor, group: int) -> torch.Tensor:
    """Inverse of ``fold_queries``: [1, kv_heads, tokens * group, dim] to
    [tokens, kv_heads * group, dim]."""
    _, kv_heads, count, dim = rows.shape
    heads = rows.reshape(kv_heads, count // group, group, dim).transpose(0, 1)
    return heads.reshape(count // group, kv_heads * group, dim)


def pad_rows(rows: torch.Tensor) -> torch.Tensor:
    """Zero rows at the end of the last dimension but one, up to ``ROW_MULTIPLE``."""
    count = rows.shape[-2]
    missing = round_up(count, ROW_MULTIPLE) - count
    return pad(rows, (0, 0, 0, missing)) if missing else rows


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    logit_cap: float = 0.0,
) -> torch.Tensor:
    """Softmax attention; the fused kernel where it fits, float32 matrix products where not.

    Args:
        query: [batch, kv_heads, rows, qk_dim].
        key: [batch, kv_heads, keys, qk_dim], same dtype as `query`.
        value: [batch, kv_heads, keys, v_dim], same dtype as `query`.
        mask: additive, broadcastable to [batch, kv_heads, rows, keys].
        scale: factor on the dot products.
        logit_cap: bound of the soft cap ``cap * tanh(logit / cap)``; 0 for none.

    Returns:
        [batch, kv_heads, rows, v_dim] in the dtype of `query`. torch's CPU kernel keeps logits and
        sums in float32 for every input dtype, as the other path does.
    """
    if mask is not None and mask.dtype != query.dtype:
        mask = mask.to(query.dtype)
    if not logit_cap and query.shape[-1] == value.shape[-1]:
        return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    logits = torch.matmul(query.float(), key.float().transpose(-2, -1)) * scale
    if logit_cap:
        logits = torch.tanh(logits / logit_cap) * logit_cap
    if mask is not None:
        logits = logits + mask
    return torch.matmul(torch.softmax(logits, dim=-1), value.float()).to(query.dtype)


class CausalMask:
    """Masks of folded query blocks, all of them slices of one template.

    A block that starts at position p sees the same pattern relative to p, wherever p is. So the
    template is built once and grows with the longest sequence met; its size is bounded by the
    context length: ``QUERY_BLOCK_TOKENS * group * (2 * context + QUERY_BLOCK_TOKENS)`` values.
    """

    def __init__(self, group: int, window: int, dtype: torch.dtype, device: torch.device) -> None:
        """`group` query heads per key head; `window` earlier tokens visible, or ``NO_WINDOW``."""
        self._group = group
        self._window = window
        self._dtype = dtype
        self._device = device
        self._reach = 0
        self._template = self._build(QUERY_BLOCK_TOKENS)

    def block(self, first: int, rows: int, key_start: int, key_stop: int) -> torch.Tensor:
        """Mask of the block whose first query stands at position `first`, a view.

        Keys stand at ``[key_start, key_stop)``; the answer is [rows, key_stop - key_start] with
        `rows` padded as ``pad_rows`` does it.
        """
        rows = round_up(rows, ROW_MULTIPLE)
        reach = first - key_start
        if reach > self._reach:
            self._template = self._build(1 << (reach - 1).bit_length())
        origin = self._reach - first
        return self._template[:rows, origin + key_start : origin + key_stop]

    def _build(self, reach: int) -> torch.Tensor:
        self._reach = reach
        offset = torch.arange(QUERY_BLOCK_TOKENS, device=self._device)
        offset = offset.repeat_interleave(self._group)[:, None]
        # Rows that only pad the last partial block may fall beyond the block's own queries.
        padding = offset[-1:].expand(ROW_MULTIPLE, 1)
        offset = torch.cat([offset, padding])
        key = torch.arange(-reach, QUERY_BLOCK_TOKENS, device=self._device)[None, :]
        hidden = key > offset
        if self._window != NO_WINDOW:
            hidden |= key < offset - self._window
        # Outside inference mode, so that a later batch may still slice it under no_grad.
        with torch.inference_mode(False):
            template = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
            return template.masked_fill_(hidden.clone(), float("-inf"))


class GatherBuffer:
    """Reusable memory for the keys or the values of one gather.

    Copying beats attending to the pool in place even where a sequence's slots are consecutive:
    the kernel walks the keys once per head, while a pool row holds all heads, and between two
    layers the weights have pushed the pool out of the caches (``benchmark/attention.py``).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flat: torch.Tensor | None = None

    def by_head(self, pool: torch.Tensor, pool_rows: torch.Tensor) -> torch.Tensor:
        """[slots, kv_heads, dim] by rows ``slot * kv_heads + head``, head-major, to
        [1, kv_heads, keys, dim]: the layout for many queries."""
        _, kv_heads, dim = pool.shape
        target = self._take(pool, pool_rows.numel(), dim)
        torch.index_select(pool.view(-1, dim), 0, pool_rows, out=target)
        return target.view(1, kv_heads, -1, dim)

    def by_token(self, pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        """[slots, kv_heads, dim] by slots [batch, keys], to [batch, kv_heads, keys, dim] strided
        over whole pool rows: the layout for a single query, which reads every key once."""
        _, kv_heads, dim = pool.shape
        batch, keys = slots.shape
        target = self._take(pool, slots.numel(), kv_heads * dim)
        torch.index_select(pool.view(-1, kv_heads * dim), 0, slots.view(-1), out=target)
        return target.view(batch, keys, kv_heads, dim).transpose(1, 2)

    def _take(self, pool: torch.Tensor, rows: int, width: int) -> torch.Tensor:
        numel = rows * width
        if self._flat is None or self._flat.numel() < numel or self._flat.dtype != pool.dtype:
            # A power of two, so that a growing sequence does not allocate at every step.
            capacity = 1 << (numel - 1).bit_length()
            with torch.inference_mode(False):
                self._flat = torch.empty(capacity, dtype=pool.dtype, device=self._device)
        return self._flat[:numel].view(rows, width)
