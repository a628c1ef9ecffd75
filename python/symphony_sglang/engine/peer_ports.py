"""Which ports a worker's page servers have: one a rank, in a row, the same after a restart."""

from __future__ import annotations

import random

from symphony_sglang.engine.feed_ports import PORT_TRIES_MAX, reserve
from symphony_sglang.errors import ConfigError

# What the launcher chose: the first port, or "off".
PEER_PORT_VARIABLE = "SYMPHONY_CHOSEN_PEER_PORT"
# Apart from the feed's, and below Linux's ephemeral range.
PORT_RANGE = (10_500, 20_000)

_reserved: list[object] = []


def reserve_peer_ports(address: str, ranks: int, *, base: int, http_port: int) -> int:
    """Hold `ranks` ports in a row in this process; the first of them.

    Args:
        base: the first port, or 0 to choose: the same for the same `http_port` where it is free.

    Raises:
        ConfigError: the ports asked for are taken, or none are free.
    """
    span = PORT_RANGE[1] - PORT_RANGE[0] - ranks
    chooser = random.SystemRandom()
    preferred = PORT_RANGE[0] + http_port * ranks % span
    tries = [preferred, *(chooser.randrange(*PORT_RANGE) for _ in range(PORT_TRIES_MAX))]
    for first in [base] if base else tries:
        holders = []
        for port in range(first, min(first + ranks, 65_536)):
            holder = None if port == http_port else reserve(address, port)
            if holder is None:
                break
            holders.append(holder)
        if len(holders) == ranks:
            _reserved.extend(holders)
            return first
        for holder in holders:
            holder.close()
    if base:
        raise ConfigError(
            f"--symphony-peer-port {base}: one of the ports {base} to {base + ranks - 1} is taken"
        )
    raise ConfigError(f"no {ranks} free ports in a row found in {PORT_RANGE} for the page servers")
