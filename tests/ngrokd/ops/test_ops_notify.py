"""sd_notify: what systemd would hear."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngrokd.ops.notify import Notifier


class Manager:
    """The receiving end of notifications."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address)
        self.socket.settimeout(1)

    def heard(self) -> list[str]:
        return self.socket.recv(65536).decode().split("\n")


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ng") as path:
        yield Path(path)


@pytest.fixture
def manager(folder: Path) -> Iterator[Manager]:
    manager = Manager(str(folder / "n"))
    yield manager
    manager.socket.close()


def test_states_are_said_as_systemd_reads_them(folder: Path, manager: Manager) -> None:
    """One datagram each, the state before its explanation."""
    notifier = Notifier({"NOTIFY_SOCKET": str(folder / "n")})

    notifier.ready("serving 3 endpoints")
    notifier.status("asking ngrok")
    notifier.watchdog()
    notifier.stopping()

    assert notifier.active
    assert manager.heard() == ["READY=1", "STATUS=serving 3 endpoints"]
    assert manager.heard() == ["STATUS=asking ngrok"]
    assert manager.heard() == ["WATCHDOG=1"]
    assert manager.heard() == ["STOPPING=1"]


def test_a_reload_says_when_it_began(folder: Path, manager: Manager) -> None:
    """Type=notify-reload compares that time with when it sent the signal."""
    Notifier({"NOTIFY_SOCKET": str(folder / "n")}).reloading()

    state, began = manager.heard()

    assert state == "RELOADING=1"
    assert began.startswith("MONOTONIC_USEC=")
    assert began.partition("=")[2].isdecimal()


def test_a_status_cannot_smuggle_another_state(folder: Path, manager: Manager) -> None:
    """The name of an endpoint may be in it."""
    Notifier({"NOTIFY_SOCKET": str(folder / "n")}).status("x\nMAINPID=1\x1b" + "y" * 500)

    [line] = manager.heard()

    assert line.startswith("STATUS=x MAINPID=1 yyy")
    assert len(line) < 300


@pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")
def test_an_abstract_name_is_understood() -> None:
    """Containers pass one: "@" stands for the zero byte."""
    manager = Manager(f"\0ngrokd-test-{os.getpid()}")
    try:
        Notifier({"NOTIFY_SOCKET": f"@ngrokd-test-{os.getpid()}"}).ready()

        assert manager.heard() == ["READY=1"]
    finally:
        manager.socket.close()


@pytest.mark.parametrize("address", ["", "relative", "vsock:2:1234", "/no/such/socket", "/" + "x" * 300])
def test_nobody_to_tell_is_no_error(address: str) -> None:
    """Under a shell, another manager, or one that has gone."""
    Notifier({"NOTIFY_SOCKET": address}).ready()


def test_a_full_queue_is_not_waited_for(folder: Path, manager: Manager) -> None:
    """The loop must not stand still because systemd does."""
    notifier = Notifier({"NOTIFY_SOCKET": str(folder / "n")})

    for _ in range(2000):
        notifier.watchdog()


@pytest.mark.parametrize(
    ("environ", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "42"}, 15.0),
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "43"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "x"}, None),
        ({}, None),
    ],
)
def test_the_watchdog_is_fed_twice_in_its_interval(environ: dict[str, str], interval: float | None) -> None:
    """Unless it watches another process."""
    assert Notifier({"NOTIFY_SOCKET": "/n", **environ}, pid=42).watchdog_s == interval
