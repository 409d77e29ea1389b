"""Has a change halved the speed? Under two minutes, ratios only, generous bounds.

    sudo .venv/bin/python bench/bench_smoke.py [--keep]

The daemon beside the reference forwarder in a few short cases, as in bench_path.py. A case fails when its ratio is less
than half of that in baseline.json, twice in a row, or when a connection through the daemon fails: ratios bear a busy
machine, times would not. --keep makes the measured ratios the baseline.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench.baseline import load_baseline, save_baseline
from bench.bench_path import Place, measure_load, private_place
from bench.cases import CASES, failures, ratio
from bench.stage import DAEMON

SMOKE_CASES = ("up", "down", "pingpong", "rate64", "connect", "burst", "far-connect", "far-burst64")
SECONDS = 0.7
ROUNDS = 3
REFERENCE = "forwarder"


def measure_ratios(place: Place, names: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Each case's ratio, and a sentence for each in which a connection through the daemon failed."""
    results = measure_load(place, names, (DAEMON, REFERENCE), [place.variant(DAEMON)], SECONDS, ROUNDS)
    found: dict[str, float] = {}
    wrong: list[str] = []
    for name, ways in results.items():
        found[name] = ratio(CASES[name], ways[DAEMON], ways[REFERENCE])
        if count := failures(ways[DAEMON]):
            first = next(value["failure"] for value in ways[DAEMON] if value["failures"])
            wrong.append(f"{name}: {count} connections failed: {first}")
    return found, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="make these ratios the baseline")
    options = parser.parse_args()
    baseline = load_baseline()
    with private_place() as place:
        found, wrong = measure_ratios(place, SMOKE_CASES)
        if not options.keep and (slow := _halved(found, baseline.ratios)):
            print(f"again, to be sure: {', '.join(slow)}", file=sys.stderr)
            again, more_wrong = measure_ratios(place, slow)
            found |= {name: max(found[name], again[name]) for name in slow}
            wrong += more_wrong

    print(f"{'case':<14}{'ratio':>7}{'baseline':>10}   ratio > 1: {DAEMON} is ahead of the {REFERENCE}")
    halved = [] if options.keep else _halved(found, baseline.ratios)
    for name, value in found.items():
        known = f"{baseline.ratios[name]:>10.2f}" if name in baseline.ratios else f"{'-':>10}"
        verdict = "   less than half of what it was" if name in halved else ""
        print(f"{name:<14}{value:>7.2f}{known}{verdict}")
    print("\n".join(wrong))
    if options.keep:
        baseline.ratios |= {name: round(value, 2) for name, value in found.items()}
        save_baseline(baseline)
    return 1 if halved or wrong else 0


def _halved(found: dict[str, float], known: dict[str, float]) -> list[str]:
    return [name for name, value in found.items() if value < known.get(name, 0.0) / 2]


if __name__ == "__main__":
    sys.exit(main())
