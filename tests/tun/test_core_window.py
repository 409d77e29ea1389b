"""Windows: ours, which closes when nobody reads, and the app's, which we fill, probe and never overrun."""

from __future__ import annotations

import random

import pytest

from tun.seq import MASK
from tun.testing.playbook import APP, ENDPOINT, OPEN, OPEN_SACK, Play, Playbook, pattern, tuned
from tun.wire.tcp import ACK, build_tcp

# -- ours -------------------------------------------------------------------------------------------------------------


@pytest.mark.rule(43)
@pytest.mark.bug("smoltcp fe179c91", "gVisor 7ea2dcbae")
@pytest.mark.scenario("tcp_rcv_buf_space", "tcp_zero_to_nonzero_window_update")
def test_window_closes_when_nobody_reads(play: Play) -> None:
    """A reader that stops makes the app stop: we advertise zero, and say so when there is room again."""
    play(
        """
        app > P. 1:32769(32768) ack 1
        app < .  1:1(0) ack 32769  win 128
        app > P. 32769:65537(32768) ack 1
        app < .  1:1(0) ack 65537  win 0
        us  | readable 65536
        us  | read 1000
        us  | read 1919
        us  | read 1
        app < .  1:1(0) ack 65537  win 11
        us  | read 62616
        app < .  1:1(0) ack 65537  win 256
        """,
        begin=OPEN,
        settings=tuned(receive_buffer=65536),
    )


@pytest.mark.rule(43)
@pytest.mark.bug("gVisor 7ea2dcbae")
def test_no_update_while_the_app_knows_of_enough(play: Play) -> None:
    """Each update costs the app an interrupt: none while the window it knows is not small (RFC 9293 3.8.6.2.2)."""
    play(
        """
        app > P. 1:1001(1000) ack 1
        app < .  1:1(0) ack 1001  win 2044
        us  | read 1000
        app > P. 1001:2001(1000) ack 1
        app < .  1:1(0) ack 2001
        """,
        begin=OPEN,
    )


@pytest.mark.rule(44)
@pytest.mark.bug("gVisor 91a283f8f")
def test_zero_window_probe_is_answered(play: Play) -> None:
    """Empty from before the edge as Linux probes, or with a byte as the RFC says: each gets the window of now."""
    play(
        """
        app > P. 1:32769(32768) ack 1
        app < .  1:1(0) ack 32769
        app > P. 32769:65537(32768) ack 1
        app < .  1:1(0) ack 65537  win 0
        app > .  65536:65536(0) ack 1      +0.2s
        app < .  1:1(0) ack 65537  win 0
        app > .  65536:65536(0) ack 1      +0.4s
        app < .  1:1(0) ack 65537  win 0
        app > .  65537:65538(1) ack 1      +0.8s
        app < .  1:1(0) ack 65537  win 0
        us  | readable 65536
        """,
        begin=OPEN,
        settings=tuned(receive_buffer=65536),
    )


@pytest.mark.rule(44)
def test_ack_in_a_probe_counts(play: Play) -> None:
    """RFC 9293 3.10.7.4: with a closed window valid ACKs are taken, or our own bytes would be resent for ever."""
    play(
        """
        app > P. 1:32769(32768) ack 1
        app < .  1:1(0) ack 32769
        app > P. 32769:65537(32768) ack 1
        app < .  1:1(0) ack 65537  win 0
        us  | write 100
        app < P. 1:101(100) ack 65537
        app > .  65537:65538(1) ack 101
        app < .  101:101(0) ack 65537  win 0
        us  | delivered
        """,
        begin=OPEN,
        settings=tuned(receive_buffer=65536),
    )


@pytest.mark.rule(31)
@pytest.mark.bug("smoltcp 284a2c97")
def test_bare_fin_is_taken_though_the_window_is_closed(play: Play) -> None:
    """Linux does so: else a FIN and our ACK chase each other until the reader wakes."""
    play(
        """
        app > P. 1:32769(32768) ack 1
        app < .  1:1(0) ack 32769
        app > P. 32769:65537(32768) ack 1
        app < .  1:1(0) ack 65537  win 0
        app > F. 65537:65537(0) ack 1
        app < .  1:1(0) ack 65538
        us  | flow CLOSE_WAIT
        """,
        begin=OPEN,
        settings=tuned(receive_buffer=65536),
    )


@pytest.mark.parametrize("offset", [0, 1, 2])
@pytest.mark.rule(31)
@pytest.mark.bug("smoltcp 9d532a7b")
@pytest.mark.scenario("tcp_outside_the_window")
def test_segments_at_and_beyond_the_right_edge(play: Play, offset: int) -> None:
    """Data, SYN and SYN-ACK from the edge on are answered, and not taken; an empty segment at the edge is fine."""
    edge = 2 + 65536 + offset
    script = f"""
        app > P. 1:2(1) ack 1
        app < .  1:1(0) ack 2  win 256
        us  | read 1
        app > P. {edge}:{edge + 10}(10) ack 1
        app < .  1:1(0) ack 2  win 256
        app > S  {edge}:{edge}(0)
        app < .  1:1(0) ack 2
        app > S. {edge}:{edge}(0) ack 1           +0.6s
        app < .  1:1(0) ack 2
        app > .  {edge}:{edge}(0) ack 1           +0.6s
    """
    if offset:
        script += """
        app < .  1:1(0) ack 2
        """
    script += f"""
        app > .  {edge}:{edge}(0) ack 1           +0.1s
        app > F  {edge}:{edge}(0)                 +0.6s
        us  | readable 0
    """
    play(script, begin=OPEN, settings=tuned(receive_buffer=65536))


@pytest.mark.rule(31)
@pytest.mark.bug("smoltcp f56ed8b4")
def test_data_is_cut_at_the_right_edge(play: Play) -> None:
    """smoltcp once took what lay beyond; the FIN behind it goes with it, and comes again."""
    play(
        """
        app > P. 1:32769(32768) ack 1
        app < .  1:1(0) ack 32769 win 128
        app > FP. 32769:65542(32773) ack 1
        app < .  1:1(0) ack 65537 win 0
        us  | readable 65536
        us  | flow ESTABLISHED
        us  | read 65536
        app < .  1:1(0) ack 65537 win 256
        app > FP. 65537:65542(5) ack 1
        app < .  1:1(0) ack 65543
        us  | read 5
        us  | finished
        """,
        begin=OPEN,
        settings=tuned(receive_buffer=65536),
    )


@pytest.mark.rule(43)
@pytest.mark.bug("lwIP 45559")
def test_right_edge_never_moves_left(play: Play) -> None:
    """RFC 9293 SHLD-14: not by rounding, not by shrinking buffers, not when memory is short."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    flow = book.flow
    assert flow is not None
    random_sizes = random.Random(7)
    edges: list[int] = []

    def write(header: bytearray, views: object, gso: int) -> bool:
        ack, window = header[book.ip_header + 8 :][:4], header[book.ip_header + 14 :][:2]
        edges.append(int.from_bytes(ack, "big") + (int.from_bytes(window, "big") << 8))
        return True

    position = 1
    for step in range(500):
        size = random_sizes.choice((1, 7, 100, 1460, 9000))
        if step == 200:
            book.stack._host.budget.receive_cap = 65536
        if position + size > flow.rcv_edge:
            flow.consume(flow.readable_bytes, book.now)
        else:
            packet = build_tcp(
                book.app, book.endpoint, 40000, 443, seq=position, ack=flow.snd_nxt & MASK, flags=ACK, window=512,
                payload=pattern(position, size),
            )  # fmt: skip
            position += size
            book.stack.handle_packet(bytes(packet), 0, True, book.now)
            if random_sizes.random() < 0.3:
                flow.consume(random_sizes.randint(0, flow.readable_bytes), book.now)
        book.stack.take_touched()
        book.stack.flush(flow, write, book.now)  # type: ignore[arg-type]

    assert edges == sorted(edges)
    assert flow.bytes_from_app == position - 1


@pytest.mark.rule(43)
def test_single_bytes_cannot_overfill_the_buffer(play: Play) -> None:
    """Rounding up the window by each byte must end: the buffer is a bound, whatever the scale."""
    book = play("us  | flow ESTABLISHED", begin=OPEN, settings=tuned(receive_buffer=65536))
    flow = book.flow
    assert flow is not None
    for position in range(1, 200_000):
        packet = build_tcp(
            APP, ENDPOINT, 40000, 443, seq=position, ack=flow.snd_nxt & MASK, flags=ACK, window=512, payload=b"x"
        )
        book.stack.handle_packet(bytes(packet), 0, True, book.now)
        for touched in book.stack.take_touched():
            book.stack.flush(touched, lambda *_: True, book.now)
        if flow.rcv_nxt <= position:
            break

    assert flow.readable_bytes <= 65536 + 65536 + 512
    assert len(flow.readable_views()) < 40


def test_many_active_flows_get_smaller_buffers() -> None:
    """256 KiB above 64 active flows; those that are idle do not count."""
    book = Playbook()
    book.play(OPEN)
    stack = book.stack
    assert stack._host.budget.receive_cap == 512 * 1024
    assert book.flow is not None
    stack._epoch_flows = 65

    stack.flush(book.flow, lambda *_: True, book.now + 1.0)

    assert stack._host.budget.receive_cap == 256 * 1024
    assert stack._host.budget.send_cap == 256 * 1024
    stack.flush(book.flow, lambda *_: True, book.now + 2.0)
    assert stack._host.budget.receive_cap == 512 * 1024


# -- the app's --------------------------------------------------------------------------------------------------------


@pytest.mark.rule(45)
@pytest.mark.bug("smoltcp 2080152b")
def test_segments_end_at_the_apps_window(play: Play) -> None:
    """A segment larger than the window is split, not dropped; what does not fit waits."""
    play(
        """
        app > .  1:1(0) ack 1 win 16
        us  | write 3000
        app < .  1:1461(1460) ack 1
        app > .  1:1(0) ack 1461 win 16
        app < P. 1461:3001(1540) ack 1
        """,
        begin=OPEN,
    )


@pytest.mark.rule(45)
def test_silly_windows_are_not_filled(play: Play) -> None:
    """RFC 9293 3.8.6.2.1: less than a segment, less than half of the largest window, and more to come: wait."""
    play(
        """
        app > .  1:1(0) ack 1 win 10
        us  | write 5000
        us  | readable 0
        app > .  1:1(0) ack 1 win 512
        app < P. 1:5001(5000) ack 1
        """,
        begin=OPEN,
    )


@pytest.mark.rule(46)
@pytest.mark.bug("lwIP 49533")
def test_persist_timer_sends_what_a_small_window_takes(play: Play) -> None:
    """A window that stays small must not stop us for ever (lwIP bug 49533)."""
    play(
        """
        app > .  1:1(0) ack 1 win 10
        us  | write 5000
        app < .  1:1281(1280) ack 1          +0.25s
        app > .  1:1(0) ack 1281 win 10
        app < .  1281:2561(1280) ack 1       +0.25s
        """,
        begin=OPEN,
    )


@pytest.mark.rule(46)
@pytest.mark.bug("smoltcp ddc495ba", "lwIP 50837")
@pytest.mark.scenario("tcp_zero_window_probe", "tcp_zero_window_probe_retransmit")
def test_closed_window_is_probed(play: Play) -> None:
    """From 250 ms on, doubling to 60 s, for as long as somebody answers; a byte that it has, so it must answer."""
    play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 101 win 0
        us  | write 100
        app < .  100:101(1) ack 1   +0.25s
        app > .  1:1(0) ack 101 win 0
        app < .  100:101(1) ack 1   +0.5s
        app > .  1:1(0) ack 101 win 0
        app < .  100:101(1) ack 1   +1.0s
        app > .  1:1(0) ack 101 win 0
        app < .  100:101(1) ack 1   +2.0s
        app > .  1:1(0) ack 101 win 0
        app > .  1:1(0) ack 101 win 512
        app < P. 101:201(100) ack 1
        app > .  1:1(0) ack 201 win 512
        us  | delivered
        """,
        begin=OPEN,
    )


@pytest.mark.rule(46)
def test_closed_window_is_probed_for_an_hour(play: Play) -> None:
    """RFC 9293 MUST-37: a stopped reader is no dead one."""
    book = play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 101 win 0
        us  | write 100
        """,
        begin=OPEN,
    )
    probes = 0
    while book.now < 3700:
        book.now = book.stack.next_deadline()
        book.stack.handle_timeout(book.now)
        book._serve()
        if book._outputs:
            assert book._outputs == ["P. 100:101(1) ack 1 win 2048"] or book._outputs[0].startswith(". 100:101(1)")
            book._outputs.clear()
            probes += 1
            book._app_sends("app > .  1:1(0) ack 101 win 0")
            book._serve()
    assert 60 < probes < 75

    book.play("""
        us  | open
        app > .  1:1(0) ack 101 win 512
        app < P. 101:201(100) ack 1
    """)


def test_patience_with_a_closed_window_is_not_kept_for_lost_data(play: Play) -> None:
    """The gaps between probes had doubled; what is sent when the window opens has a timeout of its own."""
    play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 101 win 0
        us  | write 100
        app < .  100:101(1) ack 1   +0.25s
        app > .  1:1(0) ack 101 win 0
        app < .  100:101(1) ack 1   +0.5s
        app > .  1:1(0) ack 101 win 0
        app < .  100:101(1) ack 1   +1.0s
        app > P. 1:11(10) ack 101 win 512
        app < P. 101:201(100) ack 11
        app < P. 101:201(100) ack 11     +0.25s
        """,
        begin=OPEN,
    )


@pytest.mark.rule(46)
@pytest.mark.scenario("tcp_zero_window_probe_usertimeout")
def test_silence_behind_a_closed_window_ends(play: Play) -> None:
    """Nobody answers the probes for 100 s: it is gone, and its memory is wanted."""
    book = play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 101 win 0
        us  | write 100
        """,
        begin=OPEN,
    )
    while not book.flow.closed and book.now < 1000:  # type: ignore[union-attr]
        book.now = book.stack.next_deadline()
        book.stack.handle_timeout(book.now)
        book._serve()

    assert book.flow is not None
    assert book.flow.failure == "timeout"
    assert 100 <= book.now - 100.0 <= 200
    assert book._outputs[-1].startswith("R. ")


@pytest.mark.rule(46)
@pytest.mark.scenario("tcp_zero_window_probe")
def test_no_probe_without_data(play: Play) -> None:
    """A closed window is nobody's business while there is nothing to say."""
    play(
        """
        app > .  1:1(0) ack 1 win 0
        us  | open     +200s
        """,
        begin=OPEN,
    )


@pytest.mark.rule(46, 50)
def test_fin_does_not_wait_for_a_window(play: Play) -> None:
    """It takes no room; behind a closed window it must still be told (gVisor left such flows open for ever)."""
    play(
        """
        app > .  1:1(0) ack 1 win 0
        us  | finish
        app < F. 1:1(0) ack 1
        us  | flow FIN_WAIT_1
        app < F. 1:1(0) ack 1     +0.25s
        app > .  1:1(0) ack 2 win 0
        us  | flow FIN_WAIT_2
        """,
        begin=OPEN,
    )


@pytest.mark.rule(50)
@pytest.mark.bug("gVisor bcb259a28")
def test_fin_behind_data_and_a_full_window(play: Play) -> None:
    """The state tells what was asked for at once; the FIN follows the data when the window opens."""
    play(
        """
        app > .  1:1(0) ack 1 win 0
        us  | write 100
        us  | finish
        us  | flow FIN_WAIT_1
        app > .  1:1(0) ack 1 win 512
        app < FP. 1:101(100) ack 1
        app > .  1:1(0) ack 102 win 512
        us  | flow FIN_WAIT_2
        us  | delivered
        """,
        begin=OPEN,
    )


@pytest.mark.rule(36)
@pytest.mark.bug("smoltcp e798dfdd")
@pytest.mark.scenario("tcp_window_shrink")
def test_window_taken_back(play: Play) -> None:
    """A right edge that moves left of what we sent (RFC 9293 MUST-34): nothing new, and recovery when it returns."""
    play(
        """
        us  | write 14600
        app < P. 1:14601(14600) ack 1
        app > .  1:1(0) ack 1461 win 0
        us  | write 1000
        app < .  1460:1461(1) ack 1          +0.25s
        app > .  1:1(0) ack 1461 win 0
        app < .  1460:1461(1) ack 1          +0.5s
        app > .  1:1(0) ack 1461 win 512
        app < P. 14601:15601(1000) ack 1
        app < .  1461:2921(1460) ack 1       +0.25s
        app > .  1:1(0) ack 15601 win 512
        us  | delivered
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.rule(36)
def test_older_window_does_not_replace_a_newer(play: Play) -> None:
    """RFC 9293 3.10.7.4: SND.WL1 and WL2 tell which is newer when packets change places."""
    book = play(
        """
        app > P. 1:11(10) ack 1 win 512
        app < .  1:1(0) ack 11
        app > .  11:11(0) ack 1 win 300
        us  | read 10
        """,
        begin=OPEN,
    )
    flow = book.flow
    assert flow is not None
    edge = flow.snd_edge

    book.play("""
        app > P. 5:12(7) ack 1 win 900
        app < .  1:1(0) ack 12
    """)

    assert flow.snd_edge == edge
