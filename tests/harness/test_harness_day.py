"""The whole daemon through hours and days, in seconds."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from ngrokd.lab.backends import sample_sha256
from ngrokd.ops.peers import Peer
from tests.harness.world import World, open_world

ROOT = Peer(pid=1, uid=0, gid=0)
HOUR_S = 3600.0
DAY_S = 24 * HOUR_S


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    """A lab and a cable. A test asks for `autojump_clock` itself: pytest-trio looks for clocks nowhere else."""
    async with open_world(tmp_path) as opened:
        yield opened


async def get(world: World, name: str, path: str = "/") -> bytes:
    """What curl would show: one HTTP/1.0-style request by name, read to the end."""
    stream = await world.apps.connect((world.named()[name], 80))
    await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: {name}\r\nConnection: close\r\n\r\n".encode())
    answer = b""
    while part := await stream.receive_some(65536):
        answer += part
    await stream.send_eof()
    return answer.partition(b"\r\n\r\n")[2]


async def echo(world: World, name: str, port: int, data: bytes) -> bytes:
    """Send, end our side, and read what comes back."""
    stream = await world.apps.connect((world.named()[name], port))
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            await stream.send_all(data)
            await stream.send_eof()

        nursery.start_soon(send)
        answer = b""
        while part := await stream.receive_some(65536):
            answer += part
    return answer


async def test_a_program_reaches_an_endpoint_by_name(world: World, autojump_clock: MockClock) -> None:
    """The main job, with no kernel and no socket in it."""
    async with world.running() as daemon:
        await daemon.ready.wait()

        greeting = await get(world, "hello.demo")
        data = bytes(range(256)) * 1000
        answer = await echo(world, "echo.demo", 7, data)

        assert greeting
        assert answer == data
        assert world.output.getvalue().startswith("[ready] ngrokd ")
        assert daemon.status()["state"] == "ready"
    assert "10.107." not in world.hosts.read_text()
    assert "foreign.example" in world.hosts.read_text()


async def test_a_day_with_outage_renewal_and_changing_endpoints(world: World, autojump_clock: MockClock) -> None:
    """What a week in production looks like, and at its end everything is as it should be."""
    world.lab.plane.certificate_lifetime_s = 9 * HOUR_S
    async with world.running() as daemon:
        await daemon.ready.wait()
        wanted = world.named()
        first_serial = await serial_used(world)

        # Morning: an endpoint comes, one goes, one comes back.
        world.lab.add_endpoint("http://new.demo", "http")
        world.lab.remove_endpoint("tcp://banner.demo:25")
        await trio.sleep(120)
        assert set(world.named()) == set(wanted) - {"banner.demo"} | {"new.demo"}
        assert await get(world, "new.demo")
        with pytest.raises(ConnectionRefusedError):
            await world.apps.connect((wanted["banner.demo"], 25))
        world.lab.add_endpoint("tcp://banner.demo:25", "speaks-first")
        await trio.sleep(120)
        assert world.named()["banner.demo"] == wanted["banner.demo"]

        # Noon: three hours without the API. Nobody notices.
        world.lab.set_api_down(True)
        asked = world.lab.plane.connection_count
        for _ in range(18):
            await trio.sleep(600)
            assert await get(world, "hello.demo")
        assert daemon.status()["state"] == "degraded"
        world.lab.set_api_down(False)
        await trio.sleep(65)
        assert daemon.status()["state"] == "ready"
        assert world.lab.plane.connection_count - asked < 20

        # A connection that lives through the renewal of the certificate.
        stream = await world.apps.connect((wanted["echo.demo"], 7))
        await stream.send_all(b"before")
        assert await stream.receive_some(100) == b"before"
        await trio.sleep(7 * HOUR_S)
        assert await serial_used(world) != first_serial
        await stream.send_all(b"after")
        assert await stream.receive_some(100) == b"after"
        await stream.send_eof()
        assert await stream.receive_some(100) == b""

        # Evening: the operator is deleted at ngrok; every address stays.
        old_operator = daemon.status()["operator_id"]
        world.lab.plane.forget_operator(str(old_operator))
        await trio.sleep(120)
        assert daemon.status()["operator_id"] != old_operator
        assert {name: world.named()[name] for name in wanted} == wanted

        await trio.sleep(DAY_S - 11 * HOUR_S)
        assert await get(world, "hello.demo")
        await trio.sleep(60)
        assert daemon.plane.flow_count == 0
        counters = daemon.plane.counters()
        assert counters["relay.bugs"] == 0
    assert world.named() == {}


async def serial_used(world: World) -> int:
    """The serial number of the certificate that the daemon presents to the ingress now."""
    await get(world, "hello.demo")
    return world.lab.ingress.connections[-1].client_serial


async def test_restart_during_an_outage_serves_what_was_last_known(world: World, autojump_clock: MockClock) -> None:
    """Names and addresses survive, and the ready line does not wait for the API."""
    async with world.running() as daemon:
        await daemon.ready.wait()
        wanted = world.named()
    assert world.named() == {}

    world.lab.set_api_down(True)
    async with world.running() as daemon:
        started = trio.current_time()
        await daemon.ready.wait()
        assert trio.current_time() - started < 1.5
        assert world.named() == wanted
        assert await get(world, "hello.demo")
        assert daemon.status()["from_last_known"] is True


async def test_shutdown_gives_live_flows_their_time_and_no_more(world: World, autojump_clock: MockClock) -> None:
    """One that ends in time ends well; one that does not is reset, visibly."""
    async with world.running(net={"drain": "10s"}) as daemon:
        await daemon.ready.wait()
        quick = await world.apps.connect((world.named()["echo.demo"], 7))
        slow = await world.apps.connect((world.named()["echo.demo"], 7))
        address = world.named()["hello.demo"]

        daemon.stop()
        await trio.sleep(1)
        with pytest.raises(ConnectionRefusedError):
            await world.apps.connect((address, 80))
        assert world.named() == {}
        await quick.send_all(b"in time")
        await quick.send_eof()
        assert await quick.receive_some(100) == b"in time"
        assert await quick.receive_some(100) == b""
        started = trio.current_time()
        with pytest.raises(trio.BrokenResourceError):
            await slow.receive_some(100)
        assert trio.current_time() - started < 10


async def test_a_megabyte_each_way_by_name(world: World, autojump_clock: MockClock) -> None:
    """The packet path under load, with nothing real in it."""
    async with world.running() as daemon:
        await daemon.ready.wait()

        body = await get(world, "hello.demo", "/bytes/1000000")

        assert hashlib.sha256(body).hexdigest() == sample_sha256(1_000_000)


async def test_a_name_that_exists_publicly_is_served_and_flagged_later(world: World, autojump_clock: MockClock) -> None:
    """Whoever takes a public name over should know it; nothing waits for DNS."""
    async with world.running() as daemon:
        world.machine.public.add("hello.demo.")
        await daemon.ready.wait()
        assert await get(world, "hello.demo")

        await trio.sleep(60)

        rows = await daemon.commands["list"].handler([], ROOT)
        flags = {row["hostname"]: row["flags"] for row in rows}  # type: ignore[attr-defined]
        assert flags["hello.demo"] == ["shadows-public"]
        assert flags["echo.demo"] == []
