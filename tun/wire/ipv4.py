"""IPv4 headers (RFC 791, RFC 1122 3.2.1).

The parser judges what a host must judge before it believes a header: version, lengths, checksum, options in bounds.
It does not judge addresses, fragments or the time to live: those are the stack's affair (and a host accepts any TTL).
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from tun.wire import verdict
from tun.wire.checksum import sum16

HEADER_LENGTH: Final = 20
MAX_TOTAL: Final = 65535

PROTOCOL_ICMP: Final = 1
PROTOCOL_TCP: Final = 6
PROTOCOL_UDP: Final = 17

FLAG_DF: Final = 0x4000
FLAG_MF: Final = 0x2000
OFFSET_MASK: Final = 0x1FFF  # units of 8 bytes

TTL: Final = 64

# RFC 791 3.1: loose and strict source route. A host that acts on them relays packets for strangers.
_LOOSE_SOURCE_ROUTE: Final = 131
_STRICT_SOURCE_ROUTE: Final = 137

_HEADER: Final = Struct("!BBHHHBBH4s4s")


class Ipv4Header:
    """The last parsed header; one object is refilled for every packet."""

    __slots__ = (
        "destination",
        "fragment",
        "header_length",
        "identification",
        "more_fragments",
        "protocol",
        "source",
        "total_length",
        "ttl",
    )

    def __init__(self) -> None:
        self.header_length: int = 0
        self.total_length: int = 0
        self.identification: int = 0
        self.more_fragments: bool = False
        self.fragment: int = 0  # offset of the payload in the datagram, bytes
        self.ttl: int = 0
        self.protocol: int = 0
        self.source: bytes = b""
        self.destination: bytes = b""


def parse_ipv4(packet: bytes, start: int, header: Ipv4Header) -> int:
    """Judge the header at `start` and fill `header`.

    Bytes after the total length are padding and not ours. Never raises.

    Returns: a verdict; `header` means something only when it is OK.
    """
    available = len(packet) - start
    if available < HEADER_LENGTH:
        return verdict.SHORT
    first, _, total, identification, fragment, ttl, protocol, _, source, destination = _HEADER.unpack_from(
        packet, start
    )
    if first >> 4 != 4:
        return verdict.VERSION
    length = (first & 15) << 2
    if length < HEADER_LENGTH or length > available:
        return verdict.HEADER_LENGTH
    if total < length or total > available:
        return verdict.TOTAL_LENGTH
    if sum16(packet[start : start + length]) != 0xFFFF:
        return verdict.HEADER_CHECKSUM
    if length > HEADER_LENGTH:
        judgement = _judge_options(packet, start + HEADER_LENGTH, start + length)
        if judgement != verdict.OK:
            return judgement
    header.header_length = length
    header.total_length = total
    header.identification = identification
    header.more_fragments = fragment & FLAG_MF != 0
    header.fragment = (fragment & OFFSET_MASK) << 3
    header.ttl = ttl
    header.protocol = protocol
    header.source = source
    header.destination = destination
    return verdict.OK


def _judge_options(packet: bytes, at: int, end: int) -> int:
    """Walk the options (RFC 791 3.1): all are ignored, broken ones and source routes drop the packet."""
    while at < end:
        kind = packet[at]
        if kind == 0:
            return verdict.OK
        if kind == 1:
            at += 1
            continue
        if at + 1 >= end:
            return verdict.IP_OPTIONS
        length = packet[at + 1]
        if length < 2 or at + length > end:
            return verdict.IP_OPTIONS
        if kind in (_LOOSE_SOURCE_ROUTE, _STRICT_SOURCE_ROUTE):
            return verdict.SOURCE_ROUTE
        at += length
    return verdict.OK


def build_ipv4(
    source: bytes,
    destination: bytes,
    protocol: int,
    payload_length: int,
    *,
    identification: int = 0,
    fragment: int = FLAG_DF,
    ttl: int = TTL,
) -> bytearray:
    """A header without options, checksum full.

    The identification may be 0 because DF is set and nothing is ever fragmented (RFC 6864 4).
    """
    header = bytearray(HEADER_LENGTH)
    _HEADER.pack_into(
        header,
        0,
        0x45,
        0,
        HEADER_LENGTH + payload_length,
        identification,
        fragment,
        ttl,
        protocol,
        0,
        source,
        destination,
    )
    checksum = ~sum16(header) & 0xFFFF
    header[10] = checksum >> 8
    header[11] = checksum & 0xFF
    return header
