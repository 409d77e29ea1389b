"""ICMP for IPv6 (RFC 4443): echo, and the errors we send or receive about packets.

Its checksum covers the pseudo header, unlike ICMP's for IPv4. Errors have types below 128, and are never answered.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from tun.errors import BadPacket
from tun.wire.checksum import fold, internet_checksum, pseudo_header_sum, sum16
from tun.wire.icmp import QuotedSegment
from tun.wire.ipv4 import PROTOCOL_TCP
from tun.wire.ipv6 import (
    DESTINATION_OPTIONS,
    FRAGMENT,
    HOP_BY_HOP,
    MAX_EXTENSIONS,
    PROTOCOL_ICMPV6,
    ROUTING,
    build_ipv6,
)
from tun.wire.ipv6 import HEADER_LENGTH as IPV6_HEADER_LENGTH

HEADER_LENGTH: Final = 8

UNREACHABLE: Final = 1
PACKET_TOO_BIG: Final = 2
TIME_EXCEEDED: Final = 3
PARAMETER_PROBLEM: Final = 4
ECHO_REQUEST: Final = 128
ECHO_REPLY: Final = 129

UNREACHABLE_ADDRESS: Final = 3
UNREACHABLE_PORT: Final = 4
TIME_EXCEEDED_REASSEMBLY: Final = 1

MIN_MTU: Final = 1280  # RFC 8200 5; an error fits into it (RFC 4443 2.4 c)
_QUOTE_LIMIT: Final = MIN_MTU - IPV6_HEADER_LENGTH - HEADER_LENGTH

_HEADER: Final = Struct("!BBHI")
_QUOTED_PORTS: Final = Struct("!HHI")


def verify_icmpv6(packet: bytes, start: int, end: int, source: bytes, destination: bytes) -> bool:
    """Is the message in `packet[start:end]` long enough and its checksum right?"""
    if end - start < HEADER_LENGTH:
        return False
    pseudo = pseudo_header_sum(source, destination, PROTOCOL_ICMPV6, end - start)
    return fold(pseudo + sum16(memoryview(packet)[start:end])) == 0xFFFF


def build_echo_reply(source: bytes, destination: bytes, message: bytes | memoryview) -> bytearray:
    """The answer to an echo request: a complete packet with the same identifier, sequence and data.

    Args:
        source: whom the request was for.
        destination: who asked.
        message: the request from its ICMP header on, at most 65535 bytes.
    """
    packet = build_ipv6(source, destination, PROTOCOL_ICMPV6, len(message))
    packet += message
    packet[IPV6_HEADER_LENGTH] = ECHO_REPLY
    packet[IPV6_HEADER_LENGTH + 1] = 0
    return _checksummed(packet, source, destination)


def build_error(
    kind: int,
    code: int,
    source: bytes,
    destination: bytes,
    quoted: bytes | bytearray | memoryview,
    *,
    pointer: int = 0,
) -> bytearray:
    """An error about a packet: a complete packet.

    Args:
        kind: UNREACHABLE, TIME_EXCEEDED or PARAMETER_PROBLEM.
        source: our address in the answer.
        destination: who sent the packet.
        quoted: the packet from its IP header on; cut to what fits into 1280 bytes.
        pointer: with PARAMETER_PROBLEM, the offset of what is wrong.
    """
    quote = quoted[:_QUOTE_LIMIT]
    packet = build_ipv6(source, destination, PROTOCOL_ICMPV6, HEADER_LENGTH + len(quote))
    packet += _HEADER.pack(kind, code, 0, pointer)
    packet += quote
    return _checksummed(packet, source, destination)


def is_error(packet: bytes, start: int, end: int) -> bool:
    """Does the packet in `packet[start:end]` carry an ICMPv6 error, as far as can be told, behind any headers?

    Extension headers are passed over without judgement, since one of them may be what is wrong with the packet. A
    message that ends before its type counts as an error: nobody may complain about it (RFC 4443 2.4 e.1).
    """
    kind, at = packet[start + 6], start + IPV6_HEADER_LENGTH
    for _ in range(MAX_EXTENSIONS + 1):
        if kind == PROTOCOL_ICMPV6:
            return at >= end or packet[at] < ECHO_REQUEST
        if kind not in (HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION_OPTIONS) or at + 8 > end:
            return False
        kind, at = packet[at], at + (8 if kind == FRAGMENT else (packet[at + 1] + 1) << 3)
    return False


def parse_quoted_tcp(packet: bytes, start: int, end: int) -> QuotedSegment:
    """Read the TCP segment that an error quotes. We send no extension headers, so none can be between.

    Args:
        packet: the message is `packet[start:end]`; its checksum is verified already.

    Raises: BadPacket when it quotes no usable TCP header, and nothing else.
    """
    inner = start + HEADER_LENGTH
    transport = inner + IPV6_HEADER_LENGTH
    if transport + 8 > end or packet[inner] >> 4 != 6 or packet[inner + 6] != PROTOCOL_TCP:
        raise BadPacket("the ICMPv6 error quotes no TCP header")
    mtu = _HEADER.unpack_from(packet, start)[3]
    source_port, destination_port, seq = _QUOTED_PORTS.unpack_from(packet, transport)
    return QuotedSegment(
        packet[inner + 8 : inner + 24], packet[inner + 24 : inner + 40], source_port, destination_port, seq, mtu
    )


def _checksummed(packet: bytearray, source: bytes, destination: bytes) -> bytearray:
    at = IPV6_HEADER_LENGTH
    packet[at + 2 : at + 4] = b"\0\0"
    pseudo = pseudo_header_sum(source, destination, PROTOCOL_ICMPV6, len(packet) - at)
    packet[at + 2 : at + 4] = internet_checksum(memoryview(packet)[at:], pseudo).to_bytes(2, "big")
    return packet
