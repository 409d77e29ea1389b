"""The TUN device against a real kernel: its refusals, its offload, and its TCP as the judge of what we write."""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import os
import socket
import struct
import sys
from collections.abc import Callable
from random import Random

import pytest
import trio

from tests.netns.support import Namespace
from tests.tun.packets import ACK, FIN, PSH, SYN, Seen, parse, rfc1071, segment_header, tcp_checksum_is_right
from tun import device as device_package
from tun.device import linux
from tun.device.linux import LinuxTun, open_tun
from tun.errors import DeviceError

APP = "10.107.0.1"
SERVED = ("10.107.0.2", 80)


def configured(ns: Namespace, device: LinuxTun) -> LinuxTun:
    """The link as the daemon configures it."""
    ns.run(["ip", "link", "set", device.name, "addrgenmode", "none"])
    ns.run(["ip", "addr", "add", f"{APP}/32", "dev", device.name])
    ns.run(["ip", "link", "set", device.name, "up", "mtu", "1500", "txqueuelen", "5000"])
    ns.run(["ip", "route", "add", "10.107.0.0/16", "dev", device.name])
    return device


def connecting(ns: Namespace) -> socket.socket:
    client = ns.call(socket.socket)
    client.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.connect(SERVED)
    return client


def tcp_counters(ns: Namespace) -> dict[str, int]:
    lines = ns.run(["cat", "/proc/net/snmp"]).stdout.splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("Tcp:"))
    return dict(zip(names, map(int, values), strict=True))


class Answerer:
    """The least that answers a kernel's TCP: no loss, no timers, one connection."""

    def __init__(self, device: LinuxTun) -> None:
        self.device = device
        self.raw: list[bytes] = []  # as read, with the prefix
        self.received = bytearray()
        self.finished = False
        self.snd_nxt = 0
        self.snd_una = 0
        self.rcv_nxt = 0
        self.window = 0
        self.app = ("", 0)
        self.mss = 1460

    async def run_until(self, done: Callable[[], bool]) -> None:
        with trio.fail_after(20):
            while not done():
                await self.device.wait_readable()
                while (packet := self.device.read()) is not None:
                    self.raw.append(packet)
                    self.handle(parse(packet[self.device.prefix :]))

    def handle(self, seen: Seen) -> None:
        if seen.flags & SYN:
            self.app = seen.source
            self.rcv_nxt = seen.sequence + 1 & 0xFFFFFFFF
            self.window = seen.window
            self.transmit(flags=SYN | ACK, options=struct.pack("!BBH", 2, 4, self.mss))  # no window scaling
            return
        assert seen.sequence == self.rcv_nxt
        self.snd_una = seen.acknowledgment
        self.window = seen.window
        self.received += seen.payload
        self.rcv_nxt = self.rcv_nxt + len(seen.payload) & 0xFFFFFFFF
        if seen.flags & FIN:
            self.finished = True
            self.rcv_nxt += 1
        if seen.payload or seen.flags & FIN:
            self.transmit()

    def transmit(self, payload: bytes = b"", *, flags: int = ACK, options: bytes = b"", gso_size: int = 0) -> None:
        header = segment_header(
            len(payload),
            source=SERVED,
            destination=self.app,
            sequence=self.snd_nxt,
            acknowledgment=self.rcv_nxt,
            flags=flags,
            options=options,
        )
        assert self.device.write(header, (payload,) if payload else (), gso_size)
        self.snd_nxt += len(payload) + bool(flags & (SYN | FIN))

    def has_window_for(self, count: int) -> bool:
        return self.window - (self.snd_nxt - self.snd_una) >= count

    async def send(self, data: bytes, piece_bytes: int, gso_size: int) -> None:
        for offset in range(0, len(data), piece_bytes):
            piece = data[offset : offset + piece_bytes]
            await self.run_until(functools.partial(self.has_window_for, len(piece)))
            self.transmit(piece, flags=ACK | PSH, gso_size=gso_size)


# Opening and its refusals


def test_it_opens_with_offload_and_configures_nothing(netns: Callable[[], Namespace]) -> None:
    ns = netns()

    device = ns.call(device_package.open_device, "ngrokd0", mtu=9000)

    assert (device.name, device.mtu, device.offload, device.prefix) == ("ngrokd0", 9000, True, 10)
    link = ns.run(["ip", "-d", "link", "show", "ngrokd0"]).stdout
    assert "state DOWN" in link
    assert "mtu 1500" in link
    assert "tun type tun pi off vnet_hdr on multi_queue" in link
    device.close()
    assert ns.run(["ip", "link", "show", "ngrokd0"], check=False).returncode != 0


def test_the_kernel_numbers_a_pattern(netns: Callable[[], Namespace]) -> None:
    ns = netns()

    devices = [ns.call(open_tun, "box%d", multi_queue=False) for _ in range(2)]

    assert [device.name for device in devices] == ["box0", "box1"]
    for device in devices:
        device.close()


@pytest.mark.parametrize("multi_queue", [False, True])
def test_a_second_opener_is_refused_and_told_who_has_it(netns: Callable[[], Namespace], multi_queue: bool) -> None:
    """With several queues a second daemon could simply join and take half of the connections."""
    ns = netns()
    name = f"own{os.getpid()}"  # devices that others hold are seen as well: their processes are in no namespace of ours
    device = ns.call(open_tun, name, multi_queue=multi_queue)
    elsewhere = netns().call(open_tun, name)  # the same name in another namespace is none of its business

    with pytest.raises(DeviceError, match=rf"{name} is taken: it belongs to process {os.getpid()} \(") as caught:
        ns.call(open_tun, name)

    assert caught.value.errno == errno.EBUSY
    assert "another interface name" in caught.value.remedy
    device.close()
    elsewhere.close()


def test_a_link_of_another_kind_is_never_touched(netns: Callable[[], Namespace]) -> None:
    ns = netns()

    with pytest.raises(DeviceError, match="lo is taken: a link of this name exists") as caught:
        ns.call(open_tun, "lo")

    assert caught.value.errno == errno.EBUSY


@pytest.mark.parametrize("name", ["", "sixteen-bytes-xx", "a b", "a/b", "a:b", ".", ".."])
def test_what_cannot_be_a_name_is_said_to_be_none(name: str) -> None:
    with pytest.raises(DeviceError, match="cannot be the name of an interface") as caught:
        open_tun(name)

    assert caught.value.errno == errno.EINVAL


def test_without_the_driver_the_remedy_names_it(netns: Callable[[], Namespace]) -> None:
    ns = netns()
    ns.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/net"])

    with pytest.raises(DeviceError, match="/dev/net/tun") as caught:
        ns.call(open_tun, "tun0")

    assert caught.value.errno == errno.ENOENT
    assert "modprobe tun" in caught.value.remedy


OPEN = """
import sys
from tun.device.linux import open_tun
from tun.errors import DeviceError
try:
    open_tun("tun0")
except DeviceError as error:
    print(error, error.errno, error.remedy, sep="|")
"""


def test_without_the_capability_the_right_is_named(netns: Callable[[], Namespace]) -> None:
    """A root without CAP_NET_ADMIN is what a container gives by default."""
    ns = netns()

    printed = ns.run(["setpriv", "--bounding-set", "-net_admin", sys.executable, "-c", OPEN]).stdout

    message, number, remedy = printed.split("|")
    assert message == "cannot make the interface tun0: the right CAP_NET_ADMIN is missing"
    assert int(number) == errno.EPERM
    assert "CAP_NET_ADMIN" in remedy


def test_without_access_to_the_driver_its_file_is_named(
    netns: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    ns = netns()
    ns.run(["sh", "-c", "mount -t tmpfs -o nodev tmpfs /dev/net && mknod /dev/net/tun c 10 200"])

    with pytest.raises(DeviceError, match="cannot open /dev/net/tun: Permission denied") as caught:
        ns.call(open_tun, "tun0")

    assert caught.value.errno == errno.EACCES
    assert "give this user access" in caught.value.remedy


@pytest.mark.parametrize("platform", ["win32", "freebsd14"])
def test_other_systems_are_told_what_is_supported(platform: str) -> None:
    with pytest.raises(DeviceError, match=platform) as caught:
        device_package.open_device("tun0", platform=platform)

    assert caught.value.errno == errno.ENOTSUP
    assert "WSL2" in caught.value.remedy


# Older kernels


def refusing(request: int, values: set[int] | None = None) -> Callable[..., object]:
    """This kernel's ioctl, but one request is refused, as by a kernel that does not know it."""
    real = fcntl.ioctl

    def ioctl(fd: int, asked: int, argument: int | bytes = 0) -> int | bytes:
        if asked == request and (values is None or argument in values):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(fd, asked, argument)

    return ioctl


def test_a_kernel_without_tso_leaves_checksum_offload(
    netns: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    ns = netns()
    monkeypatch.setattr(fcntl, "ioctl", refusing(linux.TUNSETOFFLOAD, {7}))

    device = ns.call(open_tun, "tun0")
    configured(ns, device)
    with connecting(ns):
        syn = device.read()

    assert device.offload
    assert syn is not None
    assert syn[:10] == struct.pack("=BBHHHH", 1, 0, 0, 0, 20, 16)
    device.close()


@pytest.mark.parametrize("request_", [linux.TUNSETOFFLOAD, linux.TUNGETVNETHDRSZ])
def test_a_kernel_that_refuses_offload_gets_no_header(
    netns: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch, request_: int
) -> None:
    """The header cannot be taken off an interface, so it is made again, under the same name."""
    ns = netns()
    monkeypatch.setattr(fcntl, "ioctl", refusing(request_))

    device = ns.call(open_tun, "tun0")

    assert (device.name, device.offload, device.prefix) == ("tun0", False, 0)
    assert "vnet_hdr off" in ns.run(["ip", "-d", "link", "show", "tun0"]).stdout
    device.close()


def test_a_kernel_that_tells_no_features_gets_the_plainest_device(
    netns: Callable[[], Namespace], monkeypatch: pytest.MonkeyPatch
) -> None:
    ns = netns()
    monkeypatch.setattr(fcntl, "ioctl", refusing(linux.TUNGETFEATURES))

    device = ns.call(open_tun, "tun0")

    assert "pi off vnet_hdr off" in ns.run(["ip", "-d", "link", "show", "tun0"]).stdout
    with pytest.raises(DeviceError, match="single queue"):
        ns.call(device.extra_queue)
    device.close()


# The kernel's packets


def test_a_syn_comes_unsummed_and_vouched_for(netns: Callable[[], Namespace]) -> None:
    """The kernel notes that the checksum is still to be made, and we never ask for it."""
    ns = netns()
    with_offload = configured(ns, ns.call(open_tun, "tun0"))

    with connecting(ns):
        syn = with_offload.read()

    assert syn is not None
    assert syn[:10] == struct.pack("=BBHHHH", 1, 0, 0, 0, 20, 16)
    assert with_offload.verified(syn)
    assert rfc1071(syn[10:30]) == 0xFFFF
    assert parse(syn[10:]).flags == SYN
    with_offload.close()


def test_without_offload_a_syn_comes_complete(netns: Callable[[], Namespace]) -> None:
    ns = netns()
    device = configured(ns, ns.call(open_tun, "tun0", offload=False))

    with connecting(ns):
        syn = device.read()

    assert syn is not None
    assert not device.verified(syn)
    assert tcp_checksum_is_right(syn)
    device.close()


@pytest.mark.parametrize("offload", [True, False])
async def test_bytes_arrive_in_packets_as_large_as_offload_allows(
    netns: Callable[[], Namespace], offload: bool
) -> None:
    ns = netns()
    device = configured(ns, ns.call(open_tun, "tun0", offload=offload))
    answerer = Answerer(device)
    data = Random(1).randbytes(1_000_000)

    async with trio.open_nursery() as nursery:
        with connecting(ns) as client:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            await answerer.run_until(lambda: answerer.snd_una == 1)
            nursery.start_soon(stream.send_all, data)
            await answerer.run_until(lambda: len(answerer.received) == len(data))

    assert hashlib.sha256(answerer.received).digest() == hashlib.sha256(data).digest()
    largest = max(len(packet) for packet in answerer.raw) - device.prefix
    if offload:
        assert largest > 10_000
        big = next(packet for packet in answerer.raw if len(packet) > 1510)
        assert struct.unpack("=BBHHHH", big[:10]) == (1, 1, 40, 1460, 20, 16)
    else:
        assert largest == 1500
        assert all(tcp_checksum_is_right(packet) for packet in answerer.raw)
    assert device.drops == {}
    device.close()


# What the kernel's TCP takes from us


@pytest.mark.parametrize(
    ("offload", "piece_bytes", "gso_size"),
    [(True, 29_200, 1460), (True, 60_001, 1460), (True, 1460, 0), (False, 1459, 0)],
    ids=["large", "odd", "single", "plain"],
)
async def test_the_kernel_takes_what_we_write(
    netns: Callable[[], Namespace], offload: bool, piece_bytes: int, gso_size: int
) -> None:
    """Its TCP verifies every checksum that it was not told to make itself."""
    ns = netns()
    device = configured(ns, ns.call(open_tun, "tun0", offload=offload))
    answerer = Answerer(device)
    data = Random(2).randbytes(600_000)
    received = bytearray()

    async def receive(stream: trio.SocketStream) -> None:
        async for chunk in stream:
            received.extend(chunk)
        await stream.send_eof()

    async with trio.open_nursery() as nursery:
        with connecting(ns) as client:
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            await answerer.run_until(lambda: answerer.snd_una == 1)
            nursery.start_soon(receive, stream)
            await answerer.send(data, piece_bytes, gso_size)
            answerer.transmit(flags=FIN | ACK)
            await answerer.run_until(lambda: answerer.finished)

    assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
    assert device.drops == {}
    counters = tcp_counters(ns)
    assert (counters["InErrs"], counters["InCsumErrors"]) == (0, 0)
    device.close()


async def test_a_wrong_checksum_is_noticed_without_offload(netns: Callable[[], Namespace]) -> None:
    """The test above would prove nothing if the kernel took anything."""
    ns = netns()
    device = configured(ns, ns.call(open_tun, "tun0", offload=False))
    answerer = Answerer(device)

    with connecting(ns):
        await answerer.run_until(lambda: bool(answerer.app[0]))
        header = segment_header(1, source=SERVED, destination=answerer.app)
        device.write_packet(bytes(header) + b"x")  # the pseudo header's sum alone

    assert tcp_counters(ns)["InCsumErrors"] == 1
    device.close()


# More queues


def test_queues_share_the_connections(netns: Callable[[], Namespace]) -> None:
    """Each worker reads its own; a connection is in exactly one."""
    ns = netns()
    first = configured(ns, ns.call(open_tun, "tun0"))
    second = ns.call(first.extra_queue)

    clients = [connecting(ns) for _ in range(64)]
    ports: list[set[int]] = []
    for queue in (first, second):
        seen = set()
        while (packet := queue.read()) is not None:
            seen.add(parse(packet[10:]).source[1])
        ports.append(seen)

    assert ports[0] | ports[1] == {client.getsockname()[1] for client in clients}
    assert not ports[0] & ports[1]
    assert len(ports[0]) > 8
    assert len(ports[1]) > 8
    for client in clients:
        client.close()
    first.close()
    assert ns.run(["ip", "link", "show", "tun0"]).stdout  # it lives as long as one queue does
    second.close()
    assert ns.run(["ip", "link", "show", "tun0"], check=False).returncode


def test_a_queue_joins_only_the_interface_it_belongs_to(netns: Callable[[], Namespace]) -> None:
    """Joining by name would make a new interface where the old one has just gone."""
    ns = netns()
    device = ns.call(open_tun, "tun0")
    ns.run(["ip", "link", "del", "tun0"])

    with pytest.raises(DeviceError, match="deleted"):
        ns.call(device.extra_queue)

    assert ns.run(["ls", "/sys/class/net"]).stdout.split() == ["lo"]
    device.close()


def test_a_queue_follows_an_interface_that_was_renamed(netns: Callable[[], Namespace]) -> None:
    ns = netns()
    device = ns.call(open_tun, "tun0")
    ns.run(["ip", "link", "set", "tun0", "name", "other0"])

    queue = ns.call(device.extra_queue)

    assert queue.name == "other0"
    queue.close()
    device.close()
