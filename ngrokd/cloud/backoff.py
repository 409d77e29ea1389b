"""When to ask ngrok's API again after it said no, or nothing.

The rules pull in different directions, so here is what was decided, and why:

* A short outage must be noticed within ten seconds of its end. Delays double from one second, and stop at ten.
* A long outage must not cost a request every ten seconds for ever: the longest delay is a sixtieth of the time the API
  has been failing, never below ten seconds and never above sixty. Ten minutes of outage are noticed within ten seconds
  of their end, an hour within a minute.
* A thousand daemons that lost the API at one moment must not return at one moment, so each delay is drawn at random. It
  is drawn from the upper half of its range: drawn from all of it, as is often done, the mean would be five seconds and
  the API would see twelve requests a minute from each of us.
* Retry-After is obeyed, between one second and five minutes. A tenth is added at random, for the same thousand.
* A refused key does not get better by asking: from one minute up to five. A new key resets everything.

Pure: the clock and the dice are handed in.
"""

from __future__ import annotations

from enum import Enum
from random import Random
from typing import Final

FIRST_S: Final = 1.0
SHORT_OUTAGE_LONGEST_S: Final = 10.0
LONGEST_S: Final = 60.0
OUTAGE_SHARE: Final = 60.0  # the longest delay is the outage divided by this
REFUSED_FIRST_S: Final = 60.0
REFUSED_LONGEST_S: Final = 300.0
RETRY_AFTER_LEAST_S: Final = 1.0
RETRY_AFTER_MOST_S: Final = 300.0


class Trouble(Enum):
    """The two kinds of failure that are waited out differently."""

    PASSING = "passing"  # unreachable, overloaded, broken, unintelligible
    REFUSED = "refused"  # the key, the account or what we ask for


class Backoff:
    """The delays between attempts that fail. Invariant: what has not failed since the last `reset` costs no delay."""

    def __init__(self) -> None:
        self._failures = 0
        self._failing_since = 0.0
        self._trouble = Trouble.PASSING

    @property
    def failures(self) -> int:
        """Failures of the present kind in a row."""
        return self._failures

    def reset(self) -> None:
        """An attempt succeeded, or there is a reason to believe the next will (a new key, a changed address)."""
        self._failures = 0

    def next_delay(
        self,
        now: float,
        rng: Random,
        *,
        trouble: Trouble = Trouble.PASSING,
        retry_after_s: float | None = None,
        took_s: float = 0.0,
    ) -> float:
        """Note a failure, and say how long to wait before the next attempt, in seconds.

        Args:
            now: the time of the failure, on any clock that does not jump.
            rng: the dice.
            trouble: what kind of failure it was; a change of kind starts from the beginning.
            retry_after_s: what the API asked for. It may be absurd.
            took_s: how long the failed attempt lasted. An attempt that ran into its time limit has been waiting
                already, and that counts, so that a black hole is noticed to be gone as soon as anything else.
        """
        if self._failures == 0 or trouble is not self._trouble:
            self._failures = 0
            self._failing_since = now - took_s
            self._trouble = trouble
        self._failures += 1
        if retry_after_s is not None:
            wanted = min(max(retry_after_s, RETRY_AFTER_LEAST_S), RETRY_AFTER_MOST_S)
            return min(wanted * rng.uniform(1.0, 1.1), RETRY_AFTER_MOST_S)
        if trouble is Trouble.REFUSED:
            top = _doubled(REFUSED_FIRST_S, self._failures, REFUSED_LONGEST_S)
            return max(REFUSED_FIRST_S, rng.uniform(0.8 * top, top))
        outage = now - self._failing_since
        longest = min(max(outage / OUTAGE_SHARE, SHORT_OUTAGE_LONGEST_S), LONGEST_S)
        top = _doubled(FIRST_S, self._failures, longest)
        return max(rng.uniform(top / 2, top) - took_s, FIRST_S / 2)


def _doubled(first: float, failures: int, longest: float) -> float:
    return min(first * 2.0 ** min(failures - 1, 30), longest)
