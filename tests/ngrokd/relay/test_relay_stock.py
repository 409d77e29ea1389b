"""How many connections to hold: literal times, and laws that hold whatever happens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ngrokd.relay.stock import (
    DEATHS_TO_LEARN,
    FORGET_S,
    ORDER_BURST,
    ORDERS_PER_S,
    PROVEN_S,
    RETRY_MOST_S,
    UNLEARN_S,
    PoolSettings,
    Stock,
)

if TYPE_CHECKING:
    from collections.abc import Sequence


def stock(*, maximum: int = 128, max_age_s: float = 300.0, idle: int = 2, chance: float = 0.0) -> Stock:
    return Stock(PoolSettings(maximum, max_age_s, idle), lambda: chance)


def request(of: Stock, rate: float, begin: float, seconds: float) -> None:
    """Evenly spaced requests."""
    for index in range(round(rate * seconds)):
        of.note_request(begin + index / rate)


# -- the target


def test_nothing_is_held_before_anybody_asks() -> None:
    assert stock().target(0.0) == 0
    assert stock().orders(0.0, 0, 0) == (0, math.inf)


def test_a_start_is_as_good_as_a_request() -> None:
    """The first app shall not wait, but a daemon that nobody uses holds nothing after five minutes."""
    of = stock()
    of.note_start(10.0)

    assert of.orders(10.0, 0, 0) == (2, 10.0 + FORGET_S)
    assert of.target(10.0 + FORGET_S - 0.1) == 2
    assert of.target(10.0 + FORGET_S) == 0
    assert of.surplus(10.0 + FORGET_S, 2, 0) == 2


def test_one_request_now_and_then_holds_two() -> None:
    of = stock()
    for now in (0.0, 60.0, 120.0):
        of.note_request(now)
        assert of.target(now) == 2


@pytest.mark.parametrize(
    ("rate", "lead_s", "least", "most"),
    [
        (500, 0.1, 50, 80),  # Little: 50 are used up within one dial
        (500, 0.15, 75, 110),
        (600, 0.15, 90, 128),
        (40, 0.002, 2, 2),
        (20, 0.1, 3, 5),
        (1000, 0.005, 6, 9),
    ],
)
def test_a_steady_rate_needs_rate_times_lead(rate: int, lead_s: float, least: int, most: int) -> None:
    of = stock()
    of.note_lead(lead_s)
    request(of, rate, 0.0, 2.0)

    assert least <= of.target(2.0) <= most


def test_a_burst_is_prepared_for_when_it_comes_again() -> None:
    """A page that opens thirty connections every few seconds finds them ready from the second time on."""
    of = stock()
    of.note_lead(0.1)
    for start in (0.0, 8.0, 16.0):
        for _ in range(30):
            of.note_request(start)
        assert 30 <= of.target(start + 7.9) <= 38


def test_what_is_not_used_any_more_is_let_go_in_steps() -> None:
    """Halved with each ten seconds, and back at two within a minute and a half."""
    of = stock()
    of.note_lead(0.1)
    for _ in range(100):
        of.note_request(1.0)

    assert [of.target(now) for now in (5.0, 15.0, 25.0, 35.0, 45.0, 55.0, 65.0, 75.0, 85.0)] == [
        125, 125, 63, 32, 16, 8, 4, 2, 2,
    ]  # fmt: skip
    assert of.surplus(90.0, 125, 0) == 123


def test_the_next_look_is_when_the_target_falls() -> None:
    """Nothing is polled: the time is known."""
    of = stock()
    of.note_lead(0.1)
    for _ in range(100):
        of.note_request(1.0)

    assert of.orders(5.0, 125, 0) == (0, 11.0)
    assert of.orders(95.0, 2, 0) == (0, 1.0 + FORGET_S)
    assert of.orders(400.0, 0, 0) == (0, math.inf)


def test_bounds_of_the_configuration() -> None:
    of = stock(maximum=10, idle=4)
    of.note_start(0.0)
    assert of.target(0.0) == 4
    request(of, 1000, 0.0, 1.0)
    assert of.target(1.0) == 10
    assert stock(maximum=0).orders(0.0, 0, 0) == (0, math.inf)


def test_no_pool_means_no_pool() -> None:
    of = stock(maximum=0, idle=2)
    of.note_request(0.0)
    assert of.orders(0.0, 0, 0) == (0, math.inf)


def test_lead_times_are_averaged_and_the_first_counts_as_it_is() -> None:
    of = stock()
    assert of.lead_s == 0.1
    of.note_lead(0.01)
    assert of.lead_s == 0.01
    of.note_lead(0.02)
    assert of.lead_s == pytest.approx(0.012)


# -- orders


def test_what_is_ordered_already_is_not_ordered_again() -> None:
    of = stock(idle=5)
    of.note_start(0.0)
    assert of.orders(0.0, 1, 3)[0] == 1
    assert of.orders(0.0, 2, 3)[0] == 0


def test_orders_per_second_are_bounded() -> None:
    """Whatever the arithmetic says, the ingress sees no more."""
    of = stock(maximum=5000, idle=5000)
    of.note_start(0.0)

    first, again = of.orders(0.0, 0, 0)
    assert first == ORDER_BURST
    assert again == pytest.approx(1 / ORDERS_PER_S)
    total, now = 0, 0.0
    while now < 1.0:
        count, again = of.orders(now, 0, 0)
        total += count
        now = max(again, now + 1e-4)
    assert total == pytest.approx(ORDERS_PER_S, rel=0.01)


# -- failures


def test_after_a_failure_nothing_is_ordered_for_a_while_then_one() -> None:
    """Twice as long each time, and one to see."""
    of = stock()
    of.note_start(0.0)
    pauses = []
    now = 0.0
    for _ in range(12):
        of.note_failure(now)
        count, again = of.orders(now, 0, 0)
        assert count == 0
        pauses.append(round(again - now, 3))
        now = again
        of.note_start(now)
        assert of.orders(now, 0, 0)[0] == 1
        assert of.orders(now, 0, 1)[0] == 0

    assert pauses[:5] == [0.1, 0.2, 0.4, 0.8, 1.6]
    assert pauses[-1] == RETRY_MOST_S


def test_a_pause_is_jittered_downwards() -> None:
    of = stock(chance=1.0)
    of.note_start(0.0)
    of.note_failure(0.0)
    assert of.orders(0.0, 0, 0) == (0, 0.05)


def test_a_hundred_failures_at_once_are_one() -> None:
    """All flows see the same outage; it is no longer for that."""
    of = stock()
    of.note_start(0.0)
    for _ in range(100):
        of.note_failure(0.0)
    assert of.orders(0.0, 0, 0) == (0, 0.1)


def test_something_that_worked_ends_the_pause() -> None:
    of = stock()
    of.note_start(0.0)
    for now in (0.0, 1.0, 2.0):
        of.note_failure(now)
    of.note_proof()
    assert of.orders(2.0, 0, 0)[0] == 2


def test_a_change_ends_the_pause_and_forgets_what_was_learned() -> None:
    of = stock()
    of.note_start(0.0)
    for now in (100.0, 200.0, 300.0):
        of.note_death(20.0, now)
    of.note_failure(300.0)
    of.note_change()
    of.note_start(300.0)
    assert of.orders(300.0, 0, 0)[0] == 2
    assert of.idle_limit_s(300.0) == math.inf


def test_an_ingress_that_hangs_up_at_once_is_not_stormed() -> None:
    """Two that die young begin a pause as a failed dial does."""
    of = stock()
    of.note_start(0.0)
    dials, now, end = 0, 0.0, 300.0
    while now < end:
        count, again = of.orders(now, 0, 0)
        dials += count
        for _ in range(count):
            of.note_death(0.01, now + 0.01)
        now = min(again, end) if again > now else now + 0.02
    assert dials <= 15


# -- how long the ingress lets a connection wait


def test_the_idle_limit_is_learned_from_connections_that_died_waiting() -> None:
    """Three times the same, and they are retired before that."""
    of = stock()
    of.note_start(0.0)
    of.note_death(60.0, 60.0)
    of.note_death(60.1, 120.0)
    assert of.idle_limit_s(120.0) == math.inf
    assert of.lifetime_s(120.0) == 300.0

    of.note_death(59.9, 180.0)

    assert of.idle_limit_s(180.0) == 60.1
    assert of.lifetime_s(180.0) == pytest.approx(0.8 * 60.1)


def test_a_restart_of_the_ingress_is_no_idle_limit() -> None:
    """It takes all at once, whatever their age."""
    of = stock()
    for age in (3.0, 20.0, 90.0, 200.0):
        of.note_death(age, 500.0)
    assert of.idle_limit_s(500.0) == math.inf


def test_what_was_learned_is_doubted_after_a_while() -> None:
    """One connection may live longer, to see; if it does not, the limit stands again."""
    of = stock()
    for now in (100.0, 200.0, 300.0):
        of.note_death(50.0, now)
    assert of.idle_limit_s(300.0 + UNLEARN_S - 1) == 50.0

    assert of.idle_limit_s(300.0 + UNLEARN_S) == math.inf

    of.note_death(50.0, 300.0 + UNLEARN_S + 100.0)
    assert of.idle_limit_s(1000.0) == 50.0


def test_no_more_are_held_than_are_used_before_they_die() -> None:
    """Where two seconds are allowed, a pool is worth it for ten requests a second, not for one a minute."""
    of = stock()
    for now in (1.0, 3.0, 5.0):
        of.note_request(now)
        of.note_death(2.0, now)
    of.note_proof()
    assert of.target(5.0) == 0

    request(of, 10, 5.0, 60.0)
    assert of.target(65.0) == 2
    assert of.target(120.0) < 3


def test_lifetimes_are_spread() -> None:
    """Those that were dialled together do not go together."""
    of = [Stock(PoolSettings(), lambda chance=chance: chance) for chance in (0.0, 0.5, 1.0)]  # type: ignore[misc]
    assert [each.lifetime_s(0.0) for each in of] == [300.0, 262.5, 225.0]


# -- laws

EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["request", "burst", "start", "failure", "proof", "death", "change", "lead"]),
        st.floats(0.0, 100.0),
        st.floats(0.0, 400.0),
    ),
    max_size=60,
)


@given(EVENTS, st.integers(0, 50), st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
@settings(max_examples=300, deadline=None)
def test_bounds_are_never_exceeded(
    events: Sequence[tuple[str, float, float]], maximum: int, idle: int, ready: int, ordered: int
) -> None:
    """Whatever happens in whatever order, and whatever the shelf holds."""
    of = Stock(PoolSettings(maximum, 300.0, idle), lambda: 0.5)
    now = 0.0
    for what, elapsed, value in events:
        now += elapsed
        match what:
            case "request":
                of.note_request(now)
            case "burst":
                for _ in range(20):
                    of.note_request(now)
            case "start":
                of.note_start(now)
            case "failure":
                of.note_failure(now)
            case "proof":
                of.note_proof()
            case "death":
                of.note_death(value, now)
            case "change":
                of.note_change()
            case "lead":
                of.note_lead(value)
        target = of.target(now)
        orders, again = of.orders(now, ready, ordered)
        surplus = of.surplus(now, ready, ordered)

        assert 0 <= target <= maximum
        assert 0 <= orders <= max(0, target - ready - ordered)
        assert 0 <= surplus <= ready
        assert not (orders and surplus)
        assert again > now
        assert ready - surplus + ordered <= max(target, ordered)
        assert 0.0 < of.lifetime_s(now) <= 300.0 or of.idle_limit_s(now) == 0.0
    assert of.target(now + FORGET_S) == 0


@given(st.floats(1.0, 800.0), st.floats(0.001, 0.15))
@settings(max_examples=50, deadline=None)
def test_at_any_steady_rate_the_shelf_suffices(rate: float, lead_s: float) -> None:
    """Simulated with a real lead time: after the first second nobody finds the shelf empty, and the target is calm."""
    of = stock(maximum=1000)
    ready, missed = 0, 0
    arriving: list[float] = []
    targets = []
    seconds = min(4.0, 2500 / rate + 1.5)
    for index in range(round(rate * seconds)):
        now = index / rate
        while arriving and arriving[0] <= now:
            arriving.pop(0)
            ready += 1
            of.note_lead(lead_s)
        of.note_request(now)
        if ready:
            ready -= 1
        elif now > 1.0 + lead_s:
            missed += 1
        orders, _ = of.orders(now, ready, len(arriving))
        arriving += [now + lead_s] * orders
        if now > 1.0 + lead_s:
            targets.append(of.target(now))

    assert missed == 0
    assert not targets or max(targets) <= min(targets) * 1.2 + 1
    assert not targets or max(targets) <= rate * lead_s * 1.4 + 3


def test_constants_fit_each_other() -> None:
    assert PROVEN_S < FORGET_S
    assert DEATHS_TO_LEARN > 1
