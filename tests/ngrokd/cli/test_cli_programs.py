"""Who watches a daemon that may not look finds the programs itself."""

from __future__ import annotations

import os
import socket
from typing import Any

import pytest

from ngrokd.cli.programs import Programs


@pytest.fixture
def row() -> Any:
    """A row about a connection of this very process, as a daemon within its walls gives it."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as client:
        source, destination = (f"{host}:{port}" for host, port in (client.getsockname(), client.getpeername()))
        yield {"id": 1, "source": source, "destination": destination, "process": "", "pid": None, "uid": None}


def test_a_program_is_found_where_the_daemon_has_none(row: dict[str, Any]) -> None:
    """With its user."""
    Programs().name([row])

    assert (row["pid"], row["uid"]) == (os.getpid(), os.getuid())
    assert row["process"]


def test_what_the_daemon_says_is_not_changed(row: dict[str, Any]) -> None:
    """It looked when the connection was there for certain."""
    said = row | {"pid": 1, "process": "init", "uid": 5}

    Programs().name([row | {"pid": 1}, told := dict(said)])

    assert told == said


@pytest.mark.parametrize(
    "strange",
    [{}, {"source": "x", "destination": "y"}, {"source": None, "destination": "[::1]:1"}, {"source": "10.0.0.1:1"}],
)
def test_rows_of_other_daemons_are_left_alone(strange: dict[str, Any]) -> None:
    """They may be older, or newer."""
    row = dict(strange)

    Programs().name([row])

    assert row == strange
