"""Who answers at (address, port)."""

from __future__ import annotations

import pickle
import sys
import time
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

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


def place(number: int) -> IPv4Address:
    return IPv4Address(0x0A6B0002 + number)


def tables() -> st.SearchStrategy[dict[tuple[int, int], int]]:
    """Address and port to a version of the endpoint there; few of each, so that tables meet."""
    return st.dictionaries(st.tuples(st.integers(0, 3), st.integers(80, 83)), st.integers(0, 2), max_size=12)


def made_of(table: dict[tuple[int, int], int]) -> Directory:
    return Directory(
        (place(number), Endpoint(f"ep_{number}_{port}_{version}", "", "http", f"h{number}", port, "http"))
        for (number, port), version in table.items()
    )


@given(tables(), tables(), st.integers(1, 5))
def test_the_changes_make_one_directory_the_other_however_they_are_cut(
    before: dict[tuple[int, int], int], after: dict[tuple[int, int], int], piece: int
) -> None:
    """A worker is told the difference, in pieces."""
    old, new = made_of(before), made_of(after)

    put, drop = new.changes_since(old)
    grown = old.changed([], drop)
    for start in range(0, len(put), piece):
        grown = grown.changed(put[start : start + piece])

    assert set(grown) == set(new)
    assert grown.served() == new.served()
    assert len(grown) == len(new)
    assert set(old) == set(made_of(before)), "a directory never changes"
    assert {(key, endpoint.port) for key, endpoint in put} == {
        (place(at).packed, port) for (at, port), version in after.items() if before.get((at, port)) != version
    }
    assert set(drop) == {(place(at).packed, port) for at, port in before.keys() - after.keys()}
    assert all(grown.lookup((address.packed, endpoint.port)) is endpoint for address, endpoint in grown)


def test_one_change_among_65_000_costs_milliseconds() -> None:
    """The data plane's worker makes it between two batches of packets."""
    old = Directory((place(number), HTTP) for number in range(65_000))
    started = time.process_time()

    new = old.changed([(place(65_001).packed, SQL)], [(place(7).packed, HTTP.port)])
    took = time.process_time() - started

    assert (len(old), len(new)) == (65_000, 65_000)
    assert took < 0.1  # 2 ms on the machine this was written on
    assert new.changes_since(old) == ([(place(65_001).packed, SQL)], [(place(7).packed, HTTP.port)])
