"""The way to ngrok's binding ingress: from an endpoint's name to a TLS stream on which it is the other side.

`Ingress.open` does this under one deadline: it takes a connection that is ready (see `pool`), or the next one that gets
ready, or waits for a dial slot (in order of arrival), connects, does the TLS handshake and verifies; then it exchanges
the binding header. Nothing is looked up here: the addresses are given.

What can go wrong is told apart by who could mend it:

    a connection from the pool does not answer      it was dead already: once, another one is dialled instead. Only the
                                                    header was sent, so no byte of the app is at risk
    the ingress was not reached, and that may pass  dialled again soon, for at most RETRY_FOR_S, for so many flows
    a resumed connection is refused                 see `tickets`: as long as nobody knows whether the ingress knows us
                                                    in resumed connections, a full one asks again
    all else                                        a verdict: the app hears it at once

When verification fails the chain is looked at once for all waiting flows (see `trust`). A failure is remembered for a
second, so that a hundred flows do not probe a hundred times and a misconfigured daemon does not hammer its ingress.

Every refusal is one of the relay's errors, and its message is for the person who has to do something about it.
"""

from __future__ import annotations

import contextlib
import random
import ssl
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

from ngrokd.endpoints import printable
from ngrokd.errors import BindingRefused, IngressUnreachable, IngressUntrusted, RelayError, StreamTruncated
from ngrokd.relay.binding import BindingResponse, ResponseDecoder, encode_request
from ngrokd.relay.dialing import CHECK_OUTBOUND, Addresses, MayPass
from ngrokd.relay.pool import Connection, Pool
from ngrokd.relay.stock import LEAD_WEIGHT, PoolSettings, Stock
from ngrokd.relay.tickets import Ticket, Tickets, Trial
from ngrokd.relay.tls import SCRATCH, TlsAlert, TlsSession, TlsStream
from ngrokd.relay.transport import connect_tcp
from ngrokd.relay.trust import Presented, Trust, describe, presented_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ngrokd.endpoints import Credentials
    from ngrokd.relay.dialing import Dial
    from ngrokd.relay.transport import Transport

UNTRUSTED_FOR_S: Final = 1.0  # how long a failed verification answers for the next flows
# A failure that may pass is a verdict when it has not passed by now; tries after 50, 100, 200 and 400 ms (jittered).
RETRY_FOR_S: Final = 1.0
RETRY_FIRST_S: Final = 0.05
RETRYING: Final = 64  # flows between two tries, at most; all others get the verdict
RETRYING_PER_ENDPOINT: Final = 16
# A pooled connection that says nothing for so long is taken for one whose other end is gone without a word (a router
# forgot it, this machine slept). Its flow gets another one, and so it must leave time for that: half of what is left.
SILENT_S: Final = 3.0

# Alerts by which a server speaks of the client's certificate (RFC 8446 6.2), as OpenSSL names them.
_ABOUT_OUR_CERTIFICATE: Final = frozenset(
    {
        "access_denied",
        "bad_certificate",
        "certificate_expired",
        "certificate_required",
        "certificate_revoked",
        "certificate_unknown",
        "decrypt_error",
        "handshake_failure",
        "unknown_ca",
        "unsupported_certificate",
    }
)
_RENEW: Final = "see the certificate with: ngrokd status; get a new one with: ngrokd refresh-cert --force"


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


class Ingress:
    """ngrok's door: opens streams to endpoints.

    It is told its address, anchors and credentials, at any time; what changes is for the next dials, streams that are
    open are not touched, and ready connections that would be made otherwise now are dropped.

    Attributes:
        dial_s: how long TCP and TLS take together, averaged over the last dials, seconds; 0 before the first.
        counts: dials, dial_failures, retried, resumed (of dials), replaced, silent (of pooled connections).
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
        self._addresses = Addresses(dial, refused_networks)
        self._on_ca_found = on_ca_found
        self._chance = chance
        self._trust = Trust()
        self._generation = 0  # of what was told; a connection of an earlier one is not made any more
        self._tickets = Tickets()
        self._tickets.enabled = resumption
        self._settings = pool or PoolSettings()
        self._stock = Stock(self._settings, chance)
        self._pool = Pool(self._stock, self._connect_for_pool, self._is_current, self._collect, strict=strict)
        self._running = False
        self._handshaking = trio.Lock()
        self._retrying: Counter[tuple[str, int]] = Counter()
        self._probing = trio.Lock()
        self._untrusted: tuple[ssl.SSLContext, str, float] | None = None  # verified against, message, until
        self._scratch = memoryview(bytearray(SCRATCH))
        self.dial_s = 0.0
        self.counts: Counter[str] = Counter()

    # -- what it is told

    def set_credentials(self, credentials: Credentials) -> None:
        """Present this client certificate on new connections. Raises BadCredentials; then the one before stays."""
        self._trust.set_credentials(credentials)
        self._changed()

    def set_addresses(self, host: str, port: int, addresses: Sequence[str]) -> None:
        """Dial these numeric addresses, in this order; `host` is verified and sent as SNI."""
        if self._addresses.set(host, port, addresses):
            self._changed(same_identity=True)

    def set_anchors(self, system: bool, pem: bytes, fingerprints: Iterable[str] = ()) -> int:
        """Set whom to trust; see Trust.set_anchors. Returns how many certificates of `pem` are used."""
        used = self._trust.set_anchors(system, pem, fingerprints)
        self._changed()
        return used

    def _changed(self, *, same_identity: bool = False) -> None:
        """Drop what would be made otherwise now, and try again what has failed."""
        self._untrusted = None
        if not same_identity:
            self._generation += 1
        self._stock.note_change()
        self._pool.discard(lambda each: not self._is_current(each))
        self._expect_requests()

    def _expect_requests(self) -> None:
        if self._running and self._trust.has_credentials and self._addresses:
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
        return self._addresses.name

    def counters(self) -> dict[str, int]:
        """What happened so far, by name, and how many connections are ready and being made.

        Each request was one of hits, adopted (of a connection that was just being made) and misses. `dial_us` is the
        time that all `dials` took together.
        """
        counted = {name: self._pool.counts[name] for name in _POOL_COUNTERS}
        counted |= {name: self.counts[name] for name in _COUNTERS}
        return counted | {"ready": len(self._pool), "making": self._pool.dialing, "tickets": len(self._tickets)}

    def describe_pool(self) -> dict[str, object]:
        """How the pool is, for people."""
        now = trio.current_time()
        counts = self._pool.counts
        dials = self.counts["dials"]
        limit = self._stock.idle_limit_s(now)
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
            "dial_failures": self.counts["dial_failures"],
            "dial_ms": round(self.dial_s * 1000, 2),
            "resumed_share": round(self.counts["resumed"] / dials, 3) if dials else 0.0,
            "resumption": self._tickets.trial.value if self._tickets.enabled else "off",
            "idle_limit_s": None if limit == float("inf") else round(limit, 1),
            "problem": self._pool.problem,
        }

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
        progress = _Progress()
        with trio.move_on_after(self._connect_timeout_s):
            stream, response = await self._open(host.lower(), port, progress)
            return OpenedStream(
                stream,
                printable(response.endpoint_id),
                printable(response.proto),
                tuple(printable(each, 500) for each in response.notices),
                trio.current_time() - begun,
            )
        self._stock.note_failure(trio.current_time())
        timeout = f"timed out after {self._connect_timeout_s:g} s while {progress.phase}"
        raise IngressUnreachable(f"cannot reach the ingress {self.name}: {timeout}", remedy=CHECK_OUTBOUND)

    async def _open(self, host: str, port: int, progress: _Progress) -> tuple[TlsStream, BindingResponse]:
        """Find a connection whose other side answers. At most three: pooled, resumed on trial, full."""
        if not self._trust.has_credentials:
            raise IngressUnreachable(
                f"cannot use the ingress {self.name}: there is no client certificate yet",
                remedy="see what registration waits for with: ngrokd status",
            )
        deadline = trio.current_effective_deadline()
        connection = self._pool.take() or await self._pool.adopt()
        pooled, full, refused = connection is not None, False, None
        while True:
            if connection is None:
                connection = await self._dial_fresh(host, port, progress, full=full)
            progress.phase = "waiting for the answer to the binding header"
            patience = min(SILENT_S, (deadline - trio.current_time()) / 2) if pooled else float("inf")
            on_trial = connection.resumed and self._tickets.on_trial(connection.context)
            try:
                with trio.move_on_after(patience):
                    response = await self._ask(connection, host, port)
                    if refused is not None:
                        self._judge_resumption(refused, full_served=True)
                    return connection.stream, response
                self._distrust_older(connection)
            except _NoAnswer as silence:
                if connection.resumed:
                    self._tickets.note_cut(connection.context)
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

    def _distrust_older(self, silent: Connection) -> None:
        """One that was alive for all we knew does not answer: those that waited longer will not either."""
        self.counts["silent"] += 1
        self._pool.discard(lambda each: each.dialled_at <= silent.dialled_at)

    def _judge_resumption(self, context: ssl.SSLContext, *, full_served: bool) -> None:
        self._tickets.note_refused(context, full_served=full_served)
        self._drop_resumed_if_failed()

    def _drop_resumed_if_failed(self) -> None:
        if self._tickets.trial is Trial.FAILED:
            self._pool.discard(lambda each: each.resumed)

    # -- connections

    async def _dial_fresh(self, host: str, port: int, progress: _Progress, *, full: bool) -> Connection:
        """Make a connection for a flow; again for a while, where it may pass what went wrong."""
        give_up_at = trio.current_time() + RETRY_FOR_S
        pause = RETRY_FIRST_S
        while True:
            progress.phase = "waiting for one of the dials in flight to finish"
            try:
                async with self._slots:
                    return await self._connect(progress, full=full)
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
        progress = _Progress()
        with trio.move_on_after(self._connect_timeout_s):
            return await self._connect(progress)
        timeout = f"timed out after {self._connect_timeout_s:g} s while {progress.phase}"
        raise IngressUnreachable(f"cannot reach the ingress {self.name}: {timeout}", remedy=CHECK_OUTBOUND)

    def _is_current(self, connection: Connection) -> bool:
        """Whether a connection made now could be this one."""
        addresses = self._addresses
        return (
            connection.generation == self._generation
            and connection.host == addresses.host
            and connection.port == addresses.port
            and connection.address in addresses
        )

    def _collect(self, connection: Connection) -> None:
        """Keep the session of a connection, once, when there is one."""
        if not connection.has_ticket and self._tickets.wanted(connection.context, connection.host):
            connection.has_ticket = self._tickets.add(connection.stream.ssl_object, connection.verified_at)

    async def _connect(self, progress: _Progress, *, full: bool = False) -> Connection:
        """Connect, do the handshake, verify; `full` does not resume."""
        context = self._trust.context()
        self._raise_remembered(context)
        try:
            try:
                return await self._dial_tls(context, progress, full=full)
            except ssl.SSLCertVerificationError as error:
                return await self._find_pinned_ca(context, error, progress)
        except RelayError:
            self.counts["dial_failures"] += 1
            raise

    # -- verification

    async def _find_pinned_ca(
        self, failed: ssl.SSLContext, error: ssl.SSLCertVerificationError, progress: _Progress
    ) -> Connection:
        """See whether the ingress presents a CA that we know by its fingerprint, and verify against it."""
        progress.phase = "looking at the certificate chain of the ingress"
        name = self.name
        async with self._probing:
            context = self._trust.context()
            if context is not failed:  # another flow found the CA, or the anchors were changed meanwhile
                try:
                    return await self._dial_tls(context, progress)
                except ssl.SSLCertVerificationError as again:
                    error = again
            self._raise_remembered(context)
            chain = await self._probe()
            pinned = self._trust.pinned(each.der for each in chain)
            if pinned is not None:
                try:
                    connection = await self._dial_tls(self._trust.context_with(pinned), progress)
                except ssl.SSLCertVerificationError as again:
                    error = again
                else:
                    if self._trust.keep(pinned) and self._on_ca_found is not None:
                        self._on_ca_found(ssl.DER_cert_to_PEM_cert(pinned).encode())
                    return connection
            message = (
                f"the ingress {name} is not trusted: {printable(error.verify_message)}; it presented {describe(chain)}"
            )
            if self.name == name:
                self._untrusted = (self._trust.context(), message, trio.current_time() + UNTRUSTED_FOR_S)
            raise _untrusted(message) from error

    def _raise_remembered(self, context: ssl.SSLContext) -> None:
        if self._untrusted is not None:
            verified_against, message, until = self._untrusted
            if verified_against is context and trio.current_time() < until:
                raise _untrusted(message)
            self._untrusted = None

    async def _probe(self) -> list[Presented]:
        """Look at the chain: a handshake without client certificate that is given up as soon as the chain is there."""
        host = self._addresses.host
        transport, _ = await self._addresses.connect()
        try:
            session = TlsSession(self._trust.probe_context(), server_hostname=host)
            while True:
                try:
                    complete = session.handshake_step()
                except ssl.SSLError:
                    complete = True  # what was presented before it failed is what counts
                chain = presented_chain(session.object)
                if chain or complete:
                    return chain
                await _send_all(transport, session.take())
                count = transport.receive_into_nowait(self._scratch)
                while count is None:
                    await transport.wait_readable()
                    count = transport.receive_into_nowait(self._scratch)
                if not count:
                    return []
                session.feed(self._scratch[:count])
        except OSError:
            return []
        finally:
            transport.close()

    # -- connecting

    async def _dial_tls(self, context: ssl.SSLContext, progress: _Progress, *, full: bool = False) -> Connection:
        """Connect and do the handshake. Raises ssl.SSLCertVerificationError and the relay's errors."""
        # What is dialled and told now, whatever is set meanwhile.
        host, port, generation = self._addresses.host, self._addresses.port, self._generation
        while True:
            begun = trio.current_time()
            progress.phase = "connecting"
            transport, address = await self._addresses.connect()
            progress.phase = "doing the TLS handshake"
            ticket = None if full else self._tickets.take(context, host, trio.current_time())
            try:
                stream = await self._handshake(transport, context, host, ticket)
            except ssl.SSLCertVerificationError:
                raise
            except (ssl.SSLError, StreamTruncated) as error:
                if ticket is None:
                    raise self._handshake_failed(error) from error
                self._tickets.clear()  # perhaps it cannot bear to be reminded; a full handshake will tell
                full = True
                continue
            now = trio.current_time()
            resumed = ticket is not None and bool(stream.ssl_object.session_reused)
            if ticket is not None:
                self._tickets.note_use(ticket, resumed=resumed)
            self._note_dial(now - begun, resumed=resumed)
            verified_at = ticket.verified_at if ticket is not None and resumed else now
            return Connection(stream, context, generation, host, port, address, now, verified_at, resumed)

    async def _handshake(
        self, transport: Transport, context: ssl.SSLContext, host: str, ticket: Ticket | None
    ) -> TlsStream:
        """Do the handshake; whatever goes wrong, the transport is not left. Raises ssl.SSLError, StreamTruncated."""
        try:
            session = TlsSession(context, server_hostname=host, session=ticket.session if ticket else None)
            stream = TlsStream(transport, session, scratch=self._scratch)
            await stream.handshake(self._take_turn)
        except BaseException:
            transport.abort()
            raise
        return stream

    async def _take_turn(self) -> None:
        """Let one handshake at a time do its work, and the packets have theirs in between."""
        async with self._handshaking:  # getting it takes a turn of the loop, and whoever waits for it gets the next one
            pass

    def _note_dial(self, seconds: float, *, resumed: bool) -> None:
        self.counts["dials"] += 1
        self.counts["dial_us"] += round(seconds * 1e6)
        self.counts["resumed"] += resumed
        self.dial_s += (seconds - self.dial_s) * (LEAD_WEIGHT if self.dial_s else 1.0)

    def _handshake_failed(self, error: ssl.SSLError | StreamTruncated) -> RelayError:
        if isinstance(error, StreamTruncated):
            return MayPass(f"cannot reach the ingress {self.name}: {error}", remedy=CHECK_OUTBOUND)
        reason = printable(error.reason or str(error)).lower()
        _, is_alert, alert = reason.partition("alert_")
        said = (alert or reason).replace("_", " ")
        if is_alert and alert in _ABOUT_OUR_CERTIFICATE:  # TLS 1.2: the server was verified before it judged us
            return BindingRefused(
                f"the ingress {self.name} ended the TLS handshake ({said}): "
                "it probably rejected our client certificate",
                remedy=_RENEW,
            )
        if is_alert and alert != "protocol_version":
            return IngressUnreachable(
                f"the ingress {self.name} refused the TLS handshake: {said}", remedy=CHECK_OUTBOUND
            )
        return IngressUntrusted(
            f"whoever answers at {self.name} does not speak the TLS (1.2 or later) of an ingress: {said}",
            remedy="check ingress.address, and what is between this machine and it",
        )

    # -- the header

    async def _ask(self, connection: Connection, host: str, port: int) -> BindingResponse:
        """Ask for an endpoint. The connection is aborted unless that succeeds; cancelled too.

        Raises: BindingRefused, BadBindingHeader: the ingress answered. _NoAnswer: it did not.
        """
        try:
            response = await self._upgrade(connection.stream, host, port)
        except BindingRefused:
            self._stock.note_proof()
            connection.stream.abort()
            raise
        except BaseException:
            connection.stream.abort()
            raise
        self._stock.note_proof()
        if connection.resumed:
            self._tickets.note_served(connection.context)
        self._collect(connection)
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
        if isinstance(error, TlsAlert) and error.alert in _ABOUT_OUR_CERTIFICATE:
            return BindingRefused(
                f"the ingress {self.name} rejected our client certificate: {error.alert.replace('_', ' ')}",
                remedy=_RENEW,
            )
        if received:
            return IngressUnreachable(f"the ingress {self.name} closed the connection within its binding header")
        # Servers that check the certificate after the handshake just hang up (RFC 8446 4.4.2.4 allows it).
        how = "" if error is None else f" ({error})"
        return BindingRefused(
            f"the ingress {self.name} closed the connection before it answered{how}: "
            "it probably rejected our client certificate",
            remedy=_RENEW,
        )


class _NoAnswer(Exception):  # noqa: N818 - what has happened, and `error` is what it means unless it was a dead one
    """The connection ended before the binding header was answered."""

    def __init__(self, error: RelayError) -> None:
        super().__init__(str(error))
        self.error = error


class _Progress:
    """What an `open` is doing, for the message when time runs out."""

    __slots__ = ("phase",)

    def __init__(self) -> None:
        self.phase = "waiting for one of the dials in flight to finish"


_POOL_COUNTERS: Final = ("hits", "adopted", "misses", "ordered", "failed", "dead", "aged", "surplus")
_COUNTERS: Final = ("dials", "dial_us", "dial_failures", "retried", "resumed", "replaced", "silent")


async def _send_all(transport: Transport, data: bytes) -> None:
    view = memoryview(data)
    while view:
        sent = transport.send_nowait(view)
        view = view[sent:]
        if view:
            await transport.wait_writable()


def _untrusted(message: str) -> IngressUntrusted:
    return IngressUntrusted(
        message,
        remedy="if this is your ingress, save the CA that issued its certificate as a PEM file and set "
        "ingress.ca_file to its path in the configuration",
    )


__all__ = ["Ingress", "OpenedStream"]
