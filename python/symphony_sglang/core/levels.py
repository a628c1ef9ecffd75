"""The memory levels of a worker and the hops between them, by the names the HTTP API uses."""

from __future__ import annotations

from enum import StrEnum


class Level(StrEnum):
    """Where KV can be, fastest first."""

    DEVICE = "device"
    HOST = "host"
    NVME = "nvme"
    PEER = "peer"


class Hop(StrEnum):
    """One step of a promotion."""

    NVME_TO_HOST = "nvme_to_host"
    HOST_TO_DEVICE = "host_to_device"


class Target(StrEnum):
    """How far up an advisory asks its prefix to be moved."""

    DEVICE = "device"
    HOST = "host"


# The two levels with a protected budget.
PROTECTED_LEVELS = (Level.DEVICE, Level.HOST)


def page_floor(tokens: int, page_size: int) -> int:
    """The whole pages of `tokens`, in tokens."""
    return tokens - tokens % page_size
