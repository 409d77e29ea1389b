"""What every device keeps to, whatever is behind it: memory, faults, a recorder, Linux with and without offload, macOS.

`Far` is the world beyond the device: the other end of the cable, or the kernel's side of the link seen by a packet
socket. macOS's kernel is a double.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random

import pytest
import trio
import trio.testing

from tests.netns.support import Namespace, open_namespace, require_namespaces
from tests.tun.packets import (
    FIN,
    PSH,
    SYN,
    parse,
    pseudo_header,
    rfc1071,
    segment,
    segment_header,
    tcp_checksum_is_right,
    udp,
)
from tun.device.base import Device
from tun.device.linux import open_tun
from tun.device.macos import open_utun
from tun.errors import DeviceError
from tun.pcap import Capture, RecordingDevice
from tun.testing.darwin import DarwinKernel
from tun.testing.memory import FaultyDevice, MemoryDevice, memory_pair

ETH_P_ALL, ETH_P_IP = 3, 0x0800
PACKET_OUTGOING = 4
SOL_PACKET, PACKET_VNET_HDR = 263, 15


@dataclass
class Far:
    """A device, and what can be done to it from the other side."""

    device: Device
    send: Callable[[bytes], object]
    receive: Callable[[], list[bytes]]  # TCP packets with right checksums only; others fail the test
    set_link: Callable[[bool], object]
    delete: Callable[[], object]
    tells_of_drops: bool = True  # whether the kernel says that a link is down


def _memory(device: Device, ours: MemoryDevice, far_end: MemoryDevice) -> Far:
    def receive() -> list[bytes]:
        packets = []
        while (packet := far_end.read()) is not None:
            assert packet[9] != 6 or tcp_checksum_is_right(packet)
            packets.append(packet)
        return packets

    return Far(device, far_end.write_packet, receive, ours.set_link, ours.delete)


def _linux(ns: Namespace, offload: bool, stack: ExitStack) -> Far:
    device = ns.call(open_tun, "tun0", offload=offload)
    stack.callback(device.close)
    # Two steps: in one message the link goes up first, and IPv6's router solicitation would be the first packet.
    ns.run(["ip", "link", "set", "tun0", "addrgenmode", "none"])
    ns.run(["ip", "link", "set", "tun0", "up"])
    packet_socket = ns.call(socket.socket, socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    stack.callback(packet_socket.close)
    packet_socket.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    ns.call(packet_socket.bind, ("tun0", ETH_P_ALL))

    def receive() -> list[bytes]:
        packets: list[bytes] = []
        while True:
            try:
                data, origin = packet_socket.recvfrom(70_000)
            except BlockingIOError:
                return packets
            if origin[2] == PACKET_OUTGOING:
                continue
            needs_checksum, _, _, _, start, offset = struct.unpack_from("=BBHHHH", data)
            packet = data[10:]
            if needs_checksum & 1:  # the kernel will make it, from the pseudo header's sum
                assert (start, offset) == (20, 16)
                packet = _complete(packet)
            assert packet[9] != 6 or tcp_checksum_is_right(packet)
            packets.append(packet)

    def set_link(up: bool) -> None:
        ns.run(["ip", "link", "set", "tun0", "up" if up else "down"])
        packet_socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)  # "network is down", said once

    def delete() -> None:
        ns.run(["ip", "link", "del", "tun0"])

    def send(packet: bytes) -> None:
        packet_socket.sendto(bytes(10) + packet, ("tun0", ETH_P_IP))

    far = Far(device, send, receive, set_link, delete)
    far.receive()
    return far


def _utun(stack: ExitStack) -> Far:
    kernel = DarwinKernel()
    stack.callback(kernel.close)
    device = open_utun("ngrokd0", kernel=kernel)
    stack.callback(device.close)
    link = kernel.links[device.name]

    def receive() -> list[bytes]:
        packets = link.receive()
        assert all(packet[9] != 6 or tcp_checksum_is_right(packet) for packet in packets)
        return packets

    def set_link(up: bool) -> None:
        link.up = up

    return Far(device, link.send, receive, set_link, link.delete, tells_of_drops=False)


def _complete(packet: bytes) -> bytes:
    """What the kernel makes of a packet whose checksum it was asked to make."""
    assert packet[36:38] == struct.pack("!H", rfc1071(pseudo_header(packet))), "not the pseudo header's sum"
    return packet[:36] + struct.pack("!H", ~rfc1071(packet[20:]) & 0xFFFF) + packet[38:]


@pytest.fixture(
    params=[
        "memory",
        "memory-plain",
        "memory-split",
        "faulty",
        "recording",
        "utun",
        "utun-recording",
        pytest.param("linux", marks=pytest.mark.netns),
        pytest.param("linux-plain", marks=pytest.mark.netns),
        pytest.param("linux-recording", marks=pytest.mark.netns),
    ]
)
def far(request: pytest.FixtureRequest) -> Iterator[Far]:
    kind: str = request.param
    with ExitStack() as stack:
        if kind.startswith("linux"):
            require_namespaces()
            far = _linux(stack.enter_context(open_namespace()), kind != "linux-plain", stack)
        elif kind.startswith("utun"):
            far = _utun(stack)
        else:
            ours, far_end = memory_pair(offload=kind != "memory-plain", split=kind == "memory-split")
            far = _memory(FaultyDevice(ours, Random(1)) if kind == "faulty" else ours, ours, far_end)
        stack.callback(far.device.close)
        if kind.endswith("recording"):
            nowhere = stack.enter_context(open(os.devnull, "wb"))
            far.device = RecordingDevice(far.device, Capture(nowhere.fileno()))
        yield far


async def test_an_empty_device_reads_none(far: Far) -> None:
    assert far.device.read() is None


async def test_packets_come_out_in_order_behind_the_prefix(far: Far) -> None:
    """The prefix is left in place: cutting it off would copy every packet."""
    packets = [segment(b"one"), segment(b"two"), udp(b"three", ("10.107.0.1", 5), ("10.107.0.2", 53))]
    for packet in packets:
        far.send(packet)

    read = [far.device.read() for _ in range(4)]

    assert [packet and packet[far.device.prefix :] for packet in read] == [*packets, None]


async def test_a_wrong_checksum_is_never_vouched_for(far: Far) -> None:
    """The stack must find it itself."""
    far.send(segment(b"damaged", good=False))
    packet = far.device.read()

    assert packet is not None
    assert not far.device.verified(packet)


@pytest.mark.parametrize(
    "pieces", [(), (b"x",), (b"odd", b"odder", b"even"), (b"a" * 1448,), (bytes(1), memoryview(b"view"))]
)
async def test_a_segment_is_completed_and_sent(far: Far, pieces: tuple[bytes | memoryview, ...]) -> None:
    """Payload may come in pieces of any length, so a piece may begin in the middle of a checksum's word."""
    payload = b"".join(pieces)
    header = segment_header(len(payload), flags=PSH | 16)
    before = bytes(header)

    assert far.device.write(header, pieces, 0)

    assert far.receive() == [segment(payload, flags=PSH | 16)]
    assert header == before


async def test_options_are_part_of_the_header(far: Far) -> None:
    options = bytes.fromhex("020405b4 01030308")

    assert far.device.write(memoryview(segment_header(flags=SYN, options=options)), (), 0)

    assert far.receive() == [segment(flags=SYN, options=options)]


async def test_a_large_segment_arrives_whole_or_in_order(far: Far) -> None:
    """One write may stand for 44 packets; FIN counts once, behind the last byte."""
    payload = Random(3).randbytes(64_000)
    header = segment_header(len(payload), sequence=0xFFFFFF00, flags=PSH | FIN | 16)

    if not far.device.offload:
        with pytest.raises(ValueError, match="need offload"):
            far.device.write(header, (payload,), 1460)
        return
    assert far.device.write(header, (memoryview(payload)[:30_001], memoryview(payload)[30_001:]), 1460)

    seen = [parse(packet) for packet in far.receive()]
    assert b"".join(one.payload for one in seen) == payload
    assert [one.flags & (FIN | PSH) for one in seen] == [0] * (len(seen) - 1) + [FIN | PSH]
    sequence = 0xFFFFFF00
    for one in seen:
        assert one.sequence == sequence
        sequence = (sequence + len(one.payload)) % 2**32


async def test_a_segment_size_that_the_payload_does_not_exceed_changes_nothing(far: Far) -> None:
    """Kernels call a single segment that claims to be several a mistake."""
    assert far.device.write(segment_header(1460), (bytes(1460),), 1460)

    assert far.receive() == [segment(bytes(1460))]


async def test_a_complete_packet_is_sent_as_it_is(far: Far) -> None:
    packet = udp(b"reply", ("10.107.0.2", 53), ("10.107.0.1", 5))

    assert far.device.write_packet(packet)
    assert far.device.write_packet(bytearray(segment(b"x")))

    assert far.receive() == [packet, segment(b"x")]


@pytest.mark.parametrize(
    ("header", "payload", "gso_size"),
    [
        (segment_header(4), b"five!", 0),
        (segment_header(5), b"four", 0),
        (segment_header()[:39], b"", 0),
        (segment_header()[:20], b"", 0),
        (b"\x75" + bytes(39), b"", 0),
        (segment_header(1), b"x", -1),
        (segment_header(1), b"x", 65_536),
        (segment_header(0xFFFF - 40) + b"!", bytes(0xFFFF - 40), 0),
    ],
    ids=["longer", "shorter", "cut", "no TCP", "no IP", "negative size", "huge size", "huge"],
)
async def test_lengths_that_contradict_each_other_are_our_mistake(
    far: Far, header: bytearray, payload: bytes, gso_size: int
) -> None:
    """A kernel takes such packets and loses them where nobody looks."""
    with pytest.raises(ValueError):  # noqa: PT011 - each case has words of its own
        far.device.write(header, (payload,), gso_size)

    assert far.receive() == []


@pytest.mark.parametrize(
    "packet",
    [b"", bytes(19), segment(b"x")[:-1], segment(b"x") + b"!", bytes(20), b"\x65" + bytes(60), b"E" + bytes(70_000)],
    ids=["empty", "short", "cut", "long", "version 0", "version 6", "huge"],
)
async def test_packets_that_contradict_themselves_are_our_mistake(far: Far, packet: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        far.device.write_packet(packet)

    assert far.receive() == []


async def test_waiting_ends_when_a_packet_comes(far: Far) -> None:
    got: list[bytes | None] = []

    async def wait() -> None:
        await far.device.wait_readable()
        got.append(far.device.read())

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert got == []

            far.send(segment(b"now"))

    assert got
    assert got[0] is not None
    assert got[0][far.device.prefix :] == segment(b"now")


async def test_waiting_for_what_is_there_returns(far: Far) -> None:
    far.send(segment(b"there"))

    with trio.fail_after(10):
        await far.device.wait_readable()
        await far.device.wait_writable()

    assert far.device.read() is not None


async def test_a_cancelled_wait_loses_nothing(far: Far) -> None:
    with trio.move_on_after(0) as scope:
        await far.device.wait_readable()
    assert scope.cancelled_caught

    far.send(segment(b"kept"))

    with trio.fail_after(10):
        await far.device.wait_readable()
    assert far.device.read() is not None


async def test_packets_for_a_link_that_is_down_are_dropped_and_counted(far: Far) -> None:
    """As a cable that is out: nobody fails, TCP bridges it, and the link may come back."""
    far.set_link(False)

    assert far.device.write(segment_header(4), (b"lost",), 0)
    assert far.device.write_packet(segment(b"lost"))
    assert far.device.read() is None
    assert far.device.drops == ({"link_down": 2} if far.tells_of_drops else {})

    far.set_link(True)
    far.receive()
    assert far.device.write(segment_header(5), (b"again",), 0)
    assert far.receive() == [segment(b"again")]


async def test_a_deleted_interface_wakes_and_raises(far: Far) -> None:
    """The daemon makes it anew; the flows live on meanwhile."""
    failures: list[DeviceError] = []

    async def wait() -> None:
        try:
            await far.device.wait_readable()
            far.device.read()
        except DeviceError as error:
            failures.append(error)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            far.delete()

    assert "deleted" in str(failures[0])
    for act in (
        far.device.read,
        lambda: far.device.write(segment_header(), (), 0),
        lambda: far.device.write_packet(segment()),
    ):
        with pytest.raises(DeviceError, match="deleted"):
            act()


async def test_closing_wakes_who_waits_and_can_be_done_twice(far: Far) -> None:
    failures: list[DeviceError] = []

    async def wait() -> None:
        try:
            await far.device.wait_readable()
            far.device.read()
        except DeviceError as error:
            failures.append(error)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            far.device.close()

    far.device.close()
    assert len(failures) == 1
    for act in (
        far.device.read,
        lambda: far.device.write(segment_header(), (), 0),
        lambda: far.device.write_packet(segment()),
    ):
        with pytest.raises(DeviceError, match="closed"):
            act()
    for wait_again in (far.device.wait_readable, far.device.wait_writable):
        with pytest.raises(DeviceError, match="closed"):
            await wait_again()
