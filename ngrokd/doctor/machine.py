"""The checks of this machine: rights, device, files, routes, other daemons. None of them waits for the network."""

from __future__ import annotations

import fcntl
import os
import re
import resource
import stat
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

from ngrokd import files
from ngrokd.doctor import obstacles, residue
from ngrokd.doctor.findings import Finding, fail, ok, warn
from ngrokd.doctor.patient import Patient
from ngrokd.errors import NgrokdError, StateError
from ngrokd.host import migration
from ngrokd.host.hostsfile import HostsFileError, read_hosts
from ngrokd.host.planning import expected_subnet6, plan_run
from ngrokd.names import hosts

_SUDO: Final = "run it as root for a full answer: sudo ngrokd doctor"
_RESERVED_DESCRIPTORS: Final = 64  # the daemon keeps as many for itself
_FEW_DESCRIPTORS: Final = 1024
_MANY_CONNECTIONS: Final = 4000  # nearly nobody has more, so less than limits.flows is no trouble then
_LITTLE_SPACE: Final = 1 << 20  # bytes; the state of 65,000 names takes about 20 MiB, that of a hundred 50 KiB
# linux/fs.h
_FS_IOC_GETFLAGS: Final = 0x80086601
_FS_IMMUTABLE_FL: Final = 0x10
_MARKER: Final = re.compile(rb"^# (BEGIN|END) ngrokd managed section(?: \(([!-'*-~]{1,64})\))?\r?$", re.MULTILINE)


def daemon(patient: Patient) -> Iterator[Finding]:
    """Does one run, and what does it say of itself?"""
    status, socket = patient.status, patient.settings.control.socket
    if patient.daemon_hidden:
        yield warn("daemon", f"a daemon listens at {socket}, and this user may not ask it", _SUDO)
        return
    if patient.daemon_problem:
        yield fail("daemon", patient.daemon_problem, "see its log; restart it if it hangs")
        return
    if status is None:
        yield warn("daemon", f"no daemon runs here (nobody answers at {socket})", "start it: sudo ngrokd run")
        return
    if "version" not in status:
        yield fail("daemon", f"the Go ngrokd answers at {socket}", "take its place: sudo ngrokd migrate")
        return
    state = str(status.get("state", ""))
    who = f"ngrokd {status['version']} runs as process {status.get('pid')}"
    if state in ("ready", "starting"):
        yield ok("daemon", f"{who}, {state}", state=state)
    else:
        remedy = {"waiting_for_key": "give it an API key: sudo ngrokd set-api-key"}.get(state, "see: ngrokd status")
        yield warn("daemon", f"{who}, {state.replace('_', ' ')}", remedy, state=state)


def go_daemon(patient: Patient) -> Iterator[Finding]:
    """Is the Go daemon installed here, or does it run at its own socket?"""
    found = migration.find(migration.Places(), kind_of=migration.kind_of_link)
    what = [
        name
        for name, there in (("a unit", found.unit), ("a job", found.job), ("an interface", found.interface))
        if there
    ]
    if found.pid and found.pid != patient.pid:
        said = f"the Go ngrokd runs as process {found.pid}, and wants the same names and routes"
        yield fail("go-daemon", said, "take its place: sudo ngrokd migrate")
    elif what:
        said = f"the Go ngrokd is installed: it has {' and '.join(what)}"
        yield warn("go-daemon", said, "take its place: sudo ngrokd migrate (--dry-run shows what that is)")


def rights(patient: Patient) -> Iterator[Finding]:
    """CAP_NET_ADMIN and /dev/net/tun: ours, for the daemon that would be started."""
    if sys.platform != "linux":
        if patient.is_root or patient.status is not None:
            yield ok("rights", "root")
        else:
            yield warn("rights", "without root no utun device can be opened", "start the daemon with sudo")
        return
    from ngrokd.host import linux

    missing = {right.what: right for right in linux.missing_rights(configure=patient.settings.net.configure)}
    device = missing.pop("/dev/net/tun", None)
    runs = bool(patient.pid) or patient.daemon_hidden
    if not missing or runs:
        yield ok("rights", "CAP_NET_ADMIN" if not missing else "the daemon that runs has them")
    for right in missing.values() if not runs else ():
        make = fail if patient.is_root else warn
        yield make("rights", f"{right.what} is missing: {right.reason}", right.remedy)
    if device is None:
        yield ok("tun", "/dev/net/tun can be opened")
    elif not patient.is_root and os.path.exists("/dev/net/tun"):
        yield warn("tun", f"/dev/net/tun: {device.reason}", _SUDO)
    else:
        yield fail("tun", f"/dev/net/tun: {device.reason}", device.remedy)


def file_limit(patient: Patient) -> Iterator[Finding]:
    """Each connection takes a file descriptor."""
    limit = _limit_of(patient.pid) if patient.pid else None
    whose = "the daemon's" if limit is not None else "this shell's"
    if limit is None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if limit == resource.RLIM_INFINITY:
        yield ok("file-limit", f"{whose} limit of open files is unlimited")
        return
    wanted = patient.settings.limits.flows
    possible = max(1, limit - _RESERVED_DESCRIPTORS)
    facts = {"limit": limit, "connections": min(wanted, possible), "limits.flows": wanted}
    if possible >= min(wanted, _MANY_CONNECTIONS):
        yield ok(
            "file-limit", f"{whose} limit of open files, {limit}, allows {min(wanted, possible)} connections", **facts
        )
        return
    make = fail if limit < _FEW_DESCRIPTORS else warn
    yield make(
        "file-limit",
        f"{whose} hard limit of open files, {limit}, allows {possible} connections instead of {wanted}",
        f"raise it: LimitNOFILE={wanted + _RESERVED_DESCRIPTORS} in the unit, or /etc/security/limits.conf for shells",
        **facts,
    )


def _limit_of(pid: int) -> int | None:
    with suppress(OSError, ValueError, IndexError), open(f"/proc/{pid}/limits", encoding="ascii") as file:
        for line in file:
            if line.startswith("Max open files"):
                return int(line.split()[4])
    return None


def network(patient: Patient) -> Iterator[Finding]:
    """Who else has a claim on what the daemon needs: routes, interface, state, socket, port."""
    settings = patient.settings
    subnet6, notes = expected_subnet6(settings, here=sys.platform == "linux")
    planned = plan_run(settings, "macos" if sys.platform == "darwin" else "linux", subnet6=subnet6, notes=notes)
    found = obstacles.survey(settings, planned)
    claims = [one for one in found.obstacles if one.about == obstacles.ROUTES]
    others = [one for one in found.obstacles if one.about != obstacles.ROUTES]
    for one in claims:
        yield fail("routes", one.what, one.remedy)
    for shadow in found.shadows:
        yield warn("routes", shadow, "fine, unless something behind that route is to be reached: then set net.subnet")
    if not claims and not found.shadows:
        yield ok("routes", f"nobody else has a claim on {settings.net.subnet}")
    for one in others:
        yield fail("instance", one.what, one.remedy, about=one.about)
    for unseen in found.unseen:
        yield warn("instance", unseen, _SUDO)
    if not others and not found.unseen:
        what = f"interface {settings.net.interface}, {settings.state.directory} and the control socket"
        yield ok("instance", f"{what} are {f'held by {found.daemon}' if found.daemon else 'free'}")


def leftovers(patient: Patient) -> Iterator[Finding]:
    """What a daemon that was killed left."""
    if patient.status is not None or patient.daemon_problem or patient.daemon_hidden:
        return
    try:
        residue.check_nobody_lives(patient.settings)
        found = residue.find(patient.settings)
    except NgrokdError:
        return  # said already, by who holds it
    if found.pieces:
        what = ", ".join(f"{piece.kind} {piece.what}" for piece in found.pieces)
        yield warn("leftovers", f"a killed daemon left: {what}", "start it again, or remove them: sudo ngrokd cleanup")


def state(patient: Patient) -> Iterator[Finding]:
    """The state directory: private, writable, with room."""
    directory = patient.settings.state.directory
    try:
        files.check_private_directory(directory)
    except StateError as error:
        if os.path.isdir(directory):
            yield fail("state", str(error), error.remedy)
        else:
            yield ok("state", f"{directory} is made at the first start")
        return
    try:
        space = os.statvfs(directory)
    except OSError as error:
        yield warn("state", f"{directory} cannot be looked at: {error.strerror}", _SUDO)
        return
    if space.f_flag & os.ST_RDONLY:
        yield fail("state", f"{directory} is on a read-only file system", "make it writable, or set state.directory")
    elif space.f_bavail * space.f_frsize < _LITTLE_SPACE or (space.f_files and not space.f_favail):
        yield fail("state", f"the file system of {directory} is full", "free some space on it")
    elif not patient.is_root and not os.access(directory, os.W_OK):
        yield warn("state", f"{directory} is closed to this user", _SUDO)
    else:
        yield ok("state", f"{directory} is private and writable")


def hosts_file(patient: Patient) -> Iterator[Finding]:
    """Can the names be written, and are there others in their way?"""
    settings = patient.settings
    path = settings.hosts.path
    if not settings.hosts.enabled:
        yield ok("hosts", "names are not written (hosts.enabled = false)")
        return
    try:
        text = read_hosts(path)
    except HostsFileError as error:
        yield fail("hosts", str(error), error.remedy or "set hosts.path to the hosts file")
        return
    problems = [*_writing(patient, path), *_markers(text, path), *_shadowed(patient, text, path)]
    yield from problems
    if not problems:
        yield ok("hosts", f"{path} is readable, writable and in order")


def _writing(patient: Patient, path: str) -> Iterator[Finding]:
    real = os.path.realpath(path)
    if not os.path.exists(real):
        yield warn(
            "hosts", f"{path} does not exist; it is made at the first start", f"check that {path} is the right one"
        )
        return
    directory = os.path.dirname(real)
    if _is_immutable(real):
        yield fail("hosts", f"{path} is immutable", f"chattr -i {real}")
    elif os.statvfs(real).f_flag & os.ST_RDONLY:
        remedy = "mount it writable, or set hosts.enabled = false and name the addresses elsewhere"
        yield fail("hosts", f"{path} is on a read-only file system", remedy)
    elif not os.access(real, os.W_OK):
        if patient.is_root:
            yield fail("hosts", f"{path} cannot be written, even by root", f"see: ls -l {real}; lsattr {real}")
        else:
            yield warn("hosts", f"{path} is closed to this user, as it should be", _SUDO)
    elif _is_mount_point(real):
        remedy = "nothing to do in a container; elsewhere make the whole directory writable instead"
        yield warn("hosts", f"{path} is a bind mount: it is written in place, not replaced", remedy)
    elif os.statvfs(directory).f_flag & os.ST_RDONLY:
        remedy = f"nothing to do; ReadWritePaths={directory} in a unit would let it be replaced as a whole"
        yield warn("hosts", f"{directory} is read-only: {path} is written in place, not replaced", remedy)


def _is_immutable(path: str) -> bool:
    if sys.platform != "linux":
        return bool(getattr(os.stat(path), "st_flags", 0) & (stat.UF_IMMUTABLE | stat.SF_IMMUTABLE))
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        answer = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(8))
    except OSError:
        return False  # a file system without such flags
    finally:
        os.close(fd)
    return bool(int(struct.unpack("l", answer)[0]) & _FS_IMMUTABLE_FL)


def _is_mount_point(path: str) -> bool:
    with suppress(OSError), open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        return any(line.split()[4].encode().decode("unicode_escape", "replace") == path for line in file)
    return False


def _markers(text: bytes, path: str) -> Iterator[Finding]:
    opened = ""
    for found in _MARKER.finditer(text):
        name = (found[2] or b"ngrokd0").decode("ascii")
        line = text.count(b"\n", 0, found.start()) + 1
        if (found[1] == b"BEGIN") == bool(opened) or (found[1] == b"END" and opened != name):
            remedy = f"a running daemon of that interface repairs it; else look at line {line} of {path}"
            yield warn("hosts", f"{path}:{line}: a section of ngrokd ({name}) is not closed or not opened", remedy)
            return
        opened = name if found[1] == b"BEGIN" else ""
    if opened:
        remedy = f"a running daemon of that interface repairs it; else remove its BEGIN line from {path}"
        yield warn("hosts", f"{path}: the section of ngrokd ({opened}) has no END line", remedy)


def _shadowed(patient: Patient, text: bytes, path: str) -> Iterator[Finding]:
    if patient.endpoints is None:
        return
    survey = hosts.survey(text, patient.settings.net.interface)
    for name in sorted({endpoint.host for endpoint in patient.endpoints}):
        if name in survey.foreign:
            line = _line_of(text, name)
            where = f"{path}:{line}" if line else path
            what = f"{name} is an endpoint, and stands in the hosts file already, outside our section: it is not served"
            yield warn(
                "names", f"{where}: {what}", f"remove {name} from line {line} of {path}" if line else f"edit {path}"
            )
        elif name in survey.elsewhere:
            other = survey.elsewhere[name]
            yield warn(
                "names", f"{name} is served by the ngrokd of interface {other}", "stop that one, or use only one"
            )


def _line_of(text: bytes, name: str) -> int:
    wanted, ours = name.encode(), False
    for number, line in enumerate(text.splitlines(), 1):
        if marker := _MARKER.match(line):
            ours = marker[1] == b"BEGIN"
        elif not ours and wanted in line.partition(b"#")[0].lower().split():
            return number
    return 0


def other_daemons(patient: Patient) -> Iterator[Finding]:
    """Other sections in the hosts file are other instances, which is fine; nothing more is known of them here."""
    with suppress(HostsFileError):
        text = read_hosts(patient.settings.hosts.path)
        own = patient.settings.net.interface
        names = sorted({(found[2] or b"ngrokd0").decode("ascii") for found in _MARKER.finditer(text)} - {own})
        if names:
            yield ok("instances", f"other instances have names in the hosts file: {', '.join(names)}", instances=names)
