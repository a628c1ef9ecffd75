"""Work at each worker: its last report, brought up to date by what was sent since. Pure.

A report is old when it arrives, and a router that goes by it alone sends every request of a burst
to the same idle worker. One that goes by its own count alone does not see other routers. So a view
is the report plus the requests of this router that the report cannot know of.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from symphony_sglang.core.routing_types import NO_LOAD, LoadView


@dataclass(frozen=True, slots=True)
class LoadLimits:
    """Times that decide which account to trust.

    Attributes:
        transit_seconds: A request sent this long before a report came may not be in it. Counted
            twice is better than not at all.
        stale_seconds: A report older than this says nothing: the router's own count stands alone.
    """

    transit_seconds: float = 0.03
    stale_seconds: float = 10.0

    def __post_init__(self) -> None:
        assert 0 <= self.transit_seconds < self.stale_seconds, self


@dataclass(slots=True)
class Sent:
    """A request on its way, or running, at a worker."""

    uncached_tokens: int
    input_tokens: int
    sent_seconds: float
    first_token: bool = False


@dataclass(slots=True)
class _Account:
    report: LoadView = NO_LOAD
    report_seconds: float | None = None
    sent: dict[str, Sent] = field(default_factory=dict)
    view: LoadView | None = None  # None: to be made anew


class LoadLedger:
    """Reports and requests in flight of all workers. Its size is that of the requests in flight."""

    def __init__(self, limits: LoadLimits | None = None) -> None:
        self.limits = LoadLimits() if limits is None else limits
        self._accounts: dict[str, _Account] = {}
        self._workers: dict[str, str] = {}  # request -> worker

    def sent(
        self,
        worker_id: str,
        request_id: str,
        uncached_tokens: int,
        input_tokens: int,
        now_seconds: float,
    ) -> None:
        """A request goes to a worker; sent again under the same id, it leaves the one before."""
        self.ended(request_id)
        account = self._account(worker_id)
        account.sent[request_id] = Sent(uncached_tokens, input_tokens, now_seconds)
        account.view = None
        self._workers[request_id] = worker_id

    def first_token(self, request_id: str) -> None:
        """Its prefill is over; unknown requests are fine."""
        worker_id = self._workers.get(request_id)
        if worker_id is not None:
            account = self._accounts[worker_id]
            account.sent[request_id].first_token = True
            account.view = None

    def ended(self, request_id: str) -> None:
        """Answered, failed or aborted; unknown requests are fine."""
        worker_id = self._workers.pop(request_id, None)
        if worker_id is not None:
            account = self._accounts[worker_id]
            del account.sent[request_id]
            account.view = None

    def reported(self, worker_id: str, report: LoadView, now_seconds: float) -> None:
        """A worker's own account; its `requests_in_flight` is not looked at."""
        account = self._account(worker_id)
        account.report, account.report_seconds, account.view = report, now_seconds, None

    def _account(self, worker_id: str) -> _Account:
        account = self._accounts.get(worker_id)
        if account is None:
            account = self._accounts[worker_id] = _Account()
        return account

    def forget_worker(self, worker_id: str) -> None:
        account = self._accounts.pop(worker_id, None)
        for request_id in () if account is None else account.sent:
            del self._workers[request_id]

    def view(self, worker_id: str, now_seconds: float) -> LoadView:
        """The worker's load now; the same object until something changes."""
        account = self._accounts.get(worker_id)
        if account is None:
            return NO_LOAD
        reported = account.report_seconds
        if reported is not None and now_seconds - reported > self.limits.stale_seconds:
            # Its rates of memory and decoding are the best there is; its counts are not.
            account.report_seconds = reported = None
            account.report = replace(
                account.report, requests_running=0, requests_waiting=0, tokens_waiting_uncached=0
            )
            account.view = None
        if account.view is None:
            account.view = self._make(account)
        return account.view

    def _make(self, account: _Account) -> LoadView:
        report, reported = account.report, account.report_seconds
        cutoff = float("-inf") if reported is None else reported - self.limits.transit_seconds
        waiting = uncached = running = 0
        for sent in account.sent.values():
            if sent.first_token:
                running += 1
            elif sent.sent_seconds > cutoff:
                waiting += 1
                uncached += sent.uncached_tokens
        return replace(
            report,
            requests_running=report.requests_running if reported is not None else running,
            requests_waiting=report.requests_waiting + waiting,
            tokens_waiting_uncached=report.tokens_waiting_uncached + uncached,
            requests_in_flight=len(account.sent),
        )

    def check(self) -> None:
        """Each request in flight is at exactly one worker."""
        counted = {r: w for w, account in self._accounts.items() for r in account.sent}
        assert counted == self._workers
