"""One of two tensor-parallel ranks, for ``test_engine_ranks``: the same calls, its own stumbles.

    python rank_child.py FOLDER RANK ACTIONS

Prints one JSON line: a digest of all that was decided, and how much happened.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch

from cache_world import CacheWorld, prompt
from promotion_world import fingerprint
from symphony_sglang.core.gate import GateSnapshot, Rate

SESSIONS = 8
KINDS = ["advise"] * 6 + ["cancel", "retain", "demote", "arrive", "arrive", "come", "out"]
# A disk that recomputing beats, from some time on.
SLOW_NVME = GateSnapshot(Rate(1000.0), Rate(1e6), Rate(1e5))
FAULTY = ("symphony_sglang.testing.faulty_backend", "FaultyNvmeBackend")


class Rank:
    """A world that takes the same random walk on every rank, each at its own pace."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.rank = rank
        self.walk = random.Random(7)  # alike on all ranks
        self.pace = random.Random(rank)  # its own
        self.world = CacheWorld(
            folder / "pages",
            device_tokens=2048,
            host_tokens=4096,
            backend=FAULTY,
            rank=rank,
            ranks=2,
            meeting=folder / "meeting",
        )
        self.digest = hashlib.sha256()
        shared = prompt(0, 160)
        self.prompts = [[*shared, *prompt(1 + n, 320 + 16 * n)] for n in range(SESSIONS)]
        self.requests: list[Any] = []
        for number, ids in enumerate(self.prompts):
            self.world.store(ids, f"s{number}")

    def act(self) -> None:
        world, walk = self.world, self.walk
        number = walk.randrange(SESSIONS)
        name = f"s{number}"
        kind = walk.choice(KINDS)
        if kind == "advise":
            self.note(world.advise(session_id=name, expires_in_seconds=walk.choice([0.1, 5.0])))
        elif kind == "out":
            self.lose(walk.choice([500, 4096]))
        elif kind == "arrive":
            self.arrive(number)
        elif kind == "come":
            # Its advisory has just begun to read.
            self.lose(4096)
            self.note(world.advise(session_id=name, priority=9))
            for _ in range(2):
                self.step()
            self.arrive(number)
        else:
            self.note(world.advise(verb=kind, session_id=name))

    def lose(self, host_tokens: int) -> None:
        self.world.leave_device()
        self.world.cache.evict_host(host_tokens)

    def arrive(self, number: int) -> None:
        prompt_ids = [*self.prompts[number], self.walk.randrange(9)]
        self.requests.append(self.world.arrive(prompt_ids, f"s{number}"))

    def note(self, decided: Any) -> None:
        self.digest.update(repr(decided).encode())

    def step(self) -> None:
        world = self.world
        if self.rank == 1 and self.pace.random() < 0.3:
            time.sleep(self.pace.random() * 0.01)
        world.step()
        for request in list(self.requests):
            if world.cache.check_prefetch_progress(request.cache_request_handle):
                self.note((request.rid, world.found(list(request.origin_input_ids))))
                self.requests.remove(request)
                world.scheduler.waiting_queue.remove(request)
                world.cache.release_aborted_request(request.cache_request_handle)
        self.note(fingerprint(world.driver.promoter))

    def agree_on_speeds(self) -> None:
        """What the tick does: rank 0's figures, on all ranks in the same step."""
        rates = self.world.driver.rates
        speeds = [rates.to_send() if self.rank == 0 else None]
        torch.distributed.broadcast_object_list(speeds, src=0)
        self.world.driver.tick(self.world.now, speeds[0])
        self.note(rates.agreed)

    def finish(self) -> dict[str, Any]:
        while self.requests:
            self.step()
        self.world.settle()
        counters = self.world.driver.counters()
        return {
            "digest": self.digest.hexdigest(),
            "moved": counters["moved_tokens"],
            "joined": counters["joined"],
            "gate": counters["gate"],
            "statuses": counters["statuses"],
        }


def main() -> None:
    folder, number, actions = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    rank = Rank(folder, number)
    for count in range(actions):
        rank.act()
        for _ in range(rank.walk.randrange(3)):
            rank.step()
        if count % 50 == 49:
            rank.agree_on_speeds()
        if count == actions * 9 // 10:
            rank.world.driver.rates.calibrate(SLOW_NVME)
    print(json.dumps(rank.finish()), flush=True)
    torch.distributed.barrier()
    rank.world.close()


if __name__ == "__main__":
    main()
