"""The data plane: everything between the TUN device and the ingress, told what to do in messages.

Theory of operation
-------------------
The control plane knows ngrok, files and this machine. The data plane knows packets and TLS. They share no object:
the control plane *tells* (`Serve`, `Use`, `Reach`, `Trust`, `Accept`, each a frozen value), the data plane *reports*
(`CaFound`, `FlowEvent`, `DeviceLost`), and is *asked* (`flows`, `close_flow`, `probe`, `record`, `counters`), which is
answered in plain values: numbers that may be summed, rows that may be joined. It looks no name up, reads no file and
changes nothing on the machine. That is why it can run in the daemon's own process, as here, or in processes
without privileges.

Supervision inside `DataPlane.run`:

    outer nursery
    |- pump              Network.run; outlives the flows, because endings need packets too
    `- flows nursery     one task per request: Handler.serve; its deadline is set only by `drain`
       `- pool           Ingress.run: ready connections; ends when draining begins

One flow's error ends that flow (`Handler.serve` is the boundary). A lost device does not end the flows: the pump
reports it and waits for another one.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from ipaddress import IPv6Address, ip_network
from types import TracebackType
from typing import Final, Protocol, Self, TypeAlias

import trio

from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.errors import Exit, NgrokdError
from ngrokd.names.directory import Directory
from ngrokd.names.twins import ServedTwice, Twins
from ngrokd.relay.handler import FlowEvent, Handler, Serving
from ngrokd.relay.ingress import Ingress, Probe
from ngrokd.relay.stock import PoolSettings
from ngrokd.relay.transport import Transport
from tun import (
    Capture,
    CaptureFilter,
    CaptureLimits,
    Device,
    DeviceError,
    FlowRequest,
    FlowStream,
    Network,
    RecordingDevice,
    Stack,
    StackSettings,
)

RECORDINGS: Final = 4  # at a time
RECORDING_READ_BYTES: Final = 1 << 18
FLOWS_AT_ONCE: Final = 256  # looked at between two turns of the loop
NO_PORTS: Final[frozenset[int]] = frozenset()

Dial: TypeAlias = Callable[[str, int], Awaitable[Transport]]


@dataclass(frozen=True, slots=True)
class Serve:
    """Serve exactly these endpoints from now on. Flows of endpoints that are gone live on for `linger_s`."""

    directory: Directory
    linger_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Use:
    """Present this certificate to the ingress, on new connections only."""

    credentials: Credentials


@dataclass(frozen=True, slots=True)
class Reach:
    """The ingress: its name (verified and sent as SNI), its port, and the addresses that the name has now."""

    host: str
    port: int
    addresses: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Trust:
    """The anchors that the ingress is verified against, and the fingerprints of CAs it may present itself."""

    system: bool
    pem: bytes
    fingerprints: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Accept:
    """Whose packets are answered: the addresses of this host, and networks (CIDR) the configuration adds."""

    local: frozenset[bytes] | None
    networks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pause:
    """Refuse new flows while `paused`; those that live go on."""

    paused: bool


@dataclass(frozen=True, slots=True)
class Limit:
    """What flows may cost from now on, all of them together; those that live go on. Sizes are bytes."""

    flows: int
    half_open: int
    undecided: int
    buffer: int
    buffers: int
    dials: int
    connect_timeout_s: float
    pool: PoolSettings


Order: TypeAlias = Serve | Use | Reach | Trust | Accept | Pause | Limit


@dataclass(frozen=True, slots=True)
class CaFound:
    """The ingress presented a CA whose fingerprint is pinned, and verified against it. Worth keeping."""

    pem: bytes


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """The device is gone (deleted, most likely). Flows wait for `DataPlane.replace_device`."""

    message: str


Report: TypeAlias = CaFound | DeviceLost | FlowEvent


# Why a flow was ended by us, beside the reasons of the relay's errors.
ENDPOINT_REMOVED: Final = "endpoint_removed"
CLOSED_HERE: Final = "closed_by_operator"
DIALING: Final = "DIALING"  # the state of a flow that nobody has decided on; the others are TCP's (RFC 9293 3.3.2)


@dataclass(frozen=True, slots=True)
class FlowInfo:
    """One flow, as it is now.

    Attributes:
        number: tells it from all others since the start.
        host, port: the endpoint's; the destination's address where there is no endpoint.
        source, destination: the app's address and port, and what it connected to.
        state: DIALING, or TCP's.
        age_s: seconds since the app's SYN.
        dial_s: seconds until the ingress had agreed; 0 while it has not.
        bytes_from_app, bytes_to_app: carried so far, as the app's TCP counts them.
        rtt_s: smoothed round trip time to the app's kernel, seconds; negative while unknown.
    """

    number: int
    host: str
    port: int
    source: tuple[str, int]
    destination: tuple[str, int]
    state: str
    age_s: float
    dial_s: float = 0.0
    bytes_from_app: int = 0
    bytes_to_app: int = 0
    rtt_s: float = -1.0


@dataclass(frozen=True, slots=True)
class RecordOrder:
    """What to record and when to end. Empty parts hold for everything; see `tun.CaptureFilter`.

    Attributes:
        addresses, ports: of either side.
        snaplen: bytes of each packet.
        max_packets, duration_s: where it ends by itself.
        application: who asked, for the file's header.
    """

    addresses: tuple[str, ...] = ()
    ports: tuple[int, ...] = ()
    snaplen: int = 262_144
    max_packets: float = math.inf
    duration_s: float = math.inf
    application: str = ""


class TooManyRecordingsError(NgrokdError):
    """RECORDINGS are under way."""

    exit_code = Exit.TEMPORARY


@dataclass(frozen=True, slots=True)
class DataPlaneSettings:
    """What does not change while the data plane runs.

    Flows are numbered from `first_flow` in steps of `flow_step`, so that several data planes share the numbers.
    """

    stack: StackSettings
    secret: bytes = field(repr=False)
    connect_timeout_s: float = 10.0
    dials: int = 64
    spin_s: float = 0.0
    refused_networks: tuple[str, ...] = ()
    pool: PoolSettings = field(default_factory=PoolSettings)
    twins: Twins | None = None
    strict: bool = False
    first_flow: int = 1
    flow_step: int = 1


@dataclass(slots=True, eq=False)
class _Flow:
    """One flow being handled: what is known of it, and how to end it."""

    serving: Serving
    scope: trio.CancelScope


class Tape(Protocol):
    """Packets being recorded; see `Recording`."""

    @property
    def recorded(self) -> int:
        """See `Recording.recorded`."""
        ...

    @property
    def dropped(self) -> int:
        """See `Recording.dropped`."""
        ...

    @property
    def ended(self) -> str:
        """See `Recording.ended`."""
        ...

    async def read(self) -> bytes:
        """See `Recording.read`."""
        ...

    def close(self) -> None:
        """See `Recording.close`."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def limited(settings: DataPlaneSettings, limit: Limit) -> DataPlaneSettings:
    """The settings with these limits in place of theirs."""
    return replace(
        settings,
        stack=replace(
            settings.stack,
            receive_buffer=limit.buffer,
            send_buffer=limit.buffer,
            small_buffer=limit.buffer // 2,
            max_flows=limit.flows,
            half_open=limit.half_open,
            undecided=limit.undecided,
            buffers=limit.buffers,
        ),
        connect_timeout_s=limit.connect_timeout_s,
        dials=limit.dials,
        pool=limit.pool,
    )


class Plane(Protocol):
    """What the daemon knows of a data plane, in its own process (`DataPlane`) or in others (`ngrokd.workers`).

    What the methods mean stands there. Whatever is added here is added to both, and crosses the socket between them:
    see `ngrokd.workers.messages`.
    """

    @property
    def interface(self) -> str:
        """See `DataPlane.interface`."""
        ...

    @property
    def problem(self) -> str:
        """See `DataPlane.problem`."""
        ...

    @property
    def ingress_problem(self) -> str:
        """See `DataPlane.ingress_problem`."""
        ...

    @property
    def flow_count(self) -> int:
        """See `DataPlane.flow_count`."""
        ...

    def tell(self, order: Order) -> None:
        """See `DataPlane.tell`."""
        ...

    async def in_force(self) -> None:
        """Wait until all that was told is in force, and what is counted is of now; but not for ever."""
        ...

    def replace_device(self, device: Device) -> None:
        """See `DataPlane.replace_device`."""
        ...

    def drain(self, seconds: float) -> None:
        """See `DataPlane.drain`."""
        ...

    def counters(self) -> dict[str, int]:
        """See `DataPlane.counters`."""
        ...

    def describe_pool(self) -> Mapping[str, object]:
        """See `DataPlane.describe_pool`."""
        ...

    def describe_workers(self) -> list[dict[str, int | str]]:
        """See `DataPlane.describe_workers`."""
        ...

    async def flows(self) -> list[FlowInfo]:
        """See `DataPlane.flows`."""
        ...

    async def close_flow(self, number: int) -> bool:
        """See `DataPlane.close_flow`."""
        ...

    async def probe(self, host: str, port: int) -> Probe:
        """See `DataPlane.probe`."""
        ...

    def record(self, order: RecordOrder) -> Tape:
        """See `DataPlane.record`."""
        ...

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """See `DataPlane.run`."""
        ...


class DataPlane:
    """The in-process data plane. See the module's theory.

    `tell` takes effect at once and atomically between packets. `report` is called from within flows and batches: it
    must neither wait nor raise.
    """

    def __init__(
        self, device: Device, settings: DataPlaneSettings, dial: Dial, report: Callable[[Report], None]
    ) -> None:
        self._settings = settings
        self._report = report
        self._directory = Directory.empty()
        self._known_addresses: set[bytes] = set()
        self._stack = Stack(settings.stack, settings.secret)
        self.network = Network(device, self._stack, self._serve_request, spin=settings.spin_s)
        self.ingress = Ingress(
            dial,
            connect_timeout_s=settings.connect_timeout_s,
            dials=settings.dials,
            refused_networks=settings.refused_networks,
            on_ca_found=lambda pem: report(CaFound(pem)),
            pool=settings.pool,
            strict=settings.strict,
        )
        self._handler = Handler(
            self._lookup, self.ingress, self.network.poller, on_event=report, strict=settings.strict
        )
        self._flows: trio.Nursery | None = None
        self._live: dict[int, _Flow] = {}  # by number
        self._next_flow = settings.first_flow
        self._paused = False
        self._recordings: list[Recording] = []
        self._drain_s = 0.0
        self._draining = trio.Event()
        self._device_replaced = trio.Event()
        self._serve(Serve(Directory.empty()))

    @property
    def interface(self) -> str:
        """The name of the device."""
        return self.network.device.name

    @property
    def problem(self) -> str:
        """Why packets are not carried as they should be, "" while they are."""
        return ""

    @property
    def ingress_problem(self) -> str:
        """See `Ingress.problem`."""
        return self.ingress.problem

    # Orders

    async def in_force(self) -> None:
        """Wait until all that was told is in force: here it is when `tell` has returned."""
        await trio.lowlevel.checkpoint()

    def tell(self, order: Order) -> None:
        """Carry out one order."""
        match order:
            case Serve():
                self._serve(order)
            case Use():
                self.ingress.set_credentials(order.credentials)
            case Reach():
                self.ingress.set_addresses(order.host, order.port, order.addresses)
            case Trust():
                self.ingress.set_anchors(order.system, order.pem, order.fingerprints)
            case Limit():
                self._stack.set_limits(limited(self._settings, order).stack)
                self.ingress.set_limits(order.connect_timeout_s, order.dials, order.pool)
            case Pause(paused):
                self._paused = paused
                self._stack.set_draining(paused or self._draining.is_set())
            case Accept():
                self._stack.set_sources(order.local, [_as_numbers(network) for network in order.networks])

    def _serve(self, order: Serve) -> None:
        self._directory = order.directory
        served = dict(order.directory.served())
        # The address of an endpoint that is gone stays its name's: it is a host without open ports (RST), not an
        # address that nobody has (host unreachable).
        self._known_addresses.update(served)
        served.update((address, NO_PORTS) for address in self._known_addresses.difference(served))
        twins = self._settings.twins
        self._stack.set_served(served if twins is None else ServedTwice(served, twins))
        # An endpoint that is gone refuses new flows at once; those that live get a while to finish what they do.
        deadline = trio.current_time() + order.linger_s
        for flow in self._live.values():
            gone = self._lookup(flow.serving.request.destination) is None
            if not gone:
                flow.scope.deadline = math.inf
                flow.serving.ending = ""
            elif flow.scope.deadline == math.inf:
                flow.scope.deadline = deadline
                flow.serving.ending = ENDPOINT_REMOVED

    def replace_device(self, device: Device) -> None:
        """Go on with another device after `DeviceLost`."""
        for recording in self._recordings:
            device = recording.put_before(device)
        self.network.device = device
        self._device_replaced.set()

    def drain(self, seconds: float) -> None:
        """Refuse new flows from now on, reset those that still live after `seconds`, then let `run` return.

        May be called again with a shorter time.
        """
        self._stack.set_draining(True)
        self._drain_s = seconds
        self._draining.set()
        if self._flows is not None:
            self._flows.cancel_scope.deadline = trio.current_time() + seconds

    # What it tells

    @property
    def flow_count(self) -> int:
        """Flows and undecided requests being handled."""
        return len(self._live)

    def streams(self) -> list[FlowStream]:
        """The flows that carry bytes now."""
        return list(self.network.streams())

    def counters(self) -> dict[str, int]:
        """Every counter of stack and relay, by dotted name."""
        stack = self._stack
        numbers = {f"stack.{name}": getattr(stack, name) for name in _STACK_COUNTERS}
        numbers |= {f"drops.{reason}": count for reason, count in stack.drops.items()}
        numbers |= {f"device.{reason}": count for reason, count in self.network.device.drops.items()}
        numbers |= {f"relay.{name}": value for name, value in self._handler.counters().items()}
        numbers |= {f"pool.{name}": value for name, value in self.ingress.counters().items()}
        accepted = [flow.serving.flow for flow in self._live.values() if flow.serving.flow is not None]
        numbers["relay.bytes_from_app"] += sum(flow.bytes_from_app for flow in accepted)
        numbers["relay.bytes_to_app"] += sum(flow.bytes_to_app for flow in accepted)
        numbers["flows"] = len(self._live)
        numbers["batches"] = self.network.batches
        numbers["replies_lost"] = self.network.replies_lost
        return numbers

    def describe_pool(self) -> dict[str, bool | int | float | str | None]:
        """See `Ingress.describe_pool`."""
        return self.ingress.describe_pool()

    def describe_workers(self) -> list[dict[str, int | str]]:
        """The processes that this is made of, beside the daemon's own."""
        return []

    # What it is asked

    async def flows(self) -> list[FlowInfo]:
        """All flows, oldest first. Not of one moment: with many of them packets pass meanwhile."""
        rows: list[FlowInfo] = []
        for flow in list(self._live.values()):
            rows.append(_describe(flow.serving, trio.current_time()))
            if len(rows) % FLOWS_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        await trio.lowlevel.checkpoint()
        return rows

    async def close_flow(self, number: int) -> bool:
        """Reset a flow, both ways. Returns whether there was one of this number."""
        await trio.lowlevel.checkpoint()
        flow = self._live.get(number)
        if flow is None:
            return False
        flow.serving.ending = CLOSED_HERE
        flow.scope.cancel()
        return True

    async def probe(self, host: str, port: int) -> Probe:
        """Go the way of a flow once, with a connection of its own; host "": only to the ingress, which is verified."""
        return await self.ingress.probe(host, port)

    def record(self, order: RecordOrder) -> Recording:
        """Begin to record packets. Whoever has the recording closes it. Raises TooManyRecordingsError, ValueError."""
        if len(self._recordings) >= RECORDINGS:
            raise TooManyRecordingsError(f"{RECORDINGS} captures are under way", remedy="end one of them first")
        recording = Recording(order, self._forget_recording)
        self._recordings.append(recording)
        self.network.device = recording.put_before(self.network.device)
        return recording

    def _forget_recording(self, recording: Recording) -> None:
        self._recordings.remove(recording)
        device = self.network.device
        while isinstance(device, RecordingDevice):  # the raw one is at the end, whichever of them leaves
            device = device.device
        for each in self._recordings:
            device = each.resume(device)
        self.network.device = device

    # Life

    async def run(
        self,
        *,
        until: Callable[[], Awaitable[None]] | None = None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve until `drain` has been asked for and is over, and `until` has returned, which is called then.

        New flows are refused to the very end.
        """
        async with trio.open_nursery() as outer:
            async with trio.open_nursery() as flows:
                self._flows = flows  # before the first packet is read: a SYN may have been waiting for us
                await outer.start(self._pump)
                async with trio.open_nursery() as pool:
                    pool.start_soon(self.ingress.run)
                    task_status.started()
                    await self._draining.wait()
                    pool.cancel_scope.cancel()
                flows.cancel_scope.deadline = trio.current_time() + self._drain_s
            self._flows = None
            if until is not None:
                await until()
            outer.cancel_scope.cancel()

    async def _pump(self, *, task_status: trio.TaskStatus[None]) -> None:
        started = False
        while True:
            try:
                if started:
                    await self.network.run()
                else:
                    started = True
                    await self.network.run(task_status=task_status)
            except DeviceError as error:
                self._device_replaced = trio.Event()
                self._report(DeviceLost(str(error)))
                await self._device_replaced.wait()

    def _lookup(self, destination: tuple[str, int]) -> Endpoint | None:
        twins = self._settings.twins
        if twins is None or ":" not in destination[0]:
            return self._directory.lookup(destination)
        original = twins.original(IPv6Address(destination[0]).packed)
        return None if original is None else self._directory.lookup((original, destination[1]))

    def _serve_request(self, request: FlowRequest) -> None:
        if self._flows is None:
            request.refuse()
        else:
            self._flows.start_soon(self._serve_flow, request)

    async def _serve_flow(self, request: FlowRequest) -> None:
        number = self._next_flow
        self._next_flow += self._settings.flow_step
        flow = _Flow(Serving(request, number, trio.current_time()), trio.CancelScope())
        self._live[number] = flow
        try:
            with flow.scope:
                request.on_cancelled(flow.scope.cancel)
                await self._handler.serve(request, flow.serving)
        finally:
            del self._live[number]


class Recording:
    """Packets being recorded, to be read as a pcapng file. A context manager; leaving it closes it.

    The pump writes into a pipe and never waits for whoever reads it; what does not fit is counted, also in the file.
    """

    def __init__(self, order: RecordOrder, on_close: Callable[[Recording], None]) -> None:
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._on_close = on_close
        self._ends_at = trio.current_time() + order.duration_s
        self._recorder: RecordingDevice | None = None
        self._closed = False
        try:
            self._capture = Capture(
                self._writer,
                interests=CaptureFilter.of(order.addresses, order.ports),
                limits=CaptureLimits(max_packets=order.max_packets),
                application=order.application,
                snaplen=order.snaplen,
            )
        except BaseException:
            self._close_pipe()
            raise

    @property
    def recorded(self) -> int:
        """Packets recorded so far."""
        return self._capture.recorded

    @property
    def dropped(self) -> int:
        """Packets that should have been recorded, but whoever reads is too slow."""
        return self._capture.dropped

    @property
    def ended(self) -> str:
        """Why it is over ("packets", "duration", "closed"), or ""."""
        return "duration" if self._ends_at == -math.inf else self._capture.ended

    def put_before(self, device: Device) -> Device:
        """Record what passes this device from now on, as another interface of the same file."""
        self._recorder = RecordingDevice(device, self._capture)
        return self._recorder

    def resume(self, device: Device) -> Device:
        """Go on with the same interface, in front of another recording's device or of the real one."""
        assert self._recorder is not None
        self._recorder.device = device
        return self._recorder

    async def read(self) -> bytes:
        """Wait for the next bytes of the file; b"" when it is over and everything was read."""
        await trio.lowlevel.checkpoint()
        while True:
            self._capture.flush()
            with contextlib.suppress(BlockingIOError):
                return os.read(self._reader, RECORDING_READ_BYTES)
            if self._capture.ended and not self._capture.pending:
                return b""
            with trio.move_on_at(self._ends_at) as scope:
                await trio.lowlevel.wait_readable(self._reader)
            if scope.cancelled_caught:
                self._ends_at = -math.inf
                self._capture.close()

    def close(self) -> None:
        """Stop recording. Idempotent."""
        if not self._closed:
            self._closed = True
            self._capture.close()
            self._on_close(self)
            self._close_pipe()

    def _close_pipe(self) -> None:
        os.close(self._reader)
        os.close(self._writer)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _describe(serving: Serving, now: float) -> FlowInfo:
    request, endpoint, flow = serving.request, serving.endpoint, serving.flow
    host, port = request.destination if endpoint is None else (endpoint.host, endpoint.port)
    age_s = now - serving.begun
    if not isinstance(flow, FlowStream):
        return FlowInfo(serving.number, host, port, request.source, request.destination, DIALING, age_s)
    return FlowInfo(
        serving.number,
        host,
        port,
        request.source,
        request.destination,
        flow.state,
        age_s,
        serving.dial_s,
        flow.bytes_from_app,
        flow.bytes_to_app,
        flow.round_trip_s,
    )


_STACK_COUNTERS: Final = (
    "packets",
    "opened",
    "accepted",
    "refused",
    "cancelled",
    "put_off",
    "resets_received",
    "timeouts",
    "aborted",
    "retransmits",
    "probes",
    "replies_sent",
    "flow_count",
    "half_open_count",
    "undecided_count",
    "time_wait_count",
    "buffered_bytes",
)


def _as_numbers(cidr: str) -> tuple[int, int, int]:
    network = ip_network(cidr)
    return network.version, int(network.network_address), int(network.netmask)
