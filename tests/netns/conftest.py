"""Fixtures for tests on the real kernel. The tools themselves, and how to use them: support.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.netns.support import Namespace, open_namespace, require_namespaces


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.netns)


@pytest.fixture
def netns() -> Iterator[Callable[[], Namespace]]:
    """Makes fresh private namespaces, each with nothing but lo: `ns = netns()`.

    Where none can be made the test is skipped with the reason, but fails when CI=true.
    """
    require_namespaces()
    with ExitStack() as namespaces:
        yield lambda: namespaces.enter_context(open_namespace())
