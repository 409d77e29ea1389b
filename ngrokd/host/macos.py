"""The plan on macOS, as data. Facts are those of ifconfig(8), route(8) and the utun driver; nothing here runs them.

Three things differ from Linux:

*   A utun device has the name that the system gives it at each start, so a plan that is only shown speaks of "utunN".
    `net.interface = "utun7"` asks for that one.
*   The device is a point-to-point link with an address at either end. Both ends get our own: any other would be the
    address of an endpoint, which the kernel would then deliver by itself.
*   Routes have no metric. So the guard is a reject route for the whole subnet, and what leads to the device are two
    routes of half its size: the longer prefix wins, as long as the device is there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from ipaddress import IPv4Network, IPv6Network
from typing import Final

from ngrokd.host.plan import (
    ADDRESS,
    DEVICE,
    GUARD,
    LINK,
    ROUTE,
    Network,
    Plan,
    Step,
    control,
    gateway,
    http,
    names,
    state,
)

UTUN: Final = re.compile(r"utun(0|[1-9][0-9]{0,4})")
UNNUMBERED: Final = "utunN"  # until the system has given one
# Without offload every packet is a system call, so the largest are best; 9000 is what a jumbo cluster of the kernel's
# packet buffers holds.
MTU: Final = 9000


def macos_plan(
    interface: str,
    subnet: IPv4Network,
    mtu: int = MTU,
    *,
    subnet6: IPv6Network | None = None,
    hosts_path: str = "/etc/hosts",
    configure: bool = True,
    state_directory: str = "",
    control_socket: str = "",
    http_listen: str = "",
) -> Plan:
    """What a run changes on macOS.

    Args:
        interface: utun and a number; anything else stands for the next number that is free. The section of the hosts
            file goes by it as it is.
        subnet: where the endpoints' addresses lie; its first address is ours.
        mtu: of the link, bytes.
        subnet6: the same for IPv6; None for none.
        hosts_path: the hosts file, "" for none.
        configure: False leaves link, addresses and routes to the administrator.
        state_directory: where the daemon keeps its state and a lock, "" for none.
        control_socket: where it is asked, "" for none.
        http_listen: ADDRESS:PORT of the health checks, "" for none.
    """
    name = interface if UTUN.fullmatch(interface) else UNNUMBERED
    subnets: list[Network] = [subnet] if subnet6 is None else [subnet, subnet6]
    steps = [_device(name)]
    if configure:
        steps = [
            *(_guard(network) for network in subnets),
            *steps,
            _link(name, mtu),
            *(_address(name, network) for network in subnets),
            *(step for network in subnets for step in _routes(name, network)),
        ]
    if state_directory:
        steps.insert(0, state(state_directory))
    if control_socket:
        steps.append(control(control_socket))
    if http_listen:
        steps.append(http(http_listen))
    if hosts_path:
        flush = ("dscacheutil -flushcache", "killall -HUP mDNSResponder")  # or stale answers are given
        steps.append(names(hosts_path, interface, sed="sed -i ''", after=flush))
    return Plan(tuple(steps))


def _guard(network: Network) -> Step:
    family, nowhere = ("-inet", "127.0.0.1") if network.version == 4 else ("-inet6", "::1")
    command = f"route -n {{}} {family} -net {network} {nowhere} -reject"
    return Step(
        GUARD,
        (("subnet", str(network)),),
        "whenever the daemon is dead, connections fail at once instead of leaving by the default route",
        (command.format("add"),),
        (command.format("delete"),),
    )


def _device(name: str) -> Step:
    return Step(
        DEVICE,
        (("interface", name),),
        "the apps' packets come to the daemon through a utun device, which lives as long as the daemon",
        (f"# {name}: opened by the daemon through the control socket com.apple.net.utun_control",),
        (f"# {name}: goes with the daemon",),
    )


def _link(name: str, mtu: int) -> Step:
    return Step(
        LINK,
        (("interface", name), ("mtu", mtu)),
        "large packets: each one costs a system call",
        (f"ifconfig {name} mtu {mtu}",),
    )


def _address(name: str, network: Network) -> Step:
    ours = gateway(network)
    if network.version == 4:
        do, undo = f"inet {ours} {ours} netmask 255.255.255.255 up", f"inet {ours} delete"
    else:
        do, undo = f"inet6 {ours} prefixlen 128 up", f"inet6 {ours} delete"
    return Step(
        ADDRESS,
        (("interface", name), ("address", f"{ours}/{network.max_prefixlen}")),
        "the machine's own address towards the endpoints, at both ends of the link, so that none of theirs is local",
        (f"ifconfig {name} {do}",),
        (f"ifconfig {name} {undo}",),
    )


def _routes(name: str, network: Network) -> Iterator[Step]:
    family = "-inet" if network.version == 4 else "-inet6"
    for half in network.subnets(prefixlen_diff=1):
        command = f"route -n {{}} {family} -net {half} -interface {name}"
        yield Step(
            ROUTE,
            (("interface", name), ("subnet", str(half))),
            "the endpoints' addresses lead into the device: half of the subnet, which goes before the guard",
            (command.format("add"),),
            (command.format("delete"),),
        )
