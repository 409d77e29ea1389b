"""The utun device against a double of macOS's kernel: how it is opened, what it asks for, how it is told to wait.

What it has in common with all devices is in test_device_contract.py.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from random import Random

import pytest
import trio
import trio.testing

from tests.tun.packets import PSH, segment, segment_header, tcp_checksum_is_right
from tun import FlowRequest, Network, Stack, StackSettings
from tun.device import open_device
from tun.device.macos import (
    AF_INET,
    AF_INET6,
    CTL_INFO,
    CTLIOCGINFO,
    PENDING_PACKETS,
    SYSPROTO_CONTROL,
    UTUN_OPT_IFNAME,
    UTUN_OPT_MAX_PENDING_PACKETS,
    Utun,
    open_utun,
    unit_of,
)
from tun.errors import DeviceError
from tun.poller import Poller
from tun.testing.apppeer import AppHost
from tun.testing.darwin import DarwinKernel, DoubleSocket
from tun.wire.checksum import pseudo_header_sum


@pytest.fixture
def kernel() -> Iterator[DarwinKernel]:
    kernel = DarwinKernel()
    yield kernel
    kernel.close()


@pytest.fixture
def device(kernel: DarwinKernel) -> Iterator[Utun]:
    device = open_utun("utun7", kernel=kernel)
    yield device
    device.close()


def _raw(device: Utun, kernel: DarwinKernel) -> bytes:
    """The next packet that the kernel was given, its family before it."""
    return kernel.links[device.name]._far.recv(70_000)


# Opening


def test_the_numbers_are_those_of_the_headers() -> None:
    """Written out for want of a Mac's compiler; each is built here from its definition, and compared on a Mac."""
    assert CTL_INFO.size == 100
    read_and_write = 0x80000000 | 0x40000000
    assert read_and_write | CTL_INFO.size << 16 | ord("N") << 8 | 3 == CTLIOCGINFO
    if sys.platform == "darwin":
        assert (socket.PF_SYSTEM, socket.SYSPROTO_CONTROL, socket.AF_INET6) == (32, SYSPROTO_CONTROL, AF_INET6)


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("utun0", 1),
        ("utun7", 8),
        ("utun12", 13),
        ("ngrokd0", 0),
        ("utun", 0),
        ("utun07", 0),
        ("utun7 ", 0),
        ("utun-1", 0),
        ("utun123456", 0),
        ("", 0),
    ],
)
def test_units_begin_at_one_and_any_other_name_stands_for_any(name: str, unit: int) -> None:
    assert unit_of(name) == unit


def test_the_asked_interface_is_made(kernel: DarwinKernel) -> None:
    device = open_utun("utun7", kernel=kernel)

    assert device.name == "utun7"
    assert kernel.links["utun7"].exists
    assert not os.get_blocking(device.fileno())
    assert not os.get_inheritable(device.fileno())

    device.close()
    assert not kernel.links["utun7"].exists


def test_a_name_that_utun_cannot_have_becomes_the_next_free_one() -> None:
    kernel = DarwinKernel(taken=["utun0", "utun1", "utun3"])

    first = open_utun("ngrokd0", kernel=kernel)
    second = open_utun("ngrokd0", kernel=kernel)

    assert (first.name, second.name) == ("utun2", "utun4")
    first.close()
    third = open_utun("ngrokd0", kernel=kernel)
    assert third.name == "utun2"  # it went with its socket
    second.close()
    third.close()
    kernel.close()


def test_a_taken_interface_is_named_with_a_remedy() -> None:
    kernel = DarwinKernel(taken=["utun3"])

    with pytest.raises(DeviceError, match="the interface utun3 is taken") as caught:
        open_utun("utun3", kernel=kernel)

    assert caught.value.errno == errno.EBUSY
    assert "ifconfig utun3" in caught.value.remedy


def test_without_root_it_says_so() -> None:
    kernel = DarwinKernel(root=False)

    with pytest.raises(DeviceError, match="cannot make a utun interface: only root may") as caught:
        open_utun("ngrokd0", kernel=kernel)

    assert caught.value.errno == errno.EPERM
    assert "sudo" in caught.value.remedy


def test_a_kernel_without_utun_is_named() -> None:
    with pytest.raises(DeviceError, match=r"has no com\.apple\.net\.utun_control") as caught:
        open_utun("ngrokd0", kernel=DarwinKernel(has_utun=False))

    assert caught.value.errno == errno.ENOENT


class _Refusing(DarwinKernel):
    """A kernel that refuses one step of opening, and keeps count of the sockets it gave."""

    def __init__(self, step: str, number: int) -> None:
        super().__init__()
        self.step = step
        self.number = number
        self.sockets: list[DoubleSocket] = []

    def control_socket(self) -> DoubleSocket:
        self.refuse("socket")
        opened = _RefusingSocket(self)
        self.sockets.append(opened)
        return opened

    def refuse(self, step: str) -> None:
        if step == self.step:
            raise OSError(self.number, os.strerror(self.number))


class _RefusingSocket(DoubleSocket):
    def __init__(self, kernel: _Refusing) -> None:
        super().__init__(kernel)
        self._refuse = kernel.refuse

    def connect(self, address: tuple[int, int], /) -> None:
        self._refuse("connect")
        super().connect(address)

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        self._refuse("name")
        return super().getsockopt(level, option, size)


@pytest.mark.parametrize(
    ("step", "number", "words"),
    [
        ("socket", errno.EAFNOSUPPORT, "cannot open a socket for kernel controls"),
        ("socket", errno.EMFILE, "cannot open a socket for kernel controls"),
        ("connect", errno.ENOMEM, "cannot make the interface utun7"),
        ("name", errno.EINVAL, "does not tell the name"),
    ],
)
def test_whatever_step_fails_nothing_is_left_open(step: str, number: int, words: str) -> None:
    kernel = _Refusing(step, number)

    with pytest.raises(DeviceError, match=words) as caught:
        open_utun("utun7", kernel=kernel)

    assert caught.value.errno == number
    assert [opened.fileno() for opened in kernel.sockets] == ([] if step == "socket" else [-1])
    kernel.close()


@pytest.mark.skipif(sys.platform == "darwin", reason="a Mac has such sockets")
def test_elsewhere_the_real_kernel_has_no_such_sockets() -> None:
    with pytest.raises(DeviceError, match="cannot open a socket for kernel controls") as caught:
        open_device("ngrokd0", platform="darwin")

    assert "only macOS" in caught.value.remedy


def test_the_kernel_may_hold_more_for_us(kernel: DarwinKernel, device: Utun) -> None:
    """With its own count of 1 kernel and reader would work in lock-step."""
    assert kernel.links["utun7"].max_pending == PENDING_PACKETS


@pytest.mark.parametrize(("allowed", "got"), [(8 << 20, 8 << 20), (6 << 20, 4 << 20), (300_000, 262_144)])
def test_the_receive_buffer_is_as_large_as_the_system_allows(allowed: int, got: int) -> None:
    kernel = _Refusing("nothing", 0)
    kernel.max_socket_buffer = allowed

    open_utun("utun7", kernel=kernel).close()

    assert kernel.sockets[0].receive_buffer == got
    kernel.close()


def test_old_systems_without_the_option_and_with_small_buffers_do() -> None:
    kernel = _Refusing("nothing", 0)
    kernel.max_socket_buffer = 1000
    kernel.knows_pending = False

    open_utun("utun7", kernel=kernel).close()

    assert kernel.sockets[0].receive_buffer == 512 * 1024  # as it was
    kernel.close()


# The double, where the device does not ask it


def test_the_double_refuses_what_the_kernel_refuses(kernel: DarwinKernel) -> None:
    control = kernel.control_socket()
    number = CTL_INFO.unpack(
        kernel.ioctl(control.fileno(), CTLIOCGINFO, CTL_INFO.pack(0, b"com.apple.net.utun_control"))
    )[0]
    for act, error in (
        (lambda: control.getsockopt(SYSPROTO_CONTROL, UTUN_OPT_IFNAME, 16), errno.EINVAL),
        (lambda: control.setsockopt(SYSPROTO_CONTROL, UTUN_OPT_MAX_PENDING_PACKETS, 64), errno.EINVAL),
        (lambda: control.connect((number + 1, 0)), errno.ENOENT),
        (lambda: kernel.ioctl(control.fileno(), CTLIOCGINFO, CTL_INFO.pack(0, b"com.apple.netsrc")), errno.ENOENT),
        (lambda: kernel.ioctl(control.fileno(), CTLIOCGINFO + 1, bytes(100)), errno.ENOTTY),
    ):
        with pytest.raises(OSError) as caught:  # noqa: PT011 - the number is what matters
            act()
        assert caught.value.errno == error

    control.connect((number, 3))

    assert control.getsockopt(SYSPROTO_CONTROL, UTUN_OPT_IFNAME, 16) == b"utun2\0"
    with pytest.raises(OSError, match="connected"):
        control.connect((number, 4))
    with pytest.raises(OSError, match="Invalid"):
        control.setsockopt(SYSPROTO_CONTROL, UTUN_OPT_MAX_PENDING_PACKETS, 0)
    control.close()


async def test_the_double_loses_packets_without_their_family(kernel: DarwinKernel, device: Utun) -> None:
    for data in (segment(b"bare"), struct.pack(">I", AF_INET6) + segment(b"wrong"), b"\0\0"):
        kernel.writev(device.fileno(), (data,))

    assert kernel.links["utun7"].receive() == []
    assert kernel.links["utun7"].lost == {"family": 2, "short": 1}


# Moving packets


async def test_packets_go_with_the_family_of_their_version(kernel: DarwinKernel, device: Utun) -> None:
    v6 = b"\x60\0\0\0" + struct.pack("!HBB", 4, 59, 64) + bytes(32) + b"next"

    assert device.write_packet(segment(b"four"))
    assert device.write_packet(memoryview(v6))

    assert _raw(device, kernel) == b"\0\0\0\x02" + segment(b"four")
    assert _raw(device, kernel) == b"\0\0\0\x1e" + v6
    assert AF_INET == 2


async def test_a_segment_of_ipv6_is_completed(kernel: DarwinKernel, device: Utun) -> None:
    source, destination, payload = bytes(15) + b"\1", bytes(15) + b"\2", b"odd"
    tcp = bytearray(segment_header(len(payload), flags=PSH | 16)[20:])
    tcp[16:18] = pseudo_header_sum(source, destination, 6, 20 + len(payload)).to_bytes(2, "big")
    header = b"\x60\0\0\0" + struct.pack("!HBB", 20 + len(payload), 6, 64) + source + destination + tcp

    assert device.write(header, (payload,), 0)

    raw = _raw(device, kernel)
    assert raw[:4] == b"\0\0\0\x1e"
    words = raw[4 + 40 :] + b"\0"
    total = pseudo_header_sum(source, destination, 6, 20 + len(payload))
    total += sum(struct.unpack(f"!{len(words) // 2}H", words))
    assert total % 0xFFFF == 0  # what a receiver computes over a right one


async def test_more_pieces_than_one_call_takes_are_joined(kernel: DarwinKernel, device: Utun) -> None:
    """A flow that was written to byte by byte."""
    payload = [bytes([number & 0xFF]) for number in range(1400)]

    assert device.write(segment_header(1400), payload, 0)

    (packet,) = kernel.links["utun7"].receive()
    assert tcp_checksum_is_right(packet)
    assert packet[40:] == b"".join(payload)


async def test_a_full_queue_is_not_a_loss_and_waiting_is_not_spinning(
    kernel: DarwinKernel, device: Utun, autojump_clock: trio.testing.MockClock
) -> None:
    """The socket stays writable while the kernel's input queue is full, so only the clock can tell when to try."""
    link = kernel.links["utun7"]
    link.input_full = True
    begun = trio.current_time()

    tries = 0
    while not device.write(segment_header(4), (b"kept",), 0):
        tries += 1
        await device.wait_writable()
        if tries == 5:
            link.input_full = False

    assert trio.current_time() - begun > 0.001
    assert link.receive() == [segment(b"kept")]
    assert device.drops == {}


async def test_closing_ends_the_wait_for_a_full_queue(
    kernel: DarwinKernel, device: Utun, mock_clock: trio.testing.MockClock
) -> None:
    kernel.links["utun7"].input_full = True
    assert not device.write_packet(segment(b"x"))
    caught: list[DeviceError] = []

    async def wait() -> None:
        try:
            await device.wait_writable()
        except DeviceError as error:
            caught.append(error)

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            device.close()
            mock_clock.jump(0.001)

    assert "closed" in str(caught[0])


async def test_a_full_socket_becomes_writable_when_the_kernel_takes_packets(kernel: DarwinKernel, device: Utun) -> None:
    written = 0
    while device.write_packet(segment(bytes(1400))):
        written += 1

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.wait_writable)
            await trio.testing.wait_all_tasks_blocked()
            assert len(kernel.links["utun7"].receive()) == written

    assert device.write_packet(segment(b"x"))


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENETDOWN, "link_down"),
        (errno.EMSGSIZE, "refused"),
        (errno.EAFNOSUPPORT, "refused"),
        (errno.ENOMEM, "no_memory"),
    ],
)
async def test_what_the_kernel_does_not_want_is_counted(number: int, reason: str) -> None:
    def writev(fd: int, parts: object) -> int:
        raise OSError(number, os.strerror(number))

    device = Utun(os.open(os.devnull, os.O_RDWR), "utun7", mtu=9000, writev=writev)

    assert device.write_packet(segment(b"x"))

    assert device.drops == {reason: 1}
    device.close()


@pytest.mark.parametrize("number", [errno.ENOBUFS, errno.ENOSPC])
async def test_both_names_of_a_full_queue_mean_try_later(number: int) -> None:
    def writev(fd: int, parts: object) -> int:
        raise OSError(number, os.strerror(number))

    device = Utun(os.open(os.devnull, os.O_RDWR), "utun7", mtu=9000, writev=writev)

    assert not device.write_packet(segment(b"x"))

    assert device.drops == {}
    device.close()


async def test_other_failures_are_the_device_s_end() -> None:
    def writev(fd: int, parts: object) -> int:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    device = Utun(os.open(os.devnull, os.O_RDWR), "utun7", mtu=9000, writev=writev)

    with pytest.raises(DeviceError, match="the device utun7 failed: Permission denied"):
        device.write_packet(segment(b"x"))
    device.close()


async def test_the_poller_calls_back_for_packets_and_for_the_end(kernel: DarwinKernel, device: Utun) -> None:
    """The pump never waits in the device itself; the descriptor must tell of both."""
    poller = Poller()
    link = kernel.links["utun7"]
    seen: list[bytes | str] = []

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:

            def read() -> None:
                try:
                    packet = device.read()
                except DeviceError as error:
                    seen.append(str(error))
                    poller.watch(device.fileno(), None)
                    nursery.cancel_scope.cancel()
                else:
                    assert packet is not None
                    seen.append(packet[device.prefix :])
                    link.delete()

            poller.watch(device.fileno(), read)
            nursery.start_soon(poller.run)
            await trio.testing.wait_all_tasks_blocked()
            link.send(segment(b"now"))

    poller.close()
    assert seen == [segment(b"now"), "the interface utun7 was deleted while it was in use"]


async def test_connections_go_through_it(kernel: DarwinKernel, device: Utun) -> None:
    """The stack on this side, an app's TCP on the kernel's, bulk both ways, half-close; with a full queue between."""
    link = kernel.links["utun7"]
    apps = Utun(os.dup(link._far.fileno()), "the kernel's side", mtu=device.mtu)
    stack = Stack(StackSettings(mtu=device.mtu, offload=device.offload), bytes(32))
    stack.set_served({bytes((10, 107, 0, 2)): frozenset({80})})
    requests: list[FlowRequest] = []
    arrived = trio.Event()

    def on_request(request: FlowRequest) -> None:
        requests.append(request)
        arrived.set()

    network = Network(device, stack, on_request)
    host = AppHost(apps)
    up, down = Random(1).randbytes(1_000_000), Random(2).randbytes(1_000_000)
    received: dict[str, bytes] = {}

    async def serve() -> None:
        await arrived.wait()
        flow = requests[0].accept()
        received["up"] = b"".join([bytes(chunk) async for chunk in flow])
        await flow.send_all(down)
        await flow.send_eof()

    async def squeeze() -> None:
        for full in (True, False) * 5:
            link.input_full = full
            await trio.sleep(0.003)

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            await nursery.start(network.run)
            await nursery.start(host.run)
            nursery.start_soon(serve)
            app = await host.connect(("10.107.0.2", 80))
            link.input_full = True  # more than a window is to come, so it must be acknowledged meanwhile
            nursery.start_soon(squeeze)
            await app.send_all(up)
            await app.send_eof()
            received["down"] = b"".join([bytes(chunk) async for chunk in app])
            nursery.cancel_scope.cancel()

    apps.close()
    assert received == {"up": up, "down": down}
    assert link.refused > 0
    assert device.drops == {}
    assert link.lost == {}
