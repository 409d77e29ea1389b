"""Answers that go on: who gets them, how they end, and that nobody can hold the daemon up with them."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
import trio
import trio.testing

from ngrokd.errors import Exit, StateError
from ngrokd.ops.control import STREAMS_PER_USER, Command, ControlServer, Start, Streaming
from ngrokd.ops.peers import Peer

ROOT = Peer(100, 0, 0)
OPERATOR = Peer(101, 500, 500)
MEMBER = Peer(102, 1000, 1000, frozenset({1000, 77}))
GROUP = 77


async def count(arguments: list[str], _peer: Peer, start: Start) -> None:
    """Lines 1, 2, 3, one a second."""
    if not arguments:
        raise StateError("count to what?", remedy="say it")
    send = await start({"to": arguments[0]})
    for number in range(int(arguments[0])):
        await trio.sleep(1)
        await send(b'{"n":%d}\n' % (number + 1))


async def break_off(_arguments: list[str], _peer: Peer, start: Start) -> None:
    send = await start(None)
    await send(b'{"n":1}\n')
    raise StateError("the disk is full", remedy="free some space")


async def flood(_arguments: list[str], _peer: Peer, start: Start) -> None:
    send = await start(None)
    while True:
        await send(b"x" * 4096 + b"\n")


async def answer_status(_arguments: list[str], _peer: Peer) -> object:
    return {"ok": True}


COMMANDS: dict[str, Command | Streaming] = {
    "status": Command(answer_status),
    "pause": Command(answer_status, changes=True, for_group=True),
    "count": Streaming(count),
    "break-off": Streaming(break_off),
    "flood": Streaming(flood),
    "record": Streaming(count, changes=True),
}


def make_server() -> ControlServer:
    return ControlServer(COMMANDS, own_uid=OPERATOR.uid, strict=True)


async def read_lines(stream: trio.abc.ReceiveStream) -> list[Any]:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return [json.loads(line) for line in data.splitlines()]


async def exchange(command: str, *arguments: str, peer: Peer = ROOT) -> list[Any]:
    """All lines of an answer; the client stays until the server ends it."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server().serve_stream, theirs, peer, GROUP)
        await ours.send_all(json.dumps({"command": command, "args": list(arguments)}).encode())
        return await read_lines(ours)


async def test_lines_follow_the_line_that_says_it_worked(autojump_clock: trio.testing.MockClock) -> None:
    lines = await exchange("count", "3")

    assert lines == [
        {"success": True, "data": {"to": "3"}, "code": 0, "message": "ok"},
        {"n": 1},
        {"n": 2},
        {"n": 3},
    ]


async def test_an_error_before_the_start_is_an_ordinary_failure() -> None:
    assert await exchange("count") == [
        {"success": False, "error": "count to what?", "code": 73, "message": "count to what?", "hint": "say it"}
    ]


async def test_an_error_afterwards_is_the_last_line() -> None:
    lines = await exchange("break-off")

    assert lines[1:] == [{"n": 1}, {"error": {"code": 73, "message": "the disk is full", "hint": "free some space"}}]


async def test_a_client_that_half_closes_ends_it(autojump_clock: trio.testing.MockClock) -> None:
    """It has no other way to say that it does not listen any more, while nothing is sent."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server().serve_stream, theirs, ROOT, None)
        await ours.send_all(b'{"command":"count","args":["100"]}')
        await trio.sleep(2.5)
        await ours.send_eof()
        lines = await read_lines(ours)

    assert [line.get("n") for line in lines] == [None, 1, 2]
    assert trio.current_time() < 3


async def test_one_that_does_not_read_is_let_go_and_counted(autojump_clock: trio.testing.MockClock) -> None:
    """After five seconds; the others never notice."""
    server = make_server()
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs, ROOT, None)
        await ours.send_all(b'{"command":"flood"}')
        await ours.receive_some(10)

    assert trio.current_time() == 5.0
    assert server.counters["too_slow"] == 1


async def test_what_changes_things_is_for_root_unless_the_group_may(autojump_clock: trio.testing.MockClock) -> None:
    """A recording shows everybody's bytes; a pause is what a group is there for."""
    stranger = Peer(9, 2000, 2000)
    recorded = await exchange("record", "1", peer=MEMBER)
    counted = await exchange("count", "1", peer=MEMBER)
    paused = await exchange("pause", peer=MEMBER)
    refused = await exchange("pause", peer=stranger)

    assert [answer[0]["success"] for answer in (recorded, counted, paused, refused)] == [False, True, True, False]
    assert recorded[0]["code"] == refused[0]["code"] == Exit.NOT_PERMITTED


async def test_those_who_listen_take_no_place_from_those_who_ask(autojump_clock: trio.testing.MockClock) -> None:
    """They are bounded by themselves."""
    server = make_server()
    clients = []
    async with trio.open_nursery() as nursery:
        for _ in range(STREAMS_PER_USER + 1):
            ours, theirs = trio.testing.memory_stream_pair()
            clients.append(ours)
            nursery.start_soon(server.serve_stream, theirs, ROOT, None)
            await ours.send_all(b'{"command":"count","args":["100"]}')
            await trio.testing.wait_all_tasks_blocked()
        turned_away = (await read_lines(clients[-1]))[0]
        ours, theirs = trio.testing.memory_stream_pair()
        nursery.start_soon(server.serve_stream, theirs, ROOT, None)
        await ours.send_all(b'{"command":"status"}')
        asked = (await read_lines(ours))[0]
        nursery.cancel_scope.cancel()

    assert turned_away["code"] == Exit.TEMPORARY
    assert asked["success"] is True


async def test_a_defect_ends_one_client_only(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(_arguments: list[str], _peer: Peer, start: Start) -> None:
        await start(None)
        raise ZeroDivisionError("ours")

    server = ControlServer({"broken": Streaming(broken)})
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, theirs, ROOT, None)
        await ours.send_all(b'{"command":"broken"}')
        lines = await read_lines(ours)

    assert lines[1]["error"]["code"] == Exit.INTERNAL
    assert "ours" in caplog.text


async def test_a_client_that_goes_on_talking_is_let_go(autojump_clock: trio.testing.MockClock) -> None:
    """What it says costs time to read, and means nothing."""
    ours, theirs = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(make_server().serve_stream, theirs, ROOT, None)
        await ours.send_all(b'{"command":"count","args":["100"]}')
        await trio.testing.wait_all_tasks_blocked()
        sent = 0
        with suppress(trio.BrokenResourceError):
            while sent < 100:
                await ours.send_all(b"x" * 4096)
                sent += 1
                await trio.sleep(0.1)

    assert sent < 50
