"""The compiled core: made from these sources, the same in every test, and not a trace of it in the tree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zipfile

import pytest

from hatch_build import missing
from tests.compiled import ROOT, CompiledHome, make_home

# Half a minute of one core for the compiler, and about as much for the tests.
pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> CompiledHome:
    if reason := missing():
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return make_home(tmp_path_factory.mktemp("compiled"))


def test_the_tests_of_tun_hold_for_the_compiled_core(home: CompiledHome) -> None:
    """All of them, as they stand; what they import is the compiled one."""
    done = home.test(["-q", "-x", "--no-header", "-rN"], quiet=True)

    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_every_module_of_the_core_is_compiled(home: CompiledHome) -> None:
    """And the wheel holds the sources they were made from, unchanged."""
    core = [path for folder in ("wire", "core") for path in (ROOT / "tun" / folder).glob("[a-z]*.py")]
    core += [ROOT / "tun" / "seq.py", ROOT / "tun" / "errors.py"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in core]
    assert len(names) > 10

    command = "import importlib, sys; print([importlib.import_module(name).__file__ for name in sys.argv[1:]])"
    done = subprocess.run([home.python, "-c", command, *names], capture_output=True, text=True, check=True, cwd="/")
    with zipfile.ZipFile(home.wheel) as wheel:
        kept = [wheel.read(str(path.relative_to(ROOT))) == path.read_bytes() for path in core]

    assert done.stdout.count(".so'") == len(names), done.stdout
    assert all(kept)


def test_the_version_says_which_core_runs(home: CompiledHome) -> None:
    """For bug reports, and for whoever wonders whether `make install COMPILED=1` has worked."""
    for python, folder, core in ((home.python, home.tree, "compiled"), (sys.executable, ROOT, "pure Python")):
        text, document = (
            subprocess.run(
                [python, "-m", "ngrokd", "version", *words], cwd=folder, capture_output=True, text=True, check=True
            ).stdout
            for words in ((), ("--json",))
        )

        assert re.search(f"^ *TCP core +{core}$", text, re.MULTILINE), text
        assert json.loads(document)["data"]["compiled"] is (core == "compiled")
