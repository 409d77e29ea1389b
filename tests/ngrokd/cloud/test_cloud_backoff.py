from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.cloud.backoff import Backoff, Trouble


def delays(count: int, rng: Random, *, trouble: Trouble = Trouble.PASSING, took_s: float = 0.0) -> list[float]:
    """The waits of an outage that begins at 1000."""
    backoff, now, waited = Backoff(), 1000.0, []
    for _ in range(count):
        now += took_s
        delay = backoff.next_delay(now, rng, trouble=trouble, took_s=took_s)
        waited.append(delay)
        now += delay
    return waited


@pytest.mark.parametrize("seed", range(20))
def test_delays_double_from_one_second(seed: int) -> None:
    """A hiccup is over within a second or two; each is drawn from the upper half of its range."""
    waited = delays(5, Random(seed))

    for delay, top in zip(waited, [1.0, 2.0, 4.0, 8.0, 10.0], strict=True):
        assert top / 2 <= delay <= top


@pytest.mark.parametrize("seed", range(20))
def test_short_outage_is_noticed_to_be_over_within_ten_seconds(seed: int) -> None:
    """Whenever in its first ten minutes the API returns, it is asked within ten seconds."""
    rng, now, backoff = Random(seed), 0.0, Backoff()

    while now < 600:
        delay = backoff.next_delay(now, rng)
        assert delay <= 10
        now += delay


@pytest.mark.parametrize("seed", range(20))
def test_three_minutes_of_outage_cost_ten_requests_a_minute_at_most(seed: int) -> None:
    """The API that comes back must not find all of us knocking."""
    rng, now, backoff, requests = Random(seed), 0.0, Backoff(), 0

    while now < 180:
        requests += 1
        now += backoff.next_delay(now, rng)

    assert requests <= 30


@pytest.mark.parametrize("seed", range(20))
def test_long_outage_costs_a_request_a_minute(seed: int) -> None:
    """The delay grows with the outage: a sixtieth of it, a minute at most."""
    rng, now, backoff = Random(seed), 0.0, Backoff()
    waited = []
    while now < 4 * 3600:
        delay = backoff.next_delay(now, rng)
        waited.append((now, delay))
        now += delay

    assert all(delay <= max(10.0, at / 60) for at, delay in waited)
    assert all(30 <= delay <= 60 for at, delay in waited if at > 3600)


def test_time_already_spent_in_the_attempt_counts() -> None:
    """A black hole takes ten seconds to give up on; waiting ten more would miss the goal."""
    waited = delays(20, Random(1), took_s=10.0)

    assert all(0.5 <= delay <= 1.0 for delay in waited)


def test_success_starts_afresh() -> None:
    """The next hiccup is a new one."""
    backoff, rng = Backoff(), Random(1)
    for at in range(10):
        backoff.next_delay(float(at), rng)

    backoff.reset()

    assert backoff.failures == 0
    assert backoff.next_delay(5000.0, rng) <= 1.0
    assert backoff.failures == 1


@pytest.mark.parametrize("seed", range(20))
def test_refused_key_is_tried_again_after_minutes(seed: int) -> None:
    """Asking does not make it better, and a day of asking looks like guessing keys."""
    waited = delays(6, Random(seed), trouble=Trouble.REFUSED)

    assert waited[0] == 60
    assert 96 <= waited[1] <= 120
    assert 192 <= waited[2] <= 240
    assert all(240 <= delay <= 300 for delay in waited[3:])


def test_other_trouble_starts_from_the_beginning() -> None:
    """An outage after a refusal is an outage of its own, and the other way round."""
    backoff, rng = Backoff(), Random(1)
    for at in range(5):
        backoff.next_delay(float(at), rng, trouble=Trouble.REFUSED)

    assert backoff.next_delay(10.0, rng) <= 1.0
    assert backoff.next_delay(11.0, rng, trouble=Trouble.REFUSED) == 60


@pytest.mark.parametrize(
    ("asked", "least", "most"), [(0.0, 1.0, 1.1), (7.0, 7.0, 7.7), (300.0, 300.0, 300.0), (99999.0, 300.0, 300.0)]
)
def test_retry_after_is_obeyed_within_reason(asked: float, least: float, most: float) -> None:
    """Never below what was asked, and neither at once nor for a day."""
    for seed in range(20):
        assert least <= Backoff().next_delay(0.0, Random(seed), retry_after_s=asked) <= most


@given(
    st.lists(
        st.tuples(
            st.floats(0, 1e6),
            st.sampled_from(Trouble),
            st.none() | st.floats(allow_nan=False),
            st.floats(0, 1e5),
        ),
        max_size=60,
    ),
    st.randoms(use_true_random=False),
)
def test_delay_is_never_absurd(attempts: list[tuple[float, Trouble, float | None, float]], rng: Random) -> None:
    """Half a second to five minutes, whatever the API and the clock say."""
    backoff, now = Backoff(), 0.0
    for passed, trouble, retry_after_s, took_s in attempts:
        now += passed
        delay = backoff.next_delay(now, rng, trouble=trouble, retry_after_s=retry_after_s, took_s=took_s)
        assert 0.5 <= delay <= 300
