"""The whole path, measured: app -> kernel -> TUN -> daemon -> mTLS -> ingress, and back.

    sudo .venv/bin/python bench/bench_path.py [--cases up,down,...] [--seconds 2] [--rounds 5] [--ways ngrokd,forwarder]

Everything runs in private network namespaces (see stage.py). The real daemon and its peers run side by side as
processes of their own, on the same ingress and under the same load programs, which are compiled (bench/go):

    forwarder   a small forwarder in Go: kernel listener, one TLS dial per connection, header, two copies
    haproxy     TCP in, TLS with a client certificate out (without the binding header, on a port of its own)
    direct      no proxy and no TLS: what the kernel itself can do

Rounds alternate between the ways, so that what disturbs the machine disturbs all of them; a ratio is the median of
the rounds' ratios, above 1 when the daemon is ahead. All programs share the machine's cores.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.stage import Stage, Variant, Way, enter_namespaces, haproxy_version, open_stage  # noqa: E402
from bench.toolchain import build  # noqa: E402

ROUND_TRIP_MS = 50.0
SETTLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """What is measured.

    Attributes:
        family: the table and chart it belongs to.
        title: what it is, in a table.
        service: where it leads to.
        load: the load program's kind and arguments.
        figure: which of its numbers counts.
        unit: that number's unit, after division by `scale`.
        more: whether more is better.
        far: with a round trip of 50 ms to the ingress.
        seconds: of one measurement; 0 is what the command line says.
        slices: how many short measurements, alternating, make one round.
        rounds: at most.
        direct: whether the kernel's own connection is measured as well.
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
    seconds: float = 0.0
    slices: int = 1
    rounds: int = 99
    direct: bool = True


def opening(title: str, *load: str, rate: bool = False, far: bool = False, **more: Any) -> Case:
    """A case of new connections, each of which gets one byte echoed."""
    figure, unit, scale = ("rate", "/s", 1.0) if rate else ("p50_us", "ms", 1e3)
    family = "far" if far else "new"
    return Case(family, title, "echo", load, figure, unit, scale, more=rate, far=far, **more)


CASES: dict[str, Case] = {
    "up": Case("bulk", "up, 1 connection", "sink", ("up",), "gbit_s", "Gbit/s"),
    "down": Case("bulk", "down, 1 connection", "source", ("down",), "gbit_s", "Gbit/s"),
    "up8": Case("bulk", "up, 8 connections", "sink", ("up", "-connections", "8"), "gbit_s", "Gbit/s"),
    "down8": Case("bulk", "down, 8 connections", "source", ("down", "-connections", "8"), "gbit_s", "Gbit/s"),
    "pingpong": Case("ask", "1 connection, latency", "echo", ("ask",), "p50_us", "us", more=False, slices=4),
    "rate64": Case("ask", "64 connections, rate", "echo", ("ask", "-connections", "64"), "rate", "/s"),
    "rate512": Case("ask", "512 connections, rate", "echo", ("ask", "-connections", "512"), "rate", "/s"),
    "connect": opening("one after the other", "open"),
    "paced": opening("40 per second", "paced", "-rate", "40"),
    "burst": opening("32 at once", "open", "-connections", "32", rate=True),
    "far-connect": opening("one after the other", "open", far=True),
    "far-paced": opening("20 per second", "paced", "-rate", "20", far=True),
    "far-burst": opening("32 at once", "open", "-connections", "32", rate=True, far=True),
    "far-burst64": opening("64 at once", "open", "-connections", "64", rate=True, far=True),
}

# way -> case -> one result of the load program per round, with cpu_s added
Results = dict[str, dict[str, list[dict[str, Any]]]]


def measure(stage: Stage, ways: list[Way], cases: list[str], seconds: float, rounds: int) -> Results:
    """Run the cases, rounds outermost, so that a disturbance of a minute is one round of each."""
    results: Results = {case: {way.name: [] for way in ways} for case in cases}
    for index in range(rounds):
        for name in cases:
            case = CASES[name]
            if index >= case.rounds:
                continue
            order = ways[index % len(ways) :] + ways[: index % len(ways)]
            parts: dict[str, list[dict[str, Any]]] = {way.name: [] for way in order}
            for _ in range(case.slices):
                for way in order:
                    if way.program is not None or case.direct:
                        parts[way.name].append(run(stage, way, case, (case.seconds or seconds) / case.slices))
            for way in order:
                if parts[way.name]:
                    results[name][way.name].append(merge(parts[way.name]))
            progress(name, index, {way: values[-1][case.figure] for way, values in results[name].items() if values})
    return results


def run(stage: Stage, way: Way, case: Case, seconds: float) -> dict[str, Any]:
    before = way.cpu_seconds()
    result = stage.load(way.addresses[case.service], case.load[0], "-for", f"{seconds}s", *case.load[1:])
    time.sleep(SETTLE_S)  # what ends connections is part of their cost
    result["cpu_s"] = way.cpu_seconds() - before
    return result


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One result out of several short ones: counts add up, all else is the median."""
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


def progress(case: str, index: int, figures: dict[str, float]) -> None:
    print(
        f"  {case} {index + 1}: " + ", ".join(f"{way} {value:.4g}" for way, value in figures.items()), file=sys.stderr
    )


# -- figures -----------------------------------------------------------------------------------------------------------


def median(values: list[dict[str, Any]], key: str) -> float:
    return statistics.median([value.get(key, 0.0) for value in values]) if values else 0.0


def ratio(case: Case, of: list[dict[str, Any]], to: list[dict[str, Any]]) -> float:
    """How far `of` is ahead of `to`: the median of the rounds' ratios; 0 when nothing came through."""
    pairs = [(a.get(case.figure, 0.0), b.get(case.figure, 0.0)) for a, b in zip(of, to, strict=True)]
    ratios = [(a / b if case.more else b / a) for a, b in pairs if a and b]
    return statistics.median(ratios) if ratios else 0.0


def cost(values: list[dict[str, Any]]) -> str:
    """CPU of the proxy for what it carried."""
    spent = sum(value["cpu_s"] for value in values)
    if carried := sum(value.get("bytes", 0) for value in values):
        return f"{spent / carried * 1e9:.2f} s/GB"
    count = sum(value.get("total", 0) for value in values)
    return f"{spent / count * 1e3:.3f} s/1000" if count else "-"


def table(results: Results) -> Iterator[str]:
    """Lines for a terminal."""
    yield f"{'case':<34}{'way':<12}{'median':>10} {'unit':<7}{'ratio':>6}  {'p99 ms':>8}{'connect':>9}{'failed':>7}  cpu"
    for name, ways in results.items():
        case = CASES[name]
        label = ("50 ms away: " if case.far else "") + case.title
        first = next(iter(ways.values()))
        for way, values in ways.items():
            if not values:
                continue
            figure = median(values, case.figure) / case.scale
            share = "" if values is first else f"{ratio(case, first, values):.2f}"
            p99 = f"{median(values, 'p99_us') / 1e3:.2f}" if median(values, "p99_us") else ""
            connect = f"{median(values, 'connect_us') / 1e3:.2f}" if median(values, "connect_us") else ""
            failed = sum(value["failures"] for value in values)
            cpu = "" if way == "direct" else cost(values)
            shown = f"{figure:>10.2f} {case.unit:<7}{share:>6}  {p99:>8}{connect:>9}{failed:>7}  {cpu}"
            yield f"{label:<34}{way:<12}{shown}"
            label = ""
            for value in values:
                if value["failures"]:
                    yield f"{'':<34}  {value.get('failure', '')}"
                    break


# -- the command -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_ways(stage: Stage, names: list[str], variants: list[Variant]) -> Iterator[list[Way]]:
    with contextlib.ExitStack() as stack:
        ways = []
        for name in names:
            if name == "ngrokd":
                ways += [stack.enter_context(stage.daemon(variant)) for variant in variants]
            elif name == "forwarder":
                ways.append(stack.enter_context(stage.forwarder()))
            elif name == "haproxy" and haproxy_version():
                ways.append(stack.enter_context(stage.haproxy()))
            elif name == "direct":
                ways.append(stage.direct())
        yield ways


def parse_variant(text: str) -> Variant:
    """`NAME:python=PATH,net.workers=2`."""
    name, _, rest = text.partition(":")
    settings = dict(part.split("=", 1) for part in rest.split(",") if part)
    python = settings.pop("python", sys.executable)
    return Variant(name, python, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument("--ways", default="ngrokd,forwarder,haproxy,direct")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", default="", help="settings of the daemon: section.key=VALUE,... (values as in TOML)")
    parser.add_argument(
        "--variant", action="append", default=[], help="one more daemon: NAME:section.key=VALUE,python=PATH,..."
    )
    parser.add_argument("--json", action="store_true", help="every round's numbers as one JSON document")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    options = parser.parse_args()
    cases = options.cases.split(",")
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join(CASES)}")
    variants = [parse_variant(f"ngrokd:{options.set}"), *map(parse_variant, options.variant)]

    directory = Path(tempfile.mkdtemp(prefix="ngrokd-bench-"))
    try:
        program = build(directory)
        enter_namespaces(directory)
        results: Results = {}
        for far in (False, True):
            wanted = [name for name in cases if CASES[name].far == far]
            if not wanted:
                continue
            place = directory / ("far" if far else "near")
            place.mkdir()
            with (
                open_stage(place, program, delay_ms=ROUND_TRIP_MS / 2 if far else 0.0) as stage,
                open_ways(stage, options.ways.split(","), variants) as ways,
            ):
                results |= measure(stage, ways, wanted, options.seconds, options.rounds)
    finally:
        if options.keep:
            print(directory, file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)
    if options.json:
        print(json.dumps({"schema": "ngrokd.bench/2", "data": results}))
    else:
        print(
            f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {options.rounds} rounds; ratio > 1: ngrokd leads"
        )
        print("\n".join(table(results)))


if __name__ == "__main__":
    main()
