"""The machine while bytes flow: order, gaps, duplicates, ACKs, loss of what we sent."""

from __future__ import annotations

import pytest

from tun.seq import MASK
from tun.testing.playbook import OPEN, OPEN_SACK, OPEN_STAMPS, Play, Playbook, pattern, tuned
from tun.wire.tcp import ACK, build_tcp


def send_quietly(book: Playbook, position: int, count: int) -> None:
    """One segment, whose answer is not looked at."""
    assert book.flow is not None

    packet = build_tcp(
        book.app,
        book.endpoint,
        40000,
        443,
        seq=position,
        ack=book.flow.snd_nxt & MASK,
        flags=ACK,
        window=512,
        payload=pattern(position, count),
    )
    book.stack.handle_packet(bytes(packet), 0, True, book.now)
    for flow in book.stack.take_touched():
        book.stack.flush(flow, lambda *_: True, book.now)


# -- receiving --------------------------------------------------------------------------------------------------------


@pytest.mark.rule(42)
def test_one_ack_for_a_batch(play: Play) -> None:
    """ACKs are decided when the batch has been read: three segments, one answer."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)

    flow = book.flow
    assert flow is not None
    for number in (1, 1001, 2001):
        packet = build_tcp(
            book.app,
            book.endpoint,
            40000,
            443,
            seq=number,
            ack=flow.snd_nxt & MASK,
            flags=ACK,
            window=512,
            payload=bytes(1000),
        )
        book.stack.handle_packet(bytes(packet), 0, True, book.now)

    book.play("""
        us  | flow ESTABLISHED
        app < .  1:1(0) ack 3001
    """)


@pytest.mark.rule(38, 41)
@pytest.mark.bug("smoltcp 6acc2b47")
def test_segment_that_overlaps_the_left_is_cut(play: Play) -> None:
    """What is old is dropped, what is new is taken (smoltcp once took none of it), and DSACK tells what came twice."""
    play(
        """
        app > P. 1:101(100) ack 1
        app < .  1:1(0) ack 101
        app > P. 51:201(150) ack 1
        app < .  1:1(0) ack 201 sack 51:101
        us  | read 200
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.rule(31, 38, 42)
@pytest.mark.bug("smoltcp 9d532a7b")
def test_old_data_is_acknowledged_at_once_and_always(play: Play) -> None:
    """Its sender misses our last ACK; DSACK (RFC 2883) says that it came twice. No limit on these."""
    play(
        """
        app > P. 1:101(100) ack 1
        app < .  1:1(0) ack 101
        app > P. 1:101(100) ack 1
        app < .  1:1(0) ack 101 sack 1:101
        app > P. 1:101(100) ack 1
        app < .  1:1(0) ack 101 sack 1:101
        us  | read 100
        us  | readable 0
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.rule(38, 41, 42)
def test_gap_is_reported_and_filled(play: Play) -> None:
    """SACK names the newest range first (RFC 2018 4); the segment that fills the gap is acknowledged at once."""
    play(
        """
        app > P. 1001:2001(1000) ack 1
        app < .  1:1(0) ack 1 sack 1001:2001
        app > P. 3001:4001(1000) ack 1
        app < .  1:1(0) ack 1 sack 3001:4001 1001:2001
        app > P. 5001:6001(1000) ack 1
        app < .  1:1(0) ack 1 sack 5001:6001 3001:4001 1001:2001
        us  | readable 0
        app > P. 2001:3001(1000) ack 1
        app < .  1:1(0) ack 1 sack 1001:4001 5001:6001
        app > P. 1:1001(1000) ack 1
        app < .  1:1(0) ack 4001 sack 5001:6001
        us  | read 4000
        app > P. 4001:5001(1000) ack 1
        app < .  1:1(0) ack 6001
        us  | read 2000
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.rule(41)
def test_timestamps_leave_room_for_three_ranges(play: Play) -> None:
    """40 bytes of options: 12 for the timestamp, 2 + 24 for SACK (RFC 2018 3)."""
    script = "\n".join(
        f"""
        app > .  {start}:{start + 10}(10) ack 1 ts 1001 ecr 1
        app < .  1:1(0) ack 1 sack {" ".join(f"{s}:{s + 10}" for s in range(start, max(start - 300, 100), -100))}
        """
        for start in (200, 300, 400, 500)
    )
    play(script, begin=OPEN_STAMPS)


@pytest.mark.rule(24, 42)
def test_without_sack_every_segment_beyond_a_gap_gets_its_duplicate_ack(play: Play) -> None:
    """RFC 5681 3.2: such a sender counts them."""
    play(
        """
        app > P. 1001:2001(1000) ack 1
        app < .  1:1(0) ack 1
        app > P. 2001:3001(1000) ack 1
        app < .  1:1(0) ack 1
        app > P. 3001:4001(1000) ack 1
        app < .  1:1(0) ack 1
        app > P. 1:1001(1000) ack 1
        app < .  1:1(0) ack 4001
        us  | read 4000
        """,
        begin=OPEN,
    )


@pytest.mark.rule(39)
def test_first_bytes_win_where_segments_overlap(play: Play) -> None:
    """What SACK has reported does not change; else a stranger could rewrite what a filter has seen."""
    play(
        """
        app > P. 3:6(3) ack 1 "CDE"
        app < .  1:1(0) ack 1 sack 3:6
        app > P. 2:8(6) ack 1 "bxxxfg"
        app < .  1:1(0) ack 1 sack 2:8
        app > P. 1:4(3) ack 1 "ayy"
        app < .  1:1(0) ack 8 sack 2:4
        us  | read "abCDEfg"
        """.replace("sack 2:4", ""),
        begin=OPEN_SACK,
    )


@pytest.mark.rule(39)
@pytest.mark.bug("lwIP 9989")
def test_out_of_order_ranges_are_bounded(play: Play) -> None:
    """SegmentSmack (CVE-2018-5390): every second byte, for ever; at most 64 ranges stay, the lowest ones."""
    book = play("us  | flow ESTABLISHED", begin=OPEN_SACK)
    for index in range(200):
        send_quietly(book, 3 + 2 * index, 1)

    assert book.flow is not None
    waiting = book.flow._out_of_order
    assert waiting is not None
    assert waiting.starts == [3 + 2 * index for index in range(64)]
    assert book.stack.drops["out_of_order"] == 136


@pytest.mark.rule(39)
@pytest.mark.bug("lwIP 9989")
def test_out_of_order_bytes_are_bounded(play: Play) -> None:
    """At most three quarters of the buffer wait beyond a gap, so in-order bytes always find room."""
    book = play(
        """
        app > P. 1:2(1) ack 1
        app < .  1:1(0) ack 2
        us  | read 1
        """,
        begin=OPEN_SACK,
        settings=tuned(receive_buffer=65536),
    )
    for start in range(1002, 66002, 1000):
        send_quietly(book, start, 1000)

    flow = book.flow
    assert flow is not None
    waiting = flow._out_of_order
    assert waiting is not None
    assert waiting.starts == [1002]
    assert 30000 < waiting.ends[0] - 1002 <= 65536 * 3 // 4
    assert flow.held_bytes <= 65536 * 3 // 4


@pytest.mark.rule(37)
def test_urgent_data_is_ordinary_data(play: Play) -> None:
    """RFC 6093: the pointer is ignored, wherever it points."""
    play(
        """
        app > P.U 1:6(5) ack 1 "hello"
        app < .  1:1(0) ack 6
        us  | read "hello"
        """,
        begin=OPEN,
    )


@pytest.mark.rule(17)
@pytest.mark.bug("smoltcp eae48052")
def test_segment_without_ack_is_dropped(play: Play) -> None:
    """RFC 9293 3.10.7.4, fifth."""
    play(
        """
        app > P  1:6(5) "hello"
        app > none 1:6(5) "hello"
        us  | readable 0
        us  | drops no_ack 2
        """,
        begin=OPEN,
    )


@pytest.mark.rule(17, 29, 33)
def test_syn_in_a_connection_is_challenged_wherever_it_lies(play: Play) -> None:
    """RFC 5961 4.2: no SYN changes a connection; a peer that really restarted will answer with RST."""
    for number in (0, 1, 100, 100000, -5000):
        play(
            f"""
            app > S  {number}:{number}(0) win 1
            app < .  1:1(0) ack 1
            app > SF {number}:{number}(0) win 1
            app > S. {number}:{number}(0) ack 1
            us  | flow ESTABLISHED
            """,
            begin=OPEN,
        )


@pytest.mark.rule(24)
def test_missing_timestamp_is_forgiven(play: Play) -> None:
    """RFC 7323 3.2 lets us drop; Linux and gVisor take it, and so do we."""
    play(
        """
        app > P. 1:6(5) ack 1 "hello"
        app < .  1:1(0) ack 6 ecr 1000
        us  | read "hello"
        """,
        begin=OPEN_STAMPS,
    )


@pytest.mark.rule(30)
@pytest.mark.scenario("tcp_paws_mechanism")
def test_old_timestamp_is_refused(play: Play) -> None:
    """PAWS (RFC 7323 5.3): a segment from before is acknowledged and dropped; a RST is not judged by it."""
    play(
        """
        app > P. 1:6(5) ack 1 ts 2000 ecr 1 "hello"
        app < .  1:1(0) ack 6 ecr 2000
        app > P. 6:9(3) ack 1 ts 1999 ecr 1 "old"
        app < .  1:1(0) ack 6 ecr 2000
        app > .  6:6(0) ack 1 ts 1 ecr 1
        app < .  1:1(0) ack 6 ecr 2000
        app > .  6:6(0) ack 1 ts 1 ecr 1
        us  | drops paws 3
        app > R  6:6(0) ts 1 ecr 1
        us  | failure reset
        """,
        begin=OPEN_STAMPS,
    )


@pytest.mark.rule(30)
@pytest.mark.scenario("tcp_paws_mechanism")
def test_timestamp_counts_again_after_24_days(play: Play) -> None:
    """RFC 7323 5.5: by then the clock may have gone round; an idle connection must not be locked out."""
    play(
        """
        app > P. 1:6(5) ack 1 ts 5 ecr 1 "hello"   +2080000s
        app < .  1:1(0) ack 6 ecr 5
        """,
        begin=OPEN_STAMPS,
        settings=tuned(keepalive_idle=1e9),
    )


@pytest.mark.rule(30)
def test_timestamp_to_echo_is_that_of_the_left_edge(play: Play) -> None:
    """RFC 7323 4.3: what lies beyond a gap does not change it, or the app measures its own loss."""
    play(
        """
        app > P. 1001:2001(1000) ack 1 ts 1500 ecr 1
        app < .  1:1(0) ack 1 ecr 1000 sack 1001:2001
        app > P. 1:1001(1000) ack 1 ts 1600 ecr 1
        app < .  1:1(0) ack 2001 ecr 1600
        """,
        begin=OPEN_STAMPS,
    )


# -- the habit of answering -------------------------------------------------------------------------------------------


@pytest.mark.rule(42)
def test_ack_rides_on_the_answer_in_a_conversation(play: Play) -> None:
    """After three answers in time the ACK waits for the fourth, at most 20 ms."""
    exchange = """
        app > P. {a}:{b}(10) ack {x} win 512
        app < .  {x}:{x}(0) ack {b}
        us  | read 10
        us  | write 10
        app < P. {x}:{y}(10) ack {b}
    """
    rounds = "".join(exchange.format(a=1 + 10 * n, b=11 + 10 * n, x=1 + 10 * n, y=11 + 10 * n) for n in range(3))
    play(
        rounds
        + """
        app > P. 31:41(10) ack 31 win 512
        us  | read 10
        us  | write 10                        +0.019s
        app < P. 31:41(10) ack 41
        app > P. 41:51(10) ack 41 win 512
        us  | read 10
        app < .  41:41(0) ack 51              +0.02s
        app > P. 51:61(10) ack 41 win 512
        app < .  41:41(0) ack 61
        """,
        begin=OPEN,
    )


@pytest.mark.rule(42)
def test_much_data_is_acknowledged_at_once_even_in_a_conversation(play: Play) -> None:
    """Two segments (RFC 1122 4.2.3.2)."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    assert book.flow is not None
    book.flow._interactive = 3

    book.play("""
        app > P. 1:2921(2920) ack 1
        app < .  1:1(0) ack 2921
    """)


# -- sending ----------------------------------------------------------------------------------------------------------


@pytest.mark.rule(45)
@pytest.mark.scenario("tcp_cork_mss")
def test_large_writes_become_large_segments(play: Play) -> None:
    """Up to 64 KiB in whole segments, the device cuts them; PSH where the data ends."""
    play(
        """
        us  | write 65000
        app < .  1:64241(64240) ack 1 gso 1460
        app < P. 64241:65001(760) ack 1
        """,
        begin=OPEN,
    )


@pytest.mark.rule(45)
@pytest.mark.scenario("tcp_cork_mss")
def test_without_offload_segments_have_the_mss(play: Play) -> None:
    """A device that cannot cut gets what it can send."""
    play(
        """
        us  | write 3000
        app < .  1:1461(1460) ack 1
        app < .  1461:2921(1460) ack 1
        app < P. 2921:3001(80) ack 1
        """,
        begin=OPEN,
        settings=tuned(offload=False),
    )


@pytest.mark.rule(45)
def test_small_writes_go_at_once(play: Play) -> None:
    """No Nagle: bytes come as TLS records, which are pieces already."""
    play(
        """
        us  | write 10
        app < P. 1:11(10) ack 1
        us  | write 10
        app < P. 11:21(10) ack 1
        """,
        begin=OPEN,
    )


@pytest.mark.rule(45, 50)
def test_full_device_loses_nothing(play: Play) -> None:
    """What the device does not take is owed still, ACK and data."""
    play(
        """
        us  | full
        app > P. 1:6(5) ack 1 "hello"
        us  | write 3000
        us  | free
        app < P. 1:3001(3000) ack 6
        us  | finish
        app < F. 3001:3001(0) ack 6
        """,
        begin=OPEN,
    )


@pytest.mark.rule(35)
def test_ack_of_what_was_never_sent_frees_nothing(play: Play) -> None:
    """Optimistic ACKs: answered with an ACK, at most twice a second, and dropped."""
    play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 102
        app < .  101:101(0) ack 1
        app > .  1:1(0) ack 5000
        us  | drops ack_of_unsent 2
        app > .  1:1(0) ack 101
        us  | delivered
        """,
        begin=OPEN,
    )


@pytest.mark.rule(35)
def test_old_ack_brings_its_data_all_the_same(play: Play) -> None:
    """RFC 5961 5.2: an ACK before SND.UNA is not an ACK, but within a window it is no attack either."""
    play(
        """
        us  | write 100
        app < P. 1:101(100) ack 1
        app > .  1:1(0) ack 101 win 512
        app > P. 1:6(5) ack 51 win 512 "hello"
        app < .  101:101(0) ack 6
        app > P. 6:11(5) ack -100000 win 512 "wrong"
        app < .  101:101(0) ack 6
        us  | drops ack_too_old 1
        us  | read "hello"
        """,
        begin=OPEN,
    )


@pytest.mark.rule(48)
@pytest.mark.bug("smoltcp f3a64e08")
def test_lost_segment_is_resent_after_three_duplicates(play: Play) -> None:
    """RFC 5681 3.2: the first hole, once; the rest is on its way."""
    play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app > .  1:1(0) ack 1 win 512
        app > .  1:1(0) ack 1 win 512
        app > .  1:1(0) ack 1 win 512
        app < .  1:1461(1460) ack 1
        app > .  1:1(0) ack 1 win 512
        app > .  1:1(0) ack 7301 win 512
        us  | delivered
        """,
        begin=OPEN,
    )


@pytest.mark.rule(48)
@pytest.mark.bug("smoltcp cce9ae77")
def test_window_updates_are_no_duplicates(play: Play) -> None:
    """smoltcp counted them and resent what nobody had lost."""
    play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app > .  1:1(0) ack 1 win 513
        app > .  1:1(0) ack 1 win 514
        app > .  1:1(0) ack 1 win 515
        app > .  1:1(0) ack 1 win 516
        us  | open
        """,
        begin=OPEN,
    )


@pytest.mark.rule(42, 48)
@pytest.mark.bug("passt keepalive", "lwIP 36210")
def test_keepalives_are_no_duplicates(play: Play) -> None:
    """passt took them for lost data: a keepalive repeats the last byte's number, and only wants an ACK."""
    play(
        """
        app > P. 1:2(1) ack 1 win 512
        app < .  1:1(0) ack 2
        us  | read 1
        us  | write 7300
        app < P. 1:7301(7300) ack 2
        app > .  1:1(0) ack 1 win 512
        app < .  7301:7301(0) ack 2
        app > .  1:1(0) ack 1 win 512    +0.01s
        app > .  1:1(0) ack 1 win 512    +0.01s
        app > .  1:1(0) ack 1 win 512    +0.01s
        app > .  1:2(1) ack 1 win 512    +0.01s
        app < .  7301:7301(0) ack 2
        """,
        begin=OPEN,
    )


@pytest.mark.rule(48)
def test_partial_ack_resends_the_next_hole(play: Play) -> None:
    """NewReno (RFC 6582): in a recovery every ACK that is not enough names the next missing segment."""
    play(
        """
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app > .  1:1(0) ack 1 win 512
        app > .  1:1(0) ack 1 win 512
        app > .  1:1(0) ack 1 win 512
        app < .  1:1461(1460) ack 1
        app > .  1:1(0) ack 4381 win 512
        app < .  4381:5841(1460) ack 1
        app > .  1:1(0) ack 7301 win 512
        us  | delivered
        """,
        begin=OPEN,
    )


@pytest.mark.rule(48)
def test_sack_shows_the_holes(play: Play) -> None:
    """RFC 6675: three segments' worth of SACK is as good as three duplicates; only holes are resent."""
    play(
        """
        us  | write 14600
        app < P. 1:14601(14600) ack 1
        app > .  1:1(0) ack 1 win 512 sack 2921:5841 7301:14601
        app < .  1:2921(2920) ack 1
        app < .  5841:7301(1460) ack 1
        app > .  1:1(0) ack 5841 win 512 sack 7301:14601
        app > .  1:1(0) ack 14601 win 512
        us  | delivered
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.parametrize("blocks", ["5000:3000", "90000:99000", "-500:-100", "1:1461", "3000:3000", "-2000000000:2000"])
@pytest.mark.rule(48)
@pytest.mark.bug("smoltcp 25d4f7c5")
def test_foolish_sack_blocks_are_ignored(play: Play, blocks: str) -> None:
    """Left after right, beyond what was sent, before what is acknowledged, empty, wrapped: nothing is resent."""
    play(
        f"""
        us  | write 7300
        app < P. 1:7301(7300) ack 1
        app > .  1:1(0) ack 1 win 512 sack {blocks}
        app > .  1:1(0) ack 1461 win 512 sack {blocks}
        us  | open
        """,
        begin=OPEN_SACK,
    )


@pytest.mark.rule(49)
def test_congestion_window_opens_with_the_acks(play: Play) -> None:
    """Slow start from 256 KiB: what is beyond it waits for ACKs, though the app's window is larger."""
    book = play(
        """
        app > .  1:1(0) ack 1 win 8000
        us  | flow ESTABLISHED
        """,
        begin=OPEN,
    )
    flow = book.flow
    assert flow is not None
    flow.write(memoryview(bytes(400000)), book.now)
    sent: list[int] = []

    def write(header: object, views: list[memoryview], gso: int) -> bool:
        sent.append(sum(map(len, views)))
        return True

    book.stack.flush(flow, write, book.now)  # type: ignore[arg-type]

    assert 256 * 1024 - 1460 < sum(sent) <= 256 * 1024
