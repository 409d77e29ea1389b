"""A request is decided exactly once, after the ingress has agreed; one flow's trouble is nobody else's."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import pytest
import trio
import trio.testing

from ngrokd.endpoints import Credentials, Endpoint
from ngrokd.errors import StreamTruncated
from ngrokd.relay.handler import FlowEvent, Handler
from ngrokd.relay.ingress import Ingress
from ngrokd.relay.tls import TlsSession, TlsStream
from ngrokd.relay.transport import Transport, memory_transport_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.ngrokd.relay.conftest import Authority, FakeFlow, FakeRequest
    from tun.poller import Poller

HOST = "ingress.example"
API = Endpoint("ep_1", "http://my-api.prod", "http", "my-api.prod", 80, "http")
OK = bytes.fromhex("0f000a0765705f32616263120468747470")
NO = bytes.fromhex("21001a0d4552525f4e47524f4b5f37303622106e6f207375636820656e64706f696e74")
NOTICE = bytes.fromhex("06002a040a026869")


class World:
    """An ingress over memory that answers and then echoes, and a handler in front of it."""

    def __init__(self, authority: Authority, poller: Poller) -> None:
        self.poller = poller
        self.authority = authority
        self.answer = OK
        self.after_answer = "echo"
        self.server = authority.server_context(client_required=True)
        self.events: list[FlowEvent] = []
        self.transports: list[Transport] = []
        self.received = b""
        self.dial_failure: Exception | None = None
        self.ingress = Ingress(self.dial, connect_timeout_s=10)
        self.ingress.set_addresses(HOST, 443, ["203.0.113.7"])
        self.ingress.set_anchors(False, authority.root.pem)
        self.ingress.set_credentials(Credentials(authority.client.key_pem, authority.client.pem))
        self.handler = self.make_handler()
        self.nursery: trio.Nursery | None = None

    def make_handler(self, *, strict: bool = True) -> Handler:
        self.handler = Handler(
            lambda destination: API if destination[1] == 80 else None,
            self.ingress,
            self.poller,
            on_event=self.events.append,
            strict=strict,
        )
        return self.handler

    async def dial(self, address: str, port: int) -> Transport:
        await trio.lowlevel.checkpoint()
        if self.dial_failure is not None:
            raise self.dial_failure
        ours, theirs = memory_transport_pair()
        self.transports.append(ours)
        assert self.nursery is not None
        self.nursery.start_soon(self.serve, theirs)
        return ours

    async def serve(self, transport: Transport) -> None:
        stream = TlsStream(transport, TlsSession(self.server, server_side=True))
        try:
            await stream.handshake()
            view = await stream.receive_view()
            self.received += view
            if not self.answer:
                await trio.sleep_forever()
            stream.send_nowait([self.answer])
            if self.after_answer == "abort":
                await stream.receive_view()
                stream.abort()
                return
            while view := await stream.receive_view():
                while view:
                    view = view[stream.send_nowait([view]) :]
                    await stream.wait_sendable()
            await stream.aclose()
        except (StreamTruncated, ssl.SSLError):
            stream.abort()

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def counts(self) -> dict[str, int]:
        """The counters that are not zero; their sums must come out."""
        counters = self.handler.counters()
        decided = counters["refused"] + counters["cancelled"] + counters["accepted"]
        assert counters["requests"] == decided
        ended = sum(counters[name] for name in ("completed", "cut", "app_gone", "ended"))
        assert counters["accepted"] == counters["active"] + ended
        amounts = ("dial_ms", "bytes_from_app", "bytes_to_app")
        return {name: value for name, value in counters.items() if value and name not in amounts}

    def nothing_is_left(self) -> bool:
        for transport in self.transports:
            try:
                transport.send_nowait(b"")
            except OSError:
                continue
            return False
        return True


@pytest.fixture
def world(authority: Authority, poller: Poller) -> World:
    return World(authority, poller)


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
    assert world.received == b"\x0f\x00\x0a\x0bmy-api.prod\x10\x50"
    assert world.kinds == ["opened", "closed"]
    assert world.counts() == {"requests": 1, "accepted": 1, "completed": 1}
    assert world.nothing_is_left()


async def test_an_unknown_port_is_refused_without_a_dial(
    world: World, make_request: Callable[..., FakeRequest]
) -> None:
    request = make_request(("10.107.0.2", 81))

    await world.handler.serve(request)

    assert request.decisions == ["refused"]
    assert world.transports == []
    [event] = world.events
    assert (event.kind, event.reason, event.host, event.port) == ("refused", "no_endpoint", "10.107.0.2", 81)
    assert event.source == ("10.107.0.1", 40000)
    assert world.counts() == {"requests": 1, "refused": 1, "reason.no_endpoint": 1}


async def test_the_app_waits_for_the_answer_of_the_ingress(
    world: World, make_request: Callable[..., FakeRequest], autojump_clock: trio.testing.MockClock
) -> None:
    """No SYN-ACK before it, and an RST when time is up."""
    world.answer = b""
    request = make_request()
    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(world.handler.serve, request)
        await trio.sleep(9.9)
        assert world.received
        assert request.decisions == []
        await trio.sleep(0.2)
        world.nursery.cancel_scope.cancel()

    assert request.decisions == ["refused"]
    [event] = world.events
    assert (event.kind, event.reason) == ("refused", "ingress_unreachable")
    assert "timed out after 10 s" in event.message
    assert event.dial_s == pytest.approx(10)
    assert world.counts() == {"requests": 1, "refused": 1, "reason.ingress_unreachable": 1}


async def test_a_refusal_of_the_ingress_refuses_the_app(world: World, make_request: Callable[..., FakeRequest]) -> None:
    world.answer = NO
    request = make_request()
    async with trio.open_nursery() as world.nursery:
        await world.handler.serve(request)

    assert request.decisions == ["refused"]
    [event] = world.events
    assert (event.kind, event.reason, event.host, event.port) == ("refused", "binding_refused", "my-api.prod", 80)
    assert "ERR_NGROK_706: no such endpoint" in event.message
    assert world.nothing_is_left()


async def test_an_ingress_that_is_not_trusted_refuses_the_app_and_says_what_to_do(
    world: World, make_request: Callable[..., FakeRequest]
) -> None:
    world.ingress.set_anchors(False, b"")
    request = make_request()
    async with trio.open_nursery() as world.nursery:
        await world.handler.serve(request)

    assert request.decisions == ["refused"]
    assert world.events[0].reason == "ingress_untrusted"
    assert "ingress.ca_file" in world.events[0].remedy
    assert world.received == b""


async def test_an_ingress_that_is_down_refuses_the_app(world: World, make_request: Callable[..., FakeRequest]) -> None:
    world.dial_failure = ConnectionRefusedError(111, "Connection refused")
    request = make_request()
    await world.handler.serve(request)

    assert request.decisions == ["refused"]
    assert "203.0.113.7: Connection refused" in world.events[0].message


async def test_a_cut_is_a_reset_and_an_event(world: World, make_request: Callable[..., FakeRequest]) -> None:
    world.after_answer = "abort"
    request = make_request()
    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(world.handler.serve, request)
        await request.flow.app_send(b"x")
        with pytest.raises(ConnectionResetError):
            await request.flow.app_read_all()

    assert request.decisions == ["accepted"]
    assert request.flow.ending == "aborted"
    assert world.kinds == ["opened", "cut", "closed"]
    assert world.counts() == {"requests": 1, "accepted": 1, "cut": 1, "reason.stream_truncated": 1}


async def test_an_app_that_resets_is_no_failure_of_ours(world: World, make_request: Callable[..., FakeRequest]) -> None:
    request = make_request()
    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(world.handler.serve, request)
        await request.flow.app_send(b"x")
        await request.flow.app_read()
        request.flow.app_reset()

    assert world.kinds == ["opened", "app_gone", "closed"]
    assert world.counts() == {"requests": 1, "accepted": 1, "app_gone": 1, "reason.app_gone": 1}
    assert world.nothing_is_left()


async def test_notices_are_told(world: World, make_request: Callable[..., FakeRequest]) -> None:
    world.answer = NOTICE
    request = make_request()
    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(world.handler.serve, request)
        await request.flow.app_send_eof()
        await request.flow.app_read_all()

    assert [(event.kind, event.message) for event in world.events][1] == ("notice", "hi")


async def test_an_app_that_gives_up_stops_the_dial(world: World, make_request: Callable[..., FakeRequest]) -> None:
    """The network cancels us; the refusal then does nothing, but is owed."""
    world.answer = b""
    request = make_request()
    scope = trio.CancelScope()

    async def serves() -> None:
        with scope:
            await world.handler.serve(request)

    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(serves)
        while not world.received:
            await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        await trio.testing.wait_all_tasks_blocked()
        assert world.nothing_is_left()
        world.nursery.cancel_scope.cancel()

    assert request.decisions == ["refused"]
    assert world.kinds == ["gave_up"]
    assert world.counts() == {"requests": 1, "cancelled": 1}


async def test_a_flow_that_is_cancelled_is_reset(world: World, make_request: Callable[..., FakeRequest]) -> None:
    request = make_request()
    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(world.handler.serve, request)
        await request.flow.app_send(b"x")
        await request.flow.app_read()
        assert world.handler.active == 1
        world.nursery.cancel_scope.cancel()

    assert request.flow.ending == "aborted"
    assert world.kinds == ["opened", "closed"]
    assert world.counts() == {"requests": 1, "accepted": 1, "ended": 1}


async def test_a_bug_ends_its_flow_only_and_is_told_with_its_traceback(
    world: World, make_request: Callable[..., FakeRequest]
) -> None:
    world.dial_failure = ZeroDivisionError("ours")
    handler = world.make_handler(strict=False)
    request = make_request()
    await handler.serve(request)

    assert request.decisions == ["refused"]
    [event] = world.events
    assert (event.kind, event.message) == ("bug", "ZeroDivisionError: ours")
    assert "in dial" in event.traceback
    assert world.counts() == {"requests": 1, "refused": 1, "bugs": 1}


async def test_tests_hear_of_bugs(world: World, make_request: Callable[..., FakeRequest]) -> None:
    world.dial_failure = ZeroDivisionError("ours")
    request = make_request()
    with pytest.raises(ZeroDivisionError):
        await world.handler.serve(request)
    assert request.decisions == ["refused"]


async def test_a_bug_while_bytes_are_carried_resets_both_ends(
    world: World, make_request: Callable[..., FakeRequest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when it comes wrapped, from one of the tasks that carry."""
    handler = world.make_handler(strict=False)
    request = make_request()

    def breaks(view: memoryview) -> int:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(request.flow, "send_nowait", breaks)
    async with trio.open_nursery() as world.nursery:
        world.nursery.start_soon(handler.serve, request)
        await request.flow.app_send(b"x")

    assert request.flow.ending == "aborted"
    assert world.kinds == ["opened", "bug", "closed"]
    assert "ZeroDivisionError: ours" in world.events[1].traceback
    assert world.counts() == {"requests": 1, "accepted": 1, "ended": 1, "bugs": 1}
    assert world.nothing_is_left()


async def test_an_event_receiver_that_fails_leaves_nothing_open(
    world: World, make_request: Callable[..., FakeRequest]
) -> None:
    """It promised not to raise; the flow must not outlive the promise."""
    handler = world.make_handler(strict=False)
    request = make_request()

    def fails_once(event: FlowEvent) -> None:
        world.events.append(event)
        if event.kind == "opened":
            raise ZeroDivisionError("theirs")

    handler._on_event = fails_once
    async with trio.open_nursery() as world.nursery:
        await handler.serve(request)

    assert request.decisions == ["accepted"]
    assert request.flow.ending == "aborted"
    assert world.kinds == ["opened", "bug", "closed"]
    assert world.nothing_is_left()


async def test_many_flows_at_once(world: World, make_request: Callable[..., FakeRequest]) -> None:
    """A hundred, each with its own bytes."""
    requests = [make_request() for _ in range(100)]

    async def app(flow: FakeFlow, number: int) -> None:
        said = b"%d " % number * 5000

        async def writes() -> None:
            await flow.app_send(said)
            await flow.app_send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(writes)
            assert await flow.app_read_all() == said

    async with trio.open_nursery() as world.nursery:
        for number, request in enumerate(requests):
            world.nursery.start_soon(world.handler.serve, request)
            world.nursery.start_soon(app, request.flow, number)

    assert world.counts() == {"requests": 100, "accepted": 100, "completed": 100}
    assert world.nothing_is_left()
