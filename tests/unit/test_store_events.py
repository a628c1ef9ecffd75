"""The residency feed, the snapshot, the side records and the counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from store_pages import PAGE_BYTES, ManualClock, Pool, key_of, open_store
from symphony_sglang.errors import StoreError
from symphony_sglang.store.feed import ResidencyFeed

KEYS = [key_of(number) for number in range(8)]


class Mirror:
    """A consumer of the feed, as the router is one."""

    def __init__(self) -> None:
        self.keys: set[bytes] = set()

    def follow(self, store) -> None:
        drain = store.drain_events(10_000)
        if drain.resync:
            self.keys = {key for chunk in store.snapshot() for key in chunk}
        for event in drain.events:
            (self.keys.add if event.stored else self.keys.discard)(event.key)


def test_a_consumer_of_the_feed_always_knows_what_is_on_disk(tmp_path: Path) -> None:
    pool, mirror = Pool(8), Mirror()
    with open_store(tmp_path, segments=2) as store:
        for start in range(0, 120, 8):
            store.write(pool.fill([key_of(number) for number in range(start, start + 8)]))
            if start % 24 == 0:
                store.flush()
                mirror.follow(store)
        store.remove([key_of(119)])
        store.flush()
        mirror.follow(store)
        assert mirror.keys == set(store._s.table.keys)
        assert {key for chunk in store.snapshot() for key in chunk} == mirror.keys


def test_nothing_is_announced_before_its_commit(tmp_path: Path) -> None:
    pool = Pool(8)
    with open_store(tmp_path, interval_seconds=3600) as store:
        store.flush()
        store.write(pool.fill(KEYS))
        assert store.prefix_length(KEYS) == 8
        assert store.drain_events().events == []
        assert list(store.snapshot()) == []
        store.flush()
        assert [event.key for event in store.drain_events().events] == KEYS
        store.remove(KEYS[:2])
        assert store.drain_events().events == []
        store.flush()
        assert [(e.stored, e.key) for e in store.drain_events().events] == [
            (False, KEYS[0]),
            (False, KEYS[1]),
        ]


def test_overflow_drops_everything_and_asks_for_a_snapshot(tmp_path: Path) -> None:
    pool, mirror = Pool(8), Mirror()
    with open_store(tmp_path, events_max=10) as store:
        store.write(pool.fill(KEYS))
        store.flush()
        store.write(pool.fill([key_of(number, "more") for number in range(8)]))
        store.flush()
        mirror.follow(store)
        assert len(mirror.keys) == 16


def test_feed_is_bounded_and_in_order() -> None:
    feed = ResidencyFeed(4)
    feed.publish([b"a"], [b"b", b"c"])
    assert [(e.stored, e.key) for e in feed.drain(2).events] == [(False, b"a"), (True, b"b")]
    feed.publish([], [b"d", b"e", b"f", b"g"])
    assert feed.overflows == 1
    assert len(feed) == 0
    assert feed.drain(10) == ([], True)
    assert feed.drain(10) == ([], False)


def test_records_survive_and_the_oldest_go_first(tmp_path: Path) -> None:
    with open_store(tmp_path, records_max=5) as store:
        for number in range(8):
            store.put_record("session", f"s{number}", bytes([number]))
            store.flush()
        store.put_record("session", "s4", b"again")
        store.put_record("other", "s4", b"apart")
        expected = {"s3": b"\3", "s5": b"\5", "s6": b"\6", "s7": b"\7", "s4": b"again"}
        assert list(store.records("session").items()) == list(expected.items())
    with open_store(tmp_path, records_max=5) as store:
        assert list(store.records("session").items()) == list(expected.items())
        store.put_record("session", "s9", b"new")
        store.delete_record("session", "s5")
        store.delete_record("session", "never")
        assert list(store.records("session")) == ["s3", "s6", "s7", "s4", "s9"]
        store.flush()
        assert list(store.records("session")) == ["s3", "s6", "s7", "s4", "s9"]
        assert store.records("other") == {"s4": b"apart"}


def test_more_records_in_one_commit_than_are_kept(tmp_path: Path) -> None:
    with open_store(tmp_path, records_max=3, interval_seconds=3600) as store:
        for number in range(10):
            store.put_record("session", f"s{number}", b"")
        assert list(store.records("session")) == ["s7", "s8", "s9"]
    with open_store(tmp_path, records_max=3) as store:
        assert list(store.records("session")) == ["s7", "s8", "s9"]


@pytest.mark.parametrize(
    ("kind", "identity", "body", "message"),
    [
        ("", "a", b"", "record kind has 0"),
        ("k", "a" * 257, b"", "record id has 257"),
        ("k", "a\ud800", b"", "UTF-8"),
        ("k", "a", bytes(65537), "65537 bytes; expected at most 65536"),
    ],
)
def test_records_out_of_bounds_are_refused(tmp_path, kind, identity, body, message) -> None:
    with open_store(tmp_path, record_bytes_max=65536) as store:
        with pytest.raises(StoreError, match=message):
            store.put_record(kind, identity, body)
        assert store.records("k") == {}


def test_record_ids_are_data_not_language(tmp_path: Path) -> None:
    names = ["'; DROP TABLE records; --", "../../etc/passwd", "\x00", "ü€"]
    with open_store(tmp_path) as store:
        for name in names:
            store.put_record("session", name, name.encode())
        store.flush()
        assert store.records("session") == {name: name.encode() for name in names}


def test_bytes_are_counted_by_day_and_against_the_payload(tmp_path: Path) -> None:
    pool, clock = Pool(8), ManualClock()
    with open_store(tmp_path, clock=clock) as store:
        store.write(pool.fill(KEYS))
        store.flush()
        stat = store.stat()
        assert stat.payload_bytes_today == 8 * PAGE_BYTES
        # 4 KB of header on 64 KB, and a little index.
        assert 1.0625 <= stat.write_amplification < 1.15
        clock.now += 86400
        store.write(pool.fill([key_of(1, "tomorrow")]))
        store.flush()
        assert store.stat().payload_bytes_today == PAGE_BYTES
        days = store._s.database.daily()
        assert [payload for _, payload, _ in days] == [PAGE_BYTES, 8 * PAGE_BYTES]


def test_recency_survives_a_clean_close(tmp_path: Path) -> None:
    pool, clock = Pool(16), ManualClock()
    keys = [key_of(number) for number in range(24)]
    with open_store(tmp_path, segments=2, clock=clock) as store:
        for start in range(0, 24, 8):
            store.write(pool.fill(keys[start : start + 8]))
            clock.now += 10
        store.touch(keys[:8])
    with open_store(tmp_path, segments=2, clock=clock) as store:
        clock.now += 10
        store.write(pool.fill([key_of(number, "new") for number in range(16)]))
        assert all(store.contains(keys[:8]))
        assert not any(store.contains(keys[8:16]))
