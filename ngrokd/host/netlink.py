"""What we need of pyroute2, without the rest of it.

`import pyroute2` imports everything it has: nftables, WireGuard, Wi-Fi, a database, 225 modules. We need 99 of them;
the others are 5 MB for as long as the daemon lives, and half of the time it takes to import. So the package is put in
place without being executed, and only the modules named here are imported. Should anybody in this process ask the
package for something else, it is executed then, as if it had been imported in the usual way.

Import this module where it is used, not at the top of another: it still takes 40 ms.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from contextlib import suppress


def _put_in_place(name: str) -> None:
    """Make a package known, so that its submodules can be imported. It is executed when something else is asked for."""
    spec = importlib.util.find_spec(name)
    if name in sys.modules or spec is None or spec.loader is None:
        return  # executed already, or not installed, which the import that follows says best
    package, loader = importlib.util.module_from_spec(spec), spec.loader

    def execute_first(attribute: str) -> object:
        if attribute.startswith("__"):  # the import system and others who only look
            raise AttributeError(f"module {name!r} has no attribute {attribute!r}")
        with suppress(ModuleNotFoundError):
            return importlib.import_module(f"{name}.{attribute}")
        vars(package).pop("__getattr__", None)
        loader.exec_module(package)
        value: object = getattr(package, attribute)
        return value

    package.__getattr__ = execute_first  # type: ignore[method-assign]  # PEP 562
    sys.modules[name] = package


_put_in_place("pyroute2")

from pyroute2.iproute.linux import IPRoute  # noqa: E402 - after the package is in place
from pyroute2.netlink.exceptions import NetlinkError  # noqa: E402
from pyroute2.netlink.rtnl.marshal import MarshalRtnl  # noqa: E402

__all__ = ["IPRoute", "MarshalRtnl", "NetlinkError"]
