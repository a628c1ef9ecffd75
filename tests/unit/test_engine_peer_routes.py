"""Bodies of the peer routes: what is refused, and by which name."""

from __future__ import annotations

import pytest
from fastapi import HTTPException

from symphony_sglang.engine.peer_pull import rank_address
from symphony_sglang.engine.peer_routes import (
    OrderBody,
    PullBody,
    check_order,
    check_pull,
    parse,
)

PULL = {"source": "10.0.0.1:14000", "session_id": "s1"}
ORDER = {"kind": "reserve", "move_id": "m", "session_id": "s", "epoch": 1 << 16}


def test_good_bodies_pass() -> None:
    check_pull(parse(PULL, PullBody))
    check_pull(parse({"source": "[::1]:1", "input_ids": [1, 2]}, PullBody))
    check_order(parse(ORDER, OrderBody))
    check_order(parse({**ORDER, "kind": "copy", "source": "h:1"}, OrderBody))
    check_order(parse({**ORDER, "kind": "release", "move_id": ""}, OrderBody))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "destroy"}, "kind"),
        ({"kind": "copy"}, "source"),
        ({"kind": "copy", "source": "nowhere"}, "source"),
        ({"move_id": ""}, "move_id"),
        ({"move_id": "m" * 2000}, "move_id"),
        ({"session_id": ""}, "session_id"),
        ({"epoch": -1}, "epoch"),
        ({"epoch": 1 << 64}, "epoch"),
        ({"bytes": -5}, "bytes"),
        ({"deadline_s": 1e9}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"cache_salt": "s" * 2000}, "cache_salt"),
        ({"surprise": 1}, "surprise"),
        ({"step": "one"}, "step"),
    ],
)
def test_malformed_order_is_refused_by_field(change, field) -> None:
    with pytest.raises(HTTPException, match=field) as refusal:
        check_order(parse({**ORDER, **change}, OrderBody))
    assert refusal.value.status_code == 400


@pytest.mark.parametrize("body", [None, [], 5, "x", {}, {"source": None, "session_id": "s"}])
def test_what_is_no_body_is_refused(body) -> None:
    with pytest.raises(HTTPException) as refusal:
        parse(body, PullBody)
    assert refusal.value.status_code == 400


def test_rank_addresses_are_in_a_row() -> None:
    assert rank_address("10.0.0.1:14000", 3) == "10.0.0.1:14003"
    assert rank_address("[::1]:14000", 1) == "[::1]:14001"


def test_transfer_key_comes_from_its_setting_else_from_the_api_key() -> None:
    from symphony_sglang.config import SymphonyConfig
    from symphony_sglang.engine.peer_start import transfer_key
    from symphony_sglang.errors import PeerRefusedError
    from symphony_sglang.wire.page_client import PageClient
    from symphony_sglang.wire.page_server import PageServer
    from wire_world import SECRET, connect, filled, identity, serve

    assert transfer_key(SymphonyConfig(), None) is None
    server = PageServer(filled([]), identity(), key=transfer_key(SymphonyConfig(), "k"))
    with server:
        same = transfer_key(SymphonyConfig(), "k")
        PageClient(server.address, identity(), key=same).close()
        for other in (transfer_key(SymphonyConfig(), "l"), None):
            with pytest.raises(PeerRefusedError):
                PageClient(server.address, identity(), key=other)
    named = SymphonyConfig(transfer_key=SECRET)
    with serve(filled([]), secret=SECRET) as server:
        connect(server.address, secret=SECRET).close()
        PageClient(server.address, identity(), key=transfer_key(named, "k")).close()


def test_short_transfer_key_stops_the_start() -> None:
    from symphony_sglang.config import SymphonyConfig
    from symphony_sglang.errors import ConfigError

    with pytest.raises(ConfigError, match=r"--symphony-transfer-key has 5 characters"):
        SymphonyConfig(transfer_key="short")


def test_ports_are_held_against_other_launchers() -> None:
    from symphony_sglang.engine.peer_ports import reserve_peer_ports
    from symphony_sglang.errors import ConfigError

    first = reserve_peer_ports("127.0.0.1", 3, base=0, http_port=31_337)
    second = reserve_peer_ports("127.0.0.1", 3, base=0, http_port=31_337)
    assert not set(range(first, first + 3)) & set(range(second, second + 3))
    with pytest.raises(ConfigError, match=rf"--symphony-peer-port {first + 1}"):
        reserve_peer_ports("127.0.0.1", 2, base=first + 1, http_port=1)
