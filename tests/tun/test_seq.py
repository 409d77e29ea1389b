"""Arithmetic modulo 2**32, against plain integers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tun import seq

NUMBERS = st.integers(0, seq.MASK) | st.sampled_from([0, 1, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF])
STEPS = st.integers(-(2**31), 2**31 - 1)


@given(NUMBERS, STEPS)
def test_diff_undoes_add(number: int, step: int) -> None:
    """A distance of less than half the circle is always recovered."""
    assert seq.diff(seq.add(number, step), number) == step


@given(NUMBERS, st.integers(1, 2**31 - 1))
def test_order_goes_round(number: int, step: int) -> None:
    """What is added comes after, across the wrap too."""
    later = seq.add(number, step)

    assert seq.lt(number, later)
    assert seq.le(number, later)
    assert seq.gt(later, number)
    assert seq.ge(later, number)
    assert not seq.lt(later, number)
    assert not seq.gt(number, later)


@given(NUMBERS)
def test_equal_is_neither_before_nor_after(number: int) -> None:
    """The border cases of the four comparisons."""
    assert seq.le(number, number)
    assert seq.ge(number, number)
    assert not seq.lt(number, number)
    assert not seq.gt(number, number)


@given(st.integers(0, 2**40), STEPS)
def test_unwrap_finds_the_nearest_position(near: int, step: int) -> None:
    """A position goes out as 32 bits and comes back, as long as it is less than half the circle away."""
    position = near + step

    assert seq.unwrap(position & seq.MASK, near) == position


@given(NUMBERS, NUMBERS)
def test_half_the_circle_counts_as_before(a: int, b: int) -> None:
    """At exactly 2**31 both are before each other, as in the kernel: it never happens within a window."""
    if (a - b) & seq.MASK == seq.HALF:
        assert seq.diff(a, b) == -seq.HALF
    else:
        assert seq.diff(a, b) == -seq.diff(b, a)
