"""What advisories cost the scheduler thread of a real server; prints one JSON object.

    python -m benchmark.advise_cost [--tokens 3000] [--sessions 24] [--seconds 20] [--rounds 3]

Each round is two fresh servers with a small model. Sessions of `--tokens` tokens are seated, twice
as many as the device level holds. Then `turns`: four callers, each of which hints at a session,
waits for a moment and sends its turn. Then, at the other server, `storm`: two callers send turns,
while hints for any session come as fast as they are answered, with 10 ms between them, and a third
are withdrawn. The driver measures itself (``engine.cost``): a hint or question, an arriving
request, and the step, with its share of the loop while advisories live. The loop of the same
server is the baseline: the share says what part of it is ours.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import random
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import httpx

from benchmark.environment import describe_environment
from benchmark.servers import Levels, server
from symphony_sglang.clock import SystemClock
from symphony_sglang.workload.tiny_model import make_tiny_model

VOCAB = 8000
LAYERS, HIDDEN = 4, 256
TURN_CALLERS, STORM_CALLERS = 4, 2
LEAD_SECONDS = (0.2, 1.0)  # of a hint before its turn, drawn evenly
GOALS = {"message_p99_microseconds": 200.0, "step_share": 0.01}
clock = SystemClock()


class Load:
    """Turns and hints against one server."""

    def __init__(self, client: httpx.Client, sessions: int, tokens: int, seed: int) -> None:
        self._client = client
        generator = random.Random(seed)
        shared = [generator.randrange(300, VOCAB) for _ in range(min(tokens, 1024))]
        self._prompts = {
            f"s{number}": [
                *shared,
                *(generator.randrange(300, VOCAB) for _ in range(tokens - len(shared))),
            ]
            for number in range(sessions)
        }
        self.turns = 0
        self.hints = 0

    def turn(self, session_id: str, length: int) -> None:
        body = {
            "input_ids": [*self._prompts[session_id], 301, 302],
            "session_id": session_id,
            "sampling_params": {"max_new_tokens": length, "temperature": 0, "ignore_eos": True},
        }
        self._client.post("/generate", json=body).raise_for_status()
        self.turns += 1

    def seat(self) -> None:
        for session_id in self._prompts:
            self.turn(session_id, 1)

    def talk(self, seed: int, done: threading.Event) -> None:
        generator, names = random.Random(seed), list(self._prompts)
        while not done.is_set():
            self.turn(generator.choice(names), 24)

    def announce(self, seed: int, done: threading.Event) -> None:
        """Turns, each with its hint."""
        generator, names = random.Random(seed), list(self._prompts)
        while not done.is_set():
            session_id = generator.choice(names)
            body = {"session_id": session_id, "expires_in_s": 10}
            self._client.post("/symphony/advise", json=body).raise_for_status()
            self.hints += 1
            done.wait(generator.uniform(*LEAD_SECONDS))
            self.turn(session_id, 24)

    def storm(self, seed: int, done: threading.Event) -> None:
        generator, names = random.Random(seed), list(self._prompts)
        while not done.wait(0.01):
            session_id = generator.choice(names)
            body = {"session_id": session_id, "expires_in_s": generator.choice([1, 10, 60])}
            answer = self._client.post("/symphony/advise", json=body)
            answer.raise_for_status()
            self.hints += 1
            if generator.random() < 1 / 3:
                advisory_id = answer.json()["receipts"][0]["advisory_id"]
                self._client.delete(f"/symphony/advisories/{advisory_id}")


def run_round(
    model: Path, directory: Path, options: argparse.Namespace, kind: str, seed: int
) -> Any:
    levels = Levels(
        device_tokens=options.sessions * options.tokens // 2 // 16 * 16, host_gb=1.0, nvme_gb=2.0
    )
    worker = server("symphony", model, levels, directory, flags=("--symphony-advise-rate", "1e6"))
    worker.start()
    try:
        worker.wait_ready()
        with httpx.Client(base_url=worker.url, timeout=300.0) as client:
            load = Load(client, options.sessions, options.tokens, seed)
            load.seat()
            done = threading.Event()
            work = {
                "turns": [load.announce] * TURN_CALLERS,
                "storm": [load.talk] * STORM_CALLERS + [load.storm],
            }[kind]
            with concurrent.futures.ThreadPoolExecutor(len(work)) as pool:
                futures = [pool.submit(one, seed + n, done) for n, one in enumerate(work)]
                done.wait(options.seconds)
                done.set()
                for future in futures:
                    future.result()
            counters = client.get("/symphony/residency").json()["counters"]["advisories"]
    finally:
        worker.stop()
    return {
        "turns": load.turns,
        "hints": load.hints,
        "outcomes": counters["outcomes"],
        "moved_tokens": counters["moved_tokens"],
        "cost": counters["cost"],
    }


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest of the rounds, beside the goals."""
    figures: dict[str, list[float]] = {"step_share": []}
    for one in rounds:
        figures["step_share"].append(one["cost"]["step_share"])
        for work in ("message", "request", "step"):
            for share in ("p50", "p99"):
                figures.setdefault(f"{work}_{share}_microseconds", []).append(
                    one["cost"][work][f"{share}_seconds"] * 1e6
                )
    return {
        name: {
            "median": round(statistics.median(values), 5),
            "min": round(min(values), 5),
            "max": round(max(values), 5),
            **({"goal": GOALS[name]} if name in GOALS else {}),
        }
        for name, values in figures.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--tokens", type=int, default=3000, help="tokens of each session")
    parser.add_argument("--sessions", type=int, default=24)
    parser.add_argument("--seconds", type=float, default=20.0, help="of load, a round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rounds: dict[str, list[Any]] = {"turns": [], "storm": []}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        make_tiny_model(model, layers=LAYERS, hidden=HIDDEN, vocab=VOCAB, seed=0)
        for number in range(options.rounds):
            for kind, found in rounds.items():
                directory = Path(folder) / f"{kind}{number}"
                directory.mkdir()
                found.append(run_round(model, directory, options, kind, number))
    report = {
        "benchmark": "advise_cost",
        "settings": vars(options),
        "environment": describe_environment(),
        "summary": {kind: summary(found) for kind, found in rounds.items()},
        "rounds": rounds,
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
