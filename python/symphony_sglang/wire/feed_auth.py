"""Who may listen to a feed: callers that know the worker's API key, when it has one.

The server's CURVE key pair is derived from the API key. A client must know the server's public key
to speak to it at all (RFC 26: the key itself never crosses the wire), and it can only be derived
from the API key, so no list of clients is needed.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import zmq
from zmq.utils import z85


class FeedKeys(NamedTuple):
    """Z85 text, as ZMQ takes it."""

    public: bytes
    secret: bytes


def server_keys(api_key: str) -> FeedKeys:
    # Slow on purpose: an API key that people chose has less entropy than a CURVE key.
    secret = hashlib.scrypt(
        api_key.encode("utf-8", "surrogatepass"),
        salt=b"symphony_sglang feed",
        n=1 << 14,
        r=8,
        p=1,
        dklen=32,
    )
    encoded = z85.encode(secret)
    return FeedKeys(zmq.curve_public(encoded), encoded)


def guard_server(socket: zmq.Socket[bytes], keys: FeedKeys | None) -> None:
    """Before bind: let in only who knows the API key. None leaves the socket open to all."""
    if keys is not None:
        socket.curve_server = True
        socket.curve_secretkey = keys.secret
        socket.curve_publickey = keys.public


def guard_client(socket: zmq.Socket[Any], keys: FeedKeys | None) -> None:
    """Before connect; `keys` are the server's, of which only the public half is used."""
    if keys is not None:
        own_public, own_secret = zmq.curve_keypair()
        socket.curve_serverkey = keys.public
        socket.curve_publickey = own_public
        socket.curve_secretkey = own_secret
