"""Sending and receiving control frames on a channel."""

from __future__ import annotations

import msgspec

from symphony_sglang.errors import PeerProtocolError, PeerRefusedError
from symphony_sglang.wire.channel import Channel
from symphony_sglang.wire.transfer_protocol import (
    HEADER,
    Body,
    FrameHeader,
    Kind,
    Refused,
    pack_frame,
    unpack_body,
    unpack_header,
)


def send_frame(channel: Channel, kind: Kind, request: int, body: msgspec.Struct) -> bytes:
    """Send a control frame; returns its body, which a handshake signs."""
    frame = pack_frame(kind, request, body)
    channel.send([memoryview(frame)])
    return frame[HEADER.size :]


def receive_header(channel: Channel) -> FrameHeader:
    raw = bytearray(HEADER.size)
    channel.receive_into([memoryview(raw)])
    return unpack_header(raw)


def receive_content(channel: Channel, header: FrameHeader) -> bytearray:
    """The body of a control frame; its size was checked with the header."""
    content = bytearray(header.size)
    channel.receive_into([memoryview(content)])
    return content


def receive_frame(channel: Channel, kind: Kind, body_type: type[Body]) -> tuple[Body, bytes]:
    """The next frame, which must be of `kind`, with its raw body.

    Raises:
        PeerRefusedError: the peer sent REFUSED instead.
        PeerProtocolError: it sent anything else.
    """
    header = receive_header(channel)
    if header.kind is Kind.REFUSED:
        raise refusal(unpack_body(receive_content(channel, header), Refused))
    if header.kind is not kind:
        raise PeerProtocolError(f"{header.kind.name} frame; expected {kind.name}")
    content = bytes(receive_content(channel, header))
    return unpack_body(content, body_type), content


def refusal(body: Refused) -> PeerRefusedError:
    return PeerRefusedError(f"the peer refuses ({body.reason}): {body.message:.1000}")
