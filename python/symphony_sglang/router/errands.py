"""One hint on its way from a caller to a worker, and its receipt on the way back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from symphony_sglang.core import hints
from symphony_sglang.core.routing_types import AdvisoryChoice
from symphony_sglang.router.registry import Worker


@dataclass(slots=True)
class Errand:
    """One hint on its way to one worker."""

    position: int
    raw: Any  # as the caller wrote it
    hint: hints.Hint
    domain_id: str
    worker: Worker
    key: str | None = None
    choice: AdvisoryChoice | None = None
    receipt: dict[str, Any] = field(default_factory=dict)


def empty_receipt(errand: Errand, reason: str) -> dict[str, Any]:
    """For a hint that no worker answered."""
    selector = getattr(errand.hint.action, "selector", None)
    return {
        "advisory_id": None,
        "action_id": errand.hint.action_id,
        "status": "unsupported" if reason == "unsupported_worker" else "rejected",
        "reason": reason,
        "session_id": None if selector is None else selector.session_id,
        "worker": errand.domain_id,
        "state": "failed",
        "tokens": {},
        "bytes": {},
        "timeline": [],
    }


def mark_peer(errand: Errand, receipt: dict[str, Any]) -> None:
    """Say how much of the session is at another worker than the one that was advised."""
    counted = receipt.setdefault("tokens", {})
    if not isinstance(counted, dict):
        return
    choice = errand.choice
    elsewhere = 0
    if choice is not None and choice.source_worker_id not in (None, errand.domain_id):
        elsewhere = choice.tokens
    counted["peer"] = elsewhere
    if elsewhere and receipt.get("status") == "missing":
        receipt["reason"] = "peer"


def detail_of(document: Any) -> str:
    """The message of a worker's error, whatever its shape."""
    if isinstance(document, dict):
        error = document.get("error")
        inner = error.get("message") if isinstance(error, dict) else error
        for value in (inner, document.get("detail"), document.get("message")):
            if isinstance(value, str):
                return value
    return "the worker refused"
