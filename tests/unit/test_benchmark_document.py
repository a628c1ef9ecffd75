"""The tables of the documentation are the kept results, nothing else."""

from __future__ import annotations

import pytest

from benchmark.document import BLOCK, PAGES, PROJECT, block, filled, write_pages


def test_pages_are_up_to_date():
    assert write_pages(check=True) == [], "run: python -m benchmark document"


def test_pages_have_tables():
    names = [found[2] for page in PAGES for found in BLOCK.finditer((PROJECT / page).read_text())]
    assert "readme" in names
    assert len(names) == len(set(names)) > 5


def test_what_stands_around_a_table_is_left_alone():
    text = "before\n<!-- begin serve -->\nold\n<!-- end serve -->\nafter\n"
    new = filled(text)
    assert new.startswith("before\n<!-- begin serve -->\n`python -m benchmark.serve`")
    assert new.endswith("<!-- end serve -->\nafter\n")
    assert "old" not in new
    assert filled(new) == new


def test_a_table_without_a_result_is_an_error():
    with pytest.raises(ValueError, match="'nobody'"):
        block("nobody")
