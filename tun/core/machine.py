"""One TCP connection, passive side (RFC 9293, 7323, 5961, 2018, 2883, 5681, 6582, 6298).

The machine never sends. It is told about segments, time and its owner's wishes, and notes what it owes: an ACK, a
retransmission, a probe, a FIN. Asked by `transmit`, it builds those segments one after the other until nothing is owed
or the device is full; then it still knows the rest. So retransmissions, window updates and FINs cannot overtake or
contradict each other, and nothing is queued between here and the device.

Numbers are positions (`tun.seq`): unbounded, so they are compared as integers. They become 32 bits when a segment is
built, and segments' numbers become positions near `rcv_nxt` or `snd_una` when they come in.

What the peer is, decides much here: nearly always the kernel of this machine, on the other side of a TUN device. It
sends up to 64 KiB at once, its round trip is microseconds, and what gets lost was lost by a full queue. So:

  * one ACK per flow and batch, decided when the batch has been read (`transmit`), with data if there is some;
  * received data needs ordering and SACK (the kernel retransmits), sent data needs a timer and little more:
    NewReno with a large first window, holes resent by SACK, no pacing, no rack;
  * a header prediction (`handle_predicted`) for what comes a million times: the next bytes, and their ACKs.

Rules of this file: no I/O, no clock, no chance; the state changes only through states.TABLE (`_move`); nothing here
raises for what the network sent. `rcv_edge`, the right edge of the window as promised, never moves left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from heapq import heapify, heappop, heappush
from struct import Struct
from typing import Final

from tun.core import states
from tun.core.buffers import (
    NO_VIEWS,
    SMALL,
    Budget,
    OutOfOrder,
    ReceiveQueue,
    Scoreboard,
    SendQueue,
    copy_small,
)
from tun.core.states import (
    CLOSE_WAIT,
    CLOSING,
    ESTABLISHED,
    FIN_WAIT_1,
    FIN_WAIT_2,
    LAST_ACK,
    SYN_PENDING,
    SYN_RECEIVED,
    TIME_WAIT,
)
from tun.seq import HALF, MASK, MODULUS
from tun.wire.checksum import fold, pseudo_header_sum, sum16
from tun.wire.ipv4 import PROTOCOL_TCP
from tun.wire.ipv6 import build_ipv6
from tun.wire.tcp import ACK, FIN, MAX_WINDOW_SCALE, PSH, RST, SYN, TIMESTAMP_LAYOUT, Segment, options

Write = Callable[[bytearray | memoryview, Sequence[bytes | memoryview], int], bool]

INFINITE: Final = math.inf

# Our window scale (RFC 7323 2.3): 8 lets windows grow to 16 MiB, and costs a granularity of 256 bytes.
WINDOW_SCALE: Final = 8
# How far rounding up to that granularity may let a window drift beyond its buffer; then it is rounded down (`_window`).
WINDOW_SLACK: Final = 65536

MIN_MSS: Final = 48  # Linux tcp_min_snd_mss; below it a peer makes us send headers (CVE-2019-11479)
MAX_MSS: Final = 65495
DEFAULT_MSS: Final = 536  # RFC 9293 MUST-15, for a SYN without the option
DEFAULT_MSS_V6: Final = 1220  # the same over IPv6

# RFC 6298: first timeout 1 s, at most 60 s. The minimum is Linux's 200 ms and some, for a scheduler in Python.
FIRST_RTO_S: Final = 1.0
MIN_RTO_S: Final = 0.25
MAX_RTO_S: Final = 60.0
# RFC 6298 5.5 keeps the doubled timeout until something is measured again, which may take many lost segments. Where a
# round trip is microseconds that is too careful: after progress this much of it stays (four times the timeout).
KEPT_BACKOFF: Final = 2
# SYN-ACK at 0, 1, 3, 7, 15 s; freed at 31 s (Linux tcp_synack_retries is 5, we count the first as well).
SYN_ACK_SENDS: Final = 5
# Data without progress for so long ends the connection (RFC 9293 3.8.3: R2 of at least 100 s).
GIVE_UP_S: Final = 100.0

# A SYN_PENDING app that resends no SYN within this, or within 2.5 times the last gap, has gone without a word: a
# client that closes its socket in SYN-SENT sends nothing. Linux resends after about 1, 2, 3, 4, 5 s and then doubles.
SYN_SILENCE_S: Final = 3.0
SYN_SILENCE_GAPS: Final = 2.5
# A SYN that comes again sooner was not sent again by a kernel (RFC 6298 5.7 wants a second where nothing is known).
SYN_AGAIN_S: Final = 0.5

FIN_WAIT_2_S: Final = 60.0  # Linux tcp_fin_timeout
# Linux tcp_invalid_ratelimit, gVisor the same: per flow, never shared between flows (CVE-2016-5696).
CHALLENGE_INTERVAL_S: Final = 0.5
PROBE_ANSWER_INTERVAL_S: Final = 0.1  # half of Linux's least retransmission timeout, by which it paces its probes
PAWS_IDLE_S: Final = 24 * 86400.0  # RFC 7323 5.5: after 24 days a timestamp says nothing any more

FIRST_CWND: Final = 256 * 1024  # RFC 9293 MUST-19 wants slow start; the link is this machine, so it starts high
DUP_ACKS: Final = 3  # RFC 5681 3.2

# After so many answers sent within `ack_delay` of a question the next ACK waits for the answer to ride on.
INTERACTIVE: Final = 3

NO_RECOVERY: Final = 0
FAST_RECOVERY: Final = 1  # duplicate ACKs or SACK said that something is missing
LOSS_RECOVERY: Final = 2  # the timer ran out: all that is not acknowledged counts as lost

# What an empty send buffer takes though all memory is in use: every flow must be able to move.
LAST_RESORT: Final = 16384
# Where there are so many flows that their buffers could fill the memory, a send buffer begins with this, and grows by
# twice what its app acknowledges. No app's first window is larger (RFC 7323 2.2: unscaled in a SYN), so nobody waits
# for it; but who opens a thousand connections and reads none of them holds an eighth of what he would.
FIRST_SEND: Final = 65536
# Segments that one call of `transmit` sends. Without offload, or to a peer with an MSS of 48 bytes that asks for lost
# ones, a window could be ten thousand; then the flow is asked again after the others (gVisor and WireGuard: 64, 128).
MAX_SEGMENTS: Final = 128

_IP_FIXED: Final = Struct("!BBHIHH4s4s")
_PORTS: Final = Struct("!HH")
_IP_PATCH: Final = Struct("!HIHH")  # total length; identification 0 and DF; TTL 64 and TCP; header checksum
_TCP_PATCH: Final = Struct("!IIHHHH")
_TCP_TS_PATCH: Final = Struct("!IIHHHHIII")
_SHORT: Final = Struct("!H")  # payload length of IPv6
_DF: Final = 0x4000
_TTL_TCP: Final = 0x4006


class Host:
    """What the flows of one stack share: memory, timers, marks, counters and the settings they look at."""

    __slots__ = (
        "ack_delay",
        "alarmed",
        "budget",
        "drops",
        "heap",
        "keepalive_idle",
        "keepalive_interval",
        "keepalive_probes",
        "late_drops",
        "mtu",
        "offload",
        "probes",
        "retransmits",
        "ticket",
        "timeouts",
        "touched",
    )

    def __init__(self, budget: Budget, mtu: int, offload: bool) -> None:
        self.budget: Budget = budget
        self.mtu: int = mtu
        self.offload: bool = offload
        self.ack_delay: float = 0.02
        self.keepalive_idle: float = 300.0
        self.keepalive_interval: float = 30.0
        self.keepalive_probes: int = 9
        self.touched: list[Flow] = []
        self.heap: list[tuple[float, int, Flow]] = []
        self.ticket: int = 0
        self.alarmed: bool = True  # a deadline may have come closer since somebody last looked
        self.drops: dict[str, int] = {}
        self.late_drops: list[str] = []  # of packets that had been taken, to be counted at the end of the batch
        self.retransmits: int = 0
        self.probes: int = 0
        self.timeouts: int = 0

    def drop(self, reason: str) -> None:
        """Count one discarded packet."""
        self.drops[reason] = self.drops.get(reason, 0) + 1

    def drop_late(self, reason: str, packets: int) -> None:
        """Count packets that had been taken and are discarded now, at the end of the batch."""
        self.late_drops += [reason] * packets

    def push(self, at: float, flow: Flow) -> None:
        """Put a flow into the heap of deadlines. Entries are never removed: a stale one is skipped when it comes up."""
        self.ticket += 1
        self.alarmed = True
        heappush(self.heap, (at, self.ticket, flow))

    def pop_due(self, now: float) -> Flow | None:
        """The next flow whose deadline has come, its alarm cleared; None when there is none."""
        heap = self.heap
        while heap and heap[0][0] <= now:
            at, _, flow = heappop(heap)
            if flow.armed == at:
                flow.armed = INFINITE
                return flow
        return None

    def next_deadline(self) -> float:
        """When the next flow wants `handle_timeout`; infinite when none does."""
        heap = self.heap
        while heap:
            at, _, flow = heap[0]
            if flow.armed == at:
                return at
            heappop(heap)
        return INFINITE

    def compact(self, live: int) -> None:
        """Throw stale entries away when they outnumber the flows: they keep dead flows in memory."""
        if len(self.heap) > 2 * live + 64:
            self.heap = [entry for entry in self.heap if entry[2].armed == entry[0]]
            heapify(self.heap)


class Flow:
    """One connection of an app, from its SYN to its end.

    Attributes (read by the owner, written here):
        key: source and destination address and the two ports, as cut from the packet.
        source: the app's address and port; `destination`: the endpoint's.
        state: one of `tun.core.states`.
        owner: whatever the shell hangs here.
        readable_bytes: in-order bytes that wait for the owner.
        app_finished: the app's FIN has come and every byte before it was consumed.
        peer_closed: the app's FIN has come (bytes may still wait).
        failure: "" or why the flow ended: "cancelled" (the app gave up before the decision), "refused" (by the owner),
            "reset" (by the app), "timeout", "aborted" (by the owner), "unread" (by us: data for an owner that had
            released the flow), "evicted" (by us: its place or its memory was needed), "put off" (by us, before the
            decision and without a word: too many wait, and its SYN may come again).
        closed: all is over, or TIME-WAIT: the owner may forget the flow (bytes may still wait to be read).
        bytes_from_app, bytes_to_app: taken from the app in order; acknowledged by the app.
        opened_at: when the SYN came.
    """

    __slots__ = (
        "_ack_at",
        "_ack_owed",
        "_answered",
        "_backoff",
        "_challenged_at",
        "_cwnd",
        "_cwnd_limited",
        "_data_at",
        "_drift",
        "_dsack",
        "_dup_acks",
        "_dup_acks_owed",
        "_fin_known",
        "_fin_position",
        "_fin_sent",
        "_fin_wait_at",
        "_fin_wanted",
        "_force_small",
        "_header",
        "_header_length",
        "_heard_at",
        "_host",
        "_interactive",
        "_ip_length",
        "_ip_sum",
        "_keep_at",
        "_keep_probes",
        "_last_ack_sent",
        "_last_byte",
        "_max_payload",
        "_mss",
        "_out_of_order",
        "_probe_owed",
        "_progress_at",
        "_pseudo_sum",
        "_queue",
        "_receive_shift",
        "_recovery",
        "_recovery_point",
        "_released",
        "_reset_owed",
        "_retransmit_from",
        "_retransmit_now",
        "_rto",
        "_rto_at",
        "_rttvar",
        "_sack_on",
        "_scoreboard",
        "_send",
        "_send_shift",
        "_snd_wl1",
        "_snd_wl2",
        "_snd_wnd_max",
        "_srtt",
        "_ssthresh",
        "_syn_ack_owed",
        "_syn_at",
        "_syn_gap",
        "_timed_at",
        "_timed_position",
        "_ts_recent_at",
        "accepted_at",
        "active_epoch",
        "app_finished",
        "armed",
        "bytes_from_app",
        "bytes_to_app",
        "came_again",
        "charged",
        "closed",
        "counted",
        "destination",
        "failure",
        "irs",
        "iss",
        "key",
        "local",
        "mark_at",
        "mark_bytes",
        "opened_at",
        "owner",
        "peer_closed",
        "peer_mss",
        "predict",
        "rcv_edge",
        "rcv_nxt",
        "readable_bytes",
        "retired",
        "snd_edge",
        "snd_nxt",
        "snd_una",
        "source",
        "state",
        "touched",
        "ts_offset",
        "ts_on",
        "ts_recent",
    )

    def __init__(
        self,
        host: Host,
        key: bytes,
        source: tuple[bytes, int],
        destination: tuple[bytes, int],
        segment: Segment,
        initial_sequence: int,
        ts_offset: int,
        now: float,
    ) -> None:
        self._host: Host = host
        self.key: bytes = key
        self.source: tuple[bytes, int] = source
        self.destination: tuple[bytes, int] = destination
        self.owner: object | None = None
        self.opened_at: float = now
        self.local: bool = True  # the source is this host
        self.came_again: bool = False  # the SYN did: somebody means it
        self.accepted_at: float = now
        self.state: int = states.move(states.LISTEN, states.RECEIVE_SYN)
        self.failure: str = ""
        self.closed: bool = False
        self.retired: bool = False  # out of the stack's table
        self.touched: bool = False  # in the stack's list of this batch
        self.counted: int = 0  # as undecided (SYN_PENDING) or half-open (SYN_RECEIVED) by the stack; 0 as neither
        self.active_epoch: int = -1

        # What the SYN said.
        self._ip_length: int = 20 if len(key) == 12 else 40
        default = DEFAULT_MSS if self._ip_length == 20 else DEFAULT_MSS_V6
        offered = segment.mss if segment.mss > 0 else default  # 0 counts as absent: somebody divides by it
        self.peer_mss: int = min(max(offered, MIN_MSS), MAX_MSS)
        scaling = segment.window_scale >= 0
        self._send_shift: int = min(segment.window_scale, MAX_WINDOW_SCALE) if scaling else 0  # RFC 7323 2.3
        self._receive_shift: int = WINDOW_SCALE if scaling else 0
        self._sack_on: bool = segment.sack_permitted
        self.ts_on: bool = segment.has_timestamp
        self.ts_recent: int = segment.ts_value if segment.has_timestamp else 0
        self._ts_recent_at: float = now
        self.ts_offset: int = ts_offset
        self._syn_at: float = now
        self._syn_gap: float = 0.0

        # Receiving.
        self.irs: int = segment.seq
        self.rcv_nxt: int = segment.seq + 1
        self.rcv_edge: int = segment.seq + 1
        self._drift: int = 0  # bytes that rounding has added to the window since it last grew for good reason
        self._last_ack_sent: int = segment.seq + 1
        self._queue: ReceiveQueue = ReceiveQueue()
        self.readable_bytes: int = 0
        self._out_of_order: OutOfOrder | None = None
        self._fin_position: int = -1  # of the app's FIN, once seen, perhaps before the bytes that precede it
        self._fin_known: bool = False
        self.peer_closed: bool = False
        self.app_finished: bool = False
        self.bytes_from_app: int = 0
        self._ack_owed: int = 0  # 0: nothing, 1: may wait, 2: now
        self._dup_acks_owed: int = 0  # more ACKs of the same number, for peers without SACK
        self._ack_at: float = INFINITE
        self._dsack: tuple[int, int] | None = None
        self._challenged_at: float = -INFINITE
        self._heard_at: float = now
        self._data_at: float = now
        self._answered: bool = True
        self._interactive: int = 0
        self.predict: int = 0  # what handle_predicted may take: 0 nothing, 1 ACKs, 2 data as well

        # Sending.
        self.iss: int = initial_sequence
        self.snd_una: int = initial_sequence
        self.snd_nxt: int = initial_sequence
        self.snd_edge: int = initial_sequence
        self._snd_wnd_max: int = 0
        self._snd_wl1: int = segment.seq
        self._snd_wl2: int = initial_sequence
        self._send: SendQueue = SendQueue(initial_sequence + 1)
        self._fin_wanted: bool = False
        self._fin_sent: bool = False
        self._released: bool = False
        self._syn_ack_owed: bool = False
        self._reset_owed: bool = False
        self._probe_owed: bool = False
        self._force_small: bool = False  # the persist timer has spoken: send what the small window takes
        self._last_byte: int = -1
        self._mss: int = self.peer_mss
        self._max_payload: int = self.peer_mss
        self.bytes_to_app: int = 0

        # Loss and congestion.
        self._cwnd: int = FIRST_CWND
        self._ssthresh: int = 1 << 30
        self._cwnd_limited: bool = False
        self._dup_acks: int = 0
        self._scoreboard: Scoreboard | None = None
        self._recovery: int = NO_RECOVERY
        self._recovery_point: int = initial_sequence
        self._retransmit_from: int = initial_sequence  # what lies before it was resent in this recovery
        self._retransmit_now: bool = False  # the first resent segment is not asked for room in the window

        # Timers.
        self.armed: float = INFINITE  # the earliest deadline of ours in the host's heap
        self._rto_at: float = INFINITE  # retransmission, persist or SYN_PENDING's silence: never two of them
        self._rto: float = FIRST_RTO_S
        self._srtt: float = -1.0
        self._rttvar: float = 0.0
        self._backoff: int = 0
        self._timed_position: int = -1
        self._timed_at: float = 0.0
        self._progress_at: float = now
        self._keep_at: float = INFINITE
        self._keep_probes: int = 0
        self._fin_wait_at: float = INFINITE  # the end of FIN-WAIT-2

        # Accounting, the stack's.
        self.charged: int = 0
        self.mark_at: float = now
        self.mark_bytes: int = 0

        # Built when the request is accepted.
        self._header: bytearray = bytearray()
        self._header_length: int = 0
        self._ip_sum: int = 0
        self._pseudo_sum: int = 0

        self._set_rto_at(now + SYN_SILENCE_S)

    # -- look ---------------------------------------------------------------------------------------------------------

    def readable_views(self) -> Sequence[memoryview]:
        """The in-order bytes that wait, oldest first.

        The list is ours and changes with the next call into the flow; each view in it stays valid as long as held.
        """
        return self._queue.views

    @property
    def send_space(self) -> int:
        """How many bytes `write` would take now."""
        if self.closed or self._fin_wanted or self.state == SYN_PENDING:
            return 0
        return self._space()

    @property
    def all_acknowledged(self) -> bool:
        """Has the app acknowledged everything written, and our FIN if there is one?"""
        return self.snd_una > self.iss and self.snd_una >= self._send.end + (1 if self._fin_wanted else 0)

    @property
    def unacknowledged_bytes(self) -> int:
        """Bytes written and not yet acknowledged."""
        return self._send.end - max(self.snd_una, self.iss + 1)

    @property
    def held_bytes(self) -> int:
        """Memory that this flow's payloads take, for the budget."""
        send = self._send
        held = self.readable_bytes + send.end - send.start
        if self._out_of_order is not None:
            held += self._out_of_order.charge
        return held

    @property
    def round_trip_s(self) -> float:
        """The smoothed round trip time, seconds; negative before the first measurement."""
        return self._srtt

    # -- command ------------------------------------------------------------------------------------------------------

    def accept(self, now: float) -> None:
        """Take the request: owes the SYN-ACK. Only in SYN_PENDING."""
        self._move(states.ACCEPT)
        host = self._host
        own = host.mtu - self._ip_length - 20
        self._header_length = self._ip_length + (32 if self.ts_on else 20)
        # The peer's MSS does not count options (RFC 6691), so they come off.
        self._mss = max(min(self.peer_mss, own) - (12 if self.ts_on else 0), 1)
        if host.offload:
            self._max_payload = max((65535 - self._header_length) // self._mss, 1) * self._mss
        else:
            self._max_payload = self._mss
        self._build_template()
        self._syn_ack_owed = True
        self._backoff = 0
        self.accepted_at = now
        self._timed_position = self.iss + 1
        self._timed_at = now
        self._set_rto_at(now + FIRST_RTO_S)
        self.touch()

    def cancel(self) -> None:
        """The app gave up before the request was decided. Only in SYN_PENDING."""
        self._end(states.CANCEL, "cancelled")

    def put_off(self) -> None:
        """Let go of the request without an answer, for the time being. Only in SYN_PENDING."""
        self._end(states.CANCEL, "put off")

    def refuse(self) -> None:
        """Decline the request; the stack answers. Only in SYN_PENDING."""
        self._end(states.REFUSE, "refused")

    def consume(self, count: int, now: float) -> None:  # noqa: ARG002 - commands have one shape
        """Take the first `count` readable bytes away. The window may open: flush the flow afterwards.

        Args:
            count: at most `readable_bytes`.
        """
        if count <= 0:
            return
        queue = self._queue
        queue.consume(count)
        self.readable_bytes = queue.size
        if self.peer_closed:
            self.app_finished = queue.size == 0
        elif self._ack_owed == 0 and self._update_due():
            self._ack_owed = 2

    def write(self, view: memoryview | bytes, now: float) -> int:  # noqa: ARG002 - commands have one shape
        """Queue bytes for the app; flush the flow afterwards.

        Large pieces are kept by reference until they are acknowledged: the bytes must not change after this call.

        Returns: how many bytes were taken, from the front; 0 when the buffer is full or the flow has ended.
        """
        if self.closed or self._fin_wanted or self.state == SYN_PENDING:
            return 0
        space = self._space()
        length = len(view)
        if space <= 0 or length == 0:
            return 0
        if type(view) is not memoryview:
            view = memoryview(view)
        if length > space:
            length = space
            view = view[:space]
        self._send.append(view)
        return length

    def finish(self, now: float) -> None:  # noqa: ARG002 - commands have one shape
        """End our direction: FIN after everything written. Idempotent; flush the flow afterwards."""
        if self.closed or self._fin_wanted:
            return
        self._fin_wanted = True
        if self.state == ESTABLISHED or self.state == CLOSE_WAIT:
            self._move(states.SEND_FIN)
        self.touch()

    def release(self, now: float) -> None:
        """The owner takes and gives no more: what is written still goes out, then FIN.

        Bytes that wait unread, or come later, are bytes that nobody will read: they are answered by RST, so that the
        app does not take silence for delivery (RFC 1122 4.2.2.13, RFC 2525 2.17). In FIN-WAIT-2 the app gets 60 s for
        its own end. Idempotent; flush the flow afterwards.
        """
        if self._released:
            return
        self._released = True
        self.predict = 0
        if self.closed:
            return
        if self.readable_bytes:
            self._abort("unread")
            return
        self.finish(now)
        if self.state == FIN_WAIT_2:
            self._fin_wait_at = now + FIN_WAIT_2_S
            self.arm(self._fin_wait_at)

    def abort(self, now: float) -> None:  # noqa: ARG002 - commands have one shape
        """End both directions with RST; flush the flow afterwards. Idempotent."""
        self._abort("aborted")

    def evict(self) -> None:
        """End the flow with RST because its memory or its place is needed."""
        self._abort("evicted")

    # -- input --------------------------------------------------------------------------------------------------------

    def handle_predicted(
        self, packet: bytes, start: int, end: int, seq: int, ack: int, window: int, ts_value: int, now: float
    ) -> bool:
        """Take the segment that was to be expected: the next bytes, or an ACK that advances, or both.

        The caller has seen that only ACK (and PSH) are set, that the options are none, or the timestamp alone where
        it is in use, and that `predict` is not 0. Numbers are as on the wire, the payload is `packet[start:end]`.

        Returns: False when it was not; then nothing has changed and `handle_segment` decides.
        """
        position = self.rcv_nxt
        una = self.snd_una
        advance = (ack - una) & MASK
        if seq != position & MASK or advance > self.snd_nxt - una or position < self._snd_wl1:
            return False
        length = end - start
        if length:
            if self.predict < 2 or position + length > self.rcv_edge:
                return False
        elif not advance:
            return False
        window <<= self._send_shift
        if window < self._mss:
            return False
        if self.ts_on:
            if (ts_value - self.ts_recent) & MASK >= HALF:
                return False
            if position == self._last_ack_sent:
                self.ts_recent = ts_value
                self._ts_recent_at = now
        self._heard_at = now
        una += advance
        self.snd_edge = una + window
        self._snd_wl1 = position
        self._snd_wl2 = una
        if window > self._snd_wnd_max:
            self._snd_wnd_max = window
        if advance:
            self._advance(una, advance, now)
        if length:
            queue = self._queue
            if length >= SMALL or queue.views:
                queue.append(packet, start, end)
            else:
                queue.views.append(memoryview(packet[start:end]))
                queue.size = length
            self.readable_bytes = queue.size
            self.rcv_nxt = position + length
            self.bytes_from_app += length
            self._data_at = now
            self._answered = False
            if self._ack_owed == 0:
                self._ack_owed = 1
        if not self.touched:
            self.touched = True
            self._host.touched.append(self)
        return True

    def handle_segment(self, segment: Segment, packet: bytes, now: float) -> bool:
        """Take any segment, in the order of RFC 9293 3.10.7.4 with RFC 5961 and 7323.

        Returns: True when the stack shall answer with the RST for a connection that does not exist.
        """
        host = self._host
        flags = segment.flags
        if self.state == SYN_PENDING:
            return self._while_pending(segment, now)
        distance = (segment.seq - self.rcv_nxt) & MASK
        seq = self.rcv_nxt + (distance - MODULUS if distance >= HALF else distance)
        length = segment.data_end - segment.data_start

        if flags & RST:
            self._on_reset(seq, now)
            return False
        if flags & SYN:
            if self.state == SYN_RECEIVED and seq == self.irs and not flags & ACK:
                # The app did not get our SYN-ACK. Resend it, but do not become its amplifier.
                host.drop("duplicate_syn")
                if self._may_challenge(now):
                    self._syn_ack_owed = True
                    self.touch()
            else:
                host.drop("syn_in_connection")
                self._challenge(now)
            return False
        if not flags & ACK:
            host.drop("no_ack")  # without it nothing can be taken, so nothing needs an answer
            return False
        if (
            self.ts_on
            and segment.has_timestamp
            and (segment.ts_value - self.ts_recent) & MASK >= HALF
            and now - self._ts_recent_at < PAWS_IDLE_S
        ):
            host.drop("paws")
            self._answer_unacceptable(length + (flags & FIN), now)
            return False
        if not self._acceptable(seq, length, flags):
            host.drop("unacceptable")
            if length and self._sack_on and seq < self.rcv_nxt:
                self._dsack = (seq, min(seq + length, self.rcv_nxt))
            if seq == self.rcv_nxt - 1 and length <= 1 and self.rcv_edge - self.rcv_nxt < self._mss:
                # A probe of the window we closed waits for exactly this answer. No kernel probes faster than this; a
                # loop of two sides that find each other's ACKs wrong does.
                if length or now - self._challenged_at >= PROBE_ANSWER_INTERVAL_S:
                    self._challenged_at = now
                    self._owe_ack_now()
            else:
                self._answer_unacceptable(length + (flags & FIN), now)
            return False
        # RFC 9293 3.10.7.4, fifth: the ACK.
        distance = (segment.ack - self.snd_una) & MASK
        ack = self.snd_una + (distance - MODULUS if distance >= HALF else distance)
        if self.state == SYN_RECEIVED:
            if not self.snd_una < ack <= self.snd_nxt:
                host.drop("bad_ack_of_syn")
                return True
            self._establish(segment, seq, ack, now)
        elif ack > self.snd_nxt:
            host.drop("ack_of_unsent")
            self._answer_unacceptable(length, now)
            return False
        elif ack < self.snd_una - max(self._snd_wnd_max, 1):
            host.drop("ack_too_old")
            self._challenge(now)
            return False
        self._heard_at = now
        self._keep_probes = 0
        if self.ts_on and segment.has_timestamp and seq <= self._last_ack_sent:
            self.ts_recent = segment.ts_value  # RFC 7323 4.3; PAWS has seen that it is not older
            self._ts_recent_at = now
        if ack >= self.snd_una:
            self._on_ack(segment, seq, ack, length, now)
            if self.closed:
                return False
        if length or flags & FIN:
            self._on_data(segment, packet, seq, now)
        self.touch()
        return False

    def handle_timeout(self, now: float) -> None:
        """A deadline has come, or may have: do what is due and arm the next one."""
        if self.closed:
            return
        if now >= self._ack_at:
            self._ack_at = INFINITE
            self._interactive = 0  # the answer did not come: waiting for it was wrong
            if self._ack_owed:
                self._ack_owed = 2
                self.touch()
        if now >= self._rto_at:
            self._rto_at = INFINITE
            self._on_retransmission_timeout(now)
        if now >= self._fin_wait_at:
            self._end(states.TIMEOUT, "")
        if now >= self._keep_at:
            self._on_keepalive(now)
        # A flow that has just ended has no deadlines left.
        self.arm(min(self._rto_at, self._ack_at, self._fin_wait_at, self._keep_at))

    def handle_quoted(self, seq: int, mtu: int) -> bool:
        """An ICMP error "fragmentation needed" quotes a segment of ours (RFC 5927 4.1, RFC 1191).

        Returns: was it about bytes in flight, and believed?
        """
        distance = (seq - self.snd_una) & MASK
        if self.state < ESTABLISHED or self.closed or distance >= self.snd_nxt - self.snd_una:
            return False
        # RFC 1191 lets a path shrink to 68; what claims less than 536 is more likely an attack (RFC 5927 7). No link
        # of IPv6 is below 1280 (RFC 8200 5).
        least = 536 if self._ip_length == 20 else 1280
        mss = max(mtu, least) - self._ip_length - 20 - (12 if self.ts_on else 0)
        if mss >= self._mss:
            return False
        self._mss = mss
        if self._host.offload:
            self._max_payload = max((65535 - self._header_length) // mss, 1) * mss
        else:
            self._max_payload = mss
        return True

    # -- output -------------------------------------------------------------------------------------------------------

    def transmit(self, write: Write, now: float) -> bool:
        """Build and hand over what is owed, in this order: RST, SYN-ACK, SACK, resent bytes, new bytes and FIN, ACK.

        `write` gets a header that is rewritten for the next segment, so it must be done with it when it returns.

        Returns: False when the device is full, or when it is another flow's turn; nothing is lost, ask again later.
        """
        if self._reset_owed:
            return self._transmit_reset(write)
        if self.closed:
            if self._ack_owed and self.state == TIME_WAIT:
                return self._emit(write, self.snd_nxt, 0, NO_VIEWS, ACK, now)
            return True
        if self.state == SYN_RECEIVED:
            return self._transmit_opening(write, now)
        if self.state == SYN_PENDING:
            return True
        if (
            self._ack_owed
            and (self._dsack is not None or self._out_of_order is not None)
            and not self._transmit_sack(write, now)
        ):
            return False
        if self._recovery and not self._retransmit(write, now):
            return False
        if (self.snd_nxt < self._send.end or (self._fin_wanted and not self._fin_sent)) and not self._transmit_new(
            write, now
        ):
            return False
        if self._probe_owed and not self._transmit_probe(write, now):
            return False
        if self._ack_owed:
            if self._ack_owed == 1 and self._ack_may_wait(now):
                return True
            if not self._emit(write, self._ack_sequence(), 0, NO_VIEWS, ACK, now):
                return False
        return True

    def _transmit_new(self, write: Write, now: float) -> bool:
        """Send new bytes as far as both windows allow, and the FIN after the last one."""
        send = self._send
        end = send.end
        mss = self._mss
        position = self.snd_nxt
        edge = self.snd_edge
        segments = MAX_SEGMENTS
        room = self.snd_una + self._cwnd if self._recovery == NO_RECOVERY else position + self._cwnd - self._in_flight()
        fresh = self.snd_una == position
        limited = False
        if room < edge:
            edge = room
            limited = True
        while position < end:
            count = edge - position
            if count <= 0:
                break
            if count >= end - position:
                count = end - position
            elif count < mss and count * 2 < self._snd_wnd_max and not self._force_small:
                break  # RFC 9293 3.8.6.2.1: no silly segments; an ACK or the persist timer will come
            if not segments:
                return False
            segments -= 1
            if count > self._max_payload:
                count = self._max_payload
            elif count > mss and position + count < end:
                count -= count % mss
            flags = ACK
            if position + count == end:
                flags = ACK | PSH
                if self._fin_wanted:
                    flags = ACK | PSH | FIN
            if not self._emit(write, position, count, send.gather(position, count), flags, now):
                return False
            position += count
            self.snd_nxt = position
            if flags & FIN:
                self.snd_nxt += 1
                self._fin_sent = True
            self._sent(position, fresh, now)
            fresh = False
        if position >= end:
            self._cwnd_limited = False
            if self._fin_wanted and not self._fin_sent:
                # A FIN needs no window: a peer with a closed one shall learn that nothing more will come.
                if not self._emit(write, end, 0, NO_VIEWS, ACK | FIN, now):
                    return False
                self.snd_nxt = end + 1
                self._fin_sent = True
                self._sent(end + 1, fresh, now)
            return True
        self._cwnd_limited = limited
        if self.snd_una == self.snd_nxt and self._rto_at == INFINITE:
            # Bytes wait, none are on the way, the window is too small: only probes keep this alive.
            self._backoff = 0
            self._progress_at = now
            self._set_rto_at(now + max(self._rto, MIN_RTO_S))
        return True

    def _sent(self, position: int, fresh: bool, now: float) -> None:
        """Note that new bytes up to `position` are on the way: timers, measurement, the habit of answering.

        Args:
            fresh: nothing was on the way before, so a timer that runs is the persist timer.
        """
        if fresh and self._rto_at != INFINITE:
            self._backoff = 0  # what had grown was the patience with a closed window
        if fresh or self._rto_at == INFINITE:
            self._progress_at = now
            self._set_rto_at(now + (self._timeout() if self._backoff else self._rto))
        self._force_small = False
        self._probe_owed = False
        if self._timed_position < 0:
            self._timed_position = position
            self._timed_at = now
        if not self._answered:
            self._answered = True
            if now - self._data_at < self._host.ack_delay and self._interactive < INTERACTIVE:
                self._interactive += 1

    def _emit(
        self, write: Write, position: int, count: int, views: Sequence[memoryview], flags: int, now: float
    ) -> bool:
        """Hand one segment to the device; what it says about ACK and window counts as said only when it was taken."""
        header = self._header
        rcv_nxt = self.rcv_nxt
        window = self._window()
        length = self._header_length
        total = length + count
        if length < 60:
            check = self._ip_sum + total
            check = (check & 0xFFFF) + (check >> 16)
            _IP_PATCH.pack_into(header, 2, total, _DF, _TTL_TCP, ~check & 0xFFFF)
            patch = 24
        else:
            _SHORT.pack_into(header, 4, total - 40)
            patch = 44
        pseudo = self._pseudo_sum + total
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        if self.ts_on:
            _TCP_TS_PATCH.pack_into(
                header,
                patch,
                position & MASK,
                rcv_nxt & MASK,
                0x8000 | flags,
                window,
                pseudo,
                0,
                TIMESTAMP_LAYOUT,
                (int(now * 1000.0) + self.ts_offset) & MASK,
                self.ts_recent,
            )
        else:
            _TCP_PATCH.pack_into(header, patch, position & MASK, rcv_nxt & MASK, 0x5000 | flags, window, pseudo, 0)
        if not write(header, views, self._mss if count > self._mss else 0):
            return False
        self._said_ack(window)
        return True

    def _said_ack(self, window: int) -> None:
        """The peer has been told `rcv_nxt` and `window`."""
        edge = self.rcv_nxt + (window << self._receive_shift)
        gain = edge - self.rcv_edge
        if gain > 0:
            self._drift = self._drift + gain if gain < 1 << self._receive_shift else 0
            self.rcv_edge = edge
        self._last_ack_sent = self.rcv_nxt
        self._ack_owed = 0
        self._ack_at = INFINITE

    def _window(self) -> int:
        """The window field: what the buffer can take, never less than promised, in units of the scale.

        RFC 9293 3.8.6.2.2: the edge moves only by a useful step. RFC 7323 2.4: since `rcv_nxt` moves by single bytes
        and the field by 256, a promise can be kept exactly only by rounding up. That gives away a little each time, so
        it ends where WINDOW_SLACK is given away; then the field is rounded down, and what was promised is accepted
        still.
        """
        cap = self._host.budget.receive_cap
        free = cap - self.readable_bytes
        shift = self._receive_shift
        promised = self.rcv_edge - self.rcv_nxt
        step = self._mss
        if step > cap >> 1:
            step = cap >> 1
        if free >= promised + step and free - promised >= 1 << shift:
            window = free >> shift
        elif promised <= 0:
            return 0
        else:
            window = promised >> shift
            if self._drift < WINDOW_SLACK:
                window = (promised + (1 << shift) - 1) >> shift
        return window if window < 65536 else 65535

    def _update_due(self) -> bool:
        """Is the window so much larger than the app knows that it must be told unasked?

        RFC 9293 3.8.6.2.2 and Linux: when it has at least doubled, and grown by two segments or half the buffer. An app
        whose window is large enough learns it with the next ACK.
        """
        cap = self._host.budget.receive_cap
        free = cap - self.readable_bytes
        promised = self.rcv_edge - self.rcv_nxt
        gain = free - promised
        return free >= 2 * promised and (gain >= 2 * self._mss or gain >= cap >> 1)

    def _ack_may_wait(self, now: float) -> bool:
        """Shall the ACK wait for the answer? Only in a conversation, for less than two segments, with a window open."""
        if self._interactive < INTERACTIVE or self.rcv_nxt - self._last_ack_sent >= 2 * self._mss:
            return False
        if self._update_due():
            return False
        if self._ack_at == INFINITE:
            self._ack_at = now + self._host.ack_delay
            self.arm(self._ack_at)
        return True

    def _ack_sequence(self) -> int:
        """The number of a segment without data: `snd_nxt`, unless the peer took its window back (so does Linux)."""
        if self.snd_nxt <= self.snd_edge or self._fin_sent:
            return self.snd_nxt
        return max(self.snd_edge, self.snd_una)

    def _transmit_sack(self, write: Write, now: float) -> bool:
        """ACKs that say what is here beyond the gap (RFC 2018 4), and what came twice (RFC 2883 4)."""
        if not self._sack_on:
            self._dsack = None
            while self._dup_acks_owed > 1:
                # Without SACK the sender counts duplicates (RFC 5681 3.2), so a batch must not swallow them.
                if not self._emit(write, self._ack_sequence(), 0, NO_VIEWS, ACK, now):
                    return False
                self._dup_acks_owed -= 1
                self._ack_owed = 2
            self._dup_acks_owed = 0
            return True
        blocks: list[tuple[int, int]] = []
        room = 3 if self.ts_on else 4
        if self._dsack is not None:
            blocks.append(self._dsack)
        waiting = self._out_of_order
        if waiting is not None:
            blocks += waiting.blocks(room - len(blocks))
            # A batch may have brought more ranges than one ACK can name, and what is not named is sent again. In order,
            # as if each segment had had its own ACK: a range named late looks to Linux like one that came late.
            others = [block for block in waiting.untold_blocks() if block not in blocks]
            for index in range(0, len(others), room):
                if not self._emit_sack(write, others[index : index + room], now):
                    return False
        if not blocks:
            return True
        if not self._emit_sack(write, blocks, now):
            return False
        self._dsack = None
        self._dup_acks_owed = 0
        if waiting is not None:
            waiting.untold.clear()
        return True

    def _emit_sack(self, write: Write, blocks: Sequence[tuple[int, int]], now: float) -> bool:
        sacks = [(left & MASK, right & MASK) for left, right in blocks]
        window = self._window()
        packet = self._packet(self._ack_sequence(), self.rcv_nxt, ACK, window, self._options(now, sacks))
        if not write(packet, NO_VIEWS, 0):
            return False
        self._said_ack(window)
        return True

    def _transmit_opening(self, write: Write, now: float) -> bool:
        if self._syn_ack_owed:
            # Never scaled in a SYN (RFC 7323 2.2), and never less than in the one before.
            window = min(max(self._host.budget.receive_cap, self.rcv_edge - self.rcv_nxt), 65535)
            own = min(self._host.mtu - self._ip_length - 20, MAX_MSS)
            extra = options(
                mss=own,
                window_scale=WINDOW_SCALE if self._receive_shift else -1,
                sack_permitted=self._sack_on,
                timestamp=(self._timestamp(now), self.ts_recent) if self.ts_on else None,
            )
            if not write(self._packet(self.iss, self.rcv_nxt, SYN | ACK, window, extra), NO_VIEWS, 0):
                return False
            self._syn_ack_owed = False
            self.snd_nxt = self.snd_edge = self.iss + 1
            self.rcv_edge = max(self.rcv_edge, self.rcv_nxt + window)
            self._last_ack_sent = self.rcv_nxt
        if self._ack_owed:
            window = min((self.rcv_edge - self.rcv_nxt) >> self._receive_shift, 65535)
            if not write(self._packet(self.iss + 1, self.rcv_nxt, ACK, window, self._options(now, ())), NO_VIEWS, 0):
                return False
            self._ack_owed = 0
        return True

    def _transmit_reset(self, write: Write) -> bool:
        """RST at the number the app expects next, as far as we know it; Linux believes no other."""
        packet = self._packet(self._ack_sequence(), self.rcv_nxt, RST | ACK, 0, b"")
        if not write(packet, NO_VIEWS, 0):
            return False
        self._reset_owed = False
        return True

    def _transmit_probe(self, write: Write, now: float) -> bool:
        """Ask a silent peer for a sign: a byte that it has (zero window), or an empty segment before it (keepalive).

        Linux and gVisor probe so; the answer is an ACK with the window of now. A byte is better, since Linux limits
        answers to empty segments; so the last acknowledged one is kept while the window is small.
        """
        position = self.snd_una - 1
        last = self._send.byte_before(self.snd_una)
        if last < 0:
            last = self._last_byte
        if last >= 0 and self.snd_nxt < self._send.end:
            done = self._emit(write, position, 1, [memoryview(bytes((last,)))], ACK, now)
        else:
            done = self._emit(write, position, 0, NO_VIEWS, ACK, now)
        if done:
            self._probe_owed = False
            self._host.probes += 1
        return done

    def _retransmit(self, write: Write, now: float) -> bool:
        """Resend what counts as lost, as far as the congestion window allows: in order, SACKed bytes never."""
        send = self._send
        segments = MAX_SEGMENTS
        while self._recovery:
            start, end = self._next_hole()
            if start >= end:
                return True
            if not segments:
                return False
            segments -= 1
            room = self._cwnd - self._in_flight()
            count = min(end - start, self._max_payload)
            if self._retransmit_now:
                count = min(count, max(room - room % self._mss, self._mss))
            elif room < min(count, self._mss):
                return True
            elif count > room:
                count = room - room % self._mss if room > self._mss else room
            if start + count > self.snd_edge and start < send.end:
                # The peer took its window back (RFC 9293 MUST-34): what lies beyond waits, a little must go out.
                count = self.snd_edge - start
                if count <= 0:
                    return True
            data = min(count, send.end - start)
            flags = ACK
            views: Sequence[memoryview] = NO_VIEWS
            if data > 0:
                views = send.gather(start, data)
                if start + data == send.end:
                    flags = ACK | PSH
            else:
                data = 0
            if self._fin_sent and start + data == send.end:
                flags |= FIN
            if not self._emit(write, start, data, views, flags, now):
                return False
            self._host.retransmits += 1
            self._retransmit_now = False
            self._retransmit_from = start + data + (1 if flags & FIN else 0)
            self._timed_position = -1  # Karn: nothing resent is measured
            if self._rto_at == INFINITE:
                self._set_rto_at(now + self._timeout())
        return True

    def _next_hole(self) -> tuple[int, int]:
        """What is to be resent next in this recovery, [start, end); empty when nothing is."""
        start = max(self.snd_una, self._retransmit_from)
        board = self._scoreboard
        if self._recovery == LOSS_RECOVERY:
            limit = self._recovery_point
        else:
            limit = self.snd_una + self._mss  # the first missing segment counts as lost in any case
            if board is not None and board.highest() > limit:
                limit = board.highest()
            if limit > self._recovery_point:
                limit = self._recovery_point
        if board is not None:
            return board.gap(start, limit)
        return start, max(start, limit)

    def _in_flight(self) -> int:
        """The `pipe` of RFC 6675: bytes that are thought to be on the way, during a recovery."""
        una = self.snd_una
        board = self._scoreboard
        resent = max(self._retransmit_from - una, 0)
        if self._recovery == LOSS_RECOVERY:
            lost_end = max(self._recovery_point, una)
            held = board.held(una, una + resent) if board is not None else 0
            return min(resent, lost_end - una) - held + self.snd_nxt - lost_end
        if board is not None and board.rights:
            highest = board.highest()
            held = board.held(una, una + resent)
            return min(resent, highest - una) - min(held, highest - una) + self.snd_nxt - highest
        return max(self.snd_nxt - una - self._dup_acks * self._mss, 0)

    # -- receiving ----------------------------------------------------------------------------------------------------

    def _while_pending(self, segment: Segment, now: float) -> bool:
        """Segments before we have answered: only SYN and RST mean something (the stack handles a new number)."""
        flags = segment.flags
        distance = (segment.seq - self.irs) & MASK
        if flags & RST:
            if distance <= 1:
                self.cancel()
            else:
                self._host.drop("bad_reset")
            return False
        if flags & SYN and not flags & (ACK | FIN) and distance == 0:
            self._host.drop("duplicate_syn")
            self._syn_gap = now - self._syn_at
            self._syn_at = now
            self.came_again = self.came_again or self._syn_gap >= SYN_AGAIN_S
            self._set_rto_at(now + max(SYN_SILENCE_S, SYN_SILENCE_GAPS * self._syn_gap))
            return False
        self._host.drop("before_accept")
        return flags & ACK != 0

    def _on_reset(self, seq: int, now: float) -> None:
        """RFC 5961 3.2: exactly the next number resets, elsewhere in the window asks, outside is nobody."""
        if seq == self.rcv_nxt:
            self._end(states.RECEIVE_RST, "reset")
        elif self.rcv_nxt < seq < self.rcv_edge:
            self._host.drop("reset_in_window")
            self._challenge(now)
        else:
            self._host.drop("bad_reset")

    def _acceptable(self, seq: int, length: int, flags: int) -> bool:
        """The four cases of RFC 9293 3.10.7.4, with the window as promised.

        Two liberties, as in Linux: an empty segment exactly at the right edge is fine (an app that has filled our
        window sends its ACKs from there); and what starts at `rcv_nxt` is looked at though the window is closed: its
        ACK counts, its data is cut off, and a bare FIN is taken, or it would be resent for ever.
        """
        end = seq + length
        if flags & FIN:
            end += 1
        if end == seq:
            return self.rcv_nxt <= seq <= self.rcv_edge
        if seq == self.rcv_nxt:
            return True
        return seq < self.rcv_edge and end > self.rcv_nxt

    def _establish(self, segment: Segment, seq: int, ack: int, now: float) -> None:
        """The ACK of our SYN-ACK; it may carry data and FIN, which go on as in any segment."""
        self._move(states.RECEIVE_ACK_OF_SYN)
        self.snd_una = ack
        window = segment.window << self._send_shift
        self.snd_edge = ack + window
        self._snd_wnd_max = window
        self._snd_wl1 = seq
        self._snd_wl2 = ack
        self._syn_ack_owed = False
        self._rto_at = INFINITE
        if self._backoff == 0 and self._timed_position >= 0:
            self._measure(now - self._timed_at)
        else:
            self._rto = FIRST_RTO_S
        self._backoff = 0
        self._timed_position = -1
        self._keep_at = now + self._host.keepalive_idle
        self.arm(self._keep_at)
        if self._fin_wanted:
            self._move(states.SEND_FIN)

    def _on_ack(self, segment: Segment, seq: int, ack: int, length: int, now: float) -> None:
        """An ACK at or after `snd_una`: window, SACK, progress, duplicates."""
        window = segment.window << self._send_shift
        edge = ack + window
        same_window = edge == self.snd_edge
        if self._snd_wl1 < seq or (self._snd_wl1 == seq and self._snd_wl2 <= ack):
            # RFC 9293 3.10.7.4. The edge may move left (RFC 9293 MUST-34): new bytes then wait.
            if window < self._mss:
                byte = self._send.byte_before(ack)
                if byte >= 0:
                    self._last_byte = byte
            if edge > self.snd_edge and self._rto_at != INFINITE:
                if self.snd_una == self.snd_nxt:
                    self._rto_at = INFINITE  # the persist timer: the window was what we waited for
                    self._backoff = 0
                elif self.snd_edge <= self.snd_una:
                    self._backoff = 0  # it had taken its window back; what was on the way may have been thrown away
                    self._set_rto_at(now + self._rto)
            self.snd_edge = edge
            self._snd_wl1 = seq
            self._snd_wl2 = ack
            if window > self._snd_wnd_max:
                self._snd_wnd_max = window
        news = self._sack_on and segment.sack_count > 0 and self._note_sacks(segment)
        if ack > self.snd_una:
            self._advance(ack, ack - self.snd_una, now)
        elif self.snd_una < self.snd_nxt and length == 0 and not segment.flags & FIN and (same_window or news):
            # RFC 5681 2: a duplicate is an ACK that says nothing new about number or window. Keepalives and probes
            # never get here: they are not acceptable.
            self._dup_acks += 1
            if self._recovery == NO_RECOVERY and ack >= self._recovery_point:
                board = self._scoreboard
                if self._dup_acks >= DUP_ACKS or (
                    board is not None and board.held(ack, self.snd_nxt) >= DUP_ACKS * self._mss
                ):
                    self._start_recovery(FAST_RECOVERY)

    def _advance(self, ack: int, acked: int, now: float) -> None:
        """New bytes are acknowledged: release them, measure, grow the window, restart the timer."""
        self.snd_una = ack
        send = self._send
        send.release(ack)
        self.bytes_to_app += acked
        self._progress_at = now
        if 0 <= self._timed_position <= ack:
            # One segment per round trip is timed, and nothing that was resent (Karn). Timestamps could measure that
            # too, but when the ACK of an ACK gets lost their echo is as old as the timeout, which then feeds on itself.
            self._measure(now - self._timed_at)
            self._timed_position = -1
            self._backoff = 0
        elif self._backoff > KEPT_BACKOFF:
            self._backoff = KEPT_BACKOFF
        if self._recovery:
            self._recover(ack, acked)
        else:
            self._dup_acks = 0
            if self._scoreboard is not None:
                self._scoreboard.advance(ack)
            if self._cwnd_limited:
                self._grow(acked)
        if ack == self.snd_nxt:
            self._rto_at = INFINITE
        else:
            self._set_rto_at(now + (self._timeout() if self._backoff else self._rto))
        if self._fin_sent and ack > send.end:
            self.bytes_to_app -= 1
            self._on_ack_of_fin(now)

    def _on_ack_of_fin(self, now: float) -> None:
        if self.state == FIN_WAIT_1:
            self._move(states.RECEIVE_ACK_OF_FIN)
            if self._released:
                self._fin_wait_at = now + FIN_WAIT_2_S
                self.arm(self._fin_wait_at)
        elif self.state == CLOSING:
            self._move(states.RECEIVE_ACK_OF_FIN)
            self._finish_time_wait()
        elif self.state == LAST_ACK:
            self._end(states.RECEIVE_ACK_OF_FIN, "")

    def _grow(self, acked: int) -> None:
        """RFC 5681 3.1, counted in bytes (RFC 3465), so that splitting ACKs gains nothing."""
        if self._cwnd < self._ssthresh:
            self._cwnd += acked
        else:
            self._cwnd += self._mss * acked // self._cwnd

    def _note_sacks(self, segment: Segment) -> bool:
        """Believe the blocks that lie in what is on the way; say whether one was new."""
        news = False
        una = self.snd_una
        nxt = self.snd_nxt
        for index in range(segment.sack_count):
            distance = (segment.sacks[2 * index] - una) & MASK
            left = una + (distance - MODULUS if distance >= HALF else distance)
            right = left + ((segment.sacks[2 * index + 1] - segment.sacks[2 * index]) & MASK)
            if una < left < right <= nxt:
                if self._scoreboard is None:
                    self._scoreboard = Scoreboard()
                if self._scoreboard.add(left, right):
                    news = True
        return news

    def _start_recovery(self, kind: int) -> None:
        mss = self._mss
        if kind == FAST_RECOVERY or self._recovery != LOSS_RECOVERY:
            self._ssthresh = max((self.snd_nxt - self.snd_una) // 2, 2 * mss)
        self._cwnd = self._ssthresh if kind == FAST_RECOVERY else mss
        self._recovery = kind
        self._recovery_point = self.snd_nxt
        self._retransmit_from = self.snd_una
        self._retransmit_now = True
        self._dup_acks = self._dup_acks if kind == FAST_RECOVERY else 0
        if kind == LOSS_RECOVERY:
            self._scoreboard = None
        self._predict()
        self.touch()

    def _recover(self, ack: int, acked: int) -> None:
        """Progress during a recovery: it ends when all that was on the way at its start is acknowledged (RFC 6582)."""
        if ack >= self._recovery_point:
            if self._recovery == FAST_RECOVERY:
                self._cwnd = self._ssthresh
            self._recovery = NO_RECOVERY
            self._dup_acks = 0
            self._scoreboard = None
            self._predict()
            return
        if self._scoreboard is not None:
            self._scoreboard.advance(ack)
        if self._recovery == LOSS_RECOVERY:
            self._grow(acked)
        elif self._scoreboard is None:
            # NewReno's partial ACK: the next segment is missing too.
            self._dup_acks = max(self._dup_acks - acked // self._mss, 0)
            self._retransmit_from = ack
            self._retransmit_now = True

    def _measure(self, sample: float) -> None:
        """RFC 6298 2."""
        if sample < 0.0:
            return
        if self._srtt < 0.0:
            self._srtt = sample
            self._rttvar = sample / 2.0
        else:
            error = sample - self._srtt
            self._srtt += error / 8.0
            self._rttvar += ((error if error >= 0.0 else -error) - self._rttvar) / 4.0
        self._rto = min(max(self._srtt + 4.0 * self._rttvar, MIN_RTO_S), MAX_RTO_S)

    def _on_data(self, segment: Segment, packet: bytes, seq: int, now: float) -> None:
        """Payload and FIN of an acceptable segment (RFC 9293 3.10.7.4, seventh and eighth)."""
        if self.state not in (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2):
            # After the FIN nothing can follow; it is an old segment again, or nonsense.
            self._host.drop("after_fin")
            self._challenge(now)
            return
        start = segment.data_start
        length = segment.data_end - start
        end = seq + length
        fin = segment.flags & FIN != 0
        reason = "duplicate"  # if nothing of it is taken
        taken = False
        if end > self.rcv_edge:
            # Cut what lies beyond the window, the FIN with it: it will come again.
            length -= end - self.rcv_edge
            end = self.rcv_edge
            fin = False
            reason = "beyond_window"
            self._ack_owed = 2
        waiting = self._out_of_order
        if fin and not self._fin_known and end >= self.rcv_nxt and (waiting is None or waiting.ends[-1] <= end):
            self._fin_known = True
            self._fin_position = end
            taken = True
        if self._fin_known and end > self._fin_position:
            length -= end - self._fin_position
            end = self._fin_position
            reason = "after_fin"
        if end > self.rcv_nxt and length > 0:
            if self._released:
                self._host.drop("unread")
                self._abort("unread")
                return
            if self._store(packet, seq, start, start + length, now):
                taken = True
            else:
                reason = "out_of_order"
        elif length > 0:
            self._dsack = (seq, end) if self._sack_on else None
            self._ack_owed = 2
        if not taken:
            self._host.drop(reason)
        if self._fin_known:
            self._ack_owed = 2
            if self.rcv_nxt == self._fin_position:
                self.rcv_nxt += 1
                self._on_fin()
        self._predict()

    def _store(self, packet: bytes, seq: int, start: int, end: int, now: float) -> bool:
        """Keep new payload: in order it is readable, else it waits for the gap to fill. Returns: was it kept?"""
        queue = self._queue
        before = self.rcv_nxt
        if seq < before:
            if self._sack_on:
                self._dsack = (seq, before)
            start += before - seq
            seq = before
            self._ack_owed = 2
        if (end - start) * 2 < len(packet):
            # Cut at one end, or sent so: what is kept must not keep alive much more than itself.
            packet = packet[start:end]
            start, end = 0, len(packet)
        self._data_at = now
        self._answered = False
        waiting = self._out_of_order
        if seq > before:
            self._ack_owed = 2
            self._dup_acks_owed = min(self._dup_acks_owed + 1, DUP_ACKS)
            if waiting is None:
                waiting = self._out_of_order = OutOfOrder()
            if waiting.covers(seq, seq + end - start):
                self._dsack = (seq, seq + end - start) if self._sack_on else None
            limit = self._host.budget.receive_cap * 3 // 4
            kept = waiting.insert(seq, seq + end - start, copy_small(packet, start, end), limit) > 0
            if waiting.pushed_out:
                self._host.drop_late("out_of_order", waiting.pushed_out)
                waiting.pushed_out = 0
            if not waiting.starts:
                self._out_of_order = None
            return kept
        if waiting is None:
            queue.append(packet, start, end)
            self.rcv_nxt = seq + end - start
            if self._ack_owed == 0:
                self._ack_owed = 1
        else:
            waiting.insert(seq, seq + end - start, copy_small(packet, start, end), -1)
            self.rcv_nxt = waiting.pull(seq, queue)
            if not waiting.starts:
                self._out_of_order = None
            self._ack_owed = 2
        self.readable_bytes = queue.size
        self.bytes_from_app += self.rcv_nxt - before
        return True

    def _on_fin(self) -> None:
        self.peer_closed = True
        self.app_finished = self.readable_bytes == 0
        if self._out_of_order is not None:
            self._out_of_order = None
        self._move(states.RECEIVE_FIN)
        if self.state == TIME_WAIT:
            self._finish_time_wait()

    # -- timers -------------------------------------------------------------------------------------------------------

    def arm(self, at: float) -> None:
        """Make sure that the host calls `handle_timeout` at `at` or before."""
        if at < self.armed:
            self.armed = at
            self._host.push(at, self)

    def _set_rto_at(self, at: float) -> None:
        self._rto_at = at
        if at < self.armed:
            self.armed = at
            self._host.push(at, self)

    def _timeout(self) -> float:
        """The timeout with its backoff (RFC 6298 5.5)."""
        return min(self._rto * float(1 << min(self._backoff, 10)), MAX_RTO_S)

    def _on_retransmission_timeout(self, now: float) -> None:
        host = self._host
        if self.state == SYN_PENDING:
            self.cancel()
            return
        if self.state == SYN_RECEIVED:
            self._backoff += 1
            if self._backoff >= SYN_ACK_SENDS:
                host.timeouts += 1
                self._end(states.TIMEOUT, "timeout")
                return
            self._syn_ack_owed = True
            host.retransmits += 1
            self._set_rto_at(now + self._timeout())
            self.touch()
            return
        outstanding = self.snd_una < self.snd_nxt
        closed_window = self.snd_edge <= self.snd_una and self.snd_una < self._send.end
        if outstanding and not closed_window:
            if now - self._progress_at >= GIVE_UP_S:
                host.timeouts += 1
                self._end(states.TIMEOUT, "timeout")
                self._reset_owed = True
                return
            self._start_recovery(LOSS_RECOVERY)
        elif outstanding or self.snd_nxt < self._send.end:
            # Persist (RFC 9293 3.8.6.1): for ever, as long as somebody answers.
            if now - max(self._heard_at, self._progress_at) >= GIVE_UP_S:
                host.timeouts += 1
                self._end(states.TIMEOUT, "timeout")
                self._reset_owed = True
                return
            if self.snd_edge > self.snd_nxt:
                self._force_small = True
            else:
                self._probe_owed = True
            self.touch()
        else:
            return
        self._backoff += 1
        self._set_rto_at(now + self._timeout())

    def _on_keepalive(self, now: float) -> None:
        """RFC 9293 3.8.4. On this link it finds only a vanished network namespace; it must find that, though."""
        host = self._host
        idle_at = self._heard_at + host.keepalive_idle
        # The sum is compared, not the difference: rounded, the latter may be short of the idle time at the very moment
        # that the sum names, and the same deadline would be set for ever.
        if now < idle_at:
            self._keep_probes = 0
            self._keep_at = idle_at
            return
        self._keep_at = now + host.keepalive_interval
        if self._rto_at != INFINITE:
            # Bytes or a probe are on the way, which is a question too, and has a patience of its own (Linux likewise).
            self._keep_probes = 0
            return
        if self._keep_probes >= host.keepalive_probes:
            host.timeouts += 1
            self._end(states.TIMEOUT, "timeout")
            self._reset_owed = True
            return
        self._keep_probes += 1
        self._probe_owed = True
        self.touch()

    # -- small things -------------------------------------------------------------------------------------------------

    def touch(self) -> None:
        """Put the flow on the list that the shell serves after the batch."""
        if not self.touched:
            self.touched = True
            self._host.touched.append(self)

    def _move(self, event: int) -> None:
        self.state = states.move(self.state, event)
        self._predict()

    def _predict(self) -> None:
        """What may take the short way. A gap, a recovery, a FIN or an absent owner need the long one."""
        self.predict = 0
        if self._recovery == NO_RECOVERY:
            if self.state == CLOSE_WAIT:
                self.predict = 1
            elif self.state in (ESTABLISHED, FIN_WAIT_1, FIN_WAIT_2) and not self._fin_known:
                if self._released:
                    self.predict = 1
                elif self._out_of_order is None:
                    self.predict = 2

    def _end(self, event: int, failure: str) -> None:
        """Everything is over: keep nothing but, in an orderly end, what the owner has not read."""
        self._move(event)
        self.closed = True
        self.failure = failure
        if failure:
            self._queue.clear()
            self.readable_bytes = 0
        self._free()
        self._ack_owed = 0
        self._syn_ack_owed = False
        self._probe_owed = False
        self.armed = INFINITE
        self.touch()

    def _finish_time_wait(self) -> None:
        """TIME-WAIT is the stack's affair; the last ACK is still ours."""
        self.closed = True
        self._free()
        self.armed = INFINITE
        self.touch()

    def _free(self) -> None:
        self._send.clear()
        self._out_of_order = None
        self._scoreboard = None
        self._recovery = NO_RECOVERY
        self._rto_at = INFINITE
        self._ack_at = INFINITE
        self._keep_at = INFINITE
        self._fin_wait_at = INFINITE
        self.predict = 0

    def _abort(self, failure: str) -> None:
        if self.closed:
            return
        if self.state == SYN_PENDING:
            # Nothing was said yet: RST with ACK and sequence 0 is the form of "refused".
            self._header_length = self._ip_length + 20
            self._build_template()
            self.snd_una = self.snd_nxt = self.snd_edge = 0
        self._end(states.ABORT, failure)
        self._reset_owed = True

    def _space(self) -> int:
        """Bytes the send buffer can take. An empty one always takes some: no flow may starve by what others hold."""
        send = self._send
        held = send.end - send.start
        budget = self._host.budget
        if budget.used >= budget.limit:
            return max(LAST_RESORT - held, 0)
        cap = budget.send_cap
        if budget.crowded and cap > FIRST_SEND + 2 * self.bytes_to_app:
            cap = FIRST_SEND + 2 * self.bytes_to_app
        return max(cap - held, 0)

    def _owe_ack_now(self) -> None:
        self._ack_owed = 2
        self.touch()

    def _may_challenge(self, now: float) -> bool:
        if now - self._challenged_at < CHALLENGE_INTERVAL_S:
            return False
        self._challenged_at = now
        return True

    def _challenge(self, now: float) -> None:
        """RFC 5961: say where we are and let the peer prove itself, at most twice a second and flow."""
        if self._may_challenge(now):
            self._owe_ack_now()

    def _answer_unacceptable(self, length: int, now: float) -> None:
        """An ACK for what could not be taken. Old data always gets one: its sender misses our last ACK."""
        if length or self._may_challenge(now):
            self._owe_ack_now()

    def _timestamp(self, now: float) -> int:
        """Milliseconds with an offset per flow, so that it tells nothing about this machine (RFC 7323 5.4)."""
        return (int(now * 1000.0) + self.ts_offset) & MASK

    def _options(self, now: float, sacks: Sequence[tuple[int, int]]) -> bytes:
        return options(timestamp=(self._timestamp(now), self.ts_recent) if self.ts_on else None, sacks=sacks)

    def _build_template(self) -> None:
        """The header of ordinary segments, with what never changes in it; sums of that part are kept, unfolded."""
        source, source_port = self.destination
        destination, destination_port = self.source
        header = bytearray(self._header_length)
        ip_length = self._ip_length
        if ip_length == 20:
            _IP_FIXED.pack_into(header, 0, 0x45, 0, 0, _DF, _TTL_TCP, 0, source, destination)
            self._ip_sum = sum16(header[:20])
        else:
            header[:40] = build_ipv6(source, destination, PROTOCOL_TCP, 0)
        _PORTS.pack_into(header, ip_length, source_port, destination_port)
        self._header = header
        # `_emit` adds the whole length of the packet to either sum, so the IP header's bytes come off here.
        self._pseudo_sum = fold(pseudo_header_sum(source, destination, PROTOCOL_TCP, 0) + 0xFFFF - ip_length)

    def _packet(self, position: int, ack: int, flags: int, window: int, extra: bytes) -> bytearray:
        """A segment out of the ordinary, with options of its own; the checksum field holds the pseudo-header sum."""
        ip_length = self._ip_length
        length = ip_length + 20 + len(extra)
        packet = bytearray(length)
        packet[: ip_length + 4] = self._header[: ip_length + 4]
        if ip_length == 20:
            check = self._ip_sum + length
            check = (check & 0xFFFF) + (check >> 16)
            _IP_PATCH.pack_into(packet, 2, length, _DF, _TTL_TCP, ~check & 0xFFFF)
        else:
            _SHORT.pack_into(packet, 4, length - 40)
        pseudo = self._pseudo_sum + length
        pseudo = (pseudo & 0xFFFF) + (pseudo >> 16)
        _TCP_PATCH.pack_into(
            packet, ip_length + 4, position & MASK, ack & MASK, (20 + len(extra)) << 10 | flags, window, pseudo, 0
        )
        packet[ip_length + 20 :] = extra
        return packet
