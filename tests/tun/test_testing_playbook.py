"""The Playbook itself: a script that is wrong must fail, and say how."""

from __future__ import annotations

import pytest

from tun.testing.playbook import OPEN, Play, PlaybookMismatch, ScriptError, pattern


def test_mismatch_shows_both_scripts(play: Play) -> None:
    """Aligned, so that one sees where the stack went another way."""
    with pytest.raises(PlaybookMismatch) as caught:
        play(
            """
            app > P. 1:6(5) ack 1 "hello"
            app < .  1:1(0) ack 7
            us  | readable 5
            """,
            begin=OPEN,
        )

    lines = str(caught.value).splitlines()
    assert "- app < . 1:1(0) ack 7" in lines
    assert "+ app < . 1:1(0) ack 6 win 2047" in lines
    assert "  us | readable 5" in lines


@pytest.mark.parametrize(
    "line",
    [
        "app < .  1:1(0) ack 6 win 5",
        "app < .  1:1(0) ack 6 sack 9:10",
        "app < .  1:1(0) ack 6 wscale 3",
        "app < .  1:1(0) ack 6 ts 1 ecr 2",
        'app < P. 1:3(2) ack 6 "ab"',
        "app < S. 1:1(0) ack 6",
        "app < icmp 3/1",
        "us  | readable 4",
    ],
)
def test_each_field_that_is_named_is_compared(play: Play, line: str) -> None:
    """And silence where something was expected is a mismatch as well."""
    with pytest.raises(PlaybookMismatch):
        play(f'app > P. 1:6(5) ack 1 "hello"\n{line}', begin=OPEN)


def test_unexpected_packet_is_a_mismatch(play: Play) -> None:
    """Writing nothing says that nothing is sent."""
    with pytest.raises(PlaybookMismatch, match="ack 6"):
        play('app > P. 1:6(5) ack 1 "hello"', begin=OPEN)


@pytest.mark.parametrize(
    "line",
    ["what", "app > Q 1:1(0)", "app > . 1:3(1)", 'app > . 1:3(2) "abc"', "app > . 1:1(0) speed 5", "us | jump"],
)
def test_nonsense_is_named(play: Play, line: str) -> None:
    """A typing error must not pass for silence."""
    with pytest.raises(ScriptError):
        play(line, begin=OPEN)


def test_wrong_payload_is_seen(play: Play) -> None:
    """What was written is what must come out."""
    book = play("us  | flow ESTABLISHED", begin=OPEN)
    assert book.flow is not None
    book.sent_by_owner += pattern(1, 10)
    book.flow.write(b"x" * 10, book.now)
    book.flow.touch()

    with pytest.raises(PlaybookMismatch, match="WRONG"):
        book.play("""
            us  | flow ESTABLISHED
            app < P. 1:11(10) ack 1
        """)


def test_time_passes_before_its_line_and_through_every_deadline(play: Play) -> None:
    """Literal times; a timer on the way is not skipped."""
    book = play(
        """
        us  | write 10
        app < P. 1:11(10) ack 1
        app < P. 1:11(10) ack 1    +0.25s
        +0.1s
        app > .  1:1(0) ack 11     +0.1s
        """,
        begin=OPEN,
    )

    assert book.now == pytest.approx(100.45)
