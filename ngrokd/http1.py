"""HTTP/1.1 over any Trio stream: a client and a small server. h11 knows the protocol, we know when to stop.

Both sides of the daemon need it: the client asks ngrok's API, the server answers health checks and metrics (and plays
the API in the lab). What they share is distrust. Every size is bounded, on both sides and before memory is spent; a
message that ends early is an error and never a shorter message; nothing is followed, decompressed or guessed.

What this module leaves to others, on purpose:

* The client has no clock. Its caller puts one deadline around connect, handshake, request and body together, because a
  peer that dribbles one byte a second satisfies any timeout that starts anew with each byte.
* TLS is a stream handed in. A body that is delimited only by the end of the connection can be cut by anybody who can
  close it, so callers parse formats that show their own end (JSON does).
* Redirects are answers like any other: whoever sends a key decides where it goes.

The server reads one request whole, calls the handler, and writes the answer whole. A client that vanishes is ordinary.
A handler that raises is a bug: its client gets 500, and the exception goes on to whoever started the connection.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import ClassVar, Final

import h11
import msgspec
import trio

from ngrokd.errors import Exit, NgrokdError

HEADER_LIMIT: Final = 32 * 1024  # bytes of one message's start line and headers, both directions
BODY_LIMIT: Final = 1024 * 1024  # bytes; callers that expect more say so
RECEIVE_BYTES: Final = 64 * 1024
INFORMATIONAL_LIMIT: Final = 16  # 1xx answers before the real one; RFC 9110 15.2 allows any number

Headers = tuple[tuple[str, str], ...]


class HttpError(NgrokdError):
    """The exchange failed below the level of an HTTP status.

    The message is printable and never holds a header or body of ours.

    Attributes:
        reason: a stable word: "connection", "closed", "truncated", "protocol", "headers_too_large", "body_too_large",
            "encoding", "request".
        unanswered: not one byte of an answer was received, so on a reused connection the peer may simply have closed
            it before it saw the request.
    """

    exit_code: ClassVar[Exit] = Exit.UNREACHABLE

    def __init__(self, message: str, *, reason: str, unanswered: bool = False, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.reason = reason
        self.unanswered = unanswered


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked.

    Attributes:
        method: as sent; methods are case-sensitive.
        target: as sent, with its query.
        headers: names in lower case, values as latin-1 text, in the order of arrival.
    """

    method: str
    target: str
    headers: Headers = ()
    body: bytes = field(default=b"", repr=False)

    @property
    def path(self) -> str:
        """The path alone; a target in absolute form loses its scheme and authority (RFC 9112 3.2.2)."""
        target = self.target.partition("?")[0]
        if not target.startswith("/") and "://" in target:
            target = "/" + target.partition("://")[2].partition("/")[2]
        return target

    @property
    def query(self) -> str:
        """What follows the first question mark, undecoded; "" when there is none."""
        return self.target.partition("?")[2]

    def header(self, name: str) -> str | None:
        """The first header of this name, whatever its case."""
        return _first(self.headers, name)


@dataclass(frozen=True, slots=True)
class Response:
    """An answer. A server adds Content-Length and, where it closes, Connection; the handler adds the rest."""

    status: int
    headers: Headers = ()
    body: bytes = field(default=b"", repr=False)

    def header(self, name: str) -> str | None:
        """The first header of this name, whatever its case."""
        return _first(self.headers, name)

    @classmethod
    def text(cls, status: int, text: str, *headers: tuple[str, str]) -> Response:
        """A plain text answer."""
        return cls(status, (("content-type", "text/plain; charset=utf-8"), *headers), text.encode())

    @classmethod
    def json(cls, status: int, value: object, *headers: tuple[str, str]) -> Response:
        """A JSON answer, of anything msgspec can encode."""
        return cls(status, (("content-type", "application/json"), *headers), msgspec.json.encode(value))


class HttpConnection:
    """One client connection: requests go out one after another, each waits for its answer.

    Args:
        stream: connected; TLS is the stream's affair. It belongs to this object from now on.
        host: the Host header, with the port where it is not the scheme's own.
        header_limit: bytes of one answer's start line and headers.
    """

    def __init__(self, stream: trio.abc.Stream, host: str, *, header_limit: int = HEADER_LIMIT) -> None:
        self._stream = stream
        self._host = host
        self._header_limit = header_limit
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=header_limit)
        self._reusable = True

    @property
    def reusable(self) -> bool:
        """Another request may be sent: the last exchange was complete and the peer keeps the connection open."""
        return self._reusable

    async def request(
        self,
        method: str,
        target: str,
        headers: Iterable[tuple[str, str]] = (),
        body: bytes = b"",
        *,
        body_limit: int = BODY_LIMIT,
    ) -> Response:
        """Send one request and read its answer whole, whatever its status.

        Set a deadline around it. Cancelled, the request may or may not have been carried out by the peer, and the
        connection cannot be used again.

        Args:
            target: path and query, in ASCII, already quoted.
            headers: besides Host and Content-Length, which are added. Secrets in them never reach an error.
            body_limit: bytes of the answer's body; one more is an error, and no more than that is ever kept.

        Raises:
            HttpError: everything that goes wrong.
        """
        if not self._reusable:
            raise HttpError("this connection cannot carry another request", reason="closed", unanswered=True)
        data = self._encode(method, target, headers, body)
        self._reusable = False
        broken = ""
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            broken = _why(error)  # the answer may be there all the same: a server that refuses closes its side early
        try:
            response = await self._read_response(body_limit)
        except HttpError as error:
            if broken and error.reason in ("connection", "closed"):
                raise HttpError(
                    f"the connection broke while the request was sent ({broken})", reason="connection", unanswered=True
                ) from error
            raise
        self._prepare_next()
        return response

    async def aclose(self) -> None:
        """Close, politely where the last exchange was complete."""
        if self._reusable:
            self._reusable = False
            with suppress(trio.BrokenResourceError):
                await self._stream.aclose()
        else:
            await trio.aclose_forcefully(self._stream)

    def _encode(self, method: str, target: str, headers: Iterable[tuple[str, str]], body: bytes) -> bytes:
        lines: list[tuple[str, str]] = [("host", self._host), *headers]
        if body or method in ("POST", "PUT", "PATCH"):
            lines.append(("content-length", str(len(body))))
        try:
            request = h11.Request(method=method, target=target, headers=[_encode_header(*line) for line in lines])
            parts = [self._h11.send(request)]
            if body:
                parts.append(self._h11.send(h11.Data(data=body)))
            parts.append(self._h11.send(h11.EndOfMessage()))
        except (h11.LocalProtocolError, UnicodeEncodeError):
            # h11 quotes the offending value, and that may be a key: neither its text nor the chain goes on.
            self._reusable = False
            raise HttpError("the request holds characters that HTTP cannot carry", reason="request") from None
        return b"".join(parts)

    async def _read_response(self, body_limit: int) -> Response:
        head: h11.Response | None = None
        informational = 0
        body = bytearray()
        while True:
            event = await self._next_event(answered=head is not None)
            if isinstance(event, h11.InformationalResponse):
                informational += 1
                if informational > INFORMATIONAL_LIMIT:
                    raise HttpError("the peer sends interim answers without end", reason="protocol")
            elif isinstance(event, h11.Response):
                head = event
                self._check_head(head, body_limit)
            elif isinstance(event, h11.Data):
                if len(body) + len(event.data) > body_limit:
                    raise _too_large(body_limit)
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert head is not None
                return Response(head.status_code, _decode_headers(head.headers), bytes(body))
            else:  # PAUSED: a switch of protocols that nobody asked for
                raise HttpError("the peer wants to speak something else than HTTP", reason="protocol")

    async def _next_event(self, *, answered: bool) -> object:
        while True:
            try:
                event = self._h11.next_event()
            except h11.RemoteProtocolError as error:
                raise self._protocol_error(error, answered=answered) from error
            if event is not h11.NEED_DATA:
                return event
            try:
                data = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
                started = answered or bool(self._h11.trailing_data[0])
                raise HttpError(
                    f"the connection broke before the answer was complete ({_why(error)})",
                    reason="connection",
                    unanswered=not started,
                ) from error
            self._h11.receive_data(bytes(data))

    def _protocol_error(self, error: h11.RemoteProtocolError, *, answered: bool) -> HttpError:
        unread, closed = self._h11.trailing_data
        if closed:
            if answered or unread:
                return HttpError("the connection ended in the middle of the answer", reason="truncated")
            return HttpError("the peer closed the connection without an answer", reason="closed", unanswered=True)
        if error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            return _headers_too_large(self._header_limit)
        return HttpError(f"the answer is not HTTP: {_shown(str(error))}", reason="protocol")

    def _check_head(self, head: h11.Response, body_limit: int) -> None:
        # h11 applies its limit to incomplete headers only: those that arrive in one piece are measured here.
        if sum(len(name) + len(value) + 4 for name, value in head.headers) > self._header_limit:
            raise _headers_too_large(self._header_limit)
        for name, value in head.headers:
            if name == b"content-length" and int(value) > body_limit:  # h11 has checked that it is digits, 20 at most
                raise _too_large(body_limit)
            if name == b"content-encoding" and value.strip().lower() not in (b"", b"identity"):
                raise HttpError("the answer is compressed, which was not asked for", reason="encoding")

    def _prepare_next(self) -> None:
        # Bytes after the answer belong to no request of ours: such a connection is not used again.
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            self._reusable = self._h11.trailing_data == (b"", False)


async def request(
    stream: trio.abc.Stream,
    host: str,
    method: str,
    target: str,
    headers: Iterable[tuple[str, str]] = (),
    body: bytes = b"",
    *,
    body_limit: int = BODY_LIMIT,
) -> Response:
    """One request on a stream of its own; the stream stays open and is the caller's to close.

    Like `HttpConnection.request`, with Connection: close.
    """
    connection = HttpConnection(stream, host)
    return await connection.request(method, target, (*headers, ("connection", "close")), body, body_limit=body_limit)


Handler = Callable[[Request], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What a client may cost.

    Attributes:
        header_bytes: start line and headers of one request.
        body_bytes: body of one request.
        idle_s: from one answer to the first byte of the next request, TLS handshake included for the first.
        read_s: from the first byte of a request to its last.
        write_s: to take an answer.
    """

    header_bytes: int = HEADER_LIMIT
    body_bytes: int = BODY_LIMIT
    idle_s: float = 60.0
    read_s: float = 10.0
    write_s: float = 30.0


DEFAULT_LIMITS: Final = ServerLimits()
_CLOSING_S: Final = 1.0  # for the client to take our last answer
_CLOSING_BYTES: Final = 256 * 1024


async def serve_connection(stream: trio.abc.Stream, handler: Handler, limits: ServerLimits = DEFAULT_LIMITS) -> None:
    """Answer requests on this stream until either side has enough, then close it.

    Malformed, oversized and slow requests are answered (400, 413, 431, 408) and end the connection. A client that
    vanishes ends it silently, at the latest when the answer is written: a handler that runs is not interrupted.
    Cancelled, the connection is closed at once.

    Raises:
        Exception: whatever the handler raised, after its client was told 500.
    """
    connection = _ServerConnection(stream, handler, limits)
    try:
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while await connection.serve_one():
                pass
    finally:
        with suppress(trio.BrokenResourceError), trio.move_on_after(_CLOSING_S):
            await stream.aclose()


class Routes:
    """A handler that finds handlers: exact path, then method. Unknown paths are 404, unknown methods 405 with Allow.

    HEAD is answered by GET's handler; the server leaves the body out.
    """

    def __init__(self, routes: Mapping[str, Mapping[str, Handler]]) -> None:
        self._routes = {path: dict(methods) for path, methods in routes.items()}
        for methods in self._routes.values():
            if "GET" in methods:
                methods.setdefault("HEAD", methods["GET"])

    async def __call__(self, request: Request) -> Response:
        """Answer one request."""
        methods = self._routes.get(request.path)
        if methods is None:
            return Response.text(404, "not found\n")
        handler = methods.get(request.method)
        if handler is None:
            return Response.text(405, "method not allowed\n", ("allow", ", ".join(sorted(methods))))
        return await handler(request)


class _Refused(Exception):  # noqa: N818 - an answer, not an accident
    """The request is answered here, and the connection ends."""

    def __init__(self, status: HTTPStatus) -> None:
        self.status = status


class _ServerConnection:
    """One client of the server. Invariant: an answer is written only to a request that was read, whole or refused."""

    def __init__(self, stream: trio.abc.Stream, handler: Handler, limits: ServerLimits) -> None:
        self._stream = stream
        self._handler = handler
        self._limits = limits
        self._h11 = h11.Connection(h11.SERVER, max_incomplete_event_size=limits.header_bytes)
        self._asked_for_head = False

    async def serve_one(self) -> bool:
        """Read a request, answer it. Returns whether the connection can carry another."""
        request: Request | None = None
        self._asked_for_head = False
        try:
            with trio.CancelScope(deadline=trio.current_time() + self._limits.idle_s) as scope:
                head = await self._read_head(scope)
                if head is not None:
                    request = await self._read_body(head)
            started = self._h11.their_state is not h11.IDLE or bool(self._h11.trailing_data[0])
            if scope.cancelled_caught and started:
                raise _Refused(HTTPStatus.REQUEST_TIMEOUT)
        except _Refused as refused:
            await self._refuse(refused.status)
            return False
        return request is not None and await self._answer(request)

    async def _read_head(self, scope: trio.CancelScope) -> h11.Request | None:
        started = False
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                if not started and self._h11.trailing_data[0]:
                    started = True
                    scope.deadline = trio.current_time() + self._limits.read_s
                self._h11.receive_data(bytes(await self._stream.receive_some(RECEIVE_BYTES)))
                continue
            if not isinstance(event, h11.Request):
                return None  # ConnectionClosed between requests
            self._asked_for_head = event.method == b"HEAD"
            if not started:
                scope.deadline = trio.current_time() + self._limits.read_s
            if sum(len(name) + len(value) + 4 for name, value in event.headers) + len(event.target) > (
                self._limits.header_bytes
            ):
                raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            if event.http_version not in (b"1.0", b"1.1"):
                raise _Refused(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED)
            if event.method == b"CONNECT":
                raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED)  # and a 2xx would turn the connection into a tunnel
            return event

    async def _read_body(self, head: h11.Request) -> Request:
        for name, value in head.headers:
            if name == b"content-length" and int(value) > self._limits.body_bytes:
                raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
        if self._h11.they_are_waiting_for_100_continue:
            go_on = self._h11.send(h11.InformationalResponse(status_code=100, headers=[]))
            await self._stream.send_all(go_on)
        body = bytearray()
        while True:
            event = self._next_event()
            if event is h11.NEED_DATA:
                self._h11.receive_data(bytes(await self._stream.receive_some(RECEIVE_BYTES)))
            elif isinstance(event, h11.Data):
                if len(body) + len(event.data) > self._limits.body_bytes:
                    raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
                body += event.data
            else:
                assert isinstance(event, h11.EndOfMessage)
                return Request(
                    head.method.decode("ascii"),
                    head.target.decode("latin-1"),
                    _decode_headers(head.headers),
                    bytes(body),
                )

    def _next_event(self) -> object:
        try:
            return self._h11.next_event()
        except h11.RemoteProtocolError as error:
            if self._h11.trailing_data[1]:  # the client closed in the middle of its request
                raise trio.BrokenResourceError from error
            known = error.error_status_hint == HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if known else HTTPStatus.BAD_REQUEST
            raise _Refused(status) from error

    async def _answer(self, request: Request) -> bool:
        try:
            response = await self._handler(request)
        except Exception:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):  # they must not hide the bug
                sorry = _plain(HTTPStatus.INTERNAL_SERVER_ERROR)
                await self._write(sorry, close=True)
            raise
        if not await self._write(response, close=False):
            return False
        if self._h11.our_state is h11.DONE and self._h11.their_state is h11.DONE:
            self._h11.start_next_cycle()
            return True
        return False

    async def _refuse(self, status: HTTPStatus) -> None:
        if self._h11.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        if not await self._write(_plain(status), close=True):
            return
        # Closing a socket with unread bytes resets it, and the reset may overtake our answer: read on for a moment.
        received = 0
        with trio.move_on_after(_CLOSING_S):
            if isinstance(self._stream, trio.abc.HalfCloseableStream):
                await self._stream.send_eof()
            while received < _CLOSING_BYTES:
                data = await self._stream.receive_some(RECEIVE_BYTES)
                if not data:
                    return
                received += len(data)

    async def _write(self, response: Response, *, close: bool) -> bool:
        """Returns whether the answer was taken in time."""
        assert response.status >= HTTPStatus.OK, "interim answers are not the handler's"
        bodiless = response.status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED)
        headers = [_encode_header(name, value) for name, value in response.headers]
        if not bodiless:
            headers.append((b"content-length", b"%d" % len(response.body)))
        if close:
            headers.append((b"connection", b"close"))
        reason = _REASONS.get(response.status, b"")
        parts = [self._h11.send(h11.Response(status_code=response.status, headers=headers, reason=reason))]
        if response.body and not bodiless and not self._asked_for_head:
            parts.append(self._h11.send(h11.Data(data=response.body)))
        parts.append(self._h11.send(h11.EndOfMessage()))
        with trio.move_on_after(self._limits.write_s) as scope:
            await self._stream.send_all(b"".join(parts))
        return not scope.cancelled_caught


_REASONS: Final = {status.value: status.phrase.encode() for status in HTTPStatus}


def retry_after_s(value: str | None, wall_now: float) -> float | None:
    """What a Retry-After header asks for, in seconds from now; None when it is absent or makes no sense.

    Both forms of RFC 9110 10.2.3: seconds, and a date, which is compared with `wall_now` (Unix seconds). A date that
    has passed is 0. Nothing is clamped here.
    """
    if value is None:
        return None
    value = value.strip()
    if value.isascii() and value.isdigit():
        return float(value[:12])  # 12 digits are thirty thousand years
    from datetime import UTC
    from email.utils import parsedate_to_datetime  # 10 ms of imports for a header that is rare

    try:
        date = parsedate_to_datetime(value)
        # The asctime form names no zone, and HTTP knows only one.
        seconds = (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, OverflowError):
        return None
    return max(0.0, seconds - wall_now) if math.isfinite(seconds) else None


def _plain(status: HTTPStatus) -> Response:
    return Response.text(status.value, f"{status.phrase.lower()}\n")


def _first(headers: Headers, name: str) -> str | None:
    name = name.lower()
    return next((value for key, value in headers if key.lower() == name), None)


def _encode_header(name: str, value: str) -> tuple[bytes, bytes]:
    return name.encode("ascii"), value.encode("latin-1")


def _decode_headers(headers: Iterable[tuple[bytes, bytes]]) -> Headers:
    return tuple((name.decode("latin-1"), value.decode("latin-1")) for name, value in headers)


def _too_large(limit: int) -> HttpError:
    return HttpError(f"the answer is larger than {limit} bytes", reason="body_too_large")


def _headers_too_large(limit: int) -> HttpError:
    return HttpError(f"the headers of the answer are larger than {limit} bytes", reason="headers_too_large")


def _why(error: BaseException) -> str:
    """The innermost reason of a broken stream: Trio wraps what OpenSSL or the kernel said."""
    while error.__cause__ is not None:
        error = error.__cause__
    return _shown(str(error)) or type(error).__name__


def _shown(text: str, limit: int = 120) -> str:
    """Text from outside, fit for a terminal."""
    return "".join(char if char.isprintable() else "?" for char in text[:limit])
