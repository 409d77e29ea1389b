"""Workers without processes: the real `Worker` at the other end of a real socket, as a task of the test.

A queue of a device is here the end of a cable; its descriptor is a file in memory whose number tells which cable, so
that it travels over the socket as the real one does. A worker that is killed leaves its cable as it is.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import trio

from ngrokd.dataplane import Dial
from ngrokd.relay.transport import Transport
from ngrokd.workers import messages
from ngrokd.workers.channel import Channel
from ngrokd.workers.messages import Attach
from ngrokd.workers.worker import Worker
from tun import DeviceError
from tun.testing.memory import MemoryDevice, memory_pair

Bytes = bytes | bytearray | memoryview
# What a worker is in place of the real one: given its end of the socket.
Script = Callable[[Channel], Awaitable[None]]


async def nobody(_address: str, _port: int) -> Transport:
    """There is no network here."""
    raise OSError(errno.ENETUNREACH, "no network")


class Handle:
    """A device at the end of a cable that somebody works on; closing it leaves the cable."""

    def __init__(self, device: MemoryDevice) -> None:
        self._device = device
        self._closed = False
        self.name, self.mtu, self.offload, self.prefix = device.name, device.mtu, device.offload, device.prefix
        self.drops: dict[str, int] = {}

    def _open(self) -> MemoryDevice:
        if self._closed:
            raise DeviceError("closed", errno=errno.EBADF)
        return self._device

    def fileno(self) -> int:
        return -1

    def read(self) -> bytes | None:
        return self._open().read()

    def verified(self, packet: bytes) -> bool:
        return self._device.verified(packet)

    def write(self, header: Bytes, payload: Sequence[bytes | memoryview], gso_size: int) -> bool:
        return self._open().write(header, payload, gso_size)

    def write_packet(self, packet: Bytes) -> bool:
        return self._open().write_packet(packet)

    async def wait_readable(self) -> None:
        await self._open().wait_readable()

    async def wait_writable(self) -> None:
        await self._open().wait_writable()

    def close(self) -> None:
        self._closed = True


_BY_FILE: dict[int, MemoryDevice] = {}  # number of the file -> the end of a cable


class MemoryQueue(Handle):
    """One queue of a link in memory: `tun.QueuedDevice`."""

    def __init__(self, link: MemoryLink, device: MemoryDevice) -> None:
        super().__init__(device)
        self._link = link
        self._descriptor = os.memfd_create("queue", os.MFD_CLOEXEC)
        _BY_FILE[os.fstat(self._descriptor).st_ino] = device

    def fileno(self) -> int:
        return self._descriptor

    def is_gone(self) -> bool:
        return self._link.deleted or self._descriptor < 0

    def extra_queue(self) -> MemoryQueue:
        self._open()
        return self._link.open_queue()

    def close(self) -> None:
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


class MemoryLink:
    """A link with queues, each a cable to a kernel in miniature of its own.

    Attributes:
        app_sides: the other end of each cable, in the order of the queues.
        queues: those that were opened.
    """

    def __init__(self, name: str = "ngrokd0") -> None:
        self.name = name
        self.devices: list[MemoryDevice] = []
        self.app_sides: list[MemoryDevice] = []
        self.queues: list[MemoryQueue] = []
        self.deleted = False

    def open_queue(self) -> MemoryQueue:
        device, app_side = memory_pair(names=(self.name, f"app{len(self.devices)}"))
        self.devices.append(device)
        self.app_sides.append(app_side)
        self.queues.append(MemoryQueue(self, device))
        return self.queues[-1]

    def delete(self) -> None:
        """Somebody deletes the link."""
        self.deleted = True
        for device in self.devices:
            device.delete()


class TaskProcess:
    """A worker that is a task: `ngrokd.workers.process.WorkerProcess`."""

    def __init__(self, pid: int, channel: Channel, its: Channel) -> None:
        self.pid = pid
        self.channel = channel
        self.its = its
        self.scope = trio.CancelScope()
        self.killed = False
        self.handles: list[Handle] = []
        self.code: int | None = None
        self._over = trio.Event()

    def kill(self) -> None:
        self.killed = True
        for handle in self.handles:  # SIGKILL leaves no time for a last packet
            handle.close()
        self.scope.cancel()

    async def wait(self) -> int:
        await self._over.wait()
        assert self.code is not None
        return self.code

    async def run(self, script: Script) -> None:
        code = 0
        try:
            with self.scope:
                await script(self.its)
        finally:
            self.its.close()
            self.code = -9 if self.killed else code
            self._over.set()


@dataclass
class Crew:
    """Starts workers that are tasks: `ngrokd.workers.process.Spawn`.

    Attributes:
        nursery: where they run.
        dial: of the workers.
        first: what the first worker of a queue is instead of a real one.
        scripts: what the next ones are, in the order of their start; None for a real one.
        started: all so far, with the time of their start.
        refuse: starting one fails.
    """

    nursery: trio.Nursery
    link: MemoryLink
    dial: Dial = nobody
    first: dict[int, Script | None] = field(default_factory=dict)
    scripts: list[Script | None] = field(default_factory=list)
    started: list[tuple[float, int, TaskProcess]] = field(default_factory=list)
    refuse: bool = False

    def __call__(self, index: int) -> TaskProcess:
        if self.refuse:
            raise OSError(errno.EAGAIN, "no more processes")
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        process = TaskProcess(
            1000 + 100 * index + len(self.times(index)),
            Channel(ours, messages.FROM_WORKER, messages.MOST_FROM_WORKER, descriptors=False),
            Channel(its, messages.TO_WORKER, messages.MOST_TO_WORKER, descriptors=True),
        )
        self.started.append((trio.current_time(), index, process))
        if index in self.first:
            script = self.first.pop(index)
        else:
            script = self.scripts.pop(0) if self.scripts else None
        self.nursery.start_soon(process.run, script or partial(self._be_real, process.handles))
        return process

    async def _be_real(self, handles: list[Handle], channel: Channel) -> None:
        await Worker(channel, partial(self._adopt, handles), self.dial).run()

    def _adopt(self, handles: list[Handle], attach: Attach, descriptor: int) -> Handle:
        device = _BY_FILE[os.fstat(descriptor).st_ino]
        os.close(descriptor)
        assert (attach.name, attach.mtu, attach.offload) == (device.name, device.mtu, device.offload)
        handles.append(Handle(device))
        return handles[-1]

    def latest(self, index: int) -> TaskProcess:
        """The worker on this queue."""
        return next(process for _, of, process in reversed(self.started) if of == index)

    def times(self, index: int) -> list[float]:
        """When workers were started on this queue."""
        return [at for at, of, _ in self.started if of == index]
