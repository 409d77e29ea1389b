"""HTTP/1.1, both sides, over streams in memory: each input is one connection in a Trio run of its own (0.2 ms).

* whatever the client is answered, it has a response within its limits or an `HttpError` that names a known reason,
  fits a terminal and repeats no header of the request; however the bytes are cut, the outcome is the same;
* whatever the server is asked, it answers each request that it hands to its handler, with one response, and at most
  one refusal after them; what it says is HTTP by h11's judgement; bodies and headers are within the limits.
"""

# ruff: noqa: PT017 - what an error says is one of the invariants

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import h11
import trio

from ngrokd.http1 import HttpConnection, HttpError, Request, Response, ServerLimits, serve_connection

CORPUS: Final = "http1"
MAX_LEN: Final = 1000
TOKENS: Final = (
    b"GET / HTTP/1.1\r\n", b"POST /x HTTP/1.0\r\n", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 100 Continue\r\n\r\n",
    b"Host: a\r\n", b"\r\n\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"5\r\nhello\r\n",
    b"0\r\n\r\n", b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Connection: Upgrade\r\nUpgrade: h2c\r\n",
    b"CONNECT a:1 HTTP/1.1\r\n", b"HEAD / HTTP/1.1\r\n", b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 304 \r\n",
    b"HTTP/1.1 101 Switching\r\n", b"Content-Encoding: gzip\r\n", b"\x00", b"\x80", b" ", b"\n",
    b"Content-Length: 99999999999999999999\r\n", b"HTTP/2.0", b"Content-Length: 5, 5\r\n", b"ffffffffffffffff\r\n",
    b";ext=1",
)  # fmt: skip

LIMITS: Final = ServerLimits(header_bytes=2000, body_bytes=200)
SMALL: Final = ServerLimits(header_bytes=200, body_bytes=20)
REASONS: Final = (
    "connection",
    "closed",
    "truncated",
    "protocol",
    "headers_too_large",
    "body_too_large",
    "encoding",
    "request",
)
CANARY: Final = "canary-in-the-request"


class Fed(trio.abc.HalfCloseableStream):
    """A stream that has all its input already, in pieces, and keeps what is written to it."""

    def __init__(self, data: bytes, size: int) -> None:
        self._pieces = [data[at : at + size] for at in range(0, len(data), size)]
        self._pieces.reverse()
        self.written = bytearray()
        self.eof = False
        self.closed = False

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._pieces:
            return b""
        piece = self._pieces.pop()
        if max_bytes is not None and len(piece) > max_bytes:
            self._pieces.append(piece[max_bytes:])
            piece = piece[:max_bytes]
        return piece

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.eof
        assert not self.closed
        self.written += data

    async def wait_send_all_might_not_block(self) -> None:
        return

    async def send_eof(self) -> None:
        self.eof = True

    async def aclose(self) -> None:
        self.closed = True


def run_one(data: bytes) -> None:
    """One connection, as a whole and in pieces."""
    mode = data[0] if data else 0
    text = data[1:]
    sizes = (max(len(text), 1), mode >> 4 or 1)
    outcomes = trio.run(converse, text, sizes, mode)
    # The limits of unfinished and finished headers are measured in two ways, so near them the cuts may matter. Of a
    # client's outcomes only the first is the peer's: whether bytes behind an answer were seen in time is chance.
    if len(text) < 200 and not mode & 2:
        assert outcomes[0] == outcomes[1], "cut otherwise it is something else"


async def converse(text: bytes, sizes: Sequence[int], mode: int) -> list[object]:
    """The same connection, cut into pieces of each of these sizes."""
    if mode & 1:
        return [await served(text, size, SMALL if mode & 2 else LIMITS) for size in sizes]
    return [await asked(text, size, mode) for size in sizes]


async def asked(text: bytes, size: int, mode: int) -> object:
    """A client's two requests, answered with these bytes."""
    stream = Fed(text, size)
    connection = HttpConnection(stream, "host.example", header_limit=200 if mode & 2 else 2000)
    method = ("GET", "POST", "HEAD", "PUT")[mode >> 2 & 3]
    outcomes: list[object] = []
    for index in range(2):
        try:
            response = await connection.request(
                method,
                "/x?y=1",
                (("authorization", CANARY),),
                b"body" if index else b"",
                body_limit=20 if mode & 2 else 300,
            )
        except HttpError as error:
            assert error.reason in REASONS
            assert str(error).isprintable()
            assert len(str(error)) < 400
            assert CANARY not in str(error)
            assert not connection.reusable
            outcomes.append((error.reason, error.unanswered))
            break
        assert 200 <= response.status <= 999
        assert len(response.body) <= (20 if mode & 2 else 300)
        assert sum(len(name) + len(value) for name, value in response.headers) <= 2000
        assert all(name == name.lower() for name, _ in response.headers)
        assert method != "HEAD" or not response.body
        outcomes.append(response)
        if not connection.reusable:
            break
    await connection.aclose()
    assert stream.closed
    assert bytes(stream.written).startswith(method.encode() + b" /x?y=1 HTTP/1.1\r\nhost: host.example\r\n")
    return outcomes[0]


async def served(text: bytes, size: int, limits: ServerLimits) -> object:
    """A server's connection with these bytes coming in."""
    stream = Fed(text, size)
    requests: list[Request] = []

    async def handle(request: Request) -> Response:
        requests.append(request)
        await trio.lowlevel.checkpoint()
        return Response.text(200 + len(requests) % 3, "hello\n", ("x-number", str(len(requests))))

    await serve_connection(stream, handle, limits)
    assert stream.closed
    for request in requests:
        assert request.method.isascii()
        assert request.method != "CONNECT"
        assert request.method.isprintable()
        assert all("!" <= char <= "\xff" for char in request.target)
        assert len(request.body) <= limits.body_bytes
        size_of_headers = sum(len(name) + len(value) + 4 for name, value in request.headers) + len(request.target)
        assert size_of_headers <= limits.header_bytes
        assert "\n" not in request.path
    statuses = judge(bytes(stream.written), requests, text)
    assert len([status for status in statuses if status < 300]) == len(requests)
    assert len(statuses) <= len(requests) + 1
    assert all(status in (400, 405, 413, 431, 505) for status in statuses[len(requests) :]), statuses
    return requests, bytes(stream.written)


def judge(written: bytes, requests: list[Request], text: bytes) -> list[int]:
    """The status of each response in what the server has written; h11 is the judge of its form.

    A request that was refused was not seen, so its answer is one to HEAD when it has no body and HEAD was said.
    """
    statuses = []
    methods = [request.method for request in requests]
    while written:
        client = h11.Connection(h11.CLIENT)
        refused = "HEAD" if b"HEAD " in text and written.endswith(b"\r\n\r\n") else "GET"
        method = methods.pop(0) if methods else refused
        client.send(h11.Request(method=method, target="/", headers=[("host", "a")]))
        client.send(h11.EndOfMessage())
        client.receive_data(written)
        event = client.next_event()
        if isinstance(event, h11.InformationalResponse) and client.trailing_data[0] == b"":
            break  # asked to go on, the client has gone
        while not isinstance(event, h11.EndOfMessage):
            assert isinstance(event, (h11.Response, h11.InformationalResponse, h11.Data)), event
            if isinstance(event, h11.Response):
                statuses.append(event.status_code)
            event = client.next_event()
        written = client.trailing_data[0]
    return statuses


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
