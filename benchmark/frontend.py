"""What SymphonyEndpoint costs a program, beside RuntimeEndpoint; prints one JSON object.

    python -m benchmark.frontend [--rounds 8] [--gens 300] [--url URL]

Each round runs one program of `gens` generations on every arm; the order is turned round from one
round to the next. A sample is the wall time of one generation of one token. Without `--url`
the server is a process that answers at once with a fixed body, so that nothing of a model's noise
hides the difference. Arms:

- `runtime`: sgl.RuntimeEndpoint, the baseline;
- `symphony`: hints are taken;
- `symphony_dead`: nothing listens where hints go (a second port, refused at once);
- `symphony_hanging`: hints go to a server that accepts and never answers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import socket
import sys
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import perf_counter_ns  # a stopwatch: nothing decides by it
from typing import Any

import numpy as np

from benchmark.environment import describe_environment

BODY = {
    "text": " x",
    "meta_info": {
        "id": "0",
        "finish_reason": {"type": "length", "length": 1},
        "prompt_tokens": 8,
        "completion_tokens": 1,
        "cached_tokens": 0,
        "e2e_latency": 0.0,
    },
}
RECEIPT = {"advisory_id": "adv-0", "status": "accepted", "state": "ready"}


class InstantServer(BaseHTTPRequestHandler):
    """Answers the routes that an endpoint asks for, at once."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body: Any = BODY
        if self.path == "/get_model_info":
            body = {"model_path": "none"}
        elif self.path == "/symphony/advise":
            count = len(json.loads(content).get("actions", [0]))
            body = {"message_id": "0", "receipts": [RECEIPT] * count}
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


def serve(port: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), InstantServer)
    server.daemon_threads = True
    port.send(server.server_address[1])
    server.serve_forever()


@contextlib.contextmanager
def instant_server() -> Iterator[str]:
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=(theirs,))
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


@contextlib.contextmanager
def listener(*, hang: bool) -> Iterator[str]:
    """An address that accepts and says nothing, or one where nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        if hang:
            found.listen(128)
        yield f"http://127.0.0.1:{found.getsockname()[1]}"


def make_arms(url: str, dead: str, hanging: str) -> dict[str, Any]:
    from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint

    from symphony_sglang.client import SymphonyClient
    from symphony_sglang.lang import SymphonyEndpoint
    from symphony_sglang.lang.adviser import Adviser

    arms: dict[str, Any] = {"runtime": RuntimeEndpoint(url)}
    for name, hints_url in (("", url), ("_dead", dead), ("_hanging", hanging)):
        endpoint = SymphonyEndpoint(url)
        client = SymphonyClient(hints_url, timeout_seconds=2.0)
        endpoint.adviser = Adviser(client)
        arms[f"symphony{name}"] = endpoint
    return arms


def run_arm(backend: Any, gens: int) -> list[int]:
    """Nanoseconds of each generation of one program."""
    import sglang as sgl

    samples: list[int] = []

    @sgl.function
    def program(s: Any) -> None:
        s += "A program that asks again and again."
        s.sync()
        for index in range(gens):
            start = perf_counter_ns()
            s += sgl.gen(f"g{index}", max_tokens=1, temperature=0)
            s.sync()
            samples.append(perf_counter_ns() - start)

    state = program.run(backend=backend)
    assert state.error() is None, state.error()
    assert len(samples) == gens
    return samples


def figures(rounds: list[list[int]], baseline: list[list[int]]) -> dict[str, float]:
    """Milliseconds; `added` is the median over rounds of the difference of the rounds' medians."""
    medians = np.array([np.median(samples) for samples in rounds]) / 1e6
    base = np.array([np.median(samples) for samples in baseline]) / 1e6
    added = medians - base
    everything = np.concatenate(rounds) / 1e6
    return {
        "p50_ms": round(float(np.median(everything)), 4),
        "p99_ms": round(float(np.percentile(everything, 99)), 4),
        "added_p50_ms": round(float(np.median(added)), 4),
        "added_p50_ms_lowest_round": round(float(added.min()), 4),
        "added_p50_ms_highest_round": round(float(added.max()), 4),
        "ratio_p50": round(float(np.median(medians / base)), 4),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--gens", type=int, default=300)
    parser.add_argument("--url", help="a real worker or router instead of the instant server")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("symphony_sglang").setLevel(logging.ERROR)
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(instant_server())
        dead = stack.enter_context(listener(hang=False))
        hanging = stack.enter_context(listener(hang=True))
        arms = make_arms(url, dead, hanging)
        samples: dict[str, list[list[int]]] = {name: [] for name in arms}
        for backend in arms.values():
            run_arm(backend, 20)
        order = list(arms)
        for number in range(arguments.rounds):
            for name in order if number % 2 == 0 else reversed(order):
                samples[name].append(run_arm(arms[name], arguments.gens))
        stats = {
            name: arm.adviser.stats()._asdict() for name, arm in arms.items() if name != "runtime"
        }
        for name in stats:
            arms[name].shutdown()
    result = {
        "command": " ".join(sys.argv),
        "environment": describe_environment(),
        "rounds": arguments.rounds,
        "gens": arguments.gens,
        "arms": {name: figures(found, samples["runtime"]) for name, found in samples.items()},
        "adviser": stats,
    }
    print(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
