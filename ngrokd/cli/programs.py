"""Whose connections they are, where the daemon may not look: who asks may see more of this machine than it does.

A daemon within the walls of its service sees no other processes. The person who watches it is often root, or the user
whose programs they are; so what the daemon left open is looked up here, among the processes that this user may see.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Final

from ngrokd.ops.processes import Connection, Processes

_END: Final = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([0-9.]+)):([0-9]{1,5})")


class Programs:
    """Names programs in rows of `flows` and `top`. One per view: it remembers what it has found."""

    def __init__(self, processes: Processes | None = None) -> None:
        self._processes = processes or Processes()

    def name(self, rows: Iterable[dict[str, Any]]) -> None:
        """Put uid, pid and process into those rows that lack them, as far as they can be found."""
        open_ones: dict[Connection, dict[str, Any]] = {}
        for row in rows:
            connection = _connection(row) if row.get("pid") is None and "source" in row else None
            if connection is not None:
                open_ones[connection] = row
        for connection, owner in self._processes.find(open_ones).items():
            row = open_ones[connection]
            row["uid"] = owner.uid if row.get("uid") is None else row["uid"]
            if owner.pid:
                row["pid"], row["process"] = owner.pid, owner.name


def _connection(row: dict[str, Any]) -> Connection | None:
    """The ends of a row; None where another daemon wrote something else there."""
    ends = [_END.fullmatch(str(row.get(end))) for end in ("source", "destination")]
    source, destination = ((end[1] or end[2], int(end[3])) if end else None for end in ends)
    return (source, destination) if source and destination else None
