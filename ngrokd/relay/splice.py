"""Two directions between an app's flow and a TLS stream, carried until both have ended, and ended exactly.

Nothing here waits while bytes pass. What the app sends goes into the TLS stream within the packet batch in which it
arrives: the stream's `send_nowait` is the sink of the flow. What the ingress sends goes into the flow when the poller
finds it: the flow's `send_nowait` is the sink of the stream. A side that cannot take more closes the TCP window of
the other. Whatever else happens (an end, room after there was none, a break) calls `_Splice._advance`, which looks at
both sides and does what has become possible. The task of a flow sleeps until all is over.

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

from ngrokd.relay.tls import RECORD, SCRATCH

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ngrokd.errors import StreamTruncated
    from ngrokd.relay.tls import TlsStream
    from ngrokd.relay.transport import Poller

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

    @property
    def refused(self) -> bool:
        """The sink has left bytes; they are offered again by `offer`."""
        ...

    @property
    def ended(self) -> bool:
        """The app's FIN has come, and every byte before it was taken."""
        ...

    @property
    def has_room(self) -> bool:
        """Is `send_nowait` worth calling again?"""
        ...

    def attach(
        self, sink: Callable[[Sequence[memoryview]], int] | None, on_change: Callable[[], object] | None = None
    ) -> None:
        """Have what the app sends handed to `sink`, which takes a prefix and neither waits nor raises.

        `on_change` is called when the sink has refused bytes, when the app has ended, when there is room again after
        `send_nowait` took less than all, and when the flow has broken.
        """
        ...

    def offer(self) -> None:
        """Offer the sink again what it did not take."""
        ...

    def send_nowait(self, data: memoryview, /) -> int:
        """Queue a prefix of `data` to the app; it is referenced, not copied."""
        ...

    @property
    def send_space(self) -> int:
        """How many bytes `send_nowait` would take."""
        ...

    @property
    def rationed(self) -> bool:
        """Is memory short, so that nobody may receive for it what it has no room for?"""
        ...

    def want_room(self) -> None:
        """Have `on_change` called when there is room again."""
        ...

    def send_eof_nowait(self) -> None:
        """Queue FIN behind all bytes."""
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


async def splice(flow: Flow, stream: TlsStream, poller: Poller) -> None:
    """Carry bytes both ways until both directions have ended; afterwards both ends are closed or aborted.

    Raises:
        trio.BrokenResourceError: the app reset the connection or vanished.
        StreamTruncated: the ingress cut the stream, or stopped taking bytes.
    """
    try:
        await _Splice(flow, stream, poller).run()
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
    """The two directions, and what has become of them."""

    __slots__ = ("_advancing", "_again", "_failure", "_flow", "_over", "_poller", "_stream", "_upload_failure")

    def __init__(self, flow: Flow, stream: TlsStream, poller: Poller) -> None:
        self._flow = flow
        self._stream = stream
        self._poller = poller
        self._over = trio.Event()
        self._failure: Exception | None = None  # ends both directions; the first one counts
        self._upload_failure: StreamTruncated | None = None  # nothing more can be sent, but an answer may still come
        self._advancing = False
        self._again = False

    async def run(self) -> None:
        """Return when both directions have ended; the bytes to the app may still be on their way."""
        flow, stream = self._flow, self._stream
        try:
            flow.attach(self._from_app, self._advance)
            stream.attach(self._poller, self._to_app, self._room, self._advance, self._end)
            self._advance()
            await self._over.wait()
        finally:
            stream.detach()
            flow.attach(None)
        if self._failure is not None:
            raise self._failure
        if self._upload_failure is not None:
            with trio.move_on_after(ANSWER_DELIVERY_S):
                await flow.wait_delivered()
            raise self._upload_failure

    # These are called in the midst of other flows' work: what a defect of ours raises ends this flow alone.

    def _from_app(self, views: Sequence[memoryview]) -> int:
        try:
            return self._stream.send_nowait(views)
        except Exception as error:  # noqa: BLE001 - carried to the task of the flow
            self._end(error)
            return 0

    def _to_app(self, view: memoryview) -> int:
        try:
            return self._flow.send_nowait(view)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return 0  # the flow tells, and says why

    def _advance(self) -> None:
        """Do what has become possible. Each thing done may make another one possible, and calls this again."""
        self._again = True
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._again and not self._over.is_set():
                self._again = False
                self._step()
        except Exception as error:  # noqa: BLE001 - carried to the task of the flow
            self._end(error)
        finally:
            self._advancing = False

    def _step(self) -> None:
        flow, stream = self._flow, self._stream
        if flow.failure:
            self._end(trio.BrokenResourceError(f"the flow is over: {flow.failure}"))
            return
        if self._upload_failure is None:
            self._upload_failure = stream.broken
            if flow.refused and stream.sendable:
                flow.offer()
            if flow.ended:
                stream.send_eof_nowait()
        if stream.refused and flow.has_room:
            stream.offer()
        if stream.refused:
            return
        cut = stream.cut
        if cut is not None:
            self._end(cut)
        elif stream.ended:
            flow.send_eof_nowait()
            if self._upload_failure is not None or (stream.sent_eof and not stream.backlog):
                self._end(None)

    def _end(self, failure: Exception | None) -> None:
        if not self._over.is_set():
            self._failure = failure
            self._over.set()
            self._poller.yield_soon()

    def _room(self) -> int:
        """How much may be received. What an app does not read stands here, and no account of memory has it."""
        flow = self._flow
        if not flow.rationed:
            return SCRATCH
        if flow.has_room:
            return max(flow.send_space, RECORD)
        flow.want_room()
        return 0


__all__ = ["Flow", "splice"]
