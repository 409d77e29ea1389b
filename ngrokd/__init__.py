"""ngrokd: ngrok's kubernetes-bound endpoints, by name, for every program on this machine."""

from __future__ import annotations

from typing import Final

# A constant, not importlib.metadata: that costs every command some milliseconds. A test compares it with pyproject.
__version__: Final = "0.1.0"


def core_is_compiled() -> bool:
    """Whether the TCP core is extension modules (`make compiled`) or Python; looked up, not imported."""
    from importlib.machinery import EXTENSION_SUFFIXES, PathFinder
    from importlib.util import find_spec

    package = find_spec("tun")
    module = PathFinder.find_spec("tun.seq", package.submodule_search_locations) if package else None
    return module is not None and (module.origin or "").endswith(tuple(EXTENSION_SUFFIXES))
