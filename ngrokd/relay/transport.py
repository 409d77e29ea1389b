"""Byte transports under TLS: a socket, or two ends in memory that behave like one.

A transport never waits inside an operation. Sending and receiving take what is possible now and say how much that was;
waiting is separate, so that the packet path can write to the ingress inside its batch without a task switch.

The pair in memory follows the kernel's rules where they decide what a program sees: bounded buffers, bytes still
readable after the other side has finished, none after it has aborted, a reset for the peer of an end that is closed
with unread bytes.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

# Unsent bytes the kernel may hide from us (of up to 4 MiB of send buffer). Less and a 10 Gbit/s path runs dry between
# two wakes of this process; more and back-pressure reaches the app late.
NOT_SENT_LOW_WATER: Final = 128 * 1024
# Go's net package, and so every other client of the ingress: probe after 15 s of silence, every 15 s, 9 times.
KEEPALIVE_IDLE_S: Final = 15
KEEPALIVE_INTERVAL_S: Final = 15
KEEPALIVE_COUNT: Final = 9


class Poller(Protocol):
    """Calls back for descriptors that are ready.

    Attributes:
        elsewhere: how many tasks wait for a connection that an app waits for, and need Trio to look often.
    """

    elsewhere: int

    def watch(
        self, fd: int, readable: Callable[[], object] | None, writable: Callable[[], object] | None = None
    ) -> None:
        """Have these called, again and again, while `fd` can be read or written; both None ends it."""
        ...

    def yield_soon(self) -> None:
        """A task has been woken: let it run before calling back for more."""
        ...


@runtime_checkable
class Transport(Protocol):
    """One byte stream each way, without waiting. One task at a time waits in each direction."""

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """Send a prefix of `data`.

        Returns: the bytes taken; 0 when none can be taken now.
        Raises: OSError when the connection is broken or closed.
        """
        ...

    def send_pieces_nowait(self, pieces: Sequence[bytes | memoryview]) -> int:
        """Send a prefix of `pieces`, one behind the other, at one go. Otherwise as `send_nowait`."""
        ...

    def receive_into_nowait(self, buffer: bytearray | memoryview) -> int | None:
        """Receive into `buffer`.

        Returns: the bytes received, 0 at the end of the stream, None when nothing is there now.
        Raises: OSError when the connection is broken or closed.
        """
        ...

    async def wait_readable(self) -> None:
        """Return when receiving would not give None. Raises trio.ClosedResourceError when closed meanwhile."""
        ...

    async def wait_writable(self) -> None:
        """Return when sending would not give 0. Raises trio.ClosedResourceError when closed meanwhile."""
        ...

    def watch(
        self, poller: Poller, readable: Callable[[], object] | None, writable: Callable[[], object] | None
    ) -> None:
        """Have `readable` called while receiving would not give None, `writable` while sending would not give 0.

        They must neither wait nor raise. Called again, it replaces what was asked before; closing ends it. While it
        is asked for, nobody else may receive, or send.
        """
        ...

    def shutdown_write(self) -> None:
        """End our direction (TCP FIN); the other goes on. Raises OSError when the connection is broken or closed."""
        ...

    def close(self) -> None:
        """Let go of the connection; what was taken is still delivered. Any number of times."""
        ...

    def abort(self) -> None:
        """Cut the connection: the peer sees a reset (TCP RST), what was not delivered is lost. Any number of times."""
        ...


class SocketTransport:
    """A connected stream socket, which it owns from now on."""

    __slots__ = ("_closed", "_poller", "_socket")

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _tune(sock)
        self._socket = sock
        self._poller: Poller | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"<SocketTransport {'closed' if self._closed else self._socket.fileno()}>"

    def fileno(self) -> int:
        """Return the descriptor, -1 when closed."""
        return self._socket.fileno()

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        """See Transport."""
        try:
            return self._socket.send(data)
        except (BlockingIOError, InterruptedError):
            return 0

    def send_pieces_nowait(self, pieces: Sequence[bytes | memoryview]) -> int:
        """See Transport."""
        try:
            return self._socket.sendmsg(pieces)
        except (BlockingIOError, InterruptedError):
            return 0

    def receive_into_nowait(self, buffer: bytearray | memoryview) -> int | None:
        """See Transport."""
        try:
            return self._socket.recv_into(buffer)
        except (BlockingIOError, InterruptedError):
            return None

    async def wait_readable(self) -> None:
        """See Transport."""
        if self._closed:
            raise trio.ClosedResourceError("this connection was closed")
        await trio.lowlevel.wait_readable(self._socket)

    async def wait_writable(self) -> None:
        """See Transport."""
        if self._closed:
            raise trio.ClosedResourceError("this connection was closed")
        await trio.lowlevel.wait_writable(self._socket)

    def watch(
        self, poller: Poller, readable: Callable[[], object] | None, writable: Callable[[], object] | None
    ) -> None:
        """See Transport."""
        if not self._closed:
            watched = readable is not None or writable is not None
            self._poller = poller if watched else None
            poller.watch(self._socket.fileno(), readable, writable)

    def shutdown_write(self) -> None:
        """See Transport."""
        self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """See Transport."""
        if not self._closed:
            self._closed = True
            if self._poller is not None:
                self._poller.watch(self._socket.fileno(), None)
                self._poller = None
            with contextlib.suppress(RuntimeError):  # outside of Trio nobody can be waiting for it
                trio.lowlevel.notify_closing(self._socket)
            self._socket.close()

    def abort(self) -> None:
        """See Transport."""
        if not self._closed:
            if self._socket.family in (socket.AF_INET, socket.AF_INET6):
                with contextlib.suppress(OSError):  # macOS: EINVAL once the peer has reset; nothing is left to cut
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close()


def _tune(sock: socket.socket) -> None:
    """Set what a relayed stream needs; an option that this system lacks is left alone."""
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))  # macOS names it differently
    for level, option, value in (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_NOTSENT_LOWAT", None), NOT_SENT_LOW_WATER),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, idle, KEEPALIVE_IDLE_S),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPINTVL", None), KEEPALIVE_INTERVAL_S),
        (socket.IPPROTO_TCP, getattr(socket, "TCP_KEEPCNT", None), KEEPALIVE_COUNT),
    ):
        if option is not None:
            try:
                sock.setsockopt(level, option, value)
            except OSError:
                continue


async def connect_tcp(address: str, port: int) -> Transport:
    """Connect to a numeric address; nothing is looked up.

    When cancelled, the socket is closed and no connection is left behind.

    Raises: OSError (refused, unreachable, not a numeric address).
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    if family == socket.AF_INET6:  # may have a scope, which only this parses; it asks nobody
        flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        target = socket.getaddrinfo(address, port, family, socket.SOCK_STREAM, 0, flags)[0][4]
    else:
        socket.inet_pton(family, address)  # connect() would look a name up
        target = (address, port)
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        code = sock.connect_ex(target)
        if code in (errno.EINPROGRESS, errno.EINTR):
            await trio.lowlevel.wait_writable(sock)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise _os_error(code)
    except BaseException:
        sock.close()
        raise
    return SocketTransport(sock)


class _Pipe:
    """One direction in memory: bounded bytes, an end, or a break."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.ended = False  # nothing more will be written
        self.broken: int = 0  # errno for both ends
        self.reader: Callable[[], object] | None = None
        self.writer: Callable[[], object] | None = None
        self._changed: trio.Event | None = None
        self._told = False

    def notify(self) -> None:
        if self._changed is not None:
            self._changed.set()
            self._changed = None
        self.tell()

    def tell(self) -> None:
        """Call back who watches; never from within a call back, nor from within the call that changed something."""
        if not self._told and (self.reader is not None or self.writer is not None):
            self._told = True
            trio.lowlevel.current_trio_token().run_sync_soon(self._tell)

    def _tell(self) -> None:
        self._told = False
        for call in self._due():
            call()
        if self._due():  # level-triggered, as the kernel's lists of what is ready
            self.tell()

    def _due(self) -> list[Callable[[], object]]:
        over = self.ended or self.broken != 0
        due = [self.reader] if self.reader is not None and (self.data or over) else []
        if self.writer is not None and (len(self.data) < self.capacity or over):
            due.append(self.writer)
        return due

    async def wait_change(self) -> None:
        if self._changed is None:
            self._changed = trio.Event()
        await self._changed.wait()


class _MemoryTransport:
    """One end of a pair; see `memory_transport_pair`."""

    __slots__ = ("_closed", "_from_peer", "_to_peer")

    def __init__(self, from_peer: _Pipe, to_peer: _Pipe) -> None:
        self._from_peer = from_peer
        self._to_peer = to_peer
        self._closed = False

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        pipe = self._to_peer
        self._check_open()
        if pipe.broken:
            raise _os_error(pipe.broken)
        if pipe.ended:
            raise _os_error(errno.EPIPE)
        taken = min(len(data), pipe.capacity - len(pipe.data))
        if taken > 0:
            pipe.data += memoryview(data)[:taken]
            pipe.notify()
        return max(taken, 0)

    def send_pieces_nowait(self, pieces: Sequence[bytes | memoryview]) -> int:
        return self.send_nowait(b"".join(pieces))

    def watch(
        self,
        poller: Poller,  # noqa: ARG002 - there is no descriptor to poll
        readable: Callable[[], object] | None,
        writable: Callable[[], object] | None,
    ) -> None:
        if not self._closed:
            self._from_peer.reader, self._to_peer.writer = readable, writable
            self._from_peer.tell()
            self._to_peer.tell()

    def receive_into_nowait(self, buffer: bytearray | memoryview) -> int | None:
        pipe = self._from_peer
        self._check_open()
        if pipe.broken:
            raise _os_error(pipe.broken)
        taken = min(len(buffer), len(pipe.data))
        if taken:
            buffer[:taken] = pipe.data[:taken]
            del pipe.data[:taken]
            pipe.notify()
            return taken
        return 0 if pipe.ended else None

    async def wait_readable(self) -> None:
        pipe = self._from_peer
        await trio.lowlevel.checkpoint()
        while not (self._closed or pipe.broken or pipe.data or pipe.ended):
            await pipe.wait_change()
        if self._closed:
            raise trio.ClosedResourceError("this connection was closed")

    async def wait_writable(self) -> None:
        pipe = self._to_peer
        await trio.lowlevel.checkpoint()
        while not (self._closed or pipe.broken or pipe.ended or len(pipe.data) < pipe.capacity):
            await pipe.wait_change()
        if self._closed:
            raise trio.ClosedResourceError("this connection was closed")

    def shutdown_write(self) -> None:
        self._check_open()
        self._to_peer.ended = True
        self._to_peer.notify()

    def close(self) -> None:
        if self._closed:
            return
        self._stop_watching()
        if self._from_peer.data:  # Linux answers with a reset when a socket is closed with unread bytes
            self._break(errno.ECONNRESET)
        else:
            self._to_peer.ended = True
            self._from_peer.broken = self._from_peer.broken or errno.EPIPE  # the peer has no reader any more
            self._wake()

    def abort(self) -> None:
        if not self._closed:
            self._stop_watching()
            self._break(errno.ECONNRESET)

    def _stop_watching(self) -> None:
        self._closed = True
        self._from_peer.reader = self._to_peer.writer = None

    def _break(self, code: int) -> None:
        for pipe in (self._to_peer, self._from_peer):
            pipe.broken = code
            pipe.data.clear()
        self._wake()

    def _wake(self) -> None:
        self._to_peer.notify()
        self._from_peer.notify()

    def _check_open(self) -> None:
        if self._closed:
            raise _os_error(errno.EBADF)


def _os_error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def memory_transport_pair(capacity: int = 64 * 1024) -> tuple[Transport, Transport]:
    """Make two connected transports in memory, each direction holding at most `capacity` bytes."""
    one, two = _Pipe(capacity), _Pipe(capacity)
    return _MemoryTransport(one, two), _MemoryTransport(two, one)


__all__ = ["Poller", "Transport", "SocketTransport", "connect_tcp", "memory_transport_pair"]
