"""Real servers for the tests of this folder; a boot takes seconds, so they are shared.

`worker` is one server with a device level small enough to overflow. `tp_worker` is the same model
over two tensor-parallel ranks. Tests must leave both idle, and may not assume an empty cache:
`flush` empties it.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from symphony_sglang.platform.torchvision_ops import define_missing_torchvision_ops
from symphony_sglang.workload.tiny_model import make_tiny_model
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

# Tests use transformers and SGLang's kits in this process too.
define_missing_torchvision_ops()

PAGE_SIZE = 16
DEVICE_TOKENS = 8192
HOST_GB = "0.4"
# SGLang's radix kit draws token ids below 32,000.
VOCAB = 32_000


@dataclass
class Answer:
    status: int
    body: Any
    headers: dict[str, str] = field(default_factory=dict)


class Server:
    """A small client of a running worker, for tests."""

    def __init__(self, worker: WorkerProcess, model: Path) -> None:
        self.worker = worker
        self.url = worker.url
        self.model = model

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        data = raw if raw is not None else (None if body is None else json.dumps(body).encode())
        request = urllib.request.Request(
            self.url + path,
            data,
            {"Content-Type": "application/json", **(headers or {})},
            method=method,
        )
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                content, status, got = answer.read(), answer.status, dict(answer.headers)
        except urllib.error.HTTPError as error:
            content, status, got = error.read(), error.code, dict(error.headers)
        try:
            return Answer(status, json.loads(content), got)
        except ValueError:
            return Answer(status, content.decode(errors="replace"), got)

    def generate(self, body: dict[str, Any]) -> Any:
        answer = self.call("POST", "/generate", body)
        assert answer.status == 200, answer
        return answer.body

    def greedy(self, prompts: list[list[int]], length: int = 16) -> list[Any]:
        """One batched greedy request; the answers in order."""
        answers = self.generate(
            {
                "input_ids": prompts,
                "sampling_params": {
                    "max_new_tokens": length,
                    "temperature": 0,
                    "ignore_eos": True,
                },
            }
        )
        return list(answers)

    def greedy_one(self, prompt: list[int], length: int = 16, **extra: Any) -> Any:
        return self.generate(
            {
                "input_ids": prompt,
                "sampling_params": {
                    "max_new_tokens": length,
                    "temperature": 0,
                    "ignore_eos": True,
                },
                **extra,
            }
        )

    def residency(self) -> dict[str, Any]:
        answer = self.call("GET", "/symphony/residency")
        assert answer.status == 200, answer
        return answer.body

    def flush(self) -> None:
        """Empty the cache; a write-through that is still under way makes it wait."""
        for _ in range(200):
            if self.call("POST", "/flush_cache").status == 200:
                return
            time.sleep(0.05)
        raise AssertionError("the server did not become idle in 10 s")


def cached(answer: dict[str, Any]) -> dict[str, int]:
    """Tokens found at each level, from the answer's ``meta_info``."""
    details = answer["meta_info"].get("cached_tokens_details") or {}
    return {level: int(details.get(level) or 0) for level in ("device", "host", "storage")}


def read_to_its_end(answer: http.client.HTTPResponse) -> str:
    """How a stream ends: ``whole``, or with which error."""
    try:
        while answer.read(1 << 16):
            pass
    except (http.client.HTTPException, OSError) as error:
        return repr(error)
    return "whole"


def start_server(model: Path, log: Path, *flags: str) -> Server:
    worker = WorkerProcess(
        [
            "--model-path",
            str(model),
            "--port",
            str(free_port()),
            "--max-total-tokens",
            str(DEVICE_TOKENS),
            "--symphony-host-gb",
            HOST_GB,
            # Speeds waver on a shared machine, and with them what the gate lets through.
            *(() if "--symphony-break-even" in flags else ("--symphony-break-even", "0")),
            # Tests of the levels above must not find pages of an earlier run on disk.
            *(() if "--symphony-nvme-dir" in flags else ("--symphony-nvme-gb", "0")),
            *flags,
        ],
        log_path=log,
    )
    worker.start()
    worker.wait_ready()
    return Server(worker, model)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "tiny"
    make_tiny_model(directory, layers=4, hidden=256, vocab=VOCAB, seed=0)
    return directory


@pytest.fixture(scope="session")
def worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = start_server(model, tmp_path_factory.mktemp("log") / "worker.log")
    yield server
    server.worker.stop()


@pytest.fixture(scope="module")
def tp_worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "tp_worker.log"
    server = start_server(model, log, "--tp", "2")
    yield server
    server.worker.stop()


API_KEY = "a-key-for-tests"


@pytest.fixture(scope="session")
def keyed_worker(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same model behind ``--api-key``; `Server.call` sends none by itself."""
    log = tmp_path_factory.mktemp("log") / "keyed_worker.log"
    server = start_server(model, log, "--api-key", API_KEY, "--symphony-host-gb", "0.1")
    yield server
    server.worker.stop()


def flush_when_idle(backend: Any) -> None:
    """A write-through under way refuses it, and so does a hint that has come in between."""
    for _ in range(300):
        with contextlib.suppress(RuntimeError):
            backend.flush_cache()
            return
        time.sleep(0.1)
    backend.flush_cache()
