"""ngrok's API in miniature: Kubernetes operators, their certificates, and the endpoints bound to them.

    POST   /kubernetes_operators                         register: signs the CSR
    GET    /kubernetes_operators                         list, page by page
    GET    /kubernetes_operators/ID                      one
    PATCH  /kubernetes_operators/ID                      edit; a new CSR renews the certificate
    DELETE /kubernetes_operators/ID
    GET    /kubernetes_operators/ID/bound_endpoints      list, page by page

Lists are sorted by id, newest first, as ngrok's are: `before_id` names the last id of the page before, which need not
exist any more. Whatever a client does wrong is answered with ngrok's error envelope. Whatever the lab shall do wrong
is a `Fault`, given by request (`script`) or by rule (`set_fault`).

Everything a test may want to see or change is a plain attribute: `endpoints`, `operators`, `keys`, `requests`.
The wall clock is injected; certificates of clients are dated by it.
"""

from __future__ import annotations

import hashlib
import json
import math
import ssl
from bisect import bisect_left
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Final
from urllib.parse import parse_qs, urlsplit

import msgspec
import trio
import trio.testing
from trio.abc import Stream

from ngrokd.http1 import Request, Response, ServerLimits, serve_connection
from ngrokd.lab.ca import Authority, BadCsr, Identity, load_identity

DEFAULT_KEY: Final = "lab-api-key"
CLIENT_CERTIFICATE_LIFETIME_S: Final = 90 * 86400.0
PAGE_SIZE: Final = 100  # what ngrok's API gives when no limit is asked for, and the most it gives
_REQUESTS_KEPT: Final = 10_000
_LIMITS: Final = ServerLimits(write_s=math.inf)  # an endless answer is given for as long as somebody reads it


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to go wrong. The first field that is set decides; `delay_s` and `hang` come before any of them.

    Attributes:
        status: answer with this status and ngrok's envelope; 0 leaves the answer as it would have been.
        code: ngrok's error code in the envelope.
        message: the text in the envelope.
        headers: additional ones, such as ("Retry-After", "3") or ("Location", "...").
        body: the answer's body instead of the envelope, whatever it is.
        delay_s: wait before answering.
        hang: never answer.
        raw: these bytes instead of an HTTP answer, then the end of the connection.
        cut_after: only so many bytes of the HTTP answer, then the end of the connection.
        endless: an answer without end, for as long as somebody reads it.
        carry_out: False refuses before anything is done; True does it first, so that the client does not learn of
            its success (an operator is registered, the answer is lost).
    """

    status: int = 0
    code: str = ""
    message: str = "the lab was told to fail"
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes | None = None
    delay_s: float = 0.0
    hang: bool = False
    raw: bytes | None = None
    cut_after: int | None = None
    endless: bool = False
    carry_out: bool = False

    @classmethod
    def rate_limited(cls, retry_after_s: float | None = None) -> Fault:
        """429 with ngrok's code, and Retry-After where given."""
        headers = () if retry_after_s is None else (("Retry-After", f"{retry_after_s:g}"),)
        return cls(status=429, code="ERR_NGROK_226", message="You have been rate limited.", headers=headers)

    @classmethod
    def redirect(cls, location: str) -> Fault:
        """302 to somewhere else."""
        return cls(status=302, headers=(("Location", location),), body=b"")


@dataclass(frozen=True, slots=True)
class _Rule:
    fault: Fault
    method: str
    path: str


@dataclass(frozen=True, slots=True)
class SeenRequest:
    """A request as it came.

    Attributes:
        at: Trio's clock, seconds.
        method: as sent.
        target: path and query, as sent.
        key_sha256: SHA-256 of the Bearer key, hex; "" without one. The key itself is kept nowhere.
        headers: lower-case names; without Authorization.
        body: the bytes.
    """

    at: float
    method: str
    target: str
    key_sha256: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class BoundEndpoint:
    """An endpoint as ngrok lists it; `fields` overrides or adds fields, None values drop them."""

    id: str
    url: str
    fields: Mapping[str, object] = field(default_factory=dict)

    def as_object(self) -> dict[str, object]:
        """The API's object."""
        parts = urlsplit(self.url)
        try:
            port = parts.port
        except ValueError:
            port = None
        port = port or {"http": 80, "https": 443}.get(parts.scheme, 0)
        host = parts.hostname or ""
        endpoint: dict[str, object] = {
            "id": self.id,
            "region": "us",
            "created_at": "2026-01-01T00:00:00Z",
            "updated_at": "2026-01-01T00:00:00Z",
            "public_url": self.url,
            "url": self.url,
            "proto": parts.scheme,
            "scheme": parts.scheme,
            "host": host,
            "port": port,
            "hostport": f"{host}:{port}",
            "type": "cloud",
            "metadata": "",
            "description": "",
            "bindings": ["kubernetes"],
            "uri": f"https://api.ngrok.com/endpoints/{self.id}",
            "pooling_enabled": False,
        }
        endpoint.update(self.fields)
        return {key: value for key, value in endpoint.items() if value is not None}


@dataclass(slots=True)
class Operator:
    """A registered operator. `certificates` holds the serial numbers of all it was given, oldest first."""

    id: str
    description: str
    metadata: str
    region: str
    enabled_features: list[str]
    endpoint_selectors: list[str]
    deployment: object
    created_at: float
    updated_at: float
    certificate_pem: str = ""
    not_before: int = 0
    not_after: int = 0
    csr_pem: str = ""
    certificates: list[int] = field(default_factory=list)


class _Refusal(Exception):  # noqa: N818 - an answer
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ControlPlane:
    """The API. One value holds its whole state; `serve` may be called for any number of connections.

    Args:
        clients: signs the operators' certificates.
        wall: Unix seconds, for dates.
        identity: the certificate of the API itself; None serves plain HTTP.
        ingress_endpoint: what operators are told to dial, `HOST:PORT`.

    Attributes:
        endpoints: id to endpoint (or to any object at all, listed as it is); change it through the methods, or call
            `touch` afterwards.
        operators: id to operator.
        keys: the API keys that are accepted.
        requests: what came in, oldest first.
        script: faults for the next requests, one each, None for a sound answer.
        page_size: endpoints and operators on one page, at most PAGE_SIZE.
        absolute_next_uri: whether `next_page_uri` names scheme and host.
        empty_last_page: whether lists end with an empty page instead of a `next_page_uri` of null.
        certificate_lifetime_s: of the certificates signed from now on.
        backdate_s: how long before now a certificate begins to be valid.
    """

    def __init__(
        self,
        clients: Authority,
        *,
        wall: Callable[[], float],
        identity: Identity | None = None,
        ingress_endpoint: str = "kubernetes-binding-ingress.ngrok.io:443",
    ) -> None:
        self._clients = clients
        self._wall = wall
        self.ingress_endpoint = ingress_endpoint
        self.endpoints: dict[str, object] = {}
        self.operators: dict[str, Operator] = {}
        self.keys: set[str] = {DEFAULT_KEY}
        self.requests: deque[SeenRequest] = deque(maxlen=_REQUESTS_KEPT)
        self.request_count = 0
        self.connection_count = 0
        self.script: deque[Fault | None] = deque()
        self.page_size = PAGE_SIZE
        self.absolute_next_uri = False
        self.empty_last_page = False
        self.certificate_lifetime_s = CLIENT_CERTIFICATE_LIFETIME_S
        self.backdate_s = 60.0
        self._rules: list[_Rule] = []
        self._next_id = 1
        self._sorted: list[str] | None = None
        self._encoded: dict[str, bytes] = {}
        self._live: set[trio.CancelScope] = set()
        self.down = False
        self.set_identity(identity)

    # -- what tests turn ---------------------------------------------------------------------------------------

    def set_identity(self, identity: Identity | None) -> None:
        """Present another certificate from the next connection on; None: plain HTTP."""
        self._tls: ssl.SSLContext | None = None
        if identity is not None:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.minimum_version = ssl.TLSVersion.TLSv1_2
            load_identity(self._tls, identity)

    def add_endpoint(
        self,
        url: str,
        *,
        id: str | None = None,  # noqa: A002 - ngrok's word
        fields: Mapping[str, object] | None = None,
    ) -> str:
        """Bind an endpoint, or, with an id that exists, replace it. Returns its id.

        A URL may be bound any number of times: that is a pool. `fields` overrides or adds fields of the object; None
        values drop them.
        """
        if id is None:
            id = self._new_id("ep")  # noqa: A001
        return self.add_object(id, BoundEndpoint(id, url, fields or {}))

    def add_object(self, id: str, listed: object) -> str:  # noqa: A002
        """List any object at all, however wrong, at the place its id gives it."""
        self.endpoints[id] = listed
        self._encoded.pop(id, None)
        self._sorted = None
        return id

    def remove_endpoint(self, id_or_url: str) -> int:
        """Unbind one endpoint by its id, or all with a URL. Returns how many went."""
        gone = [
            key
            for key, listed in self.endpoints.items()
            if key == id_or_url or (isinstance(listed, BoundEndpoint) and listed.url == id_or_url)
        ]
        for key in gone:
            del self.endpoints[key]
            self._encoded.pop(key, None)
        self._sorted = None
        return len(gone)

    def replace_endpoints(self, urls: Sequence[str]) -> list[str]:
        """Unbind everything and bind these. Returns their ids."""
        self.endpoints.clear()
        self._encoded.clear()
        return [self.add_endpoint(url) for url in urls]

    def touch(self) -> None:
        """Say that `endpoints` was changed by hand."""
        self._sorted = None
        self._encoded.clear()

    def set_fault(self, fault: Fault | None, *, method: str = "", path: str = "") -> None:
        """Let every request that matches fail so, until told otherwise.

        Args:
            fault: None forgets all rules.
            method: "" matches each.
            path: a part of the target; "" matches each.
        """
        if fault is None:
            self._rules.clear()
        else:
            self._rules.insert(0, _Rule(fault, method, path))

    def set_down(self, down: bool) -> None:
        """An outage: connections end at once and no new ones are served (`connect` refuses them)."""
        self.down = down
        if down:
            self.drop_connections()

    def drop_connections(self) -> None:
        """End every connection there is, in the middle of whatever it was doing."""
        for scope in self._live:
            scope.cancel()

    def forget_operator(self, operator_id: str) -> None:
        """Delete an operator behind its daemon's back: its next request gets 404."""
        del self.operators[operator_id]

    # -- serving -----------------------------------------------------------------------------------------------

    async def serve(self, stream: Stream) -> None:
        """Serve one connection until it ends, and close it. What clients do to it is no error."""
        self.connection_count += 1
        with trio.CancelScope() as scope:
            if self.down:
                scope.cancel()
            self._live.add(scope)
            try:
                await self._serve(stream)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                pass  # of the handshake; later ones are the HTTP server's affair
            finally:
                self._live.discard(scope)
                await trio.aclose_forcefully(stream)

    async def _serve(self, stream: Stream) -> None:
        if self._tls is not None:
            stream = trio.SSLStream(stream, self._tls, server_side=True, https_compatible=True)
            await stream.do_handshake()
        wire = _Wire(stream)

        async def answer(request: Request) -> Response:
            response = await self._answer(request, wire)
            dated = (
                *response.headers,
                ("Date", format_datetime(datetime.fromtimestamp(self._wall(), UTC), usegmt=True)),
            )
            return Response(response.status, dated, response.body)

        await serve_connection(wire, answer, _LIMITS)

    def connector(self, nursery: trio.Nursery) -> Callable[[str, int], Awaitable[Stream]]:
        """Make a `connect(host, port)` whose streams end here, in memory, served by tasks of `nursery`.

        It refuses with ConnectionRefusedError while the plane is down.
        """

        async def connect(_host: str, _port: int) -> Stream:
            await trio.lowlevel.checkpoint()
            if self.down:
                raise ConnectionRefusedError("the lab's API is down")
            near, far = trio.testing.memory_stream_pair()
            nursery.start_soon(self.serve, far)
            return near

        return connect

    # -- answering ---------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, wire: _Wire) -> Response:
        headers = dict(request.headers)
        authorization = headers.pop("authorization", "")
        key = authorization.removeprefix("Bearer ") if authorization.startswith("Bearer ") else ""
        method, target, body = request.method, request.target, request.body
        key_hash = hashlib.sha256(key.encode()).hexdigest() if key else ""
        self.requests.append(SeenRequest(trio.current_time(), method, target, key_hash, headers, body))
        self.request_count += 1
        fault = self._fault_for(method, target)
        if fault is None:
            return self._sound_answer(method, target, headers, authorization, body)
        await trio.sleep(fault.delay_s)
        if fault.hang:
            await trio.sleep_forever()
        wrong = fault.status or fault.body is not None
        if fault.carry_out or not wrong:
            sound = self._sound_answer(method, target, headers, authorization, body)
        wire.fault = fault
        if not wrong:
            return sound
        status = fault.status or 200
        spoiled = fault.body if fault.body is not None else _envelope(status, fault.code, fault.message)
        return _response(status, spoiled, fault.headers)

    def _fault_for(self, method: str, target: str) -> Fault | None:
        if self.script:
            return self.script.popleft()
        for rule in self._rules:
            if rule.method in ("", method) and rule.path in target:
                return rule.fault
        return None

    def _sound_answer(
        self, method: str, target: str, headers: Mapping[str, str], authorization: str, body: bytes
    ) -> Response:
        try:
            self._check_credentials(headers, authorization)
            parts = urlsplit(target)
            query = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            match (method, *parts.path.strip("/").split("/")):
                case ("POST", "kubernetes_operators"):
                    return _response(201, self._register(_json(headers, body)))
                case ("GET", "kubernetes_operators"):
                    return _response(200, self._list_operators(query, headers))
                case ("GET", "kubernetes_operators", operator_id):
                    return _response(200, self._operator_object(self._operator(operator_id)))
                case ("PATCH", "kubernetes_operators", operator_id):
                    return _response(200, self._edit(self._operator(operator_id), _json(headers, body)))
                case ("DELETE", "kubernetes_operators", operator_id):
                    del self.operators[self._operator(operator_id).id]
                    return _response(204, b"")
                case ("GET", "kubernetes_operators", operator_id, "bound_endpoints"):
                    return _response(200, self._list_endpoints(self._operator(operator_id), query, headers))
                case _:
                    raise _Refusal(404, "ERR_NGROK_404", f"No such resource: {method} {parts.path}")
        except _Refusal as refusal:
            return _response(refusal.status, _envelope(refusal.status, refusal.code, str(refusal)))

    def _check_credentials(self, headers: Mapping[str, str], authorization: str) -> None:
        if not authorization:
            raise _Refusal(401, "ERR_NGROK_200", "The API requires that you set the Authorization header.")
        if not authorization.startswith("Bearer "):
            raise _Refusal(401, "ERR_NGROK_201", "The Authorization header could not be parsed.")
        if authorization.removeprefix("Bearer ") not in self.keys:
            raise _Refusal(401, "ERR_NGROK_203", "The API key is properly formed, but it is invalid.")
        version = headers.get("ngrok-version")
        if version is None:
            raise _Refusal(400, "ERR_NGROK_218", "Your request has not specified an API version.")
        if version != "2":
            raise _Refusal(400, "ERR_NGROK_217", f"The API version {version} is not supported.")

    def _operator(self, operator_id: str) -> Operator:
        operator = self.operators.get(operator_id)
        if operator is None:
            raise _Refusal(404, "ERR_NGROK_404", f"Kubernetes operator {operator_id} not found.")
        return operator

    def _register(self, wanted: dict[str, object]) -> dict[str, object]:
        features = wanted.get("enabled_features")
        binding = wanted.get("binding")
        if not isinstance(features, list) or "bindings" not in features:
            raise _Refusal(400, "ERR_NGROK_100", "enabled_features must name bindings.")
        if not isinstance(binding, dict) or not isinstance(binding.get("csr"), str):
            raise _Refusal(400, "ERR_NGROK_100", "binding.csr is required.")
        now = self._wall()
        operator = Operator(
            id=self._new_id("k8sop"),
            description=_bounded(wanted, "description", 255),
            metadata=_bounded(wanted, "metadata", 4096),
            region=_bounded(wanted, "region", 32) or "global",
            enabled_features=[str(feature) for feature in features],
            endpoint_selectors=_selectors(binding) or ["true"],
            deployment=wanted.get("deployment") or {},
            created_at=now,
            updated_at=now,
        )
        self._certify(operator, binding["csr"])
        self.operators[operator.id] = operator
        return self._operator_object(operator)

    def _edit(self, operator: Operator, wanted: dict[str, object]) -> dict[str, object]:
        binding = wanted.get("binding", {})
        if not isinstance(binding, dict):
            raise _Refusal(400, "ERR_NGROK_100", "binding must be an object.")
        description = _bounded(wanted, "description", 255)
        metadata = _bounded(wanted, "metadata", 4096)
        selectors = _selectors(binding)
        if "csr" in binding:
            self._certify(operator, binding["csr"])
        if "description" in wanted:
            operator.description = description
        if "metadata" in wanted:
            operator.metadata = metadata
        if selectors:
            operator.endpoint_selectors = selectors
        operator.updated_at = self._wall()
        return self._operator_object(operator)

    def _certify(self, operator: Operator, csr: object) -> None:
        if not isinstance(csr, str):
            raise _Refusal(400, "ERR_NGROK_100", "binding.csr must be a string.")
        not_before = self._wall() - self.backdate_s
        try:
            signed = self._clients.sign_csr(
                csr,
                subject=operator.id,
                not_before=not_before,
                not_after=not_before + self.certificate_lifetime_s,
            )
        except BadCsr as error:
            raise _Refusal(400, "ERR_NGROK_100", str(error)) from None
        operator.certificate_pem = signed.pem.decode()
        operator.not_before, operator.not_after = signed.not_before, signed.not_after
        operator.csr_pem = csr
        operator.certificates.append(signed.serial)

    def _operator_object(self, operator: Operator) -> dict[str, object]:
        return {
            "id": operator.id,
            "uri": f"https://api.ngrok.com/kubernetes_operators/{operator.id}",
            "created_at": _rfc3339(operator.created_at),
            "updated_at": _rfc3339(operator.updated_at),
            "description": operator.description,
            "metadata": operator.metadata,
            "principal": {"id": "usr_lab", "uri": "https://api.ngrok.com/users/usr_lab"},
            "enabled_features": operator.enabled_features,
            "region": operator.region,
            "deployment": operator.deployment,
            "binding": {
                "endpoint_selectors": operator.endpoint_selectors,
                "cert": {
                    "cert": operator.certificate_pem,
                    "not_before": _rfc3339(operator.not_before),
                    "not_after": _rfc3339(operator.not_after),
                },
                "ingress_endpoint": self.ingress_endpoint,
            },
        }

    # -- lists -------------------------------------------------------------------------------------------------

    def _list_operators(self, query: Mapping[str, str], headers: Mapping[str, str]) -> bytes:
        ids, last = self._page(sorted(self.operators), query)
        items = [msgspec.json.encode(self._operator_object(self.operators[key])) for key in ids]
        return self._listing("operators", items, "/kubernetes_operators", query, headers, None if last else ids[-1])

    def _list_endpoints(self, operator: Operator, query: Mapping[str, str], headers: Mapping[str, str]) -> bytes:
        if self._sorted is None:
            self._sorted = sorted(self.endpoints)
        ids, last = self._page(self._sorted, query)
        items = [self._encode(key) for key in ids]
        path = f"/kubernetes_operators/{operator.id}/bound_endpoints"
        return self._listing("endpoints", items, path, query, headers, None if last else ids[-1])

    def _page(self, ascending: list[str], query: Mapping[str, str]) -> tuple[list[str], bool]:
        """One page of ids, newest (greatest) first, and whether it is the last."""
        try:
            limit = min(int(query.get("limit", self.page_size)), self.page_size)
        except ValueError:
            raise _Refusal(400, "ERR_NGROK_100", "limit must be a number.") from None
        if limit < 1:
            raise _Refusal(400, "ERR_NGROK_100", "limit must be at least 1.")
        end = bisect_left(ascending, query["before_id"]) if "before_id" in query else len(ascending)
        start = max(0, end - limit)
        last = end == 0 if self.empty_last_page else start == 0
        return ascending[start:end][::-1], last

    def _encode(self, key: str) -> bytes:
        encoded = self._encoded.get(key)
        if encoded is None:
            listed = self.endpoints[key]
            encoded = msgspec.json.encode(listed.as_object() if isinstance(listed, BoundEndpoint) else listed)
            self._encoded[key] = encoded
        return encoded

    def _listing(
        self,
        name: str,
        items: list[bytes],
        path: str,
        query: Mapping[str, str],
        headers: Mapping[str, str],
        before_id: str | None,
    ) -> bytes:
        base = f"{'http' if self._tls is None else 'https'}://{headers.get('host', 'api.ngrok.com')}"
        next_uri: str | None = None
        if before_id is not None:
            limit = f"&limit={query['limit']}" if "limit" in query else ""
            next_uri = f"{base if self.absolute_next_uri else ''}{path}?before_id={before_id}{limit}"
        tail = {"uri": base + path, "next_page_uri": next_uri}
        return b'{"%s":[%s],%s' % (name.encode(), b",".join(items), msgspec.json.encode(tail)[1:])

    def _new_id(self, prefix: str) -> str:
        number = self._next_id
        self._next_id += 1
        return f"{prefix}_lab{number:024d}"


class _Wire(Stream):
    """A stream whose answers can be spoiled: `fault` applies to what is sent from now on."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self.fault: Fault | None = None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        fault = self.fault
        if fault is None or (fault.raw is None and fault.cut_after is None and not fault.endless):
            self.fault = None
            await self._stream.send_all(data)
            return
        if fault.endless:
            await self._stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[")
            while True:
                await self._stream.send_all(b" " * 65536)
        if fault.raw is not None:
            await self._stream.send_all(fault.raw)
        elif fault.cut_after is not None and len(data) <= fault.cut_after:
            self.fault = replace(fault, cut_after=fault.cut_after - len(data))
            await self._stream.send_all(data)
            return
        else:
            await self._stream.send_all(bytes(data)[: fault.cut_after])
        await trio.aclose_forcefully(self._stream)
        raise trio.BrokenResourceError("the lab cut this answer")

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._stream.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._stream.aclose()


def _json(headers: Mapping[str, str], body: bytes) -> dict[str, object]:
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refusal(415, "ERR_NGROK_100", "Content-Type must be application/json.")
    try:
        wanted = json.loads(body)
    except ValueError as error:
        raise _Refusal(400, "ERR_NGROK_100", f"The body is not JSON: {error}") from None
    if not isinstance(wanted, dict):
        raise _Refusal(400, "ERR_NGROK_100", "The body must be a JSON object.")
    return wanted


def _bounded(wanted: Mapping[str, object], name: str, limit: int) -> str:
    value = wanted.get(name, "")
    if not isinstance(value, str) or len(value.encode()) > limit:
        raise _Refusal(400, "ERR_NGROK_100", f"{name} must be a string of at most {limit} bytes.")
    return value


def _selectors(binding: Mapping[str, object]) -> list[str]:
    selectors = binding.get("endpoint_selectors", [])
    if not isinstance(selectors, list) or not all(isinstance(selector, str) for selector in selectors):
        raise _Refusal(400, "ERR_NGROK_100", "binding.endpoint_selectors must be a list of strings.")
    return selectors


def _envelope(status: int, code: str, message: str) -> dict[str, object]:
    return {"error_code": code, "status_code": status, "msg": message, "details": {"operation_id": "op_lab"}}


def _response(status: int, body: object, headers: Sequence[tuple[str, str]] = ()) -> Response:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    kind = [("Content-Type", "application/json")] if data else []
    return Response(status, (*kind, ("Ngrok-Operation-Id", "op_lab"), *headers), data)


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(int(at), UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
