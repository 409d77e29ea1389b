"""pyroute2 in part: what we use is there, what nobody asked for is not, and who asks gets the whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="netlink is Linux's")


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    root = Path(__file__).parents[3]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True, text=True).stdout


def test_most_of_the_library_is_not_imported() -> None:
    """It would stay in memory for as long as the daemon lives."""
    printed = python(
        "import sys\n"
        "from ngrokd.host.netlink import IPRoute\n"
        "with IPRoute() as ipr: print(len(list(ipr.get_links())) > 0)\n"
        "print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('pyroute2.')}))"
    )

    worked, rooms = printed.splitlines()
    assert worked == "True"
    for unused in ("ndb", "nftables", "ipdb", "wiset", "conntrack", "plan9"):
        assert f"'{unused}'" not in rooms


def test_whoever_asks_for_the_rest_gets_it() -> None:
    """Nobody else in the process shall notice."""
    printed = python(
        "import ngrokd.host.netlink as part\n"
        "import pyroute2\n"
        "from pyroute2 import NDB, IPRoute, NetlinkError, config\n"
        "print(hasattr(pyroute2, '__nothing__'), IPRoute is part.IPRoute, NetlinkError is part.NetlinkError)\n"
        "print(NDB.__name__, pyroute2.__version__ != '', 'IPRoute' in dir(pyroute2))"
    )

    assert printed == "False True True\nNDB True True\n"


def test_a_library_imported_before_is_left_alone() -> None:
    """The same classes, whoever comes first."""
    assert python("import pyroute2, ngrokd.host.netlink as part\nprint(pyroute2.IPRoute is part.IPRoute)") == "True\n"
