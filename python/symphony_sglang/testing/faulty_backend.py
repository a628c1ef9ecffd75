"""An NVMe level whose reads are slow or fail, and a scheduler that stumbles, at a test's word.

A server uses it in place of ours through SGLang's own choice of storage backend:
``"module_path": "symphony_sglang.testing.faulty_backend", "class_name": "FaultyNvmeBackend"``. The
test writes the faults it wants as JSON into the file that ``SYMPHONY_TEST_FAULTS`` names; they hold
until the file is written anew. Without the variable it is our backend as shipped.
"""

from __future__ import annotations

import json
import os
import random
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from symphony_sglang.engine.cache import SymphonyCache
from symphony_sglang.engine.host_pool import TorchHostPool
from symphony_sglang.engine.nvme_backend import NvmeBackend

FAULTS_VARIABLE = "SYMPHONY_TEST_FAULTS"


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong; all zero is a sound machine."""

    read_seconds: float = 0.0  # added to every read
    fail_reads: bool = False
    hold_reads: bool = False  # reads wait until this is false again
    load_seconds: float = 0.0  # added to every copy from host to device
    step_seconds: float = 0.0  # scheduler steps of `rank` are up to this much longer, at random
    rank: int = 1

    def save(self, path: Path) -> None:
        """Make these the faults of the server that watches `path`."""
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps(asdict(self)))
        os.replace(fresh, path)


class FaultFile:
    """The faults that a file asks for, read again when it changes."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, int] | None = None
        self._faults = Faults()

    def now(self) -> Faults:
        if self._path is None:
            return self._faults
        try:
            stat = self._path.stat()
        except FileNotFoundError:
            self._stamp, self._faults = None, Faults()
            return self._faults
        stamp = (stat.st_mtime_ns, stat.st_ino)
        if stamp != self._stamp:
            self._stamp = stamp
            self._faults = Faults(**json.loads(self._path.read_text()))
        return self._faults


class FaultyNvmeBackend(NvmeBackend):
    """Our backend, with the faults of the file in front of every read into the host level."""

    def __init__(self, storage_config: Any, kwargs: Any = None, clock: Any = None) -> None:
        super().__init__(storage_config, kwargs, clock)
        path = os.environ.get(FAULTS_VARIABLE)
        self.faults = FaultFile(Path(path) if path else None)
        self.pages_read = 0
        if path:
            delay_steps(self.faults, int(storage_config.tp_rank))
            delay_loads(self.faults)

    def _read(self, names: Any, *args: Any, **kwargs: Any) -> list[bool]:
        faults = self.faults.now()
        while self.faults.now().hold_reads:
            pause(0.01)
        if faults.read_seconds:
            pause(faults.read_seconds)
        if faults.fail_reads:
            return [False] * len(names)
        self.pages_read += len(names)
        return super()._read(names, *args, **kwargs)


def pause(seconds: float) -> None:
    threading.Event().wait(seconds)


def delay_loads(faults: FaultFile) -> None:
    """Make the host level of this process slow, where the file says so."""
    original = TorchHostPool.load_to_device_per_layer

    def delayed(
        pool: TorchHostPool,
        device: Any,
        host: Any,
        slots: Any,
        layer: int,
        *rest: Any,
        **named: Any,
    ) -> None:
        if layer == 0:
            pause(faults.now().load_seconds)
        original(pool, device, host, slots, layer, *rest, **named)

    setattr(TorchHostPool, "load_to_device_per_layer", delayed)  # noqa: B010


def delay_steps(faults: FaultFile, rank: int) -> None:
    """Let the scheduler of this process stumble before its steps, where the file says so."""
    generator = random.Random(rank)
    original = SymphonyCache.check_hicache_events

    def delayed(cache: SymphonyCache) -> None:
        wanted = faults.now()
        if wanted.step_seconds and wanted.rank == rank:
            pause(generator.random() * wanted.step_seconds)
        original(cache)

    setattr(SymphonyCache, "check_hicache_events", delayed)  # noqa: B010
