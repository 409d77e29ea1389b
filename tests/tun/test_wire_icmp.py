"""ICMP: replies and errors as scapy reads them, quotations with care."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP  # noqa: TID251 - an oracle

from tun.errors import BadPacket
from tun.wire import icmp
from tun.wire.checksum import sum16
from tun.wire.tcp import ACK, build_tcp

A = b"\x0a\x6b\x00\x01"
B = b"\x0a\x6b\x00\x02"


@given(st.integers(0, 65535), st.integers(0, 65535), st.binary(max_size=300))
def test_echo_is_answered_with_the_same_data(identifier: int, number: int, data: bytes) -> None:
    """RFC 1122 3.2.2.6."""
    request = bytes(IP(src="10.107.0.1", dst="10.107.0.2") / ICMP(id=identifier, seq=number) / data)
    assert icmp.verify_icmp(request, 20, len(request))

    reply = IP(bytes(icmp.build_echo_reply(B, A, request[20:])))

    assert (reply.src, reply.dst) == ("10.107.0.2", "10.107.0.1")
    assert (reply[ICMP].type, reply[ICMP].code) == (0, 0)
    assert (reply[ICMP].id, reply[ICMP].seq, bytes(reply[ICMP].payload)) == (identifier, number, data)
    assert sum16(bytes(reply)[20:]) == 0xFFFF


@given(st.binary(min_size=8, max_size=2000), st.sampled_from([1, 2, 3, 4]))
@pytest.mark.rule(10)
def test_error_quotes_what_fits(quoted: bytes, code: int) -> None:
    """At most 576 bytes in all (RFC 1812 4.3.2.3), never more than came: no amplifier."""
    packet = bytes(icmp.build_error(icmp.UNREACHABLE, code, B, A, quoted))
    oracle = IP(packet)

    assert (oracle[ICMP].type, oracle[ICMP].code) == (3, code)
    assert len(packet) <= 576
    assert packet[28:] == quoted[:548]
    assert sum16(packet[20:]) == 0xFFFF


@given(st.binary(max_size=100))
def test_any_quotation_is_read_or_refused(data: bytes) -> None:
    """BadPacket is the only thing it raises."""
    with suppress(BadPacket):
        icmp.parse_quoted_tcp(data, 0, len(data))


def test_quotation_of_our_segment_is_read() -> None:
    """Addresses, ports, number and the size that would fit."""
    segment = build_tcp(B, A, 443, 4000, seq=77, flags=ACK, payload=bytes(100))
    error = bytearray(icmp.build_error(icmp.UNREACHABLE, icmp.FRAGMENTATION_NEEDED, B, A, segment))
    error[26:28] = (1300).to_bytes(2, "big")

    quoted = icmp.parse_quoted_tcp(bytes(error), 20, len(error))

    assert (quoted.source, quoted.source_port) == (B, 443)
    assert (quoted.destination, quoted.destination_port) == (A, 4000)
    assert (quoted.seq, quoted.mtu) == (77, 1300)


@pytest.mark.parametrize("length", [0, 7, 8, 27, 28, 35])
def test_short_quotations_are_refused(length: int) -> None:
    """Each border."""
    error = bytes(icmp.build_error(3, 4, B, A, build_tcp(B, A, 1, 2, seq=3, flags=ACK)))[20 : 20 + length]
    with pytest.raises(BadPacket):
        icmp.parse_quoted_tcp(error, 0, len(error))
