"""The book of advisories: every way a hint can live and end."""

from __future__ import annotations

import dataclasses

import pytest

from symphony_sglang.core.advisory import AdvisoryBook
from symphony_sglang.core.levels import Hop, Target
from symphony_sglang.core.lifecycle import (
    FINAL_STATES,
    LIVE_STATES,
    NEXT,
    TIMELINE_MAX,
    AdviseRequest,
    BookLimits,
    Event,
    Kind,
    State,
    Status,
    advance,
)
from symphony_sglang.core.moves import Move, MoveResult, Reason
from symphony_sglang.core.prefix import NO_NAMESPACE, Namespace, Prefix, pack_tokens
from symphony_sglang.errors import IllegalTransitionError

PAGE = 4


def prefix_of(tokens: int, start: int = 0, namespace: Namespace = NO_NAMESPACE) -> Prefix:
    return Prefix(namespace, pack_tokens(range(start, start + tokens)))


def ask(advisory_id: str = "a1", identity: str | None = None, **changes: object) -> AdviseRequest:
    request = AdviseRequest(advisory_id, identity or f"session:{advisory_id}", advisory_id)
    return dataclasses.replace(request, **changes)


@pytest.fixture
def book():
    book = AdvisoryBook(PAGE)
    yield book
    book.check()


def move(book, advisory_id, hop, start, stop, now, result=MoveResult.DONE):
    book.begin(Move(advisory_id, hop, start, stop), now)
    tokens = stop - start if result is MoveResult.DONE else 0
    book.finish(advisory_id, hop, result, tokens, tokens * 10, now)


def promote(book, advisory_id="a1", now=1.0):
    """Twelve tokens from NVMe to the device."""
    book.observe(advisory_id, 0, 0, now)
    move(book, advisory_id, Hop.NVME_TO_HOST, 0, 12, now)
    book.observe(advisory_id, 0, 12, now)
    move(book, advisory_id, Hop.HOST_TO_DEVICE, 0, 12, now)
    book.observe(advisory_id, 12, 0, now)


def test_a_promotion_passes_through_every_state_and_is_used(book):
    receipt = book.advise(ask(expected_in_seconds=2.0), prefix_of(14), 0.0)
    assert (receipt.status, receipt.state) == (Status.ACCEPTED, State.QUEUED)
    assert receipt.tokens["goal"] == 12, "whole pages only"
    promote(book)
    receipt = book.arrive("a1", 14, 12, 3.0)
    assert [entry.state.value for entry in receipt.timeline] == [
        "queued",
        "staging",
        "loading",
        "ready",
        "used",
    ]
    assert receipt.timeline[-1].seconds == 3.0
    assert receipt.bytes == {"nvme_to_host": 120, "host_to_device": 120}
    (end,) = book.take_ended()
    assert (end.state, end.lead_seconds, end.ready_seconds) == (State.USED, 3.0, 1.0)
    assert book.take_ended() == ()
    assert book.receipt("a1") == receipt, "the receipt outlives the advisory"


def test_what_is_on_the_device_already_is_ready_without_a_move(book):
    book.advise(ask(), prefix_of(12), 0.0)
    book.observe("a1", 12, 0, 0.5)
    assert book.receipt("a1").state is State.READY
    assert book.tick(60.0) == ("a1",)
    assert book.receipt("a1").state is State.EXPIRED, "it cost nothing, so nothing was wasted"


def test_host_target_is_ready_on_host(book):
    book.advise(ask(target=Target.HOST), prefix_of(12), 0.0)
    book.observe("a1", 4, 8, 0.5)
    assert book.receipt("a1").state is State.READY


def test_a_request_that_comes_first_makes_it_late(book):
    book.advise(ask(), prefix_of(12), 0.0)
    book.observe("a1", 0, 12, 0.1)
    book.begin(Move("a1", Hop.HOST_TO_DEVICE, 0, 12), 0.1)
    # SGLang publishes the device slots when the copy is queued: that is not being there.
    book.observe("a1", 12, 0, 0.1)
    assert book.receipt("a1").state is State.LOADING
    receipt = book.arrive("a1", 12, 12, 0.2)
    assert receipt.state is State.LATE
    assert book.flying(Hop.HOST_TO_DEVICE) == 1, "the transfer goes on for the request"
    book.finish("a1", Hop.HOST_TO_DEVICE, MoveResult.DONE, 12, 120, 0.3)
    assert book.receipt("a1").bytes["host_to_device"] == 120
    assert book.receipt("a1").state is State.LATE
    assert book.flying(Hop.HOST_TO_DEVICE) == 0


def test_a_request_that_never_comes_wastes_what_was_moved(book):
    book.advise(ask(expires_in_seconds=5.0), prefix_of(12), 0.0)
    promote(book)
    assert book.tick(4.999) == ()
    assert book.tick(5.0) == ("a1",)
    assert book.receipt("a1").state is State.WASTED
    assert book.take_ended()[0].moved_tokens == 24


def test_a_request_with_another_prefix_is_no_use(book):
    book.advise(ask(), prefix_of(12), 0.0)
    promote(book)
    receipt = book.arrive("a1", 3, 0, 2.0)
    assert (receipt.state, receipt.reason) == (State.WASTED, Reason.DIVERGED)


def test_a_request_that_shares_the_head_uses_it(book):
    book.advise(ask(), prefix_of(12), 0.0)
    promote(book)
    assert book.arrive("a1", 9, 8, 2.0).state is State.USED


def test_ready_pages_that_are_gone_at_arrival_were_reclaimed(book):
    book.advise(ask(), prefix_of(12), 0.0)
    promote(book)
    receipt = book.arrive("a1", 12, 4, 2.0)
    assert (receipt.state, receipt.reason) == (State.RECLAIMED, Reason.EVICTED)


def test_giving_way_queues_again_and_then_reclaims_for_good(book):
    book.advise(ask(), prefix_of(12), 0.0)
    for turn in range(book.limits.yields_max):
        promote(book, now=1.0 + 10 * turn)
        book.give_way("a1", 2.0 + 10 * turn)
        assert book.receipt("a1").state is State.QUEUED
        assert book.views()[0].not_before_seconds > 2.0 + 10 * turn
    promote(book, now=40.0)
    book.give_way("a1", 41.0)
    assert book.receipt("a1").state is State.RECLAIMED


def test_an_advisory_that_gave_way_and_is_missed_counts_as_reclaimed(book):
    book.advise(ask(), prefix_of(12), 0.0)
    promote(book)
    book.give_way("a1", 2.0)
    assert book.arrive("a1", 12, 0, 2.5).state is State.RECLAIMED


def test_eviction_found_by_a_look_up_is_like_giving_way(book):
    book.advise(ask(), prefix_of(12), 0.0)
    promote(book)
    book.observe("a1", 4, 8, 2.0)
    assert book.receipt("a1").state is State.QUEUED


def test_unknown_session_is_missing_and_has_a_receipt(book):
    receipt = book.advise(ask(), None, 0.0)
    assert (receipt.status, receipt.state) == (Status.MISSING, State.FAILED)
    assert receipt.reason == "unknown_session"
    assert book.receipt("a1") == receipt
    assert len(book) == 0


def test_prefix_shorter_than_a_page_is_rejected(book):
    receipt = book.advise(ask(), prefix_of(PAGE - 1), 0.0)
    assert (receipt.status, receipt.reason) == (Status.REJECTED, "shorter_than_a_page")


def test_reused_advisory_id_changes_nothing(book):
    book.advise(ask(), prefix_of(12), 0.0)
    before = book.receipt("a1")
    receipt = book.advise(ask(identity="another"), prefix_of(8), 1.0)
    assert (receipt.status, receipt.reason) == (Status.REJECTED, "advisory_id_in_use")
    assert book.receipt("a1") == before
    book.cancel("a1", 2.0)
    assert book.advise(ask(), prefix_of(8), 3.0).status is Status.REJECTED


def test_duplicates_renew_the_first(book):
    book.advise(ask("a1", "session:s"), prefix_of(12), 0.0)
    receipt = book.advise(
        ask("a2", "session:s", expected_in_seconds=3.0, expires_in_seconds=30.0, priority=7),
        prefix_of(12),
        50.0,
    )
    assert (receipt.status, receipt.advisory_id) == (Status.DUPLICATE, "a1")
    assert book.get("a2") is None
    (view,) = book.views()
    assert (view.deadline_seconds, view.priority) == (53.0, 7)
    assert book.tick(79.0) == ()
    assert book.tick(80.0) == ("a1",)
    assert book.advise(ask("a3", "session:s"), prefix_of(12), 81.0).status is Status.ACCEPTED


def test_a_duplicate_may_bring_the_expiry_forward(book):
    book.advise(ask("a1", "session:s"), prefix_of(12), 0.0)
    book.advise(ask("a2", "session:s", expires_in_seconds=1.0), prefix_of(12), 1.0)
    assert book.tick(2.0) == ("a1",)


@pytest.mark.parametrize(
    "change", [{"target": Target.HOST}, {"kind": Kind.RETAIN}, {"identity": "session:t"}]
)
def test_another_target_kind_or_prefix_is_no_duplicate(book, change):
    book.advise(ask("a1", "session:s"), prefix_of(12), 0.0)
    second = ask(**{"advisory_id": "a2", "identity": "session:s", **change})
    assert book.advise(second, prefix_of(12), 0.0).status is Status.ACCEPTED


def test_a_storm_of_duplicates_is_one_advisory(book):
    for number in range(5000):
        book.advise(ask(f"a{number}", "session:s"), prefix_of(12), number / 10_000)
    assert len(book) == 1
    assert book.get("a0").coalesced == 4999


def test_advise_cancel_storms_leave_nothing_but_bounded_history():
    book = AdvisoryBook(PAGE, BookLimits(finished_max=100))
    for number in range(5000):
        book.advise(ask(f"a{number}", "session:s"), prefix_of(12), float(number))
        book.cancel(f"a{number}", float(number))
    assert len(book) == 0
    assert book.get("a4899") is None
    assert book.receipt("a4900").state is State.CANCELLED
    assert len(book.take_ended()) == 100
    book.check()


def test_cancel_of_unknown_ended_and_noted_ids_is_harmless(book):
    assert book.cancel("nobody", 0.0) is None
    book.advise(ask(), prefix_of(12), 0.0)
    assert book.cancel("a1", 1.0).state is State.CANCELLED
    assert book.cancel("a1", 2.0).timeline[-1].seconds == 1.0
    book.note(ask("done"), Status.ACCEPTED, "", 3.0, State.READY)
    assert book.cancel("done", 4.0).state is State.READY


def test_cancel_session_ends_all_of_its_advisories(book):
    for advisory_id, target in (("a1", Target.DEVICE), ("a2", Target.HOST)):
        request = ask(advisory_id, "session:s", target=target, session_id="s")
        book.advise(request, prefix_of(12), 0.0)
    book.advise(ask("a3", "session:t"), prefix_of(12), 0.0)
    assert [receipt.advisory_id for receipt in book.cancel_session("s", 1.0)] == ["a1", "a2"]
    assert book.cancel_session("s", 1.0) == ()
    assert len(book) == 1


def test_flush_fails_all_and_forgets_flights(book):
    book.advise(ask("a1"), prefix_of(12), 0.0)
    book.advise(ask("a2"), prefix_of(12), 0.0)
    book.observe("a1", 0, 0, 0.0)
    book.begin(Move("a1", Hop.NVME_TO_HOST, 0, 12), 0.0)
    assert book.flush(1.0) == ("a1", "a2")
    assert book.receipt("a1").state is State.FAILED
    assert book.receipt("a1").reason == "cache_flushed"
    assert book.moves() == ()
    book.finish("a1", Hop.NVME_TO_HOST, MoveResult.DONE, 12, 120, 2.0)
    assert book.receipt("a1").bytes["nvme_to_host"] == 0, "a dropped move's end is ignored"


def test_a_short_move_reveals_the_end_of_what_is_stored(book):
    book.advise(ask(), prefix_of(12), 0.0)
    book.observe("a1", 0, 0, 0.0)
    assert book.receipt("a1").tokens["unknown"] == 12
    book.begin(Move("a1", Hop.NVME_TO_HOST, 0, 12), 0.0)
    book.finish("a1", Hop.NVME_TO_HOST, MoveResult.SHORT, 8, 80, 0.1)
    book.observe("a1", 0, 8, 0.1)
    assert book.views()[0].storage_end_tokens == 8
    assert book.receipt("a1").tokens["missing"] == 4


def test_declined_moves_are_retried_later_and_then_clipped(book):
    book.advise(ask(), prefix_of(12), 0.0)
    delays = []
    for _ in range(book.limits.retries_max):
        book.observe("a1", 0, 4, 0.0)
        move(book, "a1", Hop.NVME_TO_HOST, 4, 12, 0.0, MoveResult.DECLINED)
        delays.append(book.views()[0].not_before_seconds)
    assert delays == sorted(delays)
    assert delays[0] < delays[1] <= book.limits.backoff_max_seconds
    book.observe("a1", 0, 4, 0.0)
    move(book, "a1", Hop.NVME_TO_HOST, 4, 12, 0.0, MoveResult.DECLINED)
    receipt = book.receipt("a1")
    assert (receipt.status, receipt.reason) == (Status.CLIPPED, "move_failed")
    assert receipt.tokens["goal"] == 4


def test_disk_errors_end_an_advisory_that_has_nothing_else(book):
    book.advise(ask(), prefix_of(12), 0.0)
    for _ in range(book.limits.errors_max + 1):
        assert book.receipt("a1").state in LIVE_STATES
        book.observe("a1", 0, 0, 0.0)
        move(book, "a1", Hop.NVME_TO_HOST, 0, 12, 0.0, MoveResult.ERROR)
    receipt = book.receipt("a1")
    assert (receipt.state, receipt.reason) == (State.FAILED, "move_failed")


def test_a_clip_to_nothing_says_why(book):
    book.advise(ask("a1"), prefix_of(12), 0.0)
    book.clip("a1", 3, Reason.NOT_STORED, 1.0)
    assert book.receipt("a1").status is Status.MISSING
    book.advise(ask("a2"), prefix_of(12), 0.0)
    book.clip("a2", 0, Reason.NVME_SLOWER, 1.0)
    assert book.receipt("a2").status is Status.REJECTED
    assert book.receipt("a2").reason == "nvme_slower_than_recompute"


def test_deferral_shows_until_the_first_move(book):
    book.advise(ask(), prefix_of(12), 0.0)
    book.defer("a1", Reason.DEMAND_FIRST)
    receipt = book.receipt("a1")
    assert (receipt.status, receipt.reason) == (Status.DEFERRED, "requests_first")
    book.observe("a1", 0, 12, 0.0)
    book.begin(Move("a1", Hop.HOST_TO_DEVICE, 0, 12), 1.0)
    assert book.receipt("a1").status is Status.ACCEPTED
    assert book.receipt("a1").reason == ""


def test_retention_outlives_the_requests_it_serves(book):
    book.advise(ask(kind=Kind.RETAIN, expires_in_seconds=10.0), prefix_of(12), 0.0)
    book.observe("a1", 8, 4, 0.0)
    receipt = book.receipt("a1")
    assert (receipt.status, receipt.state) == (Status.CLIPPED, State.READY)
    assert receipt.tokens["goal"] == 8, "it keeps what is there and brings nothing"
    assert book.arrive("a1", 12, 8, 1.0).state is State.READY
    book.tick(10.0)
    assert book.receipt("a1").state is State.USED


def test_retention_of_nothing_is_missing_and_unused_retention_expires(book):
    book.advise(ask("a1", kind=Kind.RETAIN), prefix_of(12), 0.0)
    book.observe("a1", 0, 12, 0.0)
    assert book.receipt("a1").status is Status.MISSING
    book.advise(ask("a2", kind=Kind.RETAIN), prefix_of(12), 0.0)
    book.observe("a2", 12, 0, 0.0)
    book.tick(60.0)
    assert book.receipt("a2").state is State.EXPIRED


def test_full_book_rejects_and_gives_way_only_to_higher_priority():
    book = AdvisoryBook(PAGE, BookLimits(live_max=2))
    book.advise(ask("a1", priority=1), prefix_of(12), 0.0)
    book.advise(ask("a2", priority=1), prefix_of(12), 0.0)
    receipt = book.advise(ask("a3", priority=1), prefix_of(12), 0.0)
    assert (receipt.status, receipt.reason) == (Status.REJECTED, "book_full")
    assert book.advise(ask("a4", priority=2), prefix_of(12), 0.0).status is Status.ACCEPTED
    assert book.receipt("a2").state is State.RECLAIMED, "the youngest of the lowest goes"
    book.observe("a1", 12, 0, 0.0)
    book.observe("a4", 12, 0, 0.0)
    assert book.advise(ask("a5", priority=9), prefix_of(12), 0.0).status is Status.REJECTED
    book.check()


def test_token_ids_of_live_advisories_are_bounded():
    book = AdvisoryBook(PAGE, BookLimits(held_bytes_max=100))
    assert book.advise(ask("a1"), prefix_of(20), 0.0).status is Status.ACCEPTED
    assert book.advise(ask("a2"), prefix_of(20), 0.0).reason == "book_full"
    book.cancel("a1", 0.0)
    assert book.advise(ask("a3"), prefix_of(20), 0.0).status is Status.ACCEPTED
    book.check()


def test_a_prompt_finds_its_session_and_the_content_it_starts_with(book):
    book.advise(ask("own", "session:s", session_id="s"), prefix_of(12), 0.0)
    book.advise(ask("content", "content:x", session_id=None), prefix_of(8), 0.0)
    book.advise(ask("longer", "content:y", session_id=None), prefix_of(40), 0.0)
    book.advise(ask("other", "session:t", session_id="t"), prefix_of(12), 0.0)
    salted = ask("salted", "content:z", session_id=None)
    book.advise(salted, prefix_of(8, namespace=Namespace(None, "salt")), 0.0)
    prompt = prefix_of(10).token_bytes
    assert book.matching("s", NO_NAMESPACE, prompt) == (("own", 10), ("content", 8))
    assert book.matching(None, NO_NAMESPACE, prompt) == (("content", 8),)
    assert book.matching("s", Namespace(None, "salt"), prompt) == (("salted", 8),)


def test_every_unlisted_pair_raises():
    legal = 0
    for state in State:
        for event in Event:
            if (state, event) in NEXT:
                advance(state, event)
                legal += 1
            else:
                with pytest.raises(IllegalTransitionError, match=event.value):
                    advance(state, event)
    assert legal == len(NEXT)
    assert all(state in LIVE_STATES for state, _ in NEXT), "final states have no way out"
    assert {NEXT[pair] for pair in NEXT} == set(State), "every state can be reached"


def test_the_words_of_the_contract_are_exact():
    words = "queued staging loading ready used late wasted expired cancelled reclaimed failed"
    assert [state.value for state in State] == words.split()
    words = "accepted clipped deferred rejected missing duplicate unsupported"
    assert [status.value for status in Status] == words.split()
    assert [*LIVE_STATES, *FINAL_STATES] == list(State)


def test_a_full_timeline_keeps_its_beginning_and_its_end():
    book = AdvisoryBook(PAGE, BookLimits(yields_max=TIMELINE_MAX))
    book.advise(ask(expires_in_seconds=1e9), prefix_of(12), 0.0)
    for turn in range(TIMELINE_MAX):
        book.observe("a1", 12, 0, float(turn))
        book.give_way("a1", float(turn))
    book.cancel("a1", 1e6)
    timeline = book.receipt("a1").timeline
    assert len(timeline) == TIMELINE_MAX
    assert (timeline[0].state, timeline[-1].state) == (State.QUEUED, State.CANCELLED)
    book.check()


def test_receipt_json_has_the_contract_fields(book):
    body = book.advise(ask(action_id="x"), prefix_of(12), 0.0).as_json("worker-1")
    assert list(body) == [
        "advisory_id",
        "action_id",
        "status",
        "reason",
        "session_id",
        "worker",
        "state",
        "tokens",
        "bytes",
        "timeline",
    ]
    assert body["timeline"] == [["queued", 0.0]]
    assert body["worker"] == "worker-1"
    assert {"total", "device", "host", "nvme", "peer", "missing"} <= body["tokens"].keys()
