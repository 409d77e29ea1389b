"""The command line: `ngrokd`, and `ngrokctl` for hands that learned the Go daemon's.

One file per family of commands, each imported when it is used. What only asks the daemon imports no Trio.
"""

from __future__ import annotations

import os
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
    _open_standard_streams()
    from ngrokd.cli.app import invoke

    sys.exit(invoke(name, sys.argv[1:]))


def _open_standard_streams() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed, as some service managers and `>&-` leave it.

    Otherwise the next socket gets the number, and whoever prints prints into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, "r", closefd=False)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
