"""The feed inside a worker: its ports, and the names of salted pages and of sessions."""

from __future__ import annotations

import socket
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symphony_sglang.errors import ConfigError
from symphony_sglang.wire import feed


def test_reserved_ports_are_refused_to_others_and_bound_by_zmq() -> None:
    zmq = pytest.importorskip("zmq")
    ports_module = pytest.importorskip("symphony_sglang.engine.feed_ports")
    try:
        first = ports_module.reserve_ports("127.0.0.1", 2, base=0, http_port=30_000)
        second = ports_module.reserve_ports("127.0.0.1", 2, base=0, http_port=30_000)
        assert (first.replay, first.state) == (first.events + 2, first.events + 4)
        assert abs(first.events - second.events) >= 6
        with pytest.raises(ConfigError, match="--symphony-feed-port"):
            ports_module.reserve_ports("127.0.0.1", 1, base=first.replay, http_port=1)
        with zmq.Context() as context:
            publisher = context.socket(zmq.PUB)
            publisher.bind(f"tcp://127.0.0.1:{first.events}")
            publisher.close()
    finally:
        ports_module.release_ports()
    again = ports_module.reserve_ports("127.0.0.1", 2, base=0, http_port=30_000)
    ports_module.release_ports()
    assert again == first, "the same worker finds its ports again"


def test_a_port_that_is_listened_on_is_not_chosen() -> None:
    ports_module = pytest.importorskip("symphony_sglang.engine.feed_ports")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        with pytest.raises(ConfigError, match="taken"):
            ports_module.reserve_ports(
                "127.0.0.1", 1, base=other.getsockname()[1], http_port=30_000
            )


def test_a_port_with_dying_connections_is_chosen_again() -> None:
    ports_module = pytest.importorskip("symphony_sglang.engine.feed_ports")
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        port = listener.getsockname()[1]
        client = socket.create_connection(("127.0.0.1", port))
        server, _ = listener.accept()
        server.close()  # the side that closes first keeps the connection in TIME_WAIT
        client.close()
    holder = ports_module.reserve("127.0.0.1", port)
    assert holder is not None
    holder.close()


def test_the_feed_is_as_reachable_as_the_http_port() -> None:
    ports_module = pytest.importorskip("symphony_sglang.engine.feed_ports")
    assert ports_module.bind_address("0.0.0.0") == "0.0.0.0"
    assert ports_module.bind_address("::") == "::"
    assert ports_module.bind_address("localhost") == "127.0.0.1"
    assert ports_module.bind_address("::1") == "::1"
    with pytest.raises(ConfigError, match="--host"):
        ports_module.bind_address("no such host.invalid")


def test_salted_pages_on_disk_get_the_name_that_events_use() -> None:
    pytest.importorskip("symphony_sglang.engine.feed_disk")
    from symphony_sglang.core.page_hash import event_hashes, page_hashes
    from symphony_sglang.core.prefix import Namespace, pack_tokens
    from symphony_sglang.engine.feed_disk import EventNames

    tokens = pack_tokens(list(range(100, 164)))
    salted, keyed = Namespace(None, "s"), Namespace("k", "s")
    names = EventNames(16, names_max=12)
    plain = page_hashes(tokens, 16)
    assert list(names.of_keys(plain)) == list(event_hashes(tokens, 16))
    told = event_hashes(tokens, 16, salted).tolist()
    for at in range(4):
        event = SimpleNamespace(
            cache_salt="s",
            token_ids=list(range(100 + 16 * at, 116 + 16 * at)),
            block_size=16,
            parent_block_hash=told[at - 1] if at else None,
            block_hashes=told[at : at + 1],
        )
        names.learn_events([event, feed.BlockRemoved([1])])
    assert list(names.of_keys(page_hashes(tokens, 16, salted))) == told
    assert list(names.of_keys(page_hashes(tokens, 16, keyed))) != told
    names.learn_session(keyed, tokens)
    assert list(names.of_keys(page_hashes(tokens, 16, keyed))) == told, "events leave the key out"
    names.learn_session(Namespace("other", None), tokens)
    names.learn_session(Namespace("another", None), tokens)
    assert len(names) == 12
    assert list(names.of_keys(page_hashes(tokens, 16, salted))) != told, "the oldest went"


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=8), st.booleans())
def test_a_sessions_last_page_is_that_of_its_whole_prefix(
    turns: list[list[int]], salted: bool
) -> None:
    pytest.importorskip("symphony_sglang.engine.feed_sessions")
    from symphony_sglang.core.page_hash import page_hashes
    from symphony_sglang.core.prefix import Namespace, pack_tokens
    from symphony_sglang.core.sessions import SessionKey
    from symphony_sglang.engine.feed_sessions import SessionChains

    key = SessionKey("s", Namespace(None, "salt" if salted else None))
    chains = SessionChains(2)
    for turn in turns:  # few token values: turns that go on, shorten and differ all come up
        expected = page_hashes(pack_tokens(turn), 2, key.namespace)
        assert chains.last_page(key, pack_tokens(turn)) == (expected[-1] if expected else b"")


def test_a_turn_hashes_only_what_it_added() -> None:
    pytest.importorskip("symphony_sglang.engine.feed_sessions")
    from symphony_sglang.core.prefix import pack_tokens
    from symphony_sglang.core.sessions import SessionKey
    from symphony_sglang.engine.feed_sessions import SessionChains

    chains = SessionChains(16, sessions_max=1)
    key, tokens = SessionKey("s"), list(range(1600))
    chains.last_page(key, pack_tokens(tokens[:1500]))
    assert chains.hashed_pages == 93
    chains.last_page(key, pack_tokens(tokens))
    assert chains.hashed_pages == 100
    chains.last_page(SessionKey("t"), pack_tokens(tokens[:16]))
    assert len(chains) == 1, "the other went"


def test_the_feed_is_on_unless_the_user_chose_otherwise() -> None:
    kv_events = pytest.importorskip("sglang.srt.disaggregation.kv_events")
    from symphony_sglang.config import SymphonyConfig
    from symphony_sglang.engine.feed_ports import release_ports
    from symphony_sglang.engine.launch import feed_arguments

    where: dict[str, Any] = {"host": "127.0.0.1", "http_port": 30_100, "ranks": 2, "nodes": 1}
    assert feed_arguments({"kv_events_config"}, SymphonyConfig(), **where) == []
    assert feed_arguments(set(), SymphonyConfig(feed=False), **where) == []
    assert feed_arguments(set(), SymphonyConfig(), **{**where, "nodes": 2}) == []
    try:
        flag, value = feed_arguments(set(), SymphonyConfig(), **where)
    finally:
        release_ports()
    assert flag == "--kv-events-config"
    read = kv_events.KVEventsConfig.from_cli(value)
    assert read.publisher == "symphony"
    assert read.bind is True
    first = kv_events.parse_tcp_port(read.endpoint)
    assert kv_events.parse_tcp_port(read.replay_endpoint) == first + 2, "one port a rank"
    # An exposed server is described by a wildcard, which SGLang's subscribers must replace.
    try:
        _, value = feed_arguments(set(), SymphonyConfig(), **{**where, "host": "0.0.0.0"})
    finally:
        release_ports()
    exposed = kv_events.KVEventsConfig.from_cli(value)
    assert kv_events.parse_bindable_tcp(exposed.endpoint)[0] == "0.0.0.0"


def test_sglangs_own_events_reach_the_mirror() -> None:
    events = pytest.importorskip("sglang.srt.disaggregation.kv_events")
    from symphony_sglang.core.levels import Level
    from symphony_sglang.wire.feed_log import ResidencyMirror

    mirror = ResidencyMirror()
    assert mirror.level_of(events.StorageMedium.GPU) is Level.DEVICE
    assert mirror.level_of(events.StorageMedium.CPU) is Level.HOST
    assert mirror.level_of(events.StorageMedium.DISK) is None
