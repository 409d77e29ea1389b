"""IPv6 fixed headers, as scapy reads them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet6 import IPv6  # noqa: TID251 - an oracle

from tun.wire import verdict
from tun.wire.ipv6 import Ipv6Header, build_ipv6, parse_ipv6

ADDRESSES = st.binary(min_size=16, max_size=16)


@given(ADDRESSES, ADDRESSES, st.sampled_from([6, 17, 58, 59]), st.binary(max_size=50), st.integers(0, 12))
def test_what_is_built_is_read(source: bytes, destination: bytes, following: int, payload: bytes, start: int) -> None:
    """By us behind a prefix, and by scapy."""
    packet = bytes(build_ipv6(source, destination, following, len(payload)) + payload)
    header = Ipv6Header()

    assert parse_ipv6(bytes(start) + packet, start, header) == verdict.OK
    assert (header.source, header.destination) == (source, destination)
    assert (header.next_header, header.payload_length, header.hop_limit) == (following, len(payload), 64)
    oracle = IPv6(packet)
    assert (oracle.version, oracle.nh, oracle.plen, oracle.hlim) == (6, following, len(payload), 64)


@given(st.binary(max_size=100), st.integers(0, 12))
def test_any_bytes_get_a_verdict(data: bytes, start: int) -> None:
    """Fed by the network: nothing raises."""
    assert 0 <= parse_ipv6(data, start, Ipv6Header()) < len(verdict.NAMES)


def test_lengths_are_judged() -> None:
    """Too short for the header, or for what it claims to carry."""
    packet = bytes(build_ipv6(bytes(16), bytes(16), 59, 4)) + b"data"

    assert parse_ipv6(packet[:39], 0, Ipv6Header()) == verdict.SHORT
    assert parse_ipv6(packet[:43], 0, Ipv6Header()) == verdict.TOTAL_LENGTH
    assert parse_ipv6(b"\x40" + packet[1:], 0, Ipv6Header()) == verdict.VERSION
