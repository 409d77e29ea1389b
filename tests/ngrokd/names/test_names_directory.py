"""Who answers at (address, port)."""

from __future__ import annotations

import pickle
import sys
from ipaddress import IPv4Address, IPv6Address

import pytest

from ngrokd.endpoints import Endpoint
from ngrokd.names.directory import Directory


def endpoint(host: str, port: int) -> Endpoint:
    return Endpoint(f"ep_{host}_{port}", f"tcp://{host}:{port}", "tcp", host, port, "tcp")


A, B, C = IPv4Address("10.107.0.2"), IPv4Address("10.107.0.3"), IPv4Address("10.107.0.4")
HTTP, SQL, OTHER = endpoint("a.prod", 80), endpoint("a.prod", 5432), endpoint("b.prod", 80)


def test_an_endpoint_is_found_by_address_and_port() -> None:
    directory = Directory([(A, HTTP), (A, SQL), (B, OTHER)])

    assert directory.lookup(("10.107.0.2", 80)) is HTTP
    assert directory.lookup(("10.107.0.2", 5432)) is SQL
    assert directory.lookup((b"\x0a\x6b\x00\x03", 80)) is OTHER
    assert directory.lookup(("10.107.0.2", 81)) is None
    assert directory.lookup(("10.107.0.3", 5432)) is None
    assert directory.lookup(("10.107.0.9", 80)) is None
    assert len(directory) == 3
    assert list(directory) == [(A, HTTP), (A, SQL), (B, OTHER)]


def test_the_stack_is_told_packed_addresses_and_ports() -> None:
    directory = Directory([(A, HTTP), (A, SQL), (B, OTHER)])

    assert directory.served() == {b"\x0a\x6b\x00\x02": frozenset({80, 5432}), b"\x0a\x6b\x00\x03": frozenset({80})}


def test_equal_port_sets_are_one_object() -> None:
    """65,000 sets of one port would weigh 14 MB; one weighs nothing."""
    served = Directory([(A, HTTP), (B, OTHER), (C, endpoint("c.prod", 80))]).served()

    assert len({id(ports) for ports in served.values()}) == 1


def test_nobody_answers_in_an_empty_directory() -> None:
    directory = Directory.empty()

    assert directory.lookup(("10.107.0.2", 80)) is None
    assert directory.served() == {}
    assert not list(directory)


def test_addresses_of_both_families_fit() -> None:
    address = IPv6Address("fd00:107::2")
    directory = Directory([(address, HTTP)])

    assert directory.lookup(("fd00:107::2", 80)) is HTTP
    assert directory.served() == {address.packed: frozenset({80})}


@pytest.mark.parametrize("text", ["10.107.0", "10.107.0.256", "10.107.0.x", "ten", ""])
def test_what_is_no_address_is_an_error(text: str) -> None:
    """Destinations come from our own stack: one that cannot be read is a bug."""
    with pytest.raises(ValueError, match="does not appear to be"):
        Directory([(A, HTTP)]).lookup((text, 80))


def test_two_endpoints_at_one_place_are_a_bug_of_ours() -> None:
    with pytest.raises(AssertionError):
        Directory([(A, HTTP), (A, HTTP)])


def test_snapshots_are_compared_by_content_and_travel() -> None:
    """Worker processes get them as messages."""
    directory = Directory([(A, HTTP), (A, SQL), (B, OTHER)])

    assert pickle.loads(pickle.dumps(directory)) == directory
    assert directory != Directory.empty()
    assert directory != "something else"
    assert repr(directory) == "<Directory of 3 endpoints at 2 addresses>"


def test_a_whole_16_bit_subnet_is_cheap() -> None:
    entries = [(IPv4Address(0x0A6B0002 + i), HTTP) for i in range(65_533)]
    directory = Directory(entries)

    table = directory._at
    assert sys.getsizeof(table) + sum(map(sys.getsizeof, table)) < 8 * 2**20
    assert len(directory.served()) == 65_533
