"""What happens, as events: named, numbered, kept for a while, and a line each in the log.

An event is for two readers. A person reads its line in the log, if its level is one that is logged. A program follows
all of them, whatever the level, with `ngrokd events --json`: the number tells whether one was missed, the name and its
fields are a promise (docs/events.md), the words of the message are not.

Flows begin and end thousands of times a second, so `emit` only puts a tuple into a ring; whoever follows looks at the
ring several times a second, and one that reads too slowly misses events instead of holding anything up.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Final

from ngrokd.log import one_line

KEPT: Final = 4096

_FLOW: Final = ("flow", "endpoint", "source")


@dataclass(frozen=True, slots=True)
class Kind:
    """What one name promises.

    Attributes:
        level: of the line in the log.
        fields: always there.
        when: for docs/events.md.
    """

    level: int
    fields: tuple[str, ...]
    when: str


KINDS: Final[Mapping[str, Kind]] = {
    "daemon.started": Kind(logging.INFO, ("version", "pid"), "The daemon has made device, link, routes and sockets."),
    "daemon.ready": Kind(logging.INFO, ("endpoints",), "The ready line was printed."),
    "daemon.stopping": Kind(logging.INFO, ("flows",), "It stops; new connections are refused, live ones drained."),
    "daemon.paused": Kind(logging.WARNING, (), "`ngrokd pause`: new connections are refused, names stay."),
    "daemon.resumed": Kind(logging.INFO, (), "`ngrokd resume`."),
    "daemon.heartbeat": Kind(
        logging.INFO,
        (
            "flows",
            "opened",
            "refused",
            "cut",
            "dials",
            "dials_failed",
            "dial_p95_ms",
            "bytes_from_app",
            "bytes_to_app",
            "drops",
            "loop_delay_ms",
        ),
        "Once a minute: figures of the last minute (`flows`: now, `loop_delay_ms`: the longest).",
    ),
    "config.reloaded": Kind(logging.INFO, ("changed", "needs_restart"), "The configuration was read again."),
    "config.refused": Kind(logging.ERROR, ("reason",), "The configuration is wrong; the old one goes on."),
    "log.level": Kind(logging.INFO, ("to", "for_s"), "The log's level was changed; `for_s` 0: until the next reload."),
    "api.failed": Kind(logging.WARNING, ("reason",), "ngrok's API failed or refused, for another reason than before."),
    "api.recovered": Kind(logging.INFO, (), "ngrok's API answers again."),
    "api.key_missing": Kind(logging.WARNING, (), "There is no API key to work with."),
    "operator.registered": Kind(logging.INFO, ("operator", "not_after"), "A new operator, or a renewed certificate."),
    "operator.gone": Kind(logging.WARNING, ("operator",), "The operator was deleted at ngrok; another is registered."),
    "certificate.failed": Kind(logging.WARNING, ("reason",), "The certificate is due and could not be renewed."),
    "endpoints.changed": Kind(
        logging.INFO, ("added", "removed", "changed", "skipped", "served"), "What is served has changed (counts)."
    ),
    "endpoint.added": Kind(logging.DEBUG, ("endpoint", "address"), "A name and port is served (50 of one poll)."),
    "endpoint.removed": Kind(logging.DEBUG, ("endpoint",), "It is not any more (50 of one poll)."),
    "endpoint.skipped": Kind(
        logging.WARNING, ("endpoint", "id", "reason"), "An endpoint cannot be served (50 of one poll)."
    ),
    "hosts.failed": Kind(logging.WARNING, ("reason",), "The names cannot be written into the hosts file."),
    "ingress.unresolved": Kind(logging.WARNING, ("reason",), "The ingress's name cannot be looked up."),
    "ingress.verified": Kind(logging.INFO, (), "The first verified handshake with the ingress."),
    "ingress.ca_found": Kind(logging.INFO, (), "The ingress presented ngrok's CA, known by its fingerprint."),
    "tun.lost": Kind(logging.WARNING, ("reason",), "The interface is gone; it is made again."),
    "tun.restored": Kind(logging.INFO, (), "The interface is there again; live flows go on."),
    "capture.started": Kind(logging.INFO, ("by",), "Somebody records packets."),
    "capture.ended": Kind(logging.INFO, ("by", "reason", "recorded", "dropped"), "That is over."),
    "flow.opened": Kind(logging.DEBUG, (*_FLOW, "dial_ms"), "The endpoint's side agreed and the app is connected."),
    "flow.refused": Kind(
        logging.WARNING, (*_FLOW, "reason", "dial_ms"), "The app saw “connection refused”; `reason` says why."
    ),
    "flow.gave_up": Kind(logging.DEBUG, (*_FLOW, "reason", "dial_ms"), "The app gave up before it was connected."),
    "flow.cut": Kind(logging.WARNING, (*_FLOW, "reason"), "The ingress cut it short; the app saw a reset."),
    "flow.app_gone": Kind(logging.DEBUG, (*_FLOW, "reason"), "The app reset it, or vanished."),
    "flow.notice": Kind(logging.INFO, _FLOW, "The ingress has something to tell the user."),
    "flow.bug": Kind(logging.ERROR, (*_FLOW, "reason"), "A defect of ours ended it."),
    "flow.closed": Kind(
        logging.DEBUG,
        (*_FLOW, "reason", "bytes_from_app", "bytes_to_app", "age_s"),
        "An accepted flow is over, however it ended; always the last of its flow.",
    ),
}


# A flow's endpoint, number and source stand behind the words; of all else the message says everything.
FOR_FLOWS: Final = frozenset(name for name in KINDS if name.startswith("flow."))


@dataclass(frozen=True, slots=True)
class Event:
    """One event.

    Attributes:
        number: 1 for the first since the start, then one more each.
        wall: Unix seconds.
        name: one of KINDS.
        message: for people.
        fields: those of its kind, perhaps more.
    """

    number: int
    wall: float
    name: str
    message: str
    fields: Mapping[str, object]

    def to_json(self) -> bytes:
        """One line."""
        level = logging.getLevelName(KINDS[self.name].level).lower()
        whole = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.wall))
        head = {"seq": self.number, "time": f"{whole}.{int(self.wall % 1 * 1000):03d}Z", "event": self.name}
        return json.dumps({**head, "level": level, "message": one_line(self.message), **self.fields}).encode() + b"\n"


class Events:
    """The last KEPT events. Any thread may emit; the event loop's reads."""

    def __init__(self, wall: Callable[[], float] = time.time, *, kept: int = KEPT) -> None:
        self._wall = wall
        self._kept: deque[Event] = deque(maxlen=kept)
        self._lock = threading.Lock()
        self.last = 0

    def emit(self, name: str, message: str = "", **fields: object) -> None:
        """Note that something happened, and log it at its level.

        A name that is not in KINDS, and a field that is missing, are bugs: KeyError, AssertionError.
        """
        kind = KINDS[name]
        assert all(field in fields for field in kind.fields), f"{name} needs {kind.fields}, got {tuple(fields)}"
        with self._lock:
            self.last += 1
            self._kept.append(Event(self.last, self._wall(), name, message, fields))
        logger = logging.getLogger(f"ngrokd.{name.partition('.')[0]}")
        if logger.isEnabledFor(kind.level):
            extra = {"event": name, "rate_key": name, "said": name not in FOR_FLOWS, **fields}
            logger.log(kind.level, "%s", message or kind.when, extra=extra)

    def after(self, number: int, most: int = KEPT) -> list[Event]:
        """The oldest `most` events after this number that are still kept. A gap before the first one: it was missed."""
        with self._lock:
            behind = self.last - number
            if behind <= 0:
                return []
            skipped = max(0, len(self._kept) - behind)
            return list(islice(self._kept, skipped, skipped + most))


def markdown() -> Iterator[str]:
    """The table of docs/events.md, line by line."""
    yield "| event | level | fields | when |"
    yield "|---|---|---|---|"
    for name, kind in KINDS.items():
        fields = ", ".join(f"`{field}`" for field in kind.fields)
        yield f"| `{name}` | {logging.getLevelName(kind.level).lower()} | {fields} | {kind.when} |"


if __name__ == "__main__":
    sys.stdout.write("\n".join(markdown()) + "\n")


__all__ = ["KEPT", "KINDS", "Event", "Events", "Kind", "markdown"]
