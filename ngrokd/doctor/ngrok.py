"""The checks of the way to ngrok: key, API, clock, operator, endpoints, certificate, ingress. Each phase is timed.

Nothing is changed, here or at ngrok: what is asked for, the daemon asks for every half minute. To see the ingress agree
on an endpoint, one connection to that endpoint is opened and closed again, without a byte of content.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from email.utils import parsedate_to_datetime
from ipaddress import IPv4Network, ip_address
from typing import Final
from urllib.parse import urlsplit

import trio

from ngrokd import __version__, config, files
from ngrokd.cloud.api import KeyRefusedError, NgrokApi, OperatorGoneError, api_ssl_context
from ngrokd.cloud.identity import (
    CERTIFICATE,
    KEY,
    OPERATOR_ID,
    BadPair,
    credentials_of,
    is_operator_id,
    needs_renewal,
)
from ngrokd.doctor.findings import Finding, fail, ok, warn
from ngrokd.doctor.patient import Patient
from ngrokd.endpoints import BadEndpoint, parse_endpoint, printable
from ngrokd.errors import (
    ApiError,
    BindingRefused,
    ConfigError,
    IngressUntrusted,
    RelayError,
    StateError,
)
from ngrokd.relay.connector import Connector, Progress
from ngrokd.relay.ingress import Ingress
from ngrokd.relay.stock import PoolSettings
from ngrokd.relay.tls import TlsSession
from ngrokd.relay.transport import Transport, connect_tcp
from ngrokd.relay.trust import Presented, Trust, presented_chain

WAIT_S: Final = 10.0  # for each question
CLOCK_FINE_S: Final = 30.0  # a Date header has whole seconds, and an answer may take some
CLOCK_WRONG_S: Final = 300.0
NAMES_TRIED: Final = 25
_SUDO: Final = "run it as root for a full answer: sudo ngrokd doctor"
_OUTBOUND: Final = "check this machine's network, its name server and its firewall"
_PROXIES: Final = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HTTP_PROXY", "http_proxy")
_NGROK_CA_DIRECTORY: Final = "/etc/ssl/certs/ngrok"
_INGRESS_CA: Final = "ingress-ca.pem"
_DEFAULT_INGRESS: Final = "kubernetes-binding-ingress.ngrok.io:443"
_CA_BYTES: Final = 4 << 20

# What ngrok's codes mean for whoever runs this daemon, and what to do.
_CODES: Final = {
    "ERR_NGROK_200": ("no API key reached ngrok", "look for a proxy that removes the Authorization header"),
    "ERR_NGROK_201": ("ngrok cannot read the API key", "set another: sudo ngrokd set-api-key"),
    "ERR_NGROK_203": (
        "ngrok does not know this API key: it was revoked, or is another account's",
        "make one at https://dashboard.ngrok.com/api-keys, then: sudo ngrokd set-api-key",
    ),
    "ERR_NGROK_225": ("too many questions at once with this account", "wait; stop what else uses this account's API"),
    "ERR_NGROK_226": ("too many questions with this account", 'raise api.poll_interval, for example to "60s"'),
    "ERR_NGROK_4012": (
        "the plan of this ngrok account does not include what is needed",
        "see https://dashboard.ngrok.com/billing, or ask ngrok's support",
    ),
    "ERR_NGROK_19002": (
        "ngrok accepts no operator: kubernetes bindings are not enabled for this account, or a selector is wrong",
        "have ngrok's support enable kubernetes bindings for the account; check api.selectors",
    ),
}


# --- the key ---


def api_key(patient: Patient) -> Iterator[Finding]:
    """Is there one, and where does it come from?"""
    key = config.resolve_api_key(patient.settings, patient.environ)
    if key.problem:
        make = warn if "ermission" in key.problem and not patient.is_root else fail
        stored = key.source.startswith("set-api-key")
        mend = "give the daemon another: sudo ngrokd set-api-key" if stored else f"set it right: {key.source}"
        remedy = _SUDO if make is warn else mend
        yield make("api-key", f"no API key: {key.problem}", remedy)
    elif not key.source:
        known = (patient.status or {}).get("api", {})
        if patient.is_root or not (isinstance(known, dict) and known.get("key_source")):
            yield fail("api-key", "there is no API key", "give the daemon one: sudo ngrokd set-api-key")
    elif key.warning:
        yield warn("api-key", key.warning, key.warning.rpartition(": ")[2], source=key.source)
    else:
        yield ok("api-key", f"from {key.source}", source=key.source)


# --- the API ---


class _Way:
    """A connection that tells how long each phase took."""

    def __init__(self) -> None:
        self.dns_s = self.tcp_s = 0.0
        self.addresses: tuple[str, ...] = ()

    async def connect(self, host: str, port: int) -> trio.abc.Stream:
        """TCP to the API. Raises OSError."""
        begun = time.perf_counter()
        self.addresses = await _resolve(host, port)
        self.dns_s = time.perf_counter() - begun
        begun = time.perf_counter()
        stream = await trio.open_tcp_stream(host, port)
        self.tcp_s = time.perf_counter() - begun
        return stream


async def _resolve(host: str, port: int) -> tuple[str, ...]:
    found = await trio.socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(str(entry[4][0]) for entry in found))


async def api(patient: Patient) -> AsyncIterator[Finding]:
    """Does it answer, does it accept the key, and what does it say of us?"""
    settings = patient.settings
    key = config.resolve_api_key(settings, patient.environ)
    way = _Way()
    try:
        anchors = _read(settings.api.ca_file) if settings.api.ca_file else None
        client = NgrokApi(
            url=settings.api.url,
            key=lambda: key.value,
            connect=way.connect,
            ssl_context=api_ssl_context(anchors),
            timeout_s=min(settings.api.timeout_s, WAIT_S),
            user_agent=f"ngrokd/{__version__}",
            now=patient.wall,
        )
    except (ConfigError, StateError, FileNotFoundError) as error:
        yield fail("api", f"api.ca_file: {error}", "put the certificate of the authority there, as PEM")
        return
    begun = time.perf_counter()
    try:
        if key.value.reveal():
            await client.check_key()
        else:
            await client.check_key("none")  # no key is called so; that ngrok refuses it shows that it answers
    except KeyRefusedError as error:
        patient.api_works = True
        yield ok("api", f"{settings.api.url} answers", **_phases(way, begun))
        if key.value.reveal():
            yield _refused(error)
    except ApiError as error:
        yield await _unreachable(patient, error, way)
    else:
        patient.api_works = True
        phases = _phases(way, begun)
        yield ok("api", f"{settings.api.url} accepts the key ({_shown(phases)})", **phases)
    for finding in _clock(patient, client.last_date):
        yield finding
    for finding in _proxies(patient):
        yield finding
    if patient.api_works and key.value.reveal():
        async for finding in _operator(patient, client):
            yield finding


def _phases(way: _Way, begun: float) -> dict[str, float]:
    rest = time.perf_counter() - begun - way.dns_s - way.tcp_s
    return {"dns_ms": _ms(way.dns_s), "tcp_ms": _ms(way.tcp_s), "tls_and_answer_ms": _ms(rest)}


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 1)


def _shown(phases: dict[str, float]) -> str:
    names = {
        "dns_ms": "DNS",
        "tcp_ms": "TCP",
        "tls_ms": "TLS",
        "header_ms": "header",
        "tls_and_answer_ms": "TLS and answer",
    }
    return ", ".join(f"{names[name]} {value:g} ms" for name, value in phases.items())


def _refused(error: ApiError) -> Finding:
    words, remedy = _CODES.get(error.code, ("", ""))
    said = f"{words} ({error})" if words else str(error)
    return fail("api-key", said, remedy or error.remedy or "set another: sudo ngrokd set-api-key", code=error.code)


async def _unreachable(patient: Patient, error: ApiError, way: _Way) -> Finding:
    """Why there is no sound answer; whoever stands between is named."""
    facts: dict[str, object] = {"status": error.status, "code": error.code, "addresses": list(way.addresses)}
    if error.code in _CODES:
        words, remedy = _CODES[error.code]
        return fail("api", f"{words} ({error})", remedy, **facts)
    if 300 <= error.status < 400:
        return fail("api", f"{error}", "sign in at the network's page (a captive portal?), or check api.url", **facts)
    if "is not trusted" in str(error) or "no TLS with" in str(error):
        chain = await _presented_by(patient.settings.api.url, way.addresses)
        said = f"; it presents {chain[0]}" if chain else ""
        remedy = (
            "a captive portal or a proxy that opens TLS answers instead of ngrok: sign in there, or, where it is"
            " yours, name its authority in api.ca_file"
        )
        return fail("api", f"{error}{said}", remedy, **facts)
    if not way.addresses:
        host = urlsplit(patient.settings.api.url).hostname or ""
        return fail("api", f"{error}", f"check the name server: getent hosts {host}", **facts)
    if error.status >= 500:
        return fail("api", f"ngrok's API has trouble of its own: {error}", "wait; what is served goes on", **facts)
    return fail("api", f"{error}", _through_proxy(patient) or error.remedy or _OUTBOUND, **facts)


async def _presented_by(url: str, addresses: tuple[str, ...]) -> list[Presented]:
    """What whoever answers there shows as a certificate; nothing is verified, and nothing is sent."""
    parts = urlsplit(url)
    chain: list[Presented] = []
    if not addresses or not parts.hostname:
        return chain
    with trio.move_on_after(WAIT_S), contextlib.suppress(OSError, ssl.SSLError, RelayError):
        transport = await connect_tcp(addresses[0], parts.port or 443)
        try:
            session = TlsSession(Trust().probe_context(), server_hostname=parts.hostname)
            buffer = memoryview(bytearray(1 << 16))
            while True:
                done = session.handshake_step()
                chain = presented_chain(session.object)
                if chain or done:
                    break
                transport.send_nowait(session.take())
                await transport.wait_readable()
                count = transport.receive_into_nowait(buffer)
                if not count:
                    break
                session.feed(buffer[:count])
        finally:
            transport.close()
    return chain


def _clock(patient: Patient, date: str) -> Iterator[Finding]:
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return
    ahead = patient.wall() - theirs
    facts = {"ahead_s": round(ahead, 1)}
    if abs(ahead) <= CLOCK_FINE_S:
        yield ok("clock", "this machine's clock agrees with ngrok's", **facts)
        return
    how = f"{_long(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'} ngrok's"
    remedy = "set it: timedatectl set-ntp true, or chronyc makestep"
    if abs(ahead) < CLOCK_WRONG_S:
        yield warn("clock", f"this machine's clock is {how}", remedy, **facts)
    else:
        said = f"this machine's clock is {how}: certificates are judged by it, and will seem not yet or no longer valid"
        yield fail("clock", said, remedy, **facts)


def _long(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def _set_proxies(patient: Patient) -> list[str]:
    return [name for name in _PROXIES if patient.environ.get(name)]


def _through_proxy(patient: Patient) -> str:
    if not _set_proxies(patient):
        return ""
    return "ngrokd connects directly, never through a proxy: let it out to the API and the ingress on port 443"


def _proxies(patient: Patient) -> Iterator[Finding]:
    names = _set_proxies(patient)
    if not names:
        return
    said = f"{', '.join(f'${name}' for name in names)} is set, and not used: ngrokd connects directly"
    if patient.api_works:
        yield ok("proxy", f"{said}, which works")
    else:
        yield warn("proxy", said, _through_proxy(patient))


async def _operator(patient: Patient, client: NgrokApi) -> AsyncIterator[Finding]:
    if not patient.operator_id:
        yield warn("operator", "this machine has no operator at ngrok yet", "the first start registers one by itself")
        return
    try:
        operator = await client.get_operator(patient.operator_id)
        listing = await client.bound_endpoints(patient.operator_id)
    except OperatorGoneError as error:
        remedy = "a running daemon registers another by itself, and every address stays; else: sudo ngrokd run"
        yield fail(
            "operator",
            f"ngrok does not know operator {patient.operator_id}: deleted or revoked",
            remedy,
            code=error.code,
        )
        return
    except ApiError as error:
        words, remedy = _CODES.get(error.code, ("", ""))
        yield fail(
            "operator",
            f"{words or 'ngrok does not tell about this operator'} ({error})",
            remedy or error.remedy or _OUTBOUND,
        )
        return
    patient.ingress_endpoint = operator.ingress_endpoint
    yield ok("operator", f"ngrok knows this machine as {operator.id}", operator_id=operator.id)
    good, bad = [], []
    for listed in listing:
        try:
            good.append(parse_endpoint(listed))
        except BadEndpoint as error:
            bad.append(str(error))
    patient.endpoints = good
    selectors = ", ".join(patient.settings.api.selectors)
    if not good and not bad:
        remedy = (
            'create an endpoint with the binding "kubernetes", or widen api.selectors'
            " (they hold from the next registration on)"
        )
        yield warn("endpoints", f"no endpoint matches the selectors ({printable(selectors)})", remedy, count=0)
        return
    yield ok("endpoints", f"{len(good)} endpoints are bound to this machine", count=len(good))
    for reason in bad[:5]:
        yield warn("endpoints", f"an endpoint cannot be served: {reason}", "correct its URL at ngrok")


# --- what is kept here ---


def identity(patient: Patient) -> Iterator[Finding]:
    """Operator, key and certificate as they lie in the state directory; read, never repaired."""
    directory = patient.settings.state.directory
    try:
        text = _read(os.path.join(directory, OPERATOR_ID)).decode("ascii", "replace").strip()
        patient.operator_id = text if is_operator_id(text) else ""
        key = _read(os.path.join(directory, KEY))
        certificate = _read(os.path.join(directory, CERTIFICATE))
        patient.credentials = credentials_of(key, certificate)
    except FileNotFoundError as error:
        yield warn(
            "certificate", f"there is no {error.filename or 'certificate'} yet", "the first start gets one from ngrok"
        )
        return
    except StateError as error:
        if patient.is_root:
            yield fail("certificate", str(error), error.remedy or f"check {directory}")
        else:
            yield warn("certificate", str(error), _SUDO)
        return
    except BadPair as error:
        remedy = "get another for the same operator: sudo ngrokd refresh-cert --force"
        yield fail("certificate", f"{directory}: {error}", remedy)
        return
    yield _dates(patient)


def _dates(patient: Patient) -> Finding:
    pair, now = patient.credentials, patient.wall()
    assert pair is not None
    until = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(pair.not_after))
    facts = {"not_before": pair.not_before, "not_after": pair.not_after}
    renew = "renew it: sudo ngrokd refresh-cert --force"
    if now >= pair.not_after:
        return fail("certificate", f"it expired on {until}, {_long(now - pair.not_after)} ago", renew, **facts)
    if now < pair.not_before:
        said = f"it begins to be valid in {_long(pair.not_before - now)}: this machine's clock is wrong"
        return fail("certificate", said, "set the clock: timedatectl set-ntp true", **facts)
    if needs_renewal(pair.not_before, pair.not_after, now):
        said = f"it is due for renewal, {_long(pair.not_after - now)} are left"
        return warn("certificate", said, "a running daemon renews it by itself; see: ngrokd status", **facts)
    return ok("certificate", f"it belongs to its key and is valid until {until}", **facts)


# --- the ingress ---


class _TimedDial:
    def __init__(self) -> None:
        self.tcp_s = 0.0

    async def __call__(self, address: str, port: int) -> Transport:
        begun = time.perf_counter()
        transport = await connect_tcp(address, port)
        self.tcp_s = time.perf_counter() - begun
        return transport


async def ingress(patient: Patient) -> AsyncIterator[Finding]:
    """Name, TCP, TLS verified, binding header: where does it stop?"""
    settings = patient.settings
    host, port = _ingress_address(patient)
    name = config.join_address(host, port)
    if patient.credentials is None:
        yield warn("ingress", f"{name} was not tried: there is no client certificate", "see the finding about it")
        return
    begun = time.perf_counter()
    try:
        with trio.fail_after(WAIT_S):
            addresses = await _resolve(host, port)
    except (OSError, trio.TooSlowError) as error:
        reason = getattr(error, "strerror", "") or f"no answer within {WAIT_S:g} s"
        said = f"{host} cannot be looked up: {reason}"
        yield fail("ingress", said, f"check the name server: getent hosts {host}")
        return
    dns_s = time.perf_counter() - begun
    try:
        anchors = _anchors(patient)
    except (StateError, FileNotFoundError) as error:
        yield fail("ingress", f"ingress.ca_file: {error}", "put the certificate of the authority there, as PEM")
        return
    refused = (settings.net.subnet,)
    dial = _TimedDial()
    connector = Connector(dial, refused, None)
    connector.set_anchors(True, anchors, settings.ingress.ca_fingerprints)
    connector.set_credentials(patient.credentials)
    connector.set_addresses(host, port, addresses)
    begun = time.perf_counter()
    progress = Progress()
    try:
        with trio.fail_after(settings.ingress.connect_timeout_s):
            connection = await connector.connect(progress)
    except trio.TooSlowError:
        said = f"{name}: nothing within {settings.ingress.connect_timeout_s:g} s while {progress.phase}"
        yield fail("ingress", said, "let connections to it out of this machine (port 443), directly")
        return
    except RelayError as error:
        yield _no_ingress(patient, error)
        return
    tls_s = time.perf_counter() - begun - dial.tcp_s
    connection.stream.abort()
    phases = {"dns_ms": _ms(dns_s), "tcp_ms": _ms(dial.tcp_s), "tls_ms": _ms(tls_s)}
    if not patient.endpoints:
        why = "the header was not tried: there is no endpoint"
        yield ok("ingress", f"{name} is reached and verified ({_shown(phases)}); {why}", **phases)
        return
    door = Ingress(
        _TimedDial(),
        connect_timeout_s=settings.ingress.connect_timeout_s,
        refused_networks=refused,
        pool=PoolSettings(max=0),
    )
    door.set_anchors(True, anchors, settings.ingress.ca_fingerprints)
    door.set_credentials(patient.credentials)
    door.set_addresses(host, port, addresses)
    endpoint = patient.endpoints[0]
    begun = time.perf_counter()
    try:
        opened = await door.open(endpoint.host, endpoint.port)
    except RelayError as error:
        yield ok("ingress", f"{name} is reached and verified ({_shown(phases)})", **phases)
        yield _no_header(error, f"{endpoint.host}:{endpoint.port}")
        return
    header_s = time.perf_counter() - begun - dial.tcp_s - tls_s
    opened.stream.close_nowait()
    phases["header_ms"] = _ms(header_s)
    yield ok("ingress", f"{name} is reached, verified, and opens {endpoint.host} ({_shown(phases)})", **phases)


def _no_ingress(patient: Patient, error: RelayError) -> Finding:
    if isinstance(error, IngressUntrusted):
        return fail("ingress", str(error), error.remedy, reason=error.reason)
    if isinstance(error, BindingRefused):
        return fail(
            "ingress", str(error), "get another certificate: sudo ngrokd refresh-cert --force", reason=error.reason
        )
    remedy = _through_proxy(patient) or "let connections to it out of this machine (port 443), directly"
    return fail("ingress", str(error), remedy, reason=error.reason)


def _no_header(error: RelayError, endpoint: str) -> Finding:
    if isinstance(error, BindingRefused) and error.code:
        remedy = f"look at {endpoint} at ngrok: is its service connected, and is the endpoint bound to this operator?"
        return fail("header", str(error), remedy, code=error.code)
    remedy = error.remedy or "try again; if it stays so, get another certificate: sudo ngrokd refresh-cert --force"
    return fail("header", str(error), remedy, reason=error.reason)


def _ingress_address(patient: Patient) -> tuple[str, int]:
    for text in (patient.settings.ingress.address, patient.ingress_endpoint):
        with contextlib.suppress(ValueError):
            if text:
                return config.split_address(text, config.INGRESS_PORT)
    return config.split_address(_DEFAULT_INGRESS, config.INGRESS_PORT)


def _anchors(patient: Patient) -> bytes:
    """Whom the daemon would verify the ingress against. Raises for a configured file that cannot be read."""
    settings = patient.settings
    pem = _read(settings.ingress.ca_file) if settings.ingress.ca_file else b""
    others = [os.path.join(settings.state.directory, _INGRESS_CA)]
    with contextlib.suppress(OSError):
        others += [os.path.join(_NGROK_CA_DIRECTORY, name) for name in sorted(os.listdir(_NGROK_CA_DIRECTORY))]
    for path in others:
        with contextlib.suppress(FileNotFoundError, StateError):
            pem += b"\n" + _read(path)
    return pem


def _read(path: str) -> bytes:
    return files.read_limited(path, _CA_BYTES)


# --- names ---


async def names(patient: Patient) -> AsyncIterator[Finding]:
    """Do programs get the addresses that the daemon serves?"""
    settings = patient.settings
    served = await _served(patient)
    if not served or not settings.hosts.enabled:
        return
    subnet = IPv4Network(settings.net.subnet)
    wrong: list[str] = []
    for host, address in sorted(served.items())[:NAMES_TRIED]:
        try:
            with trio.fail_after(WAIT_S):
                found = await trio.socket.getaddrinfo(host, None, family=socket.AF_INET, type=socket.SOCK_STREAM)
        except (OSError, trio.TooSlowError):
            wrong.append(f"{host} is not found")
            continue
        addresses = {str(entry[4][0]) for entry in found}
        if addresses != {address}:
            foreign = [each for each in addresses if ip_address(each) not in subnet]
            wrong.append(f"{host} is {', '.join(sorted(foreign or addresses))} instead of {address}")
    if wrong:
        remedy = (
            'let "files" come before "dns" in the line "hosts:" of /etc/nsswitch.conf; restart nscd or whatever caches;'
            " and look for the name elsewhere in the hosts file"
        )
        shown = "; ".join(wrong[:5]) + (f"; and {len(wrong) - 5} more" if len(wrong) > 5 else "")
        yield fail("resolver", f"programs get other answers than the daemon serves: {shown}", remedy, wrong=wrong)
    else:
        yield ok(
            "resolver", f"programs get the addresses that are served ({min(len(served), NAMES_TRIED)} names tried)"
        )


async def _served(patient: Patient) -> dict[str, str]:
    from ngrokd import ask
    from ngrokd.errors import NgrokdError

    if patient.status is None:
        return {}
    try:
        rows = await trio.to_thread.run_sync(lambda: ask.ask(patient.settings.control.socket, "list").data)
    except NgrokdError:
        return {}
    listed = rows if isinstance(rows, list) else []
    return {
        str(row["hostname"]): str(row["ip"])
        for row in listed
        if isinstance(row, dict) and {"hostname", "ip"} <= row.keys()
    }
