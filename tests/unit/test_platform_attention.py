"""The portable attention backend on SGLang's own pools and layers, against a float32 softmax."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from symphony_sglang.errors import UnsupportedError
from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops

define_missing_torchvision_ops()

from sglang.srt.layers.radix_attention import AttentionType, RadixAttention  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count  # noqa: E402

from symphony_sglang.platform import attention  # noqa: E402
from symphony_sglang.platform.attention_backend import PortableAttnBackend  # noqa: E402

PAGE = 16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def _one_thread():
    """The shapes are small: a barrier between threads would cost more than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True, slots=True)
class Shape:
    heads: int = 12
    kv_heads: int = 4
    dim: int = 32
    value_dim: int = 32
    window: int = -1
    cap: float = 0.0
    attn_type: AttentionType = AttentionType.DECODER
    cross: bool = False


class Bench:
    """A backend over real pools, and sequences whose keys lie on shuffled pages."""

    def __init__(
        self, shape: Shape, dtype: torch.dtype, slots: int = 4096, fill: float = 0.0, seed: int = 0
    ) -> None:
        self.shape, self.dtype = shape, dtype
        self.pool = MHATokenToKVPool(
            slots, PAGE, dtype, shape.kv_heads, shape.dim, 1, "cpu", False,
            v_head_dim=shape.value_dim,
        )  # fmt: skip
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.fill_(fill)
        self.rows = ReqToTokenPool(64, slots, "cpu", False)
        self.layer = RadixAttention(
            shape.heads, shape.dim, shape.dim**-0.5, shape.kv_heads, 0, logit_cap=shape.cap,
            v_head_dim=shape.value_dim, sliding_window_size=shape.window,
            is_cross_attention=shape.cross, attn_type=shape.attn_type,
        )  # fmt: skip
        self.backend = PortableAttnBackend(self.runner())
        generator = random.Random(seed)
        pages = list(range(1, slots // PAGE))
        generator.shuffle(pages)
        self.free = [page * PAGE + at for page in pages for at in range(PAGE)]
        self.generator = torch.Generator().manual_seed(seed)

    def runner(self) -> SimpleNamespace:
        return SimpleNamespace(
            req_to_token_pool=self.rows, token_to_kv_pool=self.pool, dtype=self.dtype,
            use_mla_backend=False, server_args=SimpleNamespace(),
            model=torch.nn.ModuleList([self.layer]),
        )  # fmt: skip

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(*size, generator=self.generator).to(self.dtype)

    def sequence(self, length: int, row: int, *, encoder_len: int = 0) -> Sequence:
        total = encoder_len + length
        slots = torch.tensor([self.free.pop() for _ in range(total)])
        self.rows.req_to_token[row, :total] = slots.int()
        shape = self.shape
        return Sequence(
            row, length, encoder_len, slots,
            self.random(length, shape.heads, shape.dim) * 2,
            self.random(total, shape.kv_heads, shape.dim),
            self.random(total, shape.kv_heads, shape.value_dim),
        )  # fmt: skip

    def write(self, sequence: Sequence, first: int, last: int) -> None:
        """Put keys and values of columns [first, last) into the pool, as a cache hit finds them."""
        slots = sequence.slots[first:last]
        self.pool.k_buffer[0][slots] = sequence.key[first:last]
        self.pool.v_buffer[0][slots] = sequence.value[first:last]

    def batch(self, sequences: list[Sequence], spans: list[tuple[int, int]], mode: ForwardMode):
        encoders = [s.encoder_len for s in sequences] if self.has_encoder(sequences) else None
        slots = [
            s.slots[s.encoder_len + a : s.encoder_len + b]
            for s, (a, b) in zip(sequences, spans, strict=True)
        ]
        new = [b - a for a, b in spans]
        return SimpleNamespace(
            forward_mode=mode,
            req_pool_indices=torch.tensor([s.row for s in sequences]),
            seq_lens=torch.tensor([b for _, b in spans]),
            seq_lens_cpu=torch.tensor([b for _, b in spans]),
            extend_seq_lens=torch.tensor(new),
            extend_seq_lens_cpu=None if mode.is_decode() else new,
            extend_prefix_lens=torch.tensor([a for a, _ in spans]),
            encoder_lens=None if encoders is None else torch.tensor(encoders),
            encoder_lens_cpu=encoders,
            out_cache_loc=torch.cat(slots),
            encoder_out_cache_loc=None,
        )  # fmt: skip

    @staticmethod
    def has_encoder(sequences: list[Sequence]) -> bool:
        return any(s.encoder_len for s in sequences)

    def run(
        self,
        sequences: list[Sequence],
        spans: list[tuple[int, int]],
        mode: ForwardMode = ForwardMode.EXTEND,
        save: bool = True,
    ) -> list[torch.Tensor]:
        """Queries [first, last) of each sequence; answers [tokens, heads, value_dim] for each."""
        batch = self.batch(sequences, spans, mode)
        self.backend.init_forward_metadata(batch)
        pairs = list(zip(sequences, spans, strict=True))
        query = torch.cat([s.query[a:b] for s, (a, b) in pairs]).flatten(1)
        key = value = None
        if save:
            key = torch.cat([s.key[s.encoder_len :][a:b] for s, (a, b) in pairs])
            value = torch.cat([s.value[s.encoder_len :][a:b] for s, (a, b) in pairs])
        output = self.backend.forward(query, key, value, self.layer, batch, save_kv_cache=save)
        assert output.shape == (query.shape[0], self.shape.heads * self.shape.value_dim)
        assert output.dtype == self.dtype
        output = output.view(-1, self.shape.heads, self.shape.value_dim)
        return list(output.split([b - a for a, b in spans]))


@dataclass(frozen=True, slots=True)
class Sequence:
    row: int
    length: int
    encoder_len: int
    slots: torch.Tensor
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def expected(self, shape: Shape, first: int, last: int) -> torch.Tensor:
        """Plain softmax in float32, token by token positions, no blocks, no folding."""
        group = shape.heads // shape.kv_heads
        if shape.cross:
            key, value = self.key[: self.encoder_len], self.value[: self.encoder_len]
        else:
            key, value = self.key[self.encoder_len :][:last], self.value[self.encoder_len :][:last]
        key = key.float().repeat_interleave(group, 1)
        value = value.float().repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", self.query[first:last].float(), key)
        logits = logits / math.sqrt(shape.dim)
        if shape.cap:
            logits = shape.cap * torch.tanh(logits / shape.cap)
        if not shape.cross and shape.attn_type is AttentionType.DECODER:
            query_at = torch.arange(first, last)[:, None]
            key_at = torch.arange(last)[None, :]
            hidden = key_at > query_at
            if shape.window >= 0:
                hidden |= key_at < query_at - shape.window
            logits = logits.masked_fill(hidden, float("-inf"))
        return torch.einsum("hqk,khd->qhd", torch.softmax(logits, -1), value)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    error = (actual.float() - expected).abs().max().item()
    assert error <= TOLERANCE[actual.dtype], f"off by {error}"


SHAPES = {
    "gqa": Shape(),
    "mha": Shape(heads=4, kv_heads=4),
    "mqa": Shape(heads=6, kv_heads=1, dim=64, value_dim=64),
    "window": Shape(window=40),
    "window of one": Shape(window=1),
    "window over a block": Shape(window=200),
    "capped": Shape(cap=5.0),
    "capped window": Shape(cap=5.0, window=70),
    "small values": Shape(dim=48, value_dim=24),
    "large values": Shape(dim=24, value_dim=48),
    "encoder only": Shape(attn_type=AttentionType.ENCODER_ONLY),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_mixed_extends_match_a_float32_softmax(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    for seed in range(2):
        bench = Bench(shape, dtype, seed=seed)
        generator = random.Random(seed)
        spans, sequences = [], []
        for row in range(1, 7):
            prefix = generator.choice([0, 0, 1, 15, 64, 130, 333])
            new = generator.choice([1, 2, 5, 16, 63, 64, 65, 150])
            sequences.append(bench.sequence(prefix + new, row))
            spans.append((prefix, prefix + new))
            bench.write(sequences[-1], 0, prefix)
        for sequence, span, output in zip(
            sequences, spans, bench.run(sequences, spans), strict=True
        ):
            assert_close(output, sequence.expected(shape, *span))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", [name for name in SHAPES if name != "encoder only"])
def test_decode_matches_a_float32_softmax(name: str, dtype: torch.dtype) -> None:
    shape = SHAPES[name]
    bench = Bench(shape, dtype)
    lengths = [1, 2, 64, 65, 70, 128, 129, 100, 500, 66, 3, 1100]
    sequences = [bench.sequence(length, row) for row, length in enumerate(lengths, 1)]
    for sequence in sequences:
        bench.write(sequence, 0, sequence.length - 1)
    spans = [(length - 1, length) for length in lengths]
    outputs = bench.run(sequences, spans, ForwardMode.DECODE)
    for sequence, span, output in zip(sequences, spans, outputs, strict=True):
        assert_close(output, sequence.expected(shape, *span))


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE], ids=str)
def test_cross_attention_sees_the_encoder_alone_and_self_attention_the_decoder(
    mode: ForwardMode,
) -> None:
    for shape in (Shape(cross=True), Shape()):
        bench = Bench(shape, torch.float32)
        sequences = [
            bench.sequence(40, 1, encoder_len=100),
            bench.sequence(70, 2, encoder_len=0),
            bench.sequence(9, 3, encoder_len=7),
        ]
        for sequence in sequences:
            bench.write(sequence, 0, sequence.encoder_len + sequence.length)
        first = [s.length - 1 for s in sequences] if mode.is_decode() else [8, 0, 3]
        spans = [(at, s.length) for at, s in zip(first, sequences, strict=True)]
        outputs = bench.run(sequences, spans, mode, save=False)
        for sequence, span, output in zip(sequences, spans, outputs, strict=True):
            if shape.cross and not sequence.encoder_len:
                assert not output.any()
            else:
                assert_close(output, sequence.expected(shape, *span))


@pytest.mark.parametrize("shape", [Shape(), SHAPES["mqa"], SHAPES["mha"]], ids=str)
def test_a_token_is_the_same_however_its_prompt_was_split(shape: Shape) -> None:
    """Equal but for the last bit of a few elements; on most processors equal in every bit."""
    length = 700
    outputs = []
    for cuts in ([], [690], [699], [512, 640], [1, 63, 64, 66, 333]):
        bench = Bench(shape, torch.bfloat16, seed=4)
        sequence = bench.sequence(length, 1)
        edges = [0, *cuts, length]
        parts = [bench.run([sequence], [span])[0] for span in itertools.pairwise(edges)]
        outputs.append(torch.cat(parts))
    decoded = Bench(shape, torch.bfloat16, seed=4)
    sequence = decoded.sequence(length, 1)
    decoded.run([sequence], [(0, length - 5)])
    outputs.append(
        torch.cat(
            [
                outputs[0][: length - 5],
                *(
                    decoded.run([sequence], [(at, at + 1)], ForwardMode.DECODE)[0]
                    for at in range(length - 5, length)
                ),
            ]
        )
    )
    for other in outputs[1:]:
        # The last tokens: in every split another extend made them.
        assert (other[-5:] != outputs[0][-5:]).float().mean() < 1e-3
        torch.testing.assert_close(other, outputs[0], rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE], ids=str)
def test_another_requests_nan_does_not_leak(mode: ForwardMode) -> None:
    bench = Bench(Shape(), torch.bfloat16, fill=float("nan"))
    sequences = [bench.sequence(77, 1), bench.sequence(70, 2)]
    for sequence in sequences:
        bench.write(sequence, 0, sequence.length)
    spans = [(s.length - 1, s.length) for s in sequences]
    for sequence, span, output in zip(
        sequences, spans, bench.run(sequences, spans, mode), strict=True
    ):
        assert_close(output, sequence.expected(bench.shape, *span))


def sdpa_flops(query, key, value, *args, out_shape=None, **kwargs) -> int:
    """The counter knows the fused kernel of GPUs but not the one of CPUs."""
    return sdpa_flop_count(query, key, value)


FUSED_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def flops(bench: Bench, sequence: Sequence, prefix: int) -> int:
    bench.write(sequence, 0, prefix)
    with FlopCounterMode(display=False, custom_mapping={FUSED_KERNEL: sdpa_flops}) as counter:
        bench.run([sequence], [(prefix, sequence.length)])
    return counter.get_total_flops()


@pytest.mark.parametrize("cap", [0.0, 30.0], ids=["fused", "capped"])
def test_work_follows_the_new_tokens(cap: float) -> None:
    shape = Shape(heads=4, kv_heads=2, dim=16, value_dim=16, cap=cap)
    bench = Bench(shape, torch.float32, slots=20_000)
    full = flops(bench, bench.sequence(4016, 1), 0)
    hit = flops(bench, bench.sequence(4016, 2), 4000)
    half = flops(bench, bench.sequence(2016, 3), 2000)
    # Blocks reach one boundary further than the exact triangle: a few per cent.
    exact = 2 * shape.heads * 4016 * 4017 * shape.dim
    assert exact <= full <= 1.05 * exact
    assert hit <= 0.02 * full
    assert hit == pytest.approx(2 * half, rel=0.05)


def test_a_window_bounds_the_work() -> None:
    bench = Bench(Shape(window=128), torch.float32, slots=20_000)
    short = flops(bench, bench.sequence(1016, 1), 1000)
    long = flops(bench, bench.sequence(8016, 2), 8000)
    assert long == short > 0


@pytest.mark.parametrize("mode", [ForwardMode.EXTEND, ForwardMode.DECODE], ids=str)
def test_layers_do_no_index_work(mode: ForwardMode) -> None:
    """Everything is read when the batch begins: the row may change before the layers run."""
    bench = Bench(Shape(), torch.float32)
    sequence = bench.sequence(200, 1)
    bench.write(sequence, 0, 200)
    batch = bench.batch([sequence], [(199, 200)], mode)
    bench.backend.init_forward_metadata(batch)
    bench.rows.req_to_token.fill_(0)
    output = bench.backend.forward(
        sequence.query[199:].flatten(1), None, None, bench.layer, batch, save_kv_cache=False
    )
    expected = sequence.expected(bench.shape, 199, 200)
    assert_close(output.view(1, bench.shape.heads, -1), expected)


def test_new_keys_are_stored_only_when_asked() -> None:
    bench = Bench(Shape(), torch.float32)
    sequence = bench.sequence(20, 1)
    bench.run([sequence], [(0, 20)], save=False)
    assert not bench.pool.k_buffer[0].any()
    bench.run([sequence], [(0, 20)])
    torch.testing.assert_close(bench.pool.k_buffer[0][sequence.slots], sequence.key)
    torch.testing.assert_close(bench.pool.v_buffer[0][sequence.slots], sequence.value)


def test_lengths_come_from_the_device_where_the_host_has_none() -> None:
    bench = Bench(Shape(), torch.float32)
    sequence = bench.sequence(50, 1)
    bench.write(sequence, 0, 50)
    batch = bench.batch([sequence], [(30, 50)], ForwardMode.EXTEND)
    batch.seq_lens_cpu = batch.extend_seq_lens_cpu = None
    bench.backend.init_forward_metadata(batch)
    output = bench.backend.forward(
        sequence.query[30:].flatten(1), None, None, bench.layer, batch, save_kv_cache=False
    )
    assert_close(output.view(20, bench.shape.heads, -1), sequence.expected(bench.shape, 30, 50))


def test_an_idle_batch_needs_no_lengths() -> None:
    bench = Bench(Shape(), torch.float32)
    batch = SimpleNamespace(forward_mode=ForwardMode.IDLE)
    bench.backend.init_forward_metadata(batch)
    query = torch.zeros(0, bench.shape.heads * bench.shape.dim)
    assert bench.backend.forward(query, None, None, bench.layer, batch).shape == query.shape


@pytest.mark.parametrize("enter", [torch.no_grad, torch.inference_mode], ids=str)
def test_buffers_outlive_the_grad_mode_they_were_made_in(enter) -> None:
    bench = Bench(Shape(), torch.float32)
    sequence = bench.sequence(100, 1)
    with torch.inference_mode():
        bench.run([sequence], [(0, 100)])
    with enter():
        assert_close(bench.run([sequence], [(90, 100)])[0], sequence.expected(bench.shape, 90, 100))


@pytest.mark.parametrize(
    ("attribute", "value", "named"),
    [
        ("attn_type", AttentionType.DECODER_BIDIRECTIONAL, "bidirectional attention"),
        ("pos_encoding_mode", "ALIBI", "position encoding ALIBI"),
        ("xai_temperature_len", 1024, "temperature"),
        ("use_irope", True, "chunked local attention"),
        ("tp_k_head_num", 5, "12 query heads over 5 key heads"),
    ],
)
def test_a_layer_that_cannot_run_is_refused_by_name(attribute: str, value, named: str) -> None:
    bench = Bench(Shape(), torch.float32)
    setattr(bench.layer, attribute, value)
    with pytest.raises(UnsupportedError, match=named):
        PortableAttnBackend(bench.runner())


def test_pools_and_flags_that_cannot_run_are_refused_together() -> None:
    bench = Bench(Shape(), torch.float32)
    runner = bench.runner()
    runner.token_to_kv_pool = SimpleNamespace()
    runner.server_args = SimpleNamespace(speculative_algorithm="EAGLE", enable_torch_compile=True)
    with pytest.raises(
        UnsupportedError, match=r"KV pool SimpleNamespace, speculative decoding, torch\.compile"
    ):
        PortableAttnBackend(runner)
    runner = bench.runner()
    runner.use_mla_backend = True
    with pytest.raises(UnsupportedError, match="MLA"):
        PortableAttnBackend(runner)


def test_inputs_and_modes_that_cannot_run_are_refused_by_name() -> None:
    bench = Bench(Shape(), torch.float32)
    sequence = bench.sequence(10, 1)
    batch = bench.batch([sequence], [(0, 10)], ForwardMode.EXTEND)
    bench.backend.init_forward_metadata(batch)
    inputs = (sequence.query.flatten(1), None, None, bench.layer, batch)
    bench.backend.forward(*inputs, sinks=None)
    with pytest.raises(UnsupportedError, match="sinks of layer 0"):
        bench.backend.forward(*inputs, sinks=torch.zeros(12))
    batch.forward_mode = ForwardMode.TARGET_VERIFY
    with pytest.raises(UnsupportedError, match="TARGET_VERIFY"):
        bench.backend.init_forward_metadata(batch)
    with pytest.raises(UnsupportedError, match="--disable-cuda-graph"):
        bench.backend.init_cuda_graph_state(1, 1)


def test_sglang_finds_the_backend_by_name() -> None:
    from sglang.srt.arg_groups import choices
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    attention.register_attention_choice()
    attention.register_attention_choice()
    attention.register_attention_backend()
    assert choices.ATTENTION_BACKEND_CHOICES.count(attention.BACKEND_NAME) == 1
    backend = ATTENTION_BACKENDS[attention.BACKEND_NAME](Bench(Shape(), torch.float32).runner())
    assert isinstance(backend, PortableAttnBackend)
    assert not backend.support_triton()
