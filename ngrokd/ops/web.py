"""Health checks over HTTP, as the Go daemon answers them, so that probes and dashboards need no change.

    GET /health  /healthz   200 "healthy"  while packets are carried, else 503 "unhealthy"
    GET /ready   /readyz    200 "ready"    when all conditions hold, else 503 "not ready"
    GET /status             200, JSON: the Go daemon's fields, and each condition
    GET /metrics            200, for Prometheus

Unlike the Go daemon, one whose account has no bound endpoint is healthy: it does what it can do, and a container killed
for having nothing to do comes back with nothing to do. Ready means that connections are likely to work: device,
routes and names stand, and a handshake with the ingress was verified.

Nothing here changes anything, but names and addresses are nobody's business: a page in a browser on this machine could
ask us under a name of its own that resolves to 127.0.0.1 (DNS rebinding). Such a request carries that name in its Host
header and is answered 421. An IP address cannot be rebound, so where we listen on all addresses any of them will do.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Final, Self, TypeAlias

import trio

from ngrokd import http1
from ngrokd.config import split_address
from ngrokd.errors import Exit, NgrokdError, PermissionMissingError, TakenError
from ngrokd.metrics import CONTENT_TYPE, Counters
from ngrokd.ops.accepting import accept
from ngrokd.ops.answers import Members, json_pieces
from ngrokd.ops.peers import port_owner

log = logging.getLogger(__name__)

CONNECTIONS: Final = 64
BACKLOG: Final = 128
LIMITS: Final = http1.ServerLimits(header_bytes=16 << 10, body_bytes=4096, idle_s=15.0, read_s=5.0, write_s=15.0)
NEVER: Final = "0001-01-01T00:00:00Z"  # the zero time of Go


class ListenError(NgrokdError):
    """The address for health checks cannot be listened on."""

    exit_code: ClassVar[Exit] = Exit.CANNOT_CREATE


@dataclass(frozen=True, slots=True)
class Condition:
    """One thing that must be so for the daemon to be ready.

    Attributes:
        name: one word.
        holds: it is so.
        message: why not, or what is awaited; "" when it holds.
        vital: without it the daemon is not even healthy.
    """

    name: str
    holds: bool
    message: str = ""
    vital: bool = False


@dataclass(frozen=True, slots=True)
class Health:
    """How the daemon is.

    Attributes:
        conditions: of readiness.
        started_at: wall clock, seconds since 1970.
        uptime_s: seconds since then.
    """

    conditions: tuple[Condition, ...]
    started_at: float
    uptime_s: float

    @property
    def ready(self) -> bool:
        """Every condition holds."""
        return all(each.holds for each in self.conditions)

    @property
    def healthy(self) -> bool:
        """Every vital condition holds."""
        return all(each.holds for each in self.conditions if each.vital)


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """One endpoint in `/status`.

    Attributes:
        name: its host name.
        local_address: "10.107.0.2:80".
        target_uri: its URL.
        active: it is served.
        connections: flows now.
        total_connections: flows since the start.
        last_activity: wall clock, seconds since 1970; None: never.
        errors: flows that failed.
    """

    name: str
    local_address: str
    target_uri: str
    active: bool = True
    connections: int = 0
    total_connections: int = 0
    last_activity: float | None = None
    errors: int = 0


Endpoints: TypeAlias = Iterable[tuple[str, EndpointHealth]]


def format_go_duration(seconds: float) -> str:
    """As Go prints a time.Duration of whole seconds: "2h15m30s", "1m0s", "0s"."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minute}m{second}s"
    return f"{minute}m{second}s" if minute else f"{second}s"


def format_time(wall: float | None) -> str:
    """RFC 3339 in UTC, whole seconds; None is Go's zero time."""
    return NEVER if wall is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(wall))


def status_document(health: Health, endpoints: Endpoints) -> dict[str, object]:
    """What `/status` and the control command `health` answer, for `answers.json_pieces` to encode.

    Args:
        health: how we are.
        endpoints: with their ids. Of those with one id the first is shown.
    """
    return {
        "healthy": health.healthy,
        "ready": health.ready,
        "uptime": format_go_duration(health.uptime_s),
        "endpoints": Members(_endpoint_members(endpoints)),
        "start_time": format_time(health.started_at),
        "conditions": {each.name: {"ok": each.holds, "message": each.message} for each in health.conditions},
    }


def _endpoint_members(endpoints: Endpoints) -> Iterator[tuple[str, object]]:
    shown: set[str] = set()
    for identifier, endpoint in endpoints:
        if identifier in shown:
            continue
        shown.add(identifier)
        yield (
            identifier,
            {
                "name": endpoint.name,
                "local_address": endpoint.local_address,
                "target_uri": endpoint.target_uri,
                "active": endpoint.active,
                "connections": endpoint.connections,
                "total_connections": endpoint.total_connections,
                "last_activity": format_time(endpoint.last_activity),
                "errors": endpoint.errors,
            },
        )


def host_allowed(header: str | None, listen_host: str) -> bool:
    """Whether a request with this Host header is meant for us.

    Only HTTP/1.0 clients send none, and browsers are not among them.
    """
    if header is None:
        return True
    try:
        host, _ = split_address(header.strip(), 80, zero=True)
    except ValueError:
        return False
    host = host.removesuffix(".")
    if host in ("localhost", listen_host) or host.endswith(".localhost"):  # RFC 6761 6.3
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or _is_unspecified(listen_host)


def _is_unspecified(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False


class WebServer:
    """Answers health checks.

    Args:
        listen_host: the host part of `http.listen`.
        health: how we are; cheap, it is asked by every probe.
        endpoints: all of them with their ids, best one by one; asked only for `/status`.
        metrics: the page for Prometheus.
        strict: let a bug in those rise instead of ending only its connection: for tests.
    """

    def __init__(
        self,
        listen_host: str,
        health: Callable[[], Health],
        endpoints: Callable[[], Endpoints],
        metrics: Callable[[], Awaitable[str]],
        *,
        strict: bool = False,
    ) -> None:
        self._listen_host = listen_host
        self._health = health
        self._endpoints = endpoints
        self._metrics = metrics
        self._strict = strict
        self._connections = 0
        self.counters = Counters(("requests", "misdirected", "turned_away"))
        routes = {"/health": self._healthy, "/healthz": self._healthy, "/ready": self._ready, "/readyz": self._ready}
        self._routes = http1.Routes(
            {
                path: {"GET": handler}
                for path, handler in (routes | {"/status": self._status, "/metrics": self._page}).items()
            }
        )

    async def serve(
        self, listener: HttpListener, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Accept clients for ever. Cancelled, it closes their connections; the listener stays the caller's."""
        async with trio.open_nursery() as clients:  # a client's error is handled within its task
            task_status.started()
            while True:
                connection = await accept(listener.socket, "health checks")
                if self._connections >= CONNECTIONS:
                    self.counters.add("turned_away")
                    connection.close()
                else:
                    self._connections += 1
                    clients.start_soon(self._serve_client, trio.SocketStream(connection))

    async def _serve_client(self, stream: trio.abc.Stream) -> None:
        try:
            await self.serve_stream(stream)
        finally:
            self._connections -= 1

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Answer one client until it leaves."""
        try:
            await http1.serve_connection(stream, self.handle, LIMITS)
        except Exception:
            if self._strict:
                raise
            log.exception("health checks: an answer failed")

    async def handle(self, request: http1.Request) -> http1.Response:
        """Answer one request."""
        self.counters.add("requests")
        if not host_allowed(request.header("host"), self._listen_host):
            self.counters.add("misdirected")
            return http1.Response.text(421, "misdirected request: ask for localhost\n")
        return await self._routes(request)

    async def _healthy(self, _request: http1.Request) -> http1.Response:
        healthy = self._health().healthy
        return http1.Response.text(200 if healthy else 503, "healthy\n" if healthy else "unhealthy\n")

    async def _ready(self, _request: http1.Request) -> http1.Response:
        ready = self._health().ready
        return http1.Response.text(200 if ready else 503, "ready\n" if ready else "not ready\n")

    async def _status(self, _request: http1.Request) -> http1.Response:
        body = bytearray()
        for piece in json_pieces(status_document(self._health(), self._endpoints())):
            body += piece
            await trio.lowlevel.checkpoint()
        return http1.Response(200, (("content-type", "application/json"),), bytes(body))

    async def _page(self, _request: http1.Request) -> http1.Response:
        return http1.Response(200, (("content-type", CONTENT_TYPE),), (await self._metrics()).encode())


class HttpListener:
    """A listening TCP socket. A context manager.

    Args:
        listen: `http.listen`: HOST:PORT, not "".

    Attributes:
        host: the host part as configured.
        port: the port; the one that was free where 0 was asked for.
        socket: accepts clients.

    Raises (at construction):
        TakenError: somebody listens there, who is named.
        ListenError, PermissionMissingError: it cannot be listened on.
    """

    def __init__(self, listen: str) -> None:
        self.host, port = split_address(listen, None, zero=True)
        address = "127.0.0.1" if self.host == "localhost" else self.host
        listener = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            listener.setblocking(False)
            # Connections of a former run in TIME-WAIT must not keep the port; a living listener still does.
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
            listener.listen(BACKLOG)
        except OSError as error:
            listener.close()
            raise _listen_error(listen, port, error) from error
        self.port: int = listener.getsockname()[1]
        self.socket = trio.socket.from_stdlib_socket(listener)

    def close(self) -> None:
        """Stop listening."""
        with suppress(OSError):
            self.socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _listen_error(listen: str, port: int, error: OSError) -> NgrokdError:
    remedy = 'set http.listen to another address, or to "" for none'
    if error.errno == errno.EADDRINUSE:
        return TakenError(
            f"the address for health checks, {listen}, belongs to {port_owner(port) or 'another process'}",
            remedy=f"stop it, or {remedy}",
        )
    if isinstance(error, PermissionError):
        return PermissionMissingError(f"no permission to listen on {listen} for health checks", remedy=remedy)
    return ListenError(f"cannot listen on {listen} for health checks: {error.strerror or error}", remedy=remedy)
