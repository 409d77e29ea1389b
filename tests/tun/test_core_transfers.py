"""What thousands of transfers over bad links, and captures of real kernels, have taught: each of these failed first."""

from __future__ import annotations

from tun.testing.playbook import OPEN, Play, tuned


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
