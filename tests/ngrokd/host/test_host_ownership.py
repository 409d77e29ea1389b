"""Whoever can change what root runs is root."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ngrokd.host.ownership import weak_spots

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="gives files to others")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """bin/ngrokd -> ../venv/run, all of it root's; the way to it is sticky (/tmp) or private."""
    (tmp_path / "bin").mkdir(mode=0o755)
    (tmp_path / "venv/lib").mkdir(mode=0o755, parents=True)
    (tmp_path / "venv/run").write_text("")
    (tmp_path / "venv/lib/x.py").write_text("")
    (tmp_path / "bin/ngrokd").symlink_to("../venv/run")
    return tmp_path


def test_what_is_roots_alone_is_safe(tree: Path) -> None:
    """Through a link, and below a sticky directory."""
    assert weak_spots([str(tree / "bin/ngrokd")], [str(tree / "venv")]) == []


@pytest.mark.parametrize("part", ["bin", "bin/ngrokd", "venv", "venv/run"])
def test_every_step_of_the_way_counts(tree: Path, part: str) -> None:
    """The directory of a link, the link, the directory it leads to, the file."""
    os.chown(tree / part, 1000, 1000, follow_symlinks=False)

    assert weak_spots([str(tree / "bin/ngrokd")]) == [f"{tree}/{part} belongs to uid 1000"]


def test_groups_and_everybody_count_and_roots_group_does_not(tree: Path) -> None:
    """By the mode."""
    (tree / "venv/lib/x.py").chmod(0o666)
    (tree / "venv/lib").chmod(0o775)

    assert weak_spots([], [str(tree / "venv")]) == [f"{tree}/venv/lib/x.py can be changed by everybody"]
    os.chown(tree / "venv/lib", 0, 1000)
    assert f"{tree}/venv/lib can be changed by group 1000" in weak_spots([], [str(tree / "venv")])


def test_a_sticky_directory_protects_what_is_roots_but_is_no_home_for_it(tree: Path) -> None:
    """As /tmp: on the way, not as the tree itself."""
    (tree / "venv").chmod(0o1777)

    assert weak_spots([str(tree / "venv/run")]) == []
    assert weak_spots([], [str(tree / "venv")]) == [f"{tree}/venv can be changed by everybody"]


def test_what_is_not_there_cannot_be_judged(tree: Path) -> None:
    """So it is named."""
    assert weak_spots([str(tree / "missing/x")]) == [f"{tree}/missing cannot be looked at: No such file or directory"]
    (tree / "loop").symlink_to("loop")
    assert "too many links" in weak_spots([str(tree / "loop")])[0]


def test_looking_ends_after_a_few(tree: Path) -> None:
    """One is enough to refuse."""
    for number in range(20):
        (tree / f"venv/lib/{number}.py").write_text("")
        (tree / f"venv/lib/{number}.py").chmod(0o666)

    assert len(weak_spots([], [str(tree / "venv")], most=3)) == 3
