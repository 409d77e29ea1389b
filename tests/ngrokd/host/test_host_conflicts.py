"""Whether a subnet is free: the cases that decide, and the ones that only look alike."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from ngrokd.host.conflicts import (
    TABLE_LOCAL,
    TABLE_MAIN,
    Address,
    Facts,
    Link,
    Route,
    Rule,
    describe,
    inside,
    judge,
    propose_subnet,
)
from ngrokd.host.plan import GUARD_METRIC, Network

SUBNET = IPv4Network("10.107.0.0/16")
LINKS = {
    1: Link(1, "lo"),
    2: Link(2, "eth0"),
    3: Link(3, "docker0", "bridge"),
    4: Link(4, "ngrokd0", "tun"),
    5: Link(5, "tun0", "tun", "process 77 (openvpn)"),
}
RULES = (Rule(0, TABLE_LOCAL), Rule(32766, TABLE_MAIN), Rule(32767, 253))


def net(text: str) -> Network:
    return ip_network(text)


def claims(*routes: Route, addresses: tuple[Address, ...] = (), rules: tuple[Rule, ...] = RULES) -> list[str]:
    return [str(conflict) for conflict in judge(SUBNET, "ngrokd0", Facts(LINKS, addresses, routes, rules)).conflicts]


def test_equal_and_inner_routes_are_conflicts() -> None:
    """They would win for their part, or be taken over by us."""
    assert claims(Route(net("10.107.0.0/16"), 3)) == ["route 10.107.0.0/16 of docker0 (a bridge, of Docker)"]
    assert claims(Route(net("10.107.3.0/24"), 5)) == [
        "route 10.107.3.0/24 of tun0 (a TUN device held by process 77 (openvpn))"
    ]
    assert claims(Route(net("10.107.3.7/32"), 2, metric=4000)) == ["route 10.107.3.7/32 of eth0"]
    assert claims(Route(net("10.107.3.0/24"), type=6)) == ["blackhole route 10.107.3.0/24"]


def test_what_is_ours_is_no_conflict() -> None:
    """A dead daemon's address, route and guard are adopted."""
    local = Route(net("10.107.0.1/32"), 4, table=TABLE_LOCAL, type=2, protocol=2)
    guard = Route(SUBNET, type=7, metric=GUARD_METRIC)
    address = Address(ip_address("10.107.0.1"), 32, 4)

    assert claims(local, guard, Route(SUBNET, 4), addresses=(address,)) == []


def test_a_guard_of_another_size_is_somebody_elses_residue() -> None:
    """It would swallow a part of our subnet; how to remove it is said."""
    inner = Route(net("10.107.4.0/24"), type=7, metric=GUARD_METRIC)

    [conflict] = judge(SUBNET, "ngrokd0", Facts(LINKS, (), (inner,), RULES)).conflicts

    assert "ip route del unreachable 10.107.4.0/24 metric 4278198272" in conflict.remedy
    assert claims(Route(net("10.0.0.0/8"), type=7, metric=GUARD_METRIC)) == []


def test_an_address_in_the_subnet_is_named_once() -> None:
    """Its entry in the local table says the same again."""
    address = Address(ip_address("10.107.3.1"), 32, 3)
    local = Route(net("10.107.3.1/32"), 3, table=TABLE_LOCAL, type=2, protocol=2)

    assert claims(local, addresses=(address,)) == ["address 10.107.3.1/32 of docker0 (a bridge, of Docker)"]
    assert claims(Route(net("10.107.3.0/24"), 1, table=TABLE_LOCAL, type=2, protocol=3)) == [
        "local route 10.107.3.0/24 of lo"
    ]


def test_wider_routes_are_shadows_and_default_routes_nothing() -> None:
    """The more specific route wins, and that is ours."""
    routes = (Route(net("10.0.0.0/8"), 5), Route(net("0.0.0.0/0"), 2))

    judgement = judge(SUBNET, "ngrokd0", Facts(LINKS, (), routes, RULES))

    assert judgement.conflicts == ()
    assert [conflict.interface for conflict in judgement.shadows] == ["tun0"]


def test_a_gateway_in_the_subnet_is_a_conflict() -> None:
    """With our route the network behind it would be gone, perhaps the Internet."""
    default = Route(net("0.0.0.0/0"), 2, gateways=(ip_address("10.107.0.254"),))

    assert claims(default) == ["gateway 10.107.0.254 (of the route to 0.0.0.0/0) of eth0"]


def test_only_tables_that_are_asked_before_ours_count() -> None:
    """In the order of the rules, as the kernel goes."""
    wide = Route(net("10.0.0.0/8"), 5, table=52)
    default = Route(net("0.0.0.0/0"), 5, table=52)

    assert claims(wide) == []
    assert claims(wide, rules=(*RULES, Rule(5270, 52))) != []
    assert claims(wide, rules=(*RULES, Rule(32766, 52), Rule(40000, 52))) == []
    assert claims(wide, rules=(*RULES, Rule(5270, 52, selective=True))) == []
    assert claims(wide, rules=(*RULES, Rule(5270, 52, version=6))) == []
    assert claims(default, rules=(*RULES, Rule(5270, 52))) != []
    assert claims(default, rules=(*RULES, Rule(5270, 52, suppress=0))) == []
    assert claims(wide, rules=(*RULES, Rule(5270, 52, suppress=0))) != []
    assert claims(wide, rules=(*RULES, Rule(5270, 52, destination=net("192.0.2.0/24")))) == []
    assert claims(wide, rules=(*RULES, Rule(5270, 52, destination=net("10.107.9.0/24")))) != []


def test_the_main_table_may_be_asked_early() -> None:
    """wg-quick's rules: main first without its default route, then the VPN's table."""
    rules = (*RULES, Rule(100, TABLE_MAIN, suppress=0), Rule(101, 51820))
    late = (*RULES, Rule(100, TABLE_MAIN, suppress=24), Rule(101, 51820))
    partly = (*RULES, Rule(100, TABLE_MAIN, destination=net("10.107.1.0/24")), Rule(101, 51820))
    vpn = Route(net("0.0.0.0/0"), 5, table=51820)

    assert claims(vpn, rules=rules) == []
    assert claims(vpn, rules=late) != []
    assert claims(vpn, rules=partly) != []


def test_rules_that_refuse_are_conflicts_when_they_come_first() -> None:
    """`ip rule add to 10.0.0.0/8 prohibit` is a way to fence a machine in."""
    assert claims(rules=(*RULES, Rule(100, 0, action=8, destination=net("10.0.0.0/8")))) == [
        "rule 100 (prohibit 10.0.0.0/8)"
    ]
    assert claims(rules=(*RULES, Rule(100, 0, action=8, selective=True))) == []
    assert claims(rules=(*RULES, Rule(40000, 0, action=8))) == []
    assert claims(rules=(*RULES, Rule(100, 0, action=8, destination=net("192.0.2.0/24")))) == []


def test_the_other_family_never_matters() -> None:
    """Their networks cannot even be compared."""
    subnet = IPv6Network("fd00:107::/64")
    routes = (Route(SUBNET, 3), Route(net("fd00:107::/96"), 3, gateways=(ip_address("10.107.0.9"),)))

    judgement = judge(subnet, "ngrokd0", Facts(LINKS, (Address(ip_address("10.107.0.9"), 24, 3),), routes, RULES))

    assert [conflict.what for conflict in judgement.conflicts] == ["route fd00:107::/96"]
    assert not inside(SUBNET, subnet)


def test_the_next_free_network_is_proposed() -> None:
    """Of the same size; private; touching nothing that is in use."""
    taken: list[Network] = [net("0.0.0.0/0"), net("10.107.0.0/16"), net("10.108.3.0/24"), net("fd00::/8")]

    assert propose_subnet(SUBNET, taken) == net("10.109.0.0/16")
    assert propose_subnet(SUBNET, [net("10.0.0.0/8")]) == net("172.16.0.0/16")
    assert propose_subnet(IPv4Network("10.255.0.0/16"), []) == net("10.0.0.0/16")
    assert propose_subnet(IPv4Network("192.168.255.0/24"), [net("192.168.0.0/17")]) == net("192.168.128.0/24")
    assert propose_subnet(IPv4Network("198.51.100.0/24"), []) == net("10.0.0.0/24")
    assert propose_subnet(IPv4Network("10.0.0.0/8"), []) is None
    assert propose_subnet(SUBNET, [net("10.0.0.0/8"), net("172.16.0.0/12"), net("192.168.0.0/16")]) == net(
        "100.64.0.0/16"
    )


IN_TEN = st.builds(
    lambda number, length: IPv4Network((0x0A000000 + number, length), strict=False),
    st.integers(0, 0xFFFFFF),
    st.integers(9, 32),
)


@given(subnet=IN_TEN.filter(lambda n: n.prefixlen <= 28), taken=st.lists(IN_TEN, max_size=20))
def test_a_proposal_is_always_good(subnet: IPv4Network, taken: list[Network]) -> None:
    """Or there is none."""
    proposal = propose_subnet(subnet, [*taken, subnet])

    if proposal is not None:
        routes = tuple(Route(network, 2) for network in taken)
        assert proposal.prefixlen == subnet.prefixlen
        assert judge(proposal, "ngrokd0", Facts(LINKS, (), routes, RULES)).conflicts == ()


def test_interfaces_are_described_in_words() -> None:
    """For the person who has to find out whose it is."""
    assert describe(None) == ""
    assert describe(Link(9, "eth0")) == "eth0"
    assert describe(Link(9, "wg0", "wireguard")) == "wg0 (a WireGuard VPN)"
    assert describe(Link(9, "br-1234", "bridge")) == "br-1234 (a bridge, of Docker)"
    assert describe(Link(9, "veth1", "veth")) == "veth1 (a veth interface)"
