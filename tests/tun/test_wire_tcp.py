"""TCP segments: options in bounds, resets in the exact form, everything as scapy reads it."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP  # noqa: TID251 - an oracle

from tun.wire import tcp, verdict
from tun.wire.ipv4 import Ipv4Header, parse_ipv4
from tun.wire.tcp import ACK, FIN, PSH, RST, SYN, Segment, build_reset, build_tcp, parse_tcp, verify_tcp

A = b"\x0a\x6b\x00\x01"
B = b"\x0a\x6b\x00\x02"
PORTS = st.integers(0, 65535)
WIRE = st.integers(0, 0xFFFFFFFF)


def parsed(packet: bytes) -> Segment:
    segment = Segment()
    assert parse_tcp(packet, 20, len(packet), segment) == verdict.OK
    return segment


def raw(options: bytes, flags: int = SYN, payload: bytes = b"") -> bytes:
    """A segment with these very option bytes."""
    return bytes(
        build_tcp(A, B, 1, 2, seq=3, ack=4, flags=flags, options=options + bytes(-len(options) % 4), payload=payload)
    )


@given(
    PORTS,
    PORTS,
    WIRE,
    WIRE,
    st.integers(0, 0x3F),
    st.integers(0, 65535),
    st.integers(-1, 65535),
    st.integers(-1, 255),
    st.booleans(),
    st.none() | st.tuples(WIRE, WIRE),
    st.binary(max_size=60),
)
def test_what_is_built_is_read(
    source_port: int,
    destination_port: int,
    seq: int,
    ack: int,
    flags: int,
    window: int,
    mss: int,
    window_scale: int,
    sack_permitted: bool,
    timestamp: tuple[int, int] | None,
    payload: bytes,
) -> None:
    """By us and by scapy, checksum and every option included."""
    extra = tcp.options(mss=mss, window_scale=window_scale, sack_permitted=sack_permitted, timestamp=timestamp)
    packet = bytes(
        build_tcp(
            A, B, source_port, destination_port,
            seq=seq, ack=ack, flags=flags, window=window, options=extra, payload=payload,
        )
    )  # fmt: skip
    segment = parsed(packet)
    assert (segment.source_port, segment.destination_port) == (source_port, destination_port)
    assert (segment.seq, segment.ack, segment.flags, segment.window) == (seq, ack, flags, window)
    assert packet[segment.data_start : segment.data_end] == payload
    syn = flags & SYN != 0
    assert segment.mss == (mss if syn else -1)
    assert segment.window_scale == (window_scale if syn else -1)
    assert segment.sack_permitted == (sack_permitted and syn)
    assert segment.has_timestamp == (timestamp is not None)
    if timestamp is not None:
        assert (segment.ts_value, segment.ts_echo) == timestamp
    assert verify_tcp(packet, 20, len(packet), A, B)

    oracle = IP(packet)[TCP]
    assert (oracle.sport, oracle.dport, oracle.seq, oracle.ack) == (source_port, destination_port, seq, ack)
    assert (int(oracle.flags), oracle.window, bytes(oracle.payload)) == (flags, window, payload)
    names = dict(oracle.options)
    assert names.get("MSS", -1) == mss
    assert names.get("WScale", -1) == window_scale
    assert ("SAckOK" in names) == sack_permitted
    assert names.get("Timestamp") == timestamp
    del oracle.chksum
    assert TCP(bytes(IP(packet[:20]) / oracle)[20:]).chksum == int.from_bytes(packet[36:38], "big")


@given(st.lists(st.tuples(WIRE, WIRE), min_size=1, max_size=4), st.booleans())
def test_sack_blocks_are_read(blocks: list[tuple[int, int]], stamped: bool) -> None:
    """Three with a timestamp, four without; as scapy reads them."""
    blocks = blocks[:3] if stamped else blocks
    packet = raw(tcp.options(sacks=blocks, timestamp=(1, 2) if stamped else None), ACK)
    segment = parsed(packet)

    assert segment.sack_count == len(blocks)
    assert [(segment.sacks[2 * i], segment.sacks[2 * i + 1]) for i in range(len(blocks))] == blocks
    flat = tuple(edge for block in blocks for edge in block)
    assert dict(IP(packet)[TCP].options)["SAck"] == flat


def test_too_many_options_are_refused() -> None:
    """40 bytes is what the header can hold."""
    with pytest.raises(ValueError, match="40 bytes"):
        tcp.options(timestamp=(1, 2), sacks=[(1, 2)] * 4)


@given(st.binary(max_size=80), st.integers(0, 30))
@pytest.mark.rule(14)
def test_any_bytes_get_a_verdict(data: bytes, start: int) -> None:
    """Fed by the network: nothing raises, whatever the offsets."""
    segment = Segment()
    judgement = parse_tcp(data, min(start, len(data)), len(data), segment)

    assert judgement in (verdict.OK, verdict.SHORT, verdict.TCP_OFFSET)
    if judgement == verdict.OK:
        assert start + 20 <= segment.data_start <= segment.data_end == len(data)


@given(st.binary(min_size=1, max_size=40), st.sampled_from([SYN, ACK]))
@pytest.mark.rule(15)
def test_any_options_keep_the_segment(options: bytes, flags: int) -> None:
    """RFC 9293 MUST-7: a bad option ends the options, never the segment."""
    segment = parsed(raw(options, flags, b"data"))

    assert segment.data_end - segment.data_start == 4
    assert 0 <= segment.sack_count <= 4


@pytest.mark.parametrize("kind", range(256))
@pytest.mark.rule(15)
def test_every_kind_with_every_length(kind: int) -> None:
    """No loop, no over-read (the AMNESIA:33 class): 256 x 256 headers, each within a millisecond."""
    started = time.process_time()
    for length in range(256):
        options = bytes((kind, length)) + b"\2\4\5\xb4"
        segment = parsed(raw(options))
        assert segment.data_start == segment.data_end
    assert time.process_time() - started < 0.256


@pytest.mark.parametrize(
    ("options", "mss"),
    [
        (b"\2\4\5\xb4", 1460),
        (b"\2\4\5\xb4\2\4\4\0", 1024),  # the last one wins
        (b"\2\0\5\xb4", -1),
        (b"\2\3\5\xb4", -1),
        (b"\2\5\5\xb4", -1),
        (b"\1\1\1\2", -1),
        (b"\0\2\4\5\xb4", -1),
        (b"\x22\x0a\1\2\3\4\5\6\7\x08\2\4\5\xb4", 1460),  # a TFO cookie is skipped
    ],
)
@pytest.mark.rule(15, 26)
def test_mss_is_read_with_care(options: bytes, mss: int) -> None:
    """Wrong lengths and what follows the end do not count."""
    assert parsed(raw(options)).mss == mss


@pytest.mark.rule(15)
def test_handshake_options_mean_nothing_later() -> None:
    """MSS, window scale and SACK-permitted belong to SYNs."""
    segment = parsed(raw(tcp.options(mss=1, window_scale=2, sack_permitted=True), ACK))

    assert (segment.mss, segment.window_scale, segment.sack_permitted) == (-1, -1, False)


@pytest.mark.rule(15)
@pytest.mark.parametrize("padding", [b"", b"\1", b"\1\1"])
def test_options_need_no_padding(padding: bytes) -> None:
    """What follows the usual stamp may follow at once, and its numbers are read from where they are."""
    stamp = tcp.options(timestamp=(1, 2))
    blocks = bytes([5, 18]) + b"".join(number.to_bytes(4, "big") for number in (10, 20, 30, 40))
    options = stamp + padding + blocks

    segment = parsed(raw(options + b"\0" * (-len(options) % 4), ACK))

    assert (segment.ts_value, segment.ts_echo) == (1, 2)
    assert segment.sack_count == 2
    assert segment.sacks[:4] == [10, 20, 30, 40]


def test_segment_is_refilled_completely() -> None:
    """Nothing of the last packet shines through."""
    segment = Segment()
    full = raw(tcp.options(mss=9, window_scale=2, sack_permitted=True, timestamp=(1, 2)))
    parse_tcp(full, 20, len(full), segment)
    plain = raw(b"", ACK)
    parse_tcp(plain, 20, len(plain), segment)

    assert (segment.mss, segment.window_scale, segment.sack_permitted) == (-1, -1, False)
    assert not segment.has_timestamp
    assert segment.sack_count == 0


@given(st.integers(20 * 8, 44 * 8 - 1))
@pytest.mark.rule(14)
def test_damaged_segment_fails_its_checksum(bit: int) -> None:
    """Every single bit."""
    packet = bytearray(raw(b"", ACK, b"data"))
    packet[bit // 8] ^= 1 << bit % 8

    assert not verify_tcp(bytes(packet), 20, len(packet), A, B)


@pytest.mark.parametrize(
    ("flags", "length", "answer"),
    [
        (SYN, 0, (0, 101, RST | ACK)),
        (SYN, 5, (0, 106, RST | ACK)),
        (FIN, 0, (0, 101, RST | ACK)),
        (SYN | FIN, 0, (0, 102, RST | ACK)),
        (0, 3, (0, 103, RST | ACK)),
        (ACK, 0, (7, 0, RST)),
        (ACK | FIN | PSH, 9, (7, 0, RST)),
        (SYN | ACK, 0, (7, 0, RST)),
    ],
)
@pytest.mark.rule(18)
@pytest.mark.bug("zephyr 90086")
def test_reset_has_the_form_that_is_believed(flags: int, length: int, answer: tuple[int, int, int]) -> None:
    """RFC 9293 3.10.7.1."""
    packet = bytes(build_tcp(A, B, 1000, 443, seq=100, ack=7, flags=flags, payload=bytes(length)))
    reset = bytes(build_reset(A, B, parsed(packet)))
    segment = parsed(reset)
    header = Ipv4Header()

    assert parse_ipv4(reset, 0, header) == verdict.OK
    assert (header.source, header.destination) == (B, A)
    assert (segment.source_port, segment.destination_port) == (443, 1000)
    assert (segment.seq, segment.ack, segment.flags) == answer
    assert verify_tcp(reset, 20, len(reset), B, A)


def test_version_6_is_built_too() -> None:
    """Addresses of 16 bytes choose it."""
    packet = bytes(build_tcp(b"\1" * 16, b"\2" * 16, 1, 2, seq=3, flags=SYN, payload=b"x"))

    assert packet[0] >> 4 == 6
    assert verify_tcp(packet, 40, len(packet), b"\1" * 16, b"\2" * 16)
