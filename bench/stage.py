"""What the benchmark runs on: private namespaces, an ingress near or far, and the programs to compare, each a process.

A `Stage` has one ingress: on the loopback interface, or in a network namespace of its own behind a line with a delay
(two TUN devices; every packet is delayed, so connecting costs a round trip as it does in life). Beside the daemon run
its peers, and all of them lead to the same three services (sink, source, echo) behind that ingress.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import trio

from ngrokd.lab.ca import Authority
from ngrokd.lab.control_plane import DEFAULT_KEY, ControlPlane

SERVICES = ("sink", "source", "echo")  # in the order of their ports
API_PORT = 18443
INGRESS_PORT = 18444
BARE_PORT = 18450  # the ingress without its header: one port for each service
PLAIN_PORT = 18460  # the services themselves
FORWARDER_PORT = 18470
HAPROXY_PORT = 18480
RESUMING_PORT = 18490
NEAR, FAR = "192.0.2.1", "192.0.2.2"  # the ends of the long line
PATIENCE_S = 20.0
DAEMON = "ngrokd"  # the way that all others are compared with
_TICKS = os.sysconf("SC_CLK_TCK")


def enter_namespaces(directory: Path) -> None:
    """Leave the machine's network and mounts for private ones, in which /etc/hosts is a file in `directory`.

    Connections that are over are forgotten early: thousands come from one address, and the kernel would run out of
    ports before the programs under test run out of speed.
    """
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
    settings = {"ip_local_port_range": "1024 65535", "tcp_max_tw_buckets": "2000"}
    for name, value in settings.items():
        Path("/proc/sys/net/ipv4", name).write_text(value)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (65536, 65536))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, hard), hard))


# -- processes ---------------------------------------------------------------------------------------------------------


class Program:
    """A child process that is ready when its first line on stdout says so, or when it listens on `port`.

    Attributes:
        pid: of the process.
        started_in: seconds from its start until it was ready.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        port: int = 0,
    ) -> None:
        started = time.perf_counter()
        self._log = log
        self._name = " ".join(str(argument) for argument in arguments[:4])
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [str(argument) for argument in arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                cwd=cwd,
                env=clean_environment() | dict(env or {}),
            )
        self.pid = self._process.pid
        assert self._process.stdout is not None
        is_ready = listens(port) if port else "ready" in self._process.stdout.readline()
        self.started_in = time.perf_counter() - started
        if not is_ready:
            self.stop()
            raise SystemExit(f"{self._name} did not become ready:\n{self._last_words()}")

    def check(self) -> None:
        """Stop everything when it has ended by itself, saying what it said last."""
        if self._process.poll() is not None:
            raise SystemExit(f"{self._name} ended:\n{self._last_words()}")

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]

    def stop(self) -> None:
        """End it and wait until it has ended."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def clean_environment() -> dict[str, str]:
    """Ours without settings of ngrok programs or proxies that the person at the keyboard may have."""
    return {
        key: value for key, value in os.environ.items() if not key.startswith("NGROK") and "proxy" not in key.lower()
    }


def tree(pid: int) -> list[int]:
    """A process and everything below it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{parent}/task"):
                found += map(int, Path(f"/proc/{parent}/task/{task}/children").read_text().split())
    return found


def cpu_seconds(pid: int) -> float:
    """CPU time that a process tree has used, in user and in kernel mode, to 10 ms for each process."""
    ticks = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def memory_bytes(pid: int) -> int:
    """Resident memory of a process tree; what several processes share counts once."""
    total = 0
    for each in tree(pid):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


# -- the ways to a service ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Way:
    """One way from an app to the services.

    Attributes:
        name: as it stands in tables.
        addresses: HOST:PORT for each service.
        program: what carries the bytes; None for the direct connection.
        variant: whether it is a daemon other than the first, measured in some cases only.
    """

    name: str
    addresses: dict[str, str]
    program: Program | None
    variant: bool = False

    def cpu_seconds(self) -> float:
        return cpu_seconds(self.program.pid) if self.program else 0.0

    def memory_bytes(self) -> int:
        return memory_bytes(self.program.pid) if self.program else 0

    def check(self) -> None:
        """Stop the benchmark when the program has ended."""
        if self.program:
            self.program.check()


@dataclass(frozen=True, slots=True)
class Variant:
    """A daemon to measure: which code, and its configuration beyond the defaults.

    Attributes:
        name: as it stands in tables.
        sources: a directory with `ngrokd` and `tun`; one without them runs what is installed in `python`.
        python: the interpreter.
        settings: "section.key" to a TOML value.
    """

    name: str
    sources: Path
    python: str = sys.executable
    settings: Mapping[str, str] = field(default_factory=dict)


@dataclass(slots=True)
class Stage:
    """Everything that is up; see `open_stage`.

    Attributes:
        directory: for files.
        program: the compiled half of the benchmark.
        ca: who signs everybody.
        ingress: address of the ingress, where the services are too.
        count: of daemons so far.
    """

    directory: Path
    program: Path
    ca: Authority
    ingress: str
    count: int = 0

    def log(self, name: str) -> Path:
        return self.directory / f"{name}.log"

    def direct(self) -> Way:
        return Way("direct", _ports(self.ingress, PLAIN_PORT), None)

    @contextlib.contextmanager
    def forwarder(self, *, resume: bool = False) -> Iterator[Way]:
        """The reference: a small forwarder in Go. `resume`: one that keeps session tickets, which few do."""
        name, port = ("resuming", RESUMING_PORT) if resume else ("forwarder", FORWARDER_PORT)
        arguments: list[object] = [self.program, "forward", "-port", port]
        arguments += ["-ingress", f"{self.ingress}:{INGRESS_PORT}", f"-resume={str(resume).lower()}"]
        arguments += ["-certificate", self.directory / "client.pem", "-ca", self.directory / "ca.pem"]
        with running(Program(arguments, log=self.log(name))) as program:
            yield Way(name, _ports("127.0.0.1", port), program)

    @contextlib.contextmanager
    def haproxy(self) -> Iterator[Way]:
        """haproxy as an operator would configure it for TCP in, TLS with a client certificate out."""
        config = self.directory / "haproxy.cfg"
        connections = (resource.getrlimit(resource.RLIMIT_NOFILE)[0] - 200) // 2  # two descriptors each
        lines = ["global", f"  maxconn {connections}", "defaults", "  mode tcp"]
        lines += [f"  timeout {what} 1h" for what in ("connect", "client", "server")]
        for index, service in enumerate(SERVICES):
            lines += [f"listen {service}", f"  bind 127.0.0.1:{HAPROXY_PORT + index}"]
            trust = f"verify required ca-file {self.directory}/ca.pem crt {self.directory}/client.pem"
            lines += [f"  server ingress {self.ingress}:{BARE_PORT + index} ssl {trust}"]
        config.write_text("\n".join(lines) + "\n")
        program = Program(
            ["haproxy", "-db", "-f", config], log=self.log("haproxy"), port=HAPROXY_PORT + len(SERVICES) - 1
        )
        with running(program):
            yield Way("haproxy", _ports("127.0.0.1", HAPROXY_PORT), program)

    @contextlib.contextmanager
    def daemon(self, variant: Variant) -> Iterator[Way]:
        """The real daemon, registered with the lab's control plane. Several can run side by side."""
        home = self.new_home()
        with running(self.start_daemon(variant, home)) as program:
            names = read_hosts(home / "hosts")
            addresses = {name: f"{names[f'{name}.bench']}:7000" for name in SERVICES}
            yield Way(variant.name, addresses, program, variant=variant.name != DAEMON)

    def new_home(self) -> Path:
        """A directory for the files of one more daemon."""
        home = self.directory / f"daemon{self.count}"
        self.count += 1
        home.mkdir()
        (home / "hosts").write_text("127.0.0.1\tlocalhost\n")
        return home

    def start_daemon(self, variant: Variant, home: Path) -> Program:
        """Start a daemon whose files are in `home`, those of an earlier start too."""
        index = int(home.name.removeprefix("daemon"))
        settings = {
            "api.url": f'"https://127.0.0.1:{API_PORT}"',
            "api.ca_file": f'"{self.directory}/ca.pem"',
            "ingress.ca_file": f'"{self.directory}/ca.pem"',
            "state.directory": f'"{home}/state"',
            "net.interface": f'"ngrokd{index}"',
            "net.subnet": f'"10.{107 + index}.0.0/16"',
            "hosts.path": f'"{home}/hosts"',
            "control.socket": f'"{home}/control.sock"',
            "http.listen": '""',
        }
        config = home / "config.toml"
        config.write_text(to_toml(settings | dict(variant.settings)))
        return Program(
            [variant.python, "-m", "ngrokd", "run", "--config", config],
            log=self.log(home.name),
            env={"NGROK_API_KEY": DEFAULT_KEY},
            cwd=variant.sources,
        )

    def hold(self, address: str, connections: int) -> Held:
        """Open connections that then do nothing; see `Held`."""
        command = [self.program, "load", "-kind", "hold", "-address", address, "-connections", connections]
        return Held([str(part) for part in command])

    def load(self, address: str, kind: str, *arguments: object) -> dict[str, Any]:
        """Run one load program to its end."""
        command = [self.program, "load", "-kind", kind, "-address", address, *arguments]
        done = subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, timeout=300)
        result: dict[str, Any] = json.loads(done.stdout)
        return result


def _ports(host: str, first: int) -> dict[str, str]:
    return {service: f"{host}:{first + index}" for index, service in enumerate(SERVICES)}


def to_toml(settings: Mapping[str, str]) -> str:
    """`section.key` to value, as a configuration file."""
    sections: dict[str, list[str]] = {}
    for key, value in settings.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {value}")
    return "\n".join(f"[{section}]\n" + "\n".join(lines) for section, lines in sections.items()) + "\n"


def read_hosts(path: Path) -> dict[str, str]:
    """Name to IPv4 address: the peers have no other, and the load programs take none."""
    names: dict[str, str] = {}
    for line in path.read_text().splitlines():
        address, *rest = line.partition("#")[0].split() or [""]
        if ":" not in address:
            names |= dict.fromkeys(rest, address)
    return names


class Held:
    """Connections that are open and idle.

    Attributes:
        count: how many stand.
    """

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self.count = int(self._process.stdout.readline().split()[1])

    def release(self) -> dict[str, Any]:
        """Ask once on each, then close all. Returns the load program's result."""
        shown, _ = self._process.communicate("\n", timeout=300)
        result: dict[str, Any] = json.loads(shown)
        return result


@contextlib.contextmanager
def running(program: Program) -> Iterator[Program]:
    try:
        yield program
    finally:
        program.stop()


# -- the far side ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_stage(directory: Path, program: Path, *, delay_ms: float = 0.0, endpoints: int = 0) -> Iterator[Stage]:
    """An ingress, a control plane, and between here and the ingress a line with `delay_ms` each way.

    Args:
        directory: for files of this stage; must exist.
        program: the compiled half.
        delay_ms: half of the round trip; 0 puts the ingress on the loopback interface.
        endpoints: how many the control plane has beyond the three that are used.
    """
    ca = Authority("ngrokd bench")
    address = FAR if delay_ms else "127.0.0.1"
    (directory / "ca.pem").write_bytes(ca.root_pem + ca.intermediate_pem)
    server = ca.issue(["ingress.bench", "127.0.0.1", FAR])
    write_private(directory / "server.pem", server.chain_pem + server.key_pem)
    client = ca.client("peer", not_before=time.time() - 3600, not_after=time.time() + 86400)
    write_private(directory / "client.pem", client.chain_pem + client.key_pem)

    stage = Stage(directory, program, ca, address)
    arguments = [program, "ingress", "-address", address if not delay_ms else "0.0.0.0"]
    arguments += ["-port", INGRESS_PORT, "-bare", BARE_PORT, "-plain", PLAIN_PORT]
    arguments += ["-certificate", directory / "server.pem", "-ca", directory / "ca.pem"]
    if delay_ms:
        arguments = ["unshare", "--net", *arguments]
    with contextlib.ExitStack() as stack:
        ingress = stack.enter_context(running(Program(arguments, log=stage.log("ingress"))))
        if delay_ms:
            stack.enter_context(long_line(stage, ingress.pid, delay_ms))
        stack.enter_context(forked(serve_api, ca, address, endpoints))
        if not listens(API_PORT):
            raise SystemExit("the control plane did not start")
        yield stage


@contextlib.contextmanager
def long_line(stage: Stage, far: int, delay_ms: float) -> Iterator[None]:
    """Connect our network with that of process `far`; every packet takes `delay_ms` each way."""
    # A real line does not wait for a processor.
    arguments = [
        "nice",
        "-n",
        "-15",
        stage.program,
        "link",
        "-near",
        "near0",
        "-far",
        "far0",
        "-delay",
        f"{delay_ms}ms",
    ]
    with running(Program(arguments, log=stage.log("link"))):
        inside = ["nsenter", f"--net=/proc/{far}/ns/net"]
        subprocess.run(["ip", "link", "set", "far0", "netns", str(far)], check=True)
        for enter, device, own, peer in (([], "near0", NEAR, FAR), (inside, "far0", FAR, NEAR)):
            subprocess.run([*enter, "ip", "address", "add", own, "peer", peer, "dev", device], check=True)
            subprocess.run([*enter, "ip", "link", "set", device, "up", "txqueuelen", "10000"], check=True)
        yield


def serve_api(ca: Authority, ingress: str, endpoints: int) -> NoReturn:
    plane = ControlPlane(
        ca, wall=time.time, identity=ca.issue(["127.0.0.1"]), ingress_endpoint=f"{ingress}:{INGRESS_PORT}"
    )
    for name in (*(f"{service}.bench" for service in SERVICES), *(f"other{index}.bench" for index in range(endpoints))):
        plane.add_endpoint(f"tcp://{name}:7000")

    async def serve() -> None:
        await trio.serve_tcp(plane.serve, API_PORT, host="127.0.0.1")

    trio.run(serve)
    raise SystemExit("the control plane ended")


def write_private(path: Path, data: bytes) -> None:
    path.touch(mode=0o600)
    path.write_bytes(data)


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


def listens(port: int) -> bool:
    """Wait until somebody listens there; False when nobody does in the end."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        time.sleep(0.002)
    return False


def haproxy_version() -> str:
    """As `HAProxy 2.6.12`; "" when it is not installed."""
    if not shutil.which("haproxy"):
        return ""
    shown = subprocess.run(["haproxy", "-v"], check=True, capture_output=True, text=True).stdout
    return "HAProxy " + shown.split()[2].partition("-")[0]
