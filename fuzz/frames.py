"""Packets read, judged and mended by the book (RFC 791, 1071, 8200, 9293), sharing no code with what is fuzzed."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

FIN: Final = 1
SYN: Final = 2
RST: Final = 4
PSH: Final = 8
ACK: Final = 16
MASK: Final = 0xFFFFFFFF


def ones_sum(data: bytes) -> int:
    """The one's complement sum, word by word."""
    if len(data) & 1:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) >> 1}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def pseudo(packet: bytes, protocol: int, length: int) -> bytes:
    """The pseudo header of an IPv4 packet."""
    return packet[12:20] + struct.pack("!BBH", 0, protocol, length & 0xFFFF)


@dataclass(slots=True)
class Frame:
    """A TCP packet over IPv4, taken apart. Offsets are those of the packet."""

    source: bytes
    destination: bytes
    source_port: int
    destination_port: int
    seq: int
    ack: int
    flags: int
    window: int
    options: bytes
    payload: bytes

    @property
    def key(self) -> bytes:
        """What the stack finds the flow by."""
        return self.source + self.destination + struct.pack("!HH", self.source_port, self.destination_port)

    @property
    def length(self) -> int:
        """How much of the sequence space it takes."""
        return len(self.payload) + (self.flags & SYN != 0) + (self.flags & FIN != 0)


def read_tcp(packet: bytes) -> Frame | None:
    """Take a packet apart; None when it is not whole TCP over IPv4. Checksums are `is_valid`'s."""
    if len(packet) < 40 or packet[0] >> 4 != 4 or packet[9] != 6:
        return None
    at = (packet[0] & 15) * 4
    end = packet[2] << 8 | packet[3]
    if at < 20 or end > len(packet) or at + 20 > end:
        return None
    source_port, destination_port, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", packet, at)
    data = at + (offset >> 4) * 4
    if data < at + 20 or data > end:
        return None
    return Frame(
        packet[12:16],
        packet[16:20],
        source_port,
        destination_port,
        seq,
        ack,
        flags & 0x3F,
        window,
        packet[at + 20 : data],
        packet[data:end],
    )


def header_is_valid(packet: bytes) -> bool:
    """Is the IP header's checksum right?"""
    return ones_sum(packet[: (packet[0] & 15) * 4]) == 0xFFFF


def transport_is_valid(packet: bytes) -> bool:
    """Is the checksum of the TCP segment, UDP datagram or ICMP message in it right?"""
    at = (packet[0] & 15) * 4
    body = packet[at : packet[2] << 8 | packet[3]]
    if packet[9] == 1:
        return ones_sum(body) == 0xFFFF
    if packet[9] == 17 and body[6:8] == b"\0\0":
        return True
    return ones_sum(pseudo(packet, packet[9], len(body)) + body) == 0xFFFF


def mend(packet: bytes, *, ip: bool = True, transport: bool = True) -> bytes:
    """The packet with right checksums, as far as it is long enough to have them."""
    out = bytearray(packet)
    at = (packet[0] & 15) * 4 if packet else 0
    if at < 20 or at > len(packet):
        return packet
    end = min(packet[2] << 8 | packet[3], len(packet))
    field = {6: 16, 17: 6, 1: 2}.get(packet[9])
    if transport and field is not None and at + field + 2 <= end:
        out[at + field : at + field + 2] = b"\0\0"
        body = bytes(out[at:end])
        start = b"" if packet[9] == 1 else pseudo(packet, packet[9], len(body))
        checksum = ~ones_sum(start + body) & 0xFFFF
        if packet[9] == 17:
            checksum = checksum or 0xFFFF
        struct.pack_into("!H", out, at + field, checksum)
    if ip:
        out[10:12] = b"\0\0"
        struct.pack_into("!H", out, 10, ~ones_sum(bytes(out[:at])) & 0xFFFF)
    return bytes(out)


# IPv6 (RFC 8200, RFC 4443)


def upper(packet: bytes) -> tuple[int, int]:
    """What a version 6 packet carries behind its extension headers, and where; (-1, 0) where that cannot be told.

    A true fragment that is not the first carries nothing that could be told.
    """
    if len(packet) < 40:
        return -1, 0
    kind, at = packet[6], 40
    while kind in (0, 43, 44, 60):
        if at + 8 > len(packet):
            return -1, 0
        if kind == 44 and (packet[at + 2] << 8 | packet[at + 3]) & 0xFFF8:
            return -1, 0
        kind, at = packet[at], at + (8 if kind == 44 else (packet[at + 1] + 1) * 8)
    return kind, at


def pseudo6(packet: bytes, protocol: int, length: int) -> bytes:
    """The pseudo header of an IPv6 packet."""
    return packet[8:40] + struct.pack("!IHBB", length, 0, 0, protocol)


def transport_is_valid6(packet: bytes, protocol: int, at: int) -> bool:
    """Is the checksum of what a version 6 packet carries right?"""
    body = packet[at : 40 + (packet[4] << 8 | packet[5])]
    return ones_sum(pseudo6(packet, protocol, len(body)) + body) == 0xFFFF


def mend6(packet: bytes) -> bytes:
    """The packet with a right transport checksum, as far as it is long enough to have one."""
    protocol, at = upper(packet)
    field = {6: 16, 17: 6, 58: 2}.get(protocol)
    end = min(40 + (packet[4] << 8 | packet[5]), len(packet)) if len(packet) >= 40 else 0
    if field is None or at + field + 2 > end:
        return packet
    out = bytearray(packet)
    out[at + field : at + field + 2] = b"\0\0"
    body = bytes(out[at:end])
    checksum = ~ones_sum(pseudo6(packet, protocol, len(body)) + body) & 0xFFFF
    struct.pack_into("!H", out, at + field, checksum or (0xFFFF if protocol == 17 else 0))
    return bytes(out)


def read_tcp6(packet: bytes) -> Frame | None:
    """Take a TCP segment over IPv6 without extension headers apart; None when it is not whole."""
    end = 40 + (packet[4] << 8 | packet[5]) if len(packet) >= 60 else 0
    if not 60 <= end <= len(packet) or packet[6] != 6 or packet[0] >> 4 != 6:
        return None
    source_port, destination_port, seq, ack, offset, flags, window = struct.unpack_from("!HHIIBBH", packet, 40)
    data = 40 + (offset >> 4) * 4
    if not 60 <= data <= end:
        return None
    return Frame(
        packet[8:24], packet[24:40], source_port, destination_port, seq, ack, flags & 0x3F, window,
        packet[60:data], packet[data:end],
    )  # fmt: skip


# Either version


def transport_at(packet: bytes | bytearray) -> int:
    """Where the transport header of a packet without IPv6 extension headers begins."""
    return 40 if packet[0] >> 4 == 6 else (packet[0] & 15) * 4


def set_length(packet: bytearray, length: int) -> None:
    """Let the IP header say that the packet has so many bytes in all."""
    if packet[0] >> 4 == 6:
        struct.pack_into("!H", packet, 4, length - 40 & 0xFFFF)
    else:
        struct.pack_into("!H", packet, 2, length & 0xFFFF)


def read_segment(packet: bytes) -> Frame | None:
    """Take a TCP segment apart, behind whatever extension headers; None when it is not whole."""
    if not packet or packet[0] >> 4 != 6:
        return read_tcp(packet)
    protocol, at = upper(packet)
    if protocol != 6 or at == 40:
        return read_tcp6(packet)
    # As if they were not there: nothing else of a frame depends on them.
    bare = bytearray(packet[:40] + packet[at:])
    bare[6] = 6
    set_length(bare, (packet[4] << 8 | packet[5]) - (at - 40) + 40)
    return read_tcp6(bytes(bare))


def is_whole(packet: bytes, *, transport: bool = True) -> bool:
    """Are the checksums of a packet that `read_segment` can read right, or, without `transport`, the IP header's?"""
    if packet[0] >> 4 != 6:
        return header_is_valid(packet) and (not transport or transport_is_valid(packet))
    protocol, at = upper(packet)
    return not transport or transport_is_valid6(packet, protocol, at)


def mend_any(packet: bytes, *, ip: bool = True, transport: bool = True) -> bytes:
    """`mend` or `mend6`."""
    if packet and packet[0] >> 4 == 6:
        return mend6(packet) if transport else packet
    return mend(packet, ip=ip, transport=transport)
