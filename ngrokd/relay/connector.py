"""Making one verified TLS connection to the ingress: addresses, anchors, credentials and sessions come together here.

Nothing but the handshake is sent before the ingress is verified. When verification fails the chain is looked at once
for all that are waiting (see `trust`). A failure is remembered for a second, so that a hundred flows do not probe a
hundred times and a misconfigured daemon does not hammer its ingress.

A handshake blocks the loop: 0.2 ms of work when a session is resumed, 1.1 ms otherwise (of which 0.7 are our signature
with a P-384 key). So handshakes take turns, one in each turn of the loop, and packets have theirs in between. A thread
would save little of that: handing one step to it and back costs 0.1 to 0.2 ms of the loop's time.
"""

from __future__ import annotations

import ssl
from collections import Counter
from typing import TYPE_CHECKING, Final

import trio

from ngrokd.endpoints import printable
from ngrokd.errors import BindingRefused, IngressUnreachable, IngressUntrusted, RelayError, StreamTruncated
from ngrokd.metrics import Histogram
from ngrokd.relay.dialing import CHECK_OUTBOUND, Addresses, MayPass
from ngrokd.relay.pool import Connection
from ngrokd.relay.stock import LEAD_WEIGHT
from ngrokd.relay.tickets import Ticket, Tickets
from ngrokd.relay.tls import SCRATCH, TlsSession, TlsStream
from ngrokd.relay.trust import Presented, Trust, describe, presented_chain

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from ngrokd.endpoints import Credentials
    from ngrokd.relay.dialing import Dial
    from ngrokd.relay.transport import Transport

UNTRUSTED_FOR_S: Final = 1.0  # how long a failed verification answers for the next flows
RENEW: Final = "see the certificate with: ngrokd status; get a new one with: ngrokd refresh-cert --force"
# Alerts by which a server speaks of the client's certificate (RFC 8446 6.2), as OpenSSL names them.
ABOUT_OUR_CERTIFICATE: Final = frozenset(
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


# What Progress.phase says meanwhile.
CONNECTING: Final = "connecting"
SHAKING_HANDS: Final = "doing the TLS handshake"
LOOKING_AT_CHAIN: Final = "looking at the certificate chain of the ingress"


class Progress:
    """What opening a stream is at, for the message when time runs out."""

    __slots__ = ("phase",)

    def __init__(self) -> None:
        self.phase = "waiting for one of the dials in flight to finish"


class Connector:
    """Makes connections as it was told last.

    Args:
        dial: see Addresses.
        refused_networks: see Addresses.
        on_ca_found: called once with a CA (PEM) that was pinned by its fingerprint, was presented by the ingress, and
            against which the ingress was then verified.

    Attributes:
        tickets: sessions to resume.
        dial_s: how long TCP and TLS take together, averaged over the last dials, seconds; 0 before the first.
        dial_times: how long each dial took, TCP and TLS together.
        counts: dials, dial_us (microseconds, all together), resumed (of dials), dial_failures, and those by the reason
            of their error.
    """

    def __init__(
        self, dial: Dial, refused_networks: Iterable[str], on_ca_found: Callable[[bytes], object] | None
    ) -> None:
        self._addresses = Addresses(dial, refused_networks)
        self._on_ca_found = on_ca_found
        self._trust = Trust()
        self._generation = 0  # of credentials and anchors; a connection of an earlier one is not made any more
        self.tickets = Tickets()
        self._handshaking = trio.Lock()
        self._probing = trio.Lock()
        self._untrusted: tuple[ssl.SSLContext, str, float] | None = None  # verified against, message, until
        self._scratch = memoryview(bytearray(SCRATCH))
        self.dial_s = 0.0
        self.dial_times = Histogram()
        self.counts: Counter[str] = Counter()

    # -- what it is told

    def set_credentials(self, credentials: Credentials) -> None:
        """See Ingress."""
        self._trust.set_credentials(credentials)
        self._generation += 1
        self._untrusted = None

    def set_anchors(self, system: bool, pem: bytes, fingerprints: Iterable[str]) -> int:
        """See Ingress."""
        self._generation += 1
        self._untrusted = None
        return self._trust.set_anchors(system, pem, fingerprints)

    def set_addresses(self, host: str, port: int, addresses: Sequence[str]) -> bool:
        """See Ingress. Returns whether anything but the order is new."""
        self._untrusted = None
        return self._addresses.set(host, port, addresses)

    # -- what it tells

    @property
    def name(self) -> str:
        """HOST:PORT, as messages say it."""
        return self._addresses.name

    @property
    def has_credentials(self) -> bool:
        """There is a client certificate."""
        return self._trust.has_credentials

    @property
    def is_told(self) -> bool:
        """There are a client certificate and addresses."""
        return self._trust.has_credentials and bool(self._addresses)

    def is_current(self, connection: Connection) -> bool:
        """Whether a connection made now could be this one."""
        addresses = self._addresses
        return (
            connection.generation == self._generation
            and connection.host == addresses.host
            and connection.port == addresses.port
            and connection.address in addresses
        )

    def collect(self, connection: Connection) -> None:
        """Keep the session of a connection, once, when there is one."""
        if not connection.has_ticket and self.tickets.wanted(connection.context, connection.host):
            connection.has_ticket = self.tickets.add(connection.stream.ssl_object, connection.verified_at)

    # -- connecting

    async def connect(self, progress: Progress, *, full: bool = False) -> Connection:
        """Connect, do the handshake, verify. Cancelled, nothing is left.

        Args:
            progress: is kept up to date.
            full: do not resume a session.

        Raises:
            IngressUnreachable: nobody there, or the connection was lost; MayPass where that may change in a moment.
            IngressUntrusted: whoever answered could not prove to be the ingress.
            BindingRefused: our certificate was rejected.
        """
        context = self._trust.context()
        self._raise_remembered(context)
        try:
            try:
                return await self._dial_tls(context, progress, full=full)
            except ssl.SSLCertVerificationError as error:
                return await self._find_pinned_ca(context, error, progress)
        except RelayError as error:
            self.counts["dial_failures"] += 1
            self.counts[error.reason] += 1
            raise

    # -- verification

    async def _find_pinned_ca(
        self, failed: ssl.SSLContext, error: ssl.SSLCertVerificationError, progress: Progress
    ) -> Connection:
        """See whether the ingress presents a CA that we know by its fingerprint, and verify against it."""
        progress.phase = LOOKING_AT_CHAIN
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

    # -- the handshake

    async def _dial_tls(self, context: ssl.SSLContext, progress: Progress, *, full: bool = False) -> Connection:
        """Connect and do the handshake. Raises ssl.SSLCertVerificationError and the relay's errors."""
        # What is dialled and told now, whatever is set meanwhile.
        host, port, generation = self._addresses.host, self._addresses.port, self._generation
        while True:
            begun = trio.current_time()
            progress.phase = CONNECTING
            transport, address = await self._addresses.connect()
            progress.phase = SHAKING_HANDS
            ticket = None if full else self.tickets.take(context, host, trio.current_time())
            try:
                stream = await self._handshake(transport, context, host, ticket)
            except ssl.SSLCertVerificationError:
                raise
            except (ssl.SSLError, StreamTruncated) as error:
                if ticket is None:
                    raise self._handshake_failed(error) from error
                self.tickets.clear()  # perhaps it cannot bear to be reminded; a full handshake will tell
                full = True
                continue
            now = trio.current_time()
            resumed = ticket is not None and bool(stream.ssl_object.session_reused)
            if ticket is not None:
                self.tickets.note_use(ticket, resumed=resumed)
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
        self.dial_times.observe(seconds)
        self.dial_s += (seconds - self.dial_s) * (LEAD_WEIGHT if self.dial_s else 1.0)

    def _handshake_failed(self, error: ssl.SSLError | StreamTruncated) -> RelayError:
        if isinstance(error, StreamTruncated):
            return MayPass(f"cannot reach the ingress {self.name}: {error}", remedy=CHECK_OUTBOUND)
        reason = printable(error.reason or str(error)).lower()
        _, is_alert, alert = reason.partition("alert_")
        said = (alert or reason).replace("_", " ")
        if is_alert and alert in ABOUT_OUR_CERTIFICATE:  # TLS 1.2: the server was verified before it judged us
            return BindingRefused(
                f"the ingress {self.name} ended the TLS handshake ({said}): "
                "it probably rejected our client certificate",
                remedy=RENEW,
            )
        if is_alert and alert != "protocol_version":
            return IngressUnreachable(
                f"the ingress {self.name} refused the TLS handshake: {said}", remedy=CHECK_OUTBOUND
            )
        return IngressUntrusted(
            f"whoever answers at {self.name} does not speak the TLS (1.2 or later) of an ingress: {said}",
            remedy="check ingress.address, and what is between this machine and it",
        )


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


__all__ = ["ABOUT_OUR_CERTIFICATE", "RENEW", "Connector", "Progress"]
