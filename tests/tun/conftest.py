"""What the tests of the packet path share."""

from __future__ import annotations

from functools import partial

import pytest

from tun.testing import playbook
from tun.testing.playbook import Play


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Play each script over both versions of IP, but for tests that look at the bytes of an IPv4 packet."""
    if "play" in metafunc.fixturenames:
        versions = [4] if any(metafunc.definition.iter_markers("ipv4")) else [4, 6]
        metafunc.parametrize("play", versions, indirect=True, ids=[f"IPv{version}" for version in versions])


@pytest.fixture
def play(request: pytest.FixtureRequest) -> Play:
    """Play a script against a fresh stack and return the playbook, for more acts or a closer look."""
    return partial(playbook.play, version=request.param)
