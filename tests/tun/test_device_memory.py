"""The cable for tests, and the one that damages what it carries. What all devices share: test_device_contract.py."""

from __future__ import annotations

import math
from random import Random

import pytest
import trio
import trio.testing

from tests.tun.packets import FIN, PSH, parse, rfc1071, segment, segment_header, tcp_checksum_is_right, udp
from tun.device.base import Device
from tun.errors import DeviceError
from tun.testing.memory import Faults, FaultyDevice, memory_pair, split_segment


def drain(device: Device) -> list[bytes]:
    """What there is to read now, without the prefix."""
    packets = []
    while (packet := device.read()) is not None:
        packets.append(packet[device.prefix :])
    return packets


def numbered(count: int) -> list[bytes]:
    return [segment(f"number {number}".encode(), sequence=number) for number in range(count)]


def payloads(packets: list[bytes]) -> list[bytes]:
    return [parse(packet).payload for packet in packets]


# The cable


async def test_both_directions_are_independent() -> None:
    one, other = memory_pair(names=("ours", "theirs"), mtu=9000)

    one.write_packet(segment(b"there"))
    other.write_packet(segment(b"back"))

    assert drain(one) == [segment(b"back")]
    assert drain(other) == [segment(b"there")]
    assert (one.name, other.name, one.mtu, one.written) == ("ours", "theirs", 9000, 1)


async def test_good_checksums_are_vouched_for() -> None:
    """As cards do, so that both ways of a stack, trusting and checking, are walked in tests."""
    one, other = memory_pair()
    plain_one, plain_other = memory_pair(vouch=False)
    for device in (one, plain_one):
        device.write(segment_header(1), (b"x",), 0)

    assert other.verified(other.read() or b"")
    assert not plain_other.verified(plain_other.read() or b"")


@pytest.mark.parametrize(
    "packet",
    [segment(b"x", good=False), udp(b"x", ("10.107.0.1", 1), ("10.107.0.2", 2)), b"", b"E", b"\xff" * 60, bytes(60)],
    ids=["wrong", "udp", "empty", "short", "noise", "zeros"],
)
async def test_nothing_else_is_vouched_for(packet: bytes) -> None:
    """Whatever a test feeds in, the answer is no and never an exception."""
    _, other = memory_pair()

    assert not other.verified(packet)


async def test_a_full_cable_says_so_and_tells_when_there_is_room() -> None:
    """Nothing is queued without bound, and nothing is lost."""
    one, other = memory_pair(capacity=2)
    room: list[bool] = []

    async def write_when_there_is_room() -> None:
        await one.wait_writable()
        room.append(one.write_packet(segment(b"3")))

    assert one.write_packet(segment(b"1"))
    assert one.write(segment_header(1), (b"2",), 0)
    assert not one.write_packet(segment(b"3"))
    assert not one.write(segment_header(1), (b"3",), 0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_when_there_is_room)
        await trio.testing.wait_all_tasks_blocked()
        assert room == []
        other.read()

    assert room == [True]
    assert payloads(drain(other)) == [b"2", b"3"]


async def test_two_tasks_cannot_wait_for_the_same_device() -> None:
    """Each would take the other's event."""
    one, other = memory_pair(capacity=1)
    one.write_packet(segment())

    for wait in (one.wait_readable, one.wait_writable):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await wait()
            nursery.cancel_scope.cancel()
    assert other.read() is not None


async def test_closing_one_end_takes_the_link_down_at_the_other() -> None:
    one, other = memory_pair()
    one.write_packet(segment(b"still on the way"))

    one.close()

    assert payloads(drain(other)) == [b"still on the way"]
    assert other.write_packet(segment(b"nobody there"))
    assert other.drops == {"link_down": 1}
    await other.wait_writable()


async def test_a_writer_that_waits_for_room_learns_that_the_other_end_is_gone() -> None:
    one, other = memory_pair(capacity=1)
    one.write_packet(segment())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(one.wait_writable)
        await trio.testing.wait_all_tasks_blocked()
        other.delete()

    with pytest.raises(DeviceError):
        other.read()


# Splitting


def test_pieces_add_up_to_the_segment() -> None:
    """Sequence numbers go on over 2**32, identifications count up, FIN and PSH wait for the end, CWR leads."""
    cwr = 0x80
    payload = Random(5).randbytes(3500)
    whole = segment(payload, sequence=2**32 - 1460, flags=FIN | PSH | 16 | cwr, options=bytes(12))

    pieces = split_segment(whole, 1448)

    seen = [parse(piece) for piece in pieces]
    assert [one.sequence for one in seen] == [2**32 - 1460, 2**32 - 12, 1436]
    assert [one.flags for one in seen] == [16 | cwr, 16, FIN | PSH | 16]
    assert [len(one.payload) for one in seen] == [1448, 1448, 604]
    assert b"".join(one.payload for one in seen) == payload
    assert [int.from_bytes(piece[4:6]) for piece in pieces] == [7, 8, 9]
    assert all(tcp_checksum_is_right(piece) for piece in pieces)
    assert all(int.from_bytes(piece[2:4]) == len(piece) and rfc1071(piece[:20]) == 0xFFFF for piece in pieces)


def test_a_segment_that_fits_is_one_piece() -> None:
    assert split_segment(segment(b"small", flags=PSH | 16), 1460) == [segment(b"small", flags=PSH | 16)]


# Faults


async def test_without_faults_nothing_happens_to_packets() -> None:
    one, other = memory_pair()
    faulty = FaultyDevice(one, Random(1))

    faulty.write(segment_header(3000), (bytes(3000),), 1460)
    other.write_packet(segment(b"back"))

    assert drain(other) == [segment(bytes(3000))]
    packet = faulty.read()
    assert packet is not None
    assert faulty.verified(packet)
    assert packet[1:] == segment(b"back")
    assert faulty.faults == {}


async def test_packets_are_lost_in_the_direction_asked_for() -> None:
    one, other = memory_pair()
    faulty = FaultyDevice(one, Random(2), reading=Faults(loss=0.5))
    for packet in numbered(100):
        faulty.write_packet(packet)
        other.write_packet(packet)

    assert len(drain(other)) == 100
    assert len(drain(faulty)) == 100 - faulty.faults["lost"]
    assert 30 < faulty.faults["lost"] < 70


async def test_packets_arrive_twice() -> None:
    one, other = memory_pair()
    faulty = FaultyDevice(one, Random(2), reading=Faults(duplication=1), writing=Faults(duplication=1))
    faulty.write(segment_header(1), (b"x",), 0)
    other.write_packet(segment(b"y"))

    assert payloads(drain(other)) == [b"x", b"x"]
    assert payloads(drain(faulty)) == [b"y", b"y"]
    assert faulty.faults == {"duplicated": 2}


async def test_one_bit_is_wrong_and_nobody_vouches_for_it() -> None:
    """The checksum was right before, so the receiver's own test must find it."""
    one, other = memory_pair()
    faulty = FaultyDevice(one, Random(4), reading=Faults(corruption=1), writing=Faults(corruption=1))
    sent = segment(b"payload")
    for _ in range(200):
        assert faulty.write(segment_header(7), (b"payload",), 0)
        other.write_packet(sent)

    arrived = [faulty.read() for _ in range(200)]
    written = drain(other)

    assert not any(packet is None or faulty.verified(packet) for packet in arrived)
    assert not any(other.verified(packet) for packet in written if packet[:20] == sent[:20])
    # A damaged length cannot be written: devices refuse a packet that contradicts itself.
    assert len(written) > 150
    for packet in [packet[1:] for packet in arrived if packet] + written:
        assert (int.from_bytes(packet) ^ int.from_bytes(sent)).bit_count() == 1


async def test_packets_are_late(autojump_clock: trio.testing.MockClock) -> None:
    """Delay needs no task of its own: the wait for packets ends in time."""
    one, other = memory_pair()
    faulty = FaultyDevice(one, Random(1), reading=Faults(delay_s=0.25), writing=Faults(delay_s=0.5))
    began = trio.current_time()
    other.write_packet(segment(b"late"))
    faulty.write(segment_header(5), (b"later",), 0)

    assert faulty.read() is None
    await faulty.wait_readable()
    assert trio.current_time() - began == pytest.approx(0.25)
    assert payloads(drain(faulty)) == [b"late"]
    assert other.read() is None

    with trio.move_on_after(10):
        await faulty.wait_readable()  # a pump waits anyway, and what is due leaves meanwhile
    assert payloads(drain(other)) == [b"later"]


async def test_a_write_during_the_wait_leaves_in_time(autojump_clock: trio.testing.MockClock) -> None:
    """Other tasks write while the pump waits for packets."""
    one, other = memory_pair()
    faulty = FaultyDevice(one, Random(1), writing=Faults(delay_s=0.5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(faulty.wait_readable)
        await trio.sleep(1)
        began = trio.current_time()
        faulty.write_packet(segment(b"x"))
        await other.wait_readable()
        assert trio.current_time() - began == pytest.approx(0.5)
        nursery.cancel_scope.cancel()

    assert payloads(drain(other)) == [b"x"]


async def test_later_packets_overtake(autojump_clock: trio.testing.MockClock) -> None:
    one, other = memory_pair()
    faulty = FaultyDevice(one, Random(6), reading=Faults(reordering=0.3, hold_s=0.01))
    sent = numbered(50)
    for packet in sent:
        other.write_packet(packet)

    arrived = drain(faulty)
    while len(arrived) < 50:
        await faulty.wait_readable()
        arrived += drain(faulty)

    assert arrived != sent
    assert sorted(arrived) == sorted(sent)
    assert 5 < faulty.faults["reordered"] < 25


async def test_large_segments_can_be_cut_so_that_pieces_get_lost() -> None:
    """Losing 64 KiB at a time would test little but timeouts."""
    one, other = memory_pair()
    faults = Faults(loss=0.5)
    faulty = FaultyDevice(one, Random(2), reading=faults, writing=faults, split=True)

    faulty.write(segment_header(14_600), (bytes(14_600),), 1460)
    lost = faulty.faults["lost"]
    assert 0 < lost < 10
    assert [len(payload) for payload in payloads(drain(other))] == [1460] * (10 - lost)

    other.write(segment_header(14_600), (bytes(14_600),), 1460)
    arrived = payloads(drain(faulty))
    lost = faulty.faults["lost"] - lost
    assert 0 < lost < 10
    assert [len(payload) for payload in arrived] == [1460] * (10 - lost)


async def test_a_full_device_behind_loses_nothing() -> None:
    one, other = memory_pair(capacity=1)
    faulty = FaultyDevice(one, Random(1))
    for packet in numbered(3):
        assert faulty.write_packet(packet)

    arrived: list[bytes] = []
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(faulty.wait_readable)
            while len(arrived) < 3:
                await other.wait_readable()
                arrived += drain(other)
            nursery.cancel_scope.cancel()

    assert arrived == numbered(3)


def test_the_same_dice_make_the_same_faults_and_no_event_loop_is_needed() -> None:
    """A failure that chance found can be found again. The clock is the caller's."""

    def run(seed: int) -> tuple[list[bytes], dict[str, int]]:
        time = 0.0
        one, other = memory_pair()
        faults = Faults(loss=0.1, duplication=0.1, reordering=0.1, corruption=0.1, delay_s=0.01)
        faulty = FaultyDevice(one, Random(seed), reading=faults, now=lambda: time)
        for packet in numbered(200):
            other.write_packet(packet)
        arrived = drain(faulty)
        assert arrived == []
        time = math.inf
        return drain(faulty), faulty.faults

    assert run(1) == run(1)
    assert run(1) != run(2)
