"""Captures of real kernels and programs, played to a fresh stack: what it answers is in `golden/`.

A difference is either a mistake or an intention. Look at it (`git diff` after `python -m tests.replay.golden`) and keep
it only if it is of the second kind. How captures are made: README.md.
"""

from __future__ import annotations

import difflib
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP  # noqa: TID251 - the oracle
from scapy.layers.inet6 import IPv6  # noqa: TID251
from scapy.packet import Packet  # noqa: TID251

from tests.netns.support import ROOT, require_namespaces
from tests.replay import golden, record
from tests.replay.packets import ACK, FIN, RST, SYN, Key, parse_tcp
from tests.replay.player import Conversation, Owner, Player, load
from tun.pcap import Capture, CaptureFilter, RecordingDevice
from tun.testing.memory import memory_pair

NAMES = sorted(path.stem for path in golden.captures())


@functools.cache
def played(name: str) -> Player:
    """One performance for all tests that only look at it."""
    return Player(load(golden.CAPTURES / f"{name}.pcapng")).play()


def answers(player: Player) -> list[bytes]:
    return [event.packet for event in player.events if not event.inbound]


def test_there_are_captures_and_each_has_its_reference() -> None:
    assert len(NAMES) >= 20
    assert sorted(path.stem for path in golden.GOLDEN.glob("*.txt")) == NAMES
    assert sum(path.stat().st_size for path in golden.captures()) < 5_000_000, "a repository is not a store of captures"


@pytest.mark.parametrize("name", NAMES)
def test_the_stack_answers_as_before(name: str) -> None:
    told = played(name).tell()
    wanted = golden.golden_file(Path(name)).read_text()

    if told != wanted:
        lines = difflib.unified_diff(wanted.splitlines(), told.splitlines(), "golden", "now", lineterm="", n=2)
        pytest.fail("\n".join([f"{name}: the stack answers otherwise", *list(lines)[:60]]))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_packets_and_the_same_clock_make_the_same_bytes(name: str) -> None:
    again = Player(load(golden.CAPTURES / f"{name}.pcapng")).play()

    assert again.events == played(name).events


def test_another_process_makes_the_same_bytes() -> None:
    """Where hashes of strings differ, and with them the order of what is in sets."""
    env = {**os.environ, "PYTHONHASHSEED": "4711"}
    for name in ("port-scan", "loss"):
        show = [sys.executable, "-m", "tests.replay.golden", "--show", str(golden.CAPTURES / f"{name}.pcapng")]
        told = subprocess.run(show, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout
        assert told == golden.golden_file(Path(name)).read_text()


# What holds for any capture, whatever the reference says


@pytest.mark.parametrize("name", NAMES)
def test_owners_get_what_the_apps_sent_and_nothing_else(name: str) -> None:
    """The bytes put together from the file, by another way."""
    player = played(name)
    for owner in player.owners:
        stream = conversation(player, owner).stream_from_app()
        assert stream.startswith(bytes(owner.received)), owner
        if owner.flow.peer_closed and not owner.flow.failure:
            assert len(owner.received) == len(stream)


@pytest.mark.parametrize("name", NAMES)
def test_apps_get_what_the_owners_wrote_and_nothing_else(name: str) -> None:
    player = played(name)
    streams: dict[Key, tuple[int, bytearray]] = {}
    finished: list[tuple[Key, bytes]] = []
    for packet in answers(player):
        tcp = parse_tcp(packet)
        if tcp is None or tcp.flags & RST:
            continue
        key = tcp.key(False)
        if tcp.flags & SYN:
            if key in streams and streams[key][0] != tcp.seq:
                finished.append((key, bytes(streams.pop(key)[1])))
            streams.setdefault(key, (tcp.seq, bytearray()))
            continue
        if key in streams and tcp.payload:
            first, stream = streams[key]
            at = (tcp.seq - first - 1) & 0xFFFFFFFF
            if at > 1 << 31:  # a probe asks with the byte before the first one
                continue
            assert at <= len(stream), "bytes left out"
            assert stream[at : at + len(tcp.payload)] == tcp.payload[: max(len(stream) - at, 0)], "a byte has changed"
            stream += tcp.payload[max(len(stream) - at, 0) :]
    finished += [(key, bytes(stream)) for key, (_, stream) in streams.items()]
    for owner in player.owners:
        written = bytes(conversation(player, owner).to_app)
        mine = [stream for key, stream in finished if key == owner.connection.key]
        assert any(written.startswith(stream) for stream in mine) or not (mine or written)
        if owner.flow.all_acknowledged and not owner.flow.failure:
            assert written in mine


@pytest.mark.parametrize("name", NAMES)
def test_a_window_never_takes_back_what_it_gave(name: str) -> None:
    edges: dict[Key, int] = {}
    shifts: dict[Key, int] = {}
    for packet in answers(played(name)):
        tcp = parse_tcp(packet)
        if tcp is None or tcp.flags & RST:
            continue
        key = tcp.key(False)
        if tcp.flags & SYN:
            shifts[key] = tcp.window_scale or 0
            edges[key] = tcp.ack + tcp.window
        elif key in edges:
            edge = tcp.ack + (tcp.window << shifts[key])
            gain = (edge - edges[key] + (1 << 31)) % (1 << 32) - (1 << 31)
            # RFC 7323 2.4: a window is told in units, so what is not a multiple can only be told once it is rounded up.
            assert gain > -(1 << shifts[key]), (key, gain)
            edges[key] = edge if gain > 0 else edges[key]


@pytest.mark.parametrize("name", NAMES)
def test_scapy_finds_every_answer_well_formed(name: str) -> None:
    for packet in set(answers(played(name))):
        check_with_scapy(packet)


LEGAL = {"MSS", "WScale", "SAckOK", "SAck", "Timestamp", "NOP", "EOL"}
ONLY_WITH_SYN = {"MSS", "WScale", "SAckOK"}


def check_with_scapy(packet: bytes) -> None:
    parsed: Packet
    if packet[0] >> 4 == 4:
        parsed = IP(packet)
        assert parsed.flags == "DF"
    else:
        parsed = IPv6(packet)
        assert parsed.nh in (6, 58), "extension headers"
    assert bytes(remade(parsed)) == packet, "a checksum or a length is wrong"
    if not isinstance(parsed.payload, TCP):
        return
    tcp = parsed[TCP]
    names = [name for name, _ in tcp.options]
    assert set(names) <= LEGAL
    flags = int(tcp.flags)
    assert flags & 0xFF in {SYN | ACK, ACK, ACK | 8, ACK | FIN, ACK | FIN | 8, RST, RST | ACK}, tcp.flags
    assert tcp.reserved == tcp.urgptr == 0
    if flags & SYN:
        assert tcp.payload.original == b""
        assert "MSS" in names
    else:
        assert not set(names) & ONLY_WITH_SYN
    if flags & RST:
        assert (names, tcp.payload.original) == ([], b"")
    for name, value in tcp.options:
        if name == "SAck":
            assert len(value) in (2, 4, 6, 8)
            assert all(
                0 < (right - left) % (1 << 32) < 1 << 30 for left, right in zip(value[::2], value[1::2], strict=True)
            )


def remade(packet: Packet) -> Packet:
    """The packet with all that scapy can compute computed by scapy."""
    again = packet.copy()
    if isinstance(again, IP):
        del again.chksum, again.len
    else:
        del again.plen
    if str(again.payload.name).startswith("ICMPv6"):
        del again.payload.cksum
    else:
        del again.payload.chksum
    return again


def conversation(player: Player, owner: Owner) -> Conversation:
    return player.script.conversations[owner.connection]


# Captures of any origin


def test_a_capture_of_some_connections_only_can_be_played(tmp_path: Path) -> None:
    """The owner's filter leaves a file that is a capture like any other."""
    packets = load(golden.CAPTURES / "abort-us.pcapng")
    (first, *_) = (tcp for packet in packets if (tcp := parse_tcp(packet.packet)))
    path = tmp_path / "filtered.pcapng"
    ours, far = memory_pair()
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    capture = Capture(fd, interests=CaptureFilter.of(ports=[first.source[1]]))
    device = RecordingDevice(ours, capture)
    for packet in packets:
        if packet.inbound:
            far.write_packet(packet.packet)
            device.read()
        else:
            device.write_packet(packet.packet)
            far.read()
    capture.close()
    os.close(fd)

    player = Player(load(path)).play()

    assert {owner.connection.key.app for owner in player.owners} == {first.source}


@pytest.mark.parametrize("begin", [1, 4, 9])
def test_a_capture_that_begins_in_the_middle_can_be_played(begin: int) -> None:
    """Packets of a connection whose SYN is not in the file belong to nobody: they are answered by RST."""
    packets = load(golden.CAPTURES / "curl-keepalive.pcapng")[begin:]

    player = Player(packets).play()

    assert player.owners == []
    assert all(parsed.flags & RST for packet in answers(player) if (parsed := parse_tcp(packet)))


@pytest.mark.netns
def test_the_recorder_still_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And what it records is answered in the replay as it was then."""
    require_namespaces()

    assert record.main(["half-close-us", "--directory", str(tmp_path)]) == 0

    packets = load(tmp_path / "half-close-us.pcapng")
    player = Player(packets).play()
    assert [len(owner.received) for owner in player.owners] == [40_004]
    assert _flags(answers(player)) == _flags([packet.packet for packet in packets if not packet.inbound])


def _flags(packets: list[bytes]) -> list[int]:
    """The flags of those that say more than ACK: how many of these there are is a matter of timing."""
    return [tcp.flags for packet in packets if (tcp := parse_tcp(packet)) and tcp.flags != ACK]


def test_the_command_lists_what_it_can_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert record.main(["--list"]) == 0

    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(listed) == NAMES


@pytest.mark.parametrize("run", [lambda: record.main(["nonsense"]), lambda: record.main([])])
def test_a_scenario_that_is_not_known_is_a_mistake_of_usage(run: Callable[[], int]) -> None:
    with pytest.raises(SystemExit) as caught:
        run()

    assert caught.value.code == 2
