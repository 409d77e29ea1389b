"""The real machine, Linux: sockets, netlink and the TUN device, behind `ngrokd.daemon.Machine`."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv6Network
from typing import Any, Final

import trio

from ngrokd.config import Settings
from ngrokd.daemon.ipv6 import Answer
from ngrokd.errors import Exit, NgrokdError
from ngrokd.host import linux
from ngrokd.host.claims import claim_interface
from ngrokd.host.plan import ADDRESS, DEVICE, GUARD, KERNEL, LINK, ROUTE, Action, Network, Plan, Step
from ngrokd.host.planning import link_mtu, missing_for_ipv6, plan_run
from ngrokd.names.twins import Twins
from ngrokd.relay.transport import Transport, connect_tcp
from tun import Device, DeviceError, open_device

log = logging.getLogger("ngrokd.machine")

# What others changed and could not be restored is tried again this often, whether or not the kernel reports something.
PUT_BACK_AGAIN_S: Final = 5.0


class DeviceRefusedError(NgrokdError):
    """The TUN device cannot be opened."""

    exit_code = Exit.CANNOT_CREATE


class LinuxMachine:
    """See `ngrokd.daemon.daemon.Machine`. One interface, for one daemon."""

    def __init__(self) -> None:
        hostname = socket.gethostname()
        # The fully qualified name is not looked up, because nothing waits for a name server; where it matters it
        # stands in the hosts file, whose names are never taken over.
        self.names: tuple[str, ...] = tuple(dict.fromkeys((hostname, hostname.partition(".")[0])))
        self._plan: Plan | None = None
        self._device: Device | None = None
        self._claim: socket.socket | None = None
        self._addresses: frozenset[bytes] = frozenset()
        self._claimed: tuple[Network, ...] = ()
        self._mtu = 0
        self._index = 0  # of the interface, whatever its name is now
        self._wants_ipv6 = False
        self.problem = ""
        self.ipv6_problem = ""

    @property
    def descriptors(self) -> int:
        """The limit of open files."""
        return resource.getrlimit(resource.RLIMIT_NOFILE)[0]

    def wall(self) -> float:
        """The wall clock, Unix seconds."""
        return time.time()

    async def run_sync(self, function: Callable[..., Any], /, *args: Any) -> Any:
        """In a thread. Cancelled, it waits for the function all the same: half-written files help nobody."""
        return await trio.to_thread.run_sync(function, *args)

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """A TCP stream to the API."""
        return await trio.open_tcp_stream(host, port)

    async def dial(self, address: str, port: int) -> Transport:
        """A TCP connection to the ingress."""
        return await connect_tcp(address, port)

    async def resolve(self, host: str, port: int) -> tuple[str, ...]:
        """The system's answer, in its order (RFC 6724)."""
        found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))

    async def knock(self, address: str, port: int) -> Answer:
        """Ask for a connection over IPv6, and say what came of it."""
        try:
            with trio.socket.socket(socket.AF_INET6) as knock:
                # Where the kernel leads it elsewhere, it ends at the first router.
                knock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_UNICAST_HOPS, 1)
                await knock.connect((address, port))
        except OSError as error:
            return Answer.of(error)
        return Answer.NO_WAY

    def signals(self) -> contextlib.AbstractContextManager[AsyncIterator[int]]:
        """TERM, INT and HUP."""
        return trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    # Link, routes and device

    def prepare(self, settings: Settings, twins: Twins | None = None) -> Device:
        """Check what can be checked without changing anything, then do the plan.

        What the kernel refuses of IPv6 costs nothing but that. Only where somebody has configured its network does it
        matter who else claims it.
        """
        net = settings.net
        linux.check_rights(configure=net.configure)
        self._claim = claim_interface(net.interface)
        try:
            self._mtu = link_mtu(settings, "linux")
            plan = self._make_plan(settings, twins.subnet6 if twins is not None else None)
            claimed = plan if net.subnet6 != "auto" else plan.of_version(4)
            self._claimed = claimed.subnets
            self._wants_ipv6 = twins is not None
            for shadow in linux.check_free(claimed).shadows:
                log.warning("%s is wider than ours and loses %s to this daemon", shadow, net.subnet)
            linux.apply(plan.of_version(4), {DEVICE: Action(self._open, self._close)})
            self._plan = plan
            self._ensure_ipv6()
            # All that has been imported by now stays to the end: collections, which hold up every packet for as long as
            # they take, need not walk over it.
            gc.freeze()
            self._addresses = linux.host_addresses()
        except BaseException:
            self.restore()
            raise
        assert self._device is not None
        return self._device

    def _make_plan(self, settings: Settings, subnet6: IPv6Network | None) -> Plan:
        # The rest of the plan is for others: state_lock, the sockets, and names/hosts.py with discovery.
        return plan_run(settings, "linux", subnet6=subnet6).steps.only(*KERNEL)

    def _open(self, step: Step) -> bool:
        try:
            self._device = open_device(step.text("interface"), offload=bool(step.number("offload")), mtu=self._mtu)
        except DeviceError as error:
            raise DeviceRefusedError(str(error), remedy=error.remedy) from error
        with contextlib.suppress(OSError):  # deleted already, which the pump is about to see
            self._index = socket.if_nametoindex(step.text("interface"))
        return True

    def _close(self, _step: Step) -> bool:
        if self._device is None:
            return False
        self._device.close()
        self._device = None
        return True

    def reopen(self) -> Device:
        """Open the device anew under the same name, and configure it as before."""
        assert self._plan is not None
        self._close(self._plan.steps[0])
        for step in self._plan.only(DEVICE):
            self._open(step)
        self._ensure(self._plan.only(GUARD, LINK, ADDRESS, ROUTE))
        assert self._device is not None
        return self._device

    def restore(self) -> None:
        """Undo the plan, whatever of it is still in force."""
        try:
            if self._plan is not None:
                undone = linux.undo(self._plan, {DEVICE: Action(self._open, self._close)})
                for problem in undone.problems:
                    log.error("%s%s", problem, f"; {problem.remedy}" if problem.remedy else "")
        except NgrokdError as error:
            log.error("what was changed on this machine could not be undone: %s", error)
        if self._claim is not None:
            self._claim.close()

    # What changes by itself

    def addresses(self) -> frozenset[bytes] | None:
        """The addresses of this host as last seen."""
        return self._addresses

    async def watch(self, changed: Callable[[], None]) -> None:
        """Follow the kernel's changes: addresses of this host, and what is done to our link, address and routes.

        `changed` is called after either.
        """
        assert self._plan is not None
        disturbed = trio.Event()

        def note_addresses(addresses: frozenset[bytes]) -> None:
            self._addresses = addresses
            changed()

        def note_disturbance() -> None:
            disturbed.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, self._plan, note_addresses, note_disturbance)
            while True:
                # That IPv6 was switched on again is told to nobody who does not ask.
                with trio.move_on_after(PUT_BACK_AGAIN_S if self.problem or self.ipv6_problem else math.inf):
                    await disturbed.wait()
                if not disturbed.is_set() and not self.problem and self._ipv6_obstacle():
                    continue  # nothing is new
                disturbed = trio.Event()
                await self._put_back()
                changed()

    async def _put_back(self) -> None:
        """Restore what others changed of ours, and see whether somebody else has come to claim our subnet."""
        assert self._plan is not None
        ours = self._plan.only(GUARD, LINK, ADDRESS, ROUTE)
        problem = ""
        try:
            # A deleted interface is the data plane's to notice; it asks for `reopen`, which is seen here again.
            for step in await self.run_sync(self._ensure, ours):
                log.warning("somebody changed what this daemon needs; restored: %s", step)
            for subnet in self._claimed:
                judgement = await self.run_sync(linux.find_conflicts, subnet, ours.interface)
                if judgement.conflicts:
                    problem = f"{subnet} is claimed by others too: {', '.join(map(str, judgement.conflicts))}"
        except NgrokdError as error:
            problem = str(error)
        if problem != self.problem:
            self.problem = problem
            if problem:
                log.warning("%s", problem)
            else:
                log.info("link, address and routes are as they should be again")

    def _ensure(self, ours: Plan) -> list[Step]:
        """Restore what is no longer in force. What somebody has taken of one version does not cost the other."""
        if ours.steps and self._index and linux.rename_back(self._index, ours.interface):
            log.warning("somebody renamed the interface; it is %s again", ours.interface)
        restored: list[Step] = []
        try:
            restored = linux.ensure(ours.of_version(4))
        finally:
            restored += self._ensure_ipv6()
        return restored

    def _ensure_ipv6(self) -> list[Step]:
        """Restore what IPv6 needs, or note why it cannot be. Switching it off and on again is nobody's mistake."""
        assert self._plan is not None
        steps = self._plan.only(GUARD, ADDRESS, ROUTE).of_version(6)
        before, problem = self.ipv6_problem, self._ipv6_obstacle()
        restored: list[Step] = []
        if steps and not problem:
            try:
                restored = linux.ensure(steps)
            except NgrokdError as error:
                problem = str(error)
        self.ipv6_problem = problem  # read on the loop while this runs in a thread
        return [] if before or problem else restored

    def _ipv6_obstacle(self) -> str:
        assert self._plan is not None
        return missing_for_ipv6(self._mtu, self._plan.interface) if self._wants_ipv6 else ""


async def _watch(plan: Plan, on_addresses: Callable[[frozenset[bytes]], None], on_ours: Callable[[], None]) -> None:
    await linux.watch(plan, on_addresses=on_addresses, on_ours=on_ours, on_foreign=on_ours)
