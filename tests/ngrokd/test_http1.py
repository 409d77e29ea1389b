from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import (
    MemoryReceiveStream,
    MemorySendStream,
    MockClock,
    memory_stream_one_way_pair,
    memory_stream_pair,
)

from ngrokd.errors import NgrokdError
from ngrokd.http1 import (
    DEFAULT_LIMITS,
    HttpConnection,
    HttpError,
    Request,
    Response,
    Routes,
    ServerLimits,
    request,
    retry_after_s,
    serve_connection,
)


async def echo(asked: Request) -> Response:
    return Response(200, (("x-path", asked.path), ("x-query", asked.query)), asked.body)


@asynccontextmanager
async def served(
    handler: Callable[[Request], Awaitable[Response]] = echo, limits: ServerLimits = DEFAULT_LIMITS
) -> AsyncIterator[trio.StapledStream[MemorySendStream, MemoryReceiveStream]]:
    """The client's end of a connection to our server, which must end by itself once the client has left."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, handler, limits)
        yield ours
        await ours.aclose()


async def read_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([bytes(part) async for part in stream])


async def answer_of(raw: bytes, *, body_limit: int = 1000, method: str = "GET", pieces: int = 0) -> Response:
    """What the client makes of these bytes from a peer that then closes."""
    ours, theirs = memory_stream_pair()

    async def peer() -> None:
        if pieces:
            for start in range(0, len(raw), pieces):
                await theirs.send_all(raw[start : start + pieces])
        else:
            await theirs.send_all(raw)
        await theirs.send_eof()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(peer)
        return await request(ours, "api.test", method, "/", body_limit=body_limit)


# The client.


async def test_request_carries_what_was_asked_and_nothing_more() -> None:
    """No Accept-Encoding, no User-Agent of our own: what is not sent cannot be answered wrongly."""
    ours, theirs = memory_stream_pair()
    await theirs.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi")

    response = await HttpConnection(ours, "api.test:8443").request("POST", "/a?b=c", [("x-y", "z")], b"body")
    sent = await theirs.receive_some()

    assert sent == b"POST /a?b=c HTTP/1.1\r\nhost: api.test:8443\r\nx-y: z\r\ncontent-length: 4\r\n\r\nbody"
    assert (response.status, response.body, response.header("CONTENT-length")) == (200, b"hi", "2")


async def test_one_connection_carries_several_requests() -> None:
    """A listing of many pages pays for one handshake."""
    async with served() as stream:
        connection = HttpConnection(stream, "api.test")

        bodies = [(await connection.request("POST", f"/{n}", body=b"%d" % n)).body for n in range(5)]

        assert bodies == [b"0", b"1", b"2", b"3", b"4"]
        assert connection.reusable
        await connection.aclose()
        assert not connection.reusable


async def test_connection_that_the_server_closes_is_not_reused() -> None:
    """Connection: close is obeyed, and asking again says so without a byte sent."""
    ours, theirs = memory_stream_pair()
    connection = HttpConnection(ours, "api.test")
    await theirs.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")

    await connection.request("GET", "/")

    assert not connection.reusable
    with pytest.raises(HttpError) as caught:
        await connection.request("GET", "/")
    assert caught.value.unanswered


async def test_bytes_after_an_answer_end_the_reuse() -> None:
    """Bytes that belong to no request would be taken for the answer to the next one."""
    ours, theirs = memory_stream_pair()
    connection = HttpConnection(ours, "api.test")
    await theirs.send_all(b"HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    assert (await connection.request("GET", "/")).status == 204

    assert not connection.reusable


@pytest.mark.parametrize("pieces", [1, 7, 0])
async def test_answers_are_read_whatever_their_pieces(pieces: int) -> None:
    """TCP keeps no boundaries."""
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nt: u\r\n\r\n"
    to_the_end = b"HTTP/1.0 200 OK\r\n\r\nuntil the end"
    interim = b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 404 Not Found\r\ncontent-length: 1\r\n\r\nx"

    assert (await answer_of(chunked, pieces=pieces)).body == b"abcde"
    assert (await answer_of(to_the_end, pieces=pieces)).body == b"until the end"
    assert (await answer_of(interim, pieces=pieces)).status == 404


async def test_answer_to_head_has_no_body() -> None:
    """Content-Length of a HEAD answer speaks of the body that GET would have had."""
    response = await answer_of(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n", method="HEAD")

    assert response.body == b""
    assert response.header("content-length") == "500"


async def test_redirect_is_an_answer_like_any_other() -> None:
    """Nobody but the caller decides where a key is sent."""
    response = await answer_of(b"HTTP/1.1 302 Found\r\nLocation: http://evil.test/\r\nContent-Length: 0\r\n\r\n")

    assert response.status == 302


HEAD = b"HTTP/1.1 200 OK\r\n"
BAD_ANSWERS = [
    ("closed", b""),
    ("truncated", b"HTT"),
    ("truncated", HEAD),
    ("truncated", HEAD + b"Content-Length: 10\r\n\r\n"),
    ("truncated", HEAD + b"Content-Length: 10\r\n\r\n123456789"),
    ("truncated", HEAD + b"Transfer-Encoding: chunked\r\n\r\n"),
    ("truncated", HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nabc"),
    ("truncated", HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"),
    ("protocol", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    ("protocol", b"<html>\r\n\r\n</html>"),
    ("protocol", b"SSH-2.0-OpenSSH_9.2\r\n\r\n"),
    ("protocol", b"HTTP/1.1 abc OK\r\n\r\n"),
    ("protocol", b"HTTP/1.1 99 Low\r\n\r\n"),
    ("protocol", b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"),
    ("protocol", b"HTTP/1.1 100 Continue\r\n\r\n" * 17),
    ("protocol", HEAD + b"Content-Length: -1\r\n\r\n"),
    ("protocol", HEAD + b"Content-Length: 1e3\r\n\r\n"),
    ("protocol", HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n"),
    ("protocol", HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab"),
    ("protocol", HEAD + b"Transfer-Encoding: gzip\r\n\r\n"),
    ("protocol", HEAD + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n"),
    ("protocol", HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabcde\r\n"),
    ("protocol", HEAD + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabcd\r\n"),
    ("protocol", HEAD + b"bad header\r\n\r\n"),
    ("protocol", HEAD + b"a\x00b: c\r\n\r\n"),
    ("protocol", HEAD + b" folded: first\r\n\r\n"),
    ("headers_too_large", HEAD + b"x: " + b"a" * 40_000),
    ("headers_too_large", HEAD + b"x: " + b"a" * 40_000 + b"\r\n\r\n"),
    ("headers_too_large", HEAD + b"x: y\r\n" * 10_000 + b"\r\n"),
    ("headers_too_large", HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;" + b"x" * 100_000),
    ("headers_too_large", HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n" + b"x: y\r\n" * 20_000),
    ("body_too_large", HEAD + b"Content-Length: 1001\r\n\r\n"),
    ("body_too_large", HEAD + b"Content-Length: 18446744073709551616\r\n\r\n"),
    ("body_too_large", HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 1001),
    ("body_too_large", b"HTTP/1.0 200 OK\r\n\r\n" + b"a" * 1001),
    ("encoding", HEAD + b"Content-Encoding: gzip\r\nContent-Length: 1\r\n\r\nx"),
    ("encoding", HEAD + b"Content-Encoding: BR\r\nContent-Length: 1\r\n\r\nx"),
]


@pytest.mark.parametrize(("reason", "raw"), BAD_ANSWERS, ids=range(len(BAD_ANSWERS)))
@pytest.mark.parametrize("pieces", [0, 911])
async def test_bad_answer_is_one_documented_error(reason: str, raw: bytes, pieces: int) -> None:
    """Whatever a peer sends ends in HttpError with a stable word, and the text fits a terminal."""
    with pytest.RaisesGroup(
        pytest.RaisesExc(HttpError, check=lambda error: error.reason == reason and str(error).isprintable())
    ):
        await answer_of(raw, pieces=pieces)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([b"", HEAD, HEAD + b"Transfer-Encoding: chunked\r\n\r\n"]))
def test_any_bytes_are_an_answer_or_that_error(raw: bytes, start: bytes) -> None:
    """Nothing else ever comes out of the client."""

    async def main() -> None:
        ours, theirs = memory_stream_pair()
        await theirs.send_all(start + raw)
        await theirs.send_eof()
        try:
            await request(ours, "api.test", "GET", "/")
        except HttpError as error:
            assert str(error).isprintable()  # noqa: PT017 - the other outcome is legal too

    trio.run(main)


async def test_bad_answer_names_no_unanswered_request_once_a_byte_came() -> None:
    """Only a request that nobody began to answer may be sent again."""
    ours, theirs = memory_stream_pair()
    await theirs.send_all(b"HTTP/1.1 2")
    await theirs.send_eof()

    with pytest.raises(HttpError) as caught:
        await request(ours, "api.test", "GET", "/")

    assert not caught.value.unanswered


async def test_peer_that_closes_before_answering_leaves_the_request_unanswered() -> None:
    """This is what a server's idle timeout looks like from here."""
    ours, theirs = memory_stream_pair()
    await theirs.send_eof()

    with pytest.raises(HttpError) as caught:
        await request(ours, "api.test", "GET", "/")

    assert caught.value.unanswered
    assert caught.value.reason == "closed"


async def test_answer_is_read_although_the_request_could_not_be_sent_whole() -> None:
    """A server that refuses closes its ear and speaks: its words are worth more than 'broken pipe'."""
    to_peer, from_us = memory_stream_one_way_pair()
    to_us, from_peer = memory_stream_one_way_pair()
    await to_us.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
    await from_us.aclose()

    response = await request(trio.StapledStream(to_peer, from_peer), "api.test", "POST", "/", body=b"x" * 100)

    assert response.status == 413


async def test_broken_connection_says_so() -> None:
    """Neither direction works: one error, of the kind that may be tried again."""
    ours, theirs = memory_stream_pair()
    await theirs.aclose()

    with pytest.raises(HttpError) as caught:
        await request(ours, "api.test", "GET", "/")

    assert caught.value.reason == "connection"
    assert caught.value.unanswered


@pytest.mark.parametrize("value", ["k\r\nx: y", "k\n", "k\x00", "key€"])
async def test_header_that_http_cannot_carry_is_refused_without_quoting_it(value: str) -> None:
    """h11 quotes the value in its error; ours may be a key, so neither text nor chain may hold it."""
    ours, theirs = memory_stream_pair()

    with pytest.raises(HttpError) as caught:
        await request(ours, "api.test", "GET", "/", [("authorization", "Bearer s3cr3t" + value)])

    assert "s3cr3t" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    await ours.send_eof()
    assert await theirs.receive_some() == b""


async def test_cancelled_request_leaves_an_unusable_connection(autojump_clock: MockClock) -> None:
    """The answer to the cancelled request may still come: it must not answer another."""
    ours, _theirs = memory_stream_pair()
    connection = HttpConnection(ours, "api.test")

    with trio.move_on_after(1):
        await connection.request("GET", "/")

    assert not connection.reusable


# The server.


async def test_server_answers_pipelined_requests_in_order() -> None:
    """HTTP/1.1 clients may send without waiting."""
    async with served() as stream:
        await stream.send_all(b"GET /a HTTP/1.1\r\nHost: x\r\n\r\nGET /b?c HTTP/1.1\r\nHost: x\r\n\r\n")
        await stream.send_eof()

        answers = await read_all(stream)

    assert answers.index(b"x-path: /a") < answers.index(b"x-path: /b")
    assert b"x-query: c" in answers


async def test_server_accepts_absolute_targets() -> None:
    """RFC 9112 3.2.2 asks it of every server."""
    assert Request("GET", "http://a.test/b/c?d").path == "/b/c"
    assert Request("GET", "http://a.test").path == "/"
    assert Request("GET", "/redirect?to=http://b.test/x").path == "/redirect"
    assert Request("OPTIONS", "*").path == "*"


async def test_head_is_get_without_the_body() -> None:
    """Content-Length still tells what GET would carry."""

    async def page(asked: Request) -> Response:
        return Response.text(200, "four")

    async with served(Routes({"/": {"GET": page}})) as stream:
        await stream.send_all(b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")

        answer = await read_all(stream)

    assert b"content-length: 4\r\n" in answer
    assert answer.endswith(b"\r\n\r\n")


async def test_routes_tell_unknown_paths_from_wrong_methods() -> None:
    """404 and 405 mean different mistakes; 405 lists what is possible."""
    async with served(Routes({"/known": {"GET": echo, "POST": echo}})) as stream:
        connection = HttpConnection(stream, "x")

        missing = await connection.request("GET", "/unknown")
        wrong = await connection.request("DELETE", "/known?x")
        right = await connection.request("POST", "/known?x", body=b"b")

    assert (missing.status, wrong.status, right.status) == (404, 405, 200)
    assert wrong.header("allow") == "GET, HEAD, POST"


BAD_REQUESTS = [
    (400, b"GET /\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\x01\x00"),
    (400, b"GET / HTTP/1.1\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    (400, b"GET / HTTP/1.1\r\nHost: x\r\nbroken line\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: nine\r\n\r\n"),
    (400, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
    (405, b"CONNECT evil.test:443 HTTP/1.1\r\nHost: x\r\n\r\n"),
    (413, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1001\r\n\r\n"),
    (413, b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n"),
    (413, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"400\r\n" + b"a" * 1024 + b"\r\n"),
    (431, b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 40_000),
    (431, b"GET / HTTP/1.1\r\nHost: x\r\na: " + b"b" * 40_000 + b"\r\n\r\n"),
    (431, b"GET /" + b"b" * 40_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n"),
]


@pytest.mark.parametrize(("status", "raw"), BAD_REQUESTS, ids=range(len(BAD_REQUESTS)))
@pytest.mark.parametrize("pieces", [0, 911])
async def test_bad_request_is_answered_and_ends_the_connection(
    status: int, raw: bytes, pieces: int, autojump_clock: MockClock
) -> None:
    """The client learns why; the handler never hears of it."""

    async def never(asked: Request) -> Response:
        raise AssertionError(asked)

    async with served(never, ServerLimits(body_bytes=1000)) as stream:
        for start in range(0, len(raw), pieces or len(raw)):
            await stream.send_all(raw[start : start + (pieces or len(raw))])
        answer = await read_all(stream)

    assert answer.startswith(b"HTTP/1.1 %d " % status)
    assert b"connection: close\r\n" in answer.lower()


async def test_server_invites_a_body_that_waits_for_it() -> None:
    """curl holds back bodies over 1 MiB until it is told to go on."""
    async with served() as stream:
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        invited = await stream.receive_some()
        await stream.send_all(b"abc")

        answer = await stream.receive_some()

    assert invited.startswith(b"HTTP/1.1 100 ")
    assert answer.endswith(b"abc")


async def test_http_1_0_client_gets_its_answer_and_the_end() -> None:
    """It does not know of keep-alive."""
    async with served() as stream:
        await stream.send_all(b"GET /a HTTP/1.0\r\n\r\n")

        answer = await read_all(stream)

    assert answer.startswith(b"HTTP/1.1 200 ")


async def test_bug_in_the_handler_is_500_and_rises() -> None:
    """The client is told something; the owner of the connection is told what."""

    async def broken(asked: Request) -> Response:
        raise ZeroDivisionError

    ours, theirs = memory_stream_pair()
    await ours.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(ZeroDivisionError):
        await serve_connection(theirs, broken)
    answer = await read_all(ours)

    assert answer.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")


async def test_bug_in_the_handler_rises_although_the_client_has_left() -> None:
    """Nobody to tell 500 is no reason to tell nobody."""
    ours, theirs = memory_stream_pair()

    async def broken(asked: Request) -> Response:
        await ours.aclose()
        raise ZeroDivisionError

    await ours.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    with pytest.raises(ZeroDivisionError):
        await serve_connection(theirs, broken)


@pytest.mark.parametrize(
    "sent",
    [b"", b"GET", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"],
)
async def test_client_that_vanishes_is_ordinary(sent: bytes) -> None:
    """Before, in and after its request: the server ends without a word."""
    ours, theirs = memory_stream_pair()
    if sent:
        await ours.send_all(sent)
    await ours.aclose()

    await serve_connection(theirs, echo)


async def test_client_that_vanishes_while_it_is_answered_is_ordinary() -> None:
    """The write fails, and that is all."""
    gone = trio.Event()

    async def slow(asked: Request) -> Response:
        await gone.wait()
        return Response.text(200, "too late")

    async with served(slow) as stream:
        await stream.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        await trio.testing.wait_all_tasks_blocked()
        await stream.aclose()
        gone.set()


@pytest.mark.parametrize(
    ("sent", "after_s", "answer"),
    [
        (b"", 60, b""),
        (b"GET / HT", 10, b"HTTP/1.1 408 "),
        (b"GET / HTTP/1.1\r\nHost: x\r\n", 10, b"HTTP/1.1 408 "),
        (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc", 10, b"HTTP/1.1 408 "),
    ],
)
async def test_slow_client_is_cut(sent: bytes, after_s: float, answer: bytes, autojump_clock: MockClock) -> None:
    """A connection that asks nothing, or never finishes asking, does not stay for ever."""
    async with served() as stream:
        await stream.send_all(sent)

        received = await read_all(stream)

    assert received.startswith(answer)
    assert bool(received) == bool(answer)
    assert trio.current_time() == pytest.approx(after_s, abs=1.01)


async def test_dribbling_client_is_cut_all_the_same(autojump_clock: MockClock) -> None:
    """One byte a second satisfies no limit that counts from the first byte."""
    async with served() as stream, trio.open_nursery() as nursery:

        async def dribble() -> None:
            for byte in b"GET / HTTP/1.1\r\nHost: example.test\r\n\r\n":
                await stream.send_all(bytes([byte]))
                await trio.sleep(1)

        nursery.start_soon(dribble)
        received = await read_all(stream)
        nursery.cancel_scope.cancel()

    assert received.startswith(b"HTTP/1.1 408 ")
    assert trio.current_time() < 13


async def test_client_that_does_not_read_is_cut(autojump_clock: MockClock) -> None:
    """An answer that nobody takes holds a task and a buffer: not for ever."""
    ours, theirs = trio.testing.lockstep_stream_pair()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, echo)
        await ours.send_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")

    assert trio.current_time() == pytest.approx(30, abs=1.01)


async def test_cancelled_server_closes_at_once(autojump_clock: MockClock) -> None:
    """Shutdown waits for nobody's keep-alive."""
    ours, theirs = memory_stream_pair()

    with trio.move_on_after(0.5):
        await serve_connection(theirs, echo)

    assert trio.current_time() == 0.5
    assert await ours.receive_some() == b""


# Retry-After.

NOON = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        (None, None),
        ("0", 0.0),
        (" 7 ", 7.0),
        ("99999", 99999.0),
        ("9" * 400, 999_999_999_999.0),
        ("Tue, 14 Nov 2023 22:13:50 GMT", 30.0),
        ("Tuesday, 14-Nov-23 22:13:50 GMT", 30.0),
        ("Tue Nov 14 22:13:50 2023", 30.0),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("-5", None),
        ("1.5", None),
        ("soon", None),
        ("", None),
        ("٣", None),
        ("Tue, 99 Nov 2023 22:13:50 GMT", None),
        ("Tue, 14 Nov 99999999999 22:13:50 GMT", None),
        ("inf", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str | None, seconds: float | None) -> None:
    """Both forms of RFC 9110 10.2.3, and nothing that is neither."""
    result = retry_after_s(value, NOON)

    assert result == seconds
    assert result is None or math.isfinite(result)


def test_http_error_is_of_the_family() -> None:
    """Whoever catches our errors catches this one."""
    assert issubclass(HttpError, NgrokdError)
