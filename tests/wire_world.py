"""What the tests of page transfer share: identities, pages, a relay that does harm on demand."""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time

import numpy as np

from symphony_sglang.clock import SystemClock
from symphony_sglang.testing.pages import MemoryPages
from symphony_sglang.wire.page_client import ClientSettings, PageClient
from symphony_sglang.wire.page_server import PageServer, ServerSettings
from symphony_sglang.wire.pages import PeerIdentity
from symphony_sglang.wire.pull import Canceller, Pull, PullReport, PullSettings
from symphony_sglang.wire.secure_channel import TransferKey

PAGE_BYTES = 24_000
CLOCK = SystemClock()
SECRET = "a secret of the whole cluster"
STREAM = ClientSettings(local=False, connect_seconds=2.0, transfer_seconds=2.0)


def identity(**changes) -> PeerIdentity:
    fields = {
        "model": "tiny",
        "revision": "r1",
        "dtype": "bfloat16",
        "layout": "page_first_direct",
        "page_tokens": 16,
        "page_bytes": PAGE_BYTES,
        "hash_scheme": "sha256-chain",
        "extra": (("layer_num", "4"),),
    }
    return PeerIdentity(**{**fields, **changes})


def chain(count: int, salt: str = "") -> list[bytes]:
    return [hashlib.sha256(f"{salt}{at}".encode()).digest() for at in range(count)]


def body_of(key: bytes, size: int = PAGE_BYTES) -> bytes:
    return np.random.default_rng(int.from_bytes(key[:8], "little")).bytes(size)


def filled(hashes: list[bytes], size: int = PAGE_BYTES, **options) -> MemoryPages:
    return MemoryPages(size, {key: body_of(key, size) for key in hashes}, **options)


def serve(source, *, who: PeerIdentity | None = None, secret: str | None = None, records=None,
          **settings) -> PageServer:  # fmt: skip
    return PageServer(
        source,
        who or identity(),
        key=TransferKey(secret) if secret else None,
        records=records,
        settings=ServerSettings(**{"transfer_seconds": 2.0, **settings}),
    )


def connect(
    address: str,
    *,
    who: PeerIdentity | None = None,
    secret: str | None = None,
    settings: ClientSettings = STREAM,
    deadline: float | None = None,
) -> PageClient:
    return PageClient(
        address,
        who or identity(),
        key=TransferKey(secret) if secret else None,
        settings=settings,
        deadline=deadline,
    )


def pull(address: str, sink, hashes, *, canceller: Canceller | None = None,
         deadline_seconds: float | None = None, page_bytes: int = PAGE_BYTES,
         request_bytes: int = 10 * PAGE_BYTES, retry_seconds: float = 0.02,
         connections_max: int = 3, **options) -> PullReport:  # fmt: skip
    deadline = None if deadline_seconds is None else CLOCK.monotonic() + deadline_seconds
    return Pull(
        lambda: connect(address, deadline=deadline, **options),
        sink,
        hashes,
        page_bytes,
        clock=CLOCK,
        settings=PullSettings(
            request_bytes=request_bytes,
            retry_seconds=retry_seconds,
            connections_max=connections_max,
        ),
        canceller=canceller,
        deadline=deadline,
    ).run()


class Relay:
    """A TCP relay to a server: cuts, corrupts or stalls what the server sends."""

    def __init__(self, target: tuple[str, int]) -> None:
        self.cut_after: list[int] = []  # bytes of each next connection before it is cut
        self.corrupt_at: list[int] = []  # offset of a byte to flip, for each next connection
        self.stall_after: int | None = None
        self.connections = 0
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._sockets: list[socket.socket] = []
        self._closed = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.create_connection(self._target)
            self._sockets += [client, server]
            cut = self.cut_after.pop(0) if self.cut_after else None
            flip = self.corrupt_at.pop(0) if self.corrupt_at else None
            threading.Thread(target=self._pump, args=(client, server), daemon=True).start()
            threading.Thread(
                target=self._pump, args=(server, client, cut, flip), daemon=True
            ).start()

    def _pump(
        self,
        source: socket.socket,
        target: socket.socket,
        cut: int | None = None,
        flip: int | None = None,
    ) -> None:
        seen = 0
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                if cut is not None and seen + len(data) >= cut:
                    target.sendall(data[: cut - seen])
                    break
                if flip is not None and seen <= flip < seen + len(data):
                    broken = bytearray(data)
                    broken[flip - seen] ^= 0x40
                    data = bytes(broken)
                if self.stall_after is not None and seen >= self.stall_after:
                    self._closed.wait(30)
                target.sendall(data)
                seen += len(data)
        for one in (source, target):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._closed.set()
        self._listener.close()
        for one in self._sockets:
            one.close()


def eventually(condition, seconds: float = 5.0) -> None:
    deadline = CLOCK.monotonic() + seconds
    while not condition():
        assert CLOCK.monotonic() < deadline, "still not so"
        time.sleep(0.005)
