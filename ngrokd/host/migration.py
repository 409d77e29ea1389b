"""Taking the Go ngrokd's place on this machine, and giving it back.

Most of it is left where it is, because both daemons use the same files: operator, key, certificate and addresses in the
state directory, and the section of the hosts file. What changes hands is who is started at boot, the configuration, and
the interface of that name. Each of these is a step with do and undo, as everything that is done to a machine.

A journal in the state directory tells what was there and which steps were meant, before the first is taken; so going
back works from another process, after a crash in the middle as well, and undoing what was never done is harmless.

The old daemon is found by what it left under its own names and stopped by the service manager that runs it. One that
nobody manages is not stopped: a process is not ended because of what it is called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import struct
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Final

from ngrokd import ask, files
from ngrokd.config_edit.go import Imported
from ngrokd.endpoints import printable
from ngrokd.errors import NgrokdError, NotRunningError, StateError, TakenError
from ngrokd.host import plan as plans
from ngrokd.host.hostsfile import HostsFileError, read_hosts
from ngrokd.host.plan import Action, Plan, Step, Undone
from ngrokd.host.services import OURS, Systemd
from ngrokd.host.units import GO_LABELS, Service

NAME: Final = "ngrokd"  # of the Go daemon's unit
JOURNAL: Final = "before-migration"  # a directory in the state directory
_JOURNAL_FILE: Final = "journal.json"
_STATE_FILES: Final = ("operator_id", "tls.crt", "tls.key", "tls.csr", "ip_mappings.json", "network_ports.json")
_LIMIT: Final = 16 << 20
_SECTION: Final = re.compile(rb"^# BEGIN ngrokd managed section\r?$", re.MULTILINE)

SAVE: Final = "save"
STOP: Final = "stop"
DISABLE: Final = "disable"
UNIT: Final = "unit"
SOCKET: Final = "socket"
INTERFACE: Final = "interface"
CONFIG: Final = "config"
SERVICE: Final = "service"
START: Final = "start"


@dataclass(frozen=True, slots=True)
class Places:
    """Where the Go daemon keeps its things. The defaults are its own; tests have others."""

    config: str = "/etc/ngrokd/config.yml"
    state: str = "/etc/ngrokd"
    socket: str = ask.DEFAULT_SOCKET
    hosts: str = "/etc/hosts"
    units: tuple[str, ...] = ("/etc/systemd/system", "/usr/lib/systemd/system", "/lib/systemd/system")
    jobs: str = "/Library/LaunchDaemons"
    programs: tuple[str, ...] = ("/usr/local/bin/ngrokd", "/usr/local/bin/ngrokctl")


@dataclass(slots=True)
class GoDaemon:
    """What was found of it; "" and 0 stand for what was not.

    Attributes:
        unit: path of its unit; `unit_in_etc`: it may be removed, others belong to a package.
        job: path of its launchd job.
        config: path of its config.yml.
        socket: path of its control socket, where one is.
        pid: the process that answers there as the Go daemon does.
        state: its state directory, whether it is there or not.
        operator_id: who this machine is to ngrok.
        addresses: names with an address; `shared` of them have one that another has too.
        interface: the link that it made, of kind dummy.
        in_hosts: its section is in the hosts file.
        programs: its executables, which are not ours.
    """

    unit: str = ""
    unit_text: bytes = b""
    job: str = ""
    config: str = ""
    socket: str = ""
    pid: int = 0
    state: str = ""
    operator_id: str = ""
    has_certificate: bool = False
    addresses: int = 0
    shared: int = 0
    interface: str = ""
    in_hosts: bool = False
    programs: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.unit or self.job or self.config or self.pid or self.interface)

    @property
    def facts(self) -> list[tuple[str, str]]:
        """What was found, for people."""
        shared = f", {self.shared} of them shared: those names get their own" if self.shared else ""
        return [
            ("Service", self.unit or self.job),
            ("Process", f"{self.pid}, which answers at {self.socket}" if self.pid else ""),
            ("Configuration", self.config),
            ("Operator", f"{self.operator_id}, kept in {self.state}" if self.operator_id else ""),
            ("Certificate", f"{self.state}/tls.crt" if self.has_certificate else ""),
            ("Addresses", f"{self.addresses} names{shared}" if self.addresses else ""),
            ("Hosts file", "its section is there" if self.in_hosts else ""),
            ("Interface", f"{self.interface}, of kind dummy" if self.interface else ""),
            ("Programs", ", ".join(self.programs)),
        ]


@dataclass(frozen=True, slots=True)
class Migration:
    """What would be done.

    Attributes:
        steps: in order.
        imported: the converted configuration; None where none is to be written.
        notes: what a person should know besides.
    """

    steps: Plan
    imported: Imported | None = None
    notes: tuple[str, ...] = ()


def find(places: Places, *, interface: str = "ngrokd0", kind_of: Callable[[str], str] | None = None) -> GoDaemon:
    """Look for it. Changes nothing; needs no rights, though some of it is only seen by root.

    Args:
        places: where to look.
        interface: the name of its link.
        kind_of: the kernel's word for the kind of a link, "" when there is none; None: nobody can tell.
    """
    found = GoDaemon(state=places.state)
    for directory in places.units:
        path = os.path.join(directory, f"{NAME}.service")
        text = _read(path)
        if text is not None and not text.startswith(OURS) and b"ngrokd" in text:
            found.unit, found.unit_text = path, text
            break
    for label in GO_LABELS:
        path = os.path.join(places.jobs, f"{label}.plist")
        if not found.job and os.path.exists(path):
            found.job = path
    if os.path.exists(places.config):
        found.config = places.config
    found.socket, found.pid = _answering(places.socket)
    _look_at_state(places.state, found)
    with suppress(HostsFileError):
        found.in_hosts = _SECTION.search(read_hosts(places.hosts)) is not None
    if kind_of is not None and kind_of(interface) == "dummy":
        found.interface = interface
    found.programs = tuple(path for path in places.programs if _is_foreign_program(path))
    return found


def _answering(path: str) -> tuple[str, int]:
    """The socket where one is, and the process of a Go daemon that answers there."""
    if not os.path.exists(path):
        return "", 0
    try:
        status = ask.ask(path, "status").data
    except NotRunningError:
        return path, 0
    except NgrokdError:
        return path, 0  # closed to us, or mute: not known to be one
    if not isinstance(status, dict) or "registered" not in status or "version" in status:
        return path, 0
    if sys.platform != "linux":
        return path, 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
            return path, int(struct.unpack("3i", probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0])
        except OSError:
            return path, 0


def _look_at_state(directory: str, found: GoDaemon) -> None:
    operator = (_read(os.path.join(directory, "operator_id")) or b"").decode("ascii", "replace").strip()
    found.operator_id = printable(operator, 128)
    found.has_certificate = os.path.exists(os.path.join(directory, "tls.crt"))
    try:
        mapping = json.loads(_read(os.path.join(directory, "ip_mappings.json")) or b"{}")
    except (ValueError, RecursionError):
        return
    if isinstance(mapping, dict):
        given = [value for value in mapping.values() if isinstance(value, str)]
        found.addresses, found.shared = len(given), len(given) - len(set(given))


def _is_foreign_program(path: str) -> bool:
    """An executable of machine code: ours is a script."""
    with suppress(OSError), open(os.path.realpath(path), "rb") as file:
        return file.read(4) in (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe")
    return False


def _read(path: str) -> bytes | None:
    try:
        return files.read_limited(path, _LIMIT)
    except (FileNotFoundError, StateError):
        return None


# --- what would be done ---


def plan_migration(
    found: GoDaemon, manager: Systemd, service: Service, *, config: str, imported: Imported | None
) -> Migration:
    """What it takes to be in its place. Changes nothing.

    Args:
        found: from `find`.
        manager: systemd.
        service: what is started instead.
        config: where our configuration is to be written.
        imported: it; None when none is to be written.

    Raises:
        TakenError: it runs, and no service manager runs it.
    """
    notes: list[str] = []
    steps: list[Step] = []
    state = manager.state(NAME) if found.unit else None
    runs = state is not None and state.active in ("active", "activating", "reloading")
    if found.pid and not runs:
        raise TakenError(
            f"the Go ngrokd runs as process {found.pid}, and no service manager runs it",
            remedy=f"stop it, where it was started or with: kill {found.pid}; then: ngrokd migrate",
        )
    if found.job:
        notes.append(f"{found.job} is a job of launchd; end it with: launchctl bootout system {found.job}")
    if runs:
        steps.append(
            _step(
                STOP,
                "two daemons would quarrel over names and routes",
                f"systemctl stop {NAME}",
                f"systemctl start {NAME}",
            )
        )
    if state is not None and state.enabled in ("enabled", "unknown"):
        steps.append(
            _step(
                DISABLE,
                "it must not come back with the next boot",
                f"systemctl disable {NAME}",
                f"systemctl enable {NAME}",
            )
        )
    if found.unit and found.unit == manager.path(service.name):
        steps.append(
            _step(
                UNIT,
                "its unit makes room for ours",
                f"rm {found.unit}",
                f"cp {JOURNAL}/unit {found.unit}",
                path=found.unit,
            )
        )
    elif found.unit:
        notes.append(
            f"{found.unit} is left where it is, perhaps a package's; {manager.path(service.name)} goes before it"
        )
    if found.socket and found.socket != service.socket:
        steps.append(
            _step(SOCKET, "nobody listens at its control socket any more", f"rm -f {found.socket}", path=found.socket)
        )
    if found.interface:
        steps.append(
            _step(
                INTERFACE,
                "its interface has the name of ours",
                f"ip link del {found.interface}",
                interface=found.interface,
            )
        )
    if imported is not None:
        steps.append(
            _step(
                CONFIG,
                f"{len(imported.settings)} settings of {found.config}",
                f"ngrokd config import {found.config}",
                f"rm {config}",
                path=config,
                sha256=sha256(imported.text.encode()).hexdigest(),
            )
        )
    elif found.config:
        notes.append(f"{found.config} is not converted; {config} is what counts")
    steps.append(
        _step(
            SERVICE,
            "this ngrokd is started at each boot",
            "ngrokd service install",
            "ngrokd service uninstall",
            name=service.name,
        )
    )
    if manager.is_here:
        steps.append(
            _step(
                START, "and now", f"systemctl start {service.name}", f"systemctl stop {service.name}", name=service.name
            )
        )
    still = "is still the Go daemon's program; move it away when it is not needed any longer"
    notes += [f"{program} {still}" for program in found.programs]
    save = Step(
        SAVE,
        (("directory", found.state),),
        "what there is now is kept, for going back",
        (f"mkdir -m 700 {found.state}/{JOURNAL}; cp ...",),
    )
    return Migration(Plan((save, *steps)), imported, tuple(notes))


def _step(kind: str, why: str, do: str, undo: str = "", **args: str) -> Step:
    return Step(kind, tuple(args.items()), why, (do,), (undo,) if undo else ())


# --- doing and undoing it ---


@dataclass(slots=True)
class Migrator:
    """Does the steps, and undoes them.

    Attributes:
        manager: systemd.
        service: what is started in its place.
        delete_link: removes an interface of kind dummy; returns whether there was one. Raises NgrokdError.
    """

    manager: Systemd
    service: Service
    delete_link: Callable[[str], bool]
    _found: GoDaemon = field(default_factory=GoDaemon)
    _migration: Migration = field(default_factory=lambda: Migration(Plan(())))
    _journal: str = ""

    def migrate(self, found: GoDaemon, migration: Migration) -> list[Step]:
        """Take its place. When a step fails, those before it are undone, and the error is raised."""
        self._found, self._migration = found, migration
        self._journal = os.path.join(found.state, JOURNAL)
        if os.path.lexists(self._journal):
            raise TakenError(
                f"{self._journal} is there: this machine was migrated before",
                remedy="go back with: ngrokd migrate --undo; or remove that directory when it is not needed any longer",
            )
        try:
            return plans.apply(migration.steps, self._actions())
        except NgrokdError:
            shutil.rmtree(
                self._journal, ignore_errors=True
            )  # everything is as it was, so there is nothing to go back to
            raise

    def go_back(self, state: str) -> Undone:
        """Give the Go daemon its place again. Raises StateError when there is no journal."""
        self._journal = os.path.join(state, JOURNAL)
        undone = plans.undo(_read_journal(self._journal), self._actions())
        if not undone.problems:
            shutil.rmtree(self._journal)
        return undone

    def _actions(self) -> Mapping[str, Action]:
        return {
            SAVE: Action(self._save, lambda _: False),
            STOP: Action(lambda _: self._call("stop", NAME), lambda _: self._call("start", NAME)),
            DISABLE: Action(lambda _: self._call("disable", NAME), lambda _: self._call("enable", NAME)),
            UNIT: Action(self._remove_unit, self._restore_unit),
            SOCKET: Action(_remove_dead_socket, lambda _: False),
            INTERFACE: Action(lambda step: self.delete_link(step.text("interface")), lambda _: False),
            CONFIG: Action(self._write_config, _remove_config),
            SERVICE: Action(self._install, self._uninstall),
            START: Action(
                lambda step: self._call("start", step.text("name")), lambda _: False
            ),  # uninstalling stops it
        }

    def _call(self, verb: str, name: str) -> bool:
        if verb in ("start", "stop") and not self.manager.is_here:
            return False
        self.manager.call(verb, name)
        return True

    def _save(self, step: Step) -> bool:
        state = step.text("directory")
        files.ensure_private_directory(state)
        files.ensure_private_directory(self._journal)
        for name in _STATE_FILES:
            data = _read(os.path.join(state, name))
            if data is not None:
                files.atomic_write(os.path.join(self._journal, name), data, 0o600)
        files.atomic_write(os.path.join(self._journal, "unit"), self._found.unit_text, 0o600)
        steps = [{"kind": one.kind, "args": dict(one.args)} for one in self._migration.steps]
        files.atomic_write(os.path.join(self._journal, _JOURNAL_FILE), json.dumps({"steps": steps}).encode(), 0o600)
        return True

    def _remove_unit(self, step: Step) -> bool:
        removed = files.remove(step.text("path"))
        self.manager.reload()
        return removed

    def _restore_unit(self, step: Step) -> bool:
        text = _read(os.path.join(self._journal, "unit"))
        if not text:
            raise StateError(f"{self._journal}/unit is missing, so {step.text('path')} cannot be restored")
        files.atomic_write(step.text("path"), text, 0o644)
        self.manager.reload()
        return True

    def _write_config(self, step: Step) -> bool:
        assert self._migration.imported is not None
        files.atomic_write(step.text("path"), self._migration.imported.text.encode(), 0o600)
        return True

    def _install(self, _step: Step) -> bool:
        self.manager.install(self.service)
        return True

    def _uninstall(self, step: Step) -> bool:
        there = self.manager.unit(step.text("name"))
        # Not ours: an earlier try to go back has come further than this.
        return there is not None and there.startswith(OURS) and self.manager.uninstall(step.text("name"))


def _remove_dead_socket(step: Step) -> bool:
    path = step.text("path")
    return not ask.listens(path) and files.remove(path)


def _remove_config(step: Step) -> bool:
    path = step.text("path")
    data = _read(path)
    if data is None:
        return False
    if sha256(data).hexdigest() != step.text("sha256"):
        raise StateError(f"{path} was changed since; it is left where it is", remedy=f"rm {path}")
    return files.remove(path)


def journal_of(state: str) -> Plan:
    """The steps of the migration that was done with this state directory. Raises StateError when there was none."""
    return _read_journal(os.path.join(state, JOURNAL))


def _read_journal(journal: str) -> Plan:
    path = os.path.join(journal, _JOURNAL_FILE)
    try:
        document: Any = json.loads(files.read_limited(path, _LIMIT))  # Any: a file, of which each part is looked at
        return Plan(tuple(_steps_of(document["steps"])))
    except FileNotFoundError:
        raise StateError(
            f"there is no {path}, so nothing is known of a migration",
            remedy="ngrokd migrate takes the Go daemon's place",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StateError(f"{path} is damaged", remedy=f"what was there before lies in {journal}") from None


def _steps_of(listed: Iterable[Mapping[str, Any]]) -> Iterable[Step]:
    for one in listed:
        yield Step(str(one["kind"]), tuple((str(name), str(value)) for name, value in one["args"].items()), "", ())


def kind_of_link(name: str) -> str:
    """The kernel's word for the kind of a link, "" when there is none."""
    if sys.platform != "linux":
        return ""
    from ngrokd.host import linux

    return linux.kind_of(name)
