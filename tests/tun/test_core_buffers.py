"""The buffers of a connection, against plain bytes and sets of positions."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tun.core.buffers import MAX_RANGES, OutOfOrder, ReceiveQueue, Scoreboard, SendQueue, copy_small

SIZES = st.integers(1, 300) | st.sampled_from([2047, 2048, 2049, 4095, 4096, 4097, 9000])


@given(st.lists(st.tuples(SIZES, st.integers(0, 20000)), max_size=40))
def test_receive_queue_is_a_queue_of_bytes(steps: list[tuple[int, int]]) -> None:
    """Whatever is joined inside, the bytes come out in order, and views taken earlier keep theirs."""
    queue = ReceiveQueue()
    expected = bytearray()
    kept: list[tuple[memoryview, bytes]] = []
    counter = 0
    for size, taken in steps:
        packet = bytes(counter + index & 0xFF for index in range(size + 7))
        counter += size
        queue.append(packet, 3, 3 + size)
        expected += packet[3 : 3 + size]
        kept += [(view, bytes(view)) for view in queue.views]
        assert b"".join(queue.views) == expected
        assert queue.size == len(expected)
        taken = min(taken, len(expected))
        if taken:
            queue.consume(taken)
            del expected[:taken]
    assert b"".join(queue.views) == expected
    assert all(view == content for view, content in kept)


def test_small_pieces_are_joined_when_nobody_takes_them() -> None:
    """Ten thousand single bytes are not ten thousand objects, and none keeps its packet."""
    queue = ReceiveQueue()
    for index in range(10000):
        queue.append(bytes(60000 if index == 0 else 1), 0, 1)

    assert queue.size == 10000
    assert len(queue.views) <= 4
    assert sum(len(bytes(view.obj)) for view in queue.views) < 20000


@given(st.lists(st.tuples(SIZES, st.integers(0, 5000), st.integers(0, 3000)), max_size=40), st.integers(0, 2**33))
def test_send_queue_gives_any_range_until_it_is_acknowledged(steps: list[tuple[int, int, int]], start: int) -> None:
    """Written in pieces, gathered from any unacknowledged position, released by ACKs in the middle of pieces."""
    queue = SendQueue(start)
    content = bytearray()
    una = start
    rng = random.Random(start)
    for size, acked, length in steps:
        data = rng.randbytes(size)
        queue.append(memoryview(data))
        content += data
        una = min(una + acked, queue.end)
        queue.release(una)
        assert queue.end == start + len(content)
        assert queue.start <= una
        if una < queue.end:
            at = rng.randint(una, queue.end - 1)
            count = min(length + 1, queue.end - at)
            assert b"".join(queue.gather(at, count)) == content[at - start : at - start + count]
            assert queue.byte_before(at + 1) == content[at - start]
    queue.release(queue.end)
    assert not queue.pieces
    assert queue.start == queue.end
    assert queue.byte_before(queue.end) == -1


def test_large_writes_are_kept_by_reference() -> None:
    """Decrypted records are not copied again."""
    data = memoryview(bytes(16384))
    queue = SendQueue(0)
    queue.append(data)

    assert queue.gather(0, 16384)[0] is data


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)), max_size=60), st.integers(0, 2**32))
@pytest.mark.rule(39)
def test_out_of_order_keeps_first_bytes_and_order(segments: list[tuple[int, int]], base: int) -> None:
    """Against a dictionary of positions: what came first stays, what is contiguous comes out."""
    waiting = OutOfOrder()
    model: dict[int, int] = {}
    for mark, (offset, length) in enumerate(segments):
        start = base + 1 + offset
        before = len(model)
        for position in range(start, start + length):
            model.setdefault(position, mark)
        view = memoryview(bytes([mark]) * length)
        assert waiting.covers(start, start + length) == (len(model) == before)
        assert waiting.insert(start, start + length, view, -1) == len(model) - before
        ranges = list(zip(waiting.starts, waiting.ends, strict=True))
        assert sorted(model) == [position for a, b in ranges for position in range(a, b)]
        assert all(a[1] < b[0] for a, b in pairwise(ranges))
        block = waiting.blocks(4)[0]
        assert block[0] <= start < block[1]
        assert len(set(waiting.blocks(4))) == len(waiting.blocks(4)) <= 4

    queue = ReceiveQueue()
    for position in range(base, base + 600):
        model.setdefault(position, 255)
    waiting.insert(base, base + 600, memoryview(b"\xff" * 600), -1)
    assert waiting.pull(base, queue) == base + 600
    assert b"".join(queue.views) == bytes(model[position] for position in sorted(model))
    assert not waiting.starts
    assert waiting.charge == 0
    assert waiting.blocks(4) == []


@given(st.lists(st.tuples(st.integers(0, 5000), st.integers(1, 700)), max_size=200), st.integers(1000, 60000))
@pytest.mark.rule(39)
def test_out_of_order_stays_within_its_bounds(segments: list[tuple[int, int]], limit: int) -> None:
    """Ranges and bytes, overhead included, whatever comes."""
    waiting = OutOfOrder()
    for offset, length in segments:
        waiting.insert(10 * offset, 10 * offset + length, memoryview(bytes(length)), limit)
        assert len(waiting.starts) <= MAX_RANGES
        assert waiting.charge <= limit + MAX_RANGES * 256
        assert waiting.charge >= sum(waiting.ends) - sum(waiting.starts)


def test_parts_of_segments_do_not_keep_them() -> None:
    """One new byte of a large segment is a copied byte."""
    waiting = OutOfOrder()
    waiting.insert(1, 60000, memoryview(bytes(59999)), -1)
    waiting.insert(1, 60001, memoryview(bytes(60000)), -1)

    assert len(waiting.pieces[0][1].obj) == 1  # type: ignore[arg-type]
    assert len(copy_small(bytes(60000), 0, 10).obj) == 10  # type: ignore[arg-type]
    assert len(copy_small(bytes(60000), 0, 3000).obj) == 60000  # type: ignore[arg-type]


@settings(max_examples=300)
@given(st.lists(st.tuples(st.integers(1, 300), st.integers(1, 40)), max_size=40), st.integers(0, 300))
def test_scoreboard_is_a_set_of_positions(blocks: list[tuple[int, int]], una: int) -> None:
    """Against a set: ranges, gaps and counts agree."""
    board = Scoreboard()
    model: set[int] = set()
    for left, length in blocks:
        new = set(range(left, left + length)) - model
        assert board.add(left, left + length) == bool(new)
        model |= new
        ranges = list(zip(board.lefts, board.rights, strict=True))
        assert sorted(model) == [position for a, b in ranges for position in range(a, b)]
    board.advance(una)
    model = {position for position in model if position >= una}
    assert board.highest() == (max(model) + 1 if model else -1)
    assert board.held(una, 150) == len([position for position in model if position < 150])
    start, end = board.gap(una, 200)
    free = [position for position in range(una, 200) if position not in model]
    if free:
        assert start == free[0]
        assert all(position not in model for position in range(start, end))
        assert end == 200 or end in model
    else:
        assert start >= end


@pytest.mark.rule(48)
def test_scoreboard_is_bounded() -> None:
    """A thousand different blocks (CVE-2019-11478): 64 stay."""
    board = Scoreboard()
    for index in range(1000):
        board.add(10 * index, 10 * index + 1)

    assert len(board.lefts) == 64
    assert not board.add(5005, 5006)
