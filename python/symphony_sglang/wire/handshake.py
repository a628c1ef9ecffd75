"""The first frames of a connection: prove the key, then compare who serves which pages.

    client                               server
    HELLO  nonce, public key      ->
                                  <-     HELLO  nonce, public key      (REFUSED without a key)
    PROOF over both hellos        ->                                   (REFUSED: wrong key)
                                  <-     PROOF over both hellos
    IDENTITY, probe, engine       ->                                   (REFUSED: field, values)
                                  <-     IDENTITY, local address, engine's metadata

Without a transfer key on both sides the proofs are left out, and the client's IDENTITY follows its
HELLO at once. From the proofs on all is encrypted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple

from symphony_sglang.errors import PeerProtocolError, PeerRefusedError
from symphony_sglang.wire.channel import Channel
from symphony_sglang.wire.frames import receive_frame, send_frame
from symphony_sglang.wire.local_copy import holds_probe
from symphony_sglang.wire.pages import PeerIdentity, find_mismatch
from symphony_sglang.wire.secure_channel import (
    ChannelKeys,
    SecureChannel,
    TransferKey,
    complete_exchange,
    new_exchange,
    proof_holds,
    proof_of,
)
from symphony_sglang.wire.transfer_protocol import (
    HEADER,
    NONCE_BYTES,
    PROTOCOL,
    VERSION,
    Hello,
    Introduction,
    Kind,
    LocalAddress,
    Proof,
    Refused,
    pack_frame,
)

WRONG_KEY = "the transfer keys differ"


class Greeting(NamedTuple):
    """A connection after its handshake."""

    channel: Channel
    peer: PeerIdentity
    local: LocalAddress | None
    metadata: bytes = b""  # of the server's engine; empty without one


def _check_hello(hello: Hello) -> None:
    if hello.protocol != PROTOCOL or hello.version != VERSION:
        raise PeerRefusedError(
            f"protocol: {PROTOCOL} {VERSION} here, {hello.protocol[:64]!r} {hello.version} there"
        )
    if len(hello.nonce) != NONCE_BYTES:
        raise PeerProtocolError(f"nonce of {len(hello.nonce)} bytes; expected {NONCE_BYTES}")


def greet_server(
    channel: Channel,
    peer: str,
    identity: PeerIdentity,
    key: TransferKey | None,
    engine: str = "",
) -> Greeting:
    """The client's side.

    Args:
        engine: name of the one-sided engine that is to move the pages.

    Raises:
        PeerRefusedError: the keys or the identities differ; the message names both values.
        PeerProtocolError, PeerLostError: the peer is no page server, or went away.
    """
    private, public = new_exchange() if key else (None, b"")
    probe = os.urandom(NONCE_BYTES)
    introduction = Introduction(identity, probe=probe, engine=engine)
    frame = pack_frame(Kind.HELLO, 0, Hello(PROTOCOL, VERSION, os.urandom(NONCE_BYTES), public))
    mine = frame[HEADER.size :]
    if key is None:
        # There is nothing to hide and nothing to wait for. In one call: a server that refuses may
        # be gone at the second.
        frame += pack_frame(Kind.IDENTITY, 0, introduction)
    channel.send([memoryview(frame)])
    hello, raw = receive_frame(channel, Kind.HELLO, Hello)
    _check_hello(hello)
    if key is not None and private is not None:
        if not hello.public_key:
            raise PeerRefusedError(f"{peer}: has no transfer key; expected the same as here")
        transcript = mine + raw
        keys = key.derive(complete_exchange(private, hello.public_key), transcript)
        send_frame(channel, Kind.PROOF, 0, Proof(proof_of(keys.client_proof, transcript)))
        proof, _ = receive_frame(channel, Kind.PROOF, Proof)
        if not proof_holds(keys.server_proof, transcript, proof.code):
            raise PeerRefusedError(f"{peer}: {WRONG_KEY}")
        channel = SecureChannel(channel, keys.client_to_server, keys.server_to_client, peer)
        send_frame(channel, Kind.IDENTITY, 0, introduction)
    answer, _ = receive_frame(channel, Kind.IDENTITY, Introduction)
    mismatch = find_mismatch(identity, answer.identity)
    if mismatch is not None:
        raise PeerRefusedError(f"{peer}: {mismatch}")
    local = _with_probe(answer.local, probe)
    return Greeting(channel, answer.identity, local, answer.metadata if engine else b"")


def _with_probe(local: LocalAddress | None, probe: bytes) -> LocalAddress | None:
    return local if local is not None and holds_probe(local, probe) else None


def greet_client(
    channel: Channel,
    identity: PeerIdentity,
    key: TransferKey | None,
    place_probe: Callable[[bytes], LocalAddress | None],
    describe_engine: Callable[[str], bytes] = lambda _name: b"",
) -> Greeting:
    """The server's side; a client that is refused is told why before this raises.

    Args:
        place_probe: puts the client's probe into this process's memory and says where; None where
            the client is not on this host.
        describe_engine: what the client's engine needs; empty where there is none of that name.
    """
    hello, raw = receive_frame(channel, Kind.HELLO, Hello)
    try:
        _check_hello(hello)
        if key is None and hello.public_key:
            raise PeerRefusedError("this worker has no transfer key; expected the same as yours")
        if key is not None and not hello.public_key:
            raise PeerRefusedError("this worker needs the transfer key; none was used")
    except PeerRefusedError as error:
        _refuse(channel, "hello", error)
    if key is not None:
        channel = _prove_to_client(channel, hello, raw, key)
    else:
        answer = Hello(PROTOCOL, VERSION, os.urandom(NONCE_BYTES), b"")
        send_frame(channel, Kind.HELLO, 0, answer)
    theirs, _ = receive_frame(channel, Kind.IDENTITY, Introduction)
    mismatch = find_mismatch(theirs.identity, identity)
    if mismatch is not None:
        # In the client's words: it is the one that reads this.
        _refuse(channel, mismatch.field, PeerRefusedError(str(mismatch)))
    local = place_probe(theirs.probe) if len(theirs.probe) == NONCE_BYTES else None
    metadata = describe_engine(theirs.engine) if theirs.engine else b""
    send_frame(channel, Kind.IDENTITY, 0, Introduction(identity, local=local, metadata=metadata))
    return Greeting(channel, theirs.identity, local)


def _prove_to_client(channel: Channel, hello: Hello, raw: bytes, key: TransferKey) -> Channel:
    private, public = new_exchange()
    answer = Hello(PROTOCOL, VERSION, os.urandom(NONCE_BYTES), public)
    sent = send_frame(channel, Kind.HELLO, 0, answer)
    transcript = raw + sent
    keys: ChannelKeys = key.derive(complete_exchange(private, hello.public_key), transcript)
    proof, _ = receive_frame(channel, Kind.PROOF, Proof)
    if not proof_holds(keys.client_proof, transcript, proof.code):
        _refuse(channel, "transfer_key", PeerRefusedError(WRONG_KEY))
    send_frame(channel, Kind.PROOF, 0, Proof(proof_of(keys.server_proof, transcript)))
    return SecureChannel(channel, keys.server_to_client, keys.client_to_server, "client")


def _refuse(channel: Channel, reason: str, error: PeerRefusedError) -> None:
    send_frame(channel, Kind.REFUSED, 0, Refused(reason, str(error)))
    raise error
