"""The plan on the real kernel: done, undone, restored, and never in anybody's way."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import IPv4Network, IPv6Network, ip_address
from pathlib import Path

import pytest
import trio

from ngrokd.errors import TakenError
from ngrokd.host import linux
from ngrokd.host.hostsfile import HostsFileError, edit_hosts
from ngrokd.host.plan import DEVICE, GUARD_METRIC, HOSTS, Action, HostError, Plan, Step, linux_plan
from tests.netns.support import Namespace, Running

NetNS = Callable[[], Namespace]

SUBNET = IPv4Network("10.107.0.0/16")
PLAN = linux_plan("ngrokd0", SUBNET, 1500)
KERNEL = PLAN.without(DEVICE, HOSTS)
GUARD = f"unreachable 10.107.0.0/16 proto static metric {GUARD_METRIC}"

TUN, NO_PI, MULTI_QUEUE, PERSIST = 0x1, 0x1000, 0x100, 0x400454CB

# A daemon in miniature: opens the TUN, applies the plan, says so, and waits to be killed or told to undo.
DAEMON = """
import sys
from ipaddress import IPv4Network
from ngrokd.host import linux
from ngrokd.host.plan import Action, linux_plan
from tests.netns.test_netns_host import open_tun
plan = linux_plan(sys.argv[1], IPv4Network(sys.argv[2]), 1500, hosts_path="")
linux.check_free(plan)
fds = []
device = Action(lambda step: fds.append(open_tun(step.text("interface"))) is None, lambda step: True)
linux.apply(plan, {"device": device})
print("[ready]", flush=True)
sys.stdin.read(1)
print(len(linux.undo(plan, {"device": device}).problems), flush=True)
"""


def open_tun(name: str, *, tap: bool = False, persist: bool = False) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    flags = (0x2 if tap else TUN) | NO_PI | MULTI_QUEUE
    fcntl.ioctl(fd, 0x400454CA, struct.pack("16sH22x", name.encode(), flags))
    if persist:
        fcntl.ioctl(fd, PERSIST, 1)
    return fd


class Device:
    """The daemon's own step, as the plan knows it."""

    def __init__(self) -> None:
        self.fd = -1

    def action(self) -> Action:
        return Action(self._do, self._undo)

    def _do(self, step: Step) -> bool:
        if os.path.exists(f"/sys/class/net/{step.text('interface')}"):
            return False
        self.close()
        self.fd = open_tun(step.text("interface"))
        return True

    def _undo(self, step: Step) -> bool:
        self.close()
        return True

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


NOTHING = Action(lambda _step: False, lambda _step: False)


@contextmanager
def applied(ns: Namespace, plan: Plan = PLAN) -> Iterator[dict[str, Action]]:
    device = Device()
    actions = {DEVICE: device.action(), HOSTS: NOTHING}
    ns.call(linux.apply, plan, actions)
    try:
        yield actions
    finally:
        device.close()


def picture(ns: Namespace) -> str:
    commands = ["-d link", "addr", "route show table all", "-6 route show table all", "rule"]
    text = "\n".join(ns.run(["ip", *command.split()]).stdout for command in commands)
    return re.sub(r"timer +[0-9.]+", "timer", text)  # a bridge's clocks run on


def start_daemon(ns: Namespace, interface: str = "ngrokd0", subnet: str = str(SUBNET)) -> Running:
    daemon = ns.start([sys.executable, "-c", DAEMON, interface, subnet])
    daemon.expect(r"^\[ready\]")
    return daemon


# --- doing and undoing ---


def test_a_plan_undone_leaves_no_trace(netns: NetNS) -> None:
    """Links, addresses, routes of every table and rules are, to the letter, as they were."""
    ns = netns()
    before = picture(ns)

    with applied(ns) as actions:
        assert picture(ns) != before
        undone = ns.call(linux.undo, PLAN, actions)

    assert [step.kind for step in undone.removed] == ["route", "address", "device", "guard"]
    assert undone.problems == ()
    assert picture(ns) == before


def test_the_plan_makes_what_its_shell_form_says(netns: NetNS) -> None:
    """What `ngrokd plan` prints is what happens: the same picture, typed by hand in another namespace."""
    one, other = netns(), netns()
    plan = linux_plan("ngrokd0", SUBNET, 1400, subnet6=IPv6Network("fd00:107::/64"), hosts_path="")

    with applied(one, plan), other.call(_held, other, plan):
        ours, theirs = (_comparable(ns) for ns in (one, other))
        assert "mtu 1400" in ours
        assert "addrgenmode none" in ours
        assert ours == theirs


@contextmanager
def _held(ns: Namespace, plan: Plan) -> Iterator[None]:
    fd = -1
    try:
        for line in plan.shell().splitlines():
            if line.startswith("ip tuntap"):
                fd = ns.call(open_tun, "ngrokd0")
            elif not line.startswith("#"):
                ns.run(["sh", "-c", line])
        yield
    finally:
        os.close(fd)


def _comparable(ns: Namespace) -> str:
    # `ip` says "proto boot" for what is typed, we say "static": what it is, and what network managers leave alone.
    text = picture(ns).replace(" proto static", "").replace(" proto boot", "")
    return "\n".join(line for line in text.splitlines() if "mtu" not in line or "ngrokd0" in line)


def test_the_link_carries_one_address_and_the_subnet_leads_into_it(netns: NetNS) -> None:
    """An endpoint's address on the link would be delivered locally and never reach the TUN."""
    ns = netns()

    with applied(ns):
        link = ns.run(["ip", "-d", "link", "show", "ngrokd0"]).stdout
        assert "UP" in link
        assert "mtu 1500" in link
        assert "qlen 5000" in link
        assert "addrgenmode none" in link
        assert ns.run(["ip", "-o", "addr", "show", "dev", "ngrokd0"]).stdout.count("inet") == 1
        for address in ("10.107.0.0", "10.107.0.2", "10.107.255.255"):
            assert f"{address} dev ngrokd0 src 10.107.0.1" in ns.run(["ip", "route", "get", address]).stdout


def test_no_packet_comes_before_an_app_sends_one(netns: NetNS) -> None:
    """A new link's first packet would be an IPv6 router solicitation."""
    ns = netns()
    device = Device()
    ns.call(linux.apply, PLAN, {DEVICE: device.action(), HOSTS: NOTHING})

    os.set_blocking(device.fd, False)
    time.sleep(0.3)  # the kernel's, and without it the test would prove nothing

    with pytest.raises(BlockingIOError):
        os.read(device.fd, 2000)
    device.close()


def test_what_is_done_is_not_done_twice(netns: NetNS) -> None:
    """Applied again, nothing changes; undone again, nothing is missing."""
    ns = netns()

    with applied(ns) as actions:
        assert ns.call(linux.apply, PLAN, actions) == []
        assert ns.call(linux.ensure, PLAN, actions) == []
        assert len(ns.call(linux.undo, PLAN, actions).removed) == 4
        assert [step.kind for step in ns.call(linux.undo, PLAN, actions).removed] == ["device"]


def test_a_step_that_fails_takes_back_those_before_it(netns: NetNS) -> None:
    """A start that fails leaves the machine as it was."""
    ns = netns()
    before = picture(ns)
    device = Device()

    def refuse(step: Step) -> bool:
        raise HostsFileError("cannot")

    actions = {DEVICE: device.action(), HOSTS: Action(refuse, refuse)}
    with pytest.raises(HostsFileError):
        ns.call(linux.apply, PLAN, actions)

    assert device.fd == -1
    assert picture(ns) == before


def test_a_guard_that_was_there_survives_a_start_that_fails(netns: NetNS) -> None:
    """A killed run's names still need it."""
    ns = netns()
    ns.run(["ip", "route", "add", *GUARD.split()])
    before = picture(ns)

    with pytest.raises(HostError, match="ngrokd0 is gone"):
        ns.call(linux.apply, PLAN, {DEVICE: NOTHING, HOSTS: NOTHING})

    assert picture(ns) == before


def test_what_the_kernel_refuses_is_explained(netns: NetNS) -> None:
    """In the words of the kernel, with the step."""
    ns = netns()
    fd = ns.call(open_tun, "ngrokd0")

    with pytest.raises(HostError, match=r"link interface=ngrokd0 mtu=70000.*maximum"):
        ns.call(linux.apply, linux_plan("ngrokd0", SUBNET, 70000), {DEVICE: NOTHING, HOSTS: NOTHING})
    os.close(fd)


def test_foreign_routes_are_never_deleted(netns: NetNS) -> None:
    """Undoing names our route exactly, whatever else leads to the subnet."""
    ns = netns()
    ns.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"])
    ns.run(["ip", "link", "set", "v0", "up"])
    ns.run(["ip", "link", "set", "v1", "up"])
    ns.run(["ip", "route", "add", "unreachable", "10.107.0.0/16", "metric", "77"])
    with applied(ns, KERNEL.only("guard")):
        pass
    ns.run(["ip", "route", "add", "10.107.0.0/16", "dev", "v0"])
    before = ns.run(["ip", "route"]).stdout.replace(GUARD, "").split()

    undone = ns.call(linux.undo, PLAN)

    assert [step.kind for step in undone.removed] == ["guard"]
    assert ns.run(["ip", "route"]).stdout.split() == before


def test_ipv6_is_done_and_undone_likewise(netns: NetNS) -> None:
    """The same steps for the other family."""
    ns = netns()
    before = picture(ns)
    plan = linux_plan("ngrokd0", SUBNET, 1500, subnet6=IPv6Network("fd00:107::/64"))

    with applied(ns, plan) as actions:
        assert "dev ngrokd0" in ns.run(["ip", "-6", "route", "get", "fd00:107::2"]).stdout
        assert ns.call(linux.ensure, plan, actions) == []
        undone = ns.call(linux.undo, plan, actions)

    assert len(undone.removed) == 7
    assert picture(ns) == before


# --- the guard ---


def test_after_a_kill_connections_fail_at_once_and_the_next_start_adopts_what_is_left(netns: NetNS) -> None:
    """The names may still be in the hosts file; with a default route their traffic would leave the machine."""
    ns, outside = netns(), netns()
    ns.run(["ip", "link", "add", "up0", "type", "veth", "peer", "name", "up1", "netns", str(outside.pid)])
    ns.run(["ip", "addr", "add", "192.0.2.2/24", "dev", "up0"])
    ns.run(["ip", "link", "set", "up0", "up"])
    outside.run(["ip", "link", "set", "up1", "up"])
    ns.run(["ip", "route", "add", "default", "via", "192.0.2.1"])
    daemon = start_daemon(ns)
    assert "dev ngrokd0" in ns.run(["ip", "route", "get", "10.107.0.5"]).stdout

    daemon.kill()
    daemon.wait()

    began = time.monotonic()
    with pytest.raises(OSError, match="No route to host"):
        ns.call(socket.create_connection, ("10.107.0.5", 80), 5)
    assert time.monotonic() - began < 1
    assert GUARD in ns.run(["ip", "route"]).stdout
    again = start_daemon(ns)
    assert ns.run(["ip", "route"]).stdout.count(GUARD) == 1

    again.write("x")
    assert again.wait() == 0
    assert again.stdout.split()[-1] == "0"
    assert "10.107" not in ns.run(["ip", "route"]).stdout


def test_cleanup_in_another_process_removes_what_a_killed_run_left(netns: NetNS) -> None:
    """The guard is all that outlives a process."""
    ns = netns()
    before = picture(ns)
    daemon = start_daemon(ns)
    daemon.kill()
    daemon.wait()

    undone = ns.call(linux.cleanup, PLAN)

    assert [step.kind for step in undone.removed] == ["guard"]
    assert picture(ns) == before
    assert ns.call(linux.cleanup, PLAN).removed == ()


# --- is it free? ---


@pytest.mark.parametrize(
    ("commands", "claim"),
    [
        (["ip route add 10.107.0.0/16 dev br0"], "route 10.107.0.0/16 of br0 (a bridge)"),
        (["ip route add 10.107.128.0/17 dev br0 metric 50"], "route 10.107.128.0/17 of br0"),
        (["ip addr add 10.107.3.1/24 dev br0"], "address 10.107.3.1/24 of br0"),
        (["ip addr add 10.107.3.1/8 dev br0"], "address 10.107.3.1/8 of br0"),
        (["ip route add unreachable 10.107.9.0/24"], "unreachable route 10.107.9.0/24"),
        (["ip route add 192.0.2.0/24 via 10.107.0.9 dev br0 onlink"], "gateway 10.107.0.9"),
        (["ip route add 192.0.2.0/24 nexthop via 10.107.0.9 dev br0 onlink"], "gateway 10.107.0.9"),
        (
            ["ip route add 10.0.0.0/8 dev br0 table 52", "ip rule add pref 5270 lookup 52"],
            "route 10.0.0.0/8 in table 52, which is asked first of br0",
        ),
        (
            ["ip route add default dev br0 table 51820", "ip rule add not fwmark 51820 lookup 51820 pref 100"],
            "route 0.0.0.0/0 in table 51820",
        ),
        (["ip rule add pref 100 to 10.107.0.0/24 prohibit"], "rule 100 (prohibit 10.107.0.0/24)"),
        (["ip route add unreachable 10.107.4.0/24 metric 4278198272"], "unreachable route 10.107.4.0/24"),
    ],
)
def test_a_conflict_is_named_before_anything_changes(netns: NetNS, commands: list[str], claim: str) -> None:
    """Whose it is, by interface and kind, and which subnet would be free."""
    ns = netns()
    ns.run(["ip", "link", "add", "br0", "type", "bridge"])
    ns.run(["ip", "link", "set", "br0", "up"])
    for command in commands:
        ns.run(command.split())
    before = picture(ns)

    with pytest.raises(TakenError) as caught:
        ns.call(linux.check_free, PLAN)

    assert "10.107.0.0/16 is taken" in str(caught.value)
    assert claim in str(caught.value)
    assert re.search("for example|metric 4278198272|ip rule del pref 100", caught.value.remedy)
    assert picture(ns) == before


@pytest.mark.parametrize(
    "commands",
    [
        ["ip addr add 10.1.2.3/8 dev br0", "ip route add default via 10.0.0.1"],
        ["ip route add 0.0.0.0/1 dev br0", "ip route add 128.0.0.0/1 dev br0"],
        ["ip route add 10.108.0.0/16 dev br0", "ip route add 10.106.0.0/16 dev br0"],
        ["ip route add 10.107.0.0/16 dev br0 table 99"],
        ["ip route add 10.107.0.0/16 dev br0 table 99", "ip rule add fwmark 7 lookup 99 pref 100"],
        [
            "ip rule add pref 32764 lookup main suppress_prefixlength 0",
            "ip rule add not fwmark 51820 lookup 51820 pref 32765",
            "ip route add default dev br0 table 51820",
        ],
        ["ip route add throw 10.107.0.0/16 table 52", "ip rule add pref 100 lookup 52"],
        ["ip route add unreachable 10.107.0.0/16 metric 4278198272"],
    ],
)
def test_what_does_not_touch_the_subnet_is_no_conflict(netns: NetNS, commands: list[str]) -> None:
    """Default routes, neighbours, tables that are not asked, WireGuard's usual rules, and our own guard."""
    ns = netns()
    ns.run(["ip", "link", "add", "br0", "type", "bridge"])
    ns.run(["ip", "link", "set", "br0", "up"])
    for command in commands:
        ns.run(command.split())

    ns.call(linux.check_free, PLAN)

    with applied(ns):
        assert "dev ngrokd0" in ns.run(["ip", "route", "get", "10.107.0.9"]).stdout


def test_a_wider_route_is_told_as_a_shadow(netns: NetNS) -> None:
    """A company's 10.0.0.0/8 loses our part of it; worth a word, no reason to refuse."""
    ns = netns()
    ns.run(["ip", "link", "add", "br0", "type", "bridge"])
    ns.run(["ip", "link", "set", "br0", "up"])
    ns.run(["ip", "route", "add", "10.0.0.0/8", "dev", "br0"])

    judgement = ns.call(linux.check_free, PLAN)

    assert [str(shadow) for shadow in judgement.shadows] == ["route 10.0.0.0/8 of br0 (a bridge)"]


def test_a_living_daemon_is_named(netns: NetNS) -> None:
    """Same interface: its process. Same subnet on another interface: the same. Another subnet: side by side."""
    ns = netns()
    daemon = start_daemon(ns)

    with pytest.raises(TakenError, match=rf"interface ngrokd0 is held by process {daemon.pid} \(python"):
        ns.call(linux.check_free, PLAN)
    with pytest.raises(TakenError, match=rf"route 10\.107\.0\.0/16 of ngrokd0 .*held by process {daemon.pid}"):
        ns.call(linux.check_free, linux_plan("ngrokd1", SUBNET, 1500))
    other = start_daemon(ns, "ngrokd1", "10.108.0.0/16")

    daemon.write("x")
    other.write("x")
    assert daemon.wait() == other.wait() == 0


def test_an_interface_that_is_no_tun_is_left_alone(netns: NetNS) -> None:
    """Whoever called a bridge ngrokd0 keeps it."""
    ns = netns()
    ns.run(["ip", "link", "add", "ngrokd0", "type", "bridge"])
    ns.run(["ip", "link", "add", "ngrokd1", "type", "veth"])
    tap = ns.call(open_tun, "ngrokd2", tap=True)

    for name, word in {"ngrokd0": "bridge", "ngrokd1": "veth", "ngrokd2": "TAP"}.items():
        with pytest.raises(TakenError, match=rf"{name} exists and is no TUN device \({word}\)"):
            ns.call(linux.check_interface, name)
    os.close(tap)


def test_a_free_persistent_tun_of_our_name_is_used(netns: NetNS) -> None:
    """An administrator may have made it for a daemon without rights."""
    ns = netns()
    os.close(ns.call(open_tun, "ngrokd0", persist=True))

    ns.call(linux.check_interface, "ngrokd0")
    ns.call(linux.check_interface, "none0")


def test_a_holder_out_of_sight_is_still_a_holder(netns: NetNS) -> None:
    """In another pid namespace it has no name, but it has the device. (Our own process is not listed either.)"""
    ns = netns()
    fd = ns.call(open_tun, "ngrokd0")

    with pytest.raises(TakenError, match="cannot be seen"):
        ns.call(linux.check_interface, "ngrokd0")
    os.close(fd)


# --- restoring ---


@pytest.mark.parametrize(
    ("damage", "restored"),
    [
        ("ip link set ngrokd0 down", ["link", "route"]),
        ("ip link set ngrokd0 mtu 1280", ["link"]),
        ("ip link set ngrokd0 txqueuelen 100", ["link"]),
        ("ip link set ngrokd0 addrgenmode eui64", ["link"]),
        ("ip route del 10.107.0.0/16 dev ngrokd0", ["route"]),
        (f"ip route del unreachable 10.107.0.0/16 metric {GUARD_METRIC}", ["guard"]),
        ("ip addr del 10.107.0.1/32 dev ngrokd0", ["address", "route"]),  # the last address takes the routes with it
        ("ip addr flush dev ngrokd0", ["address", "route"]),
        ("ip link del ngrokd0", ["device", "link", "address", "route"]),
    ],
)
def test_what_an_administrator_changed_is_put_back(netns: NetNS, damage: str, restored: list[str]) -> None:
    """Only that; and the machine is as it was before."""
    ns = netns()

    with applied(ns) as actions:
        before = ns.run(["ip", "route"]).stdout, ns.run(["ip", "addr", "show", "dev", "ngrokd0"]).stdout[3:]
        ns.run(damage.split())

        assert [step.kind for step in ns.call(linux.ensure, PLAN, actions)] == restored
        assert ns.call(linux.ensure, PLAN, actions) == []
        assert (ns.run(["ip", "route"]).stdout, ns.run(["ip", "addr", "show", "dev", "ngrokd0"]).stdout[3:]) == before


def test_a_link_that_is_gone_is_reported_where_nobody_can_make_it(netns: NetNS) -> None:
    """The data plane has to open the device again."""
    ns = netns()

    with applied(ns):
        ns.run(["ip", "link", "del", "ngrokd0"])
        with pytest.raises(HostError, match="ngrokd0 is gone"):
            ns.call(linux.ensure, PLAN)


def test_a_route_somebody_put_in_place_of_ours_is_named(netns: NetNS) -> None:
    """It is not ours to delete."""
    ns = netns()

    with applied(ns):
        ns.run(["ip", "link", "add", "br0", "type", "bridge"])
        ns.run(["ip", "link", "set", "br0", "up"])
        ns.run(["ip", "route", "replace", "10.107.0.0/16", "dev", "br0"])
        with pytest.raises(TakenError, match=r"route 10\.107\.0\.0/16 of br0"):
            ns.call(linux.ensure, PLAN)


# --- addresses and the watch ---


def test_the_machines_addresses_are_those_of_every_link(netns: NetNS) -> None:
    """Both families; of a point-to-point link our end, not the peer's."""
    ns = netns()
    ns.run(["ip", "link", "add", "v0", "type", "veth", "peer", "name", "v1"])
    ns.run(["ip", "addr", "add", "192.0.2.1", "peer", "192.0.2.2/32", "dev", "v0"])
    ns.run(["ip", "addr", "add", "2001:db8::1/64", "dev", "v1"])

    found = ns.call(linux.host_addresses)

    expected = ["127.0.0.1", "::1", "192.0.2.1", "2001:db8::1"]
    assert found == {ip_address(text).packed for text in expected}


def netlink_ports() -> list[int]:
    lines = Path("/proc/thread-self/net/netlink").read_text().splitlines()[1:]
    return [port for port in (int(line.split()[2]) for line in lines) if port]


class Watched:
    """What the watch told, and a way to wait for it."""

    def __init__(self) -> None:
        self.addresses: frozenset[bytes] = frozenset()
        self.ours = 0
        self.foreign = 0
        self._changed = trio.Event()

    def _note(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def on_addresses(self, addresses: frozenset[bytes]) -> None:
        self.addresses = addresses
        self._note()

    def on_ours(self) -> None:
        self.ours += 1
        self._note()

    def on_foreign(self) -> None:
        self.foreign += 1
        self._note()

    async def until(self, fact: Callable[[], bool]) -> None:
        with trio.fail_after(5):
            while not fact():
                await self._changed.wait()


def watching(ns: Namespace, body: Callable[[Watched], object]) -> None:
    """Run `body`, an async function, beside a watch inside the namespace."""

    async def main() -> None:
        watched = Watched()
        async with trio.open_nursery() as nursery:

            async def start(*, task_status: trio.TaskStatus[None]) -> None:
                await linux.watch(
                    PLAN,
                    on_addresses=watched.on_addresses,
                    on_ours=watched.on_ours,
                    on_foreign=watched.on_foreign,
                    task_status=task_status,
                )

            await nursery.start(start)
            await body(watched)  # type: ignore[misc]  # an async function
            nursery.cancel_scope.cancel()

    # Nothing in here uses a worker thread, which the process would share with what runs outside.
    ns.call(lambda: trio.run(main))


def shell(command: str, text: bytes = b"") -> None:
    """A few milliseconds in which nothing else happens, also not in the event loop."""
    subprocess.run(command.split(), check=True, capture_output=True, input=text)


def test_the_watch_knows_the_addresses_at_once_and_follows_them(netns: NetNS) -> None:
    """Packets from addresses that are not ours are dropped, so the set must be right."""
    ns = netns()

    async def body(watched: Watched) -> None:
        new, new6 = ip_address("192.0.2.7").packed, ip_address("2001:db8::7").packed
        assert ip_address("127.0.0.1").packed in watched.addresses
        shell("ip addr add 192.0.2.7/24 dev lo")
        await watched.until(lambda: new in watched.addresses)
        shell("ip addr add 2001:db8::7/64 dev lo")
        await watched.until(lambda: new6 in watched.addresses)
        shell("ip addr flush dev lo")
        await watched.until(lambda: new not in watched.addresses)

    watching(ns, body)


@pytest.mark.parametrize(
    "damage",
    [
        "ip link set ngrokd0 down",
        "ip link set ngrokd0 mtu 1280",
        "ip route del 10.107.0.0/16 dev ngrokd0",
        f"ip route del unreachable 10.107.0.0/16 metric {GUARD_METRIC}",
        "ip addr del 10.107.0.1/32 dev ngrokd0",
        "ip link del ngrokd0",
    ],
)
def test_the_watch_sees_what_is_done_to_us(netns: NetNS, damage: str) -> None:
    """A link set down gives no event on the TUN itself, and its route does not come back with it."""
    ns = netns()

    async def body(watched: Watched) -> None:
        before = watched.ours
        assert before == 1  # once at the start: what happened before nobody saw
        shell(damage)
        await watched.until(lambda: watched.ours > before)

    with applied(ns):
        watching(ns, body)


def test_the_watch_tells_of_claims_on_our_subnet_and_keeps_quiet_otherwise(netns: NetNS) -> None:
    """Docker may come up long after us; routes elsewhere are not our affair."""
    ns = netns()
    ns.run(["ip", "link", "add", "br0", "type", "bridge"])
    ns.run(["ip", "link", "set", "br0", "up"])

    async def body(watched: Watched) -> None:
        for command in ("ip route add 10.0.0.0/8 dev br0", "ip route add 192.0.2.0/24 dev br0"):
            shell(command)
        shell("ip addr add 10.107.200.1/24 dev br0")
        await watched.until(lambda: watched.foreign > 0)
        assert watched.ours == 1
        assert linux.find_conflicts(SUBNET, "ngrokd0").conflicts

    with applied(ns):
        watching(ns, body)


def test_a_daemon_that_restores_comes_to_rest(netns: NetNS) -> None:
    """Its own repairs are events too; they must not keep it busy for ever."""
    ns = netns()

    async def body(watched: Watched) -> None:
        shell("ip link set ngrokd0 down")
        await watched.until(lambda: watched.ours > 1)
        assert linux.ensure(PLAN.without(DEVICE, HOSTS))
        await trio.sleep(0.3)  # the events of the repair
        seen = watched.ours
        assert linux.ensure(PLAN.without(DEVICE, HOSTS)) == []
        await trio.sleep(0.3)
        assert watched.ours == seen

    with applied(ns):
        watching(ns, body)


def test_lost_events_lead_to_a_fresh_look(netns: NetNS, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel drops events when they come too fast (ENOBUFS); what they said must not be lost with them."""
    monkeypatch.setattr(linux, "_RECEIVE_BUFFER", 1)  # the kernel's minimum, a few messages
    ns = netns()

    async def body(watched: Watched) -> None:
        lines = "".join(f"addr add 192.0.2.{n}/32 dev lo\n" for n in range(1, 200))
        shell("ip -batch -", lines.encode())
        await watched.until(lambda: sum(a.startswith(bytes([192, 0, 2])) for a in watched.addresses) == 199)
        assert watched.ours > 1

    watching(ns, body)


def test_a_local_process_cannot_forge_events(netns: NetNS) -> None:
    """Any user can send datagrams to a netlink port; only those of the kernel count."""
    ns = netns()

    async def body(watched: Watched) -> None:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as forger:
            header = struct.pack("=BBBBI", 2, 32, 0, 0, 1) + struct.pack("=HH4s", 8, 2, bytes([192, 0, 2, 99]))
            message = struct.pack("=IHHII", 16 + len(header), 20, 0, 0, 0) + header
            for port in netlink_ports():
                with suppress(OSError):
                    forger.sendto(message, (port, 0))
        shell("ip addr add 192.0.2.7/32 dev lo")
        await watched.until(lambda: ip_address("192.0.2.7").packed in watched.addresses)
        assert ip_address("192.0.2.99").packed not in watched.addresses

    watching(ns, body)


# --- rights ---


RIGHTS = """
from ngrokd.host.linux import missing_rights
print([right.what for right in missing_rights()])
"""


def test_root_in_a_namespace_of_its_own_has_every_right(netns: NetNS) -> None:
    """As the other tests here show."""
    assert netns().call(linux.missing_rights) == []


@pytest.mark.parametrize(
    ("drop", "missing"),
    [
        (["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"], "['CAP_NET_ADMIN']"),
        (["setpriv", "--reuid=65534", "--clear-groups"], "['CAP_NET_ADMIN', '/dev/net/tun']"),
        (
            ["setpriv", "--reuid=65534", "--clear-groups", "--inh-caps=+net_admin", "--ambient-caps=+net_admin"],
            "['/dev/net/tun']",
        ),
    ],
)
def test_what_is_missing_is_the_right_and_not_the_user_id(netns: NetNS, drop: list[str], missing: str) -> None:
    """Root without the capability lacks it; nobody with the capability has it."""
    ns = netns()
    ns.run(["sh", "-c", "chmod 600 /dev/net/tun || true"])

    assert ns.run([*drop, sys.executable, "-c", RIGHTS]).stdout.strip() == missing


def test_a_capability_for_another_network_does_not_count(netns: NetNS) -> None:
    """Root of a user namespace has every capability, but not over the network it was started in."""
    ns = netns()

    result = ns.run(["unshare", "--user", "--map-root-user", sys.executable, "-c", RIGHTS], check=False)

    if result.returncode:
        pytest.skip(result.stderr)
    assert "CAP_NET_ADMIN" in result.stdout


def test_a_refusal_names_the_right(netns: NetNS) -> None:
    """Where it was not asked for beforehand, the kernel's EPERM becomes the same error."""
    ns = netns()
    source = (
        "from ngrokd.host import linux\nfrom tests.netns.test_netns_host import PLAN\n"
        "from ngrokd.errors import PermissionMissingError\n"
        "try:\n    linux.apply(PLAN.only('guard'))\n"
        "except PermissionMissingError as error:\n    print(error, error.remedy)\n"
    )

    result = ns.run(["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", sys.executable, "-c", source])

    assert "guard subnet=10.107.0.0/16" in result.stdout
    assert "CAP_NET_ADMIN" in result.stdout


# --- the hosts file, where it cannot be replaced ---


def _section(text: bytes) -> bytes:
    return text if b"10.107.0.2" in text else text + b"10.107.0.2\tapi.prod\n"


def test_a_bind_mounted_hosts_file_is_written_in_place(netns: NetNS) -> None:
    """As Docker and Kubernetes mount it: renaming over a mount point is EBUSY."""
    ns = netns()
    ns.run(["sh", "-c", "cp /etc/hosts /run/hosts && mount --bind /run/hosts /etc/hosts"])
    before = ns.read_file("/etc/hosts")

    assert ns.call(edit_hosts, "/etc/hosts", _section)
    assert ns.read_file("/run/hosts") == before + "10.107.0.2\tapi.prod\n"
    assert "10.107.0.2" in ns.run(["getent", "hosts", "api.prod"]).stdout
    assert ns.run(["sh", "-c", "ls -A /etc | grep ngrokd || true"]).stdout == ""


def test_a_writable_file_in_a_read_only_directory_is_written_in_place(netns: NetNS) -> None:
    """As systemd's ProtectSystem=strict with ReadWritePaths=/etc/hosts makes it: EROFS for everything but the file."""
    ns = netns()
    ns.run(
        ["sh", "-c", "cp /etc/hosts /run/hosts && mount --bind /run/hosts /etc/hosts && mount -o remount,ro,bind /etc"]
    )

    assert ns.call(edit_hosts, "/etc/hosts", _section)
    assert "10.107.0.2" in ns.read_file("/run/hosts")


def test_a_read_only_hosts_file_is_reported(netns: NetNS) -> None:
    """A warning for the daemon: names are missing, addresses work."""
    ns = netns()
    ns.run(["mount", "-o", "bind,ro", "/etc", "/etc"])
    ns.run(["mount", "-o", "remount,ro,bind", "/etc"])

    with pytest.raises(HostsFileError, match="Read-only file system") as caught:
        ns.call(edit_hosts, "/etc/hosts", _section)

    assert caught.value.read_only


def test_a_full_disk_leaves_a_bind_mounted_hosts_file_as_it_was(netns: NetNS) -> None:
    """Blocks are reserved before the first byte is changed."""
    ns = netns()
    ns.run(["mkdir", "/run/small"])
    ns.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", "/run/small"])
    ns.run(["sh", "-c", "cp /etc/hosts /run/small/hosts && mount --bind /run/small/hosts /etc/hosts"])
    ns.run(["sh", "-c", "head -c 70000 /dev/zero >/run/small/filler || true"])
    before = ns.read_file("/etc/hosts")

    with pytest.raises(HostsFileError, match="No space left"):
        ns.call(edit_hosts, "/etc/hosts", lambda text: text + b"10.107.0.2\tname.prod\n" * 1000)

    assert ns.read_file("/etc/hosts") == before


def test_a_killed_process_is_no_holder_for_long(netns: NetNS) -> None:
    """The next start often comes within the same millisecond."""
    ns = netns()
    daemon = start_daemon(ns)

    daemon.send_signal(signal.SIGKILL)

    ns.call(_until_free)
    daemon.wait()


def _until_free() -> None:
    give_up = time.monotonic() + 5
    while True:
        try:
            linux.check_interface("ngrokd0")
            return
        except TakenError:
            assert time.monotonic() < give_up
