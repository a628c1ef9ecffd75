"""The live page as a file: self-contained, and bound to its own script and style."""

from __future__ import annotations

import base64
import hashlib
import re

from symphony_sglang import ui


def test_page_needs_nothing_from_outside() -> None:
    text = ui.page().decode()
    # The one address in it is the name of a namespace, which is never fetched.
    assert set(re.findall(r"https?://[\w./]+", text)) == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=\"(?!data:,)", text)
    assert len(text) < 64_000


def test_page_builds_no_markup_from_data() -> None:
    text = ui.page().decode()
    for unsafe in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert unsafe not in text


def test_policy_names_the_hashes_of_exactly_its_blocks() -> None:
    text = ui.page()
    policy = ui.page_headers()["Content-Security-Policy"]
    for tag in (b"script", b"style"):
        (block,) = re.findall(b"<" + tag + b">(.*?)</" + tag + b">", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block).digest()).decode()
        assert f"{tag.decode()}-src 'sha256-{digest}'" in policy
    assert policy.count("sha256-") == 2
    assert "unsafe" not in policy
    # Style attributes in the markup would be refused by it.
    assert b" style=" not in text
