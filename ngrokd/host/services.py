"""The service managers, through their own commands: systemctl and launchctl.

Every step is asked for, never remembered, so that each can be repeated. A unit that is not ours, such as the Go
daemon's of the same name, is never overwritten unless that was said.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ngrokd import files
from ngrokd.endpoints import printable
from ngrokd.errors import Exit, NgrokdError, PermissionMissingError, TakenError
from ngrokd.host.units import Service, systemd_unit

UNITS: Final = "/etc/systemd/system"
BOOTED: Final = "/run/systemd/system"  # sd_booted(3)
OURS: Final = b'# Made by "ngrokd service install"'
_UNIT_BYTES: Final = 1 << 20
_COMMAND_S: Final = 120.0

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]


class ServiceError(NgrokdError):
    """The service manager is missing, or refused."""

    exit_code: ClassVar[Exit] = Exit.UNREACHABLE


@dataclass(frozen=True, slots=True)
class State:
    """What systemd says of a unit: its own words."""

    installed: bool
    ours: bool
    enabled: str
    active: str
    pid: int


def run_command(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program of the system. Raises ServiceError when there is none, or it hangs."""
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_COMMAND_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ServiceError(
            f"there is no {command[0]} on this machine",
            remedy='run "ngrokd run" under what starts programs here; "ngrokd service print" shows a unit for systemd',
        ) from None
    except subprocess.TimeoutExpired:
        raise ServiceError(f"{' '.join(command)} did not come back within {_COMMAND_S:g} s") from None


class Systemd:
    """Units in /etc/systemd/system.

    Args:
        run: runs a command; replaced where there is no systemd to talk to.
        units: the directory of units.
        booted: exists where systemd is what started the machine.
    """

    def __init__(self, run: Run = run_command, *, units: str = UNITS, booted: str = BOOTED) -> None:
        self._run = run
        self._units = units
        self._booted = booted

    @property
    def is_here(self) -> bool:
        """Whether systemd runs this machine (or this container)."""
        return os.path.isdir(self._booted)

    def path(self, name: str) -> str:
        """Where a unit's file is."""
        return os.path.join(self._units, f"{name}.service")

    def unit(self, name: str) -> bytes | None:
        """The text of an installed unit, None when there is none. Raises StateError."""
        try:
            return files.read_limited(self.path(name), _UNIT_BYTES)
        except FileNotFoundError:
            return None

    def install(self, service: Service, *, force: bool = False) -> bool:
        """Write the unit and enable it. Returns whether the text is another one than before.

        Raises:
            TakenError: another unit has the name.
            PermissionMissingError, StateError, ServiceError: it could not be done.
        """
        text, there = systemd_unit(service).encode(), self.unit(service.name)
        if there is not None and not there.startswith(OURS) and not force:
            raise TakenError(
                f"{self.path(service.name)} is not ours, perhaps the Go daemon's",
                remedy="take its place with: sudo ngrokd migrate; or overwrite it with --force",
            )
        changed = text != there
        if changed:
            if not os.path.isdir(self._units):
                raise ServiceError(
                    f"there is no systemd on this machine ({self._units} is missing)",
                    remedy='"ngrokd service print" shows what it would be told',
                )
            files.atomic_write(self.path(service.name), text, 0o644)
            self.reload()
        self.call("enable", service.name)
        return changed

    def uninstall(self, name: str) -> bool:
        """Stop, disable and remove our unit. Returns whether there was one. Raises as `install`."""
        there = self.unit(name)
        if there is None:
            return False
        if not there.startswith(OURS):
            raise TakenError(f"{self.path(name)} is not ours", remedy="remove it by hand if nobody needs it")
        if self.is_here:
            self.call("stop", name)
        self.call("disable", name)
        files.remove(self.path(name))
        self.reload()
        return True

    def reload(self) -> None:
        """Let systemd read the units again, where it runs."""
        if self.is_here:
            self.call("daemon-reload")

    def state(self, name: str) -> State:
        """What is known of a unit; "unknown" where systemd does not run."""
        there = self.unit(name)
        ours = there is not None and there.startswith(OURS)
        if not self.is_here:
            return State(there is not None, ours, "unknown", "unknown", 0)
        keys = ("UnitFileState", "ActiveState", "MainPID")
        shown = self._run(["systemctl", "show", f"{name}.service", f"--property={','.join(keys)}"]).stdout
        values = dict(line.partition("=")[::2] for line in shown.splitlines())
        pid = values.get("MainPID", "")
        return State(
            there is not None,
            ours,
            values.get("UnitFileState") or "disabled",
            values.get("ActiveState") or "inactive",
            int(pid) if pid.isdecimal() else 0,
        )

    def call(self, verb: str, name: str = "") -> None:
        """systemctl VERB [NAME]. Raises ServiceError, PermissionMissingError with what it said."""
        if verb in ("start", "stop", "restart") and not self.is_here:
            raise ServiceError(
                f"systemd does not run this machine ({self._booted} is missing), so it can {verb} nothing",
                remedy="run the daemon with: sudo ngrokd run" if verb != "stop" else "",
            )
        command = ["systemctl", verb, *([f"{name}.service"] if name else [])]
        done = self._run(command)
        if done.returncode == 0:
            return
        said = printable(" ".join((done.stderr or done.stdout).split()), 300)
        if os.geteuid() != 0:
            raise PermissionMissingError(f"{' '.join(command)}: {said}", remedy="use sudo")
        remedy = f"see: journalctl -u {name} -n 50" if name else ""
        raise ServiceError(f"{' '.join(command)} failed: {said or f'exit code {done.returncode}'}", remedy=remedy)
