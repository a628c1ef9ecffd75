"""TTFT of a hit on disk, through real servers: our page store beside SGLang's file backend.

    python -m benchmark.store_serve [--dir DIR] [--rounds N] [--prompt-tokens N] [--output DIR]

Two servers of one model, one cache and one set of flags, which differ in the storage backend only,
stand side by side; one is idle while the other is measured. Each round sends each of them a fresh
prompt (recompute), waits until its pages are on disk, empties the levels above, and sends it again.
Reads are cold: ours bypass the page cache, the file backend's files are dropped from it; a further
arm reads those files again from the page cache. Servers and arms take turns in every round.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmark.environment import describe_environment
from benchmark.serve import PROMPT_TOKENS, VOCAB, Sample, prompt, send, spread
from benchmark.store_arms import drop_cache
from symphony_sglang.workload.tiny_model import make_tiny_model
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

PAGE_TOKENS = 16
SETTLE_SECONDS_MAX = 60.0
# Between the last write and the hit, as between two turns: what was written is synced by then.
IDLE_SECONDS = 1.5
RECOMPUTE, STORE, FILES, FILES_WARM = (
    "recompute",
    "page store",
    "file backend, cold",
    "file backend, page cache",
)

console = Console()


class Server:
    """A worker with one storage backend, and how to see what is on its disk."""

    def __init__(self, model: Path, folder: Path, device_tokens: int, *, files: bool) -> None:
        self.name = "files" if files else "store"
        self._folder = folder / self.name
        self._folder.mkdir()
        backend = ["--symphony-nvme-dir", str(self._folder), "--symphony-nvme-gb", "4"]
        environment = {}
        if files:
            extra = json.dumps({"prefetch_threshold": PAGE_TOKENS})
            backend = ["--hicache-storage-backend", "file"]
            backend += ["--hicache-storage-backend-extra-config", extra]
            environment["SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"] = str(self._folder)
        self._worker = WorkerProcess(
            [
                *("--model-path", str(model), "--port", str(free_port())),
                *("--page-size", str(PAGE_TOKENS), "--max-total-tokens", str(device_tokens)),
                *("--chunked-prefill-size", "8192", "--symphony-host-gb", "1"),
                # A hit counts only when its pages are there: neither backend may cut it short.
                *("--hicache-storage-prefetch-policy", "wait_complete"),
                *backend,
            ],
            environment=environment,
        )
        self.url = self._worker.url

    def start(self) -> None:
        self._worker.start()
        self._worker.wait_ready()

    def stop(self) -> None:
        self._worker.stop()

    def stored_tokens(self) -> int:
        if self.name == "files":
            return PAGE_TOKENS * sum(1 for _ in self._folder.rglob("*.bin"))
        with urllib.request.urlopen(f"{self.url}/symphony/residency", timeout=60) as answer:
            return int(json.load(answer)["levels"]["nvme"]["used_tokens"])

    def empty_faster_levels(self) -> None:
        """Flush device and host level; refused while a backup is under way."""
        for _ in range(600):
            request = urllib.request.Request(f"{self.url}/flush_cache", b"", method="POST")
            try:
                with urllib.request.urlopen(request, timeout=60):
                    return
            except urllib.error.HTTPError:
                time.sleep(0.1)
        raise RuntimeError(f"{self.name}: the server did not become idle")

    def wait_stored(self, tokens: int) -> None:
        for _ in range(int(SETTLE_SECONDS_MAX / 0.05)):
            if self.stored_tokens() >= tokens:
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.name}: {self.stored_tokens()} tokens on disk, not {tokens}")

    def drop_files_from_page_cache(self) -> None:
        for path in self._folder.rglob("*.bin"):
            drop_cache(path)


def measure_round(server: Server, ids: list[int]) -> list[Sample]:
    """A fresh prompt computed, then found on disk."""
    whole_pages = (len(ids) - 1) // PAGE_TOKENS * PAGE_TOKENS
    before = server.stored_tokens()
    samples = [send(server.url, ids, RECOMPUTE)]
    server.wait_stored(before + whole_pages)
    arms = (FILES, FILES_WARM) if server.name == "files" else (STORE,)
    for arm in arms:
        server.empty_faster_levels()
        time.sleep(IDLE_SECONDS)
        if arm == FILES:
            server.drop_files_from_page_cache()
        samples.append(send(server.url, ids, arm))
    server.empty_faster_levels()
    return samples


def expected(sample: Sample) -> bool:
    """Whether the prefix came from where the arm says."""
    if sample.arm == RECOMPUTE:
        return sum(sample.cached.values()) == 0
    return sample.cached["storage"] >= sample.prompt_tokens - 2 * PAGE_TOKENS


def summarize(rounds: list[list[Sample]]) -> dict[str, Any]:
    """Medians and quartiles by arm; ratios within a round, as every arm of it met the same disk."""
    # Both servers compute each prompt; the first sample of an arm stands for the round.
    good = [{s.arm: s.ttft_seconds for s in reversed(samples) if expected(s)} for samples in rounds]
    arms = {}
    for arm in (RECOMPUTE, STORE, FILES, FILES_WARM):
        values = [one[arm] for one in good if arm in one]
        arms[arm] = {**(spread(values) if values else {}), "discarded": len(rounds) - len(values)}
    ratios = {}
    for arm in (FILES, FILES_WARM, RECOMPUTE):
        values = [one[arm] / one[STORE] for one in good if arm in one and STORE in one]
        if values:
            ratios[f"{arm} / {STORE}"] = {
                **spread(values),
                "lowest": min(values),
                "highest": max(values),
            }
    tokens = {sample.first_token for samples in rounds[:1] for sample in samples}
    return {"arms": arms, "ratios": ratios, "first_round_tokens": sorted(tokens)}


def run(directory: Path | None, rounds: int, prompt_tokens: int) -> dict[str, Any]:
    generator = random.Random(20261121)
    results: list[list[Sample]] = []
    with tempfile.TemporaryDirectory(prefix="store-serve-", dir=directory) as folder:
        model = Path(folder) / "model"
        make_tiny_model(model, layers=12, hidden=768, vocab=VOCAB, seed=0)
        device_tokens = 3 * prompt_tokens
        servers = [
            Server(model, Path(folder), device_tokens, files=False),
            Server(model, Path(folder), device_tokens, files=True),
        ]
        started: list[Server] = []
        try:
            for server in servers:
                started.append(server)
                server.start()
                measure_round(server, prompt(generator, prompt_tokens))  # warms up, not counted
            with Progress(console=console, transient=True) as progress:
                for number in progress.track(range(rounds), description="rounds"):
                    ids = prompt(generator, prompt_tokens)
                    order = servers if number % 2 == 0 else servers[::-1]
                    results.append([s for server in order for s in measure_round(server, ids)])
        finally:
            for server in started:
                server.stop()
    return {
        "environment": describe_environment(),
        "prompt_tokens": prompt_tokens,
        "page_tokens": PAGE_TOKENS,
        **summarize(results),
        "samples": [[asdict(sample) for sample in samples] for samples in results],
    }


def print_summary(summary: dict[str, Any]) -> None:
    table = Table(title=f"TTFT of {summary['prompt_tokens']} tokens, milliseconds")
    for column in ("found", "median", "p25", "p75", "samples", "discarded"):
        table.add_column(column, justify="left" if column == "found" else "right")
    for arm, figures in summary["arms"].items():
        cells = [f"{figures[key] * 1e3:.1f}" if key in figures else "-" for key in spread([0.0])]
        table.add_row(arm, *cells[:3], str(figures.get("samples", 0)), str(figures["discarded"]))
    console.print(table)
    for name, ratio in summary["ratios"].items():
        console.print(
            f"{name}: {ratio['median']:.2f} ({ratio['lowest']:.2f}-{ratio['highest']:.2f})"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, help="on the disk to measure; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--output", type=Path, default=Path("benchmark/results/local"))
    options = parser.parse_args()
    summary = run(options.dir, options.rounds, options.prompt_tokens)
    print_summary(summary)
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "store_serve.json"
    path.write_text(json.dumps(summary, indent=1) + "\n")
    console.print(f"written to {path}")


if __name__ == "__main__":
    main()
