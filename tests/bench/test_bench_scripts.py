"""The packet scripts whose instructions are counted must be conversations that work, or they count errors."""

from __future__ import annotations

import gc

import pytest

from bench import bench_instructions as instructions


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
