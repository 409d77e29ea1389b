"""The list of ready descriptors of macOS, where there is none: in front of a double that has the kernel's rules.

Those (kqueue(2)): a registration is a descriptor and a filter; adding one that exists changes nothing; deleting one
that does not exist fails with ENOENT; a closed descriptor takes its registrations with it, and changing one fails with
EBADF; readiness is told per filter, the end of the other side as EV_EOF on the filters that are registered.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import select
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import tun

READ, WRITE, ADD, DELETE, EOF = -1, -2, 1, 2, 0x8000


@dataclass
class Event:
    ident: int
    filter: int
    flags: int = ADD


class Kernel:
    """A kqueue."""

    def __init__(self) -> None:
        self.registered: dict[tuple[int, int], None] = {}
        self.open = {5, 6}
        self.ready: dict[tuple[int, int], int] = {}  # flags
        self.calls = 0

    def fileno(self) -> int:
        return 99

    def close(self) -> None:
        self.registered.clear()

    def close_fd(self, fd: int) -> None:
        self.open.discard(fd)
        for key in [key for key in self.registered if key[0] == fd]:
            del self.registered[key]

    def control(self, changes: list[Event] | None, most: int, timeout: float | None = None) -> list[Event]:
        self.calls += 1
        for change in changes or []:
            key = change.ident, change.filter
            if change.ident not in self.open:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if change.flags == ADD:
                self.registered[key] = None
            elif key in self.registered:
                del self.registered[key]
            else:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if most:
            assert timeout == 0, "None would wait for good"
        found = [Event(*key, self.ready[key]) for key in self.registered if key in self.ready]
        return found[:most]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module as macOS would load it."""
    monkeypatch.setattr(sys, "platform", "darwin")
    for name, value in {
        "kqueue": Kernel,
        "kevent": Event,
        "KQ_FILTER_READ": READ,
        "KQ_FILTER_WRITE": WRITE,
        "KQ_EV_ADD": ADD,
        "KQ_EV_DELETE": DELETE,
    }.items():
        monkeypatch.setattr(select, name, value, raising=False)
    path = Path(tun.__file__).parent / "kqueue.py"  # wherever the package is that is tested
    spec = importlib.util.spec_from_file_location("kqueue_of_darwin", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def made(module: ModuleType) -> Any:
    return module.ReadyList()


def test_filters_follow_the_mask(made: Any) -> None:
    kernel: Kernel = made._queue
    for mask, filters in ((1, {READ}), (5, {READ, WRITE}), (4, {WRITE}), (1, {READ})):
        made.modify(5, mask) if kernel.registered else made.register(5, mask)
        assert {kind for _, kind in kernel.registered} == filters
    calls = kernel.calls
    made.modify(5, 1)
    assert kernel.calls == calls, "nothing changed, so the kernel is not asked"
    made.unregister(5)
    assert kernel.registered == {}


def test_readiness_is_told_as_poll_tells_it(made: Any) -> None:
    kernel: Kernel = made._queue
    made.register(5, 5)
    made.register(6, 1)
    kernel.ready = {(5, WRITE): 0, (6, READ): 0, (6, WRITE): 0}
    assert sorted(made.poll(0, 64)) == [(5, 4), (6, 1)]
    assert len(made.poll(0, 1)) == 1


def test_an_end_comes_to_who_asked_for_either_filter(made: Any) -> None:
    """There is no third kind of event: reading or writing finds out what it is."""
    kernel: Kernel = made._queue
    made.register(5, 1)
    made.register(6, 4)
    kernel.ready = {(fd, kind): EOF for fd in (5, 6) for kind in (READ, WRITE)}
    assert sorted(made.poll(0, 64)) == [(5, 1), (6, 4)]


def test_a_number_may_come_back_after_its_watch_was_ended(made: Any) -> None:
    kernel: Kernel = made._queue
    made.register(5, 5)
    made.unregister(5)
    kernel.close_fd(5)
    kernel.open.add(5)
    made.register(5, 1)
    assert set(kernel.registered) == {(5, READ)}


def test_a_number_may_come_back_although_it_was_closed_before_its_watch_ended(made: Any) -> None:
    """Ending it fails, and is over all the same."""
    kernel: Kernel = made._queue
    made.register(5, 1)
    kernel.close_fd(5)
    with pytest.raises(OSError, match="descriptor"):
        made.unregister(5)
    kernel.open.add(5)
    made.register(5, 1)
    assert set(kernel.registered) == {(5, READ)}


def test_what_failed_to_register_is_not_taken_for_watched(made: Any) -> None:
    kernel: Kernel = made._queue
    with pytest.raises(OSError, match="descriptor"):
        made.register(7, 1)
    kernel.open.add(7)
    made.register(7, 1)
    assert (7, READ) in kernel.registered
