"""Serves this worker's pages to other workers, by hash.

One thread accepts, one serves each connection, and one more opens a connection's next request while
the current one is being sent. Nothing a peer sends is trusted: what does not fit the protocol ends
its connection and is counted.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from symphony_sglang.clock import Clock, SystemClock
from symphony_sglang.errors import (
    ConfigError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
)
from symphony_sglang.wire.channel import SocketChannel, on_one_host
from symphony_sglang.wire.frames import send_frame
from symphony_sglang.wire.handshake import greet_client
from symphony_sglang.wire.local_copy import my_address
from symphony_sglang.wire.page_session import PageSession, RecordSource
from symphony_sglang.wire.pages import KV_POOL, PageSource, PeerIdentity, RemoteEngine
from symphony_sglang.wire.secure_channel import TransferKey
from symphony_sglang.wire.transfer_protocol import Kind, LocalAddress, Refused

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Seconds and counts; beyond `connections_max` a peer is refused as busy."""

    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one
    connections_max: int = 32
    handshake_seconds: float = 5.0
    idle_seconds: float = 300.0  # between two requests of a peer
    transfer_seconds: float = 15.0  # a peer that takes no byte for so long is gone
    local: bool = True  # peers of the same user on this host may copy from our memory

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"page server port is {self.port}; expected 0 to 65535")
        for name in ("connections_max", "handshake_seconds", "idle_seconds", "transfer_seconds"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"page server {name} is {getattr(self, name)}; expected above 0")


@dataclass(slots=True)
class ServerCounters:
    """Since the start. Written by connection threads, each under the server's lock."""

    connections: int = 0
    refused: int = 0  # another model, layout, ...
    refused_key: int = 0
    refused_busy: int = 0
    malformed: int = 0  # connections ended by a breach of the protocol
    lost: int = 0
    pages: int = 0
    pages_missing: int = 0
    pages_changed: int = 0
    bytes: int = 0
    records: int = 0

    def as_json(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}


class PageServer:
    """A listening socket and its threads. Thread-safe."""

    def __init__(
        self,
        sources: PageSource | Mapping[str, PageSource],
        identity: PeerIdentity,
        *,
        records: RecordSource | None = None,
        engines: Mapping[str, RemoteEngine] | None = None,
        key: TransferKey | None = None,
        settings: ServerSettings | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Listen at once.

        Args:
            sources: the pages of the KV pool, or of several pools by name.
            records: answers requests for small records; None where there are none.
            engines: one-sided engines that may read this process's pages, by name.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self.identity = identity
        self.settings = settings or ServerSettings()
        self.counters = ServerCounters()
        self._sources = dict(sources) if isinstance(sources, Mapping) else {KV_POOL: sources}
        self._records = records
        self._engines = dict(engines or {})
        self._key = key
        self._clock = clock or SystemClock()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._sessions: dict[int, tuple[threading.Thread, SocketChannel]] = {}
        self._numbers = 0
        self._listener = self._listen()
        self._thread = threading.Thread(
            target=self._accept, name="symphony-page-server", daemon=True
        )
        self._thread.start()

    def _listen(self) -> socket.socket:
        host, port = self.settings.host, self.settings.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(self.settings.connections_max)
        except OSError as error:
            listener.close()
            raise ConfigError(
                f"page server: cannot listen on {host}:{port}: {error.strerror or error}"
            ) from error
        return listener

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    @property
    def address(self) -> str:
        """``host:port``, as given to a puller."""
        host = self.settings.host
        return f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"

    def _count(self, name: str, amount: int = 1) -> None:
        with self._lock:
            setattr(self.counters, name, getattr(self.counters, name) + amount)

    def _accept(self) -> None:
        while not self._closing.is_set():
            try:
                sock, address = self._listener.accept()
            except OSError:
                # Out of descriptors, or closed: neither may turn into a busy loop.
                if self._closing.wait(0.05):
                    return
                continue
            peer = f"{address[0]}:{address[1]}"
            try:
                channel = SocketChannel(sock, peer, self._clock, self.settings.handshake_seconds)
            except (OSError, PeerLostError):
                sock.close()
                continue
            self._start(channel, sock, peer)

    def _start(self, channel: SocketChannel, sock: socket.socket, peer: str) -> None:
        with self._lock:
            room = len(self._sessions) < self.settings.connections_max
            if room and not self._closing.is_set():
                self._numbers += 1
                number = self._numbers
                thread = threading.Thread(
                    target=self._serve,
                    args=(number, channel, on_one_host(sock), peer),
                    name=f"symphony-page-{number}",
                    daemon=True,
                )
                self._sessions[number] = (thread, channel)
                self.counters.connections += 1
                thread.start()
                return
            self.counters.refused_busy += 1
        busy = Refused("busy", f"{self.settings.connections_max} connections are open already")
        with contextlib.suppress(PeerLostError):
            send_frame(channel, Kind.REFUSED, 0, busy)
        channel.close()

    def _serve(self, number: int, channel: SocketChannel, on_host: bool, peer: str) -> None:
        try:
            self._greet_and_serve(channel, on_host, peer)
        except PeerRefusedError as error:
            self._count("refused_key" if "transfer key" in str(error) else "refused")
            logger.warning("page server: refused %s: %s", peer, error)
        except PeerProtocolError as error:
            self._count("malformed")
            logger.warning("page server: %s broke the protocol: %s", peer, error)
        except PeerLostError as error:
            self._count("lost")
            logger.info("page server: %s", error)
        except Exception:
            logger.exception("page server: serving %s failed", peer)
        finally:
            channel.close()
            with self._lock:
                self._sessions.pop(number, None)

    def _greet_and_serve(self, channel: SocketChannel, on_host: bool, peer: str) -> None:
        probes: list[bytearray] = []

        def place_probe(probe: bytes) -> LocalAddress | None:
            if not (on_host and self.settings.local):
                return None
            probes.append(bytearray(probe))
            return my_address(memoryview(probes[0]))

        # A peer that drips its handshake byte by byte is cut off all the same.
        channel.expire_at(self._clock.monotonic() + self.settings.handshake_seconds)
        greeting = greet_client(
            channel, self.identity, self._key, place_probe, self._describe_engine
        )
        channel.expire_at(None)
        session = PageSession(
            greeting.channel,
            self._sources,
            self._records,
            self.identity.page_bytes,
            count=self._count,
            closing=self._closing,
            clock=self._clock,
            idle_seconds=self.settings.idle_seconds,
            transfer_seconds=self.settings.transfer_seconds,
        )
        try:
            session.run()
        finally:
            session.close()

    def _describe_engine(self, name: str) -> bytes:
        engine = self._engines.get(name)
        return b"" if engine is None else engine.metadata()

    def close(self, seconds: float = 5.0) -> None:
        """Stop listening, end every connection. Idempotent."""
        if self._closing.is_set():
            return
        self._closing.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            sessions = list(self._sessions.values())
        for _, channel in sessions:
            channel.abort()
        deadline = self._clock.monotonic() + seconds
        for thread in [self._thread, *(thread for thread, _ in sessions)]:
            thread.join(max(0.0, deadline - self._clock.monotonic()))

    def __enter__(self) -> PageServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
