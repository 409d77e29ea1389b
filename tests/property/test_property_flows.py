"""The whole stack against apps' kernels in miniature, over a bad link, in any order that Hypothesis can think of.

Packets, doings of owners and apps, and time mix freely: connections open, talk, stall, half-close, reset, leave without
a word; the device is full for a while; a stranger sends segments blindly. What must hold, whatever happens:

  * what one side has received is a prefix of what the other has sent, and all of it where both ended in order,
  * every connection ends, on both sides, once nobody keeps it,
  * the right edge of a window never moves left,
  * memory stays under its bounds, is accounted for to the byte, and is given back,
  * no timer runs for nothing, and nothing waits without a timer.

`PROPERTY_EXAMPLES=20000 python -m pytest tests/property` looks further than the ordinary run, elsewhere each time.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tun.core.buffers import PIECE_OVERHEAD
from tun.core.machine import LAST_RESORT, WINDOW_SLACK
from tun.core.stack import Flow, Stack, StackSettings
from tun.core.states import FIN_WAIT_2, SYN_PENDING, SYN_RECEIVED
from tun.seq import MASK
from tun.testing.apppeer import AppPeer, address_bytes
from tun.testing.memory import NO_FAULTS, Faults, FaultyDevice, memory_pair
from tun.wire.tcp import ACK, FIN, RST, SYN, build_tcp

EXAMPLES: Final = int(os.environ.get("PROPERTY_EXAMPLES", "0"))
# A run that fails takes minutes to find the shortest story that fails.
pytestmark = pytest.mark.timeout(0 if EXAMPLES else 900)

PORT: Final = 80
# Host and endpoint, for IPv4 and IPv6.
ADDRESSES: Final = (("10.107.0.1", "10.107.0.2"), ("fd6b::1", "fd6b::2"))
SECRET: Final = bytes(range(32))

MAX_CONNECTIONS: Final = 3
MAX_STREAM: Final = 400_000
# All that is ever sent are parts of these bytes.
BYTES: Final = Random(0).randbytes(MAX_STREAM + 1000)

# Far more than any exchange of the sizes here takes; two sides that answer each other for ever take more.
STORM: Final = 20_000
# After the last word of either side all is over within this: the longest timers are the give-up after 100 s without
# an answer, 60 s in FIN-WAIT-2 and an app's retransmissions up to 60 s apart.
END_S: Final = 2000.0

SIZES = st.sampled_from((1, 2, 100, 535, 536, 1448, 1460, 1461, 4096, 20_000, 70_000, 200_000))
BUFFERS = st.sampled_from((2048, 4096, 16_384, 65_536, 262_144))
PAUSES = st.sampled_from((0.0005, 0.005, 0.021, 0.1, 0.26, 0.6, 1.0, 3.1, 12.0, 70.0))
RATES = st.sampled_from((0.0, 0.0, 0.02, 0.1, 0.25))


@dataclass(eq=False)
class Connection:
    """One connection, seen from both ends."""

    number: int
    peer: AppPeer
    port: int
    flow: Flow | None = None
    decision: str = ""  # "accepted" or "refused"
    # The app
    app_sent: int = 0
    app_finished: bool = False
    app_aborted: bool = False
    app_gone: bool = False  # without a word: no packet of it leaves any more, and none reaches it
    received: bytearray = field(default_factory=bytearray)
    # The owner
    us_sent: int = 0
    us_finished: bool = False
    us_aborted: bool = False
    us_released: bool = False
    taken: bytearray = field(default_factory=bytearray)
    edge: int = -1
    shift: int = 0

    def bytes_up(self, count: int) -> bytes:
        """What the app sends."""
        return BYTES[self.number : self.number + count]

    def bytes_down(self, count: int) -> bytes:
        """What we send."""
        return BYTES[500 + self.number : 500 + self.number + count]


class Flows(RuleBasedStateMachine):
    """See the module's text. `now` is the only clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.connections: list[Connection] = []
        self.opened = 0
        self.full = False
        self.blocked: dict[Flow, None] = {}
        self.lossy = False

    @initialize(
        receive_buffer=BUFFERS,
        send_buffer=BUFFERS,
        buffers=st.sampled_from((100_000, 1_000_000)),
        offload=st.booleans(),
        vouch=st.booleans(),
        loss=RATES,
        duplication=RATES,
        reordering=RATES,
        corruption=RATES,
        delay_s=st.sampled_from((0.0, 0.0003, 0.05)),
        hold_s=st.sampled_from((0.002, 0.3)),
        seed=st.integers(0, 2**16),
    )
    def begin(
        self,
        receive_buffer: int,
        send_buffer: int,
        buffers: int,
        offload: bool,
        vouch: bool,
        loss: float,
        duplication: float,
        reordering: float,
        corruption: float,
        delay_s: float,
        hold_s: float,
        seed: int,
    ) -> None:
        self.settings = StackSettings(
            gateway6=address_bytes(ADDRESSES[1][0]),
            network6=0xFD6B << 112,
            mask6=((1 << 64) - 1) << 64,
            receive_buffer=receive_buffer,
            send_buffer=send_buffer,
            small_buffer=min(receive_buffer, send_buffer),
            buffers=buffers,
            offload=offload,
        )
        faults = Faults(loss, duplication, reordering, corruption, delay_s, hold_s)
        self.lossy = bool(loss or corruption)
        ours, self.apps = memory_pair(offload=offload, vouch=vouch)
        self.device = FaultyDevice(ours, Random(seed), reading=faults, writing=faults, split=True, now=lambda: self.now)
        self.stack = Stack(self.settings, SECRET)
        self.stack.set_served({address_bytes(endpoint): frozenset({PORT}) for _, endpoint in ADDRESSES})

    # -- apps ---------------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.connections) < MAX_CONNECTIONS)
    @rule(
        mss=st.sampled_from((0, 1, 48, 536, 1460, 65_495)),
        window_scale=st.sampled_from((None, 0, 7, 14)),
        timestamps=st.booleans(),
        sack=st.booleans(),
        buffer=BUFFERS,
        large_segments=st.booleans(),
        initial=st.sampled_from((0, 1, 2**31 - 1000, 2**32 - 2, 2**32 - 70_000, 123_456_789)),
        auto_read=st.booleans(),
        accepted=st.sampled_from((True, True, True, False)),
        ipv6=st.booleans(),
    )
    def connect(
        self,
        mss: int,
        window_scale: int | None,
        timestamps: bool,
        sack: bool,
        buffer: int,
        large_segments: bool,
        initial: int,
        auto_read: bool,
        accepted: bool,
        ipv6: bool,
    ) -> None:
        """An app asks for a connection; mostly it gets one at once."""
        host, endpoint = ADDRESSES[ipv6]
        peer = AppPeer(
            (host, 40_000 + self.opened),
            (endpoint, PORT),
            mss=mss,
            window_scale=window_scale,
            timestamps=timestamps,
            sack=sack,
            buffer=max(buffer, 4 << (window_scale or 0)),  # of less a window of that scale could tell nothing
            segment_limit=65_400 if large_segments else 1460,
            initial_sequence=initial,
            auto_read=auto_read,
            ordered=False,
        )
        self.connections.append(Connection(self.opened, peer, 40_000 + self.opened))
        self.opened += 1
        peer.connect(self.now)
        self.exchange()
        if accepted:
            self.run_until(self.now + 0.11)
            self.decide_on(self.connections[-1], True)

    def pick(self, index: int) -> Connection:
        return self.connections[index % len(self.connections)]

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2), count=SIZES)
    def app_writes(self, index: int, count: int) -> None:
        connection = self.pick(index)
        count = min(count, MAX_STREAM - connection.app_sent)
        if connection.peer.state != "over" and not connection.app_finished and count:
            data = connection.bytes_up(connection.app_sent + count)[connection.app_sent :]
            connection.app_sent += count
            connection.peer.write(data, self.now)
            self.exchange()

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2))
    def app_finishes(self, index: int) -> None:
        connection = self.pick(index)
        if connection.peer.state != "over":
            connection.app_finished = True
            connection.peer.finish(self.now)
            self.exchange()

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2), count=SIZES)
    def app_reads(self, index: int, count: int) -> None:
        connection = self.pick(index)
        connection.received += connection.peer.take(count, self.now)
        self.exchange()

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2))
    def app_aborts(self, index: int) -> None:
        connection = self.pick(index)
        if connection.peer.state == "connected":
            connection.app_aborted = True
            connection.peer.abort(self.now)
            self.exchange()

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2))
    def app_vanishes(self, index: int) -> None:
        """Its network namespace is gone, or it closed its socket while it was connecting."""
        self.pick(index).app_gone = True

    # -- owners -------------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2), yes=st.sampled_from((True, True, True, False)))
    def decide(self, index: int, yes: bool) -> None:
        self.decide_on(self.pick(index), yes)

    def decide_on(self, connection: Connection, yes: bool) -> None:
        flow = connection.flow
        if flow is not None and not connection.decision:
            connection.decision = "accepted" if yes else "refused"
            if yes:
                self.stack.accept(flow, self.now)
            else:
                self.stack.refuse(flow, self.now)
            self.after(flow)

    def accepted(self, index: int) -> tuple[Connection, Flow] | None:
        connection = self.pick(index)
        if connection.flow is None or connection.decision != "accepted":
            return None
        return connection, connection.flow

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2), count=SIZES)
    def we_write(self, index: int, count: int) -> None:
        if (found := self.accepted(index)) is not None:
            connection, flow = found
            count = min(count, MAX_STREAM - connection.us_sent)
            data = connection.bytes_down(connection.us_sent + count)[connection.us_sent :]
            connection.us_sent += flow.write(memoryview(data), self.now)
            self.after(flow)

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2), up=SIZES, down=SIZES, rounds=st.sampled_from((1, 5, 30)))
    def both_talk(self, index: int, up: int, down: int, rounds: int) -> None:
        """For a while, everybody writes and reads."""
        if (found := self.accepted(index)) is None:
            return
        connection, flow = found
        for _ in range(rounds):
            self.app_writes(index, up)
            self.we_write(index, down)
            self.run_until(self.now + 0.002)
            self.take(connection, flow, flow.readable_bytes)
            self.after(flow)
            self.app_reads(index, MAX_STREAM)

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2), count=SIZES)
    def we_take(self, index: int, count: int) -> None:
        if (found := self.accepted(index)) is not None:
            self.take(*found, count)
            self.after(found[1])

    def take(self, connection: Connection, flow: Flow, count: int) -> None:
        count = min(count, flow.readable_bytes)
        connection.taken += b"".join(flow.readable_views())[:count]
        flow.consume(count, self.now)

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2))
    def we_finish(self, index: int) -> None:
        if (found := self.accepted(index)) is not None:
            found[0].us_finished = True
            found[1].finish(self.now)
            self.after(found[1])

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2))
    def we_release(self, index: int) -> None:
        if (found := self.accepted(index)) is not None:
            connection, flow = found
            unread = flow.readable_bytes and not flow.closed
            connection.us_finished = connection.us_released = True
            flow.release(self.now)
            assert not unread or flow.failure == "unread", "the app must learn that its bytes reached nobody"
            self.after(flow)

    @precondition(lambda self: self.connections)
    @rule(index=st.integers(0, 2))
    def we_abort(self, index: int) -> None:
        if (found := self.accepted(index)) is not None:
            found[0].us_aborted = True
            found[1].abort(self.now)
            self.after(found[1])

    @precondition(lambda self: self.connections)
    @rule()
    def device_fills_or_empties(self) -> None:
        """Nothing is lost by it: who could not write is asked again."""
        self.full = not self.full
        if not self.full:
            self.write_again()
            self.exchange()

    @precondition(lambda self: self.connections)
    @rule(
        index=st.integers(0, 2),
        flags=st.sampled_from((0, ACK, SYN, SYN | ACK, RST, RST | ACK, FIN, FIN | ACK, FIN | SYN, 0x3F)),
        distance=st.one_of(st.integers(0, MASK), st.integers(-3000, 3000)),
        ack=st.one_of(st.integers(0, MASK), st.none()),
        count=st.sampled_from((0, 1, 1000)),
    )
    def stranger_sends(self, index: int, flags: int, distance: int, ack: int | None, count: int) -> None:
        """Somebody who knows addresses and ports, even what we expect to be acknowledged, but not the window.

        Who hits the window can do anything, except with RST, which must hit its edge exactly, and with SYN (RFC 5961).
        """
        connection = self.pick(index)
        flow = connection.flow
        if flow is None or flow.closed or flow.state == SYN_PENDING:
            return
        distance &= MASK
        end = distance + count + (flags & FIN)
        if distance == 0 or (not flags & (RST | SYN) and (distance <= flow.rcv_edge - flow.rcv_nxt or end > MASK)):
            return
        if flags & SYN and flow.state == SYN_RECEIVED and (distance + flow.rcv_nxt - flow.irs) & MASK == 0:
            return  # the app's own SYN again
        seq = (flow.rcv_nxt + distance) & MASK
        ack = flow.snd_una & MASK if ack is None else ack
        before = flow.state, flow.rcv_nxt, flow.snd_una, flow.snd_edge
        packet = build_tcp(
            flow.source[0], flow.destination[0], connection.port, PORT,
            seq=seq, ack=ack, flags=flags, window=ack & 0xFFFF, payload=b"X" * count,
        )  # fmt: skip
        self.stack.handle_packet(bytes(packet), 0, True, self.now)
        assert (flow.state, flow.rcv_nxt, flow.snd_una, flow.snd_edge) == before, "a stranger was believed"
        self.settle()
        self.exchange()

    # -- the link, and our shell --------------------------------------------------------------------------------------

    @rule(seconds=PAUSES)
    def time_passes(self, seconds: float) -> None:
        self.run_until(self.now + seconds)

    def run_until(self, end: float) -> None:
        for _ in range(STORM):
            due = self.next_event()
            if due > end:
                break
            self.now = max(self.now, due)
            if self.stack.next_deadline() <= self.now:
                self.stack.handle_timeout(self.now)
                assert self.stack.next_deadline() > self.now, "a deadline that does not go away"
                self.settle()
            for connection in self.connections:
                if connection.peer.next_deadline() <= self.now:
                    connection.peer.handle_timeout(self.now)
            self.exchange()
        else:
            raise AssertionError("it never stops")
        self.now = max(self.now, end)
        self.exchange()

    def next_event(self) -> float:
        moments = [self.stack.next_deadline()]
        moments += [connection.peer.next_deadline() for connection in self.connections]
        moments += [heap[0][0] for heap in (self.device._arriving, self.device._leaving) if heap]
        return min(moments)

    def exchange(self) -> None:
        """Let packets move until none moves any more at this moment."""
        for _ in range(STORM):
            moved = False
            for connection in self.connections:
                for packet in connection.peer.take_packets():
                    if not connection.app_gone:
                        self.apps.write_packet(packet)
            count = 0
            while count < 64 and (read := self.device.read()) is not None:
                self.stack.handle_packet(read, self.device.prefix, self.device.verified(read), self.now)
                count += 1
            if count:
                moved = True
                self.settle()
            while (packet_or_none := self.apps.read()) is not None:
                moved = True
                self.deliver(packet_or_none)
            if not moved:
                return
        raise AssertionError("a storm of packets")

    def deliver(self, packet: bytes) -> None:
        start, protocol = (20, packet[9]) if packet[0] == 0x45 else (40, packet[6])
        if protocol != 6 or len(packet) < start + 20:
            return
        port = int.from_bytes(packet[start + 2 : start + 4], "big")
        for connection in self.connections:
            if connection.port == port and not connection.app_gone:
                connection.peer.handle_packet(packet, self.now)

    def settle(self) -> None:
        """What the shell does at the end of a batch."""
        for flow in self.stack.take_requests():
            for connection in self.connections:
                if connection.port == flow.source[1]:
                    self.request(connection, flow)
        for flow in self.stack.take_touched():
            self.flush(flow)
        for packet in self.stack.take_replies():
            self.device.write_packet(packet)

    def request(self, connection: Connection, flow: Flow) -> None:
        if connection.flow is not None and connection.peer.state != "connecting":
            self.stack.refuse(flow, self.now)  # a SYN that was on its way for longer than its connection lived
            return
        connection.flow = flow
        connection.decision = ""
        connection.edge = -1
        connection.us_sent = 0
        connection.us_finished = connection.us_aborted = connection.us_released = False

    def after(self, flow: Flow) -> None:
        self.flush(flow)
        self.settle()
        self.exchange()

    def flush(self, flow: Flow) -> None:
        if not self.stack.flush(flow, self.write, self.now):
            self.blocked[flow] = None

    def write_again(self) -> None:
        blocked, self.blocked = self.blocked, {}
        for flow in blocked:
            self.flush(flow)

    def write(self, header: bytearray | memoryview, views: Sequence[bytes | memoryview], gso_size: int) -> bool:
        if self.full:
            return False
        self.note_window(bytes(header))
        return self.device.write(header, views, gso_size)

    def note_window(self, header: bytes) -> None:
        tcp = header[20:] if header[0] == 0x45 else header[40:]
        port, flags = int.from_bytes(tcp[2:4], "big"), tcp[13]
        if flags & RST:
            return
        for connection in self.connections:
            flow = connection.flow
            if connection.port == port and flow is not None:
                ack = int.from_bytes(tcp[8:12], "big")
                shift = 0 if flags & SYN else flow._receive_shift
                window = int.from_bytes(tcp[14:16], "big") << shift
                edge = flow.rcv_nxt + ((ack - flow.rcv_nxt + (1 << 31)) & MASK) - (1 << 31) + window
                # RFC 7323 2.4: what is not a multiple of the unit may once be told as less, and is accepted still.
                rounds_down = flow._drift >= WINDOW_SLACK or flow.state == SYN_RECEIVED
                slack = (1 << flow._receive_shift) - 1 if rounds_down else 0
                assert edge >= connection.edge - slack, "the window's edge has moved left"
                connection.edge = max(connection.edge, edge)

    # -- what must hold at any time -----------------------------------------------------------------------------------

    @invariant()
    def everything_holds(self) -> None:
        if hasattr(self, "stack"):
            self.only_what_was_sent_arrives()
            self.nobody_complains()
            self.memory_is_bounded_and_accounted_for()
            self.the_tables_are_right()
            self.nothing_waits_without_a_timer()

    def only_what_was_sent_arrives(self) -> None:
        for connection in self.connections:
            flow = connection.flow
            waiting = b"" if flow is None else b"".join(flow.readable_views())
            got = bytes(connection.taken) + waiting
            assert got == connection.bytes_up(connection.app_sent)[: len(got)]
            got = bytes(connection.received) + bytes(connection.peer.received)
            assert got == connection.bytes_down(connection.us_sent)[: len(got)]

    def nobody_complains(self) -> None:
        """A damaged packet may look like anything; without damage there is no excuse."""
        for connection in self.connections:
            wrong = [text for text in connection.peer.complaints if not text.startswith("bad ")]
            assert wrong == []

    def memory_is_bounded_and_accounted_for(self) -> None:
        receive, send = self.settings.receive_buffer, self.settings.send_buffer
        flows = self.stack.flows.values()
        for flow in flows:
            assert flow.readable_bytes <= receive + WINDOW_SLACK + (1 << flow._receive_shift)
            assert flow._send.end - flow._send.start <= max(send, LAST_RESORT)
            waiting = flow._out_of_order
            if waiting is not None:
                assert waiting.charge <= receive * 3 // 4 + 2 * PIECE_OVERHEAD
                assert waiting.charge == sum(
                    len(piece) + PIECE_OVERHEAD for pieces in waiting.pieces for piece in pieces
                )
        assert self.stack.buffered_bytes == sum(flow.charged for flow in flows)
        assert self.stack.buffered_bytes >= 0

    def the_tables_are_right(self) -> None:
        flows = list(self.stack.flows.values())
        assert not any(flow.closed or flow.touched for flow in flows)
        assert self.stack.undecided_count == sum(flow.state == SYN_PENDING for flow in flows)
        assert self.stack.half_open_count == sum(flow.state == SYN_RECEIVED for flow in flows)
        if not flows and not self.stack.time_wait_count:
            # Memory that was full is looked at once more, a second later.
            assert not self.now + 1.0 < self.stack.next_deadline() < float("inf"), "a timer for nobody"

    def nothing_waits_without_a_timer(self) -> None:
        for flow in self.stack.flows.values():
            if flow not in self.blocked:
                unanswered = flow.snd_una < flow.snd_nxt or (flow.snd_nxt < flow._send.end and flow.snd_una > flow.iss)
                assert not unanswered or flow._rto_at < float("inf"), "sent, or to be sent, and nobody watches"
                if flow.state == FIN_WAIT_2 and flow._released:
                    assert flow._fin_wait_at < float("inf"), "half-closed, and nobody wants the other half"
            assert flow.armed < float("inf"), "every flow has a deadline, if only to ask whether the app is still there"

    # -- the end ------------------------------------------------------------------------------------------------------

    def teardown(self) -> None:
        """The link is good again and everybody comes to an end."""
        if not hasattr(self, "stack"):
            return
        self.device.reading = self.device.writing = NO_FAULTS
        self.full = False
        self.write_again()
        self.exchange()
        before = [(connection, bool(connection.flow and connection.flow.failure)) for connection in self.connections]
        deadline = self.now + END_S
        while self.now < deadline and not self.is_over():
            for connection in self.connections:
                self.wind_up(connection)
            self.run_until(min(self.next_event(), self.now + 10.0))
        for connection, _ in before:
            self.check_end(connection)
        assert self.stack.flow_count == 0, [(flow.state, flow.key.hex()) for flow in self.stack.flows.values()]
        assert self.stack.buffered_bytes == 0
        self.run_until(self.now + 11.0)  # TIME-WAIT
        assert self.stack.time_wait_count == 0
        assert self.stack.next_deadline() == float("inf")

    def is_over(self) -> bool:
        return self.stack.flow_count == 0 and all(
            c.app_gone or c.peer.state == "over" or (c.peer.finished and c.peer.peer_finished) for c in self.connections
        )

    def wind_up(self, connection: Connection) -> None:
        """Both ends read all that comes and say that they have no more to say."""
        peer, flow = connection.peer, connection.flow
        connection.received += peer.take(len(peer.received), self.now)
        if not connection.app_finished and peer.state in ("connecting", "connected"):
            connection.app_finished = True
            peer.finish(self.now)
        if peer.finished and not peer.peer_finished:
            peer.keep_alive(self.now)  # our reset may have been lost
        if flow is not None:
            if not connection.decision:
                connection.decision = "accepted"
                self.stack.accept(flow, self.now)
            self.take(connection, flow, flow.readable_bytes)
            if not connection.us_finished:
                connection.us_finished = True
                flow.finish(self.now)
            self.flush(flow)
            self.settle()
        self.exchange()

    def check_end(self, connection: Connection) -> None:
        self.only_what_was_sent_arrives()
        peer, flow = connection.peer, connection.flow
        if connection.app_gone:
            return
        assert peer.state == "over" or (peer.finished and peer.peer_finished), (peer.state, flow and flow.failure)
        if flow is None or connection.decision != "accepted":
            return
        assert flow.closed
        self.take(connection, flow, flow.readable_bytes)
        connection.received += peer.take(len(peer.received), self.now)
        if connection.app_aborted or connection.us_aborted or connection.us_released or flow.failure or peer.error:
            # Somebody cut it: then somebody is told, unless all had been said.
            if connection.app_aborted and not flow.failure:
                assert connection.us_finished
                assert connection.app_finished or connection.us_released
            return
        assert len(connection.taken) == connection.app_sent
        assert len(connection.received) == connection.us_sent


TestFlows = Flows.TestCase
TestFlows.settings = settings(
    max_examples=EXAMPLES or 600,
    stateful_step_count=40,
    deadline=None,
    derandomize=not EXAMPLES,
    database=None,
    suppress_health_check=list(HealthCheck),
)
