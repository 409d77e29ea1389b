"""What the daemon costs beside the path: 65,000 endpoints, at rest, per idle flow, to start and to ask.

    sudo python bench/bench_control.py [--endpoints 65000] [--flows 2000] [--record]

The real daemon and the lab are processes in private namespaces (tests/netns). While a poll is under way, a client goes
on asking an echo for a byte every other millisecond; its longest wait shows what held up the packets. --record writes
the part "control" of RESULTS.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import platform
import re
import ssl
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.report import RESULTS, replace_part  # noqa: E402
from tests.netns.stage import Stage  # noqa: E402
from tests.netns.support import Running, open_namespace  # noqa: E402
from tests.netns.test_netns_scale import (  # noqa: E402
    HOLD_FLOWS,
    PING_PONG,
    cpu_s,
    longest_wait_ms,
    resident_kib,
    silence,
)

Row = tuple[str, str]
QUIET = ("--demo", "--set", 'api.poll_interval="10m"')


def main() -> None:
    """Measure, print, and with --record keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--endpoints", type=int, default=65_000)
    parser.add_argument("--flows", type=int, default=2_000)
    parser.add_argument("--record", action="store_true", help="write the numbers into RESULTS.md")
    chosen = parser.parse_args()
    told = circumstances()
    measurements: list[tuple[str, Callable[[], Iterator[Row]]]] = [
        (f"{chosen.endpoints:,} endpoints, in pages of 100", functools.partial(many_endpoints, chosen.endpoints)),
        ("At rest", at_rest),
        (f"{chosen.flows:,} idle flows, TLS 1.3", functools.partial(idle_flows, chosen.flows)),
        ("From the start of the process to the ready line, 100 endpoints known", starts),
    ]
    parts: list[tuple[str, list[Row]]] = []
    for title, measure in measurements:
        print(f"\n{title}", flush=True)
        rows = []
        for name, value in measure():
            print(f"  {name:<72}{value}", flush=True)
            rows.append((name, value))
        parts.append((title, rows))
    if chosen.record:
        text = RESULTS.read_text() if RESULTS.exists() else "# Results\n"
        RESULTS.write_text(replace_part(text, "control", markdown(told, parts)))


def circumstances() -> str:
    """On what, of what and how the numbers were measured."""
    told = ["git", "-c", f"safe.directory={ROOT}", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(told, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    processor = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    software = f"CPython {platform.python_version()}, {' '.join(ssl.OPENSSL_VERSION.split()[:2])}"
    return (
        f"{processor[0] if processor else platform.machine()}, {os.cpu_count()} cores; Linux {platform.release()}; "
        f"{software}. Commit {commit}, load average before: {os.getloadavg()[0]:.1f}, niceness {os.nice(0)}. Command: "
        "`bench/bench_control.py`. Times are those of one run, or the median where several are named; memory is "
        "resident memory, the interpreter's files included."
    )


def markdown(told: str, parts: list[tuple[str, list[Row]]]) -> str:
    """Our part of RESULTS.md."""
    lines = ["## Control plane and memory", "", told]
    for title, rows in parts:
        lines += ["", f"### {title}", "", "| what | measured |", "|---|--:|"]
        lines += [f"| {name} | {value} |" for name, value in rows]
    return "\n".join(lines)


def many_endpoints(count: int) -> Iterator[Row]:
    """The life of a daemon that serves a whole /16."""
    with open_namespace() as namespace:
        play = Stage(namespace, *QUIET, "--do", f"many {count - 7} http://svc-{{}}.scale.test http")
        daemon = yield from _started(play, "start to ready: poll, plan, hosts file")
        yield "lines in the hosts file", f"{play.hosts().count(chr(10) + '10.107.'):,}"
        yield "memory after the first poll", _mib(daemon)
        first, last = _names(play)
        for which, name in (("first", first), ("last", last)):
            yield f"getent of the {which} name", _ms(lambda name=name: play.ns.run(["getent", "hosts", name]))  # type: ignore[misc]
        yield "curl of the last name", _ms(lambda: play.ns.run(["curl", "-sS", f"http://{last}/"]))
        client = play.ns.start([sys.executable, "-u", "-c", PING_PONG])
        client.expect("connected")
        yield "longest wait for an echo, nothing else going on", f"{longest_wait_ms(client, lambda: time.sleep(3))} ms"
        yield from _poll(play, daemon, client, "a poll without a change")
        play.lab.do("add http://new.scale.test http")
        yield from _poll(play, daemon, client, "a poll with one endpoint more")
        play.lab.do("remove http://new.scale.test")
        yield from _poll(play, daemon, client, "a poll with one endpoint less")
        for what, act in (
            ("ngrokd list --json", lambda: play.ngrokd("list", "--json")),
            ("GET /status", lambda: play.ns.run(["curl", "-sS", "-o", "/dev/null", "http://127.0.0.1:8081/status"])),
        ):
            took: list[str] = []
            wait = longest_wait_ms(client, lambda act=act, took=took: took.append(_ms(act)))  # type: ignore[misc]
            yield f"{what}; longest wait for an echo meanwhile", f"{took[0]}; {wait} ms"
        yield "memory at the end", _mib(daemon)
        yield "SIGTERM to the end, all undone", _stopped(play)
        play.lab.do("outage on")
        daemon = yield from _started(play, "start to ready while the API is down")
        yield "memory then", _mib(daemon)
        _stopped(play)
        play.close()


def at_rest() -> Iterator[Row]:
    """Ten endpoints and nothing to do."""
    with open_namespace() as namespace:
        play = Stage(
            namespace, "--demo", "--do", "many 3 http://svc-{}.rest.test http", "--set", 'api.poll_interval="30s"'
        )
        play.start()
        play.stop()
        daemon = play.start()
        time.sleep(2)
        yield "memory, 10 endpoints", _mib(daemon)
        before = cpu_s(daemon)
        time.sleep(40)
        yield "CPU over 40 s, with a poll every 30 s", f"{(cpu_s(daemon) - before) / 40:.2%} of a core"
        took = sorted(_seconds(lambda: play.ngrokd("status")) for _ in range(10))
        yield "ngrokd status, median of 10", f"{statistics.median(took) * 1000:.0f} ms"
        _stopped(play)
        play.close()


def idle_flows(count: int) -> Iterator[Row]:
    """Memory of flows that have carried a byte each way and wait."""
    with open_namespace() as namespace:
        play = Stage(namespace, *QUIET)
        daemon = play.start()
        client = play.ns.start([sys.executable, "-u", "-c", HOLD_FLOWS])
        client.write("20\n")
        client.expect("open 20")
        time.sleep(1)
        before = resident_kib(daemon)
        yield "memory before", _mib(daemon)
        client.write(f"{count}\n")
        client.expect(f"open {count + 20}", timeout=120)
        time.sleep(2)
        yield "memory with them", _mib(daemon)
        yield "per flow", f"{(resident_kib(daemon) - before) / count:.1f} KiB"
        cpu = cpu_s(daemon)
        time.sleep(10)
        yield "CPU of all of them, over 10 s", f"{(cpu_s(daemon) - cpu) / 10:.2%} of a core"
        yield "SIGTERM to the end, with a drain of 3 s", _stopped(play)
        play.close()


def starts() -> Iterator[Row]:
    """How soon known names work again, whatever the API does; the median of five."""
    with open_namespace() as namespace:
        play = Stage(namespace, *QUIET, "--do", "many 93 http://svc-{}.start.test http")
        play.start()
        play.stop()
        yield "API up", _median_start(play)
        play.lab.do("outage on")
        yield "API refuses connections", _median_start(play)
        play.lab.do("outage off")
        yield "API's packets vanish", _median_start(play, silence(play, "https://192.0.2.9", "127.0.0.1:9"))
        nowhere = silence(play, "https://api.start.test", "ingress.start.test:443")
        yield "API, ingress and name server: packets vanish", _median_start(play, nowhere)
        play.close()


def _started(play: Stage, what: str) -> Generator[Row, None, Running]:
    started = time.monotonic()
    daemon = play.start(ready_timeout=120)
    yield what, f"{time.monotonic() - started:.2f} s, {cpu_s(daemon):.2f} s of CPU"
    return daemon


def _poll(play: Stage, daemon: Running, client: Running, what: str) -> Iterator[Row]:
    before = cpu_s(daemon)
    took: list[float] = []
    wait = longest_wait_ms(client, lambda: took.append(_seconds(lambda: play.ngrokd("refresh"))))
    yield f"{what}; longest wait for an echo meanwhile", f"{took[0]:.2f} s; {wait} ms"
    yield f"{what}: CPU, the echoes' included; memory", f"{cpu_s(daemon) - before:.2f} s; {_mib(daemon)}"


def _median_start(play: Stage, config: str = "") -> str:
    took = []
    for _ in range(5):
        started = time.monotonic()
        play.start(config=config)
        took.append(time.monotonic() - started)
        play.stop()
    return f"{statistics.median(took):.2f} s"


def _stopped(play: Stage) -> str:
    started = time.monotonic()
    assert play.stop(timeout=60) == 0
    assert "10.107." not in play.hosts()
    return f"{time.monotonic() - started:.2f} s"


def _names(play: Stage) -> tuple[str, str]:
    named = re.findall(r"^10\.107\.\S+\t(svc-\S+)$", play.hosts(), re.MULTILINE)
    return named[0], named[-1]


def _mib(process: Running) -> str:
    return f"{resident_kib(process) / 1024:.0f} MiB"


def _seconds(act: Callable[[], object]) -> float:
    started = time.monotonic()
    act()
    return time.monotonic() - started


def _ms(act: Callable[[], object]) -> str:
    return f"{_seconds(act) * 1000:.0f} ms"


if __name__ == "__main__":
    main()
