"""Numbers that the daemon counts, and how they are read together.

The data path counts in plain ints of its own; nothing is locked, timed or aggregated there. Whoever owns numbers adds a
*source* here, a function that returns them by name, and it is called only when somebody asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

Source = Callable[[], Mapping[str, int | float]]

_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_]")


class Counters:
    """A fixed group of counters: an unknown name is a bug and raises KeyError.

    An instance is a `Source` itself.
    """

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


class Metrics:
    """All sources, each under a prefix: `add("control", counters)` makes `control.requests` of `requests`."""

    def __init__(self) -> None:
        self._sources: list[tuple[str, Source]] = []

    def add(self, prefix: str, source: Source) -> None:
        """Read `source` too, from now on. With the prefix "" its names stand as they are."""
        self._sources.append((f"{prefix}." if prefix else "", source))

    def snapshot(self) -> dict[str, int | float]:
        """Every number now, sorted by dotted name."""
        numbers = {prefix + name: value for prefix, source in self._sources for name, value in source().items()}
        return dict(sorted(numbers.items()))


def render(numbers: Mapping[str, int | float]) -> str:
    """The numbers as Prometheus text: `stack.segments_sent` is `ngrokd_stack_segments_sent`, of no declared type."""
    return "".join(f"ngrokd_{_NOT_IN_NAMES.sub('_', name)} {value}\n" for name, value in numbers.items())
