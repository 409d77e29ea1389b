"""The host around the connections: what IP, ICMP and UDP get for an answer, and that every packet is accounted for."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tun.core.stack import Stack, StackSettings
from tun.testing.playbook import OPEN_STAMPS, Playbook
from tun.wire import icmp
from tun.wire.checksum import internet_checksum, sum16
from tun.wire.ipv4 import FLAG_MF, build_ipv4
from tun.wire.tcp import ACK, FIN, PSH, SYN, Segment, build_tcp, options, parse_tcp
from tun.wire.udp import build_udp

APP = b"\x0a\x6b\x00\x01"
ENDPOINT = b"\x0a\x6b\x00\x02"
NOBODY = b"\x0a\x6b\x00\x63"


@pytest.fixture
def stack() -> Stack:
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    return stack


def give(stack: Stack, packet: bytes | bytearray, now: float = 1.0, verified: bool = False) -> list[bytes]:
    """Hand a packet in, without the device's word for it; return the replies."""
    stack.handle_packet(bytes(packet), 0, verified, now)
    return [bytes(reply) for reply in stack.take_replies()]


def syn(source: bytes = APP, destination: bytes = ENDPOINT, port: int = 443) -> bytearray:
    return build_tcp(source, destination, 4000, port, seq=7, flags=SYN, window=65535, options=options(mss=1460))


def echo(destination: bytes = ENDPOINT, data: bytes = b"ping", source: bytes = APP) -> bytearray:
    message = bytearray(b"\x08\0\0\0\x12\x34\0\x01" + data)
    message[2:4] = internet_checksum(message).to_bytes(2, "big")
    return build_ipv4(source, destination, 1, len(message)) + message


def fragments(packet: bytearray, size: int = 1480, identification: int = 5) -> list[bytes]:
    """Cut a packet as a kernel does."""
    payload = packet[20:]
    pieces = []
    for offset in range(0, len(payload), size):
        part = payload[offset : offset + size]
        more = FLAG_MF if offset + size < len(payload) else 0
        header = build_ipv4(
            bytes(packet[12:16]), bytes(packet[16:20]), packet[9], len(part),
            identification=identification, fragment=more | offset >> 3,
        )  # fmt: skip
        pieces.append(bytes(header + part))
    return pieces


# -- who and for whom -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        b"\x7f\0\0\x01",
        b"\0\0\0\0",
        b"\0\1\2\3",
        b"\xe0\0\0\x01",
        b"\xff\xff\xff\xff",
        b"\xf0\0\0\x01",
        ENDPOINT,  # LAND
        b"\x0a\x6b\xff\xff",
        b"\x0a\x6b\0\0",
    ],
)
@pytest.mark.rule(3, 11)
def test_impossible_sources_are_dropped(stack: Stack, source: bytes) -> None:
    """RFC 1122 3.2.1.3: no host has these, and answers to them would make loops."""
    for packet in (syn(source), echo(source=source), build_udp(source, ENDPOINT, 1, 2, b"x")):
        assert give(stack, packet) == []
    assert stack.take_requests() == []
    assert stack.drops == {"source": 3}


@pytest.mark.rule(3)
def test_only_this_host_and_its_guests_may_connect(stack: Stack) -> None:
    """Who uses this machine as a gateway is not its user."""
    stack.set_sources(frozenset((APP,)), [(4, 0xAC110000, 0xFFFF0000), (6, 0, 0)])

    give(stack, syn(b"\xc0\xa8\0\x05"))
    assert stack.drops == {"source": 1}
    give(stack, syn(b"\xac\x11\0\x05"))
    give(stack, syn(APP), verified=True)
    assert [flow.local for flow in stack.take_requests()] == [False, True]


@pytest.mark.rule(3)
def test_nobodys_address_is_unreachable(stack: Stack) -> None:
    """ICMP 3/1 at once (EHOSTUNREACH), from the address itself; silence would cost the app two minutes."""
    for packet in (syn(destination=NOBODY), echo(NOBODY), build_udp(APP, NOBODY, 1, 2, b"x")):
        (reply,) = give(stack, packet)
        assert reply[12:16] == NOBODY
        assert reply[16:20] == APP
        assert reply[20:22] == b"\3\1"
        assert reply[28:48] == packet[:20]
        assert sum16(reply[20:]) == 0xFFFF
    assert stack.drops == {"no_host": 3}


@pytest.mark.parametrize(
    "destination", [b"\xe0\0\0\xfb", b"\xff\xff\xff\xff", b"\x0a\x6b\xff\xff", b"\x0a\x6b\0\0", APP]
)
@pytest.mark.rule(3, 11)
def test_what_is_not_for_us_is_dropped(stack: Stack, destination: bytes) -> None:
    """Multicast, broadcast, the gateway: kernels send such packets to every link; no error is ever sent about them."""
    source = b"\xac\x11\0\x05"
    for packet in (syn(source, destination), build_udp(source, destination, 5353, 5353, b"mdns")):
        assert give(stack, packet) == []
    assert stack.drops == {"destination": 2}


def test_version_6_is_counted(stack: Stack) -> None:
    """Router solicitations are the first thing a new link says."""
    assert give(stack, b"\x60" + bytes(47)) == []
    assert stack.drops == {"ipv6": 1}


@pytest.mark.rule(4)
def test_unknown_protocol_is_answered(stack: Stack) -> None:
    """ICMP 3/2 (RFC 1122 3.2.2.1)."""
    (reply,) = give(stack, build_ipv4(APP, ENDPOINT, 132, 8) + bytes(8))

    assert reply[20:22] == b"\3\2"
    assert stack.drops == {"protocol": 1}


# -- echo and UDP -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 56, 1472, 20000, 65507])
@pytest.mark.rule(9)
def test_ping_is_answered(stack: Stack, size: int) -> None:
    """With the same identifier, number and data, up to the largest packet."""
    data = bytes(index & 0xFF for index in range(size))
    (reply,) = give(stack, echo(data=data))

    assert (reply[12:16], reply[16:20]) == (ENDPOINT, APP)
    assert reply[20:22] == b"\0\0"
    assert reply[24:] == b"\x12\x34\0\x01" + data
    assert sum16(reply[:20]) == sum16(reply[20:]) == 0xFFFF
    assert stack.drops == {}


@pytest.mark.rule(9)
def test_damaged_ping_is_dropped(stack: Stack) -> None:
    """Every checksum is looked at, whoever vouches: the kernel never offloads ICMP's."""
    packet = echo()
    packet[-1] ^= 1

    assert give(stack, packet, verified=True) == []
    assert stack.drops == {"icmp_checksum": 1}


@pytest.mark.rule(11)
def test_pings_are_limited(stack: Stack) -> None:
    """A flood is answered a thousand times at once, and no more."""
    assert sum(len(give(stack, echo())) for _ in range(1500)) == 1000
    assert stack.drops == {"echo_limit": 500}
    assert len(give(stack, echo(), now=2.0)) == 1


@pytest.mark.rule(10)
def test_udp_is_unreachable(stack: Stack) -> None:
    """ICMP 3/3, quoting the datagram."""
    packet = build_udp(APP, ENDPOINT, 1234, 53, b"query")
    (reply,) = give(stack, packet)

    assert reply[20:22] == b"\3\3"
    assert reply[28:] == packet
    assert stack.drops == {"udp": 1}


def test_bad_udp_is_dropped(stack: Stack) -> None:
    """No answer to what may never have been sent."""
    packet = build_udp(APP, ENDPOINT, 1234, 53, b"query")
    packet[-1] ^= 1
    assert give(stack, packet) == []
    packet[24:26] = b"\0\1"
    assert give(stack, packet) == []
    assert stack.drops == {"udp_checksum": 1, "udp_length": 1}


@pytest.mark.rule(11)
def test_errors_are_limited_and_never_about_errors(stack: Stack) -> None:
    """RFC 1122 3.2.2 and a bucket of 50."""
    error = icmp.build_error(3, 1, APP, ENDPOINT, bytes(syn()))
    assert give(stack, error) == []
    assert give(stack, icmp.build_error(11, 0, APP, NOBODY, bytes(syn()))) == []
    assert sum(len(give(stack, build_udp(APP, ENDPOINT, 1, 2, b""))) for _ in range(100)) == 50


# -- fragments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["in order", "reversed", "doubled"])
@pytest.mark.rule(6)
@pytest.mark.scenario("ipv4_fragment_reassembly")
def test_large_ping_in_fragments_is_answered(stack: Stack, order: str) -> None:
    """`ping -s 20000`, in any order; the same fragment twice is an overlap, and kills it."""
    pieces = fragments(echo(data=bytes(20000)))
    if order == "reversed":
        pieces.reverse()
    if order == "doubled":
        pieces.insert(1, pieces[0])
    replies = [reply for piece in pieces for reply in give(stack, piece)]

    if order == "doubled":
        assert replies == []
        assert stack.drops["fragment"] >= 1
    else:
        assert len(replies) == 1
        assert len(replies[0]) == 20028
        assert sum16(replies[0][20:]) == 0xFFFF
        assert stack.drops == {}
        assert stack.next_deadline() == float("inf")


@pytest.mark.parametrize("protocol", [6, 17])
@pytest.mark.rule(6, 11)
def test_other_fragments_are_dropped(stack: Stack, protocol: int) -> None:
    """The local kernel sets DF on TCP: fragments of it are an attack or a mistake."""
    packet = bytearray(syn() + bytes(3000)) if protocol == 6 else build_udp(APP, ENDPOINT, 1, 2, bytes(3000))
    for piece in fragments(packet):
        assert give(stack, piece) == []
    assert stack.drops == {"fragment": 3}
    assert stack.take_requests() == []


@pytest.mark.rule(6)
def test_missing_fragment_is_waited_for_30_seconds(stack: Stack) -> None:
    """Then the first one is quoted back: time exceeded (RFC 792)."""
    first, *_ = fragments(echo(data=bytes(3000)))
    give(stack, first, now=1.0)
    assert stack.next_deadline() == 31.0

    stack.handle_timeout(31.0)

    (reply,) = stack.take_replies()
    assert bytes(reply[20:22]) == b"\x0b\1"
    assert bytes(reply[28:48]) == first[:20]
    assert stack.next_deadline() == float("inf")


@pytest.mark.rule(6)
def test_fragment_floods_are_bounded(stack: Stack) -> None:
    """FragmentSmack (CVE-2018-5391): endless beginnings, large and tiny; a normal ping goes on."""
    for index in range(3000):
        size = 1480 if index % 2 else 8
        header = build_ipv4(APP, ENDPOINT, 1, size, identification=index, fragment=FLAG_MF)
        give(stack, header + bytes(size))
    assert len(stack._reassembler.datagrams) <= 64
    assert stack._reassembler.bytes_held <= 1 << 20

    for piece in fragments(echo(data=bytes(60000)), size=8, identification=9):
        give(stack, piece)
    assert stack._reassembler.bytes_held <= 1 << 20
    assert max(len(datagram.parts) for datagram in stack._reassembler.datagrams.values()) <= 128
    assert len(give(stack, echo())) == 1


@settings(max_examples=150)
@given(st.lists(st.tuples(st.integers(0, 8191), st.booleans(), st.integers(0, 3), st.binary(max_size=40)), max_size=30))
@pytest.mark.rule(6)
def test_any_fragments_are_survived(pieces: list[tuple[int, bool, int, bytes]]) -> None:
    """Offsets, lengths and ends that contradict each other."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    for offset, more, identification, data in pieces:
        header = build_ipv4(
            APP, ENDPOINT, 1, len(data), identification=identification, fragment=offset | (FLAG_MF if more else 0)
        )
        give(stack, header + data)
    assert stack._reassembler.bytes_held == sum(d.charge for d in stack._reassembler.datagrams.values())
    stack.handle_timeout(100.0)
    assert stack._reassembler.bytes_held == 0


# -- TCP around the flows ---------------------------------------------------------------------------------------------


@pytest.mark.rule(1, 14)
def test_checksum_is_verified_unless_the_device_did(stack: Stack) -> None:
    """Bad: silent drop and a counter, never RST (RFC 9293 MUST-3)."""
    packet = syn()
    packet[36] ^= 1
    assert give(stack, packet) == []
    assert stack.drops == {"tcp_checksum": 1}
    assert stack.take_requests() == []

    give(stack, packet, verified=True)
    assert len(stack.take_requests()) == 1


@pytest.mark.rule(2)
def test_prefix_and_padding_are_skipped(stack: Stack) -> None:
    """The device's bytes before, a link's padding behind."""
    stack.handle_packet(bytes(10) + bytes(syn()) + bytes(7), 10, False, 1.0)

    assert len(stack.take_requests()) == 1
    assert stack.drops == {}


@pytest.mark.rule(7)
def test_time_to_live_does_not_matter(stack: Stack) -> None:
    """We are the destination, not a router."""
    packet = syn()
    packet[8] = 1
    packet[10:12] = b"\0\0"
    packet[10:12] = internet_checksum(packet[:20]).to_bytes(2, "big")

    give(stack, packet)

    assert len(stack.take_requests()) == 1


@pytest.mark.rule(5)
def test_ip_options_are_ignored(stack: Stack) -> None:
    """They change where TCP begins, nothing else; the short way does not take them, the long one does."""
    tcp = bytes(syn()[20:])
    packet = build_ipv4(APP, ENDPOINT, 6, 4 + len(tcp))
    packet[0] = 0x46
    packet[10:12] = b"\0\0"
    packet += b"\1\1\1\0"
    packet[10:12] = internet_checksum(packet).to_bytes(2, "big")

    give(stack, packet + tcp)

    (flow,) = stack.take_requests()
    assert flow.source == (APP, 4000)
    assert flow.destination == (ENDPOINT, 443)


@pytest.mark.rule(21)
def test_removed_endpoint_refuses_new_and_keeps_old(stack: Stack) -> None:
    """What is served is replaced as a whole; flows that live stay."""
    give(stack, syn())
    (flow,) = stack.take_requests()
    stack.accept(flow, 1.0)
    stack.set_served({ENDPOINT: frozenset((80,))})
    stack.flush(flow, lambda *_: True, 1.0)
    give(stack, build_tcp(APP, ENDPOINT, 4000, 443, seq=8, ack=flow.snd_nxt & 0xFFFFFFFF, flags=ACK, window=9))
    assert flow.state == 4

    packet = build_tcp(APP, ENDPOINT, 4001, 443, seq=8, flags=SYN)
    (reply,) = give(stack, packet)
    assert reply[33] == 0x14


@pytest.mark.rule(12)
def test_packet_too_big_shrinks_segments_with_care(stack: Stack) -> None:
    """RFC 5927: only about bytes on the way, never below 536, never larger."""
    give(stack, syn())
    (flow,) = stack.take_requests()
    stack.accept(flow, 1.0)
    stack.flush(flow, lambda *_: True, 1.0)
    give(stack, build_tcp(APP, ENDPOINT, 4000, 443, seq=8, ack=flow.snd_nxt & 0xFFFFFFFF, flags=ACK, window=60000))
    flow.write(memoryview(bytes(5000)), 1.0)
    sizes: list[int] = []

    def write(header: object, views: object, gso: int) -> bool:
        sizes.append(gso)
        return True

    stack.flush(flow, write, 1.0)
    assert sizes == [1460]

    def too_big(seq: int, mtu: int) -> bytearray:
        quoted = build_tcp(ENDPOINT, APP, 443, 4000, seq=seq & 0xFFFFFFFF, flags=ACK)
        error = icmp.build_error(3, 4, APP, ENDPOINT, quoted)
        error[22:24] = b"\0\0"
        error[26:28] = mtu.to_bytes(2, "big")
        error[22:24] = internet_checksum(error[20:]).to_bytes(2, "big")
        return error

    for seq, mtu, after in (
        (flow.snd_nxt, 1000, 1460),
        (flow.snd_una - 1, 1000, 1460),
        (flow.snd_una, 9000, 1460),
        (flow.snd_una, 1400, 1360),
        (flow.snd_una, 0, 496),
        (flow.snd_una, 1400, 496),
    ):
        give(stack, too_big(seq, mtu))
        assert flow._mss == after
    for code in (0, 1, 2, 3, 13):
        give(stack, icmp.build_error(3, code, APP, ENDPOINT, build_tcp(ENDPOINT, APP, 443, 4000, seq=0, flags=ACK)))
    assert not flow.closed


def test_every_packet_is_accounted_for(stack: Stack) -> None:
    """Taken, answered, or dropped under exactly one reason."""
    packets = [b"", b"\x45", bytes(40), bytes(syn()), bytes(echo()), bytes(build_udp(APP, ENDPOINT, 1, 2, b""))]
    packets += [bytes(syn(port=80)), bytes(build_tcp(APP, ENDPOINT, 9, 443, seq=1, flags=FIN))]
    for packet in packets:
        give(stack, packet)

    assert stack.packets == len(packets)
    assert stack.opened == 1
    assert sum(stack.drops.values()) == len(packets) - 2


@settings(max_examples=300)
@given(st.binary(max_size=100), st.integers(0, 12), st.booleans())
@pytest.mark.rule(1)
def test_any_bytes_are_survived(data: bytes, start: int, verified: bool) -> None:
    """Nothing the network sends raises."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    stack.handle_packet(data, start, verified, 1.0)

    assert sum(stack.drops.values()) == 1 or stack.replies_sent or stack.opened


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(-3, 70000),
            st.integers(-3, 70000),
            st.integers(0, 63),
            st.integers(0, 65535),
            st.binary(max_size=60),
            st.binary(max_size=12),
            st.sampled_from([0.0, 0.01, 0.3, 2.0, 40.0]),
            st.sampled_from(["", "read", "write", "finish", "release", "abort"]),
        ),
        max_size=25,
    ),
    st.sampled_from([0, 0xFFFFFFF0]),
)
def test_any_segments_are_survived(
    steps: list[tuple[int, int, int, int, bytes, bytes, float, str]], start: int
) -> None:
    """A connection beaten with any numbers, flags, options and commands: no exception, no leak, bounded answers."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    first = build_tcp(
        APP, ENDPOINT, 4000, 443, seq=start, flags=SYN, window=9999,
        options=options(mss=1460, sack_permitted=True, window_scale=3),
    )  # fmt: skip
    now = 1.0
    give(stack, first)
    (flow,) = stack.take_requests()
    stack.accept(flow, now)
    initial = flow.iss
    segment = Segment()
    written: list[int] = []

    def write(header: bytearray | memoryview, views: object, gso: int) -> bool:
        assert parse_tcp(bytes(header), 20, len(header), segment) == 0
        written.append(segment.flags)
        return True

    edge = 0
    for seq, ack, flags, window, payload, extra, pause, command in steps:
        now += pause
        stack.handle_timeout(now)
        packet = build_tcp(
            APP, ENDPOINT, 4000, 443, seq=(start + seq) & 0xFFFFFFFF, ack=(initial + ack) & 0xFFFFFFFF, flags=flags,
            window=window, options=extra + bytes(-len(extra) % 4), payload=payload,
        )  # fmt: skip
        give(stack, packet, now)
        if command == "read":
            flow.consume(flow.readable_bytes, now)
        elif command == "write":
            flow.write(payload or b"x", now)
        elif command == "finish":
            flow.finish(now)
        elif command == "release":
            flow.release(now)
        elif command == "abort":
            flow.abort(now)
        for request in stack.take_requests():
            stack.refuse(request, now)
        for touched in [*stack.take_touched(), flow]:
            stack.flush(touched, write, now)
        assert flow.rcv_edge >= edge
        edge = flow.rcv_edge
        assert flow.snd_una <= flow.snd_nxt
        assert len(written) < 40 * (len(steps) + 1)
    now += 1000.0
    for _ in range(200):
        if stack.next_deadline() > now:
            break
        stack.handle_timeout(now)
        for touched in stack.take_touched():
            stack.flush(touched, write, now)
        now += 100.0
    flow.abort(now)
    stack.flush(flow, write, now)
    assert stack.flow_count == 0
    assert stack.buffered_bytes == 0


def test_short_way_and_long_way_agree(stack: Stack) -> None:
    """Header prediction is an optimisation: with and without it the same bytes, numbers and windows."""
    outputs: list[list[bytes]] = []
    for predicted in (True, False):
        stack = Stack(StackSettings(), b"k" * 32)
        stack.set_served({ENDPOINT: frozenset((443,))})
        out: list[bytes] = []

        def write(header: bytearray | memoryview, views: object, gso: int, out: list[bytes] = out) -> bool:
            out.append(bytes(header) + b"".join(views))  # type: ignore[arg-type]  # the views are bytes-like
            return True

        give(stack, syn())
        (flow,) = stack.take_requests()
        stack.accept(flow, 1.0)
        stack.flush(flow, write, 1.0)
        seq, now = 8, 1.0
        for step in range(60):
            now += 0.003
            payload = bytes(step % 7 * 100)
            ack = flow.snd_nxt - (step % 3 == 0 and flow.snd_nxt - flow.snd_una > 10) * 5
            packet = build_tcp(
                APP, ENDPOINT, 4000, 443, seq=seq, ack=ack & 0xFFFFFFFF, flags=ACK | PSH, window=40000 + step,
                payload=payload,
            )  # fmt: skip
            seq += len(payload)
            if not predicted:
                flow.predict = 0
            give(stack, packet, now)
            flow.consume(flow.readable_bytes // 2, now)
            flow.write(bytes(step % 5 * 500), now)
            stack.take_touched()
            stack.flush(flow, write, now)
            if step % 10 == 9:
                now += 0.3
                stack.handle_timeout(now)
                stack.flush(flow, write, now)
        outputs.append(out)

    assert outputs[0] == outputs[1]
    assert len(outputs[0]) > 60


def test_same_input_gives_the_same_output() -> None:
    """No clock, no chance: a capture can be replayed byte for byte."""

    def run() -> list[bytes]:
        book = Playbook(start=123.0)
        book.play(OPEN_STAMPS)
        book.play("""
            us  | write 3000
            app < P. 1:3001(3000) ack 1
            app < .  1:1449(1448) ack 1   +0.25s
        """)
        return book.packets

    first = run()
    assert len(first) == 3
    assert run() == first
