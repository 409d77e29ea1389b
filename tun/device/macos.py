"""The utun device of macOS.

A *kernel control* is a part of the kernel that is reached by a socket (sys/kern_control.h). The one called
com.apple.net.utun_control makes a network interface for each socket that connects to it, and takes it away when that
socket is closed. The steps:

    socket(PF_SYSTEM, SOCK_DGRAM, SYSPROTO_CONTROL)
    ioctl(CTLIOCGINFO)              from the control's name to the number that the kernel gave it at this boot
    connect((number, unit))         unit 0 asks for the next free interface; unit N + 1 for "utunN"
    getsockopt(UTUN_OPT_IFNAME)     what the interface is called

From then on each read takes one packet that the kernel routed into the interface and each write delivers one. Four
bytes precede the IP header in both directions: the address family, big-endian, 2 for IPv4 and 30 for IPv6. A packet
whose family is wrong is lost without a word.

There is no offload of any kind. Packets come with their checksums made and must go with them, so every segment is
summed here, and nothing is larger than the MTU. A packet costs a system call and its share of Python, almost whatever
its size, and so the MTU alone decides how fast this path is: see `LARGE_MTU`.

How full is told: the kernel holds packets for us in the socket's receive buffer, and behind it a count of pending
packets (UTUN_OPT_MAX_PENDING_PACKETS, 1 unless it is raised) at which the interface's queue is stopped; with the count
at 1 kernel and reader work in lock-step. In our direction a write fails with ENOBUFS or ENOSPC while the kernel's input
queue is full. The packet is then not taken, but the socket stays writable all the while: only time helps.

macOS has private calls for many packets at once, recvmsg_x and sendmsg_x. They are not used: they are no part of any
header that is promised to stay, and sendmsg_x does not tell how many of a batch were taken when the queue is full, so
what has to be sent again cannot be known.

Not known, for want of a Mac: what the kernel does with packets written while the interface is down. It is taken to lose
them silently; so `drops` cannot count them.

The constants are those of Apple's published headers (bsd/sys/kern_control.h, bsd/sys/socket.h, bsd/net/if_utun.h). They
are written out here because Python knows them on macOS only, and this file is tested everywhere against a double of the
kernel (`tun.testing.darwin`).

Rules of this file: it opens, moves and closes. Addresses, routes and MTU are the host's business. It imports everywhere
and asks the system for nothing but through `Kernel`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Final, Protocol

import trio

from tun.device.base import check_packet, check_segment, ip_header_length
from tun.errors import DeviceError
from tun.wire.checksum import complete

CONTROL_NAME: Final = "com.apple.net.utun_control"

PF_SYSTEM: Final = 32
SYSPROTO_CONTROL: Final = 2  # also the level of the control's socket options
CTLIOCGINFO: Final = 0xC0644E03  # _IOWR('N', 3, struct ctl_info)
CTL_INFO: Final = struct.Struct("=I96s")  # ctl_id, ctl_name

UTUN_OPT_IFNAME: Final = 2
UTUN_OPT_MAX_PENDING_PACKETS: Final = 16

AF_INET: Final = 2
AF_INET6: Final = 30  # not Linux's 10
FAMILY_BYTES: Final = 4
_FAMILY_V4: Final = struct.pack(">I", AF_INET)
_FAMILY_V6: Final = struct.pack(">I", AF_INET6)

# What a cluster of the kernel's packet buffers holds in one piece (two of the common sizes are 4 KiB and 16 KiB), and
# what every stack has met as Ethernet's jumbo frames.
LARGE_MTU: Final = 9000

# Bytes the kernel may hold for us: 900 of the largest packets. kern.ipc.maxsockbuf is 8 MiB where nobody changed it.
RECEIVE_BYTES: Final = 8 * 1024 * 1024
# Packets before the interface's queue is stopped; the receive buffer is then the bound that matters.
PENDING_PACKETS: Final = 512

# How long the kernel's input thread gets to empty its queue, s. It takes microseconds when it is scheduled.
RETRY_S: Final = 0.0005

TCP_CSUM_OFFSET: Final = 16
# A buffer that is too short makes the kernel cut the packet without a word; the MTU may be raised behind our back.
_READ_BYTES: Final = FAMILY_BYTES + 65_535 + 1
# Pieces that one writev takes (IOV_MAX), less prefix and header.
_MOST_PIECES: Final = 1024 - 2

_NAMED: Final = re.compile(r"utun(0|[1-9][0-9]{0,4})")

_FULL: Final = frozenset({errno.EAGAIN, errno.ENOBUFS, errno.ENOSPC})
# The packet was fine and the link is not, or the kernel did not like the packet; either way only the packet is lost.
_DROPPED: Final = {
    errno.ENETDOWN: "link_down",
    errno.EIO: "link_down",
    errno.ENOMEM: "no_memory",
    errno.EINVAL: "refused",
    errno.EMSGSIZE: "refused",
    errno.EAFNOSUPPORT: "refused",
}
# The control is no longer connected: the interface went without us.
_GONE: Final = frozenset({errno.ENOTCONN, errno.EPIPE, errno.ENXIO, errno.ECONNRESET, errno.ESHUTDOWN})

Writev = Callable[[int, Sequence[bytes | bytearray | memoryview]], int]


class ControlSocket(Protocol):
    """What is used of a `socket.socket` of the family PF_SYSTEM."""

    def connect(self, address: tuple[int, int], /) -> None:
        """Connect to the control of this number, as this unit of it."""
        ...

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """Ask for an option of at most `size` bytes."""
        ...

    def setsockopt(self, level: int, option: int, value: int, /) -> None:
        """Set an option."""
        ...

    def setblocking(self, blocking: bool, /) -> None:
        """Wait in system calls, or not."""
        ...

    def fileno(self) -> int:
        """The descriptor."""
        ...

    def detach(self) -> int:
        """The descriptor, which is the caller's from now on."""
        ...

    def close(self) -> None:
        """Close the descriptor."""
        ...


class Kernel(Protocol):
    """The system calls that differ from those of a file; `tun.testing.darwin` has others."""

    @property
    def writev(self) -> Writev:
        """As `os.writev`."""
        ...

    def control_socket(self) -> ControlSocket:
        """Open a socket for kernel controls, not inherited by children."""
        ...

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> bytes:
        """As `fcntl.ioctl`."""
        ...


class Darwin:
    """The kernel of a Mac; implements `Kernel`."""

    writev: Writev = staticmethod(os.writev)

    def control_socket(self) -> ControlSocket:
        """Open a socket for kernel controls."""
        # On a Mac, Python's connect takes (number, unit) for sockets of this family and protocol.
        opened: ControlSocket = socket.socket(PF_SYSTEM, socket.SOCK_DGRAM, SYSPROTO_CONTROL)
        return opened

    def ioctl(self, descriptor: int, request: int, argument: bytes) -> bytes:
        """Ask the descriptor."""
        answer: bytes = fcntl.ioctl(descriptor, request, argument)
        return answer


class Utun:
    """A utun interface; implements `tun.device.base.Device`. Made by `open_utun`.

    Attributes:
        name: the interface's name, which the kernel chose unless it was asked for one.
        mtu: what the link is configured with, as far as the opener knows; only told, never used.
        offload: False, always.
        prefix: 4, the address family.
        drops: packets thrown away by reason: "link_down", "refused" (the kernel called the packet wrong), "no_memory".
    """

    __slots__ = ("_fd", "_only_time_helps", "_writev", "drops", "mtu", "name")

    offload: Final = False
    prefix: Final = FAMILY_BYTES

    def __init__(self, fd: int, name: str, *, mtu: int, writev: Writev = os.writev) -> None:
        self._fd = fd
        self._writev = writev
        self._only_time_helps = False
        self.name = name
        self.mtu = mtu
        self.drops: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<Utun {self.name} fd={self._fd}>"

    def fileno(self) -> int:
        """The descriptor, which stays ours; -1 after `close`."""
        return self._fd

    def read(self) -> bytes | None:
        """Take one packet; see `Device.read`."""
        try:
            packet = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._failure(error) from error
        if not packet:  # the end of the stream: a packet has at least its family
            raise self._deleted(errno.ENXIO)
        return packet

    def verified(self, packet: bytes) -> bool:  # noqa: ARG002 - the contract's
        """False: the kernel says nothing about checksums here, and made them itself or passed them on as they came."""
        return False

    def write(
        self, header: bytes | bytearray | memoryview, payload: Sequence[bytes | memoryview], gso_size: int
    ) -> bool:
        """Give one TCP segment to the kernel; see `Device.write`."""
        check_segment(header, payload, gso_size, False)
        head = bytearray(header)  # the owner's must stay as it was: it may have to be sent again
        start = ip_header_length(header)
        complete(head, start, start + TCP_CSUM_OFFSET, payload)
        family = _FAMILY_V4 if header[0] >> 4 == 4 else _FAMILY_V6
        if len(payload) > _MOST_PIECES:
            return self._send((family, head, b"".join(payload)))
        return self._send((family, head, *payload))

    def write_packet(self, packet: bytes | bytearray | memoryview) -> bool:
        """Give one complete packet to the kernel; see `Device.write_packet`."""
        check_packet(packet)
        return self._send((_FAMILY_V4 if packet[0] >> 4 == 4 else _FAMILY_V6, packet))

    def _send(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        try:
            self._writev(self._fd, parts)
        except OSError as error:
            return self._failed(error)
        return True

    def _failed(self, error: OSError) -> bool:
        """What a write that failed means: False when the device is full, True when the packet is lost."""
        number = error.errno or 0
        if number in _FULL:
            self._only_time_helps = number != errno.EAGAIN
            return False
        reason = _DROPPED.get(number)
        if reason is None:
            raise self._failure(error) from error
        self.drops[reason] = self.drops.get(reason, 0) + 1
        return True

    async def wait_readable(self) -> None:
        """Wait until `read` may have something or would raise; see `Device.wait_readable`."""
        if self._fd < 0:
            raise self._closed()
        try:
            await trio.lowlevel.wait_readable(self._fd)
        except trio.ClosedResourceError:
            raise self._closed() from None

    async def wait_writable(self) -> None:
        """Wait until `write` may succeed or would raise; see `Device.wait_writable`."""
        if self._fd < 0:
            raise self._closed()
        if self._only_time_helps:
            # The kernel's queue is full and the socket's is not, so the socket would be called writable at once.
            self._only_time_helps = False
            await trio.sleep(RETRY_S)
            if self._fd < 0:
                raise self._closed()
        try:
            await trio.lowlevel.wait_writable(self._fd)
        except trio.ClosedResourceError:
            raise self._closed() from None

    def close(self) -> None:
        """Close the socket; the kernel removes the interface, its addresses and routes."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if trio.lowlevel.in_trio_run():
                trio.lowlevel.notify_closing(fd)
            os.close(fd)

    def _failure(self, error: OSError) -> DeviceError:
        if self._fd < 0:
            return self._closed()
        number = error.errno or 0
        if number in _GONE:
            return self._deleted(number)
        return DeviceError(f"the device {self.name} failed: {error.strerror}", errno=number)

    def _deleted(self, number: int) -> DeviceError:
        return DeviceError(
            f"the interface {self.name} was deleted while it was in use",
            errno=number,
            remedy="the system took it away; it can be made again",
        )

    def _closed(self) -> DeviceError:
        return DeviceError(f"the device {self.name} was closed", errno=errno.EBADF)


def open_utun(name: str, *, mtu: int = LARGE_MTU, kernel: Kernel | None = None) -> Utun:
    """Make a utun interface and open it. Nothing is configured: it has no address, and the kernel's MTU.

    Args:
        name: "utun7" asks for that interface; any other name stands for the next free one, since no interface of this
            kind can have a name of its own. The result's `name` tells which it became.
        mtu: what the link's MTU will be; only remembered.
        kernel: the system calls; None for the real ones.

    Raises:
        DeviceError: with `errno` EBUSY: that interface exists; EPERM or EACCES: not root; ENOENT: the kernel has no
            utun; EAFNOSUPPORT and the like: this is no Mac; EMFILE, ENFILE: too many files are open.
    """
    unit = unit_of(name)
    system = Darwin() if kernel is None else kernel
    control = _open_control(system)
    try:
        number = _control_number(system, control)
        try:
            control.connect((number, unit))
        except OSError as error:
            raise _refused(name if unit else "", error) from error
        try:
            real_name = control.getsockopt(SYSPROTO_CONTROL, UTUN_OPT_IFNAME, 16).rstrip(b"\0").decode("ascii")
        except OSError as error:
            raise DeviceError(
                f"the system does not tell the name of the utun interface it made: {error.strerror}",
                errno=error.errno or 0,
            ) from error
        control.setblocking(False)
        _widen(control)
    except BaseException:
        control.close()
        raise
    return Utun(control.detach(), real_name, mtu=mtu, writev=system.writev)


def unit_of(name: str) -> int:
    """The control's unit for an interface's name: N + 1 for "utunN", 0 ("any") for every other name."""
    match = _NAMED.fullmatch(name)
    return int(match[1]) + 1 if match else 0


def _open_control(kernel: Kernel) -> ControlSocket:
    try:
        return kernel.control_socket()
    except OSError as error:
        number = error.errno or 0
        if number in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit of open files (ulimit -n)"
        elif number in (errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT):
            remedy = "only macOS has sockets for kernel controls"
        elif number in (errno.EPERM, errno.EACCES):
            remedy = "run as root, outside of any sandbox"
        else:
            remedy = ""
        message = f"cannot open a socket for kernel controls: {error.strerror}"
        raise DeviceError(message, errno=number, remedy=remedy) from error


def _control_number(kernel: Kernel, control: ControlSocket) -> int:
    """The number that the kernel gave the control at this boot."""
    question = CTL_INFO.pack(0, CONTROL_NAME.encode("ascii"))
    try:
        return int(CTL_INFO.unpack(kernel.ioctl(control.fileno(), CTLIOCGINFO, question))[0])
    except OSError as error:
        raise DeviceError(
            f"the kernel has no {CONTROL_NAME}: {error.strerror}",
            errno=error.errno or 0,
            remedy="macOS has had it since 10.6; look whether this system was stripped of it",
        ) from error


def _refused(name: str, error: OSError) -> DeviceError:
    """Why the control did not connect; `name` is "" when any interface would have done."""
    number = error.errno or 0
    what = f"the interface {name}" if name else "a utun interface"
    if number in (errno.EPERM, errno.EACCES):
        return DeviceError(
            f"cannot make {what}: only root may", errno=number, remedy="run with sudo, or as a service of launchd"
        )
    if number == errno.EBUSY and name:
        return DeviceError(
            f"{what} is taken: another program has it open (VPNs and services of the system use utun as well)",
            errno=number,
            remedy="choose another number, or a name without one and the system gives the next that is free; "
            f"`ifconfig {name}` shows whose addresses it has",
        )
    return DeviceError(f"cannot make {what}: {error.strerror}", errno=number)


def _widen(control: ControlSocket) -> None:
    """Let the kernel hold more packets for us. Best effort: the device works without, only slower."""
    with contextlib.suppress(OSError):  # before the option existed (macOS 10.11) there was no such count
        control.setsockopt(SYSPROTO_CONTROL, UTUN_OPT_MAX_PENDING_PACKETS, PENDING_PACKETS)
    size = RECEIVE_BYTES
    while size >= 256 * 1024:
        try:
            control.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        except OSError:  # ENOBUFS: more than kern.ipc.maxsockbuf allows
            size //= 2
        else:
            return
