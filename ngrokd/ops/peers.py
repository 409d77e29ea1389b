"""Who is at the other end of a unix socket, who holds a TCP port: facts of the kernel for control and web."""

from __future__ import annotations

import os
import socket
import struct
import sys
from dataclasses import dataclass
from typing import Final, Protocol

# Linux unix(7): struct ucred {pid, uid, gid}; asm-generic/socket.h.
_SO_PEERGROUPS: Final = 59
_MAX_OPTION_BYTES: Final = 1024  # all that Python's getsockopt takes: 256 groups
# macOS sys/un.h: SOL_LOCAL options; struct xucred {version, uid, ngroups, groups[16]}.
_SOL_LOCAL: Final = 0
_LOCAL_PEERCRED: Final = 1
_LOCAL_PEERPID: Final = 2


class Socket(Protocol):
    """The one method needed here: a socket of the standard library and one of Trio both have it."""

    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes:
        """As socket.getsockopt."""
        ...


@dataclass(frozen=True, slots=True)
class Peer:
    """The process at the other end, as the kernel knew it when it connected. pid 0: unknown."""

    pid: int
    uid: int
    gid: int
    groups: frozenset[int] = frozenset()

    def __str__(self) -> str:
        return f"process {self.pid} of uid {self.uid}" if self.pid else f"uid {self.uid}"


def peer_of(connection: Socket) -> Peer:
    """Who connected. Raises OSError."""
    if sys.platform == "darwin":
        return _peer_of_darwin(connection)
    pid, uid, gid = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    try:
        packed = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _MAX_OPTION_BYTES)
        groups = struct.unpack(f"{len(packed) // 4}I", packed[: len(packed) // 4 * 4])
    except OSError:  # before Linux 4.13, or more groups than fit: the primary one must do
        groups = ()
    return Peer(pid, uid & 0xFFFFFFFF, gid & 0xFFFFFFFF, frozenset(groups))


def _peer_of_darwin(connection: Socket) -> Peer:
    packed = connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERCRED, 76)
    _version, uid, count = struct.unpack_from("=IIh2x", packed)
    groups = struct.unpack_from(f"={min(count, 16)}I", packed, 12)
    pid = struct.unpack("=i", connection.getsockopt(_SOL_LOCAL, _LOCAL_PEERPID, 4))[0]
    return Peer(pid, uid, groups[0] if groups else 0xFFFFFFFF, frozenset(groups))


def process_name(pid: int) -> str:
    """ "process 12 (nginx)", as far as it can be known."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            name = "".join(character for character in file.read(64).strip() if character.isprintable())
    except OSError:
        name = ""
    return f"process {pid} ({name})" if name else f"process {pid}"


def port_owner(port: int) -> str:
    """Who listens on this TCP port, as `process_name`; "" where that cannot be found out (other OS, missing rights)."""
    inodes = {found for table in ("tcp", "tcp6") for found in _listening_inodes(table, port)}
    if not inodes:
        return ""
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for pid in filter(str.isdecimal, _entries("/proc")):
        for descriptor in _entries(f"/proc/{pid}/fd"):
            try:
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in wanted:
                    return process_name(int(pid))
            except OSError:
                continue
    return ""


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []


def _listening_inodes(table: str, port: int) -> list[str]:
    try:
        with open(f"/proc/self/net/{table}", encoding="ascii") as file:
            rows = [line.split() for line in file.readlines()[1:]]
    except OSError:
        return []
    listen = "0A"  # TCP_LISTEN, include/net/tcp_states.h
    return [row[9] for row in rows if row[3] == listen and int(row[1].rpartition(":")[2], 16) == port]
