"""The whole path, measured: app -> kernel -> TUN -> daemon -> mTLS -> ingress, and back.

    sudo .venv/bin/python bench/bench_path.py [--cases up,down,...] [--seconds 2] [--rounds 5] [--ways ngrokd,forwarder]

Everything runs in private network namespaces (see stage.py). The real daemon and its peers run side by side as
processes of their own, on the same ingress and under the same load programs, which are compiled (bench/go):

    forwarder   a small forwarder in Go: kernel listener, one TLS dial per connection, header, two copies
    haproxy     TCP in, TLS with a client certificate out (without the binding header, on a port of its own)
    direct      no proxy and no TLS: what the kernel itself can do

Rounds alternate between the ways, so that what disturbs the machine disturbs all of them; a ratio is the median of
the rounds' ratios, above 1 when the daemon is ahead. All programs share the machine's cores.

Cases: those of cases.py, and `rest` (start-up, memory, idle connections). With --record the numbers go to
results.json, RESULTS.md and charts/, where they replace those of the families that were measured.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.cases import CASES, ROUND_TRIP_MS, Results, measure  # noqa: E402
from bench.report import describe_run, record, rest_table, table  # noqa: E402
from bench.rest import IDLE_CONNECTIONS, KNOWN_ENDPOINTS, Figures, measure_known, measure_rest  # noqa: E402
from bench.stage import (  # noqa: E402
    DAEMON,
    SERVICES,
    Stage,
    Variant,
    Way,
    enter_namespaces,
    haproxy_version,
    open_stage,
)
from bench.toolchain import build  # noqa: E402

WAYS = (DAEMON, "forwarder", "haproxy", "direct")
REST = "rest"


@contextlib.contextmanager
def private_place(*, keep: bool = False) -> Iterator[tuple[Path, Path]]:
    """A temporary directory and the compiled program in it, in namespaces of this process's own."""
    directory = Path(tempfile.mkdtemp(prefix="ngrokd-bench-"))
    try:
        program = build(directory)
        enter_namespaces(directory)
        yield directory, program
    finally:
        if keep:
            print(f"logs: {directory}", file=sys.stderr)
        else:
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def open_ways(stage: Stage, names: Sequence[str], variants: Sequence[Variant]) -> Iterator[list[Way]]:
    """All ways at the same time, first the daemon and its variants."""
    with contextlib.ExitStack() as stack:
        ways = []
        for name in names:
            if name == DAEMON:
                ways += [stack.enter_context(stage.daemon(variant)) for variant in variants]
            elif name == "forwarder":
                ways.append(stack.enter_context(stage.forwarder()))
            elif name == "haproxy" and haproxy_version():
                ways.append(stack.enter_context(stage.haproxy()))
            elif name == "direct":
                ways.append(stage.direct())
        yield ways


def measure_load(
    place: Path, program: Path, cases: Sequence[str], names: Sequence[str], variants: Sequence[Variant],
    seconds: float, rounds: int,
) -> Results:  # fmt: skip
    """All cases, those with a near ingress first."""
    results: Results = {}
    for far in (False, True):
        wanted = [name for name in cases if CASES[name].far == far]
        if wanted:
            directory = place / ("far" if far else "near")
            directory.mkdir()
            with (
                open_stage(directory, program, delay_ms=ROUND_TRIP_MS / 2 if far else 0.0) as stage,
                open_ways(stage, names, variants) as ways,
            ):
                results |= measure(stage, ways, wanted, seconds, rounds)
    return results


def measure_at_rest(
    place: Path, program: Path, names: Sequence[str], variants: Sequence[Variant], rounds: int, connections: int
) -> Figures:
    """What programs cost that do nothing."""
    directory = place / "rest"
    directory.mkdir()
    with open_stage(directory, program, endpoints=KNOWN_ENDPOINTS - len(SERVICES)) as stage:
        ways = (
            {variant.name: functools.partial(stage.daemon, variant) for variant in variants} if DAEMON in names else {}
        )
        if "forwarder" in names:
            ways["forwarder"] = stage.forwarder  # type: ignore[assignment]  # called without arguments, like the others
        if "haproxy" in names and haproxy_version():
            ways["haproxy"] = stage.haproxy  # type: ignore[assignment]
        figures = measure_rest(stage, ways, rounds, connections)
        if DAEMON in names:
            for figure, values in measure_known(stage, variants[0], rounds).items():
                figures[figure] = {DAEMON: values}
    return figures


def parse_variant(text: str) -> Variant:
    """`NAME:python=PATH,net.workers=2`."""
    name, _, rest = text.partition(":")
    settings = dict(part.split("=", 1) for part in rest.split(",") if part)
    python = settings.pop("python", sys.executable)
    return Variant(name, python, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join((*CASES, REST)), help="default: all")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=IDLE_CONNECTIONS, help="idle ones, in `rest`")
    parser.add_argument("--set", default="", help="settings of the daemon: section.key=VALUE,... (values as in TOML)")
    parser.add_argument(
        "--variant", action="append", default=[], help="one more daemon: NAME:section.key=VALUE,python=PATH,..."
    )
    parser.add_argument("--record", action="store_true", help="write results.json, RESULTS.md and charts/")
    parser.add_argument("--json", action="store_true", help="every round's numbers as one JSON document")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    options = parser.parse_args()
    names, chosen = options.cases.split(","), options.ways.split(",")
    if unknown := [name for name in names if name not in CASES and name != REST]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join((*CASES, REST))}")
    if unknown := [name for name in chosen if name not in WAYS]:
        parser.error(f"no such way: {', '.join(unknown)}; there are {', '.join(WAYS)}")
    variants = [parse_variant(f"{DAEMON}:{options.set}"), *map(parse_variant, options.variant)]
    run = describe_run(
        "bench/bench_path.py " + " ".join(sys.argv[1:]), os.getloadavg()[0], options.rounds, options.seconds
    )

    results, figures = {}, None
    with private_place(keep=options.keep) as (place, program):
        if cases := [name for name in names if name != REST]:
            results = measure_load(place, program, cases, chosen, variants, options.seconds, options.rounds)
        if REST in names:
            figures = measure_at_rest(place, program, chosen, variants, min(3, options.rounds), options.connections)

    if options.record:
        record(run, results, figures)
    if options.json:
        print(json.dumps({"schema": "ngrokd.bench/2", "run": run, "results": results, "rest": figures}))
        return
    print(f"{run['machine']}, load before {run['load_before']}; {options.rounds} rounds; ratio > 1: {DAEMON} is ahead")
    print("\n".join(table(results)) if results else "")
    print("\n".join(rest_table(figures)) if figures else "")


if __name__ == "__main__":
    main()
