"""Captures: what is written, what is read back, and that nobody waits for either. scapy is the independent reader."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP  # noqa: TID251 - the oracle
from scapy.utils import rdpcap  # noqa: TID251
from trio.testing import MockClock

from tests.tun.packets import address, ipv4_header, segment, segment_header, tcp_checksum_is_right, udp
from tun.core.stack import Stack, StackSettings
from tun.device.base import Device
from tun.errors import BadPacket
from tun.network import FlowRequest, Network
from tun.pcap import (
    Capture,
    CapturedPacket,
    CaptureFilter,
    CaptureLimits,
    RecordingDevice,
    interface_description,
    packet_block,
    read_capture,
    section_header,
    wall_clock,
    with_checksum,
)
from tun.testing.apppeer import AppHost
from tun.testing.memory import MemoryDevice, checksum_is_right, memory_pair

EPOCH_NS = 1_767_225_600_000_000_000


class Clock:
    """Nanoseconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = EPOCH_NS

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "x.pcapng"


@pytest.fixture
def file(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    yield fd
    os.close(fd)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Reading end (never waiting) and writing end of a pipe that holds 64 KiB."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield reader, writer
    for fd in (reader, writer):
        os.close(fd)


def packets_in(data: bytes) -> list[CapturedPacket]:
    return list(read_capture(io.BytesIO(data)))


def read_all(fd: int) -> bytes:
    parts = []
    while True:
        try:
            part = os.read(fd, 1 << 20)
        except BlockingIOError:
            break
        if not part:
            break
        parts.append(part)
    return b"".join(parts)


def read_slowly(capture: Capture, fd: int) -> bytes:
    """Make room in the pipe and let the capture fill it again, until nothing waits."""
    data = b""
    while part := read_all(fd):
        data += part
        capture.flush()
    return data


# The recording device


def records(path: Path) -> list[CapturedPacket]:
    return packets_in(path.read_bytes())


def recorded(capture: Capture, *, offload: bool = True, split: bool = False) -> tuple[RecordingDevice, MemoryDevice]:
    ours, far = memory_pair(offload=offload, split=split)
    return RecordingDevice(ours, capture), far


def test_both_directions_are_recorded_in_order(path: Path, file: int) -> None:
    clock = Clock()
    capture = Capture(file, clock=clock, application="test")
    device, far = recorded(capture)
    question, answer = segment(b"question"), segment_header(6)

    far.write_packet(question)
    clock.now += 1_500_000_001
    assert device.read() == question
    clock.now += 1
    assert device.write(answer, (b"ans", b"wer"), 0)
    assert device.read() is None
    capture.close()

    one, two = records(path)
    assert (one.packet, one.inbound, one.time_ns - EPOCH_NS) == (question, True, 1_500_000_001)
    assert (two.packet[40:], two.inbound, two.time_ns - EPOCH_NS) == (b"answer", False, 1_500_000_002)
    assert (one.interface, one.description) == ("memory0", "mtu 1500, offload on")


def test_scapy_reads_the_same_file(path: Path, file: int) -> None:
    clock = Clock()
    capture = Capture(file, clock=clock, application="test")
    device, far = recorded(capture)
    far.write_packet(segment(b"question"))
    clock.now += 123_456_789
    device.read()
    device.write(segment_header(5), (b"large",), 0)
    capture.close()

    one, two = rdpcap(str(path))

    assert IP(bytes(one))[TCP].payload.load == b"question"
    assert float(one.time) == pytest.approx(EPOCH_NS / 1e9 + 0.123456789, abs=1e-6)
    again = IP(bytes(two))
    del again[IP].chksum, again[TCP].chksum
    assert bytes(IP(bytes(again))) == bytes(two), "a checksum was not completed"


def test_what_the_stack_left_to_the_device_is_completed_in_the_capture_only(path: Path, file: int) -> None:
    """The header that was given stays as it was: the device completes it itself."""
    capture = Capture(file, clock=Clock())
    device, far = recorded(capture)
    header = segment_header(3000)
    before = bytes(header)

    assert device.write(header, (bytes(1000), memoryview(bytes(2000))), 1460)
    capture.close()

    assert bytes(header) == before
    (packet,) = records(path)
    assert packet.packet == far.read(), "a segment of several MSS is one packet here as well"
    assert tcp_checksum_is_right(packet.packet)


class PartialDevice:
    """A memory device whose packets have the pseudo header's sum only, as Linux hands over its own with offload."""

    def __init__(self, inner: MemoryDevice) -> None:
        self._inner = inner
        self.prefix = 10

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self) -> bytes | None:
        packet = self._inner.read()
        return None if packet is None else bytes(10) + packet[:36] + b"\x12\x34" + packet[38:]

    def verified(self, packet: bytes) -> bool:
        return packet[-1:] != b"!"


def test_what_the_kernel_vouches_for_gets_its_checksum_and_the_rest_keeps_its_own(path: Path, file: int) -> None:
    """Otherwise every tool would call every packet broken, and would not find the one that is."""
    capture = Capture(file, clock=Clock())
    ours, far = memory_pair()
    device = RecordingDevice(PartialDevice(ours), capture)
    for payload in (b"vouched for", b"not vouched for!"):
        far.write_packet(segment(payload))

    first, second = device.read(), device.read()
    capture.close()

    assert first is not None
    assert first[46:48] == b"\x12\x34", "the stack got what the device gave"
    assert second is not None
    good, bad = records(path)
    assert good.packet == segment(b"vouched for")
    assert bad.packet[36:38] == b"\x12\x34"


def test_what_a_full_device_does_not_take_is_not_recorded(path: Path, file: int) -> None:
    """It will be sent again, and recorded then."""
    capture = Capture(file, clock=Clock())
    ours, far = memory_pair(capacity=1)
    device = RecordingDevice(ours, capture)

    assert [device.write_packet(segment()), device.write_packet(segment()), device.write(segment_header(), (), 0)] == [
        True,
        False,
        False,
    ]
    far.read()
    assert device.write(segment_header(), (), 0)
    capture.close()

    assert len(records(path)) == 2


def test_a_device_that_comes_back_is_another_interface_of_the_same_capture(path: Path, file: int) -> None:
    capture = Capture(file, clock=Clock())
    for name in ("tun0", "tun1"):
        ours, far = memory_pair(names=(name, "far"))
        device = RecordingDevice(ours, capture)
        far.write_packet(segment())
        device.read()
        device.close()
    capture.close()

    assert [packet.interface for packet in records(path)] == ["tun0", "tun1"]
    assert device.drops == {}
    assert (device.name, device.mtu, device.offload, device.prefix) == ("tun1", 1500, True, 0)


# While a network runs


@asynccontextmanager
async def running(device: Device, far: MemoryDevice) -> Any:
    async def echo(request: FlowRequest) -> None:
        async with request.accept() as flow:
            async for data in flow:
                await flow.send_all(data)

    stack = Stack(StackSettings(), bytes(32))
    stack.set_served({address("10.107.0.2"): frozenset({80})})
    async with trio.open_nursery() as nursery:
        network = Network(device, stack, lambda request: nursery.start_soon(echo, request))
        host = AppHost(far)
        await nursery.start(network.run)
        await nursery.start(host.run)
        yield network, host
        nursery.cancel_scope.cancel()


async def test_recording_starts_and_stops_while_packets_flow(path: Path, file: int, autojump_clock: MockClock) -> None:
    """A pump that waits in the one device goes on with the other; flows notice nothing."""
    ours, far = memory_pair()
    async with running(ours, far) as (network, host):
        app = await host.connect(("10.107.0.2", 80))

        async def exchange(data: bytes) -> None:
            await app.send_all(data)
            answer = b""
            while len(answer) < len(data):
                answer += await app.receive_some()
            assert answer == data
            await trio.sleep(1)  # until the last ACK has gone

        await exchange(b"before")
        capture = Capture(file, clock=Clock())
        network.device = RecordingDevice(network.device, capture)
        await exchange(b"while it is recorded")
        network.device = network.device.device
        await exchange(b"after")
        capture.close()

    payloads = [packet.packet[52:] for packet in records(path)]
    assert [payload for payload in payloads if payload] == [b"while it is recorded"] * 2
    assert capture.recorded == len(payloads)


async def test_a_batch_is_in_the_file_when_the_pump_waits_again(
    path: Path, file: int, autojump_clock: MockClock
) -> None:
    """Who looks on live sees each batch at once."""
    ours, far = memory_pair()
    capture = Capture(file, clock=Clock())
    async with running(RecordingDevice(ours, capture), far) as (_, host):
        await host.connect(("10.107.0.2", 80))
        await trio.sleep(0.01)

        assert len(records(path)) == 3
    capture.close()


# Limits


def fill(capture: Capture, payload: bytes = b"", count: int = 1, *, each_ns: int = 0) -> None:
    if not capture._interfaces:
        capture.add_interface("tun0")
    for _ in range(count):
        packet = segment(payload)
        if capture.wants(packet, 0):
            capture.record(0, packet, True)
        capture.flush()
        if each_ns:
            capture._clock.now += each_ns  # type: ignore[attr-defined]  # it is a Clock


def test_it_ends_after_so_many_packets(path: Path, file: int) -> None:
    ended: list[str] = []
    capture = Capture(
        file, clock=Clock(), limits=CaptureLimits(max_packets=3), on_end=lambda: ended.append(capture.ended)
    )

    fill(capture, count=5)
    capture.close()

    assert ended == [capture.ended] == ["packets"]
    assert len(records(path)) == 3


@pytest.mark.parametrize("max_bytes", [2000, 2001, 10_000])
def test_it_ends_before_the_file_is_larger_than_allowed(path: Path, file: int, max_bytes: int) -> None:
    capture = Capture(file, clock=Clock(), limits=CaptureLimits(max_bytes=max_bytes))

    fill(capture, bytes(500), count=100)

    assert capture.ended == "bytes"
    assert max_bytes - 600 < path.stat().st_size <= max_bytes
    assert len(records(path)) == capture.recorded


def test_it_ends_after_so_much_time(path: Path, file: int) -> None:
    capture = Capture(file, clock=Clock(), limits=CaptureLimits(duration_s=2.5))

    fill(capture, count=10, each_ns=1_000_000_000)

    assert capture.ended == "duration"
    assert len(records(path)) == 3


def test_time_is_over_on_a_silent_link_too(path: Path, file: int) -> None:
    clock = Clock()
    capture = Capture(file, clock=clock, limits=CaptureLimits(duration_s=1))
    fill(capture)
    clock.now += 1_000_000_001

    capture.flush()

    assert capture.ended == "duration"


def test_after_its_end_packets_pass_and_nothing_is_written(path: Path, file: int) -> None:
    capture = Capture(file, clock=Clock(), limits=CaptureLimits(max_packets=1))
    device, far = recorded(capture)
    for _ in range(2):
        far.write_packet(segment())
        assert device.read() == segment()
    size = path.stat().st_size

    assert device.write(segment_header(), (), 0)
    assert far.read() is not None
    assert path.stat().st_size == size


# Descriptors that do not take everything


def test_a_full_pipe_drops_and_counts_and_never_cuts_a_packet(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    capture = Capture(writer, clock=Clock(), backlog_bytes=70_000)

    fill(capture, bytes(1000), count=300)
    data = read_slowly(capture, reader)
    fill(capture, b"room again")
    capture.close()
    packets = packets_in(data + read_slowly(capture, reader))

    assert capture.dropped > 100
    assert len(packets) == capture.recorded == 301 - capture.dropped
    assert packets[-1].packet == segment(b"room again")


def test_the_next_packet_tells_how_many_are_missing(pipe: tuple[int, int]) -> None:
    """In a field of its own, which Wireshark shows."""
    reader, writer = pipe
    capture = Capture(writer, clock=Clock(), backlog_bytes=70_000)
    fill(capture, bytes(1000), count=300)
    data = read_slowly(capture, reader)
    fill(capture, b"room again")
    capture.close()
    data += read_slowly(capture, reader)

    told = [packet.dropped for packet in packets_in(data)]

    assert told == [0] * (len(told) - 1) + [capture.dropped]


async def test_what_waits_can_be_waited_for(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    capture = Capture(writer, clock=Clock())
    fill(capture, bytes(1000), count=300)
    capture.close()
    data = bytearray()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(capture.drain)
            while len(data) < 300_000:
                await trio.lowlevel.wait_readable(reader)
                data += read_all(reader)
    data += read_all(reader)

    assert capture.dropped == 0
    assert len(packets_in(bytes(data))) == 300


def test_a_reader_that_goes_ends_the_capture_and_nothing_else() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    ended: list[str] = []
    capture = Capture(writer, clock=Clock(), on_end=lambda: ended.append(capture.ended))
    device, far = recorded(capture)
    for _ in range(2):
        far.write_packet(segment())
        assert device.read() == segment()
        capture.flush()
    capture.close()
    os.close(writer)

    assert ended == ["broken"]
    assert isinstance(capture.error, BrokenPipeError)


def test_its_clock_never_goes_back_and_is_the_time_of_day() -> None:
    import time

    clock = wall_clock()
    times = [clock() for _ in range(1000)]

    assert times == sorted(times)
    assert abs(times[0] - time.time_ns()) < 60_000_000_000


# The filter


def ping(source: str, destination: str, *, kind: int = 8, quoted: bytes = b"") -> bytes:
    message = bytes((kind, 0, 0, 0, 0, 0, 0, 0)) + quoted
    return ipv4_header(len(message), 1, source, destination) + message


def later_part(packet: bytes) -> bytes:
    return packet[:6] + b"\x00\x10" + packet[8:]


def udp6(source_port: int, destination_port: int, source: int = 1, destination: int = 2) -> bytes:
    datagram = struct.pack("!HHHH", source_port, destination_port, 8, 0)
    addresses = b"".join(b"\xfd" + bytes(14) + bytes((last,)) for last in (source, destination))
    return b"\x60\0\0\0" + struct.pack("!HBB", 8, 17, 64) + addresses + datagram


@pytest.mark.parametrize(
    ("addresses", "ports", "packet", "expected"),
    [
        ([], [], segment(), True),
        (["10.107.0.2"], [], segment(), True),
        (["10.107.0.1"], [], segment(), True),
        (["10.107.0.3"], [], segment(), False),
        (["10.107.0.0/24"], [], segment(), True),
        (["10.107.1.0/24", "10.107.0.0/30"], [], segment(), True),
        ([], [443], segment(), True),
        ([], [40000], segment(), True),
        ([], [80, 444], segment(), False),
        (["10.107.0.2"], [443], segment(), True),
        (["10.107.0.2"], [80], segment(), False),
        (["10.107.0.9"], [443], segment(), False),
        ([], [53], udp(b"?", ("10.107.0.1", 999), ("10.107.0.2", 53)), True),
        (["10.107.0.2"], [], ping("10.107.0.1", "10.107.0.2"), True),
        ([], [443], ping("10.107.0.1", "10.107.0.2"), False),
        ([], [443], ping("10.107.0.1", "10.107.0.9", kind=3, quoted=segment()), True),
        ([], [80], ping("10.107.0.1", "10.107.0.9", kind=3, quoted=segment()), False),
        (["10.107.0.2"], [443], ping("10.107.0.1", "10.107.0.9", kind=3, quoted=segment()), True),
        ([], [443], ping("10.107.0.1", "10.107.0.9", kind=8, quoted=segment()), False),
        ([], [443], later_part(segment()), False),
        (["10.107.0.2"], [], later_part(segment()), True),
        (["fd00::2"], [], udp6(1, 53), True),
        (["fd00::3"], [], udp6(1, 53), False),
        ([], [53], udp6(1, 53), True),
        (["10.107.0.2"], [], udp6(1, 53), False),
        (["::/0"], [], segment(), False),
        ([], [443], segment()[:20], False),
        (["10.107.0.2"], [443], b"", False),
    ],
)
def test_the_filter_looks_at_addresses_and_ports(
    addresses: list[str], ports: list[int], packet: bytes, expected: bool
) -> None:
    wanted = CaptureFilter.of(addresses, ports)

    assert wanted.matches(packet) is expected
    assert wanted.matches(bytes(10) + packet, 10) is expected


@pytest.mark.parametrize(("addresses", "ports"), [(["10.107.0"], []), (["my-api"], []), ([], [0]), ([], [65536])])
def test_a_filter_that_makes_no_sense_is_refused(addresses: list[str], ports: list[int]) -> None:
    with pytest.raises(ValueError, match=r"port|network"):
        CaptureFilter.of(addresses, ports)


@given(st.binary(max_size=200))
def test_no_packet_confuses_the_filter(packet: bytes) -> None:
    for lead in (b"", b"\x45", b"\x60"):
        assert CaptureFilter.of(["10.107.0.2"], [443]).matches(lead + packet) in (True, False)


def test_what_is_not_of_interest_is_not_recorded_but_passes(path: Path, file: int) -> None:
    capture = Capture(file, clock=Clock(), interests=CaptureFilter.of(ports=[80]))
    device, far = recorded(capture)
    far.write_packet(segment())

    assert device.read() == segment()
    assert device.write(segment_header(), (), 0)
    capture.close()

    assert records(path) == []
    assert (capture.seen, capture.recorded) == (2, 0)


# Checksums


@given(st.binary(max_size=3000))
def test_a_completed_tcp_checksum_is_right(payload: bytes) -> None:
    packet = with_checksum(segment(payload, good=False))

    assert packet == segment(payload)
    assert checksum_is_right(packet)


def test_a_udp_checksum_is_never_written_as_none() -> None:
    """0 means that there is none (RFC 768)."""
    checksums = {
        with_checksum(udp(struct.pack("!H", n), ("10.107.0.1", 5), ("10.107.0.2", 53)))[26:28] for n in range(65536)
    }

    assert b"\0\0" not in checksums
    assert b"\xff\xff" in checksums


@given(st.binary(max_size=100))
def test_nothing_confuses_the_completion(packet: bytes) -> None:
    for lead in (b"", b"\x45\0", b"\x60\0"):
        assert len(with_checksum(lead + packet)) == len(lead + packet)


def test_parts_and_other_protocols_keep_what_they_have() -> None:
    for packet in (later_part(segment()), ping("10.107.0.1", "10.107.0.2"), b"", b"\x45"):
        assert with_checksum(packet) == packet


# Reading


@given(st.lists(st.tuples(st.binary(max_size=70), st.booleans(), st.integers(0, 2**63), st.text(max_size=9))))
def test_what_is_written_is_read(packets: list[tuple[bytes, bool, int, str]]) -> None:
    data = section_header("x", "a comment") + interface_description("tun0")
    for packet, inbound, time_ns, comment in packets:
        data += packet_block(0, time_ns, packet, inbound=inbound, comment=comment, dropped=len(comment))

    read = packets_in(data)

    assert [(p.packet, p.inbound, p.time_ns, p.comment) for p in read] == packets
    assert all(p.size == len(p.packet) and p.dropped == len(p.comment) for p in read)


WHOLE = (
    section_header("x")
    + interface_description("tun0", "mtu 1500")
    + packet_block(0, 5, segment(b"one"), inbound=True, dropped=3, comment="!")
    + packet_block(0, 6, segment(b"two"), inbound=False)
)


@given(st.data())
def test_a_damaged_file_is_an_error_and_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(WHOLE) - 1))] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(WHOLE)))
    try:
        packets = packets_in(bytes(damaged[:end]))
    except BadPacket:
        return
    assert len(packets) <= 2


@pytest.mark.parametrize("end", range(1, len(WHOLE)))
def test_a_file_that_was_cut_short_gives_its_whole_packets_first(end: int) -> None:
    """A daemon that was killed has left it so."""
    boundaries = []
    at = 0
    while at < len(WHOLE):
        at += struct.unpack_from("<I", WHOLE, at + 4)[0]
        boundaries.append(at)
    reader = read_capture(io.BytesIO(WHOLE[:end]))
    whole = sum(boundary <= end for boundary in boundaries[2:])

    packets = [next(reader).packet for _ in range(whole)]

    assert packets == [segment(b"one"), segment(b"two")][:whole]
    with pytest.raises(
        StopIteration if end in boundaries else BadPacket, match=None if end in boundaries or end < 12 else "cut short"
    ):
        next(reader)


def test_a_big_endian_file_with_microseconds_is_read() -> None:
    """As other machines write them, and most other programs."""
    body = struct.pack(">IIIII", 0, 0, 1_000_001, 3, 3) + b"\x45\0\0\0"
    data = struct.pack(">IIIHHqI", 0x0A0D0D0A, 28, 0x1A2B3C4D, 1, 0, -1, 28)
    data += struct.pack(">IIHHII", 1, 20, 101, 0, 0, 20)
    data += struct.pack(">II", 6, 12 + len(body)) + body + struct.pack(">I", 12 + len(body))

    (packet,) = packets_in(data)

    assert (packet.time_ns, packet.packet, packet.inbound) == (1_000_001_000, b"\x45\0\0", None)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xd4\xc3\xb2\xa1" + bytes(20), "editcap"),
        (b"hello, world", "not a pcapng"),
        (section_header() + struct.pack("<IIHHII", 1, 20, 1, 0, 0, 20), "link type 1;"),
        (section_header() + packet_block(0, 0, b"x", inbound=True), "not described"),
        (section_header()[:8] + bytes(20), "byte order"),
        (section_header() + struct.pack("<II", 6, 1 << 30), "block of"),
    ],
)
def test_what_is_no_capture_of_ip_packets_is_named(data: bytes, message: str) -> None:
    with pytest.raises(BadPacket, match=message):
        packets_in(data)
