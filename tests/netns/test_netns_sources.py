"""Whose packets are answered, on a real kernel: this host's, with the addresses it has now, and those allowed."""

from __future__ import annotations

import itertools
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ngrokd.ask import ask
from tests.netns.stage import Stage
from tests.netns.support import Namespace
from tun.wire import icmp
from tun.wire.ipv4 import build_ipv4
from tun.wire.tcp import ACK, SYN, build_tcp

NEW = "198.51.100.7"
SOON_S = 3.0


@pytest.fixture
def stage(netns: Callable[[], Namespace]) -> Iterator[Stage]:
    play = Stage(netns(), "--demo", "--set", 'api.poll_interval="10m"', "--set", "net.allow_sources=[]")
    play.start()
    yield play
    play.close()


def counter(play: Stage, name: str) -> int:
    return int(ask(f"{play.directory}/ngrokd.sock", "status").data["counters"].get(name, 0))


def address_of(play: Stage, name: str) -> str:
    address: str = play.ns.run(["getent", "ahostsv4", name]).stdout.split()[0]
    return address


def inject(play: Stage, *packets: bytes) -> None:
    """Put packets onto the link, as they would come from a wire, and wait until all were read."""
    before = counter(play, "stack.packets")
    with play.ns.call(socket.socket, socket.AF_PACKET, socket.SOCK_DGRAM, 0) as link:
        for packet in packets:
            link.sendto(packet, ("ngrokd0", 0x0800))
    until(lambda: counter(play, "stack.packets") >= before + len(packets))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SOON_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def connects(ns: Namespace, address: str, *options: str) -> bool:
    command = ["curl", "-sS", "--max-time", "2", *options, f"http://{address}/"]
    return ns.run(command, check=False).stdout == "Hello from the lab.\n"


def test_a_new_address_of_this_host_may_connect_at_once_and_an_old_one_no_more(stage: Stage) -> None:
    """VPNs, DHCP and containers come and go; nobody should have to restart the daemon for them."""
    endpoint = address_of(stage, "hello.demo")
    ports = itertools.count(4000)  # a connection that has begun goes on

    def refused() -> bool:
        opened, dropped = counter(stage, "stack.opened"), counter(stage, "drops.source")
        source, port = socket.inet_aton(NEW), next(ports)
        inject(stage, bytes(build_tcp(source, socket.inet_aton(endpoint), port, 80, seq=1, flags=SYN, window=9)))
        return (counter(stage, "stack.opened"), counter(stage, "drops.source")) == (opened, dropped + 1)

    for _ in range(2):
        assert refused()
        opened = counter(stage, "stack.opened")
        stage.ns.run(["ip", "addr", "add", f"{NEW}/32", "dev", "lo"])
        until(lambda: connects(stage.ns, endpoint, "--interface", NEW))
        assert counter(stage, "stack.opened") > opened

        stage.ns.run(["ip", "addr", "del", f"{NEW}/32", "dev", "lo"])
        until(refused)
    assert connects(stage.ns, endpoint)


def test_a_neighbour_cannot_use_this_host_as_a_gateway_until_it_is_allowed(
    stage: Stage, netns: Callable[[], Namespace]
) -> None:
    """Forwarding is on, as where containers run; a SIGHUP lets the neighbour's network in, and out again."""
    ns, lan = stage.ns, netns()
    ns.run(["ip", "link", "add", "lan", "type", "veth", "peer", "name", "host", "netns", str(lan.pid)])
    ns.run(["ip", "addr", "add", "192.0.2.1/24", "dev", "lan"])
    ns.run(["ip", "link", "set", "lan", "up"])
    ns.run(["sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward"])
    lan.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "host"])
    lan.run(["ip", "link", "set", "host", "up"])
    lan.run(["ip", "route", "add", "10.107.0.0/16", "via", "192.0.2.1"])
    endpoint = address_of(stage, "hello.demo")
    opened, dropped = counter(stage, "stack.opened"), counter(stage, "drops.source")

    assert not connects(lan, endpoint)
    assert counter(stage, "stack.opened") == opened
    assert counter(stage, "drops.source") > dropped

    config = Path(stage.lab.config)
    closed = config.read_text()
    config.write_text(re.sub(r"^allow_sources = .*$", 'allow_sources = ["192.0.2.0/24"]', closed, flags=re.MULTILINE))
    assert config.read_text() != closed
    assert stage.daemon is not None
    stage.daemon.send_signal(signal.SIGHUP)
    until(lambda: connects(lan, endpoint))

    config.write_text(closed)
    stage.daemon.send_signal(signal.SIGHUP)
    until(lambda: not connects(lan, endpoint))


def test_whoever_lies_about_his_address_is_dropped_and_counted(stage: Stage) -> None:
    """Another host's, an endpoint's own, a free one of our subnet, loopback, a group's, all hosts', none: no answer."""
    endpoint = socket.inet_aton(address_of(stage, "hello.demo"))
    lies = [
        "192.0.2.9",
        socket.inet_ntoa(endpoint),
        "10.107.77.7",
        "127.0.0.1",
        "224.0.0.1",
        "255.255.255.255",
        "0.0.0.0",
    ]
    packets = []
    for lie in lies:
        source = socket.inet_aton(lie)
        packets.append(bytes(build_tcp(source, endpoint, 4000, 80, seq=1, flags=SYN, window=9)))
        packets.append(bytes(build_tcp(source, endpoint, 4000, 81, seq=1, ack=1, flags=ACK, window=9)))
        packets.append(bytes(build_ipv4(source, endpoint, 1, 8) + b"\x08\0\xf7\xff\0\0\0\0"))
        packets.append(bytes(build_ipv4(source, endpoint, 17, 8) + bytes((0, 7, 0, 7, 0, 8, 0, 0))))
    before = {name: counter(stage, name) for name in ("drops.source", "stack.opened", "stack.replies_sent")}

    inject(stage, *packets)

    assert counter(stage, "drops.source") == before["drops.source"] + len(packets)
    assert counter(stage, "stack.opened") == before["stack.opened"]
    assert counter(stage, "stack.replies_sent") == before["stack.replies_sent"]
    assert icmp.verify_icmp(packets[2], 20, 28)
    assert connects(stage.ns, socket.inet_ntoa(endpoint))
