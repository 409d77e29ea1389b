"""UDP datagrams (RFC 768): enough to answer for ports that nobody serves, and to serve some later."""

from __future__ import annotations

from struct import Struct
from typing import Final

from tun.wire import verdict
from tun.wire.checksum import fold, internet_checksum, pseudo_header_sum, sum16
from tun.wire.ipv4 import PROTOCOL_UDP, build_ipv4
from tun.wire.ipv6 import build_ipv6

HEADER_LENGTH: Final = 8
CHECKSUM_OFFSET: Final = 6

_HEADER: Final = Struct("!HHHH")


class Datagram:
    """The last parsed datagram; one object is refilled for every packet."""

    __slots__ = ("data_end", "data_start", "destination_port", "source_port")

    def __init__(self) -> None:
        self.source_port: int = 0
        self.destination_port: int = 0
        self.data_start: int = 0  # offsets in the packet
        self.data_end: int = 0


def parse_udp(packet: bytes, start: int, end: int, datagram: Datagram) -> int:
    """Judge the datagram in `packet[start:end]` and fill `datagram`; the checksum is `verify_udp`'s. Never raises."""
    if end - start < HEADER_LENGTH:
        return verdict.SHORT
    source_port, destination_port, length, _ = _HEADER.unpack_from(packet, start)
    if length < HEADER_LENGTH or length > end - start:
        return verdict.UDP_LENGTH
    datagram.source_port = source_port
    datagram.destination_port = destination_port
    datagram.data_start = start + HEADER_LENGTH
    datagram.data_end = start + length
    return verdict.OK


def verify_udp(packet: bytes, start: int, end: int, source: bytes, destination: bytes) -> bool:
    """Is the checksum of the datagram in `packet[start:end]` right? 0 means that none was made (IPv4 only)."""
    if packet[start + CHECKSUM_OFFSET] == 0 and packet[start + CHECKSUM_OFFSET + 1] == 0:
        return len(source) == 4
    total = pseudo_header_sum(source, destination, PROTOCOL_UDP, end - start) + sum16(memoryview(packet)[start:end])
    return fold(total) == 0xFFFF


def build_udp(
    source: bytes, destination: bytes, source_port: int, destination_port: int, payload: bytes | memoryview
) -> bytearray:
    """A complete packet, IP header included, all checksums full."""
    length = HEADER_LENGTH + len(payload)
    if len(source) == 4:
        packet = build_ipv4(source, destination, PROTOCOL_UDP, length)
    else:
        packet = build_ipv6(source, destination, PROTOCOL_UDP, length)
    start = len(packet)
    packet += _HEADER.pack(source_port, destination_port, length, 0)
    packet += payload
    pseudo = pseudo_header_sum(source, destination, PROTOCOL_UDP, length)
    checksum = internet_checksum(memoryview(packet)[start:], pseudo) or 0xFFFF  # 0 on the wire means "none"
    packet[start + CHECKSUM_OFFSET] = checksum >> 8
    packet[start + CHECKSUM_OFFSET + 1] = checksum & 0xFF
    return packet
