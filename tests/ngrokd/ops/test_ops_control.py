"""The control socket: the Go daemon's protocol, and everything a client may do wrong."""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.errors import Exit, NgrokdError, StateError, TakenError
from ngrokd.ops import control
from ngrokd.ops.control import (
    BadRequest,
    Command,
    ControlError,
    ControlServer,
    ControlSocket,
    JsonScanner,
    SocketError,
    encode_answer,
    parse_request,
)
from ngrokd.ops.peers import Peer, peer_of

ROOT = Peer(100, 0, 0)
OPERATOR = Peer(101, 500, 500)  # the user the daemon runs as
MEMBER = Peer(102, 1000, 1000, frozenset({1000, 77}))
STRANGER = Peer(103, 1001, 1001, frozenset({1001}))
GROUP = 77

STATUS = {"registered": True, "operator_id": "k8sop_2", "endpoint_count": 13, "ingress_endpoint": "ingress:443"}


async def answer_status(_arguments: list[str], _peer: Peer) -> object:
    return STATUS


async def set_key(arguments: list[str], _peer: Peer) -> object:
    if not arguments:
        raise ControlError("API key required", code=Exit.USAGE)
    return "API key set successfully"


async def fail(_arguments: list[str], _peer: Peer) -> object:
    raise StateError("the disk is full", remedy="free some space")


async def crash(_arguments: list[str], _peer: Peer) -> object:
    raise ZeroDivisionError("secret")


COMMANDS = {
    "status": Command(answer_status),
    "set-api-key": Command(set_key, changes=True),
    "fail": Command(fail),
    "crash": Command(crash),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory whose path leaves room in a socket address."""
    with tempfile.TemporaryDirectory(prefix="ng") as path:
        yield Path(path)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@asynccontextmanager
async def conversation(
    peer: Peer = ROOT, server: ControlServer | None = None, gid: int | None = GROUP
) -> AsyncIterator[trio.abc.Stream]:
    """A client's end of a connection that the server answers on the other end."""
    ours, theirs = trio.testing.memory_stream_pair()
    answering = server or ControlServer(COMMANDS, own_uid=OPERATOR.uid)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(answering.serve_stream, theirs, peer, gid)
        yield ours
        nursery.cancel_scope.cancel()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(piece) async for piece in stream])


async def exchange(request: bytes, peer: Peer = ROOT, server: ControlServer | None = None) -> dict[str, object]:
    """Send, do not half-close, and read the one line."""
    async with conversation(peer, server) as stream:
        await stream.send_all(request)
        line = await read_all(stream)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    answer = json.loads(line)
    assert isinstance(answer, dict)
    return answer


# The Go daemon's words


async def test_status_is_answered_with_the_go_daemons_fields(autojump_clock: trio.testing.MockClock) -> None:
    """Its `ngrokctl` reads success and data; code and message are ours."""
    assert await exchange(b'{"command":"status"}') == {"success": True, "data": STATUS, "code": 0, "message": "ok"}


async def test_the_answer_is_one_compact_line_with_the_fields_in_order(autojump_clock: trio.testing.MockClock) -> None:
    """Byte for byte what a Go client has been getting, with ours behind."""
    async with conversation() as stream:
        await stream.send_all(b'{"command":"set-api-key","args":["K"]}')

        assert await read_all(stream) == (
            b'{"success":true,"data":"API key set successfully","code":0,"message":"API key set successfully"}\n'
        )


async def test_an_unknown_command_is_named(autojump_clock: trio.testing.MockClock) -> None:
    """Exactly so in the Go daemon."""
    answer = await exchange(b'{"command":"x"}')

    assert (answer["success"], answer["error"], answer["code"]) == (False, "unknown command: x", 2)


@pytest.mark.parametrize(
    "junk",
    [
        b"hello",
        b"[1]",
        b"42 ",
        b'"status"',
        b"\xff\xfe",
        b'{"command":"status",}',
        b"{'command':'status'}",
        b'{"command":"status","command":"status"}',
        b'{"command":NaN}',
        b'{"command":Infinity}',
        b'{"command":1}',
        b'{"command":"status","args":"x"}',
        b'{"command":"status","args":[1]}',
        b'{"command":"\xff"}',
        b'{"command":' + b"9" * 5000 + b"}",
        b'{"a":' * 33,
        b'{"a":' + b"[" * 32,
        b'{"a":"' + b"x" * 70000,
        b"{]}",
    ],
)
async def test_junk_is_answered_at_once(junk: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """No clock passes: what can no longer become a request is not waited for."""
    answer = await exchange(junk)

    assert str(answer["error"]).startswith("failed to decode command: ")
    assert answer["code"] == 2
    assert trio.current_time() == 0


async def test_an_unfinished_request_is_answered_when_the_client_ends(autojump_clock: trio.testing.MockClock) -> None:
    """Go's decoder calls it so."""
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(b'{"command":')
    await ours.send_eof()

    await ControlServer(COMMANDS).serve_stream(theirs, ROOT)

    assert json.loads(await read_all(ours))["error"] == "failed to decode command: unexpected EOF"


async def test_a_probe_that_says_nothing_gets_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """A start that looks whether somebody is there connects and leaves."""
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_eof()

    await ControlServer(COMMANDS).serve_stream(theirs, ROOT)

    assert await read_all(ours) == b""


@pytest.mark.parametrize(
    "request_",
    [
        b'  \r\n\t{"command":"status"}',
        b'{"command":"status"}\n',
        b'{"command":"status"}{"command":"x"}',
        b'{"command":"status","args":null,"more":{"nested":[1,{"}":"]"}]}}',
        b'{"command":"st\\u0061tus","x":"\\"}\\\\"}',
    ],
)
async def test_requests_come_in_many_shapes(request_: bytes, autojump_clock: trio.testing.MockClock) -> None:
    """White space before, anything behind, unknown members, brackets and quotes inside of strings."""
    assert (await exchange(request_))["success"] is True


@given(st.data())
def test_the_end_of_a_request_is_found_however_it_is_cut(data: st.DataObject) -> None:
    """Even in the middle of an escape; and never before its last byte."""
    text = st.text(st.characters(codec="utf-8"), max_size=10)
    whole = json.dumps(
        {"command": data.draw(text), "args": data.draw(st.lists(text, max_size=3)), data.draw(text): {"[": ["{\\"]}},
        ensure_ascii=data.draw(st.booleans()),
    ).encode()
    scanner = JsonScanner()
    position = 0

    while position < len(whole):
        step = data.draw(st.integers(1, len(whole) - position))
        found = scanner.feed(whole[position : position + step])
        position += step
        assert found == (position == len(whole))
    assert scanner.data == whole


@given(st.binary(max_size=200))
def test_no_bytes_break_the_scanner_or_the_parser(data: bytes) -> None:
    """BadRequest is all they raise."""
    scanner = JsonScanner()
    try:
        if scanner.feed(data):
            parse_request(scanner.data)
    except BadRequest as error:
        b"".join(encode_answer(control.failure_of(error)))


def test_what_cannot_be_shown_is_escaped() -> None:
    """The answer is ASCII and one line, whatever it quotes."""
    line = b"".join(encode_answer(control.failure("\ud800\n\x1b[2J\u202e", 1)))

    assert line.isascii()
    assert line.count(b"\n") == 1
    assert b"\x1b" not in line


# Errors of commands


async def test_an_error_carries_its_code_and_remedy(autojump_clock: trio.testing.MockClock) -> None:
    """The code is what the command line exits with."""
    assert await exchange(b'{"command":"fail"}') == {
        "success": False,
        "error": "the disk is full",
        "code": 73,
        "message": "the disk is full",
        "hint": "free some space",
    }
    assert (await exchange(b'{"command":"set-api-key"}'))["error"] == "API key required"


async def test_a_bug_in_a_command_ends_that_client_only(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and its message stays inside."""
    server = ControlServer(COMMANDS)

    answer = await exchange(b'{"command":"crash"}', server=server)

    assert (answer["error"], answer["code"]) == ("internal error: ZeroDivisionError", 70)
    assert "ZeroDivisionError" in caplog.text
    assert (await exchange(b'{"command":"status"}', server=server))["success"] is True


async def test_a_strict_server_lets_a_bug_rise(autojump_clock: trio.testing.MockClock) -> None:
    """So that a test run ends with it."""
    ours, theirs = trio.testing.memory_stream_pair()
    await ours.send_all(b'{"command":"crash"}')

    with pytest.raises(ZeroDivisionError):
        await ControlServer(COMMANDS, strict=True).serve_stream(theirs, ROOT)


# Who may


@pytest.mark.parametrize(
    ("peer", "look", "change"),
    [(ROOT, True, True), (OPERATOR, True, True), (MEMBER, True, False), (STRANGER, False, False)],
)
async def test_the_group_may_look_and_root_and_our_user_may_change(
    peer: Peer, look: bool, change: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """By the kernel's word on who it is, besides the mode of the file."""
    looked = await exchange(b'{"command":"status"}', peer)
    changed = await exchange(b'{"command":"set-api-key","args":["K"]}', peer)

    assert (looked["success"], changed["success"]) == (look, change)
    assert {looked["code"], changed["code"]} <= {0, 77}


async def test_a_refused_change_leaves_a_line_in_the_log(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Who tried it is named; the arguments are not."""
    await exchange(b'{"command":"set-api-key","args":["CANARY"]}', STRANGER)

    assert "set-api-key refused to process 103 of uid 1001" in caplog.text
    assert "CANARY" not in caplog.text


# Time and number


async def test_a_slow_request_is_given_five_seconds_in_all(autojump_clock: trio.testing.MockClock) -> None:
    """One byte a second does not renew them."""
    async with conversation() as stream:
        with suppress(trio.BrokenResourceError):
            for byte in b'{"command":"status"}':
                await stream.send_all(bytes([byte]))
                await trio.sleep(1)
        assert 5.0 <= trio.current_time() <= 6.0
        answer = json.loads(await read_all(stream))

    assert answer["error"] == "failed to decode command: not whole after 5 s"


async def test_a_client_that_never_reads_is_left_after_five_seconds(autojump_clock: trio.testing.MockClock) -> None:
    """Its connection is closed, and its place is free."""
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ControlServer(COMMANDS).serve_stream, theirs, ROOT, None)
        await ours.send_all(b'{"command":"status"}')

    assert trio.current_time() == 5.0


async def test_each_user_has_eight_places_and_all_together_sixty_four(autojump_clock: trio.testing.MockClock) -> None:
    """Two hundred slow clients of one user leave the others their places."""
    server = ControlServer(COMMANDS, own_uid=OPERATOR.uid)
    clients = []
    async with trio.open_nursery() as nursery:
        for number in range(200):
            ours, theirs = trio.testing.memory_stream_pair()
            clients.append(ours)
            nursery.start_soon(server.serve_stream, theirs, Peer(1, 1000, 1000), None)
            if number < 8:
                await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert server.counters["turned_away"] == 192
        turned_away = json.loads(await read_all(clients[-1]))
        served = await exchange(b'{"command":"status"}', server=server)
        for uid in range(2000, 2007):
            for _ in range(8):
                ours, theirs = trio.testing.memory_stream_pair()
                clients.append(ours)
                nursery.start_soon(server.serve_stream, theirs, Peer(1, uid, uid), None)
        await trio.testing.wait_all_tasks_blocked()
        full = await exchange(b'{"command":"status"}', server=server)
        nursery.cancel_scope.cancel()

    assert (turned_away["error"], turned_away["code"]) == ("too many connections", 75)
    assert served["success"] is True
    assert full["code"] == 75


# The socket


async def ask_socket(path: Path, request: bytes) -> dict[str, object]:
    stream = await trio.open_unix_socket(str(path))
    async with stream:
        await stream.send_all(request)
        answer = json.loads(await read_all(stream))
    assert isinstance(answer, dict)
    return answer


async def test_a_client_that_does_not_half_close_is_answered_through_the_real_socket(folder: Path) -> None:
    """As Go's ngrokctl behaves: it waits for the answer with its side open."""
    with ControlSocket(str(folder / "s")) as listening:
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(COMMANDS).serve, listening)

            answer = await ask_socket(folder / "s", b'{"command":"status"}')

            nursery.cancel_scope.cancel()

    assert answer["data"] == STATUS
    assert names(folder) == []


async def test_surplus_after_the_request_does_not_cost_the_answer(folder: Path) -> None:
    """Linux resets a unix connection that is closed with bytes unread; what was sent before still arrives."""
    with ControlSocket(str(folder / "s")) as listening:
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(COMMANDS).serve, listening)

            stream = await trio.open_unix_socket(str(folder / "s"))
            await stream.send_all(b'{"command":"status"}' + b" " * 60000)
            answer = await stream.receive_some(65536)

            nursery.cancel_scope.cancel()
            await stream.aclose()

    assert json.loads(answer)["success"] is True


async def test_the_socket_has_its_mode_and_group_from_the_first_moment(folder: Path) -> None:
    """The umask is what it was; nobody can connect before `listen`."""
    before = os.umask(0o022)
    try:
        with ControlSocket(str(folder / "s"), str(os.getegid())) as listening:
            status = os.lstat(folder / "s")
            umask = os.umask(0o022)
    finally:
        os.umask(before)

    assert stat.S_IMODE(status.st_mode) == 0o660
    assert status.st_gid == listening.gid == os.getegid()
    assert umask == 0o022


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a file to any group")
async def test_the_group_of_the_configuration_gets_the_socket(folder: Path) -> None:
    """By name or by number."""
    with ControlSocket(str(folder / "s"), "daemon") as listening:
        assert os.lstat(folder / "s").st_gid == listening.gid
    with ControlSocket(str(folder / "s"), "12345"):
        assert os.lstat(folder / "s").st_gid == 12345


async def test_an_unknown_group_is_an_error(folder: Path) -> None:
    """Falling back to another group would open the socket to the wrong people."""
    with pytest.raises(SocketError, match="there is no group 'no-such-group'"):
        ControlSocket(str(folder / "s"), "no-such-group")


async def test_a_living_owner_is_named_and_keeps_its_socket(folder: Path) -> None:
    """The second daemon ends, the first one never notices."""
    with ControlSocket(str(folder / "s")) as listening:
        async with trio.open_nursery() as nursery:
            await nursery.start(ControlServer(COMMANDS).serve, listening)

            with pytest.raises(TakenError, match=rf"belongs to process {os.getpid()} \("):
                ControlSocket(str(folder / "s"))

            assert (await ask_socket(folder / "s", b'{"command":"status"}'))["success"] is True
            nursery.cancel_scope.cancel()


async def test_a_living_socket_without_our_lock_is_found_by_connecting(folder: Path) -> None:
    """The Go daemon holds no lock."""
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "s"))
        other.listen(1)

        with pytest.raises(TakenError, match=f"belongs to process {os.getpid()}") as caught:
            ControlSocket(str(folder / "s"))

    assert caught.value.exit_code is Exit.CANNOT_CREATE
    assert names(folder) == ["s"]


async def test_a_living_socket_with_a_full_queue_is_still_living(folder: Path) -> None:
    """Nobody accepts, and a connect would wait: that is not a dead one."""
    with socket.socket(socket.AF_UNIX) as other, socket.socket(socket.AF_UNIX) as first:
        other.bind(str(folder / "s"))
        other.listen(0)
        first.connect(str(folder / "s"))
        filler = socket.socket(socket.AF_UNIX)
        filler.setblocking(False)
        with filler, pytest.MonkeyPatch.context() as patch:
            patch.setattr(control, "_PROBE_S", 0.05)
            filler.connect_ex(str(folder / "s"))

            with pytest.raises(TakenError):
                ControlSocket(str(folder / "s"))


async def test_the_socket_of_a_killed_run_is_replaced(folder: Path) -> None:
    """Its file is there, and nobody answers; its lock file names a process that holds no lock any more."""
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(folder / "s"))
    (folder / "s.lock").write_text("4711 somebody\n")

    with ControlSocket(str(folder / "s")):
        assert stat.S_ISSOCK(os.lstat(folder / "s").st_mode)

    assert names(folder) == []


@pytest.mark.parametrize("kind", ["file", "link", "directory"])
async def test_what_is_not_a_socket_is_left_alone(folder: Path, kind: str) -> None:
    """A path in the configuration must not delete what it names by mistake."""
    (folder / "precious").write_text("precious")
    if kind == "file":
        (folder / "s").write_text("precious")
    elif kind == "link":
        (folder / "s").symlink_to(folder / "precious")
    else:
        (folder / "s").mkdir()
    before = os.lstat(folder / "s")

    with pytest.raises(TakenError, match="is not a socket"):
        ControlSocket(str(folder / "s"))

    assert os.lstat(folder / "s").st_ino == before.st_ino
    assert (folder / "precious").read_text() == "precious"
    assert not (folder / "s.lock").exists()


async def test_a_missing_directory_is_named(folder: Path) -> None:
    """With the command that makes it."""
    with pytest.raises(SocketError) as caught:
        ControlSocket(str(folder / "no" / "s"))

    assert caught.value.exit_code is Exit.CANNOT_CREATE
    assert caught.value.remedy == f"make the directory: mkdir -p {folder}/no"


async def test_a_file_that_replaced_our_socket_is_not_removed(folder: Path) -> None:
    """Somebody moved the path away under us: it is not ours to clean."""
    with ControlSocket(str(folder / "s")):
        os.unlink(folder / "s")
        (folder / "s").write_text("theirs")

    assert (folder / "s").read_text() == "theirs"


async def test_a_lack_of_descriptors_is_waited_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """EMFILE ends no listener and makes no busy loop."""

    class Listener:
        def __init__(self) -> None:
            self.left = 3

        async def accept(self) -> object:
            await trio.lowlevel.checkpoint()
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            await trio.sleep_forever()

        def close(self) -> None: ...

    with ControlSocket(str(folder / "s")) as listening:
        real = listening.listener
        listening.listener = Listener()  # type: ignore[assignment]  # only accept is used
        with trio.move_on_after(0.5):
            await ControlServer(COMMANDS).serve(listening)
        real.close()

    assert caplog.text.count("cannot accept a client") == 3


def test_the_kernel_says_who_is_there() -> None:
    """Pid, user and groups of a socket pair's other end are our own."""
    one, other = socket.socketpair()
    with one, other:
        peer = peer_of(one)

    assert (peer.pid, peer.uid, peer.gid) == (os.getpid(), os.getuid(), os.getgid())
    assert peer.groups >= set(os.getgroups())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become somebody else")
def test_the_kernel_says_in_which_groups_somebody_is(folder: Path) -> None:
    """Members of the configured group have it as one of many, hardly ever as their first."""
    connect = (
        "import os, socket, sys; os.setgroups([77, 5000]); os.setgid(65534); os.setuid(65534);"
        "socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    )
    folder.chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "s"))
        os.chmod(folder / "s", 0o666)
        listener.listen(1)
        subprocess.run([sys.executable, "-S", "-c", connect, str(folder / "s")], check=True)
        connection, _ = listener.accept()
        with connection:
            peer = peer_of(connection)

    assert (peer.uid, peer.gid, peer.groups) == (65534, 65534, frozenset({77, 5000}))


def test_a_control_error_is_one_of_ours() -> None:
    """The command line needs to catch one family."""
    assert issubclass(ControlError, NgrokdError)
