"""The plan on macOS, done: interface, addresses and routes by ifconfig(8) and route(8), as the plan prints them.

Three habits of those commands decide how this is written:

*   `route` has ended with success, in some versions, after it printed that a route exists or could not be made. So the
    answer to "did it work?" is never the exit code but what `netstat -rn` and `ifconfig` say afterwards.
*   Setting an address that is there already is an event for everybody who watches the network, and other VPNs connect
    anew at each. So what is in force is asked first, and only differences are made.
*   A route whose destination exists is not added beside it: destinations are keys. Somebody else's route to the subnet
    is therefore found before, and named.

The tables are written for people. Destinations leave out zeros at the end ("10.107/16", "127") and carry zones
("fe80::%lo0/64"); how many columns there are depends on the version, so the header says where the interface is.

None of this has been run on a Mac: the tests run it against a double of the commands.

Rules of this file: it runs these three commands and reads what they print; `Tools` is how, so that tests have others.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import IPv4Network, ip_address, ip_interface, ip_network
from typing import Final

from ngrokd.errors import TakenError
from ngrokd.host import plan as plans
from ngrokd.host.conflicts import (
    TYPE_UNREACHABLE,
    Address,
    Conflict,
    Facts,
    Judgement,
    Link,
    Route,
    judge,
    propose_subnet,
)
from ngrokd.host.macos import UNNUMBERED
from ngrokd.host.plan import ADDRESS, GUARD, GUARD_METRIC, LINK, ROUTE, Action, HostError, Network, Plan, Step, Undone

_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command said.

    Attributes:
        code: how it ended; see the module's text for what that is worth.
        output: what it printed, complaints too.
    """

    code: int
    output: str


Tools = Callable[[Sequence[str]], Answer]


def run_tool(command: Sequence[str]) -> Answer:
    """Run one of the system's commands, in the language of its manual.

    Raises:
        HostError: it is not there, or hangs.
    """
    environment = {"PATH": "/sbin:/usr/sbin:/bin:/usr/bin", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise HostError(f"{shlex.join(command)} did not end within {_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise HostError(f"cannot run {command[0]}: {error.strerror}") from error
    return Answer(done.returncode, done.stdout.decode("utf-8", "replace"))


@dataclass(frozen=True, slots=True)
class Interface:
    """What `ifconfig` says of an interface."""

    name: str
    up: bool
    mtu: int
    addresses: tuple[tuple[plans.IPAddress, int], ...]  # with prefix length


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of `netstat -rn`.

    Attributes:
        destination: where to.
        gateway: "link#4", an address, or a card's.
        flags: one letter each; R for reject, B for blackhole, W for what the kernel made itself of another route.
        interface: the name in the column Netif.
    """

    destination: Network
    gateway: str
    flags: str
    interface: str


def parse_interfaces(text: str) -> dict[str, Interface]:
    """What `ifconfig` or `ifconfig -a` printed, by name. Lines that are not understood are passed over."""
    found: dict[str, Interface] = {}
    name, up, mtu = "", False, 0
    addresses: list[tuple[plans.IPAddress, int]] = []
    for line in [*text.splitlines(), "end: flags=0<>"]:
        words = line.split()
        if not words:
            continue
        if not line[0].isspace():
            if name:
                found[name] = Interface(name, up, mtu, tuple(addresses))
            head, _, rest = line.partition(": flags=")
            flags = rest.partition("<")[2].partition(">")[0].split(",")
            name, up, addresses = head, "UP" in flags, []
            mtu = int(words[-1]) if len(words) > 1 and words[-2] == "mtu" and words[-1].isdigit() else 0
        elif words[0] in ("inet", "inet6") and len(words) > 1:
            with suppress(ValueError):
                addresses.append((ip_address(words[1].partition("%")[0]), _prefix_length(words)))
    return found


def _prefix_length(words: list[str]) -> int:
    if "prefixlen" in words[:-1]:
        return int(words[words.index("prefixlen") + 1])
    if "netmask" in words[:-1]:
        return int(words[words.index("netmask") + 1], 16).bit_count()
    return 32 if words[0] == "inet" else 128


def parse_routes(text: str) -> tuple[Entry, ...]:
    """What `netstat -rn` printed. Lines that are not understood are passed over."""
    entries: list[Entry] = []
    version, column = 0, -1
    for line in text.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] in ("Internet:", "Internet6:"):
            version, column = (4 if words[0] == "Internet:" else 6), -1
        elif words[0] == "Destination" and "Netif" in words:
            column = words.index("Netif")
        elif version and 0 <= column < len(words):
            with suppress(ValueError):
                entries.append(Entry(_destination(words[0], version), words[1], words[2], words[column]))
    return tuple(entries)


def _destination(word: str, version: int) -> Network:
    if word == "default":
        return ip_network("0.0.0.0/0" if version == 4 else "::/0")
    address, _, length = word.partition("/")
    if version == 6:
        return ip_network(f"{address.partition('%')[0]}/{length or 128}", strict=False)
    octets = address.split(".")
    # Without a length it is the one of the old classes, and exactly their octets are printed.
    return IPv4Network((".".join([*octets, "0", "0", "0"][:4]), int(length or 8 * len(octets))), strict=False)


class MacHost:
    """Does and undoes the network's part of the plan.

    Attributes:
        interface: the device's name, as the system gave it; "" until there is one. Steps that say "utunN" mean it.
    """

    def __init__(self, interface: str = "", tools: Tools = run_tool) -> None:
        self.interface = interface
        self._tools = tools

    def check_free(self, plan: Plan) -> Judgement:
        """Make sure, before anything is changed, that the plan's subnets are nobody else's.

        Returns: the judgement, whose shadows are worth a warning.

        Raises:
            TakenError: they are; the owner is named, and a free subnet proposed.
        """
        facts = self._facts()
        shadows: list[Conflict] = []
        for subnet in (_subnet(step) for step in plan.only(GUARD)):
            judgement = judge(subnet, self.interface, facts)
            if judgement.conflicts:
                free = propose_subnet(subnet, facts.networks()) if isinstance(subnet, IPv4Network) else None
                raise TakenError(
                    f"{subnet} is taken: {', '.join(map(str, judgement.conflicts))}",
                    remedy="set net.subnet to a free one" + (f', for example "{free}"' if free else ""),
                )
            shadows += judgement.shadows
        return Judgement((), tuple(shadows))

    def apply(self, plan: Plan, actions: Mapping[str, Action]) -> list[Step]:
        """Do every step in order; when one fails, undo those that had changed something, and raise.

        Args:
            plan: its steps of other kinds than ours and `actions`' are left out.
            actions: for the device, which must set `interface`, and whatever else is done with it.

        Returns: the steps that changed something.

        Raises:
            HostError: a command did not have the effect that it should have.
            TakenError: a route to the same destination is somebody else's.
        """
        known = {**self._actions(), **actions}
        return plans.apply(plan.only(*known), known)

    def ensure(self, plan: Plan) -> list[Step]:
        """Do again what is no longer in force; see `apply`."""
        known = self._actions()
        return plans.ensure(plan.only(*known), known)

    def undo(self, plan: Plan, actions: Mapping[str, Action] | None = None) -> Undone:
        """Undo what is in force, backwards, going on when something fails."""
        known = {**self._actions(), **(actions or {})}
        return plans.undo(plan.only(*known), known)

    def _actions(self) -> dict[str, Action]:
        return {
            GUARD: Action(lambda step: self._add(step, _is_guard), lambda step: self._delete(step, _is_guard)),
            LINK: Action(self._set_link, lambda _step: False),  # goes with the device
            ADDRESS: Action(self._add_address, self._delete_address),
            ROUTE: Action(lambda step: self._add(step, self._is_ours), lambda step: self._delete(step, self._is_ours)),
        }

    def _is_ours(self, entry: Entry) -> bool:
        return entry.interface == self.interface and not _is_guard(entry)

    def _routes_to(self, subnet: Network) -> list[Entry]:
        return [entry for entry in self._routes() if entry.destination == subnet]

    def _add(self, step: Step, wanted: Callable[[Entry], bool]) -> bool:
        subnet = _subnet(step)
        there = self._routes_to(subnet)
        if any(map(wanted, there)):
            return False
        if there:
            entry = there[0]
            raise TakenError(
                f"{subnet} is taken: a route to {entry.gateway} on {entry.interface}",
                remedy="remove that route, or set net.subnet",
            )
        said = self._do(step, step.shell)
        if not any(map(wanted, self._routes_to(subnet))):
            raise _refused(step, said)
        return True

    def _delete(self, step: Step, wanted: Callable[[Entry], bool]) -> bool:
        subnet = _subnet(step)
        if not any(map(wanted, self._routes_to(subnet))):
            return False
        said = self._do(step, step.shell_undo)
        if any(map(wanted, self._routes_to(subnet))):
            raise _refused(step, said)
        return True

    def _set_link(self, step: Step) -> bool:
        if self._device().mtu == step.number("mtu"):
            return False
        said = self._do(step, step.shell)
        if self._device().mtu != step.number("mtu"):
            raise _refused(step, said)
        return True

    def _add_address(self, step: Step) -> bool:
        if self._has_address(self._device(), step):
            return False
        said = self._do(step, step.shell)
        if not self._has_address(self._device(), step):
            raise _refused(step, said)
        return True

    def _delete_address(self, step: Step) -> bool:
        address = ip_interface(step.text("address")).ip
        there = self._interfaces().get(self.interface)
        if there is None or all(own != address for own, _ in there.addresses):
            return False
        said = self._do(step, step.shell_undo)
        there = self._interfaces().get(self.interface)
        if there is not None and any(own == address for own, _ in there.addresses):
            raise _refused(step, said)
        return True

    @staticmethod
    def _has_address(device: Interface, step: Step) -> bool:
        wanted = ip_interface(step.text("address"))
        return device.up and (wanted.ip, wanted.network.prefixlen) in device.addresses

    def _do(self, step: Step, commands: Sequence[str]) -> str:
        """Run what the plan prints, with the device's name in it. Returns: what was said."""
        said = []
        for command in commands:
            words = [self.interface if word == UNNUMBERED else word for word in shlex.split(command)]
            if "" in words:
                raise HostError(f"{step}: there is no device yet")
            said.append(self._tools(words).output.strip())
        return "; ".join(filter(None, said))

    def _device(self) -> Interface:
        device = self._interfaces().get(self.interface)
        if device is None:
            raise HostError(
                f"interface {self.interface or UNNUMBERED} is gone", remedy="the device has to be opened again"
            )
        return device

    def _interfaces(self) -> dict[str, Interface]:
        return parse_interfaces(self._read("ifconfig", "-a"))

    def _routes(self) -> tuple[Entry, ...]:
        return parse_routes(self._read("netstat", "-rn"))

    def _read(self, *command: str) -> str:
        answer = self._tools(command)
        if answer.code:
            raise HostError(f"{shlex.join(command)} failed: {answer.output.strip() or answer.code}")
        return answer.output

    def _facts(self) -> Facts:
        interfaces = self._interfaces()
        index = {name: number for number, name in enumerate(interfaces, 1)}
        links = {number: Link(number, name, _kind(name)) for name, number in index.items()}
        addresses = (
            Address(address, length, index[interface.name])
            for interface in interfaces.values()
            for address, length in interface.addresses
        )
        return Facts(links, tuple(addresses), tuple(_route_facts(self._routes(), index)))


def _route_facts(entries: Sequence[Entry], index: Mapping[str, int]) -> Iterator[Route]:
    for entry in entries:
        if "W" in entry.flags:
            continue  # a copy for one host, made by the kernel and gone with its original
        gateways: tuple[plans.IPAddress, ...] = ()
        if "G" in entry.flags and not _is_guard(entry):
            with suppress(ValueError):
                gateways = (ip_address(entry.gateway.partition("%")[0]),)
        kind, metric = (TYPE_UNREACHABLE, GUARD_METRIC) if _is_guard(entry) else (1, 0)
        yield Route(entry.destination, index.get(entry.interface, 0), metric=metric, type=kind, gateways=gateways)


def _is_guard(entry: Entry) -> bool:
    """Whether it refuses, as ours does; metrics, by which another system's guard is known as ours, do not exist."""
    return "R" in entry.flags and entry.gateway in ("127.0.0.1", "::1")


def _kind(name: str) -> str:
    return next((kind for kind in ("bridge", "ppp") if name.startswith(kind)), "tun" if name.startswith("utun") else "")


def _subnet(step: Step) -> Network:
    return ip_network(step.text("subnet"))


def _refused(step: Step, said: str) -> HostError:
    return HostError(f"{step}: {said or 'the command had no effect'}")
