"""Counters, histograms, and the page that Prometheus reads."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ngrokd.metrics import DIAL_BOUNDS_S, Counters, Distribution, Family, Histogram, by, one, render, unflatten


def test_counters_count() -> None:
    """By one, or by more; what is read is a copy."""
    counters = Counters(["requests", "bytes"])
    before = counters()

    counters.add("requests")
    counters.add("bytes", 40)

    assert (counters["requests"], counters["bytes"]) == (1, 40)
    assert before == {"requests": 0, "bytes": 0}


def test_an_unknown_counter_is_a_bug() -> None:
    """A typo must not become a counter of its own."""
    with pytest.raises(KeyError):
        Counters(["a"]).add("b")


def test_an_observation_belongs_to_the_first_bucket_that_holds_it() -> None:
    """A bound belongs to its bucket ("le"); what is above all of them is counted too."""
    histogram = Histogram([0.1, 1.0])
    for seconds in (0.05, 0.1, 0.5, 7.0):
        histogram.observe(seconds)

    assert histogram.read() == Distribution((0.1, 1.0), (2, 1, 1), 7.65)


@given(st.lists(st.floats(0, 100), max_size=30), st.lists(st.floats(0, 100), max_size=30))
def test_flat_histograms_of_two_processes_add_up_to_one(here: list[float], there: list[float]) -> None:
    """Counters are summed by name, whatever they count."""
    one_of_all, first, second = Histogram(), Histogram(), Histogram()
    for seconds in here:
        first.observe(seconds)
    for seconds in there:
        second.observe(seconds)
    for seconds in here + there:
        one_of_all.observe(seconds)

    flat, others = first.flat("dial"), second.flat("dial")
    summed = {name: count + others[name] for name, count in flat.items()}

    assert unflatten(summed, "dial") == one_of_all.read()


def test_quantiles_are_taken_within_their_bucket() -> None:
    """As Prometheus would say it of the same buckets."""
    read = Distribution((1.0, 2.0, 4.0), (2, 6, 2, 0), 20.0)

    assert read.quantile(0.5) == pytest.approx(1.5)
    assert read.quantile(1.0) == 4.0
    assert Distribution((1.0,), (0, 3), 9.0).quantile(0.5) == 1.0
    assert Distribution((1.0,), (0, 0), 0.0).quantile(0.5) == 0.0


def test_what_happened_since_then() -> None:
    now = Distribution((1.0,), (5, 2), 9.0)

    assert now.minus(Distribution((1.0,), (3, 2), 8.0)) == Distribution((1.0,), (2, 0), 1.0)


def test_the_page_is_prometheus_text() -> None:
    """Help, type, samples; buckets cumulate; foreign text in labels and help is escaped."""
    page = render(
        [
            one("ngrokd_flows", "gauge", "Flows\nnow.", 3),
            by("ngrokd_drops_total", "counter", "Packets dropped.", "reason", {'a"b\\c\n': 1, "ok": 2.5}),
            one("ngrokd_dial_seconds", "histogram", "Dials.", Distribution((0.1, 1.0), (2, 1, 1), 7.65)),
            Family("ngrokd_empty", "gauge", "Nothing yet."),
        ]
    )

    assert page == (
        "# HELP ngrokd_flows Flows\\nnow.\n"
        "# TYPE ngrokd_flows gauge\n"
        "ngrokd_flows 3\n"
        "# HELP ngrokd_drops_total Packets dropped.\n"
        "# TYPE ngrokd_drops_total counter\n"
        'ngrokd_drops_total{reason="a\\"b\\\\c\\n"} 1\n'
        'ngrokd_drops_total{reason="ok"} 2.5\n'
        "# HELP ngrokd_dial_seconds Dials.\n"
        "# TYPE ngrokd_dial_seconds histogram\n"
        'ngrokd_dial_seconds_bucket{le="0.1"} 2\n'
        'ngrokd_dial_seconds_bucket{le="1.0"} 3\n'
        'ngrokd_dial_seconds_bucket{le="+Inf"} 4\n'
        "ngrokd_dial_seconds_sum 7.65\n"
        "ngrokd_dial_seconds_count 4\n"
        "# HELP ngrokd_empty Nothing yet.\n"
        "# TYPE ngrokd_empty gauge\n"
    )


def test_the_bounds_of_dials_span_loopback_and_the_timeout() -> None:
    """A quantile is as good as the bounds around it."""
    assert list(DIAL_BOUNDS_S) == sorted(DIAL_BOUNDS_S)
    assert DIAL_BOUNDS_S[0] <= 0.001
    assert DIAL_BOUNDS_S[-1] >= 10
