"""Traffic that means harm, with literal times: what it can cost is bounded, and whoever means well is served on.

Every packet goes through `Wire`, which holds the stack to its word: a packet is dropped under exactly one reason or
has an effect that can be seen, never both and never neither.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from tun.core.buffers import MAX_RANGES
from tun.core.flows import TIME_WAIT_LIMIT, TimeWait
from tun.core.fragments import MAX_BYTES, MAX_DATAGRAMS
from tun.core.machine import LAST_RESORT
from tun.core.stack import Flow, Stack, StackSettings, initial_numbers
from tun.core.states import ESTABLISHED
from tun.testing.playbook import tuned
from tun.wire import icmp
from tun.wire.checksum import internet_checksum
from tun.wire.ipv4 import FLAG_MF, build_ipv4
from tun.wire.tcp import ACK, FIN, PSH, RST, SYN, URG, Segment, build_tcp, options, parse_tcp

ENDPOINT = b"\x0a\x6b\x00\x02"
APP = b"\x0a\x6b\x00\x01"
NOBODY = b"\x0a\x6b\x00\x63"
MASK = 0xFFFFFFFF
GUESTS = (4, 0xAC100000, 0xFFF00000)  # 172.16/12


class Wire:
    """A stack, and a count of what became of each packet."""

    def __init__(self, settings: StackSettings | None = None, *, anybody: bool = False) -> None:
        self.stack = Stack(settings or StackSettings(), b"k" * 32)
        self.stack.set_served({ENDPOINT: frozenset((443,))})
        if not anybody:
            self.stack.set_sources(frozenset((APP,)), [GUESTS])
        self.now = 100.0
        self.taken = 0
        self.replies: list[bytes] = []
        self.sent: list[bytes] = []  # headers of what flows have sent, and
        self.sent_bytes = 0
        self.gso: list[int] = []

    def give(self, packet: bytes | bytearray, *, verified: bool = True) -> str:
        """Hand a packet in. Returns: why it was dropped, or "" when it was taken."""
        stack = self.stack
        before = dict(stack.drops)
        seen = self._effects()
        stack.handle_packet(bytes(packet), 0, verified, self.now)
        reasons = [reason for reason, count in stack.drops.items() for _ in range(count - before.get(reason, 0))]
        assert len(reasons) <= 1, reasons
        if not reasons:
            assert self._effects() != seen, "neither dropped nor taken"
            self.taken += 1
        self.serve()
        return reasons[0] if reasons else ""

    def _effects(self) -> tuple[object, ...]:
        stack = self.stack
        host = stack._host
        touched = tuple((flow.state, flow.rcv_nxt, flow.snd_una, flow.snd_edge) for flow in host.touched)
        return stack.opened, stack.replies_sent, stack.cancelled, touched, stack._reassembler.bytes_held

    def flood(self, packet: bytes | bytearray) -> None:
        """Like `give`, for so many packets that only their sum is checked (`check`)."""
        before = sum(self.stack.drops.values())
        self.stack.handle_packet(bytes(packet), 0, True, self.now)
        after = sum(self.stack.drops.values())
        assert before <= after <= before + 1
        self.taken += before == after

    def check(self) -> None:
        """Every packet: taken, or dropped once."""
        assert self.stack.packets == self.taken + sum(self.stack.drops.values())

    def serve(self) -> None:
        for flow in self.stack.take_touched():
            self.stack.flush(flow, self.write, self.now)
        self.replies += [bytes(reply) for reply in self.stack.take_replies()]

    def write(self, header: bytearray | memoryview, views: object, gso: int) -> bool:
        self.sent.append(bytes(header))
        self.gso.append(gso)
        self.sent_bytes += sum(map(len, views))  # type: ignore[call-overload]  # the views are bytes-like
        return True

    def sleep(self, seconds: float) -> None:
        """Let time pass, and everything that is due in it happen."""
        end = self.now + seconds
        while self.stack.next_deadline() <= end:
            self.now = max(self.stack.next_deadline(), self.now)
            self.stack.handle_timeout(self.now)
            self.serve()
        self.now = end

    def connect(self, port: int = 4000, source: bytes = APP, *, window: int = 65535, extra: bytes = b"") -> Flow:
        """A connection that is open; what it took is forgotten."""
        self.give(segment(port, 0, SYN, source=source, window=window, extra=extra))
        (flow,) = self.stack.take_requests()
        self.stack.accept(flow, self.now)
        self.serve()
        self.give(segment(port, 1, ACK, ack=flow.snd_nxt, source=source, window=window))
        assert flow.state == ESTABLISHED
        self.sent.clear()
        return flow


def segment(
    port: int,
    seq: int,
    flags: int,
    payload: bytes = b"",
    *,
    ack: int = 0,
    source: bytes = APP,
    window: int = 65535,
    extra: bytes = b"",
    to: int = 443,
) -> bytes:
    return bytes(
        build_tcp(
            source, ENDPOINT, port, to,
            seq=seq & MASK, ack=ack & MASK, flags=flags, window=window, payload=payload, options=extra,
        )
    )  # fmt: skip


def resident() -> int:
    """Bytes of memory that this process has; 0 where only Linux would know."""
    if not os.path.exists("/proc/self/statm"):
        return 0
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def guest(rng: random.Random) -> bytes:
    """A random address of the network that is allowed."""
    return struct.pack("!I", 0xAC100000 | rng.getrandbits(20) | 1)


# -- floods -----------------------------------------------------------------------------------------------------------


def test_a_flood_of_syns_from_everywhere_leaves_room_for_this_host() -> None:
    """50,000 in ten seconds from random guests, none of which is ever decided; this host connects each second."""
    wire = Wire()
    rng = random.Random(1)
    before = resident()
    served = 0
    for step in range(50_000):
        wire.now += 10 / 50_000
        wire.flood(segment(rng.randint(1, 65535), rng.getrandbits(32), SYN, source=guest(rng)))
        if step % 100 == 99:
            wire.stack.handle_timeout(wire.now)
            wire.serve()
            assert wire.stack.undecided_count <= 1024
            assert sum(wire.stack._table.others.by_source.values()) <= 1024 * 2 // 3
        if step % 5000 == 4999:
            wire.stack.take_requests()
            wire.connect(10000 + step)
            served += 1
    wire.check()

    assert served == 10
    assert resident() - before < 50 * 2**20
    wire.sleep(60.0)
    assert wire.stack.undecided_count == wire.stack.half_open_count == 0
    assert wire.stack._table.others.by_source == {}
    assert wire.stack.flow_count == 10


def test_one_guest_leaves_room_for_the_others() -> None:
    """Of what guests share, one of them has two thirds at most; also of the few places that are left under pressure."""
    wire = Wire(tuned(undecided=900))
    one, other = b"\xac\x10\0\x01", b"\xac\x10\0\x02"
    for port in range(1, 401):
        wire.give(segment(port, 0, SYN, source=one))
    for port in range(1, 101):
        wire.give(segment(port, 0, SYN, source=other))
    assert wire.stack._table.others.by_source == {one: 400, other: 100}

    wire.give(segment(401, 0, SYN, source=one))
    for flow in list(wire.stack._table.others.flows.values()):
        wire.stack.refuse(flow, wire.now)
    for number in range(4000):
        wire.now += 0.0005
        wire.flood(segment(number % 60000 + 1, number, SYN, source=one))  # of no use, but it presses
        wire.flood(segment(number % 1500 + 1000, 0, SYN, source=one))
        wire.flood(segment(number % 1500 + 1000, 0, SYN, source=other))
    wire.check()

    assert wire.stack._table.others.by_source == {one: 50, other: 25}


def test_half_open_flows_of_a_flood_push_out_each_other() -> None:
    """Everything is accepted at once and nobody completes: the oldest goes, and who completes is not the oldest."""
    wire = Wire()
    rng = random.Random(2)
    kept = []
    for step in range(5000):
        wire.now += 0.0001
        wire.flood(segment(rng.randint(1, 65535), rng.getrandbits(32), SYN, source=guest(rng)))
        for flow in wire.stack.take_requests():
            wire.stack.accept(flow, wire.now)
        wire.serve()
        assert wire.stack.half_open_count <= 1024
        if step % 1000 == 999:
            kept.append(wire.connect(10000 + step))
    wire.check()

    assert [flow.failure for flow in kept] == [""] * 5
    assert 1000 < wire.stack.half_open_count <= 1024
    wire.sleep(60.0)
    assert wire.stack.half_open_count == 0
    assert wire.stack._table.foreign_half_open == {}
    assert wire.stack.flow_count == 5


def test_the_oldest_is_found_without_a_search() -> None:
    """Thousands of open flows before it must not make each SYN of a flood a walk through all of them."""

    class Watched(dict[bytes, Flow]):
        def values(self) -> NoReturn:
            raise AssertionError("a search through all flows")

    wire = Wire(tuned(half_open=3))
    for port in range(1000, 1010):
        wire.connect(port)
    wire.stack._table.flows = Watched(wire.stack._table.flows)
    wire.stack.flows = wire.stack._table.flows
    for port in range(2000, 2010):
        wire.give(segment(port, 0, SYN))
        (request,) = wire.stack.take_requests()
        wire.stack.accept(request, wire.now)
        wire.serve()

    assert wire.stack.half_open_count == 3
    assert wire.stack.flow_count == 13


def test_a_flood_does_not_disturb_who_is_connected() -> None:
    """Bytes go on while SYNs, strays and noise come by the thousand."""
    wire = Wire()
    flow = wire.connect()
    rng = random.Random(3)
    for step in range(200):
        wire.give(segment(4000, 1 + step * 100, ACK | PSH, bytes(100), ack=flow.snd_nxt))
        flow.consume(flow.readable_bytes, wire.now)
        for _ in range(20):
            wire.now += 0.00005
            kind = rng.choice((SYN, ACK, RST, FIN, 0, SYN | ACK, URG | PSH))
            wire.flood(segment(rng.randint(5000, 65535), rng.getrandbits(32), kind, ack=rng.getrandbits(32)))
        wire.stack.take_requests()
    wire.check()

    assert flow.bytes_from_app == 20_000
    assert not flow.failure


@pytest.mark.bug("lwIP tcp_kill_prio")
def test_windows_that_never_open_do_not_hold_the_memory() -> None:
    """sockstress: 1,000 flows whose window closes while we push; the budget holds, and new ones are served."""
    budget = 16 * 2**20
    wire = Wire(tuned(buffers=budget, half_open=2000, undecided=2000))
    record = memoryview(bytes(65536))
    flows = [wire.connect(1000 + index, window=0) for index in range(1000)]
    for _ in range(10):
        for flow in flows:
            flow.write(record, wire.now)
            wire.stack.flush(flow, wire.write, wire.now)
    assert wire.stack.buffered_bytes <= budget + 1000 * LAST_RESORT

    fresh = wire.connect(500)
    assert fresh.write(record, wire.now) == LAST_RESORT
    wire.stack.flush(fresh, wire.write, wire.now)
    wire.give(segment(500, 1, ACK, ack=fresh.snd_nxt))
    assert fresh.all_acknowledged

    for _ in range(40):
        wire.sleep(1.0)
    evicted = [flow for flow in flows if flow.failure == "evicted"]
    assert evicted
    assert not fresh.failure
    assert wire.stack.buffered_bytes <= budget
    wire.check()


def test_a_drip_is_no_progress() -> None:
    """A byte acknowledged every ten seconds does not save a flow that holds what others need."""
    wire = Wire(tuned(buffers=2 * 2**20))
    flows = [wire.connect(1000 + index) for index in range(8)]
    for flow in flows:
        flow.bytes_to_app = 1_000_000  # as if it had been an eager reader before
        flow.write(memoryview(bytes(400_000)), wire.now)
        wire.stack.flush(flow, wire.write, wire.now)
    for _ in range(4):
        wire.sleep(10.0)
        for index, flow in enumerate(flows):
            if not flow.closed:
                wire.give(segment(1000 + index, 1, ACK, ack=flow.snd_una + 1, window=0))

    assert any(flow.failure == "evicted" for flow in flows)
    assert wire.stack.buffered_bytes < 2 * 2**20


def test_timewait_cannot_be_filled() -> None:
    """1,500 connections that end at once, room for 1,000 records: no flow is left, and no byte."""
    wire = Wire()
    record = TimeWait(wire.connect(999), wire.now)
    for index in range(TIME_WAIT_LIMIT - 1000):
        wire.stack._table.hold(index.to_bytes(12, "big"), record)
    wire.give(segment(999, 1, RST))
    for index in range(1500):
        source = struct.pack("!I", 0xAC100001 + index // 1000)
        flow = wire.connect(1000 + index % 1000, source)
        flow.finish(wire.now)
        wire.stack.flush(flow, wire.write, wire.now)
        wire.give(segment(1000 + index % 1000, 1, ACK | FIN, ack=flow.snd_nxt, source=source))
    wire.check()

    assert wire.stack.time_wait_count == TIME_WAIT_LIMIT
    assert (wire.stack.flow_count, wire.stack.buffered_bytes) == (0, 0)


# -- segments ---------------------------------------------------------------------------------------------------------


@pytest.mark.rule(39)
def test_every_second_byte_for_ever() -> None:
    """SegmentSmack (CVE-2018-5390): ten flows, few ranges each, little time for a segment, all in order."""
    wire = Wire()
    flows = [wire.connect(1000 + index, extra=options(sack_permitted=True)) for index in range(10)]
    started = time.process_time()
    for index in range(1000):
        for flow in flows:
            wire.flood(segment(flow.source[1], 3 + 2 * index, ACK, b"x", ack=flow.snd_nxt))
        wire.serve()
    assert time.process_time() - started < 5.0
    for flow in flows:
        waiting = flow._out_of_order
        assert waiting is not None
        assert len(waiting.starts) == MAX_RANGES
        assert flow.held_bytes <= MAX_RANGES * 300
    wire.check()

    for flow in flows:
        wire.give(segment(flow.source[1], 1, ACK, bytes(3000), ack=flow.snd_nxt))
        assert flow.readable_bytes == 3000


@pytest.mark.parametrize(("size", "gap"), [(1, 0), (1, 1), (2100, 0), (2100, 1)])
def test_small_segments_in_large_packets_pin_nothing(size: int, gap: int) -> None:
    """What is kept is the payload, not the 64 KiB that it came in: 10,000 would be 640 MiB."""
    wire = Wire()
    flow = wire.connect(window=65535, extra=options(window_scale=7))
    padding = bytes(60_000)
    before = resident()
    position = 1 + gap
    for _ in range(10_000 if size == 1 else 200):
        wire.flood(segment(4000, position, ACK, bytes(size), ack=flow.snd_nxt) + padding)
        wire.serve()
        position += size + gap
    wire.check()

    assert resident() - before < 8 * 2**20
    kept = flow.readable_bytes + (flow._out_of_order.charge if flow._out_of_order is not None else 0)
    assert kept > 0
    views = [*flow.readable_views()]
    if flow._out_of_order is not None:
        views += [piece for pieces in flow._out_of_order.pieces for piece in pieces]
    assert sum(len(bytes(view.obj)) for view in views) <= 2 * kept + 4096 + 64 * len(views)


def test_option_loops_cost_nothing_and_change_nothing() -> None:
    """Every kind with every length that fits, in a connection (the AMNESIA:33 class)."""
    wire = Wire()
    flow = wire.connect()
    position = 1
    started = time.process_time()
    for kind in range(256):
        for length in range(41):
            extra = bytes((1, 1, kind, length)) + bytes(4)
            wire.flood(segment(4000, position, ACK, b"x", ack=flow.snd_nxt, extra=extra))
            position += 1
        flow.consume(flow.readable_bytes, wire.now)
        wire.serve()
    assert time.process_time() - started < 5.0
    wire.check()

    assert flow.bytes_from_app == 256 * 41
    assert not flow.failure


@pytest.mark.rule(32, 34)
@pytest.mark.bug("lwIP 48170", "smoltcp f6a73807")
def test_a_sweep_of_resets_over_all_numbers() -> None:
    """RFC 5961: half a window per step, 131,072 of them in a second: not reset, and two answers at most."""
    wire = Wire()
    flow = wire.connect()
    for step in range(131_072):
        wire.now += 1 / 131_072
        wire.flood(segment(4000, 2 + 1000 + step * 32768, RST))
        if flow._ack_owed:
            wire.serve()
    wire.serve()
    wire.check()

    assert not flow.failure
    assert len(wire.sent) <= 3
    assert wire.stack.drops["bad_reset"] + wire.stack.drops["reset_in_window"] == 131_072


@pytest.mark.rule(33, 34)
@pytest.mark.parametrize("flags", [SYN, SYN | ACK])
def test_a_sweep_of_syns_over_all_numbers(flags: int) -> None:
    """RFC 5961 4: no SYN moves a connection, and few are answered."""
    wire = Wire()
    flow = wire.connect()
    for step in range(8192):
        wire.now += 1 / 8192
        wire.give(segment(4000, step << 19, flags, ack=step << 19))
    wire.check()

    assert flow.state == ESTABLISHED
    assert len(wire.sent) <= 3
    assert wire.stack.drops == {"syn_in_connection": 8192}


@pytest.mark.rule(31, 35)
def test_a_sweep_of_data_changes_no_byte() -> None:
    """Neither the number alone nor the ACK alone is enough (RFC 5961 5.2)."""
    wire = Wire()
    flow = wire.connect()
    expected = b""
    for step in range(2048):
        wire.now += 0.001
        wire.give(segment(4000, 7000 + (step << 21), ACK | PSH, b"evil" * 10, ack=flow.snd_nxt))
        wire.give(segment(4000, flow.rcv_nxt, ACK | PSH, b"evil" * 10, ack=flow.snd_nxt + 70000 + (step << 20)))
        if step % 16 == 0:
            good = struct.pack("!I", step) * 5
            wire.give(segment(4000, flow.rcv_nxt, ACK | PSH, good, ack=flow.snd_nxt))
            expected += good
    wire.check()

    assert b"".join(flow.readable_views())[: len(expected)] == expected
    assert not flow.failure


@pytest.mark.rule(35)
def test_optimistic_acks_free_nothing_and_open_nothing() -> None:
    """Who acknowledges ahead of us would make us send ahead of the network."""
    wire = Wire()
    flow = wire.connect(extra=options(window_scale=7))
    flow.write(memoryview(bytes(500_000)), wire.now)
    wire.stack.flush(flow, wire.write, wire.now)
    before = (flow.snd_una, flow.snd_nxt, flow._cwnd, flow.held_bytes, flow.snd_edge)
    sent = len(wire.sent)
    for ahead in range(1, 2000):
        wire.now += 0.001
        assert wire.give(segment(4000, 1, ACK, ack=flow.snd_nxt + ahead * 1460)) == "ack_of_unsent"
    wire.check()

    assert (flow.snd_una, flow.snd_nxt, flow._cwnd, flow.held_bytes, flow.snd_edge) == before
    assert len(wire.sent) - sent <= 5


@pytest.mark.rule(49)
@pytest.mark.parametrize("avoiding", [False, True], ids=["slow start", "avoidance"])
def test_dividing_acks_gains_nothing(avoiding: bool) -> None:
    """RFC 3465: a byte acknowledged opens the window by what it is worth, in however many ACKs it comes."""

    def growth(step: int) -> int:
        wire = Wire()
        flow = wire.connect(extra=options(window_scale=7, mss=1460))
        flow._cwnd = 29_200
        if avoiding:
            flow._ssthresh = 29_200
        flow.write(memoryview(bytes(200_000)), wire.now)
        wire.stack.flush(flow, wire.write, wire.now)
        una = flow.snd_una
        for ack in range(una + step, una + 14_600 + 1, step):
            wire.give(segment(4000, 1, ACK, ack=ack))
        return flow._cwnd - 29_200

    assert growth(1) <= growth(1460)
    assert growth(10) <= growth(1460)
    assert growth(1460) <= 14_600


@pytest.mark.rule(48)
def test_sack_nonsense_is_bounded() -> None:
    """CVE-2019-11477 and its kin: smallest MSS, thousands of blocks, all shapes: little is resent, little is kept."""
    wire = Wire()
    flow = wire.connect(extra=options(sack_permitted=True, mss=48, window_scale=7))
    flow.write(memoryview(bytes(200_000)), wire.now)
    wire.stack.flush(flow, wire.write, wire.now)
    rng = random.Random(4)
    una, nxt = flow.snd_una, flow.snd_nxt
    started = time.process_time()
    for _ in range(3000):
        wire.now += 0.00001
        sacks = []
        for _ in range(4):
            left = rng.choice((una + rng.randint(-5000, 210_000), rng.getrandbits(32), nxt - 3))
            sacks.append((left & MASK, (left + rng.choice((0, 1, 48, 2000, -7, 1 << 31))) & MASK))
        wire.give(segment(4000, 1, ACK, ack=una, extra=options(sacks=sacks)))
        assert flow._scoreboard is None or len(flow._scoreboard.lefts) <= 64
    assert time.process_time() - started < 5.0
    wire.check()

    assert wire.sent_bytes <= 2 * 200_000
    assert flow.snd_una == una
    wire.give(segment(4000, 1, ACK, ack=nxt))
    assert flow.all_acknowledged


# -- who and for whom -------------------------------------------------------------------------------------------------


def echo(source: bytes, destination: bytes, data: bytes = b"ping") -> bytes:
    message = bytearray(b"\x08\0\0\0\x12\x34\0\x01" + data)
    message[2:4] = internet_checksum(message).to_bytes(2, "big")
    return bytes(build_ipv4(source, destination, 1, len(message)) + message)


@pytest.mark.rule(3)
@pytest.mark.parametrize(
    ("source", "destination"),
    [
        (ENDPOINT, ENDPOINT),  # LAND
        (b"\x7f\0\0\1", ENDPOINT),
        (b"\0\0\0\0", ENDPOINT),
        (b"\xe0\0\0\1", ENDPOINT),
        (b"\xff\xff\xff\xff", ENDPOINT),
        (b"\x0a\x6b\0\0", ENDPOINT),
        (b"\x0a\x6b\xff\xff", ENDPOINT),
        (b"\x0a\x6b\0\x63", ENDPOINT),  # nobody's address of ours
        (b"\x0a\x6b\0\x63", b"\x0a\x6b\0\x63"),
        (b"\x0a\x6b\0\x63", b"\x0a\x6b\0\x64"),
        (APP, APP),
        (APP, b"\x0a\x6b\xff\xff"),
        (APP, b"\xe0\0\0\1"),
    ],
)
def test_who_cannot_be_gets_no_answer(source: bytes, destination: bytes) -> None:
    """Whatever the protocol, though any source were allowed: an answer would come back to us, or go to many."""
    for anybody in (True, False):
        if anybody and source == NOBODY:
            continue  # without a list of this host's addresses they are unknown
        wire = Wire(anybody=anybody)
        if not anybody:
            wire.stack.set_sources(frozenset((APP,)), [(4, 0, 0)])
        for flags in (SYN, ACK, RST, FIN, SYN | ACK):
            packet = build_tcp(source, destination, 443, 443, seq=1, ack=1, flags=flags)
            assert wire.give(packet) in ("source", "destination")
        assert wire.give(echo(source, destination)) in ("source", "destination")
        assert wire.give(build_ipv4(source, destination, 132, 8) + bytes(8)) in ("source", "destination")
        wire.check()
        assert wire.replies == wire.sent == []
        assert wire.stack.flow_count == 0


def test_our_own_words_thrown_back_are_not_answered() -> None:
    """A loop needs two who answer: our packets come from addresses that nobody may have."""
    wire = Wire(anybody=True)
    flow = wire.connect()
    flow.write(bytes(100), wire.now)
    wire.stack.flush(flow, wire.write, wire.now)
    wire.give(segment(5000, 1, ACK, ack=7))
    wire.give(segment(5001, 1, SYN, to=80))
    wire.give(echo(APP, ENDPOINT))
    wire.give(echo(APP, NOBODY))
    replies = list(wire.replies)
    assert len(replies) == 4
    answers = len(wire.sent) + len(wire.replies)
    for packet in replies + wire.sent:
        wire.give(packet)

    assert len(wire.sent) + len(wire.replies) == answers
    wire.check()


@pytest.mark.parametrize("disagreement", ["number", "ack"])
def test_two_who_disagree_do_not_talk_for_ever(disagreement: str) -> None:
    """Each of our ACKs is answered by one that is as wrong as the last: twice a second is all it gets."""
    wire = Wire()
    flow = wire.connect()
    for _ in range(2000):
        wire.now += 0.001
        if disagreement == "number":
            wire.give(segment(4000, 500_000, ACK, ack=flow.snd_nxt))
        else:
            wire.give(segment(4000, 1, ACK, ack=flow.snd_nxt + 500_000))

    assert len(wire.sent) <= 5
    wire.check()


# -- ICMP and fragments -----------------------------------------------------------------------------------------------


@pytest.mark.rule(10, 11)
def test_answers_are_never_larger_than_questions_by_much() -> None:
    """No amplifier: an error is 28 bytes more than what it quotes, and never above 576."""
    wire = Wire()
    for size in (0, 1, 100, 1400, 9000):
        wire.give(build_ipv4(APP, ENDPOINT, 17, 8 + size) + struct.pack("!HHHH", 1, 2, 8 + size, 0) + bytes(size))
        (reply,) = wire.replies
        assert len(reply) <= min(576, 20 + 8 + size + 28)
        wire.replies.clear()
    wire.check()


@pytest.mark.rule(12)
@pytest.mark.parametrize("mtu", [0, 1, 20, 68, 552, 575])
def test_a_forged_too_big_costs_little(mtu: int) -> None:
    """RFC 5927 7: with a number that it cannot know it does nothing; with a lucky one 536 is the end."""
    wire = Wire()
    flow = wire.connect(extra=options(mss=1460, window_scale=7))
    flow.write(memoryview(bytes(50_000)), wire.now)
    wire.stack.flush(flow, wire.write, wire.now)

    def too_big(seq: int) -> bytes:
        quoted = build_tcp(ENDPOINT, APP, 443, 4000, seq=seq & MASK, flags=ACK)
        packet = icmp.build_error(3, 4, APP, ENDPOINT, quoted)
        packet[22:28] = struct.pack("!HHH", 0, 0, mtu)
        packet[22:24] = internet_checksum(packet[20:]).to_bytes(2, "big")
        return bytes(packet)

    for step in range(1000):
        seq = flow.snd_nxt + step * (2**32 - 60_000) // 1000
        assert wire.give(too_big(seq)) == "icmp"
    assert flow._mss == 1460
    wire.stack.handle_packet(too_big(flow.snd_una), 0, True, wire.now)

    assert max(536, mtu) - 40 == flow._mss
    assert not flow.failure


@pytest.mark.rule(6)
def test_every_fragment_is_accounted_for() -> None:
    """However its datagram ends: pushed out, overlapped, too many, damaged, or too late."""
    wire = Wire()
    rng = random.Random(5)
    total = 0
    for _ in range(2000):
        size = rng.choice((8, 64, 1480))
        offset = rng.choice((0, 1, 8, 185))
        more = rng.random() < 0.9
        header = build_ipv4(
            APP, ENDPOINT, 1, size, identification=rng.randint(0, 200), fragment=(FLAG_MF if more else 0) | offset
        )
        if not more and not offset:
            continue
        total += 1
        wire.stack.handle_packet(bytes(header + bytes(size)), 0, True, wire.now)
        wire.serve()
        assert len(wire.stack._reassembler.datagrams) <= MAX_DATAGRAMS
        assert wire.stack._reassembler.bytes_held <= MAX_BYTES
    held = sum(len(datagram.parts) for datagram in wire.stack._reassembler.datagrams.values())
    counted = sum(wire.stack.drops.values())
    assert counted + held == total

    wire.sleep(60.0)
    assert sum(wire.stack.drops.values()) == wire.stack.packets == total
    assert wire.give(echo(APP, ENDPOINT)) == ""


# -- what can be learned ----------------------------------------------------------------------------------------------


@pytest.mark.rule(34)
def test_challenges_of_a_flow_say_nothing_about_another() -> None:
    """CVE-2016-5696: an attacker counts his own challenges while he guesses at the victim's numbers."""

    def counted(guesses: int) -> int:
        wire = Wire()
        wire.connect(4000)
        wire.connect(5000)
        wire.sent.clear()
        mine = 0
        for _ in range(100):
            wire.now += 0.05
            for guess in range(guesses):
                wire.give(segment(4000, 100 + guess, RST))
            sent = len(wire.sent)
            wire.give(segment(5000, 3, RST))
            mine += len(wire.sent) - sent
        return mine

    assert counted(0) == counted(1) == counted(20) == 10


@pytest.mark.rule(25)
@pytest.mark.bug("smoltcp 52e087e4")
def test_initial_numbers_of_a_tuple_only_grow() -> None:
    """RFC 6528: a port that is used again starts above; over four hours, and over the wrap of 4.7 hours."""
    last = initial_numbers(b"s" * 16, b"a" * 12, 0.0)[0]
    for step in range(1, 10_000):
        number = initial_numbers(b"s" * 16, b"a" * 12, step * 2.5)[0]
        assert 0 < (number - last) & MASK < 1 << 31
        last = number


@pytest.mark.rule(25)
@pytest.mark.parametrize("distance", [1, 2, 256])
def test_initial_numbers_of_neighbours_have_no_relation(distance: int) -> None:
    """NUMBER:JACK: neither number, nor difference, nor the low bits of it, has a favourite value (chi-square)."""
    numbers = [
        initial_numbers(b"s" * 16, APP + ENDPOINT + struct.pack("!HH", port, 443), 1.0 + port / 1000)[0]
        for port in range(1, 20_001)
    ]
    steps = [(b - a) & MASK for a, b in zip(numbers, numbers[distance:], strict=False)]
    kinds: list[Callable[[int], int]] = [lambda number: number >> 24, lambda number: number & 0xFF]
    for values in (numbers, steps):
        for kind in kinds:
            counts = [0] * 256
            for value in values:
                counts[kind(value)] += 1
            expected = len(values) / 256
            assert sum((count - expected) ** 2 / expected for count in counts) < 370  # 255 degrees of freedom


@pytest.mark.rule(24)
def test_stamps_do_not_tell_the_uptime() -> None:
    """Each flow's clock begins elsewhere, and runs at the same pace."""
    wire = Wire()
    stamps = []
    for port in range(1000, 1050):
        wire.give(segment(port, 0, SYN, extra=options(timestamp=(1, 0))))
        (flow,) = wire.stack.take_requests()
        wire.stack.accept(flow, wire.now)
        wire.serve()
        syn_ack = wire.sent.pop()
        read = Segment()
        assert parse_tcp(syn_ack, 20, len(syn_ack), read) == 0
        stamps.append(read.ts_value)
    offsets = {(stamp - int(wire.now * 1000)) & MASK for stamp in stamps}

    assert len(offsets) == 50
    assert max(offsets) - min(offsets) > 1 << 31


def test_the_secret_is_nowhere_to_be_seen() -> None:
    """Neither in the words of an object nor in its counters."""
    wire = Wire()
    flow = wire.connect()

    for thing in (wire.stack, flow, wire.stack.drops):
        assert "kkkk" not in repr(thing)
        assert str(flow.iss) not in repr(thing)


def test_keys_of_flows_cannot_be_chosen_to_collide() -> None:
    """Bytes are hashed with a key of the process (SipHash); integers and tuples of them would not be."""
    wire = Wire()
    for port in range(2000, 2050):
        wire.connect(port)

    assert all(type(key) is bytes for key in wire.stack.flows)
    source = b"\xac\x10\0\x01"
    wire.give(segment(1, 0, SYN, source=source))
    assert all(type(key) is bytes for key in wire.stack._table.others.by_source)


def test_any_mix_is_accounted_for() -> None:
    """Everything above at once, and more: each packet is taken or counted, once."""
    rng = random.Random(6)
    wire = Wire()
    flows = [wire.connect(4000 + index, extra=options(sack_permitted=True)) for index in range(3)]
    for _ in range(5000):
        wire.now += rng.choice((0.0, 0.0001, 0.3))
        wire.stack.handle_timeout(wire.now)
        kind = rng.randrange(8)
        source = rng.choice((APP, APP, guest(rng), ENDPOINT, b"\x7f\0\0\1", b"\x08\x08\x08\x08"))
        if kind < 4:
            flow = rng.choice(flows)
            packet = bytearray(
                segment(
                    flow.source[1],
                    flow.rcv_nxt + rng.choice((0, 0, 1, -1, 100, -100, 70_000, rng.getrandbits(32))),
                    rng.choice((ACK, ACK, ACK | PSH, RST, SYN, FIN | ACK, 0, 63)),
                    bytes(rng.choice((0, 0, 1, 100, 1460))),
                    ack=flow.snd_nxt + rng.choice((0, 0, -1, 1, 70_000, -70_000)),
                    window=rng.choice((0, 1, 65535)),
                    source=rng.choice((APP, source)),
                )
            )
        elif kind == 4:
            packet = bytearray(
                segment(rng.randint(1, 65535), 1, rng.randrange(64), source=source, to=rng.choice((443, 80)))
            )
        elif kind == 5:
            packet = bytearray(echo(source, rng.choice((ENDPOINT, NOBODY, APP)), bytes(rng.randrange(100))))
        elif kind == 6:
            packet = build_ipv4(source, rng.choice((ENDPOINT, NOBODY)), rng.choice((2, 17, 132)), 12) + bytes(12)
        else:
            packet = bytearray(rng.randbytes(rng.randrange(80)))
        if rng.random() < 0.1 and packet:
            packet[rng.randrange(len(packet))] ^= 1 << rng.randrange(8)
        before = sum(wire.stack.drops.values())
        wire.stack.handle_packet(bytes(packet), 0, False, wire.now)
        dropped = sum(wire.stack.drops.values()) - before
        assert dropped in (0, 1), packet.hex()
        wire.taken += not dropped
        for request in wire.stack.take_requests():
            if rng.random() < 0.5:
                wire.stack.accept(request, wire.now)
            else:
                wire.stack.refuse(request, wire.now)
        wire.serve()
    wire.check()
