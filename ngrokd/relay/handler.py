"""What happens to a request: look up, dial, and only then accept; otherwise refuse.

The app's SYN is answered when the ingress has agreed to the endpoint, so that "connection refused" means what it says.
A request is decided exactly once; whatever goes wrong, and however this is left, an undecided one is refused.

This is the error boundary of a flow. What can be expected to fail (the ingress, the network, the app) ends the flow,
is counted and reported, and nothing else notices. Anything else is a bug: it ends the flow as well, is reported with
its traceback, and in `strict` mode, for tests, it is raised.
"""

from __future__ import annotations

import traceback
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

import trio

from ngrokd.errors import RelayError
from ngrokd.relay.splice import Flow, splice

if TYPE_CHECKING:
    from collections.abc import Callable

    from ngrokd.endpoints import Endpoint
    from ngrokd.relay.ingress import Ingress, OpenedStream
    from ngrokd.relay.transport import Poller

# Kinds of FlowEvent.
OPENED: Final = "opened"  # accepted: the app is connected
CLOSED: Final = "closed"  # an accepted flow is over, however it ended; comes last, and says why
GAVE_UP: Final = "gave_up"  # the app itself, before it was accepted
REFUSED: Final = "refused"  # before it was accepted: the app saw "connection refused"
CUT: Final = "cut"  # by the ingress, after it was accepted: the app saw "connection reset"
APP_GONE: Final = "app_gone"  # the app reset it, or vanished
NOTICE: Final = "notice"  # the ingress has something to tell the user
BUG: Final = "bug"


class Request(Protocol):
    """An app's SYN, undecided."""

    @property
    def source(self) -> tuple[str, int]:
        """The app's address and port."""
        ...

    @property
    def destination(self) -> tuple[str, int]:
        """The address and port it wants."""
        ...

    def accept(self) -> Flow:
        """Answer SYN-ACK."""
        ...

    def refuse(self) -> None:
        """Answer RST; nothing happens when it was decided or cancelled before."""
        ...


@dataclass(frozen=True, slots=True)
class FlowEvent:
    """Something happened to a flow that a person may want to know.

    Attributes:
        kind: OPENED, CLOSED, GAVE_UP, REFUSED, CUT, APP_GONE, NOTICE or BUG.
        host, port: the endpoint's; the destination's address where there is no endpoint.
        source: the app's address and port.
        reason: a stable word, for counters and `status`. Of CLOSED: why it ended, "completed" when both sides did.
        message: one printable line.
        remedy: what to do next, or "".
        dial_s: seconds that passed until the ingress had agreed, or until it was given up.
        traceback: of a bug.
        flow: its number, see `Serving.number`.
        destination: the address and port that the app wanted.
        age_s: seconds since the app's SYN.
        bytes_from_app, bytes_to_app: carried so far, as the app's TCP counts them.
    """

    kind: str
    host: str
    port: int
    source: tuple[str, int]
    reason: str
    message: str
    remedy: str = ""
    dial_s: float = 0.0
    traceback: str = ""
    flow: int = 0
    destination: tuple[str, int] = ("", 0)
    age_s: float = 0.0
    bytes_from_app: int = 0
    bytes_to_app: int = 0


class Serving:
    """One request on its way, and the flow it becomes.

    Attributes:
        request: what the app asks for.
        number: tells flows apart for as long as the daemon runs; 0 where nobody numbers them.
        begun: when it came, Trio's clock.
        endpoint: what it stands for, once it was looked up.
        flow: once it was accepted.
        outcome: one of the counters, once it is decided.
        ending: why it ends, a word as in `FlowEvent.reason`. Whoever cancels `Handler.serve` says so here before.
        dial_s: seconds until the ingress had agreed.
    """

    __slots__ = ("begun", "dial_s", "ending", "endpoint", "flow", "number", "outcome", "request")

    def __init__(self, request: Request, number: int, begun: float) -> None:
        self.request = request
        self.number = number
        self.begun = begun
        self.endpoint: Endpoint | None = None
        self.flow: Flow | None = None
        self.outcome = ""
        self.ending = ""
        self.dial_s = 0.0


class Handler:
    """Serves requests, one call each."""

    def __init__(
        self,
        lookup: Callable[[tuple[str, int]], Endpoint | None],
        ingress: Ingress,
        poller: Poller,
        *,
        on_event: Callable[[FlowEvent], object] | None = None,
        strict: bool = False,
    ) -> None:
        """Make a handler.

        Args:
            lookup: finds the endpoint that an address and port stand for.
            ingress: opens the streams.
            poller: moves the bytes, as long as flows live.
            on_event: told what happened; must neither wait nor raise.
            strict: raise bugs, after they have been reported.
        """
        self._lookup = lookup
        self._ingress = ingress
        self._poller = poller
        self._on_event = on_event
        self._strict = strict
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._dial_s = 0.0
        self._bytes_from_app = 0
        self._bytes_to_app = 0
        self.active = 0  # accepted flows that have not ended

    def counters(self) -> dict[str, int]:
        """Return what happened so far, by name; `reason.*` counts refusals and cuts by their reason.

        `bytes_*` are those of the flows that are over.

        requests = refused + cancelled + accepted + those being dialled;
        accepted = active + completed + cut + app_gone + ended (by us: shutdown, removed endpoint, bugs).
        """
        counts = {name: self._counts[name] for name in _COUNTERS}
        counts["active"] = self.active
        counts["dialing"] = self._ingress.dialing
        counts["waiting"] = self._ingress.waiting
        counts["dial_ms"] = round(self._dial_s * 1000)
        counts["bytes_from_app"] = self._bytes_from_app
        counts["bytes_to_app"] = self._bytes_to_app
        counts |= {f"reason.{reason}": count for reason, count in self._reasons.items()}
        return counts

    async def serve(self, request: Request, serving: Serving | None = None) -> None:
        """Decide `request` and carry its flow to the end. Cancelled, it is refused, or its flow is reset.

        Args:
            request: the app's SYN.
            serving: where to write down how it goes, for whoever wants to watch.
        """
        self._counts["requests"] += 1
        if serving is None:
            serving = Serving(request, 0, trio.current_time())
        try:
            await self._serve(serving)
        except trio.BrokenResourceError as error:
            self._count_failure(serving, APP_GONE, "app_gone", str(error))
        except RelayError as error:
            self._count_failure(serving, CUT, error.reason, str(error), error.remedy)
        except (OSError, trio.TooSlowError) as error:
            self._count_failure(serving, CUT, "system", str(error) or type(error).__name__)
        except Exception as error:  # the boundary: one flow's bug must not end the others
            self._counts["bugs"] += 1
            self._decide(serving, "refused" if serving.flow is None else "ended")
            serving.ending = "bug"
            self._report(serving, BUG, "bug", f"{type(error).__name__}: {error}", trace=traceback.format_exc())
            if self._strict:
                raise
        finally:
            if not serving.outcome:  # cancelled, which may come as a group
                self._decide(serving, "cancelled" if serving.flow is None else "ended")
            if serving.flow is None:
                request.refuse()
                if serving.outcome == "cancelled":
                    self._report(
                        serving, GAVE_UP, serving.ending or "gave_up", "the app gave up, or was not waited for"
                    )
            else:
                self.active -= 1
                self._bytes_from_app += serving.flow.bytes_from_app
                self._bytes_to_app += serving.flow.bytes_to_app
                self._report(serving, CLOSED, serving.ending or serving.outcome, "the connection is over")

    async def _serve(self, serving: Serving) -> None:
        request = serving.request
        endpoint = serving.endpoint = self._lookup(request.destination)
        if endpoint is None:
            self._count_failure(serving, REFUSED, "no_endpoint", "no endpoint has this address and port")
            return
        self._poller.elsewhere += 1
        try:
            opened = await self._ingress.open(endpoint.host, endpoint.port)
        finally:
            self._poller.elsewhere -= 1
        serving.dial_s = opened.dial_s
        self._dial_s += opened.dial_s
        flow = self._accept(serving, opened)
        await splice(flow, opened.stream, self._poller)
        self._decide(serving, "completed")

    def _accept(self, serving: Serving, opened: OpenedStream) -> Flow:
        """Accept and tell; whatever goes wrong in it, neither end is left."""
        try:
            serving.flow = flow = serving.request.accept()
            self._counts["accepted"] += 1
            self.active += 1
            self._report(serving, OPENED, "opened", "connected")
            for notice in opened.notices:
                self._report(serving, NOTICE, "notice", notice)
        except BaseException:
            opened.stream.abort()
            if serving.flow is not None:
                serving.flow.abort()
            raise
        return flow

    def _count_failure(self, serving: Serving, kind: str, reason: str, message: str, remedy: str = "") -> None:
        if serving.flow is None:
            kind = REFUSED
        self._decide(serving, kind)
        serving.ending = reason
        self._reasons[reason] += 1
        self._report(serving, kind, reason, message, remedy)

    def _decide(self, serving: Serving, outcome: str) -> None:
        serving.outcome = outcome
        self._counts[outcome] += 1

    def _report(
        self, serving: Serving, kind: str, reason: str, message: str, remedy: str = "", trace: str = ""
    ) -> None:
        endpoint = serving.endpoint
        host, port = serving.request.destination if endpoint is None else (endpoint.host, endpoint.port)
        if self._on_event is None:
            return
        request, flow = serving.request, serving.flow
        age_s = trio.current_time() - serving.begun
        self._on_event(
            FlowEvent(
                kind,
                host,
                port,
                request.source,
                reason,
                message,
                remedy,
                age_s if flow is None else serving.dial_s,
                trace,
                serving.number,
                request.destination,
                age_s,
                0 if flow is None else flow.bytes_from_app,
                0 if flow is None else flow.bytes_to_app,
            )
        )


_COUNTERS: Final = ("requests", "accepted", "completed", "refused", "cancelled", "cut", "app_gone", "ended", "bugs")


__all__ = [
    "APP_GONE",
    "BUG",
    "CLOSED",
    "CUT",
    "GAVE_UP",
    "NOTICE",
    "OPENED",
    "REFUSED",
    "FlowEvent",
    "Handler",
    "Request",
    "Serving",
]
