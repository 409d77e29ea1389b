"""The whole stack: valid frames, mutated, between two live sides under a mock clock.

The fuzz data is a program: apps (`AppPeer`) connect, write, stop reading, go silent; frames wait in two queues and are
delivered, held back, swapped, doubled, lost, bent; owners accept, refuse, read, write, finish, abort; the device is
full or not; time passes. What holds always:

* what an owner reads is what its app sent, as far as the program has not forged payloads with good checksums; what an
  app reads is what the owner wrote;
* each segment of ours carries the bytes that were written for that position, good checksums, a sound geometry, an ACK
  that never goes back and a window whose right edge never moves left (but for the rounding of its scale);
* nothing leaves a flow after its RST, and nothing but one RST leaves a flow that has failed;
* every packet is counted once: it has an effect, or it is one drop, under one reason;
* counts of requests, half-open flows and bytes are those of the flows that are there; memory stays below its bound;
* no timer without a flow, no flow without a timer, no retransmission pending without one, no deadline in the past;
* a calm network at the end delivers everything; when everybody goes silent everything ends in bounded time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Final

from fuzz.frames import (
    ACK,
    MASK,
    RST,
    SYN,
    Frame,
    is_whole,
    mend_any,
    ones_sum,
    pseudo,
    pseudo6,
    read_segment,
    set_length,
    transport_at,
)
from fuzz.reading import Source
from tun.core.fragments import MAX_BYTES, MAX_DATAGRAMS
from tun.core.machine import LAST_RESORT, MAX_SEGMENTS, WINDOW_SLACK, Flow
from tun.core.stack import Stack, StackSettings
from tun.core.states import ESTABLISHED, SYN_PENDING, SYN_RECEIVED
from tun.testing.apppeer import AppPeer

CORPUS: Final = "stack"
MAX_LEN: Final = 160


@dataclass(frozen=True, slots=True)
class Family:
    """The addresses of one version of IP.

    Attributes:
        odd_destinations, odd_sources: what packets are bent to.
    """

    version: int
    endpoint: bytes
    app: bytes
    stranger: bytes
    odd_destinations: tuple[bytes, ...]
    odd_sources: tuple[bytes, ...]

    @property
    def header(self) -> int:
        """Bytes of an IP header."""
        return 20 if self.version == 4 else 40

    @property
    def icmp(self) -> int:
        """The protocol that errors and echoes have."""
        return 1 if self.version == 4 else 58


def text_of(address: bytes) -> str:
    """An address as `AppPeer` wants it."""
    return inet_ntop(AF_INET if len(address) == 4 else AF_INET6, address)


FAMILY4: Final = Family(
    4,
    b"\x0a\x6b\x00\x02",
    b"\x0a\x6b\x00\x01",
    b"\x0a\x00\x00\x05",
    (b"\x0a\x6b\xff\xff", b"\xe0\0\0\1", b"\x0a\x6b\x12\x34"),
    (b"\x7f\0\0\1", b"\xff\xff\xff\xff", b"\x0a\0\0\7"),
)
_PREFIX6: Final = b"\xfd\0\0\1\0\2\0\3"
FAMILY6: Final = Family(
    6,
    _PREFIX6 + bytes(7) + b"\2",
    _PREFIX6 + bytes(7) + b"\1",
    b"\xfd\0\0\x09" + bytes(11) + b"\5",
    (_PREFIX6 + b"\xff" * 8, b"\xff\2" + bytes(13) + b"\1", _PREFIX6 + bytes(6) + b"\x12\x34"),
    (bytes(15) + b"\1", bytes(16), b"\xfd\0\0\x09" + bytes(11) + b"\7", bytes(10) + b"\xff\xff\x0a\x6b\0\1"),
)
PORT: Final = 443
PEERS: Final = 3
HISTORY: Final = 64
FRAMES_AT_ONCE: Final = 4000  # that may pass at one instant, both ways; more is a storm
SILENCE_S: Final = 900.0  # 300 s idle and 9 keepalives of 30 s, after at most 100 s of other hopes; and some
STREAM: Final = Random(1).randbytes(1 << 20)

SIZES: Final = (1, 2, 3, 7, 64, 100, 535, 536, 537, 1447, 1448, 1460, 1461, 2047, 2048, 4096, 9000, 20000)
STEPS_S: Final = (0.0, 0.0004, 0.003, 0.019, 0.021, 0.1, 0.26, 0.51, 1.01, 2.6, 3.1, 10.1, 31.0, 61.0, 101.0, 301.0)
DELTAS: Final = (
    1, -1, 2, -2, 100, -100, 535, -536, 1460, -1460, 65535, -65535, 65536, 1 << 20, -(1 << 20), 1 << 30, -(1 << 30),
    (1 << 31) - 1, 1 << 31, -(1 << 31) + 1,
)  # fmt: skip


class App:
    """One connection of an app, and what is known about the truth."""

    def __init__(self, peer: AppPeer, number: int, addresses: bytes) -> None:
        self.peer = peer
        self.key = addresses + struct.pack("!HH", peer.source[1], PORT)
        self.offset = number * 70001 % 300000  # where its stream begins in STREAM
        self.written = 0
        self.got = 0  # bytes taken by the app, all compared
        self.forged = False  # a packet that this app did not send, or not so, was taken for its own
        self.tainted = False  # and one of these held other bytes than the app's
        self.flow: Flow | None = None

    def stream(self, position: int, count: int) -> bytes:
        """What it sends at a position."""
        return STREAM[self.offset + position : self.offset + position + count]


class Owner:
    """Who uses a flow, and what has left it."""

    def __init__(self, flow: Flow, number: int) -> None:
        self.flow = flow
        self.offset = 500000 + number * 50021 % 300000
        self.app: App | None = None
        self.written = 0
        self.read = 0
        self.finished = False
        self.reset_sent = False
        self.highest_ack = -1
        self.edge = -1  # promised, as seen on the wire
        self.app_edge = 0  # the farthest that the app allowed
        self.rcv_edge = flow.rcv_edge
        self.rcv_nxt = flow.rcv_nxt
        self.snd_una = flow.snd_una
        self.blocked = False
        self.emitted = 0

    def stream(self, position: int, count: int) -> bytes:
        """What it writes at a position."""
        return STREAM[self.offset + position : self.offset + position + count]


class World:
    """The two sides, the wires between them, and the clock."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.now = 100.0 + source.byte() * 17.0
        mode = source.byte()
        self.verified = mode & 1 == 1
        self.strict_sources = mode & 2 == 2
        self.family = FAMILY6 if mode & 16 else FAMILY4
        self.endpoint = self.family.endpoint
        receive = source.pick((65536, 8192, 16384, 4096, 200000, 524288))
        send = source.pick((65536, 4096, 16384, 200000, 524288))
        self.settings = StackSettings(
            mtu=source.pick((1500, 576, 9000, 65535)),
            offload=mode & 4 == 4,
            receive_buffer=receive,
            send_buffer=send,
            small_buffer=receive // 2,
            active_flows=1 if mode & 8 else 64,
            max_flows=4,
            half_open=2,
            undecided=3,
            buffers=source.pick((1 << 24, 1 << 16, 1 << 18)),
            gateway=FAMILY4.app,
            gateway6=FAMILY6.app,
            network6=int.from_bytes(_PREFIX6, "big") << 64,
            mask6=((1 << 64) - 1) << 64,
        )
        self.stack = Stack(self.settings, b"s" * 32)
        self.stack.set_served({self.endpoint: frozenset((PORT,))})
        if self.strict_sources:
            local = frozenset((FAMILY4.app, FAMILY6.app))
            allowed6 = int.from_bytes(FAMILY6.stranger[:8], "big") << 64
            self.stack.set_sources(local, [(4, 0x0A000000, 0xFFFFFF00), (6, allowed6, ((1 << 64) - 1) << 64)])
        self.apps: list[App | None] = [None] * PEERS
        self.by_key: dict[bytes, App] = {}
        self.owners: list[Owner] = []
        self.numbers = 0
        self.to_us: list[tuple[bytes, App | None]] = []
        self.to_apps: list[bytes] = []
        self.history: list[tuple[bytes, App | None]] = []
        self.sent: list[bytes] = []
        self.room = -1  # segments that the device takes; negative: any number
        self.handed = 0
        self.aborted_requests = 0

    # -- the apps -----------------------------------------------------------------------------------------------------

    def connect(self) -> None:
        source = self.source
        slot = source.byte() % PEERS
        mode = source.byte()
        address = self.family.stranger if mode & 1 else self.family.app
        shape = source.byte()
        self.numbers += 1
        scale = (7, None, 0, 14)[shape >> 3 & 3]
        # Numbers that wrap soon, but never the same twice: a new connection differs from the one before.
        initial = ((0x100000000, 0x80000000)[mode >> 4 & 1] - self.numbers * 499) if mode & 64 else self.numbers * 7919
        peer = AppPeer(
            (text_of(address), 40000 + (slot if mode & 2 else self.numbers)),
            (text_of(self.endpoint), PORT),
            mss=(1460, 536, 100, 1, 48, 65495, 0, 1448)[shape & 7],
            window_scale=scale,
            timestamps=shape & 32 == 0,
            sack=shape & 64 == 0,
            buffer=262144 if scale == 14 else (262144, 4096, 65535, 1000)[mode >> 2 & 3],
            segment_limit=1460 if shape & 128 else 65483,
            initial_sequence=initial,
            auto_read=mode & 128 == 0,
            ordered=False,
        )
        app = App(peer, self.numbers, address + self.endpoint)
        # A kernel has one connection on a pair of addresses and ports: what was there before is gone, without a word.
        self.apps = [None if other is not None and other.key == app.key else other for other in self.apps]
        self.apps[slot] = app
        self.by_key[app.key] = app
        peer.connect(self.now)
        self.gather(app)

    def app(self) -> App | None:
        return self.apps[self.source.byte() % PEERS]

    def app_writes(self) -> None:
        app = self.app()
        size = self.source.pick(SIZES)
        if app is None or app.peer.state == "over" or app.written + size > 200000 or app.peer._fin:
            return
        data = app.stream(app.written, size)
        app.written += size
        app.peer.write(data, self.now)
        self.gather(app)

    def app_acts(self) -> None:
        app = self.app()
        what = self.source.byte() % 8
        if app is None:
            return
        peer = app.peer
        if what == 0:
            peer.finish(self.now)
        elif what == 1:
            peer.abort(self.now)
        elif what == 2:
            peer.auto_read = not peer.auto_read
        elif what == 3:
            self.app_reads(app, self.source.pick(SIZES))
        elif what == 4:
            peer._timer = math.inf  # it has gone, without a word
        elif what == 5:
            peer._timer = min(peer._timer, self.now)
            peer.handle_timeout(self.now)
        else:
            self.app_reads(app, 1 << 30)
        self.gather(app)

    def app_reads(self, app: App, count: int) -> None:
        data = app.peer.take(count, self.now)
        # One owner, unless a forged RST and a SYN once more have put another flow into the first one's place.
        assert not data or any(
            data == owner.stream(app.got, len(data)) and app.got + len(data) <= owner.written
            for owner in self.owners
            if owner.flow is app.flow or (app.forged and owner.flow.key == app.key)
        ), "the app reads other bytes than were written"
        app.got += len(data)

    def gather(self, app: App) -> None:
        """Put what an app has sent into the queue, and into what may be repeated later."""
        for packet in app.peer.take_packets():
            self.to_us.append((packet, app))
            self.remember(packet, app)

    def remember(self, packet: bytes, app: App | None) -> None:
        self.history.append((packet, app))
        if len(self.history) > HISTORY:
            del self.history[0]

    # -- the wire, towards us -----------------------------------------------------------------------------------------

    def deliver(self, packet: bytes, app: App | None) -> None:
        """Hand one packet to the stack, and see that it counted once."""
        self.judge(packet, app)
        stack = self.stack
        before = sum(stack.drops.values())
        marks = self.marks()
        self.handed += 1
        stack.handle_packet(packet, 0, self.verified, self.now)
        dropped = sum(stack.drops.values()) - before
        assert stack.packets == self.handed
        assert dropped in (0, 1), f"counted {dropped} times"
        assert dropped or self.marks() != marks, "neither an effect nor a drop"
        assert len(stack._replies) <= marks[1] + 1, "more than one answer"

    def marks(self) -> tuple[int, ...]:
        """What an effect shows in."""
        stack = self.stack
        reassembler = stack._reassembler
        self.stamp_touched()
        return (
            len(stack._requests),
            len(stack._replies),
            self.touches,
            reassembler.bytes_held,
            len(reassembler.datagrams),
            sum(flow._mss for flow in stack.flows.values()),
        )

    touches = 0

    def stamp_touched(self) -> None:
        """Make every touch visible: flows touched so far are taken off the list and remembered."""
        for flow in self.stack._host.touched:
            flow.touched = False
            self.touches += 1
            if flow not in self.pending:
                self.pending.append(flow)
        self.stack._host.touched = []

    @property
    def pending(self) -> list[Flow]:
        return self._pending

    _pending: list[Flow]

    def judge(self, packet: bytes, app: App | None) -> None:
        """Note what a packet with good checksums may do to the truth about the app it names."""
        frame = read_segment(packet)
        if frame is None or not is_whole(packet, transport=not self.verified):
            return
        flow = self.stack.flows.get(frame.key)
        owner = flow.owner if flow is not None else None
        # The app of that address and port, and one that was there before, whose flow lives on.
        for named in {self.by_key.get(frame.key), owner.app if isinstance(owner, Owner) else None}:
            if named is None or app is named:
                continue
            named.forged = True
            if frame.payload:
                position = (frame.seq - named.peer.iss - 1) & MASK
                known = named.stream(position, max(min(named.written - position, len(frame.payload)), 0))
                if known != frame.payload:
                    named.tainted = True

    def bend(self, packet: bytes) -> bytes:
        """Change one thing in a packet, perhaps with checksums that agree."""
        source = self.source
        what = source.byte()
        out = bytearray(packet)
        at = transport_at(packet)
        family = self.family
        kind = what & 15
        if kind == 0:
            self.add32(out, at + 4, source.pick(DELTAS))
        elif kind == 1:
            self.add32(out, at + 8, source.pick(DELTAS))
        elif kind == 2:
            out[at + 13] ^= 1 << (source.byte() & 7)
        elif kind == 3:
            struct.pack_into("!H", out, at + 14, source.pick((0, 1, 2, 255, 4096, 65535)))
        elif kind == 4:
            out[at + 12] = source.byte()
        elif kind == 5:
            self.replace_options(out, at, source)
        elif kind == 6 and len(out) > at + 32:
            self.add32(out, at + 24, source.pick(DELTAS))
        elif kind == 7 and len(out) > at + 32:
            self.add32(out, at + 28, source.pick(DELTAS))
        elif kind == 8:
            set_length(out, source.short() % (len(out) + 3))
        elif kind == 9:
            out[source.byte() % family.header] = source.byte()
        elif kind == 10:
            out[at + source.byte() % 20] = source.byte()
        elif kind == 11 and len(out) > at + 20:
            out[at + 20 + source.short() % (len(out) - at - 20)] ^= source.byte() | 1
        elif kind == 12:
            del out[at + source.short() % (len(out) - at) :]
            set_length(out, len(out))
        elif kind in (13, 14):
            size = len(self.endpoint)
            usual = (self.endpoint, family.app, family.stranger)
            odd = family.odd_destinations if kind == 13 else family.odd_sources
            start = family.header - (size if kind == 13 else 2 * size)
            out[start : start + size] = source.pick(usual + odd)
        else:
            out[at + 13] = source.byte() & 0x3F
        bent = bytes(out)
        return mend_any(bent) if what & 16 == 0 else mend_any(bent, transport=False) if what & 32 else bent

    @staticmethod
    def add32(out: bytearray, at: int, delta: int) -> None:
        if at + 4 <= len(out):
            (value,) = struct.unpack_from("!I", out, at)
            struct.pack_into("!I", out, at, (value + delta) & MASK)

    @staticmethod
    def replace_options(out: bytearray, at: int, source: Source) -> None:
        """Other options; SACK blocks near what the segment acknowledges, or any bytes."""
        if len(out) < at + 20:
            return
        header = (out[at + 12] >> 4) * 4
        if source.bit():
            (ack,) = struct.unpack_from("!I", out, at + 8)
            options = bytearray(b"\1\1\5")
            count = source.byte() % 5
            options.append(2 + 8 * count)
            for _ in range(count):
                left = ack + source.pick(SIZES) * (1 if source.bit() else -1)
                options += struct.pack("!II", left & MASK, (left + source.pick((*SIZES, 0, -1, 1 << 31))) & MASK)
        else:
            options = bytearray(source.take(source.byte() % 41))
        options += b"\0" * (-len(options) % 4)
        out[at + 20 : at + max(header, 20)] = options[:40]
        out[at + 12] = (20 + len(options[:40])) << 2
        set_length(out, len(out))

    def dress(self, packet: bytes) -> bytes:
        """The same packet with extension headers that change nothing, where there are such."""
        if self.family.version == 4:
            return packet
        what = self.source.byte()
        out = bytearray(packet)
        for kind in (60, 43, 0)[what & 1 : 1 + (what >> 1 & 3)]:  # options, a route that has ended, hop by hop
            size = 8 * (1 + (what >> 3 & 3)) if kind != 43 else 8
            body = bytes((out[6], size // 8 - 1)) + (bytes(size - 2) if kind == 43 else b"\1" + bytes((size - 4,)))
            out[40:40] = body + bytes(size - len(body))
            out[6] = kind
        set_length(out, len(out))
        return bytes(out)

    def pass_to_us(self) -> None:
        """Deliver, drop, double, hold back or bend a frame that waits."""
        source = self.source
        what = source.byte()
        if not self.to_us:
            return
        index = (what >> 4) % len(self.to_us)
        packet, app = self.to_us.pop(index)
        kind = what & 15
        if kind < 6:
            self.deliver(packet, app)
        elif kind == 6:
            pass  # lost
        elif kind == 7:
            self.deliver(packet, app)
            self.deliver(packet, app)
        elif kind == 8:
            self.to_us.append((packet, app))
        elif kind < 12:
            bent = self.bend(packet)
            self.deliver(bent, app if bent == packet else None)
        elif kind == 12:
            bent = self.bend(packet)
            self.deliver(bent, app if bent == packet else None)
            self.deliver(packet, app)
        elif kind == 13:
            self.deliver(self.dress(packet), app)
        else:
            self.deliver(packet, app)
            while self.to_us:
                self.deliver(*self.to_us.pop(0))
        if what & 1 == 0:
            self.serve()

    def repeat(self) -> None:
        """An old frame once more, as it was or bent."""
        index = self.source.byte()
        bent = self.source.bit()
        if not self.history:
            return
        packet, app = self.history[index % len(self.history)]
        if bent:
            other = self.bend(packet)
            app = app if other == packet else None
            packet = other
        self.deliver(packet, app)
        self.serve()

    def inject(self) -> None:
        """A packet of nobody: ICMP about a segment of ours, fragments, our own output, echo, nonsense."""
        source = self.source
        what = source.byte()
        kind = what % 6
        if what >= 240:
            self.comb(sacks=what >= 248)
        elif kind == 0 and self.sent:
            self.inject_error()
        elif kind == 1:
            self.inject_fragment()
        elif kind == 2 and self.sent:
            self.deliver(self.sent[source.byte() % len(self.sent)], None)
        elif kind == 3:
            self.deliver(self.ip(source.byte(), source.take(source.byte() % 60)), None)
        elif kind == 4:
            self.deliver(source.take(source.byte() % 60), None)
        else:
            ports = struct.pack("!HH", 40000 + source.byte() % 4, source.pick((PORT, 80)))
            segment = ports + struct.pack("!IIBBHHH", source.long(), source.long(), 0x50, source.byte(), 1000, 0, 0)
            self.deliver(self.ip(6, segment), None)
        self.serve()

    def inject_error(self) -> None:
        """An ICMP error about a segment of ours."""
        source = self.source
        family = self.family
        quoted = bytearray(self.sent[source.byte() % len(self.sent)])
        if source.bit():
            self.add32(quoted, family.header + 4, source.pick(DELTAS))
        mtu = source.pick((0, 20, 68, 100, 535, 536, 575, 576, 1000, 1499, 1500, 65535))
        too_big = source.bit()
        if family.version == 4:
            head = struct.pack("!BBHHH", 3, 4 if too_big else source.byte() & 15, 0, 0, mtu)
        elif too_big:
            head = struct.pack("!BBHI", 2, 0, 0, mtu + 700 if mtu > 500 else mtu)
        else:
            head = struct.pack("!BBHI", 1, source.byte() & 7, 0, 0)
        self.deliver(self.ip(family.icmp, head + quoted[: family.header + 8 + source.byte() % 40]), None)

    def inject_fragment(self) -> None:
        """A fragment, mostly of an echo request whose checksum is right."""
        source = self.source
        offset = source.pick((0, 0, 1, 2, 3, 4, 101, 186, 8189))
        more = source.bit()
        size = source.pick((0, 1, 7, 8, 16, 24, 800, 1480, 65000))
        number = source.byte() & 3
        if self.family.version == 4:
            body = b"\x08\0\xf7\xff\0\0\0\0" + bytes(size)
            packet = bytearray(self.ip(source.pick((1, 1, 1, 6, 17)), body[:size] if offset else body))
            struct.pack_into("!HH", packet, 4, number, more << 13 | offset & 0x1FFF)
            self.deliver(mend_any(bytes(packet), transport=False), None)
            return
        protocol = source.pick((58, 58, 58, 6, 17))
        whole = self.ip(58, b"\x80\0\0\0\0\0\0\0" + bytes(size))[40:]  # right if it is the only fragment
        head = struct.pack("!BxHI", protocol, offset << 3 & 0xFFF8 | more, number)
        self.deliver(self.ip(44, head + (whole[:size] if offset else whole)), None)

    def comb(self, *, sacks: bool) -> None:
        """Every second byte of what an app sends (SegmentSmack), or of what it acknowledges (SACK panic)."""
        source = self.source
        app = self.app()
        count = source.byte()
        if app is None or app.flow is None:
            return
        flow = app.flow
        base = app.peer._una if not sacks else flow.snd_una
        order = range(count) if source.bit() else range(count, 0, -1)
        for index in order:
            position = base + 1 + 2 * index
            block = struct.pack("!II", position & MASK, position + 1 & MASK) if sacks else b""
            options = b"\1\1\5\x0a" + block if sacks else b""
            payload = b"" if sacks else app.stream(position - app.peer.iss - 1, 1)
            seq = app.peer._max if sacks else position
            head = struct.pack("!IIBBHHH", seq & MASK, flow.snd_una & MASK, (20 + len(options)) << 2, ACK, 1000, 0, 0)
            size = len(self.endpoint)
            self.deliver(self.ip(6, app.key[2 * size :] + head + options + payload, app.key[:size]), None)

    def ip(self, protocol: int, body: bytes, source: bytes = b"") -> bytes:
        """A packet to the endpoint, with right checksums."""
        if self.family.version == 4:
            header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 1, 0x4000, 64, protocol, 0)
        else:
            header = struct.pack("!IHBB", 6 << 28, len(body), protocol, 64)
        return mend_any(header + (source or self.family.app) + self.endpoint + body)

    # -- the wire, towards the apps -----------------------------------------------------------------------------------

    def pass_to_apps(self) -> None:
        source = self.source
        what = source.byte()
        if not self.to_apps:
            return
        kind = what & 7
        if kind == 7:
            while self.to_apps:
                self.give(self.to_apps.pop(0))
            return
        packet = self.to_apps.pop((what >> 4) % len(self.to_apps))
        if kind == 3:
            return
        if kind == 4:
            self.give(packet)
        elif kind == 5:
            self.to_apps.append(packet)
            return
        elif kind == 6:
            return  # broken on the way: the app's kernel throws it away
        self.give(packet)

    def give(self, packet: bytes) -> None:
        """To the app that it is for, if that lives."""
        frame = read_segment(packet)
        if frame is None:
            return
        key = frame.destination + frame.source + struct.pack("!HH", frame.destination_port, frame.source_port)
        app = self.by_key.get(key)
        if app is None:
            return
        connecting = app.peer.state == "connecting"
        app.peer.handle_packet(packet, self.now)
        if connecting and app.peer.state == "connected":
            app.flow = self.stack.flows.get(key)
        complaints = app.peer.complaints
        assert not complaints or app.forged, complaints
        complaints.clear()
        self.gather(app)

    # -- our shell ----------------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """The shell's round after a batch."""
        stack = self.stack
        for flow in stack.take_requests():
            assert flow.owner is None
            if flow.closed:
                continue
            flow.owner = owner = Owner(flow, len(self.owners) + 1)
            self.owners.append(owner)
            app = self.by_key.get(flow.key)
            if app is not None and flow.irs & MASK == app.peer.iss & MASK:
                owner.app = app
        self.stamp_touched()
        while self._pending:
            flow = self._pending.pop(0)
            self.flush(flow)
            self.stamp_touched()
        for reply in stack.take_replies():
            self.check_reply(bytes(reply))
            self.to_apps.append(bytes(reply))
        self.check()

    def flush(self, flow: Flow) -> None:
        owner = flow.owner
        if owner is None:
            assert flow.failure in ("cancelled", "put off", "refused")
            assert self.stack.flush(flow, self.refuse_write, self.now)
            return
        assert isinstance(owner, Owner)

        def write(header: bytearray | memoryview, views: Sequence[bytes | memoryview], gso_size: int) -> bool:
            if self.room == 0:
                return False
            if self.room > 0:
                self.room -= 1
            self.emit(owner, bytes(header), b"".join(views), gso_size)
            return True

        owner.app_edge = max(owner.app_edge, flow.snd_edge)
        sent = owner.emitted
        while not (done := self.stack.flush(flow, write, self.now)) and self.room:
            assert owner.emitted == sent + MAX_SEGMENTS, "stopped though there was room"
            sent = owner.emitted
        owner.blocked = not done
        assert done or self.room == 0
        if done and not flow.closed:
            self.check_idle(flow)

    @staticmethod
    def refuse_write(_header: bytearray | memoryview, _views: Sequence[bytes | memoryview], _size: int) -> bool:
        raise AssertionError("output of a cancelled request")

    def emit(self, owner: Owner, header: bytes, payload: bytes, gso_size: int) -> None:
        """Judge a segment of ours and put it on the wire."""
        flow = owner.flow
        settings = self.settings
        owner.emitted += 1
        assert not owner.reset_sent, "output after RST"
        assert flow.failure not in ("reset", "cancelled", "put off", "refused"), f"output after {flow.failure}"
        total = len(header) + len(payload)
        assert total <= 65535
        at = self.family.header
        if self.family.version == 4:
            assert header[2] << 8 | header[3] == total
            assert is_whole(header, transport=False)
            assert header[0] == 0x45
            assert header[9] == 6
            start = pseudo(header, 6, total - at)
        else:
            assert header[4] << 8 | header[5] == total - at
            assert header[0] == 0x60
            assert header[6] == 6
            start = pseudo6(header, 6, total - at)
        (partial,) = struct.unpack_from("!H", header, at + 16)
        assert partial == ones_sum(start), "not the pseudo header's sum"
        packet = mend_any(header + payload, ip=False)
        frame = read_segment(packet)
        assert frame is not None
        if gso_size:
            assert settings.offload
            assert 0 < gso_size < len(payload)
            assert len(header) + gso_size <= settings.mtu
        else:
            assert total <= settings.mtu or settings.mtu < 100
        assert (
            frame.destination + frame.source + struct.pack("!HH", frame.destination_port, frame.source_port) == flow.key
        )
        if frame.flags & RST:
            assert not payload
            owner.reset_sent = True
        else:
            assert not flow.failure, f"not a RST after {flow.failure}"
            self.check_promises(owner, frame)
        if payload:
            position = flow.snd_una + self.signed(frame.seq - flow.snd_una)
            assert payload == owner.stream(position - flow.iss - 1, len(payload)), "other bytes than were written"
            assert position - flow.iss - 1 + len(payload) <= owner.written
            assert position + len(payload) <= max(owner.app_edge, flow.snd_edge), "beyond the app's window"
        self.to_apps.append(packet)
        self.sent.append(packet)
        del self.sent[:-16]

    def check_promises(self, owner: Owner, frame: Frame) -> None:
        flow = owner.flow
        assert frame.flags & ACK
        ack = flow.rcv_nxt + self.signed(frame.ack - flow.rcv_nxt)
        assert ack == flow.rcv_nxt
        assert ack >= owner.highest_ack, "an ACK goes back"
        owner.highest_ack = ack
        shift = 0 if frame.flags & SYN else flow._receive_shift
        edge = ack + (frame.window << shift)
        assert edge > owner.edge - (1 << flow._receive_shift), "the window's right edge moves left"
        owner.edge = max(owner.edge, edge)
        options = frame.options
        assert len(options) % 4 == 0
        if flow.ts_on:
            assert b"\x08\x0a" in options
        if not frame.flags & SYN:
            rest = options[12:] if flow.ts_on else options
            if rest:
                assert rest[:3] == b"\x01\x01\x05", "options that nobody expects"
                self.check_blocks(flow, rest[2:])

    def check_blocks(self, flow: Flow, option: bytes) -> None:
        count = (option[1] - 2) // 8
        assert 1 <= count <= 4
        for index in range(count):
            left, right = struct.unpack_from("!II", option, 2 + 8 * index)
            assert 0 < (right - left) & MASK < 1 << 30, "an empty or inverted SACK block"
            above = self.signed(left - flow.rcv_nxt)
            if index:  # the first may be a D-SACK
                assert above > 0, "a SACK block below the ACK"

    @staticmethod
    def signed(value: int) -> int:
        value &= MASK
        return value - (1 << 32) if value >> 31 else value

    def check_reply(self, packet: bytes) -> None:
        """A packet without a flow: an answer that no kernel would be ashamed of."""
        assert is_whole(packet)
        header = self.family.header
        protocol = packet[9 if header == 20 else 6]
        if header == 20:
            assert packet[2] << 8 | packet[3] == len(packet)
            assert packet[16] not in (0, 127), "an answer to nobody"
            assert packet[16] < 224, "an answer to many"
        else:
            assert packet[4] << 8 | packet[5] == len(packet) - 40
            assert packet[24:39] != bytes(15), "an answer to nobody"
            assert packet[24] != 0xFF, "an answer to many"
        if protocol == 6:
            assert len(packet) <= header + 32
            return
        assert protocol == self.family.icmp
        kinds, echo, most = ((0, 3, 11), 0, 576) if header == 20 else ((1, 3, 4, 129), 129, 1280)
        assert packet[header] in kinds
        assert packet[header] == echo or len(packet) <= most

    def check_idle(self, flow: Flow) -> None:
        """After a flush that was not stopped by the device nothing is owed without a timer."""
        assert flow.armed < math.inf, "a flow without a timer"
        deadlines = (flow._rto_at, flow._ack_at, flow._fin_wait_at, flow._keep_at)
        assert flow.armed <= min(deadlines), "a deadline without an alarm"
        if flow.state >= ESTABLISHED and (flow.snd_una < flow.snd_nxt or flow.snd_nxt < flow._send.end):
            assert flow._rto_at < math.inf, "bytes wait, and no timer runs"
        if flow._ack_owed:
            assert flow._ack_at < math.inf, "an ACK is owed, and no timer runs"

    # -- what is always true ------------------------------------------------------------------------------------------

    def check(self) -> None:
        stack = self.stack
        settings = self.settings
        used = undecided = half_open = 0
        for key, flow in stack.flows.items():
            assert flow.key == key
            assert not flow.closed
            used += flow.charged
            undecided += flow.state == SYN_PENDING
            half_open += flow.state == SYN_RECEIVED
            owner = flow.owner
            if isinstance(owner, Owner):
                self.check_flow(flow, owner)
        assert stack.buffered_bytes == used
        assert stack.undecided_count == undecided <= settings.undecided
        assert stack.half_open_count == half_open <= settings.half_open
        assert stack.flow_count <= settings.max_flows
        assert stack.opened == (
            undecided + stack.accepted + stack.refused + stack.cancelled + stack.put_off + self.aborted_requests
        ), "requests went missing"
        table = stack._table
        assert sum(table.others.by_source.values()) <= undecided
        assert sum(table.foreign_half_open.values()) <= half_open
        assert sum(stack.drops.values()) <= stack.packets
        reassembler = stack._reassembler
        assert 0 <= reassembler.bytes_held <= MAX_BYTES
        assert len(reassembler.datagrams) <= MAX_DATAGRAMS
        for at, _, flow in stack._host.heap:
            if flow.armed == at:
                assert stack.flows.get(flow.key) is flow, "a timer without a flow"
        slack = settings.max_flows * (2 * settings.receive_buffer + LAST_RESORT + 2 * WINDOW_SLACK + 65536)
        assert used <= settings.buffers + slack

    def check_flow(self, flow: Flow, owner: Owner) -> None:
        settings = self.settings
        assert flow.rcv_edge >= owner.rcv_edge, "the promised edge moved left"
        assert flow.rcv_nxt >= owner.rcv_nxt
        assert flow.snd_una >= owner.snd_una
        owner.rcv_edge, owner.rcv_nxt, owner.snd_una = flow.rcv_edge, flow.rcv_nxt, flow.snd_una
        assert flow.rcv_nxt <= flow.rcv_edge + 1
        assert flow.snd_una <= flow.snd_nxt <= flow._send.end + 1
        assert flow.readable_bytes == flow._queue.size == sum(map(len, flow.readable_views()))
        assert flow.bytes_from_app == owner.read + flow.readable_bytes
        assert flow.bytes_to_app <= owner.written
        assert flow.readable_bytes <= settings.receive_buffer + WINDOW_SLACK + 256 + 65535
        send = flow._send
        assert sum(map(len, send.pieces)) == send.end - send.start
        assert send.end - send.start <= max(settings.send_buffer, LAST_RESORT)
        waiting = flow._out_of_order
        if waiting is not None:
            assert waiting.starts, "an empty store of early bytes"
            assert waiting.starts[0] > flow.rcv_nxt
            assert waiting.charge <= settings.receive_buffer
            for index, (start, end) in enumerate(zip(waiting.starts, waiting.ends, strict=True)):
                assert start < end
                assert sum(map(len, waiting.pieces[index])) == end - start
                assert not index or start > waiting.ends[index - 1]
            assert waiting.ends[-1] <= flow.rcv_edge
        board = flow._scoreboard
        if board is not None:
            for index, (start, end) in enumerate(zip(board.lefts, board.rights, strict=True)):
                assert flow.snd_una <= start < end <= flow.snd_nxt
                assert not index or start > board.rights[index - 1]
            assert len(board.lefts) <= 64
        assert flow._mss >= 1
        assert flow._cwnd >= 1
        assert len(flow._queue.views) <= 2 + flow.readable_bytes // 1024

    # -- owners -------------------------------------------------------------------------------------------------------

    def owner(self) -> Owner | None:
        index = self.source.byte()
        return self.owners[-1 - index % min(len(self.owners), 4)] if self.owners else None

    def decide(self) -> None:
        owner = self.owner()
        refuse = self.source.byte() & 7 == 7
        if owner is not None:
            if refuse:
                self.stack.refuse(owner.flow, self.now)
            else:
                self.stack.accept(owner.flow, self.now)
            self.serve()

    def owner_writes(self) -> None:
        owner = self.owner()
        size = self.source.pick(SIZES)
        if owner is None or owner.written + size > 200000:
            return
        self.write(owner, size)

    def write(self, owner: Owner, size: int) -> int:
        flow = owner.flow
        space = flow.send_space
        taken = flow.write(memoryview(owner.stream(owner.written, size)), self.now)
        assert 0 <= taken <= size
        assert taken == min(size, max(space, 0)), "send_space says something else than write"
        owner.written += taken
        self.flush(flow)
        self.serve()
        return taken

    def owner_reads(self, owner: Owner, count: int) -> None:
        flow = owner.flow
        count = min(count, flow.readable_bytes)
        data = b"".join(flow.readable_views())[:count]
        app = owner.app
        if app is not None and not app.tainted:
            assert data == app.stream(owner.read, count), "the owner reads other bytes than were sent"
            assert owner.read + count <= app.written
        owner.read += count
        flow.consume(count, self.now)
        if flow.app_finished and app is not None and not app.forged:
            assert owner.read == app.written, "the end came before the last byte"
            assert app.peer._fin_sent
        self.flush(flow)
        self.serve()

    def owner_acts(self) -> None:
        owner = self.owner()
        what = self.source.byte()
        if owner is None:
            return
        flow = owner.flow
        kind = what & 7
        if kind < 3:
            self.owner_reads(owner, 1 << 30 if kind == 0 else SIZES[(what >> 3) % len(SIZES)])
            return
        if kind == 3:
            flow.finish(self.now)
            owner.finished = True
        elif kind == 4:
            flow.release(self.now)
            owner.finished = True
        elif kind == 5:
            if flow.state == SYN_PENDING and not flow.closed:
                self.aborted_requests += 1
            flow.abort(self.now)
        elif kind == 6:
            self.room = what >> 3
        else:
            self.room = -1
            for each in self.owners:
                if each.blocked:
                    self.flush(each.flow)
        self.flush(flow)
        self.serve()

    def rule(self) -> None:
        """Settings that change while flows live."""
        what = self.source.byte()
        stack = self.stack
        kind = what & 7
        if kind == 0:
            stack.set_draining(what & 8 == 8)
        elif kind == 1:
            stack.set_served({self.endpoint: frozenset((PORT, 80) if what & 8 else (80,))})
        elif kind == 2:
            stack.set_served({self.endpoint: frozenset((PORT,))})
        elif kind == 3 and what & 24 == 24:
            stack.abort_all(self.now)
        elif kind == 4:
            stack.set_served({})
        self.serve()

    # -- time ---------------------------------------------------------------------------------------------------------

    def advance(self) -> None:
        what = self.source.byte()
        step = STEPS_S[what & 15]
        if what & 16:
            self.settle()
        self.pass_time(step, alive=what & 32 == 0, flowing=what & 64 == 64)

    def pass_time(self, step: float, *, alive: bool, flowing: bool) -> None:
        """Let timers go off at their moments.

        Args:
            alive: the apps' timers too.
            flowing: frames are delivered at each of these moments.
        """
        until = self.now + step
        rounds = 0
        while True:
            at = self.stack.next_deadline()
            if alive:
                at = min([at, *(app.peer.next_deadline() for app in self.apps if app is not None)])
            if at > until:
                break
            self.now = max(self.now, at)
            self.fire(alive=alive)
            if flowing:
                self.settle()
            rounds += 1
            assert rounds < 3000, "timers without end"
        self.now = until

    def fire(self, *, alive: bool) -> None:
        stack = self.stack
        if self.now >= stack.next_deadline():
            before = sum(stack.drops.values()) - stack.drops.get("fragment", 0)
            stack.handle_timeout(self.now)
            assert sum(stack.drops.values()) - stack.drops.get("fragment", 0) == before, "time drops fragments only"
            self.serve()
            assert stack.next_deadline() > self.now, "a deadline in the past"
        if alive:
            for app in self.apps:
                if app is not None and app.peer.next_deadline() <= self.now:
                    app.peer.handle_timeout(self.now)
                    self.gather(app)

    def settle(self) -> None:
        """Deliver everything both ways, in order, until nobody says anything more."""
        count = 0
        while self.to_us or self.to_apps:
            batch, self.to_us = self.to_us, []
            for packet, app in batch:
                self.deliver(packet, app)
            self.serve()
            packets, self.to_apps = self.to_apps, []
            for packet in packets:
                self.give(packet)
            count += len(batch) + len(packets)
            assert count < FRAMES_AT_ONCE, "a storm of packets"

    # -- the end ------------------------------------------------------------------------------------------------------

    def calm(self) -> None:
        """Nothing gets lost any more and everybody does his part: then everything arrives."""
        self.free_device()
        for each in self.owners:
            self.stack.accept(each.flow, self.now)
        self.serve()
        hopeful: list[tuple[App, Owner]] = []
        for app in self.apps:
            if app is None or app.peer.state == "over":
                continue
            app.peer.auto_read = True
            if app.peer.state == "connected":
                self.app_reads(app, 1 << 30)
                app.peer._emit(app.peer._max, ACK, self.now)
                flow = app.flow
                owner = flow.owner if flow is not None else None
                if (
                    not app.forged
                    and flow is not None
                    and isinstance(owner, Owner)
                    and [each.flow.key for each in self.owners].count(app.key) == 1
                    and not flow.closed
                    and not flow._released
                    and app.peer._losses < 8
                    and (flow.snd_una == flow.snd_nxt or self.now - flow._progress_at < 30)
                    and self.now - flow._heard_at < 200
                    and flow.iss == app.peer._irs
                ):
                    hopeful.append((app, owner))
            app.peer.finish(self.now)
            if app.peer._timer == math.inf:
                app.peer._timer = self.now + 0.2
            self.gather(app)
        for _ in range(60):
            self.settle()
            for app in self.apps:
                if app is not None:
                    self.app_reads(app, 1 << 30)
                    self.gather(app)
            for owner in self.owners:
                self.owner_reads(owner, 1 << 30)
                if owner.flow.app_finished:
                    owner.flow.finish(self.now)
                    self.flush(owner.flow)
                    self.serve()
            self.settle()
            if all(app.peer.finished and app.peer.peer_finished for app, _ in hopeful):
                break
            self.pass_time(2.0, alive=True, flowing=True)
        for app, owner in hopeful:
            flow = owner.flow
            if app.forged:
                continue  # by a frame of another connection that was still under way
            self.app_reads(app, 1 << 30)
            self.owner_reads(owner, 1 << 30)
            assert not flow.failure, flow.failure
            # `AppPeer` knows no TIME-WAIT: when all is over, a stray ACK of its own may earn it a RST.
            assert app.peer.state == "connected" or (app.peer.finished and app.peer.peer_finished), app.peer.error
            assert app.peer.peer_finished, "the app waits for our end"
            assert app.peer.finished, "the app's end was never acknowledged"
            assert app.got == owner.written, "the app got less than was written"
            assert owner.read == app.written, "the owner got less than was sent"
            assert flow.closed

    def free_device(self) -> None:
        self.room = -1
        for owner in self.owners:
            if owner.blocked:
                self.flush(owner.flow)
        self.serve()

    def silence(self) -> None:
        """Nobody says anything any more, and owners do nothing: all must end by itself."""
        stack = self.stack
        self.free_device()
        self.to_us.clear()
        before = sum(owner.emitted for owner in self.owners)
        self.pass_time(SILENCE_S, alive=False, flowing=False)
        emitted = sum(owner.emitted for owner in self.owners) - before
        assert stack.flow_count == 0, "a flow outlives everything"
        assert stack.time_wait_count == 0
        assert stack.next_deadline() == math.inf
        assert stack.buffered_bytes == 0
        assert not stack._reassembler.datagrams
        assert stack._reassembler.bytes_held == 0
        assert not stack._table.others.by_source
        assert not stack._table.foreign_half_open
        assert emitted <= len(self.owners) * 600, "too much said to nobody"
        assert not any(owner.flow.unacknowledged_bytes and owner.flow._send.pieces for owner in self.owners)

    def run(self) -> None:
        source = self.source
        self._pending = []
        actions = (
            self.connect, self.pass_to_us, self.pass_to_apps, self.app_writes, self.app_acts, self.decide,
            self.owner_writes, self.owner_acts, self.advance, self.repeat, self.inject, self.rule,
        )  # fmt: skip
        ending = source.byte()
        # Most programs begin with a connection that is open.
        if ending & 2 == 0:
            self.connect()
            self.settle()
            self.decide()
            self.settle()
        while source.more:
            what = source.byte()
            if what >= 192:
                self.settle()
            else:
                actions[what % len(actions)]()
        self.serve()
        if ending & 1:
            self.calm()
        self.silence()


def run_one(data: bytes) -> None:
    """Run one program."""
    World(Source(data)).run()


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
