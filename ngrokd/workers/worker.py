"""A worker: the data plane of one queue, told and asked over a socket.

    Hello ->            it stands, and has no rights any more
    <- Begin, Attach    settings and device: the data plane is made
    <- orders           everything there is to know, before the first packet is read
    <- Run              packets
    <- Drain            new flows are refused from now on, and those that live have their time
    Drained ->          they are over; so it waits, and refuses, for those of the other workers
    <- End              the process ends

What the data plane reports is encoded where it happens and waits in the outbox for the task that sends; reporting never
waits. When the socket ends the daemon is gone, and so is the worker, at once: whatever it would still carry, nobody
would know of.

Everything is imported before the rights are dropped, because afterwards the files may not be readable any more; what
is imported later all the same is named in the log.
"""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 - looked up by OpenSSL's host names, when the first one is dialled
import faulthandler
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
from collections import deque
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from typing import Final

import trio

from ngrokd import __version__
from ngrokd.dataplane import DataPlane, Dial, Recording, Report, Serve
from ngrokd.errors import Exit, NgrokdError
from ngrokd.log import fold_traceback
from ngrokd.names.directory import Directory
from ngrokd.relay.transport import connect_tcp
from ngrokd.workers.channel import Channel
from ngrokd.workers.messages import (
    MOST_TO_WORKER,
    ORDERS,
    ROWS,
    TO_WORKER,
    AskCounts,
    AskFlows,
    AskProbe,
    Attach,
    Begin,
    CloseFlow,
    Commit,
    Counts,
    Done,
    Drain,
    Drained,
    End,
    Entries,
    Failed,
    Flows,
    Hello,
    Lost,
    Message,
    Probed,
    ReadTape,
    Run,
    Said,
    StartTape,
    StopTape,
    Taped,
    Truth,
    encode,
    settings_of,
)
from ngrokd.workers.rights import Identity, drop_rights
from tun import Device, adopt_device

log = logging.getLogger("ngrokd.worker")

Adopt = Callable[[Attach, int], Device]

# Bytes of reports that may wait; more would only say the same. Answers are not counted: each was asked for.
OUTBOX_BYTES: Final = 16 << 20
SEND_BYTES: Final = 256 << 10


class Outbox:
    """Frames on their way to the daemon. Adding never waits; a report that finds no room is thrown away and counted."""

    def __init__(self, most_bytes: int = OUTBOX_BYTES) -> None:
        self._frames: deque[bytes] = deque()
        self._most = most_bytes
        self._waiting = 0
        self._lost = 0
        self._news = trio.Event()
        self._empty = trio.Event()
        self._empty.set()

    def add(self, frame: bytes) -> None:
        """Send this frame, whatever else waits."""
        self._frames.append(frame)
        self._waiting += len(frame)
        if self._empty.is_set():
            self._empty = trio.Event()
        self._news.set()

    def report(self, message: Message) -> None:
        """Send this message if there is room."""
        if self._waiting >= self._most:
            self._lost += 1
            return
        if self._lost:
            lost, self._lost = self._lost, 0
            self.add(encode(Lost(lost)))
        self.add(encode(message))

    async def take(self) -> bytes:
        """Wait for frames, and take some. Says by the way that those of the last call have been sent."""
        if not self._frames:
            self._empty.set()
            self._news = trio.Event()
            await self._news.wait()
        taken: list[bytes] = []
        size = 0
        while self._frames and size < SEND_BYTES:
            taken.append(self._frames.popleft())
            size += len(taken[-1])
        self._waiting -= size
        return b"".join(taken)

    async def sent(self) -> None:
        """Wait until everything has been sent."""
        await self._empty.wait()


class Worker:
    """One worker. `run` it once.

    Args:
        channel: to the daemon.
        adopt: makes the device that the daemon speaks of; the descriptor belongs to it.
        dial: see `DataPlane`.
    """

    def __init__(self, channel: Channel, adopt: Adopt, dial: Dial = connect_tcp) -> None:
        self._channel = channel
        self._adopt = adopt
        self._dial = dial
        self.outbox = Outbox()
        self._begin: Begin | None = None
        self._device: Device | None = None
        self._plane: DataPlane | None = None
        self._directory = Directory.empty()
        self._end = trio.Event()
        self._tapes: dict[int, _Tape] = {}

    async def run(self) -> None:
        """Serve until draining is over or the daemon is gone. Raises BadMessage, and what a bug raises."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send)
                self.outbox.add(encode(Hello(__version__, os.getpid())))
                while (received := await self._channel.receive()) is not None:
                    self._carry_out(nursery, *received)
                nursery.cancel_scope.cancel()
        finally:
            if self._device is not None:
                self._device.close()

    async def _send(self) -> None:
        with contextlib.suppress(OSError):  # the daemon is gone; whoever receives ends it
            while True:
                await self._channel.send(await self.outbox.take())

    def report(self, report: Report) -> None:
        """Tell the daemon."""
        self.outbox.report(report)

    # What it is told

    def _carry_out(self, nursery: trio.Nursery, number: int, message: Message) -> None:
        match message:
            case Begin():
                self._begin = message
            case Attach():
                self._attach(self._adopt(message, self._channel.take_descriptor()))
            case Entries(put, drop):
                self._directory = self._directory.changed(put, drop)
            case Commit(linger_s):
                self._told.tell(Serve(self._directory, linger_s))
            case Run():
                nursery.start_soon(self._run_plane, nursery.cancel_scope)
            case Drain(seconds):
                self._told.drain(seconds)
            case End():
                self._end.set()
            case AskCounts():
                # At once and in turn: the answer says besides that all before it is in force.
                self._answer(number, self._count())
            case _ if isinstance(message, ORDERS):
                self._tell(message)
            case _:
                nursery.start_soon(self._answer_slowly, number, message)

    @property
    def _told(self) -> DataPlane:
        assert self._plane is not None, "the daemon says Begin and Attach before all else"
        return self._plane

    def _attach(self, device: Device) -> None:
        before, self._device = self._device, device
        if self._plane is None:
            assert self._begin is not None
            self._plane = DataPlane(device, settings_of(self._begin), self._dial, self.report)
        else:
            self._plane.replace_device(device)
        if before is not None:
            before.close()

    def _tell(self, order: Message) -> None:
        try:
            self._told.tell(order)
        except NgrokdError as error:  # the daemon has tried it before; what it was told last goes on
            log.error("%s", error)

    async def _run_plane(self, scope: trio.CancelScope) -> None:
        await self._told.run(until=self._until_all_have_drained)
        await self.outbox.sent()
        scope.cancel()

    async def _until_all_have_drained(self) -> None:
        self.outbox.add(encode(self._count()))
        self.outbox.add(encode(Drained()))
        await self._end.wait()

    # What it is asked

    def _count(self) -> Counts:
        plane = self._told
        return Counts(plane.counters(), plane.describe_pool(), plane.ingress_problem)

    def _answer(self, number: int, *answers: Message) -> None:
        for answer in (*answers, Done()):
            self.outbox.add(encode(answer, number))

    async def _answer_slowly(self, number: int, question: Message) -> None:
        plane = self._told
        try:
            match question:
                case AskFlows():
                    rows = await plane.flows()
                    for start in range(0, len(rows), ROWS):
                        self.outbox.add(encode(Flows(tuple(rows[start : start + ROWS])), number))
                        await trio.lowlevel.checkpoint()
                    self._answer(number)
                case CloseFlow(flow):
                    self._answer(number, Truth(await plane.close_flow(flow)))
                case AskProbe(host, port):
                    self._answer(number, Probed(await plane.probe(host, port)))
                case StartTape(tape, order):
                    self._tapes[tape] = _Tape(plane.record(order))
                    self._answer(number)
                case ReadTape(tape):
                    self._answer(number, await self._tapes[tape].read() if tape in self._tapes else Taped(b""))
                case StopTape(tape):
                    if tape in self._tapes:
                        self._tapes.pop(tape).stop()
                    self._answer(number)
                case _:
                    raise AssertionError(f"nobody answers {question!r}")
        except NgrokdError as error:
            self.outbox.add(encode(Done(str(error), error.remedy), number))


class _Tape:
    """A recording that may be stopped while somebody waits for more of it."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._reading: trio.CancelScope | None = None

    async def read(self) -> Taped:
        """The next bytes; b"" when it is over."""
        data = b""
        with trio.CancelScope() as self._reading:
            data = await self._recording.read()
        if self._reading.cancelled_caught:
            self._recording.close()
        self._reading = None
        recording = self._recording
        return Taped(data, recording.recorded, recording.dropped, recording.ended)

    def stop(self) -> None:
        """Stop recording. The pipe is closed when nobody waits for it any more."""
        if self._reading is not None:
            self._reading.cancel()
        else:
            self._recording.close()


# -- the process


def main(arguments: Sequence[str]) -> int:
    """A worker process, from its first line to its exit code.

    Args:
        arguments: INDEX SOCKET, and UID GID of whom to become.
    """
    descriptor, *whom = map(int, arguments[1:])
    # ^C in a terminal reaches all processes at once; when a worker ends is the daemon's to decide.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    os.umask(0o077)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _rehearse()
    gc.collect()
    gc.freeze()
    sys.meta_path.insert(0, LateImport())
    connected = socket.socket(fileno=descriptor)
    try:
        drop_rights(Identity(*whom) if whom else None)
    except NgrokdError as error:
        return _fail(connected, Failed(str(error), error.remedy, error.exit_code))
    try:
        trio.run(_work, connected.dup())
    except BaseException as error:  # noqa: BLE001 - the process ends; the daemon's log is where somebody will read why
        return _fail(connected, Failed(f"a defect of ours: {fold_traceback(error)}"))
    return Exit.OK


def _rehearse() -> None:
    """Do what imports modules or reads files when it is done for the first time."""
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _adopt(Attach("", 0, offload=False), os.open(os.devnull, os.O_RDWR)).close()


async def _work(connected: socket.socket) -> None:
    with Channel(connected, TO_WORKER, MOST_TO_WORKER, descriptors=True) as channel:
        worker = Worker(channel, _adopt)
        handler = Reporting(worker.outbox)
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
        await worker.run()


def _adopt(attach: Attach, descriptor: int) -> Device:
    return adopt_device(descriptor, attach.name, offload=attach.offload, mtu=attach.mtu)


def _fail(connected: socket.socket, failed: Failed) -> int:
    with contextlib.suppress(OSError):
        connected.settimeout(1.0)
        connected.sendall(encode(failed))
    return failed.code


class Reporting(logging.Handler):
    """Sends what is logged to the daemon, whose log it becomes."""

    def __init__(self, outbox: Outbox) -> None:
        super().__init__()
        self._outbox = outbox

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record."""
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f" | {fold_traceback(record.exc_info[1])}"
        self._outbox.report(Said(record.levelno, record.name, text[:8192]))


class LateImport:
    """Notes imports that come too late. They go on: where the files are readable they do no harm."""

    def find_spec(self, name: str, _path: object = None, _target: object = None) -> ModuleSpec | None:
        """See importlib.abc.MetaPathFinder."""
        log.warning("%s is imported late", name)
        return None
