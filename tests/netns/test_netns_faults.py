"""The daemon on a real kernel when the machine around it misbehaves."""

from __future__ import annotations

import os
import random
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.netns.stage import Stage
from tests.netns.support import ROOT, Namespace, Running, require_tools

pytestmark = pytest.mark.netns

ECHO_CLIENT = """
import os, socket, sys, threading
s = socket.create_connection(("echo.demo", 7), 10)
s.settimeout(20)
round = 0
while True:
    sent, received = os.urandom(200_000), b""
    sender = threading.Thread(target=s.sendall, args=(sent,))
    sender.start()
    while len(received) < len(sent):
        received += s.recv(65536)
    sender.join()
    assert received == sent
    round += 1
    print(round)
"""
# Six flows, three of each version; each sends noise of any size and has it back before it sends more.
LOAD_CLIENT = """
import hashlib, random, socket, sys, threading
addresses, wrong, rounds, resets = sys.argv[1:], [], [0] * 6, [0]
def exchange(s, chance):
    sent, received = chance.randbytes(chance.randrange(1, 400_000)), bytearray()
    sender = threading.Thread(target=s.sendall, args=(sent,))
    sender.start()
    while len(received) < len(sent):
        part = s.recv(65536)
        if not part:
            raise EOFError("a clean end in the middle")
        received += part
    sender.join()
    assert hashlib.sha256(received).digest() == hashlib.sha256(sent).digest(), "other bytes than were sent"
def work(number):
    chance = random.Random(number)
    while not wrong:
        try:
            with socket.create_connection((addresses[number % len(addresses)], 7), 20) as s:
                s.settimeout(20)
                while True:
                    exchange(s, chance)
                    rounds[number] += 1
        except (ConnectionResetError, BrokenPipeError):
            resets[0] += 1
        except BaseException as error:
            wrong.append(repr(error))
for number in range(6):
    threading.Thread(target=work, args=(number,), daemon=True).start()
for line in sys.stdin:
    print("told", min(rounds), resets[0], wrong, flush=True)
"""
MANY_CLIENT = """
import errno, socket
held, refused = [], 0
for _ in range(150):
    try:
        held.append(socket.create_connection(("echo.demo", 7), 10))
    except ConnectionRefusedError:
        refused += 1
print(len(held), refused)
"""
CONNECT_CLIENT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 10).close()
"""
RUN = [sys.executable, "-m", "ngrokd", "run"]


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Stage]:
    """A namespace with a lab; the daemon is the test's to start."""
    play = Stage(netns(), "--demo")
    yield play
    play.close()


def configured(stage: Stage, text: str = "", *, without: str = "") -> str:
    """Path of the lab's configuration with more sections, or without lines that match."""
    path = stage.directory / "other.toml"
    lines = Path(stage.lab.config).read_text().splitlines(keepends=True)
    path.touch(mode=0o600)
    path.write_text("".join(line for line in lines if not (without and re.match(without, line))) + text)
    return str(path)


def shell(stage: Stage, before: str = "", after: str = "", config: str = "") -> Running:
    """Start the daemon by a line of shell."""
    line = shlex.join([*RUN, "--config", config or stage.lab.config])
    return stage.ns.start(["sh", "-c", f"{before} exec {line} {after}"], cwd=ROOT)


def eventually(fact: Callable[[], object], within: float) -> float:
    """Wait for something; returns how long it took, seconds."""
    started = time.monotonic()
    while not fact():
        assert time.monotonic() - started < within
        time.sleep(0.02)
    return time.monotonic() - started


def routed(stage: Stage) -> bool:
    return "10.107.0.0/16 dev ngrokd0" in stage.ns.run(["ip", "route"]).stdout


# What others do to our link


def test_what_somebody_changes_is_restored_within_a_second_and_no_byte_is_lost(stage: Stage) -> None:
    """Link down, route, address, MTU, guard route, and the whole interface again and again, under load."""
    stage.start()
    client = stage.ns.start([sys.executable, "-u", "-c", ECHO_CLIENT])
    client.expect("^5$")
    whole = stage.network()

    for change in (
        "ip link set ngrokd0 down",
        "ip route del 10.107.0.0/16 dev ngrokd0",
        "ip addr del 10.107.0.1/32 dev ngrokd0",
        "ip link set ngrokd0 mtu 9000",
        "ip route del unreachable 10.107.0.0/16 metric 4278198272",
    ):
        stage.ns.run(change.split())
        eventually(lambda: stage.network() == whole, within=1.0)
    for _ in range(20):
        stage.ns.run(["ip", "link", "del", "ngrokd0"])
        eventually(lambda: routed(stage), within=1.0)
        time.sleep(0.1)  # some load in between

    rounds = int(client.stdout.split()[-1])
    client.expect(f"^{rounds + 5}$", timeout=20)
    eventually(lambda: stage.status()["state"] == "ready", within=6)
    assert client.returncode is None


FAULTS = [
    "ip link set ngrokd0 down",
    "ip link set ngrokd0 down; ip link set ngrokd0 up",
    "ip link set ngrokd0 mtu 576",
    "ip link set ngrokd0 mtu 1300",
    "ip link set ngrokd0 mtu 9000",
    "ip link set ngrokd0 txqueuelen 2",
    "ip link set ngrokd0 name other0",  # which kernels before 6.2 refuse
    "ip link set ngrokd0 down; ip link set ngrokd0 name other0",
    "ethtool -K ngrokd0 tx off sg off tso off gso off",
    "ethtool -K ngrokd0 tx on sg on tso on gso on",
    "ip addr flush dev ngrokd0",
    "ip route flush dev ngrokd0",
    "ip -6 addr flush dev ngrokd0",
    "ip -6 route flush dev ngrokd0",
    "ip link del ngrokd0",
    "ip route del 10.107.0.0/16 dev ngrokd0; ip link set ngrokd0 mtu 68; ip link del ngrokd0",
]


def test_flows_survive_whatever_is_done_to_the_link_and_no_byte_is_wrong(netns: Callable[[], Namespace]) -> None:
    """Each fault twice, under load over both versions. The better time counts: this machine has other work."""
    require_tools("ethtool")
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this kernel has no IPv6")
    play = Stage(netns(), "--demo", "--set", 'net.subnet6="auto"')
    try:
        play.start()
        addresses = re.findall(r"^(\S+)\techo\.demo$", play.hosts(), re.MULTILINE)
        client = play.ns.start([sys.executable, "-u", "-c", LOAD_CLIENT, *addresses])
        told = 0

        def tell() -> tuple[int, int, str]:
            nonlocal told
            client.write("\n")
            told += 1
            client.expect(rf"\A(?:told .*\n){{{told}}}")
            _, rounds, resets, wrong = client.stdout.splitlines()[-1].split(" ", 3)
            return int(rounds), int(resets), wrong

        eventually(lambda: tell()[0] >= 2, within=20)
        before = sections(play)
        times: dict[str, list[float]] = {}
        for fault in FAULTS * 2:
            rounds = tell()[0]
            play.ns.run(["sh", "-c", fault])
            times.setdefault(fault, []).append(eventually(lambda: sections(play) == before, within=5))
            eventually(lambda rounds=rounds: tell()[0] > rounds or tell()[2] != "[]", within=15)  # type: ignore[misc]
            assert tell()[2] == "[]", fault

        assert max(min(both) for both in times.values()) < 1.0, times
        # That IPv6 may be used again is told to nobody who does not ask.
        switch = "/proc/sys/net/ipv6/conf/ngrokd0/disable_ipv6"
        play.ns.run(["sh", "-c", f"echo 1 >{switch}; sleep 0.3; echo 0 >{switch}"])
        eventually(lambda: sections(play) == before, within=8)
        rounds = tell()[0]
        eventually(lambda: tell()[0] > rounds, within=15)
        assert tell()[1:] == (0, "[]")
    finally:
        play.close()


def test_a_route_that_somebody_takes_does_not_cost_the_other_version(netns: Callable[[], Namespace]) -> None:
    """What is taken of IPv4 is a problem that status shows; IPv6 is restored, and IPv4 when it is free again."""
    if not os.path.exists("/proc/net/if_inet6"):
        pytest.skip("this kernel has no IPv6")
    play = Stage(netns(), "--demo", "--set", 'net.subnet6="auto"')
    try:
        play.start()
        before = sections(play)
        ours = [line for line in before if line.startswith("fd")]

        play.ns.run(["sh", "-c", "ip route replace 10.107.0.0/16 dev lo; ip -6 route flush dev ngrokd0"])
        eventually(lambda: set(ours) <= set(sections(play)), within=3)
        eventually(lambda: "is taken" in play.status()["network"]["problem"], within=3)
        play.ns.run(["ip", "route", "del", "10.107.0.0/16", "dev", "lo"])

        eventually(lambda: sections(play) == before, within=8)
        eventually(lambda: play.status()["state"] == "ready", within=8)
        assert len(ours) == 1
    finally:
        play.close()


def sections(stage: Stage) -> list[str]:
    """What is ours on this machine, in one look; a link that IPv6 comes back to may have a link-local address."""
    look = "ip -o link show ngrokd0; ip -o addr show dev ngrokd0; ip route; ip -6 route show proto static"
    shown = stage.ns.run(["sh", "-c", look], check=False).stdout
    return sorted(re.sub(r"^\d+: ", "", line) for line in shown.splitlines() if "fe80" not in line)


def test_a_subnet_that_somebody_else_comes_to_claim_is_a_problem_that_status_shows(stage: Stage) -> None:
    """Part of our addresses leads elsewhere now, and nothing that connects there will reach us."""
    stage.start()

    stage.ns.run(["ip", "link", "add", "other0", "type", "veth", "peer", "name", "other1"])
    stage.ns.run(["ip", "addr", "add", "10.107.5.1/24", "dev", "other0"])
    eventually(lambda: stage.status()["state"] == "degraded", within=5)
    assert "other0" in stage.status()["network"]["problem"]
    assert "other0" in stage.ngrokd("status").stdout

    stage.ns.run(["ip", "link", "del", "other0"])
    eventually(lambda: stage.status()["state"] == "ready", within=8)


# What is missing


def test_with_cap_net_admin_alone_only_the_names_are_missing(stage: Stage) -> None:
    """What is tested is the right, not the user: root is not needed for the link, and the hosts file is a warning."""
    prepare = (
        "mknod -m 666 /run/tun c 10 200 && mount --bind /run/tun /dev/net/tun && mkdir /run/nobody &&"
        f"sed 's#{stage.directory}#/run/nobody#' {stage.lab.config} > /run/nobody/config.toml &&"
        f"cp {stage.directory}/lab-ca.pem /run/nobody && chown -R 65534:65534 /run/nobody && chmod 700 /run/nobody"
    )
    stage.ns.run(["sh", "-c", prepare])
    become = "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps"
    command = [*RUN, "--config", "/run/nobody/config.toml"]

    refused = stage.ns.run([*become.split(), "-all", *command], check=False)
    daemon = stage.ns.start([*become.split(), "+net_admin", "--ambient-caps", "+net_admin", *command], cwd=ROOT)
    daemon.expect(r"^\[ready\]", timeout=10)
    stage.ns.python(CONNECT_CLIENT, "10.107.0.5", "7")
    daemon.terminate()

    assert refused.returncode == 77
    assert "CAP_NET_ADMIN" in refused.stderr
    assert daemon.wait(timeout=5) == 0
    assert "cannot change /etc/hosts: Permission denied" in daemon.stderr
    assert not routed(stage)


def test_a_read_only_hosts_file_is_a_warning_and_is_written_when_it_can_be(stage: Stage) -> None:
    stage.ns.run(
        ["sh", "-c", "cp /etc/hosts /run/h; mount --bind /run/h /etc/hosts; mount -o remount,ro,bind /etc/hosts"]
    )
    stage.start()
    stage.ns.python(CONNECT_CLIENT, "10.107.0.5", "7")
    assert "Read-only" in stage.status()["hosts"]["problem"]

    stage.ns.run(["mount", "-o", "remount,rw,bind", "/etc/hosts"])

    eventually(lambda: "hello.demo" in stage.hosts(), within=35)
    assert stage.stop() == 0
    assert "hello.demo" not in stage.hosts()


def test_a_full_disk_does_not_keep_it_from_starting(stage: Stage) -> None:
    """What is known is served, what is new too, and it is saved when there is room again."""
    state = f"{stage.directory}/state"
    stage.start()
    assert stage.stop() == 0
    fill = f"cp -a {state} /run/s; mount -t tmpfs -o size=64k,mode=700 none {state}; cp -a /run/s/. {state}"
    stage.ns.run(["sh", "-c", f"{fill}; dd if=/dev/zero of={state}/fill bs=1k || true"])

    stage.start()
    stage.lab.do("add http://new.demo http")
    eventually(lambda: "new.demo" in stage.hosts(), within=5)
    assert "No space" in stage.status()["state_directory"]["problem"]
    stage.ns.run(["rm", f"{state}/fill"])

    eventually(lambda: "new.demo" in stage.ns.read_file(f"{state}/ip_mappings.json"), within=5)
    assert stage.status()["state"] == "ready"


def test_few_descriptors_mean_few_flows_and_a_daemon_that_lives(stage: Stage) -> None:
    """Those it needs itself are kept: it still asks the API and answers on its socket."""
    stage.daemon = shell(stage, before="ulimit -n 128;")
    stage.daemon.expect(r"^\[ready\]", timeout=10)
    clients = stage.ns.start([sys.executable, "-u", "-c", MANY_CLIENT + "import time; time.sleep(60)"])
    held, refused = map(int, clients.expect(r"^(\d+) (\d+)$").groups())
    stage.lab.do("add http://later.demo http")

    eventually(lambda: "later.demo" in stage.hosts(), within=5)
    assert stage.status()["state"] == "ready"
    assert (held, refused) == (64, 86)
    clients.kill()
    clients.wait(timeout=5)
    eventually(lambda: stage.status()["flows"] == 0, within=5)
    stage.ns.python(CONNECT_CLIENT, "echo.demo", "7")


@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", "| true"])
def test_nobody_need_listen_to_what_it_prints(stage: Stage, streams: str) -> None:
    daemon = stage.daemon = shell(stage, before="" if ">" in streams else "true;", after=streams)
    eventually(lambda: "hello.demo" in stage.hosts(), within=10)

    stage.ns.python(CONNECT_CLIENT, "hello.demo", "80")

    assert stage.status()["state"] == "ready"
    os.kill(stage.status()["pid"], signal.SIGTERM)
    assert daemon.wait(timeout=5) == 0
    assert "hello.demo" not in stage.hosts()


# What is configured away


def test_without_configure_the_link_is_left_to_others(stage: Stage) -> None:
    """Somebody else configures it, after any deletion as well."""
    by_hand = "ip addr add 10.107.0.1/32 dev ngrokd0; ip link set ngrokd0 up; ip route add 10.107.0.0/16 dev ngrokd0"
    stage.start(config=configured(stage, "[net]\nconfigure = false\n"))
    assert not routed(stage)

    for _ in range(2):
        stage.ns.run(["sh", "-c", by_hand])
        stage.ns.python(CONNECT_CLIENT, "hello.demo", "80")
        stage.ns.run(["ip", "link", "del", "ngrokd0"])
        eventually(lambda: "ngrokd0" in stage.ns.run(["ip", "link"]).stdout, within=1)

    assert stage.stop() == 0


def test_without_the_hosts_file_endpoints_answer_by_address(stage: Stage) -> None:
    before = stage.hosts()
    stage.start(config=configured(stage, "[hosts]\nenabled = false\n"))

    stage.ns.python(CONNECT_CLIENT, "10.107.0.5", "7")

    assert stage.stop() == 0
    assert stage.hosts() == before


# What is taken


@pytest.mark.parametrize(
    ("taken", "owner"),
    [
        ("ip link add ngrokd0 type veth peer name other0", "veth"),
        ("ip tuntap add dev ngrokd0 mode tap", "TAP"),
        ("ip link add other0 type veth peer name other1; ip addr add 10.107.5.1/24 dev other0", "other0"),
        ("ip route add 10.107.0.0/17 dev lo", "10.107.0.0/17 of lo"),
        ("http", "process"),
        ("socket", "process"),
        ("file", "not a socket"),
    ],
)
def test_what_is_taken_is_named_with_exit_code_73_and_nothing_is_changed(stage: Stage, taken: str, owner: str) -> None:
    path = f"{stage.directory}/ngrokd.sock"
    listen = {
        "http": "s = socket.create_server(('127.0.0.1', 8081))",
        "socket": f"s = socket.socket(socket.AF_UNIX); s.bind({path!r}); s.listen()",
        "file": f"s = open({path!r}, 'w')",
    }
    if taken in listen:
        program = f"import socket, time; {listen[taken]}; print('taken', flush=True); time.sleep(60)"
        stage.ns.start([sys.executable, "-c", program]).expect("taken")
    else:
        stage.ns.run(["sh", "-c", taken])
    before = stage.network()

    daemon = stage.start_unready()

    assert daemon.wait(timeout=5) == 73
    assert owner in daemon.stderr
    assert stage.network() == before
    assert not (stage.directory / "state" / "lock").exists()


# Ends at any moment


def test_killed_at_any_moment_it_leaves_nothing_to_the_run_after(stage: Stage) -> None:
    """Routes, names, sockets, temporary files: whatever the moment was, the next run takes it over."""
    dice = random.Random(7)
    network, hosts = stage.network(), stage.hosts()
    for _ in range(12):
        daemon = stage.start_unready()
        time.sleep(dice.uniform(0.1, 0.7))
        daemon.kill()
        daemon.wait(timeout=5)

    stage.start()
    assert stage.stop() == 0

    assert stage.network() == network
    assert stage.hosts() == hosts
    assert {path.name for path in stage.directory.rglob("*") if path.is_file()} == {
        *("config.toml", "lab-ca.pem"),
        *("operator_id", "tls.key", "tls.crt", "ip_mappings.json", "addresses.json", "endpoints.json", "subnet6"),
    }


def test_a_signal_at_any_moment_leaves_nothing(stage: Stage) -> None:
    """Also two and three of them. Before the daemon is anything, SIGTERM just ends the process."""
    dice = random.Random(8)
    network, hosts = stage.network(), stage.hosts()
    for _ in range(12):
        daemon = stage.start_unready()
        time.sleep(dice.uniform(0.1, 0.6))
        for _ in range(dice.choice([1, 1, 2, 3])):
            daemon.terminate()
        assert daemon.wait(timeout=5) in (0, -signal.SIGTERM)
        assert stage.network() == network
        assert stage.hosts() == hosts


# The service manager


def test_the_service_manager_is_told_how_it_goes(stage: Stage) -> None:
    """READY when device, routes and socket stand, STATUS with what is awaited and what is wrong, WATCHDOG in time."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{stage.directory}/notify")
        manager.settimeout(5)
        said: list[str] = []

        def hear(wanted: str) -> None:
            while not (said and re.search(wanted, said[-1])):
                said.append(manager.recv(4096).decode())

        config = configured(stage, without="key = ")
        environ = {"NOTIFY_SOCKET": f"{stage.directory}/notify", "WATCHDOG_USEC": "500000"}
        daemon = stage.start_unready(env=environ, config=config)
        hear("READY=1")
        assert stage.ns.run(["test", "-S", f"{stage.directory}/ngrokd.sock"]).returncode == 0
        assert routed(stage)
        hear("STATUS=waiting for an API key")
        hear("WATCHDOG=1")
        key = re.findall(r'^key = "(.*)"$', Path(stage.lab.config).read_text(), re.MULTILINE)[0]
        stage.ngrokd("set-api-key", "--stdin", input=key)
        hear("STATUS=serving 7 endpoints")
        stage.lab.do("outage on")
        hear("STATUS=serving 7 endpoints; .*refused")
        daemon.send_signal(signal.SIGHUP)
        hear("RELOADING=1\nMONOTONIC_USEC=")
        hear("READY=1")
        daemon.terminate()
        hear("STOPPING=1")
        assert daemon.wait(timeout=5) == 0
        assert said[0].startswith("READY=1")
