"""The daemon's side of the workers: they are started, told, asked, and replaced when they end.

Theory of operation
-------------------
`WorkersPlane` is a data plane (`ngrokd.dataplane.Plane`) that carries nothing itself. Each worker has a queue of the
device, and one task here that keeps a worker on it:

    plane nursery                its deadline is set by `drain`
    `- one task for each queue   start a worker; talk to it until it ends; again, unless it was to end
       |- what it is told        whatever it has not heard of what holds now
       |- what it says           reports, answers, the end of its socket
       `- a question now and then: whoever does not answer for PATIENCE_S is ended

An order is a state: what holds now is kept here, the latest of each kind, and a worker is told what it has not heard
yet. So a worker that takes another one's place is told everything, by the same few lines that tell the others of a
change, and nothing piles up for one that does not listen. It is told all before it reads its first packet, and each
order takes effect as a whole between two packets. `in_force` is what makes names appear after their path on all of
them.

The descriptors of all queues stay open here as long as the device lives, whatever happens to workers: closing one
would renumber the others and move their connections (docs/adr/0026). While nobody reads a queue its packets wait there,
and the next worker finds them: SYNs are served, and what belongs to connections that ended with the last worker is
answered by RST, so that their apps know.

What a worker says is not believed where it matters: a CA that it says to have found is looked at again, texts are made
printable, sizes are bounded, and junk ends it.

Invariant: when `run` returns or raises, no worker runs any more.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import trio

from ngrokd import __version__
from ngrokd.dataplane import (
    RECORDINGS,
    CaFound,
    DataPlaneSettings,
    DeviceLost,
    FlowInfo,
    Limit,
    Order,
    RecordOrder,
    Report,
    Serve,
    Tape,
    TooManyRecordingsError,
    Trust,
    Use,
)
from ngrokd.endpoints import printable
from ngrokd.errors import ConfigError, Exit, NgrokdError
from ngrokd.names.directory import Directory
from ngrokd.relay.handler import CLOSED, CUT, OPENED, FlowEvent
from ngrokd.relay.ingress import Probe
from ngrokd.relay.trust import Trust as Anchors
from ngrokd.relay.trust import pinned_certificates
from ngrokd.workers.merge import add_counters, add_pools, divide, divide_limit, lasting
from ngrokd.workers.messages import (
    ENTRIES,
    AskCounts,
    AskFlows,
    AskProbe,
    Attach,
    BadMessage,
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
    Question,
    ReadTape,
    Run,
    Said,
    StartTape,
    StopTape,
    Taped,
    Truth,
    begin,
    encode,
)
from ngrokd.workers.process import Spawn, WorkerProcess
from ngrokd.workers.tape import JoinedTape
from tun import CaptureFilter, Device, DeviceError, QueuedDevice

log = logging.getLogger("ngrokd.workers")

# A worker stands after 0.2 s; on a machine that is busy with other things it may take a while.
START_TIMEOUT_S: Final = 20.0
# How often each is asked how it is, and after how long without an answer it is taken for stuck.
ASK_EVERY_S: Final = 5.0
PATIENCE_S: Final = 30.0
# For the answers to a question of somebody who waits.
ANSWER_S: Final = 2.0
# One that ends sooner than this after its start is followed by the next after a pause, twice as long each time.
STABLE_S: Final = 5.0
PAUSE_FIRST_S: Final = 0.05
PAUSE_MOST_S: Final = 5.0
# What a worker may say before it is taken for somebody else: pieces of an answer (a listing of a million flows), flows.
MOST_ANSWERS: Final = 5000
MOST_FLOWS: Final = 1_000_000
# Beyond the time the flows have, for those that end by themselves; then they are ended.
DRAIN_GRACE_S: Final = 3.0
# For the end of a process by itself, when its socket has ended, and after SIGKILL.
END_TIMEOUT_S: Final = 0.2
KILL_TIMEOUT_S: Final = 5.0

WORKER_LOST: Final = "worker_lost"  # the reason of flows that ended with their worker

AnswerT = TypeVar("AnswerT")


class WorkerFailedError(NgrokdError):
    """A worker did not start, or did not answer."""


class WorkerRightsError(NgrokdError):
    """A worker did not start, because it could not give up its rights."""

    exit_code = Exit.NOT_PERMITTED


@dataclass(slots=True, eq=False)
class _Asked:
    """A question on its way to one worker, and what came back so far."""

    question: Question
    answers: list[Message] = field(default_factory=list)
    done: Done | None = None
    sent: trio.Event = field(default_factory=trio.Event)
    over: trio.Event = field(default_factory=trio.Event)


class _Worker:
    """One worker from its start to its end: what it was told, and what it said.

    Attributes:
        ready: it has been told everything and reads packets.
        drained: its flows are over, and it waits for those of the others.
        failed: what it says was wrong with it.
        counts: its numbers, as it last said.
        live: the flows that it carries, by number.
        highest: the greatest number of a flow so far.
    """

    def __init__(self, plane: WorkersPlane, index: int, process: WorkerProcess, settings: DataPlaneSettings) -> None:
        self._plane = plane
        self._settings = settings
        self._channel = process.channel
        self.index = index
        self.pid = process.pid
        self.started_at = trio.current_time()
        self.ready = trio.Event()
        self.drained = False
        self.failed: Failed | None = None
        self.counts = Counts({}, {}, "")
        self.live: dict[int, FlowEvent] = {}
        self.highest = 0
        self._stands = False
        self._running = False
        self._directory = Directory.empty()
        self._heard: dict[type, int] = {}  # kind of order -> revision
        self._device = -1  # generation
        self._drain = math.inf
        self._told_end = False
        self._gone = False
        self._questions: list[tuple[int, _Asked]] = []
        self._open: dict[int, _Asked] = {}
        self._news = trio.Event()

    # Talking

    async def talk(self) -> None:
        """Tell and listen until it ends. Raises BadMessage, WorkerFailedError."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_all)
            nursery.start_soon(self._look_after)
            while (received := await self._channel.receive()) is not None:
                self._take(*received)
            nursery.cancel_scope.cancel()

    def over(self) -> None:
        """Nothing comes any more: whoever waits for it goes on."""
        self._gone = True
        for asked in [*self._open.values(), *(asked for _, asked in self._questions)]:
            asked.sent.set()
            asked.over.set()

    def wake(self) -> None:
        """There may be something that it has not heard."""
        self._news.set()

    def ask(self, question: Question) -> _Asked:
        """Ask after all that is to be told now. Whoever no longer waits for the answer says so with `forget`."""
        asked = _Asked(question)
        if self._gone:
            asked.sent.set()
            asked.over.set()
        else:
            self._questions.append((self._plane.next_number(), asked))
            self.wake()
        return asked

    def forget(self, asked: _Asked) -> None:
        """Nobody waits for this any more."""
        self._questions = [(number, each) for number, each in self._questions if each is not asked]
        self._open = {number: each for number, each in self._open.items() if each is not asked}

    def has_heard(self, kind: type) -> None:
        """It knows what holds now of this kind."""
        self._heard[kind] = self._plane.revision(kind)

    # What it is told

    async def _tell_all(self) -> None:
        with contextlib.suppress(OSError):  # it is gone; whoever receives learns it too
            await self._channel.send(encode(begin(self.index, __version__, self._settings)))
            while True:
                self._news = trio.Event()
                await self._tell_device()
                for kind, (revision, order) in self._plane.orders():
                    if self._heard.get(kind, 0) < revision:
                        # What is told now is what holds now; it may change while it is being sent.
                        self._heard[kind] = revision
                        await self._tell(order)
                if not self._running:
                    self._running = True
                    await self._channel.send(encode(Run()))
                    self.ask(AskCounts())  # its answer says that it runs
                if self._plane.drain_s < self._drain:
                    self._drain = self._plane.drain_s
                    await self._channel.send(encode(Drain(self._drain)))
                if self._plane.drained and not self._told_end:
                    self._told_end = True
                    await self._channel.send(encode(End()))
                questions, self._questions = self._questions, []
                for number, asked in questions:
                    self._open[number] = asked
                    await self._channel.send(encode(asked.question, number))
                    asked.sent.set()
                await self._news.wait()

    async def _tell_device(self) -> None:
        generation, queue = self._plane.queue(self.index)
        while queue.fileno() < 0:  # it was closed, and another one is being made
            self._news = trio.Event()
            await self._news.wait()
            generation, queue = self._plane.queue(self.index)
        if generation != self._device:
            self._device = generation
            attach = Attach(queue.name, queue.mtu, queue.offload)
            await self._channel.send(encode(attach), queue.fileno())

    async def _tell(self, order: Order) -> None:
        if not isinstance(order, Serve):
            await self._channel.send(encode(order))
            return
        put, drop = order.directory.changes_since(self._directory)
        self._directory = order.directory
        for start in range(0, len(drop), ENTRIES):
            await self._channel.send(encode(Entries(drop=tuple(drop[start : start + ENTRIES]))))
        for start in range(0, len(put), ENTRIES):
            await self._channel.send(encode(Entries(put=tuple(put[start : start + ENTRIES]))))
        await self._channel.send(encode(Commit(order.linger_s)))

    async def _look_after(self) -> None:
        """See that it stands, and then that it answers."""
        with trio.move_on_after(START_TIMEOUT_S) as scope:
            await self.ready.wait()
        if scope.cancelled_caught:
            raise WorkerFailedError(f"it was not ready after {START_TIMEOUT_S:g} s")
        while True:
            await trio.sleep(ASK_EVERY_S)
            asked = self.ask(AskCounts())
            with trio.move_on_after(PATIENCE_S) as scope:
                await asked.over.wait()
            if scope.cancelled_caught:
                raise WorkerFailedError(f"it said nothing for {PATIENCE_S:g} s")

    # What it says

    def _take(self, number: int, message: Message) -> None:
        if not self._stands:
            self._meet(message)
        elif isinstance(message, Done):
            asked = self._open.pop(number, None)
            if asked is not None:
                asked.done = message
                asked.over.set()
        elif isinstance(message, Counts):
            self.counts = message
            self.ready.set()
        elif number:
            asked = self._open.get(number)
            if asked is not None:
                asked.answers.append(message)
                if len(asked.answers) > MOST_ANSWERS:
                    raise BadMessage("an answer without an end")
        else:
            self._note(message)

    def _meet(self, message: Message) -> None:
        if isinstance(message, Failed):
            self.failed = message
        elif not isinstance(message, Hello):
            raise BadMessage(f"a {type(message).__name__} before Hello")
        elif message.version != __version__:
            raise WorkerFailedError(
                f"it is ngrokd {printable(message.version, 40)}, and this is {__version__}",
                remedy="ngrokd was replaced while it ran: restart it",
            )
        else:
            self._stands = True

    def _note(self, message: Message) -> None:
        match message:
            case FlowEvent():
                self._plane.report(self._follow(_made_printable(message)))
            case CaFound():
                self._plane.ca_found(self, message)
            case DeviceLost():
                self._plane.device_lost(self._device, printable(message.message))
            case Said(level, logger, text):
                # Only loggers that exist: they are never forgotten.
                known = logging.getLogger(logger) if logger in logging.Logger.manager.loggerDict else log
                known.log(max(logging.DEBUG, min(level, logging.ERROR)), "worker %d: %s", self.index, text)
            case Lost(reports):
                log.warning("%d reports of worker %d were lost, because this process was too slow", reports, self.index)
            case Drained():
                self.drained = True
                self._plane.look_whether_drained()
            case Failed():
                self.failed = message
            case _:
                raise BadMessage(f"a {type(message).__name__} that nobody asked for")

    def _follow(self, event: FlowEvent) -> FlowEvent:
        self.highest = max(self.highest, event.flow)
        if event.kind == OPENED:
            self.live[event.flow] = event
            if len(self.live) > MOST_FLOWS:
                raise BadMessage("more connections than there can be")
        elif event.kind == CLOSED:
            self.live.pop(event.flow, None)
        return event


class WorkersPlane:
    """A data plane made of worker processes; see the module's theory, and `ngrokd.dataplane.Plane`.

    Args:
        device: its first queue; it stays the caller's. The others are opened here.
        settings: what all workers may have and do together.
        workers: how many, two at least.
        report: told what they report; it must neither wait nor raise.
        spawn: starts one.

    Raises: DeviceError when the device has no more queues.
    """

    def __init__(
        self,
        device: QueuedDevice,
        settings: DataPlaneSettings,
        workers: int,
        report: Callable[[Report], None],
        spawn: Spawn,
    ) -> None:
        self._settings = divide(settings, workers)
        self._count = workers
        self._report = report
        self._spawn = spawn
        self._orders: dict[type, tuple[int, Order]] = {}
        self._revision = 0
        self._number = 0
        self._generation = 0
        self._lost_generation = -1
        self._queues = _open_queues(device, workers)
        self._workers: dict[int, _Worker] = {}
        self._restarts = [0] * workers
        self._problems: dict[int, str] = {}
        self._ended_counters: dict[str, int] = {}
        self._next_flow = list(range(1, workers + 1))
        self._tapes: set[int] = set()
        self._scope: trio.CancelScope | None = None
        self.drain_s = math.inf
        self.drained = False

    # For its workers

    def orders(self) -> list[tuple[type, tuple[int, Order]]]:
        """What holds now: kind, revision and order."""
        return list(self._orders.items())

    def revision(self, kind: type) -> int:
        """The revision of what holds now of this kind."""
        return self._orders[kind][0] if kind in self._orders else 0

    def queue(self, index: int) -> tuple[int, QueuedDevice]:
        """The generation of the device, and its queue for this worker."""
        return self._generation, self._queues[index]

    def next_number(self) -> int:
        """A number for a question."""
        self._number += 1
        return self._number

    def report(self, report: Report) -> None:
        """Tell the daemon."""
        self._report(report)

    def ca_found(self, finder: _Worker, found: CaFound) -> None:
        """One worker has found ngrok's CA: the others need not find it again."""
        _, trust = self._orders.get(Trust, (0, None))
        if not isinstance(trust, Trust):
            return
        pem = pinned_certificates(found.pem, trust.fingerprints)
        if not pem:
            raise BadMessage("a CA that is not the one")
        if pem in trust.pem:
            return  # another one was quicker
        self._put(replace(trust, pem=trust.pem + b"\n" + pem))
        finder.has_heard(Trust)
        self._report(CaFound(pem))

    def look_whether_drained(self) -> None:
        """Whoever has drained goes on refusing until all have."""
        if all(worker.drained for worker in self._workers.values()):
            self.drained = True
            self._wake()

    def device_lost(self, generation: int, message: str) -> None:
        """A worker has lost its queue. The daemon is told once for all of them, if it is true.

        Raises BadMessage: making another device ends all connections on one that is still there.
        """
        if generation == self._generation and generation != self._lost_generation:
            if not self._queues[0].is_gone():
                raise BadMessage(f"a device that is not lost ({message})")
            self._lost_generation = generation
            self._report(DeviceLost(message))

    # Orders

    def tell(self, order: Order) -> None:
        """Tell all workers, now and when they start. Raises BadCredentials; then what holds stays."""
        if isinstance(order, Use):
            Anchors().set_credentials(order.credentials)
        if isinstance(order, Limit):
            self._settings = replace(self._settings, connect_timeout_s=order.connect_timeout_s)
            order = divide_limit(order, self._count)
        self._put(order)

    def _put(self, order: Order) -> None:
        self._revision += 1
        self._orders[type(order)] = (self._revision, order)
        self._wake()

    def _wake(self) -> None:
        for worker in self._workers.values():
            worker.wake()

    async def in_force(self) -> None:
        """Wait until all workers that run have heard all, and said how they are.

        One that has been told all and does not answer is waited for ANSWER_S: it is stuck, and will be replaced by one
        that knows.
        """
        await self._ask_all(AskCounts(), Counts)

    def replace_device(self, device: Device) -> None:
        """Go on with another device; it stays the caller's."""
        old, self._queues = self._queues, []
        for queue in old[1:]:
            queue.close()
        self._generation += 1
        try:
            self._queues = _open_queues(as_queued(device), self._count)
        except DeviceError as error:  # it is gone again
            self._queues = [as_queued(device)] * self._count
            self._lost_generation = self._generation
            self._report(DeviceLost(str(error)))
        self._wake()

    def drain(self, seconds: float) -> None:
        """Refuse new flows from now on, reset those that still live after `seconds`, then let `run` return."""
        self.drain_s = min(self.drain_s, seconds)
        self._wake()
        if self._scope is not None:
            self._scope.deadline = min(self._scope.deadline, trio.current_time() + seconds + DRAIN_GRACE_S)

    # What it tells

    @property
    def interface(self) -> str:
        """The name of the device."""
        return self._queues[0].name

    @property
    def problem(self) -> str:
        """Which workers do not run, and why."""
        return "; ".join(f"worker {index} does not run: {why}" for index, why in sorted(self._problems.items()))

    @property
    def ingress_problem(self) -> str:
        """The first one's that has one."""
        return next((printable(each.counts.problem) for each in self._ready() if each.counts.problem), "")

    @property
    def flow_count(self) -> int:
        """Flows that were accepted and live."""
        return sum(len(worker.live) for worker in self._workers.values())

    def counters(self) -> dict[str, int]:
        """All counters, added up; those of workers that have ended as they last said. See `in_force`."""
        return add_counters([self._ended_counters, *(worker.counts.counters for worker in self._workers.values())])

    def describe_pool(self) -> Mapping[str, object]:
        """See merge.add_pools."""
        return add_pools([worker.counts.pool for worker in self._ready()])

    def describe_workers(self) -> list[dict[str, int | str]]:
        """Each queue's worker."""
        shown: list[dict[str, int | str]] = []
        for index in range(self._count):
            worker = self._workers.get(index)
            counters = worker.counts.counters if worker is not None else {}
            shown.append(
                {
                    "index": index,
                    "pid": worker.pid if worker is not None else 0,
                    "state": "running" if worker is not None and worker.ready.is_set() else "starting",
                    "restarts": self._restarts[index],
                    "flows": len(worker.live) if worker is not None else 0,
                    "accepted": counters.get("relay.accepted", 0),
                    "packets": counters.get("stack.packets", 0),
                    "problem": self._problems.get(index, ""),
                }
            )
        return shown

    # What it is asked

    async def flows(self) -> list[FlowInfo]:
        """All flows, oldest first."""
        answers = await self._ask_all(AskFlows(), Flows)
        return sorted((row for flows in answers for row in flows.rows), key=lambda row: -row.age_s)

    async def close_flow(self, number: int) -> bool:
        """Reset a flow, both ways."""
        return any(answer.truth for answer in await self._ask_all(CloseFlow(number), Truth))

    async def probe(self, host: str, port: int) -> Probe:
        """Have one worker go the way of a flow. Raises WorkerFailedError when none runs or it does not answer."""
        for worker in self._ready():
            wait_s = self._settings.connect_timeout_s + ANSWER_S
            for answer in await self._ask(worker, AskProbe(host, port), Probed, wait_s):
                return answer.probe
        raise WorkerFailedError("no worker answers")

    def record(self, order: RecordOrder) -> Tape:
        """Record what passes all workers that run now. Raises TooManyRecordingsError, ValueError."""
        if len(self._tapes) >= RECORDINGS:
            raise TooManyRecordingsError(f"{RECORDINGS} captures are under way", remedy="end one of them first")
        CaptureFilter.of(order.addresses, order.ports)
        tape, workers = self.next_number(), self._ready()

        def stop() -> None:
            self._tapes.discard(tape)
            for worker in workers:
                worker.ask(StopTape(tape))

        self._tapes.add(tape)
        for worker in workers:
            worker.ask(StartTape(tape, order))
        return JoinedTape([_Reel(worker, tape) for worker in workers], order.max_packets, stop)

    def _ready(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.ready.is_set()]

    async def _ask_all(self, question: Question, kind: type[AnswerT]) -> list[AnswerT]:
        """What all workers that run answer within ANSWER_S."""
        found: list[AnswerT] = []

        async def ask(worker: _Worker) -> None:
            found.extend(await self._ask(worker, question, kind, ANSWER_S))

        async with trio.open_nursery() as nursery:
            for worker in self._ready():
                nursery.start_soon(ask, worker)
        return found

    async def _ask(self, worker: _Worker, question: Question, kind: type[AnswerT], wait_s: float) -> list[AnswerT]:
        asked = worker.ask(question)
        try:
            with trio.move_on_after(PATIENCE_S):  # 65,000 endpoints may be on their way before it
                await asked.sent.wait()
            with trio.move_on_after(wait_s):
                await asked.over.wait()
        finally:
            worker.forget(asked)
        if asked.done is not None and asked.done.problem:
            raise WorkerFailedError(printable(asked.done.problem, 500), remedy=printable(asked.done.remedy, 500))
        return [answer for answer in asked.answers if isinstance(answer, kind)]

    # Life

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `drain` has been asked for and is over.

        Raises WorkerFailedError or WorkerRightsError when a worker does not start for the first time; later that is
        tried again.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                async with trio.open_nursery() as starting:
                    for index in range(self._count):
                        starting.start_soon(nursery.start, self._keep, index)
                task_status.started()
        except* NgrokdError as group:
            raise _first_error(group) from None
        finally:
            for queue in self._queues[1:]:
                queue.close()

    async def _keep(self, index: int, *, task_status: trio.TaskStatus[None]) -> None:
        """Keep a worker on this queue until draining is over."""
        pause = PAUSE_FIRST_S
        first = True
        while True:
            error = await self._employ(index, task_status if first else trio.TASK_STATUS_IGNORED)
            worker = self._workers.get(index)
            never_ran = first and (worker is None or not worker.ready.is_set())
            if not math.isinf(self.drain_s):
                if never_ran:
                    task_status.started()
                self._leave(index)
                self.look_whether_drained()
                return
            if never_ran:
                raise error
            first = False
            self._restarts[index] += 1
            self._problems[index] = str(error)
            if worker is not None and trio.current_time() - worker.started_at >= STABLE_S:
                pause = PAUSE_FIRST_S
            self._bury(index, error)
            await trio.sleep(pause)
            pause = min(pause * 2, PAUSE_MOST_S)

    async def _employ(self, index: int, task_status: trio.TaskStatus[None]) -> NgrokdError:
        """Start a worker and talk to it until it has ended; say why."""
        try:
            process = self._spawn(index)
        except OSError as error:
            return WorkerFailedError(f"it cannot be started: {error}")
        settings = replace(self._settings, first_flow=self._next_flow[index], flow_step=self._count)
        worker = self._workers[index] = _Worker(self, index, process, settings)
        problem: NgrokdError | None = None
        code = 0
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._announce, worker, task_status)
                try:
                    await worker.talk()
                except* (BadMessage, WorkerFailedError) as group:
                    problem = _first_error(group)
                nursery.cancel_scope.cancel()
        finally:
            worker.over()
            code = await _end(process)
        return problem or _why_it_ended(worker, code)

    async def _announce(self, worker: _Worker, task_status: trio.TaskStatus[None]) -> None:
        await worker.ready.wait()
        if self._problems.pop(worker.index, ""):
            log.info("worker %d runs again, as process %d", worker.index, worker.pid)
        task_status.started()

    def _leave(self, index: int) -> _Worker | None:
        """Keep what it counted."""
        worker = self._workers.pop(index, None)
        if worker is not None:
            self._ended_counters = add_counters([self._ended_counters, lasting(worker.counts.counters)])
        return worker

    def _bury(self, index: int, error: NgrokdError) -> None:
        """Tell what ended with a worker, and keep what it counted."""
        worker = self._leave(index)
        remedy = f"; {error.remedy}" if error.remedy else ""
        if worker is None:
            log.error("worker %d: %s%s", index, error, remedy)
            return
        log.error(
            "worker %d (process %d): %s%s; %d connections ended with it, and another one takes its place",
            *(index, worker.pid, error, remedy, len(worker.live)),
        )
        # Numbers of flows that it did not live to tell of are left out.
        told = max(worker.highest, self._next_flow[index])
        self._next_flow[index] = told + self._count * (1 + worker.counts.counters.get("relay.requests", 0) + 1000)
        for event in worker.live.values():
            lost = replace(event, reason=WORKER_LOST, message="the process that carried it ended")
            self._report(replace(lost, kind=CUT))
            self._report(replace(lost, kind=CLOSED))


class _Reel:
    """The next bytes of one worker's recording. Cancelled, they wait here for the next call."""

    def __init__(self, worker: _Worker, tape: int) -> None:
        self._worker = worker
        self._tape = tape
        self._asked: _Asked | None = None

    async def __call__(self) -> Taped:
        if self._asked is None:
            self._asked = self._worker.ask(ReadTape(self._tape))
        await self._asked.over.wait()
        asked, self._asked = self._asked, None
        return next((answer for answer in asked.answers if isinstance(answer, Taped)), Taped(b""))


async def _end(process: WorkerProcess) -> int:
    """See that it has ended, whatever happens; returns its exit code."""
    process.channel.close()
    code: int | None = None
    with trio.CancelScope(shield=True):
        # Whoever ends by itself has a moment to do so, and to say with which code.
        with trio.move_on_after(END_TIMEOUT_S):
            code = await process.wait()
        if code is None:
            with contextlib.suppress(PermissionError):  # without CAP_KILL; the end of its socket must do
                process.kill()
            with trio.move_on_after(KILL_TIMEOUT_S):
                code = await process.wait()
    if code is None:
        log.error("process %d, a worker, does not end", process.pid)
        return -int(signal.SIGKILL)
    return code


def _why_it_ended(worker: _Worker, code: int) -> NgrokdError:
    if worker.failed is not None:
        kind = WorkerRightsError if worker.failed.code == Exit.NOT_PERMITTED else WorkerFailedError
        return kind(printable(worker.failed.problem, 2000), remedy=printable(worker.failed.remedy, 500))
    if code < 0:
        with contextlib.suppress(ValueError):
            return WorkerFailedError(f"it was ended by {signal.Signals(-code).name}")
    return WorkerFailedError(f"it ended with code {code}")


def _open_queues(device: QueuedDevice, count: int) -> list[QueuedDevice]:
    """The device and as many queues more. Raises DeviceError; then those are closed."""
    queues = [device]
    try:
        while len(queues) < count:
            queues.append(device.extra_queue())
    except BaseException:
        for queue in queues[1:]:
            queue.close()
        raise
    return queues


def as_queued(device: Device) -> QueuedDevice:
    """The device, if it can be shared out. Raises ConfigError."""
    if isinstance(device, QueuedDevice):
        return device
    raise ConfigError("net.workers: this system's device has one queue", remedy="set net.workers = 1, or leave it out")


def _made_printable(event: FlowEvent) -> FlowEvent:
    """What was printable in the worker is so here, unless somebody else speaks in its place."""
    if all(text.isprintable() for text in (event.host, event.message, event.remedy, event.reason, event.source[0])):
        return event
    return replace(
        event,
        host=printable(event.host),
        message=printable(event.message, 1000),
        remedy=printable(event.remedy, 1000),
        reason=printable(event.reason, 60),
        source=(printable(event.source[0], 60), event.source[1]),
    )


def _first_error(group: BaseExceptionGroup[Any]) -> Any:  # Any: whatever was raised
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
