"""The pair in memory behaves as two TCP sockets do, so that what is proved over it holds on the wire."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from ngrokd.relay.transport import SocketTransport, Transport, connect_tcp, memory_transport_pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Pair = tuple[Transport, Transport]

BROKEN = r"Broken pipe|Connection reset by peer"


def socket_transport_pair() -> Pair:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        two, _ = listener.accept()
    return SocketTransport(one), SocketTransport(two)


@pytest.fixture(params=[socket_transport_pair, memory_transport_pair], ids=["socket", "memory"])
def make_pair(request: pytest.FixtureRequest) -> Callable[[], Pair]:
    make: Callable[[], Pair] = request.param
    return make


async def receive(transport: Transport, size: int = 65536) -> bytes:
    buffer = bytearray(size)
    while (count := transport.receive_into_nowait(buffer)) is None:
        await transport.wait_readable()
    return bytes(buffer[:count])


async def send(transport: Transport, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[transport.send_nowait(view) :]
        if view:
            await transport.wait_writable()


async def test_bytes_pass_and_nothing_is_not_an_end(make_pair: Callable[[], Pair]) -> None:
    one, two = make_pair()
    assert two.receive_into_nowait(bytearray(10)) is None

    await send(one, b"hello")

    assert await receive(two, 3) == b"hel"
    assert await receive(two) == b"lo"
    assert two.receive_into_nowait(bytearray(10)) is None
    one.close()
    two.close()


async def test_what_is_in_flight_is_bounded_and_the_sender_is_woken(make_pair: Callable[[], Pair]) -> None:
    one, two = make_pair()
    data = os.urandom(1 << 20)
    sent = 0
    while taken := one.send_nowait(data):
        sent += taken
    received = 0

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.wait_writable)
        while received < sent:
            received += len(await receive(two))

    assert one.send_nowait(b"x") == 1
    one.close()
    two.close()


async def test_an_end_is_seen_behind_the_bytes_and_the_other_direction_goes_on(make_pair: Callable[[], Pair]) -> None:
    one, two = make_pair()
    await send(one, b"question")
    one.shutdown_write()

    assert await receive(two) == b"question"
    assert await receive(two) == b""
    await send(two, b"answer")
    assert await receive(one) == b"answer"
    with pytest.raises(OSError, match="Broken pipe"):
        one.send_nowait(b"more")
    one.close()
    two.close()


async def test_closing_delivers_what_was_taken(make_pair: Callable[[], Pair]) -> None:
    one, two = make_pair()
    await send(one, b"last words")
    one.close()
    one.close()

    assert await receive(two) == b"last words"
    assert await receive(two) == b""
    two.close()


async def test_an_abort_is_a_reset(make_pair: Callable[[], Pair]) -> None:
    one, two = make_pair()
    one.abort()
    one.abort()

    with pytest.raises(ConnectionResetError):
        await receive(two)
    with pytest.raises(OSError, match=BROKEN):
        two.send_nowait(b"x")
    two.close()


async def test_closing_with_unread_bytes_is_a_reset(make_pair: Callable[[], Pair]) -> None:
    """As Linux does it (RFC 2525 2.17): the other side must not believe that they were read."""
    one, two = make_pair()
    await send(one, b"unread")
    await two.wait_readable()
    two.close()

    with pytest.raises(ConnectionResetError):
        await receive(one)
    one.close()


async def test_writing_to_who_has_closed_fails(make_pair: Callable[[], Pair]) -> None:
    one, two = make_pair()
    two.close()

    with pytest.raises(OSError, match=BROKEN):
        await send(one, bytes(1 << 24))
    one.close()


async def test_closing_wakes_who_waits(make_pair: Callable[[], Pair]) -> None:
    one, two = make_pair()
    while one.send_nowait(bytes(65536)):
        pass

    async def waits(wait: Callable[[], Awaitable[None]]) -> None:
        with pytest.raises(trio.ClosedResourceError):
            await wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(waits, one.wait_readable)
        nursery.start_soon(waits, one.wait_writable)
        await trio.testing.wait_all_tasks_blocked()
        one.close()

    for operation in (one.wait_readable, one.wait_writable):
        with pytest.raises(trio.ClosedResourceError):
            await operation()
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.send_nowait(b"x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.receive_into_nowait(bytearray(1))
    with pytest.raises(OSError, match="Bad file descriptor"):
        one.shutdown_write()
    two.close()


async def test_connecting_takes_numeric_addresses_only() -> None:
    """Looking names up is somebody else's business, and would block."""
    with pytest.raises(OSError, match=r"(?i)name|address"):
        await connect_tcp("no-such-name", 80)


async def test_a_refused_connection_says_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

    with pytest.raises(ConnectionRefusedError, match="refused"):
        await connect_tcp("127.0.0.1", port)


async def test_a_cancelled_connect_leaves_no_socket() -> None:
    """A listener with a full backlog never answers a SYN."""
    before = len(os.listdir("/dev/fd"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):
            with trio.move_on_after(0.05) as scope:
                await connect_tcp(*listener.getsockname())
            assert scope.cancelled_caught

    assert len(os.listdir("/dev/fd")) == before


async def test_a_connected_socket_is_tuned() -> None:
    """No Nagle, keepalive as Go's clients have it, and a kernel buffer that does not hide congestion."""
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        transport = await connect_tcp("::1", listener.getsockname()[1])

    assert isinstance(transport, SocketTransport)
    with socket.socket(fileno=os.dup(transport.fileno())) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 128 * 1024
    transport.close()
