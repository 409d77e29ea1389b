"""One archive for a bug report: what the doctor found, how things are, and no secret.

Two walls: what holds secrets (the key files, tls.key, the configuration file) is not put in at all; and from every text
that is, each secret that this machine has is cut out by its value, besides what looks like one. So a key that some
program wrote into the log does not get out either.
"""

from __future__ import annotations

import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Final

from ngrokd import __version__, ask, config, files
from ngrokd.config import Settings
from ngrokd.doctor.findings import Finding
from ngrokd.doctor.patient import Patient
from ngrokd.errors import NgrokdError, StateError
from ngrokd.host.hostsfile import HostsFileError, read_hosts
from ngrokd.host.planning import expected_subnet6, plan_run
from ngrokd.names import hosts

HIDDEN: Final = "[removed]"
_SHORTEST: Final = 6  # characters; cutting out a shorter "secret" would cut words apart
_COMMAND_S: Final = 10.0
_LOG_LINES: Final = 2000
_TEXT_BYTES: Final = 16 << 20  # of one member

_README: Final = """\
This archive describes an installation of ngrokd for a bug report. API keys, private keys and what looks like one were
removed; foreign lines of the hosts file were left out. It does hold the names of your endpoints, this machine's
addresses, routes and name servers, and the last lines of the log. Look through it before you hand it on.
"""
_COMMANDS: Final[Mapping[str, Sequence[str]]] = {
    "network/links.txt": ("ip", "-d", "-s", "link"),
    "network/addresses.txt": ("ip", "addr"),
    "network/routes.txt": ("ip", "route", "show", "table", "all"),
    "network/rules.txt": ("ip", "rule"),
    "network/routes6.txt": ("ip", "-6", "route", "show", "table", "all"),
    "network/nftables.txt": ("nft", "list", "ruleset"),
    "network/iptables.txt": ("iptables-save",),
    "service/unit.txt": ("systemctl", "cat", "ngrokd"),
    "service/state.txt": ("systemctl", "show", "ngrokd"),
    "service/journal.txt": ("journalctl", "-u", "ngrokd", "-n", str(_LOG_LINES), "--no-pager", "-o", "short-iso"),
}
_QUESTIONS: Final[Mapping[str, tuple[str, ...]]] = {"list": (), "health": (), "flows": ("ended=1",), "metrics": ()}
_COPIED: Final = ("/etc/resolv.conf", "/etc/nsswitch.conf", "/etc/os-release", "/proc/version", "/proc/self/limits")
_PATTERNS: Final = (
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=Bearer )\S+", re.IGNORECASE),
    re.compile(r"(?i)(?<=://)[^/\s:@\"]*:[^/\s@\"]+(?=@)"),
    re.compile(r"(?i)\b(?:api[_-]?key|authtoken|password|secret|token)\b[\"']?\s*[=:]\s*[\"']?(?!/)([^\s\"',}]{6,})"),
)


class Redactor:
    """Cuts secrets out of texts.

    Args:
        secrets: their values.
    """

    def __init__(self, secrets: Iterable[str]) -> None:
        known = {part.strip() for secret in secrets for part in (secret, *secret.splitlines())}
        # Longer ones first: one may hold another.
        ordered = sorted((secret for secret in known if len(secret) >= _SHORTEST), key=len, reverse=True)
        escaped = dict.fromkeys(form for secret in ordered for form in (secret, json.dumps(secret)[1:-1]))
        self._values = re.compile("|".join(map(re.escape, escaped))) if escaped else None

    def clean(self, text: str) -> str:
        """The text without them."""
        if self._values is not None:
            text = self._values.sub(HIDDEN, text)
        for pattern in _PATTERNS:
            text = pattern.sub(_hide, text)
        return text


def _hide(found: re.Match[str]) -> str:
    if found.re.groups and found[1]:
        return found[0].replace(found[1], HIDDEN)
    return HIDDEN


def secrets_of(settings: Settings, environ: Mapping[str, str]) -> Iterator[str]:
    """Every secret that this machine has, wherever it lies, as far as we may read it."""
    yield settings.api.key.reveal()
    yield environ.get("NGROK_API_KEY", "")
    state = settings.state.directory
    credentials = environ.get("CREDENTIALS_DIRECTORY", "")
    paths = [settings.api.key_file, environ.get("NGROKD_API_KEY_FILE", ""), config.stored_key_path(settings)]
    paths += [os.path.join(credentials, "api_key")] if credentials else []
    paths += [os.path.join(state, name) for name in ("tls.key", "tls.key.new")]
    for path in filter(None, paths):
        yield _text_of(path)
    # The Go daemon's configuration holds its key in the clear.
    for found in re.finditer(r"(?m)^\s*key:\s*[\"']?([^\s\"'#]+)", _text_of(os.path.join(state, "config.yml"))):
        yield found[1]


def write_bundle(path: str, patient: Patient, findings: Iterable[Finding]) -> list[str]:
    """Write the archive (gzipped tar, mode 0600), whole or not at all. Returns the names of its members.

    Raises:
        StateError: it cannot be written.
    """
    redactor = Redactor(secrets_of(patient.settings, patient.environ))
    buffer = io.BytesIO()
    names = []
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, text in _members(patient, findings):
            data = redactor.clean(text[:_TEXT_BYTES]).encode("utf-8", "replace")
            member = tarfile.TarInfo(f"ngrokd-report/{name}")
            member.size, member.mode, member.mtime = len(data), 0o600, int(patient.wall())
            archive.addfile(member, io.BytesIO(data))
            names.append(name)
    files.atomic_write(path, buffer.getvalue(), 0o600)
    return names


def _members(patient: Patient, findings: Iterable[Finding]) -> Iterator[tuple[str, str]]:
    settings = patient.settings
    yield "README.txt", _README
    yield "doctor.json", _json([finding.as_data() for finding in findings])
    yield "versions.json", _json(_versions())
    yield (
        "config.json",
        _json({"file": settings.file, "values": config.show(settings), "origins": dict(settings.origins)}),
    )
    yield "status.json", _json(patient.status)
    subnet6, _ = expected_subnet6(settings, here=True)
    yield (
        "plan.txt",
        plan_run(settings, "macos" if sys.platform == "darwin" else "linux", subnet6=subnet6).whole.shell(),
    )
    if patient.status is not None:
        for name, arguments in _QUESTIONS.items():
            with suppress(NgrokdError):
                yield f"{name}.json", _json(ask.ask(settings.control.socket, name, arguments).data)
        with suppress(NgrokdError):
            yield "log.jsonl", _log(settings.control.socket)
    yield "hosts.txt", _hosts(settings)
    for name, command_line in _COMMANDS.items():
        if (output := _output_of(command_line)) is not None:
            yield name, output
    for path in _COPIED:
        if text := _text_of(path):
            yield f"files{path}", text
    yield "state.txt", _listing(settings.state.directory)


def _json(value: object) -> str:
    return json.dumps(value, indent=2, default=str) + "\n"


def _versions() -> dict[str, str]:
    import ssl

    return {
        "ngrokd": __version__,
        "python": sys.version,
        "executable": sys.executable,
        "openssl": ssl.OPENSSL_VERSION,
        "platform": platform.platform(),
    }


def _log(socket: str) -> str:
    """What the daemon keeps of its log, a line of JSON each. Raises NgrokdError."""
    with ask.Subscription(socket, "logs", (f"lines={_LOG_LINES}",)) as lines:
        return "".join(json.dumps(line) + "\n" for line in lines)


def _hosts(settings: Settings) -> str:
    """Our section as it is, and how much else there is."""
    try:
        text = read_hosts(settings.hosts.path)
    except HostsFileError as error:
        return f"{error}\n"
    survey = hosts.survey(text, settings.net.interface)
    lines = [f"{address}\t{name}" for name, address in sorted(survey.own.items())]
    lines += [f"# {name} belongs to the instance of {label}" for name, label in sorted(survey.elsewhere.items())]
    rest = len(hosts.remove(text, settings.net.interface).splitlines())
    return "".join(f"{line}\n" for line in [f"# {settings.hosts.path}: {rest} other lines, left out", *lines])


def _listing(directory: str) -> str:
    lines = []
    with suppress(OSError):
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
            status = entry.stat(follow_symlinks=False)
            lines.append(f"{status.st_mode:o} {status.st_uid}:{status.st_gid} {status.st_size:9} {entry.name}\n")
    return "".join(lines) or f"{directory} cannot be listed\n"


def _output_of(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        run = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_COMMAND_S,
            check=False,
            errors="replace",
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout + run.stderr


def _text_of(path: str) -> str:
    with suppress(FileNotFoundError, StateError):
        return files.read_limited(path, 1 << 20).decode("utf-8", "replace")
    return ""
