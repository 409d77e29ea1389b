"""From a hostile listing to what should be true on this machine."""

from __future__ import annotations

import gc
import json
import random
import time
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.names.addresses import AddressPool
from ngrokd.names.hosts import render, survey
from ngrokd.names.reconcile import (
    NOTHING,
    SHADOWS_PUBLIC,
    Denied,
    Desired,
    Plan,
    Skipped,
    denied,
    dump_endpoints,
    load_endpoints,
    plan,
    rows,
)
from ngrokd.names.twins import Twins

HOSTILE: list[dict[str, Any]] = json.loads((Path(__file__).parent.parent / "hostile_endpoints.json").read_bytes())
FREE = denied()


def ep(number: int, url: str, **more: object) -> dict[str, object]:
    return {"id": f"ep_{number}", "url": url, **more}


def make(*listing: object, previous: Desired = NOTHING, pool: AddressPool | None = None, **more: Any) -> Plan:
    refused = more.pop("refused", FREE)
    return plan(previous, listing, pool or AddressPool("10.107.0.0/16"), refused, 1000.0, **more)


def urls(services: Any) -> list[str]:
    return [service.endpoint.url for service in services]


def reasons(made: Plan) -> dict[str, str]:
    return {skipped.id: skipped.reason for skipped in made.desired.skipped}


def test_endpoints_become_services_with_addresses() -> None:
    made = make(ep(1, "http://b.prod"), ep(2, "tcp://a.prod:5432"), ep(3, "https://a.prod"))

    assert [(s.endpoint.host, s.endpoint.port, str(s.address)) for s in made.desired.services] == [
        ("a.prod", 443, "10.107.0.2"),
        ("a.prod", 5432, "10.107.0.2"),
        ("b.prod", 80, "10.107.0.3"),
    ]
    assert [(str(address), host) for address, host in made.desired.hosts_entries()] == [
        ("10.107.0.2", "a.prod"),
        ("10.107.0.3", "b.prod"),
    ]
    found = made.desired.directory.lookup(("10.107.0.2", 5432))
    assert found is made.desired.services[1].endpoint
    assert made
    assert made.summary() == "3 added (https://a.prod, tcp://a.prod:5432, http://b.prod)"


def test_one_bad_endpoint_is_skipped_and_the_others_live() -> None:
    made = make(ep(1, "http://a.prod"), ep(2, "http://evil.prod\n6.6.6.6 x"), ep(3, "http://b.prod"))

    assert urls(made.desired.services) == ["http://a.prod", "http://b.prod"]
    assert made.desired.skipped == (
        Skipped(
            "ep_2",
            "http://evil.prod\\n6.6.6.6 x",
            'the url "http://evil.prod\\n6.6.6.6 x" has blanks, control or non-ASCII characters',
        ),
    )


def test_a_hostile_api_writes_no_line_outside_the_grammar() -> None:
    """The whole corpus at once among good endpoints: every one is listed with its reason, the good ones are served."""
    good = [ep(1000 + number, f"http://good-{number}.prod") for number in range(3)]
    objects = [case["object"] for case in HOSTILE]

    made = make(*objects[:150], *good, *objects[150:])

    assert len(made.desired.skipped) == len(HOSTILE) >= 200
    assert render(b"", made.desired.hosts_entries()) == (
        b"# BEGIN ngrokd managed section\n"
        b"10.107.0.2\tgood-0.prod\n10.107.0.3\tgood-1.prod\n10.107.0.4\tgood-2.prod\n"
        b"# END ngrokd managed section\n"
    )
    for skipped in made.desired.skipped:
        assert f"{skipped.id}{skipped.url}{skipped.reason}".isprintable()
        assert skipped.reason
        assert "pw@" not in skipped.url


FIELDS = [
    "id",
    "url",
    "public_url",
    "proto",
    "name",
    "description",
    "metadata",
    "port",
    "host",
    "hostport",
    "domain",
    "uri",
]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("poison", ["\n6.6.6.6\tevil.example", "\r\n#", "\x00", "\x1b[2J", "\t\u2028\u202e"])
def test_no_field_can_smuggle_a_line_into_the_hosts_file(field: str, poison: str) -> None:
    victim = {"id": "ep_1", "url": "http://a.prod", "public_url": "http://a.prod", "proto": "http"}
    victim[field] = victim.get(field, "") + poison

    made = make(victim, ep(2, "http://b.prod"))

    assert {host for _, host in made.desired.hosts_entries()} <= {"a.prod", "b.prod"}
    text = render(b"", made.desired.hosts_entries())
    assert b"evil" not in text
    assert all(line.count(b"\t") == (not line.startswith(b"#")) for line in text.splitlines())
    assert json.dumps(list(rows(made.desired)), ensure_ascii=False).isprintable()


def test_pooled_endpoints_are_one_service_that_goes_with_the_last() -> None:
    """Several endpoints with one URL; removing one of them must cut nobody off."""
    pool = AddressPool("10.107.0.0/16")
    three = make(ep(3, "http://a.prod"), ep(1, "http://a.prod:80/"), ep(2, "HTTP://A.prod."), pool=pool)
    assert [(s.endpoint.id, s.pool_size) for s in three.desired.services] == [("ep_1", 3)]

    one = make(ep(3, "http://a.prod"), previous=three.desired, pool=pool)
    assert [(s.endpoint.id, s.pool_size) for s in one.desired.services] == [("ep_3", 1)]
    assert not one
    assert one.summary() == "no change"

    none = make(previous=one.desired, pool=pool)
    assert none.desired.services == ()
    assert urls(none.removed) == ["http://a.prod"]


def test_removing_one_port_of_a_name_leaves_the_others() -> None:
    """The Go daemon took the address away with the first port, and with it everybody else's."""
    pool = AddressPool("10.107.0.0/16")
    both = make(ep(1, "http://a.prod"), ep(2, "tcp://a.prod:5432"), pool=pool)

    one = make(ep(2, "tcp://a.prod:5432"), previous=both.desired, pool=pool)

    assert urls(one.removed) == ["http://a.prod"]
    assert one.desired.hosts_entries() == both.desired.hosts_entries()
    assert one.desired.directory.lookup(("10.107.0.2", 5432)) is not None
    assert one.desired.directory.lookup(("10.107.0.2", 80)) is None


def test_of_two_schemes_at_one_door_the_same_one_wins_and_the_other_is_reported() -> None:
    listing = [ep(9, "tcp://a.prod:443"), ep(5, "https://a.prod"), ep(1, "tls://a.prod"), ep(7, "https://a.prod:443")]
    for seed in range(6):
        random.Random(seed).shuffle(listing)

        made = make(*listing)

        assert urls(made.desired.services) == ["https://a.prod"]
        assert made.desired.services[0].pool_size == 2
        assert reasons(made) == {
            "ep_1": "https://a.prod (ep_5) has the same host and port and is served",
            "ep_9": "https://a.prod (ep_5) has the same host and port and is served",
        }


def test_an_endpoint_listed_on_two_pages_counts_once() -> None:
    made = make(ep(1, "http://a.prod"), ep(2, "http://b.prod"), ep(1, "http://a.prod"))

    assert [s.pool_size for s in made.desired.services] == [1, 1]
    assert made.desired.skipped == ()


def test_a_change_at_the_same_door_is_a_change() -> None:
    pool = AddressPool("10.107.0.0/16")
    before = make(ep(1, "http://a.prod:443"), pool=pool)

    after = make(ep(1, "https://a.prod"), previous=before.desired, pool=pool)

    assert (after.added, after.removed) == ((), ())
    assert after.summary() == "1 changed (https://a.prod)"


def test_while_names_come_and_go_both_states_are_served() -> None:
    """The hosts file is written between two snapshots, and whatever stands in it must answer."""
    pool = AddressPool("10.107.0.0/16")
    before = make(ep(1, "http://goes.prod"), ep(2, "http://stays.prod"), pool=pool)
    after = make(ep(2, "https://stays.prod:80"), ep(3, "http://comes.prod"), previous=before.desired, pool=pool)

    between = after.transition()

    assert sorted(endpoint.url for _, endpoint in between) == [
        "http://comes.prod",
        "http://goes.prod",
        "https://stays.prod:80",
    ]


def test_where_nothing_goes_there_is_no_state_between() -> None:
    """One snapshot less to make, and to tell the data plane."""
    pool = AddressPool("10.107.0.0/16")
    before = make(ep(1, "http://a.prod"), pool=pool)
    after = make(ep(1, "http://a.prod"), ep(2, "http://b.prod"), previous=before.desired, pool=pool)

    assert after.transition() is after.desired.directory
    assert before.transition() is before.desired.directory


def test_a_skipped_endpoint_is_news_once_for_each_reason() -> None:
    """It is listed in every poll; the log shall not say so in every poll."""
    pool = AddressPool("10.107.0.0/16")
    first = make(ep(1, "http://*.a.prod"), ep(2, "ftp://b.prod"), pool=pool)
    again = make(ep(1, "http://*.a.prod"), ep(2, "http://*.b.prod"), previous=first.desired, pool=pool)

    assert [one.id for one in first.skipped] == ["ep_1", "ep_2"]
    assert [one.id for one in again.skipped] == ["ep_2"]
    assert len(again.desired.skipped) == 2


def test_the_garbage_collector_has_nothing_to_walk_over() -> None:
    """65,000 tracked objects would hold up every packet for as long as each full collection takes."""
    made = make(ep(1, "http://a.prod"), ep(2, "http://*.a.prod"))

    assert not gc.is_tracked(made.desired.services[0])
    assert not gc.is_tracked(made.desired.services[0].endpoint)
    assert not gc.is_tracked(made.desired.skipped[0])


def test_the_log_line_stays_short() -> None:
    made = make(*(ep(number, f"http://h{number}.prod") for number in range(9)))

    assert made.summary(2) == "9 added (http://h0.prod, http://h1.prod, ...)"


# Names that are not ours to take


def test_names_of_this_machine_and_of_the_servers_are_denied() -> None:
    refused = denied(machine=["Box", "box.example.com."], servers=["API.corp.example", "ingress.corp.example"])
    names = ["box", "box.example.com", "api.corp.example", "ingress.corp.example"]
    names += ["api.ngrok.com", "kubernetes-binding-ingress.ngrok.io", "other.example.com"]

    made = make(*(ep(number, f"http://{name}") for number, name in enumerate(names)), refused=refused)

    assert urls(made.desired.services) == ["http://other.example.com"]
    assert reasons(made)["ep_0"] == "it is this machine's own name"
    assert len(made.desired.skipped) == 6


def test_ngroks_own_names_are_denied_whatever_is_configured() -> None:
    made = make(ep(1, "https://api.ngrok.com"), ep(2, "https://kubernetes-binding-ingress.ngrok.io"), refused=Denied())
    assert len(made.desired.services) == 2  # an empty Denied denies nothing: `denied` is how one is made

    made = make(ep(1, "https://api.ngrok.com"), ep(2, "https://kubernetes-binding-ingress.ngrok.io"), refused=denied())
    assert made.desired.services == ()


def test_names_in_the_foreign_part_of_the_hosts_file_are_denied() -> None:
    found = survey(b"10.0.0.9 Box.Prod other\n#10.0.0.9 free.prod\n")

    made = make(ep(1, "http://box.prod"), ep(2, "http://free.prod"), refused=denied(hosts=found))

    assert urls(made.desired.services) == ["http://free.prod"]
    assert reasons(made) == {"ep_1": "box.prod stands in the hosts file already, outside our section"}


SHARED = [ep(1, "http://a.prod"), ep(2, "http://b.prod")]


def test_a_name_in_the_section_of_another_instance_stays_there() -> None:
    text = render(b"", [("10.9.0.2", "a.prod")], "tun1")

    made = make(*SHARED, refused=denied(hosts=survey(text)))

    assert urls(made.desired.services) == ["http://b.prod"]
    assert reasons(made) == {"ep_1": "a.prod is served by the instance on tun1"}


def test_a_name_that_is_ours_already_stays_ours_after_a_restart() -> None:
    """Our section of a killed run is still there, so we had it first."""
    text = render(render(b"", [("10.107.0.2", "a.prod")]), [("10.9.0.2", "b.prod")], "tun1")

    here = make(*SHARED, refused=denied(hosts=survey(text)))
    there = make(*SHARED, refused=denied(hosts=survey(text, "tun1"), instance="tun1"))

    assert (urls(here.desired.services), urls(there.desired.services)) == (["http://a.prod"], ["http://b.prod"])


def test_a_name_taken_by_two_at_the_same_moment_is_kept_by_one() -> None:
    text = render(render(b"", [("10.107.0.2", "a.prod")]), [("10.9.0.2", "a.prod")], "tun1")

    here = make(SHARED[0], refused=denied(hosts=survey(text)))
    there = make(SHARED[0], refused=denied(hosts=survey(text, "tun1"), instance="tun1"))

    assert (urls(here.desired.services), urls(there.desired.services)) == (["http://a.prod"], [])


# Everything vanishing at once


def test_an_empty_listing_after_three_endpoints_is_looked_at_twice() -> None:
    """An API that lists nothing is more often wrong than right."""
    pool = AddressPool("10.107.0.0/16")
    before = make(*(ep(number, f"http://h{number}.prod") for number in range(3)), pool=pool)

    first = make(previous=before.desired, pool=pool)
    assert first.confirm
    assert not first
    assert first.desired is before.desired

    second = make(previous=before.desired, pool=pool, confirmed=True)
    assert not second.confirm
    assert len(second.removed) == 3
    assert second.desired.services == ()
    assert len(pool.dump()) == 3


def test_a_listing_of_nothing_but_rubbish_is_looked_at_twice_as_well() -> None:
    before = make(*(ep(number, f"http://h{number}.prod") for number in range(3)))

    assert make(None, 7, {"id": []}, previous=before.desired).confirm


def test_pool_members_count_as_endpoints() -> None:
    before = make(*(ep(number, "http://h.prod") for number in range(3)))

    assert make(previous=before.desired).confirm


@pytest.mark.parametrize("count", [0, 1, 2])
def test_one_or_two_endpoints_may_go_at_once(count: int) -> None:
    before = make(*(ep(number, f"http://h{number}.prod") for number in range(count)))

    after = make(previous=before.desired)

    assert not after.confirm
    assert len(after.removed) == count


# Limits


def test_a_full_subnet_serves_the_others_and_lists_who_has_no_address() -> None:
    pool = AddressPool("10.107.0.0/29")
    before = make(*(ep(number, f"http://h{number}.prod") for number in range(5)), pool=pool)

    after = make(
        *(ep(number, f"http://h{number}.prod") for number in range(5)),
        ep(7, "http://a.prod"),
        ep(8, "tcp://a.prod:1"),
        previous=before.desired,
        pool=pool,
    )

    assert not after
    assert after.desired.without_address == ("a.prod",)
    assert reasons(after) == {
        "ep_7": "no address is left in 10.107.0.0/29",
        "ep_8": "no address is left in 10.107.0.0/29",
    }


def test_beyond_the_limit_who_is_served_stays_served() -> None:
    before = make(ep(1, "http://m.prod"), ep(2, "http://n.prod"), limit=2)

    after = make(
        ep(0, "http://a.prod"), ep(1, "http://m.prod"), ep(2, "http://n.prod"), previous=before.desired, limit=2
    )

    assert not after
    assert reasons(after) == {"ep_0": "more than 2 endpoints (limits.endpoints)"}


# Flags


def test_flags_stay_with_the_names_that_stay() -> None:
    """They are found out later, in the background, and the next poll must not forget them."""
    pool = AddressPool("10.107.0.0/16")
    made = make(ep(1, "http://a.prod"), ep(2, "http://b.prod"), pool=pool)

    flagged = made.desired.with_flags({"a.prod": {SHADOWS_PUBLIC}, "b.prod": {SHADOWS_PUBLIC}, "gone.prod": ["x"]})
    after = make(ep(1, "http://a.prod"), previous=flagged, pool=pool)

    assert flagged.flags == {"a.prod": ("shadows-public",), "b.prod": ("shadows-public",)}
    assert after.desired.flags == {"a.prod": ("shadows-public",)}
    assert next(rows(after.desired))["flags"] == ["shadows-public"]


# What `list` answers


def test_rows_have_the_go_daemons_fields_first() -> None:
    made = make(ep(2, "tcp://db.prod:5432", proto="tcp", name="db"), ep(3, "tcp://db.prod:5432"))

    (row,) = rows(made.desired)

    assert list(row)[:8] == [
        "id", "hostname", "ip", "port", "url", "local_listener", "network_port", "listen_interface",
    ]  # fmt: skip
    assert row == {
        "id": "ep_2",
        "hostname": "db.prod",
        "ip": "10.107.0.2",
        "port": 5432,
        "url": "tcp://db.prod:5432",
        "local_listener": True,
        "network_port": 0,
        "listen_interface": "virtual",
        "ip6": "",
        "proto": "tcp",
        "name": "db",
        "pool_size": 2,
        "flags": [],
    }
    (row,) = rows(made.desired, Twins(IPv4Network("10.107.0.0/16"), IPv6Network("fd00:1::/64")))
    assert row["ip6"] == "fd00:1::a6b:2"


# The last known state


def test_the_last_known_endpoints_give_the_same_state() -> None:
    """A start while the API is down serves what was served, at the same addresses."""
    pool = AddressPool("10.107.0.0/16")
    listing = [
        ep(1, "http://a.prod", name="naïve", description="two\nlines"),
        ep(2, "http://a.prod"),
        ep(3, "tcp://b.prod:5432", proto="tcp"),
        ep(4, "rubbish"),
    ]
    made = make(*listing, pool=pool)

    last = load_endpoints(dump_endpoints(made.desired, 1795132800.9, "ingress.example:443"))
    again = make(*last.listing, pool=AddressPool.load("10.107.0.0/16", pool.dump_json(), pool.dump_state_json()))

    assert (last.saved_at, last.ingress_endpoint, last.problem) == (1795132800.0, "ingress.example:443", "")
    assert [(s.endpoint.id, s.endpoint.url, s.address, s.pool_size) for s in again.desired.services] == [
        (s.endpoint.id, s.endpoint.url, s.address, s.pool_size) for s in made.desired.services
    ]
    assert again.desired.skipped == ()


def test_saving_what_was_loaded_gives_the_same_bytes() -> None:
    """Text that was made printable once is not escaped again at each restart."""
    made = make(ep(1, "http://a.prod", name="a\\b\n", description="\u202e"))
    first = dump_endpoints(made.desired, 1.0)
    for _ in range(3):
        made = make(*load_endpoints(dump_endpoints(made.desired, 1.0)).listing)

    assert dump_endpoints(made.desired, 1.0) == first


def test_an_empty_state_is_saved_and_read() -> None:
    last = load_endpoints(dump_endpoints(NOTHING, 5.0))

    assert (last.listing, last.saved_at, last.problem) == ((), 5.0, "")


def test_no_file_is_no_problem() -> None:
    assert load_endpoints(None).problem == ""


@pytest.mark.parametrize(
    "data", [b"", b"null", b"[]", b"{}", b'{"endpoints": {}}', b"\xff", b'{"endpoints": [', b"[" * 100_000, b"9" * 9999]
)
def test_a_damaged_file_is_one_line_and_an_empty_start(data: bytes) -> None:
    last = load_endpoints(data)

    assert last.listing == ()
    assert last.problem.startswith("endpoints.json ")
    assert last.problem.isprintable()


@pytest.mark.parametrize("saved_at", ["null", "true", '"x"', "-5", "1e400", "1.5"])
def test_a_time_that_is_none_is_unknown(saved_at: str) -> None:
    last = load_endpoints(f'{{"saved_at": {saved_at}, "endpoints": [7]}}'.encode())

    assert (last.saved_at, last.listing) == (0.0, (7,))


@pytest.mark.parametrize("ingress", ['""', "7", "null", '"a b:443"', '"x\\u001b[2J:443"', '"x\\n:443"'])
def test_an_ingress_that_is_none_is_unknown(ingress: str) -> None:
    """It is dialled and shown, so what could spoil a terminal is forgotten; the API will say it again."""
    assert load_endpoints(f'{{"ingress_endpoint": {ingress}, "endpoints": []}}'.encode()).ingress_endpoint == ""


@given(st.binary(max_size=100))
def test_any_bytes_can_be_loaded(data: bytes) -> None:
    assert load_endpoints(data).problem.isprintable()


# Generated listings


names = st.sampled_from(["a.prod", "b.prod", "c.prod", "B.prod.", "localhost", "x\n"])
objects: st.SearchStrategy[Any] = st.one_of(
    st.builds(
        lambda number, scheme, name, port: ep(number, f"{scheme}://{name}{port}"),
        st.integers(1, 6),
        st.sampled_from(["http", "https", "tcp"]),
        names,
        st.sampled_from(["", ":80", ":443", ":0"]),
    ),
    st.fixed_dictionaries({"id": st.sampled_from(["ep_1", ["ep_1"], {}, 0, None]), "url": st.just("http://a.prod")}),
    st.none(),
)
listings = st.lists(objects, max_size=12)


@given(listings, st.randoms(use_true_random=False))
def test_the_order_of_the_listing_does_not_matter(listing: list[object], chance: random.Random) -> None:
    shuffled = list(listing)
    chance.shuffle(shuffled)

    one, other = make(*listing), make(*shuffled)

    assert one.desired == other.desired


@given(st.lists(listings, min_size=1, max_size=5))
def test_differences_add_up_and_planning_twice_changes_nothing(polls: list[list[object]]) -> None:
    """added, removed and changed tell exactly how one state becomes the next."""
    pool, state = AddressPool("10.107.0.0/29"), NOTHING
    for listing in polls:
        made = make(*listing, previous=state, pool=pool, confirmed=True)
        doors = {(s.endpoint.host, s.endpoint.port): s for s in state.services}
        for service in made.removed:
            del doors[(service.endpoint.host, service.endpoint.port)]
        for service in [*made.added, *(after for _, after in made.changed)]:
            doors[(service.endpoint.host, service.endpoint.port)] = service
        assert doors.keys() == {(s.endpoint.host, s.endpoint.port) for s in made.desired.services}

        again = make(*listing, previous=made.desired, pool=pool, confirmed=True)
        assert not again
        assert again.desired == made.desired
        assert again.desired.directory is made.desired.directory
        state = made.desired


def test_65533_endpoints_are_planned_and_planned_again() -> None:
    """A whole /16, start and poll; the bound is generous because the tests share their machine."""
    listing = [ep(number, f"http://svc-{number}.ns{number % 50}.prod", proto="http") for number in range(65_533)]
    pool = AddressPool("10.107.0.0/16")
    started = time.monotonic()

    first = plan(NOTHING, listing, pool, FREE, 0.0)
    second = plan(first.desired, listing, pool, FREE, 30.0)

    assert time.monotonic() - started < 10.0
    assert len(first.added) == 65_533
    assert not second
    assert second.desired.services is first.desired.services
    assert len(list(rows(first.desired))) == 65_533
    assert len(load_endpoints(dump_endpoints(first.desired, 0.0)).listing) == 65_533
