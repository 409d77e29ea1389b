"""A double of macOS's utun control: a kernel as `tun.device.macos` sees it, made of socket pairs.

A socket of this kernel is one end of a pair that keeps the borders of packets; the test holds the other end as a
`Link`, the kernel's side of the interface. What the device reads, writes, waits for and closes are real descriptors;
what a socket pair cannot do (the control's number, units, options, a full input queue) is done here.

Facts it follows, from Apple's headers and published kernel sources; none was seen on a Mac by this project:

*   The number of a control is told by CTLIOCGINFO for its exact name, else ENOENT.
*   Connecting to the utun control takes root (EPERM); unit 0 means the lowest free one; unit N + 1 is utunN; a taken
    unit is EBUSY, an unknown control ENOENT, a second connect EISCONN.
*   The control's options fail with EINVAL before the connection. UTUN_OPT_IFNAME ends with a zero byte.
    UTUN_OPT_MAX_PENDING_PACKETS is 1 at first and cannot be 0.
*   A receive buffer above kern.ipc.maxsockbuf is ENOBUFS.
*   A packet is preceded by its family in network byte order. Without four bytes, or with a family that is not the
    packet's, it is lost silently.
*   A full input queue is ENOSPC while the socket stays writable.
*   The interface goes with the socket, and its unit is free again.

Chosen, because no source was clear: packets written while the interface is down are lost silently; an interface that
the kernel takes away looks like the end of the stream.

Rules of this file: it decides nothing about packets beyond their family; no tasks, no time.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Sequence
from typing import Final

from tun.device.macos import (
    AF_INET,
    AF_INET6,
    CONTROL_NAME,
    CTL_INFO,
    CTLIOCGINFO,
    FAMILY_BYTES,
    SYSPROTO_CONTROL,
    UTUN_OPT_IFNAME,
    UTUN_OPT_MAX_PENDING_PACKETS,
)

_CONTROL_NUMBER: Final = 5  # of this boot
_FAMILIES: Final = {4: AF_INET, 6: AF_INET6}


class Link:
    """The kernel's side of a utun interface.

    Attributes:
        name: "utunN".
        up: whether it carries packets.
        input_full: whether the kernel's input queue is full.
        max_pending: UTUN_OPT_MAX_PENDING_PACKETS.
        refused: how often a full queue was answered.
        lost: packets that were written and lost, by reason.
    """

    def __init__(self, unit: int, far: socket.socket) -> None:
        self.name = f"utun{unit - 1}"
        self.up = True
        self.input_full = False
        self.max_pending = 1
        self.refused = 0
        self.lost: dict[str, int] = {}
        self._far = far

    @property
    def exists(self) -> bool:
        """Whether the interface is there: nobody has closed the socket or taken it away."""
        if self._far.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._far, 0)
        return not any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0))

    def send(self, packet: bytes) -> None:
        """Route a packet into the interface; lost when it is down."""
        if self.up:
            self._far.send(struct.pack(">I", _FAMILIES[packet[0] >> 4]) + packet)

    def receive(self) -> list[bytes]:
        """The IP packets that were written to the interface, in order."""
        packets = []
        with contextlib.suppress(BlockingIOError):
            while data := self._far.recv(FAMILY_BYTES + 65_536 + 40):
                packets.append(data[FAMILY_BYTES:])
        return packets

    def delete(self) -> None:
        """Take the interface away from under whoever has it."""
        self._far.close()

    def lose(self, reason: str) -> None:
        """Count a packet that nobody will see."""
        self.lost[reason] = self.lost.get(reason, 0) + 1


class DarwinKernel:
    """A kernel with a utun control; implements `tun.device.macos.Kernel`.

    Args:
        root: whether the process may make interfaces.
        taken: interfaces that others have: "utun0".
        has_utun: whether there is such a control at all.
        max_socket_buffer: kern.ipc.maxsockbuf, bytes.
        knows_pending: whether UTUN_OPT_MAX_PENDING_PACKETS exists.

    Attributes:
        links: the interfaces that were made, by name, also those that are gone.
    """

    def __init__(
        self,
        *,
        root: bool = True,
        taken: Sequence[str] = (),
        has_utun: bool = True,
        max_socket_buffer: int = 8 * 1024 * 1024,
        knows_pending: bool = True,
    ) -> None:
        self.root = root
        self.has_utun = has_utun
        self.max_socket_buffer = max_socket_buffer
        self.knows_pending = knows_pending
        self.links: dict[str, Link] = {}
        self._taken = frozenset(taken)
        self._by_descriptor: dict[int, Link] = {}

    def control_socket(self) -> DoubleSocket:
        """Open a socket for kernel controls."""
        return DoubleSocket(self)

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> bytes:
        """CTLIOCGINFO, and nothing else."""
        if request != CTLIOCGINFO:
            raise _error(errno.ENOTTY)
        os.fstat(descriptor)
        _, name = CTL_INFO.unpack(argument)
        if not self.has_utun or name.rstrip(b"\0").decode() != CONTROL_NAME:
            raise _error(errno.ENOENT)
        return CTL_INFO.pack(_CONTROL_NUMBER, name)

    def writev(self, descriptor: int, parts: Sequence[bytes | bytearray | memoryview]) -> int:
        """Write to an interface as its driver would take it."""
        link = self._by_descriptor.get(descriptor)
        if link is None or not link.exists:
            return os.writev(descriptor, parts)  # fails as a closed descriptor or a broken connection does
        packet = b"".join(parts)
        if link.input_full:
            link.refused += 1
            raise _error(errno.ENOSPC)
        if len(packet) <= FAMILY_BYTES:
            link.lose("short")
        elif struct.unpack_from(">I", packet)[0] != _FAMILIES.get(packet[FAMILY_BYTES] >> 4):
            link.lose("family")
        elif not link.up:
            link.lose("down")
        else:
            return os.writev(descriptor, parts)
        return len(packet)

    def attach(self, number: int, unit: int, descriptor: int, far: socket.socket) -> Link:
        """Make the interface for a control socket that connects."""
        if not self.has_utun or number != _CONTROL_NUMBER:
            raise _error(errno.ENOENT)
        if not self.root:
            raise _error(errno.EPERM)
        if unit == 0:
            unit = next(free for free in range(1, 65_536) if not self._is_taken(f"utun{free - 1}"))
        elif self._is_taken(f"utun{unit - 1}"):
            raise _error(errno.EBUSY)
        link = Link(unit, far)
        if link.name in self.links:
            self.links[link.name].delete()  # what is left of an earlier one
        self.links[link.name] = link
        self._by_descriptor[descriptor] = link
        return link

    def close(self) -> None:
        """Give back what the kernel's side holds."""
        for link in self.links.values():
            link.delete()

    def _is_taken(self, name: str) -> bool:
        return name in self._taken or (name in self.links and self.links[name].exists)


class DoubleSocket:
    """A socket of the family PF_SYSTEM; implements `tun.device.macos.ControlSocket`.

    Attributes:
        receive_buffer: bytes, as last set.
    """

    def __init__(self, kernel: DarwinKernel) -> None:
        self.receive_buffer = 512 * 1024  # what the control is registered with
        self._kernel = kernel
        self._link: Link | None = None
        self._near, self._far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._far.setblocking(False)

    def connect(self, address: tuple[int, int], /) -> None:
        """Make an interface; the error is the kernel's."""
        if self._link is not None:
            raise _error(errno.EISCONN)
        number, unit = address
        self._link = self._kernel.attach(number, unit, self._near.fileno(), self._far)

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """The control's options; those of the socket are not asked for."""
        if self._link is None or level != SYSPROTO_CONTROL:
            raise _error(errno.EINVAL)
        if option == UTUN_OPT_IFNAME:
            return (self._link.name.encode() + b"\0")[:size]
        if option == UTUN_OPT_MAX_PENDING_PACKETS and self._kernel.knows_pending:
            return struct.pack("=I", self._link.max_pending)[:size]
        raise _error(errno.ENOPROTOOPT)

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """The receive buffer, and the count of pending packets."""
        if level == socket.SOL_SOCKET and option == socket.SO_RCVBUF:
            if value > self._kernel.max_socket_buffer:
                raise _error(errno.ENOBUFS)
            self.receive_buffer = value
            return
        if self._link is None or level != SYSPROTO_CONTROL:
            raise _error(errno.EINVAL)
        if option != UTUN_OPT_MAX_PENDING_PACKETS or not self._kernel.knows_pending:
            raise _error(errno.ENOPROTOOPT)
        if value <= 0:
            raise _error(errno.EINVAL)
        self._link.max_pending = value

    def setblocking(self, blocking: bool, /) -> None:
        """Wait in system calls, or not."""
        self._near.setblocking(blocking)

    def fileno(self) -> int:
        """The descriptor; -1 when it is closed or was given away."""
        return self._near.fileno()

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        return self._near.detach()

    def close(self) -> None:
        """Close the descriptor, and with it the interface."""
        self._near.close()
        if self._link is None:
            self._far.close()


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
