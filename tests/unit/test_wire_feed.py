"""The feed's messages, its mirror and its replay, without sockets."""

from __future__ import annotations

import contextlib
import sys
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.levels import Level
from symphony_sglang.errors import FeedError
from symphony_sglang.wire import feed
from symphony_sglang.wire.feed_address import FeedAddress, feed_addresses
from symphony_sglang.wire.feed_log import ReplayBuffer, ResidencyMirror, SessionMirror

HASHES = st.integers(-3, 3)  # few, so that they meet
BATCHES = st.lists(HASHES, max_size=5)
MEDIA = st.sampled_from(["GPU", "CPU_PINNED", "DISK"])
STEPS = st.one_of(
    st.tuples(st.just("stored"), MEDIA, BATCHES),
    st.tuples(st.just("removed"), MEDIA, BATCHES),
    st.tuples(st.just("cleared"), st.just(""), st.just([])),
)


def stored(hashes: list[int], medium: str | None = "GPU", **more: Any) -> feed.BlockStored:
    return feed.BlockStored(hashes, None, [1] * 16 * len(hashes), 16, None, medium, **more)


def batch(*events: Any) -> bytes:
    return feed.encode(feed.EventBatch(12.5, list(events), 3))


# Messages ---------------------------------------------------------------------------------------


def test_batches_are_encoded_as_sglang_encodes_them() -> None:
    payload = msgspec.msgpack.decode(
        batch(
            feed.BlockStored([1, -2], 7, [5, 6], 1, None, medium="GPU", session_id="s"),
            feed.BlockRemoved([3], medium=feed.Medium.DISK),
            feed.AllBlocksCleared(),
        )
    )
    assert payload == [
        12.5,
        [
            {
                "type": "BlockStored",
                "block_hashes": [1, -2],
                "parent_block_hash": 7,
                "token_ids": [5, 6],
                "block_size": 1,
                "lora_id": None,
                "medium": "GPU",
                "session_id": "s",
            },
            {"type": "BlockRemoved", "block_hashes": [3], "medium": "DISK"},
            {"type": "AllBlocksCleared"},
        ],
        3,
    ]


def test_batches_of_sglangs_own_structs_are_read() -> None:
    events = pytest.importorskip("sglang.srt.disaggregation.kv_events")
    payload = msgspec.msgpack.encode(
        events.KVEventBatch(
            ts=1.0,
            events=[
                events.BlockStored(
                    block_hashes=[2**63 - 1, -(2**63)],
                    parent_block_hash=None,
                    token_ids=[(1, 2), (2, 3)],
                    block_size=1,
                    lora_id=None,
                    medium=events.StorageMedium.CPU,
                ),
                events.BlockRemoved(block_hashes=[4]),
                events.AllBlocksCleared(),
            ],
            attn_dp_rank=1,
        )
    )
    read, unknown = feed.decode_pages(payload)
    assert unknown == 0
    assert read.attn_dp_rank == 1
    first, second, third = read.events
    assert isinstance(first, feed.StoredPages)
    assert (first.block_hashes, first.medium) == ([2**63 - 1, -(2**63)], "CPU_PINNED")
    assert isinstance(second, feed.RemovedPages)
    assert second.medium is None
    assert isinstance(third, feed.ClearedPages)


def test_events_of_an_unknown_kind_are_left_out_alone() -> None:
    payload = msgspec.msgpack.encode(
        [1.0, [{"type": "BlockPinned", "x": [1]}, {"type": "BlockRemoved", "block_hashes": [9]}]]
    )
    read, unknown = feed.decode_pages(payload)
    assert unknown == 1
    assert [event.block_hashes for event in read.events] == [[9]]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93",
        msgspec.msgpack.encode({"ts": 1}),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [2**63]}]]),
        msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": "no"}]]),
        msgspec.msgpack.encode([1.0, [{"block_hashes": [1]}]]),
        msgspec.msgpack.encode([1.0, ["BlockRemoved"]]),
        b"\x91" * 100_000,
    ],
)
def test_a_malformed_batch_is_a_feed_error(payload: bytes) -> None:
    with pytest.raises(FeedError, match="not a batch"):
        feed.decode_pages(payload)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_raise_anything_but_a_feed_error(payload: bytes) -> None:
    for decode in (feed.decode_pages, feed.decode_load, feed.decode_sessions, feed.read_sequence):
        with contextlib.suppress(FeedError):
            decode(payload)


def test_damaged_batches_raise_nothing_else() -> None:
    good = batch(stored([1, 2, 3]), feed.BlockRemoved([1]))
    for at in range(len(good)):
        for byte in (0x00, 0x7F, 0xC1, 0xFF):
            with contextlib.suppress(FeedError):
                feed.decode_pages(good[:at] + bytes([byte]) + good[at + 1 :])


def test_loads_and_sessions_survive_the_wire() -> None:
    load = feed.WorkerLoad(
        requests_running=2,
        decode_step_seconds=0.01,
        speeds=feed.WorkerSpeeds(prefill=feed.Speed(3000.0, 0.002)),
    )
    report = feed.LoadReport(4096, 1.0, 4100, 4095, load)
    assert feed.decode_load(feed.encode(report)) == report
    changes = [
        feed.SessionChange("s", 5, 1, "ab", cache_salt="x"),
        feed.SessionChange("t", gone=True),
    ]
    sent = feed.SessionBatch(1.0, changes)
    assert feed.decode_sessions(feed.encode(sent)) == sent


def test_two_starts_never_share_a_sequence() -> None:
    first, second = feed.epoch_of(1_800_000_000.000), feed.epoch_of(1_800_000_000.001)
    assert second - first == feed.SEQUENCES_PER_MILLISECOND
    assert feed.read_sequence(feed.sequence_frame(first)) == first
    assert first < 2**53, "exact in a double, for consumers that know no other number"


def test_hashes_are_packed_as_little_endian_int64() -> None:
    hashes = array("q", [1, -1, 2**62])
    packed = feed.pack_hashes(hashes)
    assert packed[:8] == b"\x01" + b"\x00" * 7
    assert feed.unpack_hashes(packed) == hashes
    assert sys.byteorder == "little" or packed != hashes.tobytes()
    with pytest.raises(FeedError, match="multiple of 8"):
        feed.unpack_hashes(b"123")


# Snapshots --------------------------------------------------------------------------------------


def frames_of(pages: dict[str, list[int]], sessions: list[feed.SessionChange]) -> list[Any]:
    header = feed.SnapshotHeader(8192, 8200, 8191, 16, 0)
    frames = [(feed.TOPIC_HEADER, feed.encode(header))]
    frames += [
        (feed.TOPIC_PAGES, feed.encode(feed.PagesChunk(medium, feed.pack_hashes(array("q", part)))))
        for medium, part in pages.items()
    ]
    frames.append((feed.TOPIC_SESSIONS, feed.encode(feed.SessionsChunk(sessions))))
    numbered = [
        (topic, feed.sequence_frame(number), payload)
        for number, (topic, payload) in enumerate(frames)
    ]
    return [*numbered, (b"", feed.END_SEQUENCE, feed.sequence_frame(len(frames)))]


def read_all(frames: list[Any], pages_max: int = 100, sessions_max: int = 10) -> Any:
    reader = feed.SnapshotReader(pages_max, sessions_max)
    found = None
    for frame in frames:
        assert found is None
        found = reader.add(*frame)
    return found


def test_a_snapshot_is_put_together() -> None:
    session = feed.SessionChange("s", 32, 2)
    found = read_all(frames_of({"GPU": [1, 2], "DISK": [3], "EXTERNAL": [4]}, [session]))
    assert found.header.events_sequence == 8200
    assert {level: list(pages) for level, pages in found.pages.items()} == {
        Level.DEVICE: [1, 2],
        Level.HOST: [],
        Level.NVME: [3],
    }
    assert found.sessions == [session]


@pytest.mark.parametrize("missing", range(4))
def test_a_snapshot_with_a_frame_missing_is_refused(missing: int) -> None:
    frames = frames_of({"GPU": [1], "DISK": [2]}, [])
    del frames[missing]
    with pytest.raises(FeedError):
        read_all(frames)


def test_a_snapshot_over_its_bounds_is_refused() -> None:
    with pytest.raises(FeedError, match="over 2 pages"):
        read_all(frames_of({"GPU": [1, 2, 3]}, []), pages_max=2)
    with pytest.raises(FeedError, match="over 1 sessions"):
        read_all(frames_of({}, [feed.SessionChange("a"), feed.SessionChange("b")]), sessions_max=1)


def test_a_busy_worker_says_so() -> None:
    with pytest.raises(FeedError, match="busy"):
        read_all([(b"", feed.END_SEQUENCE, feed.BUSY)])


# Mirror -----------------------------------------------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(st.lists(STEPS, max_size=40))
def test_the_mirror_equals_brute_force(steps: list[tuple[str, str, list[int]]]) -> None:
    mirror = ResidencyMirror()
    oracle: dict[str, set[int]] = {"GPU": set(), "CPU_PINNED": set(), "DISK": set()}
    for verb, medium, hashes in steps:
        level = mirror.level_of(medium) if medium else None
        if verb == "cleared":
            mirror.cleared()
            for pages in oracle.values():
                pages.clear()
        elif verb == "stored":
            oracle[medium].update(hashes)
            if level is not None:
                mirror.stored(level, hashes)
        else:
            oracle[medium].difference_update(hashes)
            if level is not None:
                mirror.removed(level, hashes)
        mirror.check()
        assert set(mirror.pages(Level.DEVICE)) == oracle["GPU"]
        assert set(mirror.pages(Level.HOST)) == oracle["CPU_PINNED"]
    assert len(mirror) == len(oracle["GPU"] | oracle["CPU_PINNED"])
    assert len(mirror.pages(Level.DEVICE)) == len(oracle["GPU"]), "each page once"


def test_a_mirror_that_is_full_forgets_its_oldest_page() -> None:
    mirror = ResidencyMirror(pages_max=2)
    mirror.stored(Level.DEVICE, [1, 2, 3])
    assert list(mirror.pages(Level.DEVICE)) == [2, 3]
    assert mirror.overflows == 1
    mirror.check()


def test_a_mirror_takes_no_level_but_its_own() -> None:
    mirror = ResidencyMirror()
    assert mirror.level_of(None) is Level.DEVICE
    assert mirror.level_of("DISK") is None
    assert mirror.level_of("EXTERNAL") is None


def test_the_session_mirror_keeps_the_newest_and_drops_what_is_gone() -> None:
    mirror = SessionMirror(sessions_max=2)
    for name in ("a", "b", "c"):
        mirror.apply(feed.SessionChange(name, turns=1))
    mirror.apply(feed.SessionChange("b", turns=2))
    mirror.apply(feed.SessionChange("b", turns=1, cache_salt="other"))
    assert [(item.session_id, item.turns) for item in mirror.sessions()] == [("b", 2), ("b", 1)]
    assert mirror.overflows == 2
    mirror.apply(feed.SessionChange("b", gone=True))
    assert [item.cache_salt for item in mirror.sessions()] == ["other"]
    mirror.check()


# Replay -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 40),
    st.lists(st.tuples(st.integers(0, 12), st.booleans()), max_size=30),
    st.integers(0, 45),
)
def test_a_replay_has_no_gap_and_stays_within_its_bounds(
    batches_max: int, bytes_max: int, sizes: list[tuple[int, bool]], first: int
) -> None:
    replay = ReplayBuffer(batches_max, bytes_max)
    sequence = 9
    for size, skip in sizes:
        sequence += 2 if skip else 1
        replay.append(sequence, b"x" * size)
        replay.check()
    found = [number for number, _ in replay.since(first)]
    assert found == sorted(found)
    assert all(number >= first for number in found)
    if found and first <= sequence:
        assert found[-1] == sequence
        assert found == list(range(found[0], sequence + 1))


# Addresses --------------------------------------------------------------------------------------


def test_our_worker_is_addressed_by_its_residency() -> None:
    described = {
        "rank": 0,
        "events_port": 1000,
        "replay_port": 1001,
        "state_port": 1002,
        "page_size": 16,
        "encrypted": True,
    }
    (address,) = feed_addresses(
        "w", "http://10.0.0.1:30000", residency={"feed": described}, api_key="k"
    )
    assert address == FeedAddress("w", "10.0.0.1", 1000, 1001, 1002, 0, 16, api_key="k")
    second = {**described, "rank": 1, "encrypted": False}
    ranks = {"ranks": [{"feed": described}, {"feed": second}]}
    both = feed_addresses("w", "http://[::1]:30000", residency=ranks, api_key="k")
    assert [item.worker_id for item in both] == ["w@0", "w@1"]
    assert [item.api_key for item in both] == ["k", None]
    assert both[0].endpoint(5) == "tcp://[::1]:5"


def test_a_stock_worker_is_addressed_by_its_server_info() -> None:
    info = {
        "kv_events": {
            "endpoint_host": "*",
            "endpoint_port_base": 5557,
            "replay_endpoint_port_base": 5567,
            "block_size": 64,
            "dp_size": 2,
            "topic": "kv",
        }
    }
    first, second = feed_addresses("w", "http://host:1", residency=None, server_info=info)
    assert first.stock
    assert (second.events_port, second.replay_port, second.topic) == (5558, 5568, "kv")
    assert feed_addresses("w", "http://host:1", server_info={"kv_events": None}) == []
    assert feed_addresses("w", "http://host:1", residency={"feed": None}) == []


@pytest.mark.parametrize(
    "described",
    [{"rank": 0}, {"rank": 0, "events_port": 0, "replay_port": 1, "state_port": 1}, 7, [1]],
)
def test_a_wrong_descriptor_is_a_feed_error(described: Any) -> None:
    with pytest.raises(FeedError):
        feed_addresses("w", "http://h:1", residency={"feed": described})
