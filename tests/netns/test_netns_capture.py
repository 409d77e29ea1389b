"""Captures of a real device: whole, right and in order, whenever they begin and end."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import trio

from tests.netns.stage import Stage
from tests.netns.support import Namespace, require_tools
from tests.netns.test_netns_stack import digest, echo, exchange, world
from tests.replay.packets import parse_tcp
from tests.replay.player import Player, load
from tun.pcap import Capture, CaptureFilter, RecordingDevice

# What Wireshark would show in red, as one of its filters.
WRONG = (
    "_ws.malformed || tcp.analysis.retransmission || tcp.analysis.lost_segment || tcp.analysis.ack_lost_segment "
    "|| tcp.analysis.out_of_order || tcp.analysis.duplicate_ack || tcp.analysis.reused_ports"
)
WRONG_SUMS = "ip.checksum.status == 0 || tcp.checksum.status == 0"


@pytest.mark.parametrize("offload", [True, False])
async def test_recording_begins_and_ends_under_load(
    netns: Callable[[], Namespace], tmp_path: Path, offload: bool
) -> None:
    """The device is swapped again and again while megabytes pass: no byte is wrong, no packet of a capture either."""
    data = Random(1).randbytes(30_000_000)
    captures: list[Path] = []

    async def swap(network: object, done: trio.Event) -> None:
        while not done.is_set():
            path = tmp_path / f"{len(captures)}.pcapng"
            captures.append(path)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT)
            capture = Capture(fd, interests=CaptureFilter.of(["10.107.0.2"], [80]))
            there.network.device = RecordingDevice(there.tun, capture)
            await trio.sleep(0.02)
            there.network.device = there.tun
            capture.close()
            os.close(fd)
            assert capture.dropped == 0
            await trio.sleep(0.005)

    async with world(netns(), echo, offload=offload) as there:
        done = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(swap, there.network, done)
            # A fast machine is through with one exchange before the device was swapped often enough to say anything.
            while len(captures) < 6:
                assert digest(await exchange(there, data)) == digest(data)
            done.set()

    packets = [packet for path in captures for packet in load(path)]
    assert len(packets) > 100
    assert {packet.inbound for packet in packets} == {True, False}
    for packet in packets:
        tcp = parse_tcp(packet.packet)
        assert tcp is not None
        assert tcp.good, "a checksum that nobody has completed"
    longest = max(len(packet.packet) for packet in packets)
    assert longest > 20_000 if offload else longest == 1500


async def test_a_whole_capture_is_what_was_said(netns: Callable[[], Namespace], tmp_path: Path) -> None:
    """What the file holds is enough to put both streams together again, and a fresh stack finds the same in it.

    The fresh stack is told what the owner did, as far as packets show it. On a machine that stood still in between they
    do not always show enough (bytes that the owner wrote while the app's window was closed, say), so it has some tries.
    """
    data = Random(2).randbytes(3_000_000)
    ns = netns()
    received: set[str] = set()
    for _ in range(5):
        player = Player(load(await _capture_of(ns, tmp_path, data))).play()
        (conversation,) = player.script.conversations.values()
        assert digest(conversation.stream_from_app()) == digest(data)
        assert digest(bytes(conversation.to_app)) == digest(data)
        received.add(digest(bytes(player.owners[0].received)))
        if digest(data) in received:
            break

    assert digest(data) in received


@pytest.mark.parametrize("offload", ["true", "false"])
def test_wireshark_finds_nothing_wrong_with_curl_and_the_daemon(
    netns: Callable[[], Namespace], tmp_path: Path, offload: str
) -> None:
    """Its own capture of the interface. With offload nobody has completed the sums that it sees there.

    The pings stand for whatever a capture misses when it begins and ends.
    """
    require_tools("tshark", "ping")
    path = tmp_path / "daemon.pcapng"
    play = Stage(netns(), "--demo", "--set", f"net.offload={offload}", "--set", 'net.subnet6="off"')
    try:
        play.ns.write_file("/proc/sys/net/ipv4/tcp_early_retrans", "0")  # see only_real_losses in test_netns_tools.py
        play.start()
        tshark = play.ns.start(["tshark", "-n", "-i", "ngrokd0", "-B", "64", "-w", path])
        tshark.expect("Capturing on", stream="stderr")
        play.ns.run(["ping", "-n", "-q", "-c", "3", "-i", "0.2", "hello.demo"])
        for _ in range(2):
            pages = [word for size in (0, 5000, 3_000_000) for word in ("-o", "/dev/null", f"hello.demo/bytes/{size}")]
            play.ns.run(["curl", "-sS", "-f", "-m", "20", *pages])
            post = ["curl", "-sS", "-f", "-m", "20", "-o", "/dev/null", "--data-binary", "@-", "hello.demo/hash"]
            play.ns.run(post, input="a line of a large question\n" * 100_000)
        play.ns.run(["ping", "-n", "-q", "-c", "3", "-i", "0.2", "hello.demo"])
        tshark.send_signal(signal.SIGINT)
        tshark.wait()
    finally:
        play.close()

    sums = offload == "false"
    checks = ["-o", f"tcp.check_checksum:{str(sums).upper()}", "-o", f"ip.check_checksum:{str(sums).upper()}"]

    def show(what: str) -> list[str]:
        command = ["tshark", "-n", "-r", str(path), *checks, "-Y", what]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    assert show(f"{WRONG} || {WRONG_SUMS}" if sums else WRONG) == []
    assert len(show("tcp.flags.syn == 1 && tcp.flags.ack == 0")) == 4
    assert len(show("tcp.flags.fin == 1")) == 8
    if sums:
        assert len(show("tcp.checksum.status == 1")) == len(show("tcp")) > 100


async def _capture_of(ns: Namespace, directory: Path, data: bytes) -> Path:
    """Record an exchange from its first packet to its last."""
    path = directory / "whole.pcapng"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    capture = Capture(fd, application="test")
    async with world(ns, echo) as there:
        there.network.device = RecordingDevice(there.tun, capture)
        assert digest(await exchange(there, data)) == digest(data)
        for _ in range(500):
            if not there.stack.flow_count:
                break
            await trio.sleep(0.01)
    capture.close()
    os.close(fd)
    return path
