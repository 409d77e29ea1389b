"""Everything the daemon changes on this machine, as one value.

A `Plan` is a tuple of `Step`s in the order in which they are done; undone in the opposite one. A step is data: what
kind of thing, with which arguments, why, and how a person would do and undo it in a shell. Nothing here touches the
machine: `run` applies the plan, `plan` prints it, `cleanup` undoes it, tests look at it, on any system.

Who does a step is an `Action`, found by the step's kind. The kernel's (guard, link, address, route) come with the
platform, in linux.py; those of the daemon (opening the device, the section of the hosts file) it hands in. So the three
loops at the end of this module are all there is to say about order, failure and repetition:

*   `apply` undoes what it has changed when a step fails, and only that: a guard route that an earlier run left, and
    that is still needed, survives a start that failed.
*   `undo` goes on when something fails, tries everything, and reports.
*   `ensure` repairs: an action says whether it had to change anything, and nothing is done twice.

The order itself is the safety. The guard comes first and goes last: at no moment do names lead to addresses that leave
the machine by the default route. The hosts section comes last and goes first: a name is never visible before its path
works.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_interface, ip_network
from typing import ClassVar, Final

from ngrokd.errors import Exit, NgrokdError

Network = IPv4Network | IPv6Network
IPAddress = IPv4Address | IPv6Address

# The worst metric but a few: every real route to the subnet, ours first, is preferred. 0xFF000000 + 0x2000; its being
# unusual is also how a guard that a killed run left is recognised as one of ours.
GUARD_METRIC: Final = 4278198272
TXQUEUELEN: Final = 5000  # packets; the kernel's 500 for a TUN drops bursts of a single bulk flow
DEFAULT_INTERFACE: Final = "ngrokd0"

STATE: Final = "state"
GUARD: Final = "guard"
DEVICE: Final = "device"
LINK: Final = "link"
ADDRESS: Final = "address"
ROUTE: Final = "route"
CONTROL: Final = "control"
HTTP: Final = "http"
HOSTS: Final = "hosts"
KERNEL: Final = (GUARD, DEVICE, LINK, ADDRESS, ROUTE)  # what is done to the network; the rest are files and sockets


class HostError(NgrokdError):
    """The machine refused a change; the message names the step, the system's reason and the interface."""

    exit_code: ClassVar[Exit] = Exit.CANNOT_CREATE


@dataclass(frozen=True, slots=True)
class Step:
    """One change to the machine. Two steps are equal when they do the same, whatever is said about them.

    Attributes:
        kind: who does it; one of the constants above, or a word of the daemon's own.
        args: what exactly, as pairs in a fixed order.
        why: one sentence for people.
        shell: how a person would do it; lines that begin with # are not commands.
        shell_undo: how a person would undo it; empty where it goes by itself with an earlier step.
    """

    kind: str
    args: tuple[tuple[str, str | int], ...]
    why: str = field(compare=False)
    shell: tuple[str, ...] = field(compare=False)
    shell_undo: tuple[str, ...] = field(compare=False, default=())

    def text(self, name: str) -> str:
        """An argument as text."""
        return str(dict(self.args)[name])

    def number(self, name: str) -> int:
        """An argument that is a number."""
        return int(dict(self.args)[name])

    @property
    def version(self) -> int:
        """Of IP, 4 or 6; 0 when the step is about both."""
        args = dict(self.args)
        network = args.get("subnet") or args.get("address")
        return 0 if network is None else ip_interface(network).version

    def __str__(self) -> str:
        return " ".join([self.kind, *(f"{name}={value}" for name, value in self.args)])


@dataclass(frozen=True, slots=True)
class Plan:
    """The ordered steps."""

    steps: tuple[Step, ...]

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def backwards(self) -> tuple[Step, ...]:
        """The steps in the order in which they are undone."""
        return self.steps[::-1]

    def only(self, *kinds: str) -> Plan:
        """The part made of these kinds."""
        return Plan(tuple(step for step in self.steps if step.kind in kinds))

    def without(self, *kinds: str) -> Plan:
        """The part without these kinds."""
        return Plan(tuple(step for step in self.steps if step.kind not in kinds))

    def of_version(self, version: int) -> Plan:
        """The part that is about this version of IP, and what is about both."""
        return Plan(tuple(step for step in self.steps if step.version in (0, version)))

    @property
    def interface(self) -> str:
        """The link that the plan is about, "" when it has none."""
        return next((step.text("interface") for step in self.steps if step.kind in (DEVICE, LINK, ROUTE)), "")

    @property
    def subnets(self) -> tuple[Network, ...]:
        """What is routed into it."""
        return tuple(
            dict.fromkeys(ip_network(step.text("subnet")) for step in self.steps if step.kind in (ROUTE, GUARD))
        )

    def shell(self) -> str:
        """The plan as a shell script with its reasons, for `ngrokd plan`."""
        return _script((step.why, step.shell) for step in self.steps)

    def shell_undo(self) -> str:
        """How to undo it by hand."""
        return _script(("", step.shell_undo) for step in self.backwards())

    def as_data(self) -> list[dict[str, object]]:
        """The plan for `--json`."""
        return [
            {
                "kind": step.kind,
                "args": dict(step.args),
                "why": step.why,
                "do": list(step.shell),
                "undo": list(step.shell_undo),
            }
            for step in self.steps
        ]


def _script(parts: Iterable[tuple[str, tuple[str, ...]]]) -> str:
    lines: list[str] = []
    for why, commands in parts:
        if why:
            lines.append(f"# {why}")
        lines.extend(commands)
    return "".join(line + "\n" for line in lines)


# --- Linux ---


def linux_plan(
    interface: str,
    subnet: IPv4Network,
    mtu: int,
    *,
    subnet6: IPv6Network | None = None,
    offload: bool = True,
    txqueuelen: int = TXQUEUELEN,
    hosts_path: str = "/etc/hosts",
    configure: bool = True,
    state_directory: str = "",
    control_socket: str = "",
    http_listen: str = "",
) -> Plan:
    """What a run changes on Linux.

    Args:
        interface: the name of the TUN link.
        subnet: where the endpoints' addresses lie; its first address goes on the link, as a /32: an endpoint's address
            on a link would make the kernel deliver to itself, and no packet would reach the TUN.
        mtu: of the link, bytes.
        subnet6: the same for IPv6; None for none, and then the link gets no IPv6 address at all.
        offload: whether the device has a virtio header (only told in the shell form).
        txqueuelen: of the link, packets.
        hosts_path: the hosts file, "" for none.
        configure: False leaves link, addresses and routes to the administrator.
        state_directory: where the daemon keeps its state and a lock, "" for none.
        control_socket: where it is asked, "" for none.
        http_listen: ADDRESS:PORT of the health checks, "" for none.
    """
    subnets: list[Network] = [subnet] if subnet6 is None else [subnet, subnet6]
    steps = [_device(interface, offload)]
    if configure:
        steps = [
            *(_guard(network) for network in subnets),
            *steps,
            _link(interface, mtu, txqueuelen),
            *(_address(interface, network) for network in subnets),
            *(_route(interface, network) for network in subnets),
        ]
    return Plan((*_before(state_directory), *steps, *_after(control_socket, http_listen, hosts_path, interface)))


def _before(state_directory: str) -> Iterator[Step]:
    if state_directory:
        yield state(state_directory)


def _after(control_socket: str, http_listen: str, hosts_path: str, interface: str) -> Iterator[Step]:
    if control_socket:
        yield control(control_socket)
    if http_listen:
        yield http(http_listen)
    if hosts_path:
        yield names(hosts_path, interface)


def state(directory: str) -> Step:
    """The state directory and the lock in it."""
    path, lock = shlex.quote(directory), f"{directory.rstrip('/')}/lock"
    return Step(
        STATE,
        (("directory", directory),),
        "operator, certificate and the addresses of all names are kept here; a lock in it keeps a second daemon away",
        (f"mkdir -p -m 700 {path}", f"# {lock}: held as long as the daemon lives"),
        (f"rm -f {shlex.quote(lock)}  # the directory is kept",),
    )


def control(path: str) -> Step:
    """The control socket."""
    return Step(
        CONTROL,
        (("path", path),),
        "the commands (ngrokd status, list, ...) ask the daemon here",
        (f"# {path}: a Unix socket, mode 0660",),
        (f"rm -f {shlex.quote(path)}",),
    )


def http(listen: str) -> Step:
    """The port for health checks."""
    return Step(HTTP, (("listen", listen),), "health checks over HTTP", (f"# {listen}: a TCP listener",))


def gateway(network: Network) -> IPAddress:
    """The address of the subnet that is the machine's own."""
    return network.network_address + 1


def ip_command(network: Network) -> str:
    """The shell command that speaks of such networks."""
    return "ip" if network.version == 4 else "ip -6"


def _guard(network: Network) -> Step:
    route = f"unreachable {network} metric {GUARD_METRIC}"
    return Step(
        GUARD,
        (("subnet", str(network)), ("metric", GUARD_METRIC)),
        "whenever the daemon is dead, connections fail at once instead of leaving by the default route",
        (f"{ip_command(network)} route add {route}",),
        (f"{ip_command(network)} route del {route}",),
    )


def _device(interface: str, offload: bool) -> Step:
    name = shlex.quote(interface)
    header = " vnet_hdr" if offload else ""
    return Step(
        DEVICE,
        (("interface", interface), ("offload", int(offload))),
        "the apps' packets come to the daemon through a TUN device, which lives as long as the daemon",
        (f"ip tuntap add dev {name} mode tun multi_queue{header}  # opened by the daemon",),
        (f"ip link del dev {name}  # goes with the daemon",),
    )


def _link(interface: str, mtu: int, txqueuelen: int) -> Step:
    name = shlex.quote(interface)
    return Step(
        LINK,
        (("interface", interface), ("mtu", mtu), ("txqueuelen", txqueuelen), ("addrgenmode", "none")),
        "a queue for bursts, no IPv6 link-local address and so no router solicitations, and up",
        (
            f"ip link set dev {name} addrgenmode none",
            f"ip link set dev {name} mtu {mtu} txqueuelen {txqueuelen}",
            f"ip link set dev {name} up",
        ),
    )


def _address(interface: str, network: Network) -> Step:
    address = f"{gateway(network)}/{network.max_prefixlen}"
    command = f"{ip_command(network)} addr {{}} {address} dev {shlex.quote(interface)}"
    return Step(
        ADDRESS,
        (("interface", interface), ("address", address)),
        "the machine's own address towards the endpoints; a single one, so that none of theirs is local",
        (command.format("add"),),
        (command.format("del"),),
    )


def _route(interface: str, network: Network) -> Step:
    command = f"{ip_command(network)} route {{}} {network} dev {shlex.quote(interface)}"
    return Step(
        ROUTE,
        (("interface", interface), ("subnet", str(network))),
        "the endpoints' addresses lead into the device",
        (command.format("add"),),
        (command.format("del"),),
    )


def names(path: str, interface: str, *, sed: str = "sed -i", after: tuple[str, ...] = ()) -> Step:
    """The section of the hosts file.

    Args:
        path: the hosts file.
        interface: whose section it is.
        sed: how sed edits a file in place here.
        after: commands that follow each change.
    """
    suffix = "" if interface == DEFAULT_INTERFACE else f" ({interface})"
    begin, end = (f"# {word} ngrokd managed section{suffix}" for word in ("BEGIN", "END"))
    script = f"/^{_sed(begin)}$/,/^{_sed(end)}$/d"
    return Step(
        HOSTS,
        (("path", path), ("interface", interface)),
        "the endpoints' names, in a section of the hosts file; every other byte of it stays",
        (f'# {path}: lines ADDRESS<TAB>NAME between "{begin}" and "{end}"', *after),
        (f"{sed} {shlex.quote(script)} {shlex.quote(path)}", *after),
    )


def _sed(text: str) -> str:
    return re.sub(r"([][\\/.*^$])", r"\\\1", text)


# --- doing and undoing ---


@dataclass(frozen=True, slots=True)
class Action:
    """How steps of one kind are done and undone.

    Attributes:
        do: make it so; returns whether anything had to be changed. Doing it twice is fine.
        undo: take it back; returns whether there was anything. What is gone already is fine.
    """

    do: Callable[[Step], bool]
    undo: Callable[[Step], bool]


@dataclass(frozen=True, slots=True)
class Undone:
    """What `undo` came to.

    Attributes:
        removed: the steps that were in force and no longer are.
        problems: what could not be undone, and why.
    """

    removed: tuple[Step, ...]
    problems: tuple[NgrokdError, ...]


def apply(plan: Plan, actions: Mapping[str, Action]) -> list[Step]:
    """Do every step in order; when one fails, undo those that had changed something, and raise.

    Returns: the steps that changed something; the others were so already.
    """
    changed: list[Step] = []
    try:
        for step in plan:
            if actions[step.kind].do(step):
                changed.append(step)  # noqa: PERF401 - it must be known how far we came
    except BaseException:
        for step in reversed(changed):
            with suppress(NgrokdError):  # the first failure is the one to be told
                actions[step.kind].undo(step)
        raise
    return changed


def ensure(plan: Plan, actions: Mapping[str, Action]) -> list[Step]:
    """Do what is no longer in force, in order. Returns: the steps that had to be done again.

    Raises:
        NgrokdError: a step failed; those before it are in force.
    """
    return [step for step in plan if actions[step.kind].do(step)]


def undo(plan: Plan, actions: Mapping[str, Action]) -> Undone:
    """Undo every step, backwards, going on whatever fails."""
    removed: list[Step] = []
    problems: list[NgrokdError] = []
    for step in plan.backwards():
        try:
            if actions[step.kind].undo(step):
                removed.append(step)
        except NgrokdError as error:
            problems.append(error)
    return Undone(tuple(removed), tuple(problems))
