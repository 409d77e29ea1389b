"""How fast the relay's TLS stream is, each way, without the packet path.

One process runs TlsStream under Trio as the relay does (64 KiB views in, views out); the other end is a process of its
own with a plain blocking SSL socket, over TCP on loopback. "per core" divides by the CPU time of our process alone, so
it says what one core of ours can do however busy the machine and the other end are.

    python bench/bench_tls.py [--seconds 3] [--tls 1.3] [--view 65536]
"""

from __future__ import annotations

import argparse
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import trio

from ngrokd.relay.tls import CHUNK, SCRATCH, TlsSession, TlsStream
from ngrokd.relay.transport import connect_tcp


def make_certificate(directory: str) -> str:
    """Make a self-signed P-256 certificate; returns the path of certificate and key."""
    path = f"{directory}/server.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-keyout", f"{path}.key", "-out", path, "-days", "1", "-subj", "/CN=bench"]
    command += ["-addext", "subjectAltName=DNS:bench"]
    subprocess.run(command, check=True, capture_output=True)
    with open(path, "a") as file, open(f"{path}.key") as key:
        file.write(key.read())
    return path


def other_end(listener: socket.socket, certificate: str, version: ssl.TLSVersion) -> None:
    """Serve connections: the first byte says whether to swallow, to pour or to echo."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    context.minimum_version = context.maximum_version = version
    buffer = bytearray(256 * 1024)
    block = os.urandom(CHUNK)
    while True:
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            with context.wrap_socket(sock, server_side=True) as tls:
                mode = tls.recv(1)
                if mode == b"u":
                    while tls.recv_into(buffer):
                        pass
                elif mode == b"d":
                    while True:
                        tls.sendall(block)
                else:
                    while count := tls.recv_into(buffer):
                        tls.sendall(memoryview(buffer)[:count])
        except OSError:
            pass


async def connect(port: int, certificate: str) -> TlsStream:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(certificate)
    session = TlsSession(context, server_hostname="bench")
    stream = TlsStream(await connect_tcp("127.0.0.1", port), session, scratch=memoryview(bytearray(SCRATCH)))
    await stream.handshake()
    return stream


async def upload(stream: TlsStream, seconds: float, size: int) -> int:
    stream.send_nowait([b"u"])
    block = memoryview(os.urandom(CHUNK))
    views = [block[start : start + size] for start in range(0, CHUNK, size)]
    sent = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        taken = stream.send_nowait(views)
        sent += taken
        if taken < CHUNK:
            await stream.wait_sendable()
    return sent


async def download(stream: TlsStream, seconds: float) -> int:
    stream.send_nowait([b"d"])
    received = 0
    held: list[memoryview] = []  # as the flow does until the app has acknowledged
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        view = await stream.receive_view()
        received += len(view)
        held.append(view)
        if len(held) > 8:
            held.pop(0)
    return received


async def ping_pong(stream: TlsStream, seconds: float) -> int:
    stream.send_nowait([b"e"])
    question = [memoryview(b"x" * 100)]
    count = 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        stream.send_nowait(question)
        got = 0
        while got < 100:
            got += len(await stream.receive_view())
        count += 1
    return count


async def run(port: int, certificate: str, seconds: float, size: int) -> None:
    for name in ("upload", "download", "ping-pong"):
        stream = await connect(port, certificate)
        cpu, wall = time.process_time(), time.perf_counter()
        if name == "upload":
            amount = await upload(stream, seconds, size)
        elif name == "download":
            amount = await download(stream, seconds)
        else:
            amount = await ping_pong(stream, seconds)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        if name == "ping-pong":
            print(f"{name:10} {wall / amount * 1e6:6.1f} us each, {cpu / amount * 1e6:6.1f} us of CPU")
        else:
            print(f"{name:10} {amount * 8e-9 / wall:6.2f} Gbit/s, {amount * 8e-9 / cpu:6.2f} per core")
        stream.abort()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--tls", choices=["1.2", "1.3"], default="1.3")
    parser.add_argument("--view", type=int, default=CHUNK, help="size of the views that are sent, bytes")
    options = parser.parse_args()
    version = {"1.2": ssl.TLSVersion.TLSv1_2, "1.3": ssl.TLSVersion.TLSv1_3}[options.tls]
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as listener:
        certificate = make_certificate(directory)
        child = os.fork()
        if not child:
            try:
                other_end(listener, certificate, version)
            finally:
                os._exit(1)
        try:
            trio.run(run, listener.getsockname()[1], certificate, options.seconds, options.view)
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


if __name__ == "__main__":
    main()
