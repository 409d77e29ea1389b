"""What the daemon and its workers say to each other, as bytes."""

from __future__ import annotations

import math
import struct
from dataclasses import fields, is_dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.dataplane import (
    Accept,
    CaFound,
    DataPlaneSettings,
    DeviceLost,
    FlowInfo,
    Limit,
    Pause,
    Reach,
    RecordOrder,
    Trust,
    Use,
)
from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.names.twins import Twins
from ngrokd.relay.handler import FlowEvent
from ngrokd.relay.ingress import Probe
from ngrokd.relay.stock import PoolSettings
from ngrokd.workers.messages import (
    FROM_WORKER,
    MOST_FROM_WORKER,
    MOST_TO_WORKER,
    TO_WORKER,
    AskCounts,
    AskFlows,
    AskProbe,
    Attach,
    BadMessage,
    CloseFlow,
    Commit,
    Counts,
    Done,
    Drain,
    Drained,
    End,
    Entries,
    Failed,
    Flows,
    Frames,
    Hello,
    Lost,
    Probed,
    ReadTape,
    Run,
    Said,
    StartTape,
    StopTape,
    Taped,
    Truth,
    begin,
    encode,
    settings_of,
)
from tun import StackSettings

ENDPOINT = Endpoint("ep_1", "http://a.prod", "http", "a.prod", 80, "http", "name", "words\u2028")
TWINS = Twins(IPv4Network("10.107.0.0/16"), IPv6Network("fd00:107::/64"))
SETTINGS = DataPlaneSettings(
    StackSettings(mtu=1400, network6=int(IPv6Network("fd00:107::/64").network_address), mask6=(1 << 128) - (1 << 64)),
    secret=b"s" * 32,
    refused_networks=("10.107.0.0/16",),
    pool=PoolSettings(7, 8.5, 1),
    twins=TWINS,
    first_flow=2,
    flow_step=3,
)
FLOW = FlowInfo(4, "a.prod", 80, ("10.107.0.1", 40000), ("10.107.0.2", 80), "ESTABLISHED", 1.5, 0.01, 10, 20, 0.001)
SAID: tuple[Any, ...] = (
    Attach("ngrokd0", 1500, True),
    Entries(((b"\x0a\x6b\x00\x02", ENDPOINT),), ((b"\x0a\x6b\x00\x03", 443),)),
    Commit(300.0),
    Run(),
    Drain(0.5),
    End(),
    Use(Credentials(b"KEY", b"CERTIFICATE", 1.0, math.inf)),
    Reach("ingress.example", 443, ("192.0.2.1", "2001:db8::1")),
    Trust(True, b"PEM", ("ab:cd",)),
    Accept(frozenset({b"\x7f\x00\x00\x01", bytes(16)}), ("172.17.0.0/16",)),
    Accept(None),
    Pause(True),
    Limit(100, 20, 30, 1 << 16, 1 << 20, 7, 2.5, PoolSettings(4, 60.0, 2)),
    AskCounts(),
    AskFlows(),
    CloseFlow(7),
    AskProbe("a.prod", 80),
    Hello("0.1.0", 4711),
    Counts({"flows": 1}, {"ready": 2, "dial_ms": 0.5, "idle_limit_s": None, "problem": ""}, "down"),
    Flows((FLOW,)),
    Truth(False),
    Probed(Probe((("connect", 0.001), ("tls", 0.002)), "192.0.2.1", "TLSv1.3", problem="no")),
    StartTape(3, RecordOrder(("10.107.0.2",), (80,), 60, duration_s=5.0, application="tests")),
    ReadTape(3),
    StopTape(3),
    Taped(b"\x0a\x0d", 1, 2, "packets"),
    Done("no", "do this"),
    Said(30, "ngrokd.relay", "line"),
    Lost(3),
    Failed("no rights", "do that", 77),
    Drained(),
    CaFound(b"PEM"),
    DeviceLost("deleted"),
    FlowEvent("opened", "a.prod", 80, ("10.107.0.1", 40000), "opened", "connected", flow=3, age_s=0.1),
)


def read(data: bytes, kinds: tuple[type, ...] = (*TO_WORKER, *FROM_WORKER), most: int = 1 << 20) -> list[Any]:
    return list(Frames(kinds, most).feed(data))


@pytest.mark.parametrize("message", SAID, ids=lambda message: type(message).__name__)
def test_what_is_said_arrives(message: Any) -> None:
    """Whatever is added to the lists of messages is to be added here: the next test sees to it."""
    assert read(encode(message, 5)) == [(5, message)]


def test_every_message_has_its_example() -> None:
    kinds = {type(message).__name__ for message in SAID} | {"Begin"}
    assert kinds == {kind.__name__ for kind in (*TO_WORKER, *FROM_WORKER)}
    assert all(is_dataclass(kind) for kind in (*TO_WORKER, *FROM_WORKER))


def test_the_settings_arrive_whole() -> None:
    """A network of IPv6 is a number of 128 bits, which MessagePack does not have."""
    [(_, message)] = read(encode(begin(1, "0.1.0", SETTINGS)))

    received = settings_of(message)
    assert (message.index, message.version) == (1, "0.1.0")
    for field in fields(SETTINGS):
        if field.name != "twins":
            assert getattr(received, field.name) == getattr(SETTINGS, field.name), field.name
    assert received.twins is not None
    assert (received.twins.subnet, received.twins.subnet6) == (TWINS.subnet, TWINS.subnet6)


@given(st.lists(st.sampled_from(SAID), max_size=6), st.integers(1, 200))
def test_it_does_not_matter_how_the_bytes_are_cut(said: list[Any], piece: int) -> None:
    data = b"".join(encode(message, number) for number, message in enumerate(said))
    frames = Frames((*TO_WORKER, *FROM_WORKER), 1 << 20)

    received = [found for at in range(0, len(data), piece) for found in frames.feed(data[at : at + piece])]

    assert received == list(enumerate(said))
    assert not frames.unfinished


def test_a_beginning_waits_for_its_rest() -> None:
    data = encode(Said(20, "ngrokd", "x" * 1000))
    frames = Frames(FROM_WORKER, 1 << 20)

    assert list(frames.feed(data[:-1])) == []
    assert frames.unfinished
    assert len(list(frames.feed(data[-1:]))) == 1


def frame(body: Any) -> bytes:
    data = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    return struct.pack(">I", len(data)) + data


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (struct.pack(">I", MOST_FROM_WORKER + 1), "a message of 1048577 bytes"),
        (frame(["Shutdown", 0, {}]), "called 'Shutdown'"),
        (frame(["Use", 0, {}]), "called 'Use'"),  # an order, and this side gives them
        (frame(["Hello", 0, {"version": 1, "pid": 2}]), "cannot be read"),
        (frame(["Hello", 0, {"pid": 2}]), "cannot be read"),
        (frame(["Hello", 0]), "cannot be read"),
        (frame(["Hello", "x", {}]), "cannot be read"),
        (frame(["Said", 0, {"level": 1 << 70 - 7, "logger": "x", "message": b"\xff"}]), "cannot be read"),
        (frame({"a": 1}), "cannot be read"),
        (frame(b"\xc1"), "cannot be read"),
        (frame(b"\x93\xa5Hello\x00" + b"\x81" * 100_000), "cannot be read"),
        (frame(b""), "cannot be read"),
    ],
)
def test_junk_has_one_error(data: bytes, says: str) -> None:
    """A worker may be in the hands of somebody else."""
    with pytest.raises(BadMessage, match="message") as caught:
        read(data, FROM_WORKER, MOST_FROM_WORKER)

    assert says in str(caught.value)
    assert str(caught.value).isprintable()


def test_unknown_fields_are_ignored() -> None:
    """Both sides are the same program; a field more does no harm."""
    assert read(frame(["Truth", 3, {"truth": True, "more": 1}])) == [(3, Truth(True))]


def test_what_cannot_travel_is_our_own_mistake() -> None:
    with pytest.raises(TypeError, match="object does not travel"):
        encode(Truth(object()))  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        encode(CloseFlow(1 << 64))


def test_the_limits_leave_room_for_what_is_said() -> None:
    """A trust store of a whole system is below a megabyte; a piece of the directory is far below it."""
    piece = Entries(tuple((bytes(4), ENDPOINT) for _ in range(250)))
    rows = Flows((FLOW,) * 250)

    assert len(encode(piece)) < MOST_TO_WORKER / 100
    assert len(encode(rows)) < MOST_FROM_WORKER / 5


def test_secrets_are_not_shown() -> None:
    assert "KEY" not in repr(Use(Credentials(b"KEY", b"C")))
    assert "sss" not in repr(begin(0, "", SETTINGS))
