"""The live page at ``GET /symphony/ui``: one file, no build step, nothing fetched from outside.

It holds no secret, so it is served without a key; what it reads, it reads with the key that the
person types in.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from importlib import resources

MEDIA_TYPE = "text/html; charset=utf-8"


@functools.cache
def page() -> bytes:
    """The page's bytes."""
    return resources.files(__package__).joinpath("page.html").read_bytes()


@functools.cache
def page_headers() -> dict[str, str]:
    """Headers to serve it with: only its own script and style may run, and nobody may frame it."""
    sources = {name: block_hashes(page(), name) for name in ("script", "style")}
    policy = (
        "default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'; "
        f"script-src {sources['script']}; style-src {sources['style']}"
    )
    return {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }


def block_hashes(content: bytes, tag: str) -> str:
    """The CSP sources of all inline blocks of `tag`."""
    blocks = re.findall(rb"<%b>(.*?)</%b>" % (tag.encode(), tag.encode()), content, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)
