"""The data plane: everything between the TUN device and the ingress, told what to do in messages.

Theory of operation
-------------------
The control plane knows ngrok, files and this machine. The data plane knows packets and TLS. They share no object:
the control plane *tells* (`Serve`, `Use`, `Reach`, `Trust`, `Accept`, each a frozen value), the data plane *reports*
(`CaFound`, `FlowEvent`, `DeviceLost`), and its counters are read as plain numbers. It looks no name up, reads no file
and changes nothing on the machine. That is why it can run in the daemon's own process, as here, or in processes
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

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import IPv6Address, ip_network
from typing import Final, TypeAlias

import trio

from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.names.directory import Directory
from ngrokd.names.twins import ServedTwice, Twins
from ngrokd.relay.handler import FlowEvent, Handler
from ngrokd.relay.ingress import Ingress
from ngrokd.relay.stock import PoolSettings
from ngrokd.relay.transport import Transport
from tun import Device, DeviceError, FlowRequest, FlowStream, Network, Stack, StackSettings

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


Order: TypeAlias = Serve | Use | Reach | Trust | Accept


@dataclass(frozen=True, slots=True)
class CaFound:
    """The ingress presented a CA whose fingerprint is pinned, and verified against it. Worth keeping."""

    pem: bytes


@dataclass(frozen=True, slots=True)
class DeviceLost:
    """The device is gone (deleted, most likely). Flows wait for `DataPlane.replace_device`."""

    message: str


Report: TypeAlias = CaFound | DeviceLost | FlowEvent


@dataclass(frozen=True, slots=True)
class DataPlaneSettings:
    """What does not change while the data plane runs."""

    stack: StackSettings
    secret: bytes = field(repr=False)
    connect_timeout_s: float = 10.0
    dials: int = 64
    refused_networks: tuple[str, ...] = ()
    pool: PoolSettings = field(default_factory=PoolSettings)
    twins: Twins | None = None
    strict: bool = False


@dataclass(slots=True, eq=False)
class _Serving:
    """One flow being handled: where to, how to end it, and the stream once there is one."""

    request: FlowRequest
    scope: trio.CancelScope


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
        self.network = Network(device, self._stack, self._serve_request)
        self.ingress = Ingress(
            dial,
            connect_timeout_s=settings.connect_timeout_s,
            dials=settings.dials,
            refused_networks=settings.refused_networks,
            on_ca_found=lambda pem: report(CaFound(pem)),
            pool=settings.pool,
            strict=settings.strict,
        )
        self._handler = Handler(self._lookup, self.ingress, on_event=report, strict=settings.strict)
        self._flows: trio.Nursery | None = None
        self._serving: dict[_Serving, None] = {}
        self._drain_s = 0.0
        self._draining = trio.Event()
        self._device_replaced = trio.Event()
        self._serve(Serve(Directory.empty()))

    # Orders

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
        for serving in self._serving:
            gone = self._lookup(serving.request.destination) is None
            if not gone:
                serving.scope.deadline = float("inf")
            elif serving.scope.deadline == float("inf"):
                serving.scope.deadline = deadline

    def replace_device(self, device: Device) -> None:
        """Go on with another device after `DeviceLost`."""
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
        return len(self._serving)

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
        numbers["flows"] = len(self._serving)
        numbers["batches"] = self.network.batches
        return numbers

    # Life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `drain` has been asked for and is over."""
        async with trio.open_nursery() as outer:
            await outer.start(self._pump)
            async with trio.open_nursery() as flows:
                self._flows = flows
                async with trio.open_nursery() as pool:
                    pool.start_soon(self.ingress.run)
                    task_status.started()
                    await self._draining.wait()
                    pool.cancel_scope.cancel()
                flows.cancel_scope.deadline = trio.current_time() + self._drain_s
            self._flows = None
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
        serving = _Serving(request, trio.CancelScope())
        self._serving[serving] = None
        try:
            with serving.scope:
                request.on_cancelled(serving.scope.cancel)
                await self._handler.serve(request)
        finally:
            del self._serving[serving]


_STACK_COUNTERS: Final = (
    "packets",
    "opened",
    "accepted",
    "refused",
    "cancelled",
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
