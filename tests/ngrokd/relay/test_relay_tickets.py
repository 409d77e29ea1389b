"""Which sessions are resumed, for how long, and what a server's answer teaches."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from ngrokd.relay.tickets import ENOUGH, SECOND_USES_DECLINED, STRIKES, USES, VERIFIED_FOR_S, Tickets, Trial
from ngrokd.relay.tls import TlsSession

if TYPE_CHECKING:
    from tests.ngrokd.relay.conftest import Authority

HOST = "ingress.example"


@dataclass
class Pair:
    """A client's context and a server's, and handshakes between them."""

    client: ssl.SSLContext
    server: ssl.SSLContext

    def shake(self, session: ssl.SSLSession | None = None) -> ssl.SSLObject:
        client = TlsSession(self.client, server_hostname=HOST, session=session)
        server = TlsSession(self.server, server_side=True)
        done = [False, False]
        while not all(done):
            done[0] = done[0] or client.handshake_step()
            server.feed(client.take())
            done[1] = done[1] or server.handshake_step()
            client.feed(server.take())
        client.decrypt(memoryview(b""))  # tickets come after the handshake
        return client.object


@pytest.fixture
def pair(authority: Authority) -> Pair:
    return Pair(authority.client_context(), authority.server_context())


def filled(pair: Pair, *, count: int = 1, now: float = 0.0) -> Tickets:
    tickets = Tickets()
    assert tickets.take(pair.client, HOST, now) is None
    for _ in range(count):
        assert tickets.add(pair.shake(), now)
    return tickets


def test_a_ticket_is_used_several_times_and_each_time_accepted(pair: Pair) -> None:
    tickets = filled(pair)
    for _ in range(USES):
        ticket = tickets.take(pair.client, HOST, 1.0)
        assert ticket is not None
        tls = pair.shake(ticket.session)
        assert tls.session_reused
        tickets.note_use(ticket, resumed=True)
    assert tickets.take(pair.client, HOST, 1.0) is None


def test_there_is_no_ticket_before_something_was_read(pair: Pair) -> None:
    client = TlsSession(pair.client, server_hostname=HOST)
    server = TlsSession(pair.server, server_side=True)
    client.handshake_step()
    server.feed(client.take())
    server.handshake_step()
    client.feed(server.take())
    assert client.handshake_step()

    tickets = Tickets()
    assert tickets.take(pair.client, HOST, 0.0) is None
    assert not tickets.add(client.object, 0.0)


def test_another_context_or_host_begins_with_nothing(pair: Pair, authority: Authority) -> None:
    """What was verified under other anchors, for another name, or shown another certificate, proves nothing here."""
    assert filled(pair).take(authority.client_context(), HOST, 1.0) is None
    assert filled(pair).take(pair.client, "other.example", 1.0) is None

    tickets = filled(pair)
    assert tickets.take(pair.client, "other.example", 1.0) is None
    assert tickets.take(pair.client, HOST, 1.0) is None
    assert not tickets.wanted(pair.client, "other.example")
    assert not tickets.wanted(authority.client_context(), HOST)


def test_python_refuses_a_session_of_another_context(pair: Pair, authority: Authority) -> None:
    """Should we ever be wrong."""
    session = pair.shake().session
    with pytest.raises(ValueError, match="different SSLContext"):
        TlsSession(authority.client_context(), server_hostname=HOST, session=session)


def test_a_certificate_is_believed_for_an_hour(pair: Pair) -> None:
    """However often the session was renewed since: what counts is when the certificate was verified."""
    tickets = filled(pair, now=100.0)
    assert tickets.take(pair.client, HOST, 100.0 + VERIFIED_FOR_S - 1) is not None
    assert tickets.take(pair.client, HOST, 100.0 + VERIFIED_FOR_S) is None
    assert len(tickets) == 0


def test_a_session_of_tls_1_2_lasts(pair: Pair) -> None:
    pair.client.maximum_version = ssl.TLSVersion.TLSv1_2
    tickets = filled(pair)
    assert not tickets.wanted(pair.client, HOST)
    for _ in range(3 * USES):
        ticket = tickets.take(pair.client, HOST, 1.0)
        assert ticket is not None
        assert pair.shake(ticket.session).session_reused


def test_no_more_are_wanted_than_are_enough(pair: Pair) -> None:
    tickets = Tickets()
    tickets.take(pair.client, HOST, 0.0)
    count = 0
    while tickets.wanted(pair.client, HOST):
        tickets.add(pair.shake(), 0.0)
        count += 1
    assert count == ENOUGH / USES


def test_one_that_is_declined_is_not_offered_again(pair: Pair, authority: Authority) -> None:
    tickets = filled(pair)
    restarted = Pair(pair.client, authority.server_context())
    ticket = tickets.take(pair.client, HOST, 1.0)
    assert ticket is not None
    assert not restarted.shake(ticket.session).session_reused
    tickets.note_use(ticket, resumed=False)
    assert len(tickets) == 0


def test_single_use_is_learned(pair: Pair) -> None:
    """Some servers remember their tickets and take each once."""
    tickets = filled(pair, count=SECOND_USES_DECLINED)
    for _ in range(SECOND_USES_DECLINED):
        for accepted in (True, False):
            ticket = tickets.take(pair.client, HOST, 1.0)
            assert ticket is not None
            tickets.note_use(ticket, resumed=accepted)

    tickets.add(pair.shake(), 1.0)
    ticket = tickets.take(pair.client, HOST, 1.0)
    assert ticket is not None
    tickets.note_use(ticket, resumed=True)
    assert tickets.take(pair.client, HOST, 1.0) is None


def test_a_restart_in_between_is_not_single_use(pair: Pair) -> None:
    tickets = filled(pair, count=2)
    for outcome in (True, True, False, True, False):
        ticket = tickets.take(pair.client, HOST, 1.0)
        assert ticket is not None
        tickets.note_use(ticket, resumed=outcome)
    tickets.add(pair.shake(), 1.0)
    assert [tickets.take(pair.client, HOST, 1.0) is not None for _ in range(2)] == [True, True]


def test_switched_off_nothing_is_kept_or_offered(pair: Pair) -> None:
    tickets = filled(pair)
    tickets.enabled = False
    assert tickets.take(pair.client, HOST, 1.0) is None
    assert not tickets.wanted(pair.client, HOST)


def test_what_works_has_passed_its_trial(pair: Pair) -> None:
    tickets = filled(pair)
    assert tickets.on_trial(pair.client)
    tickets.note_served(pair.client)
    assert tickets.trial is Trial.PASSED
    for _ in range(STRIKES):
        tickets.note_cut(pair.client)
    tickets.note_refused(pair.client, full_served=True)
    assert tickets.trial is Trial.PASSED


def test_a_refusal_that_only_the_resumed_connection_got_ends_resumption(pair: Pair) -> None:
    tickets = filled(pair)
    tickets.note_refused(pair.client, full_served=True)
    assert tickets.trial is Trial.FAILED
    assert tickets.take(pair.client, HOST, 1.0) is None
    assert not tickets.wanted(pair.client, HOST)


def test_a_refusal_that_a_full_connection_got_too_is_the_endpoints(pair: Pair) -> None:
    tickets = filled(pair)
    tickets.note_refused(pair.client, full_served=False)
    assert tickets.trial is Trial.PASSED


def test_three_that_are_cut_before_any_has_worked_are_enough(pair: Pair) -> None:
    tickets = filled(pair)
    for _ in range(STRIKES - 1):
        tickets.note_cut(pair.client)
    assert tickets.on_trial(pair.client)
    tickets.note_cut(pair.client)
    assert tickets.trial is Trial.FAILED


def test_a_new_context_is_a_new_trial(pair: Pair, authority: Authority) -> None:
    tickets = filled(pair)
    tickets.note_refused(pair.client, full_served=True)
    other = authority.client_context()
    tickets.take(other, HOST, 1.0)
    assert tickets.on_trial(other)
    tickets.note_served(pair.client)  # a straggler of the old one
    assert tickets.on_trial(other)
