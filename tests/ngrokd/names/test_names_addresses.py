"""One address per host name, for ever; and what is taken over from the Go daemon's file."""

from __future__ import annotations

import json
import time
from ipaddress import IPv4Address, IPv4Network
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from ngrokd.names.addresses import QUARANTINE_S, AddressPool

DAY = 24 * 3600.0


def texts(addresses: dict[str, IPv4Address]) -> dict[str, str]:
    return {host: str(address) for host, address in addresses.items()}


def test_addresses_start_at_2_and_follow_the_sorted_names() -> None:
    """The same names give the same addresses on every machine, whatever order the API lists them in."""
    pool = AddressPool("10.107.0.0/16")

    assert texts(pool.assign(["c.prod", "a.prod", "b.prod"], 0.0)) == {
        "a.prod": "10.107.0.2",
        "b.prod": "10.107.0.3",
        "c.prod": "10.107.0.4",
    }
    assert pool.gateway == IPv4Address("10.107.0.1")


def test_known_names_keep_their_address_and_new_ones_follow() -> None:
    pool = AddressPool("10.107.0.0/16", {"b.prod": "10.107.0.2", "z.prod": "10.107.200.9"})

    assert texts(pool.assign(["a.prod", "b.prod", "c.prod", "z.prod"], 0.0)) == {
        "a.prod": "10.107.0.3",
        "b.prod": "10.107.0.2",
        "c.prod": "10.107.0.4",
        "z.prod": "10.107.200.9",
    }
    assert pool.problems == []


def test_a_vanished_name_keeps_its_address_reserved() -> None:
    pool = AddressPool("10.107.0.0/16")
    pool.assign(["a.prod", "b.prod"], 0.0)

    pool.assign(["b.prod", "c.prod"], 100 * DAY)

    assert pool.dump() == {"a.prod": "10.107.0.2", "b.prod": "10.107.0.3", "c.prod": "10.107.0.4"}
    assert texts(pool.assign(["a.prod"], 200 * DAY)) == {"a.prod": "10.107.0.2"}


@pytest.mark.parametrize(
    ("subnet", "capacity", "first", "last"),
    [
        ("10.107.0.0/30", 1, "10.107.0.2", "10.107.0.2"),
        ("10.107.0.0/29", 5, "10.107.0.2", "10.107.0.6"),
        ("10.0.0.128/25", 125, "10.0.0.130", "10.0.0.254"),
        ("10.0.0.64/27", 29, "10.0.0.66", "10.0.0.94"),
        ("10.107.4.0/22", 1021, "10.107.4.2", "10.107.7.254"),
    ],
)
def test_every_usable_address_of_a_subnet_is_used_and_no_other(
    subnet: str, capacity: int, first: str, last: str
) -> None:
    """Never the network, the gateway or the broadcast address, however the subnet is aligned."""
    pool = AddressPool(subnet)
    hosts = [f"h{i:05}.prod" for i in range(capacity + 2)]

    given = pool.assign(hosts, 0.0)

    assert pool.capacity == capacity
    assert len(set(given.values())) == len(given) == capacity
    assert (str(min(given.values())), str(max(given.values()))) == (first, last)
    assert pool.without_address == tuple(hosts[capacity:])


@pytest.mark.parametrize("subnet", ["10.0.0.0/32", "10.0.0.0/31"])
def test_a_subnet_without_room_is_full_from_the_start(subnet: str) -> None:
    pool = AddressPool(subnet, {"a.prod": "10.0.0.1"})

    assert pool.assign(["a.prod"], 0.0) == {}
    assert pool.full
    assert pool.capacity == 0


def test_a_large_subnet_costs_nothing() -> None:
    pool = AddressPool(IPv4Network("10.0.0.0/8"), {"last.prod": "10.255.255.254"})

    assert texts(pool.assign(["a.prod", "last.prod"], 0.0)) == {"a.prod": "10.0.0.2", "last.prod": "10.255.255.254"}
    assert pool.capacity == 2**24 - 3


def test_a_full_subnet_says_who_has_no_address_and_serves_the_others() -> None:
    pool = AddressPool("10.107.0.0/29")
    pool.assign([f"{letter}.prod" for letter in "bcdef"], 0.0)

    given = pool.assign([f"{letter}.prod" for letter in "abcdefgh"], 0.0)

    assert sorted(given) == ["b.prod", "c.prod", "d.prod", "e.prod", "f.prod"]
    assert pool.without_address == ("a.prod", "g.prod", "h.prod")
    assert pool.shortage() == (
        "the subnet 10.107.0.0/29 is full: all 5 addresses are in use or were until less than 24 h ago, "
        "so there is none for a.prod, g.prod, h.prod; configure a larger net.subnet"
    )
    pool.assign(["b.prod"], 1.0)
    assert (pool.full, pool.shortage()) == (False, "")


def test_the_longest_gone_name_gives_its_address_and_only_after_a_day() -> None:
    """A program may hold a cached address for hours; it must not reach somebody else under it."""
    pool = AddressPool("10.107.0.0/29")
    pool.assign(["a.prod", "b.prod", "c.prod", "d.prod", "e.prod"], 0.0)
    pool.assign(["a.prod", "c.prod", "d.prod", "e.prod"], 100.0)  # b goes first
    pool.assign(["c.prod", "d.prod", "e.prod"], 200.0)  # then a
    new = ["c.prod", "d.prod", "e.prod", "x.prod"]

    assert "x.prod" not in pool.assign(new, 99.0 + DAY)
    assert texts(pool.assign(new, 100.0 + DAY))["x.prod"] == "10.107.0.3"
    assert pool.get("b.prod") is None
    assert pool.get("a.prod") == IPv4Address("10.107.0.2")


def test_release_times_survive_a_restart() -> None:
    pool = AddressPool("10.107.0.0/30")
    pool.assign(["a.prod"], 0.0)
    pool.assign([], 1000.0)
    again = AddressPool.load("10.107.0.0/30", pool.dump_json(), pool.dump_state_json())

    assert again.assign(["b.prod"], 999.0 + DAY) == {}
    assert texts(again.assign(["b.prod"], 1000.0 + DAY)) == {"b.prod": "10.107.0.2"}


def test_a_name_that_was_gone_while_we_were_down_is_released_when_we_notice() -> None:
    """Nobody knows when it went, so the day starts now."""
    pool = AddressPool.load("10.107.0.0/30", b'{"gone.prod": "10.107.0.2"}')

    assert pool.assign(["b.prod"], 5000.0) == {}
    assert pool.assign(["b.prod"], 4999.0 + DAY) == {}
    assert pool.assign(["b.prod"], 5000.0 + DAY) != {}


def test_a_clock_set_back_never_shortens_the_day() -> None:
    pool = AddressPool("10.107.0.0/30")
    pool.assign(["a.prod"], 10 * DAY)
    pool.assign([], 10 * DAY)

    assert pool.assign(["b.prod"], 5 * DAY) == {}
    assert pool.assign(["b.prod"], 11 * DAY) != {}


def test_the_file_is_the_go_daemons_byte_for_byte() -> None:
    """Flat, sorted by name, two blanks, no final newline: what Go's MarshalIndent writes."""
    pool = AddressPool("10.107.0.0/16")
    pool.assign(["b.prod", "a.prod"], 0.0)

    assert pool.dump_json() == b'{\n  "a.prod": "10.107.0.2",\n  "b.prod": "10.107.0.3"\n}'
    assert pool.dump_json().decode() == json.dumps(pool.dump(), indent=2, sort_keys=True)
    assert AddressPool("10.107.0.0/16").dump_json() == b"{}"


def test_generation_tells_when_something_must_be_written() -> None:
    pool = AddressPool("10.107.0.0/16")
    seen = [pool.generation]
    for hosts in (["a.prod"], ["a.prod"], [], [], ["a.prod"]):
        pool.assign(hosts, 0.0)
        seen.append(pool.generation)

    assert [b > a for a, b in pairwise(seen)] == [True, False, True, False, True]


# Taking over


@pytest.mark.parametrize(
    ("address", "why"),
    [
        ("10.107.0.0", "10.107.0.0, the network address of 10.107.0.0/16"),
        ("10.107.0.1", "10.107.0.1, our own address in 10.107.0.0/16"),
        ("10.107.255.255", "10.107.255.255, the broadcast address of 10.107.0.0/16"),
        ("127.0.0.5", "127.0.0.5, outside the subnet 10.107.0.0/16"),
        ("10.108.0.2", "10.108.0.2, outside the subnet 10.107.0.0/16"),
        ("10.107.0.300", "10.107.0.300, which is not an address"),
        ("10.107.0.05", "10.107.0.05, which is not an address"),
        ("10.107.0.2\n6.6.6.6", "10.107.0.2\\n6.6.6.6, which is not an address"),
        ("fd00::2", "fd00::2, which is not an address"),
        ("", ", which is not an address"),
        (174784514, "int, which is not an address"),
        (None, "NoneType, which is not an address"),
        (["10.107.0.2"], "list, which is not an address"),
    ],
)
def test_an_entry_that_cannot_stay_gets_a_new_address_and_a_line(address: object, why: str) -> None:
    """The Go daemon used the broadcast address, loopback on macOS, and whatever was configured before."""
    pool = AddressPool("10.107.0.0/16", {"bad.prod": address, "good.prod": "10.107.0.9"})

    assert texts(pool.assign(["bad.prod", "good.prod"], 0.0)) == {"bad.prod": "10.107.0.2", "good.prod": "10.107.0.9"}
    (problem,) = pool.problems
    assert why in problem
    assert problem.isprintable()
    assert "bad.prod" in problem


def test_of_names_that_share_an_address_the_first_by_name_keeps_it() -> None:
    """The Go daemon put several names on one address where their ports differed."""
    shared = {"c.prod": "10.107.0.2", "a.prod": "10.107.0.3", "b.prod": "10.107.0.2", "d.prod": "10.107.0.2"}
    pool = AddressPool("10.107.0.0/16", shared)

    assert texts(pool.assign(shared, 0.0)) == {
        "a.prod": "10.107.0.3",
        "b.prod": "10.107.0.2",
        "c.prod": "10.107.0.4",
        "d.prod": "10.107.0.5",
    }
    assert pool.problems == [
        "ip_mappings.json: c.prod shares 10.107.0.2 with b.prod; it gets its own",
        "ip_mappings.json: d.prod shares 10.107.0.2 with b.prod; it gets its own",
    ]


@pytest.mark.parametrize(
    "key", ["evil\n6.6.6.6 x", "localhost", "*.wild.prod", "", "wildcard:", "wildcard:a b", "é.prod"]
)
def test_names_nobody_may_serve_are_dropped(key: str) -> None:
    pool = AddressPool("10.107.0.0/16", {key: "10.107.0.2"})

    assert pool.dump() == {}
    assert len(pool.problems) == 1
    assert pool.problems[0].isprintable()


def test_what_only_the_go_daemon_understands_is_kept_for_it() -> None:
    """Going back must find every address: wildcard entries and spellings in upper case are written as they were."""
    mappings = {"wildcard:example.com": "10.107.0.2", "My-API.Prod": "10.107.0.3", "b.prod": "10.107.0.4"}
    pool = AddressPool("10.107.0.0/16", mappings)

    given = pool.assign(["my-api.prod", "new.prod"], 0.0)

    assert texts(given) == {"my-api.prod": "10.107.0.3", "new.prod": "10.107.0.5"}
    assert pool.problems == []
    assert pool.dump() == mappings | {"my-api.prod": "10.107.0.3", "new.prod": "10.107.0.5"}
    again = AddressPool.load("10.107.0.0/16", pool.dump_json())
    assert (again.problems, again.dump()) == ([], pool.dump())


def test_another_spelling_never_displaces_the_name_itself() -> None:
    pool = AddressPool("10.107.0.0/16", {"A.prod": "10.107.0.9", "a.prod": "10.107.0.5"})

    assert texts(pool.assign(["a.prod"], 0.0)) == {"a.prod": "10.107.0.5"}
    assert pool.problems == ["ip_mappings.json: A.prod is a.prod, which has 10.107.0.5; 10.107.0.9 is dropped"]


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"null", "null"),
        (b"[]", "object"),
        (b'"x"', "object"),
        (b"7", "object"),
        (b"", "damaged"),
        (b"\xff\xfe\x00", "damaged"),
        (b'{"a.prod": ', "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"1" * 10_000, "damaged"),
    ],
)
def test_a_file_that_is_no_object_is_a_line_and_not_the_end(data: bytes, word: str) -> None:
    """`null` made the Go daemon crash at its first poll."""
    pool = AddressPool.load("10.107.0.0/16", data, data)

    assert texts(pool.assign(["a.prod"], 0.0)) == {"a.prod": "10.107.0.2"}
    assert word in pool.problems[0]
    assert all(problem.isprintable() for problem in pool.problems)


def test_of_a_file_cut_off_by_a_power_failure_the_whole_entries_are_kept() -> None:
    pool = AddressPool.load(
        "10.107.0.0/16", b'{\n  "a.prod": "10.107.0.7",\n  "b.prod": "10.107.0.8",\n  "c.prod": "10.1'
    )

    assert texts(pool.assign(["a.prod", "b.prod", "c.prod"], 0.0)) == {
        "a.prod": "10.107.0.7",
        "b.prod": "10.107.0.8",
        "c.prod": "10.107.0.2",
    }
    assert "2 entries could be read" in pool.problems[0]


def test_a_changed_subnet_moves_every_name_and_changing_back_restores_them() -> None:
    """A wrong `net.subnet` must not cost the addresses that programs have learnt."""
    pool = AddressPool("10.107.0.0/16", {"a.prod": "10.107.0.9", "b.prod": "10.107.3.3"})
    pool.assign(["a.prod", "b.prod"], 0.0)

    moved = AddressPool.load("10.9.0.0/24", pool.dump_json(), pool.dump_state_json())
    assert texts(moved.assign(["a.prod", "b.prod", "c.prod"], 1.0)) == {
        "a.prod": "10.9.0.2",
        "b.prod": "10.9.0.3",
        "c.prod": "10.9.0.4",
    }
    assert moved.problems == ["net.subnet changed from 10.107.0.0/16 to 10.9.0.0/24: 2 names move"]

    back = AddressPool.load("10.107.0.0/16", moved.dump_json(), moved.dump_state_json())
    assert texts(back.assign(["a.prod", "b.prod", "c.prod"], 2.0)) == {
        "a.prod": "10.107.0.9",
        "b.prod": "10.107.3.3",
        "c.prod": "10.107.0.2",
    }


def test_a_subnet_that_grew_moves_nobody() -> None:
    pool = AddressPool("10.107.0.0/24")
    pool.assign(["a.prod"], 0.0)
    grown = AddressPool.load("10.107.0.0/16", pool.dump_json(), pool.dump_state_json())

    assert texts(grown.assign(["a.prod"], 0.0)) == {"a.prod": "10.107.0.2"}
    assert grown.problems == []


def test_only_a_few_earlier_subnets_are_remembered() -> None:
    pool = AddressPool("10.0.0.0/24")
    for number in range(1, 10):
        pool.assign(["a.prod"], 0.0)
        pool = AddressPool.load(f"10.{number}.0.0/24", pool.dump_json(), pool.dump_state_json())

    remembered = pool.dump_state()["remembered"]
    assert isinstance(remembered, dict)
    assert list(remembered) == ["10.5.0.0/24", "10.6.0.0/24", "10.7.0.0/24", "10.8.0.0/24"]


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.just("10.107.0.2")
    | st.just("10.107.0.0/24"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.text() | st.sampled_from(["a.prod", "released", "remembered", "subnet"]), inner, max_size=4
        )
    ),
    max_leaves=10,
)


@given(json_values, json_values)
def test_whatever_the_files_hold_the_pool_works(mappings: object, state: object) -> None:
    """Any JSON value in either file: names are served, the files can be written, and read back without complaint."""
    pool = AddressPool("10.107.0.0/24", mappings, state)

    given = pool.assign(["a.prod", "b.prod"], 1000.0)

    assert len(set(given.values())) == 2
    assert all(problem.isprintable() for problem in pool.problems)
    again = AddressPool.load("10.107.0.0/24", pool.dump_json(), pool.dump_state_json())
    assert again.problems == []
    assert again.dump() == pool.dump()
    assert again.dump_state() == pool.dump_state()


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_any_bytes_can_be_loaded(mappings: bytes, state: bytes) -> None:
    pool = AddressPool.load("10.107.0.0/24", mappings, state)

    assert texts(pool.assign(["a.prod"], 0.0))["a.prod"].startswith("10.107.0.")


def test_65533_names_are_assigned_and_written_in_a_second() -> None:
    """A whole /16; the bound is ten times what it takes on an idle machine."""
    hosts = [f"svc-{i}.ns{i % 50}.prod" for i in range(65_533)]
    started = time.monotonic()

    pool = AddressPool("10.107.0.0/16")
    given = pool.assign(hosts, 0.0)
    again = AddressPool.load("10.107.0.0/16", pool.dump_json(), pool.dump_state_json())

    assert time.monotonic() - started < 5.0
    assert len(given) == 65_533
    assert again.assign(hosts, 0.0) == given
    assert str(max(given.values())) == "10.107.255.254"


class Lives(RuleBasedStateMachine):
    """Names come and go, the daemon restarts, time passes: no address means two names within a day."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = AddressPool("10.107.0.0/28")
        self.now = 1_000_000.0
        self.active: set[str] = set()
        self.last_use: dict[IPv4Address, tuple[str, float]] = {}
        self.known: dict[str, IPv4Address] = {}

    @initialize()
    def begin(self) -> None:
        self.serve()

    def serve(self) -> None:
        fresh = self.pool.capacity - self.pool.held
        given = self.pool.assign(self.active, self.now)
        assert set(given) | set(self.pool.without_address) == self.active
        assert not (fresh and self.pool.full and self.pool.held < self.pool.capacity)
        for host, address in given.items():
            user, until = self.last_use.get(address, (host, 0.0))
            assert user == host or self.now - until >= QUARANTINE_S
            if self.known.get(host, address) != address:
                # It may only have moved because somebody took its address while it was gone.
                assert self.last_use[self.known[host]][0] != host
            self.known[host] = address
            self.last_use[address] = (host, self.now)

    @rule(numbers=st.sets(st.integers(0, 25), min_size=1, max_size=8))
    def come(self, numbers: set[int]) -> None:
        self.active |= {f"h{number}.prod" for number in numbers}
        self.serve()

    @rule(numbers=st.sets(st.integers(0, 25), min_size=1, max_size=8))
    def go(self, numbers: set[int]) -> None:
        self.active -= {f"h{number}.prod" for number in numbers}
        self.serve()

    @rule(seconds=st.sampled_from([1.0, 3600.0, 80_000.0, 90_000.0]))
    def wait(self, seconds: float) -> None:
        # Addresses in use are in use all the while.
        self.now += seconds
        self.serve()

    @rule()
    def restart(self) -> None:
        self.pool = AddressPool.load("10.107.0.0/28", self.pool.dump_json(), self.pool.dump_state_json())
        assert self.pool.problems == []
        self.serve()

    @invariant()
    def addresses_are_usable_and_different(self) -> None:
        held = [IPv4Address(text) for text in self.pool.dump().values()]
        assert len(set(held)) == len(held)
        assert all(IPv4Address("10.107.0.2") <= address <= IPv4Address("10.107.0.14") for address in held)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
