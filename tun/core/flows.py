"""The table of flows: who is here, who has just left, and who may still come.

A flow is found by twelve bytes cut from the packet: source, destination, source port, destination port. They are bytes
and not a tuple of integers because hashes of bytes are keyed (SipHash), and what an attacker chooses must not choose
its bucket.

TIME-WAIT is a record here, not a flow: a hundred bytes without buffers, at most 16,384 of them, the oldest going first.
Its length is 10 s instead of 2 MSL: the network between the app and us is one queue of packets.

Requests that wait for a decision ("undecided") and flows whose handshake is not finished ("half-open") are what a SYN
flood multiplies. Both are bounded. Of the undecided, all sources that are not this host together get at most two
thirds, so that this host can always ask, and one of them at most two thirds of those; who gets a place when they are
scarce says `tun.core.admission`. Of the half-open, where the oldest gives way, one of them gets at most two thirds.
"""

from __future__ import annotations

from typing import Final

from tun.core.admission import Waiting
from tun.core.machine import Flow
from tun.core.states import SYN_PENDING, SYN_RECEIVED

TIME_WAIT_S: Final = 10.0  # smoltcp's CLOSE_DELAY
TIME_WAIT_LIMIT: Final = 16384


class TimeWait:
    """What is left of a connection in TIME-WAIT."""

    __slots__ = ("answered_at", "expires_at", "rcv_nxt", "snd_nxt", "ts_offset", "ts_on", "ts_recent")

    def __init__(self, flow: Flow, now: float) -> None:
        self.expires_at: float = now + TIME_WAIT_S
        self.answered_at: float = -TIME_WAIT_S
        self.rcv_nxt: int = flow.rcv_nxt & 0xFFFFFFFF
        self.snd_nxt: int = flow.snd_nxt & 0xFFFFFFFF
        self.ts_on: bool = flow.ts_on
        self.ts_recent: int = flow.ts_recent
        self.ts_offset: int = flow.ts_offset


class FlowTable:
    """All flows by key, those in TIME-WAIT, and the counts that limits are made of.

    Attributes:
        flows: live flows, requests included.
        time_wait: records by key, in the order in which they expire.
        own, others: flows in SYN_PENDING, of this host and of all other sources.
        half_open_flows: those in SYN_RECEIVED, the oldest first.
        foreign_half_open: of these, how many each source has that is not this host.
    """

    __slots__ = ("flows", "foreign_half_open", "half_open_flows", "others", "own", "time_wait")

    def __init__(self, undecided: int) -> None:
        """Make an empty one, with places for so many undecided requests."""
        self.flows: dict[bytes, Flow] = {}
        self.time_wait: dict[bytes, TimeWait] = {}
        self.own: Waiting = Waiting(undecided, 0)
        self.others: Waiting = Waiting(0, 1)
        self.set_undecided(undecided)
        self.half_open_flows: dict[bytes, Flow] = {}
        self.foreign_half_open: dict[bytes, int] = {}

    def set_undecided(self, undecided: int) -> None:
        """Have places for so many undecided requests; others than this host get at most two thirds of them."""
        share = undecided * 2 // 3
        self.own.set_places(undecided, 0)
        self.others.set_places(share, max(share * 2 // 3, 1))

    @property
    def undecided(self) -> int:
        """How many flows are in SYN_PENDING."""
        return len(self.own.flows) + len(self.others.flows)

    @property
    def half_open(self) -> int:
        """How many flows are in SYN_RECEIVED."""
        return len(self.half_open_flows)

    def add(self, flow: Flow) -> None:
        """Take in a new request."""
        self.flows[flow.key] = flow
        flow.counted = SYN_PENDING
        (self.own if flow.local else self.others).add(flow)

    def recount(self, flow: Flow) -> None:
        """Bring the counts in line with a flow's state; cheap when it has not changed class."""
        now = 0 if flow.closed or flow.state > SYN_RECEIVED else flow.state
        before = flow.counted
        if now == before:
            return
        flow.counted = now
        if before == SYN_PENDING:
            (self.own if flow.local else self.others).remove(flow)
        elif before == SYN_RECEIVED:
            self.half_open_flows.pop(flow.key, None)
            if not flow.local:
                _count(self.foreign_half_open, flow.source[0], -1)
        if now == SYN_RECEIVED:
            self.half_open_flows[flow.key] = flow
            if not flow.local:
                _count(self.foreign_half_open, flow.source[0], 1)

    def remove(self, flow: Flow) -> None:
        """Forget a flow that has ended."""
        self.recount(flow)
        if self.flows.get(flow.key) is flow:
            del self.flows[flow.key]

    def oldest_half_open(self, source: bytes | None) -> Flow | None:
        """The flow that has been half-open longest, of one source or of all."""
        for flow in self.half_open_flows.values():
            if source is None or flow.source[0] == source:
                return flow
        return None

    def hold(self, key: bytes, record: TimeWait) -> None:
        """Put a record at the end of TIME-WAIT, where the latest expiry is; the oldest goes when there are too many."""
        self.time_wait.pop(key, None)
        self.time_wait[key] = record
        if len(self.time_wait) > TIME_WAIT_LIMIT:
            del self.time_wait[next(iter(self.time_wait))]

    def expire(self, now: float) -> None:
        """Forget the records whose time is over."""
        while self.time_wait:
            key = next(iter(self.time_wait))
            if self.time_wait[key].expires_at > now:
                return
            del self.time_wait[key]

    def next_expiry(self) -> float:
        """When the first record expires; infinite when there is none."""
        if not self.time_wait:
            return float("inf")
        return self.time_wait[next(iter(self.time_wait))].expires_at


def _count(counts: dict[bytes, int], source: bytes, step: int) -> None:
    value = counts.get(source, 0) + step
    if value > 0:
        counts[source] = value
    else:
        counts.pop(source, None)
