"""How many ready connections to hold, and when to make one: pure arithmetic over what was seen.

The binding header is sent after TLS, so a connection that is ready serves any endpoint, and one stock of them serves
all. It is kept as a warehouse keeps its shelves: each request takes one and orders one, and an order takes its lead
time (a TCP and a TLS handshake, and what it waits before). A request finds the shelf empty when more requests come
within one lead time than were on it and on order. By Little's law that is the arrival rate times the lead time.

Both are measured, and their product is measured at once: `demand` is a count of requests that fades with the lead time
as its time constant. At a steady rate it settles at rate times lead; after thirty at once it is thirty. The target is
the most that it was lately, with a margin. "Lately" is the window that runs and the one before; what was in an older
one counts half, a quarter and so on, until `idle` are left. FORGET_S after the last request nothing is held.

Three things hold it back, so that an ingress that is down, or hangs up, is never stormed:

    failures    after a dial that failed, and after a connection that died before it had proved anything, nothing is
                ordered for a while, twice as long each time; then one, until something has worked
    tokens      no more orders a second than ORDERS_PER_S, whatever happens
    idle limit  how long the ingress lets a connection wait is learned from those that died waiting; connections are
                retired before that, and no more are held than are used up within that time: none, when nobody asks

Nothing here waits or knows a clock: `now` is given, in seconds, and never goes back.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

FORGET_S: Final = 300.0  # without a request, until nothing is held any more
WINDOW_S: Final = 10.0
MARGIN: Final = 1.25
FIRST_LEAD_S: Final = 0.1  # until one was measured: two round trips and two handshakes' work across a continent
LEAD_WEIGHT: Final = 0.2  # of the newest measurement
ORDERS_PER_S: Final = 1000.0
ORDER_BURST: Final = 64.0
RETRY_FIRST_S: Final = 0.1
RETRY_MOST_S: Final = 60.0
# A connection that lives this long unused was no mistake. Shorter than the idle limit of any load balancer we know.
PROVEN_S: Final = 10.0
# Retire connections at this share of their age limit at the latest; and from there down to three quarters of it at
# random, so that those which were dialled together do not go together.
SAFE_SHARE: Final = 0.8
SPREAD: Final = 0.25
DEATHS_TO_LEARN: Final = 3  # one could be a restart of the ingress, two a coincidence
TOGETHER_S: Final = 1.0  # deaths this close are one event: a restart takes all at once
UNLEARN_S: Final = 600.0  # without such a death: let a connection live longer once, to see
USE_TIME_CONSTANT_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """What is configured.

    Attributes:
        max: connections ready and being made for the pool, at most; 0: no pool.
        max_age_s: how long one may wait to be used.
        idle: how many are held when little is going on.
    """

    max: int = 128
    max_age_s: float = 300.0
    idle: int = 2


class Stock:
    """The decisions. Invariant: what `orders` allows never makes ready and ordered connections exceed `target`.

    Args:
        settings: the bounds.
        random: gives a number from 0 to 1, for jitter.
    """

    def __init__(self, settings: PoolSettings, random: Callable[[], float]) -> None:
        self._settings = settings
        self._random = random
        self._last_request = -math.inf
        self._lead_s = math.nan
        self._demand = 0.0
        self._demand_at = -math.inf
        self._window_ends = -math.inf
        self._most = self._most_before = 0.0
        self._use = 0.0  # requests a second, slowly averaged
        self._use_at = -math.inf
        self._failures = 0
        self._blocked_until = -math.inf
        self._tokens = ORDER_BURST
        self._tokens_at = -math.inf
        self._deaths: deque[tuple[float, float]] = deque(maxlen=DEATHS_TO_LEARN)  # when, at which age
        self._unlearn_at = math.inf

    # -- what it is told

    def set_settings(self, settings: PoolSettings) -> None:
        """Keep to other bounds from now on."""
        self._settings = settings

    def note_request(self, now: float) -> None:
        """Somebody wants a connection."""
        self._last_request = now
        self._demand = self._faded_demand(now) + 1.0
        self._demand_at = now
        self._roll(now)
        self._most = max(self._most, self._demand)
        self._use = self._faded_use(now) + 1.0 / USE_TIME_CONSTANT_S
        self._use_at = now

    def note_start(self, now: float) -> None:
        """Somebody may soon want a connection: hold `idle` from now on, as if there had been a request."""
        self._last_request = max(self._last_request, now)

    def note_lead(self, seconds: float) -> None:
        """So long it took from the request that made an order necessary until the connection was ready."""
        if math.isnan(self._lead_s):
            self._lead_s = seconds
        else:
            self._lead_s += LEAD_WEIGHT * (seconds - self._lead_s)

    def note_failure(self, now: float) -> None:
        """Dialling failed, for the pool or for a flow. Failures during a pause belong to the one that began it."""
        if now < self._blocked_until:
            return
        pause = min(RETRY_FIRST_S * 2.0 ** min(self._failures, 30), RETRY_MOST_S)
        self._failures += 1
        self._blocked_until = now + pause * (1.0 - 0.5 * self._random())

    def note_proof(self) -> None:
        """A connection served an endpoint, or lived for PROVEN_S: the ingress is there and wants us."""
        self._failures = 0
        self._blocked_until = -math.inf

    def note_change(self) -> None:
        """The ingress, or what it is shown, is another one: nothing that went wrong before counts."""
        self.note_proof()
        self._deaths.clear()
        self._unlearn_at = math.inf

    def note_death(self, age: float, now: float) -> None:
        """The ingress ended a connection that was waiting, ready for `age` seconds."""
        if age < PROVEN_S:
            self.note_failure(now)
        self._unlearn(now)
        if self._deaths and now - self._deaths[-1][0] < TOGETHER_S:
            at, before = self._deaths.pop()
            self._deaths.append((at, max(age, before)))
        else:
            self._deaths.append((now, age))
        self._unlearn_at = now + UNLEARN_S

    # -- what it is asked

    @property
    def is_failing(self) -> bool:
        """Something failed, and nothing has worked since."""
        return self._failures > 0

    @property
    def lead_s(self) -> float:
        """The lead time that is reckoned with, seconds."""
        return FIRST_LEAD_S if math.isnan(self._lead_s) else self._lead_s

    def idle_limit_s(self, now: float) -> float:
        """How long the ingress lets a connection wait, as far as that is known; infinity where it is not."""
        self._unlearn(now)
        if len(self._deaths) < DEATHS_TO_LEARN:
            return math.inf
        return max(age for _, age in self._deaths)

    def lifetime_s(self, now: float) -> float:
        """How long a connection that is made now may wait to be used."""
        limit = min(self._settings.max_age_s, SAFE_SHARE * self.idle_limit_s(now))
        return limit * (1.0 - SPREAD * self._random())

    def target(self, now: float) -> int:
        """How many connections should be ready or on order."""
        if now >= self._last_request + FORGET_S:
            return 0
        wanted = max(self._settings.idle, math.ceil(self._peak(now) * MARGIN))
        limit = self.idle_limit_s(now)
        if limit < self._settings.max_age_s:
            wanted = min(wanted, int(self._faded_use(now) * SAFE_SHARE * limit))
        return min(wanted, self._settings.max)

    def orders(self, now: float, ready: int, ordered: int) -> tuple[int, float]:
        """How many to order now, and when to ask again although nothing has happened (infinity: need not)."""
        target = self.target(now)
        missing = target - ready - ordered
        if missing <= 0:
            return 0, self._target_falls_at(target)
        if now < self._blocked_until:
            return 0, self._blocked_until
        if self._failures:  # one to see; its end is an event
            return (0, math.inf) if ordered else (1, math.inf)
        tokens = min(ORDER_BURST, self._tokens + (now - self._tokens_at) * ORDERS_PER_S)
        allowed = min(missing, int(tokens))
        self._tokens = tokens - allowed
        self._tokens_at = now
        if allowed < missing:
            return allowed, now + (1.0 - self._tokens % 1.0) / ORDERS_PER_S
        return allowed, self._target_falls_at(target)

    def surplus(self, now: float, ready: int, ordered: int) -> int:
        """How many of the ready ones to let go."""
        return max(0, min(ready, ready + ordered - self.target(now)))

    # -- arithmetic

    def _faded_demand(self, now: float) -> float:
        elapsed = now - self._demand_at
        return self._demand * math.exp(-elapsed / max(self.lead_s, 1e-6))

    def _faded_use(self, now: float) -> float:
        return self._use * math.exp(-(now - self._use_at) / USE_TIME_CONSTANT_S) if self._use else 0.0

    def _roll(self, now: float) -> None:
        """Begin another window where one is over."""
        if now < self._window_ends:
            return
        if math.isinf(self._window_ends):  # the first one begins now
            self._window_ends = now + WINDOW_S
            return
        windows = 1 + int((now - self._window_ends) // WINDOW_S)
        self._most_before = max(self._most, self._most_before / 2.0) * 0.5 ** min(windows - 1, 100)
        self._most = 0.0
        self._window_ends += windows * WINDOW_S
        if self._window_ends <= now:  # rounded
            self._window_ends += WINDOW_S

    def _peak(self, now: float) -> float:
        self._roll(now)
        return max(self._most, self._most_before)

    def _target_falls_at(self, target: int) -> float:
        if target == 0:
            return math.inf
        forgotten = self._last_request + FORGET_S
        if target <= self._settings.idle:
            return forgotten
        return min(forgotten, self._window_ends)

    def _unlearn(self, now: float) -> None:
        if now >= self._unlearn_at:
            self._deaths.popleft()
            self._unlearn_at = now + UNLEARN_S if self._deaths else math.inf


__all__ = ["PoolSettings", "Stock"]
