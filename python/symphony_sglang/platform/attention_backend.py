"""SGLang's attention backend in plain torch, for machines without attention kernels.

An extend attends from its new tokens only, so a cached prefix costs its length once per new token.
SGLang's own ``torch_native`` (srt/layers/attention/torch_native_backend.py) attends from the whole
prefix again on every extend, and decodes one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType, RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc, MHATokenToKVPool

from symphony_sglang.errors import UnsupportedError
from symphony_sglang.platform.attention_math import (
    NO_WINDOW,
    CausalMask,
    GatherBuffer,
    attend,
    fold_queries,
    pad_rows,
    unfold_output,
)
from symphony_sglang.platform.attention_plan import (
    BatchShape,
    DecodeGroup,
    ExtendSequence,
    LayerKind,
    plan_decode,
    plan_extend,
)

_KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Server arguments that lead to forward modes or graph captures that this backend does not have.
_UNSUPPORTED_ARGUMENTS = {
    "speculative_algorithm": "speculative decoding",
    "dllm_algorithm": "diffusion language models",
    "enable_torch_compile": "torch.compile",
}


@dataclass(slots=True)
class ForwardPlan:
    """What the layers of one batch share, by kind of layer."""

    shape: BatchShape
    extends: dict[LayerKind, tuple[ExtendSequence, ...]] = field(default_factory=dict)
    decodes: dict[LayerKind, tuple[DecodeGroup, ...]] = field(default_factory=dict)


class PortableAttnBackend(AttentionBackend):
    """Attention over ``MHATokenToKVPool`` with torch alone, on any device that torch drives.

    Takes float32, bfloat16 and float16, GQA and MQA, sliding windows, tanh soft caps, value heads
    of another size than the key's, encoder-only and cross attention. What else a model or a flag
    asks for is refused by name when the backend is built.
    """

    def __init__(self, model_runner: Any) -> None:
        """Raises ``UnsupportedError`` naming every feature that cannot run here."""
        super().__init__()
        features = unsupported_features(model_runner)
        if features:
            raise UnsupportedError(
                f"{', '.join(features)}: not available with the portable torch attention backend"
            )
        self.req_to_token: torch.Tensor = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self._dtype: torch.dtype = model_runner.dtype
        layers = attention_layers(model_runner)
        self._kinds = tuple(dict.fromkeys(layer_kind(layer) for layer in layers))
        self._masks: dict[tuple[int, int], CausalMask] = {}
        self._keys = GatherBuffer(self.req_to_token.device)
        self._values = GatherBuffer(self.req_to_token.device)
        self.forward_metadata: ForwardPlan | None = None

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Read the batch's lengths and plan every kind of layer that the model has."""
        self.forward_metadata = None
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if mode.is_target_verify() or mode.is_draft_extend_v2() or mode.is_dllm_extend():
            raise UnsupportedError(f"forward mode {mode.name} is not available here")
        plan = ForwardPlan(batch_shape(forward_batch))
        self.forward_metadata = plan
        for kind in self._kinds:
            if plan.shape.decode:
                self._decode_groups(plan, kind)
            else:
                self._extend_sequences(plan, kind)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[tokens, heads * qk_dim] to [tokens, heads * v_dim], sequences one after the other."""
        plan = self._begin(k, v, layer, forward_batch, save_kv_cache, kwargs)
        query = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        output = query.new_zeros(query.shape[0], layer.tp_q_head_num, layer.v_head_dim)
        kind = layer_kind(layer)
        key_pool, value_pool = self._pools(layer)
        for sequence in self._extend_sequences(plan, kind):
            key = self._keys.by_head(key_pool, sequence.pool_rows).to(query.dtype)
            value = self._values.by_head(value_pool, sequence.pool_rows).to(query.dtype)
            rows = fold_queries(query[sequence.tokens], kind.kv_heads)
            attended = [
                attend(
                    pad_rows(rows[:, :, block.rows]),
                    key[:, :, block.keys],
                    value[:, :, block.keys],
                    block.mask,
                    layer.scaling,
                    layer.logit_cap,
                )[:, :, : block.rows.stop - block.rows.start]
                for block in sequence.blocks
            ]
            output[sequence.tokens] = unfold_output(torch.cat(attended, dim=2), kind.group)
        return output.view(output.shape[0], -1)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[sequences, heads * qk_dim] to [sequences, heads * v_dim], one new token each."""
        plan = self._begin(k, v, layer, forward_batch, save_kv_cache, kwargs)
        kind = layer_kind(layer)
        query = q.reshape(-1, kind.kv_heads, kind.group, layer.qk_head_dim)
        output = query.new_zeros(*query.shape[:3], layer.v_head_dim)
        key_pool, value_pool = self._pools(layer)
        for group in self._decode_groups(plan, kind):
            rows = attend(
                pad_rows(query[group.members]),
                self._keys.by_token(key_pool, group.slots).to(query.dtype),
                self._values.by_token(value_pool, group.slots).to(query.dtype),
                group.mask,
                layer.scaling,
                layer.logit_cap,
            )
            output[group.members] = rows[:, :, : kind.group]
        return output.view(output.shape[0], -1)

    def support_triton(self) -> bool:
        return False

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Plans are made on the host for every batch, which a captured graph would not replay."""
        raise UnsupportedError(
            "CUDA graphs are not available with the portable torch attention backend; "
            "start with --disable-cuda-graph"
        )

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def _begin(
        self,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        extras: dict[str, Any],
    ) -> ForwardPlan:
        """Store the new keys and values; refuse per-call inputs that change the result."""
        given = sorted(name for name, value in extras.items() if value is not None)
        if given:
            raise UnsupportedError(
                f"attention input {', '.join(given)} of layer {layer.layer_id}: "
                "not available with the portable torch attention backend"
            )
        if self.forward_metadata is None:
            raise RuntimeError("attention ran before init_forward_metadata of its batch")
        if save_kv_cache and k is not None and v is not None:
            slots = (
                forward_batch.encoder_out_cache_loc
                if layer.is_cross_attention
                else forward_batch.out_cache_loc
            )
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots), k, v)
        return self.forward_metadata

    def _pools(self, layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """A layer's keys and values; waits until a transfer into this layer has landed."""
        pool = self.token_to_kv_pool
        return pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)

    def _extend_sequences(self, plan: ForwardPlan, kind: LayerKind) -> tuple[ExtendSequence, ...]:
        if kind not in plan.extends:
            shared = (kind.group, kind.window)
            if shared not in self._masks:
                self._masks[shared] = CausalMask(*shared, self._dtype, self.req_to_token.device)
            plan.extends[kind] = plan_extend(
                plan.shape, kind, self.req_to_token, self._masks[shared]
            )
        return plan.extends[kind]

    def _decode_groups(self, plan: ForwardPlan, kind: LayerKind) -> tuple[DecodeGroup, ...]:
        if kind not in plan.decodes:
            plan.decodes[kind] = plan_decode(plan.shape, kind, self.req_to_token, self._dtype)
        return plan.decodes[kind]


def attention_layers(model_runner: Any) -> Iterator[RadixAttention]:
    """The attention layers of the runner's model; none where no model is loaded yet."""
    model = getattr(model_runner, "model", None)
    modules = model.modules() if model is not None else ()
    return (module for module in modules if isinstance(module, RadixAttention))


def layer_kind(layer: Any) -> LayerKind:
    """A window counts for causal self-attention only, as SGLang's ``torch_native`` has it."""
    causal = not layer.is_cross_attention and layer.attn_type != AttentionType.ENCODER_ONLY
    window = layer.sliding_window_size if causal else NO_WINDOW
    return LayerKind(
        heads=layer.tp_q_head_num,
        kv_heads=layer.tp_k_head_num,
        window=NO_WINDOW if window is None or window < 0 else window,
        causal=causal,
        cross=layer.is_cross_attention,
    )


def batch_shape(forward_batch: Any) -> BatchShape:
    """Lengths from SGLang's host mirrors, or from the device where it keeps none."""

    def lengths(host: Any, device: torch.Tensor | None) -> list[int]:
        values = device if host is None else host
        if values is None:
            raise RuntimeError("a forward batch came without its sequence lengths")
        return values.tolist() if isinstance(values, torch.Tensor) else list(values)

    seq_lens = lengths(forward_batch.seq_lens_cpu, forward_batch.seq_lens)
    decode = forward_batch.forward_mode.is_decode()
    new_lens: Sequence[int] = [1] * len(seq_lens)
    if not decode:
        new_lens = lengths(forward_batch.extend_seq_lens_cpu, forward_batch.extend_seq_lens)
    encoder_lens = None
    if forward_batch.encoder_lens is not None:
        encoder_lens = lengths(forward_batch.encoder_lens_cpu, forward_batch.encoder_lens)
    return BatchShape(
        request_rows=lengths(None, forward_batch.req_pool_indices),
        seq_lens=seq_lens,
        new_lens=new_lens,
        encoder_lens=encoder_lens,
        decode=decode,
    )


def unsupported_features(model_runner: Any) -> list[str]:
    """Names of what the runner's pool, flags and layers need and this backend lacks."""
    features = []
    pool = model_runner.token_to_kv_pool
    if getattr(model_runner, "use_mla_backend", False):
        features.append("multi-head latent attention (MLA)")
    elif type(pool) is not MHATokenToKVPool:
        features.append(f"KV pool {type(pool).__name__}")
    elif pool.kv_cache_layout != "nhd":
        features.append(f"KV cache layout {pool.kv_cache_layout}")
    elif pool.is_quantized_kv_cache or pool.dtype not in _KV_DTYPES:
        features.append(f"KV cache dtype {pool.dtype}")
    server_args = model_runner.server_args
    features.extend(
        name
        for argument, name in _UNSUPPORTED_ARGUMENTS.items()
        if getattr(server_args, argument, None)
    )
    for layer in attention_layers(model_runner):
        features.extend(unsupported_layer_features(layer))
    return list(dict.fromkeys(features))


def unsupported_layer_features(layer: Any) -> Iterator[str]:
    """Names of what one ``RadixAttention`` asks for and this backend lacks."""
    if layer.attn_type == AttentionType.DECODER_BIDIRECTIONAL:
        yield "bidirectional attention in a decoder"
    if layer.logit_cap and layer.logit_capping_method != "tanh":
        yield f"logit capping method {layer.logit_capping_method}"
    if layer.pos_encoding_mode != "NONE":
        yield f"position encoding {layer.pos_encoding_mode} inside attention"
    if layer.xai_temperature_len > 0:
        yield "attention temperature by position"
    if layer.use_irope:
        yield "chunked local attention"
    if layer.tp_q_head_num % layer.tp_k_head_num:
        yield f"{layer.tp_q_head_num} query heads over {layer.tp_k_head_num} key heads"
