"""How fast the TCP core is, alone: prebuilt packets through `Stack`, no kernel, no TLS, no event loop.

    python bench/bench_core.py [case ...]        cases: copy up up-small down down-small ask open; default all

`up` and `down` move offloaded segments of 44 x 1448 bytes, the -small ones segments of one MSS. `ask` is one request
of 100 bytes and one answer of 200 on each of 64 flows in turn; `open` is a whole short connection. The app's side is
prebuilt packets whose numbers are patched and that are copied once, as a read from the kernel does; that is counted in,
so the figures are a lower bound.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from struct import Struct

from tun.core.stack import Flow, Stack, StackSettings
from tun.wire.tcp import ACK, FIN, PSH, SYN, build_tcp, options

APP = b"\x0a\x6b\x00\x01"
ENDPOINT = b"\x0a\x6b\x00\x02"
PORT = 443
MSS = 1448
LARGE = 44 * MSS
SECONDS = 1.0

_NUMBERS = Struct("!II")
_STAMPS = Struct("!II")


class App:
    """One app's end: it knows its numbers and prebuilt packets, nothing else."""

    def __init__(self, stack: Stack, port: int) -> None:
        self.stack = stack
        self.port = port
        self.seq = 1000
        self.ack = 0
        self.flow = self.open()

    def packet(self, flags: int, payload: bytes = b"", extra: bytes = b"") -> bytes:
        return bytes(
            build_tcp(
                APP, ENDPOINT, self.port, PORT, seq=self.seq & 0xFFFFFFFF, ack=self.ack & 0xFFFFFFFF, flags=flags,
                window=65535, options=extra or options(timestamp=(1, 0)), payload=payload,
            )
        )  # fmt: skip

    def open(self) -> Flow:
        stack = self.stack
        syn = options(mss=1460, sack_permitted=True, timestamp=(1, 0), window_scale=10)
        stack.handle_packet(self.packet(SYN, extra=syn), 0, True, 0.0)
        (flow,) = stack.take_requests()
        stack.accept(flow, 0.0)
        for touched in stack.take_touched():
            stack.flush(touched, swallow, 0.0)
        self.seq += 1
        self.ack = flow.snd_nxt
        stack.handle_packet(self.packet(ACK | PSH, b"first"), 0, True, 0.0)  # its ACK opens the whole window
        self.seq += 5
        for touched in stack.take_touched():
            touched.consume(touched.readable_bytes, 0.0)
            stack.flush(touched, swallow, 0.0)
        return flow


def swallow(_header: bytearray | memoryview, _views: Sequence[bytes | memoryview], _gso_size: int) -> bool:
    return True


def measure(step: Callable[[float], int]) -> tuple[int, int, float]:
    """Repeat `step(now)`, which returns the bytes it moved, for SECONDS; return (steps, bytes, elapsed)."""
    steps = moved = 0
    start = time.perf_counter()
    now = start
    while now - start < SECONDS:
        for _ in range(20):
            moved += step(now - start)
            steps += 1
        now = time.perf_counter()
    return steps, moved, now - start


def copy() -> tuple[int, int, float]:
    """What `up` costs before the core sees anything: for comparison."""
    packet = bytearray(LARGE + 52)
    return measure(lambda _now: len(bytes(packet)) - 52)


def up(size: int, batch: int) -> tuple[int, int, float]:
    stack = new_stack()
    app = App(stack, 4000)
    packets = [bytearray(app.packet(ACK | PSH, b"x" * size)) for _ in range(batch)]

    def step(now: float) -> int:
        stamp = int(now * 1000) + 1
        for packet in packets:
            _NUMBERS.pack_into(packet, 24, app.seq & 0xFFFFFFFF, app.ack & 0xFFFFFFFF)
            _STAMPS.pack_into(packet, 44, stamp, 0)
            app.seq += size
            stack.handle_packet(bytes(packet), 0, True, now)
        for flow in stack.take_touched():
            taken = 0
            for view in flow.readable_views():
                taken += len(view)
            flow.consume(taken, now)
            stack.flush(flow, swallow, now)
        return size * batch

    result = measure(step)
    assert app.flow.bytes_from_app == result[1] + 5, stack.drops
    return result


def down(offload: bool, batch: int) -> tuple[int, int, float]:
    stack = new_stack(offload)
    app = App(stack, 4000)
    ack = bytearray(app.packet(ACK))
    chunk = memoryview(bytes(65536))
    flow = app.flow

    def step(now: float) -> int:
        moved = 0
        for _ in range(batch):
            moved += flow.write(chunk, now)
            stack.flush(flow, swallow, now)
        app.ack = flow.snd_nxt
        _NUMBERS.pack_into(ack, 24, app.seq & 0xFFFFFFFF, app.ack & 0xFFFFFFFF)
        _STAMPS.pack_into(ack, 44, int(now * 1000) + 1, 0)
        stack.handle_packet(bytes(ack), 0, True, now)
        for touched in stack.take_touched():
            stack.flush(touched, swallow, now)
        return moved

    return measure(step)


def ask() -> tuple[int, int, float]:
    stack = new_stack()
    apps = [App(stack, 4000 + index) for index in range(64)]
    packets = [bytearray(app.packet(ACK | PSH, b"q" * 100)) for app in apps]
    answer = memoryview(b"a" * 200)

    def step(now: float) -> int:
        stamp = int(now * 1000) + 1
        for app, packet in zip(apps, packets, strict=True):
            _NUMBERS.pack_into(packet, 24, app.seq & 0xFFFFFFFF, app.flow.snd_nxt & 0xFFFFFFFF)
            _STAMPS.pack_into(packet, 44, stamp, 0)
            app.seq += 100
            stack.handle_packet(bytes(packet), 0, True, now)
        for flow in stack.take_touched():
            flow.consume(flow.readable_bytes, now)
            flow.write(answer, now)
            stack.flush(flow, swallow, now)
        return 64

    return measure(step)


def opening() -> tuple[int, int, float]:
    stack = new_stack()
    port = 0

    def step(now: float) -> int:
        nonlocal port
        port = (port + 1) % 28000
        app = App(stack, 32000 + port)
        flow = app.flow
        stack.handle_packet(app.packet(ACK | PSH, b"question"), 0, True, now)
        app.seq += 8
        for touched in stack.take_touched():
            touched.consume(touched.readable_bytes, now)
            touched.write(b"answer", now)
            touched.finish(now)
            stack.flush(touched, swallow, now)
        app.ack = flow.snd_nxt
        stack.handle_packet(app.packet(ACK | FIN), 0, True, now)
        for touched in stack.take_touched():
            stack.flush(touched, swallow, now)
        if now >= stack.next_deadline():
            stack.handle_timeout(now)
        assert flow.closed
        return 1

    return measure(step)


def new_stack(offload: bool = True) -> Stack:
    stack = Stack(StackSettings(offload=offload), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((PORT,))})
    return stack


def main(chosen: Sequence[str]) -> None:
    bulk: dict[str, tuple[int, Callable[[], tuple[int, int, float]]]] = {
        "copy": (LARGE, copy),
        "up": (LARGE, lambda: up(LARGE, 8)),
        "up-small": (MSS, lambda: up(MSS, 64)),
        "down": (LARGE, lambda: down(True, 4)),
        "down-small": (MSS, lambda: down(False, 4)),
    }
    for name, (size, run) in bulk.items():
        if not chosen or name in chosen:
            _, moved, elapsed = run()
            rate, speed = moved / size / elapsed, moved * 8 / elapsed / 1e9
            print(f"{name:12} {speed:8.1f} Gbit/s  {rate:10,.0f} segments/s  {1e6 / rate:6.2f} us each")
    events: dict[str, Callable[[], tuple[int, int, float]]] = {"ask": ask, "open": opening}
    for name, event in events.items():
        if not chosen or name in chosen:
            _, count, elapsed = event()
            print(f"{name:12} {count / elapsed:12,.0f} a second  {elapsed / count * 1e6:6.2f} us each")


if __name__ == "__main__":
    main(sys.argv[1:])
