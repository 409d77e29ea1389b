"""A worker as a process of its own: how it is started, and how its end is noticed.

It is executed anew and not forked: nothing of the daemon's memory, keys and descriptors gets into it but what it is
told. It gets one socket, the end of the daemon's stderr, and a handful of variables; the interpreter ignores everything
else around it (-I), and finds its modules where the daemon found its own.

It is started by the thread that runs the event loop and not by a helper thread: the kernel takes the end of the thread
that started a process for the end of its parent (prctl(2), PR_SET_PDEATHSIG). That takes two milliseconds, in a process
that carries no packets.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final, Protocol

import trio

from ngrokd.workers import messages
from ngrokd.workers.channel import Channel
from ngrokd.workers.rights import Identity

MAIN: Final = str(Path(__file__).with_name("__main__.py"))
MODULES_FROM: Final = "NGROKD_MODULES"
# What the libraries of a worker look at: where this system's certificates are, where the libraries themselves are.
PASSED_ON: Final = (
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "OPENSSL_CONF",
    "OPENSSL_MODULES",
    "LD_LIBRARY_PATH",
    "GLIBC_TUNABLES",
)
_POLL_S: Final = 0.01


class WorkerProcess(Protocol):
    """A worker that was started."""

    @property
    def pid(self) -> int:
        """Its number."""
        ...

    @property
    def channel(self) -> Channel:
        """The way to it."""
        ...

    def kill(self) -> None:
        """End it now. Raises PermissionError when that is not allowed."""
        ...

    async def wait(self) -> int:
        """Wait for its end. Returns its exit code, or minus the number of the signal that ended it."""
        ...


class Spawn(Protocol):
    """Starts worker number `index`. Raises OSError."""

    def __call__(self, index: int) -> WorkerProcess:
        """Start it; whoever calls owns process and channel."""
        ...


class LocalProcess:
    """See WorkerProcess."""

    def __init__(self, process: subprocess.Popen[bytes], channel: Channel) -> None:
        self._process = process
        self.pid = process.pid
        self.channel = channel

    def kill(self) -> None:
        """See WorkerProcess."""
        self._process.kill()

    async def wait(self) -> int:
        """See WorkerProcess."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except OSError:  # before Linux 5.3, or in a sandbox that does not know it
            descriptor = -1
        try:
            while (code := self._process.poll()) is None:
                if descriptor >= 0:
                    await trio.lowlevel.wait_readable(descriptor)
                else:
                    await trio.sleep(_POLL_S)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return code


def spawn(index: int, identity: Identity | None) -> LocalProcess:
    """Start a worker that becomes `identity`. Raises OSError."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with its:
            whom = [str(identity.uid), str(identity.gid)] if identity is not None else []
            process = subprocess.Popen(
                [sys.executable, "-I", MAIN, str(index), str(its.fileno()), *whom],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=(its.fileno(),),
                cwd="/",
                env=environment(),
            )
    except BaseException:
        ours.close()
        raise
    return LocalProcess(process, Channel(ours, messages.FROM_WORKER, messages.MOST_FROM_WORKER, descriptors=False))


def usable_cpus() -> int:
    """Processors that this process may run on; 1 where that cannot be told, and there are no workers either."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1


def environment() -> dict[str, str]:
    """The variables of a worker."""
    places = os.pathsep.join(os.path.abspath(place) for place in sys.path)
    return {MODULES_FROM: places, "LC_ALL": "C.UTF-8"} | {
        name: value for name in PASSED_ON if (value := os.environ.get(name)) is not None
    }
