"""The whole path, measured: app -> kernel -> TUN -> daemon -> mTLS -> ingress, and back.

    sudo .venv/bin/python bench/bench_path.py [--cases up,down,...] [--seconds 2] [--rounds 5] [--ways ngrokd,forwarder]

Everything runs in private network namespaces (see stage.py). The real daemon and its peers run side by side as
processes of their own, on the same ingress and under the same load programs, which are compiled (bench/go):

    forwarder   a small forwarder in Go: kernel listener, one TLS dial per connection, header, two copies
    resuming    the same with TLS session tickets (only when asked for)
    haproxy     TCP in, TLS with a client certificate out (without the binding header, on a port of its own)
    direct      no proxy and no TLS: what the kernel itself can do

Rounds alternate between the ways, so that what disturbs the machine disturbs all of them; a ratio is the median of
the rounds' ratios, above 1 when the daemon is ahead. All programs share the machine's cores.

Two versions beside each other, alternating: --ways ngrokd --all-variants --variant before:commit=HEAD
One worker and two, beside the forwarder:    --ways ngrokd,forwarder --all-variants --workers 2 --cases rate64,up8

Cases: those of cases.py, and `rest` (start-up, memory, idle connections). With --record the numbers go to
results.json, RESULTS.md and charts/, where they replace those of the families that were measured.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench.cases import CASES, ROUND_TRIP_MS, Results, measure  # noqa: E402
from bench.report import describe_run, full_commit, record, rest_table, table  # noqa: E402
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

WAYS = (DAEMON, "forwarder", "resuming", "haproxy", "direct")
USUAL_WAYS = (DAEMON, "forwarder", "haproxy", "direct")
REST = "rest"


@dataclass(frozen=True, slots=True)
class Place:
    """A temporary directory.

    Attributes:
        directory: for files.
        program: the compiled half of the benchmark.
    """

    directory: Path
    program: Path

    def variant(self, text: str) -> Variant:
        """Parse NAME:KEY=VALUE,... and copy the sources that it names, so that edits meanwhile change nothing."""
        name, _, rest = text.partition(":")
        settings = dict(part.split("=", 1) for part in rest.split(",") if part)
        commit, python = settings.pop("commit", ""), settings.pop("python", sys.executable)
        sources = Path(tempfile.mkdtemp(prefix="sources-", dir=self.directory))
        if python == sys.executable:
            copy_sources(sources, commit)
        return Variant(name, sources, python, settings)


def copy_sources(target: Path, commit: str) -> None:
    """Put `ngrokd` and `tun` into a directory: those of a commit, or as they are now."""
    packages = ("ngrokd", "tun")
    if commit:
        subprocess.run(
            f"git -c safe.directory={ROOT} archive {shlex.quote(commit)} {' '.join(packages)} | tar -x -C {target}",
            shell=True, check=True, cwd=ROOT,
        )  # fmt: skip
    else:
        for package in packages:
            shutil.copytree(ROOT / package, target / package, ignore=shutil.ignore_patterns("__pycache__"))
    compileall.compile_dir(target, quiet=2)  # as pip does


@contextlib.contextmanager
def private_place(*, keep: bool = False) -> Iterator[Place]:
    """A place, in namespaces of this process's own."""
    directory = Path(tempfile.mkdtemp(prefix="ngrokd-bench-"))
    try:
        program = build(directory)
        enter_namespaces(directory)
        yield Place(directory, program)
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
            elif name == "resuming":
                ways.append(stack.enter_context(stage.forwarder(resume=True)))
            elif name == "haproxy" and haproxy_version():
                ways.append(stack.enter_context(stage.haproxy()))
            elif name == "direct":
                ways.append(stage.direct())
        for way in ways:
            if way.program:
                print(f"  {way.name} is process {way.program.pid}", file=sys.stderr)
        yield ways


def measure_load(
    place: Place,
    cases: Sequence[str],
    names: Sequence[str],
    variants: Sequence[Variant],
    seconds: float,
    rounds: int,
    *,
    every: bool = False,
) -> Results:
    """All cases, those with a near ingress first; `every`: with the variants in each of them."""
    results: Results = {}
    for far in (False, True):
        wanted = [name for name in cases if CASES[name].far == far]
        if wanted:
            with (
                open_stage_in(place, delay_ms=ROUND_TRIP_MS / 2 if far else 0.0) as stage,
                open_ways(stage, names, variants) as ways,
            ):
                results |= measure(stage, ways, wanted, seconds, rounds, every=every)
    return results


def open_stage_in(place: Place, **how: Any) -> AbstractContextManager[Stage]:
    directory = Path(tempfile.mkdtemp(prefix="stage-", dir=place.directory))
    return open_stage(directory, place.program, **how)


def measure_at_rest(
    place: Place, names: Sequence[str], variants: Sequence[Variant], rounds: int, connections: int
) -> Figures:
    """What programs cost that do nothing."""
    with open_stage_in(place, endpoints=KNOWN_ENDPOINTS - len(SERVICES)) as stage:
        ways: dict[str, Callable[[], AbstractContextManager[Way]]] = {}
        if DAEMON in names:
            ways |= {variant.name: functools.partial(stage.daemon, variant) for variant in variants}
        if "forwarder" in names:
            ways["forwarder"] = stage.forwarder
        if "resuming" in names:
            ways["resuming"] = functools.partial(stage.forwarder, resume=True)
        if "haproxy" in names and haproxy_version():
            ways["haproxy"] = stage.haproxy
        figures = measure_rest(stage, ways, rounds, connections)
        if DAEMON in names:
            for figure, values in measure_known(stage, variants[0], rounds).items():
                figures[figure] = {DAEMON: values}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join((*CASES, REST)), help="default: all")
    parser.add_argument("--ways", default=",".join(USUAL_WAYS))
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=IDLE_CONNECTIONS, help="idle ones, in `rest`")
    parser.add_argument("--set", default="", help="of the daemon: section.key=VALUE,... (VALUE as in TOML)")
    parser.add_argument("--commit", default="", help="measure this commit; default: the files as they are")
    parser.add_argument(
        "--variant",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="one more daemon, in some cases; KEY: commit, python (one that has ngrokd installed), or section.key",
    )
    parser.add_argument(
        "--workers", type=int, action="append", default=[], metavar="N", help="one more daemon, with N workers"
    )
    parser.add_argument("--all-variants", action="store_true", help="these in all cases")
    parser.add_argument("--record", action="store_true", help="write results.json, RESULTS.md and charts/")
    parser.add_argument("--json", action="store_true", help="every round's numbers as one JSON document")
    parser.add_argument("--keep", action="store_true", help="keep the directory with the logs")
    options = parser.parse_args()
    names, chosen = options.cases.split(","), options.ways.split(",")
    if unknown := [name for name in names if name not in CASES and name != REST]:
        parser.error(f"no such case: {', '.join(unknown)}; there are {', '.join((*CASES, REST))}")
    if unknown := [name for name in chosen if name not in WAYS]:
        parser.error(f"no such way: {', '.join(unknown)}; there are {', '.join(WAYS)}")
    if options.record and options.connections != IDLE_CONNECTIONS:
        parser.error(f"results are kept of {IDLE_CONNECTIONS} idle connections only")
    commit = full_commit(options.commit or ("HEAD" if options.record else ""))
    own = f"{DAEMON}:{options.set}" + (f",commit={commit}" if commit else "")
    crews = [own.replace(DAEMON, f"workers{n}", 1) + f",net.workers={n}" for n in options.workers]
    command = f"bench/bench_path.py {' '.join(sys.argv[1:])}"
    run = describe_run(command, commit, os.getloadavg()[0], options.rounds, options.seconds)

    results, figures = {}, None
    with private_place(keep=options.keep) as place:
        variants = [place.variant(text) for text in (own, *crews, *options.variant)]
        if cases := [name for name in names if name != REST]:
            every = options.all_variants
            results = measure_load(place, cases, chosen, variants, options.seconds, options.rounds, every=every)
        if REST in names:
            figures = measure_at_rest(place, chosen, variants, min(3, options.rounds), options.connections)

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
