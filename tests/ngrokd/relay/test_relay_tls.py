"""The TLS stream: bytes exact, ends exact, and nothing waits that must not."""

from __future__ import annotations

import gc
import random
import ssl
import threading
from typing import TYPE_CHECKING, TypeAlias

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.errors import StreamTruncated
from ngrokd.relay.tls import BACKLOG_LIMIT, CHUNK, TlsAlert, TlsSession, TlsStream, TlsTrioStream, _pieces
from ngrokd.relay.transport import SocketTransport, Transport, memory_transport_pair

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable

    from tests.ngrokd.relay.conftest import Authority

    MakePair: TypeAlias = Callable[..., Awaitable[tuple[TlsStream, TlsStream]]]

HOST = "ingress.example"
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3

versions = pytest.mark.parametrize("version", [V12, V13], ids=["1.2", "1.3"])


class Cutting:
    """A transport that hands over what it receives in pieces of random size."""

    def __init__(self, inner: Transport, rng: random.Random, largest: int) -> None:
        self._inner = inner
        self._rng = rng
        self._largest = largest
        self.send_nowait = inner.send_nowait
        self.send_pieces_nowait = inner.send_pieces_nowait
        self.watch = inner.watch
        self.wait_readable = inner.wait_readable
        self.wait_writable = inner.wait_writable
        self.shutdown_write = inner.shutdown_write
        self.close = inner.close
        self.abort = inner.abort

    def receive_into_nowait(self, buffer: bytearray | memoryview) -> int | None:
        return self._inner.receive_into_nowait(memoryview(buffer)[: self._rng.randint(1, self._largest)])


class Line(Cutting):
    """A transport whose line can be cut after so many more received bytes."""

    def __init__(self, inner: Transport) -> None:
        super().__init__(inner, random.Random(0), 1 << 20)
        self._left: int | None = None
        self._reset = False

    def cut_after(self, count: int, *, reset: bool) -> None:
        self._left = count
        self._reset = reset

    def receive_into_nowait(self, buffer: bytearray | memoryview) -> int | None:
        if self._left is None:
            return self._inner.receive_into_nowait(buffer)
        if not self._left:
            if self._reset:
                raise ConnectionResetError(104, "Connection reset by peer")
            return 0
        count = self._inner.receive_into_nowait(memoryview(buffer)[: self._left])
        self._left -= count or 0
        return count


@pytest.fixture
def make_pair(authority: Authority) -> MakePair:
    """Make two connected TLS streams, client first, after their handshake."""

    async def make(
        version: ssl.TLSVersion | None = None,
        capacity: int = 64 * 1024,
        wrap: Callable[[Transport], Transport] = lambda transport: transport,
    ) -> tuple[TlsStream, TlsStream]:
        one, two = memory_transport_pair(capacity)
        scratch = memoryview(bytearray(CHUNK))
        client = TlsStream(wrap(one), TlsSession(authority.client_context(), server_hostname=HOST), scratch=scratch)
        server = TlsStream(wrap(two), TlsSession(authority.server_context(version=version), server_side=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.handshake)
            nursery.start_soon(server.handshake)
        return client, server

    return make


async def send_all(stream: TlsStream, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[stream.send_nowait([view]) :]
        await stream.wait_sendable()
    await stream.drain()


async def receive_all(stream: TlsStream) -> bytes:
    data = bytearray()
    while view := await stream.receive_view():
        data += view
    return bytes(data)


async def test_it_is_a_half_closeable_stream_as_trio_defines_it(make_pair: MakePair) -> None:
    """Trio's own check: conflicts, cancellation, closing, ends, in every combination."""

    async def make() -> tuple[TlsTrioStream, TlsTrioStream]:
        one, two = await make_pair()
        return TlsTrioStream(one), TlsTrioStream(two)

    async def clogged() -> tuple[TlsTrioStream, TlsTrioStream]:
        one, two = await make_pair(capacity=4096)
        for stream in (one, two):
            while stream.send_nowait([bytes(65536)]):
                pass
        return TlsTrioStream(one), TlsTrioStream(two)

    await trio.testing.check_half_closeable_stream(make, clogged)


# -- half-close


@versions
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("client_first", [True, False], ids=["client", "server"])
async def test_each_side_may_end_first_and_go_on_hearing(
    make_pair: MakePair, version: ssl.TLSVersion, seed: int, client_first: bool
) -> None:
    """close_notify ends one direction; everything the other side says afterwards arrives, however it is cut."""
    rng = random.Random(seed)
    client, server = await make_pair(version, rng.choice([3000, 20_000, 100_000]), lambda t: Cutting(t, rng, 40_000))
    first, second = (client, server) if client_first else (server, client)
    before, after = rng.randbytes(rng.randint(0, 200_000)), rng.randbytes(rng.randint(1, 200_000))

    async def speaks_and_listens() -> None:
        await send_all(first, before)
        await first.send_eof()
        assert first.sent_eof
        assert await receive_all(first) == after

    async with trio.open_nursery() as nursery:
        nursery.start_soon(speaks_and_listens)
        assert await receive_all(second) == before
        assert second.received_eof
        await send_all(second, after)
        await second.send_eof()

    assert not await first.receive_view()
    await first.aclose()
    await second.aclose()


@versions
async def test_both_sides_may_end_at_once(make_pair: MakePair, version: ssl.TLSVersion) -> None:
    client, server = await make_pair(version)
    client.send_nowait([b"from client"])
    server.send_nowait([b"from server"])
    client.send_eof_nowait()
    server.send_eof_nowait()

    assert await receive_all(client) == b"from server"
    assert await receive_all(server) == b"from client"
    assert client.send_nowait([b"more"]) == 0
    with pytest.raises(trio.ClosedResourceError):
        await client.wait_sendable()


@versions
async def test_ending_does_not_lose_what_waits_to_be_read(make_pair: MakePair, version: ssl.TLSVersion) -> None:
    """OpenSSL, asked to shut down with application data in its buffer, throws the data away. It must never have any."""
    client, server = await make_pair(version, 1 << 20)
    said = random.Random(1).randbytes(300_000)
    await send_all(server, said[:150_000])
    first = await client.receive_view()
    client.send_eof_nowait()
    await send_all(server, said[150_000:])
    await server.send_eof()

    assert bytes(first) + await receive_all(client) == said
    assert await receive_all(server) == b""


async def test_what_comes_with_the_end_of_the_handshake_survives_our_end(authority: Authority) -> None:
    """A server's first record may ride with its last handshake message, and we may end before reading it."""
    one, two = memory_transport_pair()
    client = TlsSession(authority.client_context(), server_hostname=HOST)
    server = TlsStream(two, TlsSession(authority.server_context(version=V12), server_side=True))
    stream = TlsStream(one, client)

    async def serve() -> None:
        await server.handshake()
        server.send_nowait([b"220 ready"])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        while not client.handshake_step():
            if data := client.take():
                one.send_nowait(data)
            await trio.testing.wait_all_tasks_blocked()
            buffer = memoryview(bytearray(CHUNK))
            if count := one.receive_into_nowait(buffer):
                client.feed(buffer[:count])
    assert client.pending_in
    stream.send_eof_nowait()

    assert bytes(await stream.receive_view()) == b"220 ready"
    assert await receive_all(server) == b""


@versions
@pytest.mark.parametrize("seed", range(4))
async def test_records_are_decrypted_wherever_they_are_cut(
    make_pair: MakePair, version: ssl.TLSVersion, seed: int
) -> None:
    """Long transfers are fed to OpenSSL between records; how they arrive, and other sizes, change no byte."""
    rng = random.Random(seed)
    client, server = await make_pair(version, 1 << 24, lambda inner: Cutting(inner, rng, 60_000))
    sizes = [rng.choice([1, 700, 5000, 16_384, 40_000, 300_000]) for _ in range(40)]
    said = rng.randbytes(sum(sizes))
    received = bytearray()

    at = 0
    for size in sizes:
        server.send_nowait([memoryview(said)[at : at + size]])
        await server.drain()
        at += size
        if rng.random() < 0.3:
            while len(received) < at:
                received += await client.receive_view()
    while len(received) < len(said):
        received += await client.receive_view()

    assert bytes(received) == said


# -- truncation


@versions
@pytest.mark.parametrize("reset", [False, True], ids=["eof", "reset"])
@pytest.mark.parametrize("seed", range(20))
async def test_a_cut_is_never_an_end(make_pair: MakePair, version: ssl.TLSVersion, reset: bool, seed: int) -> None:
    """Cut anywhere before close_notify, what was delivered is a prefix, and the reader is told, again and again."""
    rng = random.Random(seed)
    said = rng.randbytes(100_000)
    lines: list[Line] = []

    def through_a_line(transport: Transport) -> Transport:
        lines.append(Line(transport))
        return lines[-1]

    client, server = await make_pair(version, 1 << 20, through_a_line)
    server.send_nowait([said])
    lines[0].cut_after(rng.randint(0, 100_000), reset=reset)
    server.send_eof_nowait()

    received = bytearray()
    failure = None
    while failure is None:
        try:
            view = await client.receive_view()
        except StreamTruncated as error:
            failure = error
        else:
            assert view, "a cut stream ended"
            received += view

    assert said.startswith(received)
    with pytest.raises(StreamTruncated, match="reset" if reset else "closed by the other side"):
        await client.receive_view()


async def test_a_reset_is_a_cut(make_pair: MakePair) -> None:
    client, server = await make_pair()
    server.abort()

    with pytest.raises(StreamTruncated, match="Connection reset by peer"):
        await client.receive_view()
    assert client.send_nowait([b"x"]) == 0
    with pytest.raises(StreamTruncated, match="Connection reset by peer"):
        await client.wait_sendable()


async def test_damaged_bytes_are_a_cut_behind_what_was_good(make_pair: MakePair) -> None:
    """A record that does not verify ends the stream; what came before it in the same wake is delivered."""
    client, server = await make_pair()
    server.send_nowait([b"good"])
    server.transport.send_nowait(b"\x17\x03\x03\x00\x20" + bytes(32))

    assert bytes(await client.receive_view()) == b"good"
    for _ in range(2):
        with pytest.raises(StreamTruncated, match=r"decryption failed|bad record mac"):
            await client.receive_view()


# -- alerts


async def test_a_rejected_client_certificate_is_said_at_the_first_read(authority: Authority) -> None:
    """With TLS 1.3 the client's handshake is over before the server looks at the client's certificate."""
    one, two = memory_transport_pair()
    client = TlsStream(one, TlsSession(authority.client_context(), server_hostname=HOST))
    server = TlsStream(two, TlsSession(authority.server_context(client_required=True), server_side=True))

    async def serve() -> None:
        with pytest.raises(ssl.SSLError, match="PEER_DID_NOT_RETURN_A_CERTIFICATE"):
            await server.handshake()
        two.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        await client.handshake()

    with pytest.raises(TlsAlert, match="certificate required") as caught:
        await client.receive_view()
    assert caught.value.alert == "certificate_required"


async def test_a_server_that_is_not_trusted_raises_in_the_handshake(authority: Authority) -> None:
    one, two = memory_transport_pair()
    client = TlsStream(one, TlsSession(authority.client_context(anchors=[]), server_hostname=HOST))
    server = TlsStream(two, TlsSession(authority.server_context(), server_side=True))

    async def serve() -> None:
        with pytest.raises(ssl.SSLError, match="UNKNOWN_CA"):
            await server.handshake()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        with pytest.raises(ssl.SSLCertVerificationError):
            await client.handshake()


async def test_a_handshake_that_is_cut_says_so(authority: Authority) -> None:
    one, two = memory_transport_pair()
    client = TlsStream(one, TlsSession(authority.client_context(), server_hostname=HOST))
    two.shutdown_write()

    with pytest.raises(StreamTruncated, match="during the TLS handshake"):
        await client.handshake()


# -- back-pressure


async def test_the_backlog_is_bounded_and_wakes_its_waiters_at_half(make_pair: MakePair) -> None:
    """Above the bound nothing is taken, so that the app's window closes; room is announced with hysteresis."""
    client, server = await make_pair(capacity=16 * 1024)
    said = random.Random(3).randbytes(2 * BACKLOG_LIMIT)

    taken = client.send_nowait([said])

    assert BACKLOG_LIMIT - CHUNK < taken < BACKLOG_LIMIT + 2 * CHUNK
    assert BACKLOG_LIMIT <= client.backlog < BACKLOG_LIMIT + CHUNK
    assert client.send_nowait([said]) == 0

    woken = False

    async def waits() -> None:
        nonlocal woken
        await client.wait_sendable()
        woken = True

    received = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits)
        while not woken:
            assert client.backlog >= BACKLOG_LIMIT // 2 or not received
            received += await server.receive_view()
            await trio.testing.wait_all_tasks_blocked()
        assert client.backlog < BACKLOG_LIMIT // 2
        nursery.start_soon(client.drain)
        while len(received) < taken:
            received += await server.receive_view()

    assert received == said[:taken]
    assert client.backlog == 0


async def test_any_number_of_tasks_may_wait_for_the_backlog(make_pair: MakePair) -> None:
    """Who waits may be cancelled without the others noticing: one of them sends, and another takes over."""
    client, server = await make_pair(capacity=3000)
    said = bytes(100_000)
    assert client.send_nowait([said]) == len(said)
    scope = trio.CancelScope()

    async def first() -> None:
        with scope:
            await client.drain()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        for limit in (50_000, 0):
            nursery.start_soon(client.drain, limit)
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        received = 0
        while received < len(said):
            received += len(await server.receive_view())


async def test_who_waits_is_told_of_the_break(make_pair: MakePair) -> None:
    client, server = await make_pair(capacity=3000)
    client.send_nowait([bytes(100_000)])

    async def waits() -> None:
        with pytest.raises(StreamTruncated):
            await client.drain()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits)
        nursery.start_soon(waits)
        await trio.testing.wait_all_tasks_blocked()
        server.abort()
    assert client.backlog == 0


@given(st.lists(st.integers(0, 200_000), max_size=12))
def test_views_become_pieces_of_the_same_bytes(sizes: list[int]) -> None:
    """Small ones joined, large ones cut, none empty, nothing reordered."""
    rng = random.Random(0)
    views = [memoryview(rng.randbytes(size)) for size in sizes]

    pieces = list(_pieces(views))

    assert b"".join(pieces) == b"".join(views)
    assert all(0 < len(piece) <= 32 * 1024 for piece in pieces)
    assert len(pieces) <= 2 * (sum(sizes) // (16 * 1024)) + 1


# -- memory


async def test_a_received_view_never_changes(make_pair: MakePair) -> None:
    """The flow keeps references until the app has acknowledged; nothing may be decrypted into them again."""
    client, server = await make_pair(capacity=200_000)
    rng = random.Random(5)
    held: list[tuple[memoryview, bytes]] = []
    for size in (1, 100, 8000, 8192, 20_000, 65_000, 150_000, 3):
        said = rng.randbytes(size)
        await send_all(server, said)
        got = 0
        while got < size:
            view = await client.receive_view()
            held.append((view, bytes(view)))
            got += len(view)

    assert all(view == copy for view, copy in held)


async def test_all_records_of_a_wake_come_as_one_view(make_pair: MakePair) -> None:
    """One wake, one write to the app: small records are gathered."""
    client, server = await make_pair()
    for _ in range(50):
        server.send_nowait([b"x" * 100])

    assert bytes(await client.receive_view()) == b"x" * 5000
    assert client.drained


async def test_bytes_can_be_given_back(make_pair: MakePair) -> None:
    client, server = await make_pair()
    server.send_nowait([b"header and surplus"])
    view = await client.receive_view()
    client.unread(view[11:])
    client.unread(memoryview(b""))

    assert not client.drained
    assert bytes(await client.receive_view()) == b"surplus"
    assert client.bytes_received == 18
    assert server.bytes_sent == 18


async def test_an_unused_stream_is_freed_without_the_collector(make_pair: MakePair) -> None:
    """Twenty thousand streams come and go; cycles would let them pile up between two runs of the collector."""
    client, server = await make_pair()
    client.send_nowait([b"x"])
    await server.receive_view()
    gc.collect()
    gc.disable()
    try:
        before = sum(isinstance(each, ssl.SSLObject) for each in gc.get_objects())
        await client.aclose()
        await server.aclose()
        del client, server
        after = sum(isinstance(each, ssl.SSLObject) for each in gc.get_objects())
    finally:
        gc.enable()
    assert after == before - 2


# -- the other side is not ours


@versions
async def test_it_speaks_with_a_plain_ssl_socket(
    authority: Authority, version: ssl.TLSVersion, socket_pair: tuple[socket.socket, socket.socket]
) -> None:
    """Real sockets, and OpenSSL without our code at the other end."""
    ours, theirs = socket_pair
    said = random.Random(7).randbytes(3_000_000)
    context = authority.server_context(version=version)
    heard = bytearray()

    def serve() -> None:
        with context.wrap_socket(theirs, server_side=True, suppress_ragged_eofs=False) as tls:
            while len(heard) < len(said):
                heard.extend(tls.recv(100_000))
            tls.sendall(heard)
            assert tls.recv(1) == b""
            tls.unwrap().close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        stream = TlsStream(SocketTransport(ours), TlsSession(authority.client_context(), server_hostname=HOST))
        await stream.handshake()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, stream, said)
            received = bytearray()
            while len(received) < len(said):
                received += await stream.receive_view()
        await stream.send_eof()
        assert not await stream.receive_view()
        await stream.aclose()
    finally:
        ours.close()
        thread.join()

    assert heard == received == said


async def test_closing_is_graceful_and_aborting_is_not(make_pair: MakePair) -> None:
    client, server = await make_pair()
    client.send_nowait([b"bye"])
    await client.aclose()
    await client.aclose()

    assert await receive_all(server) == b"bye"
    with pytest.raises(trio.ClosedResourceError):
        await client.receive_view()
    with pytest.raises(trio.ClosedResourceError):
        client.receive_nowait()
    assert client.send_nowait([b"x"]) == 0
    client.send_eof_nowait()
    client.abort()


async def test_a_cancelled_close_cuts(make_pair: MakePair) -> None:
    """The other side must not take half of the bytes for all of them."""
    client, server = await make_pair(capacity=3000)
    client.send_nowait([bytes(100_000)])
    with trio.move_on_after(0):
        await client.aclose()

    with pytest.raises(StreamTruncated):
        await receive_all(server)
