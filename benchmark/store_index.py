"""What the index costs at a million pages: memory, opening, and a lookup of 128 keys.

    python -m benchmark.store_index DIR [--pages N]

Prints one JSON object. A process of its own, so that resident memory means the index.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import statistics
import time
from pathlib import Path

import numpy as np

from symphony_sglang.store import Namespace, PageStore, StoreSettings
from symphony_sglang.store.database import Database, Transaction
from symphony_sglang.store.settings import SyncPolicy
from symphony_sglang.store.slots import LEAF_ENTRY, LEAF_SLOTS

SEGMENTS = 16
LOOKUPS = 2000


def key_of(number: int) -> bytes:
    return hashlib.sha256(number.to_bytes(8, "little")).digest()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def settings_of(pages: int) -> tuple[Namespace, StoreSettings]:
    slot = 8192
    # A little more than the pages take: a full store would evict ahead of the next write.
    segment = -(-pages * 9 // 8 // SEGMENTS // LEAF_SLOTS) * LEAF_SLOTS * slot
    namespace = Namespace("index", "", "bfloat16", "page_first_direct", 16, 4096)
    options = StoreSettings(
        capacity_bytes=segment * SEGMENTS, segment_bytes=segment, free_floor_share=0.0
    )
    return namespace, options


def prepare(directory: Path, pages: int) -> None:
    """Write an index of `pages` entries, as the store itself would have."""
    namespace, options = settings_of(pages)
    PageStore(directory, namespace, options).close()
    folder = directory / namespace.folder
    for segment in range(SEGMENTS):
        (folder / f"segment-{segment:06d}.data").touch()
    database = Database(folder, SyncPolicy.OFF)
    for start in range(0, pages, LEAF_SLOTS * 1024):
        leaves = []
        for first in range(start, min(start + LEAF_SLOTS * 1024, pages), LEAF_SLOTS):
            entries = np.zeros(LEAF_SLOTS, LEAF_ENTRY)
            count = min(LEAF_SLOTS, pages - first)
            keys = b"".join(key_of(first + at) for at in range(count))
            entries["key"][:count] = np.frombuffer(keys, "V32")
            entries["length"][:count] = 4096
            entries["cost"][:count] = 1.0
            entries["used"][:count] = 1
            leaves.append((first // LEAF_SLOTS, entries))
        database.commit(Transaction(leaves, [], {}, "", 0, 0, 1))
    database.close()


def measure(directory: Path, pages: int) -> dict[str, float]:
    namespace, options = settings_of(pages)
    rng = np.random.default_rng(0)
    chains = [[key_of(int(n)) for n in rng.integers(0, pages, 128)] for _ in range(LOOKUPS // 20)]
    gc.collect()
    before, started = resident_bytes(), time.perf_counter()  # noqa: TID251
    store = PageStore(directory, namespace, options)
    opened = time.perf_counter() - started  # noqa: TID251
    time.sleep(1.0)
    gc.collect()
    resident = resident_bytes() - before
    times = []
    for at in range(LOOKUPS):
        keys = chains[at % len(chains)]
        started = time.perf_counter()  # noqa: TID251
        found = store.prefix_length(keys)
        times.append(time.perf_counter() - started)  # noqa: TID251
        assert found == 128, found
    result = {
        "pages": len(store),
        "open_seconds": opened,
        "resident_bytes_per_page": resident / pages,
        "exists_128_microseconds_p50": statistics.median(times) * 1e6,
        "exists_128_microseconds_p99": sorted(times)[int(len(times) * 0.99)] * 1e6,
    }
    store.close()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--pages", type=int, default=1_000_000)
    parser.add_argument("--prepare", action="store_true")
    options = parser.parse_args()
    if options.prepare:
        prepare(options.directory, options.pages)
    else:
        print(json.dumps(measure(options.directory, options.pages)))


if __name__ == "__main__":
    main()
