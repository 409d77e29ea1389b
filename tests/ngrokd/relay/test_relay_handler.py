"""A request is decided exactly once, after the ingress has agreed."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trio

from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.relay.handler import FlowEvent, Handler
from ngrokd.relay.ingress import Ingress
from ngrokd.relay.tls import TlsSession, TlsStream, TlsTrioStream
from ngrokd.relay.transport import Transport, memory_transport_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.ngrokd.relay.conftest import Authority, FakeFlow, FakeRequest

HOST = "ingress.example"
API = Endpoint("ep_1", "http://my-api.prod", "http", "my-api.prod", 80, "http")
OK = bytes.fromhex("0f000a0765705f32616263120468747470")


class World:
    """An ingress over memory that answers OK and then echoes, and a handler in front of it."""

    def __init__(self, authority: Authority) -> None:
        self.authority = authority
        self.answer = OK
        self.server = authority.server_context(client_required=True)
        self.events: list[FlowEvent] = []
        self.transports: list[Transport] = []
        self.received = b""
        self.nursery: trio.Nursery | None = None
        self.ingress = Ingress(self.dial)
        self.ingress.set_addresses(HOST, 443, ["203.0.113.7"])
        self.ingress.set_anchors(False, authority.root.pem)
        self.ingress.set_credentials(Credentials(authority.client.key_pem, authority.client.pem))
        self.handler = Handler(
            lambda destination: API if destination[1] == 80 else None,
            self.ingress,
            on_event=self.events.append,
            strict=True,
        )

    async def dial(self, address: str, port: int) -> Transport:
        await trio.lowlevel.checkpoint()
        ours, theirs = memory_transport_pair()
        self.transports.append(ours)
        assert self.nursery is not None
        self.nursery.start_soon(self.serve, theirs)
        return ours

    async def serve(self, transport: Transport) -> None:
        stream = TlsTrioStream(TlsStream(transport, TlsSession(self.server, server_side=True)))
        try:
            await stream.stream.handshake()
            size = int.from_bytes(await stream.receive_some(2), "little")
            while len(self.received) < size:
                self.received += await stream.receive_some(size - len(self.received))
            await stream.send_all(self.answer)
            async for data in stream:
                await stream.send_all(data)
            await stream.aclose()
        except (trio.BrokenResourceError, ssl.SSLError):
            transport.abort()


@pytest.fixture
def world(authority: Authority) -> World:
    return World(authority)


async def test_bytes_go_there_and_back(world: World, make_request: Callable[..., FakeRequest]) -> None:
    """The main job: accepted after the answer, carried, both ends closed in order."""
    request = make_request()
    flow: FakeFlow = request.flow
    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(world.handler.serve, request)

        async def app_writes() -> None:
            await flow.app_send(b"hello " * 100_000)
            await flow.app_send_eof()

        world.nursery.start_soon(app_writes)
        assert await flow.app_read_all() == b"hello " * 100_000

    assert request.decisions == ["accepted"]
    assert flow.ending == "closed"
    assert world.received == b"\x0a\x0bmy-api.prod\x10\x50"
    assert [event.kind for event in world.events] == ["opened", "closed"]
    counters = world.handler.counters()
    assert (counters["accepted"], counters["completed"], counters["active"]) == (1, 1, 0)
