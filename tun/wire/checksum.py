"""The Internet checksum (RFC 1071) by big integers.

A buffer read as one big-endian number N is the sum of its 16-bit words times powers of 2**16, and 2**16 is 1 modulo
65535: so N % 65535 *is* the one's complement sum, computed by C loops instead of a Python one. Folding the number in
halves first (2**(16*k) is 1 as well) halves the cost for big packets, since a division costs more than an addition.

One's complement has two zeros. A sum is 0 only for a buffer of zeros, otherwise 65535 stands for zero, as adding with
end-around carry gives; so results equal those of the classical loop bit for bit.

The core writes only the pseudo-header's sum into the TCP checksum field, as one does for a network card; whoever
carries the packet completes it: the kernel (virtio header, flag NEEDS_CSUM), or `complete` here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

# Above this many bytes folding wins over one division; measured, CPython 3.11: equal near 600.
_FOLD_FROM: Final = 1024


def fold(value: int) -> int:
    """Reduce a non-negative sum to 16 bits with end-around carry: 0 only for 0, otherwise 1..65535."""
    if value <= 0xFFFF:
        return value
    return value % 65535 or 65535


def sum16(data: bytes | bytearray | memoryview) -> int:
    """The one's complement sum of 16-bit big-endian words; an odd last byte counts as the high half of a word."""
    length = len(data)
    value = int.from_bytes(data, "big")
    if length & 1:
        value <<= 8
    if length > _FOLD_FROM:
        bits = length * 8
        while bits > 4096:
            bits = ((bits >> 1) + 15) & ~15
            value = (value >> bits) + (value & ((1 << bits) - 1))
    if value <= 0xFFFF:
        return value
    return value % 65535 or 65535


def sum16_pieces(pieces: Sequence[bytes | bytearray | memoryview], initial: int = 0) -> int:
    """The sum of the concatenation of `pieces`, added to `initial`, without joining them."""
    total = initial
    odd = False
    for piece in pieces:
        part = sum16(piece)
        # A piece that starts at an odd offset has its bytes in the other halves of the words (RFC 1071 2(B)).
        total += ((part & 0xFF) << 8 | part >> 8) if odd else part
        odd ^= bool(len(piece) & 1)
    return fold(total)


def pseudo_header_sum(source: bytes, destination: bytes, protocol: int, length: int) -> int:
    """The folded, not complemented sum of the pseudo header (RFC 9293 3.1, RFC 8200 8.1).

    Args:
        source: 4 or 16 bytes; `destination` as many.
        protocol: the transport protocol's number.
        length: bytes of transport header and payload.
    """
    return fold(sum16(source) + sum16(destination) + protocol + (length >> 16) + (length & 0xFFFF))


def internet_checksum(data: bytes | bytearray | memoryview, initial: int = 0) -> int:
    """What belongs into the checksum field of `data` (whose field is zero), `initial` being a pseudo header's sum."""
    return ~fold(sum16(data) + initial) & 0xFFFF


def complete(
    header: bytearray | memoryview, transport: int, field: int, payload: Sequence[bytes | bytearray | memoryview]
) -> None:
    """Turn a pseudo-header sum in a packet's checksum field into the full checksum, in place.

    Args:
        header: IP and transport header; the field holds the folded pseudo-header sum, not complemented.
        transport: offset of the transport header in `header`.
        field: offset of the checksum field in `header`.
        payload: what follows the header, in pieces of any length.
    """
    part = sum16(header[transport:])
    odd = bool((len(header) - transport) & 1)
    rest = sum16_pieces(payload)
    if odd:
        rest = (rest & 0xFF) << 8 | rest >> 8
    value = ~fold(part + rest) & 0xFFFF
    header[field] = value >> 8
    header[field + 1] = value & 0xFF
