"""IPv6 headers (RFC 8200): the fixed header, and the chain of extension headers up to what they carry.

`parse_ipv6` judges the fixed header alone, `walk_extensions` the chain behind it; in between the stack drops what is
for nobody here, so that multicast costs no walk. The chain is bounded: 8 headers, each inside the packet. What RFC
8200 4.2 wants answered by "parameter problem" is left in the header object for whoever may answer it.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from tun.wire import verdict

HEADER_LENGTH: Final = 40
HOP_LIMIT: Final = 64
MAX_EXTENSIONS: Final = 8  # nobody honest comes near it; each costs a step for every packet

HOP_BY_HOP: Final = 0
ROUTING: Final = 43
FRAGMENT: Final = 44
PROTOCOL_ICMPV6: Final = 58
NO_NEXT_HEADER: Final = 59
DESTINATION_OPTIONS: Final = 60

# Codes of "parameter problem" (RFC 4443 3.4).
ERRONEOUS_FIELD: Final = 0
UNKNOWN_NEXT_HEADER: Final = 1
UNKNOWN_OPTION: Final = 2

_PAD1: Final = 0
_PADN: Final = 1
_ROUTER_ALERT: Final = 5  # RFC 2711; for routers

_HEADER: Final = Struct("!IHBB16s16s")
_FRAGMENT: Final = Struct("!BxHI")


class Ipv6Header:
    """The last parsed header; one object is refilled for every packet.

    Attributes:
        next_header: what follows the fixed header.
        header_length: bytes before the transport header; 40 until `walk_extensions` has gone through the chain.
        total_length: of the packet, bytes; what follows is padding and not ours.
        protocol: what the chain ends in.
        fragment, more_fragments, identification: as in `Ipv4Header`.
        problem_code, problem_pointer: with the verdict PARAMETER, what is to be answered.
    """

    __slots__ = (
        "destination",
        "fragment",
        "header_length",
        "hop_limit",
        "identification",
        "more_fragments",
        "next_header",
        "payload_length",
        "problem_code",
        "problem_pointer",
        "protocol",
        "source",
        "total_length",
    )

    def __init__(self) -> None:
        self.payload_length: int = 0
        self.next_header: int = 0
        self.hop_limit: int = 0
        self.source: bytes = b""
        self.destination: bytes = b""
        self.header_length: int = HEADER_LENGTH
        self.total_length: int = 0
        self.protocol: int = 0
        self.fragment: int = 0
        self.more_fragments: bool = False
        self.identification: int = 0
        self.problem_code: int = 0
        self.problem_pointer: int = 0


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
    header.next_header = header.protocol = next_header
    header.hop_limit = hop_limit
    header.source = source
    header.destination = destination
    header.header_length = HEADER_LENGTH
    header.total_length = HEADER_LENGTH + payload_length
    header.fragment = header.identification = 0
    header.more_fragments = False
    return verdict.OK


def walk_extensions(packet: bytes, start: int, header: Ipv6Header) -> int:
    """Go through the extension headers of a packet that `parse_ipv6` found good. Never raises.

    The walk ends at the first header that is not an extension, and at the header of a true fragment, since what comes
    behind it may be in another packet. A "fragment" that is the whole packet is none (RFC 6946).

    Returns: OK; EXTENSIONS or IP_OPTIONS for what is dropped in silence; NO_NEXT_HEADER for a packet that carries
        nothing; PARAMETER for what is dropped and, if `header.source` may be answered, answered.
    """
    at = start + HEADER_LENGTH
    end = start + header.total_length
    kind = header.next_header
    named_at = 6  # where `kind` was written, as an offset in the packet
    for count in range(MAX_EXTENSIONS + 1):
        if kind == HOP_BY_HOP:
            if count:
                break  # only the first header may be one: elsewhere it is unknown (RFC 8200 4.1)
        elif kind == NO_NEXT_HEADER:
            return verdict.NO_NEXT_HEADER
        elif kind not in (ROUTING, FRAGMENT, DESTINATION_OPTIONS):
            break
        if count == MAX_EXTENSIONS:
            return verdict.EXTENSIONS
        if at + 8 > end:
            # Linux tells where half a fragment header begins, and is silent about the other kinds.
            return _problem(header, ERRONEOUS_FIELD, at - start) if kind == FRAGMENT else verdict.EXTENSIONS
        length = 8 if kind == FRAGMENT else (packet[at + 1] + 1) << 3
        if at + length > end:
            return verdict.EXTENSIONS
        following = packet[at]
        if kind == FRAGMENT:
            _, place, identification = _FRAGMENT.unpack_from(packet, at)
            header.fragment = place & 0xFFF8
            header.more_fragments = place & 1 != 0
            header.identification = identification
            if header.fragment or header.more_fragments:
                header.header_length = at + 8 - start
                header.protocol = following
                return verdict.OK
        elif kind == ROUTING:
            if packet[at + 3]:  # segments left: somebody wants us to send it on (RFC 8200 4.4, RFC 5095)
                return _problem(header, ERRONEOUS_FIELD, at + 2 - start)
        else:
            judgement = _judge_options(packet, start, at + 2, at + length, header)
            if judgement != verdict.OK:
                return judgement
        named_at = at - start
        kind = following
        at += length
    header.header_length = at - start
    header.protocol = kind
    # The pointer that is wanted when nobody here knows the protocol.
    header.problem_code = UNKNOWN_NEXT_HEADER
    header.problem_pointer = named_at
    return verdict.OK


def _judge_options(packet: bytes, start: int, at: int, end: int, header: Ipv6Header) -> int:
    """Walk options; the two high bits of an unknown one say what becomes of the packet (RFC 8200 4.2)."""
    while at < end:
        kind = packet[at]
        if kind == _PAD1:
            at += 1
            continue
        if at + 1 >= end or at + 2 + packet[at + 1] > end:
            return verdict.IP_OPTIONS
        if kind not in (_PADN, _ROUTER_ALERT):
            action = kind >> 6
            if action == 1:
                return verdict.IP_OPTIONS
            if action:
                return _problem(header, UNKNOWN_OPTION, at - start)
        at += 2 + packet[at + 1]
    return verdict.OK


def _problem(header: Ipv6Header, code: int, pointer: int) -> int:
    header.problem_code = code
    header.problem_pointer = pointer
    return verdict.PARAMETER


def build_ipv6(
    source: bytes, destination: bytes, next_header: int, payload_length: int, *, hop_limit: int = HOP_LIMIT
) -> bytearray:
    """A fixed header, traffic class and flow label 0."""
    return bytearray(_HEADER.pack(6 << 28, payload_length, next_header, hop_limit, source, destination))
