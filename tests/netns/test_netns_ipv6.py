"""Names over IPv6 on a real kernel: there when the way is open, absent when it is not."""

from __future__ import annotations

import functools
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from ipaddress import IPv6Address, IPv6Network
from pathlib import Path

import pytest

from tests.netns.stage import Stage
from tests.netns.support import Namespace

pytestmark = pytest.mark.netns

# From an address of this host, as soon as it is one: the daemon learns of it from the kernel.
CONNECT_FROM = """
import socket, sys
source, link, endpoint = sys.argv[1:]
scope = socket.if_nametoindex(link) if source.startswith("fe80") else 0
with socket.socket(socket.AF_INET6) as s:
    s.settimeout(3)
    s.bind((source, 0, 0, scope))
    try:
        s.connect((endpoint, 80))
    except OSError as error:
        print(error)
    else:
        print("ok")
"""
# The daemon itself asks name servers whether names exist publicly, in lower case.
ODDLY_WRITTEN = "HeLLo.DeMo"
HALF_CLOSE_CLIENT = """
import hashlib, socket, sys
data = bytes(range(256)) * 16384
wanted = hashlib.sha256(data).hexdigest().encode()
with socket.socket(socket.AF_INET6) as s:
    s.settimeout(10)
    s.connect((sys.argv[1], int(sys.argv[2])))
    s.sendall(data)
    s.shutdown(socket.SHUT_WR)
    answer = b""
    while part := s.recv(65536):
        answer += part
    assert wanted in answer and str(len(data)).encode() in answer, answer[:200]
print("ok")
"""


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Callable[[], Stage]]:
    made: list[Stage] = []

    def make() -> Stage:
        ns = netns()
        if ns.run(["sh", "-c", "cat /proc/sys/net/ipv6/conf/all/disable_ipv6 || echo 1"]).stdout.strip() != "0":
            pytest.skip("this kernel has no IPv6")
        made.append(Stage(ns, "--demo"))
        return made[-1]

    yield make
    for one in made:
        one.close()


def addresses(play: Stage, name: str = "hello.demo") -> list[str]:
    """What the hosts file says of a name, in its order."""
    return re.findall(rf"^(\S+)\t{re.escape(name)}$", play.hosts(), re.MULTILINE)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def connects(play: Stage, source: str, link: str, endpoint: str) -> bool:
    return bool(play.ns.python(CONNECT_FROM, source, link, endpoint).stdout == "ok\n")


def set_ipv6(play: Stage, where: str, disabled: int) -> None:
    play.ns.run(["sh", "-c", f"echo {disabled} >/proc/sys/net/ipv6/conf/{where}/disable_ipv6"])


def test_names_lead_to_us_over_both_versions(stage: Callable[[], Stage]) -> None:
    """Two lines for each name; no lookup, IPv6-only ones included, asks a name server; bytes are exact."""
    play = stage()
    name_server = play.ns.call(socket.socket, socket.AF_INET, socket.SOCK_DGRAM)
    name_server.bind(("127.0.0.1", 53))
    name_server.setblocking(False)
    play.ns.write_file("/etc/resolv.conf", "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n")
    play.start()

    four, six = addresses(play)
    assert four.startswith("10.107.")
    network = IPv6Network(play.status()["subnet6"])
    assert IPv6Address(six) in network
    assert network.subnet_of(IPv6Network("fd00::/8"))
    assert int(IPv6Address(six)) & 0xFFFFFFFF == int.from_bytes(map(int, four.split(".")))
    found: dict[str, set[str]] = {}
    for database in ("ahostsv6", "ahostsv4", "ahosts"):
        answer = play.ns.run(["getent", database, ODDLY_WRITTEN]).stdout
        found[database] = {line.split()[0] for line in answer.splitlines()}
    assert found == {"ahostsv6": {six}, "ahostsv4": {four}, "ahosts": {four, six}}
    greetings = {play.ns.run(["curl", "-sS", "-m", "10", f"-{n}", "http://hello.demo/"]).stdout for n in (4, 6)}
    assert all(greetings)
    word = play.ns.run(["curl", "-sS", "-m", "10", "-6", "http://hello.demo:81/"], check=False)
    assert word.returncode == 7
    assert play.ns.python(HALF_CLOSE_CLIENT, "answer.demo", "9000", timeout=60).stdout == "ok\n"
    with suppress(BlockingIOError):
        while question := name_server.recv(512):
            assert ODDLY_WRITTEN.partition(".")[0].encode() not in question, "a lookup left the machine"
    name_server.close()


def test_a_restart_keeps_the_addresses_and_an_end_leaves_none(stage: Callable[[], Stage]) -> None:
    play = stage()
    before, hosts = play.network(), play.hosts()
    play.start()
    wanted = addresses(play)
    assert play.stop() == 0
    assert play.network() == before
    assert play.hosts() == hosts

    daemon = play.start()
    assert addresses(play) == wanted
    daemon.kill()
    daemon.wait(timeout=5)
    gone = play.ns.run(["curl", "-sS", "-m", "5", "-6", "http://hello.demo/"], check=False)
    assert gone.returncode == 7, "the guard route must answer at once"
    play.start()
    assert addresses(play) == wanted
    assert play.stop() == 0
    assert play.network() == before
    assert play.hosts() == hosts


def test_a_machine_without_ipv6_loses_nothing_else(stage: Callable[[], Stage]) -> None:
    """Switched off before the start, for good or not: when it comes, the names have it too."""
    play = stage()
    before, hosts = play.network(), play.hosts()
    set_ipv6(play, "all", 1)
    daemon = play.start()

    assert len(addresses(play)) == 1
    assert play.status()["subnet6"] == ""
    assert play.status()["network"]["ipv6_problem"] == "net.ipv6.conf.all.disable_ipv6 is set"
    assert play.status()["state"] == "ready"
    assert daemon.stderr.count("IPv6") == 1
    assert play.ns.run(["curl", "-sS", "-m", "10", "http://hello.demo/"]).stdout

    set_ipv6(play, "all", 0)
    until(lambda: len(addresses(play)) == 2)
    assert play.ns.run(["curl", "-sS", "-m", "10", "-6", "http://hello.demo/"]).stdout
    assert "restored" not in daemon.stderr, "nobody has changed anything of ours"
    set_ipv6(play, "all", 1)
    until(lambda: len(addresses(play)) == 1)
    assert play.stop() == 0
    set_ipv6(play, "all", 0)
    assert play.network() == before
    assert play.hosts() == hosts


def test_lines_follow_the_way(stage: Callable[[], Stage]) -> None:
    """Somebody takes the route away: it is put back. Switches IPv6 off: the lines go, and come back with it."""
    play = stage()
    play.start()
    wanted = addresses(play)
    network = play.status()["subnet6"]

    for address, link in (("2001:db8::5", "lo"), ("fe80::5", "ngrokd0")):
        play.ns.run(["ip", "-6", "addr", "add", address, "dev", link, "nodad"])
        until(functools.partial(connects, play, address, link, wanted[1]))
    play.ns.run(["ip", "-6", "route", "del", network, "dev", "ngrokd0"])
    until(lambda: network in play.ns.run(["ip", "-6", "route", "show", "dev", "ngrokd0"]).stdout)
    set_ipv6(play, "ngrokd0", 1)
    until(lambda: len(addresses(play)) == 1)
    assert play.status()["state"] == "ready"
    assert play.ns.run(["curl", "-sS", "-m", "10", "http://hello.demo/"]).stdout
    set_ipv6(play, "ngrokd0", 0)
    until(lambda: addresses(play) == wanted)
    assert play.ns.run(["curl", "-sS", "-m", "10", "-6", "http://hello.demo/"]).stdout


def test_a_way_that_leads_elsewhere_is_not_named(stage: Callable[[], Stage]) -> None:
    """Address and route are as they should be, and still nobody would arrive: a rule, as VPNs make them, says so."""
    play = stage()
    play.start()
    wanted, network = addresses(play), play.status()["subnet6"]
    play.ns.run(["ip", "-6", "route", "add", "unreachable", network, "table", "99"])

    for what in ("unreachable", "blackhole", "prohibit", "lookup 99"):
        rule = ["to", network, "pref", "100", *what.split()]
        play.ns.run(["ip", "-6", "rule", "add", *rule])
        until(lambda: len(addresses(play)) == 1)
        play.ns.run(["ip", "-6", "rule", "del", *rule])
        until(lambda: addresses(play) == wanted)
    play.ns.run(["ip", "-6", "rule", "add", *rule])
    until(lambda: len(addresses(play)) == 1)
    assert play.status()["network"]["ipv6_problem"] == f"the kernel does not lead {network} to us"
    assert play.status()["state"] == "ready"
    assert play.ns.run(["curl", "-sS", "-m", "10", "http://hello.demo/"]).stdout


def test_it_can_be_configured_or_switched_off(stage: Callable[[], Stage]) -> None:
    """A link that is too small for IPv6 (RFC 8200 5) has none: the kernel takes it away without a word."""
    play = stage()
    text = Path(play.lab.config).read_text()
    for subnet6, wanted in (('"fd12:3456::/112"', "fd12:3456::2"), ('"off"', ""), ('"auto"\nmtu = 1279', "")):
        config = play.directory / "other.toml"
        config.write_text(f"{text}\n[net]\nsubnet6 = {subnet6}\n")
        play.start(config=str(config))
        found = [address for line in play.hosts().splitlines() if ":" in (address := line.partition("\t")[0])]
        assert (wanted in found) if wanted else not [address for address in found if address.startswith("fd")]
        assert play.stop() == 0
