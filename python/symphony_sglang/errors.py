"""The exceptions that callers may see, each with a stable ``code`` for logs and metrics.

SymphonyError
├── ConfigError            a flag, variable or file holds a value out of range
├── UnsupportedError       the combination asked for cannot run, and says which part
├── IncompatibleSglangError   the installed SGLang is not the one this package extends
├── TraceError             a trace line cannot be read
├── ServerUnavailableError a server did not come up, or stopped answering
├── LeavingError           this server is ending, and its schedulers do not answer any more
├── NoWorkerError          no worker may take the request; `.reason` is a short code
├── ClientError            a server refused what a client asked; `.status` is its HTTP status
│   ├── RequestRefusedError   the request is malformed, too large or not possible there (4xx)
│   ├── NotAuthorizedError    no key, or a wrong one (401, 403)
│   ├── NotKnownError         the advisory, session or move is not known there (404)
│   └── TooManyHintsError     over the caller's budget; `.retry_after_seconds` (429)
├── HintError              a hint's body is malformed; `.field` names where
├── IllegalTransitionError    an event that the state machine does not list for that state
├── SessionRecordError     a stored session record is damaged or of another version
├── TransferError          pages cannot be had from a peer
│   ├── PeerRefusedError      a handshake found a difference, or a wrong key
│   ├── PeerLostError         the connection ended or went silent
│   └── PeerProtocolError     the peer sent what the protocol does not allow
├── FeedError              a frame of a worker's feed cannot be read, or a snapshot cannot be had
└── StoreError             the page store cannot do what was asked
    ├── StoreIdentityError    the directory or namespace belongs to something else
    ├── StoreLockedError      another process has the namespace open
    ├── StoreCapacityError    the bounds asked for cannot hold one segment
    └── StoreKeyError         a page key is not a digest (also a ValueError)

Expected outcomes (a miss, a full level) are return values, not exceptions.
"""

from __future__ import annotations


class SymphonyError(Exception):
    """Base of everything this package raises on purpose."""

    code = "symphony_error"


class ConfigError(SymphonyError):
    """A setting is out of range; the message names the setting, the value and the range."""

    code = "config"


class UnsupportedError(SymphonyError):
    """What was asked for cannot run here; the message names the missing feature."""

    code = "unsupported"


class IncompatibleSglangError(SymphonyError):
    """The installed SGLang lacks a seam that this package stands on."""

    code = "incompatible_sglang"


class TraceError(SymphonyError):
    """A trace file has a line that cannot be read; the message gives file and line number."""

    code = "trace"


class HintError(SymphonyError):
    """A hint cannot be read. `field` is a path in the body, as in ``actions[0].payload.text``."""

    code = "hint"

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field


class IllegalTransitionError(SymphonyError):
    """A state machine was sent an event that its table does not list: a fault of the caller."""

    code = "illegal_transition"


class SessionRecordError(SymphonyError):
    """A serialised session record fails its checksum, its version or its lengths."""

    code = "session_record"


class FeedError(SymphonyError):
    """A frame of a worker's feed is malformed, or a snapshot is incomplete or refused."""

    code = "feed"


class StoreError(SymphonyError):
    """The page store refused; the message gives the directory and the reason."""

    code = "store"


class StoreIdentityError(StoreError):
    """The store's header or namespace does not match what was asked for."""

    code = "store_identity"


class StoreLockedError(StoreError):
    """Another process holds this namespace open."""

    code = "store_locked"


class StoreCapacityError(StoreError):
    """The capacity asked for is smaller than the smallest store that can work."""

    code = "store_capacity"


class StoreKeyError(StoreError, ValueError):
    """A page key is not a 32-byte digest; the message gives its start."""

    code = "store_key"


class LeavingError(SymphonyError):
    """The server is ending, and answers nothing that its schedulers would have to say."""

    code = "leaving"


class NoWorkerError(SymphonyError):
    """No worker may take a request; `reason` is none, unhealthy, model, target or tried."""

    code = "no_worker"

    def __init__(self, reason: str, problem: str) -> None:
        super().__init__(problem)
        self.reason = reason


class ServerUnavailableError(SymphonyError):
    """A server did not come up, or stopped answering; the message gives its last words."""

    code = "server_unavailable"


class TransferError(SymphonyError):
    """Pages cannot be had from a peer; the message names the peer and the reason."""

    code = "transfer"


class PeerRefusedError(TransferError):
    """A peer and this worker do not belong together; the message names both values."""

    code = "peer_refused"


class PeerLostError(TransferError):
    """The connection to a peer ended, could not be made, or passed its time limit."""

    code = "peer_lost"


class PeerProtocolError(TransferError):
    """A peer sent bytes that the page protocol does not allow; the connection is closed."""

    code = "peer_protocol"


class ClientError(SymphonyError):
    """A server answered, but not with what was asked for. `status` is its HTTP status."""

    code = "client"

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class RequestRefusedError(ClientError):
    """The request is malformed, too large, or not possible on that server."""

    code = "request_refused"


class NotAuthorizedError(ClientError):
    """The API key is missing or wrong."""

    code = "not_authorized"


class NotKnownError(ClientError):
    """The server knows no such advisory, session, move or route."""

    code = "not_known"


class TooManyHintsError(ClientError):
    """The caller is over its budget of advisories; nothing was taken."""

    code = "too_many_hints"

    def __init__(self, message: str, status: int, retry_after_seconds: float) -> None:
        super().__init__(message, status)
        self.retry_after_seconds = retry_after_seconds
