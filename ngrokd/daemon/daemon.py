"""The daemon: which parts there are, what each is handed, and in which order things stand and fall.

This is the only file that knows all rooms. It holds no rule of its own beyond order:

    up      state lock, rights, conflicts, device, link and routes, control socket, http port      (READY=1)
            last known endpoints, polls                                                            ([ready])
    down    names out of the hosts file, new connections refused, `net.drain` for those that live,
            then sockets, routes, guard and device

Whatever was done is undone in reverse order, also when a later step fails. A `Machine` stands for everything outside
the process; `ngrokd.daemon.machine` has the real one, the tests one in memory, where a day passes in seconds.

    root nursery            an unexpected exception here undoes everything and ends the process
    |- data plane           its own tree, see ngrokd.dataplane
    |- discovery            expected errors stay inside; see ngrokd.discovery
    |- ingress addresses    looked up off the path, remembered when that fails
    |- machine watch        our addresses, and what others do to our link and routes
    |- control, http        one client's error ends that client
    `- ready line, watchdog, signals
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from ipaddress import IPv4Network
from typing import Any, Final, Protocol, TextIO

import trio

from ngrokd import __version__, config, core_is_compiled, files
from ngrokd.cloud.api import NgrokApi, api_ssl_context
from ngrokd.cloud.identity import IdentityStore
from ngrokd.config import Settings
from ngrokd.daemon.ipv6 import FIRST_KNOCK_S, KNOCK_PORT, KNOCK_S, Answer, Way
from ngrokd.daemon.observing import Facts, Observing
from ngrokd.daemon.pulse import Pulse
from ngrokd.daemon.reload import Outcome, Reloader
from ngrokd.daemon.shadows import flag_public_names
from ngrokd.daemon.subnet6 import choose_twins
from ngrokd.daemon.traffic import Traffic
from ngrokd.dataplane import (
    Accept,
    CaFound,
    DataPlane,
    DataPlaneSettings,
    DeviceLost,
    Limit,
    Plane,
    Reach,
    Report,
    Serve,
    Trust,
    Use,
    limited,
)
from ngrokd.discovery import Discovery
from ngrokd.endpoints import Secret
from ngrokd.errors import ConfigError, Exit, NgrokdError, PermissionMissingError, StateError, TakenError
from ngrokd.host.plan import gateway
from ngrokd.log import Log
from ngrokd.names import reconcile
from ngrokd.names.directory import Directory
from ngrokd.names.twins import Twins
from ngrokd.ops.control import Command, ControlError, ControlServer, ControlSocket
from ngrokd.ops.events import Events
from ngrokd.ops.notify import Notifier
from ngrokd.ops.peers import Peer
from ngrokd.ops.web import (
    Condition,
    EndpointHealth,
    Health,
    HttpListener,
    WebServer,
    format_time,
    status_document,
)
from ngrokd.relay.handler import FlowEvent
from ngrokd.relay.stock import PoolSettings
from ngrokd.relay.transport import Transport
from ngrokd.workers import merge, process, rights
from ngrokd.workers.supervisor import WorkersPlane, as_queued
from tun import Device, StackSettings

log = logging.getLogger("ngrokd.daemon")

INGRESS_CA: Final = "ingress-ca.pem"
# Where ngrok's operator image keeps its CA, and the Go daemon looked for it.
NGROK_CA_DIRECTORY: Final = "/etc/ssl/certs/ngrok"
DEFAULT_INGRESS: Final = "kubernetes-binding-ingress.ngrok.io:443"
MAX_CA_BYTES: Final = 4 << 20
RESOLVE_EVERY_S: Final = 300.0
RESOLVE_AGAIN_S: Final = 5.0
RESOLVE_TIMEOUT_S: Final = 5.0
# Of the descriptors that the process may have; each flow takes one.
RESERVED_DESCRIPTORS: Final = 64
# How long a start that has last known endpoints waits for the API before it says that it is ready (docs/adr/0010).
READY_WAIT_S: Final = 0.7
# How long the pool may take for its first handshake before we make one of our own, and how often that is tried again.
INGRESS_PROOF_S: Final = 1.0
INGRESS_PROOF_AGAIN_S: Final = 30.0
# The Go daemon's set-api-key came back when the registration was over; so does ours, but not for ever.
COMMAND_WAIT_S: Final = 20.0


class Machine(Protocol):
    """Everything outside the process, as far as the daemon needs it.

    Attributes:
        names: what this machine calls itself.
        problem: what is wrong with link, address or routes now, "" when nothing is.
        ipv6_problem: why names cannot have IPv6 addresses now; "" when nothing is known to stand against it.
    """

    names: tuple[str, ...]
    problem: str
    ipv6_problem: str

    @property
    def descriptors(self) -> int:
        """How many files and sockets this process may have open."""
        ...

    def wall(self) -> float:
        """The wall clock, Unix seconds."""
        ...

    async def run_sync(self, function: Callable[..., Any], /, *args: Any) -> Any:  # Any: it passes through
        """Run a function that takes its time, where it does not hold up the loop."""
        ...

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """Open a TCP stream to the API. Raises OSError."""
        ...

    async def dial(self, address: str, port: int) -> Transport:
        """Open a TCP connection to the ingress. Raises OSError."""
        ...

    async def resolve(self, host: str, port: int) -> tuple[str, ...]:
        """The addresses of a name. Raises OSError."""
        ...

    def signals(self) -> contextlib.AbstractContextManager[AsyncIterator[int]]:
        """The signals TERM, INT and HUP that the process gets, as they come."""
        ...

    async def knock(self, address: str, port: int) -> Answer:
        """Ask for a connection over IPv6, and say what came of it. Waits as long as the kernel does."""
        ...

    def prepare(self, settings: Settings, twins: Twins | None = None) -> Device:
        """Check rights and conflicts, open the device, configure link and routes, for IPv6 too where there are `twins`.

        That IPv6 is not to be had is no error but `ipv6_problem`, and it may come and go later.

        Raises NgrokdError; then nothing is left behind.
        """
        ...

    def reopen(self) -> Device:
        """Make device, link and routes again after the device was lost. Raises NgrokdError."""
        ...

    def restore(self) -> None:
        """Undo `prepare`. Never raises; what could not be undone is logged."""
        ...

    def addresses(self) -> frozenset[bytes] | None:
        """The addresses of this host, packed; None when any source is to be accepted."""
        ...

    async def watch(self, changed: Callable[[], None]) -> None:
        """Call `changed` when addresses of this host change, and put back what others change of ours; for ever."""
        ...


class Daemon:
    """One daemon. `run` it once.

    Args:
        settings: the configuration.
        machine: see `Machine`.
        environ: where keys may come from, and the service manager's socket.
        reload: reads the configuration again; raises ConfigError.
        watched: the files on which it depends, looked at for changes; None: nobody looks.
        output: where the ready line goes.
        log_control: the installed log, to change its level live.
        strict: let a defect in a flow or a command rise instead of being survived, for tests.
    """

    def __init__(
        self,
        settings: Settings,
        machine: Machine,
        *,
        environ: Mapping[str, str],
        reload: Callable[[], Settings] | None = None,
        watched: Callable[[Settings], Sequence[str]] | None = None,
        output: TextIO | None = None,
        log_control: Log | None = None,
        strict: bool = False,
    ) -> None:
        self.settings = settings
        self.machine = machine
        self._environ = environ
        read = reload if reload is not None else lambda: settings
        self.reloader = Reloader(settings, read, watched=watched, run_sync=machine.run_sync, wall=machine.wall)
        self._output = output if output is not None else sys.stdout
        self._log_control = log_control
        self._strict = strict
        self._notifier = Notifier(environ)
        self._key = config.resolve_api_key(settings, environ)
        self._started_wall = machine.wall()
        self._started_at = math.nan
        self._stopping = trio.Event()
        self._stop_now = False
        self._draining = False
        self._serving = False
        self._resolve_now = trio.Event()
        self._device_lost = trio.Event()
        self._ingress_told: tuple[str, int] | None = None
        self._ingress_looked_up = trio.Event()
        self._ingress_addresses: tuple[str, ...] = ()
        self._ingress_problem = ""
        self._network_problem = ""
        self._found_ca = b""
        self._twins: Twins | None = None
        self._way = Way()
        self._look_at_ipv6 = trio.Event()
        self._ipv6_problem = ""
        self._device_restarts = 0
        self._ingress_verified = False
        self._ingress_unproven = ""
        self._web: WebServer | None = None
        self._web_listener: HttpListener | None = None
        self._web_scope = trio.CancelScope()
        self._nursery: trio.Nursery
        self._trust: Trust | None = None
        self._limit: Limit | None = None
        self.ready = trio.Event()
        self.events = Events(machine.wall)
        self.traffic = Traffic(self.events)
        self.plane: Plane
        self.discovery: Discovery
        self.observing: Observing
        self._control: ControlServer
        self.commands: dict[str, Command] = {
            "status": Command(self._status_command),
            "list": Command(self._list_command),
            "version": Command(self._version_command),
            "health": Command(self._health_command),
            "set-api-key": Command(self._set_api_key_command, changes=True),
            "refresh-cert": Command(self._refresh_cert_command, changes=True),
            "refresh": Command(self._refresh_command, changes=True),
            "reload": Command(self._reload_command, changes=True),
        }

    # Life

    async def run(self) -> None:
        """Serve until `stop`, then undo everything. Raises NgrokdError when it cannot start."""
        self._started_at = trio.current_time()
        try:
            async with trio.open_nursery() as nursery:
                # Before anything is done to the machine, so that nothing can be left half done by a signal.
                await nursery.start(self._handle_signals)
                await self._run()
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise _only_error(group) from None

    async def _run(self) -> None:
        settings = self.settings
        with contextlib.ExitStack() as undo:
            for warning in settings.warnings:
                log.warning("%s", warning)
            workers = merge.count_workers(settings.net.workers, process.usable_cpus())
            if workers > 1:
                rights.check_can_drop()
            undo.enter_context(state_lock(settings.state.directory))
            self._twins = choose_twins(settings)
            device = self.machine.prepare(settings, self._twins)
            undo.callback(self.machine.restore)
            self._build(device, workers)
            control = undo.enter_context(ControlSocket(settings.control.socket, settings.control.group))
            undo.callback(self._close_web)
            if settings.http.listen:
                self._web_listener = HttpListener(settings.http.listen)
            await self._serve(control)

    def stop(self) -> None:
        """Begin to stop; called again: stop at once."""
        if self._stopping.is_set():
            self._stop_now = True
            if self._draining:
                self.plane.drain(0.0)
        self._stopping.set()

    def _build(self, device: Device, workers: int) -> None:
        """Make the parts and hand each what it needs."""
        settings, machine = self.settings, self.machine
        subnet = IPv4Network(settings.net.subnet)
        subnet6 = self._twins.subnet6 if self._twins is not None else None
        self._limit = self._limits(settings)
        self.plane = self._make_plane(
            device,
            workers,
            limited(
                DataPlaneSettings(
                    stack=StackSettings(
                        mtu=device.mtu,
                        offload=device.offload,
                        gateway=subnet[1].packed,
                        network=int(subnet.network_address),
                        mask=int(subnet.netmask),
                        gateway6=gateway(subnet6).packed if subnet6 else b"",
                        network6=int(subnet6.network_address) if subnet6 else 0,
                        mask6=int(subnet6.netmask) if subnet6 else 0,
                    ),
                    secret=secrets.token_bytes(32),
                    spin_s=settings.pool.spin_s,
                    refused_networks=(settings.net.subnet, *([str(subnet6)] if subnet6 else [])),
                    twins=self._twins,
                    strict=self._strict,
                ),
                self._limit,
            ),
        )
        api = NgrokApi(
            url=settings.api.url,
            key=lambda: self._key.value,
            connect=machine.connect,
            ssl_context=_api_context(settings),
            timeout_s=settings.api.timeout_s,
            user_agent=f"ngrokd/{__version__}",
            now=machine.wall,
        )
        self._api = api
        self.discovery = Discovery(
            settings,
            api,
            IdentityStore(settings.state.directory),
            has_key=lambda: bool(self._key.value),
            publish=self._publish,
            use=lambda credentials: self.plane.tell(Use(credentials)),
            reach=lambda _endpoint: self._resolve_now.set(),
            wall=machine.wall,
            run_sync=machine.run_sync,
            machine_names=machine.names,
            twins=self._twins,
            events=self.events,
        )
        self._pulse = Pulse(self.events, self.plane.counters, self.plane.in_force)
        self.observing = Observing(
            self.plane,
            self.discovery,
            self.traffic,
            self.events,
            self._pulse,
            machine,
            Facts(
                state=lambda: self.state,
                conditions=self.conditions,
                problems=lambda: self.problems,
                restarts=self._count_restarts,
                control=lambda: self._control.counters(),
                web=lambda: self._web.counters() if self._web is not None else {},
            ),
            twins=self._twins,
            log_control=self._log_control,
            started_at=self._started_wall,
        )
        self._control = ControlServer({**self.commands, **self.observing.commands()}, strict=self._strict)
        self._tell_trust(self._anchors(settings))
        self._tell_sources()

    def _make_plane(self, device: Device, workers: int, settings: DataPlaneSettings) -> Plane:
        if workers == 1:
            return DataPlane(device, settings, self.machine.dial, self._reported)
        identity = rights.worker_identity()
        spawn = partial(process.spawn, identity=identity)
        log.info("%d workers carry connections, as user %d", workers, identity.uid if identity else os.geteuid())
        return WorkersPlane(as_queued(device), settings, workers, self._reported, spawn)

    def _limits(self, settings: Settings) -> Limit:
        limits, pool = settings.limits, settings.pool
        return Limit(
            flows=self._most_flows(settings),
            half_open=limits.half_open,
            undecided=limits.undecided,
            buffer=limits.buffer_bytes,
            buffers=limits.buffers_bytes,
            dials=limits.dials,
            connect_timeout_s=settings.ingress.connect_timeout_s,
            pool=PoolSettings(pool.max, pool.max_age_s, pool.idle),
        )

    def _most_flows(self, settings: Settings) -> int:
        """As many as configured, but some descriptors are kept for API, control socket and files."""
        wanted, possible = settings.limits.flows, max(1, self.machine.descriptors - RESERVED_DESCRIPTORS)
        if possible < wanted:
            log.info("the limit of open files, %d, allows %d connections", self.machine.descriptors, possible)
        return min(wanted, possible)

    async def _publish(self, directory: Directory) -> None:
        self.plane.tell(Serve(directory))
        await self.plane.in_force()

    async def _serve(self, control: ControlSocket) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await nursery.start(self._run_plane)
            await nursery.start(self._control.serve, control)
            await self._serve_web()
            nursery.start_soon(self.machine.watch, self._machine_changed)
            nursery.start_soon(self._replace_devices)
            nursery.start_soon(self._keep_watchdog)
            nursery.start_soon(self.reloader.watch, self.reload)
            nursery.start_soon(self._pulse.run)
            nursery.start_soon(self.observing.keep_log_level)
            self._serving = True
            self.events.emit("daemon.started", f"ngrokd {__version__} serves", version=__version__, pid=os.getpid())
            self._notifier.ready("waiting for the endpoints")
            try:
                await self._name_endpoints()
            finally:
                # Names go first, while connections to them are still refused politely. All that writes them has ended,
                # what it had in a thread included.
                # A reload could write them again; none begins any more.
                with trio.CancelScope(shield=True):
                    async with self.reloader.one_at_a_time:
                        await self.machine.run_sync(self.discovery.withdraw)
            self._draining = True
            self.plane.drain(0.0 if self._stop_now else self.settings.net.drain_s)
            await self._plane_ended.wait()
            nursery.cancel_scope.cancel()

    async def _serve_web(self) -> None:
        """Answer health checks where we listen now, if anywhere."""
        listener = self._web_listener
        if listener is None:
            return
        page, self._web_scope = self.observing.page, trio.CancelScope()
        self._web = WebServer(listener.host, self.health, self.endpoint_health, page, strict=self._strict)
        await self._nursery.start(self._run_web, self._web, listener, self._web_scope)

    @staticmethod
    async def _run_web(
        server: WebServer, listener: HttpListener, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]
    ) -> None:
        with scope:
            await server.serve(listener, task_status=task_status)

    def _close_web(self) -> None:
        self._web_scope.cancel()
        if self._web_listener is not None:
            self._web_listener.close()
        self._web = self._web_listener = None

    async def _move_web(self, listen: str) -> None:
        """Answer health checks there from now on, nowhere for "". Raises NgrokdError; then it is as it was."""
        ours = self._web_listener
        try:
            listener = HttpListener(listen) if listen else None
        except TakenError:
            if ours is None or config.split_address(listen, None, zero=True)[1] != ours.port:
                raise
            # It is we who have that port, on another address.
            self._close_web()
            try:
                listener = HttpListener(listen)
            except NgrokdError:
                self._web_listener = HttpListener(config.join_address(ours.host, ours.port))
                await self._serve_web()
                raise
        self._close_web()
        self._web_listener = listener
        await self._serve_web()

    async def _name_endpoints(self) -> None:
        """Keep this machine's names as ngrok lists them, until it is time to stop."""
        await self._try_ipv6(FIRST_KNOCK_S)
        await self.discovery.restore()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_ipv6)
            nursery.start_soon(self._keep_ingress_addresses)
            nursery.start_soon(self.discovery.run)
            nursery.start_soon(self._prove_ingress)
            nursery.start_soon(self._say_ready)
            nursery.start_soon(self._keep_status)
            ours = [self._twins.subnet6] if self._twins is not None else []
            subnet = IPv4Network(self.settings.net.subnet)
            nursery.start_soon(partial(flag_public_names, self.discovery, self.machine.resolve, subnet, *ours))
            await self._stopping.wait()
            live = self.plane.flow_count
            self.events.emit("daemon.stopping", f"stopping: new connections are refused, {live} live", flows=live)
            self._notifier.stopping(f"draining {self.plane.flow_count} connections")
            nursery.cancel_scope.cancel()

    async def _try_ipv6(self, patience_s: float) -> float:
        """Go the way that apps will go over IPv6, to where our own stack refuses, and name it only if that is so.

        Returns: how long until it should be tried again, in seconds.
        """
        twins = self._twins
        if twins is None:
            return math.inf
        answer = Answer.NO_WAY
        if not self.machine.ipv6_problem:
            answer = Answer.SILENCE
            with trio.move_on_after(patience_s):
                answer = await self.machine.knock(str(twins.probe), KNOCK_PORT)
        delay = self._way.judge(answer)
        problem = self.machine.ipv6_problem or f"the kernel does not lead {twins.subnet6} to us"
        self._tell_of_ipv6("" if self._way.is_open else problem)
        await self.discovery.name_over_ipv6(self._way.is_open)
        return delay if not self.machine.ipv6_problem else math.inf

    def _tell_of_ipv6(self, problem: str) -> None:
        twins, was_open = self._twins, self.discovery.name_twins
        assert twins is not None
        if was_open and problem:
            log.warning("names have no IPv6 addresses any more: %s", problem)
        elif not was_open and not problem:
            log.info("names have IPv6 addresses too, in %s", twins.subnet6)
        elif problem != self._ipv6_problem:
            log.info("names have no IPv6 addresses: %s", problem)
        self._ipv6_problem = problem

    async def _keep_ipv6(self) -> None:
        """Try again when something about this machine's network has changed, and every now and then."""
        delay = 0.0
        while True:
            with trio.move_on_after(delay):
                await self._look_at_ipv6.wait()
            self._look_at_ipv6 = trio.Event()
            delay = await self._try_ipv6(KNOCK_S)

    def _machine_changed(self) -> None:
        self._tell_sources()
        self._look_at_ipv6.set()

    async def _run_plane(self, *, task_status: trio.TaskStatus[None]) -> None:
        self._plane_ended = trio.Event()
        try:
            await self.plane.run(task_status=task_status)
        finally:
            self._plane_ended.set()

    async def _say_ready(self) -> None:
        """Print the ready line, once. See docs/adr/0010."""
        discovery = self.discovery
        if discovery.known.desired.services:
            with trio.move_on_after(READY_WAIT_S):
                await discovery.first_attempt.wait()
                await self._ingress_was_looked_up()
        else:
            await discovery.first_success.wait()
            await self._ingress_was_looked_up()
        net = self.settings.net
        count = len(discovery.known.desired.services)
        self.ready.set()
        self.events.emit("daemon.ready", f"ready: {count} endpoints are served", endpoints=count)
        self._notifier.status(self._summary())
        try:
            print(
                f"[ready] ngrokd {__version__} tun={self.plane.interface} subnet={net.subnet} "
                f"endpoints={count} sock={self.settings.control.socket}",
                file=self._output,
                flush=True,
            )
        except (OSError, ValueError) as error:  # its reader is gone, or it is closed: the apps are served all the same
            log.warning("the ready line could not be printed: %s", error)

    async def _ingress_was_looked_up(self) -> None:
        while self._ingress_told != self._ingress_address():
            await self._ingress_looked_up.wait()

    async def _keep_status(self) -> None:
        """Tell the service manager in a few words how we are, whenever that may have changed."""
        said = ""
        while True:
            summary = self._summary()
            if summary != said:
                said = summary
                self._notifier.status(summary)
            await self.discovery.next_round()

    def _summary(self) -> str:
        known = self.discovery.known
        if known.waiting_for_key:
            return "waiting for an API key: sudo ngrokd set-api-key"
        if not self.ready.is_set():
            return f"waiting for the endpoints{f': {known.problem}' if known.problem else ''}"
        serving = f"serving {len(known.desired.services)} endpoints"
        return "; ".join([serving, *self.problems])

    async def _keep_watchdog(self) -> None:
        interval = self._notifier.watchdog_s
        while interval is not None:
            self._notifier.watchdog()
            await trio.sleep(interval)

    async def _handle_signals(self, *, task_status: trio.TaskStatus[None]) -> None:
        """TERM and INT stop (twice: at once), HUP reloads."""
        with self.machine.signals() as signals:
            task_status.started()
            async for number in signals:
                if number != signal.SIGHUP:
                    log.info("got %s", signal.Signals(number).name)
                    self.stop()
                elif self._serving:
                    self._nursery.start_soon(self._try_reload)  # while it reads, a signal may say to stop

    # What the data plane reports

    def _reported(self, report: Report) -> None:
        match report:
            case FlowEvent():
                self.traffic.note(report, self.machine.wall())
            case CaFound(pem):
                self._found_ca = pem
                text = f"the ingress presented ngrok's CA, known by its fingerprint; kept as {INGRESS_CA}"
                self.events.emit("ingress.ca_found", text)
                try:
                    files.atomic_write(os.path.join(self.settings.state.directory, INGRESS_CA), pem, 0o644)
                except StateError as error:
                    log.warning("%s", error)
            case DeviceLost(message):
                self.events.emit("tun.lost", f"the interface is gone ({message}); making it again", reason=message)
                self._device_lost.set()

    async def _replace_devices(self) -> None:
        """Give the data plane another device when somebody deleted the interface; live flows go on."""
        while True:
            await self._device_lost.wait()
            self._device_lost = trio.Event()
            delay = 0.1
            while True:
                try:
                    self.plane.replace_device(self.machine.reopen())
                    self._network_problem = ""
                    self._device_restarts += 1
                    self.events.emit("tun.restored", "the interface is there again")
                    break
                except NgrokdError as error:
                    self._network_problem = f"the interface is gone: {error}"
                    log.error("%s; trying again in %.1f s", error, delay)
                    await trio.sleep(delay)
                    delay = min(delay * 2, 5.0)

    # What the data plane is told

    def _tell_trust(self, trust: Trust) -> None:
        """Only what is new: connections that are ready are dropped when anchors change."""
        if trust != self._trust:
            self._trust = trust
            self.plane.tell(trust)

    def _tell_sources(self) -> None:
        self.plane.tell(Accept(self.machine.addresses(), self.settings.net.allow_sources))

    def _anchors(self, settings: Settings) -> Trust:
        """Whom the ingress is verified against. Raises ConfigError for a configured file that cannot be read."""
        pem = _read_ca("ingress.ca_file", settings.ingress.ca_file)
        pem += b"".join(_directory_certificates(NGROK_CA_DIRECTORY))
        pem += b"\n" + self._found_ca
        with contextlib.suppress(FileNotFoundError, StateError):
            pem += b"\n" + files.read_limited(os.path.join(settings.state.directory, INGRESS_CA), MAX_CA_BYTES)
        return Trust(True, pem, settings.ingress.ca_fingerprints)

    async def _keep_ingress_addresses(self) -> None:
        """Look the ingress up now, every few minutes, when it changes, and soon again when that failed."""
        if not self.settings.ingress.address:
            await self.discovery.ingress_settled.wait()
        while True:
            self._resolve_now = trio.Event()
            delay = await self._look_up_ingress(*self._ingress_address())
            self._ingress_looked_up.set()
            self._ingress_looked_up = trio.Event()
            with trio.move_on_after(delay):
                await self._resolve_now.wait()

    async def _look_up_ingress(self, host: str, port: int) -> float:
        """Tell the data plane where the ingress is. Returns after how many seconds that may have changed."""
        delay = RESOLVE_EVERY_S
        try:
            with trio.fail_after(RESOLVE_TIMEOUT_S):
                addresses = await self.machine.resolve(host, port)
        except (OSError, ValueError, trio.TooSlowError) as error:
            self._ingress_problem = f"cannot look up the ingress {host}: {str(error) or 'no answer'}"
            self.events.emit("ingress.unresolved", self._ingress_problem, reason=self._ingress_problem)
            delay = RESOLVE_AGAIN_S
            # The last good addresses go on being used: a name server's outage is not the ingress's.
            same = self._ingress_told is not None and self._ingress_told[0] == host
            addresses = self._ingress_addresses if same else ()
        else:
            self._ingress_problem = ""
        self._ingress_addresses = addresses
        self._ingress_told = (host, port)
        self.plane.tell(Reach(host, port, addresses))
        return delay

    async def _prove_ingress(self) -> None:
        """See to it that a handshake with the ingress is verified: one that is made anyway, or one of ours."""
        while self._ingress_told is None:
            await self._ingress_looked_up.wait()
        wait_s = INGRESS_PROOF_S
        while True:
            await trio.sleep(wait_s)
            await self.plane.in_force()
            if not self.plane.counters().get("pool.dials"):
                try:
                    self._ingress_unproven = (await self.plane.probe("", 0)).problem
                except NgrokdError as error:  # no worker answers
                    self._ingress_unproven = str(error)
                await self.plane.in_force()
            if self.plane.counters().get("pool.dials"):
                break
            wait_s = min(wait_s * 2, INGRESS_PROOF_AGAIN_S)
        self._ingress_verified = True
        self._ingress_unproven = ""
        self.events.emit("ingress.verified", "a handshake with the ingress was verified")

    def _ingress_address(self) -> tuple[str, int]:
        """Host and port: configured, else what the API said, else ngrok's."""
        for text in (self.settings.ingress.address, self.discovery.known.ingress_endpoint):
            # What the API said was checked when it came; what stood in a file may have been damaged since.
            with contextlib.suppress(ValueError):
                if text:
                    return config.split_address(text, config.INGRESS_PORT)
        return config.split_address(DEFAULT_INGRESS, config.INGRESS_PORT)

    def _ingress_endpoint(self) -> str:
        return config.join_address(*self._ingress_address())

    # Commands

    async def _status_command(self, _arguments: list[str], _peer: Peer | None) -> dict[str, object]:
        await self.plane.in_force()  # so that its numbers are of now
        return self.status()

    async def _list_command(self, _arguments: list[str], _peer: Peer | None) -> Iterator[dict[str, object]]:
        desired = self.discovery.known.desired
        twins = self._twins if self.discovery.name_twins else None
        return (
            row | self._seen(service)
            for service, row in zip(desired.services, reconcile.rows(desired, twins), strict=True)
        )

    def _seen(self, service: reconcile.Service) -> dict[str, object]:
        """What the data plane has seen of a service."""
        seen = self.traffic.of(service.endpoint.host, service.endpoint.port)
        return {
            "state": seen.state,
            "last_dial_at": _when(seen.last_dial or 0),
            "consecutive_failures": seen.failures,
            "problem": seen.problem,
            "flows": seen.live,
            "total_flows": seen.total,
        }

    async def _version_command(self, _arguments: list[str], _peer: Peer | None) -> dict[str, object]:
        return {"version": __version__, "python": sys.version.split()[0], "pid": os.getpid()}

    async def _health_command(self, _arguments: list[str], _peer: Peer | None) -> dict[str, object]:
        return status_document(self.health(), self.endpoint_health())

    async def _refresh_command(self, _arguments: list[str], _peer: Peer | None) -> str:
        await self._round()
        known = self.discovery.known
        if known.problem:
            raise ControlError(known.problem, code=Exit.UNREACHABLE, remedy=known.remedy)
        return f"{len(known.desired.services)} endpoints are served"

    async def _refresh_cert_command(self, arguments: list[str], _peer: Peer | None) -> str:
        force = "--force" in arguments
        self.discovery.refresh_certificate(force=force)
        await self._round()
        known = self.discovery.known
        problem = known.renewal_problem or known.problem
        if problem:
            raise ControlError(f"the certificate was not renewed: {problem}", code=Exit.UNREACHABLE)
        if force:
            return "Certificate renewal forced (check daemon logs)"
        return "Certificate refresh triggered (check daemon logs)"

    async def _set_api_key_command(self, arguments: list[str], _peer: Peer | None) -> str:
        key = arguments[0].strip() if arguments else ""
        if not key:
            raise ControlError("API key required", code=Exit.USAGE)
        problem = config.key_problem(key)
        if problem:
            raise ControlError(f"that cannot be an API key: it {problem}", code=Exit.USAGE)
        if self._key.locked:
            raise PermissionMissingError(
                f"the API key comes from {self._key.source}, so it is changed there",
                remedy="change that file and send SIGHUP, or remove it from the configuration",
            )
        await self._api.check_key(Secret(key))
        path = config.stored_key_path(self.settings)
        await self.machine.run_sync(files.atomic_write, path, key.encode(), 0o600)
        self._find_key()
        await self._round()
        known = self.discovery.known
        if known.problem:
            raise ControlError(f"the key was stored, but: {known.problem}", code=Exit.UNREACHABLE, remedy=known.remedy)
        return "API key set successfully"

    async def _round(self) -> None:
        """Have the API asked now, and wait for the outcome a while."""
        with trio.move_on_after(COMMAND_WAIT_S):
            await self.discovery.ask_now()

    def _find_key(self) -> None:
        self._key = config.resolve_api_key(self.settings, self._environ)
        for text in (self._key.problem, self._key.warning):
            if text:
                log.warning("%s", text)

    async def _reload_command(self, _arguments: list[str], _peer: Peer | None) -> dict[str, object]:
        outcome = await self.reload()
        return {
            "changed": list(outcome.changed),
            "live": list(outcome.live),
            "new_flows": list(outcome.new_flows),
            "needs_restart": list(outcome.needs_restart),
        }

    async def reload(self) -> Outcome:
        """Read the configuration again. Raises NgrokdError for one that is wrong, which changes nothing."""
        self._notifier.reloading()
        try:
            outcome = await self.reloader.reload(self._apply)
        except NgrokdError as error:
            for line in str(error).splitlines():
                self.events.emit("config.refused", f"the configuration was not reloaded: {line}", reason=line)
            raise
        finally:
            self._notifier.ready()
        text = f"configuration reloaded; changed: {', '.join(outcome.changed) or 'nothing'}"
        changed, restart = list(outcome.changed), list(outcome.needs_restart)
        self.events.emit("config.reloaded", text, changed=changed, needs_restart=restart)
        if restart:
            log.warning("these changes need a restart: %s", ", ".join(restart))
        return outcome

    async def _try_reload(self) -> None:
        """For whoever hears nothing of it: a wrong configuration has been logged, and the old one goes on."""
        with contextlib.suppress(NgrokdError):
            await self.reload()

    async def _apply(self, settings: Settings, outcome: Outcome) -> None:
        """Let this configuration hold, of which only live keys differ. What can fail comes first."""
        if self._stopping.is_set():
            raise ControlError("the daemon is stopping", code=Exit.TEMPORARY)
        anchors = await self.machine.run_sync(self._anchors, settings)
        context = await self.machine.run_sync(_api_context, settings)
        if "http.listen" in outcome.live:
            await self._move_web(settings.http.listen)
        for warning in settings.warnings:
            if warning not in self.settings.warnings:
                log.warning("%s", warning)
        self.settings = settings
        if self._log_control is not None and {"log.level", "log.format"} & {*outcome.live}:
            self._log_control.set_level(settings.log.level)
            self.observing.usual_level = settings.log.level
            self._log_control.set_format(settings.log.format)
        self._find_key()
        self._api.configure(context, settings.api.timeout_s)
        self._tell_trust(anchors)
        self._tell_sources()
        limit = self._limits(settings)
        if limit != self._limit:
            self._limit = limit
            self.plane.tell(limit)
        self._resolve_now.set()
        await self.discovery.configure(settings)

    # What it says of itself

    @property
    def state(self) -> str:
        """One word: starting, waiting_for_key, ready, degraded, paused or stopping."""
        known = self.discovery.known
        if self._stopping.is_set():
            return "stopping"
        if known.waiting_for_key:
            return "waiting_for_key"
        if not self.ready.is_set():
            return "starting"
        if self.observing.paused:
            return "paused"
        return "degraded" if self.problems else "ready"

    @property
    def problems(self) -> list[str]:
        """What is wrong now, although we serve: a line each."""
        known = self.discovery.known
        full = "names have no address, because the subnet is full" if known.desired.without_address else ""
        api = [known.problem, known.renewal_problem, known.selectors_problem]
        files_here = [known.hosts_problem, known.state_problem]
        network = [self._network_problem or self.machine.problem, self.plane.problem]
        found = [*api, self._ingress_problem, *files_here, full, *network, self._config_problem]
        return [problem for problem in found if problem]

    @property
    def _config_problem(self) -> str:
        problem = self.reloader.problem
        if not problem:
            return ""
        first, *more = problem.splitlines()
        others = f" (and {len(more)} more)" if more else ""
        return f"the configuration is invalid since {_when(self.reloader.problem_since)}: {first}{others}"

    def conditions(self) -> tuple[Condition, ...]:
        """What must be so for connections to be likely to work, and whether it is."""
        hosts_problem = self.discovery.known.hosts_problem
        tun = self._network_problem or self.plane.problem
        waiting = "" if self.ready.is_set() else "waiting for the endpoints"
        unproven = "" if self._ingress_verified else self._ingress_unproven or "no handshake yet"
        ingress = unproven or self.plane.ingress_problem
        refusing = "stopping" if self._stopping.is_set() else "paused" if self.observing.paused else ""
        return (
            Condition("tun", not tun, tun, vital=True),
            Condition("routes", not self.machine.problem, self.machine.problem, vital=True),
            Condition("names", not (waiting or hosts_problem), waiting or hosts_problem),
            Condition("ingress", not ingress, ingress),
            Condition("accepting", not refusing, refusing),
        )

    def _count_restarts(self) -> dict[str, int]:
        """How often a part was made anew, by its name."""
        restarts = [worker.get("restarts", 0) for worker in self.plane.describe_workers()]
        workers = sum(count for count in restarts if isinstance(count, int))
        return {"device": self._device_restarts, "worker": workers}

    def health(self) -> Health:
        """How we are, for probes."""
        return Health(self.conditions(), self._started_wall, trio.current_time() - self._started_at)

    def endpoint_health(self) -> Iterator[tuple[str, EndpointHealth]]:
        """Each service with the id of the endpoint that stands for it, made one by one."""
        for service in self.discovery.known.desired.services:
            endpoint = service.endpoint
            seen = self.traffic.of(endpoint.host, endpoint.port)
            yield (
                endpoint.id,
                EndpointHealth(
                    name=endpoint.host,
                    local_address=f"{service.address}:{endpoint.port}",
                    target_uri=endpoint.url,
                    connections=seen.live,
                    total_connections=seen.total,
                    last_activity=seen.last_activity,
                    errors=seen.errors,
                ),
            )

    def status(self) -> dict[str, object]:
        """What `status` answers: the Go daemon's fields, then ours. No secret is in it."""
        known, net = self.discovery.known, self.settings.net
        credentials = known.credentials
        answer: dict[str, object] = {
            "registered": bool(known.operator_id),
            "endpoint_count": len(known.desired.services),
            "ingress_endpoint": self._ingress_endpoint(),
        }
        if known.operator_id:
            answer["operator_id"] = known.operator_id
        return answer | {
            "state": self.state,
            "version": __version__,
            "compiled": core_is_compiled(),
            "pid": os.getpid(),
            "started_at": _when(self._started_wall),
            "uptime_s": round(trio.current_time() - self._started_at, 3),
            "interface": self.plane.interface,
            "subnet": net.subnet,
            "subnet6": str(self._twins.subnet6) if self._twins and self.discovery.name_twins else "",
            "api": {
                "url": self.settings.api.url,
                "key_source": self._key.source,
                "key_problem": self._key.problem,
                "waiting_for_key": known.waiting_for_key,
                "auth_failed": known.auth_failed,
                "polled_at": _when(known.polled_at),
                "tried_at": _when(known.tried_at),
                "problem": known.problem,
                "remedy": known.remedy,
                "selectors_problem": known.selectors_problem,
            },
            "certificate": {
                "not_before": _when(credentials.not_before if credentials else 0),
                "not_after": _when(credentials.not_after if credentials else 0),
                "problem": known.renewal_problem,
            },
            "ingress": {
                "endpoint": self._ingress_endpoint(),
                "addresses": list(self._ingress_addresses),
                "problem": self._ingress_problem or self.traffic.last_ingress_problem or self.plane.ingress_problem,
            },
            "hosts": {
                "enabled": self.settings.hosts.enabled,
                "path": self.settings.hosts.path,
                "problem": known.hosts_problem,
            },
            "state_directory": {"path": self.settings.state.directory, "problem": known.state_problem},
            "network": {
                "problem": self._network_problem or self.machine.problem or self.plane.problem,
                "ipv6_problem": self._ipv6_problem,
            },
            "skipped": [{"id": one.id, "url": one.url, "reason": one.reason} for one in known.desired.skipped],
            "without_address": list(known.desired.without_address),
            "from_last_known": known.from_last_known,
            "flows": self.plane.flow_count,
            "pool": self.plane.describe_pool(),
            "workers": self.plane.describe_workers(),
            # Buckets of histograms are for /metrics.
            "counters": {name: count for name, count in self.plane.counters().items() if "#" not in name},
            "conditions": {each.name: {"ok": each.holds, "message": each.message} for each in self.conditions()},
            "paused": self.observing.paused,
            "config": {
                **self.reloader.describe(),
                "loaded_at": _when(self.reloader.loaded_at),
                "invalid_since": _when(self.reloader.problem_since),
            },
        }


@contextlib.contextmanager
def state_lock(directory: str) -> Iterator[None]:
    """Hold the state directory for this process. Raises TakenError naming who has it, StateError."""
    files.ensure_private_directory(directory)
    lock = files.Lock(os.path.join(directory, "lock"), "ngrokd")
    try:
        lock.acquire()
    except TakenError as error:
        raise TakenError(
            f"the state directory {directory} belongs to {files.lock_owner(lock.path) or 'another process'}",
            remedy="stop it, or give this daemon a state.directory of its own",
        ) from error
    try:
        yield
    finally:
        lock.release()


def _when(wall: float) -> str | None:
    """RFC 3339 in UTC, whole seconds; None for 0, which stands for never."""
    return format_time(wall) if 0 < wall < math.inf else None


def _api_context(settings: Settings) -> ssl.SSLContext:
    """How the API is verified. Raises ConfigError."""
    return api_ssl_context(_read_ca("api.ca_file", settings.api.ca_file) or None)


def _read_ca(key: str, path: str) -> bytes:
    """The PEM text of a configured CA file. Raises ConfigError: a missing anchor must not go unnoticed."""
    if not path:
        return b""
    try:
        return files.read_limited(path, MAX_CA_BYTES)
    except (FileNotFoundError, StateError) as error:
        raise ConfigError(
            f"{key}: cannot read {path}: {error}", remedy="put the CA's certificate there, as PEM"
        ) from None


def _directory_certificates(directory: str) -> Iterator[bytes]:
    """The files of a directory of CA certificates. What cannot be read there is skipped: it adds trust, no more."""
    try:
        names = sorted(os.listdir(directory))
    except OSError:
        return
    for name in names:
        with contextlib.suppress(FileNotFoundError, StateError):
            yield files.read_limited(os.path.join(directory, name), MAX_CA_BYTES) + b"\n"


def _only_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one error of a group that came from one place; else the group."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error
