"""The way to ngrok's binding ingress: from an endpoint's name to a TLS stream on which it is the other side.

`Ingress.open` does this under one deadline: it takes a connection that is ready (see `pool`), or the next one that gets
ready, or waits for a dial slot (in order of arrival) and makes one (see `connector`); then it exchanges the binding
header. Nothing is looked up here: the addresses are given.

What can go wrong is told apart by who could mend it:

    a connection from the pool does not answer      it was dead already: once, another one is dialled instead. Only the
                                                    header was sent, so no byte of the app is at risk
    the ingress was not reached, and that may pass  dialled again soon, for at most RETRY_FOR_S, for so many flows
    a resumed connection is refused                 see `tickets`: as long as nobody knows whether the ingress knows us
                                                    in resumed connections, a full one asks again
    all else                                        a verdict: the app hears it at once

Every refusal is one of the relay's errors, and its message is for the person who has to do something about it.
"""

from __future__ import annotations

import contextlib
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from ngrokd.endpoints import printable
from ngrokd.errors import BindingRefused, IngressUnreachable, IngressUntrusted, RelayError, StreamTruncated
from ngrokd.metrics import Histogram
from ngrokd.relay.binding import BindingResponse, ResponseDecoder, encode_request
from ngrokd.relay.connector import (
    ABOUT_OUR_CERTIFICATE,
    CONNECTING,
    LOOKING_AT_CHAIN,
    RENEW,
    SHAKING_HANDS,
    Connector,
    Progress,
)
from ngrokd.relay.dialing import CHECK_OUTBOUND, MayPass
from ngrokd.relay.pool import Connection, Pool
from ngrokd.relay.stock import PoolSettings, Stock
from ngrokd.relay.tickets import Trial
from ngrokd.relay.tls import TlsAlert, TlsStream
from ngrokd.relay.transport import connect_tcp

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable, Sequence

    from ngrokd.endpoints import Credentials
    from ngrokd.relay.dialing import Dial

ASKING: Final = "waiting for the answer to the binding header"
SEE_STATUS: Final = "see what registration waits for with: ngrokd status"
# A failure that may pass is a verdict when it has not passed by now; tries after 50, 100, 200 and 400 ms (jittered).
RETRY_FOR_S: Final = 1.0
RETRY_FIRST_S: Final = 0.05
RETRYING: Final = 64  # flows between two tries, at most; all others get the verdict
RETRYING_PER_ENDPOINT: Final = 16
# A pooled connection that says nothing for so long is taken for one whose other end is gone without a word (a router
# forgot it, this machine slept). Its flow gets another one, and so it must leave time for that: half of what is left.
# If that one is slow as well, then it is the endpoint that takes its time, and is given it from then on.
SILENT_S: Final = 3.0
SLOW_FOR_S: Final = 600.0
SLOW_KEPT: Final = 1000  # endpoints remembered


@dataclass(frozen=True, slots=True)
class OpenedStream:
    """A stream to an endpoint: what is received and sent from now on are the application's bytes.

    Attributes:
        stream: TLS; whoever has it must close or abort it. Bytes that came with the header are received first.
        endpoint_id, proto: as the ingress said, printable, possibly empty.
        notices: messages of the ingress for the user, printable.
        dial_s: how long it took to open, seconds.
    """

    stream: TlsStream
    endpoint_id: str
    proto: str
    notices: tuple[str, ...]
    dial_s: float


@dataclass(frozen=True, slots=True)
class Probe:
    """How it went to reach an endpoint once, with a connection of its own.

    Attributes:
        phases: "connect" (TCP), "tls" and "header", and the seconds each took; the last one may have failed.
        address: of the ingress, "" when no connection was made.
        tls: the protocol's version, "" when there was no verified handshake.
        endpoint_id, proto: as the ingress said, printable, possibly empty.
        reason, problem, remedy: of a failure, "" when all went well.
    """

    phases: tuple[tuple[str, float], ...]
    address: str = ""
    tls: str = ""
    endpoint_id: str = ""
    proto: str = ""
    reason: str = ""
    problem: str = ""
    remedy: str = ""


class Ingress:
    """ngrok's door: opens streams to endpoints.

    It is told its address, anchors and credentials, at any time; what changes is for the next dials, streams that are
    open are not touched, and ready connections that would be made otherwise now are dropped.

    Attributes:
        counts: retried (dials), replaced, silent (pooled connections).
    """

    def __init__(
        self,
        dial: Dial = connect_tcp,
        *,
        connect_timeout_s: float = 10.0,
        dials: int = 64,
        refused_networks: Iterable[str] = (),
        on_ca_found: Callable[[bytes], object] | None = None,
        pool: PoolSettings | None = None,
        resumption: bool = True,
        chance: Callable[[], float] = random.random,
        strict: bool = False,
    ) -> None:
        """Make an ingress that does not know its address yet.

        Args:
            dial: connects to a numeric address and port. Raises OSError; cancelled, it must leave nothing behind.
            connect_timeout_s: for everything that `open` does, waiting for a slot included.
            dials: connects and handshakes that flows have in flight at a time; the pool's are bounded by its `max`.
            refused_networks: CIDRs that are never dialled: our own subnets.
            on_ca_found: called once with a CA (PEM) that was pinned by its fingerprint, was presented by the ingress,
                and against which the ingress was then verified.
            pool: how many ready connections are kept while `run` runs.
            resumption: resume TLS sessions.
            chance: numbers from 0 to 1, for jitter.
            strict: raise bugs of the pool's, for tests.
        """
        self._connect_timeout_s = connect_timeout_s
        self._slots = trio.CapacityLimiter(dials)
        self._connector = Connector(dial, refused_networks, on_ca_found)
        self._connector.tickets.enabled = resumption
        self._chance = chance
        self._settings = pool or PoolSettings()
        self._stock = Stock(self._settings, chance)
        self._pool = Pool(
            self._stock, self._connect_for_pool, self._connector.is_current, self._connector.collect, strict=strict
        )
        self._running = False
        self._slow: dict[tuple[str, int], float] = {}  # endpoints that take their time, and until when we believe that
        self._retrying: Counter[tuple[str, int]] = Counter()
        self._upgrade_times = Histogram()
        self.counts: Counter[str] = Counter()

    # -- what it is told

    def set_credentials(self, credentials: Credentials) -> None:
        """Present this client certificate on new connections. Raises BadCredentials; then the one before stays."""
        self._connector.set_credentials(credentials)
        self._changed()

    def set_addresses(self, host: str, port: int, addresses: Sequence[str]) -> None:
        """Dial these numeric addresses, in this order; `host` is verified and sent as SNI."""
        if self._connector.set_addresses(host, port, addresses):
            self._changed()

    def set_anchors(self, system: bool, pem: bytes, fingerprints: Iterable[str] = ()) -> int:
        """Set whom to trust; see Trust.set_anchors. Returns how many certificates of `pem` are used."""
        used = self._connector.set_anchors(system, pem, fingerprints)
        self._changed()
        return used

    def set_limits(self, connect_timeout_s: float, dials: int, pool: PoolSettings) -> None:
        """Take so long and so many from now on, as when it was made. Dials that are under way go on."""
        self._connect_timeout_s = connect_timeout_s
        self._slots.total_tokens = dials
        self._settings = pool
        self._stock.set_settings(pool)
        self._pool.wake()

    def _changed(self) -> None:
        """Drop what would be made otherwise now, and try again what has failed."""
        self._stock.note_change()
        self._pool.problem = ""
        self._pool.discard(lambda each: not self._connector.is_current(each))
        self._expect_requests()

    def _expect_requests(self) -> None:
        if self._running and self._connector.is_told:
            self._stock.note_start(trio.current_time())
            self._pool.wake()

    # -- what it tells

    @property
    def dialing(self) -> int:
        """Dials of flows in flight."""
        return self._slots.borrowed_tokens

    @property
    def waiting(self) -> int:
        """Flows that wait for a dial slot."""
        return self._slots.statistics().tasks_waiting

    @property
    def name(self) -> str:
        """HOST:PORT, as messages say it."""
        return self._connector.name

    def counters(self) -> dict[str, int]:
        """What happened so far, by name, and how many connections are ready and being made.

        Each request was one of hits, adopted (of a connection that was just being made) and misses. `dial_us` is the
        time that all `dials` took together; `failed_*` are those that failed, by reason; `dial_seconds` and
        `upgrade_seconds` (the binding header and its answer) are histograms.
        """
        counted = {name: self._pool.counts[name] for name in _POOL_COUNTERS}
        counted |= {name: self._connector.counts[name] for name in _DIAL_COUNTERS}
        counted |= {f"failed_{reason}": self._connector.counts[reason] for reason in _DIAL_REASONS}
        counted |= self._connector.dial_times.flat("dial_seconds")
        counted |= self._upgrade_times.flat("upgrade_seconds")
        counted |= {name: self.counts[name] for name in _COUNTERS}
        tickets = len(self._connector.tickets)
        return counted | {"ready": len(self._pool), "making": self._pool.dialing, "tickets": tickets}

    def describe_pool(self) -> dict[str, bool | int | float | str | None]:
        """How the pool is, for people."""
        now = trio.current_time()
        counts, dialled = self._pool.counts, self._connector.counts
        dials = dialled["dials"]
        limit = self._stock.idle_limit_s(now)
        tickets = self._connector.tickets
        return {
            "ready": len(self._pool),
            "making": self._pool.dialing,
            "target": self._stock.target(now),
            "max": self._settings.max,
            "hits": counts["hits"],
            "adopted": counts["adopted"],
            "misses": counts["misses"],
            "dead": counts["dead"],
            "replaced": self.counts["replaced"],
            "dials": dials,
            "dial_failures": dialled["dial_failures"],
            "dial_ms": round(self._connector.dial_s * 1000, 2),
            "resumed_share": round(dialled["resumed"] / dials, 3) if dials else 0.0,
            "resumption": tickets.trial.value if tickets.enabled else "off",
            "idle_limit_s": None if math.isinf(limit) else round(limit, 1),
            "problem": self.problem,
        }

    @property
    def problem(self) -> str:
        """Why connections cannot be kept ready, although they are wanted; known before the first app finds out."""
        return self._pool.problem if self._stock.target(trio.current_time()) else ""

    # -- what it does

    async def run(self) -> None:
        """Keep connections ready; for ever. Without it each flow dials for itself. Cancelled, they are closed."""
        self._running = True
        try:
            self._expect_requests()
            await self._pool.run()
        finally:
            self._running = False

    async def open(self, host: str, port: int) -> OpenedStream:
        """Open a stream to the endpoint `host`:`port`. Cancelled, nothing is left behind.

        Raises:
            IngressUnreachable: no address, nobody there, connection lost, or not done within the connect timeout.
            IngressUntrusted: whoever answered could not prove to be the ingress; nothing was sent.
            BindingRefused: the ingress said no, or rejected our certificate.
            BadBindingHeader: the ingress answered something else than a binding header.
        """
        begun = trio.current_time()
        progress = _Attempt()
        with trio.move_on_after(self._connect_timeout_s):
            stream, response = await self._open(host.lower(), port, progress)
            return OpenedStream(
                stream,
                printable(response.endpoint_id),
                printable(response.proto),
                tuple(printable(each, 500) for each in response.notices),
                trio.current_time() - begun,
            )
        if progress.silent is not None:
            self._note_slow(host.lower(), port)
        elif progress.phase != ASKING:
            self._stock.note_failure(trio.current_time())
        raise self._timeout(progress.phase)

    async def probe(self, host: str, port: int) -> Probe:
        """Go the whole way to an endpoint with a fresh connection and a full handshake, then hang up.

        With host "" only the ingress itself is reached and verified. Cancelled, nothing is left behind.
        """
        if not self._connector.has_credentials:
            return Probe((), reason="no_certificate", problem="there is no client certificate yet", remedy=SEE_STATUS)
        watch, connection = _Stopwatch(), None
        try:
            with trio.fail_after(self._connect_timeout_s):
                async with self._slots:
                    connection = await self._connector.connect(watch, full=True)
                tls = connection.stream.ssl_object.version() or ""
                if not host:
                    return Probe(watch.stop(), connection.address, tls)
                watch.phase = ASKING
                response = await self._ask(connection, host.lower(), port)
                said = printable(response.endpoint_id), printable(response.proto)
                return Probe(watch.stop(), connection.address, tls, *said)
        except trio.TooSlowError:
            error: RelayError = self._timeout(watch.phase)
        except RelayError as failure:
            error = failure
        except _NoAnswer as silence:
            error = silence.error
        finally:
            if connection is not None:
                connection.stream.close_nowait()
        address = "" if connection is None else connection.address
        tls = "" if connection is None else connection.stream.ssl_object.version() or ""
        return Probe(watch.stop(), address, tls, reason=error.reason, problem=str(error), remedy=error.remedy)

    async def _open(self, host: str, port: int, progress: _Attempt) -> tuple[TlsStream, BindingResponse]:
        """Find a connection whose other side answers. At most three: pooled, resumed on trial, full."""
        if not self._connector.has_credentials:
            raise IngressUnreachable(
                f"cannot use the ingress {self.name}: there is no client certificate yet",
                remedy=SEE_STATUS,
            )
        deadline = trio.current_effective_deadline()
        progress.phase = "waiting for a connection that is being made"
        connection = self._pool.take() or await self._pool.adopt()
        pooled, full, refused = connection is not None, False, None
        while True:
            if connection is None:
                connection = await self._dial_fresh(host, port, progress, full=full)
            progress.phase = ASKING
            asked_at = trio.current_time()
            patience = math.inf
            if pooled and not self._is_slow(host, port, asked_at):
                patience = min(SILENT_S, (deadline - asked_at) / 2)
            on_trial = connection.resumed and self._connector.tickets.on_trial(connection.context)
            try:
                with trio.move_on_after(patience):
                    response = await self._ask(connection, host, port)
                    if refused is not None:
                        self._judge_resumption(refused, full_served=True)
                    if progress.silent is not None:
                        self._judge_silence(progress.silent, host, port, trio.current_time() - asked_at)
                    return connection.stream, response
                self.counts["silent"] += 1
                progress.silent = connection
            except _NoAnswer as silence:
                if connection.resumed:
                    self._connector.tickets.note_cut(connection.context)
                    self._drop_resumed_if_failed()
                if not (pooled or on_trial):
                    raise silence.error from silence.__cause__
                full = full or (on_trial and not pooled)
            except BindingRefused:
                if not on_trial:
                    if refused is not None:
                        self._judge_resumption(refused, full_served=False)
                    raise
                full, refused = True, connection.context
            self.counts["replaced"] += pooled
            connection, pooled = None, False

    def _judge_silence(self, silent: Connection, host: str, port: int, answered_in_s: float) -> None:
        """A fresh connection was answered where a pooled one was not: was that one dead, or the endpoint slow?

        If one was dead that was alive for all we knew, those that waited longer are dead too.
        """
        if answered_in_s < SILENT_S / 2:
            self._pool.discard(lambda each: each.dialled_at <= silent.dialled_at)
        else:
            self._note_slow(host, port)

    def _note_slow(self, host: str, port: int) -> None:
        self._slow.pop((host, port), None)
        self._slow[host, port] = trio.current_time() + SLOW_FOR_S
        if len(self._slow) > SLOW_KEPT:
            del self._slow[next(iter(self._slow))]

    def _is_slow(self, host: str, port: int, now: float) -> bool:
        return now < self._slow.get((host, port), -math.inf)

    def _judge_resumption(self, context: ssl.SSLContext, *, full_served: bool) -> None:
        self._connector.tickets.note_refused(context, full_served=full_served)
        self._drop_resumed_if_failed()

    def _drop_resumed_if_failed(self) -> None:
        if self._connector.tickets.trial is Trial.FAILED:
            self._pool.discard(lambda each: each.resumed)

    # -- connections

    async def _dial_fresh(self, host: str, port: int, progress: Progress, *, full: bool) -> Connection:
        """Make a connection for a flow; again for a while, where it may pass what went wrong."""
        give_up_at = trio.current_time() + RETRY_FOR_S
        pause = RETRY_FIRST_S
        while True:
            progress.phase = "waiting for one of the dials in flight to finish"
            try:
                async with self._slots:
                    return await self._connector.connect(progress, full=full)
            except RelayError as error:
                self._stock.note_failure(trio.current_time())
                jittered = pause * (1.0 - 0.5 * self._chance())
                if not isinstance(error, MayPass) or trio.current_time() + jittered > give_up_at:
                    raise
                if self._retrying.total() >= RETRYING or self._retrying[host, port] >= RETRYING_PER_ENDPOINT:
                    raise
                progress.phase = f"waiting to dial again: {error}"
            pause *= 2
            await self._pause(jittered, (host, port))

    async def _pause(self, seconds: float, endpoint: tuple[str, int]) -> None:
        self.counts["retried"] += 1
        self._retrying[endpoint] += 1
        try:
            await trio.sleep(seconds)
        finally:
            self._retrying[endpoint] -= 1
            if not self._retrying[endpoint]:
                del self._retrying[endpoint]

    async def _connect_for_pool(self) -> Connection:
        progress = Progress()
        with trio.move_on_after(self._connect_timeout_s):
            return await self._connector.connect(progress)
        raise self._timeout(progress.phase)

    def _timeout(self, phase: str) -> IngressUnreachable:
        timeout = f"timed out after {self._connect_timeout_s:g} s while {phase}"
        return IngressUnreachable(f"cannot reach the ingress {self.name}: {timeout}", remedy=CHECK_OUTBOUND)

    # -- the header

    async def _ask(self, connection: Connection, host: str, port: int) -> BindingResponse:
        """Ask for an endpoint. The connection is aborted unless that succeeds; cancelled too.

        Raises: BindingRefused, BadBindingHeader: the ingress answered. _NoAnswer: it did not.
        """
        asked_at = trio.current_time()
        try:
            response = await self._upgrade(connection.stream, host, port)
        except BindingRefused:
            self._pool.note_proof()
            connection.stream.abort()
            raise
        except BaseException:
            connection.stream.abort()
            raise
        self._upgrade_times.observe(trio.current_time() - asked_at)
        self._pool.note_proof()
        if connection.resumed:
            self._connector.tickets.note_served(connection.context)
        self._connector.collect(connection)
        return response

    async def _upgrade(self, stream: TlsStream, host: str, port: int) -> BindingResponse:
        """Exchange the headers; what comes behind the answer is given back to the stream."""
        stream.send_nowait([encode_request(host, port)])
        decoder = ResponseDecoder()
        with contextlib.suppress(StreamTruncated):  # reading says why: an alert may have come before the break
            await stream.drain()
        while True:
            try:
                view = await stream.receive_view()
            except StreamTruncated as error:
                raise _NoAnswer(self._no_answer(error, decoder.received)) from error
            if not view:
                raise _NoAnswer(self._no_answer(None, decoder.received))
            response = decoder.feed(view)
            if response is not None:
                break
        if response.refused:
            code = printable(response.error_code, 64)
            said = ": ".join(each for each in (code, printable(response.error_message, 500)) if each)
            raise BindingRefused(f"the ingress {self.name} refused {host}:{port}: {said}", code=code)
        stream.unread(memoryview(decoder.surplus))
        return response

    def _no_answer(self, error: StreamTruncated | None, received: int) -> RelayError:
        if isinstance(error, TlsAlert) and error.alert in ABOUT_OUR_CERTIFICATE:
            return BindingRefused(
                f"the ingress {self.name} rejected our client certificate: {error.alert.replace('_', ' ')}",
                remedy=RENEW,
            )
        if received:
            return IngressUnreachable(f"the ingress {self.name} closed the connection within its binding header")
        # Servers that check the certificate after the handshake just hang up (RFC 8446 4.4.2.4 allows it).
        how = "" if error is None else f" ({error})"
        return BindingRefused(
            f"the ingress {self.name} closed the connection before it answered{how}: "
            "it probably rejected our client certificate",
            remedy=RENEW,
        )


class _Attempt(Progress):
    """One `open`. `silent` is a pooled connection that did not answer."""

    __slots__ = ("silent",)

    def __init__(self) -> None:
        super().__init__()
        self.silent: Connection | None = None


class _Stopwatch(Progress):
    """Notes when each phase began."""

    __slots__ = ("_marks",)

    def __init__(self) -> None:
        self._marks: list[tuple[str, float]] = []
        super().__init__()

    @property
    def phase(self) -> str:
        """The phase now."""
        return self._marks[-1][0]

    @phase.setter
    def phase(self, name: str) -> None:
        self._marks.append((name, trio.current_time()))

    def stop(self) -> tuple[tuple[str, float], ...]:
        """The phases that people know, and how long each took; what came twice is one."""
        ends = [began for _, began in self._marks[1:]] + [trio.current_time()]
        took: dict[str, float] = {}
        for (name, began), end in zip(self._marks, ends, strict=True):
            if name in _PHASES:
                took[_PHASES[name]] = took.get(_PHASES[name], 0.0) + end - began
        return tuple(took.items())


class _NoAnswer(Exception):  # noqa: N818 - what has happened, and `error` is what it means unless it was a dead one
    """The connection ended before the binding header was answered."""

    def __init__(self, error: RelayError) -> None:
        super().__init__(str(error))
        self.error = error


_PHASES: Final = {CONNECTING: "connect", SHAKING_HANDS: "tls", LOOKING_AT_CHAIN: "tls", ASKING: "header"}
_POOL_COUNTERS: Final = ("hits", "adopted", "misses", "ordered", "failed", "dead", "aged", "surplus")
_DIAL_COUNTERS: Final = ("dials", "dial_us", "dial_failures", "resumed")
_DIAL_REASONS: Final = (IngressUnreachable.reason, IngressUntrusted.reason, BindingRefused.reason)
_COUNTERS: Final = ("retried", "replaced", "silent")


__all__ = ["Ingress", "OpenedStream", "Probe"]
