"""Programs that people use, through the TUN: with the whole daemon, and some with the stack alone."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import trio

from tests.netns.stage import Stage
from tests.netns.support import Namespace, Running, find_tool, open_namespace, require_namespaces, require_tools
from tests.netns.test_netns_stack import SERVED, Handler, world
from tests.netns.test_netns_stack_ipv6 import has_ipv6
from tun.network import FlowRequest, FlowStream

pytestmark = pytest.mark.netns

Look = Callable[[str], str]

# Which server listens behind which endpoint, on the loopback inside.
SERVERS = {
    "tcp://ssh.demo:22": 2222,
    "tcp://redis.demo:6379": 6380,
    "tcp://iperf.demo:5201": 5202,
    "http://http2.demo": 8080,
}
NOISE_BYTES = 20_000_000
IPERF_BYTES = 200_000_000


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """One daemon for all tests that ask for it."""
    require_namespaces()
    with open_namespace() as ns:
        endpoints = [f"--endpoint={url}=forward:127.0.0.1:{port}" for url, port in SERVERS.items()]
        subnet6 = ["--set", 'net.subnet6="auto"'] if has_ipv6(ns) else []
        play = Stage(ns, "--demo", *endpoints, *subnet6)
        try:
            play.start()
            yield play
        finally:
            play.close()


@pytest.fixture(params=[4, 6])
def where(stage: Stage, request: pytest.FixtureRequest) -> Look:
    """Tells the address of a name, of one version of IP."""
    if request.param == 6 and not has_ipv6(stage.ns):
        pytest.skip("this kernel has no IPv6")
    return lambda name: address_of(stage, name, request.param)


def address_of(stage: Stage, name: str, version: int = 4) -> str:
    found = re.findall(rf"^(\S+)\t{re.escape(name)}$", stage.hosts(), re.MULTILINE)
    return str(next(address for address in found if (":" in address) is (version == 6)))


def bracketed(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def start_server(ns: Namespace, port: int, *arguments: str | Path) -> Running:
    """Start a server inside, and wait until it listens."""
    require_tools(str(arguments[0]), "ss")
    server = ns.start([find_tool(str(arguments[0])) or "", *arguments[1:]], cwd="/")
    deadline = time.monotonic() + 10
    while f":{port} " not in ns.run(["ss", "-Hltn"]).stdout:
        assert server.returncode is None, server.stdout + server.stderr
        assert time.monotonic() < deadline, server
        time.sleep(0.02)
    return server


@contextmanager
def only_real_losses(ns: Namespace) -> Iterator[None]:
    """What the kernel resends was lost, or not acknowledged for 200 ms at least.

    Its tail loss probes (RFC 8985 7) resend what has been under way for two round trips and 2 ms: whenever a busy
    machine gives this process no processor for so long. Kernels send them to each other over the loopback as well.
    """
    path = "/proc/sys/net/ipv4/tcp_early_retrans"
    before = ns.read_file(path)
    ns.write_file(path, "0")
    try:
        yield
    finally:
        ns.write_file(path, before)


def noise(path: Path, seed: int) -> str:
    """Write a file of noise; its SHA-256."""
    path.write_bytes(Random(seed).randbytes(NOISE_BYTES))
    return sha256(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# HTTP


def test_curl(stage: Stage, where: Look, tmp_path: Path) -> None:
    """A page, several over one connection, a large answer, a large question."""
    url = f"http://{bracketed(where('hello.demo'))}"
    curl = ["curl", "-sS", "-f", "-m", "20"]
    noise_sent = noise(tmp_path / "up", 1)

    page = stage.ns.run([*curl, f"{url}/"]).stdout
    pages = [word for size in (0, 1, 1460, 70_000) for word in ("-o", "/dev/null", f"{url}/bytes/{size}")]
    kept = stage.ns.run([*curl, "-w", "%{num_connects} %{size_download}\n", *pages]).stdout
    headers = stage.ns.run([*curl, "-D", "-", "-o", tmp_path / "down", f"{url}/bytes/{NOISE_BYTES}"]).stdout
    chunked = stage.ns.run([*curl, "-D", "-", "-o", tmp_path / "chunked", f"{url}/bytes/{NOISE_BYTES}?chunked"]).stdout
    answer = json.loads(stage.ns.run([*curl, "--data-binary", f"@{tmp_path}/up", f"{url}/hash"]).stdout)

    assert page == "Hello from the lab.\n"
    assert kept.split() == ["1", "0", "0", "1", "0", "1460", "0", "70000"]
    assert re.findall(r"(?im)^x-sha256: (\w+)", headers) == [sha256(tmp_path / "down")]
    assert re.findall(r"(?im)^x-sha256: (\w+)", chunked) == [sha256(tmp_path / "chunked")]
    assert answer == {"sha256": noise_sent, "length": NOISE_BYTES}


def test_curl_speaks_http2(stage: Stage, where: Look, tmp_path: Path) -> None:
    require_tools("nghttpd")
    if "HTTP2" not in stage.ns.run(["curl", "-V"]).stdout:
        pytest.skip("this curl does not speak HTTP/2")
    wanted = noise(tmp_path / "page", 2)
    server = start_server(stage.ns, 8080, "nghttpd", "--no-tls", "-d", tmp_path, "-a", "127.0.0.1", "8080")
    url = f"http://{bracketed(where('http2.demo'))}/page"

    curl = ["curl", "-sS", "-f", "-m", "20", "--http2-prior-knowledge", "-w", "%{http_version}"]
    said = stage.ns.run([*curl, "-o", tmp_path / "got", url]).stdout

    assert said == "2"
    assert sha256(tmp_path / "got") == wanted
    server.terminate()
    server.wait()


def test_ab_opens_5000_connections(stage: Stage) -> None:
    """Every one takes a connection to the ingress of its own, which costs a lab in Python most of the time."""
    require_tools("ab")
    url = f"http://{address_of(stage, 'hello.demo')}/"

    said = stage.ns.run(["ab", "-n", "5000", "-c", "100", url], timeout=110).stdout

    assert_ab_is_content(said, 5000)


def assert_ab_is_content(said: str, requests: int) -> None:
    assert re.findall(r"(?m)^(?:Complete|Failed) requests: +(\d+)$", said) == [str(requests), "0"], said
    assert "Non-2xx" not in said


def test_wrk_keeps_256_connections_busy(stage: Stage) -> None:
    require_tools("wrk")
    url = f"http://{address_of(stage, 'hello.demo')}/bytes/1000"

    said = stage.ns.run(["wrk", "-t", "2", "-c", "256", "-d", "3", "--timeout", "20", url]).stdout

    assert "256 connections" in said
    assert "Socket errors" not in said, said
    assert "Non-2xx" not in said, said
    assert int(re.findall(r"(\d+) requests in", said)[0]) > 0


# Bulk


@pytest.mark.parametrize("options", ["-P 1", "-P 8", "-P 1 -R", "-P 8 -R"])
def test_iperf3(stage: Stage, where: Look, options: str) -> None:
    """One connection, and eight at once, each way; nobody resends anything when there is one."""
    server = start_server(stage.ns, 5202, "iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", "5202")
    before = stage.status()["counters"].get("stack.retransmits", 0)

    with only_real_losses(stage.ns):
        report = iperf3(
            stage.ns.run(["iperf3", "-J", "-n", str(IPERF_BYTES), "-c", where("iperf.demo"), *options.split()]).stdout
        )

    resent_by_us = stage.status()["counters"].get("stack.retransmits", 0) - before
    if "-P 1" in options:
        assert resent_by_us == 0
    if options == "-P 1":
        assert report["end"]["sum_sent"]["retransmits"] == 0
    assert server.wait() == 0


def iperf3(said: str) -> dict[str, Any]:
    """Its report; fails the test when not everything arrived."""
    report: dict[str, Any] = json.loads(said)
    assert "error" not in report, report["error"]
    assert report["end"]["sum_received"]["bytes"] > IPERF_BYTES / 2  # the rest was on its way
    return report


# Servers with their own ways


def test_redis_benchmark(stage: Stage, where: Look, tmp_path: Path) -> None:
    """Fifty clients, with and without pipelining."""
    require_tools("redis-benchmark", "redis-cli")
    options = ["--bind", "127.0.0.1", "--port", "6380", "--save", "", "--dir", str(tmp_path)]
    server = start_server(stage.ns, 6380, "redis-server", *options)
    address = where("redis.demo")
    benchmark = ["redis-benchmark", "-h", address, "--csv", "-c", "50"]

    one = stage.ns.run([*benchmark, "-n", "500", "-t", "set,get"]).stdout
    many = stage.ns.run([*benchmark, "-n", "20000", "-P", "32", "-d", "1000", "-t", "set,get,lpush"]).stdout
    statistics = stage.ns.run(["redis-cli", "-h", address, "info", "commandstats"]).stdout

    assert re.findall(r'(?m)^"([A-Z]+)', one) == ["SET", "GET"]
    assert re.findall(r'(?m)^"([A-Z]+)', many) == ["SET", "GET", "LPUSH"]
    assert int(re.findall(r"cmdstat_lpush:calls=(\d+)", statistics)[0]) >= 20_000
    server.terminate()
    assert server.wait() == 0


def test_socat_half_closes(stage: Stage, where: Look, tmp_path: Path) -> None:
    """Either side may end first; the other still gets every byte, and its answer."""
    require_tools("socat")
    wanted = noise(tmp_path / "noise", 3)

    def socat(name: str, port: int, before: str = "true") -> str:
        line = f"({before}; cat {tmp_path}/noise) | socat -t 20 - TCP:{bracketed(where(name))}:{port}"
        return stage.ns.run(["sh", "-c", line]).stdout

    tallies = stage.lab.do("tallies closes.demo:9001")["tallies"]
    app_first = socat("answer.demo", 9000)
    we_first = socat("closes.demo", 9001, before="sleep 0.3")
    deadline = time.monotonic() + 5
    while (counted := stage.lab.do("tallies closes.demo:9001")["tallies"][len(tallies) :]) == []:
        assert time.monotonic() < deadline

    assert app_first == f"{wanted} {NOISE_BYTES}\n"
    assert we_first == "that is all from me\n"
    assert counted == [{"length": NOISE_BYTES, "sha256": wanted, "ended": "eof"}]


def test_ssh_and_scp(stage: Stage, where: Look, tmp_path: Path) -> None:
    """The server speaks first; a command with input and output of some size; files both ways."""
    require_tools("ssh", "scp", "ssh-keygen", "sshd")
    for name in ("host", "user"):
        stage.ns.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", tmp_path / name])
    options = ["StrictModes no", "UsePAM no", "PidFile none", "PermitRootLogin yes", "ListenAddress 127.0.0.1:2222"]
    options += [f"HostKey {tmp_path}/host", f"AuthorizedKeysFile {tmp_path}/user.pub", "Subsystem sftp internal-sftp"]
    (tmp_path / "config").write_text("\n".join(options) + "\n")
    stage.ns.run(["mkdir", "-p", "/run/sshd"])
    server = start_server(stage.ns, 2222, "sshd", "-D", "-e", "-f", tmp_path / "config")
    address = where("ssh.demo")
    (tmp_path / "known").write_text(f"{address} {(tmp_path / 'host.pub').read_text()}")
    common = ["-F", "none", "-i", f"{tmp_path}/user", "-o", f"UserKnownHostsFile={tmp_path}/known"]
    common += ["-o", "BatchMode=yes", "-o", "GlobalKnownHostsFile=none", "-o", "ConnectTimeout=10"]
    there = f"root@{bracketed(address)}:{tmp_path}"
    wanted = noise(tmp_path / "noise", 4)

    hello = stage.ns.run(["ssh", "-T", *common, f"root@{address}", "echo hello"]).stdout
    text = "numbered lines are text\n" * 50_000
    counted = stage.ns.run(["ssh", "-T", *common, f"root@{address}", "wc -c; echo end"], input=text).stdout
    stage.ns.run(["scp", "-q", *common, tmp_path / "noise", f"{there}/up"])
    stage.ns.run(["scp", "-q", *common, f"{there}/noise", tmp_path / "down"])

    assert hello == "hello\n"
    assert counted.split() == [str(len(text)), "end"]
    assert sha256(tmp_path / "up") == sha256(tmp_path / "down") == wanted
    server.terminate()
    server.wait()


# Not TCP, and no friend


def test_ping_of_all_sizes(stage: Stage, where: Look) -> None:
    """Around the size of each number of fragments, up to the largest there is."""
    require_tools("ping")
    address = where("hello.demo")
    fragment, most = (1448, 65527) if ":" in address else (1480, 65507)
    edges = {fragment * count - 8 + offset for count in range(1, 46) for offset in (-1, 0, 1)}
    sizes = sorted(size for size in {*edges, 0, 1, 2, 15, 16, 17, 56, most - 1, most} if size <= most)
    line = f"for size in $*; do ping -n -q -c 1 -W 5 -s $size {address} || echo FAILED $size; done"

    said = stage.ns.run(["sh", "-c", line, "sh", *map(str, sizes)]).stdout
    flood = stage.ns.run(["ping", "-n", "-q", "-f", "-c", "500", "-s", "20000", address]).stdout

    assert "FAILED" not in said
    assert "wrong" not in said
    assert said.count("1 packets transmitted, 1 received, 0% packet loss") == len(sizes) > 100
    assert "500 packets transmitted, 500 received" in flood


KERNEL_SERVER = """
import socket
server = socket.create_server(("::", 80), family=socket.AF_INET6, dualstack_ipv6=True, backlog=500)
print("listening", flush=True)
while True:
    server.accept()[0].close()
"""
SCANS = ["-sS", "-sT", "-sA", "-sW", "-sM", "-sN", "-sF", "-sX", "-sU", "-sS --scanflags SYNFIN", "-sS --scanflags PSH"]
# Answered by some kernels, as they were built: IGMP, tunnels, PIM, SCTP, UDP-Lite and others.
MODULES = {
    "ip/2",
    "ip/4",
    "ip/41",
    "ip/47",
    "ip/50",
    "ip/51",
    "ip/103",
    "ip/108",
    "ip/112",
    "ip/115",
    "ip/132",
    "ip/136",
}


@pytest.fixture(scope="module")
def neighbour(stage: Stage) -> Iterator[Namespace]:
    """A kernel at the other end of a wire, 192.0.2.2 and 2001:db8::2, which listens where we do and answers as fast."""
    with open_namespace() as peer:
        link = ["ip", "link", "add", "lan0", "type", "veth", "peer", "name", "lan1", "netns", str(peer.pid)]
        stage.ns.run(link)
        for ns, name, last in ((stage.ns, "lan0", 1), (peer, "lan1", 2)):
            ns.run(["ip", "addr", "add", f"192.0.2.{last}/24", "dev", name])
            if has_ipv6(ns):
                ns.run(["ip", "addr", "add", f"2001:db8::{last}/64", "dev", name, "nodad"])
            ns.run(["ip", "link", "set", name, "up"])
        limits = "/proc/sys/net/ipv?/icmp_ratelimit /proc/sys/net/ipv6/icmp/ratelimit"
        peer.run(["sh", "-c", f"for limit in {limits}; do [ ! -e $limit ] || echo 0 >$limit; done"])
        peer.start([sys.executable, "-c", KERNEL_SERVER]).expect("listening")
        try:
            yield peer
        finally:
            stage.ns.run(["ip", "link", "del", "lan0"])


def test_nmap_cannot_tell_us_from_a_kernel(stage: Stage, where: Look, neighbour: Namespace) -> None:
    """Open and closed ports, and protocols: the same verdict for the same reason, with the same TTL."""
    require_tools("nmap")
    ours = where("hello.demo")
    kernel = "2001:db8::2" if ":" in ours else "192.0.2.2"
    common = ["nmap", "-n", "-Pn", "-oX", "-", *(["-6"] if ":" in ours else [])]
    running = [
        (scan, target, stage.ns.start([*common, *scan.split(), "-p", "78-82,443", target]))
        for scan in SCANS
        for target in (ours, kernel)
    ]
    # Of more than 25 with the same state nmap tells the number only.
    protocols = "0,1,2,3,5,6,8,17,33,41,44,47,50,51,58,59,60,88,89,103,132,137,254,255"
    by_protocol = [stage.ns.start([*common, "-sO", "-p", protocols, target]) for target in (ours, kernel)]

    found: dict[str, dict[str, dict[str, tuple[str, ...]]]] = {scan: {} for scan in SCANS}
    for scan, target, nmap in running:
        found[scan][target] = verdicts(nmap)
    our_protocols, its_protocols = map(verdicts, by_protocol)

    for scan in SCANS:
        assert found[scan][ours] == found[scan][kernel], scan
        assert len(found[scan][ours]) == 6
    assert len(our_protocols) == len(its_protocols) == 24
    for protocol, verdict in its_protocols.items():
        if protocol not in MODULES:
            # Whatever nmap sees first of ICMP, an echo or an error about another protocol, is its reason.
            compared = slice(0, 1) if protocol in ("ip/1", "ip/58") else slice(0, 3)
            assert our_protocols[protocol][compared] == verdict[compared], protocol


def verdicts(nmap: Running) -> dict[str, tuple[str, ...]]:
    """What nmap says: "tcp/80" -> state, reason, TTL."""
    assert nmap.wait(timeout=60) == 0, nmap.stderr
    found: dict[str, tuple[str, ...]] = {}
    root = ET.fromstring(nmap.stdout)
    for port in root.iter("port"):
        state = port.find("state")
        assert state is not None
        found[f"{port.get('protocol')}/{port.get('portid')}"] = tuple(
            state.get(name, "") for name in ("state", "reason", "reason_ttl")
        )
    return found


# The stack alone


async def answer(request: FlowRequest) -> None:
    """The smallest web service."""
    async with request.accept() as flow:
        asked = b""
        while b"\r\n\r\n" not in asked:
            asked += await flow.receive_some()
        await flow.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")


async def test_ab_opens_5000_connections_to_the_stack_alone(netns: Callable[[], Namespace]) -> None:
    require_tools("ab")

    async with world(netns(), answer) as there:
        url = f"http://{SERVED[0]}/"
        said = await there.ns.run_async(["ab", "-n", "5000", "-c", "100", url], timeout=50)

    assert_ab_is_content(said.stdout, 5000)


def relay(ns: Namespace, port: int) -> Handler:
    """Carries every byte to a server on the loopback inside, and back."""

    async def serve(request: FlowRequest) -> None:
        sock = trio.socket.from_stdlib_socket(ns.call(socket.socket))
        await sock.connect(("127.0.0.1", port))
        async with trio.SocketStream(sock) as server, request.accept() as flow:
            with suppress(trio.BrokenResourceError):  # a benchmark's client leaves as it likes
                await splice(flow, server)

    return serve


async def splice(flow: FlowStream, server: trio.SocketStream) -> None:
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
        async with trio.open_nursery() as nursery:
            nursery.start_soon(there)
            nursery.start_soon(back)
    except* trio.BrokenResourceError as errors:
        raise trio.BrokenResourceError from errors


@pytest.mark.parametrize("options", ["-P 1", "-P 8", "-P 1 -R", "-P 8 -R"])
async def test_iperf3_with_the_stack_alone(netns: Callable[[], Namespace], options: str) -> None:
    """One connection, and eight at once, each way; nobody resends anything when there is one."""
    ns = netns()
    start_server(ns, 5202, "iperf3", "-s", "-1", "-B", "127.0.0.1", "-p", "5202")

    with only_real_losses(ns):
        async with world(ns, relay(ns, 5202)) as there:
            client = ["iperf3", "-J", "-n", f"{IPERF_BYTES}", "-c", SERVED[0], "-p", str(SERVED[1]), *options.split()]
            report = iperf3((await ns.run_async(client, timeout=50)).stdout)

    if "-P 1" in options:
        assert there.stack.retransmits == 0
    if options == "-P 1":
        assert report["end"]["sum_sent"]["retransmits"] == 0
