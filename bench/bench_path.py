"""The whole path, measured: app -> kernel -> TUN -> daemon -> mTLS -> ingress, and back.

    sudo .venv/bin/python bench/bench_path.py [--seconds 3] [--rounds 3] [--cases up,down,...] [--json]

Everything runs in network and mount namespaces of its own: a control plane (from the lab), an ingress with real TLS 1.3
and client certificates, the real daemon as its own process, and a peer to compare with: a forwarder as they are usually
written, with a kernel listener, one TLS dial per connection and two copying threads. Rounds alternate between the
two, so that what disturbs the machine disturbs both; medians are printed, and the ratio (above 1: the daemon leads).

Ingress and forwarder are blocking Python over OpenSSL, whose work is done in C with the GIL released: for bulk they
cost what a C program costs. They are processes of their own, but share the machine's cores with the daemon.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import trio

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ngrokd.lab.ca import Authority, load_identity  # noqa: E402
from ngrokd.lab.control_plane import DEFAULT_KEY, ControlPlane  # noqa: E402

API_PORT = 18443
INGRESS_PORT = 18444
FORWARDER_PORT = 18445  # + one per service
SERVICES = ("sink.bench", "source.bench", "echo.bench")
CHUNK = 256 * 1024


# -- the other side ----------------------------------------------------------------------------------------------------


def serve_ingress(ca: Authority) -> NoReturn:
    """A blocking TLS server: header in, two zero bytes out (success), then the service that the header names."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    load_identity(context, ca.issue(["ingress.bench", "127.0.0.1"]))
    context.load_verify_locations(cadata=(ca.root_pem + ca.intermediate_pem).decode())
    context.verify_mode = ssl.CERT_REQUIRED
    listener = socket.create_server(("127.0.0.1", INGRESS_PORT), backlog=1024)
    while True:
        raw, _ = listener.accept()
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=serve_ingress_connection, args=(context, raw), daemon=True).start()


def serve_ingress_connection(context: ssl.SSLContext, raw: socket.socket) -> None:
    with contextlib.suppress(OSError), context.wrap_socket(raw, server_side=True) as tls:
        body = read_exactly(tls, struct.unpack("<H", read_exactly(tls, 2))[0])
        host = body[2 : 2 + body[1]].decode()  # field 1, one length byte: these names are short
        tls.sendall(b"\0\0")
        if host == "sink.bench":
            buffer = bytearray(CHUNK)
            while tls.recv_into(buffer):
                pass
        elif host == "source.bench":
            block = bytes(CHUNK)
            while True:
                tls.sendall(block)
        else:
            while data := tls.recv(CHUNK):
                tls.sendall(data)
        tls.unwrap()  # close_notify: an end without it is a truncation


def read_exactly(stream: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = stream.recv(count - len(data))
        if not more:
            raise ConnectionResetError("ended early")
        data += more
    return data


def serve_api(ca: Authority) -> NoReturn:
    plane = ControlPlane(
        ca, wall=time.time, identity=ca.issue(["127.0.0.1"]), ingress_endpoint=f"127.0.0.1:{INGRESS_PORT}"
    )
    for name in SERVICES:
        plane.add_endpoint(f"tcp://{name}:7000")

    async def serve() -> None:
        await trio.serve_tcp(plane.serve, API_PORT, host="127.0.0.1")

    trio.run(serve)
    raise SystemExit("the control plane ended")


# -- the peer ----------------------------------------------------------------------------------------------------------


def serve_forwarder(ca: Authority, directory: Path) -> NoReturn:
    """Accept, one TLS dial with client certificate, header, two copies: what the daemon is compared with."""
    context = ssl.create_default_context(cadata=(ca.root_pem + ca.intermediate_pem).decode())
    client = ca.client("forwarder", not_before=time.time() - 60, not_after=time.time() + 86400)
    (directory / "forwarder.pem").write_bytes(client.chain_pem + client.key_pem)
    context.load_cert_chain(directory / "forwarder.pem")
    for index, name in enumerate(SERVICES):
        listener = socket.create_server(("127.0.0.1", FORWARDER_PORT + index), backlog=1024)
        threading.Thread(target=accept_forever, args=(listener, context, name), daemon=True).start()
    signal.pause()
    raise SystemExit


def accept_forever(listener: socket.socket, context: ssl.SSLContext, name: str) -> None:
    while True:
        app, _ = listener.accept()
        threading.Thread(target=forward, args=(app, context, name), daemon=True).start()


def forward(app: socket.socket, context: ssl.SSLContext, name: str) -> None:
    with contextlib.suppress(OSError), app:
        raw = socket.create_connection(("127.0.0.1", INGRESS_PORT))
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        app.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with context.wrap_socket(raw, server_hostname="127.0.0.1") as tls:
            body = b"\x0a" + bytes([len(name)]) + name.encode() + b"\x10\xd8\x36"
            tls.sendall(struct.pack("<H", len(body)) + body)
            read_exactly(tls, struct.unpack("<H", read_exactly(tls, 2))[0])
            back = threading.Thread(target=copy, args=(tls, app), daemon=True)
            back.start()
            copy(app, tls)
            with contextlib.suppress(OSError):
                tls.unwrap()
            back.join()


def copy(source: socket.socket, target: socket.socket) -> None:
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    with contextlib.suppress(OSError):
        while count := source.recv_into(buffer):
            target.sendall(view[:count])


# -- the load ----------------------------------------------------------------------------------------------------------


def bulk_up(address: tuple[str, int], seconds: float) -> float:
    """Gbit/s written by one app on one connection. What buffers hold at the end is small beside what was sent."""
    block = bytes(CHUNK)
    with socket.create_connection(address) as app:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            app.sendall(block)
        sent, started = 0, time.perf_counter()
        end = started + seconds
        while time.perf_counter() < end:
            app.sendall(block)
            sent += CHUNK
        return sent * 8 / (time.perf_counter() - started) / 1e9


def bulk_down(address: tuple[str, int], seconds: float) -> float:
    """Gbit/s read by one app on one connection."""
    buffer = bytearray(CHUNK)
    with socket.create_connection(address) as app:
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            app.recv_into(buffer)
        received, started = 0, time.perf_counter()
        end = started + seconds
        while time.perf_counter() < end:
            received += app.recv_into(buffer)
        return received * 8 / (time.perf_counter() - started) / 1e9


def ping_pong(address: tuple[str, int], seconds: float) -> float:
    """Microseconds from a 64-byte request to its answer on one open connection, median."""
    with socket.create_connection(address) as app:
        app.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        times = []
        end = time.perf_counter() + seconds
        while (started := time.perf_counter()) < end:
            app.sendall(b"x" * 64)
            read_exactly(app, 64)
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6


def connect_and_byte(address: tuple[str, int], seconds: float) -> float:
    """Milliseconds from connect() to the first byte echoed, back to back, median."""
    times = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        with socket.create_connection(address) as app:
            app.sendall(b"x")
            read_exactly(app, 1)
            times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e3


# case: what, service, measure, unit, whether more is better
CASES: dict[str, tuple[str, str, Callable[[tuple[str, int], float], float], str, bool]] = {
    "up": ("bulk, app to ingress, one connection", "sink.bench", bulk_up, "Gbit/s", True),
    "down": ("bulk, ingress to app, one connection", "source.bench", bulk_down, "Gbit/s", True),
    "pingpong": ("request and answer, one connection", "echo.bench", ping_pong, "us", False),
    "connect": ("new connection and first byte", "echo.bench", connect_and_byte, "ms", False),
}


# -- the stage ---------------------------------------------------------------------------------------------------------


def enter_namespaces(directory: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    clone_newns, clone_newnet, ms_rec_private, ms_bind = 0x20000, 0x40000000, 0x4000 | 0x40000, 0x1000
    if libc.unshare(clone_newns | clone_newnet):
        raise SystemExit(f"this needs root: {os.strerror(ctypes.get_errno())}")
    libc.mount(b"none", b"/", None, ms_rec_private, None)
    hosts = directory / "hosts"
    hosts.write_text("127.0.0.1\tlocalhost\n")
    if libc.mount(os.fsencode(hosts), b"/etc/hosts", None, ms_bind, None):
        raise SystemExit(f"cannot bind a private hosts file: {os.strerror(ctypes.get_errno())}")
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)


@contextlib.contextmanager
def forked(serve: Callable[..., NoReturn], *args: object) -> Iterator[None]:
    pid = os.fork()
    if not pid:
        try:
            serve(*args)
        finally:
            os._exit(1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@contextlib.contextmanager
def daemon(directory: Path, ca: Authority) -> Iterator[str]:
    (directory / "ca.pem").write_bytes(ca.root_pem)
    config = directory / "config.toml"
    config.write_text(
        f'[api]\nurl = "https://127.0.0.1:{API_PORT}"\nca_file = "{directory}/ca.pem"\n'
        f'[ingress]\nca_file = "{directory}/ca.pem"\n'
        f'[state]\ndirectory = "{directory}/state"\n'
        f'[control]\nsocket = "{directory}/control.sock"\n[http]\nlisten = ""\n'
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "ngrokd", "run", "--config", str(config)],
        stdout=subprocess.PIPE,
        stderr=(directory / "daemon.log").open("wb"),
        text=True,
        cwd=ROOT,
        env=os.environ | {"NGROK_API_KEY": DEFAULT_KEY},
    )
    try:
        assert process.stdout is not None
        ready = process.stdout.readline().strip()
        if not ready.startswith("[ready]"):
            raise SystemExit("the daemon did not become ready:\n" + (directory / "daemon.log").read_text())
        yield ready
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def wait_for(port: int) -> None:
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.02)
    raise SystemExit(f"nothing listens on port {port}")


def measure(cases: list[str], seconds: float, rounds: int) -> dict[str, dict[str, float]]:
    results: dict[str, dict[str, list[float]]] = {case: {"daemon": [], "forwarder": []} for case in cases}
    for _ in range(rounds):
        for case in cases:
            _, service, run, _, _ = CASES[case]
            ways = {
                "daemon": (socket.gethostbyname(service), 7000),
                "forwarder": ("127.0.0.1", FORWARDER_PORT + SERVICES.index(service)),
            }
            for way, address in ways.items():
                results[case][way].append(run(address, seconds))
    medians = {case: {way: statistics.median(values) for way, values in ways.items()} for case, ways in results.items()}
    for case, values in medians.items():
        more = CASES[case][4]
        values["ratio"] = values["daemon"] / values["forwarder"] if more else values["forwarder"] / values["daemon"]
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--json", action="store_true", help="one JSON document instead of a table")
    options = parser.parse_args()

    directory = Path(tempfile.mkdtemp(prefix="ngrokd-bench-"))
    try:
        enter_namespaces(directory)
        ca = Authority("ngrokd bench")
        with forked(serve_api, ca), forked(serve_ingress, ca), forked(serve_forwarder, ca, directory):
            for port in (API_PORT, INGRESS_PORT, FORWARDER_PORT + len(SERVICES) - 1):
                wait_for(port)
            with daemon(directory, ca) as ready:
                medians = measure(options.cases.split(","), options.seconds, options.rounds)
    finally:
        shutil.rmtree(directory, ignore_errors=True)

    if options.json:
        print(json.dumps({"schema": "ngrokd.bench/1", "data": medians}))
        return
    print(f"{ready}\n{platform.platform()}, {os.cpu_count()} cores, CPython {platform.python_version()}")
    print(f"{options.rounds} alternating rounds of {options.seconds:g} s, medians; ratio > 1: the daemon is ahead\n")
    print(f"{'case':<40}{'daemon':>12}{'forwarder':>12}{'ratio':>8}")
    for case, values in medians.items():
        what, _, _, unit, _ = CASES[case]
        print(f"{what:<40}{values['daemon']:>12.2f}{values['forwarder']:>12.2f}{values['ratio']:>8.2f}  {unit}")


if __name__ == "__main__":
    main()
