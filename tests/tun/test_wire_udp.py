"""UDP datagrams, as scapy reads them."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, UDP  # noqa: TID251 - an oracle

from tun.wire import verdict
from tun.wire.udp import Datagram, build_udp, parse_udp, verify_udp

A = b"\x0a\x6b\x00\x01"
B = b"\x0a\x6b\x00\x02"


@given(st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=300))
def test_what_is_built_is_read(source_port: int, destination_port: int, payload: bytes) -> None:
    """By us and by scapy, checksum included."""
    packet = bytes(build_udp(A, B, source_port, destination_port, payload))
    datagram = Datagram()

    assert parse_udp(packet, 20, len(packet), datagram) == verdict.OK
    assert (datagram.source_port, datagram.destination_port) == (source_port, destination_port)
    assert packet[datagram.data_start : datagram.data_end] == payload
    assert verify_udp(packet, 20, len(packet), A, B)
    oracle = IP(packet)[UDP]
    assert (oracle.sport, oracle.dport, bytes(oracle.payload)) == (source_port, destination_port, payload)
    del oracle.chksum
    made = bytes(IP(packet[:20]) / oracle)[26:28]
    assert made == packet[26:28]


@given(st.binary(max_size=40), st.integers(0, 40))
def test_any_bytes_get_a_verdict(data: bytes, start: int) -> None:
    """Fed by the network: nothing raises."""
    assert parse_udp(data, min(start, len(data)), len(data), Datagram()) in (
        verdict.OK,
        verdict.SHORT,
        verdict.UDP_LENGTH,
    )


def test_length_must_fit() -> None:
    """Less than the header, or more than came."""
    packet = bytearray(build_udp(A, B, 1, 2, b"data"))
    for length in (0, 7, 13):
        packet[24:26] = length.to_bytes(2, "big")
        assert parse_udp(bytes(packet), 20, len(packet), Datagram()) == verdict.UDP_LENGTH


def test_no_checksum_is_allowed_in_version_4_only() -> None:
    """RFC 768 and RFC 8200 8.1."""
    packet = bytearray(build_udp(A, B, 1, 2, b"data"))
    packet[26:28] = b"\0\0"
    assert verify_udp(bytes(packet), 20, len(packet), A, B)

    packet = bytearray(build_udp(bytes(16), bytes(16), 1, 2, b"data"))
    assert verify_udp(bytes(packet), 40, len(packet), bytes(16), bytes(16))
    packet[46:48] = b"\0\0"
    assert not verify_udp(bytes(packet), 40, len(packet), bytes(16), bytes(16))
