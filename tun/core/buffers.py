"""The bytes of one connection: received and waiting, received too early, sent and not yet acknowledged.

All numbers are positions (`tun.seq`): unbounded, so nothing here wraps. Payloads are views on the packets they came
in, or on what the owner wrote; nothing is copied except small pieces, because a view costs 200 bytes and may keep a
64 KiB packet alive: an app that sends single bytes must not make us store a quarter of a kilobyte for each.

Every buffer is bounded by its caller or by itself, and the sum of all by `Budget`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Final

# Payloads below this are copied out of their packet, and joined when nobody takes them.
SMALL: Final = 2048
# The pieces that small payloads are joined into.
CHUNK: Final = 4096

# Ranges kept out of order, and SACK ranges remembered from the peer (SegmentSmack CVE-2018-5390, CVE-2019-11478: what
# an attacker can multiply must be few).
MAX_RANGES: Final = 64
# What a stored piece costs besides its bytes: a view, its buffer's header, a place in a list.
PIECE_OVERHEAD: Final = 256


class Budget:
    """The memory of all flows together, and how much one flow may take of it now.

    Flows report what they hold once per batch, so the sum may overshoot by what one batch brings.

    Attributes:
        used: bytes held by all flows.
        limit: bytes that all may hold.
        receive_cap: bytes that a flow's receive buffer may hold.
        send_cap: bytes that a flow's send buffer may hold.
        crowded: are there so many flows that each must earn its send buffer?
    """

    __slots__ = ("crowded", "limit", "receive_cap", "send_cap", "used")

    def __init__(self, limit: int, receive_cap: int, send_cap: int) -> None:
        self.used: int = 0
        self.limit: int = limit
        self.receive_cap: int = receive_cap
        self.send_cap: int = send_cap
        self.crowded: bool = False


class ReceiveQueue:
    """In-order bytes that the owner has not taken yet."""

    __slots__ = ("chunk", "chunk_used", "size", "views")

    def __init__(self) -> None:
        self.views: list[memoryview] = []
        self.size: int = 0
        self.chunk: bytearray | None = None  # the last view is a part of it; its rest is free
        self.chunk_used: int = 0

    def append(self, packet: bytes, start: int, end: int) -> None:
        """Add `packet[start:end]`."""
        length = end - start
        self.size += length
        if length >= SMALL:
            self.chunk = None
            self.views.append(memoryview(packet)[start:end])
        elif not self.views:
            self.views.append(memoryview(packet[start:end]))
        else:
            self._join(memoryview(packet)[start:end])

    def append_view(self, view: memoryview) -> None:
        """Add a view that was stored before."""
        self.size += len(view)
        if len(view) < SMALL and self.views:
            self._join(view)
        else:
            self.chunk = None
            self.views.append(view)

    def _join(self, view: memoryview) -> None:
        """Add a small piece behind waiting ones: fill a chunk, so that single bytes do not become single objects."""
        length = len(view)
        chunk = self.chunk
        if chunk is not None and self.chunk_used + length <= CHUNK:
            used = self.chunk_used
            chunk[used : used + length] = view
            last = len(self.views[-1])
            self.chunk_used = used + length
            self.views[-1] = memoryview(chunk)[used - last : used + length]
            return
        chunk = bytearray(CHUNK)
        chunk[:length] = view
        self.chunk = chunk
        self.chunk_used = length
        self.views.append(memoryview(chunk)[:length])

    def consume(self, count: int) -> None:
        """Forget the first `count` bytes; views handed out stay valid."""
        self.size -= count
        views = self.views
        if self.size == 0:
            views.clear()
            self.chunk = None
            return
        whole = 0
        while count >= len(views[whole]):
            count -= len(views[whole])
            whole += 1
        if whole:
            del views[:whole]
        if count:
            views[0] = views[0][count:]

    def clear(self) -> None:
        """Forget everything."""
        self.views.clear()
        self.size = 0
        self.chunk = None


class OutOfOrder:
    """Bytes beyond a gap: disjoint ranges, sorted, at most MAX_RANGES, never touching each other.

    The bytes that came first win where segments overlap: what was once reported by SACK does not change.
    """

    __slots__ = ("charge", "ends", "packets", "pieces", "pushed_out", "recent", "starts", "untold")

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        self.pieces: list[list[memoryview]] = []
        self.packets: list[int] = []  # how many packets brought something to each range
        self.pushed_out: int = 0  # packets whose bytes had to go, since the owner set it to 0
        self.charge: int = 0  # bytes held, overhead included
        self.recent: list[int] = []  # a position in each range, the one touched last first (for SACK)
        self.untold: list[int] = []  # positions touched since the last SACK

    def insert(self, start: int, end: int, view: memoryview, limit: int) -> int:
        """Store `view` as [start, end), keeping what is there already.

        Where that would take more than `limit` bytes or MAX_RANGES ranges, ranges above it go, the highest first: the
        app will need to send them again last. If that does not help, `view` is not kept.

        Args:
            limit: bytes that may be held, overhead included; negative for no limit.

        Returns: how many bytes were new and are kept.
        """
        if limit >= 0 and not self._make_room(start, end, limit):
            return 0
        starts = self.starts
        ends = self.ends
        first = bisect_left(ends, start)
        after = first
        count = len(starts)
        fresh: list[memoryview] = []
        at = start
        new = 0
        while after < count and starts[after] <= end:
            gap = starts[after]
            if at < gap:
                fresh.append(_part(view, at - start, gap - start))
                new += gap - at
                self.charge += gap - at + PIECE_OVERHEAD
            fresh += self.pieces[after]
            if ends[after] > at:
                at = ends[after]
            after += 1
        if at < end:
            fresh.append(_part(view, at - start, end - start) if at > start else view)
            new += end - at
            self.charge += end - at + PIECE_OVERHEAD
        if after == first:
            starts.insert(first, start)
            ends.insert(first, end)
            self.pieces.insert(first, fresh)
            self.packets.insert(first, 1)
        elif new:
            self.packets[first:after] = [sum(self.packets[first:after]) + 1]
            starts[first:after] = [min(start, starts[first])]
            ends[first:after] = [max(end, ends[after - 1])]
            self.pieces[first:after] = [fresh]
        self._touch(start)
        return new

    def _make_room(self, start: int, end: int, limit: int) -> bool:
        starts = self.starts
        need = end - start + PIECE_OVERHEAD
        while self.charge + need > limit and starts and starts[-1] > end:
            self._push_out()
        if self.charge + need > limit:
            return False
        if len(starts) < MAX_RANGES:
            return True
        first = bisect_left(self.ends, start)
        if first < len(starts) and starts[first] <= end:
            return True  # it joins what is there
        if starts[-1] < start:
            return False
        self._push_out()
        return True

    def _push_out(self) -> None:
        """Let go of the highest range."""
        self.pushed_out += self.packets[-1]
        self._drop(len(self.starts) - 1)

    def _touch(self, position: int) -> None:
        recent = self.recent
        recent.insert(0, position)
        if len(recent) > 8:
            recent.pop()
        untold = self.untold
        untold.append(position)
        if len(untold) > MAX_RANGES:
            del untold[0]

    def _drop(self, index: int) -> None:
        for piece in self.pieces[index]:
            self.charge -= len(piece) + PIECE_OVERHEAD
        del self.starts[index]
        del self.ends[index]
        del self.pieces[index]
        del self.packets[index]

    def pull(self, position: int, queue: ReceiveQueue) -> int:
        """Move what is contiguous from `position` on into `queue`.

        Returns: the position after the last byte moved; `position` when there is none.
        """
        while self.starts and self.starts[0] <= position:
            skip = position - self.starts[0]
            for piece in self.pieces[0]:
                length = len(piece)
                if skip >= length:
                    skip -= length
                    continue
                if skip:
                    piece = piece[skip:]
                    skip = 0
                queue.append_view(piece)
                position += len(piece)
            self._drop(0)
        if not self.starts:
            self.recent.clear()
            self.untold.clear()
        return position

    def blocks(self, count: int) -> list[tuple[int, int]]:
        """At most `count` ranges for SACK: the one touched last first (RFC 2018 4)."""
        found: list[tuple[int, int]] = []
        for position in self.recent:
            index = bisect_left(self.ends, position + 1)
            if index < len(self.starts) and self.starts[index] <= position:
                block = (self.starts[index], self.ends[index])
                if block not in found:
                    found.append(block)
                    if len(found) == count:
                        break
        return found

    def untold_blocks(self) -> list[tuple[int, int]]:
        """All ranges that have been touched since `untold` was cleared, the lowest first."""
        found: list[tuple[int, int]] = []
        for position in sorted(self.untold):
            index = bisect_left(self.ends, position + 1)
            if index < len(self.starts) and self.starts[index] <= position:
                block = (self.starts[index], self.ends[index])
                if not found or found[-1] != block:
                    found.append(block)
        return found

    def covers(self, start: int, end: int) -> bool:
        """Is all of [start, end) here already?"""
        index = bisect_left(self.ends, end)
        return index < len(self.starts) and self.starts[index] <= start

    def clear(self) -> None:
        """Forget everything."""
        self.starts.clear()
        self.ends.clear()
        self.pieces.clear()
        self.packets.clear()
        self.recent.clear()
        self.untold.clear()
        self.charge = 0


class SendQueue:
    """What the owner wrote, from the first unacknowledged byte on; references, not copies.

    Invariant: `pieces` hold exactly the bytes [start, end), where `start` may lie before the acknowledged position by
    less than one piece (a piece is released when all of it is acknowledged).
    """

    __slots__ = ("chunk", "chunk_used", "cursor", "cursor_start", "end", "pieces", "start")

    def __init__(self, start: int) -> None:
        self.pieces: list[memoryview] = []
        self.start: int = start  # position of the first byte of the first piece
        self.end: int = start
        self.cursor: int = 0  # the piece that was read last: sending is sequential
        self.cursor_start: int = start
        self.chunk: bytearray | None = None
        self.chunk_used: int = 0

    def append(self, view: memoryview) -> None:
        """Add bytes; large views are kept by reference, small ones are joined."""
        length = len(view)
        self.end += length
        if length >= SMALL or not self.pieces:
            self.chunk = None
            self.pieces.append(view)
            return
        chunk = self.chunk
        if chunk is not None and self.chunk_used + length <= CHUNK:
            used = self.chunk_used
            chunk[used : used + length] = view
            last = len(self.pieces[-1])
            self.chunk_used = used + length
            self.pieces[-1] = memoryview(chunk)[used - last : used + length]
            return
        chunk = bytearray(CHUNK)
        chunk[:length] = view
        self.chunk = chunk
        self.chunk_used = length
        self.pieces.append(memoryview(chunk)[:length])

    def release(self, position: int) -> None:
        """Forget the pieces that end at or before `position`."""
        pieces = self.pieces
        count = 0
        start = self.start
        for piece in pieces:
            after = start + len(piece)
            if after > position:
                break
            start = after
            count += 1
        if not count:
            return
        del pieces[:count]
        self.start = start
        self.cursor -= count
        if self.cursor < 0:
            self.cursor = 0
            self.cursor_start = start
        if not pieces:
            self.chunk = None
            self.cursor = 0
            self.cursor_start = start

    def gather(self, position: int, count: int) -> list[memoryview]:
        """Views of the bytes [position, position + count), which must be held."""
        if position < self.cursor_start:
            self.cursor = 0
            self.cursor_start = self.start
        pieces = self.pieces
        index = self.cursor
        start = self.cursor_start
        piece = pieces[index]
        while position - start >= len(piece):
            start += len(piece)
            index += 1
            piece = pieces[index]
        views: list[memoryview] = []
        offset = position - start
        while True:
            available = len(piece) - offset
            if available > count:
                views.append(piece[offset : offset + count])
                break
            views.append(piece[offset:] if offset else piece)
            count -= available
            if count == 0:
                break
            start += len(piece)
            index += 1
            piece = pieces[index]
            offset = 0
        self.cursor = index
        self.cursor_start = start
        return views

    def byte_before(self, position: int) -> int:
        """The byte at `position - 1`, or -1 when it is not held any more."""
        at = position - 1
        if not self.start <= at < self.end:
            return -1
        return self.gather(at, 1)[0][0]

    def clear(self) -> None:
        """Forget everything that waits; `end` stays, since a FIN's position depends on it."""
        self.pieces.clear()
        self.start = self.end
        self.cursor = 0
        self.cursor_start = self.end
        self.chunk = None


class Scoreboard:
    """Which of our bytes beyond a gap the peer has said to hold (RFC 6675): disjoint sorted ranges, at most 64."""

    __slots__ = ("lefts", "rights")

    def __init__(self) -> None:
        self.lefts: list[int] = []
        self.rights: list[int] = []

    def add(self, left: int, right: int) -> bool:
        """Note [left, right). Beyond 64 ranges new ones are not kept: the retransmission timer is the safety net.

        Returns: did it say anything new?
        """
        lefts = self.lefts
        rights = self.rights
        first = bisect_left(rights, left)
        after = first
        while after < len(lefts) and lefts[after] <= right:
            after += 1
        if after == first:
            if len(lefts) >= MAX_RANGES:
                return False
            lefts.insert(first, left)
            rights.insert(first, right)
            return True
        if lefts[first] <= left and rights[first] >= right:
            return False
        new_left = min(left, lefts[first])
        new_right = max(right, rights[after - 1])
        lefts[first:after] = [new_left]
        rights[first:after] = [new_right]
        return True

    def advance(self, position: int) -> None:
        """Forget what lies before `position`, which is acknowledged now."""
        count = 0
        for right in self.rights:
            if right > position:
                break
            count += 1
        if count:
            del self.lefts[:count]
            del self.rights[:count]
        if self.lefts and self.lefts[0] < position:
            self.lefts[0] = position

    def highest(self) -> int:
        """The position after the highest byte noted; -1 when there is none."""
        return self.rights[-1] if self.rights else -1

    def held(self, start: int, end: int) -> int:
        """How many bytes of [start, end) are noted."""
        total = 0
        for index in range(len(self.lefts)):
            left = max(self.lefts[index], start)
            right = min(self.rights[index], end)
            if right > left:
                total += right - left
        return total

    def gap(self, position: int, limit: int) -> tuple[int, int]:
        """The first gap at or after `position` and before `limit`: (start, end), empty when there is none."""
        for index in range(len(self.lefts)):
            if position < self.lefts[index]:
                return position, min(self.lefts[index], limit)
            if position < self.rights[index]:
                position = self.rights[index]
        return position, max(position, limit)

    def clear(self) -> None:
        """Forget everything (RFC 2018 8: after a timeout the peer may have changed its mind)."""
        self.lefts.clear()
        self.rights.clear()


def copy_small(packet: bytes, start: int, end: int) -> memoryview:
    """A view of `packet[start:end]` that does not keep a large packet alive for a few bytes."""
    if end - start < SMALL:
        return memoryview(packet[start:end])
    return memoryview(packet)[start:end]


def _part(view: memoryview, start: int, end: int) -> memoryview:
    """A part of a view, as `copy_small` would; nor may a part keep a whole alive that is twice as large."""
    if end - start < SMALL or (end - start) * 2 < len(view):
        return memoryview(bytes(view[start:end]))
    return view[start:end]


NO_VIEWS: Final[Sequence[memoryview]] = ()
