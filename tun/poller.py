"""Readiness of descriptors, asked of the kernel without a round of the event loop for each answer.

Theory of operation
-------------------
A relayed question passes two descriptors here (TUN, then TLS) and its answer the same two backwards. Waiting for each
in Trio costs a system call to arm it, a round of the loop, and a task switch: more than the work itself. So one task
waits, in Trio, for one descriptor: the kernel's own list of what is ready (epoll, kqueue). When it wakes it calls back
for everything on that list, and looks again at once, because on this path one event often makes the next: what the
ingress says goes out of the TUN, and the app asks on microseconds later.

It even looks again when the list is empty, for `spin` seconds after the last event. To sleep and be woken costs 40 to
150 us on machines that let their cores doze, several times the whole way of a small request. A spin is a bet, and it is
made only while bets are won: `SpinBudget` keeps count. Between two looks the core is offered to whoever else wants
it, so a busy machine loses nothing by it.

Trio's other tasks get their turn when somebody says that one of them has been woken (`yield_soon`), and every TURN_S
in any case.

Rules of this file: a callback may not wait and may not raise; descriptors are watched level-triggered, so a callback
need not finish what there is; nothing here knows what the descriptors are.
"""

from __future__ import annotations

import os
import select
import sys
import time
from collections.abc import Callable
from typing import Final, TypeAlias

import trio

Callback: TypeAlias = Callable[[], object]

# How long Trio's other tasks may have to wait while something is always ready.
TURN_S: Final = 0.001
# Descriptors per look; the kernel gives the others next time, and in turn.
MAX_EVENTS: Final = 64

_IN: Final = 1  # EPOLLIN
_OUT: Final = 4  # EPOLLOUT
_FAILED: Final = 8 | 16  # EPOLLERR and EPOLLHUP, which are reported whether asked for or not


class SpinBudget:
    """Whether looking again is worth it: pure, told what came of it.

    Attributes:
        spin: seconds after the last event; 0 never spins.
    """

    __slots__ = ("_credit", "spin")

    MOST: Final = 16

    def __init__(self, spin: float) -> None:
        self.spin: float = spin
        self._credit: int = 0

    @property
    def allowed(self) -> bool:
        """Is the bet to be made?"""
        return self._credit > 0

    def won(self) -> None:
        """Something came while looking."""
        if self._credit < self.MOST:
            self._credit += 1

    def lost(self) -> None:
        """Nothing came."""
        self._credit -= 1 if self._credit < 4 else 2

    def slept(self, seconds: float) -> None:
        """After a sleep of `seconds` something came: looking might have found it sooner."""
        if seconds < 2.0 * self.spin:
            self._credit = min(self._credit + 2, self.MOST)


class Poller:
    """Calls back for descriptors that are ready, while `run` runs. See the module's theory.

    Attributes:
        rounds: looks that found something.
        elsewhere: how many tasks wait in Trio for something that is as urgent as what is watched here, the answer to a
            new connection say. Meanwhile there is no spin: it would keep Trio from looking.
    """

    def __init__(self, spin: float = 0.0) -> None:
        """Make a poller; it holds a descriptor until `close`.

        Args:
            spin: seconds to keep looking after the last event, at most, while that pays.
        """
        self.budget = SpinBudget(spin)
        self.rounds = 0
        self.elsewhere = 0
        self._list = _ready_list()
        self._entries: dict[int, tuple[Callback | None, Callback | None]] = {}
        self._yield = False

    def watch(self, fd: int, readable: Callback | None, writable: Callback | None = None) -> None:
        """Have `readable` called whenever `fd` can be read or has failed, `writable` whenever it can be written.

        Called again, it replaces what was asked before; both None ends it, which must happen before `fd` is closed.
        What has ended or was replaced is not called any more, in the midst of a round either. A descriptor that takes
        an ended one's number within a round may be called once without reason.

        Raises: OSError when `fd` cannot be watched; then it is not.
        """
        entries = self._entries
        mask = (_IN if readable is not None else 0) | (_OUT if writable is not None else 0)
        before = entries.pop(fd, None)
        if not mask:
            if before is not None:
                self._list.unregister(fd)
            return
        if before is None:
            self._list.register(fd, mask)
        elif (before[0] is None) != (readable is None) or (before[1] is None) != (writable is None):
            self._list.modify(fd, mask)
        entries[fd] = (readable, writable)

    def yield_soon(self) -> None:
        """A callback has woken a task: let Trio run it before looking further."""
        self._yield = True

    async def run(self) -> None:
        """Call back until cancelled. Cancellation comes between callbacks."""
        clock = time.perf_counter
        budget = self.budget
        while True:
            asleep = clock()
            await trio.lowlevel.wait_readable(self._list.fileno())
            if budget.spin > 0.0:
                budget.slept(clock() - asleep)
            await self._serve()

    async def _serve(self) -> None:
        """Call back for what is ready until nothing is, and nothing comes."""
        clock = time.perf_counter
        poll = self._list.poll
        entries = self._entries
        budget = self.budget
        spin = budget.spin
        begun = last = clock()
        looking = False
        while True:
            events = poll(0, MAX_EVENTS)
            if not events:
                if not budget.allowed or self.elsewhere:
                    return
                if clock() - last >= spin:
                    budget.lost()
                    return
                looking = True
                os.sched_yield()
                continue
            if looking:
                looking = False
                budget.won()
            self.rounds += 1
            for fd, mask in events:
                entry = entries.get(fd)
                if entry is None:
                    continue  # an earlier callback of this round has ended it
                readable, writable = entry
                if readable is not None and mask & (_IN | _FAILED):
                    readable()
                    if writable is not None and entries.get(fd) is not entry:
                        continue  # it has ended its own watch, or asked for something else
                if writable is not None and mask & (_OUT | _FAILED):
                    writable()
                if clock() - begun >= TURN_S:
                    # In the midst of the list, because it may be long; and it must be gone through, because the kernel
                    # would begin with the same ones again.
                    await trio.lowlevel.checkpoint()
                    begun = clock()
            last = clock()
            if self._yield:
                self._yield = False
                # Twice: Trio runs those that are ready in any order, so the first may come back before they had a turn.
                await trio.lowlevel.checkpoint()
                await trio.lowlevel.checkpoint()
                begun = last = clock()

    def close(self) -> None:
        """Give the descriptor back. Idempotent; `run` must have ended."""
        self._entries.clear()
        self._list.close()


if sys.platform == "darwin":
    from tun.kqueue import ReadyList as _ReadyList

    def _ready_list() -> _ReadyList:
        return _ReadyList()
else:

    def _ready_list() -> select.epoll:
        return select.epoll()
