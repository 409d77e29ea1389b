"""The daemon with two workers on a real kernel: shared work, no rights, and what happens when a process is killed."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace, Running

pytestmark = pytest.mark.netns

# Echoes a line on each of many connections, once for each line on its input; says which ports are reset.
HELD_CLIENT = """
import socket, sys
held = {}
for _ in range(int(sys.argv[1])):
    s = socket.create_connection(("echo.demo", 7), 10)
    s.settimeout(10)
    held[s.getsockname()[1]] = s
print("open", flush=True)
for line in sys.stdin:
    alive, reset = [], []
    for port, s in held.items():
        try:
            s.sendall(line.encode())
            alive.append(port) if s.recv(100) == line.encode() else reset.append(port)
        except ConnectionError:
            reset.append(port)
    print("alive", len(alive), "reset", len(reset), flush=True)
"""
# Opens a connection again and again, and says when each attempt began and how it ended.
CONNECTING_CLIENT = """
import socket, time
while True:
    began = time.monotonic()
    try:
        with socket.create_connection(("echo.demo", 7), 10) as s:
            s.sendall(b"x")
            s.recv(1)
        outcome = "ok"
    except OSError as error:
        outcome = type(error).__name__
    print(f"{began:.3f} {time.monotonic() - began:.3f} {outcome}", flush=True)
    time.sleep(0.005)
"""


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Callable[..., Stage]]:
    """Makes stages whose daemon has two workers."""
    made: list[Stage] = []

    def make(*options: str) -> Stage:
        made.append(Stage(netns(), *(options or ("--demo",)), "--set", "net.workers=2"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def workers(play: Stage) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = play.status()["workers"]
    return found


def process_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return process_status(pid)["State"][0] not in "ZX"
    return False


def wait_until(happened: Callable[[], bool], *, within: float) -> float:
    """Wait for it, and return after how many seconds it had happened; fails the test when it does not."""
    began = time.monotonic()
    while not happened():
        assert time.monotonic() - began < within
        time.sleep(0.01)
    return time.monotonic() - began


def hold(play: Stage, count: int) -> Running:
    client = play.ns.start([sys.executable, "-u", "-c", HELD_CLIENT, str(count)])
    client.expect("open")
    return client


def test_the_main_job_is_done_by_both(stage: Callable[..., Stage]) -> None:
    """Bytes are the endpoint's, both ways; twenty at once; and each worker had its share."""
    play = stage()
    play.start()

    down = play.ns.run(
        ["sh", "-c", "curl -sS -D /run/headers http://hello.demo/bytes/20000000 | sha256sum; cat /run/headers"]
    )
    play.ns.run(["sh", "-c", "head -c 20000000 /dev/urandom > /run/body"])
    up = play.ns.run(
        ["sh", "-c", "sha256sum < /run/body; curl -sS -H Expect: --data-binary @/run/body http://hello.demo/hash"]
    )
    many = play.ns.run(
        ["sh", "-c", "for i in $(seq 20); do curl -sS --max-time 20 http://hello.demo/bytes/1000000|wc -c& done; wait"]
    )
    client = hold(play, 60)
    status = play.status()

    assert down.stdout.split()[0] in re.findall(r"[0-9a-f]{64}", down.stdout.split("\n", 1)[1])
    sent, answered = re.findall(r"[0-9a-f]{64}", up.stdout)[:2]
    assert sent == answered
    assert many.stdout.split() == ["1000000"] * 20
    # 82 connections by a hash: that one worker gets fewer than 10 happens once in 10**13 times.
    accepted = [worker["accepted"] for worker in status["workers"]]
    assert sum(accepted) == 82 == status["counters"]["relay.accepted"]
    assert min(accepted) >= 10, accepted
    assert status["flows"] == 60 == sum(worker["flows"] for worker in status["workers"])
    assert status["state"] == "ready"
    client.write("x\n")
    client.expect("alive 60 reset 0")
    assert play.daemon is not None
    assert "imported late" not in play.daemon.stderr, play.daemon.stderr
