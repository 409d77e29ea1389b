"""The real machine, Linux: sockets, netlink and the TUN device, behind `ngrokd.daemon.Machine`."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from ipaddress import IPv4Network
from typing import Any, Final

import trio

from ngrokd.config import Settings
from ngrokd.errors import Exit, NgrokdError, TakenError
from ngrokd.host import linux
from ngrokd.host.plan import ADDRESS, DEVICE, GUARD, LINK, ROUTE, Action, Plan, Step, linux_plan
from ngrokd.relay.transport import Transport, connect_tcp
from tun import Device, DeviceError, open_device

log = logging.getLogger("ngrokd.machine")

# Offload makes the MTU irrelevant for speed; without it every packet costs a system call, and the largest is best.
MTU_WITH_OFFLOAD: Final = 1500
MTU_WITHOUT_OFFLOAD: Final = 65535
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
        self._mtu = 0
        self.problem = ""

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

    def signals(self) -> contextlib.AbstractContextManager[AsyncIterator[int]]:
        """TERM, INT and HUP."""
        return trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

    # Link, routes and device

    def prepare(self, settings: Settings) -> Device:
        """Check what can be checked without changing anything, then do the plan."""
        net = settings.net
        linux.check_rights(configure=net.configure)
        self._claim = _claim_interface(net.interface)
        try:
            self._mtu = net.mtu or (MTU_WITH_OFFLOAD if net.offload else MTU_WITHOUT_OFFLOAD)
            plan = linux_plan(
                net.interface,
                IPv4Network(net.subnet),
                self._mtu,
                offload=net.offload,
                hosts_path="",  # names/hosts.py knows what goes in there, and discovery when
                configure=net.configure,
            )
            for shadow in linux.check_free(plan).shadows:
                log.warning("%s is wider than ours and loses %s to this daemon", shadow, net.subnet)
            linux.apply(plan, {DEVICE: Action(self._open, self._close)})
            # All that has been imported by now stays to the end: collections, which hold up every packet for as long as
            # they take, need not walk over it.
            gc.freeze()
            self._plan = plan
            self._addresses = linux.host_addresses()
        except BaseException:
            self.restore()
            raise
        assert self._device is not None
        return self._device

    def _open(self, step: Step) -> bool:
        try:
            self._device = open_device(step.text("interface"), offload=bool(step.number("offload")), mtu=self._mtu)
        except DeviceError as error:
            raise DeviceRefusedError(str(error), remedy=error.remedy) from error
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
        linux.ensure(self._plan.only(GUARD, LINK, ADDRESS, ROUTE))
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
        """Follow the kernel's changes: addresses of this host, and what is done to our link, address and routes."""
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
                with trio.move_on_after(PUT_BACK_AGAIN_S if self.problem else math.inf):
                    await disturbed.wait()
                disturbed = trio.Event()
                await self._put_back()

    async def _put_back(self) -> None:
        """Restore what others changed of ours, and see whether somebody else has come to claim our subnet."""
        assert self._plan is not None
        ours = self._plan.only(GUARD, LINK, ADDRESS, ROUTE)
        problem = ""
        try:
            # A deleted interface is the data plane's to notice; it asks for `reopen`, which is seen here again.
            for step in await self.run_sync(linux.ensure, ours):
                log.warning("somebody changed what this daemon needs; restored: %s", step)
            for subnet in ours.subnets:
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


async def _watch(plan: Plan, on_addresses: Callable[[frozenset[bytes]], None], on_ours: Callable[[], None]) -> None:
    await linux.watch(plan, on_addresses=on_addresses, on_ours=on_ours, on_foreign=on_ours)


def _claim_interface(interface: str) -> socket.socket:
    """Hold the name of an interface for this process, as long as the socket is open. Raises TakenError.

    An abstract socket lives in the network namespace, as the interface does, and leaves nothing behind (unix(7)).
    """
    claim = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    name = f"\0ngrokd/{interface}"
    try:
        claim.bind(name)
        claim.listen(1)
    except OSError as error:
        claim.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise TakenError(
            f"interface {interface} belongs to another ngrokd{_holder(name)}",
            remedy="stop it, or give this one an interface, subnet, state directory, socket and http port of its own",
        ) from None
    return claim


def _holder(name: str) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.settimeout(1.0)
            probe.connect(name)
            pid = struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        except OSError:
            return ""
    return f", process {pid}" if pid and pid != os.getpid() else ""
