"""IPv4 headers: judged in bounds, built as scapy reads them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP  # noqa: TID251 - an oracle

from tun.wire import verdict
from tun.wire.checksum import internet_checksum
from tun.wire.ipv4 import Ipv4Header, build_ipv4, parse_ipv4

ADDRESSES = st.binary(min_size=4, max_size=4)


def with_options(options: bytes, payload: bytes = b"data") -> bytes:
    """A packet with options, whatever they are; padded to words."""
    options += bytes(-len(options) % 4)
    packet = build_ipv4(b"\1\1\1\1", b"\2\2\2\2", 6, len(options) + len(payload))
    packet[0] = 0x45 + len(options) // 4
    packet[10:12] = b"\0\0"
    packet += options
    packet[10:12] = internet_checksum(packet).to_bytes(2, "big")
    return bytes(packet) + payload


def judge(packet: bytes, start: int = 0) -> int:
    return parse_ipv4(packet, start, Ipv4Header())


@given(ADDRESSES, ADDRESSES, st.integers(0, 255), st.binary(max_size=100), st.integers(0, 20), st.binary(max_size=9))
def test_what_is_built_is_read(
    source: bytes, destination: bytes, protocol: int, payload: bytes, start: int, padding: bytes
) -> None:
    """By us, behind a prefix and before padding; and by scapy."""
    packet = bytes(build_ipv4(source, destination, protocol, len(payload)) + payload)
    header = Ipv4Header()

    assert parse_ipv4(bytes(start) + packet + padding, start, header) == verdict.OK
    assert (header.source, header.destination, header.protocol) == (source, destination, protocol)
    assert (header.header_length, header.total_length) == (20, len(packet))
    assert (header.fragment, header.more_fragments) == (0, False)

    oracle = IP(packet)
    assert (oracle.src, oracle.dst) == (".".join(map(str, source)), ".".join(map(str, destination)))
    assert oracle.len == len(packet)
    assert oracle.flags == "DF"
    assert bytes(IP(packet[:10] + b"\0\0" + packet[12:20])) == packet[:10] + b"\0\0" + packet[12:20]


@given(st.binary(max_size=120), st.integers(0, 12))
def test_any_bytes_get_a_verdict(data: bytes, start: int) -> None:
    """Fed by the network: nothing raises."""
    assert 0 <= judge(data, start) < len(verdict.NAMES)


@given(st.binary(max_size=36), st.sampled_from([0x45, 0x46, 0x4F]))
def test_almost_headers_get_a_verdict(options: bytes, first: int) -> None:
    """The same for what looks like a header."""
    packet = bytearray(with_options(options))
    packet[0] = first
    packet[10:12] = b"\0\0"
    packet[10:12] = internet_checksum(packet[: (first & 15) * 4]).to_bytes(2, "big")
    assert 0 <= judge(bytes(packet)) < len(verdict.NAMES)


@pytest.mark.rule(1)
def test_lengths_are_judged() -> None:
    """RFC 1122 3.2.1: each way of being too short, or of claiming too much."""
    packet = bytes(build_ipv4(b"\1\1\1\1", b"\2\2\2\2", 6, 4)) + b"data"

    assert judge(packet) == verdict.OK
    assert judge(packet[:19]) == verdict.SHORT
    assert judge(packet[:23]) == verdict.TOTAL_LENGTH
    assert judge(b"\x65" + packet[1:]) == verdict.VERSION
    assert judge(b"\x44" + packet[1:]) == verdict.HEADER_LENGTH
    assert judge(b"\x4f" + packet[1:]) == verdict.HEADER_LENGTH
    assert judge(packet[:2] + b"\0\x13" + packet[4:]) == verdict.TOTAL_LENGTH


@pytest.mark.rule(1)
def test_damaged_header_is_dropped() -> None:
    """Every single bit of it."""
    packet = bytes(build_ipv4(b"\1\1\1\1", b"\2\2\2\2", 6, 4)) + b"data"
    for bit in range(160):
        damaged = bytearray(packet)
        damaged[bit // 8] ^= 1 << bit % 8
        assert judge(bytes(damaged)) != verdict.OK


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (b"", verdict.OK),
        (b"\1\1\1\1", verdict.OK),
        (b"\0\xff\xff\xff", verdict.OK),  # nothing counts after the end
        (b"\x94\4\0\0", verdict.OK),  # router alert
        (b"\x07\x07\x04\0\0\0\0", verdict.OK),  # record route
        (b"\x94\0\0\0", verdict.IP_OPTIONS),  # a length of 0 would loop
        (b"\x94\1\0\0", verdict.IP_OPTIONS),
        (b"\x94\5\0\0", verdict.IP_OPTIONS),
        (b"\1\1\1\x94", verdict.IP_OPTIONS),
        (b"\x83\7\4\1\2\3\4\0", verdict.SOURCE_ROUTE),
        (b"\x89\7\4\1\2\3\4\0", verdict.SOURCE_ROUTE),
    ],
)
@pytest.mark.rule(5)
def test_options_are_walked_in_bounds(options: bytes, expected: int) -> None:
    """Ignored, all but source routes, which would make us somebody's relay."""
    assert judge(with_options(options)) == expected
