"""Capture files: what passed between a device and its reader, for people with Wireshark and for replays.

    capture = Capture(fd, interests=CaptureFilter.of(["10.107.0.2"], [443]), limits=CaptureLimits(max_packets=1000))
    network.device = RecordingDevice(network.device, capture)      # from now on, between two batches
    ...
    network.device = network.device.device                         # and back
    capture.close()

The format is pcapng (draft-ietf-opsawg-pcapng): a section header, a block for each interface, a block for each packet,
and counts at the end. Link type RAW: packets begin with their IP header. Directions are ours: *inbound* is what was
read from the device and comes from an app, *outbound* is what was written to it.

A packet is recorded as the stack saw it: a segment of 64 KiB that the kernel handed over whole is one packet here.
Only checksums are not left as they were. With offload nobody makes them (the kernel vouches for what it hands over,
and completes what it gets), and every tool would call every packet broken; so where the device vouches the right
checksum is put in, and where it does not, what came is kept, wrong or right.

Recording happens inside the pump, so it may cost time but never wait. Blocks gather in memory and are written once per
batch, to a file or to a pipe that somebody reads (`wireshark -k -i -`). A pipe that is full takes nothing; then the
backlog grows up to its bound, and beyond it packets are not recorded, and counted: in `Capture.dropped`, in the next
block that is written, and in the counts at the end. A descriptor that fails ends the capture and nothing else.

Rules of this file: nothing in here changes, delays or loses a packet for the stack; nothing raises into the pump.
"""

from __future__ import annotations

import ipaddress
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import BinaryIO, Final

import trio

from tun.device.base import Device, ip_header_length
from tun.errors import BadPacket
from tun.wire.checksum import complete, internet_checksum, pseudo_header_sum

LINKTYPE_RAW: Final = 101
# No packet is cut unless it is asked for: one has at most 65535 bytes, and this is tcpdump's word for "all of it".
SNAPLEN: Final = 262_144

SECTION_HEADER: Final = 0x0A0D0D0A
INTERFACE_DESCRIPTION: Final = 1
INTERFACE_STATISTICS: Final = 5
ENHANCED_PACKET: Final = 6

_BYTE_ORDER_MAGIC: Final = 0x1A2B3C4D
_UNKNOWN_LENGTH: Final = (1 << 64) - 1

OPTION_END: Final = 0
OPTION_COMMENT: Final = 1
SECTION_OS: Final = 3
SECTION_APPLICATION: Final = 4
INTERFACE_NAME: Final = 2
INTERFACE_TEXT: Final = 3
INTERFACE_RESOLUTION: Final = 9
INTERFACE_OFFSET: Final = 14
PACKET_FLAGS: Final = 2
PACKET_DROPS: Final = 4
STATISTICS_START: Final = 2
STATISTICS_END: Final = 3
STATISTICS_RECEIVED: Final = 4
STATISTICS_ACCEPTED: Final = 6
STATISTICS_DROPPED: Final = 7

FLAG_INBOUND: Final = 1
FLAG_OUTBOUND: Final = 2

_NANOSECONDS: Final = 9  # as a power of ten
_MICROSECONDS: Final = 6  # what the format means where nothing is said

# Blocks larger than this are not read: the largest that we write has 66 KiB, Wireshark's limit is 16 MiB.
_MAX_BLOCK: Final = 16 * 2**20
# Written at once when so much has gathered within one batch.
_WRITE_FROM: Final = 256 * 1024

_TCP: Final = 6
_UDP: Final = 17
_ICMP: Final = 1
_ICMPV6: Final = 58
_CHECKSUM_OFFSETS: Final = {_TCP: 16, _UDP: 6}
# ICMP messages that quote the packet they are about (RFC 792, RFC 4443).
_ICMP_ERRORS: Final = frozenset((3, 4, 5, 11, 12))
_ICMPV6_ERRORS: Final = frozenset((1, 2, 3, 4))

Bytes = bytes | bytearray | memoryview
Networks = tuple[tuple[int, int, int], ...]


# What is recorded


@dataclass(frozen=True, slots=True)
class CaptureFilter:
    """Which packets are of interest. Both parts must hold; an empty part holds for everything.

    Attributes:
        networks: source or destination lies in one of them; (4 or 6, network, mask) as integers.
        ports: source or destination port of TCP or UDP is one of them. Packets without ports (a ping, the later parts
            of a fragmented packet) then do not match; an ICMP error matches like the packet that it quotes.
    """

    networks: Networks = ()
    ports: frozenset[int] = frozenset()

    @classmethod
    def of(cls, addresses: Iterable[str] = (), ports: Iterable[int] = ()) -> CaptureFilter:
        """Make a filter from what people write: addresses, networks ("10.107.0.0/24") and ports.

        Raises: ValueError naming what is not one.
        """
        networks = []
        for address in addresses:
            network = ipaddress.ip_network(address, strict=False)
            networks.append((network.version, int(network.network_address), int(network.netmask)))
        wanted = frozenset(ports)
        if wrong := [port for port in wanted if not 0 < port < 65536]:
            raise ValueError(f"{wrong[0]} is not a port (1 to 65535)")
        return cls(tuple(networks), wanted)

    def matches(self, packet: Bytes, start: int = 0) -> bool:
        """Whether the IP packet in `packet` from `start` on is of interest. Never raises."""
        if not self.networks and not self.ports:
            return True
        return self._matches(packet, start, may_quote=True)

    def _matches(self, packet: Bytes, start: int, *, may_quote: bool) -> bool:
        available = len(packet) - start
        if available < 20:
            return False
        version = packet[start] >> 4
        if version == 4:
            source, destination, size = start + 12, start + 16, 4
            transport = start + (packet[start] & 15) * 4
            protocol = packet[start + 9]
            later_part = (packet[start + 6] & 0x1F) | packet[start + 7]
        elif version == 6 and available >= 40:
            source, destination, size = start + 8, start + 24, 16
            transport = start + 40
            protocol = packet[start + 6]
            later_part = 0
        else:
            return False
        if self._is_inside(version, packet[source : source + size], packet[destination : destination + size]) and (
            not self.ports or (not later_part and self._has_port(packet, transport, protocol))
        ):
            return True
        if not may_quote or later_part or len(packet) < transport + 8:
            return False
        errors = _ICMP_ERRORS if protocol == _ICMP else _ICMPV6_ERRORS if protocol == _ICMPV6 else ()
        return packet[transport] in errors and self._matches(packet, transport + 8, may_quote=False)

    def _is_inside(self, version: int, *addresses: Bytes) -> bool:
        if not self.networks:
            return True
        for address in addresses:
            value = int.from_bytes(address, "big")
            for wanted, network, mask in self.networks:
                if wanted == version and value & mask == network:
                    return True
        return False

    def _has_port(self, packet: Bytes, transport: int, protocol: int) -> bool:
        if protocol not in _CHECKSUM_OFFSETS or len(packet) < transport + 4:
            return False
        return (packet[transport] << 8 | packet[transport + 1]) in self.ports or (
            packet[transport + 2] << 8 | packet[transport + 3]
        ) in self.ports


EVERYTHING: Final = CaptureFilter()


@dataclass(frozen=True, slots=True)
class CaptureLimits:
    """Where a capture ends by itself.

    Attributes:
        max_packets: packets recorded.
        max_bytes: of the whole file.
        duration_s: after the first interface was added, seconds. It is looked at when a batch ends, so on a silent
            link somebody else must watch the time.
    """

    max_packets: float = math.inf
    max_bytes: float = math.inf
    duration_s: float = math.inf


UNLIMITED: Final = CaptureLimits()


def wall_clock() -> Callable[[], int]:
    """A clock for captures: nanoseconds since 1970 that never jump back, though somebody may set the time meanwhile."""
    offset = time.time_ns() - time.monotonic_ns()
    return lambda: time.monotonic_ns() + offset


class Capture:
    """A capture that is being written.

    Attributes:
        seen: packets that passed while it ran.
        recorded: packets written, or waiting to be.
        dropped: packets of interest that found the descriptor full.
        written: bytes that the descriptor took.
        ended: "" while it runs, then why it does not: "packets", "bytes" or "duration" (its limits), "closed", or
            "broken" (the descriptor failed, see `error`).
        error: what the descriptor said, or None.
    """

    def __init__(
        self,
        fd: int,
        *,
        interests: CaptureFilter = EVERYTHING,
        limits: CaptureLimits = UNLIMITED,
        clock: Callable[[], int] | None = None,
        application: str = "",
        snaplen: int = SNAPLEN,
        backlog_bytes: int = 4 * 2**20,
        on_end: Callable[[], object] | None = None,
    ) -> None:
        """Begin a capture.

        Args:
            fd: a file, pipe or socket to write to. It is made non-blocking (with everybody who shares it) and stays
                the caller's to close, after `close`.
            interests: what is recorded.
            limits: where it ends.
            clock: nanoseconds since 1970; `wall_clock()` if None.
            application: who writes this, for the file's header.
            snaplen: of each packet so many bytes are recorded, from the IP header on.
            backlog_bytes: how much may wait for a descriptor that is full; at least one packet of 64 KiB.
            on_end: called once, when the capture has ended for whatever reason; inside the batch, so it must not raise.
        """
        os.set_blocking(fd, False)
        self.seen = 0
        self.recorded = 0
        self.dropped = 0
        self.written = 0
        self.ended = ""
        self.error: OSError | None = None
        self._fd = fd
        self._interests = interests
        self._limits = limits
        self._clock = clock or wall_clock()
        self._snaplen = snaplen
        self._backlog_bytes = backlog_bytes
        self._on_end = on_end
        self._backlog = bytearray(section_header(application))
        self._interfaces: list[_Counts] = []
        self._untold = 0  # dropped since the last block that was written

    def __repr__(self) -> str:
        return f"<Capture recorded={self.recorded} dropped={self.dropped} {self.ended or 'running'}>"

    def add_interface(self, name: str, description: str = "") -> int:
        """Describe one more device; returns its number for `record`."""
        self._interfaces.append(_Counts(self._clock()))
        if not self.ended:
            self._backlog += interface_description(name, description, self._snaplen)
        return len(self._interfaces) - 1

    def wants(self, packet: Bytes, start: int) -> bool:
        """Whether the packet that has just passed is to be given to `record`. Counts it as seen."""
        if self.ended:
            return False
        self.seen += 1
        return self._interests.matches(packet, start)

    def record(self, interface: int, packet: bytes, inbound: bool) -> None:
        """Put one complete packet down, as of now. Never raises and never waits."""
        now = self._clock()
        counts = self._interfaces[interface]
        if not self._is_within_duration(now):
            self._end("duration")
            return
        counts.accepted += 1
        block = packet_block(
            interface, now, packet[: self._snaplen], inbound=inbound, dropped=self._untold, size=len(packet)
        )
        # The counts at the end belong to the file as well.
        size = self.written + len(self._backlog) + len(block) + _STATISTICS_BYTES * len(self._interfaces)
        if size > self._limits.max_bytes:
            self._end("bytes")
            return
        if len(self._backlog) + len(block) > self._backlog_bytes:
            self._write()
            if len(self._backlog) + len(block) > self._backlog_bytes:
                self.dropped += 1
                self._untold += 1
                counts.dropped += 1
                return
        self._untold = 0
        self._backlog += block
        self.recorded += 1
        if self.recorded >= self._limits.max_packets:
            self._end("packets")
        elif len(self._backlog) >= _WRITE_FROM:
            self._write()

    def flush(self) -> None:
        """A batch is over: write what has gathered, as far as the descriptor takes it. Never raises and never waits."""
        if self._backlog:
            self._write()
        if not self.ended and not self._is_within_duration(self._clock()):
            self._end("duration")

    @property
    def pending(self) -> int:
        """Bytes that the descriptor has not taken yet."""
        return len(self._backlog)

    async def drain(self) -> None:
        """Wait until everything was written or the descriptor failed. Cancellation loses nothing: drain again."""
        await trio.lowlevel.checkpoint()
        while self._backlog:
            self._write()
            if self._backlog:
                await trio.lowlevel.wait_writable(self._fd)

    def close(self) -> None:
        """End the capture. Idempotent.

        What a full pipe does not take now is lost, so `drain` afterwards where somebody may still read it.
        """
        self._end("closed")

    def _is_within_duration(self, now: int) -> bool:
        return not self._interfaces or now - self._interfaces[0].started_at <= self._limits.duration_s * 1e9

    def _write(self) -> None:
        try:
            while self._backlog:
                taken = os.write(self._fd, self._backlog)
                self.written += taken
                del self._backlog[:taken]
        except BlockingIOError:
            pass
        except OSError as error:
            self.error = error
            self._backlog.clear()
            self._end("broken")

    def _end(self, why: str) -> None:
        if self.ended:
            return
        self.ended = why
        if why != "broken":
            now = self._clock()
            for number, counts in enumerate(self._interfaces):
                self._backlog += interface_statistics(
                    number, counts.started_at, now, self.seen, counts.accepted, counts.dropped
                )
            self._write()
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()


class _Counts:
    """What one interface of a capture has seen."""

    __slots__ = ("accepted", "dropped", "started_at")

    def __init__(self, started_at: int) -> None:
        self.started_at = started_at
        self.accepted = 0
        self.dropped = 0


class RecordingDevice:
    """A device in front of another one that records what passes; implements `tun.device.base.Device`.

    It may take the place of its device, and give it back, between any two calls: it has no state of its own. A pump
    that waits in the one goes on with the other.

    Attributes:
        device: where packets really come from and go to.
        capture: where they are recorded. When it has ended, this is only a detour.
    """

    __slots__ = ("_interface", "_prefix", "capture", "device")

    def __init__(self, device: Device, capture: Capture) -> None:
        self.device = device
        self.capture = capture
        self._prefix = device.prefix
        offload = "on" if device.offload else "off"
        self._interface = capture.add_interface(device.name, f"mtu {device.mtu}, offload {offload}")

    def __repr__(self) -> str:
        return f"<RecordingDevice {self.device!r} {self.capture!r}>"

    @property
    def name(self) -> str:
        """The device's name."""
        return self.device.name

    @property
    def mtu(self) -> int:
        """The device's MTU."""
        return self.device.mtu

    @property
    def offload(self) -> bool:
        """The device's word."""
        return self.device.offload

    @property
    def prefix(self) -> int:
        """The device's prefix; it is not recorded."""
        return self._prefix

    @property
    def drops(self) -> dict[str, int]:
        """What the device threw away. It is recorded all the same: the stack believes it sent."""
        return self.device.drops

    def fileno(self) -> int:
        """The device's descriptor."""
        return self.device.fileno()

    def read(self) -> bytes | None:
        """Take one packet; see `Device.read`."""
        packet = self.device.read()
        if packet is not None and self.capture.wants(packet, self._prefix):
            whole = packet[self._prefix :]
            if self.device.verified(packet):
                whole = with_checksum(whole)
            self.capture.record(self._interface, whole, True)
        return packet

    def verified(self, packet: bytes) -> bool:
        """What the device says of one of its packets."""
        return self.device.verified(packet)

    def write(self, header: Bytes, payload: Sequence[bytes | memoryview], gso_size: int) -> bool:
        """Give one TCP segment to the device; see `Device.write`. What was not taken is not recorded."""
        if not self.device.write(header, payload, gso_size):
            return False
        if self.capture.wants(header, 0):
            head = bytearray(header)
            start = ip_header_length(head)
            complete(head, start, start + _CHECKSUM_OFFSETS[_TCP], payload)
            self.capture.record(self._interface, b"".join((head, *payload)), False)
        return True

    def write_packet(self, packet: Bytes) -> bool:
        """Give one complete packet to the device; see `Device.write_packet`. What was not taken is not recorded."""
        if not self.device.write_packet(packet):
            return False
        if self.capture.wants(packet, 0):
            self.capture.record(self._interface, bytes(packet), False)
        return True

    async def wait_readable(self) -> None:
        """Wait as the device does. The batch is over, so what was recorded is written first."""
        self.capture.flush()
        await self.device.wait_readable()

    async def wait_writable(self) -> None:
        """Wait as the device does."""
        await self.device.wait_writable()

    def close(self) -> None:
        """Close the device. The capture goes on: other devices may record into it."""
        self.device.close()


def with_checksum(packet: bytes) -> bytes:
    """The packet with the right TCP or UDP checksum, whatever is there. What has none here stays as it is.

    Fragments are among those: their checksum covers bytes that are elsewhere.
    """
    size = len(packet)
    version = packet[0] >> 4 if size else 0
    if version == 4 and size >= 20:
        start = (packet[0] & 15) * 4
        protocol = packet[9]
        source, destination = packet[12:16], packet[16:20]
        whole = not (packet[6] & 0x3F or packet[7]) and packet[2] << 8 | packet[3] == size
    elif version == 6 and size >= 40:
        start = 40
        protocol = packet[6]
        source, destination = packet[8:24], packet[24:40]
        whole = 40 + (packet[4] << 8 | packet[5]) == size
    else:
        return packet
    offset = _CHECKSUM_OFFSETS.get(protocol)
    if offset is None or not whole or size < start + offset + 2 or start < 20:
        return packet
    complete_packet = bytearray(packet)
    at = start + offset
    complete_packet[at] = complete_packet[at + 1] = 0
    pseudo = pseudo_header_sum(source, destination, protocol, size - start)
    checksum = internet_checksum(memoryview(complete_packet)[start:], pseudo)
    if protocol == _UDP:
        checksum = checksum or 0xFFFF  # 0 would say that there is none (RFC 768)
    complete_packet[at : at + 2] = checksum.to_bytes(2, "big")
    return bytes(complete_packet)


# Blocks. Everything is written little-endian, on any machine: the same packets make the same file.

_BLOCK: Final = Struct("<II")
_LENGTH: Final = Struct("<I")
_SECTION: Final = Struct("<IHHQ")
_INTERFACE: Final = Struct("<HHI")
_PACKET: Final = Struct("<IIIII")
_STATISTICS: Final = Struct("<III")
_OPTION: Final = Struct("<HH")
_LONG: Final = Struct("<I")
_LONG_LONG: Final = Struct("<Q")

_PADDING: Final = (b"", b"\0\0\0", b"\0\0", b"\0")
_FLAGS: Final = {
    inbound: _OPTION.pack(PACKET_FLAGS, 4) + _LONG.pack(FLAG_INBOUND if inbound else FLAG_OUTBOUND)
    for inbound in (True, False)
}
_STATISTICS_BYTES: Final = 12 + _STATISTICS.size + 5 * 12 + 4


def section_header(application: str = "", comment: str = "") -> bytes:
    """The block that a file begins with."""
    options = _text_option(OPTION_COMMENT, comment) + _text_option(SECTION_APPLICATION, application)
    return _block(SECTION_HEADER, _SECTION.pack(_BYTE_ORDER_MAGIC, 1, 0, _UNKNOWN_LENGTH) + _ended(options))


def interface_description(name: str, description: str = "", snaplen: int = SNAPLEN) -> bytes:
    """The block that introduces an interface; the first one is number 0. Its times are nanoseconds."""
    options = (
        _text_option(INTERFACE_NAME, name)
        + _text_option(INTERFACE_TEXT, description)
        + _option(INTERFACE_RESOLUTION, bytes((_NANOSECONDS,)))
    )
    return _block(INTERFACE_DESCRIPTION, _INTERFACE.pack(LINKTYPE_RAW, 0, snaplen) + _ended(options))


def packet_block(
    interface: int, time_ns: int, packet: bytes, *, inbound: bool, dropped: int = 0, comment: str = "", size: int = 0
) -> bytes:
    """The block of one packet.

    Args:
        time_ns: since 1970.
        dropped: packets that were lost for this capture right before it.
        size: bytes that it had on the link, where `packet` is not all of it.
    """
    kept = len(packet)
    options = _FLAGS[inbound]
    if dropped:
        options += _option(PACKET_DROPS, _LONG_LONG.pack(dropped))
    if comment:
        options += _text_option(OPTION_COMMENT, comment)
    fields = _PACKET.pack(interface, time_ns >> 32 & 0xFFFFFFFF, time_ns & 0xFFFFFFFF, kept, size or kept)
    return _block(ENHANCED_PACKET, b"".join((fields, packet, _PADDING[kept & 3], _ended(options))))


def interface_statistics(interface: int, start_ns: int, end_ns: int, seen: int, accepted: int, dropped: int) -> bytes:
    """The block that closes an interface: when it was recorded, and how many packets were not."""
    options = b"".join(
        (
            _option(STATISTICS_START, _LONG.pack(start_ns >> 32 & 0xFFFFFFFF) + _LONG.pack(start_ns & 0xFFFFFFFF)),
            _option(STATISTICS_END, _LONG.pack(end_ns >> 32 & 0xFFFFFFFF) + _LONG.pack(end_ns & 0xFFFFFFFF)),
            _option(STATISTICS_RECEIVED, _LONG_LONG.pack(seen)),
            _option(STATISTICS_ACCEPTED, _LONG_LONG.pack(accepted)),
            _option(STATISTICS_DROPPED, _LONG_LONG.pack(dropped)),
        )
    )
    fields = _STATISTICS.pack(interface, end_ns >> 32 & 0xFFFFFFFF, end_ns & 0xFFFFFFFF)
    return _block(INTERFACE_STATISTICS, fields + _ended(options))


def _block(kind: int, body: bytes) -> bytes:
    size = 12 + len(body)
    return b"".join((_BLOCK.pack(kind, size), body, _LENGTH.pack(size)))


def _option(code: int, value: bytes) -> bytes:
    return b"".join((_OPTION.pack(code, len(value)), value, _PADDING[len(value) & 3]))


def _text_option(code: int, text: str) -> bytes:
    return _option(code, text.encode()[:65535]) if text else b""


def _ended(options: bytes) -> bytes:
    return options + _OPTION.pack(OPTION_END, 0) if options else b""


# Reading


@dataclass(frozen=True, slots=True)
class CapturedPacket:
    """One packet out of a file.

    Attributes:
        time_ns: nanoseconds since 1970.
        packet: from the IP header on, as much as was captured.
        size: bytes that it had on the link.
        inbound: whether it was read by the stack (True) or written by it (False); None where the file does not say.
        interface: name of the device, "" where the file does not say.
        description: what the file says about that device.
        comment: what the file says about the packet.
        dropped: packets that are missing right before it.
    """

    time_ns: int
    packet: bytes
    size: int
    inbound: bool | None
    interface: str = ""
    description: str = ""
    comment: str = ""
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class _Interface:
    name: str
    description: str
    units_per_s: int
    offset_s: int


def read_capture(file: BinaryIO) -> Iterator[CapturedPacket]:
    """The packets of a pcapng file, of ours or of any other program that recorded raw IP.

    Blocks and options that mean nothing here are skipped.

    Raises: BadPacket when it is no such file, or from a place on is none any more (a program that was killed leaves
        its last block cut short); the packets before it have been given out by then.
    """
    order = ""
    interfaces: list[_Interface] = []
    count = 0
    while head := file.read(8):
        if len(head) < 8:
            raise BadPacket(f"the capture is cut short after {count} packets")
        if head[:4] == SECTION_HEADER.to_bytes(4, "little"):  # the same either way round
            order, body = _read_section(file, head)
            interfaces = []
            continue
        if not order:
            raise BadPacket(_what_else(head))
        kind, size = Struct(order + "II").unpack(head)
        body = _read_body(file, size, order, count)
        if kind == INTERFACE_DESCRIPTION:
            interfaces.append(_parse_interface(body, order))
        elif kind == ENHANCED_PACKET:
            yield _parse_packet(body, order, interfaces)
            count += 1


def _read_section(file: BinaryIO, head: bytes) -> tuple[str, bytes]:
    magic = file.read(4)
    for order in "<>":
        if magic == Struct(order + "I").pack(_BYTE_ORDER_MAGIC):
            size = Struct(order + "I").unpack(head[4:])[0]
            body = _read_body(file, size - 4, order, 0, outer=size)
            if len(body) < 4 or Struct(order + "H").unpack_from(body)[0] != 1:
                raise BadPacket("a version of pcapng that is not 1")
            return order, body
    raise BadPacket("a section header without the byte order mark")


def _read_body(file: BinaryIO, size: int, order: str, count: int, outer: int = 0) -> bytes:
    """The rest of a block whose first 8 bytes were read (12 of a section header, then `outer` is its size)."""
    if size < 12 or size % 4 or size > _MAX_BLOCK:
        raise BadPacket(f"a block of {outer or size} bytes after {count} packets")
    rest = file.read(size - 8)
    if len(rest) < size - 8:
        raise BadPacket(f"the capture is cut short after {count} packets")
    if Struct(order + "I").unpack(rest[-4:])[0] != (outer or size):
        raise BadPacket(f"a block whose two lengths differ after {count} packets")
    return rest[:-4]


def _what_else(head: bytes) -> str:
    if head[:4] in (b"\xd4\xc3\xb2\xa1", b"\xa1\xb2\xc3\xd4", b"\x4d\x3c\xb2\xa1", b"\xa1\xb2\x3c\x4d"):
        return "a capture in the old pcap format; convert it with: editcap -F pcapng OLD NEW"
    return "not a pcapng capture"


def _parse_interface(body: bytes, order: str) -> _Interface:
    if len(body) < 8:
        raise BadPacket("a short interface description")
    link_type = Struct(order + "H").unpack_from(body)[0]
    if link_type != LINKTYPE_RAW:
        raise BadPacket(f"packets of link type {link_type}; only raw IP packets (101) can be read here")
    name, description, resolution, offset = "", "", _MICROSECONDS, 0
    for code, value in _parse_options(body, 8, order):
        if code == INTERFACE_NAME:
            name = value.decode("utf-8", "replace")
        elif code == INTERFACE_TEXT:
            description = value.decode("utf-8", "replace")
        elif code == INTERFACE_RESOLUTION and len(value) == 1:
            resolution = value[0]
        elif code == INTERFACE_OFFSET and len(value) == 8:
            offset = Struct(order + "q").unpack(value)[0]
    units = 1 << (resolution & 0x7F) if resolution & 0x80 else 10**resolution
    return _Interface(name, description, units, offset)


def _parse_packet(body: bytes, order: str, interfaces: list[_Interface]) -> CapturedPacket:
    if len(body) < 20:
        raise BadPacket("a short packet block")
    number, high, low, captured, size = Struct(order + "IIIII").unpack_from(body)
    if number >= len(interfaces):
        raise BadPacket(f"a packet of interface {number}, which was not described")
    end = 20 + captured
    if end > len(body):
        raise BadPacket("a packet that is longer than its block")
    interface = interfaces[number]
    time_ns = (high << 32 | low) * 1_000_000_000 // interface.units_per_s + interface.offset_s * 1_000_000_000
    inbound: bool | None = None
    comment, dropped = "", 0
    for code, value in _parse_options(body, (end + 3) & ~3, order):
        if code == PACKET_FLAGS and len(value) == 4:
            direction = Struct(order + "I").unpack(value)[0] & 3
            inbound = {FLAG_INBOUND: True, FLAG_OUTBOUND: False}.get(direction)
        elif code == PACKET_DROPS and len(value) == 8:
            dropped = Struct(order + "Q").unpack(value)[0]
        elif code == OPTION_COMMENT:
            comment = value.decode("utf-8", "replace")
    return CapturedPacket(time_ns, body[20:end], size, inbound, interface.name, interface.description, comment, dropped)


def _parse_options(body: bytes, at: int, order: str) -> Iterator[tuple[int, bytes]]:
    shape = Struct(order + "HH")
    while at + 4 <= len(body):
        code, length = shape.unpack_from(body, at)
        if code == OPTION_END:
            return
        if at + 4 + length > len(body):
            raise BadPacket("an option that is longer than its block")
        yield code, body[at + 4 : at + 4 + length]
        at += 4 + ((length + 3) & ~3)
