"""From the configuration to the plan of a run, for either system on either system, without rights.

`run` applies the steps that are here, `plan` prints them and `cleanup` undoes them: one value, so that what is printed
is what happens. Nothing here touches the machine but to read one small file.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Final, Literal

from ngrokd import files
from ngrokd.config import Settings
from ngrokd.errors import StateError
from ngrokd.host.macos import MTU as MTU_OF_MACOS
from ngrokd.host.macos import UTUN, macos_plan
from ngrokd.host.plan import ADDRESS, GUARD, LINK, ROUTE, Plan, linux_plan

Platform = Literal["linux", "macos"]

SUBNET6: Final = "subnet6"  # the file of the state directory in which our own IPv6 network is kept
LOCAL: Final = IPv6Network("fd00::/8")  # RFC 4193, the half that is for making one's own
# Offload makes the MTU irrelevant for speed; without it every packet costs a system call, and the largest is best.
MTU_WITH_OFFLOAD: Final = 1500
MTU_WITHOUT_OFFLOAD: Final = 65535
IPV6_LEAST_MTU: Final = 1280  # RFC 8200 5; the kernel takes IPv6 away from a smaller link


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What `run` does, and what it leaves to others.

    Attributes:
        platform: for which system.
        steps: what the daemon does, in this order, and undoes in the opposite one.
        left: what an administrator does where `net.configure` is false, once the device is there; else empty.
        notes: what the plan cannot say yet, and why; a sentence each.
    """

    platform: Platform
    steps: Plan
    left: Plan
    notes: tuple[str, ...] = ()

    @property
    def whole(self) -> Plan:
        """Everything, whoever does it."""
        return Plan((*self.steps.steps, *self.left.steps))


def plan_run(
    settings: Settings, platform: Platform, *, subnet6: IPv6Network | None, notes: tuple[str, ...] = ()
) -> RunPlan:
    """What a run with this configuration changes.

    Args:
        settings: the configuration.
        platform: the system it runs on.
        subnet6: the names' IPv6 network, None for none; see `expected_subnet6`.
        notes: handed on.
    """
    net, subnet, mtu = settings.net, IPv4Network(settings.net.subnet), link_mtu(settings, platform)
    hosts_path = settings.hosts.path if settings.hosts.enabled else ""
    if platform == "linux":
        plan = linux_plan(
            net.interface,
            subnet,
            mtu,
            subnet6=subnet6,
            offload=net.offload,
            hosts_path=hosts_path,
            state_directory=settings.state.directory,
            control_socket=settings.control.socket,
            http_listen=settings.http.listen,
        )
    else:
        if not UTUN.fullmatch(net.interface):
            notes = (*notes, "utunN stands for the next number that is free; it is known when the daemon has started")
        plan = macos_plan(
            net.interface,
            subnet,
            mtu,
            subnet6=subnet6,
            hosts_path=hosts_path,
            state_directory=settings.state.directory,
            control_socket=settings.control.socket,
            http_listen=settings.http.listen,
        )
    if net.configure:
        return RunPlan(platform, plan, Plan(()), notes)
    theirs = (GUARD, LINK, ADDRESS, ROUTE)
    return RunPlan(platform, plan.without(*theirs), plan.only(*theirs), notes)


def link_mtu(settings: Settings, platform: Platform) -> int:
    """The MTU of the link, bytes: the configured one, else the best."""
    if settings.net.mtu:
        return settings.net.mtu
    if platform == "macos":
        return MTU_OF_MACOS
    return MTU_WITH_OFFLOAD if settings.net.offload else MTU_WITHOUT_OFFLOAD


def expected_subnet6(settings: Settings, *, here: bool) -> tuple[IPv6Network | None, tuple[str, ...]]:
    """The IPv6 network that a run would use, as far as it can be known without making one, and what to say about it.

    Args:
        settings: the configuration.
        here: whether it is this machine that would run it; then what it lacks for IPv6 counts.
    """
    wanted = settings.net.subnet6
    if wanted == "off":
        return None, ()
    if here and (missing := missing_for_ipv6(link_mtu(settings, "linux"), settings.net.interface)):
        return None, (f"names get no IPv6 addresses: {missing}",)
    if wanted != "auto":
        return IPv6Network(wanted), ()
    path = os.path.join(settings.state.directory, SUBNET6)
    try:
        return read_subnet6(path), ()
    except FileNotFoundError:
        when = "is made at random at the first start and kept in"
    except (StateError, ValueError):
        when = "cannot be read from here; it is kept in"
    return None, (f'the steps for IPv6 are missing: the network (net.subnet6 = "auto") {when} {path}',)


def read_subnet6(path: str) -> IPv6Network:
    """The IPv6 network that a former start made and kept.

    Raises:
        FileNotFoundError: there is none yet.
        StateError: the file cannot be read.
        ValueError: it holds something else.
    """
    text = files.read_limited(path, 100).decode("ascii").strip()
    network = IPv6Network(text)
    if network.prefixlen != 64 or not network.subnet_of(LOCAL):
        raise ValueError(f"{network} is no local /64")
    return network


def missing_for_ipv6(mtu: int, interface: str) -> str:
    """Why a link of this machine (Linux) cannot have IPv6 addresses, as far as a look at some files tells, or "".

    Args:
        mtu: of the link, bytes.
        interface: its name; one that is not there yet is judged as a new one.
    """
    if mtu < IPV6_LEAST_MTU:
        return f"net.mtu is {mtu}, and IPv6 needs {IPV6_LEAST_MTU}"
    if not os.path.isdir("/proc/sys/net"):
        return ""  # hidden from us (ProcSubset=pid of systemd): it will be seen when the kernel refuses
    if not os.path.isdir("/proc/sys/net/ipv6"):
        return "this kernel has no IPv6"
    own = _disable_ipv6(interface)
    if own == "0":
        return ""  # the other two are copied into it, when "all" is set and when the link is made
    for name in ("all", "default"):
        if _disable_ipv6(name) not in ("0", ""):
            return f"net.ipv6.conf.{name}.disable_ipv6 is set"
    return f"net.ipv6.conf.{interface}.disable_ipv6 is set" if own else ""


def _disable_ipv6(name: str) -> str:
    try:
        with open(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""
