"""What is recorded: real programs on a real kernel, and who answers them through our stack.

An endpoint is 10.107.0.2, and fd6b::2. What answers on one of its ports is either a few lines of Python here, or a real
server that listens on the loopback of the namespace and is reached through `relay`, as an ingress would be.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import socket
import sys
import textwrap
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import trio

from tests.netns.support import Namespace, Running
from tun.network import FlowRequest, FlowStream
from tun.testing.memory import NO_FAULTS, Faults

ENDPOINT: Final = "10.107.0.2"
ENDPOINT6: Final = "fd6b::2"
NOBODY: Final = "10.107.9.9"
NOBODY6: Final = "fd6b::9:9"
_SYSTEM_PATH: Final = "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin"

Handler = Callable[[FlowStream], Awaitable[None]]

# What the apps in Python have at hand.
PRELUDE: Final = """
import os, socket, struct, sys, threading, time
from random import Random

def connect(port=80, window=0):
    s = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
    if window:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    s.connect((sys.argv[1], port))
    return s

def read_all(s):
    return b"".join(iter(lambda: s.recv(100_000), b""))

def reset(s):
    s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    s.close()
"""


class Stage:
    """A namespace with our stack behind its TUN device, and who answers on which port.

    Attributes:
        endpoint, nobody: addresses of the version of IP that is recorded, with and without somebody there.
    """

    def __init__(self, ns: Namespace, *, ipv6: bool = False) -> None:
        self.ns = ns
        self.endpoint, self.nobody = (ENDPOINT6, NOBODY6) if ipv6 else (ENDPOINT, NOBODY)
        self.nursery: trio.Nursery | None = None
        self.handlers: dict[int, Handler] = {}
        self.directory = Path("/run")  # private to the namespace

    def serve(self, request: FlowRequest) -> None:
        """Answer a request: by the handler of its port, or refuse."""
        handler = self.handlers.get(request.destination[1])
        assert self.nursery is not None
        if handler is None:
            request.refuse()
        else:
            self.nursery.start_soon(self._serve, handler, request)

    async def _serve(self, handler: Handler, request: FlowRequest) -> None:
        async with request.accept() as flow:
            with contextlib.suppress(trio.BrokenResourceError):  # the app has gone: some scenarios are about that
                await handler(flow)

    async def run(self, *arguments: str, check: bool = True, text: str | None = None) -> str:
        """Run a program inside to its end; what it printed."""
        result = await self.ns.run_async(arguments, check=False, input=text, cwd="/")
        printed = result.stdout + result.stderr
        if check and result.returncode:
            raise RuntimeError(f"{arguments} exited with {result.returncode}: ...{printed[-2000:]}")
        return printed

    async def python(self, source: str, *, check: bool = True) -> str:
        """Run Python inside, with the sockets of that kernel; the source begins with PRELUDE."""
        program = PRELUDE + textwrap.dedent(source)
        return await self.run(sys.executable, "-c", program, self.endpoint, check=check)

    async def start(self, *arguments: str, port: int) -> Running:
        """Start a server inside that listens on the loopback, and wait until it does."""
        running = self.ns.start(arguments, cwd="/")
        with trio.fail_after(20):
            while True:
                try:
                    (await self.connect_inside(port)).close()
                except OSError:
                    assert running.returncode is None, running.stdout + running.stderr
                    await trio.sleep(0.05)
                else:
                    return running

    async def connect_inside(self, port: int) -> trio.socket.SocketType:
        """Connect to a server on the loopback of the namespace."""
        client = trio.socket.from_stdlib_socket(self.ns.call(socket.socket))
        try:
            await client.connect(("127.0.0.1", port))
        except BaseException:
            client.close()
            raise
        return client

    def relay(self, port: int) -> Handler:
        """A handler that carries every byte to a server inside, and back."""
        return functools.partial(_relay, self, port)


async def _relay(stage: Stage, port: int, flow: FlowStream) -> None:
    server = trio.SocketStream(await stage.connect_inside(port))

    async def there() -> None:
        async for data in flow:
            await server.send_all(data)
        await server.send_eof()

    async def back() -> None:
        async for data in server:
            await flow.send_all(bytes(data))
        await flow.send_eof()
        await flow.wait_delivered()

    try:
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(there)
            nursery.start_soon(back)
    except* trio.BrokenResourceError:
        flow.abort()


@dataclass(frozen=True, slots=True)
class Scenario:
    """Something to record.

    Attributes:
        why: what it shows, one line.
        ports: of the endpoint.
        programs: that have to be installed.
        linger_s: how long recording goes on after it.
    """

    name: str
    why: str
    run: Callable[[Stage], Awaitable[None]]
    ports: tuple[int, ...] = (80,)
    programs: tuple[str, ...] = ()
    offload: bool = True
    ipv6: bool = False
    faults: Faults = NO_FAULTS
    linger_s: float = 0.3

    def missing_programs(self) -> list[str]:
        """Programs that are not installed here."""
        return [name for name in self.programs if shutil.which(name, path=_SYSTEM_PATH) is None]


SCENARIOS: Final[dict[str, Scenario]] = {}


def scenario(
    name: str, why: str, *, twice: bool = False, **details: object
) -> Callable[[Callable[[Stage], Awaitable[None]]], Callable[[Stage], Awaitable[None]]]:
    """Register a scenario; with `twice` another one, NAME-ipv6, that does the same over IPv6."""

    def register(run: Callable[[Stage], Awaitable[None]]) -> Callable[[Stage], Awaitable[None]]:
        SCENARIOS[name] = Scenario(name, why, run, **details)  # type: ignore[arg-type]  # as Scenario says
        if twice:
            twin = replace(SCENARIOS[name], name=f"{name}-ipv6", why=f"{name}, over IPv6", ipv6=True)
            SCENARIOS[twin.name] = twin
        return run

    return register


def body(size: int, seed: int = 1) -> bytes:
    """Bytes that are all different, and compress well in a repository: numbered lines."""
    lines = b"".join(
        b"%07d the quick brown fox jumps over the lazy dog %d\n" % (n, seed) for n in range(size // 52 + 1)
    )
    return lines[:size]


# HTTP


async def http(flow: FlowStream) -> None:
    """A small web server: GET /N answers N bytes, POST answers how many came; connections are kept."""
    waiting = b""
    while True:
        while b"\r\n\r\n" not in waiting:
            data = await flow.receive_some()
            if not data:
                await flow.send_eof()
                return
            waiting += data
        head, waiting = waiting.split(b"\r\n\r\n", 1)
        method, path = head.split(b" ")[:2]
        if b"100-continue" in head:
            await flow.send_all(b"HTTP/1.1 100 Continue\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        size = int(length[1]) if length else 0
        while len(waiting) < size:
            waiting += await flow.receive_some()
        waiting = waiting[size:]
        answer = b"%d bytes\n" % size if method == b"POST" else body(int(path[1:]))
        await flow.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)


@scenario("curl-keepalive", "five requests on one connection, and the end of it", programs=("curl",))
async def curl_keepalive(stage: Stage) -> None:
    stage.handlers[80] = http
    out = await stage.run("curl", "-sS", *(f"http://{ENDPOINT}/{size}" for size in (1, 100, 1460, 5000, 20000)))
    assert len(out) == 26561


@scenario("curl-download", "a large body", programs=("curl",))
async def curl_download(stage: Stage) -> None:
    stage.handlers[80] = http
    assert await stage.run("curl", "-sS", f"http://{ENDPOINT}/300000") == body(300_000).decode()


@scenario("curl-upload", "a large body the other way, announced by 'Expect: 100-continue'", programs=("curl",))
async def curl_upload(stage: Stage) -> None:
    stage.handlers[80] = http
    expect = ["-H", "Expect: 100-continue", "--data-binary", "@-"]
    out = await stage.run("curl", "-sS", *expect, f"http://{ENDPOINT}/", text=body(300_000).decode())
    assert out == "300000 bytes\n"


@scenario("curl-plain", "both ways on a device without offload", programs=("curl",), offload=False)
async def curl_plain(stage: Stage) -> None:
    stage.handlers[80] = http
    urls = [f"http://{ENDPOINT}/100000", f"http://{ENDPOINT}/x"]
    await stage.run("curl", "-sS", urls[0])
    out = await stage.run("curl", "-sS", "--data-binary", "@-", urls[1], text=body(100_000).decode())
    assert out == "100000 bytes\n"


@scenario("curl-ipv6", "all of it over IPv6", ports=(80, 81), programs=("curl", "ping"), ipv6=True)
async def curl_ipv6(stage: Stage) -> None:
    stage.handlers[80] = http
    there = f"http://[{ENDPOINT6}]"
    assert len(await stage.run("curl", "-sS", f"{there}/1", f"{there}/100000")) == 100_001
    out = await stage.run("curl", "-sS", "--data-binary", "@-", f"{there}/", text=body(100_000).decode())
    assert out == "100000 bytes\n"
    for url in (f"{there}:81/", f"{there}:82/", f"http://[{NOBODY6}]/"):
        assert "connect" in await stage.run("curl", "-sS", "-m", "5", url, check=False)
    for size in ("0", "1452", "1453", "5000"):
        await stage.run("ping", "-6", "-n", "-c", "1", "-W", "2", "-s", size, ENDPOINT6)


@scenario(
    "http2",
    "three streams at once over one connection, then curl",
    programs=("curl", "nghttp", "nghttpd"),
)
async def http2(stage: Stage) -> None:
    root = stage.directory / "http2"
    stage.ns.call(root.mkdir)
    for name, size in (("a", 60_000), ("b", 30_000), ("c", 10)):
        stage.ns.call((root / name).write_bytes, body(size, ord(name)))
    await stage.start("nghttpd", "--no-tls", "-d", str(root), "-a", "127.0.0.1", "8080", port=8080)
    stage.handlers[80] = stage.relay(8080)
    urls = [f"http://{ENDPOINT}/{name}" for name in "abc"]
    await stage.run("nghttp", "-n", *urls)
    out = await stage.run("curl", "-sS", "--http2-prior-knowledge", urls[0])
    assert len(out) == 60_000, out[:500]


# Other protocols


@scenario(
    "ssh", "the server speaks first; a session with a command", ports=(22,), programs=("ssh", "sshd", "ssh-keygen")
)
async def ssh(stage: Stage) -> None:
    home = stage.directory / "ssh"
    stage.ns.call(home.mkdir, 0o700)
    stage.ns.call((stage.directory / "sshd").mkdir)
    for name in ("host", "user"):
        await stage.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(home / name))
    options = ["StrictModes no", "UsePAM no", "PidFile none", f"HostKey {home}/host"]
    options += [f"AuthorizedKeysFile {home}/user.pub", "PermitRootLogin yes", "ListenAddress 127.0.0.1:2222"]
    stage.ns.call((home / "config").write_text, "\n".join(options) + "\n")
    sshd = shutil.which("sshd", path=_SYSTEM_PATH)
    assert sshd is not None
    await stage.start(sshd, "-D", "-e", "-f", str(home / "config"), port=2222)
    stage.handlers[22] = stage.relay(2222)
    known = ["-o", "UserKnownHostsFile=/dev/null", "-o", "StrictHostKeyChecking=no", "-o", "LogLevel=ERROR"]
    out = await stage.run("ssh", "-F", "none", "-T", "-i", str(home / "user"), *known, f"root@{ENDPOINT}", "echo hello")
    assert out == "hello\n", out


@scenario(
    "redis", "pipelining: thousands of small commands at once", ports=(6379,), programs=("redis-server", "redis-cli")
)
async def redis(stage: Stage) -> None:
    where = ["--bind", "127.0.0.1", "--port", "6380", "--save", "", "--dir", str(stage.directory)]
    await stage.start("redis-server", *where, port=6380)
    stage.handlers[6379] = stage.relay(6380)
    commands = "".join(f"SET key{n} value{n}\r\nGET key{n}\r\n" for n in range(2000))
    out = await stage.run("redis-cli", "-h", ENDPOINT, "--pipe", text=commands)
    assert "errors: 0, replies: 4000" in out, out
    await stage.run("redis-cli", "-h", ENDPOINT, "-r", "5", "INCR", "counter")


def _postgres() -> list[Path]:
    return sorted(Path("/usr/lib/postgresql").glob("*/bin"))


@scenario(
    "psql", "queries, a COPY of some size both ways, a cancelled query", ports=(5432,), programs=("psql", "runuser")
)
async def psql(stage: Stage) -> None:
    (server,) = _postgres()[-1:]
    data = stage.directory / "db"
    stage.ns.call(data.mkdir)
    stage.ns.call(shutil.chown, data, "postgres", "postgres")
    as_user = ["runuser", "-u", "postgres", "--"]
    await stage.run(*as_user, str(server / "initdb"), "-A", "trust", "-N", "--locale=C", "-D", str(data))
    settings = ["-p", "5433", "-c", "fsync=off", "-c", f"unix_socket_directories={data}"]
    await stage.start(*as_user, str(server / "postgres"), "-D", str(data), *settings, port=5433)
    stage.handlers[5432] = stage.relay(5433)
    table = "".join(f"{n}\trow number {n} of some length\n" for n in range(2000))
    script = f"CREATE TABLE t (n int, words text);\nCOPY t FROM STDIN;\n{table}\\.\n"
    script += "SELECT count(*) FROM t;\nCOPY t TO STDOUT;\n\\timing on\nSELECT pg_sleep(0.2);\n"
    out = await stage.run("psql", "-X", "-h", ENDPOINT, "-U", "postgres", text=script)
    assert "row number 1999 of" in out, out
    assert await stage.run("psql", "-X", "-A", "-t", "-h", ENDPOINT, "-U", "postgres", "-c", "SELECT 6 * 7") == "42\n"
    await stage.run(
        "timeout", "-s", "INT", "0.3", "psql", "-X", "-h", ENDPOINT, "-U", "postgres", "-c", "SELECT pg_sleep(5)",
        check=False,
    )  # fmt: skip


async def _iperf(stage: Stage, *options: str) -> None:
    await stage.start("iperf3", "-s", "-B", "127.0.0.1", "-p", "5202", port=5202)
    stage.handlers[5201] = stage.relay(5202)
    out = await stage.run("iperf3", "-c", ENDPOINT, "-l", "32K", "-n", "256K", *options)
    assert "iperf Done" in out, out


@scenario("iperf-up", "bulk from the app", ports=(5201,), programs=("iperf3",))
async def iperf_up(stage: Stage) -> None:
    await _iperf(stage)


@scenario("iperf-down", "bulk to the app", ports=(5201,), programs=("iperf3",))
async def iperf_down(stage: Stage) -> None:
    await _iperf(stage, "-R")


# Endings


async def read_all(flow: FlowStream) -> bytes:
    """Everything until the app's end."""
    return b"".join([bytes(data) async for data in flow])


async def echo(flow: FlowStream) -> None:
    """Send everything back, then the end."""
    async for data in flow:
        await flow.send_all(data)
    await flow.send_eof()
    await flow.wait_delivered()


@scenario("half-close-app", "the app ends first and still gets its answer", twice=True)
async def half_close_app(stage: Stage) -> None:
    async def answer(flow: FlowStream) -> None:
        question = await read_all(flow)
        await flow.send_all(body(50_000, len(question)))

    stage.handlers[80] = answer
    await stage.python("""
        s = connect()
        s.sendall(b"q" * 20000)
        s.shutdown(socket.SHUT_WR)
        assert len(read_all(s)) == 50000
    """)


@scenario("half-close-us", "we end first, and the app still sends", twice=True)
async def half_close_us(stage: Stage) -> None:
    received: list[bytes] = []

    async def end_first(flow: FlowStream) -> None:
        await flow.send_all(b"done")
        await flow.send_eof()
        received.append(await read_all(flow))

    stage.handlers[80] = end_first
    await stage.python("""
        s = connect()
        assert read_all(s) == b"done"
        time.sleep(0.1)
        s.sendall(b"late" * 10000)
        time.sleep(0.1)
        s.sendall(b"more")
        s.close()
    """)
    await trio.sleep(0.2)
    assert len(received[0]) == 40_004


@scenario("both-close", "both ends close at nearly the same time, several times", twice=True)
async def both_close(stage: Stage) -> None:
    async def close(flow: FlowStream) -> None:
        await flow.send_all(b"hello")
        await flow.receive_some()

    stage.handlers[80] = close
    await stage.python("""
        for _ in range(8):
            s = connect()
            s.sendall(b"x")
            s.shutdown(socket.SHUT_WR)
            assert read_all(s) == b"hello"
            s.close()
    """)


@scenario("abort-app", "apps that reset: idle, in the middle of an upload, of a download, and by dying", twice=True)
async def abort_app(stage: Stage) -> None:
    async def flood(flow: FlowStream) -> None:
        await flow.receive_some()
        await flow.send_all(body(200_000))
        await flow.receive_some()

    stage.handlers[80] = echo
    await stage.python("s = connect(); time.sleep(0.05); reset(s)")
    await stage.python("s = connect(); s.sendall(b'x' * 30000); s.recv(1); reset(s)")
    stage.handlers[80] = flood
    for end in ("reset(s)", "s.close()", "os.kill(os.getpid(), 9)"):
        source = f"s = connect(window=8192); s.sendall(b'x'); s.recv(10); time.sleep(0.05); {end}"
        await stage.python(source, check=False)


@scenario("abort-us", "we refuse and reset: at once, and with bytes on the way", ports=(80, 81), twice=True)
async def abort_us(stage: Stage) -> None:
    async def at_once(flow: FlowStream) -> None:
        flow.abort()

    async def midway(flow: FlowStream) -> None:
        await flow.receive_some()
        await flow.send_all(body(100_000))
        flow.abort()

    stage.handlers[80] = at_once
    await stage.python("""
        try:
            connect().recv(1)
            assert False
        except ConnectionResetError:
            pass
        try:
            connect(81)
            assert False
        except ConnectionRefusedError:
            pass
    """)
    stage.handlers[80] = midway
    await stage.python("""
        s = connect()
        s.sendall(b"x")
        try:
            read_all(s)
            assert False
        except ConnectionResetError:
            pass
    """)


# Windows, losses, and packets that are no connections


@scenario("slow-reader", "an app that does not read: its window closes, we probe, it opens", linger_s=0.5)
async def slow_reader(stage: Stage) -> None:
    async def talk(flow: FlowStream) -> None:
        await flow.send_all(body(150_000))
        await flow.send_eof()
        await flow.wait_delivered()

    stage.handlers[80] = talk
    await stage.python("""
        s = connect(window=8192)
        time.sleep(1.5)
        count = 0
        while data := s.recv(3000):
            count += len(data)
            time.sleep(0.002)
        assert count == 150000
    """)


@scenario("slow-server", "an endpoint that does not read: our window closes, the kernel probes, we open", linger_s=0.5)
async def slow_server(stage: Stage) -> None:
    received: list[bytes] = []

    async def listen(flow: FlowStream) -> None:
        await trio.sleep(1)
        received.append(await read_all(flow))

    stage.handlers[80] = listen
    await stage.python("""
        s = connect()
        s.sendall(b"fill the window " * 50000)
        s.shutdown(socket.SHUT_WR)
        assert s.recv(9) == b""
    """)
    assert len(received[0]) == 800_000


_LOSSES: Final = Faults(loss=0.02, duplication=0.02, reordering=0.02, corruption=0.02, hold_s=0.003)


async def _echo_all(stage: Stage) -> None:
    stage.handlers[80] = echo
    await stage.python("""
        s = connect()
        data = Random(1).randbytes(150000)
        threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()
        assert read_all(s) == data
    """)


@scenario(
    "loss", "2 % of everything lost, doubled, disordered, damaged, both ways", faults=_LOSSES, linger_s=1.0, twice=True
)
async def loss(stage: Stage) -> None:
    await _echo_all(stage)


@scenario("loss-plain", "the same without offload", faults=_LOSSES, offload=False, linger_s=1.0)
async def loss_plain(stage: Stage) -> None:
    await _echo_all(stage)


@scenario("port-scan", "every scan of nmap: open, closed and absent", ports=(80, 443), programs=("nmap",), twice=True)
async def port_scan(stage: Stage) -> None:
    async def wait(flow: FlowStream) -> None:
        await flow.receive_some()

    stage.handlers = {80: wait, 443: wait}
    there = stage.endpoint
    common = ["nmap", *(["-6"] if ":" in there else []), "-n", "-Pn", "--max-retries", "1", "-p"]
    for kind in ("-sS", "-sT", "-sA", "-sN", "-sF", "-sX"):
        await stage.run(*common, "78-82,443", kind, there)
    await stage.run(*common, "53,80,161", "-sU", there)
    await stage.run(*common, "1,2,6,17,47,132", "-sO", there)
    await stage.run(*common, "80", "-sS", stage.nobody)


@scenario("ping", "pings of all sizes, a datagram that nobody wants, an address that nobody has", programs=("ping",))
async def ping(stage: Stage) -> None:
    for size in ("0", "1", "56", "1472", "1473", "20000"):
        await stage.run("ping", "-n", "-c", "2", "-i", "0.05", "-W", "2", "-s", size, ENDPOINT)
    await stage.run("ping", "-n", "-c", "1", "-W", "1", NOBODY, check=False)
    await stage.python(f"""
        s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        s.connect(("{ENDPOINT}", 9))
        s.send(b"x")
        try:
            s.recv(1)
            assert False
        except ConnectionRefusedError:
            pass
    """)
