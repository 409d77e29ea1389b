"""The app's kernel in miniature, as a host with streams: what tests of whole daemons connect with."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from tun.core.stack import Flow, Stack, StackSettings
from tun.testing.apppeer import AppHost, AppPeer
from tun.testing.memory import memory_pair
from tun.wire.tcp import ACK, RST, SYN, build_tcp


class Shell:
    """The smallest shell: an owner that echoes, or refuses, or says nothing."""

    def __init__(self, behaviour: str = "echo") -> None:
        self.near, self.far = memory_pair()
        self.stack = Stack(StackSettings(), b"s" * 16)
        self.stack.set_served({b"\x0a\x6b\x00\x02": frozenset((7,))})
        self.behaviour = behaviour
        self.flows: list[Flow] = []

    async def run(self) -> None:
        stack, device = self.stack, self.near
        while True:
            now = trio.current_time()
            packet = device.read()
            while packet is not None:
                stack.handle_packet(packet, device.prefix, device.verified(packet), now)
                packet = device.read()
            if stack.next_deadline() <= now:
                stack.handle_timeout(now)
            for flow in stack.take_requests():
                if self.behaviour == "refuse":
                    stack.refuse(flow, now)
                elif self.behaviour == "echo":
                    stack.accept(flow, now)
            for flow in stack.take_touched():
                self.echo(flow, now)
                stack.flush(flow, device.write, now)
            for reply in stack.take_replies():
                device.write_packet(bytes(reply))
            with trio.move_on_at(stack.next_deadline()):
                await device.wait_readable()

    def echo(self, flow: Flow, now: float) -> None:
        while flow.readable_bytes:
            taken = flow.write(bytes(flow.readable_views()[0]), now)
            if not taken:
                return
            flow.consume(taken, now)
        if flow.app_finished:
            flow.finish(now)


async def test_streams_carry_bytes_both_ways_and_half_close(autojump_clock: MockClock) -> None:
    """A megabyte there and back, the end told by FIN."""
    shell = Shell()
    host = AppHost(shell.far)
    data = bytes(range(256)) * 4096
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shell.run)
        await nursery.start(host.run)
        stream = await host.connect(("10.107.0.2", 7))
        received = bytearray()

        async def receive() -> None:
            while chunk := await stream.receive_some():
                received.extend(chunk)

        async with trio.open_nursery() as both:
            both.start_soon(receive)
            await stream.send_all(data)
            await stream.send_eof()
        await stream.aclose()
        assert received == data
        assert stream.peer.complaints == []
        nursery.cancel_scope.cancel()


async def test_errors_are_those_of_a_socket(autojump_clock: MockClock) -> None:
    """Refused, unreachable, timed out, reset."""
    shell = Shell("refuse")
    host = AppHost(shell.far)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shell.run)
        await nursery.start(host.run)
        with pytest.raises(ConnectionRefusedError):
            await host.connect(("10.107.0.2", 7))
        with pytest.raises(ConnectionRefusedError):
            await host.connect(("10.107.0.2", 8))
        with pytest.raises(OSError, match="unreachable"):
            await host.connect(("10.107.0.99", 7))
        shell.behaviour = "silent"
        with pytest.raises(TimeoutError):
            await host.connect(("10.107.0.2", 7))
        shell.behaviour = "echo"
        stream = await host.connect(("10.107.0.2", 7))
        flow = shell.stack.flows[stream.key]
        flow.abort(trio.current_time())
        shell.stack.flush(flow, shell.near.write, trio.current_time())
        with pytest.raises(trio.BrokenResourceError, match="reset"):
            await stream.receive_some()
        nursery.cancel_scope.cancel()


async def test_cancelled_connect_says_nothing(autojump_clock: MockClock) -> None:
    """As a real app that closes its socket while connecting: the stack must notice by the silence."""
    shell = Shell("silent")
    host = AppHost(shell.far)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shell.run)
        await nursery.start(host.run)
        with trio.move_on_after(0.5):
            await host.connect(("10.107.0.2", 7))
        assert shell.stack.undecided_count == 1
        await trio.sleep(4)
        assert shell.stack.undecided_count == 0
        assert shell.stack.cancelled == 1
        nursery.cancel_scope.cancel()


def test_peer_takes_only_the_exact_refusal() -> None:
    """As Linux: any other RST leaves it waiting, which is how tests see a wrong one."""
    for seq, ack, flags, state in (
        (0, 101, RST | ACK, "over"),
        (0, 100, RST | ACK, "connecting"),
        (0, 0, RST, "connecting"),
        (101, 0, RST, "connecting"),
    ):
        peer = AppPeer(("10.107.0.1", 1000), ("10.107.0.2", 7), initial_sequence=100)
        peer.connect(1.0)
        packet = build_tcp(b"\x0a\x6b\0\2", b"\x0a\x6b\0\1", 7, 1000, seq=seq, ack=ack, flags=flags)
        peer.handle_packet(bytes(packet), 1.0)
        assert peer.state == state


def test_peer_complains_about_what_no_kernel_sends() -> None:
    """Bad checksums and shrinking windows are findings, not noise."""
    peer = AppPeer(("10.107.0.1", 1000), ("10.107.0.2", 7), timestamps=False)
    peer.connect(1.0)

    def answer(flags: int, seq: int, window: int) -> bytes:
        return bytes(build_tcp(b"\x0a\x6b\0\2", b"\x0a\x6b\0\1", 7, 1000, seq=seq, ack=1, flags=flags, window=window))

    peer.handle_packet(answer(SYN | ACK, 500, 1000), 1.0)
    assert peer.state == "connected"
    peer.handle_packet(answer(ACK, 501, 900), 1.0)
    assert peer.complaints == ["the window's edge moved left by 100"]
    peer.handle_packet(answer(ACK, 501, 900)[:-1] + b"\x55", 1.0)
    assert peer.complaints[-1] == "bad TCP checksum"
