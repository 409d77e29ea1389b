"""What the TCP core costs, in instructions: fixed packet scripts, counted instead of timed.

    python bench/bench_instructions.py [case ...] [--check | --keep] [--json]

Times on a shared machine vary by a third; instructions hardly by a thousandth, so a change that makes the core a tenth
dearer can be seen. The processor counts them (perf events, user mode only); where it may not, valgrind does. Where
neither can, --check says so and finds nothing wrong.

Each script runs twice on stacks made alike: the first time an app in miniature answers, and its packets are kept; the
second time they are played back, so that nearly everything counted is the core's. --check compares with
baseline.json, for the Python and the build of the core it was taken with; --keep writes it there.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # behind what is installed: that may be the compiled core

from bench.baseline import load_baseline, save_baseline  # noqa: E402
from bench.counter import InstructionCounter, NoCounterError  # noqa: E402
from tun.core import stack as core  # noqa: E402
from tun.core.stack import Flow, Stack, StackSettings  # noqa: E402
from tun.wire.tcp import ACK, FIN, PSH, SYN, build_tcp, options  # noqa: E402

APP, ENDPOINT, PORT = b"\x0a\x6b\x00\x01", b"\x0a\x6b\x00\x02", 443
MSS = 1448
LARGE = 44 * MSS
WARM_UP, STEPS = 40, 200
TOLERANCE = 1.25
_NOW = 1000.0
_STEP_S = 0.001


class Tape:
    """Packets of the app: made and kept while recording, only handed out while playing."""

    def __init__(self) -> None:
        self._packets: list[bytes] = []
        self._at = -1

    def rewind(self) -> None:
        self._at = 0

    def packet(self, make: Callable[[], bytes]) -> bytes:
        if self._at < 0:
            self._packets.append(made := make())
            return made
        self._at += 1
        return self._packets[self._at - 1]


class App:
    """One app's end of one connection: it knows its numbers, and what the stack has sent."""

    def __init__(self, stack: Stack, tape: Tape, port: int) -> None:
        self._stack = stack
        self._tape = tape
        self._port = port
        self._seq = 1000
        self._now = 0.0
        self.flow: Flow

    def send(self, now: float, flags: int = ACK, payload: bytes = b"", extra: bytes = b"") -> None:
        def make() -> bytes:
            ack = self.flow.snd_nxt & 0xFFFFFFFF if flags & ACK else 0
            stamp = options(timestamp=(int(now * 1000) & 0xFFFFFFFF, 0))
            return bytes(
                build_tcp(
                    APP, ENDPOINT, self._port, PORT, seq=self._seq & 0xFFFFFFFF, ack=ack, flags=flags, window=65535,
                    options=extra or stamp, payload=payload,
                )
            )  # fmt: skip

        self._stack.handle_packet(self._tape.packet(make), 0, True, now)
        self._seq += len(payload) + bool(flags & (SYN | FIN))

    def open(self, now: float) -> None:
        stamp = (int(now * 1000) & 0xFFFFFFFF, 0)
        self.send(now, SYN, extra=options(mss=1460, sack_permitted=True, timestamp=stamp, window_scale=10))
        (self.flow,) = self._stack.take_requests()
        self._stack.accept(self.flow, now)
        answer(self._stack, now)
        self.send(now, ACK | PSH, b"first")  # the acknowledgement of this opens the whole window
        answer(self._stack, now)


def swallow(_header: bytearray | memoryview, _views: Sequence[bytes | memoryview], _gso_size: int) -> bool:
    return True


def answer(stack: Stack, now: float, data: memoryview | None = None) -> None:
    """What a shell does after each batch: take what came, write what it has, send what is owed."""
    for flow in stack.take_touched():
        if count := flow.readable_bytes:
            flow.consume(count, now)
            if data is not None:
                flow.write(data, now)
        stack.flush(flow, swallow, now)


# -- the scripts: a name, what one step is, and the step ---------------------------------------------------------------

Step = Callable[[int], None]
Script = Callable[[Stack, Tape], Step]


def clock(step: int) -> float:
    return _NOW + step * _STEP_S


def up(size: int, batch: int) -> Script:
    def script(stack: Stack, tape: Tape) -> Step:
        app = App(stack, tape, 4000)
        app.open(_NOW)
        payload = b"x" * size

        def step(index: int) -> None:
            now = clock(index)
            for _ in range(batch):
                app.send(now, ACK | PSH, payload)
            answer(stack, now)

        return step

    return script


def down(stack: Stack, tape: Tape) -> Step:
    app = App(stack, tape, 4000)
    app.open(_NOW)
    chunk = memoryview(bytes(65536))

    def step(index: int) -> None:
        now = clock(index)
        for _ in range(4):
            app.flow.write(chunk, now)
            stack.flush(app.flow, swallow, now)
        app.send(now)
        answer(stack, now)

    return step


def ask(stack: Stack, tape: Tape) -> Step:
    apps = [App(stack, tape, 4000 + index) for index in range(16)]
    for app in apps:
        app.open(_NOW)
    data = memoryview(b"a" * 200)

    def step(index: int) -> None:
        now = clock(index)
        for app in apps:
            app.send(now, ACK | PSH, b"q" * 100)
        answer(stack, now, data)

    return step


def connect(stack: Stack, tape: Tape) -> Step:
    def step(index: int) -> None:
        now = clock(index)
        app = App(stack, tape, 10000 + index)
        app.open(now)
        app.send(now, ACK | PSH, b"question")
        answer(stack, now, memoryview(b"answer"))
        app.flow.finish(now)
        stack.flush(app.flow, swallow, now)
        app.send(now, ACK | FIN)
        answer(stack, now)

    return step


def refuse(stack: Stack, tape: Tape) -> Step:
    extra = options(mss=1460, sack_permitted=True, timestamp=(1, 0), window_scale=10)

    def step(index: int) -> None:
        app = App(stack, tape, 10000 + index)
        app.send(clock(index), SYN, extra=extra)
        (request,) = stack.take_requests()
        stack.refuse(request, clock(index))
        answer(stack, clock(index))
        stack.take_replies()

    return step


# case: what it is, how many units one step has, the script
CASES: dict[str, tuple[str, int, Script]] = {
    "up": (f"a segment of {LARGE} bytes in, consumed, acknowledged by the batch of 4", 4, up(LARGE, 4)),
    "up-small": (f"a segment of {MSS} bytes in, by the batch of 64", 64, up(MSS, 64)),
    "down": ("65536 bytes out, acknowledged by the app every 4", 4, down),
    "ask": ("a request of 100 bytes and its answer of 200, 16 connections in turn", 16, ask),
    "connect": ("a whole short connection: open, ask, answer, end", 1, connect),
    "refuse": ("a request for a connection that is refused", 1, refuse),
}


def prepare(name: str) -> tuple[Step, int]:
    """A step that plays the script from its tape, and the index of the first step after the warm-up."""
    script = CASES[name][2]
    tape = Tape()
    recorded = script(new_stack(), tape)
    for index in range(WARM_UP + STEPS):
        recorded(index)
    tape.rewind()
    stack = new_stack()
    step = script(stack, tape)
    for index in range(WARM_UP):
        step(index)
    if stack.drops and any(stack.drops.values()):
        raise SystemExit(f"{name}: the script is wrong, packets were dropped: {stack.drops}")
    return step, WARM_UP


def new_stack() -> Stack:
    stack = Stack(StackSettings(), b"k" * 32)
    stack.set_served({ENDPOINT: frozenset((PORT,))})
    return stack


def count_here(name: str) -> float:
    """Instructions for one unit of a case. Raises NoCounterError."""
    counter = InstructionCounter()
    try:
        step, first = prepare(name)
        gc.collect()
        gc.disable()
        before = counter.read()
        for index in range(first, first + STEPS):
            step(index)
        return (counter.read() - before) / STEPS / CASES[name][1]
    finally:
        gc.enable()
        counter.close()


def count_with_valgrind(name: str) -> float:
    """The same, as the difference of two runs: one with all steps, one with none. Raises NoCounterError."""
    if not shutil.which("valgrind"):
        raise NoCounterError("there is no valgrind (on Debian: apt install valgrind)")
    counts = []
    for steps in (0, STEPS):
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable, __file__]
        shown = subprocess.run(
            [*command, name, "--play", str(steps)], check=True, capture_output=True, text=True
        ).stderr  # fmt: skip
        found = re.search(r"Collected : (\d+)", shown)
        assert found, shown
        counts.append(int(found[1]))
    return (counts[1] - counts[0]) / STEPS / CASES[name][1]


def play(name: str, steps: int) -> None:
    step, first = prepare(name)
    gc.disable()
    for index in range(first, first + steps):
        step(index)


def build_of_core() -> str:
    """`CPython 3.11 pure x86_64`: what counts can be compared with."""
    build = "pure" if (core.__file__ or "").endswith(".py") else "compiled"
    return f"CPython {sys.version_info.major}.{sys.version_info.minor} {build} {platform.machine()}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help=f"default: {' '.join(CASES)}")
    parser.add_argument(
        "--check", action="store_true", help=f"exit 1 when a case costs over {TOLERANCE} x the baseline"
    )
    parser.add_argument("--keep", action="store_true", help="make these numbers the baseline")
    parser.add_argument("--valgrind", action="store_true", help="count with valgrind in any case")
    parser.add_argument("--json", action="store_true", help="one JSON document")
    parser.add_argument("--play", type=int, default=-1, help=argparse.SUPPRESS)
    options_ = parser.parse_args()
    names: list[str] = options_.cases or list(CASES)
    if unknown := [name for name in names if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    if os.environ.get("PYTHONHASHSEED") != "0":  # the order of sets is part of the cost
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"PYTHONHASHSEED": "0"})
    if options_.play >= 0:
        play(names[0], options_.play)
        return 0

    count = count_with_valgrind if options_.valgrind else count_here
    try:
        counts = {name: round(count(name)) for name in names}
    except NoCounterError as error:
        try:
            counts = {name: round(count_with_valgrind(name)) for name in names}
        except NoCounterError as other:
            print(f"instructions cannot be counted here: {error}; {other}", file=sys.stderr)
            return 0 if options_.check else 1
        print(f"{error}; counted with valgrind", file=sys.stderr)
    baseline = load_baseline()
    known = baseline.instructions.get(build_of_core(), {})
    if options_.keep:
        baseline.instructions[build_of_core()] = known | counts
        save_baseline(baseline)
    if options_.json:
        print(json.dumps({"schema": "ngrokd.bench.instructions/1", "build": build_of_core(), "data": counts}))
    else:
        print(f"{build_of_core()}, instructions in user mode; times: against the baseline\n")
        for name, number in counts.items():
            times = f"{number / known[name]:5.2f}" if name in known else "     "
            print(f"{name:10}{number:>10,} {times}  {CASES[name][0]}")
    dearer = [name for name, number in counts.items() if name in known and number > TOLERANCE * known[name]]
    if options_.check and dearer:
        print(f"dearer than the baseline by more than a quarter: {', '.join(dearer)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
