"""The peer level of one rank: serves its pages to other workers, and takes theirs.

Pages that are pulled land in this worker's own store under the same hashes; then an ordinary
advisory brings them into the tree by SGLang's own path, which keeps tensor-parallel ranks in step.
Each rank pulls from its twin in a thread; rank 0 waits for all of them and tells everybody in-band
(``PullEnded``), so no rank acts on what it alone knows.

Except for the threads' own parts, scheduler thread only.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from symphony_sglang.clock import Clock
from symphony_sglang.core.migration import Order, OrderKind
from symphony_sglang.core.migration_worker import Reply, WorkerMoves
from symphony_sglang.core.prefix import Namespace, Prefix
from symphony_sglang.core.sessions import SessionKey, decode_session, encode_session
from symphony_sglang.engine.messages import (
    AdvisoryAction,
    AdvisoryBatch,
    PeerRequest,
    PullEnded,
)
from symphony_sglang.engine.peer_host import HostPages, HostPageSource
from symphony_sglang.engine.peer_identity import identity_of
from symphony_sglang.engine.peer_pull import (
    ENDED,
    PULL_RECORD,
    SESSION_RECORD,
    Puller,
    PullOrder,
    PullState,
    PullTask,
    pull_record,
)
from symphony_sglang.errors import SessionRecordError
from symphony_sglang.store import PageStore
from symphony_sglang.store.peer_pages import StagingPool, StorePageSource
from symphony_sglang.wire.nixl_engine import NAME as NIXL
from symphony_sglang.wire.nixl_engine import NixlEngine
from symphony_sglang.wire.page_server import PageServer, ServerSettings
from symphony_sglang.wire.secure_channel import TransferKey

if TYPE_CHECKING:
    from symphony_sglang.engine.advisories import AdvisoryDriver

# Pulls at a time on a rank: they share the disk with demand traffic.
PULLS_UNDER_WAY_MAX = 2
PULLS_WAITING_MAX = 64
# Receipts remembered; of those that ended the oldest goes first.
RECEIPTS_MAX = 1024
# Copies that wait for their switch; the oldest goes first, and its move copies again.
COPIES_MAX = 64

logger = logging.getLogger(__name__)


class PeerLevel:
    """One rank's page server, and the pulls and moves towards it."""

    def __init__(
        self,
        driver: AdvisoryDriver,
        store: PageStore,
        *,
        settings: ServerSettings,
        key: TransferKey | None,
        clock: Clock,
        rank: int,
        ranks: int,
        cost_of: Any = lambda _depth: 1.0,
        host: HostPages | None = None,
        engine: NixlEngine | None = None,
    ) -> None:
        """Listen at once.

        Args:
            settings: with the port of this rank (rank 0's plus the rank).
            host: the pages of the host pool, where they can be read from there.
            engine: moves pages instead of the socket, where peers have it too.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        self._driver = driver
        self._store = store
        self._clock = clock
        self._rank, self._ranks = rank, ranks
        self._encrypted = key is not None
        self._transfer = "socket" if engine is None else NIXL
        page_bytes = store.namespace.page_bytes
        out, into = StagingPool(page_bytes), StagingPool(page_bytes)
        if engine is not None:
            for memory in (
                host.memory if host is not None else None,
                *out.prepare(),
                *into.prepare(),
            ):
                if memory is not None:
                    engine.register(memory)
        stored = StorePageSource(store, out)
        self._host = None if host is None else HostPageSource(host, stored)
        self.server = PageServer(
            self._host or stored,
            identity_of(store.namespace),
            records=self._record,
            engines={NIXL: engine} if engine else {},
            key=key,
            settings=settings,
            clock=clock,
        )
        own = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"
        self._puller = Puller(
            store,
            into,
            key,
            clock,
            engine=(NIXL, engine) if engine else None,
            cost_of=cost_of,
            own_address=f"{own}:{self.server.port - rank}",
            rank=rank,
            ranks=ranks,
        )
        self._pool = ThreadPoolExecutor(PULLS_UNDER_WAY_MAX, "symphony-pull")
        self._tasks: OrderedDict[str, PullTask] = OrderedDict()
        self._waiting: dict[str, None] = {}  # pulls whose end the ranks do not know yet
        self.moves = WorkerMoves("")
        # The worker is about to end: said in the feed, so that routers take its sessions.
        self.leaving = False
        self._released = 0
        # An event descriptor that a sleeping scheduler listens to.
        self.wakeup: int | None = None
        # Told (outcome, bytes, seconds) of every pull of this rank, on the pull's thread.
        self.on_pulled: Callable[[str, int, float], None] | None = None
        self._woken = False
        # By move, until it switches: the session's record, and its pages' hashes.
        self._copies: OrderedDict[str, tuple[bytes, Sequence[bytes]]] = OrderedDict()

    # Threads of the page server -----------------------------------------------------------------

    def _record(self, kind: str, name: str) -> bytes | None:
        if kind == PULL_RECORD:
            return pull_record(self._tasks.get(name))
        if kind != SESSION_RECORD:
            return None
        try:
            session_id, extra_key, cache_salt = json.loads(name)
            key = SessionKey(session_id, Namespace(extra_key, cache_salt))
            # Records are frozen, and one look-up is atomic.
            record = self._driver.sessions.get(key)
            return None if record is None else encode_session(record, self._driver.now_seconds)
        except (ValueError, TypeError, SessionRecordError):
            return None

    # Requests, in the same step on every rank ---------------------------------------------------

    @property
    def active(self) -> bool:
        """Whether a pull is under way, whose end rank 0 must tell, or a wake-up is to be taken."""
        return bool(self._waiting) or self._woken

    def handle(self, request: PeerRequest) -> dict[str, Any]:
        """The answer for the HTTP process; ``{}`` for what is not known."""
        self._driver.tick(request.sent_seconds)
        match request.verb:
            case "pull":
                return self._pull(request)
            case "state":
                task = self._tasks.get(request.pull_id)
                return {} if task is None else task.as_json()
            case "cancel":
                return self._cancel(request.pull_id)
            case "leave":
                return self._leave()
            case "order":
                return self._order(request)._asdict()
            case _:
                return {}

    def _leave(self) -> dict[str, Any]:
        """How much is still to be handed off, and whether anybody takes it."""
        self.leaving = True
        return {
            "sessions": len(self._driver.sessions),
            "taken": self._released + self.server.counters.pages,
        }

    def _key(self, request: PeerRequest) -> SessionKey | None:
        if request.session_id is None:
            return None
        return SessionKey(request.session_id, Namespace(request.extra_key, request.cache_salt))

    def _pull(self, request: PeerRequest) -> dict[str, Any]:
        namespace = Namespace(request.extra_key, request.cache_salt)
        order = PullOrder(
            pull_id=request.pull_id,
            source=request.source,
            deadline_seconds=request.deadline_seconds,
            session=self._key(request),
            prefix=None if request.token_bytes is None else Prefix(namespace, request.token_bytes),
            target=request.target,
            advisory_id="" if request.target == "nvme" else request.advisory_id,
        )
        return self._start(order)

    def _start(self, order: PullOrder) -> dict[str, Any]:
        """Queue a pull; its receipt as it is now."""
        task = PullTask(order, self._clock.monotonic())
        if len(self._waiting) >= PULLS_WAITING_MAX:
            task.enter(PullState.FAILED, self._clock.monotonic(), "too_many_pulls")
            return task.as_json()
        task.enter(PullState.QUEUED, task.started_seconds)
        self._tasks[order.pull_id] = task
        self._waiting[order.pull_id] = None
        receipt = task.as_json()
        self._pool.submit(self._work, task)
        for pull_id in list(self._tasks):
            if len(self._tasks) <= RECEIPTS_MAX:
                break
            if pull_id not in self._waiting:
                del self._tasks[pull_id]
        return receipt

    def _work(self, task: PullTask) -> None:
        """Puller thread."""
        try:
            self._puller.run(task)
            if self.on_pulled is not None:
                seconds = self._clock.monotonic() - task.started_seconds
                self.on_pulled(task.outcome, task.bytes_copied, seconds)
            if self._rank == 0:
                self._puller.gather(task)
        except Exception:
            logger.exception("pull %s failed", task.order.pull_id)
            task.enter(PullState.FAILED, self._clock.monotonic(), "internal_error")
        task.ended.set()
        if self.wakeup is not None:
            os.eventfd_write(self.wakeup, 1)
            self._woken = True  # last: whoever sees it finds the descriptor readable

    def _cancel(self, pull_id: str) -> dict[str, Any]:
        task = self._tasks.get(pull_id)
        if task is None:
            return {}
        if task.state not in ENDED:
            task.canceller.cancel()
        return task.as_json()

    def take_ended(self, now_seconds: float) -> list[PullEnded]:
        """Rank 0: pulls that ended on every rank, to be broadcast in-band."""
        if self.wakeup is not None:
            self._woken = False
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.wakeup)
        ended = []
        for pull_id in list(self._waiting):
            task = self._tasks[pull_id]
            if not task.ended.is_set():
                continue
            ended.append(
                PullEnded(
                    pull_id=pull_id,
                    stored=task.state is PullState.STORED,
                    complete=task.state is PullState.STORED and task.tokens_here == task.tokens,
                    reason=task.reason,
                    tokens=task.tokens_here,
                    bytes_copied=task.bytes_copied,
                    blob=task.blob,
                    now_seconds=now_seconds,
                )
            )
            del self._waiting[pull_id]
        return ended

    def pull_ended(self, message: PullEnded) -> None:
        """All ranks, in one step: the record becomes known, and an advisory takes over."""
        self._waiting.pop(message.pull_id, None)
        task = self._tasks.get(message.pull_id)
        self._driver.tick(message.now_seconds)
        if task is None:
            return
        if task.order.move_id:
            self._copied(task, message)
        elif message.stored:
            if message.blob is not None:
                # A copy: who owns the session is for a move to change.
                self._learn(message.blob, 0)
            if task.order.advisory_id:
                self._advise(task.order)
        # A receipt is kept for long, and must be small.
        task.blob, task.hashes = None, ()
        task.order = replace(task.order, prefix=None)

    def _learn(self, blob: bytes, owner_epoch: int) -> bool:
        """Take a pulled session record into the table and the store."""
        driver = self._driver
        try:
            record = decode_session(blob, driver.now_seconds)
        except SessionRecordError as error:
            logger.warning("a pulled session record is left out: %s", error)
            return False
        driver.sessions.restore(replace(record, owner_epoch=owner_epoch))
        driver.keeper.save(driver.now_seconds)
        return True

    def _advise(self, order: PullOrder) -> None:
        session, prefix = order.session, order.prefix
        namespace = session.namespace if session is not None else Namespace(None, None)
        if session is None and prefix is not None:
            namespace = prefix.namespace
        action = AdvisoryAction(
            verb="prefetch",
            advisory_id=order.advisory_id,
            session_id=None if session is None else session.session_id,
            token_bytes=prefix.token_bytes if session is None and prefix is not None else None,
            extra_key=namespace.extra_key,
            cache_salt=namespace.cache_salt,
            target=order.target,
        )
        self._driver.receive(AdvisoryBatch([action], self._driver.now_seconds))

    # Moves: the router's orders -----------------------------------------------------------------

    def _order(self, request: PeerRequest) -> Reply:
        order, now = request.order, self._driver.now_seconds
        assert order is not None
        key = SessionKey(order.session_id, Namespace(request.extra_key, request.cache_salt))
        self.expire(order.move_id)
        match order.kind:
            case OrderKind.RESERVE:
                return self.moves.reserve(order, now)
            case OrderKind.COPY:
                reply, start = self.moves.copy(order, now)
                if start:
                    self._start_copy(order, key, request)
                return reply
            case OrderKind.VERIFY:
                return self.moves.verify(order, self._complete(order), now)
            case OrderKind.SWITCH:
                return self._switch(order, key, request.target)
            case OrderKind.ABORT:
                self._drop(order.move_id)
                return self.moves.abort(order)
            case OrderKind.RECLAIM:
                return self._reclaim(order, key)
            case OrderKind.RELEASE:
                return self._release(order, key)

    def _start_copy(self, order: Order, key: SessionKey, request: PeerRequest) -> None:
        receipt = self._start(
            PullOrder(
                pull_id=f"{order.move_id}-{order.step}",
                source=request.source,
                deadline_seconds=request.deadline_seconds,
                session=key,
                move_id=order.move_id,
                step=order.step,
            )
        )
        if receipt["state"] == PullState.FAILED:
            self.moves.copied(order.move_id, order.step, False, receipt["reason"], 0)

    def _copied(self, task: PullTask, message: PullEnded) -> None:
        order = task.order
        if message.complete and message.blob is not None:
            self._copies[order.move_id] = message.blob, task.hashes
            while len(self._copies) > COPIES_MAX:
                self._copies.popitem(last=False)
        self.moves.copied(
            order.move_id, order.step, message.complete, message.reason, message.bytes_copied
        )

    def _complete(self, order: Order) -> bool:
        """Whether every page of the session's record is on this rank's disk."""
        copy = self._copies.get(order.move_id)
        return copy is not None and self._store.prefix_length(copy[1]) == len(copy[1])

    def _switch(self, order: Order, key: SessionKey, target: str) -> Reply:
        known = self._driver.sessions.get(key)
        epoch = -1 if known is None else known.owner_epoch
        copy = self._copies.get(order.move_id)
        reply = self.moves.may_switch(order, epoch, known is not None or copy is not None)
        if not reply.ok or epoch >= order.epoch:
            return reply
        if copy is None or not self._learn(copy[0], order.epoch):
            self._driver.sessions.own(key, order.epoch)
        self._copies.pop(order.move_id, None)
        self.moves.switched(order)
        self._driver.keeper.save(self._driver.now_seconds)
        if target != "nvme":
            # The session is here because it will be needed here.
            name = f"adv-{order.move_id}"
            self._advise(PullOrder("", "", 0.0, session=key, target=target, advisory_id=name))
        return reply

    def lease_ended(self, now_seconds: float) -> bool:
        """Rank 0: whether the time must be told to every rank, for a router has fallen silent."""
        return self.moves.lease_ended(now_seconds)

    def expire(self, but: str = "") -> None:
        """Every rank, in one step: end the moves whose router has been silent for a lease."""
        for move_id in self.moves.expire(self._driver.now_seconds, but):
            logger.warning("move %s ends: its router is silent", move_id)
            self._drop(move_id)

    def _drop(self, move_id: str) -> None:
        self._copies.pop(move_id, None)
        for task in self._tasks.values():
            if task.order.move_id == move_id and task.state not in ENDED:
                task.canceller.cancel()

    def _reclaim(self, order: Order, key: SessionKey) -> Reply:
        known = self._driver.sessions.get(key)
        owned = known is not None and self._driver.sessions.own(key, order.epoch)
        self._driver.keeper.save(self._driver.now_seconds)
        return Reply(order.move_id, order.step, "", owned, reason="" if owned else "no_record")

    def _release(self, order: Order, key: SessionKey) -> Reply:
        """The session lives elsewhere: forget it; its pages become ordinary ones."""
        known = self._driver.sessions.get(key)
        if known is not None and known.owner_epoch < order.epoch:
            self._released += 1
            self._driver.sessions.forget(key)
            self._driver.keeper.save(self._driver.now_seconds)
            if not self._driver.sessions.find(key.session_id):
                cancel = AdvisoryAction(verb="cancel", session_id=key.session_id)
                self._driver.receive(AdvisoryBatch([cancel], self._driver.now_seconds))
        return Reply(order.move_id, order.step, "", True)

    # --------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """For ``GET /symphony/residency``: where a puller finds this worker, and counters."""
        host, port = self.server.settings.host, self.server.port - self._rank
        wildcard = host in ("0.0.0.0", "::")
        bracketed = f"[{host}]" if ":" in host else host
        return {
            "host": None if wildcard else host,
            "port": port,
            "address": None if wildcard else f"{bracketed}:{port}",
            "ranks": self._ranks,
            "encrypted": self._encrypted,
            "transfer": self._transfer,
            "pulls": len(self._waiting),
            "moves": len(self.moves),
            "counters": {
                **self.server.counters.as_json(),
                "pages_from_host": 0 if self._host is None else self._host.pages_from_host,
            },
        }

    def close(self) -> None:
        """Stop serving; pulls under way are cancelled."""
        for task in self._tasks.values():
            if task.state not in ENDED:
                task.canceller.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self.server.close()
