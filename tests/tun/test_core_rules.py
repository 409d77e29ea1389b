"""Rules and mistakes of other stacks that no phase of a connection owns; each test names what it proves."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from tun.core.stack import Stack, StackSettings
from tun.core.states import ESTABLISHED
from tun.seq import MASK
from tun.testing.playbook import APP, ENDPOINT, OPEN, OPEN_STAMPS, Play, Playbook, tuned
from tun.wire import icmp
from tun.wire.checksum import internet_checksum
from tun.wire.ipv4 import FLAG_MF, build_ipv4
from tun.wire.tcp import ACK, PSH, SYN, URG, build_tcp, options

NOBODY = b"\x0a\x6b\x00\x63"


def from_app(book: Playbook, position: int, payload: bytes = b"", flags: int = ACK, **fields: Any) -> bytearray:
    """A segment of the app's, to be bent."""
    assert book.flow is not None
    ack = fields.pop("ack", book.flow.snd_nxt) & MASK
    return build_tcp(
        book.app, book.endpoint, 40000, 443, seq=position, ack=ack, flags=flags, window=512, payload=payload, **fields
    )


def give(book: Playbook, packet: bytes | bytearray, verified: bool = True) -> list[str]:
    """Hand a packet in; what was said to it."""
    book.stack.handle_packet(bytes(packet), 0, verified, book.now)
    book._serve()
    said = list(book._outputs)
    book._outputs.clear()
    return said


def error(kind: int, code: int, quoted: bytes | bytearray, mtu: int = 0) -> bytearray:
    """An ICMP error of any kind about a segment of ours."""
    packet = icmp.build_error(kind, code, APP, ENDPOINT, quoted)
    packet[22:24] = b"\0\0"
    packet[24:28] = struct.pack("!HH", 0, mtu)
    packet[22:24] = internet_checksum(packet[20:]).to_bytes(2, "big")
    return packet


# -- IP and ICMP ------------------------------------------------------------------------------------------------------


@pytest.mark.rule(2)
@pytest.mark.parametrize("flags", [ACK, ACK | URG], ids=["short way", "long way"])
def test_padding_is_never_data(play: Play, flags: int) -> None:
    """Ethernet pads short packets; what is behind the IP length is nobody's."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)

    said = give(book, from_app(book, 1, b"hello", flags) + b"padding")

    assert said == [". 1:1(0) ack 6 win 2047"]
    book.play("""
        us  | read "hello"
    """)


@pytest.mark.ipv4
@pytest.mark.rule(8)
@pytest.mark.scenario("ipv4_id_uniqueness")
def test_what_we_send_is_never_fragmented(play: Play) -> None:
    """DF, identification 0 (RFC 6864 4), TTL 64: in segments, resent ones, resets and errors alike."""
    book = play(
        """
        app > P. 1:6(5) ack 1 "hello"
        app < .  1:1(0) ack 6
        us  | write 3000
        app < P. 1:3001(3000) ack 6
        app < .  1:1461(1460) ack 6      +0.25s
        us  | abort
        app < R. 3001:3001(0) ack 6
        app > .  6:6(0) ack 3001
        app < R  3001:3001(0)
        """,
        begin=OPEN,
    )
    give(book, build_ipv4(APP, ENDPOINT, 132, 8) + bytes(8))
    message = bytearray(b"\x08\0\0\0\x12\x34\0\x01")
    message[2:4] = internet_checksum(message).to_bytes(2, "big")
    give(book, build_ipv4(APP, ENDPOINT, 1, 8) + message)

    assert len(book.packets) == 8
    for packet in book.packets:
        assert packet[0] == 0x45
        assert packet[4:9] == b"\0\0\x40\0\x40"


@pytest.mark.rule(11)
def test_errors_are_refilled_a_thousand_times_a_second() -> None:
    """As Linux's icmp_msgs_per_sec; what is over the limit is dropped under its own reason all the same."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    packet = bytes(build_ipv4(APP, ENDPOINT, 132, 8) + bytes(8))
    for step in range(4000):
        stack.handle_packet(packet, 0, False, 10.0 + step / 4000)

    assert 1000 <= len(stack.take_replies()) <= 1050
    assert stack.drops == {"protocol": 4000}


@pytest.mark.rule(11)
@pytest.mark.rule(6)
def test_a_datagram_without_its_beginning_ends_silently() -> None:
    """RFC 1122 3.2.2: no error about a later fragment."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    later = build_ipv4(APP, ENDPOINT, 1, 80, identification=5, fragment=FLAG_MF | 10) + bytes(80)
    stack.handle_packet(bytes(later), 0, False, 1.0)

    stack.handle_timeout(31.0)

    assert stack.take_replies() == []
    assert stack._reassembler.bytes_held == 0


@pytest.mark.rule(6)
@pytest.mark.scenario("ipv4_fragment_reassembly")
@pytest.mark.parametrize(
    ("offset", "size"), [(0, 8), (8, 8), (8, 40), (16, 16), (0, 72)], ids=["equal", "inside", "over", "tail", "around"]
)
def test_overlapping_fragments_kill_their_datagram(offset: int, size: int) -> None:
    """RFC 5722: whatever the overlap, nothing comes out, however the rest is completed."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    message = bytearray(b"\x08\0\0\0\x12\x34\0\x01" + bytes(72))
    message[2:4] = internet_checksum(message).to_bytes(2, "big")

    def fragment(start: int, length: int) -> None:
        more = FLAG_MF if start + length < len(message) else 0
        part = message[start : start + length]
        header = build_ipv4(APP, ENDPOINT, 1, len(part), identification=5, fragment=more | start >> 3)
        stack.handle_packet(bytes(header + part), 0, False, 1.0)

    fragment(0, 32)
    fragment(offset, size)
    fragment(32, 40)

    assert stack.take_replies() == []
    assert stack.drops["fragment"] >= 1


@pytest.mark.ipv4
@pytest.mark.rule(12)
@pytest.mark.scenario("tcp_connect_icmp_error")
@pytest.mark.parametrize("state", ["half-open", "established"])
def test_errors_about_a_connection_are_soft(play: Play, state: str) -> None:
    """All unreachable codes, source quench, redirect, time exceeded, parameter problem: none ends or slows it."""
    handshake = OPEN.rsplit("app > .", 1)[0]
    book = play(handshake if state == "half-open" else OPEN)
    flow = book.flow
    assert flow is not None
    if state == "established":
        flow.write(bytes(3000), book.now)
        book._pending[flow] = None
        book._serve()
        book._outputs.clear()
    before = (flow.state, flow._mss, flow._cwnd, flow.snd_edge, flow._rto_at)
    quoted = build_tcp(ENDPOINT, APP, 443, 40000, seq=flow.snd_una & 0xFFFFFFFF, flags=ACK)
    kinds = [(3, code) for code in range(16) if code != 4] + [(4, 0), (5, 1), (11, 0), (12, 0)]
    for kind, code in kinds:
        assert give(book, error(kind, code, quoted)) == []

    assert (flow.state, flow._mss, flow._cwnd, flow.snd_edge, flow._rto_at) == before
    assert book.stack.drops == {"icmp": len(kinds)}


@pytest.mark.ipv4
@pytest.mark.rule(6)
@pytest.mark.bug("wireguard-go 052af4a")
@pytest.mark.parametrize("field", [0x2000, 0x6000, 0x0001, 0x2001, 0x1FFF])
def test_a_fragment_is_never_taken_for_the_next_segment(play: Play, field: int) -> None:
    """Whatever bit says that it is one; what it carries would fit into the connection just so."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    packet = from_app(book, 1, b"hello")
    packet[6:8] = field.to_bytes(2, "big")
    packet[10:12] = b"\0\0"
    packet[10:12] = internet_checksum(packet[:20]).to_bytes(2, "big")

    assert give(book, packet) == []
    assert book.flow is not None
    assert book.flow.readable_bytes == 0
    assert book.stack.drops == {"fragment": 1}


@pytest.mark.rule(13)
@pytest.mark.bug("Tailscale 31cdbd68b")
def test_the_largest_packets_pass_both_ways(play: Play) -> None:
    """65,535 bytes with all headers come in; what goes out never has more, whatever the app's segments are."""
    book = play(
        """
        app > S  0:0(0)        win 65535 mss 65495 ts 1000 ecr 0 wscale 14
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1 win 65535 ts 1000 ecr 1
        """,
        settings=tuned(mtu=65535),
    )
    largest = 65535 - book.ip_header - 32
    book.play(f"""
        app > P. 1:{1 + largest}({largest}) ack 1 ts 1001 ecr 1
        app < .  1:1(0) ack {1 + largest}
        us  | read {largest}
    """)
    assert book.flow is not None
    sizes: list[int] = []

    def write(header: bytearray | memoryview, views: object, gso: int) -> bool:
        sizes.append(len(header) + sum(map(len, views)))  # type: ignore[call-overload]  # the views are bytes-like
        return True

    book.flow.write(bytes(200_000), book.now)
    book.stack.flush(book.flow, write, book.now)

    assert max(sizes) <= 65535
    assert max(sizes) > 65000


@pytest.mark.rule(13)
def test_a_packet_larger_than_the_link_is_taken(play: Play) -> None:
    """With offload the kernel hands over 64 KiB at once, whatever the MTU."""
    play(
        """
        app > P. 1:60001(60000) ack 1
        app < .  1:1(0) ack 60001
        us  | read 60000
        """,
        begin=OPEN,
    )


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.rule(14)
@pytest.mark.parametrize("offset", [0, 1, 4, 15])
def test_a_header_that_does_not_fit_is_dropped_silently(play: Play, offset: int) -> None:
    """Never a RST for what may be noise (RFC 9293 MUST-3)."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    packet = from_app(book, 1, b"hello")
    packet[book.ip_header + 12] = offset << 4

    assert give(book, packet) == []
    assert sum(book.stack.drops.values()) == 1
    assert book.flow is not None
    assert book.flow.state == ESTABLISHED


@pytest.mark.rule(16)
@pytest.mark.parametrize("bits", [(0x0F, 0xC0), (0x01, 0), (0, 0x40), (0, 0x80)])
def test_reserved_and_ecn_bits_are_neither_taken_nor_given(play: Play, bits: tuple[int, int]) -> None:
    """In a SYN and in data; what we answer has none of them."""
    book = play("us  | none")
    at = book.ip_header + 12
    packet = build_tcp(book.app, book.endpoint, 40000, 443, seq=0, flags=SYN, window=1)
    packet[at] |= bits[0]
    packet[at + 1] |= bits[1]
    give(book, packet)
    assert book.flow is not None
    book.play("""
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1
    """)
    packet = from_app(book, 1, b"hello")
    packet[at] |= bits[0]
    packet[at + 1] |= bits[1]

    assert len(give(book, packet)) == 1
    assert book.flow.readable_bytes == 5
    assert all(sent[at] & 0x0F == 0 and sent[at + 1] & 0xC0 == 0 for sent in book.packets)


@pytest.mark.rule(17)
def test_syn_with_reset_is_a_reset(play: Play) -> None:
    """RST is looked at first: without a flow nothing is opened, in one it needs the exact number."""
    play("""
        app > SR 0:0(0)
        us  | none
        us  | drops stray_reset 1
    """)
    play(
        """
        app > SR 100:100(0)
        app < .  1:1(0) ack 1
        us  | open
        app > SR 1:1(0)
        us  | failure reset
        """,
        begin=OPEN,
    )


@pytest.mark.rule(37)
@pytest.mark.parametrize("pointer", [0, 1, 5, 6, 65535])
def test_the_urgent_pointer_may_point_anywhere(play: Play, pointer: int) -> None:
    """In a SYN, in data, with a FIN: the stream is what it would be without (the Urgent/11 class)."""
    book = play("us  | none")

    def urgent(packet: bytearray) -> bytearray:
        packet[book.ip_header + 13] |= URG
        packet[book.ip_header + 18 : book.ip_header + 20] = pointer.to_bytes(2, "big")
        return packet

    give(book, urgent(build_tcp(book.app, book.endpoint, 40000, 443, seq=0, flags=SYN, window=512)))
    book.play("""
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1
    """)
    give(book, urgent(from_app(book, 1, b"hello")))
    give(book, urgent(from_app(book, 6, b"world", ACK | PSH | 1)))

    assert book.flow is not None
    book.play("""
        us  | read "helloworld"
        us  | finished
    """)


# -- no connection, handshake -----------------------------------------------------------------------------------------


@pytest.mark.rule(20)
def test_refusals_do_not_run_out_with_the_answers_to_strays() -> None:
    """A flood of strays uses up its own limit; a SYN to a closed port is refused still, two thousand at once."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    for port in range(2000):
        stack.handle_packet(bytes(build_tcp(APP, ENDPOINT, port + 1, 443, seq=1, ack=1, flags=ACK)), 0, True, 1.0)
    strays = len(stack.take_replies())
    for port in range(2000):
        stack.handle_packet(bytes(build_tcp(APP, ENDPOINT, port + 1, 80, seq=1, flags=SYN)), 0, True, 1.0)

    assert strays == 100
    assert len(stack.take_replies()) == 2000
    assert stack.drops == {"stray_ack": 2000, "closed_port": 2000}


@pytest.mark.rule(21, 27)
@pytest.mark.scenario("tcp_noaccept_close_rst")
def test_everything_ending_refuses_what_is_undecided() -> None:
    """An app whose request nobody decided any more is refused, not left to wait."""
    book = Playbook()
    book.play("""
        app > S  0:0(0)  win 65535 mss 1460
        us  | request 10.107.0.2:443
    """)

    book.stack.abort_all(book.now)

    book.play("""
        us  | failure refused
        app < R. 0:0(0) ack 1
    """)
    assert book.stack.flow_count == 0


@pytest.mark.rule(68)
def test_everything_can_be_ended_at_once(play: Play) -> None:
    """For the end of us: established flows are told, and nothing waits for an answer."""
    book = play("us  | write 100\napp < P. 1:101(100) ack 1", begin=OPEN)

    book.stack.abort_all(book.now)

    book.play("us  | failure aborted\napp < R. 101:101(0) ack 1")
    assert book.stack.flow_count == 0
    assert book.stack.buffered_bytes == 0
    assert book.stack.next_deadline() == float("inf")


@pytest.mark.rule(22)
@pytest.mark.bug("gVisor 3aa77e9f0", "smoltcp 16100ffb", "smoltcp 43697943")
@pytest.mark.parametrize("mss", [0, 1, 11, 12, 48, 49])
def test_options_leave_room_in_the_smallest_segments(play: Play, mss: int) -> None:
    """Stamps cost 12 bytes of each segment; what is left is never nothing, and never the payload's loss."""
    book = play(
        f"""
        app > S  0:0(0)        win 65535 mss {mss} sackOK ts 1000 ecr 0
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1  ecr 1000
        app > .  1:1(0) ack 1  win 65535 ts 1000 ecr 1
        app > P. 11:21(10) ack 1 win 65535 ts 1001 ecr 1
        app < .  1:1(0) ack 1 sack 11:21 ecr 1000
        """,
        settings=tuned(offload=False),
    )
    flow = book.flow
    assert flow is not None
    sizes: list[int] = []

    def write(header: bytearray | memoryview, views: object, gso: int) -> bool:
        sizes.append(sum(map(len, views)))  # type: ignore[call-overload]  # the views are bytes-like
        return True

    flow.write(bytes(3000), book.now)
    book.stack.flush(flow, write, book.now)

    assert sum(sizes) == 3000
    assert set(sizes[:-1]) == {(max(mss, 48) if mss else 536 if book.version == 4 else 1220) - 12}


@pytest.mark.rule(24)
@pytest.mark.parametrize(
    ("offered", "answered"),
    [("", ""), ("sackOK", "sackOK"), ("ts 7 ecr 0", "ecr 7"), ("sackOK ts 7 ecr 0", "sackOK ecr 7")],
)
def test_only_what_was_offered_is_agreed_to(play: Play, offered: str, answered: str) -> None:
    """RFC 2018 2, RFC 7323 3.2."""
    book = play(f"""
        app > S  0:0(0)        win 65535 mss 1460 {offered}
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1  {answered}
    """)

    (syn_ack,) = book.packets
    stamped, sack = "ts" in offered, "sack" in offered
    assert len(syn_ack) == book.ip_header + 20 + 4 + {(0, 0): 0, (0, 1): 4, (1, 0): 12, (1, 1): 12}[stamped, sack]


@pytest.mark.rule(24)
def test_every_segment_is_stamped_but_resets(play: Play) -> None:
    """RFC 7323 3.2: data, ACK, SACK, FIN, probe, keepalive; a RST needs none."""
    book = play(
        """
        app > P. 1:6(5) ack 1 ts 1001 ecr 1
        app < .  1:1(0) ack 6 ecr 1001
        app > P. 16:26(10) ack 1 ts 1002 ecr 1
        app < .  1:1(0) ack 6 sack 16:26 ecr 1001
        app > P. 6:16(10) ack 1 ts 1003 ecr 1
        app < .  1:1(0) ack 26 ecr 1003
        us  | write 10
        app < P. 1:11(10) ack 26 ecr 1003
        app > .  26:26(0) ack 11 win 0 ts 1003 ecr 1
        us  | write 10
        app < .  10:11(1) ack 26 ecr 1003      +0.25s
        app > .  26:26(0) ack 11 win 512 ts 1004 ecr 1
        app < P. 11:21(10) ack 26 ecr 1004
        app > .  26:26(0) ack 21 win 512 ts 1005 ecr 1
        app < .  20:20(0) ack 26 ecr 1005      +300s
        app > .  26:26(0) ack 21 win 512 ts 1006 ecr 1
        us  | finish
        app < F. 21:21(0) ack 26 ecr 1006
        """,
        begin=OPEN_STAMPS,
    )
    assert all(b"\x08\x0a" in packet[book.ip_header + 20 :] for packet in book.packets)

    book.play("us  | abort\napp < R. 22:22(0) ack 26")

    assert len(book.packets[-1]) == book.ip_header + 20


@pytest.mark.rule(27)
@pytest.mark.bug("Tailscale 7429e8912")
def test_a_repeated_syn_leaks_no_count() -> None:
    """From a source with a limit of its own: however often it comes, it is one request, and then none."""
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    stack.set_sources(frozenset((APP,)), [(4, 0xAC110000, 0xFFFF0000)])
    packet = bytes(build_tcp(b"\xac\x11\0\x02", ENDPOINT, 4000, 443, seq=7, flags=SYN, options=options(mss=1460)))
    for step in range(100):
        stack.handle_packet(packet, 0, True, 1.0 + step / 100)
    (flow,) = stack.take_requests()
    assert stack.undecided_count == 1
    assert stack._table.others.by_source == {b"\xac\x11\0\x02": 1}

    stack.refuse(flow, 2.0)

    assert stack.undecided_count == 0
    assert stack._table.others.by_source == {}
    assert stack.drops == {"duplicate_syn": 99}


# -- arrival ----------------------------------------------------------------------------------------------------------

CLOSING = (
    OPEN
    + """
    us  | finish
    app < F. 1:1(0) ack 1
    app > F. 1:1(0) ack 1
    app < .  2:2(0) ack 2
    us  | flow CLOSING
"""
)


@pytest.mark.rule(31)
@pytest.mark.scenario("tcp_ack_otw_seq_in_closing")
@pytest.mark.parametrize("offset", [1, 2, 100])
def test_what_lies_beyond_the_window_in_closing_is_answered(play: Play, offset: int) -> None:
    """Data always, what is empty twice a second, a FIN without ACK never."""
    edge = 2 + 65536 + offset
    play(
        f"""
        app > .  {edge}:{edge}(0) ack 2
        app < .  2:2(0) ack 2
        app > .  {edge}:{edge}(0) ack 2
        app > P. {edge}:{edge + 10}(10) ack 2
        app < .  2:2(0) ack 2
        app > P. {edge}:{edge + 10}(10) ack 2
        app < .  2:2(0) ack 2
        app > F  {edge}:{edge}(0)
        app < F. 1:1(0) ack 2             +0.25s
        app > S. {edge}:{edge}(0) ack 2   +0.3s
        app < .  2:2(0) ack 2
        us  | flow CLOSING
        """,
        begin=CLOSING,
        settings=tuned(receive_buffer=65536),
    )


STATES = {
    "ESTABLISHED": (OPEN, 1, 1),
    "CLOSE_WAIT": (OPEN + "app > F. 1:1(0) ack 1\napp < .  1:1(0) ack 2\n", 2, 1),
    "LAST_ACK": (
        OPEN + "app > F. 1:1(0) ack 1\napp < .  1:1(0) ack 2\nus | finish\napp < F. 1:1(0) ack 2\n",
        2,
        2,
    ),
    "FIN_WAIT_1": (OPEN + "us | finish\napp < F. 1:1(0) ack 1\n", 1, 2),
    "FIN_WAIT_2": (OPEN + "us | finish\napp < F. 1:1(0) ack 1\napp > . 1:1(0) ack 2\n", 1, 2),
    "CLOSING": (CLOSING, 2, 2),
}


@pytest.mark.rule(31, 35)
@pytest.mark.scenario("tcp_unacc_seq_ack")
@pytest.mark.bug("smoltcp eae48052")
@pytest.mark.parametrize("beyond", [1, 2, 1000])
@pytest.mark.parametrize("state", STATES)
def test_wrong_numbers_and_acks_change_no_state(play: Play, state: str, beyond: int) -> None:
    """An ACK of what was not sent is answered once in half a second; so is a number outside the window."""
    begin, theirs, ours = STATES[state]
    resent = ""
    if state in ("FIN_WAIT_1", "CLOSING", "LAST_ACK"):
        resent = f"app < F. {ours - 1}:{ours - 1}(0) ack {theirs}      +0.25s"
    play(
        f"""
        us  | flow {state}
        app > .  {theirs}:{theirs}(0) ack {ours + beyond}
        app < .  {ours}:{ours}(0) ack {theirs}
        app > .  {theirs}:{theirs}(0) ack {ours + beyond}
        app > .  {theirs + 70000}:{theirs + 70000}(0) ack {ours}    +0.24s
        {resent.replace("0.25", "0.01")}
        app > .  {theirs + 70000}:{theirs + 70000}(0) ack {ours}   +0.3s
        app < .  {ours}:{ours}(0) ack {theirs}
        us  | flow {state}
        """,
        begin=begin,
        settings=tuned(receive_buffer=65536),
    )


@pytest.mark.rule(35)
@pytest.mark.parametrize("urgent", ["", "U"], ids=["short way", "long way"])
def test_how_old_an_ack_may_be_follows_the_largest_window(play: Play, urgent: str) -> None:
    """MAX.SND.WND of RFC 5961 5.2 grows with the app's window, also long after the handshake."""
    play(
        f"""
        app > S  0:0(0)        win 1000 mss 1460
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .{urgent} 1:1(0) ack 1  win 1000
        app > .{urgent} 1:1(0) ack 1  win 60000
        us  | write 30000
        app < P. 1:30001(30000) ack 1
        app > .{urgent} 1:1(0) ack 30001 win 60000
        app > P.{urgent} 1:6(5) ack 10001 win 60000 "hello"
        app < .  30001:30001(0) ack 6
        us  | write 40000
        app < P. 30001:70001(40000) ack 6
        app > .{urgent} 6:6(0) ack 70001 win 60000
        app > P.{urgent} 6:11(5) ack 10000 win 60000 "never"
        app < .  70001:70001(0) ack 6
        us  | readable 5
        """
    )


@pytest.mark.rule(28, 34)
def test_an_answer_before_the_handshake_is_over_is_given_once(play: Play) -> None:
    """Whatever the owner does afterwards, the ACK that was owed is not owed again."""
    play(
        OPEN.rsplit("app > .", 1)[0]
        + """
        app > R  3:3(0)
        app < .  1:1(0) ack 1
        us  | write 100
        us  | flow SYN_RECEIVED
        app > .  1:1(0) ack 1  win 512
        app < P. 1:101(100) ack 1
        """
    )


@pytest.mark.rule(35, 67)
@pytest.mark.parametrize("state", ["FIN_WAIT_1", "FIN_WAIT_2"])
def test_a_fin_with_an_old_ack_counts(play: Play, state: str) -> None:
    """Linux tcp_disorder_fin_in_FIN_WAIT.pkt: it was overtaken by the ACK that followed it."""
    after = {"FIN_WAIT_1": "CLOSING", "FIN_WAIT_2": "TIME_WAIT"}[state]
    acknowledged = "app > .  1:1(0) ack 102 win 512" if state == "FIN_WAIT_2" else ""
    play(
        f"""
        us  | write 100
        app < P. 1:101(100) ack 1
        us  | finish
        app < F. 101:101(0) ack 1
        {acknowledged}
        us  | flow {state}
        app > F. 1:1(0) ack 51 win 512
        app < .  102:102(0) ack 2
        us  | flow {after}
        """,
        begin=OPEN,
    )


# -- receiving --------------------------------------------------------------------------------------------------------


@pytest.mark.rule(42)
@pytest.mark.bug("smoltcp 0d304bc4")
def test_a_waiting_ack_is_put_off_by_nothing(play: Play) -> None:
    """The 20 ms count from the first segment, however many small ones follow it."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    assert book.flow is not None
    book.flow._interactive = 3

    book.play("""
        app > P. 1:11(10) ack 1
        app < .  1:1(0) ack 11
        app > P. 11:21(10) ack 1
        app > P. 21:31(10) ack 1          +0.006s
        app > P. 31:41(10) ack 1          +0.006s
        app > P. 41:51(10) ack 1          +0.006s
        app < .  1:1(0) ack 51            +0.002s
    """)


@pytest.mark.rule(43)
@pytest.mark.scenario("tcp_zero_receive_window")
@pytest.mark.parametrize("size", [10, 100, 512, 1000, 1460, 20000])
def test_payloads_of_any_size_end_in_a_closed_window(size: int) -> None:
    """Whatever the window's granularity: no byte beyond the promise is taken, and at the end there is none."""
    book = Playbook(settings=tuned(receive_buffer=20000))
    book.play(OPEN.replace("win 65535 mss 1460 wscale 8", "win 20000 mss 1460 wscale 8"))
    flow = book.flow
    assert flow is not None
    for _ in range(200_000 // size):
        left = flow.rcv_edge - flow.rcv_nxt
        if not left:
            break
        give(book, from_app(book, flow.rcv_nxt, bytes(min(size, left))))

    assert flow.rcv_edge == flow.rcv_nxt
    assert book.packets[-1][34:36] == b"\0\0"
    assert flow.readable_bytes <= 20000 + 65536 + 256
    give(book, from_app(book, flow.rcv_nxt, b"x"))
    assert flow.rcv_edge == flow.rcv_nxt


@pytest.mark.rule(31, 40)
def test_a_fin_at_the_right_edge_is_not_remembered(play: Play) -> None:
    """It takes a number, and there is none left for it; when all before it is here it may come again."""
    book = play("us  | flow ESTABLISHED", begin=OPEN, settings=tuned(receive_buffer=65536))
    assert book.flow is not None
    edge = book.flow.rcv_edge

    book.play(f"""
        app > F. {edge}:{edge}(0) ack 1
        app < .  1:1(0) ack 1
        app > P. 1:30001(30000) ack 1
        app < .  1:1(0) ack 30001
        app > P. 30001:{edge}({edge - 30001}) ack 1
        app < .  1:1(0) ack {edge}
        us  | flow ESTABLISHED
        app > F. {edge}:{edge}(0) ack 1
        app < .  1:1(0) ack {edge + 1}
        us  | flow CLOSE_WAIT
    """)


@pytest.mark.rule(40)
def test_what_follows_a_fin_is_dropped_and_answered(play: Play) -> None:
    """Bytes behind the end are nobody's (RFC 9293 3.10.7.4, seventh); each is counted, and not handed out."""
    play(
        """
        app > F. 1:1(0) ack 1
        app < .  1:1(0) ack 2
        app > P. 2:12(10) ack 1
        app < .  1:1(0) ack 2
        app > P. 2:12(10) ack 1
        us  | drops after_fin 2
        us  | readable 0
        us  | flow CLOSE_WAIT
        """,
        begin=OPEN,
    )


# -- sending ----------------------------------------------------------------------------------------------------------


@pytest.mark.rule(45)
@pytest.mark.scenario("tcp_send_window_sizes_piggyback")
@pytest.mark.bug("smoltcp 2080152b")
@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_windows_around_the_size_of_a_segment(play: Play, spare: int) -> None:
    """One byte less: the segment is split; just so, or one more: it goes whole, and nothing beyond."""
    window = 1460 + spare
    first = min(window, 1460)
    more = ""
    if first < 1460:
        more = f"""
        app > .  6:6(0) ack {1 + first} win {window}
        app < P. {1 + first}:1461({1460 - first}) ack 6
        """
    play(
        f"""
        app > S  0:0(0)        win {window} mss 1460
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1  win {window}
        app > P. 1:6(5) ack 1  win {window}
        app < .  1:1(0) ack 6
        us  | write 1460
        app < {"." if more else "P."} 1:{1 + first}({first}) ack 6
        {more}
        """
    )


@pytest.mark.rule(45, 48)
@pytest.mark.bug("Tailscale 8e42510a7")
@pytest.mark.parametrize("offload", [True, False])
def test_every_way_out_knows_how_large_a_segment_may_be(play: Play, offload: bool) -> None:
    """First sendings, holes that SACK shows, duplicates, timeouts: what the device shall cut says so, all else fits."""
    book = play("us  | flow ESTABLISHED", begin=OPEN_STAMPS, settings=tuned(offload=offload))
    flow, stack = book.flow, book.stack
    assert flow is not None
    seen: list[tuple[int, int]] = []

    def write(header: bytearray | memoryview, views: object, gso: int) -> bool:
        seen.append((sum(map(len, views)), gso))  # type: ignore[call-overload]  # the views are bytes-like
        return True

    def say(ack: int, *sacks: tuple[int, int]) -> None:
        numbers = [((flow.iss + left) & MASK, (flow.iss + right) & MASK) for left, right in sacks]
        option = options(timestamp=(1001, 0), sacks=numbers)
        give_quietly(from_app(book, 1, ack=flow.iss + ack, options=option))

    def give_quietly(packet: bytearray) -> None:
        stack.handle_packet(bytes(packet), 0, True, book.now)
        stack.flush(flow, write, book.now)

    flow.write(bytes(100_000), book.now)
    stack.flush(flow, write, book.now)
    say(1, (20_001, 40_001))
    say(1, (20_001, 40_001), (60_001, 100_001))
    say(5_001)
    for _ in range(3):
        book.now = stack.next_deadline()
        stack.handle_timeout(book.now)
        stack.flush(flow, write, book.now)
    say(50_001)
    say(100_001)

    assert sum(size for size, _ in seen) > 120_000, "much of it was sent twice"
    for size, gso in seen:
        assert (gso == 1448) if size > 1448 else (gso == 0)
        assert offload or size <= 1448


@pytest.mark.rule(46)
@pytest.mark.bug("smoltcp 521e722b")
def test_a_probe_needs_no_congestion_window(play: Play) -> None:
    """After a timeout one segment may be on the way; a window that then closes is probed all the same."""
    book = play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app < .  1:1461(1460) ack 1          +0.25s
        app > .  1:1(0) ack 1461 win 0
        app < .  1460:1460(0) ack 1          +0.5s
        app > .  1:1(0) ack 1461 win 0
        """,
        begin=OPEN,
    )
    assert book.flow is not None
    book.flow._cwnd = 1

    book.play("""
        app < .  1460:1460(0) ack 1          +1.0s
        app > .  1:1(0) ack 1461 win 0
    """)


@pytest.mark.rule(36, 48)
@pytest.mark.bug("gVisor f3de211bb")
def test_recovery_stays_within_the_window(play: Play) -> None:
    """What was taken back is not resent into a window that is not there, whatever the duplicates say."""
    play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app > .  1:1(0) ack 1 win 8
        app > .  1:1(0) ack 1 win 8
        app > .  1:1(0) ack 1 win 8
        app > .  1:1(0) ack 1 win 8
        app < .  1:1025(1024) ack 1
        app > .  1:1(0) ack 1 win 8
        us  | open
        """,
        begin=OPEN,
    )


@pytest.mark.rule(47)
@pytest.mark.bug("smoltcp f09883d4", "smoltcp a25c9f2f")
def test_an_ack_of_the_first_sending_counts_after_a_resending(play: Play) -> None:
    """It was only late: all it names is delivered, nothing more is sent, and no timer is left."""
    book = play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app < .  1:1461(1460) ack 1          +0.25s
        app < .  1:1461(1460) ack 1          +0.5s
        app > .  1:1(0) ack 7301 win 512
        us  | delivered
        us  | open                           +200s
        """,
        begin=OPEN,
    )
    assert book.flow is not None
    assert book.flow._rto_at == float("inf")


@pytest.mark.rule(47)
def test_each_round_trip_is_measured_from_its_own_segment(play: Play) -> None:
    """What was idle in between is nobody's round trip: after a minute the timer is as short as it was."""
    play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 101 win 512       +0.01s
        us  | write 100                       +60s
        app < P. 101:201(100) ack 1
        app > .  1:1(0) ack 201 win 512       +0.01s
        us  | write 100                       +60s
        app < P. 201:301(100) ack 1
        app < P. 201:301(100) ack 1           +0.25s
        """,
        begin=OPEN,
    )


@pytest.mark.rule(47)
@pytest.mark.scenario("tcp_retransmits", "tcp_user_timeout")
def test_gaps_double_up_to_a_minute(play: Play) -> None:
    """Each time in turn until nobody is believed to be there any more, at the first that is due after 100 s."""
    gaps = (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    resent = "\n".join(f"app < P. 1:101(100) ack 1   +{gap}s" for gap in gaps)
    play(
        f"""
        us  | write 100
        app < P. 1:101(100) ack 1
        {resent}
        us  | open                   +59.9s
        app < R. 101:101(0) ack 1    +0.1s
        us  | failure timeout
        """,
        begin=OPEN,
    )


@pytest.mark.rule(49)
def test_idling_costs_no_congestion_window(play: Play) -> None:
    """The link is this machine: what was true a minute ago is true."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    assert book.flow is not None
    before = book.flow._cwnd

    book.play("""
        us  | write 100                      +250s
        app < P. 1:101(100) ack 1
    """)

    assert book.flow._cwnd == before


# -- closing ----------------------------------------------------------------------------------------------------------


@pytest.mark.rule(50, 54)
@pytest.mark.parametrize("passive", [False, True])
def test_an_ack_of_all_data_is_none_of_the_fin(play: Play, passive: bool) -> None:
    """The FIN is one number more; until that is acknowledged it is resent."""
    begin, theirs = (OPEN + "app > F. 1:1(0) ack 1\napp < .  1:1(0) ack 2\n", 2) if passive else (OPEN, 1)
    state = "LAST_ACK" if passive else "FIN_WAIT_1"
    play(
        f"""
        us  | write 100
        app < P. 1:101(100) ack {theirs}
        us  | finish
        app < F. 101:101(0) ack {theirs}
        app > .  {theirs}:{theirs}(0) ack 101 win 512
        us  | flow {state}
        app < F. 101:101(0) ack {theirs}      +0.25s
        app > .  {theirs}:{theirs}(0) ack 102 win 512
        us  | {"closed" if passive else "flow FIN_WAIT_2"}
        """,
        begin=begin,
    )


@pytest.mark.rule(54, 47)
@pytest.mark.bug("lwIP 51937")
def test_a_passive_close_with_lost_data_leaves_nothing(play: Play) -> None:
    """The app closed and vanished; our bytes are given up after a while, and the flow with them."""
    book = play(
        """
        app > F. 1:1(0) ack 1
        app < .  1:1(0) ack 2
        us  | write 100
        app < P. 1:101(100) ack 2
        us  | finish
        app < F. 101:101(0) ack 2
        us  | flow LAST_ACK
        """,
        begin=OPEN,
    )
    while book.stack.flow_count and book.now < 1000.0:
        book.now = book.stack.next_deadline()
        book.stack.handle_timeout(book.now)
        book._serve()

    assert book.now < 300.0
    assert book.flow is not None
    assert book.flow.failure == "timeout"
    assert book.stack.buffered_bytes == 0
    assert book.stack.next_deadline() == float("inf")


@pytest.mark.rule(50)
@pytest.mark.bug("lwIP 47485")
def test_closing_needs_no_memory(play: Play) -> None:
    """All buffers are full, of others: a FIN goes out all the same."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    book.stack._host.budget.used += book.stack._host.budget.limit

    book.play("""
        us  | finish
        app < F. 1:1(0) ack 1
        app > F. 1:1(0) ack 2
        app < .  2:2(0) ack 2
        us  | flow TIME_WAIT
    """)


@pytest.mark.rule(64)
def test_a_newer_number_without_a_stamp_opens_too(play: Play) -> None:
    """The stamps of others that came meanwhile say nothing about a SYN that has none."""
    book = play(
        """
        us  | finish
        app < F. 1:1(0) ack 1 ecr 1000
        app > F. 1:1(0) ack 2 ts 1001 ecr 1
        app < .  2:2(0) ack 2 ecr 1001
        us  | flow TIME_WAIT
        """,
        begin=OPEN_STAMPS,
    )
    give(book, build_tcp(book.app, book.endpoint, 41000, 443, seq=7, flags=SYN, options=options(timestamp=(1, 0))))
    book.stack.take_requests()

    book.play("""
        us  | new 1000
        app > S  0:0(0) win 65535 mss 1460
        us  | request 10.107.0.2:443
    """)


@pytest.mark.rule(66)
@pytest.mark.bug("Tailscale ca39c4e15")
def test_time_wait_holds_no_buffers(play: Play) -> None:
    """Once the owner has read what came, a record of a hundred bytes is left, and no reference to the flow."""
    book = play(
        """
        app > P. 1:60001(60000) ack 1
        app < .  1:1(0) ack 60001
        us  | write 3000
        app < P. 1:3001(3000) ack 60001
        us  | finish
        app < F. 3001:3001(0) ack 60001
        app > F. 60001:60001(0) ack 3002
        app < .  3002:3002(0) ack 60002
        us  | read 60000
        """,
        begin=OPEN,
    )
    flow = book.flow
    assert flow is not None

    assert (book.stack.flow_count, book.stack.time_wait_count, book.stack.buffered_bytes) == (0, 1, 0)
    assert (flow.held_bytes, len(flow.readable_views()), len(flow._send.pieces)) == (0, 0, 0)
    assert flow not in book.stack.flows.values()
