"""``symphony store stat|verify|compact``."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import pytest
from rich.console import Console

from store_pages import SLOT_BYTES, Pool, assert_served, key_of, open_store
from symphony_sglang.store.tool import add_parser

KEYS = [key_of(number) for number in range(40)]


def run(action: str, directory: Path) -> tuple[int, str]:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    options = parser.parse_args(["store", action, str(directory)])
    output = io.StringIO()
    status = options.run(options, Console(file=output, width=200))
    return status, output.getvalue()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    pool = Pool(40)
    with open_store(tmp_path) as store:
        store.write(pool.fill(KEYS))
    return tmp_path


def test_stat_counts_pages_and_works_beside_a_worker(directory: Path) -> None:
    status, text = run("stat", directory)
    assert status == 0
    assert "2.5 MiB" in text
    for words in ("tiny", "pages", "40", "3 of 1.062 MiB", "none", "times the payload"):
        assert words in text, words
    with open_store(directory) as store:
        store.remove(KEYS[:5])
        store.flush()
        import os

        status, text = run("stat", directory)
        assert status == 0
        assert "35" in text
        assert str(os.getpid()) in text


def test_verify_finds_and_drops_what_is_wrong(directory: Path) -> None:
    assert run("verify", directory)[0] == 0
    path = next(directory.rglob("segment-000000.data"))
    with path.open("r+b") as file:
        file.seek(3 * SLOT_BYTES + 9000)
        file.write(b"\0\1\2\3")
    status, text = run("verify", directory)
    assert status == 1
    assert "40 pages" in text
    assert "1 wrong and dropped" in text
    assert run("verify", directory)[0] == 0
    with open_store(directory) as store:
        assert len(store) == 39


def test_compact_gives_segments_back_and_keeps_every_page(directory: Path) -> None:
    with open_store(directory) as store:
        store.remove(KEYS[:10] + KEYS[16:30])
        store.flush()
        kept = [key for key in KEYS if store.contains([key])[0]]
        assert len(kept) == 16
    status, text = run("compact", directory)
    assert status == 0, text
    assert "1 segments removed" in text
    assert len(list(directory.rglob("segment-*"))) == 2
    with open_store(directory) as store:
        assert_served(store, Pool(40), kept)
        store.check()


def test_a_directory_without_a_store_and_a_store_in_use_are_told(directory, tmp_path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for action in ("stat", "verify", "compact"):
        status, text = run(action, empty)
        assert status == 1
        assert "no page store here" in text
    with open_store(directory):
        status, text = run("verify", directory)
        assert status == 1
        assert "open in process" in text
