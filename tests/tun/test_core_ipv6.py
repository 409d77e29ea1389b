"""The host over IPv6: what scapy builds is answered as the RFCs say, and read back by scapy."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import TCP, UDP  # noqa: TID251 - an oracle
from scapy.layers.inet6 import (  # noqa: TID251 - an oracle
    HBHOptUnknown,
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_RS,
    ICMPv6PacketTooBig,
    ICMPv6ParamProblem,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    fragment6,
)
from scapy.packet import Packet, Raw  # noqa: TID251 - an oracle
from trio.testing import MockClock

from tun.core.stack import Flow, ReceivedDatagram, Stack, StackSettings
from tun.device.base import check_packet
from tun.network import FlowRequest, Network
from tun.testing.apppeer import AppHost, address_bytes
from tun.testing.memory import memory_pair
from tun.wire import verdict
from tun.wire.checksum import complete, internet_checksum
from tun.wire.ipv6 import Ipv6Header, parse_ipv6, walk_extensions
from tun.wire.tcp import SYN, build_tcp
from tun.wire.udp import build_udp

APP, ENDPOINT, NOBODY = "fd12:3456:789a::a6b:1", "fd12:3456:789a::a6b:2", "fd12:3456:789a::a6b:63"
SETTINGS = StackSettings(
    gateway6=address_bytes("fd12:3456:789a::1"),
    network6=int.from_bytes(address_bytes("fd12:3456:789a::")),
    mask6=((1 << 128) - 1) ^ ((1 << 64) - 1),
)


@pytest.fixture
def stack() -> Stack:
    stack = Stack(SETTINGS, b"k" * 32)
    stack.set_served({address_bytes(ENDPOINT): frozenset((443,))})
    return stack


def give(stack: Stack, packet: Packet | bytes, now: float = 1.0) -> list[Packet]:
    """Hand a packet in, without the device's word for it; return the replies, judged by scapy."""
    stack.handle_packet(bytes(packet), 0, False, now)
    return [judged(bytes(reply)) for reply in stack.take_replies()]


def judged(raw: bytes) -> Packet:
    """The packet as scapy reads it; its length and checksum are what scapy would have made of it."""
    packet = IPv6(raw)
    again = IPv6(raw)
    del again.plen
    for layer in (TCP, UDP, ICMPv6DestUnreach, ICMPv6EchoReply, ICMPv6ParamProblem, ICMPv6TimeExceeded):
        if type(again.payload) is layer:
            again.payload.delfieldval("chksum" if layer in (TCP, UDP) else "cksum")
    assert bytes(again)[:60] == raw[:60]
    return packet


def ip(destination: str = ENDPOINT, source: str = APP, **fields: Any) -> Packet:
    return IPv6(src=source, dst=destination, **fields)


def syn(port: int = 443, **options: Any) -> Packet:
    return TCP(sport=4000, dport=port, seq=7, flags="S", window=65535, **options)


def cut(packet: Packet) -> list[Packet]:
    """Fragments for a link of 1280 bytes."""
    return list(fragment6(packet, 1280))  # type: ignore[no-untyped-call]  # scapy's


class Wire:
    """Collects what a flow sends."""

    def __init__(self) -> None:
        self.sent: list[tuple[Packet, int]] = []

    def __call__(self, header: bytearray | memoryview, views: Sequence[bytes | memoryview], gso_size: int) -> bool:
        packet = bytearray(header)
        complete(packet, 40, 56, views)
        self.sent.append((judged(bytes(packet) + b"".join(views)), gso_size))
        return True


def opened(stack: Stack, *, mss: int | None = 1440, stamps: bool = False) -> tuple[Flow, Wire, int]:
    """An accepted flow after its handshake. Returns it, what it sent, and our initial sequence number."""
    options: list[tuple[str, object]] = [] if mss is None else [("MSS", mss)]
    if stamps:
        options.append(("Timestamp", (100, 0)))
    give(stack, ip() / syn(options=options))
    (flow,) = stack.take_requests()
    stack.accept(flow, 1.0)
    wire = Wire()
    stack.flush(flow, wire, 1.0)
    ours: int = wire.sent[0][0][TCP].seq
    more = [("NOP", None), ("NOP", None), ("Timestamp", (101, 0))] if stamps else []
    give(stack, ip() / TCP(sport=4000, dport=443, seq=8, ack=ours + 1, flags="A", window=65535, options=more))
    return flow, wire, ours


# -- TCP --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stamps", [False, True])
def test_a_connection_opens_carries_bytes_and_ends(stack: Stack, stamps: bool) -> None:
    """The same machine as over IPv4, under another header: checksums, lengths, sizes of segments."""
    flow, wire, ours = opened(stack, stamps=stamps)
    answer = wire.sent[0][0]
    assert (answer.src, answer.dst, answer.nh, answer.hlim) == (ENDPOINT, APP, 6, 64)
    assert answer[TCP].flags == "SA"
    assert dict(answer[TCP].options)["MSS"] == 1440  # 1500 less 60
    assert len(flow.key) == 36

    more = [("NOP", None), ("NOP", None), ("Timestamp", (102, 0))] if stamps else []
    segment = TCP(sport=4000, dport=443, seq=8, ack=ours + 1, flags="PA", window=65535, options=more)
    give(stack, ip() / segment / Raw(b"question"))
    assert b"".join(flow.readable_views()) == b"question"
    flow.consume(8, 1.0)
    flow.write(b"a" * 5000, 1.0)
    stack.flush(flow, wire, 1.0)

    packet, gso_size = wire.sent[-1]
    assert bytes(packet[Raw]) == b"a" * 5000
    assert gso_size == (1428 if stamps else 1440)
    assert packet[TCP].ack == 16
    assert packet.plen == 5000 + (32 if stamps else 20)

    flow.abort(1.0)
    stack.flush(flow, wire, 1.0)
    assert wire.sent[-1][0][TCP].flags == "RA"


@pytest.mark.rule(22)
def test_an_app_that_names_no_mss_gets_the_least_of_the_version(stack: Stack) -> None:
    """RFC 9293 MUST-15: 1220 over IPv6."""
    flow, wire, _ = opened(stack, mss=None)
    flow.write(b"a" * 3000, 1.0)
    stack.flush(flow, wire, 1.0)

    assert wire.sent[-1][1] == 1220


def test_both_versions_are_served_at_once(stack: Stack) -> None:
    """Keys of 12 and of 36 bytes live in one table."""
    stack.set_served({address_bytes(ENDPOINT): frozenset((443,)), b"\x0a\x6b\0\2": frozenset((443,))})
    opened(stack)
    stack.handle_packet(bytes(build_tcp(b"\x0a\x6b\0\1", b"\x0a\x6b\0\2", 4000, 443, seq=7, flags=SYN)), 0, False, 1.0)

    assert [len(flow.key) for flow in stack.flows.values()] == [36, 12]


@pytest.mark.rule(18)
def test_a_port_that_is_not_served_is_refused_in_the_exact_form(stack: Stack) -> None:
    """RST with ACK of the SYN: the only form that Linux believes."""
    (reply,) = give(stack, ip() / syn(80))

    assert (reply.src, reply.dst) == (ENDPOINT, APP)
    assert (reply[TCP].flags, reply[TCP].seq, reply[TCP].ack) == ("RA", 0, 8)


def test_a_refused_request_is_told(stack: Stack) -> None:
    give(stack, ip() / syn())
    (flow,) = stack.take_requests()
    stack.refuse(flow, 1.0)

    (reply,) = map(judged, map(bytes, stack.take_replies()))
    assert (reply[TCP].flags, reply[TCP].ack) == ("RA", 8)


@pytest.mark.rule(14)
def test_a_wrong_checksum_is_silence(stack: Stack) -> None:
    packet = bytearray(bytes(ip() / syn()))
    packet[56] ^= 1

    assert give(stack, bytes(packet)) == []
    assert stack.drops == {"tcp_checksum": 1}


@pytest.mark.rule(12)
def test_too_big_makes_segments_smaller_but_not_below_the_least_link(stack: Stack) -> None:
    """RFC 8201, RFC 5927 4.1: about bytes in flight only, and 1280 is the floor."""
    flow, wire, _ = opened(stack)
    flow.write(b"a" * 4000, 1.0)
    stack.flush(flow, wire, 1.0)
    quoted = bytes(wire.sent[-1][0])[:1200]

    give(stack, ip() / ICMPv6PacketTooBig(mtu=600) / Raw(quoted))
    flow.write(b"b" * 4000, 1.0)
    stack.flush(flow, wire, 1.0)
    assert wire.sent[-1][1] == 1220
    assert stack.drops == {}

    give(stack, ip() / ICMPv6PacketTooBig(mtu=1400) / Raw(quoted))  # never larger again
    give(stack, ip() / ICMPv6DestUnreach(code=3) / Raw(quoted))  # a soft error
    assert stack.drops == {"icmp": 2}
    assert not flow.closed


# -- ICMPv6, UDP ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 56, 1400, 60000])
@pytest.mark.rule(9)
def test_echo_comes_back_unchanged(stack: Stack, size: int) -> None:
    """RFC 4443 4.2: identifier, sequence and data."""
    (reply,) = give(stack, ip() / ICMPv6EchoRequest(id=0x1234, seq=3, data=b"p" * size))

    assert (reply.src, reply.dst) == (ENDPOINT, APP)
    assert type(reply.payload) is ICMPv6EchoReply
    assert (reply[ICMPv6EchoReply].id, reply[ICMPv6EchoReply].seq) == (0x1234, 3)
    assert bytes(reply[ICMPv6EchoReply].data) == b"p" * size


@pytest.mark.rule(6)
def test_echo_in_fragments_comes_back_whole(stack: Stack) -> None:
    packet = ip() / IPv6ExtHdrFragment(id=77) / ICMPv6EchoRequest(id=1, data=bytes(range(256)) * 20)
    pieces = cut(packet)
    assert len(pieces) > 3

    replies = [reply for piece in reversed(pieces) for reply in give(stack, piece)]
    assert [bytes(reply[ICMPv6EchoReply].data) for reply in replies] == [bytes(range(256)) * 20]


@pytest.mark.parametrize(("size", "answers"), [(65495, 1), (65527, 1), (65528, 0)])
@pytest.mark.rule(6, 9)
def test_the_largest_echo_is_answered(stack: Stack, size: int, answers: int) -> None:
    """65535 bytes behind the header, which is not counted (RFC 8200 3): devices take a packet that long."""
    message = bytes(ICMPv6EchoRequest(id=1, data=bytes(size)))
    pseudo = struct.pack("!16s16sII", address_bytes(APP), address_bytes(ENDPOINT), len(message), 58)
    message = message[:2] + bytes(2) + message[4:]
    checksum = internet_checksum(pseudo + message)
    message = message[:2] + checksum.to_bytes(2, "big") + message[4:]
    for offset in range(0, len(message), 1448):
        more = offset + 1448 < len(message)
        piece = message[offset : offset + 1448]
        packet = bytes(ip() / IPv6ExtHdrFragment(id=77, nh=58, offset=offset // 8, m=more) / Raw(piece))
        stack.handle_packet(packet, 0, False, 1.0)

    replies = stack.take_replies()
    for reply in replies:
        check_packet(reply)
        assert bytes(reply[48:]) == bytes(size)
    assert len(replies) == answers


@pytest.mark.rule(6)
@pytest.mark.scenario("ipv6_fragment_icmp_error")
def test_an_echo_that_stays_in_parts_is_told(stack: Stack) -> None:
    """RFC 4443 3.3: time exceeded, code 1, when the first fragment had come."""
    packet = ip() / IPv6ExtHdrFragment(id=77) / ICMPv6EchoRequest(id=1, data=bytes(4000))
    give(stack, cut(packet)[0])
    stack.handle_timeout(1.0 + 30.0)

    (reply,) = map(judged, map(bytes, stack.take_replies()))
    assert (reply.src, reply.dst, reply[ICMPv6TimeExceeded].code) == (ENDPOINT, APP, 1)


@pytest.mark.rule(6)
def test_tcp_in_fragments_is_dropped(stack: Stack) -> None:
    """The local kernel cuts no segment; whoever does wants something else."""
    segment = syn(options=[("MSS", 1440)]) / Raw(bytes(4000))
    for piece in cut(ip() / IPv6ExtHdrFragment(id=77) / segment):
        assert give(stack, piece) == []

    assert set(stack.drops) == {"fragment"}
    assert stack.take_requests() == []


def test_a_fragment_that_is_the_whole_packet_is_none(stack: Stack) -> None:
    """RFC 6946: "atomic" fragments are ordinary packets."""
    give(stack, ip() / IPv6ExtHdrFragment(offset=0, m=0, id=5, nh=6) / syn())

    assert len(stack.take_requests()) == 1


@pytest.mark.rule(10)
def test_a_port_without_a_service_is_unreachable(stack: Stack) -> None:
    """ICMPv6 1/4, quoting as much as fits into 1280 bytes (RFC 4443 3.1)."""
    packet = ip() / UDP(sport=1, dport=2) / Raw(bytes(1400))
    (reply,) = give(stack, packet)

    assert (reply.src, reply.dst, reply[ICMPv6DestUnreach].code) == (ENDPOINT, APP, 4)
    assert len(reply) == 1280
    assert bytes(reply)[48:] == bytes(packet)[:1232]


@pytest.mark.parametrize("payload", [syn(), UDP(sport=1, dport=2) / Raw(b"x"), ICMPv6EchoRequest()])
@pytest.mark.rule(3)
def test_nobodys_address_is_unreachable(stack: Stack, payload: Packet) -> None:
    """ICMPv6 1/3 at once; silence would cost the app two minutes."""
    (reply,) = give(stack, ip(NOBODY) / payload)

    assert (reply.src, reply.dst, reply[ICMPv6DestUnreach].code) == (NOBODY, APP, 3)
    assert stack.drops == {"no_host": 1}


def test_udp_without_a_checksum_is_dropped(stack: Stack) -> None:
    """RFC 8200 8.1: over IPv6 it is never optional."""
    assert give(stack, ip() / UDP(sport=1, dport=2, chksum=0) / Raw(b"x")) == []
    assert stack.drops == {"udp_checksum": 1}


@pytest.mark.parametrize("kind", [1, 2, 3, 4, 100])
@pytest.mark.rule(11)
def test_no_error_about_an_error(stack: Stack, kind: int) -> None:
    """RFC 4443 2.4 (e.1), also for an address that nobody has."""
    message = ICMPv6DestUnreach(type=kind) / Raw(bytes(100))
    assert give(stack, ip(NOBODY) / message) == []


@pytest.mark.rule(11)
def test_errors_are_limited(stack: Stack) -> None:
    """RFC 4443 2.4 (f)."""
    replies = [reply for _ in range(200) for reply in give(stack, ip() / UDP(dport=2) / Raw(b"x"))]

    assert len(replies) == 50


# -- extension headers ------------------------------------------------------------------------------------------------


def unknown(kind: int) -> list[Packet]:
    return [HBHOptUnknown(otype=kind, optdata=b"data")]


@pytest.mark.parametrize("header", [IPv6ExtHdrHopByHop, IPv6ExtHdrDestOpt])
@pytest.mark.parametrize(("kind", "outcome"), [(0x1E, "taken"), (0x5E, "dropped"), (0x9E, "told"), (0xDE, "told")])
@pytest.mark.rule(5)
@pytest.mark.scenario("ipv6_unknown_options_action")
def test_unknown_options_are_treated_as_they_ask(stack: Stack, header: type[Packet], kind: int, outcome: str) -> None:
    """RFC 8200 4.2: the two high bits say skip, drop, or tell; "told" points to the option."""
    replies = give(stack, ip() / header(options=unknown(kind)) / syn())

    assert len(stack.take_requests()) == (outcome == "taken")
    if outcome == "told":
        assert (replies[0][ICMPv6ParamProblem].code, replies[0][ICMPv6ParamProblem].ptr) == (2, 42)
        assert stack.drops == {"parameter": 1}
    else:
        assert replies == []
        assert stack.drops == ({} if outcome == "taken" else {"ip_options": 1})


@pytest.mark.rule(5)
@pytest.mark.parametrize(
    "options",
    [b"\0\0\0\0\0\x1e", b"\1\5\0\0\0\0", b"\x1e\xff\0\0\0\0", b"\1\2\0\0\1\1", b"\0\0\0\0\1\1"],
    ids=["no length", "longer than the rest", "much longer", "second one longer", "one beyond"],
)
def test_options_end_where_their_header_ends(stack: Stack, options: bytes) -> None:
    """What follows the header is not theirs to read, and perhaps nothing does."""
    for payload in (bytes(syn()), b""):
        header = bytes(ip() / Raw(bytes(8) + payload))
        stack.handle_packet(header[:6] + b"\0" + header[7:40] + b"\x06\0" + options + payload, 0, True, 1.0)

    assert stack.take_replies() == []
    assert stack.take_requests() == []
    assert stack.drops == {"ip_options": 2}


@pytest.mark.rule(7)
@pytest.mark.parametrize("limit", [0, 1, 255])
def test_the_hop_limit_does_not_matter(stack: Stack, limit: int) -> None:
    """We are the destination, not a router (RFC 8200 3 has a host take whatever is left)."""
    assert give(stack, ip(hlim=limit) / syn()) == []
    assert len(stack.take_requests()) == 1


@pytest.mark.rule(8)
def test_what_we_send_has_no_extension_headers(stack: Stack) -> None:
    """Nothing to be fragmented, no label, a hop limit of 64: in refusals, errors, echoes and segments alike."""
    said = give(stack, ip() / syn(port=80))
    said += give(stack, ip() / UDP(dport=2) / Raw(b"x"))
    said += give(stack, ip() / ICMPv6EchoRequest(data=b"x"))
    said += give(stack, ip(nh=132) / Raw(b"x"))
    give(stack, ip() / syn())
    (flow,) = stack.take_requests()
    stack.accept(flow, 1.0)
    wire = Wire()
    stack.flush(flow, wire, 1.0)
    said += [packet for packet, _ in wire.sent]

    assert len(said) == 5
    assert {(packet.tc, packet.fl, packet.hlim) for packet in said} == {(0, 0, 64)}
    assert {packet.nh for packet in said} == {6, 58}


@pytest.mark.rule(5)
def test_known_chains_are_walked(stack: Stack) -> None:
    chain = IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / IPv6ExtHdrRouting(segleft=0) / IPv6ExtHdrDestOpt()
    give(stack, ip() / chain / syn())

    assert len(stack.take_requests()) == 1


@pytest.mark.rule(5)
def test_a_source_route_is_not_followed(stack: Stack) -> None:
    """RFC 5095, RFC 8200 4.4: parameter problem 0 at the type of the routing header."""
    (reply,) = give(stack, ip() / IPv6ExtHdrRouting(addresses=[NOBODY], segleft=1) / syn())

    assert (reply[ICMPv6ParamProblem].code, reply[ICMPv6ParamProblem].ptr) == (0, 42)


@pytest.mark.parametrize("number", [50, 51, 132, 135, 255])
@pytest.mark.rule(4)
@pytest.mark.scenario("icmpv6_param_problem")
def test_an_unknown_next_header_is_told(stack: Stack, number: int) -> None:
    """RFC 4443 3.4: code 1, pointing to where the number stands."""
    (reply,) = give(stack, ip(nh=number) / Raw(bytes(40)))
    assert (reply[ICMPv6ParamProblem].code, reply[ICMPv6ParamProblem].ptr) == (1, 6)

    (reply,) = give(stack, ip() / IPv6ExtHdrDestOpt(nh=number) / Raw(bytes(40)))
    assert (reply[ICMPv6ParamProblem].code, reply[ICMPv6ParamProblem].ptr) == (1, 40)
    assert stack.drops == {"protocol": 2}


@pytest.mark.parametrize(("kind", "told"), [(44, True), (60, False)])
def test_half_a_fragment_header_is_told_as_linux_does(stack: Stack, kind: int, told: bool) -> None:
    """About the other kinds it is silent."""
    replies = give(stack, ip(nh=60) / Raw(bytes([kind, 0, 1, 4]) + bytes(8)))

    assert [(reply[ICMPv6ParamProblem].code, reply[ICMPv6ParamProblem].ptr) for reply in replies] == [(0, 48)] * told
    assert stack.drops == {"parameter" if told else "extensions": 1}


def test_hop_by_hop_is_only_known_in_the_first_place(stack: Stack) -> None:
    """RFC 8200 4.1."""
    (reply,) = give(stack, ip() / IPv6ExtHdrDestOpt(nh=0) / IPv6ExtHdrHopByHop() / syn())

    assert (reply[ICMPv6ParamProblem].code, reply[ICMPv6ParamProblem].ptr) == (1, 40)


@pytest.mark.parametrize(("count", "requests"), [(8, 1), (9, 0)])
@pytest.mark.rule(5)
def test_chains_are_bounded(stack: Stack, count: int, requests: int) -> None:
    packet = ip()
    for _ in range(count):
        packet /= IPv6ExtHdrDestOpt()
    assert give(stack, packet / syn()) == []

    assert len(stack.take_requests()) == requests
    assert stack.drops == ({} if requests else {"extensions": 1})


def test_nothing_behind_is_nothing(stack: Stack) -> None:
    """RFC 8200 4.7."""
    assert give(stack, ip(nh=59)) == []
    assert stack.drops == {"no_next_header": 1}


@given(st.binary(max_size=200), st.integers(0, 255))
def test_no_chain_raises_or_leaves_the_packet(tail: bytes, following: int) -> None:
    packet = bytes(IPv6(src=APP, dst=ENDPOINT, nh=following, plen=len(tail))) + tail
    header = Ipv6Header()

    assert parse_ipv6(packet, 0, header) == verdict.OK
    if walk_extensions(packet, 0, header) == verdict.OK:
        assert 40 <= header.header_length <= len(packet)


@given(st.binary(max_size=200), st.sampled_from([0, 6, 17, 43, 44, 58, 60]))
def test_every_packet_is_taken_answered_or_counted(tail: bytes, following: int) -> None:
    stack = Stack(SETTINGS, b"k" * 32)
    stack.set_served({address_bytes(ENDPOINT): frozenset((443,))})
    replies = give(stack, bytes(IPv6(src=APP, dst=ENDPOINT, nh=following, plen=len(tail))) + tail)

    assert sum(stack.drops.values()) <= 1
    assert sum(stack.drops.values()) or replies or stack.next_deadline() < float("inf")


# -- who and for whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["::", "::1", "ff02::1", "::ffff:10.107.0.1", "fd12:3456:789a::", ENDPOINT])
@pytest.mark.rule(3, 11)
def test_impossible_sources_are_dropped(stack: Stack, source: str) -> None:
    for payload in (syn(), ICMPv6EchoRequest(), UDP(dport=2) / Raw(b"x")):
        assert give(stack, ip(source=source) / payload) == []
    assert stack.drops == {"source": 3}


@pytest.mark.rule(3)
def test_what_kernels_tell_every_link_is_counted(stack: Stack) -> None:
    """Router solicitations are the first thing on a new link."""
    assert give(stack, ip("ff02::2", "fe80::1") / ICMPv6ND_RS()) == []
    assert give(stack, ip("ff02::fb") / UDP(dport=5353) / Raw(b"mdns")) == []
    assert stack.drops == {"multicast": 2}


@pytest.mark.parametrize("destination", ["fd12:3456:789a::", "fd12:3456:789a::1", "2001:db8::1", "fe80::1"])
def test_what_is_not_for_us_is_dropped(stack: Stack, destination: str) -> None:
    assert give(stack, ip(destination) / syn()) == []
    assert stack.drops == {"destination": 1}


@pytest.mark.rule(3)
def test_only_this_host_and_its_guests_may_connect(stack: Stack) -> None:
    """A network of one version says nothing about the other."""
    guests = int.from_bytes(address_bytes("2001:db8::"))
    mask = ((1 << 128) - 1) ^ ((1 << 96) - 1)
    stack.set_sources(frozenset((address_bytes(APP),)), [(4, 0, 0), (6, guests, mask)])

    give(stack, ip(source="2001:db9::5") / syn())
    assert stack.drops == {"source": 1}
    give(stack, ip(source="2001:db8::5") / syn())
    stack.handle_packet(bytes(ip() / syn()), 0, True, 1.0)
    assert [flow.local for flow in stack.take_requests()] == [False, True]


@pytest.mark.rule(3)
def test_link_local_sources_are_judged_like_others(stack: Stack) -> None:
    """Somebody may give the link such an address; a neighbour's, which no router forwards, is a stranger's."""
    stack.set_sources(frozenset((address_bytes(APP), address_bytes("fe80::5"))))

    assert give(stack, ip(source="fe80::6") / syn()) == []
    assert stack.drops == {"source": 1}
    give(stack, ip(source="fe80::5") / syn())
    assert [flow.source[0] for flow in stack.take_requests()] == [address_bytes("fe80::5")]


def test_without_a_subnet_the_version_is_only_counted() -> None:
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({address_bytes(ENDPOINT): frozenset((443,))})

    assert give(stack, ip() / syn()) == []
    assert stack.drops == {"ipv6": 1}


# -- UDP services -----------------------------------------------------------------------------------------------------


def test_a_datagram_for_a_service_is_handed_out_and_answered(stack: Stack) -> None:
    """Only at its address and port; elsewhere the port is unreachable as ever."""
    stack.set_udp_served({address_bytes(NOBODY): frozenset((53,))})

    assert give(stack, ip(NOBODY) / UDP(sport=9, dport=53) / Raw(b"question")) == []
    (datagram,) = stack.take_datagrams()
    assert datagram.source == (address_bytes(APP), 9)
    assert datagram.destination == (address_bytes(NOBODY), 53)
    assert bytes(datagram.payload) == b"question"
    stack.reply_datagram(datagram, b"answer")
    (reply,) = map(judged, map(bytes, stack.take_replies()))
    assert (reply.src, reply.dst, reply[UDP].sport, reply[UDP].dport) == (NOBODY, APP, 53, 9)
    assert bytes(reply[UDP].payload) == b"answer"

    (reply,) = give(stack, ip(NOBODY) / UDP(sport=9, dport=54) / Raw(b"x"))
    assert reply[ICMPv6DestUnreach].code == 4
    (reply,) = give(stack, ip(NOBODY) / syn(53))  # the address is somebody's now, and serves no TCP
    assert reply[TCP].flags == "RA"
    (reply,) = give(stack, ip() / UDP(sport=9, dport=53) / Raw(b"x"))
    assert reply[ICMPv6DestUnreach].code == 4


def test_datagrams_that_nobody_fetches_are_bounded(stack: Stack) -> None:
    stack.set_udp_served({address_bytes(ENDPOINT): frozenset((53,))})
    for _ in range(300):
        give(stack, ip() / UDP(sport=9, dport=53) / Raw(b"x"))

    assert stack.drops == {"udp_limit": 44}
    assert len(stack.take_datagrams()) == 256


# -- with an app's kernel ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stamps", [True, False])
async def test_megabytes_go_both_ways(autojump_clock: MockClock, stamps: bool) -> None:
    """Streams over the device, pump, machine and the kernel in miniature, with an end in each direction."""
    del autojump_clock
    near, far = memory_pair()
    stack = Stack(SETTINGS, b"s" * 16)
    stack.set_served({address_bytes(ENDPOINT): frozenset((7,))})
    data = bytes(range(256)) * 4096
    async with trio.open_nursery() as nursery:

        async def echo(request: FlowRequest) -> None:
            async with request.accept() as flow:
                async for piece in flow:
                    await flow.send_all(piece)
                await flow.send_eof()
                await flow.wait_delivered()

        network = Network(near, stack, lambda request: nursery.start_soon(echo, request))
        nursery.start_soon(network.run)
        host = AppHost(far, APP)
        nursery.start_soon(host.run)
        with pytest.raises(ConnectionRefusedError):
            await host.connect((ENDPOINT, 8))
        with pytest.raises(OSError, match="unreachable"):
            await host.connect((NOBODY, 7))
        stream = await host.connect((ENDPOINT, 7), mss=1440, segment_limit=1428, timestamps=stamps)
        received = bytearray()

        async def receive() -> None:
            while piece := await stream.receive_some():
                received.extend(piece)

        async with trio.open_nursery() as both:
            both.start_soon(receive)
            await stream.send_all(data)
            await stream.send_eof()
        assert received == data
        assert stream.peer.complaints == []
        nursery.cancel_scope.cancel()


async def test_the_pump_hands_datagrams_out_and_takes_answers(autojump_clock: MockClock) -> None:
    """At once or later; over both versions."""
    del autojump_clock
    near, far = memory_pair()
    stack = Stack(SETTINGS, b"s" * 16)
    four = b"\x0a\x6b\0\2"
    stack.set_udp_served({four: frozenset((53,)), address_bytes(ENDPOINT): frozenset((53,))})
    seen: list[ReceivedDatagram] = []
    network = Network(near, stack, FlowRequest.refuse, seen.append)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(network.run)
        far.write_packet(bytes(ip() / UDP(sport=9, dport=53) / Raw(b"six")))
        far.write_packet(bytes(build_udp(b"\x0a\x6b\0\1", four, 9, 53, b"four")))
        await trio.sleep(1)
        assert [bytes(datagram.payload) for datagram in seen] == [b"six", b"four"]
        for datagram in seen:
            network.answer(datagram, bytes(datagram.payload).upper())
        answers = [packet[far.prefix :] for packet in (far.read(), far.read()) if packet is not None]
        nursery.cancel_scope.cancel()

    assert bytes(judged(answers[0])[UDP].payload) == b"SIX"
    assert answers[1][28:] == b"FOUR"
