"""A flood of SYNs at the whole daemon, while programs of this host go on and come anew. Longer: `make soak-flood`."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from tests.netns.flood import CURL_S, RAW_KINDS, Damage, RawSyns, flood, problems
from tests.netns.support import Namespace
from tun.device.linux import open_tun
from tun.wire import verdict
from tun.wire.ipv4 import Ipv4Header, parse_ipv4
from tun.wire.tcp import SYN, Segment, parse_tcp, verify_tcp

RATE = 20_000
SECONDS = 4.0
ENDPOINT = "10.107.0.2"


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", ["own", "guests", "connect"])
def test_programs_are_served_while_somebody_floods(netns: Callable[[], Namespace], kind: str) -> None:
    """Under this host's address by hand, under thousands that are allowed, and as an ordinary user with sockets."""
    found = ["not tried"]
    for _ in range(3):  # the machine may have been busy with other things
        damage = flood(netns(), kind, SECONDS, RATE, calm_s=0.0 if kind == "guests" else 10.0)
        if kind == "guests":  # the few of them that were dialled for may complete their handshake for 31 s
            assert damage.left["half_open_count"] < 200
            damage.left.clear()
        assert damage.drops["first_try"] > damage.sent // 2
        found = problems(damage)
        if damage.rate < RATE * (0.95 if kind in RAW_KINDS else 0.3):
            found.append(f"only {damage.rate:.0f} SYNs a second")
        if not found:
            break
    assert found == [], str(damage)


def test_the_judge_of_floods_sees_what_is_wrong() -> None:
    """Or the test above could not fail."""
    good = Damage(
        "own", 30.0, sent=600_000, read=590_000, lost=10_000, curls=[0.1] * 28 + [CURL_S + 1.0] * 2, echoes=300,
        before_kib=1000, peak_kib=50_000, undecided=1024, half_open=1024,
    )  # fmt: skip
    assert problems(good) == []

    for name, value in {
        "read": 580_000,
        "curls": [0.1] * 27 + [float("inf")] * 3,
        "echoes": 299,
        "peak_kib": 1000 + 50 * 1024,
        "undecided": 1025,
        "half_open": 1025,
        "left": {"flow_count": 1},
    }.items():
        bad = Damage(**{**vars(good), name: value})
        assert len(problems(bad)) == 1, name


@pytest.mark.parametrize("kind", RAW_KINDS)
def test_what_a_flood_is_made_of(netns: Callable[[], Namespace], kind: str) -> None:
    """Whole packets with right checksums, each SYN another one, from and to where it says: what is dropped is a SYN."""
    ns = netns()
    tun = ns.call(open_tun, "ngrokd0")
    ns.run(["ip", "link", "set", "ngrokd0", "addrgenmode", "none"])
    ns.run(["ip", "link", "set", "ngrokd0", "up", "mtu", "1500", "txqueuelen", "5000"])
    syns = ns.call(RawSyns, "ngrokd0", kind, ENDPOINT, 81 if kind == "closed" else 80, 1)
    assert [syns.send() for _ in range(40)] == [64] * 40
    syns.close()

    seen: set[bytes] = set()
    sources: set[bytes] = set()
    destinations: set[tuple[bytes, int]] = set()
    header, segment = Ipv4Header(), Segment()
    for _ in range(40 * 64):
        packet = tun.read()
        assert packet is not None
        assert not tun.verified(packet)
        at = tun.prefix
        assert parse_ipv4(packet, at, header) == verdict.OK
        assert parse_tcp(packet, at + 20, len(packet), segment) == verdict.OK
        assert verify_tcp(packet, at + 20, len(packet), header.source, header.destination)
        assert segment.flags == SYN
        seen.add(packet[at + 12 : at + 28])
        sources.add(header.source)
        destinations.add((header.destination, segment.destination_port))
    tun.close()

    assert len(seen) == (2000 if kind in ("again", "patient") else 2560)
    assert len(sources) > 2000 if kind == "guests" else len(sources) == 1
    assert all(source[:2] == (b"\xac\x10" if kind in ("guest", "guests") else b"\x0a\x6b") for source in sources)
    if kind == "nobody":
        assert len(destinations) > 2000
        assert all(struct.unpack("!I", address)[0] >= 0x0A6B8000 for address, _ in destinations)
    else:
        assert destinations == {(b"\x0a\x6b\0\x02", 81 if kind == "closed" else 80)}
