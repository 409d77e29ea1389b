"""What people install with: the script for root, the image, the release. No container can be run by these tests."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from ngrokd.cli.app import COMMANDS
from ngrokd.host.units import Service

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "install.sh", *arguments],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A release in small: a Makefile that tells what it is asked for, and the sums of all files."""
    tree = tmp_path / "release"
    (tree / "ngrokd").mkdir(parents=True)
    shutil.copy(ROOT / "install.sh", tree)
    (tree / "ngrokd/__init__.py").write_text("")
    (tree / "Makefile").write_text("install uninstall:\n\t@echo $@ $(PREFIX) $(BINDIR)\n")
    files = sorted(path for path in tree.rglob("*") if path.is_file())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  ./{path.relative_to(tree)}\n" for path in files]
    (tree / "SHA256SUMS").write_text("".join(sums))
    return tree


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="it is installed by root")


@as_root
def test_a_release_that_is_whole_is_installed(release: Path) -> None:
    """To where it was asked for."""
    done = run(cwd=release, PREFIX="/p", BINDIR="/b")

    assert (done.returncode, done.stderr) == (0, "")
    assert "as they were published\ninstall /p /b\n" in done.stdout


@as_root
@pytest.mark.parametrize("change", ["changed", "added", "removed"])
def test_a_release_that_was_tampered_with_is_not(release: Path, change: str) -> None:
    """An added module would be installed, too."""
    match change:
        case "changed":
            (release / "ngrokd/__init__.py").write_text("import os")
        case "added":
            (release / "ngrokd/extra.py").write_text("")
        case _:
            (release / "ngrokd/__init__.py").unlink()

    refused = run(cwd=release)

    assert refused.returncode == 1
    assert "release" in refused.stderr
    assert "install " not in refused.stdout


@as_root
def test_a_checkout_has_no_sums_and_is_installed(release: Path) -> None:
    """Whoever cloned it has git for that."""
    (release / "SHA256SUMS").unlink()

    assert run(cwd=release).returncode == 0


@pytest.mark.parametrize("arguments", [("remove",), ("install", "x"), ("uninstall", "--all")])
def test_what_is_not_understood_is_not_done(release: Path, arguments: tuple[str, ...]) -> None:
    """Least of all the removing."""
    refused = run(*arguments, cwd=release)

    assert refused.returncode == 2
    assert "usage:" in refused.stderr


@as_root
def test_an_old_python_is_not_used(release: Path, tmp_path: Path) -> None:
    """And what is needed is said."""
    (tmp_path / "bin").mkdir()
    for tool in ("sh", "id", "dirname", "sha256sum", "sed", "sort", "find", "comm", "head", "rm", "mktemp"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or "")

    refused = run(cwd=release, PATH=str(tmp_path / "bin"))

    assert refused.returncode == 69
    assert "Python 3.11" in refused.stderr


def test_the_script_is_plain_sh() -> None:
    """Parsed by the strictest shell that is there."""
    shell = shutil.which("dash") or "sh"

    assert subprocess.run([shell, "-n", str(ROOT / "install.sh")], check=False).returncode == 0


def test_the_image_is_made_of_pinned_packages() -> None:
    """Everything from outside comes through a lock file with hashes; and what it calls exists."""
    text = (ROOT / "Dockerfile").read_text()

    installs = re.findall(r"pip[^&\n]* install ([^&\n]*)", text)
    assert installs
    for arguments in installs:
        assert "--require-hashes -r requirements/" in arguments or "--no-index" in arguments
    for lock in re.findall(r"requirements/\S+\.lock", text):
        assert (ROOT / lock).exists()
    health = re.search(r'HEALTHCHECK .* CMD \["ngrokd", "(\w+)"', text)
    assert health
    assert health[1] in COMMANDS
    assert 'CMD ["run"]' in text


def test_the_container_has_the_rights_of_the_service() -> None:
    """One capability and one device."""
    service = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["ngrokd"]

    assert service["cap_drop"] == ["ALL"]
    assert service["cap_add"] == ["NET_ADMIN"]
    assert service["devices"] == ["/dev/net/tun"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["stop_grace_period"] == f"{Service().stop_s}s"
    assert "privileged" not in service
