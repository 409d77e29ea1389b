"""The way to ngrok's binding ingress: from an endpoint's name to a TLS stream on which it is the other side.

`Ingress.open` does four things under one deadline: it waits for a dial slot (in order of arrival), connects (addresses
in order, the next one 250 ms after the one before, or at once when that has failed), does the TLS handshake and
verifies, and exchanges the binding header. The first three make a stream that could serve any endpoint; they are
`_ready_stream`, and a pool of such streams belongs there and nowhere else.

Nothing is looked up here: the addresses are given. Addresses within our own networks are refused, because a connection
to them would come back to us as a flow, which would dial again, without end.

When verification fails the chain is looked at once for all waiting flows (see `trust`). A failure is remembered for a
second, so that a hundred flows do not probe a hundred times and a misconfigured daemon does not hammer its ingress.

Every refusal is one of the relay's errors, and its message is for the person who has to do something about it.
"""

from __future__ import annotations

import contextlib
import ipaddress
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import trio

from ngrokd.endpoints import printable
from ngrokd.errors import BindingRefused, IngressUnreachable, IngressUntrusted, StreamTruncated
from ngrokd.relay.binding import BindingResponse, ResponseDecoder, encode_request
from ngrokd.relay.tls import SCRATCH, TlsAlert, TlsSession, TlsStream
from ngrokd.relay.transport import connect_tcp
from ngrokd.relay.trust import Presented, Trust, describe, presented_chain

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from ngrokd.endpoints import Credentials
    from ngrokd.relay.transport import Transport

    Dial: TypeAlias = Callable[[str, int], Awaitable[Transport]]

STAGGER_S: Final = 0.25  # RFC 8305 5: "Connection Attempt Delay"
UNTRUSTED_FOR_S: Final = 1.0  # how long a failed verification answers for the next flows

# Never an ingress: "this network", multicast, broadcast. Loopback may be one, if that is what is configured.
_NEVER: Final = ("0.0.0.0/8", "224.0.0.0/4", "255.255.255.255/32", "::/128", "ff00::/8")
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
_CHECK: Final = "check that connections to it can leave this machine"


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
    open are not touched.

    Attributes:
        dialing: dials in flight.
        waiting: flows that wait for a dial slot.
    """

    def __init__(
        self,
        dial: Dial = connect_tcp,
        *,
        connect_timeout_s: float = 10.0,
        dials: int = 64,
        refused_networks: Iterable[str] = (),
        on_ca_found: Callable[[bytes], object] | None = None,
    ) -> None:
        """Make an ingress that does not know its address yet.

        Args:
            dial: connects to a numeric address and port. Raises OSError; cancelled, it must leave nothing behind.
            connect_timeout_s: for everything that `open` does, waiting for a slot included.
            dials: connects and handshakes in flight at a time.
            refused_networks: CIDRs that are never dialled: our own subnets.
            on_ca_found: called once with a CA (PEM) that was pinned by its fingerprint, was presented by the ingress,
                and against which the ingress was then verified.
        """
        self._dial = dial
        self._connect_timeout_s = connect_timeout_s
        self._slots = trio.CapacityLimiter(dials)
        self._refused = [ipaddress.ip_network(each, strict=False) for each in (*_NEVER, *refused_networks)]
        self._on_ca_found = on_ca_found
        self._trust = Trust()
        self._host = ""
        self._port = 0
        self._addresses: tuple[str, ...] = ()
        self._preferred = ""  # the address that answered last
        self._probing = trio.Lock()
        self._untrusted: tuple[ssl.SSLContext, str, float] | None = None  # verified against, message, until
        self._scratch = memoryview(bytearray(SCRATCH))

    # -- what it is told

    def set_credentials(self, credentials: Credentials) -> None:
        """Present this client certificate on new connections. Raises BadCredentials; then the one before stays."""
        self._trust.set_credentials(credentials)
        self._untrusted = None

    def set_addresses(self, host: str, port: int, addresses: Sequence[str]) -> None:
        """Dial these numeric addresses, in this order; `host` is verified and sent as SNI."""
        self._host = host.rstrip(".").lower()
        self._port = port
        self._addresses = tuple(addresses)
        self._untrusted = None

    def set_anchors(self, system: bool, pem: bytes, fingerprints: Iterable[str] = ()) -> int:
        """Set whom to trust; see Trust.set_anchors. Returns how many certificates of `pem` are used."""
        self._untrusted = None
        return self._trust.set_anchors(system, pem, fingerprints)

    # -- what it tells

    @property
    def dialing(self) -> int:
        """Dials in flight."""
        return self._slots.borrowed_tokens

    @property
    def waiting(self) -> int:
        """Flows that wait for a dial slot."""
        return self._slots.statistics().tasks_waiting

    @property
    def name(self) -> str:
        """HOST:PORT, as messages say it."""
        return f"{self._host}:{self._port}"

    # -- what it does

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
            stream = await self._ready_stream(progress)
            try:
                progress.phase = "waiting for the answer to the binding header"
                response = await self._upgrade(stream, host, port)
            except BaseException:
                stream.abort()
                raise
            return OpenedStream(
                stream,
                printable(response.endpoint_id),
                printable(response.proto),
                tuple(printable(each, 500) for each in response.notices),
                trio.current_time() - begun,
            )
        timeout = f"timed out after {self._connect_timeout_s:g} s while {progress.phase}"
        raise IngressUnreachable(f"cannot reach the ingress {self.name}: {timeout}", remedy=_CHECK)

    async def _ready_stream(self, progress: _Progress) -> TlsStream:
        """Get a verified TLS connection that no endpoint has been asked for on. A pool's place is here."""
        if not self._trust.has_credentials:
            raise IngressUnreachable(
                f"cannot use the ingress {self.name or '(unknown)'}: there is no client certificate yet",
                remedy="see what registration waits for with: ngrokd status",
            )
        async with self._slots:
            return await self._connect(progress)

    async def _connect(self, progress: _Progress) -> TlsStream:
        context = self._trust.context()
        self._raise_remembered(context)
        try:
            return await self._dial_tls(context, progress)
        except ssl.SSLCertVerificationError as error:
            return await self._find_pinned_ca(context, error, progress)

    # -- verification

    async def _find_pinned_ca(
        self, failed: ssl.SSLContext, error: ssl.SSLCertVerificationError, progress: _Progress
    ) -> TlsStream:
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
            chain = await self._probe(progress)
            pinned = self._trust.pinned(each.der for each in chain)
            if pinned is not None:
                try:
                    stream = await self._dial_tls(self._trust.context_with(pinned), progress)
                except ssl.SSLCertVerificationError as again:
                    error = again
                else:
                    if self._trust.keep(pinned) and self._on_ca_found is not None:
                        self._on_ca_found(ssl.DER_cert_to_PEM_cert(pinned).encode())
                    return stream
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

    async def _probe(self, progress: _Progress) -> list[Presented]:
        """Look at the chain: a handshake without client certificate that is given up as soon as the chain is there."""
        host = self._host
        transport = await self._dial_any(progress)
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

    async def _dial_tls(self, context: ssl.SSLContext, progress: _Progress) -> TlsStream:
        """Connect and do the handshake. Raises ssl.SSLCertVerificationError and the relay's errors."""
        host = self._host  # of the addresses that are dialled now, whatever is set meanwhile
        transport = await self._dial_any(progress)
        progress.phase = "doing the TLS handshake"
        try:
            stream = TlsStream(transport, TlsSession(context, server_hostname=host), scratch=self._scratch)
            await stream.handshake()
        except ssl.SSLCertVerificationError:
            transport.abort()
            raise
        except ssl.SSLError as error:
            transport.abort()
            raise self._handshake_failed(error) from error
        except StreamTruncated as error:
            transport.abort()
            raise IngressUnreachable(f"cannot reach the ingress {self.name}: {error}", remedy=_CHECK) from error
        except BaseException:
            transport.abort()
            raise
        return stream

    def _handshake_failed(self, error: ssl.SSLError) -> Exception:
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
            return IngressUnreachable(f"the ingress {self.name} refused the TLS handshake: {said}", remedy=_CHECK)
        return IngressUntrusted(
            f"whoever answers at {self.name} does not speak the TLS (1.2 or later) of an ingress: {said}",
            remedy="check ingress.address, and what is between this machine and it",
        )

    async def _dial_any(self, progress: _Progress) -> Transport:
        """Connect to the first address that answers. Raises IngressUnreachable."""
        progress.phase = "connecting"
        addresses = self._dialable()
        if self._preferred in addresses:
            addresses.remove(self._preferred)
            addresses.insert(0, self._preferred)
        failures: list[str] = []
        transport: Transport | None = None
        if len(addresses) == 1:
            transport = await self._dial_one(addresses[0], self._port, failures)
            winner = addresses[0]
        else:
            race = _Race(self._dial_one, addresses, self._port, failures)
            transport, winner = await race.run()
        if transport is None:
            raise IngressUnreachable(f"cannot reach the ingress {self.name}: {', '.join(failures)}", remedy=_CHECK)
        self._preferred = winner
        return transport

    async def _dial_one(self, address: str, port: int, failures: list[str]) -> Transport | None:
        try:
            return await self._dial(address, port)
        except (OSError, trio.BrokenResourceError) as error:
            failures.append(f"{address}: {getattr(error, 'strerror', None) or error}")
            return None

    def _dialable(self) -> list[str]:
        """Return the addresses that may be dialled. Raises IngressUnreachable when there is none."""
        if not self._addresses:
            raise IngressUnreachable(
                f"no address of the ingress {self.name} is known", remedy="check that this machine resolves names"
            )
        allowed = [each for each in self._addresses if not self._is_refused(each)]
        if not allowed:
            raise IngressUnreachable(
                f"the ingress {self.name} resolves to {', '.join(self._addresses)}, which is never dialled: "
                "it is multicast, no address at all, or in our own subnet",
                remedy="check ingress.address, net.subnet and what resolves names for this machine",
            )
        return allowed

    def _is_refused(self, address: str) -> bool:
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            return True
        if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped is not None:
            ip = ip.ipv4_mapped
        return any(ip in network for network in self._refused)

    # -- the header

    async def _upgrade(self, stream: TlsStream, host: str, port: int) -> BindingResponse:
        """Ask for an endpoint; what comes behind the answer is given back to the stream."""
        stream.send_nowait([encode_request(host.lower(), port)])
        decoder = ResponseDecoder()
        with contextlib.suppress(StreamTruncated):  # reading says why: an alert may have come before the break
            await stream.drain()
        while True:
            try:
                view = await stream.receive_view()
            except StreamTruncated as error:
                raise self._no_answer(error, decoder.received) from error
            if not view:
                raise self._no_answer(None, decoder.received)
            response = decoder.feed(view)
            if response is not None:
                break
        if response.refused:
            code = printable(response.error_code, 64)
            said = ": ".join(each for each in (code, printable(response.error_message, 500)) if each)
            raise BindingRefused(f"the ingress {self.name} refused {host}:{port}: {said}", code=code)
        stream.unread(memoryview(decoder.surplus))
        return response

    def _no_answer(self, error: StreamTruncated | None, received: int) -> Exception:
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


class _Progress:
    """What an `open` is doing, for the message when time runs out."""

    __slots__ = ("phase",)

    def __init__(self) -> None:
        self.phase = "waiting for one of the dials in flight to finish"


class _Race:
    """Dials several addresses, each STAGGER_S after the one before or as soon as that has failed; the first wins."""

    def __init__(
        self,
        dial: Callable[[str, int, list[str]], Awaitable[Transport | None]],
        addresses: Sequence[str],
        port: int,
        failures: list[str],
    ) -> None:
        self._dial = dial
        self._addresses = addresses
        self._port = port
        self._failures = failures
        self._winner: tuple[Transport, str] | None = None

    async def run(self) -> tuple[Transport | None, str]:
        """Return the winner, None when all failed. Cancelled, no connection is left."""
        try:
            async with trio.open_nursery() as nursery:
                for address in self._addresses:
                    failed = trio.Event()
                    nursery.start_soon(self._run_one, address, failed, nursery.cancel_scope)
                    with trio.move_on_after(STAGGER_S):
                        await failed.wait()
        except BaseException:
            if self._winner is not None:
                self._winner[0].abort()
            raise
        return self._winner or (None, "")

    async def _run_one(self, address: str, failed: trio.Event, race: trio.CancelScope) -> None:
        transport = await self._dial(address, self._port, self._failures)
        if transport is None:
            failed.set()
        elif self._winner is None:
            self._winner = (transport, address)
            race.cancel()
        else:  # two at once
            transport.abort()


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
