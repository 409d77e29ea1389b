"""The packet scripts whose instructions are counted must be conversations that work, or they count errors."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import bench_instructions as instructions
from bench.baseline import load_baseline
from bench.counter import InstructionCounter, NoCounterError


@pytest.mark.parametrize("name", instructions.CASES)
def test_a_script_plays_from_its_tape_as_it_was_recorded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Played packets that no longer fit would be dropped, which is cheaper than what is to be counted."""
    monkeypatch.setattr(instructions, "WARM_UP", 5)
    monkeypatch.setattr(instructions, "STEPS", 20)
    stacks = []
    make = instructions.new_stack

    def keep() -> object:
        stacks.append(make())
        return stacks[-1]

    monkeypatch.setattr(instructions, "new_stack", keep)
    instructions.play(name, 20)
    gc.enable()
    recorded, played = stacks
    assert not any(recorded.drops.values())
    assert not any(played.drops.values())
    assert (played.accepted, played.refused) == (recorded.accepted, recorded.refused)
    assert played.flow_count == recorded.flow_count


def test_the_core_has_not_become_half_as_dear_again() -> None:
    """Counts bear a busy machine. `make bench-smoke` is stricter; this is for changes nobody thought to measure."""
    try:
        InstructionCounter().close()
    except NoCounterError as error:
        pytest.skip(str(error))
    known = load_baseline().instructions.get(instructions.build_of_core())
    if known is None:
        pytest.skip(f"no baseline for {instructions.build_of_core()}")

    done = subprocess.run(
        [sys.executable, instructions.__file__, "--json"],
        cwd=Path(instructions.__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    counts = json.loads(done.stdout)

    assert counts["build"] == instructions.build_of_core()
    assert {name: count for name, count in counts["data"].items() if count > 1.5 * known[name]} == {}
