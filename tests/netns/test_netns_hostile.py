"""Hostile packets through a real TUN device, while the kernel's own TCP is a client that means well.

Raw packets are put onto the link by a packet socket, as root in a namespace or a neighbour could: nothing between it
and the stack looks at them. Such packets come without the kernel's word for their checksums.
"""

from __future__ import annotations

import hashlib
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from tests.netns.support import Namespace
from tun.core.stack import Stack, StackSettings
from tun.device.linux import open_tun
from tun.network import FlowRequest, Network
from tun.wire import icmp
from tun.wire.ipv4 import FLAG_MF, build_ipv4
from tun.wire.tcp import ACK, FIN, PSH, RST, SYN, URG, build_tcp

SERVED = ("10.107.0.2", 80)
ENDPOINT = bytes((10, 107, 0, 2))
APP = bytes((10, 107, 0, 1))
GUESTS = (4, 0xAC100000, 0xFFF00000)
ETH_P_IP = 0x0800
MASK = 0xFFFFFFFF


class World:
    """A stack behind a TUN device that echoes, and a socket that puts anything onto the link."""

    def __init__(self, ns: Namespace) -> None:
        self.ns = ns
        self.tun = ns.call(open_tun, "ngrokd0")
        ns.run(["ip", "link", "set", "ngrokd0", "addrgenmode", "none"])
        ns.run(["ip", "addr", "add", "10.107.0.1/32", "dev", "ngrokd0"])
        ns.run(["ip", "link", "set", "ngrokd0", "up", "mtu", "1500", "txqueuelen", "5000"])
        ns.run(["ip", "route", "add", "10.107.0.0/16", "dev", "ngrokd0"])
        self.stack = Stack(StackSettings(), bytes(range(32)))
        self.stack.set_served({ENDPOINT: frozenset({80})})
        self.stack.set_sources(frozenset((APP,)), [GUESTS])
        self.network = Network(self.tun, self.stack, self.on_request)
        self.undecided: list[FlowRequest] = []
        self.nursery: trio.Nursery | None = None
        self.raw = ns.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self.sent = 0

    def on_request(self, request: FlowRequest) -> None:
        assert self.nursery is not None
        if request.source[0] == "10.107.0.1":
            self.nursery.start_soon(echo, request)
        else:
            self.undecided.append(request)

    async def inject(self, packet: bytes | bytearray) -> None:
        """Put a packet onto the link, and wait now and then until the stack has read what came before."""
        self.raw.sendto(bytes(packet), ("ngrokd0", ETH_P_IP))
        self.sent += 1
        if self.sent % 64 == 0:
            await trio.lowlevel.checkpoint()

    async def read_up(self) -> None:
        """Until nothing waits on the link: a ping of ours has been answered."""
        before = self.stack.replies_sent
        self.raw.sendto(bytes(build_ipv4(APP, ENDPOINT, 1, 8) + b"\x08\0\xe5\xcb\x12\x34\0\0"), ("ngrokd0", ETH_P_IP))
        await until(lambda: self.stack.replies_sent > before)

    async def connect(self) -> trio.SocketStream:
        client = trio.socket.from_stdlib_socket(self.ns.call(socket.socket))
        try:
            await client.connect(SERVED)
        except BaseException:
            client.close()
            raise
        return trio.SocketStream(client)

    async def exchange(self, data: bytes) -> bytes:
        """What comes back for `data`, over a connection of its own."""
        received = bytearray()
        async with await self.connect() as stream, trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            async for chunk in stream:
                received += chunk
        return bytes(received)


async def until(condition: Callable[[], bool]) -> None:
    """What the stack counts is known to nobody who could tell."""
    while not condition():  # noqa: ASYNC110 - see above
        await trio.sleep(0.005)


async def echo(request: FlowRequest) -> None:
    async with request.accept() as flow:
        async for data in flow:
            await flow.send_all(data)
        await flow.send_eof()
        await flow.wait_delivered()


@asynccontextmanager
async def world(ns: Namespace) -> AsyncIterator[World]:
    there = World(ns)
    try:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                there.nursery = nursery
                nursery.start_soon(there.network.run)
                yield there
                nursery.cancel_scope.cancel()
    finally:
        there.raw.close()
        there.tun.close()


async def test_clients_are_served_during_a_flood_of_syns(netns: Callable[[], Namespace]) -> None:
    """10,000 from random guests that nobody ever decides; ten kernel clients connect meanwhile, each within 3 s."""
    rng = random.Random(1)
    async with world(netns()) as there:
        for _ in range(10):
            for _ in range(1000):
                source = struct.pack("!I", 0xAC100001 + rng.getrandbits(18))
                port = rng.randint(1, 65535)
                await there.inject(build_tcp(source, ENDPOINT, port, 80, seq=rng.getrandbits(32), flags=SYN, window=9))
            with trio.fail_after(3):
                assert await there.exchange(b"still there?") == b"still there?"
        assert there.stack.undecided_count <= 1024 * 2 // 3 // 8
        assert len(there.undecided) >= 1024 * 2 // 3 - 10
        assert there.stack.put_off > 500
        assert there.stack.drops["first_try"] > 1000

        with trio.fail_after(10):
            await until(lambda: not there.stack.undecided_count)
        assert all(request.cancelled for request in there.undecided)


async def test_a_transfer_survives_blind_attacks(netns: Callable[[], Namespace]) -> None:
    """RST, SYN, data, FIN and ICMP errors with guessed numbers, into a connection whose ports are known."""
    rng = random.Random(2)
    data = random.Random(3).randbytes(4_000_000)
    received = hashlib.sha256()
    async with world(netns()) as there, await there.connect() as stream:
        port = stream.socket.getsockname()[1]
        flow = there.stack.flows[APP + ENDPOINT + struct.pack("!HH", port, 80)]

        async def attack() -> None:
            for _ in range(20):
                seq = rng.choice((rng.getrandbits(32), (flow.rcv_nxt + rng.randint(1, 500_000)) & MASK))
                ack = (flow.snd_nxt + 10_000_000 + rng.getrandbits(30)) & MASK  # never by chance a right one
                kind = rng.choice((RST, RST | ACK, SYN, SYN | ACK, ACK | PSH, ACK | FIN, ACK | URG, 0))
                payload = b"evil" * 20 if kind & PSH else b""
                packet = build_tcp(APP, ENDPOINT, port, 80, seq=seq, ack=ack, flags=kind, window=9, payload=payload)
                await there.inject(packet)
                quoted = build_tcp(ENDPOINT, APP, 80, port, seq=ack, flags=ACK)
                await there.inject(icmp.build_error(3, rng.randrange(16), APP, ENDPOINT, quoted))

        async def receive() -> None:
            async for chunk in stream:
                received.update(chunk)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            for start in range(0, len(data), 40_000):
                await attack()
                await stream.send_all(data[start : start + 40_000])
            await stream.send_eof()
        assert there.sent == 4000
        assert there.stack.resets_received == 0

    assert received.digest() == hashlib.sha256(data).digest()


async def test_nonsense_is_counted_once_and_answered_never(netns: Callable[[], Namespace]) -> None:
    """Every packet that was put onto the link appears under one reason; the kernel hears nothing it could answer."""
    rng = random.Random(4)
    nonsense: list[bytes] = []
    for source in (ENDPOINT, b"\x7f\0\0\1", b"\xe0\0\0\1", b"\xff\xff\xff\xff", b"\x0a\x6b\0\x63", b"\x08\x08\x08\x08"):
        nonsense += [
            bytes(build_tcp(source, ENDPOINT, 80, 80, seq=1, ack=1, flags=flags)) for flags in (SYN, ACK, RST, FIN)
        ]
        nonsense.append(bytes(build_ipv4(source, ENDPOINT, 132, 8) + bytes(8)))
        nonsense.append(bytes(build_ipv4(source, ENDPOINT, 17, 8) + struct.pack("!HHHH", 1, 2, 8, 0)))
    good = bytes(build_tcp(APP, ENDPOINT, 4000, 80, seq=1, flags=SYN, window=9, payload=bytes(40)))
    for index in range(200):
        bad = bytearray(good)
        bad[rng.randrange(1, len(bad))] ^= 1 << rng.randrange(8)
        nonsense.append(bytes(bad))
        nonsense.append(good[: rng.randrange(20, len(good))])
        header = build_ipv4(APP, ENDPOINT, 6, 80, identification=index, fragment=FLAG_MF | rng.randrange(100))
        nonsense.append(bytes(header + bytes(80)))
    async with world(netns()) as there:
        await there.read_up()
        packets, drops = there.stack.packets, sum(there.stack.drops.values())
        replies = there.stack.replies_sent
        for packet in nonsense:
            await there.inject(packet)
        await there.read_up()

        assert there.stack.packets - packets == len(nonsense) + 1
        assert sum(there.stack.drops.values()) - drops == len(nonsense)
        assert there.stack.replies_sent - replies == 1
        assert there.undecided == []
        assert await there.exchange(b"and now?") == b"and now?"


@pytest.mark.parametrize("attack", ["holes", "small", "windows"])
async def test_a_transfer_goes_on_beside_who_is_expensive(netns: Callable[[], Namespace], attack: str) -> None:
    """300 holes of one byte in each of ten flows, 10,000 single bytes, 200 flows that never open their window."""
    async with world(netns()) as there:
        flows = []
        for port in range(2000, 2010 if attack != "windows" else 2200):
            source = b"\xac\x10\0\1"
            window = 0 if attack == "windows" else 60000
            await there.inject(build_tcp(source, ENDPOINT, port, 80, seq=0, flags=SYN, window=window))
            await there.read_up()
            (request,) = there.undecided
            there.undecided.clear()
            stream = request.accept()
            flow = there.stack.flows[source + ENDPOINT + struct.pack("!HH", port, 80)]
            await trio.testing.wait_all_tasks_blocked()
            ack = flow.snd_nxt & MASK
            await there.inject(build_tcp(source, ENDPOINT, port, 80, seq=1, ack=ack, flags=ACK, window=window))
            flows.append((port, flow, stream))
        await there.read_up()

        async def press() -> None:
            for step in range(300 if attack == "holes" else 1000):
                for port, flow, stream in flows[:10]:
                    if attack == "windows":
                        stream.send_nowait(bytes(65536))
                        continue
                    position = 3 + 2 * step if attack == "holes" else 1 + step
                    await there.inject(
                        build_tcp(
                            b"\xac\x10\0\1", ENDPOINT, port, 80,
                            seq=position, ack=flow.snd_nxt & MASK, flags=ACK, window=0, payload=b"x",
                        )
                    )  # fmt: skip
                await trio.lowlevel.checkpoint()

        data = random.Random(5).randbytes(2_000_000)
        answers: list[bytes] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(press)
            with trio.fail_after(20):
                answers.append(await there.exchange(data))

        assert answers == [data]
        assert there.stack.buffered_bytes <= 256 * 2**20
        for _, flow, stream in flows:
            if attack == "small":
                assert flow.readable_bytes == 1000
            stream.abort()
