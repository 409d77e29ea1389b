"""What operators look at and touch while the daemon runs: flows, events, log, metrics, captures, probes, pause.

These are the commands of the control socket that change nothing on this machine. They are asked seldom, and every one
that may have much to say says it in pieces, so that packets pass in between (docs/adr/0019).

Those that go on (`top`, `events`, `logs`, `capture`) look at rings and tables several times a second instead of being
told: whoever reads slowly then misses something, and holds nobody up.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import platform
import resource
import time
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from heapq import nlargest
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Final

import trio

from ngrokd import __version__
from ngrokd.config import split_address
from ngrokd.daemon.figures import ProcessFigures, Situation, families
from ngrokd.daemon.pulse import Pulse, figures
from ngrokd.daemon.traffic import Ended, Traffic, join
from ngrokd.dataplane import FlowInfo, Pause, Plane, RecordOrder
from ngrokd.endpoints import printable
from ngrokd.errors import Exit
from ngrokd.metrics import render
from ngrokd.ops.answers import json_pieces
from ngrokd.ops.control import Command, ControlError, Start, Streaming
from ngrokd.ops.peers import Peer
from ngrokd.ops.processes import Connection, Owner, Processes
from ngrokd.ops.web import Condition, format_time

if TYPE_CHECKING:
    from ngrokd.daemon.daemon import Machine
    from ngrokd.discovery import Discovery
    from ngrokd.log import Line, Log
    from ngrokd.names.reconcile import Service
    from ngrokd.names.twins import Twins
    from ngrokd.ops.events import Events

log = logging.getLogger("ngrokd.daemon")

OWNERS_FOR_S: Final = 0.8  # so long whose connections they are is not looked up again, whoever asks
LOOK_S: Final = 0.2  # how often those who follow something look whether there is more
EVENTS_AT_ONCE: Final = 128
TOP_ROWS: Final = 1000
ROWS_AT_ONCE: Final = 256  # made between two turns of the loop
SERVICES_AT_ONCE: Final = 4096
NEAR_NAMES: Final = 10_000  # among which a mistyped one is looked for
LEVELS: Final = ("debug", "info", "warning", "error")
LONGEST_S: Final = 86_400.0


@dataclass(frozen=True, slots=True)
class Facts:
    """What the daemon itself knows, asked when somebody looks."""

    state: Callable[[], str]
    conditions: Callable[[], Sequence[Condition]]
    problems: Callable[[], Sequence[str]]
    restarts: Callable[[], Mapping[str, int]]
    control: Callable[[], Mapping[str, int]]
    web: Callable[[], Mapping[str, int]]


class Observing:
    """The commands. Each takes its arguments as `name=value`, and says which one it does not know.

    Attributes:
        paused: new flows are refused on demand.
    """

    def __init__(
        self,
        plane: Plane,
        discovery: Discovery,
        traffic: Traffic,
        events: Events,
        pulse: Pulse,
        machine: Machine,
        facts: Facts,
        *,
        twins: Twins | None = None,
        log_control: Log | None = None,
        started_at: float = 0.0,
    ) -> None:
        self._plane = plane
        self._discovery = discovery
        self._traffic = traffic
        self._events = events
        self._pulse = pulse
        self._machine = machine
        self._facts = facts
        self._twins = twins
        self._log = log_control
        self._started_at = started_at
        self._processes = Processes()
        self._looking = trio.Lock()
        self._found: Mapping[Connection, Owner] = {}
        self._owners_until = -math.inf
        self._level_until = math.inf
        self._level_changed = trio.Event()
        self.usual_level = log_control.level if log_control is not None else "info"
        self.paused = False

    def commands(self) -> dict[str, Command | Streaming]:
        """By name, for the control server."""
        return {
            "flows": Command(self._flows),
            "close-flow": Command(self._close_flow, changes=True),
            "top": Streaming(self._top),
            "events": Streaming(self._follow_events),
            "logs": Streaming(self._follow_log),
            "log-level": Command(self._log_level),
            "set-log-level": Command(self._set_log_level, changes=True),
            "capture": Streaming(self._capture, changes=True),
            "probe": Command(self._probe),
            "metrics": Command(self._metrics),
            "pause": Command(self._pause, changes=True, for_group=True),
            "resume": Command(self._resume, changes=True, for_group=True),
        }

    # Flows

    async def _flows(self, arguments: list[str], _peer: Peer) -> dict[str, object]:
        options = _Options(arguments, "ended")
        flows = await self._plane.flows()
        owners = await self._owners(flows)
        answer: dict[str, object] = {"total": len(flows), "flows": (_row(flow, owners) for flow in flows)}
        if options.flag("ended"):
            answer["ended"] = [_ended_row(ended) for ended in self._traffic.ended()]
        return answer

    async def _close_flow(self, arguments: list[str], peer: Peer) -> str:
        numbers = [_number("flow", argument) for argument in arguments]
        if not numbers:
            raise ControlError("which flow?", code=Exit.USAGE, remedy="see: ngrokd flows")
        missing = [number for number in numbers if not await self._plane.close_flow(number)]
        log.info("flows closed by %s: %s", peer, ", ".join(map(str, sorted({*numbers}.difference(missing)))) or "none")
        if missing:
            raise ControlError(
                f"there is no flow {', '.join(map(str, missing))} (any more)", remedy="see: ngrokd flows"
            )
        return f"closed {len(numbers)} flow{'' if len(numbers) == 1 else 's'}"

    async def _owners(self, flows: Iterable[FlowInfo]) -> Mapping[Connection, Owner]:
        wanted = [(flow.source, flow.destination) for flow in flows]
        if not wanted:
            return {}
        async with self._looking:
            if trio.current_time() >= self._owners_until:
                self._found = await self._machine.run_sync(self._processes.find, wanted)
                self._owners_until = trio.current_time() + OWNERS_FOR_S
            return self._found

    async def _top(self, arguments: list[str], _peer: Peer, start: Start) -> None:
        """A line every `interval` seconds: totals, and the flows that carry most."""
        options = _Options(arguments, "interval", "rows")
        interval = max(0.2, min(options.seconds("interval", 2.0), LONGEST_S))
        most = min(int(options.number("rows", TOP_ROWS)), TOP_ROWS)
        send = await start({"interval_s": interval})
        before: dict[int, tuple[int, int]] = {}
        counters, looked_at = self._plane.counters(), trio.current_time()
        first = True
        while True:
            await self._plane.in_force()  # so that its numbers are of now
            flows = await self._plane.flows()
            now, fresh = trio.current_time(), self._plane.counters()
            took = max(now - looked_at, 1e-3)
            busiest: list[tuple[float, int, FlowInfo, tuple[float, float]]] = []
            for at in range(0, len(flows), ROWS_AT_ONCE):
                for flow in flows[at : at + ROWS_AT_ONCE]:
                    rate = _rate(flow, before.get(flow.number, (0, 0) if flow.age_s < took else None), took)
                    busiest.append((sum(rate), flow.number, flow, rate))
                busiest = nlargest(most, busiest)
                await trio.lowlevel.checkpoint()
            owners = await self._owners([flow for _, _, flow, _ in busiest])
            rows = (_row(flow, owners) | _rate_fields(rate) for _, _, flow, rate in busiest)
            frame = {
                "time": format_time(self._machine.wall()),
                "interval_s": 0.0 if first else round(took, 3),
                "state": self._facts.state(),
                "problems": list(self._facts.problems()),
                "endpoints": len(self._discovery.known.desired.services),
                "total": len(flows),
                **_per_second(figures(counters, fresh), 0.0 if first else took),
                "pool_ready": fresh.get("pool.ready", 0),
                "flows": rows,
            }
            first = False
            before = {flow.number: (flow.bytes_from_app, flow.bytes_to_app) for flow in flows}
            counters, looked_at = fresh, now
            for piece in json_pieces(frame):
                await send(piece)
            await send(b"\n")
            await trio.sleep(interval)

    # Events and log

    async def _follow_events(self, arguments: list[str], _peer: Peer, start: Start) -> None:
        options = _Options(arguments, "since", "follow")
        last = int(options.number("since", self._events.last))
        if last > self._events.last:  # a number of the daemon before this one: all of ours are new to that client
            last = 0
        send = await start({"last": self._events.last})
        while True:
            while events := self._events.after(last, EVENTS_AT_ONCE):
                last = events[-1].number
                await send(b"".join([event.to_json() for event in events]))
            if not options.flag("follow", otherwise=True):
                return
            await trio.sleep(LOOK_S)

    async def _follow_log(self, arguments: list[str], _peer: Peer, start: Start) -> None:
        options = _Options(arguments, "lines", "level", "follow")
        control = self._need_log()
        level = logging.getLevelName(_level(options.text("level", "debug")).upper())
        lines = control.ring.after(0, level)
        lines = lines[max(0, len(lines) - int(options.number("lines", math.inf))) :] if lines else []
        send = await start({"level": control.level})
        last = control.ring.last
        while True:
            for at in range(0, len(lines), ROWS_AT_ONCE):
                await send(b"".join([_line(each) for each in lines[at : at + ROWS_AT_ONCE]]))
            if not options.flag("follow"):
                return
            await trio.sleep(LOOK_S)
            lines = control.ring.after(last, level)
            last = lines[-1].number if lines else last

    async def _log_level(self, _arguments: list[str], _peer: Peer) -> dict[str, object]:
        left_s = self._level_until - trio.current_time()
        return {"level": self._need_log().level, "for_s": round(left_s, 1) if math.isfinite(left_s) else None}

    async def _set_log_level(self, arguments: list[str], peer: Peer) -> dict[str, object]:
        options = _Options(arguments, "level", "for")
        control = self._need_log()
        level = _level(options.text("level", ""))
        for_s = min(options.seconds("for", 0.0), 7 * LONGEST_S)
        control.set_level(level)
        self._level_until = trio.current_time() + for_s if for_s else math.inf
        self._level_changed.set()
        self._events.emit("log.level", f"the log's level is {level} now", to=level, for_s=for_s, by=str(peer))
        return await self._log_level([], peer)

    async def keep_log_level(self) -> None:
        """Take a level that was set for a while back when it is over; for ever."""
        while True:
            self._level_changed = trio.Event()
            with trio.move_on_at(self._level_until) as scope:
                await self._level_changed.wait()
            if scope.cancelled_caught and self._log is not None:
                self._level_until = math.inf
                self._log.set_level(self.usual_level)
                text = f"the log's level is {self.usual_level} again"
                self._events.emit("log.level", text, to=self.usual_level, for_s=0)

    def _need_log(self) -> Log:
        if self._log is None:
            raise ControlError("this daemon keeps no log")
        return self._log

    # Packets

    async def _capture(self, arguments: list[str], peer: Peer, start: Start) -> None:
        options = _Options(arguments, "endpoint", "address", "port", "snaplen", "count", "duration")
        addresses, ports = [*options.texts("address")], [_number("port", each) for each in options.texts("port")]
        for text in options.texts("endpoint"):
            named, port = await self._addresses(text)
            addresses += named
            ports += [port] if port else []
        order = RecordOrder(
            addresses=tuple(addresses),
            ports=tuple(ports),
            snaplen=max(1, min(int(options.number("snaplen", 262_144)), 262_144)),
            max_packets=options.number("count", math.inf),
            duration_s=options.seconds("duration", math.inf),
            application=f"ngrokd {__version__}",
        )
        try:
            recording = self._plane.record(order)
        except ValueError as error:
            raise ControlError(printable(str(error)), code=Exit.USAGE) from error
        told = 0
        with recording:
            self._events.emit("capture.started", f"packets are recorded for {peer}", by=str(peer))
            try:
                send = await start({"format": "pcapng", "addresses": addresses, "ports": ports})
                while data := await recording.read():
                    await send(b'{"pcapng":"' + b64encode(data) + b'"}\n')
                    if recording.dropped != told:
                        told = recording.dropped
                        await send(b'{"dropped":%d}\n' % told)
                ending = {"end": recording.ended, "recorded": recording.recorded, "dropped": recording.dropped}
                await send(json.dumps(ending).encode() + b"\n")
            finally:
                self._events.emit(
                    "capture.ended",
                    f"packets are not recorded any more for {peer}",
                    by=str(peer),
                    reason=recording.ended or "client_left",
                    recorded=recording.recorded,
                    dropped=recording.dropped,
                )

    async def _probe(self, arguments: list[str], _peer: Peer) -> dict[str, object]:
        """Go the whole way to an endpoint once."""
        service = await self._find(_Options(arguments, "endpoint").text("endpoint", ""))
        endpoint = service.endpoint
        probe = await self._plane.probe(endpoint.host, endpoint.port)
        return {
            "endpoint": join(endpoint.host, endpoint.port),
            "url": endpoint.url,
            "address": str(service.address),
            "ok": not probe.problem,
            "phases": [{"name": name, "ms": round(seconds * 1000, 3)} for name, seconds in probe.phases],
            "ingress": probe.address,
            "tls": probe.tls,
            "endpoint_id": probe.endpoint_id,
            "proto": probe.proto,
            "reason": probe.reason,
            "problem": probe.problem,
            "remedy": probe.remedy,
        }

    async def _pause(self, _arguments: list[str], peer: Peer) -> str:
        return self._set_paused(True, peer)

    async def _resume(self, _arguments: list[str], peer: Peer) -> str:
        return self._set_paused(False, peer)

    def _set_paused(self, paused: bool, peer: Peer) -> str:
        live = self._plane.flow_count
        if paused is self.paused:
            return "it is paused already" if paused else "it was not paused"
        self.paused = paused
        self._plane.tell(Pause(paused))
        if paused:
            self._events.emit("daemon.paused", f"paused by {peer}: new connections are refused", by=str(peer))
            return f"paused: new connections are refused, {live} live on; names stay"
        self._events.emit("daemon.resumed", f"resumed by {peer}", by=str(peer))
        return "resumed"

    # Names

    async def _addresses(self, text: str) -> tuple[list[str], int]:
        """The addresses of an endpoint, and its port where one was named."""
        service = await self._find(text)
        named = [str(service.address)]
        if self._twins is not None:
            named.append(str(self._twins.of(service.address)))
        _, port = _host_and_port(text)
        return named, port

    async def _find(self, text: str) -> Service:
        """The service that somebody means by a URL, HOST:PORT, HOST, address or id. Raises ControlError."""
        if not text:
            raise ControlError("which endpoint?", code=Exit.USAGE, remedy="see: ngrokd list")
        services = self._discovery.known.desired.services
        service, near = await self._machine.run_sync(find_service, services, text)
        if service is None:
            said = f"no endpoint {printable(text)} is served here" + (f" (did you mean {near}?)" if near else "")
            raise ControlError(said, remedy="see: ngrokd list")
        found: Service = service
        return found

    # Metrics

    async def page(self) -> str:
        """The page at /metrics."""
        await self._plane.in_force()  # so that its numbers are of now
        process: ProcessFigures = await self._machine.run_sync(_look_at_process)
        states = {"online": 0, "degraded": 0, "unknown": 0}
        for number, service in enumerate(self._discovery.known.desired.services):
            states[self._traffic.of(service.endpoint.host, service.endpoint.port).state] += 1
            if number % SERVICES_AT_ONCE == SERVICES_AT_ONCE - 1:
                await trio.lowlevel.checkpoint()
        return render(families(self._situation(process, states)))

    async def _metrics(self, _arguments: list[str], _peer: Peer) -> dict[str, object]:
        return {"page": await self.page()}

    def _situation(self, process: ProcessFigures, states: Mapping[str, int]) -> Situation:
        known, counters, control = self._discovery.known, self._plane.counters(), self._log
        target = self._plane.describe_pool().get("target", 0)
        return Situation(
            version=__version__,
            python=platform.python_version(),
            started_at=self._started_at,
            conditions={each.name: each.holds for each in self._facts.conditions()},
            paused=self.paused,
            endpoints=states,
            skipped=len(known.desired.skipped),
            without_address=len(known.desired.without_address),
            counters=counters,
            pool_target=target if isinstance(target, int) else 0,
            by_endpoint=self._traffic.by_endpoint(),
            polls=known.poll_results,
            polled_at=known.polled_at,
            certificate_expires_at=known.credentials.not_after if known.credentials else 0.0,
            loop_delay=self._pulse.delays.read(),
            restarts=self._facts.restarts(),
            control=self._facts.control(),
            web=self._facts.web(),
            log_lost=control.dropped if control is not None else 0,
            log_suppressed=control.suppressed if control is not None else 0,
            process=process,
        )


def find_service(services: Sequence[Service], text: str) -> tuple[Service | None, str]:
    """Whom somebody means by a URL, HOST:PORT, HOST, address or id; and, if nobody, a name that is like it or ""."""
    host, port = _host_and_port(text)
    address = None
    with contextlib.suppress(ValueError):
        address = IPv4Address(host)
    for service in services:
        endpoint = service.endpoint
        if text in (endpoint.url, endpoint.id):
            return service, ""
        if (host == endpoint.host or address == service.address) and port in (0, endpoint.port):
            return service, ""
    names = dict.fromkeys(service.endpoint.host for service in services[:NEAR_NAMES])
    return None, next(iter(get_close_matches(host, names, n=1)), "")


class _Options:
    """Arguments of the form `name=value`. An unknown name, or a value that is no good, is a ControlError."""

    def __init__(self, arguments: Sequence[str], *names: str) -> None:
        self._values: dict[str, list[str]] = {}
        for argument in arguments:
            name, equals, value = argument.partition("=")
            if not equals or name not in names:
                said = f"there is no argument {printable(argument)!r}"
                raise ControlError(said, code=Exit.USAGE, remedy=f"those there are: {', '.join(names)}")
            self._values.setdefault(name, []).append(value)

    def texts(self, name: str) -> list[str]:
        """All values given."""
        return self._values.get(name, [])

    def text(self, name: str, otherwise: str) -> str:
        """The last value given."""
        return self._values.get(name, [otherwise])[-1]

    def flag(self, name: str, *, otherwise: bool = False) -> bool:
        """Whether it was given as anything but 0."""
        return self.text(name, "1" if otherwise else "0") != "0"

    def number(self, name: str, otherwise: float) -> float:
        """A whole number, 0 or more."""
        text = self.text(name, "")
        return _number(name, text) if text else otherwise

    def seconds(self, name: str, otherwise: float) -> float:
        """A number of seconds, more than 0."""
        text = self.text(name, "")
        if not text:
            return otherwise
        with contextlib.suppress(ValueError):
            if 0 < float(text) < math.inf:
                return float(text)
        raise ControlError(f"{name} is a number of seconds, not {printable(text)!r}", code=Exit.USAGE)


def _number(name: str, text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) < 16:
        return int(text)
    raise ControlError(f"{name} is a number, not {printable(text)!r}", code=Exit.USAGE)


def _level(text: str) -> str:
    if text in LEVELS:
        return text
    said = f"there is no level {printable(text)!r}"
    raise ControlError(said, code=Exit.USAGE, remedy=f"those there are: {', '.join(LEVELS)}")


def _host_and_port(text: str) -> tuple[str, int]:
    """What people write for an endpoint. Port 0: none was given."""
    rest = text.partition("://")[2] or text
    with contextlib.suppress(ValueError):
        host, port = split_address(rest.rstrip("/"), 0, zero=True)
        return host.lower().rstrip("."), port
    return rest.lower(), 0


def _rate(flow: FlowInfo, before: tuple[int, int] | None, seconds: float) -> tuple[float, float]:
    """Bytes a second each way. A flow that nobody looked at before has none yet."""
    if before is None:
        return 0.0, 0.0
    return (flow.bytes_from_app - before[0]) / seconds, (flow.bytes_to_app - before[1]) / seconds


def _rate_fields(rate: tuple[float, float]) -> dict[str, object]:
    return {"rate_from_app": round(rate[0]), "rate_to_app": round(rate[1])}


def _per_second(figures_of_interval: Mapping[str, int | float], seconds: float) -> dict[str, object]:
    """Counts become rates; the first frame has none to tell."""
    counts = ("opened", "refused", "cut", "dials", "dials_failed", "drops", "bytes_from_app", "bytes_to_app")
    rates = {f"{name}_s": round(figures_of_interval[name] / seconds, 2) if seconds else 0.0 for name in counts}
    return {**rates, "dial_p95_ms": figures_of_interval["dial_p95_ms"] if seconds else 0.0}


def _row(flow: FlowInfo, owners: Mapping[Connection, Owner]) -> dict[str, object]:
    owner = owners.get((flow.source, flow.destination))
    return {
        "id": flow.number,
        "endpoint": join(flow.host, flow.port),
        "source": join(*flow.source),
        "destination": join(*flow.destination),
        "state": flow.state,
        "process": owner.name if owner else "",
        "pid": owner.pid if owner and owner.pid else None,
        "uid": owner.uid if owner else None,
        "bytes_from_app": flow.bytes_from_app,
        "bytes_to_app": flow.bytes_to_app,
        "rtt_ms": round(flow.rtt_s * 1000, 3) if flow.rtt_s >= 0 else None,
        "age_s": round(flow.age_s, 3),
        "dial_ms": round(flow.dial_s * 1000, 3),
    }


def _ended_row(ended: Ended) -> dict[str, object]:
    event = ended.event
    return {
        "id": event.flow,
        "endpoint": join(event.host, event.port),
        "source": join(*event.source),
        "destination": join(*event.destination),
        "ended_at": format_time(ended.wall),
        "outcome": event.kind,
        "reason": event.reason,
        "message": printable(ended.message, 500),
        "bytes_from_app": event.bytes_from_app,
        "bytes_to_app": event.bytes_to_app,
        "age_s": round(event.age_s, 3),
        "dial_ms": round(event.dial_s * 1000, 3),
    }


def _line(line: Line) -> bytes:
    whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(line.wall))
    stamp = f"{whole}.{int(line.wall % 1 * 1000):03d}Z"
    level = logging.getLevelName(line.level).lower()
    return json.dumps({"seq": line.number, "time": stamp, "level": level, "message": line.text}).encode() + b"\n"


def _look_at_process() -> ProcessFigures:
    """What the kernel knows of us."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    resident, files = -1, -1
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/self/statm", encoding="ascii") as file:
            resident = int(file.read().split()[1]) * resource.getpagesize()
        files = len(os.listdir("/proc/self/fd"))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return ProcessFigures(usage.ru_utime + usage.ru_stime, resident, files, most)
