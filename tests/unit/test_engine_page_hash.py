"""SGLang's page hash is ready before the first request: compiling later can end a scheduler."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from symphony_sglang.engine import cache

# What a scheduler does at its start, and then a look at what SGLang has loaded.
CHILD = """
from symphony_sglang.engine import cache
from sglang.srt.mem_cache.cpp_utils import native_hash
assert native_hash._load_native_hash_module.cache_info().currsize == 0
cache.load_page_hash()
assert native_hash._load_native_hash_module.cache_info().currsize == 1
"""


def test_it_is_loaded_at_the_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD], capture_output=True, text=True, timeout=300, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_machine_without_a_compiler_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_args: object, **_named: object) -> str:
        raise RuntimeError("Failed to load HiCache native hash extension") from OSError("no c++")

    monkeypatch.setattr(cache, "get_hash_str", refuse)
    with caplog.at_level(logging.WARNING):
        cache.load_page_hash()
    assert "no c++" in caplog.text
    assert "no page will be found on disk" in caplog.text
