"""TCP segments: what the bytes mean (RFC 9293 3.1, RFC 7323, RFC 2018).

`parse_tcp` is fed by the network, so it never raises and never loops longer than the header: an option with a bad
length ends the options and the segment lives (RFC 9293 MUST-7). Options that belong to the handshake are read only
from segments with SYN; the reserved and the ECN bits are nobody's business here.

Nothing is allocated per segment: `Segment` is refilled, the payload is two offsets into the packet.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct
from typing import Final

from tun.wire import verdict
from tun.wire.checksum import fold, internet_checksum, pseudo_header_sum, sum16
from tun.wire.ipv4 import PROTOCOL_TCP, build_ipv4
from tun.wire.ipv6 import build_ipv6

HEADER_LENGTH: Final = 20
CHECKSUM_OFFSET: Final = 16

FIN: Final = 0x01
SYN: Final = 0x02
RST: Final = 0x04
PSH: Final = 0x08
ACK: Final = 0x10
URG: Final = 0x20
FLAGS: Final = 0x3F  # ECE, CWR, AE and the reserved bits are ignored

OPTION_END: Final = 0
OPTION_NOP: Final = 1
OPTION_MSS: Final = 2
OPTION_WINDOW_SCALE: Final = 3
OPTION_SACK_PERMITTED: Final = 4
OPTION_SACK: Final = 5
OPTION_TIMESTAMP: Final = 8

MAX_WINDOW_SCALE: Final = 14  # RFC 7323 2.3
SACK_BLOCKS: Final = 4  # as many as 40 bytes of options hold

# NOP NOP TIMESTAMP 10: how every kernel lays out the option in segments after the handshake (RFC 7323 appendix A).
TIMESTAMP_LAYOUT: Final = 0x0101080A

_HEADER: Final = Struct("!HHIIHHHH")
_TWO_LONGS: Final = Struct("!II")
_SHORT: Final = Struct("!H")
_TIMESTAMP: Final = Struct("!III")


class Segment:
    """The last parsed segment; one object is refilled for every packet. Numbers are as on the wire."""

    __slots__ = (
        "ack",
        "data_end",
        "data_start",
        "destination_port",
        "flags",
        "has_timestamp",
        "mss",
        "sack_count",
        "sack_permitted",
        "sacks",
        "seq",
        "source_port",
        "ts_echo",
        "ts_value",
        "window",
        "window_scale",
    )

    def __init__(self) -> None:
        self.source_port: int = 0
        self.destination_port: int = 0
        self.seq: int = 0
        self.ack: int = 0
        self.flags: int = 0
        self.window: int = 0  # unscaled
        self.data_start: int = 0  # offsets in the packet
        self.data_end: int = 0
        self.has_timestamp: bool = False
        self.ts_value: int = 0
        self.ts_echo: int = 0
        self.mss: int = -1  # -1: absent, like the window scale
        self.window_scale: int = -1
        self.sack_permitted: bool = False
        self.sack_count: int = 0
        self.sacks: list[int] = [0] * (2 * SACK_BLOCKS)  # left, right, left, right


def parse_tcp(packet: bytes, start: int, end: int, segment: Segment) -> int:
    """Judge the segment in `packet[start:end]` and fill `segment`; the checksum is `verify_tcp`'s.

    Returns: a verdict; `segment` means something only when it is OK.
    """
    if end - start < HEADER_LENGTH:
        return verdict.SHORT
    source_port, destination_port, seq, ack, offset_flags, window, _, _ = _HEADER.unpack_from(packet, start)
    length = (offset_flags >> 12) << 2
    if length < HEADER_LENGTH or start + length > end:
        return verdict.TCP_OFFSET
    segment.source_port = source_port
    segment.destination_port = destination_port
    segment.seq = seq
    segment.ack = ack
    segment.flags = offset_flags & FLAGS
    segment.window = window
    segment.data_start = start + length
    segment.data_end = end
    segment.has_timestamp = False
    segment.sack_count = 0
    segment.mss = -1
    segment.window_scale = -1
    segment.sack_permitted = False
    if length > HEADER_LENGTH:
        _parse_options(packet, start + HEADER_LENGTH, start + length, segment)
    return verdict.OK


def _parse_options(packet: bytes, at: int, end: int, segment: Segment) -> None:
    if end - at >= 12:
        layout, value, echo = _TIMESTAMP.unpack_from(packet, at)
        if layout == TIMESTAMP_LAYOUT:
            segment.has_timestamp = True
            segment.ts_value = value
            segment.ts_echo = echo
            at += 12
    syn = segment.flags & SYN != 0
    while at < end:
        kind = packet[at]
        if kind == OPTION_END:
            return
        if kind == OPTION_NOP:
            at += 1
            continue
        if at + 1 >= end:
            return
        length = packet[at + 1]
        if length < 2 or at + length > end:
            return
        if kind == OPTION_TIMESTAMP:
            if length == 10:
                segment.has_timestamp = True
                segment.ts_value, segment.ts_echo = _TWO_LONGS.unpack_from(packet, at + 2)
        elif kind == OPTION_SACK:
            if length & 7 == 2 and not syn:
                _parse_sack(packet, at + 2, at + length, segment)
        elif syn:
            if kind == OPTION_MSS:
                if length == 4:
                    segment.mss = (packet[at + 2] << 8) | packet[at + 3]
            elif kind == OPTION_WINDOW_SCALE:
                if length == 3:
                    segment.window_scale = packet[at + 2]
            elif kind == OPTION_SACK_PERMITTED and length == 2:
                segment.sack_permitted = True
        at += length


def _parse_sack(packet: bytes, at: int, end: int, segment: Segment) -> None:
    count = 0
    while at < end and count < SACK_BLOCKS:
        segment.sacks[2 * count], segment.sacks[2 * count + 1] = _TWO_LONGS.unpack_from(packet, at)
        count += 1
        at += 8
    segment.sack_count = count


def verify_tcp(packet: bytes, start: int, end: int, source: bytes, destination: bytes) -> bool:
    """Is the checksum of the segment in `packet[start:end]` right, pseudo header included?"""
    length = end - start
    total = pseudo_header_sum(source, destination, PROTOCOL_TCP, length) + sum16(memoryview(packet)[start:end])
    return fold(total) == 0xFFFF


def options(
    *,
    mss: int = -1,
    window_scale: int = -1,
    sack_permitted: bool = False,
    timestamp: tuple[int, int] | None = None,
    sacks: Sequence[tuple[int, int]] = (),
) -> bytes:
    """Options in the order and padding of the Linux kernel, a multiple of 4 bytes.

    Raises: ValueError when they take more than 40 bytes.
    """
    parts = bytearray()
    if mss >= 0:
        parts += bytes((OPTION_MSS, 4)) + _SHORT.pack(mss)
    if sack_permitted:
        parts += bytes((OPTION_SACK_PERMITTED, 2)) if timestamp else bytes((1, 1, OPTION_SACK_PERMITTED, 2))
    if timestamp:
        parts += b"" if sack_permitted else b"\x01\x01"
        parts += bytes((OPTION_TIMESTAMP, 10)) + _TWO_LONGS.pack(*timestamp)
    if window_scale >= 0:
        parts += bytes((OPTION_NOP, OPTION_WINDOW_SCALE, 3, window_scale))
    if sacks:
        parts += bytes((1, 1, OPTION_SACK, 2 + 8 * len(sacks)))
        for left, right in sacks:
            parts += _TWO_LONGS.pack(left, right)
    if len(parts) > 40:
        raise ValueError("TCP options take at most 40 bytes")
    return bytes(parts)


def build_tcp(
    source: bytes,
    destination: bytes,
    source_port: int,
    destination_port: int,
    *,
    seq: int,
    ack: int = 0,
    flags: int,
    window: int = 0,
    options: bytes = b"",
    payload: bytes | memoryview = b"",
    urgent: int = 0,
) -> bytearray:
    """A complete packet, IP header included, all checksums full. For replies without a flow, and for tests.

    Args:
        source: 4 or 16 bytes, which chooses the IP version; `destination` likewise.
        options: a multiple of 4 bytes.
    """
    length = HEADER_LENGTH + len(options) + len(payload)
    if len(source) == 4:
        packet = build_ipv4(source, destination, PROTOCOL_TCP, length)
    else:
        packet = build_ipv6(source, destination, PROTOCOL_TCP, length)
    start = len(packet)
    offset_flags = (HEADER_LENGTH + len(options)) << 10 | flags
    packet += _HEADER.pack(source_port, destination_port, seq, ack, offset_flags, window, 0, urgent)
    packet += options
    packet += payload
    pseudo = pseudo_header_sum(source, destination, PROTOCOL_TCP, length)
    _SHORT.pack_into(packet, start + CHECKSUM_OFFSET, internet_checksum(memoryview(packet)[start:], pseudo))
    return packet


def build_reset(source: bytes, destination: bytes, segment: Segment) -> bytearray:
    """The RST that answers a segment for which no connection exists (RFC 9293 3.10.7.1), complete.

    An ACK is answered with its own number as sequence, anything else by RST with ACK: Linux takes only the exact form
    as "connection refused" and lets the app hang on any other.

    Args:
        source: who sent the segment, `destination` whom it was for.
    """
    if segment.flags & ACK:
        seq, ack, flags = segment.ack, 0, RST
    else:
        length = segment.data_end - segment.data_start
        length += (segment.flags & SYN != 0) + (segment.flags & FIN != 0)
        seq, ack, flags = 0, (segment.seq + length) & 0xFFFFFFFF, RST | ACK
    return build_tcp(destination, source, segment.destination_port, segment.source_port, seq=seq, ack=ack, flags=flags)
