"""A TCP/IP host in a box: packets, time and commands in; requests, touched flows and replies out.

The shell's round, once per batch:

    for packet in batch: stack.handle_packet(packet, prefix, verified, now)
    stack.handle_timeout(now)                       when now >= stack.next_deadline()
    for flow in stack.take_requests(): ...          somebody decides, later: accept or refuse
    for flow in stack.take_touched(): ...           move bytes between the flow and its owner; stack.flush(flow, ...)
    for packet in stack.take_replies(): device.write_packet(packet)

Packets are judged in the order of cost: the flow that a packet belongs to is found by one dictionary look-up on bytes
cut from it, and what was to be expected takes the flow's short way. Everything else walks through the checks of RFC
1122 and ends in exactly one of: taken, answered, dropped and counted under one reason.

Addresses are bytes of 4 or 16, and a flow's key has 12 or 36: both versions share one table. Nothing here asks the
operating system anything. Nothing the network sends raises. Memory is bounded: flows, requests, half-open flows,
TIME-WAIT records, fragments, datagrams and the bytes in all buffers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2s
from struct import Struct
from typing import Final

from tun.core.admission import name_of
from tun.core.buffers import Budget
from tun.core.flows import TIME_WAIT_S, FlowTable, TimeWait
from tun.core.fragments import MAX_PAYLOAD, MAX_PAYLOAD_V6, Reassembler
from tun.core.machine import CHALLENGE_INTERVAL_S, Flow, Host, Write
from tun.core.states import SYN_PENDING, TIME_WAIT
from tun.errors import BadPacket
from tun.seq import HALF, MASK, diff
from tun.wire import icmp, icmpv6, verdict
from tun.wire.ipv4 import (
    FLAG_DF,
    PROTOCOL_ICMP,
    PROTOCOL_TCP,
    PROTOCOL_UDP,
    Ipv4Header,
    parse_ipv4,
)
from tun.wire.ipv6 import PROTOCOL_ICMPV6, UNKNOWN_NEXT_HEADER, Ipv6Header, parse_ipv6, walk_extensions
from tun.wire.tcp import (
    ACK,
    FIN,
    RST,
    SYN,
    TIMESTAMP_LAYOUT,
    Segment,
    build_reset,
    build_tcp,
    options,
    parse_tcp,
    verify_tcp,
)
from tun.wire.udp import Datagram, build_udp, parse_udp, verify_udp

__all__ = ["Flow", "ReceivedDatagram", "Stack", "StackSettings"]

# First byte, total length, fragment, protocol, key (addresses and ports), seq, ack, offset and flags, window.
_EXPECTED: Final = Struct("!BxHxxHxBxx12sIIHH")
# First byte, payload length, next header, key (addresses and ports), seq, ack, offset and flags, window.
_EXPECTED_V6: Final = Struct("!B3xHBx36sIIHH")
_TIMESTAMP: Final = Struct("!III")
_PORTS: Final = Struct("!HH")
_ANY_FRAGMENT: Final = 0xFFFF ^ FLAG_DF ^ 0x8000

# Datagrams that wait for their service, in one batch; each is as large as its packet.
_MAX_DATAGRAMS: Final = 256
_NO_PORTS: Final[frozenset[int]] = frozenset()
# What a packet may have behind its IP length (Ethernet pads short ones) and be kept whole all the same; more is cut
# off, or a view on a few bytes would keep 64 KiB.
_PADDING: Final = 64
_MAPPED: Final = bytes(10) + b"\xff\xff"  # ::ffff:0:0/96 stands for IPv4 and is never on a wire

# Where more flows than this part of the limit are half-open, one that has not been completed in so long, which is a
# million times the link's round trip, gives way to the next.
_HALF_OPEN_FEW: Final = 8
_HALF_OPEN_S: Final = 1.0

# Above this share of all buffers a flow may hold little, each way: enough to be quick on this link, so little that the
# rest of the memory is there for a thousand flows more; see `_set_caps`.
_TIGHT: Final = 0.75
_TIGHT_CAP: Final = 64 * 1024
# From there on, flows that hold much and move little are ended (sockstress), those that hold most first, until the
# memory is not tight any more: after half a minute, or, when all memory is in use and everybody suffers, after seconds.
_STALLED_AFTER_S: Final = 30.0
_STALLED_AFTER_FULL_S: Final = 5.0
_STALLED_BYTES: Final = 64 * 1024
_HELD_BYTES: Final = 16 * 1024  # ending who holds less would not help
_RELIEVED: Final = 0.7
_RELIEF_INTERVAL_S: Final = 1.0

_INFINITE: Final = math.inf


@dataclass(frozen=True, slots=True)
class StackSettings:
    """What a stack is told once. Sizes are bytes, times seconds.

    Attributes:
        mtu: of the link; our MSS follows from it.
        offload: may segments be larger than the MSS (the device cuts them)?
        receive_buffer, send_buffer: of one flow; `small_buffer` where more than `active_flows` had traffic in the
            last second.
        max_flows: all flows, requests included; beyond it a SYN is refused.
        half_open, undecided: see `tun.core.flows`; beyond them a SYN is dropped, and the app tries again.
        buffers: bytes that all flows may hold.
        gateway: this host's address on the link.
        network, mask: the subnet whose addresses are ours to answer for, as integers.
        gateway6, network6, mask6: the same for IPv6; with mask 0 there is none, and its packets are dropped.
        ack_delay: how long an ACK may wait for an answer to ride on.
    """

    mtu: int = 1500
    offload: bool = True
    receive_buffer: int = 512 * 1024
    send_buffer: int = 512 * 1024
    small_buffer: int = 256 * 1024
    active_flows: int = 64
    max_flows: int = 24000
    half_open: int = 1024
    undecided: int = 1024
    buffers: int = 256 * 2**20
    gateway: bytes = b"\x0a\x6b\x00\x01"
    network: int = 0x0A6B0000
    mask: int = 0xFFFF0000
    gateway6: bytes = b""
    network6: int = 0
    mask6: int = 0
    ack_delay: float = 0.02
    keepalive_idle: float = 300.0
    keepalive_interval: float = 30.0
    keepalive_probes: int = 9


def initial_numbers(secret: bytes, key: bytes, now: float) -> tuple[int, int]:
    """The initial sequence number and the offset of the timestamps of a connection.

    RFC 6528: a clock of 4 us and a keyed hash of addresses and ports, so that a tuple's numbers grow and nobody can
    tell another tuple's. RFC 7323 5.4: timestamps that do not tell how long this machine has been up.
    """
    digest = blake2s(key, key=secret[:32], digest_size=8).digest()
    clock = int(now * 250000.0)
    return (clock + int.from_bytes(digest[:4], "big")) & MASK, int.from_bytes(digest[4:], "big")


class TokenBucket:
    """So many a second, and so many at once."""

    __slots__ = ("burst", "rate", "refilled_at", "tokens")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate: float = rate
        self.burst: float = burst
        self.tokens: float = burst
        self.refilled_at: float = 0.0

    def take(self, now: float) -> bool:
        """Is there one left?"""
        self.tokens = min(self.burst, self.tokens + max(now - self.refilled_at, 0.0) * self.rate)
        self.refilled_at = now
        if self.tokens < 1.0:
            return False
        self.tokens -= 1.0
        return True


class ReceivedDatagram:
    """A UDP datagram for a registered service.

    Attributes:
        source, destination: packed address and port.
        payload: a view on the packet.
    """

    __slots__ = ("destination", "payload", "source")

    def __init__(self, source: tuple[bytes, int], destination: tuple[bytes, int], payload: memoryview) -> None:
        self.source: tuple[bytes, int] = source
        self.destination: tuple[bytes, int] = destination
        self.payload: memoryview = payload


class Stack:
    """The host: see the module's text for how it is driven.

    Attributes:
        drops: discarded packets by reason; every one counts exactly once. A call of `handle_packet` counts one at most;
            those that had been taken and go with it (fragments, bytes beyond a gap) count with the next `take_replies`.
        packets: all packets handed in.
        rationed: could what flows hold fill the memory, or does it nearly?
        accepted, refused, cancelled: decided requests, and those whose app gave up first.
        put_off: requests that gave up their place under pressure; see `tun.core.admission`.
        resets_received, timeouts, aborted: flows that ended so.
        replies_sent: packets without a flow that were answered.
    """

    __slots__ = (
        "_allowed",
        "_datagram",
        "_datagrams",
        "_draining",
        "_echo_limit",
        "_epoch",
        "_epoch_flows",
        "_error_limit",
        "_header",
        "_header4",
        "_header6",
        "_host",
        "_local",
        "_reassembler",
        "_relief_at",
        "_replies",
        "_requests",
        "_reset_limit",
        "_secret",
        "_segment",
        "_served",
        "_settings",
        "_small",
        "_stray_limit",
        "_table",
        "_tight",
        "_turn_at",
        "_udp_served",
        "aborted",
        "accepted",
        "cancelled",
        "drops",
        "flows",
        "opened",
        "packets",
        "put_off",
        "rationed",
        "refused",
        "replies_sent",
        "resets_received",
    )

    def __init__(self, settings: StackSettings, secret: bytes) -> None:
        self._settings: StackSettings = settings
        self._secret: bytes = secret
        self._host: Host = Host(
            Budget(settings.buffers, settings.receive_buffer, settings.send_buffer), settings.mtu, settings.offload
        )
        self._host.ack_delay = settings.ack_delay
        self._host.keepalive_idle = settings.keepalive_idle
        self._host.keepalive_interval = settings.keepalive_interval
        self._host.keepalive_probes = settings.keepalive_probes
        self._table: FlowTable = FlowTable(settings.undecided)
        self.flows: dict[bytes, Flow] = self._table.flows
        self._served: Mapping[bytes, frozenset[int]] = {}
        self._draining: bool = False
        self._local: frozenset[bytes] | None = None
        self._allowed: list[tuple[int, int, int]] = []
        self._requests: list[Flow] = []
        self._replies: list[bytearray] = []
        self._reassembler: Reassembler = Reassembler()

        self._header4: Ipv4Header = Ipv4Header()
        self._header6: Ipv6Header = Ipv6Header()
        self._header: Ipv4Header | Ipv6Header = self._header4  # the last packet's
        self._udp_served: Mapping[bytes, frozenset[int]] = {}
        self._datagrams: list[ReceivedDatagram] = []
        self._segment: Segment = Segment()
        self._datagram: Datagram = Datagram()

        # ICMP errors as gVisor and Linux (icmp_msgs_per_sec); echo replies apart and larger. A RST for a SYN is an
        # answer somebody waits for; a RST for anything else is not, and is what a loop would be made of.
        self._error_limit: TokenBucket = TokenBucket(1000.0, 50.0)
        self._echo_limit: TokenBucket = TokenBucket(10000.0, 1000.0)
        self._reset_limit: TokenBucket = TokenBucket(10000.0, 2000.0)
        self._stray_limit: TokenBucket = TokenBucket(500.0, 100.0)

        self._epoch: int = 0
        self._epoch_flows: int = 0
        self._small: bool = False
        self._tight: bool = False
        self._relief_at: float = _INFINITE
        self._turn_at: float = _INFINITE  # of either kind of requests under pressure

        self.drops: dict[str, int] = self._host.drops
        self.packets: int = 0
        self.rationed: bool = False
        self.opened: int = 0
        self.accepted: int = 0
        self.refused: int = 0
        self.cancelled: int = 0
        self.put_off: int = 0
        self.resets_received: int = 0
        self.aborted: int = 0
        self.replies_sent: int = 0

    # -- look ---------------------------------------------------------------------------------------------------------

    @property
    def flow_count(self) -> int:
        """Live flows, requests included; TIME-WAIT not."""
        return len(self.flows)

    @property
    def half_open_count(self) -> int:
        """Flows whose handshake is not finished."""
        return self._table.half_open

    @property
    def undecided_count(self) -> int:
        """Requests nobody has decided yet."""
        return self._table.undecided

    @property
    def time_wait_count(self) -> int:
        """Records in TIME-WAIT."""
        return len(self._table.time_wait)

    @property
    def buffered_bytes(self) -> int:
        """Bytes in the buffers of all flows, as of the last flush of each."""
        return self._host.budget.used

    @property
    def touched_count(self) -> int:
        """How many flows `take_touched` would give: the work that this batch has made so far."""
        return len(self._host.touched)

    @property
    def has_replies(self) -> bool:
        """Has `take_replies` something to give, or to count?"""
        return bool(self._replies or self._host.late_drops)

    @property
    def retransmits(self) -> int:
        """Segments sent again."""
        return self._host.retransmits

    @property
    def probes(self) -> int:
        """Zero-window and keepalive probes sent."""
        return self._host.probes

    @property
    def timeouts(self) -> int:
        """Flows given up because nobody answered."""
        return self._host.timeouts

    def has_alarm(self) -> bool:
        """May `next_deadline` have come closer by what was flushed since this was last asked?"""
        host = self._host
        alarmed = host.alarmed
        host.alarmed = False
        return alarmed

    def next_deadline(self) -> float:
        """When `handle_timeout` is due; infinite when nothing waits."""
        return min(
            self._host.next_deadline(),
            self._table.next_expiry(),
            self._reassembler.next_deadline(),
            self._relief_at,
            self._turn_at,
        )

    # -- settings that change -----------------------------------------------------------------------------------------

    def set_served(self, served: Mapping[bytes, frozenset[int]]) -> None:
        """Replace the addresses and ports that are answered for; live flows stay. The mapping must not change later."""
        self._served = served

    def set_udp_served(self, served: Mapping[bytes, frozenset[int]]) -> None:
        """Replace the addresses and ports where a UDP service listens; everywhere else a port is unreachable."""
        self._udp_served = served

    def set_draining(self, draining: bool) -> None:
        """While draining every new SYN is refused; live flows go on."""
        self._draining = draining

    def set_sources(self, local: frozenset[bytes] | None, allowed: Sequence[tuple[int, int, int]] = ()) -> None:
        """Say who may connect.

        Args:
            local: the addresses of this host; None accepts any source.
            allowed: other networks that may, as (version 4 or 6, network, mask), integers.
        """
        self._local = local
        self._allowed = list(allowed)

    def set_limits(self, settings: StackSettings) -> None:
        """Let flows cost this much from now on: of the settings, only limits may differ from those it was made with.

        Flows that live go on, also where there are more than the limit; only their buffers shrink or grow at once.
        """
        self._settings = settings
        self._table.set_undecided(settings.undecided)
        self._host.budget.limit = settings.buffers
        self._set_caps()

    # -- input --------------------------------------------------------------------------------------------------------

    def handle_packet(self, packet: bytes, start: int, verified: bool, now: float) -> None:
        """Take one packet from the device.

        Args:
            packet: as read; payloads become views on it, so it must not change.
            start: where the IP header begins.
            verified: the device vouches for the transport checksum.
        """
        self.packets += 1
        available = len(packet) - start
        if available >= 40:
            first, total, fragment, protocol, key, seq, ack, offset_flags, window = _EXPECTED.unpack_from(packet, start)
            if first == 0x45 and protocol == PROTOCOL_TCP and not fragment & _ANY_FRAGMENT:
                flow = self.flows.get(key)
                if (
                    flow is not None
                    and flow.predict
                    and offset_flags & 0x37 == ACK
                    and total <= available <= total + _PADDING
                    and int.from_bytes(packet[start : start + 20], "big") % 65535 == 0
                    and (verified or verify_tcp(packet, start + 20, start + total, key[:4], key[4:8]))
                ):
                    words = offset_flags >> 12
                    if flow.ts_on:
                        if words == 8 and total >= 52:
                            layout, value, _ = _TIMESTAMP.unpack_from(packet, start + 40)
                            if layout == TIMESTAMP_LAYOUT and flow.handle_predicted(
                                packet, start + 52, start + total, seq, ack, window, value, now
                            ):
                                return
                    elif (
                        words == 5
                        and total >= 40
                        and flow.handle_predicted(packet, start + 40, start + total, seq, ack, window, 0, now)
                    ):
                        return
            elif first >> 4 == 6 and available >= 60 and self._handle_expected_v6(packet, start, verified, now):
                return
        self._handle_ip(packet, start, verified, now)

    def _handle_expected_v6(self, packet: bytes, start: int, verified: bool, now: float) -> bool:
        """The short way for IPv6 without extension headers, as for IPv4 in `handle_packet`. Returns: was it taken?"""
        _, payload, protocol, key, seq, ack, offset_flags, window = _EXPECTED_V6.unpack_from(packet, start)
        flow = self.flows.get(key)
        at = start + 40
        end = at + payload
        if (
            flow is None
            or protocol != PROTOCOL_TCP
            or not flow.predict
            or offset_flags & 0x37 != ACK
            or not end <= len(packet) <= end + _PADDING
            or not (verified or verify_tcp(packet, at, end, key[:16], key[16:32]))
        ):
            return False
        words = offset_flags >> 12
        if not flow.ts_on:
            return (
                words == 5 and payload >= 20 and flow.handle_predicted(packet, at + 20, end, seq, ack, window, 0, now)
            )
        if words != 8 or payload < 32:
            return False
        layout, value, _ = _TIMESTAMP.unpack_from(packet, at + 20)
        return layout == TIMESTAMP_LAYOUT and flow.handle_predicted(packet, at + 32, end, seq, ack, window, value, now)

    def handle_timeout(self, now: float) -> None:
        """Do what is due at `now`; flows that owe something afterwards are touched."""
        host = self._host
        flow = host.pop_due(now)
        while flow is not None:
            flow.handle_timeout(now)
            self._after(flow, now)
            flow = host.pop_due(now)
        host.compact(len(self.flows))
        self._table.expire(now)
        dropped = self._reassembler.dropped
        unfinished = self._reassembler.expire(now)
        for _ in range(self._reassembler.dropped - dropped):
            host.drop("fragment")
        for first in unfinished:
            if not self._error_limit.take(now):
                continue
            if first[0] >> 4 == 4:
                kind, code = icmp.TIME_EXCEEDED, icmp.TIME_EXCEEDED_REASSEMBLY
                self._reply(icmp.build_error(kind, code, first[16:20], first[12:16], first))
            else:
                kind, code = icmpv6.TIME_EXCEEDED, icmpv6.TIME_EXCEEDED_REASSEMBLY
                self._reply(icmpv6.build_error(kind, code, first[24:40], first[8:24], first))
        if now >= self._relief_at:
            self._relieve(now)
        if now >= self._turn_at:
            for waiting in (self._table.own, self._table.others):
                if now >= waiting.turn_at:
                    waiting.turn(now)
            self._turn_at = min(self._table.own.turn_at, self._table.others.turn_at)

    # -- output -------------------------------------------------------------------------------------------------------

    def take_requests(self) -> list[Flow]:
        """New requests since the last call; each waits for `accept` or `refuse`."""
        requests = self._requests
        self._requests = []
        return requests

    def take_touched(self) -> list[Flow]:
        """Flows with news since the last call, each once: bytes, space, an end, or something to send."""
        host = self._host
        touched = host.touched
        host.touched = []
        for flow in touched:
            flow.touched = False
        return touched

    def take_replies(self) -> list[bytearray]:
        """Complete packets that belong to no flow."""
        replies = self._replies
        self._replies = []
        host = self._host
        if host.late_drops:
            for reason in host.late_drops:
                host.drop(reason)
            host.late_drops.clear()
        return replies

    def take_datagrams(self) -> list[ReceivedDatagram]:
        """Datagrams for registered services since the last call. Nobody owes an answer; see `reply_datagram`."""
        datagrams = self._datagrams
        self._datagrams = []
        return datagrams

    def flush(self, flow: Flow, write: Write, now: float) -> bool:
        """Send what a flow owes.

        `write(header, views, gso_size)` gets IP and TCP header with the pseudo-header sum in the checksum field; the
        header is rewritten for the next segment, so it must be written or copied at once.

        Returns: False when `write` did: the device is full, nothing is lost, flush again later.
        """
        done = flow.transmit(write, now)
        budget = self._host.budget
        held = flow.held_bytes
        if held != flow.charged and not flow.retired:
            budget.used += held - flow.charged
            flow.charged = held
        if not 0.0 <= now - self._epoch < 1.0:
            self._begin_epoch(int(now))
        if flow.active_epoch != self._epoch:
            flow.active_epoch = self._epoch
            self._epoch_flows += 1
        if (budget.used > budget.limit * _TIGHT) is not self._tight:
            self._tight = not self._tight
            self.rationed = self._tight or budget.crowded
            self._set_caps()
        if self._tight and self._relief_at == _INFINITE:
            self._relief_at = now + _RELIEF_INTERVAL_S
            self._host.alarmed = True
        if flow.closed and not flow.retired:
            self._after(flow, now)
            self._host.alarmed = True
        return done

    # -- command ------------------------------------------------------------------------------------------------------

    def accept(self, flow: Flow, now: float) -> None:
        """Take a request: it owes the SYN-ACK and is touched. Nothing happens when its app has given up already."""
        if flow.closed or flow.state != SYN_PENDING:
            return
        table = self._table
        limit = self._settings.half_open
        victim: Flow | None = None
        if not flow.local and table.foreign_half_open.get(flow.source[0], 0) >= limit * 2 // 3:
            victim = table.oldest_half_open(flow.source[0])
        elif table.half_open > limit // _HALF_OPEN_FEW:
            victim = table.oldest_half_open(None)
            if victim is not None and table.half_open < limit and now - victim.accepted_at < _HALF_OPEN_S:
                victim = None
        if victim is not None:
            victim.evict()
            self._after(victim, now)
        flow.accept(now)
        self.accepted += 1
        table.recount(flow)
        self._count_heads()

    def refuse(self, flow: Flow, now: float) -> None:
        """Decline a request: its app gets RST, among the replies. Nothing happens when it has given up already."""
        if flow.closed or flow.state != SYN_PENDING:
            return
        flow.refuse()
        self.refused += 1
        source, source_port = flow.destination
        destination, destination_port = flow.source
        self._reply(
            build_tcp(
                source,
                destination,
                source_port,
                destination_port,
                seq=0,
                ack=flow.rcv_nxt & MASK,
                flags=RST | ACK,
            )
        )
        self._after(flow, now)

    def reply_datagram(self, datagram: ReceivedDatagram, payload: bytes | memoryview) -> None:
        """Answer a datagram, from where it was sent to: the answer is among the replies.

        Args:
            payload: at most 65507 bytes. More than the MTU holds goes out in one piece; the local kernel takes it.

        Raises: ValueError when `payload` is longer.
        """
        if len(payload) > 65507:
            raise ValueError(f"a datagram of {len(payload)} bytes")
        source, source_port = datagram.destination
        destination, destination_port = datagram.source
        self._reply(build_udp(source, destination, source_port, destination_port, payload))

    def abort_all(self, now: float) -> None:
        """End every flow; those that can be told owe a RST. For the end of the device or of us."""
        for flow in list(self.flows.values()):
            if flow.state == SYN_PENDING:
                self.refuse(flow, now)
            else:
                flow.abort(now)
                self._after(flow, now)

    # -- IP -----------------------------------------------------------------------------------------------------------

    def _handle_ip(self, packet: bytes, start: int, verified: bool, now: float) -> None:
        """The long way, for everything that was not to be expected."""
        host = self._host
        if len(packet) <= start:
            host.drop("short")
            return
        if packet[start] >> 4 == 6:
            self._handle_ipv6(packet, start, verified, now)
            return
        header = self._header = self._header4
        judgement = parse_ipv4(packet, start, header)
        if judgement != verdict.OK:
            host.drop(verdict.NAMES[judgement])
            return
        transport = start + header.header_length
        end = start + header.total_length
        protocol = header.protocol
        if header.more_fragments or header.fragment:
            key = packet[start + 12 : start + 20] + packet[start + 4 : start + 6]
            self._handle_fragment(key, packet, start, transport, end, now)
        elif protocol == PROTOCOL_TCP:
            self._handle_tcp(packet, start, transport, end, verified, now)
        elif protocol == PROTOCOL_ICMP:
            self._handle_icmp(packet, start, transport, end, now)
        elif protocol == PROTOCOL_UDP:
            self._handle_udp(packet, start, transport, end, verified, now)
        elif self._may_answer(packet, start, end, now):
            host.drop("protocol")
            self._error(icmp.UNREACHABLE_PROTOCOL, packet, start, end, now)

    def _handle_ipv6(self, packet: bytes, start: int, verified: bool, now: float) -> None:
        host = self._host
        if not self._settings.mask6:
            host.drop("ipv6")
            return
        header = self._header = self._header6
        judgement = parse_ipv6(packet, start, header)
        if judgement != verdict.OK:
            host.drop(verdict.NAMES[judgement])
            return
        end = start + header.total_length
        if header.destination[0] == 0xFF:
            # Router solicitations, listener reports, mDNS: what a kernel tells every link. No error is sent about
            # any of it, not even where RFC 4443 2.4 (e.3) would allow one: we have no address there to send it from.
            host.drop("multicast")
            return
        judgement = walk_extensions(packet, start, header)
        if judgement != verdict.OK:
            if judgement != verdict.PARAMETER:
                host.drop(verdict.NAMES[judgement])
            elif self._may_answer(packet, start, end, now):
                self._parameter_problem(packet, start, end, now)
            return
        transport = start + header.header_length
        protocol = header.protocol
        if header.more_fragments or header.fragment:
            key = packet[start + 8 : start + 40] + header.identification.to_bytes(4, "big")
            self._handle_fragment(key, packet, start, transport, end, now)
        elif protocol == PROTOCOL_TCP:
            self._handle_tcp(packet, start, transport, end, verified, now)
        elif protocol == PROTOCOL_ICMPV6:
            self._handle_icmp(packet, start, transport, end, now)
        elif protocol == PROTOCOL_UDP:
            self._handle_udp(packet, start, transport, end, verified, now)
        elif self._may_answer(packet, start, end, now):
            self._parameter_problem(packet, start, end, now)

    def _parameter_problem(self, packet: bytes, start: int, end: int, now: float) -> None:
        """Say what of a packet's headers we cannot take (RFC 4443 3.4)."""
        header = self._header6
        self._host.drop("protocol" if header.problem_code == UNKNOWN_NEXT_HEADER else "parameter")
        if not icmpv6.is_error(packet, start, end) and self._error_limit.take(now):
            quoted = packet[start : min(end, start + icmpv6.MIN_MTU)]
            kind, code, pointer = icmpv6.PARAMETER_PROBLEM, header.problem_code, header.problem_pointer
            self._reply(icmpv6.build_error(kind, code, header.destination, header.source, quoted, pointer=pointer))

    def _may_answer(self, packet: bytes, start: int, end: int, now: float) -> bool:
        """Source and destination of a packet without a flow: is it from somebody we talk to, for an address we have?

        What is not is dropped and counted here; the address of nobody in our subnet is answered "host unreachable".
        """
        header = self._header
        if not self._source_ok(header.source):
            self._host.drop("source")
            return False
        if header.destination in self._served or header.destination in self._udp_served:
            return True
        if not self._is_nobodys(header.destination):
            # Multicast, broadcast, somebody else's: the kernel sends such packets to every link.
            self._host.drop("destination")
            return False
        self._host.drop("no_host")
        kind = packet[start + header.header_length] if header.header_length < header.total_length else 0
        # Never an error about an error (RFC 1122 3.2.2, RFC 4443 2.4 e).
        if len(header.source) == 16:
            about = not icmpv6.is_error(packet, start, end)
        else:
            about = header.protocol != PROTOCOL_ICMP or kind == icmp.ECHO_REQUEST
        if about:
            self._error(icmp.UNREACHABLE_HOST, packet, start, end, now)
        return False

    def _is_nobodys(self, destination: bytes) -> bool:
        """Is an address that nobody has here one that somebody could have?"""
        settings = self._settings
        address = int.from_bytes(destination, "big")
        if len(destination) == 4:
            last = settings.network | (~settings.mask & MASK)
            return (
                address & settings.mask == settings.network
                and address not in (settings.network, last)
                and destination != settings.gateway
            )
        return (
            address & settings.mask6 == settings.network6
            and address != settings.network6
            and destination != settings.gateway6
        )

    def _source_ok(self, source: bytes) -> bool:
        """RFC 1122 3.2.1.3, and who may: a source is a host, not one of ours, and local or allowed."""
        first = source[0]
        if source in self._served or source in self._udp_served:
            return False
        settings = self._settings
        address = int.from_bytes(source, "big")
        version = 4
        if len(source) == 4:
            if first == 0 or first == 127 or first >= 224:
                return False
            if address in (settings.network, settings.network | (~settings.mask & MASK)):
                return False
            ours = address & settings.mask == settings.network
        else:
            version = 6
            # Unspecified, loopback, multicast, IPv4 in disguise (RFC 4291 2.5.2, 2.5.3, 2.7, 2.5.5.2).
            if address <= 1 or first == 0xFF or source[:12] == _MAPPED or address == settings.network6:
                return False
            ours = address & settings.mask6 == settings.network6
        local = self._local
        if local is None or source in local:
            return True
        if ours:
            return False  # behind the link there is nobody but us: who has such an address and is not this host, lies
        return any(of == version and address & mask == network for of, network, mask in self._allowed)

    def _error(self, code: int, packet: bytes, start: int, end: int, now: float) -> None:
        """ "Destination unreachable", from the address that was asked for: the kernel drops what comes from its own.

        Args:
            code: ICMP's for IPv4, which is translated where the packet is of version 6.
        """
        if self._error_limit.take(now):
            header = self._header
            if len(header.source) == 4:
                quoted = packet[start : min(end, start + 576)]
                self._reply(icmp.build_error(icmp.UNREACHABLE, code, header.destination, header.source, quoted))
            else:
                quoted = packet[start : min(end, start + icmpv6.MIN_MTU)]
                code = icmpv6.UNREACHABLE_PORT if code == icmp.UNREACHABLE_PORT else icmpv6.UNREACHABLE_ADDRESS
                self._reply(icmpv6.build_error(icmpv6.UNREACHABLE, code, header.destination, header.source, quoted))

    def _reply(self, packet: bytearray) -> None:
        self.replies_sent += 1
        self._replies.append(packet)

    # -- ICMP, UDP, fragments -----------------------------------------------------------------------------------------

    def _handle_icmp(self, packet: bytes, start: int, at: int, end: int, now: float) -> None:
        header = self._header
        if len(header.source) == 4:
            good = icmp.verify_icmp(packet, at, end)
            echo, too_big = icmp.ECHO_REQUEST, icmp.UNREACHABLE
        else:
            good = icmpv6.verify_icmpv6(packet, at, end, header.source, header.destination)
            echo, too_big = icmpv6.ECHO_REQUEST, icmpv6.PACKET_TOO_BIG
        if not good:
            self._host.drop("icmp_checksum")
            return
        kind = packet[at]
        if kind == too_big:
            self._handle_too_big(packet, at, end)
        elif self._may_answer(packet, start, end, now):
            if kind == echo:
                self._answer_echo(memoryview(packet)[at:end], now)
            else:
                self._host.drop("icmp")

    def _answer_echo(self, message: bytes | memoryview, now: float, packets: int = 1) -> None:
        """Answer an echo request, which came in so many packets."""
        if self._echo_limit.take(now):
            header = self._header
            build = icmp.build_echo_reply if len(header.source) == 4 else icmpv6.build_echo_reply
            self._reply(build(header.destination, header.source, message))
        else:
            self._drop_all("echo_limit", packets)

    def _drop_all(self, reason: str, packets: int) -> None:
        """Count the packet at hand, and those that waited for it and go with it: them at the end of the batch."""
        if packets:
            self._host.drop(reason)
            self._host.drop_late(reason, packets - 1)

    def _handle_too_big(self, packet: bytes, at: int, end: int) -> None:
        """Errors about our segments: only "too big" changes anything; the others are soft (RFC 9293 MUST-56)."""
        version = 4 if len(self._header.source) == 4 else 6
        try:
            quoted = (icmp if version == 4 else icmpv6).parse_quoted_tcp(packet, at, end)
        except BadPacket:
            self._host.drop("icmp")
            return
        key = quoted.destination + quoted.source + _PORTS.pack(quoted.destination_port, quoted.source_port)
        flow = self.flows.get(key)
        if (
            flow is None
            or (version == 4 and packet[at + 1] != icmp.FRAGMENTATION_NEEDED)
            or not flow.handle_quoted(quoted.seq, quoted.mtu)
        ):
            self._host.drop("icmp")

    def _handle_udp(self, packet: bytes, start: int, at: int, end: int, verified: bool, now: float) -> None:
        header = self._header
        datagram = self._datagram
        judgement = parse_udp(packet, at, end, datagram)
        if judgement != verdict.OK:
            self._host.drop(verdict.NAMES[judgement])
        elif not verified and not verify_udp(packet, at, datagram.data_end, header.source, header.destination):
            self._host.drop("udp_checksum")
        elif self._may_answer(packet, start, end, now):
            if datagram.destination_port not in self._udp_served.get(header.destination, _NO_PORTS):
                self._host.drop("udp")
                self._error(icmp.UNREACHABLE_PORT, packet, start, end, now)
            elif len(self._datagrams) >= _MAX_DATAGRAMS or not datagram.source_port:
                self._host.drop("udp_limit" if datagram.source_port else "udp")  # port 0 wants no answer (RFC 768)
            else:
                source = (header.source, datagram.source_port)
                destination = (header.destination, datagram.destination_port)
                payload = memoryview(packet)[datagram.data_start : datagram.data_end]
                self._datagrams.append(ReceivedDatagram(source, destination, payload))

    def _handle_fragment(self, key: bytes, packet: bytes, start: int, at: int, end: int, now: float) -> None:
        """A part of a packet: of an echo it is kept, of anything else it is dropped."""
        header = self._header
        version4 = len(header.source) == 4
        if header.protocol != (PROTOCOL_ICMP if version4 else PROTOCOL_ICMPV6):
            self._host.drop("fragment")
            return
        if not self._source_ok(header.source) or header.destination not in self._served:
            self._host.drop("fragment")
            return
        reassembler = self._reassembler
        dropped = reassembler.dropped
        message = reassembler.add(
            key,
            header.fragment,
            header.more_fragments,
            packet[at:end],
            packet[start : min(at + 8, end)],
            now,
            MAX_PAYLOAD if version4 else MAX_PAYLOAD_V6,
        )
        self._drop_all("fragment", reassembler.dropped - dropped)
        if message is None:
            return
        if version4:
            good = icmp.verify_icmp(message, 0, len(message)) and message[0] == icmp.ECHO_REQUEST
        else:
            good = (
                icmpv6.verify_icmpv6(message, 0, len(message), header.source, header.destination)
                and message[0] == icmpv6.ECHO_REQUEST
            )
        if good:
            self._answer_echo(message, now, reassembler.joined)
        else:
            self._drop_all("icmp", reassembler.joined)

    # -- TCP ----------------------------------------------------------------------------------------------------------

    def _handle_tcp(self, packet: bytes, start: int, at: int, end: int, verified: bool, now: float) -> None:
        header = self._header
        segment = self._segment
        judgement = parse_tcp(packet, at, end, segment)
        if judgement != verdict.OK:
            self._host.drop(verdict.NAMES[judgement])
            return
        if len(packet) > end + _PADDING:
            packet = packet[:end]
        if not verified and not verify_tcp(packet, at, end, header.source, header.destination):
            self._host.drop("tcp_checksum")
            return
        flags = segment.flags
        key = header.source + header.destination + packet[at : at + 4]
        flow = self.flows.get(key)
        if flow is not None and flow.closed:
            self._after(flow, now)  # ended by its owner a moment ago
            flow = None
        record = self._table.time_wait.get(key) if flow is None else None
        if flags & (SYN | FIN | RST) == SYN | FIN and (flow is not None or record is not None):
            self._host.drop("syn_fin")
            return
        if flow is not None:
            if flow.state == SYN_PENDING and flags & (SYN | ACK | RST) == SYN and segment.seq != flow.irs:
                # The app has begun anew on the same port: what it wanted before is void.
                if self._may_answer(packet, start, end, now):
                    flow.cancel()
                    self._after(flow, now)
                    self._listen(key, None, verified, now)
                return
            wants_reset = flow.handle_segment(segment, packet, now)
            self._after(flow, now)
            if wants_reset:
                self._reset(now)
            return
        if record is not None and not self._leave_time_wait(key, record, now):
            return
        if self._may_answer(packet, start, end, now):
            self._listen(key, record, verified, now)

    def _listen(self, key: bytes, record: TimeWait | None, verified: bool, now: float) -> None:
        """A segment without a connection, for an address of ours (RFC 9293 3.10.7.1 and 2)."""
        header = self._header
        segment = self._segment
        flags = segment.flags
        if flags & RST:
            self._host.drop("stray_reset")
            return
        if flags & ACK:
            self._host.drop("stray_ack")
            self._reset(now)
            return
        served = segment.destination_port in self._served.get(header.destination, _NO_PORTS)
        if not flags & SYN:
            # LISTEN is silent where CLOSED is not.
            self._host.drop("stray")
            if not served:
                self._reset(now)
            return
        if not served:
            self._host.drop("closed_port")
            self._reset(now)
        elif flags & FIN:
            self._host.drop("syn_fin")  # nobody opens a connection so, but even this is refused where nothing listens
        elif self._draining:
            self._host.drop("draining")
            self._reset(now)
        elif len(self.flows) >= self._settings.max_flows:
            self._host.drop("flow_limit")
            self._reset(now)
        else:
            self._open(key, record, verified, now)

    def _open(self, key: bytes, record: TimeWait | None, verified: bool, now: float) -> None:
        """A SYN to a served port becomes a request, unless too many wait; then it is dropped, and will come again."""
        table = self._table
        header = self._header
        segment = self._segment
        source = header.source
        settings = self._settings
        local = self._local is None or source in self._local
        if local and settings.offload and not verified:
            # With offload this host's kernel leaves checksums to the device. Who brings his own has made the packet by
            # hand, or comes from elsewhere, and does not share the places of this host's programs.
            local = False
        waiting = table.own if local else table.others
        reason = waiting.judge(name_of(key, segment.seq), source, table.undecided >= settings.undecided, now)
        if reason:
            self._host.drop(reason)
            for unproven in waiting.unproven:
                unproven.put_off()
                self._after(unproven, now)
            waiting.unproven.clear()
            self._turn_at = min(table.own.turn_at, table.others.turn_at)
            return
        if record is not None:
            table.time_wait.pop(key, None)
        initial, ts_offset = initial_numbers(self._secret, key, now)
        if record is not None and diff(initial, record.snd_nxt) <= 0:
            # The old connection was faster than the clock of our numbers (RFC 6528 3, RFC 9293 3.4.1): stay above.
            initial = (record.snd_nxt + 0x10000 + (initial & 0xFFFF)) & MASK
        flow = Flow(
            self._host,
            key,
            (source, segment.source_port),
            (header.destination, segment.destination_port),
            segment,
            initial,
            ts_offset,
            now,
        )
        flow.local = local
        table.add(flow)
        self.opened += 1
        self._requests.append(flow)

    def _leave_time_wait(self, key: bytes, record: TimeWait, now: float) -> bool:
        """A segment for a connection in TIME-WAIT.

        Returns: True when it may open a new one (RFC 9293 3.10.7.4 MAY-2, RFC 6191): go on as LISTEN. The record goes
        when the new one has come.
        """
        table = self._table
        if record.expires_at <= now:
            del table.time_wait[key]
            return True
        segment = self._segment
        flags = segment.flags
        if flags & RST:
            self._host.drop("time_wait_reset")  # RFC 1337: no assassination
            return False
        ahead = diff(segment.seq, record.rcv_nxt)
        if flags & SYN and not flags & ACK:
            older = False
            newer = ahead > 0
            if record.ts_on and segment.has_timestamp:
                step = (segment.ts_value - record.ts_recent) & MASK
                older = step >= HALF
                newer = newer or 0 < step < HALF
            if newer and not older:
                return True
        elif ahead == 0 and segment.data_end == segment.data_start and not flags & FIN:
            self._host.drop("time_wait")  # the last ACK again: nothing is missing
            return False
        # Bytes or a FIN once more: the app misses our last ACK. An old ACK alone proves nothing, and answering each of
        # them could go on for ever with an app that takes our answers for wrong.
        missing = ahead < 0 and (segment.data_end > segment.data_start or flags & FIN != 0)
        if missing:
            record.expires_at = now + TIME_WAIT_S
            table.hold(key, record)
        self._host.drop("time_wait")
        if missing or now - record.answered_at >= CHALLENGE_INTERVAL_S:
            record.answered_at = now
            header = self._header
            stamp = (int(now * 1000.0) + record.ts_offset) & MASK
            self._reply(
                build_tcp(
                    header.destination,
                    header.source,
                    segment.destination_port,
                    segment.source_port,
                    seq=record.snd_nxt,
                    ack=record.rcv_nxt,
                    flags=ACK,
                    window=65535,
                    options=options(timestamp=(stamp, record.ts_recent)) if record.ts_on else b"",
                )
            )
        return False

    def _reset(self, now: float) -> None:
        """Answer with RST, within limits; never a RST with a RST."""
        segment = self._segment
        if segment.flags & RST:
            return
        limit = self._reset_limit if segment.flags & (SYN | ACK) == SYN else self._stray_limit
        if limit.take(now):
            header = self._header
            self._reply(build_reset(header.source, header.destination, segment))

    # -- the life of flows --------------------------------------------------------------------------------------------

    def _after(self, flow: Flow, now: float) -> None:
        """Keep the table right after a flow may have changed its state; an ended one leaves it."""
        if not flow.closed:
            if flow.counted:
                self._table.recount(flow)
            return
        if flow.retired:
            return
        flow.retired = True
        self._table.remove(flow)
        self._host.budget.used -= flow.charged
        flow.charged = 0
        if flow.state == TIME_WAIT:
            self._table.hold(flow.key, TimeWait(flow, now))
        failure = flow.failure
        if failure == "cancelled":
            self.cancelled += 1
        elif failure == "put off":
            self.put_off += 1
        elif failure == "reset":
            self.resets_received += 1
        elif failure in ("aborted", "evicted", "unread"):
            self.aborted += 1

    def _begin_epoch(self, second: int) -> None:
        """Once a second: how many flows had traffic decides how large their buffers may be."""
        self._count_heads()
        small = self._epoch_flows > self._settings.active_flows
        self._epoch = second
        self._epoch_flows = 0
        if small is not self._small:
            self._small = small
            self._set_caps()

    def _count_heads(self) -> None:
        """Could the send buffers of all flows take half of the memory?"""
        budget = self._host.budget
        budget.crowded = 2 * len(self.flows) * self._settings.send_buffer > budget.limit
        self.rationed = self._tight or budget.crowded

    def _set_caps(self) -> None:
        """How much one flow may hold: little when memory runs short, half when many are active."""
        settings = self._settings
        budget = self._host.budget
        receive = settings.receive_buffer
        send = settings.send_buffer
        if self._small:
            receive = min(receive, settings.small_buffer)
            send = min(send, settings.small_buffer)
        if self._tight:
            receive = min(receive, _TIGHT_CAP)
            send = min(send, _TIGHT_CAP)
        budget.receive_cap = receive
        budget.send_cap = send

    def _relieve(self, now: float) -> None:
        """Memory is short: end the flows that have held much without moving for so long, until it is not."""
        budget = self._host.budget
        self._relief_at = _INFINITE
        if not self._tight:
            return
        self._relief_at = now + _RELIEF_INTERVAL_S
        patience = _STALLED_AFTER_S if budget.used < budget.limit else _STALLED_AFTER_FULL_S
        stalled: list[tuple[int, bytes]] = []
        for key, flow in self.flows.items():
            if flow.charged < _HELD_BYTES:
                continue
            moved = flow.bytes_to_app + flow.bytes_from_app - flow.mark_bytes
            if moved >= _STALLED_BYTES:
                flow.mark_bytes += moved
                flow.mark_at = now
            elif now - flow.mark_at >= patience:
                stalled.append((flow.charged, key))
        stalled.sort(reverse=True)
        for _, key in stalled:
            if budget.used <= budget.limit * _RELIEVED:
                return
            flow = self.flows[key]
            flow.evict()
            self._after(flow, now)
