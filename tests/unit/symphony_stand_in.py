"""A small HTTP server that answers as a worker does, and keeps what it was asked."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import unquote


class Asked(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: Any


class Reply(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str] = {}  # noqa: RUF012 - never written to


def receipt(**fields: Any) -> dict[str, Any]:
    return {
        "advisory_id": "adv-1",
        "action_id": None,
        "status": "accepted",
        "reason": "",
        "session_id": None,
        "worker": "",
        "state": "queued",
        "tokens": {"total": 32, "goal": 32},
        "bytes": {},
        "timeline": [["queued", 0.0]],
        "not_known_yet": True,
        **fields,
    }


class StandIn:
    """Answers ``answer(asked)`` where that gives a reply, else like an idle worker."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []
        self.answer: Callable[[Asked], Reply | None] = lambda asked: None
        self.advise_gate = threading.Event()
        self.advise_gate.set()
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                content = self.rfile.read(length)
                asked = Asked(
                    self.command,
                    unquote(self.path),
                    {name.lower(): value for name, value in self.headers.items()},
                    json.loads(content) if content else None,
                )
                stand_in.asked.append(asked)
                if asked.path == "/symphony/advise":
                    stand_in.advise_gate.wait(10)
                reply = stand_in.answer(asked) or stand_in.usual(asked)
                data = (
                    reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
                )
                # A client that gave up is no failure of the stand-in.
                with contextlib.suppress(OSError):
                    self.send_response(reply.status)
                    for name, value in reply.headers.items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)

            do_GET = do_POST = do_DELETE = handle_any  # noqa: N815

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def __enter__(self) -> StandIn:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.advise_gate.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def usual(self, asked: Asked) -> Reply:
        match asked.method, asked.path:
            case "POST", "/symphony/advise":
                actions = asked.body.get("actions", [asked.body])
                receipts = [
                    receipt(session_id=action.get("payload", action).get("session_id"))
                    for action in actions
                ]
                return Reply(202, {"message_id": "msg-1", "receipts": receipts})
            case _, path if path.startswith("/symphony/advisories/"):
                return Reply(200, receipt(state="cancelled"))
            case "DELETE", path if path.startswith("/symphony/sessions/"):
                return Reply(200, receipt(state="ready"))
            case "GET", "/get_model_info":
                return Reply(200, {"model_path": "tiny"})
            case "POST", "/generate":
                return self.generate(asked.body)
        return Reply(404, {"detail": f"no route {asked.path}"})

    def generate(self, body: dict[str, Any]) -> Reply:
        logprobs = [[-1.0, 5, "x"], [-2.0, 6, "y"]]
        info = {
            "prompt_tokens": 4,
            "finish_reason": {"type": "stop", "matched": "."},
            "input_token_logprobs": logprobs,
            "output_token_logprobs": [],
        }
        if isinstance(body.get("text"), list):
            return Reply(200, [{"text": "", "meta_info": info} for _ in body["text"]])
        answer = {"text": " done", "meta_info": info}
        if body.get("stream"):
            lines = f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n"
            return Reply(200, lines.encode())
        return Reply(200, answer)

    def hints(self) -> list[tuple[str, dict[str, Any]]]:
        """Every action that came in an envelope, as its type and payload, in order."""
        return [
            (action["action_type"], action["payload"])
            for asked in list(self.asked)
            if asked.path == "/symphony/advise" and "actions" in asked.body
            for action in asked.body["actions"]
        ]

    def generations(self) -> list[dict[str, Any]]:
        return [asked.body for asked in list(self.asked) if asked.path == "/generate"]


@contextlib.contextmanager
def running() -> Iterator[StandIn]:
    with StandIn() as stand_in:
        yield stand_in
