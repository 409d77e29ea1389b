"""The daemon with two workers on a real kernel: shared work, no rights, and what happens when a process is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace, Running
from tun.pcap import read_capture

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
    if not s.recv(1):
        break
    worst = max(worst, time.monotonic() - started)
    if select.select([sys.stdin], [], [], 0.02)[0]:
        if not sys.stdin.readline():
            break
        print(f"longest {worst * 1000:.0f} ms", flush=True)
        worst = 0.0
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


def rss_kib(pid: int) -> int:
    return int(process_status(pid)["VmRSS"].split()[0])


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
    assert (
        sum(accepted) == status["counters"]["relay.accepted"] >= 82
    )  # curl tries a second address when the first is slow
    assert min(accepted) >= 10, accepted
    assert status["flows"] == 60 == sum(worker["flows"] for worker in status["workers"])
    assert status["state"] == "ready", status
    client.write("x\n")
    client.expect("alive 60 reset 0")
    assert play.daemon is not None
    assert "imported late" not in play.daemon.stderr, play.daemon.stderr


def test_workers_have_no_rights(stage: Callable[..., Stage]) -> None:
    """Nobody's user, no capability, none to be got; not to be looked into; nothing of the daemon's but the sockets."""
    play = stage()
    daemon = play.start()

    for worker in workers(play):
        status = process_status(worker["pid"])
        assert status["Uid"].split() == status["Gid"].split() == ["65534"] * 4
        assert status["Groups"] == ""
        assert {status[name] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
        assert status["NoNewPrivs"] == "1"
        assert status["PPid"] == str(daemon.pid)
        fds = {os.readlink(f"/proc/{worker['pid']}/fd/{fd}") for fd in os.listdir(f"/proc/{worker['pid']}/fd")}
        assert "/dev/net/tun" in fds
        assert {name for name in fds if name.startswith("/")} <= {"/dev/null", "/dev/net/tun"}
        assert os.stat(f"/proc/{worker['pid']}/fd").st_uid == 0, "undumpable"
        environment = Path(f"/proc/{worker['pid']}/environ").read_bytes()
        assert b"NGROK_API_KEY" not in environment
        assert b"HOME=" not in environment
    assert "imported late" not in daemon.stderr


def test_the_user_ngrokd_is_taken_where_it_exists(stage: Callable[..., Stage]) -> None:
    play = stage()
    play.ns.run(["sh", "-c", "echo ngrokd:x:4242:4343::/:/usr/sbin/nologin >> /etc/passwd"])
    play.start()

    for worker in workers(play):
        status = process_status(worker["pid"])
        assert (status["Uid"].split(), status["Gid"].split()) == (["4242"] * 4, ["4343"] * 4)


def test_a_killed_worker_is_back_within_a_second_and_the_others_go_on(stage: Callable[..., Stage]) -> None:
    """Its own connections are reset when they speak; the ones of the other carry on; new ones hardly notice."""
    play = stage()
    daemon = play.start()
    held = hold(play, 40)
    before = workers(play)
    visitor = play.ns.start([sys.executable, "-u", "-c", CONNECTING_CLIENT])
    visitor.expect(r"ok")

    os.kill(before[0]["pid"], signal.SIGKILL)
    daemon.expect(r"worker 0 \(process \d+\): it was ended by SIGKILL; \d+ connections ended", stream="stderr")
    daemon.expect("worker 0 runs again", stream="stderr")
    held.write("x\n")
    alive, reset = map(int, held.expect(r"alive (\d+) reset (\d+)").groups())

    assert (alive, reset) == (before[1]["flows"], before[0]["flows"])
    assert alive >= 5
    assert reset >= 5
    visits = len(visitor.stdout.splitlines())
    wait_until(lambda: len(visitor.stdout.splitlines()) > visits + 5, within=10)
    # A SYN that nobody answers is sent again after a second: so long may one visitor wait, and nobody is turned away.
    attempts = [line.split() for line in visitor.stdout.splitlines()[:-1]]
    assert {outcome for _, _, outcome in attempts} <= {"ok", "ConnectionResetError"}, attempts
    assert [outcome for _, _, outcome in attempts].count("ConnectionResetError") <= 1
    assert max(float(took) for _, took, _ in attempts) < 3.0
    after = play.status()
    assert [worker["restarts"] for worker in after["workers"]] == [1, 0]
    assert after["workers"][0]["pid"] != before[0]["pid"]
    assert after["state"] == "ready"
    assert after["counters"]["relay.accepted"] >= 40 + len(attempts) - 1, "what the dead one counted is not forgotten"
    held.write("y\n")
    held.expect(rf"alive {alive} reset \d+\nalive {alive} reset")


def test_how_soon_a_killed_worker_is_replaced(stage: Callable[..., Stage]) -> None:
    """Within a second, in the best of three goes: the machine may be busy with other things."""
    play = stage()
    daemon = play.start()
    took = []
    for count in range(1, 4):
        pid = workers(play)[1]["pid"]
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        daemon.expect(rf"(?s)(?:worker 1 runs again.*){{{count}}}", stream="stderr", timeout=10)
        took.append(time.monotonic() - began)

    assert min(took) < 1.0, took


def test_workers_do_not_outlive_a_killed_daemon(stage: Callable[..., Stage]) -> None:
    """Nobody is left who holds the interface, so the next daemon can have it at once."""
    play = stage()
    daemon = play.start()
    pids = [worker["pid"] for worker in workers(play)]
    client = hold(play, 10)

    daemon.kill()
    took = wait_until(lambda: not any(map(is_alive, pids)), within=5)
    daemon.wait(timeout=5)

    assert took < 1.0
    assert "ngrokd0" not in play.ns.run(["ip", "link"]).stdout
    client.write("x\n")
    play.start()
    assert "alive 10" not in client.stdout
    assert play.ns.run(["curl", "-sS", "--max-time", "10", "http://hello.demo/"]).stdout


def test_a_worker_whose_parent_died_before_it_could_ask_ends(stage: Callable[..., Stage]) -> None:
    """A worker that was stopped all the while notices by its socket, or by the signal that waited for it."""
    play = stage()
    daemon = play.start()
    pids = [worker["pid"] for worker in workers(play)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)

    daemon.kill()
    daemon.wait(timeout=5)
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)

    wait_until(lambda: not any(map(is_alive, pids)), within=2)


def test_sigterm_drains_both_and_leaves_nothing(stage: Callable[..., Stage]) -> None:
    """Connections have their time, new ones are refused by both, and then link, routes and processes are gone."""
    play = stage("--demo", "--set", 'net.drain="30s"')
    before = play.network()
    daemon = play.start()
    pids = [worker["pid"] for worker in workers(play)]
    client = hold(play, 1)

    daemon.terminate()
    daemon.expect("stopping: new connections are refused", stream="stderr")
    client.write("x\n")
    client.expect("alive 1 reset 0")
    refused = play.ns.python(
        "import socket\n"
        "words = set()\n"
        "for _ in range(20):\n"
        "    try: socket.create_connection(('10.107.0.2', 80), 5)\n"
        "    except OSError as error: words.add(type(error).__name__)\n"
        "    else: words.add('connected')\n"
        "print(*sorted(words))\n"
    )
    client.kill()

    assert refused.stdout.split() == ["ConnectionRefusedError"], "by the one that has no connection left, too"
    assert daemon.wait(timeout=10) == 0
    assert not any(map(is_alive, pids))
    assert play.network() == before
    assert "10.107." not in play.hosts()


def test_ctrl_c_in_a_terminal_is_the_daemons_to_handle(stage: Callable[..., Stage]) -> None:
    """It reaches all processes of the terminal; workers leave the order of things to the daemon."""
    play = stage()
    daemon = play.start()
    client = hold(play, 10)

    os.killpg(daemon.pid, signal.SIGINT)
    client.write("x\n")
    client.expect("alive 10 reset 0")

    assert daemon.wait(timeout=10) == 0
    assert "ended by SIGINT" not in daemon.stderr
    assert "Traceback" not in daemon.stderr


def test_a_renewed_certificate_reaches_both_without_rights(stage: Callable[..., Stage]) -> None:
    """Each loads it into OpenSSL by itself, as nobody and undumpable; live connections are not touched."""
    play = stage("--demo", "--set", "pool.max=0")
    play.start()
    held = hold(play, 10)
    serials = {one["client_serial"] for one in play.lab.do("connections 10")["connections"]}

    play.ngrokd("refresh-cert", "--force")
    held.write("x\n")
    held.expect("alive 10 reset 0")
    hold(play, 30)
    after = play.lab.do("connections 30")["connections"]
    accepted = [worker["accepted"] for worker in workers(play)]

    assert len(serials) == 1
    assert len({one["client_serial"] for one in after}) == 1
    assert serials.isdisjoint(one["client_serial"] for one in after)
    assert min(accepted) >= 3


def test_a_ca_that_one_worker_finds_is_known_to_all(stage: Callable[..., Stage]) -> None:
    """The default trust: the ingress presents its CA, known by its fingerprint; the daemon keeps it."""
    play = stage("--demo", "--trust", "fingerprint")
    play.start()

    hold(play, 20)

    assert min(worker["accepted"] for worker in workers(play)) >= 1
    assert "BEGIN CERTIFICATE" in (play.directory / "state" / "ingress-ca.pem").read_text()


def test_the_interface_comes_back_for_both_when_somebody_deletes_it(stage: Callable[..., Stage]) -> None:
    """A link is not a connection; both workers get a queue of the new one."""
    play = stage()
    play.start()
    client = hold(play, 40)
    flows = [worker["flows"] for worker in workers(play)]

    play.ns.run(["ip", "link", "del", "ngrokd0"])
    wait_until(lambda: "ngrokd0" in play.ns.run(["ip", "route"]).stdout, within=10)
    client.write("two\n")
    client.expect("alive 40 reset 0", timeout=20)

    assert min(flows) >= 5
    assert [worker["flows"] for worker in workers(play)] == flows
    assert [worker["restarts"] for worker in workers(play)] == [0, 0]


def test_status_speaks_of_all_workers_as_of_one(stage: Callable[..., Stage]) -> None:
    """Numbers are those of now, and what was counted adds up."""
    play = stage()
    play.start()
    client = hold(play, 20)

    shown = play.status()
    client.kill()
    client.wait()

    counters = shown["counters"]
    assert counters["relay.active"] == shown["flows"] == 20
    assert counters["stack.accepted"] == sum(worker["accepted"] for worker in shown["workers"]) == 20
    assert shown["pool"]["hits"] + shown["pool"]["adopted"] + shown["pool"]["misses"] == 20
    assert counters["stack.packets"] == sum(worker["packets"] for worker in shown["workers"])
    wait_until(lambda: play.status()["flows"] == 0, within=5)


@pytest.mark.timeout(180)
def test_65_000_endpoints_reach_both_without_holding_up_packets(stage: Callable[..., Stage]) -> None:
    """At the start, when one is added, and again when a worker is replaced while connections of the other go on."""
    play = stage(
        *("--demo", "--set", 'api.poll_interval="10m"', "--do", "page-size 1000"),
        *("--do", "many 64993 http://svc-{}.scale.test http"),
    )
    daemon = play.start(ready_timeout=60)
    clients = [play.ns.start([sys.executable, "-u", "-c", PING_PONG]) for _ in range(8)]
    for client in clients:
        client.expect("connected")

    def longest_ms(act: Callable[[], object]) -> int:
        for client in clients:
            client.write("\n")
            client.expect("longest")
        seen = [client.stdout.count("longest") for client in clients]
        act()
        for client, count in zip(clients, seen, strict=True):
            client.write("\n")
            client.expect(rf"(?:^longest .*\n){{{count + 1}}}")
        return max(int(re.findall(r"longest (\d+) ms", client.stdout)[-1]) for client in clients)

    play.lab.do("add http://new.scale.test http")
    waits = [longest_ms(lambda: play.ngrokd("refresh", timeout=60))]
    for name in ("svc-00000.scale.test", "svc-64992.scale.test", "new.scale.test"):
        for _ in range(6):  # so that each worker is asked
            assert play.ns.run(["curl", "-sS", "--max-time", "10", f"http://{name}/"]).stdout
    before = workers(play)
    memory = [rss_kib(worker["pid"]) for worker in before]
    idle = next(worker for worker in before if worker["flows"] == min(one["flows"] for one in before))

    os.kill(idle["pid"], signal.SIGKILL)
    daemon.expect(rf"worker {idle['index']} runs again", stream="stderr")
    for _ in range(12):
        assert play.ns.run(["curl", "-sS", "--max-time", "10", "http://svc-64992.scale.test/"]).stdout
    assert [worker["restarts"] for worker in workers(play)].count(1) == 1
    assert waits[0] < 500, waits  # 40 on a quiet machine
    assert max(memory) < 160 * 1024, memory


def test_operators_see_all_workers_as_one(stage: Callable[..., Stage]) -> None:
    """`flows`, `ping`, `capture` and `/metrics` need not know who carries what."""
    play = stage("--demo", "--set", 'http.listen="127.0.0.1:8081"')
    play.start()
    client = hold(play, 20)
    capture = play.ns.start(
        [
            *(sys.executable, "-m", "ngrokd", "--socket", f"{play.directory}/ngrokd.sock"),
            *("capture", "--port", "7", "--count", "60", "-w", str(play.directory / "both.pcapng")),
        ]
    )
    wait_until(lambda: (play.directory / "both.pcapng").exists(), within=10)
    wait_until(lambda: (play.directory / "both.pcapng").stat().st_size > 0, within=10)

    for _ in range(3):
        client.write("x\n")
    client.expect(r"(?s)(?:alive 20 reset 0.*){3}")

    assert capture.wait(timeout=10) == 0
    with (play.directory / "both.pcapng").open("rb") as file:
        packets = list(read_capture(file))
    assert len(packets) == 60
    assert len({packet.packet[20:22] for packet in packets if packet.packet[0] >> 4 == 4}) != 1, "of many connections"
    flows = json.loads(play.ngrokd("flows", "--json").stdout)["data"]
    assert len(flows) == 20
    assert len({flow["id"] for flow in flows}) == 20
    assert {flow["id"] % 2 for flow in flows} == {0, 1}
    play.ngrokd("ping", "echo.demo")
    metrics = play.ns.run(["curl", "-sS", "http://127.0.0.1:8081/metrics"]).stdout
    assert re.search(r"^ngrokd_flows(?:\{[^}]*\})? 20(?:\.0)?$", metrics, re.MULTILINE), metrics[:3000]


def test_without_the_rights_to_drop_rights_nothing_starts(stage: Callable[..., Stage]) -> None:
    """What is missing is named before anything was done to the machine; one worker needs none of it."""
    play = stage()
    before = play.network()
    run = [
        *("setpriv", "--bounding-set=-setuid,-kill", sys.executable, "-m", "ngrokd", "run"),
        *("--config", play.lab.config),
    ]

    refused = play.ns.run(run, check=False, timeout=20)

    assert refused.returncode == 77
    assert "CAP_KILL, CAP_SETUID" in refused.stderr
    assert play.network() == before
    alone = play.ns.start([*run, "--set", "net.workers=1"])
    alone.expect(r"^\[ready\]")
    assert workers(play) == []
    alone.terminate()
    assert alone.wait(timeout=10) == 0
