"""A process for the crash tests: forks writers on demand, so that each starts in milliseconds.

Reads lines ``directory sync first batches``; for each it forks a writer that fills the store with
so many batches of numbered pages, then waits to be killed. It prints ``pid N``, then ``ack A B``
for every batch of numbers [A, B) that the store acknowledged, ``remove N`` before it removes a
page, and ``dead`` when the writer is gone.
"""

from __future__ import annotations

import os
import random
import sys
import threading
from pathlib import Path

from store_pages import Pool, key_of, open_store
from symphony_sglang.store import SyncPolicy, WriteOutcome

SEGMENTS = 4


def say(text: str) -> None:
    os.write(1, text.encode() + b"\n")


def write(directory: Path, sync: SyncPolicy, first: int, batches: int) -> None:
    chance = random.Random(first)
    pool = Pool(8)
    store = open_store(directory, SEGMENTS, sync=sync, deadline_seconds=30.0)
    number = first
    for _ in range(batches):
        count = chance.randint(1, 8)
        keys = [key_of(at) for at in range(number, number + count)]
        outcomes = store.write(pool.fill(keys))
        if set(outcomes) == {WriteOutcome.WRITTEN}:
            say(f"ack {number} {number + count}")
        number += count
        if chance.random() < 0.1:
            gone = chance.randrange(first, number)
            say(f"remove {gone}")
            store.remove([key_of(gone)])
        if chance.random() < 0.1:
            store.put_record("session", f"s{chance.randrange(20)}", b"x" * 100)
    threading.Event().wait()


def main() -> None:
    for line in sys.stdin:
        directory, sync, first, batches = line.split()
        pid = os.fork()
        if pid == 0:
            try:
                write(Path(directory), SyncPolicy(sync), int(first), int(batches))
            except OSError as error:  # the file system was shut down under it
                say(f"error {error}")
            finally:
                os._exit(1)
        say(f"pid {pid}")
        os.waitpid(pid, 0)
        say("dead")


if __name__ == "__main__":
    main()
