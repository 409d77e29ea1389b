"""The Trio shell of the stack, with an app's kernel in miniature at the other end of a cable."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from tests.tun.packets import SYN, segment
from tun import DeviceError, FlowRequest, FlowStream, Network, Stack, StackSettings
from tun.network import FLOOD_PACKETS
from tun.testing.apppeer import AppHost, AppStream
from tun.testing.memory import NO_FAULTS, Faults, FaultyDevice, MemoryDevice, memory_pair

SERVED = ("10.107.0.2", 80)
SECRET = bytes(range(32))
SEND_BUFFER = 512 * 1024


class World:
    """A host with apps, a cable, and a network that gets their requests."""

    def __init__(self, ours: MemoryDevice, apps: MemoryDevice, faults: Faults, seed: int) -> None:
        self.ours = ours
        device = FaultyDevice(ours, Random(seed), reading=faults, writing=faults, split=True) if faults.loss else ours
        self.stack = Stack(StackSettings(send_buffer=SEND_BUFFER), SECRET)
        self.stack.set_served({bytes((10, 107, 0, 2)): frozenset({80})})
        self.network = Network(device, self.stack, self.on_request)
        self.host = AppHost(apps)
        self._requests, self._next_request = trio.open_memory_channel[FlowRequest](1000)

    def on_request(self, request: FlowRequest) -> None:
        self._requests.send_nowait(request)

    async def request(self) -> FlowRequest:
        return await self._next_request.receive()

    async def pair(self, **peer: Any) -> tuple[AppStream, FlowStream]:
        """An app's connection and our end of it."""
        streams: list[AppStream] = []

        async def connect() -> None:
            streams.append(await self.host.connect(SERVED, **peer))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(connect)
            flow = (await self.request()).accept()
        return streams[0], flow


@asynccontextmanager
async def world(
    *, faults: Faults = NO_FAULTS, seed: int = 1, capacity: int = 5000, split: bool = False
) -> AsyncIterator[World]:
    ours, apps = memory_pair(capacity=capacity, split=split)
    there = World(ours, apps, faults, seed)
    with trio.fail_after(600):  # of simulated time
        async with trio.open_nursery() as nursery:
            await nursery.start(there.network.run)
            await nursery.start(there.host.run)
            yield there
            nursery.cancel_scope.cancel()
    if faults == NO_FAULTS:  # else damage and disorder look like our mistakes
        assert [stream.peer.complaints for stream in there.host.streams.values() if stream.peer.complaints] == []


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(chunk) async for chunk in stream])


async def settled() -> None:
    """Let everything happen that happens soon: delayed acknowledgments too, retransmissions not."""
    await trio.sleep(0.1)


# Requests


async def test_a_request_says_who_asks_for_what(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, flow = await there.pair()

        assert flow.destination == SERVED
        assert flow.source == app.peer.source
        assert flow.opened_at == pytest.approx(trio.current_time())
        assert flow.state == "ESTABLISHED"
        assert list(there.network.streams()) == [flow]


async def test_nothing_is_answered_before_the_decision(autojump_clock: MockClock) -> None:
    """Connect tells the app the truth about the far end."""
    async with world() as there, trio.open_nursery() as nursery:
        connected: list[AppStream] = []

        async def connect() -> None:
            connected.append(await there.host.connect(SERVED))

        nursery.start_soon(connect)
        request = await there.request()
        await trio.sleep(2)  # and the app's SYN is repeated meanwhile
        assert connected == []

        request.accept()
        await settled()
        assert len(connected) == 1


async def test_refused_is_refused_once(autojump_clock: MockClock) -> None:
    """A second decision, or one after the app has gone, means nothing."""
    async with world() as there, trio.open_nursery() as nursery:

        async def connect() -> None:
            with pytest.raises(ConnectionRefusedError):
                await there.host.connect(SERVED)

        nursery.start_soon(connect)
        request = await there.request()
        request.refuse()
        request.refuse()

        stream = request.accept()
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await stream.aclose()


async def test_refusing_what_was_accepted_changes_nothing(autojump_clock: MockClock) -> None:
    async with world() as there, trio.open_nursery() as nursery:
        nursery.start_soon(there.host.connect, SERVED)
        request = await there.request()
        flow = request.accept()

        request.refuse()

        await settled()
        assert flow.state == "ESTABLISHED"


@pytest.mark.rule(27)
async def test_a_request_whose_app_has_gone_is_cancelled(autojump_clock: MockClock) -> None:
    """A client that closes its socket while connecting says nothing; its SYNs just stop."""
    async with world() as there:
        cancelled: list[str] = []
        with trio.move_on_after(0.5):
            await there.host.connect(SERVED)
        request = await there.request()
        request.on_cancelled(lambda: cancelled.append("early"))
        assert cancelled == []

        await trio.sleep(10)

        assert request.cancelled
        request.on_cancelled(lambda: cancelled.append("late"))
        assert cancelled == ["early", "late"]
        request.refuse()
        with pytest.raises(trio.BrokenResourceError):
            await request.accept().send_all(b"x")


# Trio's streams


class StrictApp(trio.abc.HalfCloseableStream):
    """An app's connection that obeys every rule of Trio's streams, closing included: what comes after it is reset."""

    def __init__(self, app: AppStream, nursery: trio.Nursery) -> None:
        self._app = app
        self._nursery = nursery
        self._closed = trio.Event()
        self._eof_sent = False
        self._busy: set[str] = set()

    async def _do(self, what: str, act: Callable[[], Awaitable[bytes | None]]) -> bytes | None:
        await trio.lowlevel.checkpoint()
        if self._closed.is_set() or (what == "send" and self._eof_sent):
            raise trio.ClosedResourceError
        if what in self._busy:
            raise trio.BusyResourceError
        self._busy.add(what)
        result: list[bytes | trio.BrokenResourceError | None] = []
        try:
            async with trio.open_nursery() as nursery:

                async def until_closed() -> None:
                    await self._closed.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_closed)
                try:
                    result.append(await act())
                except trio.BrokenResourceError as error:
                    result.append(error)
                nursery.cancel_scope.cancel()
        finally:
            self._busy.remove(what)
        if self._closed.is_set():
            raise trio.ClosedResourceError
        if isinstance(result[0], trio.BrokenResourceError):
            raise result[0]
        return result[0]

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._do("send", lambda: self._app.send_all(data))

    async def wait_send_all_might_not_block(self) -> None:
        await self._do("send", self._app.wait_send_all_might_not_block)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError
        return await self._do("receive", lambda: self._app.receive_some(max_bytes)) or b""

    async def send_eof(self) -> None:
        if self._eof_sent:
            await trio.lowlevel.checkpoint()
            return
        await self._do("send", self._app.send_eof)
        self._eof_sent = True

    async def aclose(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            if self._app.peer.received:
                self._app.abort()
            else:
                self._nursery.start_soon(self._reset_what_comes)
            with trio.CancelScope(shield=True):
                await self._app.aclose()
        await trio.lowlevel.checkpoint()

    async def _reset_what_comes(self) -> None:
        while not self._app.peer.received:
            await self._app.changed.wait()
        self._app.abort()


async def test_a_flow_is_a_trio_stream(autojump_clock: MockClock) -> None:
    """Every rule that Trio's own test suite knows, in both directions."""
    async with world() as there, trio.open_nursery() as nursery:

        async def make() -> tuple[StrictApp, FlowStream]:
            app, flow = await there.pair(auto_read=False)
            return StrictApp(app, nursery), flow

        async def make_clogged() -> tuple[StrictApp, FlowStream]:
            app, flow = await there.pair(auto_read=False, buffer=65536)
            while flow.send_nowait(bytes(100_000)):
                pass
            with trio.move_on_after(0.5):
                while True:
                    await app.send_all(bytes(100_000))
            return StrictApp(app, nursery), flow

        await trio.testing.check_half_closeable_stream(make, make_clogged)
        nursery.cancel_scope.cancel()


async def test_a_closed_flow_still_delivers_what_was_written(autojump_clock: MockClock) -> None:
    """Closing is not waiting: the stack goes on without the object."""
    data = Random(1).randbytes(SEND_BUFFER)
    async with world() as there:
        app, flow = await there.pair(auto_read=False, buffer=65536)
        await flow.send_all(data)

        await flow.aclose()

        assert list(there.network.streams()) == []
        assert await read_all(app) == data


@pytest.mark.rule(60)
async def test_closing_without_reading_resets(autojump_clock: MockClock) -> None:
    """Those bytes reach nobody, and the app must know (RFC 2525 2.17)."""
    async with world() as there:
        app, flow = await there.pair()
        await app.send_all(b"for nobody")
        await settled()

        await flow.aclose()

        await settled()
        assert app.peer.error == "reset"


async def test_an_aborted_flow_is_reset_at_the_app(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, flow = await there.pair()

        flow.abort()
        flow.abort()

        with pytest.raises(trio.BrokenResourceError):
            await flow.receive_some()
        await settled()
        assert app.peer.error == "reset"
        assert flow.failure == "aborted"


@pytest.mark.parametrize("what", ["receive_some", "wait_send_space", "wait_delivered"])
async def test_who_waits_learns_that_the_app_has_reset(autojump_clock: MockClock, what: str) -> None:
    async with world() as there:
        app, flow = await there.pair(auto_read=False, buffer=65536)
        while flow.send_nowait(bytes(100_000)):
            pass
        outcome: list[str] = []

        async def wait() -> None:
            try:
                await getattr(flow, what)()
                outcome.append("returned")
            except trio.BrokenResourceError:
                outcome.append("broken")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await settled()
            app.abort()

        assert outcome == ["returned" if what == "wait_delivered" else "broken"]
        assert flow.failure == "reset"


async def test_cancelled_waits_change_nothing(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, flow = await there.pair()
        for _ in range(2):
            with trio.move_on_after(1) as scope:
                await flow.receive_some()
            assert scope.cancelled_caught

        await app.send_all(b"here")

        assert await flow.receive_some() == b"here"


# The sink


class Sink:
    """Takes up to `room` bytes and remembers how it was asked."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken = bytearray()
        self.calls = 0

    def __call__(self, views: Sequence[memoryview]) -> int:
        self.calls += 1
        data = b"".join(views)[: self.room]
        self.room -= len(data)
        self.taken += data
        return len(data)


async def test_a_sink_gets_the_bytes_of_a_whole_batch_in_one_call(autojump_clock: MockClock) -> None:
    """A wake-up per packet would cost more than the packet."""
    async with world() as there:
        app, flow = await there.pair()
        sink = Sink(1_000_000)
        flow.attach(sink)

        await app.send_all(bytes(29_200))  # twenty segments
        await settled()

        assert (len(sink.taken), sink.calls) == (29_200, 1)
        assert flow.bytes_from_app == 29_200


async def test_a_sink_gets_what_came_before_it(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, flow = await there.pair()
        await app.send_all(b"early")
        await settled()
        sink = Sink(100)

        flow.attach(sink)
        await app.send_all(b" late")
        await app.send_eof()
        await settled()

        assert flow.ended
        assert sink.taken == b"early late"


async def test_what_a_sink_refuses_waits_in_order_and_stops_the_app(autojump_clock: MockClock) -> None:
    data = Random(2).randbytes(2_000_000)
    async with world() as there, trio.open_nursery() as nursery:
        app, flow = await there.pair()
        sink = Sink(10_000)
        told: list[bool] = []
        flow.attach(sink, lambda: told.append(flow.refused))

        async def send() -> None:
            await app.send_all(data)
            await app.send_eof()

        nursery.start_soon(send)
        await trio.sleep(5)
        assert told == [True]
        assert len(sink.taken) == 10_000
        assert flow.bytes_from_app < 700_000
        calls = sink.calls

        while not flow.ended:
            sink.room += 100_000
            flow.offer()
            await settled()

        assert calls == 1, "what was refused is offered again only on request"
        assert told[-1] is False
        assert bytes(sink.taken) == data


async def test_a_sink_that_broke_keeps_the_flow_until_somebody_decides(autojump_clock: MockClock) -> None:
    """It takes nothing any more; the owner sees a refusal and resets the flow."""
    async with world() as there:
        app, flow = await there.pair()
        flow.attach(lambda views: 0)
        await app.send_all(b"x")
        await settled()

        assert flow.refused
        flow.abort()

        await settled()
        assert app.peer.error == "reset"


async def test_without_a_sink_again_bytes_can_be_read(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, flow = await there.pair()
        flow.attach(Sink(3))
        await app.send_all(b"123456")
        await settled()

        flow.attach(None)

        assert await flow.receive_some(2) == b"45"
        assert await flow.receive_some() == b"6"


# Towards the app


async def test_a_full_buffer_takes_nothing_until_there_is_room(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, flow = await there.pair(auto_read=False, buffer=65536)
        taken = 0
        while count := flow.send_nowait(bytes(100_000)):
            taken += count
        assert taken >= SEND_BUFFER

        async with trio.open_nursery() as nursery:

            async def read() -> None:
                while True:
                    await app.receive_some(65536)

            nursery.start_soon(read)
            await flow.wait_send_space()
            assert flow.send_nowait(bytes(1000)) == 1000
            nursery.cancel_scope.cancel()


async def test_delivered_means_that_the_apps_kernel_has_it_all(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, flow = await there.pair(auto_read=False, buffer=65536)
        await flow.send_all(bytes(200_000))
        await flow.send_eof()
        delivered = trio.Event()

        async def wait() -> None:
            await flow.wait_delivered()
            delivered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.sleep(10)
            assert not delivered.is_set()

            assert len(await read_all(app)) == 200_000

        assert delivered.is_set()
        assert flow.bytes_to_app == 200_000


async def test_nothing_can_be_written_behind_the_end(autojump_clock: MockClock) -> None:
    async with world() as there:
        _, flow = await there.pair()
        await flow.send_eof()

        with pytest.raises(trio.ClosedResourceError):
            flow.send_nowait(b"x")


# The pump


async def test_a_flood_does_not_hold_up_the_rest(autojump_clock: MockClock) -> None:
    """A batch is bounded, so timers and other tasks get their turn between."""
    async with world() as there:
        before = there.network.batches
        for port in range(FLOOD_PACKETS * 3):
            there.host.device.write_packet(
                segment(source=("10.107.0.1", 1024 + port), destination=("10.107.0.2", 81), flags=SYN)
            )
        await settled()

        assert there.network.batches - before >= 3
        assert there.ours.read() is None


async def test_packets_of_one_wake_are_one_batch(autojump_clock: MockClock) -> None:
    async with world() as there:
        app, _ = await there.pair()
        await settled()
        before = there.network.batches

        await app.send_all(bytes(29_200))
        await settled()

        assert there.network.batches - before == 1


@pytest.mark.parametrize("split", [False, True])
async def test_a_device_that_is_nearly_always_full_loses_nothing(autojump_clock: MockClock, split: bool) -> None:
    """What cannot be written stays owed, and is asked for again when there is room."""
    data = Random(3).randbytes(3_000_000)
    async with world(capacity=2, split=split) as there, trio.open_nursery() as nursery:
        app, flow = await there.pair()

        async def talk() -> None:
            await flow.send_all(data)
            await flow.send_eof()

        nursery.start_soon(talk)
        assert hashlib.sha256(await read_all(app)).digest() == hashlib.sha256(data).digest()


@pytest.mark.parametrize("seed", range(5))
async def test_every_byte_arrives_through_faults_in_both_directions(autojump_clock: MockClock, seed: int) -> None:
    """Loss, duplicates, disorder and damage cost time and nothing else."""
    faults = Faults(loss=0.03, duplication=0.02, reordering=0.05, corruption=0.02, delay_s=0.001)
    up, down = Random(seed).randbytes(300_000), Random(seed + 100).randbytes(300_000)

    async with world(faults=faults, seed=seed) as there:
        app, flow = await there.pair()
        received: dict[str, bytes] = {}

        async def send(stream: trio.abc.HalfCloseableStream, data: bytes) -> None:
            await stream.send_all(data)
            await stream.send_eof()

        async def receive(name: str, stream: trio.abc.ReceiveStream) -> None:
            received[name] = await read_all(stream)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send, app, up)
            nursery.start_soon(send, flow, down)
            nursery.start_soon(receive, "up", flow)
            nursery.start_soon(receive, "down", app)

    assert hashlib.sha256(received["up"]).digest() == hashlib.sha256(up).digest()
    assert hashlib.sha256(received["down"]).digest() == hashlib.sha256(down).digest()


@pytest.mark.parametrize("found_by", ["reading", "writing"])
@pytest.mark.rule(68)
async def test_flows_go_on_over_another_device(autojump_clock: MockClock, found_by: str) -> None:
    """An interface that was deleted is made anew; the connections do not notice more than a pause."""
    ours, apps = memory_pair()
    there = World(ours, apps, NO_FAULTS, 1)
    data = Random(4).randbytes(100_000)
    with trio.fail_after(600):
        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as first:
                first.start_soon(run_until_gone, there)
                await first.start(there.host.run)
                app, flow = await there.pair()
                ours.delete()
                if found_by == "writing":
                    flow.send_nowait(data[:50_000])
                    await settled()
                first.cancel_scope.cancel()
            if found_by == "reading":
                flow.send_nowait(data[:50_000])

            there.network.device, there.host.device = memory_pair()
            await nursery.start(there.network.run)
            await nursery.start(there.host.run)
            await flow.send_all(data[50_000:])
            await flow.send_eof()
            assert await read_all(app) == data
            nursery.cancel_scope.cancel()


async def run_until_gone(there: World) -> None:
    with pytest.raises(DeviceError):
        await there.network.run()
