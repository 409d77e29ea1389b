"""What any program on this machine should now be able to do, done: names through getaddrinfo, bytes through sockets.

The checks know nothing of the daemon. They are blocking functions over the standard library, as an ordinary program
would be, and ask for the lab's demo endpoints (`ngrokd.lab.world.DEMO_ENDPOINTS`).
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import json
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ngrokd.lab.backends import BANNER, GREETING, sample, sample_sha256

TIMEOUT_S: Final = 20.0  # of each operation
BODY_BYTES: Final = 10_000_000
ECHO_BYTES: Final = 200_000
UNSERVED_PORT: Final = 81
REFUSED_WITHIN_S: Final = 1.0


class CheckFailed(Exception):  # noqa: N818 - a verdict
    """It works, but not as it should; the message says what came instead."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must work. `run` returns a detail worth showing, or raises CheckFailed or OSError."""

    title: str
    run: Callable[[], str]


def checks(subnet: str) -> tuple[Check, ...]:
    """The self-check of the demo, in the order in which a person would try.

    Args:
        subnet: where the names' addresses must lie.
    """
    return (
        Check("names resolve", lambda: _names(ipaddress.ip_network(subnet))),
        Check("GET http://hello.demo/", _greeting),
        Check(f"download {BODY_BYTES // 1_000_000} MB by HTTP", _download),
        Check(f"upload {BODY_BYTES // 1_000_000} MB by HTTP", _upload),
        Check("TCP echo", _echo),
        Check("a server that speaks first", _banner),
        Check("an answer after our half-close", _half_close),
        Check("a port that is not served", _refused),
    )


def _names(network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> str:
    found = {}
    for name in ("hello.demo", "echo.demo", "banner.demo", "answer.demo"):
        addresses = {info[4][0] for info in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
        if not any(ipaddress.ip_address(address) in network for address in addresses):
            raise CheckFailed(f"{name} is {', '.join(map(str, sorted(addresses, key=str)))}, which is not in {network}")
        found[name] = min(addresses, key=str)
    return f"hello.demo is {found['hello.demo']}"


def _exchange(method: str, path: str, body: bytes | None = None) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("hello.demo", timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        return response, response.read()
    except http.client.HTTPException as error:
        raise CheckFailed(f"{method} {path}: {error!r}") from error
    finally:
        connection.close()


def _greeting() -> str:
    response, body = _exchange("GET", "/")
    if (response.status, body) != (200, GREETING):
        raise CheckFailed(f"status {response.status}, {body[:60]!r}")
    return repr(body.decode().strip())


def _download() -> str:
    started = time.monotonic()
    response, body = _exchange("GET", f"/bytes/{BODY_BYTES}")
    if hashlib.sha256(body).hexdigest() != response.headers["X-Sha256"]:
        raise CheckFailed(f"status {response.status}, {len(body)} bytes, and not those that were sent")
    return f"equal hashes, {_rate(started)}"


def _upload() -> str:
    body = b"".join(sample(BODY_BYTES))
    started = time.monotonic()
    response, answer = _exchange("POST", "/hash", body)
    if response.status != 200 or json.loads(answer)["sha256"] != sample_sha256(BODY_BYTES):
        raise CheckFailed(f"status {response.status}, {answer[:100]!r}")
    return f"equal hashes, {_rate(started)}"


def _rate(started: float) -> str:
    return f"{BODY_BYTES * 8 / 1e6 / max(time.monotonic() - started, 1e-6):.0f} Mbit/s"


def _echo() -> str:
    data = b"".join(sample(ECHO_BYTES))
    with socket.create_connection(("echo.demo", 7), TIMEOUT_S) as sock:
        _half_close_after(sock, data)
        received = _receive_all(sock)
    if received != data:
        raise CheckFailed(f"{len(received)} of {ECHO_BYTES} bytes came back, or others")
    return f"{ECHO_BYTES} bytes came back, across our half-close"


def _banner() -> str:
    with socket.create_connection(("banner.demo", 25), TIMEOUT_S) as sock:
        received = b""
        while len(received) < len(BANNER) and (data := sock.recv(4096)):
            received += data
    if received != BANNER:
        raise CheckFailed(f"{received!r}")
    return repr(received.decode().strip())


def _half_close() -> str:
    with socket.create_connection(("answer.demo", 9000), TIMEOUT_S) as sock:
        _half_close_after(sock, b"".join(sample(100_000)))
        received = _receive_all(sock)
    if received != f"{sample_sha256(100_000)} 100000\n".encode():
        raise CheckFailed(f"{received!r}")
    return "equal hashes"


def _refused() -> str:
    started = time.monotonic()
    try:
        socket.create_connection(("hello.demo", UNSERVED_PORT), TIMEOUT_S).close()
    except ConnectionRefusedError:
        took = time.monotonic() - started
        if took > REFUSED_WITHIN_S:
            raise CheckFailed(f"refused, but after {took:.1f} s") from None
        return f"connection refused after {took * 1000:.0f} ms"
    raise CheckFailed(f"port {UNSERVED_PORT} was accepted")


def _half_close_after(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


def _receive_all(sock: socket.socket) -> bytes:
    received = bytearray()
    while data := sock.recv(65536):
        received += data
    return bytes(received)
