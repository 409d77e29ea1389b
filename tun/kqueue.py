"""kqueue with the face of epoll, as far as `tun.poller` uses it."""

from __future__ import annotations

import select
import sys

assert sys.platform == "darwin"

_IN = 1
_OUT = 4


class ReadyList:
    """The kernel's list of ready descriptors. Masks are those of poll(2)."""

    def __init__(self) -> None:
        self._queue = select.kqueue()
        self._masks: dict[int, int] = {}

    def fileno(self) -> int:
        """A descriptor that is readable when the list is not empty."""
        return self._queue.fileno()

    def register(self, fd: int, mask: int) -> None:
        """Begin to watch `fd`."""
        self.modify(fd, mask)

    def modify(self, fd: int, mask: int) -> None:
        """Watch `fd` for something else."""
        # Forgotten first: where the change fails, the descriptor was closed, and its number may come back as another's.
        before = self._masks.pop(fd, 0)
        changes = []
        for bit, kind in ((_IN, select.KQ_FILTER_READ), (_OUT, select.KQ_FILTER_WRITE)):
            if (before ^ mask) & bit:
                changes.append(select.kevent(fd, kind, select.KQ_EV_ADD if mask & bit else select.KQ_EV_DELETE))
        if changes:
            self._queue.control(changes, 0)
        if mask:
            self._masks[fd] = mask

    def unregister(self, fd: int) -> None:
        """Stop watching `fd`."""
        self.modify(fd, 0)

    def poll(self, timeout: float, most: int) -> list[tuple[int, int]]:
        """What is ready now; `timeout` is always 0 here."""
        # Ends and failures come as events of the filter they concern; asking the descriptor tells which.
        return [
            (event.ident, _IN if event.filter == select.KQ_FILTER_READ else _OUT)
            for event in self._queue.control(None, most, timeout)
        ]

    def close(self) -> None:
        """Give the descriptor back."""
        self._queue.close()
