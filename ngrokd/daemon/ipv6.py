"""Whether the way over IPv6 is open, as knocking at our own door tells.

A name's IPv6 address is written down only while a connection of the daemon's own, made through the kernel to an address
that no name ever has, is refused by its own stack (docs/adr/0022). Nothing less proves that an app's would arrive:
policy rules, a firewall, another VPN or a switch of this machine decide as well, and few of them tell anybody. So it is
tried again every few seconds, at a cost of two packets.
"""

from __future__ import annotations

import enum
import errno
from typing import Final

KNOCK_S: Final = 1.0  # our own refusal takes microseconds, or does not come
FIRST_KNOCK_S: Final = 0.25  # before the first name is written nothing waits for long
KNOCK_PORT: Final = 9
AGAIN_S: Final = 10.0
# A loop that was busy for a second, or a flood that used up the refusals, has not closed the way.
SILENCES: Final = 3

_ABOUT_OURSELVES: Final = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EAGAIN})


class Answer(enum.Enum):
    """What came of a knock."""

    REFUSED = "refused"  # by our own stack: who else would answer there?
    NO_WAY = "no way"  # the kernel said so, or somebody accepted
    SILENCE = "silence"
    UNKNOWN = "unknown"  # it was not sent, for reasons that say nothing of the way

    @staticmethod
    def of(error: OSError) -> Answer:
        """What a failed connection tells."""
        if error.errno == errno.ECONNREFUSED:
            return Answer.REFUSED
        if error.errno == errno.ETIMEDOUT:
            return Answer.SILENCE
        return Answer.UNKNOWN if error.errno in _ABOUT_OURSELVES else Answer.NO_WAY


class Way:
    """From answers to a verdict.

    Attributes:
        is_open: names may have IPv6 addresses.
    """

    __slots__ = ("_silences", "is_open")

    def __init__(self) -> None:
        self.is_open = False
        self._silences = 0

    def judge(self, answer: Answer) -> float:
        """Take an answer into account. Returns how long until the next knock, in seconds."""
        if answer is Answer.SILENCE:
            self._silences += 1
            if self.is_open and self._silences < SILENCES:
                return 0.0
            self.is_open = False
            return AGAIN_S
        self._silences = 0
        if answer is not Answer.UNKNOWN:
            self.is_open = answer is Answer.REFUSED
        return AGAIN_S
