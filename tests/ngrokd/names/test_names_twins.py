"""IPv6 twins: every name has its own, and every twin leads back."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.names.twins import ServedTwice, Twins

SUBNET = IPv4Network("10.107.0.0/16")


@pytest.mark.parametrize(
    ("subnet6", "twin"),
    [
        ("fd12:3456:789a::/64", "fd12:3456:789a::a6b:2"),
        ("fd12:3456:789a::/96", "fd12:3456:789a::a6b:2"),
        ("fd12:3456:789a::/112", "fd12:3456:789a::2"),
        ("fd12:3456:789a::5500:0/104", "fd12:3456:789a::556b:2"),
    ],
)
def test_a_twin_ends_in_its_original(subnet6: str, twin: str) -> None:
    """With all 32 bits where there is room, else with as many as there are."""
    twins = Twins(SUBNET, IPv6Network(subnet6))

    assert twins.of(IPv4Address("10.107.0.2")) == IPv6Address(twin)


@given(st.integers(8, 30), st.integers(8, 112), st.data())
def test_every_twin_leads_back_and_no_other_address_does(size: int, size6: int, data: st.DataObject) -> None:
    subnet = IPv4Network((0x0A6B0000 >> (32 - size) << (32 - size), size))
    subnet6 = IPv6Network(((0xFD << 120) >> (128 - size6) << (128 - size6), size6))
    if 128 - size6 < 32 - size:
        with pytest.raises(ValueError, match="fewer addresses"):
            Twins(subnet, subnet6)
        return
    twins = Twins(subnet, subnet6)
    address = subnet[data.draw(st.integers(0, subnet.num_addresses - 1))]
    stranger = subnet6[data.draw(st.integers(0, subnet6.num_addresses - 1))]

    assert twins.of(address) in subnet6
    assert twins.original(twins.of(address).packed) == address.packed
    original = twins.original(stranger.packed)
    assert original is None or twins.of(IPv4Address(original)) == stranger


def test_one_table_serves_both_versions_and_the_probe_has_no_ports() -> None:
    twins = Twins(SUBNET, IPv6Network("fd12:3456:789a::/64"))
    address = IPv4Address("10.107.0.2")
    served = ServedTwice({address.packed: frozenset((80,))}, twins)

    assert served[address.packed] == served[twins.of(address).packed] == {80}
    assert served[twins.probe.packed] == frozenset()
    assert served.get(twins.of(IPv4Address("10.107.0.3")).packed) is None
    assert address.packed in served
    assert twins.of(address).packed in served
    assert twins.probe.packed in served
    assert IPv6Address("fd12::1").packed not in served
    assert len(served) == 1
