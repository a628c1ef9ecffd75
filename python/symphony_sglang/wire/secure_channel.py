"""Encryption of page transfer: AES-256-GCM records under keys that both sides prove to share.

Each connection mixes the transfer key with a fresh X25519 exchange (HKDF-SHA256 over both hellos),
so a recorded connection stays closed to whoever learns the transfer key later. One key and one
counter nonce for each direction; a record's length is authenticated with it.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Sequence
from typing import NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from symphony_sglang.errors import ConfigError, PeerProtocolError
from symphony_sglang.wire.channel import Channel

KEY_CHARACTERS_MIN = 16
KEY_BYTES = 32
TAG_BYTES = 16
RECORD_HEADER = struct.Struct("<I")
RECORD_PLAIN_MAX = 512 * 1024
# Sealed bytes on their way out and in: several records for one system call.
BUFFER_BYTES = 2 * (RECORD_HEADER.size + RECORD_PLAIN_MAX + TAG_BYTES)
# Smaller pieces are gathered into one record: a record costs a call and 20 bytes.
GATHER_BYTES_MAX = 32 * 1024
RECORDS_MAX = 1 << 40
CONTEXT = b"symphony page transfer 1"


class TransferKey:
    """The secret that all workers of one cluster are started with."""

    def __init__(self, secret: str) -> None:
        if len(secret) < KEY_CHARACTERS_MIN:
            raise ConfigError(
                f"transfer key of {len(secret)} characters; expected at least {KEY_CHARACTERS_MIN}"
            )
        self._secret = hashlib.sha256(CONTEXT + secret.encode()).digest()

    def __repr__(self) -> str:
        return "TransferKey(...)"

    def derive(self, shared: bytes, transcript: bytes) -> ChannelKeys:
        """The keys of one connection, from its key exchange and both hellos."""
        material = HKDF(
            SHA256(), 4 * KEY_BYTES, salt=hashlib.sha256(transcript).digest(), info=CONTEXT
        ).derive(self._secret + shared)
        parts = [material[at : at + KEY_BYTES] for at in range(0, len(material), KEY_BYTES)]
        return ChannelKeys(*parts)


class ChannelKeys(NamedTuple):
    client_proof: bytes
    server_proof: bytes
    client_to_server: bytes
    server_to_client: bytes


def new_exchange() -> tuple[X25519PrivateKey, bytes]:
    """A fresh private key and its public half for the hello."""
    private = X25519PrivateKey.generate()
    return private, private.public_key().public_bytes_raw()


def complete_exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """Raises PeerProtocolError where `public` is no usable key."""
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:
        raise PeerProtocolError(f"public key of {len(public)} bytes: {error}") from None


def proof_of(key: bytes, transcript: bytes) -> bytes:
    return hmac.digest(key, transcript, "sha256")


def proof_holds(key: bytes, transcript: bytes, code: bytes) -> bool:
    return hmac.compare_digest(proof_of(key, transcript), code)


class SecureChannel:
    """Records over another channel. A record that fails its tag ends the connection."""

    def __init__(self, inner: Channel, send_key: bytes, receive_key: bytes, peer: str) -> None:
        self._inner = inner
        self.peer = peer
        self._seal, self._open = AESGCM(send_key), AESGCM(receive_key)
        self._sent = self._received = 0
        self._out = memoryview(bytearray(BUFFER_BYTES))
        self._out_used = 0
        # Sealed records as they came: [_in_start, _in_end) is not opened yet.
        self._in = memoryview(bytearray(BUFFER_BYTES))
        self._in_start = self._in_end = 0
        self._plain = memoryview(bytearray(RECORD_PLAIN_MAX))
        self._left = memoryview(b"")

    def limit(self, seconds: float) -> None:
        self._inner.limit(seconds)

    def expire_at(self, deadline: float | None) -> None:
        self._inner.expire_at(deadline)

    def readable(self) -> bool:
        return bool(len(self._left)) or self._in_start < self._in_end or self._inner.readable()

    def abort(self) -> None:
        self._inner.abort()

    def close(self) -> None:
        self._inner.close()

    @staticmethod
    def _nonce(counter: int) -> bytes:
        if counter >= RECORDS_MAX:
            raise PeerProtocolError(f"{counter} records under one key; expected a new connection")
        return counter.to_bytes(12, "little")

    def send(self, pieces: Sequence[memoryview]) -> None:
        gathered = bytearray()
        for piece in pieces:
            if len(piece) + len(gathered) <= GATHER_BYTES_MAX:
                gathered += piece
                continue
            if gathered:
                self._seal_record(memoryview(gathered))
                gathered = bytearray()
            for at in range(0, len(piece), RECORD_PLAIN_MAX):
                self._seal_record(piece[at : at + RECORD_PLAIN_MAX])
        if gathered:
            self._seal_record(memoryview(gathered))
        self._flush()

    def _seal_record(self, plain: memoryview) -> None:
        size = len(plain) + TAG_BYTES
        if self._out_used + RECORD_HEADER.size + size > len(self._out):
            self._flush()
        start = self._out_used + RECORD_HEADER.size
        head = RECORD_HEADER.pack(size)
        self._out[self._out_used : start] = head
        sealed = self._out[start : start + size]
        self._seal.encrypt_into(self._nonce(self._sent), plain, head, sealed)
        self._sent += 1
        self._out_used = start + size

    def _flush(self) -> None:
        used, self._out_used = self._out_used, 0
        if used:
            self._inner.send([self._out[:used]])

    def receive_into(self, pieces: Sequence[memoryview]) -> None:
        for piece in pieces:
            at, size = 0, len(piece)
            while at < size:
                if not len(self._left):
                    at += self._open_record(piece[at:])
                    continue
                at += self._take_left(piece[at:])

    def receive_some(self, buffer: memoryview) -> int:
        if not len(self._left):
            opened = self._open_record(buffer)
            if opened:
                return opened
        return self._take_left(buffer)

    def _take_left(self, buffer: memoryview) -> int:
        count = min(len(self._left), len(buffer))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _open_record(self, target: memoryview) -> int:
        """Decrypt the next record into `target` if it fits, else aside; bytes put into `target`."""
        self._have(RECORD_HEADER.size)
        head = bytes(self._in[self._in_start : self._in_start + RECORD_HEADER.size])
        size: int = RECORD_HEADER.unpack(head)[0]
        plain_size = size - TAG_BYTES
        if not 0 < plain_size <= RECORD_PLAIN_MAX:
            raise PeerProtocolError(f"{self.peer}: a record of {size} bytes")
        self._have(RECORD_HEADER.size + size)
        start = self._in_start + RECORD_HEADER.size
        sealed = self._in[start : start + size]
        self._in_start = start + size
        fits = plain_size <= len(target)
        place = (target if fits else self._plain)[:plain_size]
        try:
            self._open.decrypt_into(self._nonce(self._received), sealed, head, place)
        except InvalidTag:
            raise PeerProtocolError(f"{self.peer}: a record fails its authentication") from None
        self._received += 1
        if fits:
            return plain_size
        self._left = place
        return 0

    def _have(self, count: int) -> None:
        """Wait until `count` bytes from the start of the next record on are in the buffer."""
        if self._in_start == self._in_end:
            self._in_start = self._in_end = 0
        if self._in_start + count > len(self._in):
            rest = self._in_end - self._in_start
            self._in[:rest] = bytes(self._in[self._in_start : self._in_end])
            self._in_start, self._in_end = 0, rest
        while self._in_end - self._in_start < count:
            self._in_end += self._inner.receive_some(self._in[self._in_end :])
