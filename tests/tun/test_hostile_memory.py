"""What a connection may cost in memory and work, whatever it sends and does not read. With literal times."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import trio
import trio.testing

from tun.core.machine import FIRST_CWND, MAX_SEGMENTS, Flow
from tun.core.stack import Stack, StackSettings
from tun.core.states import ESTABLISHED
from tun.network import FlowRequest, Network
from tun.testing.memory import memory_pair
from tun.testing.playbook import tuned
from tun.wire.tcp import ACK, SYN, build_tcp, options

ENDPOINT = b"\x0a\x6b\x00\x02"
APP = b"\x0a\x6b\x00\x01"
MASK = 0xFFFFFFFF


class Host:
    """A stack and connections to it; what it sends is counted and forgotten."""

    def __init__(self, settings: StackSettings | None = None) -> None:
        self.stack = Stack(settings or StackSettings(), b"k" * 32)
        self.stack.set_served({ENDPOINT: frozenset((443,))})
        self.now = 100.0
        self.packets = 0

    def connect(self, port: int = 4000, *, window: int = 65535, mss: int = 1460) -> Flow:
        extra = options(mss=mss, window_scale=7, sack_permitted=True)
        self.send(port, 0, flags=SYN, window=window, extra=extra)
        (flow,) = self.stack.take_requests()
        self.stack.accept(flow, self.now)
        self.settle()
        self.send(port, 1, ack=flow.snd_nxt, window=window)
        self.settle()
        assert flow.state == ESTABLISHED
        return flow

    def send(
        self,
        port: int,
        seq: int,
        payload: bytes = b"",
        *,
        ack: int = 0,
        flags: int = ACK,
        window: int = 65535,
        extra: bytes = b"",
    ) -> None:
        packet = build_tcp(
            APP,
            ENDPOINT,
            port,
            443,
            seq=seq & MASK,
            ack=ack & MASK,
            flags=flags,
            window=window,
            payload=payload,
            options=extra,
        )
        self.stack.handle_packet(bytes(packet), 0, True, self.now)

    def settle(self) -> None:
        for flow in self.stack.take_touched():
            self.stack.flush(flow, self.write, self.now)
        self.stack.take_replies()

    def write(self, header: object, views: object, gso: int) -> bool:
        self.packets += 1
        return True


def alive(views: Iterable[memoryview]) -> int:
    """Bytes that these views keep in memory."""
    return sum({id(view.obj): len(bytes(view.obj)) for view in views}.values())


@pytest.mark.parametrize("gap", [0, 1], ids=["in order", "beyond a gap"])
def test_large_segments_that_bring_little_keep_little_alive(gap: int) -> None:
    """Each repeats 58,000 bytes and adds 2,100: what is kept of it is those, or a window would hold 14 MiB."""
    host = Host()
    flow = host.connect()
    brought = 60_000
    host.send(4000, 1 + gap, bytes(60_000), ack=flow.snd_nxt)
    host.settle()
    while brought + 2_100 < 380_000:
        brought += 2_100
        host.send(4000, 1 + gap + brought - 60_000, bytes(60_000), ack=flow.snd_nxt)
        host.settle()
    views = list(flow.readable_views())
    if flow._out_of_order is not None:
        views += [piece for pieces in flow._out_of_order.pieces for piece in pieces]

    assert sum(map(len, views)) > 300_000
    assert alive(views) <= 2 * sum(map(len, views)) + 60_000


def test_what_the_window_cuts_off_is_not_kept() -> None:
    """A segment that begins 3,000 bytes before the window's end and is twenty times as long."""
    host = Host()
    flow = host.connect()
    flow_edge = flow.rcv_edge - flow.irs
    host.send(4000, flow_edge - 3_000, bytes(60_000), ack=flow.snd_nxt)
    host.settle()

    waiting = flow._out_of_order
    assert waiting is not None
    views = [piece for pieces in waiting.pieces for piece in pieces]
    assert sum(map(len, views)) == 3_000
    assert alive(views) == 3_000


def test_a_small_mss_costs_no_more_packets_than_others_have() -> None:
    """Without offload a window would be 14,000 packets of 36 bytes; a turn has 128, and then it is another's turn."""
    host = Host(tuned(offload=False))
    flow = host.connect(mss=1, window=60000)
    assert flow.peer_mss == 48
    flow.write(memoryview(bytes(500_000)), host.now)
    turns = []
    done = False
    while not done:
        before = host.packets
        done = host.stack.flush(flow, host.write, host.now)
        turns.append(host.packets - before)

    assert turns[:-1] == [MAX_SEGMENTS] * (len(turns) - 1)
    assert FIRST_CWND - 48 < flow.snd_nxt - flow.snd_una <= FIRST_CWND


def test_what_is_resent_in_small_segments_is_resent_in_turns() -> None:
    """A peer that says it lost every second byte of a window of small segments."""
    host = Host(tuned(offload=False))
    flow = host.connect(mss=48, window=60000)
    flow.write(memoryview(bytes(200_000)), host.now)
    while not host.stack.flush(flow, host.write, host.now):
        pass
    for _ in range(3):
        left = (flow.snd_nxt - 48) & MASK
        host.send(4000, 1, ack=flow.snd_una, extra=options(sacks=[(left, flow.snd_nxt & MASK)]))
    turns = []
    done = False
    while not done:
        before = host.packets
        done = host.stack.flush(flow, host.write, host.now)
        turns.append(host.packets - before)

    assert max(turns) == MAX_SEGMENTS
    assert len(turns) > 3
    assert host.stack.retransmits > 3 * MAX_SEGMENTS


async def test_a_flow_that_sends_much_lets_others_send(autojump_clock: trio.testing.MockClock) -> None:
    """The pump asks it again after them; nothing is lost, and all comes in the end."""
    settings = tuned(offload=False)
    ours, theirs = memory_pair()
    stack = Stack(settings, b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((443,))})
    requests: list[FlowRequest] = []
    async with trio.open_nursery() as nursery:
        await nursery.start(Network(ours, stack, requests.append).run)
        extra = options(mss=48, window_scale=7)
        theirs.write_packet(bytes(build_tcp(APP, ENDPOINT, 4000, 443, seq=0, flags=SYN, window=60000, options=extra)))
        await trio.testing.wait_all_tasks_blocked()
        stream = requests.pop().accept()
        (flow,) = stack.flows.values()
        ack = flow.snd_nxt & MASK
        theirs.write_packet(bytes(build_tcp(APP, ENDPOINT, 4000, 443, seq=1, ack=ack, flags=ACK, window=60000)))
        await trio.testing.wait_all_tasks_blocked()
        while theirs.read() is not None:
            pass
        stream.send_nowait(bytes(40_000))
        packets = 0
        at_once = 0
        while flow.snd_nxt < flow._send.end:
            while theirs.read() is not None:
                packets += 1
            at_once = at_once or packets
            await trio.lowlevel.checkpoint()
        while theirs.read() is not None:
            packets += 1
        nursery.cancel_scope.cancel()

    assert at_once <= MAX_SEGMENTS
    assert packets == -(-40_000 // 48)
