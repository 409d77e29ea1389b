"""Connections that cost as much as they can, at the whole daemon, while others go on: memory, delay, speed.

The expensive ones come from an address that is allowed and that no kernel has, so that what they say and do not say is
ours: they are made of packets, written to the link and read from it by a packet socket.
"""

from __future__ import annotations

import select
import socket
import statistics
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import pytest

from ngrokd.ask import ask
from tests.netns.flood import GUEST, GUESTS, resident_kib
from tests.netns.stage import Stage
from tests.netns.support import Namespace
from tun.wire.tcp import ACK, RST, SYN, build_tcp, options

MASK: Final = 0xFFFFFFFF
SOURCE: Final = socket.inet_aton(GUEST)
LONGEST_DELAY_MS: Final = 50.0
LOOKS: Final = 3
# A second, of all that are expensive. What is more than the daemon can read at all (80,000 and more) is lost in the
# link's queue, and what others send with it.
RATE: Final = 20_000
# What a flow costs besides the bytes in its buffers: itself, TLS with its buffers, what was received for it last.
OUTSIDE_KIB: Final = 200
BULK: Final = "http://hello.demo/bytes/20000000"

# An echo every 5 ms; for each line of input, how long 99 of 100 took at most, in milliseconds.
_ECHO: Final = """
import select, socket, sys, time
stream = socket.create_connection(("echo.demo", 7), 10)
stream.settimeout(30)
stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print("connected", flush=True)
took = []
while True:
    started = time.monotonic()
    stream.sendall(b"x")
    assert stream.recv(1) == b"x"
    took.append(time.monotonic() - started)
    if select.select([sys.stdin], [], [], 0.005)[0]:
        if not sys.stdin.readline():
            break
        took.sort()
        print(f"{len(took)} echoes, {took[len(took) * 99 // 100] * 1000:.1f} ms", flush=True)
        took = []
"""


class Peers:
    """Connections of a host that is only packets."""

    def __init__(self, ns: Namespace, address: str, port: int) -> None:
        self.target = socket.inet_aton(address)
        self.port = port
        self.socket = ns.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * 2**20)
        self.socket.bind(("ngrokd0", 0x0800))
        self.next: dict[int, int] = {}  # by port, the sequence number that the other side uses next

    def send(self, port: int, seq: int, flags: int, payload: bytes = b"", window: int = 0, extra: bytes = b"") -> None:
        packet = build_tcp(
            SOURCE, self.target, port, self.port, seq=seq & MASK, ack=self.next.get(port, 0) & MASK,
            flags=flags, window=window, payload=payload, options=extra,
        )  # fmt: skip
        while True:
            try:
                self.socket.sendto(bytes(packet), ("ngrokd0", 0x0800))
            except BlockingIOError:
                pass
            except OSError:
                time.sleep(0.001)  # the link's queue is full
            else:
                return

    def connect(self, ports: range, window: int, mss: int = 1460) -> None:
        """Open connections, and wait until they are open; whose SYN is not answered in a second sends it again."""
        extra = options(mss=mss, sack_permitted=True, window_scale=7)
        deadline = time.monotonic() + 60
        for first in range(ports.start, ports.stop, 40):
            waiting = set(ports[first - ports.start : first - ports.start + 40])
            again_at = 0.0
            while waiting:
                assert time.monotonic() < deadline, f"{len(waiting)} connections are not accepted"
                if time.monotonic() >= again_at:
                    for port in waiting:
                        self.send(port, 0, SYN, window=window, extra=extra)
                    again_at = time.monotonic() + 1.0
                for port, flags, seq in self.receive(0.05):
                    if flags & (SYN | ACK) == SYN | ACK and port in waiting:
                        waiting.discard(port)
                        self.next[port] = seq + 1
                        self.send(port, 1, ACK, window=window)

    def receive(self, wait_s: float) -> Iterator[tuple[int, int, int]]:
        """What has come for us: port, flags, sequence number."""
        while select.select([self.socket], [], [], wait_s)[0]:
            packet, address = self.socket.recvfrom(100)
            if address[2] != socket.PACKET_OUTGOING and packet[9] == 6 and packet[16:20] == SOURCE:
                port, seq, flags = struct.unpack_from("!HIxxxxxB", packet, 22)
                yield port, flags, seq
            wait_s = 0.0

    def close(self) -> None:
        for port in self.next:
            self.send(port, 1, RST)
        self.socket.close()


@dataclass(frozen=True)
class Notice:
    """What others noticed: the echo's delay (99 of 100), bytes a second of downloads; and the daemon's growth."""

    delay_ms: float
    speed: float
    grown_kib: int


class Scene:
    """A stage where an echo goes on, and what others notice of what is done to it."""

    def __init__(self, play: Stage) -> None:
        self.play = play
        self.daemon = play.start()
        self._speed()  # the first one warms up
        self.speed = max(self._speed() for _ in range(3))
        self.client = play.ns.start([sys.executable, "-u", "-c", _ECHO])
        self.client.expect("connected")
        time.sleep(0.5)
        self.before_kib = resident_kib(self.daemon)

    def peers(self, name: str, port: int) -> Peers:
        address = self.play.ns.run(["getent", "ahostsv4", name]).stdout.split()[0]
        return Peers(self.play.ns, address, port)

    def counters(self) -> dict[str, int]:
        counters: dict[str, int] = ask(f"{self.play.directory}/ngrokd.sock", "status").data["counters"]
        return counters

    @property
    def grown_kib(self) -> int:
        return resident_kib(self.daemon) - self.before_kib

    def look(self) -> Notice:
        """How the others are while something goes on: the echo's delay, and the speed of downloads."""
        self._delay()
        speed = statistics.median(self._speed() for _ in range(3))
        return Notice(self._delay(), speed, self.grown_kib)

    def _delay(self) -> float:
        seen = self.client.stdout.count("echoes")
        self.client.write("\n")
        self.client.expect(rf"(?:(?:.*\n)*?.*echoes, .*\n){{{seen + 1}}}")
        return float(self.client.stdout.split()[-2])

    def _speed(self) -> float:
        """Bytes a second of a large download."""
        command = ["curl", "-sS", "--max-time", "25", "-o", "/dev/null", "-w", "%{size_download} %{speed_download}"]
        size, speed = self.play.ns.run([*command, BULK]).stdout.split()
        assert size == "20000000"
        return float(speed)

    def assert_others_go_on(self, notices: list[Notice], grown_kib: int) -> None:
        """Half the speed, 50 ms and the bound of memory hold, in one of the looks: the machine has other work too."""
        peak = max(notice.grown_kib for notice in notices)
        assert peak <= grown_kib, f"grown by {peak} KiB"
        speed = min(self.speed, max(self._speed() for _ in range(3)))
        good = [notice for notice in notices if notice.delay_ms < LONGEST_DELAY_MS and notice.speed >= speed / 2]
        assert good, f"{notices}, undisturbed {speed}"


@pytest.fixture
def scene(netns: Callable[[], Namespace]) -> Iterator[Scene]:
    options = ("--set", 'api.poll_interval="10m"', "--set", f'net.allow_sources=["{GUESTS}"]')
    play = Stage(netns(), "--demo", "--do", "add tcp://slow.demo:9 slow:1", *options)
    yield Scene(play)
    play.close()


@contextmanager
def sending(peers: Peers, ports: range, number: Callable[[int], int]) -> Iterator[list[int]]:
    """Send single bytes with these sequence numbers on all ports, RATE a second; tells how many there were."""
    sent = [0]
    over = threading.Event()

    def run() -> None:
        began = time.monotonic()
        step = 0
        while not over.is_set():
            for port in ports:
                peers.send(port, number(step), ACK, b"x", window=60_000)
            sent[0] += len(ports)
            step += 1
            for _ in peers.receive(0.0):
                pass
            while sent[0] > RATE * (time.monotonic() - began):
                time.sleep(0.001)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield sent
    finally:
        over.set()
        thread.join()


@pytest.mark.timeout(180)
def test_a_thousand_windows_that_never_open(scene: Scene) -> None:
    """sockstress: each is sent 100 MB and reads none of it. What they hold is bounded, and others do not notice."""
    peers = scene.peers("source.demo", 19)
    peers.connect(range(20_000, 21_000), window=0)
    deadline = time.monotonic() + 20
    while scene.counters()["stack.buffered_bytes"] < 1000 * 50_000:
        assert time.monotonic() < deadline, scene.counters()["stack.buffered_bytes"]
        time.sleep(0.2)
    notices = [scene.look() for _ in range(LOOKS)]

    counters = scene.counters()
    assert counters["stack.flow_count"] == 1001
    assert counters["stack.buffered_bytes"] <= 192 * 2**20
    assert counters["stack.aborted"] == 0
    peers.close()
    scene.assert_others_go_on(notices, 192 * 1024 + 1000 * OUTSIDE_KIB)


@pytest.mark.timeout(180)
@pytest.mark.parametrize("attack", ["holes", "small"])
def test_single_bytes(scene: Scene, attack: str) -> None:
    """Ten connections to an endpoint that does not read, each with 300 holes, over and over, or 10,000 single bytes."""
    peers = scene.peers("slow.demo", 9)
    ports = range(20_000, 20_010)
    peers.connect(ports, window=60_000)

    def number(step: int) -> int:
        return 3 + 2 * (step % 300) if attack == "holes" else 1 + step % 10_000

    with sending(peers, ports, number) as sent:
        notices = [scene.look() for _ in range(LOOKS)]
        while sent[0] < len(ports) * (300 if attack == "holes" else 10_000):
            time.sleep(0.05)
        counters = scene.counters()
    if attack == "holes":
        # 64 ranges of each connection are kept; all that does not fit is counted.
        assert counters["stack.buffered_bytes"] <= len(ports) * 64 * 300
        assert counters["drops.out_of_order"] >= sent[0] // 2
    else:
        assert counters["stack.buffered_bytes"] <= len(ports) * 10_000
    peers.close()
    scene.assert_others_go_on(notices, 4 * 1024 + len(ports) * OUTSIDE_KIB)
