"""The session table and its stored records."""

from __future__ import annotations

import random
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.core.prefix import Namespace, pack_tokens
from symphony_sglang.core.sessions import (
    HEADER,
    RECORD_OVERHEAD_BYTES,
    SessionKey,
    SessionLimits,
    SessionRecord,
    SessionTable,
    decode_session,
    encode_session,
)
from symphony_sglang.errors import SessionRecordError


def tokens(count: int, start: int = 0) -> bytes:
    return pack_tokens(range(start, start + count))


@pytest.fixture
def table():
    table = SessionTable(
        SessionLimits(
            records_max=3, bytes_max=4 * RECORD_OVERHEAD_BYTES + 400, tokens_per_session_max=100
        )
    )
    yield table
    table.check()


S = [SessionKey(f"s{number}") for number in range(6)]


def test_a_turn_is_learned_and_counted(table):
    table.learn(S[0], tokens(10), 1.0, "hash10")
    record = table.learn(S[0], tokens(20), 2.0, "hash20")
    assert (record.turns, record.total_tokens, record.last_page_hash) == (2, 20, "hash20")
    assert table.get(S[0]) == record
    assert record.prefix.tokens == 20
    assert table.get(S[1]) is None


def test_the_least_recently_used_session_is_forgotten_whole(table):
    for number in range(3):
        table.learn(S[number], tokens(5), float(number))
    table.touch(S[0], 3.0)
    table.learn(S[3], tokens(5), 4.0)
    assert table.get(S[1]) is None
    assert table.get(S[0]) is not None
    assert table.forgotten == 1
    assert table.find("s1") == ()


def test_bytes_are_bounded_too(table):
    table.learn(S[0], tokens(90), 0.0)
    table.learn(S[1], tokens(90), 1.0)
    table.learn(S[2], tokens(90), 2.0)
    assert [record.key for record in table.records()] == [S[0], S[1], S[2]]
    big = SessionTable(
        SessionLimits(bytes_max=RECORD_OVERHEAD_BYTES * 2 + 700, tokens_per_session_max=100)
    )
    big.learn(S[0], tokens(90), 0.0)
    big.learn(S[1], tokens(90), 1.0)
    assert [record.key for record in big.records()] == [S[1]]
    big.check()


def test_a_session_beyond_its_bound_keeps_its_head(table):
    record = table.learn(S[0], tokens(150), 0.0, "hash150")
    assert (record.prefix.tokens, record.total_tokens) == (100, 150)
    assert record.token_bytes == tokens(100)
    assert record.last_page_hash == "", "it would name a page that the record does not reach"


def test_salts_keep_equal_ids_apart(table):
    salted = SessionKey("s0", Namespace(None, "salt"))
    table.learn(S[0], tokens(5), 0.0)
    table.learn(salted, tokens(7), 1.0)
    assert table.get(S[0]).total_tokens == 5
    assert table.get(salted).total_tokens == 7
    assert [record.key for record in table.find("s0")] == [S[0], salted]
    assert table.get(S[0]).identity != table.get(salted).identity
    table.forget(S[0])
    assert [record.key for record in table.find("s0")] == [salted]


def test_a_newer_epoch_beats_more_turns_beats_nothing(table):
    def record(turns, epoch):
        return SessionRecord(S[0], tokens(5), 5, turns, 0.0, "", epoch)

    assert table.restore(record(3, 0))
    assert not table.restore(record(3, 0))
    assert not table.restore(record(2, 0))
    assert table.restore(record(4, 0))
    assert table.restore(record(1, 1))
    assert not table.restore(record(9, 0))
    assert table.own(S[0], 2)
    assert not table.own(S[0], 1)
    assert not table.own(S[1], 1)
    assert table.learn(S[0], tokens(6), 1.0).owner_epoch == 2


def test_changes_are_drained_once_with_the_newest_content(table):
    table.learn(S[0], tokens(5), 0.0)
    table.learn(S[1], tokens(5), 1.0)
    table.learn(S[0], tokens(9), 2.0)
    table.forget(S[1])
    drained = dict(table.take_dirty())
    assert drained[S[1]] is None
    assert drained[S[0]].total_tokens == 9
    assert table.take_dirty() == ()
    table.clear()
    assert table.take_dirty() == ((S[0], None),)


def test_undrained_changes_are_bounded(table):
    for number in range(100):
        table.learn(SessionKey(f"x{number}"), tokens(1), float(number))
    assert len(table.take_dirty(1000)) <= 2 * table.limits.records_max


names = st.text(max_size=20)
records = st.builds(
    SessionRecord,
    key=st.builds(
        SessionKey,
        st.text(min_size=1, max_size=20),
        st.builds(Namespace, st.none() | names, st.none() | names),
    ),
    token_bytes=st.lists(st.integers(0, 2**31 - 1), max_size=20).map(pack_tokens),
    total_tokens=st.integers(20, 2**40),
    turns=st.integers(0, 2**32 - 1),
    last_used_seconds=st.just(3.0),
    last_page_hash=names,
    owner_epoch=st.integers(0, 2**64 - 1),
)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(records)
def test_records_survive_a_round_trip(record):
    blob = encode_session(record, 10.0)
    restored = decode_session(blob, 1000.0)
    assert restored.last_used_seconds == 993.0, "seven seconds idle, on another clock"
    assert encode_session(restored, 1007.0 - 7.0) == blob
    assert restored.key == record.key
    assert restored.token_bytes == record.token_bytes
    assert restored.last_page_hash == record.last_page_hash


@settings(max_examples=300, deadline=None, derandomize=True)
@given(records, st.randoms(use_true_random=False))
def test_a_damaged_record_is_refused(record, rng: random.Random):
    blob = bytearray(encode_session(record, 3.0))
    match rng.randrange(3):
        case 0:
            blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)
        case 1:
            del blob[rng.randrange(len(blob)) :]
        case _:
            blob += b"\0"
    with pytest.raises(SessionRecordError):
        decode_session(bytes(blob), 3.0)


def forged(**changes) -> bytes:
    """A record with a valid checksum and invalid content."""
    values = {
        "magic": b"SYSR",
        "version": 1,
        "flags": 0,
        "id": 1,
        "extra_key": 0,
        "cache_salt": 0,
        "hash": 0,
        "tokens": 4,
        "total": 1,
        "turns": 1,
        "epoch": 0,
        "idle": 0.0,
    }
    body = changes.pop("body", b"s" + struct.pack("<i", 7))
    header = HEADER.pack(*{**values, **changes}.values())
    return header + body + struct.pack("<I", zlib.crc32(header + body))


def test_forged_records_are_refused_by_what_is_wrong():
    assert decode_session(forged(), 0.0).key == S[0]._replace(session_id="s")
    for changes, message in [
        ({"version": 2}, "version 2"),
        ({"magic": b"NOPE"}, "NOPE"),
        ({"id": 2}, "parts of"),
        ({"tokens": 2, "id": 3}, "parts of"),
        ({"idle": float("nan")}, "idle for nan"),
        ({"idle": -1.0}, "idle for -1"),
        ({"total": 0}, "0 tokens in all"),
        ({"body": b"s" + struct.pack("<i", -1)}, "token id"),
        ({"body": b"\xff" + struct.pack("<i", 7)}, "not UTF-8"),
    ]:
        with pytest.raises(SessionRecordError, match=message):
            decode_session(forged(**changes), 0.0)


def test_endless_names_are_refused_when_written():
    record = SessionRecord(SessionKey("s" * 5000), b"", 0, 1, 0.0)
    with pytest.raises(SessionRecordError, match="5000 bytes"):
        encode_session(record, 0.0)
