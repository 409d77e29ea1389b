"""The files of the state directory: the map of addresses and the last known endpoints, however damaged.

* reading never fails; what could not be used has a printable line in `problems`, a file that is not there has none;
* every address that is held is a usable one of the subnet, held by one name that may be served;
* of a sound map every sound entry is kept, a name never loses its address to another;
* what is written reads back the same, without a problem; what is assigned afterwards keeps all that was held.
"""

from __future__ import annotations

import json
from ipaddress import IPv4Address, IPv4Network
from typing import Final

from fuzz.urls import model_name
from ngrokd.names.addresses import AddressPool
from ngrokd.names.reconcile import load_endpoints

CORPUS: Final = "state"
MAX_LEN: Final = 800
TOKENS: Final = (
    b'{"a.prod":"10.107.0.2"}', b'"10.107.0.3"', b'"10.107.0.1"', b'"10.107.0.255"', b'"10.107.0.0"',
    b'"10.108.0.5"', b'"B.Prod"', b'"wildcard:x.y"', b'"released":{"a.prod":1}', b'"subnet":"10.108.0.0/24"',
    b'"remembered":{"10.107.0.0/24":{', b"null", b"1e999", b"NaN", b"[]", b"{}", b"\\u0000", b"\\ud800", b"\xff",
    b"9" * 30, b'"version":1', b'"endpoints":[', b'"saved_at":', b'"ingress_endpoint":"a:1"', b"|",
)  # fmt: skip

SUBNET: Final = IPv4Network("10.107.0.0/24")


def run_one(data: bytes) -> None:
    """Two files, separated by the first bar; then the first one as `endpoints.json`."""
    mappings, _, state = data.partition(b"|")
    pool = AddressPool.load(SUBNET, mappings or None, state or None)
    check_pool(pool)
    if not data:
        assert not pool.problems
    kept = pool.dump()
    check_kept(mappings, kept, state)

    again = AddressPool.load(SUBNET, pool.dump_json(), pool.dump_state_json())
    assert again.dump() == kept, "written and read it is something else"
    assert again.dump_state() == pool.dump_state()
    assert again.problems == []

    before = {name: pool.get(name) for name in kept}
    given = pool.assign(["zz.new", *sorted(set(kept) & {"a.prod", "b.prod"})], 2_000_000_000.0)
    check_pool(pool)
    assert pool.get("zz.new") == given["zz.new"]
    assert all(pool.get(name) == address for name, address in before.items()), "a name lost its address"
    known = load_endpoints(mappings)
    assert known.problem.isprintable()
    assert known.saved_at >= 0.0
    assert known.ingress_endpoint.isprintable()
    assert not known.problem or not known.listing


def check_pool(pool: AddressPool) -> None:
    for problem in pool.problems:
        assert problem.isprintable()
        assert len(problem) < 500
    mapping = pool.dump()
    owners: dict[str, str] = {}
    for name, address in mapping.items():
        assert IPv4Address(address) in SUBNET
        assert 2 <= int(IPv4Address(address)) & 255 <= 254
        plain = name.removeprefix("wildcard:")
        assert model_name(plain), name
        folded = name.lower().removesuffix(".") if not name.startswith("wildcard:") else name
        assert owners.setdefault(address, folded) == folded, "two names share an address"
    assert pool.held <= pool.capacity
    assert json.loads(pool.dump_json()) == mapping
    released = pool.dump_state()["released"]
    assert isinstance(released, dict)
    assert all(pool.get(name) is not None for name in released)


def check_kept(mappings: bytes, kept: dict[str, str], state: bytes) -> None:
    """Nothing that could stay has gone."""
    try:
        value = json.loads(mappings)
    except (ValueError, RecursionError):
        return
    if not isinstance(value, dict) or state:
        return
    sound = {
        name: address
        for name, address in value.items()
        if model_name(name)
        and name == name.lower().removesuffix(".")
        and isinstance(address, str)
        and is_usable(address)
    }
    for name, address in sound.items():
        if list(value.values()).count(address) == 1:
            assert kept.get(name) == address, "an entry is lost"


def is_usable(text: str) -> bool:
    parts = text.split(".")
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) <= 3 for part in parts):
        return False
    if any(len(part) > 1 and part[0] == "0" for part in parts):
        return False
    return parts[:3] == ["10", "107", "0"] and 2 <= int(parts[3]) <= 254


if __name__ == "__main__":
    from fuzz.driver import main

    main(__file__)
