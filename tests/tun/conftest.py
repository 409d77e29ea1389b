"""What the tests of the packet path share."""

from __future__ import annotations

import pytest

from tun.testing import playbook
from tun.testing.playbook import Play


@pytest.fixture
def play() -> Play:
    """Play a script against a fresh stack and return the playbook, for more acts or a closer look."""
    return playbook.play
