"""Bytes both ways, and every way in which they can end."""

from __future__ import annotations

import contextlib
import hashlib
import random
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio
import trio.testing

from ngrokd.errors import StreamTruncated
from ngrokd.relay.splice import splice
from ngrokd.relay.tls import BACKLOG_LIMIT, CHUNK, RECORD, TlsSession, TlsStream
from ngrokd.relay.transport import Transport, memory_transport_pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.ngrokd.relay.conftest import Authority, FakeFlow
    from tun.poller import Poller

    MakeWorld: TypeAlias = Callable[..., Awaitable["World"]]

HOST = "ingress.example"
versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


@dataclass
class World:
    """An app's flow, our stream, and the ingress at the other end of it."""

    flow: FakeFlow
    stream: TlsStream
    ingress: TlsStream
    transport: Transport  # the ingress's end
    poller: Poller
    failure: Exception | None = None
    done: bool = False

    async def splice(self) -> None:
        try:
            await splice(self.flow, self.stream, self.poller)
        except (StreamTruncated, trio.BrokenResourceError) as error:
            self.failure = error
        self.done = True

    async def ingress_sends(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self.ingress.send_nowait([view]) :]
            await self.ingress.wait_sendable()
        await self.ingress.drain()

    async def ingress_reads_all(self) -> bytes:
        data = bytearray()
        while view := await self.ingress.receive_view():
            data += view
        return bytes(data)

    @property
    def our_end_is_open(self) -> bool:
        try:
            self.stream.transport.send_nowait(b"")
        except OSError:
            return False
        return True


@pytest.fixture
def make_world(authority: Authority, make_flow: Callable[..., FakeFlow], poller: Poller) -> MakeWorld:
    async def make(
        version: ssl.TLSVersion | None = None, *, capacity: int = 64 * 1024, buffer: int = 64 * 1024
    ) -> World:
        one, two = memory_transport_pair(capacity)
        stream = TlsStream(one, TlsSession(authority.client_context(), server_hostname=HOST))
        ingress = TlsStream(two, TlsSession(authority.server_context(version=version), server_side=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stream.handshake)
            nursery.start_soon(ingress.handshake)
        return World(make_flow(receive_buffer=buffer, send_buffer=buffer), stream, ingress, two, poller)

    return make


def digest(data: bytes | bytearray) -> str:
    return hashlib.sha256(data).hexdigest()


# -- half-close


@versions
@pytest.mark.parametrize("first", ["app", "ingress", "both"])
@pytest.mark.parametrize("seed", range(10))
async def test_each_side_may_end_first_and_no_byte_is_lost(
    make_world: MakeWorld, version: ssl.TLSVersion, first: str, seed: int
) -> None:
    """FIN and close_notify pass in their direction only; what the other side says afterwards arrives."""
    rng = random.Random(seed)
    world = await make_world(version, capacity=rng.choice([3000, 70_000]), buffer=rng.choice([1000, 64 * 1024]))
    flow, ingress = world.flow, world.ingress
    question, answer = rng.randbytes(rng.choice([0, 1, 400_000])), rng.randbytes(rng.choice([0, 1, 400_000]))
    app_ended, ingress_ended = trio.Event(), trio.Event()
    heard: dict[str, bytes] = {}

    async def app_writes() -> None:
        if first == "ingress":
            await ingress_ended.wait()
        await flow.app_send(question)
        await flow.app_send_eof()

    async def app_reads() -> None:
        heard["app"] = await flow.app_read_all()
        ingress_ended.set()

    async def ingress_writes() -> None:
        if first == "app":
            await app_ended.wait()
        await world.ingress_sends(answer)
        await ingress.send_eof()

    async def ingress_reads() -> None:
        heard["ingress"] = await world.ingress_reads_all()
        app_ended.set()

    async with trio.open_nursery() as nursery:
        for each in (world.splice, app_writes, app_reads, ingress_writes, ingress_reads):
            nursery.start_soon(each)

    assert world.failure is None
    assert digest(heard["ingress"]) == digest(question)
    assert digest(heard["app"]) == digest(answer)
    assert flow.ending == "closed"
    assert not world.our_end_is_open
    if first != "both":
        assert flow.eof_order == (["from app", "to app"] if first == "app" else ["to app", "from app"])


async def test_it_ends_only_when_the_app_has_everything(make_world: MakeWorld) -> None:
    """A daemon that stops when it has sent, and not when it was received, loses the last bytes."""
    world = await make_world()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        await world.flow.app_send_eof()
        await world.ingress_sends(b"the last words")
        await world.ingress.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        assert not world.done
        assert world.flow.ending == ""

        assert world.flow.app_read_nowait() == b"the last words"
    assert world.done


async def test_bytes_that_came_with_the_header_are_received_first(make_world: MakeWorld) -> None:
    world = await make_world()
    world.stream.unread(memoryview(b"220 "))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        await world.ingress_sends(b"ready")
        await world.ingress.send_eof()
        await world.flow.app_send_eof()
        assert await world.flow.app_read_all() == b"220 ready"


@pytest.mark.parametrize("received", [False, True], ids=["with the handshake", "with the header"])
async def test_an_answer_and_its_end_may_be_there_before_the_splice(make_world: MakeWorld, received: bool) -> None:
    """The end must not overtake the bytes, whatever the app has said and ended meanwhile."""
    world = await make_world()
    await world.ingress_sends(b"220 ready")
    await world.ingress.send_eof()
    if received:
        world.stream.unread(await world.stream.receive_view())
        assert world.stream.received_eof
    await world.flow.app_send(b"question")
    await world.flow.app_send_eof()
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(world.splice)
            assert await world.flow.app_read_all() == b"220 ready"
            assert await world.ingress_reads_all() == b"question"
    assert world.failure is None


async def test_bytes_that_waited_before_the_splice_are_sent(make_world: MakeWorld) -> None:
    """The app may have spoken between our SYN-ACK and now."""
    world = await make_world()
    await world.flow.app_send(b"early")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        assert bytes(await world.ingress.receive_view()) == b"early"
        nursery.cancel_scope.cancel()


# -- back-pressure


async def test_an_ingress_that_does_not_read_stops_the_app(make_world: MakeWorld) -> None:
    """What is under way is bounded; when the ingress reads again everything arrives."""
    world = await make_world(capacity=10_000, buffer=50_000)
    said = random.Random(1).randbytes(2_000_000)
    sent = 0

    async def app_writes() -> None:
        nonlocal sent
        for start in range(0, len(said), 1000):
            await world.flow.app_send(said[start : start + 1000])
            sent += 1000
        await world.flow.app_send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        nursery.start_soon(app_writes)
        await trio.testing.wait_all_tasks_blocked()
        assert sent < 10_000 + BACKLOG_LIMIT + CHUNK + 50_000
        assert world.stream.backlog < BACKLOG_LIMIT + CHUNK

        assert digest(await world.ingress_reads_all()) == digest(said)
        await world.ingress.send_eof()


async def test_the_last_bytes_leave_although_nothing_follows_them(make_world: MakeWorld) -> None:
    """What the transport did not take at once must not wait for the app to speak again."""
    world = await make_world(capacity=3000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        await world.flow.app_send(bytes(60_000))
        received = 0
        while received < 60_000:
            received += len(await world.ingress.receive_view())
        await world.flow.app_send(bytes(50_000))
        while received < 110_000:
            received += len(await world.ingress.receive_view())
        nursery.cancel_scope.cancel()


async def test_an_app_that_does_not_read_stops_the_ingress(make_world: MakeWorld) -> None:
    """TLS is not read any more, so that TCP tells the ingress."""
    world = await make_world(capacity=10_000, buffer=50_000)
    said = random.Random(2).randbytes(1_000_000)

    async def ingress_writes() -> None:
        await world.ingress_sends(said)
        await world.ingress.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        nursery.start_soon(ingress_writes)
        await trio.testing.wait_all_tasks_blocked()
        assert world.stream.bytes_received <= 50_000 + CHUNK + 20_000
        assert world.ingress.backlog

        await world.flow.app_send_eof()
        assert digest(await world.flow.app_read_all()) == digest(said)


async def test_when_memory_is_short_no_more_is_received_than_the_app_has_room_for(make_world: MakeWorld) -> None:
    """What the flow refuses would stand between it and TLS, where nobody counts it; nothing is lost for that."""
    world = await make_world(capacity=1_000_000, buffer=70_000)
    world.flow.rationed = True
    said = random.Random(3).randbytes(1_000_000)

    async def ingress_writes() -> None:
        await world.ingress_sends(said)
        await world.ingress.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        nursery.start_soon(ingress_writes)
        await trio.testing.wait_all_tasks_blocked()
        assert world.flow.bytes_to_app == 70_000
        assert world.stream.bytes_received <= 70_000 + RECORD

        await world.flow.app_send_eof()
        assert digest(await world.flow.app_read_all()) == digest(said)


# -- cuts


@versions
@pytest.mark.parametrize("how", ["eof", "reset"])
@pytest.mark.parametrize("seed", range(10))
async def test_a_cut_stream_is_a_reset_and_never_an_end(
    make_world: MakeWorld, version: ssl.TLSVersion, how: str, seed: int
) -> None:
    """What the app got before is a prefix."""
    rng = random.Random(seed)
    world = await make_world(version, capacity=rng.choice([3000, 200_000]))
    said = rng.randbytes(rng.randint(0, 300_000))

    async def ingress_is_cut() -> None:
        await world.ingress_sends(said)
        if how == "eof":
            world.transport.shutdown_write()
        else:
            world.transport.abort()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        nursery.start_soon(ingress_is_cut)
        with pytest.raises(ConnectionResetError):
            await world.flow.app_read_all()

    assert isinstance(world.failure, StreamTruncated)
    assert said.startswith(world.flow.app_received)
    assert "to app" not in world.flow.eof_order
    assert world.flow.ending == "aborted"
    assert not world.our_end_is_open


async def test_an_app_that_resets_resets_the_ingress(make_world: MakeWorld) -> None:
    """No close_notify: the ingress must not take half a request for a whole one."""
    world = await make_world()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        await world.flow.app_send(b"half a requ")
        assert bytes(await world.ingress.receive_view()) == b"half a requ"
        world.flow.app_reset()

    assert isinstance(world.failure, trio.BrokenResourceError)
    with pytest.raises(StreamTruncated, match=r"reset by peer"):
        await world.ingress.receive_view()


async def test_an_app_that_resets_while_it_is_sent_to(make_world: MakeWorld) -> None:
    """The same when it is the other direction that finds out."""
    world = await make_world(buffer=1000)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        await world.flow.app_send_eof()
        nursery.start_soon(world.ingress_sends, bytes(30_000))
        await trio.testing.wait_all_tasks_blocked()
        world.flow.app_reset()

    assert isinstance(world.failure, trio.BrokenResourceError)
    assert not world.our_end_is_open


async def test_an_answer_before_the_hang_up_is_delivered(make_world: MakeWorld) -> None:
    """Servers refuse uploads by answering and closing; the answer says why, and then the upload fails."""
    world = await make_world(capacity=20_000)

    async def ingress_refuses() -> None:
        await world.ingress.receive_view()
        await world.ingress_sends(b"413 too large")
        await world.ingress.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        world.transport.close()

    async def app_writes() -> None:
        with pytest.raises(ConnectionResetError):
            await world.flow.app_send(bytes(3_000_000))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        nursery.start_soon(ingress_refuses)
        nursery.start_soon(app_writes)
        assert await world.flow.app_read_all() == b"413 too large"

    assert isinstance(world.failure, StreamTruncated)
    assert world.flow.ending == "aborted"


async def test_an_app_that_never_reads_is_reset_in_the_end(
    make_world: MakeWorld, autojump_clock: trio.testing.MockClock
) -> None:
    """It may be blocked in a write of what nobody takes any more."""
    world = await make_world(capacity=20_000)
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        await world.ingress_sends(b"no")
        await world.ingress.send_eof()
        await trio.testing.wait_all_tasks_blocked()
        world.transport.close()
        await world.flow.app_send(b"more")

    assert isinstance(world.failure, StreamTruncated)
    assert world.flow.ending == "aborted"
    assert trio.current_time() - begun == pytest.approx(5)


async def test_cancelled_both_are_reset(make_world: MakeWorld) -> None:
    """Shutdown after the grace, or an endpoint that is gone for too long: nobody may take it for an end."""
    world = await make_world()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(world.splice)
        await world.flow.app_send(b"x")
        await world.ingress.receive_view()
        nursery.cancel_scope.cancel()

    assert world.flow.ending == "aborted"
    with pytest.raises(StreamTruncated, match=r"reset by peer"):
        await world.ingress.receive_view()


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_happens_when_both_ends_are_let_go(make_world: MakeWorld, seed: int) -> None:
    """Any of the endings, at any moment, with both directions busy: no hang, no error of ours, nothing left open."""
    rng = random.Random(seed)
    world = await make_world(capacity=rng.choice([3000, 100_000]), buffer=rng.choice([500, 64 * 1024]))
    said = rng.randbytes(100_000)

    async def app_writes() -> None:
        try:
            await world.flow.app_send(said)
            await world.flow.app_send_eof()
        except ConnectionResetError:
            pass

    async def app_reads() -> None:
        with contextlib.suppress(ConnectionResetError):
            await world.flow.app_read_all()

    async def ingress_writes() -> None:
        try:
            await world.ingress_sends(said)
            await world.ingress.send_eof()
        except (StreamTruncated, trio.ClosedResourceError, OSError):
            pass

    async def ingress_reads() -> None:
        with contextlib.suppress(StreamTruncated, trio.ClosedResourceError):
            await world.ingress_reads_all()

    async def something_happens(scope: trio.CancelScope) -> None:
        for _ in range(rng.randint(0, 60)):
            await trio.lowlevel.checkpoint()
        rng.choice(
            [
                world.flow.app_reset,
                world.ingress.abort,
                world.transport.close,
                world.transport.abort,
                scope.cancel,
            ]
        )()

    async with trio.open_nursery() as nursery:
        for each in (app_writes, app_reads, ingress_writes, ingress_reads):
            nursery.start_soon(each)
        with trio.CancelScope() as scope:
            nursery.start_soon(something_happens, scope)
            await world.splice()
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert world.flow.ending or world.flow.failure
    assert not world.our_end_is_open


@versions
async def test_an_app_that_resets_after_its_end_is_noticed_while_the_ingress_is_silent(
    make_world: MakeWorld, version: ssl.TLSVersion, autojump_clock: trio.testing.MockClock
) -> None:
    """Both directions wait for the ingress then; without being told, the connection to it would stay for ever."""
    world = await make_world(version)

    async def app() -> None:
        await world.flow.app_send(b"question")
        await world.flow.app_send_eof()
        await trio.sleep(10)
        world.flow.app_reset()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(app)
        with trio.fail_after(11), pytest.raises(trio.BrokenResourceError):
            await splice(world.flow, world.stream, world.poller)


@versions
async def test_an_app_that_resets_while_its_upload_is_stalled_is_noticed(
    make_world: MakeWorld, version: ssl.TLSVersion, autojump_clock: trio.testing.MockClock
) -> None:
    """The ingress takes nothing and says nothing; the app's reset still frees the connection to it."""
    world = await make_world(version, capacity=3000)

    async def app() -> None:
        with contextlib.suppress(ConnectionResetError):
            await world.flow.app_send(bytes(2_000_000))

    async def reset() -> None:
        await trio.sleep(10)
        world.flow.app_reset()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(app)
        nursery.start_soon(reset)
        with trio.fail_after(11), pytest.raises(trio.BrokenResourceError):
            await splice(world.flow, world.stream, world.poller)
