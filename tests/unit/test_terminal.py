"""The line editor, the figures line and the plain views, without a terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from symphony_stand_in import Asked, Reply, StandIn, running

from symphony_sglang import cli
from symphony_sglang.client import Receipt, SymphonyClient
from symphony_sglang.client.protocol import parse_residency
from symphony_sglang.clock import SystemClock
from symphony_sglang.errors import ServerUnavailableError
from symphony_sglang.terminal import chat, top
from symphony_sglang.terminal.chat_turn import Chat, Turn
from symphony_sglang.terminal.line_editor import Did, LineEditor, redraw

CHUNKS = [
    b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
    'data: {"choices": [{"delta": {"content": "Grüße, "}}]}\n\n'.encode(),
    b'data: {"choices": [{"delta": {"content": "you"}}]}\n\n',
    b'data: {"choices": [], "usage": {"prompt_tokens": 50, "completion_tokens": 2}, '
    b'"sglext": {"cached_tokens_details": {"device": 32, "host": 0}}}\n\n',
    b"data: [DONE]\n\n",
]


@pytest.fixture
def server() -> Iterator[StandIn]:
    def answer(asked: Asked) -> Reply | None:
        if asked.path == "/v1/chat/completions":
            return Reply(200, b"".join(CHUNKS))
        return None

    with running() as found:
        found.answer = answer
        yield found


def typed(data: bytes) -> tuple[list[Did], str]:
    editor = LineEditor()
    return list(editor.feed(data)), editor.text


def test_first_character_begins_and_the_last_erased_empties() -> None:
    began, changed, emptied = Did.BEGAN, Did.CHANGED, Did.EMPTIED
    assert typed(b"hi\x7f\x7f\x7fx") == ([began, changed, changed, emptied, began], "x")
    assert typed(b"two words\x17")[1] == "two "
    assert typed(b"gone\x15") == ([began, changed, changed, changed, emptied], "")


def test_characters_cut_between_reads_come_whole() -> None:
    editor = LineEditor()
    data = "é東👩".encode()
    did = [event for byte in data for event in editor.feed(bytes([byte]))]
    assert did == [Did.BEGAN, Did.CHANGED, Did.CHANGED]
    assert editor.text == "é東👩"
    assert list(editor.feed(b"\x7f")) == [Did.CHANGED]
    assert editor.text == "é東"


@pytest.mark.parametrize(
    "keys", [b"\x1b[A", b"\x1bOP", b"\x1b[1;5C", b"\x1b[200~", b"\x1bb", b"\x00\x01\x0b"]
)
def test_other_keys_are_passed_over(keys: bytes) -> None:
    assert typed(b"a" + keys + b"b")[1] == "ab"


def test_control_keys_end_and_interrupt() -> None:
    assert typed(b"\x04")[0] == [Did.ENDED]
    assert typed(b"a\x04")[0] == [Did.BEGAN]
    assert typed(b"\x03")[0] == [Did.INTERRUPTED]
    assert typed(b"")[0] == [Did.ENDED]
    assert typed(b"a\r")[0] == [Did.BEGAN, Did.SENT]


def test_redraw_appends_where_it_can_and_counts_wide_rows_where_not() -> None:
    assert redraw("> ", "ab", "abc", 80) == "c"
    assert redraw("> ", "abc", "ab", 80) == "\r\x1b[J> ab"
    # Two columns each: 2 + 2 * 10 columns are three rows of ten.
    assert redraw("> ", "東" * 10, "東", 10) == "\x1b[2A\r\x1b[J> 東"


class Keys:
    """Reads of a terminal, one after the other; nothing more is the end of input."""

    def __init__(self, *reads: bytes) -> None:
        self.reads = list(reads)

    def __call__(self) -> bytes:
        return self.reads.pop(0) if self.reads else b""


def converse(server: StandIn, *reads: bytes, enabled: bool = True) -> tuple[int, str]:
    shown: list[str] = []
    clock = SystemClock()
    with SymphonyClient(server.url) as client:
        hints = chat.Hints(client, "s1", clock, enabled=enabled)
        talk = Chat(server.url, "s1", clock=clock)
        code = chat.converse(talk, hints, Keys(*reads), shown.append)
        hints.close()
        talk.close()
    return code, "".join(shown)


def calls(server: StandIn) -> list[tuple[str, str]]:
    return [(asked.method, asked.path) for asked in server.asked]


def test_chat_advises_from_the_second_turn_on(server: StandIn) -> None:
    code, shown = converse(server, b"hello\r", b"m", b"ore\r", b"\x04")
    assert code == 0
    assert shown.count("Grüße, you") == 2
    assert re.search(r"\[TTFT \d+ ms \| prompt 50: 32 device, 18 computed\]", shown)
    assert "advisory cancelled" in shown  # what the stand-in says of every receipt
    assert calls(server) == [
        ("POST", "/v1/chat/completions"),
        ("POST", "/symphony/advise"),
        ("POST", "/v1/chat/completions"),
        ("GET", "/symphony/advisories/adv-1"),
    ]
    second = server.asked[2].body
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    assert second["session_id"] == "s1"


def test_emptied_line_withdraws_the_hint(server: StandIn) -> None:
    converse(server, b"hello\r", b"x", b"\x7f", b"\x04")
    assert calls(server)[1:] == [
        ("POST", "/symphony/advise"),
        ("DELETE", "/symphony/advisories/adv-1"),
    ]


def test_leaving_withdraws_the_hint(server: StandIn) -> None:
    assert converse(server, b"hello\r", b"x", b"\x03")[0] == chat.INTERRUPTED
    assert calls(server)[-1] == ("DELETE", "/symphony/advisories/adv-1")


def test_chat_without_advisories_sends_none(server: StandIn) -> None:
    converse(server, b"hello\r", b"more\r", enabled=False)
    assert {path for _, path in calls(server)} == {"/v1/chat/completions"}


def test_pipe_is_a_conversation_of_its_lines(server: StandIn) -> None:
    code, shown = converse(server, b"one\n\ntwo")
    assert code == 0
    assert shown.count("Grüße, you") == 2


def test_refused_turn_is_shown_and_forgotten(server: StandIn) -> None:
    usual = server.answer
    server.answer = lambda asked: Reply(400, {"message": "too long for the model"})
    editor_reads = [b"hello\r"]

    def recover() -> bytes:
        if not editor_reads:
            return b""
        read = editor_reads.pop(0)
        if not editor_reads and read == b"again\r":
            server.answer = usual
        return read

    editor_reads = [b"hello\r", b"again\r"]
    shown: list[str] = []
    clock = SystemClock()
    with SymphonyClient(server.url) as client:
        hints = chat.Hints(client, "s1", clock, enabled=True)
        talk = Chat(server.url, "s1", clock=clock)
        chat.converse(talk, hints, recover, shown.append)
        hints.close()
        talk.close()
    assert "too long for the model" in "".join(shown)
    assert [message["content"] for message in talk.messages] == ["again", "Grüße, you"]


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_answer_that_breaks_off_is_an_error(cut: int, server: StandIn) -> None:
    server.answer = lambda asked: Reply(200, b"".join(CHUNKS[:cut]))
    talk = Chat(server.url, "s1", clock=SystemClock())
    with pytest.raises(ServerUnavailableError, match="broke off"):
        talk.say("hi", lambda text: None)
    assert talk.messages == []
    talk.close()


def test_figures_say_what_became_of_the_hint() -> None:
    turn = Turn(
        text="x",
        ttft_seconds=0.0123,
        seconds=1.0,
        prompt_tokens=40,
        completion_tokens=1,
        found={"device": 0, "host": 32, "storage": 0, "computed": 8},
    )
    used = Receipt(
        advisory_id="a", status="accepted", state="used", timeline=[("queued", 0.0), ("used", 2.5)]
    )
    expected = "[TTFT 12 ms | prompt 40: 32 host, 8 computed | advisory used, 2.50 s ahead]"
    assert chat.figures(turn, used, "") == expected
    missing = Receipt(status="missing", state="failed", reason="unknown_session")
    assert "advisory missing (unknown_session)" in chat.figures(turn, missing, "")
    assert "no advisory: gone" in chat.figures(turn, None, "gone")


LEVEL = {"total_tokens": 100, "used_tokens": 50, "protected_tokens": 10}
WORKER = {
    "worker": "w1",
    "levels": {"device": LEVEL, "host": None},
    "counters": {"advisories": {"sessions": 3, "live": 1, "outcomes": {"used": 4, "late": 1}}},
}
MOVE = {"move_id": "m", "session_id": "s", "from": "w1", "to": "w2", "state": "done", "tokens": 5}


def both_views(body: dict[str, Any]) -> tuple[str, str]:
    from rich.console import Console

    residency = parse_residency(body, "http://h:1")
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(top.screen(residency, "http://h:1"))
    console.file.close()
    return console.export_text(), "\n".join(top.plain_lines(residency))


def test_top_shows_levels_sessions_outcomes_and_moves() -> None:
    live, plain = both_views({"workers": [WORKER, {**WORKER, "worker": "w2"}], "moves": [MOVE]})
    for name in ("w1", "w2", " 50 %", "used", "done"):
        assert name in live
    assert plain.splitlines() == [
        "w1 device used 50 of 100 tokens, protected 10",
        "w1 host off",
        "w1 nvme off",
        "w1 sessions 3 live advisories 1",
        "w2 device used 50 of 100 tokens, protected 10",
        "w2 host off",
        "w2 nvme off",
        "w2 sessions 3 live advisories 1",
        "advisories used 8 late 2 wasted 0 expired 0 cancelled 0 reclaimed 0 failed 0",
        "move s w1 -> w2 done 5 tokens",
    ]


def test_top_calls_workers_by_their_addresses() -> None:
    workers = [{**WORKER, "worker": f"id-{n}", "url": f"http://w{n}:80"} for n in (1, 2)]
    move = {**MOVE, "from": "id-1", "to": "id-gone"}
    live, plain = both_views({"workers": workers, "moves": [move]})
    assert "id-1" not in live + plain
    assert plain.splitlines()[0] == "w1:80 device used 50 of 100 tokens, protected 10"
    assert plain.splitlines()[-1] == "move s w1:80 -> id-gone done 5 tokens"


def test_top_of_a_single_worker_needs_no_name() -> None:
    live, plain = both_views({"levels": {}, "counters": {"advisories": None}})
    assert "h:1" in live
    assert plain.splitlines()[0] == "h:1 device off"


def test_commands_print_plain_answers(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["advise", "s1", "--url", server.url, "--in", "2"]) == 0
    assert capsys.readouterr().out == "adv-1 accepted queued 0 of 32 tokens on the device\n"
    assert server.asked[-1].body == {"session_id": "s1", "expected_in_s": 2.0}
    assert cli.main(["advise", "--text", "once", "--url", server.url, "--json"]) == 0
    assert '"advisory_id": "adv-1"' in capsys.readouterr().out
    assert cli.main(["session", "s1", "--release", "--url", server.url]) == 0
    assert capsys.readouterr().out == "session s1 released\n"
    assert cli.main(["advise", "s1", "--wait", "2", "--url", server.url]) == 1  # cancelled there


def test_wrong_use_and_dead_servers_have_exit_codes(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["advise", "--url", server.url]) == 2
    assert "SESSION or --text" in capsys.readouterr().err
    assert cli.main(["session", "nobody", "--url", server.url]) == 2
    assert "not_known" in capsys.readouterr().err
    assert cli.main(["top", "--url", "http://127.0.0.1:9", "--interval", "1"]) == 1
    assert cli.main(["top", "--url", server.url, "--interval", "nan"]) == 2
