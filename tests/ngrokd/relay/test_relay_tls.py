"""The TLS stream: bytes exact, ends exact, nothing waits that must not."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from ngrokd.relay.tls import TlsSession, TlsStream, TlsTrioStream
from ngrokd.relay.transport import memory_transport_pair

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.ngrokd.relay.conftest import Authority

HOST = "ingress.example"
VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture
def make_pair(authority: Authority) -> Callable[..., Awaitable[tuple[TlsStream, TlsStream]]]:
    """Two connected TLS streams, client first, after their handshake."""

    async def make(version: ssl.TLSVersion | None = None, capacity: int = 64 * 1024) -> tuple[TlsStream, TlsStream]:
        one, two = memory_transport_pair(capacity)
        client = TlsStream(one, TlsSession(authority.client_context(), server_hostname=HOST))
        server = TlsStream(two, TlsSession(authority.server_context(version=version), server_side=True))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.handshake)
            nursery.start_soon(server.handshake)
        return client, server

    return make


async def test_it_is_a_half_closeable_stream_as_trio_defines_it(
    make_pair: Callable[..., Awaitable[tuple[TlsStream, TlsStream]]],
) -> None:
    """Trio's own check: conflicts, cancellation, closing, ends, in every combination."""

    async def make() -> tuple[TlsTrioStream, TlsTrioStream]:
        one, two = await make_pair()
        return TlsTrioStream(one), TlsTrioStream(two)

    async def clogged() -> tuple[TlsTrioStream, TlsTrioStream]:
        one, two = await make_pair(capacity=4096)
        for stream in (one, two):
            while stream.send_nowait([bytes(65536)]):
                pass
        return TlsTrioStream(one), TlsTrioStream(two)

    await trio.testing.check_half_closeable_stream(make, clogged)
