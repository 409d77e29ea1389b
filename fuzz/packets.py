"""One arbitrary packet: the IPv4, TCP, UDP and ICMP parsers, and `Stack.handle_packet`.

The first bytes of the data choose how the rest is dressed: which checksums are mended, whether it is aimed at the flow
that is there, and in which state that flow is; so both the walls and what lies behind them are reached. Then:

* a second reading of the RFCs (here) must come to the same verdict and the same fields as the parsers;
* what is accepted and has the ordinary form is built again, byte for byte;
* the stack takes the packet without raising, and it counts once: it has an effect, or it is one drop;
* there is at most one answer, to the source, from the destination, with right checksums, no larger than what RFC 1812
  allows, never to a RST, to an ICMP error, to a fragment's tail, to nobody;
* a flow that the packet belongs to answers with few and sound segments, any other flow is untouched.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Final

from fuzz.frames import ACK, FIN, RST, SYN, header_is_valid, mend, ones_sum, pseudo, read_tcp, transport_is_valid
from tun.core.stack import Flow, Stack, StackSettings
from tun.core.states import SYN_PENDING
from tun.errors import BadPacket
from tun.wire import icmp, verdict
from tun.wire.ipv4 import Ipv4Header, build_ipv4, parse_ipv4
from tun.wire.ipv6 import Ipv6Header, parse_ipv6
from tun.wire.tcp import Segment, build_tcp, parse_tcp, verify_tcp
from tun.wire.udp import Datagram, build_udp, parse_udp, verify_udp

CORPUS: Final = "packets"
MAX_LEN: Final = 256

APP: Final = b"\x0a\x6b\x00\x01"
ENDPOINT: Final = b"\x0a\x6b\x00\x02"
KEY: Final = APP + ENDPOINT + b"\x9c\x40\x01\xbb"
OTHER: Final = APP + ENDPOINT + b"\x9c\x41\x01\xbb"
SETTINGS: Final = StackSettings(receive_buffer=32768, send_buffer=32768, small_buffer=16384)
SERVED: Final = {ENDPOINT: frozenset((443,))}
STAGES: Final = 6  # no flow, a request, half-open, established, closed by us, TIME-WAIT

_IP: Final = Ipv4Header()
_IP6: Final = Ipv6Header()
_SEGMENT: Final = Segment()
_DATAGRAM: Final = Datagram()


def run_one(data: bytes) -> None:
    """Dress the packet, read it twice, hand it in."""
    if len(data) < 3:
        return
    dress, stage, prefix = data[0], data[1] % STAGES, (0, 4, 10, 0)[data[2] & 3]
    stack, flow, other = prepare(stage) if dress & 8 else (new_stack(), None, None)
    packet = aim(data[3:], dress, flow)
    start = prefix if len(packet) + prefix else 0
    dressed = b"\xee" * prefix + packet
    compare(dressed, start)
    check_stack(stack, dressed, start, data[2] & 4 == 4, flow, other)


def aim(packet: bytes, dress: int, flow: Flow | None) -> bytes:
    """Mend what the first byte says shall be mended."""
    out = bytearray(packet)
    if dress & 1 and len(out) >= 20:  # a header that may pass
        out[0] = 0x45 if dress & 128 else 0x40 | (out[0] & 15)
        struct.pack_into("!H", out, 2, len(out) & 0xFFFF)
        out[6:8] = b"\x40\0"
        if not dress & 128:
            out[12:20] = KEY[:8]
    if dress & 2 and len(out) >= 40:  # TCP, for the flow that is there
        out[9] = 6
        out[12:24] = KEY
        if flow is not None and dress & 4:
            seq, ack = struct.unpack_from("!ii", out, 24)
            struct.pack_into(
                "!II", out, 24, flow.rcv_nxt + (seq >> 16) & 0xFFFFFFFF, flow.snd_una + (ack >> 16) & 0xFFFFFFFF
            )
    if dress & 16:
        return mend(bytes(out), ip=True, transport=dress & 32 == 0)
    return bytes(out)


# Two readings


def compare(packet: bytes, start: int) -> None:
    """What the parsers say is what the RFCs say."""
    judgement = parse_ipv4(packet, start, _IP)
    expected = read_ipv4(packet[start:])
    if expected is None:
        assert judgement != verdict.OK, "a header accepted that is none"
        assert 0 < judgement < len(verdict.NAMES)
        parse_ipv6(packet, start, _IP6)
        return
    header_length, total, identification, fragment, ttl, protocol, source, destination = expected
    assert judgement == verdict.OK, verdict.NAMES[judgement]
    assert _IP.header_length == header_length
    assert _IP.total_length == total
    assert _IP.identification == identification
    assert _IP.fragment == (fragment & 0x1FFF) * 8
    assert _IP.more_fragments == bool(fragment & 0x2000)
    assert (_IP.ttl, _IP.protocol, _IP.source, _IP.destination) == (ttl, protocol, source, destination)
    at, end = start + header_length, start + total
    assert start + 20 <= at <= end <= len(packet)
    whole = packet[start:end]
    if protocol == 6:
        compare_tcp(packet, at, end, whole)
    elif protocol == 17:
        compare_udp(packet, at, end, whole)
    elif protocol == 1:
        compare_icmp(packet, at, end, whole)
    if header_length == 20 and whole[1] == 0:
        built = build_ipv4(
            source, destination, protocol, total - 20, identification=identification, fragment=fragment, ttl=ttl
        )
        assert bytes(built[:10] + built[12:]) == whole[:10] + whole[12:20]
        assert built[10:12] == whole[10:12] or whole[10:12] in (b"\xff\xff", b"\0\0")


def read_ipv4(packet: bytes) -> tuple[int, int, int, int, int, int, bytes, bytes] | None:
    """RFC 791 once more; None for what a host throws away."""
    if len(packet) < 20 or packet[0] & 0xF0 != 0x40:
        return None
    length = (packet[0] & 15) * 4
    total = packet[2] * 256 + packet[3]
    if length < 20 or length > len(packet) or not length <= total <= len(packet):
        return None
    if ones_sum(packet[:length]) != 0xFFFF:
        return None
    options = packet[20:length]
    while options and options[0] != 0:
        if options[0] == 1:
            options = options[1:]
        elif len(options) < 2 or not 2 <= options[1] <= len(options) or options[0] in (131, 137):
            return None
        else:
            options = options[options[1] :]
    identification, fragment = struct.unpack_from("!HH", packet, 4)
    return length, total, identification, fragment, packet[8], packet[9], packet[12:16], packet[16:20]


def compare_tcp(packet: bytes, at: int, end: int, whole: bytes) -> None:
    frame = read_tcp(whole)
    judgement = parse_tcp(packet, at, end, _SEGMENT)
    if frame is None:
        assert judgement != verdict.OK
        return
    assert judgement == verdict.OK
    segment = _SEGMENT
    assert (segment.source_port, segment.destination_port) == (frame.source_port, frame.destination_port)
    assert (segment.seq, segment.ack, segment.flags, segment.window) == (
        frame.seq,
        frame.ack,
        frame.flags,
        frame.window,
    )
    assert at + 20 <= segment.data_start <= segment.data_end == end
    assert packet[segment.data_start : segment.data_end] == frame.payload
    compare_options(frame.options, frame.flags & SYN != 0, segment)
    good = transport_is_valid(whole)
    assert verify_tcp(packet, at, end, whole[12:16], whole[16:20]) == good
    if good and not whole[at - at + (whole[0] & 15) * 4 + 12] & 15 and not whole[(whole[0] & 15) * 4 + 13] & 0xC0:
        raw = whole[(whole[0] & 15) * 4 :]
        built = build_tcp(
            frame.source, frame.destination, frame.source_port, frame.destination_port,
            seq=frame.seq, ack=frame.ack, flags=frame.flags, window=frame.window,
            options=frame.options, payload=frame.payload, urgent=raw[18] << 8 | raw[19],
        )  # fmt: skip
        assert bytes(built[20:36] + built[38:]) == raw[:16] + raw[18:]
        assert built[36:38] == raw[16:18] or raw[16:18] in (b"\xff\xff", b"\0\0")


def compare_options(options: bytes, syn: bool, segment: Segment) -> None:
    """RFC 9293 3.1 once more: the last of equal options counts, the first that is broken ends them."""
    mss = scale = -1
    permitted = False
    stamp: tuple[int, int] | None = None
    sacks: list[int] = []
    while options and options[0] != 0:
        kind = options[0]
        if kind == 1:
            options = options[1:]
            continue
        if len(options) < 2 or not 2 <= options[1] <= len(options):
            break
        value, options = options[2 : options[1]], options[options[1] :]
        if kind == 8 and len(value) == 8:
            stamp = struct.unpack("!II", value)
        elif kind == 5 and not syn and len(value) % 8 == 0:
            sacks = list(struct.unpack(f"!{len(value) // 4}I", value))
        elif syn and kind == 2 and len(value) == 2:
            mss = value[0] << 8 | value[1]
        elif syn and kind == 3 and len(value) == 1:
            scale = value[0]
        elif syn and kind == 4 and not value:
            permitted = True
    assert (segment.mss, segment.window_scale, segment.sack_permitted) == (mss, scale, permitted)
    assert segment.has_timestamp == (stamp is not None)
    if stamp is not None:
        assert (segment.ts_value, segment.ts_echo) == stamp
    assert segment.sack_count * 2 == len(sacks)
    assert segment.sacks[: len(sacks)] == sacks
    assert len(segment.sacks) == 8


def compare_udp(packet: bytes, at: int, end: int, whole: bytes) -> None:
    raw = whole[at - end :] if at < end else b""
    judgement = parse_udp(packet, at, end, _DATAGRAM)
    length = raw[4] << 8 | raw[5] if len(raw) >= 8 else 0
    if length < 8 or length > len(raw):
        assert judgement != verdict.OK
        return
    assert judgement == verdict.OK
    assert _DATAGRAM.data_end == at + length
    assert packet[_DATAGRAM.data_start : _DATAGRAM.data_end] == raw[8:length]
    good = raw[6:8] == b"\0\0" or ones_sum(pseudo(whole, 17, length) + raw[:length]) == 0xFFFF
    assert verify_udp(packet, at, _DATAGRAM.data_end, whole[12:16], whole[16:20]) == good
    if good and raw[6:8] != b"\0\0":
        built = build_udp(whole[12:16], whole[16:20], _DATAGRAM.source_port, _DATAGRAM.destination_port, raw[8:length])
        assert built[20:] == raw[:length]


def compare_icmp(packet: bytes, at: int, end: int, whole: bytes) -> None:
    raw = whole[at - end :] if at < end else b""
    good = len(raw) >= 8 and ones_sum(raw) == 0xFFFF
    assert icmp.verify_icmp(packet, at, end) == good
    try:
        quoted = icmp.parse_quoted_tcp(packet, at, end)
    except BadPacket:
        return
    inner = raw[8:]
    transport = (inner[0] & 15) * 4
    assert inner[9] == 6
    assert quoted.source == inner[12:16]
    assert quoted.destination == inner[16:20]
    ports_and_seq = (quoted.source_port, quoted.destination_port, quoted.seq)
    assert ports_and_seq == struct.unpack_from("!HHI", inner, transport)
    assert quoted.mtu == raw[6] << 8 | raw[7]


# The stack


def new_stack() -> Stack:
    """Nobody is there, one endpoint is served."""
    stack = Stack(SETTINGS, b"s" * 32)
    stack.set_served(SERVED)
    return stack


def prepare(stage: int) -> tuple[Stack, Flow | None, Flow | None]:
    """A stack with a flow in some state, and another one beside it that nobody talks to."""
    stack = new_stack()
    other = open_flow(stack, OTHER, 2)
    flow = open_flow(stack, KEY, stage) if stage else None
    stack.take_touched()
    stack.take_replies()
    return stack, flow, other


def open_flow(stack: Stack, key: bytes, stage: int) -> Flow:
    def hand_in(seq: int, ack: int, flags: int, payload: bytes = b"", options: bytes = b"") -> None:
        packet = segment(key, seq, ack & 0xFFFFFFFF, flags, payload, options)
        stack.handle_packet(packet, 0, True, 10.0)
        for touched in stack.take_touched():
            stack.flush(touched, swallow, 10.0)

    hand_in(5000, 0, SYN, options=b"\x02\x04\x05\xb4\x01\x03\x03\x07\x04\x02\x01\x01")
    (flow,) = stack.take_requests()
    if stage == 1:
        return flow
    stack.accept(flow, 10.0)
    stack.flush(flow, swallow, 10.0)
    if stage == 2:
        return flow
    hand_in(5001, flow.iss + 1, ACK, b"hello")
    hand_in(5100, flow.iss + 1, ACK, b"a gap before this")
    flow.write(bytes(3000), 10.0)
    stack.flush(flow, swallow, 10.0)
    if stage == 3:
        return flow
    flow.finish(10.0)
    stack.flush(flow, swallow, 10.0)
    if stage == 5:
        hand_in(5006, flow.snd_nxt, ACK, bytes(100))
        flow.consume(flow.readable_bytes, 10.0)
        hand_in(flow.rcv_nxt & 0xFFFFFFFF, flow.snd_nxt, FIN | ACK)
    return flow


@lru_cache(maxsize=64)
def segment(key: bytes, seq: int, ack: int, flags: int, payload: bytes, options: bytes) -> bytes:
    """A segment of the app; the few that open a flow are the same each time, our own numbers too."""
    port = key[8] << 8 | key[9]
    return bytes(
        build_tcp(
            APP, ENDPOINT, port, 443, seq=seq, ack=ack, flags=flags, window=1000, options=options, payload=payload
        )
    )


def swallow(_header: bytearray | memoryview, _views: Sequence[bytes | memoryview], _size: int) -> bool:
    return True


def check_stack(stack: Stack, packet: bytes, start: int, verified: bool, flow: Flow | None, other: Flow | None) -> None:
    """Hand the packet in and see what came of it."""
    before = sum(stack.drops.values())
    state = look(stack, flow)
    beside = look_at(other) if other is not None else ()
    packets = stack.packets

    stack.handle_packet(packet, start, verified, 10.1)

    assert stack.packets == packets + 1
    dropped = sum(stack.drops.values()) - before
    assert dropped in (0, 1), f"counted {dropped} times: {stack.drops}"
    assert dropped or look(stack, flow) != state, "neither an effect nor a drop"
    requests = stack.take_requests()
    assert len(requests) <= 1
    replies = stack.take_replies()
    assert len(replies) <= 1, "more than one answer"
    raw = packet[start:]
    for reply in replies:
        if raw[0] >> 4 == 4:
            check_reply(bytes(reply), raw)
        else:
            assert reply[24:40] == raw[8:24], "an answer to somebody else"
    touched = stack.take_touched()
    if other is not None and not names(raw, other):
        assert look_at(other) == beside, "another flow has changed"
    for each in touched:
        check_output(stack, each)
    assert stack.flow_count <= 3
    assert stack.buffered_bytes >= 0
    assert stack.next_deadline() > 10.1
    assert all(request.state == SYN_PENDING for request in requests)


def look(stack: Stack, flow: Flow | None) -> tuple[object, ...]:
    """What an effect shows in."""
    reassembler = stack._reassembler
    return (
        len(stack._requests), len(stack._replies), len(stack._host.touched), reassembler.bytes_held,
        len(reassembler.datagrams), look_at(flow) if flow is not None else (), len(stack._table.time_wait),
    )  # fmt: skip


def look_at(flow: Flow) -> tuple[object, ...]:
    return (
        flow.state, flow.closed, flow.failure, flow.rcv_nxt, flow.rcv_edge, flow.snd_una, flow.snd_nxt, flow.snd_edge,
        flow.readable_bytes, flow._mss, flow.touched,
    )  # fmt: skip


def names(raw: bytes, flow: Flow) -> bool:
    """Whether a packet may concern this flow: by its own numbers, or by those of a segment that it quotes."""
    at = (raw[0] & 15) * 4 if raw else 0
    own = raw[12:20] + raw[at : at + 4]
    inner = raw[at + 8 :]
    deep = (inner[0] & 15) * 4 if inner else 0
    quoted = inner[16:20] + inner[12:16] + inner[deep + 2 : deep + 4] + inner[deep : deep + 2]
    return flow.key in (own, quoted)


def check_reply(reply: bytes, raw: bytes) -> None:
    """The answer to a packet that belongs to no flow, or to one in TIME-WAIT."""
    assert header_is_valid(reply)
    assert transport_is_valid(reply)
    assert reply[2] << 8 | reply[3] == len(reply)
    assert reply[16:20] == raw[12:16], "an answer to somebody else"
    assert reply[12:16] == raw[16:20], "an answer from somebody else"
    first = raw[12]
    assert first not in (0, 127), "an answer to nobody"
    assert first < 224, "an answer to many"
    assert raw[12:16] not in (b"\x0a\x6b\0\0", b"\x0a\x6b\xff\xff", ENDPOINT)
    assert raw[16:20] == ENDPOINT or reply[20:22] == bytes((3, 1)), "an answer from where nobody is"
    header = (raw[0] & 15) * 4
    if reply[9] == 6:
        answered = read_tcp(raw)
        given = read_tcp(reply)
        assert answered is not None
        assert given is not None
        assert not answered.flags & RST, "an answer to a RST"
        assert len(reply) <= 52
        if given.flags & RST:
            right = (
                given.seq == answered.ack
                if answered.flags & ACK
                else given.ack == (answered.seq + answered.length) & 0xFFFFFFFF
            )
            assert right, "a RST that no kernel believes"
        return
    assert reply[9] == 1
    if reply[20] == 0:
        assert raw[header] == 8
        assert len(reply) == 20 + (raw[2] << 8 | raw[3]) - header, "an echo of another size"
        assert reply[24:] == raw[header + 4 : raw[2] << 8 | raw[3]]
    else:
        assert reply[20] in (3, 11)
        assert len(reply) <= min(576, len(raw) + 28), "a large error"
        assert raw.startswith(reply[28:]), "another packet quoted"
        assert len(reply) - 28 >= min(header + 8, raw[2] << 8 | raw[3])
        if raw[9] == 1:
            assert raw[header] in icmp.INFORMATIONAL, "an error about an error"


def check_output(stack: Stack, flow: Flow) -> None:
    """What a flow says to it."""
    count = 0
    allowed = 8 if flow._recovery else 4

    def write(header: bytearray | memoryview, views: Sequence[bytes | memoryview], size: int) -> bool:
        nonlocal count
        count += 1
        head = bytes(header)
        payload = b"".join(views)
        packet = mend(head + payload, ip=False)
        frame = read_tcp(packet)
        assert frame is not None
        assert header_is_valid(head)
        assert head[36:38] == struct.pack("!H", ones_sum(pseudo(packet, 6, len(packet) - 20)))
        assert (
            frame.destination + frame.source + struct.pack("!HH", frame.destination_port, frame.source_port) == flow.key
        )
        assert not size or size < len(payload)
        return True

    assert stack.flush(flow, write, 10.1)
    assert count <= allowed, f"{count} segments at once"


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
