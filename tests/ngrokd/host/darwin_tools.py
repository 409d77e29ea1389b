"""A double of macOS's ifconfig, route and netstat: one machine's state, told as in their manuals and printed examples.

`route` complains and ends with success, as some versions do. Nothing here was compared with a Mac.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Network, ip_interface, ip_network

from ngrokd.host.darwin import Answer
from ngrokd.host.plan import Network


@dataclass
class Wire:
    """An interface."""

    flags: str
    mtu: int
    inet: list[str] = field(default_factory=list)  # "10.0.0.1/24"; with "10.0.0.1>10.0.0.2/32" for the other end
    up: bool = True


@dataclass
class Way:
    """A route."""

    destination: str
    gateway: str
    flags: str
    interface: str


class Mac:
    """The machine; calling it runs a command.

    Attributes:
        changes: commands that changed something, which everybody who watches the network hears of.
        old: whether netstat prints the columns of older versions.
        broken: commands that print a complaint, do nothing, and end with success.
    """

    def __init__(self) -> None:
        self.wires = {
            "lo0": Wire("LOOPBACK,RUNNING,MULTICAST", 16384, ["127.0.0.1/8", "::1/128", "fe80::1%lo0/64"]),
            "en0": Wire("BROADCAST,SMART,RUNNING,SIMPLEX,MULTICAST", 1500, ["192.168.1.20/24"]),
            "utun0": Wire("POINTOPOINT,RUNNING,MULTICAST", 1380, ["fe80::aaaa%utun0/64"]),
        }
        self.ways = [
            Way("0.0.0.0/0", "192.168.1.1", "UGScg", "en0"),
            Way("127.0.0.0/8", "127.0.0.1", "UCS", "lo0"),
            Way("127.0.0.1/32", "127.0.0.1", "UH", "lo0"),
            Way("169.254.0.0/16", "link#4", "UCS", "en0"),
            Way("192.168.1.0/24", "link#4", "UCS", "en0"),
            Way("192.168.1.1/32", "bc:67:1c:40:3:f6", "UHLWIir", "en0"),
            Way("224.0.0.0/4", "link#4", "UmCS", "en0"),
            Way("::1/128", "::1", "UHL", "lo0"),
            Way("fe80::/64", "fe80::1%lo0", "UcI", "lo0"),
        ]
        self.changes: list[str] = []
        self.old = False
        self.broken: set[str] = set()

    def __call__(self, command: Sequence[str]) -> Answer:
        words = list(command)
        if words == ["ifconfig", "-a"]:
            return Answer(0, "".join(self._ifconfig(name, wire) for name, wire in self.wires.items()))
        if words == ["netstat", "-rn"]:
            return Answer(0, self._netstat())
        if words[0] in self.broken:
            return Answer(0, f"{words[0]}: writing to routing socket: Operation not permitted\n")
        answer = self._route(words[1:]) if words[0] == "route" else self._set(words[1], words[2:])
        if not answer.output:
            self.changes.append(" ".join(words))
        return answer

    def open_utun(self, name: str) -> None:
        self.wires[name] = Wire("POINTOPOINT,RUNNING,MULTICAST", 1500)

    def close_utun(self, name: str) -> None:
        """What the end of the daemon does."""
        del self.wires[name]
        self.ways = [way for way in self.ways if way.interface != name]

    def destinations(self) -> set[str]:
        return {f"{way.destination} {way.gateway} {way.interface}" for way in self.ways}

    def _ifconfig(self, name: str, wire: Wire) -> str:
        lines = [f"{name}: flags=8051<{'UP,' if wire.up else ''}{wire.flags}> mtu {wire.mtu}"]
        for text in wire.inet:
            address, _, length = text.partition("/")
            own, _, peer = address.partition(">")
            if ":" in own:
                lines.append(f"\tinet6 {own} prefixlen {length} ")
            else:
                mask = f"0x{int(IPv4Network((0, int(length))).netmask):08x}"
                lines.append(f"\tinet {own}{f' --> {peer}' if peer else ''} netmask {mask} ")
        return "\n".join([*lines, "\tnd6 options=201<PERFORMNUD,DAD>", ""])

    def _netstat(self) -> str:
        lines = ["Routing tables"]
        columns = "Refs      Use   Netif Expire" if self.old else "              Netif Expire"
        for version, title in ((4, "Internet:"), (6, "Internet6:")):
            head = columns if version == 4 else "Netif Expire"
            lines += ["", title, f"Destination        Gateway            Flags        {head}"]
            for way in self.ways:
                network = ip_network(way.destination)
                if network.version == version:
                    use = "    3     120 " if self.old and version == 4 else ""
                    lines.append(f"{_short(network):<18} {way.gateway:<18} {way.flags:<12} {use}{way.interface:>8}")
        return "\n".join([*lines, ""])

    def _set(self, name: str, words: list[str]) -> Answer:
        wire = self.wires.get(name)
        if wire is None:
            return Answer(1, f"ifconfig: interface {name} does not exist\n")
        match words:
            case ["mtu", size]:
                wire.mtu = int(size)
            case ["inet", own, peer, "netmask", "255.255.255.255", "up"]:
                wire.inet.append(f"{own}>{peer}/32")
                wire.up = True
                self.ways.append(Way(f"{peer}/32", own, "UH", name))
            case ["inet6", own, "prefixlen", length, "up"]:
                wire.inet.append(f"{own}/{length}")
                wire.up = True
            case ["inet" | "inet6", own, "delete"]:
                kept = [text for text in wire.inet if text.partition("/")[0].partition(">")[0] != own]
                if len(kept) == len(wire.inet):
                    return Answer(1, "ifconfig: ioctl (SIOCDIFADDR): Can't assign requested address\n")
                wire.inet = kept
                self.ways = [way for way in self.ways if (way.interface, way.gateway) != (name, own)]
            case _:
                return Answer(1, f"ifconfig: {' '.join(words)}: bad value\n")
        return Answer(0, "")

    def _route(self, words: list[str]) -> Answer:
        match words:
            case ["-n", "add" | "delete" as verb, "-inet" | "-inet6", "-net", subnet, "-interface", name]:
                way = Way(subnet, name, "USc", name)
            case ["-n", "add" | "delete" as verb, "-inet" | "-inet6", "-net", subnet, gateway, "-reject"]:
                way = Way(subnet, gateway, "UGRSc", "lo0")
            case _:
                return Answer(64, "usage: route [-dnqtv] command [[modifiers] args]\n")
        there = [other for other in self.ways if ip_network(other.destination) == ip_network(subnet)]
        if verb == "add":
            if there:
                return Answer(0, "route: writing to routing socket: File exists\n")
            if way.interface not in self.wires:
                return Answer(68, f"route: bad address: {way.interface}\n")
            self.ways.append(way)
            return Answer(0, "")
        if not there:
            return Answer(0, "route: writing to routing socket: not in table\n")
        self.ways.remove(there[0])
        return Answer(0, "")


def _short(network: Network) -> str:
    """As netstat prints it: without zeros at the end, and without a length where the old classes had it."""
    if network.prefixlen == 0:
        return "default"
    address = str(network.network_address)
    if network.version == 6:
        zone = "%lo0" if address.startswith("fe80") else ""
        return f"{address}{zone}" + ("" if network.prefixlen == 128 else f"/{network.prefixlen}")
    if network.prefixlen == 32:
        return address
    octets = address.split(".")[: -(-network.prefixlen // 8)]
    classful = 8 if int(octets[0]) < 128 else 16 if int(octets[0]) < 192 else 24
    return ".".join(octets) + ("" if network.prefixlen == classful else f"/{network.prefixlen}")


assert _short(ip_interface("10.107.0.0/17").network) == "10.107.0/17"
