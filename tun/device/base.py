"""What a device is to the rest of the package.

A device is the border between this host's kernel and the stack: whatever the kernel routes into it comes out of
`read`, whatever goes into `write` is to the kernel as if it had arrived by cable. A device moves packets and nothing
else. It sets no address, no route and no MTU, it never waits except in the two `wait_` functions, and it never decides
what a packet means.

Three things make devices differ, and the contract hides all three:

* **A prefix.** Some kernels put bytes before the IP header (Linux the virtio header, 10 bytes; macOS the address
  family, 4 bytes). Cutting them off would copy every packet, so `read` leaves them in place and `prefix` says how many
  there are.
* **Checksums.** The cost of a TCP checksum grows with the payload, and a kernel that takes over does not compute it
  either: for a packet that never meets a cable it only notes that the sum is still to be made. So the stack leaves the
  sum of the pseudo header in the checksum field and the device finishes the work, by telling the kernel or by
  computing. In the other direction `verified` says when the kernel vouches for a packet.
* **Segment size.** With offload one `write` may carry up to 64 KiB of payload together with the size of the pieces that
  the kernel would cut it into; the local kernel never does. One system call then moves what would be 44 packets.

A device that the operating system took away (the link was deleted) answers every call with `DeviceError`. A device
whose link is merely down throws packets away, as a cable would, and counts them in `drops` where the kernel tells of
them (macOS does not): TCP's retransmissions bridge it, and the link may come back.

Rules of this file: no I/O, no operating system.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

# An IPv4 packet cannot be longer (16-bit total length; RFC 791 3.1). Also the bound of one offloaded segment.
MAX_PACKET: Final = 65_535
# IPv6's 16 bits do not count the header (RFC 8200 3).
MAX_PACKET_V6: Final = 40 + 65_535


class Device(Protocol):
    """A link of this host, as the stack sees it. Used by one task (reading) and its callees (writing)."""

    @property
    def name(self) -> str:
        """The interface's name as the kernel has it, for people and for whoever configures the link."""
        ...

    @property
    def mtu(self) -> int:
        """Bytes of the largest IP packet the link is meant to carry, offloaded segments aside."""
        ...

    @property
    def offload(self) -> bool:
        """Whether `write` takes payload larger than `gso_size`. If not, send segments of at most the MSS."""
        ...

    @property
    def prefix(self) -> int:
        """Bytes before the IP header in what `read` returns. Constant for the life of the device."""
        ...

    @property
    def drops(self) -> dict[str, int]:
        """Packets that `write` and `write_packet` took and threw away, by reason ("link_down", "refused", ...)."""
        ...

    def fileno(self) -> int:
        """A descriptor that is readable when `read` has something, or would raise; -1 where there is none.

        It stays the device's.
        """
        ...

    def read(self) -> bytes | None:
        """Take one packet, prefix included.

        The bytes belong to the caller for as long as it likes.

        Returns: the packet, or None when there is none now.
        Raises: DeviceError when the device is gone.
        """
        ...

    def verified(self, packet: bytes) -> bool:
        """Whether the transport checksum of a `packet` from `read` needs no check, because the kernel vouches for it.

        The checksum field itself may then hold anything. IP headers are never vouched for.
        """
        ...

    def write(
        self, header: bytes | bytearray | memoryview, payload: Sequence[bytes | memoryview], gso_size: int
    ) -> bool:
        """Give one TCP segment to the kernel.

        Args:
            header: IP and TCP header, complete but for the TCP checksum, which holds the folded sum of the pseudo
                header (RFC 9293 3.1), not complemented. Not kept and not changed.
            payload: what follows the header, in pieces. Not kept.
            gso_size: 0, or the payload bytes of each segment that this packet stands for, where the payload is larger.
                Only SYN- and RST-free segments may have it, and only where `offload` is true.

        Returns: False when the device is full: nothing was sent, try again after `wait_writable`. True otherwise, also
        for a packet that the kernel threw away (see `drops`).
        Raises: DeviceError when the device is gone; ValueError when the lengths do not fit together, which would be
        our own mistake: kernels take such packets and lose them silently.
        """
        ...

    def write_packet(self, packet: bytes | bytearray | memoryview) -> bool:
        """Give one complete packet to the kernel: any protocol, all checksums made. Otherwise as `write`."""
        ...

    async def wait_readable(self) -> None:
        """Wait until `read` may have something, or would raise. One task at a time. Cancellation loses nothing."""
        ...

    async def wait_writable(self) -> None:
        """Wait until `write` may succeed, or would raise; may return at once. One task at a time."""
        ...

    def close(self) -> None:
        """Give the device back; what waits in it is lost. Waiting tasks wake with DeviceError. Idempotent."""
        ...


@runtime_checkable
class QueuedDevice(Device, Protocol):
    """A device whose packets can be shared out over several descriptors, each with a stack of its own.

    The operating system keeps all packets of one connection on one queue, as long as the number of queues stays the
    same. So none is closed before all are: the others would be renumbered, and their connections would come out
    elsewhere.
    """

    def fileno(self) -> int:
        """The descriptor, which stays the device's; -1 after `close`. See `adopt_device`."""
        ...

    def is_gone(self) -> bool:
        """Whether the link was deleted, or this queue closed; asked of the operating system, no packet is taken."""
        ...

    def extra_queue(self) -> QueuedDevice:
        """One more queue of the same link.

        Raises: DeviceError when the link is gone, or was not opened for several queues.
        """
        ...


def check_packet(packet: bytes | bytearray | memoryview) -> None:
    """Raise ValueError unless `packet` is as long as its IP header says.

    Linux accepts almost anything here (header-only TCP of 39 bytes, 100,000 bytes in one packet) and drops it later,
    where nobody looks.
    """
    size = len(packet)
    if size < 20 or size > (MAX_PACKET_V6 if packet[0] >> 4 == 6 else MAX_PACKET):
        raise ValueError(f"an IP packet of {size} bytes")
    if _ip_length(packet) != size:
        raise ValueError(f"a packet of {size} bytes whose IP header says {_ip_length(packet)}")


def check_segment(
    header: bytes | bytearray | memoryview, payload: Sequence[bytes | memoryview], gso_size: int, offload: bool
) -> int:
    """Raise ValueError unless the parts of a TCP segment for `Device.write` fit together.

    Returns: the bytes of payload.
    """
    size = len(header)
    start = ip_header_length(header)
    if size < start + 20 or size != start + (header[start + 12] >> 4) * 4:
        raise ValueError(f"{size} bytes are not an IP and a TCP header")
    payload_bytes = 0
    for view in payload:
        payload_bytes += len(view)
    size += payload_bytes
    if size > MAX_PACKET or _ip_length(header) != size:
        raise ValueError(f"a segment of {size} bytes whose IP header says {_ip_length(header)}")
    if gso_size:
        if gso_size < 0 or gso_size > MAX_PACKET:
            raise ValueError(f"segment size {gso_size}")
        if payload_bytes > gso_size and not offload:
            raise ValueError(f"{payload_bytes} bytes in segments of {gso_size} need offload, which this device lacks")
    return payload_bytes


def ip_header_length(packet: bytes | bytearray | memoryview) -> int:
    """Bytes of the IP header that `packet` starts with (20 bytes of it at least). We send no IPv6 extensions."""
    version = packet[0] >> 4
    if version == 4:
        return (packet[0] & 15) * 4
    if version == 6:
        return 40
    raise ValueError(f"IP version {version}")


def _ip_length(packet: bytes | bytearray | memoryview) -> int:
    if packet[0] >> 4 == 4:
        return packet[2] << 8 | packet[3]
    if packet[0] >> 4 == 6:
        return 40 + (packet[4] << 8 | packet[5])
    raise ValueError(f"IP version {packet[0] >> 4}")
