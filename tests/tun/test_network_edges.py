"""Flows at their edges: closed while somebody waits, a device that is full or goes away, sinks that act."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.tun.packets import SYN, segment
from tun import DeviceError, FlowRequest, FlowStream, Network, Stack, StackSettings
from tun.device.linux import LinuxTun
from tun.pcap import Capture, RecordingDevice
from tun.testing.apppeer import AppHost, AppStream
from tun.testing.memory import memory_pair

SERVED = ("10.107.0.2", 80)


class World:
    """Apps, a cable, and a network that accepts whatever comes."""

    def __init__(self, capacity: int = 5000) -> None:
        self.ours, apps = memory_pair(capacity=capacity)
        self.stack = Stack(StackSettings(), bytes(range(32)))
        self.stack.set_served({bytes((10, 107, 0, 2)): frozenset({80})})
        self.requests: list[FlowRequest] = []
        self.network = Network(self.ours, self.stack, self.requests.append)
        self.apps = AppHost(apps)

    async def pair(self, **peer: Any) -> tuple[AppStream, FlowStream]:
        """An app's connection and our end of it."""
        streams: list[AppStream] = []

        async def connect() -> None:
            streams.append(await self.apps.connect(SERVED, **peer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            await trio.testing.wait_all_tasks_blocked()
            flow = self.requests.pop().accept()
        return streams[0], flow


@asynccontextmanager
async def world(capacity: int = 5000) -> AsyncIterator[World]:
    there = World(capacity)
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            await nursery.start(there.network.run)
            await nursery.start(there.apps.run)
            yield there
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("what", ["receive_some", "wait_send_space", "wait_delivered"])
async def test_who_waits_learns_that_the_flow_was_closed_here(autojump_clock: MockClock, what: str) -> None:
    """A wait for a flow that nobody looks after any more would never end."""
    async with world() as there:
        _app, flow = await there.pair(auto_read=False, buffer=65536)
        while flow.send_nowait(bytes(100_000)):
            pass
        outcome: list[str] = []

        async def wait() -> None:
            try:
                await getattr(flow, what)()
            except trio.ClosedResourceError:
                outcome.append("closed")

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.testing.wait_all_tasks_blocked()
                await flow.aclose()

        assert outcome == ["closed"]


@pytest.mark.parametrize("what", ["receive_some", "wait_send_space", "wait_delivered"])
async def test_two_tasks_cannot_wait_for_the_same(autojump_clock: MockClock, what: str) -> None:
    """The second would take the first one's wake-up away."""
    async with world() as there:
        _app, flow = await there.pair(auto_read=False, buffer=65536)
        while flow.send_nowait(bytes(100_000)):
            pass
        async with trio.open_nursery() as nursery:
            nursery.start_soon(getattr(flow, what))
            await trio.testing.wait_all_tasks_blocked()

            with pytest.raises(trio.BusyResourceError):
                await getattr(flow, what)()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("act", ["abort", "detach", "offer again"])
async def test_a_sink_may_act_on_its_own_flow(autojump_clock: MockClock, act: str) -> None:
    """It is called inside the batch, where everything is in motion."""
    taken = bytearray()
    async with world() as there:
        app, flow = await there.pair()

        def sink(views: Sequence[memoryview]) -> int:
            data = b"".join(views)
            taken.extend(data)
            if act == "abort":
                flow.abort()
            elif act == "detach":
                flow.attach(None)
            return len(data)

        flow.attach(sink)
        await app.send_all(b"x" * 10_000)
        await trio.sleep(0.1)
        if act == "offer again":
            flow.offer()

        assert taken == b"x" * 10_000
        assert flow.failure == ("aborted" if act == "abort" else "")
        if act == "detach":
            await app.send_all(b"y")
            assert await flow.receive_some() == b"y"


async def test_a_device_lost_while_flows_wait_for_room_in_it_is_one_error(autojump_clock: MockClock) -> None:
    """The task that waits for room is not the pump, and its error must not come out in a group."""
    there = World(capacity=1)
    lost: list[str] = []

    async def run_until_lost() -> None:
        try:
            await there.network.run()
        except DeviceError as error:
            lost.append(str(error))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_until_lost)
            async with trio.open_nursery() as apps:
                await apps.start(there.apps.run)
                _app, flow = await there.pair()
                apps.cancel_scope.cancel()
            while flow.send_nowait(bytes(100_000)):  # nobody takes it off the cable
                pass
            await trio.testing.wait_all_tasks_blocked()

            there.ours.close()

    assert lost == ["the device memory0 was closed"]


# A device with a descriptor: datagrams between two sockets keep packets apart as a TUN does


class Link:
    """A device, and the kernel's end of it."""

    def __init__(self) -> None:
        here, self.kernel = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        here.setblocking(False)
        self.kernel.setblocking(False)
        self.device = LinuxTun(here.detach(), "link", flags=0, mtu=1500)

    def asks(self, port: int) -> None:
        """An app sends a SYN."""
        self.kernel.send(segment(flags=SYN, source=("10.107.0.1", port), destination=SERVED))

    def close(self) -> None:
        self.device.close()
        self.kernel.close()


@pytest.fixture
def links() -> Iterator[tuple[Link, Link]]:
    one, two = Link(), Link()
    yield one, two
    one.close()
    two.close()


class Pumped:
    """A network over a link, and how its pump ended."""

    def __init__(self, link: Link) -> None:
        stack = Stack(StackSettings(), bytes(range(32)))
        stack.set_served({bytes((10, 107, 0, 2)): frozenset({80})})
        self.asked: list[int] = []
        self.network = Network(link.device, stack, lambda request: self.asked.append(request.source[1]))
        self.lost: list[str] = []

    async def run(self) -> None:
        try:
            await self.network.run()
        except DeviceError as error:
            self.lost.append(str(error))

    async def until_asked(self, *ports: int) -> None:
        while self.asked != list(ports):  # noqa: ASYNC110 - the kernel's event, not Trio's
            await trio.sleep(0.001)


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
async def test_a_pump_that_sleeps_learns_that_its_device_was_closed(links: tuple[Link, Link], busy: bool) -> None:
    """The kernel forgets a closed descriptor without a word; and the network can go on with another device."""
    link, other = links
    pumped = Pumped(link)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pumped.run)
            await trio.testing.wait_all_tasks_blocked()
            if busy:
                link.asks(1001)
                await pumped.until_asked(1001)
            link.device.close()
        assert pumped.lost == ["the device link was closed"]

        pumped.network.device = other.device
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pumped.run)
            other.asks(1002)
            await pumped.until_asked(*([1001] if busy else []), 1002)
            nursery.cancel_scope.cancel()
    pumped.network.poller.close()


async def test_a_device_that_is_replaced_while_it_is_read(links: tuple[Link, Link]) -> None:
    """The old one is closed afterwards, and that is no loss; its number may be another's at once."""
    link, other = links
    pumped = Pumped(link)
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pumped.run)
            link.asks(1001)
            await pumped.until_asked(1001)
            pumped.network.device = other.device
            number = link.device.fileno()
            link.device.close()
            taken = os.open(os.devnull, os.O_RDONLY)
            assert taken == number
            other.asks(1002)
            await pumped.until_asked(1001, 1002)
            await trio.testing.wait_all_tasks_blocked()
            other.device.close()
        os.close(taken)
    assert pumped.lost == ["the device link was closed"]
    pumped.network.poller.close()


async def test_a_recording_comes_and_goes_in_front_of_a_device(links: tuple[Link, Link], tmp_path: Any) -> None:
    link, _ = links
    pumped = Pumped(link)
    fd = os.open(tmp_path / "a.pcapng", os.O_RDWR | os.O_CREAT)
    with contextlib.closing(Capture(fd)) as capture, trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pumped.run)
            await trio.testing.wait_all_tasks_blocked()
            pumped.network.device = RecordingDevice(link.device, capture)
            link.asks(1001)
            await pumped.until_asked(1001)
            pumped.network.device = link.device
            link.asks(1002)
            await pumped.until_asked(1001, 1002)
            pumped.network.device = RecordingDevice(link.device, capture)
            link.device.close()
    os.close(fd)
    assert pumped.lost == ["the device link was closed"]
    pumped.network.poller.close()
