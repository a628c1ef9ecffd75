"""A byte channel over a blocking socket: exact reads and writes straight from and to caller memory.

Blocking calls with kernel time limits move 250 KB per system call; a ready-loop of an event loop
moves what is there. Both reach the same rate, this one with less Python between the calls.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
from collections.abc import Sequence
from typing import Any, Protocol

from symphony_sglang.clock import Clock
from symphony_sglang.errors import PeerLostError

# Pieces that one system call carries; the kernel's bound is 1,024.
PIECES_PER_CALL = 512
# Bytes sent or received in one call, and hashed while they are in the cache.
STEP_BYTES = 1024 * 1024
# What may be on its way. Between two processes of one host that is cache which both sides use up: a
# buffer of 1 MB costs half as much CPU again a byte. A network's has to cover its round trip.
HOST_BUFFER_BYTES = 256 * 1024
NETWORK_BUFFER_BYTES = 1024 * 1024


class Channel(Protocol):
    """Moves exact numbers of bytes; any failure is a ``PeerLostError``."""

    def send(self, pieces: Sequence[memoryview]) -> None: ...

    def receive_into(self, pieces: Sequence[memoryview]) -> None: ...

    def receive_some(self, buffer: memoryview) -> int:
        """Wait for bytes and take what is there, at least one; returns how many."""
        ...

    def readable(self) -> bool:
        """Whether a receive would find bytes at once."""
        ...

    def limit(self, seconds: float) -> None:
        """A single wait for the peer may last this long, from now on."""
        ...

    def expire_at(self, deadline: float | None) -> None:
        """No wait goes past this time of the clock."""
        ...

    def abort(self) -> None:
        """Wake whoever waits, from any thread."""
        ...

    def close(self) -> None: ...


class SocketChannel:
    """Plain bytes on a stream socket."""

    def __init__(self, sock: socket.socket, peer: str, clock: Clock, seconds: float) -> None:
        self._socket = sock
        self.peer = peer
        self._clock = clock
        self._seconds = self._set_seconds = -1.0
        self._deadline: float | None = None
        sock.setblocking(True)
        size = HOST_BUFFER_BYTES if on_one_host(sock) else NETWORK_BUFFER_BYTES
        # What comes in is set before connecting: see `connect_socket`.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)
        with contextlib.suppress(OSError):  # a Unix socket has no such option
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.limit(seconds)

    def limit(self, seconds: float) -> None:
        self._seconds = seconds
        self._apply(seconds)

    def expire_at(self, deadline: float | None) -> None:
        self._deadline = deadline

    def _apply(self, seconds: float) -> None:
        if seconds == self._set_seconds:
            return
        self._set_seconds = seconds
        whole = int(seconds)
        value = struct.pack("ll", whole, max(1000, int((seconds - whole) * 1e6)))
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, value)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, value)
        except OSError as error:
            raise PeerLostError(f"{self.peer}: {error.strerror or error}") from error

    def _before_wait(self) -> None:
        if self._deadline is None:
            return
        left = self._deadline - self._clock.monotonic()
        if left <= 0:
            raise PeerLostError(f"{self.peer}: the deadline passed")
        # Rounded so that a long deadline does not cost a system call for each wait.
        self._apply(self._seconds if left > self._seconds else max(0.001, round(left, 2)))

    def send(self, pieces: Sequence[memoryview]) -> None:
        left = [piece for piece in pieces if len(piece)]
        while left:
            self._before_wait()
            try:
                count = self._socket.sendmsg(left[:PIECES_PER_CALL])
            except BlockingIOError:
                raise PeerLostError(f"{self.peer}: took no bytes for too long") from None
            except OSError as error:
                raise PeerLostError(f"{self.peer}: {error.strerror or error}") from error
            left = drop_front(left, count)

    def receive_into(self, pieces: Sequence[memoryview]) -> None:
        left = [piece for piece in pieces if len(piece)]
        while left:
            left = drop_front(left, self._receive(left, socket.MSG_WAITALL))

    def receive_some(self, buffer: memoryview) -> int:
        return self._receive([buffer], 0)

    def _receive(self, pieces: list[memoryview], flags: int) -> int:
        self._before_wait()
        try:
            if len(pieces) == 1:
                count = self._socket.recv_into(pieces[0], 0, flags)
            else:
                count = self._socket.recvmsg_into(pieces[:PIECES_PER_CALL], 0, flags)[0]
        except BlockingIOError:
            raise PeerLostError(f"{self.peer}: sent no bytes for too long") from None
        except OSError as error:
            raise PeerLostError(f"{self.peer}: {error.strerror or error}") from error
        if count == 0:
            raise PeerLostError(f"{self.peer}: closed the connection")
        return count

    def readable(self) -> bool:
        try:
            return bool(select.select([self._socket], [], [], 0)[0])
        except (OSError, ValueError):
            return True  # the receive that follows says what is wrong

    def abort(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.abort()
        self._socket.close()


def connect_socket(host: str, port: int, seconds: float) -> socket.socket:
    """A connected TCP socket whose window is wide from the first byte on.

    Raises:
        OSError: no address of the host could be connected in time.
    """
    problem: OSError | None = None
    for family, kind, protocol, _, address in socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM):
        sock = socket.socket(family, kind, protocol)
        try:
            # The window that a connection starts with is made from this, once. Made smaller later,
            # what the peer may still send would be dropped, and sent again 0.2 seconds after.
            size = HOST_BUFFER_BYTES if _leads_here(family, address) else NETWORK_BUFFER_BYTES
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            sock.settimeout(seconds)
            sock.connect(address)
            return sock
        except OSError as error:
            problem = error
            sock.close()
    raise problem or OSError(f"{host}: no address")


def _leads_here(family: int, address: Any) -> bool:
    """Whether the route to an address ends on this host; nothing is sent."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)
        return bool(probe.getsockname()[0] == address[0])


def on_one_host(sock: socket.socket) -> bool:
    """Whether the peer's address is one of this host: only then can it read our memory."""
    try:
        if sock.family == socket.AF_UNIX:
            return True
        return bool(sock.getpeername()[0] == sock.getsockname()[0])
    except OSError:
        return False


def drop_front(pieces: list[memoryview], count: int) -> list[memoryview]:
    """What is left of `pieces` after their first `count` bytes."""
    for at, piece in enumerate(pieces):
        if count < len(piece):
            return [piece[count:], *pieces[at + 1 :]] if count else pieces[at:]
        count -= len(piece)
    return []
