"""The ``/symphony`` routes of the router: advisories, sessions, residency and moves."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import uuid
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import msgspec

from symphony_sglang.clock import Clock
from symphony_sglang.core import hints
from symphony_sglang.core.budget import CallerLimits
from symphony_sglang.core.levels import Target
from symphony_sglang.core.parent_hints import ParentHint
from symphony_sglang.core.prefix import NO_NAMESPACE
from symphony_sglang.core.routing_types import AdvisedPlace, AdvisoryChoice, RouteRequest
from symphony_sglang.errors import HintError, NoWorkerError
from symphony_sglang.router.advisories import Advisory, AdvisoryMemory
from symphony_sglang.router.advisory_budget import AdvisoryBudget
from symphony_sglang.router.background import Background
from symphony_sglang.router.errands import Errand, detail_of, empty_receipt, mark_peer
from symphony_sglang.router.errors import ApiError
from symphony_sglang.router.headers import worker_headers
from symphony_sglang.router.health import HealthMonitor
from symphony_sglang.router.http import Request
from symphony_sglang.router.moves import Mover
from symphony_sglang.router.moves_receipts import move_id_of, move_receipt
from symphony_sglang.router.moves_share import holder, share
from symphony_sglang.router.placement import Placed, Placement
from symphony_sglang.router.registry import Worker, WorkerRegistry
from symphony_sglang.router.sessions import session_key
from symphony_sglang.router.tokens import NO_TOKENS, Prompt, Tokens
from symphony_sglang.router.upstream import UpstreamError
from symphony_sglang.telemetry.router import RouterMetrics

logger = logging.getLogger(__name__)

ASK_SECONDS_MAX = 10.0
READY_STATES = ("ready",)
FAILED_STATUSES = ("missing", "rejected", "unsupported", "deferred")


class SymphonyDesk:
    """Handlers; each answers its request."""

    def __init__(
        self,
        *,
        registry: WorkerRegistry,
        placement: Placement,
        health: HealthMonitor,
        mover: Mover,
        metrics: RouterMetrics,
        clock: Clock,
        background: Background,
        limits: CallerLimits,
    ) -> None:
        self.memory = AdvisoryMemory()
        self.budget = AdvisoryBudget(limits, clock, self._state_of)
        self._background = background
        self._registry = registry
        self._placement = placement
        self._health = health
        self._mover = mover
        self._metrics = metrics
        self._clock = clock
        placement.advised_places = lambda key: self.memory.places(key, clock.monotonic())
        placement.promise = self.memory.promise
        placement.taken = self._taken
        registry.events.removed.append(self._on_removed)

    def _on_removed(self, worker: Worker) -> None:
        for domain_id in worker.domain_ids:
            self.memory.forget_worker(domain_id)

    def tick(self) -> None:
        self.memory.expire(self._clock.monotonic())

    def check(self) -> None:
        self.memory.check()
        self.budget.check()

    # Advisories -------------------------------------------------------------------------------

    async def advise(self, request: Request) -> None:
        """Take hints, send each to the worker that should serve the session's next turn."""
        body = request.json()
        try:
            message = hints.parse_advise(body)
        except HintError as error:
            raise ApiError(400, "invalid_hint", str(error)) from None
        caller = await self.budget.admit(request, max(1, len(message.hints)))
        raws = body["actions"] if "actions" in body else [None] * len(message.hints)
        message_id = message.message_id or f"msg-{uuid.uuid4().hex}"
        errands = [
            await self._errand(position, raw, hint)
            for position, (raw, hint) in enumerate(zip(raws, message.hints, strict=True))
        ]
        by_worker: dict[str, list[Errand]] = {}
        for errand in errands:
            if errand.receipt:
                self._take_receipt(errand)
            else:
                by_worker.setdefault(errand.worker.worker_id, []).append(errand)
        short = body if "actions" not in body and "protocol_version" not in body else None
        await asyncio.gather(
            *(self._forward(request, message_id, group, short) for group in by_worker.values())
        )
        now = self._clock.monotonic()
        for errand in errands:
            self._metrics.advised(str(errand.receipt.get("status", "rejected")))
            if isinstance(errand.hint.action, hints.Prefetch | hints.Retain):
                expires = now + float(errand.hint.action.expires_in_seconds)
                self.budget.took(caller, errand.receipt, expires)
        receipts = [errand.receipt for errand in errands]
        request.reply_json(202, {"message_id": message_id, "receipts": receipts})

    async def advise_parent(self, request: Request, hint: ParentHint, key: str) -> None:
        """Carry out what a sub-agent's request says of its parent; nobody waits for it.

        While the sub-agent works, the parent is kept where it is. When it is the parent's turn, it
        is prepared where that turn should be served.
        """
        [parsed] = hint.message.hints
        try:
            if hint.final:
                errand = await self._errand(0, hint.action, parsed)
            else:
                place = self._placement.index.session(key)
                here = self._mover.place(key) or (place.worker_id if place else None)
                errand = self._errand_to(0, hint.action, parsed, here)
                errand.key = key
            if errand.receipt:
                self._take_receipt(errand)
            else:
                await self._forward(request, f"msg-{uuid.uuid4().hex}", [errand], None)
        except ApiError as error:
            logger.info("a sub-agent's hint about %r was not taken: %s", hint.parent_id, error)
            return
        self._metrics.advised(str(errand.receipt.get("status", "rejected")))

    async def _errand(self, position: int, raw: Any, hint: hints.Hint) -> Errand:
        action = hint.action
        if isinstance(action, hints.Cancel) and action.advisory_id is not None:
            known = self.memory.find(action.advisory_id)
            if known is not None:
                return self._errand_to(position, raw, hint, known.domain_id)
        selector = getattr(action, "selector", None)
        if selector is None:
            return self._errand_to(position, raw, hint, None)
        route = await self._route_of(selector)
        if isinstance(action, hints.Share):
            return await self._share(position, raw, hint, action, route)
        if not isinstance(action, hints.Prefetch | hints.Retain):
            place = self._placement.index.session(route.session_id or "")
            if place is not None:
                errand = self._errand_to(position, raw, hint, place.worker_id)
                errand.key = route.session_id
                return errand
        try:
            choice = self._placement.choose_for_advisory(route)
        except NoWorkerError as error:
            raise ApiError(503, "no_available_workers", str(error)) from None
        errand = self._errand_to(position, raw, hint, choice.worker_id)
        errand.choice, errand.key = choice, route.session_id
        if isinstance(action, hints.Prefetch):
            errand = self._move_or_stay(errand, choice)
            self._placement.policy.advised(route, errand.choice or choice, self._clock.monotonic())
        return errand

    async def _share(
        self, position: int, raw: Any, hint: hints.Hint, action: hints.Share, route: RouteRequest
    ) -> Errand:
        """A copy to the worker that the hint names, from whoever has most of it."""
        source = holder(self._placement.index, route)
        receipt = await share(self._registry, self._health, action, source, hint.action_id)
        errand = self._errand_to(position, raw, hint, receipt["worker"])
        errand.receipt, errand.domain_id = receipt, receipt["worker"] or ""
        return errand

    def _move_or_stay(self, errand: Errand, choice: AdvisoryChoice) -> Errand:
        """A session whose next turn belongs elsewhere moves; one that cannot is prepared where it
        is."""
        key = errand.key
        if key is None:
            return errand
        record = self._mover.advise(key, choice)
        if record is not None:
            errand.receipt = move_receipt(record, errand.hint.action_id)
            return errand
        owner = self._mover.place(key)
        if owner is None or owner == errand.domain_id:
            return errand
        stay = self._errand_to(errand.position, errand.raw, errand.hint, owner)
        stay.key = key
        stay.choice = dataclasses.replace(choice, worker_id=stay.domain_id, source_worker_id=None)
        return stay

    def _errand_to(
        self, position: int, raw: Any, hint: hints.Hint, domain_id: str | None
    ) -> Errand:
        """To a domain, or where it is not known, to any worker that may take it."""
        found = self._registry.domain(domain_id) if domain_id else None
        if found is not None:
            return Errand(position, raw, hint, domain_id or "", found[0])
        for worker in self._registry.healthy():
            return Errand(position, raw, hint, worker.domain_ids[0], worker)
        raise ApiError(503, "no_available_workers", "No healthy workers available")

    async def _route_of(self, selector: hints.Selector) -> RouteRequest:
        """What is known of the prefix that a hint means."""
        key, count, tokens = None, 0, NO_TOKENS
        sizes = self._placement.page_sizes()
        if selector.session_id is not None:
            key = session_key(selector.session_id, selector.namespace)
            place = self._placement.index.session(key)
            count = place.total_tokens if place else 0
            tokens = await self._in_thread(
                self._placement.tokens.known, selector.session_id, sizes, selector.namespace
            )
        else:
            prompt = Prompt(
                text=selector.text,
                input_ids=list(selector.input_ids) if selector.input_ids else None,
                chat={"messages": list(selector.messages)} if selector.messages else None,
            )
            tokens = await self._in_thread(
                self._placement.tokens.tokens, prompt, sizes, None, selector.namespace
            )
        return RouteRequest(
            request_id="advisory",
            input_tokens=max(1, count, tokens.length),
            page_hashes=tokens.page_hashes,
            session_id=key,
        )

    async def _in_thread(self, work: Any, *arguments: Any) -> Tokens:
        try:
            return await self._placement.in_thread(work, *arguments)
        except (ValueError, TypeError, OverflowError, TimeoutError):
            return NO_TOKENS

    async def _forward(
        self,
        request: Request,
        message_id: str,
        errands: list[Errand],
        short: Mapping[str, Any] | None,
    ) -> None:
        """Send one worker its hints; each errand gets its receipt."""
        worker = errands[0].worker
        if short is not None:
            body: Any = short
        else:
            actions = [errand.raw for errand in errands]
            body = {"protocol_version": hints.PROTOCOL_VERSION, "message_id": message_id}
            body["actions"] = actions
        status, document = await self._ask(
            worker, "POST", "/symphony/advise", msgspec.json.encode(body), request
        )
        receipts = document.get("receipts") if isinstance(document, dict) else None
        if status == 202 and isinstance(receipts, list) and len(receipts) == len(errands):
            for errand, receipt in zip(errands, receipts, strict=True):
                errand.receipt = receipt if isinstance(receipt, dict) else {}
                self._take_receipt(errand)
            return
        if status in (400, 401, 403, 429):
            raise ApiError(status, "worker_refused", detail_of(document))
        reason = "unsupported_worker" if status in (404, 405, 409) else "worker_unavailable"
        for errand in errands:
            errand.receipt = empty_receipt(errand, reason)
            mark_peer(errand, errand.receipt)

    def _take_receipt(self, errand: Errand) -> None:
        """Complete a worker's receipt, and remember what it promises."""
        receipt = errand.receipt
        receipt["worker"] = errand.domain_id
        mark_peer(errand, receipt)
        advisory_id = receipt.get("advisory_id")
        now = self._clock.monotonic()
        action = errand.hint.action
        expires = now + float(getattr(action, "expires_in_seconds", 60.0))
        if isinstance(advisory_id, str):
            prepares = isinstance(action, hints.Prefetch) and move_id_of(advisory_id) is None
            self.memory.remember(
                Advisory(advisory_id, errand.domain_id, errand.key, expires, now, prepares)
            )
        if not isinstance(action, hints.Prefetch) or errand.key is None:
            if isinstance(action, hints.Release | hints.Cancel | hints.Demote) and errand.key:
                self.memory.withdraw(errand.key)
            return
        if receipt.get("status") in FAILED_STATUSES or action.target is not Target.DEVICE:
            return
        counted = receipt.get("tokens")
        total = counted.get("total", 0) if isinstance(counted, dict) else 0
        wait = 0.0
        if receipt.get("state") not in READY_STATES and errand.choice is not None:
            wait = errand.choice.bring_seconds + errand.choice.cost.pull
        place = AdvisedPlace(errand.domain_id, int(total or 0), now + wait)
        self.memory.promise(errand.key, place, expires)

    def _taken(self, placed: Placed) -> None:
        """A turn is served: what prepares it at other workers need not go on."""
        key = placed.subject.route.session_id or ""
        for advisory in self.memory.taken(key, placed.domain_id, placed.sent_seconds):
            self.memory.withdraw(key, advisory.domain_id)
            found = self._registry.domain(advisory.domain_id)
            if found is not None:
                path = f"/symphony/advisories/{quote(advisory.advisory_id, safe='')}"
                self._background.start(self._cancel(found[0], path), "cancel a hint")

    async def _cancel(self, worker: Worker, path: str) -> None:
        status, _document = await self._ask(worker, "DELETE", path, b"", None)
        logger.debug("%s cancelled at %s: %d", path, worker.url, status)

    async def _state_of(self, advisory_id: str) -> str | None:
        """An advisory's state; where its worker does not answer, it counts as live."""
        known = self.memory.find(advisory_id)
        found = self._registry.domain(known.domain_id) if known else None
        if found is None:
            return None
        path = f"/symphony/advisories/{quote(advisory_id, safe='')}"
        status, document = await self._ask(found[0], "GET", path, b"", None)
        if status == 200 and isinstance(document, dict):
            return str(document.get("state"))
        return None if status == 404 else "unknown"

    async def get_advisory(self, request: Request, advisory_id: str) -> None:
        await self._about_advisory(request, "GET", advisory_id)

    async def cancel_advisory(self, request: Request, advisory_id: str) -> None:
        known = self.memory.find(advisory_id)
        if known is not None and known.session_key is not None:
            self.memory.withdraw(known.session_key, known.domain_id)
        self.budget.ended(request, advisory_id)
        await self._about_advisory(request, "DELETE", advisory_id)

    async def _about_advisory(self, request: Request, method: str, advisory_id: str) -> None:
        known = self.memory.find(advisory_id)
        found = self._registry.domain(known.domain_id) if known else None
        path = f"/symphony/advisories/{quote(advisory_id, safe='')}"
        workers = [found[0]] if found else None
        worker, document = await self._first(method, path, request, workers)
        if document is None or worker is None:
            record = self._mover.move(move_id_of(advisory_id) or "")
            if record is not None:
                request.reply_json(200, move_receipt(record))
                return
            raise ApiError(404, "not_found", f"advisory {advisory_id[:256]!r} is not known")
        document["worker"] = known.domain_id if known and found else worker.worker_id
        request.reply_json(200, document)

    # Sessions ---------------------------------------------------------------------------------

    async def get_session(self, request: Request, session_id: str) -> None:
        place = self._placement.index.session(session_key(session_id, NO_NAMESPACE))
        found = self._registry.domain(place.worker_id) if place else None
        path = f"/symphony/sessions/{quote(session_id, safe='')}"
        worker, document = await self._first("GET", path, request, [found[0]] if found else None)
        if document is None or worker is None:
            raise ApiError(404, "not_found", f"session {session_id[:256]!r} is not known")
        document["worker"] = place.worker_id if place and found else worker.worker_id
        document["moves"] = self._mover.of_session(session_key(session_id, NO_NAMESPACE))
        request.reply_json(200, document)

    async def end_session(self, request: Request, session_id: str) -> None:
        """Tell every worker: more than one may have served it."""
        key = session_key(session_id, NO_NAMESPACE)
        self._mover.session_over(key)
        self.memory.withdraw(key)
        self._placement.policy.forget_session(key)
        self._placement.tokens.forget(session_id)
        path = f"/symphony/sessions/{quote(session_id, safe='')}"
        worker, document = await self._first("DELETE", path, request, None, every=True)
        if document is None or worker is None:
            raise ApiError(404, "not_found", f"session {session_id[:256]!r} is not known")
        document["worker"] = worker.worker_id
        request.reply_json(200, document)

    async def _first(
        self,
        method: str,
        path: str,
        request: Request,
        workers: list[Worker] | None,
        *,
        every: bool = False,
    ) -> tuple[Worker | None, dict[str, Any] | None]:
        """The first of `workers`, or of all, that knows; with `every`, all are told."""
        asked = workers or [worker for worker in self._registry if worker.healthy]
        answers = await asyncio.gather(
            *(self._ask(worker, method, path, b"", request) for worker in asked)
        )
        if workers is not None and not every and answers[0][0] != 200:
            return await self._first(method, path, request, None)
        for worker, (status, document) in zip(asked, answers, strict=True):
            if status == 200 and isinstance(document, dict):
                return worker, document
        for status, document in answers:
            if status in (401, 403, 429):
                raise ApiError(status, "worker_refused", detail_of(document))
        return None, None

    async def _ask(
        self, worker: Worker, method: str, path: str, body: bytes, request: Request | None
    ) -> tuple[int, Any]:
        """Status and JSON of one worker; status 0: it did not answer."""
        headers = None
        if request is not None and not self._health.key(worker):
            headers = [
                pair
                for pair in worker_headers(request, "")
                if pair[0] in (b"authorization", b"x-request-id")
            ]
        try:
            async with asyncio.timeout(ASK_SECONDS_MAX):
                status, answer = await self._health.call(worker, method, path, body, headers)
            return status, msgspec.json.decode(answer)
        except (UpstreamError, TimeoutError):
            return 0, None
        except (msgspec.DecodeError, UnicodeDecodeError):
            return status, None

    # Residency and moves ----------------------------------------------------------------------

    async def residency(self, request: Request) -> None:
        request.reply_json(200, await self.residency_document())

    async def residency_document(self) -> dict[str, Any]:
        """All workers with what each says of itself, and the latest moves."""
        workers = list(self._registry)
        answers = await asyncio.gather(
            *(self._ask(w, "GET", "/symphony/residency", b"", None) for w in workers)
        )
        now = self._clock.monotonic()
        entries = []
        for worker, (status, document) in zip(workers, answers, strict=True):
            body = document if status == 200 and isinstance(document, dict) else {}
            state = worker.state(now).value
            entries.append({**body, "worker": worker.worker_id, "url": worker.url, "state": state})
        return {"workers": entries, "moves": self._mover.recent()}

    async def migrate(self, request: Request) -> None:
        request.reply_json(202, await self._mover.migrate(request.json()))

    async def list_moves(self, request: Request) -> None:
        document = {"moves": self._mover.recent(), "ownership": self._mover.ownership()}
        request.reply_json(200, document)

    async def get_move(self, request: Request, move_id: str) -> None:
        record = self._mover.move(move_id)
        if record is None:
            raise ApiError(404, "not_found", f"move {move_id[:256]!r} is not known")
        request.reply_json(200, record)
