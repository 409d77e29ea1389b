"""What holds for every test: no test leaves the process different from how it found it."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import hypothesis
import pytest

# Deadlines of single examples measure the machine, not the code; what must be fast has a test that says so.
hypothesis.settings.register_profile("ordinary", deadline=None, print_blob=True)
hypothesis.settings.load_profile("ordinary")

# What a test proves; tests/tun/rules.py makes docs/tcp-states.md of these.
_MARKS = (
    "rule(*numbers): rules of our TCP/IP that the test proves",
    "bug(*names): mistakes of other stacks that the test would have caught",
    "scenario(*names): scenarios of packetimpact that the test plays",
    "ipv4: the script is played over IPv4 only, for its numbers are IPv4's",
)


def pytest_configure(config: pytest.Config) -> None:
    for mark in _MARKS:
        config.addinivalue_line("markers", mark)


_LOGGERS = ("", "ngrokd", "ngrokd.ops.control", "tun", "py.warnings", "pyroute2")


def _logging_state() -> list[tuple[object, ...]]:
    state: list[tuple[object, ...]] = [("disabled", logging.root.manager.disable)]
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        ours = [handler for handler in logger.handlers if type(handler).__module__.startswith("ngrokd")]
        state.append((name, logger.propagate, logger.disabled, ours))
    return state


@pytest.fixture(autouse=True)
def _logging_is_left_alone() -> Iterator[None]:
    """A log that a test installs and forgets would swallow what later tests look for."""
    before = _logging_state()
    levels = {name: logging.getLogger(name).level for name in _LOGGERS}
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    assert _logging_state() == before
