"""Recordings of several workers as one capture file."""

from __future__ import annotations

import io
import math

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from ngrokd.workers.messages import BadMessage, Taped
from ngrokd.workers.tape import Joined, JoinedTape
from tun.pcap import (
    CapturedPacket,
    interface_description,
    interface_statistics,
    packet_block,
    read_capture,
    section_header,
)


def packet(number: int) -> bytes:
    """Twenty bytes that are told from others."""
    return b"\x45" + bytes(18) + bytes([number])


def recording(name: str, numbers: list[int], interfaces: int = 1) -> bytes:
    """A file as a worker makes it: packets spread over interfaces, the last of which has statistics."""
    blocks = [section_header("tests")]
    blocks += [interface_description(f"{name}{index}") for index in range(interfaces)]
    blocks += [packet_block(number % interfaces, 1_000 + number, packet(number), inbound=True) for number in numbers]
    blocks.append(interface_statistics(interfaces - 1, 0, 1, 1, 1, 0))
    return b"".join(blocks)


def read(data: bytes) -> list[CapturedPacket]:
    return list(read_capture(io.BytesIO(data)))


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 255), max_size=5), st.integers(1, 3)), min_size=1, max_size=3),
    st.integers(1, 80),
    st.randoms(use_true_random=False),
)
def test_files_are_joined_however_their_bytes_come(
    files: list[tuple[list[int], int]], piece: int, order: object
) -> None:
    """Every packet is there once, under the name of its own interface, and each file's stay in order."""
    data = [recording(f"w{index}.", numbers, count) for index, (numbers, count) in enumerate(files)]
    waiting = [(index, text[at : at + piece]) for index, text in enumerate(data) for at in range(0, len(text), piece)]
    positions = sorted(range(len(waiting)), key=lambda at: (at * 7919) % 101)
    joined = Joined()
    by_file: dict[int, list[bytes]] = {}
    for index, text in waiting:
        by_file.setdefault(index, []).append(text)

    out = b""
    for at in positions:  # in any order between files, in theirs within each
        index = waiting[at][0]
        out += joined.feed(index, by_file[index].pop(0))

    found = read(out)
    assert joined.packets == len(found) == sum(len(numbers) for numbers, _ in files)
    for index, (numbers, count) in enumerate(files):
        mine = [each for each in found if each.interface.startswith(f"w{index}.")]
        assert [each.packet for each in mine] == [packet(number) for number in numbers]
        assert [each.interface for each in mine] == [f"w{index}.{number % count}" for number in numbers]


@pytest.mark.parametrize(
    "junk",
    [
        b"\x06\x00\x00\x00\x0b\x00\x00\x00",
        b"\x06\x00\x00\x00\xff\xff\xff\xff",
        packet_block(0, 1, packet(1), inbound=True),
    ],
    ids=["odd", "long", "undescribed"],
)
def test_a_file_that_is_none_is_junk(junk: bytes) -> None:
    with pytest.raises(BadMessage, match="a recording with"):
        Joined().feed(0, junk)


def test_other_blocks_are_left_out() -> None:
    """Name resolution, decryption secrets: we write none, and nobody in our place shall."""
    other = b"\x0a\x00\x00\x00\x10\x00\x00\x00what\x10\x00\x00\x00"

    assert Joined().feed(0, other) == b""


class Reel:
    """A worker's recording in pieces, each after a while; cancelled it loses nothing."""

    def __init__(self, *pieces: tuple[float, Taped]) -> None:
        self._pieces = list(pieces)

    async def __call__(self) -> Taped:
        if not self._pieces:
            return Taped(b"", ended="duration")
        at, taped = self._pieces[0]
        await trio.sleep_until(at)
        del self._pieces[0]
        return taped


async def test_what_comes_first_is_read_first(autojump_clock: MockClock) -> None:
    one, other = recording("one", [1]), recording("other", [2, 3])
    stopped: list[bool] = []
    tape = JoinedTape(
        [Reel((5, Taped(one, 1, 0))), Reel((1, Taped(other[:100], 1, 4)), (9, Taped(other[100:], 2, 5)))],
        math.inf,
        lambda: stopped.append(True),
    )

    with tape:
        pieces = []
        times = []
        while piece := await tape.read():
            pieces.append(piece)
            times.append(trio.current_time())

    assert times == [1, 5, 9]
    assert sorted(each.packet[-1] for each in read(b"".join(pieces))) == [1, 2, 3]
    assert (tape.recorded, tape.dropped, tape.ended) == (3, 5, "duration")
    assert stopped == [True]
    tape.close()
    assert stopped == [True]


async def test_it_ends_after_so_many_packets_of_all(autojump_clock: MockClock) -> None:
    """Each worker counts to the number for itself."""
    tape = JoinedTape(
        [Reel((1, Taped(recording("one", [1])))), Reel((2, Taped(recording("other", [2])))), Reel((3, Taped(b"x")))],
        2,
        lambda: None,
    )

    pieces = [await tape.read(), await tape.read()]

    assert await tape.read() == b""
    assert (len(read(b"".join(pieces))), tape.ended) == (2, "packets")


async def test_a_worker_that_records_junk_ends_the_recording() -> None:
    tape = JoinedTape([Reel((0, Taped(b"\x06\x00\x00\x00\xff\xff\xff\xff")))], math.inf, lambda: None)

    with pytest.raises(BadMessage):
        await tape.read()

    assert await tape.read() == b""
    assert tape.ended == "failed"
