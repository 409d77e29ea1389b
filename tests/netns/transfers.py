"""Many transfers between the kernel's TCP and ours, over a link that loses, doubles, disorders and damages.

    python -m tests.netns.transfers --count 10000 --seed 1           (root; `make soak-tcp`)
    python -m tests.netns.transfers --count 200 --seed 1 --only 17   (one of them, alone)

Each transfer is a connection of a kernel client to our stack: so many bytes this way, so many that way, and one of
five endings. At its end both sides must have exactly the bytes that the other one sent, and must have seen exactly the
ending that was made: the end of the stream, or a reset. What is transferred, and what the link does to packets, follows
from the seed; when which packet comes does not, since the kernel has its own clock.

Sizes are spread evenly over their logarithms, from 1 byte to 16 MiB, so small ones are many and a hundred transfers are
about 100 MB.
"""

from __future__ import annotations

import argparse
import errno
import functools
import hashlib
import math
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Final

import trio

from tests.netns.support import ROOT, Namespace, missing_for_namespaces, open_namespace
from tun.core.stack import Stack, StackSettings
from tun.device.linux import LinuxTun, open_tun
from tun.network import FlowRequest, FlowStream, Network
from tun.testing.memory import Faults, FaultyDevice

PORT: Final = 80
# A kernel without IPv6 (ipv6.disable=1) has no such file.
FAMILIES: Final = (socket.AF_INET, socket.AF_INET6) if os.path.exists("/proc/net/if_inet6") else (socket.AF_INET,)
ENDPOINTS: Final = {socket.AF_INET: "10.107.0.2", socket.AF_INET6: "fd6b::2"}
HOSTS: Final = {socket.AF_INET: "10.107.0.1", socket.AF_INET6: "fd6b::1"}
MASK6: Final = ((1 << 64) - 1) << 64
MAX_BYTES: Final = 16 * 2**20
FAULTS: Final = Faults(loss=0.02, duplication=0.02, reordering=0.02, corruption=0.02, hold_s=0.002)
AT_ONCE: Final = 24
# Our side repairs losses with timers of 250 ms, so on this link it may be as slow as this.
SLOWEST_S: Final = 60.0
SLOWEST_BYTES_PER_S: Final = 100_000

# How a connection ends. In the first three both sides see the end of the stream, in the others a reset.
ENDINGS: Final = ("app first", "we first", "both at once", "app resets", "we reset")

_PIECE: Final = 128 * 1024
# All that is ever sent are parts of these bytes.
_BYTES: Final = memoryview(Random(0).randbytes(MAX_BYTES + 100_003))


@dataclass(frozen=True, slots=True)
class Transfer:
    """One connection.

    Attributes:
        up, down: bytes from the app and to it.
        family: AF_INET or AF_INET6.
        ending: one of ENDINGS. With "app first" we answer after the app's end, with "we first" the app after ours.
        cut: with a reset, how many bytes the one who resets has received before.
    """

    number: int
    family: socket.AddressFamily
    up: int
    down: int
    ending: str
    cut: int

    def sent_up(self) -> memoryview:
        """What the app sends."""
        return _BYTES[self.number % 100_003 :][: self.up]

    def sent_down(self) -> memoryview:
        """What we send."""
        return _BYTES[(self.number * 31 + 7) % 100_003 :][: self.down]


def plan(count: int, seed: int) -> list[Transfer]:
    """`count` transfers; the first numbers are as mixed as all of them."""
    chance = Random(seed)
    sizes = [round(math.exp(math.log(MAX_BYTES) * index / max(count - 1, 1))) for index in range(count)]
    chance.shuffle(sizes)
    transfers = []
    for number, size in enumerate(sizes):
        other = round(math.exp(math.log(size) * chance.random())) if chance.random() < 0.5 else 0
        up, down = (size, other) if number % 2 else (other, size)
        ending = ENDINGS[number // 2 % len(ENDINGS)]
        cut = chance.randrange((up if ending == "we reset" else down) + 1)
        family = FAMILIES[number // 20 % len(FAMILIES)]
        transfers.append(Transfer(number, family, up, down, ending, cut))
    return transfers


@dataclass(slots=True)
class Outcome:
    """What one side has seen."""

    received: bytearray = field(default_factory=bytearray)
    ended: str = ""  # "end" or "reset"


@dataclass(slots=True)
class Report:
    """What all transfers together did."""

    transfers: int = 0
    bytes_moved: int = 0
    seconds: float = 0.0
    faults: dict[str, int] = field(default_factory=dict)
    retransmits: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def add(self, other: Report) -> None:
        """Take another run into account."""
        self.transfers += other.transfers
        self.bytes_moved += other.bytes_moved
        self.seconds += other.seconds
        self.retransmits += other.retransmits
        self.failures += other.failures
        for mine, theirs in ((self.faults, other.faults), (self.drops, other.drops)):
            for name, count in theirs.items():
                mine[name] = mine.get(name, 0) + count

    def __str__(self) -> str:
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        drops = ", ".join(f"{name} {count}" for name, count in sorted(self.drops.items()))
        return (
            f"{self.transfers} transfers, {self.bytes_moved / 1e6:.1f} MB in {self.seconds:.1f} s, "
            f"{len(self.failures)} failed\npackets {faults}; resent by us {self.retransmits}\ndropped by us: {drops}"
        )


class Run:
    """Transfers over one device."""

    def __init__(self, ns: Namespace, transfers: Sequence[Transfer], *, offload: bool, seed: int) -> None:
        self._ns = ns
        self._transfers = transfers
        self._seed = seed
        self._tun = _open(ns, offload)
        self._device = FaultyDevice(self._tun, Random(seed), reading=FAULTS, writing=FAULTS, split=True)
        # A reset that got lost is noticed by whoever asks, so both sides ask soon.
        gateway6 = int.from_bytes(socket.inet_pton(socket.AF_INET6, HOSTS[socket.AF_INET6]), "big")
        settings = StackSettings(
            offload=offload,
            keepalive_idle=1.0,
            keepalive_interval=0.5,
            gateway6=gateway6.to_bytes(16, "big"),
            network6=gateway6 & MASK6,
            mask6=MASK6,
        )
        self._stack = Stack(settings, bytes(32))
        self._stack.set_served(
            {socket.inet_pton(family, address): frozenset({PORT}) for family, address in ENDPOINTS.items()}
        )
        self._network = Network(self._device, self._stack, self._on_request)
        self._by_source: dict[tuple[str, int], tuple[Transfer, Outcome]] = {}
        self._nursery: trio.Nursery | None = None
        self._done: dict[int, trio.Event] = {}
        self.report = Report()

    async def run(self, at_once: int = AT_ONCE) -> Report:
        """All transfers, some of them at the same time."""
        began = time.monotonic()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                await nursery.start(self._network.run)
                # The longest first, or they would be alone at the end.
                queue = iter(sorted(self._transfers, key=lambda transfer: -transfer.up - 8 * transfer.down))
                async with trio.open_nursery() as clients:
                    for _ in range(at_once):
                        clients.start_soon(self._client, queue)
                await self._until_nothing_is_left()
                nursery.cancel_scope.cancel()
        finally:
            self._tun.close()
        report = self.report
        report.seconds = time.monotonic() - began
        report.faults = dict(self._device.faults)
        report.retransmits = self._stack.retransmits
        report.drops = dict(self._stack.drops)
        return report

    async def _until_nothing_is_left(self) -> None:
        """Our side of ended connections ends too, and gives its memory back."""
        for _ in range(1200):
            if not self._stack.flow_count and not self._stack.buffered_bytes:
                return
            await trio.sleep(0.05)
        else:
            states = [stream.state for stream in self._network.streams()]
            left = f"{self._stack.flow_count} flows with {self._stack.buffered_bytes} bytes, {states}"
            self.report.failures.append(f"seed {self._seed}: still there a minute after all ended: {left}")

    async def _client(self, queue: object) -> None:
        for transfer in queue:  # type: ignore[attr-defined]  # one iterator, shared by all
            failure = ""
            patience_s = SLOWEST_S + (transfer.up + transfer.down) / SLOWEST_BYTES_PER_S
            with trio.move_on_after(patience_s) as scope:
                failure = await self._transfer(transfer)
            if scope.cancelled_caught:
                failure = f"not over after {patience_s:.0f} s"
            if failure:
                self.report.failures.append(f"seed {self._seed}: {transfer}: {failure}")
            self.report.transfers += 1
            self.report.bytes_moved += transfer.up + transfer.down

    async def _transfer(self, transfer: Transfer) -> str:
        """What went wrong, or ""."""
        at_app, at_us = Outcome(), Outcome()
        done = self._done[transfer.number] = trio.Event()
        client = trio.socket.from_stdlib_socket(self._ns.call(socket.socket, transfer.family))
        with client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in ((socket.TCP_KEEPIDLE, 1), (socket.TCP_KEEPINTVL, 1), (socket.TCP_KEEPCNT, 30)):
                client.setsockopt(socket.IPPROTO_TCP, option, value)
            await client.bind((HOSTS[transfer.family], 0))
            self._by_source[client.getsockname()[:2]] = transfer, at_us
            try:
                await client.connect((ENDPOINTS[transfer.family], PORT))
            except (ConnectionRefusedError, ConnectionResetError):
                # The SYN-ACK was lost, and our reset was the first that the app saw; or it came right behind the
                # SYN-ACK, before the app was awake.
                at_app.ended = "reset"
            except OSError as error:
                return f"could not connect: {error}"
            else:
                await _app(client, transfer, at_app)
        if transfer.ending == "app resets":
            at_app.ended = "reset"
        await done.wait()
        return _judge(transfer, at_app, at_us)

    def _on_request(self, request: FlowRequest) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, request)

    async def _serve(self, request: FlowRequest) -> None:
        transfer, outcome = self._by_source[request.source]
        flow = request.accept()
        try:
            await _us(flow, transfer, outcome)
        except trio.BrokenResourceError:
            outcome.ended = flow.failure
        finally:
            await flow.aclose()
            self._done[transfer.number].set()


async def _app(client: trio.socket.SocketType, transfer: Transfer, outcome: Outcome) -> None:
    """The app's part. A reset may meet it anywhere."""
    stream = trio.SocketStream(client)

    async def send() -> None:
        data = transfer.sent_up()
        for offset in range(0, len(data), _PIECE):
            await stream.send_all(data[offset : offset + _PIECE])
        if transfer.ending != "app resets":
            try:
                await stream.send_eof()
            except trio.BrokenResourceError as error:
                # After a reset shutdown() says so only; why is for recv() to say.
                if not isinstance(error.__cause__, OSError) or error.__cause__.errno != errno.ENOTCONN:
                    raise

    async def receive(limit: float = math.inf) -> None:
        while len(outcome.received) < limit:
            data = await stream.receive_some(_PIECE)
            if not data:
                outcome.ended = "end"
                return
            outcome.received += data

    try:
        if transfer.ending == "app first":
            await send()
            await receive()
        elif transfer.ending == "we first":
            await receive()
            await send()
        elif transfer.ending == "app resets":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await receive(transfer.cut)
                nursery.cancel_scope.cancel()
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(receive)
    except* trio.BrokenResourceError as errors:
        causes = [error.__cause__ for error in _leaves(errors)]
        outcome.ended = "reset" if any(isinstance(e, ConnectionResetError | BrokenPipeError) for e in causes) else ""


async def _us(flow: FlowStream, transfer: Transfer, outcome: Outcome) -> None:
    """Our part; a reset rises."""

    async def send() -> None:
        data = transfer.sent_down()
        for offset in range(0, len(data), _PIECE):
            await flow.send_all(bytes(data[offset : offset + _PIECE]))
        if transfer.ending != "we reset":
            await flow.send_eof()

    async def receive(limit: float = math.inf) -> None:
        while len(outcome.received) < limit:
            data = await flow.receive_some(_PIECE)
            if not data:
                outcome.ended = "end"
                return
            outcome.received += data

    try:
        if transfer.ending == "app first":
            await receive()
            await send()
        elif transfer.ending == "we first":
            await send()
            await receive()
        elif transfer.ending == "we reset":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await receive(transfer.cut)
                nursery.cancel_scope.cancel()
            flow.abort()
            outcome.ended = "reset"
            return
        else:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                nursery.start_soon(receive)
    except* trio.BrokenResourceError as errors:
        raise next(iter(_leaves(errors))) from None
    await flow.wait_delivered()
    if flow.failure:
        outcome.ended = flow.failure


def _leaves(errors: BaseExceptionGroup[trio.BrokenResourceError]) -> list[trio.BrokenResourceError]:
    found: list[trio.BrokenResourceError] = []
    for error in errors.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


def _judge(transfer: Transfer, at_app: Outcome, at_us: Outcome) -> str:
    wanted = "reset" if "reset" in transfer.ending else "end"
    if (at_app.ended, at_us.ended) != (wanted, wanted):
        return f"the app saw {at_app.ended or 'nothing'!r} and we {at_us.ended or 'nothing'!r} instead of {wanted!r}"
    for who, outcome, sent in (("the app", at_app, transfer.sent_down()), ("we", at_us, transfer.sent_up())):
        received = outcome.received
        if len(received) > len(sent) or (wanted == "end" and len(received) < len(sent)):
            return f"{who} received {len(received)} of {len(sent)} bytes"
        if hashlib.sha256(received).digest() != hashlib.sha256(sent[: len(received)]).digest():
            first = next(index for index, pair in enumerate(zip(received, sent, strict=False)) if pair[0] != pair[1])
            return f"{who} received other bytes than were sent, from byte {first} on"
    return ""


def _open(ns: Namespace, offload: bool) -> LinuxTun:
    tun = ns.call(open_tun, "tun0", offload=offload)
    ns.run(["ip", "link", "set", "tun0", "addrgenmode", "none"])
    ns.run(["ip", "addr", "add", f"{HOSTS[socket.AF_INET]}/32", "dev", "tun0"])
    if socket.AF_INET6 in FAMILIES:
        ns.run(["ip", "addr", "add", f"{HOSTS[socket.AF_INET6]}/128", "dev", "tun0", "nodad"])
    ns.run(["ip", "link", "set", "tun0", "up", "mtu", "1500", "txqueuelen", "5000"])
    ns.run(["ip", "route", "add", "10.107.0.0/16", "dev", "tun0"])
    if socket.AF_INET6 in FAMILIES:
        ns.run(["ip", "route", "add", "fd6b::/64", "dev", "tun0"])
    return tun


async def run_transfers(transfers: Sequence[Transfer], *, seed: int) -> Report:
    """Play `transfers`, half of them with offload and half without, each half in a namespace of its own."""
    report = Report()

    async def play(offload: bool) -> None:
        part = [transfer for transfer in transfers if (transfer.number // 10 % 2 == 0) is offload]
        with open_namespace() as ns:
            half = await Run(ns, part, offload=offload, seed=seed).run()
        half.failures = [f"{failure}, {'with' if offload else 'without'} offload" for failure in half.failures]
        half.seconds = 0.0
        report.add(half)

    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(play, True)
        nursery.start_soon(play, False)
    report.seconds = time.monotonic() - began
    return report


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.netns.transfers")
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with its share and the next seed")
    parser.add_argument("--only", type=int, help="the transfer of this number alone")
    options = parser.parse_args()
    if reason := missing_for_namespaces():
        sys.stderr.write(f"{reason}\n")
        return 77
    if options.jobs > 1:
        share = str(-(-options.count // options.jobs))
        command = [sys.executable, "-m", "tests.netns.transfers", "--count", share, "--seed"]
        jobs = [subprocess.Popen([*command, str(options.seed + job)], cwd=ROOT) for job in range(options.jobs)]
        return max(job.wait() for job in jobs)
    transfers = plan(options.count, options.seed)
    if options.only is not None:
        transfers = [transfers[options.only]]
    total = Report()
    for begin in range(0, len(transfers), 200):
        report = trio.run(functools.partial(run_transfers, transfers[begin : begin + 200], seed=options.seed))
        total.add(report)
        for failure in report.failures:
            sys.stdout.write(f"FAILED {failure}\n")
        sys.stdout.write(f"{total.transfers} of {len(transfers)} in {total.seconds:.0f} s\n")
        sys.stdout.flush()
    sys.stdout.write(f"seed {options.seed}: {total}\n")
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
