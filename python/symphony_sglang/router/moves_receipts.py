"""Receipts of advisories that are carried out by moving the session."""

from __future__ import annotations

from typing import Any

# The worker that a session moves to goes on with an advisory of this name (engine/peer.py).
ADVISORY_PREFIX = "adv-"


def advisory_id_of(record: dict[str, Any]) -> str:
    return f"{ADVISORY_PREFIX}{record['move_id']}"


def move_id_of(advisory_id: str) -> str | None:
    """The move that an advisory stands for; None where it is no such advisory."""
    move_id = advisory_id.removeprefix(ADVISORY_PREFIX)
    return move_id if move_id != advisory_id and move_id.startswith("move-") else None


def move_receipt(record: dict[str, Any], action_id: str | None = None) -> dict[str, Any]:
    """The advisory's receipt as long as its session moves; the target's own comes after."""
    given_up = record["state"] == "aborted"
    tokens = record["tokens"]
    return {
        "advisory_id": advisory_id_of(record),
        "action_id": action_id,
        "status": "accepted",
        "reason": record["reason"] if given_up else "moving",
        "session_id": record["session_id"],
        "worker": record["to"],
        "state": "failed" if given_up else "queued" if record["state"] == "queued" else "staging",
        "tokens": {"total": tokens, "peer": tokens},
        "bytes": {"peer_to_nvme": record["bytes"]},
        "timeline": [["staging", 0.0]],
        "move_id": record["move_id"],
    }
