"""The whole stack behind a real TUN device, with the kernel's TCP as the app."""

from __future__ import annotations

import errno
import hashlib
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from random import Random

import pytest
import trio

from tests.netns.support import Namespace
from tun.core.stack import Stack, StackSettings
from tun.device.base import Device
from tun.device.linux import LinuxTun, open_tun
from tun.errors import DeviceError
from tun.network import FlowRequest, FlowStream, Network
from tun.testing.memory import NO_FAULTS, Faults, FaultyDevice

SERVED = ("10.107.0.2", 80)
SECRET = bytes(range(32))

Handler = Callable[[FlowRequest], Awaitable[None]]


class World:
    """A namespace with a configured TUN device, and the stack behind it in this test's event loop."""

    def __init__(self, ns: Namespace, handler: Handler, offload: bool, reading: Faults, writing: Faults) -> None:
        self.ns = ns
        self.tun = self.open(offload)
        self.faulty = FaultyDevice(self.tun, Random(7), reading=reading, writing=writing, split=True)
        device: Device = self.faulty if (reading, writing) != (NO_FAULTS, NO_FAULTS) else self.tun
        self.stack = Stack(StackSettings(offload=offload), SECRET)
        self.stack.set_served({bytes((10, 107, 0, 2)): frozenset({80})})
        self.network = Network(device, self.stack, self.on_request)
        self.requests: list[FlowRequest] = []
        self.requested = trio.Event()
        self.reopened = trio.Event()
        self.handler = handler
        self.nursery: trio.Nursery | None = None

    def open(self, offload: bool) -> LinuxTun:
        tun = self.ns.call(open_tun, "ngrokd0", offload=offload)
        self.ns.run(["ip", "link", "set", "ngrokd0", "addrgenmode", "none"])
        self.ns.run(["ip", "addr", "add", "10.107.0.1/32", "dev", "ngrokd0"])
        self.ns.run(["ip", "link", "set", "ngrokd0", "up", "mtu", "1500", "txqueuelen", "5000"])
        self.ns.run(["ip", "route", "add", "10.107.0.0/16", "dev", "ngrokd0"])
        return tun

    def on_request(self, request: FlowRequest) -> None:
        assert self.nursery is not None
        self.requests.append(request)
        self.requested.set()
        self.nursery.start_soon(self.handler, request)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Pump; when the interface was deleted make it anew, as the daemon does."""
        task_status.started()
        while True:
            try:
                await self.network.run()
            except DeviceError:
                self.tun.close()
                self.tun = self.open(self.tun.offload)
                self.network.device = self.tun
                self.reopened.set()
                self.reopened = trio.Event()

    async def connect(self, address: tuple[str, int] = SERVED, *, of: Namespace | None = None) -> trio.SocketStream:
        client = trio.socket.from_stdlib_socket((of or self.ns).call(socket.socket))
        try:
            await client.connect(address)
        except BaseException:
            client.close()
            raise
        return trio.SocketStream(client)


@asynccontextmanager
async def world(
    ns: Namespace, handler: Handler, *, offload: bool = True, reading: Faults = NO_FAULTS, writing: Faults = NO_FAULTS
) -> AsyncIterator[World]:
    there = World(ns, handler, offload, reading, writing)
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            there.nursery = nursery
            await nursery.start(there.run)
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


async def exchange(there: World, data: bytes) -> bytes:
    """What comes back for `data`, sent and received at the same time, ends included."""
    received = bytearray()

    async def receive() -> None:
        async for chunk in stream:
            received.extend(chunk)

    async with await there.connect() as stream, trio.open_nursery() as nursery:
        nursery.start_soon(receive)
        await stream.send_all(data)
        await stream.send_eof()
    return bytes(received)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("offload", [True, False])
async def test_megabytes_come_back_unchanged(netns: Callable[[], Namespace], offload: bool) -> None:
    data = Random(1).randbytes(8_000_000)

    async with world(netns(), echo, offload=offload) as there:
        assert digest(await exchange(there, data)) == digest(data)
        assert there.tun.drops == {}


async def test_twenty_connections_at_once(netns: Callable[[], Namespace]) -> None:
    async with world(netns(), echo) as there:

        async def one(seed: int) -> None:
            data = Random(seed).randbytes(300_000)
            assert digest(await exchange(there, data)) == digest(data)

        async with trio.open_nursery() as nursery:
            for seed in range(20):
                nursery.start_soon(one, seed)

    assert there.stack.flow_count <= 20


@pytest.mark.parametrize("offload", [True, False])
async def test_nothing_is_lost_on_a_link_that_loses(netns: Callable[[], Namespace], offload: bool) -> None:
    """Loss, duplicates, disorder and damage in both directions, against the kernel's TCP."""
    faults = Faults(loss=0.01, duplication=0.01, reordering=0.02, corruption=0.01, hold_s=0.002)
    data = Random(2).randbytes(1_000_000)

    async with world(netns(), echo, offload=offload, reading=faults, writing=faults) as there:
        assert digest(await exchange(there, data)) == digest(data)
        assert set(there.faulty.faults) == {"lost", "duplicated", "reordered", "corrupted"}


async def test_refused_is_refused_at_once(netns: Callable[[], Namespace]) -> None:
    async def refuse(request: FlowRequest) -> None:
        request.refuse()

    async with world(netns(), refuse) as there:
        with pytest.raises(ConnectionRefusedError):
            await there.connect()
        with pytest.raises(ConnectionRefusedError):  # nobody is asked for a port that is not served
            await there.connect((SERVED[0], 81))
        assert [request.destination for request in there.requests] == [SERVED]


async def test_an_address_that_nobody_has_is_unreachable(netns: Callable[[], Namespace]) -> None:
    async with world(netns(), echo) as there:
        with pytest.raises(OSError, match="host") as caught:
            await there.connect(("10.107.9.9", 80))
        assert caught.value.errno == errno.EHOSTUNREACH


async def test_the_app_waits_until_the_request_is_accepted(netns: Callable[[], Namespace]) -> None:
    """No SYN-ACK before the dial has succeeded: connect() tells the truth."""
    decided = trio.Event()
    connected: list[trio.SocketStream] = []

    async def late(request: FlowRequest) -> None:
        await decided.wait()
        await echo(request)

    async with world(netns(), late) as there:

        async def connect() -> None:
            connected.append(await there.connect())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await there.requested.wait()
            await trio.sleep(0.2)
            assert connected == []
            decided.set()
        await connected[0].aclose()


@pytest.mark.parametrize("number", range(20))
async def test_an_answer_after_the_apps_half_close_arrives(netns: Callable[[], Namespace], number: int) -> None:
    async def answer_after_the_end(request: FlowRequest) -> None:
        async with request.accept() as flow:
            question = await read_all(flow)
            await flow.send_all(question * 1000)

    async with world(netns(), answer_after_the_end) as there, await there.connect() as stream:
        await stream.send_all(b"question")
        await stream.send_eof()

        assert await read_all(stream) == b"question" * 1000


@pytest.mark.parametrize("number", range(20))
async def test_an_app_still_sends_after_our_half_close(netns: Callable[[], Namespace], number: int) -> None:
    received: list[bytes] = []
    complete = trio.Event()

    async def end_first(request: FlowRequest) -> None:
        async with request.accept() as flow:
            await flow.send_all(b"done")
            await flow.send_eof()
            received.append(await read_all(flow))
            complete.set()

    async with world(netns(), end_first) as there, await there.connect() as stream:
        assert await read_all(stream) == b"done"
        await stream.send_all(b"late" * 50_000)
        await stream.send_eof()
        await complete.wait()

    assert received == [b"late" * 50_000]


async def test_abort_is_a_reset_at_the_app(netns: Callable[[], Namespace]) -> None:
    async def cut(request: FlowRequest) -> None:
        flow = request.accept()
        await flow.receive_some()
        flow.abort()

    async with world(netns(), cut) as there, await there.connect() as stream:
        await stream.send_all(b"x")
        with pytest.raises(trio.BrokenResourceError) as caught:
            await stream.receive_some()
        assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_an_apps_reset_breaks_the_flow(netns: Callable[[], Namespace]) -> None:
    failure: list[str] = []
    broken = trio.Event()

    async def listen(request: FlowRequest) -> None:
        async with request.accept() as flow:
            try:
                await read_all(flow)
            except trio.BrokenResourceError:
                failure.append(flow.failure)
                broken.set()

    async with world(netns(), listen) as there:
        stream = await there.connect()
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await stream.send_all(b"x")
        await stream.aclose()
        await broken.wait()

    assert failure == ["reset"]


async def still(value: Callable[[], int]) -> int:
    """Wait until a number has stopped changing."""
    while True:
        before = value()
        await trio.sleep(0.3)
        if value() == before:
            return before


async def test_a_reader_that_stops_makes_the_app_stop(netns: Callable[[], Namespace]) -> None:
    """The window closes, the app's kernel waits, memory stays bounded, and nothing is lost when reading goes on."""
    go_on = trio.Event()
    data = Random(3).randbytes(20_000_000)
    received: list[bytes] = []

    async def read_late(request: FlowRequest) -> None:
        async with request.accept() as flow:
            await go_on.wait()
            received.append(await read_all(flow))

    async with world(netns(), read_late) as there, await there.connect() as stream:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.send_all, data)
            (flow,) = there.network.streams()
            assert 100_000 < await still(lambda: flow.bytes_from_app) <= 600_000

            go_on.set()
        await stream.send_eof()
        assert await stream.receive_some() == b""

    assert digest(received[0]) == digest(data)


async def test_an_app_that_does_not_read_stops_us(netns: Callable[[], Namespace]) -> None:
    """The kernel's window closes; what we still owe is kept, probed for, and delivered when the app reads."""
    data = Random(4).randbytes(60_000_000)
    sent = [0]

    async def talk(request: FlowRequest) -> None:
        async with request.accept() as flow:
            for offset in range(0, len(data), 100_000):
                await flow.send_all(data[offset : offset + 100_000])
                sent[0] = offset
            await flow.send_eof()
            await flow.wait_delivered()

    async with world(netns(), talk) as there, await there.connect() as stream:
        assert 100_000 < await still(lambda: sent[0]) < len(data) - 1_000_000

        assert digest(await read_all(stream)) == digest(data)


async def test_a_flow_survives_the_deletion_of_the_interface(netns: Callable[[], Namespace]) -> None:
    """Interface, address and route come back, and TCP bridges the gap."""
    chance = Random(5)
    sent, received = hashlib.sha256(), hashlib.sha256()
    deletions = 0

    async with world(netns(), echo) as there, await there.connect() as stream, trio.open_nursery() as nursery:

        async def send() -> None:
            while deletions < 3:
                piece = chance.randbytes(200_000)
                sent.update(piece)
                await stream.send_all(piece)
            await stream.send_eof()

        async def receive() -> None:
            async for chunk in stream:
                received.update(chunk)

        nursery.start_soon(send)
        nursery.start_soon(receive)
        for _ in range(3):
            await trio.sleep(0.05)  # of traffic
            reopened = there.reopened
            await there.ns.run_async(["ip", "link", "del", "ngrokd0"])
            await reopened.wait()
            deletions += 1

    assert received.digest() == sent.digest()


async def test_a_neighbour_is_ignored_until_it_is_allowed(netns: Callable[[], Namespace]) -> None:
    """A host that forwards must not offer its endpoints to the LAN."""
    ns, neighbour = netns(), netns()
    ns.run(["ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1", "netns", str(neighbour.pid)])
    ns.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "lan0"])
    neighbour.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "lan1"])
    ns.run(["ip", "link", "set", "lan0", "up"])
    neighbour.run(["ip", "link", "set", "lan1", "up"])
    neighbour.run(["ip", "route", "add", "10.107.0.0/16", "via", "192.0.2.1"])
    ns.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"])
    local = frozenset({bytes((10, 107, 0, 1)), bytes((192, 0, 2, 1))})

    async with world(ns, echo) as there:
        there.stack.set_sources(local)
        assert await exchange(there, b"from here") == b"from here"
        with trio.move_on_after(0.3) as scope:
            await there.connect(of=neighbour)
        assert scope.cancelled_caught
        assert len(there.requests) == 1
        assert sum(there.stack.drops.values()) >= 1

        there.stack.set_sources(local, [(4, 0xC0000200, 0xFFFFFF00)])
        async with await there.connect(of=neighbour) as stream:
            await stream.send_all(b"allowed")
            assert await stream.receive_some() == b"allowed"


async def test_ping_is_answered(netns: Callable[[], Namespace]) -> None:
    async with world(netns(), echo) as there:
        # The kernel's own echo socket: it makes the identifier and checks the answer's checksum.
        there.ns.run(["sh", "-c", "echo 0 0 >/proc/sys/net/ipv4/ping_group_range"])
        ping = there.ns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM, socket.IPPROTO_ICMP)
        with trio.socket.from_stdlib_socket(ping) as sock:
            await sock.connect((SERVED[0], 0))
            await sock.send(struct.pack("!BBHHH", 8, 0, 0, 0, 1) + b"are you there?")
            answer = await sock.recv(1000)

    assert answer[0] == 0
    assert answer[8:] == b"are you there?"


async def test_curl_speaks_to_it(netns: Callable[[], Namespace]) -> None:
    async def serve(request: FlowRequest) -> None:
        async with request.accept() as flow:
            await flow.receive_some()
            await flow.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")

    async with world(netns(), serve) as there:
        there.ns.write_file("/etc/hosts", f"{SERVED[0]}\tmy-api.prod\n")
        result = await there.ns.run_async(["curl", "-sS", "-m", "10", "http://my-api.prod/"])

    assert result.stdout == "hello"
