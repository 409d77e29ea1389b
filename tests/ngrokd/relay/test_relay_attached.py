"""A TLS stream that a poller calls: over real sockets, with the poller at work."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from ngrokd.errors import StreamTruncated
from ngrokd.relay.splice import splice
from ngrokd.relay.tls import BACKLOG_LIMIT, TlsSession, TlsStream
from ngrokd.relay.transport import SocketTransport
from tun.poller import Poller

if TYPE_CHECKING:
    from tests.ngrokd.relay.conftest import Authority, FakeFlow

HOST = "ingress.example"
versions = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["1.2", "1.3"])


class World:
    """Our stream, attached; the ingress at the other end; and what was told."""

    def __init__(self, poller: Poller, stream: TlsStream, ingress: TlsStream, peer: socket.socket) -> None:
        self.poller = poller
        self.stream = stream
        self.ingress = ingress
        self.peer = peer
        self.got = bytearray()
        self.takes = 1 << 30  # bytes per call
        self.has_room = 1 << 20
        self.changes: list[tuple[int, bool, bool]] = []
        self.errors: list[Exception] = []
        self.inside: Callable[[], object] | None = None

    def attach(self) -> None:
        self.stream.attach(self.poller, self.sink, lambda: self.has_room, self.changed, self.errors.append)

    def sink(self, view: memoryview) -> int:
        if self.inside is not None:
            self.inside()
        taken = min(self.takes, len(view))
        self.got += view[:taken]
        return taken

    def changed(self) -> None:
        self.changes.append((len(self.got), self.stream.ended, self.stream.cut is not None))

    async def quiet(self) -> None:
        """Nothing is called any more: no busy loop."""
        await trio.sleep(0.02)
        rounds = self.poller.rounds
        await trio.sleep(0.02)
        assert self.poller.rounds == rounds


async def until(true: Callable[[], object]) -> None:
    while not true():  # noqa: ASYNC110 - the kernel's event, not Trio's
        await trio.sleep(0.001)


@asynccontextmanager
async def world(authority: Authority, version: ssl.TLSVersion | None = None) -> AsyncIterator[World]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    stream = TlsStream(SocketTransport(one), TlsSession(authority.client_context(), server_hostname=HOST))
    ingress = TlsStream(SocketTransport(two), TlsSession(authority.server_context(version=version), server_side=True))
    poller = Poller()
    try:
        with trio.fail_after(20):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(stream.handshake)
                nursery.start_soon(ingress.handshake)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(poller.run)
                yield World(poller, stream, ingress, two)
                nursery.cancel_scope.cancel()
    finally:
        stream.abort()
        ingress.abort()
        assert poller._entries == {}, "a watch was left behind"
        poller.close()


async def test_no_room_and_a_part_taken_wait_for_an_offer(authority: Authority) -> None:
    async with world(authority) as there:
        there.has_room = 0
        there.attach()
        there.ingress.send_nowait([b"0123456789"])
        await until(lambda: there.stream.refused)
        await there.quiet()
        assert there.got == b""

        there.has_room, there.takes = 1 << 20, 4
        there.stream.offer()
        await until(lambda: there.got)
        assert there.stream.refused
        await there.quiet()
        assert there.got == b"0123"

        there.takes = 100
        there.stream.offer()
        assert there.got == b"0123456789"
        assert not there.stream.refused


@versions
async def test_the_end_comes_with_the_last_bytes_and_costs_nothing_afterwards(
    authority: Authority, version: ssl.TLSVersion
) -> None:
    """Also when TCP stays open, and when its FIN follows."""
    async with world(authority, version) as there:
        there.attach()
        there.ingress.send_nowait([b"last"])
        there.ingress.send_eof_nowait()
        await until(lambda: there.changes)
        assert there.changes[0] == (4, True, False)
        await there.quiet()
        there.peer.shutdown(socket.SHUT_WR)
        await there.quiet()
        assert there.stream.cut is None
        assert there.stream.send_nowait([b"still heard"]) == 11
        assert bytes(await there.ingress.receive_view()) == b"still heard"


@pytest.mark.parametrize("how", ["fin", "reset", "damage"])
async def test_good_bytes_come_before_the_cut(authority: Authority, how: str) -> None:
    async with world(authority) as there:
        there.takes = 2
        there.attach()
        there.ingress.send_nowait([b"good"])
        if how == "damage":
            there.peer.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        await until(lambda: there.stream.refused)
        if how == "fin":
            there.peer.shutdown(socket.SHUT_WR)
        elif how == "reset":
            there.ingress.abort()
        await there.quiet()
        assert there.stream.cut is None  # two bytes are to be taken yet
        there.takes = 100
        there.stream.offer()
        await until(lambda: there.stream.cut is not None)
        assert there.got == b"good"
        assert there.changes[-1] == (4, False, True)
        assert there.errors == []
        await there.quiet()


async def test_the_poller_moves_the_backlog_and_tells_at_half_and_at_its_end(authority: Authority) -> None:
    async with world(authority) as there:
        there.attach()
        sent = 0
        while there.stream.sendable or there.stream.backlog < BACKLOG_LIMIT:
            sent += there.stream.send_nowait([bytes(100_000)])
        assert not there.stream.sendable
        levels: list[int] = []
        there.stream._on_change = lambda: levels.append(there.stream.backlog)
        received = 0
        while received < sent:
            received += len(await there.ingress.receive_view())
        await until(lambda: there.stream.backlog == 0)
        assert levels[-1] == 0
        assert all(level < BACKLOG_LIMIT // 2 for level in levels)
        await there.quiet()


async def test_a_break_while_sending_is_told_within_the_call(authority: Authority) -> None:
    async with world(authority) as there:
        there.has_room = 0  # so that it is not the poller who finds out
        there.attach()
        there.ingress.abort()
        await trio.sleep(0.01)
        while there.stream.broken is None:
            there.stream.send_nowait([b"x"])
        assert there.changes
        assert there.stream.send_nowait([b"y"]) == 0
        await there.quiet()


async def test_detached_tasks_may_wait_again_and_get_what_was_left(authority: Authority) -> None:
    async with world(authority) as there:
        there.takes = 3
        there.attach()
        there.ingress.send_nowait([b"abcdef"])
        await until(lambda: there.stream.refused)
        there.stream.detach()
        assert bytes(await there.stream.receive_view()) == b"def"
        there.ingress.send_nowait([b"more"])
        assert bytes(await there.stream.receive_view()) == b"more"
        assert there.got == b"abc"


async def test_a_defect_in_a_sink_is_its_streams_alone(authority: Authority) -> None:
    async with world(authority) as there, world(authority) as other:

        def fail() -> None:
            raise ZeroDivisionError

        errors = there.errors
        there.inside = fail
        there.attach()
        other.attach()
        there.ingress.send_nowait([b"x"])
        await until(lambda: errors)
        assert isinstance(errors[0], ZeroDivisionError)
        there.stream.abort()
        other.ingress.send_nowait([b"y"])
        await until(lambda: other.got)


@pytest.mark.parametrize("how", ["abort", "close_nowait"])
async def test_a_sink_may_end_its_stream(authority: Authority, how: str) -> None:
    """And the next connection may get its number."""
    async with world(authority) as there:
        there.inside = getattr(there.stream, how)
        there.attach()
        there.ingress.send_nowait([b"x"])
        await until(lambda: there.got)
        assert there.errors == []
        assert there.poller._entries == {}
        await there.quiet()


@versions
@pytest.mark.parametrize("first", ["ours", "theirs"])
async def test_half_closed_a_hundred_times(authority: Authority, version: ssl.TLSVersion, first: str) -> None:
    for _ in range(100):
        async with world(authority, version) as there:
            there.attach()
            if first == "ours":
                there.stream.send_nowait([b"question"])
                there.stream.send_eof_nowait()
                assert bytes(await there.ingress.receive_view()) == b"question"
                assert not await there.ingress.receive_view()
            there.ingress.send_nowait([b"answer"])
            there.ingress.send_eof_nowait()
            await until(lambda there=there: there.stream.ended)  # type: ignore[misc]
            assert there.got == b"answer"
            if first == "theirs":
                there.stream.send_nowait([b"question"])
                there.stream.send_eof_nowait()
                assert bytes(await there.ingress.receive_view()) == b"question"
                assert not await there.ingress.receive_view()
            there.stream.detach()
            with pytest.raises(trio.ClosedResourceError):
                await there.stream.wait_sendable()
            assert there.stream.cut is None
            assert there.errors == []


async def test_who_was_cut_says_so_after_detaching(authority: Authority) -> None:
    async with world(authority) as there:
        there.attach()
        there.peer.shutdown(socket.SHUT_WR)
        await until(lambda: there.changes)
        there.stream.detach()
        with pytest.raises(StreamTruncated):
            await there.stream.receive_view()


@pytest.mark.parametrize("seed", range(6))
async def test_many_flows_at_once_each_with_its_own_end(
    authority: Authority, make_flow: Callable[..., FakeFlow], seed: int
) -> None:
    """Spliced over sockets that one poller serves: what ends well is whole, what is cut is a prefix, nobody stalls."""
    rng = random.Random(seed)
    async with AsyncExitStack() as stack:
        poller = Poller()
        stack.callback(poller.close)
        with trio.fail_after(60):
            async with trio.open_nursery() as background:
                background.start_soon(poller.run)
                async with trio.open_nursery() as nursery:
                    for _ in range(8):
                        nursery.start_soon(_one_flow, authority, make_flow, poller, random.Random(rng.random()))
                background.cancel_scope.cancel()
        assert poller._entries == {}


async def _one_flow(
    authority: Authority, make_flow: Callable[..., FakeFlow], poller: Poller, rng: random.Random
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    stream = TlsStream(SocketTransport(one), TlsSession(authority.client_context(), server_hostname=HOST))
    ingress = TlsStream(SocketTransport(two), TlsSession(authority.server_context(), server_side=True))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stream.handshake)
        nursery.start_soon(ingress.handshake)
    buffer = rng.choice([1, 1000, 64 * 1024]) if rng.random() < 0.3 else 64 * 1024
    flow = make_flow(receive_buffer=max(buffer, 1000), send_buffer=max(buffer, 500))
    flow.rationed = rng.random() < 0.4
    question, answer = rng.randbytes(rng.choice([0, 10, 600_000])), rng.randbytes(rng.choice([0, 10, 600_000]))
    ending = rng.choice(["both", "both", "reset by app", "reset by ingress", "cut"])
    heard = bytearray()
    failure: list[Exception] = []

    async def carry() -> None:
        try:
            await splice(flow, stream, poller)
        except (StreamTruncated, trio.BrokenResourceError) as error:
            failure.append(error)

    async def app_writes() -> None:
        with contextlib.suppress(ConnectionResetError):
            await flow.app_send(question)
            await flow.app_send_eof()

    async def app_reads() -> None:
        with contextlib.suppress(ConnectionResetError):
            while await flow.app_read():
                if rng.random() < 0.2:
                    await trio.sleep(0.0005)
                if ending == "reset by app" and len(flow.app_received) >= len(answer) // 2:
                    flow.app_reset()
        if ending == "reset by app" and not flow.failure:
            flow.app_reset()

    async def ingress_writes() -> None:
        view = memoryview(answer if ending in ("both", "reset by app") else answer[: len(answer) // 2])
        try:
            while view:
                view = view[ingress.send_nowait([view[: rng.randint(1, 50_000)]]) :]
                await ingress.wait_sendable()
            await ingress.drain()
            if ending in ("both", "reset by app"):
                await ingress.send_eof()
            elif ending == "cut":
                ingress.transport.shutdown_write()
            else:
                ingress.abort()
        except (StreamTruncated, trio.ClosedResourceError, OSError):
            assert ending == "reset by app"

    async def ingress_reads() -> None:
        with contextlib.suppress(StreamTruncated, trio.ClosedResourceError):
            while view := await ingress.receive_view():
                heard.extend(view)

    async with trio.open_nursery() as nursery:
        for each in (carry, app_writes, app_reads, ingress_writes, ingress_reads):
            nursery.start_soon(each)
    ingress.abort()

    assert question.startswith(heard)
    assert answer.startswith(flow.app_received)
    if ending == "both":
        assert failure == []
        assert len(heard) == len(question)
        assert len(flow.app_received) == len(answer)
    elif ending != "reset by app":  # it may come when all is over
        assert isinstance(failure[0], StreamTruncated)
        assert "to app" not in flow.eof_order
