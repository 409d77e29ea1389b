"""Who is in the way of `run`: what it would refuse to start over, found without starting and without rights.

`run` stops at the first; here all are listed. A daemon that runs with this configuration is no obstacle but the
answer: it holds these things itself.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from ngrokd import config, files
from ngrokd.config import Settings
from ngrokd.errors import NgrokdError, PermissionMissingError, StateError, TakenError
from ngrokd.host import claims
from ngrokd.host.planning import RunPlan
from ngrokd.ops.control import socket_owner
from ngrokd.ops.peers import port_owner, process_name

ROUTES: Final = "routes"
INTERFACE: Final = "interface"
STATE: Final = "state"
CONTROL: Final = "control"
HTTP: Final = "http"


@dataclass(frozen=True, slots=True)
class Obstacle:
    """One thing that somebody else has. `about` is one of the constants above."""

    about: str
    what: str
    remedy: str = ""

    def as_data(self) -> dict[str, str]:
        """For --json."""
        return {"about": self.about, "what": self.what, "remedy": self.remedy}


@dataclass(frozen=True, slots=True)
class Survey:
    """What stands in the way, and what merely has to be known.

    Attributes:
        obstacles: `run` would refuse to start.
        shadows: wider routes that lose the subnet to us, which may be wanted or not; sentences.
        unseen: what could not be looked at from here, and why; sentences.
        daemon: who runs already with this very configuration, in words; "" when nobody does.
    """

    obstacles: tuple[Obstacle, ...] = ()
    shadows: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()
    daemon: str = ""


@dataclass(slots=True)
class _Found:
    obstacles: list[Obstacle] = field(default_factory=list)
    shadows: list[str] = field(default_factory=list)
    unseen: list[str] = field(default_factory=list)


def survey(settings: Settings, plan: RunPlan) -> Survey:
    """Look at this machine. Raises nothing for what cannot be seen from here: that is said."""
    found = _Found()
    daemon = running_daemon(settings)
    _look_at_routes(plan, found)
    if not daemon:
        for obstacle in _holders(settings, found):
            found.obstacles.append(obstacle)
    return Survey(tuple(found.obstacles), tuple(found.shadows), tuple(found.unseen), daemon)


def running_daemon(settings: Settings) -> str:
    """Who serves the control socket, in words, when it also holds the interface or the state; "" when nobody does.

    The Go daemon holds neither, and so is somebody else. Where neither can be seen, the socket alone decides.
    """
    holders = [process_name(pid) for pid in _pids(settings)]
    try:
        owner = socket_owner(settings.control.socket)
    except PermissionMissingError:
        return holders[0] if holders else ""  # there is one, and whose else would the socket be
    if owner is None:
        return ""
    can_be_seen = sys.platform == "linux" or os.access(_lock_path(settings), os.R_OK)
    return owner if owner in holders or not can_be_seen else ""


def _pids(settings: Settings) -> Iterator[int]:
    if sys.platform == "linux" and (pid := claims.interface_holder(settings.net.interface)):
        yield pid
    try:
        owner = files.lock_owner(_lock_path(settings))
    except StateError:
        return
    if owner is not None and owner.pid:
        yield owner.pid


def _look_at_routes(plan: RunPlan, found: _Found) -> None:
    if sys.platform != "linux" or plan.platform != "linux":
        return
    from ngrokd.host import linux

    try:
        for subnet in plan.whole.subnets:
            judgement = linux.find_conflicts(subnet, plan.steps.interface)
            for conflict in judgement.conflicts:
                remedy = conflict.remedy or linux.other_subnet(subnet)
                found.obstacles.append(Obstacle(ROUTES, f"{subnet} is taken: {conflict}", remedy))
            found.shadows += [f"{shadow} is wider than {subnet} and loses it to us" for shadow in judgement.shadows]
    except NgrokdError as error:
        found.unseen.append(f"routes could not be looked at: {error}")


def _holders(settings: Settings, found: _Found) -> Iterator[Obstacle]:
    yield from _interface(settings, found)
    yield from _state(settings, found)
    try:
        owner = socket_owner(settings.control.socket)
    except PermissionMissingError as error:
        found.unseen.append(str(error))
    else:
        if owner is not None:
            what = f"the control socket {settings.control.socket} belongs to {owner}"
            yield Obstacle(CONTROL, what, "stop it first, or set control.socket to another path")
    yield from _http(settings)


def _interface(settings: Settings, found: _Found) -> Iterator[Obstacle]:
    if sys.platform != "linux":
        return
    from ngrokd.host import linux

    interface = settings.net.interface
    pid = claims.interface_holder(interface)
    if pid is not None:
        who = process_name(pid) if pid else "another process"
        remedy = "stop it, or set net.interface, net.subnet and state.directory to others"
        yield Obstacle(INTERFACE, f"interface {interface} belongs to another ngrokd, {who}", remedy)
        return
    try:
        linux.check_interface(interface)
    except TakenError as error:
        yield Obstacle(INTERFACE, str(error), error.remedy)
    except NgrokdError as error:
        found.unseen.append(f"interface {interface} could not be looked at: {error}")


def _state(settings: Settings, found: _Found) -> Iterator[Obstacle]:
    try:
        owner = files.lock_owner(_lock_path(settings))
    except StateError as error:
        found.unseen.append(str(error))
        return
    if owner is not None:
        what = f"the state directory {settings.state.directory} belongs to {owner}"
        yield Obstacle(STATE, what, "stop it, or set state.directory to another one")


def _http(settings: Settings) -> Iterator[Obstacle]:
    if not settings.http.listen:
        return
    host, port = config.split_address(settings.http.listen, None, zero=True)
    address = "127.0.0.1" if host == "localhost" else host
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            what = f"http.listen: {settings.http.listen}: {error.strerror}"
            if error.errno == errno.EADDRINUSE:
                what = f"port {port} (http.listen) belongs to {port_owner(port) or 'another process'}"
            yield Obstacle(HTTP, what, 'set http.listen to another port, or to "" for none')


def _lock_path(settings: Settings) -> str:
    return os.path.join(settings.state.directory, "lock")
