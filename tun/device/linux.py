"""The TUN device of Linux.

A descriptor of /dev/net/tun that was named with TUNSETIFF *is* the interface: each read takes one packet that the
kernel routed into it, each write delivers one, and closing the last descriptor removes the interface with its addresses
and routes (Documentation/networking/tuntap.rst). A write runs the kernel's receive path before it returns.

With IFF_VNET_HDR each packet is preceded by a virtio_net_hdr (include/uapi/linux/virtio_net.h), ten bytes in the byte
order of the machine:

    flags      u8     1 NEEDS_CSUM: the sum from csum_start on is still to be made; 2 DATA_VALID: it was checked
    gso_type   u8     0 none, 1 TCPv4, 4 TCPv6
    hdr_len    u16    bytes of all headers
    gso_size   u16    payload bytes of each segment that this packet stands for
    csum_start u16    where the sum starts: the transport header
    csum_offset u16   where in the transport header the sum belongs (TCP: 16)

The local kernel hands us its own packets in exactly the form in which it wants ours: one TCP segment of up to 64 KiB
with nothing but the pseudo header in its checksum field. Neither side ever sums the payload, and one system call moves
it. That, and not the language, decides how fast this path is.

The kernel's tun driver believes what it is told. It accepts packets that are too short, too long, or whose header
contradicts their length, and drops them where no counter of ours sees it. So lengths are checked here.

How a link goes away (all seen on a 6.18 kernel): while it is *down*, reads find nothing, no event comes, and writes
fail with EIO; when it is *deleted*, epoll reports an error and both fail with EBADFD.

More queues: the device is opened with IFF_MULTI_QUEUE, so that other descriptors can join with `extra_queue`, each
seeing its share of the flows. That would also let a second daemon join by mistake; IFF_TUN_EXCL keeps it out.

Rules of this file: it opens, moves and closes. Addresses, routes, MTU and queue length are the host's business.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Sequence
from typing import Final

import trio

from tun.device.base import MAX_PACKET, check_packet, check_segment, ip_header_length
from tun.errors import DeviceError
from tun.wire.checksum import complete

CLONE_DEVICE: Final = "/dev/net/tun"

# include/uapi/linux/if_tun.h
TUNSETIFF: Final = 0x400454CA
TUNGETFEATURES: Final = 0x800454CF
TUNSETOFFLOAD: Final = 0x400454D0
TUNGETIFF: Final = 0x800454D2
TUNGETVNETHDRSZ: Final = 0x800454D7
TUNSETVNETHDRSZ: Final = 0x400454D8

IFF_TUN: Final = 0x0001
IFF_MULTI_QUEUE: Final = 0x0100
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
IFF_TUN_EXCL: Final = 0x8000

TUN_F_CSUM: Final = 0x01
TUN_F_TSO4: Final = 0x02
TUN_F_TSO6: Final = 0x04

# include/uapi/linux/virtio_net.h
NEEDS_CSUM: Final = 1
DATA_VALID: Final = 2
GSO_NONE: Final = 0
GSO_TCPV4: Final = 1
GSO_TCPV6: Final = 4
TCP_CSUM_OFFSET: Final = 16

# What the driver answers when the interface is gone. Only Linux has the name, and this file is read elsewhere too.
EBADFD: Final[int] = getattr(errno, "EBADFD", 77)

_VNET: Final = struct.Struct("=BBHHHH")
VNET_BYTES: Final = _VNET.size  # 10; a header of 12 bytes would carry num_buffers, which TUN never uses
_COMPLETE: Final = bytes(VNET_BYTES)
_PLAIN_V4: Final = _VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 20, TCP_CSUM_OFFSET)
_PLAIN_V6: Final = _VNET.pack(NEEDS_CSUM, GSO_NONE, 0, 0, 40, TCP_CSUM_OFFSET)

# A buffer that is too short makes the kernel cut the packet without a word.
_READ_BYTES: Final = VNET_BYTES + 65_535 + 1

_NAME_BYTES: Final = 15  # IFNAMSIZ without the final zero
_IFREQ: Final = struct.Struct("16sH22x")

# The packet was fine and the link is not: it is dropped, TCP sends it again, and the link may come back.
_DROPPED: Final = {
    errno.EIO: "link_down",
    errno.ENOBUFS: "no_memory",
    errno.ENOMEM: "no_memory",
    errno.EINVAL: "refused",
    errno.EMSGSIZE: "refused",
}


class LinuxTun:
    """One queue of a TUN interface; implements `tun.device.base.Device`.

    Attributes:
        name: the interface's name when it was opened.
        mtu: what the opener said the link will have.
        offload: whether packets carry the virtio header and may be larger than the MTU.
        prefix: 10 with offload, else 0.
        drops: packets thrown away by reason: "link_down", "refused" (the kernel called the packet wrong), "no_memory".
    """

    __slots__ = ("_fd", "_flags", "_gso", "drops", "mtu", "name", "offload", "prefix")

    def __init__(self, fd: int, name: str, *, flags: int, mtu: int) -> None:
        self._fd = fd
        self._flags = flags
        self._gso = bytearray(VNET_BYTES)
        self.name = name
        self.mtu = mtu
        self.offload = bool(flags & IFF_VNET_HDR)
        self.prefix = VNET_BYTES if self.offload else 0
        self.drops: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"<LinuxTun {self.name} fd={self._fd} offload={self.offload}>"

    def fileno(self) -> int:
        """The descriptor, which stays ours; -1 after `close`."""
        return self._fd

    def read(self) -> bytes | None:
        """Take one packet; see `Device.read`."""
        try:
            return os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return None
        except OSError as error:
            raise self._gone(error) from error

    def verified(self, packet: bytes) -> bool:
        """Whether the kernel vouches for the transport checksum: its own packets do not have one yet."""
        return self.offload and packet[0] & (NEEDS_CSUM | DATA_VALID) != 0

    def write(
        self, header: bytes | bytearray | memoryview, payload: Sequence[bytes | memoryview], gso_size: int
    ) -> bool:
        """Give one TCP segment to the kernel; see `Device.write`."""
        if not self.offload:
            check_segment(header, payload, gso_size, False)
            # At most one MSS, so the sum is cheap, and the owner's header must stay as it was.
            head = bytearray(header)
            start = ip_header_length(header)
            complete(head, start, start + TCP_CSUM_OFFSET, payload)
            return self._writev((head, *payload))
        if header[0] == 0x45 and 0 <= gso_size <= MAX_PACKET:
            # Nearly every segment. The kernel takes a packet that is not as long as it says, and loses it later.
            length = len(header)
            payload_bytes = 0
            for view in payload:
                payload_bytes += len(view)
            size = length + payload_bytes
            if length < 40 or length != 20 + (header[32] >> 4) * 4 or size != header[2] << 8 | header[3]:
                raise ValueError(f"a segment of {size} bytes whose IP header says {header[2] << 8 | header[3]}")
            vnet: bytes | bytearray = _PLAIN_V4
            if payload_bytes > gso_size > 0:
                vnet = self._gso
                _VNET.pack_into(vnet, 0, NEEDS_CSUM, GSO_TCPV4, length, gso_size, 20, TCP_CSUM_OFFSET)
            try:
                os.writev(self._fd, (vnet, header, *payload))
            except OSError as error:
                return self._failed(error)
            return True
        payload_bytes = check_segment(header, payload, gso_size, True)
        start = ip_header_length(header)
        if gso_size and payload_bytes > gso_size:
            vnet = self._gso
            gso_type = GSO_TCPV4 if header[0] >> 4 == 4 else GSO_TCPV6
            _VNET.pack_into(vnet, 0, NEEDS_CSUM, gso_type, len(header), gso_size, start, TCP_CSUM_OFFSET)
            return self._writev((vnet, header, *payload))
        if start == 20:
            return self._writev((_PLAIN_V4, header, *payload))
        if start == 40 and header[0] >> 4 == 6:
            return self._writev((_PLAIN_V6, header, *payload))
        _VNET.pack_into(self._gso, 0, NEEDS_CSUM, GSO_NONE, 0, 0, start, TCP_CSUM_OFFSET)
        return self._writev((self._gso, header, *payload))

    def write_packet(self, packet: bytes | bytearray | memoryview) -> bool:
        """Give one complete packet to the kernel; see `Device.write_packet`."""
        check_packet(packet)
        return self._writev((_COMPLETE, packet) if self.offload else (packet,))

    def _writev(self, parts: Sequence[bytes | bytearray | memoryview]) -> bool:
        try:
            os.writev(self._fd, parts)
        except OSError as error:
            return self._failed(error)
        return True

    def _failed(self, error: OSError) -> bool:
        """What a write that failed means: False when the device is full, True when the packet is lost."""
        if isinstance(error, BlockingIOError):
            return False
        reason = _DROPPED.get(error.errno or 0)
        if reason is None:
            raise self._gone(error) from error
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
        try:
            await trio.lowlevel.wait_writable(self._fd)
        except trio.ClosedResourceError:
            raise self._closed() from None

    def is_gone(self) -> bool:
        """Whether the interface was deleted, or this queue closed; see `QueuedDevice.is_gone`."""
        try:
            fcntl.ioctl(self._fd, TUNGETIFF, bytes(_IFREQ.size))
        except (OSError, ValueError):  # EBADFD; and -1 is no descriptor
            return True
        return False

    def extra_queue(self) -> LinuxTun:
        """Attach another queue to this interface: a descriptor that sees its own share of the flows.

        The kernel steers a flow to the queue that last wrote for it, and new flows by a hash; so each queue needs a
        stack of its own behind it that reads, or its share of the connections finds nobody. Needs the same rights as
        opening.

        Raises: DeviceError when the interface is gone, or was not opened for several queues.
        """
        if not self._flags & IFF_MULTI_QUEUE:
            raise DeviceError(f"{self.name} was opened with a single queue", errno=errno.EINVAL)
        try:
            current = _IFREQ.unpack(fcntl.ioctl(self._fd, TUNGETIFF, bytes(_IFREQ.size)))[0].rstrip(b"\0").decode()
            index = socket.if_nametoindex(current)
        except OSError as error:
            raise self._gone(error) from error
        fd, _ = _attach(current, self._flags, own_index=index)
        return LinuxTun(fd, current, flags=self._flags, mtu=self.mtu)

    def close(self) -> None:
        """Close the queue; with the last one the kernel removes the interface, its addresses and routes."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            if trio.lowlevel.in_trio_run():
                trio.lowlevel.notify_closing(fd)
            os.close(fd)

    def _gone(self, error: OSError) -> DeviceError:
        if self._fd < 0:
            return self._closed()
        if error.errno == EBADFD:
            return DeviceError(
                f"the interface {self.name} was deleted while it was in use",
                errno=EBADFD,
                remedy="something else on this machine removed it; it can be made again",
            )
        return DeviceError(f"the device {self.name} failed: {error.strerror}", errno=error.errno or 0)

    def _closed(self) -> DeviceError:
        return DeviceError(f"the device {self.name} was closed", errno=errno.EBADF)


def open_tun(name: str, *, offload: bool = True, mtu: int = 1500, multi_queue: bool = True) -> LinuxTun:
    """Make the TUN interface `name` and open its first queue. Nothing is configured: the link is down.

    With `offload` the virtio header is used; a kernel that refuses TSO gets checksum offload alone, and one that
    refuses the header altogether gets none: look at the result's `offload`.

    Args:
        name: the interface's name, at most 15 bytes; a name with "%d" lets the kernel choose a free number.
        offload: False opens without the virtio header, as on kernels that have none.
        mtu: what the link's MTU will be; only remembered.
        multi_queue: allow `extra_queue`.

    Raises:
        DeviceError: with `errno` EBUSY: the name is taken (the message says by whom where it can be seen); EPERM or
            EACCES: CAP_NET_ADMIN or access to /dev/net/tun is missing; ENOENT, ENODEV: the kernel has no TUN here;
            EINVAL: the name is not one.
    """
    _check_name(name)
    features = _features()
    flags = IFF_TUN | IFF_NO_PI
    if multi_queue and features & IFF_MULTI_QUEUE:
        flags |= IFF_MULTI_QUEUE
    if offload and features & IFF_VNET_HDR:
        fd, real_name = _attach(name, flags | IFF_VNET_HDR)
        if _set_offload(fd):
            return LinuxTun(fd, real_name, flags=flags | IFF_VNET_HDR, mtu=mtu)
        # Whether there is a header is fixed when the interface is made, so it has to be made again.
        os.close(fd)
    fd, real_name = _attach(name, flags)
    return LinuxTun(fd, real_name, flags=flags, mtu=mtu)


def adopt_tun(fd: int, name: str, *, offload: bool, mtu: int) -> LinuxTun:
    """The device of a descriptor that `open_tun` or `extra_queue` made, in this process or another; it owns it."""
    flags = IFF_TUN | IFF_NO_PI | IFF_MULTI_QUEUE | (IFF_VNET_HDR if offload else 0)
    return LinuxTun(fd, name, flags=flags, mtu=mtu)


def _check_name(name: str) -> None:
    # dev_valid_name() in net/core/dev.c
    encoded = os.fsencode(name)
    if not encoded or len(encoded) > _NAME_BYTES or name in (".", "..") or any(c in "/:" or c.isspace() for c in name):
        raise DeviceError(
            f"{name!r} cannot be the name of an interface",
            errno=errno.EINVAL,
            remedy=f"choose a name of 1 to {_NAME_BYTES} bytes without blanks, '/' and ':'",
        )


def _open_clone_device() -> int:
    try:
        return os.open(CLONE_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
            remedy = "load the driver with: modprobe tun (in a container: --device /dev/net/tun --cap-add NET_ADMIN)"
        elif number in (errno.EACCES, errno.EPERM):
            remedy = f"run as root, or give this user access to {CLONE_DEVICE} and CAP_NET_ADMIN"
        elif number in (errno.EMFILE, errno.ENFILE):
            remedy = "raise the limit of open files (ulimit -n)"
        else:
            remedy = ""
        raise DeviceError(f"cannot open {CLONE_DEVICE}: {error.strerror}", errno=number, remedy=remedy) from error


def _features() -> int:
    fd = _open_clone_device()
    try:
        return _get_unsigned(fd, TUNGETFEATURES)
    except OSError:
        return IFF_TUN | IFF_NO_PI  # before TUNGETFEATURES (2.6.27) there was nothing else
    finally:
        os.close(fd)


def _attach(name: str, flags: int, own_index: int = 0) -> tuple[int, str]:
    """Make the interface, or, given the index of our own, join it; returns the descriptor and the interface's name."""
    fd = _open_clone_device()
    try:
        exclusive = 0 if own_index else IFF_TUN_EXCL
        try:
            answer = fcntl.ioctl(fd, TUNSETIFF, _IFREQ.pack(os.fsencode(name), flags | exclusive))
        except OSError as error:
            raise _refused(name, error) from error
        real_name = _IFREQ.unpack(answer)[0].rstrip(b"\0").decode()
        # Without IFF_TUN_EXCL a name that has just vanished is made anew, which is not what was asked for.
        if own_index and _index(real_name) != own_index:
            raise DeviceError(f"the interface {name} was deleted while it was in use", errno=EBADFD)
    except BaseException:
        os.close(fd)
        raise
    return fd, real_name


def _refused(name: str, error: OSError) -> DeviceError:
    number = error.errno or 0
    if number in (errno.EPERM, errno.EACCES):
        return DeviceError(
            f"cannot make the interface {name}: the right CAP_NET_ADMIN is missing",
            errno=number,
            remedy="run as root, or with CAP_NET_ADMIN (systemd: AmbientCapabilities=CAP_NET_ADMIN)",
        )
    # EINVAL: the name belongs to a link of another kind or queue mode (kernels that check this before exclusiveness).
    if number == errno.EBUSY or (number == errno.EINVAL and _index(name)):
        owner = _owner(name)
        return DeviceError(
            f"the interface {name} is taken: " + (f"it belongs to {owner}" if owner else "a link of this name exists"),
            errno=errno.EBUSY,
            remedy="choose another interface name"
            + ("" if owner else f"; if nobody needs the link that exists, remove it with: ip link delete {name}"),
        )
    return DeviceError(f"cannot make the interface {name}: {error.strerror}", errno=number)


def _owner(name: str) -> str:
    """Which process has the TUN interface open: "process 4711 (ngrokd)", or "" where that cannot be seen.

    The tun driver names the interface in /proc/PID/fdinfo. The same name may exist in other network namespaces.
    """
    with contextlib.suppress(OSError):
        here = _namespace("self")
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # ended meanwhile, or not ours to look at
                if _namespace(pid) == here and _has_open(pid, name):
                    with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
                        return f"process {pid} ({comm.read().strip()})"
    return ""


def _has_open(pid: str, name: str) -> bool:
    for fd in os.listdir(f"/proc/{pid}/fd"):
        if os.readlink(f"/proc/{pid}/fd/{fd}") == CLONE_DEVICE:
            with open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8", errors="replace") as lines:
                if any(line.split() == ["iff:", name] for line in lines):
                    return True
    return False


def _namespace(pid: str) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


def _index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0


def _set_offload(fd: int) -> bool:
    """Fix the size of the virtio header and switch offload on as far as the kernel goes; False when it does not."""
    with contextlib.suppress(OSError):  # before 2.6.35 the size was fixed; what it is decides
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("=i", VNET_BYTES))
    try:
        if _get_unsigned(fd, TUNGETVNETHDRSZ) != VNET_BYTES:
            return False
    except OSError:
        return False
    # UFO, USO and TSO_ECN stay off: nothing here sends UDP in bulk, and ECN is not ours to negotiate.
    for offloads in (TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6, TUN_F_CSUM):
        try:
            fcntl.ioctl(fd, TUNSETOFFLOAD, offloads)
        except OSError:
            continue
        return True
    return False


def _get_unsigned(fd: int, request: int) -> int:
    answer: bytes = fcntl.ioctl(fd, request, bytes(4))
    return int(struct.unpack("=I", answer)[0])
