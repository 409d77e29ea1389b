"""Which process holds a TCP connection: the kernel's table of sockets, and whose descriptors lead to them.

Only when somebody asks, and in a thread: a machine may have a hundred thousand sockets and thousands of processes. What
was found is remembered as long as the socket is there, so that a live view walks through /proc for new ones only.

A process of another network namespace (a container) has its sockets in a table of its own and is not found; of one that
this user may not look into, only the uid is. Elsewhere than on Linux nothing is found.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

Address: TypeAlias = tuple[str, int]
Connection: TypeAlias = tuple[Address, Address]  # the process's own end, and where it leads

_MAPPED: Final = b"\0" * 10 + b"\xff\xff"  # RFC 4291 2.5.5.2: IPv4 over a socket of IPv6
_NAME_BYTES: Final = 64


@dataclass(frozen=True, slots=True)
class Owner:
    """Who holds a connection.

    Attributes:
        uid: of the socket.
        pid: 0 where it could not be found out.
        name: of the process (its `comm`), printable; "" likewise.
    """

    uid: int
    pid: int = 0
    name: str = ""


class Processes:
    """Finds owners. One call at a time.

    Args:
        proc: where /proc is mounted.
    """

    def __init__(self, proc: str = "/proc") -> None:
        self._proc = proc
        self._known: dict[str, tuple[int, str]] = {}  # inode -> pid and name, of sockets that still were there

    def find(self, connections: Iterable[Connection]) -> dict[Connection, Owner]:
        """The owners of those that have one. Never raises: what cannot be read is not found."""
        wanted = {text: each for each in connections for text in _as_in_table(each)}
        if not wanted:
            return {}
        found = list(self._rows(wanted))
        inodes = {inode for _, _, inode in found}
        self._known = {inode: owner for inode, owner in self._known.items() if inode in inodes}
        missing = {f"socket:[{inode}]": inode for inode in inodes.difference(self._known)}
        if missing:
            self._look_for(missing)
        return {each: Owner(uid, *self._known.get(inode, (0, ""))) for each, uid, inode in found}

    def _rows(self, wanted: dict[str, Connection]) -> Iterator[tuple[Connection, int, str]]:
        for table in ("tcp", "tcp6"):
            try:
                with open(f"{self._proc}/self/net/{table}", encoding="ascii") as file:
                    for line in file:
                        fields = line.split(None, 10)
                        each = wanted.get(f"{fields[1]} {fields[2]}") if len(fields) > 9 else None
                        if each is not None and fields[9] != "0":  # inode 0: nobody holds it any more
                            yield each, int(fields[7]), fields[9]
            except (OSError, ValueError):
                continue

    def _look_for(self, links: dict[str, str]) -> None:
        for pid in filter(str.isdecimal, _entries(self._proc)):
            for descriptor in _entries(f"{self._proc}/{pid}/fd"):
                try:
                    link = os.readlink(f"{self._proc}/{pid}/fd/{descriptor}")
                except OSError:
                    continue
                inode = links.pop(link, None)
                if inode is not None:
                    self._known[inode] = (int(pid), self._name(pid))
                    if not links:
                        return

    def _name(self, pid: str) -> str:
        try:
            with open(f"{self._proc}/{pid}/comm", encoding="utf-8", errors="replace") as file:
                return "".join(each for each in file.read(_NAME_BYTES).strip() if each.isprintable())
        except OSError:
            return ""


def _as_in_table(connection: Connection) -> Iterator[str]:
    """The two address columns of /proc/net/tcp or tcp6, as this connection may stand there."""
    ends = [
        (socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host), port) for host, port in connection
    ]
    yield " ".join(f"{_words(packed)}:{port:04X}" for packed, port in ends)
    if all(len(packed) == 4 for packed, _ in ends):
        yield " ".join(f"{_words(_MAPPED + packed)}:{port:04X}" for packed, port in ends)


def _words(packed: bytes) -> str:
    """As the kernel prints addresses: 32-bit words in the machine's byte order."""
    return "".join(f"{int.from_bytes(packed[at : at + 4], sys.byteorder):08X}" for at in range(0, len(packed), 4))


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


__all__ = ["Address", "Connection", "Owner", "Processes"]
