"""Which ports a worker's feed has: chosen free, the same after a restart where they still are.

Three ranges of one port a data-parallel rank, one after the other: events, replay, state. The first
two are SGLang's own (``--kv-events-config``); the third follows from them.
"""

from __future__ import annotations

import ipaddress
import json
import random
import socket
from typing import NamedTuple

from symphony_sglang.errors import ConfigError

PUBLISHER_NAME = "symphony"
# Below Linux's ephemeral range, where outgoing connections would take them before we bind.
PORT_RANGE = (20_000, 32_000)
PORT_TRIES_MAX = 200
RANGES = 3
WILDCARDS = ("", "*", "0.0.0.0", "::")

# Held by the launcher while it runs: the scheduler binds only after it has loaded its model.
_reserved: list[socket.socket] = []


class FeedPorts(NamedTuple):
    """First port of each range; rank r has the port + r."""

    events: int
    replay: int
    state: int

    @classmethod
    def at(cls, base: int, ranks: int) -> FeedPorts:
        return cls(base, base + ranks, base + 2 * ranks)


def bind_address(host: str) -> str:
    """The numeric address to bind for the HTTP server's ``--host``: as reachable as that, no more.

    Raises:
        ConfigError: the host has no address.
    """
    if host in WILDCARDS:
        return "::" if host == "::" else "0.0.0.0"
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        found = socket.getaddrinfo(host, None, socket.AF_INET, socket.SOCK_STREAM)
    except OSError as error:
        raise ConfigError(f"--host {host[:256]!r} has no address: {error}") from error
    return str(found[0][4][0])


def reserve(address: str, port: int) -> socket.socket | None:
    """Hold a port against other launchers until the socket is closed; None where it is taken.

    What holds it is a name (an abstract Unix socket, which ends with its process), so that the
    scheduler can bind the port itself. The probe binds as ZMQ does, over connections of an earlier
    worker that are still dying.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        holder.bind(f"\0symphony_sglang/feed/{port}")
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((address, port))
            probe.listen(1)
    except OSError:
        holder.close()
        return None
    return holder


def reserve_ports(address: str, ranks: int, *, base: int, http_port: int) -> FeedPorts:
    """Hold the ports of a feed in this process.

    Args:
        base: The first port, or 0 to choose: the same for the same `http_port` where it is free,
            so that subscribers find a restarted worker where it was.

    Raises:
        ConfigError: the ports asked for are taken, or none are free.
    """
    count = RANGES * ranks
    if base:
        bases = [base]
    else:
        chooser = random.SystemRandom()
        last = PORT_RANGE[1] - count
        preferred = PORT_RANGE[0] + http_port * count % (last - PORT_RANGE[0])
        bases = [
            preferred,
            *(chooser.randrange(PORT_RANGE[0], last) for _ in range(PORT_TRIES_MAX)),
        ]
    for first in bases:
        holders = []
        for port in range(first, min(first + count, 65_536)):
            holder = None if port == http_port else reserve(address, port)
            if holder is None:
                break
            holders.append(holder)
        if len(holders) == count:
            _reserved.extend(holders)
            return FeedPorts.at(first, ranks)
        for holder in holders:
            holder.close()
    if base:
        raise ConfigError(
            f"--symphony-feed-port {base}: one of the ports {base} to {base + count - 1} is taken"
        )
    raise ConfigError(f"no {count} free ports in a row found in {PORT_RANGE} for the feed")


def release_ports() -> None:
    """Let go of what this process holds (tests start several)."""
    while _reserved:
        _reserved.pop().close()


def events_config(address: str, ports: FeedPorts) -> str:
    """The value of SGLang's ``--kv-events-config`` that makes our publisher serve these ports."""
    host = f"[{address}]" if ":" in address else address
    return json.dumps(
        {
            "publisher": PUBLISHER_NAME,
            "endpoint": f"tcp://{host}:{ports.events}",
            "replay_endpoint": f"tcp://{host}:{ports.replay}",
            # A concrete address is connected to otherwise (kv_events.py:527).
            "bind": True,
            "hwm": 2000,
            "max_queue_size": 10_000,
        }
    )
