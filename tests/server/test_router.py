"""The router in front of real workers, beside sglang-router in front of the same ones.

The last test kills a worker, so it stays the last.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from test_frontend import check_hints

from conftest import Answer, Server, flush_when_idle
from symphony_sglang.lang import SymphonyEndpoint
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

pytestmark = pytest.mark.server

WORKER_FLAGS = (
    "--max-total-tokens", "8192", "--symphony-host-gb", "0.2", "--symphony-nvme-gb", "0",
    "--enable-cache-report",
)  # fmt: skip
GREEDY = {"max_new_tokens": 8, "temperature": 0, "ignore_eos": True}


@dataclass
class Fleet:
    """Two workers and both routers in front of them."""

    workers: list[Server]
    ours: Server
    stock: Server
    model: Path
    logs: Path

    def start_router(self, *flags: str) -> Server:
        urls = [worker.url for worker in self.workers]
        return start_router(self.model, self.logs, urls, *flags)


def start_router(model: Path, logs: Path, urls: list[str], *flags: str) -> Server:
    port = free_port()
    command = [
        sys.executable, "-m", "symphony_sglang.launch_router",
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", "0",
        "--worker-urls", *urls, "--health-check-interval-secs", "2", *flags,
    ]  # fmt: skip
    process = WorkerProcess((), command=command, port=port, log_path=logs / f"router-{port}.log")
    process.start()
    return Server(process, model)


def start_stock_router(model: Path, logs: Path, urls: list[str]) -> Server:
    port, metrics_port = free_port(), free_port()
    command = [
        sys.executable, "-m", "sglang_router.launch_router",
        "--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics_port),
        "--worker-urls", *urls, "--policy", "round_robin",
    ]  # fmt: skip
    process = WorkerProcess((), command=command, port=port, log_path=logs / "stock.log")
    process.start()
    return Server(process, model)


def wait_workers(router: Server, count: int, seconds_max: float = 30.0) -> float:
    """Until the router calls `count` workers healthy; seconds since the call."""
    began = time.monotonic()  # noqa: TID251 - a test of real time
    while time.monotonic() - began < seconds_max:  # noqa: TID251
        try:
            answer = router.call("GET", "/readiness")
        except urllib.error.URLError:
            time.sleep(0.05)
            continue
        if isinstance(answer.body, dict) and answer.body.get("healthy_workers") == count:
            return time.monotonic() - began  # noqa: TID251
        time.sleep(0.05)
    raise AssertionError(f"{router.url} does not see {count} workers\n{router.worker.log_tail()}")


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    logs = tmp_path_factory.mktemp("router")
    processes = [
        WorkerProcess(
            ["--model-path", str(model), "--port", str(free_port()), *WORKER_FLAGS],
            log_path=logs / f"worker-{number}.log",
        )
        for number in range(2)
    ]
    routers: list[Server] = []
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.wait_ready()
        workers = [Server(process, model) for process in processes]
        urls = [worker.url for worker in workers]
        routers.append(start_router(model, logs, urls, "--model-path", str(model)))
        routers.append(start_stock_router(model, logs, urls))
        for router in routers:
            router.worker.wait_ready()
            wait_workers(router, 2)
        yield Fleet(workers, routers[0], routers[1], model, logs)
    finally:
        for router in routers:
            router.worker.stop()
        for process in processes:
            process.stop()


def random_ids(count: int, *, seed: int) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(300, 30_000) for _ in range(count)]


def ids_of_workers(router: Server) -> dict[str, str]:
    """Worker id by URL."""
    return {entry["url"]: entry["id"] for entry in router.call("GET", "/workers").body["workers"]}


def served_by(answer: Answer) -> str:
    return {name.lower(): value for name, value in answer.headers.items()}["x-symphony-worker"]


def shape(value: Any) -> Any:
    """Keys and kinds of a JSON value; lists by their first element."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in sorted(value.items())}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__


CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 4}
# The same calls to both routers. The last says whether the whole shape is compared, or only that
# all of sglang-router's keys are there, or (None) the status alone.
SCRIPT: list[tuple[str, str, Any, bool | None]] = [
    ("POST", "/generate", {"text": "hello", "sampling_params": GREEDY}, True),
    ("POST", "/generate", {"input_ids": [5, 6, 7], "sampling_params": GREEDY}, True),
    ("POST", "/generate", {"text": "hello", "sampling_params": {"max_new_tokens": 0}}, True),
    ("POST", "/generate", {"nothing": 1}, True),
    ("POST", "/v1/chat/completions", CHAT, True),
    ("POST", "/v1/chat/completions", {**CHAT, "max_tokens": -5}, None),
    ("POST", "/v1/completions", {"model": "tiny", "prompt": "hello", "max_tokens": 4}, True),
    ("GET", "/health", None, True),
    ("GET", "/liveness", None, True),
    ("GET", "/readiness", None, True),
    ("GET", "/health_generate", None, True),
    ("GET", "/get_model_info", None, True),
    ("GET", "/get_server_info", None, False),
    ("GET", "/v1/models", None, False),
    ("GET", "/get_loads", None, True),
    ("GET", "/workers", None, False),
    ("POST", "/flush_cache", None, True),
    ("GET", "/nothing", None, False),
    ("DELETE", "/generate", None, False),
]


def includes(ours: Any, theirs: Any) -> bool:
    """Whether every key of `theirs` is in `ours`, with a value of the same kind."""
    if isinstance(theirs, dict):
        return isinstance(ours, dict) and all(
            key in ours and includes(ours[key], inner) for key, inner in theirs.items()
        )
    if isinstance(theirs, list):
        return isinstance(ours, list) and all(includes(ours[0], inner) for inner in theirs)
    return ours == theirs


@pytest.mark.parametrize(("method", "path", "body", "exact"), SCRIPT)
def test_answers_as_sglang_router_does(
    fleet: Fleet, method: str, path: str, body: Any, exact: bool | None
) -> None:
    ours = fleet.ours.call(method, path, body)
    theirs = fleet.stock.call(method, path, body)
    assert ours.status == theirs.status, (ours.body, theirs.body)
    theirs_body = theirs.body
    if isinstance(theirs_body, str) and theirs_body[:1] == "{":
        theirs_body = json.loads(theirs_body)
    if exact:
        assert shape(ours.body) == shape(theirs_body)
    elif exact is not None and theirs_body:
        known = shape(theirs_body)
        if path == "/workers":
            # It reads a few of the worker's values into metadata; which, is its own business.
            known["workers"][0]["metadata"] = {}
        assert includes(shape(ours.body), known), (ours.body, theirs_body)


def test_routes_that_only_workers_have_pass_too(fleet: Fleet) -> None:
    model = fleet.ours.call("GET", "/v1/models").body["data"][0]["id"]
    for method, path, body in [
        # sglang-router refuses SGLang's batches.
        ("POST", "/generate", {"text": ["a b", "c d"], "sampling_params": GREEDY}),
        ("GET", "/model_info", None),
        ("GET", "/server_info", None),
        ("GET", "/v1/loads", None),
        ("GET", "/list_workers", None),
        ("POST", "/v1/tokenize", {"model": "tiny", "prompt": "hello"}),
        ("POST", "/v1/messages", {**CHAT, "max_tokens": 4}),
        ("POST", "/v1/responses", {"model": model, "input": "hello", "max_output_tokens": 4}),
        ("GET", "/symphony/residency", None),
        ("GET", "/symphony/ui", None),
        ("GET", "/metrics", None),
    ]:
        assert fleet.ours.call(method, path, body).status == 200, path
    loads = fleet.ours.call("GET", "/v1/loads").body
    assert len(loads["loads"]) == 2
    residency = fleet.ours.call("GET", "/symphony/residency").body
    assert {entry["state"] for entry in residency["workers"]} == {"ready"}
    assert all("device" in json.dumps(entry) for entry in residency["workers"])


def test_worker_table_by_http(fleet: Fleet) -> None:
    router = fleet.ours
    [known, other] = [worker.url for worker in fleet.workers]
    removed = router.call("POST", f"/remove_worker?url={other}")
    assert removed.status == 200
    assert router.call("GET", "/list_workers").body == {"urls": [known]}
    added = router.call("POST", f"/add_worker?url={other}")
    assert added.status == 200, added.body
    assert wait_workers(router, 2) < 2
    worker_id = ids_of_workers(router)[other]
    assert router.call("DELETE", f"/workers/{worker_id}").status == 202
    assert router.call("GET", f"/workers/{worker_id}").status == 404
    again = router.call("POST", "/workers", {"url": other, "priority": 60})
    assert (again.status, again.body["worker_id"]) == (202, worker_id)
    wait_workers(router, 2)
    assert router.call("PUT", f"/workers/{worker_id}", {"priority": 70}).status == 202
    assert router.call("GET", f"/workers/{worker_id}").body["priority"] == 70
    assert router.call("POST", "/workers", {"url": "nonsense"}).status == 400
    assert router.call("POST", "/symphony/migrate", {"session_id": "x", "to": "y"}).status == 404


def test_openai_client_streams_calls_tools_and_meets_errors(fleet: Fleet) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{fleet.ours.url}/v1", api_key="none", max_retries=0)
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": "count to three"}]
    whole = client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0
    )
    pieces = list(
        client.chat.completions.create(
            model=model, messages=messages, max_tokens=8, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    text = "".join(p.choices[0].delta.content or "" for p in pieces if p.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-1].usage.completion_tokens == 8
    tool = {
        "type": "function",
        "function": {"name": "look", "parameters": {"type": "object", "properties": {}}},
    }
    with_tool = client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, tools=[tool]
    )
    assert with_tool.choices[0].finish_reason in ("length", "stop", "tool_calls")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=[], max_tokens=8)
    with pytest.raises(openai.NotFoundError):
        client.post("/../nothing", cast_to=object)


def test_frontend_programs_run_through_it(fleet: Fleet) -> None:
    import sglang
    from sglang.test import test_programs

    # Those whose checks a model with random weights can pass; the others judge its answers. The
    # longest, parallel_decoding, runs through the router in test_frontend_router (soak).
    programs = (
        test_programs.test_mt_bench,
        lambda: test_programs.test_select(check_answer=False),
        lambda: test_programs.test_expert_answer(check_answer=False),
        test_programs.test_stream,
    )
    ours = SymphonyEndpoint(fleet.ours.url)
    # RuntimeEndpoint's parallel_encoding asks for a route that no SGLang server has.
    arms = (
        (sglang.RuntimeEndpoint(fleet.ours.url), programs[1:2]),
        (ours, (*programs, lambda: test_programs.test_parallel_encoding(check_answer=False))),
    )
    before = sglang.global_config.default_backend
    try:
        for backend, chosen in arms:
            sglang.set_default_backend(backend)
            for program in chosen:
                program()
            flush_when_idle(backend)
        check_hints(ours)
    finally:
        sglang.set_default_backend(before)
        for backend, _chosen in arms:
            backend.shutdown()


def test_prompts_go_where_their_prefix_is(fleet: Fleet) -> None:
    """Without any session id: by pages alone, known from the workers' feeds."""
    router = fleet.ours
    router.call("POST", "/flush_cache")
    homes = {}
    for number in range(6):
        body = {"input_ids": random_ids(1200, seed=900 + number), "sampling_params": GREEDY}
        # Told where to go, so that the two workers hold different prompts.
        told = {"X-SMG-Target-Worker": fleet.workers[number % 2].url}
        homes[number] = served_by(router.call("POST", "/generate", body, headers=told))
    assert len(set(homes.values())) == 2
    time.sleep(1.0)
    for number, home in homes.items():
        ids = [*random_ids(1200, seed=900 + number), 7, 8, 9]
        again = router.call("POST", "/generate", {"input_ids": ids, "sampling_params": GREEDY})
        assert served_by(again) == home
        assert again.body["meta_info"]["cached_tokens"] >= 1184


def test_text_and_chat_hash_as_the_worker_does(fleet: Fleet) -> None:
    """The router's own tokens must be the worker's: else it would not see the pages."""
    router = fleet.ours
    router.call("POST", "/flush_cache")
    text = " ".join(f"word{n % 37} and number {n}," for n in range(120))
    chat = {**CHAT, "messages": [{"role": "system", "content": text}, *CHAT["messages"]]}
    bodies = [
        ("/generate", {"text": text, "sampling_params": GREEDY}),
        ("/v1/completions", {"model": "tiny", "prompt": text, "max_tokens": 4}),
        ("/v1/chat/completions", chat),
    ]
    for path, body in bodies:
        router.call("POST", "/flush_cache")
        router.call("POST", path, body)
        time.sleep(0.3)
        before = matched_tokens(router)
        assert router.call("POST", path, body).status == 200
        assert matched_tokens(router) - before > 500, path


def matched_tokens(router: Server) -> float:
    """Of all prompts so far, tokens that the chosen worker was known to hold."""
    text = router.call("GET", "/metrics").body
    return sum(
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("symphony:") and "matched" in line and not line.startswith("#")
        and "_created" not in line
    )  # fmt: skip


def test_a_restarted_router_knows_at_once_and_two_agree(fleet: Fleet) -> None:
    router = fleet.ours
    router.call("POST", "/flush_cache")
    prompts = [random_ids(500, seed=70 + number) for number in range(6)]
    homes = [
        served_by(router.call("POST", "/generate", {"input_ids": p, "sampling_params": GREEDY}))
        for p in prompts
    ]
    second = fleet.start_router("--model-path", str(fleet.model))
    try:
        second.worker.wait_ready()
        assert wait_workers(second, 2) < 2
        time.sleep(0.5)
        for prompt, home in zip(prompts, homes, strict=True):
            body = {"input_ids": [*prompt, 9], "sampling_params": GREEDY}
            assert served_by(second.call("POST", "/generate", body)) == home
        assert ids_of_workers(second) == ids_of_workers(router)
    finally:
        second.worker.stop()


def test_advisory_goes_to_the_sessions_worker_and_its_turn_follows(fleet: Fleet) -> None:
    router = fleet.ours
    ids = random_ids(700, seed=5)
    turn = {"input_ids": ids, "sampling_params": GREEDY, "session_id": "advised"}
    first = router.call("POST", "/generate", turn)
    home = served_by(first)
    deadline = time.monotonic() + 5  # noqa: TID251
    while router.call("GET", "/symphony/sessions/advised").status != 200:
        assert time.monotonic() < deadline  # noqa: TID251
        time.sleep(0.05)
    session = router.call("GET", "/symphony/sessions/advised").body
    assert session["worker"] == home
    assert session["moves"] == []
    answer = router.call("POST", "/symphony/advise", {"session_id": "advised", "expected_in_s": 1})
    assert answer.status == 202
    [receipt] = answer.body["receipts"]
    assert receipt["worker"] == home
    assert receipt["status"] in ("accepted", "clipped", "duplicate")
    assert receipt["tokens"]["peer"] == 0
    got = router.call("GET", f"/symphony/advisories/{receipt['advisory_id']}")
    assert (got.status, got.body["worker"]) == (200, home)
    again = router.call("POST", "/generate", {**turn, "input_ids": [*ids, 3, 4]})
    assert served_by(again) == home
    assert again.body["meta_info"]["cached_tokens"] >= 688
    assert router.call("DELETE", "/symphony/sessions/advised").status == 200
    assert router.call("GET", "/symphony/sessions/advised").status == 404
    unknown = router.call("POST", "/symphony/advise", {"session_id": "never seen"})
    assert unknown.body["receipts"][0]["status"] == "missing"
    malformed = router.call("POST", "/symphony/advise", {"session_id": "a", "expected_in_s": "x"})
    assert malformed.status == 400
    assert "expected_in_s" in malformed.body["error"]["message"]
    assert router.call("GET", "/symphony/advisories/nothing").status == 404


def test_envelope_is_split_among_the_workers(fleet: Fleet) -> None:
    router = fleet.ours
    for number in range(4):
        body = {
            "input_ids": random_ids(300, seed=300 + number),
            "sampling_params": GREEDY,
            "session_id": f"split{number}",
        }
        router.call("POST", "/generate", body)
    time.sleep(0.5)
    actions = [
        {"action_id": f"a{n}", "action_type": "prefetch", "payload": {"session_id": f"split{n}"}}
        for n in range(4)
    ]
    actions.append({"action_id": "odd", "action_type": "vllm.set_priority", "payload": {}})
    envelope = {"protocol_version": "0.1", "message_id": "m1", "actions": actions}
    answer = router.call("POST", "/symphony/advise", envelope)
    assert (answer.status, answer.body["message_id"]) == (202, "m1")
    receipts = answer.body["receipts"]
    assert [receipt["action_id"] for receipt in receipts] == ["a0", "a1", "a2", "a3", "odd"]
    assert receipts[-1]["status"] == "unsupported"
    assert all(receipt["status"] != "missing" for receipt in receipts[:4])


def test_our_router_in_front_of_a_stock_server(fleet: Fleet, model: Path, tmp_path: Path) -> None:
    stock = WorkerProcess(
        [
            "--model-path", str(model), "--port", str(free_port()), "--symphony-off",
            "--attention-backend", "torch_native", "--max-total-tokens", "4096",
        ],
        log_path=tmp_path / "stock.log",
    )  # fmt: skip
    stock.start()
    router = start_router(model, tmp_path, [], "--model-path", str(model))
    try:
        stock.wait_ready()
        router.worker.wait_ready()
        assert router.call("POST", "/workers", {"url": stock.url}).status == 202
        wait_workers(router, 1)
        body = {"text": "hello there", "sampling_params": GREEDY, "session_id": "s"}
        assert router.call("POST", "/generate", body).status == 200
        receipt = router.call("POST", "/symphony/advise", {"session_id": "s"})
        assert receipt.status == 202
        assert receipt.body["receipts"][0]["status"] == "unsupported"
        assert router.call("POST", "/v1/chat/completions", CHAT).status == 200
    finally:
        router.worker.stop()
        stock.stop()


def test_killed_worker_tears_its_stream_and_nothing_else(fleet: Fleet) -> None:
    router = fleet.ours
    by_id = {worker_id: url for url, worker_id in ids_of_workers(router).items()}
    body = {
        "text": "a long story",
        "stream": True,
        "sampling_params": {"max_new_tokens": 2000, "temperature": 0, "ignore_eos": True},
    }
    request = urllib.request.Request(
        f"{router.url}/generate", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    lines: list[bytes] = []
    # urllib ends the loop quietly where chunks break off; what came last tells.
    with urllib.request.urlopen(request, timeout=60) as answer:
        home = by_id[answer.headers["x-symphony-worker"]]
        [victim] = [w for w in fleet.workers if w.url == home]
        for line in answer:
            if line.strip():
                lines.append(line)
            if len(lines) == 5:
                assert victim.worker.process is not None
                os.killpg(victim.worker.process.pid, signal.SIGKILL)
    assert b"[DONE]" not in lines[-1]
    error = json.loads(lines[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "worker_lost"

    def ask(number: int) -> int:
        body = {"text": f"after {number}", "sampling_params": GREEDY}
        return router.call("POST", "/generate", body).status

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(8))) == {200}
    wait_workers(router, 1)
