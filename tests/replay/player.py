"""A capture played again: its apps' packets go into a fresh stack, and what the stack answers is told.

Everything comes from the file. The clock is the file's. The packets of the apps are those of the file, and so is what
the owner of each connection did, as far as it can be seen from outside:

  * it accepted when the SYN-ACK was sent, refused or reset when the RST was sent,
  * it wrote what was sent, all bytes up to a PSH at once (PSH says: this is all I was given), when the first of them
    was sent; what was sent again is the stack's affair and not the owner's,
  * it ended its direction when the FIN was sent,
  * it had taken as many bytes as the window says that was sent, and after the app's end it takes all.

A stack makes its own choice in one thing only: the numbers that it begins with (sequence, timestamps). The apps'
packets are made to agree with those of the fresh stack: acknowledgment, SACK blocks and echoed timestamp are moved by
the difference, and checksums follow (a wrong one stays wrong).

A *round* is what the pump does at one go: packets that were read one after the other within a millisecond, then what
was written. An owner whose first answer in the round carries bytes had them ready before the round was over (it is a
sink); any other was woken by the round and comes later.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from tests.replay.packets import (
    ACK,
    FIN,
    MASK,
    PSH,
    RST,
    SYN,
    Key,
    Narrator,
    Tcp,
    address_text,
    parse_ip,
    parse_tcp,
    with_tcp_checksum,
)
from tun.core.stack import Flow, Stack, StackSettings
from tun.core.states import STATE_NAMES
from tun.device.base import ip_header_length
from tun.pcap import CapturedPacket, read_capture
from tun.wire.checksum import complete

SECRET: Final = b"a replay begins with these bytes"
START_S: Final = 1000.0
# Packets that were read so close to each other belong to one batch.
BATCH_NS: Final = 1_000_000
# The subnet of IPv6 endpoints is a /64.
MASK6: Final = ((1 << 64) - 1) << 64
# How long the stack goes on by itself after the last packet.
AFTER_S: Final = 5.0


def load(path: Path) -> list[CapturedPacket]:
    """The packets of a file, each with its direction.

    Raises: BadPacket; ValueError when it does not say who sent what, or when packets in between are missing.
    """
    with path.open("rb") as file:
        packets = list(read_capture(file))
    for packet in packets:
        if packet.inbound is None:
            raise ValueError(f"{path.name} does not say which packets were read and which were written")
        if packet.dropped or packet.size != len(packet.packet):
            raise ValueError(f"{path.name} has holes: its writer could not keep up, or packets were cut")
    return packets


def settings_of(packets: Sequence[CapturedPacket]) -> StackSettings:
    """What the recorded stack was told about its device, as `RecordingDevice` notes it."""
    noted = re.fullmatch(r"mtu (\d+), offload (on|off)", packets[0].description) if packets else None
    settings = StackSettings(mtu=int(noted[1]), offload=noted[2] == "on") if noted else StackSettings()
    for packet in packets:
        ip = parse_ip(packet.packet)
        if ip is not None and not packet.inbound and len(ip.source) == 16:
            # The first one who was answered is this host.
            network = int.from_bytes(ip.source, "big") & MASK6
            return replace(settings, gateway6=ip.destination, network6=network, mask6=MASK6)
    return settings


# What the file says


@dataclass(frozen=True, slots=True)
class Action:
    """Something that an owner did: "accept", "refuse", "take", "write", "finish" or "abort".

    Attributes:
        data: what was written.
        edge: where the window ended that it left, counted from the app's first byte.
    """

    key: Key
    kind: str
    data: bytearray = field(default_factory=bytearray)
    edge: int = 0


@dataclass(frozen=True, slots=True)
class Connection:
    """One connection of one app: ports may be used again, with another first number."""

    key: Key
    syn: int


@dataclass(slots=True)
class Conversation:
    """What the file says about a connection.

    Attributes:
        answer: the SYN-ACK, and `answered_at` when it was sent (ns), if it was.
        from_app: the bytes that came, by their distance from the first byte; of bytes that came twice the first ones.
        to_app: all bytes that were sent.
    """

    answer: Tcp | None = None
    answered_at: int = 0
    from_app: dict[int, bytes] = field(default_factory=dict)
    to_app: bytearray = field(default_factory=bytearray)
    write_index: int = -1  # of the packet that began the last write, while it may go on
    write: Action | None = None
    finished: bool = False
    over: bool = False
    edge: int = 0

    def stream_from_app(self) -> bytes:
        """What came without a gap from the first byte on."""
        stream = bytearray()
        for position in sorted(self.from_app):
            if position > len(stream):
                break
            stream += self.from_app[position][len(stream) - position :]
        return bytes(stream)


class Script:
    """What a capture says about the apps and the owners.

    Attributes:
        actions: the owners' doings, by the index of the packet in which they show.
        served: by address, the ports that took connections. Addresses without ports answered something else.
        conversations: by connection.
    """

    def __init__(self, packets: Sequence[CapturedPacket]) -> None:
        self.actions: dict[int, list[Action]] = {}
        self.served: dict[bytes, set[int]] = {}
        self.conversations: dict[Connection, Conversation] = {}
        self._current: dict[Key, Connection] = {}
        for index, packet in enumerate(packets):
            tcp = parse_tcp(packet.packet)
            if tcp is None:
                ip = parse_ip(packet.packet)
                # "Host unreachable" is said in the name of an address that nobody has.
                unreachable = b"\x03\x01" if ip is not None and len(ip.source) == 4 else b"\x01\x03"
                if ip is not None and not packet.inbound and packet.packet[ip.start : ip.start + 2] != unreachable:
                    self.served.setdefault(ip.source, set())
            elif packet.inbound:
                self._read_app(tcp)
            else:
                self.served.setdefault(tcp.source[0], set())
                self._read_us(tcp, index, packet.time_ns)

    def _read_app(self, tcp: Tcp) -> None:
        if not tcp.good:
            return
        key = tcp.key(True)
        if tcp.flags & (SYN | ACK | RST) == SYN:
            connection = Connection(key, tcp.seq)
            self._current[key] = connection
            self.conversations.setdefault(connection, Conversation())
        elif tcp.payload and key in self._current:
            connection = self._current[key]
            position = _signed(tcp.seq - connection.syn - 1)
            known = self.conversations[connection].from_app
            if len(known.get(position, b"")) < len(tcp.payload):
                known[position] = tcp.payload

    def _read_us(self, tcp: Tcp, index: int, time_ns: int) -> None:
        key = tcp.key(False)
        connection = self._current.get(key)
        if connection is None or self.conversations[connection].over:
            return
        conversation = self.conversations[connection]
        if tcp.flags & RST:
            conversation.over = True
            self._did(index, key, "refuse" if conversation.answer is None else "abort")
        elif tcp.flags & SYN:
            if conversation.answer is None:
                conversation.answer = tcp
                conversation.answered_at = time_ns
                self.served[key.endpoint[0]].add(key.endpoint[1])
                self._did(index, key, "accept")
        elif conversation.answer is not None:
            self._read_window(connection, conversation, tcp, index)
            if not conversation.finished:
                self._read_data(conversation, tcp, index, key)

    def _read_window(self, connection: Connection, conversation: Conversation, tcp: Tcp, index: int) -> None:
        assert conversation.answer is not None
        edge = _signed(tcp.ack - connection.syn - 1) + (tcp.window << (conversation.answer.window_scale or 0))
        if edge > conversation.edge:
            conversation.edge = edge
            self._did(index, connection.key, "take", edge)

    def _read_data(self, conversation: Conversation, tcp: Tcp, index: int, key: Key) -> None:
        assert conversation.answer is not None
        end = _signed(tcp.seq - conversation.answer.seq - 1) + len(tcp.payload)
        new = end - len(conversation.to_app)
        if new > 0:
            if conversation.write is None:
                conversation.write = self._did(index, key, "write")
                conversation.write_index = index
            conversation.write.data.extend(tcp.payload[-new:])
            conversation.to_app += tcp.payload[-new:]
        if tcp.flags & FIN and end == len(conversation.to_app):
            conversation.finished = True
            # A FIN that rides on the last byte was decided before that byte was sent.
            self._did(conversation.write_index if new > 0 else index, key, "finish")
        if new > 0 and tcp.flags & PSH:
            conversation.write = None

    def _did(self, index: int, key: Key, kind: str, edge: int = 0) -> Action:
        action = Action(key, kind, edge=edge)
        self.actions.setdefault(index, []).append(action)
        return action


# Playing it


@dataclass(frozen=True, slots=True)
class Event:
    """A packet that passed: to the stack (`inbound`) or from it."""

    now: float
    inbound: bool
    packet: bytes
    gso_size: int = 0


@dataclass(slots=True)
class Owner:
    """Whoever has a connection, as the script wants it."""

    connection: Connection
    flow: Flow
    pending: deque[memoryview] = field(default_factory=deque)
    finishing: bool = False
    may_take: int = 0
    received: bytearray = field(default_factory=bytearray)


class Player:
    """One performance. `play` may be called once.

    Attributes:
        script: what the file says.
        stack: the fresh stack.
        events: all packets, in order.
        owners: one for each connection that became a request.
    """

    def __init__(self, packets: Sequence[CapturedPacket], settings: StackSettings | None = None) -> None:
        self.script = Script(packets)
        settings = settings or settings_of(packets)
        self.stack = Stack(settings, SECRET)
        self.stack.set_served({address: frozenset(ports) for address, ports in self.script.served.items()})
        self.events: list[Event] = []
        self.owners: list[Owner] = []
        self._packets = packets
        self._receive_buffer = settings.receive_buffer
        self._live: dict[Key, Owner] = {}
        self._syn: dict[Key, int] = {}
        self._moved: dict[Key, tuple[int, int]] = {}  # of sequence numbers and of timestamps, from the file's to ours
        self._now = START_S

    def play(self) -> Player:
        """Play all of it, and AFTER_S more."""
        packets = self._packets
        index = 0
        while index < len(packets):
            begin = index
            while index < len(packets) and packets[index].inbound and (index == begin or self._is_close(index)):
                index += 1
            answers = index
            while index < len(packets) and not packets[index].inbound:
                index += 1
            self._play_round(begin, answers, index)
        self._pass(self._now + AFTER_S)
        return self

    def _is_close(self, index: int) -> bool:
        return self._packets[index].time_ns - self._packets[index - 1].time_ns <= BATCH_NS

    def _time(self, index: int) -> float:
        return START_S + (self._packets[index].time_ns - self._packets[0].time_ns) / 1e9

    def _play_round(self, begin: int, answers: int, end: int) -> None:
        ready: set[int] = set()
        if begin < answers:
            self._pass(self._time(begin))
            for index in range(begin, answers):
                self._receive(self._packets[index].packet)
            self._take_requests()
            for index in self._ready_answers(answers, end):
                self._act(index)
                ready.add(index)
            self._serve()
        for index in range(answers, end):
            if index in self.script.actions and index not in ready:
                self._pass(self._time(index))
                self._act(index)
                self._serve()

    def _ready_answers(self, answers: int, end: int) -> list[int]:
        """The first packet of each connection after the batch, where it shows that its owner had been a sink."""
        seen: set[Key] = set()
        ready = []
        for index in range(answers, end):
            if not self._is_close(index):
                break
            tcp = parse_tcp(self._packets[index].packet)
            if tcp is not None and tcp.key(False) not in seen:
                seen.add(tcp.key(False))
                if index in self.script.actions:
                    ready.append(index)
        return ready

    def _pass(self, until: float) -> None:
        """Let time pass, and each deadline go off at its moment."""
        while (deadline := self.stack.next_deadline()) <= until:
            self._now = max(self._now, deadline)
            self.stack.handle_timeout(self._now)
            self._serve()
        self._now = max(self._now, until)

    def _receive(self, packet: bytes) -> None:
        tcp = parse_tcp(packet)
        if tcp is not None and tcp.key(True) in self._moved:
            packet = _move(packet, tcp, *self._moved[tcp.key(True)])
        if tcp is not None and tcp.good and tcp.flags & (SYN | ACK | RST) == SYN:
            if self._syn.get(tcp.key(True)) != tcp.seq:
                self._moved.pop(tcp.key(True), None)
            self._syn[tcp.key(True)] = tcp.seq
        self.events.append(Event(self._now, True, packet))
        self.stack.handle_packet(packet, 0, False, self._now)

    def _act(self, index: int) -> None:
        for action in self.script.actions[index]:
            owner = self._live.get(action.key)
            if owner is None or owner.flow.closed:
                continue
            if action.kind == "accept":
                self.stack.accept(owner.flow, self._now)
            elif action.kind == "refuse":
                self.stack.refuse(owner.flow, self._now)
            elif action.kind == "abort":
                owner.flow.abort(self._now)
            elif action.kind == "take":
                owner.may_take = action.edge - self._receive_buffer
            elif action.kind == "write":
                owner.pending.append(memoryview(bytes(action.data)))
            else:
                owner.finishing = True
            self._serve_owner(owner)
            owner.flow.touch()

    def _take_requests(self) -> None:
        for flow in self.stack.take_requests():
            key = Key(flow.source, flow.destination)
            owner = Owner(Connection(key, flow.irs & MASK), flow)
            flow.owner = owner
            self.owners.append(owner)
            self._live[key] = owner

    def _serve(self) -> None:
        """End a batch as the pump does."""
        self._take_requests()
        while touched := self.stack.take_touched():
            for flow in touched:
                assert isinstance(flow.owner, Owner)
                self._serve_owner(flow.owner)
                self.stack.flush(flow, self._write, self._now)
        for packet in self.stack.take_replies():
            self._emit(bytes(packet), 0)

    def _serve_owner(self, owner: Owner) -> None:
        flow = owner.flow
        count = flow.readable_bytes
        if not flow.peer_closed:
            count = min(count, owner.may_take - len(owner.received))
        if count > 0:
            owner.received += b"".join(flow.readable_views())[:count]
            flow.consume(count, self._now)
        while owner.pending and (taken := flow.write(owner.pending[0], self._now)):
            owner.pending[0] = owner.pending[0][taken:]
            if not owner.pending[0]:
                owner.pending.popleft()
        if owner.finishing and not owner.pending:
            flow.finish(self._now)

    def _write(self, header: bytearray | memoryview, views: Sequence[bytes | memoryview], gso_size: int) -> bool:
        head = bytearray(header)
        start = ip_header_length(head)
        complete(head, start, start + 16, views)
        self._emit(b"".join((head, *views)), gso_size)
        return True

    def _emit(self, packet: bytes, gso_size: int) -> None:
        self.events.append(Event(self._now, False, packet, gso_size))
        tcp = parse_tcp(packet)
        if tcp is not None and tcp.flags & (SYN | RST) == SYN and tcp.key(False) not in self._moved:
            key = tcp.key(False)
            conversation = self.script.conversations.get(self._live[key].connection)
            if conversation is not None and (was := conversation.answer) is not None:
                stamp = tcp.stamp[0] - was.stamp[0] if tcp.stamp and was.stamp else 0
                self._moved[key] = tcp.seq - was.seq, stamp

    # Telling it

    def tell(self) -> str:
        """The performance as text: a line for each packet, one for each connection, the stack's counts."""
        narrator = Narrator()
        lines = [
            f"{event.now - START_S:10.6f} {'>' if event.inbound else '<'} "
            + narrator.tell(event.packet, event.inbound, event.gso_size)
            for event in self.events
        ]
        lines.append("")
        for owner in self.owners:
            flow = owner.flow
            who, whom = (f"{address_text(address)}.{port}" for address, port in (flow.source, flow.destination))
            lines.append(
                f"{who} > {whom}: {STATE_NAMES[flow.state]}{' ' if flow.failure else ''}{flow.failure}, "
                f"{len(owner.received)} bytes from the app #{zlib.crc32(owner.received):08x}, "
                f"{flow.bytes_to_app} acknowledged by it"
            )
        stack = self.stack
        counts = {
            "packets": stack.packets,
            "accepted": stack.accepted,
            "refused": stack.refused,
            "cancelled": stack.cancelled,
            "retransmits": stack.retransmits,
            "probes": stack.probes,
        }
        lines.append(", ".join(f"{name} {count}" for name, count in counts.items()))
        lines += [f"dropped {reason}: {count}" for reason, count in sorted(stack.drops.items())]
        return "\n".join(lines) + "\n"


def _move(packet: bytes, tcp: Tcp, seq: int, stamp: int) -> bytes:
    """The app's packet, as the app would have sent it to a stack with other first numbers."""
    moved = bytearray(packet)
    if tcp.flags & ACK:
        struct.pack_into("!I", moved, tcp.start + 8, (tcp.ack + seq) & MASK)
    for index, (left, right) in enumerate(tcp.sacks):
        struct.pack_into("!II", moved, tcp.sacks_at + 8 * index, (left + seq) & MASK, (right + seq) & MASK)
    if tcp.stamp is not None and tcp.flags & ACK:
        struct.pack_into("!I", moved, tcp.stamp_at + 4, (tcp.stamp[1] + stamp) & MASK)
    return with_tcp_checksum(moved, good=tcp.good)


def _signed(value: int) -> int:
    value &= MASK
    return value - 0x100000000 if value >= 0x80000000 else value
