"""Recordings of several workers as one capture file.

Each worker records what passes its own queue, as a pcapng file of its own. Those are joined block by block: one section
header, the interfaces numbered anew, packets and statistics with the new number of their interface. What else a file
may hold is left out; we write nothing else. The file's order is that in which the packets came together here, so
a reader that wants their order in time sorts by it (Wireshark does).

Nothing piles up: a worker is asked for its next piece when the last one has been taken, and what its own pipe does not
hold meanwhile it counts as dropped.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable
from struct import Struct
from types import TracebackType
from typing import Final, Self

import trio

from ngrokd.workers.messages import BadMessage, Taped

# draft-ietf-opsawg-pcapng 4.1 to 4.6, as `tun.pcap` writes it: little-endian.
_HEAD: Final = Struct("<II")
_NUMBER: Final = Struct("<I")
_SECTION: Final = 0x0A0D0D0A
_INTERFACE: Final = 1
_STATISTICS: Final = 5
_PACKET: Final = 6
_LEAST_BLOCK: Final = 12
_MOST_BLOCK: Final = 1 << 20


class Joined:
    """Joins the files of several recordings. Pure.

    Attributes:
        packets: in what was given out so far.
    """

    def __init__(self) -> None:
        self._rest: dict[int, bytearray] = {}
        self._numbers: dict[int, list[int]] = {}  # of a file's interfaces: their new numbers
        self._interfaces = 0
        self._begun = False
        self.packets = 0

    def feed(self, file: int, data: bytes) -> bytes:
        """Add bytes of one file; returns those of the joined one that are complete now. Raises BadMessage."""
        rest = self._rest.setdefault(file, bytearray())
        rest += data
        taken: list[bytes | bytearray] = []
        at = 0
        while len(rest) - at >= _HEAD.size:
            kind, size = _HEAD.unpack_from(rest, at)
            if not _LEAST_BLOCK <= size <= _MOST_BLOCK or size % 4:
                raise BadMessage(f"a recording with a block of {size} bytes")
            if len(rest) - at < size:
                break
            taken.append(self._take(file, kind, rest[at : at + size]))
            at += size
        del rest[:at]
        return b"".join(taken)

    def _take(self, file: int, kind: int, block: bytearray) -> bytes | bytearray:
        if kind == _SECTION:
            begun, self._begun = self._begun, True
            return b"" if begun else block
        if kind == _INTERFACE:
            self._numbers.setdefault(file, []).append(self._interfaces)
            self._interfaces += 1
            return block
        if kind not in (_PACKET, _STATISTICS) or len(block) < _LEAST_BLOCK + _NUMBER.size:
            return b""
        (number,) = _NUMBER.unpack_from(block, _HEAD.size)
        numbers = self._numbers.get(file, [])
        if number >= len(numbers):
            raise BadMessage(f"a recording with an interface {number} that was not described")
        _NUMBER.pack_into(block, _HEAD.size, numbers[number])
        self.packets += kind == _PACKET
        return block


class JoinedTape:
    """Packets of several workers being recorded: `ngrokd.dataplane.Tape`.

    Args:
        readers: one for each worker: waits for its next piece, which is empty when there are no more, or the worker is
            gone. Cancelled, they lose nothing.
        max_packets: of all together; then it ends.
        stop: called once, when nobody wants it any more.
    """

    def __init__(
        self, readers: list[Callable[[], Awaitable[Taped]]], max_packets: float, stop: Callable[[], None]
    ) -> None:
        self._readers = dict(enumerate(readers))
        self._joined = Joined()
        self._max_packets = max_packets
        self._stop = stop
        self._dropped: dict[int, int] = {}
        self._why: dict[int, str] = {}
        self._pieces: deque[bytes] = deque()
        self._ended = ""
        self._closed = False

    @property
    def recorded(self) -> int:
        """Packets in what was read so far."""
        return self._joined.packets

    @property
    def dropped(self) -> int:
        """Packets that workers should have recorded, but this side was too slow."""
        return sum(self._dropped.values())

    @property
    def ended(self) -> str:
        """Why it is over ("packets", "duration", "closed"), or ""."""
        return self._ended

    async def read(self) -> bytes:
        """Wait for the next bytes of the file; b"" when it is over and everything was read. Raises BadMessage."""
        await trio.lowlevel.checkpoint()
        while not self._pieces:
            if not self._readers or self._ended:
                self._ended = self._ended or next(filter(None, self._why.values()), "closed")
                return b""
            try:
                async with trio.open_nursery() as nursery:
                    for file in self._readers:
                        nursery.start_soon(self._read, file, nursery.cancel_scope)
            except* BadMessage as group:
                self._ended = "failed"
                raise BadMessage(str(group.exceptions[0])) from None
        return self._pieces.popleft()

    async def _read(self, file: int, scope: trio.CancelScope) -> None:
        """The next piece of one file; the first that comes ends the waiting for the others, who keep theirs."""
        taped = await self._readers[file]()
        self._dropped[file] = max(self._dropped.get(file, 0), taped.dropped)
        if not taped.data:
            self._why[file] = taped.ended
            del self._readers[file]
        else:
            piece = self._joined.feed(file, taped.data)
            if piece:
                self._pieces.append(piece)
            if self._joined.packets >= self._max_packets:
                self._ended = "packets"
        scope.cancel()

    def close(self) -> None:
        """Stop recording. Idempotent."""
        if not self._closed:
            self._closed = True
            self._ended = self._ended or "closed"
            self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
