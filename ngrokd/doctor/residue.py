"""What a daemon that was killed left on this machine, and how that is taken away.

A killed daemon leaves exactly this: the guard routes, its section of the hosts file, its control socket, and lock files
that nobody holds. (The device, and with it the address and the route, went with the process; where somebody made the
device persistent they stayed.) Nothing else is looked for, so nothing else can be removed, and the state is kept.

Invariant: nothing is removed while a daemon lives that it could belong to. So the locks which a daemon holds are
taken first and held to the end, and whoever has one of them is named.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network
from typing import Final

from ngrokd import files
from ngrokd.config import Settings
from ngrokd.errors import NgrokdError, StateError, TakenError
from ngrokd.host import claims
from ngrokd.host.hostsfile import HostsFileError, edit_hosts, read_hosts
from ngrokd.host.plan import GUARD_METRIC, KERNEL, Plan, ip_command
from ngrokd.host.planning import expected_subnet6, plan_run
from ngrokd.names import hosts
from ngrokd.ops.control import socket_owner

_LOCK: Final = "lock"


@dataclass(frozen=True, slots=True)
class Piece:
    """One thing that was left.

    Attributes:
        kind: guard, route, address, hosts, socket or lock.
        what: which, in words.
        remove: takes it away; returns whether it was still there. Raises NgrokdError.
    """

    kind: str
    what: str
    remove: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class Residue:
    """What there is, in the order in which it is removed, and what was seen and is not touched."""

    pieces: tuple[Piece, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Removed:
    """What `remove` came to: the pieces that are gone, and why the others are not."""

    removed: tuple[Piece, ...]
    problems: tuple[NgrokdError, ...]


def find(settings: Settings) -> Residue:
    """Look for what a daemon with this configuration would have left. Changes nothing, needs no rights.

    Raises NgrokdError when the kernel does not answer.
    """
    notes: list[str] = []
    pieces = [*_hosts(settings, notes), *_kernel(settings, notes), *_socket(settings, notes), *_locks(settings)]
    return Residue(tuple(pieces), tuple(notes))


def check_nobody_lives(settings: Settings) -> None:
    """Raise TakenError when a daemon holds what the configuration names; needs no rights."""
    holder = claims.interface_holder(settings.net.interface) if sys.platform == "linux" else None
    if holder is not None:
        raise _alive(f"interface {settings.net.interface}", f"process {holder}" if holder else "another process")
    with suppress(StateError):
        owner = files.lock_owner(os.path.join(settings.state.directory, _LOCK))
        if owner is not None:
            raise _alive(settings.state.directory, str(owner))
    path = settings.control.socket
    if (user := socket_owner(path)) is not None:
        raise _alive(path, user)


def remove(settings: Settings) -> Removed:
    """Take it all away, going on when something fails.

    Raises:
        TakenError: a daemon lives; nothing was touched.
        NgrokdError: the kernel does not answer, or a lock cannot be taken; nothing was touched.
    """
    check_nobody_lives(settings)
    removed: list[Piece] = []
    problems: list[NgrokdError] = []
    with ExitStack() as held:
        if sys.platform == "linux":
            held.enter_context(claims.claim_interface(settings.net.interface))
            _check_unheld(settings.net.interface)
        lock = files.Lock(os.path.join(settings.state.directory, _LOCK), "ngrokd cleanup")
        found = find(settings)  # before the lock is taken, which would be found as well
        if os.path.isdir(settings.state.directory) and os.access(settings.state.directory, os.W_OK):
            held.enter_context(lock)
        for piece in found.pieces:
            try:
                if piece.remove():
                    removed.append(piece)
            except NgrokdError as error:
                problems.append(error)
    return Removed(tuple(removed), tuple(problems))


def _alive(what: str, who: str) -> TakenError:
    return TakenError(
        f"ngrokd is running: {what} belongs to {who}", remedy="stop it; then it removes everything by itself"
    )


def _check_unheld(interface: str) -> None:
    from ngrokd.host import linux

    try:
        linux.check_interface(interface)
    except TakenError as error:
        raise TakenError(str(error), remedy="stop it first") from None


def _hosts(settings: Settings, notes: list[str]) -> Iterator[Piece]:
    path, subnet = settings.hosts.path, IPv4Network(settings.net.subnet)
    subnet6, _ = expected_subnet6(settings, here=False)
    subnets = (subnet,) if subnet6 is None else (subnet, subnet6)
    without = partial(hosts.remove, instance=settings.net.interface, subnet=subnets)
    try:
        text = read_hosts(path)
    except HostsFileError as error:
        notes.append(str(error))
        return
    rest = without(text)
    if rest != text:
        lines = len(text.splitlines()) - len(rest.splitlines())
        yield Piece("hosts", f"{lines} lines of {path}, the section of ngrokd", partial(edit_hosts, path, without))


def _kernel(settings: Settings, notes: list[str]) -> Iterator[Piece]:
    if sys.platform != "linux":
        return
    from ngrokd.host import linux
    from ngrokd.host.plan import ADDRESS, DEVICE, GUARD, ROUTE

    subnet6, _ = expected_subnet6(settings, here=False)
    ours = plan_run(settings, "linux", subnet6=subnet6).steps.only(*KERNEL)
    there = linux.in_force(ours)
    for step in there.only(GUARD, ADDRESS, ROUTE).backwards():
        yield Piece(step.kind, step.shell[0].partition(" add ")[2], partial(_undo, Plan((step,))))
    if there.only(DEVICE):
        interface = settings.net.interface
        notes.append(
            f"interface {interface} is there, and no daemon made it so; remove it with: ip link del {interface}"
        )
    mine = ours.subnets
    for orphan in linux.orphaned_guards():
        if orphan not in mine:
            route = f"unreachable {orphan} metric {GUARD_METRIC}"
            notes.append(
                f"the guard route of another ngrokd, for {orphan}, is left alone; if that one will not run again:"
                f" {ip_command(orphan)} route del {route}"
            )


def _undo(plan: Plan) -> bool:
    from ngrokd.host import linux

    undone = linux.undo(plan)
    for problem in undone.problems:
        raise problem
    return bool(undone.removed)


def _socket(settings: Settings, notes: list[str]) -> Iterator[Piece]:
    path = settings.control.socket
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return
    if not stat.S_ISSOCK(mode):
        notes.append(f"{path} is no socket, and is left alone")
        return
    yield Piece("socket", path, partial(files.remove, path))


def _locks(settings: Settings) -> Iterator[Piece]:
    for path in (settings.control.socket + ".lock", os.path.join(settings.state.directory, _LOCK)):
        if os.path.lexists(path):
            yield Piece("lock", path, partial(files.remove, path))
