"""baseline.json: what the smoke run and the count of instructions compare with."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from bench.toolchain import give_to_owner

PATH = Path(__file__).resolve().parent / "baseline.json"


@dataclass(slots=True)
class Baseline:
    """Numbers that a change should not make much worse.

    Attributes:
        ratios: case to how far the daemon was ahead of the forwarder.
        instructions: build of the core to case to instructions.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    instructions: dict[str, dict[str, int]] = field(default_factory=dict)


def load_baseline() -> Baseline:
    if not PATH.exists():
        return Baseline()
    kept = json.loads(PATH.read_text())
    return Baseline(kept["ratios"], kept["instructions"])


def save_baseline(baseline: Baseline) -> None:
    PATH.write_text(json.dumps({"ratios": baseline.ratios, "instructions": baseline.instructions}, indent=1) + "\n")
    give_to_owner(PATH)
