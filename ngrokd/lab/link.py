"""A slow line: latency and bandwidth between a client and a server, in each direction, without touching the kernel.

`shape` puts a pair of pumps between a transport and whoever serves it. Bytes are held for the latency and let go at
the bandwidth's pace, in order; an end of one direction travels with the bytes before it, a reset travels at once and
destroys what is on the line, as on a real one. Only the connection's own bytes are slowed: the TCP handshake of a
socket is over before the line begins.

All times are Trio's, so a simulated clock jumps over them.
"""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from ngrokd.relay.transport import Transport, memory_transport_pair

_CHUNK: Final = 64 * 1024
_PACKET: Final = 1500  # a slow line lets bytes go in pieces of this size,
_TICK_S: Final = 0.01  # a faster one in pieces of this length
_ON_THE_LINE: Final = 8 * 1024 * 1024  # bytes held at once in each direction


@dataclass(frozen=True, slots=True)
class Line:
    """How slow. Zeros are as fast as it goes.

    Attributes:
        latency_up_s: from client to server, seconds.
        latency_down_s: from server to client, seconds.
        bandwidth_up: bytes a second from client to server.
        bandwidth_down: bytes a second from server to client.
    """

    latency_up_s: float = 0.0
    latency_down_s: float = 0.0
    bandwidth_up: float = 0.0
    bandwidth_down: float = 0.0


FAST: Final = Line()


def shape(client: Transport, line: Line, nursery: trio.Nursery) -> Transport:
    """Return what the server shall serve instead of `client`; the pumps run in `nursery` until both directions end."""
    server, inner = memory_transport_pair(256 * 1024)

    async def run() -> None:
        # One direction's break is the other's, so both end with it.
        try:
            async with trio.open_nursery() as pumps:
                pumps.start_soon(_Pump(client, inner, line.latency_up_s, line.bandwidth_up).run)
                pumps.start_soon(_Pump(inner, client, line.latency_down_s, line.bandwidth_down).run)
            client.close()
            inner.close()
        except* OSError:
            pass
        finally:
            client.abort()
            inner.abort()

    nursery.start_soon(run)
    return server


class _Pump:
    """One direction. Invariant: bytes leave in order, none earlier than `latency` after it came."""

    def __init__(self, source: Transport, target: Transport, latency_s: float, bandwidth: float) -> None:
        self._source = source
        self._target: Transport | _Nowhere = target
        self._latency_s = latency_s
        self._bandwidth = bandwidth
        self._line: deque[tuple[float, bytes]] = deque()  # due, bytes; b"" is the end
        self._held = 0
        self._changed = trio.Event()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._fill)
            nursery.start_soon(self._drain)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def _fill(self) -> None:
        buffer = bytearray(_CHUNK)
        ended = False
        while not ended:
            while self._held >= _ON_THE_LINE:
                await self._changed.wait()
            await self._source.wait_readable()
            count = self._source.receive_into_nowait(buffer)
            if count is None:
                continue
            ended = count == 0
            self._line.append((trio.current_time() + self._latency_s, bytes(buffer[:count])))
            self._held += count
            self._notify()

    async def _drain(self) -> None:
        while True:
            while not self._line:
                await self._changed.wait()
            due, data = self._line.popleft()
            await trio.sleep_until(due)
            if not data:
                with suppress(OSError):
                    self._target.shutdown_write()
                return
            self._held -= len(data)
            self._notify()
            view = memoryview(data)
            size = max(_PACKET, int(self._bandwidth * _TICK_S)) if self._bandwidth else len(view)
            for start in range(0, len(view), size):
                piece = view[start : start + size]
                if self._bandwidth:
                    await trio.sleep(len(piece) / self._bandwidth)
                try:
                    await self._deliver(piece)
                except BrokenPipeError:
                    # Closed in good order: nobody reads what still comes, but the other direction has its way to go.
                    self._target = _NOWHERE

    async def _deliver(self, view: memoryview) -> None:
        while view:
            view = view[self._target.send_nowait(view) :]
            if view:
                await self._target.wait_writable()


class _Nowhere:
    """Takes everything."""

    def send_nowait(self, data: bytes | bytearray | memoryview) -> int:
        return len(data)

    def shutdown_write(self) -> None:
        pass

    async def wait_writable(self) -> None:
        await trio.lowlevel.checkpoint()


_NOWHERE: Final = _Nowhere()
