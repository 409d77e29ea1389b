"""ICMP for IPv4 (RFC 792, RFC 1122 3.2.2): echo, and the errors we send or receive about datagrams."""

from __future__ import annotations

from struct import Struct
from typing import Final

from tun.errors import BadPacket
from tun.wire.checksum import internet_checksum, sum16
from tun.wire.ipv4 import HEADER_LENGTH as IPV4_HEADER_LENGTH
from tun.wire.ipv4 import PROTOCOL_ICMP, PROTOCOL_TCP, build_ipv4

HEADER_LENGTH: Final = 8

ECHO_REPLY: Final = 0
UNREACHABLE: Final = 3
ECHO_REQUEST: Final = 8
TIME_EXCEEDED: Final = 11

UNREACHABLE_HOST: Final = 1
UNREACHABLE_PROTOCOL: Final = 2
UNREACHABLE_PORT: Final = 3
FRAGMENTATION_NEEDED: Final = 4
TIME_EXCEEDED_REASSEMBLY: Final = 1

# RFC 1812 4.3.2.3: quote as much of the datagram as fits into 576 bytes with our own headers.
_QUOTE_LIMIT: Final = 576 - IPV4_HEADER_LENGTH - HEADER_LENGTH

# RFC 1122 3.2.2: an error is never sent about an error. These types are questions or answers.
INFORMATIONAL: Final = frozenset((0, 8, 9, 10, 13, 14, 15, 16, 17, 18))

_HEADER: Final = Struct("!BBHHH")
_QUOTED_PORTS: Final = Struct("!HHI")


def verify_icmp(packet: bytes, start: int, end: int) -> bool:
    """Is the message in `packet[start:end]` long enough and its checksum right?"""
    return end - start >= HEADER_LENGTH and sum16(memoryview(packet)[start:end]) == 0xFFFF


def build_echo_reply(source: bytes, destination: bytes, message: bytes | memoryview) -> bytearray:
    """The answer to an echo request: a complete packet with the same identifier, sequence and data.

    Args:
        source: whom the request was for.
        destination: who asked.
        message: the request from its ICMP header on, at most 65515 bytes.
    """
    packet = build_ipv4(source, destination, PROTOCOL_ICMP, len(message))
    start = len(packet)
    packet += message
    packet[start] = ECHO_REPLY
    packet[start + 1] = 0
    packet[start + 2 : start + 4] = b"\0\0"
    checksum = internet_checksum(memoryview(packet)[start:])
    packet[start + 2] = checksum >> 8
    packet[start + 3] = checksum & 0xFF
    return packet


def build_error(
    kind: int, code: int, source: bytes, destination: bytes, quoted: bytes | bytearray | memoryview
) -> bytearray:
    """An error about a datagram: a complete packet.

    Args:
        kind: UNREACHABLE or TIME_EXCEEDED.
        source: our address in the answer; the kernel takes any that is not its own.
        destination: who sent the datagram.
        quoted: the datagram from its IP header on; cut to what fits into 576 bytes.
    """
    quote = quoted[:_QUOTE_LIMIT]
    packet = build_ipv4(source, destination, PROTOCOL_ICMP, HEADER_LENGTH + len(quote))
    start = len(packet)
    packet += _HEADER.pack(kind, code, 0, 0, 0)
    packet += quote
    checksum = internet_checksum(memoryview(packet)[start:])
    packet[start + 2] = checksum >> 8
    packet[start + 3] = checksum & 0xFF
    return packet


class QuotedSegment:
    """What an ICMP error says about a TCP segment of ours: its flow seen from our side, and its sequence number."""

    __slots__ = ("destination", "destination_port", "mtu", "seq", "source", "source_port")

    def __init__(
        self, source: bytes, destination: bytes, source_port: int, destination_port: int, seq: int, mtu: int
    ) -> None:
        self.source = source
        self.destination = destination
        self.source_port = source_port
        self.destination_port = destination_port
        self.seq = seq
        self.mtu = mtu


def parse_quoted_tcp(packet: bytes, start: int, end: int) -> QuotedSegment:
    """Read the TCP segment that an ICMP error quotes.

    Args:
        packet: the ICMP message is `packet[start:end]`; its checksum is verified already.

    Raises: BadPacket when it quotes no usable TCP header, and nothing else.
    """
    inner = start + HEADER_LENGTH
    if end - inner < IPV4_HEADER_LENGTH or packet[inner] >> 4 != 4:
        raise BadPacket("the ICMP error quotes no IPv4 header")
    transport = inner + ((packet[inner] & 15) << 2)
    if transport < inner + IPV4_HEADER_LENGTH or transport + 8 > end or packet[inner + 9] != PROTOCOL_TCP:
        raise BadPacket("the ICMP error quotes no TCP header")
    _, _, _, _, mtu = _HEADER.unpack_from(packet, start)
    source_port, destination_port, seq = _QUOTED_PORTS.unpack_from(packet, transport)
    return QuotedSegment(
        packet[inner + 12 : inner + 16], packet[inner + 16 : inner + 20], source_port, destination_port, seq, mtu
    )
