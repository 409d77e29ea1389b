"""The client of the control socket: every way in which nobody, or somebody odd, may answer."""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ngrokd import ask as module
from ngrokd.ask import NoAnswerError, RemoteError, Subscription, ask
from ngrokd.config import Settings
from ngrokd.errors import Exit, NotRunningError, PermissionMissingError


class Listener:
    """A unix socket that answers one client, from a thread, with what it was told; it keeps what it received."""

    def __init__(self, path: str, answer: Callable[[socket.socket], None]) -> None:
        self.received = b""
        self._answer = answer
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(path)
        self._socket.listen(1)
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        connection, _ = self._socket.accept()
        with connection:
            connection.settimeout(5)
            self.received = connection.recv(65536)
            self._answer(connection)

    def join(self) -> None:
        self._thread.join(10)
        self._socket.close()


@pytest.fixture
def path() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="ng") as folder:
        yield str(Path(folder) / "s")


@pytest.fixture
def listen(path: str) -> Iterator[Callable[..., Listener]]:
    listeners = []

    def start(*pieces: bytes) -> Listener:
        def answer(connection: socket.socket) -> None:
            for piece in pieces:
                connection.sendall(piece)

        listener = Listener(path, answer)
        listeners.append(listener)
        return listener

    yield start
    for listener in listeners:
        listener.join()


def test_an_answer_comes_back_with_its_message(path: str, listen: Callable[..., Listener]) -> None:
    """In however many pieces; the request is what the Go daemon reads too."""
    listener = listen(b'{"success":true,"da', b'ta":[1,', b'2],"code":0,"message":"ok"}\n')

    answer = ask(path, "list", ("a", "b"))

    assert (answer.data, answer.message) == ([1, 2], "ok")
    listener.join()
    assert listener.received == b'{"command": "list", "args": ["a", "b"]}'


def test_a_refusal_carries_its_code_and_hint(path: str, listen: Callable[..., Listener]) -> None:
    """The code becomes the exit code."""
    listen(b'{"success":false,"error":"permission denied","code":77,"message":"m","hint":"use sudo"}\n')

    with pytest.raises(RemoteError, match="permission denied") as caught:
        ask(path, "set-api-key", ("K",))

    assert (caught.value.code, caught.value.remedy) == (77, "use sudo")


@pytest.mark.parametrize("code", ["", ',"code":0', ',"code":"x"', ',"code":-1', ',"code":70000', ',"code":1.5'])
def test_a_refusal_without_a_usable_code_is_a_plain_no(path: str, code: str, listen: Callable[..., Listener]) -> None:
    """The Go daemon sends none; and nobody may make a failure exit 0."""
    listen(b'{"success":false,"error":"API key required"' + code.encode() + b"}\n")

    with pytest.raises(RemoteError, match="API key required") as caught:
        ask(path, "set-api-key")

    assert caught.value.code == Exit.NO


def test_nobody_there_is_not_running(path: str) -> None:
    """No file, or the socket of a killed daemon."""
    for prepare in (False, True):
        if prepare:
            with socket.socket(socket.AF_UNIX) as dead:
                dead.bind(path)

        with pytest.raises(NotRunningError, match="nobody answers at") as caught:
            ask(path, "status")

        assert caught.value.exit_code is Exit.NOT_RUNNING
        assert caught.value.remedy == "start it with: sudo ngrokd run"


def test_no_permission_says_what_would_give_it(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root passes every mode, so the refusal is the kernel's in miniature."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)

    with pytest.raises(PermissionMissingError) as caught:
        ask(path, "status")

    assert caught.value.exit_code is Exit.NOT_PERMITTED
    assert "sudo" in caught.value.remedy


@pytest.mark.parametrize(
    "answer",
    [b"", b"\n", b"hello\n", b"[]\n", b'{"success":1}\n', b'{"success":true', b"\xff\n", b"[" * 100_000 + b"\n"],
)
def test_what_makes_no_sense_is_no_answer(path: str, answer: bytes, listen: Callable[..., Listener]) -> None:
    """Some other program listens there, or the daemon died while it answered."""
    listen(answer)

    with pytest.raises(NoAnswerError) as caught:
        ask(path, "status")

    assert caught.value.exit_code is Exit.TEMPORARY


def test_a_daemon_that_hangs_is_given_up(path: str) -> None:
    """Its kernel still accepts; the whole exchange has one deadline, which a byte now and then does not move."""
    done = threading.Event()

    def dribble(connection: socket.socket) -> None:
        while not done.wait(0.02):
            connection.sendall(b" ")

    listener = Listener(path, dribble)
    try:
        with pytest.raises(NoAnswerError, match=r"does not answer within 0\.2 s"):
            ask(path, "status", timeout_s=0.2)
    finally:
        done.set()
        listener.join()


def test_an_endless_answer_is_cut(path: str, monkeypatch: pytest.MonkeyPatch, listen: Callable[..., Listener]) -> None:
    """Memory has a bound."""
    monkeypatch.setattr(module, "ANSWER_BYTES", 1000)
    listen(b"x" * 5000)

    with pytest.raises(NoAnswerError, match="longer than"):
        ask(path, "status")


def test_a_client_that_is_turned_away_unread_still_hears_why(path: str) -> None:
    """The daemon answers and closes before it has read anything."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(1)

        def turn_away() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b'{"success":false,"error":"too many connections","code":75}\n')

        thread = threading.Thread(target=turn_away)
        thread.start()
        with pytest.raises(RemoteError, match="too many connections") as caught:
            ask(path, "status")
        thread.join()

    assert caught.value.code == Exit.TEMPORARY


def test_the_default_socket_is_the_configurations() -> None:
    """It stands twice, so that asking does not need to read the configuration."""
    assert Settings().control.socket == module.DEFAULT_SOCKET


def test_asking_imports_no_more_than_it_needs() -> None:
    """Its cost is every command's cost."""
    unwanted = {"trio", "cryptography", "pyroute2", "h11", "msgspec", "tomli", "click", "ssl", "logging"}
    code = "import sys, ngrokd.ask; print(*{name.split('.')[0] for name in sys.modules})"

    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd())

    assert not unwanted & set(loaded.stdout.split())


# Answers that go on

STARTED = b'{"success":true,"data":{"from":3},"code":0}\n'


def test_lines_follow_the_first(path: str, listen: Callable[..., Listener]) -> None:
    """Cut anywhere; the end of the answer is the end."""
    listen(STARTED + b'{"n":', b"1}\n{", b'"n":2}\n')

    with Subscription(path, "events", ("3",)) as subscription:
        lines = list(subscription)

    assert subscription.data == {"from": 3}
    assert lines == [{"n": 1}, {"n": 2}]


def test_a_subscription_that_is_refused_is_refused_as_any_command(path: str, listen: Callable[..., Listener]) -> None:
    listen(b'{"success":false,"error":"permission denied","code":77}\n')

    with pytest.raises(RemoteError, match="permission denied") as caught:
        Subscription(path, "capture")

    assert caught.value.code == Exit.NOT_PERMITTED


def test_a_last_line_with_an_error_is_raised(path: str, listen: Callable[..., Listener]) -> None:
    listen(STARTED + b'{"n":1}\n{"error":{"code":75,"message":"too late","hint":"hurry"}}\n')

    with Subscription(path, "events") as subscription:
        lines = iter(subscription)
        assert next(lines) == {"n": 1}
        with pytest.raises(RemoteError, match="too late") as caught:
            next(lines)

    assert (caught.value.code, caught.value.remedy) == (75, "hurry")


@pytest.mark.parametrize("piece", [b"nonsense\n", b"[" * 5000 + b"\n"], ids=["text", "deep"])
def test_a_line_that_is_no_json_is_one_error(path: str, listen: Callable[..., Listener], piece: bytes) -> None:
    listen(STARTED + piece)

    with Subscription(path, "events") as subscription, pytest.raises(NoAnswerError):
        list(subscription)


def test_nobody_there_is_the_same_error_as_ever(path: str) -> None:
    with pytest.raises(NotRunningError):
        Subscription(path, "events")


def test_one_who_waits_for_other_things_too_takes_what_has_come(path: str, listen: Callable[..., Listener]) -> None:
    listen(STARTED + b'{"n":1}\n{"n":2}\n{"n"')

    lines: list[object] = []
    with Subscription(path, "top") as subscription:
        while len(lines) < 2:
            if not subscription.has_line:
                assert select.select([subscription], [], [], 5)[0]
            lines += subscription.ready()
        with pytest.raises(NoAnswerError, match="has ended"):
            lines.extend(line for _ in range(5) for line in subscription.ready())

    assert lines == [{"n": 1}, {"n": 2}]
