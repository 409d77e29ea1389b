"""What fuzzing has found in the stack: each of these failed first. The corpora in fuzz/ hold the longer versions."""

from __future__ import annotations

import pytest

from tun.core.stack import Stack, StackSettings
from tun.testing.apppeer import address_bytes
from tun.testing.playbook import OPEN, Play
from tun.wire.checksum import internet_checksum, pseudo_header_sum
from tun.wire.ipv6 import DESTINATION_OPTIONS, PROTOCOL_ICMPV6, build_ipv6

# A moment whose sum with 300 s, less itself, is a little less than 300 s in floating point.
ROUNDS_DOWN = 212.002


@pytest.mark.rule(51)
@pytest.mark.bug("lwIP 39898")
def test_keepalive_is_due_at_the_moment_it_was_set_for(play: Play) -> None:
    """Computed as a difference the idle time fell short by rounding, and the same deadline was set for ever."""
    assert (ROUNDS_DOWN + 300.0) - ROUNDS_DOWN < 300.0

    play(
        """
        +300s app < .  0:0(0) ack 1
        """,
        begin=OPEN,
        start=ROUNDS_DOWN,
    )


def test_a_new_syn_from_somebody_who_may_not_counts_once(play: Play) -> None:
    """The sources that may connect change while a request waits; the app's next attempt is one drop, not two."""
    book = play(
        """
        app > S  0:0(0)
        us  | request 10.107.0.2:443
        """
    )
    book.stack.set_sources(frozenset())

    book.app_initial = 7777
    book.play("app > S  0:0(0)")

    assert book.stack.drops == {"source": 1}


@pytest.mark.rule(43)
def test_a_syn_ack_sent_again_offers_no_smaller_window(play: Play) -> None:
    """Between the two, other flows have made buffers smaller; what was promised stays promised (RFC 9293 3.8.6)."""
    play(
        """
        app > S  0:0(0)        win 65535 mss 1460 wscale 7
        us  | request 10.107.0.2:443
        us  | accept
        app < S. 0:0(0) ack 1  win 8192
        +1s app < S. 0:0(0) ack 1  win 8192
        +2s app < S. 0:0(0) ack 1  win 8192
        """,
        settings=StackSettings(receive_buffer=8192, small_buffer=4096, active_flows=0),
    )


@pytest.mark.rule(61)
def test_old_acks_in_time_wait_are_no_conversation(play: Play) -> None:
    """Each was answered at once; an app that found our answers wrong as well, after one forged FIN, never stopped."""
    play(
        """
        us  | finish
        app < F. 1:1(0) ack 1
        app > .  1:1(0) ack 2
        app > F. 1:1(0) ack 2
        app < .  2:2(0) ack 2
        us  | flow TIME_WAIT
        app > .  1:1(0) ack 2
        app < .  2:2(0) ack 2
        app > .  1:1(0) ack 2
        app > F. 1:1(0) ack 2
        app < .  2:2(0) ack 2
        """,
        begin=OPEN,
    )


@pytest.mark.rule(44)
def test_answers_to_probes_are_no_conversation(play: Play) -> None:
    """A closed window makes each ACK from one byte before ours a probe; a peer answering answers went on for ever."""
    play(
        """
        app > P. 1:4097(4096) ack 1
        app < .  1:1(0) ack 4097  win 0
        app > .  4096:4096(0) ack 1      +0.2s
        app < .  1:1(0) ack 4097  win 0
        app > .  4096:4096(0) ack 1
        app > .  4096:4096(0) ack 1
        app > .  4096:4096(0) ack 1      +0.2s
        app < .  1:1(0) ack 4097  win 0
        """,
        begin=OPEN.replace("app < S. 0:0(0) ack 1  win 65535", "app < S. 0:0(0) ack 1  win 4096"),
        settings=StackSettings(receive_buffer=4096),
    )


@pytest.mark.parametrize(("destination", "reason"), [("fd00::2", "parameter"), ("fd00::99", "no_host")])
def test_an_icmpv6_error_behind_other_headers_is_not_answered_by_one(destination: str, reason: str) -> None:
    """RFC 4443 2.4 (e.1): "packet too big" behind an option that wants an answer, or for an address nobody has."""
    network = int.from_bytes(address_bytes("fd00::"), "big")
    stack = Stack(StackSettings(gateway6=address_bytes("fd00::1"), network6=network, mask6=network), b"k" * 32)
    stack.set_served({address_bytes("fd00::2"): frozenset((443,))})
    app, there = address_bytes("fd00::1"), address_bytes(destination)
    error = bytearray(b"\x02\0\0\0\0\0\x05\0" + bytes(60))
    pseudo = pseudo_header_sum(app, there, PROTOCOL_ICMPV6, len(error))
    error[2:4] = internet_checksum(error, pseudo).to_bytes(2, "big")
    options = bytes((PROTOCOL_ICMPV6, 0, 0x9E, 4)) + b"data"

    stack.handle_packet(
        bytes(build_ipv6(app, there, DESTINATION_OPTIONS, 8 + len(error)) + options + error), 0, False, 1.0
    )

    assert stack.take_replies() == []
    assert stack.drops == {reason: 1}
