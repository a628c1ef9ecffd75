"""One rank's copy of a session's pages from its twin on another worker, in a thread of its own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from symphony_sglang.clock import Clock
from symphony_sglang.core.page_hash import page_hashes
from symphony_sglang.core.prefix import Prefix
from symphony_sglang.core.sessions import SessionKey, decode_session
from symphony_sglang.engine.peer_identity import identity_of
from symphony_sglang.errors import PeerRefusedError, SessionRecordError, TransferError
from symphony_sglang.store import PageStore
from symphony_sglang.store.peer_pages import StagingPool, StorePageSink
from symphony_sglang.wire.page_client import PageClient, split_address
from symphony_sglang.wire.pages import RemoteEngine
from symphony_sglang.wire.pull import Canceller, Pull, PullEnd
from symphony_sglang.wire.secure_channel import TransferKey
from symphony_sglang.wire.transfer_protocol import HASHES_MAX

SESSION_RECORD = "session"
PULL_RECORD = "pull"
# For pages of a turn that has just ended: they reach the source's disk a moment later.
COMMIT_WAIT_SECONDS = 3.0
TWIN_WAIT_SECONDS = 30.0


class PullState(StrEnum):
    """Where a pull stands, as its receipt says."""

    QUEUED = "queued"
    COPYING = "copying"
    STORED = "stored"  # on this worker's disk; what follows is an ordinary advisory
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = frozenset({PullState.STORED, PullState.FAILED, PullState.CANCELLED})


@dataclass(frozen=True, slots=True)
class PullOrder:
    """What to copy. Alike on all ranks."""

    pull_id: str
    source: str  # address of the source's rank 0
    deadline_seconds: float
    session: SessionKey | None = None
    prefix: Prefix | None = None  # where no session is named
    target: str = "device"
    advisory_id: str = ""
    move_id: str = ""  # of the transaction it belongs to
    step: int = 0


@dataclass(slots=True)
class PullTask:
    """A pull on this rank. Written by its thread, read by any."""

    order: PullOrder
    started_seconds: float
    state: PullState = PullState.QUEUED
    reason: str = ""
    blob: bytes | None = None  # the session's record, as the source has it
    hashes: Sequence[bytes] = ()  # of its pages
    tokens: int = 0  # wanted
    tokens_here: int = 0  # of those, from the first on, here without a gap
    bytes_copied: int = 0
    way: str = ""
    outcome: str = PullEnd.LOST.value  # how the transfer ended, for the metrics
    timeline: list[tuple[PullState, float]] = field(default_factory=list)
    canceller: Canceller = field(default_factory=Canceller)
    ended: threading.Event = field(default_factory=threading.Event)

    def enter(self, state: PullState, now_seconds: float, reason: str = "") -> None:
        self.state = state
        self.reason = reason or self.reason
        self.timeline.append((state, now_seconds - self.started_seconds))

    def as_json(self) -> dict[str, Any]:
        """The receipt of ``POST /symphony/pull`` and ``GET /symphony/pulls/{id}``."""
        session = self.order.session
        refused = self.state is PullState.FAILED and not self.tokens_here
        return {
            "pull_id": self.order.pull_id,
            "status": "rejected" if refused else "accepted",
            "reason": self.reason,
            "session_id": None if session is None else session.session_id,
            "source": self.order.source,
            "state": self.state.value,
            "advisory_id": self.order.advisory_id or None,
            "tokens": {
                "total": self.tokens,
                "nvme": self.tokens_here,
                "missing": self.tokens - self.tokens_here,
            },
            "bytes": {"peer_to_nvme": self.bytes_copied},
            "way": self.way,
            "timeline": [[state.value, round(at, 6)] for state, at in self.timeline],
        }


def session_name(key: SessionKey) -> str:
    """How a session's record is asked for."""
    return json.dumps([key.session_id, key.namespace.extra_key, key.namespace.cache_salt])


def rank_address(address: str, rank: int) -> str:
    """The page server of `rank` on the worker whose rank 0 is at `address`: ports are in a row."""
    host, port = split_address(address)
    return f"[{host}]:{port + rank}" if ":" in host else f"{host}:{port + rank}"


class Puller:
    """Carries out pulls on one rank; `run` in a thread that may block."""

    def __init__(
        self,
        store: PageStore,
        staging: StagingPool,
        key: TransferKey | None,
        clock: Clock,
        *,
        cost_of: Callable[[int], float],
        own_address: str,
        rank: int,
        ranks: int,
        engine: tuple[str, RemoteEngine] | None = None,
    ) -> None:
        """`own_address`: rank 0's page server of this worker, where ranks ask for each other.

        `engine`: the one-sided engine that was chosen, with its name; it knows `staging`'s memory.
        """
        self._store = store
        self._staging = staging
        self._key = key
        self._clock = clock
        self._cost_of = cost_of
        self._own_address = own_address
        self._rank, self._ranks = rank, ranks
        self._engine = engine
        self.identity = identity_of(store.namespace)

    def run(self, task: PullTask) -> None:
        """Copy, and on rank 0 wait for the other ranks too. Never raises."""
        deadline = task.started_seconds + task.order.deadline_seconds
        task.enter(PullState.COPYING, self._clock.monotonic())
        try:
            state, reason = self._copy(task, deadline)
        except PeerRefusedError as error:
            task.outcome = PullEnd.REFUSED.value
            state, reason = PullState.FAILED, f"refused: {error}"
        except (TransferError, SessionRecordError) as error:
            state, reason = PullState.FAILED, str(error)
        if task.canceller.event.is_set():
            task.outcome = PullEnd.CANCELLED.value
            state, reason = PullState.CANCELLED, "cancelled"
        task.enter(state, self._clock.monotonic(), reason)

    def _connect(self, task: PullTask, deadline: float) -> PageClient:
        return PageClient(
            rank_address(task.order.source, self._rank),
            self.identity,
            key=self._key,
            engine=self._engine,
            clock=self._clock,
            deadline=deadline,
        )

    def _copy(self, task: PullTask, deadline: float) -> tuple[PullState, str]:
        if task.canceller.event.is_set():
            return PullState.CANCELLED, ""
        with self._connect(task, deadline) as client:
            task.canceller.watch(client)
            prefix = self._prefix(task, client)
            if prefix is None:
                task.outcome = PullEnd.SHORT.value
                return PullState.FAILED, "unknown_session"
            namespace = self._store.namespace
            hashes = page_hashes(prefix.token_bytes, namespace.page_tokens, prefix.namespace)
            task.hashes, task.tokens = hashes, len(hashes) * namespace.page_tokens
            if not hashes:
                return PullState.FAILED, "shorter_than_a_page"
            if not all(self._store.contains(hashes)):
                left = deadline - self._clock.monotonic()
                # Not all of it: what is there must still be copied.
                wait = min(COMMIT_WAIT_SECONDS, max(0.0, left / 2))
                client.lookup(hashes[-HASHES_MAX:], wait)
            task.canceller.watch(None)
            # The pages take the connection that is there; a broken one is made anew.
            made = [client]
            report = Pull(
                lambda: made.pop() if made else self._connect(task, deadline),
                StorePageSink(self._store, self._staging, hashes, self._cost_of),
                hashes,
                namespace.page_bytes,
                clock=self._clock,
                canceller=task.canceller,
                deadline=deadline,
            ).run()
        task.tokens_here = report.pages_here * namespace.page_tokens
        task.bytes_copied, task.way = report.bytes_received, report.way
        task.outcome = report.end.value
        if report.end is PullEnd.COMPLETE:
            return PullState.STORED, ""
        # A head of the session is of use all the same.
        state = PullState.STORED if task.tokens_here else PullState.FAILED
        return state, f"{report.end.value}: {report.problem}"

    def _prefix(self, task: PullTask, client: PageClient) -> Prefix | None:
        session = task.order.session
        if session is None:
            return task.order.prefix
        task.blob = client.record(SESSION_RECORD, session_name(session))
        if task.blob is None:
            return None
        record = decode_session(task.blob, self._clock.monotonic())
        if record.key != session:
            raise SessionRecordError(f"the source sent the record of {record.key.session_id!r}")
        return record.prefix

    def gather(self, task: PullTask) -> None:
        """Rank 0, after its own copy: what all ranks have is the least of what each has."""
        for rank in range(1, self._ranks):
            tokens, copied, reason = self._ask_twin(task.order.pull_id, rank)
            task.tokens_here = min(task.tokens_here, tokens)
            task.bytes_copied += copied
            task.reason = task.reason or reason
        if self._ranks > 1 and task.state is PullState.STORED and not task.tokens_here:
            task.state = PullState.FAILED

    def _ask_twin(self, pull_id: str, rank: int) -> tuple[int, int, str]:
        namespace = replace(self._store.namespace, tp_rank=rank)
        try:
            with PageClient(
                rank_address(self._own_address, rank),
                identity_of(namespace),
                key=self._key,
                clock=self._clock,
            ) as client:
                body = client.record(PULL_RECORD, pull_id, TWIN_WAIT_SECONDS)
        except TransferError as error:
            return 0, 0, f"rank {rank}: {error}"
        if body is None:
            return 0, 0, f"rank {rank}: no answer in {TWIN_WAIT_SECONDS:g} s"
        tokens, copied, reason = json.loads(body)
        return int(tokens), int(copied), f"rank {rank}: {reason}" if reason else ""


def pull_record(task: PullTask | None) -> bytes | None:
    """What rank 0 asks the others for; None while the pull is under way."""
    if task is None or not task.ended.is_set():
        return None
    return json.dumps([task.tokens_here, task.bytes_copied, task.reason]).encode()
