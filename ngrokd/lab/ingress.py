"""ngrok's binding ingress in miniature: mTLS, one header each way, then the bytes of whatever stands behind.

A connection passes three doors. The TLS handshake demands a certificate that the control plane signed. The header
names a host and a port, looked up in `routes`. Then the route's back end speaks with the client through the stream,
and the connection ends as the back end ends it, with half-close in both directions (close_notify).

At each door the ingress can be told to misbehave (`Toxics`): for the next connections (`script`), for a route, or for
all. What it saw is in `connections`; in particular it counts every byte that was received after the handshake, so that
a test can assert that a client which does not trust this ingress has told it nothing.

OpenSSL checks client certificates against the machine's clock. Under a simulated clock (`simulated_time`) that check is
switched off, and the dates are compared with the injected wall clock instead.
"""

from __future__ import annotations

import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final, Literal, NoReturn
from weakref import WeakKeyDictionary

import trio
from trio.abc import HalfCloseableStream

from ngrokd.errors import StreamTruncated
from ngrokd.lab.backends import Backend
from ngrokd.lab.ca import Authority, Identity, load_identity
from ngrokd.lab.header import MAX_BODY, BadHeader, BindingAnswer, BindingRequest, RequestReader, encode_answer, frame
from ngrokd.lab.link import FAST, Line, shape
from ngrokd.relay.tls import TlsSession, TlsStream
from ngrokd.relay.transport import Transport, memory_transport_pair

NO_SUCH_ENDPOINT: Final = "ERR_NGROK_706"
LINGER_S: Final = 10.0  # how long a client may take to end its side after the back end has ended both
_CONNECTIONS_KEPT: Final = 20_000
_SCRATCH: Final = 256 * 1024  # bytes of ciphertext received at once
_NO_CHECK_TIME: Final = 0x200000  # X509_V_FLAG_NO_CHECK_TIME (x509_vfy.h), which the ssl module does not name
_HANDSHAKE_FAILURE: Final = 40

Accept = Literal["serve", "hang", "close", "reset", "alert", "garbage"]
Answer = Literal["serve", "hang", "close", "reset", "cut", "truncate", "garbage", "oversize"]
Then = Literal["reset", "cut", "close", "alert", "hang"]


@dataclass(frozen=True, slots=True)
class Toxics:
    """How to misbehave. The defaults are good behaviour.

    Attributes:
        accept: before the handshake: hang, close (FIN), reset (RST), alert (a fatal TLS alert, number `alert`), or
            garbage (bytes that are not TLS).
        alert: RFC 8446 6.2; 40 is handshake_failure, 48 unknown_ca, 116 certificate_required.
        answer: instead of the header: hang, close (close_notify), reset, cut (FIN without close_notify), truncate (half
            a header, then close_notify), garbage (a header whose body is no protobuf), oversize (one of 65535 bytes).
        delay_s: before the header is sent.
        error_code: refuse with this code, such as ERR_NGROK_3200.
        error_message: and this text.
        notices: sent along with the answer.
        header_slice: send the header in TLS records of so many bytes; 0: in one.
        coalesce: send the header and the first bytes of a back end that speaks first in one record.
        slice: send the back end's bytes in records of at most so many bytes; 0: as they come.
        drip_s: pause between slices, of header and bytes.
        after_bytes: let so many bytes of the back end pass, then do `then`.
        then: reset (RST), cut (FIN without close_notify), close (close_notify), alert (a fatal TLS alert), hang.
        line: latency and bandwidth of the connection.
    """

    accept: Accept = "serve"
    alert: int = _HANDSHAKE_FAILURE
    answer: Answer = "serve"
    delay_s: float = 0.0
    error_code: str = ""
    error_message: str = ""
    notices: tuple[str, ...] = ()
    header_slice: int = 0
    coalesce: bool = False
    slice: int = 0
    drip_s: float = 0.0
    after_bytes: int | None = None
    then: Then = "reset"
    line: Line = FAST


@dataclass(slots=True)
class Route:
    """What is behind a host and port. `toxics` of None leaves the ingress's own in force."""

    backend: Backend
    endpoint_id: str
    proto: str
    toxics: Toxics | None = None


@dataclass(slots=True)
class Connection:
    """What one connection brought.

    Attributes:
        opened_at: Trio's clock, seconds.
        tls_version: "" until the handshake is complete.
        resumed: an abbreviated handshake.
        server_name: what the client's SNI said, None without.
        client_serial: of the client's certificate.
        request: the header, None until it is complete.
        requested_at: when it was complete.
        after_handshake: bytes of plaintext received, header included.
        from_client: bytes the back end received.
        to_client: bytes of the back end that were sent.
        ended: "" while it lives; then "done", or what went wrong, in words.
        over: set once it has ended.
    """

    opened_at: float
    tls_version: str = ""
    resumed: bool = False
    server_name: str | None = None
    client_serial: int = 0
    request: BindingRequest | None = None
    requested_at: float = 0.0
    after_handshake: int = 0
    from_client: int = 0
    to_client: int = 0
    ended: str = ""
    over: trio.Event = field(default_factory=trio.Event)


class Ingress:
    """The ingress. `serve` may be called for any number of connections.

    Args:
        clients: who signs the certificates that clients must show.
        identity: what the ingress shows.
        wall: Unix seconds.
        simulated_time: `wall` is not the machine's clock.

    Attributes:
        routes: (host, port) to what is there.
        toxics: for every connection whose route has none of its own.
        script: toxics for the next connections, one each; they go before all others.
        rejected: serial numbers of client certificates that are not welcome any more.
        connections: oldest first, the last 20,000.
        connection_count: all there ever were.
        handshake_count: of them, those whose handshake was completed.
        resumption: False forgets every session at once: each handshake is a full one.
        patience_s: how long a connection may wait between the handshake and its header; then it is ended in good order.
    """

    def __init__(
        self, clients: Authority, identity: Identity, *, wall: Callable[[], float], simulated_time: bool = False
    ) -> None:
        self._clients = clients
        self._identity = identity
        self._wall = wall
        self._simulated_time = simulated_time
        self._versions = (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3)
        self._tickets = 2
        self.resumption = True
        self.patience_s = math.inf
        self._context: ssl.SSLContext | None = None
        self._server_names: WeakKeyDictionary[object, str | None] = WeakKeyDictionary()
        self.routes: dict[tuple[str, int], Route] = {}
        self.toxics = Toxics()
        self.script: deque[Toxics] = deque()
        self.rejected: set[int] = set()
        self.connections: deque[Connection] = deque(maxlen=_CONNECTIONS_KEPT)
        self.connection_count = 0
        self.handshake_count = 0
        self.after_handshake = 0
        self.down = False
        self._live: set[trio.CancelScope] = set()
        self._scratch = memoryview(bytearray(_SCRATCH))

    # -- what tests turn ---------------------------------------------------------------------------------------

    def set_identity(self, identity: Identity) -> None:
        """Show another certificate from the next connection on."""
        self._identity = identity
        self._context = None

    def set_tls(
        self,
        minimum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_2,
        maximum: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
        *,
        tickets: int = 2,
    ) -> None:
        """Choose the versions that are spoken, and how many TLS 1.3 tickets a client gets per handshake."""
        self._versions = (minimum, maximum)
        self._tickets = tickets
        self._context = None

    def add_route(self, host: str, port: int, backend: Backend, *, endpoint_id: str, proto: str) -> Route:
        """Put a back end behind a host and port."""
        route = Route(backend, endpoint_id, proto)
        self.routes[host.lower(), port] = route
        return route

    def set_down(self, down: bool) -> None:
        """Refuse new connections (`dialer`) or end them at once (`serve`); those that are open go on."""
        self.down = down

    def drop_connections(self) -> None:
        """Reset every connection there is."""
        for scope in self._live:
            scope.cancel()

    @property
    def live_count(self) -> int:
        """Connections that are open now, idle ones included."""
        return len(self._live)

    # -- serving -----------------------------------------------------------------------------------------------

    def dialer(
        self, nursery: trio.Nursery, *, capacity: int = 256 * 1024
    ) -> Callable[[str, int], Awaitable[Transport]]:
        """Make a `dial(address, port)` whose transports end here, in memory, served by tasks of `nursery`.

        It refuses with ConnectionRefusedError while the ingress is down.
        """

        async def dial(_address: str, _port: int) -> Transport:
            await trio.lowlevel.checkpoint()
            if self.down:
                raise ConnectionRefusedError("the lab's ingress is down")
            near, far = memory_transport_pair(capacity)
            nursery.start_soon(self.serve, far)
            return near

        return dial

    async def serve(self, transport: Transport) -> None:
        """Serve one connection until it ends, and close it. What clients do to it is no error."""
        record = Connection(trio.current_time())
        self.connections.append(record)
        self.connection_count += 1
        toxics = self.script.popleft() if self.script else None
        try:
            with trio.CancelScope() as scope:
                self._live.add(scope)
                if self.down:
                    scope.cancel()
                await self._serve(transport, record, toxics)
            if scope.cancelled_caught:
                record.ended = "dropped"
        except* _Ended as ends:
            record.ended = str(_first(ends))
        except* (StreamTruncated, OSError, trio.BrokenResourceError, trio.ClosedResourceError) as breaks:
            record.ended = str(_first(breaks)) or "broken"
        except* BadHeader as bad:
            record.ended = f"bad header: {_first(bad)}"
        finally:
            self._live.discard(scope)
            record.ended = record.ended or "cancelled"
            record.over.set()
            transport.abort()  # does nothing to what was closed in good order

    async def _serve(self, transport: Transport, record: Connection, scripted: Toxics | None) -> None:
        toxics = scripted or self.toxics
        async with trio.open_nursery() as line:
            if toxics.line != FAST:
                transport = shape(transport, toxics.line, line)
            try:
                await self._before_tls(transport, toxics)
                stream = await self._handshake(transport, record)
                try:
                    await self._after_tls(stream, record, scripted)
                finally:
                    self.after_handshake += record.after_handshake
            except BaseException:
                # Down here, so that with a slow line it is the server's end that is cut, and the cut travels.
                transport.abort()
                raise

    async def _before_tls(self, transport: Transport, toxics: Toxics) -> None:
        if toxics.accept == "serve":
            return
        if toxics.accept == "hang":
            await _swallow(transport)
        elif toxics.accept in ("alert", "garbage"):
            await transport.wait_readable()
            await _send(transport, _alert(toxics.alert) if toxics.accept == "alert" else b"HTTP/1.1 400 What?\r\n\r\n")
        if toxics.accept != "reset":
            await _cut(transport)
        raise _Ended(f"before TLS: {toxics.accept}")

    async def _handshake(self, transport: Transport, record: Connection) -> TlsStream:
        session = TlsSession(self._server_context(), server_side=True)
        stream = TlsStream(transport, session, scratch=self._scratch)
        try:
            await stream.handshake()
        except ssl.SSLError as error:
            with trio.move_on_after(1), suppress(StreamTruncated):
                await stream.drain()
            await _cut(transport)  # a reset could overtake the alert that says why
            raise _Ended(f"TLS handshake: {error.reason or error}") from error
        ssl_object = stream.ssl_object
        record.tls_version = ssl_object.version() or ""
        record.resumed = bool(ssl_object.session_reused)
        record.server_name = self._server_names.get(ssl_object)
        self.handshake_count += 1
        certificate = ssl_object.getpeercert() or {}
        record.client_serial = int(str(certificate.get("serialNumber", "0")), 16)
        if record.client_serial in self.rejected:
            await _cut(transport)
            raise _Ended("client certificate: rejected")
        if self._simulated_time:
            begin, end = (ssl.cert_time_to_seconds(str(certificate[name])) for name in ("notBefore", "notAfter"))
            if not begin <= self._wall() <= end:
                await _cut(transport)
                raise _Ended("client certificate: not valid now")
        return stream

    async def _after_tls(self, stream: TlsStream, record: Connection, scripted: Toxics | None) -> None:
        reader = RequestReader()
        while record.request is None:
            view = memoryview(b"")
            with trio.move_on_after(self.patience_s) as patience:
                view = await stream.receive_view()
            if not view:
                await stream.aclose()
                if patience.cancelled_caught:
                    raise _Ended("no header in time")
                raise _Ended("done")  # an idle connection was put away, or its client changed its mind
            record.after_handshake += len(view)
            record.request = reader.feed(view)
        record.requested_at = trio.current_time()
        request = record.request
        route = self.routes.get((request.host, request.port))
        toxics = scripted or (route.toxics if route is not None else None) or self.toxics
        served = _Served(stream, record, toxics)
        served.give_back(reader.surplus)
        await trio.sleep(toxics.delay_s)
        if toxics.answer != "serve":
            await self._answer_wrongly(served, toxics)
        if toxics.error_code or toxics.error_message:
            answer = BindingAnswer(error_code=toxics.error_code, error_message=toxics.error_message)
        elif route is None:
            answer = BindingAnswer(error_code=NO_SUCH_ENDPOINT, error_message=f"no such endpoint: {request.host}")
        else:
            answer = BindingAnswer(route.endpoint_id, route.proto)
        header = encode_answer(replace(answer, notices=toxics.notices))
        if route is None or answer.error_code or answer.error_message:
            await served.send_header(header, hold=False)
            await served.finish()
            raise _Ended(f"refused: {answer.error_code or answer.error_message}")
        await served.send_header(header, hold=toxics.coalesce)
        await route.backend.serve(served)
        await served.finish()
        record.ended = "done"

    async def _answer_wrongly(self, served: _Served, toxics: Toxics) -> NoReturn:
        what = toxics.answer
        if what == "hang":
            await served.swallow()
        elif what == "close":
            await served.finish()
        elif what == "cut":
            await _cut(served.stream.transport)
        elif what == "truncate":
            await served.send_header(encode_answer(BindingAnswer("ep_truncated", "http"))[:7], hold=False)
            await served.finish()
        elif what == "garbage":
            await served.send_header(frame(b"\xff" * 20), hold=False)
            await served.finish()
        elif what == "oversize":
            await served.send_header(frame(b"\x0a\xfc\xff\x03".ljust(MAX_BODY, b"x")), hold=False)
            await served.finish()
        raise _Ended(f"instead of the header: {what}")

    def _server_context(self) -> ssl.SSLContext:
        if self._context is not None and self.resumption:
            return self._context
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version, context.maximum_version = self._versions
        context.num_tickets = self._tickets
        context.verify_mode = ssl.CERT_REQUIRED
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        if self._simulated_time:
            context.verify_flags |= _NO_CHECK_TIME
        context.load_verify_locations(cadata=(self._clients.root_pem + self._clients.intermediate_pem).decode())
        context.sni_callback = self._note_server_name
        load_identity(context, self._identity)
        self._context = context
        return context

    def _note_server_name(self, ssl_object: object, name: str | None, _context: object) -> None:
        self._server_names[ssl_object] = name


class _Ended(Exception):  # noqa: N818 - how a connection came to its end
    """The connection is over, and this is how."""


class _Served(HalfCloseableStream):
    """What a back end speaks through: the TLS stream, counted, and spoiled as the toxics say."""

    def __init__(self, stream: TlsStream, record: Connection, toxics: Toxics) -> None:
        self.stream = stream
        self._record = record
        self._toxics = toxics
        self._left = toxics.after_bytes
        self._held = b""
        self._received_eof = False
        self._receiving = False
        self._sliced = False  # a slice was sent: the next one waits

    def give_back(self, surplus: bytes) -> None:
        if surplus:
            self.stream.unread(memoryview(surplus))
            self._record.after_handshake -= len(surplus)  # it is counted when it is received again

    async def send_header(self, header: bytes, *, hold: bool) -> None:
        if hold:
            self._held = header
        else:
            await self._send_sliced(memoryview(header), self._toxics.header_slice)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        if self._left is not None and len(view) >= self._left:
            await self._send(view[: self._left])
            await self._do_then()
        await self._send(view)
        if self._left is not None:
            self._left -= len(view)

    async def wait_send_all_might_not_block(self) -> None:
        await self.stream.wait_sendable()

    async def send_eof(self) -> None:
        if self._held:
            await self._send(memoryview(b""))
        try:
            await self.stream.send_eof()
        except StreamTruncated as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if self._held:  # a back end that waits for its client has no bytes to put behind the header
            await self._send(memoryview(b""))
        self._receiving = True
        try:
            view = await (self._receive_and_drain() if self.stream.backlog else self.stream.receive_view())
        except StreamTruncated as error:
            raise trio.BrokenResourceError(str(error)) from error
        finally:
            self._receiving = False
        if max_bytes is not None and len(view) > max_bytes:
            self.stream.unread(view[max_bytes:])
            view = view[:max_bytes]
        self._received_eof = not view
        self._record.after_handshake += len(view)
        self._record.from_client += len(view)
        return bytes(view)

    async def _receive_and_drain(self) -> memoryview:
        """Receive while what was sent last is still on its way: nobody else moves the backlog on."""
        view: memoryview | None = None
        failure: StreamTruncated | None = None

        async def drain() -> None:
            nonlocal failure
            try:
                await self.stream.drain()
            except StreamTruncated as error:
                failure = error
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drain)
            try:
                view = await self.stream.receive_view()
            except StreamTruncated as error:
                failure = error
            nursery.cancel_scope.cancel()
        if view is not None:
            return view
        assert failure is not None
        raise failure

    async def aclose(self) -> None:
        await self.finish()

    async def swallow(self) -> None:
        """Read to the client's end."""
        while await self.receive_some():
            pass

    async def finish(self) -> None:
        """End our side, wait a while for the client to end its own, close.

        Closing a socket with unread bytes resets it, and the reset could overtake our last bytes.
        """
        await self.send_eof()
        with trio.move_on_after(LINGER_S), suppress(trio.BrokenResourceError):
            while not self._received_eof:
                await self.receive_some()
        await self.stream.aclose()

    async def _send(self, view: memoryview) -> None:
        if self._held:
            held, self._held = self._held, b""
            await self._send_sliced(memoryview(held + bytes(view)), 0)
        else:
            await self._send_sliced(view, self._toxics.slice)
        self._record.to_client += len(view)

    async def _send_sliced(self, view: memoryview, size: int) -> None:
        if size == 0:
            await self._send_whole(view)
            return
        for start in range(0, len(view), size):
            if self._sliced:
                with trio.move_on_after(self._toxics.drip_s):
                    await self._drain()
                    await trio.sleep_forever()
            self._sliced = True
            await self._send_whole(view[start : start + size])

    async def _send_whole(self, view: memoryview) -> None:
        stream = self.stream
        try:
            await stream.wait_sendable()
            while view:
                view = view[stream.send_nowait([view]) :]
                await stream.wait_sendable()
            if self._receiving:  # the task that receives does not see what this one leaves behind
                await stream.drain()
        except StreamTruncated as error:
            raise trio.BrokenResourceError(str(error)) from error
        await trio.lowlevel.checkpoint()

    async def _drain(self) -> None:
        try:
            await self.stream.drain()
        except StreamTruncated as error:
            raise trio.BrokenResourceError(str(error)) from error

    async def _do_then(self) -> NoReturn:
        then = self._toxics.then
        await self._drain()  # what was sent shall be on its way before the end
        if then == "hang":
            await self.swallow()
        elif then == "close":
            await self.finish()
        elif then in ("cut", "alert"):
            if then == "alert":
                await _send(self.stream.transport, _alert(self._toxics.alert))
            await _cut(self.stream.transport)
        raise _Ended(f"after {self._toxics.after_bytes} bytes: {then}")


def _alert(number: int) -> bytes:
    """A fatal alert in the clear, as a server sends it that does not get as far as keys."""
    return bytes([21, 3, 3, 0, 2, 2, number])


async def _send(transport: Transport, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[transport.send_nowait(view) :]
        if view:
            await transport.wait_writable()


async def _swallow(transport: Transport) -> None:
    """Read raw bytes to the client's end."""
    buffer = bytearray(65536)
    while True:
        await transport.wait_readable()
        if transport.receive_into_nowait(buffer) == 0:
            return


async def _cut(transport: Transport) -> None:
    """End the TCP connection in good order, the TLS stream in none: a FIN, and no close_notify before it."""
    with suppress(OSError):
        transport.shutdown_write()
        with trio.move_on_after(LINGER_S):
            await _swallow(transport)
    transport.close()


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
