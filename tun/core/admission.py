"""Who may ask, when more ask than can be decided: the places of undecided requests, and what a flood gets of them.

A request costs its maker 40 bytes and us a dial to somewhere else, with TLS. So a flood needs no bandwidth to keep
everybody waiting: a few hundred SYNs a second, more than there can be dials, and whoever comes then stands at the end
of a queue that grows. Places are bounded, and shared out by source (`Waiting`, one for this host and one for all
others); but a flood can have the address of who means well, and neither share nor order tells them apart then.

What does is patience. A kernel that gets no answer to its SYN sends the same one again, after a second (RFC 6298 2.1;
Linux, the BSDs and Windows alike). A flood of random SYNs does not, and one that repeats itself would have to remember
and to wait: a thousand times the effort for a thousandth of the rate. (Mail servers have turned away spam so, under the
name of greylisting.) It costs who means well one second, so it must begin only where it costs nothing:

  * *pressed* is a kind of source whose places are all taken, or of which many wait that have not come again, though the
    first of them had the time to. Newcomers would wait as long at the end of that queue;
  * while it is pressed, a SYN that is new is noted and dropped, and one that was noted is let in;
  * those who already wait, beyond the first few, go back to being noted, unless they have come again meanwhile. They
    hear nothing of it: silence is what they would have got from a queue that drops, and their SYN comes again;
  * a noted SYN that comes again too soon was not sent by a kernel, and is noted anew;
  * it ends when, in a turn of a few seconds, few were noted or most of them came again: then they were real;
  * a flood that is as patient as a kernel gets what share it has of those who are let in. This host's programs have all
    their places meanwhile; strangers have few and are let in slowly, so that their dials do not fill the queue in front
    of all others', nor the time of the processor.

Nothing of this is stateless: what is noted is bounded by TURN_NOTES twice, 110 bytes each, and gone with the pressure.
"""

from __future__ import annotations

from typing import Final

from tun.core.machine import SYN_AGAIN_S, Flow

# A noted SYN is kept for one turn at least and two at most: the second try of Linux comes after 1 s, of others after
# up to 3 s. So many notes end a turn early: at 20,000 a second it has 3 s all the same.
TURN_S: Final = 3.0
TURN_NOTES: Final = 65536
# Who has waited so long has come again, if a kernel sent the SYN.
LONG_S: Final = 1.5
# This part of its places is few: so many unproven requests may be waiting where there is pressure.
FEW: Final = 8
# Under pressure strangers are let in no faster than this, a second; so many come at once at most. Each is a TLS
# handshake, a third of a processor at this rate, and packets are not read meanwhile.
PACE: Final = 100.0
AT_ONCE: Final = 10.0


class Waiting:
    """The undecided requests of one kind of source, in the order in which they came, and the rule for new ones.

    Attributes:
        flows: the requests, by key, the oldest first.
        by_source: how many of them each source has, where that is bounded.
        pressed: must a SYN come twice?
        turn_at: when `turn` is due; infinite when it is not.
        unproven: those who gave up their place when the pressure began; the caller ends them, and empties this.
    """

    __slots__ = (
        "_before",
        "_few",
        "_next_at",
        "_noted",
        "_places",
        "_returned",
        "_source_places",
        "_unproven",
        "by_source",
        "flows",
        "pressed",
        "turn_at",
        "unproven",
    )

    def __init__(self, places: int, source_places: int) -> None:
        """Make an empty one.

        Args:
            places: requests that may wait.
            source_places: of one source; 0 where sources need not be told apart.
        """
        self._places: int = places
        self._source_places: int = source_places
        self._few: int = max(places // FEW, 1)
        self.flows: dict[bytes, Flow] = {}
        self._unproven: dict[bytes, Flow] = {}  # those that have not come again, and some that have
        self.by_source: dict[bytes, int] = {}
        self.pressed: bool = False
        self.turn_at: float = float("inf")
        self.unproven: list[Flow] = []
        self._noted: dict[bytes, float] = {}
        self._next_at: float = 0.0  # when a stranger is let in again, under pressure
        self._before: dict[bytes, float] = {}  # what was noted in the turn before
        self._returned: int = 0  # noted ones that came again in this turn

    def set_places(self, places: int, source_places: int) -> None:
        """Have so many places from now on, as when it was made; requests that wait beyond them go on waiting."""
        self._places = places
        self._source_places = source_places
        self._few = max(places // FEW, 1)

    def add(self, flow: Flow) -> None:
        """Take in a request."""
        self.flows[flow.key] = flow
        self._unproven[flow.key] = flow
        if self._source_places:
            source = flow.source[0]
            self.by_source[source] = self.by_source.get(source, 0) + 1

    def remove(self, flow: Flow) -> None:
        """Forget a request: it is decided, or over."""
        del self.flows[flow.key]
        self._unproven.pop(flow.key, None)
        if self._source_places:
            source = flow.source[0]
            left = self.by_source[source] - 1
            if left:
                self.by_source[source] = left
            else:
                del self.by_source[source]

    def judge(self, name: bytes, source: bytes, others_full: bool, now: float) -> str:
        """May this SYN become a request?

        Args:
            name: of the SYN: the same for the same one again, another one for any other.
            others_full: are there no places left for any kind of source?

        Returns: "" when it may, or why it is dropped.
        """
        if now >= self.turn_at:
            self.turn(now)
        reason = self._is_full(source)
        if others_full:
            reason = "undecided_limit"
        if not self.pressed:
            if not reason and not self._is_slow(now):
                return ""
            self._press(now)
            reason = reason or self._is_full(source)
        if not self._came_again(name, now):
            return "first_try"
        if not reason and self._source_places:
            if now < self._next_at:
                return "source_limit"
            self._next_at = max(self._next_at, now - (AT_ONCE - 1.0) / PACE) + 1.0 / PACE
        if not reason:
            self._forget(name)
        return reason

    def _is_full(self, source: bytes) -> str:
        """Why there is no place for a request of `source`, or ""."""
        waiting = len(self.flows)
        if not self._source_places:
            return "undecided_limit" if waiting >= self._places else ""
        places, of_source = self._places, self._source_places
        if self.pressed and self._few < places:
            places, of_source = self._few, max(self._few * 2 // 3, 1)
        return "source_limit" if waiting >= places or self.by_source.get(source, 0) >= of_source else ""

    def turn(self, now: float) -> None:
        """A turn is over: begin the next one, or end the pressure."""
        if len(self._noted) < self._few or self._returned >= len(self._noted):
            self.pressed = False
            self.turn_at = float("inf")
            self._before = {}
        else:
            self.turn_at = now + TURN_S
            self._before = self._noted
        self._noted = {}
        self._returned = 0

    def _is_slow(self, now: float) -> bool:
        """Do many wait who have not come again, the first of them for longer than that takes?"""
        unproven = self._unproven
        while len(unproven) >= self._few:
            flow = next(iter(unproven.values()))
            if not flow.came_again:
                return now - flow.opened_at >= LONG_S
            del unproven[flow.key]
        return False

    def _press(self, now: float) -> None:
        self.pressed = True
        self.turn_at = now + TURN_S
        self._returned = 0
        self.unproven = [flow for flow in self._unproven.values() if not flow.came_again][self._few :]
        for flow in self.unproven:
            self._noted[name_of(flow.key, flow.irs)] = flow.opened_at

    def _came_again(self, name: bytes, now: float) -> bool:
        """Was this SYN noted, long enough ago? If not, it is now."""
        noted_at = self._noted.get(name, -1.0)
        if noted_at < 0.0:
            noted_at = self._before.get(name, now)
        if now - noted_at >= SYN_AGAIN_S:
            return True
        if len(self._noted) >= TURN_NOTES:
            self.turn(now)
            if not self.pressed:
                return True
        self._noted[name] = now
        return False

    def _forget(self, name: bytes) -> None:
        """It is let in, and counted as one that came again."""
        self._returned += 1
        if self._noted.pop(name, None) is None:
            self._before.pop(name, None)


def name_of(key: bytes, sequence: int) -> bytes:
    """What makes a SYN the same one: addresses, ports and its number."""
    return key + (sequence & 0xFFFFFFFF).to_bytes(4, "big")
