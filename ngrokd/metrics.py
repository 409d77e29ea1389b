"""Numbers that the daemon counts, and how Prometheus reads them.

The data path counts in plain ints of its own; nothing is locked, timed or aggregated there. What is counted in many
places travels as a flat mapping of names to ints that may be summed, `Histogram.flat` included, so that the numbers of
several processes are one addition. Only who is asked for the page makes `Family` objects of them, and `render` makes
the page: text format 0.0.4 (https://prometheus.io/docs/instrumenting/exposition_formats/).

Every label has a bounded set of values: words of ours, or the first so many of what is foreign.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"

# A dial on loopback takes 0.5 ms, one around the world 0.5 s, and `ingress.connect_timeout` is 10 s.
DIAL_BOUNDS_S: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Counters:
    """A fixed group of counters: an unknown name is a bug and raises KeyError."""

    __slots__ = ("_values",)

    def __init__(self, names: Iterable[str]) -> None:
        self._values = dict.fromkeys(names, 0)

    def add(self, name: str, amount: int = 1) -> None:
        """Count."""
        self._values[name] += amount

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def __call__(self) -> Mapping[str, int]:
        """A copy of all counters."""
        return dict(self._values)


@dataclass(frozen=True, slots=True)
class Distribution:
    """What a histogram holds: how many observations were at most each bound, the last count being those above all.

    Attributes:
        bounds: ascending.
        counts: per bucket, not cumulated; one more than bounds.
        total: the sum of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    def quantile(self, share: float) -> float:
        """About the value that `share` (0 to 1) of the observations do not exceed; 0 when there are none.

        Within a bucket they are taken to be spread evenly, as Prometheus does; above the last bound, it is that bound.
        """
        wanted = share * sum(self.counts)
        if not wanted:
            return 0.0
        before, low = 0, 0.0
        for bound, count in zip(self.bounds, self.counts, strict=False):
            if before + count >= wanted:
                return low + (bound - low) * (wanted - before) / count
            before += count
            low = bound
        return low

    def minus(self, earlier: Distribution) -> Distribution:
        """What was observed since `earlier` was read."""
        counts = tuple(now - then for now, then in zip(self.counts, earlier.counts, strict=True))
        return Distribution(self.bounds, counts, self.total - earlier.total)


class Histogram:
    """Seconds, sorted into buckets as they come: one bisection and two additions each."""

    __slots__ = ("_bounds", "_counts", "_microseconds")

    def __init__(self, bounds: Sequence[float] = DIAL_BOUNDS_S) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._microseconds = 0

    def observe(self, seconds: float) -> None:
        """Sort one observation in."""
        self._counts[bisect_left(self._bounds, seconds)] += 1
        self._microseconds += round(seconds * 1e6)

    def read(self) -> Distribution:
        """What it holds now."""
        return Distribution(self._bounds, tuple(self._counts), self._microseconds / 1e6)

    def flat(self, name: str) -> dict[str, int]:
        """The same as counters that may be summed: `NAME#BOUND`, and `NAME#us` for the sum in microseconds."""
        flat = {f"{name}#{bound:g}": count for bound, count in zip(self._bounds, self._counts, strict=False)}
        return flat | {f"{name}#inf": self._counts[-1], f"{name}#us": self._microseconds}


def unflatten(numbers: Mapping[str, int | float], name: str, bounds: Sequence[float] = DIAL_BOUNDS_S) -> Distribution:
    """`Histogram.flat`, read back, of one process or of the sums of several."""
    counts = [int(numbers.get(f"{name}#{bound:g}", 0)) for bound in bounds]
    counts.append(int(numbers.get(f"{name}#inf", 0)))
    return Distribution(tuple(bounds), tuple(counts), numbers.get(f"{name}#us", 0) / 1e6)


Labels = Mapping[str, str]
Value = int | float | Distribution


@dataclass(frozen=True, slots=True)
class Family:
    """One metric of the page.

    Attributes:
        name: as Prometheus wants it: prefix, base unit, `_total` for counters.
        kind: what it is.
        help: one sentence.
        samples: labels and value; a Distribution where kind is "histogram".
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: list[tuple[Labels, Value]] = field(default_factory=list)


def one(name: str, kind: Literal["counter", "gauge", "histogram"], text: str, value: Value) -> Family:
    """A metric without labels."""
    return Family(name, kind, text, [({}, value)])


def by(
    name: str, kind: Literal["counter", "gauge"], text: str, label: str, values: Mapping[str, int | float]
) -> Family:
    """A metric with one label. `values` has the label's values for keys; there may be none."""
    return Family(name, kind, text, [({label: word}, value) for word, value in values.items()])


def render(families: Iterable[Family]) -> str:
    """The page. Families without samples are still announced, so that a dashboard can be written for them."""
    lines: list[str] = []
    for family in families:
        lines += [f"# HELP {family.name} {_escape_help(family.help)}", f"# TYPE {family.name} {family.kind}"]
        for labels, value in family.samples:
            if isinstance(value, Distribution):
                lines += _histogram_lines(family.name, labels, value)
            else:
                lines.append(f"{family.name}{_labels(labels)} {_number(value)}")
    return "\n".join(lines) + "\n"


def _histogram_lines(name: str, labels: Labels, value: Distribution) -> list[str]:
    lines, cumulated = [], 0
    for bound, count in zip((*value.bounds, math.inf), value.counts, strict=True):
        cumulated += count
        lines.append(f"{name}_bucket{_labels({**labels, 'le': _number(bound)})} {cumulated}")
    return [*lines, f"{name}_sum{_labels(labels)} {_number(value.total)}", f"{name}_count{_labels(labels)} {cumulated}"]


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(text)}"' for name, text in labels.items()) + "}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return f"{value:d}" if isinstance(value, int) else repr(value)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _escape_help(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")
