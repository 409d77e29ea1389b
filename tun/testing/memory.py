"""Devices without an operating system: a cable between two ends, and one that damages what it carries.

`memory_pair` is a cable with a network card at each end. The cards do what the contract of `tun.device.base` leaves to
the device: they make the TCP checksum of what is written, cut offloaded segments into pieces when told to, and check
the checksum of what is read, vouching only for packets where it is right. So a stack that forgets its pseudo header, or
trusts a device that did not vouch, fails on the cable as it would on a real link.

`FaultyDevice` stands between a stack and any device, a real one included, and loses, repeats, delays and damages
packets in both directions. Its dice are given to it and its clock is Trio's (or any other), so a run can be repeated.

Rules of this file: nothing happens by itself; no task, no thread, no real time, no chance of its own.
"""

from __future__ import annotations

import errno
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from tun.device.base import Device, check_packet, check_segment, ip_header_length
from tun.errors import DeviceError
from tun.wire.checksum import complete, fold, internet_checksum, pseudo_header_sum, sum16

TCP: Final = 6
UDP: Final = 17
CHECKSUM_OFFSETS: Final = {TCP: 16, UDP: 6}
FIN: Final = 0x01
PSH: Final = 0x08
CWR: Final = 0x80

# As the transmit queue that the daemon gives its real link.
DEFAULT_CAPACITY: Final = 5000

Bytes = bytes | bytearray | memoryview


def memory_pair(
    *,
    names: tuple[str, str] = ("memory0", "memory1"),
    mtu: int = 1500,
    offload: bool = True,
    capacity: int = DEFAULT_CAPACITY,
    split: bool = False,
    vouch: bool = True,
) -> tuple[MemoryDevice, MemoryDevice]:
    """Two devices joined by a cable: what is written to the one is read from the other, in order.

    Args:
        names: what the two are called.
        mtu: of both.
        offload: whether writers may hand over payload larger than a segment.
        capacity: packets that wait in each direction before writers are told to try later.
        split: cut offloaded segments into pieces, as a card does before the cable; otherwise they arrive whole, as
            they do between a kernel and its own TUN device.
        vouch: check TCP checksums at the reading end and vouch for good ones; otherwise vouch for nothing, as a device
            without offload.
    """
    one, other = (
        MemoryDevice(name, mtu=mtu, offload=offload, capacity=capacity, split=split, vouch=vouch) for name in names
    )
    one._peer, other._peer = other, one
    return one, other


class MemoryDevice:
    """One end of a cable; implements `tun.device.base.Device`. Made by `memory_pair`.

    Attributes:
        written: packets that the other end was given.
        drops: packets thrown away by reason: "link_down".
    """

    def __init__(self, name: str, *, mtu: int, offload: bool, capacity: int, split: bool, vouch: bool) -> None:
        self.name = name
        self.mtu = mtu
        self.offload = offload
        self.prefix = 0
        self.drops: dict[str, int] = {}
        self.written = 0
        self._capacity = capacity
        self._split = split
        self._vouch = vouch
        self._peer: MemoryDevice | None = None
        self._queue: deque[bytes] = deque()
        self._up = True
        self._gone: tuple[str, int] | None = None
        self._readable = trio.Event()
        self._writable = trio.Event()
        self._reader_waits = False
        self._writer_waits = False

    def __repr__(self) -> str:
        return f"<MemoryDevice {self.name} waiting={len(self._queue)}>"

    def fileno(self) -> int:
        """There is none."""
        return -1

    def read(self) -> bytes | None:
        """Take one packet; see `Device.read`."""
        self._check()
        if not self._queue:
            return None
        packet = self._queue.popleft()
        if self._peer is not None:
            self._peer._writable.set()
        return packet

    def verified(self, packet: bytes) -> bool:
        """Whether this end's card found the TCP checksum right; other protocols it leaves to the stack."""
        return self._vouch and checksum_is_right(packet)

    def write(self, header: Bytes, payload: Sequence[bytes | memoryview], gso_size: int) -> bool:
        """Give one TCP segment to the card; see `Device.write`."""
        self._check()
        payload_bytes = check_segment(header, payload, gso_size, self.offload)
        packet = complete_segment(header, payload)
        if self._split and gso_size and payload_bytes > gso_size:
            return self._send(split_segment(packet, gso_size))
        return self._send([packet])

    def write_packet(self, packet: Bytes) -> bool:
        """Give one complete packet to the card; see `Device.write_packet`."""
        self._check()
        check_packet(packet)
        return self._send([bytes(packet)])

    def _send(self, packets: list[bytes]) -> bool:
        peer = self._peer
        if peer is None or not (self._up and peer._up):
            self.drops["link_down"] = self.drops.get("link_down", 0) + len(packets)
            return True
        # A segment that was cut is not left half sent, so the queue may overshoot by the pieces of one segment.
        if len(peer._queue) >= self._capacity:
            return False
        peer._queue.extend(packets)
        self.written += len(packets)
        peer._readable.set()
        return True

    async def wait_readable(self) -> None:
        """Wait until a packet waits or the device is gone; see `Device.wait_readable`."""
        await trio.lowlevel.checkpoint()
        if self._reader_waits:
            raise trio.BusyResourceError("another task already waits for packets of this device")
        self._reader_waits = True
        try:
            while not self._queue and self._gone is None:
                self._readable = trio.Event()
                await self._readable.wait()
        finally:
            self._reader_waits = False
        self._check_closed()

    async def wait_writable(self) -> None:
        """Wait until the other end's queue has room or the device is gone; see `Device.wait_writable`."""
        await trio.lowlevel.checkpoint()
        if self._writer_waits:
            raise trio.BusyResourceError("another task already waits for room in this device")
        self._writer_waits = True
        try:
            while self._peer is not None and len(self._peer._queue) >= self._capacity and self._gone is None:
                self._writable = trio.Event()
                await self._writable.wait()
        finally:
            self._writer_waits = False
        self._check_closed()

    def set_link(self, up: bool) -> None:
        """Take the link down or up. While it is down, what is written at either end is dropped, and no event comes."""
        self._up = up

    def delete(self) -> None:
        """Do what deleting the interface does: waiting tasks wake, and every call raises DeviceError."""
        self._leave(f"the interface {self.name} was deleted while it was in use", errno.ENXIO)

    def close(self) -> None:
        """Give the device back; the other end is then a link that is down. Idempotent."""
        self._leave(f"the device {self.name} was closed", errno.EBADF)

    def _leave(self, message: str, number: int) -> None:
        self._gone = (message, number)
        self._queue.clear()
        peer, self._peer = self._peer, None
        if peer is not None:
            peer._peer = None
            peer._writable.set()
        self._readable.set()
        self._writable.set()

    def _check(self) -> None:
        if self._gone is not None:
            raise DeviceError(self._gone[0], errno=self._gone[1])

    def _check_closed(self) -> None:
        # As with a real descriptor: deletion is an event that the next read explains, a closed device has no events.
        if self._gone is not None and self._gone[1] == errno.EBADF:
            self._check()


@dataclass(frozen=True, slots=True)
class Faults:
    """What happens to packets of one direction. Probabilities from 0 to 1, each packet's fate drawn on its own.

    Attributes:
        loss: a packet vanishes.
        duplication: it arrives twice.
        reordering: it is held back for up to `hold_s`, so that later ones overtake it.
        corruption: one bit of it is turned over.
        delay_s: how long every packet travels, seconds.
        hold_s: the longest hold of a reordered packet, seconds.
    """

    loss: float = 0.0
    duplication: float = 0.0
    reordering: float = 0.0
    corruption: float = 0.0
    delay_s: float = 0.0
    hold_s: float = 0.02


NO_FAULTS: Final = Faults()


class FaultyDevice:
    """A device in front of another one that mistreats packets; implements `tun.device.base.Device`.

    Corruption meets packets whose checksum was made before: a card cannot mend them, and `verified` never vouches for
    one, so it is the stack's or the kernel's checksum test that must catch them.

    Delayed packets move when somebody calls `read`, `write` or waits in `wait_readable`, which a pump always does.
    `now` must be the clock that the deadlines of `wait_readable` run on; without Trio, any clock, and no waiting.

    Args:
        device: where packets really come from and go to.
        chance: the dice; the same dice and the same packets make the same faults.
        reading: what happens to packets on their way to the stack.
        writing: what happens to packets on their way from it.
        split: cut offloaded segments of both directions into pieces first, so that pieces get lost and not 64 KiB.
        now: the time, seconds.

    Attributes:
        faults: what was done to packets so far, by name of the fault.
    """

    def __init__(
        self,
        device: Device,
        chance: random.Random,
        *,
        reading: Faults = NO_FAULTS,
        writing: Faults = NO_FAULTS,
        split: bool = False,
        now: Callable[[], float] = trio.current_time,
    ) -> None:
        self.device = device
        self.name = device.name
        self.mtu = device.mtu
        self.offload = device.offload
        self.prefix = 1  # one byte: whether the packet is vouched for
        self.reading = reading
        self.writing = writing
        self.faults: dict[str, int] = {}
        self._chance = chance
        self._split = split
        self._now = now
        self._arriving: list[tuple[float, int, bytes]] = []
        self._leaving: list[tuple[float, int, bytes, int, int]] = []  # due, order, packet, header bytes, gso_size
        self._order = 0
        self._scope: trio.CancelScope | None = None
        self._closed = False

    @property
    def drops(self) -> dict[str, int]:
        """What the device behind threw away; the faults made here are in `faults`."""
        return self.device.drops

    def fileno(self) -> int:
        """None, whatever the device behind has: delayed packets come without it."""
        return -1

    def read(self) -> bytes | None:
        """Take one packet that has arrived by now; see `Device.read`."""
        self._move()
        if self._arriving and self._arriving[0][0] <= self._now():
            return heapq.heappop(self._arriving)[2]
        return None

    def verified(self, packet: bytes) -> bool:
        """Whether the device behind vouches for the packet and it was not damaged since."""
        return packet[0] == 1

    def write(self, header: Bytes, payload: Sequence[bytes | memoryview], gso_size: int) -> bool:
        """Send one TCP segment, or not; see `Device.write`."""
        payload_bytes = check_segment(header, payload, gso_size, self.offload)
        if gso_size and payload_bytes > gso_size and self._split:
            for piece in split_segment(complete_segment(header, payload), gso_size):
                self._leave(piece, 0, 0)
        else:
            self._leave(b"".join((header, *payload)), len(header), gso_size)
        self._move()
        return True

    def write_packet(self, packet: Bytes) -> bool:
        """Send one complete packet, or not; see `Device.write_packet`."""
        check_packet(packet)
        self._leave(bytes(packet), 0, 0)
        self._move()
        return True

    async def wait_readable(self) -> None:
        """Wait until a packet has arrived; see `Device.wait_readable`. Packets on their way out leave meanwhile."""
        await trio.lowlevel.checkpoint()
        while True:
            self._move()
            due = min(self._arriving[0][0] if self._arriving else math.inf, self._next_departure())
            if self._arriving and self._arriving[0][0] <= self._now():
                return
            with trio.CancelScope(deadline=due) as self._scope:
                try:
                    if self._leaving and self._leaving[0][0] <= self._now():
                        await self.device.wait_writable()
                    else:
                        await self.device.wait_readable()
                finally:
                    self._scope = None

    def _next_departure(self) -> float:
        # One that is due and still here waits for room, not for time.
        return self._leaving[0][0] if self._leaving and self._leaving[0][0] > self._now() else math.inf

    async def wait_writable(self) -> None:
        """Return at once: what cannot leave yet waits here."""
        await trio.lowlevel.checkpoint()
        if self._closed:
            raise DeviceError(f"the device {self.name} was closed", errno=errno.EBADF)

    def close(self) -> None:
        """Close the device behind; what is still on its way is lost."""
        self._closed = True
        self._arriving.clear()
        self._leaving.clear()
        self.device.close()

    def _move(self) -> None:
        """Take in what the device behind has, and let go what is due."""
        inner = self.device
        while (read := inner.read()) is not None:
            packet, verified = read[inner.prefix :], inner.verified(read)
            # Whoever handed over more than the link carries at once, left the cutting to the card.
            if self._split and verified and len(packet) > self.mtu:
                for piece in split_segment(packet, self.mtu - _header_bytes(packet)):
                    self._arrive(piece, True)
            else:
                self._arrive(packet, verified)
        while self._leaving and self._leaving[0][0] <= self._now():
            _, _, packet, header_bytes, gso_size = self._leaving[0]
            if header_bytes:
                sent = inner.write(packet[:header_bytes], (memoryview(packet)[header_bytes:],), gso_size)
            else:
                sent = inner.write_packet(packet)
            if not sent:
                return
            heapq.heappop(self._leaving)

    def _arrive(self, packet: bytes, verified: bool) -> None:
        for due, damaged in self._fates(self.reading):
            if damaged:
                # What the kernel vouches for may lack its checksum: it needs one before a bit can be wrong.
                arrived = b"\0" + self._damage(recompute(packet) if verified else packet)
            else:
                arrived = (b"\1" if verified else b"\0") + packet
            heapq.heappush(self._arriving, (due, self._number(), arrived))

    def _leave(self, packet: bytes, header_bytes: int, gso_size: int) -> None:
        for due, damaged in self._fates(self.writing):
            if damaged:
                damaged_packet = self._damage(recompute(packet) if header_bytes else packet)
                # The kernel would refuse a packet whose length field is wrong, as if we had made a mistake.
                if _is_deliverable(damaged_packet):
                    heapq.heappush(self._leaving, (due, self._number(), damaged_packet, 0, 0))
            else:
                heapq.heappush(self._leaving, (due, self._number(), packet, header_bytes, gso_size))
            if self._scope is not None and due < self._scope.deadline:
                self._scope.deadline = due

    def _fates(self, faults: Faults) -> list[tuple[float, bool]]:
        """When the copies of one packet arrive, and which of them are damaged."""
        roll = self._chance.random
        if roll() < faults.loss:
            self._count("lost")
            return []
        copies = 1
        if roll() < faults.duplication:
            self._count("duplicated")
            copies = 2
        fates = []
        for _ in range(copies):
            due = self._now() + faults.delay_s
            if roll() < faults.reordering:
                self._count("reordered")
                due += roll() * faults.hold_s
            damaged = roll() < faults.corruption
            if damaged:
                self._count("corrupted")
            fates.append((due, damaged))
        return fates

    def _damage(self, packet: bytes) -> bytes:
        damaged = bytearray(packet)
        bit = self._chance.randrange(len(packet) * 8)
        damaged[bit >> 3] ^= 1 << (bit & 7)
        return bytes(damaged)

    def _count(self, fault: str) -> None:
        self.faults[fault] = self.faults.get(fault, 0) + 1

    def _number(self) -> int:
        self._order += 1
        return self._order


def split_segment(packet: bytes, gso_size: int) -> list[bytes]:
    """Cut a complete TCP packet into pieces of at most `gso_size` bytes of payload, as TSO does.

    FIN and PSH go with the last piece and CWR with the first; IPv4 identifications count up from the packet's own.
    """
    start = ip_header_length(packet)
    header_bytes = _header_bytes(packet)
    sequence = int.from_bytes(packet[start + 4 : start + 8])
    identification = int.from_bytes(packet[4:6])
    flags = packet[start + 13]
    pieces = []
    for number, offset in enumerate(range(header_bytes, len(packet), gso_size)):
        piece = bytearray(packet[:header_bytes])
        piece += packet[offset : offset + gso_size]
        piece_flags = flags
        if offset + gso_size < len(packet):
            piece_flags &= ~(FIN | PSH)
        if number:
            piece_flags &= ~CWR
        piece[start + 13] = piece_flags
        piece[start + 4 : start + 8] = ((sequence + offset - header_bytes) & 0xFFFFFFFF).to_bytes(4)
        if packet[0] >> 4 == 4:
            piece[2:4] = len(piece).to_bytes(2)
            piece[4:6] = ((identification + number) & 0xFFFF).to_bytes(2)
            piece[10:12] = bytes(2)
            piece[10:12] = internet_checksum(piece[:start]).to_bytes(2)
        else:
            piece[4:6] = (len(piece) - 40).to_bytes(2)
        pieces.append(recompute(bytes(piece)))
    return pieces


def complete_segment(header: Bytes, payload: Sequence[bytes | memoryview]) -> bytes:
    """The whole packet of one `Device.write`, its TCP checksum made from the pseudo header's sum that it brought."""
    head = bytearray(header)
    start = ip_header_length(header)
    complete(head, start, start + CHECKSUM_OFFSETS[TCP], payload)
    return b"".join((head, *payload))


def recompute(packet: bytes) -> bytes:
    """The packet with its TCP or UDP checksum made anew, whatever it holds; other protocols stay as they are."""
    protocol, start, initial = _transport(packet)
    offset = CHECKSUM_OFFSETS.get(protocol)
    if offset is None or len(packet) < start + offset + 2:
        return packet
    complete_packet = bytearray(packet)
    complete_packet[start + offset : start + offset + 2] = bytes(2)
    checksum = internet_checksum(memoryview(complete_packet)[start:], initial)
    complete_packet[start + offset : start + offset + 2] = checksum.to_bytes(2)
    return bytes(complete_packet)


def checksum_is_right(packet: bytes) -> bool:
    """Whether this is a whole TCP packet whose checksum is right. False for everything else, broken headers too."""
    try:
        check_packet(packet)
    except ValueError:
        return False
    protocol, start, initial = _transport(packet)
    if protocol != TCP or start < 20 or len(packet) < start + 20:
        return False
    return fold(sum16(memoryview(packet)[start:]) + initial) == 0xFFFF


def _header_bytes(packet: bytes) -> int:
    start = ip_header_length(packet)
    return start + (packet[start + 12] >> 4) * 4


def _transport(packet: bytes) -> tuple[int, int, int]:
    """Protocol, offset and pseudo-header sum of what the IP header carries."""
    start = ip_header_length(packet)
    if packet[0] >> 4 == 4:
        return packet[9], start, pseudo_header_sum(packet[12:16], packet[16:20], packet[9], len(packet) - start)
    return packet[6], start, pseudo_header_sum(packet[8:24], packet[24:40], packet[6], len(packet) - start)


def _is_deliverable(packet: bytes) -> bool:
    try:
        check_packet(packet)
    except ValueError:
        return False
    return True
