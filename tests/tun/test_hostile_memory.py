"""What a connection may cost in memory and work, whatever it sends and does not read. With literal times."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from tun.core.machine import Flow
from tun.core.stack import Stack, StackSettings
from tun.core.states import ESTABLISHED
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
