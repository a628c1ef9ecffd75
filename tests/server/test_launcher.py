"""Starting and stopping: messages instead of tracebacks, both entry points, nothing left behind."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from conftest import Server, read_to_its_end, start_server
from symphony_sglang.workload.worker_process import WorkerProcess, free_port

pytestmark = pytest.mark.server


def launch(*flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "symphony_sglang.launch_server", *flags],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--symphony-host-gb", "-3"], "--symphony-host-gb is -3; expected a number from -1"),
        (["--symphony-host-gb", "many"], "--symphony-host-gb is 'many'; expected a number"),
        (["--symphony-hots-gb", "1"], "unknown flag --symphony-hots-gb; did you mean"),
        (["--symphony-config", "absent.toml"], "No such file"),
    ],
)
def test_bad_setting_stops_the_start_in_one_line(flags: list[str], message: str) -> None:
    done = launch("--model-path", "anything", *flags)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_environment_twin_is_checked_too() -> None:
    done = launch("--model-path", "anything", SYMPHONY_HOST_GB="99999999")
    assert done.returncode == 2
    assert "SYMPHONY_HOST_GB is 1e+08; expected a number from -1 to 65,536" in done.stderr


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        ('{"model_type": "mixtral", "num_local_experts": 8}', [], "mixture of experts"),
        ('{"model_type": "deepseek_v3", "kv_lora_rank": 512}', [], "latent attention (MLA)"),
        ('{"model_type": "llama"}', ["--quantization", "fp8"], "--quantization"),
        ('{"model_type": "llama"}', ["--tokenizer-worker-num", "2"], "--tokenizer-worker-num 2"),
    ],
)
def test_what_the_cpu_path_lacks_is_named(
    tmp_path: Path, config: str, flags: list[str], message: str
) -> None:
    (tmp_path / "config.json").write_text(config)
    done = launch("--model-path", str(tmp_path), "--device", "cpu", *flags)
    assert done.returncode == 2, done.stderr[-2000:]
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_help_shows_sglangs_flags_and_ours() -> None:
    done = launch("--help")
    assert done.returncode == 0
    assert "--max-total-tokens" in done.stdout
    assert "--symphony-host-gb" in done.stdout


def test_mode_our_cache_does_not_serve_is_refused_by_name(model: Path, tmp_path: Path) -> None:
    done = launch(
        *("--model-path", str(model), "--port", str(free_port()), "--max-total-tokens", "4096"),
        *("--hicache-host-memory-mode", "buffer_only"),
        *("--hicache-storage-backend", "file", "--file-storage-path", str(tmp_path)),
    )
    assert done.returncode != 0
    assert "does not support --hicache-host-memory-mode buffer_only" in done.stdout + done.stderr


def test_lost_plugin_is_noticed(model: Path) -> None:
    """SGLang told to skip our plugin: the cache must not silently become the stock one."""
    done = launch(
        *("--model-path", str(model), "--port", str(free_port()), "--max-total-tokens", "4096"),
        SGLANG_PLUGINS="some_other_plugin",
    )
    assert done.returncode != 0
    assert "symphony" in done.stdout + done.stderr


def test_lost_hook_is_noticed() -> None:
    program = (
        "from sglang.srt.plugins.hook_registry import HookRegistry\n"
        "from symphony_sglang.engine import compat\n"
        "HookRegistry._patched.clear()\n"
        "try: compat.check_hooks_applied()\n"
        "except compat.IncompatibleSglangError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Scheduler.init_request_dispatcher" in done.stdout, done.stderr[-2000:]


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import sglang

    from symphony_sglang.engine import compat

    compat.check_seams()
    monkeypatch.setattr(sglang, "__version__", "0.5.24")
    with pytest.raises(compat.IncompatibleSglangError, match=r"sglang is 0\.5\.24"):
        compat.check_seams()


def test_sglang_serve_with_the_plugin_installed(model: Path, tmp_path: Path) -> None:
    """The stock command line reaches the same cache by its registered name."""
    port = free_port()
    command = [
        *(str(Path(sys.executable).with_name("sglang")), "serve", str(model)),
        *("--port", str(port), "--max-total-tokens", "4096", "--page-size", "16"),
        *("--radix-cache-backend", "symphony", "--enable-hierarchical-cache"),
        *("--hicache-io-backend", "direct", "--hicache-mem-layout", "page_first_direct"),
    ]
    worker = WorkerProcess([], command=command, port=port, log_path=tmp_path / "serve.log")
    worker.start()
    try:
        worker.wait_ready()
        server = Server(worker, model)
        server.greedy_one(list(range(300, 380)), 2)
        assert server.residency()["levels"]["host"]["used_tokens"] == 80
    finally:
        worker.stop()


def test_stock_sglang_with_symphony_off(model: Path, tmp_path: Path) -> None:
    server = start_server(model, tmp_path / "off.log", "--symphony-off")
    try:
        assert server.greedy_one(list(range(300, 380)), 2)["meta_info"]["completion_tokens"] == 2
        assert server.call("GET", "/symphony/residency").status == 404
    finally:
        server.worker.stop()


def ask_until_refused(server: Server) -> str:
    """Ask for the residency until nobody listens any more; ``refused`` where no answer stays out.

    An answer that the schedulers can no longer give would hold the server up for ever.
    """
    while True:
        try:
            with urllib.request.urlopen(f"{server.url}/symphony/residency", timeout=20) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            if error.code != 503:
                return repr(error)
        except TimeoutError as error:
            return repr(error)
        except (OSError, http.client.HTTPException):
            return "refused"


@pytest.mark.parametrize("ranks", [1, 2])
def test_shutdown_is_prompt_and_leaves_no_process(model: Path, tmp_path: Path, ranks: int) -> None:
    server = start_server(model, tmp_path / "stop.log", "--tp", str(ranks))
    assert server.worker.process is not None
    tree = [server.worker.process.pid]
    tree += [child.pid for child in psutil.Process(tree[0]).children(recursive=True)]
    assert len(tree) >= 2 + ranks
    with ThreadPoolExecutor() as pool:
        # Whoever watches is let go, and whoever asks in the last moment too.
        events = f"{server.url}/symphony/events?interval_s=60"
        watching = pool.submit(read_to_its_end, urllib.request.urlopen(events, timeout=60))
        asking = [pool.submit(ask_until_refused, server) for _ in range(4)]
        server.worker.stop()
        assert watching.result() == "whole"
        assert [each.result() for each in asking] == ["refused"] * 4
    # Not by the SIGKILL that stands behind SIGTERM.
    assert server.worker.process.returncode == 0
    deadline = time.monotonic() + 10  # noqa: TID251 - waits for real processes
    while any(psutil.pid_exists(pid) for pid in tree):
        assert time.monotonic() < deadline, [p for p in tree if psutil.pid_exists(p)]  # noqa: TID251
        time.sleep(0.1)
