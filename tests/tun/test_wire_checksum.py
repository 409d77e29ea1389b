"""The checksum by big integers, against the loop of RFC 1071 and against scapy."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.utils import checksum as scapy_checksum  # noqa: TID251 - an oracle

from tun.wire.checksum import complete, fold, internet_checksum, pseudo_header_sum, sum16, sum16_pieces
from tun.wire.tcp import ACK, build_tcp

BYTES = (
    st.binary(max_size=4000)
    | st.builds(lambda n: b"\xff" * n, st.integers(0, 3000))
    | st.builds(bytes, st.integers(0, 99))
)


def naive(data: bytes) -> int:
    """RFC 1071 4.1, word by word."""
    if len(data) % 2:
        data += b"\0"
    total = 0
    for index in range(0, len(data), 2):
        total += data[index] << 8 | data[index + 1]
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(BYTES)
def test_sum_is_that_of_the_loop(data: bytes) -> None:
    """Bit for bit, its two zeros included."""
    assert sum16(data) == naive(data)


@given(BYTES)
def test_checksum_is_scapys(data: bytes) -> None:
    """An oracle that shares nothing with us."""
    assert internet_checksum(data) == scapy_checksum(data)


@pytest.mark.parametrize("size", [1023, 1024, 1025, 4095, 4097, 65495, 65535])
def test_large_buffers_are_folded_right(size: int) -> None:
    """The way for large buffers begins at 1024 bytes."""
    for data in (os.urandom(size), b"\xff" * size, bytes(size), bytes(size - 1) + b"\1"):
        assert sum16(data) == naive(data)


@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=8), st.integers(0, 0xFFFF))
def test_pieces_sum_like_the_whole(data: bytes, cuts: list[int], initial: int) -> None:
    """Cut anywhere, at odd offsets too."""
    borders = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [memoryview(data)[a:b] for a, b in pairwise(borders)]

    assert sum16_pieces(pieces, initial) == fold(sum16(data) + initial)


@given(
    st.binary(min_size=4, max_size=4), st.binary(min_size=4, max_size=4), st.binary(max_size=500), st.integers(0, 40)
)
def test_complete_makes_a_full_checksum(source: bytes, destination: bytes, payload: bytes, cut: int) -> None:
    """The pseudo-header sum in the field becomes what a packet needs that was made at once."""
    packet = build_tcp(source, destination, 1, 2, seq=3, flags=ACK, payload=payload)
    header = bytearray(packet[:40])
    header[36:38] = pseudo_header_sum(source, destination, 6, len(packet) - 20).to_bytes(2, "big")

    complete(header, 20, 36, [payload[:cut], memoryview(payload)[cut:]])

    assert fold(sum16(header[20:] + payload) + pseudo_header_sum(source, destination, 6, len(packet) - 20)) == 0xFFFF
    assert header[36:38] in (packet[36:38], b"\0\0", b"\xff\xff")
