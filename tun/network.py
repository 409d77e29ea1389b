"""The Trio shell of the stack: packets in from a device, requests and streams out.

Theory of operation
-------------------
`Network.run` sleeps until the device has packets or the stack's next deadline has come, and then does one *batch*:

1. read the device until it is empty (bounded), handing each packet to the stack, which only marks flows;
2. hand every new request to `on_request`;
3. serve each marked flow once: offer what the app sent to the flow's sink, wake the tasks that wait on the flow,
   and let the stack write what the flow owes (one acknowledgement for the whole batch, merged with data).

A Trio wake-up costs as much as several packets of core work, so the rule is: one wake per batch and flow, never one
per packet. A *sink* avoids even that: it is called inside the batch with everything the app has sent so far, takes
what it can and says how much. What it does not take waits in the flow, and the TCP window closes by itself; that is
the whole back-pressure of that direction. The *poller* avoids the wake-up of the pump as well: it calls the batch, and
whatever else its users have it watch, without Trio in between (`tun.poller`).

Nothing is queued between stack and device. When the device is full, the flow is remembered and asked again later;
its machine still knows what it owes.

Rules of this file: no decision about TCP is made here; the pump never waits for a flow; a flow touches the device
only through `Stack.flush`; no callback of a flow's owner may raise into the pump.
"""

from __future__ import annotations

import contextlib
import operator
import socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Final, TypeAlias

import trio

from tun.core.machine import Flow
from tun.core.stack import ReceivedDatagram, Stack
from tun.core.states import STATE_NAMES
from tun.device.base import Device
from tun.errors import DeviceError
from tun.poller import Poller

# Reads per wake. 64 offloaded segments are up to 4 MiB; more would let one busy flow hold up timers and the other
# tasks (gVisor and WireGuard bound their batches at 64 and 128 packets).
BATCH_PACKETS: Final = 64

# What is dropped is cheap, and a flood of it must not overrun the device's queue, which everybody shares, while other
# tasks have their turn: so many packets are read when they have hardly made work.
FLOOD_PACKETS: Final = 512
BATCH_FLOWS: Final = 8

# A blocked sender is woken when this much room is free again, or half of its buffer if that is less: waking it for each
# acknowledged segment would cost a task switch per segment.
SEND_WAKE_BYTES: Final = 64 * 1024

# How long it may go unnoticed that somebody closed a device that was busy.
CLOSED_CHECK_S: Final = 1.0

Address: TypeAlias = tuple[str, int]
Sink: TypeAlias = Callable[[Sequence[memoryview]], int]


def _readable_address(address: tuple[bytes, int]) -> Address:
    family = socket.AF_INET if len(address[0]) == 4 else socket.AF_INET6
    return socket.inet_ntop(family, address[0]), address[1]


class Network:
    """A device and a stack, pumped.

    `on_request` is called inside the batch with each new `FlowRequest`; it must not block or raise. Whoever gets the
    request owes it exactly one decision, `accept` or `refuse`; see `FlowRequest` for what happens otherwise.
    `on_datagram` is called likewise with what came for the services of `Stack.set_udp_served`; `answer` answers it.

    Attributes:
        poller: what calls the batches; others may have it watch what they carry the flows' bytes over. It works while
            `run` does.
    """

    def __init__(
        self,
        device: Device,
        stack: Stack,
        on_request: Callable[[FlowRequest], None],
        on_datagram: Callable[[ReceivedDatagram], None] | None = None,
        *,
        spin: float = 0.0,
    ) -> None:
        self.poller = Poller(spin)
        self._device = device
        self._watched = -1  # the descriptor that the poller looks at for us, while `run` runs
        self.stack = stack
        self._on_request = on_request
        self._on_datagram = on_datagram
        self._now: Callable[[], float] = trio.current_time
        self.time = 0.0  # of the last batch or command
        self._scope: trio.CancelScope | None = None
        self._blocked: dict[Flow, None] = {}
        self._unblock = trio.Event()
        self._gone: DeviceError | None = None
        self.batches = 0
        self.replies_lost = 0

    @property
    def device(self) -> Device:
        """Where packets come from and go to. It may be replaced between any two calls, also while `run` runs.

        Replace a device before it is closed. One with a descriptor and one without take each other's place only
        between two runs.
        """
        return self._device

    @device.setter
    def device(self, device: Device) -> None:
        self._device = device
        if self._watched >= 0:
            descriptor = device.fileno()
            if descriptor >= 0 and descriptor != self._watched:
                self._watch(descriptor)

    def _watch(self, descriptor: int) -> None:
        """Have the poller call the batches for this descriptor and for no other one; -1 for none."""
        watched, self._watched = self._watched, descriptor
        if watched >= 0:
            with contextlib.suppress(OSError):  # closed by somebody, and so forgotten by the kernel
                self.poller.watch(watched, None)
        if descriptor >= 0:
            self.poller.watch(descriptor, self._read_batch)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Pump until cancelled.

        When the device disappears, `DeviceError` rises. The stack and its flows stay as they are: put another device
        into `self.device` and run again, and they go on where they were.
        """
        self._gone = None
        self._now = trio.lowlevel.current_clock().current_time  # what trio.current_time asks, without its two detours
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write_again)
            nursery.start_soon(self.poller.run)
            task_status.started()
            descriptor = self.device.fileno()
            try:
                if descriptor >= 0:
                    self._watch(descriptor)
                    await self._pump(self._until_closed)
                else:
                    await self._pump(self._wait_and_read)
            except DeviceError as error:
                self._gone = error
            finally:
                self._scope = None
                self._watch(-1)
            nursery.cancel_scope.cancel()
        if self._gone is not None:
            raise self._gone

    async def _pump(self, batches: Callable[[], Awaitable[None]]) -> None:
        """Timeouts, until the device is gone; meanwhile `batches`, which never returns."""
        while self._gone is None:
            # One scope serves many batches: it is only as early as the earliest deadline seen, see _rearm.
            with trio.CancelScope(deadline=self.stack.next_deadline()) as scope:
                self._scope = scope
                await batches()
            now = self._now()
            self.stack.handle_timeout(now)
            self._settle(now)

    async def _until_closed(self) -> None:
        """Raise when somebody closes the device: the kernel does not tell who watches a descriptor that it is closed.

        The device tells tasks that wait for it. So one does; packets wake it as well, but only so often, and an idle
        device never.
        """
        while True:
            device = self._device
            try:
                await device.wait_readable()
            except DeviceError:
                if device is self._device:
                    raise
            else:
                await trio.sleep(CLOSED_CHECK_S)

    async def _wait_and_read(self) -> None:
        """For devices without a descriptor."""
        while True:
            await self.device.wait_readable()
            self._read_batch()

    def _read_batch(self) -> None:
        if self._gone is not None:
            return
        device, stack, now = self._device, self.stack, self._now()
        read, verified, handle_packet, prefix = device.read, device.verified, stack.handle_packet, device.prefix
        try:
            for turn in range(FLOOD_PACKETS):
                packet = read()
                if packet is None:
                    break
                handle_packet(packet, prefix, verified(packet), now)
                if turn >= BATCH_PACKETS and stack.touched_count > BATCH_FLOWS:
                    break
        except DeviceError as error:
            self._lose(error)
        self.batches += 1
        self._settle(now)

    def _settle(self, now: float) -> None:
        """End a batch: give out requests, serve each marked flow once, write the stateless replies."""
        stack = self.stack
        self.time = now
        for flow in stack.take_requests():
            request = FlowRequest(self, flow)
            flow.owner = request
            self._on_request(request)
            self.poller.yield_soon()
        if self._on_datagram is not None:
            for datagram in stack.take_datagrams():
                self._on_datagram(datagram)
        for flow in stack.take_touched():
            owner = flow.owner
            if owner is not None:
                owner.touched()  # type: ignore[attr-defined]  # the core does not know what its owner is
            self.flush(flow, now)
        self._write_replies()
        self._rearm()

    def answer(self, datagram: ReceivedDatagram, payload: bytes | memoryview) -> None:
        """Answer a datagram, at any time after it came; lost when the device is full, as datagrams are.

        Raises: ValueError when `payload` is longer than 65507 bytes.
        """
        self.stack.reply_datagram(datagram, payload)
        self._write_replies()

    def flush(self, flow: Flow, now: float) -> None:
        """Let `flow` write what it owes; when the device is full, or that is much, it is asked again after others."""
        try:
            if self.stack.flush(flow, self._device.write, now):
                return
        except DeviceError as error:
            self._lose(error)
        self._blocked[flow] = None
        self._unblock.set()

    def _write_replies(self) -> None:
        try:
            for packet in self.stack.take_replies():
                if not self.device.write_packet(packet):
                    self.replies_lost += 1  # stateless, so a full device just loses it; the peer asks again
        except DeviceError as error:
            self._lose(error)

    def _lose(self, error: DeviceError) -> None:
        """The device was found gone. The pump must learn it, not the task that happened to write."""
        self._gone = error
        if self._scope is not None:
            self._scope.cancel()
        self.poller.yield_soon()

    def after(self, flow: Flow) -> None:
        """A command was given to `flow` outside a batch: write what follows from it and watch its new deadline."""
        self.time = now = self._now()
        self.flush(flow, now)
        if self.stack.has_replies:
            self._write_replies()
        if self.stack.has_alarm():
            self._rearm()

    def _rearm(self) -> None:
        # Only ever earlier: a deadline that moved back costs one idle wake-up, which is cheaper than telling Trio at
        # every acknowledgement.
        scope = self._scope
        if scope is not None:
            deadline = self.stack.next_deadline()
            if deadline < scope.deadline:
                scope.deadline = deadline

    async def _write_again(self) -> None:
        while True:
            while self._blocked:  # after a lost device all flows that owe something are here
                try:
                    await self.device.wait_writable()
                except DeviceError as error:
                    self._lose(error)
                    return
                blocked, self._blocked = self._blocked, {}
                now = self._now()
                for flow in blocked:
                    self.flush(flow, now)
                self._rearm()
            self._unblock = trio.Event()
            await self._unblock.wait()

    def streams(self) -> Iterator[FlowStream]:
        """The accepted flows that still have an owner, in no particular order."""
        for flow in self.stack.flows.values():
            if isinstance(flow.owner, FlowStream):
                yield flow.owner


class FlowRequest:
    """A connection that an app asks for and that nobody has decided on.

    The app has sent a SYN and waits; it gets its SYN-ACK from `accept` and its RST from `refuse`. The stack gives up
    on a request whose app went away: then `cancelled` is true, the callable given to `on_cancelled` has been called
    once, and a decision has no effect.
    """

    __slots__ = ("_cancelled_callback", "_flow", "_network", "cancelled", "destination", "source")

    def __init__(self, network: Network, flow: Flow) -> None:
        self._network = network
        self._flow = flow
        self._cancelled_callback: Callable[[], object] | None = None
        self.cancelled = False
        self.source: Address = _readable_address(flow.source)
        self.destination: Address = _readable_address(flow.destination)

    def on_cancelled(self, callback: Callable[[], object]) -> None:
        """Have `callback` called when the app gives up; at once if it already has."""
        if self.cancelled:
            callback()
        else:
            self._cancelled_callback = callback

    def touched(self) -> None:
        """For the network only: the stack marked the undecided flow."""
        if self._flow.failure and not self.cancelled:
            self.cancelled = True
            callback, self._cancelled_callback = self._cancelled_callback, None
            if callback is not None:
                callback()

    def accept(self) -> FlowStream:
        """Answer SYN-ACK and take the flow over.

        Cannot fail: if the app has gone meanwhile, the stream's first use raises `trio.BrokenResourceError`.
        """
        network, flow = self._network, self._flow
        self._cancelled_callback = None
        stream = FlowStream(network, flow, self.source, self.destination)
        flow.owner = stream
        network.stack.accept(flow, network._now())
        network.after(flow)
        return stream

    def refuse(self) -> None:
        """Answer RST, which the app sees as "connection refused". Without effect on a decided or cancelled request."""
        network, flow = self._network, self._flow
        if flow.owner is self:
            self._cancelled_callback = None
            flow.owner = None
            network.stack.refuse(flow, network._now())
            network.after(flow)


class FlowStream(trio.abc.HalfCloseableStream):
    """One accepted TCP connection of an app.

    A Trio stream, and besides, for the data path, a place to attach a sink and to write without waiting. One task at a
    time may wait for what comes from the app, one for room towards it, one for delivery.

    `trio.BrokenResourceError` means: the app reset the connection, or stopped answering, or `abort` was called.
    """

    def __init__(self, network: Network, flow: Flow, source: Address, destination: Address) -> None:
        self._network = network
        self._flow = flow
        self.source = source
        self.destination = destination
        self._sink: Sink | None = None
        self._on_change: Callable[[], object] | None = None
        self.refused = False
        self._short = False  # send_nowait has taken less than it was given, and nobody has been told of room since
        self._closed = False
        self._eof_sent = False
        self._sending = False
        self._from_app: trio.Event | None = None
        self._to_app: trio.Event | None = None
        self._delivered: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<FlowStream {self.source[0]}:{self.source[1]} -> {self.destination[0]}:{self.destination[1]}>"

    @property
    def bytes_from_app(self) -> int:
        """Payload bytes received in order so far."""
        return self._flow.bytes_from_app

    @property
    def bytes_to_app(self) -> int:
        """Payload bytes the app has acknowledged so far."""
        return self._flow.bytes_to_app

    @property
    def failure(self) -> str:
        """Why the flow is broken ("reset", "timeout", "aborted"), or ""."""
        return self._flow.failure

    @property
    def state(self) -> str:
        """The TCP state in RFC 9293's words."""
        return STATE_NAMES[self._flow.state]

    @property
    def round_trip_s(self) -> float:
        """The smoothed round trip time to the app, seconds; negative before the first measurement."""
        return self._flow.round_trip_s

    @property
    def opened_at(self) -> float:
        """When the SYN arrived, on Trio's clock."""
        return self._flow.opened_at

    # From the batch

    def touched(self) -> None:
        """For the network only: the stack marked the flow in this batch."""
        flow = self._flow
        if flow.failure:
            self._sink = None
            self._wake_all()
            self._tell()
            return
        if self._sink is not None:
            if not self.refused:
                self._offer()
        elif self._from_app is not None and (flow.readable_bytes or flow.app_finished):
            self._wake_from_app()
        if (self._short or self._to_app is not None) and self.has_room:
            if self._to_app is not None:
                self._to_app.set()
                self._to_app = None
            if self._short:
                self._short = False
                self._tell()
        if self._delivered is not None and (flow.all_acknowledged or flow.closed):
            self._delivered.set()
            self._delivered = None
            self._network.poller.yield_soon()

    def _offer(self) -> None:
        flow = self._flow
        waiting = flow.readable_bytes
        if waiting:
            assert self._sink is not None
            taken = self._sink(flow.readable_views())
            if flow.failure:  # the sink itself has aborted the flow
                return
            if taken:
                flow.consume(taken, self._network.time)
            if taken < waiting:
                self.refused = True
                self._tell()
                return
        if flow.app_finished:
            self._tell()

    def _tell(self) -> None:
        if self._on_change is not None:
            self._on_change()

    @property
    def has_room(self) -> bool:
        """Is a good part of the send buffer free?"""
        space = self._flow.send_space
        return space >= SEND_WAKE_BYTES or (space > 0 and space >= self._flow.unacknowledged_bytes)

    def _wake_from_app(self) -> None:
        if self._from_app is not None:
            self._network.poller.yield_soon()
            self._from_app.set()
            self._from_app = None

    def _wake_all(self) -> None:
        self._network.poller.yield_soon()
        self._wake_from_app()
        if self._to_app is not None:
            self._to_app.set()
            self._to_app = None
        if self._delivered is not None:
            self._delivered.set()
            self._delivered = None

    def _check(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this flow was closed here")
        if self._flow.failure:
            raise trio.BrokenResourceError(f"the flow is over: {self._flow.failure}")

    async def _wait_from_app(self) -> None:
        if self._from_app is not None:
            raise trio.BusyResourceError("another task already waits for this app")
        event = self._from_app = trio.Event()
        try:
            await event.wait()
        finally:
            if self._from_app is event:
                self._from_app = None
        self._check()

    async def _wait_to_app(self) -> None:
        if self._to_app is not None:
            raise trio.BusyResourceError("another task already waits for room towards this app")
        event = self._to_app = trio.Event()
        try:
            await event.wait()
        finally:
            if self._to_app is event:
                self._to_app = None
        self._check()

    # The direct way: bytes from the app go into a sink, bytes to the app are written without waiting

    def attach(self, sink: Sink | None, on_change: Callable[[], object] | None = None) -> None:
        """Have what the app sends handed to `sink`, inside the batch in which it arrives.

        `sink(views)` gets everything waiting, in order, and returns how many bytes it took (0..all). It must not raise
        and must not wait. What it does not take stays here, is not offered again until `offer`, and closes the window.
        What already waits is offered at once.

        `on_change()` is called, under the same rules, when the sink has refused bytes (`refused`), when it has taken
        all bytes before the app's FIN (`ended`), when there is room again after `send_nowait` took less than it was
        given, and when the flow has broken (`failure`); perhaps more than once.
        """
        self._sink = sink
        self._on_change = on_change
        self.refused = False
        if self._flow.failure:
            self._tell()
        elif sink is not None:
            self.offer()

    def offer(self) -> None:
        """Offer the sink what it refused before. Call it when the sink has room again."""
        self.refused = False
        if self._sink is not None and not self._flow.failure:
            self._offer()
            self._network.after(self._flow)

    @property
    def ended(self) -> bool:
        """The app's FIN has come, and every byte before it was taken."""
        return self._flow.app_finished and not self._flow.readable_bytes

    def send_nowait(self, data: bytes | memoryview) -> int:
        """Queue as much of `data` as there is room for and send what the app's window allows.

        The bytes are referenced, not copied, until the app has acknowledged them: they must not change any more.

        Returns: how many bytes were taken, from the front. Raises `trio.BrokenResourceError` when the flow is over.
        """
        if self._closed or self._flow.failure:
            self._check()
        if self._eof_sent:
            raise trio.ClosedResourceError("the end of this direction was already sent")
        taken = self._flow.write(data, self._network.time)
        if taken:
            self._network.after(self._flow)
        if taken < len(data):
            self._short = True
        return taken

    @property
    def send_space(self) -> int:
        """How many bytes `send_nowait` would take now."""
        return self._flow.send_space

    @property
    def rationed(self) -> bool:
        """Is memory so short that nobody may receive for this flow more than `send_space`?"""
        return self._network.stack.rationed

    def want_room(self) -> None:
        """Have `on_change` called when there is room again, as if `send_nowait` had not taken everything."""
        self._short = True

    async def wait_send_space(self) -> None:
        """Wait until a good part of the send buffer is free. Cancellation changes nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        self._check()
        if not self.has_room:
            await self._wait_to_app()

    async def wait_delivered(self) -> None:
        """Wait until the app's kernel has acknowledged everything, our FIN included, or the flow has ended.

        Returns also when the flow broke: look at `failure`. Cancellation changes nothing. Raises
        `trio.ClosedResourceError` when the flow is closed here before that: nobody follows it any more.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._delivered is not None:
            raise trio.BusyResourceError("another task already waits for delivery to this app")
        flow = self._flow
        while not (flow.failure or flow.closed or flow.all_acknowledged):
            if self._closed:
                raise trio.ClosedResourceError("this flow was closed here")
            event = self._delivered = trio.Event()
            try:
                await event.wait()
            finally:
                if self._delivered is event:
                    self._delivered = None

    def abort(self) -> None:
        """Reset the connection: the app sees ECONNRESET. What was not delivered is lost, visibly."""
        self._sink = None
        if not (self._flow.failure or self._flow.closed):
            self._flow.abort(self._network._now())
            self._network.after(self._flow)
        self._wake_all()

    # Trio's stream

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Trio's contract: at least one byte, or b"" after the app's FIN."""
        if max_bytes is not None and operator.index(max_bytes) < 1:
            raise ValueError("max_bytes must be at least 1")
        await trio.lowlevel.checkpoint()
        flow = self._flow
        if self._from_app is not None:
            raise trio.BusyResourceError("another task already waits for this app")
        self._check()
        while not flow.readable_bytes:
            if flow.app_finished:
                return b""
            await self._wait_from_app()
        data = b"".join(flow.readable_views()) if max_bytes is None else self._front(max_bytes)
        flow.consume(len(data), self._network._now())
        self._network.after(flow)
        return data

    def _front(self, max_bytes: int) -> bytes:
        parts: list[memoryview] = []
        for view in self._flow.readable_views():
            parts.append(view[:max_bytes])
            max_bytes -= len(parts[-1])
            if not max_bytes:
                break
        return b"".join(parts)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Trio's contract. When cancelled, any part of `data` may have been sent."""
        if self._sending:
            raise trio.BusyResourceError("another task is already sending to this app")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            view = memoryview(data if isinstance(data, bytes) else bytes(data))
            while True:
                view = view[self.send_nowait(view) :]
                if not view:
                    return
                await self.wait_send_space()
        finally:
            self._sending = False

    async def wait_send_all_might_not_block(self) -> None:
        """Trio's contract."""
        if self._sending:
            raise trio.BusyResourceError("another task is already sending to this app")
        self._sending = True
        try:
            await trio.lowlevel.checkpoint()
            await self.wait_send_space()
        finally:
            self._sending = False

    def send_eof_nowait(self) -> None:
        """Queue FIN behind all that was written; the other direction lives on. Once, and only while the flow lives."""
        if not (self._eof_sent or self._flow.failure or self._closed):
            self._eof_sent = True
            self._flow.finish(self._network._now())
            self._network.after(self._flow)

    async def send_eof(self) -> None:
        """Send FIN after all that was written; the other direction lives on."""
        if self._sending:
            raise trio.BusyResourceError("another task is already sending to this app")
        await trio.lowlevel.checkpoint()
        self._check()
        self.send_eof_nowait()

    async def aclose(self) -> None:
        """Take and give no more. What was written is still delivered, by the stack, without this object.

        Unread bytes of the app, now or later, are answered with RST (RFC 2525 2.17): they reach nobody.
        """
        if not self._closed:
            self._closed = True
            self._sink = None
            flow = self._flow
            if not (flow.failure or flow.closed):
                now = self._network._now()
                if not self._eof_sent:
                    flow.finish(now)
                flow.release(now)
                self._network.after(flow)
            flow.owner = None
            self._wake_all()
        await trio.lowlevel.checkpoint()
