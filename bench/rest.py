"""What the daemon and its peers cost while nothing happens: start-up, memory, CPU, and thousands of idle connections.

Every figure here is of a fresh process, since what memory a process has used before, it may keep.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from bench.stage import Stage, Variant, Way, running

IDLE_CONNECTIONS = 5000
KNOWN_ENDPOINTS = 100
WATCHED_S = 5.0
SETTLE_S = 2.0

Open = Mapping[str, Callable[[], AbstractContextManager[Way]]]
# figure -> way -> one number per round
Figures = dict[str, dict[str, list[float]]]

# figure: title, unit
FIGURES: dict[str, tuple[str, str]] = {
    "start_ms": ("start until it serves (ngrokd: with registration)", "ms"),
    "known_ms": (f"start with {KNOWN_ENDPOINTS} known endpoints and the API down", "ms"),
    "status_ms": ("`ngrokd status`", "ms"),
    "memory_mib": ("memory, without connections", "MiB"),
    "idle_percent": ("CPU, without connections", "% of a core"),
    "flow_kib": (f"memory of an idle connection ({IDLE_CONNECTIONS:,} of them)", "KiB"),
    "held_percent": (f"CPU, {IDLE_CONNECTIONS:,} idle connections", "% of a core"),
    "open_rate": ("rate at which these were opened, 16 at a time", "/s"),
    "failures": ("of these that failed to open, or to answer afterwards", ""),
}


def measure_rest(stage: Stage, open_ways: Open, rounds: int, connections: int = IDLE_CONNECTIONS) -> Figures:
    """Start each way `rounds` times, in turn, and watch it."""
    figures: Figures = {name: {} for name in FIGURES}

    def note(figure: str, way: str, value: float) -> None:
        figures[figure].setdefault(way, []).append(value)

    for _ in range(rounds):
        for name, open_way in open_ways.items():
            with open_way() as way:
                assert way.program is not None
                note("start_ms", name, way.program.started_in * 1e3)
                time.sleep(SETTLE_S)
                note("memory_mib", name, way.memory_bytes() / 2**20)
                note("idle_percent", name, _percent(way))
                for figure, value in _hold(stage, way, connections).items():
                    note(figure, name, value)
                way.check()
            latest = [f"{figure} {of[name][-1]:.4g}" for figure, of in figures.items() if name in of]
            print(f"  {name}: {', '.join(latest)}", file=sys.stderr, flush=True)
    return figures


def _hold(stage: Stage, way: Way, connections: int) -> dict[str, float]:
    stage.load(way.addresses["echo"], "ask", "-connections", 16, "-for", "0.3s")  # load what is loaded late
    before = way.memory_bytes()
    held = stage.hold(way.addresses["echo"], connections)
    time.sleep(SETTLE_S)
    percent = _percent(way)
    grown = way.memory_bytes() - before  # by now they have been idle for a while
    result = held.release()
    return {
        "flow_kib": grown / 1024 / max(1, held.count),
        "held_percent": percent,
        "open_rate": result["rate"],
        "failures": result["failures"],
    }


def _percent(way: Way) -> float:
    before = way.cpu_seconds()
    time.sleep(WATCHED_S)
    return (way.cpu_seconds() - before) / WATCHED_S * 100


def measure_known(stage: Stage, variant: Variant, rounds: int) -> dict[str, list[float]]:
    """Of the daemon only: `ngrokd status`, and a start from what it remembers while the API does not answer.

    Args:
        stage: one whose control plane has `KNOWN_ENDPOINTS` in all.
        variant: the daemon.
        rounds: how often.
    """
    home = stage.new_home()
    with running(stage.start_daemon(variant, home)):
        _until_known(home / "hosts")
        status = [_status_ms(variant, home) for _ in range(rounds)]
    nobody = replace(variant, settings={**variant.settings, "api.url": '"https://127.0.0.1:9"'})
    known = []
    for _ in range(rounds):
        with running(stage.start_daemon(nobody, home)) as program:
            known.append(program.started_in * 1e3)
            _until_known(home / "hosts")
    return {"known_ms": known, "status_ms": status}


def _until_known(hosts: Path) -> None:
    end = time.monotonic() + 20
    while hosts.read_text().count(".bench") < KNOWN_ENDPOINTS:
        if time.monotonic() > end:
            raise SystemExit("the daemon does not know its endpoints")
        time.sleep(0.02)


def _status_ms(variant: Variant, home: Path) -> float:
    command = [variant.python, "-m", "ngrokd", "status", "--config", str(home / "config.toml")]
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, cwd=variant.sources)
    return (time.perf_counter() - started) * 1e3
