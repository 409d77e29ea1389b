"""What the daemon costs, and what it bears: 65,000 endpoints, hundreds of idle flows, a start into silence.

The limits stand for a machine of two cores that does other things besides, so they are far above what is measured
(bench/RESULTS.md has that); what they catch is work on the event loop and memory that grows with the wrong thing.
"""

from __future__ import annotations

import functools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace, Running

pytestmark = pytest.mark.netns

ENDPOINTS = 65_000
FIRST, LAST = "svc-00000.scale.test", "svc-64992.scale.test"
LONGEST_WAIT_MS = 300  # 20 on a quiet machine
START_S = 2.0  # 1.0
STATUS_S = 0.3  # 0.05

# Asks for an echo every other millisecond and says what the longest wait was, for each line of its input.
PING_PONG = """
import select, socket, sys, time
s = socket.create_connection(("echo.demo", 7), 10)
s.settimeout(30)
s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print("connected")
worst = 0.0
while True:
    started = time.monotonic()
    s.sendall(b"x")
    assert s.recv(1) == b"x"
    worst = max(worst, time.monotonic() - started)
    if select.select([sys.stdin], [], [], 0.002)[0]:
        if not sys.stdin.readline():
            break
        print(f"longest {worst * 1000:.0f} ms", flush=True)
        worst = 0.0
"""
HOLD_FLOWS = """
import socket, sys
held = []
for line in sys.stdin:
    for _ in range(int(line)):
        held.append(socket.create_connection(("echo.demo", 7), 10))
        held[-1].sendall(b"x")
    for s in held:
        s.settimeout(10)
    assert all(s.recv(1) == b"x" for s in held[-int(line):])
    print(f"open {len(held)}", flush=True)
"""


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Callable[..., Stage]]:
    """Makes stages; the last act of the test is to take them away."""
    made: list[Stage] = []

    def make(*options: str) -> Stage:
        made.append(Stage(netns(), "--demo", "--set", 'api.poll_interval="10m"', *options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def resident_kib(process: Running) -> int:
    """Resident memory, the interpreter's files included."""
    rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
    return int(re.findall(r"^Rss: +(\d+) kB", rollup, re.MULTILINE)[0])


def cpu_s(process: Running) -> float:
    """Processor time so far, of all threads."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def longest_wait_ms(client: Running, act: Callable[[], object]) -> int:
    """The longest that PING_PONG waited for an echo while `act` ran."""
    answers = client.stdout.count("longest")
    client.write("\n")
    client.expect(rf"(?:^longest .*\n){{{answers + 1}}}")
    act()
    client.write("\n")
    client.expect(rf"(?:^longest .*\n){{{answers + 2}}}")
    return int(re.findall(r"longest (\d+) ms", client.stdout)[answers + 1])


def assert_soon(limit: float, measure: Callable[[], float]) -> None:
    """What is measured is below the limit, in one of three goes: the machine may have been busy with other things."""
    found: list[float] = []
    while not found or (found[-1] >= limit and len(found) < 3):
        found.append(measure())
    assert found[-1] < limit, found


def silence(play: Stage, api_url: str, ingress: str) -> str:
    """A configuration for a network in which 192.0.2.9, the name server too, never answers, but does not refuse."""
    if "silence" not in play.ns.run(["ip", "link"]).stdout:
        for command in (
            "ip link add silence type veth peer name nobody",
            "ip link set nobody up",
            "ip link set silence up",
            "ip addr add 192.0.2.1/24 dev silence",
            "ip neigh add 192.0.2.9 lladdr 02:00:00:00:00:09 dev silence",
        ):
            play.ns.run(command.split())
        play.ns.write_file("/etc/resolv.conf", "nameserver 192.0.2.9\n")
    text = Path(play.lab.config).read_text()
    text = re.sub('^url = ".*"$', f'url = "{api_url}"', text, count=1, flags=re.MULTILINE)
    text = re.sub('^address = ".*"$', f'address = "{ingress}"', text, count=1, flags=re.MULTILINE)
    path = play.directory / "silence.toml"
    path.write_text(text)
    return str(path)


@pytest.mark.timeout(180)
def test_a_whole_16_bit_subnet_of_endpoints(stage: Callable[..., Stage]) -> None:
    """Start, poll, change, list, outage, restart and stop with 65,000 names; packets pass all the time."""
    play = stage("--do", f"many {ENDPOINTS - 7} http://svc-{{}}.scale.test http", "--do", "page-size 1000")
    daemon = play.start(ready_timeout=60)
    lines = re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE)
    assert len(lines) == ENDPOINTS
    for name in (FIRST, LAST):
        address = play.ns.run(["getent", "ahostsv4", name]).stdout.split()[0]
        assert f"{address}\t{name}" in lines
    assert play.ns.run(["curl", "-sS", "--max-time", "10", f"http://{LAST}/"]).stdout

    client = play.ns.start([sys.executable, "-u", "-c", PING_PONG])
    client.expect("connected")
    added = 0

    def poll_one_more() -> None:
        nonlocal added
        play.lab.do(f"add http://new-{added}.scale.test http")
        play.ngrokd("refresh")
        assert f"\tnew-{added}.scale.test\n" in play.hosts()
        added += 1

    def list_all() -> None:
        assert len(json.loads(play.ngrokd("list", "--json").stdout)["data"]) == ENDPOINTS + added

    def ask_over_http() -> None:
        play.ns.run(["curl", "-sS", "-o", "/run/status", "http://127.0.0.1:8081/status"])

    for act in (lambda: play.ngrokd("refresh"), poll_one_more, list_all, ask_over_http):
        assert_soon(LONGEST_WAIT_MS, functools.partial(longest_wait_ms, client, act))
    assert resident_kib(daemon) < 400 * 1024

    for number in range(added):
        play.lab.do(f"remove http://new-{number}.scale.test")
    play.ngrokd("refresh")
    assert re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE) == lines
    started = time.monotonic()
    assert play.stop() == 0
    assert time.monotonic() - started < 5
    assert "10.107." not in play.hosts()

    play.lab.do("outage on")
    play.start(ready_timeout=60)
    assert re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE) == lines
    assert play.ns.run(["curl", "-sS", "--max-time", "10", f"http://{FIRST}/"]).stdout
    assert play.stop() == 0


def test_a_daemon_at_rest_is_small_and_quiet(stage: Callable[..., Stage]) -> None:
    """60 MiB and 1 % of a core, with ten endpoints and after the first connection."""
    play = stage("--do", "many 3 http://svc-{}.scale.test http")
    daemon = play.start()
    assert play.ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout
    time.sleep(0.5)

    before = cpu_s(daemon)
    time.sleep(2)

    assert cpu_s(daemon) - before <= 0.02
    assert resident_kib(daemon) <= 60 * 1024


def test_an_idle_flow_is_small(stage: Callable[..., Stage]) -> None:
    """50 KiB with TLS: twenty thousand of them fit into a gigabyte."""
    play = stage()
    daemon = play.start()
    client = play.ns.start([sys.executable, "-u", "-c", HOLD_FLOWS])
    client.write("20\n")  # what is needed once is there from now on
    client.expect("open 20")
    time.sleep(0.5)
    before = resident_kib(daemon)

    client.write("300\n")
    client.expect("open 320")
    time.sleep(0.5)

    assert (resident_kib(daemon) - before) / 300 <= 55


def test_a_start_into_silence_serves_what_was_known(stage: Callable[..., Stage]) -> None:
    """The API's packets vanish and the name server does not answer: a second to the ready line all the same."""
    play = stage("--do", "many 93 http://svc-{}.scale.test http")
    play.start()
    lines = re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE)
    assert len(lines) == 100
    assert play.stop() == 0
    for url, ingress in (("https://192.0.2.9", "127.0.0.1:9"), ("https://api.scale.test", "ingress.scale.test:443")):
        config = silence(play, url, ingress)

        def start_and_stop(config: str = config) -> float:
            started = time.monotonic()
            play.start(config=config)
            took = time.monotonic() - started
            assert re.findall(r"^10\.107\..*$", play.hosts(), re.MULTILINE) == lines
            assert play.stop() == 0
            return took

        assert_soon(START_S, start_and_stop)


def test_asking_for_the_status_is_quick(stage: Callable[..., Stage]) -> None:
    """100 ms for a person who looks, a tenth of a second for a script that waits."""
    play = stage()
    play.start()

    def ask() -> float:
        started = time.monotonic()
        play.ngrokd("status")
        return time.monotonic() - started

    assert_soon(STATUS_S, lambda: statistics.median(ask() for _ in range(5)))
