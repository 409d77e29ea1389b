"""TLS sessions to resume: a handshake without certificates costs a quarter of the work of a full one.

A resumed handshake proves that the other side still holds the secrets of an earlier session; the certificate is not
shown again. So a session may be resumed only where that earlier handshake has proved what a full one would prove now:

    same context    anchors and client certificate are as they were. OpenSSL would take a session of another context;
                    Python refuses it, and here it is not even offered: another context begins with nothing.
    same host       the name that the certificate was verified for is the name that is dialled now.
    lately          a session of a resumed connection inherits the time of the full verification at its root, and
                    after VERIFIED_FOR_S the certificate must be shown again: it may have expired meanwhile.

What comes from a connection that was not verified never gets here: there is no such connection but the probe, and that
one does not finish its handshake.

TLS 1.3 sends tickets after the handshake, so they are collected when something has been read. Taking a session out of
OpenSSL costs as much as half a resumed handshake (it is encoded, and the server's certificate in it decoded), so each
is used USES times. RFC 8446 C.4 advises against that because it lets an observer tell that two connections come from
one client; here both ends have one address and the server name is in the clear, so nothing is told. Some servers allow
one use: that is learned from tickets that were accepted once and declined the second time. A TLS 1.2 session is used as
long as it lasts. A server that does not resume does a full handshake instead, and nobody notices.

A server might resume and then not know whose connection it is, if it looks at client certificates in a place that a
resumed handshake does not pass. So the first connection that was resumed is on trial: if it is refused and a full one
to the same endpoint is not, nothing is resumed in this context any more.
"""

from __future__ import annotations

import math
import ssl
from dataclasses import dataclass
from enum import Enum
from typing import Final

VERIFIED_FOR_S: Final = 3600.0
USES: Final = 16
ENOUGH: Final = 64  # uses: as many dials as are in flight at a time
STRIKES: Final = 3  # connections resumed and cut without an answer, before anything resumed has worked
SECOND_USES_DECLINED: Final = 3  # in a row, until tickets are taken for single-use


class Trial(Enum):
    """What is known about resumption in this context."""

    OPEN = "open"
    PASSED = "passed"
    FAILED = "failed"


@dataclass(slots=True, eq=False)
class Ticket:
    """A session to resume.

    Attributes:
        session: of the context that it is used with.
        verified_at: when the certificate was verified that it goes back to.
        uses: how often it may still be used.
        accepted: whether the server has resumed it.
    """

    session: ssl.SSLSession
    verified_at: float
    uses: float
    accepted: bool = False


class Tickets:
    """The sessions of one context and host name.

    Attributes:
        enabled: False resumes nothing.
        trial: see Trial.
    """

    def __init__(self) -> None:
        self.enabled = True
        self.trial = Trial.OPEN
        self._context: ssl.SSLContext | None = None
        self._host = ""
        self._tickets: list[Ticket] = []
        self._uses = USES
        self._second_uses_declined = 0
        self._strikes = 0

    def __len__(self) -> int:
        return len(self._tickets)

    def take(self, context: ssl.SSLContext, host: str, now: float) -> Ticket | None:
        """Take the newest session for a handshake under `context` with `host`; None: do a full one.

        Tell afterwards with `note_use` what the server did with it.
        """
        self._turn_to(context, host)
        if not self.enabled or self.trial is Trial.FAILED:
            return None
        while self._tickets:
            ticket = self._tickets[-1]
            ticket.uses -= 1
            if ticket.uses <= 0 or now - ticket.verified_at >= VERIFIED_FOR_S:
                self._tickets.pop()
            if now - ticket.verified_at < VERIFIED_FOR_S:
                return ticket
        return None

    def note_use(self, ticket: Ticket, *, resumed: bool) -> None:
        """Learn from a handshake in which `ticket` was offered."""
        if resumed:
            if ticket.accepted:
                self._second_uses_declined = 0
            ticket.accepted = True
            return
        if ticket in self._tickets:
            self._tickets.remove(ticket)
        if ticket.accepted:
            self._second_uses_declined += 1
            if self._second_uses_declined >= SECOND_USES_DECLINED:
                self._uses = 1

    def wanted(self, context: ssl.SSLContext, host: str) -> bool:
        """Whether `add` would keep a session: taking it out costs time."""
        return (
            self.enabled
            and context is self._context
            and host == self._host
            and self.trial is not Trial.FAILED
            and sum(each.uses for each in self._tickets) < ENOUGH
        )

    def add(self, tls: ssl.SSLObject, verified_at: float) -> bool:
        """Keep the session that `tls` has now, if there is one that can be resumed (yet)."""
        session = tls.session
        if session is None or not (session.has_ticket or session.id):
            return False
        uses = self._uses if tls.version() == "TLSv1.3" else math.inf
        self._tickets.append(Ticket(session, verified_at, uses))
        return True

    def clear(self) -> None:
        """Forget all sessions: one of them did harm."""
        self._tickets.clear()

    def on_trial(self, context: ssl.SSLContext) -> bool:
        """Whether it is not known yet what connections are worth that were resumed under `context`."""
        return context is self._context and self.trial is Trial.OPEN

    def note_served(self, context: ssl.SSLContext) -> None:
        """A resumed connection was accepted for an endpoint: resumption works."""
        if self.on_trial(context):
            self.trial = Trial.PASSED

    def note_refused(self, context: ssl.SSLContext, *, full_served: bool) -> None:
        """A resumed connection on trial was refused an endpoint; was a full one, right after it, accepted?"""
        if self.on_trial(context):
            self.trial = Trial.FAILED if full_served else Trial.PASSED
            if full_served:
                self._tickets.clear()

    def note_cut(self, context: ssl.SSLContext) -> None:
        """A resumed connection was cut without an answer. It may have waited too long; three times is too often."""
        if self.on_trial(context):
            self._strikes += 1
            if self._strikes >= STRIKES:
                self.trial = Trial.FAILED
                self._tickets.clear()

    def _turn_to(self, context: ssl.SSLContext, host: str) -> None:
        if context is not self._context or host != self._host:
            self._context = context
            self._host = host
            self._tickets.clear()
            self._uses = USES
            self._second_uses_declined = 0
            self._strikes = 0
            self.trial = Trial.OPEN


__all__ = ["Ticket", "Tickets", "Trial"]
