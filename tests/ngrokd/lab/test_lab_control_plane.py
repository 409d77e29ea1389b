"""The API in miniature, asked by a raw HTTP client over streams in memory."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from hashlib import sha256
from typing import Any

import pytest
import trio
import trio.testing
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from ngrokd.http1 import HttpConnection, HttpError, Response
from ngrokd.lab.ca import Authority, shared_authority
from ngrokd.lab.control_plane import DEFAULT_KEY, ControlPlane, Fault

NOW = 1_790_000_000.0
HEADERS = (
    ("authorization", f"Bearer {DEFAULT_KEY}"),
    ("ngrok-version", "2"),
    ("content-type", "application/json"),
)
Ask = Callable[..., Awaitable[Response]]


@pytest.fixture
def clients() -> Authority:
    return shared_authority("clients")


@pytest.fixture
def plane(clients: Authority) -> ControlPlane:
    return ControlPlane(clients, wall=lambda: NOW)


@asynccontextmanager
async def asking(plane: ControlPlane) -> AsyncIterator[Ask]:
    """A function that asks the plane one thing on a connection of its own."""
    async with trio.open_nursery() as nursery:
        connect = plane.connector(nursery)

        async def ask(method: str, target: str, body: object = None, *, headers: Any = HEADERS) -> Response:
            connection = HttpConnection(await connect("api.lab.test", 443), "api.lab.test")
            try:
                data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
                with trio.fail_after(60):
                    return await connection.request(method, target, headers, data)
            finally:
                await connection.aclose()

        yield ask
        nursery.cancel_scope.cancel()


def csr(common_name: str = "") -> str:
    names = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "ngrok-forward-proxy")]
    if common_name:
        names.append(x509.NameAttribute(NameOID.COMMON_NAME, common_name))
    key = ec.generate_private_key(ec.SECP384R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name(names)).sign(key, hashes.SHA384())
    return request.public_bytes(serialization.Encoding.PEM).decode()


def registration(**binding: object) -> dict[str, object]:
    return {
        "description": "ngrokd daemon",
        "metadata": '{"type":"forward-proxy"}',
        "enabled_features": ["bindings"],
        "region": "global",
        "binding": {"csr": csr(), **binding},
    }


async def register(ask: Ask) -> str:
    return str(json.loads((await ask("POST", "/kubernetes_operators", registration())).body)["id"])


async def test_registering_signs_the_csr(plane: ControlPlane) -> None:
    """The body of the Go daemon is accepted; the answer has the fields it reads."""
    async with asking(plane) as ask:
        response = await ask("POST", "/kubernetes_operators", registration())

    operator = json.loads(response.body)
    certificate = x509.load_pem_x509_certificate(operator["binding"]["cert"]["cert"].encode())
    assert response.status == 201
    assert operator["id"] in plane.operators
    assert operator["binding"]["endpoint_selectors"] == ["true"]
    assert operator["binding"]["ingress_endpoint"] == "kubernetes-binding-ingress.ngrok.io:443"
    assert certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value == operator["id"]
    assert certificate.not_valid_before_utc.timestamp() == NOW - 60
    assert operator["binding"]["cert"]["not_before"] == certificate.not_valid_before_utc.strftime("%Y-%m-%dT%H:%M:%SZ")


async def test_patching_renews(plane: ControlPlane) -> None:
    """A new CSR gives a new certificate of the lifetime that is set now; the operator stays."""
    async with asking(plane) as ask:
        operator_id = await register(ask)
        plane.certificate_lifetime_s = 3600
        response = await ask("PATCH", f"/kubernetes_operators/{operator_id}", {"binding": {"csr": csr()}})
        fetched = await ask("GET", f"/kubernetes_operators/{operator_id}")

    operator = plane.operators[operator_id]
    assert response.status == 200
    assert json.loads(fetched.body) == json.loads(response.body)
    assert len(set(operator.certificates)) == 2
    assert operator.not_after - operator.not_before == 3600


async def test_deleting_makes_it_unknown(plane: ControlPlane) -> None:
    """Afterwards its endpoints are 404, which a daemon takes as the order to register again."""
    async with asking(plane) as ask:
        operator_id = await register(ask)
        deleted = await ask("DELETE", f"/kubernetes_operators/{operator_id}")
        gone = await ask("GET", f"/kubernetes_operators/{operator_id}/bound_endpoints")

    assert (deleted.status, deleted.body) == (204, b"")
    assert gone.status == 404
    assert json.loads(gone.body)["status_code"] == 404


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ({"enabled_features": ["bindings"], "binding": {"csr": csr("me")}}, "CommonName"),
        ({"enabled_features": ["bindings"], "binding": {"csr": "nonsense"}}, "could not be parsed"),
        ({"enabled_features": ["bindings"], "binding": {}}, "binding.csr"),
        ({"enabled_features": [], "binding": {"csr": csr()}}, "enabled_features"),
        ({**registration(), "description": "x" * 256}, "255"),
        (registration(endpoint_selectors="true"), "endpoint_selectors"),
        ([], "object"),
        (b"{", "not JSON"),
    ],
)
async def test_a_wrong_registration_says_what_is_wrong(plane: ControlPlane, body: object, part: str) -> None:
    """400 in ngrok's envelope, and nothing is registered."""
    async with asking(plane) as ask:
        response = await ask("POST", "/kubernetes_operators", body)

    error = json.loads(response.body)
    assert response.status == error["status_code"] == 400
    assert error["error_code"].startswith("ERR_NGROK_")
    assert part in error["msg"]
    assert not plane.operators


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ((), 401, "ERR_NGROK_200"),
        ((("authorization", "Basic eDp5"),), 401, "ERR_NGROK_201"),
        ((("authorization", "Bearer wrong"),), 401, "ERR_NGROK_203"),
        ((("authorization", f"Bearer {DEFAULT_KEY}"),), 400, "ERR_NGROK_218"),
        ((("authorization", f"Bearer {DEFAULT_KEY}"), ("ngrok-version", "1")), 400, "ERR_NGROK_217"),
    ],
)
async def test_credentials_and_version_are_checked(plane: ControlPlane, headers: Any, status: int, code: str) -> None:
    """With the codes that ngrok documents for each."""
    async with asking(plane) as ask:
        response = await ask("GET", "/kubernetes_operators", headers=headers)

    assert (response.status, json.loads(response.body)["error_code"]) == (status, code)


async def all_pages(ask: Ask, target: str) -> tuple[list[str], list[str | None]]:
    """The URLs of a listing, and every `next_page_uri` on the way."""
    urls: list[str] = []
    uris: list[str | None] = []
    while True:
        page = json.loads((await ask("GET", target)).body)
        urls += [endpoint["url"] for endpoint in page["endpoints"]]
        uris.append(page["next_page_uri"])
        if page["next_page_uri"] is None:
            return urls, uris
        target = page["next_page_uri"].removeprefix("http://api.lab.test")


async def test_pages_follow_each_other_newest_first(plane: ControlPlane) -> None:
    """Every endpoint comes once, in the order of ids."""
    plane.replace_endpoints([f"tcp://e{number}.demo:{number}" for number in range(1, 8)])
    plane.page_size = 3
    async with asking(plane) as ask:
        path = f"/kubernetes_operators/{await register(ask)}/bound_endpoints"
        urls, uris = await all_pages(ask, path)

    assert urls == [f"tcp://e{number}.demo:{number}" for number in range(7, 0, -1)]
    assert [uri and uri.partition("?")[0] for uri in uris] == [path, path, None]


async def test_next_page_uris_may_be_absolute_and_the_last_page_empty(plane: ControlPlane) -> None:
    """ngrok's own client resolves the URI against its base, and ends at an empty page."""
    plane.replace_endpoints(["http://a.demo", "http://b.demo"])
    plane.page_size, plane.absolute_next_uri, plane.empty_last_page = 1, True, True
    async with asking(plane) as ask:
        urls, uris = await all_pages(ask, f"/kubernetes_operators/{await register(ask)}/bound_endpoints?limit=1")

    assert urls == ["http://b.demo", "http://a.demo"]
    assert len(uris) == 3
    assert all(uri.startswith("http://api.lab.test/kubernetes_operators/") for uri in uris if uri)
    assert all(uri.endswith("&limit=1") for uri in uris if uri)


async def test_a_page_boundary_may_vanish(plane: ControlPlane) -> None:
    """The id in `before_id` is a place, not an endpoint that must still exist."""
    ids = plane.replace_endpoints(["http://a.demo", "http://b.demo", "http://c.demo"])
    plane.page_size = 2
    async with asking(plane) as ask:
        path = f"/kubernetes_operators/{await register(ask)}/bound_endpoints"
        first = json.loads((await ask("GET", path)).body)
        assert plane.remove_endpoint(ids[1]) == 1
        second = json.loads((await ask("GET", first["next_page_uri"])).body)

    assert [endpoint["url"] for endpoint in second["endpoints"]] == ["http://a.demo"]


async def test_endpoints_change_at_run_time(plane: ControlPlane) -> None:
    """Pools are one URL with several ids; any object at all can be listed."""
    plane.add_endpoint("http://pool.demo")
    kept = plane.add_endpoint("http://pool.demo", fields={"pooling_enabled": True, "proto": None})
    plane.add_endpoint("http://gone.demo")
    plane.add_object("zz_junk", {"url": 7})
    plane.remove_endpoint("http://gone.demo")
    async with asking(plane) as ask:
        page = json.loads((await ask("GET", f"/kubernetes_operators/{await register(ask)}/bound_endpoints")).body)

    junk, newer, older = page["endpoints"]
    assert junk == {"url": 7}
    assert (newer["id"], newer["pooling_enabled"], "proto" in newer) == (kept, True, False)
    assert older["url"] == newer["url"] == "http://pool.demo"
    assert older["bindings"] == ["kubernetes"]


async def test_a_script_fails_the_next_requests_one_by_one(plane: ControlPlane) -> None:
    """500, then rate limited, then sound again."""
    plane.script.extend([Fault(status=500), Fault.rate_limited(3), None])
    async with asking(plane) as ask:
        answers = [await ask("GET", "/kubernetes_operators") for _ in range(3)]

    assert [answer.status for answer in answers] == [500, 429, 200]
    assert answers[1].header("retry-after") == "3"
    assert json.loads(answers[1].body)["error_code"] == "ERR_NGROK_226"


async def test_a_rule_holds_until_it_is_lifted(plane: ControlPlane) -> None:
    """Rules match by method and part of the target."""
    plane.set_fault(Fault(status=502, body=b"<html>bad gateway</html>"), method="GET", path="operators")
    async with asking(plane) as ask:
        broken = await ask("GET", "/kubernetes_operators")
        other = await ask("POST", "/kubernetes_operators", registration())
        plane.set_fault(None)
        sound = await ask("GET", "/kubernetes_operators")

    assert (broken.status, broken.body) == (502, b"<html>bad gateway</html>")
    assert (other.status, sound.status) == (201, 200)


async def test_an_answer_may_be_lost_after_the_deed(plane: ControlPlane) -> None:
    """The operator exists, its daemon does not know it."""
    plane.script.append(Fault(status=503, carry_out=True))
    async with asking(plane) as ask:
        response = await ask("POST", "/kubernetes_operators", registration())

    assert response.status == 503
    assert len(plane.operators) == 1


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(raw=b"\x00\x01garbage\r\n\r\n"), "protocol"),
        (Fault(raw=b""), "closed"),
        (Fault(cut_after=0), "closed"),
        (Fault(cut_after=150), "truncated"),
        (Fault(endless=True), "body_too_large"),
        (Fault(body=b"x" * 2_000_000), "body_too_large"),
    ],
)
async def test_answers_are_spoiled_on_the_wire(plane: ControlPlane, fault: Fault, reason: str) -> None:
    """What the client must survive: each is seen by it for what it is."""
    plane.script.append(fault)
    async with asking(plane) as ask:
        with pytest.raises(HttpError) as caught:
            await ask("GET", "/kubernetes_operators")

        assert caught.value.reason == reason
        assert (await ask("GET", "/kubernetes_operators")).status == 200


async def test_delays_hangs_and_redirects(plane: ControlPlane, autojump_clock: trio.testing.MockClock) -> None:
    """Time is Trio's: a simulated clock jumps over it."""
    plane.script.extend([Fault(delay_s=20), Fault(hang=True), Fault.redirect("https://elsewhere.test/")])
    async with asking(plane) as ask:
        started = trio.current_time()
        assert (await ask("GET", "/kubernetes_operators")).status == 200
        assert trio.current_time() - started == pytest.approx(20)
        with pytest.raises(trio.TooSlowError):
            await ask("GET", "/kubernetes_operators")
        redirected = await ask("GET", "/kubernetes_operators")

    assert (redirected.status, redirected.header("location")) == (302, "https://elsewhere.test/")


async def test_an_outage_ends_connections_and_refuses_new_ones(plane: ControlPlane) -> None:
    """Also those in the middle of an answer; afterwards everything is as before."""
    plane.script.append(Fault(hang=True))
    async with asking(plane) as ask, trio.open_nursery() as nursery:

        async def cut() -> None:
            with pytest.raises(HttpError):
                await ask("GET", "/kubernetes_operators")

        nursery.start_soon(cut)
        await trio.testing.wait_all_tasks_blocked()
        plane.set_down(True)
        with pytest.raises(ConnectionRefusedError):
            await ask("GET", "/kubernetes_operators")
        plane.set_down(False)
        assert (await ask("GET", "/kubernetes_operators")).status == 200


async def test_requests_are_remembered_without_their_keys(plane: ControlPlane) -> None:
    """Assertions need to know who asked what; nobody needs the secret."""
    async with asking(plane) as ask:
        await ask("POST", "/kubernetes_operators", registration(), headers=(*HEADERS, ("user-agent", "test/1")))

    seen = plane.requests[0]
    assert (seen.method, seen.target) == ("POST", "/kubernetes_operators")
    assert seen.key_sha256 == sha256(DEFAULT_KEY.encode()).hexdigest()
    assert seen.headers["user-agent"] == "test/1"
    assert json.loads(seen.body)["description"] == "ngrokd daemon"
    assert DEFAULT_KEY not in repr(seen)


async def test_tls_is_real(plane: ControlPlane, clients: Authority) -> None:
    """A client with the CA gets through, one without it does not, and the plane survives both."""
    plane.set_identity(clients.issue(["api.lab.test"]))
    async with trio.open_nursery() as nursery:
        connect = plane.connector(nursery)

        async def ask(context: ssl.SSLContext) -> Response:
            stream = trio.SSLStream(
                await connect("api.lab.test", 443), context, server_hostname="api.lab.test", https_compatible=True
            )
            connection = HttpConnection(stream, "api.lab.test")
            try:
                await stream.do_handshake()
                return await connection.request("GET", "/kubernetes_operators", HEADERS)
            finally:
                await connection.aclose()

        with pytest.raises(trio.BrokenResourceError):
            await ask(ssl.create_default_context(cadata=Authority("foreign").root_pem.decode()))
        response = await ask(ssl.create_default_context(cadata=clients.root_pem.decode()))

    assert response.status == 200


async def test_sixty_thousand_endpoints_are_listed_quickly(plane: ControlPlane) -> None:
    """A /16 full of them: pages cost what is on them, not what is behind them."""
    plane.replace_endpoints([f"tcp://e{number}.demo:1" for number in range(60_000)])
    async with asking(plane) as ask:
        operator_id = await register(ask)
        target: str | None = f"/kubernetes_operators/{operator_id}/bound_endpoints"
        count = 0
        for _ in range(20):
            page = json.loads((await ask("GET", target)).body)
            count += len(page["endpoints"])
            target = page["next_page_uri"]

    assert count == 2000
