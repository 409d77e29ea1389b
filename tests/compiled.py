"""The compiled core in a place of its own, and the tests of `tun` there.

    python -m tests.compiled [pytest's arguments]

A wheel is built from this tree with the tools of this environment, without a network, and installed into a new virtual
environment, which borrows everything else from this one. The tests run in a copy beside it, where there is no `tun` but
the installed one: pytest puts the folder it runs in before everything.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hatch_build import missing

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("tests/tun", "tests/property", "tests/replay")


class BuildError(Exception):
    """The wheel could not be made; the message is what pip said."""


@dataclass(frozen=True, slots=True)
class CompiledHome:
    """A virtual environment with a compiled core.

    Attributes:
        wheel: what was installed.
        tree: a copy of the tests and what they read, without the packages.
    """

    python: Path
    wheel: Path
    tree: Path

    def test(self, arguments: Sequence[str], *, quiet: bool) -> subprocess.CompletedProcess[str]:
        """Run pytest on the tests of `tun`, or on others where `arguments` name some."""
        named = any(not word.startswith("-") for word in arguments)
        command = [str(self.python), "-m", "pytest", "-p", "no:cacheprovider", *arguments, *(() if named else TESTS)]
        return subprocess.run(command, cwd=self.tree, capture_output=quiet, text=True, check=False)


def make_home(folder: Path) -> CompiledHome:
    """Build and install in `folder`. Raises BuildError."""
    wheel = build_wheel(folder)
    environment = folder / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    _pip("--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)}))
    # A path file of the borrowed folder is not read there, so this tree itself stays out.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    tree = folder / "tree"
    ignored = shutil.ignore_patterns("__pycache__", ".*")
    for name in ("tests", "docs", "fuzz", "bench", "conf"):
        shutil.copytree(ROOT / name, tree / name, ignore=ignored)
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "Makefile"):
        shutil.copy(ROOT / name, tree / name)
    return CompiledHome(python, wheel, tree)


def build_wheel(folder: Path) -> Path:
    """What `make compiled` does, with the tools that are here. Raises BuildError."""
    _pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), str(ROOT))
    (wheel,) = folder.glob("*.whl")
    return wheel


def _pip(*words: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    environment = os.environ | {"HATCH_BUILD_HOOK_ENABLE_CUSTOM": "true"}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise BuildError(done.stdout)


def main(arguments: Sequence[str]) -> int:
    """Make a home, run the tests in it, and leave nothing behind."""
    if problem := missing():
        sys.exit(problem)
    with tempfile.TemporaryDirectory(prefix="ngrokd-compiled-") as folder:
        try:
            home = make_home(Path(folder))
        except BuildError as error:
            sys.exit(str(error))
        return home.test(arguments, quiet=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
