"""The stack over IPv6 behind a real TUN device, with the kernel's TCP and ICMPv6 as the app."""

from __future__ import annotations

import errno
import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from tests.netns.support import Namespace
from tun.core.stack import Stack, StackSettings
from tun.device.linux import LinuxTun, open_tun
from tun.network import FlowRequest, FlowStream, Network

SERVED = ("fd12:3456:789a::a6b:2", 80)
GATEWAY = "fd12:3456:789a::1"
SETTINGS = {
    "gateway6": socket.inet_pton(socket.AF_INET6, GATEWAY),
    "network6": 0xFD123456789A << 80,
    "mask6": ((1 << 64) - 1) << 64,
}

Handler = Callable[[FlowRequest], Awaitable[None]]


def has_ipv6(ns: Namespace) -> bool:
    return ns.run(["sh", "-c", "cat /proc/sys/net/ipv6/conf/all/disable_ipv6 || echo 1"]).stdout.strip() == "0"


class World:
    """A namespace whose link has an IPv6 address and route, and the stack behind it."""

    def __init__(self, ns: Namespace, handler: Handler, nursery: trio.Nursery, offload: bool) -> None:
        self.ns = ns
        self.tun = ns.call(open_tun, "ngrokd0", offload=offload)
        ns.run(["ip", "link", "set", "ngrokd0", "addrgenmode", "none"])
        ns.run(["ip", "link", "set", "ngrokd0", "up", "mtu", "1500", "txqueuelen", "5000"])
        ns.run(["ip", "-6", "addr", "add", f"{GATEWAY}/128", "dev", "ngrokd0", "nodad"])
        ns.run(["ip", "-6", "route", "add", "fd12:3456:789a::/64", "dev", "ngrokd0"])
        self.stack = Stack(StackSettings(offload=offload, **SETTINGS), bytes(range(32)))  # type: ignore[arg-type]
        self.stack.set_served({socket.inet_pton(socket.AF_INET6, SERVED[0]): frozenset({SERVED[1]})})
        self.stack.set_sources(frozenset({socket.inet_pton(socket.AF_INET6, GATEWAY)}))
        self.network = Network(self.tun, self.stack, lambda request: nursery.start_soon(handler, request))

    async def connect(self, address: tuple[str, int] = SERVED) -> trio.SocketStream:
        client = trio.socket.from_stdlib_socket(self.ns.call(socket.socket, socket.AF_INET6))
        try:
            await client.connect(address)
        except BaseException:
            client.close()
            raise
        return trio.SocketStream(client)


class Watched:
    """A device, and the longest packet in each direction."""

    def __init__(self, device: LinuxTun) -> None:
        self.device = device
        self.longest_read = self.longest_write = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self.device, name)

    def read(self) -> bytes | None:
        packet = self.device.read()
        self.longest_read = max(self.longest_read, len(packet or b""))
        return packet

    def write(self, header: bytearray, payload: Sequence[bytes | memoryview], gso_size: int) -> bool:
        self.longest_write = max(self.longest_write, sum(map(len, payload)))
        return self.device.write(header, payload, gso_size)


@asynccontextmanager
async def world(ns: Namespace, handler: Handler, *, offload: bool = True) -> AsyncIterator[World]:
    if not has_ipv6(ns):
        pytest.skip("this kernel has no IPv6")
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            there = World(ns, handler, nursery, offload)
            await nursery.start(there.network.run)
            yield there
            nursery.cancel_scope.cancel()
    there.tun.close()


async def echo(request: FlowRequest) -> None:
    """Send everything back, then the end."""
    async with request.accept() as flow:
        async for data in flow:
            await flow.send_all(data)
        await flow.send_eof()
        await flow.wait_delivered()


async def read_all(stream: trio.SocketStream | FlowStream) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream])


@pytest.mark.parametrize("offload", [True, False])
async def test_megabytes_come_back_unchanged(netns: Callable[[], Namespace], offload: bool) -> None:
    """Four of them, both ways at once, in large pieces where the device cuts them (TSO over IPv6)."""
    data = Random(1).randbytes(4 << 20)

    async with world(netns(), echo, offload=offload) as there:
        watched = Watched(there.tun)
        there.network.device = watched  # type: ignore[assignment]  # it passes on what it does not watch
        received = bytearray()

        async def receive() -> None:
            async for chunk in stream:
                received.extend(chunk)

        async with await there.connect() as stream, trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            await stream.send_all(data)
            await stream.send_eof()
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
        assert there.tun.drops == {}

    assert (watched.longest_read > 1600) is offload
    assert (watched.longest_write > 1600) is offload


async def test_an_answer_after_the_apps_half_close_arrives(netns: Callable[[], Namespace]) -> None:
    async def answer_after_the_end(request: FlowRequest) -> None:
        async with request.accept() as flow:
            question = await read_all(flow)
            await flow.send_all(question * 1000)

    async with world(netns(), answer_after_the_end) as there, await there.connect() as stream:
        await stream.send_all(b"question")
        await stream.send_eof()

        assert await read_all(stream) == b"question" * 1000


async def test_refused_and_unreachable_are_told_at_once(netns: Callable[[], Namespace]) -> None:
    async def refuse(request: FlowRequest) -> None:
        request.refuse()

    async with world(netns(), refuse) as there:
        with pytest.raises(ConnectionRefusedError):
            await there.connect()
        with pytest.raises(ConnectionRefusedError):
            await there.connect((SERVED[0], 81))
        with pytest.raises(OSError, match="host") as caught:
            await there.connect(("fd12:3456:789a::a6b:99", 80))
        assert caught.value.errno == errno.EHOSTUNREACH


async def test_a_datagram_to_a_port_without_a_service_is_refused(netns: Callable[[], Namespace]) -> None:
    async with world(netns(), echo) as there:
        client = trio.socket.from_stdlib_socket(there.ns.call(socket.socket, socket.AF_INET6, socket.SOCK_DGRAM))
        with client:
            await client.connect((SERVED[0], 53))
            await client.send(b"anybody?")
            with pytest.raises(ConnectionRefusedError):
                await client.recv(100)


@pytest.mark.parametrize("size", [8, 1400, 20_000])
async def test_ping_is_answered(netns: Callable[[], Namespace], size: int) -> None:
    """The kernel makes the checksum and judges ours; large ones come in fragments."""
    async with world(netns(), echo) as there:
        kind = (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6)
        with trio.socket.from_stdlib_socket(there.ns.call(socket.socket, *kind)) as sock:
            await sock.connect((SERVED[0], 0))
            await sock.send(struct.pack("!BBHHH", 128, 0, 0, 7, 1) + b"p" * size)
            answer = b"\x80"
            while answer[0] == 128:
                answer = await sock.recv(65535)

    assert answer[:2] + answer[4:] == struct.pack("!BBHH", 129, 0, 7, 1) + b"p" * size
