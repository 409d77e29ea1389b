"""Whose connection it is: this process, its children, and nobody."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ngrokd.ops.processes import Connection, Owner, Processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux")


def connected(family: int, address: str) -> Iterator[tuple[socket.socket, Connection]]:
    with socket.create_server((address, 0), family=family) as server, socket.socket(family) as client:
        client.connect(server.getsockname()[:2])
        yield client, (client.getsockname()[:2], client.getpeername()[:2])


@pytest.fixture
def ipv4() -> Iterator[tuple[socket.socket, Connection]]:
    yield from connected(socket.AF_INET, "127.0.0.1")


def test_a_connection_of_this_process_is_ours(ipv4: tuple[socket.socket, Connection]) -> None:
    _, connection = ipv4
    strange = (("127.0.0.1", 1), ("127.0.0.1", 2))

    found = Processes().find([connection, strange])

    name = Path("/proc/self/comm").read_text().strip()
    assert found == {connection: Owner(os.getuid(), os.getpid(), name)}


def test_a_socket_of_ipv6_that_speaks_ipv4_is_found_too() -> None:
    """Many programs open nothing else."""
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_INET6) as client:
        client.connect((f"::ffff:{server.getsockname()[0]}", server.getsockname()[1]))
        connection = (("127.0.0.1", client.getsockname()[1]), server.getsockname())

        assert Processes().find([connection])[connection].pid == os.getpid()


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
def test_connections_over_ipv6() -> None:
    for _, connection in connected(socket.AF_INET6, "::1"):
        assert Processes().find([connection])[connection].pid == os.getpid()


def test_another_process_is_named(ipv4: tuple[socket.socket, Connection]) -> None:
    """The first that holds it is told; what was found is remembered while the socket is there."""
    client, connection = ipv4
    descriptor = client.fileno()
    with subprocess.Popen(["sleep", "60"], pass_fds=(descriptor,)) as sleeper:
        client.close()
        processes = Processes()
        first = processes.find([connection])
        again = processes.find([connection])
        sleeper.kill()
        sleeper.wait()
        gone = processes.find([connection])

    assert first == again == {connection: Owner(os.getuid(), sleeper.pid, "sleep")}
    assert gone == {}


def test_what_cannot_be_read_is_not_found(tmp_path: Path) -> None:
    """Elsewhere than on Linux, for instance; and a table that makes no sense."""
    nothing = Processes(str(tmp_path)).find([(("10.107.0.1", 1), ("10.107.0.2", 80))])
    (tmp_path / "self/net").mkdir(parents=True)
    (tmp_path / "self/net/tcp").write_text("nonsense\n\n  0: 0100\n")
    nonsense = Processes(str(tmp_path)).find([(("10.107.0.1", 1), ("10.107.0.2", 80))])

    assert nothing == nonsense == {}
    assert Processes().find([]) == {}
