"""Endings out of order: RST from either side, and those who would like to send one and cannot see us."""

from __future__ import annotations

import pytest

from tun.testing.playbook import OPEN, Play

STATES = {
    "ESTABLISHED": OPEN,
    "FIN_WAIT_1": OPEN
    + """
        us  | finish
        app < F. 1:1(0) ack 1
    """,
    "FIN_WAIT_2": OPEN
    + """
        us  | finish
        app < F. 1:1(0) ack 1
        app > .  1:1(0) ack 2
    """,
    "CLOSE_WAIT": OPEN
    + """
        app > F. 1:1(0) ack 1
        app < .  1:1(0) ack 2
    """,
    "CLOSING": OPEN
    + """
        us  | finish
        app < F. 1:1(0) ack 1
        app > F. 1:1(0) ack 1
        app < .  2:2(0) ack 2
    """,
    "LAST_ACK": OPEN
    + """
        app > F. 1:1(0) ack 1
        app < .  1:1(0) ack 2
        us  | finish
        app < F. 1:1(0) ack 2
    """,
}
SEQ = {"ESTABLISHED": 1, "FIN_WAIT_1": 2, "FIN_WAIT_2": 2, "CLOSE_WAIT": 1, "CLOSING": 2, "LAST_ACK": 2}
NEXT = {"ESTABLISHED": 1, "FIN_WAIT_1": 1, "FIN_WAIT_2": 1, "CLOSE_WAIT": 2, "CLOSING": 2, "LAST_ACK": 2}


@pytest.mark.parametrize("state", STATES)
@pytest.mark.rule(32, 67)
def test_exact_reset_ends_every_state(play: Play, state: str) -> None:
    """RFC 5961 3.2: only RCV.NXT exactly; both directions, at once, without a word."""
    book = play(
        f"""
        us  | flow {state}
        app > R  {NEXT[state]}:{NEXT[state]}(0)
        us  | failure reset
        us  | closed
        us  | readable 0
        """,
        begin=STATES[state],
    )

    assert book.stack.flow_count == 0
    assert book.stack.resets_received == 1


@pytest.mark.parametrize("state", STATES)
@pytest.mark.rule(32, 34)
@pytest.mark.bug("smoltcp f6a73807", "gVisor 484ef1208", "lwIP 48170")
def test_inexact_reset_is_challenged(play: Play, state: str) -> None:
    """In the window: asked to prove itself, twice a second at most; outside: silence."""
    following = NEXT[state]
    play(
        f"""
        app > R  {following + 1}:{following + 1}(0)
        app < .  {SEQ[state]}:{SEQ[state]}(0) ack {following}
        app > R  {following + 60000}:{following + 60000}(0)
        app > R  {following - 1}:{following - 1}(0)
        app > R  {following + 100000}:{following + 100000}(0)
        us  | flow {state}
        """,
        begin=STATES[state],
    )


@pytest.mark.rule(32, 34)
@pytest.mark.bug("lwIP 48170", "smoltcp eae48052")
def test_sweep_of_resets_finds_nothing(play: Play) -> None:
    """A blind attacker steps through the numbers: at most two answers a second, and no end."""
    script = "\n".join(f"app > R  {number}:{number}(0)" for number in range(2, 2**32, 2**32 // 500))
    play(
        f"""
        app > R  3:3(0)
        app < .  1:1(0) ack 1
        {script}
        us  | flow ESTABLISHED
        """,
        begin=OPEN,
    )


@pytest.mark.rule(34)
def test_challenges_of_flows_do_not_depend_on_each_other(play: Play) -> None:
    """CVE-2016-5696: a limit shared between flows tells a third what it should not know."""
    from tun.testing.playbook import Playbook

    book = play(
        """
        app > R  3:3(0)
        app < .  1:1(0) ack 1
        app > R  3:3(0)
        """,
        begin=OPEN,
    )
    other = Playbook(app_port=40001, version=book.version)
    other.stack = book.stack
    other.now = book.now

    other.play(OPEN)
    other.play("""
        app > R  3:3(0)
        app < .  1:1(0) ack 1
    """)


@pytest.mark.rule(32)
@pytest.mark.bug("gVisor 1727a24b2")
def test_received_reset_drops_what_waits(play: Play) -> None:
    """Both directions are flushed: the owner must not take a truncated stream for a whole one."""
    book = play(
        """
        app > P. 1:6(5) ack 1 "hello"
        app < .  1:1(0) ack 6
        us  | write 100000
        app < .  1:64241(64240) ack 6
        app < P. 64241:100001(35760) ack 6
        app > R  6:6(0)
        us  | readable 0
        us  | space 0
        us  | failure reset
        """,
        begin=OPEN,
    )

    assert book.stack.buffered_bytes == 0


@pytest.mark.rule(18)
@pytest.mark.scenario("tcp_linger")
def test_abort_sends_the_reset_the_kernel_believes(play: Play) -> None:
    """With the next number exactly; and nothing after it."""
    play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        us  | abort
        app < R. 101:101(0) ack 1
        us  | failure aborted
        us  | abort
        us  | finish
        us  | release
        app > .  1:1(0) ack 101
        app < R  101:101(0)
        """,
        begin=OPEN,
    )


def test_reset_waits_for_the_device(play: Play) -> None:
    """A full device delays it; it is owed still."""
    play(
        """
        us  | full
        us  | abort
        us  | free
        app < R. 1:1(0) ack 1
        us  | closed
        """,
        begin=OPEN,
    )


@pytest.mark.rule(18, 19)
def test_reset_is_never_answered(play: Play) -> None:
    """Two stacks would answer each other for ever."""
    play(
        """
        us  | abort
        app < R. 1:1(0) ack 1
        app > R. 1:1(0) ack 1
        app > R  1:1(0)
        us  | drops stray_reset 2
        """,
        begin=OPEN,
    )


@pytest.mark.rule(20)
def test_stray_acks_are_answered_within_limits(play: Play) -> None:
    """Stateless answers are 500 a second at most, or our own packets thrown back at us would make a loop."""
    book = play("us  | none")
    book.stack.set_served({})
    for _ in range(1000):
        book._app_sends("app > .  1:1(0) ack 1")

    from tun.testing.playbook import ENDPOINT

    book.stack.set_served({ENDPOINT: frozenset((80,))})
    for _ in range(1000):
        book._app_sends("app > .  1:1(0) ack 1")

    assert len(book.stack.take_replies()) <= 50 + 100
