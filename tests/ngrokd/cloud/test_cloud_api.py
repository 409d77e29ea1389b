from __future__ import annotations

import json
import logging
import ssl
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cache

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MemoryReceiveStream, MemorySendStream, MockClock, memory_stream_pair

from ngrokd.cloud import api as api_module
from ngrokd.cloud.api import (
    KeyRefusedError,
    NgrokApi,
    Operator,
    OperatorGoneError,
    api_ssl_context,
    trouble_of,
)
from ngrokd.cloud.backoff import Trouble
from ngrokd.cloud.identity import new_key_and_csr
from ngrokd.endpoints import Secret
from ngrokd.errors import ApiError, ConfigError
from ngrokd.http1 import Request, Response, serve_connection
from ngrokd.lab.ca import Authority, Validity, load_identity

KEY = "2abcDEFghiJKL_s3cr3t"
CERTIFICATE = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
NOON = 1_700_000_000.0  # Tue, 14 Nov 2023 22:13:20 GMT
ENDPOINT = {"id": "ep_1", "url": "http://a.prod", "proto": "http"}

Stream = trio.StapledStream[MemorySendStream, MemoryReceiveStream]
Handler = Callable[[Request], Awaitable[Response]]


@cache
def authority() -> Authority:
    return Authority("api")


@cache
def server_context(name: str = "api.test", validity: Validity = Validity.ALWAYS) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    load_identity(context, authority().issue([name], validity=validity))
    return context


@cache
def trusting() -> ssl.SSLContext:
    return api_ssl_context(authority().root_pem)


@dataclass
class Server:
    """An API on in-memory streams, behind real TLS."""

    nursery: trio.Nursery
    handler: Handler | None = None
    raw: Callable[[trio.abc.Stream], Awaitable[None]] | None = None
    context: ssl.SSLContext | None = field(default_factory=server_context)
    requests: list[Request] = field(default_factory=list)
    dialled: list[tuple[str, int]] = field(default_factory=list)

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        self.dialled.append((host, port))
        ours, theirs = memory_stream_pair()
        self.nursery.start_soon(self._serve, theirs)
        await trio.lowlevel.checkpoint()
        return ours

    def api(self, url: str = "https://api.test", **options: object) -> NgrokApi:
        settings: dict[str, object] = {
            "key": KEY,
            "connect": self.connect,
            "ssl_context": trusting(),
            "user_agent": "ngrokd/1.2.3",
            "now": lambda: NOON,
            **options,
        }
        return NgrokApi(url=url, **settings)  # type: ignore[arg-type]  # each test names what it changes

    async def _serve(self, stream: trio.abc.Stream) -> None:
        if self.context is not None:
            stream = trio.SSLStream(stream, self.context, server_side=True, https_compatible=True)
        if self.raw is None:
            await serve_connection(stream, self._answer)
            return
        try:
            if isinstance(stream, trio.SSLStream):
                await stream.do_handshake()
            await stream.receive_some()
            await self.raw(stream)
            await stream.aclose()
        except trio.BrokenResourceError:
            await trio.aclose_forcefully(stream)

    async def _answer(self, request: Request) -> Response:
        self.requests.append(request)
        assert self.handler is not None
        return await self.handler(request)


@asynccontextmanager
async def served(
    handler: Handler | Response | Sequence[Response] | None = None,
    *,
    raw: Callable[[trio.abc.Stream], Awaitable[None]] | bytes | None = None,
    context: ssl.SSLContext | None = None,
) -> AsyncIterator[Server]:
    """A server that answers so, or sends these bytes; alive until the test ends."""
    async with trio.open_nursery() as nursery:
        server = Server(nursery, context=context or server_context())
        if isinstance(raw, bytes):
            server.raw = _sender(raw)
        else:
            server.raw = raw
        if isinstance(handler, Response):
            server.handler = _always([handler])
        elif callable(handler):
            server.handler = handler
        elif handler is not None:
            server.handler = _always(handler)
        yield server
        nursery.cancel_scope.cancel()


def _always(responses: Sequence[Response]) -> Handler:
    """Each once, the last one for ever."""
    left = list(responses)

    async def answer(request: Request) -> Response:
        return left.pop(0) if len(left) > 1 else left[0]

    return answer


def _sender(data: bytes) -> Callable[[trio.abc.Stream], Awaitable[None]]:
    async def send(stream: trio.abc.Stream) -> None:
        await stream.send_all(data)

    return send


def page(endpoints: object, next_page_uri: object = None) -> Response:
    return Response.json(200, {"endpoints": endpoints, "uri": "https://api.test/x", "next_page_uri": next_page_uri})


def operator_answer(status: int = 201, **changes: object) -> Response:
    return Response.json(
        status,
        {
            "id": "k8sop_1",
            "uri": "https://api.ngrok.com/kubernetes_operators/k8sop_1",
            "principal": {"id": "usr_1", "uri": "x"},
            "binding": {
                "endpoint_selectors": ["true"],
                "cert": {
                    "cert": CERTIFICATE,
                    "not_before": "2026-01-01T00:00:00Z",
                    "not_after": "2026-04-01T00:00:00.123456789Z",
                },
                "ingress_endpoint": "kubernetes-binding-ingress.ngrok.io:443",
            },
            **changes,
        },
    )


def refusal(status: int, code: str, message: str, *headers: tuple[str, str]) -> Response:
    body = {"error_code": code, "status_code": status, "msg": message, "details": {"operation_id": "op_1"}}
    return Response.json(status, body, *headers)


# What is sent.


async def test_registration_is_the_go_daemons() -> None:
    """Byte for byte what ngrok knows from the Go daemon, plus the selectors it forgot."""
    async with served(operator_answer()) as server:
        operator = await server.api().register(b"CSR\n", ["endpoint.url.contains('x')"])

    assert operator == Operator(
        "k8sop_1",
        CERTIFICATE.encode(),
        "kubernetes-binding-ingress.ngrok.io:443",
        1767225600.0,
        1775001600.123456,
        ("true",),
    )
    (request,) = server.requests
    assert (request.method, request.target) == ("POST", "/kubernetes_operators")
    assert json.loads(request.body) == {
        "description": "ngrokd daemon",
        "metadata": '{"type":"forward-proxy"}',
        "enabled_features": ["bindings"],
        "region": "global",
        "binding": {"endpoint_selectors": ["endpoint.url.contains('x')"], "csr": "CSR\n"},
    }
    assert dict(request.headers) == {
        "host": "api.test",
        "authorization": f"Bearer {KEY}",
        "ngrok-version": "2",
        "user-agent": "ngrokd/1.2.3",
        "accept": "application/json",
        "content-type": "application/json",
        "content-length": str(len(request.body)),
    }


async def test_requests_without_a_body_say_nothing_of_one() -> None:
    """And nobody asks for compression, so nobody has to defend against it."""
    async with served(page([])) as server:
        await server.api().bound_endpoints("k8sop_1")

    headers = dict(server.requests[0].headers)
    assert not {"content-type", "content-length", "accept-encoding"} & set(headers)


async def test_renewal_patches_the_same_operator() -> None:
    """A new key and request, the same id."""
    async with served(operator_answer(200)) as server:
        operator = await server.api().renew("k8sop_1", b"CSR")

    assert operator.id == "k8sop_1"
    assert (server.requests[0].method, server.requests[0].target) == ("PATCH", "/kubernetes_operators/k8sop_1")
    assert json.loads(server.requests[0].body) == {"binding": {"csr": "CSR"}}


async def test_renewal_that_answers_with_another_operator_is_refused() -> None:
    """Its certificate would not be ours."""
    async with served(operator_answer(200, id="k8sop_2")) as server:
        with pytest.raises(ApiError, match="k8sop_2"):
            await server.api().renew("k8sop_1", b"CSR")


async def test_operator_is_looked_up_and_deleted() -> None:
    """Deleting what is gone already is as good."""
    gone = refusal(404, "ERR_NGROK_404", "no such operator")
    async with served([operator_answer(200, binding=None), Response(204), gone]) as server:
        api = server.api()
        assert await api.get_operator("k8sop_1") == Operator("k8sop_1")
        await api.delete_operator("k8sop_1")
        await api.delete_operator("k8sop_1")

    assert [request.method for request in server.requests] == ["GET", "DELETE", "DELETE"]


async def test_operator_without_a_certificate_is_deleted_again() -> None:
    """It could never be used, and nobody would delete it later."""
    async with served([operator_answer(binding={"cert": None}), Response(204)]) as server:
        with pytest.raises(ApiError, match="no certificate"):
            await server.api().register(b"CSR")

    assert [(request.method, request.path) for request in server.requests] == [
        ("POST", "/kubernetes_operators"),
        ("DELETE", "/kubernetes_operators/k8sop_1"),
    ]


async def test_id_in_a_path_cannot_leave_its_place() -> None:
    """It may come from a file somebody edited."""
    async with served(page([])) as server:
        await server.api().bound_endpoints("../x?y#z/é")

    assert server.requests[0].target == "/kubernetes_operators/..%2Fx%3Fy%23z%2F%C3%A9/bound_endpoints"


async def test_key_is_checked_with_a_cheap_question() -> None:
    """And it may be another key than the one in use."""
    async with served(Response.json(200, {"operators": [], "uri": "x", "next_page_uri": None})) as server:
        await server.api(key="old").check_key(Secret("new"))
        await server.api(key=lambda: Secret("now")).check_key()

    assert [request.target for request in server.requests] == ["/kubernetes_operators?limit=1"] * 2
    assert [request.header("authorization") for request in server.requests] == ["Bearer new", "Bearer now"]


async def test_key_is_asked_for_at_each_call() -> None:
    """A new key is used by the next request, without a restart."""
    keys = iter(["one", "two"])
    async with served(page([])) as server:
        api = server.api(key=lambda: next(keys))
        await api.bound_endpoints("k8sop_1")
        await api.bound_endpoints("k8sop_1")

    assert [request.header("authorization") for request in server.requests] == ["Bearer one", "Bearer two"]


# Where it is sent.


@pytest.mark.parametrize(
    ("url", "dialled", "host", "path"),
    [
        ("https://api.test", ("api.test", 443), "api.test", "/kubernetes_operators"),
        ("https://API.Test./", ("api.test", 443), "api.test", "/kubernetes_operators"),
        ("https://api.test:8443/v1/", ("api.test", 8443), "api.test:8443", "/v1/kubernetes_operators"),
        ("http://127.0.0.1", ("127.0.0.1", 80), "127.0.0.1", "/kubernetes_operators"),
        ("http://localhost:9999", ("localhost", 9999), "localhost:9999", "/kubernetes_operators"),
        ("http://[::1]:9999", ("::1", 9999), "[::1]:9999", "/kubernetes_operators"),
    ],
)
async def test_url_decides_where_requests_go(url: str, dialled: tuple[str, int], host: str, path: str) -> None:
    """Host, port and a prefix before each path."""
    async with served(Response.json(200, {"operators": []})) as server:
        if url.startswith("http:"):
            server.context = None
        await server.api(url).check_key()

    assert server.dialled == [dialled]
    assert server.requests[0].header("host") == host
    assert server.requests[0].path == path


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.ngrok.com",
        "ftp://api.test",
        "https://",
        "https:///path",
        "https://user:pw@api.test",
        "https://api.test?x=y",
        "https://api.test#x",
        "https://api.test:0x50",
        "https://api.test:99999",
        "https://[::1",
        "https://api.test\n.evil.test",
        "https://api.test\\evil",
        "https://äpi.test",
        "http://api.test",
        "http://127.0.0.1.evil.test",
        "http://127.1",
        "http://127.0.0.256",
        "http://localhost.evil.test",
        "http://10.0.0.1",
        "http://[::2]",
    ],
)
def test_url_that_would_give_the_key_away_is_refused(url: str) -> None:
    """https only; http reaches no further than this machine."""
    with pytest.raises(ConfigError) as caught:
        NgrokApi(url=url, key=KEY, connect=_unreachable, ssl_context=trusting())

    assert str(caught.value).isprintable()


async def _unreachable(host: str, port: int) -> trio.abc.Stream:
    raise ConnectionRefusedError(111, "Connection refused")


# Listing.


async def test_listing_without_endpoints_is_empty() -> None:
    """[] and null: Go's encoder writes null for a list that nobody made."""
    async with served([page([]), page(None)]) as server:
        api = server.api()
        assert await api.bound_endpoints("k8sop_1") == []
        assert await api.bound_endpoints("k8sop_1") == []


async def test_endpoints_keep_the_fields_we_use_whatever_their_types() -> None:
    """Judging them is not this module's affair, and 65,000 of them must fit into memory."""
    strange = {"id": 5, "url": None, "proto": ["x"], "name": {"a": 1}, "description": "", "traffic_policy": "{}"}
    async with served(
        page([{**ENDPOINT, "public_url": "http://b.prod", "bindings": ["kubernetes"]}, strange])
    ) as server:
        endpoints = await server.api().bound_endpoints("k8sop_1")

    assert endpoints == [
        {**ENDPOINT, "public_url": "http://b.prod"},
        {"id": 5, "url": None, "proto": ["x"], "name": {"a": 1}, "description": ""},
    ]


@pytest.mark.parametrize(
    ("item", "seen"),
    [
        (b"5", 5),
        (b"null", None),
        (b'"text"', "text"),
        (b"[1]", [1]),
        (b'{"id":"\\ud800"}', {"id": "�"}),
        (b'{"id":"\\\\ud800\\ud83d\\ude00"}', {"id": "\\ud800\U0001f600"}),
        (b'{"id":"a","description":"\\ude00"}', {"id": "a", "description": "�"}),
        (b'{"id":"\xff"}', '{"id":"�"}'),
        (b'{"id":"a","port":1e9999,"x":' + b"9" * 5000 + b"}", {"id": "a"}),
        (b'{"id":1e9999}', {"id": float("inf")}),
        (b'{"id":"a","id":"b"}', {"id": "b"}),
    ],
)
async def test_bad_item_is_handed_on_and_the_others_live(item: bytes, seen: object) -> None:
    """One endpoint cannot take away all the others."""
    body = b'{"endpoints":[{"id":"ep_1","url":"http://a.prod","proto":"http"},' + item + b'],"next_page_uri":null}'
    async with served(Response(200, (), body)) as server:
        endpoints = await server.api().bound_endpoints("k8sop_1")

    assert endpoints == [ENDPOINT, seen]


def paged(pages: Iterable[tuple[str, object, object]]) -> Handler:
    """Pages by their target; asking for anything else is a failure of the test."""
    table = {target: page(endpoints, uri) for target, endpoints, uri in pages}

    async def answer(request: Request) -> Response:
        return table[request.target]

    return answer


PATH = "/kubernetes_operators/k8sop_1/bound_endpoints"


@pytest.mark.parametrize(
    "uri",
    [
        f"https://api.test{PATH}?before_id=2",
        f"https://api.test:443{PATH}?before_id=2",
        f"HTTPS://API.TEST{PATH}?before_id=2",
        f"//api.test{PATH}?before_id=2",
        f"{PATH}?before_id=2",
        "?before_id=2",
        "bound_endpoints?before_id=2",
        f"{PATH}?before_id=2#fragment",
    ],
)
async def test_next_page_is_absolute_or_relative(uri: str) -> None:
    """ngrok's own client resolves either against the base; the Go daemon glued them together."""
    pages = [(PATH, [{"id": "1"}, {"id": "2"}], uri), (f"{PATH}?before_id=2", [{"id": "3"}], None)]
    async with served(paged(pages)) as server:
        endpoints = await server.api().bound_endpoints("k8sop_1")

    assert endpoints == [{"id": "1"}, {"id": "2"}, {"id": "3"}]
    assert len(server.dialled) == 1


@pytest.mark.parametrize("end", [None, "", "missing"])
async def test_listing_ends_without_a_next_page(end: str | None) -> None:
    """Null, empty, or not there."""
    body = {"endpoints": [ENDPOINT]} if end == "missing" else {"endpoints": [ENDPOINT], "next_page_uri": end}
    async with served(Response.json(200, body)) as server:
        assert await server.api().bound_endpoints("k8sop_1") == [ENDPOINT]


async def test_empty_page_ends_the_listing() -> None:
    """Even when it promises another."""
    async with served(
        paged([(PATH, [ENDPOINT], "?before_id=1"), (f"{PATH}?before_id=1", [], "?before_id=0")])
    ) as server:
        assert await server.api().bound_endpoints("k8sop_1") == [ENDPOINT]


FOREIGN = [
    "https://evil.test/x",
    "https://api.test:8443/x",
    "http://api.test/x",
    "//evil.test/x",
    "https://api.test.evil.test/x",
    "https://api.test@evil.test/x",
    "https://user@api.test/x",
    "ftp://api.test/x",
    "javascript:alert(1)",
    "https://evil.test\\@api.test/x",
    "/x\r\nHost: evil.test",
    "/x y",
    "https://[::1/x",
    "https://api.test:x/",
    "/\u00e9",
    "/" + "x" * 9000,
]


@pytest.mark.parametrize("uri", FOREIGN, ids=range(len(FOREIGN)))
async def test_foreign_next_page_discards_the_listing(uri: str) -> None:
    """The key would go there. Not one byte is sent, and no half listing is returned."""
    async with served(page([ENDPOINT], uri)) as server:
        with pytest.raises(ApiError) as caught:
            await server.api().bound_endpoints("k8sop_1")

    assert len(server.requests) == 1
    assert server.dialled == [("api.test", 443)]
    assert str(caught.value).isprintable()
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("uris", [[PATH], ["?a"], ["?a", "?b", "?a"]])
async def test_pages_in_a_circle_discard_the_listing(uris: list[str]) -> None:
    """Going round would end at some limit; it is noticed at once."""
    left = list(uris)

    async def answer(request: Request) -> Response:
        return page([ENDPOINT], left.pop(0) if len(left) > 1 else left[0])

    async with served(answer) as server:
        with pytest.raises(ApiError, match="circle"):
            await server.api().bound_endpoints("k8sop_1")

    assert len(server.requests) <= 4


async def test_pages_without_end_discard_the_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Always another page: the number of pages is bounded."""
    monkeypatch.setattr(api_module, "PAGES", 20)
    count = 0

    async def answer(request: Request) -> Response:
        nonlocal count
        count += 1
        return page([ENDPOINT], f"?page={count}")

    async with served(answer) as server:
        with pytest.raises(ApiError, match="more than 20 pages"):
            await server.api().bound_endpoints("k8sop_1")

    assert count == 20


async def test_page_that_fails_discards_the_listing() -> None:
    """Half a listing would take the other half's names off the machine."""
    async with served([page([ENDPOINT], "?2"), Response.text(500, "oops")]) as server:
        with pytest.raises(ApiError, match="500"):
            await server.api().bound_endpoints("k8sop_1")


@pytest.mark.parametrize(
    ("limit", "value", "message"),
    [("LISTING_BYTES", 5000, "larger than"), ("STRUCTURE", 500, "fields"), ("ENDPOINTS", 50, "endpoints")],
)
async def test_bounds_hold_over_all_pages(
    monkeypatch: pytest.MonkeyPatch, limit: str, value: int, message: str
) -> None:
    """Each page is small, all of them are not."""
    monkeypatch.setattr(api_module, limit, value)
    count = 0

    async def answer(request: Request) -> Response:
        nonlocal count
        count += 1
        return page([ENDPOINT] * 10, f"?page={count}")

    async with served(answer) as server:
        with pytest.raises(ApiError, match=message):
            await server.api().bound_endpoints("k8sop_1")

    assert 2 < count < 30


async def test_server_may_close_between_pages() -> None:
    """Its patience with idle connections is not ours to know: the page is asked for on another one."""
    closing = Response.json(200, {"endpoints": [ENDPOINT], "next_page_uri": "?2"}, ("connection", "close"))
    async with served([closing, page([ENDPOINT])]) as server:
        assert len(await server.api().bound_endpoints("k8sop_1")) == 2

    assert len(server.dialled) == 2


async def test_connection_found_dead_is_replaced_once() -> None:
    """The server closed it silently; nothing was answered, so nothing is lost by asking again."""
    answers = [page([ENDPOINT], "?2"), page([ENDPOINT])]

    async def one_each(stream: trio.abc.Stream) -> None:
        response = answers.pop(0)
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(response.body), response.body))

    async with served(raw=one_each) as server:
        assert len(await server.api().bound_endpoints("k8sop_1")) == 2

    assert len(server.dialled) == 2


async def test_registration_is_never_repeated() -> None:
    """Each success makes an operator, and an answer that was lost may have been one."""
    async with served(raw=b"") as server:
        with pytest.raises(ApiError):
            await server.api().register(b"CSR")

    assert len(server.dialled) == 1


async def test_65000_endpoints_are_read_in_two_seconds() -> None:
    """A full /16, in pages of a hundred, through TLS and HTTP."""
    fields = {
        "region": "us",
        "type": "cloud",
        "bindings": ["kubernetes"],
        "metadata": "x" * 50,
        "pooling_enabled": False,
    }

    def listed(number: int) -> dict[str, object]:
        host = f"svc-{number}.prod"
        return {"id": f"ep_{number:026}", "url": f"http://{host}", "host": host, "proto": "http", **fields}

    pages = [
        page([listed(n) for n in range(start, start + 100)], f"?before={start}" if start < 64900 else None)
        for start in range(0, 65000, 100)
    ]
    async with served(pages) as server:
        api = server.api()
        started = time.process_time()
        endpoints = await api.bound_endpoints("k8sop_1")
        spent_s = time.process_time() - started

    assert len(endpoints) == 65000
    assert endpoints[-1] == {"id": f"ep_{64999:026}", "url": "http://svc-64999.prod", "proto": "http"}
    assert spent_s < 2  # both sides of it; alone on a machine it is 0.4 s


# What goes wrong.


@pytest.mark.parametrize("status", [300, 301, 302, 303, 307, 308])
@pytest.mark.parametrize("location", ["https://evil.test/", "https://api.test/elsewhere", "http://api.test/", "\x85"])
async def test_redirects_are_not_followed(status: int, location: str) -> None:
    """No request but the first, no connection but the first."""
    async with served(Response(status, (("location", location),))) as server:
        with pytest.raises(ApiError) as caught:
            await server.api().bound_endpoints("k8sop_1")

    assert caught.value.status == status
    assert len(server.requests) == 1
    assert server.dialled == [("api.test", 443)]
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("status", [401, 403])
async def test_refused_key_names_the_command_that_helps(status: int) -> None:
    """The daemon goes on with what it knows; a person has to act."""
    answer = refusal(status, "ERR_NGROK_206", "The API authentication\n you specified is invalid.")
    async with served(answer) as server:
        with pytest.raises(KeyRefusedError) as caught:
            await server.api().bound_endpoints("k8sop_1")

    assert (caught.value.status, caught.value.code) == (status, "ERR_NGROK_206")
    assert "ngrokd set-api-key" in caught.value.remedy
    assert str(caught.value).startswith("listing the bound endpoints: The API authentication you specified is invalid.")
    assert "ERR_NGROK_206" in str(caught.value)
    assert "op_1" in str(caught.value)
    assert trouble_of(caught.value) is Trouble.REFUSED


@pytest.mark.parametrize("key", ["", Secret("")])
async def test_missing_key_is_not_sent(key: str | Secret) -> None:
    """Nothing is dialled for nothing."""
    async with served(page([])) as server:
        with pytest.raises(KeyRefusedError):
            await server.api(key=key).bound_endpoints("k8sop_1")

    assert server.dialled == []


@pytest.mark.parametrize("key", ["with blank", "line\nbreak", "null\x00", "ünicode", "x" * 5000])
async def test_key_that_cannot_be_one_is_refused_without_quoting_it(key: str) -> None:
    """Somebody pasted something else; it may still be a secret."""
    async with served(page([])) as server:
        with pytest.raises(KeyRefusedError) as caught:
            await server.api(key=key).check_key()

    assert key not in str(caught.value)
    assert server.dialled == []


async def test_operator_gone_is_ngroks_own_verdict() -> None:
    """It leads to a new registration, so a proxy's 404 page must not be taken for it."""
    async with served(refusal(404, "ERR_NGROK_404", "not found")) as server:
        with pytest.raises(OperatorGoneError) as caught:
            await server.api().bound_endpoints("k8sop_1")
        assert (caught.value.status, caught.value.code) == (404, "ERR_NGROK_404")
        assert trouble_of(caught.value) is Trouble.PASSING

    for other in (Response.text(404, "<html>"), Response.json(404, {}), Response.json(404, {"error_code": "nginx"})):
        async with served(other) as server:
            with pytest.raises(ApiError) as passing:
                await server.api().bound_endpoints("k8sop_1")
            assert type(passing.value) is ApiError
            assert passing.value.status == 404


async def test_operator_that_ngrok_cannot_validate_says_what_to_check() -> None:
    """Bindings not enabled for the account, or a selector that is no expression."""
    answer = refusal(400, "ERR_NGROK_19002", "Failed to validate Kubernetes Operator! Reason: bindings")
    async with served(answer) as server:
        with pytest.raises(ApiError) as caught:
            await server.api().register(b"CSR")

    assert caught.value.code == "ERR_NGROK_19002"
    assert "bindings" in caught.value.remedy
    assert trouble_of(caught.value) is Trouble.REFUSED


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("99999", 99999.0),
        ("Tue, 14 Nov 2023 22:14:20 GMT", 60.0),
        ("Tue, 14 Nov 2023 22:00:00 GMT", 0.0),
        ("later", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_read_in_both_forms(status: int, value: str | None, seconds: float | None) -> None:
    """Seconds or a date; how much of it is obeyed is decided elsewhere."""
    headers = () if value is None else (("retry-after", value),)
    async with served(refusal(status, "ERR_NGROK_226", "You have been rate limited.", *headers)) as server:
        with pytest.raises(ApiError) as caught:
            await server.api().bound_endpoints("k8sop_1")

    assert caught.value.retry_after_s == seconds
    assert (caught.value.status, caught.value.code) == (status, "ERR_NGROK_226")
    assert trouble_of(caught.value) is Trouble.PASSING


@pytest.mark.parametrize("status", [400, 402, 404, 409, 418, 422, 425, 429, 500, 502, 503, 504, 599, 999, 202, 206])
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>\x1b[31m</html>",
        b'"text"',
        b"[]",
        b"null",
        b"{}",
        b'{"error_code":5,"msg":["x"],"details":7}',
        b'{"error_code":"\\u001b[31m","msg":"a\\u001b]0;b\\u0007 \\u202e c","details":{"operation_id":{"x":1}}}',
        b'{"msg":"' + b"x" * 5000 + b'"}',
        b'{"msg":"' + b"x" * 100_000 + b'"}',
        b'{"msg":' + b"[" * 50_000,
        b'{"msg":"\\ud800"}',
        b"\xff\xfe",
    ],
    ids=range(13),
)
async def test_any_refusal_is_a_printable_error_with_its_status(status: int, body: bytes) -> None:
    """ngrok's envelope or not: a line for the log, never an escape sequence for the terminal."""
    async with served(Response(status, (("content-type", "x/y\x85"), ("ngrok-operation-id", "op_2")), body)) as server:
        with pytest.raises(ApiError) as caught:
            await server.api().register(b"CSR")

    assert caught.value.status == status
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert caught.value.code == ""


def ok(body: bytes, content_type: bytes = b"application/json") -> bytes:
    return b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\ncontent-length: %d\r\n\r\n%b" % (content_type, len(body), body)


GOOD = b'{"endpoints":[],"next_page_uri":null}'
BAD_ANSWERS: list[bytes] = [
    # not HTTP, or not to its end
    b"",
    b"\x00" * 1000,
    b"SSH-2.0-OpenSSH_9.2\r\n",
    b"HTTP/1.1\r\n\r\n",
    b"HTTP/1.1 200",
    b"HTTP/1.1 200 OK\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 37\r\n\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\ncontent-length: 99999999999999999999\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n25\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + GOOD,
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n\x1f\x8b",
    b"HTTP/1.1 200 OK\r\ncontent-encoding: zstd\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20_000,
    b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000 + b"\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 100,
    b"HTTP/1.0 200 OK\r\n\r\n" + GOOD[:-5],
    b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 205 Reset\r\ncontent-length: 0\r\n\r\n",
    # not JSON
    ok(b""),
    ok(b" "),
    ok(b"<html><body>Sign in to the hotel's network</body></html>", b"text/html"),
    ok(b"\xef\xbb\xbf" + GOOD),
    ok(GOOD.decode().encode("utf-16")),
    ok(b"\x1f\x8b\x08\x00"),
    ok(GOOD[:-1]),
    ok(GOOD + b"x"),
    ok(GOOD + GOOD),
    ok(GOOD.replace(b'"', b"'")),
    ok(b'{"endpoints":[],}'),
    ok(b'{"endpoints":[NaN]}'),
    ok(b'{"endpoints":[Infinity]}'),
    ok(b'{"endpoints":[01]}'),
    ok(b'{"endpoints":[{"id":"a]}'),
    ok(b'{"endpoints":["\\x41"]}'),
    ok(b'{"endpoints":["\\ud8"]}'),
    ok(b'{"endpoints":["\n"]}'),
    ok(b"[" * 100_000),
    ok(b'{"endpoints":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    ok(b'{"endpoints":[{"id":' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}]}"),
    # not what was asked for
    ok(b"null"),
    ok(b"true"),
    ok(b"5"),
    ok(b"1e9999"),
    ok(b'"endpoints"'),
    ok(b"[]"),
    ok(b"{}"),
    ok(b'{"endpoint":[]}'),
    ok(b'{"endpoints":{}}'),
    ok(b'{"endpoints":"[]"}'),
    ok(b'{"endpoints":5}'),
    ok(b'{"endpoints":false}'),
    ok(b'{"operators":[]}'),
    ok(b'{"endpoints":[{}],"next_page_uri":5}'),
    ok(b'{"endpoints":[{}],"next_page_uri":["/x"]}'),
    ok(b'{"endpoints":[{}],"next_page_uri":{"uri":"/x"}}'),
    ok(b'{"endpoints":[{}],"next_page_uri":"http://evil.test/"}'),
    ok(b'{"endpoints":[{}],"next_page_uri":"\\u0000"}'),
    ok(b'{"error_code":"ERR_NGROK_1","status_code":500,"msg":"x"}'),
]


@pytest.mark.parametrize("raw", BAD_ANSWERS, ids=range(len(BAD_ANSWERS)))
async def test_bad_answer_is_one_error_and_no_listing(raw: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """More than sixty ways to be wrong, one documented error: the last known endpoints stay."""
    caplog.set_level(logging.DEBUG)
    async with served(raw=raw) as server:
        with pytest.raises(ApiError) as caught:
            await server.api().bound_endpoints("k8sop_1")

    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600
    assert KEY not in "".join(traceback.format_exception(caught.value)) + caplog.text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["endpoints", "next_page_uri", "id", "url", "binding", "cert", "msg", "details", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(JSON, st.sampled_from([200, 201, 400, 401, 404, 429, 500]), st.booleans())
def test_any_json_is_an_answer_or_that_error(value: object, status: int, as_page: bool) -> None:
    """Whatever shape it has, for a listing and for an operator."""
    body = json.dumps({"endpoints": value} if as_page else value).encode()

    async def main() -> None:
        async with served(Response(status, (), body)) as server:
            for call in (server.api().bound_endpoints, server.api().get_operator):
                try:
                    await call("k8sop_1")
                except ApiError as error:
                    assert str(error).isprintable()  # noqa: PT017 - the other outcome is legal too

    trio.run(main)


BAD_OPERATORS: list[dict[str, object]] = [
    {"id": None},
    {"id": 5},
    {"id": ""},
    {"id": "../../etc/passwd"},
    {"id": "a\nb"},
    {"id": "x" * 200},
    {"binding": "x"},
    {"binding": {"cert": "x"}},
    {"binding": {"cert": {"cert": 5}}},
    {"binding": {"cert": {"cert": "not PEM"}}},
    {"binding": {"cert": {"cert": CERTIFICATE + "é"}}},
    {"binding": {"cert": {"cert": CERTIFICATE}, "ingress_endpoint": 443}},
]


@pytest.mark.parametrize("changes", BAD_OPERATORS)
async def test_operator_that_cannot_be_one_is_refused(changes: dict[str, object]) -> None:
    """Its id becomes a file and a part of URLs, its certificate is loaded into TLS."""
    async with served(operator_answer(200, **changes)) as server:
        with pytest.raises(ApiError) as caught:
            await server.api().renew("k8sop_1", b"CSR")

    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("ingress", "taken"),
    [
        ("ingress.test:443", True),
        ("ingress.test", True),
        ("10.0.0.1:8443", True),
        ("[2001:db8::1]:443", True),
        (None, False),
        ("", False),
        ("https://ingress.test", False),
        ("ingress.test:", False),
        ("ingress.test:0", False),
        ("ingress.test:70000", False),
        ("a b:443", False),
        ("a\n:443", False),
        ("user@host:443", False),
    ],
)
async def test_ingress_that_cannot_be_dialled_is_not_passed_on(ingress: str | None, taken: bool) -> None:
    """The default is used instead."""
    binding = {"cert": {"cert": CERTIFICATE, "not_after": "never"}, "ingress_endpoint": ingress}
    async with served(operator_answer(200, binding=binding)) as server:
        operator = await server.api().renew("k8sop_1", b"CSR")

    assert operator.ingress_endpoint == (ingress if taken else "")
    assert operator.not_after is None


# Time.


async def test_silent_server_is_given_up_on_after_the_time_limit(autojump_clock: MockClock) -> None:
    """Connected, asked, and nothing: thirty seconds, and the poll goes on."""

    async def silence(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    async with served(raw=silence) as server:
        with pytest.raises(ApiError, match="within 30 s"):
            await server.api().bound_endpoints("k8sop_1")

    assert trio.current_time() == pytest.approx(30, abs=1.1)


async def test_dribbling_server_is_cut_by_the_same_limit(autojump_clock: MockClock) -> None:
    """A byte a second keeps no connection alive: the limit counts from the beginning."""

    async def dribble(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"HTTP/1.1 200 OK\r\ncontent-length: 100000\r\n\r\n")
        while True:
            await stream.send_all(b" ")
            await trio.sleep(1)

    async with served(raw=dribble) as server:
        with pytest.raises(ApiError, match="within 30 s"):
            await server.api().bound_endpoints("k8sop_1")

    assert trio.current_time() == pytest.approx(30, abs=1.1)


async def test_slow_pages_are_cut_by_the_limit_of_the_listing(autojump_clock: MockClock) -> None:
    """Each page in time, all of them never: ten requests' worth of time."""
    count = 0

    async def slowly(request: Request) -> Response:
        nonlocal count
        count += 1
        await trio.sleep(29)
        return page([ENDPOINT], f"?page={count}")

    async with served(slowly) as server:
        with pytest.raises(ApiError, match="300 s"):
            await server.api().bound_endpoints("k8sop_1")

    assert trio.current_time() == pytest.approx(300, abs=1.1)


@pytest.mark.parametrize("where", ["connect", "handshake"])
async def test_connection_that_does_not_come_is_given_up_on_after_ten_seconds(
    where: str, autojump_clock: MockClock
) -> None:
    """A black hole: SYNs, or a handshake, that nobody answers."""

    async def nowhere(host: str, port: int) -> trio.abc.Stream:
        if where == "connect":
            await trio.sleep_forever()
        return memory_stream_pair()[0]

    api = NgrokApi(url="https://api.test", key=KEY, connect=nowhere, ssl_context=trusting())
    with pytest.raises(ApiError, match="no connection within 10 s"):
        await api.bound_endpoints("k8sop_1")

    assert trio.current_time() == 10


async def test_endless_body_is_cut_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was received is thrown away as soon as it is too much."""
    monkeypatch.setattr(api_module, "LISTING_BYTES", 1_000_000)
    sent = 0

    async def endless(stream: trio.abc.Stream) -> None:
        nonlocal sent
        await stream.send_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            await stream.send_all(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            sent += 0x10000
            await trio.testing.wait_all_tasks_blocked()

    async with served(raw=endless) as server:
        with pytest.raises(ApiError, match="larger than 1000000 bytes"):
            await server.api().bound_endpoints("k8sop_1")

    assert sent < 1_300_000


async def test_cancelled_call_leaves_nothing_open() -> None:
    """Shutdown in the middle of a poll."""

    async def silence(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    async with served(raw=silence) as server:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.api().bound_endpoints, "k8sop_1")
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()

    assert scope.cancelled_caught


# TLS and the network.


@pytest.mark.parametrize(
    ("name", "validity", "word"),
    [
        ("other.test", Validity.ALWAYS, "Hostname mismatch"),
        ("api.test", Validity.EXPIRED, "expired"),
        ("api.test", Validity.NOT_YET, "not yet valid"),
    ],
)
async def test_wrong_certificate_is_refused_before_a_byte_is_sent(name: str, validity: Validity, word: str) -> None:
    """The key is worth more than the answer."""
    async with served(page([]), context=server_context(name, validity)) as server:
        with pytest.raises(ApiError, match=word):
            await server.api().bound_endpoints("k8sop_1")

    assert server.requests == []


async def test_unknown_authority_is_refused_and_ca_file_is_named() -> None:
    """Companies inspect TLS; the remedy is theirs to choose."""
    async with served(page([])) as server:
        with pytest.raises(ApiError, match="not trusted") as caught:
            await server.api(ssl_context=api_ssl_context()).bound_endpoints("k8sop_1")

    assert "api.ca_file" in caught.value.remedy
    assert server.requests == []


async def test_server_that_speaks_no_tls_is_an_error() -> None:
    """Port 443 of something else."""

    async def plain(host: str, port: int) -> trio.abc.Stream:
        ours, theirs = memory_stream_pair()
        await theirs.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        return ours

    api = NgrokApi(url="https://api.test", key=KEY, connect=plain, ssl_context=trusting())
    with pytest.raises(ApiError, match="no TLS") as caught:
        await api.bound_endpoints("k8sop_1")

    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (ConnectionRefusedError(111, "Connection refused"), "Connection refused"),
        (OSError(-2, "Name or service not known"), "Name or service not known"),
        (OSError("all attempts to connect failed"), "all attempts"),
        (TimeoutError(), "TimeoutError"),
    ],
)
async def test_unreachable_api_names_the_reason(error: OSError, word: str) -> None:
    """What the person at the keyboard can check."""

    async def connect(host: str, port: int) -> trio.abc.Stream:
        raise error

    api = NgrokApi(url="https://api.test", key=KEY, connect=connect, ssl_context=trusting())
    with pytest.raises(ApiError) as caught:
        await api.bound_endpoints("k8sop_1")

    assert f"cannot reach https://api.test: {word}" in str(caught.value)
    assert caught.value.status == 0
    assert trouble_of(caught.value) is Trouble.PASSING


async def test_reason_is_found_below_trios_summary() -> None:
    """open_tcp_stream says that all attempts failed; why is in the group below."""

    async def connect(host: str, port: int) -> trio.abc.Stream:
        reasons = ExceptionGroup("", [ConnectionRefusedError(111, "Connection refused")])
        raise OSError("all attempts to connect failed") from reasons

    api = NgrokApi(url="https://api.test", key=KEY, connect=connect, ssl_context=trusting())
    with pytest.raises(ApiError, match="Connection refused"):
        await api.bound_endpoints("k8sop_1")


def test_context_verifies() -> None:
    """There is no way to ask for anything less."""
    context = api_ssl_context()

    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.check_hostname
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize("ca_pem", [b"", b"garbage", b"\xff", new_key_and_csr()[1]])
def test_ca_file_without_a_certificate_is_a_configuration_error(ca_pem: bytes) -> None:
    """Found at start, not at the first poll."""
    with pytest.raises(ConfigError):
        api_ssl_context(ca_pem)


# The key.


async def test_key_is_in_no_text() -> None:
    """Not in the repr, not in the errors, not in what they were caused by."""
    texts = []
    for answer in (
        refusal(401, "ERR_NGROK_206", "invalid"),
        Response.text(500, "oops"),
        Response.text(302, "x", ("location", "https://evil.test")),
        page([ENDPOINT], "https://evil.test"),
        Response.text(200, "nonsense"),
    ):
        async with served(answer) as server:
            api = server.api()
            texts.append(repr(api))
            with pytest.raises(ApiError) as caught:
                await api.bound_endpoints("k8sop_1")
            texts.append("".join(traceback.format_exception(caught.value)))

    assert not any(KEY in text for text in texts)


async def test_other_selectors_are_sent_by_themselves() -> None:
    """A certificate belongs to a request of its own."""
    async with served(operator_answer()) as server:
        await server.api().select("k8sop_1", ["a", "b"])

    (request,) = server.requests
    assert (request.method, request.target) == ("PATCH", "/kubernetes_operators/k8sop_1")
    assert json.loads(request.body) == {"binding": {"endpoint_selectors": ["a", "b"]}}


@pytest.mark.parametrize("told", [None, "true", [1], {"a": 1}, [["x"]]])
async def test_selectors_of_another_form_are_none_at_all(told: object) -> None:
    """They are only compared; an operator is not refused for them."""
    answer = json.loads(operator_answer().body)
    answer["binding"]["endpoint_selectors"] = told
    async with served(Response.json(200, answer)) as server:
        operator = await server.api().get_operator("k8sop_1")

    assert operator.selectors == ()
