"""Sequence numbers: arithmetic modulo 2**32 (RFC 9293 3.4, RFC 1982).

On the wire a sequence number is 32 bits and wraps. Two of them can be compared only while they lie less than 2**31
apart, which TCP guarantees: the largest scaled window is 2**30.

Inside the TCP machine numbers do not wrap: it keeps *positions*, unbounded integers whose low 32 bits are the wire
form. `unwrap` turns what a segment says into the position nearest to one that is known; the way back is `& MASK`.
So wrapping exists in this file and at the edges of the machine, and nowhere between.
"""

from __future__ import annotations

from typing import Final

MASK: Final = 0xFFFFFFFF
HALF: Final = 0x80000000
MODULUS: Final = 0x100000000


def add(a: int, n: int) -> int:
    """The number `n` after `a` (before it when `n` is negative)."""
    return (a + n) & MASK


def diff(a: int, b: int) -> int:
    """How far `a` is after `b`: -2**31 .. 2**31 - 1, negative when it is before."""
    distance = (a - b) & MASK
    return distance - MODULUS if distance >= HALF else distance


def lt(a: int, b: int) -> bool:
    """Is `a` before `b`?"""
    return diff(a, b) < 0


def le(a: int, b: int) -> bool:
    """Is `a` before `b`, or the same?"""
    return diff(a, b) <= 0


def gt(a: int, b: int) -> bool:
    """Is `a` after `b`?"""
    return diff(a, b) > 0


def ge(a: int, b: int) -> bool:
    """Is `a` after `b`, or the same?"""
    return diff(a, b) >= 0


def unwrap(wire: int, near: int) -> int:
    """The position with the low 32 bits `wire` that is nearest to the position `near`.

    It may be negative where `near` is small and `wire` lies before it; comparisons stay right.
    """
    distance = (wire - near) & MASK
    return near + (distance - MODULUS if distance >= HALF else distance)
