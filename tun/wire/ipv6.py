"""IPv6 headers (RFC 8200): the fixed header only.

The stack does not serve IPv6 yet; it counts these packets and drops them. The kernel sends some on its own to a new
link (router solicitations, listener reports), so they are ordinary, not errors.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from tun.wire import verdict

HEADER_LENGTH: Final = 40
HOP_LIMIT: Final = 64

_HEADER: Final = Struct("!IHBB16s16s")


class Ipv6Header:
    """The last parsed header; one object is refilled for every packet."""

    __slots__ = ("destination", "hop_limit", "next_header", "payload_length", "source")

    def __init__(self) -> None:
        self.payload_length: int = 0
        self.next_header: int = 0
        self.hop_limit: int = 0
        self.source: bytes = b""
        self.destination: bytes = b""


def parse_ipv6(packet: bytes, start: int, header: Ipv6Header) -> int:
    """Judge the fixed header at `start` and fill `header`. Never raises.

    Returns: a verdict; `header` means something only when it is OK.
    """
    available = len(packet) - start
    if available < HEADER_LENGTH:
        return verdict.SHORT
    first, payload_length, next_header, hop_limit, source, destination = _HEADER.unpack_from(packet, start)
    if first >> 28 != 6:
        return verdict.VERSION
    if HEADER_LENGTH + payload_length > available:
        return verdict.TOTAL_LENGTH
    header.payload_length = payload_length
    header.next_header = next_header
    header.hop_limit = hop_limit
    header.source = source
    header.destination = destination
    return verdict.OK


def build_ipv6(
    source: bytes, destination: bytes, next_header: int, payload_length: int, *, hop_limit: int = HOP_LIMIT
) -> bytearray:
    """A fixed header, traffic class and flow label 0."""
    return bytearray(_HEADER.pack(6 << 28, payload_length, next_header, hop_limit, source, destination))
