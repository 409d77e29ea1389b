"""What stands behind the endpoints: small servers whose every byte can be checked.

Each is a class with `async serve(stream)` over a `trio.abc.HalfCloseableStream`; the caller closes the stream. They
follow the plain rules of TCP servers: an end of the client's bytes is `b""`, a broken stream raises
`trio.BrokenResourceError` and means a reset. What they saw is kept in `tallies`, newest last, so that a test can ask
how many bytes really arrived and how the stream ended.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Protocol
from urllib.parse import urlsplit

import h11
import trio
from trio.abc import HalfCloseableStream

CHUNK: Final = 256 * 1024
GREETING: Final = b"Hello from the lab.\n"
BANNER: Final = b"220 lab.demo speaks first\r\n"

# A prime length: a chunk that is lost, doubled or swapped anywhere moves the pattern, whatever its size.
_PATTERN: Final = random.Random(20240917).randbytes(1_048_573)
_TALLIES_KEPT: Final = 1000
_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)  # SO_LINGER of no time: the other side sees a RST


class Backend(Protocol):
    """A server behind an endpoint. `serve` returns when the exchange is over and raises nothing but trio's own."""

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Speak with one client until it, or the server, is done."""


@dataclass(frozen=True, slots=True)
class Tally:
    """What one connection brought. `ended` is "eof" (a clean end) or "reset"."""

    length: int
    sha256: str
    ended: str


def sample(length: int) -> Iterator[memoryview]:
    """The deterministic stream of `length` bytes, in pieces of up to CHUNK bytes."""
    view = memoryview(_PATTERN)
    at = 0
    while length > 0:
        piece = view[at : at + min(CHUNK, length)]
        yield piece
        at = (at + len(piece)) % len(view)
        length -= len(piece)


@lru_cache(maxsize=64)
def sample_sha256(length: int) -> str:
    """SHA-256 of `sample(length)`, hex."""
    digest = hashlib.sha256()
    for piece in sample(length):
        digest.update(piece)
    return digest.hexdigest()


class _Tallied:
    """Keeps the tallies of the servers that count."""

    def __init__(self) -> None:
        self.tallies: deque[Tally] = deque(maxlen=_TALLIES_KEPT)
        self._changed = trio.Event()

    async def wait_tallies(self, count: int) -> list[Tally]:
        """Wait until at least `count` connections have ended; cancelling loses nothing."""
        while len(self.tallies) < count:
            await self._changed.wait()
        return list(self.tallies)

    async def _collect(self, stream: HalfCloseableStream, pause: Callable[[int], float] | None = None) -> Tally:
        digest, length, ended = hashlib.sha256(), 0, "eof"
        try:
            while data := await stream.receive_some():
                digest.update(data)
                length += len(data)
                if pause is not None:
                    await trio.sleep(pause(len(data)))
        except trio.BrokenResourceError:
            ended = "reset"
        tally = Tally(length, digest.hexdigest(), ended)
        self.tallies.append(tally)
        self._changed.set()
        self._changed = trio.Event()
        return tally


class Echo:
    """Sends back what it gets, as it gets it, also after the client's half-close; then ends its own side."""

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Echo until the client's end."""
        while data := await stream.receive_some():
            await stream.send_all(data)
        await stream.send_eof()


class SpeaksFirst:
    """Greets before the client has said a word, as SMTP, SSH and MySQL do; then echoes."""

    def __init__(self, banner: bytes = BANNER) -> None:
        self.banner = banner

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Greet, then echo."""
        await stream.send_all(self.banner)
        await Echo().serve(stream)


class AnswersAfterEof(_Tallied):
    """Says nothing until the client has ended its side; then `SHA256 LENGTH\\n`, and its own end."""

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Collect, then answer."""
        tally = await self._collect(stream)
        if tally.ended == "eof":
            await stream.send_all(f"{tally.sha256} {tally.length}\n".encode())
            await stream.send_eof()


class ClosesFirst(_Tallied):
    """Sends a few bytes and ends its side at once; then counts what the client still sends (see `tallies`)."""

    def __init__(self, greeting: bytes = b"that is all from me\n") -> None:
        super().__init__()
        self.greeting = greeting

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Send, end, count."""
        await stream.send_all(self.greeting)
        await stream.send_eof()
        await self._collect(stream)


class Sink:
    """Takes everything as fast as it can, without hashing; at the end answers `LENGTH\\n`."""

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Swallow, then say how much it was."""
        length = 0
        while data := await stream.receive_some():
            length += len(data)
        await stream.send_all(b"%d\n" % length)
        await stream.send_eof()


class Discard(_Tallied):
    """Takes everything and never answers (RFC 863); what it took is in `tallies`."""

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Swallow."""
        await self._collect(stream)


class SlowReader(_Tallied):
    """Reads at a given rate and never answers: its client must feel the brake.

    Args:
        rate: bytes a second.
    """

    def __init__(self, rate: int) -> None:
        super().__init__()
        self.rate = rate

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Swallow slowly."""
        await self._collect(stream, pause=lambda length: length / self.rate)


class Source:
    """Sends `sample(length)` as soon as somebody connects, ends its side, and waits for the client's end."""

    def __init__(self, length: int) -> None:
        self.length = length

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Send, end, wait."""
        for piece in sample(self.length):
            await stream.send_all(piece)
        await stream.send_eof()
        while await stream.receive_some():
            pass


class Forward:
    """Carries every byte to a real server and back, ends included; a reset, or nobody there, is a reset for the client.

    Args:
        host: numeric, or a name that the machine knows.
        port: of a server that speaks TCP.
    """

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.port = port

    @classmethod
    def parse(cls, text: str) -> Forward:
        """Make one from `HOST:PORT` or `[HOST]:PORT`. Raises ValueError."""
        try:
            parts = urlsplit(f"//{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host = port = None
        if not host or not port or parts.netloc != text or "@" in text:
            raise ValueError(f"{text!r} is no HOST:PORT to forward to; write for example forward:127.0.0.1:5432")
        return cls(host, port)

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Splice until both directions have ended."""
        try:
            server = await trio.open_tcp_stream(self.host, self.port)
        except OSError as error:
            raise trio.BrokenResourceError(f"cannot forward to {self.host}:{self.port}: {error}") from error
        async with server:
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(_carry, stream, server)
                    nursery.start_soon(_carry, server, stream)
            except BaseException:
                with suppress(OSError):
                    server.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                raise


async def _carry(source: HalfCloseableStream, destination: HalfCloseableStream) -> None:
    while data := await source.receive_some(CHUNK):
        await destination.send_all(data)
    await destination.send_eof()


class Http:
    """A small web service with keep-alive, built on h11.

    GET /            the greeting, `text/plain`
    GET /bytes/N     `sample(N)` with its hash in `x-sha256`; with `?chunked` without a Content-Length
    POST /hash       JSON: sha256 and length of the body, whatever its transfer encoding
    anything else    404
    """

    def __init__(self, greeting: bytes = GREETING) -> None:
        self.greeting = greeting
        self.requests = 0

    async def serve(self, stream: HalfCloseableStream) -> None:
        """Answer requests until the client closes or asks to."""
        connection = h11.Connection(h11.SERVER)
        try:
            while await self._serve_one(connection, stream):
                connection.start_next_cycle()
        except h11.RemoteProtocolError:
            await stream.send_all(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        await stream.send_eof()

    async def _serve_one(self, connection: h11.Connection, stream: HalfCloseableStream) -> bool:
        event = await _next_event(connection, stream)
        if isinstance(event, h11.ConnectionClosed):
            return False
        assert isinstance(event, h11.Request)
        self.requests += 1
        digest, length = hashlib.sha256(), 0
        if connection.they_are_waiting_for_100_continue:
            go_on = connection.send(h11.InformationalResponse(status_code=100, headers=[]))
            assert go_on is not None
            await stream.send_all(go_on)
        while not isinstance(data := await _next_event(connection, stream), h11.EndOfMessage):
            if isinstance(data, h11.Data):
                digest.update(data.data)
                length += len(data.data)
        path, _, query = event.target.decode("latin-1").partition("?")
        if event.method == b"POST" and path == "/hash":
            body = json.dumps({"sha256": digest.hexdigest(), "length": length}).encode() + b"\n"
            await self._answer(connection, stream, 200, body, b"application/json")
        elif event.method in (b"GET", b"HEAD") and path == "/":
            await self._answer(connection, stream, 200, self.greeting, b"text/plain", head=event.method == b"HEAD")
        elif event.method == b"GET" and path.startswith("/bytes/") and path[7:].isdecimal():
            await self._answer_sample(connection, stream, int(path[7:]), chunked=query == "chunked")
        else:
            await self._answer(connection, stream, 404, b"no such page\n", b"text/plain")
        # MUST_CLOSE: one side said `Connection: close`, or speaks HTTP/1.0.
        return connection.our_state is h11.DONE and connection.their_state is h11.DONE

    async def _answer(
        self,
        connection: h11.Connection,
        stream: HalfCloseableStream,
        status: int,
        body: bytes,
        kind: bytes,
        *,
        head: bool = False,
    ) -> None:
        headers = [(b"Content-Type", kind), (b"Content-Length", b"%d" % len(body))]
        out = connection.send(h11.Response(status_code=status, headers=headers)) or b""
        if not head:
            out += connection.send(h11.Data(data=body)) or b""
        out += connection.send(h11.EndOfMessage()) or b""
        await stream.send_all(out)

    async def _answer_sample(
        self, connection: h11.Connection, stream: HalfCloseableStream, length: int, *, chunked: bool
    ) -> None:
        headers = [(b"Content-Type", b"application/octet-stream"), (b"X-Sha256", sample_sha256(length).encode())]
        if not chunked:
            headers.append((b"Content-Length", b"%d" % length))
        await stream.send_all(connection.send(h11.Response(status_code=200, headers=headers)) or b"")
        for piece in sample(length):
            # The parts spare a copy of the body: h11 hands the piece back as it is.
            for part in connection.send_with_data_passthrough(h11.Data(data=bytes(piece))) or ():
                await stream.send_all(part)
        await stream.send_all(connection.send(h11.EndOfMessage()) or b"")


async def _next_event(connection: h11.Connection, stream: HalfCloseableStream) -> h11.Event:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(bytes(await stream.receive_some(CHUNK)))
    assert isinstance(event, h11.Event)  # PAUSED cannot be: the next cycle is started before more is asked for
    return event


# What a name on a command line makes, with the number after its colon.
BACKENDS: Final[Mapping[str, Callable[[int], Backend]]] = {
    "http": lambda _: Http(),
    "echo": lambda _: Echo(),
    "speaks-first": lambda _: SpeaksFirst(),
    "answers-after-eof": lambda _: AnswersAfterEof(),
    "closes-first": lambda _: ClosesFirst(),
    "sink": lambda _: Sink(),
    "discard": lambda _: Discard(),
    "source": Source,
    "slow": SlowReader,
}


def make_backend(spec: str) -> Backend:
    """Make a back end from `NAME`, `NAME:NUMBER` or `forward:HOST:PORT`.

    Raises:
        ValueError: no such back end, or a number or an address that is none.
    """
    name, _, rest = spec.partition(":")
    if name == "forward":
        return Forward.parse(rest)
    if name not in BACKENDS:
        raise ValueError(f"no back end {name!r}; there are: {', '.join([*BACKENDS, 'forward'])}")
    return BACKENDS[name](int(rest or 1_000_000))
