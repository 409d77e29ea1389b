"""What ngrok's API answers: pages, operators, errors; then the judgement of endpoints and the plan made of them.

The real decoders, fed with bodies instead of connections, since a connection adds only what `http1` is fuzzed for.

* whatever the bytes, `ApiError` is the only error, and its text fits a terminal and stays short;
* the key goes to one origin: a next page is asked for on the same scheme, host and port, or not at all;
* what is accepted as an endpoint matches a pattern written apart from the one that judged it; what is not has a reason;
* planning twice changes nothing, the order of the listing does not matter, a plan survives being written and read;
* the hosts file gets lines `ADDRESS<TAB>NAME`, each address once, and nothing else.
"""

# ruff: noqa: PT017 - what an error says is one of the invariants

from __future__ import annotations

import json
import math
import random
import re
import ssl
from ipaddress import IPv4Address, IPv4Network
from typing import Final
from urllib.parse import urlsplit

import trio

from fuzz.reading import Source
from ngrokd.cloud import api
from ngrokd.cloud.api import NgrokApi
from ngrokd.endpoints import BadEndpoint, parse_endpoint
from ngrokd.errors import ApiError
from ngrokd.http1 import Response, retry_after_s
from ngrokd.names import hosts
from ngrokd.names.addresses import AddressPool
from ngrokd.names.reconcile import NOTHING, Desired, denied, dump_endpoints, load_endpoints, plan, rows

CORPUS: Final = "api"
MAX_LEN: Final = 2000
TOKENS: Final = (
    b'"id":"e p"', b'{"endpoints":[', b'],"next_page_uri":', b'"id":"ep_1"', b'"url":"https://a.prod"',
    b'"public_url":', b'"proto":"http"', b'"name":', b'"description":', b"null", b"\\ud800", b"\\udc00", b"\\u0000",
    b"\\u202e", b"\xff", b"1e999", b"NaN", b"{}", b"[]", b"true", b'"tcp://b.prod:5432"', b'"http://a.prod"',
    b'"tls://a.prod:443/"', b"9" * 40, b"[[[[[[[[", b'"error_code":"ERR_NGROK_226"', b'"status_code":404',
    b'"msg":"', b'"binding":{"cert":{"cert":"-----BEGIN CERTIFICATE-----"', b'"ingress_endpoint":"a.b:443"',
    b'"not_before":"0001-01-01T00:00:00+23:59"', b"https://api.ngrok.com/x?before_id=1", b"//evil", b"/\\evil",
    b"localhost", b".local", b"xn--", b"10.0.0.1", b"*.a", b'"ip_mappings":', b"\\\\ud800",
)  # fmt: skip

HOST: Final = re.compile(r"(?=.{1,253}\Z)(?:[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?\.)*[a-z0-9]([a-z0-9-]*[a-z0-9])?")
NEVER: Final = re.compile(
    r"localhost|.*\.localhost|.*\.local|local|.*\.arpa|arpa|ip6-.*|(.*\.)?[0-9]+|api\.ngrok\.com|broadcasthost"
)
LINE: Final = re.compile(r"(10\.107\.0\.[0-9]{1,2})\t([a-z0-9_.-]{1,253})")
SUBNET: Final = IPv4Network("10.107.0.0/28")
REFUSED: Final = denied(machine=["this.host"], servers=["api.example"], hosts=hosts.survey(b"10.0.0.9 taken.prod\n"))
HOSTS: Final = (
    "a.prod", "b.prod", "A.Prod.", "c.d.e", "localhost", "taken.prod", "this.host", "api.ngrok.com", "10.0.0.1", "*.a",
    "h1", "h2.x", "h3.x", "h4.x", "h5.x", "h6.x", "h7.x", "h8.x", "h9.x", "ha.x", "hb.x", "hc.x", "hd.x", "he.x",
)  # fmt: skip
WHAT: Final = "listing"
STATUSES: Final = (200, 201, 204, 400, 401, 403, 404, 409, 429, 500, 502, 503, 301, 307, 418)


async def no_connection(_host: str, _port: int) -> trio.abc.Stream:
    raise OSError("there is no network here")


API: Final = NgrokApi(
    url="https://api.ngrok.com/prefix",
    key="KEY-CANARY",
    connect=no_connection,
    ssl_context=ssl.create_default_context(),
)


def run_one(data: bytes) -> None:
    """One body, as a page, an operator or an error."""
    source = Source(data)
    kind = source.byte()
    chance = source.byte()
    body = source.rest()
    if kind % 8 == 4:
        listing = build(Source(body))
        check_endpoints(listing)
        check_plan(listing, chance)
    elif kind % 8 == 7:
        check_error(body, STATUSES[chance % len(STATUSES)])
    elif kind % 8 == 6:
        check_operator(body)
    elif kind % 8 == 5:
        check_next(body.decode("utf-8", "surrogateescape"))
    else:
        listing = read_page(body)
        if listing:
            check_endpoints(listing)
            check_plan(listing, chance)
    check_retry(body)


def build(source: Source) -> list[object]:
    """A listing of valid JSON, out of few words, so that pools, quarrels about doors and repetitions are common."""
    listing: list[object] = []
    while source.more and len(listing) < 24:
        what = source.byte()
        port = source.pick(("", ":80", ":443", ":5432", ":0", ":65536"))
        host = source.pick(HOSTS) if what & 7 else source.take(source.byte() & 31).decode("utf-8", "surrogateescape")
        endpoint: dict[str, object] = {
            "id": source.pick(("ep_1", "ep_2", "ep_3", "ep_4", "", None, 7)),
            "public_url" if what & 8 else "url": source.pick(("http", "https", "tcp", "tls", "ftp", "HTTP"))
            + "://"
            + host
            + port,
        }
        if what & 16:
            endpoint["proto"] = source.pick(("http", "https", "tls", "TCP", "", None, "a b", 1))
        if what & 32:
            endpoint["name"] = source.take(source.byte() & 15).decode("latin-1")
        listing.append(endpoint if what & 192 != 192 else source.pick((None, 1, "x", [], {}, endpoint)))
    return listing


def read_page(body: bytes) -> list[object]:
    """As `NgrokApi._all_pages` reads it."""
    response = Response(200, (("content-type", body[:20].decode("latin-1")),), body)
    try:
        page = api._decode(api._PAGE, api._without_lone_surrogates(body), WHAT, response)
    except ApiError as error:
        check_message(error)
        return []
    listing = [api._fields_of(raw) for raw in page.endpoints or ()]
    for obj in listing:
        if isinstance(obj, dict):
            assert set(obj) <= set(api.ENDPOINT_FIELDS)
    if page.next_page_uri is not None:
        check_next(page.next_page_uri)
    return listing


def check_message(error: ApiError) -> None:
    text = str(error)
    assert text.isprintable(), repr(text)
    assert len(text) < 1000
    assert error.remedy.isprintable()
    assert error.code.isprintable()
    assert "KEY-CANARY" not in text


def check_next(uri: str) -> None:
    origin = API._origin
    try:
        target = origin.next_target("/prefix/kubernetes_operators/x/bound_endpoints?limit=1", uri, WHAT)
    except ApiError as error:
        check_message(error)
        return
    if target is None:
        assert not uri
        return
    assert target.startswith("/"), target
    assert target.isascii()
    assert target.isprintable()
    assert " " not in target
    parts = urlsplit(uri)
    assert parts.scheme in ("", "https")
    assert parts.hostname in (None, "api.ngrok.com", "api.ngrok.com.")
    assert parts.port in (None, 443)
    assert parts.username is None


def check_endpoints(listing: list[object]) -> None:
    for obj in listing:
        try:
            endpoint = parse_endpoint(obj)
        except BadEndpoint as error:
            assert str(error).isprintable()
            assert len(str(error)) < 400
            continue
        assert HOST.fullmatch(endpoint.host), endpoint.host
        assert all(1 <= len(label) <= 63 for label in endpoint.host.split("."))
        assert not NEVER.fullmatch(endpoint.host) or endpoint.host == "api.ngrok.com", endpoint.host
        assert 1 <= endpoint.port <= 65535
        assert endpoint.scheme in ("http", "https", "tcp", "tls")
        assert endpoint.host in endpoint.url.lower()
        for text in (endpoint.id, endpoint.url, endpoint.proto):
            assert text.isascii()
            assert text.isprintable()
            assert " " not in text
        assert endpoint.name.isprintable()
        assert endpoint.description.isprintable()


def check_plan(listing: list[object], chance: int) -> None:
    pool = AddressPool(SUBNET)
    first = plan(NOTHING, listing, pool, REFUSED, 1000.0, limit=10)
    desired = first.desired
    check_desired(desired, listing)
    again = plan(desired, listing, pool, REFUSED, 1030.0, limit=10)
    assert not again, again.summary()
    assert again.desired.services == desired.services
    assert again.desired.skipped == desired.skipped
    shuffled = list(listing)
    random.Random(chance).shuffle(shuffled)
    other = plan(NOTHING, shuffled, AddressPool(SUBNET), REFUSED, 1000.0, limit=10).desired
    assert other.services == desired.services, "the order of the listing matters"
    assert other.skipped == desired.skipped

    written = dump_endpoints(desired, 1000.0, "a.b:443")
    known = load_endpoints(written)
    assert known.problem == ""
    revived = plan(NOTHING, known.listing, pool, REFUSED, 1060.0, limit=10).desired
    assert revived.services == desired.services, "the last known state is another one"

    back = AddressPool.load(SUBNET, pool.dump_json(), pool.dump_state_json())
    assert back.problems == []
    assert back.dump() == pool.dump()
    gone = plan(desired, [], pool, REFUSED, 1090.0)
    assert gone.confirm == (desired.endpoint_count >= 3)
    left = plan(desired, [], pool, REFUSED, 1090.0, confirmed=True)
    assert left.desired.services == ()
    assert len(left.removed) == len(desired.services)


def check_desired(desired: Desired, listing: list[object]) -> None:
    assert desired.endpoint_count + len(desired.skipped) <= len(listing)
    assert len(desired.services) <= 10
    names: dict[str, IPv4Address] = {}
    for service in desired.services:
        host = service.endpoint.host
        assert HOST.fullmatch(host)
        assert not NEVER.fullmatch(host), host
        assert host not in ("this.host", "api.example", "taken.prod")
        assert names.setdefault(host, service.address) == service.address
        assert service.address in SUBNET
        assert int(service.address) & 15 not in (0, 1, 15)
        assert desired.directory.lookup((service.address.packed, service.endpoint.port)) == service.endpoint
    assert len(set(names.values())) == len(names), "two names share an address"
    for skipped in desired.skipped:
        assert skipped.id.isprintable()
        assert skipped.url.isprintable()
        assert skipped.reason.isprintable()
    listed = list(rows(desired))
    assert json.loads(json.dumps(listed)) == listed
    before = b"127.0.0.1\tlocalhost\n"
    text = hosts.render(before, desired.hosts_entries(), subnet=SUBNET).removeprefix(before).decode("ascii")
    if not names:
        assert text == ""
        return
    head, *lines, tail, end = text.split("\n")
    assert (head, tail, end) == ("# BEGIN ngrokd managed section", "# END ngrokd managed section", "")
    matches = [LINE.fullmatch(line) for line in lines]
    assert {match[2]: match[1] for match in matches if match} == {host: str(address) for host, address in names.items()}
    assert len(matches) == len(names)


def check_operator(body: bytes) -> None:
    try:
        operator = api._operator(Response(200, (), body), WHAT)
    except ApiError as error:
        check_message(error)
        return
    assert re.fullmatch(r"[\x21-\x7e]+", operator.id)
    assert "/" not in operator.id
    assert operator.ingress_endpoint == "" or re.fullmatch(r"[A-Za-z0-9._:\[\]-]+", operator.ingress_endpoint)
    assert operator.certificate_pem == b"" or b"BEGIN CERTIFICATE" in operator.certificate_pem
    for moment in (operator.not_before, operator.not_after):
        assert moment is None or math.isfinite(moment)


def check_error(body: bytes, status: int) -> None:
    headers = (("retry-after", body[:30].decode("latin-1")), ("location", body[-60:].decode("latin-1")))
    try:
        API._check(Response(status, headers, body), WHAT)
    except ApiError as error:
        check_message(error)
        assert error.status == status
        assert error.retry_after_s is None or error.retry_after_s >= 0
        api.trouble_of(error)
    else:
        assert status in (200, 201, 204)


def check_retry(body: bytes) -> None:
    waiting = retry_after_s(body[:80].decode("latin-1"), 1_700_000_000.0)
    assert waiting is None or (waiting >= 0 and math.isfinite(waiting))


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
