"""Whole transfers against an app's kernel in miniature, over links that lose, repeat, reorder and damage.

What must hold whatever happens on the way: the bytes delivered are a prefix of the bytes sent, in both directions, and
in the end all of them; both sides end; the promised window never shrinks; nothing is left behind.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tun.core.stack import Flow, Stack, StackSettings
from tun.testing.apppeer import AppPeer
from tun.wire.checksum import complete

ENDPOINT = b"\x0a\x6b\x00\x02"


@dataclass(frozen=True, slots=True)
class Link:
    """What happens to packets, as probabilities; delays are seconds."""

    loss: float = 0.0
    repeat: float = 0.0
    damage: float = 0.0
    reorder: float = 0.0
    delay: float = 0.0001


class World:
    """One app, one stack, one link and a clock: everything that happens is an event in a heap."""

    def __init__(self, seed: int, link: Link, settings: StackSettings, **peer: int | bool | None) -> None:
        self.rng = random.Random(seed)
        self.link = link
        self.now = 10.0
        self.stack = Stack(settings, b"s" * 16)
        self.stack.set_served({ENDPOINT: frozenset((443,))})
        self.peer = AppPeer(("10.107.0.1", 40000), ("10.107.0.2", 443), **peer)  # type: ignore[arg-type]
        self.flow: Flow | None = None
        self.got = bytearray()
        self.to_send = b""
        self.sent = 0
        self.finish_when_sent = True
        self.read_chance = 1.0
        self.edge = 0
        self.events: list[tuple[float, int, str, bytes]] = []
        self.tickets = 0

    def carry(self, to: str, packet: bytes) -> None:
        rng, link = self.rng, self.link
        copies = 2 if rng.random() < link.repeat else 1
        for _ in range(copies):
            if rng.random() < link.loss:
                continue
            if rng.random() < link.damage:
                damaged = bytearray(packet)
                damaged[rng.randrange(len(packet))] ^= 1 << rng.randrange(8)
                packet = bytes(damaged)
            delay = link.delay * (rng.random() * 5 + 1 if rng.random() < link.reorder else 1)
            self.tickets += 1
            heapq.heappush(self.events, (self.now + delay, self.tickets, to, packet))

    def write(self, header: bytearray | memoryview, views: Sequence[bytes | memoryview], gso_size: int) -> bool:
        if self.rng.random() < 0.02:
            return False  # the device is full now and then
        packet = bytearray(header)
        complete(packet, 20, 36, views)
        self.carry("app", bytes(packet) + b"".join(views))
        return True

    def serve(self) -> None:
        """The shell's round, and the owner's part."""
        stack, now = self.stack, self.now
        for flow in stack.take_requests():
            self.flow = flow
            stack.accept(flow, now)
        for flow in stack.take_touched():
            self.own(flow)
            stack.flush(flow, self.write, now)
        if self.flow is not None:
            stack.flush(self.flow, self.write, now)
        for reply in stack.take_replies():
            self.carry("app", bytes(reply))
        for packet in self.peer.take_packets():
            self.carry("us", packet)

    def own(self, flow: Flow) -> None:
        now = self.now
        if flow.readable_bytes and self.rng.random() < self.read_chance:
            views = flow.readable_views()
            count = self.rng.randint(1, flow.readable_bytes) if self.read_chance < 1 else flow.readable_bytes
            self.got += b"".join(views)[:count]
            flow.consume(count, now)
        while self.sent < len(self.to_send):
            piece = memoryview(self.to_send)[self.sent : self.sent + self.rng.choice((100, 5000, 16384, 65536))]
            taken = flow.write(piece, now)
            self.sent += taken
            if taken < len(piece):
                break
        if self.sent == len(self.to_send) and self.finish_when_sent:
            flow.finish(now)
        assert flow.rcv_edge >= self.edge
        self.edge = flow.rcv_edge

    def step(self) -> bool:
        """Let the next thing happen; False when nothing ever will."""
        self.serve()
        flow = self.flow
        pause = (
            self.now + 0.05 if flow is not None and (flow.readable_bytes or self.sent < len(self.to_send)) else math.inf
        )
        at = min(
            self.events[0][0] if self.events else math.inf, self.stack.next_deadline(), self.peer.next_deadline(), pause
        )
        if at == math.inf or at > 100000.0:
            return False
        self.now = max(at, self.now)
        while self.events and self.events[0][0] <= self.now:
            _, _, to, packet = heapq.heappop(self.events)
            if to == "us":
                self.stack.handle_packet(packet, 0, False, self.now)
            else:
                self.peer.handle_packet(packet, self.now)
        if self.stack.next_deadline() <= self.now:
            self.stack.handle_timeout(self.now)
        if self.peer.next_deadline() <= self.now:
            self.peer.handle_timeout(self.now)
        if flow is not None and not flow.closed:
            flow.touch()
        elif flow is not None and flow.readable_bytes:
            self.own(flow)
        return True


LINKS = {
    "clean": Link(),
    "loss": Link(loss=0.05),
    "heavy loss": Link(loss=0.2),
    "reorder": Link(reorder=0.3),
    "everything": Link(loss=0.05, repeat=0.05, damage=0.02, reorder=0.2, delay=0.002),
}


def transfer(seed: int, link: Link, up: int, down: int, settings: StackSettings, **peer: int | bool | None) -> World:
    """Send both ways, end both ways, and check what must hold."""
    world = World(seed, link, settings, ordered=link.reorder == 0, **peer)
    upload = world.rng.randbytes(up)
    world.to_send = world.rng.randbytes(down)
    world.read_chance = world.rng.choice((1.0, 0.5, 0.1))
    world.peer.connect(world.now)
    offset = 0
    for _ in range(60000):
        if world.peer.state == "connected" and offset < up and world.peer.unacknowledged < 100000:
            piece = upload[offset : offset + world.rng.choice((1, 100, 1460, 30000))]
            world.peer.write(piece, world.now)
            offset += len(piece)
            if offset >= up:
                world.peer.finish(world.now)
        elif world.peer.state == "connected" and up == 0 and not world.peer._fin:
            world.peer.finish(world.now)
        if not world.step():
            break
        assert upload.startswith(bytes(world.got)) or len(world.got) > 3000
        if world.flow is not None and world.flow.closed and not world.flow.readable_bytes and not world.events:
            break
    flow = world.flow
    assert flow is not None
    assert flow.failure == ""
    assert flow.closed
    assert bytes(world.got) == upload
    assert bytes(world.peer.received) == world.to_send
    assert world.peer.peer_finished
    assert flow.app_finished
    assert flow.all_acknowledged
    assert flow.bytes_from_app == up
    assert flow.bytes_to_app == down
    assert [complaint for complaint in world.peer.complaints if link.damage == 0] == []
    world.stack.handle_timeout(world.now + 20)
    assert world.stack.flow_count == 0
    assert world.stack.buffered_bytes == 0
    return world


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("seed", range(6))
def test_every_byte_arrives(name: str, seed: int) -> None:
    """Both ways at once, with offload, timestamps and SACK, over every kind of link."""
    transfer(seed, LINKS[name], 60_000, 150_000, StackSettings(), segment_limit=30000 if seed % 2 else 1460)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("plain", ["nothing", "no sack", "no stamps", "no scale"])
def test_every_byte_arrives_without_options(plain: str, seed: int) -> None:
    """What an app's kernel does not offer is not used."""
    transfer(
        seed,
        LINKS["loss"],
        30_000,
        60_000,
        StackSettings(offload=False),
        sack=plain not in ("nothing", "no sack"),
        timestamps=plain not in ("nothing", "no stamps"),
        window_scale=None if plain in ("nothing", "no scale") else 7,
    )


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_arrives_across_the_wrap(seed: int) -> None:
    """The numbers pass 2**32 in mid-stream."""
    transfer(seed, LINKS["everything"], 60_000, 60_000, StackSettings(), initial_sequence=2**32 - 20000)


@pytest.mark.parametrize("seed", range(4))
def test_every_byte_arrives_through_small_buffers(seed: int) -> None:
    """Windows close all the time: probes, updates, splits."""
    settings = StackSettings(receive_buffer=8192, send_buffer=8192, small_buffer=8192)
    transfer(seed, LINKS["loss"], 40_000, 40_000, settings, buffer=4096, mss=500)


def test_bulk_is_fast_on_a_clean_link() -> None:
    """No timer ever goes off where nothing is lost: ten megabytes in few packets and little time."""
    world = transfer(1, LINKS["clean"], 0, 10_000_000, StackSettings(), buffer=4_000_000, segment_limit=65000)

    assert world.stack.retransmits == 0
    assert world.now < 11.0


def test_single_loss_is_repaired_without_a_timeout() -> None:
    """One of many segments is lost on the way to the app: SACK and fast retransmission, not the clock."""
    world = World(5, Link(delay=0.001), StackSettings(offload=False))
    world.read_chance = 1.0
    world.to_send = world.rng.randbytes(300_000)
    world.peer.connect(world.now)
    carried = 0
    carry = world.carry

    def lossy(to: str, packet: bytes) -> None:
        nonlocal carried
        carried += to == "app"
        if carried == 20 and to == "app":
            return
        carry(to, packet)

    world.carry = lossy  # type: ignore[method-assign]
    while len(world.peer.received) < 300_000 and world.step():
        pass

    assert bytes(world.peer.received) == world.to_send
    assert 1 <= world.stack.retransmits <= 3
    assert world.now < 10.2


def test_reset_in_mid_transfer_ends_both_sides() -> None:
    """And frees everything."""
    world = World(3, LINKS["everything"], StackSettings(), ordered=False)
    world.to_send = world.rng.randbytes(500_000)
    world.peer.connect(world.now)
    while len(world.peer.received) < 100_000 and world.step():
        pass
    assert world.flow is not None
    world.flow.abort(world.now)
    for _ in range(2000):
        if world.peer.state == "over" or not world.step():
            break

    assert world.peer.error == "reset"
    assert world.flow.failure == "aborted"
    assert world.stack.flow_count == 0
    assert world.stack.buffered_bytes == 0
    assert world.to_send.startswith(bytes(world.peer.received))
