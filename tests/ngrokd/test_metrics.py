"""Counters, and how they are read together."""

from __future__ import annotations

import pytest

from ngrokd.metrics import Counters, Metrics, render


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


def test_sources_are_asked_when_somebody_looks() -> None:
    """Each under its prefix, all sorted by name."""
    flows = 0
    metrics = Metrics()
    counters = Counters(["requests"])
    metrics.add("control", counters)
    metrics.add("", lambda: {"flows": flows})
    flows = 3
    counters.add("requests", 2)

    assert metrics.snapshot() == {"control.requests": 2, "flows": 3}
    assert list(metrics.snapshot()) == ["control.requests", "flows"]


def test_numbers_are_shown_as_prometheus_reads_them() -> None:
    """A name holds letters, digits and underscores."""
    assert render({"drops.bad-checksum": 1, "up": 0.5}) == "ngrokd_drops_bad_checksum 1\nngrokd_up 0.5\n"
