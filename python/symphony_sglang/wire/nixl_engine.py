"""Pages by NIXL: the reader's network card takes them from the server's memory (UCX: RDMA, TCP).

An optional extra, imported only when it is chosen. The connection of frames stays: it proves the
key, compares identities, says where pages are and carries their checksums; NIXL moves the pages
themselves, unencrypted. Only memory that both sides registered before takes part, and only a peer
that got through the handshake is told of it.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.errors import ConfigError, PeerLostError
from symphony_sglang.wire.local_copy import Piece, address_of, pair_pieces
from symphony_sglang.wire.transfer_protocol import FETCH_BYTES_MAX

logger = logging.getLogger(__name__)

NAME = "nixl"
INSTALL = "pip install --no-deps nixl nixl-cu12  (nixl-cu13 with CUDA 13)"
# Between two looks at a transfer: a busy loop would take a core from the scheduler.
POLL_SECONDS = 0.0002
MEMORY = "DRAM"


class NixlEngine:
    """This process's NIXL agent: for its page server and its pulls. Thread-safe."""

    def __init__(self, clock: Clock) -> None:
        """Start the agent.

        Raises:
            ConfigError: the package is not installed, or has no backend here.
        """
        try:
            from nixl import _bindings
            from nixl._api import nixl_agent, nixl_agent_config
        except ImportError as error:
            raise ConfigError(f"transfer by nixl: {error}; expected the extra: {INSTALL}") from None
        # They share no base but Exception.
        self.errors: tuple[type[Exception], ...] = (
            RuntimeError,
            *(
                kind
                for kind in vars(_bindings).values()
                if isinstance(kind, type) and issubclass(kind, Exception)
            ),
        )
        try:
            self._agent: Any = nixl_agent(
                f"symphony-{uuid.uuid4().hex}", nixl_agent_config(backends=["UCX"])
            )
        except self.errors as error:
            raise ConfigError(f"transfer by nixl: no agent: {error}") from error
        self.clock = clock
        # The agent itself is not thread-safe; every call but the wait between them is short.
        self._lock = threading.Lock()
        self._registered: list[Any] = []
        self._readers: Counter[str] = Counter()

    def register(self, memory: memoryview) -> None:
        """Memory that transfers may read and write from now on; it stays so.

        Raises:
            ConfigError: the network's driver does not take it.
        """
        region = [(address_of(memory), len(memory), 0, "")]
        try:
            with self._lock:
                self._registered.append(self._agent.register_memory(region, MEMORY))
        except self.errors as error:
            raise ConfigError(
                f"transfer by nixl: {len(memory)} bytes cannot be registered: {error}; "
                "expected leave to lock them (ulimit -l)"
            ) from error

    def metadata(self) -> bytes:
        """What a peer's engine needs to read the memory that is registered by now."""
        with self._lock:
            return bytes(self._agent.get_agent_metadata())

    def connect(self, metadata: bytes) -> NixlReader | None:
        """A reader of a peer's memory; None where the two engines find no way to each other."""
        try:
            with self._lock:
                name = self._agent.add_remote_agent(metadata)
                self._readers[name] += 1
        except self.errors as error:
            logger.warning("nixl: no way to a peer: %s", error)
            return None
        return NixlReader(self, name)

    def forget(self, name: str) -> None:
        """A reader ended; with the last one of a peer goes what is known of it."""
        with self._lock:
            self._readers[name] -= 1
            if self._readers[name] <= 0:
                del self._readers[name]
                with contextlib.suppress(*self.errors):  # it may be gone already
                    self._agent.remove_remote_agent(name)

    def begin(self, name: str, pairs: Sequence[tuple[Piece, Piece]]) -> Any:
        """Start to read (theirs, mine) pieces; the transfer's handle."""
        with self._lock:
            agent = self._agent
            theirs = agent.get_xfer_descs([(*piece, 0) for piece, _ in pairs], MEMORY)
            mine = agent.get_xfer_descs([(*piece, 0) for _, piece in pairs], MEMORY)
            handle = agent.initialize_xfer("READ", mine, theirs, name)
            agent.transfer(handle)
            return handle

    def state(self, handle: Any) -> str:
        """``PROC`` while under way, ``DONE``, or anything else for a failure."""
        try:
            with self._lock:
                return str(self._agent.check_xfer_state(handle))
        except self.errors as error:
            return str(error)

    def end(self, handle: Any) -> bool:
        """Let go of a transfer, cancelling one that is under way; False where that fails."""
        with self._lock:
            try:
                self._agent.release_xfer_handle(handle)
            except self.errors:
                return False
            return True


class NixlReader:
    """Copies out of one peer's memory; `abort` may come from any thread."""

    way = NAME
    step_bytes = FETCH_BYTES_MAX  # a transfer costs a round trip, however large
    summed = True

    def __init__(self, engine: NixlEngine, name: str) -> None:
        self._engine = engine
        self._name = name
        self._aborted = threading.Event()
        self._closed = False

    def copy(self, remote: Sequence[Piece], targets: Sequence[memoryview], until: float) -> bool:
        """Read `remote` pieces, one after the other, into `targets`; False where that fails.

        When this returns or raises nothing writes to the targets any more: a transfer that can be
        neither ended nor cancelled keeps its caller here.

        Raises:
            PeerLostError: it was aborted, or took until `until` of the clock.
        """
        local = [(address_of(view), len(view)) for view in targets]
        if sum(size for _, size in remote) != sum(size for _, size in local):
            return False
        try:
            handle = self._engine.begin(self._name, pair_pieces(remote, local))
        except self._engine.errors as error:
            # Memory that one side did not register, or a peer that is gone.
            logger.warning("nixl: %s: %s; pages take another way", self._name, error)
            return False
        state = self._engine.state(handle)
        while state == "PROC" and not self._aborted.wait(POLL_SECONDS):
            state = self._engine.state(handle)
            if self._engine.clock.monotonic() >= until:
                break
        while not self._engine.end(handle):
            threading.Event().wait(0.01)
        if state == "PROC":
            raise PeerLostError(f"{self._name}: the transfer was aborted, or took too long")
        if state != "DONE":
            logger.warning("nixl: %s: %s; pages take another way", self._name, state)
        return state == "DONE"

    def abort(self) -> None:
        self._aborted.set()

    def close(self) -> None:
        """Idempotent."""
        if not self._closed:
            self._closed = True
            self._engine.forget(self._name)
