"""What each endpoint has seen: counted from the data plane's events, shown by `/status` and `list`."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from ngrokd.relay.handler import APP_GONE, BUG, CLOSED, CUT, NOTICE, OPENED, REFUSED, FlowEvent

log = logging.getLogger("ngrokd.flows")

_INGRESS_REASONS = frozenset({"ingress_unreachable", "ingress_untrusted"})


@dataclass(slots=True)
class Seen:
    """One endpoint's counts since the start. `last_activity` is wall clock, Unix seconds; None: never."""

    live: int = 0
    total: int = 0
    errors: int = 0
    last_activity: float | None = None


class Traffic:
    """Counts by host name and port, and the last thing that was wrong with the ingress."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, int], Seen] = {}
        self.last_ingress_problem = ""

    def of(self, host: str, port: int) -> Seen:
        """The counts of one endpoint; zeros for one that nobody used."""
        return self._seen.get((host, port), Seen())

    def note(self, event: FlowEvent, wall: float) -> None:
        """Count an event, and log those that a person may want to know."""
        seen = self._seen.setdefault((event.host, event.port), Seen())
        where = f"{event.host}:{event.port}"
        remedy = f"; {event.remedy}" if event.remedy else ""
        if event.kind != REFUSED:
            seen.last_activity = wall
        match event.kind:
            case "opened":
                seen.live += 1
                seen.total += 1
                self.last_ingress_problem = ""
            case "closed":
                seen.live -= 1
            case "refused":
                seen.errors += 1
                if event.reason in _INGRESS_REASONS:
                    self.last_ingress_problem = event.message
                log.warning("%s: connection refused: %s%s", where, event.message, remedy)
            case "cut":
                seen.errors += 1
                log.warning("%s: connection reset: %s%s", where, event.message, remedy)
            case "app_gone":
                log.debug("%s: the app is gone: %s", where, event.message)
            case "notice":
                log.info("%s: the ingress says: %s", where, event.message)
            case "bug":
                seen.errors += 1
                log.error("%s: a defect of ours ended a connection: %s\n%s", where, event.message, event.traceback)


assert (OPENED, CLOSED, REFUSED, CUT, APP_GONE, NOTICE, BUG) == (
    "opened",
    "closed",
    "refused",
    "cut",
    "app_gone",
    "notice",
    "bug",
)
