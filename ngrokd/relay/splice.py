"""Two directions between an app's flow and a TLS stream, carried until both have ended, and ended exactly.

What the app sends goes into the TLS stream within the packet batch in which it arrives: the stream's `send_nowait` is
the sink of the flow. The task of that direction only sleeps; it wakes when the sink has refused bytes, waits until the
stream can take more, and offers them again. A third task exists only while the transport has not taken all ciphertext.
What the ingress sends is carried by a task: receive all there is, write it to the flow without copying, wait for room.

How things end:

    the app's FIN, every byte before it taken       close_notify to the ingress; the other direction goes on
    close_notify of the ingress                     FIN to the app; the other direction goes on
    both                                            wait until the app has acknowledged everything, then close
    the app resets or vanishes                      TCP reset to the ingress, no close_notify
    the ingress resets, or ends without close_notify    reset to the app, never FIN: bytes are missing
    the ingress takes no more, but may have answered    deliver what it said, then reset the app: some servers refuse an
                                                    upload by answering and hanging up, and the answer says why
    cancelled                                       reset both
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, Protocol

import trio

from ngrokd.errors import StreamTruncated
from ngrokd.relay.tls import RECORD, SCRATCH

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from ngrokd.relay.tls import TlsStream

# How long an app that must be reset may take to acknowledge the answer it was sent before. It may be blocked in a write
# of what we can no longer take, and never read.
ANSWER_DELIVERY_S: Final = 5.0


class Flow(Protocol):
    """An app's TCP connection, accepted. `trio.BrokenResourceError` means that the app has reset it or is gone."""

    @property
    def failure(self) -> str:
        """Why the flow is broken, or ""."""
        ...

    @property
    def bytes_from_app(self) -> int:
        """Bytes received in order so far."""
        ...

    @property
    def bytes_to_app(self) -> int:
        """Bytes the app has acknowledged so far."""
        ...

    def on_broken(self, callback: Callable[[], object] | None) -> None:
        """Have `callback` called once when the flow breaks, whoever waits for it or does not."""
        ...

    def attach(self, sink: Callable[[Sequence[memoryview]], int] | None) -> None:
        """Have what the app sends handed to `sink`, which takes a prefix and neither waits nor raises."""
        ...

    def offer(self) -> None:
        """Offer the sink again what it did not take."""
        ...

    async def wait_refused_or_eof(self) -> bool:
        """Wait: False when the sink has refused bytes, True when it has taken all before the app's FIN."""
        ...

    def send_nowait(self, data: memoryview, /) -> int:
        """Queue a prefix of `data` to the app; it is referenced, not copied."""
        ...

    async def wait_send_space(self) -> None:
        """Wait until `send_nowait` takes bytes again."""
        ...

    @property
    def send_space(self) -> int:
        """How many bytes `send_nowait` would take."""
        ...

    @property
    def rationed(self) -> bool:
        """Is memory short, so that nobody may receive for it what it has no room for?"""
        ...

    async def send_eof(self) -> None:
        """Send FIN behind all bytes."""
        ...

    async def wait_delivered(self) -> None:
        """Wait until the app has acknowledged everything, or the flow is over (`failure` tells)."""
        ...

    def abort(self) -> None:
        """Reset the connection."""
        ...

    async def aclose(self) -> None:
        """Let go of the connection; what was queued is still delivered."""
        ...


async def splice(flow: Flow, stream: TlsStream) -> None:
    """Carry bytes both ways until both directions have ended; afterwards both ends are closed or aborted.

    Raises:
        trio.BrokenResourceError: the app reset the connection or vanished.
        StreamTruncated: the ingress cut the stream, or stopped taking bytes.
    """
    try:
        await _Splice(flow, stream).run()
        await flow.wait_delivered()
        if flow.failure:
            raise trio.BrokenResourceError(f"the flow broke at its end: {flow.failure}")
        await flow.aclose()
        await stream.aclose()
    except BaseException:
        flow.abort()
        stream.abort()
        raise


class _Splice:
    """The two directions. The first failure that ends both is kept and raised outside of the nursery."""

    def __init__(self, flow: Flow, stream: TlsStream) -> None:
        self._flow = flow
        self._stream = stream
        self._failure: Exception | None = None
        self._upload_failure: StreamTruncated | None = None
        self._upload = trio.CancelScope()

    async def run(self) -> None:
        flow, stream = self._flow, self._stream
        try:
            # What the two directions raise is expected and ends up in self._failure; anything else is a bug, and the
            # nursery ends both for it.
            async with trio.open_nursery() as nursery:
                stream.on_blocked = lambda: nursery.start_soon(self._guard, self._drain, nursery.cancel_scope)
                # Both directions may be waiting for the ingress when the app resets; then nobody would hear of it.
                flow.on_broken(lambda: self._app_broke(nursery.cancel_scope))
                flow.attach(stream.send_nowait)
                nursery.start_soon(self._guard, self._app_to_ingress, nursery.cancel_scope)
                await self._guard(self._ingress_to_app, nursery.cancel_scope)
        finally:
            stream.on_blocked = None
            flow.on_broken(None)
        if self._failure is not None:
            raise self._failure
        if self._upload_failure is not None:
            with trio.move_on_after(ANSWER_DELIVERY_S):
                await flow.wait_delivered()
            raise self._upload_failure

    async def _guard(self, direction: Callable[[], Awaitable[None]], scope: trio.CancelScope) -> None:
        try:
            await direction()
        except (StreamTruncated, trio.BrokenResourceError) as error:
            if self._failure is None:
                self._failure = error
            scope.cancel()

    def _app_broke(self, scope: trio.CancelScope) -> None:
        if self._failure is None:
            self._failure = trio.BrokenResourceError(f"the flow is over: {self._flow.failure}")
        scope.cancel()

    async def _app_to_ingress(self) -> None:
        flow, stream = self._flow, self._stream
        try:
            with self._upload:
                while not await flow.wait_refused_or_eof():
                    await stream.wait_sendable()
                    flow.offer()
                await stream.send_eof()
        except StreamTruncated as error:
            self._stop_upload(error)
        finally:
            flow.attach(None)  # before the nursery can close, because a sink that is blocked starts a task in it

    async def _drain(self) -> None:
        try:
            await self._stream.drain()
        except StreamTruncated as error:
            self._stop_upload(error)

    def _stop_upload(self, error: StreamTruncated) -> None:
        """Nothing more can be sent, but what the ingress said before it hung up may still be there to be read."""
        if self._upload_failure is None:
            self._upload_failure = error
        self._upload.cancel()

    async def _ingress_to_app(self) -> None:
        flow, stream = self._flow, self._stream
        while True:
            if flow.rationed:
                await flow.wait_send_space()
            view = await stream.receive_view(self._room)
            if not view:
                break
            while (taken := flow.send_nowait(view)) < len(view):
                view = view[taken:]
                await flow.wait_send_space()
            del view  # or a connection that goes quiet would keep its last buffer
        await flow.send_eof()

    def _room(self) -> int:
        """How much may be received. What an app does not read stands here, and no account of memory has it."""
        return max(self._flow.send_space, RECORD) if self._flow.rationed else SCRATCH


__all__ = ["Flow", "splice"]
