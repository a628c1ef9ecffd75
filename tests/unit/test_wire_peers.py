"""Who may talk to a page server, and what it does with those who may not."""

from __future__ import annotations

import socket
import time

import pytest

from symphony_sglang.errors import (
    ConfigError,
    PeerLostError,
    PeerProtocolError,
    PeerRefusedError,
)
from symphony_sglang.testing.pages import MemoryPages
from symphony_sglang.wire.page_client import split_address
from symphony_sglang.wire.pull import PullEnd
from symphony_sglang.wire.secure_channel import TransferKey
from symphony_sglang.wire.transfer_protocol import HEADER, Kind
from wire_world import (
    CLOCK,
    PAGE_BYTES,
    SECRET,
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


# Who may talk to whom ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": "other"}, r"model: 'other' here, 'tiny' there"),
        ({"revision": "r2"}, r"revision: 'r2' here, 'r1' there"),
        ({"dtype": "float32"}, r"dtype: 'float32' here, 'bfloat16' there"),
        ({"layout": "layer_first"}, r"layout: 'layer_first' here"),
        ({"page_tokens": 64}, r"page_tokens: 64 here, 16 there"),
        ({"page_bytes": 1000}, r"page_bytes: 1000 here, 24000 there"),
        ({"tp_rank": 1, "tp_size": 2}, r"tp_rank: 1 here, 0 there"),
        ({"tp_size": 2}, r"tp_size: 2 here, 1 there"),
        ({"hash_scheme": "md5"}, r"hash_scheme: 'md5' here, 'sha256-chain' there"),
        ({"hash_seed": "7"}, r"hash_seed: '7' here, '' there"),
        ({"extra": (("layer_num", "8"),)}, r"layer_num: '8' here, '4' there"),
        ({"namespace": "ab"}, r"namespace: 'ab' here, '' there"),
    ],
)
def test_other_pages_are_refused_with_both_values(change, named) -> None:
    with serve(filled(HASHES)) as server:
        with pytest.raises(PeerRefusedError, match=named):
            connect(server.address, who=identity(**change))
        eventually(lambda: server.counters.refused == 1)
        sink = MemoryPages(PAGE_BYTES)
        report = pull(server.address, sink, HASHES, who=identity(**change))
        assert report.end is PullEnd.REFUSED
        assert report.connections == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "problem"),
    [
        (SECRET, SECRET + "x", "transfer keys differ"),
        (SECRET, None, "has no transfer key"),
        (None, SECRET, "needs the transfer key"),
    ],
)
def test_wrong_key_is_refused(ours, theirs, problem) -> None:
    with serve(filled(HASHES), secret=theirs) as server:
        with pytest.raises(PeerRefusedError, match=problem):
            connect(server.address, secret=ours)
        eventually(lambda: server.counters.refused_key == 1)
        # The server is none the worse for it.
        sink = MemoryPages(PAGE_BYTES)
        assert pull(server.address, sink, HASHES, secret=theirs).end is PullEnd.COMPLETE


def test_encrypted_connection_shows_neither_identity_nor_pages() -> None:
    source = filled(HASHES)
    with serve(source, secret=SECRET) as server:
        relay = Relay(("127.0.0.1", server.port))
        seen = bytearray()
        real = socket.socket.sendall

        def spy(sock, data, *args):
            seen.extend(data)
            return real(sock, data, *args)

        socket.socket.sendall, undo = spy, real
        try:
            pull(relay.address, MemoryPages(PAGE_BYTES), HASHES, secret=SECRET)
        finally:
            socket.socket.sendall = undo
            relay.close()
    assert len(seen) > PAGE_BYTES * len(HASHES)
    assert b"bfloat16" not in seen
    assert HASHES[0] not in seen
    assert body_of(HASHES[0])[:64] not in seen


def test_short_transfer_key_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"7 characters; expected at least 16"):
        TransferKey("too bad")


# Malformed peers --------------------------------------------------------------------------------


def frame(kind: int, body: bytes, size: int | None = None) -> bytes:
    return HEADER.pack(kind, 0, 0, 1, len(body) if size is None else size) + body


@pytest.mark.parametrize(
    "first_bytes",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        frame(99, b""),
        frame(Kind.HELLO, b"", 1 << 40),
        frame(Kind.HELLO, b"\xc1\xc1"),
        frame(Kind.FETCH, b"\x80"),
        frame(Kind.HELLO, b"\x84" + b"\xff" * 20),
    ],
)
def test_malformed_first_frame_closes_the_connection(first_bytes) -> None:
    with serve(filled(HASHES)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as raw:
            raw.sendall(first_bytes)
            raw.settimeout(2)
            assert raw.recv(1) == b""
        eventually(lambda: server.counters.malformed == 1)
        assert pull(server.address, MemoryPages(PAGE_BYTES), HASHES).end is PullEnd.COMPLETE


@pytest.mark.parametrize(
    "bad",
    [
        frame(Kind.PAGES, b""),
        frame(Kind.COPIED, b"\x80"),
        frame(Kind.FETCH, b"\x83\xa6hashes\xc4\x03abc\xa4pool\xa2kv\xa5local\xc2"),
        frame(Kind.FETCH, b"", 1 << 30),
        frame(Kind.LOOKUP, b"\x91\x01"),
        b"\x0c\x01\x00\x00" + bytes(12),
    ],
)
def test_malformed_request_closes_the_connection(bad) -> None:
    source = filled(HASHES)
    with serve(source) as server:
        client = connect(server.address)
        client._channel.send([memoryview(bad)])
        eventually(lambda: server.counters.malformed == 1)
        with pytest.raises(PeerLostError):
            client.lookup(HASHES[:1])
        client.close()
        assert source.open_count == 0


def test_unknown_pool_closes_the_connection() -> None:
    with serve(filled(HASHES)) as server:
        client = connect(server.address)
        client._pool = "../../etc"
        with pytest.raises(PeerLostError):
            client.lookup(HASHES[:1])
        eventually(lambda: server.counters.malformed == 1)
        client.close()


def test_slow_handshake_is_cut_off() -> None:
    with (
        serve(filled(HASHES), handshake_seconds=0.3) as server,
        socket.create_connection(("127.0.0.1", server.port)) as raw,
    ):
        hello = frame(Kind.HELLO, bytes(64))
        started = CLOCK.monotonic()
        with pytest.raises(OSError):  # noqa: PT012
            for one in hello:
                raw.sendall(bytes([one]))
                time.sleep(0.05)
            raise AssertionError("the server kept listening")
        assert CLOCK.monotonic() - started < 2
        eventually(lambda: server.counters.lost == 1)


def test_server_that_lies_about_lengths_is_left() -> None:
    """A page longer than its buffer, or lengths that do not add up, end the connection."""
    from symphony_sglang.wire.transfer_protocol import unpack_lengths

    raw = (PAGE_BYTES + 1).to_bytes(4, "little")
    with pytest.raises(PeerProtocolError, match="expected 1 to 24000"):
        unpack_lengths(raw, 1, PAGE_BYTES + 1 + 13, PAGE_BYTES)
    with pytest.raises(PeerProtocolError, match="add up"):
        unpack_lengths(PAGE_BYTES.to_bytes(4, "little"), 1, PAGE_BYTES, PAGE_BYTES)


def test_address_in_use_is_a_clear_error() -> None:
    with (
        serve(filled(HASHES)) as server,
        pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{server.port}"),
    ):
        serve(filled(HASHES), port=server.port)


@pytest.mark.parametrize("address", ["", "host", "host:", ":1", "host:99999", "host:x", "h:²"])
def test_address_that_is_none_is_refused(address) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        split_address(address)


def test_addresses() -> None:
    assert split_address("10.0.0.1:80") == ("10.0.0.1", 80)
    assert split_address("[::1]:80") == ("::1", 80)
