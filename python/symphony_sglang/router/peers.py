"""Where workers serve their pages to each other."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit


def peer_address(described: Any, url: str) -> str:
    """Where the page server of a rank is, from its residency's ``peer``; "" where it has none.

    A server bound to all addresses is reached where its worker is.
    """
    if not isinstance(described, dict):
        return ""
    address = described.get("address")
    if isinstance(address, str) and address:
        return address
    port, host = described.get("port"), urlsplit(url).hostname
    if not isinstance(port, int) or not host:
        return ""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
