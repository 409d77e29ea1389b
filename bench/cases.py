"""What is measured under load, how rounds alternate, and the figures made of them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bench.stage import Stage, Way

ROUND_TRIP_MS = 50.0
SETTLE_S = 0.1
STORM_RATE = 500


@dataclass(frozen=True, slots=True)
class Case:
    """One load.

    Attributes:
        family: the table and chart it belongs to.
        title: what it is, in a table.
        service: where it leads to.
        load: the load program's kind and arguments.
        figure: which of its numbers counts.
        unit: that number's unit, after division by `scale`.
        more: whether more is better.
        far: with a round trip of 50 ms to the ingress.
        goal: how far ahead of the forwarder we want to be; 0: no goal.
        seconds: of one measurement; 0 is what the command line says.
        slices: how many short measurements, alternating, make one round.
        rounds: at most.
        variants: whether other variants of the daemon are measured as well.
    """

    family: str
    title: str
    service: str
    load: tuple[str, ...]
    figure: str
    unit: str
    scale: float = 1.0
    more: bool = True
    far: bool = False
    goal: float = 0.0
    seconds: float = 0.0
    slices: int = 1
    rounds: int = 99
    variants: bool = False


def _bulk(title: str, service: str, *load: str, **more: Any) -> Case:
    return Case("bulk", title, service, load, "gbit_s", "Gbit/s", **more)


def _asking(connections: int, goal: float = 0.0) -> Case:
    load = ("ask", "-connections", str(connections))
    return Case("ask", f"{connections} connections, rate", "echo", load, "rate", "/s", goal=goal, variants=True)


def _opening(title: str, *load: str, figure: str = "p50_us", far: bool = False, **more: Any) -> Case:
    """A case of new connections, each of which gets one byte echoed."""
    unit, scale = ("/s", 1.0) if figure == "rate" else ("ms", 1e3)
    family = "far" if far else "new"
    return Case(family, title, "echo", load, figure, unit, scale, more=figure == "rate", far=far, **more)


CASES: dict[str, Case] = {
    "up": _bulk("up, 1 connection", "sink", "up", goal=1.0),
    "down": _bulk("down, 1 connection", "source", "down", goal=1.0),
    "up8": _bulk("up, 8 connections", "sink", "up", "-connections", "8", goal=0.9, variants=True),
    "down8": _bulk("down, 8 connections", "source", "down", "-connections", "8", goal=0.9, variants=True),
    "pingpong": Case(
        "ask", "1 connection, latency", "echo", ("ask",), "p50_us", "us", more=False, goal=0.67, slices=4
    ),
    "rate64": _asking(64, goal=0.55),
    "rate512": _asking(512),
    "connect": _opening("one after the other, time", "open", goal=1.5),
    "paced": _opening("40 per second, time", "paced", "-rate", "40"),
    "burst": _opening("32 at once, rate", "open", "-connections", "32", figure="rate", goal=1.0, variants=True),
    "far-connect": _opening("one after the other, time", "open", far=True),
    "far-paced": _opening("20 per second, time", "paced", "-rate", "20", far=True, goal=1.8),
    "far-burst": _opening("32 at once, rate", "open", "-connections", "32", figure="rate", far=True),
    "far-burst64": _opening("64 at once, rate", "open", "-connections", "64", figure="rate", far=True, goal=1.7),
    "far-storm": _opening(
        f"{STORM_RATE} per second for 30 s, p99", "paced", "-rate", str(STORM_RATE),
        figure="p99_us", far=True, seconds=30.0, rounds=2, variants=True,
    ),
}  # fmt: skip

# case -> way -> one result of the load program per round, with cpu_s added
Results = dict[str, dict[str, list[dict[str, Any]]]]
Values = Sequence[dict[str, Any]]


def measure(
    stage: Stage, ways: Sequence[Way], cases: Sequence[str], seconds: float, rounds: int, *, every: bool = False
) -> Results:
    """Run the cases, rounds outermost, so that a disturbance of a minute hits one round of each.

    Args:
        stage: where.
        ways: what is compared, first the daemon. Each round starts with another one.
        cases: names of cases.
        seconds: length of one measurement.
        rounds: how many.
        every: with the variants of the daemon in each case.
    """
    results: Results = {case: {} for case in cases}
    for index in range(rounds):
        for name in cases:
            case = CASES[name]
            if index < case.rounds:
                chosen = [way for way in ways if every or case.variants or not way.variant]
                order = chosen[index % len(chosen) :] + chosen[: index % len(chosen)]
                for way, result in _round(stage, order, case, seconds).items():
                    results[name].setdefault(way, []).append(result)
                _progress(name, index, results[name])
    in_order = [way.name for way in ways]
    return {case: dict(sorted(of.items(), key=lambda item: in_order.index(item[0]))) for case, of in results.items()}


def _round(stage: Stage, order: Sequence[Way], case: Case, seconds: float) -> dict[str, dict[str, Any]]:
    parts: dict[str, list[dict[str, Any]]] = {way.name: [] for way in order}
    for _ in range(case.slices):
        for way in order:
            parts[way.name].append(_run(stage, way, case, (case.seconds or seconds) / case.slices))
    return {way: _merge(results) for way, results in parts.items()}


def _run(stage: Stage, way: Way, case: Case, seconds: float) -> dict[str, Any]:
    before = way.cpu_seconds()
    result = stage.load(way.addresses[case.service], case.load[0], "-for", f"{seconds}s", *case.load[1:])
    time.sleep(SETTLE_S)  # what ends connections is part of their cost
    result["cpu_s"] = way.cpu_seconds() - before
    way.check()
    return result


def _merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One result out of several short ones: counts add up, of all else the median counts."""
    if len(parts) == 1:
        return parts[0]
    merged: dict[str, Any] = {}
    for key in parts[0]:
        values = [part[key] for part in parts if key in part]
        if key in ("count", "total", "bytes", "failures", "cpu_s", "seconds"):
            merged[key] = sum(values)
        else:
            merged[key] = values[0] if isinstance(values[0], str) else statistics.median(values)
    return merged


def _progress(name: str, index: int, results: dict[str, list[dict[str, Any]]]) -> None:
    case = CASES[name]
    shown = [f"{way} {values[-1].get(case.figure, 0.0) / case.scale:.4g}" for way, values in results.items()]
    print(f"  {name} {index + 1}: {', '.join(shown)} {case.unit}", file=sys.stderr, flush=True)


# -- figures -----------------------------------------------------------------------------------------------------------


def median(values: Values, key: str) -> float:
    """Of the rounds; 0.0 where nothing was measured."""
    return statistics.median([value.get(key, 0.0) for value in values]) if values else 0.0


def ratios(case: Case, of: Values, to: Values) -> list[float]:
    """How far `of` is ahead of `to` in each round (above 1: ahead); a way that carried nothing has no ratio."""
    pairs = [(a.get(case.figure, 0.0), b.get(case.figure, 0.0)) for a, b in zip(of, to, strict=True)]
    return [(a / b if case.more else b / a) for a, b in pairs if a and b]


def ratio(case: Case, of: Values, to: Values) -> float:
    """The median of the rounds' ratios; 0.0 when there are none."""
    found = ratios(case, of, to)
    return statistics.median(found) if found else 0.0


def failures(values: Values) -> int:
    return sum(value["failures"] for value in values)


def cost(values: Values) -> tuple[float, str]:
    """CPU that the proxy spent on what it carried: seconds per gigabyte, or milliseconds per request or connection."""
    spent = sum(value["cpu_s"] for value in values)
    if carried := sum(value.get("bytes", 0) for value in values):
        return spent / carried * 1e9, "s/GB"
    count = sum(value.get("total", 0) for value in values)
    return (spent / count * 1e3, "s/1000") if count else (0.0, "")
