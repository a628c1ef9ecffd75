"""Page transfer over real sockets: what arrives, and what each fault leaves behind."""

from __future__ import annotations

import socket
import threading

import pytest

from symphony_sglang.errors import (
    PeerLostError,
    PeerRefusedError,
)
from symphony_sglang.testing.pages import MemoryPages
from symphony_sglang.wire.local_copy import SPLIT_BYTES_MIN, LocalReader, halves
from symphony_sglang.wire.page_client import ClientSettings
from symphony_sglang.wire.pages import PageOutcome
from symphony_sglang.wire.pull import Canceller, PageState, PullEnd
from wire_world import (
    CLOCK,
    PAGE_BYTES,
    SECRET,
    STREAM,
    Relay,
    body_of,
    chain,
    connect,
    eventually,
    filled,
    identity,
    pull,
    serve,
)

HASHES = chain(57)
LOCAL = ClientSettings(local=True)


def assert_same(sink: MemoryPages, hashes: list[bytes], size: int = PAGE_BYTES) -> None:
    assert sorted(sink.pages) == sorted(hashes)
    for key in hashes:
        assert sink.pages[key] == body_of(key, size), key.hex()
    sink.check()


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("settings", [STREAM, LOCAL], ids=["stream", "local"])
@pytest.mark.parametrize("size", [1, 5_000, PAGE_BYTES, 700_001])
def test_pages_arrive_as_they_were_stored(secret, settings, size) -> None:
    hashes = chain(9 if size > PAGE_BYTES else 57)
    source, sink = filled(hashes, size, pieces=2), MemoryPages(size)
    who = identity(page_bytes=size)
    with serve(source, who=who, secret=secret) as server:
        report = pull(
            server.address, sink, hashes, who=who, secret=secret, settings=settings, page_bytes=size
        )
        assert report.end is PullEnd.COMPLETE, report
        assert report.way == ("local" if settings is LOCAL else "stream")
        assert report.bytes_received == size * len(hashes)
        assert_same(sink, hashes, size)
        eventually(lambda: source.open_count == 0)
        assert server.counters.pages == len(hashes)


def test_short_pages_keep_their_length() -> None:
    hashes = chain(5)
    source, sink = filled(hashes, 100), MemoryPages(PAGE_BYTES)
    source.page_bytes = PAGE_BYTES
    with serve(source) as server:
        assert pull(server.address, sink, hashes).end is PullEnd.COMPLETE
    assert_same(sink, hashes, 100)


def test_what_is_here_is_not_fetched_again() -> None:
    source, sink = filled(HASHES), filled(HASHES[:20])
    with serve(source) as server:
        report = pull(server.address, sink, HASHES)
        assert report.end is PullEnd.COMPLETE
        assert report.bytes_received == 37 * PAGE_BYTES
        assert report.states[:20] == [PageState.PRESENT] * 20
        assert pull(server.address, sink, HASHES).connections == 0


def test_pull_ends_at_the_first_gap() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    del source.pages[HASHES[12]]
    with serve(source) as server:
        report = pull(server.address, sink, HASHES, request_bytes=4 * PAGE_BYTES)
    assert report.end is PullEnd.SHORT
    assert report.pages_here == 12
    # Requests that were under way when the gap was seen, and no more.
    assert len(sink.pages) < 28


@pytest.mark.parametrize("secret", [None, SECRET])
def test_cut_connection_is_resumed_with_what_is_missing(secret) -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    with serve(source, secret=secret) as server:
        relay = Relay(("127.0.0.1", server.port))
        relay.cut_after = [25 * PAGE_BYTES, 22 * PAGE_BYTES + 11]
        report = pull(relay.address, sink, HASHES, secret=secret)
        relay.close()
        assert report.end is PullEnd.COMPLETE, report
        assert report.connections == relay.connections == 3
        # A cut costs at most the request that it hit.
        assert report.bytes_received == PAGE_BYTES * len(HASHES)
        assert_same(sink, HASHES)
        eventually(lambda: source.open_count == 0)


def test_peer_that_stays_away_ends_the_pull() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    with serve(source) as server:
        relay = Relay(("127.0.0.1", server.port))
        relay.cut_after = [15 * PAGE_BYTES, 100, 100]
        report = pull(relay.address, sink, HASHES)
        relay.close()
    assert report.end is PullEnd.LOST
    assert report.pages_here == 10  # whole requests only
    sink.check()


def test_page_corrupted_on_the_wire_is_fetched_again() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    with serve(source) as server:
        relay = Relay(("127.0.0.1", server.port))
        relay.corrupt_at = [5 * PAGE_BYTES]
        report = pull(relay.address, sink, HASHES)
        relay.close()
    assert report.end is PullEnd.COMPLETE
    assert report.pages_damaged == 1
    assert_same(sink, HASHES)


def test_page_corrupted_each_time_is_not_stored(monkeypatch) -> None:
    from symphony_sglang.wire import page_session

    real = page_session.sum_of
    bad = body_of(HASHES[3])
    monkeypatch.setattr(
        page_session, "sum_of", lambda pieces: real(pieces) ^ (bytes(pieces[0]) == bad)
    )
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    with serve(source) as server:
        report = pull(server.address, sink, HASHES)
    assert report.end is PullEnd.SHORT
    assert report.states[3] is PageState.DAMAGED
    assert report.pages_here == 3
    assert HASHES[3] not in sink.pages


def test_corrupted_record_ends_an_encrypted_connection() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    with serve(source, secret=SECRET) as server:
        relay = Relay(("127.0.0.1", server.port))
        relay.corrupt_at = [5 * PAGE_BYTES]
        report = pull(relay.address, sink, HASHES, secret=SECRET)
        relay.close()
    assert report.end is PullEnd.BROKEN
    assert "authentication" in report.problem
    sink.check()


@pytest.mark.parametrize("settings", [STREAM, LOCAL], ids=["stream", "local"])
def test_page_evicted_while_it_is_sent_is_not_taken(settings, monkeypatch) -> None:
    from symphony_sglang.wire import page_session

    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    real = page_session.PageSession._unchanged

    def evict_then_check(session, opened):
        source.pages.pop(HASHES[5], None)
        return real(session, opened)

    monkeypatch.setattr(page_session.PageSession, "_unchanged", evict_then_check)
    with serve(source) as server:
        report = pull(server.address, sink, HASHES, settings=settings)
    assert report.end is PullEnd.SHORT
    assert report.pages_here == 5
    assert HASHES[5] not in sink.pages


def test_a_copy_is_halved_between_pages_or_not_at_all() -> None:
    half = SPLIT_BYTES_MIN // 2
    targets = [memoryview(bytearray(size)) for size in (half, 3 * half // 2, half // 2)]
    remote = [(1000, half // 2), (2000, half // 2), (3000, 2 * half)]
    # The last two targets come from one piece, so the cut can only be before them.
    assert halves(remote[:2], targets[:1]) == ((remote[:2], targets[:1]),)  # too small
    first, second = halves(remote, targets)
    assert (first, second) == ((remote[:2], targets[:1]), (remote[2:], targets[1:]))
    # Cut where no piece ends, it stays whole.
    assert halves([(1000, 3 * half)], targets) == (([(1000, 3 * half)], targets),)


def test_local_way_falls_back_to_the_stream(monkeypatch) -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    with serve(source) as server, connect(server.address, settings=LOCAL) as client:
        assert client.way == "local"
        monkeypatch.setattr(LocalReader, "copy", lambda *_: False)
        report = pull(server.address, sink, HASHES, settings=LOCAL)
    assert report.end is PullEnd.COMPLETE
    assert report.way == "stream"
    assert_same(sink, HASHES)


def test_server_may_keep_readers_out_of_its_memory() -> None:
    with (
        serve(filled(HASHES), local=False) as server,
        connect(server.address, settings=LOCAL) as client,
    ):
        assert client.way == "stream"


# Time -------------------------------------------------------------------------------------------


def test_deadline_ends_a_pull_from_a_stalled_peer() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    with serve(source) as server:
        relay = Relay(("127.0.0.1", server.port))
        relay.stall_after = 12 * PAGE_BYTES
        started = CLOCK.monotonic()
        report = pull(relay.address, sink, HASHES, deadline_seconds=0.4)
        assert CLOCK.monotonic() - started < 1.5
        relay.close()
    assert report.end is PullEnd.DEADLINE
    assert report.pages_here == 10
    sink.check()


def test_silent_peer_is_given_up() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    quick = ClientSettings(local=False, transfer_seconds=0.2)
    with serve(source) as server:
        relay = Relay(("127.0.0.1", server.port))
        relay.stall_after = 0
        report = pull(relay.address, sink, HASHES, settings=quick, connections_max=1)
        relay.close()
    assert report.end is PullEnd.LOST


def test_cancel_ends_a_pull_at_once() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    canceller = Canceller()
    with serve(source) as server:
        source.may_open.clear()
        timer = threading.Timer(0.1, canceller.cancel)
        timer.start()
        started = CLOCK.monotonic()
        report = pull(server.address, sink, HASHES, canceller=canceller)
        assert CLOCK.monotonic() - started < 1.0
        source.may_open.set()
        assert report.end is PullEnd.CANCELLED
        sink.check()
        eventually(lambda: source.open_count == 0)


def test_reader_that_takes_nothing_is_dropped_and_frees_its_pages() -> None:
    hashes = chain(40)
    source = filled(hashes, 500_000)
    who = identity(page_bytes=500_000)
    with serve(source, who=who, transfer_seconds=0.2) as server:
        client = connect(server.address, who=who)
        client.begin(hashes, [memoryview(bytearray(500_000))] * len(hashes))
        eventually(lambda: server.counters.lost == 1)
        eventually(lambda: source.open_count == 0)
        client.close()


def test_no_server_is_a_lost_peer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(PeerLostError, match="no connection"):
        connect(f"127.0.0.1:{port}")


# Room -------------------------------------------------------------------------------------------


def test_small_sink_takes_all_pages_in_turn() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES, reserved_max=12)
    with serve(source) as server:
        assert pull(server.address, sink, HASHES).end is PullEnd.COMPLETE
    assert_same(sink, HASHES)


def test_full_sink_ends_the_pull_without_a_leak() -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES, pages_max=25)
    with serve(source) as server:
        report = pull(server.address, sink, HASHES)
        assert report.end is PullEnd.NO_ROOM
        assert report.pages_here == 25
        sink.check()
        nothing = MemoryPages(PAGE_BYTES, reserved_max=5)
        assert pull(server.address, nothing, HASHES).end is PullEnd.NO_ROOM
        nothing.check()


def test_connections_are_bounded() -> None:
    with serve(filled(HASHES), connections_max=2) as server:
        first, second = connect(server.address), connect(server.address)
        with pytest.raises(PeerRefusedError, match="busy"):
            connect(server.address)
        first.close()
        eventually(lambda: len(server._sessions) < 2)
        connect(server.address).close()
        second.close()
        assert server.counters.refused_busy == 1


# Questions --------------------------------------------------------------------------------------


def test_lookup_waits_for_pages_that_are_being_written() -> None:
    source = filled(HASHES[:3])
    with serve(source) as server, connect(server.address) as client:
        assert client.lookup(HASHES[:5]) == [True, True, True, False, False]
        late = threading.Timer(0.1, lambda: source.pages.update(filled(HASHES[:5]).pages))
        late.start()
        assert client.lookup(HASHES[:5], wait_seconds=2.0) == [True] * 5
        late.join()
        assert client.lookup(HASHES[:6], wait_seconds=0.05)[-1] is False


def test_records_travel_as_they_are() -> None:
    blob = bytes(range(256)) * 100
    records = {("session", "s1"): blob}
    with (
        serve(filled(HASHES), records=lambda kind, name: records.get((kind, name))) as server,
        connect(server.address) as client,
    ):
        assert client.record("session", "s1") == blob
        assert client.record("session", "s2") is None
        assert client.record("pull", "s1") is None


def test_requests_and_questions_share_a_connection() -> None:
    source = filled(HASHES)
    for settings in (STREAM, LOCAL):
        with serve(source) as server, connect(server.address, settings=settings) as client:
            buffers = [memoryview(bytearray(PAGE_BYTES)) for _ in range(30)]
            first = client.begin(HASHES[:10], buffers[:10])
            second = client.begin(HASHES[10:20], buffers[10:20])
            assert client.lookup(HASHES[:1]) == [True]
            assert {outcome for outcome, _ in client.finish(second)} == {PageOutcome.ARRIVED}
            assert {outcome for outcome, _ in client.finish(first)} == {PageOutcome.ARRIVED}
            assert [bytes(buffer) for buffer in buffers[:20]] == [
                body_of(key) for key in HASHES[:20]
            ]


def test_failing_source_ends_the_connection_only(monkeypatch) -> None:
    source, sink = filled(HASHES), MemoryPages(PAGE_BYTES)
    calls = []
    real = source.open

    def fail_once(hashes):
        calls.append(1)
        if len(calls) == 1:
            raise OSError("no such page after all")
        return real(hashes)

    monkeypatch.setattr(source, "open", fail_once)
    with serve(source) as server:
        assert pull(server.address, sink, HASHES).end is PullEnd.COMPLETE
    assert_same(sink, HASHES)


def test_closed_server_ends_its_connections() -> None:
    server = serve(filled(HASHES))
    client = connect(server.address)
    server.close()
    server.close()
    with pytest.raises(PeerLostError):
        client.lookup(HASHES[:1])
    client.close()
