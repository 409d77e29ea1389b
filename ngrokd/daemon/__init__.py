"""`ngrokd run`: the daemon on the real machine."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Final

import trio

from ngrokd import config
from ngrokd.config import Given, Settings
from ngrokd.daemon.daemon import Daemon, Machine
from ngrokd.daemon.machine import LinuxMachine
from ngrokd.log import Log, stderr_descriptor

# Packets share the interpreter with threads that plan and write what a poll of 65,000 endpoints changed. Each system
# call of the packet path gives it away and gets it back after this long; Python's 5 ms made a round trip 40 ms longer.
SWITCH_INTERVAL_S: Final = 0.0005


def run_daemon(
    settings: Settings, *, config_path: str | None, environ: Mapping[str, str], given: Sequence[Given] = ()
) -> int:
    """Run until a signal ends it.

    Args:
        settings: the configuration.
        config_path: where it was read, to read it again on SIGHUP; None: the default file.
        environ: the environment.
        given: what the command line says, which goes before the file then too.

    Returns: the exit code. Raises NgrokdError when it cannot start; then nothing is left on the machine.
    """
    os.umask(0o077)
    raise_file_limit()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with Log(settings.log.level, settings.log.format, descriptor=stderr_descriptor(), environ=environ) as log_control:
        daemon = Daemon(
            settings,
            LinuxMachine(),
            environ=environ,
            reload=lambda: config.load(config_path, environ, given),
            watched=lambda running: watched_files(running, config_path, environ),
            log_control=log_control,
        )
        trio.run(daemon.run)
    return 0


def watched_files(running: Settings, config_path: str | None, environ: Mapping[str, str]) -> list[str]:
    """The files on which the configuration depends, existing or not. Raises ConfigError."""
    named = (running.api.key_file, environ.get("NGROKD_API_KEY_FILE", ""), running.api.ca_file, running.ingress.ca_file)
    return [*config.find_files(config_path, environ), *(path for path in named if path)]


def raise_file_limit() -> None:
    """Raise the soft limit of open files to the hard one: each flow has a socket, and the usual 1024 are for shells."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


__all__ = ["Daemon", "LinuxMachine", "Machine", "run_daemon"]
