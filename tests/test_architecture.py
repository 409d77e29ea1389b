"""The walls of the house: who may import whom, and what the repository must not contain."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESIDUE = {".so", ".pyd", ".c", ".h", ".o"}


def _tracked() -> list[Path]:
    try:
        listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout, so what belongs to the project is not known")
    return [ROOT / os.fsdecode(name) for name in listing.split(b"\0") if name]


def test_every_import_follows_an_arrow_of_the_design() -> None:
    """docs/architecture.md is true because this runs; in its own process, since the linter takes logging over."""
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"

    run = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)

    assert run.returncode == 0, run.stdout + run.stderr


def test_no_compiled_module_shadows_its_source() -> None:
    """A forgotten build in the tree would be imported instead of the file that is being read and edited."""
    folders = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
    found = [path for path in ROOT.iterdir() if path.suffix in RESIDUE or path.name == "build"]
    found += [path for folder in folders for path in folder.rglob("*") if path.suffix in RESIDUE]

    assert found == []


def test_lock_files_name_no_host_and_pin_by_hash() -> None:
    """Whoever installs decides where packages come from; what they contain is decided here."""
    for lock in (ROOT / "requirements").glob("*.lock"):
        text = lock.read_text()

        assert "://" not in text, lock.name
        pins = re.findall(r"^[a-z][^\n=]*==[^\n]*\\$", text, re.MULTILINE)
        assert pins, lock.name
        assert all("--hash=sha256:" in block for block in re.split(r"\n(?=[a-z])", text.strip())), (
            f"{lock.name} has a requirement without a hash"
        )


def test_modules_open_with_a_docstring() -> None:
    """A reader who opens a file learns first what it is for."""
    silent = [
        path.relative_to(ROOT)
        for path in _tracked()
        if path.suffix == ".py"
        and path.parts[len(ROOT.parts)] in ("tun", "ngrokd")
        and path.stat().st_size > 0
        and not path.read_text().lstrip().startswith(('"""', 'r"""'))
    ]

    assert silent == []
