"""A worker that costs next to nothing: fixed answers, streams paced by a clock.

    python -m benchmark.router_worker PORT

A body with ``"stream": true`` gets ``CHUNKS`` events, the first after ``FIRST_SECONDS``, the others
``GAP_SECONDS`` apart; any other request a small JSON answer.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any, cast

import httptools
import uvloop

FIRST_SECONDS = 0.005
GAP_SECONDS = 0.025
CHUNKS = 16
EVENT = (
    b'data: {"text": " word", "meta_info": {"id": "0123456789abcdef", "completion_tokens": 1}}\n\n'
)
FRAME = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)
INFO = (
    b'{"model_path": "/m", "served_model_name": "m", "is_generation": true, "page_size": 16, '
    b'"dp_size": 1, "tp_size": 1, "text": "hello", "meta_info": {"prompt_tokens": 100, '
    b'"completion_tokens": 1}}'
)
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(INFO),
    INFO,
)


class Connection(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""
        self.left = 0

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        body, self.body = self.body, b""
        if b'"stream": true' in body or b'"stream":true' in body:
            self.left = CHUNKS
            self.transport.write(STREAM_HEAD)
            asyncio.get_running_loop().call_later(FIRST_SECONDS, self.step)
        else:
            self.transport.write(PLAIN)

    def step(self) -> None:
        if self.transport.is_closing():
            return
        self.left -= 1
        if self.left:
            self.transport.write(FRAME)
            asyncio.get_running_loop().call_later(GAP_SECONDS, self.step)
        else:
            self.transport.write(FRAME + b"0\r\n\r\n")


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    factory: Any = Connection
    server = await loop.create_server(factory, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
