"""Endings in order: FIN from either side, both at once, half-open for hours, TIME-WAIT and what comes after."""

from __future__ import annotations

import pytest

from tun.testing.playbook import OPEN, OPEN_SACK, OPEN_STAMPS, Play

APP_CLOSED = (
    OPEN
    + """
    app > F. 1:1(0) ack 1
    app < .  1:1(0) ack 2
    us  | flow CLOSE_WAIT
"""
)

WE_CLOSED = (
    OPEN
    + """
    us  | finish
    app < F. 1:1(0) ack 1
    app > .  1:1(0) ack 2
    us  | flow FIN_WAIT_2
"""
)

IN_TIME_WAIT = (
    WE_CLOSED
    + """
    app > F. 1:1(0) ack 2
    app < .  2:2(0) ack 2
    us  | flow TIME_WAIT
    us  | closed
"""
)


# -- the app first ----------------------------------------------------------------------------------------------------


@pytest.mark.rule(52, 54)
def test_app_closes_first(play: Play) -> None:
    """CLOSE-WAIT, LAST-ACK, gone: no TIME-WAIT on our side (RFC 9293 3.6)."""
    book = play(
        """
        us  | finished
        us  | open
        us  | finish
        app < F. 1:1(0) ack 2
        us  | flow LAST_ACK
        us  | open
        app > .  2:2(0) ack 2
        us  | flow CLOSED
        us  | closed
        us  | delivered
        us  | failure none
        """,
        begin=APP_CLOSED,
    )

    assert book.stack.flow_count == 0
    assert book.stack.time_wait_count == 0


@pytest.mark.rule(52)
@pytest.mark.bug("Tailscale 04d24cdbd")
def test_download_after_the_apps_half_close(play: Play) -> None:
    """`curl` sends its request and its end; the answer takes its time."""
    play(
        """
        us  | write 3000           +200s
        app < P. 1:3001(3000) ack 2
        app > .  2:2(0) ack 3001 win 512
        us  | finish
        app < F. 3001:3001(0) ack 2
        app > .  2:2(0) ack 3002
        us  | closed
        """,
        begin=APP_CLOSED,
    )


@pytest.mark.rule(40)
def test_fin_waits_for_what_precedes_it(play: Play) -> None:
    """A FIN beyond a gap is remembered and counts when the gap is filled; what would follow it does not."""
    play(
        """
        app > F. 101:101(0) ack 1
        app < .  1:1(0) ack 1
        us  | flow ESTABLISHED
        app > P. 101:111(10) ack 1
        app < .  1:1(0) ack 1
        app > P. 1:101(100) ack 1
        app < .  1:1(0) ack 102
        us  | flow CLOSE_WAIT
        us  | readable 100
        us  | read 100
        us  | finished
        """,
        begin=OPEN,
    )


@pytest.mark.rule(40, 41)
def test_fin_with_data_beyond_a_gap(play: Play) -> None:
    """The range is reported without the FIN, which holds no byte."""
    play(
        """
        app > FP. 101:201(100) ack 1
        app < .  1:1(0) ack 1 sack 101:201
        app > P. 1:101(100) ack 1
        app < .  1:1(0) ack 202
        us  | read 200
        us  | finished
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.rule(38, 67)
@pytest.mark.bug("smoltcp bde1a1ee")
def test_fin_repeated_with_more_data_before_it(play: Play) -> None:
    """The app resends its last segment and the FIN as one: the overlap is cut, the FIN counts once."""
    play(
        """
        app > P. 1:11(10) ack 1
        app < .  1:1(0) ack 11
        app > FP. 1:21(20) ack 1
        app < .  1:1(0) ack 22
        us  | read 20
        us  | finished
        app > FP. 1:21(20) ack 1
        app < .  1:1(0) ack 22
        us  | flow CLOSE_WAIT
        """,
        begin=OPEN,
    )


@pytest.mark.rule(31, 67)
def test_repeated_fin_is_acknowledged_again(play: Play) -> None:
    """Its sender did not get our ACK."""
    play(
        """
        app > F. 1:1(0) ack 1
        app < .  1:1(0) ack 2
        app > F. 1:1(0) ack 1
        app < .  1:1(0) ack 2
        """,
        begin=APP_CLOSED,
    )


@pytest.mark.rule(50, 67)
@pytest.mark.scenario("tcp_fin_retransmission")
def test_lost_fin_of_ours_is_resent(play: Play) -> None:
    """It needs its ACK like a byte, in LAST-ACK too."""
    play(
        """
        us  | finish
        app < F. 1:1(0) ack 2
        app < F. 1:1(0) ack 2      +0.25s
        app < F. 1:1(0) ack 2      +0.5s
        app > .  2:2(0) ack 2
        us  | closed
        """,
        begin=APP_CLOSED,
    )


@pytest.mark.rule(54)
@pytest.mark.bug("smoltcp 24f94d24", "smoltcp 816a4f96")
def test_last_ack_wants_the_right_ack(play: Play) -> None:
    """smoltcp let any ACK end it."""
    play(
        """
        us  | finish
        app < F. 1:1(0) ack 2
        app > .  2:2(0) ack 1
        us  | flow LAST_ACK
        app > .  2:2(0) ack 2
        us  | closed
        """,
        begin=APP_CLOSED,
    )


# -- we first ---------------------------------------------------------------------------------------------------------


@pytest.mark.rule(53, 55, 58)
@pytest.mark.bug("smoltcp 65e58931", "Tailscale 04d24cdbd")
def test_upload_after_our_half_close(play: Play) -> None:
    """A half-open upload lives for hours: nothing ends FIN-WAIT-2 while its owner is there."""
    play(
        """
        app > P. 1:6(5) ack 2 "hello"    +299s
        app < .  2:2(0) ack 6
        us  | read "hello"
        us  | flow FIN_WAIT_2            +290s
        app > F. 6:6(0) ack 2
        app < .  2:2(0) ack 7
        us  | finished
        us  | closed
        """,
        begin=WE_CLOSED,
    )


@pytest.mark.rule(58)
@pytest.mark.scenario("fin_wait2_timeout")
def test_fin_wait_2_ends_60_s_after_its_owner_left(play: Play) -> None:
    """Linux tcp_fin_timeout: an app that never closes must not keep us."""
    play(
        """
        us  | release
        us  | open            +59.9s
        us  | closed          +0.2s
        us  | failure none
        """,
        begin=WE_CLOSED,
    )


@pytest.mark.rule(59)
def test_data_for_nobody_is_reset(play: Play) -> None:
    """RFC 1122 4.2.2.13: bytes that nobody will read must not be acknowledged as if they were."""
    play(
        """
        us  | release
        app > P. 1:6(5) ack 2 "hello"
        app < R. 2:2(0) ack 1
        us  | failure unread
        """,
        begin=WE_CLOSED,
    )


@pytest.mark.rule(60)
@pytest.mark.scenario("tcp_linger")
def test_release_with_unread_data_is_a_reset(play: Play) -> None:
    """RFC 2525 2.17: a FIN would tell the app that everything was read."""
    play(
        """
        app > P. 1:6(5) ack 1 "hello"
        app < .  1:1(0) ack 6
        us  | release
        app < R. 1:1(0) ack 6
        us  | failure unread
        """,
        begin=OPEN,
    )


@pytest.mark.rule(60)
def test_duplicate_after_release_is_not_unread_data(play: Play) -> None:
    """Linux tcp_close_no_rst.pkt: an old segment again, though nobody reads any more, is only old."""
    play(
        """
        app > P. 1:6(5) ack 1 "hello"
        app < .  1:1(0) ack 6
        us  | read "hello"
        us  | release
        app < F. 1:1(0) ack 6
        app > P. 1:6(5) ack 1 "hello"
        app < .  2:2(0) ack 6
        us  | flow FIN_WAIT_1
        app > F. 6:6(0) ack 2
        app < .  2:2(0) ack 7
        us  | closed
        """,
        begin=OPEN,
    )


@pytest.mark.rule(53, 60)
@pytest.mark.scenario("tcp_linger")
def test_release_sends_what_was_written(play: Play) -> None:
    """The owner may go before the last byte is delivered."""
    play(
        """
        us  | full
        us  | write 3000
        us  | release
        us  | free
        app < FP. 1:3001(3000) ack 1
        app > .  1:1(0) ack 3002 win 512
        us  | delivered
        app > F. 1:1(0) ack 3002
        app < .  3002:3002(0) ack 2
        us  | closed
        """,
        begin=OPEN,
    )


@pytest.mark.rule(50, 56)
@pytest.mark.bug("smoltcp b38faa58", "smoltcp 2219af77")
def test_simultaneous_close(play: Play) -> None:
    """CLOSING: their FIN before the ACK of ours (RFC 9293 3.6 case 3); TIME-WAIT on both sides."""
    play(
        """
        us  | finish
        app < F. 1:1(0) ack 1
        app > F. 1:1(0) ack 1
        app < .  2:2(0) ack 2
        us  | flow CLOSING
        app < F. 1:1(0) ack 2      +0.25s
        app > .  2:2(0) ack 2
        us  | flow TIME_WAIT
        us  | closed
        """,
        begin=OPEN,
    )


@pytest.mark.rule(57)
def test_fin_that_acknowledges_ours(play: Play) -> None:
    """FIN-WAIT-1 straight to TIME-WAIT."""
    play(
        """
        us  | finish
        app < F. 1:1(0) ack 1
        app > F. 1:1(0) ack 2
        app < .  2:2(0) ack 2
        us  | flow TIME_WAIT
        """,
        begin=OPEN,
    )


@pytest.mark.rule(67)
def test_unread_bytes_outlive_the_connection(play: Play) -> None:
    """The reader may be slower than the handshake of closing."""
    play(
        """
        us  | finish
        app < F. 1:1(0) ack 1
        app > FP. 1:6(5) ack 2 "hello"
        app < .  2:2(0) ack 7
        us  | closed
        us  | readable 5
        us  | read "hello"
        us  | finished
        """,
        begin=OPEN,
    )


# -- TIME-WAIT --------------------------------------------------------------------------------------------------------


@pytest.mark.rule(61, 66)
def test_time_wait_lasts_ten_seconds(play: Play) -> None:
    """Our network is one queue: ten seconds are ages."""
    book = play(
        """
        app > .  2:2(0) ack 2    +9.9s
        us  | drops time_wait 1
        app > .  2:2(0) ack 2    +0.2s
        app < R  2:2(0)
        """,
        begin=IN_TIME_WAIT,
    )

    assert book.stack.time_wait_count == 0
    assert book.stack.next_deadline() == float("inf")


@pytest.mark.rule(62, 67)
def test_repeated_fin_in_time_wait_restarts_it(play: Play) -> None:
    """Our last ACK was lost."""
    play(
        """
        app > F. 1:1(0) ack 2    +8s
        app < .  2:2(0) ack 2
        app > F. 1:1(0) ack 2    +8s
        app < .  2:2(0) ack 2
        """,
        begin=IN_TIME_WAIT,
    )


@pytest.mark.rule(63)
@pytest.mark.scenario("tcp_timewait_reset")
def test_reset_does_not_end_time_wait(play: Play) -> None:
    """RFC 1337: assassination; and never is a RST answered."""
    play(
        """
        app > R  2:2(0)
        app > R. 2:2(0) ack 2
        app > F. 1:1(0) ack 2
        app < .  2:2(0) ack 2
        us  | drops time_wait_reset 2
        """,
        begin=IN_TIME_WAIT,
    )


@pytest.mark.rule(25, 64)
def test_newer_syn_leaves_time_wait(play: Play) -> None:
    """Ports are reused within seconds: a number above the old one opens at once, ours lies above the old too."""
    book = play(IN_TIME_WAIT)
    old = book.flow
    assert old is not None

    book.play("""
        us  | new 1000
        app > S  0:0(0)  win 65535 mss 1460 wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1
        us  | flow ESTABLISHED
    """)

    assert book.flow is not None
    assert book.flow is not old
    assert (book.flow.iss - old.snd_nxt) & 0xFFFFFFFF < 0x80000000
    assert book.stack.time_wait_count == 0


@pytest.mark.rule(25, 64)
def test_fast_old_connection_pushes_our_next_number_up(play: Play) -> None:
    """It sent more than our clock of numbers went on: the next one starts above it all the same."""
    book = play(OPEN)
    old = book.flow
    assert old is not None
    old.snd_una += 100_000_000
    old.snd_nxt += 100_000_000
    old._send.start += 100_000_000
    old._send.end += 100_000_000
    old.snd_edge += 100_000_000
    book.play("""
        us  | finish
        app < F. 100000001:100000001(0) ack 1
        app > F. 1:1(0) ack 100000002
        app < .  100000002:100000002(0) ack 2
        us  | new 1000
        app > S  0:0(0)  win 65535 mss 1460 wscale 7
        us  | request 10.107.0.2:443
    """)

    assert book.flow is not None
    assert book.flow is not old
    assert 0 < (book.flow.iss - old.snd_nxt) & 0xFFFFFFFF < 0x80000000


@pytest.mark.parametrize("number", [0, 1, 2])
@pytest.mark.rule(65)
def test_older_syn_in_time_wait_is_challenged(play: Play, number: int) -> None:
    """It may be a ghost of the old connection."""
    play(
        f"""
        app > S  {number}:{number}(0)  win 65535 mss 1460
        app < .  2:2(0) ack 2
        us  | none
        """,
        begin=IN_TIME_WAIT,
    )


@pytest.mark.rule(64, 65)
def test_newer_timestamp_leaves_time_wait(play: Play) -> None:
    """RFC 6191: the timestamp proves what the number cannot; an older one disproves it."""
    stamped = (
        OPEN_STAMPS
        + """
        us  | finish
        app < F. 1:1(0) ack 1
        app > F. 1:1(0) ack 2 ts 2000 ecr 1
        app < .  2:2(0) ack 2
        us  | closed
    """
    )
    play(
        """
        app > S  3:3(0)  win 65535 mss 1460 ts 1999 ecr 0
        app < .  2:2(0) ack 2
        us  | none
        app > S  1:1(0)  win 65535 mss 1460 ts 2001 ecr 0
        us  | request 10.107.0.2:443
        """,
        begin=stamped,
    )
