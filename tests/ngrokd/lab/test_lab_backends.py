"""The back ends, byte by byte, on streams in memory."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

import h11
import pytest
import trio
import trio.testing
from trio.abc import HalfCloseableStream

from ngrokd.lab import backends
from ngrokd.lab.backends import Backend, Tally, make_backend, sample, sample_sha256


async def serve(backend: Backend, client: Callable[[HalfCloseableStream], Awaitable[None]]) -> None:
    """Run a back end against a client; both must come to their end."""
    near, far = trio.testing.memory_stream_pair()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(backend.serve, far)
            await client(near)


async def read_all(stream: HalfCloseableStream) -> bytes:
    data = bytearray()
    while chunk := await stream.receive_some():
        data += chunk
    return bytes(data)


async def test_echo_goes_on_after_the_clients_half_close() -> None:
    """What was sent before the end comes back after it."""

    async def client(stream: HalfCloseableStream) -> None:
        await stream.send_all(b"x" * 100_000)
        await stream.send_eof()
        assert await read_all(stream) == b"x" * 100_000

    await serve(backends.Echo(), client)


async def test_the_banner_comes_before_a_word_of_the_client() -> None:
    """SMTP, SSH and MySQL: the server speaks first."""

    async def client(stream: HalfCloseableStream) -> None:
        assert await stream.receive_some() == backends.BANNER
        await stream.send_all(b"QUIT")
        await stream.send_eof()
        assert await read_all(stream) == b"QUIT"

    await serve(backends.SpeaksFirst(), client)


async def test_an_answer_after_the_end_names_hash_and_length() -> None:
    """The pattern of `ssh host 'cat > file; sha256sum file'`."""
    backend = backends.AnswersAfterEof()

    async def client(stream: HalfCloseableStream) -> None:
        for piece in sample(1_500_000):
            await stream.send_all(piece)
        await stream.send_eof()
        assert await read_all(stream) == f"{sample_sha256(1_500_000)} 1500000\n".encode()

    await serve(backend, client)
    assert list(backend.tallies) == [Tally(1_500_000, sample_sha256(1_500_000), "eof")]


async def test_a_server_that_ends_first_still_counts_what_comes() -> None:
    """The client goes on sending after the server's half-close; not a byte may be lost."""
    backend = backends.ClosesFirst(b"bye\n")

    async def client(stream: HalfCloseableStream) -> None:
        assert await read_all(stream) == b"bye\n"
        await stream.send_all(b"still here")
        await stream.send_eof()

    await serve(backend, client)
    assert await backend.wait_tallies(1) == [Tally(10, hashlib.sha256(b"still here").hexdigest(), "eof")]


async def test_a_broken_stream_is_tallied_as_a_reset() -> None:
    """A cut is no clean end."""
    backend = backends.Discard()

    class Broken(trio.abc.ReceiveStream):
        async def receive_some(self, max_bytes: int | None = None) -> bytearray:
            raise trio.BrokenResourceError

        async def aclose(self) -> None:
            await trio.lowlevel.checkpoint()

    near, _ = trio.testing.memory_stream_pair()
    await backend.serve(trio.StapledStream(near.send_stream, Broken()))

    assert backend.tallies[0].ended == "reset"


async def test_sink_and_source_count_exactly() -> None:
    """The two ends of a throughput measurement."""

    async def upload(stream: HalfCloseableStream) -> None:
        await stream.send_all(bytes(777_777))
        await stream.send_eof()
        assert await read_all(stream) == b"777777\n"

    async def download(stream: HalfCloseableStream) -> None:
        data = await read_all(stream)
        assert hashlib.sha256(data).hexdigest() == sample_sha256(2_000_003)
        assert len(data) == 2_000_003
        await stream.send_eof()

    await serve(backends.Sink(), upload)
    await serve(backends.Source(2_000_003), download)


async def test_a_slow_reader_takes_its_time(autojump_clock: trio.testing.MockClock) -> None:
    """1000 bytes at 100 bytes a second are ten seconds."""
    backend = backends.SlowReader(100)

    async def client(stream: HalfCloseableStream) -> None:
        await stream.send_all(bytes(1000))
        await stream.send_eof()
        await backend.wait_tallies(1)
        assert trio.current_time() == pytest.approx(10)

    await serve(backend, client)


async def http(backend: backends.Http, sent: bytes) -> list[tuple[int, dict[bytes, bytes], bytes]]:
    """Send requests on one connection; return status, headers and body of each answer."""
    answers: list[tuple[int, dict[bytes, bytes], bytes]] = []

    async def client(stream: HalfCloseableStream) -> None:
        await stream.send_all(sent)
        await stream.send_eof()
        rest = await read_all(stream)
        while rest:
            connection = h11.Connection(h11.CLIENT)
            connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
            connection.send(h11.EndOfMessage())
            connection.receive_data(rest)
            body = b""
            while not isinstance(event := connection.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Response):
                    status, headers = event.status_code, dict(event.headers)
                elif isinstance(event, h11.Data):
                    body += event.data
            answers.append((status, headers, body))
            rest = connection.trailing_data[0]

    await serve(backend, client)
    return answers


async def test_http_keeps_the_connection() -> None:
    """Three requests, one of them chunked, one unknown, on one connection."""
    body = b"5\r\nhello\r\n6\r\n world\r\n0\r\n\r\n"
    sent = (
        b"GET / HTTP/1.1\r\nHost: hello.demo\r\n\r\n"
        b"POST /hash HTTP/1.1\r\nHost: hello.demo\r\nTransfer-Encoding: chunked\r\n\r\n" + body +
        b"GET /none HTTP/1.1\r\nHost: hello.demo\r\n\r\n"
    )  # fmt: skip

    first, second, third = await http(backends.Http(), sent)

    assert first[0] == 200
    assert first[2] == backends.GREETING
    assert json.loads(second[2]) == {"sha256": hashlib.sha256(b"hello world").hexdigest(), "length": 11}
    assert third[0] == 404


@pytest.mark.parametrize("query", [b"", b"?chunked"])
async def test_http_sends_a_sample_with_its_hash(query: bytes) -> None:
    """A client can check 100 MB without having them."""
    answers = await http(backends.Http(), b"GET /bytes/1200000" + query + b" HTTP/1.1\r\nHost: h\r\n\r\n")

    status, headers, body = answers[0]
    assert status == 200
    assert len(body) == 1_200_000
    assert headers[b"x-sha256"] == hashlib.sha256(body).hexdigest().encode()
    assert (b"content-length" in headers) == (query == b"")


async def test_http_says_400_to_garbage() -> None:
    """A client that speaks another protocol gets an answer, not a hang."""
    answers = await http(backends.Http(), b"\x16\x03\x01\x02\x00\r\n\r\n")

    assert answers[0][0] == 400


def test_back_ends_are_made_by_name() -> None:
    """The names that the line commands use."""
    made = make_backend("source:42")

    assert isinstance(made, backends.Source)
    assert made.length == 42
    with pytest.raises(ValueError, match="no back end 'nonsense'; there are: http, echo"):
        make_backend("nonsense")


@asynccontextmanager
async def server(serve: Callable[[trio.SocketStream], Awaitable[None]]) -> AsyncIterator[str]:
    """A real server on the loopback; gives what forwards to it."""
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        yield f"forward:127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def test_a_real_server_gets_every_byte_and_both_ends() -> None:
    """The client ends first and is answered afterwards."""

    async def answer(stream: trio.SocketStream) -> None:
        length = len(await read_all(stream))
        await stream.send_all(b"got %d" % length)

    async def client(stream: HalfCloseableStream) -> None:
        await stream.send_all(b"x" * 1_000_000)
        await stream.send_eof()
        assert await read_all(stream) == b"got 1000000"

    async with server(answer) as spec:
        await serve(make_backend(spec), client)


async def test_a_real_servers_reset_is_a_broken_stream() -> None:
    async def reset(stream: trio.SocketStream) -> None:
        await stream.receive_some(1)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    near, far = trio.testing.memory_stream_pair()
    await near.send_all(b"hello")
    async with server(reset) as spec:
        with pytest.RaisesGroup(trio.BrokenResourceError):
            await make_backend(spec).serve(far)


async def test_a_client_that_breaks_off_is_a_reset_for_the_real_server() -> None:
    seen = trio.Event()

    async def wait(stream: trio.SocketStream) -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await read_all(stream)
        assert isinstance(caught.value.__cause__, ConnectionResetError)
        seen.set()

    near, far = trio.testing.memory_stream_pair()
    await near.send_all(b"hello")
    async with server(wait) as spec:
        with trio.move_on_after(0.1):
            await make_backend(spec).serve(far)
        with trio.fail_after(5):
            await seen.wait()


async def test_where_no_server_is_the_stream_is_broken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    _, far = trio.testing.memory_stream_pair()

    with pytest.raises(trio.BrokenResourceError, match="cannot forward"):
        await make_backend(f"forward:127.0.0.1:{port}").serve(far)


def test_an_address_to_forward_to_has_host_and_port() -> None:
    assert vars(make_backend("forward:[::1]:22")) == {"host": "::1", "port": 22}
    for wrong in (
        "forward",
        "forward:22",
        "forward:host",
        "forward:host:0",
        "forward:a:99999",
        "forward:u@h:1",
        "forward:h:1/x",
    ):
        with pytest.raises(ValueError, match="HOST:PORT"):
            make_backend(wrong)
