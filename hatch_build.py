"""The compiled core, for `make compiled`: a build hook that an ordinary build never looks at.

`HATCH_BUILD_HOOK_ENABLE_CUSTOM=true pip wheel .` makes a wheel in which the modules of CORE exist twice: as they stand
in this tree, and translated to C by mypyc from exactly these files. Python prefers the extension modules. Nothing is
written into the tree, where a forgotten one would shadow the source that somebody reads and edits.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# Pure, typed plainly, and most of what a packet costs. A package's __init__ stays as it is: it holds a docstring.
CORE: Final = ("tun/seq.py", "tun/errors.py", "tun/wire/[a-z]*.py", "tun/core/[a-z]*.py")


class CompiledCore(BuildHookInterface[Any]):
    """Adds the extension modules to a wheel, and says in its name for which Python and machine it is."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless the installation is an editable one: that shall run what is being edited."""
        if version == "editable":
            return
        if problem := missing():
            raise SystemExit(problem)
        self._folder = tempfile.TemporaryDirectory(prefix="ngrokd-core-")
        for module in compile_core(Path(self.root), Path(self._folder.name)):
            build_data["force_include"][str(module)] = str(module.relative_to(Path(self._folder.name) / "lib"))
        build_data["pure_python"] = False
        build_data["infer_tag"] = True

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002
        """The wheel is written; what it was made of is not needed any more."""
        if version != "editable":
            self._folder.cleanup()


def missing() -> str:
    """What a compilation needs and this machine lacks, as a sentence; "" when nothing."""
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"the compiled core needs a C compiler, and there is no {compiler} here; on Debian: apt install gcc"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        major, minor = sys.version_info[:2]
        return f"the compiled core needs the headers of Python, e.g. on Debian: apt install python{major}.{minor}-dev"
    return ""


def compile_core(root: Path, folder: Path) -> list[Path]:
    """Translate and compile copies of the modules of CORE in `folder`; the results are under its "lib".

    Raises: SystemExit where mypyc does not take a module; setuptools' errors where the compiler does not.
    """
    from mypyc.build import mypycify
    from setuptools import Distribution
    from setuptools.command.build_ext import build_ext

    modules = sorted(str(path.relative_to(root)) for pattern in CORE for path in root.glob(pattern))
    for module in modules:
        package = (folder / module).parent
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        shutil.copyfile(root / module, folder / module)
    with contextlib.chdir(folder):  # names of modules, and the paths that tracebacks show, are relative to here
        # No settings but these: types are judged by `make check`, here they are only used.
        extensions = mypycify(["--config-file=", *modules], group_name="tun", debug_level="0")
        for extension in extensions:
            # A warning of a compiler that nobody has tried yet is no reason to stop.
            extension.extra_compile_args = [word for word in extension.extra_compile_args if word != "-Werror"]
        build = build_ext(Distribution({"ext_modules": extensions}))
        build.build_lib = "lib"
        build.build_temp = "temp"
        build.ensure_finalized()
        build.run()
    return sorted(path for path in (folder / "lib").rglob("*") if path.is_file())


if __name__ == "__main__":
    sys.exit(missing() or 0)
