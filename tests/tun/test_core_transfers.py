"""What thousands of transfers over bad links, and captures of real kernels, have taught: each of these failed first."""

from __future__ import annotations

from tun.testing.playbook import OPEN, OPEN_SACK, Play, tuned


def test_keepalive_leaves_unanswered_bytes_to_their_own_patience(play: Play) -> None:
    """Bytes that are sent again and again for 100 s are a question already, and not five seconds' worth of silence.

    Linux: no keepalive while bytes are unanswered (RFC 9293 3.8.4 wants it so).
    """
    play(
        """
        us  | write 10
        app < P. 1:11(10) ack 1
        app < P. 1:11(10) ack 1      +0.25s
        app < P. 1:11(10) ack 1      +0.5s
        app < P. 1:11(10) ack 1      +1s
        app < P. 1:11(10) ack 1      +2s
        app < P. 1:11(10) ack 1      +4s
        app < P. 1:11(10) ack 1      +8s
        app > .  1:1(0) ack 11       +1s
        us  | delivered
        us  | open
        """,
        begin=OPEN,
        settings=tuned(keepalive_idle=1.0, keepalive_interval=0.5),
    )


def test_every_range_that_a_batch_brings_is_told(play: Play) -> None:
    """One ACK names three or four ranges; what it does not name the kernel takes for lost, and sends again."""
    play(
        """
        us  | full
        app > .  101:201(100) ack 1
        app > .  301:401(100) ack 1
        app > .  501:601(100) ack 1
        app > .  701:801(100) ack 1
        app > .  901:1001(100) ack 1
        app > .  1101:1201(100) ack 1
        us  | free
        app < .  1:1(0) ack 1 sack 101:201 301:401
        app < .  1:1(0) ack 1 sack 1101:1201 901:1001 701:801 501:601
        app > .  1301:1401(100) ack 1
        app < .  1:1(0) ack 1 sack 1301:1401 1101:1201 901:1001 701:801
        """,
        begin=OPEN_SACK,
    )


def test_a_full_device_does_not_make_ranges_untold(play: Play) -> None:
    """What could not be written is told when there is room."""
    play(
        """
        us  | full
        app > .  101:201(100) ack 1
        app > .  301:401(100) ack 1
        app > .  301:401(100) ack 1
        app > .  501:601(100) ack 1
        app > .  701:801(100) ack 1
        us  | free
        app < .  1:1(0) ack 1 sack 101:201
        app < .  1:1(0) ack 1 sack 301:401 701:801 501:601 301:401
        """,
        begin=OPEN_SACK,
    )
