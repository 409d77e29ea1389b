"""Telling systemd how we are (sd_notify(3)), without its library: one datagram with `KEY=value` lines.

Under another service manager, or none, `NOTIFY_SOCKET` is not set and nothing is said. A notification that cannot be
delivered is not worth a failure: it is dropped.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from typing import Final

MAX_STATUS_CHARS: Final = 200


class Notifier:
    """The way to the service manager.

    Attributes:
        watchdog_s: how often `watchdog()` is to be called at least, seconds; None where no watchdog waits. It is half
            of the interval after which systemd kills us, as sd_watchdog_enabled(3) recommends.
    """

    def __init__(self, environ: Mapping[str, str], *, pid: int | None = None) -> None:
        self._address = _socket_address(environ.get("NOTIFY_SOCKET", ""))
        self.watchdog_s = _watchdog_interval(environ, os.getpid() if pid is None else pid) if self._address else None

    @property
    def active(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """Start-up is over, or the reload is."""
        self._send("READY=1", status)

    def status(self, status: str) -> None:
        """What is going on, for `systemctl status`."""
        self._send("", status)

    def reloading(self) -> None:
        """The configuration is being read again; `ready` follows."""
        # MONOTONIC_USEC is CLOCK_MONOTONIC, the clock of time.monotonic on Linux.
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}", "")

    def stopping(self, status: str = "") -> None:
        """Shutdown has begun."""
        self._send("STOPPING=1", status)

    def watchdog(self) -> None:
        """We are alive."""
        self._send("WATCHDOG=1", "")

    def _send(self, state: str, status: str) -> None:
        if not self._address:
            return
        tidy = "".join(character if character.isprintable() else " " for character in status[:MAX_STATUS_CHARS])
        lines = [line for line in (state, f"STATUS={tidy}" if status else "") if line]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
                sender.setblocking(False)
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return


def _socket_address(text: str) -> bytes:
    """A path, or "@name" of Linux's abstract namespace, as bytes for sendto; empty where it is neither."""
    if text.startswith("@"):
        return b"\0" + os.fsencode(text[1:])
    return os.fsencode(text) if text.startswith("/") else b""


def _watchdog_interval(environ: Mapping[str, str], pid: int) -> float | None:
    meant_for = environ.get("WATCHDOG_PID", "")
    interval = environ.get("WATCHDOG_USEC", "")
    if (meant_for and meant_for != str(pid)) or not interval.isdecimal() or int(interval) == 0:
        return None
    return int(interval) / 2_000_000
