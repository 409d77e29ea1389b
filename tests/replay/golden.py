"""Tell what a fresh stack answers to a capture, and keep what it answered as the reference.

python -m tests.replay.golden                    make all golden files anew (then read the difference: git diff)
python -m tests.replay.golden redis ssh          only these
python -m tests.replay.golden --show FILE        print what would be in it, for any capture
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

from tests.replay.player import Player, load

HERE: Final = Path(__file__).parent
CAPTURES: Final = HERE / "captures"
GOLDEN: Final = HERE / "golden"


def captures() -> list[Path]:
    """All captures of this repository."""
    return sorted(CAPTURES.glob("*.pcapng"))


def golden_file(capture: Path) -> Path:
    """Where the reference for a capture is."""
    return GOLDEN / f"{capture.stem}.txt"


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.replay.golden", description="make golden files")
    parser.add_argument("names", nargs="*", metavar="NAME", help="captures without path and ending; all by default")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print, for any capture, and write nothing")
    options = parser.parse_args(arguments)
    if options.show is not None:
        sys.stdout.write(Player(load(options.show)).play().tell())
        return 0
    for capture in captures():
        if options.names and capture.stem not in options.names:
            continue
        text = Player(load(capture)).play().tell()
        target = golden_file(capture)
        state = "same" if target.exists() and target.read_text() == text else "written"
        if state == "written":
            target.write_text(text)
        sys.stdout.write(f"{target.name}: {state}, {text.count(chr(10))} lines\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
