"""Whether a subnet is free on this machine: a judgement on facts, without touching anything.

The kernel picks the most specific route of the first table, in the order of the policy rules, that has one at all. So
our route to SUBNET in the main table takes nothing away from others and loses nothing to them unless

*   another route or address is equal to SUBNET or lies inside it: it would win for its part, or we would take it over;
*   a table that is asked before the main one (Tailscale's 52, some VPNs') has any route that covers SUBNET;
*   somebody's gateway lies in SUBNET: we would cut that network off.

A wider route (10.0.0.0/8 of a company's VPN) loses to ours for SUBNET only. That may be what is wanted or not; it is
told as a shadow and is no reason to refuse. Default routes are nobody's claim. What earlier runs of ours left (the
guard route, addresses and routes of our own interface) is ours to adopt.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_network
from itertools import islice
from typing import Final

from ngrokd.host.plan import GUARD_METRIC, IPAddress, Network, ip_command

# linux/rtnetlink.h, linux/fib_rules.h
TABLE_DEFAULT: Final = 253
TABLE_MAIN: Final = 254
TABLE_LOCAL: Final = 255
PROTO_KERNEL: Final = 2
TYPE_UNREACHABLE: Final = 7
TYPE_THROW: Final = 9
_TYPES_IGNORED: Final = frozenset({3, 4, 5, 9})  # broadcast, anycast, multicast: the kernel's own; throw: no route
_TYPE_WORDS: Final = {2: "local", 6: "blackhole", 7: "unreachable", 8: "prohibit"}
ACTION_TABLE: Final = 1
_ACTIONS_REFUSE: Final = {6: "blackhole", 7: "unreachable", 8: "prohibit"}

_PRIVATE: Final = tuple(map(IPv4Network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10")))
_CANDIDATES: Final = 20_000  # a /24 of 10.0.0.0/8 has 65,536 siblings; whoever has taken that many needs a human


@dataclass(frozen=True, slots=True)
class Link:
    """A network interface. `kind` is the kernel's word ("tun", "bridge", "wireguard", ...; "" for hardware)."""

    index: int
    name: str
    kind: str = ""
    owner: str = ""  # of a TUN: the process that holds it, where it can be seen


@dataclass(frozen=True, slots=True)
class Address:
    """An address of this machine."""

    address: IPAddress
    prefix_length: int
    index: int


@dataclass(frozen=True, slots=True)
class Route:
    """An entry of a routing table."""

    destination: Network
    index: int = 0
    table: int = TABLE_MAIN
    metric: int = 0
    type: int = 1
    protocol: int = 0
    gateways: tuple[IPAddress, ...] = ()


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule.

    Attributes:
        priority: rules are asked in ascending order.
        selective: it does not hold for an ordinary connection of a local app (by mark, source, user, input interface).
        suppress: routes with at most this prefix length are passed over; -1 for none.
        destination: it holds only there.
        version: of IP; each has rules of its own.
    """

    priority: int
    table: int
    action: int = ACTION_TABLE
    selective: bool = False
    suppress: int = -1
    destination: Network | None = None
    version: int = 4


@dataclass(frozen=True, slots=True)
class Facts:
    """What the kernel says."""

    links: Mapping[int, Link]
    addresses: tuple[Address, ...]
    routes: tuple[Route, ...]
    rules: tuple[Rule, ...] = ()

    def networks(self) -> list[Network]:
        """Every network that somebody uses here, but the default route."""
        found: list[Network] = [route.destination for route in self.routes if route.destination.prefixlen]
        found += [ip_network((a.address, a.prefix_length), strict=False) for a in self.addresses]
        return found


@dataclass(frozen=True, slots=True)
class Conflict:
    """A claim of somebody else on our subnet.

    Attributes:
        network: what is claimed.
        interface: where, "" where there is none.
        what: the claim in words: "route 10.107.0.0/17", "address 10.107.3.1/24", ...
        owner: who the interface belongs to, in words.
        remedy: what to do when it is not another subnet, "" where it is.
    """

    network: Network
    interface: str
    what: str
    owner: str = field(compare=False, default="")
    remedy: str = field(compare=False, default="")

    def __str__(self) -> str:
        return self.what + (f" of {self.owner}" if self.owner else "")


@dataclass(frozen=True, slots=True)
class Judgement:
    """Claims that forbid the subnet, and wider ones that merely lose it to us."""

    conflicts: tuple[Conflict, ...]
    shadows: tuple[Conflict, ...]


def judge(subnet: Network, interface: str, facts: Facts) -> Judgement:
    """Say what stands against routing `subnet` into `interface`."""
    ours = {link.index for link in facts.links.values() if link.name == interface}
    conflicts: list[Conflict] = []
    shadows: list[Conflict] = []
    for address in facts.addresses:
        if address.index in ours or address.address.version != subnet.version:
            continue
        network = ip_network((address.address, address.prefix_length), strict=False)
        if address.address in subnet:
            what = f"address {address.address}/{address.prefix_length}"
            conflicts.append(_conflict(network, address.index, what, facts))
    rules = [rule for rule in facts.rules if rule.version == subnet.version]
    tables = dict(_tables_before_main(subnet, rules))
    for route in facts.routes:
        if route.index in ours or route.destination.version != subnet.version or route.type in _TYPES_IGNORED:
            continue
        conflicts += _gateway_conflicts(subnet, route, facts)
        if route.table == TABLE_LOCAL and route.protocol == PROTO_KERNEL:
            continue  # the addresses again
        if _is_guard(route) and route.destination == subnet:
            continue
        what = f"{_TYPE_WORDS.get(route.type, '')} route {route.destination}".strip()
        if inside(route.destination, subnet):
            if route.table in (TABLE_MAIN, TABLE_LOCAL) or route.table in tables:
                conflicts.append(_conflict(route.destination, route.index, what, facts, _guard_remedy(route)))
        elif inside(subnet, route.destination):
            if route.table in tables and route.destination.prefixlen > tables[route.table]:
                what += f" in table {route.table}, which is asked first"
                conflicts.append(_conflict(route.destination, route.index, what, facts))
            elif route.table == TABLE_MAIN and route.destination.prefixlen and not _is_guard(route):
                shadows.append(_conflict(route.destination, route.index, what, facts))
    for rule in rules:
        if rule.action in _ACTIONS_REFUSE and not rule.selective and _before_main(rule, subnet, rules):
            network = rule.destination or subnet
            what = f"rule {rule.priority} ({_ACTIONS_REFUSE[rule.action]} {network})"
            remedy = f"{ip_command(subnet)} rule del pref {rule.priority}"
            conflicts.append(Conflict(network, "", what, remedy=remedy))
    return Judgement(tuple(dict.fromkeys(conflicts)), tuple(dict.fromkeys(shadows)))


def propose_subnet(subnet: IPv4Network, taken: Iterable[Network]) -> IPv4Network | None:
    """A private network of the same size that overlaps nothing in `taken`; None when there is none near.

    The next ones after `subnet` come first, so that 10.107.0.0/16 becomes 10.108.0.0/16.
    """
    used = [network for network in taken if isinstance(network, IPv4Network) and network.prefixlen]
    for candidate in islice(_candidates(subnet), _CANDIDATES):
        if not candidate.overlaps(subnet) and not any(candidate.overlaps(network) for network in used):
            return candidate
    return None


def describe(link: Link | None) -> str:
    """An interface in the words of the person who has to find out whose it is."""
    if link is None:
        return ""
    words = {
        "bridge": "a bridge" + (", of Docker" if link.name == "docker0" or link.name.startswith("br-") else ""),
        "wireguard": "a WireGuard VPN",
        "tun": "a TUN device, as VPNs make them",
        "ppp": "a PPP connection",
        "vti": "an IPsec tunnel",
        "xfrm": "an IPsec tunnel",
    }
    kind = words.get(link.kind, f"a {link.kind} interface" if link.kind else "")
    if link.owner:
        kind = f"{'a TUN device' if link.kind == 'tun' else kind} held by {link.owner}"
    return link.name + (f" ({kind})" if kind else "")


def _conflict(network: Network, index: int, what: str, facts: Facts, remedy: str = "") -> Conflict:
    link = facts.links.get(index)
    return Conflict(network, link.name if link else "", what, describe(link), remedy)


def _gateway_conflicts(subnet: Network, route: Route, facts: Facts) -> Iterator[Conflict]:
    for address in route.gateways:
        if address.version == subnet.version and address in subnet:
            what = f"gateway {address} (of the route to {route.destination})"
            yield _conflict(ip_network(address), route.index, what, facts)


def _is_guard(route: Route) -> bool:
    return route.type == TYPE_UNREACHABLE and route.metric == GUARD_METRIC


def _guard_remedy(route: Route) -> str:
    if not _is_guard(route):
        return ""
    return (
        "it is what a killed ngrokd with that subnet left; if it will not run again:"
        f" {ip_command(route.destination)} route del unreachable {route.destination} metric {GUARD_METRIC}"
    )


def _tables_before_main(subnet: Network, rules: Iterable[Rule]) -> Iterator[tuple[int, int]]:
    """The tables that answer before our route in the main one does, each with the prefix length it must exceed."""
    for rule in sorted(rules, key=lambda rule: rule.priority):
        if rule.selective or rule.action != ACTION_TABLE:
            continue
        if rule.destination is not None and not rule.destination.overlaps(subnet):
            continue
        if rule.table == TABLE_MAIN and subnet.prefixlen > rule.suppress and _covers(rule.destination, subnet):
            return
        if rule.table not in (TABLE_MAIN, TABLE_LOCAL):
            yield rule.table, rule.suppress


def _before_main(rule: Rule, subnet: Network, rules: Iterable[Rule]) -> bool:
    if rule.destination is not None and not rule.destination.overlaps(subnet):
        return False
    mains = [
        other.priority
        for other in rules
        if other.table == TABLE_MAIN
        and other.action == ACTION_TABLE
        and not other.selective
        and subnet.prefixlen > other.suppress
        and _covers(other.destination, subnet)
    ]
    return rule.priority < min(mains, default=0)


def _covers(destination: Network | None, subnet: Network) -> bool:
    return destination is None or inside(subnet, destination)


def inside(inner: Network, outer: Network) -> bool:
    """Whether one network lies within the other, or is it."""
    return inner.version == outer.version and inner.subnet_of(outer)  # type: ignore[arg-type]  # one family


def _candidates(subnet: IPv4Network) -> Iterator[IPv4Network]:
    size = subnet.num_addresses
    home = next((block for block in _PRIVATE if subnet.subnet_of(block)), None)
    blocks = [home] if home else []
    blocks += [block for block in _PRIVATE if block is not home]
    for block in blocks:
        if block.prefixlen > subnet.prefixlen:
            continue
        count = block.num_addresses // size
        start = (int(subnet.network_address) - int(block.network_address)) // size if block is home else 0
        for number in range(count):
            position = (start + number) % count
            yield IPv4Network((int(block.network_address) + position * size, subnet.prefixlen))
