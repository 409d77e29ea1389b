"""The self-check against the lab's back ends, without a daemon between: what passes here, a daemon must carry."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import trio

from ngrokd.lab import selfcheck
from ngrokd.lab.backends import make_backend
from ngrokd.lab.selfcheck import Check, CheckFailed, checks
from ngrokd.lab.world import DEMO_ENDPOINTS

Ports = dict[tuple[str, int], int]


@pytest.fixture
async def ports(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Ports]:
    """The demo's back ends on plain sockets; names lead to them, all else to a port where nobody listens."""
    found: Ports = {}
    with socket.socket() as unserved:
        unserved.bind(("127.0.0.1", 0))
        nobody = unserved.getsockname()[1]

        def create_connection(address: tuple[str, int], timeout: float, *_: Any) -> socket.socket:
            sock = socket.socket()
            sock.settimeout(timeout)
            try:
                sock.connect(("127.0.0.1", found.get(address, nobody)))
            except OSError:
                sock.close()
                raise
            return sock

        monkeypatch.setattr(socket, "create_connection", create_connection)
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.107.0.2", 0))])
        async with trio.open_nursery() as nursery:
            for url, spec, _ in DEMO_ENDPOINTS:
                host, _, port = url.partition("://")[2].partition(":")
                found[host, int(port or 80)] = await serve(nursery, spec)
            yield found
            nursery.cancel_scope.cancel()


async def serve(nursery: trio.Nursery, spec: str) -> int:
    listener = trio.socket.socket()
    await listener.bind(("127.0.0.1", 0))
    listener.listen()

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            with suppress(trio.BrokenResourceError):  # a check that has seen enough resets
                await make_backend(spec).serve(stream)

    nursery.start_soon(partial(trio.serve_listeners, handle, [trio.SocketListener(listener)]))
    port = listener.getsockname()[1]
    assert isinstance(port, int)
    return port


def find(title: str) -> Check:
    return next(check for check in checks("10.107.0.0/16") if title in check.title)


async def test_all_checks_pass_against_sound_back_ends(ports: Ports) -> None:
    """Each with a detail worth showing."""
    for check in checks("10.107.0.0/16"):
        detail = await trio.to_thread.run_sync(check.run)
        assert detail, check.title


async def test_a_name_outside_of_the_subnet_is_found_out(ports: Ports) -> None:
    """It would be somebody else's answer."""
    check = checks("10.108.0.0/16")[0]

    with pytest.raises(CheckFailed, match=r"hello\.demo is 10\.107\.0\.2, which is not in 10\.108\.0\.0/16"):
        check.run()


async def test_wrong_bytes_are_found_out(ports: Ports, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checks compare, they do not count connections."""
    ports["answer.demo", 9000] = ports["echo.demo", 7]
    ports["banner.demo", 25] = ports["sink.demo", 9]
    ports["echo.demo", 7] = ports["sink.demo", 9]
    ports["hello.demo", selfcheck.UNSERVED_PORT] = ports["sink.demo", 9]
    monkeypatch.setattr(selfcheck, "TIMEOUT_S", 0.3)
    for title in ("echo", "half-close", "not served"):
        with pytest.raises(CheckFailed):
            await trio.to_thread.run_sync(find(title).run)
    with pytest.raises(TimeoutError):
        await trio.to_thread.run_sync(find("speaks first").run)


async def test_nobody_there_is_an_os_error(ports: Ports) -> None:
    """Which the demo shows as it is."""
    ports.clear()

    with pytest.raises(ConnectionRefusedError):
        await trio.to_thread.run_sync(find("GET").run)
