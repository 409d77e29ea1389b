"""Time: retransmission, backing off, giving up, keepalive. Every time is literal."""

from __future__ import annotations

import math

import pytest

from tun.testing.playbook import OPEN, OPEN_SACK, OPEN_STAMPS, Play, tuned


@pytest.mark.rule(47)
@pytest.mark.bug("smoltcp 9b9f60b5", "smoltcp f09883d4")
@pytest.mark.scenario("tcp_retransmits")
def test_lost_data_is_resent_with_doubling_gaps(play: Play) -> None:
    """RFC 6298: 250 ms at least, then twice as long each time; only the first segment, not the window."""
    play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app < .  1:1461(1460) ack 1     +0.25s
        app < .  1:1461(1460) ack 1     +0.5s
        app < .  1:1461(1460) ack 1     +1.0s
        app < .  1:1461(1460) ack 1     +2.0s
        app > .  1:1(0) ack 7301 win 512
        us  | delivered
        """,
        begin=OPEN,
    )


@pytest.mark.rule(47, 49)
def test_after_a_timeout_the_rest_follows_its_acks(play: Play) -> None:
    """Slow start from one segment (RFC 5681 3.1): what was lost with it is resent as ACKs come, SACKed bytes not."""
    play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app < .  1:1461(1460) ack 1          +0.25s
        app > .  1:1(0) ack 1461 win 512 sack 4381:5841
        app < .  1461:4381(2920) ack 1
        app > .  1:1(0) ack 5841 win 512
        app < P. 5841:7301(1460) ack 1
        app > .  1:1(0) ack 7301 win 512
        us  | delivered
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.rule(47)
@pytest.mark.bug("smoltcp 13774ff2", "smoltcp a25c9f2f")
def test_timer_restarts_with_every_new_ack(play: Play) -> None:
    """smoltcp let it run from the first segment."""
    play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app > .  1:1(0) ack 1461 win 512   +0.2s
        app > .  1:1(0) ack 2921 win 512   +0.2s
        us  | open                         +0.2s
        app < .  2921:4381(1460) ack 1     +0.05s
        """,
        begin=OPEN,
    )


@pytest.mark.rule(47)
@pytest.mark.scenario("tcp_user_timeout")
def test_data_without_progress_gives_up_after_100_seconds(play: Play) -> None:
    """RFC 9293 3.8.3: R2 is at least 100 s. Then RST, since somebody may listen who only cannot answer."""
    book = play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        """,
        begin=OPEN,
    )
    while book.flow is not None and not book.flow.closed:
        book.now = book.stack.next_deadline()
        book.stack.handle_timeout(book.now)
        book._serve()

    assert book.flow is not None
    assert book.flow.failure == "timeout"
    assert 100.0 <= book.now - 100.0 < 170.0
    assert book._outputs[-1].startswith("R. ")
    assert book.stack.timeouts == 1


@pytest.mark.rule(47)
def test_round_trip_decides_the_timeout(play: Play) -> None:
    """A slow app is waited for: SRTT + 4 RTTVAR (RFC 6298 2)."""
    book = play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 101 win 512    +0.2s
        us  | write 100
        app < P. 101:201(100) ack 1
        """,
        begin=OPEN,
    )
    flow = book.flow
    assert flow is not None

    assert flow.round_trip_s > 0.01
    assert math.isclose(flow._rto, max(flow.round_trip_s + 4 * flow._rttvar, 0.25))
    assert math.isclose(flow._rto_at - book.now, flow._rto)
    assert book.stack.next_deadline() <= flow._rto_at


@pytest.mark.parametrize("begin", [OPEN, OPEN_STAMPS], ids=["plain", "stamps"])
@pytest.mark.rule(47)
def test_what_was_resent_is_not_measured(play: Play, begin: str) -> None:
    """Karn: nobody knows which sending was answered; the doubled timeout stays until a clean measurement."""
    stamp = "ts 1500 ecr 1" if begin == OPEN_STAMPS else ""
    book = play(
        f"""
        us  | write 100
        app < P. 1:101(100) ack 1
        app < P. 1:101(100) ack 1                  +0.25s
        app > .  1:1(0) ack 101 win 512 {stamp}    +0.2s
        us  | write 100
        app < P. 101:201(100) ack 1
        app < P. 101:201(100) ack 1                +0.5s
        app > .  1:1(0) ack 201 win 512 {stamp}
        us  | write 100
        app < P. 201:301(100) ack 1
        app > .  1:1(0) ack 301 win 512 {stamp}
        us  | write 100
        app < P. 301:401(100) ack 1
        app < P. 301:401(100) ack 1                +0.25s
        """,
        begin=begin,
    )
    assert book.flow is not None

    assert book.flow.round_trip_s == 0.0


@pytest.mark.rule(47)
def test_decision_time_is_not_measured(play: Play) -> None:
    """The first round trip is SYN-ACK to ACK; how long the dial took is another matter."""
    book = play("""
        app > S  0:0(0)  win 65535 mss 1460 wscale 7
        us  | request 10.107.0.2:443
        us  | accept                    +2.5s
        app < S. 0:0(0) ack 1
        app > .  1:1(0) ack 1 win 512
    """)
    assert book.flow is not None

    assert book.flow.round_trip_s == 0.0


@pytest.mark.rule(51)
@pytest.mark.bug("Tailscale b0e63cbeb")
def test_keepalive_finds_a_vanished_app(play: Play) -> None:
    """300 s of silence, then a question every 30 s; nine without an answer are enough."""
    script = "".join("        app < .  0:0(0) ack 1     +30s\n" for _ in range(8))
    play(
        f"""
        app < .  0:0(0) ack 1     +300s
{script}
        us  | open                +29s
        app < R. 1:1(0) ack 1     +1s
        us  | failure timeout
        """,
        begin=OPEN,
    )


@pytest.mark.rule(51)
def test_keepalive_is_content_with_any_sign(play: Play) -> None:
    """An answer starts the 300 s anew."""
    play(
        """
        app < .  0:0(0) ack 1     +300s
        app > .  1:1(0) ack 1
        app < .  0:0(0) ack 1     +300s
        app > P. 1:6(5) ack 1 "hello"   +10s
        app < .  1:1(0) ack 6
        us  | open                +299s
        app < .  0:0(0) ack 6     +1s
        """,
        begin=OPEN,
    )


def test_idle_stack_wants_nothing() -> None:
    """No flow, no deadline."""
    from tun.core.stack import Stack, StackSettings

    stack = Stack(StackSettings(), bytes(16))

    assert stack.next_deadline() == math.inf
    stack.handle_timeout(1e9)


def test_old_deadlines_do_not_keep_dead_flows(play: Play) -> None:
    """The heap is lazy; but it must not be a graveyard."""
    book = play("us  | none", settings=tuned(max_flows=100000))
    for port in range(2000):
        book.app_port = 30000 + port
        book.flow = None
        book._app_sends("app > S  0:0(0)  win 65535 mss 1460")
        flow = book.requests.pop()
        book.stack.refuse(flow, book.now)
        book.stack.take_touched()
        book.stack.take_replies()
    book.stack.handle_timeout(book.now)

    assert len(book.stack._host.heap) <= 64
