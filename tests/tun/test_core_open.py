"""The machine from the first SYN to ESTABLISHED: requests, refusals, and handshakes that go wrong."""

from __future__ import annotations

import pytest

from tun.testing.playbook import OPEN, OPEN_SACK, OPEN_STAMPS, Play, tuned
from tun.wire.tcp import SYN, build_tcp

PENDING = """
    app > S  0:0(0)        win 65535 mss 1460 wscale 7
    us  | request 10.107.0.2:443
"""

HALF_OPEN = (
    PENDING
    + """
    us  | accept
    app < S. 0:0(0) ack 1
"""
)


# -- the request ------------------------------------------------------------------------------------------------------


@pytest.mark.rule(27)
@pytest.mark.bug("Tailscale 7429e8912")
def test_syn_ack_waits_for_the_decision(play: Play) -> None:
    """The app gets no SYN-ACK until the owner accepts: an accept that holds, a refusal that is true."""
    play("""
        app > S  0:0(0)        win 64240 mss 1460 wscale 7
        us  | request 10.107.0.2:443
        us  | flow SYN_PENDING
        app > S  0:0(0)        win 64240 mss 1460 wscale 7     +1.0s
        us  | none
        us  | drops duplicate_syn 1
        us  | accept
        app < S. 0:0(0) ack 1  mss 1460 wscale 8
        us  | flow SYN_RECEIVED
        app > .  1:1(0) ack 1
        us  | flow ESTABLISHED
        app > P. 1:6(5) ack 1  "hello"
        app < .  1:1(0) ack 6
        us  | read "hello"
    """)


@pytest.mark.rule(18, 27)
@pytest.mark.bug("zephyr 90086")
def test_refused_request_gets_the_exact_reset(play: Play) -> None:
    """Linux takes only RST with ACK of the SYN as "connection refused"; any other form lets the app hang."""
    play(
        """
        us  | refuse
        app < R. 0:0(0) ack 1
        us  | failure refused
        us  | closed
        """,
        begin=PENDING,
    )


@pytest.mark.rule(27)
def test_app_that_resets_cancels_its_request(play: Play) -> None:
    """A RST in [IRS, IRS+1] before the decision ends the dial; the later decision does nothing."""
    for number in (0, 1):
        play(
            f"""
            app > R  {number}:{number}(0)
            us  | failure cancelled
            us  | closed
            us  | accept
            us  | refuse
            """,
            begin=PENDING,
        )


@pytest.mark.rule(27)
def test_reset_with_a_foreign_number_does_not_cancel(play: Play) -> None:
    """Who cannot see the connection cannot end it."""
    play(
        """
        app > R  2:2(0)
        us  | open
        us  | drops bad_reset 1
        """,
        begin=PENDING,
    )


@pytest.mark.rule(27)
@pytest.mark.bug("Tailscale c5abbcd4b")
def test_silent_app_cancels_its_request_after_three_seconds(play: Play) -> None:
    """A client that closes its socket in SYN-SENT sends nothing: only the missing SYN tells (Linux resends at 1 s)."""
    play(
        """
        us  | open                 +2.9s
        us  | failure cancelled    +0.2s
        """,
        begin=PENDING,
    )


@pytest.mark.rule(27)
def test_patient_app_is_waited_for_as_its_gaps_grow(play: Play) -> None:
    """Linux's gaps double after five seconds; 2.5 times the last one is silence, less is not."""
    play(
        """
        app > S  0:0(0)  win 65535 mss 1460 wscale 7   +1.0s
        app > S  0:0(0)  win 65535 mss 1460 wscale 7   +2.0s
        app > S  0:0(0)  win 65535 mss 1460 wscale 7   +4.0s
        us  | open                 +9.9s
        us  | failure cancelled    +0.2s
        """,
        begin=PENDING,
    )


@pytest.mark.rule(27)
def test_new_number_on_the_same_port_is_a_new_request(play: Play) -> None:
    """The app began anew: its old request is void, and the new one is decided for itself."""
    book = play(PENDING)
    old = book.flow

    book.play("""
        us  | new 5000
        app > S  0:0(0)        win 65535 mss 1460 wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
    """)

    assert old is not None
    assert old.failure == "cancelled"
    assert old.closed
    assert book.stack.undecided_count == 0
    assert book.stack.half_open_count == 1


@pytest.mark.rule(27)
def test_data_before_the_answer_is_refused_or_ignored(play: Play) -> None:
    """Before we answered nothing can be acknowledged: an ACK gets RST, the rest nothing."""
    play(
        """
        app > P  1:6(5)
        app > .  1:1(0) ack 77
        app < R  77:77(0)
        us  | open
        us  | drops before_accept 2
        """,
        begin=PENDING,
    )


@pytest.mark.rule(26)
def test_data_in_the_syn_is_left_to_be_resent(play: Play) -> None:
    """No TFO here: only the SYN is acknowledged (RFC 9293 3.10.7.2 lets us), the data comes again."""
    play("""
        app > S  0:5(5)        win 65535 mss 1460 wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1
        us  | readable 0
    """)


@pytest.mark.rule(16)
def test_ecn_and_reserved_bits_do_not_matter(play: Play) -> None:
    """A SYN with ECE and CWR is a SYN (gVisor rejected them and broke forwarders)."""
    book = play("us  | none")
    syn = build_tcp(book.app, book.endpoint, 40000, 443, seq=0, flags=SYN, window=1)
    syn[book.ip_header + 12] |= 0x0F
    syn[book.ip_header + 13] |= 0xC0
    book.stack.handle_packet(bytes(syn), 0, True, book.now)

    assert len(book.stack.take_requests()) == 1


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.ipv4
@pytest.mark.rule(22, 23)
@pytest.mark.bug("lwIP 37969")
@pytest.mark.scenario("tcp_cork_mss")
def test_no_options_means_the_defaults(play: Play) -> None:
    """No window scale offered: none answered and none used; no MSS: 536 (RFC 9293 MUST-15)."""
    play("""
        app > S  0:0(0)        win 4000
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1  win 65535 mss 1460
        app > .  1:1(0) ack 1  win 4000
        us  | write 1000
        app < P. 1:1001(1000) ack 1  win 65535 gso 536
    """)


@pytest.mark.parametrize(("offered", "used"), [(1, 48), (47, 48), (48, 48), (1400, 1400), (65535, 1460)])
@pytest.mark.rule(22)
@pytest.mark.bug("smoltcp 43697943")
def test_mss_is_clamped(play: Play, offered: int, used: int) -> None:
    """Tiny ones would make us send headers, huge ones do not fit our link."""
    play(f"""
        app > S  0:0(0)        win 65535 mss {offered} wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1
        us  | write 3000
        app < P. 1:3001(3000) ack 1  gso {used}
    """)


@pytest.mark.rule(22)
@pytest.mark.bug("smoltcp 43697943")
def test_an_mss_of_zero_is_none(play: Play) -> None:
    """So the least of the version counts: 536, or 1220."""
    book = play("""
        app > S  0:0(0)        win 65535 mss 0 wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1
    """)

    book.play(f"""
        us  | write 3000
        app < P. 1:3001(3000) ack 1  gso {536 if book.version == 4 else 1220}
    """)


@pytest.mark.rule(23)
def test_window_scale_beyond_14_counts_as_14(play: Play) -> None:
    """RFC 7323 2.3."""
    book = play("""
        app > S  0:0(0)        win 65535 mss 1460 wscale 200
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1  win 3
    """)

    assert book.flow is not None
    assert book.flow.snd_edge - book.flow.snd_una == 3 << 14


@pytest.mark.rule(23)
@pytest.mark.scenario("tcp_handshake_window_size")
def test_windows_in_the_handshake_are_not_scaled(play: Play) -> None:
    """RFC 7323 2.2, which both sides of smoltcp once got wrong: the SYN's window counts bytes, the next one units."""
    book = play("""
        app > S  0:0(0)        win 1000 mss 1460 wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1  win 65535 wscale 8
    """)
    assert book.flow is not None
    assert book.flow.rcv_edge - book.flow.rcv_nxt == 65535

    book.play("app > .  1:1(0) ack 1  win 1000")

    assert book.flow.snd_edge - book.flow.snd_una == 1000 << 7


@pytest.mark.rule(22, 24)
@pytest.mark.bug("smoltcp 16100ffb")
def test_timestamps_are_answered_with_what_came(play: Play) -> None:
    """RFC 7323 3.2: once negotiated every segment carries them, and they come off the MSS."""
    play(
        """
        app > P. 1:6(5) ack 1 ts 1005 ecr 1 "hello"
        app < .  1:1(0) ack 6 ecr 1005
        us  | write 3000
        app < P. 1:3001(3000) ack 6 ecr 1005 gso 1448
        """,
        begin=OPEN_STAMPS,
    )


@pytest.mark.ipv4
@pytest.mark.rule(22)
def test_our_mss_follows_the_link(play: Play) -> None:
    """A link of 65535 bytes takes segments of 65495, and more is never said (RFC 9293 3.7.1)."""
    play(
        """
        app > S  0:0(0)        win 65535 mss 65495 wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1  mss 65495
        """,
        settings=tuned(mtu=65535),
    )


# -- SYN-RECEIVED -----------------------------------------------------------------------------------------------------


@pytest.mark.rule(28)
def test_syn_ack_is_resent_and_then_forgotten(play: Play) -> None:
    """At 0, 1, 3, 7 and 15 s; freed without a word at 31 s."""
    play(
        """
        app < S. 0:0(0) ack 1   +1.0s
        app < S. 0:0(0) ack 1   +2.0s
        app < S. 0:0(0) ack 1   +4.0s
        app < S. 0:0(0) ack 1   +8.0s
        us  | open              +15.9s
        us  | failure timeout   +0.2s
        us  | closed
        """,
        begin=HALF_OPEN,
    )


@pytest.mark.rule(28)
def test_duplicate_syn_gets_the_same_syn_ack(play: Play) -> None:
    """The app missed it; but twice a second is enough, or we amplify."""
    play(
        """
        app > S  0:0(0)        win 65535 mss 1460 wscale 7   +0.6s
        app < S. 0:0(0) ack 1  mss 1460 wscale 8
        app > S  0:0(0)        win 65535 mss 1460 wscale 7   +0.1s
        us  | drops duplicate_syn 2
        us  | flow SYN_RECEIVED
        """,
        begin=HALF_OPEN,
    )


@pytest.mark.rule(33)
def test_other_syn_in_syn_received_is_challenged(play: Play) -> None:
    """RFC 5961 4: an app that really began anew answers our ACK with the RST that frees the place."""
    play(
        """
        app > S  9000:9000(0)  win 65535
        app < .  1:1(0) ack 1
        app > R  1:1(0)
        us  | failure reset
        """,
        begin=HALF_OPEN,
    )


@pytest.mark.parametrize("number", [0, 2, 1000, -5])
@pytest.mark.rule(28)
@pytest.mark.bug("smoltcp f95b0bf6", "gVisor 45835a60f")
@pytest.mark.scenario("tcp_acceptable_ack_syn_rcvd")
def test_wrong_ack_of_the_syn_ack_is_reset(play: Play, number: int) -> None:
    """RFC 9293 3.10.7.4: RST with the number it claims, and we stay where we are."""
    play(
        f"""
        app > .  1:1(0) ack {number}
        app < R  {number}:{number}(0)
        us  | flow SYN_RECEIVED
        app > .  1:1(0) ack 1
        us  | flow ESTABLISHED
        """,
        begin=HALF_OPEN,
    )


@pytest.mark.rule(28, 32)
@pytest.mark.scenario("tcp_synrcvd_reset")
def test_reset_in_syn_received(play: Play) -> None:
    """Exactly the next number frees it; elsewhere in the window is challenged; outside is nobody."""
    play(
        """
        app > R  70000:70000(0)
        app > R  50:50(0)
        app < .  1:1(0) ack 1
        us  | flow SYN_RECEIVED
        app > R. 1:1(0) ack 1
        us  | failure reset
        app > .  1:1(0) ack 1
        app < R  1:1(0)
        """,
        begin=HALF_OPEN,
    )


@pytest.mark.rule(28, 67)
@pytest.mark.bug("gVisor 03f17c7d9")
def test_data_and_fin_may_come_with_the_last_ack(play: Play) -> None:
    """The ACK that ends the handshake is a segment like any other (gVisor had to learn it)."""
    play(
        """
        app > PF. 1:6(5) ack 1  "hello"
        app < .  1:1(0) ack 7
        us  | flow CLOSE_WAIT
        us  | read "hello"
        us  | finished
        """.replace("PF.", "FP."),
        begin=HALF_OPEN,
    )


@pytest.mark.rule(28)
def test_lost_last_ack_is_made_up_by_data(play: Play) -> None:
    """The app thinks it is connected, sends, and that is as good as the ACK."""
    play(
        """
        app > P. 1:6(5) ack 1  "hello"
        app < .  1:1(0) ack 6
        us  | flow ESTABLISHED
        """,
        begin=HALF_OPEN,
    )


@pytest.mark.rule(50, 67)
def test_owner_may_write_and_finish_before_the_handshake_ends(play: Play) -> None:
    """A server that speaks first: its bytes wait for the ACK, and so does its FIN."""
    play(
        """
        us  | write "220 ready"
        us  | finish
        us  | flow SYN_RECEIVED
        app > .  1:1(0) ack 1
        app < FP. 1:10(9) ack 1 "220 ready"
        us  | flow FIN_WAIT_1
        """,
        begin=HALF_OPEN,
    )


def test_owner_may_abort_before_the_handshake_ends(play: Play) -> None:
    """The app sees a reset, or a refusal where it has not seen our SYN-ACK."""
    play(
        """
        us  | abort
        app < R. 1:1(0) ack 1
        us  | failure aborted
        """,
        begin=HALF_OPEN,
    )


# -- no connection ----------------------------------------------------------------------------------------------------


@pytest.mark.rule(18)
@pytest.mark.bug("zephyr 90086")
def test_closed_port_is_refused_exactly(play: Play) -> None:
    """No connection, port not served (RFC 9293 3.10.7.1): each kind of segment has its own answer."""
    play("""
        us  | serve 80
        app > S  100:100(0)
        app < R. 0:0(0) ack 101
        app > S  100:110(10)
        app < R. 0:0(0) ack 111
        app > SF 100:100(0)
        app < R. 0:0(0) ack 102
        app > SF. 100:100(0) ack 7
        app < R  7:7(0)
        app > .  100:100(0) ack 7
        app < R  7:7(0)
        app > F  100:100(0)
        app < R. 0:0(0) ack 101
        app > R  100:100(0)
        app > R. 100:100(0) ack 7
        us  | none
    """)


@pytest.mark.rule(17, 19, 29)
@pytest.mark.bug("smoltcp c573e9b3", "gVisor 77dc0f5bc")
def test_served_port_without_a_connection_is_silent_but_for_acks(play: Play) -> None:
    """LISTEN (RFC 9293 3.10.7.2) differs from CLOSED: what is neither SYN nor ACK nor RST is dropped silently."""
    play("""
        app > F  100:100(0)
        app > U  100:105(5)
        app > none 100:105(5)
        app > SF 100:100(0)
        app > R  100:100(0)
        app > S. 100:100(0) ack 7
        app < R  7:7(0)
        app > .  100:100(0) ack 7
        app < R  7:7(0)
        us  | none
        us  | drops stray 3
        us  | drops syn_fin 1
    """)


@pytest.mark.rule(21)
def test_draining_refuses_new_and_keeps_old(play: Play) -> None:
    """New connections are refused while we leave; those that are open go on."""
    play(
        """
        us  | draining
        app > P. 1:6(5) ack 1  "hello"
        app < .  1:1(0) ack 6
        us  | read "hello"
        """,
        begin=OPEN,
    )
    play("""
        us  | draining
        app > S  0:0(0)  win 65535
        app < R. 0:0(0) ack 1
        us  | none
    """)


@pytest.mark.parametrize("begin", [OPEN, OPEN_SACK, OPEN_STAMPS], ids=["plain", "sack", "stamps"])
@pytest.mark.parametrize("app_initial", [0, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
@pytest.mark.parametrize("our_initial", [0, 0x7FFFFFFF, 0xFFFFFFFE, 0xFFFFFFFF])
@pytest.mark.rule(38, 41)
@pytest.mark.bug("smoltcp 25d4f7c5", "smoltcp 78fb02ac")
def test_numbers_wrap_anywhere(play: Play, begin: str, app_initial: int, our_initial: int) -> None:
    """Sequence numbers are modulo 2**32 (RFC 9293 3.4): where a connection starts changes nothing."""
    stamp = "ts 1001 ecr 1" if begin == OPEN_STAMPS else ""
    sack = "" if begin == OPEN else "sack 2001:3001"
    play(
        f"""
        app > P. 1:1001(1000) ack 1 {stamp}
        app < .  1:1(0) ack 1001
        app > P. 2001:3001(1000) ack 1 {stamp}
        app < .  1:1(0) ack 1001 {sack}
        us  | write 3000
        app < P. 1:3001(3000) ack 1001
        app > P. 1001:2001(1000) ack 3001 win 512 {stamp}
        app < .  3001:3001(0) ack 3001
        us  | read 3000
        us  | finish
        app < F. 3001:3001(0) ack 3001
        app > F. 3001:3001(0) ack 3002 {stamp}
        app < .  3002:3002(0) ack 3002
        us  | closed
        """,
        begin=begin,
        app_initial=app_initial,
        our_initial=our_initial,
    )
