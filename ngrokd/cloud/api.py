"""ngrok's API: Kubernetes operators, their certificates, and the endpoints bound to them.

What comes back is hostile until it has been looked at, and the key that goes out is worth stealing. So:

* The key goes to one origin (scheme, host, port). Redirects are refused; a `next_page_uri` that names another origin
  discards the listing; plain HTTP is accepted for loopback addresses only. No error, log line or repr holds the key.
* A listing is whole or it is nothing: a page that fails, loops or cannot be read discards what came before, because
  half a listing would remove the other half's names from the machine.
* Everything is bounded: bytes over all pages, pages, characters that make JSON expensive, and time, which is counted
  over connect, handshake, request and body together, so that dribbling gains nothing.
* We are strict about the fields we use and blind to the others. One endpoint that makes no sense is handed on as it
  is: whoever parses endpoints skips it with a reason, and the others live.

Answers arrive as raw JSON objects with the wanted fields only. 65,000 endpoints are 64 MiB of JSON; as whole dicts they
would be four times that.
"""

from __future__ import annotations

import json
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any, Final, TypedDict, TypeVar
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import msgspec
import trio

from ngrokd.cloud.backoff import Trouble
from ngrokd.cloud.identity import is_operator_id
from ngrokd.endpoints import Secret, printable
from ngrokd.errors import ApiError, ConfigError
from ngrokd.http1 import HttpConnection, HttpError, Response, retry_after_s

TIMEOUT_S: Final = 30.0
CONNECT_TIMEOUT_S: Final = 10.0  # of which this much for TCP and TLS
LISTING_TIMEOUTS: Final = 10  # a whole listing may take this many times the limit of one request
LISTING_BYTES: Final = 64 * 1024 * 1024
ANSWER_BYTES: Final = 1024 * 1024  # of anything that is not a listing
ENVELOPE_BYTES: Final = 64 * 1024  # of an error; a longer one is not looked into
PAGES: Final = 10_000
ENDPOINTS: Final = 262_144  # what is beyond the size of the subnet is sorted out later, with reasons; this is absurd
SLICE: Final = 1000  # endpoints read between two moments in which others run: a millisecond
STRUCTURE: Final = 3_000_000  # commas and opening brackets in a listing; 65,533 endpoints of 30 fields have two million

_DESCRIPTION: Final = "ngrokd daemon"
_METADATA: Final = '{"type":"forward-proxy"}'
_OPERATORS: Final = "/kubernetes_operators"
_API_VERSION: Final = "2"

Connect = Callable[[str, int], Awaitable[trio.abc.Stream]]
Key = str | Secret

_T = TypeVar("_T")


class KeyRefusedError(ApiError):
    """There is no API key, or ngrok does not accept it: asking again does not help, another key does."""


class OperatorGoneError(ApiError):
    """ngrok itself says that it knows no such operator. (A 404 that is not in ngrok's form is an ordinary ApiError.)"""


@dataclass(frozen=True, slots=True)
class Operator:
    """An operator as ngrok describes it.

    Attributes:
        id: fit to be a file's content and a part of URLs.
        certificate_pem: empty where none was issued yet; never empty from `register` and `renew`.
        ingress_endpoint: HOST:PORT of the ingress, "" where ngrok named none that can be one.
        not_before: of the certificate as ngrok tells it, Unix seconds; None when it does not. The certificate rules.
        not_after: likewise.
        selectors: which endpoints it is for; () where ngrok does not tell.
    """

    id: str
    certificate_pem: bytes = b""
    ingress_endpoint: str = ""
    not_before: float | None = None
    not_after: float | None = None
    selectors: tuple[str, ...] = ()


def trouble_of(error: ApiError) -> Trouble:
    """How a failure is waited out: what ngrok refuses on purpose does not get better within seconds."""
    refused = isinstance(error, KeyRefusedError) or error.status in _REFUSALS
    return Trouble.REFUSED if refused else Trouble.PASSING


def api_ssl_context(ca_pem: bytes | None = None) -> ssl.SSLContext:
    """A verifying client context: the system's roots, and `ca_pem` beside them.

    Raises:
        ConfigError: `ca_pem` holds no certificate.
    """
    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT  # from Python 3.13 on; refuses many private authorities
    if ca_pem is not None:
        try:
            context.load_verify_locations(cadata=ca_pem.decode("ascii"))
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(
                "the file of api.ca_file holds no certificate", remedy="put a PEM certificate there"
            ) from error
    return context


class NgrokApi:
    """The calls the daemon makes. Each raises ApiError and nothing else; none logs.

    Cancelled, a call that changes something may or may not have been carried out.

    Args:
        url: https://HOST[:PORT][/PREFIX]; http:// for loopback hosts.
        key: the API key, or a function that returns the present one.
        connect: opens a TCP connection, raising OSError.
        ssl_context: from `api_ssl_context`.
        timeout_s: for one request, everything included.
        user_agent: "ngrokd/VERSION".
        now: Unix seconds, for the dates in Retry-After.

    Attributes:
        last_date: the Date header of the last answer, "" where it had none; not parsed.

    Raises:
        ConfigError: the URL cannot be used.
    """

    def __init__(
        self,
        *,
        url: str,
        key: Key | Callable[[], Key],
        connect: Connect,
        ssl_context: ssl.SSLContext,
        timeout_s: float = TIMEOUT_S,
        user_agent: str = "ngrokd",
        now: Callable[[], float] = time.time,
    ) -> None:
        self._origin = _Origin.parse(url)
        self._key = key
        self._connect = connect
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s
        self._user_agent = user_agent
        self._now = now
        self.last_date = ""

    def __repr__(self) -> str:
        return f"NgrokApi({self._origin.text!r})"

    def configure(self, ssl_context: ssl.SSLContext, timeout_s: float) -> None:
        """Ask so from now on; see the arguments of the class. What is being asked goes on as it began."""
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s

    async def register(self, csr_pem: bytes, selectors: Sequence[str] = ("true",)) -> Operator:
        """Create an operator and have its certificate issued.

        Never repeated by itself: each success is one more operator at ngrok.
        """
        body = {
            "description": _DESCRIPTION,
            "metadata": _METADATA,
            "enabled_features": ["bindings"],
            "region": "global",
            "binding": {"endpoint_selectors": list(selectors), "csr": csr_pem.decode("ascii")},
        }
        what = "registering an operator"
        operator = _operator(await self._one("POST", _OPERATORS, what, body), what)
        if not operator.certificate_pem:
            await self._roll_back(operator.id)
            raise ApiError(f"{what}: ngrok issued no certificate for operator {operator.id}")
        return operator

    async def renew(self, operator_id: str, csr_pem: bytes) -> Operator:
        """Have another certificate issued for an operator. OperatorGoneError when ngrok does not know it."""
        what = f"renewing the certificate of operator {operator_id}"
        body = {"binding": {"csr": csr_pem.decode("ascii")}}
        operator = _operator(await self._one("PATCH", _operator_path(operator_id), what, body), what)
        if operator.id != operator_id:
            raise ApiError(f"{what}: ngrok answered with operator {operator.id}")
        if not operator.certificate_pem:
            raise ApiError(f"{what}: ngrok issued no certificate")
        return operator

    async def select(self, operator_id: str, selectors: Sequence[str]) -> None:
        """Say which endpoints an operator is for. OperatorGoneError when ngrok does not know it."""
        what = f"changing the selectors of operator {operator_id}"
        await self._one(
            "PATCH", _operator_path(operator_id), what, {"binding": {"endpoint_selectors": list(selectors)}}
        )

    async def get_operator(self, operator_id: str) -> Operator:
        """Ask about an operator. OperatorGoneError when ngrok does not know it."""
        what = f"asking for operator {operator_id}"
        return _operator(await self._one("GET", _operator_path(operator_id), what), what)

    async def delete_operator(self, operator_id: str) -> None:
        """Delete an operator; one that is gone already is as good."""
        with suppress(OperatorGoneError):
            await self._one("DELETE", _operator_path(operator_id), f"deleting operator {operator_id}")

    async def check_key(self, key: Key | None = None) -> None:
        """Ask something cheap that needs a valid key.

        Args:
            key: the one to check; None: the present one.

        Raises:
            KeyRefusedError: it is not valid.
            ApiError: nobody knows.
        """
        what = "checking the API key"
        response = await self._one("GET", f"{_OPERATORS}?limit=1", what, key=key)
        _decode(_KEY_CHECK, response.body, what, response)

    async def bound_endpoints(self, operator_id: str) -> list[object]:
        """List the endpoints bound to an operator, all pages of it.

        Returns:
            One object per endpoint in ngrok's order: a dict of those fields among `ENDPOINT_FIELDS` that are there,
            whatever their types, or, where ngrok sent something else than an object, that.

        Raises:
            OperatorGoneError: ngrok does not know the operator.
            ApiError: some page failed; nothing is known.
        """
        what = "listing the bound endpoints"
        with trio.move_on_after(self._timeout_s * LISTING_TIMEOUTS):
            return await self._all_pages(f"{_operator_path(operator_id)}/bound_endpoints", what)
        raise ApiError(f"{what}: not finished after {self._timeout_s * LISTING_TIMEOUTS:g} s")

    async def _all_pages(self, path: str, what: str) -> list[object]:
        endpoints: list[object] = []
        target: str | None = self._origin.prefix + path
        seen: set[str] = set()
        bytes_left = LISTING_BYTES
        structure_left = STRUCTURE
        async with self._session() as session:
            while target is not None:
                if len(seen) >= PAGES:
                    raise ApiError(f"{what}: more than {PAGES} pages")
                seen.add(target)
                response = await session.call("GET", target, what, body_limit=bytes_left)
                self._check(response, what)
                bytes_left -= len(response.body)
                structure_left -= sum(map(response.body.count, (b",", b"{", b"[")))
                if structure_left < 0:
                    raise ApiError(f"{what}: the answer has more than {STRUCTURE} fields")
                page = _decode(_PAGE, _without_lone_surrogates(response.body), what, response)
                if not page.endpoints:
                    break
                if len(endpoints) + len(page.endpoints) > ENDPOINTS:
                    raise ApiError(f"{what}: more than {ENDPOINTS} endpoints")
                for start in range(0, len(page.endpoints), SLICE):
                    endpoints.extend(map(_fields_of, page.endpoints[start : start + SLICE]))
                    await trio.lowlevel.checkpoint()
                target = self._origin.next_target(target, page.next_page_uri, what)
                if target in seen:
                    raise ApiError(f"{what}: the pages run in a circle")
        return endpoints

    async def _one(
        self, method: str, path: str, what: str, body: Mapping[str, object] | None = None, *, key: Key | None = None
    ) -> Response:
        async with self._session(key) as session:
            target = self._origin.prefix + path
            encoded = b"" if body is None else msgspec.json.encode(body)
            response = await session.call(method, target, what, encoded, body_limit=ANSWER_BYTES)
        self._check(response, what)
        return response

    async def _roll_back(self, operator_id: str) -> None:
        with suppress(ApiError):  # the first error is the one to tell
            await self.delete_operator(operator_id)

    @asynccontextmanager
    async def _session(self, key: Key | None = None) -> AsyncIterator[_Session]:
        headers = self._headers(key)
        session = _Session(self._origin, self._connect, self._ssl_context, self._timeout_s, headers)
        try:
            yield session
        finally:
            await session.aclose()

    def _headers(self, key: Key | None) -> tuple[tuple[str, str], ...]:
        if key is None:
            key = self._key() if callable(self._key) else self._key
        text = key.reveal() if isinstance(key, Secret) else key
        if not text:
            raise KeyRefusedError("there is no API key", remedy=_SET_KEY)
        if _KEY.fullmatch(text) is None:
            raise KeyRefusedError(
                "the API key holds blanks or characters that no key has",
                status=HTTPStatus.UNAUTHORIZED,
                remedy=_SET_KEY,
            )
        return (
            ("authorization", f"Bearer {text}"),
            ("ngrok-version", _API_VERSION),
            ("user-agent", self._user_agent),
            ("accept", "application/json"),
        )

    def _check(self, response: Response, what: str) -> None:
        """Raise what an answer other than 2xx means."""
        self.last_date = response.header("date") or ""
        status = response.status
        if status in (HTTPStatus.OK, HTTPStatus.CREATED, HTTPStatus.NO_CONTENT):
            return
        if 300 <= status < 400:
            location = printable(response.header("location") or "nowhere", 100)
            raise ApiError(
                f"{what}: {self._origin.text} redirects to {location} (HTTP {status});"
                " that is not followed, because the API key would go there",
                status=status,
                remedy="check api.url, and what stands between this machine and ngrok",
            )
        envelope = _envelope_of(response)
        wait_s = retry_after_s(response.header("retry-after"), self._now())
        message = f"{what}: {envelope.text}"
        if envelope.code in _REMEDIES:
            remedy = _REMEDIES[envelope.code]
            refused = status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN)
        elif status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            remedy, refused = f"the API key is invalid or was revoked: {_SET_KEY}", True
        else:
            remedy, refused = _STATUS_REMEDIES.get(status, ""), False
        kind = ApiError
        if refused:
            kind = KeyRefusedError
        elif status == HTTPStatus.NOT_FOUND and envelope.from_ngrok:
            kind = OperatorGoneError
        raise kind(message, status=status, code=envelope.code, retry_after_s=wait_s, remedy=remedy)


class _Session:
    """Requests on one connection, for as long as the server keeps it; invariant: at most one connection is open."""

    def __init__(
        self,
        origin: _Origin,
        connect: Connect,
        ssl_context: ssl.SSLContext,
        timeout_s: float,
        headers: tuple[tuple[str, str], ...],
    ) -> None:
        self._origin = origin
        self._connect = connect
        self._ssl_context = ssl_context
        self._timeout_s = timeout_s
        self._headers = headers
        self._connection: HttpConnection | None = None

    async def call(self, method: str, target: str, what: str, body: bytes = b"", *, body_limit: int) -> Response:
        headers = (*self._headers, ("content-type", "application/json")) if body else self._headers
        where = self._origin.text
        try:
            with trio.move_on_after(self._timeout_s):
                connection = self._connection
                if connection is not None and connection.reusable:
                    try:
                        return await connection.request(method, target, headers, body, body_limit=body_limit)
                    except HttpError as error:
                        if not error.unanswered or method != "GET":
                            raise
                        # The server closed it while it was idle, as servers may; the request was not seen.
                connection = await self._open(what)
                return await connection.request(method, target, headers, body, body_limit=body_limit)
        except HttpError as error:
            raise ApiError(f"{what}: {where}: {error}", remedy=error.remedy) from error
        raise ApiError(f"{what}: no whole answer from {where} within {self._timeout_s:g} s", remedy=_CHECK_NETWORK)

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with trio.move_on_after(1):
                await connection.aclose()

    async def _open(self, what: str) -> HttpConnection:
        await self.aclose()
        origin = self._origin
        limit_s = min(CONNECT_TIMEOUT_S, self._timeout_s)
        with trio.move_on_after(limit_s):
            try:
                stream = await self._connect(origin.host, origin.port)
            except OSError as error:
                raise ApiError(
                    f"{what}: cannot reach {origin.text}: {_os_reason(error)}", remedy=_CHECK_NETWORK
                ) from error
            if origin.secure:
                stream = await self._secured(stream, what)
            self._connection = HttpConnection(stream, origin.host_header)
            return self._connection
        raise ApiError(f"{what}: cannot reach {origin.text}: no connection within {limit_s:g} s", remedy=_CHECK_NETWORK)

    async def _secured(self, stream: trio.abc.Stream, what: str) -> trio.abc.Stream:
        secured = trio.SSLStream(stream, self._ssl_context, server_hostname=self._origin.host, https_compatible=True)
        done = False
        try:
            await secured.do_handshake()
            done = True
        except trio.BrokenResourceError as error:
            cause = error.__cause__
            if isinstance(cause, ssl.SSLCertVerificationError):
                raise ApiError(
                    f"{what}: the certificate of {self._origin.text} is not trusted: {printable(cause.verify_message)}",
                    remedy="if a proxy or an API of your own answers there, name its authority in api.ca_file",
                ) from error
            reason = printable(str(cause)) if cause is not None else "the connection broke"
            raise ApiError(f"{what}: no TLS with {self._origin.text}: {reason}", remedy=_CHECK_NETWORK) from error
        finally:
            if not done:
                await trio.aclose_forcefully(stream)
        return secured


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the key may go. Invariant: whatever target we ask for, it is asked of this scheme, host and port."""

    secure: bool
    host: str
    port: int
    prefix: str

    @classmethod
    def parse(cls, url: str) -> _Origin:
        parts = _split(url)
        if parts is None:
            raise ConfigError(f"api.url {printable(url)!r} is not a URL", remedy=_URL_REMEDY)
        scheme, host, port = _origin_of(parts)
        if not host or scheme not in ("http", "https"):
            raise ConfigError(f"api.url {printable(url)!r} is not https://HOST", remedy=_URL_REMEDY)
        if parts.username is not None or parts.query or parts.fragment:
            raise ConfigError(f"api.url {printable(url)!r} has more than host, port and path", remedy=_URL_REMEDY)
        if scheme == "http" and not _is_loopback(host):
            raise ConfigError(
                f"api.url {printable(url)!r} would send the API key unprotected: http is for loopback addresses",
                remedy=_URL_REMEDY,
            )
        return cls(scheme == "https", host, port, parts.path.rstrip("/"))

    @property
    def text(self) -> str:
        return f"{'https' if self.secure else 'http'}://{self.host_header}"

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"

    def next_target(self, target: str, uri: str | None, what: str) -> str | None:
        """Resolve `next_page_uri` against the page it came with; None when there is none."""
        if not uri:
            return None
        parts = _split(uri, base=self.text + target)
        if parts is None or parts.username is not None:
            raise ApiError(f"{what}: the next page {printable(uri, 100)!r} is not a URI")
        if _origin_of(parts) != ("https" if self.secure else "http", self.host, self.port):
            raise ApiError(
                f"{what}: the next page {printable(uri, 100)!r} is not on {self.text}: not asked for,"
                " because the API key would go there"
            )
        return f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"


# What we read of the answers. Unknown fields are skipped without being built.


class _EndpointFields(TypedDict, total=False):
    id: Any  # Any: the types are judged, with a reason, by whoever parses endpoints
    url: Any
    public_url: Any
    proto: Any
    name: Any
    description: Any


ENDPOINT_FIELDS: Final = tuple(_EndpointFields.__annotations__)


class _Page(msgspec.Struct):
    endpoints: list[msgspec.Raw] | None  # null: how Go's encoder writes an empty list
    next_page_uri: str | None = None


class _KeyCheck(msgspec.Struct):
    operators: list[msgspec.Raw] | None


class _Certificate(msgspec.Struct):
    cert: str | None = None
    not_before: object = None
    not_after: object = None


class _Binding(msgspec.Struct):
    cert: _Certificate | None = None
    ingress_endpoint: str | None = None
    endpoint_selectors: object = None


class _Operator(msgspec.Struct):
    id: str
    binding: _Binding | None = None


class _EnvelopeFields(msgspec.Struct):
    error_code: object = None
    status_code: object = None
    msg: object = None
    details: object = None


_PAGE: Final = msgspec.json.Decoder(_Page)
_KEY_CHECK: Final = msgspec.json.Decoder(_KeyCheck)
_OPERATOR: Final = msgspec.json.Decoder(_Operator)
_ENVELOPE: Final = msgspec.json.Decoder(_EnvelopeFields)
_ENDPOINT: Final = msgspec.json.Decoder(_EndpointFields)
# What decoders raise on hostile input; RecursionError on deep nesting, ValueError covers Unicode and huge integers.
_UNDECODABLE: Final = (msgspec.DecodeError, ValueError, RecursionError)


def _decode(decoder: msgspec.json.Decoder[_T], body: bytes, what: str, response: Response) -> _T:
    try:
        return decoder.decode(body)
    except _UNDECODABLE as error:
        kind = printable(response.header("content-type") or "no content type", 60)
        raise ApiError(
            f"{what}: the answer (HTTP {response.status}, {kind}, {len(body)} bytes) is not what ngrok answers:"
            f" {printable(str(error), 120)}",
            status=response.status,
            remedy="check api.url, and what stands between this machine and ngrok",
        ) from error


def _without_lone_surrogates(body: bytes) -> bytes:
    """Half a surrogate pair is grammatical JSON and no text: one description with it must not cost all endpoints."""
    if len(body) > _REPAIRABLE or (b"\\ud" not in body and b"\\uD" not in body):
        return body
    return _ESCAPE.sub(lambda match: b"\\ufffd" if match["lone"] else match[0], body)


def _fields_of(raw: msgspec.Raw) -> object:
    try:
        return _ENDPOINT.decode(raw)
    except _UNDECODABLE:
        pass
    # Not an object, not UTF-8, or a number beyond all numbers: let the parser of endpoints say what is wrong.
    text = bytes(raw)
    try:
        value = json.loads(text)
    except _UNDECODABLE:
        return printable(text[:200].decode("utf-8", "replace"))
    return {name: value[name] for name in ENDPOINT_FIELDS if name in value} if isinstance(value, dict) else value


def _operator(response: Response, what: str) -> Operator:
    answer = _decode(_OPERATOR, response.body, what, response)
    if not is_operator_id(answer.id):
        raise ApiError(f"{what}: the operator's id {printable(answer.id, 60)!r} cannot be one", status=response.status)
    binding = answer.binding or _Binding()
    certificate = binding.cert or _Certificate()
    pem = certificate.cert or ""
    if pem and not (pem.isascii() and "-----BEGIN CERTIFICATE-----" in pem):
        raise ApiError(f"{what}: the certificate is not PEM", status=response.status)
    ingress = binding.ingress_endpoint or ""
    return Operator(
        answer.id,
        pem.encode("ascii"),
        ingress if _is_authority(ingress) else "",
        _unix_seconds(certificate.not_before),
        _unix_seconds(certificate.not_after),
        _texts(binding.endpoint_selectors),
    )


def _texts(value: object) -> tuple[str, ...]:
    """A list of texts, () for anything else."""
    is_list = isinstance(value, list) and all(isinstance(item, str) for item in value)
    return tuple(value) if is_list and isinstance(value, list) else ()


@dataclass(frozen=True, slots=True)
class _Envelope:
    """An error as ngrok words it, or as much of it as there was.

    Attributes:
        from_ngrok: it is in ngrok's form, so the verdict is ngrok's and not that of something on the way.
    """

    text: str
    code: str
    from_ngrok: bool


def _envelope_of(response: Response) -> _Envelope:
    status = response.status
    phrase = HTTPStatus(status).phrase if status in _STATUSES else ""
    shown_status = f"HTTP {status} {phrase}".rstrip()
    try:
        fields = _ENVELOPE.decode(response.body if len(response.body) <= ENVELOPE_BYTES else b"")
    except _UNDECODABLE:
        kind = printable(response.header("content-type") or "no content type", 60)
        return _Envelope(f"{shown_status} (not in ngrok's words: {kind})", "", from_ngrok=False)
    code = fields.error_code if isinstance(fields.error_code, str) and _CODE.fullmatch(fields.error_code) else ""
    message = " ".join(fields.msg.split()) if isinstance(fields.msg, str) else ""
    operation = fields.details.get("operation_id") if isinstance(fields.details, dict) else None
    if not isinstance(operation, str) or not operation:
        operation = response.header("ngrok-operation-id") or ""
    extras = [code, shown_status, f"operation {printable(operation, 60)}" if operation else ""]
    text = f"{printable(message, 300) or 'refused'} ({', '.join(extra for extra in extras if extra)})"
    return _Envelope(text, code, from_ngrok=bool(code) or fields.status_code == status)


_REPAIRABLE: Final = 4 * 1024 * 1024  # bytes; a page of a hundred endpoints has a tenth of a megabyte
_ESCAPE: Final = re.compile(  # each escape of a JSON text, so that an escaped backslash is not taken for the next one's
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\.",
    re.DOTALL,
)
_CODE: Final = re.compile(r"[A-Z][A-Z0-9_]{0,63}")
_KEY: Final = re.compile(r"[\x21-\x7e]{1,4096}")
_URI: Final = re.compile(r"[\x21-\x5b\x5d-\x7e]{1,8192}")  # printable ASCII without blanks and backslash
_AUTHORITY: Final = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::([0-9]{1,5}))?")
_LOOPBACK_V4: Final = re.compile(r"127(?:\.(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])){3}")
_REFUSALS: Final = frozenset({400, 401, 402, 403, 409, 422})
_STATUSES: Final = frozenset(status.value for status in HTTPStatus)

_SET_KEY: Final = "set another with: ngrokd set-api-key"
_CHECK_NETWORK: Final = "check this machine's network, name resolution and firewall; it is asked again by itself"
_URL_REMEDY: Final = 'write api.url = "https://api.ngrok.com"'
_REMEDIES: Final[Mapping[str, str]] = {
    # "Failed to validate Kubernetes Operator! Reason: ..."
    "ERR_NGROK_19002": "check that kubernetes bindings are enabled for this ngrok account, and api.selectors",
    "ERR_NGROK_225": "too many requests at once with this account: it is asked again by itself",
    "ERR_NGROK_226": "too many requests with this account: it is asked again by itself; raise api.poll_interval",
}
_STATUS_REMEDIES: Final[Mapping[int, str]] = {
    HTTPStatus.NOT_FOUND: "if the operator was deleted at ngrok, it is registered again by itself",
    HTTPStatus.TOO_MANY_REQUESTS: "it is asked again by itself; raise api.poll_interval",
}


def _operator_path(operator_id: str) -> str:
    return f"{_OPERATORS}/{quote(operator_id, safe='')}"


def _split(uri: str, *, base: str = "") -> SplitResult | None:
    """The parts of a URI, relative to `base`; None when it is none."""
    if _URI.fullmatch(uri) is None:  # urlsplit would silently drop tabs and newlines
        return None
    try:
        parts = urlsplit(urljoin(base, uri))
        _ = parts.port  # raises when it is none
    except ValueError:
        return None
    return parts


def _origin_of(parts: SplitResult) -> tuple[str, str, int]:
    default = {"http": 80, "https": 443}.get(parts.scheme, 0)
    return parts.scheme, (parts.hostname or "").rstrip("."), default if parts.port is None else parts.port


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or _LOOPBACK_V4.fullmatch(host) is not None


def _is_authority(text: str) -> bool:
    match = _AUTHORITY.fullmatch(text)
    return match is not None and (match[1] is None or 1 <= int(match[1]) <= 65535)


def _unix_seconds(value: object) -> float | None:
    if not isinstance(value, str):
        return None
    try:
        date = datetime.fromisoformat(value)
    except ValueError:
        return None
    return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()


def _os_reason(error: OSError) -> str:
    """The first concrete reason: Trio collects the failures of all of a name's addresses in a group."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        elif isinstance(cause, OSError) and cause.strerror:
            return printable(cause.strerror)
        else:
            cause = cause.__cause__
    return printable(str(error)) or type(error).__name__
