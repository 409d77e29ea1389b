"""What flows have come to: counts for each endpoint, the last ends and their reasons, and an event for each.

Everything comes as reports of the data plane, and stays in plain numbers. Invariant: what is remembered is bounded,
whatever is asked for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from ngrokd.endpoints import printable
from ngrokd.ops.events import Events
from ngrokd.relay.handler import APP_GONE, BUG, CLOSED, CUT, GAVE_UP, NOTICE, OPENED, REFUSED, FlowEvent

ENDED_KEPT: Final = 200
SEEN_KEPT: Final = 70_000  # more than there may be endpoints
LABELLED: Final = 100  # endpoints that have numbers of their own in the metrics; the others share one
OTHERS: Final = "other"

_INGRESS_REASONS: Final = frozenset({"ingress_unreachable", "ingress_untrusted"})


@dataclass(slots=True)
class Seen:
    """One endpoint since the start. Times are wall clock, Unix seconds; None: never.

    Attributes:
        live, total: flows now, and all that were accepted.
        errors: flows that were refused or cut.
        last_activity: when one was opened or ended.
        last_dial: when the ingress last agreed to it.
        failures: requests that it has refused since then.
        problem: what the last of them heard, "" after a good one.
    """

    live: int = 0
    total: int = 0
    errors: int = 0
    last_activity: float | None = None
    last_dial: float | None = None
    failures: int = 0
    problem: str = ""

    @property
    def state(self) -> str:
        """ "online" (the last try was good), "degraded" (it was not) or "unknown" (nobody has tried)."""
        if self.failures:
            return "degraded"
        return "unknown" if self.last_dial is None else "online"


@dataclass(frozen=True, slots=True)
class Ended:
    """A flow that is over, or never began. `wall` is when; `message` says more about `event.reason`."""

    wall: float
    event: FlowEvent
    message: str


class Traffic:
    """Counts by host name and port. `note` everything that the data plane reports of flows."""

    def __init__(self, events: Events | None = None) -> None:
        self._events = events if events is not None else Events()
        self._seen: dict[tuple[str, int], Seen] = {}
        self._labels: dict[str, list[int]] = {}  # endpoint -> opened, failed
        self._ended: deque[Ended] = deque(maxlen=ENDED_KEPT)
        self._said = (0, "")  # what was last said of a flow that is about to end
        self.last_ingress_problem = ""

    def of(self, host: str, port: int) -> Seen:
        """The counts of one endpoint; zeros for one that nobody used."""
        return self._seen.get((host, port), _NOTHING)

    def ended(self) -> Iterator[Ended]:
        """The last ENDED_KEPT flows that ended or were refused, newest first."""
        return reversed(list(self._ended))

    def by_endpoint(self) -> dict[str, tuple[int, int]]:
        """Flows opened and failed, for the first LABELLED endpoints that were used, and for all OTHERS together."""
        return {name: (opened, failed) for name, (opened, failed) in self._labels.items()}

    def note(self, event: FlowEvent, wall: float) -> None:
        """Count an event, remember ends, and pass it on."""
        _NOTED[event.kind](self, event, wall)

    def _opened(self, event: FlowEvent, wall: float) -> None:
        seen = self._find(event)
        seen.live += 1
        seen.total += 1
        seen.last_activity = seen.last_dial = wall
        seen.failures = 0
        seen.problem = self.last_ingress_problem = ""
        self._label(event)[0] += 1
        self._emit("flow.opened", event, "connected", dial_ms=_ms(event.dial_s))

    def _closed(self, event: FlowEvent, wall: float) -> None:
        seen = self._find(event)
        seen.live -= 1
        seen.last_activity = wall
        number, said = self._said
        self._ended.append(Ended(wall, event, said if number == event.flow else ""))
        self._emit(
            "flow.closed",
            event,
            "closed",
            reason=event.reason,
            bytes_from_app=event.bytes_from_app,
            bytes_to_app=event.bytes_to_app,
            age_s=round(event.age_s, 3),
        )

    def _refused(self, event: FlowEvent, wall: float) -> None:
        seen = self._find(event)
        seen.errors += 1
        seen.failures += 1
        seen.problem = event.message
        self._label(event)[1] += 1
        if event.reason in _INGRESS_REASONS:
            self.last_ingress_problem = event.message
        self._ended.append(Ended(wall, event, event.message))
        text = f"connection refused: {_with_remedy(event)}"
        self._emit("flow.refused", event, text, reason=event.reason, dial_ms=_ms(event.dial_s))

    def _gave_up(self, event: FlowEvent, wall: float) -> None:
        self._ended.append(Ended(wall, event, event.message))
        self._emit("flow.gave_up", event, event.message, reason=event.reason, dial_ms=_ms(event.dial_s))

    def _cut(self, event: FlowEvent, _wall: float) -> None:
        self._find(event).errors += 1
        self._label(event)[1] += 1
        self._said = (event.flow, event.message)
        self._emit("flow.cut", event, f"connection reset: {_with_remedy(event)}", reason=event.reason)

    def _app_gone(self, event: FlowEvent, _wall: float) -> None:
        self._said = (event.flow, event.message)
        self._emit("flow.app_gone", event, f"the app is gone: {event.message}", reason=event.reason)

    def _notice(self, event: FlowEvent, _wall: float) -> None:
        self._emit("flow.notice", event, f"the ingress says: {event.message}")

    def _bug(self, event: FlowEvent, wall: float) -> None:
        self._find(event).errors += 1
        self._label(event)[1] += 1
        self._said = (event.flow, event.message)
        if event.dial_s == event.age_s:  # it never was accepted, so no CLOSED follows
            self._ended.append(Ended(wall, event, event.message))
        text = f"a defect of ours ended a connection: {event.message}\n{event.traceback}"
        self._emit("flow.bug", event, text, reason=event.reason)

    def _emit(self, name: str, event: FlowEvent, message: str, **fields: object) -> None:
        self._events.emit(
            name, message, flow=event.flow, endpoint=join(event.host, event.port), source=join(*event.source), **fields
        )

    def _find(self, event: FlowEvent) -> Seen:
        key = event.host, event.port
        seen = self._seen.get(key)
        if seen is None:
            if len(self._seen) >= SEEN_KEPT:  # names come and go; those that are used stay
                for old in [each for each, counts in self._seen.items() if not counts.live][: SEEN_KEPT // 10]:
                    del self._seen[old]
            seen = self._seen[key] = Seen()
        return seen

    def _label(self, event: FlowEvent) -> list[int]:
        name = join(event.host, event.port)
        counts = self._labels.get(name)
        if counts is None:
            name = printable(name) if len(self._labels) < LABELLED else OTHERS
            counts = self._labels.setdefault(name, [0, 0])
        return counts


def join(host: str, port: int) -> str:
    """HOST:PORT, with brackets where the host has colons."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _with_remedy(event: FlowEvent) -> str:
    return f"{event.message}; {event.remedy}" if event.remedy else event.message


_NOTHING: Final = Seen()
_NOTED: Final[dict[str, Callable[[Traffic, FlowEvent, float], None]]] = {
    OPENED: Traffic._opened,
    CLOSED: Traffic._closed,
    REFUSED: Traffic._refused,
    GAVE_UP: Traffic._gave_up,
    CUT: Traffic._cut,
    APP_GONE: Traffic._app_gone,
    NOTICE: Traffic._notice,
    BUG: Traffic._bug,
}
