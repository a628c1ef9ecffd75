"""A short calibration at the start: how fast are prefill, the disk and the host level here?

It runs as one of SGLang's own warm-ups (``--warmups symphony``), before the server takes requests,
and once a model and machine: the figures are kept under the user's cache directory. Whatever goes
wrong here costs the server nothing but an unmeasured gate, which uses every level.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.core.gate import GateSnapshot, Rate, fit_rate
from symphony_sglang.engine.messages import CalibrationRequest, ControlReply
from symphony_sglang.engine.nvme_backend import NvmeBackend
from symphony_sglang.engine.rates import rates_from_json, rates_json
from symphony_sglang.engine.schedulers import ask_schedulers

# Prompts of the prefill measurement: one to wake the model up, a short and a long one.
SHORT_TOKENS, LONG_TOKENS = 256, 1024
# The long one is left out where the short one took longer: the start must not.
SHORT_SECONDS_MAX = 1.5
TRANSFER_PAGES = (8, 64)
TRANSFER_ROUNDS = 3
TRANSFER_BYTES_MAX = 64 << 20
FLUSH_ATTEMPTS, FLUSH_SECONDS = 100, 0.02
# Figures older than this are measured again: disks fill up, machines change.
KEEP_SECONDS = 7 * 86400.0
ENTRIES_MAX = 64

logger = logging.getLogger(__name__)
clock = SystemClock()


# In the HTTP process --------------------------------------------------------------------------


async def warm_up(_disaggregation_mode: str, manager: Any) -> None:
    """SGLang's warm-up: take known speeds from the file, or measure them, and tell the ranks."""
    file = RateFile(default_path())
    try:
        key = machine_key(manager)
        known = file.load(key)
        if known is None:
            known = await measure(manager)
            file.save(key, known)
        await ask_schedulers(manager, CalibrationRequest(speeds=known))
        logger.info("break-even gate: %s", speeds_text(rates_from_json(known)))
    except Exception:
        logger.exception("calibration failed; every level is used until it has been measured")


async def measure(manager: Any) -> dict[str, float | None]:
    """Run prompts of two lengths, let the ranks time their transfers, and forget the prompts."""
    generates = bool(manager.model_config.is_generation)
    for tokens in (SHORT_TOKENS, SHORT_TOKENS, LONG_TOKENS) if generates else ():
        started = clock.monotonic()
        await prefill(manager, tokens)
        if clock.monotonic() - started > SHORT_SECONDS_MAX:
            break
    speeds: dict[str, float | None] = {}
    for _ in range(FLUSH_ATTEMPTS):
        replies = await ask_schedulers(manager, CalibrationRequest())
        measured = [reply.body["speeds"] for reply in replies]
        speeds = next((s for s in measured if s["prefill_tokens_per_second"]), measured[0])
        # Loads are timed alone: while the prompts' own backup is under way, there is no figure.
        if speeds["host_to_device_tokens_per_second"]:
            break
        await asyncio.sleep(FLUSH_SECONDS)
    for _ in range(FLUSH_ATTEMPTS):
        if (await manager.flush_cache()).success:
            break
        await asyncio.sleep(FLUSH_SECONDS)
    return dict(speeds)


async def prefill(manager: Any, tokens: int) -> None:
    """One request with a prompt that nobody else has."""
    from sglang.srt.managers.io_struct import GenerateReqInput

    size = int(manager.model_config.vocab_size)
    tokens = max(1, min(tokens, int(manager.model_config.context_len) - 8))
    request = GenerateReqInput(
        # An odd stride visits every id; the length makes the second prompt miss the first.
        input_ids=[(tokens + 7919 * at) % size for at in range(tokens)],
        sampling_params={"max_new_tokens": 1, "temperature": 0},
        cache_salt=f"symphony calibration {clock.unix()}",
    )
    async for _ in manager.generate_request(request, None):
        pass


def machine_key(manager: Any) -> str:
    """A name for this model, its settings and this machine; other ones are measured apart."""
    model, arguments = manager.model_config, manager.server_args
    parts = (
        os.path.abspath(str(model.model_path)),
        str(model.dtype),
        str(arguments.page_size),
        str(arguments.hicache_storage_backend_extra_config),
        str(arguments.tp_size),
        platform.node(),
        platform.machine(),
        str(len(os.sched_getaffinity(0))),
        os.environ.get("CUDA_VISIBLE_DEVICES", ""),
    )
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=16).hexdigest()


def default_path() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "symphony_sglang" / "rates.json"


class RateFile:
    """Measured speeds of models and machines, bounded: beyond that the oldest entry goes."""

    def __init__(self, path: Path, clock: Clock | None = None) -> None:
        self._path = path
        self._clock = clock or SystemClock()

    def _read(self) -> dict[str, Any]:
        try:
            body = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        entries = body.items() if isinstance(body, dict) else ()
        return {
            key: entry
            for key, entry in entries
            if isinstance(entry, dict)
            and isinstance(entry.get("measured_unix"), int | float)
            and isinstance(entry.get("speeds"), dict)
        }

    def load(self, key: str) -> dict[str, Any] | None:
        entry = self._read().get(key)
        if entry is None or not 0 <= self._clock.unix() - entry["measured_unix"] < KEEP_SECONDS:
            return None
        return dict(entry["speeds"])

    def save(self, key: str, speeds: dict[str, float | None]) -> None:
        """Keep an entry; a reader sees the old file or the new one. A full disk costs nothing."""
        entries = self._read()
        entries[key] = {"measured_unix": self._clock.unix(), "speeds": speeds}
        newest = sorted(entries, key=lambda name: entries[name]["measured_unix"])[-ENTRIES_MAX:]
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(
                "w", dir=self._path.parent, delete=False, encoding="utf-8"
            ) as fresh:
                json.dump({name: entries[name] for name in newest}, fresh)
            os.replace(fresh.name, self._path)
        except OSError as error:
            logger.warning("measured speeds are not kept: %s", error)


def speeds_text(speeds: GateSnapshot) -> str:
    def text(rate: Rate | None) -> str:
        return "unmeasured" if rate is None else f"{rate.tokens_per_second:,.0f} tokens/s"

    return (
        f"prefill {text(speeds.prefill)}, host to device {text(speeds.host_to_device)}, "
        f"disk to host {text(speeds.nvme_to_host)}"
    )


# In each scheduler ----------------------------------------------------------------------------


def calibrate_rank(cache: Any, question: CalibrationRequest) -> ControlReply:
    """Take the given speeds over, or measure this rank's own and answer with them."""
    driver = cache.advisories
    if driver is None:
        return ControlReply(body={"speeds": rates_json(GateSnapshot())})
    if question.speeds is not None:
        driver.rates.calibrate(rates_from_json(question.speeds))
        return ControlReply(body={"speeds": question.speeds})
    # The first batch woke the model up and says nothing about its speed.
    batches = [*driver.rates.batches][1:] or [*driver.rates.batches]
    speeds = GateSnapshot(
        nvme_to_host=fit_rate(time_reads(cache)),
        host_to_device=fit_rate(time_loads(cache)),
        prefill=fit_rate(batches),
    )
    return ControlReply(body={"speeds": rates_json(speeds)})


def transfer_sizes(cache: Any) -> list[int]:
    """Pages of the transfers to time: short and long, within a bound of bytes."""
    page_bytes = int(host_pool_of(cache).size_per_token) * int(cache.page_size)
    most = max(1, TRANSFER_BYTES_MAX // page_bytes)
    return sorted({min(pages, most) for pages in TRANSFER_PAGES})


def host_pool_of(cache: Any) -> Any:
    pool = cache.cache_controller.mem_pool_host
    anchor = getattr(pool, "anchor_entry", None)
    return pool if anchor is None else anchor.host_pool


def time_loads(cache: Any) -> list[tuple[int, float]]:
    """(tokens, seconds) of copies between slots that nobody uses, the best of some rounds each."""
    controller = cache.cache_controller
    if controller.has_inflight_device_transfers():
        return []
    samples = []
    for pages in transfer_sizes(cache):
        tokens = pages * cache.page_size
        host = controller.mem_pool_host.alloc(tokens)
        device = None if host is None else cache.token_to_kv_pool_allocator.alloc(tokens)
        if host is not None and device is not None:
            seconds = min(time_load(controller, host, device) for _ in range(TRANSFER_ROUNDS))
            samples.append((tokens, seconds))
        if device is not None:
            cache.token_to_kv_pool_allocator.free(device)
        if host is not None:
            controller.mem_pool_host.free(host)
    return samples


def time_load(controller: Any, host: Any, device: Any) -> float:
    """One copy, layer by layer as ``start_loading`` does it, from its start to its end."""
    host, device = controller.move_indices(host, device)
    started = clock.monotonic()
    completion = controller.l2_transfer_engine.submit_host_to_device(
        controller._l2_load_transfers(host, device),
        on_layer_done=lambda _layer: None,
        transfer_layer_id_max=controller.transfer_layer_id_max,
    )
    completion.finish_event.synchronize()
    return clock.monotonic() - started


def time_reads(cache: Any) -> list[tuple[int, float]]:
    """(tokens, seconds) of reads of pages that were written for this and are removed again."""
    controller = cache.cache_controller
    backend = getattr(controller, "storage_backend", None)
    backend = getattr(backend, "_backend", backend)
    if not isinstance(backend, NvmeBackend) or not backend.writable:
        return []
    samples = []
    for pages in transfer_sizes(cache):
        tokens = pages * cache.page_size
        host = controller.mem_pool_host.alloc(tokens)
        if host is None:
            continue
        names = [hashlib.sha256(b"symphony calibration %d" % at).digest() for at in range(pages)]
        keys = [name.hex() for name in names]
        if all(backend.batch_set_v1(keys, host)):
            rounds = []
            for _ in range(TRANSFER_ROUNDS):
                started = clock.monotonic()
                hits = backend.batch_get_v1(keys, host)
                if all(hits):
                    rounds.append(clock.monotonic() - started)
            if rounds:
                samples.append((tokens, min(rounds)))
        backend.store.remove(names)
        controller.mem_pool_host.free(host)
    return samples
