"""One arbitrary IPv6 packet: chains of extension headers, TCP, UDP and ICMPv6, and `Stack.handle_packet`.

As `packets` does for IPv4: a second reading of RFC 8200 must find the same end of the chain or the same verdict, the
packet counts once, and what is answered, if anything, is answered as RFC 4443 wants: never an error about an error,
about multicast, to nobody; no larger than 1280 bytes; a pointer that lies in the packet.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from fuzz.frames import ACK, FIN, RST, SYN, mend6, ones_sum, pseudo6, read_tcp6, transport_is_valid6, upper
from tun.core.stack import Flow, Stack, StackSettings
from tun.wire import verdict
from tun.wire.icmpv6 import verify_icmpv6
from tun.wire.ipv6 import Ipv6Header, parse_ipv6, walk_extensions
from tun.wire.tcp import Segment, build_tcp, parse_tcp, verify_tcp

CORPUS: Final = "packets6"
MAX_LEN: Final = 300

PREFIX: Final = b"\xfd\x00\x00\x01\x00\x02\x00\x03"
NETWORK: Final = int.from_bytes(PREFIX + bytes(8), "big")
APP: Final = PREFIX + bytes(7) + b"\x01"
ENDPOINT: Final = PREFIX + bytes(7) + b"\x02"
KEY: Final = APP + ENDPOINT + b"\x9c\x40\x01\xbb"
SETTINGS: Final = StackSettings(
    receive_buffer=32768,
    send_buffer=32768,
    small_buffer=16384,
    gateway6=APP,
    network6=NETWORK,
    mask6=((1 << 64) - 1) << 64,
)
OK: Final = "ok"

_HEADER: Final = Ipv6Header()
_SEGMENT: Final = Segment()


def run_one(data: bytes) -> None:
    """Dress the packet, read it twice, hand it in."""
    if len(data) < 3:
        return
    dress, start = data[0], (0, 4, 10, 0)[data[2] & 3]
    stack = Stack(SETTINGS, b"s" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    stack.set_udp_served({ENDPOINT: frozenset((53,))})
    flow = open_flow(stack, data[1] % 4) if data[1] % 4 and dress & 8 else None
    packet = b"\xee" * start + aim(data[3:], dress, flow)
    compare(packet, start)
    check_stack(stack, packet, start, data[2] & 4 == 4, flow)


def aim(packet: bytes, dress: int, flow: Flow | None) -> bytes:
    """Mend what the first byte says shall be mended."""
    out = bytearray(packet)
    if dress & 1 and len(out) >= 40:
        out[0] = 0x60
        struct.pack_into("!H", out, 4, len(out) - 40)
        if dress & 128 == 0:
            out[8:40] = KEY[:32]
    if dress & 2 and len(out) >= 60:
        out[6] = 6
        out[8:44] = KEY
        if flow is not None and dress & 4:
            seq, ack = struct.unpack_from("!ii", out, 44)
            numbers = (flow.rcv_nxt + (seq >> 16) & 0xFFFFFFFF, flow.snd_una + (ack >> 16) & 0xFFFFFFFF)
            struct.pack_into("!II", out, 44, *numbers)
    return mend6(bytes(out)) if dress & 16 else bytes(out)


def open_flow(stack: Stack, stage: int) -> Flow:
    """A flow: a request, established with bytes on the way, or closed by us."""

    def hand_in(seq: int, ack: int, flags: int, payload: bytes = b"") -> None:
        packet = build_tcp(
            APP, ENDPOINT, 40000, 443, seq=seq, ack=ack & 0xFFFFFFFF, flags=flags, window=1000, payload=payload
        )
        stack.handle_packet(bytes(packet), 0, True, 10.0)

    hand_in(5000, 0, SYN)
    (flow,) = stack.take_requests()
    if stage >= 2:
        stack.accept(flow, 10.0)
        stack.flush(flow, swallow, 10.0)
        hand_in(5001, flow.iss + 1, ACK, b"hello")
        flow.write(bytes(500), 10.0)
        if stage == 3:
            flow.finish(10.0)
        stack.flush(flow, swallow, 10.0)
    stack.take_touched()
    stack.take_replies()
    return flow


def swallow(_header: bytearray | memoryview, _views: Sequence[bytes | memoryview], _size: int) -> bool:
    return True


# Two readings


def compare(packet: bytes, start: int) -> None:
    raw = packet[start:]
    judgement = parse_ipv6(packet, start, _HEADER)
    whole = len(raw) >= 40 and raw[0] >> 4 == 6 and 40 + (raw[4] << 8 | raw[5]) <= len(raw)
    assert (judgement == verdict.OK) == whole
    if not whole:
        return
    raw = raw[: 40 + (raw[4] << 8 | raw[5])]
    assert _HEADER.total_length == len(raw)
    assert (_HEADER.source, _HEADER.destination, _HEADER.hop_limit) == (raw[8:24], raw[24:40], raw[7])
    judgement = walk_extensions(packet, start, _HEADER)
    expected, at, protocol, pointer = walk(raw)
    assert verdict.NAMES[judgement] == expected
    if expected == "parameter":
        assert _HEADER.problem_pointer == pointer
        return
    if expected != OK:
        return
    assert (_HEADER.header_length, _HEADER.protocol) == (at, protocol)
    if _HEADER.fragment or _HEADER.more_fragments:
        assert raw[at - 8 :][2:4] == struct.pack("!H", _HEADER.fragment | _HEADER.more_fragments) or raw[at - 5] & 6
        return
    assert _HEADER.problem_pointer == pointer
    end = start + len(raw)
    if protocol == 6 and parse_tcp(packet, start + at, end, _SEGMENT) == verdict.OK:
        assert start + at + 20 <= _SEGMENT.data_start <= _SEGMENT.data_end == end
        good = verify_tcp(packet, start + at, end, raw[8:24], raw[24:40])
        assert good == transport_is_valid6(raw, 6, at)
    elif protocol == 58:
        good = len(raw) - at >= 8 and transport_is_valid6(raw, 58, at)
        assert verify_icmpv6(packet, start + at, end, raw[8:24], raw[24:40]) == good


def walk(raw: bytes) -> tuple[str, int, int, int]:
    """RFC 8200 4 once more: the verdict's name, then end and protocol of the chain, and what a pointer would name."""
    at, kind, named = 40, raw[6], 6
    for count in range(9):
        if kind == 59:
            return "no_next_header", 0, 0, 0
        if kind not in (0, 43, 44, 60) or (kind == 0 and count):
            return OK, at, kind, named
        if count == 8 or len(raw) < at + 8:
            break
        header = raw[at : at + (8 if kind == 44 else 8 + 8 * raw[at + 1])]
        if len(raw) < at + len(header) or (kind != 44 and len(header) != 8 + 8 * header[1]):
            break
        if kind == 44:
            place = header[2] << 8 | header[3]
            if place & 0xFFF8 or place & 1:
                return OK, at + 8, header[0], 0
        elif kind == 43:
            if header[3]:
                return "parameter", 0, 0, at + 2
        else:
            name, offset = judge_options(header)
            if name != OK:
                return name, 0, 0, at + offset
        named, kind, at = at, header[0], at + len(header)
    return "extensions", 0, 0, 0


def judge_options(header: bytes) -> tuple[str, int]:
    offset = 2
    while offset < len(header):
        if header[offset] == 0:
            offset += 1
            continue
        if offset + 1 >= len(header) or offset + 2 + header[offset + 1] > len(header):
            return "ip_options", 0
        if header[offset] not in (1, 5) and header[offset] >= 0x40:
            return ("ip_options", 0) if header[offset] < 0x80 else ("parameter", offset)
        offset += 2 + header[offset + 1]
    return OK, 0


# The stack


def check_stack(stack: Stack, packet: bytes, start: int, verified: bool, flow: Flow | None) -> None:
    before = sum(stack.drops.values())
    state = look(stack, flow)

    stack.handle_packet(packet, start, verified, 10.1)

    dropped = sum(stack.drops.values()) - before
    assert dropped in (0, 1), f"counted {dropped} times: {stack.drops}"
    assert dropped or look(stack, flow) != state, "neither an effect nor a drop"
    replies = stack.take_replies()
    assert len(replies) <= 1
    raw = packet[start:]
    for reply in replies:
        check_reply(bytes(reply), raw)
    for touched in stack.take_touched():
        check_output(stack, touched)
    assert len(stack.take_datagrams()) <= 1
    assert stack.next_deadline() > 10.1


def look(stack: Stack, flow: Flow | None) -> tuple[object, ...]:
    """What an effect shows in."""
    reassembler = stack._reassembler
    shown = (
        len(stack._requests), len(stack._replies), len(stack._host.touched), len(stack._datagrams),
        reassembler.bytes_held, len(reassembler.datagrams), len(stack._table.time_wait),
    )  # fmt: skip
    return (*shown, flow._mss, flow.state) if flow is not None else shown


def check_reply(reply: bytes, raw: bytes) -> None:
    assert reply[0] >> 4 == 6
    assert 40 + (reply[4] << 8 | reply[5]) == len(reply)
    assert reply[24:40] == raw[8:24], "an answer to somebody else"
    assert reply[8:24] == raw[24:40], "an answer from somebody else"
    source = raw[8:24]
    assert source[0] != 0xFF
    assert source[:15] != bytes(15) or source[15] > 1, "an answer to nobody"
    assert source[:12] != bytes(10) + b"\xff\xff"
    assert source != ENDPOINT
    assert raw[24] != 0xFF, "an answer to multicast"
    assert transport_is_valid6(reply, reply[6], 40)
    protocol, at = upper(raw[: 40 + (raw[4] << 8 | raw[5])])
    if reply[6] == 6:
        given = read_tcp6(reply)
        assert given is not None
        assert protocol == 6
        assert not raw[at + 13] & RST, "an answer to a RST"
        assert not raw[at + 13] & FIN or len(reply) <= 72
        return
    assert reply[6] == 58
    if reply[40] == 129:
        assert protocol == 58
        assert raw[at] == 128
        assert reply[44:] == raw[at + 4 : 40 + (raw[4] << 8 | raw[5])]
        return
    assert reply[40] in (1, 3, 4)
    assert len(reply) <= min(1280, len(raw) + 48)
    assert raw.startswith(reply[48:])
    assert protocol != 58 or at >= len(raw) or raw[at] >= 128, "an error about an error"
    if reply[40] == 4:
        (pointer,) = struct.unpack_from("!I", reply, 44)
        assert pointer < 40 + (raw[4] << 8 | raw[5]), "a pointer beyond the packet"
    assert reply[8:24] == ENDPOINT or reply[40:42] == b"\x01\x03" or reply[8:16] == PREFIX


def check_output(stack: Stack, flow: Flow) -> None:
    count = 0

    def write(header: bytearray | memoryview, views: Sequence[bytes | memoryview], size: int) -> bool:
        nonlocal count
        count += 1
        head = bytes(header)
        packet = head + b"".join(views)
        assert read_tcp6(packet) is not None
        assert head[24:40] + head[8:24] + head[42:44] + head[40:42] == flow.key
        assert head[56:58] == struct.pack("!H", ones_sum(pseudo6(packet, 6, len(packet) - 40)))
        assert not size or size < len(packet) - len(head)
        return True

    assert stack.flush(flow, write, 10.1)
    assert count <= 4, f"{count} segments at once"


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
