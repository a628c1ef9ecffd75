"""Attention of one layer, ours beside SGLang's ``torch_native``, on the same pools in one run.

    python -m benchmark.attention [--rounds N] [--dtype D] [--slots S] [--threads N] [--json FILE]

Rounds alternate between the backends, and before each call the processor's caches are filled with
other data, as a model's weights do between two layers. A ratio is torch_native's time by ours, per
round; the table gives its median and quartiles. "plan" is what a batch costs once for all layers.
A second table compares copying keys out of the pool with attending to the pool in place, which only
consecutive slots allow.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmark.environment import describe_environment
from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops

define_missing_torchvision_ops()

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402
from sglang.srt.layers.radix_attention import RadixAttention  # noqa: E402
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool  # noqa: E402
from sglang.srt.model_executor.forward_batch_info import ForwardMode  # noqa: E402

from symphony_sglang.platform.attention_backend import PortableAttnBackend  # noqa: E402
from symphony_sglang.platform.attention_math import attend, fold_queries, pad_rows  # noqa: E402

HEADS, KV_HEADS, DIM = 12, 4, 64
PAGE = 16
POOL_TOKENS = 100_000
CACHE_BYTES = 96 << 20

console = Console()


@dataclass(frozen=True, slots=True)
class Case:
    """`batch` sequences with `new` tokens each after `cached` tokens; new == 0 means decode."""

    name: str
    batch: int
    cached: int
    new: int

    @property
    def decode(self) -> bool:
        return self.new == 0


CASES = (
    Case("prefill 3000", 1, 0, 3000),
    Case("extend 16 after 1000", 1, 1000, 16),
    Case("extend 16 after 3000", 1, 3000, 16),
    Case("extend 16 after 7000", 1, 7000, 16),
    Case("extend 64 after 3000", 1, 3000, 64),
    Case("extend 512 after 3000", 1, 3000, 512),
    Case("extend 4 x 16 after 1000", 4, 1000, 16),
    Case("decode 1 x 100", 1, 100, 0),
    Case("decode 1 x 3000", 1, 3000, 0),
    Case("decode 1 x 7000", 1, 7000, 0),
    Case("decode 8 x 100", 8, 100, 0),
    Case("decode 8 x 1000", 8, 1000, 0),
    Case("decode 8 x 3000", 8, 3000, 0),
    Case("decode 32 x 100", 32, 100, 0),
    Case("decode 32 x 300", 32, 300, 0),
    Case("decode 32 x 1000", 32, 1000, 0),
)


@dataclass(frozen=True, slots=True)
class Result:
    """Seconds per call of one layer, one entry per round."""

    case: Case
    ours_seconds: list[float]
    stock_seconds: list[float]
    plan_seconds: list[float]

    def ratios(self) -> list[float]:
        return [s / o for s, o in zip(self.stock_seconds, self.ours_seconds, strict=True)]


class Rig:
    """Both backends over one pool."""

    def __init__(self, dtype: torch.dtype, *, shuffled: bool) -> None:
        self.dtype, self.shuffled = dtype, shuffled
        self.pool = MHATokenToKVPool(POOL_TOKENS, PAGE, dtype, KV_HEADS, DIM, 1, "cpu", False)
        for buffer in (*self.pool.k_buffer, *self.pool.v_buffer):
            buffer.normal_()
        self.rows = ReqToTokenPool(64, 8192, "cpu", False)
        self.layer = RadixAttention(HEADS, DIM, DIM**-0.5, KV_HEADS, 0)
        runner = SimpleNamespace(
            req_to_token_pool=self.rows, token_to_kv_pool=self.pool, dtype=dtype, device="cpu",
            use_mla_backend=False, server_args=SimpleNamespace(),
            model=torch.nn.ModuleList([self.layer]),
        )  # fmt: skip
        self.ours = PortableAttnBackend(runner)
        self.stock = TorchNativeAttnBackend(runner)
        self._other_data = torch.zeros(CACHE_BYTES // 4)

    def cool(self) -> None:
        """Push the pool out of the processor's caches."""
        self._other_data.add_(1.0)

    def batch(self, case: Case) -> tuple[SimpleNamespace, torch.Tensor]:
        """A batch whose keys are in the pool already, and its queries."""
        total = case.cached + case.new
        pages = list(range(1, POOL_TOKENS // PAGE))
        if self.shuffled:
            random.Random(0).shuffle(pages)
        slots = (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).view(-1)
        stride = -(-total // PAGE) * PAGE
        for row in range(case.batch):
            self.rows.req_to_token[row, :total] = slots[row * stride : row * stride + total].int()
        lengths = torch.full((case.batch,), total)
        queries = case.batch * max(case.new, 1)
        batch = SimpleNamespace(
            forward_mode=ForwardMode.DECODE if case.decode else ForwardMode.EXTEND,
            req_pool_indices=torch.arange(case.batch), seq_lens=lengths, seq_lens_cpu=lengths,
            extend_seq_lens=torch.full((case.batch,), case.new),
            extend_seq_lens_cpu=[case.new] * case.batch,
            extend_prefix_lens=torch.full((case.batch,), case.cached),
            encoder_lens=None, encoder_lens_cpu=None, out_cache_loc=torch.arange(queries),
        )  # fmt: skip
        return batch, torch.randn(queries, HEADS * DIM).to(self.dtype)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()  # noqa: TID251 - a benchmark measures real time
    call()
    return time.perf_counter() - start  # noqa: TID251


def measure(rig: Rig, case: Case, rounds: int) -> Result:
    batch, query = rig.batch(case)
    result = Result(case, [], [], [])
    expected = actual = None
    for round_index in range(rounds + 1):
        plan_seconds = timed(lambda: rig.ours.init_forward_metadata(batch))
        seconds = {}
        for backend in (rig.ours, rig.stock):
            backend.init_forward_metadata(batch)
            rig.cool()
            answers: list[torch.Tensor] = []
            seconds[backend] = timed(
                lambda backend=backend, answers=answers: answers.append(
                    backend.forward(query, None, None, rig.layer, batch, save_kv_cache=False)
                )
            )
            actual, expected = answers[0], actual
        if round_index:  # the first round warms allocators and thread pools
            result.ours_seconds.append(seconds[rig.ours])
            result.stock_seconds.append(seconds[rig.stock])
            result.plan_seconds.append(plan_seconds)
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    return result


def measure_in_place(
    rig: Rig, new: int, cached: int, rounds: int
) -> tuple[list[float], list[float]]:
    """Seconds of copy-then-attend and of attending to consecutive slots of the pool in place."""
    key_pool, value_pool = rig.pool.get_kv_buffer(0)
    first, last = 1024, 1024 + cached
    query = pad_rows(fold_queries(torch.randn(new, HEADS, DIM).to(rig.dtype), KV_HEADS))
    slots = torch.arange(first, last)
    head_rows = (slots[None] * KV_HEADS + torch.arange(KV_HEADS)[:, None]).view(-1)

    def copied() -> None:
        if new == 1:
            key = rig.ours._keys.by_token(key_pool, slots[None])
            value = rig.ours._values.by_token(value_pool, slots[None])
        else:
            key = rig.ours._keys.by_head(key_pool, head_rows)
            value = rig.ours._values.by_head(value_pool, head_rows)
        attend(query, key, value, None, DIM**-0.5)

    def in_place() -> None:
        key, value = (pool[first:last].transpose(0, 1)[None] for pool in (key_pool, value_pool))
        attend(query, key, value, None, DIM**-0.5)

    samples: tuple[list[float], list[float]] = ([], [])
    for round_index in range(rounds + 1):
        for call, seconds in zip((copied, in_place), samples, strict=True):
            rig.cool()
            elapsed = timed(call)
            if round_index:
                seconds.append(elapsed)
    return samples


def spread(values: list[float], factor: float = 1.0) -> str:
    low, middle, high = statistics.quantiles([v * factor for v in values], n=4)
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def print_results(results: list[Result], title: str) -> None:
    table = Table(title=title)
    for column in ("case", "ours ms", "torch_native ms", "ratio", "plan ms"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for result in results:
        table.add_row(
            result.case.name,
            spread(result.ours_seconds, 1e3),
            spread(result.stock_seconds, 1e3),
            spread(result.ratios()),
            f"{statistics.median(result.plan_seconds) * 1e3:.2f}",
        )
    console.print(table)


def print_in_place(rig: Rig, rounds: int) -> None:
    table = Table(title="keys copied out of the pool, or attended to in place")
    for column in ("case", "copied ms", "in place ms", "in place / copied"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for new, cached in ((1, 1000), (1, 3000), (1, 7000), (16, 1000), (16, 3000), (16, 7000)):
        copied, in_place = measure_in_place(rig, new, cached, rounds)
        ratios = [p / c for c, p in zip(copied, in_place, strict=True)]
        table.add_row(
            f"{new} on {cached}", spread(copied, 1e3), spread(in_place, 1e3), spread(ratios)
        )
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--dtype", choices=("bfloat16", "float32", "float16"), default="bfloat16")
    parser.add_argument("--slots", choices=("shuffled", "consecutive"), default="shuffled")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    rig = Rig(getattr(torch, arguments.dtype), shuffled=arguments.slots == "shuffled")
    with torch.no_grad():
        results = [
            measure(rig, case, arguments.rounds)
            for case in track(CASES, description="attention", console=console)
        ]
        print_results(
            results, f"{arguments.dtype}, {arguments.slots} slots, {arguments.threads} threads"
        )
        print_in_place(rig, arguments.rounds)
    if arguments.json:
        report = {
            "environment": describe_environment(),
            "arguments": {k: str(v) for k, v in vars(arguments).items()},
            "results": [asdict(result) for result in results],
        }
        arguments.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
