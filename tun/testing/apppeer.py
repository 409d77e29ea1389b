"""The other side: an app's kernel in miniature, active opener, written apart from `tun.core` so that both can be wrong.

`AppPeer` is one connection of an app as its kernel plays it: it speaks whole packets with full checksums, retransmits,
reassembles, probes closed windows, answers challenges, and judges what it gets (a checksum, a number or a flag that a
kernel would not take counts in `complaints`, since our stack has no excuse for sending it). It is pure: packets, time
and commands in; packets and a deadline out.

`AppHost` puts many of them behind a device and makes them Trio streams: what a test's apps connect with.

It is simple where the kernel is clever: everything sent is kept in one bytearray, losses are repaired by going back
to the first gap, and there is no congestion control.
"""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from typing import Final

import trio

from tun.device.base import Device
from tun.seq import MASK, unwrap
from tun.wire import verdict
from tun.wire.ipv4 import PROTOCOL_ICMP, PROTOCOL_TCP, Ipv4Header, parse_ipv4
from tun.wire.ipv6 import HEADER_LENGTH as IPV6_HEADER_LENGTH
from tun.wire.ipv6 import PROTOCOL_ICMPV6, Ipv6Header, parse_ipv6, walk_extensions
from tun.wire.tcp import ACK, FIN, PSH, RST, SYN, Segment, build_tcp, options, parse_tcp, verify_tcp

SYN_RETRY_S: Final = 1.0
RETRY_S: Final = 0.2
MAX_RETRY_S: Final = 60.0
SYN_TRIES: Final = 7
MAX_LOSSES: Final = 15

Address = tuple[str, int]


def address_bytes(text: str) -> bytes:
    """The bytes of an address: four of a dotted one, sixteen of one with colons."""
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(int(part) for part in text.split("."))


def parse(packet: bytes, header: Ipv4Header | Ipv6Header) -> int:
    """Judge the IP header that `packet` starts with, of the version that `header` is for. Returns: a verdict."""
    if isinstance(header, Ipv4Header):
        return parse_ipv4(packet, 0, header)
    return parse_ipv6(packet, 0, header) or walk_extensions(packet, 0, header)


class AppPeer:
    """One connection of an app.

    Attributes:
        state: "closed", "connecting", "connected", "over".
        error: "" or how it ended badly: "refused", "reset", "timeout", "unreachable".
        received: bytes in order that the app has not taken (`take`); with `auto_read` the window stays open anyway.
        peer_finished: the other side's FIN has come, everything before it too.
        complaints: what the other side did that no kernel would.
        window: our receive buffer.
    """

    def __init__(
        self,
        source: Address,
        destination: Address,
        *,
        mss: int = 1460,
        window_scale: int | None = 7,
        timestamps: bool = True,
        sack: bool = True,
        buffer: int = 262144,
        segment_limit: int = 1460,
        initial_sequence: int = 0,
        auto_read: bool = True,
        ordered: bool = True,
    ) -> None:
        self.source = source
        self.destination = destination
        self._source = address_bytes(source[0])
        self._destination = address_bytes(destination[0])
        self.mss = mss
        self.window_scale = window_scale
        self.timestamps = timestamps
        self.sack = sack
        self.buffer = buffer
        self.segment_limit = segment_limit  # bytes of payload in one packet: 65483 plays a kernel with offload
        self.auto_read = auto_read
        self.ordered = ordered  # packets come in order, so a window's edge that moves left was moved

        self.state = "closed"
        self.error = ""
        self.received = bytearray()
        self.peer_finished = False
        self.complaints: list[str] = []
        self.packets_sent = 0
        self.retransmits = 0

        self.iss = initial_sequence
        self._una = initial_sequence  # positions, as everywhere inside
        self._nxt = initial_sequence
        self._max = initial_sequence
        self._out = bytearray()  # from _una (after the SYN) on
        self._fin = False
        self._fin_sent = False
        self._fin_acked = False
        self._edge = initial_sequence
        self._shift = 0
        self._peer_mss = 536

        self._irs = 0
        self._rcv = 0
        self._advertised = 0
        self._parts: dict[int, bytes] = {}
        self._fin_at: int | None = None
        self._ts_recent = 0
        self._last_sacked: tuple[int, int] | None = None

        self._timer = math.inf
        self._losses = 0
        self._dups = 0
        self._packets: list[bytes] = []
        self._segment = Segment()
        self._header: Ipv4Header | Ipv6Header = Ipv4Header() if len(self._source) == 4 else Ipv6Header()

    # -- commands -----------------------------------------------------------------------------------------------------

    def connect(self, now: float) -> None:
        """Send the SYN."""
        self.state = "connecting"
        self._nxt = self._max = self.iss + 1
        self._send_syn(now)
        self._timer = now + SYN_RETRY_S

    def write(self, data: bytes, now: float) -> None:
        """Queue bytes and send what the window takes."""
        self._out += data
        self._push(now)

    def finish(self, now: float) -> None:
        """FIN after everything written."""
        self._fin = True
        self._push(now)

    def abort(self, now: float) -> None:
        """RST."""
        if self.state == "connected":
            self._emit(self._max, RST | ACK, now)
        self._over("aborted")

    def take(self, count: int, now: float) -> bytes:
        """Read up to `count` bytes; a window that was nearly closed is announced anew."""
        data = bytes(self.received[:count])
        del self.received[:count]
        if self.state == "connected" and data:
            gain = self._rcv + self._free() - self._advertised
            if gain >= min(self.buffer // 2, 2 * self.mss):
                self._emit(self._max, ACK, now)
        return data

    def keep_alive(self, now: float) -> None:
        """Ask a silent other side whether it is still there, as SO_KEEPALIVE does."""
        if self.state == "connected":
            self._emit(self._una - 1, ACK, now)

    @property
    def unacknowledged(self) -> int:
        """Bytes written that the other side has not acknowledged."""
        return len(self._out)

    @property
    def finished(self) -> bool:
        """Is our FIN acknowledged?"""
        return self._fin_acked

    # -- input --------------------------------------------------------------------------------------------------------

    def handle_packet(self, packet: bytes, now: float) -> None:
        """Take one complete packet for this connection (or an ICMP error about it)."""
        header = self._header
        if parse(packet, header) != verdict.OK:
            self.complaints.append(f"bad IPv{packet[0] >> 4} header")
            return
        if header.protocol in (PROTOCOL_ICMP, PROTOCOL_ICMPV6):
            if self.state == "connecting":
                self._over("unreachable")
            return
        at, end = header.header_length, header.total_length
        if parse_tcp(packet, at, end, self._segment) != verdict.OK:
            self.complaints.append("bad TCP header")
            return
        if not verify_tcp(packet, at, end, header.source, header.destination):
            self.complaints.append("bad TCP checksum")
            return
        self._handle(self._segment, packet, now)

    def handle_timeout(self, now: float) -> None:
        """Resend what is due."""
        if now < self._timer:
            return
        self._timer = math.inf
        if self.state == "connecting":
            self._losses += 1
            if self._losses > SYN_TRIES:
                self._over("timeout")
                return
            self._send_syn(now)
            self._timer = now + SYN_RETRY_S * 2**self._losses
        elif self.state == "connected":
            self._losses += 1
            if self._losses > MAX_LOSSES:
                self._over("timeout")
                return
            if self._edge <= self._una and self._out:
                self._emit(self._una - 1, ACK, now)  # a probe of the closed window, as Linux sends it
            else:
                self._nxt = self._una
                self.retransmits += 1
                self._push(now)
            self._timer = min(self._timer, now + min(RETRY_S * 2**self._losses, MAX_RETRY_S))

    def next_deadline(self) -> float:
        """When `handle_timeout` is due."""
        return self._timer

    def take_packets(self) -> list[bytes]:
        """What is to be sent."""
        packets = self._packets
        self._packets = []
        return packets

    # -- inside -------------------------------------------------------------------------------------------------------

    def _handle(self, segment: Segment, packet: bytes, now: float) -> None:
        flags = segment.flags
        if self.state == "connecting":
            self._handle_answer(segment, now)
            return
        if self.state != "connected":
            if not flags & RST:
                self._emit_reset(segment)
            return
        seq = unwrap(segment.seq, self._rcv)
        length = segment.data_end - segment.data_start
        if self.timestamps and not segment.has_timestamp and not flags & RST:
            self.complaints.append("no timestamp")
        if flags & RST:
            if seq == self._rcv:
                self._over("reset")
            elif self._rcv < seq < self._advertised:
                self._emit(self._max, ACK, now)  # RFC 5961: prove it
            return
        if flags & SYN:
            self._emit(self._max, ACK, now)
            return
        end = seq + length + (flags & FIN)
        if end > seq and (seq >= self._advertised + 1 or end <= self._rcv):
            self._emit(self._max, ACK, now)
            if end <= self._rcv:
                return
        elif end < self._rcv:
            self._emit(self._max, ACK, now)  # somebody asks whether we are still here
            return
        if not flags & ACK:
            self.complaints.append("no ACK flag")
            return
        self._handle_ack(segment, seq, length, now)
        if segment.has_timestamp and seq <= self._rcv:
            self._ts_recent = segment.ts_value
        if length or flags & FIN:
            self._handle_data(seq, packet[segment.data_start : segment.data_end], flags & FIN != 0)
            self._emit(self._max, ACK, now)

    def _handle_answer(self, segment: Segment, now: float) -> None:
        flags = segment.flags
        right = flags & ACK and segment.ack == (self.iss + 1) & MASK
        if flags & RST:
            if right:
                self._over("refused")
            return  # Linux ignores any other RST here
        if flags & ACK and not right:
            self._emit_reset(segment)
            return
        if not flags & SYN or not right:
            return
        self._irs = segment.seq
        self._rcv = self._irs + 1
        self._advertised = self._rcv + min(self._free(), 65535)
        self._una = self.iss + 1
        self._edge = self._una + segment.window  # never scaled in a SYN
        self._peer_mss = segment.mss if segment.mss > 0 else 536
        if segment.window_scale >= 0 and self.window_scale is not None:
            self._shift = segment.window_scale
        else:
            self.window_scale = None
        self.timestamps = self.timestamps and segment.has_timestamp
        self.sack = self.sack and segment.sack_permitted
        self._ts_recent = segment.ts_value
        self.state = "connected"
        self._losses = 0
        self._timer = math.inf
        self._emit(self._max, ACK, now)
        self._push(now)

    def _handle_ack(self, segment: Segment, seq: int, length: int, now: float) -> None:
        ack = unwrap(segment.ack, self._una)
        if ack > self._max:
            self.complaints.append("ACK of what was never sent")
            self._emit(self._max, ACK, now)
            return
        if ack < self._una:
            return
        edge = ack + (segment.window << self._shift)
        if edge < self._edge and self.ordered:
            self.complaints.append(f"the window's edge moved left by {self._edge - edge}")
        moved = edge != self._edge
        if edge > self._edge or seq >= self._rcv:
            self._edge = edge
        if ack > self._una:
            acked = ack - self._una
            if self._fin_sent and ack == self._max and acked > len(self._out):
                acked -= 1
                self._fin_acked = True
            del self._out[:acked]
            self._una = ack
            self._nxt = max(self._nxt, ack)
            self._losses = 0
            self._dups = 0
            self._timer = now + RETRY_S if self._una < self._max else math.inf
        elif length == 0 and not moved and self._una < self._max:
            self._dups += 1
            if self._dups == 3:
                self._nxt = self._una
                self.retransmits += 1
        if segment.window:
            self._losses = 0
        self._push(now)

    def _handle_data(self, seq: int, data: bytes, fin: bool) -> None:
        if fin:
            at = seq + len(data)
            if self._fin_at is not None and self._fin_at != at:
                self.complaints.append("the FIN moved")
            self._fin_at = at
        if data:
            if seq + len(data) > self._advertised:
                self.complaints.append("data beyond the window")
            known = self._parts.get(seq)
            if known is None or len(known) < len(data):
                self._parts[seq] = data
            self._last_sacked = (seq, seq + len(data))
        moving = True
        while moving:
            moving = False
            for start in sorted(self._parts):
                if start > self._rcv:
                    break
                part = self._parts.pop(start)
                if start + len(part) > self._rcv:
                    self.received += part[self._rcv - start :]
                    self._rcv = start + len(part)
                moving = True
        if self._fin_at is not None and self._rcv == self._fin_at and not self.peer_finished:
            self._rcv += 1
            self.peer_finished = True

    def _free(self) -> int:
        return self.buffer if self.auto_read else max(self.buffer - len(self.received), 0)

    def _push(self, now: float) -> None:
        """Send what the window takes, from `_nxt` on."""
        if self.state != "connected" or self._fin_acked:
            return
        end = self._una + len(self._out)
        limit = self.segment_limit
        if limit <= self.mss:
            limit = min(limit, self._peer_mss)
        if self.timestamps:
            limit -= 12
        while self._nxt < end:
            count = min(end - self._nxt, self._edge - self._nxt, limit)
            if count <= 0:
                break
            offset = self._nxt - self._una
            last = self._nxt + count == end
            flags = ACK | (PSH if last else 0)
            if last and self._fin:
                flags |= FIN
                self._fin_sent = True
            self._emit(self._nxt, flags, now, bytes(self._out[offset : offset + count]))
            self._nxt += count + (flags & FIN)
        if self._fin and self._nxt == end:
            self._emit(end, ACK | FIN, now)
            self._fin_sent = True
            self._nxt = end + 1
        self._max = max(self._max, self._nxt)
        if self._timer == math.inf and (self._una < self._max or self._out):
            self._timer = now + RETRY_S

    def _send_syn(self, now: float) -> None:
        self._emit(self.iss, SYN, now)

    def _emit(self, position: int, flags: int, now: float, payload: bytes = b"") -> None:
        stamp = (int(now * 1000) + 77, self._ts_recent) if self.timestamps and not flags & RST else None
        free = self._free()
        if flags & SYN:
            window = min(free, 65535)
            extra = options(
                mss=self.mss,
                window_scale=-1 if self.window_scale is None else self.window_scale,
                sack_permitted=self.sack,
                timestamp=stamp,
            )
        else:
            scale = self.window_scale or 0
            window = min(free >> scale, 65535)
            self._advertised = max(self._advertised, self._rcv + (window << scale))
            extra = options(timestamp=stamp, sacks=self._blocks() if flags == ACK else ())
        self._packets.append(
            bytes(
                build_tcp(
                    self._source,
                    self._destination,
                    self.source[1],
                    self.destination[1],
                    seq=position & MASK,
                    ack=self._rcv & MASK if flags & ACK else 0,
                    flags=flags,
                    window=window,
                    options=extra,
                    payload=payload,
                )
            )
        )
        self.packets_sent += 1

    def _blocks(self) -> list[tuple[int, int]]:
        """The last range that came out of order, if it still is."""
        if not self.sack or not self._parts:
            return []
        ranges: list[tuple[int, int]] = []
        for start in sorted(self._parts):
            end = start + len(self._parts[start])
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(ranges[-1][1], end))
            else:
                ranges.append((start, end))
        last = self._last_sacked
        if last is not None:
            ranges.sort(key=lambda block: not block[0] <= last[0] < block[1])
        return [(left & MASK, right & MASK) for left, right in ranges[:3]]

    def _emit_reset(self, segment: Segment) -> None:
        self._packets.append(
            bytes(
                build_tcp(
                    self._source,
                    self._destination,
                    self.source[1],
                    self.destination[1],
                    seq=segment.ack if segment.flags & ACK else 0,
                    ack=0 if segment.flags & ACK else (segment.seq + 1) & MASK,
                    flags=RST if segment.flags & ACK else RST | ACK,
                )
            )
        )

    def _over(self, error: str) -> None:
        self.state = "over"
        self.error = error
        self._timer = math.inf


class AppStream(trio.abc.HalfCloseableStream):
    """A connection of a test's app, as a Trio stream. A reset or a timeout is BrokenResourceError, naming which.

    Attributes:
        peer: the connection itself; `key`: addresses and ports, as `Stack.flows` has them.
    """

    def __init__(self, host: AppHost, peer: AppPeer) -> None:
        self.peer = peer
        self.key = _key(peer)
        self._host = host
        self.changed = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Send; returns when all is acknowledged, or nearly. Cancelled: some of it may have gone."""
        await trio.lowlevel.checkpoint()
        data = bytes(data)
        while data:
            self._check()
            room = 262144 - self.peer.unacknowledged
            if room > 0:
                self.peer.write(data[:room], self._host.now())
                data = data[room:]
                self._host.send(self.peer)
            else:
                await self._wait()
        self._check()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until there is room."""
        await trio.lowlevel.checkpoint()
        while self.peer.unacknowledged >= 262144:
            self._check()
            await self._wait()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Bytes, or b"" after the other side's FIN."""
        await trio.lowlevel.checkpoint()
        while True:
            if self.peer.received:
                data = self.peer.take(max_bytes or 1 << 30, self._host.now())
                self._host.send(self.peer)
                return data
            if self.peer.peer_finished:
                return b""
            self._check()
            await self._wait()

    async def send_eof(self) -> None:
        """FIN."""
        await trio.lowlevel.checkpoint()
        self._check()
        self.peer.finish(self._host.now())
        self._host.send(self.peer)

    async def aclose(self) -> None:
        """FIN, and forget; what still comes is answered by the host in this connection's name."""
        if self.peer.state == "connected":
            self.peer.auto_read = True
            self.peer.finish(self._host.now())
            self._host.send(self.peer)
        await trio.lowlevel.checkpoint()

    def abort(self) -> None:
        """RST."""
        self.peer.abort(self._host.now())
        self._host.send(self.peer)

    def _check(self) -> None:
        error = self.peer.error
        if error:
            raise trio.BrokenResourceError(error)

    async def _wait(self) -> None:
        await self.changed.wait()

    def wake(self) -> None:
        """Something has changed: let every waiter look again."""
        self.changed.set()
        self.changed = trio.Event()


class AppHost:
    """A machine with apps on the far end of a device: the local kernel, as a test needs it.

    `run` it in a nursery, then `await connect(...)`.
    """

    def __init__(
        self, device: Device, address: str = "10.107.0.1", *, now: Callable[[], float] = trio.current_time
    ) -> None:
        self.device = device
        self.address = address
        self.now = now
        self.streams: dict[bytes, AppStream] = {}
        self.stray: list[bytes] = []  # packets that belong to no connection
        self._port = 32767
        self._kick = trio.Event()

    async def connect(self, destination: Address, *, source: str | None = None, **keywords: int | bool) -> AppStream:
        """Open a connection, as `socket.connect` does.

        Args:
            keywords: for `AppPeer`.

        Raises: ConnectionRefusedError, TimeoutError, OSError as the kernel would. Cancelled: the app is gone without a
            word, as a real one that closes its socket while connecting.
        """
        self._port = 32768 + (self._port - 32767) % 28232
        peer = AppPeer(
            (source or self.address, self._port),
            destination,
            initial_sequence=self._port * 7919,
            **keywords,  # type: ignore[arg-type]  # the caller's are AppPeer's
        )
        stream = AppStream(self, peer)
        key = stream.key
        self.streams[key] = stream
        try:
            peer.connect(self.now())
            self.send(peer)
            while peer.state == "connecting":
                await stream.changed.wait()
        except BaseException:
            del self.streams[key]
            raise
        if peer.state != "connected":
            del self.streams[key]
            if peer.error == "refused":
                raise ConnectionRefusedError(f"{destination[0]}:{destination[1]} refused")
            if peer.error == "timeout":
                raise TimeoutError(f"{destination[0]}:{destination[1]} does not answer")
            raise OSError(f"{destination[0]}:{destination[1]} {peer.error}")
        return stream

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Move packets until cancelled."""
        task_status.started()
        while True:
            self._drain()
            deadline = min((stream.peer.next_deadline() for stream in self.streams.values()), default=math.inf)
            self._kick = trio.Event()
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._until_readable, nursery.cancel_scope)
                nursery.start_soon(self._until_kicked, nursery.cancel_scope)
                nursery.cancel_scope.deadline = trio.current_time() + max(deadline - self.now(), 0.0)
            now = self.now()
            for stream in list(self.streams.values()):
                if stream.peer.next_deadline() <= now:
                    stream.peer.handle_timeout(now)
                    self._flush(stream.peer)
                    stream.wake()

    async def _until_readable(self, scope: trio.CancelScope) -> None:
        await self.device.wait_readable()
        scope.cancel()

    async def _until_kicked(self, scope: trio.CancelScope) -> None:
        await self._kick.wait()
        scope.cancel()

    def send(self, peer: AppPeer) -> None:
        """Send what a peer owes, and look at the deadlines anew."""
        self._flush(peer)
        self._kick.set()

    def _flush(self, peer: AppPeer) -> None:
        for packet in peer.take_packets():
            self.device.write_packet(packet)

    def _drain(self) -> None:
        while True:
            raw = self.device.read()
            if raw is None:
                return
            packet = raw[self.device.prefix :]
            stream = self.streams.get(_key_of(packet))
            if stream is None:
                self.stray.append(packet)
                continue
            stream.peer.handle_packet(packet, self.now())
            self._flush(stream.peer)
            stream.wake()


def _key_of(packet: bytes) -> bytes:
    """The key of the connection that a packet of the other side is for; empty when it is for none.

    Ours is the source there: of an error it is in the packet that it quotes, which is one of ours.
    """
    if packet[0] >> 4 == 4:
        at, protocol, source, destination = (packet[0] & 15) << 2, packet[9], packet[12:16], packet[16:20]
    else:
        at, protocol, source, destination = IPV6_HEADER_LENGTH, packet[6], packet[8:24], packet[24:40]
    if protocol == PROTOCOL_TCP:
        return destination + source + packet[at + 2 : at + 4] + packet[at : at + 2]
    inner = packet[at + 8 :]
    if protocol == PROTOCOL_ICMP and len(inner) >= 24:
        return inner[12:24]
    if protocol == PROTOCOL_ICMPV6 and len(inner) >= 44:
        return inner[8:44]
    return b""


def _key(peer: AppPeer) -> bytes:
    ports = peer.source[1].to_bytes(2, "big") + peer.destination[1].to_bytes(2, "big")
    return address_bytes(peer.source[0]) + address_bytes(peer.destination[0]) + ports
