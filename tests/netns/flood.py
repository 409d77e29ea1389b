"""SYNs by the thousand at the whole daemon, while others are being served: who gets hurt, and what does it cost?

    python -m tests.netns.flood                                    every kind, 30 s each (root; `make soak-flood`)
    python -m tests.netns.flood --kind own --seconds 6 --rate 5000    one of them

A stage (lab and daemon) gets so many SYNs a second. Meanwhile a connection that was open before echoes bytes all the
time, and each second a fresh `curl` is begun, which has 3 s. Afterwards the daemon must be as if nothing had been.

The kinds differ in who sends, and to whom:

    own       this host's address, ports and numbers at random: what root, or a container with NET_RAW, can send
    guest     one address that net.allow_sources lets in
    guests    65,534 such addresses
    again     this host's address, 2,000 SYNs that are sent over and over
    patient   this host's address, each SYN sent again after a second, as kernels do; only when asked for, since the
              daemon does not bear it on a machine of two cores (docs/performance.md)
    connect   an ordinary user's sockets, each closed at once, so that its SYN is the kernel's own: as many as it can
    closed    this host's address, to ports where nothing is served
    nobody    this host's address, to addresses that nobody has

A SYN is 40 bytes, and they all differ, so they are not built as one would: of a finished packet only the port, the
sequence number and the window are replaced, all three at random but so that the checksum stays what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import math
import os
import random
import re
import socket
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import Final

from ngrokd.ask import ask
from tests.netns.stage import Stage
from tests.netns.support import Namespace, Running, missing_for_namespaces, open_namespace
from tun.wire.tcp import SYN, build_tcp

KINDS: Final = ("own", "guest", "guests", "again", "patient", "connect", "closed", "nobody")
RAW_KINDS: Final = tuple(kind for kind in KINDS if kind != "connect")
APP: Final = "10.107.0.1"
GUEST: Final = "172.16.0.1"
GUESTS: Final = "172.16.0.0/16"
CURL_S: Final = 3.0

_BATCH: Final = 64
_ETH_P_IP: Final = 0x0800


# -- the flood --------------------------------------------------------------------------------------------------------


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class _Header(ctypes.Structure):
    """A `struct msghdr` of sendmsg(2)."""

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint32),
        ("vectors", ctypes.POINTER(_IoVector)),
        ("vector_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )


class _Message(ctypes.Structure):
    """A `struct mmsghdr` of sendmmsg(2)."""

    _fields_ = (("header", _Header), ("length", ctypes.c_uint))


class RawSyns:
    """SYNs of one kind, put onto a link by a packet socket, a batch with each call of `send`.

    Args:
        repeat: those that are sent over and over are so many.
    """

    def __init__(self, interface: str, kind: str, target: str, port: int, seed: int, repeat: int = 2000) -> None:
        self._random = random.Random(seed)
        self._kind = kind
        self._source = socket.inet_aton(GUEST if kind in ("guest", "guests") else APP)
        self._packet = build_tcp(self._source, socket.inet_aton(target), 0, port, seq=0, flags=SYN, window=0)
        (self._checksum,) = struct.unpack_from("!H", self._packet, 36)
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        self._socket.bind((interface, _ETH_P_IP))
        self._send = ctypes.CDLL(None, use_errno=True).sendmmsg
        self._buffer = (ctypes.c_char * (40 * _BATCH))()
        self._view = memoryview(self._buffer).cast("B")
        self._vectors = (_IoVector * _BATCH)()
        self._messages = (_Message * _BATCH)()
        for index in range(_BATCH):
            self._view[40 * index : 40 * index + 40] = self._packet
            self._vectors[index].base = ctypes.addressof(self._buffer) + 40 * index
            self._vectors[index].length = 40
            self._messages[index].header.vectors = ctypes.pointer(self._vectors[index])
            self._messages[index].header.vector_count = 1
        self._known = [self._numbers() for _ in range(repeat)] if kind in ("again", "patient") else []
        self._next = 0

    def close(self) -> None:
        """Give the socket back."""
        self._socket.close()

    def _numbers(self) -> tuple[int, int, int]:
        """A port, the high half of a sequence number, and the window that keeps the checksum what it is with them."""
        numbers = self._random.getrandbits(32)
        port, high = numbers >> 16 or 1, numbers & 0xFFFF
        return port, high, -(port + high) % 0xFFFF

    def send(self) -> int:
        """Send a batch; return how many packets the kernel took."""
        view, known = self._view, self._known
        for at in range(0, 40 * _BATCH, 40):
            if known:
                port, high, window = known[self._next % len(known)]
                self._next += 1
            else:
                port, high, window = self._numbers()
            if self._kind == "guests":
                self._move(at, self._random.getrandbits(16) or 1)
            elif self._kind == "nobody":
                self._aim(at, self._random.getrandbits(15) | 0x8000)
            struct.pack_into("!H", view, at + 20, port)
            struct.pack_into("!H", view, at + 24, high)
            struct.pack_into("!H", view, at + 34, window)
        sent: int = self._send(self._socket.fileno(), self._messages, _BATCH, 0)
        if sent < 0:
            number = ctypes.get_errno()
            if number == errno.ENOBUFS:  # the link's queue is full: the flood is faster than the daemon
                return 0
            raise OSError(number, os.strerror(number))
        return sent

    def _move(self, at: int, host: int) -> None:
        """Another guest: both checksums lose what the address gains."""
        self._replace(at, at + 14, host)

    def _aim(self, at: int, host: int) -> None:
        """Another destination in our subnet."""
        self._replace(at, at + 18, host)

    def _replace(self, at: int, where: int, value: int) -> None:
        view = self._view
        (before,) = struct.unpack_from("!H", view, where)
        struct.pack_into("!H", view, where, value)
        for checksum_at in (at + 10, at + 36):
            (checksum,) = struct.unpack_from("!H", view, checksum_at)
            # RFC 1624: HC' = ~(~HC + ~m + m')
            total = (~checksum & 0xFFFF) + (~before & 0xFFFF) + value
            total = (total & 0xFFFF) + (total >> 16)
            total = (total & 0xFFFF) + (total >> 16)
            struct.pack_into("!H", view, checksum_at, ~total & 0xFFFF)


class KernelSyns:
    """SYNs that the kernel makes for sockets which are closed before they are answered."""

    def __init__(self, target: str, port: int) -> None:
        self._target = (target, port)

    def send(self) -> int:
        """Begin and give up a batch of connections; return how many."""
        for _ in range(_BATCH):
            with socket.socket() as connecting:
                connecting.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    connecting.connect(self._target)
        return _BATCH


def generate(kind: str, target: str, port: int, rate: float, seconds: float, seed: int) -> None:
    """Send for so long at this rate, and say how many packets that were."""
    flood: KernelSyns | RawSyns
    if kind == "connect":
        flood = KernelSyns(target, port)
    else:
        flood = RawSyns("ngrokd0", kind, target, port, seed, 2000 if kind == "again" else int(rate))
    sent = tried = 0
    began = time.monotonic()
    sys.stdout.write("flooding\n")
    sys.stdout.flush()
    while (elapsed := time.monotonic() - began) < seconds:
        if tried >= elapsed * rate:
            time.sleep(0.001)
            continue
        sent += flood.send()
        tried += _BATCH
    sys.stdout.write(f"sent {sent}\n")


# -- what it does to others -------------------------------------------------------------------------------------------

# One connection for all the time, an echo every 5 ms.
_ECHO: Final = """
import socket, sys, threading, time
stream = socket.create_connection(("echo.demo", 7), 10)
stream.settimeout(60)
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
over = threading.Event()
threading.Thread(target=lambda: (sys.stdin.readline(), over.set()), daemon=True).start()
print("connected", flush=True)
echoes, longest = 0, 0.0
while not over.is_set():
    started = time.monotonic()
    data = b"%32d" % echoes
    stream.sendall(data)
    received = b""
    while len(received) < 32:
        chunk = stream.recv(32 - len(received))
        assert chunk, "the connection has ended"
        received += chunk
    assert received == data
    longest = max(longest, time.monotonic() - started)
    echoes += 1
    time.sleep(0.005)
print(f"echoes {echoes} longest {longest:.3f}", flush=True)
"""


@dataclass
class Damage:
    """What a flood did.

    Attributes:
        sent, seconds: packets of the flood that the kernel took, and for how long they came.
        read, lost: packets that the daemon has read meanwhile, of whomever, and that the link's queue dropped.
        curls: how long each fresh one took; infinite when it failed.
        echoes, longest_echo_s: of the connection that was there before.
        before_kib, peak_kib, after_kib: the daemon's resident memory.
        undecided, half_open: the most that were seen.
        processor: the daemon's share of one.
        calm_after_s: how long after the flood the daemon had nothing left of it; infinite when it did not come to that.
        drops: by reason.
        left: what it had left then, or when the wait for that was over.
    """

    kind: str
    seconds: float
    sent: int = 0
    read: int = 0
    lost: int = 0
    curls: list[float] = field(default_factory=list)
    echoes: int = 0
    longest_echo_s: float = math.inf
    before_kib: int = 0
    peak_kib: int = 0
    after_kib: int = 0
    undecided: int = 0
    half_open: int = 0
    processor: float = 0.0
    calm_after_s: float = math.inf
    drops: dict[str, int] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)

    @property
    def rate(self) -> float:
        """SYNs a second."""
        return self.sent / self.seconds

    @property
    def late(self) -> int:
        """How many of the curls failed."""
        return sum(took > CURL_S for took in self.curls)

    def __str__(self) -> str:
        took = sorted(self.curls)
        drops = ", ".join(f"{reason} {count}" for reason, count in sorted(self.drops.items()))
        return (
            f"{self.kind}: {self.rate:.0f} SYN/s for {self.seconds:g} s; "
            f"curls {len(took) - self.late} of {len(took)}, median {took[len(took) // 2]:.3f}, worst {took[-1]:.3f} s; "
            f"{self.echoes} echoes, longest {self.longest_echo_s:.3f} s; "
            f"memory {self.before_kib / 1024:.1f}, at most +{(self.peak_kib - self.before_kib) / 1024:.1f}, "
            f"then +{(self.after_kib - self.before_kib) / 1024:.1f} MiB; undecided at most {self.undecided}, "
            f"half-open {self.half_open}; {self.processor:.2f} of a core; calm after {self.calm_after_s:.1f} s; "
            f"read {self.read}, lost {self.lost} in the link's queue; drops: {drops}"
        )


def flood(ns: Namespace, kind: str, seconds: float, rate: float, *, calm_s: float = 60.0) -> Damage:
    """Play one flood on a fresh stage in `ns`, and tell what it did; wait so long for calm."""
    play = Stage(ns, "--demo", "--set", 'api.poll_interval="10m"', "--set", f'net.allow_sources=["{GUESTS}"]')
    try:
        return _Flood(play, kind, seconds).run(rate, calm_s)
    finally:
        play.close()


class _Flood:
    def __init__(self, play: Stage, kind: str, seconds: float) -> None:
        self.play = play
        self.damage = Damage(kind, seconds)
        self._over = threading.Event()

    def run(self, rate: float, calm_s: float) -> Damage:
        play, damage = self.play, self.damage
        ns, daemon = play.ns, play.start()
        for _ in range(5):
            assert ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout
        client = ns.start([sys.executable, "-c", _ECHO])
        client.expect("connected")
        time.sleep(1.0)
        before, used = self._counters(), _processor_s(daemon)
        damage.before_kib = damage.peak_kib = resident_kib(daemon)
        lost = self._lost()

        target = ns.run(["getent", "ahostsv4", "hello.demo"]).stdout.split()[0]
        numbers = [target, "81" if damage.kind == "closed" else "80", str(rate), str(damage.seconds)]
        source = ns.start([sys.executable, "-m", "tests.netns.flood", "generate", damage.kind, *numbers])
        source.expect("flooding")
        began = time.monotonic()
        watching = threading.Thread(target=self._watch)
        watching.start()
        curls = [threading.Thread(target=self._curl) for _ in range(int(damage.seconds))]
        for number, curl in enumerate(curls):
            time.sleep(max(began + number - time.monotonic(), 0.0))
            curl.start()
        source.expect(r"sent \d+\n", timeout=damage.seconds + 20)
        over = time.monotonic()
        damage.processor = (_processor_s(daemon) - used) / (over - began)
        damage.sent = int(source.stdout.split()[-1])
        for curl in curls:
            curl.join()
        client.write("\n")
        echoes, _, longest = client.expect(r"echoes (\d+) (longest) ([\d.]+)\n", timeout=70).groups()
        damage.echoes, damage.longest_echo_s = int(echoes), float(longest)
        self._wait_for_calm(over, calm_s)
        self._over.set()
        watching.join()
        damage.after_kib = resident_kib(daemon)
        after = self._counters()
        damage.read = after["stack.packets"] - before["stack.packets"]
        damage.lost = self._lost() - lost
        damage.drops = {
            name.removeprefix("drops."): count - before.get(name, 0)
            for name, count in after.items()
            if name.startswith("drops.") and count != before.get(name, 0)
        }
        return damage

    def _curl(self) -> None:
        command = [
            "curl",
            "-sS",
            "-o",
            "/dev/null",
            "-w",
            "%{http_code}",
            "--max-time",
            str(CURL_S),
            "http://hello.demo/",
        ]
        began = time.monotonic()
        answer = self.play.ns.run(command, check=False)
        good = answer.returncode == 0 and answer.stdout == "200"
        self.damage.curls.append(time.monotonic() - began if good else math.inf)

    def _watch(self) -> None:
        damage = self.damage
        while not self._over.wait(0.25):
            damage.peak_kib = max(damage.peak_kib, resident_kib(self.play.daemon))
            numbers = self._counters()
            damage.undecided = max(damage.undecided, numbers["stack.undecided_count"])
            damage.half_open = max(damage.half_open, numbers["stack.half_open_count"])

    def _wait_for_calm(self, over: float, calm_s: float) -> None:
        damage = self.damage
        while True:
            numbers = self._counters()
            names = ("flow_count", "undecided_count", "half_open_count", "time_wait_count", "buffered_bytes")
            damage.left = {name: numbers[f"stack.{name}"] for name in names if numbers[f"stack.{name}"]}
            if not damage.left:
                damage.calm_after_s = time.monotonic() - over
                return
            if time.monotonic() - over > calm_s:
                return
            time.sleep(0.25)

    def _counters(self) -> dict[str, int]:
        counters: dict[str, int] = ask(f"{self.play.directory}/ngrokd.sock", "status").data["counters"]
        return counters

    def _lost(self) -> int:
        return int(self.play.ns.read_file("/sys/class/net/ngrokd0/statistics/tx_dropped"))


def resident_kib(process: Running | None) -> int:
    """Resident memory of a process, the interpreter's files included."""
    assert process is not None
    with open(f"/proc/{process.pid}/smaps_rollup", encoding="ascii") as file:
        return int(re.findall(r"^Rss: +(\d+) kB", file.read(), re.MULTILINE)[0])


def _processor_s(process: Running) -> float:
    with open(f"/proc/{process.pid}/stat", encoding="ascii") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def problems(damage: Damage) -> list[str]:
    """What is not as it must be after a flood of any length, one sentence each."""
    allowed = max(len(damage.curls) // 15, 1)
    found = {
        f"{damage.late} of {len(damage.curls)} curls failed": damage.late > allowed,
        f"the connection that was there before echoed {damage.echoes} times only": damage.echoes < 10 * damage.seconds,
        f"memory grew by {(damage.peak_kib - damage.before_kib) / 1024:.1f} MiB": damage.peak_kib
        >= damage.before_kib + 50 * 1024,
        f"{damage.undecided} undecided": damage.undecided > 1024,
        f"{damage.half_open} half-open": damage.half_open > 1024,
        f"something is left of it: {damage.left}": bool(damage.left),
        f"of {damage.sent} packets {damage.read} were read and {damage.lost} lost": damage.read + damage.lost
        < damage.sent,
    }
    return [problem for problem, there in found.items() if there]


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.netns.flood")
    parser.add_argument("--kind", choices=KINDS, action="append", help="which flood; all but patient otherwise")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=20_000.0, help="SYNs a second")
    options = parser.parse_args()
    if reason := missing_for_namespaces():
        sys.stderr.write(f"{reason}\n")
        return 77
    failed = 0
    for kind in options.kind or [kind for kind in KINDS if kind != "patient"]:
        with open_namespace() as ns:
            damage = flood(ns, kind, options.seconds, options.rate)
        found = problems(damage)
        if kind != "connect" and damage.rate < 0.95 * options.rate:
            found.append(f"only {damage.rate:.0f} SYNs a second were sent")
        sys.stdout.write("".join(f"{line}\n" for line in (str(damage), *(f"    FAILED: {each}" for each in found))))
        sys.stdout.flush()
        failed += bool(found)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["generate"]:
        generate(sys.argv[2], sys.argv[3], int(sys.argv[4]), float(sys.argv[5]), float(sys.argv[6]), 1)
    else:
        sys.exit(main())
