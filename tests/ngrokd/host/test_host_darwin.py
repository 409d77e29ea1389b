"""The plan on macOS is done by its commands, and judged by what the tables say afterwards."""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network

import pytest

from ngrokd.errors import NgrokdError, TakenError
from ngrokd.host.darwin import Answer, MacHost, parse_interfaces, parse_routes, run_tool
from ngrokd.host.macos import macos_plan
from ngrokd.host.plan import ADDRESS, DEVICE, GUARD, LINK, ROUTE, Action, HostError, Step
from tests.ngrokd.host.darwin_tools import Mac, Way, Wire

SUBNET = IPv4Network("10.107.0.0/16")
SUBNET6 = IPv6Network("fd00:107::/64")
PLAN = macos_plan("ngrokd0", SUBNET, subnet6=SUBNET6)
OURS = {
    "10.107.0.0/16 127.0.0.1 lo0",
    "10.107.0.0/17 utun4 utun4",
    "10.107.128.0/17 utun4 utun4",
    "10.107.0.1/32 10.107.0.1 utun4",
    "fd00:107::/64 ::1 lo0",
    "fd00:107::/65 utun4 utun4",
    "fd00:107:0:0:8000::/65 utun4 utun4",
}


@pytest.fixture
def mac() -> Mac:
    return Mac()


def device(mac: Mac, host: MacHost) -> dict[str, Action]:
    """What the daemon does about its device: the system chooses the name."""

    def open_device(_step: Step) -> bool:
        mac.open_utun("utun4")
        host.interface = "utun4"
        return True

    def close_device(_step: Step) -> bool:
        mac.close_utun("utun4")
        return True

    return {DEVICE: Action(open_device, close_device)}


@pytest.mark.parametrize("old", [False, True])
def test_the_plan_is_done_and_undone(mac: Mac, old: bool) -> None:
    mac.old = old
    before = copy.deepcopy((mac.wires, mac.ways))
    host = MacHost(tools=mac)
    actions = device(mac, host)

    changed = host.apply(PLAN, actions)

    assert changed == list(PLAN.only(GUARD, DEVICE, LINK, ADDRESS, ROUTE))
    assert mac.destinations() >= OURS
    assert mac.wires["utun4"].mtu == 9000
    assert mac.wires["utun4"].inet == ["10.107.0.1>10.107.0.1/32", "fd00:107::1/128"]

    undone = host.undo(PLAN, actions)

    assert undone.problems == ()
    assert (mac.wires, mac.ways) == before


def test_what_is_in_force_is_left_alone(mac: Mac) -> None:
    """Each address that is set once more makes other VPNs connect anew."""
    host = MacHost(tools=mac)
    host.apply(PLAN, device(mac, host))
    mac.changes.clear()

    assert host.ensure(PLAN) == []
    assert mac.changes == []


def test_only_what_is_missing_is_done_again(mac: Mac) -> None:
    host = MacHost(tools=mac)
    host.apply(PLAN, device(mac, host))
    mac.changes.clear()
    mac.ways = [way for way in mac.ways if way.destination != "10.107.128.0/17"]
    mac.wires["utun4"].mtu = 1500

    assert [step.kind for step in host.ensure(PLAN)] == [LINK, ROUTE]
    assert mac.changes == ["ifconfig utun4 mtu 9000", "route -n add -inet -net 10.107.128.0/17 -interface utun4"]


def test_after_a_killed_daemon_the_guard_is_adopted(mac: Mac) -> None:
    """Device and routes went with it; the new device may have another number."""
    host = MacHost(tools=mac)
    host.apply(PLAN, device(mac, host))
    mac.close_utun("utun4")
    assert "10.107.0.0/16 127.0.0.1 lo0" in mac.destinations()

    again = MacHost(tools=mac)
    assert again.check_free(PLAN).conflicts == ()
    changed = again.apply(PLAN, device(mac, again))

    assert GUARD not in {step.kind for step in changed}
    assert mac.destinations() >= OURS


def test_a_command_that_had_no_effect_is_a_failure_whatever_it_says(mac: Mac) -> None:
    """`route` complains and ends with success; what was done before it is taken back."""
    host = MacHost(tools=mac)
    before = copy.deepcopy(mac.ways)
    mac.broken = {"route"}

    with pytest.raises(HostError, match="Operation not permitted"):
        host.apply(PLAN, device(mac, host))

    assert mac.ways == before
    assert "utun4" not in mac.wires


def test_a_route_that_came_between_is_named_and_all_is_taken_back(mac: Mac) -> None:
    host = MacHost(tools=mac)
    mac.ways.append(Way("10.107.128.0/17", "link#9", "UCS", "en0"))
    before = copy.deepcopy((mac.wires, mac.ways))

    with pytest.raises(TakenError, match=r"10\.107\.128\.0/17 is taken: a route to link#9 on en0"):
        host.apply(PLAN, device(mac, host))

    assert (mac.wires, mac.ways) == before


@pytest.mark.parametrize(
    ("way", "words"),
    [
        (Way("10.107.0.0/16", "link#9", "UCS", "utun0"), "route 10.107.0.0/16 of utun0 (a TUN device"),
        (Way("10.107.3.0/24", "link#9", "UCS", "en0"), "route 10.107.3.0/24 of en0"),
        (Way("172.20.0.0/16", "10.107.9.1", "UGSc", "en0"), "gateway 10.107.9.1"),
    ],
)
def test_what_is_somebody_else_s_is_named_before_anything_is_done(mac: Mac, way: Way, words: str) -> None:
    mac.ways.append(way)

    with pytest.raises(TakenError) as caught:
        MacHost(tools=mac).check_free(PLAN)

    assert words in str(caught.value)
    assert "10.108.0.0/16" in caught.value.remedy
    assert mac.changes == []


def test_an_address_of_another_interface_is_a_claim(mac: Mac) -> None:
    mac.wires["utun2"] = Wire("POINTOPOINT,RUNNING,MULTICAST", 1500, ["10.107.4.2>10.107.4.1/32"])

    with pytest.raises(TakenError, match=r"address 10\.107\.4\.2/32 of utun2"):
        MacHost(tools=mac).check_free(PLAN)


def test_a_wider_route_is_told_and_no_reason_to_refuse(mac: Mac) -> None:
    mac.ways.append(Way("10.0.0.0/8", "link#9", "UCS", "utun0"))

    (shadow,) = MacHost(tools=mac).check_free(PLAN).shadows

    assert shadow.network == ip_network("10.0.0.0/8")


def test_when_the_device_is_gone_it_says_so(mac: Mac) -> None:
    host = MacHost(tools=mac)
    host.apply(PLAN, device(mac, host))
    mac.close_utun("utun4")

    with pytest.raises(HostError, match="interface utun4 is gone"):
        host.ensure(PLAN)


def test_undoing_goes_on_when_something_fails(mac: Mac) -> None:
    host = MacHost(tools=mac)
    host.apply(PLAN, device(mac, host))
    mac.broken = {"route"}

    undone = host.undo(PLAN)

    assert {type(problem) for problem in undone.problems} == {HostError}
    assert len(undone.problems) == 6
    assert [step.kind for step in undone.removed] == [ADDRESS, ADDRESS]
    assert mac.wires["utun4"].inet == []


def test_without_a_device_no_command_is_run(mac: Mac) -> None:
    with pytest.raises(HostError, match="there is no device"):
        MacHost(tools=mac).ensure(PLAN.only(ROUTE))

    assert mac.changes == []


def test_tables_that_cannot_be_read_are_a_failure() -> None:
    """An empty table would mean that nothing is taken."""

    def tools(command: Sequence[str]) -> Answer:
        return Answer(1, "netstat: sysctl: Operation not permitted")

    with pytest.raises(HostError, match="Operation not permitted"):
        MacHost(tools=tools).check_free(PLAN)


# What the commands print


def test_destinations_are_read_as_netstat_shortens_them() -> None:
    text = """Routing tables

Internet:
Destination        Gateway            Flags        Netif Expire
default            10.10.10.1         UGScg          en0
10.107/16          127.0.0.1          UGRSc          lo0
10.107.128/17      utun4              USc          utun4
10.107.0.1         10.107.0.1         UH           utun4
127                127.0.0.1          UCS            lo0
169.254            link#4             UCS            en0      !
192.168.220        link#12            UC          vmnet8
10.10.10.1         bc:67:1c:40:3:f6   UHLWIir        en0   1193
nonsense/xx        link#1             U              en0

Internet6:
Destination                             Gateway                                 Flags               Netif Expire
default                                 fe80::%utun0                            UGcIg               utun0
::1                                     ::1                                     UHL                   lo0
fe80::%lo0/64                           fe80::1%lo0                             UcI                   lo0
fd00:107::/65                           utun4                                   USc                 utun4
"""

    assert [(str(entry.destination), entry.interface) for entry in parse_routes(text)] == [
        ("0.0.0.0/0", "en0"),
        ("10.107.0.0/16", "lo0"),
        ("10.107.128.0/17", "utun4"),
        ("10.107.0.1/32", "utun4"),
        ("127.0.0.0/8", "lo0"),
        ("169.254.0.0/16", "en0"),
        ("192.168.220.0/24", "vmnet8"),
        ("10.10.10.1/32", "en0"),
        ("::/0", "utun0"),
        ("::1/128", "lo0"),
        ("fe80::/64", "lo0"),
        ("fd00:107::/65", "utun4"),
    ]


def test_interfaces_are_read_with_what_is_not_understood_left_out() -> None:
    text = """utun4: flags=8051<UP,POINTOPOINT,RUNNING,MULTICAST> mtu 9000
\tinet 10.107.0.1 --> 10.107.0.1 netmask 0xffffffff
\tinet6 fe80::1%utun4 prefixlen 64 scopeid 0x12
\tinet6 broken prefixlen 64
en1: flags=8822<BROADCAST,SMART,SIMPLEX,MULTICAST> mtu 1500
\tether 0:0:0:0:0:1
\tinet 192.168.1.20 netmask 0xffffff00 broadcast 192.168.1.255
"""
    found = parse_interfaces(text)

    assert (found["utun4"].up, found["utun4"].mtu) == (True, 9000)
    assert [(str(address), length) for address, length in found["utun4"].addresses] == [
        ("10.107.0.1", 32),
        ("fe80::1", 64),
    ]
    assert (found["en1"].up, found["en1"].mtu) == (False, 1500)
    assert found["en1"].addresses[0][1] == 24


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has it")
def test_a_tool_that_is_missing_is_named() -> None:
    with pytest.raises(HostError, match="cannot run dscacheutil"):
        run_tool(["dscacheutil", "-flushcache"])


def test_a_tool_s_answer_and_complaints_are_one_text() -> None:
    answer = run_tool(["sh", "-c", "echo out; echo err >&2; exit 3"])

    assert answer == Answer(3, "out\nerr\n")
    assert issubclass(HostError, NgrokdError)
