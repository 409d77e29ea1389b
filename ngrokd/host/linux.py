"""The plan on Linux: links, addresses and routes by netlink, and the watch over them.

pyroute2 takes 40 ms and 4 MB to import, although `netlink` leaves most of it out, and runs an event loop of its own
underneath, bound to the thread that uses it. So it is imported inside the functions of this module, and every function
opens one `IPRoute`, does all it has to, and closes it: about 2 ms. Such a function may be called directly, at start and
shutdown, or in a thread; none keeps anything between calls. What has to wait, `watch`, reads a netlink socket of Trio's
own and only decodes with pyroute2.

The kernel is the state. Whether a step is in force is always asked, never remembered, so a daemon that was killed, a
second one and an administrator with `ip` all see, and can change, the same thing.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Any, Final, NoReturn, cast

import trio

from ngrokd.errors import NgrokdError, PermissionMissingError, TakenError
from ngrokd.host import plan as plans
from ngrokd.host.conflicts import (
    TABLE_MAIN,
    TYPE_UNREACHABLE,
    Address,
    Facts,
    Judgement,
    Link,
    Route,
    Rule,
    inside,
    judge,
    propose_subnet,
)
from ngrokd.host.plan import (
    ADDRESS,
    GUARD,
    LINK,
    ROUTE,
    Action,
    HostError,
    IPAddress,
    Network,
    Plan,
    Step,
    Undone,
)

if TYPE_CHECKING:
    from ngrokd.host.netlink import IPRoute

_CAP_NET_ADMIN: Final = 12
_RT_SCOPE_LINK: Final = 253
_RTM_F_CLONED: Final = 0x200  # an entry of a cache, not of a table
# In a deletion: whatever scope (RT_SCOPE_NOWHERE) and origin (RTPROT_UNSPEC) the route has; a person may have typed it.
_ANY: Final = {"scope": 255, "proto": 0}
_ADDR_GEN_NONE: Final = 1
_IFF_UP: Final = 1
_TUN_TYPE_TUN: Final = 1
_TUN_DEVICE: Final = "/dev/net/tun"
# A process that is being killed still holds its device for a moment.
_DYING_S: Final = 1.0

# linux/netlink.h, linux/rtnetlink.h
_NLMSG = struct.Struct("=IHHII")
_NLMSG_ERROR: Final = 2
_RTM_SETLINK: Final = 19
_RTM_NEWLINK, _RTM_DELLINK, _RTM_NEWADDR, _RTM_DELADDR, _RTM_NEWROUTE, _RTM_DELROUTE = 16, 17, 20, 21, 24, 25
_RTM_NEWRULE, _RTM_DELRULE = 32, 33
# Link; address, route and rule of IPv4; the same of IPv6.
_GROUPS: Final = 0x1 | 0x10 | 0x40 | 0x80 | 0x100 | 0x400 | 0x40000
_RECEIVE_BUFFER: Final = 1 << 20
_DATAGRAM_MAX: Final = 1 << 17
_BATCH: Final = 1000
_COALESCE_S: Final = 0.05
_AGAIN_S: Final = 1.0


# --- rights ---


@dataclass(frozen=True, slots=True)
class MissingRight:
    """A right that is missing: which, how we know, and how to get it."""

    what: str
    reason: str
    remedy: str


def missing_rights(*, configure: bool = True) -> list[MissingRight]:
    """Say what this process lacks to open a TUN device and, with `configure`, to set up links and routes.

    What is asked is the right itself, never the user id: root in a container may lack it, and a user with
    CAP_NET_ADMIN has it.
    """
    missing: list[MissingRight] = []
    how = (
        "start it with sudo; or give it the capability: AmbientCapabilities=CAP_NET_ADMIN in a systemd unit,"
        " --cap-add=NET_ADMIN for a container"
    )
    if not _effective_capabilities() >> _CAP_NET_ADMIN & 1:
        missing.append(MissingRight("CAP_NET_ADMIN", "the process does not have this capability", how))
    elif configure and (reason := _network_refused()):
        missing.append(MissingRight("CAP_NET_ADMIN", f"it does not hold for this network namespace ({reason})", how))
    try:
        os.close(os.open(_TUN_DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        missing.append(MissingRight(_TUN_DEVICE, error.strerror or str(error), _tun_remedy(error.errno or 0)))
    return missing


def check_rights(*, configure: bool = True) -> None:
    """Raise PermissionMissingError when something of `missing_rights` is missing, and HostError on another system."""
    if sys.platform != "linux":
        raise HostError(
            f"cannot set up the network: this version does not know how on {sys.platform}", remedy="run it on Linux"
        )
    if missing := missing_rights(configure=configure):
        raise PermissionMissingError(
            "cannot set up the network: " + "; ".join(f"{right.what}: {right.reason}" for right in missing),
            remedy="; ".join(dict.fromkeys(right.remedy for right in missing)),
        )


def _tun_remedy(number: int) -> str:
    if number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        return "load the driver with: modprobe tun; a container needs --device /dev/net/tun"
    if number == errno.EPERM:
        return "allow the device: DeviceAllow=/dev/net/tun rw in a systemd unit, --device /dev/net/tun for a container"
    return "start it with sudo, or give it access to /dev/net/tun"


def _effective_capabilities() -> int:
    try:
        with open("/proc/self/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("CapEff:"):
                    return int(line.split()[1], 16)
    except OSError:
        pass
    return -1 if os.geteuid() == 0 else 0  # no /proc: then the user id is the best guess


def _network_refused() -> str:
    """Ask the kernel to change a link that cannot exist: the answer is "no such device", or a refusal."""
    if sys.platform != "linux":
        return ""
    request = _NLMSG.pack(_NLMSG.size + 16, _RTM_SETLINK, 1 | 4, 1, 0) + struct.pack("=BxHiII", 0, 0, 0x7FFFFFFF, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as asked:
            asked.settimeout(1)
            asked.send(request)
            answer = asked.recv(4096)
    except OSError as error:
        return error.strerror or str(error)
    if len(answer) < 20 or _NLMSG.unpack_from(answer)[1] != _NLMSG_ERROR:
        return ""
    number = -struct.unpack_from("=i", answer, _NLMSG.size)[0]
    return os.strerror(number) if number in (errno.EPERM, errno.EACCES) else ""


# --- is it free? ---


def check_free(plan: Plan) -> Judgement:
    """Make sure, before anything is changed, that interface and subnets of the plan are nobody else's.

    Returns: the judgement, whose shadows are worth a warning.

    Raises:
        TakenError: they are; the owner is named, and a free subnet proposed.
    """
    with _iproute() as ipr:
        if plan.interface:
            _check_interface(ipr, plan.interface)
        facts = _facts(ipr)
    shadows: list[Any] = []
    for subnet in plan.subnets:
        judgement = judge(subnet, plan.interface, facts)
        if judgement.conflicts:
            raise TakenError(
                f"{subnet} is taken: " + _listed([str(conflict) for conflict in judgement.conflicts]),
                remedy=next((c.remedy for c in judgement.conflicts if c.remedy), "") or _other_subnet(subnet, facts),
            )
        shadows += judgement.shadows
    return Judgement((), tuple(shadows))


def find_conflicts(subnet: Network, interface: str) -> Judgement:
    """Say who else has a claim on `subnet`; routes, addresses and the guard of our own interface are none."""
    with _iproute() as ipr:
        return judge(subnet, interface, _facts(ipr))


def kind_of(interface: str) -> str:
    """The kernel's word for the kind of a link ("dummy", "tun", ...); "" for hardware, and when there is none."""
    with _iproute() as ipr:
        link = _link(ipr, interface)
        return "" if link is None else _kind(link)[0]


def delete_dummy(interface: str) -> bool:
    """Delete a link of kind dummy. Returns whether there was one; any other kind is left alone."""
    with _iproute() as ipr:
        link = _link(ipr, interface)
        if link is None or _kind(link)[0] != "dummy":
            return False
        with _refused_as(f"to delete {interface}"):
            return not _gone(lambda: ipr.link("del", index=link["index"]))


def check_interface(interface: str) -> None:
    """Make sure that `interface` is missing, or a TUN device that nobody holds.

    Raises:
        TakenError: it is something else, or held; says by whom.
    """
    with _iproute() as ipr:
        _check_interface(ipr, interface)


def _check_interface(ipr: IPRoute, interface: str) -> None:
    give_up = time.monotonic() + _DYING_S
    while True:
        link = _link(ipr, interface)
        if link is None:
            return
        kind, data = _kind(link)
        if kind != "tun" or _attribute(data, "IFLA_TUN_TYPE", _TUN_TYPE_TUN) != _TUN_TYPE_TUN:
            what = "TAP" if kind == "tun" else kind or "hardware"
            raise TakenError(
                f"interface {interface} exists and is no TUN device ({what})",
                remedy="set net.interface to another name",
            )
        owners = _tun_owners().get(interface, [])
        if owners:
            raise TakenError(
                f"interface {interface} is held by {_listed(owners)}",
                remedy="stop it, or set net.interface, net.subnet and state.directory to others",
            )
        held = _attribute(data, "IFLA_TUN_NUM_QUEUES", 0) or _attribute(link, "IFLA_CARRIER", 0)
        if not held:
            return
        if time.monotonic() >= give_up:
            raise TakenError(
                f"interface {interface} is held by a process that cannot be seen from here",
                remedy="stop it, or set net.interface to another name",
            )
        time.sleep(0.02)


def other_subnet(subnet: Network) -> str:
    """What to do when a subnet is taken, with one that is free."""
    with _iproute() as ipr:
        return _other_subnet(subnet, _facts(ipr))


def _other_subnet(subnet: Network, facts: Facts) -> str:
    free = propose_subnet(subnet, facts.networks()) if isinstance(subnet, IPv4Network) else None
    if subnet.version == 6:
        return 'set net.subnet6 to a free one, or to "auto" or "off"'
    return f'set net.subnet to a free one, for example "{free}"' if free else "set net.subnet to a free one"


def _facts(ipr: IPRoute) -> Facts:
    owners = None
    links: dict[int, Link] = {}
    for message in ipr.get_links():
        name, kind = str(_attribute(message, "IFLA_IFNAME", "?")), _kind(message)[0]
        owner = ""
        if kind == "tun":
            owners = _tun_owners() if owners is None else owners
            owner = _listed(owners.get(name, []))
        links[message["index"]] = Link(message["index"], name, kind, owner)
    addresses = tuple(
        Address(address, message["prefixlen"], message["index"])
        for message in ipr.get_addr()
        if (address := _local_address(message)) is not None
    )
    routes = [_route_fact(m) for family in (socket.AF_INET, socket.AF_INET6) for m in _dump_routes(ipr, family)]
    rules = [_rule_fact(m) for family in (socket.AF_INET, socket.AF_INET6) for m in _dump_rules(ipr, family)]
    return Facts(links, addresses, tuple(routes), tuple(rules))


# A kernel without IPv6, or without policy routing, does not know the question.
_NOT_THERE: Final = frozenset({errno.EAFNOSUPPORT, errno.EOPNOTSUPP})


def _dump_routes(ipr: IPRoute, family: int, **match: int) -> list[Any]:
    routes = _known(lambda: ipr.get_routes(family=family, **match))
    return [message for message in routes if not message["flags"] & _RTM_F_CLONED]


def _dump_rules(ipr: IPRoute, family: int) -> list[Any]:
    return [message for message in _known(lambda: ipr.get_rules(family=family)) if message["family"] == family]


def _known(dump: Callable[[], Iterable[Any]]) -> list[Any]:
    from ngrokd.host.netlink import NetlinkError

    try:
        return list(dump())
    except NetlinkError as error:
        if error.code not in _NOT_THERE:
            raise
        return []


def _route_fact(message: Any) -> Route:
    bits = 32 if message["family"] == socket.AF_INET else 128
    nothing = "0.0.0.0" if bits == 32 else "::"
    destination = ip_network(f"{_attribute(message, 'RTA_DST', nothing)}/{message['dst_len']}", strict=False)
    gateways, index = [], _attribute(message, "RTA_OIF", 0)
    for hop in [message, *(_attribute(message, "RTA_MULTIPATH", None) or [])]:
        via = _attribute(hop, "RTA_GATEWAY", None)
        if via is not None:
            gateways.append(ip_address(via))
        if not index and "oif" in hop:
            index = hop["oif"]
    return Route(
        destination,
        index=index,
        table=_attribute(message, "RTA_TABLE", message["table"]),
        metric=_attribute(message, "RTA_PRIORITY", 0),
        type=message["type"],
        protocol=message["proto"],
        gateways=tuple(gateways),
    )


# What makes a rule hold for some connections only (linux/fib_rules.h).
_SELECTORS: Final = (
    "FRA_FWMARK",
    "FRA_IIFNAME",
    "FRA_OIFNAME",
    "FRA_SRC",
    "FRA_TUN_ID",
    "FRA_L3MDEV",
    "FRA_UID_RANGE",
    "FRA_IP_PROTO",
    "FRA_SPORT_RANGE",
    "FRA_DPORT_RANGE",
)
_FIB_RULE_INVERT: Final = 2


def _rule_fact(message: Any) -> Rule:
    suppress = _attribute(message, "FRA_SUPPRESS_PREFIXLEN", 0xFFFFFFFF)
    destination = _attribute(message, "FRA_DST", None)
    selective = any(_attribute(message, name, None) not in (None, 0) for name in _SELECTORS) or bool(message["tos"])
    if message["flags"] & _FIB_RULE_INVERT:
        # "not fwmark X", as wg-quick and others have it, means everybody but the VPN itself.
        selective = not selective
    return Rule(
        priority=_attribute(message, "FRA_PRIORITY", 0),
        table=_attribute(message, "FRA_TABLE", message["table"]),
        action=message["action"],
        selective=selective,
        suppress=-1 if suppress == 0xFFFFFFFF else suppress,
        destination=ip_network(f"{destination}/{message['dst_len']}", strict=False) if destination else None,
        version=4 if message["family"] == socket.AF_INET else 6,
    )


def _tun_owners() -> dict[str, list[str]]:
    """Who holds which TUN device, as far as /proc shows: interface -> "process 123 (name)". Ourselves we leave out.

    Only processes of this network count: a container's ngrokd0 is another one.
    """
    owners: dict[str, list[str]] = {}
    try:
        network, pids = os.readlink("/proc/thread-self/ns/net"), os.listdir("/proc")
    except OSError:
        return owners
    for pid in filter(str.isdigit, pids):
        if int(pid) == os.getpid():
            continue
        with suppress(OSError):
            if os.readlink(f"/proc/{pid}/ns/net") != network:
                continue
            for fd in os.listdir(f"/proc/{pid}/fd"):
                if not os.readlink(f"/proc/{pid}/fd/{fd}").endswith("/net/tun"):
                    continue
                with open(f"/proc/{pid}/fdinfo/{fd}", encoding="utf-8", errors="replace") as file:
                    names = [line[4:].strip() for line in file if line.startswith("iff:")]
                with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
                    comm = "".join(letter if letter.isprintable() else "?" for letter in file.read().strip())
                for name in names:
                    owner = f"process {pid} ({comm})"
                    if owner not in owners.setdefault(name, []):
                        owners[name].append(owner)
    return owners


def _listed(words: list[str]) -> str:
    return ", ".join(words[:3]) + (f" and {len(words) - 3} more" if len(words) > 3 else "")


def in_force(plan: Plan) -> Plan:
    """The part of the plan that holds on this machine now, whoever made it so. Needs no rights.

    A device counts while its link exists; steps that are not the kernel's are left out.
    """
    with _iproute() as ipr:
        facts = _facts(ipr)
        link = _link(ipr, plan.interface) if plan.interface else None
    return Plan(tuple(step for step in plan if step.kind in plans.KERNEL and _holds(step, facts, link)))


def _holds(step: Step, facts: Facts, link: Any) -> bool:
    if step.kind == GUARD:
        subnet, metric = ip_network(step.text("subnet")), step.number("metric")
        guards = (r for r in facts.routes if r.type == TYPE_UNREACHABLE and r.metric == metric)
        return any(route.destination == subnet for route in guards)
    index = next((link.index for link in facts.links.values() if link.name == step.text("interface")), None)
    if index is None:
        return False
    if step.kind == ADDRESS:
        address = ip_interface(step.text("address"))
        mine = (one for one in facts.addresses if one.index == index and one.address == address.ip)
        return any(one.prefix_length == address.network.prefixlen for one in mine)
    if step.kind == ROUTE:
        subnet = ip_network(step.text("subnet"))
        return any(r.destination == subnet and r.index == index and r.table == TABLE_MAIN for r in facts.routes)
    if step.kind == LINK:
        return bool(link) and bool(link["flags"] & _IFF_UP) and not _wrong_attributes(link, step)
    return True


def orphaned_guards() -> list[Network]:
    """The subnets of guard routes that no link routes any more: what killed daemons of other subnets left."""
    with _iproute() as ipr:
        facts = _facts(ipr)
    routed = {route.destination for route in facts.routes if route.index and route.type != TYPE_UNREACHABLE}
    guards = [r for r in facts.routes if r.type == TYPE_UNREACHABLE and r.metric == plans.GUARD_METRIC]
    return [guard.destination for guard in guards if guard.destination not in routed]


# --- doing, undoing, restoring ---


def apply(plan: Plan, actions: Mapping[str, Action] | None = None) -> list[Step]:
    """Do the plan; what was changed is undone when a step fails.

    Args:
        plan: every step of it.
        actions: for the kinds of step that are not the kernel's (device, hosts, and the daemon's own). They are called
            here, in order, synchronously.

    Returns: the steps that changed something.

    Raises:
        PermissionMissingError, TakenError, HostError: the kernel refused; or what an action raised.
    """
    with _iproute() as ipr:
        return plans.apply(plan, {**_actions(ipr), **(actions or {})})


def ensure(plan: Plan, actions: Mapping[str, Action] | None = None) -> list[Step]:
    """Put back what somebody changed: link down, MTU, address, routes. Only differences are touched.

    Pass the part of the plan that is to be looked at; of a kind without an action, steps count as in force. When the
    device itself is gone it can be opened again by an action for it.

    Returns: the steps that had to be done again.

    Raises:
        HostError: the link is gone and there is no action to make it, or the kernel refused.
    """
    with _iproute() as ipr:
        known = {**_actions(ipr), **(actions or {})}
        return plans.ensure(Plan(tuple(step for step in plan if step.kind in known)), known)


def undo(plan: Plan, actions: Mapping[str, Action] | None = None) -> Undone:
    """Undo the plan, backwards, whatever of it is in force, whoever did it, going on when something fails.

    This is shutdown and, in another process later, `cleanup`: what is gone already is fine. Steps of a kind without an
    action (the device of a dead daemon) have nothing to undo. Whoever calls it makes sure that no daemon still uses the
    interface (`check_interface`).
    """
    with _iproute() as ipr:
        known = {**_actions(ipr), **(actions or {})}
        return plans.undo(Plan(tuple(step for step in plan if step.kind in known)), known)


cleanup = undo


def rename_back(index: int, interface: str) -> bool:
    """Give a TUN interface that somebody has renamed its name back.

    Args:
        index: of the interface, which it keeps as long as it exists.
        interface: the name that it had.

    Returns: whether it had another one; False too when there is no such interface any more.

    Raises:
        HostError: the kernel refused, for example because the name is somebody else's now.
    """
    from ngrokd.host.netlink import NetlinkError

    with _iproute() as ipr:
        try:
            link = next(iter(ipr.link("get", index=index)), None)
        except NetlinkError as error:
            if error.code != errno.ENODEV:
                raise
            return False
        if link is None or _kind(link)[0] != "tun" or _attribute(link, "IFLA_IFNAME", interface) == interface:
            return False
        try:
            ipr.link("set", index=index, ifname=interface)
        except NetlinkError as error:
            if error.code != errno.EBUSY:
                raise
            # Before 6.2 the kernel renames only what is down; that and the routes are for `ensure` to restore.
            ipr.link("set", index=index, state="down")
            ipr.link("set", index=index, ifname=interface)
        return True


def _actions(ipr: IPRoute) -> dict[str, Action]:
    return {
        GUARD: Action(lambda step: _add_guard(ipr, step), lambda step: _delete_guard(ipr, step)),
        LINK: Action(lambda step: _set_link(ipr, step), lambda _step: False),  # goes with the device
        ADDRESS: Action(lambda step: _add_address(ipr, step), lambda step: _delete_address(ipr, step)),
        ROUTE: Action(lambda step: _add_route(ipr, step), lambda step: _delete_route(ipr, step)),
    }


def _add_guard(ipr: IPRoute, step: Step) -> bool:
    with _refusals(step):
        return not _already(
            lambda: ipr.route("add", dst=step.text("subnet"), type="unreachable", priority=step.number("metric"))
        )


def _delete_guard(ipr: IPRoute, step: Step) -> bool:
    with _refusals(step):
        return not _gone(
            lambda: ipr.route(
                "del", dst=step.text("subnet"), type="unreachable", priority=step.number("metric"), **_ANY
            )
        )


def _set_link(ipr: IPRoute, step: Step) -> bool:
    link = _our_link(ipr, step)
    changed = False
    with _refusals(step):
        wrong = _wrong_attributes(link, step)
        mode = _addr_gen_mode(link)
        if mode not in (None, _ADDR_GEN_NONE):  # None: this kernel, or this link, has no IPv6
            modes = {"attrs": [["AF_INET6", {"attrs": [["IFLA_INET6_ADDR_GEN_MODE", _ADDR_GEN_NONE]]}]]}
            ipr.link("set", index=link["index"], IFLA_AF_SPEC=modes)
            changed = True
        if wrong:
            ipr.link("set", index=link["index"], **wrong)
            changed = True
        if not link["flags"] & _IFF_UP:
            ipr.link("set", index=link["index"], state="up")
            changed = True
    return changed


def _wrong_attributes(link: Any, step: Step) -> dict[str, int]:
    wanted = {"IFLA_MTU": step.number("mtu"), "IFLA_TXQLEN": step.number("txqueuelen")}
    return {name: value for name, value in wanted.items() if _attribute(link, name, None) != value}


def _add_address(ipr: IPRoute, step: Step) -> bool:
    index = _our_link(ipr, step)["index"]
    address = ip_interface(step.text("address"))
    with _refusals(step):
        return not _already(
            lambda: ipr.addr("add", index=index, address=str(address.ip), prefixlen=address.network.prefixlen)
        )


def _delete_address(ipr: IPRoute, step: Step) -> bool:
    link = _link(ipr, step.text("interface"))
    if link is None:
        return False
    address = ip_interface(step.text("address"))
    with _refusals(step):
        return not _gone(
            lambda: ipr.addr("del", index=link["index"], address=str(address.ip), prefixlen=address.network.prefixlen)
        )


def _add_route(ipr: IPRoute, step: Step) -> bool:
    index = _our_link(ipr, step)["index"]
    subnet = ip_network(step.text("subnet"))
    scope = {"scope": _RT_SCOPE_LINK} if subnet.version == 4 else {}
    with _refusals(step):
        if not _already(lambda: ipr.route("add", dst=str(subnet), oif=index, **scope)):
            return True
        if _has_route(ipr, subnet, index):
            return False
    claims = [str(c) for c in judge(subnet, step.text("interface"), _facts(ipr)).conflicts]
    raise TakenError(
        f"{subnet} is taken: {_listed(claims) or 'another route'}", remedy="remove that route, or set net.subnet"
    )


def _delete_route(ipr: IPRoute, step: Step) -> bool:
    link = _link(ipr, step.text("interface"))
    if link is None:
        return False
    with _refusals(step):
        return not _gone(lambda: ipr.route("del", dst=step.text("subnet"), oif=link["index"], **_ANY))


def _has_route(ipr: IPRoute, subnet: Network, index: int) -> bool:
    family = socket.AF_INET if subnet.version == 4 else socket.AF_INET6
    routes = (_route_fact(message) for message in _dump_routes(ipr, family, oif=index, table=TABLE_MAIN))
    return any(route.destination == subnet for route in routes)


def _our_link(ipr: IPRoute, step: Step) -> Any:
    link = _link(ipr, step.text("interface"))
    if link is None:
        raise HostError(f"interface {step.text('interface')} is gone", remedy="the device has to be opened again")
    return link


def _already(call: Callable[[], object]) -> bool:
    """Add something; True when it was there."""
    return _unless(call, frozenset({errno.EEXIST}))


def _gone(call: Callable[[], object]) -> bool:
    """Delete something; True when it was not there."""
    return _unless(call, frozenset({errno.ESRCH, errno.ENODEV, errno.EADDRNOTAVAIL, errno.ENOENT}))


def _unless(call: Callable[[], object], fine: frozenset[int]) -> bool:
    from ngrokd.host.netlink import NetlinkError

    try:
        call()
    except NetlinkError as error:
        if error.code not in fine:
            raise
        return True
    return False


@contextmanager
def _refusals(step: Step) -> Iterator[None]:
    """Turn the kernel's refusals into errors that say what was refused."""
    with _refused_as(str(step)):
        yield


@contextmanager
def _refused_as(what: str) -> Iterator[None]:
    from ngrokd.host.netlink import NetlinkError

    try:
        yield
    except (NetlinkError, OSError) as error:
        _refused(what, error)


@contextmanager
def _iproute() -> Iterator[IPRoute]:
    from ngrokd.host.netlink import IPRoute, NetlinkError

    try:
        with IPRoute(ext_ack=True, strict_check=True) as ipr:
            yield ipr
    except (NetlinkError, OSError) as error:
        _refused("netlink", error)


def _refused(what: str, error: Exception) -> NoReturn:
    number = getattr(error, "code", 0) or getattr(error, "errno", 0) or 0
    words = str(error.args[-1]) if error.args else str(error)
    reason = (
        words if number == 0 else f"{os.strerror(number)}" + (f" ({words})" if words != os.strerror(number) else "")
    )
    refusal: type[NgrokdError] = HostError
    remedy = ""
    if number in (errno.EPERM, errno.EACCES):
        refusal, remedy = PermissionMissingError, "it needs CAP_NET_ADMIN: start it with sudo"
    raise refusal(f"the kernel refused {what}: {reason}", remedy=remedy) from error


# --- reading the kernel's answers ---


def _attribute(message: Any, name: str, default: Any) -> Any:
    """An attribute of a decoded netlink message, which may be a dictionary with a list of pairs, or nothing at all."""
    if not message:
        return default
    for pair in message["attrs"] if "attrs" in message else ():  # noqa: SIM401 - pyroute2's get() is not a dict's
        if pair[0] == name:
            return pair[1]
    return default


def _link(ipr: IPRoute, name: str) -> Any:
    from ngrokd.host.netlink import NetlinkError

    try:
        return next(iter(ipr.link("get", ifname=name)), None)
    except NetlinkError as error:
        if error.code == errno.ENODEV:
            return None
        raise


def _kind(link: Any) -> tuple[str, Any]:
    info = _attribute(link, "IFLA_LINKINFO", None)
    return str(_attribute(info, "IFLA_INFO_KIND", "")), _attribute(info, "IFLA_INFO_DATA", None)


def _addr_gen_mode(link: Any) -> int | None:
    inet6 = _attribute(_attribute(link, "IFLA_AF_SPEC", None), "AF_INET6", None)
    return cast("int | None", _attribute(inet6, "IFLA_INET6_ADDR_GEN_MODE", None))


def _local_address(message: Any) -> IPAddress | None:
    # On a point-to-point link IFA_ADDRESS is the other end's; where there is no IFA_LOCAL, it is ours.
    text = _attribute(message, "IFA_LOCAL", None) or _attribute(message, "IFA_ADDRESS", None)
    return None if text is None else ip_address(text)


def host_addresses() -> frozenset[bytes]:
    """The addresses of this machine, IPv4 (4 bytes) and IPv6 (16 bytes), on whatever link."""
    with _iproute() as ipr:
        return frozenset(address.packed for _, address in _address_book(ipr))


def _address_book(ipr: IPRoute) -> set[tuple[int, IPAddress]]:
    return {
        (message["index"], address) for message in ipr.get_addr() if (address := _local_address(message)) is not None
    }


# --- the watch ---


async def watch(
    plan: Plan,
    *,
    on_addresses: Callable[[frozenset[bytes]], object],
    on_ours: Callable[[], object],
    on_foreign: Callable[[], object] = lambda: None,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Tell about every change that concerns us, for ever. Start it with `nursery.start`.

    The callbacks are called in this task and should only take note. Several changes at once make one call; our own
    changes are seen too, so that what a callback starts has to end where nothing is different (`ensure` does).

    Args:
        plan: whose link, addresses and routes are ours.
        on_addresses: the machine's addresses, in the form of `host_addresses`: once before `started`, then after each
            change.
        on_ours: our link, one of its addresses, its route or the guard may have changed: call `ensure`.
        on_foreign: somebody changed a rule, or a route or address that lies in our subnet: call `find_conflicts`.

    Raises:
        HostError: the socket cannot be made.
    """
    interface, subnets = plan.interface, plan.subnets
    with _monitor_socket() as monitor:
        decoder = _Decoder()
        book = _read_book()
        told = frozenset(address.packed for _, address in book)
        on_addresses(told)
        index = _index_of(interface)
        on_ours()  # what changed between the plan's being applied and now was not seen by anybody
        task_status.started()
        while True:
            await trio.lowlevel.wait_readable(monitor)
            seen = _receive(monitor)
            ours = foreign = False
            while seen is None:  # the kernel dropped some: nothing is known any more
                index, ours, foreign = _index_of(interface), True, True
                try:
                    book, seen = _read_book(), []
                except HostError:  # out of descriptors, say; the addresses known so far are the best there are
                    await trio.sleep(_AGAIN_S)
            for kind, raw in seen:
                if kind in (_RTM_NEWROUTE, _RTM_DELROUTE) and not _long_enough(raw, subnets):
                    continue  # a router may change thousands a second; decoding is what costs
                if kind in (_RTM_NEWRULE, _RTM_DELRULE):
                    foreign = True
                    continue
                message = decoder.decode(raw)
                if message is None:
                    continue
                if kind in (_RTM_NEWLINK, _RTM_DELLINK):
                    if _attribute(message, "IFLA_IFNAME", "") == interface or message["index"] == index:
                        ours = True
                        index = _index_of(interface)
                elif kind in (_RTM_NEWADDR, _RTM_DELADDR):
                    address = _local_address(message)
                    if address is None:
                        continue
                    change = book.add if kind == _RTM_NEWADDR else book.discard
                    change((message["index"], address))
                    if message["index"] == index:
                        ours = True
                    elif any(address in subnet for subnet in subnets):
                        foreign = True
                else:
                    route = _route_fact(message)
                    if route.index == index or (route.type == TYPE_UNREACHABLE and route.destination in subnets):
                        ours = True
                    elif any(inside(route.destination, subnet) for subnet in subnets):
                        foreign = True
            addresses = frozenset(address.packed for _, address in book)
            if addresses != told:
                told = addresses
                on_addresses(told)
            if ours:
                on_ours()
            if foreign:
                on_foreign()
            await trio.sleep(_COALESCE_S)


def _monitor_socket() -> socket.socket:
    try:
        monitor = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE
        )
        try:
            monitor.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BUFFER)
            monitor.bind((0, _GROUPS))
        except BaseException:
            monitor.close()
            raise
        return monitor
    except OSError as error:
        _refused("to tell about changes of the network", error)


def _receive(monitor: socket.socket) -> list[tuple[int, bytes]] | None:
    """Every message that waits, as type and bytes; None when some were lost."""
    messages: list[tuple[int, bytes]] = []
    lost = False
    for _ in range(_BATCH):
        try:
            data, _, flags, sender = monitor.recvmsg(_DATAGRAM_MAX)
        except BlockingIOError:
            break
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            lost = True
            continue
        if sender[0] != 0:
            continue  # any local process can send us datagrams; the kernel's port is 0
        if flags & socket.MSG_TRUNC:
            lost = True
            continue
        offset = 0
        while offset + _NLMSG.size <= len(data):
            length, kind = _NLMSG.unpack_from(data, offset)[:2]
            if length < _NLMSG.size or offset + length > len(data):
                break
            messages.append((kind, data[offset : offset + length]))
            offset += (length + 3) & ~3
    return None if lost else messages


def _long_enough(raw: bytes, subnets: tuple[Network, ...]) -> bool:
    """Whether a route message is about something not wider than one of the subnets (struct rtmsg begins so)."""
    if len(raw) < _NLMSG.size + 2:
        return False
    family, length = raw[_NLMSG.size], raw[_NLMSG.size + 1]
    return any(
        length >= subnet.prefixlen and family == (socket.AF_INET if subnet.version == 4 else socket.AF_INET6)
        for subnet in subnets
    )


class _Decoder:
    def __init__(self) -> None:
        from ngrokd.host.netlink import MarshalRtnl

        self._marshal = MarshalRtnl()

    def decode(self, raw: bytes) -> Any:
        return next(iter(self._marshal.parse(raw)), None)


def _read_book() -> set[tuple[int, IPAddress]]:
    with _iproute() as ipr:
        return _address_book(ipr)


def _index_of(interface: str) -> int:
    try:
        return socket.if_nametoindex(interface)
    except OSError:
        return 0
