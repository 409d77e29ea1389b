"""What service managers are told: the systemd unit and the launchd job, as text. Nothing here touches the machine.

The unit's walls, and why some usual ones are missing or have doors:

*   CAP_NET_ADMIN is the only capability; root's files are written because root owns them, which takes none.
*   /etc is writable as a directory, because the hosts file is replaced by a rename; a unit that lists the file alone
    would turn it into a mount point, which cannot be replaced.
*   PrivateDevices would hide /dev/net/tun, so devices are closed by DevicePolicy instead.
*   Several worker processes drop all rights by themselves and are signalled by the one that has them: that takes
    SETUID, SETGID, SETPCAP and KILL, and the calls that systemd counts as privileged.
*   A group that may ask the daemon is given to the process as a supplementary one, since changing a file's group to one
    of one's own takes no capability.

ExecStopPost is not run after a power cut, and need not be: the next start takes over what was left.
"""

from __future__ import annotations

import plistlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

DEFAULT_NAME: Final = "ngrokd"
DEFAULT_PROGRAM: Final = ("/usr/local/bin/ngrokd",)
LABEL: Final = "com.ngrokd.ngrokd"
GO_LABELS: Final = ("com.ngrok.ngrokd", "com.ngrokd.daemon")
LOG_FILE: Final = "/var/log/ngrokd.log"
STOP_S: Final = 40  # at least; connections get net.drain of it
WATCHDOG_S: Final = 30
OPEN_FILES: Final = 65536
MEMORY: Final = "1536M"  # buffers of 256 MiB, 50 KiB for each idle connection, and as much again
TASKS: Final = 64  # threads that wait for the disk


@dataclass(frozen=True, slots=True)
class Service:
    """What a service runs.

    Attributes:
        name: of the unit; other instances have other ones.
        program: the command, its path absolute.
        config: the configuration file that was asked for, "" for the default one.
        writable: directories that the daemon writes to: the hosts file's and the state.
        key_file: a file whose content systemd hands over as the API key, "" for none.
        group: who may ask the daemon besides root, "" for nobody.
        workers: processes that carry connections; 1: the daemon does it itself.
        drain_s: how long connections may go on after the service is told to stop.
    """

    name: str = DEFAULT_NAME
    program: tuple[str, ...] = DEFAULT_PROGRAM
    config: str = ""
    writable: tuple[str, ...] = ("/etc",)
    key_file: str = ""
    group: str = ""
    workers: int = 1
    drain_s: float = 3.0

    @property
    def socket(self) -> str:
        """The control socket, in the service's own runtime directory."""
        return f"/run/{self.name}/ngrokd.sock"

    def command(self, *arguments: str) -> tuple[str, ...]:
        """A command line of this program for this configuration."""
        return (*self.program, *(("--config", self.config) if self.config else ()), *arguments)

    @property
    def stop_s(self) -> int:
        """When the service manager kills it, after it was told to stop."""
        return max(STOP_S, int(self.drain_s) + 10)


def systemd_unit(service: Service) -> str:
    """The text of the unit."""
    return "".join(f"{line}\n" for line in _systemd_lines(service))


def _systemd_lines(service: Service) -> Iterator[str]:
    several = service.workers > 1
    yield from (
        '# Made by "ngrokd service install", which writes it anew; put changes into a drop-in: systemctl edit ngrokd',
        "[Unit]",
        "Description=ngrokd, ngrok's kubernetes-bound endpoints by name on this machine",
        "# It needs no network to start, and no name service.",
        "After=network.target",
        "StartLimitIntervalSec=60",
        "StartLimitBurst=10",
        "",
        "[Service]",
        "Type=notify",
        "NotifyAccess=main",
        f"ExecStart={_command(service.command('run'))}",
        "ExecReload=/bin/kill -HUP $MAINPID",
        "# After a crash it takes away what was left, and after an ordinary end it finds nothing.",
        f"ExecStopPost={_command(service.command('cleanup'))}",
        f"Environment=NGROKD_SOCKET={_escaped(service.socket)}",
    )
    if service.key_file:
        yield f"LoadCredential=api_key:{_escaped(service.key_file)}"
    else:
        yield "# Instead of a key that set-api-key stores: LoadCredential=api_key:/path/to/a/file"
    yield from (
        "Restart=on-failure",
        "RestartSec=1",
        "# A wrong command line, a missing right or a wrong configuration does not get better by trying again.",
        "RestartPreventExitStatus=2 77 78",
        f"WatchdogSec={WATCHDOG_S}",
        f"TimeoutStopSec={service.stop_s}",
        "KillMode=mixed",
        f"RuntimeDirectory={service.name}",
        "RuntimeDirectoryMode=0755",
        "UMask=0077",
        f"LimitNOFILE={OPEN_FILES}",
        "LimitCORE=0",
        f"MemoryMax={MEMORY}",
        f"TasksMax={TASKS * max(1, service.workers)}",
        "",
        "# Rights",
        f"CapabilityBoundingSet=CAP_NET_ADMIN{' CAP_SETUID CAP_SETGID CAP_SETPCAP CAP_KILL' if several else ''}",
        "NoNewPrivileges=yes",
    )
    if service.group:
        yield f"SupplementaryGroups={_escaped(service.group)}"
    yield from (
        "DevicePolicy=closed",
        "DeviceAllow=/dev/net/tun rw",
        "RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK",
        "RestrictNamespaces=yes",
        "RestrictRealtime=yes",
        "RestrictSUIDSGID=yes",
        "LockPersonality=yes",
        "MemoryDenyWriteExecute=yes",
        "SystemCallArchitectures=native",
        "SystemCallFilter=@system-service",
        f"SystemCallFilter=~{'' if several else '@privileged '}@resources",
    )
    if service.group and not several:
        yield "SystemCallFilter=@chown"
    yield from (
        "SystemCallErrorNumber=EPERM",
        "",
        "# What it sees of the machine",
        "ProtectSystem=strict",
        f"ReadWritePaths={' '.join(map(_escaped, service.writable))}",
        "ProtectHome=yes",
        "PrivateTmp=yes",
        "PrivateMounts=yes",
        "ProtectKernelTunables=yes",
        "ProtectKernelModules=yes",
        "ProtectKernelLogs=yes",
        "ProtectControlGroups=yes",
        "ProtectClock=yes",
        "ProtectHostname=yes",
        "ProtectProc=invisible",
        "ProcSubset=pid",
        "RemoveIPC=yes",
        "KeyringMode=private",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    )


def _command(words: tuple[str, ...]) -> str:
    return " ".join(_quoted(word) for word in words)


def _quoted(word: str) -> str:
    """One argument of a command line, as systemd.service(5) reads it: % and $ are doubled, quotes where needed."""
    escaped = _escaped(word).replace("$", "$$")
    if escaped and not any(character in " \t\"'\\;" for character in escaped):
        return escaped
    return '"' + escaped.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _escaped(text: str) -> str:
    return text.replace("%", "%%")


def launchd_plist(service: Service, *, label: str = LABEL) -> bytes:
    """The text of the launchd job, for /Library/LaunchDaemons.

    It is started at boot and again when it ended with an error, not more often than every five seconds. Its kind of
    process is left at the default, because launchd slows down what it is told is a background job.
    """
    job = {
        "Label": label,
        "ProgramArguments": list(service.command("run")),
        "RunAtLoad": True,
        "KeepAlive": {"SuccessfulExit": False},
        "ThrottleInterval": 5,
        "ExitTimeOut": service.stop_s,  # before it is killed, which would leave names and routes
        "SoftResourceLimits": {"NumberOfFiles": OPEN_FILES},
        "HardResourceLimits": {"NumberOfFiles": OPEN_FILES, "Core": 0},
        "Umask": 0o077,
        "StandardOutPath": LOG_FILE,
        "StandardErrorPath": LOG_FILE,
    }
    if service.key_file:
        job["EnvironmentVariables"] = {"NGROKD_API_KEY_FILE": service.key_file}
    return plistlib.dumps(job, sort_keys=False)


def newsyslog_line(log: str = LOG_FILE) -> str:
    """How macOS turns the log over: five files of a megabyte, compressed (newsyslog.conf(5))."""
    return f"# logfilename\t[owner:group]\tmode\tcount\tsize\twhen\tflags\n{log}\troot:wheel\t640\t5\t1024\t*\tJ\n"
