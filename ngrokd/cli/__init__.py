"""The command line: `ngrokd`, and `ngrokctl` for hands that learned the Go daemon's.

One file per family of commands, each imported when it is used. What only asks the daemon imports no Trio.
"""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """`ngrokd`: without a command it runs the daemon."""
    _enter("ngrokd")


def ngrokctl() -> NoReturn:
    """`ngrokctl`: the same commands; without one it prints help."""
    _enter("ngrokctl")


def _enter(name: str) -> NoReturn:
    if sys.platform not in ("linux", "darwin"):
        # Before any import of ours: what lies behind needs modules that exist on Unix only.
        print("error: ngrokd runs on Linux and macOS; on Windows, run it inside WSL2", file=sys.stderr)
        sys.exit(1)
    from ngrokd.cli.app import invoke

    sys.exit(invoke(name, sys.argv[1:]))
