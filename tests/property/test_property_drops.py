"""Every packet is taken or counted, once: what any packets do to a stack is compared with what it says it dropped.

Nothing here believes the stack's own words. What a packet brought is seen in what the app could read, in what is held
beyond a gap, in the state of its connection, or in an answer; each payload is made of one byte that is its packet's
number, so that it can be found again, and missed.
"""

from __future__ import annotations

import random
import struct
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from tun.core.stack import Flow, Stack
from tun.core.states import ESTABLISHED
from tun.testing.playbook import tuned
from tun.wire.checksum import internet_checksum
from tun.wire.ipv4 import FLAG_MF, build_ipv4
from tun.wire.tcp import ACK, FIN, PSH, RST, SYN, build_tcp, options

APP = b"\x0a\x6b\0\x01"
GUEST = b"\xac\x10\0\x07"
STRANGER = b"\x08\x08\x08\x08"
ENDPOINT = b"\x0a\x6b\0\x02"
NOBODY = b"\x0a\x6b\0\x63"
WINDOW = 20_000
MASK = 0xFFFFFFFF


class World:
    """A stack that is given packets, and what can be seen of it from outside."""

    def __init__(self, undecided: int = 40) -> None:
        changes = {"receive_buffer": WINDOW, "small_buffer": WINDOW, "undecided": undecided, "half_open": 20}
        self.stack = Stack(tuned(**changes), b"k" * 32)
        self.stack.set_served({ENDPOINT: frozenset((443,))})
        self.stack.set_sources(frozenset((APP,)), [(4, 0xAC100000, 0xFFF00000)])
        self.now = 100.0
        self.sent = 0
        self.late = 0  # drops of packets that had been taken
        self.dropped = 0  # of others

    def give(self, packet: bytes | bytearray, *, verified: bool = True) -> str:
        """Hand a packet in. Returns: why it was dropped, or "" when it was taken."""
        stack = self.stack
        before, told = dict(stack.drops), self.told()
        stack.handle_packet(bytes(packet), 0, verified, self.now)
        reasons = [reason for reason, count in stack.drops.items() for _ in range(count - before.get(reason, 0))]
        assert len(reasons) <= 1, reasons
        assert reasons or self.told() != told, "neither dropped nor taken"
        self.dropped += len(reasons)
        self.settle()
        return reasons[0] if reasons else ""

    def told(self) -> tuple[object, ...]:
        """What can be seen of a packet that was taken."""
        stack = self.stack
        flows = tuple((flow.key, self.look(flow), flow.touched, flow._mss) for flow in stack.flows.values())
        return flows, stack.opened, stack.replies_sent, stack._reassembler.bytes_held, stack.resets_received

    def look(self, flow: Flow) -> tuple[object, ...]:
        waiting = flow._out_of_order
        held = 0 if waiting is None else sum(len(piece) for pieces in waiting.pieces for piece in pieces)
        return flow.state, flow.rcv_nxt, flow.snd_una, flow.snd_edge, held, flow._fin_known, flow._scoreboard is None

    def settle(self) -> None:
        """The end of a batch."""
        stack = self.stack
        for flow in stack.take_touched():
            stack.flush(flow, self.write, self.now)
        before = sum(stack.drops.values())
        stack.take_replies()
        self.late += sum(stack.drops.values()) - before

    def write(self, header: object, views: object, gso: int) -> bool:
        self.sent += 1
        return True

    def connect(self, port: int = 4000, source: bytes = APP) -> Flow:
        self.give(build_tcp(source, ENDPOINT, port, 443, seq=0, flags=SYN, window=60000, options=options(mss=1460)))
        flow = self.stack.take_requests()[-1]
        self.stack.accept(flow, self.now)
        self.settle()
        self.give(self.segment(flow, 1, ACK))
        assert flow.state == ESTABLISHED
        return flow

    def segment(
        self, flow: Flow, seq: int, flags: int, payload: bytes = b"", ack: int | None = None, window: int = 60000
    ) -> bytearray:
        acked = flow.snd_nxt if ack is None else ack
        source, port = flow.source
        return build_tcp(
            source, ENDPOINT, port, 443, seq=seq & MASK, ack=acked & MASK, flags=flags, window=window, payload=payload
        )


@dataclass(frozen=True)
class Piece:
    """A segment of data: where it begins, counted from the next expected byte, and how long it is."""

    at: int
    length: int
    fin: bool
    read: bool  # does the app's other side read everything afterwards?


PIECES = st.builds(
    Piece,
    at=st.one_of(st.integers(-50, 300), st.integers(-2000, WINDOW + 3000)),
    length=st.one_of(st.integers(0, 3), st.integers(0, 1460), st.sampled_from((2048, 5000, WINDOW))),
    fin=st.sampled_from((False,) * 19 + (True,)),
    read=st.sampled_from((False, False, True)),
)


def comb(seed: int) -> list[Piece]:
    """So many pieces beyond gaps that some must go: single bytes, or large ones; in any order, with bridges."""
    rng = random.Random(seed)
    if rng.random() < 0.5:
        places = [Piece(1 + 2 * index, rng.choice((1, 1, 1, 2, 5)), False, False) for index in range(120)]
    else:
        places = [Piece(index * 500 + 1, rng.randint(1, 900), False, False) for index in range(40)]
    if rng.random() < 0.5:
        rng.shuffle(places)
    else:
        places.reverse()
    return [rng.choice(places) if rng.random() < 0.2 else place for place in places for _ in range(2)][:250]


@given(st.lists(PIECES, max_size=250) | st.integers().map(comb))
@settings(max_examples=200, deadline=None)
def test_what_was_brought_is_there_or_was_counted(pieces: list[Piece]) -> None:
    """In order, beyond gaps, twice, beyond the window, behind the end: no byte of a dropped one is kept; no taken one
    vanishes but by a count."""
    world = World()
    flow = world.connect()
    delivered: set[int] = set()
    taken: set[int] = set()
    for number, piece in enumerate(pieces, start=1):
        payload = bytes((number,)) * piece.length
        flags = ACK | FIN if piece.fin else ACK
        ends = flow._fin_known
        reason = world.give(world.segment(flow, flow.rcv_nxt + piece.at, flags, payload))
        held = delivered | values(flow)
        if reason:
            assert number not in held, reason
        elif payload and (number in held or not (piece.fin and flow._fin_known and not ends)):
            taken.add(number)
        if piece.read:
            delivered |= {byte for view in flow.readable_views() for byte in set(view)}
            flow.consume(flow.readable_bytes, world.now)
            world.stack.flush(flow, world.write, world.now)
        if flow.closed:
            break
        assert len(taken - delivered - values(flow)) == world.late

    assert sum(world.stack.drops.values()) == world.dropped + world.late


def values(flow: Flow) -> set[int]:
    """The numbers of the packets whose bytes a flow holds, unread or beyond a gap."""
    views = list(flow.readable_views())
    if flow._out_of_order is not None:
        views += [piece for pieces in flow._out_of_order.pieces for piece in pieces]
    return {byte for view in views for byte in set(view)}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_mix_of_packets_is_accounted_for(seed: int) -> None:
    """Connections in all states, SYNs beyond all limits, strangers, errors, fragments, noise; and time that passes."""
    rng = random.Random(seed)
    world = World()
    flows = [world.connect(4000 + index, rng.choice((APP, GUEST))) for index in range(4)]
    for _ in range(400):
        world.now += rng.choice((0.0, 0.0, 0.0003, 0.3, 1.1))
        before = sum(world.stack.drops.values())
        if world.stack.next_deadline() <= world.now:
            world.stack.handle_timeout(world.now)
        world.late += sum(world.stack.drops.values()) - before
        world.settle()
        world.give(anything(rng, flows), verified=rng.random() < 0.7)
        for request in world.stack.take_requests():
            choice = rng.randrange(4)
            if choice == 0:
                world.stack.accept(request, world.now)
            elif choice == 1:
                world.stack.refuse(request, world.now)
        act(rng, rng.choice(flows), world)
        world.settle()
        assert sum(world.stack.drops.values()) == world.dropped + world.late

    assert world.dropped + world.late <= world.stack.packets


def act(rng: random.Random, flow: Flow, world: World) -> None:
    """The owner of a connection does something, or nothing."""
    choice = rng.randrange(40)
    if choice < 4:
        flow.consume(flow.readable_bytes, world.now)
    elif choice < 8:
        flow.write(bytes(rng.randrange(1, 5000)), world.now)
    elif choice == 8:
        flow.finish(world.now)
    elif choice == 9:
        flow.release(world.now)
    elif choice == 10:
        flow.abort(world.now)
    world.stack.flush(flow, world.write, world.now)


def anything(rng: random.Random, flows: list[Flow]) -> bytes:
    """One packet, mostly of a connection."""
    source = rng.choice((APP, APP, GUEST, STRANGER, ENDPOINT, b"\x7f\0\0\1"))
    target = rng.choice((ENDPOINT, ENDPOINT, NOBODY, APP, b"\xe0\0\0\1"))
    kind = rng.randrange(12)
    if kind < 6:
        flow = rng.choice(flows)
        packet = build_tcp(
            flow.source[0], ENDPOINT, flow.source[1], 443,
            seq=(flow.rcv_nxt + rng.choice((0, 0, 0, 1, -1, 500, -500, 30_000, rng.getrandbits(32)))) & MASK,
            ack=(flow.snd_nxt + rng.choice((0, 0, 0, -1, 1, 70_000, -70_000))) & MASK,
            flags=rng.choice((ACK, ACK, ACK | PSH, ACK | FIN, RST, RST | ACK, SYN, SYN | ACK, FIN, 0, 63)),
            window=rng.choice((0, 1, 60000)), payload=bytes(rng.choice((0, 0, 1, 100, 1460, 5000))),
        )  # fmt: skip
    elif kind == 6:
        ports = rng.randint(5000, 5100), rng.choice((443, 443, 80))
        packet = build_tcp(
            source, target, *ports, seq=rng.randrange(3), ack=1, flags=rng.choice((SYN, SYN, SYN, ACK, RST, FIN))
        )
    elif kind == 7:
        message = bytearray(
            rng.choice((b"\x08\0", b"\0\0", b"\x03\x04", b"\x05\0")) + bytes(6) + bytes(rng.randrange(60))
        )
        message[2:4] = internet_checksum(message).to_bytes(2, "big")
        packet = build_ipv4(source, target, 1, len(message)) + message
    elif kind == 8:
        packet = build_ipv4(source, target, 17, 12) + struct.pack("!HHHH", 1, 2, 12, 0) + bytes(4)
    elif kind == 9:
        fragment = rng.choice((FLAG_MF, FLAG_MF | 1, 1, FLAG_MF | 2))
        packet = build_ipv4(
            source, target, rng.choice((1, 1, 6)), 8, identification=rng.randrange(90), fragment=fragment
        )
        packet += bytes(8)
    elif kind == 10:
        packet = build_ipv4(source, target, rng.choice((2, 47, 132)), 8) + bytes(8)
    else:
        packet = bytearray(rng.randbytes(rng.randrange(80)))
    if packet and rng.random() < 0.05:
        packet[rng.randrange(len(packet))] ^= 1 << rng.randrange(8)
    return bytes(packet)
