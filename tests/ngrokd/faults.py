"""A file system that fails: every system call of `ngrokd.files.Ops` in turn, once or from then on, or a power cut.

cases = every_fault(
    lambda ops: atomic_write(path, b"new", ops=ops),
    reset=lambda: path.write_bytes(b"old"),
    check=lambda outcome: ...,   # "done" | "failed" | "crashed": look at what is on the disk
)
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from typing import Any, Literal

from ngrokd.errors import NgrokdError
from ngrokd.files import Ops

ERRNOS = (errno.EIO, errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EBUSY, errno.EINTR, errno.EMFILE)
CALLS = frozenset(name for name in vars(Ops) if not name.startswith("_")) - {"geteuid", "sleep"}

Outcome = Literal["done", "failed", "crashed"]


class PowerCut(BaseException):
    """The machine went dark: nothing more is executed, not even what stands in a `finally`."""


class FaultyOps(Ops):
    """Fails the call number `fail_at` (from 0), and every later one when `persistent`.

    With `number` 0 the power is cut there instead: that call and all later ones raise `PowerCut`, and what was written
    without being flushed is gone. `always` names calls that this machine refuses anyway.
    """

    def __init__(self, fail_at: int, number: int, *, persistent: bool, always: Mapping[str, int]) -> None:
        self._fail_at = fail_at
        self._number = number
        self._persistent = persistent
        self._always = always
        self._count = 0
        self._open: set[int] = set()
        self._dirty: set[int] = set()
        self._fired = False

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        return partial(self._run, name, found) if name in CALLS else found

    def sleep(self, seconds: float) -> None:
        """No time passes here."""

    def _run(self, name: str, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        number = self._always.get(name, 0)
        if not number:
            hit = self._count == self._fail_at or (
                self._count > self._fail_at and (self._persistent or not self._number)
            )
            self._count += 1
            if hit:
                self._fired = True
                if not self._number:
                    self._cut_power()
                    raise PowerCut
                number = self._number
        if name == "close":  # a failing close closes all the same (close(2), Linux)
            self._open.discard(args[0])
            self._dirty.discard(args[0])
            call(*args)
        if number:
            raise OSError(number, os.strerror(number))
        if name == "close":
            return None
        result = call(*args, **kwargs)
        if name == "open":
            self._open.add(result)
        elif name in ("write", "pwrite", "ftruncate"):
            self._dirty.add(args[0])
        elif name == "fsync":
            self._dirty.discard(args[0])
        return result

    def _cut_power(self) -> None:
        for fd in self._dirty:
            os.ftruncate(fd, 0)  # what ext4 and XFS leave of a file renamed over without a flush
        self._dirty.clear()

    def finish(self) -> bool:
        """Close what a power cut left open. Returns: whether the fault came to pass."""
        for fd in self._open:
            os.close(fd)
        return self._fired


def every_fault(
    act: Callable[[Ops], object],
    *,
    reset: Callable[[], object],
    check: Callable[[Outcome], object],
    always: Mapping[str, int] | None = None,
    power_cut: bool = True,
) -> int:
    """Run `act` once for every system call it makes, each failing in every way; `check` is told how it ended.

    `reset` comes before each case. No case may leak a descriptor, and `act` may raise only errors of the daemon's own.

    Returns: the number of cases.
    """
    cases = 0
    ways = [(number, persistent) for number in ERRNOS for persistent in (False, True)]
    if power_cut:
        ways.append((0, True))
    for number, persistent in ways:
        for fail_at in count():
            reset()
            descriptors = len(os.listdir("/dev/fd"))
            ops = FaultyOps(fail_at, number, persistent=persistent, always=always or {})
            outcome: Outcome = "done"
            try:
                act(ops)
            except NgrokdError:
                outcome = "failed"
            except PowerCut:
                outcome = "crashed"
            fired = ops.finish()
            assert len(os.listdir("/dev/fd")) == descriptors
            if not fired:
                assert outcome == "done"
                break
            check(outcome)
            cases += 1
    return cases
